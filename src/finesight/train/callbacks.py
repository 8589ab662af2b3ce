"""Functions of the user that get the metrics of a run, and may stop it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from finesight.errors import StopTraining, UserError
from finesight.evaluate.score_function import ScoringError, build_function_error

Callback = Callable[[int, Mapping[str, float]], object]
"""Function of a step and its metrics, or of a step and the scores of an evaluation."""


def check_callbacks(callbacks: object, world_size: int) -> None:
    """Verify the types of callbacks and the number of processes.

    Raises:
        UserError: They are no list of functions, or several processes train.
    """
    if not isinstance(callbacks, Sequence) or isinstance(callbacks, str):
        raise _build_type_error(callbacks)
    for callback in callbacks:
        if not callable(callback):
            raise _build_type_error(callback)
    if callbacks and world_size > 1:
        raise UserError(
            f"callbacks in a training with {world_size} processes",
            where="callbacks",
            expected="no callbacks, which would stop only their own process",
            remedy="remove them, and use track or eval, such as eval.patience",
        )


def _build_type_error(value: object) -> UserError:
    return UserError(
        f"a {type(value).__name__} ({value!r:.60})",
        where="callbacks",
        expected="a list of functions of a step and its metrics",
        remedy="pass functions such as: def stop(step, metrics): ...",
    )


class CallbackError(ScoringError):
    """Raised when a callback fails. A run can continue after the callback is corrected."""


class CallbackList:
    """Callbacks of a run. Names of metrics are those in trackers.

    Attributes:
        stop_reason: Text of the `StopTraining` that a callback has raised; None before.
    """

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self._callbacks = callbacks
        self.stop_reason: str | None = None

    def __bool__(self) -> bool:
        return bool(self._callbacks)

    def call(self, step: int, metrics: Mapping[str, float]) -> None:
        """Pass metrics to all callbacks.

        Raises:
            CallbackError: A callback failed.
        """
        for callback in self._callbacks:
            try:
                callback(step, dict(metrics))
            except StopTraining as request:
                self.stop_reason = str(request) or "StopTraining"
            except Exception as error:
                raise _build_error(callback, error, step) from error


def _build_error(callback: Callback, error: Exception, step: int) -> CallbackError:
    code = getattr(callback, "__code__", None)
    where = type(callback).__name__ if code is None else str(code.co_filename)
    failure = build_function_error(error, where, f"after step {step}")
    return CallbackError(
        f"callback: {failure.what}",
        where=failure.where,
        expected="a function of the step and its metrics",
        remedy="correct the callback, then repeat the call with resume=True",
    )
