"""Collect the facts of the model card from the training folder of finesight-tiny."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from model_card import loss_curve
from synthetic_tasks import formula_grammar, vocabulary
from synthetic_tasks.tasks import MAIN_MIXTURE, WARMUP_MIXTURE
from train_stages import LAST_STAGE, TRAIN_STAGES

from finesight.settings.manifest import PARAM_AUDIT_FILE
from finesight.settings.recipe import load_recipe

EVAL_RESULTS_FILE = "eval_results.json"
"""File with the results of all evaluation sets."""


def collect_facts(output_dir: Path, num_images: Sequence[int]) -> dict[str, Any]:
    """Collect the fields of `ModelCardFacts`. `num_images` holds the images of each stage."""
    config = json.loads((output_dir / "random" / "config.json").read_text())
    vision = config["vision_config"]
    runs = {
        stage.name: _read_jsonl(output_dir / stage.name / "metrics.jsonl") for stage in TRAIN_STAGES
    }
    started = next(line for line in runs[LAST_STAGE] if "started_at" in line)
    first, *_, most = num_images
    words = round(first * WARMUP_MIXTURE["word"] + most * MAIN_MIXTURE["word"])
    formulas = round(most * MAIN_MIXTURE["formula"])
    param_changes = json.loads((output_dir / LAST_STAGE / PARAM_AUDIT_FILE).read_text())
    return {
        "num_params": sum(row["num_params"] for row in param_changes),
        "architecture": {
            "decoder layers": config["num_hidden_layers"],
            "decoder hidden size": config["hidden_size"],
            "decoder heads (query, key/value)": f"{config['num_attention_heads']},"
            f" {config['num_key_value_heads']}",
            "vision encoder layers": vision["depth"],
            "vision encoder hidden size": vision["embed_dim"],
            "vision encoder heads": vision["num_heads"],
        },
        "vocab_size": config["vocab_size"],
        "num_images": first + most,
        "num_samples": {stage.name: n for stage, n in zip(TRAIN_STAGES, num_images, strict=True)},
        "mixtures": {stage.name: dict(stage.mixture) for stage in TRAIN_STAGES},
        "training": {
            stage.name: _train_settings(output_dir / stage.name) for stage in TRAIN_STAGES
        },
        "loss_curves": {stage: loss_curve(lines) for stage, lines in runs.items()},
        "stage_seconds": json.loads((output_dir / "seconds.json").read_text()),
        "machine": started["device"],
        "versions": started["versions"],
        "eval_results": json.loads((output_dir / EVAL_RESULTS_FILE).read_text()),
        "train_overlap": {
            "words": _estimate_overlap(
                _eval_answers(output_dir, "words"), vocabulary.sample_word, words
            ),
            "formulas": _estimate_overlap(
                _eval_answers(output_dir, "formulas"), formula_grammar.sample_formula, formulas
            ),
        },
    }


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _train_settings(run: Path) -> dict[str, Any]:
    train = load_recipe(run / "recipe.yaml").train
    learning_rate = train.learning_rate
    return {
        "steps": train.steps,
        "batch size": train.batch_size,
        "optimizer": train.optimizer,
        "learning rate": f"{learning_rate.default:g}, {train.lr_schedule}",
        "learning rate of embeddings": f"{learning_rate.embeddings or learning_rate.default:g}",
        "warmup steps": train.warmup,
        "AdamW betas": ", ".join(map(str, train.betas)),
        "weight decay": train.weight_decay,
    }


def _eval_answers(output_dir: Path, name: str) -> list[str]:
    return [line["gold"] for line in _read_jsonl(output_dir / "answers" / f"{name}.jsonl")]


def _estimate_overlap(
    eval_texts: list[str], generate: Callable[[random.Random], str], num_texts: int
) -> float:
    """Estimate the fraction of evaluation texts in the training data.

    The estimate generates as many texts as the training data contains, with another seed.
    """
    rng = random.Random(0)
    train_texts = {generate(rng) for _ in range(num_texts)}
    return sum(text in train_texts for text in eval_texts) / len(eval_texts)
