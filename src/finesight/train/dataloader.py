"""Data loading: read, encode and pack the samples of a step in worker processes."""

from __future__ import annotations

import json
import math
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Literal, NamedTuple, Protocol, runtime_checkable
from zlib import crc32

import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from finesight.data.corpus import Corpus
from finesight.data.jsonl import LocatedSample
from finesight.data.line_index import UnreadableFileError
from finesight.encode.context_shard import ContextShard
from finesight.encode.packing import PackedBatch, find_shared_prefix_length, pack, plan_packs
from finesight.encode.renderer import Renderer
from finesight.encode.sample_filter import find_sample_error
from finesight.encode.tokenized_sample import EncodedSample, TokenizedSample
from finesight.errors import UserError
from finesight.train.dataloader_workers import DataWorkerError, catch_user_error, prefetch_items
from finesight.train.sampler import StepSampler
from finesight.vision.patches import concat_shape

_ALIGNMENT = 64
"""Alignment of tensors in a block, in bytes."""

TensorSpec = tuple[torch.dtype, tuple[int, ...]]
"""Dtype and shape of a tensor."""


@runtime_checkable
class ContextParallelSampler(StepSampler, Protocol):
    """Step sampler of one rank that also splits long samples over all ranks."""

    def with_pack_tokens(self, pack_tokens: int) -> ContextParallelSampler:
        """Return the sampler for packs of at most this many tokens."""
        ...

    def split_indices(self, step: int) -> Sequence[int]:
        """Return the corpus indices of the split samples of a step, in order."""
        ...

    def context_shard(self, tokenized: TokenizedSample) -> ContextShard:
        """Return the shard of this rank of a split sample."""
        ...

    @property
    def max_unsplit_tokens(self) -> int | None:
        """Length of the longest sample that is not split; None without splitting."""
        ...

    @property
    def reports_skipped(self) -> bool:
        """Return True if this rank reports skipped samples."""
        ...


class VisionCacheReader(Protocol):
    """Access to cached vision features in the data loader, by corpus index of the sample."""

    def check(self, sample: int, num_features: int) -> None:
        """Verify that the cached features of a sample are usable.

        Raises:
            CorruptImageError: An image was corrupt, or its number of features has changed.
        """
        ...

    def tensor_spec(self, sample_indices: Sequence[int]) -> TensorSpec:
        """Return dtype and shape of the cache inputs for a pack of these samples."""
        ...

    def write_to(self, sample_indices: Sequence[int], buffer: Tensor) -> None:
        """Write the cache inputs of these samples to a buffer."""
        ...


class SkippedSample(NamedTuple):
    """Sample that is excluded from training, with the reason."""

    id: str
    reason: str


@dataclass(frozen=True, slots=True)
class StepBatch:
    """Batch of an optimizer step on one rank; each pack is a micro-batch.

    Attributes:
        step_index: Index of the step.
        packs: Packed batches.
        skipped: Samples that were skipped while they were read.
        sample_indices: Corpus indices of the samples of each pack.
        cache_inputs: Vision cache inputs of each pack; empty without the cache.
    """

    step_index: int
    packs: tuple[PackedBatch, ...]
    skipped: tuple[SkippedSample, ...]
    sample_indices: tuple[tuple[int, ...], ...]
    cache_inputs: tuple[Tensor, ...] = ()

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
        """Number of packs of split samples; they come first and need all ranks."""
        return sum(batch.context_shard is not None for batch in self.packs)

    @property
    def split_checksum(self) -> int:
        """Checksum over the IDs of split samples; 0 without such samples."""
        names = [name for batch in self.packs[: self.num_split_packs] for name in batch.sample_ids]
        return crc32(json.dumps(names).encode()) if names else 0


IndexedSample = tuple[int, EncodedSample]
"""Corpus index and encoded sample."""


@dataclass(frozen=True, slots=True)
class TensorBlock:
    """Tensors of several shapes and dtypes in one contiguous block of memory.

    Each block that a worker sends costs a file descriptor, and each pinned block a driver call, so
    tensors share a block.
    """

    specs: tuple[TensorSpec, ...]
    bytes_N: Tensor

    @classmethod
    def allocate(cls, *specs: TensorSpec) -> TensorBlock:
        """Allocate uninitialized tensors, in shared memory when called by a worker.

        Shared memory avoids a copy, as in the default collate function of torch.
        """
        size = sum(_aligned_size(dtype, shape) for dtype, shape in specs)
        if get_worker_info() is None:
            return cls(specs, torch.empty(size, dtype=torch.uint8))
        try:
            shared = torch.UntypedStorage._new_shared(size)  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise DataWorkerError(
                f"no shared memory for {size:,} bytes of a step: {str(error).splitlines()[0]}",
                where="train.num_workers",
                expected="space for two steps per data loader worker in /dev/shm",
                remedy="lower train.num_workers, or increase the shared memory of the container"
                " (docker run --shm-size), then start again with --resume",
            ) from error
        return cls(specs, torch.empty(0, dtype=torch.uint8).set_(shared, 0, (size,), (1,)))

    def pin_memory(self) -> TensorBlock:
        """Copy the block to pinned memory."""
        return replace(self, bytes_N=self.bytes_N.pin_memory())

    def tensors(self) -> Iterator[Tensor]:
        """Iterate over views of the tensors."""
        offset = 0
        for dtype, shape in self.specs:
            size = dtype.itemsize * math.prod(shape)
            yield self.bytes_N[offset : offset + size].view(dtype).view(shape)
            offset += _aligned_size(dtype, shape)


def _aligned_size(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return -(-dtype.itemsize * math.prod(shape) // _ALIGNMENT) * _ALIGNMENT


@dataclass(frozen=True, slots=True)
class StepTransfer:
    """Step in transfer from a worker, with all tensors in two blocks.

    The patches and cache inputs are written directly to the first block, because fresh memory
    dominates
    their cost. All other tensors are copied to the second block.
    """

    step_batch: StepBatch
    image_block: TensorBlock
    tensor_block: TensorBlock

    @classmethod
    def from_step(cls, step_batch: StepBatch, image_block: TensorBlock) -> StepTransfer:
        """Copy all tensors of a step that are not in `image_block`."""
        tensors = [tensor for batch in step_batch.packs for tensor in _list_tensors(batch)]
        block = TensorBlock.allocate(*((tensor.dtype, tuple(tensor.shape)) for tensor in tensors))
        for buffer, tensor in zip(block.tensors(), tensors, strict=True):
            buffer.copy_(tensor)
        empty_tensor = torch.empty(0)
        empty_packs = tuple(
            _with_tensors(batch, empty_tensor, repeat(empty_tensor)) for batch in step_batch.packs
        )
        return cls(replace(step_batch, packs=empty_packs, cache_inputs=()), image_block, block)

    def pin_memory(self) -> StepTransfer:
        """Copy both blocks to pinned memory; called by the data loader."""
        return StepTransfer(
            self.step_batch, self.image_block.pin_memory(), self.tensor_block.pin_memory()
        )

    def unpack(self) -> StepBatch:
        """Restore the step with views of the blocks."""
        other_tensors, image_tensors = self.tensor_block.tensors(), self.image_block.tensors()
        packs = [
            _with_tensors(batch, next(image_tensors), other_tensors)
            for batch in self.step_batch.packs
        ]
        return replace(self.step_batch, packs=tuple(packs), cache_inputs=tuple(image_tensors))


def _list_tensors(batch: PackedBatch) -> tuple[Tensor, ...]:
    return (
        *(batch.ids_T, batch.position_ids_3T, batch.cu_seqlens_S1),
        *(batch.visual_indices_M, batch.logit_indices_L, batch.labels_L),
        *batch.hf_inputs.values(),
    )


def _with_tensors(batch: PackedBatch, patches_ND: Tensor, tensors: Iterator[Tensor]) -> PackedBatch:
    """Replace the tensors of a batch, in the order of `_list_tensors`."""
    return replace(
        batch,
        patches_ND=patches_ND,
        ids_T=next(tensors),
        position_ids_3T=next(tensors),
        cu_seqlens_S1=next(tensors),
        visual_indices_M=next(tensors),
        logit_indices_L=next(tensors),
        labels_L=next(tensors),
        hf_inputs={name: next(tensors) for name in batch.hf_inputs},
    )


@dataclass(frozen=True)
class StepDataset(Dataset[StepTransfer | UserError]):
    """Dataset of training steps: item k is step k of this rank, encoded and packed.

    Split samples come first, then the other samples of the rank. A sample that fails while it is
    read is
    skipped, or raises with `on_invalid_sample="fail"`.

    Attributes:
        corpus: Samples.
        renderer: Tokenizer and image processor.
        sampler: Samples of each step.
        pack_tokens: Token budget of a pack.
        on_invalid_sample: Whether to skip invalid samples or to fail.
        cache_reader: Vision cache. Cached images are not decoded; packs contain no patches and
            grids.
        max_length: Maximum tokens of a sample that was not scanned before the first step.
        use_shared_prefix: Whether each pack stores the prefix shared by all samples of a step once.
    """

    corpus: Corpus
    renderer: Renderer
    sampler: StepSampler
    pack_tokens: int
    on_invalid_sample: Literal["skip", "fail"]
    cache_reader: VisionCacheReader | None = None
    max_length: int | None = None
    use_shared_prefix: bool = False

    def with_vision_cache(self, cache_reader: VisionCacheReader) -> StepDataset:
        """Return the dataset with cached images."""
        return replace(self, cache_reader=cache_reader)

    def with_pack_tokens(self, pack_tokens: int) -> StepDataset:
        """Return the dataset with packs of at most this many tokens."""
        sampler = self.sampler
        if isinstance(sampler, ContextParallelSampler):
            sampler = sampler.with_pack_tokens(pack_tokens)
        return replace(self, sampler=sampler, pack_tokens=pack_tokens)

    def __len__(self) -> int:
        return len(self.sampler)

    def __getitem__(self, step_index: int) -> StepTransfer | UserError:
        return catch_user_error(lambda: StepTransfer.from_step(*self.build_step(step_index)))

    def compute_order(self, step_index: int) -> None:
        """Compute the sample order around this step before workers are forked."""
        if step_index < len(self):
            self.sampler.batch_indices(step_index)

    def get_step(self, step_index: int) -> StepBatch:
        """Return the step with this index."""
        return self.build_step(step_index)[0]

    def build_step(self, step_index: int) -> tuple[StepBatch, TensorBlock]:
        """Return the step, and the block that stores its patches and cache inputs."""
        split_samples, shards, skipped = self._read_split_samples(step_index)
        own_samples, own_skipped = self._read_samples(self.sampler.batch_indices(step_index))
        # Inputs of a Hugging Face processor cannot be packed.
        budget = 1 if any(encoded.hf_inputs for _, encoded in own_samples) else self.pack_tokens
        prefix_length = (
            find_shared_prefix_length([encoded.tokenized for _, encoded in own_samples])
            if self.use_shared_prefix
            else 0
        )
        plan = plan_packs(
            [encoded.tokenized.num_packed_tokens for _, encoded in own_samples],
            budget,
            prefix_length,
        )
        groups = [[encoded] for encoded in split_samples] + [
            [own_samples[i] for i in group] for group in plan
        ]
        sample_indices = tuple(tuple(index for index, _ in group) for group in groups)
        specs: list[TensorSpec] = [
            (torch.uint8, concat_shape([encoded.patches_ND for _, encoded in group]))
            for group in groups
        ]
        if self.cache_reader is not None:
            specs += map(self.cache_reader.tensor_spec, sample_indices)
        block = TensorBlock.allocate(*specs)
        image_tensors = block.tensors()
        packs = [
            pack([encoded for _, encoded in group], next(image_tensors).numpy(), prefix_length)
            for group in groups
        ]
        packs[: len(shards)] = map(ContextShard.shard_batch, shards, packs)
        cache_inputs = tuple(image_tensors)
        if self.cache_reader is not None:
            packs = [replace(batch, grid_thw=()) for batch in packs]
            for indices, buffer in zip(sample_indices, cache_inputs, strict=True):
                self.cache_reader.write_to(indices, buffer)
        return StepBatch(
            step_index, tuple(packs), (*skipped, *own_skipped), sample_indices, cache_inputs
        ), block

    def _read_split_samples(
        self, step_index: int
    ) -> tuple[list[IndexedSample], list[ContextShard], list[SkippedSample]]:
        """Read the split samples of a step, with the patches of this rank only.

        Returns:
            Samples, their shards, and skipped samples if this rank reports them.
        """
        sampler = self.sampler
        if not isinstance(sampler, ContextParallelSampler):
            return [], [], []
        samples, skipped = self._read_samples(sampler.split_indices(step_index))
        shards = [sampler.context_shard(encoded.tokenized) for _, encoded in samples]
        sharded_samples = [
            (index, replace(encoded, patches_ND=encoded.patches_ND[slice(*shard.patch_range)]))
            for (index, encoded), shard in zip(samples, shards, strict=True)
        ]
        return sharded_samples, shards, skipped if sampler.reports_skipped else []

    def _read_samples(
        self, indices: Iterable[int]
    ) -> tuple[list[IndexedSample], list[SkippedSample]]:
        """Read and encode samples; also return the skipped ones."""
        samples: list[IndexedSample] = []
        skipped: list[SkippedSample] = []
        for index in indices:
            name = self.corpus.location(index)
            try:
                sample = self.corpus.read_validated(index)
                name = sample.sample.id
                samples.append((index, self._encode_sample(index, sample)))
            except UnreadableFileError:
                raise
            except UserError as error:
                if self.on_invalid_sample == "fail":
                    raise
                skipped.append(SkippedSample(name, str(error).splitlines()[0]))
        return samples, skipped

    def _encode_sample(self, index: int, sample: LocatedSample) -> EncodedSample:
        if self.cache_reader is None:
            encoded = self.renderer.encode(sample)
            max_length = self.max_length
            error = None if max_length is None else find_sample_error(encoded.tokenized, max_length)
            if error is not None:
                raise error
            return encoded
        text_sample = self.renderer.encode_without_patches(sample)
        self.cache_reader.check(
            index, sum(span.stop - span.start for span in text_sample.tokenized.spans)
        )
        return text_sample


def read_steps(
    data: StepDataset, start: int, num_workers: int, pin_memory: bool
) -> Generator[StepBatch, None, None]:
    """Iterate over the steps from `start` on, independent of the number of workers.

    Close the generator to end the workers.
    """
    if num_workers:
        data.compute_order(start)
    transfers: Iterator[StepTransfer] = prefetch_items(
        data, range(start, len(data)), num_workers, pin_memory
    )
    return (transfer.unpack() for transfer in transfers)
