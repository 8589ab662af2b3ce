"""Vision cache decision: conditions, storage tiers, obstacles, and the offloaded encoder."""

import errno
import hashlib
import io
import itertools
import json
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file
from tiny_task import edit_samples, read_losses
from video_fixtures import write_video
from vision_cache_fixtures import (
    LORA,
    assert_features_match,
    build_vision_cache,
    decide_vision_cache,
    make_train_state,
    read_all_features,
)

from finesight.encode import renderer as renderer_module
from finesight.encode.tokenization import VisualSpan
from finesight.errors import UserError
from finesight.host_memory import available_memory
from finesight.model.vlm import VisionLanguageModel
from finesight.samples.image_file import CorruptImageError
from finesight.samples.video_file import iter_video_frames
from finesight.train import vision_cache, vision_cache_builder
from finesight.train.state import TrainState
from finesight.train.vision_cache import (
    CHUNK_PATCHES,
    FreeBytes,
    ImageIndex,
    ImageRef,
    VisionDiskReader,
    VisionFileStore,
    choose_cache_tier,
)
from finesight.train.vision_cache_builder import (
    EncoderOffloader,
    fingerprint_encoder,
    free_gpu_memory,
    index_images,
)

CPU = torch.device("cpu")
NO_DISK = "the vision cache does not use the disk"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "task"


@pytest.mark.parametrize("part", ["merger", "vision"])
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_trainable_encoder_disables_the_vision_cache(tmp_path, part, mode):
    outcome = decide_vision_cache(make_train_state(tmp_path / "task", LORA | {part: mode}))
    assert outcome.cache is None
    assert outcome.reason == "images are encoded in every step: the vision encoder is trainable"


def test_single_epoch_disables_the_vision_cache(folder, monkeypatch):
    """Unless all of their features are on disk already, or images repeat."""
    state = make_train_state(folder, epochs=1)
    with monkeypatch.context() as patched:
        patched.setattr(vision_cache_builder, "index_images", None)
        outcome = decide_vision_cache(state)
    assert outcome.cache is None
    assert "images have fewer than 1.25 uses" in outcome.reason
    build_vision_cache(make_train_state(folder, epochs=2))
    outcome = decide_vision_cache(state)
    assert outcome.num_from_disk == outcome.num_images == 9, "two pairs of files are equal"
    Image.new("RGB", (56, 56), (1, 2, 3)).save(folder / "train0.png")
    assert decide_vision_cache(make_train_state(folder, epochs=1)).cache is None
    with edit_samples(folder / "train.jsonl") as samples:
        samples += [{**sample, "id": f"again-{sample['id']}"} for sample in samples]
    state = make_train_state(folder, epochs=1)
    assert state.data.train.stats.num_images == 22
    assert state.data.train.stats.num_unique_images == 11
    assert decide_vision_cache(state).num_images == 9


def test_features_that_fit_nowhere(folder, monkeypatch):
    state = make_train_state(folder)
    monkeypatch.setattr(vision_cache_builder, "free_gpu_memory", lambda device: 0)
    for memory, tier in ((2_000_000, "memory"), (1000, "disk")):
        monkeypatch.setattr(vision_cache_builder, "available_memory", lambda free=memory: free)
        assert decide_vision_cache(state).tier == tier
    limited = decide_vision_cache(make_train_state(folder, vision_cache="memory"))
    assert limited.cache is None
    assert "but only 0.00 MB in memory" in limited.reason
    assert "(train.vision_cache=memory)" in limited.reason


def test_changed_image_is_encoded_again(folder, assets):
    """The file has the same size and modification time."""
    before = build_vision_cache(make_train_state(folder))
    path = folder / "train0.png"
    stat = path.stat()
    with Image.open(path) as image:
        size = image.size
    Image.new("RGB", size, (9, 99, 199)).save(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    outcome = decide_vision_cache(make_train_state(folder))
    assert outcome.num_from_disk < outcome.num_images
    for file in assets.rglob("*.safetensors"):
        file.unlink()
    state = make_train_state(folder)
    fresh = read_all_features(state, build_vision_cache(state))
    assert torch.equal(read_all_features(state, outcome.cache), fresh)
    assert not torch.equal(read_all_features(state, before), fresh)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_cached_features_of_a_file_match(tmp_path, family, monkeypatch):
    """Four frames of each file are sampled, and decoded at most once per chunk of features."""
    folder = tmp_path / "task"
    make_train_state(folder, family=family)
    with edit_samples(folder / "train.jsonl") as samples:
        for number in (1, 4, 5):
            size = (56, 56 + 28 * number)
            path = write_video(folder / f"{number}.mp4", num_frames=16, size=size)
            part = {"type": "video", "video": path.name}
            samples[number]["messages"][0]["content"][0] = part
    state = make_train_state(folder, vision_cache="memory")
    decoded: list[list[int]] = []

    def record(path: Path, frame_indices: Sequence[int]) -> Iterator[Image.Image]:
        decoded.append(list(frame_indices))
        return iter_video_frames(path, frame_indices)

    with monkeypatch.context() as patch:
        patch.setattr(renderer_module, "iter_video_frames", record)
        cache = build_vision_cache(state)
    assert sum(map(len, decoded)) == 4 * 3
    assert len(decoded) <= 3 * len(cache.reader.image_index.split_chunks())
    assert_features_match(state, cache)


def test_encoder_or_size_change_invalidates_the_cache(folder):
    first = decide_vision_cache(make_train_state(folder))
    assert decide_vision_cache(make_train_state(folder)).num_from_disk == first.num_images
    recipe = json.loads((folder / "task.json").read_text())
    smaller = recipe | {"image": {"min_pixels": 784, "max_pixels": 3136}}
    (folder / "task.json").write_text(json.dumps(smaller))
    assert decide_vision_cache(make_train_state(folder)).num_from_disk < first.num_images
    (folder / "task.json").write_text(json.dumps(recipe))
    state = make_train_state(folder)
    with torch.no_grad():
        state.engine.model.visual.merger.mlp.linears[1].bias[3] += 1e-3
    assert decide_vision_cache(state).num_from_disk == 0
    assert decide_vision_cache(make_train_state(folder, precision="bf16")).num_from_disk == 0


@pytest.mark.parametrize("cache", ["auto", "disk"])
def test_damaged_cache_files_are_rebuilt(folder, assets, cache):
    """This includes offsets that point elsewhere within the file, and a deeply nested header."""
    state = make_train_state(folder, vision_cache=cache)
    expected = read_all_features(state, build_vision_cache(state))
    first, *others = sorted(assets.rglob("*.safetensors"))
    full = first.read_bytes()
    length = int.from_bytes(full[:8], "little")
    header = json.loads(full[8 : 8 + length])
    header["features"]["data_offsets"] = [4, len(full) - 8 - length + 4]
    shifted = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    for damaged in (
        full[:-9] + bytes([full[-9] ^ 1]) + full[-8:],
        full[:-1],
        b"",
        b"\xff" * len(full),
        others[0].read_bytes(),
        *(
            len(text).to_bytes(8, "little") + text + full[8 + length :]
            for text in (shifted, b"[" * 200_000)
        ),
    ):
        first.write_bytes(damaged)
        outcome = decide_vision_cache(state, output := io.StringIO())
        assert f"1 of {1 + len(others)} vision cache files in " in output.getvalue()
        assert " were corrupt and are computed again" in output.getvalue()
        assert 0 < outcome.num_from_disk < outcome.num_images
        assert torch.equal(read_all_features(state, outcome.cache), expected)
        assert first.read_bytes() == full


def test_unwritable_cache_folder(folder, monkeypatch):
    auto, disk = (make_train_state(folder, vision_cache=cache) for cache in ("auto", "disk"))
    blocked = folder / "file"
    blocked.write_text("in the way")
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_ASSETS_CACHE", str(blocked))
        assert decide_vision_cache(auto, output := io.StringIO()).tier == "memory"
        assert NO_DISK in output.getvalue()
        with pytest.raises(UserError, match="cannot be written"):
            decide_vision_cache(disk)
    for number in (errno.ENOSPC, errno.ESTALE):

        def fail(*inputs: Any, error: int = number, **more: Any) -> None:
            raise OSError(error, os.strerror(error))

        monkeypatch.setattr(vision_cache, "save_file", fail)
        assert decide_vision_cache(auto, output := io.StringIO()).tier == "memory"
        assert output.getvalue().count(NO_DISK) == 1
        with pytest.raises(UserError, match="cannot be written"):
            decide_vision_cache(disk)


@pytest.mark.parametrize("num_written", [0, 1])
def test_write_error_of_the_disk_tier_disables_the_cache(folder, monkeypatch, num_written):
    """Without the missing files, training would read features that do not exist."""
    save_file, num_saved = vision_cache.save_file, itertools.count()

    def fill_disk(*args: Any, **kwargs: Any) -> None:
        if next(num_saved) >= num_written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save_file(*args, **kwargs)

    monkeypatch.setattr(vision_cache, "save_file", fill_disk)
    monkeypatch.setattr(vision_cache_builder, "choose_cache_tier", lambda *args: "disk")
    monkeypatch.setattr(vision_cache, "CHUNK_PATCHES", 1)
    result = decide_vision_cache(make_train_state(folder), output := io.StringIO())
    assert (result.cache, result.tier) == (None, None)
    assert "no space left on device" in result.reason
    assert output.getvalue().count(NO_DISK) == 1


def test_concurrent_runs_share_the_cache(folder):
    states = [make_train_state(folder, vision_cache=cache) for cache in ("disk", "auto")]
    barrier = threading.Barrier(2)

    def encode(state: TrainState) -> torch.Tensor:
        barrier.wait(timeout=60)
        return read_all_features(state, build_vision_cache(state))

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(encode, states)
    assert torch.equal(first, second)
    outcome = decide_vision_cache(states[0])
    assert outcome.num_from_disk == outcome.num_images


GB = 10**9
H200 = FreeBytes(gpu=130 * GB, memory=120 * GB, disk=64 * GB)
DESKTOP = FreeBytes(gpu=6 * GB, memory=20 * GB, disk=64 * GB)
LAPTOP = FreeBytes(gpu=0, memory=4 * GB, disk=0)


def test_first_tier_with_enough_space_is_used():
    for setting, size_gb, free, tier in (
        ("auto", 8, H200, "gpu"),
        ("auto", 9, H200, "memory"),
        ("auto", 31, H200, "memory"),
        ("auto", 61, H200, "disk"),
        ("auto", 65, H200, None),
        ("auto", 0.15, DESKTOP, "gpu"),
        ("auto", 1, DESKTOP, "memory"),
        ("auto", 31, DESKTOP, "disk"),
        ("auto", 2, LAPTOP, "memory"),
        ("auto", 3, LAPTOP, None),
        ("memory", 0.15, H200, "gpu"),
        ("memory", 61, H200, None),
        ("disk", 0.15, H200, "disk"),
        ("disk", 0.15, LAPTOP, None),
        ("never", 0.15, H200, None),
    ):
        size = int(size_gb * GB)
        assert choose_cache_tier(setting, size, size, free) == tier
        if tier == "disk":
            # Features on disk need no extra space.
            full = FreeBytes(gpu=0, memory=0, disk=GB)
            assert choose_cache_tier(setting, size, GB, full) == "disk"
            assert choose_cache_tier(setting, size, 2 * GB, full) is None


def test_memory_of_machine_and_container(tmp_path):
    assert free_gpu_memory(CPU) == 0
    assert available_memory() > 0
    assert available_memory(tmp_path / "nothing", tmp_path / "nothing") > 1 << 20
    system, group = tmp_path / "proc", tmp_path / "group"
    for folder in (system, group):
        folder.mkdir()
    meminfo = "MemTotal:       2000 kB\nMemFree:  10 kB\nMemAvailable:    1000 kB\n"
    (system / "meminfo").write_text(meminfo)
    (group / "memory.current").write_text("600\n")
    for name, text, expected in (
        ("memory.max", "max\n", 1000 * 1024),
        ("memory.max", "1000\n", 400),
        ("memory.stat", "anon 5\ninactive_file 250\nslab 3\n", 650),
        ("memory.current", "1600\n", 0),
    ):
        (group / name).write_text(text)
        assert available_memory(system, group) == expected


@pytest.fixture
def state(folder: Path) -> TrainState:
    return make_train_state(folder)


def get_model(state: TrainState) -> VisionLanguageModel:
    assert isinstance(state.engine.model, VisionLanguageModel)
    return state.engine.model


def test_fingerprint_covers_weights_and_settings(state):
    encoder = get_model(state).visual
    first = fingerprint_encoder(encoder, {"heads": 2}, CPU)
    assert fingerprint_encoder(encoder, {"heads": 2}, CPU) == first
    found = {first, fingerprint_encoder(encoder, {"heads": 4}, CPU)}
    with torch.no_grad():
        for parameter in encoder.parameters():
            flat = parameter.view(-1)
            old = flat[-1].clone()
            flat[-1] += 1
            found.add(fingerprint_encoder(encoder, {"heads": 2}, CPU))
            flat[-1] = old
    assert len(found) == 2 + len(list(encoder.parameters()))
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert fingerprint_encoder(encoder, {"heads": 2}, CPU) != first
    finally:
        torch.set_num_threads(threads)


def test_weights_are_offloaded_and_restored(state):
    """Views of the weights, such as those of the parameter audit, are restored as well."""
    model = get_model(state)
    norm = model.model.norm.weight
    model.visual.register_buffer("shared", norm.detach())
    batch = state.engine.step_dataset.get_step(0).packs[0]
    expected = model.encode_images(batch.patches_ND, batch.grid_thw)
    views = [parameter.detach() for parameter in model.visual.parameters()]
    before = [view.clone() for view in views]
    others = {name: p.clone() for name, p in model.model.named_parameters()}
    offloader = EncoderOffloader(model)

    def count_bytes() -> int:
        return sum(p.untyped_storage().nbytes() for p in model.visual.parameters())

    full = count_bytes()
    for _ in range(2):
        with offloader.hold(is_offloaded=True):
            assert count_bytes() == 0
            assert norm.untyped_storage().nbytes() > 0, "shared with the decoder"
            assert all(torch.equal(p, others[name]) for name, p in model.model.named_parameters())
            with offloader.hold(is_offloaded=False):
                assert torch.equal(model.encode_images(batch.patches_ND, batch.grid_thw), expected)
            assert count_bytes() == 0
        assert count_bytes() == full
    assert all(torch.equal(view, old) for view, old in zip(views, before, strict=True))
    with offloader.hold(is_offloaded=False):
        assert count_bytes() == full, "it was not offloaded"
    with pytest.raises(ZeroDivisionError), offloader.hold(is_offloaded=True):
        raise ZeroDivisionError
    assert count_bytes() == full


def test_offloaded_run_equals_resident_run(task, monkeypatch):
    """At its end, the run compares the frozen weights with the initial ones."""
    evaluation = {"metric": "classification", "every": 2, "max_new_tokens": 4}
    settings: dict[str, Any] = {"tune": LORA, "eval": evaluation}
    task.run(name="resident", **settings)
    num_offloads = itertools.count()

    class CountingOffloader(EncoderOffloader):
        def _move(self, is_offloaded: bool) -> None:
            super()._move(is_offloaded)
            if is_offloaded:
                next(num_offloads)

    monkeypatch.setattr(vision_cache_builder, "EncoderOffloader", CountingOffloader)
    monkeypatch.setattr(vision_cache_builder, "should_offload", lambda device: True)
    task.run(name="offloaded", **settings)
    assert next(num_offloads) == 3, "before the steps, and after each evaluation between them"
    names = ("resident", "offloaded")
    assert len({tuple(read_losses(task.folder / name)) for name in names}) == 1
    first, second = (
        [
            (line["step"], line["validation_loss"], line["scores"])
            for line in task.read_metrics(name)
            if "validation_loss" in line
        ]
        for name in names
    )
    assert first == second
    assert len(first) == 4


@pytest.fixture
def files(tmp_path: Path) -> Iterator[VisionFileStore]:
    with closing(VisionFileStore(tmp_path, "encoder")) as store:
        yield store


def make_features(number: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(5, 2, 8, generator=torch.Generator().manual_seed(number)).to(dtype)


@pytest.mark.parametrize("is_lost", [True, False])
def test_missing_or_truncated_file_raises(files, is_lost):
    files.write("a", torch.randn(32, 2, 8))
    path, starts = files.chunk_path("a"), np.array([0])
    index = replace(make_index(2), images_by_sample={0: (1,)})
    reader = VisionDiskReader(index, torch.float32, (2, 8), [path], starts)
    reader.write_to([0], buffer := torch.empty(16, 2, 8))
    assert torch.equal(buffer, load_file(path)["features"][16:])
    if is_lost:
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size - 1)
    words = r"a\.safetensors: cached image features[^\n]*(No such file|incomplete)"
    with pytest.raises(UserError, match=words):
        reader.write_to([0], buffer)


def make_aged_files(folder: Path, count: int) -> tuple[list[Path], int]:
    with closing(VisionFileStore(folder, "old")) as files:
        paths = [files.chunk_path(str(number)) for number in range(count)]
        for number in range(count):
            files.write(str(number), make_features(number))
    for number, path in enumerate(paths):
        os.utime(path, (number, number))
    return paths, paths[0].stat().st_size


def test_least_recently_used_files_are_evicted(tmp_path, monkeypatch):
    paths, size = make_aged_files(tmp_path, 5)
    monkeypatch.setattr(vision_cache, "MAX_STORE_BYTES", 6 * size)
    with closing(VisionFileStore(tmp_path, "old")) as files:
        assert files.read("0", torch.empty(5, 2, 8)), "used just now"
        assert not files.read("9", torch.empty(5, 2, 8))
        assert files.evict(["1"], size) == size
        assert all(path.exists() for path in paths)
        assert files.evict(["1"], 3 * size) == 3 * size
    assert [path.exists() for path in paths] == [True, True, False, False, True]
    with closing(VisionFileStore(tmp_path, "new")) as files:
        assert files.evict([], 9 * size) == 6 * size, "all are gone, and it is not enough"
    assert not any(path.exists() for path in paths)


def test_files_in_use_are_not_evicted(tmp_path, monkeypatch):
    paths, size = make_aged_files(tmp_path, 2)
    monkeypatch.setattr(vision_cache, "MAX_STORE_BYTES", 2 * size)
    with closing(VisionFileStore(tmp_path, "old")) as reading:
        reading.evict(["0", "1"], 0)
        with closing(VisionFileStore(tmp_path, "new")) as files:
            assert files.evict([], size) == 0
        assert all(path.exists() for path in paths)
    with closing(VisionFileStore(tmp_path, "new")) as files:
        assert files.evict([], size) == size
    assert [path.exists() for path in paths] == [False, True]


def test_disk_reserve_is_never_used(files, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    leftover = files.folder / ".a.1234.5678.tmp"
    leftover.write_bytes(b"of a killed process")
    assert files.evict([], 0) == 500
    assert not leftover.exists()


def make_index(count: int, patches: int = 64) -> ImageIndex:
    image_refs = []
    for number in range(count):
        key = hashlib.sha256(str(number).encode()).hexdigest()
        span = VisualSpan("image", 0, patches // 4, (1, 4, patches // 4), (), (0, 0), (0, 0))
        image_refs.append(ImageRef(key, span))
    return ImageIndex(tuple(sorted(image_refs, key=lambda one: one.key)), {}, {})


def test_every_image_is_in_one_chunk():
    index = make_index(1000)
    chunks = index.split_chunks()
    assert [chunk.start for chunk in chunks] == [0, *(chunk.stop for chunk in chunks[:-1])]
    assert chunks[-1].stop == index.count_images(chunks) == 1000
    assert 45 < len(chunks) < 80, "sixteen to a chunk, in the mean"
    first, second = chunks[: len(chunks) // 2], chunks[len(chunks) // 2 :]
    assert 0.5 < index.count_images(first) / index.count_images(second) < 2
    assert make_index(0).split_chunks() == []
    assert make_index(3).feature_offsets_P1.tolist() == [0, 16, 32, 48]
    # Few new images change few chunks.
    before, after = ({c.name for c in make_index(n).split_chunks()} for n in (1000, 1005))
    assert len(before) == len(chunks)
    assert len(before - after) <= 5
    assert len(after - before) <= 10


def test_chunk_size_is_bounded():
    index = make_index(200, patches=2048)
    assert max(chunk.stop - chunk.start for chunk in index.split_chunks()) == CHUNK_PATCHES // 2048
    alone = make_index(20, patches=CHUNK_PATCHES + 4).split_chunks()
    assert [chunk.stop - chunk.start for chunk in alone] == [1] * 20


def test_vanished_images_are_corrupt(state, folder):
    (folder / "train5.png").unlink()
    train = state.data.train
    samples = train.stats.sample_indices
    found = index_images(train.corpus, state.data.renderer, samples, 0, lambda _: None)
    assert isinstance(found.corrupt_samples.pop(5), CorruptImageError)
    assert found.corrupt_samples == {}
    assert sorted(found.images_by_sample) == [index for index in range(11) if index != 5]
