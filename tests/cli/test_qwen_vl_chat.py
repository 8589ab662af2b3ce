"""Run the Qwen-VL (2023) tutorial with commands: import, LoRA, chat with boxes, merging."""

import json
from pathlib import Path

import pytest
import yaml
from engine_fixtures import write_noise_image
from PIL import Image
from tiny_model import create_tiny_model

from finesight.cli.app import run_command
from finesight.data.sample import BoxPart, ImagePart, read_samples

# Conversations like those of the tutorial, with no, one and two images.
BOX = "<ref>shirt</ref><box>(250,125),(750,875)</box>"
CONVERSATIONS = [
    ["Hello", "I am here."],
    ["Picture 1: <img>dog.png</img>\nWhat is it?", "A dog.", "Frame the shirt", BOX],
    [
        "Picture 1: <img>hills.png</img>\nPicture 2: <img>town.png</img>\nWhere is this?",
        "First hills, then a town.",
    ],
]
TUNE = {"language": "lora", "vision": "lora", "merger": "full", "embeddings": "full"}
TUNE |= {"lora": {"rank": 32, "alpha": 32, "dropout": 0.0}}
TRAIN = {"steps": 120, "batch_size": 3, "learning_rate": 4e-3, "device": "cpu", "num_workers": 0}


@pytest.fixture(scope="module")
def trained_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a run that overfits the conversations."""
    folder = tmp_path_factory.mktemp("tutorial")
    for name in ("dog", "hills", "town"):
        write_noise_image(folder / f"{name}.png", 120, 80, seed=len(name))
    rows = []
    for number, turns in enumerate(CONVERSATIONS):
        pairs = zip(("user", "assistant") * 2, turns, strict=False)
        values = [{"from": role, "value": text} for role, text in pairs]
        rows.append({"id": f"{number}", "conversations": values})
    (folder / "data.json").write_text(json.dumps(rows))
    create_tiny_model(folder / "base", "qwen")
    assert run_command(["import", f"{folder}/data.json", f"{folder}/chat"]) == 0
    recipe = {"model": f"{folder}/base", "data": {"train": f"{folder}/chat/data.jsonl"}}
    recipe |= {"tune": TUNE, "train": TRAIN, "output_dir": f"{folder}/run"}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert run_command(["train", f"{folder}/recipe.yaml"]) == 0
    return folder


def test_published_training_file_is_read(trained_folder):
    first, second, third = read_samples(trained_folder / "chat" / "data.jsonl")
    assert not any(isinstance(part, ImagePart) for part in first.iter_parts())
    (box,) = (part for part in second.iter_parts() if isinstance(part, BoxPart))
    assert (box.label, box.xyxy) == ("shirt", (30.0, 10.0, 90.0, 70.0))
    assert len([part for part in third.iter_parts() if isinstance(part, ImagePart)]) == 2


def test_second_turn_is_answered_with_a_box_also_after_the_merge(trained_folder, cli, tmp_path):
    _, second, _ = read_samples(trained_folder / "chat" / "data.jsonl")
    question = second.model_copy(update={"messages": second.messages[:3]})
    data = trained_folder / "chat" / "asked.jsonl"
    data.write_text(question.model_dump_json() + "\n")
    ask, drawn_folder = ("--data", data, "--json", "--device", "cpu"), tmp_path / "drawn"
    run, merged = trained_folder / "run", trained_folder / "merged"
    found = cli("predict", run, *ask, "--draw", drawn_folder).json
    assert found["raw_text"] == f"{BOX}<|im_end|>"
    (box,) = found["boxes"]
    assert box["label"] == "shirt"
    assert box["xyxy"] == pytest.approx([30.0, 10.0, 90.0, 70.0], abs=0.1)
    (image,) = drawn_folder.iterdir()
    with Image.open(image) as drawn, Image.open(trained_folder / "dog.png") as baseline:
        assert drawn.size == baseline.size
        assert drawn.convert("RGB").getpixel((60, 10)) != baseline.convert("RGB").getpixel((60, 10))
    cli("merge", run, merged)
    assert cli("predict", merged, *ask).json["raw_text"] == found["raw_text"]
    assert not list(merged.glob("adapter*"))
