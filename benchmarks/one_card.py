"""What one card holds and how fast it learns there: runs at the edges of memory and of length.

    python benchmarks/one_card.py CONFIGS --work DIR --out FILE [--only "NAME;..."] [--steps 20]

CONFIGS holds folders of configuration and tokenizer files of Qwen2-VL-2B-Instruct,
Qwen2.5-VL-3B-Instruct and Qwen2.5-VL-7B-Instruct; the model of 32B is the last with the sizes that
are published for it. Weights are drawn at random, written to DIR and deleted after their runs. Of
the 32B those of the first layers are drawn, the others are zeros that take no room on the disk:
they cost the same time and memory. Every run is a real `finesight train` of drawn scenes, whose
questions are made so long that a sample has the tokens of its case; the picture's features are made
anew in every step. `gb` is the most that was allocated in it, in 10^9 bytes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from growth import lengthened
from peer_data import count, draw, random_weights
from peer_figures import WARM, head, lora
from stopwatch import watch

from finesight.hub import locate
from finesight.model.geometry import Settings
from finesight.model.network import build
from finesight.model.weights import hub_tensors

LIMIT_S = 400.0
DRAWN_LAYERS = 4
OF_32B = {"hidden_size": 5120, "num_hidden_layers": 64, "num_attention_heads": 40}
OF_32B |= {"num_key_value_heads": 8, "intermediate_size": 27648}
LORA = "tune.lora={rank: 64, alpha: 16, dropout: 0.05}"
ALL = tuple(f"tune.{part}=full" for part in ("vision", "merger", "language", "embeddings"))
FEW_BITS = "tune.nf4=[language,vision,merger]"


@dataclass(frozen=True)
class Case:
    """A run: samples of so many tokens with a picture of this side, and what it sets."""

    name: str
    model: str
    side: int
    tokens: int
    batch: int
    settings: tuple[str, ...]


SEVEN, TWO = "Qwen2.5-VL-7B-Instruct", "Qwen2-VL-2B-Instruct"
THREE = "Qwen2.5-VL-3B-Instruct"
CASES = (
    Case("7B LoRA", SEVEN, 644, 829, 16, (LORA,)),
    Case("7B LoRA FP8", SEVEN, 644, 829, 16, (LORA, "tune.fp8=[language,vision]")),
    Case("7B QLoRA", SEVEN, 644, 1024, 1, (LORA, FEW_BITS)),
    Case("7B QLoRA recomputed", SEVEN, 644, 1024, 1, (LORA, FEW_BITS, "train.recompute=true")),
    Case("2B full, recomputed", TWO, 280, 200, 8, (*ALL, "train.recompute=true")),
    Case(
        "2B full, 8 bit, recomputed",
        *(TWO, 280, 200, 8),
        (*ALL, "train.recompute=true", "train.optimizer=adamw8bit"),
    ),
    Case("3B full", THREE, 196, 130, 8, ALL),
    Case("32B QLoRA", "32B", 644, 1024, 1, (LORA, FEW_BITS, "train.recompute=true")),
)


def larger(config: Path, target: Path) -> Path:
    """The folder of a model with the decoder of the 32B: of weights, the first layers and the
    embeddings drawn, the rest left out of the file as holes."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(config, target, ignore=shutil.ignore_patterns("*.safetensors"))
    settings = json.loads((config / "config.json").read_text())
    settings |= OF_32B
    settings["vision_config"] |= {"out_hidden_size": OF_32B["hidden_size"]}
    (target / "config.json").write_text(json.dumps(settings))
    folder = locate(str(target))
    files = Settings(folder.config), Settings(folder.preprocessor, "preprocessor_config.json")
    model = build(*files, torch.bfloat16, torch.device("meta"))
    named = model.architecture.published_name
    shapes = {named(tensor.name): tuple(tensor.shape) for tensor in hub_tensors(model)}
    _write(target / "model.safetensors", shapes)
    return target


def _write(file: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    header: dict[str, Any] = {}
    at = 0
    for name, shape in shapes.items():
        end = at + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = torch.Generator().manual_seed(0)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + at)
        for name in _drawn(shapes):
            drawn = torch.randn(shapes[name], generator=generator).mul_(0.02)
            if name.endswith(("norm.weight", "layernorm.weight", "norm1.weight", "norm2.weight")):
                drawn.fill_(1.0)
            stream.seek(8 + len(text) + header[name]["data_offsets"][0])
            stream.write(drawn.bfloat16().view(torch.int16).numpy().tobytes())


def _drawn(names: Iterable[str]) -> list[str]:
    """All that are not of a later layer."""
    found = []
    for name in names:
        _, layers, rest = name.partition("layers.")
        if not layers or int(rest.split(".")[0]) < DRAWN_LAYERS:
            found.append(name)
    return found


def measure(case: Case, model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """A run's speed and memory."""
    work = options.work
    data = lengthened(
        draw(work / "data"),
        work / "data" / f"long-{case.tokens}-{case.side}.jsonl",
        case.tokens,
        lambda table: count(model, table, case.side, lora()).longest,
    )
    run, file = work / "run", work / "recipe.yaml"
    shutil.rmtree(run, ignore_errors=True)
    file.write_text("{}\n", encoding="utf-8")
    words = [
        f"model={model}",
        f"data.train={data}",
        f"picture={{height: {case.side}, width: {case.side}}}",
        f"train.steps={options.steps}",
        f"train.batch={case.batch}",
        f"train.pack_tokens={max(4096, case.tokens * case.batch)}",
        "train.cache=never",
        "train.precision=bf16",
        "train.save_every=0",
        f"output={run}",
        *case.settings,
    ]
    watched = watch([sys.executable, "-m", "finesight", "train", str(file), *words], {}, LIMIT_S)
    lines = []
    if (run / "metrics.jsonl").exists():
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    shutil.rmtree(run, ignore_errors=True)
    if not steps:
        return {"case": case.name, "failed": watched.last_words()}
    middle = {
        name: statistics.median(step[name] for step in steps[WARM:] or steps)
        for name in ("samples_per_s", "tokens_per_s", "utilisation")
    }
    return {
        "case": case.name,
        "settings": list(case.settings),
        "batch": case.batch,
        "tokens_a_sample": steps[0]["tokens"] / steps[0]["samples"],
        **{name: round(value, 3) for name, value in middle.items()},
        "gb": round(max(step["memory_gb"] for step in steps), 2),
        "loss": [round(steps[0]["loss"], 3), round(steps[-1]["loss"], 3)],
        "exit": watched.code,
        **({"said": watched.last_words()} if watched.code else {}),
    }


def main() -> None:
    """Measure, write, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("configs", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", type=lambda text: text.split(";"), default=[])
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    chosen = [case for case in CASES if not options.only or case.name in options.only]
    report: dict[str, Any] = head("one_card.py", options.configs) | {"results": []}
    for name in dict.fromkeys(case.model for case in chosen):
        folder = options.work / "model"
        shutil.rmtree(folder, ignore_errors=True)
        is_larger = name == "32B"
        config = options.configs / (SEVEN if is_larger else name)
        model = larger(config, folder) if is_larger else random_weights(config, folder)
        for case in chosen:
            if case.model == name:
                report["results"].append(measure(case, model, options))
                options.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
                print(json.dumps(report["results"][-1])[:600], flush=True)
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
