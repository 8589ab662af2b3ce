"""Compare the plan of runs on several GPUs with the memory and speed of these runs.

    python benchmarks/plan_multi_gpu.py CONFIGS --work DIR --out FILE [--gpus 2] [--only "NAME;..."]
        [--steps 12] [--limit 90] [--total-limit 440] [--gpu NAME] [--share-gpu]

CONFIGS contains folders of configuration and tokenizer files: Qwen2-VL-2B-Instruct and
Qwen2.5-VL-3B-Instruct. Weights are random and deleted after the runs. Each case is planned by
`finesight plan --gpus N`, and trained by torchrun on generated scenes with the settings that the
plan chooses. The case fixes `train.parallel`, except for "3B full, plan's choice", which runs with
--only. A case ends after its steps, or after the limit in seconds. If it fails, the others
continue. No case starts after the total limit. The table is printed at the end.

Memory is in GB (10^9 bytes), that of GPUs for the GPU with the highest value:

- `allocated`, `reserved`: peaks of the PyTorch allocator.
- `device`: peak of the used memory of the GPU, by `cudaMemGetInfo`, without that of other programs.
- `host`: peak of the used memory of the machine, without page cache and without that before the
  case. It includes the processes themselves, as the cases without offloaded shards show.

Their estimates are `allocated_gb`, the total and `host_bytes` of the plan. Without a GPU, the tiny
cases run with gloo, `allocated` is the memory of a process, which no plan estimates, and --gpu
names the GPU of the plan, here an A10.

With --share-gpu, all ranks use the first GPU, as ranks of several machines that NCCL connects by
sockets. This measures `allocated` and `reserved` of each rank with one GPU. Speed and `device` are
then no measurements of the plan.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from multi_gpu_scaling import gpu_environment, kill_processes, read_steps
from peer_data import ensure_weights, write_caption_dataset
from peer_metrics import report_header
from single_gpu import FULL_OVERRIDES, LORA_OVERRIDE, MODEL_2B, MODEL_3B

TINY = "finesight-tiny"
WARMUP_STEPS, MIN_STEPS = 4, 6
POLL_S = 0.05
PLAN_LIMIT_S, WEIGHTS_LIMIT_S = 120.0, 150.0
OFFLOAD_STEPS = 3
"""Steps of a case whose optimizer runs on one core of the CPU."""
SHARED_GPU = "PLAN_MULTI_GPU_SHARED"
"""Environment variable of ranks that share the first GPU."""


@dataclass(frozen=True)
class PlanCase:
    """A planned run: samples per GPU and overrides.

    Attributes:
        mode: Value of `train.parallel`; `single` for one GPU, None for the choice of the plan.
    """

    name: str
    model: str
    batch_size: int
    mode: str | None
    overrides: tuple[str, ...]
    image_side: int = 280
    is_default: bool = True


CASES = (
    PlanCase("2B full, single", MODEL_2B, 16, "single", FULL_OVERRIDES),
    PlanCase("2B full, ddp", MODEL_2B, 16, "ddp", FULL_OVERRIDES),
    PlanCase("2B full, zero2", MODEL_2B, 16, "zero2", FULL_OVERRIDES),
    PlanCase("2B full, fsdp", MODEL_2B, 16, "fsdp", FULL_OVERRIDES),
    PlanCase("2B full, fsdp_offload", MODEL_2B, 16, "fsdp_offload", FULL_OVERRIDES),
    PlanCase("2B LoRA, ddp", MODEL_2B, 32, "ddp", (LORA_OVERRIDE,)),
    PlanCase("3B full, fsdp", MODEL_3B, 16, "fsdp", FULL_OVERRIDES),
    PlanCase("3B full, plan's choice", MODEL_3B, 16, None, FULL_OVERRIDES, is_default=False),
    PlanCase("tiny, single", TINY, 4, "single", FULL_OVERRIDES, image_side=56),
    PlanCase("tiny, ddp", TINY, 4, "ddp", FULL_OVERRIDES, image_side=56),
    PlanCase("tiny, zero2", TINY, 4, "zero2", FULL_OVERRIDES, image_side=56),
    PlanCase("tiny, fsdp", TINY, 4, "fsdp", FULL_OVERRIDES, image_side=56),
)


def train_measured(folder: Path, words: Sequence[str]) -> int:
    """Run `finesight train` as one rank, and write the peaks of its memory to a folder."""
    from finesight.cli.app import run_command

    local_rank = int(os.environ["LOCAL_RANK"])
    if SHARED_GPU in os.environ:
        # NCCL refuses two ranks of one machine on one GPU.
        os.environ["NCCL_HOSTID"] = f"rank-{local_rank}"
    monitor = threading.Thread(target=_watch_memory, args=(folder, local_rank), daemon=True)
    monitor.start()
    return run_command(list(words))


def _watch_memory(folder: Path, local_rank: int) -> None:
    file = folder / f"rank-{local_rank}.json"
    device = 0 if SHARED_GPU in os.environ else local_rank
    peaks = dict.fromkeys(("allocated", "reserved", "device", "pinned", "resident"), 0)
    while True:
        time.sleep(POLL_S)
        if torch.cuda.is_initialized():
            free, total = torch.cuda.mem_get_info(device)
            peaks["device"] = max(peaks["device"], total - free)
            peaks["allocated"] = torch.cuda.max_memory_allocated(device)
            peaks["reserved"] = torch.cuda.max_memory_reserved(device)
            peaks["pinned"] = torch.cuda.host_memory_stats()["allocated_bytes.peak"]
            peaks["resident"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        elif not torch.cuda.is_available():
            peaks["allocated"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        unfinished = file.with_suffix(".part")
        unfinished.write_text(json.dumps(peaks))
        unfinished.rename(file)


def read_used_memory(num_gpus: int) -> list[int]:
    """Return the bytes that programs use on the first GPUs; 0 without nvidia-smi."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    if shutil.which(query[0]) is None:
        return [0] * num_gpus
    completed = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    return [int(line) << 20 for line in completed.stdout.split()][:num_gpus]


def read_host_memory() -> int:
    """Return the bytes of memory that this machine uses, without page cache."""
    fields: dict[str, int] = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        fields[name] = 1024 * int(value.split()[0])
    return fields["MemTotal"] - fields["MemAvailable"]


class CaseFailedError(Exception):
    """Raised with the last lines of a command that failed."""


def run_step(command: list[str], limit_s: float) -> str:
    """Run a command in a process of its own, and return its output. Raises CaseFailedError."""
    try:
        completed = subprocess.run(
            command, capture_output=True, text=True, timeout=limit_s, check=False
        )
    except subprocess.TimeoutExpired:
        raise CaseFailedError(f"{command[2]}: not finished after {limit_s:g} s") from None
    if completed.returncode:
        raise CaseFailedError(completed.stdout[-1500:] + completed.stderr[-1500:])
    return completed.stdout


def plan_case(case: PlanCase, words: list[str], num_gpus: int, gpu: str | None) -> dict[str, Any]:
    """Return the estimate of a plan for its chosen settings, with the overrides that set them."""
    command = [sys.executable, "-m", "finesight", "plan", *words, f"--gpus={num_gpus}", "--json"]
    if gpu is not None:
        command.append(f"--gpu={gpu}")
    record = json.loads(run_step(command, PLAN_LIMIT_S))
    chosen = record["chosen"]
    if case.mode in (None, "single") or chosen["parallel"] == case.mode:
        overrides = [one for one in record["overrides"] if "num_workers" not in one]
        return {"overrides": overrides, **chosen}
    # Another mode is better: the case runs as its recipe.
    return {"overrides": [], **record["recipe"]}


def run_case(case: PlanCase, model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Plan and train a case, and return estimates and measurements. Raises CaseFailedError."""
    work = options.work
    num_gpus = 1 if case.mode == "single" else options.gpus
    num_steps = OFFLOAD_STEPS if case.mode == "fsdp_offload" else options.steps
    run_dir, peaks_dir, file = work / "run", work / "peaks", work / "recipe.yaml"
    for folder in (run_dir, peaks_dir):
        shutil.rmtree(folder, ignore_errors=True)
    peaks_dir.mkdir()
    file.write_text("{}\n", encoding="utf-8")
    words = [
        str(file),
        f"model={model}",
        f"data.train={write_caption_dataset(work / 'data')}",
        f"image={{height: {case.image_side}, width: {case.image_side}}}",
        f"train.steps={num_steps + 500}",
        f"train.batch_size={case.batch_size * num_gpus}",
        "train.vision_cache=never",
        "train.save_every=0",
        f"output_dir={run_dir}",
        *case.overrides,
    ]
    if case.mode not in (None, "single"):
        words.append(f"train.parallel={case.mode}")
    estimate = plan_case(case, words, num_gpus, options.gpu)
    num_used_gpus = 1 if options.share_gpu else num_gpus
    environment = gpu_environment(num_used_gpus) | {"OMP_NUM_THREADS": "1"}
    if options.share_gpu:
        environment |= {SHARED_GPU: "1", "NCCL_NET": "Socket", "NCCL_SOCKET_IFNAME": "lo"}
    used_before = read_used_memory(num_used_gpus)
    host_before = host_peak = read_host_memory()
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={num_gpus}"]
    script = [__file__, "--rank", str(peaks_dir), "train", *words, *estimate["overrides"]]
    log_path = work / "train.log"
    with log_path.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", *launcher, *script, "--force"],
            stdout=stream,
            stderr=stream,
            start_new_session=True,
            env=environment,
        )
        start = time.monotonic()
        try:
            while process.poll() is None and time.monotonic() - start < options.limit:
                host_peak = max(host_peak, read_host_memory())
                if len(read_steps(run_dir)) >= num_steps:
                    break
                time.sleep(0.2)
            used = read_used_memory(num_used_gpus)
            smi = [n - m for n, m in zip(used, used_before, strict=True)]
        finally:
            kill_processes(f"output_dir={run_dir}")
            process.wait()
    steps = read_steps(run_dir)[:num_steps]
    ranks = [json.loads(one.read_text()) for one in sorted(peaks_dir.glob("rank-*.json"))]
    row: dict[str, Any] = {
        "case": case.name,
        "gpus": num_gpus,
        "overrides": [*case.overrides, *estimate["overrides"]],
        "mode": "single" if num_gpus == 1 else estimate["parallel"],
        "batch_size": case.batch_size * num_gpus,
        "seconds": round(time.monotonic() - start, 1),
        "estimated": {
            "allocated": round(estimate["allocated_gb"], 2),
            "device": round(estimate["total_bytes"] / 1e9, 2),
            "host": round(estimate["host_bytes"] / 1e9, 2),
            "phase": estimate["phase"],
            "parts": {k: round(n / 1e9, 3) for k, n in estimate["memory"].items() if n},
            "samples_per_s": round(estimate["samples_per_s"], 1),
            "step_time": {k: round(v, 4) for k, v in estimate["step_time"].items()},
        },
        "ranks": [{k: round(n / 1e9, 3) for k, n in peaks.items()} for peaks in ranks],
        "nvidia_smi": [round(n / 1e9, 3) for n in smi],
    }
    if len(steps) < min(MIN_STEPS, num_steps):
        lines = log_path.read_text(errors="replace").splitlines()
        return row | {"failed": [line[:300] for line in lines[-30:]]}
    row["measured"] = {
        name: max(peaks[name] - own for peaks, own in zip(ranks, taken, strict=False)) / 1e9
        for name, taken in (
            ("allocated", [0] * num_gpus),
            ("reserved", [0] * num_gpus),
            ("device", used_before * (num_gpus // num_used_gpus)),
        )
    }
    row["measured"]["host"] = (host_peak - host_before) / 1e9
    speeds = [step["samples_per_s"] for step in steps[min(WARMUP_STEPS, num_steps - 1) :]]
    row["measured"]["samples_per_s"] = round(statistics.median(speeds), 1)
    row["measured"]["peak_memory_gb"] = max(step["peak_memory_gb"] for step in steps)
    row["steps"] = len(steps)
    row["tokens_a_step"] = steps[0]["num_tokens"]
    compared = ["allocated", "device", "samples_per_s"]
    if options.share_gpu and num_gpus > 1:
        compared = ["allocated"]
    row["errors"] = {
        name: round(row["estimated"][name] / row["measured"][name] - 1, 4)
        for name in compared
        if row["measured"][name] and torch.cuda.is_available()
    }
    return row


TABLE_HEADER = (
    f"{'case':<24} {'mode':<12} {'est. GB':>8} {'alloc.':>8} {'error':>7} {'reserved':>8}"
    f" {'est. total':>10} {'device':>8} {'error':>7} {'est. host':>9} {'host':>7}"
    f" {'est. /s':>8} {'meas. /s':>8}"
)


def format_row(row: dict[str, Any]) -> str:
    """Format a row of the table: estimates, measurements and relative errors."""
    if "failed" in row:
        last = next((line for line in reversed(row["failed"]) if line.strip()), "")
        return f"{row['case']:<24} failed: {last.strip()[:150]}"
    estimated, measured, errors = row["estimated"], row["measured"], row["errors"]
    shown = {name: f"{error:+.1%}" for name, error in errors.items()}
    return (
        f"{row['case']:<24} {row['mode']:<12} {estimated['allocated']:>8.2f}"
        f" {measured['allocated']:>8.2f} {shown.get('allocated', '-'):>7}"
        f" {measured['reserved']:>8.2f} {estimated['device']:>10.2f} {measured['device']:>8.2f}"
        f" {shown.get('device', '-'):>7} {estimated['host']:>9.1f} {measured['host']:>7.1f}"
        f" {estimated['samples_per_s']:>8.1f} {measured['samples_per_s']:>8.1f}"
    )


def select_cases(options: argparse.Namespace) -> list[PlanCase]:
    """Return the cases that are named; by default those of published models, or the tiny ones."""
    if options.only:
        return [case for case in CASES if case.name in options.only]
    is_tiny = not torch.cuda.is_available()
    return [case for case in CASES if case.is_default and (case.model == TINY) == is_tiny]


def main() -> None:
    if sys.argv[1:2] == ["--rank"]:
        sys.exit(train_measured(Path(sys.argv[2]), sys.argv[3:]))
    if sys.argv[1:2] == ["--weights"]:
        # In a process of its own, whose memory on the GPU ends with it.
        ensure_weights(Path(sys.argv[2]), Path(sys.argv[3]))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("configs", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--only", type=lambda text: text.split(";"), default=[])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--limit", type=float, default=90.0, help="seconds of a case")
    parser.add_argument("--total-limit", type=float, default=440.0, help="seconds of all cases")
    parser.add_argument("--gpu", help="name of the GPU of the plan; by default, it is measured")
    parser.add_argument("--share-gpu", action="store_true", help="all ranks use the first GPU")
    options = parser.parse_args()
    start = time.monotonic()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.gpu is None and not torch.cuda.is_available():
        options.gpu = "A10"
    write_caption_dataset(options.work / "data")
    report: dict[str, Any] = report_header("plan_multi_gpu.py", options.configs) | {"results": []}
    if torch.cuda.is_available():
        report["versions"]["cuda"] = torch.version.cuda
        report["versions"]["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    model_name, model = "", options.work / "model"
    for case in select_cases(options):
        row: dict[str, Any]
        try:
            remaining_s = options.total_limit - (time.monotonic() - start)
            if remaining_s <= 0:
                raise CaseFailedError(f"not started within {options.total_limit:g} s")
            options.limit = min(options.limit, remaining_s)
            if case.model != model_name:
                model_name = case.model
                shutil.rmtree(model, ignore_errors=True)
                if case.model != TINY:
                    config = str(options.configs / case.model)
                    command = [sys.executable, __file__, "--weights", config, str(model)]
                    run_step(command, WEIGHTS_LIMIT_S)
            row = run_case(case, Path(TINY) if case.model == TINY else model, options)
        except CaseFailedError as error:
            row = {"case": case.name, "failed": str(error).splitlines()[-30:]}
        report["results"].append(row)
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(f"{time.monotonic() - start:4.0f} s  {case.name}", file=sys.stderr, flush=True)
    shutil.rmtree(model, ignore_errors=True)
    print(TABLE_HEADER)
    print("\n".join(map(format_row, report["results"])))


if __name__ == "__main__":
    main()
