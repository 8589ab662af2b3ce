"""Run tests of the core in a copy of the project without the satellites.

    python tools/core_copy.py PYTEST_OPTIONS

The satellites are the packages that the core does not import (`pyproject.toml`). Tests that need
one are listed in `tests/cases/satellite_tests.yaml`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from verify_wheel import source_files

ROOT = Path(__file__).resolve().parents[1]

MARKERS = "not slow and not fuzz and not satellite"
"""Default of the option -m."""

ALIAS_FOLDER = "data/formats"
"""Former names of modules of a satellite."""


def list_satellites() -> list[str]:
    """Return the names of the packages that the core does not import, such as `serve`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    contracts = project["tool"]["importlinter"]["contracts"]
    (contract,) = (one for one in contracts if one["name"] == "the core imports no satellite")
    return [module.removeprefix("finesight.") for module in contract["forbidden_modules"]]


def copy_core(folder: Path) -> Path:
    """Copy the package without satellites, and return the folder of the copy for PYTHONPATH."""
    package = folder / "src" / "finesight"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "src" / "finesight", package, ignore=ignored)
    for name in (*list_satellites(), ALIAS_FOLDER):
        shutil.rmtree(package / name.replace(".", "/"))
    return package.parent


def copy_project(folder: Path) -> Path:
    """Copy what tests read besides the package, and return the folder for PYTHONPATH."""
    for path in source_files(ROOT):
        if path.parts[0] != "src":
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / path, folder / path)
    shared = ROOT.parent / "shared"
    if shared.is_dir():
        (folder.parent / "shared").symlink_to(shared)
    return copy_core(folder)


def main() -> int:
    """Run pytest in a copy, and return its exit code."""
    with tempfile.TemporaryDirectory(prefix="finesight-core-") as temporary:
        folder = Path(temporary) / "finesight"
        path = copy_project(folder)
        environment = os.environ | {"PYTHONPATH": str(path)}
        command = [sys.executable, "-m", "pytest", "-m", MARKERS, *sys.argv[1:]]
        return subprocess.run(command, cwd=folder, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
