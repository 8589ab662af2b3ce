"""Rendering of formulas with ziamath, to compare their appearance.

Generated formulas may crash the renderer, run forever or exhaust memory, so worker processes with
limits of time and memory render them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
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
        limits = {"num_idle": num_processes, "memory_bytes": MAX_MEMORY_BYTES}
        workers = WorkerPool(import_module, "ziamath", **limits)
        with closing(workers), ThreadPoolExecutor(num_processes) as threads:
            digests = threads.map(partial(_request_digest, workers), missing)
            _digest_cache.update(zip(missing, digests, strict=True))
    return {formula: _digest_cache[formula] for formula in requested}


def _request_digest(workers: WorkerPool, formula: str) -> str | None:
    if len(formula) > MAX_FORMULA_LENGTH:
        return None
    try:
        with workers.borrow_worker() as worker:
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
