"""`finesight doctor`: diagnose a machine, model or run."""

from __future__ import annotations

import json
import os
from typing import Annotated

import typer

from finesight.cli.options import AsJsonOption

EXIT_ERROR_FOUND = 2


def doctor(
    subject: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN|MODEL",
            help="Run folder, or model or adapter folder. Default: this machine.",
        ),
    ] = None,
    as_json: AsJsonOption = False,
) -> None:
    """Report problems with their effect and a command that fixes them.

    Without an argument, this machine: memory, disks, package conflicts, torch and driver,
    environment variables, and optional packages.

    Run, from its records: why it ended, flat or rising loss, lower metrics, answers without end,
    boxes in wrong coordinates.

    Model or adapter folder: missing or corrupt files.

    The command changes nothing and does not use the network. Exit code: 0 without errors, 2 with
    errors.

    Example: finesight doctor runs/latex
    """
    from finesight.doctor import diagnostics
    from finesight.doctor.diagnosis import count_severity, diagnoses_to_dict, format_diagnoses

    if subject is None:
        diagnosis = diagnostics.diagnose_machine(os.environ)
    else:
        diagnosis = diagnostics.diagnose(subject)
    typer.echo(
        json.dumps(diagnoses_to_dict(diagnosis))
        if as_json
        else "\n".join(format_diagnoses(diagnosis))
    )
    if count_severity(diagnosis, "error"):
        raise typer.Exit(EXIT_ERROR_FOUND)
