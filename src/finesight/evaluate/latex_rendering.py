"""Rendering of formulas with ziamath, to compare their appearance.

Generated formulas may crash the renderer, run forever or exhaust memory, so worker processes with
limits of time and memory render them.
"""

from __future__ import annotations

import atexit
import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from importlib import import_module, util
from typing import Any

from finesight.worker_pool import JobOutput, WorkerJobError, WorkerLimitError, WorkerPool

MAX_FORMULA_LENGTH = 4000
"""Maximum number of characters of a formula that is rendered.

Formulas of published datasets have at most about 1,000.
"""

RENDER_CPU_SECONDS = 2
"""CPU time limit per formula; typical formulas take 0.04 s."""

MAX_MEMORY_BYTES = 2 * 10**9
MAX_RENDER_PROCESSES = 4


def is_ziamath_installed() -> bool:
    """Return whether ziamath is installed (`pip install "finesight[latex]"`)."""
    return util.find_spec("ziamath") is not None


def render_digests(formulas: Iterable[str]) -> dict[str, str | None]:
    """Render formulas, and return digests, which are equal for equal images; None on failure."""
    requested = sorted(set(formulas))
    with ThreadPoolExecutor(min(MAX_RENDER_PROCESSES, os.cpu_count() or 1)) as threads:
        return dict(zip(requested, threads.map(_request_digest, requested), strict=True))


@cache
def _open_workers() -> WorkerPool:
    """Return the workers of this process. Rewards render a few formulas at a time."""
    limits = {"num_idle": MAX_RENDER_PROCESSES, "memory_bytes": MAX_MEMORY_BYTES}
    workers = WorkerPool(import_module, "ziamath", **limits)
    atexit.register(workers.close)
    return workers


@lru_cache(maxsize=200_000)
def _request_digest(formula: str) -> str | None:
    if len(formula) > MAX_FORMULA_LENGTH:
        return None
    try:
        with _open_workers().borrow_worker() as worker:
            reply = worker.call(_render_digest, formula, max_cpu_s=RENDER_CPU_SECONDS)
    except (WorkerJobError, WorkerLimitError):  # also without a usable ziamath
        return None
    return None if reply.value is None else str(reply.value)


def _render_digest(ziamath: Any, formula: str) -> JobOutput:
    """Render a formula in a worker process."""
    try:
        svg = ziamath.Latex(formula).svg()
    except Exception:  # the parser raises various exceptions for generated formulas
        return JobOutput()
    return JobOutput(hashlib.sha256(svg.encode()).hexdigest()[:32])
