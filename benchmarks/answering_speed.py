"""How quickly a model answers: alone and many at once, with the time to the first token and memory.

    python benchmarks/answering_speed.py FOLDER... [--together 64] [--rank 64] [--peer] [--out F]

FOLDER holds a model's configuration and tokenizer; the weights are drawn at random, which takes the
same time, and nothing ends an answer. A question is a generated photograph of 1,000 tokens, read
from its file, and a line of text. Alone: time to the first token from the file on, then tokens a
second. Together: tokens a second of all rows while they grow, and of the whole, files included.
`--rank` measures alone once more with an adapter of that rank on every layer, not merged;
`--weights` in each of these kinds, as bf16,nf4,int4.
`--peer` measures transformers beside it, in the same process: `generate` with a static cache, which
it compiles, from encoded pictures. Prints a line of JSON for each model.
"""

from __future__ import annotations

import argparse
import gc
import io
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from finesight.encode.encoded import Encoded
from finesight.encode.render import Renderer
from finesight.hub import ModelFolder
from finesight.infer.engine import Engine
from finesight.infer.request import Request
from finesight.model.bank import Bank
from finesight.model.few_bits import KINDS
from finesight.model.linear import GroupedLinear
from finesight.model.lora import LoraGroup, LowRank
from finesight.model.network import VisionLanguageModel
from finesight.model.weights import random_model

TEXT = "Describe the picture in detail."
SIDES = (40, 25)
"""Tokens of the picture along its width and height."""


def photograph(path: Path, factor: int, seed: int) -> Path:
    """A JPEG whose tokens are as many as SIDES say."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (SIDES[1], SIDES[0], 3), dtype=np.uint8)
    size = (SIDES[0] * factor, SIDES[1] * factor)
    image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=90)
    path.write_bytes(buffer.getvalue())
    return path


class Bench:
    """A model with random weights, and photographs that it has never seen."""

    def __init__(self, folder: ModelFolder, model: VisionLanguageModel, scratch: Path) -> None:
        self.model, self.renderer, self._scratch = model, Renderer(folder), scratch
        self._number = 0
        self.adapter: int | None = None

    def adapt(self, rank: int) -> None:
        """Give every linear layer of the decoder an adapter, and ask with it from now on."""
        bank = Bank(self.model)
        self.model.requires_grad_(False)
        for path, group in list(self.model.named_modules()):
            if isinstance(group, GroupedLinear) and path.startswith("model.layers"):
                layers = {name: LowRank(rank, rank / 4) for name in group.outputs}
                group.adapter = LoraGroup(group, layers, 0.0)
                for parameter in group.adapter.parameters():
                    parameter.data.normal_(0, 0.01)
        bank.take()
        self.model.readers = bank.install()
        self.model.eval()
        self.adapter = 0

    def files(self, number: int) -> list[Path]:
        """So many new photographs."""
        start, self._number = self._number, self._number + number
        factor = self.renderer.geometry.factor
        return [
            photograph(self._scratch / f"{n}.jpg", factor, n) for n in range(start, start + number)
        ]

    def read(self, file: Path) -> Encoded:
        """The question about a photograph."""
        return self.renderer.question([file], TEXT)

    def engine(self, rows: int, tokens: int) -> Engine:
        """One with room for so many questions and answers."""
        return Engine(self.model, (), rows=rows, tokens=rows * (tokens + 1200))

    def alone(self, engine: Engine, tokens: int) -> tuple[float, float]:
        """Seconds to the first token, and tokens a second after it."""
        (file,) = self.files(1)
        torch.cuda.synchronize()
        start = time.perf_counter()
        prompt = self.read(file)
        engine.add(Request(prompt=prompt, max_new_tokens=tokens, adapter=self.adapter))
        found, first = 0, 0.0
        while engine.busy:
            found += sum(event.token is not None for event in engine.step())
            if found and not first:
                first, before = time.perf_counter(), found
        seconds = time.perf_counter() - first
        assert found == tokens, f"{found} tokens of {tokens}"
        return first - start, (tokens - before) / seconds

    def together(self, engine: Engine, rows: int, tokens: int) -> float:
        """Tokens a second from the files to the last token."""
        files = self.files(rows)
        torch.cuda.synchronize()
        start = time.perf_counter()
        found = 0
        with ThreadPoolExecutor(12) as pool:
            futures = [pool.submit(self.read, file) for file in files]
            while futures or engine.busy:
                while futures and (futures[0].done() or not engine.busy):
                    prompt = futures.pop(0).result()
                    engine.add(Request(prompt=prompt, max_new_tokens=tokens))
                found += sum(event.token is not None for event in engine.step())
        seconds = time.perf_counter() - start
        assert found == rows * tokens, f"{found} tokens of {rows * tokens}"
        return rows * tokens / seconds

    def growing(self, engine: Engine, rows: int, tokens: int) -> float:
        """Tokens a second while all rows grow."""
        for file in self.files(rows):
            engine.add(Request(prompt=self.read(file), max_new_tokens=tokens))
        begun: set[int] = set()
        while len(begun) < rows:
            begun |= {event.ticket for event in engine.step() if event.token is not None}
        torch.cuda.synchronize()
        start, steps = time.perf_counter(), tokens // 2
        for _ in range(steps):
            engine.step()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        while engine.busy:
            engine.step()
        return rows * steps / seconds


@torch.no_grad()
def in_few_bits(model: VisionLanguageModel, kind: str) -> None:
    """Quantise what `--weights` of the commands does."""
    for path, group in list(model.named_modules()):
        if isinstance(group, GroupedLinear) and path.startswith(("model.layers", "lm_head")):
            dense = torch.split(group.weight.detach(), list(group.outputs.values()))
            with torch.device("cuda"):
                group.freeze_as(KINDS[kind])
            for matrix, values_OI in zip(group.weight.matrices, dense, strict=True):
                matrix.fill(values_OI)
    gc.collect()
    torch.cuda.empty_cache()


def measure(
    folder: Path, together: int, tokens: int, repeats: int, rank: int, kind: str
) -> dict[str, Any]:
    """All figures of one model."""
    files, device = ModelFolder(folder), torch.device("cuda")
    model = random_model(files.config, 0, torch.bfloat16, device, files.preprocessor).eval()
    if kind != "bf16":
        in_few_bits(model, kind)
    weights = torch.cuda.memory_allocated()
    result: dict[str, Any] = {
        "model": folder.name,
        "weights": kind,
        "weights_gb": round(weights / 1e9, 2),
    }
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(files, model, Path(scratch))
        engine = bench.engine(1, tokens)
        cache = torch.cuda.memory_allocated() - weights
        for _ in range(2):
            bench.alone(engine, 16)
        torch.cuda.reset_peak_memory_stats()
        runs = [bench.alone(engine, tokens) for _ in range(repeats)]
        peak = torch.cuda.max_memory_allocated()
        result |= {
            "first_token_ms": round(1e3 * statistics.median(first for first, _ in runs), 1),
            "tokens_per_second": round(statistics.median(rate for _, rate in runs), 1),
            "cache_gb": round(cache / 1e9, 2),
            "peak_gb": round(peak / 1e9, 2),
            "peak_without_cache_by_weights": round((peak - cache) / weights, 3),
        }
        del engine
        gc.collect()
        torch.cuda.empty_cache()
        if together:
            engine = bench.engine(together, tokens)
            bench.together(engine, together, 16)
            result["together"] = together
            result["growing_tokens_per_second"] = round(bench.growing(engine, together, tokens), 1)
            result["whole_tokens_per_second"] = round(bench.together(engine, together, tokens), 1)
            result["together_peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
            del engine
        if rank:
            bench.adapt(rank)
            engine = bench.engine(1, tokens)
            bench.alone(engine, 16)
            runs = [bench.alone(engine, tokens) for _ in range(repeats)]
            rate = statistics.median(rate for _, rate in runs)
            result["adapter_rank"], result["adapter_tokens_per_second"] = rank, round(rate, 1)
    return result


def peer(folder: Path, rows: int, tokens: int) -> dict[str, Any]:
    """The same by transformers: seconds of a whole generation less those of its first token."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        kind = transformers.AutoModelForImageTextToText
        model = kind.from_config(config, attn_implementation="sdpa").eval()
    torch.set_default_dtype(torch.float32)
    merge = config.vision_config.spatial_merge_size
    grid = (1, SIDES[1] * merge, SIDES[0] * merge)
    places = SIDES[0] * SIDES[1]
    ids = torch.cat(
        [torch.arange(10), torch.full((places,), config.image_token_id), torch.arange(20)]
    )
    kinds = (ids == config.image_token_id).int()
    patch = config.vision_config.patch_size**2 * 3 * config.vision_config.temporal_patch_size
    pixels = torch.randn(rows * grid[1] * grid[2], patch, dtype=torch.bfloat16, device="cuda")
    inputs = {
        "input_ids": ids.expand(rows, -1).cuda(),
        "attention_mask": torch.ones(rows, len(ids), dtype=torch.int64, device="cuda"),
        "mm_token_type_ids": kinds.expand(rows, -1).cuda(),
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([grid] * rows, device="cuda"),
    }

    def seconds(new: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.no_grad():
            model.generate(
                **inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False,
                cache_implementation="static", pad_token_id=0, eos_token_id=None,
            )  # fmt: skip
        torch.cuda.synchronize()
        return time.perf_counter() - start

    begun = time.perf_counter()
    seconds(tokens)
    warm_up = time.perf_counter() - begun
    whole = min(seconds(tokens) for _ in range(2))
    first = min(seconds(1) for _ in range(2))
    return {
        "transformers": transformers.__version__,
        "rows": rows,
        "warm_up_s": round(warm_up, 1),
        "first_token_ms": round(1e3 * first, 1),
        "tokens_per_second": round(rows * (tokens - 1) / (whole - first), 1),
        "whole_tokens_per_second": round(rows * tokens / whole, 1),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--together", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--weights", default="bf16")
    parser.add_argument("--peer", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    for folder, kind in itertools.product(options.folders, options.weights.split(",")):
        found = measure(
            folder, options.together, options.tokens, options.repeats, options.rank, kind
        )
        gc.collect()
        torch.cuda.empty_cache()
        if options.peer and kind == "bf16":
            rows = [1, options.together] if options.together else [1]
            found["peers"] = [peer(folder, number, options.tokens) for number in rows]
            gc.collect()
            torch.cuda.empty_cache()
        found |= {"tokens": options.tokens, "torch": torch.__version__}
        found["card"] = torch.cuda.get_device_name()
        print(json.dumps(found), flush=True)
        if options.out is not None:
            with options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
