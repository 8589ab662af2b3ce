"""Tests of the labelling page: requests without a browser, and labelling by keyboard in one."""

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from errno import ENOSPC
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, wait_for
from case_files import load_cases
from hostile_requests import make_jpeg2000, make_progressive_jpeg
from image_fixtures import make_sample
from label_fixtures import (
    CORNERS,
    FIELDS,
    MODEL,
    check_layouts,
    draw_images,
    open_boxes_session,
    open_client,
    open_fields_session,
    open_suggested_session,
    press,
    read_answers,
    run_in_page,
    save,
    serve,
)
from PIL import Image
from starlette.testclient import TestClient

from finesight.files.storage import translate_os_errors
from finesight.infer.model_loader import load_inference_model
from finesight.label import label_store
from finesight.label.label_session import LabelSession, open_session
from finesight.label.label_store import LABELS_FILE
from finesight.label.suggestion import suggest_labels
from finesight.model_folder import TINY_MODEL
from finesight.samples.sample import BoxPart, create_region, read_samples, write_samples
from finesight.vision import image_reader

CASES = load_cases("label_page")

DRAGGED = ((70, 60), (100, 75))
"""Start and end of a new box in pixels of the image."""


def test_answers_are_saved_skipped_and_reopened(tmp_path):
    with open_client(open_fields_session(tmp_path)) as client:
        item, other = (client.get(f"/items/{index}").json() for index in range(2))
        assert (Path(item["id"]).name, item["confidence"]) == ("2.png", 0.7)
        assert client.get(item["images"][0]["url"]).headers["content-type"] == "image/webp"
        suggested, corrected = item["answer"]["text"], '{"shop": "A"}'
        saved = save(client, item, text=suggested).json()
        assert (saved["item"]["decision"], saved["counts"]["open"]) == ("accepted", 2)
        assert read_answers(tmp_path / "labels") == {"2.png": json.dumps(FIELDS[2])}
        save(client, item, text=corrected)
        assert read_answers(tmp_path / "labels") == {"2.png": corrected}
        save(client, other, action="skip")
        reopened = save(client, item, action="reopen").json()
        counts = {"open": 2, "written": 0, "accepted": 0, "corrected": 0, "skipped": 1}
        assert reopened["counts"] == counts
        history = [
            (entry["event"], *(entry[key] and entry[key]["text"] for key in ("old", "new")))
            for entry in reopened["item"]["history"]
        ]
        assert history == [
            ("suggested", None, suggested),
            ("accepted", None, suggested),
            ("corrected", suggested, corrected),
            ("reopened", None, None),
        ]
        # The correction is not lost, also after a reload.
        assert client.get("/items/0").json()["answer"]["text"] == corrected


@pytest.mark.parametrize(
    ("text", "edits", "message"), CASES["test_untouched_and_invalid_fields_are_refused"]
)
def test_untouched_and_invalid_fields_are_refused(tmp_path, text, edits, message):
    session = open_fields_session(tmp_path)
    session.complete_task()
    with open_client(session) as client:
        answer = save(client, client.get("/items/0").json(), text=text, edits=edits)
        assert (answer.status_code, message in answer.text) == (422, True)
        assert "skip (S)" in answer.text
        assert client.get("/items").json()["counts"]["open"] == 3


@pytest.mark.parametrize(
    ("answers", "options", "kind", "template"), CASES["test_kind_is_that_of_most_suggestions"]
)
def test_kind_is_that_of_most_suggestions(tmp_path, answers, options, kind, template):
    boxes = [BoxPart(label="shop", xyxy=CORNERS[0])]
    parts = [boxes if answer == "boxes" else answer for answer in answers]
    session = open_suggested_session(tmp_path, *parts, **options)
    session.store.close()
    assert (session.task.kind, json.loads(session.task.template or "null")) == (kind, template)


RECEIPT = '{"shop":"Olp", "price": 12.50, "id": 9007199254740993, "paid": null, "vat": true}'


@pytest.mark.parametrize(
    ("text", "edits", "expected"),
    CASES["test_edited_fields_leave_the_rest_of_the_answer"],
    ids=count(),
)
def test_edited_fields_leave_the_rest_of_the_answer(tmp_path, text, edits, expected):
    session = open_fields_session(tmp_path)
    template = '{"shop": "", "price": 0.0, "id": 0, "paid": 0, "vat": false}'
    session.task = replace(session.task, template=template)
    with open_client(session) as client:
        item = client.get("/items/0").json()
        saved = save(client, item, text=text, edits=edits).json()
        assert read_answers(tmp_path / "labels") == {"2.png": expected}
        texts = {field["path"][-1]: field["text"] for field in saved["item"]["fields"]}
        assert saved["item"]["has_template"] is False
        if expected == RECEIPT:
            shown = ("Olp", "12.50", "9007199254740993", "", "true")
            assert texts == dict(zip(("shop", "price", "id", "paid", "vat"), shown, strict=True))
        unknown = save(client, item, text=text, edits={5: "1"})
        assert (unknown.status_code, "field 5" in unknown.text) == (422, True)


def open_receipts(tmp_path: Path, *answers: object, **options: Any) -> LabelSession:
    """Open a session of JSON fields about three images with suggestions: boxes or texts."""
    boxes = [BoxPart(label="shop", xyxy=xyxy) for xyxy in CORNERS]
    parts = [boxes if answer is CORNERS else answer for answer in answers]
    return open_suggested_session(tmp_path, *parts, **({"kind": "fields"} | options))


def list_fields(item: dict[str, Any]) -> dict[str, str]:
    return {".".join(field["path"]): field["text"] for field in item["fields"]}


@pytest.mark.parametrize("kind", ["fields", "text", "classes"])
@pytest.mark.parametrize("suggestion", [CORNERS, " "], ids=["boxes", "blank"])
def test_suggestions_of_another_kind_are_dropped(tmp_path, kind, suggestion):
    session = open_receipts(tmp_path, *[suggestion] * 3, kind=kind)
    with open_client(session) as client:
        item = client.get("/items/0").json()
        shown = (item["answer"], item["suggestion"], item["parts"])
        assert shown == ({"text": "", "boxes": []}, None, [])
        assert client.get("/search", params={"text": "shop"}).json()["count"] == 0
        box = {"label": "shop", "xyxy": [1, 1, 9, 9]}
        for text in ("", '{"name": "Olp"}'):
            refused = save(client, item, text=text, boxes=[box])
            assert (refused.status_code, f"of the kind {kind}" in refused.text) == (422, True)
        # An answer beside a suggestion that was not shown corrects nothing.
        assert save(client, item, text='{"a": "b"}').json()["item"]["decision"] == "written"
    (sample,) = read_samples(tmp_path / "labels" / LABELS_FILE)
    assert [part.type for part in sample.messages[-1].content] == ["text"]


@pytest.mark.parametrize("suggestions", [(), (CORNERS,) * 3, ('Read: {"name": "Ol',) * 3])
def test_first_saved_object_has_the_fields_of_the_next_images(tmp_path, suggestions):
    with open_client(open_receipts(tmp_path, *suggestions)) as client:
        item = client.get("/items/0").json()
        assert (item["fields"], item["answer"]["text"]) == ([], "")
        text = '{"name": "Olp", "price": 12.50}'
        assert save(client, item, text=text).json()["item"]["decision"] == "written"
        item = client.get("/items/1").json()
        assert (list_fields(item), item["answer"]["text"]) == ({"name": "", "price": ""}, "")
        save(client, item, edits={0: "Rab", 1: "3.10"})
    with open_client(open_receipts(tmp_path)) as client:
        assert list_fields(client.get("/items/2").json()) == {"name": "", "price": ""}
    answers = sorted(read_answers(tmp_path / "labels").values())
    assert answers == [text, '{"name": "Rab", "price": 3.10}']
    # The labels determine the types of named fields.
    session = open_receipts(tmp_path, field_names=("price", "paid"))
    session.store.close()
    assert json.loads(session.task.template) == {"price": 0.0, "paid": ""}


def test_items_are_listed_by_state_and_text(tmp_path):
    def list_names(client: TestClient, **query: object) -> list[str]:
        found = client.get("/search", params=query).json()
        assert found["count"] == len(found["items"]) + query.get("start", 0)
        return [row["name"] for row in found["items"]]

    with open_client(open_fields_session(tmp_path)) as client:
        first, second = (client.get(f"/items/{index}").json() for index in range(2))
        save(client, first, text='{"shop": "Zed"}')
        save(client, second, action="skip")
        assert list_names(client) == ["2.png", "1.png", "0.png"]
        assert list_names(client, start=1) == ["1.png", "0.png"]
        for state, name in (("corrected", "2.png"), ("skipped", "1.png"), ("open", "0.png")):
            assert list_names(client, state=state) == [name]
        assert list_names(client, text="zed") == ["2.png"]
        assert list_names(client, text="VADE") == list_names(client, text="0.PNG") == ["0.png"]
        assert list_names(client, text="vade", state="corrected") == []
        assert client.get("/search?state=other").status_code == 422
        url = client.get("/search").json()["items"][0]["url"]
        sizes = [
            Image.open(io.BytesIO(client.get(f"{url}{option}").content)).size
            for option in ("", "&small=true")
        ]
        assert sizes == [(120, 80), (96, 64)]


@pytest.mark.parametrize(("change", "text"), CASES["test_invalid_decisions_change_nothing"])
def test_invalid_decisions_change_nothing(tmp_path, change, text):
    with open_client(open_boxes_session(tmp_path)) as client:
        answer = save(client, client.get("/items/0").json(), **change)
        assert (answer.status_code, text in answer.text) == (422, True)
        assert client.get("/items").json()["counts"]["open"] == 2
        assert client.get("/items/2").status_code == 404


def test_names_and_texts_are_escaped(tmp_path):
    session = open_fields_session(tmp_path)
    session.model = '"><script>alert(1)</script>'
    with open_client(session) as client:
        for lang, text in (("en", "Save and next"), ("zh", "保存")):
            page = client.get(f"/?lang={lang}").text
            assert text in page
            assert "<script>alert" not in page


# A browser takes seconds to start and to paint each page.
def test_fields_are_labeled_by_keyboard_and_survive_a_reload(tmp_path, browser):
    def wait_for_item(name: str) -> None:
        wait_for(browser, f"document.querySelector('#name').textContent === '{name}'")

    with serve(open_fields_session(tmp_path)) as address:
        browser.visit(f"{address}/?lang=en")
        wait_for_item("2.png")
        press(browser, "Enter")
        wait_for_item("1.png")
        press(browser, "e")
        wait_for(browser, "document.activeElement.id === 'field-0'")
        browser.run("document.execCommand('insertText', false, 'Olpa');")
        press(browser, "Enter")
        wait_for_item("0.png")
        press(browser, "s")
        wait_for(browser, "document.querySelector('#counts').textContent.includes('skipped 1')")
        browser.driver.refresh()
        wait_for(browser, "document.querySelector('#counts').textContent.includes('corrected 1')")
        # The counts are shown before the item.
        wait_for(browser, "document.querySelector('#decision').textContent === 'skipped'")
        press(browser, "u")
        wait_for(browser, "document.querySelector('#counts').textContent.includes('skipped 0')")
        press(browser, "ArrowLeft")
        wait_for_item("1.png")
        assert read_answers(tmp_path / "labels") == {
            "2.png": json.dumps(FIELDS[2]),
            "1.png": json.dumps({**FIELDS[1], "shop": "Olpa"}),
        }
        check_layouts(browser, address)


def test_listed_image_is_opened_with_its_history(tmp_path, browser):
    rows = "document.querySelectorAll('#list-items button')"
    with serve(open_fields_session(tmp_path)) as address:
        browser.visit(f"{address}/?lang=en")
        wait_for(browser, "document.querySelector('#name').textContent === '2.png'")
        press(browser, "Enter")
        wait_for(browser, "document.querySelector('#name').textContent === '1.png'")
        browser.run("document.querySelector('#list').open = true;")
        wait_for(browser, f"{rows}.length === 3 && {rows}[1].ariaCurrent === 'true'")
        browser.run("document.querySelector('#list-text').focus();")
        browser.run("document.execCommand('insertText', false, 'rab');")
        wait_for(browser, f"{rows}.length === 1 && {rows}[0].innerText.includes('accepted')")
        press(browser, "Enter")  # saves nothing
        browser.run(f"{rows}[0].click();")
        wait_for(browser, "document.querySelector('#name').textContent === '2.png'")
        press(browser, "e")
        wait_for(browser, "document.activeElement.id === 'field-0'")
        browser.run("document.execCommand('insertText', false, 'Rabe');")
        press(browser, "Enter")
        wait_for(browser, "document.querySelector('#counts').textContent.includes('corrected 1')")
        assert read_answers(tmp_path / "labels") == {
            "2.png": json.dumps(FIELDS[2] | {"shop": "Rabe"})
        }
        browser.run(f"{rows}[0].click();")
        wait_for(browser, "document.querySelector('#history del')?.textContent.includes('Rab')")
        browser.run("document.querySelector('#history').open = true;")
        history = browser.run("return document.querySelector('#history').innerText;")
        assert ("Rabe" in history, history.count(MODEL)) == (True, 1)
        assert browser.find_layout_problems() == []


def test_unreadable_images_are_shown_and_skipped(tmp_path, browser):
    photos = draw_images(tmp_path)
    (photos / "0.png").write_bytes(b"no image")
    # The header of this image is readable, and its pixels are not.
    (photos / "1.png").write_bytes((photos / "1.png").read_bytes()[:50])
    session = open_session(tmp_path / "labels", MODEL, [photos], prompt="Read.")
    text = "document.querySelector('#unreadable:not([hidden])')?.textContent"
    with serve(session) as address:
        browser.visit(f"{address}/?lang=en")
        for name in ("0.png", "1.png"):
            wait_for(browser, f"document.querySelector('#name').textContent === '{name}'")
            wait_for(browser, f"{text}?.startsWith('The image cannot be read.')")
            press(browser, "s")
        wait_for(browser, "document.querySelector('#name').textContent === '2.png'")
        wait_for(browser, f"{text} === undefined")
        # Letters after a command are commands.
        counts = "document.querySelector('#counts').textContent"
        for key, count in (("s", 3), ("u", 2), ("s", 3), ("u", 2), ("u", 1)):
            press(browser, key)
            wait_for(browser, f"{counts}.includes('skipped {count}')")
            while run_in_page(browser, "return page.isSaving;"):
                browser.settle()
        assert browser.run("return document.activeElement.id;") == ""
        run_in_page(browser, "return page.open(2);")
        browser.driver.refresh()
        # The empty text of a readable image has the focus: letters are no commands.
        wait_for(browser, "document.activeElement.id === 'answer'")
        press(browser, "s")
        wait_for(browser, "document.querySelector('#answer').value === 's'")


def test_suggestions_are_accepted_at_once_and_reopened(tmp_path, browser):
    with serve(open_fields_session(tmp_path)) as address:
        browser.visit(f"{address}/?lang=en")
        wait_for(browser, "document.querySelector('#name').textContent === '2.png'")
        browser.run("document.querySelector('#min-confidence').value = 75;")
        browser.click("#bulk button")
        wait_for(browser, "document.querySelector('#notice').textContent === 'Accepted: 2'")
        # The image with the uncertain suggestion stays open.
        assert browser.read_texts("#name") == ["2.png"]
        assert read_answers(tmp_path / "labels").keys() == {"0.png", "1.png"}
        browser.click("#undo")
        wait_for(browser, "document.querySelector('#notice').textContent === 'Reopened: 2'")
        wait_for(browser, "document.querySelector('#done').textContent.startsWith('0 of 3')")
        assert (tmp_path / "labels" / LABELS_FILE).read_bytes() == b""
        assert browser.messages() == []


def test_uncertain_suggestions_are_hidden(tmp_path, browser):
    with serve(open_fields_session(tmp_path)) as address:
        browser.visit(f"{address}/?lang=en")
        first = "document.querySelector('#field-0')?.value"
        wait_for(browser, f"{first} !== undefined && {first} !== ''")
        for value, shown, text in ((101, False, "off"), (0, True, "0 %")):
            browser.run(
                f"const slider = document.querySelector('#threshold'); slider.value = {value};"
                " slider.dispatchEvent(new Event('input', { bubbles: true }));"
            )
            wait_for(browser, f"({first} !== '') === {str(shown).lower()}")
            assert browser.read_texts("#threshold-value") == [text]
            assert browser.run("return document.querySelector('#reset').hidden;")
        assert browser.messages() == []


def test_image_is_zoomed_and_moved(tmp_path, browser):
    scale = "return document.querySelector('#image').getBoundingClientRect()"
    with serve(open_boxes_session(tmp_path)) as address:
        browser.visit(f"{address}/?lang=en")
        wait_for(browser, "document.querySelectorAll('#overlay rect').length === 2")
        before = browser.run(f"{scale}.width;")
        press(browser, "+")
        assert browser.run(f"{scale}.width;") == pytest.approx(1.5 * before, rel=0.01)
        browser.run(
            "const stage = document.querySelector('#stage'), { left, top } = "
            "stage.getBoundingClientRect(); const at = { clientX: left + 9, clientY: top + 9, "
            "bubbles: true, cancelable: true }; for (let i = 0; i < 3; i++) "
            "stage.dispatchEvent(new WheelEvent('wheel', { ...at, deltaY: -400 }));"
        )
        assert browser.run(f"{scale}.width;") == pytest.approx(16 * before, rel=0.01)
        left = browser.run(f"{scale}.left;")
        browser.run(
            "const stage = document.querySelector('#overlay'), { left, top } = document"
            ".querySelector('#stage').getBoundingClientRect(); const send = (name, x) => "
            "stage.dispatchEvent(new PointerEvent(name, { clientX: left + x, clientY: top + 9, "
            "pointerId: 1, pointerType: 'mouse', shiftKey: true, bubbles: true, "
            "cancelable: true }));"
            "send('pointerdown', 50); send('pointermove', 40); send('pointerup', 40);"
        )
        assert browser.run(f"{scale}.left;") == pytest.approx(left - 10, abs=1)
        for _ in range(8):
            browser.click("#zoom-out")
        assert browser.run(f"{scale}.width;") == pytest.approx(before)
        assert browser.count("#overlay rect") == 2
        assert browser.messages() == []


def test_accepting_at_once_hides_no_error_and_undoes_no_other_decision(tmp_path, monkeypatch):
    def fill_disk(path: Path, line: str) -> None:
        with translate_os_errors(path):
            raise OSError(ENOSPC, "full")

    accept = {"action": "accept", "min_confidence": 0.75}
    with open_client(open_fields_session(tmp_path)) as client:
        with monkeypatch.context() as patch:
            patch.setattr(label_store, "append_line", fill_disk)
            assert "no space left" in client.post("/decisions", json=accept).text
        (tmp_path / "labels").rename(tmp_path / "moved")
        assert "moved or deleted" in client.post("/decisions", json=accept).text
        (tmp_path / "moved").rename(tmp_path / "labels")
        accepted = client.post("/decisions", json=accept).json()["items"]
        assert [index for index, _ in accepted] == [1, 2]
        # Another tab decides again.
        save(client, client.get("/items/1").json(), text='{"a": 1}')
        undo = client.post("/decisions", json={"action": "reopen", "items": accepted}).json()
        assert [index for index, _ in undo["items"]] == [2]
        assert client.get("/items/1").json()["decision"] == "corrected"
        assert len(read_answers(tmp_path / "labels")) == 1


def drag(browser: Browser, *corners: tuple[int, int]) -> None:
    """Drag the mouse between two corners in pixels of the image."""
    area = browser.run(
        "const area = document.querySelector('#overlay').getBoundingClientRect();"
        "return [area.left, area.top, area.width / 120];"
    )
    start, end = ((area[0] + x * area[2], area[1] + y * area[2]) for x, y in corners)
    for kind, (x, y) in (("Pressed", start), ("Moved", end), ("Released", end)):
        event = {"type": f"mouse{kind}", "x": x, "y": y, "button": "left", "buttons": 1}
        event["clickCount"] = 1
        browser.driver.execute_cdp_cmd("Input.dispatchMouseEvent", event)


def test_boxes_are_edited_by_keyboard_and_mouse(tmp_path, browser):
    with serve(open_boxes_session(tmp_path)) as address:
        browser.visit(f"{address}/?lang=en")
        wait_for(browser, "document.querySelectorAll('#overlay rect').length === 2")
        press(browser, "b")
        press(browser, "ArrowRight", 2)  # Ctrl: by 10 pixels
        press(browser, "ArrowRight", 8)  # Shift: the lower right corner
        press(browser, "2")
        press(browser, "b")
        press(browser, "Delete")
        drag(browser, *DRAGGED)
        wait_for(browser, "document.querySelectorAll('#overlay rect').length === 2")
        press(browser, "Enter")
        wait_for(browser, "!error.hidden && error.textContent.includes('box 2 has no class')")
        press(browser, "1")
        press(browser, "Enter")
        wait_for(browser, "document.querySelector('#counts').textContent.includes('corrected 1')")
        wait_for(browser, "document.querySelector('#name').textContent === '1.png'")
        press(browser, "Enter")
        wait_for(browser, "document.querySelector('#counts').textContent.includes('accepted 1')")
        check_layouts(browser, address)
    corrected, accepted = (
        one.messages[-1].content for one in read_samples(tmp_path / "labels" / LABELS_FILE)
    )
    assert [box.xyxy for box in accepted] == list(CORNERS)
    assert [box.label for box in corrected] == ["total", "shop"]
    assert corrected[0].xyxy == (20, 20, 51, 50)
    assert corrected[1].xyxy == pytest.approx((*DRAGGED[0], *DRAGGED[1]), abs=1)


def test_points_are_reviewed_and_undone(tmp_path, browser):
    source = write_boxes(tmp_path, ("left", "right"), (30, 40))
    options = {"choices": ("left", "right"), "review": True}
    with serve(open_session(tmp_path / "labels", MODEL, [source], **options)) as address:
        browser.visit(f"{address}/?lang=en")
        wait_for(browser, "document.querySelectorAll('#overlay circle[stroke]').length === 1")
        press(browser, "b")
        press(browser, "ArrowRight", 2)  # Ctrl: by 10 pixels
        drag(browser, DRAGGED[0], DRAGGED[0])
        wait_for(browser, "document.querySelectorAll('#overlay circle[stroke]').length === 2")
        press(browser, "2")
        press(browser, "Enter")
        wait_for(browser, "document.querySelector('#counts').textContent.includes('corrected 1')")
        wait_for(browser, "document.querySelector('#name').textContent === '1.png'")
        press(browser, "Enter")
        wait_for(browser, "document.querySelector('#counts').textContent.includes('accepted 1')")
        press(browser, "u")
        wait_for(browser, "document.querySelector('#counts').textContent.includes('open 1')")
        press(browser, "Delete")
        check_layouts(browser, address)
    corrected, kept = read_samples(tmp_path / "labels" / LABELS_FILE)
    (moved, added), (point,) = corrected.messages[-1].content, kept.messages[-1].content
    assert {moved.type, added.type, point.type} == {"point"}
    assert (moved.xyxy, point.xyxy) == ((40, 40) * 2, (30, 40) * 2)
    assert added.xyxy == pytest.approx(DRAGGED[0] * 2, abs=1)
    # The journal has the points, too.
    with open_session(tmp_path / "labels", MODEL, [source], **options).store as store:
        assert store.find("s0").decision.content == (moved, added)


def write_boxes(folder: Path, labels: Sequence[str], xy: tuple[int, int] | None = None) -> Path:
    """Write samples with one box or point of these labels, and a question around the image."""
    photos, samples = draw_images(folder, len(labels)), []
    for index, label in enumerate(labels):
        question = f"Find {label} in ", f"{photos}/{index}.png", "."
        answer = create_region(xy * 2 if xy else CORNERS[0], label, is_point=xy is not None)
        samples.append(make_sample(f"s{index}", folder, *question, answer=[answer]).sample)
    write_samples(folder / "data.jsonl", samples)
    return folder / "data.jsonl"


def test_question_of_each_sample_is_shown_and_corrected(tmp_path, browser):
    source = write_boxes(tmp_path, ("a red car", "the left dog", "two cups"))
    out = tmp_path / "labels"
    session = open_session(out, MODEL, [source], review=True)
    session.complete_task()
    texts = "[...document.querySelectorAll('#question textarea')].map((one) => one.value)"
    with serve(session) as address:
        browser.visit(f"{address}/?lang=en")
        wait_for(browser, "document.querySelectorAll('#question textarea').length === 2")
        assert browser.run(f"return {texts};") == ["Find a red car in ", "."]
        browser.run("document.querySelector('#question textarea').select();")
        browser.run("document.execCommand('insertText', false, 'Find a blue car in ');")
        press(browser, "Enter")
        wait_for(browser, "document.querySelector('#name').textContent === '1.png'")
        assert browser.run(f"return {texts};") == ["Find the left dog in ", "."]
        check_layouts(browser, address)
    for _ in range(2):
        first, second, _ = read_samples(out / LABELS_FILE)
        parts = [getattr(part, "text", part.type) for part in first.messages[0].content]
        assert parts == ["Find a blue car in ", "image", "."]
        assert first.meta == {"original_prompt": "Find a red car in ."}
        assert second.meta == {}
        # The next session shows the corrected question, and cannot empty it.
        with open_client(open_session(out, MODEL, [source], review=True)) as client:
            assert "one by one" in client.post("/decisions", json={"action": "accept"}).text
            item, other = (client.get(f"/items/{index}").json() for index in range(2))
            assert (item["decision"], item["question"][0]) == ("corrected", "Find a blue car in ")
            refused = save(client, item, boxes=item["answer"]["boxes"], question=["", " "])
            assert (refused.status_code, "the prompt is empty" in refused.text) == (422, True)
            assert save(client, other, action="skip").status_code == 200


@pytest.mark.parametrize(
    ("make_image", "reason"), [(make_jpeg2000, "CPU time"), (make_progressive_jpeg, "scans")]
)
def test_hostile_image_is_decoded_within_limits(tmp_path, monkeypatch, make_image, reason):
    monkeypatch.setattr(image_reader, "MAX_IMAGE_CPU_S", 0.1)
    photos = draw_images(tmp_path)
    (photos / "0.png").write_bytes(make_image())
    session = open_session(tmp_path / "labels", MODEL, [photos], prompt="Read.")
    with open_client(session) as client:
        answers = [client.get(f"/images/{i}/0?small={s}") for i in range(2) for s in (True, False)]
        assert [answer.status_code for answer in answers] == [422, 422, 200, 200]
        assert reason in answers[0].text
        assert client.get("/items/0").json()["images"][0]["width"] > 1
    model = load_inference_model(TINY_MODEL, device="cpu")
    session = open_session(tmp_path / "labels", MODEL, [photos], prompt="Read.")
    with session.store:
        suggest = partial(suggest_labels, model, max_new_tokens=2)
        reasons = session.add_suggestions(suggest)
    assert [*reasons] == [str(photos / "0.png")]
    assert reason in reasons[str(photos / "0.png")]


@pytest.mark.parametrize(
    "body",
    [
        b'{"id": "a", "action": "save", "boxes": [{"xyxy": [NaN, 0, 1, 1]}]}',
        b'{"id": "a", "action": "save", "boxes": [{"xyxy": [0, 0, 1, 1e999]}]}',
        b'{"id": "KNOWN", "action": "save", "text": "\\ud800"}',
        b'{"id": "KNOWN", "action": "save", "text": "a", "question": ["\\ud800"]}',
        b'{"id": "KNOWN", "action": "save", "text": "{}", "edits": {"0": "\\udc00"}}',
        b'{"id": "KNOWN", "action": "save", "boxes": [{"label": "\\ud800", "xyxy": [1, 1, 9, 9]}]}',
        b'{"id": "\\ud800\\u0000", "action": "skip"}',
        b'{"id": "a", "action": NaN, "edits": {"9": Infinity}}',
        b"[" * 100_000,
        b'"\xff"',
    ],
)
def test_invalid_decision_is_an_error_of_the_user(tmp_path, body):
    photos = draw_images(tmp_path)
    session = open_session(tmp_path / "labels", MODEL, [photos], prompt="Read.", kind="text")
    with open_client(session) as client:
        known = json.dumps(client.get("/items/0").json()["id"])[1:-1].encode()
        body = body.replace(b"KNOWN", known)
        answer = client.post(
            "/decision", content=body, headers={"content-type": "application/json"}
        )
        assert answer.status_code in (400, 422), answer.text
        assert {"error", "detail"} & answer.json().keys()
        assert client.get("/items").json()["counts"]["open"] == 3


DELAY_SCRIPT = """window.realFetch ??= window.fetch;
window.fetch = async (url, options) => {
  const late = url === URL_TO_DELAY && IS_LATE ? await window.realFetch(url, options) : null;
  if (url === URL_TO_DELAY) await new Promise((resolve) => { window.release = resolve; });
  return late ?? window.realFetch(url, options);
};"""

TYPE_SCRIPT = """const input = document.querySelector("#form :is(input, textarea)");
input.value = TEXT;
input.dispatchEvent(new Event("input"));"""


def open_texts_session(folder: Path, **options: Any) -> LabelSession:
    """Open a session with the suggested texts a0, a1 and a2, in this order."""
    return open_suggested_session(folder, "a0", "a1", "a2", **options)


def delay(browser: Browser, url: str, *, is_late: bool = False) -> None:
    """Delay the requests of a URL, or only their responses, until `release` is called."""
    script = DELAY_SCRIPT.replace("URL_TO_DELAY", repr(url))
    browser.run(f"window.release = null; {script.replace('IS_LATE', json.dumps(is_late))}")


def release(browser: Browser) -> None:
    wait_for(browser, "window.release")
    browser.run("window.release();")


def type_text(browser: Browser, text: str) -> None:
    browser.run(TYPE_SCRIPT.replace("TEXT", json.dumps(text)))


def get_value(browser: Browser) -> Any:
    return browser.run("return document.querySelector('#form :is(input, textarea)').value;")


def wait_for_name(browser: Browser, name: str) -> None:
    wait_for(browser, f"document.querySelector('#name').textContent === '{name}'")


def open_image(browser: Browser, index: int) -> None:
    run_in_page(browser, f"return page.open({index});")
    wait_for_name(browser, f"{index}.png")


def test_typed_text_survives_saving_and_late_requests(tmp_path, browser):
    count = "document.querySelector('#counts').textContent.includes('corrected {}')"
    with serve(open_texts_session(tmp_path)) as address:
        browser.visit(f"{address}/?lang=en")
        wait_for_name(browser, "0.png")
        # The answer to the first of two requests comes last.
        delay(browser, "items/1")
        run_in_page(browser, "page.open(1); page.open(2);")
        wait_for_name(browser, "2.png")
        release(browser)
        browser.settle()
        wait_for_name(browser, "2.png")
        # Text that is typed while it is saved remains, with its field.
        delay(browser, "decision")
        type_text(browser, "v1")
        run_in_page(browser, "page.decide('save');")
        type_text(browser, "v1 and more")
        release(browser)
        wait_for(browser, count.format(1))
        wait_for(browser, "document.querySelector('#notice').textContent.startsWith('Saved')")
        assert (get_value(browser), read_answers(tmp_path / "labels")) == (
            "v1 and more",
            {"2.png": "v1"},
        )
        # Another image that was opened while an answer is saved stays open.
        open_image(browser, 0)
        type_text(browser, "first")
        run_in_page(browser, "page.decide('save');")
        open_image(browser, 1)
        type_text(browser, "second")
        release(browser)
        wait_for(browser, count.format(2))
        wait_for_name(browser, "1.png")
        browser.driver.refresh()
        wait_for_name(browser, "1.png")
        assert get_value(browser) == "second"
        for index, text in ((0, "first"), (2, "v1 and more")):
            open_image(browser, index)
            assert get_value(browser) == text
        assert browser.run("return document.querySelector('#hint').innerText;").endswith("a2")
        # The list names images with unsaved answers, and a reset drops them.
        browser.run("document.querySelector('#list').open = true;")
        unsaved = "document.querySelectorAll('#list .draft').length"
        wait_for(browser, f"{unsaved} === 2")
        run_in_page(browser, "document.querySelector('#reset').click(); return page.showList();")
        wait_for(browser, f"{unsaved} === 1")
        assert get_value(browser) == "v1"


def test_stale_page_overwrites_no_decision(tmp_path, browser):
    with open_client(open_texts_session(tmp_path)) as client:
        item = client.get("/items/0").json()
        save(client, item, revision=item["revision"], text="other tab")
        for values in ({"text": "a0"}, {"action": "skip"}, {"action": "reopen"}):
            refused = save(client, item, revision=item["revision"], **values)
            assert (refused.status_code, "another tab" in refused.text) == (422, True)
            headers = {"accept-language": "zh-Hans"}
            body = {"id": item["id"], "action": "save", "revision": 1, "text": "a0"}
            assert "另一个标签页" in client.post("/decision", json=body, headers=headers).text
    assert read_answers(tmp_path / "labels") == {"0.png": "other tab"}
    session = open_texts_session(tmp_path)
    with serve(session) as address:
        browser.visit(f"{address}/?lang=en#1")
        wait_for_name(browser, "1.png")
        type_text(browser, "mine")
        session.store.skip(session.store.items[1].sample.sample.id)
        press(browser, "Enter")
        wait_for(browser, "document.querySelector('#error').textContent.includes('another tab')")
        session.store.skip(session.store.items[2].sample.sample.id)
        open_image(browser, 2)
        # The counts follow the decisions of other tabs.
        wait_for(browser, "document.querySelector('#counts').textContent.includes('skipped 2')")
        wait_for(browser, "!document.querySelector('#finished').hidden")
        open_image(browser, 1)
        assert get_value(browser) == "mine"


def test_late_counts_replace_no_newer_ones(tmp_path, browser):
    counts = "document.querySelector('#counts').textContent"
    session = open_texts_session(tmp_path)
    with serve(session) as address:
        browser.visit(f"{address}/?lang=en")
        wait_for_name(browser, "0.png")
        # Another tab skips an image, so the page asks for the decisions when it opens it.
        session.store.skip(session.store.items[1].sample.sample.id)
        delay(browser, "items", is_late=True)
        open_image(browser, 1)
        wait_for(browser, "window.release")
        open_image(browser, 0)
        press(browser, "Enter")
        wait_for(browser, f"{counts}.includes('accepted 1')")
        release(browser)
        browser.settle()
        assert browser.run(f"return {counts}.includes('accepted 1');")
        assert browser.run(f"return {counts}.includes('skipped 1');")


def test_unsaved_answers_belong_to_a_session(tmp_path, browser):
    keys = set()
    for prompt, names in (("Which color?", ()), ("Which size?", ()), ("Read.", ("shop", "total"))):
        options = {"kind": "fields", "field_names": names} if names else {}
        with open_client(open_texts_session(tmp_path, prompt=prompt, **options)) as client:
            keys.add(client.get("/").text.split("&#34;session&#34;: &#34;")[1][:16])
    assert len(keys) == 3
    options = {"kind": "fields", "prompt": "Read."}
    session = open_session(tmp_path / "new", MODEL, [tmp_path / "photos"], **options)
    session.complete_task()
    with serve(session) as address:
        browser.visit(f"{address}/?lang=en")
        wait_for_name(browser, "0.png")
        open_image(browser, 1)
        type_text(browser, '{"shop": "typed on 1"}')
        open_image(browser, 0)
        type_text(browser, '{"shop": "zero", "total": 1}')
        press(browser, "Enter")
        # The first object gives the next images fields, and an object that was typed remains.
        wait_for_name(browser, "1.png")
        assert get_value(browser) == '{"shop": "typed on 1"}'
        open_image(browser, 2)
        press(browser, "e")
        wait_for(browser, "document.activeElement.id === 'field-0'")
        # An edit belongs to the name of its field, whatever the order of the fields.
        browser.run("document.execCommand('insertText', false, 'Olp');")
        assert run_in_page(browser, "return page.answer.edits;") == {'["shop"]': "Olp"}
        # The next key does not replace a restored edit.
        browser.driver.refresh()
        wait_for(browser, "document.querySelector('#field-0')?.value === 'Olp'")
        assert browser.run("return document.activeElement.id;") == ""
        press(browser, "e")
        press(browser, "Enter")
        wait_for(browser, "document.activeElement.id === 'field-1'")
        browser.run("document.execCommand('insertText', false, '1,5');")
        note = "document.querySelectorAll('#form .note')[1].textContent"
        wait_for(browser, f"{note} === 'text, not a number'")
        press(browser, "Enter")
        wait_for(browser, "document.querySelector('#counts').textContent.includes('written 2')")
    assert read_answers(tmp_path / "new") == {
        "0.png": '{"shop": "zero", "total": 1}',
        "2.png": '{"shop": "Olp", "total": "1,5"}',
    }


def test_undo_needs_the_server_and_survives_a_reload(tmp_path, browser):
    notice, decision = ("document.querySelector('#notice')", "document.querySelector('#decision')")
    with serve(open_texts_session(tmp_path)) as address:
        browser.visit(f"{address}/?lang=en")
        wait_for_name(browser, "0.png")
        assert browser.run("return document.querySelector('#undo').disabled;")
        press(browser, "u")
        wait_for(browser, f"{notice}.textContent === 'Nothing to undo'")
        press(browser, "Enter")
        wait_for_name(browser, "1.png")
        browser.driver.refresh()
        wait_for_name(browser, "1.png")
        browser.run(
            "window.realFetch = window.fetch; window.fetch = async (url, options) => {"
            "if (url === 'decision') throw new TypeError(); return realFetch(url, options);};"
        )
        press(browser, "u")
        wait_for(browser, "!document.querySelector('#error').hidden")
        assert browser.run(f"return {decision}.textContent;") == "accepted"
        run_in_page(browser, "window.fetch = window.realFetch; return page.open(1);")
        press(browser, "u")
        wait_for(browser, f"{notice}.textContent === 'Undone: accepted · 0.png'")
        assert browser.run(f"return [{decision}.textContent, undo.disabled];")[0] == "open"
        browser.run("window.fetch = async () => { throw new TypeError(); };")
        run_in_page(browser, "return page.open(2);")
        error = browser.run("return document.querySelector('#error').textContent;")
        assert error == "Not loaded: The server does not answer."


def test_only_classes_are_saved(tmp_path, browser):
    names = ("a1", *(f"class {number}" for number in range(2, 13)))
    error, note = "document.querySelector('#error')", "document.querySelector('#form .note')"
    with serve(open_texts_session(tmp_path, choices=names, kind="classes")) as address:
        browser.visit(f"{address}/?lang=zh")
        wait_for(browser, f"{note}?.textContent.includes('a0')")
        press(browser, "Enter")
        wait_for(browser, f"{error}.textContent.includes('请选择类别')")
        press(browser, "2")
        assert browser.count(".choices button") == len(names)
        assert browser.read_texts(".choices [aria-pressed=true]") == ["2 class 2"]
        press(browser, "Enter")
        wait_for_name(browser, "1.png")
        assert browser.run("return document.querySelector('#confidence').textContent;")
        browser.click(".choices button:nth-of-type(3)")
        assert browser.run("return document.activeElement.innerText;") == "3 class 3"
        assert browser.run("return document.querySelector('#confidence').textContent;") == ""
        press(browser, "Enter")
        wait_for_name(browser, "2.png")
        press(browser, "s")
        # The finished state is that of the server.
        for is_reloaded in (False, True):
            if is_reloaded:
                browser.driver.refresh()
            wait_for(browser, "!document.querySelector('#finished').hidden")
            assert "3" in browser.run("return document.querySelector('#all-decided').innerText;")
            assert browser.run("return document.querySelector('#save-text').innerText;") == "保存"
        # The decisions that this tab knows may be older than the counts.
        open_image(browser, 0)
        run_in_page(
            browser, "page.decisions.fill('accepted'); document.querySelector('#review').click();"
        )
        wait_for_name(browser, "2.png")
        wait_for(browser, "document.querySelectorAll('#list-items li').length === 1")
        check_layouts(browser, address)
    assert read_answers(tmp_path / "labels") == {"0.png": names[1], "1.png": names[2]}


def open_review(folder: Path, **options: Any) -> LabelSession:
    """Open a review of the classes red, rare and red."""
    with open_client(open_texts_session(folder)) as client:
        for index, text in enumerate(("red", "rare", "red")):
            save(client, client.get(f"/items/{index}").json(), text=text)
    options = {"kind": "classes", "review": True} | options
    session = open_session(folder / "reviewed", MODEL, [folder / "labels" / LABELS_FILE], **options)
    session.complete_task()
    return session


def test_other_classes_are_saved(tmp_path, browser):
    pressed = "document.querySelector('.choices [aria-pressed=true]')?.lastChild.data ?? ''"
    state = f"[page.answer.text, document.querySelector('#other').value, {pressed}]"
    other = "document.querySelector('#other')"
    with serve(open_review(tmp_path)) as address:
        browser.visit(f"{address}/?lang=zh")
        wait_for(browser, f"{other}?.labels[0].textContent === '其他类别'")
        browser.run(f"{other}.focus();")
        browser.run("document.execCommand('insertText', false, 'rare');")
        assert run_in_page(browser, f"return {state};") == ["rare", "rare", "rare"]
        browser.run("document.execCommand('insertText', false, ' one');")
        assert run_in_page(browser, f"return {state};") == ["rare one", "rare one", ""]
        press(browser, "Escape")
        press(browser, "1")
        assert run_in_page(browser, f"return {state};") == ["red", "", "red"]
        browser.run(f"{other}.focus();")
        browser.run("document.execCommand('insertText', false, 'pink');")
        press(browser, "Enter")
        wait_for(browser, "document.querySelector('#counts').textContent.includes('已修正 1')")
    assert "pink" in read_answers(tmp_path / "reviewed").values()


def test_reviewed_samples_may_keep_their_class(tmp_path):
    with open_client(open_review(tmp_path, choices=("red", "blue"))) as client:
        items = [client.get(f"/items/{index}").json() for index in range(3)]
        item = next(one for one in items if one["answer"]["text"] == "rare")
        assert item["choices"] == ["red", "blue", "rare"]
        assert save(client, item, text="rare").json()["item"]["decision"] == "accepted"
        for text, known in (("other", item), ("rare", items[item["index"] - 1])):
            refused = save(client, known, text=text)
            assert (refused.status_code, "not one of the classes" in refused.text) == (422, True)
