"""Read video files with PyAV: frame count, frame rate and size, and decoded frames.

Only MP4/QuickTime and Matroska/WebM files are opened, through a file object. The first bytes select
one of these demuxers, so that no playlist or reference to another file is followed. The number of
frames is known without decoding: MP4 files list their frames, and the packets of other files are
counted. Decoding returns exactly these frames, or raises an error.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from finesight.errors import UserError
from finesight.samples.frames import ImageSize
from finesight.samples.image_file import (
    MAX_IMAGE_BYTES,
    MAX_IMAGE_PIXELS,
    CorruptImageError,
    ImageTooLargeError,
    MissingImageError,
    TruncatedImageError,
    build_file_error,
    get_file,
    read_image_size,
    resolve_content,
)
from finesight.samples.parquet_reader import import_extra
from finesight.samples.sample import VIDEO_SUFFIXES, is_video_path

VIDEO_CODECS = ("h264", "hevc", "av1", "vp8", "vp9", "mpeg4", "mjpeg", "prores")
"""Accepted video codecs; the decoders of others are rarely used or fuzzed."""

MAX_VIDEO_FRAMES = 1_000_000
"""Maximum number of frames of a video file: 9 hours at 30 frames per second."""

MAX_FPS_ERROR = 0.25
"""Maximum relative difference between the frame rate in a header and that of the packets."""

MAX_MISSING_SECONDS = 0.5
"""Maximum difference between the duration in the header of a Matroska file and its packets."""

MAX_MISSING_FRACTION = 0.05
"""The same as a fraction of the duration; the larger of the two limits counts."""

_EBML_MAGIC = b"\x1a\x45\xdf\xa3"
"""First bytes of Matroska and WebM files (RFC 8794)."""

_VP8_SHOW_FRAME = 0x10
"""Bit in the first byte of a VP8 packet; packets without it return no frame (RFC 6386, 9.1)."""


@dataclass(frozen=True, slots=True)
class VideoHeader:
    """Properties of a video file.

    Attributes:
        fps: Average frame rate in frames per second.
        size: Height and width in pixels after rotation.
    """

    num_frames: int
    fps: float
    size: ImageSize


def read_video_header(path: Path) -> VideoHeader:
    """Read the properties of a video file. Only its first frame is decoded.

    Raises:
        CorruptImageError: The file is missing, corrupt, truncated or too large, or contains no
            video frames.
        UserError: PyAV is not installed.
    """
    try:
        state = get_file(path).stat()
    except (OSError, ValueError) as error:
        raise build_file_error(path, error_class=MissingImageError) from error
    return _read_header(path, (state.st_ino, state.st_size, state.st_mtime_ns))


def read_visual_size(path: Path) -> ImageSize:
    """Read height and width of an image, or of the frames of a video file."""
    if is_video_path(path):
        return read_video_header(path).size
    return read_image_size(path)


def iter_video_frames(path: Path, frame_indices: Sequence[int]) -> Iterator[Image.Image]:
    """Decode a video file, and yield the frames at increasing indices as RGB images.

    Raises:
        CorruptImageError: A frame cannot be decoded.
    """
    remaining = iter(frame_indices)
    target = next(remaining, None)
    with _open_video(path) as (container, stream):
        for index, frame in enumerate(container.decode(stream)):
            if index == target:
                _check_limit(path, frame.width * frame.height, MAX_IMAGE_PIXELS, "pixels")
                # Threads that convert would outlive the frame, and hang processes forked later.
                image = Image.fromarray(frame.reformat(format="rgb24", threads=1).to_ndarray())
                # Multiples of a right angle are rotated without resampling.
                if frame.rotation % 90:
                    yield image
                else:
                    yield image.rotate(frame.rotation, expand=True)
                target = next(remaining, None)
            if target is None:
                return
    raise _build_truncated_error(path, f"frame {target} of the header cannot be decoded")


@lru_cache(maxsize=4096)
def _read_header(path: Path, version: tuple[int, ...]) -> VideoHeader:
    with _open_video(path) as (container, stream):
        entries = stream.index_entries
        fps = float(stream.average_rate or 0)
        if stream.frames and entries:
            file_size = container.size
            if any(entry.pos + entry.size > file_size for entry in entries):
                raise _build_truncated_error(path, f"{file_size} bytes, fewer than its frames")
            num_frames = sum(not entry.is_discard for entry in entries)
            frame = next(container.decode(stream), None)
        else:
            num_frames, frame, measured_fps = _scan_packets(path, container, stream)
            # Browsers write recordings with a nominal rate of 1,000 frames per second.
            if abs(fps - measured_fps) > MAX_FPS_ERROR * measured_fps > 0:
                fps = measured_fps
        if not num_frames or frame is None or not fps:
            raise build_file_error(path, f"{num_frames} frames at {fps} frames/s", "a video")
        _check_limit(path, frame.width * frame.height, MAX_IMAGE_PIXELS, "pixels")
        if abs(frame.rotation) == 90:
            size = (frame.width, frame.height)
        else:
            size = (frame.height, frame.width)
        return VideoHeader(num_frames, fps, size)


def _scan_packets(path: Path, container: Any, stream: Any) -> tuple[int, Any, float]:
    """Count the packets with a frame, decode the first frame, and measure the frame rate."""
    num_frames = 0
    first_frame = None
    end_s = 0.0
    first_pts = math.inf
    last_pts = -math.inf
    is_vp8 = stream.codec_context.codec.canonical_name == "vp8"
    for packet in container.demux():
        if packet.pts is not None and packet.time_base:
            end_s = max(end_s, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        if packet.stream_index != stream.index:
            continue
        if first_frame is None:
            first_frame = next(iter(packet.decode()), None)
        is_hidden = is_vp8 and packet.size and not memoryview(packet)[0] & _VP8_SHOW_FRAME
        num_frames += bool(packet.size) and not packet.is_discard and not is_hidden
        if packet.pts is not None:
            first_pts = min(first_pts, packet.pts)
            last_pts = max(last_pts, packet.pts)
        _check_limit(path, num_frames, MAX_VIDEO_FRAMES, "frames")
    duration_s = (container.duration or 0) / 1_000_000
    if duration_s - end_s > max(MAX_MISSING_SECONDS, MAX_MISSING_FRACTION * duration_s):
        raise _build_truncated_error(path, f"{end_s:.1f} of {duration_s:.1f} seconds")
    fps = 0.0
    if num_frames > 1:
        span_s = float(last_pts - first_pts) * float(stream.time_base)
        if span_s > 0:
            fps = (num_frames - 1) / span_s
    return num_frames, first_frame, fps


@contextmanager
def _open_video(path: Path) -> Iterator[tuple[Any, Any]]:
    """Open the container and the video stream of a file; translate errors of PyAV."""
    av = import_extra("av", "video", path)
    import_extra("av.stream", "video", path)
    if not is_video_path(path):
        raise build_file_error(path, "not a video file", f"one of {', '.join(VIDEO_SUFFIXES)}")
    if path.exists() and not path.is_file():  # opening a pipe blocks
        raise build_file_error(path, "not a file", "a video file", "correct the path")
    try:
        source = resolve_content(path)
        file = source.open("rb") if isinstance(source, Path) else source
        demuxer = "matroska" if file.read(4) == _EBML_MAGIC else "mov"
        file.seek(0)
        with file, av.open(file, format=demuxer, io_open=_reject_reference) as container:
            _check_limit(path, container.size, MAX_IMAGE_BYTES, "bytes")
            covers = av.stream.Disposition.attached_pic
            streams = [s for s in container.streams.video if not s.disposition & covers]
            if not streams:
                raise build_file_error(path, "no video stream", "a file with video frames")
            stream = streams[0]
            _check_limit(path, stream.frames, MAX_VIDEO_FRAMES, "frames")
            codec = stream.codec_context.codec.canonical_name
            if codec not in VIDEO_CODECS:
                expected = f"one of {', '.join(VIDEO_CODECS)}"
                raise build_file_error(path, f"the codec {codec}", expected)
            context = stream.codec_context
            _check_limit(path, context.width * context.height, MAX_IMAGE_PIXELS, "pixels")
            # Data loader workers already use all CPU cores.
            context.thread_count = 1
            yield container, stream
    except (UserError, MemoryError):
        raise
    except Exception as error:  # PyAV raises various exceptions on corrupt data
        reason = error.strerror if isinstance(error, av.FFmpegError) else error
        raise build_file_error(path, f"corrupt ({reason})", "a complete video file") from error


def _reject_reference(url: str, flags: int, options: dict[str, str]) -> None:
    raise PermissionError(f"a reference to another file, {url[:80]!r}")


def _check_limit(path: Path, count: int, limit: int, what: str) -> None:
    if count > limit:
        raise build_file_error(
            path,
            f"{count} {what}",
            f"at most {limit} {what}",
            "split or downscale the video",
            ImageTooLargeError,
        )


def _build_truncated_error(path: Path, what: str) -> CorruptImageError:
    expected = "a complete video file"
    return build_file_error(path, f"truncated: {what}", expected, error_class=TruncatedImageError)
