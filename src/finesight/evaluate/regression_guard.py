"""Regression guard: fixed questions by group, answered by a base model and a tuned one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import yaml
from pydantic import Field, TypeAdapter, ValidationError, model_validator

from finesight.bounded_files import ComposedYaml
from finesight.config import CoercedFloat, MetricName, Names, SettingsSection
from finesight.data.sample import (
    BoxPart,
    LocatedSample,
    Message,
    Sample,
    read_samples,
    validate_sample,
)
from finesight.errors import UserError, suggest_name
from finesight.evaluate.eval_case import ReferenceAnswer, get_reference_answer
from finesight.evaluate.metric_difference import (
    MetricDifference,
    align_columns,
    compare_estimators,
    create_case,
)
from finesight.evaluate.task_metrics import check_references, compute_metrics, get_primary_metric
from finesight.recipe import SettingKey, format_key, parse_recipe, read_recipe_text
from finesight.storage import write_file

if TYPE_CHECKING:
    from finesight.infer.prediction import Prediction

MAX_EXAMPLES = 5
"""Maximum number of questions in a result that the tuned model answers worse."""


class GuardQuestion(SettingsSection):
    """A question of a suite. Each text of `answer` is correct."""

    prompt: str
    answer: Names[str]
    image: Names[str] = ()


class GuardGroup(SettingsSection):
    """A group of questions with one metric: inline, or in a file of samples.

    The group fails if the primary metric is below `min_score`, or if the interval of its difference
    from the base model is below -`allowed_drop`.
    """

    metric: MetricName
    data: str | None = None
    questions: list[GuardQuestion] = Field(default_factory=list)
    max_new_tokens: Annotated[int, Field(gt=0, le=1_048_576)] = 128
    allowed_drop: Annotated[CoercedFloat, Field(ge=0.0)] = 0.0
    min_score: CoercedFloat | None = None

    @model_validator(mode="after")
    def _check_questions(self) -> GuardGroup:
        if (self.data is None) == (not self.questions):
            raise ValueError("either `data`, a file of samples, or `questions`")
        return self


class GuardSuite(SettingsSection):
    """Content of a suite file."""

    groups: Annotated[dict[str, GuardGroup], Field(min_length=1)]


_SECTIONS: Mapping[int, type[SettingsSection]] = {1: GuardSuite, 3: GuardGroup, 5: GuardQuestion}
"""Section of the settings by the length of their keys."""


@dataclass(frozen=True, slots=True)
class LoadedGroup:
    """A group of a suite with its samples and their references."""

    name: str
    settings: GuardGroup
    samples: list[LocatedSample]
    references: list[ReferenceAnswer]

    @property
    def max_new_tokens(self) -> int:
        return self.settings.max_new_tokens


def load_suite(path: Path) -> list[LoadedGroup]:
    """Load a suite and the samples of its groups; paths are relative to the suite.

    Raises:
        UserError: A setting or sample is invalid. The message contains file and line.
    """
    content, lines = parse_recipe(read_recipe_text(path), path)

    def locate(key: SettingKey) -> str:
        known = (key[:n] for n in range(len(key), 0, -1))
        line = next((lines[one] for one in known if one in lines), None)
        return f"{path}:{line}" if line else str(path)

    try:
        suite = GuardSuite.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key, remedy = tuple(first["loc"]), "correct the suite"
        expected = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            names = _SECTIONS[len(key)].model_fields
            expected = f"one of {', '.join(names)}"
            remedy = suggest_name(str(key[-1]), names, "remove it")
        what = f"{format_key(key) or 'the suite'} is {first['input']!r:.80}"
        if first["type"] == "missing":
            what = f"{format_key(key)} is missing"
        raise UserError(what, where=locate(key), expected=expected, remedy=remedy) from error
    groups = []
    for name, settings in suite.groups.items():
        samples = _read_samples(name, settings, path.parent, locate)
        references = [get_reference_answer(one.sample, has_reasoning=True) for one in samples]
        try:
            check_references(settings.metric, references)
        except UserError as error:
            error.where = f"{locate(('groups', name))}: {error.where}"
            raise
        groups.append(LoadedGroup(name, settings, samples, references))
    return groups


def _read_samples(
    name: str, settings: GuardGroup, folder: Path, locate: Any
) -> list[LocatedSample]:
    if settings.data is not None:
        file = folder / settings.data
        return [LocatedSample(one, file.parent) for one in read_samples(file)]
    from finesight.infer.prediction import build_user_message

    samples = []
    for index, question in enumerate(settings.questions):
        asked = build_user_message(question.prompt, [*map(Path, question.image)])
        answer = Message.model_validate({"role": "assistant", "content": question.answer[0]})
        references = question.answer[1:]
        sample = Sample(id=f"{name}-{index}", messages=(asked, answer), references=references)
        validate_sample(sample, locate(("groups", name, "questions", index)))
        samples.append(LocatedSample(sample, folder))
    return samples


@dataclass(frozen=True, slots=True)
class GroupResult:
    """Primary metric of a group before and after training, and the bounds of the suite.

    Attributes:
        lost_answers: Questions that the tuned model answers worse: their id, prompt and reference,
            and the answers before and after.
    """

    group: str
    metric: str
    num_samples: int
    difference: MetricDifference
    allowed_drop: float
    min_score: float | None
    lost_answers: list[dict[str, str]]

    @property
    def has_dropped(self) -> bool:
        """Whether the metric is lower by more than `allowed_drop`, beyond chance."""
        high = self.difference.high
        is_clear = high is not None and self.difference.verdict == "worse"
        return is_clear and high is not None and high < -self.allowed_drop

    @property
    def is_below_minimum(self) -> bool:
        """Whether the tuned model scores below `min_score`."""
        return self.min_score is not None and self.difference.after < self.min_score

    @property
    def has_failed(self) -> bool:
        return self.has_dropped or self.is_below_minimum

    def as_json(self) -> dict[str, Any]:
        """Return the result as JSON data for `guard.json`."""
        return asdict(self) | {"has_failed": self.has_failed}


GROUP_RESULTS: TypeAdapter[list[GroupResult]] = TypeAdapter(list[GroupResult])


def compare_answers(
    group: LoadedGroup, before: Sequence[Prediction], after: Sequence[Prediction]
) -> GroupResult:
    """Compare the answers of the base model and the tuned model to the questions of a group."""
    cases = [
        [create_case(one, two) for one, two in zip(answers, group.references, strict=True)]
        for answers in (before, after)
    ]
    metric = group.settings.metric
    old, new = (compute_metrics(metric, one) for one in cases)
    primary = get_primary_metric(metric, old.scores)
    differences = compare_estimators(old.estimators, new.estimators)
    # The first score of a sample follows the primary metric.
    drops = [
        (next(iter(a.values())) - next(iter(b.values())), index)
        for index, (a, b) in enumerate(zip(old.per_sample, new.per_sample, strict=True))
    ]
    lost = [index for drop, index in sorted(drops, key=lambda one: -one[0]) if drop > 0]
    return GroupResult(
        group.name,
        metric,
        len(group.samples),
        next(one for one in differences if one.name == primary),
        group.settings.allowed_drop,
        group.settings.min_score,
        [
            {
                "id": before[index].id,
                "prompt": before[index].prompt,
                "reference": _format_reference(*group.references[index]),
                "before": before[index].text,
                "after": after[index].text,
            }
            for index in lost[:MAX_EXAMPLES]
        ],
    )


def _format_reference(texts: Sequence[str], boxes: Sequence[BoxPart]) -> str:
    shown = (f"{box.label or ''} {[*map(round, box.xyxy)]}".strip() for box in boxes)
    return " ".join([*texts[:1], *shown]).strip()


def format_results(results: Sequence[GroupResult]) -> list[str]:
    """Format the results as a table, followed by the answers that failed groups have lost."""
    rows = [("group", "metric", "before", "after", "difference", "95 % interval", "")]
    for one in results:
        difference = one.difference
        low, high = difference.low, difference.high
        interval = "-" if low is None or high is None else f"{low:+.4f} to {high:+.4f}"
        verdicts = ["dropped"] if one.has_dropped else []
        verdicts += [f"below min_score {one.min_score:g}"] if one.is_below_minimum else []
        before, after = difference.before, difference.after
        scores = f"{before:.4f}", f"{after:.4f}", f"{after - before:+.4f}"
        verdict = f"FAILED: {', '.join(verdicts)}" if verdicts else difference.verdict
        if not before and not verdicts:
            verdict = f"{verdict}; the base model scores 0"
        rows.append((one.group, difference.name, *scores, interval, verdict))
    lines = align_columns(rows, 2).splitlines()
    for one in results:
        for lost in one.lost_answers if one.has_failed else ():
            texts = [f"{key} {lost[key]!r:.60}" for key in ("reference", "before", "after")]
            lines.append(f"{lost['id']}: {', '.join(texts)}")
    return lines


def update_suite(path: Path, results: Sequence[GroupResult]) -> list[GroupResult]:
    """Set the `min_score` of each group to its current score minus `allowed_drop`, in place.

    Returns:
        The results with the new bounds.
    """
    text = read_recipe_text(path)
    root = ComposedYaml(text).root
    assert root is not None, f"{path} was loaded"
    groups = _read_mapping(_read_mapping(root)["groups"][1])
    edits: dict[tuple[int, int], str] = {}
    updated = []
    for one in results:
        score = max(0.0, math.floor(1e4 * (one.difference.after - one.allowed_drop)) / 1e4)
        updated.append(replace(one, min_score=score))
        group = groups[one.group][1]
        entries = _read_mapping(group)
        if "min_score" in entries:
            value = entries["min_score"][1]
            edits[value.start_mark.index, value.end_mark.index] = f"{score:g}"
        else:
            mark = next(iter(entries.values()))[0].start_mark
            is_inline = isinstance(group, yaml.MappingNode) and group.flow_style
            end = ", " if is_inline else f"\n{' ' * mark.column}"
            edits[mark.index, mark.index] = f"min_score: {score:g}{end}"
    for (start, stop), replacement in sorted(edits.items(), reverse=True):
        text = text[:start] + replacement + text[stop:]
    write_file(path, text.encode())
    return updated


def _read_mapping(node: yaml.Node) -> Mapping[str, tuple[yaml.Node, yaml.Node]]:
    """Return the key and value nodes of a mapping by name."""
    return {name.value: (name, value) for name, value in node.value}
