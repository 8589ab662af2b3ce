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
    if device.type != "cuda":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


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


def compute_context_lengths(lengths: Sequence[int], prefix_length: int) -> tuple[int, ...]:
    """Return the number of context tokens of each sequence, including the shared prefix.

    The first of `lengths` is that of the shared prefix itself.
    """
    prefix, *others = lengths
    return prefix, *(prefix_length + length for length in others)


def compute_cu_seqlens(lengths: Sequence[int]) -> NDArray[np.int32]:
    """Return the cumulative lengths of packed sequences, starting at 0."""
    return np.cumsum([0, *lengths], dtype=np.int32)


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

    patches_ND = concat_patches([one.patches_ND for one in samples], patch_buffer)
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


def pad_batch(batch: PackedBatch, merge_size: int | None) -> PackedBatch:
    """Append a dummy sequence so that batch dimensions are multiples of PAD_MULTIPLE.

    Pads the tokens, patches and logit indices. The dummy sequence continues the shared prefix and
    has no labels, so `logit_indices_L` is longer than `labels_L`.

    Args:
        merge_size: Number of patches per side of a merged token; None for a vision encoder with a
            fixed image size, whose patches are not padded.
    """
    patches_ND = batch.patches_ND
    grid_thw = batch.grid_thw
    num_features = 0
    if merge_size is not None:
        patches_ND, grid_thw = pad_patches(patches_ND, grid_thw, merge_size)
        num_features = (len(patches_ND) - len(batch.patches_ND)) // merge_size**2
    num_tokens = num_features + 1
    num_tokens += -(len(batch.ids_T) + num_tokens) % PAD_MULTIPLE
    padded = _append_dummy_sequence(batch, num_tokens, num_features, patches_ND, grid_thw)
    num_padding_logits = -len(batch.logit_indices_L) % PAD_MULTIPLE
    return replace(padded, logit_indices_L=F.pad(batch.logit_indices_L, (0, num_padding_logits)))


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
    end = len(batch.ids_T)
    dummy_ids = batch.ids_T.new_zeros(num_tokens)
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
    if num_merged:
        grid_thw = (*grid_thw, (1, merge_size, num_merged * merge_size))
    return F.pad(patches_ND, (0, 0, 0, num_merged * merge_size**2)), grid_thw


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
        # The vision encoder encodes the temporal steps of a video separately.
        span_of_frame: list[int] = []
        frame_patches: list[int] = []
        frame_features: list[int] = []
        placeholder_positions: list[int] = []
        for index, span in enumerate(tokenized.spans):
            grid_t, grid_h, grid_w = span.grid_thw
            span_of_frame += [index] * grid_t
            frame_patches += [grid_h * grid_w] * grid_t
            frame_features += [(span.stop - span.start) // grid_t] * grid_t
            placeholder_positions += range(span.start, span.stop)

        frame_ranges = _balance_ranges(frame_patches, world_size)
        first_frame, end_frame = frame_ranges[rank]
        patch_offsets = [0, *accumulate(frame_patches)]
        # Frames of an image or video are consecutive, so those of this rank are a single grid.
        local_grids: list[GridTHW] = []
        for index, count in Counter(span_of_frame[first_frame:end_frame]).items():
            _, grid_h, grid_w = tokenized.spans[index].grid_thw
            local_grids.append((count, grid_h, grid_w))

        def find_features(token_range: IndexRange) -> IndexRange:
            start = bisect_left(placeholder_positions, token_range[0])
            stop = bisect_left(placeholder_positions, token_range[1])
            return start, stop

        front, back = _split_tokens(tokenized.num_packed_tokens, rank, world_size)
        return cls(
            rank=rank,
            world_size=world_size,
            sample_shape=SampleShape(
                (tokenized.num_packed_tokens,),
                tuple(span.grid_thw for span in tokenized.spans),
                tokenized.num_supervised_tokens,
            ),
            token_ranges=(front, back),
            patch_range=(patch_offsets[first_frame], patch_offsets[end_frame]),
            grid_thw=tuple(local_grids),
            features_per_rank=tuple(sum(frame_features[a:b]) for a, b in frame_ranges),
            feature_ranges=(find_features(front), find_features(back)),
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
        visual_indices_M = local_index_T[batch.visual_indices_M]
        logit_indices_L = local_index_T[batch.logit_indices_L]
        is_local_L = logit_indices_L >= 0
        labels_L = batch.labels_L[is_local_L]
        logit_indices_L = logit_indices_L[is_local_L]
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
    """Return the chunk `rank` from the front, and its counterpart from the end."""
    num_chunks = 2 * world_size
    size = -(-num_tokens // num_chunks)

    def get_chunk(index: int) -> IndexRange:
        return min(num_tokens, index * size), min(num_tokens, (index + 1) * size)

    return get_chunk(rank), get_chunk(num_chunks - 1 - rank)


def _balance_ranges(costs: list[int], world_size: int) -> list[IndexRange]:
    """Split items with costs into one consecutive range per rank, with balanced costs."""
    middles: list[float] = []
    total_cost = 0
    for cost in costs:
        total_cost += cost
        middles.append(total_cost - cost / 2)
    starts = [bisect_left(middles, total_cost * rank / world_size) for rank in range(world_size)]
    return list(zip(starts, [*starts[1:], len(costs)], strict=True))
