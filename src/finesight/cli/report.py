"""`finesight report`: the page of a run, made again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from finesight.cli.options import PageLanguage


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", dir_okay=False, help="Where to write it: RUN/report.html."),
    ] = None,
    language: PageLanguage = None,
    as_json: Annotated[bool, typer.Option("--json", help="The result as one JSON object.")] = False,
) -> None:
    """Make the report of a run again: one page with its figures, curves and answers.

    A run writes it at its end, and a short one about once a minute and whenever it is measured;
    pictures are read anew.
    The page opens without a network and shows the run as it is now, finished or not. It replaces
    an older page, and nothing else.

    Example: finesight report runs/latex --out latex.html
    """
    from finesight.report.run_page import write_report

    page = write_report(run, out, language=language)
    typer.echo(json.dumps({"report": str(page)}) if as_json else f"page: {page}")
