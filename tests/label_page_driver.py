"""Requests of the labelling page, and its keys in a browser."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from axe import AxeChecker
from browser import Browser
from starlette.testclient import TestClient

from finesight.app.access import Access
from finesight.app.label_page import make_label_app
from finesight.data.sample import read_samples
from finesight.label.label_session import LabelSession
from finesight.label.label_store import LABELS_FILE
from finesight.vision.image_reader import create_image_pool

WAIT_TIMEOUT_S = 30


@contextmanager
def open_client(session: LabelSession, password: str | None = None) -> Iterator[TestClient]:
    pool = create_image_pool()
    app = make_label_app(session, Access(password), pool)
    with closing(pool), session.store, TestClient(app, "http://127.0.0.1") as client:
        yield client


def read_answers(folder: Path) -> dict[str, str]:
    samples = read_samples(folder / LABELS_FILE)
    return {Path(one.id).name: one.messages[-1].content[0].text for one in samples}


def save(client: TestClient, item: dict[str, Any], **values: object) -> Any:
    return client.post("/decision", json={"id": item["id"], "action": "save", **values})


@contextmanager
def serve(session: LabelSession) -> Iterator[str]:
    pool = create_image_pool()
    app = make_label_app(session, Access(), pool)
    config = uvicorn.Config(app, port=0, log_level="critical")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.02)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        session.store.close()
        pool.close()


def wait_for(browser: Browser, condition: str) -> None:
    end = time.monotonic() + WAIT_TIMEOUT_S
    while not browser.run(f"return !!({condition});"):
        text = browser.run("return document.body.innerText;")
        assert time.monotonic() < end, f"not within {WAIT_TIMEOUT_S} s: {condition}\n{text}"
        time.sleep(0.02)


def run_in_page(browser: Browser, script: str) -> Any:
    """Run a function body with the exports of the page's script as `page`."""
    url = 'new URL("static/label.js", document.baseURI)'
    return browser.run(f"return import({url}).then((page) => {{ {script} }});")


def press(browser: Browser, key: str, modifiers: int = 0) -> None:
    """Press a key with modifiers: 2 for Ctrl, 8 for Shift."""
    code = {"Enter": 13, "Escape": 27, "Delete": 46, "ArrowLeft": 37, "ArrowRight": 39}
    values: dict[str, Any] = {"key": key, "modifiers": modifiers}
    values |= {"text": key} if len(key) == 1 else {"windowsVirtualKeyCode": code[key]}
    for kind in ("keyDown", "keyUp"):
        browser.driver.execute_cdp_cmd("Input.dispatchKeyEvent", {"type": kind, **values})


def check_layouts(browser: Browser, address: str) -> None:
    checker = AxeChecker()
    for lang in ("en", "zh"):
        browser.visit(f"{address}/?lang={lang}")
        wait_for(browser, "document.querySelector('#form .row')")
        wait_for(browser, "document.querySelector('#image').naturalWidth")
        assert checker.find_layout_problems(browser) == [], lang
        assert browser.messages() == []
