"""Steps whose loss or gradients are no finite numbers; as a process, one of several of a run.

Usage: python spoiled.py KIND STEP[,STEP...] RECIPE [--resume]
"""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

from finesight.recipe import load_recipe
from finesight.train import follow, loop
from finesight.train.loader import Step
from finesight.train.loop import train
from finesight.train.prepare import Session
from finesight.train.step import Taken, take_step

Kind = Literal["loss", "gradient", "jump"]


@contextmanager
def spoiled(kind: Kind, steps: Collection[int]) -> Iterator[None]:
    """Within the block, steps of these numbers, counted from 1, have a loss of NaN, an infinite
    gradient, or a loss many times as high."""

    def taking(session: Session, step: Step, *rest: Any) -> Taken:
        if step.number + 1 not in steps:
            return take_step(session, step, *rest)
        if kind == "gradient":
            first = session.masters.groups[0].pieces[0].parameter
            hook = first.register_hook(lambda gradient: gradient * math.inf)
        else:
            by = math.nan if kind == "loss" else -100.0
            hook = session.model.register_forward_hook(lambda *called: called[-1] * by)
        try:
            return take_step(session, step, *rest)
        finally:
            hook.remove()

    with patch.object(loop, "take_step", taking), patch.object(follow, "take_step", taking):
        yield


def main() -> None:
    kind, steps, recipe, *words = sys.argv[1:]
    assert kind in ("loss", "gradient", "jump"), kind
    with spoiled(kind, [int(step) for step in steps.split(",")]):
        train(load_recipe(Path(recipe)), resume="--resume" in words)


if __name__ == "__main__":
    main()
