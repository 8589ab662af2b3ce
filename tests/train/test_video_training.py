"""Training on video files: equal to training on their frames, with and without vision cache."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from PIL import Image
from tiny_model import TinyFamily
from tiny_task import edit_samples
from video_fixtures import save_frames, write_video
from vision_cache_fixtures import assert_features_match, build_vision_cache, make_train_state

from finesight.data.corpus import open_sample_source
from finesight.data.sample import VideoPart
from finesight.data.video_file import iter_video_frames
from finesight.encode import renderer as renderer_module
from finesight.train.dataset_stats import list_image_paths, read_image_state
from finesight.train.trainer import TrainState, train_step
from finesight.train.training_run import StopRequest

SAMPLES = (1, 4, 5)


def make_video_state(
    folder: Path, family: TinyFamily, *, as_frames: bool = False, **train: str
) -> TrainState:
    """Replace three images by videos of 8 frames a second, of which four frames are sampled."""
    make_train_state(folder, family=family)
    is_newer = family.startswith("qwen3")
    indices = [0, 5, 10, 15] if is_newer else [0, 4, 8, 12]
    with edit_samples(folder / "train.jsonl") as samples:
        for number in SAMPLES:
            size = (56, 56 + 28 * number)
            path = write_video(folder / f"{number}.mp4", num_frames=16, size=size)
            frames = save_frames(folder / f"frames{number}", [*iter_video_frames(path, indices)])
            listed = VideoPart(frames=tuple(frames), fps=1.6 if is_newer else 2.0)
            video = listed if as_frames else VideoPart(video=path.name)
            part = video.model_dump(exclude_defaults=True) | {"type": "video"}
            samples[number]["messages"][0]["content"][0] = part
    return make_train_state(folder, **train)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def test_training_step_equals_a_step_on_the_frames(tmp_path: Path, family: TinyFamily) -> None:
    losses = []
    for as_frames in (False, True):
        state = make_video_state(tmp_path / str(as_frames), family, as_frames=as_frames)
        steps = [state.step_dataset.get_step(number) for number in range(len(state.sampler))]
        losses.append([train_step(state, step, StopRequest()).wait() for step in steps])
        grids = [pack.grid_thw for step in steps for pack in step.packs]
        assert any(grid[0] * len(pack) > 1 for pack in grids for grid in pack)
    assert losses[0] == losses[1]


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_cached_features_of_a_file_match(tmp_path, family, monkeypatch):
    """Each file is decoded at most once for each chunk of features."""
    state = make_video_state(tmp_path / "task", family, vision_cache="memory")
    decoded: list[list[int]] = []

    def record(path: Path, frame_indices: Sequence[int]) -> Iterator[Image.Image]:
        decoded.append(list(frame_indices))
        return iter_video_frames(path, frame_indices)

    with monkeypatch.context() as patch:
        patch.setattr(renderer_module, "iter_video_frames", record)
        cache = build_vision_cache(state)
    assert sum(map(len, decoded)) == 4 * len(SAMPLES)
    assert len(decoded) <= len(SAMPLES) * len(cache.reader.image_index.split_chunks())
    assert_features_match(state, cache)


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
