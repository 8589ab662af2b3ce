"""Several data files as one sequence with a fingerprint."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from scenery import write_jsonl

from finesight.config import DataFile
from finesight.data.sources import Corpus, load_sources
from finesight.errors import UserError


def write(path: Path, *names: str) -> Path:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    path.parent.mkdir(exist_ok=True)
    return write_jsonl(path, [{"id": name, "messages": turns} for name in names])


def ids(corpus: Corpus) -> list[str]:
    return [corpus[i].sample.id for i in range(len(corpus))]


def test_files_end_to_end_with_limits(tmp_path: Path) -> None:
    first = DataFile(path=write(tmp_path / "x" / "1.jsonl", "a", "b", "c"), limit=2)
    second = DataFile(path=write(tmp_path / "y" / "2.jsonl", "d"), weight=0.5, limit=9)
    corpus = load_sources((first, second))
    assert ids(corpus) == ["a", "b", "d"]
    assert corpus.sizes == (2, 1)
    assert corpus.weights == (1.0, 0.5)
    assert corpus[2].folder == tmp_path / "y"


def test_fingerprint_is_of_content_limits_and_weights(tmp_path: Path) -> None:
    path = write(tmp_path / "1.jsonl", "a", "b")
    moved = shutil.copy(path, tmp_path / "2.jsonl")
    prints = [
        load_sources((DataFile(path=path),)).fingerprint,
        load_sources((DataFile(path=path, limit=2),)).fingerprint,
        load_sources((DataFile(path=path, weight=2.0),)).fingerprint,
        load_sources((DataFile(path=path), DataFile(path=path))).fingerprint,
        load_sources((DataFile(path=write(tmp_path / "3.jsonl", "a", "c")),)).fingerprint,
    ]
    assert len(set(prints)) == len(prints)
    assert load_sources((DataFile(path=Path(moved)),)).fingerprint == prints[0]


def test_an_unanswered_sample_is_for_prediction_only(tmp_path: Path) -> None:
    question = {"id": "a", "messages": [{"role": "user", "content": "q"}]}
    file = DataFile(path=write_jsonl(tmp_path / "a.jsonl", [question]))
    assert ids(load_sources((file,), answered=False)) == ["a"]
    with pytest.raises(UserError, match="no answer"):
        load_sources((file,)).read()


def test_a_sample_is_read_when_it_is_asked_for(tmp_path: Path) -> None:
    """What is wrong with one is said when it is its turn, with file and line."""
    path = write(tmp_path / "1.jsonl", "a", "b")
    path.write_bytes(path.read_bytes() + b"\n{broken\n")
    corpus = load_sources((DataFile(path=path),))
    assert len(corpus) == 3
    assert corpus[1].sample.id == "b"
    with pytest.raises(UserError, match=r"1\.jsonl:4: broken JSON"):
        corpus.checked(2)
    with pytest.raises(UserError, match=r"1\.jsonl:4: broken JSON"):
        corpus.read()
