"""Jobs for a pool of workers, of which some go wrong."""

import os
import signal
import subprocess
import sys
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finesight.encode.renderer import NativeRenderer
from finesight.errors import UserError
from finesight.files.worker_pool import JobOutput
from finesight.serve.preprocessing_jobs import WorkerState, load_worker_state


def load(number: int) -> dict[str, Any]:
    """The state of the pool."""
    return {"number": number}


def describe(state: dict[str, Any], array: NDArray[np.generic]) -> JobOutput:
    state["jobs"] = state.get("jobs", 0) + 1
    value = {"number": state["number"], "jobs": state["jobs"], "pid": os.getpid()}
    return JobOutput(value, [array, array.astype(np.float32).T])


def spin(state: dict[str, Any]) -> JobOutput:
    while True:
        pass


def sleep(state: dict[str, Any], seconds: float) -> JobOutput:
    time.sleep(seconds)
    return JobOutput(seconds)


def allocate_memory(state: dict[str, Any], size: int) -> JobOutput:
    return JobOutput(int(np.ones(size, dtype=np.uint8).sum()))


def hoard(state: dict[str, Any], size: int) -> JobOutput:
    state["kept"] = np.ones(size, dtype=np.uint8)
    return JobOutput(os.getpid())


def crash(state: dict[str, Any]) -> JobOutput:
    return JobOutput(os.kill(os.getpid(), signal.SIGSEGV))


def refuse(state: dict[str, Any]) -> JobOutput:
    raise UserError("is 3", where="field", expected="4", remedy="correct it")


def fail(state: dict[str, Any]) -> JobOutput:
    raise ZeroDivisionError("a secret")


def limits(state: dict[str, Any]) -> JobOutput:
    facts = {"open": sorted(os.listdir("/proc/self/fd")), "environment": sorted(os.environ)}
    return JobOutput(facts | {"nice": os.nice(0), "group": os.getpgrp()})


def load_state_without_av(renderer: NativeRenderer, vocab_size: int) -> WorkerState:
    """The state of the workers of a server without the extra `video`."""
    sys.modules["av"] = None  # type: ignore[assignment]
    return load_worker_state(renderer, vocab_size)


def hang(state: dict[str, Any], *args: object) -> JobOutput:
    time.sleep(10_000)
    return JobOutput()


def resist(state: dict[str, Any]) -> JobOutput:
    """Start a process, and ignore the signal that ends a worker."""
    signal.signal(signal.SIGIO, signal.SIG_IGN)
    subprocess.run(["sleep", "1000"], check=False)
    return JobOutput()
