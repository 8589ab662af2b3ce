"""Measure tokenization and image encoding speed without model weights.

    python benchmarks/encode_speed.py MODEL_FOLDER DATA.jsonl... [--samples 10000] [--workers 2]

The samples of the files are repeated. Each repetition appends a number to the answers, so that no
text is tokenized twice. `tokenize` reads image headers and tokenizes texts; `encode` also decodes
images and extracts patches. Each worker is a process with one thread; `tokenize_single_process`
uses no workers. `cpu_ms` is the CPU time per sample, independent of other programs. Prints one JSON
object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy
import PIL
import tokenizers

from finesight.encode.renderer import NativeRenderer
from finesight.encode.tokenization import find_sample_error
from finesight.model_folder import locate_model
from finesight.samples.sample import LocatedSample, TextPart, read_samples

EncodeCounts = tuple[int, int, int]
"""Numbers of samples, tokens and patches."""

EncodeTask = Callable[[NativeRenderer, list[LocatedSample]], EncodeCounts]


def tokenize_all(renderer: NativeRenderer, samples: list[LocatedSample]) -> EncodeCounts:
    """Tokenize all samples and count."""
    outlines = [renderer.tokenize(located_sample) for located_sample in samples]
    return (
        len(outlines),
        sum(one.num_tokens for one in outlines),
        sum(one.num_patches for one in outlines),
    )


def encode_all(renderer: NativeRenderer, samples: list[LocatedSample]) -> EncodeCounts:
    """Encode all samples with patches, discard them, and count."""
    tokens = patches = 0
    for located_sample in samples:
        encoded = renderer.encode(located_sample)
        tokens += encoded.tokenized.num_tokens
        patches += len(encoded.patches_ND)
    return len(samples), tokens, patches


def number_answer(located_sample: LocatedSample, number: int) -> LocatedSample:
    """Append a number to the last answer of a sample."""
    *before, last = located_sample.sample.messages
    numbered_message = last.model_copy(
        update={"content": (*last.content, TextPart(text=f" {number}"))}
    )
    sample = located_sample.sample.model_copy(update={"messages": (*before, numbered_message)})
    return LocatedSample(sample, located_sample.folder)


def run_with_cpu_time(
    task: EncodeTask, renderer: NativeRenderer, samples: list[LocatedSample]
) -> tuple[EncodeCounts, float]:
    """Run a task and return its counts and CPU seconds."""
    start = time.process_time()
    counts = task(renderer, samples)
    return counts, time.process_time() - start


def measure_wall_time(
    task: EncodeTask, renderer: NativeRenderer, samples: list[LocatedSample], num_workers: int
) -> dict[str, float]:
    """Measure the wall time of a task, distributed to worker processes (0: none)."""
    start = time.perf_counter()
    if not num_workers:
        measured = [run_with_cpu_time(task, renderer, samples)]
    else:
        shares = [samples[worker::num_workers] for worker in range(num_workers)]
        with ProcessPoolExecutor(num_workers) as pool:
            tasks, renderers = [task] * num_workers, [renderer] * num_workers
            measured = list(pool.map(run_with_cpu_time, tasks, renderers, shares))
    seconds = time.perf_counter() - start
    columns = zip(*(counts for counts, _ in measured), strict=True)
    done, tokens, patches = (sum(column) for column in columns)
    return {
        "samples": done,
        "tokens": tokens,
        "patches": patches,
        "seconds": round(seconds, 2),
        "samples_per_second": round(done / seconds, 1),
        "cpu_ms": round(1000 * sum(cpu for _, cpu in measured) / done, 3),
    }


def main() -> None:
    """Run the benchmark and print the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("data", nargs="+", type=Path)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--max-length", type=int, default=8192)
    chosen = parser.parse_args()
    renderer = NativeRenderer(locate_model(chosen.model))
    corpus = [LocatedSample(one, path.parent) for path in chosen.data for one in read_samples(path)]
    tokenized = map(renderer.tokenize, corpus)
    errors = [find_sample_error(one, chosen.max_length) for one in tokenized]
    num_unsupervised = sum(one is not None and "supervised" in one.what for one in errors)
    renderer = NativeRenderer(locate_model(chosen.model))
    samples = [
        number_answer(corpus[number % len(corpus)], number // len(corpus))
        for number in range(chosen.samples)
    ]
    result = {
        "model": Path(chosen.model).name,
        "data": {
            "samples": len(corpus),
            "usable": errors.count(None),
            "too_long": len(errors) - errors.count(None) - num_unsupervised,
            "unsupervised": num_unsupervised,
        },
        "tokenize_single_process": measure_wall_time(tokenize_all, renderer, samples, 0),
        "tokenize": measure_wall_time(tokenize_all, renderer, samples, chosen.workers),
        "encode": measure_wall_time(encode_all, renderer, samples, chosen.workers),
        "workers": chosen.workers,
        "cores": os.cpu_count(),
        "versions": {
            "python": platform.python_version(),
            "numpy": numpy.__version__,
            "pillow": PIL.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
