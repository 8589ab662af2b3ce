"""Samples gathered by the pictures that they show."""

from __future__ import annotations

from pathlib import Path

import pytest
from scenery import paint

from finesight.data.formats.by_picture import boxes_by_picture, shortest, texts_by_picture
from finesight.data.formats.format import Writing
from finesight.data.headers import picture_size
from finesight.data.jsonl import Located
from finesight.data.sample import BoxPart, ImagePart, Message, Part, Sample, TextPart
from finesight.errors import UserError

DOG = BoxPart(label="dog", xyxy=(1, 2, 3, 4))
CAT = BoxPart(label="cat", xyxy=(5, 6, 7, 8))


@pytest.fixture
def writing(tmp_path: Path) -> Writing:
    return Writing({paint(tmp_path / "a.png"): "a.png"}, picture_size)


def sample(*answer: Part, picture: str = "a.png", more: tuple[Message, ...] = ()) -> Sample:
    asked = Message(role="user", content=(ImagePart(image=picture), TextPart(text="?")))
    last = Message(role="assistant", content=answer)
    return Sample(id="s", messages=(*more, asked, last), references=("r",), meta={"note": 1})


def test_boxes_of_several_samples_are_there_once(tmp_path: Path, writing: Writing) -> None:
    said = [sample(DOG), sample(DOG, DOG, CAT), sample(TextPart(text="none")), sample(CAT, DOG)]
    system = Message(role="system", content=(TextPart(text="Be brief."),))
    said.append(sample(CAT, TextPart(text="\n"), more=(system,)))
    (one,) = boxes_by_picture([Located(s, tmp_path) for s in said], writing, set())
    assert [box.label for box in one.boxes] == ["dog", "dog", "cat"]
    assert {what: count for what, count in writing.lost.items() if count} == {
        "questions, which an import asks anew by --prompt and --ask": 5,
        "system prompts": 1,
        "references": 5,
        "the key note of meta": 5,
    }


def test_texts_of_several_samples(tmp_path: Path, writing: Writing) -> None:
    said = [sample(TextPart(text="b")), sample(TextPart(text="a")), sample(TextPart(text="b"))]
    (one,) = texts_by_picture([Located(s, tmp_path) for s in said], writing, {"note"})
    assert one.texts == ["b", "r", "a"]
    assert "the key note of meta" not in writing.lost


@pytest.mark.parametrize(
    ("bad", "what"),
    [
        (sample(TextPart(text="A dog.")), "the answer holds type='text'"),
        (sample(DOG, TextPart(text="none")), "the answer holds type='text'"),
        (sample(BoxPart(xyxy=(1, 2, 3, 4))), "the answer holds type='box'"),
        (sample(DOG, more=sample(DOG).messages), "4 turns about 2 pictures"),
    ],
)
def test_what_no_box_set_can_hold(tmp_path: Path, writing: Writing, bad: Sample, what: str) -> None:
    with pytest.raises(UserError, match=what) as caught:
        boxes_by_picture([Located(bad, tmp_path)], writing, set())
    assert "sample s" in caught.value.where
    assert caught.value.remedy


def test_boxes_are_no_text(tmp_path: Path, writing: Writing) -> None:
    with pytest.raises(UserError, match="an answer with boxes"):
        texts_by_picture([Located(sample(DOG), tmp_path)], writing, set())


def test_numbers_are_written_short() -> None:
    assert [shortest(n) for n in (3.0, 0.1 + 0.2, 2.5, -0.0)] == [3, 0.3, 2.5, 0]
    assert isinstance(shortest(3.0), int)


def test_a_box_with_a_blank_label_has_no_class(tmp_path: Path, writing: Writing) -> None:
    said = sample(BoxPart(label=" ", xyxy=(1, 2, 3, 4)))
    with pytest.raises(UserError, match="the answer holds"):
        boxes_by_picture([Located(said, tmp_path)], writing, set())
