"""Group samples by image, for exports to formats with one record per image."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finesight.data.boxes import BOX_DECIMALS, Box
from finesight.data.formats.dataset_format import ExportContext
from finesight.data.formats.detection_dataset import NO_OBJECTS_ANSWER
from finesight.data.jsonl import LocatedSample
from finesight.data.sample import BoxPart, ImagePart, Sample, TextPart
from finesight.errors import UserError

LOST_QUESTIONS = "questions, which an import regenerates from --prompt and --box-task"

LOST_WHITESPACE = "white space around answers"

REGENERATED_META_KEYS = frozenset({"classes"})
"""Metadata keys that an import generates again, so that an export does not lose them."""


@dataclass(frozen=True, slots=True)
class ExportBox:
    """A box to export, with its label, its corners in pixels and its metadata."""

    label: str
    xyxy: Box
    attributes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class ImageRecord:
    """An image with the answers of all its samples, as texts or as boxes."""

    image_path: Path
    answers: list[str] = field(default_factory=list)
    boxes: list[ExportBox] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)

    def merge_boxes(self, boxes: Sequence[ExportBox]) -> None:
        """Add the boxes of a sample, except those that the image already has."""
        existing = list(self.boxes)
        for box in boxes:
            if box in existing:
                existing.remove(box)
            else:
                self.boxes.append(box)


def group_boxes_by_image(
    samples: Iterable[LocatedSample], context: ExportContext, meta_keys: Set[str]
) -> list[ImageRecord]:
    """Group the boxes of all samples by image, in order of appearance.

    Args:
        samples: Samples to export.
        context: State of the export, which counts lost content.
        meta_keys: Metadata keys that the format preserves.

    Raises:
        UserError: A sample is not a single question about one image, or an answer is neither
            labeled boxes nor `none`.
    """
    records: dict[Path, ImageRecord] = {}
    for located_sample in samples:
        record = _get_record(located_sample, records, context, meta_keys)
        record.merge_boxes(list(_iter_boxes(located_sample.sample)))
        context.lost_counts["references"] += bool(located_sample.sample.references)
    return list(records.values())


def group_texts_by_image(
    samples: Iterable[LocatedSample], context: ExportContext, meta_keys: Set[str]
) -> list[ImageRecord]:
    """Group the answers and references of all samples by image, in order of appearance.

    Args:
        samples: Samples to export.
        context: State of the export, which counts lost content.
        meta_keys: Metadata keys that the format preserves.

    Raises:
        UserError: A sample is not a single question about one image, or an answer contains boxes.
    """
    records: dict[Path, ImageRecord] = {}
    for located_sample in samples:
        record = _get_record(located_sample, records, context, meta_keys)
        texts = [_get_answer_text(located_sample.sample), *located_sample.sample.references]
        record.answers += [text for text in texts if text not in record.answers]
    return list(records.values())


def has_boxes(samples: Sequence[LocatedSample]) -> bool:
    """Return whether the answer of any sample contains a box."""
    return any(
        isinstance(part, BoxPart)
        for located_sample in samples
        for part in located_sample.sample.messages[-1].content
    )


def collect_classes(records: Sequence[ImageRecord]) -> list[str]:
    """Return all class names: those of the imported dataset in order, then new ones sorted."""
    declared_names = [name for record in records for name in record.meta.get("classes", ())]
    used_names = sorted({box.label for record in records for box in record.boxes})
    return list(dict.fromkeys([*declared_names, *used_names]))


def require_inside_output(path: Path, context: ExportContext, format_name: str) -> str:
    """Return the path of an image relative to the output folder.

    Raises:
        UserError: The image is outside of the output folder, so that the format cannot reference
            it.
    """
    name = context.image_name(path)
    if name.startswith("../") or Path(name).is_absolute():
        raise UserError(
            f"the image is outside the output folder, where {format_name} cannot reference it",
            where=str(path),
            expected="images inside the output folder, next to their labels",
            remedy="give --copy-images",
        )
    return name


def assign_text_file(name: str, used_names: set[str]) -> str:
    """Reserve the text file of an image, and return its name.

    Raises:
        UserError: Another image with the same stem uses the text file.
    """
    text = str(Path(name).with_suffix(".txt"))
    if text in used_names:
        raise UserError(
            f"two images with the text file {text}",
            expected="names with different stems",
            remedy="rename one of the two, or export as coco",
        )
    used_names.add(text)
    return text


def make_unique_stem(stem: str, used_stems: set[str]) -> str:
    """Reserve an unused file stem, numbered if necessary, and return it."""
    name, suffix = stem, 2
    while name in used_stems:
        name, suffix = f"{stem}-{suffix}", suffix + 1
    used_stems.add(name)
    return name


def round_coordinate(value: float) -> int | float:
    """Round a coordinate to `BOX_DECIMALS`, and convert a whole number to an integer."""
    rounded = round(value, BOX_DECIMALS)
    return int(rounded) if rounded == int(rounded) else rounded


def _get_record(
    located_sample: LocatedSample,
    records: dict[Path, ImageRecord],
    context: ExportContext,
    meta_keys: Set[str],
) -> ImageRecord:
    sample = located_sample.sample
    path = located_sample.resolve_path(_get_single_image(sample))
    record = records.setdefault(path, ImageRecord(path))
    record.meta.update(sample.meta)
    context.lost_counts[LOST_QUESTIONS] += 1
    context.lost_counts["system prompts"] += sample.messages[0].role == "system"
    context.lost_counts.update(
        f"the key {key} of meta" for key in sample.meta.keys() - meta_keys - REGENERATED_META_KEYS
    )
    return record


def _get_single_image(sample: Sample) -> str:
    """Return the image path of a sample with a single question about one image.

    Raises:
        UserError: The sample has several turns, or not exactly one image.
    """
    turns = [message.role for message in sample.messages if message.role != "system"]
    images = [part.image for part in sample.iter_parts() if isinstance(part, ImagePart)]
    if turns != ["user", "assistant"] or len(images) != 1:
        raise UserError(
            f"{len(turns)} turns about {len(images)} images",
            where=f"sample {sample.id}",
            expected="one question about one image, and its answer",
            remedy="export these samples in a conversation format, or remove them",
        )
    return images[0]


def _iter_boxes(sample: Sample) -> Iterator[ExportBox]:
    parts = [part for part in sample.messages[-1].content if not _is_blank(part)]
    attributes_list = sample.meta.get("boxes", ())
    if [part.text for part in parts if isinstance(part, TextPart)] == [NO_OBJECTS_ANSWER] and len(
        parts
    ) == 1:
        return
    for box_index, part in enumerate(parts):
        if not isinstance(part, BoxPart) or part.label is None or not part.label.strip():
            raise UserError(
                f"the answer contains {str(part)[:80]}",
                where=f"sample {sample.id}",
                expected=f"only boxes with labels, or {NO_OBJECTS_ANSWER!r}",
                remedy="export these samples in a conversation format, or remove them",
            )
        attributes = (
            attributes_list[box_index]
            if isinstance(attributes_list, list) and len(attributes_list) == len(parts)
            else {}
        )
        yield ExportBox(part.label, part.xyxy, attributes if isinstance(attributes, dict) else {})


def _is_blank(part: object) -> bool:
    return isinstance(part, TextPart) and not part.text.strip()


def _get_answer_text(sample: Sample) -> str:
    parts = sample.messages[-1].content
    texts = [part.text for part in parts if isinstance(part, TextPart)]
    if len(texts) != len(parts):
        raise UserError(
            "a mix of answers with and without boxes",
            where=f"sample {sample.id}",
            expected="only text answers",
            remedy="export the samples with boxes separately",
        )
    return "".join(texts)
