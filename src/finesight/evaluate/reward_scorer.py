"""Rewards of responses for `train.objective=grpo`.

A reward is a number for each response, usually from 0 to 1. Metrics of `eval.metric` are rewards,
too. A function in a Python file receives an `EvalCase`, and returns a number, or None for no score.
Functions, and patterns and schemas of recipes, run in processes of their own, with limits of time
and memory.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module, util
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finesight.bounded_files import parse_json
from finesight.config import RewardSettings
from finesight.data.sample import BoxPart
from finesight.errors import UserError, describe_choices
from finesight.evaluate import custom_metric, task_metrics
from finesight.evaluate.box_metrics import compute_box_reward, compute_click_reward
from finesight.evaluate.eval_case import EvalCase
from finesight.evaluate.latex_metrics import score_latex, strip_math_delimiters
from finesight.evaluate.score_function import (
    RewardError,
    ScoreFunction,
    ScoringError,
    describe_case,
)
from finesight.evaluate.text_metrics import normalize_text
from finesight.pattern_matcher import MAX_PATTERN_CPU_S, PatternMatcher
from finesight.plugins import Registry
from finesight.worker_pool import JobOutput, WorkerJobError, WorkerLimitError, WorkerPool

MAX_MEMORY_BYTES = 2 << 30
"""Memory of a function in addition to its loaded file, and of a schema."""

REPEATED_NGRAM = 4
"""Number of words of the n-grams that the reward `repetition` counts."""

MATH_CPU_S = 5.0
"""Maximum seconds of CPU time of the reward `math` for a response."""

SCHEMA_CPU_S = 5.0
"""Maximum seconds of CPU time of the reward `format` with a schema, for a response."""

_BOXES = (BoxPart(xyxy=(0, 0, 1, 1)),)
CORRECT_CASE = EvalCase("[1]", _BOXES, ("[1]",), _BOXES)
"""A correct answer in each task."""


def score_exact(case: EvalCase) -> float:
    """Return 1 if the answer equals a reference up to whitespace."""
    return float(normalize_text(case.answer) in map(normalize_text, case.references))


def score_repetition(case: EvalCase) -> float:
    """Return the share of distinct n-grams of words; 1 for answers without repetition."""
    words = case.answer.split()
    ngrams = [tuple(words[i : i + REPEATED_NGRAM]) for i in range(len(words) - REPEATED_NGRAM + 1)]
    if not ngrams:
        return 1.0
    return len(set(ngrams)) / len(ngrams)


def score_length(max_length: int, case: EvalCase) -> float:
    """Return 1 up to `max_length` characters, then linearly less, and 0 from twice as many."""
    excess = len(case.answer) - max_length
    return min(1.0, max(0.0, 1.0 - excess / max_length))


RewardFn = Callable[[Sequence[EvalCase]], list[float | None]]

CaseRewardFn = Callable[[EvalCase], float]

_BUILT_IN: dict[str, CaseRewardFn] = {
    "exact": score_exact,
    "boxes": compute_box_reward,
    "click": compute_click_reward,
    "repetition": score_repetition,
}
REWARDS = Registry("rewards", object, _BUILT_IN)


class RewardScorer(contextlib.ExitStack):
    """Scorer of responses by all rewards of a recipe. Close it to end the worker processes.

    Args:
        run_dir: Run whose copies replace missing files of functions; None without copies.

    Raises:
        UserError: A reward function, a score of a metric, or a package is missing.
    """

    def __init__(self, rewards: Sequence[RewardSettings], run_dir: Path | None = None) -> None:
        super().__init__()
        self.names = _name_rewards(rewards)
        self._run_dir = run_dir
        self.weights = [reward.weight for reward in rewards]
        self._matcher = self.enter_context(PatternMatcher("rewards, pattern", ""))
        self._functions = [self._build_function(*one) for one in enumerate(rewards, 1)]

    def score(self, cases: Sequence[EvalCase]) -> list[list[float | None]]:
        """Return the scores of each reward; None for a response that is not scored.

        Args:
            cases: Responses to one sample.

        Raises:
            RewardError: A function failed, or exceeded a limit.
        """
        return [function(cases) for function in self._functions]

    def _build_function(self, number: int, reward: RewardSettings) -> RewardFn:
        name = reward.name
        if self._run_dir is not None:
            copy_name = f"reward_{number}.py"
            name = custom_metric.resolve_metric_path(name, self._run_dir, copy_name=copy_name)
        if (location := custom_metric.parse_metric_path(name)) is not None:
            custom_metric.require_metric_file(location[0])
            return self._build_custom(
                custom_metric.open_function(*location, "reward", MAX_MEMORY_BYTES)
            )
        if reward.pattern is not None:
            return partial(_score_format, self._matcher, reward.pattern)
        if reward.json_schema is not None:
            _require_package("jsonschema", "format", "schema")
            return partial(_score_schema, self._open_pool(dict), reward.json_schema)
        if name == "math":
            _require_package("math-verify", name, "latex")
            return partial(_score_math, self._open_pool(import_module, "math_verify"))
        if (plugin := REWARDS.find_plugin(name)) is not None:
            load = partial(_load_plugin, name)
            return self._build_custom(ScoreFunction(load, plugin.describe(), name, "reward"))
        score_case: CaseRewardFn
        if reward.max_length is not None:
            score_case = partial(score_length, reward.max_length)
        elif name in _BUILT_IN:
            score_case = _BUILT_IN[name]
        else:
            return partial(_score_by_metric, name, *_find_score(name))
        return lambda cases: [score_case(case) for case in cases]

    def _build_custom(self, function: ScoreFunction) -> RewardFn:
        """Return the reward of a function, whose process ends with this scorer."""
        self.enter_context(function)

        def score_cases(cases: Sequence[EvalCase]) -> list[float | None]:
            found: list[float | None] = []
            for case in cases:
                scores = function.score(case)
                if scores is None:
                    found.append(None)
                else:
                    found.extend(scores.values())
            return found

        return score_cases

    def _open_pool(self, setup: Callable[..., Any], *args: object) -> WorkerPool:
        pool = WorkerPool(setup, *args, num_idle=1, memory_bytes=MAX_MEMORY_BYTES)
        return self.enter_context(contextlib.closing(pool))


def _require_package(package: str, reward: str, extra: str) -> None:
    if util.find_spec(package.replace("-", "_")) is None:
        raise UserError(
            f"the reward {reward} requires the package {package}, which is not installed",
            where="rewards",
            expected=f"the extra {extra}",
            remedy=f"pip install 'finesight[{extra}]'",
        )


def _name_rewards(rewards: Sequence[RewardSettings]) -> list[str]:
    """Return short names for metrics, which number repeated ones."""
    names = [reward.name.rpartition(":")[2] for reward in rewards]
    unique_names = []
    for i, name in enumerate(names):
        if names.count(name) == 1:
            unique_names.append(name)
        else:
            number = names[: i + 1].count(name)
            unique_names.append(f"{name}_{number}")
    return unique_names


def _find_score(name: str) -> tuple[task_metrics.TaskMetric, str]:
    """Return the metric and the score of a reward; by default, the first score of an answer.

    Raises:
        UserError: There is no such score, or it is 0 for a correct answer.
    """
    metric, _, score = name.partition(".")
    task = task_metrics.get_task_metric(metric)
    if task_metrics.TASK_METRICS.find_plugin(metric) is not None:
        return task, score  # its references are unknown
    if metric == "latex" and score != "rendered":
        task = replace(task, score_fn=partial(score_latex, renders=False))
    (scores,) = task.score_fn([CORRECT_CASE]).per_sample
    score = score or next(iter(scores))
    # Error rates are 0, and CIDEr-D, which is 0 for all responses to one image.
    rewarded = [f"{metric}.{one}" for one, value in scores.items() if value > 0]
    if f"{metric}.{score}" not in rewarded:
        remedy = "choose another metric"
        if score == "rendered":
            remedy = "pip install 'finesight[latex]'"
        elif rewarded:
            remedy = f"use {rewarded[0]}"
        raise UserError(
            f"{metric} has no score {score!r} that rewards a correct response",
            where=f"rewards, {name}",
            expected=describe_choices(rewarded, "score of this metric"),
            remedy=remedy,
        )
    return task, score


def _score_by_metric(
    name: str, task: task_metrics.TaskMetric, score: str, cases: Sequence[EvalCase]
) -> list[float | None]:
    """Return a score of each case; None if the references lack what the metric compares.

    Raises:
        RewardError: The metric of a plug-in failed.
    """
    reference = cases[0].references, cases[0].reference_boxes
    if task.reference_kind == "json" and not task_metrics.has_reference_kind("json", reference):
        return [None] * len(cases)
    try:
        per_sample = task.score_fn(cases).per_sample
    except ScoringError as error:
        raise RewardError(
            f"reward {name}: {error.what}",
            where=error.where,
            expected=error.expected,
            remedy="correct the metric, then start again with --resume",
        ) from error
    return [scores.get(score or next(iter(scores))) for scores in per_sample]


def _score_math(pool: WorkerPool, cases: Sequence[EvalCase]) -> list[float | None]:
    """Return 1 for answers that equal a reference as formulas; None without such a reference."""
    scores: list[float | None] = []
    for case in cases:
        try:
            with pool.borrow_worker() as worker:
                scores.append(worker.call(_verify_math, case, max_cpu_s=MATH_CPU_S).value)
        except (WorkerLimitError, WorkerJobError):  # such as nested powers
            scores.append(0.0)
    return scores


def _verify_math(math_verify: Any, case: EvalCase) -> JobOutput:
    """Compare formulas in a worker process, whose limits replace the time-outs of the package."""
    parse = partial(math_verify.parse, parsing_timeout=None)
    expected = [parse(f"${strip_math_delimiters(text)}$") for text in case.references]
    if not any(expected):
        return JobOutput()
    answers = [parse(case.answer), parse(f"${strip_math_delimiters(case.answer)}$")]
    verify = partial(math_verify.verify, timeout_seconds=None)
    return JobOutput(float(any(verify(one, found) for one in expected for found in answers)))


def _load_plugin(name: str) -> tuple[CaseRewardFn, Mapping[str, Any]]:
    """Return the function of a plug-in in a worker process."""
    return REWARDS[name], {}


def _score_format(
    matcher: PatternMatcher, pattern: str, cases: Sequence[EvalCase]
) -> list[float | None]:
    """Return 1 if the pattern matches the complete answer."""
    scores: list[float | None] = []
    for case in cases:
        matcher.budget_s = MAX_PATTERN_CPU_S
        with _name_case("pattern", case):
            answer = [case.answer.strip()]
            (groups,) = matcher.match(pattern, answer, is_full=True, flags=re.DOTALL)
        scores.append(float(groups is not None))
    return scores


def _score_schema(
    pool: WorkerPool, schema: Mapping[str, Any], cases: Sequence[EvalCase]
) -> list[float | None]:
    """Return 1 if the complete answer is JSON that a schema describes."""
    scores: list[float | None] = []
    for case in cases:
        with _name_case("json_schema", case), pool.borrow_worker() as worker:
            reply = worker.call(_validate, schema, case.answer, max_cpu_s=SCHEMA_CPU_S)
        scores.append(float(reply.value))
    return scores


@contextlib.contextmanager
def _name_case(option: str, case: EvalCase) -> Iterator[None]:
    """Add the option of the reward `format` and the sample to an error."""
    try:
        yield
    except UserError as error:
        raise RewardError(
            f"reward format: {error.what} ({describe_case(case)})",
            where=f"rewards, {option}",
            expected=error.expected,
            remedy=f"correct {option}, then start again with --resume",
        ) from error


def _validate(state: dict[str, Any], schema: Mapping[str, Any], answer: str) -> JobOutput:
    """Compare an answer with a JSON schema in a worker process.

    Patterns of a schema may take exponential time, and its references may be endless.
    """
    if "validator" not in state:
        state["validator"] = _build_validator(schema)
    try:
        value = parse_json(answer)
    except ValueError:
        return JobOutput(False)
    try:
        return JobOutput(bool(state["validator"].is_valid(value)))
    except import_module("referencing.exceptions").Unresolvable as error:
        expected = "references that are defined in the schema"
        raise UserError(str(error), expected=expected) from error
    except (re.error, OverflowError, RecursionError) as error:
        raise _build_schema_error(f"{type(error).__name__}: {error}") from error


def _build_validator(schema: Mapping[str, Any]) -> Any:
    """Return the validator of a JSON schema. References to other documents are an error."""
    package = import_module("jsonschema")
    try:
        validator = package.validators.validator_for(schema, package.Draft202012Validator)
        validator.check_schema(schema)
        # Without a registry, the package would download the documents.
        return validator(schema, registry=import_module("referencing").Registry())
    except package.SchemaError as error:
        raise _build_schema_error(f"{error.message:.500} at {error.json_path}") from error
    except (re.error, OverflowError, RecursionError) as error:
        raise _build_schema_error(f"{type(error).__name__}: {error}") from error


def _build_schema_error(what: str) -> UserError:
    return UserError(what, expected="a valid JSON schema with finite references")


UNSCORED_REASONS = {
    "json": "these references are no JSON",
    "math": "these references are no formulas",
    "latex": "these references are no LaTeX that can be rendered",
}
"""Reasons why no response has a score of a reward, by its name or metric."""


def describe_unscored(names: Sequence[str], rewards_QGF: NDArray[np.float64]) -> list[str]:
    """Describe the rewards that scored no response of a step.

    Shapes: Q groups, G responses of a group, F rewards.
    """
    texts = list[str]()
    for name, rewards_QG in zip(names, np.moveaxis(rewards_QGF, -1, 0), strict=False):
        if rewards_QG.size and np.isnan(rewards_QG).all():
            reason = UNSCORED_REASONS.get(name.partition(".")[0], "it returned no number")
            count = f"0 of {rewards_QG.size} responses have a score of the reward {name}"
            texts.append(f"warning: {count}: {reason}")
    return texts
