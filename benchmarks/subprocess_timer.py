"""Run a command and record the time of each output line."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass
class CommandLog:
    """Timed output of a command.

    Each line has its time in seconds. The log also contains the exit code, the total seconds and
    whether the command timed out.
    """

    started_at: float
    lines: list[tuple[float, str]] = field(default_factory=list)
    exit_code: int = 0
    seconds: float = 0.0
    timed_out: bool = False

    def first_line_time(self, prefix: str) -> float:
        """Return the time of the first line with this prefix. Raises LookupError if there is
        none."""
        for seconds, line in self.lines:
            if line.startswith(prefix):
                return seconds
        raise LookupError(f"no line begins with {prefix!r} among {len(self.lines)}")

    def last_lines(self, max_lines: int = 12) -> str:
        """Return the last lines for error messages."""
        return "\n".join(line[:400] for _, line in self.lines[-max_lines:])


def run_timed(
    command: Sequence[str], environment: Mapping[str, str], timeout_s: float
) -> CommandLog:
    """Run a command. On timeout, kill it and all its processes."""
    command_log = CommandLog(time.time())
    start = time.perf_counter()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=os.environ | environment,
        # A process group of its own, so that workers end with it.
        start_new_session=True,
    )
    assert process.stdout is not None, "stdout was asked for"

    def kill_process() -> None:
        command_log.timed_out = True
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(timeout_s, kill_process)
    timer.start()
    try:
        for line in process.stdout:
            command_log.lines.append((time.perf_counter() - start, line.rstrip()))
        command_log.exit_code = process.wait()
    finally:
        timer.cancel()
    command_log.seconds = time.perf_counter() - start
    return command_log
