"""One set of samples with boxes trains a model of every family: only the model's name changes."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from conversation_fixtures import make_folder
from image_fixtures import make_sample
from PIL import Image
from rich.console import Console
from tiny_model import create_tiny_model

from finesight.encode.renderer import NativeRenderer
from finesight.family_components import FAMILIES
from finesight.model_folder import ModelFolder
from finesight.report.data_pages import render_sample_page
from finesight.samples.sample import BoxPart, LocatedSample, Sample, write_samples
from finesight.settings.config import Recipe
from finesight.train.training_run import train


def make_samples(folder: Path, number: int = 24) -> list[Sample]:
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
        question = f"{n}.png", "Where is it red?"
        samples.append(make_sample(str(n), folder, *question, answer=box).sample)
    return samples


def assert_box_is_read_back(renderer: NativeRenderer, sample: LocatedSample) -> None:
    """Compare the box in the tokens of a sample within half a unit of the dialect's frame."""
    outline = renderer.tokenize(sample)
    supervised = outline.ids_T[outline.loss_mask_T]
    raw = renderer.tokenizer.decode(supervised, skip_special_tokens=False)
    (right,) = sample.sample.messages[-1].content
    assert isinstance(right, BoxPart)
    (box,) = renderer.parse_boxes(raw, outline.spans, right.image)
    assert box.label == right.label
    span = outline.spans[right.image]
    frame = span.resized_size if renderer.family.name == "qwen2_5_vl" else (1000, 1000)
    half_steps = np.divide(span.original_size, frame)[::-1] / 2 + 1e-6
    off = np.abs(np.subtract(box.xyxy, right.xyxy))
    assert (off <= np.tile(half_steps, 2)).all(), (box, right)


@pytest.fixture(params=FAMILIES)
def renderer(request: pytest.FixtureRequest, tmp_path: Path) -> NativeRenderer:
    return NativeRenderer(ModelFolder(make_folder(tmp_path / "model", request.param)))


def test_box_error_is_within_half_a_step_for_each_family(renderer, tmp_path):
    for sample in make_samples(tmp_path):
        assert_box_is_read_back(renderer, LocatedSample(sample, tmp_path))


def test_sample_page_draws_boxes_correctly(renderer, tmp_path):
    samples = [LocatedSample(sample, tmp_path) for sample in make_samples(tmp_path, 6)]
    page = render_sample_page(renderer, samples, "here")
    text = page.partition('<script type="application/json" id="data">')[2]
    records = json.loads(text.partition("</script>")[0])["samples"]
    for record, sample in zip(records, samples, strict=True):
        (box,), (image,) = record["boxes"], record["images"]
        (right,) = sample.sample.messages[-1].content
        assert isinstance(right, BoxPart)
        scales = np.divide(image["resized_size"], image["original_size"])[::-1]
        assert box["xyxy"] == pytest.approx(np.multiply(right.xyxy, np.tile(scales, 2)), abs=0.51)
        assert box["label"] == "red"


@pytest.mark.parametrize("family", FAMILIES)
def test_one_dataset_trains_every_family(family, tmp_path):
    data = tmp_path / "train.jsonl"
    write_samples(data, make_samples(tmp_path, 8))
    recipe = {
        "model": str(create_tiny_model(tmp_path / family, family)),
        "data": {"train": str(data), "eval": str(data)},
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
    result = train(Recipe.model_validate(recipe), console=Console(file=io.StringIO()))
    assert result is not None
    assert result.loss is not None
    assert "mean_iou" in result.after.scores
