"""Does cost grow straight: with the number of samples, with their length, and over time?

    python benchmarks/growth.py CONFIG --work DIR --out FILE [--samples 100,1000,10000,100000]
        [--tokens 256,1024,4096,16384] [--batch 16] [--steps 200] [--long 200] [--side 280]

CONFIG is a folder of configuration and tokenizer files; where it has no weights, random ones are
drawn. Three series of real `finesight train` runs, LoRA on the language model in bf16:

- corpora of so many samples, whose pictures repeat by path: samples/s over the second half of as
  many steps, each picture looked at in every one, and apart from it the start, where every header
  is read;
- samples of so many tokens, one picture and the rest words: tokens/s, the share that attention
  has of the operations, and the share of peak, which should not change;
- one run of --long steps: the peak of memory after each tenth of it.
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

from contestants.job import Job
from peer_data import count, draw, random_weights
from peer_figures import WARM, head, lora, recipe
from stopwatch import watch

from finesight.config import DataFile
from finesight.data.jsonl import as_record
from finesight.data.sources import load_sources

LIMIT_S = 540.0
LONG = 16
"""Samples of a corpus of long ones."""

Row = dict[str, Any]


def repeated(source: Path, target: Path, samples: int) -> Path:
    """The samples of `source` over and over, under names of their own, until there are enough."""
    located = list(load_sources((DataFile(path=source),)).read())
    rows = []
    for number in range(samples):
        row = as_record(located[number % len(located)].sample)
        rows.append(row | {"id": f"sample-{number}"})
    return _write(rows, source, target)


def lengthened(source: Path, target: Path, tokens: int, length: Callable[[Path], int]) -> Path:
    """A few samples of `source` with their questions made longer, to about so many tokens each:
    never more. `length` tells the tokens of the longest sample of a table."""
    located = list(load_sources((DataFile(path=source),)).read())[:LONG]

    def with_words(words: int) -> Path:
        rows = []
        for one in located:
            row = as_record(one.sample)
            row["messages"][0]["content"].append({"type": "text", "text": " and" * words})
            rows.append(row)
        return _write(rows, source, target)

    short, more = length(with_words(0)), length(with_words(100))
    if short > tokens:
        raise SystemExit(f"--tokens {tokens}: the pictures and questions alone have {short}")
    return with_words(int((tokens - short) * 100 / (more - short)))


def _write(rows: list[Row], source: Path, target: Path) -> Path:
    """The rows as a table beside its source, which the pictures' paths are relative to."""
    path = source.with_name(target.name)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")
    return path


class Runs:
    """Runs that differ in data and steps alone."""

    def __init__(self, options: argparse.Namespace, model: Path) -> None:
        self._options, self._model = options, model

    def one(self, data: Path, steps: int, batch: int, *more: str) -> list[Row]:
        """The lines of a run's record."""
        run, file = self._options.work / "run", self._options.work / "recipe.yaml"
        shutil.rmtree(run, ignore_errors=True)
        file.write_text("{}\n", encoding="utf-8")
        job = Job(
            model=str(self._model),
            table="",
            target=str(run),
            batch=batch,
            steps=steps,
            seconds=LIMIT_S,
            pack_tokens=0,
            workers=0,
        )
        words = [*recipe(job, data, self._options.side), "train.save_every=0", *more]
        command = [sys.executable, "-m", "finesight", "train", str(file), *words]
        watched = watch(command, {}, LIMIT_S)
        if watched.code:
            raise SystemExit(f"{data.name}: exit {watched.code}\n{watched.last_words()}")
        return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def middle(lines: list[Row], name: str) -> float:
    """The median of a figure over the steps after those that warm up."""
    steps = [line for line in lines if "loss" in line]
    return statistics.median(line[name] for line in steps[WARM:] or steps)


def main() -> None:
    """Measure and write."""
    numbers = {"type": lambda text: [int(number) for number in text.split(",")]}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--samples", default=[100, 1000, 10_000, 100_000], **numbers)
    parser.add_argument("--tokens", default=[256, 1024, 4096, 16_384], **numbers)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--long", type=int, default=200)
    parser.add_argument("--side", type=int, default=280)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    source = draw(options.work / "data")
    model = random_weights(options.config, options.work / "model")
    runs = Runs(options, model)
    report: Row = head("growth.py", options.config) | {"samples": [], "tokens": [], "memory": {}}

    def note(part: str, row: Row) -> None:
        report[part].append(row)
        print(part, json.dumps(row), flush=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    for samples in options.samples:
        data = repeated(source, options.work / "repeated.jsonl", samples)
        lines = runs.one(data, options.steps, options.batch, "train.cache=never")
        steps = [line for line in lines if "loss" in line]
        later = steps[len(steps) // 2 :]
        speed = sum(s["samples"] for s in later) / sum(s["seconds"] for s in later)
        prepared = lines[0]["prepared_s"]
        note(
            "samples",
            {"samples": samples, "samples_per_s": round(speed, 2), "start_s": round(prepared, 2)},
        )
    for tokens in options.tokens:

        def longest(path: Path) -> int:
            return count(model, path, options.side, lora()).longest

        data = lengthened(source, options.work / "long.jsonl", tokens, longest)
        counted = count(model, data, options.side, lora())
        limits = ("data.max_length=32768", f"train.pack_tokens={max(16_384, tokens)}")
        together = max(1, options.batch * min(options.tokens) // tokens)
        lines = runs.one(data, options.steps // 4, together, *limits)
        row = {"tokens": round(counted.tokens), "batch": together}
        row |= {"tokens_per_s": round(middle(lines, "tokens_per_s"))}
        row |= {"attention": round(counted.attention / counted.operations, 4)}
        note("tokens", row | {"share_of_peak": round(middle(lines, "utilisation"), 4)})
    data = repeated(source, options.work / "repeated.jsonl", options.long * options.batch)
    steps = [line for line in runs.one(data, options.long, options.batch) if "loss" in line]
    tenth = max(1, len(steps) // 10)
    report["memory"] = {"gb": [line["memory_gb"] for line in steps[tenth - 1 :: tenth]]}
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print("memory", json.dumps(report["memory"]))


if __name__ == "__main__":
    main()
