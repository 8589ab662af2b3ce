"""Tests of the journal and of the file of labels."""

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from case_files import load_cases
from hostile_requests import make_jpeg2000
from image_fixtures import make_sample
from label_fixtures import CORNERS, MODEL, draw_images, make_suggestion, open_fields_session
from PIL import Image
from PIL.Image import Transpose
from video_fixtures import write_video

from finesight.errors import UserError
from finesight.evaluate.eval_case import get_reference_answer
from finesight.files import storage
from finesight.files.storage import FileSystem
from finesight.label import label_store
from finesight.label.label_session import (
    build_task,
    open_session,
)
from finesight.label.label_store import EVAL_FILE, JOURNAL_FILE, LABELS_FILE
from finesight.label.pairs_operation import pairs
from finesight.samples import run_examples
from finesight.samples.run_examples import has_single_questions, read_run_examples
from finesight.samples.sample import BoxPart, TextPart, VideoPart, read_samples, write_samples
from finesight.vision import image_reader

CASES = load_cases("label_store")


def list_texts(folder: Path, name: str = LABELS_FILE) -> list[str]:
    return [one.messages[-1].content[0].text for one in read_samples(folder / name)]


def write_answers(folder: Path, *texts: str | None) -> Path:
    """Write one sample per text about the images of `draw_images`; None has no answer."""
    draw_images(folder, len(texts))
    samples = [
        make_sample(f"s{index}", folder, f"photos/{index}.png", "Which color?", answer=text).sample
        for index, text in enumerate(texts)
    ]
    write_samples(folder / "data.jsonl", samples)
    return folder / "data.jsonl"


def answer(out: Path, sources: list[Path], *texts: str, **options: Any) -> None:
    """Label the first samples of a session with these texts."""
    with open_session(out, MODEL, sources, **options).store as store:
        for item, text in zip(store.items, texts, strict=False):
            store.save_label(item.sample.sample.id, (TextPart(text=text),))


def test_examples_of_sorted_data_have_all_classes(tmp_path, monkeypatch):
    data = write_answers(tmp_path, *["cat"] * 6, *["dog"] * 6)
    recipe = {"model": MODEL, "data": {"train": str(data)}, "output_dir": str(tmp_path)}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    monkeypatch.setattr(run_examples, "MAX_EXAMPLES", 6)
    assert build_task(read_run_examples(str(tmp_path))).choices == ("cat", "dog")
    assert has_single_questions(str(tmp_path))
    (sample, *_) = read_samples(data)
    longer = sample.model_copy(update={"messages": (*sample.messages, *sample.messages)})
    write_samples(data, [longer, sample])
    assert not has_single_questions(str(tmp_path))
    assert not has_single_questions(MODEL)


@pytest.mark.parametrize("damage", ["", '{"time": "2026-01-01T00', '{"time": "2026\n'])
def test_session_continues_after_a_crash(tmp_path, damage):
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
        counts = {"open": 1, "written": 0, "accepted": 1, "corrected": 0, "skipped": 1}
        assert store.count_events() == counts
        assert [one.sample.id for one in store.list_unsuggested("other")] == [ids[2]]
        assert store.list_unsuggested(MODEL) == []


def test_corrections_become_preference_pairs(tmp_path):
    source = write_answers(tmp_path, None, None, None)
    out, session = tmp_path / "labels", open_session(tmp_path / "labels", MODEL, [source])
    with session.store as store:
        suggestions = [
            make_suggestion(f"s{n}", text, 0.5) for n, text in enumerate(["red", "blue"])
        ]
        store.add_suggestions(suggestions, MODEL)
        for name, text in (("s0", "red"), ("s1", "green"), ("s2", "gray")):
            store.save_label(name, (TextPart(text=text),))
    pairs(out, tmp_path / "pairs.jsonl")
    (pair,) = read_samples(tmp_path / "pairs.jsonl")
    assert (pair.messages[-1].content[0].text, pair.rejected[0].text) == ("green", "blue")
    pairs(out, tmp_path / "all.jsonl", labels=True)
    found = {
        (one.messages[-1].content[0].text, one.label)
        for one in read_samples(tmp_path / "all.jsonl")
    }
    assert found == {("red", True), ("green", True), ("blue", False), ("gray", True)}


def test_second_process_is_rejected(tmp_path):
    with open_fields_session(tmp_path).store, pytest.raises(UserError, match="another process"):
        open_session(tmp_path / "labels", MODEL, [tmp_path / "photos"], prompt="Read.")


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


def test_equal_pixels_are_in_one_split(tmp_path: Path) -> None:
    photos = draw_images(tmp_path, 6)
    for path in [*photos.iterdir()]:
        Image.open(path).transpose(Transpose.ROTATE_90).save(
            path.with_suffix(".tiff"), exif={0x0112: 6}
        )
    options: dict[str, Any] = {"prompt": "Read.", "train_fraction": 0.5}
    with open_session(tmp_path / "labels", MODEL, [photos], **options).store as store:
        for item in store.items:
            store.save_label(item.sample.sample.id, (TextPart(text="red"),))
    train, validation = (
        [Path(one.id).stem for one in read_samples(tmp_path / "labels" / name)]
        for name in (LABELS_FILE, EVAL_FILE)
    )
    assert len(train) == len(validation) == 6
    assert not {*train} & {*validation}


def test_frames_and_videos_are_decoded_within_limits(tmp_path, monkeypatch):
    frames = [f"photos/{path.name}" for path in draw_images(tmp_path, 2).iterdir()]
    write_video(tmp_path / "a.mp4")
    videos = {"frames": VideoPart(frames=tuple(frames)), "video": VideoPart(video="a.mp4")}
    samples = [make_sample(name, tmp_path, video).sample for name, video in videos.items()]
    write_samples(tmp_path / "data.jsonl", samples)
    monkeypatch.setattr(image_reader, "MAX_VIDEO_CPU_S", 1e-4)
    (tmp_path / frames[1]).write_bytes(make_jpeg2000())
    monkeypatch.setattr(image_reader, "MAX_IMAGE_CPU_S", 0.1)
    with open_session(tmp_path / "labels", MODEL, [tmp_path / "data.jsonl"]).store as store:
        reasons = store.decode_images([item.sample for item in store.items])
    assert [*reasons] == ["frames", "video"]
    assert ["took more than" in one for one in reasons.values()] == [True, True], reasons


@pytest.mark.parametrize(
    ("sources", "prompt", "message"), CASES["test_invalid_sources_are_rejected"]
)
def test_invalid_sources_are_rejected(tmp_path, monkeypatch, sources, prompt, message):
    write_answers(tmp_path, None, None)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    review = "--review" in sources
    paths = [Path(name) for name in sources if name != "--review"]
    with pytest.raises(UserError, match=message):
        open_session(Path("labels"), MODEL, paths, prompt=prompt, review=review)


@pytest.mark.parametrize(
    ("answers", "kind", "template"), CASES["test_task_is_detected_from_answers"]
)
def test_task_is_detected_from_answers(tmp_path, answers, kind, template):
    data = write_answers(tmp_path, *answers, None)
    session = open_session(tmp_path / "labels", MODEL, [data])
    session.store.close()
    assert session.task.kind == kind
    assert json.loads(session.task.template or "null") == template


def test_box_metadata_follows_reviewed_boxes(tmp_path):
    (photo,) = draw_images(tmp_path, 1).iterdir()
    corners = (*CORNERS, (1.0, 1.0, 9.0, 9.0))
    boxes = [BoxPart(label=a, xyxy=xyxy) for a, xyxy in zip("abc", corners, strict=True)]
    meta = {"boxes": [{"id": 1}, {"id": 2}, {}], "split": "val"}
    sample = make_sample("a", tmp_path, str(photo), "Find.", answer=boxes).sample
    write_samples(tmp_path / "data.jsonl", [sample.model_copy(update={"meta": meta})])
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


def test_names_that_are_not_utf8_are_user_errors(tmp_path):
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


def test_labels_of_other_folders_are_kept(tmp_path):
    out, options = tmp_path / "labels", {"kind": "text", "prompt": "Color?"}
    for name, text in (("first", "red"), ("second", "blue")):
        photos = [draw_images(tmp_path / name, 1)]
        answer(out, photos, text, **options)
    assert list_texts(out) == ["red", "blue"]
    # After a crash before the file was written, it is written from the journal.
    (out / LABELS_FILE).unlink()
    answer(out, photos, **options)
    assert list_texts(out) == ["blue"]


def test_answered_samples_of_other_sources_are_kept(tmp_path):
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
    answer(out, [draw_images(tmp_path / "second", 1)], "white", kind="text", prompt="Color?")
    assert list_texts(out) == ["red", "green", "blue", "white"]


@pytest.mark.parametrize(
    ("corrected", "references"),
    [("cat", ("cat", "kitty", "pet")), ("dog", ()), ("kitty", ("pet",))],
)
def test_references_follow_the_corrected_answer(tmp_path, corrected, references):
    """An evaluation must not accept the replaced answer as correct."""
    (sample,) = read_samples(write_answers(tmp_path, "cat"))
    update = {"references": ("cat", "kitty", "pet"), "rejected": (TextPart(text="dog"),)}
    sample = sample.model_copy(update=update)
    write_samples(tmp_path / "data.jsonl", [sample])
    answer(tmp_path / "labels", [tmp_path / "data.jsonl"], corrected, review=True)
    (labeled,) = read_samples(tmp_path / "labels" / LABELS_FILE)
    assert get_reference_answer(labeled) == ((corrected, *references), ())
    # Both answers of a pair differ.
    assert labeled.rejected == (() if corrected == "dog" else (TextPart(text="dog"),))
    # They stay with a corrected box: the text of the answer has not changed.
    box = BoxPart(label="cat", xyxy=(1, 1, 5, 5))
    sources = [tmp_path / "data.jsonl"]
    with open_session(tmp_path / "boxes", MODEL, sources, review=True).store as store:
        store.save_label("s0", (TextPart(text="cat"), box))
    (labeled,) = read_samples(tmp_path / "boxes" / LABELS_FILE)
    assert labeled.references == ("cat", "kitty", "pet")
    # A rejected answer is desirable after a correction.
    undesirable = sample.model_copy(update={"rejected": (), "label": False})
    write_samples(tmp_path / "rated.jsonl", [undesirable])
    answer(tmp_path / "rated", [tmp_path / "rated.jsonl"], corrected, review=True)
    (labeled,) = read_samples(tmp_path / "rated" / LABELS_FILE)
    assert labeled.label is (corrected != "cat")


def test_review_forgets_samples_that_were_removed(tmp_path):
    """A faulty sample that the user removed from the data is not trained."""
    samples = read_samples(write_answers(tmp_path, "red", "green"))
    for kept in (samples, samples[:1]):
        write_samples(tmp_path / "data.jsonl", kept)
        answer(tmp_path / "labels", [tmp_path / "data.jsonl"], "blue", review=True)
    assert list_texts(tmp_path / "labels") == ["blue"]


def test_another_sample_with_the_same_id_is_rejected(tmp_path):
    first, second = (write_answers(tmp_path / name, None) for name in ("first", "second"))
    answer(tmp_path / "labels", [first], "blue")
    with pytest.raises(UserError, match="another sample with the ID 's0'"):
        answer(tmp_path / "labels", [second])


def test_review_needs_a_new_folder(tmp_path):
    """A review replaces all labels of its folder. It has the IDs of the labels under review."""
    photos, out = [draw_images(tmp_path, 2)], tmp_path / "labels"
    answer(out, photos, "red", "red", kind="text", prompt="Color?")
    data = write_answers(tmp_path / "data", "green")
    (tmp_path / "labels-2").mkdir()
    for folder, source in ((out, data), (out, out / LABELS_FILE), (data.parent, data)):
        before = {file: file.read_bytes() for file in folder.iterdir() if file.is_file()}
        with pytest.raises(UserError, match="samples that are not of this review") as caught:
            open_session(folder, MODEL, [source], review=True)
        assert {file: file.read_bytes() for file in folder.iterdir() if file.is_file()} == before
        free = tmp_path / "labels-3" if folder == out else tmp_path / "data-2"
        assert caught.value.remedy == f"choose a free folder: --out {free}"
    answer(free, [out / LABELS_FILE], "blue", review=True)
    with pytest.raises(UserError, match="samples that are not of this review"):
        open_session(free, MODEL, [data], review=True)
    assert sorted(list_texts(free)) == ["blue", "red"]


def test_labels_keep_their_prompt(tmp_path):
    photos, out = [draw_images(tmp_path, 2)], tmp_path / "labels"
    with open_session(out, MODEL, photos, kind="text", prompt="Which color?").store as store:
        store.save_label(str(photos[0] / "0.png"), (TextPart(text="red"),))
        store.add_suggestions([make_suggestion(str(photos[0] / "1.png"), "x", 0.5)], MODEL)
    before = (out / LABELS_FILE).read_bytes()
    with pytest.raises(UserError) as caught:
        open_session(out, MODEL, photos, prompt="Who is the author?", train_fraction=0.5)
    assert "answers the prompt 'Which color?', not 'Who is the author?'" in caught.value.what
    assert caught.value.remedy == (
        f"use it: --prompt 'Which color?', or choose a free folder: --out {out}-2"
    )
    assert {file.name for file in out.iterdir()} == {JOURNAL_FILE, LABELS_FILE, "sources.json"}
    # Without a prompt, each image keeps its own, and further images have the last one.
    more = [draw_images(tmp_path / "more", 1)]
    answer(out, more, "round", prompt="Which shape?")
    more[0].joinpath("new.png").write_bytes(more[0].joinpath("0.png").read_bytes())
    session = open_session(out, MODEL, [*photos, *more])
    with session.store as store:
        questions = {
            Path(item.sample.sample.id).name: item.sample.sample.messages[0].content[1].text
            for item in store.items
        }
        assert questions == dict.fromkeys(("0.png", "1.png", "new.png"), "Which shape?")
        # A suggestion for another prompt is not used.
        assert [item.suggestion for item in store.items] == [None] * 4
    assert session.task.prompt == "Which shape?"
    assert (out / LABELS_FILE).read_bytes().startswith(before)


def test_reviewed_sample_is_open_again_after_a_correction_of_its_source(tmp_path):
    """An earlier decision about another answer does not bring the replaced answer back."""
    data, out = write_answers(tmp_path, "red", "green"), tmp_path / "labels"
    with open_session(out, MODEL, [data], review=True).store as store:
        store.add_suggestions([replace(make_suggestion("s0", "gray", 0.9), score=0.5)], MODEL)
        store.save_label("s0", (TextPart(text="pink"),))
        store.save_label("s1", (TextPart(text="green"),))
    before = data.read_text()
    data.write_text(before.replace("red", "blue"))
    with open_session(out, MODEL, [data], review=True).store as store:
        item = store.find("s0")
        assert (item.decision, item.suggestion, len(item.history)) == (None, None, 2)
        assert item.proposal == (TextPart(text="blue"),)
        assert store.find("s1").decision.event == "accepted"
    assert list_texts(out) == ["blue", "green"]
    data.write_text(before)
    with open_session(out, MODEL, [data], review=True).store as store:
        assert store.find("s0").decision.event == "corrected"
    assert list_texts(out) == ["pink", "green"]


def test_pages_of_a_document_are_one_item(tmp_path, monkeypatch):
    monkeypatch.chdir(draw_images(tmp_path, 1).parent)
    pages = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    pages[0].save("photos/a.pdf", save_all=True, append_images=pages[1:])
    Path("photos/b.pdf").write_bytes(b"%PDF-1.7")
    sources = [Path("photos"), tmp_path / "photos"]
    with open_session(Path("labels"), MODEL, sources, prompt="Colors?").store as store:
        sizes = {item.sample.sample.id: len(item.images) for item in store.items}
        store.save_label("photos/a.pdf", (TextPart(text="red, blue"),))
    assert sizes == {"photos/0.png": 1, "photos/a.pdf": 2, "photos/b.pdf": 1}
    (labeled,) = read_samples(tmp_path / "labels" / LABELS_FILE)
    images = [part.image for part in labeled.iter_parts() if part.type == "image"]
    assert images == ["../photos/a.pdf#page=1", "../photos/a.pdf#page=2"]


@pytest.mark.parametrize("is_relative", [True, False])
def test_image_is_recognized_under_another_path(tmp_path, monkeypatch, is_relative):
    monkeypatch.chdir(draw_images(tmp_path, 2).parent)
    paths = [Path("photos"), tmp_path / "photos"]
    first, second = paths if is_relative else paths[::-1]
    with open_session(Path("labels"), MODEL, [first], prompt="Color?").store as store:
        store.save_label(str(first / "0.png"), (TextPart(text="red"),))
        store.skip(str(first / "1.png"))
    for sources in ([second], paths, [Path("photos/1.png"), *paths]):
        with open_session(Path("labels"), MODEL, sources, prompt="Color?").store as store:
            events = {item.sample.sample.id: item.decision.event for item in store.items}
            assert events == {str(first / "0.png"): "written", str(first / "1.png"): "skipped"}
    assert json.loads(Path("labels/sources.json").read_bytes()) == [
        str(tmp_path / "photos"),
        "photos/1.png",
    ]


class FullDisk(FileSystem):
    """File system on which one file cannot be written, or a file that exists not be flushed."""

    def __init__(self, name: str) -> None:
        self._name = name

    def create(self, path: Path) -> int:
        self._fail_for(path.name)
        return super().create(path)

    def open_append(self, path: Path) -> int:
        self._fail_for(path.name)
        return super().open_append(path)

    def sync_path(self, path: Path) -> None:
        self._fail_for(f"flush {path.name}")
        super().sync_path(path)

    def _fail_for(self, name: str) -> None:
        if name.startswith(self._name):
            raise OSError(errno.ENOSPC, "full")


FILES_OF_A_DECISION = [f".{LABELS_FILE}", f".{EVAL_FILE}", JOURNAL_FILE, f"flush {JOURNAL_FILE}"]


def read_folder(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", FILES_OF_A_DECISION)
@pytest.mark.parametrize("change", ["save", "skip", "reopen", "save again"])
def test_decision_that_cannot_be_written_is_not_kept(tmp_path, name, change):
    """A page that reports an error shows the open sample, and no file has the decision."""
    out = tmp_path / "labels"
    values = {"kind": "text", "prompt": "Color?", "train_fraction": 0.5}
    with open_session(out, MODEL, [draw_images(tmp_path, 4)], **values).store as store:
        ids = [item.sample.sample.id for item in store.items]
        for sample_id in ids[:3]:
            store.save_label(sample_id, (TextPart(text="red"),))
        item = store.find(ids[3 if change == "save" else 0])
        sample_id, red = item.sample.sample.id, (TextPart(text="red"),)
        changes = {
            "save": lambda: store.save_label(sample_id, red, question=["Hue?"]),
            "save again": lambda: store.save_label(sample_id, (TextPart(text="blue"),)),
            "skip": lambda: store.skip(sample_id),
            "reopen": lambda: store.reopen(sample_id),
        }
        state = [*item.history], item.decision, item.draft, item.question, store.count_events()
        files = read_folder(out)
        with patch.object(storage, "file_system", FullDisk(name)):
            for _ in range(2):
                with pytest.raises(UserError, match="no space left"):
                    changes[change]()
        new_state = [*item.history], item.decision, item.draft, item.question, store.count_events()
        assert (new_state, read_folder(out)) == (state, files)
        changes[change]()
        assert len(item.history) == len(state[0]) + 1
    with open_session(out, MODEL, [tmp_path / "photos"], **values).store as store:
        assert store.find(sample_id).history[:-1] == state[0]


@pytest.mark.parametrize("name", FILES_OF_A_DECISION)
def test_decisions_of_one_action_are_kept_together_or_not_at_all(tmp_path, name):
    out = tmp_path / "labels"
    values = {"kind": "text", "prompt": "Color?", "train_fraction": 0.5}
    with open_session(out, MODEL, [draw_images(tmp_path, 4)], **values).store as store:
        ids = [item.sample.sample.id for item in store.items]
        store.save_label(ids[0], (TextPart(text="red"),))
        store.save_label(ids[1], (TextPart(text="red"),))
        files = read_folder(out)

        def change(is_stopped: bool = False) -> None:
            with store.write_once():
                store.reopen(ids[0])
                store.save_label(ids[0], (TextPart(text="blue"),))
                store.save_label(ids[2], (TextPart(text="blue"),))
                if is_stopped:
                    raise KeyboardInterrupt

        with (
            patch.object(storage, "file_system", FullDisk(name)),
            pytest.raises(UserError, match="no space left"),
        ):
            change()
        with pytest.raises(KeyboardInterrupt):
            change(is_stopped=True)
        assert read_folder(out) == files
        assert [len(store.find(one).history) for one in ids] == [1, 1, 0, 0]
        change()
        assert [len(store.find(one).history) for one in ids] == [3, 1, 1, 0]
    assert sorted(list_texts(out) + list_texts(out, EVAL_FILE)) == ["blue", "blue", "red"]


def test_labels_that_cannot_be_written_at_the_end_are_written_by_the_next_session(
    tmp_path, monkeypatch
):
    """With many samples, the labels are written after several decisions and at the end."""
    monkeypatch.setattr(label_store, "LABELS_PER_WRITE", 1)
    photos, out = [draw_images(tmp_path, 4)], tmp_path / "labels"
    store = open_session(out, MODEL, photos, kind="text", prompt="Color?").store
    store.save_label(store.items[0].sample.sample.id, (TextPart(text="red"),))
    monkeypatch.setattr(storage, "file_system", FullDisk(f".{LABELS_FILE}"))
    with pytest.raises(UserError, match="the decisions are kept in journal") as error:
        store.close()
    assert "next session" in str(error.value.remedy)
    assert not (out / LABELS_FILE).exists()
    monkeypatch.setattr(storage, "file_system", FileSystem())
    with open_session(out, MODEL, photos, kind="text", prompt="Color?").store:
        pass
    assert list_texts(out) == ["red"]


def test_moved_folder_is_reported(tmp_path):
    photos, out = [draw_images(tmp_path, 2)], tmp_path / "labels"
    with open_session(out, MODEL, photos, kind="text", prompt="Color?").store as store:
        ids = [item.sample.sample.id for item in store.items]
        store.save_label(ids[0], (TextPart(text="red"),))
        out.rename(tmp_path / "moved")
        for name in ("absent", "new"):
            with pytest.raises(UserError, match=f"{out}: the folder was moved or deleted"):
                store.save_label(ids[1], (TextPart(text="blue"),))
            with pytest.raises(UserError, match="was moved"):
                store.add_suggestions([], MODEL)
            if name == "absent":
                assert not out.exists()
                out.mkdir()
                (out / JOURNAL_FILE).touch()
        assert store.find(ids[1]).decision is None
        (out / JOURNAL_FILE).unlink()
        (tmp_path / "moved").rename(out)
        store.save_label(ids[1], (TextPart(text="blue"),))
    assert list_texts(out) == ["red", "blue"]


@pytest.mark.parametrize(
    "name", [JOURNAL_FILE, LABELS_FILE, EVAL_FILE, "train_fraction.txt", "sources.json"]
)
@pytest.mark.parametrize(
    "content", ["my notes without an end", "my notes\n", '{"id": "a"}\n{"time"', ""]
)
def test_files_of_others_are_refused_and_unchanged(tmp_path, name, content):
    photos, folder = draw_images(tmp_path, 1), tmp_path / "notes"
    folder.mkdir()
    (folder / name).write_text(content)
    if content or name != JOURNAL_FILE:
        with pytest.raises(UserError) as caught:
            open_session(folder, MODEL, [photos], prompt="Color?", train_fraction=0.5)
        assert caught.value.remedy
    assert {file.name: file.read_text() for file in folder.iterdir()} == {name: content}


def test_place_without_a_folder_is_refused(tmp_path):
    photos = draw_images(tmp_path, 1)
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("missing")
    (tmp_path / "folder" / JOURNAL_FILE).mkdir(parents=True)
    for name in ("file", "link", "folder"):
        with pytest.raises(UserError, match=name):
            open_session(tmp_path / name, MODEL, [photos], prompt="Color?")
