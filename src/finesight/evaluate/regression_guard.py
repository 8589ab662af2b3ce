"""Regression guard: fixed questions by group, answered by a base model and a tuned one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import yaml
from pydantic import Field, TypeAdapter, ValidationError, model_validator

from finesight.errors import UserError, suggest_name
from finesight.evaluate.bootstrap import compute_difference_intervals
from finesight.evaluate.eval_case import MetricResult, ReferenceAnswer, get_reference_answer
from finesight.evaluate.metric_difference import MetricDifference, compare_family
from finesight.evaluate.prediction_file import create_case
from finesight.evaluate.task_metrics import check_references, compute_metrics, get_primary_metric
from finesight.evaluate.verdict import FAMILY_ERROR, Estimators
from finesight.files.bounded_files import ComposedYaml
from finesight.files.storage import write_file
from finesight.samples.sample import (
    LocatedSample,
    Message,
    Sample,
    list_media_paths,
    read_samples,
    validate_sample,
)
from finesight.settings.config import MetricName
from finesight.settings.recipe import SettingKey, format_key, parse_recipe, read_recipe_text
from finesight.settings.setting_types import CoercedFloat, Names, SettingsSection

if TYPE_CHECKING:
    from finesight.infer.prediction import Prediction

BUILT_IN_SUITE = Path(__file__).resolve().parents[1] / "assets" / "guard" / "suite.yaml"
"""Suite of `tools/guard_suite.py`: reading, counting, boxes and chat."""

MAX_LOST_ANSWERS = 5
"""Maximum number of lost answers in a result."""

DROPPED = "dropped by more than allowed_drop, beyond chance"
BELOW_MINIMUM = "below min_score"


class GuardQuestion(SettingsSection):
    """A question of a suite. Each text of `answer` is correct."""

    prompt: str
    answer: Names[str]
    image: Names[str] = ()


class GuardGroup(SettingsSection):
    """A group of questions with one metric: inline, or in a file of samples.

    The group fails if the primary metric is below `min_score`, or if it is lower than that of the
    base model by clearly more than `allowed_drop`.
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
            raise ValueError(f"{len(self.questions)} questions, data {self.data}: give either")
        return self


class GuardSuite(SettingsSection):
    """Content of a suite file."""

    groups: Annotated[dict[str, GuardGroup], Field(min_length=1)]


class LoadedGroup(NamedTuple):
    """A group of a suite with its samples."""

    name: str
    settings: GuardGroup
    samples: list[LocatedSample]

    def list_references(self) -> list[ReferenceAnswer]:
        """Return the references of the samples."""
        return [get_reference_answer(one.sample, has_reasoning=True) for one in self.samples]


def load_suite(path: Path) -> list[LoadedGroup]:
    """Load a suite and the samples of its groups; paths are relative to the suite.

    Raises:
        UserError: A setting or sample is invalid. The message contains file and line.
    """
    content, lines = parse_recipe(read_recipe_text(path), path)

    def locate(*key: str | int) -> str:
        # A key without a line is reported at the section that contains it.
        for length in range(len(key), 0, -1):
            if key[:length] in lines:
                return f"{path}:{lines[key[:length]]}"
        return str(path)

    try:
        suite = GuardSuite.model_validate(content)
    except ValidationError as error:
        raise _build_suite_error(error, locate) from error
    groups = []
    for name, settings in suite.groups.items():
        samples = _read_samples(name, settings, path.parent, locate)
        groups.append(LoadedGroup(name, settings, samples))
        try:
            check_references(settings.metric, groups[-1].list_references())
        except UserError as error:
            error.where = f"{locate('groups', name)}: {error.where}"
            raise
    return groups


def _build_suite_error(error: ValidationError, locate: Callable[..., str]) -> UserError:
    """Create the UserError for the first invalid setting of a suite."""
    first = error.errors(include_url=False)[0]
    key: SettingKey = first["loc"]
    problem = f"{first['input']!r:.80}"
    expected = first["msg"].removeprefix("Input should be ")
    remedy = "correct the suite"
    if first["type"] == "extra_forbidden":
        section = {1: GuardSuite, 3: GuardGroup, 5: GuardQuestion}[len(key)]
        names: list[str] = [*section.__annotations__]
        problem = "unknown key"
        expected = f"one of {', '.join(names)}"
        remedy = suggest_name(str(key[-1]), names, "remove it")
    return UserError(
        f"{format_key(key) or 'suite'}: {problem}",
        where=locate(*key),
        expected=expected,
        remedy=remedy,
    )


def check_images(groups: Sequence[LoadedGroup]) -> None:
    """Decode all images of a suite. Raises CorruptImageError for an unreadable one.

    Both models must answer the same questions, and generation takes long.
    """
    from finesight.vision.image_reader import decode_pixels  # slow to import

    for group in groups:
        for located in group.samples:
            for part in located.sample.iter_parts():
                for name in list_media_paths(part):
                    decode_pixels(None, located.resolve_path(name))


def _read_samples(
    name: str, settings: GuardGroup, folder: Path, locate: Callable[..., str]
) -> list[LocatedSample]:
    from finesight.samples.prompt_format import DEFAULT_PROMPT_FORMAT

    if settings.data is not None:
        file = folder / settings.data
        return [LocatedSample(one, file.parent) for one in read_samples(file)]
    samples = []
    for index, question in enumerate(settings.questions):
        asked = DEFAULT_PROMPT_FORMAT.build_message(question.prompt, [*map(Path, question.image)])
        answer = Message.model_validate({"role": "assistant", "content": question.answer[0]})
        references = question.answer[1:]
        sample = Sample(id=f"{name}-{index}", messages=(asked, answer), references=references)
        validate_sample(sample, locate("groups", name, "questions", index))
        samples.append(LocatedSample(sample, folder))
    return samples


@dataclass(frozen=True, slots=True)
class GroupResult:
    """Primary metric of a group before and after training.

    Attributes:
        problems: Reasons why the group fails; empty if it passes.
        lost_answers: Questions that the tuned model answers worse: their id, prompt and reference,
            and the answers before and after.
    """

    group: str
    num_samples: int
    difference: MetricDifference
    problems: list[str]
    lost_answers: list[dict[str, str]]


GROUP_RESULTS: TypeAdapter[list[GroupResult]] = TypeAdapter(list[GroupResult])


def compare_answers(
    groups: Sequence[LoadedGroup],
    before: Sequence[Sequence[Prediction]],
    after: Sequence[Sequence[Prediction]],
) -> list[GroupResult]:
    """Compare the base and tuned model's answers to each group of questions.

    The groups are one family: a model that has not changed fails any of them by chance with a
    probability of at most 5 %.
    """
    pairs: list[tuple[Estimators, Estimators]] = []
    lost_answers = []
    for group, old_answers, new_answers in zip(groups, before, after, strict=True):
        references = group.list_references()
        old = _score(group, old_answers, references)
        new = _score(group, new_answers, references)
        primary = get_primary_metric(group.settings.metric, old.scores)
        pairs.append(({primary: old.estimators[primary]}, {primary: new.estimators[primary]}))
        indices = _find_lost_samples(old, new)[:MAX_LOST_ANSWERS]
        lost_answers.append(_list_lost_answers(indices, references, old_answers, new_answers))
    results = []
    for group, pair, (found,), lost in zip(
        groups, pairs, compare_family(pairs), lost_answers, strict=True
    ):
        if not found.before:
            found = replace(found, note=found.note or "the base model scores 0")
        problems = []
        if found.verdict == "worse" and _exceeds_drop(*pair, group.settings, len(groups)):
            problems.append(DROPPED)
        minimum = group.settings.min_score
        if minimum is not None and found.after < minimum:
            problems.append(BELOW_MINIMUM)
        results.append(GroupResult(group.name, len(group.samples), found, problems, lost))
    return results


def _score(
    group: LoadedGroup, answers: Sequence[Prediction], references: Sequence[ReferenceAnswer]
) -> MetricResult:
    cases = [*map(create_case, answers, references)]
    return compute_metrics(group.settings.metric, cases)


def _exceeds_drop(
    before: Estimators, after: Estimators, settings: GuardGroup, num_groups: int
) -> bool:
    """Return whether the drop of a group is clearly larger than `allowed_drop`.

    The verdict answers this without an allowed drop. Otherwise, the interval has to lie below it at
    the level of Bonferroni's rule, because the order of Holm's rule is that of drops from 0.
    """
    if not settings.allowed_drop:
        return True
    level = 1 - FAMILY_ERROR / num_groups
    (interval,) = compute_difference_intervals(before, after, level).values()
    return interval is not None and interval.high < -settings.allowed_drop


def _list_lost_answers(
    indices: Sequence[int],
    references: Sequence[ReferenceAnswer],
    before: Sequence[Prediction],
    after: Sequence[Prediction],
) -> list[dict[str, str]]:
    lost_answers = []
    for index in indices:
        lost_answers.append(
            {
                "id": before[index].id,
                "prompt": before[index].prompt,
                "reference": _format_reference(references[index]),
                "before": before[index].answer,
                "after": after[index].answer,
            }
        )
    return lost_answers


def _find_lost_samples(before: MetricResult, after: MetricResult) -> list[int]:
    """Return the indices of samples that score lower after, the largest drop first."""
    drops: dict[int, float] = {}
    for index, (old, new) in enumerate(zip(before.per_sample, after.per_sample, strict=True)):
        # The first score of a sample follows the primary metric.
        drop = next(iter(old.values())) - next(iter(new.values()))
        if drop > 0:
            drops[index] = drop
    return sorted(drops, key=lambda index: -drops[index])


def _format_reference(reference: ReferenceAnswer) -> str:
    """Format a reference as its first text and the rounded corners of its boxes."""
    texts, boxes = reference
    words = [texts[0]]
    for box in boxes:
        corners = [*map(round, box.xyxy)]
        words.append(f"{box.label or 'box'} {corners}")
    return " ".join(filter(None, words))


def update_suite(
    path: Path, groups: Sequence[LoadedGroup], results: Sequence[GroupResult]
) -> list[LoadedGroup]:
    """Set `min_score` of each group to the score of the tuned model minus `allowed_drop`.

    Only these values change in the file. Returns the groups of the new suite.
    """
    text = read_recipe_text(path)
    root: Any = ComposedYaml(text).root
    (nodes,) = (value for name, value in root.value if name.value == "groups")
    node_by_group = {name.value: value for name, value in nodes.value}
    edits: dict[tuple[int, int], str] = {}
    bounds: dict[str, float] = {}
    for group, result in zip(groups, results, strict=True):
        score = result.difference.after
        bounds[group.name] = max(score - group.settings.allowed_drop, min(score, 0.0))
    for group in groups:
        node: yaml.MappingNode = node_by_group[group.name]
        # Groups of a YAML alias share a node, which gets the least bound.
        bound = min(bounds[name] for name, other in node_by_group.items() if other is node)
        number = f"{math.floor(1e4 * bound) / 1e4:g}"
        mark = node.value[0][0].start_mark
        end = f"\n{' ' * mark.column}"
        if node.flow_style:
            end = ", "
        text_range = (mark.index, mark.index)
        replacement = f"min_score: {number}{end}"
        for name, value in node.value:
            if name.value == "min_score":
                text_range = (value.start_mark.index, value.end_mark.index)
                replacement = number
        edits[text_range] = replacement
    for (start, stop), replacement in sorted(edits.items(), reverse=True):
        text = text[:start] + replacement + text[stop:]
    # The suite may be a link, which would be replaced.
    write_file(path.resolve(), text.encode())
    return load_suite(path)
