"""Small runs of benchmarks."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import gpu_recommendation
from fake_hub_servers import HuggingFaceHandler, run_hub_server
from hub_fixtures import make_image_cell, make_parquet
from real_weights import MODELS, RESULTS, TASKS, format_table, load_rows
from rich.console import Console

from finesight.plan.run_plan import plan_run
from finesight.progress import ProgressConsole

ROOT = Path(__file__).resolve().parents[1]
HANDWRITING_CARD = b"""---
configs:
- config_name: human_handwrite
  data_files:
  - {split: train, path: human_handwrite/train-*}
  - {split: test, path: human_handwrite/test-*}
---
"""
DOCVQA_CARD = b"""---
configs:
- config_name: DocVQA
  data_files:
  - {split: validation, path: DocVQA/validation-*}
---
"""


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


def test_results_name_existing_benchmarks():
    """A reader repeats a measurement with the command in its file."""
    results = (ROOT / "benchmarks" / "results").glob("*.json*")
    named = {
        name for file in results for name in re.findall(r"benchmarks/\w+\.py", file.read_text())
    }
    assert len(named) > 20
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


def test_imported_names_of_the_package_exist():
    """Also those within functions, and in scripts for other processes."""
    statement = re.compile(r"from finesight(?:\.[\w.]+)? import (?:\([^)]*\)|.+)")
    for file in (ROOT / "benchmarks").glob("*.py"):
        for line in statement.findall(file.read_text()):
            exec(line, {})  # raises ImportError


def make_rows(count: int, **columns: Any) -> bytes:
    """Return a Parquet file with an image in the first column; `{n}` is the number of a row."""
    image, *others = columns
    rows = []
    for n in range(count):
        cells = {
            name: json.loads(json.dumps(columns[name]).replace("{n}", str(n))) for name in others
        }
        cell = make_image_cell(n + 100 * len(columns))
        rows.append({image: [cell] if columns[image] else cell, **cells})
    return make_parquet(rows)


def run_real_weights(hub_url: str, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    variables = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    variables |= {"HF_ENDPOINT": hub_url, "HF_HOME": str(folder / "home")}
    script = str(ROOT / "benchmarks" / "real_weights.py")
    command = [sys.executable, script, "--work", str(folder / "work"), *words]
    return subprocess.run(command, env=variables, capture_output=True, text=True, cwd=folder)


def test_real_weights_runs_on_a_local_hub(tmp_path: Path) -> None:
    """Two rows run with the columns of the published datasets: fine-tuning and GRPO."""
    trial = ("--model", "finesight-tiny", "--limit", "8", "--set", "train.steps=2")
    small = ("train.batch_size=4", "eval.max_new_tokens=8", "image={max_pixels: 12544}")
    formulas = make_rows(12, image=False, text="x ^ {{n}}")
    with run_hub_server(HuggingFaceHandler) as hub:
        hub.repositories |= {
            "datasets/linxy/LaTeX_OCR": {
                "human_handwrite/train-0.parquet": formulas,
                "human_handwrite/test-0.parquet": formulas,
                "README.md": HANDWRITING_CARD,
            },
            "datasets/hiyouga/geometry3k": {
                f"data/{split}-0.parquet": make_rows(
                    12, images=True, problem="<image>Find x.", answer="{n}", id=1
                )
                for split in ("train", "test")
            },
            "datasets/lmms-lab/DocVQA": {
                "DocVQA/validation-0.parquet": make_rows(
                    12, image=False, questionId="{n}", question="Who?", answers=["{n}", "no"]
                ),
                "README.md": DOCVQA_CARD,
            },
        }
        first = run_real_weights(
            hub.url, tmp_path, "--only", "handwriting/finesight-tiny", *trial, *small
        )
        assert first.returncode == 0, first.stderr
        rewards = "rewards=[math, {name: length, max_length: 4}]"
        grpo = ("train.grpo={num_generations: 2, max_completion_length: 12}", rewards)
        second = run_real_weights(
            hub.url, tmp_path, "--only", "geometry/finesight-tiny", *trial, *small, *grpo
        )
        assert second.returncode == 0, second.stderr
    saved = json.loads((tmp_path / "work" / "trial.json").read_text())["rows"]
    rows = {row["task"]: row for row in saved}
    assert [rows[name]["status"] for name in TASKS] == ["trial", "not run", "not run", "trial"]
    for name, score in (("handwriting", "similarity"), ("geometry", "correct")):
        row = rows[name]
        assert (row["score"], row["steps"], row["num_samples"]) == (
            score,
            2,
            {"train": 8, "eval": 2},
        )
        assert row["before"]["num_samples"] == row["after"]["num_samples"] == 2
        assert row["before"]["value"] == row["difference"]["before"]
        assert row["docvqa"].keys() >= {"before", "after", "low", "problems"}
        assert row["peak_memory_gb"] > 0
        assert row["seconds"].keys() == {"import", "import_docvqa", "check", "train", "guard"}
    assert second.stdout.splitlines() == format_table(saved)
    assert (tmp_path / "work" / "runs" / "geometry-finesight-tiny" / "responses.jsonl").is_file()


def test_real_weights_results_are_in_the_documentation() -> None:
    """All rows are in the file and in the table of the page, also those that have not run."""
    saved = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]
    assert saved == list(load_rows(RESULTS, MODELS).values())
    assert len(saved) == len(TASKS) * len(MODELS)
    page = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert "\n".join(format_table(saved)) in page, "run real_weights.py --table"


def test_real_weights_without_network_or_with_unknown_row_is_a_user_error(tmp_path: Path) -> None:
    offline = run_real_weights("http://127.0.0.1:9", tmp_path, "--only", "grounding/Qwen3.5-4B")
    unknown = run_real_weights("", tmp_path, "--only", "grounding/Qwen3.5-5B")
    for process, message in (
        (offline, "127.0.0.1:9"),
        (unknown, "did you mean grounding/Qwen3.5-4B"),
    ):
        assert process.returncode == 2, process.stderr
        assert re.search(rf"^error: (.*\n)*.*{message}", process.stderr, re.MULTILINE)
        assert "Traceback" not in process.stderr
    assert not list(tmp_path.glob("work/*.json"))
