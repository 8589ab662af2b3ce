"""`finesight quickstart`: the whole path on a small task, in minutes, on a CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def quickstart(
    out: Annotated[Path, typer.Option(help="A folder for everything that is made.")] = Path(
        "quickstart"
    ),
    as_json: Annotated[
        bool, typer.Option("--json", help="The result as one JSON object at the end.")
    ] = False,
) -> None:
    """Draw train tickets, import and check them, and teach the package's small model to read them.

    Needs no network and no GPU. Stopped half-way, the same command goes on where it was.

    Example: finesight quickstart --out /tmp/first
    """
    from rich.console import Console

    from finesight.quickstart import quickstart as run

    done = run(out, Console(stderr=as_json))
    if as_json:
        typer.echo(json.dumps(done.as_json()))
