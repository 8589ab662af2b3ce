"""HTML page of samples as model input, with their tokens and images."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from finesight.encode.renderer import IM_START, NativeRenderer
from finesight.encode.tokenization import (
    EncodedSample,
    TokenizedSample,
    TokenRow,
    VisualSpan,
    iter_token_rows,
)
from finesight.report.charts import Chart, build_histograms
from finesight.report.histogram_counts import count_half_octaves
from finesight.report.html import build_inline_image, render_page
from finesight.report.i18n import translate
from finesight.samples.frames import rescale
from finesight.samples.image_file import CorruptImageError
from finesight.samples.sample import BoxPart, LocatedSample
from finesight.vision.image_processing import unpatchify

MAX_IMAGE_SIDE = 1024
"""Maximum width and height of an image on the page, in pixels.

Larger images are shrunk for display, after the preprocessing of the model.
"""


HISTOGRAM_TITLES = {
    "answer_chars": ("Characters per answer", "share of samples"),
    "num_tokens": ("Tokens per sample", "share of samples"),
    "num_supervised_tokens": ("Supervised tokens per sample", "share of samples"),
    "image_side": ("Longest side of images", "pixels, share of images"),
    "num_boxes": ("Boxes per sample", "share of samples with boxes"),
}
"""Title and caption of each histogram."""


def render_sample_page(
    renderer: NativeRenderer,
    samples: Sequence[LocatedSample],
    source: str,
    on_progress: Callable[[int], None] = lambda done: None,
    on_corrupt: Callable[[str, CorruptImageError], None] | None = None,
) -> str:
    """Render samples as an HTML page that shows the model input.

    Everything is decoded from the model input: images from patches, and boxes from token texts in
    the format of the model family.

    Args:
        source: Description of the file or split that contains the samples.
        on_progress: Called with 1 after each sample.
        on_corrupt: Called for each sample that is left out because of its images, with its ID. By
            default, the first one raises its error.
    """
    records = []
    for located_sample in samples:
        try:
            records.append(_build_sample_record(renderer, located_sample))
        except CorruptImageError as error:
            if on_corrupt is None:
                raise
            on_corrupt(located_sample.sample.id, error)
        on_progress(1)
    count_labels = {
        "num_tokens": translate("total tokens"),
        "num_supervised_tokens": translate("total supervised tokens"),
        "num_patches": translate("total patches"),
    }
    totals = {}
    for key, label in count_labels.items():
        totals[label] = sum(record[key] for record in records)
    charts = []
    if len(records) > 1:
        charts = _build_sample_charts(records)
    image_rule = renderer.image_rule.model_dump()
    return render_page(
        "sample",
        {"samples": records, "charts": [chart.data for chart in charts]},
        assets=["charts"],
        title=translate("Model input"),
        charts=charts,
        source=source,
        family=renderer.family.name,
        image_rule=", ".join(f"{key} {value}" for key, value in image_rule.items()),
        num_samples=len(records),
        totals=totals,
    )


def _build_sample_charts(records: Sequence[dict[str, Any]]) -> list[Chart]:
    """Build histograms of the samples on the page."""
    values: defaultdict[str, list[int]] = defaultdict(list)
    for record in records:
        values["num_tokens"].append(record["num_tokens"])
        values["num_supervised_tokens"].append(record["num_supervised_tokens"])
        values["num_boxes"].append(record["num_sample_boxes"])
        for image in record["images"]:
            values["image_side"].append(max(image["original_size"]))
    counts = {name: count_half_octaves(numbers) for name, numbers in values.items()}
    return build_histograms(HISTOGRAM_TITLES, [(translate("samples"), counts)])


def _build_sample_record(renderer: NativeRenderer, located_sample: LocatedSample) -> dict[str, Any]:
    sample = located_sample.sample
    encoded = renderer.encode(located_sample)
    tokenized = encoded.tokenized
    turns = list(_iter_turns(renderer, tokenized))
    sample_boxes = [part for part in sample.iter_parts() if isinstance(part, BoxPart)]
    if turns and sample.label is False:
        turns[-1]["role"] = "rejected"
    images = [span for span in tokenized.spans if span.kind == "image"]
    raw_texts = []
    turn_records = []
    for turn in turns:
        raw_texts.append(turn["raw"])
        turn_records.append({"role": turn["role"], "rows": turn["rows"]})
    boxes = []
    for span, box in _parse_boxes(renderer, raw_texts, images, sample_boxes):
        boxes.append(
            {
                "xyxy": box.xyxy,
                "label": box.label,
                "image_index": tokenized.spans.index(span),
                "original_box": rescale(box.xyxy, span.resized_size, span.original_size),
            }
        )
    return {
        "id": tokenized.id,
        "num_tokens": tokenized.num_tokens,
        "num_supervised_tokens": tokenized.num_supervised_tokens,
        "num_patches": tokenized.num_patches,
        "images": list(_iter_visuals(renderer, encoded)),
        "num_sample_boxes": len(sample_boxes),
        "boxes": boxes,
        "turns": turn_records,
    }


def _iter_turns(renderer: NativeRenderer, tokenized: TokenizedSample) -> Iterator[dict[str, Any]]:
    """Yield the role, the token rows and the raw text of each turn.

    The raw text has no image placeholders. The role of a rejected answer is `rejected`.
    """
    start_id = renderer.tokenizer.token_to_id(IM_START)
    rejected_starts = tokenized.response_starts[1:]
    turn: list[TokenRow] = []
    for row in (*iter_token_rows(tokenized, renderer.tokenizer), None):
        if turn and (row is None or row.id == start_id or row.start in rejected_starts):
            text_ids = []
            token_records = []
            for token in turn:
                token_records.append(_build_token_record(renderer, tokenized, token))
                if token.span is None:
                    text_ids.append(token.id)
            raw_text = renderer.tokenizer.decode(text_ids, skip_special_tokens=False)
            role = raw_text.removeprefix(IM_START).partition("\n")[0]
            if turn[0].start in rejected_starts:
                role = "rejected"
            yield {"role": role, "raw": raw_text, "rows": token_records}
            turn = []
        if row is not None:
            turn.append(row)


def _build_token_record(
    renderer: NativeRenderer, tokenized: TokenizedSample, row: TokenRow
) -> dict[str, Any]:
    decode = renderer.tokenizer.decode
    kind = "text"
    if not decode([row.id], skip_special_tokens=True):
        kind = "special"
    elif "\ufffd" in decode([row.id], skip_special_tokens=False):
        kind = "bytes"
    token_record = {
        "start": row.start,
        "id": row.id,
        "text": row.text,
        "kind": kind,
        "first_position": row.first_position,
    }
    if row.is_supervised:
        token_record["is_supervised"] = True
    if row.span is not None:
        visual_index = tokenized.spans.index(row.span)
        token_record |= {
            "kind": "image",
            "image_index": visual_index,
            "end": row.stop - 1,
            "last_position": row.last_position,
        }
    return token_record


def _iter_visuals(renderer: NativeRenderer, encoded: EncodedSample) -> Iterator[dict[str, Any]]:
    """Yield the page data of every image and video, reconstructed from patches."""
    patch_offset = 0
    for span in encoded.tokenized.spans:
        t, h, w = span.grid_thw
        stop = patch_offset + t * h * w
        frames = unpatchify(
            encoded.patches_ND[patch_offset:stop], span.grid_thw, renderer.patch_config
        )
        patch_offset = stop
        inline_frames = []
        for frame in frames[: span.num_frames]:
            inline_frames.append(build_inline_image(frame, MAX_IMAGE_SIDE))
        yield {
            "kind": span.kind,
            "name": span.files[0].name,
            "frames": inline_frames,
            "original_size": span.original_size,
            "resized_size": span.resized_size,
            "grid_thw": span.grid_thw,
            "num_tokens": span.stop - span.start,
        }


def _parse_boxes(
    renderer: NativeRenderer,
    texts: Sequence[str],
    images: Sequence[VisualSpan],
    sample_boxes: Sequence[BoxPart],
) -> list[tuple[VisualSpan, BoxPart]]:
    """Parse boxes from the texts of all turns, in pixels of the resized images.

    The text does not identify images. If the number of boxes equals that of the sample, they are
    assigned to the images of the sample's boxes, otherwise to the first image.
    """
    if not images:
        return []
    boxes_by_image: list[list[BoxPart]] = []
    for image in images:
        boxes: list[BoxPart] = []
        for text in texts:
            boxes += renderer.family.read_boxes(text, image.resized_size, image.resized_size)
        boxes_by_image.append(boxes)
    num_boxes = len(boxes_by_image[0])
    image_indices = [0] * num_boxes
    if len(sample_boxes) == num_boxes:
        image_indices = [part.image for part in sample_boxes]
    located_boxes = []
    for box_index, image_index in enumerate(image_indices):
        located_boxes.append((images[image_index], boxes_by_image[image_index][box_index]))
    return located_boxes
