"""A command, and when each line of it came: what a run did when, seen from outside."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass
class Watched:
    """What a command printed on both of its outputs, each line with the seconds since its start;
    its exit code, the seconds to its end, and whether it was stopped because it took too long."""

    began: float
    lines: list[tuple[float, str]] = field(default_factory=list)
    code: int = 0
    seconds: float = 0.0
    stopped: bool = False

    def at(self, beginning: str) -> float:
        """When the first line with this beginning came. Raises LookupError where none did."""
        for seconds, line in self.lines:
            if line.startswith(beginning):
                return seconds
        raise LookupError(f"no line begins with {beginning!r} among {len(self.lines)}")

    def last_words(self, most: int = 12) -> str:
        """The last lines, for who has to find out what went wrong."""
        return "\n".join(line[:400] for _, line in self.lines[-most:])


def watch(command: Sequence[str], environment: Mapping[str, str], limit_s: float) -> Watched:
    """Run a command to its end, and it and all its processes no longer than `limit_s`."""
    watched = Watched(time.time())
    start = time.perf_counter()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=os.environ | environment,
        # A group of its own, so that reading processes end with it.
        start_new_session=True,
    )
    assert process.stdout is not None, "stdout was asked for"

    def end() -> None:
        watched.stopped = True
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(limit_s, end)
    timer.start()
    try:
        for line in process.stdout:
            watched.lines.append((time.perf_counter() - start, line.rstrip()))
        watched.code = process.wait()
    finally:
        timer.cancel()
    watched.seconds = time.perf_counter() - start
    return watched
