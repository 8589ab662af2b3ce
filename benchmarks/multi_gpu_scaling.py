"""Measure throughput scaling over several GPUs and compare the losses.

    python benchmarks/multi_gpu_scaling.py CONFIGS --work DIR --out FILE [--gpus 1,2,4]
        [--only "NAME;..."]

CONFIGS contains folders of configuration and tokenizer files of the models of the cases:
Qwen2-VL-2B-Instruct, Qwen2.5-VL-3B-Instruct, Qwen2.5-VL-7B-Instruct and Qwen3.5-4B. Weights are
random and deleted after the runs. Each run is `torchrun -m finesight train` on generated scenes
without vision cache. The script stops a run after its steps, because the checkpoint of billions of
parameters takes longer than the steps.
The batch size is proportional to the number of GPUs; `linear` is samples/s relative to linear
scaling of one GPU. Cases named `same` use the same samples for any world size; the script compares
their losses. `gb` is the peak allocated memory of the first GPU in GB (10^9 bytes). Cases of
`Trainer` use transformers with the same launcher, resized images and padded batches.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from competitors.job import RESULT_FILE, CompetitorJob, to_argument
from peer_data import ensure_weights, write_caption_dataset, write_resized_dataset
from peer_metrics import WARMUP_STEPS, report_header, samples_per_second
from single_gpu import FULL_OVERRIDES, LORA_OVERRIDE, MODEL_2B, MODEL_3B, MODEL_7B
from subprocess_timer import run_timed

from finesight.samples.corpus import load_corpus
from finesight.samples.sample import LocatedSample
from finesight.settings.config import TrainFileSettings

BENCHMARKS_DIR = Path(__file__).resolve().parent
LIMIT_S, STARTUP_LIMIT_S = 240.0, 120.0


@dataclass(frozen=True)
class ScalingCase:
    """A case: batch size per GPU, or in total if `is_global_batch`, with one image or a video per
    sample."""

    name: str
    model: str
    image_side: int
    batch_size: int
    overrides: tuple[str, ...]
    is_global_batch: bool = False
    min_gpus: int = 1
    trainer_settings: Mapping[str, Any] | None = None
    num_frames: int = 0


# Settings of peer_comparison.py without Liger, which does not import with transformers 5.23.
# Parameters are fp32, products bf16.
_TRAINER_LORA = {"attention": "sdpa", "adapters": "bf16", "liger": False, "compiled": False}
_TRAINER_FULL = {
    "attention": "sdpa",
    "adapters": "fp32",
    "liger": False,
    "compiled": False,
    "trainable": "all",
}
LONG_OVERRIDES = "train.activation_checkpointing=true", "data.max_length=140000"
MODEL_QWEN3_5 = "Qwen3.5-4B"
FSDP_OVERRIDE, ZERO2_OVERRIDE = "train.parallel=fsdp", "train.parallel=zero2"
SCALING_CASES = (
    ScalingCase("2B LoRA", MODEL_2B, 280, 64, (LORA_OVERRIDE,)),
    ScalingCase("Qwen3.5-4B LoRA", MODEL_QWEN3_5, 288, 64, (LORA_OVERRIDE,)),
    ScalingCase(
        "Qwen3.5-4B LoRA, fsdp", MODEL_QWEN3_5, 288, 64, (LORA_OVERRIDE, FSDP_OVERRIDE), min_gpus=2
    ),
    ScalingCase("7B full, fsdp", MODEL_7B, 280, 16, (*FULL_OVERRIDES, FSDP_OVERRIDE), min_gpus=4),
    ScalingCase("3B full, fsdp", MODEL_3B, 280, 64, (*FULL_OVERRIDES, FSDP_OVERRIDE)),
    # A single process cannot shard.
    ScalingCase("3B full, zero2", MODEL_3B, 280, 64, (*FULL_OVERRIDES, ZERO2_OVERRIDE), min_gpus=2),
    ScalingCase(
        "3B full, same, fsdp",
        MODEL_3B,
        280,
        16,
        (*FULL_OVERRIDES, FSDP_OVERRIDE),
        is_global_batch=True,
    ),
    # The same samples for any number of GPUs: the losses must agree. With a larger learning rate,
    # the loss of random weights spikes after ten steps and magnifies rounding.
    *(
        ScalingCase(
            f"2B full, same, {mode}",
            MODEL_2B,
            280,
            16,
            (*FULL_OVERRIDES, f"train.parallel={mode}", "train.learning_rate=1e-6"),
            is_global_batch=True,
            min_gpus=1 if mode == "ddp" else 2,
        )
        for mode in ("ddp", "fsdp", "zero2")
    ),
    # 256 tokens per two frames; several GPUs share the sample.
    ScalingCase(
        "7B LoRA, 128k tokens",
        MODEL_7B,
        448,
        1,
        (LORA_OVERRIDE, *LONG_OVERRIDES),
        is_global_batch=True,
        num_frames=1000,
    ),
    ScalingCase(
        "2B LoRA, Trainer",
        MODEL_2B,
        280,
        64,
        (),
        trainer_settings=_TRAINER_LORA | {"engine": "ddp"},
    ),
    ScalingCase(
        "3B full, fsdp, Trainer",
        MODEL_3B,
        280,
        64,
        (),
        trainer_settings=_TRAINER_FULL | {"engine": "fsdp"},
    ),
)


def run_finesight(
    case: ScalingCase, num_gpus: int, model: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """Run a case with finesight and return speed, memory and losses."""
    run_dir, file = options.work / "run", options.work / "recipe.yaml"
    shutil.rmtree(run_dir, ignore_errors=True)
    file.write_text("{}\n", encoding="utf-8")
    batch_size = case.batch_size if case.is_global_batch else case.batch_size * num_gpus
    overrides = [
        f"model={model}",
        f"data.train={make_dataset(case, options.work)}",
        f"image={{height: {case.image_side}, width: {case.image_side}}}",
        f"train.steps={options.steps + 500}",
        f"train.batch_size={batch_size}",
        f"train.pack_tokens={max(4096, 256 * case.batch_size)}",
        "train.vision_cache=never",
        "train.precision=bf16",
        "train.save_every=0",
        f"output_dir={run_dir}",
        *case.overrides,
    ]
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={num_gpus}", "-m"]
    command = [sys.executable, "-m", *launcher, "finesight", "train", str(file), *overrides]
    log_path = options.work / "said.txt"
    with log_path.open("wb") as stream:
        # A process group of its own, so that one signal ends all processes.
        process = subprocess.Popen(
            command,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
            env=gpu_environment(num_gpus),
        )
        start = time.monotonic()
        try:
            while process.poll() is None and time.monotonic() - start < LIMIT_S:
                if len(read_steps(run_dir)) >= options.steps:
                    break
                time.sleep(0.2)
        finally:
            kill_processes(f"output_dir={run_dir}")
            process.wait()
    steps = read_steps(run_dir)[: options.steps]
    if len(steps) < options.steps:
        overrides = log_path.read_text(errors="replace").splitlines()
        return {
            "case": case.name,
            "gpus": num_gpus,
            "failed": [word[:300] for word in overrides[-40:]],
        }
    return {
        "case": case.name,
        "gpus": num_gpus,
        "settings": list(case.overrides),
        "samples_a_step": steps[0]["num_samples"],
        "tokens_a_step": steps[0]["num_tokens"],
        "samples_per_s": round(
            statistics.median(s["samples_per_s"] for s in steps[WARMUP_STEPS:]), 2
        ),
        "gb": round(max(step["peak_memory_gb"] for step in steps), 2),
        "losses": [step["loss"] for step in steps],
    }


def make_dataset(case: ScalingCase, work: Path) -> Path:
    """Generate scenes, as single images or as video frames."""
    table = write_caption_dataset(work / "data")
    if not case.num_frames:
        return table
    image_parts = [
        located_sample.sample.messages[0].content[0] for located_sample in load_samples(table)
    ]
    files = [str(part.image) for part in image_parts if part.type == "image"]
    video_dataset = table.with_name("films.jsonl")
    lines = []
    for number in range(8):
        frames = [files[(number + frame) % len(files)] for frame in range(case.num_frames)]
        question = [{"type": "video", "frames": frames}, {"type": "text", "text": "What is shown?"}]
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": "Scenes."}]
        lines.append(json.dumps({"id": f"film-{number}", "messages": turns}))
    video_dataset.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return video_dataset


def load_samples(table: Path) -> Iterator[LocatedSample]:
    """Load the samples of a file."""
    return load_corpus((TrainFileSettings(path=table),)).read_samples()


def run_hf_trainer(
    case: ScalingCase, num_gpus: int, model: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """Run a case with Trainer of transformers."""
    table = write_resized_dataset(
        write_caption_dataset(options.work / "data"), options.work / "resized", case.image_side
    )
    target = options.work / "trainer"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    job = CompetitorJob(
        model=str(model),
        dataset=str(table),
        output_dir=str(target),
        batch_size=case.batch_size,
        num_steps=options.steps,
        time_limit_s=LIMIT_S,
        max_pack_tokens=0,
        num_workers=8 if (os.cpu_count() or 1) > 8 else 0,
        started_at=time.time(),
        settings=case.trainer_settings or {},
    )
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={num_gpus}", "-m"]
    competitor_args = ["competitors.run_competitor", "hf_trainer", to_argument(job)]
    extra_env = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    python_path = [str(BENCHMARKS_DIR), os.environ.get("PYTHONPATH", "")]
    command_log = run_timed(
        [sys.executable, "-m", *launcher, *competitor_args],
        gpu_environment(num_gpus) | extra_env | {"PYTHONPATH": os.pathsep.join(python_path)},
        LIMIT_S + STARTUP_LIMIT_S,
    )
    # Ranks that a timeout left would hold the memory of the next case.
    kill_processes(to_argument(job))
    result_path = target / RESULT_FILE
    results = json.loads(result_path.read_text()) if result_path.exists() else {}
    if "seconds" not in results:
        # The launcher repeats the failure in many lines of its own.
        lines = command_log.last_lines(200).splitlines()
        rank_lines = [line for line in lines if "[rank" in line] or lines
        return {
            "case": case.name,
            "gpus": num_gpus,
            "failed": [line[:300] for line in rank_lines[-40:]],
        }
    return {
        "case": case.name,
        "gpus": num_gpus,
        "settings": [f"{name}={value}" for name, value in job.settings.items()],
        "samples_a_step": num_gpus * results["samples"][0],
        "samples_per_s": round(num_gpus * samples_per_second(results), 2),
        "gb": round(results["peak_gb"], 2),
        "loss": results["loss"],
    }


def kill_processes(argument: str) -> None:
    """Kill all processes with this argument: each rank has its own process group."""
    marker = argument.encode()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if marker in (folder / "cmdline").read_bytes().split(b"\0"):
                os.kill(int(folder.name), signal.SIGKILL)
        except OSError:
            # The process has already ended.
            continue


def gpu_environment(num_gpus: int) -> dict[str, str]:
    """Select the first GPUs."""
    return os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(num_gpus)))}


def read_steps(run_dir: Path) -> list[dict[str, Any]]:
    """Read the steps of the run so far."""
    file = run_dir / "metrics.jsonl"
    if not file.exists():
        return []
    lines = [line for line in file.read_text().split("\n")[:-1] if line]
    return [line for line in map(json.loads, lines) if "loss" in line]


def run_cases(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Run all cases; add `linear` if the single GPU was measured."""
    chosen = [case for case in SCALING_CASES if not options.only or case.name in options.only]
    for name in dict.fromkeys(case.model for case in chosen):
        folder = options.work / "model"
        shutil.rmtree(folder, ignore_errors=True)
        model = ensure_weights(options.configs / name, folder)
        alone = 0.0
        for case in chosen:
            for gpus in options.gpus:
                if case.model != name or gpus < case.min_gpus:
                    continue
                measured = run_finesight if case.trainer_settings is None else run_hf_trainer
                found = measured(case, gpus, model, options)
                alone = found.get("samples_per_s", 0.0) if gpus == 1 else alone
                if alone and "failed" not in found and not case.is_global_batch:
                    found["linear"] = round(found["samples_per_s"] / alone / gpus, 4)
                yield found
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """Run the benchmark, write and print the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("configs", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--gpus", type=lambda t: [int(n) for n in t.split(",")], default=[1, 2, 4])
    parser.add_argument("--only", type=lambda text: text.split(";"), default=[])
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = report_header("multi_gpu_scaling.py", options.configs) | {
        "results": []
    }
    for found in run_cases(options):
        report["results"].append(found)
        options.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
        shown = found | {"failed": found["failed"][-4:]} if "failed" in found else found
        print(json.dumps(shown)[-700:], flush=True)


if __name__ == "__main__":
    main()
