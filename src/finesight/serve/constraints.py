"""Constrained decoding with grammars that run in worker processes.

Grammars are untrusted. llguidance limits the work of a step, but neither the time nor the memory of
a single operation: the mask of `.*.*.*...` takes a minute. Each constrained answer therefore has a
worker process with limits on both. The model never waits for it longer than
`infer.engine.PATIENCE_SECONDS`.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from finesight.errors import UserError
from finesight.infer.constrain import WIDTH, mask_of
from finesight.infer.request import Constraint
from finesight.serve.limits import Limits
from finesight.serve.worker_jobs import Spec, compile_grammar, next_mask
from finesight.worker_pool import Worker, WorkerLostError, WorkerPool

REMEMBERED = 1024
"""Number of grammars that are remembered as valid, by digest."""


class Constraints:
    """Factory of constraints for one model. Remembers which grammars are valid."""

    def __init__(
        self, pool: WorkerPool, limits: Limits, vocabulary: int, end_ids: Sequence[int]
    ) -> None:
        self.pool, self.limits = pool, limits
        self.end_only = mask_of(end_ids, -(-vocabulary // WIDTH))
        self.starters = ThreadPoolExecutor(2, thread_name_prefix="finesight-grammars")
        self._lock = threading.Lock()
        self._accepted: OrderedDict[bytes, None] = OrderedDict()

    def is_accepted(self, spec: Spec) -> bool:
        """Return whether a grammar has compiled before."""
        with self._lock:
            return _digest(spec) in self._accepted

    def accept(self, spec: Spec) -> None:
        """Remember that a grammar is valid."""
        with self._lock:
            self._accepted[_digest(spec)] = None
            while len(self._accepted) > REMEMBERED:
                self._accepted.popitem(last=False)

    def create(self, spec: Spec) -> WorkerConstraint:
        """Create the constraint of one answer. Its worker starts with the answer."""
        return WorkerConstraint(self, spec)


def _digest(spec: Spec) -> bytes:
    return hashlib.sha256(json.dumps(spec).encode()).digest()


class WorkerConstraint(Constraint):
    """Constraint whose masks a worker process computes while the model computes logits.

    Attributes:
        failed: Whether the grammar exceeded a limit. Only the end token is allowed then.
    """

    def __init__(self, constraints: Constraints, spec: Spec) -> None:
        self._constraints, self._spec = constraints, spec
        self._starting: Future[Worker] | None = None
        self._worker: Worker | None = None
        self._started: Worker | None = None
        """The worker once it has its first job. Only the thread of the model uses it."""
        self._mask: NDArray[np.int32] | None = None
        self._spent = 0.0
        self._lock = threading.Lock()
        self._closed = False
        self.failed = False

    def begin(self) -> None:
        """Start a worker that compiles the grammar."""
        # In another thread: a large grammar does not fit into the buffer of a socket.
        self._starting = self._constraints.starters.submit(self._start)

    def ready(self, seconds: float) -> bool:
        """Wait up to `seconds` for the next mask. Return whether it is available."""
        if self._mask is not None or self.failed:
            return True
        assert self._starting is not None, f"the mask of a {self._spec[0]} that has not begun"
        try:
            if self._started is None:
                self._started = self._starting.result(seconds)
            if not self._started.ready(seconds):
                return False
            reply = self._started.finish()
        except TimeoutError:
            return False
        except (UserError, WorkerLostError):
            self._fail()
            return True
        self._spent += reply.cpu_seconds
        self._mask = reply.arrays[0].view(np.int32)
        if reply.value["failed"] or self._spent > self._constraints.limits.answer_schema_seconds:
            self._fail()
        return True

    def allow(self) -> NDArray[np.int32]:
        """Return the mask of the next token."""
        while not self.ready(1.0):
            pass
        if self.failed:
            return self._constraints.end_only
        assert self._mask is not None, f"no mask of a {self._spec[0]}"
        return self._mask

    def take(self, token: int) -> None:
        """Accept a token and start to compute the next mask."""
        self._mask = None
        if self.failed or self._started is None:
            return
        try:
            seconds = self._constraints.limits.schema_seconds
            self._started.start(next_mask, token, seconds=seconds)
        except (UserError, WorkerLostError):
            self._fail()

    def close(self) -> None:
        """End the worker. Any thread may call this at any time."""
        with self._lock:
            self._closed = True
            worker = self._worker
        if worker is not None:
            worker.close()

    def _start(self) -> Worker:
        limits = self._constraints.limits
        worker = self._constraints.pool.fork(limits.schema_bytes)
        with self._lock:
            if self._closed:
                worker.close()
            self._worker = worker
        worker.start(compile_grammar, self._spec, True, seconds=limits.schema_seconds)
        return worker

    def _fail(self) -> None:
        self.failed = True
        self.close()
