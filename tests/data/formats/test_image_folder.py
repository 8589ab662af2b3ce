"""Image folders with text files, and folders that are not a dataset."""

from __future__ import annotations

from pathlib import Path

import pytest
from box_fixtures import (
    check_export_roundtrip,
    import_samples,
    list_answers,
    list_questions,
    write_box_image,
)
from case_files import load_cases

from finesight.data.formats import image_folder
from finesight.data.formats.dataset_format import ExportContext
from finesight.data.image_header import read_image_size
from finesight.data.sample import ImagePart, LocatedSample, Message, Sample, TextPart
from finesight.errors import UserError

CASES = load_cases("image_folder")

WHITE = (1, 1, 2, 2)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "set"
    for name in ("a.png", "inner/b.jpg", "inner/c.png"):
        write_box_image(root / name, WHITE)
    (root / "a.txt").write_text("A dog.\nIt barks.\n", encoding="utf-8")
    (root / "inner" / "b.txt").write_bytes(b"\xef\xbb\xbfEin H\xc3\xbcndchen\r\n")
    (root / ".hidden.txt").write_text("x", encoding="utf-8")
    return root


def test_text_file_is_the_answer(root: Path, tmp_path: Path) -> None:
    samples, summary = import_samples(root, tmp_path / "out", prompt="What is this?")
    assert list_answers(samples) == [["A dog.\nIt barks."], ["Ein Hündchen"]]
    assert list_questions(samples) == ["What is this?"] * 2
    assert [sample.id for sample in samples] == ["a", "b"]
    assert summary.detected_by == "2 images with a text file of the same name"
    assert summary.skipped_rows == {"images without a text file of the same name": 1}


def test_prompt_is_required(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="without text") as caught:
        import_samples(root, tmp_path / "out")
    assert "--prompt" in caught.value.remedy


def test_roundtrip(root: Path, tmp_path: Path) -> None:
    check_export_roundtrip(root, tmp_path, prompt="What is this?")


@pytest.mark.parametrize(
    ("content", "what"), [(b"", "an empty turn"), (b"\xff", "byte 0 is not UTF-8")]
)
def test_invalid_text_files(root: Path, tmp_path: Path, content: bytes, what: str) -> None:
    (root / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match=what):
        import_samples(root, tmp_path / "out", prompt="What is this?")


def test_two_texts_for_one_image_are_rejected(tmp_path: Path) -> None:
    path = write_box_image(tmp_path / "a.png", WHITE)
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
    located_sample = [LocatedSample(sample, tmp_path) for sample in samples]
    with pytest.raises(UserError, match=r"2 texts for images/a\.txt") as caught:
        list(
            image_folder.write_files(
                located_sample, ExportContext({path: "images/a.png"}, read_image_size)
            )
        )
    assert "coco" in caught.value.remedy


@pytest.mark.parametrize(("files", "remedy"), CASES["test_unknown_folders_are_rejected"])
def test_unknown_folders_are_rejected(tmp_path: Path, files: list[str], remedy: str) -> None:
    root = tmp_path / "set"
    root.mkdir()
    for name in files:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("?", encoding="utf-8")
    with pytest.raises(UserError, match="a folder without a known dataset format") as caught:
        import_samples(root, tmp_path / "out")
    assert remedy in caught.value.remedy
    assert str(len(files)) not in "0" or "no file" in caught.value.what
    assert "coco" in caught.value.expected


def test_windows_line_endings(root: Path, tmp_path: Path) -> None:
    (root / "a.txt").write_bytes(b"A dog.\r\nIt barks.\r\n")
    samples, _ = import_samples(root, tmp_path / "out", prompt="What is this?")
    assert list_answers(samples)[0] == ["A dog.\nIt barks."]
