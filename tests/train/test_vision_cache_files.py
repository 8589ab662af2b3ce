"""Disk tier of the vision cache: atomic files, LRU eviction and locks."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
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
    ImageChunk,
    ImageIndex,
    ImageRef,
    VisionFileStore,
    index_images,
    read_rows,
)


def features(number: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(5, 2, 8, generator=torch.Generator().manual_seed(number)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_written_features_are_read(tmp_path: Path, dtype: torch.dtype) -> None:
    with closing(VisionFileStore(tmp_path, "encoder")) as files:
        written = files.write("a", features(1, dtype))
        buffer = torch.empty(5, 2, 8, dtype=dtype)
        assert files.read("a", buffer) == written
        assert torch.equal(buffer, features(1, dtype))
        rows = torch.empty(2, 2, 8, dtype=dtype)
        read_rows(written, 3, rows)
        assert torch.equal(rows, features(1, dtype)[3:])
        assert torch.equal(load_file(written.path)["features"], buffer)
        assert files.read("b", buffer) is None
    assert [path.name for path in (tmp_path / "encoder").iterdir()] == ["a.safetensors"]


def test_dtype_mismatch_is_ignored(tmp_path: Path) -> None:
    with closing(VisionFileStore(tmp_path, "encoder")) as files:
        files.write("a", features(1, torch.float16))
        assert files.read("a", torch.empty(5, 2, 8, dtype=torch.bfloat16)) is None
        assert not files.has_chunk("a")


@pytest.mark.parametrize("fault", ["gone", "cut off"])
def test_missing_or_truncated_file_raises(tmp_path: Path, fault: str) -> None:
    with closing(VisionFileStore(tmp_path, "encoder")) as files:
        stored = files.write("a", features(1))
    if fault == "gone":
        stored.path.unlink()
    else:
        os.truncate(stored.path, stored.path.stat().st_size - 1)
    with pytest.raises(
        UserError, match=r"a\.safetensors: cached image features[^\n]*(No such file|cut off)"
    ):
        read_rows(stored, 0, torch.empty(5, 2, 8))


def make_aged_files(folder: Path, count: int) -> list[Path]:
    """Create files of one encoder, oldest first."""
    with closing(VisionFileStore(folder, "old")) as files:
        paths = [files.write(str(number), features(number)).path for number in range(count)]
    for number, path in enumerate(paths):
        os.utime(path, (number, number))
    return paths


def test_least_recently_used_files_are_evicted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = make_aged_files(tmp_path, 5)
    size = paths[0].stat().st_size
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


def test_files_in_use_are_not_evicted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = make_aged_files(tmp_path, 2)
    size = paths[0].stat().st_size
    monkeypatch.setattr(vision_cache, "MAX_STORE_BYTES", 2 * size)
    with closing(VisionFileStore(tmp_path, "old")) as reading:
        reading.evict(["0", "1"], 0)
        with closing(VisionFileStore(tmp_path, "new")) as files:
            assert files.evict([], size) == 0
        assert all(path.exists() for path in paths)
    with closing(VisionFileStore(tmp_path, "new")) as files:
        assert files.evict([], size) == size
    assert [path.exists() for path in paths] == [False, True]


def test_disk_reserve_is_never_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with closing(VisionFileStore(tmp_path, "encoder")) as files:
        assert files.evict([], 0) == 500


def test_leftover_files_of_killed_processes_are_removed(tmp_path: Path) -> None:
    with closing(VisionFileStore(tmp_path, "encoder")) as files:
        left = files.folder / ".a.1234.5678.tmp"
        left.write_bytes(b"half")
        files.evict([], 0)
        assert not left.exists()


def test_invalid_header_is_rejected(tmp_path: Path) -> None:
    """Offsets that point elsewhere, as long as they fit the file."""
    with closing(VisionFileStore(tmp_path, "encoder")) as files:
        path = files.write("a", features(1)).path
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        header["features"]["data_offsets"] = [4, len(data) - 8 - length + 4]
        text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
        assert files.read("a", torch.empty(5, 2, 8)) is None


def test_a_deeply_nested_header_is_not_taken(tmp_path: Path) -> None:
    with closing(VisionFileStore(tmp_path, "encoder")) as files:
        path = files.write("a", features(1)).path
        text = b"[" * 200_000
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        assert files.read("a", torch.empty(5, 2, 8)) is None
    assert not path.exists()


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
    monkeypatch.setattr(vision_cache, "SAMPLES_PER_ITEM", 2)
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
