"""`finesight report` and `finesight compare`: write HTML pages about runs."""

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


def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN",
            help="2 to 8 run folders or prediction files of `finesight eval --out`. The first one "
            "is the baseline.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", dir_okay=False, help="HTML page.")] = Path(
        "comparison.html"
    ),
    language: LanguageOption = None,
    as_json: AsJsonOption = False,
) -> None:
    """Compare runs with a baseline run, on the validation samples that both answered.

    The page contains the differences of recipes and data, metrics with 95 % intervals and the
    significance of each difference, loss curves, cost, and samples side by side. Unfinished runs
    are allowed. The page needs no network. An existing page is replaced, but no other file.

    To compare a base model with a tuned one, evaluate both with `finesight eval --out` and compare
    the two files.

    Example: finesight compare runs/rank8 runs/rank64 --out ranks.html

    Example: finesight compare base.jsonl tuned.jsonl
    """
    from finesight.report.compare_page import write_compare_page
    from finesight.report.html import raise_if_not_generated

    raise_if_not_generated(out)
    comparison = write_compare_page(runs, out, language)
    if as_json:
        typer.echo(json.dumps({"page": str(out), **comparison.as_json()}))
        return
    typer.echo(comparison.format_table())
    for text in comparison.warnings:
        typer.echo(f"note: {text}")
    typer.echo(f"page: {out}")
