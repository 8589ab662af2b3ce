"""Rewards of responses for `train.objective=grpo`.

A reward is a number for each response, usually from 0 to 1. Metrics of `eval.metric` are rewards,
too. A function in a Python file receives an `EvalCase`, and returns a number, or None for no score.
It runs in a process of its own, with limits of time and memory.
"""

from __future__ import annotations

import contextlib
import math
import numbers
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module, util
from pathlib import Path
from typing import Any

from finesight.bounded_files import parse_json
from finesight.config import RewardSettings
from finesight.data.sample import BoxPart
from finesight.errors import UserError, describe_choices
from finesight.evaluate import custom_metric, task_metrics
from finesight.evaluate.box_metrics import compute_box_reward, compute_click_reward
from finesight.evaluate.eval_case import EvalCase
from finesight.evaluate.latex_metrics import score_latex, strip_math_delimiters
from finesight.evaluate.text_metrics import normalize_text
from finesight.plugins import Registry
from finesight.worker_pool import JobOutput, WorkerJobError, WorkerLimitError, WorkerPool

MAX_CPU_S = 30.0
"""Maximum seconds of CPU time of a function for the responses of one group."""

MAX_MEMORY_BYTES = 2 << 30

REPEATED_NGRAM = 4
"""Number of words of the n-grams that the reward `repetition` counts."""

MATH_CPU_S = 5.0
"""Maximum seconds of CPU time of the reward `math` for a response."""

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
    return len(set(ngrams)) / len(ngrams) if ngrams else 1.0


def score_format(pattern: re.Pattern[str], case: EvalCase) -> float:
    """Return 1 if the pattern matches the complete answer."""
    return float(pattern.fullmatch(case.answer.strip()) is not None)


def score_schema(validator: Any, case: EvalCase) -> float:
    """Return 1 if the complete answer is JSON that a schema describes."""
    try:
        return float(validator.is_valid(parse_json(case.answer)))
    except ValueError:
        return 0.0
    except import_module("referencing.exceptions").Unresolvable as error:
        raise _build_schema_error(str(error), "define it in the schema") from error


def _build_schema_error(what: str, remedy: str) -> UserError:
    return custom_metric.RewardError(
        what, where="rewards, json_schema", expected="a complete JSON schema", remedy=remedy
    )


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
        self.names, self._run_dir = _name_rewards(rewards), run_dir
        self.weights = [reward.weight for reward in rewards]
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
        name, run_dir, copy_name = reward.name, self._run_dir, f"reward_{number}.py"
        if run_dir is not None:
            name = custom_metric.resolve_metric_path(name, run_dir, copy_name=copy_name)
        if (location := custom_metric.parse_metric_path(name)) is not None:
            custom_metric.require_metric_file(location[0])
            pool = self._open_pool(custom_metric.load_function, *location)
            return partial(_score_in_worker, pool, *location)
        if name == "math":
            _require_package("math-verify", name, "latex")
            return partial(_score_math, self._open_pool(import_module, "math_verify"))
        score_case: CaseRewardFn
        if reward.pattern is not None:
            score_case = partial(score_format, re.compile(reward.pattern, re.DOTALL))
        elif reward.json_schema is not None:
            score_case = partial(score_schema, _build_validator(reward.json_schema))
        elif reward.max_length is not None:
            score_case = partial(score_length, reward.max_length)
        elif name in REWARDS:
            score_case = REWARDS[name]
        else:
            return partial(_score_by_metric, *_find_score(name))
        return lambda cases: [score_case(case) for case in cases]

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


def _build_validator(schema: Mapping[str, Any]) -> Any:
    """Return the validator of a JSON schema. References to other documents are an error."""
    _require_package("jsonschema", "format", "schema")
    package = import_module("jsonschema")
    try:
        validator = package.validators.validator_for(schema, package.Draft202012Validator)
        validator.check_schema(schema)
        # Without a registry, the package would download the documents.
        return validator(schema, registry=import_module("referencing").Registry())
    except package.SchemaError as error:
        raise _build_schema_error(error.message, f"correct {error.json_path}") from error


def _name_rewards(rewards: Sequence[RewardSettings]) -> list[str]:
    """Return short names for metrics, which number repeated ones."""
    names = [reward.name.rpartition(":")[2] for reward in rewards]
    return [
        name if names.count(name) == 1 else f"{name}_{names[: i + 1].count(name)}"
        for i, name in enumerate(names)
    ]


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
    task: task_metrics.TaskMetric, score: str, cases: Sequence[EvalCase]
) -> list[float | None]:
    """Return a score of each case; None if the references lack what the metric compares."""
    reference = cases[0].references, cases[0].reference_boxes
    if task.reference_kind == "json" and not task_metrics.has_reference_kind("json", reference):
        return [None] * len(cases)
    per_sample = task.score_fn(cases).per_sample
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


def _score_in_worker(
    pool: WorkerPool, file: Path, function: str, cases: Sequence[EvalCase]
) -> list[float | None]:
    try:
        with pool.borrow_worker() as worker:
            return list(worker.call(_run_function, file, list(cases), max_cpu_s=MAX_CPU_S).value)
    except UserError as error:
        what = f"reward {function}: {error.what}"
        where = error.where or str(file)
    expected = "a function of one case that returns a finite number, or None"
    remedy = "correct the function, then start again with --resume"
    raise custom_metric.RewardError(what, where=where, expected=expected, remedy=remedy)


def _run_function(
    loaded: tuple[Callable[[EvalCase], Any], object], file: Path, cases: list[EvalCase]
) -> JobOutput:
    """Score cases in a worker process, which has loaded the function."""
    pid = os.getpid()
    values: list[float | None] = []
    for case in cases:
        try:
            value = custom_metric.call_function(loaded[0], file, case)
        finally:
            if os.getpid() != pid:  # a process that the function has forked
                os._exit(1)
        if value is not None and not isinstance(value, numbers.Real):
            raise UserError(f"the result is {value!r:.80} for sample {case.id!r}", where=str(file))
        values.append(None if value is None or not math.isfinite(value) else float(value))
    return JobOutput(values)
