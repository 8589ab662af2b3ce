"""Ways through the studio in a browser, without a terminal."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import get_args

import httpx2
import openpyxl
import pytest
from browser import Browser
from label_fixtures import COLORS, ask_server, draw_dots
from web_server_fixture import ChatPageDriver

from finesight.app.jobs import LOCK_FILE, Job, JobStore
from finesight.app.studio_view import STEPS
from finesight.cli.app import run_command
from finesight.errors import UserError
from finesight.ingest.import_source import ImportOptions
from finesight.ingest.importer import import_dataset
from finesight.report.i18n import Language

NUM_LABELS = 30
LINK = "document.querySelector('a.open')"
"""Link to the server that the studio has started."""

VISIBLE_LABELS_SCRIPT = """
const labels = [...document.querySelectorAll("form :is(label, button), summary, h2, th, #top p")];
const texts = labels.filter((at) => at.offsetParent).map((at) => at.innerText);
return texts.filter((text) => /\\p{L}/u.test(text));
"""

MAIN_BUTTONS_SCRIPT = """
const probe = document.createElement("i");
probe.style.color = "var(--accent)";
document.body.append(probe);
const accent = getComputedStyle(probe).color;
probe.remove();
const isMain = (at) => at.checkVisibility() && getComputedStyle(at).backgroundColor === accent;
return [...document.querySelectorAll("button, a")].filter(isMain).map((at) => at.innerText);
"""

RECIPE = """\
model: finesight-tiny
data: {{train: data/photos/train.jsonl, eval: data/photos/eval.jsonl}}
train: {{steps: {steps}, batch_size: 4, device: cpu}}
eval: {{metric: classification, max_new_tokens: 4}}
output_dir: runs/{name}
"""


class StudioDriver:
    """Studio process and its page in a browser."""

    def __init__(self, folder: Path, browser: Browser) -> None:
        self.folder, self.browser, self.wait_for = folder, browser, browser.wait_for
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "finesight", "studio", str(self.folder), "--no-auth"]
        command += ["--port", "0", "--api-port", "0"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        options = {"stdout": subprocess.PIPE, "text": True, "env": environment}
        self.process = subprocess.Popen(command, **options)
        self.address = self.process.stdout.readline().strip()

    def end(self, number: int = signal.SIGINT) -> int:
        self.process.send_signal(number)
        with self.process:
            return self.process.wait(30)

    def open(self, step: str, lang: str = "en") -> None:
        self.browser.visit(f"{self.address}/?step={step}&lang={lang}")
        self.wait_for("document.querySelector('nav.steps')")
        self.check()

    def reload(self, state: str) -> None:
        """Wait for a state, which the page must show again after a reload, without errors."""
        self.wait_for(state)
        self.check()
        self.browser.driver.refresh()
        self.wait_for(state)
        self.check()

    def fill(self, form: str, **texts: str) -> None:
        for name, text in texts.items():
            self.browser.driver.execute_script(
                "const field = document.getElementById(arguments[0]); field.value = arguments[1];"
                " for (const one of document.querySelectorAll('details'))"
                " one.open ||= one.contains(field);"
                " field.dispatchEvent(new Event('input', { bubbles: true }));",
                f"{form}:{name}",
                text,
            )
        self.browser.settle()

    def upload(self, files: Sequence[Path]) -> None:
        field = self.browser.driver.find_element("css selector", "#upload")
        field.send_keys("\n".join(map(str, files)))

    def click_program(self, name: str) -> None:
        self.browser.click(f"#program [data-program={name}]")

    def click(self, action: str) -> None:
        button = f"button[data-action='{action}']"
        self.wait_for(f'document.querySelector("{button}")?.disabled === false')
        self.browser.run(f'document.querySelector("{button}").click();')

    def run(self, step: str, action: str, status: str = "finished") -> None:
        """Start a command in its step, and wait for its end."""
        self.open(step)
        self.click(action)
        self.wait_for_job(status)

    def open_page(self) -> str:
        """Wait for the server that a step has started, and return its address."""
        self.reload(LINK)
        return str(self.browser.run(f"return {LINK}.href;"))

    def wait_for_job(self, status: str) -> None:
        chip = "document.querySelector('.job .chip')"
        self.wait_for(f"{chip}?.textContent.trim().startsWith('{status}')")

    def check(self) -> None:
        # Chromium notes each refused request.
        assert [text for text in self.browser.messages() if "status of 422" not in text] == []
        assert self.browser.overflow_width() == 0


@pytest.fixture
def studio(folder: Path, browser: Browser) -> Iterator[StudioDriver]:
    driver = StudioDriver(folder, browser)
    try:
        yield driver
    finally:
        # Jobs outlive the studio, also after a failed test.
        for job in JobStore(folder).list_jobs():
            with contextlib.suppress(UserError):
                job.stop()
        assert driver.end() == 0


def import_photos(folder: Path, *runs: tuple[str, int]) -> None:
    """Import the photos, and write recipes of runs with a number of steps."""
    options = ImportOptions(prompt="Which color?", eval_last=4)
    import_dataset(folder / "photos", folder / "data/photos", options)
    for name, steps in runs:
        (folder / f"{name}.yaml").write_text(RECIPE.format(name=name, steps=steps))


def test_sources_are_imported_and_uploaded(folder: Path, studio: StudioDriver) -> None:
    draw_dots(folder / "images", 3)
    studio.open("data")
    studio.fill("import", source="../images", out="dots", prompt="Which color?")
    studio.click("import")
    studio.wait_for("document.querySelector('#message').innerText.includes('outside')")
    studio.fill("import", source="images")
    studio.click("import")
    studio.wait_for("document.querySelector('.job .error')?.innerText.includes('step “Label”')")
    studio.fill("import", source="", out="uploaded")
    studio.upload(sorted((folder / "photos").iterdir()))
    studio.click("import")
    studio.wait_for("document.querySelector('.job code')?.textContent.includes('uploads/')")
    studio.wait_for_job("finished")
    studio.reload("document.querySelector('.item .name')?.textContent === 'uploaded'")


DROP_SCRIPT = """
const files = new DataTransfer();
for (const name of ["cells.csv", "a.png"]) files.items.add(new File(["x"], name));
const zone = document.querySelector(".drop");
const event = new DragEvent("drop", { bubbles: true, cancelable: true, dataTransfer: files });
zone.dispatchEvent(event);
return event.defaultPrevented;
"""


def test_chosen_files_are_shown_before_they_are_sent(
    folder: Path, studio: StudioDriver, browser: Browser
) -> None:
    draw_dots(folder / "images", 3)
    for file in (folder / "images").iterdir():
        file.rename(file.with_name(f"mugs_{file.name}"))
    studio.open("data")
    primary = "[...document.querySelectorAll('#new-data .primary')].map((x) => x.innerText).join()"
    browser.messages()
    browser.requests()
    studio.upload(sorted((folder / "images").iterdir()))
    studio.wait_for("document.querySelectorAll('#thumbnails img').length === 3")
    studio.wait_for(
        "[...document.querySelectorAll('#thumbnails img')].every((x) => x.naturalWidth)"
    )
    (chosen,) = browser.read_texts("#chosen")
    assert chosen.startswith("Images: 3. Other files: 0.")
    assert browser.run("return document.getElementById('import:out').value;") == "mugs"
    assert browser.run(f"return {primary};") == "Continue to labelling"
    assert browser.run(MAIN_BUTTONS_SCRIPT) == ["Continue to labelling"]
    assert [url for url in browser.requests() if "uploads" in url] == []
    assert not (folder / "uploads").exists()
    assert browser.find_layout_problems() == []
    # Dropped files replace the chosen ones.
    assert browser.run(DROP_SCRIPT)
    studio.wait_for("document.querySelector('#chosen').innerText.startsWith('Images: 1. Other')")
    assert browser.run("return document.getElementById('import:out').value;") == "cells"
    assert browser.run(f"return {primary};") == "Preview"
    # A name of the user stays.
    studio.fill("import", out="mine")
    studio.upload(sorted((folder / "images").iterdir()))
    assert browser.run("return document.getElementById('import:out').value;") == "mine"
    browser.run("document.querySelector('button[data-prompt][data-kind=classes]').click();")
    studio.click("preview")
    studio.wait_for("location.search.includes('step=label')")
    assert "uploads%2Fmine" in browser.run("return location.search;")
    studio.check()


def test_sample_project_is_one_click(folder: Path, studio: StudioDriver) -> None:
    studio.open("data")
    studio.click("sample")
    studio.wait_for("document.querySelector('.job .chip')")
    studio.wait_for_job("finished")
    studio.wait_for("document.querySelector('.item .name')?.textContent === 'tickets'")
    studio.wait_for("document.querySelector('.result')?.innerText.startsWith('500 samples')")
    studio.check()


def test_previewed_roles_are_imported(folder: Path, studio: StudioDriver, browser: Browser) -> None:
    records = []
    for number in range(4):
        turns = [{"q": "Which color?", "a": "red"}, {"q": "How many?", "a": str(number)}]
        records.append({"file": f"{number:02}.png", "by": "<script>alert(1)</script>", "qa": turns})
    file = folder.parent / "rows.json"
    file.write_text(json.dumps(records))
    primary = "[...document.querySelectorAll('form .primary')].map((x) => x.dataset.action).join()"
    studio.open("data")
    studio.fill("import", out="turns")
    studio.upload([file, *sorted((folder / "photos").glob("0[0-3].png"))])
    studio.click("preview")
    studio.wait_for("document.querySelectorAll('#preview select').length === 4")
    assert browser.run(f"return {primary};") == "preview"
    # The stored files are used from now on.
    source = browser.run("return document.getElementById('import:source').value;")
    assert source == "uploads/turns/rows.json"
    assert browser.find_layout_problems() == []
    # The focus is before the dropdowns, which a keyboard reaches.
    for letters in ("", "l", "q", "a"):
        browser.press("Tab", *letters)
    roles = "[...document.querySelectorAll('#preview select')].map((x) => x.value).join()"
    assert browser.run(f"return {roles};") == "images,ignore,question,answer"
    studio.click("preview")
    studio.wait_for("document.querySelectorAll('.samples img').length === 5")
    assert browser.run(f"return {primary};") == "import"
    assert browser.find_layout_problems() == []
    studio.fill("import", prompt="Answer.")
    assert browser.run(f"return {primary};") == "preview"
    studio.fill("import", prompt="")
    assert browser.executed_payloads() == []
    studio.check()
    studio.click("import")
    studio.wait_for_job("finished")
    studio.reload("document.querySelector('.item .name')?.textContent === 'turns'")
    lines = (folder / "data/turns/train.jsonl").read_text().splitlines()
    lines += (folder / "data/turns/eval.jsonl").read_text().splitlines()
    assert len(lines) == 8
    assert not any("script" in line for line in lines)


def test_unlabeled_images_become_a_served_model(folder, studio, browser):
    images = draw_dots(folder / "images", 200)
    studio.open("label")
    values = {"prompt": "Which color?", "out": "dots", "kind": "classes"}
    studio.fill("label", sources="images", classes=",".join(COLORS), **values)
    studio.click("label")
    browser.visit(studio.open_page())
    studio.wait_for("document.querySelector('#position')?.textContent.includes('1 of 200')")
    for index in range(NUM_LABELS):
        name = browser.run("return document.querySelector('#name').textContent;")
        browser.press(str(1 + COLORS.index(images[name])), "Enter")
        shown = f"document.querySelector('#position')?.textContent.includes('{index + 2} of')"
        studio.wait_for(shown)
    studio.reload(f"document.querySelector('#done')?.textContent === '{NUM_LABELS} of 200 done'")
    studio.run("label", "stop", "stopped")
    studio.reload("document.querySelector('.item .name')?.textContent === 'dots'")

    studio.open("check")
    studio.click("check")
    studio.reload("document.querySelector('#bottom iframe')")
    studio.open("plan")
    values = {"train.epochs": "10", "train.learning_rate": "2e-3"}
    studio.fill("recipe", name="dots", **values, **{"eval.metric": "classification"})
    studio.click("create-recipe")
    studio.wait_for(
        "document.querySelector('textarea[name=\"editor:text\"]')?.value.includes('epochs: 10')"
    )
    studio.run("plan", "plan")
    studio.run("train", "train")
    studio.reload("document.querySelectorAll('.chart').length > 2")
    studio.open("results")
    studio.reload("document.querySelector('.item .score')?.textContent.includes('accuracy')")

    studio.open("chat")
    studio.click("web")
    chat = ChatPageDriver(browser, studio.open_page())
    labeled = json.loads((folder / "data/dots/labels.jsonl").read_text().splitlines()[0])
    image = folder / "images" / Path(labeled["id"]).name
    chat.ask("Which color?", [image])
    assert chat.read_texts(".reply .message-text") == [images[image.name]]
    studio.run("chat", "stop", "stopped")
    studio.open("export")
    studio.click("serve")
    studio.reload("document.querySelector('code.address')")
    (url,) = browser.read_texts("code.address")
    assert ask_server(f"{url}/", image) == images[image.name]
    studio.run("export", "stop", "stopped")


@contextlib.contextmanager
def suspend(job: Job) -> Iterator[None]:
    """Suspend the process of a job within the block."""
    pid = int((job.folder / LOCK_FILE).read_text())
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_training_is_found_again_stopped_and_resumed(
    folder: Path, studio: StudioDriver, browser: Browser
) -> None:
    # Training must outlast the first waits.
    import_photos(folder, ("photos", 400))
    studio.open("train")
    studio.click("train")
    studio.wait_for("document.querySelector('.job')?.innerText.includes('remaining')")
    studio.wait_for("document.querySelector('.job progress')?.value > 1")
    studio.wait_for("document.querySelectorAll('.chart').length > 2")
    with suspend(JobStore(folder).list_running()[0]):
        assert browser.find_layout_problems() == []
        studio.check()
        browser.driver.get("about:blank")
        studio.end(signal.SIGKILL)
        studio.start()
        studio.open("train")
        studio.wait_for_job("running")
        studio.click("stop")
        studio.wait_for_job("stopping")
    studio.wait_for_job("stopped: checkpoint saved")
    assert [*(folder / "runs/photos/checkpoints").glob("step-*")]
    studio.click("train")
    # The rest of the training takes longer than other waits.
    finished = "document.querySelector('.job .chip')?.textContent.trim() === 'finished'"
    browser.wait_for(finished, timeout_s=240.0)
    studio.reload("document.querySelector('.next')?.href.includes('step=results')")


def test_two_runs_are_compared_in_report_and_chat(
    folder: Path, studio: StudioDriver, browser: Browser
) -> None:
    import_photos(folder, ("one", 1), ("two", 2))
    with contextlib.chdir(folder):
        for name in ("one", "two"):
            assert run_command(["train", f"{name}.yaml"]) == 0
    studio.open("results")
    studio.wait_for("document.querySelectorAll('.item input[name=run]').length === 2")
    studio.wait_for("[...document.querySelectorAll('.item img')].every((at) => at.naturalWidth)")
    assert browser.run("return document.querySelector('[data-compare]').disabled;")
    browser.run("document.querySelector('#runs').target = '';")
    browser.run("for (const box of document.querySelectorAll('.item input')) box.click();")
    browser.run("document.querySelector('[data-compare]').click();")
    studio.wait_for("location.pathname === '/view/report'")
    studio.wait_for(
        "return /one[^]*two|two[^]*one/.test(document.querySelector('main').innerText);"
    )

    studio.open("chat")
    studio.fill("web", adapter="runs/one")
    studio.click("web")
    chat = ChatPageDriver(browser, studio.open_page())
    browser.run("document.querySelector('#compare').value = 'one';")
    chat.ask("Which color?", [folder / "photos/00.png"])
    assert chat.read_texts(".reply h3") == ["two", "one"]
    studio.check()
    studio.run("chat", "stop", "stopped")


def test_trained_run_reads_a_folder_and_answers_a_program(
    folder: Path, studio: StudioDriver, browser: Browser
) -> None:
    import_photos(folder, ("one", 1))
    with contextlib.chdir(folder):
        assert run_command(["train", "one.yaml"]) == 0
    new = folder.parent / "new"
    for name in ("a/1.png", "b/1.png", "b/=2.png", "notes.txt", ".hidden.png"):
        (new / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "photos/00.png", new / name)
    studio.open("chat")
    browser.driver.find_element("css selector", "#upload-folder").send_keys(str(new))
    studio.wait_for("document.querySelector('#chosen')?.textContent.startsWith('Images: 3.')")
    assert browser.run(MAIN_BUTTONS_SCRIPT) == ["Read the images"]
    studio.click("predict")
    studio.wait_for("document.querySelector('.downloads')")
    assert browser.run(MAIN_BUTTONS_SCRIPT) == ["Download for Excel"]
    names = browser.read_texts(".answers td:first-child")
    assert sorted(names) == ["=2.png", "new-a-1.png", "new-b-1.png"], "equal names get folders"
    (link,) = browser.run(
        "return [...document.querySelectorAll('.downloads .primary')].map(String);"
    )
    answer = httpx2.get(link)
    assert "attachment" in answer.headers["content-disposition"]
    sheet = openpyxl.load_workbook(io.BytesIO(answer.content)).active
    assert sheet.max_row == 4
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        assert sum("/media/" in name for name in archive.namelist()) == 3
    assert browser.find_layout_problems() == []
    studio.check()

    studio.open("export")
    studio.click("serve")
    studio.wait_for("document.querySelector('[data-program=test]')")
    assert browser.run(MAIN_BUTTONS_SCRIPT) == ["Test with an image of the run"]
    studio.click_program("test")
    studio.wait_for("document.querySelector('#test-result pre')?.textContent")
    shown = browser.read_texts("#test-result pre")
    # The answer stays while the page is updated.
    browser.run("return new Promise((resolve) => setTimeout(resolve, 3500));")
    assert browser.read_texts("#test-result pre") == shown
    for number in (1, 2, 3):
        browser.click(f"#snippet-{number}")
        assert browser.find_layout_problems() == []
    studio.check()
    studio.run("export", "stop", "stopped")
    studio.wait_for("!document.querySelector('#program')")


def test_every_step_fits_and_is_accessible_in_both_languages(
    folder: Path, studio: StudioDriver, browser: Browser
) -> None:
    import_photos(folder, ("one", 1))
    with contextlib.chdir(folder):
        assert run_command(["train", "one.yaml"]) == 0
    for step, lang in product(STEPS, get_args(Language)):
        studio.open(step, lang)
        texts = browser.run(VISIBLE_LABELS_SCRIPT)
        chinese = [text for text in texts if re.search("[\u4e00-\u9fff]", text)]
        assert chinese == (texts if lang == "zh" else []), step
        assert len(browser.run(MAIN_BUTTONS_SCRIPT)) == 1, step
        # Also with each folded form, of which one is open at a time.
        for index in range(browser.count("main > details > summary")):
            browser.run(f"document.querySelectorAll('main > details > summary')[{index}].click();")
            assert len(browser.run(MAIN_BUTTONS_SCRIPT)) == 1, (step, index)
        assert browser.find_layout_problems() == [], (step, lang)
        studio.check()
