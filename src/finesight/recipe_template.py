"""Task of a dataset, and a recipe with comments for it."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from finesight.bounded_files import load_yaml
from finesight.config import TuneSettings
from finesight.data.formats.image_annotations import build_class_prompt
from finesight.data.row_reader import is_object_text
from finesight.data.sample import TOOL_CALL_START, BoxPart, ContentPart, Sample, join_text
from finesight.errors import Step
from finesight.manifest import MANIFEST_FILE, find_run_dir, load_manifest
from finesight.model_folder import TINY_MODEL

MAX_NUMERIC_CLASSES, MAX_NUMERIC_FRACTION = 10, 0.1
"""Number of classes with digits, and their fraction of the answers; more are readings."""

MAX_CLASS_CHARS, MIN_CAPTION_WORDS = 60, 8
"""Maximum length of a class, and mean words of answers to several questions that are captions."""

PROMPTS = {
    "captions": "Describe the image.",
    "latex": "Write the formula as LaTeX.",
    "ocr": "Read the text.",
    "qa": "Answer the question.",
    "json": "Return the fields as JSON.",
    "grounding": "Locate the object.",
    "detection": "Locate all objects.",
    "pointing": "Point to all objects.",
}
_LATEX = re.compile(r"\\[a-zA-Z]+|[_^]\{")
_QUESTION = re.compile(
    "(?i)[?？]$|^(?:what|which|who|whose|whom|where|when|why|how|is|are|was|were|do|does|did|can"
    "|could|has|have|will|would)\\b|什么|多少|几|哪|谁|吗|怎"
)

NUM_EVAL_ROWS = 200
"""Target number of validation samples."""

MAX_PIXELS = {"captions": 262_144, "classification": 262_144, "grounding": 602_112}
"""Maximum number of pixels per image by task; `DEFAULT_MAX_PIXELS` for other tasks."""

DEFAULT_MAX_PIXELS = 802_816

_RECIPE = """\
# Written by {author}.
# {override}
model: {model}
data:
{data}{image}tune:  # {tune_comment}
{tune}train:
{train_settings}{eval_settings}output_dir: {run}  # checkpoints, weights and report
"""
_TUNE_TINY = """\
  vision: lora
  merger: lora
  language: lora
  lora: {rank: 32, alpha: 32, dropout: 0.0}
"""
_TUNE_TINY_TEXT = """\
  vision: frozen  # the samples have no images
  merger: frozen
  language: lora
  lora: {rank: 32, alpha: 32, dropout: 0.0}
"""
_TUNE_LARGE = """\
  vision: frozen  # lora, if the images differ much from photos and documents
  merger: frozen
  language: lora
  lora: {rank: 64, alpha: 16, dropout: 0.05}
"""
LINE_BREAK = re.compile("[\n\r\x85\u2028\u2029]")
TUNE_COMMENT = "trained parts of the model: frozen, lora (adapters) or full"


MIN_STEPS, MAX_SHORT_STEPS = 100, 200
"""Minimum steps of a run, and the maximum of a model that trains on a CPU."""


OBJECTIVES = {
    "dpo": "objective: dpo  # on pairs of answers; sft: on the chosen ones",
    "kto": "objective: kto  # on answers with a label",
    "grpo": "objective: grpo  # on sampled responses; fine-tune on answers first",
    "sft": "objective: sft  # on the chosen answers: some samples have no rejected one",
}
"""Settings of objectives that the data or the user selects."""

LEARNING_RATES = {
    **dict.fromkeys(("dpo", "kto"), ("5.0e-6", "5.0e-4")),
    "grpo": ("1.0e-5", "5.0e-4"),
}
"""Usual learning rate of an objective with LoRA, and that of finesight-tiny."""

REWARDS = {"captions": "captions.rouge_l", "grounding": "boxes", "detection": "boxes"}
"""Reward by task, if it is not the metric."""


@dataclass(frozen=True, slots=True)
class StartModel:
    """Model that a new run starts from, and the settings that follow from it.

    Attributes:
        name: Model folder, run, adapter or hub name, as in the recipe.
        is_tiny: Whether it is the bundled model, or trained from it.
        tune: Settings of its adapter, which the run continues; None without an adapter.
        has_image_rule: Whether it was trained with an image rule and a system prompt, which apply
            unless a recipe sets others.
    """

    name: str
    is_tiny: bool = False
    tune: TuneSettings | None = None
    has_image_rule: bool = False


def describe_run(name: str, folder: Path) -> StartModel | None:
    """Return the start from a run or a merged model; None for others.

    Args:
        name: Name of the model in the recipe.
    """
    file = find_run_dir(folder) / MANIFEST_FILE
    if not file.is_file():
        return None
    manifest = load_manifest(file)
    has_adapter = manifest.tune.has_mode("lora") and not (folder / "config.json").is_file()
    return StartModel(
        name,
        is_tiny=manifest.base_model == TINY_MODEL,
        tune=manifest.tune if has_adapter else None,
        has_image_rule=True,
    )


@dataclass(frozen=True)
class DetectedTask:
    """Task of a dataset, detected from its samples.

    Attributes:
        metric: Name of the task metric.
        prompt: Suggested question about every image; None if the samples contain questions.
        max_new_tokens: Upper bound of the answer length in tokens.
        objective: `dpo` if all samples are preference pairs, `sft` if some are, else empty.
        has_images: Whether some samples have an image or a video.
    """

    metric: str
    prompt: str | None
    max_new_tokens: int
    objective: str = ""
    has_images: bool = True


def format_class_prompt(classes: Collection[str]) -> str:
    return build_class_prompt(len(classes)).format(labels=", ".join(sorted(classes)))


def detect_task(
    samples: Sequence[Sample], fields: str = "", metric: str | None = None
) -> DetectedTask:
    """Detect the task of samples from their last answers and questions.

    Args:
        samples: Samples of the dataset.
        fields: Columns of a JSON answer, for the prompt.
        metric: Task chosen by the user, None to detect it.
    """
    contents = [sample.messages[-1].content for sample in samples]
    answers = [join_text(content).strip() for content in contents]
    questions = {join_text(sample.messages[-2].content).strip() for sample in samples}
    metric = metric or detect_metric(contents, questions)
    prompt = PROMPTS.get(metric)
    if metric == "json" and fields:
        prompt = f"Return {fields.replace(',', ', ')} as JSON."
    elif metric == "classification":
        prompt = format_class_prompt(set(answers))
    num_boxes = (sum(isinstance(part, BoxPart) for part in content) for content in contents)
    longest = max(map(len, answers)) + 32 * max(num_boxes)
    max_new_tokens = 1 << max(5, min(10, (longest + 16).bit_length()))
    prompt, is_pair = prompt if questions == {""} else None, [bool(one.rejected) for one in samples]
    is_rated = [bool(one.rejected) or one.label is not None for one in samples]
    objective = ""
    if all(is_pair):
        objective = "dpo"
    elif all(is_rated):
        objective = "kto"
    elif any(is_rated):
        objective = "sft"
    has_images = any(
        part.type in ("image", "video") for sample in samples for part in sample.iter_parts()
    )
    return DetectedTask(metric, prompt, max_new_tokens, objective, has_images)


def detect_metric(
    contents: Sequence[Sequence[ContentPart]], questions: Set[str] = frozenset([""])
) -> str:
    """Detect the task metric from answers and different questions.

    Few imperative questions are paraphrases of one prompt.
    """
    answers = [join_text(one).strip() for one in contents]
    regions = [[part for part in one if isinstance(part, BoxPart)] for one in contents]
    is_point = [part.is_point for row in regions for part in row]
    boxes = [[part.label for part in row] for row in regions]
    num_words = fmean(len(answer.split()) for answer in answers)
    box_counts = list(map(len, boxes))
    num_paraphrases = max(1, min(max(10, len(answers) ** 0.5), len(answers) / 2))
    if fmean(bool(_QUESTION.search(question)) for question in questions) > 0.5:
        num_paraphrases = 1
    if fmean(map(is_object_text, answers)) > 0.5:
        return "json"
    if fmean(map(bool, box_counts)) > 0.5:
        if 2 * sum(is_point) > len(is_point):
            return "pointing"
        has_classes = len(questions) == 1 and len({label for row in boxes for label in row}) > 1
        return "detection" if max(box_counts) > 1 or has_classes else "grounding"
    if fmean(TOOL_CALL_START in answer for answer in answers) > 0.5:
        return "tool_calls"
    if fmean(bool(_LATEX.search(answer)) for answer in answers) > 0.5:
        return "latex"
    is_short = max(map(len, answers)) <= MAX_CLASS_CHARS and max(box_counts) <= 1
    if is_short and is_closed_set(answers):
        # Also answers to several questions, such as yes and no.
        return "classification"
    if len(questions) > num_paraphrases and num_words < MIN_CAPTION_WORDS:
        return "qa"
    return "captions" if num_words >= 4 else "ocr"


def is_closed_set(answers: Sequence[str]) -> bool:
    """Return whether most answers repeat, so that exact match measures their accuracy.

    Sentences must repeat more often than short answers, because captions may have a template.
    """
    counts = Counter(answer.casefold() for answer in answers)
    num_repeated = sum(count for count in counts.values() if count > 1)
    num_numeric = sum(any(map(str.isdigit, answer)) for answer in counts)
    if num_numeric > max(MAX_NUMERIC_CLASSES, MAX_NUMERIC_FRACTION * len(answers)):
        # Readings, not classes.
        return False
    is_short = fmean(len(answer.split()) for answer in answers) < 4
    max_classes = len(answers) / 3 if is_short else len(answers) ** 0.5
    return num_repeated >= 0.8 * len(answers) and len(counts) <= max(2, max_classes)


def choose_duration(num_samples: int, batch_size: int, is_short: bool) -> dict[str, str]:
    """Choose the duration of a LoRA run, as a setting and its value with a comment.

    LoRA fine-tuning usually takes 3 to 5 epochs, and 1 of large datasets. A few dozen samples need
    more epochs, because the adapters start at zero and learn in the first steps.

    Args:
        is_short: Whether the model trains on a CPU.
    """
    epochs = 1
    if num_samples < 1000:
        epochs = 5
    elif num_samples < 3000:
        epochs = 3
    steps = epochs * -(-num_samples // batch_size)
    bounded = min(max(steps, MIN_STEPS), MAX_SHORT_STEPS if is_short else steps + MIN_STEPS)
    if bounded == steps:
        reason = f"{steps} steps; 3 to 5 epochs are usual, 1 for 3,000 samples or more"
        return {"train.epochs": f"{epochs}  # {reason}"}
    num_epochs = f"{bounded * batch_size / num_samples:.1f}".removesuffix(".0")
    reason = f"at least {MIN_STEPS} steps" if bounded > steps else "short for training on a CPU"
    return {"train.steps": f"{bounded}  # {num_epochs} epochs; {reason}"}


def get_learning_rates(task: DetectedTask) -> tuple[str, str]:
    """Return the usual learning rate of a task with LoRA, and that of finesight-tiny."""
    return LEARNING_RATES.get(task.objective, ("1.0e-4", "2.0e-3"))


def format_recipe(
    recipe: Path,
    run: Path,
    start: StartModel,
    author: str,
    task: DetectedTask,
    files: Mapping[Path, str],
    num_samples: int,
    overrides: Sequence[str] = (),
    settings: Mapping[str, str] | None = None,
    num_train_files: int = 1,
) -> str:
    """Format a recipe with the values that fit a task, a model and a number of samples.

    Args:
        start: Model of the run. The settings of its adapter and its image rule are kept.
        author: Command that writes the recipe, for its first comment.
        files: Comments on the training files, followed by those on the validation files.
        overrides: Overrides of a plan, which become further settings.
        settings: Values of `train.steps`, `train.epochs`, `train.batch_size` and
            `train.learning_rate` that the user has chosen. Empty ones keep the values of the task.
    """
    usual, high = get_learning_rates(task)
    learning_rate = usual
    if start.is_tiny:
        learning_rate = f"{high}  # small models need more than the usual {usual}"
    chosen = {key: text.strip() for key, text in (settings or {}).items() if text.strip()}
    learning_rate = _format_yaml(chosen.pop("train.learning_rate", learning_rate))
    batch_size = int(chosen.pop("train.batch_size", 16 if num_samples >= 200 else 8))
    durations = {
        key: _format_yaml(text)
        for key, text in chosen.items()
        if key in ("train.steps", "train.epochs")
    } or choose_duration(num_samples, batch_size, is_short=start.is_tiny)
    given = f"objective: {_format_yaml(task.objective)}"
    train = [OBJECTIVES.get(task.objective, given)] if task.objective else []
    train += [f"{key.removeprefix('train.')}: {text}" for key, text in durations.items()]
    train += [f"batch_size: {batch_size}", f"learning_rate: {learning_rate}"]
    rewards = ""
    if task.objective == "grpo":
        train.append(f"grpo: {{max_completion_length: {task.max_new_tokens}}}")
        reward = REWARDS.get(task.metric, task.metric)
        rewards = f"rewards: [{reward}]  # at most 1 for a response\n"
    lines = [f"{_quote(file)}  # {comment}" for file, comment in files.items()]
    eval_lines = [f"{line}, not used for training" for line in lines[num_train_files:]]
    eval_settings = (
        f"eval: {{metric: {task.metric}, limit: {NUM_EVAL_ROWS},"
        f" max_new_tokens: {task.max_new_tokens}}}\n"
        if task.objective != "kto"
        else "# no eval.metric: answers with `label: false` are not references\n"
    )
    arguments = {"recipe": recipe, "overrides": ["train.learning_rate=5.0e-5"]}
    override = Step("train", arguments, "Override settings on the command line")
    tune_comment = TUNE_COMMENT
    if start.tune is not None:
        tune_comment = f"as the adapter of {_quote(start.name)}"
    text = _RECIPE.format(
        author=author,
        override=_escape_line_breaks(str(override)),
        model=_quote(start.name),
        data=_format_files("train", lines[:num_train_files]) + _format_files("eval", eval_lines),
        image=_format_image(start, task),
        tune_comment=tune_comment,
        tune=_format_tune(start, task),
        train_settings="".join(f"  {line}\n" for line in train) + rewards,
        eval_settings=eval_settings if eval_lines else "",
        run=_quote(run),
    )
    return override_settings(text, overrides)


def _format_image(start: StartModel, task: DetectedTask) -> str:
    """Return the section `image`; empty if the model brings its own image rule."""
    if start.has_image_rule:
        return f"# no image and no data.system_prompt: those of {_quote(start.name)} apply\n"
    if start.is_tiny:
        return ""
    max_pixels = MAX_PIXELS.get(task.metric, DEFAULT_MAX_PIXELS)
    return f"image: {{max_pixels: {max_pixels}}}  # larger images are reduced to this size\n"


def _format_tune(start: StartModel, task: DetectedTask) -> str:
    """Return the settings of the section `tune`, indented."""
    if start.tune is not None:
        settings = start.tune.model_dump(mode="json", exclude_none=True)
        settings = {name: value for name, value in settings.items() if value != {}}
        text = yaml.safe_dump(settings, sort_keys=False, default_flow_style=None, width=100)
        return "".join(f"  {line}\n" for line in text.splitlines())
    if not start.is_tiny:
        return _TUNE_LARGE
    return _TUNE_TINY if task.has_images else _TUNE_TINY_TEXT


def override_settings(text: str, overrides: Sequence[str]) -> str:
    """Return the text of a recipe with other values of settings, without their comments.

    Args:
        overrides: Settings as KEY=VALUE. A missing one becomes the first of its section.
    """
    node: Any
    for key, _, value in (override.partition("=") for override in overrides):
        node, keys, start = yaml.compose(text, yaml.SafeLoader), key.split("."), 0
        while keys and isinstance(node, yaml.MappingNode):
            found = [pair for pair in node.value if pair[0].value == keys[0]]
            if not found:
                break
            start = text.index(":", found[0][0].end_mark.index) + 1
            node, keys = found[0][1], keys[1:]
        stop = node.end_mark.index
        if keys and isinstance(node, yaml.MappingNode):
            first, is_flow = keys.pop(0), bool(node.flow_style)
            value = f"{first}: {_nest(keys, value)}"
            value += ", " if is_flow else f"\n{' ' * node.start_mark.column}"
            start = stop = node.start_mark.index + is_flow
        else:
            # A block value follows its key in the next lines.
            value = f" {_nest(keys, value)}"
            stop = max(start, start + len(text[start:stop].rstrip()))
        text = text[:start] + value + re.sub(r"^[ \t]+#[^\n]*", "", text[stop:])
    return text


def _nest(keys: Sequence[str], value: str) -> str:
    return "".join(f"{{{key}: " for key in keys) + value + "}" * len(keys)


def _format_yaml(text: str) -> str:
    """Return YAML unchanged, and invalid YAML as text, which the recipe's validation reports."""
    try:
        return text if load_yaml(text) is not None else _quote(text)
    except yaml.YAMLError:
        return _quote(text)


def _format_files(key: str, lines: Sequence[str]) -> str:
    """Format the paths of a key with their comments: a single one, or a list."""
    if len(lines) > 1:
        return f"  {key}:\n" + "".join(f"    - {line}\n" for line in lines)
    return "".join(f"  {key}: {line}\n" for line in lines)


def _quote(value: str | Path) -> str:
    """Format a value as a quoted YAML string."""
    return _escape_line_breaks(json.dumps(str(value), ensure_ascii=False))


def _escape_line_breaks(text: str) -> str:
    """Escape all line breaks of YAML, which would end a comment or change a string."""
    return LINE_BREAK.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
