"""Tests of commands with hub models: inspection downloads small files, training all files."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import yaml
from fake_hub_servers import FakeHubServer
from hub_fixtures import cache, huggingface, modelscope, without_sockets
from tiny_task import make_task, write_recipe

from finesight.files.storage import sha256_file
from finesight.ingest import init_operation as init
from finesight.model_folder import TINY_MODEL, locate_model
from finesight.samples.sample import read_samples

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
        assert f"or online: finesight download {model}" in error
        assert requested_files(hub) == []
    cli("download", model)
    assert requested_files(hub) == [WEIGHTS]
    request.getfixturevalue("without_sockets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    cli(*TRAIN)


def test_adapter_base_is_checked_against_hub_weights(hub, model, cli):
    recipe = yaml.safe_load(Path("recipe.yaml").read_text()) | {"tune": {"language": "lora"}}
    write_recipe(Path("recipe.yaml"), recipe | {"model": "task/tiny"})
    cli(*TRAIN)
    cli(*PLAN, f"model={model}", "adapter=run")
    assert requested_files(hub) == sorted(hub.repositories["models/Some/tiny"])


def test_serving_commands_need_the_full_model(hub, model, cli):
    output = cli("export", model).out
    folder = locate_model(model).path
    assert f"vllm serve {folder}" in output
    assert (folder / WEIGHTS).is_file()


GPU = ("RTX 4090", round(24e9))


@pytest.fixture
def table(hub: FakeHubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Table of images in the working directory, on a machine with a GPU."""
    monkeypatch.setattr(init, "find_device", lambda: GPU)
    rows = [f"task/train{n}.png,{color}" for n, color in enumerate(["red", "green", "blue"] * 3)]
    Path("labels.csv").write_text("\n".join(["image,text", *rows]))


def start_without_model(cli: Any, *words: str) -> str:
    """Run init without access to its model, follow a proposal, and return its messages."""
    printed = cli("init", "labels.csv", "--yes", "--out", "new", *words)
    recipe = Path("new/recipe.yaml")
    assert len(read_samples(Path("new/data/data.jsonl"))) == 9
    assert "check   " in printed.out
    steps = [shlex.split(line, comments=True)[1:] for line in printed.next_steps.splitlines()]
    model = yaml.safe_load(recipe.read_text())["model"]
    download, with_folder, with_tiny = steps
    assert download[:2] == ["download", model]
    assert with_folder == ["plan", str(recipe), f"model={download[3]}"]
    assert with_tiny[:3] == ["plan", str(recipe), f"model={TINY_MODEL}"]
    # The folder of another machine, and the bundled model, lead to a training.
    shutil.copytree("task/tiny", download[3])
    for number, step in enumerate((with_folder, with_tiny)):
        (train,) = cli(*step).next_steps.splitlines()
        short = ["train.steps=1", "train.epochs=null", f"output_dir=new/run-{number}"]
        cli(*shlex.split(train)[1:], *short)
    return printed.err


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("words", [(), ("--model", "Qwen/Qwen3.5-4B"), ("--model", "hf:a/b")])
def test_data_are_imported_without_a_connection(hub, monkeypatch, words, cli):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    err = start_without_model(cli, *words)
    assert "the run was not planned" in err
    assert "HF_HUB_OFFLINE is set" in err


@pytest.mark.usefixtures("table")
def test_data_are_imported_if_the_model_is_gated(hub, model, cli):
    hub.gated.add("models/Some/tiny")
    err = start_without_model(cli, "--model", model)
    assert "is gated or private" in err
    assert "create a token" in err


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("name", ["{hub}:Some/other", "task/other", "other", "labels.csv"])
def test_wrong_name_of_a_model_is_reported_before_the_import(hub, model, name, cli):
    name = name.format(hub=model.partition(":")[0])
    error = cli("init", "labels.csv", "--yes", "--out", "new", "--model", name, code=2).err
    assert "remedy: " in error
    assert not Path("new").exists()


@pytest.mark.usefixtures("table")
def test_adapter_needs_its_base_model(hub, monkeypatch, cli):
    """Its settings follow from the layers of the base model."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    Path("adapter").mkdir()
    config = {"base_model_name_or_path": "Some/base", "peft_type": "LORA", "r": 4, "lora_alpha": 8}
    Path("adapter/adapter_config.json").write_text(json.dumps(config))
    words = ("init", "labels.csv", "--yes", "--out", "new", "--model", "adapter")
    assert "Some/base" in cli(*words, code=2).err
    assert not Path("new").exists()


@pytest.mark.usefixtures("table")
def test_disk_without_space_for_the_weights_is_reported(hub, model, monkeypatch, cli):
    size = len(hub.repositories["models/Some/tiny"][WEIGHTS])
    monkeypatch.setattr("finesight.files.storage.file_system.free_bytes", lambda path: size - 1)
    for command in (("plan", "recipe.yaml"), TRAIN):
        error = cli(*command, code=2).err
        assert "are free on this disk" in error
        assert "choose another disk (HF_HOME" in error
    # Another machine may have the space.
    cli(*PLAN)
    printed = cli("init", "labels.csv", "--yes", "--out", "new", "--model", model, code=2)
    assert "are free on this disk" in printed.err
    assert yaml.safe_load(Path("new/recipe.yaml").read_text())["model"] == model
    assert len(read_samples(Path("new/data/data.jsonl"))) == 9


def test_incomplete_copy_of_a_model_is_reported(hub, cache, monkeypatch, cli):
    """Another program has downloaded a part of the files into the cache of huggingface_hub."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = cache / "hub" / "models--Some--part"
    snapshot = folder / "snapshots" / ("a" * 40)
    shutil.copytree("task/tiny", snapshot)
    (snapshot / WEIGHTS).unlink()
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("a" * 40)
    cli(*PLAN, "model=Some/part")
    for command in (("plan", "recipe.yaml"), TRAIN):
        error = " ".join(cli(*command, "model=Some/part", code=2).err.split())
        assert "the cached copy of hf:Some/part is incomplete" in error
        assert "remedy: unset HF_HUB_OFFLINE, or online: finesight download hf:Some/part" in error
