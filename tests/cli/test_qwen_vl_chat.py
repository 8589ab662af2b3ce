"""Run the Qwen-VL (2023) tutorial with commands: import, LoRA, chat with boxes, merging."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from engine_fixtures import write_noise_image
from PIL import Image
from tiny_model import create_tiny_model

from finesight.cli.app import run_command
from finesight.data.sample import BoxPart, ImagePart, read_samples

STEPS = 120


def _conversation(name: str, *turns: str) -> dict[str, object]:
    roles = ("user", "assistant")
    output = [{"from": roles[n % 2], "value": text} for n, text in enumerate(turns)]
    return {"id": name, "conversations": output}


def _training_file(folder: Path) -> Path:
    """Write three conversations like the tutorial, with no, one and two images and a box in a
    second turn."""
    for name in ("dog", "hills", "town"):
        write_noise_image(folder / f"{name}.png", 120, 80, seed=len(name))
    box = "<ref>shirt</ref><box>(250,125),(750,875)</box>"
    images = "Picture 1: <img>hills.png</img>\nPicture 2: <img>town.png</img>\n"
    conversations = [
        _conversation("one", "Hello", "I am here."),
        _conversation(
            "two",
            "Picture 1: <img>dog.png</img>\nWhat is it?",
            "A dog.",
            "Frame the shirt",
            box,
        ),
        _conversation("three", f"{images}Where is this?", "First hills, then a town."),
    ]
    path = folder / "data.json"
    path.write_text(json.dumps(conversations))
    return path


@pytest.fixture(scope="module")
def trained_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a run that overfits the conversations."""
    folder = tmp_path_factory.mktemp("tutorial")
    create_tiny_model(folder / "base", "qwen")
    data = folder / "chat"
    assert run_command(["import", str(_training_file(folder)), str(data)]) == 0
    recipe = {
        "model": str(folder / "base"),
        "data": {"train": str(data / "data.jsonl")},
        "tune": {
            "language": "lora",
            "vision": "lora",
            "merger": "full",
            "embeddings": "full",
            "lora": {"rank": 32, "alpha": 32, "dropout": 0.0},
        },
        "train": {
            "steps": STEPS,
            "batch_size": 3,
            "learning_rate": 4e-3,
            "device": "cpu",
            "num_workers": 0,
        },
        "output_dir": str(folder / "run"),
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert run_command(["train", str(folder / "recipe.yaml")]) == 0
    return folder


def _second_question(folder: Path) -> Path:
    """Return the second conversation up to its second question."""
    samples = {sample.id: sample for sample in read_samples(folder / "chat" / "data.jsonl")}
    (second,) = (s for s in samples.values() if len(s.messages) == 4)
    line = json.loads(second.model_copy(update={"messages": second.messages[:3]}).model_dump_json())
    path = folder / "chat" / "asked.jsonl"
    path.write_text(json.dumps(line) + "\n")
    return path


def _answer(
    model: Path, folder: Path, capsys: pytest.CaptureFixture[str], *more: str
) -> dict[str, object]:
    capsys.readouterr()
    words = [
        "predict",
        str(model),
        "--data",
        str(_second_question(folder)),
        "--json",
        "--device",
        "cpu",
    ]
    assert run_command([*words, *more]) == 0
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


def test_published_training_file_is_read(trained_folder: Path) -> None:
    first, second, third = read_samples(trained_folder / "chat" / "data.jsonl")
    assert not any(isinstance(part, ImagePart) for part in first.iter_parts())
    (box,) = (part for part in second.iter_parts() if isinstance(part, BoxPart))
    assert (box.label, box.xyxy) == ("shirt", (30.0, 10.0, 90.0, 70.0))
    assert len([part for part in third.iter_parts() if isinstance(part, ImagePart)]) == 2


def test_second_turn_is_answered_with_a_drawn_box(
    trained_folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    found = _answer(
        trained_folder / "run", trained_folder, capsys, "--draw", str(tmp_path / "drawn")
    )
    assert found["raw_text"] == "<ref>shirt</ref><box>(250,125),(750,875)</box><|im_end|>"
    (box,) = found["boxes"]
    assert box["label"] == "shirt"
    assert box["xyxy"] == pytest.approx([30.0, 10.0, 90.0, 70.0], abs=0.1)
    (image,) = (tmp_path / "drawn").iterdir()
    with Image.open(image) as drawn, Image.open(trained_folder / "dog.png") as baseline:
        assert drawn.size == baseline.size
        assert drawn.convert("RGB").getpixel((60, 10)) != baseline.convert("RGB").getpixel((60, 10))


def test_merged_model_gives_the_same_answer(
    trained_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = _answer(trained_folder / "run", trained_folder, capsys)
    assert run_command(["merge", str(trained_folder / "run"), str(trained_folder / "merged")]) == 0
    after = _answer(trained_folder / "merged", trained_folder, capsys)
    assert after["raw_text"] == before["raw_text"]
    assert not list((trained_folder / "merged").glob("adapter*"))
