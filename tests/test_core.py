"""The core works without the packages that it does not import: its satellites."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

IMPORT_ALL = """
import importlib, pkgutil, finesight
for module in pkgutil.walk_packages(finesight.__path__, "finesight."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
"""


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a copy of the package without satellites."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    contracts = project["tool"]["importlinter"]["contracts"]
    (satellites,) = (one["forbidden_modules"] for one in contracts if one["type"] == "forbidden")
    folder = tmp_path_factory.mktemp("core")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "src" / "finesight", folder / "finesight", ignore=ignored)
    for satellite in satellites:
        shutil.rmtree(folder / satellite.replace(".", "/"))
    # Aliases of modules of the import.
    shutil.rmtree(folder / "finesight" / "data" / "formats")
    return folder


def run_python(core: Path, *words: str) -> str:
    """Run Python with the copy, and return its output."""
    environment = os.environ | {"PYTHONPATH": str(core), "COLUMNS": "100"}
    done = subprocess.run(
        [sys.executable, *words], cwd=core, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_core_imports_without_satellites(core):
    run_python(core, "-c", IMPORT_ALL)


def test_help_of_the_core_lists_its_commands(core):
    text = run_python(core, "-m", "finesight", "--help")
    commands = {line.split()[0] for line in text.splitlines() if line.startswith("  ")}
    assert {"train", "eval", "report", "compare", "predict", "show", "chat"} <= commands
    assert commands.isdisjoint({"import", "init", "serve", "studio", "merge", "search"})


def test_core_loads_a_model_and_encodes(core):
    code = "from finesight import api; print(api.load_model('finesight-tiny').name)"
    assert "finesight-tiny" in run_python(core, "-c", code)
