"""Context parallelism: one long sample is split across several ranks.

Each rank processes two token ranges and some frames of the images and videos. One token range is
from the front and one is at the same distance from the end, so that causal attention is balanced
(Llama Team 2024, arXiv:2407.21783, section 3.3.2).
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from finesight.encode.tokenization import TokenizedSample
from finesight.vision.image_processing import GridTHW

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
