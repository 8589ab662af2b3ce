"""Detect the task of samples: metric, question and objective of a recipe."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence
from statistics import fmean

from finesight.data.formats.image_annotations import build_class_prompt
from finesight.data.import_source import DetectedTask
from finesight.data.row_reader import is_object_text
from finesight.data.sample import TOOL_CALL_START, BoxPart, Sample, join_text

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
    answers = [join_text(sample.messages[-1].content).strip() for sample in samples]
    questions = {join_text(sample.messages[-2].content).strip() for sample in samples}
    regions = [
        [part for part in sample.messages[-1].content if isinstance(part, BoxPart)]
        for sample in samples
    ]
    boxes = [[part.label for part in row] for row in regions]
    if metric is None:
        metric = _detect_metric(answers, questions, boxes)
        is_point = [part.is_point for row in regions for part in row]
        metric = "pointing" if metric in ("grounding", "detection") and all(is_point) else metric
    prompt = PROMPTS.get(metric)
    if metric == "json" and fields:
        prompt = f"Return {fields.replace(',', ', ')} as JSON."
    elif metric == "classification":
        prompt = format_class_prompt(set(answers))
    longest = max(map(len, answers)) + 32 * max(map(len, boxes))
    max_new_tokens = 1 << max(5, min(10, (longest + 16).bit_length()))
    prompt, is_pair = prompt if questions == {""} else None, [bool(one.rejected) for one in samples]
    is_rated = [bool(one.rejected) or one.label is not None for one in samples]
    objective = "kto" if all(is_rated) else "sft" if any(is_rated) else ""
    return DetectedTask(metric, prompt, max_new_tokens, "dpo" if all(is_pair) else objective)


def _detect_metric(answers: list[str], questions: set[str], boxes: list[list[str | None]]) -> str:
    """Detect the task metric from answers, different questions, and labels of boxes.

    Few imperative questions are paraphrases of one prompt.
    """
    num_words = fmean(len(answer.split()) for answer in answers)
    box_counts = list(map(len, boxes))
    num_paraphrases = max(1, min(max(10, len(answers) ** 0.5), len(answers) / 2))
    if fmean(bool(_QUESTION.search(question)) for question in questions) > 0.5:
        num_paraphrases = 1
    if fmean(map(bool, box_counts)) > 0.5:
        has_classes = len(questions) == 1 and len({label for row in boxes for label in row}) > 1
        return "detection" if max(box_counts) > 1 or has_classes else "grounding"
    if fmean(TOOL_CALL_START in answer for answer in answers) > 0.5:
        return "tool_calls"
    if fmean(map(is_object_text, answers)) > 0.8:
        return "json"
    if fmean(bool(_LATEX.search(answer)) for answer in answers) > 0.5:
        return "latex"
    is_short = max(map(len, answers)) <= MAX_CLASS_CHARS and max(box_counts) <= 1
    if is_short and _is_closed_set(answers):
        # Also answers to several questions, such as yes and no.
        return "classification"
    if len(questions) > num_paraphrases and num_words < MIN_CAPTION_WORDS:
        return "qa"
    return "captions" if num_words >= 4 else "ocr"


def _is_closed_set(answers: Sequence[str]) -> bool:
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
