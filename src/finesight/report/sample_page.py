"""HTML page of `finesight data show --html`: samples as model input, with every token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from finesight.data.jsonl import LocatedSample
from finesight.data.sample import BoxPart
from finesight.encode.family_base import PredictedBox, scale_box
from finesight.encode.native_renderer import IM_START, NativeRenderer
from finesight.encode.tokenized_sample import (
    EncodedSample,
    TokenizedSample,
    TokenRow,
    VisualSpan,
    iter_token_rows,
)
from finesight.report.html import render_page
from finesight.report.i18n import translate
from finesight.report.inline_image import build_inline_image
from finesight.vision.patches import unpatchify

MAX_IMAGE_SIDE = 1024
"""Maximum width and height of an image on the page, in pixels.

Larger images are shrunk for display, after the preprocessing of the model.
"""


def render_sample_page(
    renderer: NativeRenderer,
    samples: Sequence[LocatedSample],
    source: str,
    on_progress: Callable[[int], None] = lambda done: None,
) -> str:
    """Render samples as an HTML page that shows the model input.

    Everything is decoded from the model input: images from patches, and boxes from token texts in
    the format of the model family.

    Args:
        renderer: Renderer of the model.
        samples: Samples to render.
        source: Description of the file or split that contains the samples.
        on_progress: Called with 1 after each sample.
    """
    records = []
    for located_sample in samples:
        records.append(_build_sample_record(renderer, located_sample))
        on_progress(1)
    count_labels = {
        "num_tokens": translate("total tokens"),
        "num_supervised_tokens": translate("total supervised tokens"),
        "num_patches": translate("total patches"),
    }
    return render_page(
        "sample",
        records,
        title=translate("Model input"),
        source=source,
        family=renderer.family.name,
        image_rule=", ".join(
            f"{key} {value}" for key, value in renderer.image_rule.model_dump().items()
        ),
        num_samples=len(records),
        totals={
            label: sum(record[key] for record in records) for key, label in count_labels.items()
        },
    )


def _build_sample_record(renderer: NativeRenderer, located_sample: LocatedSample) -> dict[str, Any]:
    encoded = renderer.encode(located_sample)
    tokenized = encoded.tokenized
    turns = list(_iter_turns(renderer, tokenized))
    sample_boxes = [
        part for part in located_sample.sample.iter_parts() if isinstance(part, BoxPart)
    ]
    images = [span for span in tokenized.spans if span.kind == "image"]
    parsed_boxes = _parse_boxes(renderer, [turn["raw"] for turn in turns], images, sample_boxes)
    return {
        "id": tokenized.id,
        "num_tokens": tokenized.num_tokens,
        "num_supervised_tokens": tokenized.num_supervised_tokens,
        "num_patches": tokenized.num_patches,
        "images": list(_iter_visuals(renderer, encoded)),
        "num_sample_boxes": len(sample_boxes),
        "boxes": [
            {"xyxy": box.xyxy, "label": box.label, "image_index": tokenized.spans.index(span)}
            | {"original_box": scale_box(box.xyxy, span.resized_size, span.original_size)}
            for span, box in parsed_boxes
        ],
        "turns": [{"role": turn["role"], "rows": turn["rows"]} for turn in turns],
    }


def _iter_turns(renderer: NativeRenderer, tokenized: TokenizedSample) -> Iterator[dict[str, Any]]:
    """Yield the role, the token rows and the raw text of each turn.

    The raw text has no image placeholders.
    """
    start_id = renderer.tokenizer.token_to_id(IM_START)
    turn: list[TokenRow] = []
    for row in (*iter_token_rows(tokenized, renderer.tokenizer), None):
        if turn and (row is None or row.id == start_id):
            ids = [token.id for token in turn if token.span is None]
            raw_text = renderer.tokenizer.decode(ids, skip_special_tokens=False)
            role = raw_text.removeprefix(IM_START).partition("\n")[0]
            token_records = [_build_token_record(renderer, tokenized, token) for token in turn]
            yield {"role": role, "raw": raw_text, "rows": token_records}
            turn = []
        if row is not None:
            turn.append(row)


def _build_token_record(
    renderer: NativeRenderer, tokenized: TokenizedSample, row: TokenRow
) -> dict[str, Any]:
    decode = renderer.tokenizer.decode
    kind = "text" if decode([row.id], skip_special_tokens=True) else "special"
    if kind == "text" and "\ufffd" in decode([row.id], skip_special_tokens=False):
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
        yield {
            "kind": span.kind,
            "name": span.files[0].name,
            "frames": [
                build_inline_image(frame, MAX_IMAGE_SIDE) for frame in frames[: len(span.files)]
            ],
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
) -> list[tuple[VisualSpan, PredictedBox]]:
    """Parse boxes from the texts of all turns, in pixels of the resized images.

    The text does not identify images. If the number of boxes equals that of the sample, they are
    assigned to the images of the sample's boxes, otherwise to the first image.
    """
    if not images:
        return []
    by_image = [
        [
            box
            for text in texts
            for box in renderer.family.read_boxes(text, image.resized_size, image.resized_size)
        ]
        for image in images
    ]
    num_boxes = len(by_image[0])
    image_indices = (
        [part.image for part in sample_boxes] if len(sample_boxes) == num_boxes else [0] * num_boxes
    )
    return [
        (images[image_index], by_image[image_index][box_index])
        for box_index, image_index in enumerate(image_indices)
    ]
