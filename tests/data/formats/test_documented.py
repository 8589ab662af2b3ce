"""The example of each format's own documentation goes in, out and in again, and stays the same."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from image_fixtures import write_gray_image
from PIL import Image

from finesight.data.exporter import export_dataset
from finesight.data.import_source import ImportOptions
from finesight.data.importer import import_dataset
from finesight.data.sample import LocatedSample, Sample, read_samples


def messages(*texts: str, system: str = "") -> list[dict[str, Any]]:
    output = [{"role": ("user", "assistant")[n % 2], "content": t} for n, t in enumerate(texts)]
    return ([{"role": "system", "content": system}] if system else []) + output


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]


MS_SWIFT = [
    {
        "messages": messages(
            "<image>Describe the image.",
            "<ref-object><bbox> and <ref-object><bbox> are playing on the beach",
            system="You are a helpful assistant.",
        ),
        "images": ["b.png"],
        "objects": {
            "ref": ["a dog", "a woman"],
            "bbox": [[331.5, 76.4, 853.5, 159.8], [676.5, 68.8, 999.5, 427.4]],
        },
    },
    {
        "messages": messages("<image>Find the <ref-object> in the image", "<bbox><bbox>"),
        "images": ["b.png"],
        "objects": {
            "ref": ["sheep"],
            "bbox": [[90.9, 160.8, 135, 212.8], [360.9, 48.8, 495, 53.8]],
        },
    },
    {
        "messages": messages(
            "<image><image>What is the difference between the two images?",
            "The first one is a kitten, and the second one is a puppy.",
        ),
        "images": ["a.png", "b.png"],
    },
]
LLAMA_FACTORY = [
    {"conversations": turns("<image>human instruction", "model response"), "images": ["a.png"]},
    {
        "conversations": turns("first<image>", "response", "second", "response"),
        "images": ["b.png"],
        "system": "system prompt (optional)",
        "tools": "",
    },
]
ALPACA = [
    {
        "instruction": "<image>human instruction (required)",
        "input": "human input (optional)",
        "output": "model response (required)",
        "system": "system prompt (optional)",
        "history": [["human instruction in the first round", "model response in the first round"]],
        "images": ["a.png"],
    }
]
LLAVA = [
    {
        "id": "997bb945-628d-4724-b370-b84de974a19f",
        "image": "a.png",
        "conversations": turns(
            "<image>\nWrite a prompt for Stable Diffusion to generate this image.",
            "a beautiful painting of chernobyl. hyper detailed. octane render. ",
        ),
    },
    {"id": "2", "conversations": turns("And without an image?", "Nothing.")},
]
QUERY = [
    {
        "system": "<system>".strip("<>"),
        "query": "query2",
        "response": "response2",
        "history": [["query1", "response1"]],
        "images": ["a.png"],
    },
    {"query": "<image>Where?", "response": '{"bbox_2d": [1, 2, 30, 14]}', "images": ["a.png"]},
]
QWEN_VL = [
    {
        "id": "identity_0",
        "conversations": [
            {"from": "user", "value": "Picture 1: <img>b.png</img>\n框出图中击掌的位置"},
            {"from": "assistant", "value": "<ref>击掌</ref><box>(536,509),(588,602)</box>"},
        ],
    },
    {
        "id": "identity_1",
        "conversations": [
            {"from": "user", "value": "Picture 1: <img>a.png</img>\n图中的狗是什么品种？"},
            {"from": "assistant", "value": "图中是一只拉布拉多犬。"},
            {"from": "user", "value": "Picture 2: <img>b.png</img>\n比较这两张图。"},
            {"from": "assistant", "value": "第一张是一只狗。"},
        ],
    },
]
CONVERSATIONS = [
    {
        "id": "identity_1",
        "conversations": [
            {"from": "user", "value": "COCO Yes: <|vision_start|>a.png<|vision_end|>"},
            {"from": "assistant", "value": "A dog on a lawn."},
        ],
    }
]
TABLE = [{"image": "a.png", "question": "Which?", "answer": "This.", "box": None, "label": None}]
COLUMNS = {"columns": {"image": "image", "question": "question", "answer": "answer"}}

EXAMPLES: list[tuple[str, list[dict[str, Any]], dict[str, Any]]] = [
    ("ms-swift", MS_SWIFT, {}),
    ("llama-factory", LLAMA_FACTORY, {}),
    ("llama-factory", ALPACA, {}),
    ("llava", LLAVA, {}),
    ("query-response", QUERY, {}),
    ("qwen-vl", QWEN_VL, {}),
    ("conversations", CONVERSATIONS, {}),
    ("table", TABLE, COLUMNS),
]


def with_image_bytes(samples: list[Sample], folder: Path) -> list[Sample]:
    """Return the samples with the pixels of their images instead of the names."""
    return [
        one.map_paths(lambda name: Image.open(folder / name).tobytes().hex()) for one in samples
    ]


def check_roundtrip(source: Path, name: str, wishes: dict[str, Any]) -> list[Sample]:
    folder = source.parent
    assert import_dataset(source, folder / "one", ImportOptions(**wishes)).format == name
    first = read_samples(folder / "one" / "data.jsonl")
    located_sample = [LocatedSample(one, folder / "one") for one in first]
    done = export_dataset(located_sample, folder / "two", name, copy_images=True)
    assert done.lost_counts == {}
    (written,) = (path for path in (folder / "two").iterdir() if path.stem == "data")
    assert import_dataset(written, folder / "three", ImportOptions(**wishes)).format == name
    second = read_samples(folder / "three" / "data.jsonl")
    assert with_image_bytes(second, folder / "three") == with_image_bytes(first, folder / "one")
    return first


@pytest.mark.parametrize(("name", "rows", "wishes"), EXAMPLES)
def test_roundtrip(
    folder: Path, name: str, rows: list[dict[str, Any]], wishes: dict[str, Any]
) -> None:
    (folder / "rows.json").write_text(json.dumps(rows))
    samples = check_roundtrip(folder / "rows.json", name, wishes)
    assert len(samples) == len(rows)
    known = [row["id"] for row in rows if "id" in row]
    assert known in ([], [one.id for one in samples])


def test_openai_roundtrip(folder: Path) -> None:
    write_gray_image(folder / "c.png", 30, 10, gray_level=200)
    data = base64.b64encode((folder / "c.png").read_bytes()).decode()
    url = {"url": f"data:image/png;base64,{data}", "detail": "low"}
    output = messages("What is this cheese?", "Danbo", system="You identify uncommon cheeses.")
    output.insert(2, {"role": "user", "content": [{"type": "image_url", "image_url": url}]})
    (folder / "rows.jsonl").write_text(json.dumps({"messages": output}) + "\n")
    (sample,) = check_roundtrip(folder / "rows.jsonl", "openai", {})
    assert [message.role for message in sample.messages] == ["system", "user", "assistant"]
