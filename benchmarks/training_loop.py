"""Compare the speed of a training loop in Python with that of `finesight train`.

    python benchmarks/training_loop.py CONFIG --work DIR --out FILE [--batch 16,64] [--steps 24]

CONFIG is a folder with the configuration of a model; weights are random. Both train LoRA of rank 64
on the same samples, images of 288 x 288 pixels and captions, in alternate processes: loop, command,
loop, command. Steps are timed without those of the warm-up. `ratio` is the throughput of the loop
divided by that of the command.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from peer_data import ensure_weights, write_caption_dataset
from peer_metrics import report_header, run_recipe

IMAGE_SIDE = 288
RANK = 64
NUM_WARMUP_STEPS = 8
"""Steps that include compilation and the capture of CUDA graphs."""

NUM_ROUNDS = 2
LIMIT_S = 300.0
LEARNING_RATE = 1e-4


def run_loop(model: Path, data: Path, batch_size: int, num_steps: int) -> dict[str, Any]:
    """Run the loop in this process, and return the time per step and the losses."""
    import torch

    import finesight
    from finesight.api import read_samples

    samples = read_samples(data)
    tune = {"language": "lora", "lora": {"rank": RANK, "alpha": 2 * RANK}}
    image = {"height": IMAGE_SIDE, "width": IMAGE_SIDE}
    client = finesight.TrainingClient(model, tune=tune, image=image, precision="bf16")
    losses = []
    batches = client.load_batches(samples, batch_size, epochs=num_steps * batch_size / len(samples))
    for step, batch in enumerate(batches):
        if step == NUM_WARMUP_STEPS:
            torch.cuda.synchronize()
            start = time.perf_counter()
        losses.append(client.forward_backward(batch))
        client.optim_step(LEARNING_RATE)
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) / (len(losses) - NUM_WARMUP_STEPS)
    return {
        "step_s": seconds,
        "losses": [loss.item() for loss in losses],
        "gb": torch.cuda.max_memory_allocated() / 1e9,
    }


def start_loop(model: Path, data: Path, batch_size: int, num_steps: int) -> dict[str, Any]:
    """Run the loop in a new process."""
    arguments = [str(model), "--loop", str(data), "--batch", str(batch_size)]
    command = [sys.executable, __file__, *arguments, "--steps", str(num_steps)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    if done.returncode:
        return {"failed": done.stderr[-2000:]}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def start_command(
    model: Path, data: Path, work: Path, batch_size: int, num_steps: int
) -> dict[str, Any]:
    """Run the command, and return the time per step and the losses."""
    words = [
        f"model={model}",
        f"data.train={data}",
        f"image={{height: {IMAGE_SIDE}, width: {IMAGE_SIDE}}}",
        f"tune.lora={{rank: {RANK}, alpha: {2 * RANK}}}",
        f"train.batch_size={batch_size}",
        f"train.steps={num_steps}",
        f"train.learning_rate={LEARNING_RATE}",
        "train.lr_schedule=constant",
        "train.warmup=0",
        "train.precision=bf16",
        "train.save_every=0",
        "train.vision_cache=never",
    ]
    log, steps = run_recipe(words, work / "run", LIMIT_S)
    if len(steps) <= NUM_WARMUP_STEPS:
        return {"failed": log.last_lines()}
    timed = steps[NUM_WARMUP_STEPS:]
    return {
        "step_s": statistics.fmean(step["step_s"] for step in timed),
        "losses": [step["loss"] for step in steps],
        "gb": max(step["peak_memory_gb"] for step in steps),
    }


def compare(model: Path, work: Path, batch_size: int, num_steps: int) -> dict[str, Any]:
    """Run loop and command in turn, and return the throughput of both."""
    data = write_caption_dataset(work / "data")
    loops = []
    commands = []
    for _ in range(NUM_ROUNDS):
        loops.append(start_loop(model, data, batch_size, num_steps))
        commands.append(start_command(model, data, work, batch_size, num_steps))
    failed = [one["failed"] for one in (*loops, *commands) if "failed" in one]
    if failed:
        return {"batch": batch_size, "failed": failed}
    ratios = []
    differences = []
    for loop, command in zip(loops, commands, strict=True):
        ratios.append(command["step_s"] / loop["step_s"])
        for first, second in zip(loop["losses"], command["losses"], strict=True):
            differences.append(abs(first - second))
    return {
        "batch": batch_size,
        "loop samples/s": [round(batch_size / one["step_s"], 1) for one in loops],
        "command samples/s": [round(batch_size / one["step_s"], 1) for one in commands],
        "ratio": [round(ratio, 3) for ratio in ratios],
        "largest difference of losses": max(differences),
        "loop GB": round(loops[0]["gb"], 1),
        "command GB": round(commands[0]["gb"], 1),
    }


def main() -> None:
    """Run the benchmark, write and print the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--batch", default="16,64")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--loop", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    batch_sizes = [int(text) for text in options.batch.split(",")]
    if options.loop is not None:
        print(json.dumps(run_loop(options.config, options.loop, batch_sizes[0], options.steps)))
        return
    options.work.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = report_header("training_loop.py", options.config)
    report |= {"task": {"rank": RANK, "steps": options.steps}, "results": []}
    folder = options.work / "model"
    shutil.rmtree(folder, ignore_errors=True)
    model = ensure_weights(options.config, folder)
    for batch_size in batch_sizes:
        row = compare(model, options.work, batch_size, options.steps)
        report["results"].append(row)
        options.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
        print(json.dumps(row)[:2000], flush=True)


if __name__ == "__main__":
    main()
