"""Compare LoRA on a CPU to transformers, peft and Trainer.

    python benchmarks/lora_on_cpu.py MODEL --out FILE [--samples 640] [--epochs 3] [--rounds 3]
        [--threads 2] [--batch 16] [--dropout 0.05] [--precision bf16]

MODEL is a folder or `finesight-tiny`. Both trainers use the same generated receipts (fields as
JSON), rank, layers, batch size, learning rate and number of samples, in alternating processes.

- `training`: samples/s of all steps without startup. It includes the vision cache of finesight,
  which encodes each image once before the first step (`vision_cache_s`). Trainer encodes images in
  every step.
- `whole`: samples/s from process start to exit, with the saved adapter.
- `steady`: samples/s after the first steps, used to select the fastest Trainer settings
  (`settings_tried`).

Trainer loads images and texts once at startup and holds them in memory. Its images use the Pillow
processor of transformers.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

RANK, ALPHA, LEARNING_RATE, WARMUP = 16, 32, 1e-3, 0.03
WARMUP_STEPS = 5
"""Steps excluded from `steady`, so that short trials do not depend on warmup."""

TRIAL_STEPS = 25
PATH_OPTIONS = ("model", "out")
THROUGHPUTS = ("training", "whole")
TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class TrainerSetting:
    """Settings of Trainer.

    `precision`: fp32, autocast (fp32 weights, bf16 products), bf16 (fp32 adapter, the default of
    peft) or bf16-all. `pad_to_multiple_of` rounds padded lengths up, `group_by_length` batches
    samples of similar length.
    """

    precision: str = "fp32"
    attention: str = "sdpa"
    group_by_length: bool = True
    pad_to_multiple_of: int = 1
    num_workers: int = 0
    optimizer: str = "adamw_torch"


TRIAL_SETTINGS = (
    TrainerSetting(group_by_length=False),
    TrainerSetting(),
    TrainerSetting("autocast"),
    TrainerSetting("bf16"),
    TrainerSetting("bf16-all"),
    TrainerSetting("autocast", "eager"),
    TrainerSetting("bf16", "eager"),
    TrainerSetting("bf16-all", "eager"),
    TrainerSetting("autocast", "eager", pad_to_multiple_of=32),
    TrainerSetting("bf16-all", "eager", pad_to_multiple_of=32),
    TrainerSetting("bf16-all", "eager", pad_to_multiple_of=32, num_workers=1),
    TrainerSetting("bf16-all", "eager", pad_to_multiple_of=32, optimizer="adamw_torch_fused"),
)


@dataclass(frozen=True)
class CpuTrainJob:
    """Training job of both trainers."""

    model: str
    data: str
    batch_size: int
    num_steps: int
    dropout: float


def train_with_hf_trainer(
    job: CpuTrainJob, setting: TrainerSetting, output_dir: Path
) -> dict[str, Any]:
    """Train with transformers, peft and Trainer in this process and return the results."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import (
        Qwen2VLForConditionalGeneration,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    samples = load_samples(Path(job.model), Path(job.data))
    narrow = setting.precision.startswith("bf16")
    model = Qwen2VLForConditionalGeneration.from_pretrained(
        job.model,
        dtype=torch.bfloat16 if narrow else torch.float32,
        attn_implementation=setting.attention,
    )
    model.config.use_cache = False
    layers = rf".*language_model.*\.({'|'.join(TARGET_MODULES)})"
    adapter = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=job.dropout, target_modules=layers)
    model = get_peft_model(model, adapter, autocast_adapter_dtype=setting.precision != "bf16-all")
    start_times: list[float] = []
    ends: list[float] = []

    class StepTimer(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: object, **__: object) -> None:
            start_times.append(time.perf_counter())

        def on_step_end(self, *_: object, **__: object) -> None:
            ends.append(time.perf_counter())

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(output_dir),
            use_cpu=True,
            per_device_train_batch_size=job.batch_size,
            max_steps=job.num_steps,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="cosine",
            warmup_steps=WARMUP,
            optim=setting.optimizer,
            bf16=setting.precision == "autocast",
            train_sampling_strategy="group_by_length" if setting.group_by_length else "random",
            dataloader_num_workers=setting.num_workers,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
            label_names=["labels"],
            logging_steps=max(1, job.num_steps // 6),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=samples,
        data_collator=lambda chosen: pad_batch(chosen, setting.pad_to_multiple_of),
        callbacks=[StepTimer()],
    )
    trainer.train()
    model.save_pretrained(output_dir / "adapter")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "training": job.batch_size * len(ends) / (ends[-1] - start_times[0]),
        "steady": job.batch_size * (len(ends) - WARMUP_STEPS) / (ends[-1] - ends[WARMUP_STEPS - 1]),
        "loss": [round(float(losses[0]), 3), round(float(losses[-1]), 3)],
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "tokens": sum(sample["length"] for sample in samples),
        "supervised_tokens": sum(int((sample["labels"] != -100).sum()) for sample in samples),
    }


def load_samples(model: Path, data: Path) -> list[dict[str, Any]]:
    """Load all samples as tensors with chat template, tokenizer and image processor."""
    import torch
    from PIL import Image
    from transformers import PreTrainedTokenizerFast
    from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl

    limits = json.loads((model / "preprocessor_config.json").read_text())
    process = image_processing_pil_qwen2_vl.Qwen2VLImageProcessorPil(
        min_pixels=limits["min_pixels"], max_pixels=limits["max_pixels"]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(model / "tokenizer.json"))
    chat = json.loads((model / "chat_template.json").read_text())["chat_template"]
    placeholder, end = "<|image_pad|>", "<|im_end|>"
    samples = []
    for row in map(json.loads, data.read_text(encoding="utf-8").splitlines()):
        turns = row["messages"]
        with Image.open(data.parent / turns[0]["content"][0]["image"]) as image:
            seen = process(images=[image.convert("RGB")], return_tensors="pt")
        pads = placeholder * (int(seen["image_grid_thw"].prod()) // 4)
        full_text, prompt_text = (
            tokenizer.apply_chat_template(part, chat_template=chat, tokenize=False, **more)
            for part, more in ((turns, {}), (turns[:-1], {"add_generation_prompt": True}))
        )
        answered = full_text[: full_text.rindex(end) + len(end)]
        ids, known, before = (
            tokenizer(text.replace(placeholder, pads), add_special_tokens=False)["input_ids"]
            for text in (full_text, answered, prompt_text)
        )
        labels = torch.full((len(ids),), -100)
        labels[len(before) : len(known)] = torch.tensor(ids[len(before) : len(known)])
        kinds = (torch.tensor(ids) == tokenizer.convert_tokens_to_ids(placeholder)).int()
        texts = {"input_ids": torch.tensor(ids), "labels": labels, "mm_token_type_ids": kinds}
        samples.append({**texts, **seen, "length": len(ids)})
    return samples


def pad_batch(samples: list[dict[str, Any]], multiple: int) -> dict[str, Any]:
    """Collate a batch: texts padded on the right, patches concatenated."""
    import torch

    longest = -(-max(sample["length"] for sample in samples) // multiple) * multiple
    batch = {
        name: torch.full((len(samples), longest), filling)
        for name, filling in (("input_ids", 0), ("labels", -100), ("mm_token_type_ids", 0))
    }
    batch["attention_mask"] = torch.zeros(len(samples), longest, dtype=torch.long)
    for row, sample in enumerate(samples):
        for name in ("input_ids", "labels", "mm_token_type_ids"):
            batch[name][row, : sample["length"]] = sample[name]
        batch["attention_mask"][row, : sample["length"]] = 1
    for name in ("pixel_values", "image_grid_thw"):
        batch[name] = torch.cat([sample[name] for sample in samples])
    return batch


def make_recipe(job: CpuTrainJob, precision: str, run: Path) -> str:
    """Write the same task as a recipe."""
    recipe = {
        "model": job.model,
        "data": {"train": job.data},
        "tune": {
            "language": "lora",
            "lora": {"rank": RANK, "alpha": ALPHA, "dropout": job.dropout},
        },
        "train": {
            "steps": job.num_steps,
            "batch_size": job.batch_size,
            "learning_rate": LEARNING_RATE,
            "warmup": WARMUP,
            "precision": precision,
            "device": "cpu",
            "save_every": 0,
        },
        "output_dir": str(run),
    }
    return json.dumps(recipe)


def run_timed(command: list[str], threads: int, **extra_env: str) -> tuple[str, float]:
    """Run a command with a number of threads; return its output and seconds."""
    changed = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    environment = os.environ | changed | extra_env
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{command}: exit {done.returncode}\n{done.stderr[-4000:]}")
    return done.stdout, time.perf_counter() - start


def train_with_finesight(job: CpuTrainJob, precision: str, threads: int) -> dict[str, Any]:
    """Run `finesight train` and return results from the run folder."""
    from safetensors import safe_open

    with tempfile.TemporaryDirectory() as folder:
        run, recipe = Path(folder) / "run", Path(folder) / "recipe.yaml"
        recipe.write_text(make_recipe(job, precision, run), encoding="utf-8")
        command = [sys.executable, "-m", "finesight", "train", str(recipe)]
        # Clear the vision cache of earlier runs.
        _, seconds = run_timed(command, threads, HF_ASSETS_CACHE=f"{folder}/features")
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        with safe_open(run / "adapter" / "adapter_model.safetensors", "np") as adapter:
            trained = sum(adapter.get_tensor(name).size for name in adapter.keys())  # noqa: SIM118
    start, steps = lines[0], [line for line in lines if "loss" in line]
    vision_cache_s = sum(line.get("vision_cache_s", 0.0) for line in lines)
    sixth = max(1, len(steps) // 6)
    losses = [statistics.mean(s["loss"] for s in part) for part in (steps[:sixth], steps[-sixth:])]
    in_an_epoch = steps[: start["data"]["train"]["num_samples"] // job.batch_size]
    return {
        "training": sum(s["num_samples"] for s in steps)
        / (vision_cache_s + sum(s["step_s"] for s in steps)),
        "vision_cache_s": vision_cache_s,
        "whole": job.batch_size * job.num_steps / seconds,
        "seconds": seconds,
        "loss": [round(loss, 3) for loss in losses],
        "trained": trained,
        "tokens": start["data"]["train"]["num_tokens"],
        "supervised_tokens": sum(step["num_supervised_tokens"] for step in in_an_epoch),
    }


def run_hf_trainer(job: CpuTrainJob, setting: TrainerSetting, threads: int) -> dict[str, Any]:
    """Run Trainer in a subprocess of this file."""
    words = json.dumps({"job": asdict(job), "setting": asdict(setting)})
    out, seconds = run_timed([sys.executable, __file__, "--with-trainer", words], threads)
    figures: dict[str, Any] = json.loads(out.splitlines()[-1])
    return figures | {"whole": job.batch_size * job.num_steps / seconds, "seconds": seconds}


def run_round(
    job: CpuTrainJob, setting: TrainerSetting, precision: str, threads: int
) -> dict[str, Any]:
    """Run one round. Exits if the two trainers did not process the same data."""
    pair = {
        "finesight": train_with_finesight(job, precision, threads),
        "trainer": run_hf_trainer(job, setting, threads),
    }
    for name in ("trained", "tokens", "supervised_tokens"):
        counts = [side[name] for side in pair.values()]
        if counts[0] != counts[1]:
            raise SystemExit(f"{name}: {counts[0]} here, {counts[1]} with Trainer")
    ratios = {name: pair["finesight"][name] / pair["trainer"][name] for name in THROUGHPUTS}
    round_ = pair | {"ratio": ratios}
    print(json.dumps(round_), file=sys.stderr, flush=True)
    return round_


def model_name(model: str) -> str:
    """Return the name of a model without its folders."""
    from finesight.model_folder import get_portable_name, locate_model

    return Path(get_portable_name(locate_model(model))).name


def run_benchmark(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run all trials and rounds."""
    sys.path.append(str(Path(__file__).resolve().parents[1] / "pretraining"))
    from synthetic_tasks.dataset_writer import write_task
    from synthetic_tasks.tasks import SyntheticTask

    from finesight.model_folder import locate_model

    task = SyntheticTask("receipt", "built-in")
    data = write_task(folder / "data", task, args.samples, seed=5, task_kind="receipt")
    steps = args.samples * args.epochs // args.batch
    base = locate_model(args.model)
    base.fetch_weights()
    model = str(base.path.resolve())
    job = CpuTrainJob(model, str(data), args.batch, steps, args.dropout)
    trial = replace(job, num_steps=TRIAL_STEPS)
    tried = [(run_hf_trainer(trial, one, args.threads)["steady"], one) for one in TRIAL_SETTINGS]
    _, best = max(tried, key=lambda pair: pair[0])
    rounds = [run_round(job, best, args.precision, args.threads) for _ in range(args.rounds)]
    return {
        "task": asdict(job) | {"model": model_name(model), "data": "receipts as JSON"},
        "samples": args.samples,
        "precision": args.precision,
        "settings_tried": [asdict(one) | {"steady": round(steady, 1)} for steady, one in tried],
        "settings": asdict(best),
        "rounds": rounds,
        "median_ratio": {
            name: round(statistics.median(r["ratio"][name] for r in rounds), 2)
            for name in THROUGHPUTS
        },
    }


def machine_info(threads: int) -> dict[str, Any]:
    """Describe the machine and versions."""
    import torch

    names = ("torch", "transformers", "peft", "accelerate", "tokenizers", "pillow")
    abilities = torch.cpu.get_capabilities()
    return {
        "processor": abilities.get("cpu_name", platform.processor()),
        "cores": os.cpu_count(),
        "threads": threads,
        "bf16_products": bool(abilities.get("avx512_bf16") or abilities.get("amx_bf16")),
        "versions": {name: importlib.metadata.version(name) for name in names}
        | {"python": platform.python_version()},
    }


def main() -> None:
    """Run the benchmark and write the results."""
    if sys.argv[1:2] == ["--with-trainer"]:
        payload = json.loads(sys.argv[2])
        with tempfile.TemporaryDirectory() as folder:
            job, setting = CpuTrainJob(**payload["job"]), TrainerSetting(**payload["setting"])
            print(json.dumps(train_with_hf_trainer(job, setting, Path(folder))))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=640)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--precision", default="bf16")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        payload = {name: value for name, value in vars(args).items() if name not in PATH_OPTIONS}
        words = [model_name(args.model), "--out FILE"]
        words += [f"--{name} {value}" for name, value in payload.items()]
        report = {
            "command": f"python benchmarks/lora_on_cpu.py {' '.join(words)}",
            **machine_info(args.threads),
        }
        report |= run_benchmark(args, Path(folder))
    args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report["median_ratio"]))


if __name__ == "__main__":
    main()
