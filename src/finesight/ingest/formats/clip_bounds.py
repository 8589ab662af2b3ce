"""Bounds of clips under keys of a video or of its row, such as `video_start` and `video_end`.

An import does not cut videos. It refuses bounds that are not those of the complete video, because
a model would be trained on other frames than those of the answer.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finesight.errors import UserError
from finesight.ingest.formats.row_keys import UnsupportedKeyError, split_words
from finesight.samples.sample import ContentPart, VideoPart
from finesight.samples.video_file import read_video_header

MAX_CLIP_DIFFERENCE = 0.05
"""Maximum seconds by which bounds of a complete video may end before it."""

MAX_CLIP_EXCESS = 1.0
"""Maximum seconds after the end of a video; later bounds may have another unit."""

_START = re.compile("start|begin")
_END = re.compile("end|stop")
_SPAN = re.compile("segments?|clips?|bounds?|range|interval|span|window|trim|timestamps?")
_QUALIFIER = re.compile(
    "video|vid|seg|cut|times?|sec|secs|seconds?|s|ms|milliseconds?|frames?|idx|index|offset|pos"
    "|position|point"
)
_KEY = re.compile(f"(?:{_START.pattern}|{_END.pattern}|{_SPAN.pattern}|{_QUALIFIER.pattern})")
_FRAMES = re.compile("frames?")
_MILLISECONDS = re.compile("ms|milliseconds?")
_TIMECODE = re.compile(r"(?:(?:(\d+):)?(\d{1,2}):)?(\d+(?:\.\d+)?)s?")
_SPAN_SEPARATOR = re.compile(r"\s*(?:,|;|~|–|-|\bto\b)\s*")


@dataclass(slots=True)
class ClipBounds:
    """Bounds of a clip of a video; None for an open start or end.

    Attributes:
        keys: Keys of the bounds, with their values as text.
        unit: Seconds of a unit; None for numbers of frames.
    """

    keys: dict[str, str] = field(default_factory=dict)
    start: float | None = None
    end: float | None = None
    unit: float | None = 1.0


def check_clip_bounds(
    values: Mapping[str, Any], parts: Sequence[ContentPart], level: str
) -> list[str]:
    """Reject bounds of a clip, which an import does not cut; return the keys of other bounds.

    Args:
        values: Keys of the part of a video or of its row.
        parts: The part of the video, or all parts of the row.
        level: Kind of the object in the plural.

    Raises:
        UnsupportedKeyError: The bounds do not cover the complete videos.
    """
    videos = [part for part in parts if isinstance(part, VideoPart)]
    if not videos:
        return []
    bounds = find_clip_bounds(values)
    if not bounds.keys or all(_is_complete(bounds, video) for video in videos):
        return list(bounds.keys)
    names = ", ".join(bounds.keys)
    word = "key" if len(bounds.keys) == 1 else "keys"
    file = Path(videos[0].video or "").name or "the frames"
    cut = "cut the clip out of the video"
    if bounds.unit is not None and videos[0].video is not None:
        cut = (
            f"cut it with ffmpeg{_format_cut(bounds, bounds.unit)} -i {shlex.quote(file)} CLIP.mp4"
        )
    raise UnsupportedKeyError(
        f"the {word} {names} with {', '.join(bounds.keys.values())} in {level}: a clip of {file},"
        " which an import does not cut",
        expected="a file of the clip only",
        remedy=f"{cut}, name the new file instead, and remove {names}; only remove {names} if the"
        " question is about the complete video",
    )


def _format_cut(bounds: ClipBounds, unit: float) -> str:
    """Return the options of ffmpeg for the bounds of a clip."""
    options = ""
    if bounds.start:
        options += f" -ss {bounds.start * unit:g}"
    if bounds.end is not None and bounds.end >= 0:
        options += f" -to {bounds.end * unit:g}"
    return options


def _is_complete(bounds: ClipBounds, video: VideoPart) -> bool:
    """Return whether the bounds of a clip are those of the complete video."""
    if bounds.start is not None and bounds.start not in (0, -1):
        return False
    if bounds.end is None or bounds.end == -1:
        return True
    if video.video is None:
        num_frames = len(video.frames)
        return bounds.unit is None and bounds.end in (num_frames - 1, num_frames)
    try:
        header = read_video_header(Path(video.video))
    except UserError:  # reported with the file
        return False
    if bounds.unit is None:
        return bounds.end in (header.num_frames - 1, header.num_frames)
    end_s = bounds.end * bounds.unit
    duration_s = header.num_frames / header.fps
    tolerance_s = max(MAX_CLIP_DIFFERENCE, 1 / header.fps)
    return duration_s - tolerance_s <= end_s <= duration_s + MAX_CLIP_EXCESS


def find_clip_bounds(values: Mapping[str, Any]) -> ClipBounds:
    """Return the bounds of a clip among the keys of a video or its row; without keys if none."""
    bounds = ClipBounds()
    for key, value in values.items():
        words = split_words(str(key))
        found = _parse_bounds(words, value)
        if found is None:
            continue
        bounds.keys[str(key)] = str(value)[:60]
        if found[0] is not None:
            bounds.start = found[0]
        if found[1] is not None:
            bounds.end = found[1]
        if any(map(_FRAMES.fullmatch, words)):
            bounds.unit = None
        elif any(map(_MILLISECONDS.fullmatch, words)):
            bounds.unit = 0.001
    if bounds.start is not None and bounds.end is None:
        length = _parse_time(values.get("duration"))
        if length is not None:
            bounds.end = bounds.start + length
    return bounds


def _parse_bounds(words: Sequence[str], value: object) -> tuple[float | None, float | None] | None:
    """Return the start and the end that a key states; None for other keys and values."""
    if not words or not all(map(_KEY.fullmatch, words)):
        return None
    is_start = any(map(_START.fullmatch, words))
    is_end = any(map(_END.fullmatch, words))
    if is_start != is_end:
        number = _parse_time(value)
        if number is None:
            return None
        return (number, None) if is_start else (None, number)
    if is_start or any(map(_SPAN.fullmatch, words)):
        return _parse_span(value)
    return None


def _parse_span(value: object) -> tuple[float | None, float | None] | None:
    """Return the start and the end of a pair, a text such as 0.5-1.5, or an object with both."""
    if isinstance(value, dict):
        inner = find_clip_bounds(value)
        return (inner.start, inner.end) if inner.keys else None
    if isinstance(value, str):
        value = _SPAN_SEPARATOR.split(value.strip(" []()"))
    if isinstance(value, list | tuple) and len(value) == 1 and isinstance(value[0], list | tuple):
        value = value[0]
    if not isinstance(value, list | tuple) or len(value) != 2:
        return None
    start = _parse_time(value[0])
    end = _parse_time(value[1])
    if start is None or (end is None and value[1] is not None):
        return None
    return start, end


def _parse_time(value: object) -> float | None:
    """Return a number, or a time such as 01:02:03.5 in seconds; None for other values."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return float(value) if math.isfinite(value) else None
    if not isinstance(value, str):
        return None
    match = _TIMECODE.fullmatch(value.strip())
    if match is None:
        return None
    hours, minutes, seconds = match.groups()
    return 3600 * float(hours or 0) + 60 * float(minutes or 0) + float(seconds)
