"""Samples gathered by the picture that they show, for the formats that have a record a picture."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finesight.data.boxes import DECIMALS, Box
from finesight.data.formats.box_sets import NOTHING
from finesight.data.formats.format import Writing
from finesight.data.jsonl import Located
from finesight.data.sample import BoxPart, ImagePart, Sample, TextPart
from finesight.errors import UserError

QUESTIONS = "questions, which an import asks anew by --prompt and --ask"

TRIMMED = "white space around answers"

REMADE = frozenset({"classes"})
"""Keys of meta that an import makes anew."""


@dataclass(frozen=True, slots=True)
class Marked:
    """A box to write: its label, its corners in pixels and what else was noted of it."""

    label: str
    xyxy: Box
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Gathered:
    """One picture and what all its samples say: their answers as text, or boxes."""

    path: Path
    texts: list[str] = field(default_factory=list)
    boxes: list[Marked] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)

    def join(self, boxes: Sequence[Marked]) -> None:
        """Take on a sample's boxes, those that are here already once only."""
        left = list(self.boxes)
        for box in boxes:
            if box in left:
                left.remove(box)
            else:
                self.boxes.append(box)


def boxes_by_picture(
    samples: Iterable[Located], writing: Writing, kept: Set[str]
) -> list[Gathered]:
    """Each picture once, in order, with the boxes of all its samples; `kept` are keys of meta.

    Raises UserError for a sample that is no single question about one picture, and for an answer
    that is anything but labelled boxes or `none`.
    """
    found: dict[Path, Gathered] = {}
    for located in samples:
        gathered = _gathered(located, found, writing, kept)
        gathered.join(list(_boxes(located.sample)))
        writing.lost["references"] += bool(located.sample.references)
    return list(found.values())


def texts_by_picture(
    samples: Iterable[Located], writing: Writing, kept: Set[str]
) -> list[Gathered]:
    """Each picture once, in order, with the answers and references of all its samples.

    Raises UserError for a sample that is no single question about one picture, and for an answer
    with boxes.
    """
    found: dict[Path, Gathered] = {}
    for located in samples:
        gathered = _gathered(located, found, writing, kept)
        texts = [_text(located.sample), *located.sample.references]
        gathered.texts += [text for text in texts if text not in gathered.texts]
    return list(found.values())


def speaks_of_boxes(samples: Sequence[Located]) -> bool:
    """Whether any answer holds a box."""
    return any(
        isinstance(part, BoxPart) for one in samples for part in one.sample.messages[-1].content
    )


def classes_of(pictures: Sequence[Gathered]) -> list[str]:
    """The names of all classes: in the order that an import noted, the others by the alphabet."""
    noted = [name for one in pictures for name in one.meta.get("classes", ())]
    used = sorted({box.label for one in pictures for box in one.boxes})
    return list(dict.fromkeys([*noted, *used]))


def inside(path: Path, writing: Writing, form: str) -> str:
    """What the output calls a picture that must lie in its folder. UserError for one outside."""
    name = writing.name(path)
    if name.startswith("../") or Path(name).is_absolute():
        raise UserError(
            f"the picture lies outside of the output folder, where {form} cannot point at it",
            where=str(path),
            expected="pictures inside of the output folder, their labels beside them",
            remedy="give --copy-pictures",
        )
    return name


def text_beside(name: str, taken: set[str]) -> str:
    """The text file of a picture, now taken. UserError where another picture has it already."""
    text = str(Path(name).with_suffix(".txt"))
    if text in taken:
        raise UserError(
            f"two pictures whose text file is {text}",
            expected="names that differ before their ending",
            remedy="rename one of the two, or export as coco",
        )
    taken.add(text)
    return text


def distinct(stem: str, taken: set[str]) -> str:
    """`stem`, with a number where it is taken already; now taken as well."""
    name, number = stem, 2
    while name in taken:
        name, number = f"{stem}-{number}", number + 1
    taken.add(name)
    return name


def shortest(number: float) -> int | float:
    """A number to so many decimals as an import reads back; whole ones without a point."""
    rounded = round(number, DECIMALS)
    return int(rounded) if rounded == int(rounded) else rounded


def _gathered(
    located: Located, found: dict[Path, Gathered], writing: Writing, kept: Set[str]
) -> Gathered:
    sample = located.sample
    path = located.path(_picture(sample))
    gathered = found.setdefault(path, Gathered(path))
    gathered.meta.update(sample.meta)
    writing.lost[QUESTIONS] += 1
    writing.lost["system prompts"] += sample.messages[0].role == "system"
    writing.lost.update(f"the key {key} of meta" for key in sample.meta.keys() - kept - REMADE)
    return gathered


def _picture(sample: Sample) -> str:
    """The one picture of a sample of one question."""
    turns = [message.role for message in sample.messages if message.role != "system"]
    images = [part.image for part in sample.parts() if isinstance(part, ImagePart)]
    if turns != ["user", "assistant"] or len(images) != 1:
        raise UserError(
            f"{len(turns)} turns about {len(images)} pictures",
            where=f"sample {sample.id}",
            expected="one question about one picture, and its answer",
            remedy="export these samples in a format of conversations, or leave them out",
        )
    return images[0]


def _boxes(sample: Sample) -> Iterator[Marked]:
    parts = [part for part in sample.messages[-1].content if not _is_blank(part)]
    notes = sample.meta.get("boxes", ())
    if [part.text for part in parts if isinstance(part, TextPart)] == [NOTHING] and len(parts) == 1:
        return
    for number, part in enumerate(parts):
        if not isinstance(part, BoxPart) or part.label is None or not part.label.strip():
            raise UserError(
                f"the answer holds {str(part)[:80]}",
                where=f"sample {sample.id}",
                expected=f"boxes with labels and nothing else, or {NOTHING!r}",
                remedy="export these samples in a format of conversations, or leave them out",
            )
        known = notes[number] if isinstance(notes, list) and len(notes) == len(parts) else {}
        yield Marked(part.label, part.xyxy, known if isinstance(known, dict) else {})


def _is_blank(part: object) -> bool:
    return isinstance(part, TextPart) and not part.text.strip()


def _text(sample: Sample) -> str:
    parts = sample.messages[-1].content
    texts = [part.text for part in parts if isinstance(part, TextPart)]
    if len(texts) != len(parts):
        raise UserError(
            "an answer with boxes among others without",
            where=f"sample {sample.id}",
            expected="answers that are all text",
            remedy="export the samples with boxes on their own",
        )
    return "".join(texts)
