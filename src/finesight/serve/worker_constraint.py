"""Constrained decoding with grammars of clients, computed in worker processes.

Grammars are untrusted. llguidance limits the work of a step, but neither the time nor the memory of
a single operation: the bitmask of `.*.*.*...` takes a minute. Each constrained completion therefore
has its own worker process with limits on both. The engine waits for a bitmask for a limited time
only.
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
from finesight.infer.request import DecodingConstraint
from finesight.infer.structured_output import BITMASK_WORD_BITS, build_bitmask
from finesight.serve.server_limits import ServerLimits
from finesight.serve.worker_jobs import (
    GrammarSpec,
    compile_grammar,
    compute_next_bitmask,
)
from finesight.worker_pool import Worker, WorkerLostError, WorkerPool

MAX_ACCEPTED_GRAMMARS = 1024
"""Number of grammars whose successful compilation is remembered."""


class ConstraintFactory:
    """Creates decoding constraints for one model, and remembers valid grammars."""

    def __init__(
        self, pool: WorkerPool, limits: ServerLimits, vocab_size: int, eos_ids: Sequence[int]
    ) -> None:
        self.pool, self.limits = pool, limits
        self.eos_only_bitmask = build_bitmask(eos_ids, -(-vocab_size // BITMASK_WORD_BITS))
        self.start_executor = ThreadPoolExecutor(2, thread_name_prefix="finesight-grammars")
        self._lock = threading.Lock()
        self._accepted: OrderedDict[bytes, None] = OrderedDict()

    def is_accepted(self, spec: GrammarSpec) -> bool:
        """Return whether a grammar has been marked as valid."""
        with self._lock:
            return _hash_grammar(spec) in self._accepted

    def mark_accepted(self, spec: GrammarSpec) -> None:
        """Remember that a grammar can be compiled within the limits."""
        with self._lock:
            self._accepted[_hash_grammar(spec)] = None
            while len(self._accepted) > MAX_ACCEPTED_GRAMMARS:
                self._accepted.popitem(last=False)

    def create(self, spec: GrammarSpec) -> WorkerConstraint:
        """Create the decoding constraint of one completion.

        Its worker process starts when the engine starts the completion.
        """
        return WorkerConstraint(self, spec)


def _hash_grammar(spec: GrammarSpec) -> bytes:
    return hashlib.sha256(json.dumps(spec).encode()).digest()


class WorkerConstraint(DecodingConstraint):
    """Decoding constraint whose token bitmasks are computed in a worker process.

    The worker computes the next bitmask while the model computes logits.

    Attributes:
        has_failed: True if the grammar exceeded a limit. Only end tokens are allowed then.
    """

    def __init__(self, factory: ConstraintFactory, spec: GrammarSpec) -> None:
        self._factory, self._spec = factory, spec
        self._worker_future: Future[Worker] | None = None
        self._worker: Worker | None = None
        self._ready_worker: Worker | None = None
        """Worker process after its first job has started, used by the engine thread only."""
        self._bitmask: NDArray[np.int32] | None = None
        self._cpu_seconds = 0.0
        self._lock = threading.Lock()
        self._closed = False
        self.has_failed = False

    def start(self) -> None:
        """Start the worker process, which compiles the grammar."""
        # In another thread: a large grammar does not fit into the buffer of a socket.
        self._worker_future = self._factory.start_executor.submit(self._start_worker)

    def wait_bitmask(self, timeout_s: float) -> bool:
        """Wait for the bitmask of the next token, and return whether it is available."""
        if self._bitmask is not None or self.has_failed:
            return True
        assert self._worker_future is not None, f"the {self._spec[0]} constraint has not started"
        try:
            if self._ready_worker is None:
                self._ready_worker = self._worker_future.result(timeout_s)
            if not self._ready_worker.wait(timeout_s):
                return False
            reply = self._ready_worker.get_result()
        except TimeoutError:
            return False
        except (UserError, WorkerLostError):
            self._fail()
            return True
        self._cpu_seconds += reply.cpu_seconds
        self._bitmask = reply.arrays[0].view(np.int32)
        if reply.value["failed"] or self._cpu_seconds > self._factory.limits.max_constraint_cpu_s:
            self._fail()
        return True

    def compute_bitmask(self) -> NDArray[np.int32]:
        """Return the bitmask of the next token, waiting as long as necessary."""
        while not self.wait_bitmask(1.0):
            pass
        if self.has_failed:
            return self._factory.eos_only_bitmask
        assert self._bitmask is not None, f"the {self._spec[0]} constraint has no bitmask"
        return self._bitmask

    def accept_token(self, token: int) -> None:
        """Report a generated token, so that the worker computes the next bitmask."""
        self._bitmask = None
        if self.has_failed or self._ready_worker is None:
            return
        try:
            max_cpu_s = self._factory.limits.max_schema_cpu_s
            self._ready_worker.start(compute_next_bitmask, token, max_cpu_s=max_cpu_s)
        except (UserError, WorkerLostError):
            self._fail()

    def close(self) -> None:
        """End the worker process. Any thread may call this method at any time."""
        with self._lock:
            self._closed = True
            worker = self._worker
        if worker is not None:
            worker.close()

    def _start_worker(self) -> Worker:
        limits = self._factory.limits
        worker = self._factory.pool.fork(limits.max_schema_memory_bytes)
        with self._lock:
            if self._closed:
                worker.close()
            self._worker = worker
        worker.start(compile_grammar, self._spec, True, max_cpu_s=limits.max_schema_cpu_s)
        return worker

    def _fail(self) -> None:
        self.has_failed = True
        self.close()
