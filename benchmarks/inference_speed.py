"""Measure inference speed: single requests, batches, time to first token and memory.

    python benchmarks/inference_speed.py FOLDER... [--num-requests 64] [--rank 64] [--peer]
        [--weight-format bf16,nf4,int4] [--out FILE]

FOLDER contains the configuration and tokenizer of a model; weights are random, which does not
change the time, and generation never stops early. A request is a generated photograph of 1,000
tokens, read from its file, and a line of text. Single requests: time to first token including image
loading, then tokens/s. Batches: tokens/s during decoding and end to end. `--rank` repeats the
single request with an unmerged adapter on every layer, `--weight-format` with each of these
formats. `--peer` measures transformers in the same process: `generate` with a compiled static cache
and preprocessed images. Prints one line of JSON per model.
"""

from __future__ import annotations

import argparse
import gc
import io
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "pretraining"))

import numpy as np
import torch
from PIL import Image
from random_model import init_random_model

from finesight.encode.renderer import NativeRenderer
from finesight.encode.tokenization import EncodedSample
from finesight.infer.engine import Engine
from finesight.infer.prediction import build_question
from finesight.infer.request import GenerationRequest
from finesight.model.linear import FusedLinear, LoraConfig, LoraLinear
from finesight.model.lora.multi import detach_adapter, install_lora_routing
from finesight.model.vlm import VisionLanguageModel
from finesight.model.weights_io import MATRIX_TYPES
from finesight.model_folder import ModelFolder

PROMPT = "Describe the image in detail."
IMAGE_TOKENS = (40, 25)
"""Image tokens along width and height."""


def write_photo(path: Path, patch_factor: int, seed: int) -> Path:
    """Write a JPEG with IMAGE_TOKENS tokens."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (IMAGE_TOKENS[1], IMAGE_TOKENS[0], 3), dtype=np.uint8)
    size = (IMAGE_TOKENS[0] * patch_factor, IMAGE_TOKENS[1] * patch_factor)
    image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=90)
    path.write_bytes(buffer.getvalue())
    return path


class InferenceBenchmark:
    """A model with random weights, and unseen photographs."""

    def __init__(self, folder: ModelFolder, model: VisionLanguageModel, scratch: Path) -> None:
        self.model, self.renderer, self._scratch = model, NativeRenderer(folder), scratch
        self._num_images = 0
        self.adapter: int | None = None

    def add_adapter(self, rank: int) -> None:
        """Add an adapter to every linear layer of the decoder."""
        self.model.requires_grad_(False)
        for path, linear in list(self.model.named_modules()):
            if isinstance(linear, FusedLinear) and path.startswith("model.layers"):
                layers = {name: LoraConfig(rank, rank / 4) for name in linear.output_sizes}
                linear.adapter = LoraLinear(linear, layers, 0.0)
                for parameter in linear.adapter.parameters():
                    parameter.data.normal_(0, 0.01)
        detached = detach_adapter(self.model)
        self.model.lora_routing = install_lora_routing(self.model, [detached])
        self.model.eval()
        self.adapter = 0

    def write_images(self, count: int) -> list[Path]:
        """Write new photographs."""
        start, self._num_images = self._num_images, self._num_images + count
        factor = self.renderer.patch_config.resize_factor
        return [
            write_photo(self._scratch / f"{n}.jpg", factor, n) for n in range(start, start + count)
        ]

    def encode_prompt(self, image_path: Path) -> EncodedSample:
        """Encode the question about a photograph."""
        return self.renderer.encode_prompt(build_question([image_path], PROMPT, image_path.name))

    def build_engine(self, max_num_seqs: int, max_new_tokens: int) -> Engine:
        """Build an engine with capacity for these requests."""
        return Engine(
            self.model,
            (),
            max_num_seqs=max_num_seqs,
            num_cache_tokens=max_num_seqs * (max_new_tokens + 1200),
        )

    def measure_single(self, engine: Engine, max_new_tokens: int) -> tuple[float, float]:
        """Measure time to first token and decoding speed of one request."""
        (file,) = self.write_images(1)
        torch.cuda.synchronize()
        start = time.perf_counter()
        prompt = self.encode_prompt(file)
        engine.add_request(
            GenerationRequest(
                prompt=prompt, max_new_tokens=max_new_tokens, adapter_index=self.adapter
            )
        )
        found, first = 0, 0.0
        while engine.has_work:
            found += sum(event.token is not None for event in engine.step())
            if found and not first:
                first, before = time.perf_counter(), found
        seconds = time.perf_counter() - first
        assert found == max_new_tokens, f"{found} tokens of {max_new_tokens}"
        return first - start, (max_new_tokens - before) / seconds

    def measure_batch(self, engine: Engine, num_requests: int, max_new_tokens: int) -> float:
        """Measure tokens/s of a batch, including image loading."""
        files = self.write_images(num_requests)
        torch.cuda.synchronize()
        start = time.perf_counter()
        found = 0
        with ThreadPoolExecutor(12) as pool:
            futures = [pool.submit(self.encode_prompt, file) for file in files]
            while futures or engine.has_work:
                while futures and (futures[0].done() or not engine.has_work):
                    prompt = futures.pop(0).result()
                    engine.add_request(
                        GenerationRequest(prompt=prompt, max_new_tokens=max_new_tokens)
                    )
                found += sum(event.token is not None for event in engine.step())
        seconds = time.perf_counter() - start
        assert found == num_requests * max_new_tokens, (
            f"{found} tokens of {num_requests * max_new_tokens}"
        )
        return num_requests * max_new_tokens / seconds

    def measure_decode(self, engine: Engine, num_requests: int, max_new_tokens: int) -> float:
        """Measure tokens/s while all sequences are decoding."""
        for file in self.write_images(num_requests):
            engine.add_request(
                GenerationRequest(prompt=self.encode_prompt(file), max_new_tokens=max_new_tokens)
            )
        started_ids: set[int] = set()
        while len(started_ids) < num_requests:
            started_ids |= {event.request_id for event in engine.step() if event.token is not None}
        torch.cuda.synchronize()
        start, steps = time.perf_counter(), max_new_tokens // 2
        for _ in range(steps):
            engine.step()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        while engine.has_work:
            engine.step()
        return num_requests * steps / seconds


@torch.no_grad()
def quantize_model(model: VisionLanguageModel, weight_format: str) -> None:
    """Quantize the model as the option `--weight-format` of the commands does."""
    for path, linear in list(model.named_modules()):
        if isinstance(linear, FusedLinear) and path.startswith(("model.layers", "lm_head")):
            dense = torch.split(linear.weight.detach(), list(linear.output_sizes.values()))
            with torch.device("cuda"):
                linear.set_quantized_weight(MATRIX_TYPES[weight_format])
            for matrix, values_OI in zip(linear.weight.matrices, dense, strict=True):
                matrix.quantize(values_OI)
    gc.collect()
    torch.cuda.empty_cache()


def run_benchmark(
    folder: Path,
    num_requests: int,
    max_new_tokens: int,
    repeats: int,
    rank: int,
    weight_format: str,
) -> dict[str, Any]:
    """Run all measurements of one model."""
    files, device = ModelFolder(folder), torch.device("cuda")
    model = init_random_model(
        files.config, 0, torch.bfloat16, device, files.preprocessor_config
    ).eval()
    if weight_format != "bf16":
        quantize_model(model, weight_format)
    weights = torch.cuda.memory_allocated()
    result: dict[str, Any] = {
        "model": folder.name,
        "weights": weight_format,
        "weights_gb": round(weights / 1e9, 2),
    }
    with tempfile.TemporaryDirectory() as scratch:
        bench = InferenceBenchmark(files, model, Path(scratch))
        engine = bench.build_engine(1, max_new_tokens)
        cache = torch.cuda.memory_allocated() - weights
        for _ in range(2):
            bench.measure_single(engine, 16)
        torch.cuda.reset_peak_memory_stats()
        runs = [bench.measure_single(engine, max_new_tokens) for _ in range(repeats)]
        peak = torch.cuda.max_memory_allocated()
        result |= {
            "first_token_ms": round(1e3 * statistics.median(first for first, _ in runs), 1),
            "tokens_per_second": round(statistics.median(one for _, one in runs), 1),
            "cache_gb": round(cache / 1e9, 2),
            "peak_gb": round(peak / 1e9, 2),
            "peak_without_cache_by_weights": round((peak - cache) / weights, 3),
        }
        del engine
        gc.collect()
        torch.cuda.empty_cache()
        if num_requests:
            engine = bench.build_engine(num_requests, max_new_tokens)
            bench.measure_batch(engine, num_requests, 16)
            result["num_requests"] = num_requests
            result["decode_tokens_per_second"] = round(
                bench.measure_decode(engine, num_requests, max_new_tokens), 1
            )
            result["end_to_end_tokens_per_second"] = round(
                bench.measure_batch(engine, num_requests, max_new_tokens), 1
            )
            result["batch_peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
            del engine
        if rank:
            bench.add_adapter(rank)
            engine = bench.build_engine(1, max_new_tokens)
            bench.measure_single(engine, 16)
            runs = [bench.measure_single(engine, max_new_tokens) for _ in range(repeats)]
            tokens_per_s = statistics.median(one for _, one in runs)
            result["adapter_rank"] = rank
            result["adapter_tokens_per_second"] = round(tokens_per_s, 1)
    return result


def measure_transformers(folder: Path, batch_size: int, max_new_tokens: int) -> dict[str, Any]:
    """Measure transformers: generation time without the time to first token."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        kind = transformers.AutoModelForImageTextToText
        model = kind.from_config(config, attn_implementation="sdpa").eval()
    torch.set_default_dtype(torch.float32)
    merge = config.vision_config.spatial_merge_size
    grid = (1, IMAGE_TOKENS[1] * merge, IMAGE_TOKENS[0] * merge)
    num_image_tokens = IMAGE_TOKENS[0] * IMAGE_TOKENS[1]
    ids = torch.cat(
        [torch.arange(10), torch.full((num_image_tokens,), config.image_token_id), torch.arange(20)]
    )
    kinds = (ids == config.image_token_id).int()
    patch = config.vision_config.patch_size**2 * 3 * config.vision_config.temporal_patch_size
    pixels = torch.randn(batch_size * grid[1] * grid[2], patch, dtype=torch.bfloat16, device="cuda")
    inputs = {
        "input_ids": ids.expand(batch_size, -1).cuda(),
        "attention_mask": torch.ones(batch_size, len(ids), dtype=torch.int64, device="cuda"),
        "mm_token_type_ids": kinds.expand(batch_size, -1).cuda(),
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([grid] * batch_size, device="cuda"),
    }

    def time_generation(max_new_tokens: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.no_grad():
            model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                min_new_tokens=max_new_tokens,
                do_sample=False,
                cache_implementation="static",
                pad_token_id=0,
                eos_token_id=None,
            )
        torch.cuda.synchronize()
        return time.perf_counter() - start

    start = time.perf_counter()
    time_generation(max_new_tokens)
    warm_up = time.perf_counter() - start
    total_s = min(time_generation(max_new_tokens) for _ in range(2))
    first = min(time_generation(1) for _ in range(2))
    return {
        "transformers": transformers.__version__,
        "rows": batch_size,
        "warm_up_s": round(warm_up, 1),
        "first_token_ms": round(1e3 * first, 1),
        "tokens_per_second": round(batch_size * (max_new_tokens - 1) / (total_s - first), 1),
        "end_to_end_tokens_per_second": round(batch_size * max_new_tokens / total_s, 1),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--num-requests", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--weight-format", default="bf16")
    parser.add_argument("--peer", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    for folder, kind in itertools.product(options.folders, options.weight_format.split(",")):
        found = run_benchmark(
            folder, options.num_requests, options.tokens, options.repeats, options.rank, kind
        )
        gc.collect()
        torch.cuda.empty_cache()
        if options.peer and kind == "bf16":
            rows = [1, options.num_requests] if options.num_requests else [1]
            found["peers"] = [
                measure_transformers(folder, number, options.tokens) for number in rows
            ]
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
