"""LoRA beside Q-LoRA on one model: memory, steps, loading and answering, each in its own process.

    python benchmarks/qlora_memory.py CONFIG --work DIR --out FILE [--steps 20] [--batch 16]
        [--side 448] [--pack-tokens 4096] [--only lora,nf4,nf4+vision] [--keep]

CONFIG is a folder with a model's configuration and tokenizer; its weights are drawn at random,
which costs the same time and memory as trained ones, and written to DIR once (--keep leaves them
there for a next call). A folder that has weights is taken as it is. Every variant is a
`finesight train` of generated receipts with pictures of --side pixels squared: `peak_gb` is the
most memory allocated in it, `step_s` the median of its steps but the first three. `loading` is the
model alone, without adapters: what its tensors take, the peak on the way there, seconds.
`answering` is one sample at a time from the finished run.
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

FINESIGHT = [sys.executable, "-m", "finesight"]
TOKENS = 64
"""Of an answer; random weights seldom stop before."""

VARIANTS: dict[str, tuple[str, ...]] = {
    "lora": (),
    "nf4": ("tune.nf4=[language]",),
    "nf4+vision": ("tune.nf4=[language, vision, merger]",),
    "nf4+vision+8bit": (
        "tune.nf4=[language, vision, merger]",
        "train.optimizer=adamw8bit",
    ),
    "nf4+vision+recompute": ("tune.nf4=[language, vision, merger]", "train.recompute=true"),
    "lora+recompute": ("train.recompute=true",),
}
LORA = {"language": "lora", "lora": {"rank": 64, "alpha": 16, "dropout": 0.05}}
COLUMNS = ("loaded_gb", "loading_gb", "loading_s", "peak_gb", "step_s", "samples_per_s", "tokens/s")


def weights(config: Path, work: Path) -> Path:
    """A folder with weights: `config` itself, or random ones of its geometry below `work`."""
    import torch

    from finesight.hub import locate
    from finesight.model.weights import random_model, save_model

    folder = locate(str(config))
    if any(folder.path.glob("*.safetensors")):
        return folder.path
    target = work / "model"
    if not target.exists():
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = random_model(folder.config, seed=0, dtype=torch.bfloat16, device=device)
        partly = work / "model.part"
        partly.mkdir(parents=True, exist_ok=True)
        save_model(model, folder, partly, torch.bfloat16)
        partly.rename(target)
    return target


def in_own_process(*words: str, file: Path = Path(__file__)) -> dict[str, Any]:
    """The other half of a file, with a GPU of its own; its last line is the result."""
    done = subprocess.run([sys.executable, str(file), *words], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{words}: exit {done.returncode}\n{done.stderr[-4000:]}")
    lines = done.stdout.splitlines()
    found: dict[str, Any] = json.loads(lines[-1]) if lines else {}
    return found


def peak_gb() -> float | None:
    """The most memory of the GPU that this process had allocated, once it has done its work."""
    import torch

    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    return round(torch.cuda.max_memory_allocated() / 1e9, 3)


def load(model: Path, changes: list[str]) -> dict[str, float | None]:
    """What the model takes alone, in bf16 or four bits."""
    import torch
    import yaml

    from finesight.hub import ModelFolder
    from finesight.model.weights import load_model

    settings = dict(change.split("=", 1) for change in changes)
    parts = tuple(yaml.safe_load(settings.get("tune.nf4", "[]")))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    start = time.perf_counter()
    loaded = load_model(ModelFolder(model), torch.bfloat16, device, parts)
    peak = peak_gb()
    taken = sum(tensor.nbytes for tensor in [*loaded.parameters(), *loaded.buffers()])
    return {
        "loaded_gb": round(taken / 1e9, 3),
        "loading_gb": peak,
        "loading_s": round(time.perf_counter() - start, 1),
    }


def answer(run: Path, data: Path) -> dict[str, float | None]:
    """Tokens a second of one answer, and what answering takes."""
    from finesight.config import DataFile
    from finesight.data.sources import load_sources
    from finesight.infer.load import load_answerer
    from finesight.infer.predict import predict

    answerer = load_answerer(str(run), precision="bf16")
    asked = load_sources((DataFile(path=data),)).read()[:3]
    rates = []
    for sample in asked:
        start = time.perf_counter()
        (said,) = predict(
            answerer.model, answerer.renderer, [sample], max_new_tokens=TOKENS, batch=1
        )
        rates.append(said.tokens / (time.perf_counter() - start))
    return {"tokens/s": round(max(rates), 1), "answering_gb": peak_gb()}


def trained(
    model: Path,
    data: Path,
    changes: tuple[str, ...],
    run: Path,
    options: argparse.Namespace,
    tune: dict[str, Any] = LORA,
) -> dict[str, Any]:
    """`finesight train`; its figures from the run's own files."""
    shutil.rmtree(run, ignore_errors=True)
    settings = {
        "model": str(model),
        "data": {"train": str(data)},
        "picture": {"height": options.side, "width": options.side},
        "tune": tune,
        "train": {
            "steps": options.steps,
            "batch": options.batch,
            "pack_tokens": options.pack_tokens,
            "precision": "bf16",
            "save_every": 0,
        },
        "output": str(run),
    }
    recipe = run.with_suffix(".yaml")
    recipe.write_text(json.dumps(settings), encoding="utf-8")
    start = time.perf_counter()
    done = subprocess.run(
        [*FINESIGHT, "train", str(recipe), *changes], capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{changes}: exit {done.returncode}\n{done.stderr[-4000:]}")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    warm = steps[3:]
    return {
        "peak_gb": round(max(step["memory_gb"] for step in steps), 2),
        "step_s": round(statistics.median(step["seconds"] for step in warm), 3),
        "samples_per_s": round(statistics.median(step["samples_per_s"] for step in warm), 1),
        "tokens_per_step": round(statistics.mean(step["tokens"] for step in steps)),
        "utilisation": round(statistics.median(step["utilisation"] for step in warm), 3),
        "losses": [round(step["loss"], 4) for step in steps],
        "whole_s": round(time.perf_counter() - start, 1),
    }


def measure(name: str, model: Path, data: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One variant."""
    changes, run = VARIANTS[name], options.work / "run"
    figures: dict[str, Any] = {"variant": name, "changes": list(changes)}
    figures |= in_own_process("--load", str(model), *changes)
    figures |= trained(model, data, changes, run, options)
    return figures | in_own_process("--answer", str(run), str(data))


def table(results: list[dict[str, Any]]) -> str:
    """A line for each variant."""
    rows = [["", *COLUMNS]] + [[r["variant"], *(str(r[c]) for c in COLUMNS)] for r in results]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )


def machine() -> dict[str, Any]:
    """What computed."""
    import torch

    return {
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": {"python": platform.python_version(), "torch": torch.__version__}
        | {"bitsandbytes": importlib.metadata.version("bitsandbytes")},
    }


def main() -> None:
    """Measure, print and write."""
    if sys.argv[1:2] == ["--load"]:
        print(json.dumps(load(Path(sys.argv[2]), sys.argv[3:])))
        return
    if sys.argv[1:2] == ["--answer"]:
        print(json.dumps(answer(Path(sys.argv[2]), Path(sys.argv[3]))))
        return
    if sys.argv[1:2] == ["--weights"]:
        print(json.dumps({"folder": str(weights(Path(sys.argv[2]), Path(sys.argv[3])))}))
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
    from finesight.synth.tasks import Task
    from finesight.synth.writing import write_task

    options.work.mkdir(parents=True, exist_ok=True)
    data = options.work / "data" / "data.jsonl"
    if not data.exists():
        write_task(data.parent, Task("receipt", "built-in"), 320, seed=5, kind="receipt")
    model = Path(in_own_process("--weights", options.config, str(options.work))["folder"])
    told = {k: v for k, v in vars(options).items() if k in ("steps", "batch", "side")}
    report = machine() | {"model": Path(options.config).name, "settings": told, "results": []}
    chosen = [name for name in VARIANTS if name in options.only.split(",")]
    for name in chosen:
        report["results"].append(measure(name, model, data, options))
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(report["results"][-1]), file=sys.stderr, flush=True)
    print(table(report["results"]))
    if not options.keep:
        shutil.rmtree(options.work / "model", ignore_errors=True)


if __name__ == "__main__":
    main()
