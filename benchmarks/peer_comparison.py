"""Compare finesight to all installed peers with the same data, model and step.

    python benchmarks/peer_comparison.py CONFIG --work DIR --out FILE [--data TABLE]
        [--peer-site-packages DIR] [--only finesight,trl,...] [--batch 16,64] [--rounds 1]
        [--steps 30] [--seconds 60] [--side 280] [--variant "NAME: KEY=VALUE KEY=VALUE"]...

CONFIG is a folder of configuration and tokenizer files. Missing weights are initialized randomly.
TABLE is a samples file with one image, question and answer per sample; the default is 496 generated
JPEGs of 640 x 480. DIR/<peer> contains the packages of a peer, because peers have conflicting
dependencies. --variant runs finesight again with other settings.

Each trainer runs in its own process, in rounds, with its script in `competitors/`. If a peer has
several settings, short trials select the fastest. finesight resizes the original images in every
step; peers get resized images. --seconds limits the training time. All rows use the token and FLOP
counts of finesight, so that they differ only in time. `patches` per sample is counted for each
trainer and must be equal.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import peer_metrics as figures
from competitors.job import RESULT_FILE, CompetitorJob, to_argument
from peer_data import (
    ensure_weights,
    measure_sample_costs,
    write_caption_dataset,
    write_resized_dataset,
)
from subprocess_timer import run_timed

BENCHMARKS_DIR = Path(__file__).resolve().parent
TRIAL_STEPS, STARTUP_LIMIT_S = 8, 240.0
"""Steps of a trial; time limit of a process in seconds, besides training."""

COMPETITORS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "tutorial": ("tutorial_trainer", [{}]),
    "trainer": (
        "hf_trainer",
        [
            {"attention": attention, "adapters": adapters, "liger": liger, "compiled": compiled}
            for attention, adapters, liger, compiled in (
                ("sdpa", "fp32", False, False),
                ("sdpa", "bf16", False, False),
                ("sdpa", "bf16", True, False),
                ("flash_attention_2", "bf16", True, False),
                ("sdpa", "bf16", False, True),
            )
        ],
    ),
    "trl": (
        "trl_trainer",
        [{"attention": "sdpa", "liger": liger} for liger in (True, False)]
        + [{"attention": "flash_attention_2", "liger": True}],
    ),
    "ms-swift": (
        "ms_swift_trainer",
        [
            {"attention": "flash_attn", "packed": True, "liger": True},
            {"attention": "flash_attn", "packed": False, "liger": True},
            {"attention": "sdpa", "packed": False, "liger": False},
        ],
    ),
    "llama-factory": (
        "llama_factory_trainer",
        [
            {"attention": "fa2", "packed": True, "liger": True},
            {"attention": "fa2", "packed": True, "liger": False},
            {"attention": "fa2", "packed": False, "liger": True},
        ],
    ),
    "unsloth": ("unsloth_trainer", [{"checkpointing": mode} for mode in (False, "unsloth")]),
}
"""Script and tried settings of each peer."""

TUTORIAL_BATCH_SIZE = 16


def run_competitor(
    options: argparse.Namespace, name: str, job: CompetitorJob, *, keeps_output: bool = False
) -> dict[str, Any]:
    """Run one peer and return its results, or `failed` with the last output lines."""
    module, _ = COMPETITORS[name]
    shutil.rmtree(job.output_dir, ignore_errors=True)
    Path(job.output_dir).mkdir(parents=True)
    python_path = [
        str(BENCHMARKS_DIR),
        *([str(options.peer_site_packages / name)] if options.peer_site_packages else []),
    ]
    environment = {
        # Packages of the peer precede the common packages.
        "PYTHONPATH": os.pathsep.join([*python_path, os.environ.get("PYTHONPATH", "")]),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "MODELSCOPE_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }
    job_argument = to_argument(replace(job, started_at=time.time()))
    command = [sys.executable, "-m", "competitors.run_competitor", module, job_argument]
    command_log = run_timed(command, environment, job.time_limit_s + STARTUP_LIMIT_S)
    result_path = Path(job.output_dir) / RESULT_FILE
    results = json.loads(result_path.read_text()) if result_path.exists() else {}
    if not keeps_output:
        shutil.rmtree(job.output_dir, ignore_errors=True)
    if command_log.exit_code or "seconds" not in results:
        reason = results.get("missing") or command_log.last_lines()
        return {"failed": reason, "setting": dict(job.settings), "total_s": command_log.seconds}
    return results | {"total_s": command_log.seconds, "started_at": command_log.started_at}


def find_best_settings(
    options: argparse.Namespace, name: str, job: CompetitorJob
) -> tuple[CompetitorJob, list[dict[str, Any]]]:
    """Select the fastest settings of a peer. Returns the job and all trials."""
    trials: list[dict[str, Any]] = []
    settings = COMPETITORS[name][1]
    best, best_throughput = replace(job, settings=settings[0]), -1.0
    for setting in settings if len(settings) > 1 else ():
        trial = replace(job, settings=setting, num_steps=TRIAL_STEPS)
        results = run_competitor(options, name, trial)
        if str(results.get("failed", "")).startswith("not installed"):
            break
        throughput = None if "failed" in results else figures.samples_per_second(results)
        failure = {"failed": _error_line(results["failed"])} if "failed" in results else {}
        trials.append({"setting": setting, "samples_per_s": throughput} | failure)
        log(f"{name}, batch {job.batch_size}, {setting}: {failure or round(throughput or 0, 1)}")
        if throughput is not None and throughput > best_throughput:
            best, best_throughput = replace(job, settings=setting), throughput
    return best, trials


def _error_line(output: str) -> str:
    """Return the last error line of a failed process; a progress bar may follow it."""
    lines = output.splitlines() or [""]
    return next((line for line in reversed(lines) if "Error" in line), lines[-1])


def log(text: str) -> None:
    """Print progress to stderr."""
    print(text, file=sys.stderr, flush=True)


def run_finesight(
    options: argparse.Namespace, name: str, overrides: list[str], job: CompetitorJob, data: Path
) -> dict[str, Any]:
    """Run finesight on the original images."""
    cache_dir = options.work / "features"
    for folder in (Path(job.output_dir), cache_dir):
        shutil.rmtree(folder, ignore_errors=True)
    settings = figures.recipe_overrides(job, data, options.side) + overrides
    recipe = options.work / "recipe.yaml"
    recipe.write_text("{}\n", encoding="utf-8")
    command = [sys.executable, "-m", "finesight", "train", str(recipe), *settings]
    # Clear the vision cache of earlier runs.
    command_log = run_timed(
        command, {"HF_ASSETS_CACHE": str(cache_dir)}, job.time_limit_s + STARTUP_LIMIT_S
    )
    results = (
        {"failed": command_log.last_lines()}
        if command_log.exit_code
        else figures.read_run_results(Path(job.output_dir), command_log)
    )
    shutil.rmtree(job.output_dir, ignore_errors=True)
    return results | {"setting": overrides, "total_s": command_log.seconds}


def run_comparison(options: argparse.Namespace, report: dict[str, Any]) -> None:
    """Run all trainers in all rounds; write the report after each run."""
    work = options.work
    data = options.data or write_caption_dataset(work / "data")
    resized_dataset = write_resized_dataset(data, work / "resized", options.side)
    model = ensure_weights(options.config, work / "model")
    sample_costs = measure_sample_costs(model, data, options.side, figures.lora_settings())
    report["sample"] = asdict(sample_costs)
    finesight_variants = {"finesight": list[str]()} | dict(
        parse_variant(text) for text in options.variant
    )
    competitors = [name for name in COMPETITORS if not options.only or name in options.only]
    num_workers = 8 if (os.cpu_count() or 1) > 8 else 0
    results: list[dict[str, Any]] = report["results"]
    for batch in options.batch:
        job = CompetitorJob(
            model=str(model),
            dataset=str(resized_dataset),
            output_dir=str(work / "run"),
            batch_size=batch,
            num_steps=options.steps,
            time_limit_s=options.seconds,
            max_pack_tokens=max(sample_costs.max_tokens, round(batch * sample_costs.num_tokens)),
            num_workers=num_workers,
        )
        best_jobs: dict[str, CompetitorJob] = {}
        for round_index in range(options.rounds):
            for name, overrides in finesight_variants.items():
                outcome = run_finesight(options, name, overrides, job, data)
                save_row(options, report, figures.make_row(name, batch, outcome, sample_costs))
            for name in competitors:
                if name == "tutorial" and batch != TUTORIAL_BATCH_SIZE:
                    continue
                if round_index == 0:
                    best_jobs[name], trials = find_best_settings(options, name, job)
                outcome = run_competitor(options, name, best_jobs[name])
                row = figures.make_row(name, batch, outcome, sample_costs)
                save_row(
                    options,
                    report,
                    row | ({"tried": trials} if round_index == 0 and trials else {}),
                )
    report["table"] = figures.format_table(results)


def save_row(options: argparse.Namespace, report: dict[str, Any], row: dict[str, Any]) -> None:
    """Append a row and write the report at once, because later runs may fail."""
    report["results"].append(row)
    options.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    log(json.dumps({key: value for key, value in row.items() if key != "tried"}))


def parse_variant(text: str) -> tuple[str, list[str]]:
    """Parse `NAME: KEY=VALUE ...`."""
    name, colon, settings = text.partition(":")
    if not colon or not settings.split():
        raise SystemExit(f"--variant {text!r}: expected NAME: KEY=VALUE ...")
    return name.strip(), settings.split()


def main() -> None:
    """Run the benchmark, write and print the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--peer-site-packages", type=Path)
    parser.add_argument("--only", type=lambda text: text.split(","), default=[])
    parser.add_argument("--batch", type=lambda text: list(map(int, text.split(","))), default=[16])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--side", type=int, default=280)
    parser.add_argument("--variant", action="append", default=[])
    options = parser.parse_args()
    unknown = sorted(set(options.only) - {*COMPETITORS, "finesight"})
    if unknown:
        raise SystemExit(f"--only {unknown[0]}: expected of finesight, {', '.join(COMPETITORS)}")
    options.work.mkdir(parents=True, exist_ok=True)
    report = figures.report_header("peer_comparison.py", options.config) | {"results": []}
    run_comparison(options, report)
    options.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    print("\n".join(report["table"]))


if __name__ == "__main__":
    main()
