"""Every setting of a recipe, by name: a new one is a decision, not an accident."""

from __future__ import annotations

import re
from pathlib import Path

from finesight.recipe import list_setting_names

SETTINGS = [
    "model",
    "adapter",
    "data.train.path",
    "data.train.weight",
    "data.train.limit",
    "data.eval.path",
    "data.eval.limit",
    "data.system_prompt",
    "data.max_length",
    "data.on_invalid_sample",
    "image.min_pixels",
    "image.max_pixels",
    "image.height",
    "image.width",
    "image.longest_side",
    "tune.vision",
    "tune.merger",
    "tune.language",
    "tune.embeddings",
    "tune.lora.rank",
    "tune.lora.alpha",
    "tune.lora.dropout",
    "tune.lora.target_modules",
    "tune.quantize.nf4",
    "tune.quantize.fp8",
    "train.epochs",
    "train.steps",
    "train.batch_size",
    "train.pack_tokens",
    "train.optimizer",
    "train.learning_rate.default",
    "train.learning_rate.vision",
    "train.learning_rate.merger",
    "train.learning_rate.language",
    "train.learning_rate.embeddings",
    "train.lr_schedule",
    "train.warmup",
    "train.weight_decay",
    "train.betas",
    "train.max_grad_norm",
    "train.activation_checkpointing",
    "train.precision",
    "train.device",
    "train.seed",
    "train.data_seed",
    "train.num_workers",
    "train.vision_cache",
    "train.parallel",
    "train.save_every",
    "train.keep_checkpoints",
    "eval.metric",
    "eval.every",
    "eval.patience",
    "eval.limit",
    "eval.max_new_tokens",
    "eval.batch_size",
    "track.kind",
    "track.project",
    "track.uri",
    "output_dir",
]


def test_settings_match_the_list():
    assert sorted(list_setting_names()) == sorted(SETTINGS)


def test_at_most_sixty_settings():
    assert len(list_setting_names()) <= 60


def test_every_setting_is_documented():
    text = (Path(__file__).parents[1] / "docs" / "en" / "recipe.md").read_text(encoding="utf-8")
    tables = re.findall(r"^\| setting \|.*\n(?:\|.*\n)+", text, re.MULTILINE)
    described = {
        name
        for table in tables
        for name in re.findall(r"^\| `([a-z0-9_.]+)` \|", table, re.MULTILINE)
    }
    assert described == set(SETTINGS)
