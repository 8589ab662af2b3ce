"""Questions about pictures that a merged model and the adapter on its base both answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from finesight.data.headers import DamagedPicture
from finesight.data.jsonl import Located
from finesight.data.sample import ImagePart
from finesight.data.sources import load_sources
from finesight.encode.encoded import Encoded
from finesight.encode.rendering import Rendering
from finesight.errors import UserError
from finesight.recipe import load_recipe
from finesight.run_folder import RECIPE
from finesight.synth.tasks import Task, sample

SEED = 20260
"""Of the pictures that are drawn where a run has no held-out data within reach."""

LOOKED_AT = 200
"""Held-out samples that are looked at for pictures, at most."""


def held_out(source: str, most: int) -> list[Located]:
    """The first held-out samples with pictures that the recipe of the run `source` names: none
    without a recipe, and none where the data have gone."""
    path = Path(source) / RECIPE
    if not path.is_file():
        return []
    try:
        recipe = load_recipe(path)
        corpus = load_sources(recipe.data.eval) if recipe.data.eval else ()
        seen = [corpus[i] for i in range(min(len(corpus), LOOKED_AT))]
    except UserError:
        return []
    return [one for one in seen if _has_picture(one)][:most]


def drawn(folder: Path, count: int) -> list[Located]:
    """So many questions about pictures of shapes, which are drawn into `folder`."""
    questions = []
    for number in range(count):
        made = sample(Task("scene"), SEED, number)
        made.picture.save(folder / f"{number}.png")
        questions.append(Located(made.as_sample(f"drawn {number}", f"{number}.png"), folder))
    return questions


def encoded(renderer: Rendering, questions: Sequence[Located]) -> list[tuple[Located, Encoded]]:
    """Those that can be read, with their prompts."""
    found = []
    for question in questions:
        try:
            prompt = renderer.with_patches(renderer.prompt_outline(question))
        except (DamagedPicture, UserError):
            continue
        found.append((question, prompt))
    return found


def _has_picture(located: Located) -> bool:
    return any(isinstance(part, ImagePart) for part in located.sample.parts())
