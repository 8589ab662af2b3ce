"""Measure how cost scales with dataset size, sample length and run length.

    python benchmarks/cost_scaling.py CONFIG --work DIR --out FILE [--samples 100,1000,10000,100000]
        [--tokens 256,1024,4096,16384] [--batch 16] [--steps 200] [--long-steps 200] [--side 280]

CONFIG is a folder of configuration and tokenizer files. Missing weights are initialized randomly.
Three series of `finesight train` runs use LoRA on the decoder in bf16:

- datasets of different sizes with repeated images: samples/s over the second half of the steps,
  without vision cache, and the startup time, which reads all image headers;
- samples of different lengths, one image and text: tokens/s, attention share of FLOPs, and MFU,
  which should be constant;
- one run of --long-steps steps: peak memory after each tenth.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from competitors.job import CompetitorJob
from peer_data import ensure_weights, measure_sample_costs, write_caption_dataset
from peer_metrics import WARMUP_STEPS, lora_settings, recipe_overrides, report_header
from subprocess_timer import run_timed

from finesight.samples.corpus import load_corpus
from finesight.samples.sample import sample_to_dict
from finesight.settings.config import TrainFileSettings

LIMIT_S = 540.0
LONG_SAMPLES = 16
"""Samples of a dataset with long samples."""

ResultRow = dict[str, Any]


def repeat_dataset(source: Path, target: Path, num_samples: int) -> Path:
    """Repeat the samples of `source` with unique ids."""
    samples = list(load_corpus((TrainFileSettings(path=source),)).read_samples())
    rows = []
    for number in range(num_samples):
        row = sample_to_dict(samples[number % len(samples)].sample)
        rows.append(row | {"id": f"sample-{number}"})
    return _write_dataset(rows, source, target)


def extend_prompts(
    source: Path, target: Path, max_tokens: int, longest_sample: Callable[[Path], int]
) -> Path:
    """Extend the questions of a few samples to at most `max_tokens` tokens per sample.

    `longest_sample` returns the tokens of the longest sample of a table.
    """
    samples = list(load_corpus((TrainFileSettings(path=source),)).read_samples())[:LONG_SAMPLES]

    def write_extended(num_words: int) -> Path:
        rows = []
        for one in samples:
            row = sample_to_dict(one.sample)
            row["messages"][0]["content"].append({"type": "text", "text": " and" * num_words})
            rows.append(row)
        return _write_dataset(rows, source, target)

    min_tokens, more = longest_sample(write_extended(0)), longest_sample(write_extended(100))
    if min_tokens > max_tokens:
        raise SystemExit(f"--tokens {max_tokens}: images and questions alone have {min_tokens}")
    return write_extended(int((max_tokens - min_tokens) * 100 / (more - min_tokens)))


def _write_dataset(rows: list[ResultRow], source: Path, target: Path) -> Path:
    """Write the rows next to the source table, so that relative image paths stay valid."""
    path = source.with_name(target.name)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")
    return path


class RunSeries:
    """Runs that differ only in data and steps."""

    def __init__(self, options: argparse.Namespace, model: Path) -> None:
        self._options, self._model = options, model

    def train(
        self, data: Path, num_steps: int, batch_size: int, *overrides: str
    ) -> list[ResultRow]:
        """Train and return the lines of metrics.jsonl."""
        run, file = self._options.work / "run", self._options.work / "recipe.yaml"
        shutil.rmtree(run, ignore_errors=True)
        file.write_text("{}\n", encoding="utf-8")
        job = CompetitorJob(
            model=str(self._model),
            dataset="",
            output_dir=str(run),
            batch_size=batch_size,
            num_steps=num_steps,
            time_limit_s=LIMIT_S,
            max_pack_tokens=0,
            num_workers=0,
        )
        words = [*recipe_overrides(job, data, self._options.side), "train.save_every=0", *overrides]
        command = [sys.executable, "-m", "finesight", "train", str(file), *words]
        command_log = run_timed(command, {}, LIMIT_S)
        if command_log.exit_code:
            raise SystemExit(
                f"{data.name}: exit {command_log.exit_code}\n{command_log.last_lines()}"
            )
        return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def median_step_value(lines: list[ResultRow], key: str) -> float:
    """Return the median of a metric over the steps after warmup."""
    steps = [line for line in lines if "loss" in line]
    return statistics.median(line[key] for line in steps[WARMUP_STEPS:] or steps)


def main() -> None:
    """Run the benchmark and write the results."""
    int_list = {"type": lambda text: [int(number) for number in text.split(",")]}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--samples", default=[100, 1000, 10_000, 100_000], **int_list)
    parser.add_argument("--tokens", default=[256, 1024, 4096, 16_384], **int_list)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--long-steps", type=int, default=200)
    parser.add_argument("--side", type=int, default=280)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    source = write_caption_dataset(options.work / "data")
    model = ensure_weights(options.config, options.work / "model")
    runs = RunSeries(options, model)
    report: ResultRow = report_header("cost_scaling.py", options.config) | {
        "samples": [],
        "tokens": [],
        "memory": {},
    }

    def add_result(section: str, row: ResultRow) -> None:
        report[section].append(row)
        print(section, json.dumps(row), flush=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    for samples in options.samples:
        data = repeat_dataset(source, options.work / "repeated.jsonl", samples)
        lines = runs.train(data, options.steps, options.batch, "train.vision_cache=never")
        steps = [line for line in lines if "loss" in line]
        second_half = steps[len(steps) // 2 :]
        speed = sum(s["num_samples"] for s in second_half) / sum(s["step_s"] for s in second_half)
        setup_s = lines[0]["setup_s"]
        add_result(
            "samples",
            {"samples": samples, "samples_per_s": round(speed, 2), "setup_s": round(setup_s, 2)},
        )
    for tokens in options.tokens:

        def max_sample_tokens(path: Path) -> int:
            return measure_sample_costs(model, path, options.side, lora_settings()).max_tokens

        data = extend_prompts(source, options.work / "long.jsonl", tokens, max_sample_tokens)
        sample_costs = measure_sample_costs(model, data, options.side, lora_settings())
        limits = ("data.max_length=32768", f"train.pack_tokens={max(16_384, tokens)}")
        batch_size = max(1, options.batch * min(options.tokens) // tokens)
        lines = runs.train(data, options.steps // 4, batch_size, *limits)
        row = {"tokens": round(sample_costs.num_tokens), "batch": batch_size}
        row |= {"tokens_per_s": round(median_step_value(lines, "tokens_per_s"))}
        row |= {"attention": round(sample_costs.attention_flops / sample_costs.flops, 4)}
        add_result("tokens", row | {"mfu": round(median_step_value(lines, "mfu"), 4)})
    data = repeat_dataset(
        source, options.work / "repeated.jsonl", options.long_steps * options.batch
    )
    steps = [line for line in runs.train(data, options.long_steps, options.batch) if "loss" in line]
    tenth = max(1, len(steps) // 10)
    report["memory"] = {"gb": [line["peak_memory_gb"] for line in steps[tenth - 1 :: tenth]]}
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print("memory", json.dumps(report["memory"]))


if __name__ == "__main__":
    main()
