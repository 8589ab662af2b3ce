"""From what contestants told to rows that can be compared, and a table of them."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from contestants.job import ALPHA, DROPOUT, RANK, RATE, Job
from peer_data import Counted
from stopwatch import Watched

from finesight.config import Lora

WARM = 3
"""Steps that warm up."""

RECIPE_EPOCHS = 2
SAME = 0.01
"""Patches of a sample may differ by so much, by share, between contestants that do the same."""


def rate(told: Mapping[str, Any]) -> float:
    """Samples a second, the median of the steps after those that warm up."""
    steps = list(zip(told["samples"], told["seconds"], strict=True))
    return statistics.median(n / s for n, s in (steps[WARM:] or steps))


def recipe(job: Job, data: Path, side: int) -> list[str]:
    """The same work in finesight's settings."""
    return [
        f"model={job.model}",
        f"data.train={data}",
        f"picture={{height: {side}, width: {side}}}",
        f"tune.lora={{rank: {RANK}, alpha: {ALPHA}, dropout: {DROPOUT}}}",
        f"train.steps={job.steps}",
        f"train.batch={job.batch}",
        f"train.pack_tokens={max(4096, 256 * job.batch)}",
        f"train.learning_rate={RATE}",
        "train.precision=bf16",
        f"output={job.target}",
    ]


def of_run(run: Path, watched: Watched) -> dict[str, Any]:
    """What a finesight run's own records tell. Its steps begin when it has said what it will do."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    looked = sum(line.get("seen_s", 0.0) for line in lines)
    first = watched.at("training ") + looked + steps[0]["seconds"]
    saved = (run / "adapter" / "adapter_model.safetensors").stat().st_mtime
    return {
        "versions": lines[0]["versions"],
        "first_step_s": first,
        "last_step_s": first + sum(step["seconds"] for step in steps[1:]),
        "saved_s": saved - watched.began,
        "looked_s": looked,
        "seconds": [step["seconds"] for step in steps],
        "samples": [step["samples"] for step in steps],
        "places": sum(s["tokens"] for s in steps) / sum(s["samples"] for s in steps),
        "peak_gb": max(step["memory_gb"] for step in steps),
        "loss": [steps[0]["loss"], steps[-1]["loss"]],
    }


def row(name: str, batch: int, told: Mapping[str, Any], counted: Counted) -> dict[str, Any]:
    """One contestant in one round. `recipe_s` reckons the whole recipe, every sample twice, from
    what was measured: start to first step, the other steps, the last step to the end."""
    known = {"name": name, "batch": batch, "setting": told["setting"]}
    if "failed" in told:
        return known | {"failed": told["failed"], "whole_s": round(told["whole_s"], 1)}
    speed = rate(told)
    left = RECIPE_EPOCHS * counted.samples - told["samples"][0]
    end = told["whole_s"] - told["last_step_s"]
    odd = abs(told.get("patches", counted.patches) / counted.patches - 1) > SAME
    return (
        known
        | {
            "versions": told["versions"],
            "steps": len(told["samples"]),
            "samples_a_step": round(statistics.mean(told["samples"]), 1),
            "samples_per_s": round(speed, 2),
            "slowest_and_fastest": [
                round(pick(n / s for n, s in zip(told["samples"], told["seconds"], strict=True)), 2)
                for pick in (min, max)
            ],
            "tokens_per_s": round(speed * counted.tokens),
            "share_of_peak": round(speed * counted.operations / counted.peak, 4),
            "peak_gb": round(told["peak_gb"], 2),
            "first_step_s": round(told["first_step_s"], 2),
            "whole_s": round(told["whole_s"], 1),
            "recipe_s": round(told["first_step_s"] + left / speed + end, 1),
            "patches": round(told.get("patches", counted.patches), 1),
            "places": round(told["places"], 1),
            "loss": told["loss"] and [round(loss, 3) for loss in told["loss"]],
        }
        | ({"other_work": "pictures of another size"} if odd else {})
        | ({"looked_s": round(told["looked_s"], 2)} if told.get("looked_s") else {})
    )


def as_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Markdown, the median of the rounds a line; a contestant that failed gives its reason."""
    table = [
        "| | batch | samples/s | tokens/s | share of peak | peak GB | first step s | recipe s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    names = dict.fromkeys((row["name"], row["batch"]) for row in rows)
    for name, batch in names:
        own = [row for row in rows if (row["name"], row["batch"]) == (name, batch)]
        good = [row for row in own if "failed" not in row]
        if not good:
            said = (own[0]["failed"].splitlines() or ["no word"])[-1]
            table.append(f"| {name} | {batch} | {_cell(said)} | | | | | |")
            continue
        middle = {
            key: statistics.median(row[key] for row in good)
            for key in ("samples_per_s", "share_of_peak", "peak_gb", "first_step_s", "recipe_s")
        }
        tokens = statistics.median(row["tokens_per_s"] for row in good)
        odd = " (pictures of another size)" if any("other_work" in row for row in good) else ""
        table.append(
            f"| {name}{odd} | {batch} | {middle['samples_per_s']:.4g} | {tokens:,.0f}"
            f" | {100 * middle['share_of_peak']:.1f} % | {middle['peak_gb']:.1f}"
            f" | {middle['first_step_s']:.1f} | {middle['recipe_s']:.0f} |"
        )
    return table


def _cell(text: str) -> str:
    return text.replace("|", "/")[:120]


def lora() -> Lora:
    """Everybody's adapters."""
    return Lora(rank=RANK, alpha=float(ALPHA), dropout=DROPOUT)


def head(program: str, config: Path) -> dict[str, Any]:
    """Machine, versions and command, without the folders that things lie in."""
    cuda = torch.cuda.is_available()
    hidden = {"--work": "DIR", "--out": "FILE", "--sites": "DIR", "--data": "TABLE"}
    words = [config.name]
    for before, word in zip(sys.argv[1:], sys.argv[2:], strict=False):
        words.append(hidden.get(before, word))
    return {
        "command": f"python benchmarks/{program} {' '.join(words)}",
        "machine": torch.cuda.get_device_name() if cuda else f"CPU, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")},
        "task": {"rank": RANK, "alpha": ALPHA, "dropout": DROPOUT, "learning_rate": RATE},
    }
