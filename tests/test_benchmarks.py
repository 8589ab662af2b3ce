"""Tests of benchmark calculations, and of small benchmark runs."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cost_scaling
import gpu_recommendation
import large_dataset
import peer_metrics
import pytest
from peer_data import (
    SampleCosts,
    measure_sample_costs,
    write_caption_dataset,
    write_resized_dataset,
)
from PIL import Image
from rich.console import Console
from subprocess_timer import run_timed

from finesight.model_folder import locate_model
from finesight.plan.run_plan import plan_run
from finesight.train.console import TrainingConsole

ROOT = Path(__file__).resolve().parents[1]
COUNTED = SampleCosts(100, 50.0, 10.0, 64.0, 80, 2e9, 1e9, 1e12)
RUN_INFO = {"setting": {}, "versions": {}, "samples": [16] * 5, "num_tokens": 60.0}
RUN_INFO |= {"seconds": [9.0, 9.0, 9.0, 0.5, 0.5], "patches": 64.0, "peak_gb": 1.0}
RUN_INFO |= {"first_step_s": 10.0, "last_step_s": 29.0, "total_s": 31.0, "loss": [2.0, 1.0]}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write six generated scenes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("peer_data.SAMPLES", 6)
        return write_caption_dataset(tmp_path_factory.mktemp("scenes") / "data")


def test_throughput_rows() -> None:
    row = peer_metrics.make_row("one", 16, RUN_INFO, COUNTED)
    assert (row["samples_per_s"], row["tokens_per_s"]) == (32, 1600), "includes warmup steps"
    assert row["mfu"] == pytest.approx(32 * 2e9 / 1e12)
    # 10 s to the first step, the other 184 samples, and 2 s after the last step.
    assert row["recipe_s"] == pytest.approx(10 + 184 / 32 + 2, abs=0.1)
    odd = peer_metrics.make_row("odd", 16, RUN_INFO | {"patches": 400.0}, COUNTED)
    failure = {"failed": "first\nnot | installed", "setting": {}, "total_s": 1.0}
    failed = peer_metrics.make_row("late", 16, failure, COUNTED)
    lines = peer_metrics.format_table([odd, failed])
    assert lines[2].startswith("| odd (other image size) | 16 | 32 |")
    assert lines[3].startswith("| late | 16 | not / installed |")
    rounds = [
        peer_metrics.make_row("one", 16, RUN_INFO | {"peak_gb": peak}, COUNTED)
        for peak in (1.0, 9.0, 2.0)
    ]
    assert "| 2.0 |" in peer_metrics.format_table(rounds)[2], "no median of the rounds"


def test_timed_out_command_preserves_its_output() -> None:
    program = "import time; print('here', flush=True); time.sleep(600)"
    watched = run_timed([sys.executable, "-c", program], {}, 5.0)
    assert watched.timed_out
    assert watched.exit_code != 0
    assert watched.first_line_time("he") <= watched.seconds
    with pytest.raises(LookupError, match="'there'"):
        watched.first_line_time("there")


def test_peer_datasets(table: Path, tmp_path: Path) -> None:
    found = write_resized_dataset(table, tmp_path / "resized", 56)
    rows = [json.loads(line) for line in found.read_text().splitlines()]
    assert len(rows) == 6
    for row in rows:
        with Image.open(row["images"][0]) as image:
            assert image.size == (56, 56)
        assert row["messages"][0]["content"].startswith("<image>")
    model = locate_model("finesight-tiny").path

    def longest(path: Path) -> int:
        return measure_sample_costs(model, path, 56, peer_metrics.lora_settings()).max_tokens

    for tokens in (200, 1000):
        path = cost_scaling.extend_prompts(table, tmp_path / "long.jsonl", tokens, longest)
        assert tokens - 5 <= longest(path) <= tokens
    again = cost_scaling.repeat_dataset(table, tmp_path / "repeated.jsonl", 20)
    assert len(again.read_text().splitlines()) == 20


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
    console = TrainingConsole(Console(quiet=True))
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


@pytest.mark.slow  # starts Label Studio with a new database, a server and a training
@pytest.mark.skipif(shutil.which("label-studio") is None, reason="label-studio is not installed")
def test_label_studio_round_trip(tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "label_studio_round_trip.py"
    subprocess.run([sys.executable, script, "--out", tmp_path / "out.json"], check=True)
    results = json.loads((tmp_path / "out.json").read_text())
    assert results["tasks_with_predictions"] == results["tasks"]
    assert results["keys_in_server_log"] == 0
    for name in ("json", "json_min"):
        assert results[name]["boxes"] == 500
        assert results[name]["max_error_px"] < 0.5


def test_results_name_existing_benchmarks():
    """A reader repeats a measurement with the command in its file."""
    results = (ROOT / "benchmarks" / "results").glob("*.json*")
    named = {
        name for file in results for name in re.findall(r"benchmarks/\w+\.py", file.read_text())
    }
    assert len(named) > 20
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []
