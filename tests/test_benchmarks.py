"""Small runs of benchmarks."""

import json
import re
import subprocess
import sys
from pathlib import Path

import gpu_recommendation
import large_dataset
import pytest
from peer_data import write_caption_dataset
from rich.console import Console

from finesight.model_folder import locate_model
from finesight.plan.run_plan import plan_run
from finesight.progress import ProgressConsole

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write six generated scenes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("peer_data.SAMPLES", 6)
        return write_caption_dataset(tmp_path_factory.mktemp("scenes") / "data")


def test_missing_peer_is_reported(table: Path, tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    model = locate_model("finesight-tiny").path
    words = [str(model), "--work", str(tmp_path / "work"), "--out", str(out), "--data", str(table)]
    words += ["--only", "finesight,unsloth", "--steps", "2", "--side", "56", "--batch", "2"]
    program = str(ROOT / "benchmarks" / "peer_comparison.py")
    done = subprocess.run([sys.executable, program, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    ours, theirs = json.loads(out.read_text())["results"]
    assert ours["steps"] == 2
    assert ours["samples_per_s"] > 0
    assert theirs["failed"].startswith("not installed: unsloth")
    assert "| unsloth | 2 | not installed: unsloth |" in done.stdout


def test_large_dataset_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_dataset, "NUM_IMAGES", 3)
    monkeypatch.setattr(large_dataset, "SAMPLES_PER_SHARD", 30)
    monkeypatch.setitem(large_dataset.NUM_READ_STEPS, "large", 2)
    large_dataset.write_dataset(
        tmp_path / "large.jsonl", large_dataset.write_images(tmp_path, "large"), 80
    )
    for source in (tmp_path / "large.jsonl", *large_dataset.write_shards(tmp_path / "large.jsonl")):
        row = large_dataset.measure_read_speed(source, None, "large", 0)
        assert (row["samples"], row["pixels"]) == (80, "448")
        assert row["samples_per_s"] > 0
    assert len(list(tmp_path.glob("*.tar"))) == 3


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
