"""Tests of commands with hub models: inspection downloads small files, training all files."""

import re
from pathlib import Path
from urllib.parse import unquote

import pytest
from fake_hub_servers import FakeHubServer
from hub_fixtures import cache, huggingface
from tiny_task import make_task, write_recipe

from finesight.model_folder import locate_model
from finesight.storage import sha256_file

__all__ = ["cache", "huggingface"]

WEIGHTS = "model.safetensors"
PLAN = ("plan", "recipe.yaml", "--gpu", "T4")
TRAIN = ("train", "recipe.yaml")


MODEL = "hf:Some/tiny"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, huggingface) -> FakeHubServer:
    """Start the hub of the model, and write a recipe into the working directory."""
    monkeypatch.chdir(tmp_path)
    recipe = make_task(Path("task")) | {"model": MODEL, "output_dir": "run"}
    write_recipe(Path("recipe.yaml"), recipe, epochs=1)
    files = {path.name: path.read_bytes() for path in Path("task/tiny").iterdir()}
    huggingface.repositories["models/Some/tiny"] = files
    return huggingface


def requested_files(hub: FakeHubServer) -> list[str]:
    """Return the names of the files requested since the last call."""
    paths = [unquote(asked.path) for asked in hub.requests]
    hub.requests.clear()
    found = [re.search(r"/resolve/[^/]+/([^&]+)", path) for path in paths]
    return sorted(one[1] for one in found if one)


@pytest.mark.parametrize("number", range(4))
def test_read_only_commands_fetch_no_weights(hub, number, cli):
    commands = [
        PLAN,
        ("show", "recipe.yaml", "--num-samples", "1"),
        ("check", "recipe.yaml"),
        ("check", "task/train.jsonl", "--model", MODEL, "--max-length", "999"),
    ]
    cli(*commands[number])
    assert requested_files(hub) == sorted(set(hub.repositories["models/Some/tiny"]) - {WEIGHTS})
    for command in commands:
        cli(*command)
    assert requested_files(hub) == [], "what is there was asked for again"
    assert not (locate_model(MODEL).path / WEIGHTS).exists()


def test_training_after_plan_fetches_only_weights(hub, cli):
    cli(*PLAN)
    planned = locate_model(MODEL)
    requested_files(hub)
    hub.faults.cuts[WEIGHTS] = [5_000, 0, 0, 0, 0]
    cli(*TRAIN, code=2)
    assert set(requested_files(hub)) == {WEIGHTS}
    hub.lfs_requests.clear()
    cli(*TRAIN)
    assert requested_files(hub) == [WEIGHTS]
    assert [asked.range for asked in hub.lfs_requests] == ["bytes=5000-"]
    assert planned.weight_files() == [planned.path / WEIGHTS]
    assert sha256_file(planned.path / WEIGHTS) == sha256_file(Path("task/tiny") / WEIGHTS)
    cli(*PLAN, "model=run")
    assert requested_files(hub) == []
