"""`finesight init`: import a dataset and write a recipe that fits its task and the device."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from finesight.cli.options import (
    AsJsonOption,
    ColumnsOption,
    PromptOption,
    echo_json,
    parse_column_map,
)
from finesight.errors import UserError, escape_unprintable

if TYPE_CHECKING:
    from finesight.data.import_source import ImportOptions, ImportSource
    from finesight.data.importer import ImportSummary
    from finesight.data.row_reader import Record, SourceRow
    from finesight.data.sample import Sample
    from finesight.plan.run_plan import RunPlan
    from finesight.train.console import TrainingConsole

NUM_PREVIEW_ROWS = 300
"""Number of rows from which columns and task are detected."""

MIN_SPLIT_ROWS, NUM_EVAL_ROWS, MAX_EVAL_FRACTION = 20, 200, 0.2
"""Smallest dataset with a validation split, and its target number and maximum fraction of rows."""

MODELS = (
    (44e9, "Qwen/Qwen3.5-9B"),
    (20e9, "Qwen/Qwen3.5-4B"),
    (10e9, "Qwen/Qwen3.5-2B"),
    (6e9, "Qwen/Qwen3.5-0.8B"),
)
"""GPU memory in bytes from which a model is suggested; with less, the bundled model."""

TASKS = {
    "captions": "describe the image in words of your own",
    "latex": "write a formula as LaTeX",
    "ocr": "read the text of the image",
    "qa": "answer a question in a few words",
    "classification": "choose one of several classes",
    "json": "read fields, such as shop, date and total, as JSON",
    "grounding": "find the object that the question names",
    "detection": "find all objects of given classes",
}
"""Tasks with the answer that a model gives."""

LABEL_KINDS = {"json": "fields", "grounding": "boxes", "detection": "boxes"}
"""Kind of the labels of a task, if it is not text."""

PROMPTS = {
    "captions": "Describe the image.",
    "latex": "Write the formula as LaTeX.",
    "ocr": "Read the text.",
    "qa": "Answer the question.",
    "grounding": "Locate the object.",
    "detection": "Locate all objects.",
}
MAX_PIXELS = {"captions": 262_144, "classification": 262_144, "grounding": 602_112}
"""Maximum number of pixels per image by task; `DEFAULT_MAX_PIXELS` for other tasks."""

DEFAULT_MAX_PIXELS = 802_816

_QUESTION_NAMES = ("question", "query", "instruction", "prompt")
_BOX_NAMES = ("bbox", "box", "bboxes", "boxes")
_LABEL_NAMES = ("label", "class", "category", "name")
_ANSWER_NAMES = ("answer", "caption", "text", "latex", "formula", "response", "label", "class")
_IGNORED_NAMES = re.compile(r"(?i)id|index|idx|split|unnamed.*|")
_LATEX = re.compile(r"\\[a-zA-Z]+|[_^]\{")

_RECIPE = """\
# Written by `finesight init` for {device}.
# Override settings on the command line: finesight train {recipe} train.batch_size=4
model: {model}
data:
  train: {train}
{eval_data}{image}tune:  # trained parts of the model: frozen, lora (adapters) or full
{tune}train:
{train_settings}{eval_settings}output_dir: {run}  # checkpoints, weights and report
"""
_TUNE_TINY = """\
  vision: lora
  merger: lora
  language: lora
  lora: {rank: 32, alpha: 32, dropout: 0.0}
"""
_TUNE_LARGE = """\
  vision: frozen  # lora, if the images differ much from photos and documents
  merger: frozen
  language: lora
  lora: {rank: 64, alpha: 16, dropout: 0.05}
"""


@dataclass(frozen=True)
class DetectedTask:
    """Task of a dataset, detected from its samples.

    Attributes:
        metric: Name of the task metric.
        prompt: Suggested question about every image; None if the samples contain questions.
        max_new_tokens: Upper bound of the answer length in tokens.
    """

    metric: str
    prompt: str | None
    max_new_tokens: int


def init(
    data: Annotated[
        str | None,
        typer.Argument(
            metavar="DATA", help="Dataset as for `import`; also a folder of a table and images."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Folder to create. Default: DATA with -finetune, in the current directory.",
        ),
    ] = None,
    yes: Annotated[
        bool, typer.Option("--yes", help="Ask no questions: use the detected settings.")
    ] = False,
    columns: ColumnsOption = None,
    prompt: PromptOption = None,
    model: Annotated[
        str | None, typer.Option(help="Model folder or hub name. Default: by GPU memory.")
    ] = None,
    as_json: AsJsonOption = False,
) -> None:
    """Import a dataset, and write a recipe for its task and for this machine.

    Detects the format, columns and task of the data, and the memory of the GPU. Asks at most five
    questions. Writes FOLDER/data and a commented FOLDER/recipe.yaml with a model that fits, checks
    the data, and prints the plan of the run and the next command. Existing files are never changed.
    For a folder of images without labels, the next command is `finesight label`.

    Example: finesight init photos/captions.csv --yes
    """
    from rich.console import Console

    from finesight.data.import_source import ImportOptions
    from finesight.data.importer import import_dataset
    from finesight.data.source_fetch import fetch_source
    from finesight.hub.address import is_hub_address
    from finesight.model_folder import locate_model
    from finesight.storage import raise_if_exists
    from finesight.train.console import TrainingConsole

    if not yes and not is_interactive():
        typer.echo("standard input is not a terminal: no questions, as with --yes", err=True)
        yes = True
    source = data or _ask("Dataset (file, folder or hf:OWNER/NAME)", ".", yes)
    name = re.split("[:@]", source)[1] if is_hub_address(source) else source
    folder = out or Path(f"{Path(name).resolve().stem}-finetune")
    raise_if_exists(folder)
    options = ImportOptions(
        columns=parse_column_map(columns or []), prompt=prompt, on_invalid_row="skip"
    )
    num_images = 0 if options.columns else count_unlabeled_images(Path(source))
    if num_images:
        _init_labels(source, folder, num_images, prompt, model, yes, as_json)
        return
    console = TrainingConsole(Console(stderr=True))
    with _removed_if_empty(folder), fetch_source(source, folder / "data", options) as fetched:
        path, options = _select_source(fetched.path, fetched.options, yes)
        task, options, opened = _detect_task(path, options, yes)
        device, memory_bytes = find_device()
        model = model or _ask("Model", choose_model(memory_bytes), yes)
        locate_model(model)  # raises the error of a missing model before anything is written
        num_rows = opened.rows.num_rows
        if num_rows >= MIN_SPLIT_ROWS and opened.rows.eval_start in (None, num_rows):
            num_eval_rows = min(MAX_EVAL_FRACTION, NUM_EVAL_ROWS / num_rows)
            options = replace(options, train_fraction=1 - num_eval_rows)
        with console.activity("importing the data"):
            summary = import_dataset(path, folder / "data", options)
    recipe = folder / "recipe.yaml"
    files = {file.file: f"{file.num_samples} samples" for file in summary.output_files}
    num_samples = summary.output_files[0].num_samples
    _write_recipe(recipe, model, device, task, files, num_samples)
    run_plan = _plan(recipe, console)
    if run_plan is not None:
        overrides = [item for item in run_plan.overrides if "num_workers" not in item]
        _write_recipe(recipe, model, device, task, files, num_samples, overrides)
    lines = [
        f"data    {source}: {summary.format} ({opened.detected_by}), {num_rows} rows",
        *([f"        {summary.text_format}"] if summary.text_format else []),
        *(f"        {file.file}: {file.num_samples} samples" for file in summary.output_files),
        *(f"        skipped: {count} rows, {why}" for why, count in summary.skipped_rows.items()),
        *(f"        {role}: {column}" for role, column in options.columns.items()),
        *(f"        unused column: {column}" for column in summary.unused_columns),
        f"task    {task.metric}" + (f"; prompt: {options.prompt}" if options.prompt else ""),
        f"device  {device}, {memory_bytes / 1e9:.0f} GB" if memory_bytes else f"device  {device}",
        f"model   {model}",
        "",
    ]
    check_lines, has_errors = _check(summary)
    commands = [["check", recipe, "--html", folder / "check.html"]] if has_errors else []
    fits = None if run_plan is None else run_plan.chosen_estimate.fits
    commands += [["train", recipe], ["chat", folder / "run"]] if fits else [["plan", recipe]]
    next_commands = [shlex.join(["finesight", *map(str, words)]) for words in commands]
    if as_json:
        result = {
            "recipe": str(recipe),
            "format": summary.format,
            "columns": dict(options.columns),
            "metric": task.metric,
            "prompt": options.prompt,
            "model": model,
            "samples": {file.file.stem: file.num_samples for file in summary.output_files},
            "fits": fits,
            "has_data_errors": has_errors,
            "next": next_commands,
        }
        echo_json(result)
        return
    lines += [*check_lines, "", *_format_plan(run_plan), f"recipe: {recipe}", "next:"]
    typer.echo("\n".join(map(escape_unprintable, [*lines, *(f"  {c}" for c in next_commands)])))


@contextmanager
def _removed_if_empty(folder: Path) -> Iterator[None]:
    """Remove a folder after the `with` block unless it has content: a retry may create it again."""
    try:
        yield
    finally:
        with suppress(OSError):
            folder.rmdir()


def is_interactive() -> bool:
    """Return whether questions can be answered on standard input."""
    return sys.stdin.isatty()


def _ask(question: str, default: str, yes: bool) -> str:
    """Ask a question on the terminal; without questions, return the default."""
    return default if yes else str(typer.prompt(question, default=default, err=True))


def _ask_metric(default: str, yes: bool) -> str:
    from finesight.config import TaskName

    if not yes:
        typer.echo("\n".join(f"  {task:15} {text}" for task, text in TASKS.items()), err=True)
    while (metric := _ask("Task, one of the above", default, yes)) not in get_args(TaskName):
        typer.echo(f"unknown task {metric!r}", err=True)
    return metric


def count_unlabeled_images(folder: Path) -> int:
    """Return the number of images in a folder without labels; 0 for any other source."""
    from finesight.data.import_source import ImportOptions, open_source
    from finesight.data.row_reader import ROW_SUFFIXES, list_folder

    if not folder.is_dir():
        return 0
    listing = list_folder(folder)
    if not listing.count_suffixes().keys().isdisjoint((".txt", ".xml", ".tar", *ROW_SUFFIXES)):
        return 0
    try:
        open_source(folder, ImportOptions())  # opens class folders
    except UserError:
        return len(listing.image_files())
    return 0


def _init_labels(
    source: str,
    folder: Path,
    num_images: int,
    prompt: str | None,
    model: str | None,
    yes: bool,
    as_json: bool,
) -> None:
    """Write the recipe of images that `finesight label` labels, and print the commands."""
    from finesight.label.label_store import EVAL_FILE, LABELS_FILE
    from finesight.model_folder import TINY_MODEL, locate_model

    metric = _ask_metric("captions", yes)
    prompt = prompt or _ask("Question about every image", PROMPTS.get(metric, "What is it?"), yes)
    classes = _ask("Classes (A,B,C)", "", yes) if metric == "classification" else ""
    device, memory_bytes = find_device()
    model = model or _ask("Model", choose_model(memory_bytes), yes)
    locate_model(model)
    data, recipe, run = folder / "data", folder / "recipe.yaml", folder / "run"
    files = dict.fromkeys((data / LABELS_FILE, data / EVAL_FILE), "written by `finesight label`")
    num_samples = round(num_images * (1 - MAX_EVAL_FRACTION))
    task = DetectedTask(metric, prompt, 32 if classes else 256)
    _write_recipe(recipe, model, device, task, files, num_samples)
    label = ["label", model, source, "--prompt", prompt, "--out", data]
    # The bundled model cannot answer before training; the keys of fields come from suggestions.
    has_suggestions = model != TINY_MODEL
    kind = "text" if metric == "json" and not has_suggestions else LABEL_KINDS.get(metric, "text")
    label += ["--classes", classes] if classes else ["--kind", kind]
    label += [] if has_suggestions else ["--no-suggestions"]
    label += ["--train-fraction", 1 - MAX_EVAL_FRACTION]
    commands = [
        shlex.join(["finesight", *map(str, words)])
        for words in (label, ["train", recipe], ["serve", run])
    ]
    if as_json:
        echo_json({"recipe": str(recipe), "metric": metric, "prompt": prompt, "next": commands})
        return
    lines = [f"data    {source}: {num_images} images without labels", f"model   {model}", ""]
    lines += [f"recipe: {recipe}", "next:", *(f"  {command}" for command in commands)]
    typer.echo("\n".join(map(escape_unprintable, lines)))


def _select_source(path: Path, options: ImportOptions, yes: bool) -> tuple[Path, ImportOptions]:
    """Return the file or folder to import, with the column roles of a table."""
    from finesight.data.import_source import open_source
    from finesight.data.row_reader import ROW_SUFFIXES, list_folder, open_row_file

    if options.columns or options.row_files:
        return path, options
    try:
        open_source(path, options)
        return path, options
    except UserError:
        files = [path]
        if path.is_dir():
            listing = list_folder(path).files
            files = [file for file in listing if file.suffix.lower() in ROW_SUFFIXES]
        if len(files) != 1 or not files[0].is_file():
            raise
        rows = open_row_file(files[0])
        records = [row.record for row in rows.iter_range(0, min(rows.num_rows, NUM_PREVIEW_ROWS))]
        columns = guess_columns(records)
        if "image" not in columns or len(columns) < 2:
            open_source(files[0], options)  # raises the error of a table, if it is one
            return files[0], options
        if not columns.keys() & {"answer", "fields", "box"}:
            raise UserError(
                f"no answer column among {', '.join(map(str, records[0]))}",
                where=str(files[0]),
                expected="a column with the answers",
                remedy="name the column: --map image=COLUMN --map answer=COLUMN",
            ) from None
    if "box" not in columns:
        default = columns.pop("answer", None) or columns.pop("fields")
        answer = _ask("Answer column, or several for a JSON answer", default, yes)
        columns["fields" if "," in answer else "answer"] = answer
    return files[0], replace(options, columns=columns)


def guess_columns(records: Sequence[Record]) -> dict[str, str]:
    """Guess the roles of table columns from their names and values, as for `import --map`."""
    from finesight.data.image_header import IMAGE_SUFFIXES

    def is_image(value: object) -> bool:
        if isinstance(value, dict):
            return "bytes" in value or "path" in value
        return isinstance(value, str) and Path(value).suffix.lower() in IMAGE_SUFFIXES

    names = {str(name).lower(): str(name) for name in records[0]}
    columns: dict[str, str] = {}
    for name in names.values():
        if fmean(is_image(record.get(name)) for record in records) > 0.9:
            columns["image"] = name
            break
    roles = {"question": _QUESTION_NAMES, "box": _BOX_NAMES, "label": _LABEL_NAMES}
    for role, candidates in roles.items():
        if (match := next((names[key] for key in candidates if key in names), None)) is not None:
            columns[role] = match
    if "box" in columns:
        # The label of a box is also the question.
        if "label" in columns:
            columns.setdefault("question", columns["label"])
        return columns
    columns.pop("label", None)
    others = [
        name
        for key, name in names.items()
        if name not in columns.values()
        and not _IGNORED_NAMES.fullmatch(key)
        and any(record.get(name) not in (None, "") for record in records)
    ]
    answers = [names[key] for key in _ANSWER_NAMES if names.get(key) in others]
    if answers or len(others) == 1:
        columns["answer"] = (answers or others)[0]
    elif others:
        columns["fields"] = ",".join(others)
    return columns


def _detect_task(
    path: Path, options: ImportOptions, yes: bool
) -> tuple[DetectedTask, ImportOptions, ImportSource]:
    """Detect the task of a dataset from evenly spaced rows, and complete its prompt.

    Returns:
        Task, import options and opened dataset.
    """
    from finesight.data.import_source import UnvalidatedSource, open_source

    samples: list[Sample] = []
    opened = open_source(path, options)
    spacing = ceil(opened.rows.num_rows / NUM_PREVIEW_ROWS)

    def iter_spaced(start: int, stop: int) -> Iterator[SourceRow]:
        return itertools.islice(opened.rows.iter_range(start, stop), 0, None, spacing)

    spaced = replace(opened, rows=replace(opened.rows, iter_range=iter_spaced))
    # Rows without a question need a prompt, which may be empty.
    for preview_prompt in dict.fromkeys((options.prompt, options.prompt or "")):
        preview_options = replace(options, prompt=preview_prompt)
        with tempfile.TemporaryDirectory() as images:
            rows = list(UnvalidatedSource(spaced, preview_options, Path(images)))
        samples = [sample for row in rows for sample in row.samples]
        if samples:
            break
    if not samples:
        raise next(row.error for row in rows if row.error is not None)
    task = detect_task(samples, options.columns.get("fields", ""))
    if spacing > 1 and task.metric == "classification" and task.prompt is not None:
        # The preview may lack classes.
        answers = (
            row.record.get(opened.column_map.get("answer", "")) for row in opened.iter_rows()
        )
        classes = {str(answer).strip() for answer in answers if answer not in (None, "")}
        task = replace(task, prompt=_format_class_prompt(classes))
    metric = _ask_metric(task.metric, yes)
    label = options.columns.get("label")
    if label is not None and options.columns.get("question") == label:
        task = replace(task, prompt=PROMPTS["grounding"])
    needs_prompt = task.prompt is not None and options.prompt is None
    if needs_prompt and "prompt" in opened.data_format.supported_options:
        options = replace(options, prompt=_ask("Question about every image", str(task.prompt), yes))
    return replace(task, metric=metric), options, opened


def _format_class_prompt(classes: Collection[str]) -> str:
    from finesight.data.formats.image_annotations import build_class_prompt

    return build_class_prompt(len(classes)).format(labels=", ".join(sorted(classes)))


def detect_task(samples: Sequence[Sample], fields: str = "") -> DetectedTask:
    """Detect the task of samples from their last answers and questions.

    Args:
        samples: Samples of the dataset.
        fields: Columns of a JSON answer, for the prompt.
    """
    from finesight.data.formats.dataset_format import join_text
    from finesight.data.sample import BoxPart

    answers = [join_text(sample.messages[-1].content).strip() for sample in samples]
    questions = {join_text(sample.messages[-2].content).strip() for sample in samples}
    box_counts = [
        sum(isinstance(part, BoxPart) for part in sample.messages[-1].content) for sample in samples
    ]
    classes = set(answers)
    longest = max(map(len, answers)) + 32 * max(box_counts)
    if fmean(map(bool, box_counts)) > 0.5:
        metric = "detection" if max(box_counts) > 1 else "grounding"
    elif fmean(map(_is_json_object, answers)) > 0.8:
        metric = "json"
    elif fmean(bool(_LATEX.search(answer)) for answer in answers) > 0.5:
        metric = "latex"
    elif len(classes) <= max(2, len(answers) / 10) and longest <= 60:
        metric = "classification"
    elif len(questions) > max(1, len(answers) / 4):
        metric = "qa"
    else:
        metric = "captions" if fmean(len(answer.split()) for answer in answers) >= 4 else "ocr"
    prompt = PROMPTS.get(metric)
    if metric == "json":
        prompt = f"Return {fields.replace(',', ', ')} as JSON." if fields else "Return the JSON."
    elif metric == "classification":
        prompt = _format_class_prompt(classes)
    max_new_tokens = 1 << max(5, min(10, (longest + 16).bit_length()))
    return DetectedTask(metric, prompt if questions == {""} else None, max_new_tokens)


def _is_json_object(text: str) -> bool:
    from finesight.bounded_files import parse_json

    try:
        return isinstance(parse_json(text), dict)
    except ValueError:
        return False


def find_device() -> tuple[str, int]:
    """Return the name of the GPU and its memory in bytes, or of the CPU and 0."""
    import torch

    from finesight.infer.model_loader import resolve_device
    from finesight.train.logging import get_device_name

    device = resolve_device("auto")
    is_cuda = device.type == "cuda"
    return get_device_name(device), torch.cuda.mem_get_info(device)[1] if is_cuda else 0


def choose_model(memory_bytes: int) -> str:
    """Return the suggested model for a GPU with this memory, or for a CPU (0)."""
    from finesight.model_folder import TINY_MODEL

    return next((name for minimum, name in MODELS if memory_bytes >= minimum), TINY_MODEL)


def _write_recipe(
    recipe: Path,
    model: str,
    device: str,
    task: DetectedTask,
    files: Mapping[Path, str],
    num_samples: int,
    overrides: Sequence[str] = (),
) -> None:
    """Write the recipe, with the overrides of a plan as further settings.

    Args:
        files: Comment on the training file and on the validation file, if there is one.
        num_samples: Number of training samples.
    """
    from finesight.model_folder import TINY_MODEL
    from finesight.storage import write_file

    is_tiny = model == TINY_MODEL
    train_file, *eval_files = files
    epochs = 3 if num_samples < 3000 else 1
    duration = "steps: 200" if is_tiny else f"epochs: {epochs}  # passes over the training samples"
    learning_rate = "1.0e-4"
    if is_tiny:
        learning_rate = "2.0e-3  # a small model needs more than the usual 1.0e-4"
    batch_size = 16 if num_samples >= 200 else 8
    train = [duration, f"batch_size: {batch_size}", f"learning_rate: {learning_rate}"]
    tune = _TUNE_TINY if is_tiny else _TUNE_LARGE
    for override in overrides:
        key, _, value = override.partition("=")
        section, name = key.split(".", 1)
        if section == "train":
            train.append(f"{name}: {value}  # chosen by the plan for this device")
        elif name == "quantize.nf4":
            tune += f"  quantize: {{nf4: {value}}}  # QLoRA: frozen weights in 4 bits\n"
    max_pixels = MAX_PIXELS.get(task.metric, DEFAULT_MAX_PIXELS)
    eval_data = "".join(
        f"  eval: {_quote(file)}  # {files[file]}, not used for training\n" for file in eval_files
    )
    eval_settings = (
        f"eval: {{metric: {task.metric}, limit: {NUM_EVAL_ROWS},"
        f" max_new_tokens: {task.max_new_tokens}}}\n"
    )
    text = _RECIPE.format(
        device=device,
        recipe=recipe,
        model=_quote(model),
        train=f"{_quote(train_file)}  # {files[train_file]}",
        eval_data=eval_data,
        image=""
        if is_tiny
        else f"image: {{max_pixels: {max_pixels}}}  # larger images are reduced to this size\n",
        tune=tune,
        train_settings="".join(f"  {line}\n" for line in train),
        eval_settings=eval_settings if eval_files else "",
        run=_quote(recipe.parent / "run"),
    )
    write_file(recipe, text.encode())


def _quote(value: str | Path) -> str:
    """Format a value as a quoted YAML string."""
    return json.dumps(str(value), ensure_ascii=False)


def _plan(recipe: Path, console: TrainingConsole) -> RunPlan | None:
    """Plan the run of a recipe; None if the model cannot be downloaded."""
    from finesight.plan.run_plan import plan_run
    from finesight.recipe import load_recipe

    settings = load_recipe(recipe)
    try:
        with console.activity("planning the run"):
            return plan_run(settings, None, console)
    except UserError as error:
        console.log(f"the run was not planned: {error}")
        return None


def _format_plan(run_plan: RunPlan | None) -> list[str]:
    from finesight.plan.plan_format import format_plan

    if run_plan is None:
        return []
    lines = format_plan(run_plan)
    # The overrides of the last line are in the recipe.
    return lines if not run_plan.chosen_estimate.fits else lines[:-1]


def _check(summary: ImportSummary) -> tuple[list[str], bool]:
    """Check the imported samples; return the lines of the summary, and whether it has errors."""
    from finesight.check.check_issues import format_summary
    from finesight.check.data_checker import (
        check_sources,
        inputs_from_files,
        load_model_requirements,
    )
    from finesight.cli.data import MAX_PRINTED_ISSUES
    from finesight.data.import_source import ImportOptions

    train_file, *eval_files = [file.file for file in summary.output_files]
    inputs = inputs_from_files([train_file], eval_files, ImportOptions())
    result = check_sources(inputs, load_model_requirements(None, None))
    return format_summary(result, MAX_PRINTED_ISSUES), result.exit_code == 2
