"""Training on video files: cached features and fingerprints."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from PIL import Image
from tiny_task import edit_samples
from video_fixtures import write_video
from vision_cache_fixtures import assert_features_match, build_vision_cache, make_train_state

from finesight.data.corpus import open_sample_source
from finesight.data.video_file import iter_video_frames
from finesight.encode import renderer as renderer_module
from finesight.train.dataset_stats import list_image_paths, read_image_state

SAMPLES = (1, 4, 5)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_cached_features_of_a_file_match(tmp_path, family, monkeypatch):
    """Four frames of each file are sampled, and decoded at most once per chunk of features."""
    folder = tmp_path / "task"
    make_train_state(folder, family=family)
    with edit_samples(folder / "train.jsonl") as samples:
        for number in SAMPLES:
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
    assert sum(map(len, decoded)) == 4 * len(SAMPLES)
    assert len(decoded) <= len(SAMPLES) * len(cache.reader.image_index.split_chunks())
    assert_features_match(state, cache)


def test_fingerprint_covers_the_video_file(tmp_path):
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
