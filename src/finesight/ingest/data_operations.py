"""`finesight import`, `data export` and `check`: data of other programs as samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Unpack

from finesight.errors import Step, UserError, format_count
from finesight.ingest.source_options import SourceOptions, TableOptions, parse_row_range
from finesight.operations.next_steps import build_init_step, propose_plan
from finesight.operations.operation import Outcome, Parameter, StrPath, to_path
from finesight.operations.options import (
    LanguageOption,
    OutFolderArgument,
)
from finesight.progress import ProgressConsole

if TYPE_CHECKING:
    from finesight.encode.renderer import Renderer
    from finesight.ingest.check.check_issues import CheckIssue
    from finesight.ingest.check.check_result import CheckResult
    from finesight.ingest.check.data_checker import CheckInput
    from finesight.ingest.exporter import ExportSummary
    from finesight.ingest.import_source import ImportOptions
    from finesight.ingest.importer import ImportSummary
    from finesight.model_folder import ModelFolder
    from finesight.train.recipe_check import CheckedRecipe


def import_data(
    source: Annotated[StrPath, Parameter(path="name")],
    out: OutFolderArgument,
    rows: Annotated[
        tuple[int | None, int | None] | None, Parameter(metavar="A:B", parse=parse_row_range)
    ] = None,
    replace_prompts: Annotated[str | None, Parameter(metavar="TEXT")] = None,
    eval_last: Annotated[int | None, Parameter(minimum=1)] = None,
    train_fraction: Annotated[float | None, Parameter(metavar="FRACTION")] = None,
    seed: Annotated[int, Parameter(minimum=0)] = 0,
    on_invalid_row: Literal["fail", "skip"] = "fail",
    on_invalid_box: Literal["fail", "drop", "clip"] | None = None,
    copy_images: bool = False,
    encoding: Annotated[str | None, Parameter(metavar="NAME")] = None,
    explain: Annotated[int | None, Parameter(metavar="ROW", minimum=1)] = None,
    allow_host: Annotated[Sequence[str], Parameter(metavar="HOST")] = (),
    **reading: Unpack[SourceOptions],
) -> Outcome[ImportSummary]:
    """Import a dataset as samples: OUT/data.jsonl, or OUT/train.jsonl and OUT/eval.jsonl.

    Image paths are relative to the folder of SOURCE, or to the working directory if the file does
    not exist there. Sources from a hub, the web or an archive contain their own images, which are
    copied.

    The columns of a table are detected, unless --map names them or --format is given.

    A row with several answers becomes one training sample per answer, or one validation sample that
    accepts all of them. Downloads resume and use the cache (HF_HOME). For hub datasets, only the
    files required by --rows and --limit are downloaded.

    Example: finesight import latex.csv latex --map image=image_path --map answer=text
    --prompt "Read the formula." --train-fraction 0.9

    Args:
        source: A .json, .jsonl, .csv, .tsv, .txt, .xlsx or .parquet file, also with .gz, a
            WebDataset (.tar), a zip or tar archive, a folder, hf:OWNER/NAME or
            modelscope:OWNER/NAME (optional @REVISION and :SPLIT), or https://HOST/FILE.
        replace_prompts: Replace the question of each row by this text; images keep their place.
            Rows with several turns or with a box in the question are invalid. Default: keep the
            questions, to which --prompt is appended.
        rows: Use rows A to B - 1, counted from 0. A: and :B are open; negative numbers count from
            the end. Default: all rows.
        eval_last: Use the last N rows for validation, and leave out training rows with the same
            images. Not with --train-fraction.
        train_fraction: Fraction of the rows for training, between 0 and 1, such as 0.9; the others
            are for validation. Rows with the same image stay together. Not with --eval-last.
            Default: no split.
        seed: Random seed of --train-fraction.
        on_invalid_row: Invalid rows, such as a missing image or an impossible box: fail and write
            nothing, or skip them and list them in OUT/skipped_rows.jsonl.
        on_invalid_box: Invalid boxes, such as one without area: fail as an invalid row, drop them,
            or clip them to the image. Default: fail, or clip with --on-invalid-row skip.
        copy_images: Copy the images into OUT/images. Default: OUT refers to the images in place;
            those from hubs, the web and archives are always copied.
        encoding: Encoding of a .csv or .tsv file, such as cp1250 or gb18030. Default: detect it.
        explain: Print which values of this row have which role in --mapping, and its samples, and
            write nothing. Rows are counted from 1.
        allow_host: Allow downloads of https:// sources and images from this host. Repeatable.
    """
    from finesight.ingest.importer import import_dataset
    from finesight.ingest.mapping_draft import (
        check_proposal,
        detect_roles,
        draft_of_unfound_media,
    )
    from finesight.ingest.source_fetch import fetch_source

    options = build_import_options(
        reading,
        row_range=rows,
        replace_prompts=replace_prompts,
        eval_last=eval_last,
        train_fraction=train_fraction,
        seed=seed,
        copy_images=copy_images,
        on_invalid_row=on_invalid_row,
        on_invalid_box=on_invalid_box,
        encoding=encoding,
    )
    if explain is not None:
        return _explain_row(source, options, explain, allow_host)
    is_detected = options.is_detected
    console = ProgressConsole()
    out = Path(out)
    with fetch_source(str(source), out, options, allow_host) as fetched:
        detected = detect_roles(fetched.path, fetched.options, out)
        check_proposal(detected, out)
        options = detected.options
        with draft_of_unfound_media(detected.path, options, out):
            summary = import_dataset(detected.path, out, options, console.progress_stage)
    for note in fetched.notes:
        console.log(f"{source}: {note}")
    train, *validation = (str(file.file) for file in summary.output_files)
    heading, *details = format_import(source, summary, options, is_detected=is_detected)
    lines = [heading]
    for detail in details:
        lines.append(f"  {detail}")
    step = Step("check", {"sources": [train], "against": validation})
    return Outcome(summary, lines, asdict(summary), [step])


def _explain_row(
    source: StrPath,
    options: ImportOptions,
    number: int,
    allow_host: Sequence[str],
) -> Outcome[ImportSummary]:
    """Return the roles of a row as lines, and a summary without files."""
    from finesight.files.storage import temporary_folder
    from finesight.ingest.explanation import explain_row
    from finesight.ingest.importer import ImportSummary
    from finesight.ingest.presets import with_preset
    from finesight.ingest.source_fetch import fetch_source

    with (
        temporary_folder("explain") as folder,
        fetch_source(str(source), folder / "data", options, allow_host) as fetched,
    ):
        options = with_preset(fetched.path, fetched.options)
        found = explain_row(fetched.path, options, number, folder)
    summary = ImportSummary(
        format=found.mapping,
        detected_by="mapping",
        num_rows=found.num_rows,
        output_files=(),
        skipped_rows={},
        num_images=0,
        num_clipped_boxes=0,
        source_notes={},
        unused_columns=tuple(reading.location for reading in found.unused),
    )
    return Outcome(summary, [f"{source}: {found.location}", *found.format_lines()], found.as_json())


def build_import_options(reading: TableOptions, **others: Any) -> ImportOptions:
    """Build the options of an import; None stands for the default."""
    from finesight.ingest.import_source import ImportOptions
    from finesight.ingest.mapping_format import load_mapping_format

    values: dict[str, Any] = {**reading, **others}
    if values.get("mapping") is not None:
        values["mapping"] = load_mapping_format(Path(values["mapping"]))
    return ImportOptions(**{name: value for name, value in values.items() if value is not None})


def format_import(
    source: StrPath, summary: ImportSummary, options: ImportOptions, *, is_detected: bool
) -> list[str]:
    """Describe an import: the source, then details such as files and skipped rows.

    Args:
        options: Options of the import.
        is_detected: Whether the column roles were detected.
    """
    from finesight.ingest.formats.dataset_format import NOTE_REPLACED_PROMPT

    detected_by = summary.detected_by
    details = [summary.text_format]
    for file in summary.output_files:
        num_samples = format_count(file.num_samples, "sample")
        num_rows = format_count(file.num_rows, "row")
        details.append(f"{file.file}: {num_samples} from {num_rows}")
    if is_detected:
        detected_by = detected_by.replace("--map", "columns")
        details += [f"{role}: {column}" for role, column in options.columns.items()]
        details.append(_describe_box_format(options))
        if options.box_units:
            details.append(f"box units: {options.box_units}")
    elif not options.box_format:
        details.append(_describe_box_format(options))
    details += [*summary.list_skipped(), *summary.list_media()]
    if summary.skipped_rows_file is not None:
        details.append(f"{summary.skipped_rows_file}: invalid rows with reasons")
    if summary.num_clipped_boxes:
        details.append(
            f"{format_count(summary.num_clipped_boxes, 'box')} clipped by at most 1 pixel"
        )
    details += [f"{count} {note}" for note, count in summary.source_notes.items()]
    if options.replace_prompts is not None and NOTE_REPLACED_PROMPT not in summary.source_notes:
        details.append(f"0 {NOTE_REPLACED_PROMPT}")
    details += summary.list_other_keys()
    if summary.unused_columns:
        details.append(f"unused columns: {', '.join(summary.list_unused_columns())}")
        if not summary.has_media:
            details.append("no images: --map image=COLUMN sets the column of the image paths")
    num_rows = format_count(summary.num_rows, "row")
    heading = f"{source}: {num_rows}, read as {summary.format} ({detected_by})"
    return [heading, *filter(None, details)]


def _describe_box_format(options: ImportOptions) -> str:
    """Describe a box format that differs from the default, or that no column states."""
    from finesight.ingest.formats.table import find_stated_format, get_default_frame

    column = options.columns.get("box")
    if column is None or (find_stated_format(column) and not options.box_format):
        return ""
    if options.box_format:
        return f"box format: {options.box_format}, by the values"
    default = get_default_frame(column).order
    return f"box format: {default} (assumed; for another one, import with --box-format)"


def export_data(
    samples: StrPath,
    out: OutFolderArgument,
    target_format: Annotated[
        str,
        Parameter(
            "Format to write, such as samples, openai or table. An unknown name is rejected with "
            "the complete list.",
            option="--to",
            metavar="FORMAT",
            plugins="formats",
        ),
    ],
    copy_images: bool = False,
) -> Outcome[ExportSummary]:
    """Export samples in the format of another program.

    Features that the format does not support are counted. A sample that the format cannot represent
    is an error. `finesight import` reads every format.

    Example: finesight data export latex/train.jsonl latex-swift --to ms-swift

    Args:
        samples: Samples file, as written by `finesight import`.
        copy_images: Copy the images into OUT/images. Default: OUT refers to the images in place.
    """
    from finesight.ingest.exporter import export_dataset
    from finesight.samples.sample import LocatedSample, read_samples

    folder = Path(samples).parent
    located_samples = [LocatedSample(sample, folder) for sample in read_samples(Path(samples))]
    summary = export_dataset(located_samples, Path(out), target_format, copy_images=copy_images)
    # Formats with several data files can only be read from the folder.
    first_file = Path(summary.files[0])
    source: StrPath = out
    if first_file.suffix in (".json", ".jsonl"):
        source = first_file
    step = Step("check", {"sources": [source], "format": summary.format})
    files = [*map(str, summary.files[:MAX_PRINTED_FILES])]
    if len(summary.files) > MAX_PRINTED_FILES:
        files.append(f"and {len(summary.files) - MAX_PRINTED_FILES} more")
    lines = [
        f"{out}: {format_count(summary.num_samples, 'sample')} in the format {summary.format}",
        f"  {', '.join(files)}",
        f"  {format_count(summary.num_images, 'image')}",
    ]
    for feature, count in summary.lost_counts.items():
        lines.append(f"  not supported: {count} {feature}")
    for note in summary.notes:
        lines.append(f"  note: {note}")
    return Outcome(summary, lines, asdict(summary), [step])


MAX_PRINTED_FILES = 3
"""Maximum number of printed file names; further files are only counted."""


MAX_PRINTED_ISSUES = 3
"""Maximum number of printed examples per kind of issue; further ones are only counted."""

MAX_ISSUES = 1000
"""Maximum number of examples per kind of issue in the result and on the HTML page."""


def check_data(
    sources: Annotated[Sequence[StrPath], Parameter(metavar="SOURCE")],
    against: Annotated[Sequence[StrPath], Parameter(metavar="EVAL")] = (),
    model: Annotated[str | None, Parameter(path="name")] = None,
    max_length: Annotated[int | None, Parameter(minimum=1)] = None,
    fix: Annotated[StrPath | None, Parameter(metavar="OUT")] = None,
    html: Annotated[StrPath | None, Parameter(metavar="FILE", path="file")] = None,
    seed: Annotated[int, Parameter(minimum=0)] = 0,
    language: LanguageOption = None,
    has_main_guard: bool = False,
    on_record: Callable[[Mapping[str, Any]], None] | None = None,
    **reading: Unpack[SourceOptions],
) -> Outcome[CheckResult]:
    """Validate samples: images, boxes, texts, roles, duplicates and leakage.

    For a recipe, its training and validation files are checked with max_length and the tokenizer of
    its model; only --fix, --html, --seed, --language and --json apply. Other sources are read as
    by `import` with these options. Sources are never modified.

    Exit code: 0 without issues or with notes only, 3 with warnings, 2 with errors.

    Example: finesight check latex/train.jsonl --against latex/eval.jsonl --html check.html

    Args:
        sources: Local files or folders as for `import`, or one recipe.
        against: Validation data, read with the same options. Reports images, also re-encoded ones,
            that are in SOURCE as well. Repeatable.
        model: Model folder or hub name. Its tokenizer is used to report special tokens in texts
            and, with --max-length, samples that are too long.
        max_length: With --model: report samples of more than this number of tokens, image tokens
            included. Default: no limit.
        fix: Write a corrected copy into this new folder: unambiguous issues are fixed (listed in
            changes.jsonl), duplicates and invalid samples are left out (listed in
            skipped_samples.jsonl).
        html: Also write an HTML page with the issues, statistics and random samples.
        seed: Random seed of the samples on the HTML page.
    """
    from finesight.files.storage import (
        check_new_path,
        check_separate,
        temporary_folder,
        write_folder,
    )
    from finesight.ingest.check import check_result, data_checker
    from finesight.ingest.check.check_page import render_check_page
    from finesight.report.html import PageFile
    from finesight.report.i18n import detect_language, use_language

    options = build_import_options(reading)
    paths = [*map(Path, sources)]
    source = _find_check_source(paths, [*map(Path, against)], options, model, max_length)
    requirements = data_checker.load_model_requirements(
        source.model_folder, source.renderer, source.max_length
    )
    fix = to_path(fix)
    html = to_path(html)
    console = ProgressConsole()
    page = None
    if html:
        page = PageFile(html, "check", paths)
        page.check()
    if fix:
        check_new_path(fix)
    if html and fix:
        check_separate("--html", html, "--fix", fix)

    def report_issue(issue: CheckIssue) -> None:
        if on_record is not None:
            on_record(issue.as_json())

    with write_folder(fix) if fix else temporary_folder("check") as folder:
        checker = data_checker.DataChecker(source.inputs, folder, requirements, MAX_ISSUES, seed)
        with console.progress_stage("rows", checker.num_rows) as on_progress:
            # Worker processes import the main module, which starts them again without a guard.
            result, images = checker.run(
                report_issue, on_progress, single_process=not has_main_guard
            )
        lines = check_result.format_summary(result, MAX_PRINTED_ISSUES)
        fixed = None
        try:
            if page:
                with use_language(language or detect_language()):
                    page.write(render_check_page(result))
            if fix:
                fixed = checker.fixer.write(Path(folder), fix, images, checker.sources)
                lines += ["", *fixed.as_lines()]
            if source.checked is not None and result.severity != "error":
                _check_validation_samples(source.checked)
        except UserError:
            console.log("\n".join(lines))  # the issues, which may prevent the correction
            raise
    data = check_result.summary_to_dict(result, fixed)
    steps: list[Step] = []
    if result.severity != "error":
        steps = source.propose_use(fix)
    elif checker.fixer.can_write and fix is None:
        steps = source.propose_fix()
    return Outcome(result, lines, data, steps, result.exit_code)


@dataclass(frozen=True, slots=True)
class _CheckSource:
    """Data of a check, and the model whose requirements they are compared with.

    Attributes:
        data: The file or folder, if there is only one, without options. Proposed steps would need
            the options and other files, too.
        max_length: Maximum number of tokens of a sample, None for any.
        recipe: The recipe whose data are checked; None, like `checked`, for other data.
    """

    inputs: list[CheckInput]
    data: Path | None = None
    model_folder: ModelFolder | None = None
    renderer: Renderer | None = None
    max_length: int | None = None
    recipe: Path | None = None
    checked: CheckedRecipe | None = None

    def propose_use(self, fixed: Path | None) -> list[Step]:
        """Return the step that plans the recipe, or that writes one for the data or their copy."""
        if self.recipe is not None:
            return [propose_plan(self.recipe, self.renderer)]
        if self.data is not None:
            return [build_init_step(fixed or self.data)]
        return []

    def propose_fix(self) -> list[Step]:
        """Return the step that writes a corrected copy of the data into a free folder."""
        from finesight.files.storage import find_free_path

        if self.data is None:
            return []
        named = self.data
        if not named.name:
            named = named.resolve()
        name = f"{named.stem or 'data'}-fixed"
        fixed_folder = find_free_path(named.with_name(name))
        return [Step("check", {"sources": [self.data], "fix": fixed_folder})]


def _find_check_source(
    paths: Sequence[Path],
    against: Sequence[Path],
    options: ImportOptions,
    model: str | None,
    max_length: int | None,
) -> _CheckSource:
    """Return the data of a check: of a recipe, or of files."""
    from finesight.infer.model_loader import resolve_model_source
    from finesight.ingest.check.data_checker import inputs_from_files, is_recipe
    from finesight.ingest.import_source import ImportOptions

    has_defaults = options == ImportOptions()
    is_alone = len(paths) == 1 and has_defaults and not (against or model or max_length)
    if options.format is None:
        recipe = next(filter(is_recipe, paths), None)
        if recipe is not None:
            return _read_check_recipe(recipe, is_alone=is_alone)
    inputs = inputs_from_files(paths, against, options)
    data = paths[0] if is_alone else None
    if model is None:
        return _CheckSource(inputs, data, max_length=max_length)
    source = resolve_model_source(model)
    renderer = None
    # The renderer of the transformers backend is slow to load.
    if max_length is not None:
        renderer = source.build_renderer()
    return _CheckSource(inputs, data, source.folder, renderer, max_length)


def _read_check_recipe(recipe: Path, *, is_alone: bool) -> _CheckSource:
    """Return the data of a recipe with its model. Raises UserError unless it is given alone."""
    from finesight.ingest.check.data_checker import inputs_from_recipe
    from finesight.settings.recipe import load_recipe
    from finesight.train.recipe_check import check_recipe

    if not is_alone:
        raise UserError(
            "other options or sources are given with a recipe",
            where=str(recipe),
            expected="one recipe with --fix, --html, --seed and --json only",
            remedy="remove the other arguments, or check the data files directly",
        )
    settings = load_recipe(recipe)
    checked = check_recipe(settings, runs_functions=False, needs_weights=False)
    return _CheckSource(
        inputs_from_recipe(settings),
        model_folder=checked.base_model.folder,
        renderer=checked.renderer,
        max_length=settings.data.max_length,
        recipe=recipe,
        checked=checked,
    )


def _check_validation_samples(checked: CheckedRecipe) -> None:
    """Verify that the metric of a recipe fits its validation samples, without custom metrics."""
    from finesight.evaluate.eval_result import select_eval_samples
    from finesight.samples.corpus import load_corpus
    from finesight.train.recipe_check import check_eval_references

    recipe = checked.recipe
    if recipe.eval is None or not recipe.data.eval:
        return
    corpus = load_corpus(recipe.data.eval)
    indices = select_eval_samples(range(len(corpus)), recipe.eval.limit)
    check_eval_references(checked, [corpus[index].sample for index in indices])
