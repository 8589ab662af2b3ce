"""Vision cache: encodes the images of a run once if the vision encoder is frozen.

This module decides whether the cache pays off, coordinates its construction over all ranks, and
offloads the vision encoder from the GPU while the cache replaces it.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import PIL
import torch
import torch.distributed as dist
from torch import Tensor, nn

from finesight.data.image_header import CorruptImageError
from finesight.errors import TrainingInterrupted, UserError
from finesight.host_memory import available_memory
from finesight.model.attention import has_amx_bf16
from finesight.model.hf_backend import AnyModel
from finesight.model.vlm import VisionLanguageModel
from finesight.train.console import TrainingConsole
from finesight.train.oom import first_error_line, release_memory
from finesight.train.signals import StopRequest
from finesight.train.train_state import TrainState
from finesight.train.vision_cache_build import (
    CacheTier,
    ChunkFeatures,
    DecodedChunk,
    FeatureWriter,
    FreeBytes,
    VisionCacheBuilder,
    choose_cache_tier,
    estimate_feature_bytes,
    free_gpu_memory,
    read_image_chunks,
)
from finesight.train.vision_store import (
    ImageChunk,
    ImageIndex,
    StoredChunk,
    VisionCache,
    VisionFileStore,
    index_images,
    vision_store_root,
)

ENCODER_VERSION = 5
"""Version of the encoder computation and preprocessing; increase it when features change."""

_NUM_HASH_THREADS = 8


def fingerprint_encoder(
    vision_encoder: nn.Module, settings: Mapping[str, Any], device: torch.device
) -> str:
    """Return a SHA-256 of everything that determines the features of an image.

    It covers the weights, model settings, library versions and device. Cached features of another
    fingerprint are not used.

    Args:
        vision_encoder: Vision encoder of the model.
        settings: Content of `config.json` and of the preprocessor configuration.
        device: Device that runs the encoder.
    """
    tensors = {**dict(vision_encoder.named_parameters()), **dict(vision_encoder.named_buffers())}
    with ThreadPoolExecutor(_NUM_HASH_THREADS) as pool:
        digests = list(pool.map(_digest, tensors.values()))
    environment = {
        "version": ENCODER_VERSION,
        "torch": torch.__version__,
        "pillow": PIL.__version__,
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{torch.backends.cpu.get_cpu_capability()} {torch.get_num_threads()} threads",
        "tiles": device.type != "cuda" and has_amx_bf16(),
        "products": torch.get_float32_matmul_precision(),
    }
    weights = [
        (name, str(tensor.dtype), list(tensor.shape), digest)
        for (name, tensor), digest in zip(tensors.items(), digests, strict=True)
    ]
    payload = json.dumps([environment, settings, weights], sort_keys=True, default=str)
    return hashlib.sha256(payload.encode()).hexdigest()


def _digest(tensor: Tensor) -> str:
    # A copy, because storage exported to numpy cannot be resized.
    copy = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    bits = copy.view(-1).view(torch.uint8)
    return hashlib.sha256(bits.numpy().data).hexdigest()


def should_offload(device: torch.device) -> bool:
    """Return whether to offload an unused vision encoder: only on a GPU."""
    return device.type == "cuda"


class EncoderOffloader:
    """Offloader of the weights of a frozen vision encoder to the CPU.

    The storage of the weights is resized to zero and later refilled, so all tensors that share it
    stay valid. Tensors shared with the rest of the model, and models of the transformers backend,
    stay on the device.
    """

    def __init__(self, model: AnyModel) -> None:
        self._model = model
        self._cpu_copies: list[tuple[torch.UntypedStorage, Tensor]] = []
        self.is_offloaded = False

    def _list_storages(self) -> list[torch.UntypedStorage]:
        """Return the storages that only tensors of the vision encoder use."""
        model = self._model
        encoder_tensors = (
            list(_iter_tensors(model.visual)) if isinstance(model, VisionLanguageModel) else []
        )
        encoder_tensor_ids = {id(tensor) for tensor in encoder_tensors}
        shared_addresses = {
            _data_ptr(tensor)
            for tensor in _iter_tensors(model)
            if id(tensor) not in encoder_tensor_ids
        }
        storages = {_data_ptr(tensor): tensor.untyped_storage() for tensor in encoder_tensors}
        return [storage for address, storage in storages.items() if address not in shared_addresses]

    @contextmanager
    def offload(self) -> Iterator[None]:
        """Keep the encoder weights on the CPU within the context.

        The encoder can be used only inside a nested `reload` context.
        """
        self._move_to_cpu()
        try:
            yield
        finally:
            self._move_to_gpu()

    @contextmanager
    def reload(self) -> Iterator[None]:
        """Keep the encoder weights on the device within the context."""
        was_offloaded = self.is_offloaded
        self._move_to_gpu()
        try:
            yield
        finally:
            if was_offloaded:
                self._move_to_cpu()

    def _move_to_cpu(self) -> None:
        if self.is_offloaded:
            return
        storages = self._list_storages()
        copied_ids = {_storage_id(storage) for storage, _ in self._cpu_copies}
        if copied_ids != {_storage_id(storage) for storage in storages}:
            # Otherwise reuse the copy: frozen weights do not change.
            self._cpu_copies = [(one, _as_bytes(one).to("cpu", copy=True)) for one in storages]
        for storage, _ in self._cpu_copies:
            storage.resize_(0)
        self.is_offloaded = True

    def _move_to_gpu(self) -> None:
        if self.is_offloaded:
            for storage, cpu_copy in self._cpu_copies:
                storage.resize_(len(cpu_copy))
                _as_bytes(storage).copy_(cpu_copy)
            self.is_offloaded = False


def _iter_tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _data_ptr(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _storage_id(storage: torch.UntypedStorage) -> int:
    """Return the identity of a storage, which does not change when the storage is resized."""
    return int(storage._cdata)


def _as_bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


T = TypeVar("T")

NUM_READER_THREADS = 4
"""Number of threads that read cached features from disk."""

READ_BATCH_CHUNKS = 64
"""Number of chunks that are read from disk between two checks for stop signals."""

_TIER_NAMES: dict[CacheTier, str] = {"gpu": "on the GPU", "memory": "in memory", "disk": "on disk"}


REASON_SINGLE_USE = "each image is used once, and not all features are on disk"


@dataclass(frozen=True, slots=True)
class VisionCacheResult:
    """Vision cache of a run, or the reason for training without it.

    Attributes:
        cache: Vision cache; None if images are encoded in every step.
        reason: Description of the decision for the user.
        tier: Storage tier of the features.
        num_images: Number of cached images.
        num_from_disk: Number of images whose features were read from disk.
        num_bytes: Size of all features in bytes.
    """

    cache: VisionCache | None
    reason: str
    tier: CacheTier | None = None
    num_images: int = 0
    num_from_disk: int = 0
    num_bytes: int = 0

    def as_json(self) -> dict[str, Any]:
        """Return the content of the `metrics.jsonl` line about the vision cache."""
        metrics = {
            "tier": self.tier,
            "images_from_disk": self.num_from_disk,
            "bytes": self.num_bytes,
            "reason": self.reason,
        }
        return {"images": self.num_images, "features": metrics}


@contextmanager
def open_vision_cache(
    state: TrainState, console: TrainingConsole, stop: StopRequest
) -> Iterator[VisionCacheResult]:
    """Build the vision cache if it pays off, and provide it within the context.

    The cache requires a frozen vision encoder, images that are used several times or have features
    on disk, and space for the features. A resumed run does not use the cache if it started without
    it.

    Args:
        state: State of the run.
        console: Console for progress and messages.
        stop: Stop request, checked between chunks.

    Raises:
        TrainingInterrupted: A stop was requested.
        UserError: The disk is not writable, and `train.vision_cache` is `disk`.
    """
    with ExitStack() as stack:
        coordinator = _VisionCacheCoordinator(state, console, stop)
        stack.callback(coordinator.close)
        try:
            result = coordinator.build()
        except _CacheUnavailable as blocker:
            result = _uncached_result(state, str(blocker))
            release_memory(state.hardware.device)
        if result.tier != "disk":
            # Other runs may now remove the files.
            stack.close()
        yield result


class VisionFeatures:
    """Image features of a training run: from the vision cache, or from the encoder in every step.

    The vision encoder is offloaded from the GPU to the CPU while the cache replaces it.
    """

    def __init__(self, state: TrainState, console: TrainingConsole, stop: StopRequest) -> None:
        self._state, self._console, self._stop = state, console, stop
        self._offloader = EncoderOffloader(state.model)

    @contextmanager
    def open(self, log: Callable[[float, VisionCacheResult], None]) -> Iterator[VisionCache | None]:
        """Build the vision cache if it pays off, and provide it within the context.

        Args:
            log: Callback for the seconds to build the cache, and the result.

        Yields:
            Vision cache; None to encode images in every step.
        """
        start = time.perf_counter()
        with open_vision_cache(self._state, self._console, self._stop) as result:
            log(time.perf_counter() - start, result)
            offload = result.cache is not None and should_offload(self._state.hardware.device)
            with self._offloader.offload() if offload else nullcontext():
                yield result.cache

    def reload_encoder(self) -> AbstractContextManager[None]:
        """Keep the weights of the vision encoder on the device within the context."""
        return self._offloader.reload()


class _CacheUnavailable(Exception):
    """Raised with the reason when the vision cache cannot be used."""


def _uncached_result(state: TrainState, reason: str) -> VisionCacheResult:
    if state.progress.step and _was_started_with_cache(state):
        reason += "; previous steps used cached features, so the last bits of results may differ"
    return VisionCacheResult(None, f"images are encoded in every step: {reason}")


def _find_cache_blocker(state: TrainState) -> str | None:
    """Return why recipe, model or data prevent a vision cache; None if caching is possible."""
    model = state.model
    if not state.train_data.stats.num_patches:
        return "the data contain no images"
    if not isinstance(model, VisionLanguageModel):
        return f"{state.base_model.folder.family} uses the transformers backend"
    if any(parameter.requires_grad for parameter in model.visual.parameters()):
        return "the vision encoder is trainable"
    if state.parallel.is_sharded:
        return f"the vision encoder is sharded (train.parallel={state.recipe.train.parallel})"
    if not state.train_data.stats.is_complete:
        return "the dataset is too large for a full scan"
    if state.recipe.train.vision_cache == "never":
        return "train.vision_cache=never"
    if state.progress.step and not _was_started_with_cache(state):
        return "the run started without the vision cache"
    if _is_single_use(state) and not vision_store_root().is_dir():
        return REASON_SINGLE_USE
    return None


def _was_started_with_cache(state: TrainState) -> bool:
    """Return whether the previous steps of a resumed run used cached features."""
    lines = [line for line in state.run_dir.iter_metrics() if "images" in line]
    return bool(lines) and bool(lines[-1]["images"])


def _is_single_use(state: TrainState) -> bool:
    """Return whether a new run uses each image at most once on average."""
    dataset_stats, num_samples = state.train_data.stats, state.sampler.num_samples
    is_first_start = not state.progress.step
    return (
        is_first_start
        and dataset_stats.num_images * num_samples
        <= dataset_stats.num_unique_images * len(dataset_stats.sample_indices)
    )


class _VisionCacheCoordinator:
    """Coordinator that builds the vision cache on all ranks; every rank stores all features.

    Attributes:
        store: Feature files on disk; None if the disk is not used.
    """

    def __init__(self, state: TrainState, console: TrainingConsole, stop: StopRequest) -> None:
        self._state, self._console, self._stop = state, console, stop
        self._process_group, self._setting = (
            state.hardware.process_group,
            state.recipe.train.vision_cache,
        )
        self.store: VisionFileStore | None = None

    def close(self) -> None:
        """Close the feature files, so that other runs may evict them."""
        if self.store is not None:
            self.store.close()

    def build(self) -> VisionCacheResult:
        """Load the available features from disk, encode the missing ones and store all of them.

        Raises:
            _CacheUnavailable: The cache cannot be used.
        """
        is_single_use = self._run_on_all_ranks(self._open_store_if_useful)
        image_index = self._run_on_all_ranks(self._index_images)
        chunks = image_index.split_chunks()
        self._process_group.check_identical({"images": [chunk.name for chunk in chunks]})
        chunks_on_disk = [
            chunk for chunk in chunks if self.store and self.store.has_chunk(chunk.name)
        ]
        num_bytes = self._count_bytes(image_index, chunks)
        missing_bytes = num_bytes - self._count_bytes(image_index, chunks_on_disk)
        free = self._measure_free_bytes(chunks, missing_bytes)

        def start_build() -> tuple[CacheTier, VisionCacheBuilder, list[ImageChunk]]:
            if not chunks or (is_single_use and len(chunks_on_disk) < len(chunks)):
                raise _CacheUnavailable(REASON_SINGLE_USE)
            tier = choose_cache_tier(self._setting, num_bytes, missing_bytes, free)
            if tier is None:
                raise _CacheUnavailable(self._describe_lack_of_space(num_bytes, free))
            builder = VisionCacheBuilder(self._state, image_index, tier)
            return tier, builder, self._load_chunks(builder, chunks_on_disk)

        tier, builder, loaded_chunks = self._run_on_all_ranks(start_build)
        missing_chunks = self._find_missing_chunks(chunks, loaded_chunks)
        stored = self._encode_chunks(
            builder, image_index, missing_chunks, missing_bytes <= free.disk
        )
        num_images, num_from_disk = (
            len(image_index.image_refs),
            image_index.count_images(loaded_chunks),
        )
        reason = (
            f"vision cache: features of {num_images} images ({_format_bytes(num_bytes)}),"
            f" stored {_TIER_NAMES[tier]}"
        )
        if self.store is not None and (stored or loaded_chunks):
            reason += f"; {num_from_disk} of them loaded from {self.store.root}"
        return VisionCacheResult(
            builder.build(stored), reason, tier, num_images, num_from_disk, num_bytes
        )

    def _run_on_all_ranks(self, fn: Callable[[], T]) -> T:
        """Call a function that must succeed on all ranks; return the local result.

        Raises:
            TrainingInterrupted: A rank received a stop signal; raised on all ranks.
            _CacheUnavailable: The cache is unavailable on a rank; raised on all ranks.
        """
        results: list[T] = []
        blocker = ""
        with self._process_group.sync_errors():
            try:
                results.append(fn())
            except TrainingInterrupted:
                pass
            except _CacheUnavailable as error:
                blocker = str(error)
            except torch.OutOfMemoryError as error:
                blocker = f"the GPU memory is full ({first_error_line(error)})"
        payloads = self._process_group.all_gather_str(
            json.dumps([self._stop.signal_number, blocker])
        )
        signals, reasons = zip(*map(json.loads, payloads), strict=True)
        self._stop.request(max(signals))
        # Signals that arrive later are exchanged at the next barrier.
        if max(signals):
            self._stop.raise_if_requested()
        for reason in filter(None, reasons):
            raise _CacheUnavailable(reason)
        return results[0]

    def _open_store_if_useful(self) -> bool:
        """Open the feature files; return whether each image is used at most once.

        Raises:
            _CacheUnavailable: The cache cannot be used or does not pay off.
        """
        blocker = _find_cache_blocker(self._state)
        if blocker is not None:
            raise _CacheUnavailable(blocker)
        self.store = None if self._setting == "memory" else self._open_store()
        is_single_use = _is_single_use(self._state)
        if is_single_use and (self.store is None or self.store.is_empty):
            raise _CacheUnavailable(REASON_SINGLE_USE)
        return is_single_use

    def _open_store(self) -> VisionFileStore | None:
        folder, model = self._state.base_model.folder, self._state.model
        assert isinstance(model, VisionLanguageModel), (
            "a vision encoder without native implementation"
        )
        settings = {"config": folder.config, "preprocessor": folder.preprocessor_config}
        encoder_hash = fingerprint_encoder(model.visual, settings, self._state.hardware.device)
        try:
            return VisionFileStore(
                vision_store_root(), encoder_hash, use_lock=self._process_group.local_rank == 0
            )
        except UserError as error:
            self._disable_disk(error)
            return None

    def _disable_disk(self, error: UserError) -> None:
        """Log that the disk is not used, or raise if the recipe requires it."""
        if self._setting == "disk":
            raise error
        self._console.log(f"the vision cache does not use the disk: {error.where}: {error.what}")

    def _index_images(self) -> ImageIndex:
        state, indices = self._state, self._state.train_data.stats.sample_indices
        with self._console.progress_stage("hashing images", len(indices)) as on_progress:

            def on_count(count: int) -> None:
                on_progress(count)
                self._stop.raise_if_requested()

            source = state.train_data.corpus, state.renderer, indices
            return index_images(*source, state.hardware.num_workers, on_count)

    def _count_bytes(self, image_index: ImageIndex, chunks: Sequence[ImageChunk]) -> int:
        model = self._state.model
        assert isinstance(model, VisionLanguageModel), (
            "a vision encoder without native implementation"
        )
        return estimate_feature_bytes(
            image_index.count_patches(chunks), model, self._state.hardware.dtype
        )

    def _measure_free_bytes(self, chunks: Sequence[ImageChunk], missing_bytes: int) -> FreeBytes:
        """Return the minimum free space over all ranks, by storage tier.

        One rank per machine first evicts old files to make space for `missing_bytes`.
        """
        process_group, device = self._process_group, self._state.hardware.device
        names = [chunk.name for chunk in chunks]

        def evict_local() -> list[int]:
            if self.store is None:
                return [0]
            return [] if process_group.local_rank else [self.store.evict(names, missing_bytes)]

        disk, gpu = self._run_on_all_ranks(evict_local), free_gpu_memory(device)
        memory = available_memory() // process_group.local_world_size
        payloads = process_group.all_gather_str(
            json.dumps([disk, memory, [] if gpu is None else [gpu]])
        )
        disks, memories, gpus = zip(*map(json.loads, payloads), strict=True)
        return FreeBytes(
            gpu=min(chain.from_iterable(gpus), default=None),
            memory=min(memories),
            disk=min(chain.from_iterable(disks)),
        )

    def _describe_lack_of_space(self, num_bytes: int, free: FreeBytes) -> str:
        gpu = "" if free.gpu is None else f", {_format_bytes(free.gpu)} on the GPU"
        return (
            f"the features need {_format_bytes(num_bytes)}, but only"
            f" {_format_bytes(free.memory)} in memory{gpu} and {_format_bytes(free.disk)} on disk"
            " are free"
            f" (train.vision_cache={self._setting})"
        )

    def _load_chunks(
        self, builder: VisionCacheBuilder, chunks_on_disk: Sequence[ImageChunk]
    ) -> list[ImageChunk]:
        """Load the features of chunks from disk, and return the chunks with valid files."""
        store = self.store
        loaded_chunks: list[ImageChunk] = []
        if store is None:
            return loaded_chunks
        with (
            self._console.progress_stage("reading features", len(chunks_on_disk)) as on_progress,
            ThreadPoolExecutor(NUM_READER_THREADS) as pool,
        ):
            for start in range(0, len(chunks_on_disk), READ_BATCH_CHUNKS):
                self._stop.raise_if_requested()
                batch = chunks_on_disk[start : start + READ_BATCH_CHUNKS]
                valid_flags = pool.map(partial(builder.load_chunk, store), batch)
                loaded_chunks += [
                    chunk for chunk, is_valid in zip(batch, valid_flags, strict=True) if is_valid
                ]
                on_progress(len(batch))
        if len(loaded_chunks) < len(chunks_on_disk):
            num_corrupt = len(chunks_on_disk) - len(loaded_chunks)
            self._console.log(
                f"{num_corrupt} of {len(chunks_on_disk)} vision cache files in {store.folder} were"
                " corrupt and are computed again"
            )
        return loaded_chunks

    def _find_missing_chunks(
        self, chunks: Sequence[ImageChunk], loaded_chunks: Sequence[ImageChunk]
    ) -> list[ImageChunk]:
        """Return the chunks that at least one rank could not load."""
        missing_starts = sorted(chunk.start for chunk in {*chunks}.difference(loaded_chunks))
        payloads = self._process_group.all_gather_str(json.dumps(missing_starts))
        starts = {start for payload in payloads for start in json.loads(payload)}
        return [chunk for chunk in chunks if chunk.start in starts]

    def _encode_chunks(
        self,
        builder: VisionCacheBuilder,
        image_index: ImageIndex,
        chunks: Sequence[ImageChunk],
        write_to_disk: bool,
    ) -> Mapping[ImageChunk, StoredChunk]:
        """Encode the images of the missing chunks and store their features on all ranks.

        Each rank encodes every `world_size`-th chunk. One rank per machine writes the files.

        Returns:
            Files that were written on this machine.
        """
        process_group, is_writer = (
            self._process_group,
            write_to_disk and self._process_group.local_rank == 0,
        )

        def handle_write_error(error: UserError) -> None:
            self._disable_disk(error)
            if builder.tier == "disk":
                raise _CacheUnavailable(f"{error.where}: {error.what}")

        writer = FeatureWriter(self.store, handle_write_error) if self.store and is_writer else None
        with (
            closing(
                read_image_chunks(self._state, image_index, process_group.shard(chunks))
            ) as decoded_chunks,
            self._console.progress_stage(
                "encoding images", image_index.count_images(chunks)
            ) as on_progress,
            closing(writer) if writer is not None else nullcontext(),
        ):
            for start in range(0, len(chunks), process_group.world_size):
                batch = chunks[start : start + process_group.world_size]
                results = self._encode_on_all_ranks(builder, decoded_chunks, batch)
                self._run_on_all_ranks(partial(builder.store_all, results, writer))
                on_progress(sum(chunk.stop - chunk.start for chunk in batch))

            def flush_writer() -> Mapping[ImageChunk, StoredChunk]:
                builder.flush(writer)
                return {} if writer is None else writer.flush()

            return self._share_written_chunks(chunks, self._run_on_all_ranks(flush_writer))

    def _encode_on_all_ranks(
        self,
        builder: VisionCacheBuilder,
        decoded_chunks: Iterator[DecodedChunk],
        chunks: Sequence[ImageChunk],
    ) -> Sequence[ChunkFeatures]:
        """Encode one chunk on each rank, and broadcast the features of all these chunks."""
        process_group = self._process_group

        def encode_own_chunk() -> list[ChunkFeatures]:
            self._stop.raise_if_requested()
            return [
                builder.encode_chunk(next(decoded_chunks))
                if rank == process_group.rank
                else builder.allocate_chunk(chunk)
                for rank, chunk in enumerate(chunks)
            ]

        results = self._run_on_all_ranks(encode_own_chunk)
        if process_group.is_single_process:
            return results
        own_corrupt = (
            results[process_group.rank].corrupt_images if process_group.rank < len(results) else {}
        )
        serialized_errors = [
            (n, e.what, e.where, e.expected, e.remedy) for n, e in own_corrupt.items()
        ]
        payloads = [
            json.loads(payload)
            for payload in process_group.all_gather_str(json.dumps(serialized_errors))
        ]
        for rank, result in enumerate(results):
            dist.broadcast(result.features_MKD, src=rank)
        corrupt_by_rank = [
            {n: _build_image_error(*error_fields) for n, *error_fields in payload}
            for payload in payloads
        ]
        return [
            result._replace(corrupt_images=corrupt_images)
            for result, corrupt_images in zip(results, corrupt_by_rank, strict=False)
        ]

    def _share_written_chunks(
        self, chunks: Sequence[ImageChunk], stored: Mapping[ImageChunk, StoredChunk]
    ) -> Mapping[ImageChunk, StoredChunk]:
        """Return the files that the writing rank of this machine has created."""
        if self._process_group.is_single_process:
            return stored
        own = [
            (chunk.start, str(stored_chunk.path), stored_chunk.data_offset)
            for chunk, stored_chunk in stored.items()
        ]
        payload = self._process_group.all_gather_str(json.dumps(own))[
            self._process_group.rank - self._process_group.local_rank
        ]
        by_start = {chunk.start: chunk for chunk in chunks}
        return {
            by_start[n]: StoredChunk(Path(path), data_offset)
            for n, path, data_offset in json.loads(payload)
        }


def _build_image_error(what: str, where: str, expected: str, remedy: str) -> CorruptImageError:
    return CorruptImageError(what, where=where, expected=expected, remedy=remedy)


def _format_bytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:,.2f} MB"
