"""Vision cache decision: conditions, and messages about obstacles."""

from __future__ import annotations

import errno
import io
import itertools
import json
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from rich.console import Console
from tiny_model import TinyFamily
from tiny_task import TinyTask, read_losses
from vision_cache_fixtures import (
    CONSOLE,
    LORA,
    build_vision_cache,
    decide_vision_cache,
    make_train_state,
    read_all_features,
)

from finesight.config import VisionCacheMode
from finesight.errors import TrainingInterrupted, UserError
from finesight.host_memory import available_memory
from finesight.model.vlm import VisionLanguageModel
from finesight.train import vision_cache, vision_cache_builder
from finesight.train.console import TrainingConsole
from finesight.train.trainer import TrainState
from finesight.train.training_run import StopRequest
from finesight.train.vision_cache_builder import (
    CacheTier,
    EncoderOffloader,
    FreeBytes,
    choose_cache_tier,
    estimate_feature_bytes,
    fingerprint_encoder,
    free_gpu_memory,
)


def screen() -> tuple[TrainingConsole, Callable[[], str]]:
    shown = io.StringIO()
    return TrainingConsole(Console(file=shown, width=300)), shown.getvalue


@pytest.mark.parametrize("part", ["merger", "vision"])
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_trainable_encoder_disables_the_vision_cache(tmp_path: Path, part: str, mode: str) -> None:
    outcome = decide_vision_cache(make_train_state(tmp_path / "task", LORA | {part: mode}))
    assert outcome.cache is None
    assert outcome.reason == "images are encoded in every step: the vision encoder is trainable"


def test_single_epoch_disables_the_vision_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless all of their features are on disk already."""
    session = make_train_state(tmp_path / "task", epochs=1)
    with monkeypatch.context() as patched:
        patched.setattr(vision_cache_builder, "index_images", None)
        outcome = decide_vision_cache(session)
    assert outcome.cache is None
    assert vision_cache_builder.REASON_SINGLE_USE in outcome.reason
    build_vision_cache(make_train_state(tmp_path / "task", epochs=2))
    outcome = decide_vision_cache(session)
    assert outcome.num_from_disk == outcome.num_images == 9
    Image.new("RGB", (56, 56), (1, 2, 3)).save(tmp_path / "task" / "train0.png")
    assert decide_vision_cache(make_train_state(tmp_path / "task", epochs=1)).cache is None


def test_repeated_images_enable_the_vision_cache(tmp_path: Path) -> None:
    folder = tmp_path / "task"
    make_train_state(folder)
    lines = (folder / "train.jsonl").read_text().splitlines()
    duplicate_requests = [line.replace("Which colour?", "What colour is it?") for line in lines]
    (folder / "train.jsonl").write_text("\n".join([*lines, *duplicate_requests]) + "\n")
    session = make_train_state(folder, epochs=1)
    assert session.train_data.stats.num_images == 22
    assert session.train_data.stats.num_unique_images == 11
    assert decide_vision_cache(session).num_images == 9, "two pairs of files are equal"


def test_samples_without_images(tmp_path: Path) -> None:
    task = TinyTask(tmp_path)
    data = tmp_path / "train.jsonl"
    samples = [json.loads(line) for line in data.read_text().splitlines()]
    for sample in samples:
        del sample["messages"][0]["content"][0]
    data.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    task.run(tune=LORA)
    assert "images are encoded in every step: the data contain no images" in task.console_output


def test_features_that_fit_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = make_train_state(tmp_path / "task")
    monkeypatch.setattr(vision_cache_builder, "available_memory", lambda: 2_000_000)
    monkeypatch.setattr(vision_cache_builder, "free_gpu_memory", lambda device: None)
    assert decide_vision_cache(session).tier == "memory"
    monkeypatch.setattr(vision_cache_builder, "available_memory", lambda: 1000)
    assert decide_vision_cache(session).tier == "disk"
    limited = decide_vision_cache(make_train_state(tmp_path / "task", vision_cache="memory"))
    assert limited.cache is None
    assert "but only 0.00 MB in memory" in limited.reason
    assert "(train.vision_cache=memory)" in limited.reason


def test_changed_image_is_encoded_again(tmp_path: Path, assets: Path) -> None:
    """Also where size and time of its file are what they were."""
    folder = tmp_path / "task"
    before = build_vision_cache(make_train_state(folder))
    path = folder / "train0.png"
    stat, colour = path.stat(), Image.open(path).getpixel((0, 0))
    size = Image.open(path).size
    Image.new("RGB", size, (9, 99, 199)).save(path)
    assert colour != (9, 99, 199)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    outcome = decide_vision_cache(make_train_state(folder))
    assert outcome.cache is not None
    assert outcome.num_from_disk < outcome.num_images
    for file in assets.rglob("*.safetensors"):
        file.unlink()
    session = make_train_state(folder)
    fresh = read_all_features(session, build_vision_cache(session))
    assert torch.equal(read_all_features(session, outcome.cache), fresh)
    assert not torch.equal(read_all_features(session, before), fresh)


def test_encoder_or_size_change_invalidates_the_cache(tmp_path: Path) -> None:
    folder = tmp_path / "task"
    first = decide_vision_cache(make_train_state(folder))
    assert decide_vision_cache(make_train_state(folder)).num_from_disk == first.num_images
    recipe = json.loads((folder / "task.json").read_text())
    smaller = recipe | {"image": {"min_pixels": 784, "max_pixels": 3136}}
    (folder / "task.json").write_text(json.dumps(smaller))
    assert decide_vision_cache(make_train_state(folder)).num_from_disk < first.num_images
    (folder / "task.json").write_text(json.dumps(recipe))
    session = make_train_state(folder)
    with torch.no_grad():
        session.model.visual.merger.mlp["2"].bias[3] += 1e-3
    assert decide_vision_cache(session).num_from_disk == 0
    assert decide_vision_cache(make_train_state(folder, precision="bf16")).num_from_disk == 0


@pytest.mark.parametrize("fault", ["a bit", "cut off", "empty", "no safetensors", "other shape"])
@pytest.mark.parametrize("cache", ["auto", "disk"])
def test_damaged_cache_files_are_rebuilt(
    tmp_path: Path, assets: Path, fault: str, cache: str
) -> None:
    session = make_train_state(tmp_path / "task", vision_cache=cache)
    expected = read_all_features(session, build_vision_cache(session))
    first, *others = sorted(assets.rglob("*.safetensors"))
    full = first.read_bytes()
    bad: dict[str, Any] = {
        "a bit": full[:-9] + bytes([full[-9] ^ 1]) + full[-8:],
        "cut off": full[:-1],
        "empty": b"",
        "no safetensors": b"\xff" * len(full),
        "other shape": others[0].read_bytes(),
    }
    first.write_bytes(bad[fault])
    console, shown = screen()
    outcome = decide_vision_cache(make_train_state(tmp_path / "task", vision_cache=cache), console)
    assert f"1 of {1 + len(others)} vision cache files in " in shown()
    assert " were corrupt and are computed again" in shown()
    assert outcome.cache is not None
    assert 0 < outcome.num_from_disk < outcome.num_images
    assert torch.equal(read_all_features(session, outcome.cache), expected)
    assert decide_vision_cache(session).num_from_disk == outcome.num_images
    assert first.read_bytes() == full


def test_unwritable_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(blocked))
    console, shown = screen()
    assert decide_vision_cache(make_train_state(tmp_path / "task"), console).tier == "memory"
    assert "the vision cache does not use the disk" in shown()
    with pytest.raises(UserError, match="cannot be written"):
        decide_vision_cache(make_train_state(tmp_path / "task", vision_cache="disk"))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.ESTALE])
@pytest.mark.parametrize("cache", ["auto", "disk"])
def test_cache_disk_full_during_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: str, number: int
) -> None:
    def full(*inputs: Any, **more: Any) -> None:
        raise OSError(number, os.strerror(number))

    session = make_train_state(tmp_path / "task", vision_cache=cache)
    monkeypatch.setattr("finesight.train.vision_cache.save_file", full)
    console, shown = screen()
    if cache == "disk":
        with pytest.raises(UserError, match="cannot be written"):
            decide_vision_cache(session, console)
    else:
        assert decide_vision_cache(session, console).tier == "memory"
        assert shown().count("the vision cache does not use the disk") == 1


@pytest.mark.parametrize("num_written", [0, 1])
def test_write_error_of_the_disk_tier_disables_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_written: int
) -> None:
    """Without the missing files, training would read features that do not exist."""
    session = make_train_state(tmp_path / "task", vision_cache="auto")
    save_file, num_saved = vision_cache.save_file, itertools.count()

    def fill_disk(*args: Any, **kwargs: Any) -> None:
        if next(num_saved) >= num_written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save_file(*args, **kwargs)

    monkeypatch.setattr(vision_cache, "save_file", fill_disk)
    monkeypatch.setattr(vision_cache_builder, "choose_cache_tier", lambda *args: "disk")
    monkeypatch.setattr("finesight.train.vision_cache.CHUNK_PATCHES", 1)
    console, shown = screen()
    result = decide_vision_cache(session, console)
    assert result.cache is None
    assert result.tier is None
    assert "no space left on device" in result.reason
    assert shown().count("the vision cache does not use the disk") == 1


def test_concurrent_runs_share_the_cache(tmp_path: Path) -> None:
    """Concurrent runs with the same images do not interfere."""
    sessions = [
        make_train_state(tmp_path / "task", vision_cache=cache) for cache in ("disk", "auto")
    ]
    barrier = threading.Barrier(2)

    def encode(number: int) -> torch.Tensor:
        barrier.wait(timeout=60)
        return read_all_features(sessions[number], build_vision_cache(sessions[number]))

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(encode, range(2))
    assert torch.equal(first, second)
    outcome = decide_vision_cache(sessions[0])
    assert outcome.num_from_disk == outcome.num_images


def test_signal_interrupts_cache_build(tmp_path: Path) -> None:
    stop = StopRequest()
    stop.signal = signal.SIGTERM
    with pytest.raises(TrainingInterrupted):
        decide_vision_cache(make_train_state(tmp_path / "task"), CONSOLE, stop)


FAMILIES: list[TinyFamily] = ["qwen2_vl", "qwen3_vl", "qwen"]
GB = 10**9
H200 = FreeBytes(gpu=130 * GB, memory=120 * GB, disk=64 * GB)
DESKTOP = FreeBytes(gpu=6 * GB, memory=20 * GB, disk=64 * GB)
LAPTOP = FreeBytes(gpu=None, memory=4 * GB, disk=0)


@pytest.mark.parametrize(
    ("setting", "size", "free", "location"),
    [
        ("auto", GB * 0.15, H200, "gpu"),
        ("auto", 8 * GB, H200, "gpu"),
        ("auto", 9 * GB, H200, "memory"),
        ("auto", 31 * GB, H200, "memory"),
        ("auto", 61 * GB, H200, "disk"),
        ("auto", 65 * GB, H200, None),
        ("auto", GB * 0.15, DESKTOP, "gpu"),
        ("auto", GB, DESKTOP, "memory"),
        ("auto", 31 * GB, DESKTOP, "disk"),
        ("auto", 2 * GB, LAPTOP, "memory"),
        ("auto", 3 * GB, LAPTOP, None),
        ("memory", GB * 0.15, H200, "gpu"),
        ("memory", 61 * GB, H200, None),
        ("disk", 1000, H200, "disk"),
        ("disk", 1000, LAPTOP, None),
        ("never", 1000, H200, None),
    ],
)
def test_first_tier_with_enough_space_is_used(
    setting: VisionCacheMode, size: float, free: FreeBytes, location: CacheTier | None
) -> None:
    assert choose_cache_tier(setting, int(size), int(size), free) == location


def test_cached_files_need_no_extra_space() -> None:
    crowded = FreeBytes(gpu=None, memory=GB, disk=GB)
    assert choose_cache_tier("auto", 30 * GB, 2 * GB, crowded) is None
    assert choose_cache_tier("auto", 30 * GB, GB, crowded) == "disk"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_feature_bytes_match_actual_features(
    tmp_path: Path, family: TinyFamily, precision: str
) -> None:
    """Each image is in one sample; a model on the meta device suffices."""
    session = make_train_state(tmp_path / "task", family=family, precision=precision)
    model, patches = session.model, session.train_data.stats.num_patches
    assert isinstance(model, VisionLanguageModel)
    known = build_vision_cache(session).reader
    dtype, shape = known.tensor_spec(session.train_data.stats.sample_indices)
    expected = torch.Size(shape).numel() * dtype.itemsize
    assert estimate_feature_bytes(patches, model, session.hardware.dtype) == expected
    assert estimate_feature_bytes(patches, model.to("meta"), session.hardware.dtype) == expected


def test_cpu_has_no_gpu_memory() -> None:
    assert free_gpu_memory(torch.device("cpu")) is None
    assert available_memory() > 0


def test_memory_of_machine_and_container(tmp_path: Path) -> None:
    system, group = tmp_path / "proc", tmp_path / "group"
    system.mkdir()
    group.mkdir()
    meminfo = "MemTotal:       2000 kB\nMemFree:  10 kB\nMemAvailable:    1000 kB\n"
    (system / "meminfo").write_text(meminfo)
    assert available_memory(system, group) == 1000 * 1024
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("600\n")
    assert available_memory(system, group) == 1000 * 1024
    (group / "memory.max").write_text("1000\n")
    assert available_memory(system, group) == 400
    (group / "memory.stat").write_text("anon 5\ninactive_file 250\nslab 3\n")
    assert available_memory(system, group) == 650
    (group / "memory.current").write_text("1600\n")
    assert available_memory(system, group) == 0
    assert available_memory(tmp_path / "nothing", tmp_path / "nothing") > 1 << 20


CPU = torch.device("cpu")


@pytest.fixture
def session(tmp_path: Path) -> TrainState:
    return make_train_state(tmp_path / "task")


def model_of(session: TrainState) -> VisionLanguageModel:
    assert isinstance(session.model, VisionLanguageModel)
    return session.model


def test_fingerprint_covers_weights_and_settings(session: TrainState) -> None:
    encoder = model_of(session).visual
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


def test_weights_are_offloaded_and_restored(session: TrainState) -> None:
    """For everything that has a view of them too, as what watches frozen parts does."""
    model = model_of(session)
    batch = session.step_dataset.get_step(0).packs[0]
    expected = model.encode_images(batch.patches_ND, batch.grid_thw)
    views = [parameter.detach() for parameter in model.visual.parameters()]
    before = [view.clone() for view in views]
    others = {name: p.clone() for name, p in model.model.named_parameters()}
    card = EncoderOffloader(model)

    def held() -> int:
        return sum(p.untyped_storage().nbytes() for p in model.visual.parameters())

    full = held()
    for _ in range(2):
        with card.offload():
            assert held() == 0
            assert all(torch.equal(p, others[name]) for name, p in model.model.named_parameters())
            with card.reload():
                assert torch.equal(model.encode_images(batch.patches_ND, batch.grid_thw), expected)
            assert held() == 0
        assert held() == full
    assert all(torch.equal(view, old) for view, old in zip(views, before, strict=True))
    assert torch.equal(model.encode_images(batch.patches_ND, batch.grid_thw), expected)
    with card.reload():
        assert held() == full, "it was not away"
    with pytest.raises(ZeroDivisionError), card.offload():
        raise ZeroDivisionError
    assert held() == full


def test_reallocated_weight_is_offloaded(session: TrainState) -> None:
    """Kernels may reallocate weights at the first image."""
    model = model_of(session)
    card = EncoderOffloader(model)
    with card.offload(), card.reload():
        changed = next(model.visual.parameters())
        before = changed.detach().clone()
        buffer = before.new_zeros(len(before), before.shape[1] + 3)
        buffer[:, :-3] = before
        changed.data = buffer[:, :-3]
    with card.offload():
        assert changed.untyped_storage().nbytes() == 0
        assert buffer.untyped_storage().nbytes() == 0
    assert torch.equal(changed, before)


def test_shared_parameters_stay_on_device(session: TrainState) -> None:
    model = model_of(session)
    model.visual.register_buffer("shared", model.model.norm.weight.detach())
    with EncoderOffloader(model).offload():
        assert torch.equal(model.model.norm.weight, model.visual.get_buffer("shared"))
        assert model.model.norm.weight.untyped_storage().nbytes() > 0


def test_offloaded_run_equals_resident_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU; frozen parts are compared with what they were in the end."""
    task, away = TinyTask(tmp_path), []
    evaluation = {"metric": "classification", "every": 2, "max_new_tokens": 4}
    settings: dict[str, Any] = {"tune": LORA, "eval": evaluation}
    task.run(name="there", **settings)

    class Spying(EncoderOffloader):
        def _move_to_cpu(self) -> None:
            super()._move_to_cpu()
            away.append(True)

    monkeypatch.setattr(vision_cache_builder, "EncoderOffloader", Spying)
    monkeypatch.setattr(vision_cache_builder, "should_offload", lambda device: True)
    task.run(name="away", **settings)
    assert len(away) == 3, "for the steps, and after each of the measurements between them"
    assert read_losses(tmp_path / "away") == read_losses(tmp_path / "there")
    measured = [
        [
            (line["step"], line["validation_loss"], line["scores"])
            for line in task.read_metrics(name)
            if "validation_loss" in line
        ]
        for name in ("there", "away")
    ]
    assert measured[0] == measured[1]
    assert len(measured[0]) == 4
