"""Tests that unsaved answers and decisions of other tabs are not lost on the labelling page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, wait_for
from label_fixtures import (
    MODEL,
    check_layouts,
    draw_images,
    make_suggestion,
    open_client,
    press,
    read_answers,
    run_in_page,
    save,
    serve,
)

from finesight.label.label_session import LabelSession, open_session
from finesight.label.label_store import LABELS_FILE

DELAY_SCRIPT = """window.realFetch ??= window.fetch;
window.fetch = async (url, options) => {
  if (url === URL_TO_DELAY) await new Promise((resolve) => { window.release = resolve; });
  return window.realFetch(url, options);
};"""
TYPE_SCRIPT = """const input = document.querySelector("#form :is(input, textarea)");
input.value = TEXT;
input.dispatchEvent(new Event("input"));"""


def open_texts_session(folder: Path, **options: Any) -> LabelSession:
    """Open a session with the suggested texts a0, a1 and a2, in this order."""
    photos = folder / "photos"
    if not photos.exists():
        draw_images(folder)
    options = {"prompt": "Read."} | options
    session = open_session(folder / "labels", MODEL, [photos], **options)
    suggestions = [make_suggestion(str(photos / f"{i}.png"), f"a{i}", 0.9) for i in range(3)]
    session.store.add_suggestions([(one, None) for one in suggestions], MODEL)
    session.complete_task()
    return session


def delay(browser: Browser, url: str) -> None:
    """Delay the requests of a URL until `release` is called."""
    browser.run(f"window.release = null; {DELAY_SCRIPT.replace('URL_TO_DELAY', repr(url))}")


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


@pytest.mark.parametrize(("num_classes", "control"), [(3, "input[type=radio]"), (12, "option")])
def test_only_classes_are_saved(tmp_path, browser, num_classes, control):
    names = ("a1", *(f"class {number}" for number in range(2, num_classes + 1)))
    error, note = "document.querySelector('#error')", "document.querySelector('#form .note')"
    with serve(open_texts_session(tmp_path, choices=names, kind="classes")) as address:
        browser.visit(f"{address}/?lang=zh")
        wait_for(browser, f"{note}?.textContent.includes('a0')")
        press(browser, "Enter")
        wait_for(browser, f"{error}.textContent.includes('请选择类别')")
        press(browser, "2")
        count = browser.run(f"return document.querySelectorAll('#form {control}').length;")
        assert count == num_classes
        press(browser, "Enter")
        wait_for_name(browser, "1.png")
        assert browser.run("return document.querySelector('#confidence').textContent;")
        press(browser, "3")
        assert browser.run("return document.querySelector('#confidence').textContent;") == ""
        press(browser, "Enter")
        wait_for_name(browser, "2.png")
        press(browser, "s")
        # The finished state is that of the server.
        for _ in range(2):
            wait_for(browser, "!document.querySelector('#finished').hidden")
            assert "3" in browser.run("return document.querySelector('#all-decided').innerText;")
            assert browser.run("return document.querySelector('#save-text').innerText;") == "保存"
            browser.driver.refresh()
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
    state = "[page.answer.text, other.value, document.querySelector('#form :checked')?.value ?? '']"
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
