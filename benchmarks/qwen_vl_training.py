"""Compare training and inference of Qwen-VL (2023) to published measurements.

    python benchmarks/qwen_vl_training.py CONFIG --work DIR --out FILE [--steps 12] [--tokens 512]
        [--only lora cached,lora,qlora,full,bf16,nf4,nf4 head,int4]

CONFIG is a folder with the configuration and qwen.tiktoken; weights are random. An iteration equals
that of the published script: 8 accumulated samples of --tokens tokens with one image each.
Published on an A100 with 80 GB: LoRA 23.6 GB and 2.3 s, QLoRA 17.2 GB and 4.5 s. Inference is one
answer of 1,790 tokens after an image, 2,048 tokens in total. Published: bf16 22.60 GB and 28.87
tokens/s, Int4 11.82 GB and 37.79 tokens/s. `peak_gb` is the peak allocated memory, `step_s` the
median step time without the first three steps. Each variant runs in its own process.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "pretraining"))

from qlora_memory import machine_info, run_in_subprocess, train_variant

REFERENCE_TUNE = {
    "language": "lora",
    "lora": {
        "rank": 64,
        "alpha": 16,
        "dropout": 0.05,
        "target_modules": ["c_attn", "attn.c_proj", "w1", "w2"],
    },
}
"""Adapters of the published script."""

TRAIN_VARIANTS: dict[str, tuple[str, ...]] = {
    "lora": ("train.activation_checkpointing=true", "train.pack_tokens=2048"),
    "lora cached": ("train.vision_cache=memory", "train.pack_tokens=4096"),
    "lora 512": ("train.activation_checkpointing=true", "train.pack_tokens=512"),
    "lora 3072": ("train.activation_checkpointing=true", "train.pack_tokens=3072"),
    "qlora": (
        "tune.quantize.nf4=[language, vision, merger]",
        "train.optimizer=adamw_8bit",
        "train.activation_checkpointing=true",
        "train.pack_tokens=2048",
    ),
    "qlora 512": (
        "tune.quantize.nf4=[language, vision, merger]",
        "train.activation_checkpointing=true",
        "train.pack_tokens=512",
    ),
}
FULL_TUNE = {"language": "full", "merger": "full", "embeddings": "full"}
GENERATE_VARIANTS: dict[str, tuple[str, ...]] = {
    "bf16": (),
    "nf4": ("language", "vision", "merger"),
    "nf4 head": ("language", "vision", "merger", "embeddings"),
    "int4": (),
}
"""Parts in NF4. `int4` loads a model with a 4-bit decoder."""
MAX_NEW_TOKENS = 1790


def write_data(config: Path, work: Path, num_tokens: int, num_samples: int = 64) -> Path:
    """Write samples of exactly `num_tokens` tokens with one image each."""
    from PIL import Image

    from finesight.encode.renderer import NativeRenderer
    from finesight.model_folder import ModelFolder
    from finesight.samples.sample import (
        ImagePart,
        LocatedSample,
        Message,
        Sample,
        TextPart,
        write_samples,
    )

    rng, renderer = random.Random(0), NativeRenderer(ModelFolder(config))
    Image.effect_noise((448, 448), 60).convert("RGB").save(work / "noise.png")
    question = (ImagePart(image="noise.png"), TextPart(text="Describe it."))
    samples = []
    for name in range(num_samples):
        words: list[str] = []
        while True:
            answer = Message(role="assistant", content=(TextPart(text="".join(words) or "a"),))
            messages = (Message(role="user", content=question), answer)
            sample = Sample(id=str(name), messages=messages)
            missing = num_tokens - renderer.tokenize(LocatedSample(sample, work)).num_tokens
            if missing == 0:
                break
            words += [" " + rng.choice("abcdefgh") for _ in range(max(1, missing))]
            if missing < 0:
                words = words[: len(words) // 2]
        samples.append(sample)
    write_samples(work / "data.jsonl", samples)
    return work / "data.jsonl"


def measure_answer(model: Path, nf4_parts: list[str]) -> dict[str, Any]:
    """Measure speed and memory of one answer."""
    import torch
    from generation_speed import measure_generation

    from finesight.model.weights_io import load_model
    from finesight.model_folder import ModelFolder

    device = torch.device("cuda")
    loaded = load_model(ModelFolder(model), torch.bfloat16, device, nf4_parts).eval()
    taken = torch.cuda.memory_allocated() / 1e9
    measure_generation(loaded, 1, 8, use_cuda_graphs=True)
    return {"loaded_gb": round(taken, 2)} | measure_generation(
        loaded, 1, MAX_NEW_TOKENS, use_cuda_graphs=True
    )


def measure_full_training(config: Path, data: Path, num_steps: int) -> dict[str, Any]:
    """Train all parameters except the vision encoder, as the published script does, without files.

    A checkpoint of the full model exceeds the disk of many rented machines.
    """
    import torch
    from random_model import init_random_model

    from finesight.encode.packing import pack
    from finesight.encode.renderer import NativeRenderer
    from finesight.model.linear import stacked_row_counts
    from finesight.model.trainable import configure_tuning, trainable_parameters
    from finesight.model_folder import ModelFolder
    from finesight.samples.corpus import load_corpus
    from finesight.settings.config import TrainFileSettings, TrainSettings, TuneSettings
    from finesight.train.master_weight_optimizer import MasterWeightOptimizer
    from finesight.train.objectives.objective import fused_linear_cross_entropy

    folder, device = ModelFolder(config), torch.device("cuda")
    renderer = NativeRenderer(folder)
    encoded = [
        renderer.encode(s) for s in load_corpus((TrainFileSettings(path=data),)).read_samples()[:8]
    ]
    model = init_random_model(folder.config, 0, torch.bfloat16, device, folder.preprocessor_config)
    configure_tuning(model.train(), TuneSettings.model_validate(FULL_TUNE), seed=0)
    model.activation_checkpointing = True
    settings = TrainSettings.model_validate({"learning_rate": 1e-5, "optimizer": "adamw_8bit"})
    masters = MasterWeightOptimizer(
        trainable_parameters(model), settings, stacked_row_counts(model)
    )
    packs = [pack(encoded[at : at + 4]).to(device) for at in (0, 4)]
    share = torch.tensor(1 / sum(one.num_supervised_tokens for one in packs), device=device)
    seconds, losses = [], []
    for _ in range(num_steps):
        start, loss = time.perf_counter(), 0.0
        for number, one in enumerate(packs):
            if number:
                masters.accumulate_gradients()
            of_pack = fused_linear_cross_entropy(
                model(one), model.lm_head_weight, one.labels_L, share
            )
            of_pack.backward()
            loss += of_pack.item()
        masters.step(1.0, masters.grad_norm())
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        losses.append(round(loss, 4))
    peak = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    return {"peak_gb": peak, "step_s": round(statistics.median(seconds[3:]), 3), "losses": losses}


def _ensure_int4_model(model: Path, folder: Path) -> Path:
    """Write the model once; later calls reuse it."""
    if not folder.exists():
        partly = folder.with_suffix(".part")
        run_in_subprocess(
            str(model), str(partly), script=Path(__file__).with_name("int4_weights.py")
        )
        partly.rename(folder)
    return folder


def main() -> None:
    """Run the benchmark, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--only", default="lora cached,lora,qlora,full,bf16,nf4,nf4 head,int4")
    options = parser.parse_args()
    options.batch, options.side, options.pack_tokens = 8, 448, 2048
    options.work.mkdir(parents=True, exist_ok=True)
    here = Path(__file__)
    qlora = here.with_name("qlora_memory.py")
    made = run_in_subprocess(
        "--weight-format", str(options.config), str(options.work), script=qlora
    )
    model = Path(made["folder"])
    data = write_data(options.config, options.work, options.tokens)
    results: list[dict[str, Any]] = []
    for name in options.only.split(","):
        found: dict[str, Any] = {"variant": name}
        if name in TRAIN_VARIANTS:
            run = options.work / "run"
            found |= train_variant(
                model, data, TRAIN_VARIANTS[name], run, options, tune=REFERENCE_TUNE
            )
        elif name == "full":
            words = ("--full", str(options.config), str(data), str(options.steps))
            found |= run_in_subprocess(*words, script=here)
        else:
            answer_model = (
                _ensure_int4_model(model, options.work / "int4") if name == "int4" else model
            )
            found |= run_in_subprocess(
                "--answer", str(answer_model), *GENERATE_VARIANTS[name], script=here
            )
        results.append(found)
        print(json.dumps(found), flush=True)
        head = machine_info() | {"command": f"qwen_vl_training.py CONFIG --only {options.only!r}"}
        options.out.write_text(json.dumps({**head, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    import sys

    if sys.argv[1:2] == ["--answer"]:
        print(json.dumps(measure_answer(Path(sys.argv[2]), sys.argv[3:])))
    elif sys.argv[1:2] == ["--full"]:
        print(
            json.dumps(
                measure_full_training(Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
            )
        )
    else:
        main()
