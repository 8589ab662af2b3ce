"""Commands about a run: going on with it, and the same recipe again with another setting."""

from __future__ import annotations

import math
from pathlib import Path

from pydantic import ValidationError

from finesight.config import Data, DataFile, Recipe
from finesight.doctor.findings import typed
from finesight.report.facts import last_start
from finesight.report.record import Record
from finesight.run_folder import RECIPE

FASTEST = 1e-3
"""A learning rate that even small adapters stand."""


def resume(record: Record, *changes: str) -> str:
    """Go on from the newest checkpoint."""
    return typed("finesight", "train", str(record.folder / RECIPE), *changes, "--resume")


def again(record: Record, *changes: str) -> str:
    """The same recipe with other settings, in a new folder beside this one."""
    recipe = str(record.folder / RECIPE)
    return typed("finesight", "train", recipe, *changes, f"output={beside(record.folder)}")


def beside(folder: Path) -> Path:
    """A name that nothing has yet."""
    number = 2
    while (found := folder.with_name(f"{folder.name}-{number}")).exists():
        number += 1
    return found


def recipe_of(record: Record) -> Recipe:
    """The run's settings; the usual ones where its recipe cannot be read."""
    try:
        return Recipe.model_validate(record.recipe)
    except ValidationError:
        unknown = Data(train=(DataFile(path=Path("unknown")),))
        return Recipe(model="unknown", data=unknown, output=record.folder)


def rates(record: Record) -> dict[str, float]:
    """The learning rates that the recipe names, `default` first."""
    named = recipe_of(record).train.learning_rate.model_dump()
    return {part: rate for part, rate in named.items() if rate is not None}


def rates_times(record: Record, factor: float) -> list[str]:
    """Overrides that multiply every learning rate of the recipe."""
    changed = {part: f"{rounded(rate * factor):g}" for part, rate in rates(record).items()}
    return [f"train.learning_rate.{part}={rate}" for part, rate in changed.items()]


def lower_rates(record: Record) -> list[str]:
    """Overrides for a run that learned too fast: a tenth, and at most `FASTEST`."""
    return rates_times(record, min(0.1, FASTEST / max(rates(record).values())))


def rounded(rate: float) -> float:
    """To one digit that counts, as people write rates."""
    power = math.floor(math.log10(rate))
    return float(round(rate / 10.0**power) * 10.0**power)


def length(record: Record, share: float) -> list[str]:
    """Overrides that make a run so many times as long."""
    train = recipe_of(record).train
    if train.steps is not None:
        return [f"train.steps={max(1, math.ceil(train.steps * share))}"]
    return [f"train.epochs={rounded_up((train.epochs or 1) * share):g}"]


def rounded_up(value: float) -> float:
    """To a hundredth."""
    return math.ceil(100 * value - 1e-9) / 100


def workers(record: Record) -> int | None:
    """Reading processes of the process that wrote last."""
    found = last_start(record).get("workers")
    return found if isinstance(found, int) else None
