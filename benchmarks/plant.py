"""Faults planted into sound samples, each in samples of its own, the same for the same seed."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from finesight.data.headers import picture_size
from finesight.data.jsonl import as_record
from finesight.data.opening import Request, draft
from finesight.data.sample import Sample

Record = dict[str, Any]

MARKS = ("<image>", "<image>\n", "Picture 1: <img>a.jpg</img>\n", "<|vision_start|><|vision_end|>")
PLACEHOLDERS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_pad|>", "<image>")
SPECIALS = ("<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|fim_middle|>", "<|extra_0|>")


CAPTION = "Describe the picture."
"""The question to which a picture has several right answers."""


@dataclass(frozen=True)
class Planted:
    """A fault in one line of the file to train on (lines from 1), found when one of `lines` is
    reported under `code`."""

    fault: str
    code: str
    lines: tuple[int, ...]


@dataclass(frozen=True)
class Fault:
    """A fault by name: the code it is found under, which samples it suits, how it is made."""

    name: str
    code: str
    suits: Callable[[Record], bool]
    make: Callable[[Record, Garden], None]


class Garden:
    """What faults are made with: chance, held-out samples, and a folder for spoilt pictures."""

    def __init__(self, seed: int, folder: Path, held_out: Sequence[Record], long: int) -> None:
        self.chance = random.Random(seed)
        self.held_out = [record for record in held_out if _pictures(record)]
        self.long = long
        self._folder, self._made = folder, 0
        folder.mkdir(parents=True, exist_ok=True)

    def place(self, suffix: str) -> Path:
        """A new name in the folder."""
        self._made += 1
        return self._folder / f"{self._made:04}{suffix}"

    def held_out_picture(self) -> Path:
        """The first picture of some held-out sample."""
        return Path(_pictures(self.chance.choice(self.held_out))[0]["image"])


def plant(
    train: Sequence[Record], garden: Garden, count: int, faults: Sequence[Fault] | None = None
) -> tuple[list[Record], list[Planted]]:
    """`count` of each fault in copies of `train`: the spoilt records and where the faults are."""
    records = [json.loads(json.dumps(record)) for record in train]
    free = list(range(len(records)))
    garden.chance.shuffle(free)
    planted = []
    for fault in FAULTS if faults is None else faults:
        for _ in range(count):
            at = next(place for place in free if fault.suits(records[place]))
            free.remove(at)
            fault.make(records[at], garden)
            planted.append(Planted(fault.name, fault.code, (at + 1,)))
    for _ in range(count):
        pairs = ((a, b) for a in free for b in free if _differ(records[a], records[b]))
        one, other = next(pairs)
        free = [place for place in free if place not in (one, other)]
        records[other]["messages"][:-1] = records[one]["messages"][:-1]
        planted.append(Planted("contradicting answers", "contradiction", (one + 1, other + 1)))
    return records, planted


def samples_of(source: Path, request: Request, saved: Path) -> Iterator[Sample]:
    """The samples of a foreign source, paths absolute."""
    return (sample for row in draft(source, request, saved) for sample in row.samples)


def parted(samples: Sequence[Sample], share: int) -> tuple[list[Record], list[Record]]:
    """To train on and held out: one picture in `share` is, with all samples that show it."""
    pictures: dict[str, int] = {}
    train, held_out = [], []
    for sample in samples:
        record = as_record(sample)
        shown = _pictures(record)[0]["image"]
        number = pictures.setdefault(shown, len(pictures))
        (train if number % share else held_out).append(record)
    return train, held_out


def write(path: Path, records: Sequence[Record]) -> Path:
    """One record a line, its id made unique by its line."""
    lines = [json.dumps({**r, "id": f"{n}:{r['id']}"}) + "\n" for n, r in enumerate(records, 1)]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def _pictures(record: Record) -> list[Record]:
    return [p for m in record["messages"] for p in m["content"] if p["type"] == "image"]


def _boxes(record: Record) -> list[Record]:
    return [p for m in record["messages"] for p in m["content"] if p["type"] == "box"]


def _texts(record: Record, role: str | None = None) -> list[Record]:
    return [
        part
        for message in record["messages"]
        if role in (None, message["role"])
        for part in message["content"]
        if part["type"] == "text"
    ]


def _shown(record: Record) -> bool:
    return len(_pictures(record)) == 1


def _asked(record: Record) -> bool:
    return _shown(record) and bool(_texts(record, "user"))


def _boxed(record: Record) -> bool:
    return _shown(record) and bool(_boxes(record))


def _answer(record: Record) -> str:
    parts = record["messages"][-1]["content"]
    return "".join(part.get("text", "") for part in parts).strip().casefold()


def _differ(one: Record, other: Record) -> bool:
    """Whether the second's answer contradicts the first's: other words, or a box elsewhere. Not
    asked of captions, of which a picture has several that are right."""
    if CAPTION in (_texts(one, "user")[0]["text"], _texts(other, "user")[0]["text"]):
        return False
    if bool(_boxes(one)) != bool(_boxes(other)):
        return False
    if not _boxes(one):
        return _answer(one) != _answer(other)
    (a, b, c, d), (x1, y1, x2, y2) = _boxes(one)[0]["xyxy"], _boxes(other)[0]["xyxy"]
    height, width = picture_size(Path(_pictures(one)[0]["image"]))
    apart = c <= x1 or x2 <= a or d <= y1 or y2 <= b
    return apart and all(p["xyxy"][2] <= width and p["xyxy"][3] <= height for p in _boxes(other))


def _lose(record: Record, garden: Garden) -> None:
    _pictures(record)[0]["image"] = str(garden.place(".jpg"))


def _cut(record: Record, garden: Garden) -> None:
    picture = _pictures(record)[0]
    content = Path(picture["image"]).read_bytes()
    place = garden.place(Path(picture["image"]).suffix)
    place.write_bytes(content[: int(len(content) * garden.chance.uniform(0.3, 0.95))])
    picture["image"] = str(place)


def _push_out(record: Record, garden: Garden) -> None:
    """Move a box over one of the four sides, by 2 pixels up to its own size and more."""
    height, width = picture_size(Path(_pictures(record)[0]["image"]))
    box = garden.chance.choice(_boxes(record))
    x1, y1, x2, y2 = box["xyxy"]
    by = garden.chance.choice((2, 5, 20, 400))
    right, down = garden.chance.choice(((1, 0), (-1, 0), (0, 1), (0, -1)))
    x = {1: width - x2 + by, -1: -x1 - by, 0: 0}[right]
    y = {1: height - y2 + by, -1: -y1 - by, 0: 0}[down]
    box["xyxy"] = [x1 + x, y1 + y, x2 + x, y2 + y]


def _empty_box(record: Record, garden: Garden) -> None:
    box = garden.chance.choice(_boxes(record))["xyxy"]
    sides = garden.chance.choice(((2, 0), (3, 1)))
    box[sides[0]] = box[sides[1]]


def _reverse(record: Record, garden: Garden) -> None:
    box = garden.chance.choice(_boxes(record))
    x1, y1, x2, y2 = box["xyxy"]
    turned = ([x2, y1, x1, y2], [x1, y2, x2, y1], [x2, y2, x1, y1])
    box["xyxy"] = garden.chance.choice(turned)


def _mark(record: Record, garden: Garden) -> None:
    mark = garden.chance.choice(MARKS)
    part = garden.chance.choice(_texts(record, "user"))
    part["text"] = mark * garden.chance.randint(2, 3) + part["text"]


def _type(tokens: Sequence[str]) -> Callable[[Record, Garden], None]:
    def make(record: Record, garden: Garden) -> None:
        part = garden.chance.choice(_texts(record))
        at = garden.chance.randint(0, len(part["text"]))
        part["text"] = part["text"][:at] + garden.chance.choice(tokens) + part["text"][at:]

    return make


def _hush(record: Record, garden: Garden) -> None:
    empty = ([], [{"type": "text", "text": ""}], [{"type": "text", "text": " \n"}])
    record["messages"][-1]["content"] = garden.chance.choice(empty)


def _disorder(record: Record, garden: Garden) -> None:
    user, assistant = record["messages"]
    record["messages"] = garden.chance.choice(
        (
            [assistant, user],
            [user],
            [user, user, assistant],
            [user, assistant, assistant],
            [assistant],
            [user, assistant, {"role": "system", "content": "Be brief."}],
        )
    )


def _leak(record: Record, garden: Garden) -> None:
    held_out = garden.held_out_picture()
    place = garden.place(held_out.suffix)
    place.write_bytes(held_out.read_bytes())
    _pictures(record)[0]["image"] = str(garden.chance.choice((place, held_out)))
    _say_something_else(record)


def _resave(record: Record, garden: Garden) -> None:
    """Save a held-out picture anew: another quality, another format, mildly another size."""
    with Image.open(garden.held_out_picture()) as image:
        shown = image.convert("RGB")
    scale = garden.chance.choice((1.0, 1.0, 0.7, 0.9, 1.2))
    size = [max(1, round(side * scale)) for side in shown.size]
    shown = shown.resize((size[0], size[1]), Image.Resampling.BICUBIC)
    kind = garden.chance.choice((("JPEG", ".jpg"), ("PNG", ".png"), ("WEBP", ".webp")))
    buffer = io.BytesIO()
    # The level is PNG's alone: at the usual one its bytes might come out as they were.
    shown.save(buffer, kind[0], quality=garden.chance.choice((35, 50, 75, 90)), compress_level=1)
    place = garden.place(kind[1])
    place.write_bytes(buffer.getvalue())
    _pictures(record)[0]["image"] = str(place)
    _say_something_else(record)


def _say_something_else(record: Record) -> None:
    # Boxes of another picture would be another fault than the one that is planted.
    record["messages"][-1]["content"] = [{"type": "text", "text": "something else"}]


def _lengthen(record: Record, garden: Garden) -> None:
    _texts(record, "user")[0]["text"] += " and again" * garden.long


def _always(record: Record) -> bool:
    return True


FAULTS = (
    Fault("missing picture", "picture-missing", _shown, _lose),
    Fault("truncated picture", "picture-cut-off", _shown, _cut),
    Fault("box outside", "box-outside", _boxed, _push_out),
    Fault("empty box", "box-empty", _boxed, _empty_box),
    Fault("reversed box", "box-reversed", _boxed, _reverse),
    Fault("marks and pictures differ", "marks-differ", _asked, _mark),
    Fault("placeholder typed", "placeholder-typed", _asked, _type(PLACEHOLDERS)),
    Fault("empty answer", "empty-answer", _always, _hush),
    Fault("special token", "special-token", _asked, _type(SPECIALS)),
    Fault("roles out of order", "roles-out-of-order", _always, _disorder),
    Fault("held-out picture", "same-picture", _shown, _leak),
    Fault("held-out picture resaved", "same-picture-resaved", _shown, _resave),
    Fault("over-long sample", "too-long", _asked, _lengthen),
)
"""Beside these, `plant` makes contradicting answers, which take two samples."""
