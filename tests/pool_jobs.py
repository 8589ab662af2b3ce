"""Jobs for a pool of workers, of which some go wrong."""

import os
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
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


def send_by_sockets(send: Callable[[int], object]) -> None:
    """Send something by each socket of this process, as hostile code does."""
    for name in os.listdir("/proc/self/fd"):
        try:
            is_socket = stat.S_ISSOCK(os.fstat(int(name)).st_mode)
        except OSError:  # the descriptor of the list
            continue
        if is_socket:
            send(int(name))


def send_part(state: dict[str, Any]) -> JobOutput:
    """Send half of a reply, and never the rest."""
    send_by_sockets(lambda fd: os.write(fd, struct.pack("!i", 100) + b"{"))
    return hang(state)


def send_slowly(state: dict[str, Any]) -> JobOutput:
    """Send a reply byte by byte."""
    send_by_sockets(lambda fd: os.write(fd, struct.pack("!i", 1 << 20)))
    while True:
        send_by_sockets(lambda fd: os.write(fd, b" "))
        time.sleep(0.01)


def send_text(state: dict[str, Any], text: str) -> JobOutput:
    """Send a text as the reply."""
    content = text.encode()
    send_by_sockets(lambda fd: os.write(fd, struct.pack("!i", len(content)) + content))
    return hang(state)


def stop_later(state: dict[str, Any]) -> JobOutput:
    """Stop this process after the reply, so that it reads no further job."""
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGSTOP)).start()
    return JobOutput()


def close_sockets(state: dict[str, Any]) -> JobOutput:
    """Shut down the connections, and continue."""
    send_by_sockets(lambda fd: socket.socket(fileno=fd).shutdown(socket.SHUT_RDWR))
    return hang(state)
