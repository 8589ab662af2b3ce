"""Sample packing: concatenation of samples to one batch without padding between them.

Shapes: S sequences, T tokens, N patches, M placeholder tokens, P prefix tokens, L supervised
tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from finesight.encode.batch import PackedBatch, compute_cu_seqlens
from finesight.encode.tokenization import EncodedSample, TokenizedSample
from finesight.vision.image_processing import GridTHW, concat_patches

PREFIX_MULTIPLE = 4
"""Length multiple to which a shared prefix is truncated if the samples diverge after it.

This limits the number of distinct prefix lengths.
"""

MIN_PREFIX_SAVING = 50
"""A prefix is shared only if this saves at least 1 / MIN_PREFIX_SAVING of the tokens."""

MAX_CONTEXT_RATIO = 4
"""Maximum ratio of context tokens, including the shared prefix, to packed tokens.

Attention copies the keys of the shared prefix for each sequence.
"""


class SharedPrefix(NamedTuple):
    """Common token prefix of one or more samples, which a packed batch contains only once."""

    ids_P: NDArray[np.int32]
    min_length: int

    @classmethod
    def from_sample(cls, tokenized: TokenizedSample) -> SharedPrefix:
        """Return the longest prefix that a sample can share with other samples.

        It ends before the first image and before the token that predicts the first supervised
        token. Position ids of its tokens are independent of the rest of the sample.
        """
        first_supervised = int(np.append(tokenized.loss_mask_T, True).argmax())
        length = first_supervised - 1
        if tokenized.spans:
            length = min(length, tokenized.spans[0].start)
        ids_P = tokenized.ids_T[: max(0, length)]
        return cls(ids_P, len(ids_P))

    def intersect(self, other: SharedPrefix) -> SharedPrefix:
        """Return the common prefix of two groups of samples."""
        min_length = min(self.min_length, other.min_length)
        end = min(len(self.ids_P), len(other.ids_P))
        mismatches = np.flatnonzero(self.ids_P[:end] != other.ids_P[:end])
        if len(mismatches):
            end = int(mismatches[0])
        return SharedPrefix(self.ids_P[:end], min_length)

    @property
    def length(self) -> int:
        """Number of prefix tokens to share.

        A multiple of PREFIX_MULTIPLE if the samples diverge after it.
        """
        common_length = len(self.ids_P)
        if common_length == self.min_length:
            return common_length
        return common_length - common_length % PREFIX_MULTIPLE


def effective_prefix_length(prefix_length: int, lengths: Sequence[int]) -> int:
    """Return the shared prefix length, or 0 if sharing saves too few tokens."""
    num_saved = prefix_length * (len(lengths) - 1)
    if num_saved * MIN_PREFIX_SAVING < sum(lengths):
        return 0
    return prefix_length


def find_shared_prefix_length(tokenized_samples: Sequence[TokenizedSample]) -> int:
    """Return the number of prefix tokens that a packed batch of these samples should share."""
    if not tokenized_samples:
        return 0
    prefixes = map(SharedPrefix.from_sample, tokenized_samples)
    lengths = [tokenized.num_packed_tokens for tokenized in tokenized_samples]
    return effective_prefix_length(reduce(SharedPrefix.intersect, prefixes).length, lengths)


class _TokenRange(NamedTuple):
    """Tokens [start, stop) of a sample, which are one sequence of a packed batch."""

    tokenized: TokenizedSample
    start: int
    stop: int


def pack(
    samples: Sequence[EncodedSample],
    patch_buffer: NDArray[np.uint8] | None = None,
    prefix_length: int = 0,
) -> PackedBatch:
    """Concatenate samples to a packed batch on CPU, in the given order.

    Trailing tokens that cannot affect the loss are omitted. A supervised token is predicted by the
    previous token of its sample; the first token of a sample is never supervised. Token ids,
    position ids and indices are int64, `cu_seqlens_S1` is int32 (as variable-length attention
    requires), patches are uint8.

    Args:
        patch_buffer: Output array for the patches; None to allocate one.
    """
    assert samples, "cannot pack 0 samples"
    first_sample = samples[0]
    assert len(samples) == 1 or not any(sample.hf_inputs for sample in samples), (
        f"{first_sample.tokenized.id} must be packed alone"
    )
    if first_sample.tokenized.response_starts:
        assert len(samples) == 1, f"{first_sample.tokenized.id} must be packed alone"
        ranges = _split_responses(first_sample)
        # The prompt with its images is the shared prefix of the responses.
        prefix_length = ranges[0].stop
    else:
        if len(samples) == 1:
            prefix_length = 0
        ranges = _select_ranges(samples, prefix_length)
    lengths = [one.stop - one.start for one in ranges]
    cu_seqlens = compute_cu_seqlens(lengths)

    ids = []
    position_ids = []
    logit_indices = []
    labels = []
    for (tokenized, start, stop), offset in zip(ranges, cu_seqlens[:-1], strict=True):
        ids.append(tokenized.ids_T[start:stop])
        position_ids.append(tokenized.position_ids_3T[:, start:stop])
        supervised = np.flatnonzero(tokenized.loss_mask_T[start + 1 : stop + 1])
        logit_indices.append(offset + supervised)
        labels.append(tokenized.ids_T[start + 1 + supervised])

    if first_sample.tokenized.response_starts:
        sample_offsets = cu_seqlens[:1]
    else:
        # Index of each sample's first token if the prefix directly preceded its other tokens.
        sample_offsets = cu_seqlens[-len(samples) - 1 : -1] - prefix_length
    grids: list[GridTHW] = []
    visual_indices = [np.empty(0, dtype=np.int64)]
    for sample, offset in zip(samples, sample_offsets, strict=True):
        for span in sample.tokenized.spans:
            grids.append(span.grid_thw)
            visual_indices.append(np.arange(offset + span.start, offset + span.stop))

    patches = [array for one in samples for array in one.list_patches()]
    patches_ND = concat_patches(patches, patch_buffer)
    return PackedBatch(
        sample_ids=tuple(one.tokenized.id for one in samples),
        lengths=tuple(lengths),
        grid_thw=tuple(grids),
        ids_T=torch.from_numpy(np.concatenate(ids).astype(np.int64)),
        position_ids_3T=torch.from_numpy(np.concatenate(position_ids, 1).astype(np.int64)),
        cu_seqlens_S1=torch.from_numpy(cu_seqlens),
        patches_ND=torch.from_numpy(patches_ND),
        visual_indices_M=torch.from_numpy(np.concatenate(visual_indices)),
        logit_indices_L=torch.from_numpy(np.concatenate(logit_indices)),
        labels_L=torch.from_numpy(np.concatenate(labels).astype(np.int64)),
        hf_inputs=first_sample.hf_inputs,
        prefix_length=prefix_length,
    )


def _split_responses(sample: EncodedSample) -> list[_TokenRange]:
    """Return the prompt of a sample, then each of its responses."""
    tokenized = sample.tokenized
    limits = (0, *tokenized.response_starts, _count_required_tokens(sample))
    return [_TokenRange(tokenized, start, stop) for start, stop in pairwise(limits)]


def _select_ranges(samples: Sequence[EncodedSample], prefix_length: int) -> list[_TokenRange]:
    """Return the shared prefix, if any, then the other tokens of each sample."""
    ranges: list[_TokenRange] = []
    if prefix_length:
        prefixes = [SharedPrefix.from_sample(one.tokenized) for one in samples]
        common_length = len(reduce(SharedPrefix.intersect, prefixes).ids_P)
        assert prefix_length <= common_length, (
            f"the samples share {common_length} tokens, not {prefix_length}"
        )
        ranges.append(_TokenRange(samples[0].tokenized, 0, prefix_length))
    for sample in samples:
        stop = _count_required_tokens(sample)
        ranges.append(_TokenRange(sample.tokenized, prefix_length, stop))
    return ranges


def _count_required_tokens(sample: EncodedSample) -> int:
    # Inputs of an HF processor require all tokens of the sample.
    if sample.hf_inputs:
        return sample.tokenized.num_tokens
    return sample.tokenized.num_packed_tokens


def plan_sample_packs(
    samples: Sequence[EncodedSample], token_budget: int, *, use_shared_prefix: bool
) -> tuple[list[list[int]], int]:
    """Return the samples of each pack by position, and the length of their shared prefix.

    Inputs of a Hugging Face processor cannot be packed, and a pair is a pack of its own.
    """
    tokenized: list[TokenizedSample] = []
    lengths: list[int] = []
    for sample in samples:
        tokenized.append(sample.tokenized)
        lengths.append(sample.tokenized.num_packed_tokens)
        if sample.hf_inputs or sample.tokenized.response_starts:
            token_budget = 1
    prefix_length = 0
    if use_shared_prefix:
        prefix_length = find_shared_prefix_length(tokenized)
    return plan_packs(lengths, token_budget, prefix_length), prefix_length


def plan_packs(
    lengths: Sequence[int], token_budget: int, prefix_length: int = 0
) -> list[list[int]]:
    """Assign samples to packs of at most `token_budget` tokens by first-fit packing.

    The result depends on the arguments only. Packs, and the samples within a pack, keep the given
    order. A sample longer than the budget is packed alone. A shared prefix counts once per pack,
    but each sample counts as at least 1 / MAX_CONTEXT_RATIO of its tokens.
    """
    packs: list[list[int]] = []
    free_tokens: list[int] = []
    for index, sample_length in enumerate(lengths):
        length = _compute_budget_length(sample_length, prefix_length)
        for pack_index, free in enumerate(free_tokens):
            if free >= length:
                packs[pack_index].append(index)
                free_tokens[pack_index] -= length
                break
        else:
            packs.append([index])
            free_tokens.append(token_budget - prefix_length - length)
    return packs


def compute_min_budget(lengths: Sequence[int], prefix_length: int = 0) -> int:
    """Return the smallest token budget with which `plan_packs` creates one pack."""
    return prefix_length + sum(_compute_budget_length(length, prefix_length) for length in lengths)


def _compute_budget_length(length: int, prefix_length: int) -> int:
    if not prefix_length:
        return length
    return max(length - prefix_length, length // MAX_CONTEXT_RATIO)
