"""How long a step takes: arithmetic, what moves through memory, the host that starts kernels, and
the optimiser.

The figures below are from runs on one H200 (benchmarks/results/recipes_h200.json,
grounding_full_h200.json, first_qwen_vl_h200.json; tests/plan/test_measured_runs.py compares; for
layers in few kernels with adapters the steps of 16 samples of ladder_h200.json) and, for a
processor, on two cores. They are to be measured again when kernels change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from finesight.config import Train
from finesight.model.fp8 import Fp8Weight
from finesight.model.frozen import frozen_weights
from finesight.model.language import DecoderLayer
from finesight.model.lora import adapters
from finesight.model.network import VisionLanguageModel
from finesight.model.parts import PARTS, Part, part_of
from finesight.plan.activations import Activations
from finesight.plan.kept import WIDE
from finesight.plan.load import Load
from finesight.plan.memory import Standing
from finesight.plan.recorded import recording
from finesight.plan.target import Target
from finesight.train.flops import Arithmetic, Operations


@dataclass(frozen=True, slots=True)
class Pace:
    """How near a kind of device comes to its peaks.

    `products` is the share of the peak that the model's own products reach. `moved` counts the
    bytes that go through memory for each byte that is kept: by norms, masks, rotations and
    activations, there and back. `forward`, `back` and `adapted` are seconds of the host for a
    layer without a gradient, with one, and with adapters; `few` are the last two of layers in few
    kernels.
    """

    products: float
    moved: float
    forward: float
    back: float
    adapted: float
    few: tuple[float, float]


ON_CARD = Pace(0.78, 11.0, forward=0.4e-3, back=1.5e-3, adapted=3.0e-3, few=(0.75e-3, 1.8e-3))
ON_PROCESSOR = Pace(0.75, 11.0, forward=0.1e-3, back=0.3e-3, adapted=0.6e-3, few=(0.0, 0.0))
ON_PROCESSOR_16 = replace(ON_PROCESSOR, products=0.28)
"""In 16 bits a processor multiplies so quickly that products of small models end too soon for it:
these are finesight-tiny's."""

STEPPED = {"adamw": 60, "adamw8bit": 270, "muon": 80}
"""Bytes that the optimiser moves for each number that learns: norm, clipping, moments, masters, and
the weights made of them. Moments of eight bits are made wide and narrow again."""

STEPPED_AT_ONCE = {"adamw": 28, "adamw8bit": 29}
"""The same of AdamW as one kernel on a card: 26, and the gradient once more for the norm. With
eight bits it moves 16, in the time of this many."""

IN_FP8 = 1.4
"""Times as many products a second with weights in FP8, what is quantised for them included."""

DEQUANTISED = 10.0
"""Bytes that making a number of a matrix in four bits anew takes the time of."""

AGAIN = 1 / 3
"""Of what moves, the share that goes forward."""

READ = 3.1e-6
"""Seconds of a core for a patch of a picture: decoded, resized and cut out
(benchmarks/results/encode_speed.json)."""

START = 9.0
"""Seconds from the command to the first step on a GPU, libraries loaded and kernels built, beside
reading the weights."""

FROM_DISK = 1.5e9
"""Bytes of weights a second from a disk to a card."""


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of a step. `products` and `moved` are the device's work, `host` what starting it
    takes: the longer of both counts. `reading` is what reading processes take for it."""

    products: float
    moved: float
    host: float
    optimiser: float
    reading: float
    waits: bool

    @property
    def in_all(self) -> float:
        """Of the step: what is read ahead costs nothing where it keeps pace."""
        work = max(self.products + self.moved, self.host) + self.optimiser
        return work + self.reading if self.waits else max(work, self.reading)


class Clock:
    """Times of one model's steps on a target; `seen` says that features of pictures are known."""

    def __init__(
        self,
        model: VisionLanguageModel,
        target: Target,
        stays: Standing,
        train: Train,
        workers: int,
    ) -> None:
        self._model, self._target, self._workers = model, target, workers
        self._pace = _pace_of(target)
        self._arithmetic = Arithmetic(model)
        self._plain = Activations(model, target.computing, 0.0)
        numbers = stays.numbers
        stepped = STEPPED[train.optimizer]
        if target.computing.cuda:
            stepped = STEPPED_AT_ONCE.get(train.optimizer, stepped)
        self._optimiser = stepped * numbers / target.bandwidth
        few = frozen_weights(model)
        made = (w.numbers for w in few.values() if not isinstance(w, Fp8Weight))
        self._dequantised = DEQUANTISED * sum(made)
        self._in_fp8 = _shares_in_fp8(model)

    def step(
        self,
        loads: Sequence[Load],
        recompute: float,
        seen: bool = False,
        recorded: bool = True,
    ) -> StepTime:
        """Of these packs; `recorded` says that such as can be are, as most of a long run's."""
        target, pace = self._target, self._pace
        operations, moved, host, read = 0.0, 0.0, 0.0, 0.0
        for load in loads:
            operations += self._work(self._arithmetic.by_part(load), seen)
            operations += self._arithmetic.again(load, recompute)
            moved += pace.moved * self._plain.kept(load) * (1 + AGAIN * recompute)
            moved += 0 if seen else 2 * self._plain.passing(load)
            moved += self._dequantised * (2 + recompute)
            host += self._host(load, recompute, seen, recorded)
            read += 0 if seen else READ * load.patches
        return StepTime(
            products=operations / (target.peak * pace.products),
            moved=moved / target.bandwidth,
            host=host,
            optimiser=self._optimiser,
            reading=read / max(1, self._workers),
            waits=self._workers == 0,
        )

    def _work(self, operations: Operations, seen: bool) -> float:
        """Operations, those in FP8 as the fewer that they take the time of."""
        by_part = operations.weights.items()
        quick = {part: n * (1 - self._in_fp8[part] * (1 - 1 / IN_FP8)) for part, n in by_part}
        found = sum(quick.values()) + operations.tokens
        return found - quick["vision"] - quick["merger"] if seen else found + operations.patches

    def _host(self, load: Load, recompute: float, seen: bool, recorded: bool) -> float:
        pace, model = self._pace, self._model
        adapted = {path for path, _, _ in adapters(model)}
        found = 0.0
        computing = self._target.computing
        # Nothing starts the layers of a recording one by one.
        inside = recording(model, computing, recompute, load) if recorded else None
        if inside is None:
            tuned = any(path.startswith("model.") for path in adapted)
            for layer in model.model.layers:
                few = computing.fused and isinstance(layer, DecoderLayer) and layer.fusible
                found += (pace.few if few else (pace.back, pace.adapted))[tuned]
            found *= 1 + AGAIN * recompute
        if load.patches and not seen and (inside is None or inside.kind.sight is None):
            tower = model.visual
            each = pace.forward
            if tower.trains:
                each = pace.adapted if any(p.startswith("visual.b") for p in adapted) else pace.back
            found += len(tower.blocks) * each * (1 + AGAIN * recompute * tower.trains)
        return found


def _shares_in_fp8(model: VisionLanguageModel) -> dict[Part, float]:
    """Of the numbers of each part, which are all multiplied with but for a few."""
    found, whole = dict.fromkeys(PARTS, 0), dict.fromkeys(PARTS, 0)
    for name, weight in frozen_weights(model).items():
        whole[part_of(name)] += weight.numbers
        found[part_of(name)] += weight.numbers * isinstance(weight, Fp8Weight)
    for name, parameter in model.named_parameters():
        whole[part_of(name)] += parameter.numel()
    return {part: found[part] / max(1, whole[part]) for part in PARTS}


def _pace_of(target: Target) -> Pace:
    if target.computing.cuda:
        return ON_CARD
    return ON_PROCESSOR if target.computing.number == WIDE else ON_PROCESSOR_16


def start_seconds(stays: Standing, target: Target) -> float:
    """From the command to the first step."""
    return (START if target.computing.cuda else START / 3) + stays.weights / FROM_DISK
