"""Measure decoding speed for one sequence and for batches.

    python benchmarks/generation_speed.py FOLDER... [--answers 1,32] [--tokens 1792] [--out FILE]

FOLDER contains config.json; weights are random, which does not change the time. Each prompt is an
image of 256 tokens between two text tokens, as in the published measurement of Qwen-VL with 1,792
generated tokens. Each case runs twice after warmup: with CUDA graphs and without. Prints one line
of JSON per measurement: tokens/s without the prompt, ms per step, prompt ms, peak memory in GB.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "pretraining"))

import numpy as np
import torch
from random_model import init_random_model

from finesight.encode.renderer import compute_position_ids
from finesight.encode.tokenization import EncodedSample, TokenizedSample, VisualSpan
from finesight.infer.engine import GPU_BLOCK_SIZE, Engine
from finesight.infer.request import GenerationRequest
from finesight.model.vlm import VisionLanguageModel
from finesight.model_folder import ModelFolder

IMAGE_SIDE_TOKENS = 16
"""Image tokens per side."""


def make_prompt(
    model: VisionLanguageModel, num_text_tokens: int = 2, seed: int = 0
) -> EncodedSample:
    """Make a prompt with an image of SIDE x SIDE tokens between two text tokens."""
    vision = model.config.vision
    rng = np.random.default_rng(seed)
    grid = (1, IMAGE_SIDE_TOKENS * vision.merge_size, IMAGE_SIDE_TOKENS * vision.merge_size)
    tokens = IMAGE_SIDE_TOKENS**2 + num_text_tokens
    size = (grid[1] * vision.patch_size, grid[2] * vision.patch_size)
    span = VisualSpan("image", 1, 1 + IMAGE_SIDE_TOKENS**2, grid, (Path("image"),), size, size)
    positions = compute_position_ids(tokens, [span], [np.zeros(1, np.int64)], vision.merge_size)
    ids = rng.integers(0, 1000, tokens).astype(np.int32)
    outline = TokenizedSample("prompt", ids, np.zeros(tokens, np.bool_), positions, (span,))
    patches = rng.integers(0, 256, (grid[1] * grid[2], vision.patch_dim), dtype=np.uint8)
    return EncodedSample(outline, patches)


def measure_generation(
    model: VisionLanguageModel, num_requests: int, max_new_tokens: int, use_cuda_graphs: bool
) -> dict[str, float]:
    """Measure one generation of `max_new_tokens` tokens per sequence."""
    torch.cuda.reset_peak_memory_stats()
    prompts = [make_prompt(model, seed=number) for number in range(num_requests)]
    cache_tokens = num_requests * (
        prompts[0].tokenized.num_tokens + max_new_tokens + GPU_BLOCK_SIZE
    )
    torch.cuda.synchronize()
    start = time.perf_counter()
    engine = Engine(
        model,
        (),
        max_num_seqs=num_requests,
        num_cache_tokens=cache_tokens,
        use_cuda_graphs=use_cuda_graphs,
    )
    for prompt in prompts:
        engine.add_request(GenerationRequest(prompt=prompt, max_new_tokens=max_new_tokens))
    started_ids: set[int] = set()
    while len(started_ids) < num_requests:
        started_ids |= {event.request_id for event in engine.step() if event.token is not None}
    torch.cuda.synchronize()
    filled, left = time.perf_counter(), 0
    while engine.has_work:
        left += sum(event.token is not None for event in engine.step())
    torch.cuda.synchronize()
    seconds = time.perf_counter() - filled
    return {
        "tokens_per_second": round(left / seconds, 1),
        "ms_per_step": round(1e3 * seconds * num_requests / left, 2),
        "prompt_ms": round(1e3 * (filled - start), 1),
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--answers", default="1,32")
    parser.add_argument("--tokens", type=int, default=1792)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    device = torch.device("cuda")
    for folder in options.folders:
        files = ModelFolder(folder)
        model = init_random_model(
            files.config, 0, torch.bfloat16, device, files.preprocessor_config
        ).eval()
        parameters = sum(p.numel() for p in model.parameters())
        for answers in map(int, options.answers.split(",")):
            measure_generation(model, answers, 8, use_cuda_graphs=True)
            for use_cuda_graphs in (True, False):
                found: dict[str, Any] = {
                    "model": folder.name,
                    "parameters": parameters,
                    "answers": answers,
                    "tokens": options.tokens,
                    "cuda_graphs": use_cuda_graphs,
                    **measure_generation(model, answers, options.tokens, use_cuda_graphs),
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
