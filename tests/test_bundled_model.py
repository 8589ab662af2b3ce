"""The package's own model by its name: in every command, from every directory, in any venv."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny_model import create_tiny_model
from tiny_task import make_task

from finesight.model_folder import TINY_MODEL

PACKAGE = Path(__file__).parents[1] / "src" / "finesight"

DRIVER = """
import io, json, sys
from contextlib import redirect_stdout, redirect_stderr
from finesight.cli.app import main
for words in json.load(sys.stdin):
    shown = io.StringIO()
    sys.argv = ["finesight", *words]
    with redirect_stdout(shown), redirect_stderr(shown):
        try:
            code = main() or 0
        except SystemExit as end:
            code = end.code or 0
    print(json.dumps([code, shown.getvalue()]))
"""
"""Runs one command after the other in one process: torch is slow to import."""


class PackageCopy:
    """A copy of the package in a folder of its own, as another venv has one."""

    def __init__(self, site: Path, model: Path | None) -> None:
        self.site = site
        ignored = shutil.ignore_patterns("__pycache__", "assets")
        shutil.copytree(PACKAGE, site / "finesight", ignore=ignored)
        if model is not None:
            shutil.copytree(model, site / "finesight" / "assets" / TINY_MODEL)

    def run(self, folder: Path, *commands: list[str]) -> list[tuple[int, str]]:
        """Run commands in a working directory; return exit code and output of each."""
        environment = {**os.environ, "PYTHONPATH": str(self.site), "HF_HUB_OFFLINE": "1"}
        command, given = [sys.executable, "-c", DRIVER], json.dumps(commands)
        output = subprocess.check_output(
            command, input=given, env=environment, cwd=folder, text=True
        )
        return [tuple(json.loads(line)) for line in output.splitlines()]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return create_tiny_model(tmp_path_factory.mktemp("model") / "model", seed=1)


@pytest.fixture(scope="module")
def this_installation(tmp_path_factory: pytest.TempPathFactory, model: Path) -> PackageCopy:
    return PackageCopy(tmp_path_factory.mktemp("here"), model)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory, this_installation: PackageCopy) -> Path:
    """Make a folder with a recipe, its data, a LoRA run and a run that continues from it."""
    folder = tmp_path_factory.mktemp("task")
    recipe = make_task(folder) | {"model": TINY_MODEL, "output_dir": "run"}
    recipe["tune"] = {"language": "lora", "lora": {"rank": 2}}
    recipe["train"] = recipe["train"] | {"epochs": None, "steps": 2}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    steps = this_installation.run(
        folder,
        ["show", "recipe.yaml"],
        ["check", "recipe.yaml"],
        ["train", "recipe.yaml"],
        ["train", "recipe.yaml", "model=run", "output_dir=next"],
        ["train", "run/recipe.yaml", "--resume"],
    )
    assert [code for code, _ in steps] == [0] * 5, steps
    assert "<|image_pad|>" in steps[0][1], steps[0]
    return folder


def test_run_stores_the_name_without_path(task: Path, this_installation: PackageCopy) -> None:
    for run in ("run", "next"):
        assert json.loads((task / run / "manifest.json").read_text())["base_model"] == TINY_MODEL
        adapter = json.loads((task / run / "adapter" / "adapter_config.json").read_text())
        assert adapter["base_model_name_or_path"] == TINY_MODEL
        for path in (task / run).rglob("*.*"):
            assert str(this_installation.site).encode() not in path.read_bytes(), path


def test_run_works_in_another_installation(task: Path, tmp_path: Path, model: Path) -> None:
    ask = ["train0.png", "--prompt", "Which colour?", "--max-new-tokens", "3", "--json"]
    evaluate = ["--data", "eval.jsonl", "--metric", "qa", "--max-new-tokens", "3", "--json"]
    done = PackageCopy(tmp_path, model).run(
        task,
        ["predict", "run", *ask],
        ["predict", "run/adapter", *ask],
        ["predict", TINY_MODEL, *ask],
        ["eval", "run", *evaluate],
        ["eval", TINY_MODEL, *evaluate],
        ["merge", "run", "merged"],
        ["predict", "merged", *ask],
        ["check", "train.jsonl", "--model", TINY_MODEL],
    )
    assert [code for code, _ in done] == [0] * 8, done
    answers = [json.loads(shown.splitlines()[-1])["answer"] for _, shown in done[:3]]
    assert answers[0] == json.loads(done[6][1].splitlines()[-1])["answer"]
    assert len(answers[2]) > 0, "the bare model says nothing"


def test_wrong_bundled_model_is_rejected_as_base(task: Path, tmp_path: Path, model: Path) -> None:
    shutil.copytree(model, tmp_path / "other")
    config = tmp_path / "other" / "model.safetensors"
    content = config.read_bytes().replace(b'"format":"pt"', b'"format":"np"', 1)
    config.write_bytes(content)
    (tmp_path / "site").mkdir()
    later = PackageCopy(tmp_path / "site", tmp_path / "other")
    ((code, shown),) = later.run(task, ["predict", "run", "train0.png", "--prompt", "a"])
    assert code == 2
    assert "the base model of the run" in shown


def test_installation_without_model_is_reported(task: Path, tmp_path: Path) -> None:
    stripped = PackageCopy(tmp_path, None)
    ask = ["--prompt", "a"]
    named, tuned, recipe = stripped.run(
        task,
        ["predict", TINY_MODEL, "train0.png", *ask],
        ["predict", "run", "train0.png", *ask],
        ["train", "recipe.yaml", "output_dir=more"],
    )
    for code, shown in (named, tuned, recipe):
        assert code == 2
        assert f"finesight is installed without its model {TINY_MODEL}" in shown
        assert "reinstall finesight" in shown
    assert not (task / "more").exists()
