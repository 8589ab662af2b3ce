"""Gathers the facts of a making of finesight-tiny from its folder, for the model card."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from card import curve
from stages import LAST, STAGES

from finesight.recipe import load_recipe
from finesight.synth import grammar, vocabulary
from finesight.synth.tasks import FIRST, MIXTURE

MEASURED = "measured.json"
"""What the figures of all held-out sets stand in, within the folder of a making."""


def gather(out: Path, pictures: Sequence[int]) -> dict[str, Any]:
    """What `card.Facts` holds; `pictures` are the numbers that each run learns from."""
    config = json.loads((out / "random" / "config.json").read_text())
    vision = config["vision_config"]
    runs = {stage.name: _lines(out / stage.name / "metrics.jsonl") for stage in STAGES}
    started = next(line for line in runs[LAST] if "started" in line)
    first, *_, most = pictures
    words = round(first * FIRST["word"] + most * MIXTURE["word"])
    formulas = round(most * MIXTURE["formula"])
    moved = json.loads((out / LAST / "moved.json").read_text())
    return {
        "parameters": sum(row["numbers"] for row in moved),
        "geometry": {
            "layers of the language model": config["num_hidden_layers"],
            "its width": config["hidden_size"],
            "its heads, of queries and of keys": f"{config['num_attention_heads']} and"
            f" {config['num_key_value_heads']}",
            "layers of the vision tower": vision["depth"],
            "its width and heads": f"{vision['embed_dim']} and {vision['num_heads']}",
        },
        "tokens": config["vocab_size"],
        "pictures": first + most,
        "samples": {stage.name: n for stage, n in zip(STAGES, pictures, strict=True)},
        "mixtures": {stage.name: dict(stage.mixture) for stage in STAGES},
        "training": {stage.name: _settings(out / stage.name) for stage in STAGES},
        "curves": {stage: curve(lines) for stage, lines in runs.items()},
        "seconds": json.loads((out / "seconds.json").read_text()),
        "machine": started["device"],
        "versions": started["versions"],
        "measured": json.loads((out / MEASURED).read_text()),
        "seen": {
            "words": _seen(_held_out(out, "words"), vocabulary.word, words),
            "formulas": _seen(_held_out(out, "formulas"), grammar.formula, formulas),
        },
    }


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _settings(run: Path) -> dict[str, Any]:
    train = load_recipe(run / "recipe.yaml").train
    rates = train.learning_rate
    return {
        "steps": train.steps,
        "samples a step": train.batch,
        "optimiser": train.optimizer,
        "learning rate": f"{rates.default:g}, {train.schedule}",
        "learning rate of embeddings": f"{rates.embeddings or rates.default:g}",
        "steps of warm-up": train.warmup,
        "AdamW's betas": ", ".join(map(str, train.betas)),
        "weight decay": train.weight_decay,
    }


def _held_out(out: Path, name: str) -> list[str]:
    return [line["gold"] for line in _lines(out / "answers" / f"{name}.jsonl")]


def _seen(held_out: list[str], invented: Callable[[random.Random], str], number: int) -> float:
    """An estimate of the share of `held_out` that occurs in training, too: what as many other
    inventions as training holds come upon."""
    rng = random.Random(0)
    others = {invented(rng) for _ in range(number)}
    return sum(text in others for text in held_out) / len(held_out)
