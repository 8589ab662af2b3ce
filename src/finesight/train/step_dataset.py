"""Dataset of training steps: reads, encodes and packs the samples of each step."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch

from finesight.encode.batch import PackedBatch
from finesight.encode.context_shard import ContextShard
from finesight.encode.packing import pack, plan_sample_packs
from finesight.encode.tokenization import EncodedSample, find_sample_error
from finesight.errors import UserError
from finesight.samples.line_index import UnreadableFileError
from finesight.train.prefetch import prefetch_items
from finesight.train.sampler import DistributedSampler, StepSampler
from finesight.train.step_batch import SkippedSample, StepBatch
from finesight.train.step_transfer import StepTransfer, TensorBlock, TensorSpec
from finesight.train.vision_cache import VisionCacheReader
from finesight.vision.image_processing import concat_shape

if TYPE_CHECKING:
    from finesight.encode.renderer import Renderer
    from finesight.samples.augmentation import Augmenter
    from finesight.samples.corpus import Corpus
    from finesight.samples.sample import LocatedSample


IndexedSample = tuple[int, EncodedSample]
"""Corpus index of a sample, and the encoded sample."""


@dataclass(frozen=True)
class StepDataset:
    """Training steps of one rank: encoded and packed samples. Samples that are split over the ranks
    come first, then the other samples of the rank. A sample that cannot be read or encoded is
    skipped, or raises an error with `on_invalid_sample="fail"`.

    Attributes:
        renderer: Tokenizer and image processor.
        on_invalid_sample: Whether to skip invalid samples or to fail.
        cache_reader: Vision cache. With a cache, images are not decoded, and packs contain no
            patches or grids.
        max_length: Maximum number of tokens of a sample, checked while reading; None if a scan
            before training has checked all samples.
        use_shared_prefix: Whether each pack stores the prefix shared by all samples of a step only
            once.
        augmenter: Source of random variants of the images, by step and sample; None for the images.
    """

    corpus: Corpus
    renderer: Renderer
    sampler: StepSampler
    pack_tokens: int
    on_invalid_sample: Literal["skip", "fail"]
    cache_reader: VisionCacheReader | None = None
    max_length: int | None = None
    use_shared_prefix: bool = False
    augmenter: Augmenter | None = None

    def with_pack_tokens(self, pack_tokens: int) -> StepDataset:
        """Return a copy of the dataset with packs of at most `pack_tokens` tokens."""
        sampler = self.sampler
        if isinstance(sampler, DistributedSampler):
            sampler = replace(sampler, pack_tokens=pack_tokens)
        return replace(self, sampler=sampler, pack_tokens=pack_tokens)

    def __len__(self) -> int:
        return len(self.sampler)

    def load_step(self, step_index: int) -> StepTransfer:
        """Build a step in a data loader worker."""
        return StepTransfer.from_step(*self.build_step(step_index))

    def get_step(self, step_index: int) -> StepBatch:
        """Read, encode and pack the samples of a step in this process."""
        return self.build_step(step_index)[0]

    def build_step(self, step_index: int) -> tuple[StepBatch, TensorBlock]:
        """Read, encode and pack the samples of a step.

        Returns:
            Step data, and the memory block of its patches and cache inputs.
        """
        split_samples, shards, skipped = self._read_split_samples(step_index)
        own_indices = self.sampler.batch_indices(step_index)
        own_samples, own_skipped = self.read_samples(own_indices, step_index=step_index)
        return self.pack_step(
            step_index, own_samples, (*skipped, *own_skipped), split_samples, shards
        )

    def pack_step(
        self,
        step_index: int,
        own_samples: Sequence[IndexedSample],
        skipped: Sequence[SkippedSample],
        split_samples: Sequence[IndexedSample] = (),
        shards: Sequence[ContextShard] = (),
    ) -> tuple[StepBatch, TensorBlock]:
        """Pack the encoded samples of a step; see `build_step`."""
        own_encoded = [encoded for _, encoded in own_samples]
        own_packs, prefix_length = plan_sample_packs(
            own_encoded, self.pack_tokens, use_shared_prefix=self.use_shared_prefix
        )
        groups = [[sample] for sample in split_samples]
        for positions in own_packs:
            groups.append([own_samples[position] for position in positions])
        sample_indices: list[tuple[int, ...]] = []
        specs: list[TensorSpec] = []
        for group in groups:
            sample_indices.append(tuple(index for index, _ in group))
            patches_shape = concat_shape([encoded.patches_ND for _, encoded in group])
            specs.append((torch.uint8, patches_shape))
        if self.cache_reader is not None:
            specs += map(self.cache_reader.tensor_spec, sample_indices)
        block = TensorBlock.allocate(*specs)
        image_tensors = block.tensors()
        packs = []
        for group in groups:
            samples = [encoded for _, encoded in group]
            packs.append(pack(samples, next(image_tensors).numpy(), prefix_length))
        packs[: len(shards)] = map(PackedBatch.select_shard, packs, shards)
        cache_inputs = tuple(image_tensors)
        if self.cache_reader is not None:
            packs = [replace(batch, grid_thw=()) for batch in packs]
            for indices, buffer in zip(sample_indices, cache_inputs, strict=True):
                self.cache_reader.write_to(indices, buffer)
        step_batch = StepBatch(
            step_index, tuple(packs), tuple(skipped), tuple(sample_indices), cache_inputs
        )
        return step_batch, block

    def _read_split_samples(
        self, step_index: int
    ) -> tuple[list[IndexedSample], list[ContextShard], list[SkippedSample]]:
        """Read the samples of a step that are split over all ranks.

        Returns:
            Encoded samples with only the patches of this rank, their shards, and the skipped
            samples if this rank reports them.
        """
        sampler = self.sampler
        if not isinstance(sampler, DistributedSampler):
            return [], [], []
        indices = sampler.split_indices(step_index)
        samples, skipped = self.read_samples(indices, step_index=step_index)
        process_group = sampler.process_group
        shards: list[ContextShard] = []
        sharded_samples: list[IndexedSample] = []
        for index, encoded in samples:
            shard = ContextShard.from_sample(
                encoded.tokenized, process_group.rank, process_group.world_size
            )
            own_patches_ND = encoded.patches_ND[slice(*shard.patch_range)]
            shards.append(shard)
            sharded_samples.append((index, replace(encoded, patches_ND=own_patches_ND)))
        if not process_group.is_main:
            skipped = []
        return sharded_samples, shards, skipped

    def read_samples(
        self,
        indices: Iterable[int],
        encode: Callable[[LocatedSample], EncodedSample] | None = None,
        map_: Callable[..., Iterable[IndexedSample | SkippedSample]] = map,
        step_index: int = 0,
    ) -> tuple[list[IndexedSample], list[SkippedSample]]:
        """Read and encode samples; also return the samples that were skipped.

        Args:
            encode: Function instead of the encoding for training.
            map_: Replacement of `map`, such as that of a thread pool.
            step_index: Step that selects the variants of augmented images.
        """
        samples: list[IndexedSample] = []
        skipped: list[SkippedSample] = []
        for result in map_(partial(self._read_sample, encode, step_index), indices):
            if isinstance(result, SkippedSample):
                skipped.append(result)
            else:
                samples.append(result)
        return samples, skipped

    def _read_sample(
        self, encode: Callable[[LocatedSample], EncodedSample] | None, step_index: int, index: int
    ) -> IndexedSample | SkippedSample:
        name = self.corpus.location(index)
        try:
            sample = self.corpus.read_validated(index)
            name = sample.sample.id
            if encode is not None:
                return index, encode(sample)
            if self.augmenter is not None:
                variant = self.augmenter.augment(sample, step_index, index)
                tokenized = self.renderer.tokenize(variant)
                max_length = self.renderer.max_length
                # Moved boxes may have longer numbers; the sample itself has a valid length.
                if not max_length or tokenized.num_tokens <= max_length:
                    return index, self.renderer.load_patches(tokenized)
            return index, self._encode_sample(index, sample)
        except UnreadableFileError:
            raise
        except UserError as error:
            if self.on_invalid_sample == "fail":
                raise
            return SkippedSample(name, str(error).splitlines()[0])

    def _encode_sample(self, index: int, sample: LocatedSample) -> EncodedSample:
        if self.cache_reader is None:
            encoded = self.renderer.encode(sample)
            if self.max_length is not None:
                error = find_sample_error(encoded.tokenized, self.max_length)
                if error is not None:
                    raise error
            return encoded
        text_sample = self.renderer.encode_without_patches(sample)
        num_visual_tokens = sum(span.stop - span.start for span in text_sample.tokenized.spans)
        self.cache_reader.check(index, num_visual_tokens)
        return text_sample


def read_steps(
    data: StepDataset, start: int, num_workers: int, pin_memory: bool
) -> Generator[StepBatch, None, None]:
    """Iterate over the packed steps of a dataset, read by worker processes.

    The steps do not depend on the number of workers. Close the generator to end the workers.

    Args:
        num_workers: Number of worker processes; 0 reads in this process.
        pin_memory: Whether to copy the tensors to pinned memory.
    """
    if num_workers and start < len(data):
        # Forked workers inherit the sample order.
        data.sampler.batch_indices(start)
    transfers = prefetch_items(data.load_step, range(start, len(data)), num_workers, pin_memory)
    return (transfer.unpack() for transfer in transfers)
