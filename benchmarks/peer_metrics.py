"""Convert the results of trainers into comparable rows and a table."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from competitors.job import ALPHA, DROPOUT, LEARNING_RATE, RANK, CompetitorJob
from peer_data import SampleCosts
from subprocess_timer import CommandLog, run_timed

from finesight.settings.config import LoraSettings

WARMUP_STEPS = 3
"""Steps excluded as warmup."""

RECIPE_EPOCHS = 2
PATCH_TOLERANCE = 0.01
"""Tolerated relative difference in patches per sample between equal workloads."""


def samples_per_second(results: Mapping[str, Any]) -> float:
    """Return the median samples/s after warmup."""
    steps = list(zip(results["samples"], results["seconds"], strict=True))
    return statistics.median(n / s for n, s in (steps[WARMUP_STEPS:] or steps))


def recipe_overrides(job: CompetitorJob, data: Path, image_side: int) -> list[str]:
    """Return the workload as recipe overrides of finesight."""
    return [
        f"model={job.model}",
        f"data.train={data}",
        f"image={{height: {image_side}, width: {image_side}}}",
        f"tune.lora={{rank: {RANK}, alpha: {ALPHA}, dropout: {DROPOUT}}}",
        f"train.steps={job.num_steps}",
        f"train.batch_size={job.batch_size}",
        f"train.pack_tokens={max(4096, 256 * job.batch_size)}",
        f"train.learning_rate={LEARNING_RATE}",
        "train.precision=bf16",
        f"output_dir={job.output_dir}",
    ]


def run_recipe(
    words: Sequence[str], run: Path, limit_s: float, num_gpus: int = 1
) -> tuple[CommandLog, list[Any]]:
    """Run `finesight train` with overrides in the folder of `run`, and return its steps.

    Several GPUs are started by torchrun. The run is deleted.
    """
    file = run.with_name("recipe.yaml")
    shutil.rmtree(run, ignore_errors=True)
    file.write_text("{}\n", encoding="utf-8")
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={num_gpus}", "-m"]
    command = [sys.executable, "-m", *(launcher if num_gpus > 1 else []), "finesight", "train"]
    command_log = run_timed([*command, str(file), *words, f"output_dir={run}"], {}, limit_s)
    lines = []
    if (run / "metrics.jsonl").exists():
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(run, ignore_errors=True)
    return command_log, [line for line in lines if "loss" in line]


def read_run_results(run: Path, command_log: CommandLog) -> dict[str, Any]:
    """Read the results of a finesight run. Steps begin after the description of the run is
    printed."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    image_encoding_s = sum(line.get("vision_cache_s", 0.0) for line in lines)
    first = command_log.first_line_time("training ") + image_encoding_s + steps[0]["step_s"]
    saved = max(path.stat().st_mtime for path in run.glob("*/*model*.safetensors"))
    return {
        "versions": lines[0]["versions"],
        "first_step_s": first,
        "last_step_s": first + sum(step["step_s"] for step in steps[1:]),
        "saved_s": saved - command_log.started_at,
        "image_encoding_s": image_encoding_s,
        "seconds": [step["step_s"] for step in steps],
        "samples": [step["num_samples"] for step in steps],
        "num_tokens": sum(s["num_tokens"] for s in steps) / sum(s["num_samples"] for s in steps),
        "peak_gb": max(step["peak_memory_gb"] for step in steps),
        "loss": [steps[0]["loss"], steps[-1]["loss"]],
    }


def make_row(
    name: str, batch: int, results: Mapping[str, Any], sample_costs: SampleCosts
) -> dict[str, Any]:
    """Make the row of one trainer and round.

    `recipe_s` extrapolates two epochs: time to the first step, the remaining steps, and the time
    after the last step.
    """
    row_base = {"name": name, "batch": batch, "setting": results["setting"]}
    if "failed" in results:
        return row_base | {"failed": results["failed"], "total_s": round(results["total_s"], 1)}
    speed = samples_per_second(results)
    remaining_samples = RECIPE_EPOCHS * sample_costs.num_samples - results["samples"][0]
    end = results["total_s"] - results["last_step_s"]
    differs = (
        abs(results.get("patches", sample_costs.num_patches) / sample_costs.num_patches - 1)
        > PATCH_TOLERANCE
    )
    return (
        row_base
        | {
            "versions": results["versions"],
            "steps": len(results["samples"]),
            "samples_a_step": round(statistics.mean(results["samples"]), 1),
            "samples_per_s": round(speed, 2),
            "slowest_and_fastest": [
                round(
                    pick(
                        n / s for n, s in zip(results["samples"], results["seconds"], strict=True)
                    ),
                    2,
                )
                for pick in (min, max)
            ],
            "tokens_per_s": round(speed * sample_costs.num_tokens),
            "mfu": round(speed * sample_costs.flops / sample_costs.peak_flops, 4),
            "peak_gb": round(results["peak_gb"], 2),
            "first_step_s": round(results["first_step_s"], 2),
            "total_s": round(results["total_s"], 1),
            "recipe_s": round(results["first_step_s"] + remaining_samples / speed + end, 1),
            "patches": round(results.get("patches", sample_costs.num_patches), 1),
            "num_tokens": round(results["num_tokens"], 1),
            "loss": results["loss"] and [round(loss, 3) for loss in results["loss"]],
        }
        | ({"other_work": "other image size"} if differs else {})
        | (
            {"image_encoding_s": round(results["image_encoding_s"], 2)}
            if results.get("image_encoding_s")
            else {}
        )
    )


def format_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Format a Markdown table with the median of all rounds; failed trainers show their error."""
    table = [
        "| | batch | samples/s | tokens/s | MFU | peak GB | first step s | recipe s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    names = dict.fromkeys((row["name"], row["batch"]) for row in rows)
    for name, batch in names:
        own = [row for row in rows if (row["name"], row["batch"]) == (name, batch)]
        succeeded = [row for row in own if "failed" not in row]
        if not succeeded:
            reason = (own[0]["failed"].splitlines() or ["no word"])[-1]
            table.append(f"| {name} | {batch} | {_cell(reason)} | | | | | |")
            continue
        medians = {
            key: statistics.median(row[key] for row in succeeded)
            for key in ("samples_per_s", "mfu", "peak_gb", "first_step_s", "recipe_s")
        }
        tokens = statistics.median(row["tokens_per_s"] for row in succeeded)
        odd = " (other image size)" if any("other_work" in row for row in succeeded) else ""
        table.append(
            f"| {name}{odd} | {batch} | {medians['samples_per_s']:.4g} | {tokens:,.0f}"
            f" | {100 * medians['mfu']:.1f} % | {medians['peak_gb']:.1f}"
            f" | {medians['first_step_s']:.1f} | {medians['recipe_s']:.0f} |"
        )
    return table


def _cell(text: str) -> str:
    return text.replace("|", "/")[:120]


def lora_settings() -> LoraSettings:
    """Return the LoRA settings of all trainers."""
    return LoraSettings(rank=RANK, alpha=float(ALPHA), dropout=DROPOUT)


def report_header(script: str, config: Path) -> dict[str, Any]:
    """Describe machine, versions and command, without folder names."""
    cuda = torch.cuda.is_available()
    hidden = {"--work": "DIR", "--out": "FILE", "--peer-site-packages": "DIR", "--data": "TABLE"}
    words = [config.name]
    for before, word in zip(sys.argv[1:], sys.argv[2:], strict=False):
        words.append(hidden.get(before, word))
    return {
        "command": f"python benchmarks/{script} {' '.join(words)}",
        "machine": torch.cuda.get_device_name() if cuda else f"CPU, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")},
        "task": {"rank": RANK, "alpha": ALPHA, "dropout": DROPOUT, "learning_rate": LEARNING_RATE},
    }
