"""Each format's boxes are where they say: on the white pixels of a picture that is black else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from box_scenes import white_at, white_in

from finesight.data.exporting import export
from finesight.data.importing import import_file
from finesight.data.jsonl import Located, read_samples
from finesight.data.opening import Request
from finesight.data.sample import BoxPart, ImagePart, Sample

WHITE = (10, 4, 30, 16)
"""Corners in a picture of 40 x 20 pixels."""

SHARES = [0.25, 0.2, 0.75, 0.8]
THOUSANDTHS = [250, 200, 750, 800]


def turns(answer: str, question: str = "<image>?") -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def messages(answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": answer}]


def found(numbers: list[float]) -> str:
    return json.dumps({"bbox_2d": numbers, "label": "white"})


def swift(numbers: list[float], **more: Any) -> dict[str, Any]:
    objects = {"ref": ["white"], "bbox": [numbers], **more}
    return {
        "messages": messages("<ref-object><bbox>"),
        "images": ["a.png"],
        "objects": objects,
    }


CORNER_AND_SIZE = [10, 4, 20, 12]
PARTS = [{"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "text", "text": "?"}]
ASKED = {"role": "user", "content": PARTS}
TABLE = {"image": "image", "box": "box", "label": "label"}

ROWS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("ms-swift", swift([*WHITE]), {}),
    ("ms-swift", swift(SHARES, bbox_type="norm1"), {}),
    ("ms-swift", swift(THOUSANDTHS), {"box_units": "1000"}),
    ("llama-factory", {"conversations": turns(found([*WHITE])), "images": ["a.png"]}, {}),
    ("llava", {"conversations": turns(found([*WHITE])), "image": "a.png"}, {}),
    (
        "llava",
        {"conversations": turns(found(SHARES)), "image": "a.png"},
        {"box_units": "1"},
    ),
    (
        "openai",
        {"messages": [ASKED, {"role": "assistant", "content": found([*WHITE])}]},
        {},
    ),
    ("query", {"query": "?", "response": found([*WHITE]), "images": ["a.png"]}, {}),
    (
        "query",
        {"query": "?", "response": found(CORNER_AND_SIZE), "images": ["a.png"]},
        {"box_format": "xywh"},
    ),
    (
        "conversations",
        {"conversations": turns(found([*WHITE]), "<|vision_start|>a.png<|vision_end|>?")},
        {},
    ),
    (
        "picture-path",
        {"conversations": turns(found([*WHITE]), "a.png")},
        {"prompt": "?"},
    ),
    (
        "qwen-vl",
        {
            "conversations": turns(
                "<ref>white</ref><box>(250,200),(750,800)</box>", "Picture 1: <img>a.png</img>\n?"
            )
        },
        {},
    ),
    (
        "table",
        {"image": "a.png", "box": [*WHITE], "label": "white"},
        {"columns": TABLE, "prompt": "?"},
    ),
    (
        "table",
        {"image": "a.png", "box": [20, 10, 20, 12], "label": "white"},
        {"columns": TABLE, "prompt": "?", "box_format": "cxcywh"},
    ),
    (
        "samples",
        {
            "id": "1",
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "?"}],
                },
                {
                    "role": "assistant",
                    "content": [{"type": "box", "label": "white", "xyxy": WHITE}],
                },
            ],
        },
        {},
    ),
]


def on_white(samples: list[Sample], folder: Path) -> bool:
    (sample,) = samples
    (picture,) = (part for part in sample.parts() if isinstance(part, ImagePart))
    (box,) = (part for part in sample.parts() if isinstance(part, BoxPart))
    return box.label == "white" and box.xyxy == white_in(folder / picture.image)


@pytest.mark.parametrize(("name", "row", "wishes"), ROWS)
def test_the_box_is_on_the_white_pixels(
    tmp_path: Path, name: str, row: dict[str, Any], wishes: dict[str, Any]
) -> None:
    white_at(tmp_path / "a.png", WHITE)
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    summary = import_file(tmp_path / "rows.jsonl", tmp_path / "out", Request(**wishes))
    assert summary.format == name
    samples = read_samples(tmp_path / "out" / "data.jsonl")
    assert on_white(samples, tmp_path / "out")
    located = [Located(sample, tmp_path / "out") for sample in samples]
    export(located, tmp_path / "again", name, copy_pictures=True)
    (source,) = (path for path in (tmp_path / "again").iterdir() if path.stem == "data")
    form = {key: wishes[key] for key in ("columns", "prompt") if key in wishes}
    if name == "table":
        form = {"columns": {**TABLE, "question": "question"}}
    import_file(source, tmp_path / "back", Request(**form))
    assert on_white(read_samples(tmp_path / "back" / "data.jsonl"), tmp_path / "back")
