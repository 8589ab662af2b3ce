"""Box positions of each format: the white pixels of an image that is black elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from box_fixtures import find_box, write_box_image
from each_value import each

from finesight.data.exporter import export_dataset
from finesight.data.import_source import ImportOptions
from finesight.data.importer import import_dataset
from finesight.data.sample import BoxPart, ImagePart, LocatedSample, Sample, read_samples

WHITE = (10, 4, 30, 16)
"""Corners in an image of 40 x 20 pixels."""

SHARES = [0.25, 0.2, 0.75, 0.8]
THOUSANDTHS = [250, 200, 750, 800]


def turns(answer: str, question: str = "<image>?") -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def messages(answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": answer}]


def read_box(values: list[float]) -> str:
    return json.dumps({"bbox_2d": values, "label": "white"})


def swift(values: list[float], **more: Any) -> dict[str, Any]:
    objects = {"ref": ["white"], "bbox": [values], **more}
    return {
        "messages": messages("<ref-object><bbox>"),
        "images": ["a.png"],
        "objects": objects,
    }


CORNER_AND_SIZE = [10, 4, 20, 12]
PARTS = [{"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "text", "text": "?"}]
USER_MESSAGE = {"role": "user", "content": PARTS}
TABLE = {"image": "image", "box": "box", "label": "label"}

ROWS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("ms-swift", swift([*WHITE]), {}),
    ("ms-swift", swift(SHARES, bbox_type="norm1"), {}),
    ("ms-swift", swift(THOUSANDTHS), {"box_units": "1000"}),
    ("llama-factory", {"conversations": turns(read_box([*WHITE])), "images": ["a.png"]}, {}),
    ("llava", {"conversations": turns(read_box([*WHITE])), "image": "a.png"}, {}),
    (
        "llava",
        {"conversations": turns(read_box(SHARES)), "image": "a.png"},
        {"box_units": "1"},
    ),
    (
        "openai",
        {"messages": [USER_MESSAGE, {"role": "assistant", "content": read_box([*WHITE])}]},
        {},
    ),
    ("query-response", {"query": "?", "response": read_box([*WHITE]), "images": ["a.png"]}, {}),
    (
        "query-response",
        {"query": "?", "response": read_box(CORNER_AND_SIZE), "images": ["a.png"]},
        {"box_format": "xywh"},
    ),
    (
        "conversations",
        {"conversations": turns(read_box([*WHITE]), "<|vision_start|>a.png<|vision_end|>?")},
        {},
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


def matches_white_pixels(samples: list[Sample], folder: Path) -> bool:
    (sample,) = samples
    (image,) = (part for part in sample.iter_parts() if isinstance(part, ImagePart))
    (box,) = (part for part in sample.iter_parts() if isinstance(part, BoxPart))
    return box.label == "white" and box.xyxy == find_box(folder / image.image)


@each(("name", "row", "wishes"), ROWS)
def test_box_matches_white_pixels(
    tmp_path: Path, name: str, row: dict[str, Any], wishes: dict[str, Any]
) -> None:
    write_box_image(tmp_path / "a.png", WHITE)
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    summary = import_dataset(tmp_path / "rows.jsonl", tmp_path / "out", ImportOptions(**wishes))
    assert summary.format == name
    samples = read_samples(tmp_path / "out" / "data.jsonl")
    assert matches_white_pixels(samples, tmp_path / "out")
    located_sample = [LocatedSample(sample, tmp_path / "out") for sample in samples]
    export_dataset(located_sample, tmp_path / "again", name, copy_images=True)
    (source,) = (path for path in (tmp_path / "again").iterdir() if path.stem == "data")
    form = {key: wishes[key] for key in ("columns", "prompt") if key in wishes}
    if name == "table":
        form = {"columns": {**TABLE, "question": "question"}}
    import_dataset(source, tmp_path / "back", ImportOptions(**form))
    assert matches_white_pixels(read_samples(tmp_path / "back" / "data.jsonl"), tmp_path / "back")
