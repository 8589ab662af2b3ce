"""Small runs of benchmarks."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import environment_learning
import gpu_recommendation
import pytest
import yaml
from case_files import load_cases
from container_fixtures import make_parquet
from fake_hub_servers import FakeHubServer, HuggingFaceHandler, run_hub_server
from hub_fixtures import cache, huggingface, make_image_cell
from math_answer import correct
from real_weights import (
    DOCVQA,
    MODELS,
    RESULTS,
    TASKS,
    format_table,
    import_splits,
    limit_samples,
    load_rows,
    main,
)
from rich.console import Console

import finesight
from finesight.evaluate.eval_case import EvalCase
from finesight.evaluate.reward_scorer import RewardScorer
from finesight.plan.run_plan import plan_run
from finesight.progress import ProgressConsole
from finesight.samples.sample import ContentPart, read_samples
from finesight.settings.recipe import recipe_from_dict

__all__ = ["cache", "huggingface"]

ROOT = Path(__file__).resolve().parents[1]
BUNDLED_MODEL = Path(finesight.__file__).parent / "assets" / "finesight-tiny"


def test_gpu_recommendation_table(tmp_path: Path) -> None:
    data = gpu_recommendation.write_dataset(tmp_path, 84)
    console = ProgressConsole(Console(quiet=True))
    rows = []
    for method in gpu_recommendation.TUNING_METHODS[:2]:
        recipe = gpu_recommendation.make_recipe("finesight-tiny", data, 84, method)
        row = gpu_recommendation.make_row(plan_run(recipe, "T4", console), method)
        rows.append({"model": "tiny", "side": 84, **row})
    lora, everything = rows
    assert lora["memory_gb"] < everything["memory_gb"]
    assert gpu_recommendation.format_cell([{**lora, "fits": False}, everything]).startswith("all: ")
    assert gpu_recommendation.format_cell([{**lora, "fits": False}]) == "no"
    (line,) = gpu_recommendation.format_table(rows, 84, ("LoRA",))[2:]
    assert line.startswith("| T4, 16 GB | LoRA: ")


def test_environment_learning_scores_episodes(tmp_path: Path) -> None:
    task = environment_learning.TASKS["words"]
    settings = environment_learning.TrainingSettings(
        demonstrations=1, rewarded=1, validation=2, max_completion_length=4
    )
    environment_learning.write_splits(tmp_path / "words", task, settings, seed=0)
    data = tmp_path / "words" / "validation" / "data.jsonl"
    for uses_tools in (True, False):
        found = environment_learning.run_episodes(
            BUNDLED_MODEL, data, task, settings, uses_tools=uses_tools
        )
        assert len(found["successes"]) == 2
        assert (found["tool_turns"], found["errors"]) == (0, 0)


def test_environment_learning_pools_seeds() -> None:
    before = [True, False, False, False, False, True] * 5
    after = [True, True, True, False, True, False] * 5
    assert "gain" not in environment_learning.pool({"single": before})["single"]
    pooled = environment_learning.pool({"sft": before, "grpo": after})
    assert pooled["sft"]["score"] == 0.3333
    assert pooled["grpo"]["score"] == 0.6667
    assert pooled["grpo"]["gain"] == 0.3333
    low, high = pooled["grpo"]["gain_interval"]
    assert 0 < low < 0.3333 < high < 0.7


def test_results_name_existing_benchmarks():
    """A reader repeats a measurement with the command in its file."""
    results = (ROOT / "benchmarks" / "results").glob("*.json*")
    named = {
        name for file in results for name in re.findall(r"benchmarks/\w+\.py", file.read_text())
    }
    assert len(named) > 20
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


def test_imported_names_of_the_project_exist():
    """Of the package and of the tests; also within functions and scripts for other processes."""
    modules = "|".join(file.stem for file in (ROOT / "tests").glob("*.py"))
    module = rf"(?:finesight(?:\.[\w.]+)?|{modules})"
    statement = re.compile(rf"from {module} import (?:\([^)]*\)|.+)")
    for file in (ROOT / "benchmarks").glob("*.py"):
        for line in statement.findall(file.read_text()):
            exec(line, {})  # raises ImportError


def make_rows(image: str, columns: dict[str, Any], seed: int) -> bytes:
    """Return a Parquet file with an image in the first column; `{n}` is the number of a row.

    The name `images` is a list of images.
    """
    rows = []
    for n in range(12):
        cells = json.loads(json.dumps(columns).replace("{n}", str(n)))
        cell = make_image_cell(n + seed)
        rows.append({image: [cell] if image == "images" else cell, **cells})
    return make_parquet(rows)


def build_repositories() -> dict[str, dict[str, bytes]]:
    """Return datasets with the columns of the published ones, and finesight-tiny as a model."""
    files = {file.name: file.read_bytes() for file in BUNDLED_MODEL.iterdir()}
    repositories = {"models/Local/tiny": files}
    for seed, (name, dataset) in enumerate(load_cases("real_weights")["datasets"].items()):
        subset, image, columns = dataset["subset"], dataset["image"], dataset["columns"]
        paths = {split: f"{subset or 'data'}/{split}-0.parquet" for split in dataset["splits"]}
        files = {
            path: make_rows(image, columns, 1000 * seed + 100 * number)
            for number, path in enumerate(paths.values())
        }
        data = [{"split": split, "path": path} for split, path in paths.items()]
        card = {"configs": [{"config_name": subset or "default", "data_files": data}]}
        files["README.md"] = f"---\n{yaml.safe_dump(card)}---\n".encode()
        repositories[f"datasets/{name}"] = files
    return repositories


def run_real_weights(hub_url: str, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    variables = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    variables |= {"HF_ENDPOINT": hub_url, "HF_HOME": str(folder / "home")}
    script = str(ROOT / "benchmarks" / "real_weights.py")
    command = [sys.executable, script, "--work", str(folder / "work"), *words]
    return subprocess.run(command, env=variables, capture_output=True, text=True, cwd=folder)


def test_columns_of_real_datasets_become_samples(
    huggingface: FakeHubServer, tmp_path: Path
) -> None:
    huggingface.repositories |= build_repositories()
    datasets = {name: task.dataset for name, task in TASKS.items()} | {"docvqa": DOCVQA}
    expected = load_cases("real_weights")["samples"]
    assert datasets.keys() == expected.keys()
    for name, dataset in datasets.items():
        files = import_splits(limit_samples(dataset, 8), tmp_path / name)
        train, evaluation = map(read_samples, files)
        assert len(evaluation) == 2
        assert len(train) >= 8
        for content, texts in zip(evaluation[0].messages, expected[name], strict=True):
            assert [one for part in content.content if (one := summarize_part(part))] == texts
    assert evaluation[0].references == ("no",)


def summarize_part(part: ContentPart) -> object:
    """Return the text of a part or the corners of its box; None for an image."""
    return list(part.xyxy) if part.type == "box" else getattr(part, "text", None)


def test_real_weights_runs_on_a_local_hub(tmp_path: Path) -> None:
    """Two rows run: fine-tuning of a model on the hub, and GRPO."""
    trial = ("--limit", "8", "--set", "train.steps=2", "train.batch_size=4")
    small = ("eval.max_new_tokens=8", "image={max_pixels: 12544}")
    rewards = "rewards=[math, {name: length, max_length: 4}]"
    grpo = ("train.grpo={num_generations: 2, max_completion_length: 12}", rewards)
    with run_hub_server(HuggingFaceHandler) as hub:
        hub.repositories |= build_repositories()
        for task, more in {"handwriting": (), "geometry": grpo}.items():
            words = ("--model", "Local/tiny", "--only", f"{task}/tiny", *trial, *small, *more)
            process = run_real_weights(hub.url, tmp_path, *words)
            assert process.returncode == 0, process.stderr
    saved = json.loads((tmp_path / "work" / "trial.json").read_text())["rows"]
    rows = {row["task"]: row for row in saved}
    assert [rows[name]["status"] for name in TASKS] == ["trial", "not run", "not run", "trial"]
    for name, score in (("handwriting", "similarity"), ("geometry", "correct")):
        row = rows[name]
        assert (row["score"], row["steps"]) == (score, 2)
        assert row["num_samples"] == {"train": 8, "eval": 2}
        assert row["before"]["num_samples"] == row["after"]["num_samples"] == 2
        assert row["before"]["value"] == row["difference"]["before"]
        assert row["docvqa"].keys() >= {"before", "after", "low", "problems"}
        assert row["peak_memory_gb"] > 0
        assert row["seconds"].keys() == {"import", "import_docvqa", "check", "train", "guard"}
    assert process.stdout.splitlines() == format_table(saved)
    assert (tmp_path / "work" / "runs" / "geometry-tiny" / "responses.jsonl").is_file()


def test_real_weights_results_are_in_the_documentation() -> None:
    """All rows are in the file and in the table of the page, also those that have not run."""
    saved = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]
    assert saved == list(load_rows(RESULTS, MODELS).values())
    assert len(saved) == len(TASKS) * len(MODELS)
    page = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert "\n".join(format_table(saved)) in page, "run real_weights.py --table"


def test_real_weights_needs_a_network(tmp_path: Path) -> None:
    process = run_real_weights("http://127.0.0.1:9", tmp_path, "--only", "grounding/Qwen3.5-4B")
    assert process.returncode == 2, process.stderr
    assert re.search(r"^error: .*\n?.*127.0.0.1:9", process.stderr, re.MULTILINE)
    assert "Traceback" not in process.stderr
    assert not list(tmp_path.glob("work/*.json"))


def test_real_weights_rejects_unknown_rows_and_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.json"
    other.write_text("{}")
    work = ["--work", str(tmp_path), "--only"]
    cases = {
        "did you mean grounding/Qwen3.5-4B": [*work, "grounding/Qwen3.5-5B"],
        "do not contain rows": [*work, "grounding/Qwen3.5-4B", "--out", str(other)],
        "add --work DIR": ["--only", "grounding/Qwen3.5-4B"],
    }
    for message, words in cases.items():
        assert main(words) == 2
        assert message in capsys.readouterr().err
    assert other.read_text() == "{}"


def test_math_answers_are_compared_as_formulas() -> None:
    answers = {r"So x = 2, and \boxed{\frac{1}{2}}": 1.0, r"\boxed{2}": 0.0, "": 0.0}
    for answer, score in answers.items():
        assert correct(EvalCase(answer, (), (r"\frac{2}{4}",), ())) == score


def test_recipes_of_real_weights_are_valid() -> None:
    """Also the settings that a trial replaces."""
    for task in TASKS.values():
        data = {"model": MODELS[0], "data": {"train": "a.jsonl"}, "output_dir": "run"}
        recipe = recipe_from_dict(task.recipe | data)
        with RewardScorer(recipe.rewards) as scorer:
            text = "4 + 4 is 8:\n\\boxed{8}"
            scores = scorer.score([EvalCase(text, (), ("8",), ())])
        assert scores == [[1.0]] * len(recipe.rewards)
