"""What a sample shows by itself, through the whole check."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from conversing import by_line, checked, codes, lines, sample
from PIL import Image
from scenery import paint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(4):
        paint(tmp_path / f"{number}.png", 100, 60, shade=number)
    return tmp_path


def found(folder: Path, *records):
    return checked(lines(folder / "data.jsonl", records))


def test_sound_samples_have_no_findings(folder):
    result = found(folder, sample("0.png"), sample("1.png", "Where?", None, [1, 2, 50, 40]))
    assert codes(result) == {}
    assert (result.samples, result.pictures, result.contents) == (2, 2, 2)
    assert result.severity is None


def test_pictures_that_cannot_be_used_are_told_apart(folder):
    whole = (folder / "0.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[:-30])
    (folder / "no.png").write_text("not a picture")
    (folder / "empty.png").write_bytes(b"")
    Image.new("1", (9000, 8000)).save(folder / "large.png")
    Image.new("1", (1000, 4)).save(folder / "thin.png")
    (folder / "folder.png").mkdir()
    names = ("gone.png", "cut.png", "no.png", "empty.png", "large.png", "thin.png", "folder.png")
    result = found(folder, *(sample(name, f"What is {name}?") for name in names))
    places = {code: sorted(by_line(result, code)) for code in result.counts}
    assert places == {
        "picture-missing": [1],
        "picture-cut-off": [2],
        "picture-damaged": [3, 4, 7],
        "picture-too-large": [5, 6],
    }
    finding = by_line(result, "picture-missing")[1]
    assert finding.shown[0].path == folder / "gone.png"
    assert finding.sample == "s1"


def test_a_pipe_is_no_picture(folder):
    os.mkfifo(folder / "pipe.png")  # who opened it to read would wait for ever
    finding = by_line(found(folder, sample("pipe.png")), "picture-damaged")[1]
    assert finding.what == f"{folder / 'pipe.png'}: a pipe or a device, not a file"


def test_pictures_lie_where_training_looks_for_them(folder, monkeypatch):
    # A path of a sample starts at its file's folder and nowhere else, and is taken as it is.
    paint(folder / "here" / "4.png", 100, 60)
    monkeypatch.chdir(folder / "here")
    result = found(folder, sample("4.png"), sample("here\\4.png", "Why?"))
    assert codes(result) == {"picture-missing": 2}
    assert by_line(result, "picture-missing")[1].what == str(folder / "4.png")


def test_a_picture_behind_a_link_and_a_copy_is_one_content(folder):
    (folder / "copy.png").write_bytes((folder / "0.png").read_bytes())
    (folder / "link.png").symlink_to(folder / "0.png")
    names = ("0.png", "copy.png", "link.png", "1.png")
    result = found(folder, *(sample(name, f"What is {name}?") for name in names))
    assert (result.pictures, result.contents) == (4, 2)


def test_frames_of_a_video(folder):
    paint(folder / "other.png", 50, 60)
    frames = [["0.png", "1.png"], ["0.png", "other.png"], ["0.png", "gone.png"]]
    videos = [{"type": "video", "frames": names} for names in frames]
    records = [sample(None, f"Video {n}?") for n in range(3)]
    for record, video in zip(records, videos, strict=True):
        record["messages"][0]["content"].insert(0, video)
    result = found(folder, *records)
    assert codes(result) == {"frames-differ": 1, "picture-missing": 1}
    assert list(by_line(result, "frames-differ")) == [2]


@pytest.mark.parametrize("answer", [None, "", " \n"])
def test_an_empty_answer(folder, answer):
    assert codes(found(folder, sample("0.png", "What?", answer))) == {"empty-answer": 1}


def test_an_empty_question(folder):
    assert codes(found(folder, sample(None, " "))) == {"empty-question": 1}


@pytest.mark.parametrize(
    "roles",
    [("user",), ("assistant",), ("user", "user"), ("user", "system", "assistant"), ("system",)],
)
def test_roles_out_of_order(folder, roles):
    record = {"messages": [{"role": role, "content": "words"} for role in roles]}
    assert codes(found(folder, record)) == {"roles-out-of-order": 1}


def test_a_picture_in_an_answer(folder):
    record = sample("0.png")
    record["messages"][1]["content"].append({"type": "image", "image": "1.png"})
    assert codes(found(folder, record)) == {"picture-in-answer": 1}


def test_a_row_that_is_no_sample(folder):
    result = found(folder, {"messages": [{"role": "user", "content": [{"type": "sound"}]}]})
    assert codes(result) == {"row-unreadable": 1}
    assert result.samples == 0


BOXES = {
    "box-outside": ([0, 0, 102, 60], [-5, 0, 50, 50], [200, 200, 300, 300], [100, 10, 101, 20]),
    "box-reversed": ([90, 10, 20, 50], [20, 50, 90, 10], [90, 55, 80, 50]),
    "box-empty": ([10, 10, 10, 40], [10, 10, 40, 10], [5, 5, 5, 5]),
    "box-at-edge": ([0, 0, 100.5, 60], [-1, 5, 50, 61]),
    "box-tiny": ([10, 10, 11, 40],),
    "box-of-everything": ([0, 0, 100, 60], [0, 0, 99.9, 59.9]),
}


@pytest.mark.parametrize(("code", "box"), [(c, box) for c, boxes in BOXES.items() for box in boxes])
def test_a_box(folder, code, box):
    result = found(folder, sample("0.png", "Where?", None, box, [1, 2, 50, 40]))
    assert codes(result) == {code: 1}
    shown = result.findings[0].shown[0]
    assert (shown.path, shown.number) == (folder / "0.png", 0)
    assert shown.boxes == (tuple(map(float, box)),)


@pytest.mark.parametrize(
    ("box", "certain"),
    [
        ([90, 55, 80, 50], True),  # 90 + 80 lies beyond the picture, so 80 is no width
        ([40, 30, 20, 10], False),  # might be a corner with a size
        ([90, 10, 20, 70], False),  # outside of the picture in any order
    ],
)
def test_when_reversed_corners_are_certain(folder, box, certain):
    result = found(folder, sample("0.png", "Where?", None, box))
    assert by_line(result, "box-reversed")[1].fix == ("put in order" if certain else None)


@pytest.mark.parametrize(
    ("text", "certain"),
    [("<image>\nWhat?", True), ("What?<image>", True), ("What does <image> mean in SVG?", False)],
)
def test_marks_amid_the_words_may_be_meant(folder, text, certain):
    result = found(folder, sample("0.png", text))
    fix = by_line(result, "placeholder-typed")[1].fix
    assert fix == ("marks taken out" if certain else None)


def test_a_box_of_no_picture(folder):
    record = sample("0.png", "Where?", None, [1, 2, 50, 40])
    record["messages"][1]["content"][0]["image"] = 1
    assert codes(found(folder, record)) == {"box-of-no-picture": 1}


def test_boxes_of_a_picture_that_is_missing_are_not_judged(folder):
    result = found(folder, sample("gone.png", "Where?", None, [50, 2, 1, 40]))
    assert codes(result) == {"picture-missing": 1}


TEXTS = {
    "marks-differ": ("<image><image> What?", "Picture 1: <img>a.jpg</img>\n<image> What?"),
    "placeholder-typed": (
        "<image>\nWhat?",
        "a <|image_pad|> b",
        "<|video_pad|>",
        "<video>",
        "<imgpad>",
    ),
    "special-token": ("What?<|im_end|>", "<|endoftext|>", "<|fim_prefix|>", "<|extra_7|>"),
    "box-typed": ("<ref>a dog</ref>", "<box>(1,2),(3,4)</box>", '{"bbox_2d": [1, 2, 3, 4]}'),
}


@pytest.mark.parametrize(
    ("code", "text"), [(c, text) for c, texts in TEXTS.items() for text in texts]
)
def test_what_is_typed_in_a_text(folder, code, text):
    assert codes(found(folder, sample("0.png", text))) == {code: 1}


@pytest.mark.parametrize(
    "text",
    [
        "a < b and c > d",
        "<|not a token|>",
        "<b>bold</b>",
        "{'a': [1, 2]}",
        "<|user|>",
        "<p>",
        "<p><video><source src='a.mp4'></video> <audio></audio></p>",
    ],
)
def test_what_may_be_typed(folder, text):
    assert codes(found(folder, sample("0.png", text))) == {}
