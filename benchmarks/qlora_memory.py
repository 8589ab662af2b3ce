"""Compare LoRA and QLoRA on one model: memory, step time, loading and generation.

    python benchmarks/qlora_memory.py CONFIG --work DIR --out FILE [--steps 20] [--batch 16]
        [--side 448] [--pack-tokens 4096] [--only lora,nf4,nf4+vision] [--keep]

CONFIG is a folder with the configuration and tokenizer of a model. Random weights are written to
DIR once; --keep retains them for the next call. A folder with weights is used directly. Each
variant is a `finesight train` run in its own process on generated receipts of --side x --side
pixels. `peak_gb` is the peak allocated memory, `step_s` the median step time without the first
three steps. `loading` measures the model without adapters: memory of its tensors, peak while
loading, seconds. `generation` decodes one sample at a time with the finished run.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "pretraining"))

FINESIGHT = [sys.executable, "-m", "finesight"]
MAX_NEW_TOKENS = 64
"""Maximum length of an answer; random weights rarely generate a stop token."""

VARIANTS: dict[str, tuple[str, ...]] = {
    "lora": (),
    "nf4": ("tune.quantize.nf4=[language]",),
    "nf4+vision": ("tune.quantize.nf4=[language, vision, merger]",),
    "nf4+vision+8bit": (
        "tune.quantize.nf4=[language, vision, merger]",
        "train.optimizer=adamw_8bit",
    ),
    "nf4+vision+checkpointing": (
        "tune.quantize.nf4=[language, vision, merger]",
        "train.activation_checkpointing=true",
    ),
    "lora+checkpointing": ("train.activation_checkpointing=true",),
}
LORA_TUNE = {"language": "lora", "lora": {"rank": 64, "alpha": 16, "dropout": 0.05}}
COLUMNS = ("loaded_gb", "loading_gb", "loading_s", "peak_gb", "step_s", "samples_per_s", "tokens/s")


def ensure_weights(config: Path, work: Path) -> Path:
    """Return a folder with weights: `config`, or random weights below `work`."""
    import torch
    from random_model import init_random_model

    from finesight.model.weights_io import save_model
    from finesight.model_folder import locate_model

    folder = locate_model(str(config))
    if any(folder.path.glob("*.safetensors")):
        return folder.path
    target = work / "model"
    if not target.exists():
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = init_random_model(folder.config, seed=0, dtype=torch.bfloat16, device=device)
        partly = work / "model.part"
        partly.mkdir(parents=True, exist_ok=True)
        save_model(model, folder, partly, torch.bfloat16)
        partly.rename(target)
    return target


def run_in_subprocess(*args: str, script: Path = Path(__file__)) -> dict[str, Any]:
    """Run a script in a subprocess with exclusive GPU use. Its last line is the result."""
    done = subprocess.run([sys.executable, str(script), *args], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{args}: exit {done.returncode}\n{done.stderr[-4000:]}")
    lines = done.stdout.splitlines()
    found: dict[str, Any] = json.loads(lines[-1]) if lines else {}
    return found


def gpu_peak_gb() -> float | None:
    """Return the peak allocated GPU memory of this process in GB."""
    import torch

    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    return round(torch.cuda.max_memory_allocated() / 1e9, 3)


def measure_loading(model: Path, overrides: list[str]) -> dict[str, float | None]:
    """Measure loading of the model in bf16 or 4 bits."""
    import torch
    import yaml

    from finesight.model.weights_io import load_model
    from finesight.model_folder import ModelFolder

    settings = dict(change.split("=", 1) for change in overrides)
    parts = tuple(yaml.safe_load(settings.get("tune.quantize.nf4", "[]")))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    start = time.perf_counter()
    loaded = load_model(ModelFolder(model), torch.bfloat16, device, parts)
    peak = gpu_peak_gb()
    taken = sum(tensor.nbytes for tensor in [*loaded.parameters(), *loaded.buffers()])
    return {
        "loaded_gb": round(taken / 1e9, 3),
        "loading_gb": peak,
        "loading_s": round(time.perf_counter() - start, 1),
    }


def measure_generation(run: Path, data: Path) -> dict[str, float | None]:
    """Measure decoding speed and memory of single answers."""
    from finesight.infer.model_loader import load_inference_model
    from finesight.infer.prediction import predict
    from finesight.samples.corpus import load_corpus
    from finesight.settings.config import TrainFileSettings

    answerer = load_inference_model(str(run), precision="bf16")
    samples = load_corpus((TrainFileSettings(path=data),)).read_samples()[:3]
    tokens_per_s = []
    for sample in samples:
        start = time.perf_counter()
        (prediction,) = predict(
            answerer.model, answerer.renderer, [sample], max_new_tokens=MAX_NEW_TOKENS, batch_size=1
        )
        tokens_per_s.append(prediction.num_tokens / (time.perf_counter() - start))
    return {"tokens/s": round(max(tokens_per_s), 1), "generation_gb": gpu_peak_gb()}


def train_variant(
    model: Path,
    data: Path,
    overrides: tuple[str, ...],
    run: Path,
    options: argparse.Namespace,
    tune: dict[str, Any] = LORA_TUNE,
) -> dict[str, Any]:
    """Run `finesight train` and return results from the run folder."""
    shutil.rmtree(run, ignore_errors=True)
    settings = {
        "model": str(model),
        "data": {"train": str(data)},
        "image": {"height": options.side, "width": options.side},
        "tune": tune,
        "train": {
            "steps": options.steps,
            "batch_size": options.batch,
            "pack_tokens": options.pack_tokens,
            "precision": "bf16",
            "save_every": 0,
        },
        "output_dir": str(run),
    }
    recipe = run.with_suffix(".yaml")
    recipe.write_text(json.dumps(settings), encoding="utf-8")
    start = time.perf_counter()
    done = subprocess.run(
        [*FINESIGHT, "train", str(recipe), *overrides], capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{overrides}: exit {done.returncode}\n{done.stderr[-4000:]}")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    warm = steps[3:]
    return {
        "peak_gb": round(max(step["peak_memory_gb"] for step in steps), 2),
        "step_s": round(statistics.median(step["step_s"] for step in warm), 3),
        "samples_per_s": round(statistics.median(step["samples_per_s"] for step in warm), 1),
        "tokens_per_step": round(statistics.mean(step["num_tokens"] for step in steps)),
        "mfu": round(statistics.median(step["mfu"] for step in warm), 3),
        "losses": [round(step["loss"], 4) for step in steps],
        "whole_s": round(time.perf_counter() - start, 1),
    }


def run_variant(name: str, model: Path, data: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Run all measurements of one variant."""
    changes, run = VARIANTS[name], options.work / "run"
    figures: dict[str, Any] = {"variant": name, "changes": list(changes)}
    figures |= run_in_subprocess("--load", str(model), *changes)
    figures |= train_variant(model, data, changes, run, options)
    return figures | run_in_subprocess("--answer", str(run), str(data))


def format_table(results: list[dict[str, Any]]) -> str:
    """Format one line per variant."""
    rows = [["", *COLUMNS]] + [[r["variant"], *(str(r[c]) for c in COLUMNS)] for r in results]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )


def machine_info() -> dict[str, Any]:
    """Describe the machine and versions."""
    import torch

    return {
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": {"python": platform.python_version(), "torch": torch.__version__}
        | {"bitsandbytes": importlib.metadata.version("bitsandbytes")},
    }


def main() -> None:
    """Run the benchmark, print and write the results."""
    if sys.argv[1:2] == ["--load"]:
        print(json.dumps(measure_loading(Path(sys.argv[2]), sys.argv[3:])))
        return
    if sys.argv[1:2] == ["--answer"]:
        print(json.dumps(measure_generation(Path(sys.argv[2]), Path(sys.argv[3]))))
        return
    if sys.argv[1:2] == ["--weight-format"]:
        print(json.dumps({"folder": str(ensure_weights(Path(sys.argv[2]), Path(sys.argv[3])))}))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=str)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--side", type=int, default=448)
    parser.add_argument("--pack-tokens", type=int, default=4096)
    parser.add_argument("--only", default=",".join(list(VARIANTS)[:3]))
    parser.add_argument("--keep", action="store_true")
    options = parser.parse_args()
    from synthetic_tasks.dataset_writer import write_task
    from synthetic_tasks.tasks import SyntheticTask

    options.work.mkdir(parents=True, exist_ok=True)
    data = options.work / "data" / "data.jsonl"
    if not data.exists():
        write_task(
            data.parent, SyntheticTask("receipt", "built-in"), 320, seed=5, task_kind="receipt"
        )
    model = Path(run_in_subprocess("--weight-format", options.config, str(options.work))["folder"])
    settings = {k: v for k, v in vars(options).items() if k in ("steps", "batch", "side")}
    report = machine_info() | {
        "model": Path(options.config).name,
        "settings": settings,
        "results": [],
    }
    chosen = [name for name in VARIANTS if name in options.only.split(",")]
    for name in chosen:
        report["results"].append(run_variant(name, model, data, options))
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(report["results"][-1]), file=sys.stderr, flush=True)
    print(format_table(report["results"]))
    if not options.keep:
        shutil.rmtree(options.work / "model", ignore_errors=True)


if __name__ == "__main__":
    main()
