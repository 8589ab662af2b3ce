"""Run the four tutorial recipes at full model size on one GPU with the real commands.

    python benchmarks/recipes_on_gpu.py --configs DIR --data DIR --work DIR --out FILE
        [--only captions_2b,...] [--baseline SCRIPT] [--steps 30] [--model-folder DIR]
        [--set KEY=VALUE]...

--configs contains folders of configuration and tokenizer files (Qwen2-VL-2B-Instruct,
Qwen2.5-VL-3B-Instruct, Qwen2.5-VL-7B-Instruct). Weights are random, which does not change time and
memory. --model-folder uses one existing model for all recipes, for a rehearsal; --set overrides a
setting of all recipes. --data contains captions/, grounding/ and latex_ocr/, each with a JSONL
table and images. Each recipe is stopped by SIGTERM after half of its steps and resumed in a new
process. Loss, speed and memory are read from metrics.jsonl.
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

sys.path.append(str(Path(__file__).resolve().parents[1] / "pretraining"))

RECIPES_DIR = Path(__file__).resolve().parents[1] / "recipes"
FINESIGHT = [sys.executable, "-m", "finesight"]


@dataclass(frozen=True)
class RecipeTask:
    """A recipe, the import of its data, and the overrides of this benchmark."""

    name: str
    recipe: str
    model: str
    dataset: str
    import_args: tuple[str, ...]
    overrides: tuple[str, ...] = ()


CAPTION_IMPORT_ARGS = ("--map", "image=image", "--map", "answer=captions", "--prompt", "COCO Yes:")
RECIPE_TASKS = (
    RecipeTask(
        "captions_2b_batch64",
        "captions_qwen2_vl_2b.yaml",
        "Qwen2-VL-2B-Instruct",
        "captions/captions.jsonl",
        CAPTION_IMPORT_ARGS,
        ("train.batch_size=64", "train.pack_tokens=16384"),
    ),
    RecipeTask(
        "captions_2b",
        "captions_qwen2_vl_2b.yaml",
        "Qwen2-VL-2B-Instruct",
        "captions/captions.jsonl",
        CAPTION_IMPORT_ARGS,
    ),
    RecipeTask(
        "latex_2b",
        "latex_ocr_qwen2_vl_2b.yaml",
        "Qwen2-VL-2B-Instruct",
        "latex_ocr/latex_ocr.jsonl",
        ("--map", "image=image", "--map", "answer=latex", "--prompt", "Read the formula."),
    ),
    RecipeTask(
        "captions_7b",
        "captions_qwen2_5_vl_7b.yaml",
        "Qwen2.5-VL-7B-Instruct",
        "captions/captions.jsonl",
        ("--map", "image=image", "--map", "answer=captions", "--prompt", "请描述这张图片的内容。"),
    ),
    RecipeTask(
        "grounding_3b_full",
        "grounding_qwen2_5_vl_3b.yaml",
        "Qwen2.5-VL-3B-Instruct",
        "grounding/grounding.jsonl",
        ("--map", "image=image", "--map", "question=question", "--map", "box=bbox_xyxy"),
    ),
)


def write_random_weights(config: Path, output_dir: Path) -> None:
    """Write a hub folder with random bf16 weights for `config`."""
    import torch
    from random_model import init_random_model

    from finesight.model.weights_io import save_model
    from finesight.model_folder import locate_model

    folder = locate_model(str(config))
    model = init_random_model(
        folder.config, seed=0, dtype=torch.bfloat16, device=torch.device("cuda")
    )
    output_dir.mkdir(parents=True)
    save_model(model, folder, output_dir, torch.bfloat16)


def run_finesight(*args: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    result = subprocess.run([*FINESIGHT, *args], capture_output=True, text=True)
    if check and result.returncode != 0:
        raise SystemExit(
            f"finesight {' '.join(args)}: {result.returncode}\n{result.stderr[-4000:]}"
        )
    return result


def read_step_records(run: Path) -> list[dict[str, float]]:
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [record for record in map(json.loads, lines) if "loss" in record]


@dataclass(frozen=True)
class StopResumeResult:
    """Result of stopping and resuming; `last_lines` is the end of the output of the resumed run."""

    stopped_after_step: int
    stop_s: float
    total_s: float
    last_lines: list[str]


def run_stop_and_resume(args: list[str], run: Path, stop_after: int) -> StopResumeResult:
    """Start `finesight train`, stop it after `stop_after` steps, and resume it in a new process."""
    start = time.time()
    log = run.with_suffix(".log")
    with log.open("w") as out:
        process = subprocess.Popen([*FINESIGHT, *args], stdout=out, stderr=out)
        while process.poll() is None and len(read_step_records(run)) < stop_after:
            time.sleep(0.2)
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        stopped = process.wait()
    if stopped != 75:
        raise SystemExit(f"{args}: exit {stopped} instead of 75\n{log.read_text()[-4000:]}")
    at = len(read_step_records(run))
    interrupted_s = time.time() - start
    resumed = run_finesight(*args, "--resume")
    return StopResumeResult(
        stopped_after_step=at,
        stop_s=round(interrupted_s, 1),
        total_s=round(time.time() - start, 1),
        last_lines=resumed.stderr.splitlines()[-30:],
    )


def run_recipe(task: RecipeTask, options: argparse.Namespace, model: Path) -> dict[str, object]:
    data = options.work / f"data_{task.name}"
    table = str(options.data / task.dataset)
    shutil.rmtree(data, ignore_errors=True)
    run_finesight("import", table, str(data), *task.import_args, "--train-fraction", "0.9")
    run = options.work / f"run_{task.name}"
    words = [
        "train",
        str(RECIPES_DIR / task.recipe),
        f"model={model}",
        f"data.train={data / 'train.jsonl'}",
        f"data.eval={data / 'eval.jsonl'}",
        f"output_dir={run}",
        f"train.steps={options.steps}",
        "train.epochs=null",
        f"train.save_every={options.steps}",
        "train.keep_checkpoints=1",
        "eval.limit=8",
        "eval.every=null",
        "eval.max_new_tokens=32",
        "track=[]",
        *task.overrides,
        *options.set,
    ]
    stop_resume = run_stop_and_resume(words, run, options.steps // 2)
    at = stop_resume.stopped_after_step
    steps = read_step_records(run)
    # Exclude warmup steps of both processes.
    warm = [s for s in steps if s["step"] not in (1, 2, 3) and s["step"] - at not in (1, 2, 3)]
    losses = [step["loss"] for step in steps]
    scores = run_finesight("eval", str(run), "--limit", "8", "--max-new-tokens", "32", "--json")
    result = {
        "task": task.name,
        "steps": len(steps),
        "samples_per_step": steps[0]["num_samples"],
        "tokens_per_step": [
            min(s["num_tokens"] for s in steps),
            max(s["num_tokens"] for s in steps),
        ],
        "samples_per_s": round(statistics.median(s["samples_per_s"] for s in warm), 1),
        "slowest_and_fastest": [
            round(pick(s["samples_per_s"] for s in warm), 1) for pick in (min, max)
        ],
        "mean_loss_of_first_5": round(statistics.mean(losses[:5]), 4),
        "mean_loss_of_last_5": round(statistics.mean(losses[-5:]), 4),
        "peak_gb": max(step["peak_memory_gb"] for step in steps),
        "mfu": round(statistics.median(step["mfu"] for step in warm), 3),
        "waiting_share": round(
            sum(s["data_wait_s"] for s in warm) / sum(s["step_s"] for s in warm), 3
        ),
        "eval": json.loads(scores.stdout.strip().splitlines()[-1]),
        **asdict(stop_resume),
    }
    shutil.rmtree(run)
    return result


def run_baseline(script: Path) -> dict[str, object]:
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
    chosen = [t for t in RECIPE_TASKS if not options.only or t.name in options.only.split(",")]
    results: list[dict[str, object]] = []
    if options.baseline:
        results.append({"task": "baseline", **run_baseline(options.baseline)})
    for index, task in enumerate(chosen):
        model = options.model_folder or options.work / task.model
        if not model.exists():
            write_random_weights(options.configs / task.model, model)
            torch.cuda.empty_cache()
        results.append(run_recipe(task, options, model))
        report["results"] = results
        options.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
        print(json.dumps({k: v for k, v in results[-1].items() if k != "last_lines"}), flush=True)
        if not options.model_folder and task.model not in {
            later.model for later in chosen[index + 1 :]
        }:
            shutil.rmtree(model)


if __name__ == "__main__":
    main()
