"""What a sample shows by itself, through the whole check."""

import os
from pathlib import Path

import pytest
from case_files import load_cases
from check_fixtures import count_codes, issues_by_line, make_record, run_check, write_records
from image_fixtures import write_gray_image, write_jsonl
from PIL import Image
from video_fixtures import write_audio, write_video

CASES = load_cases("sample_issues")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(4):
        write_gray_image(tmp_path / f"{number}.png", 100, 60, gray_level=number)
    write_gray_image(tmp_path / "a.png", 100, 60)
    return tmp_path


def check_records(folder: Path, *records):
    return run_check(write_records(folder / "data.jsonl", records))


def test_invalid_image_kinds_are_distinguished(folder):
    full = (folder / "0.png").read_bytes()
    (folder / "cut.png").write_bytes(full[:-30])
    (folder / "no.png").write_text("not an image")
    (folder / "empty.png").write_bytes(b"")
    Image.new("1", (9000, 8000)).save(folder / "large.png")
    Image.new("1", (1000, 4)).save(folder / "thin.png")
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")  # a reader would wait forever
    names = ("gone.png", "cut.png", "no.png", "empty.png", "large.png", "thin.png")
    names += ("folder.png", "pipe.png")
    result = check_records(folder, *(make_record(name, f"What is {name}?") for name in names))
    locations = {code: sorted(issues_by_line(result, code)) for code in result.issue_counts}
    assert locations == {
        "image-missing": [1],
        "image-truncated": [2],
        "image-corrupt": [3, 4, 7, 8],
        "image-too-large": [5, 6],
    }
    finding = issues_by_line(result, "image-missing")[1]
    assert finding.images[0].path == folder / "gone.png"
    assert finding.sample_id == "s1"


def test_image_paths_resolve_as_in_training(folder, monkeypatch):
    # A path of a sample starts at its file's folder and nowhere else, and is taken as it is.
    write_gray_image(folder / "here" / "4.png", 100, 60)
    monkeypatch.chdir(folder / "here")
    result = check_records(folder, make_record("4.png"), make_record("here\\4.png", "Why?"))
    assert count_codes(result) == {"image-missing": 2}
    assert issues_by_line(result, "image-missing")[1].what == str(folder / "4.png")


def test_video_frame_issues(folder):
    write_gray_image(folder / "other.png", 50, 60)
    frames = [["0.png", "1.png"], ["0.png", "other.png"], ["0.png", "gone.png"]]
    videos = [{"type": "video", "frames": names} for names in frames]
    records = [make_record(None, f"Video {n}?") for n in range(3)]
    for record, video in zip(records, videos, strict=True):
        record["messages"][0]["content"].insert(0, video)
    result = check_records(folder, *records)
    assert count_codes(result) == {"video-frame-sizes-differ": 1, "image-missing": 1}
    assert list(issues_by_line(result, "video-frame-sizes-differ")) == [2]


def make_video_record(name):
    record = make_record(None, f"Video {name}?")
    record["messages"][0]["content"].insert(0, {"type": "video", "video": name})
    return record


def test_video_file_issues(folder):
    write_video(folder / "v.mp4")
    (folder / "cut.mp4").write_bytes((folder / "v.mp4").read_bytes()[:500])
    (folder / "copy.mp4").write_bytes((folder / "v.mp4").read_bytes())
    write_audio(folder / "sound.mp4")
    names = ("v.mp4", "cut.mp4", "sound.mp4", "gone.mp4")
    records = [*map(make_video_record, names), make_record("v.mp4", "An image?")]
    result = check_records(folder, *records)
    assert count_codes(result) == {"image-missing": 1, "image-corrupt": 2, "invalid-row": 1}
    issue = issues_by_line(result, "image-corrupt")[2]
    assert issue.remedy == "download or encode the video again, or remove it from the data"
    assert list(issues_by_line(result, "invalid-row")) == [5]
    assert (result.num_images, result.num_video_files, result.num_unique_images) == (0, 4, 4)
    sides = [
        write_records(folder / f"{name}.jsonl", [make_video_record(name)])
        for name in ("v.mp4", "copy.mp4")
    ]
    assert count_codes(run_check(*sides)) == {"leaked-image": 1}


@pytest.mark.parametrize(("question", "answer", "code"), CASES["test_reasoning_tags"])
def test_reasoning_tags(folder, question, answer, code):
    split, whole = make_record("0.png", question), make_record("1.png", question, answer)
    split["messages"][1]["content"] = [{"type": "text", "text": letter} for letter in answer]
    turns = {"role": "user", "content": "Ready?"}, {"role": "assistant", "content": "Yes"}
    whole["messages"] = [*turns, *whole["messages"], *turns]
    assert count_codes(check_records(folder, split, whole)) == ({code: 2} if code else {})


@pytest.mark.parametrize(("given", "code"), CASES["test_issue_of_a_sample"])
def test_issue_of_a_sample(folder, given, code):
    record = make_record(*given) if isinstance(given, list) else given
    assert count_codes(check_records(folder, record)) == ({code: 1} if code else {})


TEXTS = CASES["texts"] | {"": CASES["test_allowed_text"]}


@pytest.mark.parametrize(
    ("code", "text"), [(c, text) for c, texts in TEXTS.items() for text in texts]
)
def test_texts_are_allowed_or_an_issue(folder, code, text):
    found = count_codes(check_records(folder, make_record("0.png", text)))
    assert found == ({code: 1} if code else {})


BOXES = CASES["boxes"]


@pytest.mark.parametrize(("code", "box"), [(c, box) for c, boxes in BOXES.items() for box in boxes])
def test_invalid_box(folder, code, box):
    result = check_records(folder, make_record("0.png", "Where?", None, box, [1, 2, 50, 40]))
    assert count_codes(result) == {code: 1}
    shown = result.issues[0].images[0]
    assert (shown.path, shown.image_index) == (folder / "0.png", 0)
    assert shown.boxes == (tuple(map(float, box)),)


@pytest.mark.parametrize(
    ("xy", "code"), [((1, 2), None), ((-9, 2), "box-outside"), ((-0.5, 2), "box-at-edge")]
)
def test_points(folder, xy, code):
    record = make_record("0.png", "Where?")
    record["messages"][1]["content"] = [{"type": "point", "xy": list(xy)}]
    assert count_codes(check_records(folder, record)) == ({code: 1} if code else {})


@pytest.mark.parametrize(("box", "certain"), CASES["test_when_reversed_corners_can_be_fixed"])
def test_when_reversed_corners_can_be_fixed(folder, box, certain):
    result = check_records(folder, make_record("0.png", "Where?", None, box))
    assert issues_by_line(result, "box-inverted")[1].fix == ("reordered" if certain else None)


@pytest.mark.parametrize(
    ("text", "certain"),
    [("<image>\nWhat?", True), ("What?<image>", True), ("What does <image> mean in SVG?", False)],
)
def test_when_typed_placeholder_can_be_fixed(folder, text, certain):
    issues = issues_by_line(
        check_records(folder, make_record("0.png", text)), "placeholder-in-text"
    )
    assert issues[1].fix == ("placeholders removed" if certain else None)


@pytest.mark.parametrize(
    ("rejected", "codes"), CASES["test_issues_of_a_rejected_answer_are_reported_once"]
)
def test_issues_of_a_rejected_answer_are_reported_once(folder, rejected, codes):
    pair = {**make_record("0.png", "What?", "A cat."), "rejected": rejected}
    others = [{**pair, "id": f"p{n}", "rejected": f"Number {n}."} for n in range(2)]
    assert count_codes(check_records(folder, pair, *others)) == codes


def test_answers_with_different_labels_do_not_contradict(folder):
    answers = ("A cat.", True), ("A dog.", False), ("A cow.", False)
    records = [
        {**make_record("0.png", "What?", answer), "id": f"s{n}", "label": label}
        for n, (answer, label) in enumerate(answers)
    ]
    assert count_codes(check_records(folder, *records)) == {}
    both = {**records[0], "rejected": "A dog."}
    assert count_codes(check_records(folder, both)) == {"invalid-row": 1}


def test_box_without_image(folder):
    record = make_record("0.png", "Where?", None, [1, 2, 50, 40])
    record["messages"][1]["content"][0]["image"] = 1
    assert count_codes(check_records(folder, record)) == {"box-without-image": 1}


def test_issues_of_table_rows(folder):
    options = {"format": "table", "prompt": "What?"}
    for answer in ("", "  ", None):
        source = write_jsonl(folder / "rows.jsonl", [{"image": "a.png", "text": answer}])
        found = run_check(source, columns={"image": "image", "answer": "text"}, **options)
        assert count_codes(found) == {"empty-answer": 1}
    # Rows with the same image and question would be one sample.
    boxes = {"a.png": [50, 10, 60, 20], "./a.png": [90, 10, 200, 20]}
    rows = [{"image": name, "box": box} for name, box in boxes.items()]
    source = write_jsonl(folder / "rows.jsonl", rows)
    found = run_check(source, columns={"image": "image", "box": "box"}, **options)
    assert count_codes(found) == {"box-outside": 1}
    assert found.issues[0].where == f"{source}:2"
    assert found.issues[0].images[0].boxes == ((90, 10, 200, 20),)
