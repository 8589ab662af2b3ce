"""Converted runs equal those of the other program in learning rates and trainable parts."""

import math

import pytest
import torch
from convert_fixtures import SWIFT_SETTINGS, convert_settings, load_converted_recipe
from random_model import init_random_model
from tiny_model import create_tiny_model
from transformers import get_scheduler

from finesight.convert.external_config import detect_family
from finesight.model.trainable import find_adaptable_layers, get_part
from finesight.model_folder import ModelFolder
from finesight.train.master_weight_optimizer import LRSchedule

STEPS = 40


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "constant_with_warmup"])
@pytest.mark.parametrize("warmup", [{}, {"warmup_ratio": 0.1}, {"warmup_steps": 7}])
def test_converted_lr_schedule_matches_transformers(kind, warmup, tmp_path):
    """Check equal learning rates after the warmup. During it, the schedule is one step ahead.

    The first step of transformers has a learning rate of 0.
    """
    settings = {"lr_scheduler_type": kind, "max_steps": STEPS, **warmup}
    convert_settings(tmp_path, SWIFT_SETTINGS | settings)
    ours = LRSchedule(load_converted_recipe(tmp_path).train, STEPS)
    rising = warmup.get("warmup_steps", math.ceil(warmup.get("warmup_ratio", 0) * STEPS))
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = get_scheduler(kind, optimizer, rising, STEPS)
    learning_rates = []
    for _ in range(STEPS + 1):
        learning_rates.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    flat = 0 if kind == "constant" else rising
    for step in range(STEPS):
        expected = learning_rates[step + 1] if step < flat else learning_rates[step]
        assert ours.lr_factor(step) == pytest.approx(expected, abs=1e-9), step


@pytest.mark.parametrize(
    "family",
    ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "qwen"],
)
def test_layer_names_match_transformers_models(family, tmp_path):
    """Check that the converter finds targets by the layer names of transformers."""
    made = ModelFolder(create_tiny_model(tmp_path / family, family))
    model = init_random_model(
        made.config, 0, torch.float32, torch.device("cpu"), made.preprocessor_config
    )
    names: dict[str, set[str]] = {}
    for name in find_adaptable_layers(model):
        pieces = name.split(".")
        last = ".".join(pieces[-2:]) if pieces[-1].isdigit() else pieces[-1]
        names.setdefault(get_part(name), set()).add(last)
    known = detect_family(str(made.path), (), "a.yaml")
    assert {part: set(layers) for part, layers in known.layers.items()} == names
