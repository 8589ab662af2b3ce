"""Preparation of a request in worker processes: parsing, tokenization, image decoding."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finesight.encode.encoded import Encoded, Outline, Span
from finesight.errors import UserError
from finesight.serve.conversation import image_name
from finesight.serve.errors import ClientGone, Refused, refused
from finesight.serve.limits import Limits
from finesight.serve.schema import Parameters
from finesight.serve.worker_jobs import (
    Spec,
    compile_grammar,
    encode_outline,
    image_patches,
    inspect_image,
    read_body,
)
from finesight.vision.patches import end_to_end
from finesight.worker_pool import Worker, WorkerLostError, WorkerPool, WorkerReply
from finesight.worker_process import Output

CHARACTERS_PER_TOKEN = 16
"""Longer texts, per token of the context length, are refused before tokenization."""


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """Image of a request.

    Attributes:
        number: Number of the image in the request, from 1.
        param: Path of its field in the body.
        url: URL to fetch it from, None for a data URL.
        file_id: Id of the uploaded file, if it is one.
    """

    number: int
    param: str
    url: str | None
    file_id: str | None

    @property
    def remote(self) -> bool:
        """Return whether the image is not part of the body."""
        return self.url is not None or self.file_id is not None


@dataclass(frozen=True, slots=True)
class Body:
    """Parsed body of a request.

    Attributes:
        question: All fields except for the messages.
        images: Images in the order of the messages.
        sample: Conversation as JSON, for `Preparation.encode`.
    """

    question: Parameters
    images: tuple[ImageRequest, ...]
    sample: NDArray[np.uint8]


@dataclass(slots=True)
class Preparation:
    """Prepares one request in workers of the pool, within its limits.

    The methods block. Any thread may call `cancel`: a blocked method raises ClientGone then.

    Attributes:
        pool: Workers whose state is `load_state` of the model.
        limits: Limits of the server.
        formats: Formats that images may have.
        folder: Private folder of the request, which holds its images.
        deadline: End of the request on the clock of `time.monotonic`.
    """

    pool: WorkerPool
    limits: Limits
    formats: Sequence[str]
    folder: Path
    deadline: float = np.inf
    _spent: float = 0.0
    _worker: Worker | None = None
    _cancelled: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def cancel(self) -> None:
        """Stop the preparation."""
        with self._lock:
            self._cancelled = True
            if self._worker is not None:
                self._worker.kill()

    def read(self, body: NDArray[np.uint8], max_tokens: int) -> Body:
        """Parse and check a body, and write images of data URLs to the folder. Raises Refused."""
        characters = min(self.limits.text_characters, CHARACTERS_PER_TOKEN * max_tokens)
        with self._working() as worker:
            reply = self._call(worker, read_body, body, self.folder, self.limits, characters)
        if "refused" in reply.value:
            status, message, param, code = reply.value["refused"]
            raise Refused(status, message, param, code)
        return Body(
            Parameters.model_validate(reply.value["question"]),
            tuple(ImageRequest(*image) for image in reply.value["images"]),
            reply.arrays[0].view(np.uint8),
        )

    def encode(self, body: Body, max_tokens: int) -> Encoded:
        """Tokenize the conversation, then decode its images. Raises Refused."""
        with self._working() as worker:
            for image in body.images:
                self._inspect(worker, self.folder / image_name(image.number), image.param)
            reply = self._call(worker, encode_outline, body.sample, self.folder, max_tokens)
            patches = [
                self._call(worker, image_patches, number, param=image.param).arrays[0]
                for number, image in enumerate(body.images)
            ]
        none = np.empty((0, reply.value["width"]), dtype=np.uint8)
        decoded = [array.view(np.uint8) for array in patches]
        return Encoded(_outline(reply, self.folder), end_to_end(decoded or [none]))

    def inspect(self, path: Path, param: str) -> None:
        """Raise Refused for a file that is no image of the formats, or too large."""
        with self._working() as worker:
            self._inspect(worker, path, param)

    def check_grammar(self, spec: Spec, param: str) -> None:
        """Raise Refused for a grammar that cannot be compiled within the limits."""
        seconds = self.limits.schema_seconds
        with (
            self._answering(param, self.folder),
            self.pool.fork(self.limits.schema_bytes) as worker,
            self._held(worker),
        ):
            self._call(worker, compile_grammar, spec, False, param=param, seconds=seconds)

    def _inspect(self, worker: Worker, path: Path, param: str) -> None:
        limits = (path, self.limits.picture_pixels, self.formats)
        self._call(worker, inspect_image, *limits, param=param, folder=path.parent)

    @contextlib.contextmanager
    def _working(self) -> Iterator[Worker]:
        with (
            self._answering("messages", self.folder),
            self.pool.worker() as worker,
            self._held(worker),
        ):
            yield worker

    @contextlib.contextmanager
    def _held(self, worker: Worker) -> Iterator[None]:
        """Allow `cancel` to kill this worker within the block."""
        with self._lock:
            self._worker = worker
            if self._cancelled:
                worker.kill()
        try:
            yield
        finally:
            with self._lock:
                self._worker = None

    def _call(
        self,
        worker: Worker,
        job: Callable[..., Output],
        *args: Any,
        param: str = "messages",
        seconds: float = np.inf,
        folder: Path | None = None,
    ) -> WorkerReply:
        left = self.limits.prepare_seconds - self._spent
        if left <= 0:
            raise Refused(
                400, f"took {self._spent:.1f} s of processor time to read: ask for less", param
            )
        seconds = min(self.limits.image_seconds if seconds == np.inf else seconds, left)
        with self._answering(param, folder or self.folder):
            reply = worker.call(job, *args, seconds=seconds, deadline=self.deadline)
        self._spent += reply.cpu_seconds
        return reply

    @contextlib.contextmanager
    def _answering(self, param: str, folder: Path) -> Iterator[None]:
        """Convert errors of workers to responses."""
        try:
            yield
        except WorkerLostError as error:
            if self._cancelled:
                raise ClientGone from error
            raise Refused(503, "the server is stopping", wait=5) from error
        except UserError as error:
            raise refused(error, param, hidden=f"{folder}/") from error


def _outline(reply: WorkerReply, folder: Path) -> Outline:
    ids_T, positions_3T = reply.arrays
    spans = tuple(
        Span(
            kind="image",
            start=start,
            stop=stop,
            grid=tuple(grid),
            files=(folder / name,),
            original=tuple(original),
            resized=tuple(resized),
        )
        for start, stop, grid, name, original, resized in reply.value["spans"]
    )
    return Outline(
        id="question",
        ids_T=ids_T.view(np.int32),
        learned_T=np.zeros(len(ids_T), dtype=np.bool_),
        positions_3T=positions_3T.view(np.int32),
        spans=spans,
    )
