"""Where the speed of a step comes from: what makes it quick, put on one after the other.

    python benchmarks/ladder.py CONFIG --out FILE [--batch 64,16] [--steps 12]

CONFIG is a folder with a model's configuration; its weights are random. A step is LoRA of rank 64
on all seven projections of the decoder with drop-out 0.05, over made samples of the caption recipe:
15 tokens that all begin with, a picture of 280 x 280 pixels (400 patches, 100 tokens), 9 tokens of
questions, answers of 10 to 19, in one pack. Nothing is read from files here, so a row tells of the
card and of what launches its kernels alone. `gb` is the most that is allocated, in 10^9 bytes.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peer_figures import head
from torch import Tensor

from finesight.config import Train, Tune
from finesight.encode.encoded import Encoded, Outline, Span
from finesight.encode.pack import PackedBatch, beginning_of, pack
from finesight.hub import locate
from finesight.model import attention, epilogue, fp8, fused_layer, layers
from finesight.model.attention import Segments
from finesight.model.few_bits import multiplies_in_fp8
from finesight.model.linear import GroupedLinear
from finesight.model.lora import stacked
from finesight.model.network import VisionLanguageModel
from finesight.model.parts import apply_tuning, trainable
from finesight.model.rowwise import Fp8Matrix
from finesight.model.weights import random_model
from finesight.train import recorded
from finesight.train.optimizer import Masters
from finesight.train.recorded import Passes

CUDA = torch.device("cuda")
GRID = 1, 20, 20
BEFORE, AFTER, ANSWER = 15, 9, (10, 19)
LORA = Tune.model_validate({"lora": {"rank": 64, "alpha": 16.0, "dropout": 0.05}})
WARM = 16
"""Steps until packs are recorded, too, where launches turn out to be late."""


def made(samples: int, channels: int, *, share: bool = True) -> PackedBatch:
    """Samples of random tokens and patches in one pack on the card; all begin with the same ones,
    which they `share` or not."""
    rng = np.random.default_rng(samples)
    places = GRID[1] * GRID[2] // 4
    beginning = rng.integers(1000, 90000, BEFORE)
    rows = []
    for number in range(samples):
        answer = int(rng.integers(ANSWER[0], ANSWER[1], endpoint=True))
        others = rng.integers(1000, 90000, places + AFTER + answer)
        ids_T = np.concatenate([beginning, others]).astype(np.int32)
        at = np.arange(len(ids_T), dtype=np.int32)
        side = GRID[1] * 14, GRID[2] * 14
        outline = Outline(
            id=str(number),
            ids_T=ids_T,
            learned_T=at >= len(ids_T) - answer,
            positions_3T=np.tile(at, (3, 1)),
            spans=(Span("image", BEFORE, BEFORE + places, GRID, (), side, side),),
        )
        patches = rng.integers(0, 256, (GRID[1] * GRID[2], channels), dtype=np.uint8)
        rows.append(Encoded(outline, patches))
    outlines = [one.outline for one in rows]
    return pack(rows, beginning=beginning_of(outlines) if share else 0).to(CUDA)


class Learner:
    """A model and what its steps need."""

    def __init__(self, config: Path, *, in_fp8: bool) -> None:
        self.model = random_model(locate(str(config)).config, 0, torch.bfloat16, CUDA)
        if in_fp8:
            quantise(self.model)
        apply_tuning(self.model, LORA, 0)
        self.learning = trainable(self.model)
        self.masters = Masters(self.learning, Train(), stacked(self.model))
        self.passes = Passes(self.model.train(), list(self.learning.values()))

    def record_anew(self) -> None:
        """Without the recordings of rungs before."""
        self.passes.forget()
        self.passes = Passes(self.model, list(self.learning.values()))

    @torch.no_grad()
    def seen(self, batch: PackedBatch) -> Tensor:
        """The features of its pictures."""
        return self.model.see(batch.patches_ND, batch.grids)

    def step(self, batch: PackedBatch, features: Tensor | None) -> None:
        """Forwards, backwards, and the optimiser's step."""
        share = torch.full((), 1.0 / batch.supervised, device=CUDA)
        self.passes.learn(batch, features, share)
        self.masters.step(1.0, self.masters.norm())


@torch.no_grad()
def quantise(model: VisionLanguageModel) -> None:
    """The frozen products of tower and decoder in FP8, as `tune.fp8` has them."""
    for path, group in model.named_modules():
        if isinstance(group, GroupedLinear) and "lm_head" not in path and multiplies_in_fp8(group):
            assert isinstance(group.weight, torch.nn.Parameter), path
            dense = torch.split(group.weight.detach(), list(group.outputs.values()))
            with CUDA:
                group.freeze_as(Fp8Matrix, fp8.Fp8Weight)
            assert isinstance(group.weight, fp8.Fp8Weight)
            for matrix, values in zip(group.weight.matrices, dense, strict=True):
                matrix.pieces()[0].fill(values)


def timed(step: Callable[[], None], steps: int) -> float:
    """Seconds from the end of a step on the card to that of the next one, the median; none is
    waited for, as in a run."""
    marks = []
    for _ in range(WARM + steps + 1):
        step()
        mark = torch.cuda.Event(enable_timing=True)
        mark.record()
        marks.append(mark)
    torch.cuda.synchronize()
    timed = pairwise(marks[WARM:])
    return statistics.median(start.elapsed_time(end) / 1000 for start, end in timed)


@contextmanager
def without(*missing: str) -> Iterator[None]:
    """Within the block some of what makes a step quick is left out."""
    switches: dict[str, tuple[object, str, object]] = {
        "attention": (attention, "SHORT", 0),
        "layers": (fused_layer, "takes", lambda *_: False),
        "tower": (layers, "has_kernels", lambda *_: False),
        "look": (attention.look_kernels, "look", _varlen),
        "gelu": (epilogue, "_operands", lambda *_: None),
        "recordings": (recorded, "pays", lambda *_: False),
    }
    kept = {name: getattr(module, entry) for name, (module, entry, _) in switches.items()}
    for name in missing:
        module, entry, other = switches[name]
        setattr(module, entry, other)
    try:
        yield
    finally:
        for name in missing:
            module, entry, _ = switches[name]
            setattr(module, entry, kept[name])


def _varlen(q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, bounds: Any) -> Tensor:
    segments = Segments((), bounds.bounds_S1, bounds.longest)
    return attention._attend_varlen(q_THD, k_THD, v_THD, segments, segments, causal=False)


ALL = ("layers", "attention", "tower", "look", "gelu", "recordings")
RUNGS = (
    ("one step after the other", ALL),
    ("decoder layers in few kernels", ALL[1:]),
    ("attention of short segments", ALL[2:]),
    ("sums and norms, turns of the tower", ALL[3:]),
    ("attention of pictures", ALL[4:]),
    ("the tower's GELU in a product", ALL[5:]),
    ("small packs recorded", ()),
)


def measure(config: Path, batches: list[int], steps: int) -> list[dict[str, Any]]:
    """A row for each rung and batch."""
    rows: list[dict[str, Any]] = []

    def add(rung: str, samples: int, learner: Learner, known: bool, share: bool = True) -> None:
        learner.record_anew()
        channels = learner.model.visual.patch_embed.proj.in_features // 2
        batch = made(samples, channels, share=share)
        features = learner.seen(batch) if known else None
        torch.cuda.reset_peak_memory_stats()
        seconds = timed(lambda: learner.step(batch, features), steps)
        gb = torch.cuda.max_memory_allocated() / 1e9
        row = {"rung": rung, "batch": samples, "ms": seconds * 1e3, "gb": gb}
        rows.append(row | {"samples_per_s": samples / seconds})
        print(json.dumps(rows[-1]), flush=True)

    learner = Learner(config, in_fp8=False)
    for samples in batches:
        for rung, missing in RUNGS:
            with without(*missing):
                add(rung, samples, learner, known=False, share=False)
        add("what all begin with, once", samples, learner, known=False)
        add("features kept", samples, learner, known=True)
    del learner
    learner = Learner(config, in_fp8=True)
    for samples in batches:
        add("in FP8", samples, learner, known=False)
        add("in FP8, features kept", samples, learner, known=True)
    return rows


def main() -> None:
    """Measure, write, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    batches = {"type": lambda text: list(map(int, text.split(","))), "default": [64, 16]}
    parser.add_argument("--batch", **batches)
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args()
    report = head("ladder.py", options.config)
    report["results"] = measure(options.config, options.batch, options.steps)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print("| | batch | samples/s | ms | GB |\n|---|---|---|---|---|")
    for row in report["results"]:
        figures = f"{row['samples_per_s']:.0f} | {row['ms']:.1f} | {row['gb']:.1f}"
        print(f"| {row['rung']} | {row['batch']} | {figures} |")


if __name__ == "__main__":
    main()
