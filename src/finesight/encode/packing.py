"""Sample packing: concatenation of samples to one batch without padding between them.

With context parallelism, one long sample is split across several ranks. Each rank processes two
token ranges and some frames of the images and videos. One token range is from the front and one is
at the same distance from the end, so that causal attention is balanced (Llama Team 2024,
arXiv:2407.21783, section 3.3.2).

Shapes: S sequences, T tokens, N patches, M placeholder tokens, L supervised tokens.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from finesight.encode.tokenization import EncodedSample, TokenizedSample
from finesight.vision.image_processing import GridTHW, concat_patches

PAD_MULTIPLE = 64
"""Multiple to which `pad_batch` pads the token, patch and logit dimensions."""

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


def copy_to_device(array: NDArray[np.generic], device: torch.device) -> Tensor:
    """Copy a NumPy array to `device`, asynchronously on a GPU."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Packed batch of concatenated sequences, with the patches of all images in token order.

    A sequence is one sample, or one response of a preference pair. With a shared prefix, the first
    sequence is the prefix of all others, which continue it.

    Attributes:
        cu_seqlens_S1: Cumulative sequence lengths, starting at 0 (int32).
        patches_ND: Patches. They store a single frame if all frames of every patch are equal, as
            for images.
        logit_indices_L: Indices of tokens whose logits predict a supervised token. Padding added by
            `pad_batch` has no label.
        hf_inputs: Other model inputs by name, for a batch of one sample of a non-native family.
        context_shard: Shard of a sample under context parallelism, else None. All other fields are
            sharded, too.
        prefix_length: Length of the shared prefix; 0 without one.
        loss_inputs: Inputs of the objective by name, each [L], such as advantages of tokens.
    """

    sample_ids: tuple[str, ...]
    lengths: tuple[int, ...]
    grid_thw: tuple[GridTHW, ...]
    ids_T: Tensor
    position_ids_3T: Tensor
    cu_seqlens_S1: Tensor
    patches_ND: Tensor
    visual_indices_M: Tensor
    logit_indices_L: Tensor
    labels_L: Tensor
    hf_inputs: Mapping[str, Tensor] = field(default_factory=dict)
    context_shard: ContextShard | None = None
    prefix_length: int = 0
    loss_inputs: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def num_samples(self) -> int:
        """Number of samples; a context-parallel sample counts on rank 0 only."""
        is_first = self.context_shard is None or self.context_shard.rank == 0
        return len(self.sample_ids) if is_first else 0

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all samples, with the shared prefix counted for each sample."""
        return sum(self.lengths) + self.prefix_length * max(0, len(self.sample_ids) - 1)

    @property
    def num_supervised_tokens(self) -> int:
        return len(self.labels_L)

    def to(self, device: torch.device) -> PackedBatch:
        """Copy the batch to a device; copies from pinned memory are asynchronous."""
        return replace(
            self,
            ids_T=self.ids_T.to(device, non_blocking=True),
            position_ids_3T=self.position_ids_3T.to(device, non_blocking=True),
            cu_seqlens_S1=self.cu_seqlens_S1.to(device, non_blocking=True),
            patches_ND=self.patches_ND.to(device, non_blocking=True),
            visual_indices_M=self.visual_indices_M.to(device, non_blocking=True),
            logit_indices_L=self.logit_indices_L.to(device, non_blocking=True),
            labels_L=self.labels_L.to(device, non_blocking=True),
            hf_inputs=_copy_tensors(self.hf_inputs, device),
            loss_inputs=_copy_tensors(self.loss_inputs, device),
        )


def _copy_tensors(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}


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
        first_image = tokenized.spans[0].start if tokenized.spans else tokenized.num_tokens
        ids_P = tokenized.ids_T[: max(0, min(first_supervised - 1, first_image))]
        return cls(ids_P, len(ids_P))

    def intersect(self, other: SharedPrefix) -> SharedPrefix:
        """Return the common prefix of two groups of samples."""
        min_length = min(self.min_length, other.min_length)
        end = min(len(self.ids_P), len(other.ids_P))
        mismatches = np.flatnonzero(self.ids_P[:end] != other.ids_P[:end])
        return SharedPrefix(self.ids_P[: mismatches[0] if len(mismatches) else end], min_length)

    @property
    def length(self) -> int:
        """Number of prefix tokens to share.

        A multiple of PREFIX_MULTIPLE if the samples diverge after it.
        """
        common_length = len(self.ids_P)
        is_complete = common_length == self.min_length
        return common_length - (0 if is_complete else common_length % PREFIX_MULTIPLE)


def effective_prefix_length(prefix_length: int, lengths: Sequence[int]) -> int:
    """Return the shared prefix length, or 0 if sharing saves too few tokens."""
    num_saved = prefix_length * (len(lengths) - 1)
    return prefix_length if num_saved * MIN_PREFIX_SAVING >= sum(lengths) else 0


def find_shared_prefix_length(tokenized_samples: Sequence[TokenizedSample]) -> int:
    """Return the number of prefix tokens that a packed batch of these samples should share."""
    if not tokenized_samples:
        return 0
    prefixes = map(SharedPrefix.from_sample, tokenized_samples)
    lengths = [tokenized.num_packed_tokens for tokenized in tokenized_samples]
    return effective_prefix_length(reduce(SharedPrefix.intersect, prefixes).length, lengths)


def compute_context_lengths(lengths: Sequence[int], prefix_length: int) -> tuple[int, ...]:
    """Return the number of context tokens of each sequence, including the shared prefix.

    The first of `lengths` is that of the shared prefix itself.
    """
    prefix, *others = lengths
    return prefix, *(prefix_length + length for length in others)


def compute_cu_seqlens(lengths: Sequence[int]) -> NDArray[np.int32]:
    """Return the cumulative lengths of packed sequences, starting at 0."""
    return np.cumsum([0, *lengths], dtype=np.int32)


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
    assert len(samples) == 1 or not first_sample.hf_inputs, (
        f"{first_sample.tokenized.id} must be packed alone"
    )
    tokenized_samples = [item.tokenized for item in samples]
    prefix_length = prefix_length if len(tokenized_samples) > 1 else 0
    # Inputs of an HF processor require all tokens of the sample.
    ends = [
        tokenized.num_tokens if first_sample.hf_inputs else tokenized.num_packed_tokens
        for tokenized in tokenized_samples
    ]
    ranges = zip(tokenized_samples, ends, strict=True)
    token_ranges = [(one, prefix_length, end) for one, end in ranges]
    if first_sample.tokenized.response_starts:
        assert len(samples) == 1, f"{first_sample.tokenized.id} must be packed alone"
        # The prompt with its images is the shared prefix of the responses.
        limits = 0, *first_sample.tokenized.response_starts, *ends
        prefix_length = limits[1]
        token_ranges = [(tokenized_samples[0], *limit) for limit in pairwise(limits)]
    elif prefix_length:
        prefixes = map(SharedPrefix.from_sample, tokenized_samples)
        common_length = len(reduce(SharedPrefix.intersect, prefixes).ids_P)
        assert prefix_length <= common_length, (
            f"the samples share {common_length} tokens, not {prefix_length}"
        )
        token_ranges.insert(0, (tokenized_samples[0], 0, prefix_length))
    lengths = [end - start for _, start, end in token_ranges]
    cu_seqlens = compute_cu_seqlens(lengths)
    # Index of each sample's first token if the prefix directly preceded its other tokens.
    sample_offsets = cu_seqlens[-len(tokenized_samples) - 1 : -1] - prefix_length
    if first_sample.tokenized.response_starts:
        sample_offsets = cu_seqlens[:1]
    ids_T = np.concatenate([one.ids_T[a:b] for one, a, b in token_ranges])
    logit_indices, labels = [], []
    for (one, start, end), offset in zip(token_ranges, cu_seqlens[:-1], strict=True):
        supervised = np.flatnonzero(one.loss_mask_T[start + 1 : end + 1])
        logit_indices.append(offset + supervised)
        labels.append(one.ids_T[start + 1 + supervised])
    visual_indices = [
        np.arange(start + span.start, start + span.stop)
        for start, tokenized in zip(sample_offsets, tokenized_samples, strict=True)
        for span in tokenized.spans
    ]
    empty = np.empty(0, dtype=np.int64)
    position_ids_3T = np.concatenate([one.position_ids_3T[:, a:b] for one, a, b in token_ranges], 1)
    return PackedBatch(
        sample_ids=tuple(tokenized.id for tokenized in tokenized_samples),
        lengths=tuple(lengths),
        grid_thw=tuple(span.grid_thw for one in tokenized_samples for span in one.spans),
        ids_T=torch.from_numpy(ids_T.astype(np.int64)),
        position_ids_3T=torch.from_numpy(position_ids_3T.astype(np.int64)),
        cu_seqlens_S1=torch.from_numpy(cu_seqlens),
        patches_ND=torch.from_numpy(
            concat_patches([one.patches_ND for one in samples], patch_buffer)
        ),
        visual_indices_M=torch.from_numpy(np.concatenate([empty, *visual_indices])),
        logit_indices_L=torch.from_numpy(np.concatenate(logit_indices)),
        labels_L=torch.from_numpy(np.concatenate(labels).astype(np.int64)),
        hf_inputs=first_sample.hf_inputs,
        prefix_length=prefix_length,
    )


def pad_batch(batch: PackedBatch, merge_size: int | None) -> PackedBatch:
    """Append a dummy sequence so that batch dimensions are multiples of PAD_MULTIPLE.

    Pads the tokens, patches and logit indices. The dummy sequence continues the shared prefix and
    has no labels, so `logit_indices_L` is longer than `labels_L`.

    Args:
        merge_size: Number of patches per side of a merged token; None for a vision encoder with a
            fixed image size, whose patches are not padded.
    """
    patches_ND, grid_thw = batch.patches_ND, batch.grid_thw
    if merge_size is not None:
        patches_ND, grid_thw = pad_patches(patches_ND, grid_thw, merge_size)
    num_features = (len(patches_ND) - len(batch.patches_ND)) // (merge_size or 1) ** 2
    num_tokens = num_features + 1
    num_tokens += -(len(batch.ids_T) + num_tokens) % PAD_MULTIPLE
    padded = _append_dummy_sequence(batch, num_tokens, num_features, patches_ND, grid_thw)
    return replace(
        padded,
        logit_indices_L=F.pad(
            batch.logit_indices_L, (0, -len(batch.logit_indices_L) % PAD_MULTIPLE)
        ),
    )


def append_dummy_image(
    batch: PackedBatch, dummy_grid: GridTHW, num_features: int, patch_dim: int
) -> PackedBatch:
    """Append a dummy sequence with a blank image to a batch without images.

    With sharded parameters, all ranks must run the vision encoder in the same steps.

    Args:
        dummy_grid: Patch grid of the image (time, height, width).
    """
    assert not batch.grid_thw, f"the batch already has {len(batch.grid_thw)} images"
    patches_ND = batch.patches_ND.new_zeros(math.prod(dummy_grid), patch_dim)
    return _append_dummy_sequence(batch, num_features + 1, num_features, patches_ND, (dummy_grid,))


def dummy_batch() -> PackedBatch:
    """Return a packed batch with one dummy token that predicts itself."""
    zeros = torch.zeros(1, dtype=torch.int64)
    return PackedBatch(
        sample_ids=(),
        lengths=(1,),
        grid_thw=(),
        ids_T=zeros,
        position_ids_3T=zeros.expand(3, 1),
        cu_seqlens_S1=torch.tensor([0, 1], dtype=torch.int32),
        patches_ND=torch.empty(0, 0, dtype=torch.uint8),
        visual_indices_M=zeros[:0],
        logit_indices_L=zeros,
        labels_L=zeros,
    )


def _append_dummy_sequence(
    batch: PackedBatch,
    num_tokens: int,
    num_features: int,
    patches_ND: Tensor,
    grid_thw: tuple[GridTHW, ...],
) -> PackedBatch:
    """Append a dummy sequence whose first `num_features` tokens are image placeholders."""
    end, dummy_ids = len(batch.ids_T), batch.ids_T.new_zeros(num_tokens)
    offsets = torch.arange(num_tokens, device=dummy_ids.device)
    return replace(
        batch,
        lengths=(*batch.lengths, num_tokens),
        grid_thw=grid_thw,
        ids_T=torch.cat([batch.ids_T, dummy_ids]),
        position_ids_3T=torch.cat([batch.position_ids_3T, offsets.expand(3, -1)], dim=1),
        cu_seqlens_S1=torch.cat([batch.cu_seqlens_S1, batch.cu_seqlens_S1[-1:] + num_tokens]),
        patches_ND=patches_ND,
        visual_indices_M=torch.cat([batch.visual_indices_M, end + offsets[:num_features]]),
    )


def pad_patches(
    patches_ND: Tensor, grid_thw: tuple[GridTHW, ...], merge_size: int
) -> tuple[Tensor, tuple[GridTHW, ...]]:
    """Append a dummy image that pads the number of patches to a multiple of PAD_MULTIPLE."""
    num_merged = -len(patches_ND) % math.lcm(PAD_MULTIPLE, merge_size**2) // merge_size**2
    dummy_grids = ((1, merge_size, num_merged * merge_size),) if num_merged else ()
    return F.pad(patches_ND, (0, 0, 0, num_merged * merge_size**2)), grid_thw + dummy_grids


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
        fitting = (pack for pack, free in enumerate(free_tokens) if free >= length)
        pack_index = next(fitting, len(packs))
        if pack_index == len(packs):
            packs.append([])
            free_tokens.append(token_budget - prefix_length)
        packs[pack_index].append(index)
        free_tokens[pack_index] -= length
    return packs


def compute_min_budget(lengths: Sequence[int], prefix_length: int = 0) -> int:
    """Return the smallest token budget with which `plan_packs` creates one pack."""
    return prefix_length + sum(_compute_budget_length(length, prefix_length) for length in lengths)


def _compute_budget_length(length: int, prefix_length: int) -> int:
    return max(length - prefix_length, length // MAX_CONTEXT_RATIO) if prefix_length else length


IndexRange = tuple[int, int]
"""Half-open index range [start, stop)."""


class SampleShape(NamedTuple):
    """Sizes of a sample that determine its compute: tokens, patch grids, supervised tokens."""

    lengths: tuple[int, ...]
    grid_thw: tuple[GridTHW, ...]
    num_supervised_tokens: int

    @property
    def prefix_length(self) -> int:
        """Always 0: a sharded sample has no shared prefix."""
        return 0


@dataclass(frozen=True, slots=True)
class ContextShard:
    """Part of a sample that one rank processes under context parallelism.

    Attributes:
        feature_ranges: Ranges of all vision features that the two token ranges of this rank need.
    """

    rank: int
    world_size: int
    sample_shape: SampleShape
    token_ranges: tuple[IndexRange, IndexRange]
    patch_range: IndexRange
    grid_thw: tuple[GridTHW, ...]
    features_per_rank: tuple[int, ...]
    feature_ranges: tuple[IndexRange, IndexRange]

    @classmethod
    def from_sample(cls, tokenized: TokenizedSample, rank: int, world_size: int) -> ContextShard:
        """Create the shard of a tokenized sample for one rank."""
        grid_thw = tuple(span.grid_thw for span in tokenized.spans)
        # The vision encoder encodes the temporal steps of a video separately.
        frames = [n for n, (t, _, _) in enumerate(grid_thw) for _ in range(t)]
        frame_patches = [math.prod(grid_thw[n][1:]) for n in frames]
        num_features = [span.stop - span.start for span in tokenized.spans]
        frame_ranges = _balance_ranges(frame_patches, world_size)
        patch_offsets = [0, *accumulate(frame_patches)]
        first_frame, end_frame = frame_ranges[rank]
        token_ranges = _split_tokens(tokenized.num_packed_tokens, rank, world_size)
        placeholder_positions = [
            position for span in tokenized.spans for position in range(span.start, span.stop)
        ]
        front, back = (
            (bisect_left(placeholder_positions, a), bisect_left(placeholder_positions, b))
            for a, b in token_ranges
        )
        return cls(
            rank=rank,
            world_size=world_size,
            sample_shape=SampleShape(
                (tokenized.num_packed_tokens,), grid_thw, tokenized.num_supervised_tokens
            ),
            token_ranges=token_ranges,
            patch_range=(patch_offsets[first_frame], patch_offsets[end_frame]),
            # One grid per image or video of consecutive frames.
            grid_thw=tuple(
                (count, *grid_thw[n][1:])
                for n, count in Counter(frames[first_frame:end_frame]).items()
            ),
            features_per_rank=tuple(
                sum(num_features[n] // grid_thw[n][0] for n in frames[a:b]) for a, b in frame_ranges
            ),
            feature_ranges=(front, back),
        )

    @property
    def num_tokens(self) -> int:
        """Number of packed tokens of the full sample."""
        return self.sample_shape.lengths[0]

    @property
    def lengths(self) -> list[int]:
        """Lengths of the two token ranges of this rank."""
        return [stop - start for start, stop in self.token_ranges]

    @property
    def max_range_length(self) -> int:
        """Length of the longest token range of any rank."""
        return -(-self.num_tokens // (2 * self.world_size))

    def shard_batch(self, batch: PackedBatch) -> PackedBatch:
        """Return the part of a packed batch that this rank processes.

        The batch must contain only this sample, with the patches of this rank.
        """
        token_indices_T = torch.cat(
            [torch.arange(*token_range) for token_range in self.token_ranges]
        )
        local_index_T = torch.full((self.num_tokens,), -1)
        local_index_T[token_indices_T] = torch.arange(len(token_indices_T))
        logit_indices_L, visual_indices_M = (
            local_index_T[batch.logit_indices_L],
            local_index_T[batch.visual_indices_M],
        )
        is_local_L = logit_indices_L >= 0
        logit_indices_L, labels_L = logit_indices_L[is_local_L], batch.labels_L[is_local_L]
        if not len(logit_indices_L):
            # Add a token without a label, so that the backward pass runs on this rank, too.
            logit_indices_L = F.pad(logit_indices_L, (0, 1))
        return replace(
            batch,
            lengths=(len(token_indices_T),),
            grid_thw=self.grid_thw,
            ids_T=batch.ids_T[token_indices_T],
            position_ids_3T=batch.position_ids_3T[:, token_indices_T],
            cu_seqlens_S1=torch.tensor([0, len(token_indices_T)], dtype=torch.int32),
            visual_indices_M=visual_indices_M[visual_indices_M >= 0],
            logit_indices_L=logit_indices_L,
            labels_L=labels_L,
            context_shard=self,
        )


def _split_tokens(num_tokens: int, rank: int, world_size: int) -> tuple[IndexRange, IndexRange]:
    size = -(-num_tokens // (2 * world_size))
    first, second = (
        (min(num_tokens, chunk_index * size), min(num_tokens, (chunk_index + 1) * size))
        for chunk_index in (rank, 2 * world_size - 1 - rank)
    )
    return first, second


def _balance_ranges(costs: list[int], world_size: int) -> list[IndexRange]:
    """Split items with costs into one consecutive range per rank, with balanced costs."""
    middles = [end - cost / 2 for end, cost in zip(accumulate(costs), costs, strict=True)]
    total_cost = sum(costs)
    starts = [bisect_left(middles, total_cost * rank / world_size) for rank in range(world_size)]
    return list(zip(starts, [*starts[1:], len(costs)], strict=True))
