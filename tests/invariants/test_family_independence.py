"""One set of samples with boxes trains a model of every family: only the model's name changes."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from conversation_fixtures import make_folder
from PIL import Image
from rich.console import Console
from tiny_model import create_tiny_model

from finesight.data.sample import (
    BoxPart,
    ImagePart,
    LocatedSample,
    Message,
    Sample,
    TextPart,
    read_samples,
    write_samples,
)
from finesight.encode.renderer import FAMILIES, NativeRenderer
from finesight.model_folder import ModelFolder
from finesight.recipe import load_recipe
from finesight.report.data_pages import render_sample_page
from finesight.train.training_run import train


def _step(
    renderer: NativeRenderer, original: tuple[int, int], resized: tuple[int, int]
) -> list[float]:
    """Half of what one unit of the dialect's frame is worth in the original, across and down."""
    height, width = resized if renderer.family.name == "qwen2_5_vl" else (1000, 1000)
    return [original[1] / width / 2 + 1e-6, original[0] / height / 2 + 1e-6] * 2


def _compare(renderer: NativeRenderer, located_sample: LocatedSample) -> int:
    """Boxes read back from the tokens of a sample, each within half a step; how many there were."""
    outline = renderer.tokenize(located_sample)
    supervised = outline.ids_T[outline.loss_mask_T]
    raw = renderer.tokenizer.decode(supervised, skip_special_tokens=False)
    wanted = [
        part for part in located_sample.sample.messages[-1].content if isinstance(part, BoxPart)
    ]
    found = renderer.parse_boxes(raw, outline.spans, wanted[0].image)
    assert [box.label for box in found] == [box.label for box in wanted]
    span = outline.spans[wanted[0].image]
    steps = _step(renderer, span.original_size, span.resized_size)
    for box, right in zip(found, wanted, strict=True):
        off = np.abs(np.subtract(box.xyxy, right.xyxy))
        assert (off <= steps).all(), (box, right, steps)
    return len(found)


def _samples(folder: Path, number: int = 24) -> list[Sample]:
    rng = np.random.default_rng(7)
    samples = []
    for n in range(number):
        width, height = (int(side) for side in rng.integers(60, 300, 2))
        x1, y1 = int(rng.integers(0, width // 2)), int(rng.integers(0, height // 2))
        x2, y2 = int(rng.integers(x1 + 5, width)), int(rng.integers(y1 + 5, height))
        image = Image.new("RGB", (width, height), "white")
        image.paste((200, 30, 30), (x1, y1, x2, y2))
        image.save(folder / f"{n}.png")
        box = BoxPart(label="red", xyxy=(x1, y1, x2, y2))
        requested = (ImagePart(image=f"{n}.png"), TextPart(text="Where is it red?"))
        messages = (
            Message(role="user", content=requested),
            Message(role="assistant", content=(box,)),
        )
        samples.append(Sample(id=str(n), messages=messages))
    return samples


@pytest.mark.parametrize("family", FAMILIES)
def test_box_error_is_within_half_a_step_for_each_family(family: str, tmp_path: Path) -> None:
    renderer = NativeRenderer(ModelFolder(make_folder(tmp_path / "model", family)))
    for sample in _samples(tmp_path):
        assert _compare(renderer, LocatedSample(sample, tmp_path)) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_real_box_error_is_within_half_a_step_for_each_family(
    family: str, tmp_path: Path, shared: Path
) -> None:
    folder = shared / "data" / "grounding"
    renderer = NativeRenderer(ModelFolder(make_folder(tmp_path / "model", family)))
    rows = [json.loads(line) for line in (folder / "grounding.jsonl").read_text().splitlines()]
    compared = 0
    for row in rows:
        box = BoxPart(label=row["answer"], xyxy=tuple(row["bbox_xyxy"]))
        requested = (ImagePart(image=row["image"]), TextPart(text=row["question"]))
        turns = (Message(role="user", content=requested), Message(role="assistant", content=(box,)))
        compared += _compare(renderer, LocatedSample(Sample(id=row["id"], messages=turns), folder))
    assert compared == len(rows) > 500


@pytest.mark.parametrize("family", FAMILIES)
def test_sample_page_draws_boxes_correctly(family: str, tmp_path: Path) -> None:
    renderer = NativeRenderer(ModelFolder(make_folder(tmp_path / "model", family)))
    samples = _samples(tmp_path, 6)
    page = render_sample_page(
        renderer, [LocatedSample(sample, tmp_path) for sample in samples], "here"
    )
    text = page.partition('<script type="application/json" id="data">')[2]
    records = json.loads(text.partition("</script>")[0])["samples"]
    for record, sample in zip(records, samples, strict=True):
        (box,) = record["boxes"]
        (right,) = sample.messages[-1].content
        (image,) = record["images"]
        assert isinstance(right, BoxPart)
        height, width = image["original_size"]
        tall, wide = image["resized_size"]
        scales = [wide / width, tall / height] * 2
        drawn = [value * scale for value, scale in zip(right.xyxy, scales, strict=True)]
        assert box["xyxy"] == pytest.approx(drawn, abs=0.51)
        assert box["label"] == "red"


@pytest.mark.parametrize("family", FAMILIES)
def test_one_dataset_trains_every_family(family: str, tmp_path: Path) -> None:
    create_tiny_model(tmp_path / family, family)
    write_samples(tmp_path / "train.jsonl", _samples(tmp_path, 8))
    recipe = {
        "data": {"train": str(tmp_path / "train.jsonl"), "eval": str(tmp_path / "train.jsonl")},
        "tune": {"language": "lora", "lora": {"rank": 4}},
        "train": {
            "steps": 4,
            "batch_size": 4,
            "learning_rate": 0.01,
            "device": "cpu",
            "num_workers": 0,
        },
        "eval": {"metric": "grounding", "max_new_tokens": 4},
        "output_dir": str(tmp_path / "run"),
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe | {"model": str(tmp_path / family)}))
    result = train(load_recipe(path), console=Console(file=io.StringIO()))
    assert result.loss is not None
    assert "mean_iou" in result.after.scores
    assert len(read_samples(tmp_path / "train.jsonl")) == 8
