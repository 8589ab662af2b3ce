"""Compare quality and time of the same fine-tuning with finesight and other trainers.

    python benchmarks/time_to_quality.py --latex DIR --grounding DIR --work DIR --out FILE
        [--models finesight-small,finesight-tiny] [--tasks formulas,grounding]
        [--trainers finesight,trainer,trl] [--seeds 3] [--steps 600,300] [--minutes 9]
        [--pretrain-seconds 180] [--small-model DIR] [--peer-site-packages DIR] [KEY=VALUE]...

Tasks: formulas of DIR/latex_ocr.jsonl (image, latex), and boxes of DIR/grounding.jsonl (image,
question, answer, bbox_xyxy). The last samples are for evaluation. finesight-small is trained first
(`pretraining/build_small_model.py`), unless --small-model names a folder. Its generator sees the
labels of training samples only. All its parameters are tuned; finesight-tiny is tuned with LoRA.

All trainers read the same images, which no trainer resizes. They use AdamW with the same steps,
batches, learning rate, cosine schedule and precision: bf16 with fp32 trainable weights.

Runs are timed one after another, from the command to the saved weights. The first seed of each
trainer comes first; runs that do not fit into --minutes are listed as not run. Afterwards,
finesight evaluates all weights. Energy is the mean power of the GPU times the time. KEY=VALUE are
overrides of the recipes of finesight.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "pretraining"))

import torch
from build_small_model import build_small_model
from competitors.job import ALPHA, DROPOUT, RANK, CompetitorJob
from peer_comparison import COMPETITORS, log, run_competitor
from peer_metrics import read_run_results, report_header
from quality_data import read_rows, write_tuning_task
from subprocess_timer import run_timed

from finesight.evaluate.generation_eval import evaluate
from finesight.infer.model_loader import load_inference_model
from finesight.model_folder import TINY_MODEL, locate_model
from finesight.samples.corpus import load_corpus
from finesight.settings.config import DataFileSettings, EvalSettings

FULL = "tune={vision: full, merger: full, language: full, embeddings: full}"
LORA = f"tune.lora={{rank: {RANK}, alpha: {ALPHA}, dropout: {DROPOUT}}}"
RUN_LIMIT_S = 200.0
NO_RUN = {
    "ms-swift": "4.6 requires transformers < 5.20, peft < 0.21 and trl < 1.0",
    "llama-factory": "0.9 requires transformers <= 5.6",
    "unsloth": "2026.10 requires trl <= 1.15",
}
"""Reasons why a trainer without a row cannot run beside the others."""


@dataclass(frozen=True)
class TuningTask:
    """Metric, headline score and longest answer of a task; learning rates of full and LoRA."""

    metric: str
    score: str
    max_new_tokens: int
    full_rate: float
    lora_rate: float


TASKS = {
    "formulas": TuningTask("latex", "exact", 400, 3e-4, 1e-3),
    "grounding": TuningTask("grounding", "accuracy_at_0.5", 64, 2e-4, 1e-3),
}


class PowerMeter(threading.Thread):
    """Thread that reads the power of the GPU in watts every 50 ms, if there is one."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.watts: list[float] = []
        self._is_stopped = threading.Event()

    def run(self) -> None:
        """Read the power until `stop`."""
        if not torch.cuda.is_available():
            return
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        while not self._is_stopped.wait(0.05):
            self.watts.append(pynvml.nvmlDeviceGetPowerUsage(handle) / 1000)

    def stop(self) -> float | None:
        """Return the mean power in watts."""
        self._is_stopped.set()
        self.join()
        return sum(self.watts) / len(self.watts) if self.watts else None


def run_trainer(
    options: argparse.Namespace, trainer: str, model: str, task: str, job: CompetitorJob
) -> dict[str, Any]:
    """Run one trainer, and return time, peak memory and energy until its weights are saved."""
    is_full, run = model == "finesight-small", Path(job.output_dir)
    shutil.rmtree(run, ignore_errors=True)
    meter = PowerMeter()
    meter.start()
    if trainer == "finesight":
        outcome = run_finesight(options, job, options.work / task / "train.jsonl", is_full)
    else:
        setting = COMPETITORS[trainer][1][0] | {"attention": "sdpa", "liger": False}
        settings = setting | ({"trainable": "all"} if is_full else {})
        outcome = run_competitor(
            options, trainer, replace(job, settings=settings), keeps_output=True
        )
    watts = meter.stop()
    weights = [
        path for path in run.rglob("*.safetensors") if path.parent.name in ("adapter", "model")
    ]
    if "failed" in outcome or not weights:
        return {
            "failed": outcome.get("failed", "no weights"),
            "total_s": round(outcome["total_s"], 1),
        }
    saved_s = max(path.stat().st_mtime for path in weights) - outcome["started_at"]
    row = {"saved_s": saved_s, "total_s": outcome["total_s"], "peak_gb": outcome["peak_gb"]}
    row |= {"first_step_s": outcome["first_step_s"]}
    row |= {"mean_w": watts, "energy_kj": watts * saved_s / 1000} if watts else {}
    rounded = {name: round(value, 2) for name, value in row.items()}
    return rounded | {"steps": len(outcome["seconds"]), "loss": outcome["loss"]}


def run_finesight(
    options: argparse.Namespace, job: CompetitorJob, data: Path, is_full: bool
) -> dict[str, Any]:
    """Run `finesight train` without evaluations."""
    recipe = options.work / "recipe.yaml"
    recipe.write_text("{}\n", encoding="utf-8")
    words = [
        f"model={job.model}",
        f"data.train={data}",
        FULL if is_full else LORA,
        f"train.steps={job.num_steps}",
        f"train.batch_size={job.batch_size}",
        f"train.pack_tokens={options.pack_tokens}",
        f"train.learning_rate={job.learning_rate}",
        f"train.seed={job.seed}",
        # The other trainers write no checkpoints, either.
        f"train.save_every={job.num_steps}",
        f"output_dir={job.output_dir}",
        *options.overrides,
    ]
    command = [sys.executable, "-m", "finesight", "train", str(recipe), *words]
    # Clear the vision cache of earlier runs.
    cache = options.work / "features"
    shutil.rmtree(cache, ignore_errors=True)
    command_log = run_timed(command, {"HF_ASSETS_CACHE": str(cache)}, RUN_LIMIT_S)
    times = {"total_s": command_log.seconds, "started_at": command_log.started_at}
    if command_log.exit_code:
        return times | {"failed": command_log.last_lines()}
    return read_run_results(Path(job.output_dir), command_log) | times


def score_weights(weights: str, model: str, work: Path, task: str) -> dict[str, Any]:
    """Evaluate a run folder, adapter or model with finesight, in a worker process."""
    folder = Path(weights)
    if (folder / "config.json").exists() and not (folder / "preprocessor_config.json").exists():
        for path in Path(model).glob("*.json"):
            is_weights_file = "index" in path.name or path.name == "sha256.json"
            if not (folder / path.name).exists() and not is_weights_file:
                shutil.copy(path, folder)
    loaded = load_inference_model(weights)
    settings = EvalSettings(metric=TASKS[task].metric, max_new_tokens=TASKS[task].max_new_tokens)
    samples = load_corpus([DataFileSettings(path=work / task / "eval.jsonl")]).read_samples()
    result = evaluate(loaded.model, loaded.renderer, samples, settings, batch_size=100).as_json()
    return {name: result[name] for name in ("scores", "intervals")}


def run_all(options: argparse.Namespace, report: dict[str, Any]) -> None:
    """Train finesight-small, run all trainers until the time is over, and score their weights."""
    end = time.monotonic() + 60 * options.minutes
    for task in options.tasks:
        write_tuning_task(task, options.sources[task], options.work / task, options.limit)
    models = {"finesight-tiny": str(locate_model(TINY_MODEL).path)}
    if options.small_model:
        models["finesight-small"] = str(options.small_model.resolve())
    elif "finesight-small" in options.models:
        train_rows = read_rows(options.work / "formulas" / "train.jsonl")
        labels = [row["messages"][1]["content"][0]["text"] for row in train_rows]
        small = options.work / "small"
        report["pretraining"] = build_small_model(small, labels, options.pretrain_seconds)
        models["finesight-small"] = str(small / "model")
        save(options, report)
    cells = [(model, task) for model in options.models for task in options.tasks]
    runs = [(*cell, trainer, 0) for cell in cells for trainer in options.trainers]
    further = range(1, options.seeds)
    runs += [(*cell, "finesight", seed) for seed in further for cell in cells]
    peers = [trainer for trainer in options.trainers if trainer != "finesight"]
    runs += [(*cell, trainer, seed) for seed in further for cell in cells for trainer in peers]
    spent: dict[tuple[str, str, str], float] = {}
    folders: list[tuple[str, str, str]] = []
    for number, (model, task, trainer, seed) in enumerate(runs):
        row: dict[str, Any] = {"model": model, "task": task, "trainer": trainer, "seed": seed}
        report["runs"].append(row)
        left = end - time.monotonic() - options.scoring_seconds
        if spent.get((model, task, trainer), 10.0) > left:
            row["not_run"] = "no time left of --minutes"
            continue
        job = CompetitorJob(
            model=models[model],
            dataset=str(options.work / task / "peers.jsonl"),
            output_dir=str(options.work / f"run-{number}"),
            batch_size=options.batch,
            num_steps=options.steps[options.tasks.index(task) % len(options.steps)],
            time_limit_s=max(5.0, min(RUN_LIMIT_S, left)),
            max_pack_tokens=0,
            num_workers=8 if (os.cpu_count() or 1) > 8 else 0,
            learning_rate=getattr(
                TASKS[task], "full_rate" if model == "finesight-small" else "lora_rate"
            ),
            seed=seed,
        )
        row |= run_trainer(options, trainer, model, task, job)
        spent[model, task, trainer] = row["total_s"]
        log(json.dumps(row))
        save(options, report)
        if "failed" not in row:
            weights = job.output_dir if trainer == "finesight" else f"{job.output_dir}/adapter"
            folders.append((weights, models[model], task))
    base = [(models[model], models[model], task) for model, task in cells]
    scored = [row for row in report["runs"] if "saved_s" in row]
    report["before"] = [{"model": model, "task": task} for model, task in cells]
    workers = multiprocessing.get_context("spawn").Pool(options.scoring_processes)
    with workers:
        pending = [
            (row, workers.apply_async(score_weights, (weights, model, options.work, task)))
            for row, (weights, model, task) in zip(
                [*scored, *report["before"]], [*folders, *base], strict=True
            )
        ]
        for row, result in pending:
            try:
                row |= result.get(timeout=max(1.0, end - time.monotonic() + 60))
            except Exception as error:  # one failed evaluation must not lose the others
                row["failed_evaluation"] = repr(error)[-500:]
            save(options, report)
    report["table"] = format_table(report["runs"])


def format_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Format the means over the seeds of each model, task and trainer as Markdown."""
    table = [
        "| model | task | trainer | seeds | score | interval, first seed | seconds | GB | kJ |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for key in dict.fromkeys((row["model"], row["task"], row["trainer"]) for row in rows):
        own = [row for row in rows if (row["model"], row["task"], row["trainer"]) == key]
        own = [row for row in own if "scores" in row]
        if not own:
            table.append(f"| {' | '.join(key)} | 0 | | | | | |")
            continue
        score = TASKS[key[1]].score
        low, high = own[0]["intervals"][score]
        seconds, memory, energy = (
            sum(row.get(name, 0.0) for row in own) / len(own)
            for name in ("saved_s", "peak_gb", "energy_kj")
        )
        mean = sum(row["scores"][score] for row in own) / len(own)
        table.append(
            f"| {' | '.join(key)} | {len(own)} | {score} {mean:.3f} | {low:.3f} to {high:.3f}"
            f" | {seconds:.1f} | {memory:.2f} | {energy:.2f} |"
        )
    return table


def save(options: argparse.Namespace, report: dict[str, Any]) -> None:
    """Write the report after each run, because later runs may fail."""
    options.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")


def main() -> None:
    """Run the benchmark, write and print the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*")
    for name in ("--latex", "--grounding", "--work", "--out"):
        parser.add_argument(name, type=Path, required=True)
    lists = {
        "--models": "finesight-small,finesight-tiny",
        "--tasks": ",".join(TASKS),
        "--trainers": "finesight,trainer,trl",
    }
    for name, default in lists.items():
        parser.add_argument(name, type=lambda text: text.split(","), default=default.split(","))
    parser.add_argument(
        "--steps", type=lambda text: list(map(int, text.split(","))), default=[600, 300]
    )
    whole = {"--seeds": 3, "--batch": 32, "--pack-tokens": 16384, "--scoring-processes": 4}
    for name, number in whole.items():
        parser.add_argument(name, type=int, default=number)
    for name, number in (("--minutes", 9), ("--pretrain-seconds", 180), ("--scoring-seconds", 45)):
        parser.add_argument(name, type=float, default=number)
    parser.add_argument("--limit", type=int, help="fewer samples, to try it out")
    parser.add_argument("--peer-site-packages", type=Path)
    parser.add_argument("--small-model", type=Path)
    options = parser.parse_intermixed_args()
    options.work, options.out = options.work.resolve(), options.out.resolve()
    options.sources = {"formulas": options.latex, "grounding": options.grounding}
    options.work.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = report_header("time_to_quality.py", Path(TINY_MODEL))
    folders = {"--latex", "--grounding", "--work", "--out", "--peer-site-packages", "--small-model"}
    words = [
        "DIR" if before in folders else word
        for before, word in zip(["", *sys.argv[1:]], sys.argv[1:], strict=False)
    ]
    report["command"] = f"python benchmarks/time_to_quality.py {' '.join(words)}"
    report |= {"runs": [], "no_run": NO_RUN}
    with suppress(KeyboardInterrupt):
        run_all(options, report)
    save(options, report)
    print("\n".join(report.get("table", [])))


if __name__ == "__main__":
    main()
