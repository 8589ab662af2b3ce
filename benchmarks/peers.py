"""finesight and every peer that installs, on the same data, model and step, on one machine.

    python benchmarks/peers.py CONFIG --work DIR --out FILE [--data TABLE] [--sites DIR]
        [--only finesight,trl,...] [--batch 16,64] [--rounds 1] [--steps 30] [--seconds 60]
        [--side 280] [--also "finesight, cached: KEY=VALUE KEY=VALUE"]...

CONFIG is a folder of configuration and tokenizer files; where it has no weights, random ones are
drawn. TABLE is a JSONL file of finesight's with one picture, question and answer a sample; without
it 496 pictures are drawn and saved as JPEG of 640 x 480. SITES/<peer> may hold the packages of a
peer, which pin each other out. --also runs finesight once more with other settings, under a name.

Each trains in a process of its own, in rounds, as its file in `contestants/` says; where a peer has
several settings, short trials find its fastest first. finesight reads the pictures as they are,
and resizes them in every step; for all others they are brought to their size beforehand. Nobody
trains longer than --seconds. Tokens and operations of a sample are finesight's count for all, so
that rows differ by time alone; `patches` of a sample, which is counted in each, must be the same.
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

import peer_figures as figures
from contestants.job import FIGURES, Job, as_argument
from peer_data import count, draw, random_weights, resized
from stopwatch import watch

HERE = Path(__file__).resolve().parent
TRIAL_STEPS, GRACE_S = 8, 240.0
"""Steps of a trial; seconds that a process may take beside its training."""

PEERS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "tutorial": ("as_tutorial", [{}]),
    "trainer": (
        "with_trainer",
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
        "with_trl",
        [{"attention": "sdpa", "liger": liger} for liger in (True, False)]
        + [{"attention": "flash_attention_2", "liger": True}],
    ),
    "ms-swift": (
        "with_ms_swift",
        [
            {"attention": "flash_attn", "packed": True, "liger": True},
            {"attention": "flash_attn", "packed": False, "liger": True},
            {"attention": "sdpa", "packed": False, "liger": False},
        ],
    ),
    "llama-factory": (
        "with_llama_factory",
        [
            {"attention": "fa2", "packed": True, "liger": True},
            {"attention": "fa2", "packed": True, "liger": False},
            {"attention": "fa2", "packed": False, "liger": True},
        ],
    ),
    "unsloth": ("with_unsloth", [{"checkpointing": kept} for kept in (False, "unsloth")]),
}
"""The file of each, and the settings that are tried."""

TUTORIALS_BATCH = 16


def compete(options: argparse.Namespace, name: str, job: Job) -> dict[str, Any]:
    """One peer once: what it told, or `failed` with its last words."""
    module, _ = PEERS[name]
    shutil.rmtree(job.target, ignore_errors=True)
    Path(job.target).mkdir(parents=True)
    places = [str(HERE), *([str(options.sites / name)] if options.sites else [])]
    environment = {
        # After a peer's own packages, those that everybody has.
        "PYTHONPATH": os.pathsep.join([*places, os.environ.get("PYTHONPATH", "")]),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "MODELSCOPE_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }
    words = as_argument(replace(job, began=time.time()))
    start = [sys.executable, "-m", "contestants.started", module, words]
    watched = watch(start, environment, job.seconds + GRACE_S)
    told = Path(job.target) / FIGURES
    found = json.loads(told.read_text()) if told.exists() else {}
    shutil.rmtree(job.target, ignore_errors=True)
    if watched.code or "seconds" not in found:
        why = found.get("missing") or watched.last_words()
        return {"failed": why, "setting": dict(job.setting), "whole_s": watched.seconds}
    return found | {"whole_s": watched.seconds}


def fastest(options: argparse.Namespace, name: str, job: Job) -> tuple[Job, list[dict[str, Any]]]:
    """The job with the best of the peer's settings, and what each of them gave in a trial."""
    tried: list[dict[str, Any]] = []
    settings = PEERS[name][1]
    best, most = replace(job, setting=settings[0]), -1.0
    for setting in settings if len(settings) > 1 else ():
        trial = replace(job, setting=setting, steps=TRIAL_STEPS)
        told = compete(options, name, trial)
        if str(told.get("failed", "")).startswith("not installed"):
            break
        rate = None if "failed" in told else figures.rate(told)
        why = {"failed": _reason(told["failed"])} if "failed" in told else {}
        tried.append({"setting": setting, "samples_per_s": rate} | why)
        say(f"{name}, batch {job.batch}, {setting}: {why or round(rate or 0, 1)}")
        if rate is not None and rate > most:
            best, most = replace(job, setting=setting), rate
    return best, tried


def _reason(words: str) -> str:
    """The last of a failed process's lines that tells of an error: a progress bar may follow."""
    lines = words.splitlines() or [""]
    return next((line for line in reversed(lines) if "Error" in line), lines[-1])


def say(text: str) -> None:
    """Where this is, for who waits."""
    print(text, file=sys.stderr, flush=True)


def finesight(
    options: argparse.Namespace, name: str, overrides: list[str], job: Job, data: Path
) -> dict[str, Any]:
    """The real command on the pictures as they are."""
    kept = options.work / "features"
    for folder in (Path(job.target), kept):
        shutil.rmtree(folder, ignore_errors=True)
    words = figures.recipe(job, data, options.side) + overrides
    recipe = options.work / "recipe.yaml"
    recipe.write_text("{}\n", encoding="utf-8")
    command = [sys.executable, "-m", "finesight", "train", str(recipe), *words]
    # No run before has looked at the pictures.
    watched = watch(command, {"HF_ASSETS_CACHE": str(kept)}, job.seconds + GRACE_S)
    found = (
        {"failed": watched.last_words()}
        if watched.code
        else figures.of_run(Path(job.target), watched)
    )
    shutil.rmtree(job.target, ignore_errors=True)
    return found | {"setting": overrides, "whole_s": watched.seconds}


def measure(options: argparse.Namespace, report: dict[str, Any]) -> None:
    """All contestants in all rounds; the report is written after each."""
    work = options.work
    data = options.data or draw(work / "data")
    table = resized(data, work / "resized", options.side)
    model = random_weights(options.config, work / "model")
    counted = count(model, data, options.side, figures.lora())
    report["sample"] = asdict(counted)
    ours = {"finesight": list[str]()} | dict(also(text) for text in options.also)
    chosen = [name for name in PEERS if not options.only or name in options.only]
    workers = 8 if (os.cpu_count() or 1) > 8 else 0
    results: list[dict[str, Any]] = report["results"]
    for batch in options.batch:
        job = Job(
            model=str(model),
            table=str(table),
            target=str(work / "run"),
            batch=batch,
            steps=options.steps,
            seconds=options.seconds,
            pack_tokens=max(counted.longest, round(batch * counted.tokens)),
            workers=workers,
        )
        peers: dict[str, Job] = {}
        for number in range(options.rounds):
            for name, overrides in ours.items():
                told = finesight(options, name, overrides, job, data)
                note(options, report, figures.row(name, batch, told, counted))
            for name in chosen:
                if name == "tutorial" and batch != TUTORIALS_BATCH:
                    continue
                if number == 0:
                    peers[name], tried = fastest(options, name, job)
                told = compete(options, name, peers[name])
                row = figures.row(name, batch, told, counted)
                note(options, report, row | ({"tried": tried} if number == 0 and tried else {}))
    report["table"] = figures.as_table(results)


def note(options: argparse.Namespace, report: dict[str, Any], row: dict[str, Any]) -> None:
    """Keep a row, at once: whatever comes later may fail."""
    report["results"].append(row)
    options.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    say(json.dumps({key: value for key, value in row.items() if key != "tried"}))


def also(text: str) -> tuple[str, list[str]]:
    """A name and settings: `finesight, cached: KEY=VALUE`."""
    name, colon, settings = text.partition(":")
    if not colon or not settings.split():
        raise SystemExit(f"--also {text!r}: expected NAME: KEY=VALUE ...")
    return name.strip(), settings.split()


def main() -> None:
    """Measure, write, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--sites", type=Path)
    parser.add_argument("--only", type=lambda text: text.split(","), default=[])
    parser.add_argument("--batch", type=lambda text: list(map(int, text.split(","))), default=[16])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--side", type=int, default=280)
    parser.add_argument("--also", action="append", default=[])
    options = parser.parse_args()
    unknown = sorted(set(options.only) - {*PEERS, "finesight"})
    if unknown:
        raise SystemExit(f"--only {unknown[0]}: expected of finesight, {', '.join(PEERS)}")
    options.work.mkdir(parents=True, exist_ok=True)
    report = figures.head("peers.py", options.config) | {"results": []}
    measure(options, report)
    options.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    print("\n".join(report["table"]))


if __name__ == "__main__":
    main()
