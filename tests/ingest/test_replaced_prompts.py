"""`import --replace-prompts`: one text for all questions, images in their place."""

import json
from pathlib import Path
from typing import Any

import pytest
from image_fixtures import write_jsonl
from PIL import Image

from finesight.errors import UserError
from finesight.ingest.data_operations import import_data
from finesight.samples.sample import ImagePart, Sample, TextPart, VideoPart, read_samples

TEXT = "Describe it in one sentence."


def image(name: str = "a.png") -> dict[str, str]:
    return {"type": "image", "image": name}


def text(content: str) -> dict[str, str]:
    return {"type": "text", "text": content}


def chat(content: Any, answer: str = "red", **others: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return {"messages": turns, **others}


ROWS: dict[str, tuple[dict[str, Any], str]] = {
    # A row, and the parts of its question: T is the text, I an image, V a video.
    "samples": ({"id": "s", **chat([image(), text("What?")])}, "IT"),
    "text before": ({"id": "s", **chat([text("What?"), image()])}, "TI"),
    "no text": ({"id": "s", **chat([image()])}, "IT"),
    "several texts": (
        {
            "id": "s",
            **chat(
                [
                    text("Picture 1:"),
                    image(),
                    text("Picture 2:"),
                    image("b.png"),
                    text("Compare."),
                ]
            ),
        },
        "IIT",
    ),
    "blank text last": (
        {
            "id": "s",
            **chat([text("What?"), image(), text("\n")]),
        },
        "TI",
    ),
    "text only": (chat("What?"), "T"),
    "openai": (
        chat([{"type": "image_url", "image_url": {"url": "a.png"}}, text("A?")]),
        "IT",
    ),
    "ms-swift": (chat("<image>What?", images=["a.png"]), "IT"),
    "placeholder last": (chat("What is in <image>", images=["a.png"]), "TI"),
    "llava": (
        {
            "image": "a.png",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat?"},
                {"from": "gpt", "value": "red"},
            ],
        },
        "IT",
    ),
    "llama-factory": (
        {"instruction": "<image>What?", "input": "Now.", "output": "red", "images": ["a.png"]},
        "IT",
    ),
    "query-response": ({"query": "<image>What?", "response": "red", "images": ["a.png"]}, "IT"),
    "image-path": (
        {
            "conversations": [
                {"role": "user", "value": "a.png"},
                {"role": "assistant", "value": "red"},
            ]
        },
        "IT",
    ),
    "preference": (chat("<image>What?", images=["a.png"], rejected_response="blue"), "IT"),
    "label": (chat("<image>What?", images=["a.png"], label=False), "IT"),
    "frames": (
        {
            "id": "s",
            **chat([{"type": "video", "video": ["a.png", "b.png"]}, text("?")]),
        },
        "VT",
    ),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, color in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (30, 20), color).save(tmp_path / name)
    return tmp_path


def import_rows(folder: Path, *rows: dict[str, Any], **options: Any) -> tuple[list[Sample], str]:
    write_jsonl(folder / "rows.jsonl", [*rows])
    outcome = import_data(folder / "rows.jsonl", folder / "out", **options)
    return [*read_samples(folder / "out" / "data.jsonl")], "\n".join(outcome.lines)


def describe(sample: Sample) -> str:
    """The question of a sample by the kinds of its parts."""
    (question,) = (one for one in sample.messages if one.role == "user")
    kinds = {ImagePart: "I", TextPart: "T", VideoPart: "V"}
    texts = [part.text for part in question.content if isinstance(part, TextPart)]
    assert set(texts) <= {TEXT}
    return "".join(kinds[type(part)] for part in question.content)


@pytest.mark.parametrize("name", ROWS)
def test_text_replaces_the_question(name: str, folder: Path) -> None:
    row, expected = ROWS[name]
    samples, printed = import_rows(folder, row, replace_prompts=TEXT)
    assert [describe(sample) for sample in samples] == [expected]
    assert "1 prompts replaced" in printed
    assert samples[0].messages[-1].role == "assistant"
    assert bool(samples[0].rejected) is (name == "preference")
    assert samples[0].label is (False if name == "label" else None)


def test_system_prompt_stays_and_equal_prompts_are_not_counted(folder: Path) -> None:
    rows = [chat(question) for question in ("What?", TEXT, "Which?")]
    rows[0]["messages"].insert(0, {"role": "system", "content": "Speak in rhymes."})
    samples, printed = import_rows(folder, *rows, replace_prompts=TEXT)
    assert samples[0].messages[0].content[0].text == "Speak in rhymes."
    assert [describe(sample) for sample in samples] == ["T", "T", "T"]
    assert "2 prompts replaced" in printed


def test_no_replaced_prompt_is_reported(folder: Path) -> None:
    _, printed = import_rows(folder, chat(TEXT), replace_prompts=TEXT)
    assert "0 prompts replaced" in printed


def test_table_and_boxes(folder: Path) -> None:
    (folder / "t.csv").write_text("image,question,answer\na.png,What?,red\nb.png,Which?,blue\n")
    columns = {"image": "image", "question": "question", "answer": "answer"}
    import_data(folder / "t.csv", folder / "out", columns=columns, replace_prompts=TEXT)
    assert [describe(one) for one in read_samples(folder / "out" / "data.jsonl")] == ["IT", "IT"]
    box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 10, 8]}
    image_entry = {"id": 1, "file_name": "a.png", "width": 30, "height": 20}
    coco = {"images": [image_entry], "annotations": [box], "categories": [{"id": 1, "name": "cat"}]}
    (folder / "coco.json").write_text(json.dumps(coco))
    import_data(folder / "coco.json", folder / "boxes", replace_prompts=TEXT)
    assert [describe(one) for one in read_samples(folder / "boxes" / "data.jsonl")] == ["IT"]


def test_empty_text_leaves_the_image(folder: Path) -> None:
    samples, _ = import_rows(folder, ROWS["ms-swift"][0], replace_prompts="")
    assert describe(samples[0]) == "I"


def test_empty_text_needs_an_image(folder: Path) -> None:
    with pytest.raises(UserError, match="give --replace-prompts a text"):
        import_rows(folder, chat("What?"), replace_prompts="")


def build_turns(*texts: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]}


def test_conversations_and_boxes_in_questions_are_invalid_rows(folder: Path) -> None:
    several = build_turns("What?", "red", "Why?", "because")
    box = {"type": "box", "xyxy": [1, 2, 10, 8], "label": "cat"}
    boxed = {"id": "s", **chat([image(), text("What is in"), box])}
    for row, message in ((several, "a conversation of 4 turns"), (boxed, "a question with a box")):
        with pytest.raises(UserError, match=message) as caught:
            import_rows(folder, row, chat("What?"), replace_prompts=TEXT)
        assert "without --replace-prompts" in str(caught.value.remedy)
        assert not (folder / "out").exists()
    samples, printed = import_rows(
        folder, several, chat("What?"), replace_prompts=TEXT, on_invalid_row="skip"
    )
    assert [describe(sample) for sample in samples] == ["T"]
    assert "skipped: 1 row" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "And why?"}, "--prompt is given, too"),
        ({"box_task": "grounding"}, "names the object"),
        ({"replace_prompts": "Find {labels}."}, "placeholder of class names"),
        ({"replace_prompts": "<image>What?"}, "the placeholder '<image>'"),
    ],
)
def test_unsuitable_options_are_rejected(options, message, folder: Path) -> None:
    with pytest.raises(UserError, match=message):
        import_rows(folder, chat("What?"), **{"replace_prompts": TEXT, **options})
    assert not (folder / "out").exists()
