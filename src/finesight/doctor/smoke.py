"""Half a minute of everything on each device: a few pictures, a few steps, an answer."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from finesight.doctor import child
from finesight.doctor.findings import Finding, fault, fine
from finesight.doctor.graphics import CUDA_VISIBLE, Torch, visible_cards

STAGES = ("load", "data", "train", "answer")

SECONDS = 180.0
"""After which a device is given up; usual are 10, more where kernels are compiled for the first
time."""


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage that went well."""

    stage: str
    seconds: float
    what: str


@dataclass(frozen=True, slots=True)
class Smoke:
    """The stages that went well on a device, and what the next one ended with."""

    device: str
    visible: str | None
    stages: tuple[Stage, ...]
    problem: str


def gather(torch: Torch) -> list[Smoke]:
    """The CPU, then every card that torch sees. What is written is gone afterwards."""
    cards = [(f"GPU {index}", name) for index, name in enumerate(visible_cards(len(torch.cards)))]
    # All cards at once: each has a process of its own, which mostly loads.
    with ThreadPoolExecutor(max(1, len(cards))) as pool:
        return [_tried("CPU", None), *pool.map(lambda card: _tried(*card), cards)]


def _tried(device: str, visible: str | None) -> Smoke:
    with tempfile.TemporaryDirectory(prefix="finesight-doctor-") as folder:
        # Nothing is kept that later runs would find; nor is a hub asked.
        more = {"HF_ASSETS_CACHE": str(Path(folder) / "assets"), "HF_HUB_OFFLINE": "1"}
        if visible is not None:
            more[CUDA_VISIBLE] = visible
        kind = "cpu" if visible is None else "cuda"
        ended = child.run("finesight.doctor.smoke_child", [kind, folder], SECONDS, more)
    lines = [json.loads(line) for line in ended.printed.splitlines() if line.startswith("{")]
    return Smoke(device, visible, tuple(Stage(**line) for line in lines), ended.problem)


def judge(tried: Sequence[Smoke]) -> list[Finding]:
    """A line for each device, or the stage that failed there."""
    sound = [one.visible for one in tried if one.visible is not None and not one.problem]
    return [_judged(one, sound) for one in tried]


def _judged(one: Smoke, sound: Sequence[str]) -> Finding:
    done = "; ".join(_told(stage) for stage in one.stages)
    if not one.problem:
        return fine("smoke", f"{one.device}: {done}")
    failed = STAGES[min(len(one.stages), len(STAGES) - 1)]
    before = f"went well before it: {done or 'nothing'}"
    if one.visible is None:
        why, remedy = f"{before}; the command shows all of it", "finesight quickstart --out trial"
    else:
        others = ",".join(sound) or "-1"
        why, remedy = f"{before}; runs go on without this card", f"export {CUDA_VISIBLE}={others}"
    what = f"{one.device}: the stage {failed} failed: {one.problem}"
    return fault("smoke", what, why=why, remedy=remedy)


def _told(stage: Stage) -> str:
    return f"{stage.stage} {stage.seconds:.1f} s" + (f" ({stage.what})" if stage.what else "")
