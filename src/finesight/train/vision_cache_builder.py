"""Vision cache: encodes the images of a run once if the vision encoder is frozen.

This module decides whether the cache pays off, builds it on all ranks, and offloads the vision
encoder from the GPU while the cache replaces it.

Shapes: N patches, M image tokens of a chunk, A image tokens of all images, K features per token, D
width.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import PIL
import torch
import torch.distributed as dist
from torch import Tensor, nn

from finesight.encode.batch import pad_patches
from finesight.encode.renderer import Renderer
from finesight.encode.tokenization import TokenizedSample, VisualSpan, iter_video_runs
from finesight.errors import TrainingInterrupted, UserError
from finesight.host_memory import available_memory
from finesight.model.attention import has_amx_bf16
from finesight.model.backend import as_native
from finesight.model.backend_model import BackendModel
from finesight.model.vlm import VisionLanguageModel
from finesight.progress import ProgressCallback
from finesight.samples.corpus import Corpus
from finesight.samples.image_file import CorruptImageError, sha256_content
from finesight.train.device_timing import record_event
from finesight.train.oom import first_error_line, release_memory
from finesight.train.prefetch import prefetch_items
from finesight.train.sample_scan import scan_samples
from finesight.train.state import TrainState
from finesight.train.step_transfer import TensorBlock
from finesight.train.vision_cache import (
    CacheTier,
    FreeBytes,
    ImageChunk,
    ImageIndex,
    ImageRef,
    VisionCache,
    VisionCacheReader,
    VisionDiskReader,
    VisionFileStore,
    choose_cache_tier,
    compute_sha256,
    vision_cache_root,
)
from finesight.train.vision_cache_choice import find_slow_reason
from finesight.vision.image_processing import concat_patches, concat_shape

CorruptImages = dict[int, CorruptImageError]
"""Errors of corrupt images, by index of the image in an `ImageIndex`."""

ENCODER_VERSION = 5
"""Version of the encoder computation and preprocessing; increase it when features change."""

MAX_PENDING_CHUNKS = 8
"""Maximum number of chunks that wait to be written to disk; limits memory."""

NUM_HASH_THREADS = 8
"""Number of threads that compute digests of the encoder weights."""

NUM_READER_THREADS = 4
"""Number of threads that read feature files."""

NUM_WRITER_THREADS = 2
"""Number of threads that write feature files."""


def _read_image_refs(corpus: Corpus, renderer: Renderer, index: int) -> list[ImageRef]:
    spans = renderer.tokenize(corpus[index]).spans
    return [ImageRef(_compute_key(span), span) for span in spans]


def _compute_key(span: VisualSpan) -> str:
    key_fields: list[object] = [
        [_compute_file_digest(file) for file in span.files],
        span.kind,
        span.resized_size,
        span.grid_thw,
    ]
    if not span.frame_indices:
        return hashlib.sha256(json.dumps(key_fields).encode()).hexdigest()
    # Spans of a video file are adjacent and in order, so that a chunk decodes the file once.
    digests = [hashlib.sha256(json.dumps(key_fields[:3]).encode()).hexdigest()[:32]]
    digests.append(f"{span.frame_indices[0]:08x}")
    key_fields += [span.frame_indices, version("av")]
    digests.append(hashlib.sha256(json.dumps(key_fields).encode()).hexdigest()[:24])
    return "".join(digests)


@lru_cache(maxsize=64)  # samples with the same image are often adjacent
def _compute_file_digest(file: Path) -> str:
    try:
        return sha256_content(file)
    except OSError as error:
        raise CorruptImageError(
            f"cannot be read: {error.strerror or error}",
            where=str(file),
            expected="a readable image during the complete run",
            remedy="restore the image, or correct its permissions",
        ) from error


def index_images(
    corpus: Corpus,
    renderer: Renderer,
    samples: Sequence[int],
    num_workers: int,
    on_progress: ProgressCallback,
) -> ImageIndex:
    """Hash the image files of samples, and build an index of the unique images.

    Raises:
        UserError: A sample has an error other than a corrupt image.
    """
    refs_by_sample: dict[int, list[ImageRef]] = {}
    corrupt_samples: dict[int, CorruptImageError] = {}
    # The images may have changed since an earlier scan.
    _compute_file_digest.cache_clear()
    read_image_refs = partial(_read_image_refs, corpus, renderer)
    with closing(scan_samples(read_image_refs, samples, num_workers, on_progress)) as results:
        for index, result in zip(samples, results, strict=True):
            if isinstance(result, CorruptImageError):
                corrupt_samples[index] = result
            elif isinstance(result, UserError):
                raise result
            else:
                refs_by_sample[index] = result
    refs_by_key: dict[str, ImageRef] = {}
    for refs in refs_by_sample.values():
        for ref in refs:
            refs_by_key[ref.key] = ref
    index_by_key = {key: n for n, key in enumerate(sorted(refs_by_key))}
    image_refs = tuple(refs_by_key[key] for key in index_by_key)
    images_by_sample: dict[int, tuple[int, ...]] = {}
    for index, refs in refs_by_sample.items():
        images_by_sample[index] = tuple(index_by_key[ref.key] for ref in refs)
    return ImageIndex(image_refs, images_by_sample, corrupt_samples)


def fingerprint_encoder(
    vision_encoder: nn.Module, settings: dict[str, Any], device: torch.device
) -> str:
    """Return a SHA-256 of everything that determines the features of an image.

    It covers the weights, model settings, library versions and device. Cached features of another
    fingerprint are not used.

    Args:
        settings: Content of `config.json` and of the preprocessor configuration.
    """

    def compute_digest(tensor: Tensor) -> str:
        # A copy, because storage exported to numpy cannot be resized.
        copy = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        return compute_sha256(copy)

    tensors = {**dict(vision_encoder.named_parameters()), **dict(vision_encoder.named_buffers())}
    with ThreadPoolExecutor(NUM_HASH_THREADS) as pool:
        digests = list(pool.map(compute_digest, tensors.values()))
    device_name = f"{torch.backends.cpu.get_cpu_capability()} {torch.get_num_threads()} threads"
    if device.type == "cuda":
        device_name = torch.cuda.get_device_name(device)
    environment = {
        "version": ENCODER_VERSION,
        "torch": torch.__version__,
        "pillow": PIL.__version__,
        "device": device_name,
        "tiles": device.type != "cuda" and has_amx_bf16(),
        "products": torch.get_float32_matmul_precision(),
    }
    weights = []
    for (name, tensor), digest in zip(tensors.items(), digests, strict=True):
        weights.append((name, str(tensor.dtype), list(tensor.shape), digest))
    payload = json.dumps([environment, settings, weights], sort_keys=True, default=str)
    return hashlib.sha256(payload.encode()).hexdigest()


def should_offload(device: torch.device) -> bool:
    """Return whether to offload an unused vision encoder: only on a GPU."""
    return device.type == "cuda"


class EncoderOffloader:
    """Offloader of the weights of a frozen vision encoder to the CPU.

    The storage of the weights is resized to zero and later refilled, so all tensors that share it
    stay valid. Tensors shared with the rest of the model, and models of the transformers backend,
    stay on the device.
    """

    def __init__(self, model: BackendModel) -> None:
        self._model = model
        self._cpu_copies: list[tuple[torch.UntypedStorage, Tensor]] = []
        self.is_offloaded = False

    @contextmanager
    def hold(self, *, is_offloaded: bool) -> Iterator[None]:
        """Keep the encoder weights on the CPU or on the device within the context.

        An offloaded encoder can be used only inside a nested context on the device.
        """
        was_offloaded = self.is_offloaded
        self._move(is_offloaded)
        try:
            yield
        finally:
            self._move(was_offloaded)

    def _move(self, is_offloaded: bool) -> None:
        if is_offloaded == self.is_offloaded:
            return
        if is_offloaded:
            self._copy_to_cpu()
        for storage, cpu_copy in self._cpu_copies:
            if is_offloaded:
                storage.resize_(0)
            else:
                storage.resize_(len(cpu_copy))
                _view_bytes(storage).copy_(cpu_copy)
        self.is_offloaded = is_offloaded

    def _copy_to_cpu(self) -> None:
        """Copy the storages of the encoder, or keep the copies of an earlier call."""
        storages = self._list_storages()
        # The identity of a storage does not change when it is resized.
        copied = {storage._cdata for storage, _ in self._cpu_copies}
        if copied == {storage._cdata for storage in storages}:
            # Frozen weights do not change.
            return
        self._cpu_copies = [(one, _view_bytes(one).to("cpu", copy=True)) for one in storages]

    def _list_storages(self) -> list[torch.UntypedStorage]:
        """Return the storages that only tensors of the vision encoder use."""
        model = self._model
        own = model.list_vision_tensors()
        own_ids = {id(tensor) for tensor in own}
        shared_addresses = set()
        for tensor in chain(model.parameters(), model.buffers()):
            if id(tensor) not in own_ids:
                shared_addresses.add(tensor.untyped_storage().data_ptr())
        storages: dict[int, torch.UntypedStorage] = {}
        for tensor in own:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in shared_addresses:
                storages[storage.data_ptr()] = storage
        return list(storages.values())


def _view_bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def free_gpu_memory(device: torch.device) -> int:
    """Return the bytes of GPU memory available to this process; 0 on a CPU.

    Memory that PyTorch has cached but does not use counts as available.
    """
    if device.type != "cuda":
        return 0
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


@dataclass(frozen=True, slots=True)
class VisionCacheResult:
    """Vision cache of a run, or the reason for training without it.

    Attributes:
        cache: Vision cache; None if images are encoded in every step.
        reason: Description of the decision for the user.
        tier: Storage tier of the features.
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


class VisionFeatures:
    """Image features of a training run: from the vision cache, or from the encoder in every step.

    The vision encoder is offloaded from the GPU to the CPU while the cache replaces it.
    """

    def __init__(self, state: TrainState) -> None:
        self._state = state
        self.offloader = EncoderOffloader(state.engine.model)

    @contextmanager
    def open(self, log: Callable[[float, VisionCacheResult], None]) -> Iterator[VisionCache | None]:
        """Build the vision cache if it pays off, and provide it within the context.

        `_find_cache_blocker` and `find_slow_reason` list when it does not. It also needs space for
        the features. A resumed run does not use the cache if it started without it.

        Args:
            log: Callback for the seconds to build the cache, and the result.

        Yields:
            Vision cache; None to encode images in every step.
        """
        start = time.perf_counter()
        state = self._state
        with closing(VisionCacheBuilder(state)) as builder:
            try:
                result = builder.build()
            except _CacheUnavailable as blocker:
                reason = f"images are encoded in every step: {blocker}"
                if state.progress.step and _was_started_with_cache(state):
                    reason += (
                        "; previous steps used cached features, so the last bits of results may"
                        " differ"
                    )
                result = VisionCacheResult(None, reason)
                release_memory(state.run.hardware.device)
            if result.tier != "disk":
                # Other runs may now remove the files.
                builder.close()
            log(time.perf_counter() - start, result)
            offload = result.cache is not None and should_offload(state.run.hardware.device)
            with self.offloader.hold(is_offloaded=offload):
                yield result.cache


class _CacheUnavailable(Exception):
    """Raised with the reason when the vision cache cannot be used."""


def _find_cache_blocker(state: TrainState) -> str | None:
    """Return why recipe, model or data prevent a vision cache; None if caching is possible."""
    model = state.engine.model
    if not state.data.train.stats.num_patches:
        return "the data contain no images"
    if not model.capabilities.image_features:
        return f"{state.run.base_model.folder.family} uses the transformers backend"
    if any(tensor.requires_grad for tensor in model.list_vision_tensors()):
        return "the vision encoder is trainable"
    if state.engine.parallel.is_sharded:
        return f"the vision encoder is sharded (train.parallel={state.run.recipe.train.parallel})"
    if not state.data.train.stats.is_complete:
        return "the dataset is too large for a full scan"
    if state.run.recipe.needs.steps_contain_images:
        name = state.run.recipe.train.component.name
        return f"the steps of train.objective={name} contain their images"
    if state.run.recipe.data.augment is not None:
        return "data.augment changes the images of every step"
    if state.run.recipe.train.vision_cache == "never":
        return "train.vision_cache=never"
    if state.progress.step and not _was_started_with_cache(state):
        return "the run started without the vision cache"
    return None


def _was_started_with_cache(state: TrainState) -> bool:
    """Return whether the previous steps of a resumed run used cached features."""
    num_images = 0
    for line in state.run.run_dir.iter_metrics():
        # The last line counts: a resume may have started without the cache.
        num_images = line.get("images", num_images)
    return bool(num_images)


class DecodedChunk(NamedTuple):
    """Patches of the valid images of a chunk, and errors of corrupt ones."""

    chunk: ImageChunk
    patches: TensorBlock
    corrupt_images: CorruptImages


def _decode_chunk(
    image_index: ImageIndex,
    chunks: Sequence[ImageChunk],
    renderer: Renderer,
    on_invalid_sample: Literal["skip", "fail"],
    index: int,
) -> DecodedChunk:
    """Decode the images of a chunk; data loader workers call this function.

    Raises:
        UserError: An image is corrupt and `on_invalid_sample` is `fail`.
    """
    chunk = chunks[index]
    patches = []
    corrupt_images: CorruptImages = {}
    empty_ids_T = np.empty(0, dtype=np.int32)
    position_ids = np.empty((3, 0), dtype=np.int32)
    image = chunk.start
    refs = image_index.image_refs[chunk.start : chunk.stop]
    for spans in iter_video_runs(ref.span for ref in refs):
        # Patches are loaded for samples, so this one has the image and no text.
        name = spans[0].files[0].name
        tokenized = TokenizedSample(name, empty_ids_T, empty_ids_T > 0, position_ids, tuple(spans))
        try:
            patches.append(renderer.load_patches(tokenized).patches_ND)
        except CorruptImageError as error:
            if on_invalid_sample == "fail":
                raise
            corrupt_images |= dict.fromkeys(range(image, image + len(spans)), error)
        image += len(spans)
    if not patches:
        no_patches = TensorBlock((), torch.empty(0, dtype=torch.uint8))
        return DecodedChunk(chunk, no_patches, corrupt_images)
    block = TensorBlock.allocate((torch.uint8, concat_shape(patches)))
    concat_patches(patches, next(block.tensors()).numpy())
    return DecodedChunk(chunk, block, corrupt_images)


class VisionCacheBuilder:
    """Builder of the vision cache on all ranks; every rank stores the features of all images."""

    def __init__(self, state: TrainState) -> None:
        self._state = state
        self._console = state.run.console
        self._stop = state.run.stop
        self._process_group = state.run.hardware.process_group
        self._setting = state.run.recipe.train.vision_cache
        self._store: VisionFileStore | None = None
        self._writer_pool: ThreadPoolExecutor | None = None
        self._writes: deque[Future[None]] = deque()
        self._corrupt_images: CorruptImages = {}
        self._pending: tuple[ImageChunk, Tensor, torch.cuda.Event | None] | None = None

    @property
    def _model(self) -> VisionLanguageModel:
        return as_native(self._state.engine.model)

    def close(self) -> None:
        """Close the feature files, so that other runs may evict them."""
        if self._store is not None:
            self._store.close()

    def build(self) -> VisionCacheResult:
        """Load the available features from disk, encode the missing ones and store all of them.

        Raises:
            _CacheUnavailable: The cache cannot be used.
        """
        # The ranks exchange features, so each phase starts only if all ranks finished the previous
        # one: a rank that falls back alone would block the others.
        slow_reason, *_ = self._run_on_all_ranks(self._open_store_if_useful)
        self._run_on_all_ranks(self._index_images)
        self._chunks = chunks = self._image_index.split_chunks()
        self._process_group.check_identical({"images": [chunk.name for chunk in chunks]})
        on_disk = [chunk for chunk in chunks if self._store and self._store.has_chunk(chunk.name)]
        num_bytes = self._count_bytes(chunks)
        missing_bytes = num_bytes - self._count_bytes(on_disk)
        # After the eviction of old files, whose space counts as free.
        measure_free_bytes = partial(self._measure_free_bytes, missing_bytes)
        free_by_rank = self._run_on_all_ranks(measure_free_bytes)
        free = FreeBytes(*map(min, zip(*free_by_rank, strict=True)))
        loaded_chunks: list[ImageChunk] = []

        def start_build() -> list[int]:
            if slow_reason is not None and len(on_disk) < len(chunks):
                raise _CacheUnavailable(f"{slow_reason}, and not all features are on disk")
            if not chunks:
                raise _CacheUnavailable("no image is valid")
            self._tier = self._choose_tier(num_bytes, missing_bytes, free)
            self._features_AKD = self._allocate_features()
            loaded_chunks.extend(self._load_chunks(on_disk))
            return [chunk.start for chunk in {*chunks}.difference(loaded_chunks)]

        # All ranks encode each chunk, so it is missing if one of them could not load it.
        starts = {*chain.from_iterable(self._run_on_all_ranks(start_build))}
        missing_chunks = [chunk for chunk in chunks if chunk.start in starts]
        self._encode_chunks(missing_chunks, missing_bytes <= free.disk)
        num_images = len(self._image_index.image_refs)
        num_from_disk = self._image_index.count_images(loaded_chunks)
        location = {"gpu": "on the GPU", "memory": "in memory", "disk": "on disk"}[self._tier]
        reason = (
            f"vision cache: features of {num_images} images ({_format_bytes(num_bytes)}),"
            f" stored {location}"
        )
        if self._store is not None:
            reason += f"; {num_from_disk} of them loaded from {self._store.root}"
        return VisionCacheResult(
            self._build_cache(), reason, self._tier, num_images, num_from_disk, num_bytes
        )

    def _choose_tier(self, num_bytes: int, missing_bytes: int, free: FreeBytes) -> CacheTier:
        """Choose the storage tier of the features.

        Raises:
            _CacheUnavailable: No tier has enough free space.
        """
        tier = choose_cache_tier(self._setting, num_bytes, missing_bytes, free)
        if tier is not None:
            return tier
        text = f"the features need {_format_bytes(num_bytes)}, but only"
        text += f" {_format_bytes(free.memory)} in memory"
        if free.gpu:
            text += f", {_format_bytes(free.gpu)} on the GPU"
        text += f" and {_format_bytes(free.disk)} on disk are free"
        raise _CacheUnavailable(f"{text} (train.vision_cache={self._setting})")

    def _allocate_features(self) -> Tensor:
        """Allocate the features of all images in the chosen tier; features on disk need none."""
        hardware = self._state.run.hardware
        num_rows = 0
        if self._tier != "disk":
            num_rows = int(self._image_index.feature_offsets_P1[-1])
        return torch.empty(
            (num_rows, *self._feature_shape),
            dtype=hardware.dtype,
            device=hardware.device if self._tier == "gpu" else "cpu",
        )

    def _run_on_all_ranks(self, fn: Callable[[], object]) -> list[Any]:
        """Call a function that must succeed on all ranks; return the JSON results in rank order.

        Raises:
            TrainingInterrupted: A rank received a stop signal; raised on all ranks.
            _CacheUnavailable: The cache is unavailable on a rank; raised on all ranks.
        """
        result: object = None
        blocker = ""
        with self._process_group.sync_errors():
            try:
                result = fn()
            except TrainingInterrupted:
                pass
            except _CacheUnavailable as error:
                blocker = str(error)
            except torch.OutOfMemoryError as error:
                blocker = f"the GPU memory is full ({first_error_line(error)})"
        own_outcome = self._stop.signal or 0, blocker, result
        outcomes = self._process_group.all_gather_object(own_outcome)
        signals, blockers, results = zip(*outcomes, strict=True)
        self._stop.request(max(signals))
        # Signals that arrive later are exchanged at the next barrier.
        if max(signals):
            self._stop.raise_if_requested()
        for reason in filter(None, blockers):
            raise _CacheUnavailable(reason)
        return [*results]

    def _open_store_if_useful(self) -> str | None:
        """Open the feature files; return why a new run is faster without a new cache, else None.

        Raises:
            _CacheUnavailable: The cache cannot be used or does not pay off.
        """
        state = self._state
        blocker = _find_cache_blocker(state)
        if blocker is not None:
            raise _CacheUnavailable(blocker)
        root = vision_cache_root()
        slow_reason = None
        if not state.progress.step:
            slow_reason = self._find_slow_reason()
        if slow_reason is not None and not root.is_dir():
            raise _CacheUnavailable(slow_reason)
        if self._setting != "memory":
            folder = state.run.base_model.folder
            settings = {"config": folder.config, "preprocessor": folder.preprocessor_config}
            encoder_hash = fingerprint_encoder(
                self._model.visual, settings, state.run.hardware.device
            )
            is_local_main = self._process_group.local_rank == 0
            try:
                self._store = VisionFileStore(root, encoder_hash, use_lock=is_local_main)
            except UserError as error:
                self._disable_disk(error)
        if slow_reason is not None and (self._store is None or self._store.is_empty):
            raise _CacheUnavailable(slow_reason)
        return slow_reason

    def _find_slow_reason(self) -> str | None:
        """Return why the run is faster without a new cache; None if the cache saves time."""
        state = self._state
        hardware = state.run.hardware
        flop_counter = state.engine.flop_counter
        assert flop_counter is not None, "a model of the transformers backend"
        return find_slow_reason(
            self._setting,
            state.data.train.stats,
            state.data.sampler.num_samples,
            flop_counter,
            hardware.peak_flops if hardware.device.type == "cuda" else None,
            hardware.process_group.world_size,
        )

    def _disable_disk(self, error: UserError) -> None:
        """Log that the disk is not used, or raise if the recipe requires it."""
        if self._setting == "disk":
            raise error
        self._console.log(f"the vision cache does not use the disk: {error.where}: {error.what}")

    def _index_images(self) -> None:
        state = self._state
        indices = state.data.train.stats.sample_indices
        with self._console.progress_stage("hashing images", len(indices)) as on_progress:

            def on_count(count: int) -> None:
                on_progress(count)
                self._stop.raise_if_requested()

            source = state.data.train.corpus, state.data.renderer, indices
            num_workers = state.run.hardware.num_workers
            self._image_index = index_images(*source, num_workers, on_count)

    def _count_features(self, chunk: ImageChunk) -> int:
        """Count the image tokens of a chunk."""
        offsets_P1 = self._image_index.feature_offsets_P1
        return int(offsets_P1[chunk.stop] - offsets_P1[chunk.start])

    def _count_bytes(self, chunks: Sequence[ImageChunk]) -> int:
        num_features = sum(map(self._count_features, chunks))
        num_elements = num_features * math.prod(self._feature_shape)
        return num_elements * self._state.run.hardware.dtype.itemsize

    @property
    def _feature_shape(self) -> tuple[int, int]:
        """Shape [K, D] of the features of an image token."""
        return self._model.visual.features_per_token, self._model.config.decoder.hidden_size

    def _measure_free_bytes(self, missing_bytes: int) -> FreeBytes:
        """Return the free space of this rank, by storage tier.

        One rank per machine first evicts old files to make space for `missing_bytes`.
        """
        disk = 0
        if self._store is not None and self._process_group.local_rank:
            # Another rank reports the disk of this machine.
            disk = sys.maxsize
        elif self._store is not None:
            disk = self._store.evict([chunk.name for chunk in self._chunks], missing_bytes)
        gpu = free_gpu_memory(self._state.run.hardware.device)
        memory = available_memory() // self._process_group.local_world_size
        return FreeBytes(gpu, memory, disk)

    def _new_features(self, chunk: ImageChunk, device: torch.device | str) -> Tensor:
        """Allocate uninitialized features [M, K, D] of a chunk."""
        shape = self._count_features(chunk), *self._feature_shape
        return torch.empty(shape, dtype=self._features_AKD.dtype, device=device)

    def _chunk_view(self, chunk: ImageChunk) -> Tensor:
        offsets_P1 = self._image_index.feature_offsets_P1
        return self._features_AKD[offsets_P1[chunk.start] : offsets_P1[chunk.stop]]

    def _load_chunks(self, chunks_on_disk: Sequence[ImageChunk]) -> list[ImageChunk]:
        """Load the features of chunks from disk, and return the chunks with valid files."""
        store = self._store
        if store is None:
            return []

        def load_chunk(chunk: ImageChunk) -> bool:
            self._stop.raise_if_requested()
            if self._tier == "memory":
                return store.read(chunk.name, self._chunk_view(chunk))
            features = self._new_features(chunk, "cpu")
            is_valid = store.read(chunk.name, features)
            if is_valid and self._tier == "gpu":
                self._chunk_view(chunk).copy_(features)
            return is_valid

        loaded: list[ImageChunk] = []
        with (
            self._console.progress_stage("reading features", len(chunks_on_disk)) as on_progress,
            ThreadPoolExecutor(NUM_READER_THREADS) as pool,
        ):
            for chunk, is_valid in zip(
                chunks_on_disk, pool.map(load_chunk, chunks_on_disk), strict=True
            ):
                if is_valid:
                    loaded.append(chunk)
                on_progress(1)
        num_corrupt = len(chunks_on_disk) - len(loaded)
        if num_corrupt:
            self._console.log(
                f"{num_corrupt} of {len(chunks_on_disk)} vision cache files in {store.folder} were"
                " corrupt and are computed again"
            )
        return loaded

    def _encode_chunks(self, chunks: Sequence[ImageChunk], write_to_disk: bool) -> None:
        """Encode the images of the missing chunks and store their features on all ranks.

        Each rank encodes every `world_size`-th chunk. One rank per machine writes the files.
        """
        state = self._state
        process_group = self._process_group
        own_chunks = process_group.shard(chunks)
        decode_chunk = partial(
            _decode_chunk,
            self._image_index,
            own_chunks,
            state.data.renderer,
            state.run.recipe.data.on_invalid_sample,
        )
        with ExitStack() as stack:
            if self._store and write_to_disk and process_group.local_rank == 0:
                self._writer_pool = stack.enter_context(ThreadPoolExecutor(NUM_WRITER_THREADS))
            decoded_chunks = prefetch_items(
                decode_chunk,
                range(len(own_chunks)),
                min(state.run.hardware.num_workers, len(own_chunks)),
                state.run.hardware.device.type == "cuda",
            )
            # The workers end when the generator is closed.
            stack.enter_context(closing(decoded_chunks))
            num_images = self._image_index.count_images(chunks)
            on_progress = stack.enter_context(
                self._console.progress_stage("encoding images", num_images)
            )
            for start in range(0, len(chunks), process_group.world_size):
                batch = chunks[start : start + process_group.world_size]
                features = self._encode_on_all_ranks(decoded_chunks, batch)
                self._run_on_all_ranks(partial(self._store_chunks, batch, features))
                on_progress(self._image_index.count_images(batch))
            self._run_on_all_ranks(partial(self._finish_pending, 0))

    def _wait_for_writes(self, max_pending: int) -> None:
        """Wait until at most `max_pending` chunks are being written; no more after an error.

        Raises:
            _CacheUnavailable: The features are needed on disk, and cannot be written.
        """
        while len(self._writes) > max_pending:
            try:
                self._writes.popleft().result()
            except UserError as error:
                self._writes.clear()
                self._writer_pool = None
                self._disable_disk(error)
                if self._tier == "disk":
                    raise _CacheUnavailable(f"{error.where}: {error.what}") from error

    def _encode_on_all_ranks(
        self, decoded_chunks: Iterator[DecodedChunk], chunks: Sequence[ImageChunk]
    ) -> Sequence[Tensor]:
        """Encode one chunk on each rank, and broadcast the features of all these chunks."""
        rank = self._process_group.rank
        device = self._state.run.hardware.device
        all_features: list[Tensor] = []

        def encode_own_chunk() -> list[tuple[object, ...]]:
            self._stop.raise_if_requested()
            corrupt_images: CorruptImages = {}
            for position, chunk in enumerate(chunks):
                if position == rank:
                    decoded_chunk = next(decoded_chunks)
                    corrupt_images = decoded_chunk.corrupt_images
                    all_features.append(self._encode_chunk(decoded_chunk))
                else:
                    all_features.append(self._new_features(chunk, device))
            errors: list[tuple[object, ...]] = []
            for n, error in corrupt_images.items():
                errors.append((n, error.what, error.where, error.expected, error.remedy))
            return errors

        for errors in self._run_on_all_ranks(encode_own_chunk):
            for n, what, where, expected, remedy in errors:
                error = CorruptImageError(what, where=where, expected=expected, remedy=remedy)
                self._corrupt_images[n] = error
        if not self._process_group.is_single_process:
            for source, features_MKD in enumerate(all_features):
                dist.broadcast(features_MKD, src=source)
        return all_features

    @torch.no_grad()
    def _encode_chunk(self, decoded_chunk: DecodedChunk) -> Tensor:
        """Return the features of a chunk [M, K, D]; those of corrupt images are zero."""
        index = self._image_index
        device = self._state.run.hardware.device
        loader = self._state.engine.device_loader
        chunk, block, corrupt_images = decoded_chunk
        valid = [n for n in range(chunk.start, chunk.stop) if n not in corrupt_images]
        if not valid:
            return self._new_features(chunk, device).zero_()
        (patches_ND,) = block.tensors()
        grids = tuple(index.image_refs[n].span.grid_thw for n in valid)
        if loader.pads_shapes and loader.padding_merge_size is not None:
            patches_ND, grids = pad_patches(patches_ND, grids, loader.padding_merge_size)
        encoded_MKD = self._model.encode_images(patches_ND.to(device, non_blocking=True), grids)
        rows_M = index.feature_rows(valid) - index.feature_offsets_P1[chunk.start]
        # `pad_patches` appended a dummy image, whose features belong to no image of the chunk.
        encoded_MKD = encoded_MKD[: len(rows_M)]
        if not corrupt_images:
            return encoded_MKD
        features_MKD = self._new_features(chunk, device).zero_()
        return features_MKD.index_copy_(0, torch.from_numpy(rows_M).to(device), encoded_MKD)

    def _store_chunks(self, chunks: Sequence[ImageChunk], all_features: Sequence[Tensor]) -> None:
        """Start storing the features of chunks; the last one is finished by the next call.

        Its copy overlaps with the computation of the next chunk.
        """
        for chunk, features_MKD in zip(chunks, all_features, strict=True):
            event = None
            if self._tier == "gpu":
                self._chunk_view(chunk).copy_(features_MKD)
            if features_MKD.is_cuda and (self._tier != "gpu" or self._writer_pool is not None):
                features_MKD = features_MKD.to("cpu", non_blocking=True)
                event = record_event(self._state.run.hardware.device)
            self._finish_pending()
            self._pending = chunk, features_MKD, event

    def _finish_pending(self, max_writes: int = MAX_PENDING_CHUNKS) -> None:
        """Finish storing the last chunk, and wait for all but `max_writes` files."""
        if self._pending is not None:
            chunk, features_MKD, event = self._pending
            self._pending = None
            if event is not None:
                event.synchronize()
            if self._tier == "memory":
                features_MKD = self._chunk_view(chunk).copy_(features_MKD)
            name = self._get_file_name(chunk)
            if self._writer_pool and self._store and (name == chunk.name or self._tier == "disk"):
                self._writes.append(self._writer_pool.submit(self._store.write, name, features_MKD))
        self._wait_for_writes(max_writes)

    def _get_file_name(self, chunk: ImageChunk) -> str:
        if self._corrupt_images.keys().isdisjoint(range(chunk.start, chunk.stop)):
            return chunk.name
        # Incomplete chunks are private to this run; other runs must detect corrupt images.
        return f"{chunk.name}-corrupt"

    def _build_cache(self) -> VisionCache:
        """Create the vision cache after all chunks are stored."""
        corrupt_samples = dict(self._image_index.corrupt_samples)
        for sample, images in self._image_index.images_by_sample.items():
            for image in images:
                if image in self._corrupt_images:
                    corrupt_samples[sample] = self._corrupt_images[image]
        index = replace(self._image_index, corrupt_samples=corrupt_samples)
        device = self._state.run.hardware.device
        dtype = self._features_AKD.dtype
        if self._tier == "gpu":
            reader = VisionCacheReader(index, torch.int64, ())
            return VisionCache(reader, device, self._features_AKD)
        if self._tier == "memory":
            source = index, dtype, self._feature_shape
            return VisionCache(VisionCacheReader(*source, features_AKD=self._features_AKD), device)
        assert self._store is not None, "the disk tier has no folder"
        paths = [self._store.chunk_path(self._get_file_name(chunk)) for chunk in self._chunks]
        starts = np.array([chunk.start for chunk in self._chunks])
        files = VisionDiskReader(index, dtype, self._feature_shape, paths, starts)
        return VisionCache(files, device)


def _format_bytes(num_bytes: int) -> str:
    if num_bytes >= 1e8:
        return f"{num_bytes / 1e9:,.2f} GB"
    return f"{num_bytes / 1e6:,.2f} MB"
