"""`finesight data check`: validate samples before training or evaluation."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finesight.cli.options import (
    JSON_OUTPUT,
    BoxFormatOption,
    BoxTaskOption,
    BoxUnitsOption,
    ColumnsOption,
    LanguageOption,
    LimitOption,
    PromptOption,
    SourceFormatOption,
    echo_json,
    parse_column_map,
)
from finesight.errors import UserError

if TYPE_CHECKING:
    from finesight.check.check_issues import CheckIssue
    from finesight.check.data_checker import CheckInput, ModelRequirements

MAX_PRINTED_ISSUES = 3
"""Maximum number of printed examples per kind of issue; further ones are only counted."""

PROGRESS_LOG_ROWS = 10_000
"""Number of rows between two progress lines, if standard error is not a terminal."""

MAX_PAGE_ISSUES = 1000
"""Maximum number of examples per kind of issue on the HTML page."""

AgainstOption = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="EVAL",
        help="Validation data, read with the same options. Reports images, also re-encoded ones, "
        "that are in SOURCE as well. Repeatable.",
    ),
]
ModelNameOption = Annotated[
    str | None,
    typer.Option(
        help="Model folder or hub name. Its tokenizer is used to report special tokens in texts "
        "and, with --max-length, samples that are too long."
    ),
]
MaxLengthOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="With --model: report samples of more than this number of tokens, image tokens "
        "included. Default: no limit.",
    ),
]
FixOption = Annotated[
    Path | None,
    typer.Option(
        metavar="OUT",
        help="Write a corrected copy into this new folder: unambiguous issues are fixed "
        "(listed in changes.jsonl), duplicates and invalid samples are left out (listed in "
        "skipped_samples.jsonl).",
    ),
]
HtmlPageOption = Annotated[
    Path | None,
    typer.Option(
        "--html", metavar="FILE", dir_okay=False, help="Also write the issues as an HTML page."
    ),
]


def check(
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="SOURCE", help="Local files or folders as for `data import`, or one recipe."
        ),
    ],
    against: AgainstOption = None,
    format_name: SourceFormatOption = None,
    columns: ColumnsOption = None,
    prompt: PromptOption = None,
    box_task: BoxTaskOption = "detection",
    box_format: BoxFormatOption = None,
    box_units: BoxUnitsOption = None,
    limit: LimitOption = None,
    model: ModelNameOption = None,
    max_length: MaxLengthOption = None,
    fix: FixOption = None,
    html: HtmlPageOption = None,
    language: LanguageOption = None,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", help=f"Print one JSON object per issue, then one summary, {JSON_OUTPUT}"
        ),
    ] = False,
) -> None:
    """Validate samples: images, boxes, texts, roles, duplicates and leakage.

    For a recipe, its training and validation files are checked with max_length and the tokenizer of
    its model; only --fix, --html, --language and --json apply. Other sources are read as
    by `data import` with these options. Sources are never modified.

    Exit code: 0 without issues or with notes only, 3 with warnings, 2 with errors.

    Example: finesight data check latex/train.jsonl --against latex/eval.jsonl --html check.html
    """
    from finesight.check.data_checker import (
        inputs_from_files,
        inputs_from_recipe,
        is_recipe,
        load_model_requirements,
    )
    from finesight.data.import_source import ImportOptions

    options = ImportOptions(
        format=format_name,
        columns=parse_column_map(columns or []),
        prompt=prompt,
        box_task=box_task,
        box_format=box_format,
        box_units=box_units,
        limit=limit,
    )
    recipe = next(filter(is_recipe, sources), None) if format_name is None else None
    if recipe is not None:
        if len(sources) > 1 or options != ImportOptions() or against or model or max_length:
            raise UserError(
                "other options or sources are given with a recipe",
                where=str(recipe),
                expected="one recipe with --fix, --html and --json only",
                remedy="remove the other arguments, or check the data files directly",
            )
        inputs, model_context = inputs_from_recipe(recipe)
    else:
        inputs, model_context = (
            inputs_from_files(sources, against or [], options),
            load_model_requirements(model, max_length),
        )
    raise typer.Exit(_run_check(inputs, model_context, fix, html, language, as_json))


def _run_check(
    inputs: Sequence[CheckInput],
    model_context: ModelRequirements,
    fix: Path | None,
    html: Path | None,
    language: LanguageOption,
    as_json: bool,
) -> int:
    """Run a data check, and write its summary, HTML page and fixed samples.

    Returns the exit code for the highest severity of the issues.
    """
    from finesight.check.check_issues import format_summary, summary_to_dict
    from finesight.check.data_checker import DataChecker
    from finesight.report.data_pages import render_check_page
    from finesight.report.html import raise_if_not_generated, write_page
    from finesight.report.i18n import detect_language, use_language
    from finesight.storage import write_folder

    if html:
        raise_if_not_generated(html)

    def print_issue(issue: CheckIssue) -> None:
        if as_json:
            echo_json(issue.as_json())

    with write_folder(fix) if fix else tempfile.TemporaryDirectory() as folder:
        checker = DataChecker(
            inputs, Path(folder), model_context, MAX_PAGE_ISSUES if html else MAX_PRINTED_ISSUES
        )
        with _show_progress(checker.num_rows) as on_progress:
            result, image_catalog = checker.run(print_issue, on_progress)
        if not as_json:
            typer.echo("\n".join(format_summary(result, MAX_PRINTED_ISSUES)))
        if html:
            with use_language(language or detect_language()):
                write_page(html, render_check_page(result))
        fix_summary = (
            checker.fixer.write(Path(folder), fix, image_catalog, checker.sources) if fix else None
        )
    if as_json:
        echo_json(summary_to_dict(result, fix_summary))
    elif fix_summary:
        typer.echo("\n".join(["", *fix_summary.as_lines()]))
    return result.exit_code


@contextmanager
def _show_progress(total_rows: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on a terminal, or progress lines elsewhere.

    Yields a callback that takes the number of newly checked rows.
    """
    from rich.console import Console

    from finesight.train.console import TrainingConsole

    console = TrainingConsole(Console(stderr=True))
    done = 0
    with console.progress_stage("rows", total_rows) as update_bar:

        def on_progress(num_rows: int) -> None:
            nonlocal done
            update_bar(num_rows)
            if (
                not console.rich_console.is_terminal
                and done // PROGRESS_LOG_ROWS < (done + num_rows) // PROGRESS_LOG_ROWS
            ):
                console.log(f"{done + num_rows} rows")
            done += num_rows

        yield on_progress
