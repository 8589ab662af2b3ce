"""Measure GRPO on one GPU: responses per second, shares of the phases, and memory.

    python benchmarks/grpo_speed.py CONFIGS --work DIR --out FILE [--only "NAME;..."] [--steps 6]
        [--gpus 2]

CONFIGS contains folders of configuration and tokenizer files, such as Qwen2.5-VL-7B-Instruct.
Weights are random, so that responses have the full length. Each run is `finesight train` with LoRA
of rank 16 on images of 896 x 896 pixels (1,024 tokens) and 8 responses for each prompt; the reward
is a function in a file that draws a number from the answer. Times are medians of the steps after
the first two, which compile kernels; `gb` is the peak allocated memory in GB (10^9 bytes).
`difference` compares the log-probabilities of sampler and trainer. Each of several GPUs gets the
prompts of the case.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peer_data import ensure_weights, write_caption_dataset
from peer_metrics import report_header, run_recipe

IMAGE_SIDE, NUM_RESPONSES, RANK, WARMUP_STEPS, LIMIT_S = 896, 8, 16, 2, 300.0
REWARD = """
import zlib


def draw(case):
    return zlib.crc32(case.answer.encode()) % 1000 / 1000
"""


@dataclass(frozen=True)
class GrpoCase:
    """A run: model, prompts of a step, and tokens of a response."""

    name: str
    model: str
    num_prompts: int
    num_tokens: int


MODEL_3B, MODEL_7B, MODEL_4B = "Qwen2.5-VL-3B-Instruct", "Qwen2.5-VL-7B-Instruct", "Qwen3.5-4B"
CASES = (
    GrpoCase("7B, 256 tokens", MODEL_7B, 32, 256),
    GrpoCase("7B, 512 tokens", MODEL_7B, 32, 512),
    GrpoCase("7B, 4 prompts", MODEL_7B, 4, 256),
    GrpoCase("3B, 4 prompts", MODEL_3B, 4, 256),
    GrpoCase("Qwen3.5-4B, 256 tokens", MODEL_4B, 32, 256),
)


def run_case(case: GrpoCase, model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Run one case and return speed, shares and memory."""
    work = options.work
    data = write_caption_dataset(work / "data")
    (work / "reward.py").write_text(REWARD, encoding="utf-8")
    words = [
        f"model={model}",
        f"data.train={data}",
        f"image={{height: {IMAGE_SIDE}, width: {IMAGE_SIDE}}}",
        f"tune.lora={{rank: {RANK}, alpha: {2 * RANK}}}",
        "train.objective=grpo",
        f"train.batch_size={case.num_prompts * options.gpus}",
        f"train.steps={options.steps}",
        "train.learning_rate=1e-5",
        "train.precision=bf16",
        "train.save_every=0",
        "train.pack_tokens=8192",
        f"train.grpo.num_generations={NUM_RESPONSES}",
        f"train.grpo.max_completion_length={case.num_tokens}",
        f"rewards=[{work / 'reward.py'}:draw]",
    ]
    watched, steps = run_recipe(words, work / "run", LIMIT_S, options.gpus)
    if not steps:
        return {"case": case.name, "failed": watched.last_lines()}
    medians = {
        name: statistics.median(step[name] for step in steps[WARMUP_STEPS:] or steps)
        for name in ("step_s", "rollout_s", "reward_s")
    }
    seconds = medians["step_s"]
    return {
        "case": case.name,
        "gpus": options.gpus,
        "prompts": case.num_prompts * options.gpus,
        "responses_per_s": round(case.num_prompts * options.gpus * NUM_RESPONSES / seconds, 2),
        **{name: round(value, 3) for name, value in medians.items()},
        "update_s": round(seconds - medians["rollout_s"] - medians["reward_s"], 3),
        "mean_length": steps[-1]["completions/mean_length"],
        "difference": max(s["sampling/sampling_logp_difference/mean"] for s in steps),
        "gb": round(max(step["peak_memory_gb"] for step in steps), 2),
        "step_seconds": [round(step["step_s"], 2) for step in steps],
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
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--gpus", type=int, default=1)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    chosen = [case for case in CASES if not options.only or case.name in options.only]
    report: dict[str, Any] = report_header("grpo_speed.py", options.configs)
    report |= {"task": {"rank": RANK, "responses": NUM_RESPONSES}, "results": []}
    for name in dict.fromkeys(case.model for case in chosen):
        folder = options.work / "model"
        shutil.rmtree(folder, ignore_errors=True)
        model = ensure_weights(options.configs / name, folder)
        for case in chosen:
            if case.model == name:
                report["results"].append(run_case(case, model, options))
                options.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
                print(json.dumps(report["results"][-1])[:900], flush=True)


if __name__ == "__main__":
    main()
