"""`finesight doctor`: diagnose a machine, model, recipe or run."""

from __future__ import annotations

import json
import os
from typing import Annotated, Literal

import typer

from finesight.cli.options import AsJsonOption

EXIT_ERROR_FOUND = 2


def doctor(
    subject: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN|RECIPE|MODEL",
            help="Run folder, recipe, or model or adapter folder. Default: this machine.",
        ),
    ] = None,
    hub: Annotated[
        Literal["huggingface", "modelscope"] | None,
        typer.Option(
            help="Also check the connection to this hub and the token. Only for this machine."
        ),
    ] = None,
    smoke_test: Annotated[
        bool,
        typer.Option(
            help="Train and generate with finesight-tiny on the CPU and on every GPU, about half a "
            "minute each. Only for this machine."
        ),
    ] = True,
    as_json: AsJsonOption = False,
) -> None:
    """Report problems with their effect and a command that fixes them.

    Without an argument, this machine: memory, disks, package conflicts, torch and driver,
    environment variables, a short training on every device, and optional packages.

    Run, from its records: why it ended, flat or rising loss, lower metrics, answers without end,
    boxes in wrong coordinates.

    Recipe: missing packages and data files, a precision that the GPU does not support, an output
    folder without space.

    Model or adapter folder: missing or corrupt files.

    The command changes nothing and uses the network only with --hub. Exit code: 0 without errors, 2
    with errors.

    Example: finesight doctor runs/latex
    """
    from finesight.doctor import diagnostics
    from finesight.doctor.diagnosis import count_severity, diagnoses_to_dict, format_diagnoses
    from finesight.errors import UserError

    if subject is None:
        if smoke_test:
            typer.echo("diagnosing this machine and running a short training ...", err=True)
        diagnosis = diagnostics.diagnose_machine(os.environ, hub=hub, run_smoke_test=smoke_test)
    elif hub is not None:
        raise UserError(
            f"--hub {hub} is given with {subject}",
            where="finesight doctor",
            expected="--hub without a subject, for a diagnosis of this machine",
            remedy=f"finesight doctor --hub {hub}",
        )
    else:
        diagnosis = diagnostics.diagnose(subject)
    typer.echo(
        json.dumps(diagnoses_to_dict(diagnosis))
        if as_json
        else "\n".join(format_diagnoses(diagnosis))
    )
    if count_severity(diagnosis, "error"):
        raise typer.Exit(EXIT_ERROR_FOUND)
