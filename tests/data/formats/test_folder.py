"""Folders: pictures with texts beside them, and folders that are no data set."""

from __future__ import annotations

from pathlib import Path

import pytest
from box_scenes import answers, imported, questions, there_and_back, white_at

from finesight.data.formats import folder
from finesight.data.formats.format import Writing
from finesight.data.headers import picture_size
from finesight.data.jsonl import Located
from finesight.data.sample import ImagePart, Message, Sample, TextPart
from finesight.errors import UserError

WHITE = (1, 1, 2, 2)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "set"
    for name in ("a.png", "inner/b.jpg", "inner/c.png"):
        white_at(root / name, WHITE)
    (root / "a.txt").write_text("A dog.\nIt barks.\n", encoding="utf-8")
    (root / "inner" / "b.txt").write_bytes(b"\xef\xbb\xbfEin H\xc3\xbcndchen\r\n")
    (root / ".hidden.txt").write_text("x", encoding="utf-8")
    return root


def test_the_text_is_the_answer(root: Path, tmp_path: Path) -> None:
    samples, summary = imported(root, tmp_path / "out", prompt="What is this?")
    assert answers(samples) == [["A dog.\nIt barks."], ["Ein Hündchen"]]
    assert questions(samples) == ["What is this?"] * 2
    assert [sample.id for sample in samples] == ["a", "b"]
    assert summary.known_by == "2 pictures with a text file of their name"
    assert summary.left_out == {"pictures without a text file of their name": 1}


def test_the_question_has_to_be_said(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="without words") as caught:
        imported(root, tmp_path / "out")
    assert "--prompt" in caught.value.remedy


def test_there_and_back(root: Path, tmp_path: Path) -> None:
    there_and_back(root, tmp_path, prompt="What is this?")


@pytest.mark.parametrize(
    ("content", "what"), [(b"", "an empty turn"), (b"\xff", "byte 0 is not UTF-8")]
)
def test_bad_texts(root: Path, tmp_path: Path, content: bytes, what: str) -> None:
    (root / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match=what):
        imported(root, tmp_path / "out", prompt="What is this?")


def test_two_texts_of_a_picture_cannot_be_held(tmp_path: Path) -> None:
    path = white_at(tmp_path / "a.png", WHITE)
    question = (ImagePart(image="a.png"), TextPart(text="What?"))
    samples = [
        Sample(
            id=text,
            messages=(
                Message(role="user", content=question),
                Message(role="assistant", content=text),  # type: ignore[arg-type]
            ),
        )
        for text in ("one", "two")
    ]
    located = [Located(sample, tmp_path) for sample in samples]
    with pytest.raises(UserError, match=r"2 texts for pictures/a\.txt") as caught:
        list(folder.write(located, Writing({path: "pictures/a.png"}, picture_size)))
    assert "coco" in caught.value.remedy


@pytest.mark.parametrize(
    ("files", "remedy"),
    [
        (["a.png"], "a .txt file beside each picture"),
        (["a.png", "b.txt"], "here are a.png and b.txt"),
        (["a.png", "a.xml"], "the nearest is voc"),
        (["a.png", "rows.jsonl"], "give the file itself"),
        (["inner/a.parquet"], "inner/a.parquet"),
        ([], "give the folder with the pictures"),
    ],
)
def test_folders_that_are_none(tmp_path: Path, files: list[str], remedy: str) -> None:
    root = tmp_path / "set"
    root.mkdir()
    for name in files:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("?", encoding="utf-8")
    with pytest.raises(UserError, match="no known data set") as caught:
        imported(root, tmp_path / "out")
    assert remedy in caught.value.remedy
    assert str(len(files)) not in "0" or "no file" in caught.value.what
    assert "coco" in caught.value.expected


def test_line_breaks_of_windows(root: Path, tmp_path: Path) -> None:
    (root / "a.txt").write_bytes(b"A dog.\r\nIt barks.\r\n")
    samples, _ = imported(root, tmp_path / "out", prompt="What is this?")
    assert answers(samples)[0] == ["A dog.\nIt barks."]
