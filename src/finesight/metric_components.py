"""Metrics as components: their scores, what `init` suggests for them, and their registry."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, get_args

from finesight.components import Component, ComponentRegistry, find_wrong_type
from finesight.errors import UserError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

ReferenceKind = Literal["text", "box", "box or point", "json", "tool call", "anything"]
"""Content of the references that a metric compares."""

AnswerContent = Literal["text", "formula", "fields", "boxes", "points"]
"""Content of answers, by which pages show and edit them."""

VALIDATION_LOSS = "validation_loss"

ENVIRONMENT_REWARD = "environment_reward"
"""Score of evaluations with an environment: the reward of an episode."""

PAIR_METRICS = "rewards/accuracies", "rewards/margins"
"""Metrics of preference pairs in steps and evaluations, computed with the loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Display and comparison of a score. Those of one name are equal in all built-in metrics.

    Attributes:
        title: Name on pages.
        description: Explanation on pages; empty for none.
        condition: Minimum for a correct answer, such as an IoU; empty if it must be perfect.
        lower_is_better: Whether a smaller value is better, as for an error rate.
        counts_answers: Whether it is the share of correct answers, which pages count.
        maximum: Value of a perfect answer.
        sample_score: Name of the score of a sample of which it is the mean, if it has another one.
        preference: Rank of a score of samples by which pages compare answers if they lack that of
            the primary score; None if it is not used.
        extra: Extra of finesight that installs the packages of the score; empty for none.
    """

    title: str
    description: str = ""
    condition: str = ""
    lower_is_better: bool = False
    counts_answers: bool = False
    maximum: float = 1.0
    sample_score: str = ""
    preference: int | None = None
    extra: str = ""

    def is_comparable(self, other: Score) -> bool:
        """Return whether both scores have the same direction and scale."""
        own = self.lower_is_better, self.counts_answers, self.maximum
        return own == (other.lower_is_better, other.counts_answers, other.maximum)


GENERAL_SCORES = {
    VALIDATION_LOSS: Score(
        title="validation loss",
        description="loss of the objective: by default, cross-entropy of the reference answers, in"
        " nats per token; for pairs, mean loss of a pair",
        lower_is_better=True,
    ),
    "ended_with_eos": Score(
        title="ended with EOS", description="answers that ended before the token limit"
    ),
    ENVIRONMENT_REWARD: Score(
        title="environment reward", description="result of get_reward of an episode", preference=9
    ),
    "rewards/accuracies": Score(
        title="reward accuracy", description="pairs whose chosen answer has the larger reward"
    ),
    "rewards/margins": Score(
        title="reward margin", description="reward of the chosen minus that of the rejected answer"
    ),
}
"""Scores of evaluations with any metric."""


def detect_nothing(summary: Any) -> bool:
    """Return False: a task that `init` does not detect."""
    return False


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSuggestion:
    """What `init` suggests for data with a task.

    Attributes:
        answer: Answer that a model gives, in the list of tasks.
        prompt: Question about every image; empty for none.
        fields_prompt: Question with the names of the columns for `{fields}`, if they are known.
        lists_classes: Whether the question lists the different answers instead.
        alternative: Task that the same answers may have, so that the user names one of the two.
        max_pixels: Maximum number of pixels per image.
        reward: Reward of the objectives that need one, as a score of the metric; empty for the
            reward that names the metric, or else the metric itself.
        detect: Whether an `AnswerSummary` is that of the task. Only built-in metrics are detected.
        detect_position: Place in the order in which tasks are tried. The last one is the default.
    """

    answer: str = ""
    prompt: str = ""
    fields_prompt: str = ""
    lists_classes: bool = False
    alternative: str = ""
    max_pixels: int = 802_816
    reward: str = ""
    detect: Callable[[Any], bool] = detect_nothing
    detect_position: int = 0


@dataclass(frozen=True, kw_only=True)
class MetricComponent(Component[Any]):
    """Light half of a task metric. The heavy half is a function from cases to a `MetricResult`.

    Attributes:
        primary_score: Score that the metric optimizes, higher is better; empty for the first one.
        reference_kind: Content that references must have.
        scores: Display of scores by name, also of those of samples. Others have their own name.
        answer_content: Content of the answers.
        lists_boxes: Whether answers may list several boxes or points.
        describes_scenes: Whether answers describe objects instead of reading a text, so that
            `data.augment` may change images more.
        size_warning: Warning about two evaluations of data of different sizes, with `{}` for the
            name and the number of samples of both; empty for none.
        unscored_reason: Reason why a response has no score, if the metric is a reward.
        slow_scores: Scores that the function omits with `skips_slow_scores=True`. A built-in metric
            as a reward computes them only if it is one of them.
        suggestion: What `init` suggests.
        score_fn: Scoring function of a plug-in for version 0.1, instead of an implementation.
    """

    primary_score: str = ""
    reference_kind: ReferenceKind = "text"
    scores: Mapping[str, Score] = field(default_factory=dict)
    answer_content: AnswerContent = "text"
    lists_boxes: bool = False
    describes_scenes: bool = False
    size_warning: str = ""
    unscored_reason: str = "it returned no number"
    slow_scores: tuple[str, ...] = ()
    suggestion: TaskSuggestion = TaskSuggestion()
    score_fn: Callable[[Sequence[Any]], Any] | None = None

    def find_problem(self) -> str | None:
        """Return why other modules cannot use the metric; None if they can."""
        problem = Component.find_problem(self)
        if problem is not None or self.score_fn is not None:
            return problem
        if not self.implementation:
            return "it has no implementation"
        if self.has_section:
            return "it has settings, which metrics do not support"
        if self.reference_kind not in get_args(ReferenceKind):
            kinds = ", ".join(get_args(ReferenceKind))
            return f"reference_kind is {self.reference_kind!r:.60}: one of {kinds}"
        if self.answer_content not in get_args(AnswerContent):
            contents = ", ".join(get_args(AnswerContent))
            return f"answer_content is {self.answer_content!r:.60}: one of {contents}"
        problem = self._find_score_problem()
        if problem is not None:
            return problem
        problem = find_wrong_type(self.suggestion)
        if problem is not None:
            return f"suggestion: {problem}"
        try:
            self.size_warning.format("first", 1, "second", 2)
        except (IndexError, KeyError, ValueError):
            return f"size_warning {self.size_warning!r:.60} has other placeholders than four {{}}"
        return None

    def _find_score_problem(self) -> str | None:
        for name, score in self.scores.items():
            if not isinstance(score, Score):
                return f"scores has {score!r:.60} for {name!r:.60} instead of a Score"
            problem = find_wrong_type(score)
            if problem is None and score.counts_answers and score.maximum != 1:
                problem = f"counts_answers with a maximum of {score.maximum}"
            if problem is not None:
                return f"score {name!r:.60}: {problem}"
        titles = [score.title for score in self.scores.values()]
        if len({*titles}) < len(titles):
            return "two scores have the same title"
        primary = self.scores.get(self.primary_score)
        if primary is not None and primary.lower_is_better:
            return f"lower values of its primary score {self.primary_score} are better"
        return None


class MetricRegistry(ComponentRegistry[MetricComponent]):
    """Task metrics by name: the values of `eval.metric`, apart from functions of the user."""

    def __init__(self, package: str, helpers: Collection[str]) -> None:
        super().__init__("metrics", MetricComponent, package, helpers)
        self._used_scores: dict[str, Mapping[str, Score]] = {}

    def adapt(self, entry: EntryPoint, item: Any) -> Any:
        """Return the component of a `TaskMetric`, the object of plug-ins for version 0.1."""
        if isinstance(item, MetricComponent):
            return item
        task_metric = import_module("finesight.evaluate.task_metrics").TaskMetric
        if not isinstance(item, task_metric):
            return item
        return MetricComponent(
            kind="metrics",
            name=entry.name,
            title=entry.name,
            primary_score=item.primary_metric or "",
            reference_kind=item.reference_kind,
            score_fn=item.score_fn,
        )

    def __getitem__(self, name: str) -> MetricComponent:
        try:
            component = super().__getitem__(name)
        except UserError:
            self._used_scores.pop(name, None)  # of another version of the plug-in
            raise
        if not self.is_built_in(name):
            self._used_scores[name] = component.scores
        return component

    def find_problem(self, name: str, item: Any) -> str | None:
        """Return why an object is no metric of a plug-in; None if it is one.

        Pages know scores by their names only, so a name has one meaning in a process.
        """
        problem = super().find_problem(name, item)
        if problem is not None:
            return problem
        owners = {one.name: one.scores for one in METRICS.list_built_in()}
        for metric, scores in [*self._used_scores.items()]:
            if metric != name and metric in self.plugin_names:
                owners[metric] = scores
        for score_name, score in item.scores.items():
            if score_name in GENERAL_SCORES:
                return f"all metrics have a score {score_name}: give yours another name"
            for metric, scores in owners.items():
                other = scores.get(score_name, score)
                if not other.is_comparable(score):
                    return (
                        f"the score {score_name!r:.60} has another direction or maximum in the"
                        f" metric {metric}: give it another name"
                    )
        return None

    def find_used_score(self, name: str) -> Score | None:
        """Return a score of the metrics of plug-ins that this process has used; None if unknown.

        Other installed plug-ins do not change how scores are displayed and compared.
        """
        # A copy, because other threads use metrics, too.
        for metric, scores in [*self._used_scores.items()]:
            if name in scores and metric in self.plugin_names:
                return scores[name]
        return None

    def load_score_fn(self, name: str) -> Callable[..., Any]:
        """Import the scoring function of a metric.

        Raises:
            UserError: A plug-in cannot be imported, or has another object.
        """
        component = self[name]
        if component.score_fn is not None:
            return component.score_fn
        return self.load_function(name)


METRICS = MetricRegistry("finesight.evaluate.metrics", helpers=("shared_scores",))
"""Task metrics by name."""

_OTHER_METRIC = MetricComponent(kind="metrics", name="", title="")


def get_metric(metric: object) -> MetricComponent:
    """Return a metric; one without properties if it is unknown, a function or broken."""
    if isinstance(metric, str):
        with suppress(UserError):
            return METRICS.get(metric) or _OTHER_METRIC
    return _OTHER_METRIC


def find_score(name: str) -> Score | None:
    """Return how a score is displayed and compared; None for an unknown one."""
    built_in = _list_built_in_scores()
    return built_in.get(name) or METRICS.find_used_score(name)


def get_score(name: str) -> Score:
    """Return how a score is displayed and compared; an unknown one has its name as title."""
    return find_score(name) or Score(title=name)


def list_preferred_scores() -> list[str]:
    """List the scores of samples by which pages compare answers, the preferred ones first."""
    ranks: list[tuple[int, str]] = []
    for name, score in _list_built_in_scores().items():
        if score.preference is not None:
            ranks.append((score.preference, name))
    return [name for _, name in sorted(ranks)]


@cache
def _list_built_in_scores() -> dict[str, Score]:
    scores = dict(GENERAL_SCORES)
    for component in METRICS.list_built_in():
        scores |= component.scores
    return scores
