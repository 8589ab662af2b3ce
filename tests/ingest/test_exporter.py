"""Round trips of samples through foreign formats, with images and boxes."""

import json
from pathlib import Path
from typing import Any

import pytest
from case_files import load_cases
from image_fixtures import write_gray_image
from PIL import Image

from finesight.errors import UserError
from finesight.files.storage import verify_folder
from finesight.ingest.exporter import export_dataset
from finesight.ingest.formats import FORMATS
from finesight.ingest.import_source import ImportOptions
from finesight.ingest.importer import import_dataset
from finesight.samples.sample import LocatedSample, Sample, read_samples, sample_from_dict

IMAGE_PART = {"type": "image", "image": "in/a.png"}
SECOND = {"type": "image", "image": "in/b.png"}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def box(*xyxy: float, label: str | None = None, image: int = 0) -> dict[str, Any]:
    return {"type": "box", "image": image, "label": label, "xyxy": xyxy}


def turns(*contents: object, system: str | None = None) -> list[dict[str, Any]]:
    output = [{"role": ("user", "assistant")[n % 2], "content": c} for n, c in enumerate(contents)]
    return ([{"role": "system", "content": system}] if system else []) + output


def make_located_samples(
    folder: Path, *conversations: list[dict[str, Any]], **more: Any
) -> list[LocatedSample]:
    """Samples about a.png of 40 x 20 pixels and b.png of 1000 x 500, in `folder`/in."""
    write_gray_image(folder / "in" / "a.png", 40, 20)
    write_gray_image(folder / "in" / "b.png", 1000, 500, gray_level=1)
    return [
        LocatedSample(sample_from_dict({"id": f"s{n}", "messages": messages, **more}, ""), folder)
        for n, messages in enumerate(conversations)
    ]


TABLES = load_cases("exporter")
CONVERSATIONS = TABLES["conversations"]
ONE_IMAGE, ROUNDS, SEVERAL = (CONVERSATIONS[name] for name in ("one_image", "rounds", "several"))
IN_EACH = CONVERSATIONS["in_each"]
IN_ALL = CONVERSATIONS["text_only"]
(WITH_TOOLS,), (PARALLEL_CALLS,) = CONVERSATIONS["with_tools"], CONVERSATIONS["parallel_calls"]
ZOOM = {
    "type": "function",
    "function": {"name": "zoom", "parameters": {"type": "object", "properties": {"k": {}}}},
}

CASES = {
    "samples": (*ONE_IMAGE, *ROUNDS, *SEVERAL, *IN_ALL, *IN_EACH),
    "ms-swift": (*ONE_IMAGE, *ROUNDS, *SEVERAL, *IN_ALL, *IN_EACH),
    "llama-factory": (*ONE_IMAGE, *ROUNDS, *SEVERAL, *IN_ALL),
    "openai": (*ONE_IMAGE, *ROUNDS, *SEVERAL, *IN_ALL),
    "conversations": (*ONE_IMAGE, *ROUNDS, *SEVERAL, *IN_ALL),
    "llava": (*ONE_IMAGE, *IN_ALL),
    "table": ONE_IMAGE,
}
WISHES = {
    "table": ImportOptions(columns={n: n for n in ("image", "question", "answer", "box", "label")})
}


def data_file(out: Path) -> Path:
    return next(path for path in out.iterdir() if path.stem == "data")


def with_image_contents(samples: list[Sample], folder: Path) -> list[Sample]:
    """Return the samples with the pixels of each image instead of its path."""
    return [
        sample.map_paths(lambda name: Image.open(folder / name).tobytes().hex())
        for sample in samples
    ]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", ["in place", "copied", "structure"])
def test_roundtrip(tmp_path: Path, name: str, kind: str) -> None:
    """Next to structures, an import would keep JSON of boxes as JSON, too."""
    copy, structure = kind == "copied", CONVERSATIONS["structure"]
    samples = make_located_samples(tmp_path, *(structure if kind == "structure" else CASES[name]))
    done = export_dataset(samples, tmp_path / "deep" / "out", name, copy_images=copy)
    verify_folder(tmp_path / "deep" / "out")
    source = data_file(tmp_path / "deep" / "out")
    request = WISHES.get(name, ImportOptions())
    assert import_dataset(source, tmp_path / "back", request).format == name
    back = read_samples(tmp_path / "back" / "data.jsonl")
    expected = with_image_contents([one.sample for one in samples], tmp_path)
    assert with_image_contents(back, tmp_path / "back") == expected
    assert (done.format, done.num_samples, done.lost_counts) == (name, len(samples), {})
    images = tmp_path / "deep" / "out" / "images"
    assert [path.name for path in sorted(images.glob("*"))] == (
        ["a.png", "b.png"][: done.num_images] if copy else []
    )


@pytest.mark.parametrize(
    "name", ["samples", "ms-swift", "llama-factory", "openai", "conversations", "llava", "folder"]
)
def test_tools_and_loss_of_turns_are_kept_or_refused(tmp_path: Path, name: str) -> None:
    single, parallel = make_located_samples(tmp_path, WITH_TOOLS, PARALLEL_CALLS, tools=[ZOOM])
    samples = [single, parallel][: 1 + (name in ("samples", "ms-swift", "openai"))]
    if name in ("conversations", "llava", "folder"):
        with pytest.raises(UserError):
            export_dataset(samples, tmp_path / "out", name, copy_images=True)
        return
    done = export_dataset(samples, tmp_path / "out", name, copy_images=True)
    assert done.lost_counts == ({"loss of single turns": 1} if name == "llama-factory" else {})
    import_dataset(data_file(tmp_path / "out"), tmp_path / "back", ImportOptions(format=name))
    back = read_samples(tmp_path / "back" / "data.jsonl")
    expected = with_image_contents([one.sample for one in samples], tmp_path)
    found = with_image_contents(back, tmp_path / "back")
    if name == "llama-factory":
        messages = [one.model_copy(update={"loss": True}) for one in expected[0].messages]
        expected = [expected[0].model_copy(update={"messages": tuple(messages)})]
        with pytest.raises(UserError, match="several tool results"):
            export_dataset([parallel], tmp_path / "two", name, copy_images=True)
    assert found == expected


PAIR_FORMATS = ("samples", "ms-swift", "llama-factory", "openai", "llava")


@pytest.mark.parametrize("verdict", [{"rejected": "A barn."}, {"label": False}])
@pytest.mark.parametrize("name", [*PAIR_FORMATS, "conversations", "table", "folder"])
def test_preferences_are_kept_or_counted(tmp_path, name, verdict):
    samples = make_located_samples(tmp_path, ONE_IMAGE[0], **verdict)
    done = export_dataset(samples, tmp_path / "out", name, copy_images=True)
    is_kept = name in (*PAIR_FORMATS, "conversations")
    lost = "rejected answers" if "rejected" in verdict else "labels of answers"
    assert done.lost_counts.get(lost, 0) == (not is_kept)
    if is_kept:
        imported = import_dataset(data_file(tmp_path / "out"), tmp_path / "back", ImportOptions())
        back = read_samples(tmp_path / "back" / "data.jsonl")
        sample = samples[0].sample
        assert (back[0].rejected, back[0].label) == (sample.rejected, sample.label)
        assert imported.format == name


def test_every_row_format_has_a_roundtrip_case() -> None:
    import_only = {form.name for form in FORMATS.list_built_in() if form.write_files is None}
    others = {"imagefolder", "classes", "voc", "labelme", "fiftyone"}
    assert import_only == {*others, "image-path", "qwen-vl", "query-response"}
    row_formats = {form.name for form in FORMATS.list_built_in() if form.open_dataset is None}
    assert row_formats - import_only == set(CASES)


WRITTEN = {
    "ms-swift": IN_EACH,
    "llama-factory": ROUNDS,
    "llava": ONE_IMAGE,
}


@pytest.mark.parametrize("name", WRITTEN)
def test_rows_are_written_as_the_programs_read_them(tmp_path: Path, name: str) -> None:
    samples = make_located_samples(tmp_path, *WRITTEN[name])
    export_dataset(samples, tmp_path / "out", name, copy_images=False)
    content = data_file(tmp_path / "out").read_text(encoding="utf-8")
    row = json.loads(content)[0] if content[0] == "[" else json.loads(content.splitlines()[0])
    for path, value in TABLES["written"][name].items():
        found: Any = row
        for key in path.split("."):
            found = found[int(key)] if key.isdigit() else found[key]
        assert found == value
    if name == "llama-factory":
        info = json.loads((tmp_path / "out" / "dataset_info.json").read_text())["finesight"]
        assert info["file_name"] == "data.jsonl"
        assert info["columns"] == {"messages": "conversations", "images": "images"}


def test_rejected_boxes_of_shared_objects_are_counted(tmp_path):
    samples = make_located_samples(tmp_path, ONE_IMAGE[1], rejected=[box(1, 2, 3, 4)])
    done = export_dataset(samples, tmp_path / "out", "ms-swift", copy_images=False)
    assert done.lost_counts == {"rejected answers": 1}


def test_unsupported_fields_are_counted(tmp_path: Path) -> None:
    more = {"references": ["One.", "Two."], "meta": {"source": "book", "images": 3, "id": "x"}}
    samples = make_located_samples(tmp_path, ONE_IMAGE[0], **more)
    done = export_dataset(samples, tmp_path / "out", "ms-swift", copy_images=False)
    assert done.lost_counts == {"references": 2, "metadata with a key that the format uses": 2}
    row = json.loads((tmp_path / "out" / "data.jsonl").read_text())
    assert (row["id"], row["source"]) == ("s0", "book")
    done = export_dataset(samples, tmp_path / "same", "samples", copy_images=False)
    assert done.lost_counts == {}
    assert read_samples(tmp_path / "same" / "data.jsonl")[0].references == ("One.", "Two.")


def test_exif_rotated_images_with_boxes_are_reported(tmp_path: Path) -> None:
    samples = make_located_samples(tmp_path, ONE_IMAGE[1])
    turned = Image.new("L", (20, 40))
    turned.getexif()[0x0112] = 6
    (tmp_path / "in" / "a.png").unlink()
    turned.save(tmp_path / "in" / "a.png", exif=turned.getexif())
    done = export_dataset(samples, tmp_path / "out", "ms-swift", copy_images=False)
    assert "1 images with boxes have an EXIF orientation" in done.notes[0]


VIDEO = {"type": "video", "frames": ["in/a.png", "in/b.png"]}
BOX = [IMAGE_PART, text("?")], [box(1, 2, 3, 4)]


@pytest.mark.parametrize(
    ("name", "conversation", "what"),
    [
        ("ms-swift", turns([VIDEO, text("?")], "x"), "a video in a question"),
        ("ms-swift", turns("What is <image>?", "x"), "the placeholder '<image>'"),
        (
            "ms-swift",
            turns(BOX[0], [box(1, 2, 3, 4, label="x"), box(1, 2, 3, 4)]),
            "without a label",
        ),
        ("openai", turns([VIDEO, text("?")], "x"), "a video in a question"),
        ("openai", turns([IMAGE_PART, box(1, 2, 3, 4)], "x"), "a box in a question"),
        ("llama-factory", IN_EACH[0], "boxes that are ambiguous"),
        ("conversations", turns([IMAGE_PART, text("?")], "bbox_2d it is"), "outside of JSON"),
        ("openai", turns(BOX[0], [text("["), *BOX[1], text("]")]), "are ambiguous"),
        ("llava", SEVERAL[0], "2 images"),
        ("llava", ROUNDS[0], "turns of system"),
        ("table", ROUNDS[0], "turns of system"),
        ("table", SEVERAL[0], "an image after text"),
    ],
)
def test_unsupported_content_error_has_reason(tmp_path, name, conversation, what):
    samples = make_located_samples(tmp_path, turns([IMAGE_PART, text("?")], "fine"), conversation)
    with pytest.raises(UserError, match=what) as caught:
        export_dataset(samples, tmp_path / "out", name, copy_images=False)
    assert "the sample 's1'" in caught.value.what
    assert caught.value.expected
    assert caught.value.remedy
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "conversation", "what"),
    [
        ("yolo", turns([IMAGE_PART], "A dog."), "the answer contains type='text'"),
        (
            "yolo",
            turns([IMAGE_PART], [box(1, 2, 3, 4, label="x"), text("no")]),
            "the answer contains type='text'",
        ),
        ("yolo", turns([IMAGE_PART], BOX[1]), "the answer contains type='box'"),
        ("yolo", turns([IMAGE_PART], [box(1, 2, 3, 4, label=" ")]), "contains type='box'"),
        ("yolo", SEVERAL[1], "4 turns about 2 images"),
        ("coco", turns([IMAGE_PART], [text("A dog:"), *BOX[1]]), "contains type='text'"),
        ("folder", turns([IMAGE_PART], BOX[1]), "a mix of answers with and without boxes"),
    ],
)
def test_answers_that_are_no_annotations_are_rejected(tmp_path, name, conversation, what):
    samples = make_located_samples(tmp_path, conversation)
    with pytest.raises(UserError, match=what) as caught:
        export_dataset(samples, tmp_path / "out", name, copy_images=True)
    assert "sample s0" in caught.value.where
    assert caught.value.remedy


def test_table_with_and_without_questions_is_rejected(tmp_path: Path) -> None:
    conversations = [turns([IMAGE_PART, *t], "x") for t in ([], [text("?")])]
    samples = make_located_samples(tmp_path, *conversations)
    with pytest.raises(UserError, match="mix of samples with and without questions"):
        export_dataset(samples, tmp_path / "out", "table", copy_images=False)


def test_missing_image(tmp_path: Path) -> None:
    samples = make_located_samples(tmp_path, ONE_IMAGE[0])
    (tmp_path / "in" / "a.png").unlink()
    with pytest.raises(UserError, match="no such image") as caught:
        export_dataset(samples, tmp_path / "out", "ms-swift", copy_images=False)
    assert "'s0'" in caught.value.where
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["ms-swift", "llama-factory", "conversations"])
def test_metadata_never_becomes_a_prompt(tmp_path: Path, form: str) -> None:
    samples = make_located_samples(
        tmp_path, ONE_IMAGE[0], meta={"system": "x", "history": [["a", "b"]]}
    )
    done = export_dataset(samples, tmp_path / "out", form, copy_images=True)
    assert done.lost_counts == {"metadata with a key that the format uses": 2}
    import_dataset(tmp_path / "out" / "data.jsonl", tmp_path / "back", ImportOptions(format=form))
    (back,) = read_samples(tmp_path / "back" / "data.jsonl")
    assert [message.role for message in back.messages] == ["user", "assistant"]


def test_samples_of_an_image_are_merged(tmp_path: Path) -> None:
    dog, cat = box(1, 2, 3, 4, label="dog"), box(5, 6, 7, 8, label="cat")
    answers = ([dog], [dog, dog, cat], "none", [cat, dog], [cat, text("\n")])
    conversations = [turns([IMAGE_PART, text("?")], answer) for answer in answers]
    conversations[-1] = turns([IMAGE_PART, text("?")], answers[-1], system="Be brief.")
    more = {"references": ["r"], "meta": {"note": 1}}
    samples = make_located_samples(tmp_path, *conversations, **more)
    done = export_dataset(samples, tmp_path / "boxes", "coco", copy_images=True)
    document = json.loads((tmp_path / "boxes" / "annotations.json").read_text())
    names = {one["id"]: one["name"] for one in document["categories"]}
    labels = [names[one["category_id"]] for one in document["annotations"]]
    assert sorted(labels) == ["cat", "dog", "dog"]
    lost = {"system prompts": 1, "references": 5, "the key note of meta": 5}
    assert done.lost_counts.items() >= lost.items()
    conversations = [turns([IMAGE_PART, text("?")], answer) for answer in ("b", "a", "b")]
    samples = make_located_samples(tmp_path, *conversations, references=["r"])
    export_dataset(samples, tmp_path / "texts", "coco", copy_images=True)
    document = json.loads((tmp_path / "texts" / "annotations.json").read_text())
    assert [one["caption"] for one in document["annotations"]] == ["b", "r", "a"]


@pytest.mark.parametrize("form", ["coco", "folder"])
def test_stripped_whitespace_is_counted(tmp_path: Path, form: str) -> None:
    samples = make_located_samples(tmp_path, turns([IMAGE_PART, text("?")], "A house.\n"))
    done = export_dataset(samples, tmp_path / "out", form, copy_images=True)
    assert done.lost_counts["white space around answers"] == 1


@pytest.mark.parametrize(
    ("form", "answer"), [("yolo", [box(1, 2, 3, 4, label="x")]), ("folder", "A")]
)
def test_image_text_file_name_collision_is_rejected(tmp_path, form, answer):
    shown = [{"type": "image", "image": name} for name in ("in/a.png", "in/a.jpg")]
    samples = make_located_samples(
        tmp_path, *(turns([image, text("?")], answer) for image in shown)
    )
    write_gray_image(tmp_path / "in" / "a.jpg", 40, 20)
    with pytest.raises(UserError, match=r"two images with the text file images/a\.txt"):
        export_dataset(samples, tmp_path / "out", form, copy_images=True)
    assert not (tmp_path / "out").exists()
