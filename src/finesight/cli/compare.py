"""`finesight compare`: several runs on one page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from finesight.cli.options import PageLanguage


def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...",
            help="Folders of runs, or files of answers that `finesight eval --out` wrote: 2 to 8.",
        ),
    ],
    out: Annotated[
        Path, typer.Option(metavar="FILE", dir_okay=False, help="Where to write the page.")
    ] = Path("comparison.html"),
    language: PageLanguage = None,
    as_json: Annotated[bool, typer.Option("--json", help="The result as one JSON object.")] = False,
) -> None:
    """Compare runs with the first of them, on the same held-out samples.

    The page shows what differs in their recipes and data, their figures with 95 % intervals and
    how sure each difference is, their curves, their cost, and the same samples side by side. Runs
    may still go on. It opens without a network, and replaces an older page, and nothing else.

    Example: finesight compare runs/rank8 runs/rank64 --out ranks.html
    """
    from finesight.report.compare_page import write_comparison
    from finesight.report.page import refuse_other_files

    refuse_other_files(out)
    found = write_comparison(runs, out, language)
    if as_json:
        typer.echo(json.dumps({"page": str(out), **found.as_json()}))
        return
    typer.echo(found.as_table())
    for text in found.cautions:
        typer.echo(f"note: {text}")
    typer.echo(f"page: {out}")
