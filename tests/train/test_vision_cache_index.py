"""Image index: identification by content, and chunks."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from vision_cache_fixtures import make_train_state

from finesight.data.image_header import CorruptImageError
from finesight.encode.tokenized_sample import VisualSpan
from finesight.train import vision_store
from finesight.train.vision_store import (
    CHUNK_PATCHES,
    ImageChunk,
    ImageIndex,
    ImageRef,
    index_images,
)


def make_image_ref(number: int, patches: int = 64) -> ImageRef:
    key = hashlib.sha256(str(number).encode()).hexdigest()
    return ImageRef(
        key, VisualSpan("image", 0, patches // 4, (1, 4, patches // 4), (), (0, 0), (0, 0))
    )


def make_index(values: range, patches: int = 64) -> ImageIndex:
    sights = sorted((make_image_ref(number, patches) for number in values), key=lambda one: one.key)
    return ImageIndex(tuple(sights), {}, {})


def names(found: ImageIndex) -> set[str]:
    return {chunk.name for chunk in found.split_chunks()}


def test_every_image_is_in_one_chunk() -> None:
    found = make_index(range(1000))
    chunks = found.split_chunks()
    assert [chunk.start for chunk in chunks] == [0, *(chunk.stop for chunk in chunks[:-1])]
    assert chunks[-1].stop == found.count_images(chunks) == 1000
    assert found.count_patches(chunks) == 64_000
    assert 45 < len(chunks) < 80, "sixteen to a chunk, in the mean"
    first, second = chunks[: len(chunks) // 2], chunks[len(chunks) // 2 :]
    assert 0.5 < found.count_images(first) / found.count_images(second) < 2, (
        "from the first to the last"
    )
    assert len(names(found)) == len(chunks)
    assert make_index(range(0)).split_chunks() == []


def test_few_new_images_change_few_chunks() -> None:
    before, after = names(make_index(range(1000))), names(make_index(range(1005)))
    assert len(before - after) <= 5
    assert len(after - before) <= 10


def test_chunk_size_is_bounded() -> None:
    found = make_index(range(200), patches=2048)
    assert max(found.count_patches([chunk]) for chunk in found.split_chunks()) == CHUNK_PATCHES
    alone = make_index(range(20), patches=CHUNK_PATCHES + 4).split_chunks()
    assert [chunk.stop - chunk.start for chunk in alone] == [1] * 20


def test_feature_offsets_are_cumulative() -> None:
    assert make_index(range(3)).feature_offsets_P1.tolist() == [0, 16, 32, 48]


@pytest.mark.parametrize("workers", [0, 1])
def test_images_are_identified_by_model_input(
    tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vision_store, "SAMPLES_PER_ITEM", 2)
    session = make_train_state(tmp_path / "task")
    folder = tmp_path / "task"
    (folder / "train1.png").write_bytes((folder / "train0.png").read_bytes())
    (folder / "train5.png").unlink()
    counted: list[int] = []
    retained = session.train_data.stats.sample_indices
    corpus, renderer = session.train_data.corpus, session.renderer
    found = index_images(corpus, renderer, retained, workers, counted.append)
    assert sum(counted) == 11
    assert list(found.corrupt_samples) == [5]
    assert isinstance(found.corrupt_samples[5], CorruptImageError)
    assert sorted(found.images_by_sample) == [index for index in range(11) if index != 5]
    assert found.images_by_sample[0] == found.images_by_sample[1]
    keys = [one.key for one in found.image_refs]
    assert keys == sorted(set(keys))
    for index, (number,) in found.images_by_sample.items():
        (span,) = renderer.tokenize(corpus[index]).spans
        assert found.image_refs[number].num_features == span.stop - span.start
    assert isinstance(found.split_chunks()[0], ImageChunk)
