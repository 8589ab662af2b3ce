"""`finesight report`: write the HTML report of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from finesight.cli.options import AsJsonOption, LanguageOption


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", dir_okay=False, help="HTML page. Default: RUN/report.html."),
    ] = None,
    language: LanguageOption = None,
    as_json: AsJsonOption = False,
) -> None:
    """Write the HTML report of a run: one page with metrics, loss curves and answers.

    Training writes the report at the end, and a short one about once a minute and after each
    evaluation. This command writes it again, also for a running or killed run, with the images at
    their current paths. The page needs no network. An existing page is replaced, but no other file.

    Example: finesight report runs/latex --out latex.html
    """
    from finesight.report.run_page import write_report

    page = write_report(run, out, language=language)
    typer.echo(json.dumps({"report": str(page)}) if as_json else f"page: {page}")
