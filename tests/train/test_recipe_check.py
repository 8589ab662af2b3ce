"""Checks of recipes: all commands refuse what training refuses at its set-up."""

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from case_files import load_cases
from click.testing import CliRunner
from tiny_model import create_tiny_model
from tiny_task import TinyTask

from finesight.cli.app import app, run_command
from finesight.errors import Step, UserError
from finesight.model.lora.peft_io import save_adapter
from finesight.model.trainable import configure_tuning
from finesight.model.weights_io import load_model
from finesight.model_folder import ModelFolder
from finesight.operations.operation import list_words
from finesight.settings import recipe_template
from finesight.settings.config import TuneSettings
from finesight.settings.manifest import load_manifest
from finesight.settings.recipe import load_recipe
from finesight.train import recipe_check
from finesight.train.recipe_check import check_recipe, describe_start

CASES = load_cases("refused_recipes")
TUNE = {"language": "lora", "lora": {"rank": 4, "alpha": 8, "dropout": 0.0}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a task with runs: finished, unfinished, and one whose base model is missing."""
    task = TinyTask(tmp_path_factory.mktemp("task"))
    task.recipe |= {"tune": TUNE, "train": task.recipe["train"] | {"epochs": 1, "save_every": None}}
    task.run(name="run")
    shutil.copytree(task.folder / "run", task.folder / "unfinished")
    for name in ("adapter", "checkpoints"):
        shutil.rmtree(task.folder / "unfinished" / name)
    shutil.copytree(task.folder / "run", task.folder / "moved")
    manifest = task.folder / "moved" / "manifest.json"
    manifest.write_text(manifest.read_text().replace(str(task.folder / "tiny"), "moved/tiny"))
    create_tiny_model(task.folder / "qwen2_5_vl", "qwen2_5_vl")
    rows = [json.loads(line) for line in (task.folder / "train.jsonl").read_text().splitlines()]
    text = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}
    files = {
        "pairs": [row | {"rejected": "nothing"} for row in rows],
        "labels": [row | {"label": False} for row in rows],
        "texts": [text | {"id": str(n)} for n in range(8)],
    }
    for name, samples in files.items():
        lines = "".join(f"{json.dumps(sample)}\n" for sample in samples)
        (task.folder / f"{name}.jsonl").write_text(lines)
    (task.folder / "recipe.yaml").write_text(yaml.safe_dump(task.recipe))
    return task.folder


def write_recipe(folder: Path, changes: dict[str, Any]) -> Path:
    """Write a recipe with changed settings for the task in the folder."""
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text()) | {"output_dir": "new"}
    for key, value in changes.items():
        *groups, name = key.split(".")
        section = recipe
        for group in groups:
            section = section.setdefault(group, {})
        section[name] = value
    file = folder / "changed.yaml"
    names = {name: str(folder / name) for name in ("run", "unfinished", "moved")}
    text = yaml.safe_dump(recipe)
    for name, path in names.items():
        text = text.replace(f"{{{name}}}", path)
    file.write_text(text)
    return file


def find_error(*words: object) -> str:
    """Return the message of a command that fails; empty if it succeeds."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    if isinstance(result.exception, UserError):
        return str(result.exception)
    assert isinstance(result.exception, SystemExit | None), result.exception
    return result.output if result.exit_code else ""


def save_random_adapter(model: Path, tune: TuneSettings, target: Path) -> None:
    """Write the initial adapter of a model in the format of PEFT."""
    loaded = load_model(ModelFolder(model), torch.float32, torch.device("cpu"))
    configure_tuning(loaded, tune, seed=0)
    target.mkdir()
    save_adapter(target, loaded, base_model=str(model))


REFUSING = {
    "recipe": ("train", "plan", "check", "show"),
    "samples": ("train", "plan", "check"),
    "run": ("train", "plan"),
}


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for kind, found in CASES.items() for name in found],
)
def test_commands_refuse_what_training_refuses(folder, monkeypatch, kind, name):
    monkeypatch.chdir(folder)
    changes, words = CASES[kind][name]
    recipe = write_recipe(folder, changes)
    for command in REFUSING[kind]:
        assert words in find_error(command, recipe), f"{command} accepts: {name}"
    assert not (folder / "new").exists()
    if kind == "run":
        assert find_error("check", recipe) == find_error("show", recipe) == ""


def test_metrics_and_rewards_may_be_in_the_home_folder(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "scores.py").write_text("def score(case): return 1.0\n")
    changes = {
        "eval.metric": "~/scores.py:score",
        "train.objective": "grpo",
        "rewards": ["~/scores.py:score"],
    }
    check_recipe(load_recipe(write_recipe(folder, changes)), runs_functions=False)


def test_missing_packages_are_reported_for_this_machine_only(folder, monkeypatch):
    monkeypatch.chdir(folder)

    def find_no_package(name: str) -> None:
        return None

    def import_nothing(setting: str) -> None:
        raise UserError("bitsandbytes cannot be imported", where=setting)

    monkeypatch.setattr("finesight.tracker_components.find_spec", find_no_package)
    monkeypatch.setattr(recipe_check, "import_bitsandbytes", import_nothing)
    tracked = write_recipe(folder, {"track": ["mlflow"]})
    for command in ("train", "plan", "check", "show"):
        error = find_error(command, tracked)
        assert ("mlflow is not installed" in error) == (command in ("train", "plan")), command
    assert find_error("plan", tracked, "--gpu", "T4") == ""
    quantized = write_recipe(folder, {"tune.quantize.nf4": ["language"]})
    for command in ("train", "plan"):
        assert "bitsandbytes cannot be imported" in find_error(command, quantized)


def test_full_disk_is_reported_by_plan_and_training(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("finesight.files.storage.file_system.free_bytes", lambda path: 1000)
    recipe = write_recipe(folder, {})
    for command in ("plan", "train"):
        error = find_error(command, recipe)
        assert "are free on this disk" in error, command
        assert "checkpoints of" in error, command
    assert find_error("plan", recipe, "--gpu", "T4") == ""


def test_weights_that_do_not_fit_the_configuration_are_reported(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(folder, {"model": str(tmp_path / "model")})
    shutil.copytree(folder / "tiny", "model")
    config = Path("model/config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 1}))
    (Path("model") / "sha256.json").unlink()
    for command in ("plan", "train"):
        assert "tensors are unknown to this model" in find_error(command, recipe)
    # A plan for another machine needs no weights.
    assert find_error("plan", recipe, "--gpu", "T4") == ""
    Path("model/model.safetensors").unlink()
    for command in ("plan", "train"):
        assert "a model folder without weights" in find_error(command, recipe)


@pytest.mark.parametrize("name", ["run", "pairs.jsonl"])
def test_plan_proposes_an_output_folder_that_is_free(folder, monkeypatch, name, capsys):
    monkeypatch.chdir(folder)
    recipe = write_recipe(folder, {"output_dir": name, "train.steps": 1, "train.epochs": None})
    assert f"{name}:" in find_error("train", recipe)
    assert run_command(["plan", str(recipe)]) == 0
    printed = capsys.readouterr()
    assert f"note: {name} " in printed.out
    words = shlex.split(printed.err.partition("next:")[2])[1:]
    assert words[-1] == f"output_dir={name}-2"
    assert run_command(words) == 0
    shutil.rmtree(f"{name}-2")


def test_unknown_layers_name_the_settings_of_the_adapter(folder, tmp_path, monkeypatch):
    """The remedy of an adapter is followed: its overrides make the recipe right."""
    monkeypatch.chdir(folder)
    changes = {"tune": {"merger": "lora", "language": "full"}, "train.steps": 1}
    changes |= {"train.epochs": None, "output_dir": str(tmp_path / "new"), "model": "{run}"}
    recipe = write_recipe(folder, changes)
    with pytest.raises(UserError) as raised:
        check_recipe(load_recipe(recipe))
    overrides = re.match(r"add (.*), as the adapter was trained", str(raised.value.remedy))
    assert overrides is not None
    words = overrides[1].split()
    assert words == [
        *("tune.merger=frozen", "tune.language=lora", "tune.lora.rank=4", "tune.lora.alpha=8")
    ]
    for command in ("plan", "show", "check", "train"):
        given = [] if command == "check" else words
        assert (find_error(command, recipe, *given) == "") == bool(given), command


TUNES: dict[str, dict[str, Any]] = {
    "language": {"language": "lora", "lora": {"rank": 3, "alpha": 6, "dropout": 0.1}},
    "all parts": {"vision": "lora", "merger": "lora", "language": "lora"},
    "targets": {"language": "lora", "lora": {"target_modules": ["down_proj", "q_proj"]}},
    "merger": {"language": "frozen", "merger": "lora"},
}


@pytest.mark.parametrize("name", TUNES)
def test_adapter_of_peft_starts_a_run_with_its_settings(tmp_path, name):
    """The adapter has no manifest: the settings follow from its layers and ranks."""
    model = create_tiny_model(tmp_path / "model")
    tune = TuneSettings.model_validate(TUNES[name])
    save_random_adapter(model, tune, tmp_path / "adapter")
    start = describe_start(str(tmp_path / "adapter"))
    assert start.tune == tune
    assert not start.has_image_rule


def test_adapter_of_different_ranks_must_be_merged(tmp_path):
    model = create_tiny_model(tmp_path / "model")
    tune = TuneSettings.model_validate({"language": "lora", "lora": {"rank": 4, "alpha": 8}})
    save_random_adapter(model, tune, tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    content = json.loads(config.read_text())
    # Another scale of the first layer only.
    content["alpha_pattern"] = {"layers.0.self_attn.q_proj": 1}
    config.write_text(json.dumps(content))
    with pytest.raises(UserError) as raised:
        describe_start(str(tmp_path / "adapter"))
    assert raised.value.remedy.operation == "merge"
    arguments = {**raised.value.remedy.arguments, "out": str(tmp_path / "merged")}
    assert find_error(*list_words(Step("merge", arguments))) == ""
    assert describe_start(str(tmp_path / "merged")).tune is None


STARTS: dict[str, tuple[list[str], str]] = {
    "adapter": ([], "run"),
    "targets": (["tune.lora.target_modules=[q_proj,v_proj]"], "run"),
    "vision": (["tune.vision=lora", "tune.merger=lora", "tune.language=frozen"], "run"),
    "mixed": (["tune.merger=full"], "run"),
    "full": (["tune.language=full", "train.learning_rate=1e-5"], "run"),
    "images": (["image.max_pixels=1568", "data.system_prompt=Brief."], "run"),
    "checkpoint": (["train.save_every=1"], "run/checkpoints/step-1"),
    "PEFT": ([], "run/adapter"),
    "merged": ([], "merged"),
}


@pytest.mark.parametrize("name", STARTS)
def test_pairs_of_a_run_lead_to_its_further_training(folder, tmp_path, monkeypatch, name, capsys):
    """From the run to pairs, a recipe, its plan, and the end of the training."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recipe_template, "choose_duration", lambda *_, **__: {"train.steps": "1"})
    overrides, start = STARTS[name]
    settings = {"eval": {"metric": "ocr", "max_new_tokens": 16, "every": 0}, "output_dir": "run"}
    # The bundled model ends its answers, so some of them become pairs.
    settings |= {"model": "finesight-tiny", "train.steps": 1, "train.epochs": None}
    recipe = write_recipe(folder, settings)
    assert run_command(["train", str(recipe), *overrides]) == 0
    if start == "merged":
        assert run_command(["merge", "run", "merged"]) == 0
    capsys.readouterr()
    assert run_command(["pairs", "run", "pairs.jsonl"]) == 0
    words = shlex.split(capsys.readouterr().err.partition("next:")[2])[1:]
    assert words == ["init", "pairs.jsonl", "--model", "run"]
    assert run_command([*words[:-1], start]) == 0
    written = load_recipe(Path("pairs-finetune/recipe.yaml"))
    trained = load_recipe(Path("run/recipe.yaml"))
    assert (written.train.objective, written.model) == ("dpo", start)
    if name not in ("full", "merged"):
        assert written.tune == trained.tune
    assert written.image is None
    assert run_command(["plan", "pairs-finetune/recipe.yaml"]) == 0
    assert run_command(["train", "pairs-finetune/recipe.yaml"]) == 0
    first = load_manifest(Path("run/manifest.json"))
    second = load_manifest(Path("pairs-finetune/run/manifest.json"))
    if name != "PEFT":
        assert first.image_rule == second.image_rule
        assert first.system_prompt == second.system_prompt
