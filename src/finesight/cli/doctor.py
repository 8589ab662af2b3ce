"""`finesight doctor`: diagnosis of a machine, model, recipe or run."""

from __future__ import annotations

import json
import os
from typing import Annotated, Literal

import typer

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
        typer.Option(help="Also check the connection to this hub and the token."),
    ] = None,
    smoke_test: Annotated[
        bool,
        typer.Option(help="Train and generate with finesight-tiny on the CPU and on every GPU."),
    ] = True,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the findings as one JSON object.")
    ] = False,
) -> None:
    """Report problems with their effect and a command that fixes them.

    Machine: memory, disks, package conflicts, torch and driver, environment variables, a training
    test of half a minute on every device, and extras. Run, from its own records: why it ended, flat
    or rising loss, lower metrics, answers without end, boxes in wrong coordinates. Recipe: missing
    requirements. Model folder: missing or corrupt files.

    The command changes nothing. It uses the network only with --hub. Exit code: 0 without errors, 2
    with errors.

    Example: finesight doctor runs/latex
    """
    from finesight.doctor import diagnostics
    from finesight.doctor.diagnosis import count_errors, diagnoses_to_dict, format_diagnoses
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
    if count_errors(diagnosis):
        raise typer.Exit(EXIT_ERROR_FOUND)
