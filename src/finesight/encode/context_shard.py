"""Context parallelism: one long sample is split across several ranks.

Each rank processes two token ranges and some frames of the images and videos. One token range is
from the front and one is at the same distance from the end, so that causal attention is balanced
(Llama Team 2024, arXiv:2407.21783, section 3.3.2).

Shapes: T tokens of the full sample, M placeholder tokens of its images.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate, groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F

from finesight.encode.packing import PackedBatch
from finesight.encode.tokenized_sample import GridTHW, TokenizedSample

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


class _Frame(NamedTuple):
    """Temporal step of an image or video, which the vision encoder encodes separately."""

    span_index: int
    grid_thw: GridTHW
    num_features: int

    @property
    def num_patches(self) -> int:
        _, height, width = self.grid_thw
        return height * width


@dataclass(frozen=True, slots=True)
class ContextShard:
    """Part of a sample that one rank processes under context parallelism.

    Attributes:
        token_ranges: The two token ranges of this rank.
        patch_range: Range of patches that this rank encodes.
        grid_thw: Grids of these patches.
        features_per_rank: Number of vision features that each rank computes.
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
        frames = [*_iter_frames(tokenized)]
        frame_ranges = _balance_ranges([frame.num_patches for frame in frames], world_size)
        patch_offsets = [0, *accumulate(frame.num_patches for frame in frames)]
        first_frame, end_frame = frame_ranges[rank]
        own_frames = frames[first_frame:end_frame]
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
            grid_thw=tuple(_merge_frame_grids(own_frames)),
            features_per_rank=tuple(
                sum(frame.num_features for frame in frames[a:b]) for a, b in frame_ranges
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


def _iter_frames(tokenized: TokenizedSample) -> Iterator[_Frame]:
    for span_index, span in enumerate(tokenized.spans):
        grid_t, height, width = span.grid_thw
        num_features = (span.stop - span.start) // grid_t
        for _ in range(grid_t):
            yield _Frame(span_index, (1, height, width), num_features)


def _balance_ranges(costs: list[int], world_size: int) -> list[IndexRange]:
    """Split items with costs into one consecutive range per rank, with balanced costs."""
    middles = [end - cost / 2 for end, cost in zip(accumulate(costs), costs, strict=True)]
    total_cost = sum(costs)
    starts = [bisect_left(middles, total_cost * rank / world_size) for rank in range(world_size)]
    return list(zip(starts, [*starts[1:], len(costs)], strict=True))


def _merge_frame_grids(frames: list[_Frame]) -> Iterator[GridTHW]:
    """Yield one patch grid per image or video of consecutive frames."""
    for _, group in groupby(frames, lambda frame: frame.span_index):
        group_frames = [*group]
        _, height, width = group_frames[0].grid_thw
        yield len(group_frames), height, width
