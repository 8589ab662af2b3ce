"""Tests of commands with hub models: inspection downloads small files, training all files."""

import re
from pathlib import Path
from urllib.parse import unquote

import pytest
from fake_hub_servers import FakeHubServer
from hub_fixtures import cache, huggingface, modelscope, without_sockets
from tiny_task import make_task, write_recipe

from finesight.model_folder import locate_model
from finesight.storage import sha256_file

__all__ = ["cache", "huggingface", "modelscope", "without_sockets"]

WEIGHTS = "model.safetensors"
PLAN = ("plan", "recipe.yaml", "--gpu", "T4")
TRAIN = ("train", "recipe.yaml")


@pytest.fixture(params=["hf", "modelscope"])
def model(request: pytest.FixtureRequest) -> str:
    """Return the address of a tiny model on each hub."""
    return f"{request.param}:Some/tiny"


@pytest.fixture
def hub(
    request: pytest.FixtureRequest, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> FakeHubServer:
    """Start the hub of the model, and write a recipe into the working directory."""
    monkeypatch.chdir(tmp_path)
    recipe = make_task(Path("task")) | {"model": model, "output_dir": "run"}
    write_recipe(Path("recipe.yaml"), recipe, epochs=1)
    kind = {"hf": "huggingface"}.get(model.split(":")[0], "modelscope")
    server: FakeHubServer = request.getfixturevalue(kind)
    files = {path.name: path.read_bytes() for path in Path("task/tiny").iterdir()}
    server.repositories["models/Some/tiny"] = files
    return server


def requested_files(hub: FakeHubServer) -> list[str]:
    """Return the names of the files requested since the last call."""
    paths = [unquote(asked.path) for asked in hub.requests]
    hub.requests.clear()
    found = [re.search(r"(?:/resolve/[^/]+/|FilePath=)([^&]+)", path) for path in paths]
    return sorted(one[1] for one in found if one)


@pytest.mark.parametrize("number", range(4))
def test_read_only_commands_fetch_no_weights(hub, model, number, cli):
    commands = [
        PLAN,
        ("show", "recipe.yaml", "--num-samples", "1"),
        ("check", "recipe.yaml"),
        ("check", "task/train.jsonl", "--model", model, "--max-length", "999"),
    ]
    cli(*commands[number])
    assert requested_files(hub) == sorted(set(hub.repositories["models/Some/tiny"]) - {WEIGHTS})
    for command in commands:
        cli(*command)
    assert requested_files(hub) == [], "what is there was asked for again"
    assert not (locate_model(model).path / WEIGHTS).exists()


def test_training_after_plan_fetches_only_weights(hub, model, cli):
    cli(*PLAN)
    planned = locate_model(model)
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


def test_offline_training_reports_missing_weights(hub, model, monkeypatch, cli, request):
    cli(*PLAN)
    requested_files(hub)
    with monkeypatch.context() as offline:
        offline.setenv("HF_HUB_OFFLINE", "1")
        cli(*PLAN)
        error = " ".join(cli(*TRAIN, code=2).err.split())
        assert f"{WEIGHTS} of {model} is not downloaded, and HF_HUB_OFFLINE is set" in error
        assert f"`finesight download {model}`" in error
        assert requested_files(hub) == []
    cli("download", model)
    assert requested_files(hub) == [WEIGHTS]
    request.getfixturevalue("without_sockets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    cli(*TRAIN)
