"""Which model fits which card, tuned in which way: `finesight data plan`, over a table of both.

    python benchmarks/which_card.py [MODEL]... --work DIR [--out FILE] [--cards T4,L4,H200]

MODEL is a hub's name, or a folder of configuration and tokenizer files; without any, three that are
published, of which no weights are fetched. The samples are drawn: a picture of one size, a
question, and an answer of 20 words. What is written are estimates, each as `finesight data plan
RECIPE --gpu CARD` gives it.
"""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console

from finesight import __version__
from finesight.config import Recipe
from finesight.hub import locate
from finesight.plan.plan import Plan, make_plan
from finesight.plan.told import as_record
from finesight.recipe import load_recipe
from finesight.train.progress import Screen

MODELS = (
    "Qwen/Qwen2-VL-2B-Instruct",
    "Qwen/Qwen2.5-VL-3B-Instruct",
    "Qwen/Qwen2.5-VL-7B-Instruct",
)
CARDS = (
    *("RTX 4060", "RTX 3060", "T4", "RTX 4080", "RTX 4090", "V100-32GB"),
    *("A100-40GB", "L40S", "A100-80GB", "H200"),
)
SIDES = (280, 1008)
SAMPLES = 64
WORDS = "a red bus stands before the old station while people wait for its doors to open again"

ALL = dict.fromkeys(("vision", "merger", "language", "embeddings"), "full")
ADAPTERS = {"language": "lora"}


@dataclass(frozen=True)
class Way:
    """A way of tuning: what a cell calls it, and its settings."""

    name: str
    tune: dict[str, Any]
    optimizer: str


MEASURES = (
    (),
    ("train.pack_tokens=2048",),
    ("train.recompute=0.5",),
    ("train.recompute=true",),
    ("tune.lora.rank=16",),
    ("tune.nf4=[language]",),
    ("tune.nf4=[language,vision,merger]",),
    ("picture.height=672", "picture.width=672"),
)
"""Of the last model with adapters and the larger pictures, each by itself."""

WAYS = (
    Way("LoRA", ADAPTERS, "adamw"),
    Way("all", ALL, "adamw"),
    Way("all, 8-bit moments", ALL, "adamw8bit"),
)


def draw(folder: Path, side: int) -> Path:
    """A file of samples, each with a picture of `side` x `side` pixels."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(SAMPLES):
        picture = f"pictures/{side}-{number}.png"
        Image.new("RGB", (side, side), (number, side % 256, 90)).save(folder / picture)
        asked = [{"type": "image", "image": picture}, {"type": "text", "text": "What is here?"}]
        said = [{"type": "text", "text": " ".join((WORDS + " " + WORDS).split()[:20])}]
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        lines.append(json.dumps({"id": str(number), "messages": turns}) + "\n")
    path = folder / f"{side}.jsonl"
    path.write_text("".join(lines), encoding="utf-8")
    return path


def recipe_of(model: str, data: Path, side: int, way: Way, changes: tuple[str, ...] = ()) -> Recipe:
    """Defaults, but for what is compared here."""
    written = {
        "model": model,
        "data": {"train": str(data)},
        "picture": {"height": side, "width": side},
        "tune": way.tune,
        "train": {"epochs": 1, "batch": 16, "optimizer": way.optimizer},
        "output": "runs/planned",
    }
    path = data.with_name("recipe.yaml")
    path.write_text(json.dumps(written), encoding="utf-8")
    return load_recipe(path, changes)


def measure(folder: str, work: Path, card: str, screen: Screen) -> list[dict[str, Any]]:
    """What each of MEASURES alone makes of a run of the model there, as it is written."""
    rows = []
    for changes in MEASURES:
        recipe = recipe_of(folder, draw(work, SIDES[-1]), SIDES[-1], WAYS[0], changes)
        written = as_record(make_plan(recipe, card, screen))["written"]
        rows.append(
            {
                "measure": " ".join(changes) or "nothing",
                "card": card,
                "memory_gb": round(written["memory_in_all"] / 1e9, 1),
                "samples_per_s": float(f"{written['samples_per_s']:.3g}"),
            }
        )
    return rows


def row_of(plan: Plan, way: Way) -> dict[str, Any]:
    """What was chosen for one card, model and way."""
    record = as_record(plan)
    chosen = record["chosen"]
    return {
        "way": way.name,
        "card": plan.target.name,
        "card_gb": plan.target.memory / 1e9,
        "tokens_of_a_sample": plan.tokens.median,
        "precision": plan.precision,
        "fits_as_written": record["written"]["fits"],
        "fits": chosen["fits"],
        "pack_tokens": chosen["pack_tokens"],
        "recompute": chosen["recompute"],
        "nf4": list(chosen["nf4"]),
        "memory_gb": round(chosen["memory_in_all"] / 1e9, 1),
        "samples_per_s": float(f"{chosen['samples_per_s']:.3g}"),
        "words": list(plan.words),
    }


def as_cell(rows: list[dict[str, Any]]) -> str:
    """The first of these ways that fits: how, how much memory, how quickly; a dash for none."""
    row = next((row for row in rows if row["fits"]), None)
    if row is None:
        return "no"
    way = "Q-LoRA" if row["nf4"] else row["way"]
    again = f", {row['recompute']:.0%} recomputed" if row["recompute"] else ""
    return f"{way}{again}: {row['memory_gb']:g} GB, {row['samples_per_s']:g}/s"


def as_table(rows: list[dict[str, Any]], side: int, ways: tuple[str, ...]) -> list[str]:
    """Markdown: a line a card, a column a model."""
    here = [row for row in rows if row["side"] == side and row["way"] in ways]
    models = list(dict.fromkeys(row["model"] for row in here))
    lines = [f"| card | {' | '.join(models)} |", "|---" * (len(models) + 1) + "|"]
    for card in dict.fromkeys(row["card"] for row in here):
        of_card = [row for row in here if row["card"] == card]
        cells = [as_cell([row for row in of_card if row["model"] == m]) for m in models]
        lines.append(f"| {card}, {of_card[0]['card_gb']:g} GB | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=MODELS, metavar="MODEL")
    parser.add_argument("--work", type=Path, required=True, help="a folder for drawn pictures")
    parser.add_argument("--out", type=Path, help="where the rows go, as JSON")
    parser.add_argument("--cards", default=",".join(CARDS), help="cards by name")
    parser.add_argument("--measured-on", default="H100", help="the card of single measures")
    given = parser.parse_args()
    screen = Screen(Console(stderr=True, quiet=True))
    rows = []
    for model in given.models:
        folder = str(locate(model).path)
        for side in SIDES:
            data = draw(given.work, side)
            for way in WAYS:
                recipe = recipe_of(folder, data, side, way)
                for card in given.cards.split(","):
                    row = row_of(make_plan(recipe, card, screen), way)
                    rows.append({"model": Path(model).name, "side": side, **row})
    measured = measure(folder, given.work, given.measured_on, screen)
    for side in SIDES:
        print(f"\npictures of {side} x {side} pixels, LoRA on the language model")
        print("\n".join(as_table(rows, side, ("LoRA",))))
        print(f"\npictures of {side} x {side} pixels, all parameters")
        print("\n".join(as_table(rows, side, ("all", "all, 8-bit moments"))))
    print(f"\none measure alone, on {given.measured_on}: GB, samples/s")
    for row in measured:
        print(f"| `{row['measure']}` | {row['memory_gb']} | {row['samples_per_s']:g} |")
    if given.out is not None:
        told = {
            "command": "python benchmarks/which_card.py --work DIR --out FILE",
            "versions": {
                "finesight": __version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            "rows": rows,
            "measures": {"model": Path(given.models[-1]).name, "rows": measured},
        }
        given.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
