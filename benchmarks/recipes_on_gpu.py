"""Run the four recipes at their models' true geometry on one GPU, through the real commands.

    python benchmarks/recipes_on_gpu.py --configs DIR --data DIR --work DIR --out FILE
        [--only captions_2b,...] [--baseline SCRIPT] [--steps 30] [--model-folder DIR]
        [--set KEY=VALUE]...

--configs holds a folder of configuration and tokenizer files for each model (Qwen2-VL-2B-Instruct,
Qwen2.5-VL-3B-Instruct, Qwen2.5-VL-7B-Instruct); the weights are drawn at random, which costs the
same time and memory as trained ones. --model-folder takes one existing model for all recipes
instead, to rehearse; --set changes a setting of all. --data holds captions/, grounding/ and
latex_ocr/ with a JSONL table and pictures each. Every recipe is stopped by SIGTERM at half of its
steps and resumed in a new process; loss, speed and memory are read from the run's own
metrics.jsonl.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
FINESIGHT = [sys.executable, "-m", "finesight"]


@dataclass(frozen=True)
class Task:
    """One recipe with what prepares its data and what this measurement changes in it."""

    name: str
    recipe: str
    model: str
    table: str
    importing: tuple[str, ...]
    changes: tuple[str, ...] = ()


CAPTIONS = ("--map", "image=image", "--map", "answer=captions", "--prompt", "COCO Yes:")
TASKS = (
    Task(
        "captions_2b_batch64",
        "captions_qwen2_vl_2b.yaml",
        "Qwen2-VL-2B-Instruct",
        "captions/captions.jsonl",
        CAPTIONS,
        ("train.batch=64", "train.pack_tokens=16384"),
    ),
    Task(
        "captions_2b",
        "captions_qwen2_vl_2b.yaml",
        "Qwen2-VL-2B-Instruct",
        "captions/captions.jsonl",
        CAPTIONS,
    ),
    Task(
        "latex_2b",
        "latex_ocr_qwen2_vl_2b.yaml",
        "Qwen2-VL-2B-Instruct",
        "latex_ocr/latex_ocr.jsonl",
        ("--map", "image=image", "--map", "answer=latex", "--prompt", "Read the formula."),
    ),
    Task(
        "captions_7b",
        "captions_qwen2_5_vl_7b.yaml",
        "Qwen2.5-VL-7B-Instruct",
        "captions/captions.jsonl",
        ("--map", "image=image", "--map", "answer=captions", "--prompt", "请描述这张图片的内容。"),
    ),
    Task(
        "grounding_3b_full",
        "grounding_qwen2_5_vl_3b.yaml",
        "Qwen2.5-VL-3B-Instruct",
        "grounding/grounding.jsonl",
        ("--map", "image=image", "--map", "question=question", "--map", "box=bbox_xyxy"),
    ),
)


def random_weights(config: Path, target: Path) -> None:
    """Write a hub folder of `config`'s geometry with random bf16 weights."""
    import torch

    from finesight.hub import locate
    from finesight.model.weights import random_model, save_model

    folder = locate(str(config))
    model = random_model(folder.config, seed=0, dtype=torch.bfloat16, device=torch.device("cuda"))
    target.mkdir(parents=True)
    save_model(model, folder, target, torch.bfloat16)


def call(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*FINESIGHT, *words], capture_output=True, text=True)
    if check and done.returncode != 0:
        raise SystemExit(f"finesight {' '.join(words)}: {done.returncode}\n{done.stderr[-4000:]}")
    return done


def records(run: Path) -> list[dict[str, float]]:
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [record for record in map(json.loads, lines) if "loss" in record]


@dataclass(frozen=True)
class Told:
    """What stopping and resuming showed; `last_lines` are the resumed command's own words."""

    stopped_after: int
    seconds_to_stop: float
    seconds_in_all: float
    last_lines: list[str]


def stopped_and_resumed(words: list[str], run: Path, half: int) -> Told:
    """Start `finesight train`, stop it after `half` steps, resume it in a new process."""
    start = time.time()
    log = run.with_suffix(".log")
    with log.open("w") as out:
        process = subprocess.Popen([*FINESIGHT, *words], stdout=out, stderr=out)
        while process.poll() is None and len(records(run)) < half:
            time.sleep(0.2)
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        stopped = process.wait()
    if stopped != 75:
        raise SystemExit(f"{words}: exit {stopped} instead of 75\n{log.read_text()[-4000:]}")
    at = len(records(run))
    interrupted_s = time.time() - start
    resumed = call(*words, "--resume")
    return Told(
        stopped_after=at,
        seconds_to_stop=round(interrupted_s, 1),
        seconds_in_all=round(time.time() - start, 1),
        last_lines=resumed.stderr.splitlines()[-30:],
    )


def measure(task: Task, options: argparse.Namespace, model: Path) -> dict[str, object]:
    data = options.work / f"data_{task.name}"
    table = str(options.data / task.table)
    shutil.rmtree(data, ignore_errors=True)
    call("data", "import", table, str(data), *task.importing, "--split", "0.9")
    run = options.work / f"run_{task.name}"
    words = [
        "train",
        str(RECIPES / task.recipe),
        f"model={model}",
        f"data.train={data / 'train.jsonl'}",
        f"data.eval={data / 'eval.jsonl'}",
        f"output={run}",
        f"train.steps={options.steps}",
        "train.epochs=null",
        f"train.save_every={options.steps}",
        "train.keep=1",
        "eval.limit=8",
        "eval.every=null",
        "eval.max_new_tokens=32",
        "track=[]",
        *task.changes,
        *options.set,
    ]
    told = stopped_and_resumed(words, run, options.steps // 2)
    at = told.stopped_after
    steps = records(run)
    # The first steps of each of the two processes warm up.
    warm = [s for s in steps if s["step"] not in (1, 2, 3) and s["step"] - at not in (1, 2, 3)]
    losses = [step["loss"] for step in steps]
    scores = call("eval", str(run), "--limit", "8", "--max-new-tokens", "32", "--json")
    result = {
        "task": task.name,
        "steps": len(steps),
        "samples_per_step": steps[0]["samples"],
        "tokens_per_step": [min(s["tokens"] for s in steps), max(s["tokens"] for s in steps)],
        "samples_per_s": round(statistics.median(s["samples_per_s"] for s in warm), 1),
        "slowest_and_fastest": [
            round(pick(s["samples_per_s"] for s in warm), 1) for pick in (min, max)
        ],
        "mean_loss_of_first_5": round(statistics.mean(losses[:5]), 4),
        "mean_loss_of_last_5": round(statistics.mean(losses[-5:]), 4),
        "peak_gb": max(step["memory_gb"] for step in steps),
        "utilisation": round(statistics.median(step["utilisation"] for step in warm), 3),
        "waiting_share": round(
            sum(s["waited_s"] for s in warm) / sum(s["seconds"] for s in warm), 3
        ),
        "eval": json.loads(scores.stdout.strip().splitlines()[-1]),
        **asdict(told),
    }
    shutil.rmtree(run)
    return result


def baseline(script: Path) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, str(script), "--samples", "496", "--epochs", "1"],
        capture_output=True,
        text=True,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return json.loads(lines[-1]) if lines else {"failed": done.stderr[-2000:]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--configs", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="")
    parser.add_argument("--baseline", type=Path)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--model-folder", type=Path)
    parser.add_argument("--set", action="append", default=[])
    options = parser.parse_args()
    import torch

    report: dict[str, object] = {
        "command": " ".join(sys.argv),
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": importlib.metadata.version("transformers"),
        },
        "results": [],
    }
    options.work.mkdir(parents=True, exist_ok=True)
    chosen = [t for t in TASKS if not options.only or t.name in options.only.split(",")]
    results: list[dict[str, object]] = []
    if options.baseline:
        results.append({"task": "baseline", **baseline(options.baseline)})
    for index, task in enumerate(chosen):
        model = options.model_folder or options.work / task.model
        if not model.exists():
            random_weights(options.configs / task.model, model)
            torch.cuda.empty_cache()
        results.append(measure(task, options, model))
        report["results"] = results
        options.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
        print(json.dumps({k: v for k, v in results[-1].items() if k != "last_lines"}), flush=True)
        if not options.model_folder and task.model not in {
            later.model for later in chosen[index + 1 :]
        }:
            shutil.rmtree(model)


if __name__ == "__main__":
    main()
