"""Inject faults into valid samples, deterministically for a seed."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from finesight.ingest.import_source import ImportOptions, open_unvalidated
from finesight.samples.image_file import read_image_size
from finesight.samples.sample import Sample, sample_to_dict

Record = dict[str, Any]

IMAGE_MARKERS = (
    "<image>",
    "<image>\n",
    "Picture 1: <img>a.jpg</img>\n",
    "<|vision_start|><|vision_end|>",
)
PLACEHOLDERS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_pad|>", "<image>")
SPECIAL_TOKENS = ("<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|fim_middle|>", "<|extra_0|>")


CAPTION_PROMPT = "Describe the image."
"""Caption question, for which one image has several correct answers."""


@dataclass(frozen=True)
class InjectedFault:
    """A fault in one line of the training file.

    Lines count from 1. The fault is detected if one of `lines` is reported with `code`.
    """

    fault_type: str
    code: str
    lines: tuple[int, ...]


@dataclass(frozen=True)
class FaultType:
    """A fault type: its issue code, applicable samples and injection function."""

    name: str
    code: str
    is_applicable: Callable[[Record], bool]
    apply: Callable[[Record, FaultContext], None]


class FaultContext:
    """Context of fault injection: random generator, validation samples, folder for corrupt
    images."""

    def __init__(
        self, seed: int, folder: Path, validation: Sequence[Record], extra_words: int
    ) -> None:
        self.rng = random.Random(seed)
        self.validation = [record for record in validation if _image_parts(record)]
        self.extra_words = extra_words
        self._folder, self._num_files = folder, 0
        folder.mkdir(parents=True, exist_ok=True)

    def new_file_path(self, suffix: str) -> Path:
        """Return a new path in the folder."""
        self._num_files += 1
        return self._folder / f"{self._num_files:04}{suffix}"

    def choose_validation_image(self) -> Path:
        """Return the first image of a random validation sample."""
        return Path(_image_parts(self.rng.choice(self.validation))[0]["image"])


def inject_faults(
    train: Sequence[Record],
    context: FaultContext,
    count: int,
    fault_types: Sequence[FaultType] | None = None,
) -> tuple[list[Record], list[InjectedFault]]:
    """Inject `count` faults of each type into copies of `train`. Returns records and faults."""
    records = [json.loads(json.dumps(record)) for record in train]
    free = list(range(len(records)))
    context.rng.shuffle(free)
    injected = []
    for fault in FAULT_TYPES if fault_types is None else fault_types:
        for _ in range(count):
            index = next(i for i in free if fault.is_applicable(records[i]))
            free.remove(index)
            fault.apply(records[index], context)
            injected.append(InjectedFault(fault.name, fault.code, (index + 1,)))
    for _ in range(count):
        pairs = ((a, b) for a in free for b in free if _contradicts(records[a], records[b]))
        one, other = next(pairs)
        free = [i for i in free if i not in (one, other)]
        records[other]["messages"][:-1] = records[one]["messages"][:-1]
        injected.append(
            InjectedFault("contradicting answers", "contradictory-answers", (one + 1, other + 1))
        )
    return records, injected


def load_external_samples(
    source: Path, request: ImportOptions, image_dir: Path
) -> Iterator[Sample]:
    """Load the samples of an external source with absolute paths."""
    return (
        sample for row in open_unvalidated(source, request, image_dir) for sample in row.samples
    )


def split_by_image(samples: Sequence[Sample], every: int) -> tuple[list[Record], list[Record]]:
    """Split samples by image: every `every`-th image belongs to the validation split."""
    image_indices: dict[str, int] = {}
    train, validation = [], []
    for sample in samples:
        record = sample_to_dict(sample)
        image = _image_parts(record)[0]["image"]
        number = image_indices.setdefault(image, len(image_indices))
        (train if number % every else validation).append(record)
    return train, validation


def write_records(path: Path, records: Sequence[Record]) -> Path:
    """Write one record per line with unique ids."""
    lines = [json.dumps({**r, "id": f"{n}:{r['id']}"}) + "\n" for n, r in enumerate(records, 1)]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def _image_parts(record: Record) -> list[Record]:
    return [p for m in record["messages"] for p in m["content"] if p["type"] == "image"]


def _box_parts(record: Record) -> list[Record]:
    return [p for m in record["messages"] for p in m["content"] if p["type"] == "box"]


def _text_parts(record: Record, role: str | None = None) -> list[Record]:
    return [
        part
        for message in record["messages"]
        if role in (None, message["role"])
        for part in message["content"]
        if part["type"] == "text"
    ]


def _has_single_image(record: Record) -> bool:
    return len(_image_parts(record)) == 1


def _has_question(record: Record) -> bool:
    return _has_single_image(record) and bool(_text_parts(record, "user"))


def _has_box(record: Record) -> bool:
    return _has_single_image(record) and bool(_box_parts(record))


def _answer_text(record: Record) -> str:
    parts = record["messages"][-1]["content"]
    return "".join(part.get("text", "") for part in parts).strip().casefold()


def _contradicts(one: Record, other: Record) -> bool:
    """Check if the second answer contradicts the first: other text, or another box.

    Captions never contradict, because an image has several correct captions.
    """
    if CAPTION_PROMPT in (
        _text_parts(one, "user")[0]["text"],
        _text_parts(other, "user")[0]["text"],
    ):
        return False
    if bool(_box_parts(one)) != bool(_box_parts(other)):
        return False
    if not _box_parts(one):
        return _answer_text(one) != _answer_text(other)
    (a, b, c, d), (x1, y1, x2, y2) = _box_parts(one)[0]["xyxy"], _box_parts(other)[0]["xyxy"]
    height, width = read_image_size(Path(_image_parts(one)[0]["image"]))
    apart = c <= x1 or x2 <= a or d <= y1 or y2 <= b
    return apart and all(
        p["xyxy"][2] <= width and p["xyxy"][3] <= height for p in _box_parts(other)
    )


def _remove_image(record: Record, garden: FaultContext) -> None:
    _image_parts(record)[0]["image"] = str(garden.new_file_path(".jpg"))


def _truncate_image(record: Record, garden: FaultContext) -> None:
    image_part = _image_parts(record)[0]
    content = Path(image_part["image"]).read_bytes()
    path = garden.new_file_path(Path(image_part["image"]).suffix)
    path.write_bytes(content[: int(len(content) * garden.rng.uniform(0.3, 0.95))])
    image_part["image"] = str(path)


def _move_box_outside(record: Record, garden: FaultContext) -> None:
    """Move a box out of the image by 2 pixels or more."""
    height, width = read_image_size(Path(_image_parts(record)[0]["image"]))
    box = garden.rng.choice(_box_parts(record))
    x1, y1, x2, y2 = box["xyxy"]
    by = garden.rng.choice((2, 5, 20, 400))
    right, down = garden.rng.choice(((1, 0), (-1, 0), (0, 1), (0, -1)))
    x = {1: width - x2 + by, -1: -x1 - by, 0: 0}[right]
    y = {1: height - y2 + by, -1: -y1 - by, 0: 0}[down]
    box["xyxy"] = [x1 + x, y1 + y, x2 + x, y2 + y]


def _empty_box(record: Record, garden: FaultContext) -> None:
    box = garden.rng.choice(_box_parts(record))["xyxy"]
    sides = garden.rng.choice(((2, 0), (3, 1)))
    box[sides[0]] = box[sides[1]]


def _reverse_box(record: Record, garden: FaultContext) -> None:
    box = garden.rng.choice(_box_parts(record))
    x1, y1, x2, y2 = box["xyxy"]
    turned = ([x2, y1, x1, y2], [x1, y2, x2, y1], [x2, y2, x1, y1])
    box["xyxy"] = garden.rng.choice(turned)


def _add_markers(record: Record, garden: FaultContext) -> None:
    mark = garden.rng.choice(IMAGE_MARKERS)
    part = garden.rng.choice(_text_parts(record, "user"))
    part["text"] = mark * garden.rng.randint(2, 3) + part["text"]


def _insert_token(tokens: Sequence[str]) -> Callable[[Record, FaultContext], None]:
    def make(record: Record, garden: FaultContext) -> None:
        part = garden.rng.choice(_text_parts(record))
        at = garden.rng.randint(0, len(part["text"]))
        part["text"] = part["text"][:at] + garden.rng.choice(tokens) + part["text"][at:]

    return make


def _empty_answer(record: Record, garden: FaultContext) -> None:
    empty = ([], [{"type": "text", "text": ""}], [{"type": "text", "text": " \n"}])
    record["messages"][-1]["content"] = garden.rng.choice(empty)


def _shuffle_turns(record: Record, garden: FaultContext) -> None:
    user, assistant = record["messages"]
    record["messages"] = garden.rng.choice(
        (
            [assistant, user],
            [user],
            [user, user, assistant],
            [user, assistant, assistant],
            [assistant],
            [user, assistant, {"role": "system", "content": "Be brief."}],
        )
    )


def _leak_validation_image(record: Record, garden: FaultContext) -> None:
    leaked = garden.choose_validation_image()
    path = garden.new_file_path(leaked.suffix)
    path.write_bytes(leaked.read_bytes())
    _image_parts(record)[0]["image"] = str(garden.rng.choice((path, leaked)))
    _replace_answer(record)


def _reencode_validation_image(record: Record, garden: FaultContext) -> None:
    """Save a validation image again with another quality, format or slightly different size."""
    with Image.open(garden.choose_validation_image()) as image:
        shown = image.convert("RGB")
    scale = garden.rng.choice((1.0, 1.0, 0.7, 0.9, 1.2))
    size = [max(1, round(side * scale)) for side in shown.size]
    shown = shown.resize((size[0], size[1]), Image.Resampling.BICUBIC)
    kind = garden.rng.choice((("JPEG", ".jpg"), ("PNG", ".png"), ("WEBP", ".webp")))
    buffer = io.BytesIO()
    # PNG needs another compression level; the default might reproduce the original bytes.
    shown.save(buffer, kind[0], quality=garden.rng.choice((35, 50, 75, 90)), compress_level=1)
    path = garden.new_file_path(kind[1])
    path.write_bytes(buffer.getvalue())
    _image_parts(record)[0]["image"] = str(path)
    _replace_answer(record)


def _replace_answer(record: Record) -> None:
    # Boxes of another image would be a different fault.
    record["messages"][-1]["content"] = [{"type": "text", "text": "something else"}]


def _extend_prompt(record: Record, garden: FaultContext) -> None:
    _text_parts(record, "user")[0]["text"] += " and again" * garden.extra_words


def _is_always_applicable(record: Record) -> bool:
    return True


FAULT_TYPES = (
    FaultType("missing image", "image-missing", _has_single_image, _remove_image),
    FaultType("truncated image", "image-truncated", _has_single_image, _truncate_image),
    FaultType("box outside", "box-outside", _has_box, _move_box_outside),
    FaultType("empty box", "box-empty", _has_box, _empty_box),
    FaultType("reversed box", "box-inverted", _has_box, _reverse_box),
    FaultType(
        "placeholders and images differ", "placeholder-count-mismatch", _has_question, _add_markers
    ),
    FaultType(
        "placeholder typed", "placeholder-in-text", _has_question, _insert_token(PLACEHOLDERS)
    ),
    FaultType("empty answer", "empty-answer", _is_always_applicable, _empty_answer),
    FaultType(
        "special token", "special-token-in-text", _has_question, _insert_token(SPECIAL_TOKENS)
    ),
    FaultType("roles out of order", "invalid-role-order", _is_always_applicable, _shuffle_turns),
    FaultType("leaked image", "leaked-image", _has_single_image, _leak_validation_image),
    FaultType(
        "leaked image, re-encoded",
        "leaked-image-reencoded",
        _has_single_image,
        _reencode_validation_image,
    ),
    FaultType("too long sample", "too-long", _has_question, _extend_prompt),
)
"""Fault types; `inject_faults` adds contradictory answers, which need two samples."""
