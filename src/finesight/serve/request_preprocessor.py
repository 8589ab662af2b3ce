"""Preprocess requests in worker processes: parsing, tokenization, image decoding and grammars.

Grammars are untrusted as well. llguidance limits the work of a step, but neither the time nor the
memory of a single operation: the bitmask of `.*.*.*...` takes a minute. Each constrained completion
therefore has its own worker process with limits on both. The engine waits for a bitmask for a
limited time only.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from pickle import PickleBuffer
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finesight.encode.family import DEFAULT_THINKING, ThinkingOptions
from finesight.encode.tokenization import (
    EncodedSample,
    VisualSpan,
    iter_video_runs,
    unpack_tokenized,
)
from finesight.errors import UserError
from finesight.files.worker_pool import (
    JobCancellation,
    JobOutput,
    Worker,
    WorkerLostError,
    WorkerPool,
)
from finesight.infer.request import DecodingConstraint
from finesight.infer.structured_output import BITMASK_WORD_BITS, build_bitmask
from finesight.samples.image_file import split_page
from finesight.samples.prompt_format import DEFAULT_PROMPT_FORMAT, PromptFormat
from finesight.serve.api_schema import (
    ApiError,
    ChatCompletionParameters,
    ClientDisconnectedError,
    ServerLimits,
    from_user_error,
)
from finesight.serve.preprocessing_jobs import (
    GrammarSpec,
    MediaFile,
    compile_grammar,
    compute_next_bitmask,
    inspect_file,
    load_patches,
    parse_label_studio_request,
    parse_request,
    tokenize_sample,
)
from finesight.vision.image_processing import concat_patches

MAX_CHARS_PER_TOKEN = 16
"""Maximum number of characters per token of the context length, checked before tokenization."""

MAX_ACCEPTED_GRAMMARS = 1024
"""Number of grammars whose successful compilation is remembered."""


@dataclass(frozen=True, slots=True)
class ParsedBody:
    """Parsed body: fields except for the messages, files, and conversation as JSON text."""

    chat_request: ChatCompletionParameters
    files: tuple[MediaFile, ...]
    sample_json: NDArray[np.uint8]


@dataclass(slots=True)
class RequestPreprocessor:
    """Preprocesses one request in worker processes, within the limits of the server.

    The methods block. Any thread may call `cancel`; the blocked method then raises
    ClientDisconnectedError. `folder` contains the images and videos of the request. The deadline is
    on the clock of `time.monotonic`. `has_training_form` tells whether all questions of
    the last encoded conversation have the form of the training, such as the image before the text.
    """

    worker_pool: WorkerPool
    limits: ServerLimits
    image_formats: Sequence[str]
    folder: Path
    deadline: float = np.inf
    has_training_form: bool = True
    _cpu_seconds: float = 0.0
    _cancellation: JobCancellation = field(default_factory=JobCancellation)

    def cancel(self) -> None:
        """Stop the preprocessing of the request by ending its worker process."""
        self._cancellation.cancel()

    def parse_body(self, body: bytearray, max_model_len: int) -> ParsedBody:
        """Parse and validate a request body, and write its data URLs to files."""
        max_chars = min(self.limits.max_text_chars, MAX_CHARS_PER_TOKEN * max_model_len)
        with self._borrow_worker() as worker:
            args = PickleBuffer(body), self.folder, self.limits, max_chars
            reply = self._call(worker, parse_request, *args)
        if "api_error" in reply.value:
            status, message, param, code = reply.value["api_error"]
            raise ApiError(status, message, param, code)
        return ParsedBody(
            ChatCompletionParameters.model_validate(reply.value["parameters"]),
            tuple(MediaFile(*file) for file in reply.value["files"]),
            reply.arrays[0].view(np.uint8),
        )

    def encode(
        self,
        body: ParsedBody,
        max_model_len: int,
        thinking: ThinkingOptions = DEFAULT_THINKING,
        prompt_format: PromptFormat = DEFAULT_PROMPT_FORMAT,
    ) -> EncodedSample:
        """Tokenize the conversation of a request, then decode the files in its folder.

        Sets `has_training_form`.
        """
        params = {file.name: file.param for file in body.files}
        with self._borrow_worker() as worker:
            for name, param in params.items():
                self._inspect_file(worker, self.folder / name, param)
            options = self.folder, max_model_len, thinking, prompt_format
            reply = self._call(worker, tokenize_sample, body.sample_json, *options)
            self.has_training_form = reply.value["has_training_form"]
            tokenized, patch_dim = unpack_tokenized(reply, "request"), reply.value["patch_dim"]
            self._check_number(tokenized.spans)
            patches, start = list[NDArray[np.uint8]](), 0
            for run in iter_video_runs(tokenized.spans):
                param = params[split_page(run[0].files[0].name)[0]]
                is_video, stop = run[0].kind == "video", start + len(run)
                max_cpu_s = self.limits.max_request_cpu_s if is_video else None
                reply = self._call(
                    worker, load_patches, start, stop, param=param, max_cpu_s=max_cpu_s
                )
                patches.append(reply.arrays[0].view(np.uint8))
                start = stop
        empty_patches = np.empty((0, patch_dim), dtype=np.uint8)
        return EncodedSample(tokenized, concat_patches(patches or [empty_patches]))

    def _check_number(self, spans: Sequence[VisualSpan]) -> None:
        """Raise ApiError for too many images with pages, or sampled frames of videos."""
        for kind, limit, unit in (
            ("image", self.limits.max_images, "images with pages"),
            ("video", self.limits.max_video_frames, "video frames"),
        ):
            number = sum(span.num_frames for span in spans if span.kind == kind)
            if number > limit:
                message = f"messages: {number} {unit}; expected at most {limit}"
                raise ApiError(400, message, "messages")

    def parse_label_studio_body(self, body: bytearray) -> dict[str, Any]:
        """Parse a request of Label Studio; see `parse_label_studio_request`."""
        args = PickleBuffer(body), self.limits.max_label_studio_answers
        with self._borrow_worker() as worker:
            value = self._call(worker, parse_label_studio_request, *args, param="tasks").value
        assert isinstance(value, dict), f"the worker returned {type(value)}"
        return value

    def inspect_file(self, path: Path, param: str) -> None:
        """Raise ApiError if a file is not an image of an accepted format and size."""
        with self._borrow_worker() as worker:
            self._inspect_file(worker, path, param)

    def check_grammar(
        self, spec: GrammarSpec, param: str, thinking: ThinkingOptions = DEFAULT_THINKING
    ) -> None:
        """Raise ApiError if a grammar cannot be compiled within the limits."""
        seconds = self.limits.max_schema_cpu_s
        with (
            self._translate_errors(param, self.folder),
            self.worker_pool.fork(self.limits.max_schema_memory_bytes) as worker,
            self._cancellation.hold(worker),
        ):
            args = spec, False, thinking
            self._call(worker, compile_grammar, *args, param=param, max_cpu_s=seconds)

    def _inspect_file(self, worker: Worker, path: Path, param: str) -> None:
        args = path, self.limits, self.image_formats
        self._call(worker, inspect_file, *args, param=param, folder=path.parent)

    @contextlib.contextmanager
    def _borrow_worker(self) -> Iterator[Worker]:
        # Also a request that waited for a thread of this server.
        if self._cancellation.is_cancelled:
            raise ClientDisconnectedError
        with (
            self._translate_errors("messages", self.folder),
            self.worker_pool.borrow_worker() as worker,
            self._cancellation.hold(worker),
        ):
            yield worker

    def _call(
        self,
        worker: Worker,
        job: Callable[..., JobOutput],
        *args: Any,
        param: str = "messages",
        max_cpu_s: float | None = None,
        folder: Path | None = None,
    ) -> JobOutput:
        used_s = self._cpu_seconds
        remaining_s = self.limits.max_request_cpu_s - used_s
        if remaining_s <= 0:
            message = f"preprocessing took {used_s:.1f} s of CPU time; send a smaller request"
            raise ApiError(400, message, param)
        max_cpu_s = min(max_cpu_s or self.limits.max_image_cpu_s, remaining_s)
        with self._translate_errors(param, folder or self.folder):
            reply = worker.call(job, *args, max_cpu_s=max_cpu_s, deadline=self.deadline)
        self._cpu_seconds += reply.cpu_seconds
        return reply

    @contextlib.contextmanager
    def _translate_errors(self, param: str, folder: Path) -> Iterator[None]:
        """Convert errors of worker processes to API errors within a `with` block."""
        try:
            yield
        except WorkerLostError as error:
            if self._cancellation.is_cancelled:
                raise ClientDisconnectedError from error
            raise ApiError(503, "the server is stopping", retry_after_s=5) from error
        except UserError as error:
            if time.monotonic() >= self.deadline:
                raise TimeoutError from error
            raise from_user_error(error, param, hidden_path=f"{folder}/") from error


class ConstraintFactory:
    """Resources of all decoding constraints of one model, and its valid grammars."""

    def __init__(
        self, pool: WorkerPool, limits: ServerLimits, vocab_size: int, eos_ids: Sequence[int]
    ) -> None:
        self.pool, self.limits = pool, limits
        self.eos_only_bitmask = build_bitmask(eos_ids, -(-vocab_size // BITMASK_WORD_BITS))
        self.start_executor = ThreadPoolExecutor(2, thread_name_prefix="finesight-grammars")
        self._lock = threading.Lock()
        self._accepted: OrderedDict[bytes, None] = OrderedDict()

    def check_once(self, spec: GrammarSpec, check: Callable[[], None]) -> None:
        """Check a grammar, unless it is known to be compiled within the limits."""
        digest = hashlib.sha256(json.dumps(spec).encode()).digest()
        if digest not in self._accepted:
            check()
            with self._lock:
                self._accepted[digest] = None
                while len(self._accepted) > MAX_ACCEPTED_GRAMMARS:
                    self._accepted.popitem(last=False)


class WorkerConstraint(DecodingConstraint):
    """Decoding constraint of one completion, computed in its own worker process.

    The process starts when the engine starts the completion. It computes the next bitmask while the
    model computes logits. `has_failed` is true if the grammar exceeded a limit. Only end tokens are
    allowed then.
    """

    def __init__(
        self,
        factory: ConstraintFactory,
        spec: GrammarSpec,
        thinking: ThinkingOptions = DEFAULT_THINKING,
    ) -> None:
        self._factory, self._spec, self._thinking = factory, spec, thinking
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
        args = self._spec, True, self._thinking
        worker.start(compile_grammar, *args, max_cpu_s=limits.max_schema_cpu_s)
        return worker

    def _fail(self) -> None:
        self.has_failed = True
        self.close()
