"""Disk tier of the vision cache: atomic files, LRU eviction, locks, and chunks of images."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from vision_cache_fixtures import make_train_state

from finesight.data.image_header import CorruptImageError
from finesight.encode.tokenization import VisualSpan
from finesight.errors import UserError
from finesight.train import vision_cache
from finesight.train.vision_cache import (
    CHUNK_PATCHES,
    ImageIndex,
    ImageRef,
    VisionFileStore,
    index_images,
    read_rows,
)


@pytest.fixture
def files(tmp_path: Path) -> Iterator[VisionFileStore]:
    with closing(VisionFileStore(tmp_path, "encoder")) as store:
        yield store


def make_features(number: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(5, 2, 8, generator=torch.Generator().manual_seed(number)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_written_features_are_read(files, dtype):
    features = make_features(1, dtype)
    written = files.write("a", features)
    buffer, rows = torch.empty(5, 2, 8, dtype=dtype), torch.empty(2, 2, 8, dtype=dtype)
    assert files.read("a", buffer) == written
    read_rows(written, 3, rows)
    assert torch.equal(buffer, features)
    assert torch.equal(rows, features[3:])
    assert torch.equal(load_file(written.path)["features"], features)
    assert files.read("b", buffer) is None
    assert [path.name for path in files.folder.iterdir()] == ["a.safetensors"]
    # A file of another dtype is removed.
    other = torch.float16 if dtype == torch.bfloat16 else torch.bfloat16
    assert files.read("a", torch.empty(5, 2, 8, dtype=other)) is None
    assert not files.has_chunk("a")


@pytest.mark.parametrize("is_lost", [True, False])
def test_missing_or_truncated_file_raises(files, is_lost):
    stored = files.write("a", make_features(1))
    if is_lost:
        stored.path.unlink()
    else:
        os.truncate(stored.path, stored.path.stat().st_size - 1)
    words = r"a\.safetensors: cached image features[^\n]*(No such file|cut off)"
    with pytest.raises(UserError, match=words):
        read_rows(stored, 0, torch.empty(5, 2, 8))


def test_invalid_header_is_rejected(files):
    """Offsets point elsewhere within the file, or the header is deeply nested."""
    path = files.write("a", make_features(1)).path
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["features"]["data_offsets"] = [4, len(data) - 8 - length + 4]
    shifted = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    for text in (shifted, b"[" * 200_000):
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
        assert files.read("a", torch.empty(5, 2, 8)) is None
        assert not path.exists()


def make_aged_files(folder: Path, count: int) -> tuple[list[Path], int]:
    with closing(VisionFileStore(folder, "old")) as files:
        paths = [files.write(str(number), make_features(number)).path for number in range(count)]
    for number, path in enumerate(paths):
        os.utime(path, (number, number))
    return paths, paths[0].stat().st_size


def test_least_recently_used_files_are_evicted(tmp_path, monkeypatch):
    paths, size = make_aged_files(tmp_path, 5)
    monkeypatch.setattr(vision_cache, "MAX_STORE_BYTES", 6 * size)
    with closing(VisionFileStore(tmp_path, "old")) as files:
        assert files.read("0", torch.empty(5, 2, 8)) is not None, "used just now"
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
    assert index.count_patches(chunks) == 64_000
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
    assert max(index.count_patches([chunk]) for chunk in index.split_chunks()) == CHUNK_PATCHES
    alone = make_index(20, patches=CHUNK_PATCHES + 4).split_chunks()
    assert [chunk.stop - chunk.start for chunk in alone] == [1] * 20


@pytest.mark.parametrize("workers", [0, 1])
def test_images_are_identified_by_model_input(tmp_path, workers, monkeypatch):
    monkeypatch.setattr(vision_cache, "SAMPLES_PER_ITEM", 2)
    folder = tmp_path / "task"
    state = make_train_state(folder)
    (folder / "train1.png").write_bytes((folder / "train0.png").read_bytes())
    (folder / "train5.png").unlink()
    counted: list[int] = []
    corpus, renderer = state.train_data.corpus, state.renderer
    samples = state.train_data.stats.sample_indices
    found = index_images(corpus, renderer, samples, workers, counted.append)
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
