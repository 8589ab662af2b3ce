"""`finesight doctor`: what is wrong with this machine, a model, a recipe or a run."""

from __future__ import annotations

import json
import os
from typing import Annotated, Literal

import typer

FOUND = 2


def doctor(
    subject: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN|RECIPE|MODEL",
            help="A run, a recipe, or the folder of a model or adapter; else this machine.",
        ),
    ] = None,
    hub: Annotated[
        Literal["huggingface", "modelscope"] | None,
        typer.Option(help="Ask this hub, too, whether it answers and knows the token."),
    ] = None,
    trial: Annotated[
        bool,
        typer.Option(help="Train and answer with finesight-tiny, on the CPU and on every GPU."),
    ] = True,
    as_json: Annotated[
        bool, typer.Option("--json", help="The findings as one JSON object.")
    ] = False,
) -> None:
    """Say what is wrong, why it matters, and the command that mends it.

    Of this machine: memory and disks, packages whose versions clash, torch and the driver,
    variables of the environment, half a minute of training on every device, and the extras. Of a
    run: why it ended, a loss that is flat or rises, scores that fell, answers without end, boxes in
    another frame, by its own records. Of a recipe: what it needs that is not here. Of a model's
    folder: whether all of it is there and whole.

    Nothing is changed, and nothing is sent but with --hub, to that hub alone. Ends with 0 when
    there is no fault, with 2 when there is one.

    Example: finesight doctor runs/latex
    """
    from finesight.doctor import examine
    from finesight.doctor.findings import as_lines, as_record, faults
    from finesight.errors import UserError

    if subject is None:
        if trial:
            typer.echo("looking at this machine, and training on it for a moment ...", err=True)
        found = examine.examine_machine(os.environ, hub=hub, try_out=trial)
    elif hub is not None:
        raise UserError(
            f"--hub {hub} beside {subject}",
            where="finesight doctor",
            expected="a hub is asked when this machine is looked at",
            remedy=f"finesight doctor --hub {hub}",
        )
    else:
        found = examine.examine(subject)
    typer.echo(json.dumps(as_record(found)) if as_json else "\n".join(as_lines(found)))
    if faults(found):
        raise typer.Exit(FOUND)
