"""Models of hubs by the commands that take one: small files for those that look, all to train."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml
from hub_servers import Serving
from hubs import cache, huggingface, modelscope, without_sockets
from small_run import make_task, write_recipe

from finesight.cli.app import run
from finesight.digests import digest
from finesight.hub import locate

__all__ = ["cache", "huggingface", "modelscope", "without_sockets"]

WEIGHTS = "model.safetensors"


@pytest.fixture(params=["hf", "modelscope"])
def model(request: pytest.FixtureRequest) -> str:
    """Of each hub in turn, the name of a tiny model on it."""
    return f"{request.param}:Some/tiny"


@pytest.fixture
def hub(request: pytest.FixtureRequest, model: str, recipe: Path) -> Serving:
    kind = {"hf": "huggingface"}.get(model.split(":")[0], "modelscope")
    server: Serving = request.getfixturevalue(kind)
    files = (recipe.parent / "tiny").iterdir()
    server.repositories["models/Some/tiny"] = {path.name: path.read_bytes() for path in files}
    return server


@pytest.fixture
def recipe(model: str, tmp_path: Path) -> Path:
    changed = make_task(tmp_path) | {"model": model, "output": str(tmp_path / "run")}
    return write_recipe(tmp_path / "recipe.yaml", changed, epochs=1)


def asked_for(hub: Serving) -> list[str]:
    """The files that were asked for since the last time, by name."""
    paths = [unquote(asked.path) for asked in hub.asked]
    hub.asked.clear()
    found = [re.search(r"(?:/resolve/[^/]+/|FilePath=)([^&]+)", path) for path in paths]
    return sorted(one[1] for one in found if one)


def lookers(recipe: Path, model: str) -> list[list[str]]:
    """The commands that read no weights."""
    samples = str(recipe.parent / "train.jsonl")
    return [
        ["data", "plan", str(recipe), "--gpu", "T4"],
        ["data", "show", str(recipe), "--samples", "1"],
        ["data", "check", str(recipe)],
        ["data", "check", samples, "--model", model, "--max-length", "999"],
    ]


@pytest.mark.parametrize("number", range(4))
def test_who_only_looks_fetches_no_weights(
    hub: Serving, model: str, recipe: Path, number: int
) -> None:
    small = sorted(set(hub.repositories["models/Some/tiny"]) - {WEIGHTS})
    assert run(lookers(recipe, model)[number]) == 0
    assert asked_for(hub) == small
    for command in lookers(recipe, model):
        assert run(command) == 0
    assert asked_for(hub) == [], "what is there was asked for again"
    assert not (locate(model).path / WEIGHTS).exists()


def test_a_run_after_its_plan_fetches_the_weights_alone(
    hub: Serving, model: str, recipe: Path
) -> None:
    assert run(lookers(recipe, model)[0]) == 0
    planned = locate(model)
    asked_for(hub)
    hub.faults.cuts[WEIGHTS] = [5_000, 0, 0, 0, 0]
    assert run(["train", str(recipe)]) == 2
    assert set(asked_for(hub)) == {WEIGHTS}
    hub.fetched.clear()
    assert run(["train", str(recipe)]) == 0
    assert asked_for(hub) == [WEIGHTS]
    assert [asked.range for asked in hub.fetched] == ["bytes=5000-"]
    assert planned.weight_files() == [planned.path / WEIGHTS]
    assert digest(planned.path / WEIGHTS) == digest(recipe.parent / "tiny" / WEIGHTS)
    assert run([*lookers(recipe, model)[0], f"model={recipe.parent / 'run'}"]) == 0
    assert asked_for(hub) == []


def test_offline_a_run_tells_what_its_plan_did_not_fetch(
    hub: Serving,
    model: str,
    recipe: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    plan, *_ = lookers(recipe, model)
    assert run(plan) == 0
    asked_for(hub)
    with monkeypatch.context() as offline:
        offline.setenv("HF_HUB_OFFLINE", "1")
        assert run(plan) == 0
        capsys.readouterr()
        assert run(["train", str(recipe)]) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert f"{WEIGHTS} of {model} was not downloaded before, and HF_HUB_OFFLINE is set" in said
        assert f"`finesight download {model}`" in said
        assert asked_for(hub) == []
    assert run(["download", model]) == 0
    assert asked_for(hub) == [WEIGHTS]
    request.getfixturevalue("without_sockets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert run(["train", str(recipe)]) == 0


def test_an_adapter_s_base_is_compared_with_weights_of_the_hub(
    hub: Serving, model: str, recipe: Path
) -> None:
    adapters = yaml.safe_load(recipe.read_text()) | {"tune": {"language": "lora"}}
    write_recipe(recipe, adapters | {"model": str(recipe.parent / "tiny")})
    assert run(["train", str(recipe)]) == 0
    plan = lookers(recipe, model)[0]
    assert run([*plan, f"model={model}", f"adapter={recipe.parent / 'run'}"]) == 0
    assert asked_for(hub) == sorted(hub.repositories["models/Some/tiny"])


def test_lines_for_other_programs_name_a_whole_model(
    hub: Serving, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["export", model]) == 0
    folder = locate(model).path
    assert f"vllm serve {folder}" in capsys.readouterr().out
    assert (folder / WEIGHTS).is_file()
