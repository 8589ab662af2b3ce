"""What the first Qwen-VL's tutorial does, by command: its training file, LoRA, a chat of two turns
with a box in the second, merging."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from asking import noise
from PIL import Image

from finesight.cli.app import run
from finesight.data.jsonl import read_samples
from finesight.data.sample import BoxPart, ImagePart
from finesight.model.tiny import make_tiny

STEPS = 120


def _conversation(name: str, *turns: str) -> dict[str, object]:
    roles = ("user", "assistant")
    said = [{"from": roles[n % 2], "value": text} for n, text in enumerate(turns)]
    return {"id": name, "conversations": said}


def _training_file(folder: Path) -> Path:
    """Three conversations as the tutorial's: none, one and two pictures, a box in a second turn."""
    for name in ("dog", "hills", "town"):
        noise(folder / f"{name}.png", 120, 80, seed=len(name))
    box = "<ref>shirt</ref><box>(250,125),(750,875)</box>"
    pictures = "Picture 1: <img>hills.png</img>\nPicture 2: <img>town.png</img>\n"
    conversations = [
        _conversation("one", "Hello", "I am here."),
        _conversation(
            "two",
            "Picture 1: <img>dog.png</img>\nWhat is it?",
            "A dog.",
            "Frame the shirt",
            box,
        ),
        _conversation("three", f"{pictures}Where is this?", "First hills, then a town."),
    ]
    path = folder / "data.json"
    path.write_text(json.dumps(conversations))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that knows the tutorial's conversations by heart."""
    folder = tmp_path_factory.mktemp("tutorial")
    make_tiny(folder / "base", "qwen")
    data = folder / "chat"
    assert run(["data", "import", str(_training_file(folder)), str(data)]) == 0
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
        "train": {"steps": STEPS, "batch": 3, "learning_rate": 4e-3, "device": "cpu", "workers": 0},
        "output": str(folder / "run"),
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert run(["train", str(folder / "recipe.yaml")]) == 0
    return folder


def _asked(folder: Path) -> Path:
    """The second conversation up to its second question."""
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
    words = ["predict", str(model), "--data", str(_asked(folder)), "--json", "--device", "cpu"]
    assert run([*words, *more]) == 0
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


def test_the_training_file_is_read_as_it_is_published(trained: Path) -> None:
    first, second, third = read_samples(trained / "chat" / "data.jsonl")
    assert not any(isinstance(part, ImagePart) for part in first.parts())
    (box,) = (part for part in second.parts() if isinstance(part, BoxPart))
    assert (box.label, box.xyxy) == ("shirt", (30.0, 10.0, 90.0, 70.0))
    assert len([part for part in third.parts() if isinstance(part, ImagePart)]) == 2


def test_the_second_turn_is_answered_with_a_box_that_is_drawn(
    trained: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    found = _answer(trained / "run", trained, capsys, "--draw", str(tmp_path / "drawn"))
    assert found["raw"] == "<ref>shirt</ref><box>(250,125),(750,875)</box><|im_end|>"
    (box,) = found["boxes"]
    assert box["label"] == "shirt"
    assert box["xyxy"] == pytest.approx([30.0, 10.0, 90.0, 70.0], abs=0.1)
    (picture,) = (tmp_path / "drawn").iterdir()
    with Image.open(picture) as drawn, Image.open(trained / "dog.png") as plain:
        assert drawn.size == plain.size
        assert drawn.convert("RGB").getpixel((60, 10)) != plain.convert("RGB").getpixel((60, 10))


def test_the_merged_model_answers_the_same(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = _answer(trained / "run", trained, capsys)
    assert run(["merge", str(trained / "run"), str(trained / "merged")]) == 0
    after = _answer(trained / "merged", trained, capsys)
    assert after["raw"] == before["raw"]
    assert not list((trained / "merged").glob("adapter*"))
