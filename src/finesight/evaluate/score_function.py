"""Functions of Python files and plug-ins that score answers: custom metrics and rewards.

A function runs in a process of its own. If it raises an exception, exits, hangs or forks, the
caller gets an error with the file, the function and the sample, and loses nothing.
"""

from __future__ import annotations

import contextlib
import math
import numbers
import os
import reprlib
import traceback
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

from finesight.errors import UserError
from finesight.evaluate.eval_case import EvalCase
from finesight.files.worker_pool import (
    UNLIMITED_MEMORY,
    JobOutput,
    Worker,
    WorkerLimitError,
    WorkerPool,
    limit_memory,
)

CALL_SECONDS = 30.0
"""Maximum seconds of a call for one answer, waiting included."""

LOAD_SECONDS = 300.0
"""Maximum seconds of the import of a file, waiting included."""

MAX_SCORES = 1000
"""Maximum number of scores of an answer."""

MAX_MAGNITUDE = 1e15
"""Maximum magnitude of a score."""

MAX_TEXT_CHARS = 80
"""Maximum length of an answer or a value in an error message."""

EXPECTED_FUNCTION = "a function of one case that returns a finite number or a dict of them"

ScoreKind = Literal["reward", "metric"]
"""A reward returns one number or None. A metric returns a number, or a dictionary of numbers."""

Variables = Mapping[str, Any]
LoadFunction = Callable[[], tuple[Callable[[EvalCase], Any], Variables]]


class ScoringError(UserError):
    """Raised when a metric fails. A run can continue after the metric is corrected."""


class RewardError(ScoringError):
    """Raised when a reward fails. A run can continue after the reward is corrected."""


class ScoreFunction(contextlib.AbstractContextManager["ScoreFunction"]):
    """A function that scores one answer after another in a process of its own.

    The first call starts the process, which inherits the environment. Printed text is discarded.

    Args:
        load: Picklable function that returns the function and the variables of its file.
        where: File or plug-in, for errors.
        max_bytes: Memory that calls may take in addition to the loaded file; None for any.
    """

    def __init__(
        self,
        load: LoadFunction,
        where: str,
        name: str,
        kind: ScoreKind,
        max_bytes: int | None = None,
    ) -> None:
        self._load = load
        self._where = where
        self._name = name
        self._kind = kind
        self._max_bytes = max_bytes
        self._pool = WorkerPool(
            dict, num_idle=0, memory_bytes=UNLIMITED_MEMORY, inherits_environment=True
        )
        self._worker: Worker | None = None

    def __exit__(self, *problem: object) -> None:
        if self._worker is not None:
            self._worker.close()
        self._pool.close()

    def load(self) -> str | None:
        """Execute the file in a new process, and return its variable HEADLINE, if any.

        Raises ScoringError if the file fails, or has no such function.
        """
        worker = self._pool.fork()
        args = self._load, self._max_bytes
        context = "during execution of the file"
        value = self._call(worker, _load, *args, seconds=LOAD_SECONDS, context=context)
        self._worker = worker
        return None if value is None else str(value)

    def score(self, case: EvalCase) -> dict[str, float] | None:
        """Return the scores of an answer by name; None if a reward gives none.

        Raises ScoringError if the function fails, exceeds a limit, or returns something else.
        """
        if self._worker is None or self._worker.is_killed:
            self.load()
        assert self._worker is not None, "the function is not loaded"
        args = self._where, self._name, self._kind, case
        context = describe_case(case)
        value = self._call(self._worker, _score, *args, seconds=CALL_SECONDS, context=context)
        if value is None:
            return None
        return dict(value)

    def _call(
        self,
        worker: Worker,
        job: Callable[..., JobOutput],
        *args: Any,
        seconds: float,
        context: str,
    ) -> Any:
        """Run a job in a worker, which ends after the seconds."""
        try:
            reply = worker.call_within(seconds, job, *args)
        except WorkerLimitError as error:
            what = f"{error.what} ({context})"
            raise self._build_error(what, expected=error.expected) from error
        except UserError as error:
            raise self._build_error(
                error.what, where=error.where, expected=error.expected, remedy=str(error.remedy)
            ) from error
        return reply.value

    def _build_error(
        self, what: str, *, where: str = "", expected: str = "", remedy: str = ""
    ) -> ScoringError:
        remedy = remedy or "correct the function"
        if self._kind == "metric":
            return ScoringError(what, where=where or self._where, expected=expected, remedy=remedy)
        return RewardError(
            f"reward {self._name}: {what}",
            where=where or self._where,
            expected="a function of one case that returns a finite number, or None",
            remedy="correct the function, then start again with --resume",
        )


class PythonScoreFunction(contextlib.AbstractContextManager["PythonScoreFunction"]):
    """A function of the running program that scores one answer after another in this process.

    It has no limits of time and memory, and may use variables of the program.
    """

    def __init__(self, function: Callable[[EvalCase], Any], name: str, kind: ScoreKind) -> None:
        self._function = function
        self._name = name
        self._kind = kind
        code = getattr(function, "__code__", None)
        self.where = name if code is None else str(code.co_filename)

    def __exit__(self, *problem: object) -> None:
        """Do nothing: the function belongs to the program."""

    def load(self) -> None:
        """Return no name of a primary score: the first score is the primary one."""

    def score(self, case: EvalCase) -> dict[str, float] | None:
        """Return the scores of an answer by name; None if a reward gives none.

        Raises ScoringError if the function fails or returns something else.
        """
        try:
            value = self._function(case)
        except Exception as error:
            failure = build_function_error(error, self.where, describe_case(case))
            failure.remedy = "correct the function"
            raise self._complete_error(failure) from error
        try:
            return _read_scores(value, self.where, self._name, self._kind, case)
        except ScoringError as error:
            raise self._complete_error(error) from error

    def _complete_error(self, error: ScoringError) -> ScoringError:
        if self._kind == "metric":
            return error
        return RewardError(
            f"reward {self._name}: {error.what}",
            where=error.where,
            expected="a function of one case that returns a finite number, or None",
            remedy="correct the function, then repeat the call with resume=True",
        )


AnyScoreFunction = ScoreFunction | PythonScoreFunction


def describe_case(case: EvalCase) -> str:
    """Name the sample and the answer of a case in an error message."""
    return f"for sample {case.id!r}, answer {case.answer[:MAX_TEXT_CHARS]!r}"


def _load(state: dict[str, Any], load: LoadFunction, max_bytes: int | None) -> JobOutput:
    """Load the function in a worker process, and limit the memory of its calls."""
    state["function"], variables = load()
    if max_bytes is not None:
        limit_memory(max_bytes)
    headline = variables.get("HEADLINE")
    if headline is None or isinstance(headline, str):
        return JobOutput(headline)
    return JobOutput(_describe(headline))


def _score(
    state: dict[str, Any], where: str, name: str, kind: ScoreKind, case: EvalCase
) -> JobOutput:
    """Score a case in a worker process."""
    try:
        value = state["function"](case)
        scores = _read_scores(value, where, name, kind, case)
    except UserError:
        raise
    except BaseException as error:  # The interrupt of the user does not reach this process.
        raise build_function_error(error, where, describe_case(case)) from error
    return JobOutput(scores)


def _read_scores(
    value: Any, where: str, name: str, kind: ScoreKind, case: EvalCase
) -> dict[str, float] | None:
    """Return the scores in a result of a function. NaN of a reward is no score."""
    if kind == "reward" and (value is None or _is_nan(value)):
        return None
    values = {name: value}
    if kind == "metric" and isinstance(value, dict):
        values = value
    if not values:
        raise build_result_error(f"no score for sample {case.id!r}", where)
    if len(values) > MAX_SCORES:
        raise build_result_error(f"{len(values)} scores for sample {case.id!r}", where)
    scores: dict[str, float] = {}
    for key, number in values.items():
        subject = "the result" if kind == "reward" else str(key)[:MAX_TEXT_CHARS]
        score = read_score(number, subject, f"for sample {case.id!r}", where)
        scores[str(key)[:MAX_TEXT_CHARS]] = score
    if len(scores) < len(values):
        what = f"scores with equal names, or equal first {MAX_TEXT_CHARS} characters of names"
        raise build_result_error(f"{what}, for sample {case.id!r}", where)
    return scores


def read_score(value: object, name: str, context: str, where: str) -> float:
    """Return a finite number as a float. Raises ScoringError for another value.

    Args:
        context: Samples of the score, for the error.
    """
    score = math.nan
    if isinstance(value, numbers.Real | np.bool_):
        with contextlib.suppress(OverflowError):
            score = float(value)
    if not abs(score) <= MAX_MAGNITUDE:  # also NaN
        raise build_result_error(f"{name} is {_describe(value)} {context}", where)
    return score


def _is_nan(value: object) -> bool:
    return isinstance(value, float | np.floating) and math.isnan(value)


def _describe(value: object) -> str:
    """Describe a value of any type and size in an error message."""
    try:
        return reprlib.repr(value)[:MAX_TEXT_CHARS]
    except Exception:  # such as an integer with too many digits
        return f"an object of type {type(value).__name__}"


def build_result_error(what: str, where: str) -> ScoringError:
    """Build the error for a result that is no score."""
    return ScoringError(
        what,
        where=where,
        expected=EXPECTED_FUNCTION,
        remedy="correct the function: return finite values with the same names for every case",
    )


def build_function_error(error: BaseException, where: str, context: str) -> ScoringError:
    """Build the error for an exception in a function, with the line in its file if it has one.

    Args:
        where: File or plug-in.
    """
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == where]
    if isinstance(error, SyntaxError) and error.filename == where:
        lines.append(error.lineno)
    if lines and lines[-1]:
        where = f"{where}:{lines[-1]}"
    elif frames and not os.path.isfile(where):  # a plug-in
        where = f"{where}, {frames[-1].filename}:{frames[-1].lineno}"
    try:
        message = str(error)[:1000]
    except Exception:
        message = ""
    return ScoringError(
        f"{type(error).__name__}{': ' if message else ''}{message} ({context})",
        where=where,
        expected=EXPECTED_FUNCTION,
        remedy="correct the file; use `python -m pdb` to debug it",
    )
