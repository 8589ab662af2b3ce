"""Every sample looked at beforehand: nothing lost uncounted, nothing ever cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_run import make_task

from finesight.config import Data, DataFile, PixelRange
from finesight.data.headers import DamagedPicture
from finesight.data.sources import load_sources
from finesight.encode.pack import beginning_of
from finesight.encode.render import Renderer
from finesight.errors import UserError
from finesight.hub import ModelFolder
from finesight.train.survey import CHUNK, Glances, Survey, spread, survey

RULE = PixelRange(min_pixels=784, max_pixels=7056)


def look(folder: Path, workers: int = 0, **settings: Any) -> Survey:
    file = DataFile(path=folder / "train.jsonl")
    data = Data(train=(file,), **settings)
    renderer = Renderer(ModelFolder(folder / "tiny"), RULE)
    return survey(load_sources((file,)), renderer, data, workers)


def test_all_are_kept_and_counted(tmp_path: Path) -> None:
    make_task(tmp_path)
    found = look(tmp_path)
    assert found.kept == tuple(range(11))
    assert found.dropped == ()
    renderer = Renderer(ModelFolder(tmp_path / "tiny"), RULE)
    outlines = [
        renderer.outline(sample)
        for sample in load_sources((DataFile(path=tmp_path / "train.jsonl"),)).read()
    ]
    assert found.tokens == sum(outline.tokens for outline in outlines)
    assert found.patches == sum(outline.patches for outline in outlines)
    assert found.longest == max(outline.tokens for outline in outlines)
    assert [(glance.id, glance.tokens, glance.supervised) for glance in found.glances] == [
        (outline.id, outline.tokens, outline.supervised) for outline in outlines
    ]
    assert [glance.patches for glance in found.glances] == [o.patches for o in outlines]


def test_what_all_begin_with_is_found(tmp_path: Path) -> None:
    make_task(tmp_path)
    renderer = Renderer(ModelFolder(tmp_path / "tiny"), RULE)
    outlines = [
        renderer.outline(sample)
        for sample in load_sources((DataFile(path=tmp_path / "train.jsonl"),)).read()
    ]
    found = look(tmp_path)
    assert found.beginning == beginning_of(outlines) == outlines[0].spans[0].start
    table = tmp_path / "train.jsonl"
    first, *others = table.read_text().splitlines()
    row = json.loads(first)
    row["messages"].insert(0, {"role": "system", "content": "Other words."})
    table.write_text("\n".join([json.dumps(row), *others]) + "\n")
    assert look(tmp_path).beginning < found.beginning


def test_over_long_and_unreadable_samples_are_dropped_with_their_reasons(tmp_path: Path) -> None:
    make_task(tmp_path)
    lengths = look(tmp_path).longest
    (tmp_path / "train3.png").write_bytes(b"no picture")
    found = look(tmp_path, max_length=lengths - 1)
    reasons = dict(found.dropped)
    assert "not a picture" in reasons.pop("train3")
    assert reasons
    assert set(reasons.values()) == {f"over {lengths - 1} tokens"}
    assert len(found.kept) + len(found.dropped) == 11
    assert 3 not in found.kept
    assert found.longest < lengths


def test_refused_instead_on_demand(tmp_path: Path) -> None:
    make_task(tmp_path)
    with pytest.raises(UserError, match=r"expected: at most 40 tokens"):
        look(tmp_path, max_length=40, unusable="refuse")
    (tmp_path / "train3.png").unlink()
    with pytest.raises(DamagedPicture, match=r"train3\.png"):
        look(tmp_path, unusable="refuse")


def test_no_readable_picture_at_all_is_an_error(tmp_path: Path) -> None:
    make_task(tmp_path)
    for path in tmp_path.glob("train*.png"):
        path.unlink()
    with pytest.raises(UserError, match=r"not one of 11 samples[\s\S]*train0\.png"):
        look(tmp_path)


def test_a_mistake_that_is_no_damaged_picture_is_never_dropped(tmp_path: Path) -> None:
    make_task(tmp_path)
    lines = (tmp_path / "train.jsonl").read_text().splitlines()
    sample = json.loads(lines[4])
    box = {"type": "box", "label": "x", "xyxy": [0, 0, 5000, 5000]}
    sample["messages"][1]["content"] = [box]
    lines[4] = json.dumps(sample)
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match="train4"):
        look(tmp_path)


def test_workers_find_the_same(tmp_path: Path) -> None:
    make_task(tmp_path, samples=8 * CHUNK + 3)
    (tmp_path / "train70.png").write_bytes(b"")
    assert look(tmp_path, workers=2) == look(tmp_path)
    assert len(look(tmp_path).kept) == 8 * CHUNK + 2


def test_some_stand_for_all(tmp_path: Path) -> None:
    make_task(tmp_path)
    (tmp_path / "train3.png").write_bytes(b"no picture")
    (tmp_path / "train7.png").write_bytes(b"no picture")
    file = DataFile(path=tmp_path / "train.jsonl")
    corpus, data = load_sources((file,)), Data(train=(file,))
    renderer = Renderer(ModelFolder(tmp_path / "tiny"), RULE)
    all_of_them = survey(corpus, renderer, data, 0)
    some = survey(corpus, renderer, data, 0, some=[1, 3, 4, 9])
    assert (some.whole, all_of_them.whole) == (False, True)
    assert some.kept == range(11)
    assert some.looked_at == 4
    assert list(some.seen) == [1, 4, 9]
    assert some.dropped == ()
    assert some.tokens == round(11 / 4 * sum(glance.tokens for glance in some.glances))
    glances = Glances(corpus, some, renderer, data.max_length)
    assert {index: glances[index] for index in all_of_them.kept} == dict(
        zip(all_of_them.kept, all_of_them.glances, strict=True)
    )
    # What cannot be used costs nothing, wherever its share of a step is dealt out.
    assert glances[3].tokens == glances[7].tokens == 0
    assert Glances(corpus, some, renderer, max_length=5)[0].tokens == 0


def test_drawn_by_chance_and_always_the_same() -> None:
    drawn = spread(10_000_000)
    assert list(drawn) == list(spread(10_000_000)) == sorted(set(drawn))
    assert 9_900 < len(drawn) <= 10_000
    assert 0 <= drawn[0] < 10_000
    assert 9_990_000 < drawn[-1] < 10_000_000
    assert list(drawn) != list(spread(9_999_999))
