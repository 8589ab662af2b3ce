"""How many tokens a second a model says, one answer at a time and many together.

    python benchmarks/generation_speed.py FOLDER... [--answers 1,32] [--tokens 1792] [--out FILE]

FOLDER holds a config.json; the weights are drawn at random, which takes the same time. Each prompt
is a picture of 256 tokens between two; so the published speed of the first Qwen-VL was measured,
with 1,792 tokens said. Measured twice each, after a warm-up: with steps recorded as CUDA graphs,
and launched one by one. Prints a line of JSON for each measurement: tokens a second over all
answers without the prompt, milliseconds a step, the prompt's milliseconds, peak memory in GB.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from finesight.encode.encoded import Encoded, Outline, Span
from finesight.encode.positions import rope_positions
from finesight.hub import ModelFolder
from finesight.infer.engine import PAGE, Engine
from finesight.infer.request import Request
from finesight.model.network import VisionLanguageModel
from finesight.model.weights import random_model

SIDE = 16
"""Tokens of the picture along each side."""


def prompt_of(model: VisionLanguageModel, words: int = 2, seed: int = 0) -> Encoded:
    """A picture of SIDE x SIDE tokens between two tokens of text."""
    vision = model.geometry.vision
    rng = np.random.default_rng(seed)
    grid = (1, SIDE * vision.merge, SIDE * vision.merge)
    tokens = SIDE**2 + words
    size = (grid[1] * vision.patch, grid[2] * vision.patch)
    span = Span("image", 1, 1 + SIDE**2, grid, (Path("picture"),), size, size)
    positions = rope_positions(tokens, [span], [np.zeros(1, np.int64)], vision.merge)
    ids = rng.integers(0, 1000, tokens).astype(np.int32)
    outline = Outline("prompt", ids, np.zeros(tokens, np.bool_), positions, (span,))
    patches = rng.integers(0, 256, (grid[1] * grid[2], vision.patch_numbers), dtype=np.uint8)
    return Encoded(outline, patches)


def measure(
    model: VisionLanguageModel, answers: int, tokens: int, recorded: bool
) -> dict[str, float]:
    """One generation of `tokens` tokens a row, whatever they say."""
    torch.cuda.reset_peak_memory_stats()
    prompts = [prompt_of(model, seed=number) for number in range(answers)]
    room = answers * (prompts[0].outline.tokens + tokens + PAGE)
    torch.cuda.synchronize()
    start = time.perf_counter()
    engine = Engine(model, (), rows=answers, tokens=room, record=recorded)
    for prompt in prompts:
        engine.add(Request(prompt=prompt, max_new_tokens=tokens))
    begun: set[int] = set()
    while len(begun) < answers:
        begun |= {event.ticket for event in engine.step() if event.token is not None}
    torch.cuda.synchronize()
    filled, left = time.perf_counter(), 0
    while engine.busy:
        left += sum(event.token is not None for event in engine.step())
    torch.cuda.synchronize()
    seconds = time.perf_counter() - filled
    return {
        "tokens_per_second": round(left / seconds, 1),
        "ms_per_step": round(1e3 * seconds * answers / left, 2),
        "prompt_ms": round(1e3 * (filled - start), 1),
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--answers", default="1,32")
    parser.add_argument("--tokens", type=int, default=1792)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    device = torch.device("cuda")
    for folder in options.folders:
        files = ModelFolder(folder)
        model = random_model(files.config, 0, torch.bfloat16, device, files.preprocessor).eval()
        parameters = sum(p.numel() for p in model.parameters())
        for answers in map(int, options.answers.split(",")):
            measure(model, answers, 8, recorded=True)
            for recorded in (True, False):
                found: dict[str, Any] = {
                    "model": folder.name,
                    "parameters": parameters,
                    "answers": answers,
                    "tokens": options.tokens,
                    "recorded": recorded,
                    **measure(model, answers, options.tokens, recorded),
                    "torch": torch.__version__,
                    "card": torch.cuda.get_device_name(),
                }
                print(json.dumps(found), flush=True)
                if options.out is not None:
                    with options.out.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(found) + "\n")
        del model
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
