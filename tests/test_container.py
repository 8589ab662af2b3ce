"""Tests of the container file: build context, base image, dependencies, user."""

from __future__ import annotations

import re
import shutil
import tomllib
import zipfile
from pathlib import Path

import pytest
from module_loader import load_module
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[1]
VERIFY_WHEEL = load_module("tools/verify_wheel.py")
STEPS = re.sub(r"\\\n\s*", "", (ROOT / "Containerfile").read_text()).splitlines()


def _read_instructions(instruction: str) -> list[str]:
    """Return the arguments of all steps with this instruction."""
    return [step.removeprefix(f"{instruction} ") for step in STEPS if step.startswith(instruction)]


@pytest.fixture
def build_context(tmp_path: Path) -> Path:
    """Copy the build context, as filtered by .dockerignore."""
    everything, *retained = (ROOT / ".dockerignore").read_text().split()
    assert everything == "*", "what is not named is left out"
    for name in (line.removeprefix("!") for line in retained):
        source, target = ROOT / name, tmp_path / "given" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            generated = shutil.ignore_patterns(*VERIFY_WHEEL.GENERATED_PATTERNS)
            shutil.copytree(source, target, ignore=generated)
        else:
            shutil.copy(source, target)
    return tmp_path / "given"


def test_build_context_gives_the_same_wheel(
    build_context: Path, archives: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "dist").mkdir()
    name = VERIFY_WHEEL.call_build_hook("build_wheel", build_context, tmp_path / "dist")
    assert _contents(tmp_path / "dist" / name) == _contents(archives[1])
    for step in _read_instructions("COPY"):
        *sources, _ = step.split()
        assert all((build_context / name).exists() for name in sources), step


def _contents(wheel: Path) -> dict[str, int]:
    with zipfile.ZipFile(wheel) as archive:
        return {file.filename: file.CRC for file in archive.infolist()}


def test_installation_is_pinned_complete_and_without_root() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (base,) = {step.split()[0] for step in _read_instructions("FROM")} - {"python"}
    version = re.fullmatch(r"docker\.io/library/python:(\d+\.\d+\.\d+)-slim-\w+", base)
    assert version is not None, base
    assert version[1] in SpecifierSet(project["requires-python"])
    installs = [step for step in _read_instructions("RUN") if "pip install" in step]
    assert installs
    assert all(re.search(r"pip install -c \S*constraints\.txt ", step) for step in installs)
    (extras,) = (
        step.partition("=")[2] for step in _read_instructions("ARG") if step.startswith("EXTRAS")
    )
    # Without the extras that read data, a run fails on photos, videos and Excel files.
    assert {"heif", "video", "xlsx"} <= set(extras.split(","))
    assert set(extras.split(",")) <= set(project["optional-dependencies"])
    for language in ("en", "zh"):
        assert f"`{extras}`" in (ROOT / "docs" / language / "launching.md").read_text()
    (user,) = _read_instructions("USER")
    assert all(int(number) > 0 for number in user.split(":")), "Kubernetes knows numbers only"
