"""Data of one training step on a rank, and its statistics over all ranks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple
from zlib import crc32

from torch import Tensor

from finesight.encode.batch import PackedBatch


class SkippedSample(NamedTuple):
    """ID of a sample that is excluded from training, and the reason."""

    id: str
    reason: str


@dataclass(frozen=True, slots=True)
class StepBatch:
    """Data of one optimizer step on one rank; each pack is a micro-batch.

    Attributes:
        skipped: Samples that were skipped because reading or encoding failed.
        sample_indices: Corpus indices of the samples of each pack.
        cache_inputs: Vision cache inputs of each pack; empty without a vision cache.
        metrics: Metrics of the data over all ranks by name, such as rewards.
    """

    step_index: int
    packs: tuple[PackedBatch, ...]
    skipped: tuple[SkippedSample, ...]
    sample_indices: tuple[tuple[int, ...], ...]
    cache_inputs: tuple[Tensor, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def num_samples(self) -> int:
        return sum(batch.num_samples for batch in self.packs)

    @property
    def num_tokens(self) -> int:
        return sum(batch.num_tokens for batch in self.packs)

    @property
    def num_supervised_tokens(self) -> int:
        return sum(batch.num_supervised_tokens for batch in self.packs)

    @property
    def num_split_packs(self) -> int:
        """Number of packs that contain a sample split over all ranks; these packs come first."""
        return sum(batch.context_shard is not None for batch in self.packs)

    @property
    def split_checksum(self) -> int:
        """CRC-32 of the IDs of the split samples, to compare ranks; 0 without split samples."""
        names: list[str] = []
        for batch in self.packs[: self.num_split_packs]:
            names += batch.sample_ids
        if not names:
            return 0
        return crc32(json.dumps(names).encode())


class GlobalStepStats(NamedTuple):
    """Statistics of a step over all ranks.

    Attributes:
        num_supervised_tokens: Number of tokens that contribute to the loss.
        max_packs: Largest number of packs on one rank.
        skipped: Samples that were skipped because reading or encoding failed.
        signal: Number of a stop signal that any rank received, or 0.
    """

    num_supervised_tokens: int = 0
    num_samples: int = 0
    num_tokens: int = 0
    max_packs: int = 0
    skipped: tuple[SkippedSample, ...] = ()
    signal: int = 0

    @classmethod
    def from_step(cls, step_batch: StepBatch, signal: int = 0) -> GlobalStepStats:
        """Compute the statistics of a step on this rank alone."""
        return cls(
            num_supervised_tokens=step_batch.num_supervised_tokens,
            num_samples=step_batch.num_samples,
            num_tokens=step_batch.num_tokens,
            max_packs=len(step_batch.packs),
            skipped=step_batch.skipped,
            signal=signal,
        )
