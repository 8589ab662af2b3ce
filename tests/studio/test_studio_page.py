"""Tests of the studio page: access without a browser, and the way to a chat reply in one."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from axe import AxeChecker
from browser import Browser
from chat_page_driver import ChatPageDriver
from comparison_fixtures import make_run, make_sign_answers
from fastapi.testclient import TestClient

from finesight.errors import UserError
from finesight.serve.request_middleware import read_api_keys
from finesight.studio.studio_jobs import JobStore
from finesight.studio.studio_page import ServerAccess, StudioPage, make_studio_app
from finesight.studio.studio_view import STEPS, Selection, StudioView
from finesight.studio.workspace import Workspace
from finesight.web.web_server import create_private_folder

WAIT_TIMEOUT_S = 60.0

GRADIO_NOTES = ("AbortError", "Method not implemented.")
"""Messages of Gradio about requests that end with the page, and about the end of an upload."""


@contextmanager
def open_client(folder: Path, password: str | None = None) -> Iterator[TestClient]:
    with create_private_folder() as private_folder:
        access = ServerAccess(password=password)
        app = make_studio_app(StudioView(Workspace(folder)), private_folder, access, True)
        yield TestClient(app, base_url="http://127.0.0.1", follow_redirects=False)


def test_every_page_requires_the_password(folder: Path) -> None:
    with open_client(folder, "right-password") as client:
        paths = ("/live", "/view/report?run=a", "/view/check", "/studio.css", "/config")
        assert [client.get(path).status_code for path in paths] == [401] * len(paths)
        assert client.get("/").headers["location"] == "sign-in"
        assert client.get("/page.css").status_code == 200
        client.post("/sign-in", content="password=right-password")
        assert "finesight-studio-0" in client.cookies
        assert client.get("/live").status_code == 200


def test_only_runs_of_the_workspace_are_shown(folder: Path) -> None:
    for name in ("runs/a", "runs/b", "../outside"):
        make_run(folder / name, make_sign_answers(folder, [0.5, 1.0] * 4))
    (folder / "link").symlink_to(folder.parent)
    with open_client(folder) as client:
        for query in ("run=runs/a", "run=runs/a&run=runs/b", "run=runs/a&run=../outside"):
            page = client.get(f"/view/report?{query}&lang=zh")
            assert (page.status_code, 'lang="zh-Hans"' in page.text) == (200, True), query
            assert "sandbox allow-scripts" in page.headers["content-security-policy"]
        for query in ("run=../outside", "run=link/outside", f"run={folder.parent}/outside", ""):
            assert client.get(f"/view/report?{query}").status_code == 404, query
        assert client.get("/view/check?data=photos").status_code == 404
        assert client.get("/view/other").status_code == 404
        assert ">../outside<" not in client.get("/live?step=results&run=../outside").json()["top"]


@pytest.mark.parametrize("converter", [None, Path("/convert.py")])
def test_only_the_converter_of_the_command_line_runs(folder: Path, converter: Path | None) -> None:
    page = StudioPage(StudioView(Workspace(folder)), ServerAccess(converter=converter))
    texts = [str(block.value) for block in page.blocks.blocks.values() if hasattr(block, "value")]
    assert ("Write GGUF" in texts) == (converter is not None)
    assert not any("convert" in (block.elem_id or "") for block in page.blocks.blocks.values())
    with open_client(folder) as client:
        assert "--converter convert_hf" in client.get("/live?step=export").json()["top"]


def test_file_names_are_escaped(folder: Path) -> None:
    (folder / "<b>.yaml").write_text("model: finesight-tiny\ndata: {train: a.jsonl}\n")
    with open_client(folder) as client:
        for step in STEPS:
            page = client.get(f"/live?step={step}&recipe=<b>.yaml&job=<b>").json()
            assert "<b>" not in page["top"] + page["bottom"], step


def test_url_names_the_shown_items_and_actions_use_no_others(folder: Path) -> None:
    (folder / "a.yaml").write_text("model: finesight-tiny\ndata: {train: a.jsonl}\n")
    view = StudioView(Workspace(folder))
    with open_client(folder) as client:
        for query, shown in (("", "a.yaml"), ("&recipe=b.yaml", "b.yaml")):
            url = client.get(f"/live?step=train{query}").json()["url"]
            assert url == f"./?step=train&recipe={shown}&lang=en"
    for selection, recipe in ((Selection(recipe="a.yaml"), Path("a.yaml")), (Selection(), None)):
        assert view.read_state(selection, use_newest=False).recipe == recipe


@pytest.mark.parametrize("password", ["right-password", None])
def test_served_api_needs_a_key_if_the_studio_has_a_password(
    folder: Path, password: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(folder / "runs/a", make_sign_answers(folder, [0.5, 1.0]))
    view = StudioView(Workspace(folder))
    started: list[list[str]] = []

    def start(step: str, target: str, arguments: list[str], **options: object) -> SimpleNamespace:
        started.append(arguments)
        return SimpleNamespace(id="1")

    monkeypatch.setattr(view.jobs, "start", start)
    page = StudioPage(view, ServerAccess(password=password))
    [button] = [id for id, at in page.blocks.blocks.items() if at.elem_id == "start-the-server"]
    [event] = [fn for fn in page.blocks.fns.values() if (button, "click") in fn.targets]
    query = {"step": "export", "run": "runs/a"}
    for _ in range(2):
        assert event.fn(SimpleNamespace(query_params=query, headers={}))[0] == ""
    if password is None:
        assert "--key-file" not in started[0]
        return
    assert started[0][-2:] == started[1][-2:] == ["--key-file", ".finesight/api-key"]
    file = folder / ".finesight/api-key"
    assert file.stat().st_mode & 0o777 == 0o600
    [key] = read_api_keys(file)
    assert len(key) > 40
    assert password not in key
    assert not any(key in word for word in started[0])


class StudioDriver:
    """Studio page in a browser."""

    def __init__(self, browser: Browser, address: str) -> None:
        self.browser, self.address = browser, address

    def open(self, step: str, width: int = 1440, dark: bool = False, lang: str = "en") -> None:
        self.browser.visit(f"{self.address}/?step={step}&lang={lang}", width, dark=dark)
        self.wait_for("document.querySelector('#studio-top nav')")

    def wait_for(self, condition: str) -> None:
        end = time.monotonic() + WAIT_TIMEOUT_S
        while not self.browser.run(f"return !!({condition});"):
            if time.monotonic() > end:
                text = self.browser.run("return document.body.innerText;")
                raise AssertionError(f"not within {WAIT_TIMEOUT_S} s: {condition}\n{text}")
            time.sleep(0.1)

    def fill(self, **texts: str) -> None:
        for name, text in texts.items():
            selector = f"#{name.replace('_', '-')} :is(input, textarea)"
            self.wait_for(f"document.querySelector('{selector}')?.offsetParent")
            self.browser.driver.execute_script(
                "const field = document.querySelector(arguments[0]); field.focus();"
                " field.select(); document.execCommand('insertText', false, arguments[1]);",
                selector,
                text,
            )
        self.browser.settle()

    def upload(self, name: str, files: Sequence[Path]) -> None:
        self.wait_for("document.querySelector('.studio-form .label-wrap')?.offsetParent")
        self.browser.settle()
        self.browser.run("document.querySelector('.studio-form .label-wrap').click();")
        self.wait_for(f"document.querySelector('#{name} input[type=file]')")
        field = self.browser.driver.find_element("css selector", f"#{name} input[type=file]")
        field.send_keys("\n".join(map(str, files)))
        self.wait_for(f"document.querySelector('#{name}').innerText.includes('{files[-1].stem}')")

    def click(self, button: str) -> None:
        self.wait_for(f"document.querySelector('#{button}')?.offsetParent")
        self.browser.run(f"document.querySelector('#{button}').click();")

    def wait_for_job(self, status: str) -> None:
        chip = "document.querySelector('.job .chip')"
        self.wait_for(f"{chip}?.textContent.trim().startsWith('{status}')")

    def check(self) -> None:
        messages = self.browser.messages()
        assert [text for text in messages if not any(map(text.__contains__, GRADIO_NOTES))] == []
        assert self.browser.overflow_width() == 0


@pytest.fixture
def studio(folder: Path, browser: Browser) -> Iterator[StudioDriver]:
    command = [sys.executable, "-m", "finesight", "studio", str(folder), "--port", "0", "--no-auth"]
    command += ["--chat-port", "0", "--label-port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            yield StudioDriver(browser, process.stdout.readline().strip())
        finally:
            # Jobs outlive the studio, also after a failed test.
            for job in JobStore(folder).list_jobs():
                with contextlib.suppress(UserError):
                    job.stop()
            process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0


def test_from_images_to_a_chat_reply(folder: Path, studio: StudioDriver, browser: Browser) -> None:
    studio.open("data")
    studio.fill(source="../photos", name="colors", prompt="Which color?", fraction="2")
    studio.wait_for("document.querySelector('#preview .message')")
    studio.click("import")
    studio.wait_for("document.querySelector('#message .error')?.innerText.includes('outside')")
    studio.fill(source="photos")
    command = "finesight import photos data/colors --prompt 'Which color?' --train-fraction 2"
    studio.wait_for(f'document.querySelector("#preview code")?.textContent === "{command}"')
    studio.click("import")
    studio.wait_for_job("failed")
    studio.wait_for("document.querySelector('#source input, #source textarea')?.value === 'photos'")
    studio.fill(fraction="0.75")
    studio.click("import")
    studio.wait_for_job("finished")
    studio.check()
    studio.open("data")
    studio.upload("upload", sorted((folder / "photos").iterdir()))
    studio.fill(name="uploaded", prompt="Which color?", fraction="0.75")
    studio.click("import")
    studio.wait_for("document.querySelector('.job code')?.textContent.includes('uploads/')")
    studio.wait_for_job("finished")
    assert (folder / "data" / "uploaded" / "train.jsonl").is_file()
    studio.check()
    studio.open("check")
    studio.click("check")
    studio.wait_for("document.querySelector('#studio-bottom iframe')")
    studio.open("plan")
    studio.fill(recipe_name="colors", epochs="40", learning_rate="2e-3", metric="classification")
    studio.click("create-the-recipe")
    studio.wait_for("document.querySelector('#editor textarea')?.value.includes('epochs: 40')")
    studio.click("estimate-memory-and-time")
    studio.wait_for_job("finished")
    studio.open("train")
    studio.click("start-or-resume")
    studio.wait_for_job("finished")
    studio.wait_for("document.querySelectorAll('.chart').length > 2")
    studio.check()
    studio.open("chat")
    studio.click("start-the-chat")
    studio.wait_for("document.querySelector('a.open')")
    browser.driver.refresh()
    studio.wait_for("document.querySelector('a.open')")
    address = browser.run("return document.querySelector('a.open').href;")
    chat = ChatPageDriver(browser, address)
    chat.ask("Which color?", [folder / "photos" / "00.png"])
    assert "red" in chat.read_texts(".reply .message-text")[-1]
    studio.open("chat")
    studio.click("stop")
    studio.wait_for_job("stopped")
    studio.open("label")
    studio.fill(images="photos", label_prompt="Which color?", labels_name="labeled")
    studio.click("start-labelling")
    studio.wait_for("document.querySelector('a.open')")
    browser.visit(browser.run("return document.querySelector('a.open').href;"))
    studio.wait_for("document.querySelector('#position')?.textContent.includes('1 of 24')")
    browser.press("Enter")
    studio.wait_for("document.querySelector('#counts').textContent.includes('accepted 1')")
    studio.open("label")
    studio.click("stop")
    studio.wait_for_job("stopped")
    assert (folder / "data" / "labeled" / "labels.jsonl").is_file()
    studio.check()

    checker = AxeChecker()
    for width, dark, lang in ((390, False, "en"), (390, True, "zh"), (1440, True, "en")):
        for step in STEPS:
            studio.open(step, width, dark, lang)
            browser.settle()
            studio.check()
            assert checker.find_violations(browser) == [], (step, width, lang)
