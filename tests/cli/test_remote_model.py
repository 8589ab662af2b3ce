"""Tests of commands with hub models: inspection downloads small files, training all files."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml
from fake_hub_servers import FakeHubServer
from hub_fixtures import cache, huggingface, modelscope, without_sockets
from tiny_task import make_task, write_recipe

from finesight.cli.app import run_command
from finesight.model_folder import locate_model
from finesight.storage import sha256_file

__all__ = ["cache", "huggingface", "modelscope", "without_sockets"]

WEIGHTS = "model.safetensors"


@pytest.fixture(params=["hf", "modelscope"])
def model(request: pytest.FixtureRequest) -> str:
    """Yield the name of a tiny model on each hub."""
    return f"{request.param}:Some/tiny"


@pytest.fixture
def hub(request: pytest.FixtureRequest, model: str, recipe: Path) -> FakeHubServer:
    kind = {"hf": "huggingface"}.get(model.split(":")[0], "modelscope")
    server: FakeHubServer = request.getfixturevalue(kind)
    files = (recipe.parent / "tiny").iterdir()
    server.repositories["models/Some/tiny"] = {path.name: path.read_bytes() for path in files}
    return server


@pytest.fixture
def recipe(model: str, tmp_path: Path) -> Path:
    changed = make_task(tmp_path) | {"model": model, "output_dir": str(tmp_path / "run")}
    return write_recipe(tmp_path / "recipe.yaml", changed, epochs=1)


def requested_files(hub: FakeHubServer) -> list[str]:
    """Return the names of the files requested since the last call."""
    paths = [unquote(asked.path) for asked in hub.requests]
    hub.requests.clear()
    found = [re.search(r"(?:/resolve/[^/]+/|FilePath=)([^&]+)", path) for path in paths]
    return sorted(one[1] for one in found if one)


def read_only_commands(recipe: Path, model: str) -> list[list[str]]:
    """Return the commands that read no weights."""
    samples = str(recipe.parent / "train.jsonl")
    return [
        ["plan", str(recipe), "--gpu", "T4"],
        ["show", str(recipe), "--num-samples", "1"],
        ["check", str(recipe)],
        ["check", samples, "--model", model, "--max-length", "999"],
    ]


@pytest.mark.parametrize("number", range(4))
def test_read_only_commands_fetch_no_weights(
    hub: FakeHubServer, model: str, recipe: Path, number: int
) -> None:
    small = sorted(set(hub.repositories["models/Some/tiny"]) - {WEIGHTS})
    assert run_command(read_only_commands(recipe, model)[number]) == 0
    assert requested_files(hub) == small
    for command in read_only_commands(recipe, model):
        assert run_command(command) == 0
    assert requested_files(hub) == [], "what is there was asked for again"
    assert not (locate_model(model).path / WEIGHTS).exists()


def test_training_after_plan_fetches_only_weights(
    hub: FakeHubServer, model: str, recipe: Path
) -> None:
    assert run_command(read_only_commands(recipe, model)[0]) == 0
    planned = locate_model(model)
    requested_files(hub)
    hub.faults.cuts[WEIGHTS] = [5_000, 0, 0, 0, 0]
    assert run_command(["train", str(recipe)]) == 2
    assert set(requested_files(hub)) == {WEIGHTS}
    hub.lfs_requests.clear()
    assert run_command(["train", str(recipe)]) == 0
    assert requested_files(hub) == [WEIGHTS]
    assert [asked.range for asked in hub.lfs_requests] == ["bytes=5000-"]
    assert planned.weight_files() == [planned.path / WEIGHTS]
    assert sha256_file(planned.path / WEIGHTS) == sha256_file(recipe.parent / "tiny" / WEIGHTS)
    assert (
        run_command([*read_only_commands(recipe, model)[0], f"model={recipe.parent / 'run'}"]) == 0
    )
    assert requested_files(hub) == []


def test_offline_training_reports_missing_weights(
    hub: FakeHubServer,
    model: str,
    recipe: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    plan, *_ = read_only_commands(recipe, model)
    assert run_command(plan) == 0
    requested_files(hub)
    with monkeypatch.context() as offline:
        offline.setenv("HF_HUB_OFFLINE", "1")
        assert run_command(plan) == 0
        capsys.readouterr()
        assert run_command(["train", str(recipe)]) == 2
        output = " ".join(capsys.readouterr().err.split())
        assert f"{WEIGHTS} of {model} is not downloaded, and HF_HUB_OFFLINE is set" in output
        assert f"`finesight download {model}`" in output
        assert requested_files(hub) == []
    assert run_command(["download", model]) == 0
    assert requested_files(hub) == [WEIGHTS]
    request.getfixturevalue("without_sockets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert run_command(["train", str(recipe)]) == 0


def test_adapter_base_is_checked_against_hub_weights(
    hub: FakeHubServer, model: str, recipe: Path
) -> None:
    adapters = yaml.safe_load(recipe.read_text()) | {"tune": {"language": "lora"}}
    write_recipe(recipe, adapters | {"model": str(recipe.parent / "tiny")})
    assert run_command(["train", str(recipe)]) == 0
    plan = read_only_commands(recipe, model)[0]
    assert run_command([*plan, f"model={model}", f"adapter={recipe.parent / 'run'}"]) == 0
    assert requested_files(hub) == sorted(hub.repositories["models/Some/tiny"])


def test_serving_commands_need_the_full_model(
    hub: FakeHubServer, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["export", model]) == 0
    folder = locate_model(model).path
    assert f"vllm serve {folder}" in capsys.readouterr().out
    assert (folder / WEIGHTS).is_file()
