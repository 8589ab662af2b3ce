"""Run checks in a child process, because they may crash."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """Standard output of a child process, and its error. The error is empty on success."""

    stdout: str
    error: str


def run_probe(
    module: str, arguments: Sequence[str], timeout_s: float, extra_env: Mapping[str, str]
) -> ProbeResult:
    """Run `python -m MODULE` in a child process.

    Args:
        module: Module to run.
        arguments: Command-line arguments.
        timeout_s: Seconds after which the process is killed.
        extra_env: Additional environment variables.
    """
    command = [sys.executable, "-m", module, *arguments]
    try:
        completed = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            env={**os.environ, **extra_env},
        )
    except subprocess.TimeoutExpired as error:
        stdout = error.stdout or b""
        text = stdout.decode("utf-8", "replace") if isinstance(stdout, bytes) else stdout
        return ProbeResult(text, f"timed out after {timeout_s:.0f} s")
    return ProbeResult(completed.stdout, _describe_failure(completed.returncode, completed.stderr))


def _describe_failure(returncode: int, stderr: str) -> str:
    if returncode == 0:
        return ""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    last_line = lines[-1][:300] if lines else "no output"
    if returncode < 0:
        return f"killed by {signal.Signals(-returncode).name}: {last_line}"
    return last_line
