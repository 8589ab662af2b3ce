"""Processes that look at what may end them: what they print, or what they ended with."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Ended:
    """What a process printed, and what was wrong with it: empty where nothing was."""

    printed: str
    problem: str


def run(module: str, words: Sequence[str], seconds: float, more: Mapping[str, str]) -> Ended:
    """`python -m module` with `words`, ended after so many seconds, its environment this one's
    with `more`."""
    arguments = [sys.executable, "-m", module, *words]
    try:
        done = subprocess.run(
            arguments,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            env={**os.environ, **more},
        )
    except subprocess.TimeoutExpired as error:
        printed = error.stdout or b""
        text = printed.decode("utf-8", "replace") if isinstance(printed, bytes) else printed
        return Ended(text, f"no end after {seconds:.0f} s")
    return Ended(done.stdout, _problem(done.returncode, done.stderr))


def _problem(code: int, said: str) -> str:
    if code == 0:
        return ""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    last = lines[-1][:300] if lines else "without a word"
    if code < 0:
        return f"ended by {signal.Signals(-code).name}: {last}"
    return last
