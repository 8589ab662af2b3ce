"""`finesight data check`: what is wrong with samples, before they are trained or measured on."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finesight.cli.options import (
    Ask,
    BoxNumbers,
    BoxUnits,
    Columns,
    Limit,
    PageLanguage,
    Prompt,
    SourceFormat,
    column_map,
    echo_json,
)
from finesight.errors import UserError

if TYPE_CHECKING:
    from finesight.check.findings import Finding
    from finesight.check.subjects import Model, Packed, Subject

SHOWN = 3
"""Findings of each fault that are printed; the others are counted."""

LINE = 10_000
"""Rows after which a log gets another line."""

KEPT = 1000
"""Findings of each fault that a page can show."""

Against = Annotated[
    list[Path] | None,
    typer.Option(metavar="EVAL", help="Held-out samples, whose pictures must not be in SOURCE."),
]
ModelName = Annotated[
    str | None,
    typer.Option(help="A model folder or hub name: its special tokens are looked for as well."),
]
MaxLength = Annotated[
    int | None, typer.Option(min=1, help="With --model: report samples of more tokens than this.")
]
Fix = Annotated[
    Path | None,
    typer.Option(
        metavar="OUT",
        help="Write the samples into this new folder, mended where that is certain, without those "
        "that cannot be used; left_out.jsonl and changes.jsonl say what was done.",
    ),
]
Page = Annotated[
    Path | None,
    typer.Option("--html", metavar="FILE", dir_okay=False, help="Draw the findings into a page."),
]


def check(
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="SOURCE...", help="Files or folders as for `data import`; or one recipe."
        ),
    ],
    against: Against = None,
    format_name: SourceFormat = None,
    columns: Columns = None,
    prompt: Prompt = None,
    ask: Ask = "detection",
    box_format: BoxNumbers = None,
    box_units: BoxUnits = None,
    limit: Limit = None,
    model: ModelName = None,
    max_length: MaxLength = None,
    fix: Fix = None,
    html: Page = None,
    language: PageLanguage = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object a finding, then one summary.")
    ] = False,
) -> None:
    """Find what is wrong with samples: pictures, boxes, texts, turns, and what repeats or leaks.

    A recipe's train and eval files are checked with its model's tokenizer and max_length. Other
    sources are read as `data import` reads them, all with the same options. They are never
    changed.

    Ends with 0 when nothing was found or only notes, with 3 for warnings, with 2 for errors.

    Example: finesight data check latex/train.jsonl --against latex/eval.jsonl --html check.html
    """
    from finesight.check.subjects import is_recipe, model_of, of_files, of_recipe
    from finesight.data.opening import Request

    request = Request(
        format=format_name,
        columns=column_map(columns or []),
        prompt=prompt,
        ask=ask,
        box_format=box_format,
        box_units=box_units,
        limit=limit,
    )
    recipe = next(filter(is_recipe, sources), None) if format_name is None else None
    if recipe is not None:
        if len(sources) > 1 or request != Request() or against or model or max_length:
            raise UserError(
                "options or sources beside a recipe, which has its own",
                where=str(recipe),
                expected="a recipe with no more than --fix, --html and --json",
                remedy="leave the others out, or check the data files themselves",
            )
        subjects, judge = of_recipe(recipe)
    else:
        subjects, judge = of_files(sources, against or [], request), model_of(model, max_length)
    raise typer.Exit(_carried_out(subjects, judge, fix, html, language, as_json))


def _carried_out(
    subjects: Sequence[Subject | Packed],
    judge: Model,
    fix: Path | None,
    html: Path | None,
    language: PageLanguage,
    as_json: bool,
) -> int:
    """Check, print, draw and mend; gives the exit code."""
    from finesight.check.findings import exit_code
    from finesight.check.run import Check
    from finesight.check.summary import as_lines, as_record
    from finesight.report.check_page import check_page
    from finesight.report.language import preferred, speaking
    from finesight.report.page import refuse_other_files, write_page
    from finesight.storage import write_folder

    if html:
        refuse_other_files(html)

    def tell(finding: Finding) -> None:
        if as_json:
            echo_json(finding.as_json())

    with write_folder(fix) if fix else tempfile.TemporaryDirectory() as folder:
        check = Check(subjects, Path(folder), judge, KEPT if html else SHOWN)
        with _progress(check.rows) as advance:
            checked, album = check.run(tell, advance)
        if not as_json:
            typer.echo("\n".join(as_lines(checked, SHOWN)))
        if html:
            with speaking(language or preferred()):
                write_page(html, check_page(checked))
        mended = check.mending.write(Path(folder), fix, album, check.drafts) if fix else None
    if as_json:
        echo_json(as_record(checked, mended))
    elif mended:
        typer.echo("\n".join(["", *mended.as_lines()]))
    return exit_code(checked.severity)


@contextmanager
def _progress(rows: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, a line now and then in a log: what to call with each number of rows that
    is done."""
    from rich.console import Console

    from finesight.train.progress import Screen

    screen = Screen(Console(stderr=True))
    done = 0
    with screen.stage("rows", rows) as advance_bar:

        def advance(more: int) -> None:
            nonlocal done
            advance_bar(more)
            if not screen.console.is_terminal and done // LINE < (done + more) // LINE:
                screen.say(f"{done + more} rows")
            done += more

        yield advance
