"""A converted run is the run that the other program would do: its rates, and its parts."""

from __future__ import annotations

import math

import pytest
import torch
from converting import SWIFT, from_settings, recipe_of
from transformers import get_scheduler

from finesight.convert.families import family_of
from finesight.hub import ModelFolder
from finesight.model.parts import adaptable_layers, part_of
from finesight.model.tiny import make_tiny, random_model
from finesight.train.schedule import Schedule

STEPS = 40


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "constant_with_warmup"])
@pytest.mark.parametrize("warmup", [{}, {"warmup_ratio": 0.1}, {"warmup_steps": 7}])
def test_rates_are_those_of_transformers(kind, warmup, tmp_path):
    """After the warm-up the same in each step; in it one step ahead, since here the first step
    learns already, where transformers has a rate of 0."""
    settings = {"lr_scheduler_type": kind, "max_steps": STEPS, **warmup}
    from_settings(tmp_path, SWIFT | settings)
    ours = Schedule(recipe_of(tmp_path).train, STEPS)
    rising = warmup.get("warmup_steps", math.ceil(warmup.get("warmup_ratio", 0) * STEPS))
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = get_scheduler(kind, optimizer, rising, STEPS)
    rates = []
    for _ in range(STEPS + 1):
        rates.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    flat = 0 if kind == "constant" else rising
    for step in range(STEPS):
        expected = rates[step + 1] if step < flat else rates[step]
        assert ours.factor(step) == pytest.approx(expected, abs=1e-9), step


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen"])
def test_layers_are_called_as_in_the_model(family, tmp_path):
    """Targets are looked for among the names of the families' layers."""
    made = ModelFolder(make_tiny(tmp_path / family, family))
    model = random_model(made.config, 0, torch.float32, torch.device("cpu"), made.preprocessor)
    names: dict[str, set[str]] = {}
    for name in adaptable_layers(model):
        pieces = name.split(".")
        last = ".".join(pieces[-2:]) if pieces[-1].isdigit() else pieces[-1]
        names.setdefault(part_of(name), set()).add(last)
    known = family_of(str(made.path), (), "a.yaml")
    assert set(known.language) == names["language"]
    assert set(known.vision) == names["vision"]
    assert set(known.merger) == names["merger"]
