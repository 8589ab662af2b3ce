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
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from image_fixtures import write_gray_image
from tiny_model import create_tiny_model
from tiny_task import edit_samples, make_task

ROOT = Path(__file__).resolve().parents[1]

COMPONENTS = {
    "objectives": "train/objectives/kto",
    "optimizers": "train/optim/muon",
    "metrics": "evaluate/metrics/pointing",
    "rewards": "evaluate/rewards/repetition",
    "trackers": "track/trackers/mlflow",
    "launchers": "launch/launchers/skypilot",
    "families": "families/qwen3_5_moe",
    "formats": "ingest/formats/fiftyone",
}
"""Kind, and folder or module of a built-in component below src/finesight."""

NAMES = {kind: Path(path).stem for kind, path in COMPONENTS.items()}

COPIED = (
    *("src", "tests", "tools", "benchmarks", "pretraining", "docs", "examples", "recipes"),
    *("pyproject.toml", "README.md", "CHANGELOG.md", ".mypy_cache"),
)

RELATED_TESTS = (
    *("tests/train/objectives", "tests/train/optim", "tests/evaluate", "tests/track"),
    *("tests/launch", "tests/plan", "tests/convert", "tests/test_recipe.py"),
    *("tests/train/test_master_weight_optimizer.py", "tests/train/test_recipe_check.py"),
    *("tests/cli/test_init.py", "tests/cli/test_first_guesses.py", "tests/cli/test_plugins.py"),
    *("tests/cli/test_launch.py", "tests/cli/test_launchers.py"),
    *("tests/encode", "tests/export", "tests/model/test_config.py", "tests/model/test_vlm.py"),
    *("tests/ingest/formats", "tests/ingest/test_importer.py", "tests/cli/test_import.py"),
)
"""Tests of the kinds, and of modules that list components."""

TEXT_SUFFIXES = (".py", ".yaml", ".html", ".js", ".css", ".md")

NAMED_ELSEWHERE = (
    ("settings/trainer_settings.yaml", "settings of other trainers"),
    ("app/static/zh.yaml", "translations"),
    ("assets/finesight-tiny/README.md", "what the practice model was trained on"),
    ("app/static/chat.html", "the repetition penalty of sampling"),
    ("infer/token_sampler.py", "the repetition penalty of sampling"),
    ("convert/ms_swift.py", "random draws with repetition"),
    ("files/pattern_matcher.py", "nested repetition of regular expressions"),
    ("ingest/formats/row_keys.py", "a column of public datasets"),
)
"""Files of the rest with the names of components, and what they mean there."""

IMPORT_ALL = """
import importlib, pkgutil, finesight
for module in pkgutil.walk_packages(finesight.__path__, "finesight."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
"""

MEASURED = re.compile(r"\d[\d.,:]*(?: ?(?:ms|s|min|h|G|M)\b)?")
"""Numbers of measured times and speeds."""

TIMES = re.compile("_s$|_at$|_dir$|per_s|time|flops|mfu|memory")
"""Names of metrics that differ between equal runs."""

TRACKER = {"kind": NAMES["trackers"], "uri": "mlruns"}

USE_TRACKER_AND_REWARD = f"""
from pathlib import Path
from finesight.evaluate.eval_case import EvalCase
from finesight.evaluate.reward_scorer import RewardScorer
from finesight.settings.recipe import load_recipe
print(load_recipe(Path("recipe.yaml"), {{"track": [{TRACKER}]}}).track)
with RewardScorer(load_recipe(Path("responses.yaml")).rewards) as scorer:
    print(scorer.score([EvalCase(4 * "on and ", (), ("on",), ())]))
"""

LAUNCH_OPTIONS = ["--image", "a/b:1", "--store", "s3://b/c", "--accelerator", "H100", "--spot"]


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
            text = (folder / file).read_text("utf-8")
            text = re.sub(rf"`{name}`(, | or )?", "", text)
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
    environment["MLFLOW_ALLOW_FILE_STORE"] = "true"
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


def test_rest_names_no_component(rest):
    sources = rest / "src" / "finesight"
    names = {name.replace("_", "[-_.]?") for name in NAMES.values()}
    pattern = re.compile(rf"\b(?:{'|'.join(names)})\b", re.IGNORECASE)
    files = [path for path in sources.rglob("*") if path.suffix in TEXT_SUFFIXES]
    naming = {path for path in files if pattern.search(path.read_text("utf-8"))}
    found = {path.relative_to(sources).as_posix() for path in naming}
    assert found == {file for file, _ in NAMED_ELSEWHERE}


def test_rest_has_types(rest):
    run_python("-m", "mypy", folder=rest, path=[])


def test_rest_passes(rest):
    without = " and ".join(f"not {name}" for name in NAMES.values())
    options = ["-q", "-p", "no:cacheprovider", "-m", "not slow and not fuzz and not gpu"]
    run_python(
        "-m", "pytest", *options, "-k", without, *RELATED_TESTS, folder=rest, path=[rest / "src"]
    )


def write_inputs(folder: Path) -> None:
    """Write data with points and labels, two recipes that use the components, and a dataset.

    Launchers need relative paths.
    """
    recipe = make_task(folder / "task", 8, 4)
    for split in ("train", "eval"):
        with edit_samples(folder / "task" / f"{split}.jsonl") as samples:
            for index, sample in enumerate(samples):
                point = {"type": "point", "xy": [9, 9 + index]}
                sample["messages"][-1]["content"] = [point]
                sample["label"] = split == "eval" or index % 2 == 0
    recipe["output_dir"] = "run"
    recipe["train"] |= {"steps": 2, "epochs": None, "device": "cpu"}
    grpo = {"num_generations": 2, "max_completion_length": 12, "max_refills": 0}
    responses = recipe | {
        "model": str(create_tiny_model(folder / "task" / "other", NAMES["families"])),
        "data": {"train": recipe["data"]["eval"]},  # without labels that are false
        "train": recipe["train"] | {"objective": "grpo", "grpo": grpo},
        "rewards": [NAMES["rewards"], {"name": "format", "pattern": "[^a-m]*"}],
        "output_dir": "responses",
    }
    recipe["train"] |= {"objective": NAMES["objectives"], "optimizer": NAMES["optimizers"]}
    recipe["eval"] = {"metric": NAMES["metrics"], "max_new_tokens": 4}
    if find_spec(NAMES["trackers"]) is not None:
        recipe["track"] = [TRACKER]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "responses.yaml").write_text(yaml.safe_dump(responses))
    (folder / "boxes" / "data").mkdir(parents=True)
    write_gray_image(folder / "boxes" / "data" / "a.png")
    labels = {"a": [{"label": "dog", "bounding_box": [0.1, 0.2, 0.3, 0.5]}]}
    (folder / "boxes" / "labels.json").write_text(json.dumps({"labels": labels}))


def list_words(text: str) -> str:
    """List the words of a text. Its order differs: names of plug-ins are the last ones."""
    words = {*re.findall(r"\b[A-Za-z]{4,}\b", text)} - {"Plug"}
    return " ".join(sorted(words))


def list_plugin_kinds(run: Path) -> set[str]:
    """Return the kinds of the plug-ins that a run records."""
    manifest = json.loads((run / "manifest.json").read_text())
    return {plugin["kind"] for plugin in manifest["plugins"]}


def list_metrics(run: Path) -> str:
    """List the metrics of a run without those of time."""
    found = []
    for line in (run / "metrics.jsonl").read_text().splitlines():
        metrics = json.loads(line)
        found.append({name: metrics[name] for name in metrics if not TIMES.search(name)})
    return str(found)


def list_results(folder: Path, path: list[Path]) -> dict[str, str]:
    """Use each component, and return what users see, without times and folders."""
    write_inputs(folder)

    def run(*words: str) -> str:
        return run_python(*words, folder=folder, path=path)

    command = ("-m", "finesight")
    found = {"plan": MEASURED.sub("N", run(*command, "plan", "recipe.yaml", "--gpu", "A10"))}
    for name in ("train", "launch"):
        found[f"{name} --help"] = run(*command, name, "--help")
    for name in ("init", "eval", "import"):
        found[f"{name} --help"] = list_words(run(*command, name, "--help"))
    found["import"] = run(*command, "import", "boxes", "imported")
    for file in sorted((folder / "imported").glob("*.jsonl")):
        found[f"imported {file.name}"] = file.read_text("utf-8")
    # The package of the tracker may be missing, and responses have few words.
    found["tracker and reward"] = run("-c", USE_TRACKER_AND_REWARD)
    run(*command, "launch", "recipe.yaml", "--on", NAMES["launchers"], *LAUNCH_OPTIONS)
    found["launch"] = (folder / "run.sky.yaml").read_text("utf-8")
    for name in ("recipe", "responses"):
        run(*command, "train", f"{name}.yaml")
    run(*command, "report", "run", "--out", "report.html")
    page = (folder / "report.html").read_text("utf-8").replace(str(folder), "")
    # Charts of measured times have different ticks.
    found["page"] = list_words(re.sub("data:[^\"']+", "", page))
    for name in ("run", "responses"):
        found[f"metrics of {name}"] = list_metrics(folder / name)
    run(*command, "merge", "responses", "merged", "--num-samples", "1")
    found["merged model"] = (folder / "merged" / "config.json").read_text("utf-8")
    # The time, value and step of each loss.
    for file in folder.glob("mlruns/*/*/metrics/loss"):
        lines = file.read_text().splitlines()
        found["tracked losses"] = str([line.split()[1:] for line in lines])
    return found


def test_components_work_as_packages(rest, tmp_path):
    put_back(tmp_path / "site")
    for name in ("before", "after"):
        (tmp_path / name / "work").mkdir(parents=True)
    expected = list_results(tmp_path / "before" / "work", [ROOT / "src"])
    found = list_results(tmp_path / "after" / "work", [rest / "src", tmp_path / "site"])
    assert found.keys() == expected.keys()
    work = tmp_path / "after" / "work"
    kinds = {"objectives", "optimizers", "metrics", "trackers"}
    if find_spec(NAMES["trackers"]) is None:
        kinds.remove("trackers")
    assert list_plugin_kinds(work / "run") == kinds
    assert list_plugin_kinds(work / "responses") == {"rewards", "families"}
    for name, text in expected.items():
        assert found[name] == text, name
