"""Rows with video files: LLaVA, LLaMA-Factory, ms-swift, placeholders with a path, and samples."""

import json
from pathlib import Path
from typing import Any

import pytest
from box_fixtures import parse_record
from case_files import load_cases
from image_fixtures import make_sample, write_gray_image
from video_fixtures import write_video

from finesight.errors import UserError
from finesight.ingest.formats import detect_format, get_format
from finesight.ingest.formats.dataset_format import DatasetFormat
from finesight.ingest.formats.row_keys import UnsupportedKeyError
from finesight.ingest.import_source import ImportOptions, detect_columns
from finesight.ingest.importer import import_dataset
from finesight.samples.sample import ImagePart, TextPart, VideoPart, read_samples, validate_sample


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
    summary = import_dataset(source, tmp_path / "out", ImportOptions())
    assert summary.list_media() == ["1 video"]
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


CLIPS = load_cases("videos")["clips"]


def list_clip_rows(bounds: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows with the bounds of a clip in the part of the video, and in the row itself."""
    part = {"type": "video", "video": "v.mp4", **bounds}
    question = [part, {"type": "text", "text": "What?"}]
    answer = {"role": "assistant", "content": "x"}
    messages = [{"role": "user", "content": question}, answer]
    return [{"messages": messages}, chat("<video>What?", videos=["v.mp4"], **bounds)]


@pytest.mark.parametrize(("bounds", "cut"), CLIPS["refused"])
def test_clips_of_videos_are_refused(media: Path, bounds: dict[str, Any], cut: str) -> None:
    for row in list_clip_rows(bounds):
        form, _ = detect_format([row], "")
        with pytest.raises(UnsupportedKeyError, match=r"a clip of v\.mp4") as caught:
            parse(form, row, media)
        assert cut in str(caught.value.remedy)


@pytest.mark.parametrize("bounds", CLIPS["accepted"])
def test_bounds_of_the_complete_video_are_accepted(media: Path, bounds: dict[str, Any]) -> None:
    for row in list_clip_rows(bounds):
        form, _ = detect_format([row], "")
        assert parse(form, row, media) == ["v.mp4", "What?"]


def test_bounds_of_rows_without_videos_are_metadata(media: Path) -> None:
    row = {**chat("<image>What?", images=["a.png"]), "start": 0.5, "end": 1.0}
    form, _ = detect_format([row], "")
    assert parse(form, row, media) == ["a.png", "What?"]


@pytest.mark.parametrize(
    ("record", "columns", "expected"),
    [
        ({"f": "v.mp4"}, {"image": "f"}, ["v.mp4", "What?"]),
        ({"f": "v.mp4"}, {"video": "f"}, ["v.mp4", "What?"]),
        ({"f": {"path": "w.webm"}}, {"image": "f"}, ["w.webm", "What?"]),
        ({"f": ["v.mp4", "w.webm"]}, {"video": "f"}, ["v.mp4", "w.webm", "What?"]),
        ({"f": "v.mp4", "g": "a.png"}, {"image": "g", "video": "f"}, ["a.png", "v.mp4", "What?"]),
        ({"f": "v.mp4", "g": "a.png"}, {"image": "f,g"}, ["v.mp4", "a.png", "What?"]),
        ({"f": "v0"}, {"video": "f"}, ["1.png", "2.png", "10.png", "What?"]),
        ({"f": ["a.png", "v0/2.png"]}, {"video": "f"}, ["a.png", "2.png", "What?"]),
        ({"f": "v.mp4", "q": "<video>\nWhat?"}, {"video": "f"}, ["v.mp4", "What?"]),
        (
            {"f": "v.mp4", "g": "a.png", "q": "Is <image> in <video>?"},
            {"image": "g", "video": "f"},
            ["Is ", "a.png", " in ", "v.mp4", "?"],
        ),
    ],
)
def test_columns_of_videos(
    media: Path, record: dict[str, Any], columns: dict[str, str], expected: list[str]
) -> None:
    row = {"q": "What?", "a": "x", **record}
    roles = {**columns, "question": "q", "answer": "a"}
    example = parse_record(get_format("table"), row, media, columns=roles)
    found = []
    for part in example.prompt_messages[0].content:
        if isinstance(part, VideoPart):
            found += [Path(name).name for name in (part.frames or (str(part.video),))]
        else:
            found.append(part.text if isinstance(part, TextPart) else Path(part.image).name)
    assert found == expected


@pytest.mark.parametrize(
    ("record", "what"),
    [
        ({"f": "v.mp4", "q": "<video><video>Same?"}, "the placeholders of"),
        ({"f": "none.mp4"}, "no such video"),
        ({"f": None}, "a video given as 'None'"),
    ],
)
def test_invalid_columns_of_videos(media: Path, record: dict[str, Any], what: str) -> None:
    columns = {"video": "f", "question": "q", "answer": "a"}
    with pytest.raises(UserError, match=what):
        parse_record(get_format("table"), {"q": "?", "a": "x", **record}, media, columns=columns)


def test_table_of_videos_is_detected(media: Path, tmp_path: Path) -> None:
    source = media / "videos.csv"
    source.write_text("video,caption\nv.mp4,a ball\nw.webm,a dog\n")
    detected = detect_columns(source, ImportOptions(prompt="Describe."))
    assert detected.options.columns == {"video": "video", "answer": "caption"}
    import_dataset(detected.path, tmp_path / "out", detected.options)
    samples = list(read_samples(tmp_path / "out" / "data.jsonl"))
    assert [sample.messages[0].content[0].type for sample in samples] == ["video", "video"]
