"""Rendering of formulas with ziamath in child processes, to compare their appearance.

Generated formulas may crash the renderer, run forever or exhaust memory, so each is rendered in a
child process with time and memory limits. This file is also the program of the child process: it
reads one JSON string per line and prints the digest of the rendered formula, or null.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib import util
from types import FrameType

MAX_FORMULA_LENGTH = 4000
"""Maximum number of characters of a formula that is rendered.

Formulas of published datasets have at most about 1,000.
"""

RENDER_CPU_SECONDS = 2
"""CPU time limit per formula; typical formulas take 0.04 s."""

RESPONSE_TIMEOUT_S = 60
"""Timeout for a response of the child process on a busy machine."""

MAX_MEMORY_BYTES = 2 * 10**9
MAX_RENDER_PROCESSES = 4

_digest_cache: dict[str, str | None] = {}
"""Digests by formula, so that a process renders each reference only once."""

_MAX_CACHED_DIGESTS = 200_000


def is_ziamath_installed() -> bool:
    """Return whether ziamath is installed (`pip install "finesight[latex]"`)."""
    return util.find_spec("ziamath") is not None


def render_digests(formulas: Iterable[str]) -> dict[str, str | None]:
    """Render formulas and return the digest of each rendering; None on failure.

    Formulas with equal digests look equal.
    """
    requested = set(formulas)
    if len(_digest_cache) > _MAX_CACHED_DIGESTS:
        _digest_cache.clear()
    missing = sorted(requested - _digest_cache.keys())
    num_processes = min(MAX_RENDER_PROCESSES, os.cpu_count() or 1, len(missing))
    if num_processes:
        chunks = [missing[first::num_processes] for first in range(num_processes)]
        with ThreadPoolExecutor(num_processes) as pool:
            for chunk, digests in zip(chunks, pool.map(_render_chunk, chunks), strict=True):
                _digest_cache.update(zip(chunk, digests, strict=True))
    return {formula: _digest_cache[formula] for formula in requested}


def _render_chunk(formulas: list[str]) -> list[str | None]:
    """Return the digest of each formula, in order.

    A child process that crashes or does not respond is replaced.
    """
    digests: list[str | None] = []
    while len(digests) < len(formulas):
        with start_render_process() as process:
            for formula in formulas[len(digests) :]:
                response = (
                    request_digest(process, formula)
                    if len(formula) <= MAX_FORMULA_LENGTH
                    else "null"
                )
                digests.append(json.loads(response) if response else None)
                if not response:
                    break
            process.kill()
    return digests


def start_render_process() -> subprocess.Popen[str]:
    """Start the child process, which renders formulas."""
    # Run as a script with -P: the child process does not import finesight.
    command = [sys.executable, "-P", __file__]
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
        # Only the parent receives Ctrl-C; the child exits when its stdin closes.
        start_new_session=True,
    )


def request_digest(process: subprocess.Popen[str], formula: str) -> str:
    """Return the response line for a formula, or an empty string on failure."""
    assert process.stdin is not None, "the child process has no stdin"
    assert process.stdout is not None, "the child process has no stdout"
    try:
        process.stdin.write(json.dumps(formula) + "\n")
        process.stdin.flush()
    except OSError:
        # The process is dead. Close stdin here, because a later close would flush and raise.
        with contextlib.suppress(OSError):
            process.stdin.close()
        return ""
    ready, _, _ = select.select([process.stdout], [], [], RESPONSE_TIMEOUT_S)
    return process.stdout.readline() if ready else ""


def _raise_timeout(signal_number: int, frame: FrameType | None) -> None:
    raise TimeoutError(f"more than {RENDER_CPU_SECONDS} s")


def _render_digest(formula: str) -> str | None:
    import ziamath

    signal.setitimer(signal.ITIMER_PROF, RENDER_CPU_SECONDS)
    try:
        svg = ziamath.Latex(formula).svg()
        return hashlib.sha256(svg.encode()).hexdigest()[:32]
    except Exception:  # the parser raises various exceptions for generated formulas
        return None
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _run_render_process() -> None:
    """Run the child process, which renders formulas from stdin."""
    import resource

    # Not supported on all platforms.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, _raise_timeout)
    for line in sys.stdin:
        print(json.dumps(_render_digest(json.loads(line))), flush=True)


if __name__ == "__main__":
    _run_render_process()
