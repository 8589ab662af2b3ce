"""How fast a small model learns by LoRA on a CPU, beside transformers, peft and their Trainer.

    python benchmarks/lora_on_cpu.py MODEL --out FILE [--samples 640] [--epochs 3] [--rounds 3]
        [--threads 2] [--batch 16] [--dropout 0.05] [--precision bf16]

MODEL is a folder or `finesight-tiny`. Both learn the same generated receipts (the fields as JSON)
with the same rank, layers, batch, rates and number of samples, each in processes of its own, in
turns. `training` is samples a second of all steps without the start-up before them. Ours puts the
pictures through the frozen tower once, before its first step (`looking_s`), and these seconds
count; Trainer does so in every step. `whole` is samples a second from the start of the process to
its end, with the adapter saved. The other side reads pictures and texts once, in its start-up, and
keeps them in memory; which of its settings are best is measured first (`settings_tried`), by
`steady`, samples a second after the first steps, and the fastest are used. Its pictures go through
transformers' processor for Pillow.
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

RANK, ALPHA, RATE, WARMUP = 16, 32, 1e-3, 0.03
WARM = 5
"""Steps that are not counted as steady: a short trial is not to be decided by its first ones."""

TRIAL_STEPS = 25
PATHS = ("model", "out")
RATES = ("training", "whole")
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Setting:
    """How the other side is run. `precision`: fp32, autocast (fp32 weights, products in bf16),
    bf16 (its adapter in fp32, as peft does by default) or bf16-all. `pad_to` makes padded lengths
    multiples of a number, `group` puts samples of like length together."""

    precision: str = "fp32"
    attention: str = "sdpa"
    group: bool = True
    pad_to: int = 1
    workers: int = 0
    optimiser: str = "adamw_torch"


TRIED = (
    Setting(group=False),
    Setting(),
    Setting("autocast"),
    Setting("bf16"),
    Setting("bf16-all"),
    Setting("autocast", "eager"),
    Setting("bf16", "eager"),
    Setting("bf16-all", "eager"),
    Setting("autocast", "eager", pad_to=32),
    Setting("bf16-all", "eager", pad_to=32),
    Setting("bf16-all", "eager", pad_to=32, workers=1),
    Setting("bf16-all", "eager", pad_to=32, optimiser="adamw_torch_fused"),
)


@dataclass(frozen=True)
class Job:
    """What both sides learn, and how long."""

    model: str
    data: str
    batch: int
    steps: int
    dropout: float


def with_trainer(job: Job, setting: Setting, target: Path) -> dict[str, Any]:
    """Train with transformers, peft and Trainer in this process; gives its figures."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import (
        Qwen2VLForConditionalGeneration,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    samples = read_samples(Path(job.model), Path(job.data))
    narrow = setting.precision.startswith("bf16")
    model = Qwen2VLForConditionalGeneration.from_pretrained(
        job.model,
        dtype=torch.bfloat16 if narrow else torch.float32,
        attn_implementation=setting.attention,
    )
    model.config.use_cache = False
    layers = rf".*language_model.*\.({'|'.join(LAYERS)})"
    adapter = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=job.dropout, target_modules=layers)
    model = get_peft_model(model, adapter, autocast_adapter_dtype=setting.precision != "bf16-all")
    begun: list[float] = []
    ends: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: object, **__: object) -> None:
            begun.append(time.perf_counter())

        def on_step_end(self, *_: object, **__: object) -> None:
            ends.append(time.perf_counter())

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(target),
            use_cpu=True,
            per_device_train_batch_size=job.batch,
            max_steps=job.steps,
            learning_rate=RATE,
            lr_scheduler_type="cosine",
            warmup_steps=WARMUP,
            optim=setting.optimiser,
            bf16=setting.precision == "autocast",
            train_sampling_strategy="group_by_length" if setting.group else "random",
            dataloader_num_workers=setting.workers,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
            label_names=["labels"],
            logging_steps=max(1, job.steps // 6),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=samples,
        data_collator=lambda chosen: padded(chosen, setting.pad_to),
        callbacks=[Clock()],
    )
    trainer.train()
    model.save_pretrained(target / "adapter")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "training": job.batch * len(ends) / (ends[-1] - begun[0]),
        "steady": job.batch * (len(ends) - WARM) / (ends[-1] - ends[WARM - 1]),
        "loss": [round(float(losses[0]), 3), round(float(losses[-1]), 3)],
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "tokens": sum(sample["length"] for sample in samples),
        "learned": sum(int((sample["labels"] != -100).sum()) for sample in samples),
    }


def read_samples(model: Path, data: Path) -> list[dict[str, Any]]:
    """All samples as tensors, by the model's chat template, tokenizer and picture processor."""
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
        with Image.open(data.parent / turns[0]["content"][0]["image"]) as picture:
            seen = process(images=[picture.convert("RGB")], return_tensors="pt")
        pads = placeholder * (int(seen["image_grid_thw"].prod()) // 4)
        whole, asked = (
            tokenizer.apply_chat_template(part, chat_template=chat, tokenize=False, **more)
            for part, more in ((turns, {}), (turns[:-1], {"add_generation_prompt": True}))
        )
        answered = whole[: whole.rindex(end) + len(end)]
        ids, known, before = (
            tokenizer(text.replace(placeholder, pads), add_special_tokens=False)["input_ids"]
            for text in (whole, answered, asked)
        )
        labels = torch.full((len(ids),), -100)
        labels[len(before) : len(known)] = torch.tensor(ids[len(before) : len(known)])
        kinds = (torch.tensor(ids) == tokenizer.convert_tokens_to_ids(placeholder)).int()
        texts = {"input_ids": torch.tensor(ids), "labels": labels, "mm_token_type_ids": kinds}
        samples.append({**texts, **seen, "length": len(ids)})
    return samples


def padded(chosen: list[dict[str, Any]], multiple: int) -> dict[str, Any]:
    """A batch as the model wants it: texts padded on the right, patches end to end."""
    import torch

    longest = -(-max(sample["length"] for sample in chosen) // multiple) * multiple
    batch = {
        name: torch.full((len(chosen), longest), filling)
        for name, filling in (("input_ids", 0), ("labels", -100), ("mm_token_type_ids", 0))
    }
    batch["attention_mask"] = torch.zeros(len(chosen), longest, dtype=torch.long)
    for row, sample in enumerate(chosen):
        for name in ("input_ids", "labels", "mm_token_type_ids"):
            batch[name][row, : sample["length"]] = sample[name]
        batch["attention_mask"][row, : sample["length"]] = 1
    for name in ("pixel_values", "image_grid_thw"):
        batch[name] = torch.cat([sample[name] for sample in chosen])
    return batch


def recipe_of(job: Job, precision: str, run: Path) -> str:
    """The same task as a recipe."""
    recipe = {
        "model": job.model,
        "data": {"train": job.data},
        "tune": {
            "language": "lora",
            "lora": {"rank": RANK, "alpha": ALPHA, "dropout": job.dropout},
        },
        "train": {
            "steps": job.steps,
            "batch": job.batch,
            "learning_rate": RATE,
            "warmup": WARMUP,
            "precision": precision,
            "device": "cpu",
            "save_every": 0,
        },
        "output": str(run),
    }
    return json.dumps(recipe)


def timed(command: list[str], threads: int, **more: str) -> tuple[str, float]:
    """Run a command with so many threads and `more` environment; its output, and its seconds."""
    changed = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    environment = os.environ | changed | more
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{command}: exit {done.returncode}\n{done.stderr[-4000:]}")
    return done.stdout, time.perf_counter() - start


def ours(job: Job, precision: str, threads: int) -> dict[str, Any]:
    """`finesight train`, its figures from the run's own files."""
    from safetensors import safe_open

    with tempfile.TemporaryDirectory() as folder:
        run, recipe = Path(folder) / "run", Path(folder) / "recipe.yaml"
        recipe.write_text(recipe_of(job, precision, run), encoding="utf-8")
        command = [sys.executable, "-m", "finesight", "train", str(recipe)]
        # No run before has looked at the pictures.
        _, seconds = timed(command, threads, HF_ASSETS_CACHE=f"{folder}/features")
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        with safe_open(run / "adapter" / "adapter_model.safetensors", "np") as adapter:
            trained = sum(adapter.get_tensor(name).size for name in adapter.keys())  # noqa: SIM118
    begun, steps = lines[0], [line for line in lines if "loss" in line]
    looking = sum(line["seen_s"] for line in lines if "seen_s" in line)
    sixth = max(1, len(steps) // 6)
    losses = [statistics.mean(s["loss"] for s in part) for part in (steps[:sixth], steps[-sixth:])]
    in_an_epoch = steps[: begun["data"]["train"]["samples"] // job.batch]
    return {
        "training": sum(s["samples"] for s in steps) / (looking + sum(s["seconds"] for s in steps)),
        "looking_s": looking,
        "whole": job.batch * job.steps / seconds,
        "seconds": seconds,
        "loss": [round(loss, 3) for loss in losses],
        "trained": trained,
        "tokens": begun["data"]["train"]["tokens"],
        "learned": sum(step["supervised"] for step in in_an_epoch),
    }


def theirs(job: Job, setting: Setting, threads: int) -> dict[str, Any]:
    """This file in a process of its own, as `with_trainer`."""
    words = json.dumps({"job": asdict(job), "setting": asdict(setting)})
    out, seconds = timed([sys.executable, __file__, "--with-trainer", words], threads)
    figures: dict[str, Any] = json.loads(out.splitlines()[-1])
    return figures | {"whole": job.batch * job.steps / seconds, "seconds": seconds}


def compared(job: Job, setting: Setting, precision: str, threads: int) -> dict[str, Any]:
    """One round. Ends the program where both sides did not do the same."""
    pair = {"finesight": ours(job, precision, threads), "trainer": theirs(job, setting, threads)}
    for what in ("trained", "tokens", "learned"):
        counts = [side[what] for side in pair.values()]
        if counts[0] != counts[1]:
            raise SystemExit(f"{what}: {counts[0]} here, {counts[1]} with Trainer")
    ratios = {name: pair["finesight"][name] / pair["trainer"][name] for name in RATES}
    round_ = pair | {"ratio": ratios}
    print(json.dumps(round_), file=sys.stderr, flush=True)
    return round_


def name_of(model: str) -> str:
    """What a model is called, without the folders that it lies in."""
    from finesight.hub import lasting_name, locate

    return Path(lasting_name(locate(model))).name


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All trials and rounds."""
    from finesight.hub import locate
    from finesight.synth.tasks import Task
    from finesight.synth.writing import write_task

    task = Task("receipt", "built-in")
    data = write_task(folder / "data", task, options.samples, seed=5, kind="receipt")
    steps = options.samples * options.epochs // options.batch
    base = locate(options.model)
    base.fetch_weights()
    model = str(base.path.resolve())
    job = Job(model, str(data), options.batch, steps, options.dropout)
    trial = replace(job, steps=TRIAL_STEPS)
    tried = [(theirs(trial, one, options.threads)["steady"], one) for one in TRIED]
    _, best = max(tried, key=lambda pair: pair[0])
    rounds = [
        compared(job, best, options.precision, options.threads) for _ in range(options.rounds)
    ]
    return {
        "task": asdict(job) | {"model": name_of(model), "data": "receipts as JSON"},
        "samples": options.samples,
        "precision": options.precision,
        "settings_tried": [asdict(one) | {"steady": round(rate, 1)} for rate, one in tried],
        "settings": asdict(best),
        "rounds": rounds,
        "median_ratio": {
            name: round(statistics.median(r["ratio"][name] for r in rounds), 2) for name in RATES
        },
    }


def machine(threads: int) -> dict[str, Any]:
    """What computed."""
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
    """Measure and write."""
    if sys.argv[1:2] == ["--with-trainer"]:
        told = json.loads(sys.argv[2])
        with tempfile.TemporaryDirectory() as folder:
            job, setting = Job(**told["job"]), Setting(**told["setting"])
            print(json.dumps(with_trainer(job, setting, Path(folder))))
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
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        told = {name: value for name, value in vars(options).items() if name not in PATHS}
        words = [name_of(options.model), "--out FILE"]
        words += [f"--{name} {value}" for name, value in told.items()]
        report = {
            "command": f"python benchmarks/lora_on_cpu.py {' '.join(words)}",
            **machine(options.threads),
        }
        report |= measure(options, Path(folder))
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report["median_ratio"]))


if __name__ == "__main__":
    main()
