"""`finesight report`: the HTML report of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from finesight.cli.options import LanguageOption


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", dir_okay=False, help="Output page. Default: RUN/report.html."),
    ] = None,
    language: LanguageOption = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as one JSON object.")
    ] = False,
) -> None:
    """Write the report of a run: one page with metrics, loss curves and answers.

    Training writes the report at the end, and a short report about once a minute and after each
    evaluation. This command reads the images again. The page needs no network and shows the current
    state of the run. It replaces an existing page, but no other file.

    Example: finesight report runs/latex --out latex.html
    """
    from finesight.report.run_page import write_report

    page = write_report(run, out, language=language)
    typer.echo(json.dumps({"report": str(page)}) if as_json else f"page: {page}")
