"""`finesight quickstart`: run the complete workflow on generated data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from finesight.cli.options import AsJsonOption


def quickstart(
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder for all files.")] = Path(
        "quickstart"
    ),
    as_json: AsJsonOption = False,
) -> None:
    """Generate train tickets, import and check them, and fine-tune finesight-tiny on them.

    Needs no network and no GPU, and takes about two minutes on two CPU cores. Run it again to
    resume after an interruption.

    Example: finesight quickstart --out /tmp/first
    """
    from rich.console import Console

    from finesight.quickstart_demo import run_quickstart

    result = run_quickstart(out, Console(stderr=as_json))
    if as_json:
        typer.echo(json.dumps(result.as_json()))
