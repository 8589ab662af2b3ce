"""Sizes of the packs of a run, for samples packed as in training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from finesight.encode.packing import compute_context_lengths, effective_prefix_length, plan_packs
from finesight.model.config import VisionConfig
from finesight.train.dataset_stats import SampleStats
from finesight.train.sampler import StepSampler
from finesight.vision.image_processing import GridTHW

MAX_PLANNED_STEPS = 2000
"""Maximum number of training steps to inspect, evenly spaced over the run."""


@dataclass(frozen=True, slots=True)
class PlannedPack:
    """Sizes of a packed batch, without its content.

    Attributes:
        lengths: Tokens of each sequence. With a shared prefix, the first sequence is the prefix
            (`encode.packing`).
        grid_thw: Patch grid (frames, rows, columns) of each image or video.
        num_supervised_tokens: Number of tokens that contribute to the loss.
        prefix_length: Tokens of the shared prefix; 0 without one.
    """

    lengths: tuple[int, ...]
    grid_thw: tuple[GridTHW, ...]
    num_supervised_tokens: int
    prefix_length: int = 0

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all sequences. A shared prefix counts once."""
        return sum(self.lengths)

    @property
    def num_samples(self) -> int:
        """Number of samples in the pack."""
        return len(self.lengths) - (self.prefix_length > 0)

    @property
    def context_lengths(self) -> tuple[int, ...]:
        """Number of tokens that each sequence attends to, including the shared prefix."""
        return compute_context_lengths(self.lengths, self.prefix_length)

    @property
    def num_patches(self) -> int:
        """Number of patches of all images and videos."""
        return sum(t * h * w for t, h, w in self.grid_thw)

    @property
    def num_attention_scores(self) -> int:
        """Number of attention scores of a head of the decoder."""
        return sum(length**2 for length in self.context_lengths)

    def stored_patch_dim(self, config: VisionConfig) -> int:
        """Return the number of elements that the pack stores per patch.

        This is a single frame if all inputs are images, whose frames are equal.
        """
        is_still = all(frames == 1 for frames, _, _ in self.grid_thw)
        return config.in_channels * config.patch_size**2 if is_still else config.patch_dim


def build_planned_pack(samples: Sequence[SampleStats], prefix_length: int = 0) -> PlannedPack:
    """Build the pack of the given samples. A shared prefix counts once."""
    lengths = [sample.num_packed_tokens for sample in samples]
    prefix_length = prefix_length if len(samples) > 1 else 0
    if prefix_length:
        lengths = [prefix_length, *(length - prefix_length for length in lengths)]
    return PlannedPack(
        tuple(lengths),
        tuple(grid for sample in samples for grid in sample.grid_thw),
        sum(sample.num_supervised_tokens for sample in samples),
        prefix_length,
    )


def plan_step_packs(
    samples: Sequence[SampleStats], token_budget: int, prefix_length: int = 0
) -> list[PlannedPack]:
    """Split the samples of a training step into packs."""
    lengths = [sample.num_packed_tokens for sample in samples]
    prefix_length = effective_prefix_length(prefix_length, lengths)
    groups = plan_packs(lengths, token_budget, prefix_length)
    return [
        build_planned_pack([samples[index] for index in group], prefix_length) for group in groups
    ]


def iter_planned_steps(
    sampler: StepSampler,
    sample_stats: Mapping[int, SampleStats],
    max_steps: int = MAX_PLANNED_STEPS,
) -> Iterator[list[SampleStats]]:
    """Iterate over the samples of evenly spaced training steps, from the first to the last."""
    last_step = len(sampler) - 1
    num_steps = min(max_steps, len(sampler))
    for i in range(num_steps):
        step = round(i * last_step / max(1, num_steps - 1))
        step_stats = (sample_stats[index] for index in sampler.batch_indices(step))
        yield [stats for stats in step_stats if stats.num_tokens]
