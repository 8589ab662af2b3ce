"""Rows with video files: LLaVA, LLaMA-Factory, ms-swift, placeholders with a path, and samples."""

import json
from pathlib import Path
from typing import Any

import pytest
from box_fixtures import parse_record
from case_files import load_cases
from image_fixtures import make_sample, write_gray_image
from video_fixtures import write_video

from finesight.data.formats import detect_format
from finesight.data.formats.dataset_format import DatasetFormat
from finesight.data.import_source import ImportOptions
from finesight.data.importer import import_dataset
from finesight.data.sample import ImagePart, TextPart, VideoPart, read_samples, validate_sample
from finesight.errors import UserError


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    for name in ("a", "v0/1", "v0/2", "v0/10"):
        write_gray_image(folder / f"{name}.png", 40, 20)
    (folder / "v0" / "notes.txt").touch()
    write_video(folder / "v.mp4")
    write_video(folder / "w.webm", codec="libvpx-vp9")
    return folder


def chat(question: str, **more: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "x"}]
    return {"conversations": turns, **more}


ROWS = load_cases("videos")["rows"]


def parse(form: DatasetFormat, row: dict[str, Any], folder: Path) -> list[str]:
    """Texts and file names of the question; the kind of each file fits its suffix."""
    found = []
    for part in parse_record(form, row, folder).prompt_messages[0].content:
        if isinstance(part, TextPart):
            found.append(part.text)
        elif isinstance(part, ImagePart):
            found.append(Path(part.image).name)
            assert part.image.endswith(".png")
        else:
            assert isinstance(part, VideoPart)
            found += [Path(frame).name for frame in part.frames]
            if part.video is None:
                continue
            assert Path(part.video).parent == folder.resolve()
            found.append(Path(part.video).name)
    return found


@pytest.mark.parametrize("name", ROWS)
def test_video_files_become_video_parts(media: Path, name: str) -> None:
    format_name, row, expected = ROWS[name]
    form, _ = detect_format([row], "here")
    assert form.name == format_name
    assert parse(form, row, media) == (expected or ["a.png", "v.mp4", "Which?"])
    text = chat("<image>\nExplain the tag <video>.", image="a.png")
    assert parse(detect_format([text], "here")[0], text, media)[1] == "Explain the tag <video>."


def test_imported_samples_refer_to_the_video(media: Path, tmp_path: Path) -> None:
    source = media / "rows.jsonl"
    source.write_text(json.dumps({"id": "1", **chat("<video>\nWhat?", video="v.mp4")}) + "\n")
    import_dataset(source, tmp_path / "out", ImportOptions())
    (sample,) = read_samples(tmp_path / "out" / "data.jsonl")
    part = sample.messages[0].content[0]
    assert isinstance(part, VideoPart)
    assert part.video is not None
    assert (tmp_path / "out" / part.video).resolve() == (media / "v.mp4").resolve()
    again = import_dataset(
        tmp_path / "out" / "data.jsonl", tmp_path / "copy", ImportOptions(copy_images=True)
    )
    assert again.format == "samples"
    (copied,) = read_samples(tmp_path / "copy" / "data.jsonl")
    assert copied.messages[0].content[0] == VideoPart(video="images/v.mp4")
    assert (tmp_path / "copy" / "images" / "v.mp4").read_bytes() == (media / "v.mp4").read_bytes()


def test_video_in_an_image_part_is_rejected() -> None:
    sample = make_sample("s", Path(), ImagePart(image="v.MP4"), "?", answer="x").sample
    with pytest.raises(UserError, match=r"the video file v\.MP4 in an image part") as caught:
        validate_sample(sample, "here")
    assert '"type": "video"' in caught.value.remedy
