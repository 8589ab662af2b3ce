"""The container file: what its build is given is enough, and who runs it is not root."""

from __future__ import annotations

import re
import shutil
import tomllib
import zipfile
from pathlib import Path

import pytest
from by_path import loaded
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[1]
TRY = loaded("tools/try_wheel.py")
STEPS = re.sub(r"\\\n\s*", "", (ROOT / "Containerfile").read_text()).splitlines()


def _told(instruction: str) -> list[str]:
    """What the steps of this instruction say, in order."""
    return [step.removeprefix(f"{instruction} ") for step in STEPS if step.startswith(instruction)]


@pytest.fixture
def given(tmp_path: Path) -> Path:
    """The folder that a build sees: what .dockerignore lets through."""
    everything, *kept = (ROOT / ".dockerignore").read_text().split()
    assert everything == "*", "what is not named is left out"
    for name in (line.removeprefix("!") for line in kept):
        source, target = ROOT / name, tmp_path / "given" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns(*TRY.MADE))
        else:
            shutil.copy(source, target)
    return tmp_path / "given"


def test_what_a_build_is_given_makes_the_same_wheel(given: Path, tmp_path: Path) -> None:
    (tmp_path / "dist").mkdir()
    built = tmp_path / "dist" / TRY.hook("build_wheel", given, tmp_path / "dist")
    assert _contents(built) == _contents(TRY.build(ROOT, tmp_path / "whole")[1])


def _contents(wheel: Path) -> dict[str, int]:
    with zipfile.ZipFile(wheel) as archive:
        return {file.filename: file.CRC for file in archive.infolist()}


def test_what_a_step_copies_is_given(given: Path) -> None:
    for step in _told("COPY"):
        *sources, _ = step.split()
        assert all((given / name).exists() for name in sources), step


def test_the_base_is_one_version_and_new_enough() -> None:
    (base,) = {step.split()[0] for step in _told("FROM")} - {"python"}
    version = re.fullmatch(r"docker\.io/library/python:(\d+\.\d+\.\d+)-slim-\w+", base)
    assert version is not None, base
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert version[1] in SpecifierSet(project["requires-python"])


def test_only_extras_that_are_there_are_installed() -> None:
    (extras,) = (step.partition("=")[2] for step in _told("ARG") if step.startswith("EXTRAS"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(extras.split(",")) <= set(project["optional-dependencies"])


def test_everything_but_the_source_is_installed_in_tested_versions() -> None:
    installs = [step for step in _told("RUN") if "pip install" in step]
    assert installs
    assert all(re.search(r"pip install -c \S*constraints\.txt ", step) for step in installs)


def test_it_runs_as_no_root() -> None:
    (user,) = _told("USER")
    uid, _, gid = user.partition(":")
    assert int(uid) > 0, "a number: Kubernetes cannot tell whether a name is root's"
    assert int(gid) > 0
