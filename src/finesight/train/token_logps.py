"""Log-probabilities of labels, computed in chunks that bound the memory of the logits.

Shapes: L supervised tokens, D model width, V vocabulary size, C rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from finesight.model.attention import pad_rows
from finesight.model.lora.fused import MAX_PADDING
from finesight.train.objectives.objective import MAX_LOGITS_BYTES


def compute_token_logps(
    h_LD: Tensor,
    head_VD: Tensor,
    labels_L: Tensor,
    temperature: float = 1.0,
    banned_ids: Sequence[int] = (),
) -> Tensor:
    """Return the log-probability of each label, [L], in fp32 or higher.

    The logits are computed in chunks of at most `MAX_LOGITS_BYTES`, and again in the backward pass.

    Args:
        h_LD: Hidden states, possibly followed by padding.
        labels_L: Labels; -1 for padding, whose result has no meaning.
        temperature: Divisor of the logits.
        banned_ids: Tokens with probability zero.
    """
    labels_L = labels_L.long().clamp(min=0)

    def compute_chunk(h_CD: Tensor, labels_C: Tensor) -> Tensor:
        rows_CD = h_CD
        if h_CD.is_cuda:
            # Libraries sum in another order for few rows.
            rows_CD = pad_rows(h_CD, MAX_PADDING)
        logits_CV = (rows_CD @ head_VD.T)[: len(h_CD)]
        logits_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
        if temperature != 1.0:
            logits_CV = logits_CV / temperature
        for banned_id in banned_ids:
            logits_CV[:, banned_id] = -torch.inf
        return logits_CV.gather(1, labels_C[:, None])[:, 0] - logits_CV.logsumexp(1)

    return map_chunks(compute_chunk, len(head_VD), h_LD[: len(labels_L)], labels_L)


def map_chunks(compute_chunk: Callable[..., Tensor], num_logits: int, *rows: Tensor) -> Tensor:
    """Return the results of a function of chunks of rows with at most `MAX_LOGITS_BYTES` of logits.

    The backward pass computes the logits again.
    """
    chunk_size = max(1, MAX_LOGITS_BYTES // (4 * num_logits))
    chunks_by_input = [torch.split(x, chunk_size) for x in rows]
    results = []
    for chunk in zip(*chunks_by_input, strict=True):
        results.append(
            checkpoint(compute_chunk, *chunk, use_reentrant=False, preserve_rng_state=False)
        )
    return torch.cat(results)
