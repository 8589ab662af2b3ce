"""Models, packs and measured memory for tests of plans."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from finesight.config import PixelRange, TrainFileSettings, TuneSettings
from finesight.data.corpus import load_corpus
from finesight.encode.packing import PackedBatch, find_shared_prefix_length, pack
from finesight.encode.renderer import NativeRenderer
from finesight.model.trainable import configure_tuning
from finesight.model.vlm import VisionLanguageModel
from finesight.model.weights_io import load_model
from finesight.model_folder import ModelFolder
from finesight.plan.dry_run import ComputeTarget, StepTracer
from finesight.plan.planned_model import build_meta_model
from finesight.plan.planned_pack import PlannedPack
from finesight.train.loss import fused_linear_cross_entropy

H200 = ComputeTarget(is_cuda=True, dtype=torch.bfloat16, capability=(9, 0))


def make_batch(
    model: ModelFolder, data: Path, limit: int | None = None, *, shares_prefix: bool = False
) -> PackedBatch:
    """Pack samples of a file, with a shared prefix or without."""
    is_qwen_vl = model.family == "qwen"
    rule = None if is_qwen_vl else PixelRange(min_pixels=784, max_pixels=7056)
    renderer = NativeRenderer(model, rule)
    corpus = load_corpus((TrainFileSettings(path=data),))
    samples = [renderer.encode(sample) for sample in corpus.read_samples()[:limit]]
    prefix_length = find_shared_prefix_length([sample.tokenized for sample in samples])
    return pack(samples, prefix_length=prefix_length if shares_prefix else 0)


def make_planned_pack(batch: PackedBatch) -> PlannedPack:
    return PlannedPack(
        batch.lengths, batch.grid_thw, batch.num_supervised_tokens, batch.prefix_length
    )


def make_model(
    folder: ModelFolder, dtype: torch.dtype, tune: dict[str, Any], device: str = "cpu"
) -> VisionLanguageModel:
    """Load a model whose parts are trained by these settings."""
    model = load_model(folder, dtype, torch.device(device)).train()
    configure_tuning(model, TuneSettings.model_validate(tune), 0)
    return model


def make_tracer(folder: ModelFolder, compute: ComputeTarget, tune: dict[str, Any]) -> StepTracer:
    """Make a tracer of the model without weights."""
    model = build_meta_model(folder, compute.dtype, (), ()).train()
    configure_tuning(model, TuneSettings.model_validate(tune), 0)
    return StepTracer(model, compute)


def compute_loss(model: VisionLanguageModel, batch: PackedBatch) -> Any:
    """Run the forward pass of a training step."""
    seed_1 = torch.ones(1, dtype=torch.int32, device=batch.ids_T.device)
    h_LD = model(batch, dropout_seed_1=seed_1)
    scale = torch.tensor(1.0, device=h_LD.device)
    return fused_linear_cross_entropy(h_LD, model.lm_head_weight, batch.labels_L, scale)


@dataclass
class MemoryProfile:
    """Memory of a `with` block: its peak, and what is allocated at its end."""

    peak_bytes: int = 0
    live_bytes: int = 0


@contextmanager
def profile_memory() -> Iterator[MemoryProfile]:
    """Measure the memory that torch allocates on the CPU within the block."""
    memory = MemoryProfile()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        yield memory
    assert profiled.profiler is not None
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        memory.live_bytes += event.nbytes()
        memory.peak_bytes = max(memory.peak_bytes, memory.live_bytes)
