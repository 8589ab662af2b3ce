"""Samples go out as a foreign format and come back the same, pictures and boxes included."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from scenery import paint

from finesight import storage
from finesight.data.exporting import export
from finesight.data.formats import FORMATS
from finesight.data.importing import import_file
from finesight.data.jsonl import Located, read_samples, sample_from
from finesight.data.opening import Request
from finesight.data.sample import Sample
from finesight.digests import verify_folder
from finesight.errors import UserError

PICTURE = {"type": "image", "image": "in/a.png"}
SECOND = {"type": "image", "image": "in/b.png"}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def box(*xyxy: float, label: str | None = None, image: int = 0) -> dict[str, Any]:
    return {"type": "box", "image": image, "label": label, "xyxy": xyxy}


def turns(*contents: object, system: str | None = None) -> list[dict[str, Any]]:
    said = [{"role": ("user", "assistant")[n % 2], "content": c} for n, c in enumerate(contents)]
    return ([{"role": "system", "content": system}] if system else []) + said


def located(folder: Path, *conversations: list[dict[str, Any]], **more: Any) -> list[Located]:
    """Samples about a.png of 40 x 20 pixels and b.png of 1000 x 500, in `folder`/in."""
    paint(folder / "in" / "a.png", 40, 20)
    paint(folder / "in" / "b.png", 1000, 500, shade=1)
    return [
        Located(sample_from({"id": f"s{n}", "messages": messages, **more}, ""), folder)
        for n, messages in enumerate(conversations)
    ]


ONE_PICTURE = (
    turns([PICTURE, text("What is this?")], "A house."),
    turns([PICTURE, text("What is this?")], [box(2.5, 3, 30, 17, label="door")]),
    turns(
        [PICTURE, text("What is this?")],
        [text("Two: "), box(1, 2, 3, 4), box(4, 5.25, 6, 7), text(".\nReally.")],
    ),
)
ROUNDS = (
    turns(
        [PICTURE, text("What is this?")],
        [text("A house: "), box(1, 2, 30, 14, label="house")],
        "And its colour?",
        "Red.",
        system="Be brief.",
    ),
)
SEVERAL = (
    turns([text("Is "), PICTURE, text(" or "), SECOND, text(" larger?")], "The second."),
    turns([PICTURE, text("\nFirst.")], "Yes.", [text("And this?"), SECOND], "No."),
)
TEXT_ONLY = (turns("Hello", "Hi"),)
IN_EACH = (
    turns(
        [PICTURE, SECOND, text("?")],
        [box(900, 400, 1000, 500, image=1, label="x"), text(" and "), box(0, 0, 40, 20)],
        [text("Left of "), box(1, 2, 3, 4), text(" is?")],
        "Nothing.",
    ),
)
ON_THE_GRID = (
    turns(
        [PICTURE, text("Where?")], [box(4, 2, 20, 10, label="door"), box(8, 4, 12, 6, label="x")]
    ),
    turns(
        [PICTURE, text("?")],
        [box(4, 2, 20, 10)],
        [SECOND, text("?")],
        [box(1, 1, 999, 250, image=1)],
    ),
)

CASES = {
    "samples": (*ONE_PICTURE, *ROUNDS, *SEVERAL, *TEXT_ONLY, *IN_EACH),
    "ms-swift": (*ONE_PICTURE, *ROUNDS, *SEVERAL, *TEXT_ONLY, *IN_EACH),
    "llama-factory": (*ONE_PICTURE, *ROUNDS, *SEVERAL, *TEXT_ONLY),
    "openai": (*ONE_PICTURE, *ROUNDS, *SEVERAL, *TEXT_ONLY),
    "query": (*ONE_PICTURE, *ROUNDS, *SEVERAL, *TEXT_ONLY),
    "conversations": (*ONE_PICTURE, *ROUNDS, *SEVERAL, *TEXT_ONLY),
    "llava": (*ONE_PICTURE, *TEXT_ONLY),
    "picture-path": ONE_PICTURE,
    "table": ONE_PICTURE,
    "qwen-vl": (*SEVERAL, *TEXT_ONLY, *ON_THE_GRID),
}
WISHES = {
    "picture-path": Request(prompt="What is this?"),
    "table": Request(columns={n: n for n in ("image", "question", "answer", "box", "label")}),
}


def data_file(out: Path) -> Path:
    return next(path for path in out.iterdir() if path.stem == "data")


def by_content(samples: list[Sample], folder: Path) -> list[Sample]:
    """The samples with each picture's pixels in place of its path."""
    return [
        sample.with_files(lambda name: Image.open(folder / name).tobytes().hex())
        for sample in samples
    ]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("copy", [False, True])
def test_there_and_back(tmp_path: Path, name: str, copy: bool) -> None:
    samples = located(tmp_path, *CASES[name])
    done = export(samples, tmp_path / "deep" / "out", name, copy_pictures=copy)
    verify_folder(tmp_path / "deep" / "out")
    source = data_file(tmp_path / "deep" / "out")
    request = WISHES.get(name, Request())
    assert import_file(source, tmp_path / "back", request).format == name
    back = read_samples(tmp_path / "back" / "data.jsonl")
    expected = by_content([one.sample for one in samples], tmp_path)
    assert by_content(back, tmp_path / "back") == expected
    assert (done.format, done.samples, done.lost) == (name, len(samples), {})
    pictures = tmp_path / "deep" / "out" / "pictures"
    assert [path.name for path in sorted(pictures.glob("*"))] == (
        ["a.png", "b.png"][: done.pictures] if copy else []
    )


def test_every_format_of_rows_goes_there_and_back() -> None:
    assert {form.name for form in FORMATS if form.open is None} == set(CASES)
    assert all(form.write is not None for form in FORMATS)


def written(tmp_path: Path, name: str, *conversations: list[dict[str, Any]], **more: Any) -> Any:
    export(located(tmp_path, *conversations, **more), tmp_path / "out", name, copy_pictures=False)
    content = data_file(tmp_path / "out").read_text(encoding="utf-8")
    return json.loads(content if content.startswith("[") else content.splitlines()[0])


def test_ms_swift_has_boxes_as_real_pixels(tmp_path: Path) -> None:
    row = written(tmp_path, "ms-swift", *IN_EACH)
    assert row["messages"][1]["content"] == "<ref-object><bbox> and <bbox>"
    assert row["messages"][2]["content"] == "Left of <bbox> is?"
    assert row["images"] == ["../in/a.png", "../in/b.png"]
    assert row["objects"] == {
        "ref": ["x"],
        "bbox": [[900, 400, 1000, 500], [0, 0, 40, 20], [1, 2, 3, 4]],
        "image_id": [1, 0, 0],
    }


def test_llama_factory_describes_its_data(tmp_path: Path) -> None:
    row = written(tmp_path, "llama-factory", *ROUNDS)
    assert [turn["from"] for turn in row["conversations"]] == [
        *("system", "human", "gpt", "human", "gpt")
    ]
    assert row["conversations"][1]["value"] == "<image>What is this?"
    assert row["conversations"][2]["value"] == (
        'A house: {"bbox_2d": [1, 2, 30, 14], "label": "house"}'
    )
    info = json.loads((tmp_path / "out" / "dataset_info.json").read_text())
    assert info["finesight"]["file_name"] == "data.jsonl"
    assert info["finesight"]["columns"] == {"messages": "conversations", "images": "images"}


def test_llava_has_a_line_break_after_the_picture(tmp_path: Path) -> None:
    (row,) = written(tmp_path, "llava", ONE_PICTURE[0])
    assert row["conversations"][0] == {"from": "human", "value": "<image>\nWhat is this?"}
    assert row["image"] == "../in/a.png"


def test_qwen_vl_has_boxes_on_its_grid(tmp_path: Path) -> None:
    row = written(tmp_path, "qwen-vl", *ON_THE_GRID)
    assert row["conversations"][0]["value"] == "Picture 1: <img>../in/a.png</img>\nWhere?"
    assert row["conversations"][1]["value"] == (
        "<ref>door</ref><box>(100,100),(500,500)</box><ref>x</ref><box>(200,200),(300,300)</box>"
    )


def test_boxes_off_the_grid_are_counted(tmp_path: Path) -> None:
    samples = located(tmp_path, turns([PICTURE, text("?")], [box(0.01, 0, 40, 20)]))
    done = export(samples, tmp_path / "out", "qwen-vl", copy_pictures=False)
    assert done.lost == {"boxes with exact corners (moved to a grid of 1000)": 1}
    assert "(0,0),(999,999)" in (tmp_path / "out" / "data.jsonl").read_text()


def test_what_has_no_place_is_counted(tmp_path: Path) -> None:
    more = {"references": ["One.", "Two."], "meta": {"source": "book", "images": 3, "id": "x"}}
    samples = located(tmp_path, ONE_PICTURE[0], **more)
    done = export(samples, tmp_path / "out", "ms-swift", copy_pictures=False)
    assert done.lost == {"references": 2, "notes under a name that the format uses": 2}
    row = json.loads((tmp_path / "out" / "data.jsonl").read_text())
    assert (row["id"], row["source"]) == ("s0", "book")
    done = export(samples, tmp_path / "same", "samples", copy_pictures=False)
    assert done.lost == {}
    assert read_samples(tmp_path / "same" / "data.jsonl")[0].references == ("One.", "Two.")


@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("table", "--map answer=answer --map question=question --map box=box --map label=label"),
        ("picture-path", "--prompt 'What is this?'"),
        ("llama-factory", "LLaMA-Factory trains on these numbers as they are"),
        ("llava", "the boxes of 2 samples are JSON in the answers, in pixels of the original"),
        ("ms-swift", "ROOT_IMAGE_DIR"),
    ],
)
def test_the_user_is_told(tmp_path: Path, name: str, note: str) -> None:
    done = export(located(tmp_path, *ONE_PICTURE), tmp_path / "out", name, copy_pictures=False)
    assert note in " ".join(done.notes)


def test_boxes_in_turned_pictures_are_told(tmp_path: Path) -> None:
    samples = located(tmp_path, ONE_PICTURE[1])
    turned = Image.new("L", (20, 40))
    turned.getexif()[0x0112] = 6
    (tmp_path / "in" / "a.png").unlink()
    turned.save(tmp_path / "in" / "a.png", exif=turned.getexif())
    done = export(samples, tmp_path / "out", "ms-swift", copy_pictures=False)
    assert "1 pictures with boxes carry an EXIF turn" in done.notes[0]


VIDEO = {"type": "video", "frames": ["in/a.png", "in/b.png"]}
BOX = [PICTURE, text("?")], [box(1, 2, 3, 4)]


@pytest.mark.parametrize(
    ("name", "conversation", "what"),
    [
        ("ms-swift", turns([VIDEO, text("?")], "x"), "a video in a question"),
        ("ms-swift", turns("What is <image>?", "x"), "the mark '<image>'"),
        (
            "ms-swift",
            turns(BOX[0], [box(1, 2, 3, 4, label="x"), box(1, 2, 3, 4)]),
            "without a label",
        ),
        ("openai", turns([VIDEO, text("?")], "x"), "a video in a question"),
        ("openai", turns([PICTURE, box(1, 2, 3, 4)], "x"), "a box in a question"),
        ("llama-factory", IN_EACH[0], "boxes that cannot be told"),
        ("conversations", turns([PICTURE, text("?")], "bbox_2d it is"), "outside of JSON"),
        ("query", turns(BOX[0], [text("["), *BOX[1], text("]")]), "cannot be told"),
        ("llava", SEVERAL[0], "2 pictures"),
        ("llava", ROUNDS[0], "turns of system"),
        ("picture-path", SEVERAL[0], "a question of text, image"),
        ("picture-path", TEXT_ONLY[0], "a question of text"),
        ("table", ROUNDS[0], "turns of system"),
        ("table", SEVERAL[0], "a picture after text"),
        ("qwen-vl", IN_EACH[0], "a box in picture number"),
        ("qwen-vl", turns([PICTURE, text("a <ref>")], "x"), "the mark in"),
        ("qwen-vl", turns(BOX[0], [box(1, 2, 1.01, 4)]), "narrower than the grid"),
    ],
)
def test_what_cannot_be_held_is_named(
    tmp_path: Path, name: str, conversation: list[dict[str, Any]], what: str
) -> None:
    samples = located(tmp_path, turns([PICTURE, text("?")], "fine"), conversation)
    with pytest.raises(UserError, match=what) as caught:
        export(samples, tmp_path / "out", name, copy_pictures=False)
    assert "the sample 's1'" in caught.value.what
    assert caught.value.expected
    assert caught.value.remedy
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "conversations", "what"),
    [
        ("picture-path", [turns([PICTURE, text(q)], "x") for q in "ab"], "the question 'b'"),
        ("table", [turns([PICTURE, *t], "x") for t in ([], [text("?")])], "question in some"),
    ],
)
def test_samples_that_differ_in_what_is_common(
    tmp_path: Path, name: str, conversations: list[Any], what: str
) -> None:
    with pytest.raises(UserError, match=what):
        export(located(tmp_path, *conversations), tmp_path / "out", name, copy_pictures=False)


def test_a_table_without_questions(tmp_path: Path) -> None:
    done = export(
        located(tmp_path, turns([PICTURE], "x")), tmp_path / "o", "table", copy_pictures=False
    )
    assert done.notes[-1].endswith('--map image=image --map answer=answer --prompt ""')


def test_missing_picture(tmp_path: Path) -> None:
    samples = located(tmp_path, ONE_PICTURE[0])
    (tmp_path / "in" / "a.png").unlink()
    with pytest.raises(UserError, match="no such picture") as caught:
        export(samples, tmp_path / "out", "ms-swift", copy_pictures=False)
    assert "'s0'" in caught.value.where
    assert not (tmp_path / "out").exists()


def test_unknown_format(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown format 'swift'") as caught:
        export(located(tmp_path, ONE_PICTURE[0]), tmp_path / "out", "swift", copy_pictures=False)
    assert caught.value.where == "--to"
    assert caught.value.remedy == "did you mean ms-swift?"


def test_existing_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists already"):
        export(located(tmp_path, ONE_PICTURE[0]), tmp_path / "out", "llava", copy_pictures=False)
    assert list((tmp_path / "out").iterdir()) == []


class FullDisk(storage.Disk):
    def write(self, file: int, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, "no space")


def test_full_disk_leaves_nothing(tmp_path: Path) -> None:
    samples = located(tmp_path, ONE_PICTURE[0])
    before = sorted(tmp_path.iterdir())
    with storage.using(FullDisk()), pytest.raises(UserError, match="cannot be written"):
        export(samples, tmp_path / "out", "llava", copy_pictures=False)
    assert sorted(tmp_path.iterdir()) == before


def test_real_boxes_there_and_back(shared: Path, tmp_path: Path) -> None:
    source = shared / "data" / "grounding" / "grounding.jsonl"
    columns = {"image": "image", "question": "question", "box": "bbox_xyxy"}
    import_file(source, tmp_path / "one", Request(columns=columns))
    samples = read_samples(tmp_path / "one" / "data.jsonl")
    where = [Located(sample, tmp_path / "one") for sample in samples]
    for name in ("ms-swift", "llama-factory", "llava", "query", "conversations"):
        export(where, tmp_path / name, name, copy_pictures=False)
        summary = import_file(data_file(tmp_path / name), tmp_path / f"{name}-2", Request())
        assert (summary.format, summary.clipped_boxes) == (name, 0)
        assert read_samples(tmp_path / f"{name}-2" / "data.jsonl") == samples


@pytest.mark.parametrize("form", ["ms-swift", "llama-factory", "query", "conversations", "qwen-vl"])
def test_a_note_never_becomes_a_prompt(tmp_path: Path, form: str) -> None:
    samples = located(tmp_path, ONE_PICTURE[0], meta={"system": "x", "history": [["a", "b"]]})
    done = export(samples, tmp_path / "out", form, copy_pictures=True)
    assert done.lost == {"notes under a name that the format uses": 2}
    import_file(tmp_path / "out" / "data.jsonl", tmp_path / "back", Request(format=form))
    (back,) = read_samples(tmp_path / "back" / "data.jsonl")
    assert [message.role for message in back.messages] == ["user", "assistant"]


@pytest.mark.parametrize("form", ["coco", "folder"])
def test_white_space_that_is_not_read_back_is_told(tmp_path: Path, form: str) -> None:
    samples = located(tmp_path, turns([PICTURE, text("?")], "A house.\n"))
    done = export(samples, tmp_path / "out", form, copy_pictures=True)
    assert done.lost["white space around answers"] == 1


@pytest.mark.parametrize(
    ("form", "answer"), [("yolo", [box(1, 2, 3, 4, label="x")]), ("folder", "A")]
)
def test_two_pictures_never_share_a_text_file(tmp_path: Path, form: str, answer: object) -> None:
    shown = [{"type": "image", "image": name} for name in ("in/a.png", "in/a.jpg")]
    samples = located(tmp_path, *(turns([picture, text("?")], answer) for picture in shown))
    paint(tmp_path / "in" / "a.jpg", 40, 20)
    with pytest.raises(UserError, match=r"two pictures whose text file is pictures/a\.txt"):
        export(samples, tmp_path / "out", form, copy_pictures=True)
    assert not (tmp_path / "out").exists()
