"""Cached vision features equal those encoded in every step, on one rank and on several."""

import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
from fake_dist import FakeProcessGroup
from PIL import Image
from tiny_model import TinyFamily
from tiny_task import TinyTask, act_before_step, edit_samples, read_final_files, read_losses
from vision_cache_fixtures import (
    LORA,
    build_vision_cache,
    decide_vision_cache,
    make_train_state,
    mix_images,
    read_all_features,
)

from finesight.encode.tokenization import TokenizedSample
from finesight.errors import TrainingInterrupted, UserError
from finesight.samples.image_file import CorruptImageError
from finesight.samples.line_index import UnreadableFileError
from finesight.train import vision_cache, vision_cache_builder, vision_cache_choice
from finesight.train.parallel.distributed import PeerFailedError, ProcessGroup, RankMonitor
from finesight.train.state import StopRequest, TrainState
from finesight.train.vision_cache_builder import VisionCacheResult

CACHES = ["memory", "disk"]


def read_loss_values(task: TinyTask, name: str = "run") -> list[float]:
    return [loss for _, loss in read_losses(task.folder / name)]


@pytest.mark.parametrize("family", get_args(TinyFamily))
def test_every_cache_tier_is_bit_exact(tmp_path, family):
    """Compare chunks, with features of lower layers and of fixed size too, and those on disk."""
    folder = tmp_path / "task"
    make_train_state(folder, family=family)
    mix_images(folder / "train.jsonl")
    state = make_train_state(folder, vision_cache="memory")
    cache = build_vision_cache(state)
    features_MKD, index = cache.reader.features_AKD, cache.reader.image_index
    num_images = len(index.image_refs)
    assert num_images < 10, "equal images are shared"
    for chunk in index.split_chunks():
        spans = tuple(image_ref.span for image_ref in index.image_refs[chunk.start : chunk.stop])
        empty = torch.empty(0, dtype=torch.int32).numpy()
        outline = TokenizedSample("", empty, empty > 0, empty.reshape(3, 0), spans)
        patches = torch.from_numpy(state.data.renderer.load_patches(outline).patches_ND)
        encoded = state.engine.model.encode_images(patches, [span.grid_thw for span in spans])
        offsets = index.feature_offsets_P1
        assert torch.equal(features_MKD[offsets[chunk.start] : offsets[chunk.stop]], encoded)
    expected = read_all_features(state, cache)
    for setting, num_from_disk in (("disk", 0), ("disk", num_images), ("auto", num_images)):
        other = make_train_state(folder, vision_cache=setting)
        outcome = decide_vision_cache(other)
        assert outcome.tier == ("memory" if setting == "auto" else setting)
        assert outcome.num_from_disk == num_from_disk
        assert outcome.num_bytes == features_MKD.nbytes
        assert torch.equal(read_all_features(other, outcome.cache), expected)


def insert_videos(data: Path, frames: dict[int, int]) -> None:
    with edit_samples(data) as samples:
        for number, count in frames.items():
            names = [f"{data.stem}-{number}-{frame}.png" for frame in range(count)]
            for frame, name in enumerate(names):
                Image.new("RGB", (56, 84), (frame * 40, number, 9)).save(data.parent / name)
            video = {"type": "video", "frames": names, "fps": 1.0}
            samples[number]["messages"][0]["content"].insert(0, video)


def test_cached_run_matches_uncached_run(task, monkeypatch):
    """Losses and answers are equal, with no, one and two images or videos."""
    mix_images(task.folder / "train.jsonl")
    insert_videos(task.folder / "train.jsonl", {3: 5, 7: 2, 8: 1})
    insert_videos(task.folder / "eval.jsonl", {1: 3, 2: 1})
    task.recipe["eval"] = {"metric": "ocr", "every": 3, "batch_size": 8, "max_new_tokens": 3}
    names = ("never", "memory", "disk", "disk-again", "auto", "gpu")
    for number, name in enumerate(names):
        cache = "auto" if name == "gpu" else name.partition("-")[0]
        if name == "gpu":
            # Workers send only indices; the compute device gathers the features.
            monkeypatch.setattr(vision_cache_builder, "choose_cache_tier", lambda *inputs: "gpu")
        settings = f"train.vision_cache={cache}", f"train.num_workers={number % 3}"
        task.run(*settings, name=name, tune=LORA)
    assert "stored on the GPU" in task.console_output
    uncached, *cached = (read_loss_values(task, name) for name in names)
    assert cached == cached[:1] * 5, "the tier changes results"
    assert cached[0] == pytest.approx(uncached, rel=1e-5)
    for file in ("before", "step-3", "after"):
        answers = {(task.folder / n / "predictions" / f"{file}.jsonl").read_text() for n in names}
        assert len(answers) == 1


def test_corrupt_image_skips_only_its_sample(task):
    """The missing features of its chunk are not read from disk."""
    task.truncate_images("train3")
    names = ("memory", "disk", "disk-again", "never")
    for name in names:
        task.run(f"train.vision_cache={name.partition('-')[0]}", name=name, tune=LORA)
        lines = task.read_metrics(name)
        skipped = [id for line in lines for id in line.get("skipped_samples", ())]
        assert skipped == ["train3", "train3"]
    *cached, uncached = (read_loss_values(task, name) for name in names)
    assert cached == cached[:1] * 3
    assert cached[0] == pytest.approx(uncached, rel=1e-4)
    with pytest.raises(CorruptImageError, match=r"train3\.png: truncated"):
        task.run("data.on_invalid_sample=fail", name="refused", tune=LORA)


@pytest.mark.parametrize(
    ("precision", "step", "caches"),
    [
        ("fp32", 0, ("auto", "disk")),
        ("fp32", 0, ("auto", "auto")),
        ("bf16", 0, ("disk", "memory")),
        ("bf16", 4, ("auto", "auto")),
        ("fp32", 4, ("disk", "auto")),
    ],
)
def test_resumed_run_equals_uninterrupted_run(task, assets, precision, step, caches):
    """Features are loaded from disk, encoded again or stored in another tier, bit-identically."""
    task.recipe["tune"] = LORA | {"embeddings": "full"}
    task.recipe["train"]["precision"] = precision
    task.run("train.vision_cache=memory", name="whole")

    def interrupt() -> None:
        raise TrainingInterrupted("interrupted")

    with pytest.MonkeyPatch.context() as patch:
        act_before_step(patch, step, interrupt)
        with pytest.raises(TrainingInterrupted):
            task.run(f"train.vision_cache={caches[0]}")
    assert len(read_losses(task.folder / "run")) == step
    if caches == ("auto", "auto"):
        for file in assets.rglob("*.safetensors"):
            file.unlink()
    task.run(f"train.vision_cache={caches[1]}", resume=True)
    assert read_losses(task.folder / "run") == read_losses(task.folder / "whole")
    found, expected = (read_final_files(task.folder / name) for name in ("run", "whole"))
    assert found == expected


@pytest.mark.parametrize(("workers", "is_open"), [(0, False), (1, False), (0, True)])
def test_lost_cache_files_end_with_checkpoint(task, monkeypatch, assets, workers, is_open):
    """Files are removed before a step, or while one is opened; the resumed run is the same."""
    settings = "train.vision_cache=disk", f"train.num_workers={workers}", "train.save_every=6"
    task.recipe["tune"] = LORA
    task.run(*settings, name="whole")

    def remove(*args, **kwargs):
        for file in assets.rglob("*.safetensors"):
            file.unlink()
        return opened(*args, **kwargs) if args else None

    def remove_later():
        """PyTorch opens a file again after safetensors has read its header."""
        patch.setattr(torch.UntypedStorage, "from_file", remove)

    opened = torch.UntypedStorage.from_file
    with monkeypatch.context() as patch:
        act_before_step(patch, 1, remove_later if is_open else remove)
        with pytest.raises(UnreadableFileError, match=r"cached image features cannot be read"):
            task.run(*settings)
    assert 2 <= len(read_losses(task.folder / "run")) < 6
    task.run(*settings, resume=True)
    assert read_losses(task.folder / "run") == read_losses(task.folder / "whole")


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        ("never", "auto", "every step: the run started without the vision cache"),
        ("auto", "never", "every step: train.vision_cache=never; previous steps used cached feat"),
    ],
)
def test_changed_cache_setting_is_reported(task, before, after, reason):
    """A run that started without the cache resumes without it."""
    task.recipe["tune"] = LORA
    task.recipe["train"]["vision_cache"] = before
    task.rewind_to_checkpoint()
    losses = dict(read_losses(task.folder / "run"))
    task.run(f"train.vision_cache={after}", resume=True)
    assert reason in task.console_output
    expected = losses if before == "never" else pytest.approx(losses, rel=1e-4)
    assert dict(read_losses(task.folder / "run")) == expected


NUM_RANKS = 3
RunRanks = Callable[..., list[Any]]


@pytest.fixture
def run_ranks(monkeypatch: pytest.MonkeyPatch) -> RunRanks:
    """Return a function that decides on all ranks, and returns their results or errors."""
    # Several rounds, and a last one in which not all have a chunk.
    monkeypatch.setattr(vision_cache, "CHUNK_PATCHES", 20)
    process_group = FakeProcessGroup(NUM_RANKS, monkeypatch)

    def run_ranks(states: list[TrainState], stopped_rank: int = -1) -> list[Any]:
        def run_rank(rank: int) -> VisionCacheResult | Exception:
            stop = StopRequest()
            if rank == stopped_rank:
                stop.request(signal.SIGTERM)
            try:
                return decide_vision_cache(states[rank], stop=stop)
            except Exception as error:
                return error

        return process_group.run_all(run_rank)

    return run_ranks


def make_states(folder: Path, **train: Any) -> list[TrainState]:
    make_train_state(folder, **train)
    store, states = dist.HashStore(), []
    for rank in range(NUM_RANKS):
        state = make_train_state(folder, **train)
        ranks = ProcessGroup(rank, NUM_RANKS, rank, NUM_RANKS, RankMonitor(store, rank, NUM_RANKS))
        hardware = replace(state.run.hardware, process_group=ranks)
        states.append(replace(state, run=replace(state.run, hardware=hardware)))
    return states


@pytest.mark.parametrize("cache", ["auto", "memory", "disk"])
def test_each_rank_encodes_its_shard(tmp_path, run_ranks, assets, cache):
    folder = tmp_path / "task"
    alone = make_train_state(folder, vision_cache="memory")
    single = decide_vision_cache(alone).cache
    expected = read_all_features(alone, single)
    states = make_states(folder, vision_cache=cache)
    patches = [0] * NUM_RANKS
    for rank, state in enumerate(states):
        encode = state.engine.model.encode_images

        def count(*inputs: Any, rank: int = rank, encode: Any = encode) -> torch.Tensor:
            patches[rank] += len(inputs[0])
            return encode(*inputs)

        state.engine.model.encode_images = count  # type: ignore[method-assign]
    for state, result in zip(states, run_ranks(states), strict=True):
        assert result.tier == ("disk" if cache == "disk" else "memory")
        assert torch.allclose(read_all_features(state, result.cache), expected, atol=1e-6)
    assert sum(patches) == sum(one.num_patches for one in single.reader.image_index.image_refs)
    assert min(patches) > 0
    is_on_disk = any(assets.rglob("*.safetensors"))
    assert is_on_disk == (cache != "memory")
    again = run_ranks(make_states(folder, vision_cache=cache))
    assert [bool(one.num_from_disk) for one in again] == [is_on_disk] * NUM_RANKS


def test_rank_out_of_memory_disables_cache_for_all(tmp_path, run_ranks):
    def encode(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("so much and no more")

    states = make_states(tmp_path / "task")
    states[1].engine.model.encode_images = encode  # type: ignore[method-assign]
    for result in run_ranks(states):
        assert result.cache is None
        assert "the GPU memory is full (so much and no more)" in result.reason


@pytest.mark.parametrize("rank", [0, 2])
def test_stop_signal_on_one_rank_stops_all(tmp_path, run_ranks, rank):
    errors = run_ranks(make_states(tmp_path / "task"), stopped_rank=rank)
    assert {type(error) for error in errors} == {TrainingInterrupted}


def test_write_error_on_one_rank_fails_all(tmp_path, run_ranks, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    states = make_states(tmp_path / "task", vision_cache="disk")
    monkeypatch.setattr(vision_cache, "save_file", fail)
    first, *others = run_ranks(states)
    assert isinstance(first, UserError)
    assert "cannot be written" in first.what
    assert {type(error) for error in others} == {PeerFailedError}


@pytest.mark.gpu
def test_every_cache_tier_on_gpu(task, monkeypatch):
    """The vision encoder is offloaded during steps, and reloaded for evaluation."""
    # Encoding the tiny images again takes less time than building a cache.
    monkeypatch.setattr(vision_cache_choice, "BUILD_S", 0.0)
    monkeypatch.setattr(vision_cache_choice, "BUILD_S_PER_IMAGE", 0.0)
    settings = "train.device=cuda", "train.precision=bf16", "train.num_workers=2"
    task.recipe["eval"] = {"metric": "classification", "every": 2, "max_new_tokens": 4}
    for cache in ("never", "auto", "memory", "disk"):
        task.run(f"train.vision_cache={cache}", *settings, name=cache, tune=LORA)
        tiers = [
            line["features"]["tier"] for line in task.read_metrics(cache) if "features" in line
        ]
        assert tiers == [{"never": None, "auto": "gpu", "memory": "gpu"}.get(cache, cache)]
        losses, uncached = (read_loss_values(task, name) for name in (cache, "never"))
        assert losses == pytest.approx(uncached, rel=0.02)
