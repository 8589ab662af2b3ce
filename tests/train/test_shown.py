"""Pictures by their content, and the chunks that they are looked at in."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from looking_run import session_of

from finesight.data.headers import DamagedPicture
from finesight.encode.encoded import Span
from finesight.train import shown
from finesight.train.shown import CHUNK_PATCHES, Chunk, Shown, Sight, shown_by


def sight(number: int, patches: int = 64) -> Sight:
    key = hashlib.sha256(str(number).encode()).hexdigest()
    return Sight(key, Span("image", 0, patches // 4, (1, 4, patches // 4), (), (0, 0), (0, 0)))


def of(numbers: range, patches: int = 64) -> Shown:
    sights = sorted((sight(number, patches) for number in numbers), key=lambda one: one.key)
    return Shown(tuple(sights), {}, {})


def names(found: Shown) -> set[str]:
    return {chunk.name for chunk in found.chunks()}


def test_every_picture_is_in_one_chunk() -> None:
    found = of(range(1000))
    chunks = found.chunks()
    assert [chunk.start for chunk in chunks] == [0, *(chunk.stop for chunk in chunks[:-1])]
    assert chunks[-1].stop == found.pictures(chunks) == 1000
    assert found.patches(chunks) == 64_000
    assert 45 < len(chunks) < 80, "sixteen to a chunk, in the mean"
    first, second = chunks[: len(chunks) // 2], chunks[len(chunks) // 2 :]
    assert 0.5 < found.pictures(first) / found.pictures(second) < 2, "from the first to the last"
    assert len(names(found)) == len(chunks)
    assert of(range(0)).chunks() == []


def test_a_few_more_pictures_change_few_chunks() -> None:
    before, after = names(of(range(1000))), names(of(range(1005)))
    assert len(before - after) <= 5
    assert len(after - before) <= 10


def test_a_chunk_is_looked_at_in_bounded_memory() -> None:
    found = of(range(200), patches=2048)
    assert max(found.patches([chunk]) for chunk in found.chunks()) == CHUNK_PATCHES
    alone = of(range(20), patches=CHUNK_PATCHES + 4).chunks()
    assert [chunk.stop - chunk.start for chunk in alone] == [1] * 20


def test_bounds_are_places() -> None:
    assert of(range(3)).bounds_P1.tolist() == [0, 16, 32, 48]


@pytest.mark.parametrize("workers", [0, 1])
def test_pictures_are_known_by_what_is_fed_of_them(
    tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shown, "_SAMPLES", 2)
    session = session_of(tmp_path / "task")
    folder = tmp_path / "task"
    (folder / "train1.png").write_bytes((folder / "train0.png").read_bytes())
    (folder / "train5.png").unlink()
    counted: list[int] = []
    kept = session.train.survey.kept
    corpus, renderer = session.train.corpus, session.renderer
    found = shown_by(corpus, renderer, kept, workers, counted.append)
    assert sum(counted) == 11
    assert list(found.damaged) == [5]
    assert isinstance(found.damaged[5], DamagedPicture)
    assert sorted(found.of_sample) == [index for index in range(11) if index != 5]
    assert found.of_sample[0] == found.of_sample[1]
    keys = [one.key for one in found.sights]
    assert keys == sorted(set(keys))
    for index, (number,) in found.of_sample.items():
        (span,) = renderer.outline(corpus[index]).spans
        assert found.sights[number].places == span.stop - span.start
    assert isinstance(found.chunks()[0], Chunk)
