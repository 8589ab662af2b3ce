"""Commands of data: `import`, `check`, `show`, `plan`, `data export`, `data convert-boxes`."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import click

from finesight.errors import UserError, escape_unprintable, format_command, format_count
from finesight.operations.operation import Parameter
from finesight.operations.options import (
    JSON_OUTPUT,
    AsJsonOption,
    BoxFormatOption,
    BoxTaskOption,
    BoxUnitsOption,
    ColumnsOption,
    LanguageOption,
    LimitOption,
    NoHeaderOption,
    OverridesArgument,
    PromptOption,
    RecipeArgument,
    RowRangeOption,
    SourceFormatOption,
    echo_json,
    echo_result,
    parse_column_map,
    parse_row_range,
)

if TYPE_CHECKING:
    from finesight.check.check_issues import CheckIssue
    from finesight.check.data_checker import CheckInput, ModelRequirements
    from finesight.data.exporter import ExportSummary
    from finesight.data.importer import ImportSummary
    from finesight.data.sample import LocatedSample
    from finesight.encode.box_migration import MigrationResult, ResizeSpec
    from finesight.encode.renderer import Renderer


EvalLastOption = Annotated[
    int | None,
    Parameter(
        "Use the last N rows for validation, and leave out training rows with the same "
        "images. Not with --train-fraction.",
        minimum=1,
    ),
]
TrainFractionOption = Annotated[
    float | None,
    Parameter(
        "Fraction of the rows for training, between 0 and 1, such as 0.9; the others are for "
        "validation. Rows with the same image stay together. Not with --eval-last. Default: no "
        "split.",
        metavar="FRACTION",
    ),
]
SplitSeedOption = Annotated[int, Parameter("Random seed of --train-fraction.", minimum=0)]
CopyImagesOption = Annotated[
    bool,
    Parameter(
        "Copy the images into OUT/images. Default: OUT refers to the images in place; those "
        "from hubs, the web and archives are always copied.",
        option="--copy-images",
    ),
]
OnInvalidRowOption = Annotated[
    Literal["fail", "skip"],
    Parameter(
        "Invalid rows, such as a missing image or an impossible box: fail and write nothing, "
        "or skip them and list them in OUT/skipped_rows.jsonl."
    ),
]
OnInvalidBoxOption = Annotated[
    Literal["fail", "drop", "clip"] | None,
    Parameter(
        "Invalid boxes, such as one without area: fail as an invalid row, drop them, or clip "
        "them to the image. Default: fail, or clip with --on-invalid-row skip."
    ),
]
EncodingOption = Annotated[
    str | None,
    Parameter(
        "Encoding of a .csv or .tsv file, such as cp1250 or gb18030. Default: detect it.",
        metavar="NAME",
    ),
]
SourceArgument = Annotated[
    str,
    Parameter(
        "A .json, .jsonl, .csv, .tsv, .xlsx or .parquet file, a WebDataset (.tar), a zip or "
        "tar archive, a folder, hf:OWNER/NAME or modelscope:OWNER/NAME (optional @REVISION and "
        ":SPLIT), or https://HOST/FILE.",
        metavar="SOURCE",
        is_positional=True,
    ),
]
AllowHostOption = Annotated[
    list[str] | None,
    Parameter(
        "Allow downloads of https:// sources and images from this host. Repeatable.",
        option="--allow-host",
        metavar="HOST",
    ),
]
OutFolderArgument = Annotated[
    Path,
    Parameter("Folder to create; an existing one is an error.", metavar="OUT", is_positional=True),
]


def import_data(
    source: SourceArgument,
    out: OutFolderArgument,
    format_name: SourceFormatOption = None,
    columns: ColumnsOption = None,
    prompt: PromptOption = None,
    box_task: BoxTaskOption = "detection",
    box_format: BoxFormatOption = None,
    box_units: BoxUnitsOption = None,
    row_range: RowRangeOption = None,
    limit: LimitOption = None,
    eval_last: EvalLastOption = None,
    train_fraction: TrainFractionOption = None,
    seed: SplitSeedOption = 0,
    on_invalid_row: OnInvalidRowOption = "fail",
    on_invalid_box: OnInvalidBoxOption = None,
    copy_images: CopyImagesOption = False,
    encoding: EncodingOption = None,
    no_header: NoHeaderOption = False,
    allow_host: AllowHostOption = None,
    as_json: AsJsonOption = False,
) -> None:
    """Import a dataset as samples: OUT/data.jsonl, or OUT/train.jsonl and OUT/eval.jsonl.

    Image paths are relative to the folder of SOURCE, or to the working directory if the file does
    not exist there. Sources from a hub, the web or an archive contain their own images, which are
    copied.

    A row with several answers becomes one training sample per answer, or one validation sample that
    accepts all of them. Downloads resume and use the cache (HF_HOME). For hub datasets, only the
    files required by --rows and --limit are downloaded.

    Example: finesight import latex.csv latex --map image=image_path --map answer=text
    --prompt "Read the formula." --train-fraction 0.9
    """

    from finesight.data.import_source import ImportOptions
    from finesight.data.importer import import_dataset
    from finesight.data.source_fetch import fetch_source
    from finesight.progress import ProgressConsole

    options = ImportOptions(
        format=format_name,
        columns=parse_column_map(columns or []),
        prompt=prompt,
        box_format=box_format,
        box_units=box_units,
        row_range=parse_row_range(row_range),
        limit=limit,
        eval_last=eval_last,
        train_fraction=train_fraction,
        seed=seed,
        copy_images=copy_images,
        box_task=box_task,
        on_invalid_row=on_invalid_row,
        on_invalid_box=on_invalid_box,
        encoding=encoding,
        no_header=no_header,
    )
    with fetch_source(source, out, options, allow_host or ()) as fetched:
        progress_stage = ProgressConsole().progress_stage
        summary = import_dataset(fetched.path, out, fetched.options, progress_stage)
    for note in fetched.notes:
        click.echo(escape_unprintable(f"{source}: {note}"), err=True)
    echo_result(dataclasses.asdict(summary), _format_summary(source, summary), as_json)


def _format_summary(source: str, summary: ImportSummary) -> list[str]:
    lines = [
        f"{source}: {format_count(summary.num_rows, 'row')}, read as {summary.format}"
        f" ({summary.detected_by})",
        *([f"  {summary.text_format}"] if summary.text_format else []),
        *(
            f"  {file.file}: {format_count(file.num_samples, 'sample')}"
            f" from {format_count(file.num_rows, 'row')}"
            for file in summary.output_files
        ),
        *(f"  {line}" for line in summary.list_skipped()),
        f"  {format_count(summary.num_images, 'image')}",
    ]
    if summary.skipped_rows_file is not None:
        lines.append(f"  {summary.skipped_rows_file}: invalid rows with reasons")
    if summary.num_clipped_boxes:
        lines.append(f"  {summary.num_clipped_boxes} boxes clipped by at most 1 pixel")
    lines += [f"  {count} {source_note}" for source_note, count in summary.source_notes.items()]
    lines += [f"  {line}" for line in summary.list_other_keys()]
    if summary.unused_columns:
        lines.append(f"  unused columns: {', '.join(summary.list_unused_columns())}")
        if not summary.num_images:
            lines.append("  no images: --map image=COLUMN sets the column of the image paths")
    train, *validation = (str(file.file) for file in summary.output_files)
    against = ["--against", *validation] if validation else []
    return [*lines, f"next: {format_command('check', train, *against)}"]


def export_data(
    samples: Annotated[
        Path,
        Parameter(
            "Samples file, as written by `finesight import`.", metavar="SAMPLES", is_positional=True
        ),
    ],
    out: OutFolderArgument,
    target_format: Annotated[
        str,
        Parameter(
            "ms-swift, llama-factory, llava, openai, coco, yolo, label-studio, cvat, fiftyone "
            "or another --format of `finesight import`.",
            option="--to",
            metavar="FORMAT",
        ),
    ],
    copy_images: Annotated[
        bool,
        Parameter(
            "Copy the images into OUT/images. Default: OUT refers to the images in place.",
            option="--copy-images",
        ),
    ] = False,
    as_json: AsJsonOption = False,
) -> None:
    """Export samples in the format of another program.

    Features that the format does not support are counted. A sample that the format cannot represent
    is an error. `finesight import` reads every format.

    Example: finesight data export latex/train.jsonl latex-swift --to ms-swift
    """
    from finesight.data.exporter import export_dataset
    from finesight.data.sample import LocatedSample, read_samples

    located_samples = [LocatedSample(sample, samples.parent) for sample in read_samples(samples)]
    summary = export_dataset(located_samples, out, target_format, copy_images=copy_images)
    echo_result(dataclasses.asdict(summary), _format_export_summary(out, summary), as_json)


def _format_export_summary(out: Path, summary: ExportSummary) -> list[str]:
    files = [str(file) for file in summary.files[:MAX_PRINTED_FILES]]
    files += (
        [f"and {len(summary.files) - MAX_PRINTED_FILES} more"]
        if len(summary.files) > MAX_PRINTED_FILES
        else []
    )
    # Formats of one data file are read from it, and others from the folder.
    first_file = Path(summary.files[0])
    is_one_file = first_file.suffix in (".json", ".jsonl") and summary.format != "labelme"
    source = first_file if is_one_file else out
    return [
        f"{out}: {format_count(summary.num_samples, 'sample')} in the format {summary.format}",
        f"  {', '.join(files)}",
        f"  {format_count(summary.num_images, 'image')}",
        *(f"  not supported: {count} {feature}" for feature, count in summary.lost_counts.items()),
        *(f"  note: {note}" for note in summary.notes),
        f"next: {format_command('check', source, '--format', summary.format)}",
    ]


MAX_PRINTED_FILES = 3
"""Maximum number of printed file names; further files are only counted."""


BoxFamily = Literal["qwen_vl", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"]

DEFAULT_SIZE_FACTOR = 28
"""Divisor of resized image sides in pixels, for `--image` without `--model`.

All published Qwen2.5-VL models use this value (patch size 14, merge size 2).
"""

MAX_PRINTED_RECORDS = 3
"""Maximum number of printed locations of texts that were not converted."""


def convert_boxes(
    file: Annotated[
        Path,
        Parameter(
            ".json or .jsonl file in the format of any trainer; only box texts are changed.",
            metavar="FILE",
            is_positional=True,
        ),
    ],
    out: Annotated[Path, Parameter("File to create.", metavar="OUT", is_positional=True)],
    source_family: Annotated[
        BoxFamily, Parameter("Model family whose box format FILE has.", option="--from")
    ],
    target_family: Annotated[
        BoxFamily, Parameter("Model family whose box format OUT gets.", option="--to")
    ],
    model: Annotated[
        str | None,
        Parameter(
            "Qwen2.5-VL model (folder or hub name) whose pixel limits define the resized "
            "image. For qwen2_5_vl, this or --image is required.",
            metavar="MODEL",
        ),
    ] = None,
    image: Annotated[
        list[str] | None,
        Parameter(
            "Resizing as in `image` of a recipe: min_pixels=N and max_pixels=N, height=N and "
            "width=N, or longest_side=N, each with its own --image. Repeatable.",
            metavar="KEY=VALUE",
        ),
    ] = None,
    as_json: AsJsonOption = False,
) -> None:
    """Rewrite the boxes in answers of a file for another model family.

    For files made for other trainers. Files of `finesight import` fit every family: change the
    model in the recipe instead.

    qwen_vl and qwen2_vl use special tokens in the text, qwen2_5_vl and qwen3_vl use JSON.
    Coordinates of qwen2_5_vl are pixels of the resized image, which --model or --image defines.
    Other families use thousandths of the image sides. Text outside of box answers is unchanged.

    Example: finesight data convert-boxes old.jsonl new.jsonl --from qwen2_vl --to qwen2_5_vl
    --model Qwen/Qwen2.5-VL-3B-Instruct
    """
    from finesight.encode.box_migration import migrate_box_file

    summary = migrate_box_file(
        file, out, source_family, target_family, _resolve_resize_rule(model, image or [])
    )
    echo_result(dataclasses.asdict(summary), _format_conversion(summary), as_json)


def _resolve_resize_rule(model: str | None, pairs: list[str]) -> ResizeSpec | None:
    """Build the resize rule of Qwen2.5-VL images from `--model` and `--image`.

    `--image` has precedence over the rule of the model. Returns None if neither is given.
    """
    from pydantic import TypeAdapter, ValidationError

    from finesight.config import ImageRule
    from finesight.encode.box_migration import ResizeSpec
    from finesight.model_folder import locate_model
    from finesight.vision.image_processing import get_default_image_rule

    if model is None and not pairs:
        return None
    preprocessor_config = {"patch_size": DEFAULT_SIZE_FACTOR, "merge_size": 1}
    if model is not None:
        folder = locate_model(model)
        if folder.family != "qwen2_5_vl":
            raise UserError(
                f"the model family is {folder.family}",
                where="--model",
                expected="a Qwen2.5-VL model, whose boxes are pixels of the resized image",
                remedy="give the model that the boxes are written for",
            )
        preprocessor_config = folder.preprocessor_config
    size_factor = preprocessor_config["patch_size"] * preprocessor_config["merge_size"]
    if not pairs:
        return ResizeSpec(get_default_image_rule(preprocessor_config), size_factor)
    try:
        values = {key: int(value) for key, _, value in (pair.partition("=") for pair in pairs)}
        rule: ImageRule = TypeAdapter(ImageRule).validate_python(values)
    except (ValueError, ValidationError) as error:
        raise UserError(
            f"{' '.join(pairs)} is not an image rule",
            where="--image",
            expected="min_pixels and max_pixels, height and width, or longest_side",
            remedy="for example --image height=112 --image width=504",
        ) from error
    return ResizeSpec(rule, size_factor)


def _format_conversion(summary: MigrationResult) -> list[str]:
    lines = [
        f"{summary.file}: {summary.num_records} records, {summary.num_boxes} boxes rewritten in "
        f"{summary.answers_with_boxes} answers",
        f"  {summary.answers_without_boxes} answers without boxes",
    ]
    if summary.unconverted:
        record_names = ", ".join(summary.unconverted[:MAX_PRINTED_RECORDS])
        ellipsis = ", ..." if len(summary.unconverted) > MAX_PRINTED_RECORDS else ""
        lines.append(
            f"  warning: other texts of {len(summary.unconverted)} records contain points or "
            f"describe the box format ({record_names}{ellipsis}). They are unchanged: check that "
            "they match the answers"
        )
    return lines


MAX_PRINTED_ISSUES = 3
"""Maximum number of printed examples per kind of issue; further ones are only counted."""

PROGRESS_LOG_ROWS = 10_000
"""Number of rows between two progress lines, if standard error is not a terminal."""

MAX_PAGE_ISSUES = 1000
"""Maximum number of examples per kind of issue on the HTML page."""

AgainstOption = Annotated[
    list[Path] | None,
    Parameter(
        "Validation data, read with the same options. Reports images, also re-encoded ones, "
        "that are in SOURCE as well. Repeatable.",
        metavar="EVAL",
    ),
]
ModelNameOption = Annotated[
    str | None,
    Parameter(
        "Model folder or hub name. Its tokenizer is used to report special tokens in texts "
        "and, with --max-length, samples that are too long."
    ),
]
MaxLengthOption = Annotated[
    int | None,
    Parameter(
        "With --model: report samples of more than this number of tokens, image tokens "
        "included. Default: no limit.",
        minimum=1,
    ),
]
FixOption = Annotated[
    Path | None,
    Parameter(
        "Write a corrected copy into this new folder: unambiguous issues are fixed "
        "(listed in changes.jsonl), duplicates and invalid samples are left out (listed in "
        "skipped_samples.jsonl).",
        metavar="OUT",
    ),
]
HtmlPageOption = Annotated[
    Path | None,
    Parameter(
        "Also write an HTML page with the issues, statistics and random samples.",
        option="--html",
        metavar="FILE",
        path="file",
    ),
]


def check(
    sources: Annotated[
        list[Path],
        Parameter(
            "Local files or folders as for `import`, or one recipe.",
            metavar="SOURCE",
            is_positional=True,
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
    seed: Annotated[int, Parameter("Random seed of the samples on the HTML page.", minimum=0)] = 0,
    language: LanguageOption = None,
    as_json: Annotated[
        bool,
        Parameter(
            f"Print one JSON object per issue, then one summary, {JSON_OUTPUT}", option="--json"
        ),
    ] = False,
) -> None:
    """Validate samples: images, boxes, texts, roles, duplicates and leakage.

    For a recipe, its training and validation files are checked with max_length and the tokenizer of
    its model; only --fix, --html, --seed, --language and --json apply. Other sources are read as
    by `import` with these options. Sources are never modified.

    Exit code: 0 without issues or with notes only, 3 with warnings, 2 with errors.

    Example: finesight check latex/train.jsonl --against latex/eval.jsonl --html check.html
    """
    from finesight.check.check_issues import EXIT_CODES
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
                expected="one recipe with --fix, --html, --seed and --json only",
                remedy="remove the other arguments, or check the data files directly",
            )
        inputs, model_context = inputs_from_recipe(recipe)
    else:
        inputs, model_context = (
            inputs_from_files(sources, against or [], options),
            load_model_requirements(model, max_length),
        )
    exit_code, can_fix = _run_check(inputs, model_context, fix, html, language, as_json, seed)
    has_errors = exit_code == EXIT_CODES["error"]
    is_fixable = recipe is None and fix is None and can_fix
    # Other commands would need the other options and files, too.
    is_one_file = len(sources) == 1 and not against and model is None and max_length is None
    has_command = options == ImportOptions() and (recipe is not None or is_one_file)
    if not as_json and has_command and (is_fixable or not has_errors):
        click.echo(_get_command_after_check(sources[0], recipe, fix, has_errors))
    raise click.exceptions.Exit(exit_code)


def _get_command_after_check(
    source: Path, recipe: Path | None, fix: Path | None, has_errors: bool
) -> str:
    """Return the line with the command after a check: fix the data, else create or plan a run."""
    words = ["init", fix or source]
    if recipe is not None:
        words = ["plan", recipe]
    elif has_errors:
        named = source if source.name else source.resolve()
        words = ["check", source, "--fix", named.with_name(f"{named.stem or 'data'}-fixed")]
    return f"next: {format_command(*map(str, words))}"


def _run_check(
    inputs: Sequence[CheckInput],
    model_context: ModelRequirements,
    fix: Path | None,
    html: Path | None,
    language: LanguageOption,
    as_json: bool,
    seed: int,
) -> tuple[int, bool]:
    """Run a data check, and write its summary, HTML page and fixed samples.

    Returns the exit code for the highest severity of the issues, and whether `--fix` can be used.
    """
    from finesight.check.check_issues import format_summary, summary_to_dict
    from finesight.check.data_checker import DataChecker
    from finesight.report.data_pages import render_check_page
    from finesight.report.html import raise_if_not_generated, write_page
    from finesight.report.i18n import detect_language, use_language
    from finesight.storage import temporary_folder, write_folder

    if html:
        raise_if_not_generated(html)

    def print_issue(issue: CheckIssue) -> None:
        if as_json:
            echo_json(issue.as_json())

    with write_folder(fix) if fix else temporary_folder("check") as folder:
        max_issues = MAX_PAGE_ISSUES if html else MAX_PRINTED_ISSUES
        checker = DataChecker(inputs, folder, model_context, max_issues, seed)
        with _show_progress(checker.num_rows) as on_progress:
            result, image_catalog = checker.run(print_issue, on_progress)
        if not as_json:
            click.echo("\n".join(format_summary(result, MAX_PRINTED_ISSUES)))
        if html:
            with use_language(language or detect_language()):
                write_page(html, render_check_page(result))
        fix_summary = (
            checker.fixer.write(Path(folder), fix, image_catalog, checker.sources) if fix else None
        )
    if as_json:
        echo_json(summary_to_dict(result, fix_summary))
    elif fix_summary:
        click.echo("\n".join(["", *fix_summary.as_lines()]))
    return result.exit_code, checker.fixer.can_write


@contextmanager
def _show_progress(total_rows: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on a terminal, or progress lines elsewhere.

    Yields a callback that takes the number of newly checked rows.
    """

    from finesight.progress import ProgressConsole

    console = ProgressConsole()
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


EXIT_DOES_NOT_FIT = 2


def plan(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    gpu: Annotated[
        str | None,
        Parameter(
            'GPU to plan for, such as T4, "RTX 4090", A100-80GB or H200. Default: this '
            "machine, measured in about a second.",
            option="--gpu",
            metavar="NAME",
        ),
    ] = None,
    as_json: AsJsonOption = False,
) -> None:
    """Estimate memory and time of a run and suggest settings that fit.

    Prints the tokens per sample, the FLOPs of each model part, and memory and training time in two
    columns: for the recipe as written, and for chosen settings that fit into 90 % of the memory.
    The last line is the command that trains with the chosen settings. The recipe is not modified.

    Reads image headers and the configuration and tokenizer of the model, but no weights.

    Exit code: 0 if the run fits, 2 if no setting makes it fit.

    Example: finesight plan recipes/latex_ocr_qwen2_vl_2b.yaml --gpu "RTX 4090"
    """

    from finesight.plan.plan_format import format_plan, plan_to_dict
    from finesight.plan.run_plan import plan_run
    from finesight.progress import ProgressConsole
    from finesight.recipe import load_recipe

    run_plan = plan_run(load_recipe(recipe, overrides or ()), gpu, ProgressConsole())
    click.echo(json.dumps(plan_to_dict(run_plan)) if as_json else "\n".join(format_plan(run_plan)))
    if not as_json and run_plan.chosen_estimate.fits:
        words = ["train", str(recipe), *(overrides or ()), *run_plan.overrides]
        click.echo(f"next: {format_command(*words)}")
    if not run_plan.chosen_estimate.fits:
        raise click.exceptions.Exit(EXIT_DOES_NOT_FIT)


def show(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    num_samples: Annotated[
        int, Parameter("Number of samples, from the start of the data.", minimum=1)
    ] = 1,
    seed: Annotated[
        int | None, Parameter("Show random samples, selected with this seed, instead.", minimum=0)
    ] = None,
    use_eval_split: Annotated[
        bool, Parameter("Show samples of data.eval instead of data.train.", option="--eval")
    ] = False,
    html: Annotated[
        Path | None,
        Parameter(
            "Write an HTML page with the resized images, boxes and tokens instead of the "
            "table. An existing page is replaced, but no other file.",
            metavar="FILE",
        ),
    ] = None,
    language: LanguageOption = None,
    as_json: Annotated[
        bool, Parameter(f"Print one JSON object per sample {JSON_OUTPUT}", option="--json")
    ] = False,
) -> None:
    """Print the tokens of samples as the model receives them in training.

    Each line is a token with its id, a * if it counts in the loss (label other than -100), its
    position ids and its text. All placeholder tokens of an image share one line. Reads the
    configuration and tokenizer of the model, but no weights.

    Example: finesight show recipes/latex_ocr_qwen2_vl_2b.yaml --num-samples 2
    """
    from finesight.data.corpus import load_corpus
    from finesight.encode.renderer import build_renderer
    from finesight.model_folder import locate_model
    from finesight.recipe import load_recipe
    from finesight.report.html import raise_if_not_generated
    from finesight.report.i18n import detect_language, translate, use_language

    if html is not None:
        raise_if_not_generated(html)
    settings = load_recipe(recipe, overrides or ())
    files = settings.data.eval if use_eval_split else settings.data.train
    if not files:
        raise UserError(
            f"data.eval of {recipe.name} is empty",
            where=str(recipe),
            expected="a file of validation samples",
            remedy="set data.eval, or remove --eval to show data.train",
        )
    renderer = build_renderer(
        locate_model(settings.model), settings.image, settings.data.system_prompt
    )
    corpus = load_corpus(files)
    text = "The first {} of {}"
    if seed is None:
        selected = corpus.read_samples(num_samples)
    else:
        text = "{} random samples of {}"
        count = min(num_samples, len(corpus))
        indices = sorted(random.Random(seed).sample(range(len(corpus)), count))
        selected = [corpus.read_validated(index) for index in indices]
    if html is not None:
        names = ", ".join(str(file.path) for file in files)
        with use_language(language or detect_language()):
            _write_sample_page(html, renderer, selected, translate(text, len(selected), names))
    if html is None or as_json:
        _print_samples(renderer, selected, as_json)
    if html is None and not as_json:
        words = ["plan", str(recipe), *(overrides or ())]
        click.echo(f"next: {format_command(*words)}")


def _write_sample_page(
    page: Path, renderer: Renderer, selected: Sequence[LocatedSample], source: str
) -> None:
    """Write an HTML page of the selected samples while showing a progress bar.

    `source` is the title of the page: the number of samples and their files.
    """

    from finesight.encode.renderer import NativeRenderer
    from finesight.progress import ProgressConsole
    from finesight.report.data_pages import render_sample_page
    from finesight.report.html import write_page

    if not isinstance(renderer, NativeRenderer):
        raise UserError(
            "HTML pages do not support the transformers backend",
            where=f"--html {page}",
            expected="a model of a native family",
            remedy="remove --html to print tokens and loss mask",
        )
    with ProgressConsole().progress_stage("samples", len(selected)) as on_progress:
        on_corrupt = _report_skipped if len(selected) > 1 else None
        content = render_sample_page(renderer, selected, source, on_progress, on_corrupt)
    write_page(page, content)
    click.echo(f"page: {page}", err=True)


def _report_skipped(sample_id: str, error: UserError) -> None:
    click.echo(escape_unprintable(f"skipped: {sample_id}: {error.where}: {error.what}"), err=True)


def _print_samples(renderer: Renderer, selected: Sequence[LocatedSample], as_json: bool) -> None:
    """Print one token table, or one JSON object, per sample."""
    from finesight.data.image_header import CorruptImageError
    from finesight.encode.tokenization import format_token_table, token_table_to_dict

    for located_sample in selected:
        try:
            tokenized = renderer.tokenize(located_sample)
        except CorruptImageError as error:
            if len(selected) == 1:
                raise
            _report_skipped(located_sample.sample.id, error)
            continue
        if as_json:
            record = token_table_to_dict(tokenized, renderer.tokenizer)
            echo_json(record)
        else:
            click.echo("\n".join(format_token_table(tokenized, renderer.tokenizer)) + "\n")
