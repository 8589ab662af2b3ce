"""Built-in components without the rest: removed from a copy, and put back as a package.

In the copy, the rest of finesight imports, type-checks and passes its tests. As a package, the
components have the same results, plan, help and report as before.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny_task import edit_samples, make_task

ROOT = Path(__file__).resolve().parents[1]

COMPONENTS = {"objectives": "train/objectives/kto"}
"""Kind, and folder or module of a built-in component below src/finesight."""

NAMES = {kind: Path(path).stem for kind, path in COMPONENTS.items()}

COPIED = (
    *("src", "tests", "tools", "benchmarks", "pretraining", "docs", "examples", "recipes"),
    *("pyproject.toml", "README.md", "CHANGELOG.md", ".mypy_cache"),
)

RELATED_TESTS = (
    *("tests/train/objectives", "tests/convert", "tests/test_recipe.py"),
    *("tests/cli/test_init.py", "tests/cli/test_first_guesses.py", "tests/cli/test_plugins.py"),
)
"""Tests of the kinds, and of modules that list components."""

IMPORT_ALL = """
import importlib, pkgutil, finesight
for module in pkgutil.walk_packages(finesight.__path__, "finesight."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
"""

MEASURED = re.compile(r"\d[\d.,:]*(?: ?(?:ms|s|min|h|G|M)\b)?")
"""Numbers of measured times and speeds."""


def copy_tree(folder: Path) -> Path:
    """Copy finesight with its tests, without the components, and return its sources."""
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", ".pytest_cache")
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=ignored)
        elif source.is_file():
            shutil.copy(source, folder / name)
    sources = folder / "src" / "finesight"
    for kind, path in COMPONENTS.items():
        if (sources / path).is_dir():
            shutil.rmtree(sources / path)
        else:
            (sources / path).with_suffix(".py").unlink()
        name = NAMES[kind]
        for test in (folder / "tests").rglob(f"test_{name}.py"):
            test.unlink()
        # Rows of the settings and of the page that lists them.
        for file in ("tests/cases/settings.yaml", "docs/en/recipe.md"):
            text = (folder / file).read_text("utf-8").replace(f"`{name}`, ", "")
            rows = [row for row in text.splitlines(keepends=True) if f"train.{name}." not in row]
            (folder / file).write_text("".join(rows), "utf-8")
    return sources


def put_back(site: Path) -> None:
    """Write each component as a package of its own, with an entry point."""
    for kind, path in COMPONENTS.items():
        name = NAMES[kind]
        package = f"finesight_plugin_{name}"
        source = ROOT / "src" / "finesight" / path
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, site / package, ignore=ignored)
        else:
            (site / package).mkdir(parents=True)
            shutil.copy(source.with_suffix(".py"), site / package / "__init__.py")
        module = ".".join(("finesight", *Path(path).parts))
        for file in (site / package).rglob("*.py"):
            file.write_text(file.read_text("utf-8").replace(module, package), "utf-8")
        metadata = site / f"{package}-1.0.dist-info"
        metadata.mkdir()
        text = f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n"
        (metadata / "METADATA").write_text(text)
        entry = f"[finesight.{kind}]\n{name} = {package}:COMPONENT\n"
        (metadata / "entry_points.txt").write_text(entry)


def run_python(*words: str, folder: Path, path: list[Path]) -> str:
    """Run Python with these folders of packages, and return its output."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path)), "COLUMNS": "100"}
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{words}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def rest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a copy without the components."""
    folder = tmp_path_factory.mktemp("rest")
    copy_tree(folder)
    return folder


def test_rest_imports(rest):
    run_python("-c", IMPORT_ALL, folder=rest, path=[rest / "src"])


def test_rest_has_types(rest):
    run_python("-m", "mypy", folder=rest, path=[])


def test_rest_passes(rest):
    without = " and ".join(f"not {name}" for name in NAMES.values())
    options = ["-q", "-p", "no:cacheprovider", "-m", "not slow and not fuzz and not gpu"]
    run_python(
        "-m", "pytest", *options, "-k", without, *RELATED_TESTS, folder=rest, path=[rest / "src"]
    )


def write_inputs(folder: Path) -> None:
    """Write data with labels, and a recipe that uses each component."""
    recipe = make_task(folder / "task", 8, 4)
    for split in ("train", "eval"):
        with edit_samples(folder / "task" / f"{split}.jsonl") as samples:
            for index, sample in enumerate(samples):
                sample["label"] = index % 2 == 0
    recipe["output_dir"] = str(folder / "run")
    recipe["train"] |= {"objective": NAMES["objectives"], "steps": 2, "device": "cpu"}
    recipe["train"].pop("epochs", None)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def list_results(folder: Path, path: list[Path]) -> dict[str, str]:
    """Train with each component, and return what users see, without times and folders."""
    write_inputs(folder)

    def run(*words: str) -> str:
        return run_python("-m", "finesight", *words, folder=folder, path=path)

    found = {"plan": MEASURED.sub("N", run("plan", "recipe.yaml", "--gpu", "A10"))}
    for command in ("train", "init"):
        found[f"{command} --help"] = run(command, "--help")
    run("train", "recipe.yaml")
    run("report", "run", "--out", "report.html")
    page = (folder / "report.html").read_text("utf-8").replace(str(folder), "")
    # Charts of measured times have different ticks.
    page = re.sub("data:[^\"']+", "", page)
    found["page"] = " ".join(sorted({*re.findall(r"\b[A-Za-z]{4,}\b", page)}))
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line) for line in lines if '"loss"' in line]
    found["losses"] = str([(one["step"], one["loss"], one["grad_norm"]) for one in losses])
    return found


def test_components_work_as_packages(rest, tmp_path):
    put_back(tmp_path / "site")
    for name in ("before", "after"):
        (tmp_path / name / "work").mkdir(parents=True)
    expected = list_results(tmp_path / "before" / "work", [ROOT / "src"])
    found = list_results(tmp_path / "after" / "work", [rest / "src", tmp_path / "site"])
    for name, text in expected.items():
        assert found[name] == text, name
