"""What measuring by generation takes beside training: roughly, since nobody knows how long answers
will be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from finesight.config import Eval, Recipe
from finesight.infer.cache import token_bytes
from finesight.infer.engine import CACHE_BYTES, PREFILL_TOKENS
from finesight.plan.load import load_of
from finesight.plan.model import Sized
from finesight.plan.target import Target
from finesight.train.schedule import in_steps
from finesight.train.survey import Glance

STEP_S = 3.0e-3
"""Seconds of a step of generation at least, whatever the model: its parts are launched one by one,
or recorded and still wait for the host to choose."""


@dataclass(frozen=True, slots=True)
class Answering:
    """All measurements of a run: `seconds` of them, each of `samples`, and the bytes that answering
    takes in place of a pack."""

    times: int
    samples: int
    seconds: float
    bytes: int


def answering(
    recipe: Recipe, sized: Sized, on: Target, held_out: Sequence[Glance], steps: int
) -> Answering:
    """Of the recipe's `eval`: before, after and on the way; loss alone where it has none."""
    settings = recipe.eval
    times = 2
    if settings is not None and settings.every is not None:
        every = in_steps(settings.every, steps)
        times += (steps - 1) // every if every else 0
    # The held-out loss: forwards only, of about a third of a training step's work.
    batch = recipe.train.batch
    groups = [held_out[at : at + batch] for at in range(0, len(held_out), batch)]
    times_of = (sized.clock.step([load_of(group)], 0.0, recorded=False) for group in groups)
    loss = sum(time.in_all for time in times_of) / 3
    if settings is None:
        return Answering(times, len(held_out), times * loss, 0)
    asked = held_out[: settings.limit]
    seconds = loss + _generation(settings, sized, on, asked)
    return Answering(times, len(asked), times * seconds, _bytes(settings, sized, on, asked))


def _generation(settings: Eval, sized: Sized, on: Target, asked: Sequence[Glance]) -> float:
    """Every step reads the weights once, for a batch of answers as long as those that are learned;
    prompts are read as a held-out loss is."""
    learned = sum(min(sample.supervised, settings.max_new_tokens) for sample in asked)
    steps = learned / min(settings.batch, len(asked))
    each = max(STEP_S if on.computing.cuda else 0.0, sized.stays.weights / on.bandwidth)
    prompts = sum(
        sized.clock.step([load_of(asked[at : at + settings.batch])], 0.0, recorded=False).in_all
        for at in range(0, len(asked), settings.batch)
    )
    return steps * each + prompts / 3


def _bytes(settings: Eval, sized: Sized, on: Target, asked: Sequence[Glance]) -> int:
    """Keys and values of a batch of the longest, and a pass over the most prompt tokens at once."""
    language = sized.model.geometry.language
    rows = min(settings.batch, len(asked))
    longest = max(sample.tokens for sample in asked) + settings.max_new_tokens
    cache = min(CACHE_BYTES, rows * longest * token_bytes(language, on.dtype))
    prompts = min(PREFILL_TOKENS, sum(sample.tokens for sample in asked))
    inner = 3 * language.mlp_width + 4 * language.width
    return cache + prompts * inner * on.dtype.itemsize
