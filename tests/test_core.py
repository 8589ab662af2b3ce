"""The core works without the packages that it does not import: its satellites."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from core_copy import ROOT, copy_core
from image_fixtures import write_gray_image, write_jsonl

IMPORT_ALL = """
import importlib, pkgutil, finesight
for module in pkgutil.walk_packages(finesight.__path__, "finesight."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
"""


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a copy of the package without satellites."""
    return copy_core(tmp_path_factory.mktemp("core"))


def start_python(core: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run Python with the copy."""
    environment = os.environ | {"PYTHONPATH": str(core), "COLUMNS": "100"}
    return subprocess.run(
        [sys.executable, *words], cwd=core, env=environment, capture_output=True, text=True
    )


def run_python(core: Path, *words: str) -> str:
    """Run Python with the copy, and return its output and its messages."""
    done = start_python(core, *words)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout + done.stderr


def test_core_imports_without_satellites(core):
    run_python(core, "-c", IMPORT_ALL)


def test_help_of_the_core_lists_its_commands(core):
    text = run_python(core, "-m", "finesight", "--help")
    commands = {line.split()[0] for line in text.splitlines() if line.startswith("  ")}
    assert {"train", "eval", "report", "compare", "predict", "show", "chat"} <= commands
    assert commands.isdisjoint({"import", "init", "serve", "studio", "merge", "search"})


def write_recipe(folder: Path) -> Path:
    """Write two samples and a recipe for one step, whose paths are absolute."""
    write_gray_image(folder / "a.png")
    samples = []
    for number in range(2):
        question = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "Color?"}]
        answer = [{"type": "text", "text": "gray"}]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        samples.append({"id": f"s{number}", "messages": messages})
    write_jsonl(folder / "data.jsonl", samples)
    settings = {
        "model": "finesight-tiny",
        "data": {"train": str(folder / "data.jsonl")},
        "train": {"steps": 1, "batch_size": 2, "num_workers": 0, "device": "cpu"},
        "output_dir": str(folder / "run"),
    }
    recipe = folder / "recipe.yaml"
    recipe.write_text(json.dumps(settings))
    return recipe


def test_core_trains_and_proposes_its_own_commands(core, tmp_path):
    recipe = write_recipe(tmp_path)
    run_python(core, "-m", "finesight", "show", str(recipe))
    text = run_python(core, "-m", "finesight", "train", str(recipe))
    assert (tmp_path / "run" / "report.html").is_file()
    assert "finesight predict" in text
    assert "finesight serve" not in text
    run_python(core, "-m", "finesight", "report", str(tmp_path / "run"))


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["import", "a.csv", "out"], "no such command: import"),
        (["show", "RECIPE", "model=hf:a/b"], "finesight is installed without finesight.hub"),
        (["show", "RECIPE", "track=wandb"], "finesight is installed without finesight.track"),
        (["train", "RECIPE", "track=wandb"], "finesight is installed without finesight.track"),
    ],
)
def test_missing_satellites_are_user_errors(core, tmp_path, words, problem):
    recipe = str(write_recipe(tmp_path))
    words = [recipe if word == "RECIPE" else word for word in words]
    done = start_python(core, "-m", "finesight", *words)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
    assert problem in done.stderr


def test_functions_of_missing_satellites_are_attribute_errors(core):
    code = "from finesight import api; print(hasattr(api, 'plan'), hasattr(api, 'train'), dir(api))"
    text = run_python(core, "-c", code)
    assert text.startswith("False True")
    assert "'import_data'" not in text


def test_tests_of_the_core_import_no_satellite():
    command = [sys.executable, ROOT / "tools" / "core_copy.py", "--collect-only"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "tests/train/test_trainer.py" in done.stdout
