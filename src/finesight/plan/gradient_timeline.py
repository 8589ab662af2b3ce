"""Estimate the gradient memory at each point of the backward pass.

Gradients accumulate until the optimizer step, while saved activations are freed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from itertools import accumulate

from torch import nn

from finesight.model.vlm import VisionLanguageModel


@dataclass(frozen=True, slots=True)
class GradientTimeline:
    """Bytes of gradients that exist at each point of the backward pass.

    Attributes:
        at_layer: Bytes at the start of the backward pass of each decoder layer.
        at_block: Bytes at the start of the backward pass of each vision encoder block.
        at_embedding: Bytes when the embedding gradient is computed.
        at_end: Bytes of all gradients.
    """

    at_layer: tuple[int, ...]
    at_block: tuple[int, ...]
    at_embedding: int
    at_end: int

    @classmethod
    def from_model(
        cls, model: VisionLanguageModel, accumulated_ids: Collection[int]
    ) -> GradientTimeline:
        """Build the timeline from the trainable parameters of a model.

        Args:
            model: Model with trainable and frozen parameters.
            accumulated_ids: ids of parameters to leave out. Their gradients are added to the
                gradient accumulation buffer immediately (`train.grad_accumulation`).
        """

        def count_grad_bytes(module: nn.Module) -> int:
            parameters = (
                p for p in module.parameters() if p.requires_grad and id(p) not in accumulated_ids
            )
            return sum(p.nbytes for p in parameters)

        decoder, encoder = model.model, model.visual
        head_bytes = count_grad_bytes(decoder.norm) + (
            0 if model.lm_head is None else count_grad_bytes(model.lm_head)
        )
        *at_layer, decoder_bytes = _suffix_sums(head_bytes, map(count_grad_bytes, decoder.layers))
        merger_bytes = count_grad_bytes(encoder.merger) + count_grad_bytes(
            encoder.deepstack_merger_list
        )
        *at_block, _ = _suffix_sums(
            decoder_bytes + merger_bytes, map(count_grad_bytes, encoder.blocks)
        )
        at_embedding = decoder_bytes + count_grad_bytes(encoder)
        at_end = at_embedding + count_grad_bytes(decoder.embed_tokens)
        return cls(tuple(at_layer), tuple(at_block), at_embedding, at_end)


def _suffix_sums(initial: int, values: Iterable[int]) -> list[int]:
    """Return, for each index, `initial` plus the sum of all later values.

    The total is appended.
    """
    *sums, total = accumulate(reversed([*values]), initial=initial)
    return [*reversed(sums), total]
