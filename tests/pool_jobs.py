"""Jobs for a pool of workers, of which some go wrong."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finesight.errors import UserError
from finesight.worker_process import Output


def load(number: int) -> dict[str, Any]:
    """The state of the pool."""
    return {"number": number}


def describe(state: dict[str, Any], array: NDArray[np.generic]) -> Output:
    state["jobs"] = state.get("jobs", 0) + 1
    value = {"number": state["number"], "jobs": state["jobs"], "pid": os.getpid()}
    return Output(value, [array, array.astype(np.float32).T])


def spin(state: dict[str, Any]) -> Output:
    while True:
        pass


def sleep(state: dict[str, Any], seconds: float) -> Output:
    time.sleep(seconds)
    return Output(seconds)


def grow(state: dict[str, Any], size: int) -> Output:
    return Output(int(np.ones(size, dtype=np.uint8).sum()))


def hoard(state: dict[str, Any], size: int) -> Output:
    state["kept"] = np.ones(size, dtype=np.uint8)
    return Output(os.getpid())


def crash(state: dict[str, Any]) -> Output:
    os.kill(os.getpid(), signal.SIGSEGV)
    return Output()


def refuse(state: dict[str, Any]) -> Output:
    raise UserError("is 3", where="field", expected="4", remedy="correct it")


def fail(state: dict[str, Any]) -> Output:
    raise ZeroDivisionError("a secret")


def limits(state: dict[str, Any]) -> Output:
    return Output(
        {
            "nice": os.nice(0),
            "group": os.getpgrp(),
            "open": sorted(os.listdir("/proc/self/fd")),
            "environment": sorted(os.environ),
        }
    )
