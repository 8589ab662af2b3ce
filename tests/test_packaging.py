"""Tests of the contents of wheel and source archive."""

from __future__ import annotations

import json
import subprocess
import zipfile
from pathlib import Path

import pytest
import yaml
from module_loader import load_module

from finesight import __version__
from finesight.model_folder import TINY_MODEL, TINY_MODEL_FOLDER, locate_model
from finesight.storage import sha256_file

ROOT = Path(__file__).parents[1]


VERIFY_WHEEL = load_module("tools/verify_wheel.py")
SOURCES = {str(path) for path in VERIFY_WHEEL.source_files(ROOT)}


def test_wheel_contains_only_the_package(archives: tuple[Path, Path]) -> None:
    packed = {name for name in VERIFY_WHEEL.list_contents(archives[1]) if ".dist-info/" not in name}
    own = {name.removeprefix("src/") for name in SOURCES if name.startswith("src/")}
    weights = {Path(name).stem for name in SOURCES if name.endswith(".xz")}
    own |= {f"finesight/assets/{TINY_MODEL}/{name}" for name in weights}
    assert packed == own, "see package-data in pyproject.toml, and setup.py"


def test_wheel_metadata(archives: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(archives[1]) as wheel:
        about = {Path(name).name: name for name in wheel.namelist() if ".dist-info/" in name}
        metadata = wheel.read(about["METADATA"]).decode()
        assert wheel.read(about["LICENSE"]) == (ROOT / "LICENSE").read_bytes()
        assert b"finesight = finesight.cli.app:main" in wheel.read(about["entry_points.txt"])
    assert "License-Expression: Apache-2.0" in metadata
    assert (ROOT / "README.md").read_text("utf-8").strip() in metadata


def test_sdist_matches_the_checkout(archives: tuple[Path, Path]) -> None:
    packed = {
        name
        for name in VERIFY_WHEEL.list_contents(archives[0])
        if ".egg-info/" not in name and name not in ("PKG-INFO", "setup.cfg")
    }
    assert packed == SOURCES, "see MANIFEST.in"


def test_checkout_matches_git() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("this is no checkout of git")
    done = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    there = {name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()}
    assert there <= SOURCES, "see SOURCE_PATTERNS in tools/verify_wheel.py"


def test_bundled_model_is_small_and_identified_by_its_index() -> None:
    """The fingerprint covers headers and index, so the index depends on the weights."""
    model = locate_model(TINY_MODEL)
    shards = model.weight_files()
    assert max(path.stat().st_size for path in shards) <= 12e6, "a shard of more than 12 MB"
    everything = sum(path.stat().st_size for path in TINY_MODEL_FOLDER.iterdir())
    assert everything <= 26e6, f"{everything} bytes in all"
    index = model.find_file("model.safetensors.index.json")
    assert index is not None, "no index beside the shards"
    result = json.loads(index.read_text())["metadata"]["sha256"]
    assert result == {path.name: sha256_file(path) for path in shards}
    card = (TINY_MODEL_FOLDER / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\n"), "the card has no front matter"
    assert "license: apache-2.0" in card


def test_version_is_consistent() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == __version__
    assert cited["license"] == "Apache-2.0"
    assert f"\n## {__version__}\n" in (ROOT / "CHANGELOG.md").read_text()
