"""Measure speed and memory on one GPU at the limits of model size and sample length.

    python benchmarks/single_gpu.py CONFIGS --work DIR --out FILE [--only "NAME;..."] [--steps 20]

CONFIGS contains folders of configuration and tokenizer files of Qwen2-VL-2B-Instruct,
Qwen2.5-VL-3B-Instruct and Qwen2.5-VL-7B-Instruct. The 32B model uses the 7B configuration with its
published sizes. Random weights are written to DIR and deleted after the runs. For 32B, only the
first layers are random; other weights are zeros in a sparse file, with the same time and memory.
Each run is `finesight train` on generated scenes, with questions extended to the tokens of the
case, without vision cache. `gb` is the peak allocated memory in GB (10^9 bytes).
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cost_scaling import extend_prompts
from peer_data import ensure_weights, measure_sample_costs, write_caption_dataset
from peer_metrics import WARMUP_STEPS, lora_settings, report_header, run_recipe

from finesight.model.config import ConfigReader
from finesight.model.vlm import build_model
from finesight.model.weights_io import hub_tensors
from finesight.model_folder import locate_model

LIMIT_S = 400.0
RANDOM_LAYERS = 4
CONFIG_32B = {"hidden_size": 5120, "num_hidden_layers": 64, "num_attention_heads": 40}
CONFIG_32B |= {"num_key_value_heads": 8, "intermediate_size": 27648}
LORA_OVERRIDE = "tune.lora={rank: 64, alpha: 16, dropout: 0.05}"
FULL_OVERRIDES = tuple(
    f"tune.{part}=full" for part in ("vision", "merger", "language", "embeddings")
)
NF4_OVERRIDE = "tune.quantize.nf4=[language,vision,merger]"


@dataclass(frozen=True)
class TrainCase:
    """A run: model, image side, tokens per sample, batch size and overrides."""

    name: str
    model: str
    image_side: int
    num_tokens: int
    batch_size: int
    overrides: tuple[str, ...]


MODEL_7B, MODEL_2B = "Qwen2.5-VL-7B-Instruct", "Qwen2-VL-2B-Instruct"
MODEL_3B = "Qwen2.5-VL-3B-Instruct"
CASES = (
    TrainCase("7B LoRA", MODEL_7B, 644, 829, 16, (LORA_OVERRIDE,)),
    TrainCase(
        "7B LoRA FP8",
        MODEL_7B,
        644,
        829,
        16,
        (LORA_OVERRIDE, "tune.quantize.fp8=[language,vision]"),
    ),
    TrainCase("7B QLoRA", MODEL_7B, 644, 1024, 1, (LORA_OVERRIDE, NF4_OVERRIDE)),
    TrainCase(
        "7B QLoRA checkpointed",
        MODEL_7B,
        644,
        1024,
        1,
        (LORA_OVERRIDE, NF4_OVERRIDE, "train.activation_checkpointing=true"),
    ),
    TrainCase(
        "2B full, checkpointed",
        MODEL_2B,
        280,
        200,
        8,
        (*FULL_OVERRIDES, "train.activation_checkpointing=true"),
    ),
    TrainCase(
        "2B full, 8 bit, checkpointed",
        *(MODEL_2B, 280, 200, 8),
        (*FULL_OVERRIDES, "train.activation_checkpointing=true", "train.optimizer=adamw_8bit"),
    ),
    TrainCase("3B full", MODEL_3B, 196, 130, 8, FULL_OVERRIDES),
    TrainCase(
        "32B QLoRA",
        "32B",
        644,
        1024,
        1,
        (LORA_OVERRIDE, NF4_OVERRIDE, "train.activation_checkpointing=true"),
    ),
)


def make_32b_model(config: Path, output_dir: Path) -> Path:
    """Write a 32B model folder with random first layers and embeddings; other weights are
    sparse."""
    shutil.rmtree(output_dir, ignore_errors=True)
    shutil.copytree(config, output_dir, ignore=shutil.ignore_patterns("*.safetensors"))
    settings = json.loads((config / "config.json").read_text())
    settings |= CONFIG_32B
    settings["vision_config"] |= {"out_hidden_size": CONFIG_32B["hidden_size"]}
    (output_dir / "config.json").write_text(json.dumps(settings))
    folder = locate_model(str(output_dir))
    files = (
        ConfigReader(folder.config),
        ConfigReader(folder.preprocessor_config, "preprocessor_config.json"),
    )
    model = build_model(*files, torch.bfloat16, torch.device("meta"))
    named = model.architecture.to_hub_name
    shapes = {named(tensor.name): tuple(tensor.shape) for tensor in hub_tensors(model)}
    _write_sparse_tensors(output_dir / "model.safetensors", shapes)
    return output_dir


def _write_sparse_tensors(file: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    header: dict[str, Any] = {}
    offset = 0
    for name, shape in shapes.items():
        end = offset + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = torch.Generator().manual_seed(0)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + offset)
        for name in _early_layers(shapes):
            drawn = torch.randn(shapes[name], generator=generator).mul_(0.02)
            if name.endswith(("norm.weight", "layernorm.weight", "norm1.weight", "norm2.weight")):
                drawn.fill_(1.0)
            stream.seek(8 + len(text) + header[name]["data_offsets"][0])
            stream.write(drawn.bfloat16().view(torch.int16).numpy().tobytes())


def _early_layers(names: Iterable[str]) -> list[str]:
    """Return the tensors that do not belong to later layers."""
    found = []
    for name in names:
        _, layers, rest = name.partition("layers.")
        if not layers or int(rest.split(".")[0]) < RANDOM_LAYERS:
            found.append(name)
    return found


def run_case(case: TrainCase, model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Run one case and return speed and memory."""
    work = options.work
    data = extend_prompts(
        write_caption_dataset(work / "data"),
        work / "data" / f"long-{case.num_tokens}-{case.image_side}.jsonl",
        case.num_tokens,
        lambda table: (
            measure_sample_costs(model, table, case.image_side, lora_settings()).max_tokens
        ),
    )
    words = [
        f"model={model}",
        f"data.train={data}",
        f"image={{height: {case.image_side}, width: {case.image_side}}}",
        f"train.steps={options.steps}",
        f"train.batch_size={case.batch_size}",
        f"train.pack_tokens={max(4096, case.num_tokens * case.batch_size)}",
        "train.vision_cache=never",
        "train.precision=bf16",
        "train.save_every=0",
        *case.overrides,
    ]
    watched, steps = run_recipe(words, work / "run", LIMIT_S)
    if not steps:
        return {"case": case.name, "failed": watched.last_lines()}
    middle = {
        name: statistics.median(step[name] for step in steps[WARMUP_STEPS:] or steps)
        for name in ("samples_per_s", "tokens_per_s", "mfu")
    }
    return {
        "case": case.name,
        "settings": list(case.overrides),
        "batch": case.batch_size,
        "tokens_a_sample": steps[0]["num_tokens"] / steps[0]["num_samples"],
        **{name: round(value, 3) for name, value in middle.items()},
        "gb": round(max(step["peak_memory_gb"] for step in steps), 2),
        "loss": [round(steps[0]["loss"], 3), round(steps[-1]["loss"], 3)],
        "exit": watched.exit_code,
        **({"said": watched.last_lines()} if watched.exit_code else {}),
    }


def main() -> None:
    """Run the benchmark, write and print the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("configs", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", type=lambda text: text.split(";"), default=[])
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    chosen = [case for case in CASES if not options.only or case.name in options.only]
    report: dict[str, Any] = report_header("single_gpu.py", options.configs) | {"results": []}
    for name in dict.fromkeys(case.model for case in chosen):
        folder = options.work / "model"
        shutil.rmtree(folder, ignore_errors=True)
        is_larger = name == "32B"
        config = options.configs / (MODEL_7B if is_larger else name)
        model = make_32b_model(config, folder) if is_larger else ensure_weights(config, folder)
        for case in chosen:
            if case.model == name:
                report["results"].append(run_case(case, model, options))
                options.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
                print(json.dumps(report["results"][-1])[:600], flush=True)
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
