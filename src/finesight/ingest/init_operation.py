"""Start: a recipe that fits a dataset and the device, and the quickstart.

`init` imports a dataset, and writes a recipe for its task. `quickstart` runs the complete workflow,
in minutes on a CPU and without a network: it generates images of train tickets, imports and checks
their table, fine-tunes the bundled model with LoRA to read them as JSON, and evaluates it on
validation tickets. Each stage runs the code of a command, and the commands are printed.
"""

from __future__ import annotations

import itertools
import json
import os
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Unpack

from finesight.errors import (
    Step,
    TrainingInterrupted,
    UnavailableError,
    UserError,
    format_count,
    shorten,
    suggest_name,
)
from finesight.ingest.data_operations import (
    build_import_options,
    check_data,
    format_import,
    import_data,
)
from finesight.ingest.source_options import TableOptions
from finesight.operations.next_steps import get_init_folder
from finesight.operations.operation import Outcome, Parameter, StrPath, format_command
from finesight.operations.training import train
from finesight.plan.plan_operation import GpusOption, build_train_step, plan
from finesight.progress import ProgressConsole

if TYPE_CHECKING:
    from finesight.evaluate.prediction_file import ScoredPrediction
    from finesight.ingest.check.check_result import CheckResult
    from finesight.ingest.import_source import DetectedColumns, ImportOptions, ImportSource
    from finesight.ingest.importer import ImportSummary
    from finesight.ingest.row_reader import SourceRow
    from finesight.plan.run_plan import RunPlan
    from finesight.samples.sample import Sample
    from finesight.settings.recipe_template import DetectedTask, StartModel
    from finesight.train.finalize import RunResult

Ask = Callable[[str, str], str]
"""Function that asks a question, and returns the answer. The second argument is the default."""

MIN_SPLIT_ROWS = 20
"""Number of rows of the smallest dataset with a validation split."""

MAX_EVAL_FRACTION = 0.2
"""Maximum fraction of the rows for validation."""

MAX_MISSING_FRACTION = 0.01
"""Maximum fraction of rows without a readable image; more are a warning."""

MODELS = (
    (44e9, "Qwen/Qwen3.5-9B"),
    (20e9, "Qwen/Qwen3.5-4B"),
    (10e9, "Qwen/Qwen3.5-2B"),
    (6e9, "Qwen/Qwen3.5-0.8B"),
)
"""GPU memory in bytes from which a model is suggested; with less, the bundled model."""

EXIT_REJECTED = 2
"""Exit code if training refuses the written recipe."""

LABEL_PROMPT = "Locate the object."
"""Question about every image, to which a column adds the label of the object."""


def list_tasks() -> dict[str, str]:
    """Return the answer that a model gives, by built-in task."""
    from finesight.metric_components import METRICS

    return {one.name: one.suggestion.answer for one in METRICS.list_built_in()}


def _list_reward_objectives() -> tuple[str, ...]:
    from finesight.objective_components import list_reward_objectives

    return tuple(list_reward_objectives())


def init(
    data: Annotated[StrPath | None, Parameter(is_positional=True, path="name")] = None,
    out: Annotated[StrPath | None, Parameter(metavar="FOLDER")] = None,
    metric: Annotated[
        str | None,
        Parameter(
            f"{', '.join(list_tasks())}. Default: by the answers.",
            option="--task",
            metavar="TASK",
            plugins="metrics",
        ),
    ] = None,
    model: str | None = None,
    objective: Annotated[str | None, Parameter(choices=_list_reward_objectives())] = None,
    gpus: GpusOption = None,
    ask: Ask | None = None,
    **reading: Unpack[TableOptions],
) -> Outcome[Path]:
    """Import a dataset, and write a recipe that fits its task and this machine.

    Detects the format, columns and task of the data, and the memory of the GPU. Asks at most five
    questions. Writes FOLDER/data and a commented FOLDER/recipe.yaml with a model that fits, checks
    the data, and prints the plan of the run and the next command. Existing files are never changed.
    Label a folder of images without labels first, with `finesight label`.

    Example: finesight init photos/captions.csv --yes

    Args:
        data: Dataset as for `import`; also a folder of a table and images.
        out: Folder to create. Default: DATA with -finetune, in the current directory.
        model: Model folder or hub name, or a run or adapter to continue with its settings. Default:
            by GPU memory.
        objective: Training by rewards, on sampled responses instead of the answers. It needs a
            model that is sometimes right, such as a merged run. Default: by the data.
    """
    from finesight.files.storage import check_new_path
    from finesight.ingest.source_fetch import fetch_source
    from finesight.metric_components import METRICS
    from finesight.plan.plan_format import format_short_plan
    from finesight.plan.run_plan import refuse_gpus
    from finesight.settings.recipe_template import format_recipe

    _require_task(metric)
    source = str(data or _ask("Dataset (file, folder or hf:OWNER/NAME)", ".", ask))
    folder = Path(out or get_init_folder(source))
    check_new_path(folder)
    options = build_import_options(reading, on_invalid_row="skip")
    console = ProgressConsole()
    with _removed_if_empty(folder), fetch_source(source, folder / "data", options) as fetched:
        path, options = _select_source(fetched.path, fetched.options, folder, metric, ask)
        task, options, opened = _detect_task(path, options, folder, metric, ask)
        task = replace(task, objective=objective or task.objective)
        device, memory_bytes = find_device()
        if not memory_bytes:
            refuse_gpus(gpus, "this machine has no GPU")
        suggested = choose_model(memory_bytes)
        model = model or _ask("Model", suggested, ask)
        # The model is checked before the import, so that a wrong name leaves no files. Without a
        # connection to a hub, its error is only returned, because the data can be imported.
        start, unavailable = _describe_model(model, is_suggested=model == suggested)
        options = _split_rows(options, opened)
        summary, options = _import_split(path, folder / "data", options, console)
    _warn_of_missing_images(summary, opened.rows.num_rows, console)
    recipe = folder / "recipe.yaml"
    run = folder / "run"
    task = replace(task, has_images=summary.has_media)
    comments = {
        file.file: format_count(file.num_samples, "sample") for file in summary.output_files
    }
    format_file = partial(
        format_recipe,
        recipe,
        run,
        start,
        f"`finesight init` for {device}",
        task,
        comments,
        summary.output_files[0].num_samples,
    )
    run_plan, problem = _write_planned_recipe(recipe, format_file, gpus, unavailable, console)
    train_file, *eval_files = [file.file for file in summary.output_files]
    checked = check_data([train_file], eval_files)
    device_size = f", {memory_bytes / 1e9:.0f} GB" if memory_bytes else ""
    lines = [
        *_format_data(
            source,
            summary,
            options,
            is_detected=not (reading.get("columns") or reading.get("mapping")),
        ),
        f"task    {task.metric} ({METRICS[task.metric].primary_score or None})",
        f"example {_format_example(train_file)}",
        f"device  {device}{device_size}",
        f"model   {model}",
        *_format_check(checked),
    ]
    if run_plan is not None:
        lines += format_short_plan(run_plan)
    lines += ["", f"recipe: {recipe}"]
    fits = None if run_plan is None else run_plan.chosen_estimate.fits
    if unavailable is not None:
        console.log(f"the run was not planned: {unavailable}")
        steps = _list_model_steps(recipe, model, task)
    else:
        steps = _list_run_steps(recipe, run, model, gpus, run_plan, problem)
    has_errors = checked.value.severity == "error"
    if has_errors:
        steps.insert(0, Step("check", {"sources": [recipe], "html": folder / "check.html"}))
    result = {
        "recipe": str(recipe),
        "format": summary.format,
        "columns": dict(options.columns),
        "metric": task.metric,
        "prompt": options.prompt,
        "model": model,
        "samples": {file.file.stem: file.num_samples for file in summary.output_files},
        "skipped_rows": summary.skipped_rows,
        "fits": fits,
        "has_data_errors": has_errors,
        "next": [*map(format_command, steps)],
    }
    is_rejected = problem is not None and unavailable is None
    return Outcome(recipe, lines, result, steps, EXIT_REJECTED if is_rejected else 0)


def _require_task(metric: str | None) -> None:
    """Raise UserError for an unknown task; None stands for the detected one."""
    from finesight.metric_components import METRICS

    if metric is None:
        return
    tasks = [*METRICS]
    if metric not in tasks:
        raise UserError(
            f"unknown task {metric!r}",
            where="--task",
            expected=", ".join(tasks),
            remedy=suggest_name(metric, tasks, "choose one of these"),
        )


def _describe_model(model: str, *, is_suggested: bool) -> tuple[StartModel, UserError | None]:
    """Return the start model of a run, and the error of loading it."""
    from finesight.settings.recipe_template import StartModel
    from finesight.train.recipe_check import describe_start

    try:
        return describe_start(model), None
    except UserError as error:
        if not is_suggested and not isinstance(error, UnavailableError):
            raise
        if Path(model).expanduser().exists():
            raise  # the settings of a run or adapter require its base model
        return StartModel(model), error


def _warn_of_missing_images(
    summary: ImportSummary, num_rows: int, console: ProgressConsole
) -> None:
    """Print a warning if many rows have no readable image."""
    from finesight.ingest.importer import REASON_BY_ERROR
    from finesight.samples.image_file import CorruptImageError

    num_without_image = summary.skipped_rows.get(REASON_BY_ERROR[CorruptImageError], 0)
    if num_without_image > MAX_MISSING_FRACTION * num_rows:
        text = "have no readable image and were skipped; table and images may be in other folders"
        console.log(f"warning: {num_without_image} of {num_rows} rows {text}")


def _split_rows(options: ImportOptions, opened: ImportSource) -> ImportOptions:
    """Return the options with a share of the rows for validation, unless there are few rows."""
    from finesight.settings.recipe_template import NUM_EVAL_ROWS

    num_rows = opened.rows.num_rows
    if num_rows < MIN_SPLIT_ROWS or opened.rows.eval_start not in (None, num_rows):
        return options
    eval_fraction = min(MAX_EVAL_FRACTION, NUM_EVAL_ROWS / num_rows)
    return replace(options, train_fraction=1 - eval_fraction)


def _import_split(
    path: Path, out: Path, options: ImportOptions, console: ProgressConsole
) -> tuple[ImportSummary, ImportOptions]:
    """Import a dataset, without a validation split if its rows cannot be split."""
    from finesight.ingest.importer import import_dataset
    from finesight.samples.image_split import SplitError

    with console.activity("importing the data"):
        options = replace(options, requires_most_rows=True)
        try:
            return import_dataset(path, out, options), options
        except SplitError as error:
            console.log(f"no validation samples: {error.what}")
            options = replace(options, train_fraction=None)
            return import_dataset(path, out, options), options


def _write_planned_recipe(
    recipe: Path,
    format_file: Callable[[Sequence[str]], str],
    gpus: GpusOption,
    unavailable: UserError | None,
    console: ProgressConsole,
) -> tuple[RunPlan | None, UserError | None]:
    """Write a recipe, plan its run, and add the settings of the plan to the recipe.

    Args:
        format_file: Formats the recipe with overrides.
        unavailable: Error of the model, without which there is no plan.

    Returns:
        The plan, or the error with which training refuses the recipe. Both may be missing.
    """
    from finesight.files.storage import write_file

    write_file(recipe, format_file(()).encode())
    if unavailable is not None:
        return None, unavailable
    run_plan, problem = _plan_recipe(recipe, gpus, console)
    if run_plan is not None:
        overrides = [item for item in run_plan.overrides if "num_workers" not in item]
        write_file(recipe, format_file(overrides).encode())
    return run_plan, problem


def _plan_recipe(
    recipe: Path, gpus: GpusOption, console: ProgressConsole
) -> tuple[RunPlan | None, UserError | None]:
    """Return the plan of a recipe, or the error of a refused one."""
    try:
        return plan(recipe, gpus=gpus).value, None
    except UserError as error:
        console.log(f"the run was not planned: {error}")
        # Other families have no plan, but can be trained.
        problem = _find_problem(recipe, console)
        if problem is not None and str(problem) != str(error):
            console.log(f"training would refuse the recipe: {problem}")
        return None, problem


def _format_data(
    source: str, summary: ImportSummary, options: ImportOptions, *, is_detected: bool
) -> list[str]:
    """Return the lines about the imported data."""
    from finesight.ingest.formats.table import format_media_options

    heading, *details = format_import(source, summary, options, is_detected=is_detected)
    if not summary.has_media:
        details.append("no images: a task of text only")
    if "fields" in options.columns:
        media = format_media_options(options.columns)
        details.append(f"for one column only: {media} --map answer=COLUMN")
    lines = [f"data    {heading}"]
    for detail in details:
        lines.append(f"        {detail}")
    return lines


def _format_check(checked: Outcome[CheckResult]) -> list[str]:
    """Return the lines about the issues of the data; one line without issues."""
    # The files are those of the import.
    first, *others = checked.lines[len(checked.value.sources) :]
    if not checked.value.issue_counts:
        return [f"check   {'; '.join([first, *others])}"]
    return [f"check   {first}", *others]


def _find_problem(recipe: Path, console: ProgressConsole) -> UserError | None:
    """Return the error with which training would refuse a recipe; None if it accepts it."""
    from finesight.settings.recipe import load_recipe
    from finesight.train.recipe_check import check_training

    try:
        check_training(load_recipe(recipe), console)
    except UserError as error:
        return error
    return None


def _list_run_steps(
    recipe: Path,
    run: Path,
    model: str,
    gpus: GpusOption,
    run_plan: RunPlan | None,
    problem: UserError | None,
) -> list[Step]:
    """Propose training and a chat, or a plan for an unsuitable run."""
    from finesight.encode.renderer import is_native
    from finesight.infer.model_loader import resolve_model_source

    chat = Step("chat", {"run_or_model": run})
    if run_plan is not None and run_plan.chosen_estimate.fits:
        return [build_train_step(recipe, (), run_plan.target.num_gpus), chat]
    # Models of other families have no plan.
    if problem is None and not is_native(resolve_model_source(model).folder):
        return [Step("train", {"recipe": recipe}), chat]
    return [Step("plan", {"recipe": recipe, "gpus": gpus})]


def _list_model_steps(recipe: Path, model: str, task: DetectedTask) -> list[Step]:
    """Propose steps without the model of a recipe, which cannot be downloaded."""
    from finesight.model_folder import TINY_MODEL
    from finesight.settings.recipe_template import get_learning_rates

    folder = model.rpartition("/")[2].partition("@")[0]
    learning_rate = get_learning_rates(task)[1]
    bundled = [f"model={TINY_MODEL}", f"train.learning_rate={learning_rate}"]
    purpose = "to try the workflow: the bundled model has 12.6 million parameters, and was trained"
    purpose += " on generated images only"
    return [
        Step("download", {"source": model, "to": folder}, "on a machine with a connection"),
        Step("plan", {"recipe": recipe, "overrides": [f"model={folder}"]}, "with this folder"),
        Step("plan", {"recipe": recipe, "overrides": bundled}, purpose),
    ]


def _format_example(file: Path) -> str:
    """Format question and answer of the first sample of a file."""
    from finesight.samples.corpus import open_sample_source
    from finesight.samples.sample import BoxPart, ContentPart, TextPart, list_coordinates

    def format_part(part: ContentPart) -> str:
        if isinstance(part, BoxPart):
            return f"{part.label or part.type} {[*map(round, list_coordinates(part))]}"
        if isinstance(part, TextPart):
            return part.text
        return f"<{part.type}>"

    texts = []
    for message in open_sample_source(file).read_sample(0).sample.messages[-2:]:
        text = " ".join(map(format_part, message.content))
        texts.append(textwrap.shorten(text, 120, placeholder=" ..."))
    return " -> ".join(texts)


@contextmanager
def _removed_if_empty(folder: Path) -> Iterator[None]:
    """Remove a folder after the `with` block unless it has content: a retry may create it again."""
    try:
        yield
    finally:
        with suppress(OSError):
            folder.rmdir()


def _ask(question: str, default: str, ask: Ask | None) -> str:
    """Ask a question; without questions, return the default."""
    if ask is None:
        return default
    return ask(question, default)


def _ask_metric(default: str, ask: Ask | None) -> str:
    tasks = list_tasks()
    choices = [f"  {task:15} {text}" for task, text in tasks.items()]
    question = "\n".join([*choices, "Task, one of the above"])
    while (metric := _ask(question, default, ask)) not in tasks:
        question = f"unknown task {metric!r}\nTask, one of the above"
    return metric


def _select_source(
    path: Path, options: ImportOptions, folder: Path, metric: str | None, ask: Ask | None
) -> tuple[Path, ImportOptions]:
    """Return the file or folder to import, with the column roles of a table.

    Args:
        folder: Folder to create, beside which a draft of a mapping is written.
        metric: Task chosen by the user. One of fields makes them of all columns with text.
    """
    from finesight.ingest.mapping_draft import check_proposal, detect_roles
    from finesight.metric_components import METRICS

    has_fields = metric is not None and bool(METRICS[metric].suggestion.fields_prompt)

    def ask_question(names: list[str]) -> str:
        if has_fields:
            return ""  # both are fields
        return _ask(f"Question column ({' or '.join(names)}; - for two answers)", names[0], ask)

    can_choose = has_fields or ask is not None
    detected = detect_roles(path, options, folder, ask_question if can_choose else None)
    path = detected.path
    columns = dict(detected.options.columns)
    if options.columns or not columns:
        return path, detected.options
    if has_fields and detected.proposal is not None:
        proposal = detected.proposal.choose_fields()
        detected = replace(detected, proposal=proposal)
        columns = dict(proposal.columns)
    if ask is None:
        check_proposal(detected, folder, fields_are_chosen=has_fields)
        return path, replace(detected.options, columns=columns)
    columns = _confirm_columns(columns, detected, folder, ask, keeps_fields=has_fields)
    return path, replace(detected.options, columns=columns, ignorable_columns=None)


def _confirm_columns(
    columns: Mapping[str, str],
    detected: DetectedColumns,
    folder: Path,
    ask: Ask,
    *,
    keeps_fields: bool,
) -> dict[str, str]:
    """Show the proposed roles on records, and ask for the columns of the answer.

    Args:
        keeps_fields: Whether fields remain fields if only one column is named.
    """
    from finesight.ingest.mapping_draft import check_proposal
    from finesight.ingest.role_proposal import format_values

    confirmed = dict(columns)
    shown = ""
    unused: Mapping[str, object] = {}
    if detected.proposal is not None:
        shown = "".join(f"  {line}\n" for line in detected.proposal.format_records())
        unused = detected.proposal.list_unused()
    if unused:
        shown += f"  left out: {format_values(unused)}\n"
    if "box" in confirmed:
        if unused and ask(f"{shown}Use these columns (yes or no)", "yes") != "yes":
            check_proposal(detected, folder)
        return confirmed
    keeps_role = keeps_fields and "fields" in confirmed
    default = confirmed.pop("answer", None) or confirmed.pop("fields")
    answer = ask(f"{shown}Answer column, or several for a JSON answer", default)
    role = "fields" if keeps_role or "," in answer else "answer"
    confirmed[role] = answer
    if detected.proposal is not None:
        final = replace(detected.proposal, columns=confirmed)
        others = {name: value for name, value in final.list_unused().items() if name not in unused}
        question = f"  also left out: {format_values(others)}\nUse these columns (yes or no)"
        if others and ask(question, "yes") != "yes":
            final.check_unused(str(detected.path))
    return confirmed


def _detect_task(
    path: Path, options: ImportOptions, folder: Path, metric: str | None, ask: Ask | None
) -> tuple[DetectedTask, ImportOptions, ImportSource]:
    """Detect the task of a dataset from evenly spaced rows, and complete its prompt.

    Args:
        folder: Folder to create, beside which a draft of a mapping is written.
        metric: Task chosen by the user, None for the detected one.

    Returns:
        Task, import options and opened dataset.
    """
    from finesight.evaluate.eval_case import get_reference_answer
    from finesight.evaluate.task_metrics import check_references
    from finesight.files.storage import temporary_folder
    from finesight.ingest.formats.row_keys import UnsupportedMediaError
    from finesight.ingest.import_source import NUM_PREVIEW_ROWS, UnvalidatedSource, open_source
    from finesight.ingest.mapping_draft import draft_of_unfound_media
    from finesight.metric_components import METRICS
    from finesight.settings.recipe_template import detect_task

    samples: list[Sample] = []
    opened = open_source(path, options)
    spacing = ceil(opened.rows.num_rows / NUM_PREVIEW_ROWS)

    def iter_spaced(start: int, stop: int) -> Iterator[SourceRow]:
        return itertools.islice(opened.rows.iter_range(start, stop), 0, None, spacing)

    spaced = replace(opened, rows=replace(opened.rows, iter_range=iter_spaced))
    # Rows without a question need a prompt, which may be empty.
    for preview_prompt in dict.fromkeys((options.prompt, options.prompt or "")):
        preview_options = replace(options, prompt=preview_prompt)
        with temporary_folder("init") as images:
            rows = list(UnvalidatedSource(spaced, preview_options, images))
        for row in rows:
            samples += row.samples
        if samples:
            break
    error = next((row.error for row in rows if row.error is not None), None)
    has_images = any(map(_has_images, samples))
    if not has_images and (samples or isinstance(error, UnsupportedMediaError)):
        _reject_unrecognized_images(opened)
    if not samples and error is not None:
        with draft_of_unfound_media(path, options, folder):
            raise error
    fields = options.columns.get("fields", "")
    task = detect_task(samples, fields)
    is_chosen = metric is not None or ask is not None
    metric = metric or _ask_metric(task.metric, ask)
    if metric != task.metric:
        judged = [sample for sample in samples if sample.label is not False]
        ids = [sample.id for sample in judged]
        check_references(metric, [*map(get_reference_answer, judged)], ids)
        task = detect_task(samples, fields, metric)
    task = replace(task, prompt=_complete_prompt(task, opened, is_preview=spacing > 1))
    needs_prompt = task.prompt is not None and options.prompt is None
    if needs_prompt and "prompt" in opened.data_format.supported_options:
        if not is_chosen and METRICS[task.metric].suggestion.alternative:
            raise _build_task_error(path, task.metric, samples)
        options = replace(options, prompt=_ask("Question about every image", str(task.prompt), ask))
    return task, options, opened


def _complete_prompt(task: DetectedTask, opened: ImportSource, *, is_preview: bool) -> str | None:
    """Return the suggested question, with the classes or labels of all rows; None for none.

    Args:
        is_preview: The task was detected from a part of the rows, which may lack classes.
    """
    from finesight.metric_components import METRICS
    from finesight.settings.recipe_template import format_class_prompt

    label = opened.column_map.get("label")
    if label is not None and opened.column_map.get("question") == label:
        return LABEL_PROMPT
    if task.prompt is None:
        return None
    prompt = task.prompt
    if is_preview and METRICS[task.metric].suggestion.lists_classes:
        prompt = format_class_prompt(_read_classes(opened))
    if label is not None:
        prompt = _format_box_prompt(opened, label) or prompt
    return prompt


def _build_task_error(path: Path, metric: str, samples: Sequence[Sample]) -> UserError:
    """Build the error of answers without a question that may be those of two tasks."""
    from finesight.metric_components import METRICS
    from finesight.samples.sample import join_text

    options: list[str] = []
    for name in (metric, METRICS[metric].suggestion.alternative):
        suggestion = METRICS[name].suggestion
        options.append(f'--task {name} ({suggestion.answer}: --prompt "{suggestion.prompt}")')
    shown: list[str] = []
    for sample in samples[:3]:
        shown.append(shorten(repr(join_text(sample.messages[-1].content).strip()), 40))
    return UserError(
        f"texts without a question, whose task is not certain: {', '.join(shown)}",
        where=str(path),
        expected="the task of the texts",
        remedy=f"give {' or '.join(options)}; --prompt is another question about every image",
    )


def _has_images(sample: Sample) -> bool:
    return any(part.type in ("image", "video") for part in sample.iter_parts())


def _read_classes(opened: ImportSource) -> set[str]:
    """Return the different answers of all rows."""
    column = opened.column_map.get("answer", "")
    classes = set()
    for row in opened.iter_rows():
        answer = row.record.get(column)
        if answer not in (None, ""):
            classes.add(str(answer).strip())
    return classes


def _reject_unrecognized_images(opened: ImportSource) -> None:
    """Raise UserError if a dataset that was read as text only contains columns with images."""
    from finesight.ingest.formats.conversation_rows import TURN_KEYS
    from finesight.ingest.formats.dataset_format import IMAGE_KEYS, VIDEO_KEYS, decode_json_lists
    from finesight.ingest.formats.table import suggest_mapping
    from finesight.ingest.import_source import NUM_PREVIEW_ROWS
    from finesight.samples.image_file import is_image_value

    def has_image(value: object) -> bool:
        if is_image_value(value):
            return True
        if isinstance(value, dict):
            return any(map(has_image, value.values()))
        return isinstance(value, list) and any(map(has_image, value))

    start, stop = opened.row_bounds
    rows = opened.rows.iter_range(start, min(stop, start + NUM_PREVIEW_ROWS))
    records = [decode_json_lists(row.record) for row in rows]
    keys: set[str] = set()
    for record in records:
        keys.update(key for key, value in record.items() if has_image(value))
    # Formats read these keys: another error is the reason.
    keys.difference_update(IMAGE_KEYS, VIDEO_KEYS)
    if not keys:
        return
    names = sorted(keys)
    mapping = suggest_mapping(records)
    remedy = f"give {mapping}"
    has_turns = any(isinstance(records[0].get(key), list) for key in TURN_KEYS)
    if has_turns or "COLUMN" in mapping:  # columns of a table would leave out the turns
        remedy = f"rename the key {names[0]} to images in all rows"
        inner = _find_nested_image(records)
        if inner and inner.partition(".")[0] == names[0]:
            remedy = f"move {inner} to the key images of the row itself, in all rows"
    raise UserError(
        f"no image is recognized, but {', '.join(names)} contains images",
        where=str(opened.path),
        expected=f"images where {opened.data_format.name} has them, in rows such as "
        f"{opened.data_format.description}",
        remedy=remedy,
    )


def _find_nested_image(records: Sequence[Mapping[str, Any]]) -> str:
    """Return the path of the first image inside another value; empty without one."""
    from finesight.ingest.formats.row_keys import iter_nested
    from finesight.samples.image_file import is_image_value

    for record in records:
        for path, _, value in iter_nested(record):
            if "." in path and is_image_value(value):
                return path
    return ""


def _format_box_prompt(opened: ImportSource, label: str) -> str | None:
    """Format the question about all objects with their classes; None for too many classes."""
    from finesight.ingest.formats.image_annotations import DETECTION_PROMPT
    from finesight.ingest.formats.table import list_labels
    from finesight.samples.default_prompts import MAX_PROMPT_CLASSES, escape_placeholders

    names = list_labels(opened.iter_rows(), label)
    if not 0 < len(names) <= MAX_PROMPT_CLASSES:
        return None
    return DETECTION_PROMPT.format(labels=escape_placeholders(", ".join(names)))


def find_device() -> tuple[str, int]:
    """Return the name of the GPU and its memory in bytes, or of the CPU and 0."""
    import torch

    from finesight.infer.model_loader import resolve_device
    from finesight.train.logging import get_device_name

    device = resolve_device("auto")
    name = get_device_name(device)
    if device.type != "cuda":
        return name, 0
    _, memory_bytes = torch.cuda.mem_get_info(device)
    return name, memory_bytes


def choose_model(memory_bytes: int) -> str:
    """Return the suggested model for a GPU with this memory, or for a CPU (0)."""
    from finesight.model_folder import TINY_MODEL

    for minimum_bytes, name in MODELS:
        if memory_bytes >= minimum_bytes:
            return name
    return TINY_MODEL


PROMPT = "Read the ticket."
NUM_SHOWN_PREDICTIONS = 4


@dataclass(frozen=True)
class QuickstartSettings:
    """Dataset size, training steps, model and random seed of the quickstart."""

    num_images: int = 1700
    num_eval_rows: int = 100
    steps: int = 200
    model: str = "finesight-tiny"
    seed: int = 0


def quickstart(
    out: Annotated[StrPath, Parameter(metavar="FOLDER")] = Path("quickstart"),
    settings: QuickstartSettings | None = None,
) -> Outcome[RunResult]:
    """Run the complete workflow on generated train tickets, with finesight-tiny.

    Needs no network and no GPU, and takes about 90 seconds on two CPU cores. Run it again to
    resume after an interruption.

    Example: finesight quickstart --out /tmp/first

    Args:
        out: Folder for all files.
    """
    from finesight.evaluate.prediction_file import read_predictions
    from finesight.settings.manifest import PREDICTIONS_FOLDER
    from finesight.synth.tickets import TABLE_FILE, TICKET_FIELDS, write_tickets

    out = Path(out)
    settings = settings or QuickstartSettings()
    start_time = time.monotonic()
    recipe = write_recipe(out, settings)
    log = ProgressConsole().log
    table = out / "tickets" / TABLE_FILE
    data = out / "data"
    log(f"1. Generate {settings.num_images} images of train tickets and their label file {table}")
    if not table.parent.exists():
        write_tickets(table.parent, settings.num_images, settings.seed)
    for line in table.read_text(encoding="utf-8").splitlines()[:3]:
        log(f"      {line}")
    log(f"2. Import them, the last {settings.num_eval_rows} for validation")
    columns = {"image": "image", "fields": ",".join(TICKET_FIELDS)}
    arguments = {"columns": columns, "prompt": PROMPT, "eval_last": settings.num_eval_rows}
    log(_format_step("import", source=table, out=data, **arguments))
    if not data.exists():
        import_data(table, data, columns=columns, prompt=PROMPT, eval_last=settings.num_eval_rows)
    log("3. Check the data")
    log(_format_step("check", sources=[recipe]))
    for line in check_data([recipe]).lines:
        log(f"   {line}")
    log(f"4. Train {settings.model}, with an evaluation before and after")
    log(_format_step("train", recipe=recipe))
    try:
        run_result = train(recipe, resume=True).value
    except TrainingInterrupted as interruption:
        raise TrainingInterrupted(f"{interruption}, or repeat the quickstart") from interruption
    run = out / "run"
    predictions = run / PREDICTIONS_FOLDER
    before = read_predictions(predictions / "before.jsonl")[:NUM_SHOWN_PREDICTIONS]
    after = read_predictions(predictions / "after.jsonl")[:NUM_SHOWN_PREDICTIONS]
    question = {"images": [os.path.normpath(after[0].record["image"])], "prompt": PROMPT}
    next_steps = [
        Step("show", {"recipe": recipe}),
        Step("predict", {"run_or_model": run, **question}),
        Step("eval", {"run_or_model": run}),
        Step("chat", {"run_or_model": run}),
        Step("merge", {"source": run, "out": out / "merged"}),
        Step("init", {}),
    ]
    shown = [*_format_result(run, run_result, before, after)]
    shown.append(f"{time.monotonic() - start_time:.0f} s in total")
    return Outcome(run_result, shown, run_result.as_json(), next_steps)


def _format_step(operation: str, **arguments: object) -> str:
    return f"   $ {format_command(Step(operation, arguments))}"


def write_recipe(out: Path, plan: QuickstartSettings) -> Path:
    """Write the recipe of the quickstart into the folder `out`, unless it exists.

    Raises UserError if `out` contains other files.
    """
    from finesight.files.storage import has_content, write_file
    from finesight.infer.model_loader import select_cpu_precision
    from finesight.model_folder import TINY_MODEL
    from finesight.settings.recipe_template import DetectedTask, StartModel, format_recipe

    recipe = out / "recipe.yaml"
    num_samples = plan.num_images - plan.num_eval_rows
    files = {
        out / "data" / "train.jsonl": f"{num_samples} train tickets",
        out / "data" / "eval.jsonl": f"{plan.num_eval_rows} train tickets",
    }
    task = DetectedTask("json", PROMPT, max_new_tokens=112)
    overrides = [
        # A JSON string is a YAML string, whatever is in it.
        f"model={json.dumps(plan.model, ensure_ascii=False)}",
        f"train.seed={plan.seed}",
        f"train.precision={select_cpu_precision()}",
        "train.device=cpu",
        "eval.every=0",
        "eval.limit=null",
    ]
    start = StartModel(TINY_MODEL, is_tiny=True)
    inputs = (recipe, out / "run", start, "`finesight quickstart`", task, files, num_samples)
    # Equal in quality to batches of 16 at 2.0e-3 in two thirds of the time on a CPU.
    settings = {"train.batch_size": "8", "train.learning_rate": "4.0e-3"}
    settings["train.steps"] = str(plan.steps)
    content = format_recipe(*inputs, overrides, settings).encode()
    if has_content(recipe, content):
        return recipe
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(
            "contains files that are not from a quickstart of this version",
            where=str(out),
            expected="an empty or missing folder",
            remedy="choose another folder with --out, or move this one",
        )
    write_file(recipe, content)
    return recipe


def _format_result(
    run_dir: Path,
    result: RunResult,
    old_answers: Sequence[ScoredPrediction],
    new_answers: Sequence[ScoredPrediction],
) -> Iterator[str]:
    """Yield label and predictions of each ticket, before and after training, and the scores."""
    from finesight.settings.manifest import REPORT_FILE

    yield "5. Predictions for validation tickets"
    for old, new in zip(old_answers, new_answers, strict=True):
        name = Path(new.record["image"]).name
        indent = " " * len(name)
        yield f"   {name}  label   {new.case.references[0]}"
        yield f"   {indent}  before  {shorten(' '.join(old.case.answer.split()), 120)}"
        yield f"   {indent}  after   {shorten(' '.join(new.case.answer.split()), 120)}"
    before = result.before
    after = result.after
    assert before is not None, f"{run_dir} has no evaluation before its first step"
    assert after is not None, f"{run_dir} has no evaluation after its last step"
    for name, title in (("f1", "F1 of the ticket fields"), ("exact", "All fields correct")):
        yield f"{title}: {before.scores[name]:.1%} before, {after.scores[name]:.1%} after"
    yield f"Report: {run_dir / REPORT_FILE}"
