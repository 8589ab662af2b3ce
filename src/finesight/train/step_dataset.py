"""Dataset of training steps: reads, encodes and packs the samples of each step."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from zlib import crc32

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from finesight.data.line_index import UnreadableFileError
from finesight.encode.batch import PackedBatch, pad_batch
from finesight.encode.context_shard import ContextShard
from finesight.encode.packing import find_shared_prefix_length, pack, plan_packs
from finesight.encode.tokenization import EncodedSample, find_sample_error
from finesight.errors import UserError
from finesight.train.parallel.distributed import ParallelStrategy
from finesight.train.prefetch import DataWorkerError, prefetch_items
from finesight.train.sampler import DistributedSampler, StepSampler
from finesight.train.vision_cache import VisionCacheReader
from finesight.vision.image_processing import concat_shape

if TYPE_CHECKING:
    from finesight.data.augmentation import Augmenter
    from finesight.data.corpus import Corpus
    from finesight.data.sample import LocatedSample
    from finesight.encode.renderer import Renderer


_ALIGNMENT = 64
"""Alignment of the tensors in a `TensorBlock`, in bytes."""

TensorSpec = tuple[torch.dtype, tuple[int, ...]]
"""Dtype and shape of a tensor."""


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


@dataclass(frozen=True, slots=True)
class DeviceLoader:
    """Loader of packed batches to the device.

    Attributes:
        pads_shapes: Whether to pad packs to a few shapes, for 16-bit training on a CPU. oneDNN
            compiles a kernel for every new shape.
        padding_merge_size: Merge size for padding patches; None for encoders with a fixed image
            size.
    """

    parallel: ParallelStrategy
    device: torch.device
    pads_shapes: bool
    padding_merge_size: int | None

    def load(self, packed_batch: PackedBatch) -> PackedBatch:
        """Move a packed batch to the device, after padding it if `pads_shapes` is set."""
        packed_batch = self.parallel.prepare_batch(packed_batch)
        if self.pads_shapes and packed_batch.context_shard is None:
            return pad_batch(packed_batch, self.padding_merge_size)
        return packed_batch.to(self.device)


IndexedSample = tuple[int, EncodedSample]
"""Corpus index of a sample, and the encoded sample."""


@dataclass(frozen=True, slots=True)
class TensorBlock:
    """Tensors of several shapes and dtypes in one contiguous block of memory.

    Transferring a tensor from a worker costs a file descriptor, and pinning it costs a driver call.
    A shared block pays these costs once.
    """

    specs: tuple[TensorSpec, ...]
    bytes_N: Tensor

    @classmethod
    def allocate(cls, *specs: TensorSpec, pin_memory: bool = False) -> TensorBlock:
        """Allocate uninitialized tensors; data loader workers allocate them in shared memory.

        Shared memory avoids a copy to the main process, as in the default collate function of
        PyTorch.

        Args:
            pin_memory: Whether to pin the memory, if the system allows it and has a GPU.

        Raises:
            DataWorkerError: There is not enough shared memory.
        """
        size = sum(_aligned_size(dtype, shape) for dtype, shape in specs)
        if pin_memory and torch.cuda.is_available():
            with suppress(RuntimeError):  # The system limits pinned memory.
                return cls(specs, torch.empty(size, dtype=torch.uint8, pin_memory=True))
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
        """Return a copy in pinned memory; PyTorch's data loader calls it for items of tuples."""
        return replace(self, bytes_N=self.bytes_N.pin_memory())

    def tensors(self) -> Iterator[Tensor]:
        """Iterate over views of the tensors in the block."""
        offset = 0
        for dtype, shape in self.specs:
            size = dtype.itemsize * math.prod(shape)
            yield self.bytes_N[offset : offset + size].view(dtype).view(shape)
            offset += _aligned_size(dtype, shape)


def _aligned_size(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    size = dtype.itemsize * math.prod(shape)
    return -(-size // _ALIGNMENT) * _ALIGNMENT


class StepTransfer(NamedTuple):
    """Step data that a worker sends to the main process, with tensors in two blocks.

    The first block contains patches and cache inputs. They are the largest tensors, so the worker
    writes them to the block directly instead of copying them. The second block contains copies of
    all other tensors.
    """

    step_batch: StepBatch
    image_block: TensorBlock
    tensor_block: TensorBlock

    @classmethod
    def from_step(cls, step_batch: StepBatch, image_block: TensorBlock) -> StepTransfer:
        """Copy all tensors of a step to a new block, except those already in `image_block`."""
        tensors: list[Tensor] = []
        empty_tensor = torch.empty(0)

        def take(tensor: Tensor) -> Tensor:
            tensors.append(tensor)
            return empty_tensor

        empty_packs = []
        for batch in step_batch.packs:
            empty_pack = _map_tensors(batch, take)
            empty_packs.append(replace(empty_pack, patches_ND=empty_tensor))
        specs = [(tensor.dtype, tuple(tensor.shape)) for tensor in tensors]
        block = TensorBlock.allocate(*specs)
        for buffer, tensor in zip(block.tensors(), tensors, strict=True):
            buffer.copy_(tensor)
        empty_step = replace(step_batch, packs=tuple(empty_packs), cache_inputs=())
        return cls(empty_step, image_block, block)

    def unpack(self) -> StepBatch:
        """Restore the step data, whose tensors are views of the two blocks."""
        tensors = self.tensor_block.tensors()
        # The block has the patches of all packs before their cache inputs, so it is read in order.
        image_tensors = self.image_block.tensors()
        packs = []
        for batch in self.step_batch.packs:
            restored = _map_tensors(batch, lambda _: next(tensors))
            packs.append(replace(restored, patches_ND=next(image_tensors)))
        return replace(self.step_batch, packs=tuple(packs), cache_inputs=tuple(image_tensors))


def _map_tensors(batch: PackedBatch, fn: Callable[[Tensor], Tensor]) -> PackedBatch:
    """Replace all tensors of a packed batch except patches, in a fixed order."""
    names = (
        "ids_T",
        "position_ids_3T",
        "cu_seqlens_S1",
        "visual_indices_M",
        "logit_indices_L",
        "labels_L",
    )
    changes: dict[str, Any] = {}
    for name in names:
        changes[name] = fn(getattr(batch, name))
    changes["hf_inputs"] = {name: fn(tensor) for name, tensor in batch.hf_inputs.items()}
    return replace(batch, **changes)


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
        own_groups, prefix_length = self._group_samples(own_samples)
        groups = [[sample] for sample in split_samples] + own_groups
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

    def _group_samples(
        self, samples: Sequence[IndexedSample]
    ) -> tuple[list[list[IndexedSample]], int]:
        """Return the samples of each pack, and the length of the prefix that all samples share."""
        tokenized = [encoded.tokenized for _, encoded in samples]
        # Inputs of a Hugging Face processor cannot be packed, and a pair is one pack.
        is_single = any(
            encoded.hf_inputs or encoded.tokenized.response_starts for _, encoded in samples
        )
        budget = self.pack_tokens
        if is_single:
            budget = 1
        prefix_length = 0
        if self.use_shared_prefix:
            prefix_length = find_shared_prefix_length(tokenized)
        lengths = [one.num_packed_tokens for one in tokenized]
        groups = []
        for positions in plan_packs(lengths, budget, prefix_length):
            groups.append([samples[position] for position in positions])
        return groups, prefix_length

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


DataWait = Callable[[], float]
"""Seconds in which the device waited for data; on a GPU, call it after the step has finished."""


def time_data_waits(
    steps: Iterator[StepBatch], device: torch.device
) -> Iterator[tuple[StepBatch, DataWait]]:
    """Yield each step of a data loader with the timing of its data wait."""
    while True:
        request_event = record_event(device, enable_timing=True)
        start = time.perf_counter()
        step_batch = next(steps, None)
        if step_batch is None:
            return
        blocked_s = time.perf_counter() - start
        ready_event = record_event(device, enable_timing=True)
        yield step_batch, partial(compute_idle_seconds, blocked_s, request_event, ready_event)


def compute_idle_seconds(
    blocked_s: float, request: torch.cuda.Event | None, ready: torch.cuda.Event | None
) -> float:
    """Return the seconds in which the device was idle while the host waited for `blocked_s`."""
    if request is None or ready is None:
        return blocked_s
    idle_s: float = request.elapsed_time(ready) / 1000
    # A GPU with an empty queue is idle for other reasons as well.
    return min(blocked_s, idle_s)


def record_event(device: torch.device, *, enable_timing: bool = False) -> torch.cuda.Event | None:
    """Record a CUDA event after all queued kernels; return None on a CPU."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(enable_timing)  # type: ignore[no-untyped-call]
    event.record()
    return event
