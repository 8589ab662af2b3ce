"""Tests of the journal and of the file of labels."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from label_fixtures import CORNERS, MODEL, draw_images, make_suggestion, open_fields_session

from finesight.config import DataFileSettings
from finesight.data.corpus import load_corpus
from finesight.data.sample import (
    BoxPart,
    ImagePart,
    Message,
    Sample,
    TextPart,
    read_samples,
    write_samples,
)
from finesight.errors import UserError
from finesight.evaluate.eval_case import get_reference_answer
from finesight.label.label_session import open_session
from finesight.label.label_store import EVAL_FILE, JOURNAL_FILE, LABELS_FILE


def list_texts(folder: Path) -> list[str]:
    return [one.messages[-1].content[0].text for one in read_samples(folder / LABELS_FILE)]


def write_answers(folder: Path, *texts: str | None) -> Path:
    """Write one sample per text about the images of `draw_images`; None has no answer."""
    draw_images(folder, len(texts))
    samples = []
    for index, text in enumerate(texts):
        question = (ImagePart(image=f"photos/{index}.png"), TextPart(text="Which color?"))
        messages = [Message(role="user", content=question)]
        messages += [Message(role="assistant", content=text)] if text else []
        samples.append(Sample(id=f"s{index}", messages=tuple(messages)))
    write_samples(folder / "data.jsonl", samples)
    return folder / "data.jsonl"


@pytest.mark.parametrize("damage", ["", '{"time": "2026-01-01T00', '{"time": "2026\n'])
def test_session_continues_after_a_crash(tmp_path: Path, damage: str) -> None:
    session = open_fields_session(tmp_path)
    ids = [item.sample.sample.id for item in session.store.items]
    session.store.save_label(ids[0], session.store.items[0].proposal)
    session.store.skip(ids[1])
    # A crash: nothing is closed properly, and the last line is incomplete.
    session.store._lock.close()
    journal = tmp_path / "labels" / JOURNAL_FILE
    before = journal.read_bytes()
    with journal.open("a") as file:
        file.write(damage)
    photos = [tmp_path / "photos"]
    if damage.endswith("\n"):
        with pytest.raises(UserError, match="line 6 is not an entry"):
            open_session(tmp_path / "labels", MODEL, photos, prompt="Read.")
        return
    with open_session(tmp_path / "labels", MODEL, photos, prompt="Read.").store as store:
        assert journal.read_bytes() == before
        assert [item.sample.sample.id for item in store.items] == ids
        assert store.count_events() == {
            "open": 1,
            "written": 0,
            "accepted": 1,
            "corrected": 0,
            "skipped": 1,
        }
        assert [one.sample.id for one in store.list_unsuggested("other")] == [ids[2]]
        assert store.list_unsuggested(MODEL) == []


def test_second_process_is_rejected(tmp_path: Path) -> None:
    with open_fields_session(tmp_path).store, pytest.raises(UserError, match="another process"):
        open_session(tmp_path / "labels", MODEL, [tmp_path / "photos"], prompt="Read.")


def test_labels_are_training_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_fields_session(tmp_path).store as store:
        for item in store.items:
            store.save_label(item.sample.sample.id, item.proposal)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    corpus = load_corpus([DataFileSettings(path=tmp_path / "labels" / LABELS_FILE)])
    for located in corpus.read_samples():
        (image,) = (part for part in located.sample.iter_parts() if isinstance(part, ImagePart))
        assert located.resolve_path(image.image).is_file()
        assert not Path(image.image).is_absolute()


def test_labels_are_split_in_the_same_way_in_each_session(tmp_path: Path) -> None:
    images = [draw_images(tmp_path / name, 10) for name in ("first", "second")]

    def label(num_labels: int, fraction: float | None, folder: Path) -> list[set[str]]:
        session = open_session(
            tmp_path / "labels", MODEL, [folder], prompt="Read.", train_fraction=fraction
        )
        with session.store as store:
            for item in store.items[:num_labels]:
                store.save_label(item.sample.sample.id, (TextPart(text="red"),))
        files = [tmp_path / "labels" / name for name in (LABELS_FILE, EVAL_FILE)]
        return [
            {sample.id for sample in read_samples(file)} if file.exists() else set()
            for file in files
        ]

    assert [len(ids) for ids in label(1, 0.7, images[0])] == [1, 0]
    assert [len(ids) for ids in label(2, None, images[0])] == [1, 1]
    train, validation = label(10, None, images[0])
    assert (len(train), len(validation)) == (7, 3)
    assert label(0, None, images[0]) == [train, validation]
    both = label(10, None, images[1])
    assert [len(ids) for ids in both] == [14, 6]
    assert train | validation < both[0] | both[1]
    assert label(0, 0.7, images[1]) == both
    assert label(0, 1.0, images[1]) == [both[0] | both[1], set()]


def test_review_replaces_answers_and_keeps_others(tmp_path: Path) -> None:
    data = write_answers(tmp_path, "red", "green", "blue", None)
    session = open_session(tmp_path / "labels", MODEL, [data], review=True)
    scores = {"s0": 0.1, "s1": 0.9, "s2": 0.5}
    suggestions = [(make_suggestion(name, "gray", 0.9), score) for name, score in scores.items()]
    with session.store as store:
        store.add_suggestions(suggestions, MODEL)
        assert [item.sample.sample.id for item in store.items] == ["s1", "s2", "s0", "s3"]
        assert store.items[0].proposal[0].text == "green"
        assert store.save_label("s1", (TextPart(text="gray"),)).decision.event == "corrected"
        assert store.save_label("s2", (TextPart(text="blue"),)).decision.event == "accepted"
        store.skip("s0")
    assert list_texts(tmp_path / "labels") == ["red", "gray", "blue"]


def test_labeled_samples_are_not_listed_without_review(tmp_path: Path) -> None:
    data = write_answers(tmp_path, "red", None, "red", "red")
    session = open_session(tmp_path / "labels", MODEL, [data])
    assert (session.task.kind, session.task.choices) == ("classes", ("red",))
    with session.store as store:
        assert [item.sample.sample.id for item in store.items] == ["s1"]
        store.save_label("s1", (TextPart(text="green"),))
    assert list_texts(tmp_path / "labels") == ["red", "green", "red", "red"]


@pytest.mark.parametrize(
    ("sources", "prompt", "message"),
    [
        (["photos"], None, "images have no prompt"),
        (["photo"], "Read.", "photo does not exist"),
        (["photos", "photos/0.png"], "Read.", "several samples have the ID"),
        (["empty"], "Read.", "no images and no samples"),
    ],
)
def test_invalid_sources_are_rejected(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sources: list[str],
    prompt: str | None,
    message: str,
) -> None:
    draw_images(tmp_path)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        open_session(Path("labels"), MODEL, [Path(name) for name in sources], prompt=prompt)


@pytest.mark.parametrize(
    ("answers", "kind", "template"),
    [
        (
            ['{"a": 1, "b": ["x", "y"], "c": null, "d": null}', '{"a": 2, "c": true}'],
            "fields",
            {"a": 0, "b": [""], "c": False, "d": None},
        ),
        (["[1, 2]", '{"a": 2}'], "text", None),
        (["[1, 2]", '{"a": 2}', '{"a": 3}'], "fields", {"a": 0}),
        (["red", "green"] * 4, "classes", None),
        (["a long caption", "another"], "text", None),
    ],
)
def test_task_is_detected_from_answers(
    tmp_path: Path, answers: list[str], kind: str, template: object
) -> None:
    data = write_answers(tmp_path, *answers, None)
    session = open_session(tmp_path / "labels", MODEL, [data])
    session.store.close()
    assert session.task.kind == kind
    assert json.loads(session.task.template or "null") == template


def test_box_metadata_follows_reviewed_boxes(tmp_path: Path) -> None:
    (photo,) = draw_images(tmp_path, 1).iterdir()
    corners = (*CORNERS, (1.0, 1.0, 9.0, 9.0))
    boxes = [BoxPart(label=a, xyxy=xyxy) for a, xyxy in zip("abc", corners, strict=True)]
    messages = (
        Message(role="user", content=(ImagePart(image=str(photo)), TextPart(text="Find."))),
        Message(role="assistant", content=tuple(boxes)),
    )
    meta = {"boxes": [{"id": 1}, {"id": 2}, {}], "split": "val"}
    write_samples(tmp_path / "data.jsonl", [Sample(id="a", messages=messages, meta=meta)])
    moved = boxes[0].model_copy(update={"xyxy": (11.0, 20.0, 40.0, 50.0)})
    with open_session(
        tmp_path / "labels", MODEL, [tmp_path / "data.jsonl"], review=True
    ).store as store:
        for content, attributes in (
            (boxes, meta["boxes"]),
            (boxes[1:], [{"id": 2}, {}]),
            ([boxes[2], boxes[1], moved], [{}, {"id": 2}, {}]),
            ([moved], None),
        ):
            store.save_label("a", tuple(content))
            (sample,) = read_samples(tmp_path / "labels" / LABELS_FILE)
            assert sample.meta.get("boxes") == attributes
            assert sample.meta["split"] == "val"


def test_names_that_are_not_utf8_are_user_errors(tmp_path: Path) -> None:
    photos = draw_images(tmp_path / "a", 1)
    (photos / "0.png").rename(photos / os.fsdecode(b"caf\xe9.png"))
    with pytest.raises(UserError, match="not UTF-8"):
        open_session(tmp_path / "labels", MODEL, [photos], prompt="Read.")
    # The path from the labels to the images is stored, and may have other folders than the source.
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    data = write_answers(folder, "red")
    with (
        pytest.raises(UserError, match="not UTF-8"),
        open_session(tmp_path / "labels", MODEL, [data], review=True).store as store,
    ):
        store.save_label("s0", (TextPart(text="blue"),))


def test_labels_of_other_folders_are_kept(tmp_path: Path) -> None:
    out = tmp_path / "labels"
    for name, text in (("first", "red"), ("second", "blue")):
        photos = [draw_images(tmp_path / name, 1)]
        with open_session(out, MODEL, photos, kind="text", prompt="Color?").store as store:
            store.save_label(store.items[0].sample.sample.id, (TextPart(text=text),))
    assert list_texts(out) == ["red", "blue"]
    # After a crash before the file was written, it is written from the journal.
    (out / LABELS_FILE).unlink()
    open_session(out, MODEL, photos, kind="text", prompt="Color?").store.close()
    assert list_texts(out) == ["blue"]


def test_answered_samples_of_other_sources_are_kept(tmp_path: Path) -> None:
    """A later session with other sources loses no answer, reviewed or not."""
    out = tmp_path / "labels"
    data = write_answers(tmp_path / "first", "red", "green", "blue", None)
    with open_session(out, MODEL, [data], review=True).store as store:
        store.save_label("s1", (TextPart(text="gray"),))
        store.skip("s1")
        store.save_label("s3", (TextPart(text="pink"),))
        store.reopen("s3")
        # The page shows the corrected answer again.
        assert store.find("s1").proposal == (TextPart(text="gray"),)
    photos = [draw_images(tmp_path / "second", 1)]
    with open_session(out, MODEL, photos, kind="text", prompt="Color?").store as store:
        store.save_label(store.items[0].sample.sample.id, (TextPart(text="white"),))
    assert list_texts(out) == ["red", "green", "blue", "white"]


@pytest.mark.parametrize(
    ("corrected", "references"),
    [("cat", ("cat", "kitty", "pet")), ("dog", ()), ("kitty", ("pet",))],
)
def test_references_follow_the_corrected_answer(
    tmp_path: Path, corrected: str, references: tuple[str, ...]
) -> None:
    """An evaluation must not accept the replaced answer as correct."""
    (sample,) = read_samples(write_answers(tmp_path, "cat"))
    sample = sample.model_copy(update={"references": ("cat", "kitty", "pet")})
    write_samples(tmp_path / "data.jsonl", [sample])
    sources = [tmp_path / "data.jsonl"]
    with open_session(tmp_path / "labels", MODEL, sources, review=True).store as store:
        store.save_label("s0", (TextPart(text=corrected),))
    (labeled,) = read_samples(tmp_path / "labels" / LABELS_FILE)
    assert get_reference_answer(labeled) == ((corrected, *references), ())


def test_references_stay_with_a_corrected_box(tmp_path: Path) -> None:
    """The text of the answer, to which the references are alternatives, has not changed."""
    sample = read_samples(write_answers(tmp_path, "cat"))[0]
    write_samples(tmp_path / "data.jsonl", [sample.model_copy(update={"references": ("kitty",)})])
    box = BoxPart(label="cat", xyxy=(1, 1, 5, 5))
    sources = [tmp_path / "data.jsonl"]
    with open_session(tmp_path / "labels", MODEL, sources, review=True).store as store:
        store.save_label("s0", (TextPart(text="cat"), box))
    assert read_samples(tmp_path / "labels" / LABELS_FILE)[0].references == ("kitty",)


def test_review_forgets_samples_that_were_removed(tmp_path: Path) -> None:
    """A faulty sample that the user removed from the data is not trained."""
    samples = read_samples(write_answers(tmp_path, "red", "green"))
    for kept in (samples, samples[:1]):
        write_samples(tmp_path / "data.jsonl", kept)
        with open_session(
            tmp_path / "labels", MODEL, [tmp_path / "data.jsonl"], review=True
        ).store as store:
            store.save_label("s0", (TextPart(text="blue"),))
    assert list_texts(tmp_path / "labels") == ["blue"]


def test_another_sample_with_the_same_id_is_rejected(tmp_path: Path) -> None:
    out = tmp_path / "labels"
    sources = [write_answers(tmp_path / name, "red") for name in ("first", "second")]
    with open_session(out, MODEL, [sources[0]], review=True).store as store:
        store.save_label("s0", (TextPart(text="blue"),))
    with pytest.raises(UserError, match="another sample with the ID 's0'"):
        open_session(out, MODEL, [sources[1]], review=True)


def test_review_needs_another_folder(tmp_path: Path) -> None:
    """A skipped label would be lost: reviews have the sample IDs of the labels."""
    data = write_answers(tmp_path, "red", "green")
    with pytest.raises(UserError, match="contains the labels under review"):
        open_session(tmp_path, MODEL, [data], review=True)
