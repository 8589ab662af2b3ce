"""Several data files as one sequence with a fingerprint."""

import shutil
from pathlib import Path

import pytest
from image_fixtures import write_jsonl

from finesight.errors import UserError
from finesight.samples.corpus import Corpus, load_corpus
from finesight.settings.config import TrainFileSettings


def write(path: Path, *names: str) -> Path:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    path.parent.mkdir(exist_ok=True)
    return write_jsonl(path, [{"id": name, "messages": turns} for name in names])


def ids(corpus: Corpus) -> list[str]:
    return [corpus[i].sample.id for i in range(len(corpus))]


def test_files_are_concatenated_with_limits(tmp_path: Path) -> None:
    first = TrainFileSettings(path=write(tmp_path / "x" / "1.jsonl", "a", "b", "c"), limit=2)
    second = TrainFileSettings(path=write(tmp_path / "y" / "2.jsonl", "d"), weight=0.5, limit=9)
    corpus = load_corpus((first, second))
    assert ids(corpus) == ["a", "b", "d"]
    assert corpus.source_sizes == (2, 1)
    assert corpus.weights == (1.0, 0.5)
    assert corpus[2].folder == tmp_path / "y"


def test_fingerprint_covers_content_limits_and_weights(tmp_path: Path) -> None:
    path = write(tmp_path / "1.jsonl", "a", "b")
    changed = shutil.copy(path, tmp_path / "2.jsonl")
    prints = [
        load_corpus((TrainFileSettings(path=path),)).fingerprint,
        load_corpus((TrainFileSettings(path=path, limit=2),)).fingerprint,
        load_corpus((TrainFileSettings(path=path, weight=2.0),)).fingerprint,
        load_corpus((TrainFileSettings(path=path), TrainFileSettings(path=path))).fingerprint,
        load_corpus((TrainFileSettings(path=write(tmp_path / "3.jsonl", "a", "c")),)).fingerprint,
    ]
    assert len(set(prints)) == len(prints)
    assert load_corpus((TrainFileSettings(path=Path(changed)),)).fingerprint == prints[0]


def test_samples_are_read_lazily(tmp_path: Path) -> None:
    """What is wrong with one is said when it is its turn, with file and line."""
    path = write(tmp_path / "1.jsonl", "a", "b")
    path.write_bytes(path.read_bytes() + b"\n{broken\n")
    corpus = load_corpus((TrainFileSettings(path=path),))
    assert len(corpus) == 3
    assert corpus[1].sample.id == "b"
    with pytest.raises(UserError, match=r"1\.jsonl:4: broken JSON"):
        corpus.read_validated(2)
    with pytest.raises(UserError, match=r"1\.jsonl:4: broken JSON"):
        corpus.read_samples()
