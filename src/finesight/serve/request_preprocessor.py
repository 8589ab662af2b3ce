"""Preprocess a request in worker processes: parsing, tokenization and image decoding."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finesight.encode.tokenized_sample import EncodedSample, TokenizedSample, VisualSpan
from finesight.errors import UserError
from finesight.serve.api_errors import ApiError, ClientDisconnectedError, from_user_error
from finesight.serve.chat_schema import ChatCompletionParameters
from finesight.serve.message_conversion import get_image_name
from finesight.serve.server_limits import ServerLimits
from finesight.serve.worker_jobs import (
    GrammarSpec,
    compile_grammar,
    inspect_image,
    load_image_patches,
    parse_request,
    tokenize_sample,
)
from finesight.vision.patches import concat_patches
from finesight.worker_pool import JobOutput, Worker, WorkerLostError, WorkerPool, WorkerReply

MAX_CHARS_PER_TOKEN = 16
"""Maximum number of characters per token of the context length.

Longer texts are rejected before tokenization.
"""


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """Reference to an image in a request.

    Attributes:
        image_number: Number of the image in the request, from 1.
        param: Path of its field in the request body.
        url: URL to fetch the image from. None for a data URL or an uploaded file.
        file_id: ID of an uploaded file. None for other images.
    """

    image_number: int
    param: str
    url: str | None
    file_id: str | None

    @property
    def is_remote(self) -> bool:
        """True if the image is not part of the request body."""
        return self.url is not None or self.file_id is not None


@dataclass(frozen=True, slots=True)
class ParsedBody:
    """Parsed body of a chat completion request.

    Attributes:
        chat_request: All fields except for the messages.
        images: Images in the order of the messages.
        sample_json: Conversation as JSON text, the input of `RequestPreprocessor.encode`.
    """

    chat_request: ChatCompletionParameters
    images: tuple[ImageRequest, ...]
    sample_json: NDArray[np.uint8]


@dataclass(slots=True)
class RequestPreprocessor:
    """Preprocesses one request in worker processes, within the limits of the server.

    The methods block. Any thread may call `cancel`; the blocked method then raises
    ClientDisconnectedError.

    Attributes:
        worker_pool: Worker processes with the state of `worker_jobs.load_worker_state`.
        limits: Limits of the server.
        image_formats: Accepted image formats.
        folder: Private folder of the request, which contains its images.
        deadline: Time at which the request is canceled, on the clock of `time.monotonic`.
    """

    worker_pool: WorkerPool
    limits: ServerLimits
    image_formats: Sequence[str]
    folder: Path
    deadline: float = np.inf
    _cpu_seconds: float = 0.0
    _worker: Worker | None = None
    _is_cancelled: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def cancel(self) -> None:
        """Stop the preprocessing of the request by ending its worker process."""
        with self._lock:
            self._is_cancelled = True
            if self._worker is not None:
                self._worker.kill()

    def parse_body(self, body: NDArray[np.uint8], max_model_len: int) -> ParsedBody:
        """Parse and validate a request body, and write images of data URLs to the folder.

        Raises:
            ApiError: The request is invalid or exceeds a limit.
        """
        max_chars = min(self.limits.max_text_chars, MAX_CHARS_PER_TOKEN * max_model_len)
        with self._borrow_worker() as worker:
            reply = self._call(worker, parse_request, body, self.folder, self.limits, max_chars)
        if "api_error" in reply.value:
            status, message, param, code = reply.value["api_error"]
            raise ApiError(status, message, param, code)
        return ParsedBody(
            ChatCompletionParameters.model_validate(reply.value["parameters"]),
            tuple(ImageRequest(*image) for image in reply.value["images"]),
            reply.arrays[0].view(np.uint8),
        )

    def encode(self, body: ParsedBody, max_model_len: int) -> EncodedSample:
        """Tokenize the conversation of a request, then decode its images in the folder.

        Raises:
            ApiError: An image is invalid, or the request exceeds a limit.
        """
        with self._borrow_worker() as worker:
            for image in body.images:
                self._inspect_image(
                    worker, self.folder / get_image_name(image.image_number), image.param
                )
            reply = self._call(
                worker, tokenize_sample, body.sample_json, self.folder, max_model_len
            )
            patches = [
                self._call(worker, load_image_patches, index, param=image.param).arrays[0]
                for index, image in enumerate(body.images)
            ]
        empty_patches = np.empty((0, reply.value["patch_dim"]), dtype=np.uint8)
        decoded = [array.view(np.uint8) for array in patches]
        return EncodedSample(
            _build_tokenized_sample(reply, self.folder), concat_patches(decoded or [empty_patches])
        )

    def inspect_image(self, path: Path, param: str) -> None:
        """Raise ApiError if a file is not an image of an accepted format and size."""
        with self._borrow_worker() as worker:
            self._inspect_image(worker, path, param)

    def check_grammar(self, spec: GrammarSpec, param: str) -> None:
        """Raise ApiError if a grammar cannot be compiled within the limits."""
        seconds = self.limits.max_schema_cpu_s
        with (
            self._translate_errors(param, self.folder),
            self.worker_pool.fork(self.limits.max_schema_memory_bytes) as worker,
            self._cancellable(worker),
        ):
            self._call(worker, compile_grammar, spec, False, param=param, max_cpu_s=seconds)

    def _inspect_image(self, worker: Worker, path: Path, param: str) -> None:
        limits = (path, self.limits.max_image_pixels, self.image_formats)
        self._call(worker, inspect_image, *limits, param=param, folder=path.parent)

    @contextlib.contextmanager
    def _borrow_worker(self) -> Iterator[Worker]:
        with (
            self._translate_errors("messages", self.folder),
            self.worker_pool.borrow_worker() as worker,
            self._cancellable(worker),
        ):
            yield worker

    @contextlib.contextmanager
    def _cancellable(self, worker: Worker) -> Iterator[None]:
        """Allow `cancel` to end this worker process within a `with` block."""
        with self._lock:
            self._worker = worker
            if self._is_cancelled:
                worker.kill()
        try:
            yield
        finally:
            with self._lock:
                self._worker = None

    def _call(
        self,
        worker: Worker,
        job: Callable[..., JobOutput],
        *args: Any,
        param: str = "messages",
        max_cpu_s: float = np.inf,
        folder: Path | None = None,
    ) -> WorkerReply:
        remaining_s = self.limits.max_request_cpu_s - self._cpu_seconds
        if remaining_s <= 0:
            raise ApiError(
                400,
                f"preprocessing took {self._cpu_seconds:.1f} s of CPU time; send a smaller request",
                param,
            )
        max_cpu_s = min(
            self.limits.max_image_cpu_s if max_cpu_s == np.inf else max_cpu_s, remaining_s
        )
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
            if self._is_cancelled:
                raise ClientDisconnectedError from error
            raise ApiError(503, "the server is stopping", retry_after_s=5) from error
        except UserError as error:
            if time.monotonic() >= self.deadline:
                raise TimeoutError from error
            raise from_user_error(error, param, hidden_path=f"{folder}/") from error


def _build_tokenized_sample(reply: WorkerReply, folder: Path) -> TokenizedSample:
    ids_T, positions_3T = reply.arrays
    spans = tuple(
        VisualSpan(
            kind="image",
            start=start,
            stop=stop,
            grid_thw=tuple(grid),
            files=(folder / name,),
            original_size=tuple(original_size),
            resized_size=tuple(resized_size),
        )
        for start, stop, grid, name, original_size, resized_size in reply.value["spans"]
    )
    return TokenizedSample(
        id="request",
        ids_T=ids_T.view(np.int32),
        loss_mask_T=np.zeros(len(ids_T), dtype=np.bool_),
        position_ids_3T=positions_3T.view(np.int32),
        spans=spans,
    )
