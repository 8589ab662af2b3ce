"""Answers held to a grammar that is compiled and followed in a process of its own.

Grammars come from strangers. llguidance bounds the work of a step, but neither the time of a single
operation nor its memory: the mask of `.*.*.*...` takes a minute. So each constrained answer has a
worker process, with limits on both, which is killed past them. The model never waits for it longer
than `infer.engine.PATIENCE_SECONDS`.
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
from finesight.infer.constrain import WIDTH, only
from finesight.infer.request import Constraint
from finesight.serve.limits import Limits
from finesight.serve.worker_jobs import Spec, compile_grammar, next_mask
from finesight.worker_pool import Worker, WorkerLostError, WorkerPool

REMEMBERED = 1024
"""Grammars that are known to compile, by digest."""


class Constraints:
    """Makes constraints for the answers of one model, and remembers which grammars compile."""

    def __init__(
        self, pool: WorkerPool, limits: Limits, vocabulary: int, end_ids: Sequence[int]
    ) -> None:
        self.pool, self.limits = pool, limits
        self.end_only = only(end_ids, -(-vocabulary // WIDTH))
        self.starters = ThreadPoolExecutor(2, thread_name_prefix="finesight-grammars")
        self._lock = threading.Lock()
        self._accepted: OrderedDict[bytes, None] = OrderedDict()

    def is_accepted(self, spec: Spec) -> bool:
        """Whether a grammar has compiled before."""
        with self._lock:
            return _digest(spec) in self._accepted

    def accept(self, spec: Spec) -> None:
        """Remember that a grammar compiles."""
        with self._lock:
            self._accepted[_digest(spec)] = None
            while len(self._accepted) > REMEMBERED:
                self._accepted.popitem(last=False)

    def follow(self, spec: Spec) -> WorkerConstraint:
        """Make the constraint of one answer. Its process starts when the answer does."""
        return WorkerConstraint(self, spec)


def _digest(spec: Spec) -> bytes:
    return hashlib.sha256(json.dumps(spec).encode()).digest()


class WorkerConstraint(Constraint):
    """Constraint that is computed by a worker process, while the model computes logits.

    `failed` says that the grammar went over a limit: only the end of the answer is allowed then.
    """

    def __init__(self, constraints: Constraints, spec: Spec) -> None:
        self._constraints, self._spec = constraints, spec
        self._starting: Future[Worker] | None = None
        self._worker: Worker | None = None
        self._started: Worker | None = None
        """The same, once it has its first job: only the thread of the model uses it then."""
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
        """Wait up to `seconds` for the mask of the next token; return whether `allow` has it."""
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
        """Return the mask; past a limit, it allows only the end."""
        while not self.ready(1.0):
            pass
        if self.failed:
            return self._constraints.end_only
        assert self._mask is not None, f"no mask of a {self._spec[0]}"
        return self._mask

    def take(self, token: int) -> None:
        """Let the worker compute the mask after this token."""
        self._mask = None
        if self.failed or self._started is None:
            return
        try:
            seconds = self._constraints.limits.schema_seconds
            self._started.start(next_mask, token, seconds=seconds)
        except (UserError, WorkerLostError):
            self._fail()

    def close(self) -> None:
        """End the worker; any thread may do so at any time."""
        with self._lock:
            self._closed = True
            worker = self._worker
        if worker is not None:
            worker.kill()

    def _start(self) -> Worker:
        limits = self._constraints.limits
        worker = self._constraints.pool.fork(limits.schema_bytes)
        with self._lock:
            if self._closed:
                worker.kill()
            self._worker = worker
        worker.start(compile_grammar, self._spec, True, seconds=limits.schema_seconds)
        return worker

    def _fail(self) -> None:
        self.failed = True
        self.close()
