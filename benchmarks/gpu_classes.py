"""Train the recipes that `finesight init` writes for GPUs with less memory than this one.

    python benchmarks/gpu_classes.py CONFIG... --work DIR --out FILE [--caps 8,12,16,24,40,80]

CONFIG is a folder of configuration and tokenizer files; missing weights are random. For each cap in
GB, a process sees a GPU with this memory: PyTorch reports it, and allocations beyond it fail. The
process runs `finesight init` on photos with captions, then some steps of `finesight train` with the
written recipe, with evaluation before and after. Processes run concurrently while their caps fit
together into the memory of the GPU.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
import yaml
from peer_data import ensure_weights
from PIL import Image

from finesight.train.logging import get_device_name
from finesight.train.setup import library_versions

CONTEXT_BYTES = 700_000_000
"""Memory of a CUDA context and of libraries, outside of PyTorch's allocator."""

NUM_SAMPLES = 96
CAPTION = "a red bus stands before the old station while people wait for its doors to open again"
SHOWN_SETTINGS = ("pack_tokens", "activation_checkpointing", "optimizer", "batch_size")


def write_photos(folder: Path, side: int) -> Path:
    """Write photos with captions as a table of the kind that users have."""
    table = folder / "captions.csv"
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["image,caption"]
    for number in range(NUM_SAMPLES):
        # Images of one color would compress to tiny features; noise is the hardest case.
        noise = Image.effect_noise((side // 8, side // 8), 20 + number).resize((side, side))
        noise.convert("RGB").save(folder / f"{number}.jpg")
        lines.append(f"{number}.jpg,{CAPTION} {number}")
    table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return table


def run_capped(cap_gb: float, limit_s: float, words: list[str]) -> int:
    """Run a command of finesight on a GPU that appears to have less memory; return its exit code.

    The last line of the output is the peak of the memory reserved by PyTorch.
    """
    from finesight.cli.app import run_command

    # A command that does not end in time says where it was.
    faulthandler.dump_traceback_later(limit_s - 5)
    total, cap = torch.cuda.mem_get_info()[1], int(cap_gb * 1e9)
    torch.cuda.set_per_process_memory_fraction((cap - CONTEXT_BYTES) / total)

    def get_memory(device: object = None) -> tuple[int, int]:
        del device  # there is one
        return max(0, cap - CONTEXT_BYTES - torch.cuda.memory_reserved()), cap

    torch.cuda.mem_get_info = get_memory
    code = run_command(words)
    print(
        f"reserved peak {(torch.cuda.max_memory_reserved() + CONTEXT_BYTES) / 1e9:.2f}", flush=True
    )
    return code


class GpuMemory:
    """Memory of the GPU in GB, shared by concurrent processes."""

    def __init__(self, free_gb: float) -> None:
        self._free_gb, self._condition = free_gb, threading.Condition()

    def take(self, gb: float) -> None:
        """Wait until the memory is free, and reserve it."""
        with self._condition:
            self._condition.wait_for(lambda: self._free_gb >= gb)
            self._free_gb -= gb

    def give_back(self, gb: float) -> None:
        """Release reserved memory."""
        with self._condition:
            self._free_gb += gb
            self._condition.notify_all()


def measure(
    model: Path, cap_gb: float, table: Path, memory: GpuMemory, options: argparse.Namespace
) -> dict[str, Any]:
    """Write and train the recipe of one model for one cap."""
    folder = options.work / f"{model.name}-{cap_gb:g}"
    shutil.rmtree(folder, ignore_errors=True)
    log = folder.with_name(f"{folder.name}.log")
    log.unlink(missing_ok=True)
    row: dict[str, Any] = {"model": model.name, "cap_gb": cap_gb}

    def run(*words: str) -> int:
        command = [
            sys.executable,
            __file__,
            "--run-capped",
            f"{cap_gb}",
            f"{options.limit}",
            *words,
        ]
        with log.open("ab") as file:
            return subprocess.run(
                command, stdout=file, stderr=file, timeout=options.limit, check=False
            ).returncode

    memory.take(cap_gb)
    start = time.perf_counter()
    try:
        init = ["init", str(table), f"--out={folder}", f"--model={model}", "--yes"]
        row["init_exit_code"] = run(*init, "--prompt=Describe the image.")
        recipe_file = folder / "recipe.yaml"
        if not row["init_exit_code"]:
            recipe = yaml.safe_load(recipe_file.read_text())
            names = [name for name in SHOWN_SETTINGS if name in recipe["train"]]
            row["settings"] = {name: recipe["train"][name] for name in names}
            row["quantize"] = recipe.get("tune", {}).get("quantize")
            short = [f"train.steps={options.steps}", "train.epochs=null"]
            short += ["eval.limit=8"] if "eval" in recipe else []
            row["exit_code"] = run("train", str(recipe_file), *short)
    except subprocess.TimeoutExpired:
        row["exit_code"] = "timeout"
    finally:
        memory.give_back(cap_gb)
    row["seconds"] = round(time.perf_counter() - start, 1)
    lines = log.read_text(errors="replace").splitlines()
    peaks = [float(line.split()[2]) for line in lines if line.startswith("reserved peak ")]
    row["peak_gb"] = max(peaks, default=None)
    row["out_of_memory"] = sum("out of memory" in line.lower() for line in lines)
    for file in folder.glob("**/metrics.jsonl"):
        steps = [one for one in map(json.loads, file.read_text().splitlines()) if "loss" in one]
        row["steps"] = len(steps)
        row["pack_tokens"] = sorted({one["pack_tokens"] for one in steps if "pack_tokens" in one})
    if row.get("exit_code") != 0:
        row["last_lines"] = lines[-8:]
    print({name: value for name, value in row.items() if name != "last_lines"}, flush=True)
    return row


def main() -> None:
    if sys.argv[1:2] == ["--run-capped"]:
        sys.exit(run_capped(float(sys.argv[2]), float(sys.argv[3]), sys.argv[4:]))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("configs", nargs="+", type=Path, metavar="CONFIG")
    parser.add_argument("--work", type=Path, required=True, help="folder for data, weights, runs")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--caps", default="8,12,16,24,40,80", help="GB of each GPU class")
    parser.add_argument("--side", type=int, default=1008, help="pixels of the square photos")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--memory", type=float, default=78.0, help="GB of the GPU for all")
    parser.add_argument("--limit", type=float, default=150.0, help="seconds of a command")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    caps = [float(cap) for cap in options.caps.split(",")]
    table = write_photos(options.work / f"photos-{options.side}", options.side)
    memory = GpuMemory(max(options.memory, *caps))
    jobs: list[tuple[Path, float]] = []
    for config in options.configs:
        model = ensure_weights(config, options.work / config.name)
        jobs += [(model.resolve(), cap) for cap in caps]
    jobs.sort(key=lambda job: -job[1])
    figures: dict[str, Any] = {
        "command": f"python benchmarks/gpu_classes.py {' '.join(sys.argv[1:])}",
        "machine": get_device_name(torch.device("cuda")),
        "versions": library_versions(),
        "rows": [],
    }
    with ThreadPoolExecutor(len(jobs)) as pool:
        futures = [pool.submit(measure, *job, table, memory, options) for job in jobs]
        for future in as_completed(futures):
            figures["rows"].append(future.result())
            options.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
