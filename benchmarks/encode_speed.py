"""How fast samples become tokens and patches, without a model's weights. Prints one JSON object.

    python benchmarks/encode_speed.py MODEL_FOLDER DATA.jsonl... [--samples 10000] [--workers 2]

Samples are those of the files, one after the other, over and over until there are enough; each
time over, the answers get a number, so that no text was ever tokenised before.
`outline` reads the pictures' headers and makes tokens; `encode` also decodes and cuts pictures.
Each worker is a process with one thread; `outline_alone` is one process without workers.
`cpu_ms` is the processor's time for a sample, which other programs on the machine do not swell.
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

from finesight.data.jsonl import Located, read_samples
from finesight.data.sample import TextPart
from finesight.encode.lengths import usable
from finesight.encode.render import Renderer
from finesight.hub import locate

Counts = tuple[int, int, int]
"""Samples, tokens, patches."""

Task = Callable[[Renderer, list[Located]], Counts]


def outline_all(renderer: Renderer, samples: list[Located]) -> Counts:
    """Make every outline and count."""
    outlines = [renderer.outline(located) for located in samples]
    return len(outlines), sum(one.tokens for one in outlines), sum(one.patches for one in outlines)


def encode_all(renderer: Renderer, samples: list[Located]) -> Counts:
    """Encode every sample with its patches, keep none, and count."""
    tokens = patches = 0
    for located in samples:
        encoded = renderer.encode(located)
        tokens += encoded.outline.tokens
        patches += len(encoded.patches_ND)
    return len(samples), tokens, patches


def numbered(located: Located, number: int) -> Located:
    """The same sample with a number after its last answer."""
    *before, last = located.sample.messages
    told = last.model_copy(update={"content": (*last.content, TextPart(text=f" {number}"))})
    sample = located.sample.model_copy(update={"messages": (*before, told)})
    return Located(sample, located.folder)


def clocked(task: Task, renderer: Renderer, samples: list[Located]) -> tuple[Counts, float]:
    """A task's counts and the seconds of processor time it took."""
    start = time.process_time()
    counts = task(renderer, samples)
    return counts, time.process_time() - start


def timed(task: Task, renderer: Renderer, samples: list[Located], workers: int) -> dict[str, float]:
    """Wall seconds of a task over all samples, shared out to worker processes (0: none)."""
    start = time.perf_counter()
    if not workers:
        measured = [clocked(task, renderer, samples)]
    else:
        shares = [samples[worker::workers] for worker in range(workers)]
        with ProcessPoolExecutor(workers) as pool:
            tasks, renderers = [task] * workers, [renderer] * workers
            measured = list(pool.map(clocked, tasks, renderers, shares))
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
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("data", nargs="+", type=Path)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--max-length", type=int, default=8192)
    chosen = parser.parse_args()
    renderer = Renderer(locate(chosen.model))
    corpus = [Located(one, path.parent) for path in chosen.data for one in read_samples(path)]
    found = usable(map(renderer.outline, corpus), chosen.max_length, "drop")
    renderer = Renderer(locate(chosen.model))
    samples = [
        numbered(corpus[number % len(corpus)], number // len(corpus))
        for number in range(chosen.samples)
    ]
    result = {
        "model": Path(chosen.model).name,
        "data": {
            "samples": len(corpus),
            "usable": len(found.kept),
            "too_long": len(found.too_long),
            "without_answer": len(found.without_answer),
        },
        "outline_alone": timed(outline_all, renderer, samples, 0),
        "outline": timed(outline_all, renderer, samples, chosen.workers),
        "encode": timed(encode_all, renderer, samples, chosen.workers),
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
