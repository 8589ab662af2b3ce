"""Scores of responses by the rewards of a recipe.

A reward is a number for each response, usually from 0 to 1. Metrics of `eval.metric` are rewards,
too. A function in a Python file receives an `EvalCase`, and returns a number, or None for no score.
Functions, and patterns and schemas of recipes, run in processes of their own, with limits of time
and memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finesight.errors import UserError, describe_choices
from finesight.evaluate import custom_metric, python_functions, task_metrics
from finesight.evaluate.eval_case import EvalCase
from finesight.evaluate.reward import Reward
from finesight.evaluate.reward_workers import MAX_MEMORY_BYTES, RewardWorkers
from finesight.evaluate.score_function import (
    AnyScoreFunction,
    PythonScoreFunction,
    RewardError,
    ScoreFunction,
    ScoringError,
)
from finesight.metric_components import METRICS, get_metric
from finesight.reward_components import REWARDS, ExtraPackage, RewardSettings
from finesight.samples.sample import BoxPart
from finesight.settings.config import PYTHON_PREFIX

_BOXES = (BoxPart(xyxy=(0, 0, 1, 1)),)
CORRECT_CASE = EvalCase("[1]", _BOXES, ("[1]",), _BOXES)
"""A correct answer in each task."""


RewardFn = Callable[[Sequence[EvalCase]], list[float | None]]


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
        self._workers = self.enter_context(RewardWorkers())
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
        python_function = python_functions.find_function(name)
        if python_function is not None:
            own_name = name.removeprefix(PYTHON_PREFIX)
            return self._build_custom(PythonScoreFunction(python_function, own_name, "reward"))
        if self._run_dir is not None:
            copy_name = f"reward_{number}.py"
            name = custom_metric.resolve_metric_path(name, self._run_dir, copy_name=copy_name)
        if (location := custom_metric.parse_metric_path(name)) is not None:
            custom_metric.require_metric_file(location[0])
            return self._build_custom(
                custom_metric.open_function(*location, "reward", MAX_MEMORY_BYTES)
            )
        component = REWARDS.get(name)
        if component is None:
            return partial(_score_by_metric, name, *_find_score(name))
        for package in REWARDS.call(name, component.packages, reward):
            _require_package(package, name)
        plugin = REWARDS.find_plugin(name)
        if plugin is not None:
            load = partial(_load_plugin, reward)
            return self._build_custom(ScoreFunction(load, plugin.describe(), name, "reward"))
        implementation = REWARDS.load_implementation(name, Reward)
        score_case = implementation(reward, self._workers).score
        return lambda cases: [score_case(case) for case in cases]

    def _build_custom(self, function: AnyScoreFunction) -> RewardFn:
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


def _require_package(package: ExtraPackage, reward: str) -> None:
    if util.find_spec(package.name.replace("-", "_")) is None:
        raise UserError(
            f"the reward {reward} requires the package {package.name}, which is not installed",
            where="rewards",
            expected=f"the extra {package.extra}",
            remedy=f"pip install 'finesight[{package.extra}]'",
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
    if METRICS.find_plugin(metric) is not None:
        return task, score  # its references are unknown
    component = METRICS[metric]
    if component.slow_scores and score not in component.slow_scores:
        score_fn = METRICS.load_score_fn(metric)
        task = replace(task, score_fn=partial(score_fn, skips_slow_scores=True))
    (scores,) = task.score_fn([CORRECT_CASE]).per_sample
    score = score or next(iter(scores))
    # Error rates are 0, and CIDEr-D, which is 0 for all responses to one image.
    rewarded = [f"{metric}.{one}" for one, value in scores.items() if value > 0]
    if f"{metric}.{score}" not in rewarded:
        remedy = "choose another metric"
        if score in component.scores and component.scores[score].extra:
            remedy = f"pip install 'finesight[{component.scores[score].extra}]'"
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


def _load_plugin(settings: RewardSettings) -> tuple[Callable[[EvalCase], Any], Mapping[str, Any]]:
    """Return the function of a plug-in in a worker process."""
    name = settings.name
    function = REWARDS[name].function
    if function is None:
        implementation = REWARDS.load_implementation(name, Reward)
        function = REWARDS.call(name, implementation, settings, RewardWorkers()).score
    return function, {}


def describe_unscored(names: Sequence[str], rewards_QGF: NDArray[np.float64]) -> list[str]:
    """Describe the rewards that scored no response of a step.

    Shapes: Q groups, G responses of a group, F rewards.
    """
    texts = list[str]()
    for name, rewards_QG in zip(names, np.moveaxis(rewards_QGF, -1, 0), strict=False):
        if rewards_QG.size and np.isnan(rewards_QG).all():
            count = f"0 of {rewards_QG.size} responses have a score of the reward {name}"
            texts.append(f"warning: {count}: {_explain_unscored(name)}")
    return texts


def _explain_unscored(name: str) -> str:
    """Return why no response has a score of a reward or metric, or of a function."""
    component = REWARDS.get(name)
    if component is not None:
        return component.unscored_reason
    return get_metric(name.partition(".")[0]).unscored_reason
