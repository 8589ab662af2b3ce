"""All answers to some prompts at once, greedily: for measuring, and from Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from finesight.encode.encoded import Encoded
from finesight.infer.engine import Engine, room_together
from finesight.infer.request import Request
from finesight.model.network import VisionLanguageModel


def generate(
    model: VisionLanguageModel,
    prompts: Sequence[Encoded],
    *,
    max_new_tokens: int,
    end_ids: Sequence[int],
    ended: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """The most probable next token, again and again: the token ids of each answer.

    An answer ends with one of `end_ids`, which is part of it, after `max_new_tokens` (at least 1),
    or where the model's positions end. The answers do not depend on which are made together (but
    for rounding). `ended` is told after each step how many answers ended with it, often 0: what it
    raises stops the generation.
    Raises UserError for a prompt beyond the model's positions and for numbers that overflow.
    """
    assert max_new_tokens >= 1, f"max_new_tokens is {max_new_tokens}, less than 1"
    if not prompts:
        return []
    lengths = [prompt.outline.tokens for prompt in prompts]
    tokens = room_together(model, lengths, max_new_tokens, len(prompts))
    engine = Engine(model, end_ids, rows=len(prompts), tokens=tokens)
    tickets = {}
    for number, prompt in enumerate(prompts):
        longest = min(max_new_tokens, engine.room_for(prompt))
        tickets[engine.add(Request(prompt=prompt, max_new_tokens=longest))] = number
    answers: list[list[int]] = [[] for _ in prompts]
    while engine.busy:
        done = 0
        for event in engine.step():
            if event.error is not None:
                raise event.error
            if event.token is not None:
                answers[tickets[event.ticket]].append(event.token.id)
            done += event.finish is not None
        if ended is not None:
            ended(done)
    return answers
