"""Samples grouped by their images."""

from __future__ import annotations

from pathlib import Path

import pytest
from image_fixtures import write_gray_image

from finesight.data.formats.dataset_format import ExportContext
from finesight.data.formats.image_annotations import (
    group_by_image,
    round_coordinate,
)
from finesight.data.image_header import read_image_size
from finesight.data.sample import (
    BoxPart,
    ContentPart,
    ImagePart,
    LocatedSample,
    Message,
    Sample,
    TextPart,
)
from finesight.errors import UserError

DOG = BoxPart(label="dog", xyxy=(1, 2, 3, 4))
CAT = BoxPart(label="cat", xyxy=(5, 6, 7, 8))


@pytest.fixture
def write_context(tmp_path: Path) -> ExportContext:
    return ExportContext({write_gray_image(tmp_path / "a.png"): "a.png"}, read_image_size)


def sample(*answer: ContentPart, image: str = "a.png", more: tuple[Message, ...] = ()) -> Sample:
    requested = Message(role="user", content=(ImagePart(image=image), TextPart(text="?")))
    last = Message(role="assistant", content=answer)
    return Sample(id="s", messages=(*more, requested, last), references=("r",), meta={"note": 1})


def test_duplicate_boxes_of_samples_are_merged(
    tmp_path: Path, write_context: ExportContext
) -> None:
    output = [sample(DOG), sample(DOG, DOG, CAT), sample(TextPart(text="none")), sample(CAT, DOG)]
    system = Message(role="system", content=(TextPart(text="Be brief."),))
    output.append(sample(CAT, TextPart(text="\n"), more=(system,)))
    ((one,), _) = group_by_image([LocatedSample(s, tmp_path) for s in output], write_context, set())
    assert [box.label for box in one.boxes] == ["dog", "dog", "cat"]
    assert {what: count for what, count in write_context.lost_counts.items() if count} == {
        "questions, which an import regenerates from --prompt and --box-task": 5,
        "system prompts": 1,
        "references": 5,
        "the key note of meta": 5,
    }


def test_texts_of_samples_are_merged(tmp_path: Path, write_context: ExportContext) -> None:
    output = [sample(TextPart(text="b")), sample(TextPart(text="a")), sample(TextPart(text="b"))]
    ((one,), _) = group_by_image(
        [LocatedSample(s, tmp_path) for s in output], write_context, {"note"}
    )
    assert one.answers == ["b", "r", "a"]
    assert "the key note of meta" not in write_context.lost_counts


@pytest.mark.parametrize(
    ("bad", "what"),
    [
        (sample(TextPart(text="A dog.")), "the answer contains type='text'"),
        (sample(DOG, TextPart(text="none")), "the answer contains type='text'"),
        (sample(BoxPart(xyxy=(1, 2, 3, 4))), "the answer contains type='box'"),
        (sample(BoxPart(label=" ", xyxy=(1, 2, 3, 4))), "the answer contains type='box'"),
        (sample(DOG, more=sample(DOG).messages), "4 turns about 2 images"),
    ],
)
def test_unsupported_sample_is_rejected(
    tmp_path: Path, write_context: ExportContext, bad: Sample, what: str
) -> None:
    with pytest.raises(UserError, match=what) as caught:
        group_by_image([LocatedSample(bad, tmp_path)], write_context, set(), is_detection=True)
    assert "sample s" in caught.value.where
    assert caught.value.remedy


def test_boxes_are_rejected_for_text_formats(tmp_path: Path, write_context: ExportContext) -> None:
    with pytest.raises(UserError, match="a mix of answers with and without boxes"):
        group_by_image(
            [LocatedSample(sample(DOG), tmp_path)], write_context, set(), is_detection=False
        )


def test_coordinates_use_shortest_notation() -> None:
    assert [round_coordinate(n) for n in (3.0, 0.1 + 0.2, 2.5, -0.0)] == [3, 0.3, 2.5, 0]
    assert isinstance(round_coordinate(3.0), int)
