"""Training on video files: equal to training on their frames, with and without vision cache."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_model import TinyFamily
from video_fixtures import save_frames, write_video
from vision_cache_fixtures import build_vision_cache, make_train_state

from finesight.data.corpus import open_sample_source
from finesight.data.sample import VideoPart
from finesight.data.video_file import iter_video_frames
from finesight.encode import renderer as renderer_module
from finesight.train.dataset_stats import list_image_paths, read_image_state
from finesight.train.trainer import train_step
from finesight.train.training_run import StopRequest

SAMPLES = (1, 4, 5)
FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"]


def insert_videos(data: Path, videos: Sequence[VideoPart]) -> None:
    """Replace the images of some samples by videos."""
    samples = [json.loads(line) for line in data.read_text().splitlines()]
    for number, video in zip(SAMPLES, videos, strict=True):
        content = samples[number]["messages"][0]["content"]
        content[0] = video.model_dump(exclude_defaults=True) | {"type": "video"}
    data.write_text("".join(json.dumps(sample) + "\n" for sample in samples))


def write_videos(folder: Path, *, as_frames: bool, family: str) -> list[VideoPart]:
    """Write three videos of 8 frames a second; four of their frames are sampled."""
    videos = []
    for number in SAMPLES:
        path = write_video(folder / f"{number}.mp4", num_frames=16, size=(56, 56 + 28 * number))
        is_newer = family.startswith("qwen3")
        indices = [0, 5, 10, 15] if is_newer else [0, 4, 8, 12]
        frames = save_frames(folder / f"frames{number}", [*iter_video_frames(path, indices)])
        listed = VideoPart(frames=tuple(frames), fps=1.6 if is_newer else 2.0)
        videos.append(listed if as_frames else VideoPart(video=path.name))
    return videos


@pytest.mark.parametrize("family", FAMILIES)
def test_training_step_equals_a_step_on_the_frames(tmp_path: Path, family: TinyFamily) -> None:
    losses = []
    for as_frames in (False, True):
        folder = tmp_path / str(as_frames)
        make_train_state(folder, family=family)
        insert_videos(
            folder / "train.jsonl", write_videos(folder, as_frames=as_frames, family=family)
        )
        session = make_train_state(folder, family=family)
        steps = [session.step_dataset.get_step(number) for number in range(len(session.sampler))]
        losses.append([train_step(session, step, StopRequest()).wait() for step in steps])
        assert any(
            grid[0] * len(pack.grid_thw) > 1
            for s in steps
            for pack in s.packs
            for grid in pack.grid_thw
        )
    assert losses[0] == losses[1]


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_cached_features_of_a_file_match(
    tmp_path: Path, family: TinyFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "task"
    make_train_state(folder, family=family)
    insert_videos(folder / "train.jsonl", write_videos(folder, as_frames=False, family=family))
    session = make_train_state(folder, family=family, vision_cache="memory")
    decoded: list[list[int]] = []

    def record(path: Path, frame_indices: Sequence[int]) -> Iterator[Image.Image]:
        decoded.append(list(frame_indices))
        return iter_video_frames(path, frame_indices)

    with monkeypatch.context() as patch:
        patch.setattr(renderer_module, "iter_video_frames", record)
        store = build_vision_cache(session)
    # Each file is decoded at most once for each chunk of features.
    assert sum(map(len, decoded)) == 4 * len(SAMPLES)
    assert len(decoded) <= len(SAMPLES) * len(store.reader.image_index.split_chunks())
    bare = session.step_dataset.with_vision_cache(store.reader)
    for number in range(len(session.sampler)):
        step, without = session.step_dataset.get_step(number), bare.get_step(number)
        for batch, known in zip(step.packs, without.cache_inputs, strict=True):
            expected = session.model.encode_images(batch.patches_ND, batch.grid_thw)
            torch.testing.assert_close(store.load_features(known), expected)


def test_fingerprint_covers_the_video_file(tmp_path: Path) -> None:
    path = write_video(tmp_path / "1.mp4")
    video = {"type": "video", "video": path.name}
    turns = [{"role": "user", "content": [video]}, {"role": "assistant", "content": "x"}]
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"id": "1", "messages": turns}) + "\n")
    sample = open_sample_source(data).read_sample(0)
    assert list_image_paths(sample) == {str(path)}
    state = read_image_state(sample)
    assert read_image_state(sample) == state
    write_video(path, num_frames=15)
    assert read_image_state(sample).content != state.content
