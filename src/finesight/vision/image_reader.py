"""Read untrusted images in worker processes with limits on time and memory.

A few hundred bytes of JPEG 2000, or a JPEG with thousands of scans, occupy a decoder for a minute
and a gigabyte of memory. Servers and pages therefore read images through `ImageReader` only.
"""

from __future__ import annotations

import io
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from finesight.errors import UserError
from finesight.files.worker_pool import JobOutput, WorkerLostError, WorkerPool
from finesight.samples.frames import ImageSize
from finesight.samples.image_file import CorruptImageError, decode_image, list_pages, sha256_content
from finesight.samples.sample import is_video_path
from finesight.samples.video_file import iter_video_frames, read_video_header, read_visual_size
from finesight.vision.image_processing import load_image

MAX_IMAGE_CPU_S = 4.0
"""CPU seconds to decode an image of up to `LIMITED_PIXELS` and to encode a copy of it."""

LIMITED_PIXELS = 8_000_000
"""Pixels above which the limit of an image is proportional to its pixels."""

MAX_LIMIT_FACTOR = 5.0
"""Maximum ratio of the limit of a large image to `MAX_IMAGE_CPU_S`."""

MAX_VIDEO_CPU_S = 120.0
"""CPU seconds to decode a video file."""

MAX_VIDEO_START_CPU_S = 20.0
"""CPU seconds to read the header and first frame of a video file."""

MAX_WORKER_MEMORY_BYTES = 1 << 30
NUM_IMAGE_WORKERS = 2


@dataclass(frozen=True, slots=True)
class ImageReader:
    """Reads untrusted images in worker processes. Its methods block, and are thread-safe.

    They raise CorruptImageError for a file that is not an image, or that exceeds the limits on
    pixels, time or memory.

    Attributes:
        pool: Worker processes, such as those of `create_image_pool`. Jobs ignore their state.
    """

    pool: WorkerPool

    def read_size(self, path: Path) -> ImageSize:
        """Read height and width of an image in pixels, after EXIF rotation, from its header."""
        height, width = self.call(read_size, path).value
        return int(height), int(width)

    def list_pages(self, path: Path) -> list[Path]:
        """Return the pages of a document; see `list_pages` of `data.image_file`."""
        return list(map(Path, self.call(_list_pages, path).value))

    def check(self, path: Path) -> str:
        """Decode an image or a video file, so that this process may decode it afterwards.

        Returns:
            A key that is equal for images with equal pixels, and for equal video files.
        """
        return str(self.call(decode_pixels, path).value)

    def load(self, path: Path, min_side: int | None = None) -> Image.Image:
        """Decode an image as upright RGB; see `load_image`."""
        return Image.fromarray(self.call(load_pixels, path, min_side).arrays[0].view(np.uint8))

    def encode(
        self, path: Path, max_side: int, image_format: str = "WEBP"
    ) -> tuple[ImageSize, bytes, ImageSize]:
        """Encode a copy of an image or first video frame, without metadata.

        Returns:
            Size of the original, content of the copy, and size of the copy.
        """
        reply = self.call(_encode_copy, path, max_side, image_format)
        height, width, copy_height, copy_width = map(int, reply.value)
        return (height, width), reply.arrays[0].tobytes(), (copy_height, copy_width)

    def call(self, job: Callable[..., JobOutput], path: Path, *args: Any) -> JobOutput:
        """Run `job(state, path, *args)` in a worker process. Its errors name the image."""
        try:
            with self.pool.borrow_worker() as worker:
                if is_video_path(path):
                    seconds = MAX_VIDEO_CPU_S if job is decode_pixels else MAX_VIDEO_START_CPU_S
                    return worker.call(job, path, *args, max_cpu_s=seconds)
                if job in (read_size, _list_pages):
                    return worker.call(job, path, max_cpu_s=MAX_IMAGE_CPU_S)
                size = worker.call(read_size, path, max_cpu_s=MAX_IMAGE_CPU_S)
                factor = min(max(1.0, math.prod(size.value) / LIMITED_PIXELS), MAX_LIMIT_FACTOR)
                return worker.call(job, path, *args, max_cpu_s=MAX_IMAGE_CPU_S * factor)
        except WorkerLostError as error:
            raise CorruptImageError("not read: the server stops", where=str(path)) from error
        except UserError as error:
            raise CorruptImageError(
                error.what,
                where=error.where or str(path),
                expected=error.expected,
                remedy=error.remedy,
            ) from error


def create_image_pool(state: Any = None, module: str = "") -> WorkerPool:
    """Create worker processes for `ImageReader`, and for another job; a job starts them.

    Args:
        state: State of the jobs.
        module: Module of the job, which the template process imports, so that no worker has to.
    """
    return WorkerPool(
        load_state,
        state,
        module,
        num_idle=NUM_IMAGE_WORKERS,
        memory_bytes=MAX_WORKER_MEMORY_BYTES,
    )


def load_state(state: Any, module: str) -> Any:
    """Load the decoders of Pillow in the template process; return the jobs' state."""
    Image.init()
    if module:
        import_module(module)
    return state


def read_size(state: Any, path: Path) -> JobOutput:
    """Read the size of an image or video in a worker process."""
    return JobOutput(read_visual_size(path))


def _list_pages(state: Any, path: Path) -> JobOutput:
    return JobOutput([str(page) for page in list_pages(path)])


def decode_pixels(state: Any, path: Path) -> JobOutput:
    """Decode an image or video file in a worker process; return its content key."""
    if is_video_path(path):
        deque(iter_video_frames(path, [read_video_header(path).num_frames - 1]), maxlen=0)
        return JobOutput(sha256_content(path))
    return JobOutput(repr(decode_image(path, with_key=True)[1]))


def load_pixels(state: Any, path: Path, min_side: int | None) -> JobOutput:
    """Decode an image in a worker process."""
    return JobOutput(arrays=[np.asarray(load_image(path, min_side=min_side))])


def _encode_copy(state: Any, path: Path, max_side: int, image_format: str) -> JobOutput:
    size = read_visual_size(path)
    frames = iter_video_frames(path, [0]) if is_video_path(path) else iter(())
    image = next(frames, None) or load_image(path, min_side=max_side)
    image.thumbnail((max_side, max_side))
    buffer = io.BytesIO()
    image.save(buffer, format=image_format, quality=90)
    content = np.frombuffer(buffer.getvalue(), np.uint8)
    return JobOutput((*size, image.height, image.width), [content])
