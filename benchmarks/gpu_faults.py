"""Inject faults into a run of two ranks on two GPUs (NCCL), and write what happened.

    python benchmarks/gpu_faults.py --work DIR --out FILE [--only "FAULT;..."] [--device cpu]

Trains finesight-tiny with LoRA on generated scenes, every third of them without an image. Each rank
is started without a launcher that would end the others. `seconds` is the time from the fault to the
exit of the last surviving rank. After the stop signal, the run is resumed on one GPU and again on
two. `--device cpu` uses gloo, to test this script.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from peer_data import write_caption_dataset
from peer_metrics import report_header

TIMEOUT_S = 15
WAIT_S = 90.0
FAULT_STEP = 6


def write_dataset(work: Path) -> Path:
    """Write scenes; every third sample has no image, so ranks have unequal image counts."""
    table = write_caption_dataset(work / "data")
    lines = [json.loads(line) for line in table.read_text().splitlines()[:240]]
    for line in lines[::3]:
        messages = line["messages"]
        messages[0]["content"] = "Describe a scene."
    mixed = table.with_name("mixed.jsonl")
    mixed.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return mixed


def start_ranks(
    run: Path, options: argparse.Namespace, count: int, *settings: str, fault: str
) -> list[subprocess.Popen[bytes]]:
    """Start `count` ranks; the last one gets the fault."""
    recipe = options.work / "recipe.yaml"
    recipe.write_text("{}\n", encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [
        "model=finesight-tiny",
        f"data.train={options.work / 'data' / 'mixed.jsonl'}",
        "tune.lora={rank: 8}",
        "train.steps=400",
        "train.batch_size=16",
        "train.pack_tokens=1024",
        "train.vision_cache=never",
        "train.save_every=0",
        f"train.device={options.device}",
        f"output_dir={run}",
        *settings,
    ]
    processes = []
    for rank in range(count):
        log = (run.parent / f"{run.name}-{rank}.txt").open("ab")
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
        environment = {name: str(value) for name, value in ranks.items()}
        environment |= {"MASTER_ADDR": "127.0.0.1", "FAULT": fault if rank == count - 1 else ""}
        processes.append(
            subprocess.Popen(
                [sys.executable, __file__, "--rank-of", str(recipe), *arguments],
                env=os.environ | environment,
                stdout=log,
                stderr=log,
            )
        )
    return processes


def run_rank(arguments: list[str]) -> int:
    """Train as one rank, with short timeouts; lower the memory limit if the fault asks for it."""
    from finesight.cli.app import run_command
    from finesight.train import trainer
    from finesight.train.parallel import distributed

    train_step = trainer.train_step

    def limit_memory(session: Any, step: Any, *rest: Any) -> Any:
        if step.step_index == FAULT_STEP - 1:
            # A CUDA graph has its memory already: measure a step without graphs.
            session.engine.graph_runner.release_graphs()
            torch.cuda.reset_peak_memory_stats()
        if step.step_index == FAULT_STEP:
            step_bytes = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
            torch.cuda.empty_cache()
            reserved, total = torch.cuda.memory_reserved(), torch.cuda.mem_get_info()[1]
            limit, peak = reserved + 0.6 * step_bytes, reserved + step_bytes
            torch.cuda.set_per_process_memory_fraction(limit / total)
            print(f"limit {limit / 1e9:.3f} GB, peak {peak / 1e9:.3f} GB", flush=True)
        return train_step(session, step, *rest)

    with patch.object(distributed, "COLLECTIVE_TIMEOUT", timedelta(seconds=TIMEOUT_S)):
        if os.environ["FAULT"] == "out of memory":
            trainer.train_step = limit_memory
        return run_command(["train", *arguments])


def read_steps(run: Path) -> list[dict[str, Any]]:
    """Read the steps of a run so far."""
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [line for line in map(json.loads, lines) if "loss" in line]


def wait_until(condition: Callable[[], bool]) -> bool:
    """Wait for a condition; return whether it was met in time."""
    limit = time.monotonic() + WAIT_S
    while not condition() and time.monotonic() < limit:
        time.sleep(0.05)
    return condition()


def inject(fault: str, send: signal.Signals | None, options: argparse.Namespace) -> dict[str, Any]:
    """Start a run, inject the fault in the last rank, and describe the end."""
    run = options.work / fault.replace(" ", "-")
    shutil.rmtree(run, ignore_errors=True)
    settings = ["train.steps=400" if send else "train.steps=30"]
    if fault == "out of memory":
        # A step needs far more memory than the cached blocks leave free.
        settings += ["train.batch_size=128", "train.pack_tokens=16384"]
    processes = start_ranks(run, options, 2, *settings, fault=fault)
    try:
        if send and wait_until(lambda: len(read_steps(run)) >= FAULT_STEP):
            processes[-1].send_signal(send)
        start = time.monotonic()
        survivors = processes[:-1] if send in {signal.SIGKILL, signal.SIGSTOP} else processes
        ended = wait_until(lambda: all(process.poll() is not None for process in survivors))
        seconds = time.monotonic() - start
    finally:
        for process in processes:
            process.kill()
            process.wait()
    logs = [
        (run.parent / f"{run.name}-{rank}.txt").read_text(errors="replace").splitlines()
        for rank in range(len(processes))
    ]
    checkpoints = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    return {
        "fault": fault,
        "ended": ended,
        "exit_codes": [process.returncode for process in survivors],
        "seconds": round(seconds, 1),
        "steps": len(read_steps(run)),
        "checkpoints": checkpoints,
        "memory_messages": [
            line[:240] for line in chain(*logs) if line.startswith("limit ") or " is full" in line
        ],
        "last_lines": [line[:240] for line in logs[0][-4:]],
    }


def resume_and_stop(run: Path, count: int, options: argparse.Namespace) -> dict[str, Any]:
    """Resume a run on `count` GPUs, and stop it by a signal after a few steps."""
    before = read_steps(run)
    processes = start_ranks(run, options, count, "--resume", fault="")
    try:
        wait_until(lambda: len(read_steps(run)) >= len(before) + FAULT_STEP)
        processes[0].send_signal(signal.SIGTERM)
        wait_until(lambda: all(process.poll() is not None for process in processes))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    steps = [*before[-2:], *read_steps(run)[len(before) :][:2]]
    log = (run.parent / f"{run.name}-0.txt").read_text(errors="replace").splitlines()
    return {
        "fault": f"resumed on {count}",
        "exit_codes": [process.returncode for process in processes],
        "steps": [step["step"] for step in steps],
        "losses": [round(step["loss"], 4) for step in steps],
        "last_lines": [line[:240] for line in log[-2:]],
    }


def main() -> None:
    """Inject the faults, write and print the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", type=lambda text: text.split(";"), default=[])
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    write_dataset(options.work)
    report = report_header("gpu_faults.py", options.work) | {"timeout_s": TIMEOUT_S, "results": []}
    faults: dict[str, signal.Signals | None] = {
        "SIGTERM": signal.SIGTERM,
        "killed": signal.SIGKILL,
        "hanging": signal.SIGSTOP,
        "out of memory": None,
        "unequal images": None,
    }
    for fault, send in faults.items():
        if options.only and fault not in options.only:
            continue
        rows = [inject(fault, send, options)]
        if send == signal.SIGTERM:
            # The schedule has 400 steps; resuming may not change it, so the runs are stopped too.
            rows += [resume_and_stop(options.work / fault, count, options) for count in (1, 2)]
        for row in rows:
            report["results"].append(row)
            print(json.dumps(row), flush=True)
            options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank-of"]:
        sys.exit(run_rank(sys.argv[2:]))
    main()
