"""Measure the contribution of each optimization to the step time, added one by one.

    python benchmarks/ladder.py CONFIG --out FILE [--batch 64,16] [--steps 12]

CONFIG is a folder with the configuration of a model; weights are random. A step is LoRA of rank 64
on all seven projections of the decoder with dropout 0.05, in one pack of random samples shaped like
the caption recipe: a shared prefix of 15 tokens, an image of 280 x 280 pixels (400 patches, 100
tokens), 9 question tokens, answers of 10 to 19 tokens. Nothing is read from files, so the results
depend only on GPU and kernel launches. `gb` is the peak allocated memory in GB (10^9 bytes).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "pretraining"))

import numpy as np
import torch
from inference_speed import quantize_model
from peer_metrics import report_header
from random_model import init_random_model
from torch import Tensor

from finesight.encode.batch import PackedBatch
from finesight.encode.packing import find_shared_prefix_length, pack
from finesight.encode.tokenization import EncodedSample, TokenizedSample, VisualSpan
from finesight.model import attention, fused_decoder, layers
from finesight.model.attention import Segments
from finesight.model.linear import FusedLinear, stacked_row_counts
from finesight.model.quant import fp8
from finesight.model.quant.fp8 import Fp8Matrix
from finesight.model.trainable import configure_tuning, trainable_parameters
from finesight.model.vlm import VisionLanguageModel
from finesight.model.weights_io import supports_fp8_matmul
from finesight.model_folder import locate_model
from finesight.settings.config import TrainSettings, TuneSettings
from finesight.train import cuda_graphs
from finesight.train.cuda_graphs import CudaGraphRunner
from finesight.train.master_weight_optimizer import MasterWeightOptimizer
from finesight.train.objectives.sft import Settings
from finesight.train.objectives.sft.loss import SftObjective
from finesight.train.step import forward_backward, run_pack
from finesight.vision.image_processing import GridTHW

DEVICE = torch.device("cuda")
GRID_THW = 1, 20, 20
PREFIX_TOKENS, QUESTION_TOKENS, ANSWER_TOKENS = 15, 9, (10, 19)
LORA_TUNE = TuneSettings.model_validate({"lora": {"rank": 64, "alpha": 16.0, "dropout": 0.05}})
WARMUP_STEPS = 16
"""Warmup steps, including CUDA graph capture."""


def make_batch(
    num_samples: int,
    channels: int,
    *,
    share_prefix: bool = True,
    grid_thw: GridTHW = GRID_THW,
    answer_tokens: tuple[int, int] = ANSWER_TOKENS,
) -> PackedBatch:
    """Pack random samples on the GPU, with or without a shared prefix."""
    rng = np.random.default_rng(num_samples)
    num_image_tokens = grid_thw[1] * grid_thw[2] // 4
    prefix_ids = rng.integers(1000, 90000, PREFIX_TOKENS)
    samples = []
    for number in range(num_samples):
        answer = int(rng.integers(*answer_tokens, endpoint=True))
        suffix_ids = rng.integers(1000, 90000, num_image_tokens + QUESTION_TOKENS + answer)
        ids_T = np.concatenate([prefix_ids, suffix_ids]).astype(np.int32)
        positions = np.arange(len(ids_T), dtype=np.int32)
        side = grid_thw[1] * 14, grid_thw[2] * 14
        tokenized = TokenizedSample(
            id=str(number),
            ids_T=ids_T,
            loss_mask_T=positions >= len(ids_T) - answer,
            position_ids_3T=np.tile(positions, (3, 1)),
            spans=(
                VisualSpan(
                    "image",
                    PREFIX_TOKENS,
                    PREFIX_TOKENS + num_image_tokens,
                    grid_thw,
                    (),
                    side,
                    side,
                ),
            ),
        )
        patches = rng.integers(0, 256, (grid_thw[1] * grid_thw[2], channels), dtype=np.uint8)
        samples.append(EncodedSample(tokenized, patches))
    tokenized_samples = [sample.tokenized for sample in samples]
    return pack(
        samples, prefix_length=find_shared_prefix_length(tokenized_samples) if share_prefix else 0
    ).to(DEVICE)


class TrainedModel:
    """A model with optimizer and CUDA graphs."""

    def __init__(self, config: Path, *, use_fp8: bool, use_nf4: bool = False) -> None:
        self.model = init_random_model(locate_model(str(config)).config, 0, torch.bfloat16, DEVICE)
        if use_fp8:
            quantize_fp8(self.model)
        if use_nf4:
            quantize_model(self.model, "nf4")
        configure_tuning(self.model, LORA_TUNE, 0)
        self.trainable_params = trainable_parameters(self.model)
        self.optimizer = MasterWeightOptimizer(
            self.trainable_params, TrainSettings(), stacked_row_counts(self.model)
        )
        self.graph_runner = CudaGraphRunner(
            forward_backward,
            self.model.train(),
            SftObjective(Settings()),
            list(self.trainable_params.values()),
        )

    def reset_graphs(self) -> None:
        """Discard the CUDA graphs of earlier measurements."""
        self.graph_runner.release_graphs()
        self.graph_runner = CudaGraphRunner(
            forward_backward,
            self.model,
            SftObjective(Settings()),
            list(self.trainable_params.values()),
        )

    @torch.no_grad()
    def encode_images(self, batch: PackedBatch) -> Tensor:
        """Encode the images of a packed batch."""
        return self.model.encode_images(batch.patches_ND, batch.grid_thw)

    def step(self, batch: PackedBatch, features: Tensor | None) -> None:
        """Run forward, backward and optimizer step."""
        share = torch.full((), 1.0 / batch.num_supervised_tokens, device=DEVICE)
        runner = self.graph_runner
        engine: Any = SimpleNamespace(
            model=self.model, objective=runner.objective, graph_runner=runner
        )
        run_pack(engine, batch, features, share)
        self.optimizer.step(1.0, self.optimizer.grad_norm())


@torch.no_grad()
def quantize_fp8(model: VisionLanguageModel) -> None:
    """Quantize the frozen products of vision encoder and decoder, as `tune.quantize.fp8` does."""
    for path, linear in model.named_modules():
        if (
            isinstance(linear, FusedLinear)
            and "lm_head" not in path
            and supports_fp8_matmul(linear)
        ):
            assert isinstance(linear.weight, torch.nn.Parameter), path
            dense = torch.split(linear.weight.detach(), list(linear.output_sizes.values()))
            with DEVICE:
                linear.set_quantized_weight(Fp8Matrix, fp8.Fp8Weight)
            assert isinstance(linear.weight, fp8.Fp8Weight)
            for matrix, values in zip(linear.weight.matrices, dense, strict=True):
                matrix.tensor_specs()[0].load(values)


def time_steps(step: Callable[[], None], num_steps: int, num_warmup: int = WARMUP_STEPS) -> float:
    """Return the median time between the ends of steps, without synchronization between steps."""
    events = []
    for _ in range(num_warmup + num_steps + 1):
        step()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        events.append(event)
    torch.cuda.synchronize()
    intervals = pairwise(events[num_warmup:])
    return statistics.median(start.elapsed_time(end) / 1000 for start, end in intervals)


@contextmanager
def disable_optimizations(*disabled: str) -> Iterator[None]:
    """Disable optimizations within the block."""
    switches: dict[str, tuple[object, str, object]] = {
        "attention": (attention, "MAX_TRITON_SEQLEN", 0),
        "layers": (fused_decoder, "supports_fused_layers", lambda *_: False),
        "vision_encoder": (layers, "has_kernels", lambda *_: False),
        "vision_attention": (attention.varlen_kernels, "vision_attention", _varlen),
        "gelu": (layers, "gemm_gelu_operands", lambda *_: None),
        "cuda_graphs": (cuda_graphs, "should_capture", lambda *_: False),
    }
    originals = {
        name: getattr(module, attribute) for name, (module, attribute, _) in switches.items()
    }
    for name in disabled:
        module, attribute, replacement = switches[name]
        setattr(module, attribute, replacement)
    try:
        yield
    finally:
        for name in disabled:
            module, attribute, _ = switches[name]
            setattr(module, attribute, originals[name])


def _varlen(q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, cu_seqlens: Any) -> Tensor:
    segments = Segments((), cu_seqlens.cu_seqlens_S1, cu_seqlens.max_seqlen, len(q_THD))
    return attention._flash_attention(q_THD, k_THD, v_THD, segments, segments, causal=False)


OPTIMIZATIONS = ("layers", "attention", "vision_encoder", "vision_attention", "gelu", "cuda_graphs")
ABLATION_STEPS = (
    ("unfused kernels", OPTIMIZATIONS),
    ("fused decoder layers", OPTIMIZATIONS[1:]),
    ("short-segment attention", OPTIMIZATIONS[2:]),
    ("fused norms and rotary in the vision encoder", OPTIMIZATIONS[3:]),
    ("vision attention kernel", OPTIMIZATIONS[4:]),
    ("fused GELU in the vision encoder", OPTIMIZATIONS[5:]),
    ("CUDA graphs", ()),
)


def run_ablation(config: Path, batch_sizes: list[int], steps: int) -> list[dict[str, Any]]:
    """Measure each optimization and batch size."""
    rows: list[dict[str, Any]] = []

    def measure_row(
        label: str,
        batch_size: int,
        trained: TrainedModel,
        cache_features: bool,
        share_prefix: bool = True,
    ) -> None:
        trained.reset_graphs()
        channels = trained.model.visual.patch_embed.proj.in_features // 2
        batch = make_batch(batch_size, channels, share_prefix=share_prefix)
        features = trained.encode_images(batch) if cache_features else None
        torch.cuda.reset_peak_memory_stats()
        seconds = time_steps(lambda: trained.step(batch, features), steps)
        gb = torch.cuda.max_memory_allocated() / 1e9
        row = {"optimization": label, "batch": batch_size, "ms": seconds * 1e3, "gb": gb}
        rows.append(row | {"samples_per_s": batch_size / seconds})
        print(json.dumps(rows[-1]), flush=True)

    trained = TrainedModel(config, use_fp8=False)
    for samples in batch_sizes:
        for label, disabled in ABLATION_STEPS:
            with disable_optimizations(*disabled):
                measure_row(label, samples, trained, cache_features=False, share_prefix=False)
        measure_row("shared prefix", samples, trained, cache_features=False)
        measure_row("vision cache", samples, trained, cache_features=True)
    del trained
    trained = TrainedModel(config, use_fp8=True)
    for samples in batch_sizes:
        measure_row("FP8", samples, trained, cache_features=False)
        measure_row("FP8, vision cache", samples, trained, cache_features=True)
    return rows


def main() -> None:
    """Run the benchmark, write and print the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    batches = {"type": lambda text: list(map(int, text.split(","))), "default": [64, 16]}
    parser.add_argument("--batch", **batches)
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args()
    report = report_header("ladder.py", options.config)
    report["results"] = run_ablation(options.config, options.batch, options.steps)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print("| | batch | samples/s | ms | GB |\n|---|---|---|---|---|")
    for row in report["results"]:
        figures = f"{row['samples_per_s']:.0f} | {row['ms']:.1f} | {row['gb']:.1f}"
        print(f"| {row['optimization']} | {row['batch']} | {figures} |")


if __name__ == "__main__":
    main()
