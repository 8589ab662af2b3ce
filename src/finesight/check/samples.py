"""Faults that a sample shows by itself."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from finesight.check.box_faults import box_findings
from finesight.check.findings import Finding, Place, Shown
from finesight.check.pictures import Album
from finesight.check.problems import problem_finding
from finesight.check.texts import text_findings
from finesight.data.rules import BadTurns, check_order
from finesight.data.sample import ImagePart, Sample, TextPart, VideoPart, files_of

_FETCH = "fetch or export the picture again, or leave the sample out"

_REMEDIES = {
    "picture-missing": "correct the path; a relative one starts at the folder of the data file",
    "picture-cut-off": _FETCH,
    "picture-damaged": _FETCH,
    "picture-too-large": "scale or crop the picture first",
}


def sample_findings(
    sample: Sample, place: Place, album: Album, specials: Collection[str] = ()
) -> Iterator[Finding]:
    """All faults of one sample, whose pictures `album` knows."""
    yield from _order(sample, place)
    yield from _emptiness(sample, place)
    yield from _pictures(sample, place, album)
    yield from text_findings(sample, place, specials)
    yield from box_findings(sample, place, album)


def paths_of(sample: Sample) -> Iterator[str]:
    """The paths of all pictures and frames of a sample."""
    return (path for part in sample.parts() for path in files_of(part))


def _order(sample: Sample, place: Place) -> Iterator[Finding]:
    try:
        check_order(sample.messages, "")
    except BadTurns as problem:
        yield problem_finding(problem, place)


def _emptiness(sample: Sample, place: Place) -> Iterator[Finding]:
    for number, message in enumerate(sample.messages):
        texts = [part.text for part in message.content if isinstance(part, TextPart)]
        if len(texts) == len(message.content) and not "".join(texts).strip():
            code = "empty-answer" if message.role == "assistant" else "empty-question"
            what = f"message {number}, of the {message.role}, is {''.join(texts)!r}"
            yield place.finding(code, what, "fill it in, or leave the sample out")
        if message.role != "user" and any(files_of(part) for part in message.content):
            yield place.finding(
                "picture-in-answer",
                f"message {number}, of the {message.role}, holds a picture",
                "move it to the user's turn: a model answers with text and boxes",
            )


def _pictures(sample: Sample, place: Place, album: Album) -> Iterator[Finding]:
    number = 0
    for part in sample.parts():
        for path in files_of(part):
            content = album[path]
            if content.fault is not None:
                what = f"{path}: {content.problem}" if content.problem else path
                shown = Shown(Path(path), number)
                yield place.finding(content.fault, what, _REMEDIES[content.fault], (shown,))
        if isinstance(part, VideoPart):
            yield from _frames(part.frames, place, album)
        number += isinstance(part, ImagePart)


def _frames(frames: Sequence[str], place: Place, album: Album) -> Iterator[Finding]:
    known = [(path, album[path].size) for path in frames if album[path].fault is None]
    other = next((frame for frame in known if frame[1] != known[0][1]), None)
    if other is not None:
        (first, (height, width)), (path, (other_height, other_width)) = known[0], other
        yield place.finding(
            "frames-differ",
            f"{path} has {other_width} x {other_height} pixels, {first} {width} x {height}",
            "extract the frames again, all at one size",
            (Shown(Path(path)),),
        )
