"""Task of a dataset, and a recipe with comments for it."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

import yaml

from finesight.errors import Step
from finesight.files.bounded_files import load_yaml
from finesight.metric_components import METRICS, get_metric
from finesight.model_folder import TINY_MODEL
from finesight.objective_components import OBJECTIVES, FirstRecipe
from finesight.reward_components import REWARDS
from finesight.samples.default_prompts import build_class_prompt, escape_placeholders
from finesight.samples.sample import BoxPart, ContentPart, Sample, join_text
from finesight.settings.config import TuneSettings
from finesight.settings.manifest import MANIFEST_FILE, find_run_dir, load_manifest

T = TypeVar("T")

MAX_NUMERIC_CLASSES = 10
"""Maximum number of classes with digits; more are readings."""

MAX_NUMERIC_FRACTION = 0.1
"""Maximum number of classes with digits as a fraction of the answers, if that is more."""

NUM_EVAL_ROWS = 200
"""Target number of validation samples."""

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


MIN_STEPS = 100
"""Minimum steps of a run."""

MAX_SHORT_STEPS = 200
"""Maximum steps of a run that trains on a CPU."""


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
        objective: Objective that rejected answers and labels suggest; empty without these.
        has_images: Whether some samples have an image or a video.
    """

    metric: str
    prompt: str | None
    max_new_tokens: int
    objective: str = ""
    has_images: bool = True


def format_class_prompt(classes: Collection[str]) -> str:
    """Return the question about the class of an image, as a prompt of an import."""
    names = escape_placeholders(", ".join(sorted(classes)))
    return build_class_prompt(len(classes)).format(labels=names)


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
    answers = list(map(_get_text, contents))
    questions = {_get_text(sample.messages[-2].content) for sample in samples}
    metric = metric or detect_metric(contents, questions)
    prompt = _format_prompt(metric, answers, fields)
    if questions != {""}:
        prompt = None
    longest = max(map(len, answers)) + 32 * max(map(_count_boxes, contents))
    max_new_tokens = 1 << max(5, min(10, (longest + 16).bit_length()))
    objective = _detect_objective(samples)
    has_images = any(map(_has_images, samples))
    return DetectedTask(metric, prompt, max_new_tokens, objective, has_images)


def _get_text(content: Sequence[ContentPart]) -> str:
    return join_text(content).strip()


def _get_boxes(content: Sequence[ContentPart]) -> list[BoxPart]:
    return [part for part in content if isinstance(part, BoxPart)]


def _count_boxes(content: Sequence[ContentPart]) -> int:
    return len(_get_boxes(content))


def _has_images(sample: Sample) -> bool:
    """Return whether a sample has an image or a video."""
    return any(part.type in ("image", "video") for part in sample.iter_parts())


def _detect_objective(samples: Sequence[Sample]) -> str:
    """Detect the objective from rejected answers and labels; empty without them."""
    num_pairs = 0
    num_rated = 0
    for sample in samples:
        if sample.rejected:
            num_pairs += 1
        if sample.rejected or sample.label is not None:
            num_rated += 1
    if num_pairs == len(samples):
        return _get_suggested("pairs")
    if num_rated == len(samples):
        return _get_suggested("rated")
    if num_rated > 0:
        return _get_suggested("partly rated")
    return ""


def _get_suggested(data: str) -> str:
    """Return the objective that data suggest (`FirstRecipe.detected_for`); empty for none."""
    for component in OBJECTIVES.list_available():
        if component.first_recipe.detected_for == data:
            return component.name
    return ""


def get_first_recipe(objective: str) -> FirstRecipe:
    """Return the lines of a new recipe with an objective, which may be empty or unknown."""
    if objective not in OBJECTIVES:
        return FirstRecipe()
    return OBJECTIVES[objective].first_recipe


@dataclass(frozen=True)
class AnswerSummary:
    """Answers of samples, by which a metric detects its task.

    Attributes:
        answers: Text of each answer.
        boxes: Boxes and points of each answer.
        questions: Different questions.
    """

    answers: Sequence[str]
    boxes: Sequence[Sequence[BoxPart]]
    questions: Set[str]

    def has_mostly(self, test: Callable[[str], object]) -> bool:
        """Return whether a test is true for more than half of the answers."""
        return _applies_to_most(test, self.answers)

    def asks_mostly(self, test: Callable[[str], object]) -> bool:
        """Return whether a test is true for more than half of the different questions."""
        return _applies_to_most(test, self.questions)

    @property
    def mean_words(self) -> float:
        """Mean number of words of an answer."""
        return fmean(map(_count_words, self.answers))

    @property
    def has_boxes(self) -> bool:
        """Whether more than half of the answers have boxes or points."""
        return _applies_to_most(bool, self.boxes)

    @property
    def max_boxes(self) -> int:
        """Largest number of boxes and points of an answer."""
        return max(map(len, self.boxes))

    @property
    def num_boxes(self) -> int:
        """Number of boxes and points of all answers."""
        return sum(map(len, self.boxes))

    @property
    def num_points(self) -> int:
        """Number of points of all answers."""
        return sum(box.is_point for boxes in self.boxes for box in boxes)

    @property
    def labels(self) -> set[str | None]:
        """Different labels of boxes and points."""
        return {box.label for boxes in self.boxes for box in boxes}


def detect_metric(
    contents: Sequence[Sequence[ContentPart]], questions: Set[str] = frozenset([""])
) -> str:
    """Detect the task metric from answers and different questions."""
    answers = [_get_text(content) for content in contents]
    boxes = [_get_boxes(content) for content in contents]
    summary = AnswerSummary(answers, boxes, questions)
    built_in = METRICS.list_built_in()
    ordered = sorted(built_in, key=lambda one: one.suggestion.detect_position)
    for component in ordered:
        if component.suggestion.detect(summary):
            return component.name
    return ordered[-1].name


def _format_prompt(metric: str, answers: Sequence[str], fields: str) -> str | None:
    """Return the suggested question about every image; None for none.

    Args:
        fields: Columns of the answers, separated by commas; empty if they are unknown.
    """
    suggestion = get_metric(metric).suggestion
    if suggestion.lists_classes:
        return format_class_prompt(set(answers))
    if suggestion.fields_prompt and fields:
        return suggestion.fields_prompt.replace("{fields}", fields.replace(",", ", "))
    return suggestion.prompt or None


def _applies_to_most(test: Callable[[T], object], items: Iterable[T]) -> bool:
    """Return whether a test is true for more than half of the items."""
    return fmean(bool(test(item)) for item in items) > 0.5


def _count_words(text: str) -> int:
    return len(text.split())


def is_closed_set(answers: Sequence[str]) -> bool:
    """Return whether most answers repeat, so that exact match measures their accuracy.

    Sentences must repeat more often than short answers, because captions may have a template.
    """
    counts = Counter(map(str.casefold, answers))
    num_repeated = 0
    num_numeric = 0
    for answer, count in counts.items():
        if count > 1:
            num_repeated += count
        if any(map(str.isdigit, answer)):
            num_numeric += 1
    if num_numeric > max(MAX_NUMERIC_CLASSES, MAX_NUMERIC_FRACTION * len(answers)):
        # Readings, not classes.
        return False
    is_short = fmean(map(_count_words, answers)) < 4
    max_classes = len(answers) / 3 if is_short else len(answers) ** 0.5
    return num_repeated >= 0.8 * len(answers) and len(counts) <= max(2, max_classes)


def choose_batch_size(num_samples: int) -> int:
    """Return the number of samples of a step: fewer of small datasets, which have few steps."""
    return 16 if num_samples >= 200 else 8


def choose_duration(num_samples: int, batch_size: int, is_short: bool) -> dict[str, str]:
    """Choose the duration of a LoRA run: a setting, and its value with a comment.

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
    bounded = max(steps, MIN_STEPS)
    if is_short:
        bounded = min(bounded, MAX_SHORT_STEPS)
    if bounded == steps:
        reason = f"{steps} steps; 3 to 5 epochs are usual, 1 for 3,000 samples or more"
        return {"train.epochs": f"{epochs}  # {reason}"}
    num_epochs = f"{bounded * batch_size / num_samples:.1f}".removesuffix(".0")
    reason = "short for training on a CPU"
    if bounded > steps:
        reason = f"at least {MIN_STEPS} steps"
    return {"train.steps": f"{bounded}  # {num_epochs} epochs; {reason}"}


def get_learning_rates(task: DetectedTask) -> tuple[str, str]:
    """Return the usual learning rate of a task with LoRA, and that of finesight-tiny."""
    first_recipe = get_first_recipe(task.objective)
    return first_recipe.learning_rate, first_recipe.tiny_learning_rate


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
    """Format a recipe for a task, a model and a number of samples.

    Args:
        start: Model of the run. The settings of its adapter and its image rule are kept.
        author: Command that writes the recipe, for its first comment.
        files: Comments on the training files, followed by those on the validation files.
        overrides: Overrides of a plan, which become further settings.
        settings: Values of `train.steps`, `train.epochs`, `train.batch_size` and
            `train.learning_rate` that the user has chosen. Empty ones keep the values of the task.
    """
    train_settings = _format_train(start, task, num_samples, settings or {})
    if get_first_recipe(task.objective).has_rewards:
        suggestion = get_metric(task.metric).suggestion
        reward = suggestion.reward or REWARDS.suggest_for_metric(task.metric)
        train_settings += f"rewards: [{reward}]  # at most 1 for a response\n"
    train_lines: list[str] = []
    eval_lines: list[str] = []
    for file, comment in files.items():
        line = f"{_quote(file)}  # {comment}"
        if len(train_lines) < num_train_files:
            train_lines.append(line)
        else:
            eval_lines.append(f"{line}, not used for training")
    eval_settings = ""
    if eval_lines:
        eval_settings = _format_eval(task)
    arguments = {"recipe": recipe, "overrides": ["train.learning_rate=5.0e-5"]}
    override = Step("train", arguments, "Override settings on the command line")
    tune_comment = TUNE_COMMENT
    if start.tune is not None:
        tune_comment = f"as the adapter of {_quote(start.name)}"
    text = _RECIPE.format(
        author=author,
        override=_escape_line_breaks(str(override)),
        model=_quote(start.name),
        data=_format_files("train", train_lines) + _format_files("eval", eval_lines),
        image=_format_image(start, task),
        tune_comment=tune_comment,
        tune=_format_tune(start, task),
        train_settings=train_settings,
        eval_settings=eval_settings,
        run=_quote(run),
    )
    return override_settings(text, overrides)


def _format_train(
    start: StartModel, task: DetectedTask, num_samples: int, settings: Mapping[str, str]
) -> str:
    """Return the settings of the section `train`, indented.

    Args:
        settings: See `format_recipe`.
    """
    usual, high = get_learning_rates(task)
    learning_rate = usual
    if start.is_tiny:
        learning_rate = f"{high}  # small models need more than the usual {usual}"
    batch_size = choose_batch_size(num_samples)
    durations: dict[str, str] = {}
    for key, value in settings.items():
        text = value.strip()
        if not text:
            continue
        if key == "train.learning_rate":
            learning_rate = text
        elif key == "train.batch_size":
            batch_size = int(text)
        elif key in ("train.steps", "train.epochs"):
            durations[key] = _format_yaml(text)
    if not durations:
        durations = choose_duration(num_samples, batch_size, is_short=start.is_tiny)

    lines = []
    first_recipe = get_first_recipe(task.objective)
    if task.objective:
        line = f"objective: {_format_yaml(task.objective)}"
        if first_recipe.comment:
            line += f"  # {first_recipe.comment}"
        lines.append(line)
    for key, text in durations.items():
        name = key.removeprefix("train.")
        lines.append(f"{name}: {text}")
    lines.append(f"batch_size: {batch_size}")
    lines.append(f"learning_rate: {_format_yaml(learning_rate)}")
    if first_recipe.has_rewards:
        lines.append(f"{task.objective}: {{max_completion_length: {task.max_new_tokens}}}")
    return _indent(lines)


def _format_eval(task: DetectedTask) -> str:
    """Return the section `eval`, or the reason why there is none."""
    if not get_first_recipe(task.objective).has_eval:
        return "# no eval.metric: answers with `label: false` are not references\n"
    settings = f"metric: {task.metric}, limit: {NUM_EVAL_ROWS}"
    return f"eval: {{{settings}, max_new_tokens: {task.max_new_tokens}}}\n"


def _format_image(start: StartModel, task: DetectedTask) -> str:
    """Return the section `image`; empty if the model brings its own image rule."""
    if start.has_image_rule:
        return f"# no image and no data.system_prompt: those of {_quote(start.name)} apply\n"
    if start.is_tiny:
        return ""
    max_pixels = get_metric(task.metric).suggestion.max_pixels
    return f"image: {{max_pixels: {max_pixels}}}  # larger images are reduced to this size\n"


def _format_tune(start: StartModel, task: DetectedTask) -> str:
    """Return the settings of the section `tune`, indented."""
    if start.tune is not None:
        settings = start.tune.model_dump(mode="json", exclude_none=True)
        settings = {name: value for name, value in settings.items() if value != {}}
        text = yaml.safe_dump(settings, sort_keys=False, default_flow_style=None, width=100)
        return _indent(text.splitlines())
    if not start.is_tiny:
        return _TUNE_LARGE
    return _TUNE_TINY if task.has_images else _TUNE_TINY_TEXT


def _indent(lines: Sequence[str]) -> str:
    return "".join(f"  {line}\n" for line in lines)


def override_settings(text: str, overrides: Sequence[str]) -> str:
    """Return the text of a recipe with other values of settings, without their comments.

    Args:
        overrides: Settings as KEY=VALUE. A missing one becomes the first of its section.
    """
    for override in overrides:
        key, _, value = override.partition("=")
        text = _override_setting(text, key.split("."), value)
    return text


def _override_setting(text: str, keys: Sequence[str], value: str) -> str:
    """Return the text of a recipe with another value of one setting."""
    node: Any = yaml.compose(text, yaml.SafeLoader)
    start = 0
    while keys and isinstance(node, yaml.MappingNode):
        pair = next((pair for pair in node.value if pair[0].value == keys[0]), None)
        if pair is None:
            break
        name, node = pair
        start = text.index(":", name.end_mark.index) + 1
        keys = keys[1:]
    if keys and isinstance(node, yaml.MappingNode):
        # The missing setting becomes the first one, whose indentation is that of the section.
        is_flow = bool(node.flow_style)
        separator = ", " if is_flow else f"\n{' ' * node.start_mark.column}"
        new_text = f"{keys[0]}: {_nest(keys[1:], value)}{separator}"
        start = node.start_mark.index + is_flow
        stop = start
    else:
        # A block value follows its key in the next lines.
        new_text = f" {_nest(keys, value)}"
        old_text = text[start : node.end_mark.index]
        stop = start + len(old_text.rstrip())
    return text[:start] + new_text + re.sub(r"^[ \t]+#[^\n]*", "", text[stop:])


def _nest(keys: Sequence[str], value: str) -> str:
    """Return a value inside groups with one key each."""
    for key in reversed(keys):
        value = f"{{{key}: {value}}}"
    return value


def _format_yaml(text: str) -> str:
    """Return YAML unchanged, and invalid YAML as text, which the recipe's validation reports."""
    try:
        is_empty = load_yaml(text) is None
    except yaml.YAMLError:
        return _quote(text)
    return _quote(text) if is_empty else text


def _format_files(key: str, lines: Sequence[str]) -> str:
    """Format the paths of a key with their comments: a single one, or a list."""
    if not lines:
        return ""
    if len(lines) == 1:
        return f"  {key}: {lines[0]}\n"
    items = "".join(f"    - {line}\n" for line in lines)
    return f"  {key}:\n{items}"


def _quote(value: str | Path) -> str:
    """Format a value as a quoted YAML string."""
    return _escape_line_breaks(json.dumps(str(value), ensure_ascii=False))


def _escape_line_breaks(text: str) -> str:
    """Escape all line breaks of YAML, which would end a comment or change a string."""
    return LINE_BREAK.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
