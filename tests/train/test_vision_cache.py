"""Cached vision features: equality with features encoded in every step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from PIL import Image
from tiny_model import TinyFamily
from tiny_task import TinyTask, make_task, read_final_files, read_losses, write_recipe
from vision_cache_fixtures import (
    LORA,
    build_vision_cache,
    decide_vision_cache,
    make_train_state,
    read_all_features,
)

from finesight.data.image_header import CorruptImageError
from finesight.data.line_index import UnreadableFileError
from finesight.encode.tokenization import TokenizedSample
from finesight.errors import TrainingInterrupted
from finesight.report.run_reader import read_run
from finesight.report.summary import compute_phases
from finesight.storage import remove_folder
from finesight.train import trainer, vision_cache_builder
from finesight.train.checkpoint import WEIGHTS_FILE
from finesight.train.dataloader import StepBatch
from finesight.train.logging import count_flops
from finesight.train.trainer import StepOutput, TrainState, train_step
from finesight.train.training_run import StopRequest

TESTS = Path(__file__).parents[1]
STARTS = {"started_at", "vision_cache_s"}
CACHES = ["memory", "disk"]


@pytest.mark.parametrize("cache", CACHES)
def test_cached_features_match_encoded_features(tmp_path: Path, cache: str) -> None:
    session = make_train_state(tmp_path / "task", vision_cache=cache)
    store = build_vision_cache(session)
    bare = session.step_dataset.with_vision_cache(store.reader)
    for number in range(len(session.sampler)):
        step, without = session.step_dataset.get_step(number), bare.get_step(number)
        assert step.sample_indices == without.sample_indices
        for batch, other, known in zip(
            step.packs, without.packs, without.cache_inputs, strict=True
        ):
            assert (other.grid_thw, len(other.patches_ND)) == ((), 0)
            assert torch.equal(batch.ids_T, other.ids_T)
            expected = session.model.encode_images(batch.patches_ND, batch.grid_thw)
            torch.testing.assert_close(store.load_features(known), expected)


@pytest.mark.parametrize("family", get_args(TinyFamily))
def test_every_cache_tier_is_bit_exact(tmp_path: Path, family: TinyFamily) -> None:
    """Chunk by chunk, with features of lower layers and of fixed size too; and where another run
    found them."""
    session = make_train_state(tmp_path / "task", mixed=True, family=family, vision_cache="memory")
    store = build_vision_cache(session)
    features_MKD, shown = store.reader.features_AKD, store.reader.image_index
    assert len(shown.image_refs) < 10, "equal images are shared"
    for chunk in shown.split_chunks():
        spans = tuple(image_ref.span for image_ref in shown.image_refs[chunk.start : chunk.stop])
        empty = torch.empty(0, dtype=torch.int32).numpy()
        outline = TokenizedSample("", empty, empty > 0, empty.reshape(3, 0), spans)
        patches = torch.from_numpy(session.renderer.load_patches(outline).patches_ND)
        expected = session.model.encode_images(patches, [span.grid_thw for span in spans])
        offsets = store.reader.feature_offsets_P1
        assert torch.equal(features_MKD[offsets[chunk.start] : offsets[chunk.stop]], expected)
    expected = read_all_features(session, store)
    for cache, found in (
        ("disk", 0),
        ("disk", len(shown.image_refs)),
        ("auto", len(shown.image_refs)),
    ):
        other = make_train_state(tmp_path / "task", vision_cache=cache)
        outcome = decide_vision_cache(other)
        assert (outcome.tier, outcome.num_from_disk) == (
            "memory" if cache == "auto" else cache,
            found,
        )
        assert outcome.cache is not None
        assert torch.equal(read_all_features(other, outcome.cache), expected)


def _insert_videos(data: Path, frames: dict[int, int]) -> None:
    """Put a video of so many frames before the image of each of these samples."""
    samples = [json.loads(line) for line in data.read_text().splitlines()]
    for number, count in frames.items():
        names = [f"{data.stem}-{number}-{frame}.png" for frame in range(count)]
        for frame, name in enumerate(names):
            Image.new("RGB", (56, 84), (frame * 40, number, 9)).save(data.parent / name)
        video = {"type": "video", "frames": names, "fps": 1.0}
        samples[number]["messages"][0]["content"].insert(0, video)
    data.write_text("".join(json.dumps(sample) + "\n" for sample in samples))


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
@pytest.mark.parametrize("cache", CACHES)
def test_videos_next_to_images(tmp_path: Path, family: TinyFamily, cache: str) -> None:
    """Patches of a still hold one frame where no video is among them, and two in its company."""
    folder = tmp_path / "task"
    make_train_state(folder, family=family)
    _insert_videos(folder / "train.jsonl", {3: 5, 7: 2})
    session = make_train_state(folder, vision_cache=cache)
    store = build_vision_cache(session)
    assert len(store.reader.image_indices([3])) > 1
    for number in range(len(session.sampler)):
        step = session.step_dataset.get_step(number)
        bare = session.step_dataset.with_vision_cache(store.reader).get_step(number)
        for batch, known in zip(step.packs, bare.cache_inputs, strict=True):
            expected = session.model.encode_images(batch.patches_ND, batch.grid_thw)
            torch.testing.assert_close(store.load_features(known), expected)


def test_run_with_images_and_videos_matches_without_cache(tmp_path: Path) -> None:
    """With the vision cache and without: the same losses and the same answers."""
    task = TinyTask(tmp_path)
    _insert_videos(tmp_path / "train.jsonl", {3: 5, 7: 2, 8: 1})
    _insert_videos(tmp_path / "eval.jsonl", {1: 3, 2: 1})
    settings = {"metric": "ocr", "every": 3, "batch_size": 8, "max_new_tokens": 3}
    for cache in ("never", "memory"):
        task.run(f"train.vision_cache={cache}", name=cache, tune=LORA, eval=settings)
    first, second = (read_losses(tmp_path / cache) for cache in ("never", "memory"))
    assert [loss for _, loss in first] == pytest.approx([loss for _, loss in second], rel=1e-5)
    for name in ("before", "step-3", "after"):
        file = Path("predictions") / f"{name}.jsonl"
        assert (tmp_path / "never" / file).read_text() == (tmp_path / "memory" / file).read_text()


def test_cached_run_matches_uncached_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = make_train_state(tmp_path / "anew")
    steps = [session.step_dataset.get_step(number) for number in range(len(session.sampler))]
    again = [train_step(session, step, StopRequest()).wait()[0] for step in steps]
    task = TinyTask(tmp_path / "cached")
    found = []
    for number, name in enumerate(("memory", "disk", "disk-again", "auto")):
        settings = f"train.vision_cache={name.partition('-')[0]}", f"train.num_workers={number % 3}"
        task.run(*settings, name=name, tune=LORA)
        found.append(read_losses(tmp_path / "cached" / name))
        # Only indices are sent then; the compute device gathers the features.
    monkeypatch.setattr(vision_cache_builder, "choose_cache_tier", lambda *inputs: "gpu")
    task.run(name="gpu", tune=LORA)
    assert "stored on the GPU" in task.console_output
    found.append(read_losses(tmp_path / "cached" / "gpu"))
    assert [loss for _, loss in found[0]] == pytest.approx(again, rel=1e-4)
    assert found[1:] == found[:1] * 4, "the tier changes results"


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("budget", [1, 96])
def test_samples_with_zero_and_two_images(tmp_path: Path, budget: int, cache: str) -> None:
    """Alone in a pack and among others."""
    session, other = (
        make_train_state(tmp_path / name, mixed=True, pack_tokens=budget, vision_cache=cache)
        for name in ("cached", "encoded")
    )
    store = build_vision_cache(session)
    assert [number for number in range(11) if not store.reader.image_indices([number])] == [1, 6]
    assert len(store.reader.image_indices([2])) == 2
    bare, texts, pairs = session.step_dataset.with_vision_cache(store.reader), 0, 0
    for number in range(len(session.sampler)):
        step = other.step_dataset.get_step(number)
        texts += sum(not batch.grid_thw for batch in step.packs)
        pairs += sum(2 in members and len(members) > 1 for members in step.sample_indices)
        again = train_step(other, step, StopRequest()).wait()
        retained = train_step(session, bare.get_step(number), StopRequest(), store).wait()
        assert retained == pytest.approx(again, rel=1e-4)
    assert (texts, pairs) == ((4, 0) if budget == 1 else (0, 2))


def test_cache_build_time_is_logged(tmp_path: Path) -> None:
    task = TinyTask(tmp_path)
    task.run(tune=LORA)
    (tmp_path / "run" / "result.json").unlink()
    remove_folder(tmp_path / "run" / "checkpoints" / "step-6")
    task.run(tune=LORA, resume=True)
    lines = task.read_metrics()
    noted = [line for line in lines if "vision_cache_s" in line]
    images = noted[0]["images"]
    assert [line["step"] for line in noted] == [0, 4]
    assert [line["features"]["images_from_disk"] for line in noted] == [0, images]
    assert all(line["vision_cache_s"] > 0 for line in noted)
    assert noted[0]["features"]["reason"] != noted[1]["features"]["reason"]
    assert noted[1]["features"]["reason"] in task.console_output
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert lines.index(noted[0]) < next(i for i, line in enumerate(lines) if "loss" in line)
    record = read_run(tmp_path / "run")
    assert compute_phases(record)[1].seconds == pytest.approx(
        sum(line["vision_cache_s"] for line in noted)
    )


def test_finished_run_builds_no_cache(tmp_path: Path) -> None:
    task = TinyTask(tmp_path)
    task.run(tune=LORA)
    (tmp_path / "run" / "result.json").unlink()
    task.run(tune=LORA, resume=True)
    kinds = [
        "started_at" if "started_at" in line else "store"
        for line in task.read_metrics()
        if STARTS & set(line)
    ]
    assert kinds == ["started_at", "store", "started_at"]


def test_skipped_encoder_flops_are_not_counted(tmp_path: Path) -> None:
    session = make_train_state(tmp_path / "task")
    store, step = build_vision_cache(session), session.step_dataset.get_step(0)
    bare = session.step_dataset.with_vision_cache(store.reader).get_step(0)
    full, cached = (
        sum(count_flops(session, batch) for batch in step_batch.packs)
        for step_batch in (step, bare)
    )
    assert cached < full


def test_gpu_oom_during_build_disables_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = make_train_state(tmp_path / "task", vision_cache="memory")

    def see(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore")

    monkeypatch.setattr(session.model, "encode_images", see)
    outcome = decide_vision_cache(session)
    assert outcome.cache is None
    assert "memory is full (CUDA out of memory. Tried to allocate 2 GiB.)" in outcome.reason


def test_corrupt_image_skips_only_its_sample(tmp_path: Path) -> None:
    """In every run: what its chunk lacks is not taken from disk."""
    task = TinyTask(tmp_path)
    image = tmp_path / "train3.png"
    image.write_bytes(image.read_bytes()[:-30])
    found = []
    for name in ("memory", "disk", "disk-again", "never"):
        task.run(f"train.vision_cache={name.partition('-')[0]}", name=name, tune=LORA)
        lines = task.read_metrics(name)
        assert [id for line in lines for id in line.get("skipped_samples", ())] == [
            "train3",
            "train3",
        ]
        found.append([loss for _, loss in read_losses(tmp_path / name)])
    assert found[0] == found[1] == found[2]
    assert found[0] == pytest.approx(found[3], rel=1e-4)
    refusing = task.recipe["data"] | {"on_invalid_sample": "fail"}
    with pytest.raises(CorruptImageError, match=r"train3\.png: truncated"):
        task.run(name="refused", tune=LORA, data=refusing)


def test_changed_image_size_raises(tmp_path: Path) -> None:
    session = make_train_state(tmp_path / "task")
    store = build_vision_cache(session)
    with pytest.raises(CorruptImageError, match=r"png: an image has 99 tokens"):
        store.reader.check(0, 99)


def test_run_interrupted_after_cache_build_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, assets: Path
) -> None:
    """Features are loaded from disk, encoded again or stored in another tier, bit-identically."""
    task = TinyTask(tmp_path)
    task.run("train.vision_cache=memory", name="whole", tune=LORA)

    def cut(*inputs: object) -> None:
        raise TrainingInterrupted("cut off")

    for name, first, then in (
        ("a", "auto", "disk"),
        ("b", "auto", "auto"),
        ("c", "disk", "memory"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(trainer, "train_step", cut)
            with pytest.raises(TrainingInterrupted, match="cut off"):
                task.run(f"train.vision_cache={first}", name=name, tune=LORA)
        if name == "b":
            for file in assets.rglob("*.safetensors"):
                file.unlink()
        task.run(f"train.vision_cache={then}", name=name, tune=LORA, resume=True)
        assert read_losses(tmp_path / name) == read_losses(tmp_path / "whole")
        ends = [tmp_path / run / "checkpoints" / "step-6" / WEIGHTS_FILE for run in (name, "whole")]
        assert ends[0].read_bytes() == ends[1].read_bytes()


@pytest.mark.parametrize("workers", [0, 1])
def test_lost_cache_files_end_with_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, assets: Path, workers: int
) -> None:
    """The run ends with a checkpoint, and resumes with the same result."""
    task = TinyTask(tmp_path)
    settings = "train.vision_cache=disk", f"train.num_workers={workers}", "train.save_every=6"
    task.run(*settings, name="whole", tune=LORA)
    real = trainer.train_step

    def taking(session: TrainState, step: StepBatch, *rest: Any) -> StepOutput:
        if step.step_index == 1:
            for file in assets.rglob("*.safetensors"):
                file.unlink()
        return real(session, step, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(trainer, "train_step", taking)
        with pytest.raises(UnreadableFileError, match=r"cached image features cannot be read"):
            task.run(*settings, tune=LORA)
    assert 2 <= len(read_losses(tmp_path / "run")) < 6
    task.run(*settings, tune=LORA, resume=True)
    assert read_losses(tmp_path / "run") == read_losses(tmp_path / "whole")


def run_partially(task: TinyTask, *overrides: str) -> None:
    """A run whose last two steps are still to come."""
    task.run(*overrides, tune=LORA)
    (task.folder / "run" / "result.json").unlink()
    remove_folder(task.folder / "run" / "checkpoints" / "step-6")


def test_resumed_run_keeps_the_cache_setting(tmp_path: Path) -> None:
    task = TinyTask(tmp_path)
    run_partially(task, "train.vision_cache=never")
    full = read_losses(tmp_path / "run")
    task.run(tune=LORA, resume=True)
    assert (
        "images are encoded in every step: the run started without the vision cache"
        in task.console_output
    )
    assert read_losses(tmp_path / "run") == full


def test_changed_cache_setting_is_reported(tmp_path: Path) -> None:
    task = TinyTask(tmp_path)
    run_partially(task)
    full = read_losses(tmp_path / "run")
    task.run("train.vision_cache=never", tune=LORA, resume=True)
    assert (
        "every step: train.vision_cache=never; previous steps used cached features"
        in task.console_output
    )
    found = read_losses(tmp_path / "run")
    assert found == [(step, pytest.approx(loss, rel=1e-4)) for step, loss in full]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resumed_run_equals_uninterrupted_run(tmp_path: Path, precision: str) -> None:
    """The run stops during its fifth model call and resumes in a new process."""
    changed = make_task(tmp_path / "task") | {"tune": LORA | {"embeddings": "full"}}
    recipe = write_recipe(tmp_path / "recipe.yaml", changed, precision=precision)

    def trained(*points: str) -> list[str]:
        command = [
            sys.executable,
            str(TESTS / "resume_worker.py"),
            str(recipe),
            str(tmp_path),
            "term",
        ]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
        done = subprocess.run([*command, *points], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return [line.split()[1] for line in done.stdout.splitlines()]

    assert trained("whole:0", "parts:5") == ["done", "stopped"]
    assert 0 < len(read_losses(tmp_path / "parts")) < 6
    assert trained("parts:0") == ["done"]
    started = json.loads((tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()[0])
    assert started["precision"] == precision
    assert read_losses(tmp_path / "parts") == read_losses(tmp_path / "whole")
    expected, found = (read_final_files(tmp_path / name) for name in ("whole", "parts"))
    assert found == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_every_cache_tier_on_gpu(tmp_path: Path) -> None:
    """The vision encoder is offloaded during steps, and reloaded for evaluation."""
    task = TinyTask(tmp_path)
    settings = "train.device=cuda", "train.precision=bf16", "train.num_workers=2"
    found: dict[str, Any] = {}
    for cache in ("never", "auto", "memory", "disk"):
        evaluation = {"metric": "classification", "every": 2, "max_new_tokens": 4}
        task.run(f"train.vision_cache={cache}", *settings, name=cache, tune=LORA, eval=evaluation)
        found[cache] = [loss for _, loss in read_losses(tmp_path / cache)]
        locations = [
            line["features"]["tier"] for line in task.read_metrics(cache) if "features" in line
        ]
        assert locations == [{"never": None, "auto": "gpu", "memory": "gpu"}.get(cache, cache)]
        assert found[cache] == pytest.approx(found["never"], rel=0.02)
