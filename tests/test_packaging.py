"""Tests of the contents of wheel and source archive."""

import json
import re
import shutil
import subprocess
import tomllib
import zipfile
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
import yaml
from module_loader import load_module
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from finesight import __version__
from finesight.files.storage import sha256_file
from finesight.model_folder import TINY_MODEL, TINY_MODEL_FOLDER, locate_model

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


def _find_required_packages(requirements: list[str]) -> dict[str, Distribution]:
    """Return the installed packages that these requirements need, also indirectly."""
    packages: dict[str, Distribution] = {}
    waiting = [(Requirement(one), {""}) for one in requirements]
    while waiting:
        requirement, extras = waiting.pop()
        name = canonicalize_name(requirement.name)
        marker = requirement.marker
        if marker is not None and not any(marker.evaluate({"extra": extra}) for extra in extras):
            continue
        if name not in packages:
            packages[name] = distribution(name)
            needed = packages[name].requires or ()
            waiting += [(Requirement(one), requirement.extras | {""}) for one in needed]
    return packages


def test_required_packages_are_listed_and_not_copyleft() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    packages = _find_required_packages(project["dependencies"])
    assert len(packages) > len(project["dependencies"])
    for name, package in packages.items():
        labels = package.metadata.get_all("Classifier", [])
        labels = [one for one in labels if one.startswith("License ::")]
        labels += package.metadata.get_all("License-Expression", [])
        labels += [text[:80] for text in package.metadata.get_all("License", [])]
        assert labels, f"{name}: no license in the metadata"
        copyleft = re.search(r"GPL|General Public", " ".join(labels))
        assert copyleft is None, f"{name}: {labels}"
    ours = {one for one in packages if not one.startswith(("nvidia-", "cuda-", "triton"))}
    for language in ("en", "zh"):
        page = (ROOT / "docs" / language / "licenses.md").read_text("utf-8")
        listed = set(re.findall(r"^\| ([a-z0-9-]+) \| .* \|$", page, flags=re.MULTILINE))
        assert ours <= listed, f"add to docs/{language}/licenses.md: {sorted(ours - listed)}"


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


def test_build_context_gives_the_same_wheel(build_context, archives, tmp_path):
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
    assert {"heif", "pdf", "video", "xlsx"} <= set(extras.split(","))
    assert set(extras.split(",")) <= set(project["optional-dependencies"])
    for language in ("en", "zh"):
        assert f"`{extras}`" in (ROOT / "docs" / language / "launching.md").read_text()
    (user,) = _read_instructions("USER")
    assert all(int(number) > 0 for number in user.split(":")), "Kubernetes knows numbers only"
