"""Faults that show between samples: said twice, said differently, most often the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from finesight.check.findings import Finding, Place, Shown
from finesight.check.pictures import Album
from finesight.data.boxes import Box, iou
from finesight.data.case import text_of
from finesight.data.sample import BoxPart, ImagePart, Message, Sample, TextPart, files_of

SHORT = 40
"""Characters up to which an answer is a name, a number or a few words, and no description."""

SEVERAL_RIGHT, OF_THEM_LONG, AT_LEAST = 0.3, 0.1, 10
"""Of the samples that ask in the same words, the share, the share of those with long answers, and
the number from which other answers about the same picture are no mistakes but further right ones,
as several captions of a picture are."""

AGREE = 0.5
"""Intersection over union from which two boxes mean the same thing."""

MOSTLY, FEWEST = 0.5, 20
"""Share of the samples that one answer may have, where there are at least so many samples."""

_PREVIEW = 60


@dataclass(frozen=True, slots=True)
class _Said:
    """An answer and where it stands: all of it as one number, its words, its boxes, the sample's
    first picture, and what was asked, pictures aside, as a number."""

    place: Place
    exact: int
    words: str
    boxes: tuple[tuple[int, Box], ...]
    picture: str
    asked: int


class Ledger:
    """The answers of one side, train or held-out, by what was asked about which pictures.

    Of each sample a few numbers and the first words are kept.
    """

    def __init__(self, album: Album) -> None:
        self._album = album
        self._first: dict[int, _Said] = {}
        self._others: list[tuple[_Said, _Said]] = []
        self._uses: Counter[int] = Counter()
        self._words: dict[int, str] = {}
        self._asked: Counter[int] = Counter()

    def enter(self, sample: Sample, place: Place) -> Iterator[Finding]:
        """Take a sample down. The finding, if any, is that it was there before."""
        turns = sample.messages[:-1]
        question = hash(tuple(self._exact(turn) for turn in turns))
        said = self._said(sample, place)
        self._asked[said.asked] += 1
        self._uses[said.exact] += 1
        self._words.setdefault(said.exact, said.words)
        first = self._first.setdefault(question, said)
        # Several answers of one row are all right: whoever wrote the row says so.
        if (first.place.source, first.place.row) == (place.source, place.row):
            return
        if first.exact == said.exact:
            yield place.finding(
                "duplicate",
                f"the same as {first.place.where}",
                "leave one of them out, unless it is meant to count twice",
                fix="dropped",
            )
        elif _contradict(first, said):
            self._others.append((first, said))

    def close(self, sources: str) -> Iterator[tuple[Place | None, Finding]]:
        """What only all samples show: contradictions, each with its place, and one answer to most
        questions, which has none."""
        several = self._several_right()
        for one, other in self._others:
            if one.boxes or other.boxes or other.asked not in several:
                yield other.place, _contradiction(one, other)
        samples = self._uses.total()
        (answer, uses), *_ = self._uses.most_common(1) or [(0, 0)]
        if samples >= FEWEST and uses > MOSTLY * samples:
            says = f"{uses} of {samples} answers are {self._words[answer]!r}"
            remedy = "who always says so is right as often: look at scores of the rarer answers"
            yield None, Finding("one-answer", sources, says, remedy, source=sources)

    def _several_right(self) -> set[int]:
        """The questions, pictures aside, that are meant to have more than one right answer."""
        others = Counter(other.asked for _, other in self._others)
        long = Counter(pair[1].asked for pair in self._others if not _short(pair))
        return {
            asked
            for asked, count in others.items()
            if count >= max(AT_LEAST, SEVERAL_RIGHT * self._asked[asked])
            or long[asked] >= max(AT_LEAST, OF_THEM_LONG * self._asked[asked])
        }

    def _said(self, sample: Sample, place: Place) -> _Said:
        *turns, last = sample.messages
        boxes = [part for part in last.content if isinstance(part, BoxPart)]
        words = " ".join(text_of(last.content).split())
        first = next((part.image for part in sample.parts() if isinstance(part, ImagePart)), "")
        return _Said(
            place,
            hash((self._exact(last), sample.references)),
            words if len(words) <= _PREVIEW else f"{words[: _PREVIEW - 3]}...",
            tuple((box.image, box.xyxy) for box in boxes),
            first,
            hash(tuple((turn.role, text_of(turn.content)) for turn in turns)),
        )

    def _exact(self, message: Message) -> int:
        """A number that is equal for equal messages, pictures compared by their content."""
        pieces: list[object] = [message.role]
        for part in message.content:
            if isinstance(part, TextPart):
                pieces.append(part.text)
            elif isinstance(part, BoxPart):
                pieces.append((part.image, part.label, part.xyxy))
            else:
                pieces.append(tuple(self._album.number(path) for path in files_of(part)))
        return hash(tuple(pieces))


def _contradict(one: _Said, other: _Said) -> bool:
    """Whether two answers to one question cannot both be meant."""
    if one.boxes or other.boxes:
        found = len(one.boxes) == len(other.boxes) and all(
            any(image == i and iou(box, b) >= AGREE for i, b in other.boxes)
            for image, box in one.boxes
        )
        return not found
    return _plain(one.words) != _plain(other.words)


def _short(pair: tuple[_Said, _Said]) -> bool:
    return all(len(said.words) <= SHORT for said in pair)


def _plain(words: str) -> str:
    return words.casefold().strip(" .!?\"'")


def _contradiction(one: _Said, other: _Said) -> Finding:
    return other.place.finding(
        "contradiction",
        f"{_answer(other)}, but {_answer(one)} at {one.place.where}",
        "keep the right one; where both are, put them into one answer or ask more closely",
        (_boxes(other), _boxes(one)) if other.picture else (),
    )


def _answer(said: _Said) -> str:
    boxes = ", ".join(f"[{', '.join(f'{n:g}' for n in box)}]" for _, box in said.boxes[:3])
    return " ".join(filter(None, [repr(said.words) if said.words else "", boxes]))


def _boxes(said: _Said) -> Shown:
    boxes = tuple(box for image, box in said.boxes if image == 0)
    return Shown(Path(said.picture), 0, boxes)
