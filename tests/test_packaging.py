"""Wheel and source archive: built from this checkout, they hold what they should and no more."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from by_path import loaded
from safetensors import safe_open

from finesight import __version__
from finesight.digests import digest
from finesight.hub import TINY, TINY_FOLDER, locate

ROOT = Path(__file__).parents[1]


TRY = loaded("tools/try_wheel.py")
SOURCES = {str(path) for path in TRY.source_files(ROOT)}


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The source archive, and the wheel made from it."""
    return TRY.build(ROOT, tmp_path_factory.mktemp("built"))


def test_the_wheel_is_the_package_and_nothing_else(archives: tuple[Path, Path]) -> None:
    packed = {name for name in TRY.contents(archives[1]) if ".dist-info/" not in name}
    own = {name.removeprefix("src/") for name in SOURCES if name.startswith("src/")}
    weights = {Path(name).stem for name in SOURCES if name.endswith(".xz")}
    own |= {f"finesight/assets/{TINY}/{name}" for name in weights}
    assert packed == own, "see package-data in pyproject.toml, and setup.py"


def test_the_wheel_says_whose_it_is_and_how_it_is_called(archives: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(archives[1]) as wheel:
        about = {Path(name).name: name for name in wheel.namelist() if ".dist-info/" in name}
        metadata = wheel.read(about["METADATA"]).decode()
        assert wheel.read(about["LICENSE"]) == (ROOT / "LICENSE").read_bytes()
        assert b"finesight = finesight.cli.app:main" in wheel.read(about["entry_points.txt"])
    assert "License-Expression: Apache-2.0" in metadata
    assert (ROOT / "README.md").read_text("utf-8").strip() in metadata


def test_the_source_archive_is_the_checkout(archives: tuple[Path, Path]) -> None:
    packed = {
        name
        for name in TRY.contents(archives[0])
        if ".egg-info/" not in name and name not in ("PKG-INFO", "setup.cfg")
    }
    assert packed == SOURCES, "see MANIFEST.in"


def test_the_checkout_is_what_git_knows() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("this is no checkout of git")
    done = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    there = {name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()}
    assert there <= SOURCES, "see SOURCES in tools/try_wheel.py"


def test_a_file_that_nobody_named_is_not_packed(tmp_path: Path) -> None:
    for name in ("pyproject.toml", "README.md", "LICENSE", "src/finesight/__init__.py"):
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_bytes((ROOT / name).read_bytes())
    for name in (f"{TINY}/a.safetensors", f"{TINY}/README.md", "other/b.safetensors"):
        (tmp_path / "tree/src/finesight/assets" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree/src/finesight/assets" / name).write_bytes(bytes(9))
    (tmp_path / "tree/src/finesight/notes.txt").write_text("mine")
    (tmp_path / "dist").mkdir()
    wheel = tmp_path / "dist" / TRY.hook("build_wheel", tmp_path / "tree", tmp_path / "dist")
    packed = {name for name in TRY.contents(wheel) if ".dist-info/" not in name}
    assets = f"finesight/assets/{TINY}"
    assert packed == {"finesight/__init__.py", f"{assets}/README.md", f"{assets}/a.safetensors"}


def test_the_model_of_the_package_is_whole_and_small() -> None:
    model = locate(TINY)
    shards = model.weight_files()
    assert max(path.stat().st_size for path in shards) <= 12e6, "a shard of more than 12 MB"
    everything = sum(path.stat().st_size for path in TINY_FOLDER.iterdir())
    assert everything <= 26e6, f"{everything} bytes in all"
    for path in shards:
        with safe_open(path, framework="pt") as file:
            kinds = {file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
        assert kinds == {torch.bfloat16}, f"{path.name} holds {kinds}"
    card = (TINY_FOLDER / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\n"), "the card has no front matter"
    assert "license: apache-2.0" in card


def test_other_weights_of_the_same_shapes_are_another_base() -> None:
    # The fingerprint is over headers and index: the index has to tell the numbers apart.
    model = locate(TINY)
    index = model.file("model.safetensors.index.json")
    assert index is not None, "no index beside the shards"
    told = json.loads(index.read_text())["metadata"]["sha256"]
    assert told == {path.name: digest(path) for path in model.weight_files()}


def _run(offline: object, code: str) -> subprocess.CompletedProcess[str]:
    return offline.run([sys.executable, "-c", code])


def test_nothing_connects_when_offline(tmp_path: Path) -> None:
    offline = TRY.Offline(tmp_path)
    package, _ = offline.prove(Path(sys.executable))
    assert Path(package).name == "__init__.py"
    assert offline.tried() == ()
    code = "import urllib.request\ntry: urllib.request.urlopen('http://localhost:9/')\n"
    swallowed = _run(offline, f"{code}except Exception: print('went on')")
    assert swallowed.stdout == "went on\n", swallowed.stderr
    assert "getaddrinfo ['localhost'" in offline.tried()[0]


def test_processes_still_speak_to_each_other_when_offline(tmp_path: Path) -> None:
    offline = TRY.Offline(tmp_path)
    code = (
        "import multiprocessing as m\n"
        "with m.get_context('forkserver').Pool(2) as pool: print(pool.map(abs, [-1, -2]))"
    )
    done = _run(offline, code)
    assert done.stdout == "[1, 2]\n", done.stderr
    assert offline.tried() == ()


def test_one_version_is_told_everywhere() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == __version__
    assert cited["license"] == "Apache-2.0"
    assert f"\n## {__version__}\n" in (ROOT / "CHANGELOG.md").read_text()
