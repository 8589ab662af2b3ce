"""Every setting of a recipe, by name: a new one is a decision, not an accident."""

from __future__ import annotations

import re
from pathlib import Path

from finesight.recipe import setting_names

SETTINGS = [
    "model",
    "adapter",
    "data.train.path",
    "data.train.weight",
    "data.train.limit",
    "data.eval.path",
    "data.eval.limit",
    "data.system",
    "data.max_length",
    "data.unusable",
    "picture.min_pixels",
    "picture.max_pixels",
    "picture.height",
    "picture.width",
    "picture.longest_side",
    "tune.vision",
    "tune.merger",
    "tune.language",
    "tune.embeddings",
    "tune.lora.rank",
    "tune.lora.alpha",
    "tune.lora.dropout",
    "tune.lora.targets",
    "tune.nf4",
    "tune.fp8",
    "train.epochs",
    "train.steps",
    "train.batch",
    "train.pack_tokens",
    "train.optimizer",
    "train.learning_rate.default",
    "train.learning_rate.vision",
    "train.learning_rate.merger",
    "train.learning_rate.language",
    "train.learning_rate.embeddings",
    "train.schedule",
    "train.warmup",
    "train.weight_decay",
    "train.betas",
    "train.clip",
    "train.recompute",
    "train.precision",
    "train.device",
    "train.seed",
    "train.data_seed",
    "train.workers",
    "train.cache",
    "train.parallel",
    "train.save_every",
    "train.keep",
    "eval.metric",
    "eval.every",
    "eval.patience",
    "eval.limit",
    "eval.max_new_tokens",
    "eval.batch",
    "track.kind",
    "track.project",
    "track.address",
    "output",
]


def test_settings_are_these():
    assert sorted(setting_names()) == sorted(SETTINGS)


def test_settings_are_at_most_sixty():
    assert len(setting_names()) <= 60


def test_every_setting_is_described():
    text = (Path(__file__).parents[1] / "docs" / "en" / "recipe.md").read_text(encoding="utf-8")
    described = set(re.findall(r"^\| `([a-z0-9_.]+)` \|", text, re.MULTILINE))
    assert described == set(SETTINGS)
