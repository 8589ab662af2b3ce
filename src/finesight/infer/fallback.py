"""Greedy generation by transformers, for families without native code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from finesight.encode.borrowed import transformers
from finesight.encode.encoded import Encoded
from finesight.encode.pack import pack
from finesight.model.fallback import FallbackModel


@torch.no_grad()
def generate(
    model: FallbackModel,
    prompts: Sequence[Encoded],
    *,
    max_new_tokens: int,
    end_ids: Sequence[int],
    ended: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """The most probable next token, again and again, one prompt after the other: the token ids of
    each answer. The arguments mean what they mean in `infer.engine.generate`."""
    tell = ended or _nobody

    def told(ids_1T: Tensor, scores: object, **_: Any) -> Tensor:
        """A criterion that never stops the generation, but may raise."""
        tell(0)
        return torch.zeros(len(ids_1T), dtype=torch.bool, device=ids_1T.device)

    package = transformers()
    greedy = package.GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(end_ids),
        pad_token_id=end_ids[0],
    )
    answers: list[list[int]] = []
    for prompt in prompts:
        batch = pack([prompt]).to(model.inner.device)
        made_1T = model.inner.generate(
            **model.inputs_of(batch),
            generation_config=greedy,
            stopping_criteria=package.StoppingCriteriaList([told]),
        )
        answers.append(made_1T[0, prompt.outline.tokens :].tolist())
        tell(1)
    return answers


def _nobody(count: int) -> None:
    """Nobody is told."""
