"""Tests of the studio page: access without a browser, and the way to a chat reply in one."""

from __future__ import annotations

import contextlib
import fcntl
import html
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import get_args
from urllib.parse import parse_qsl, urlsplit

import pytest
from axe import AxeChecker
from browser import Browser
from chat_page_driver import ChatPageDriver
from comparison_fixtures import make_run, make_sign_answers
from label_fixtures import COLORS, ask_server, draw_dots
from run_dir_fixtures import MANIFEST, TUNE
from studio_fixtures import call_page, click_button, open_client, read_fields
from typer.testing import CliRunner

from finesight.cli.app import app
from finesight.data.import_source import ImportOptions
from finesight.data.importer import import_dataset
from finesight.errors import UserError
from finesight.label.label_session import AnswerKind
from finesight.manifest import read_example
from finesight.report.i18n import Language
from finesight.serve.request_middleware import read_api_keys
from finesight.studio.studio_jobs import JobStore
from finesight.studio.studio_page import ServerAccess, StudioPage
from finesight.studio.studio_view import FIELD_NAMES, STEPS, Selection, StudioView
from finesight.studio.workspace import UPLOAD_MARKER, Workspace

WAIT_TIMEOUT_S = 60.0
NUM_LABELS = 30

IS_LOADED = "!document.querySelector('#studio-top') || document.querySelector('.studio-form')"
"""Condition that Gradio shows the form of a step, unless another page is open."""

LINK = "document.querySelector('a.open')"
"""Link to the server that the studio has started."""

VISIBLE_LABELS_SCRIPT = """
const form = ".studio-form :is(label > span, button.primary, .label-wrap > span)";
const labels = [...document.querySelectorAll(`${form}, h2, th, #studio-top p`)];
const texts = labels.filter((at) => at.offsetParent).map((at) => at.innerText);
return texts.filter((text) => /\\p{L}/u.test(text));
"""

GRADIO_NOTES = ("AbortError", "Method not implemented.")
"""Messages of Gradio about requests that end with the page, and about the end of an upload."""

RELOAD_NOTES = (*GRADIO_NOTES, "Connection errored out.")
"""The same, and that about an event stream which a reload ends."""


@pytest.mark.parametrize(
    "columns", ["", "--map image=photo --map answer=text", "image=photo answer=text"]
)
def test_columns_are_detected_or_pasted_from_a_message(
    folder: Path, columns: str, started: list[list[str]]
) -> None:
    rows = [f"photos/{index:02}.png,color {index}" for index in range(24)]
    (folder / "table.csv").write_text("\n".join(["photo,text", *rows]))
    page = StudioPage(StudioView(Workspace(folder)), ServerAccess())
    values = ["table.csv", "a", "Which color?", columns, ""]
    assert click_button(page, "import", "step=data", None, *values) == ""
    assert started[0][5:] == ["--map", "image=photo", "--map", "answer=text"]


@pytest.mark.parametrize(
    ("source", "prompt", "fraction", "problem"),
    [
        ("images", "What?", "", "24 images without labels"),
        ("images", "What?", "", "table.csv or label the images in the step Label"),
        ("table.csv", "", "", "Prompt"),
        ("table.csv", "What?", "90%", "fraction"),
        ("table.csv", "What?", "1.5", "fraction"),
    ],
)
def test_import_form_is_checked_before_the_command_starts(
    folder: Path, source: str, prompt: str, fraction: str, problem: str, started: list[list[str]]
) -> None:
    draw_dots(folder / "images", 24)
    (folder / "table.csv").write_text("photo,text\nphotos/00.png,red\nphotos/01.png,green\n")
    page = StudioPage(StudioView(Workspace(folder)), ServerAccess())
    values = [source, "a", prompt, "", fraction]
    assert problem in click_button(page, "import", "step=data", None, *values)
    assert started == []


def test_refused_or_failed_import_does_not_block_its_name(
    folder: Path, started: list[list[str]]
) -> None:
    files = [folder.parent / "t.csv", *sorted((folder / "photos").glob("*.png"))]
    files[0].write_text("photo,text\n" + "".join(f"{file.name},red\n" for file in files[1:]))
    page = StudioPage(StudioView(Workspace(folder)), ServerAccess())
    assert "Prompt" in click_button(page, "import", "", files, "", "a", "", "", "")
    assert [*folder.glob("uploads/*")] == []
    # The command fails: its uploads stay for another attempt, with files of the next upload.
    for source in ("", "uploads/a/t.csv"):
        assert click_button(page, "import", "", files, source, "a", "Color?", "", "") == ""
        assert started.pop()[1:3] == ["uploads/a/t.csv", "data/a"]
    assert click_button(page, "import", "", None, "uploads/a/t.csv", "a", "Color?", "", "") == ""
    message = click_button(page, "import", "", files, "photos", "a", "Color?", "", "")
    assert "an upload and a path are given" in message


@pytest.mark.parametrize("archive", [True, False])
def test_folders_and_columns_of_an_uploaded_table_are_found(
    folder: Path, archive: bool, started: list[list[str]]
) -> None:
    home = folder.parent / "upload"
    home.mkdir()
    for file in (folder / "photos").glob("*.png"):
        shutil.copy(file, home)
    rows = [f"shapes/{file.name},red\n" for file in sorted(home.iterdir())]
    (home / "t.csv").write_text("image,class\n" + "".join(rows))
    files = sorted(home.iterdir())
    if archive:
        (home / "shapes").mkdir()
        for file in files[:-1]:
            file.rename(home / "shapes" / file.name)
        files = [Path(shutil.make_archive(str(folder.parent / "a"), "zip", home))]
    page = StudioPage(StudioView(Workspace(folder)), ServerAccess())
    assert click_button(page, "import", "", files, "", "a", "Which color?", "", "") == ""
    assert started[0][-4:] == ["--map", "image=image", "--map", "answer=class"]
    with contextlib.chdir(folder):
        CliRunner().invoke(app, started[0], catch_exceptions=False)
    assert len((folder / "data/a/data.jsonl").read_text().splitlines()) == 24


def test_uploaded_images_without_labels_are_labeled_next(
    folder: Path, started: list[list[str]]
) -> None:
    page = StudioPage(StudioView(Workspace(folder)), ServerAccess())
    files = sorted((folder / "photos").glob("*.png"))
    message, url = call_page(page, "import", {"lang": "en"}, files, "", "dots", "", "", "0.9")
    query = dict(parse_qsl(urlsplit(url).query))
    assert (message, query["step"]) == ("", "label")
    fields = read_fields(page, query)
    assert fields["images"]["value"] == "uploads/dots"
    assert fields["labels-name"]["value"] == "dots"
    with open_client(folder) as client:
        assert "images=uploads%2Fdots" in client.get(f"/live{url[2:]}").json()["url"]
    assert started == []


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
    folder: Path, password: str | None, started: list[list[str]]
) -> None:
    make_run(folder / "runs/a", make_sign_answers(folder, [0.5, 1.0]))
    view = StudioView(Workspace(folder))
    page = StudioPage(view, ServerAccess(password=password))
    for _ in range(2):
        assert click_button(page, "start-the-server", "step=export&run=runs/a") == ""
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


def test_label_form_offers_a_prompt_and_keeps_its_values(folder: Path) -> None:
    view, query = StudioView(Workspace(folder)), {"step": "label", "lang": "en"}
    page = StudioPage(view, ServerAccess())
    prompt = read_fields(page, query)["label-prompt"]
    assert (prompt["value"], prompt["label"]) == ("", "Prompt (required)")
    form = ["photos", "", "colors", "finesight-tiny", "wrong", "", "", "0.8"]
    import_dataset(folder / "photos", folder / "data/a", ImportOptions(prompt="Which color?"))
    prompt = read_fields(page, query)["label-prompt"]
    assert (prompt["value"], prompt["label"]) == ("Which color?", "Prompt")
    form[1] = "Color?"
    message, url = call_page(page, "start-labelling", query, *form)
    assert message == ""
    [job] = view.jobs.list_jobs("label")
    while job.status == "running":
        time.sleep(0.05)
    assert job.status == "failed"
    fields = read_fields(page, dict(parse_qsl(urlsplit(url).query)))
    names = ("images", "label-prompt", "labels-name", "label-model", "kind", "classes", "fields")
    assert [fields[name]["value"] for name in (*names, "label-fraction")] == form


def test_epochs_and_steps_are_refused_by_the_names_of_their_fields(folder: Path) -> None:
    import_dataset(folder / "photos", folder / "data/a", ImportOptions(prompt="Which color?"))
    page = StudioPage(StudioView(Workspace(folder)), ServerAccess())
    values = ([], "r", "finesight-tiny", "", "3", "100", "")
    message = click_button(page, "create-the-recipe", "step=plan&data=data/a", *values)
    assert "“Epochs” and “Steps instead of epochs”" in message
    assert "null" not in message


def test_export_form_names_the_merged_model(folder: Path, started: list[list[str]]) -> None:
    make_run(folder / "runs/a", make_sign_answers(folder, [0.5, 1.0]))
    page = StudioPage(StudioView(Workspace(folder)), ServerAccess())
    query = {"step": "export", "run": "runs/a", "lang": "en"}
    assert "Merge one" in click_button(page, "commands-for-vllm-and-sglang", "step=export", "")
    for name in ("newer", "mine"):
        (folder / "models" / name).mkdir(parents=True)
        for file in ("config.json", "model.safetensors"):
            (folder / "models" / name / file).touch()
        os.utime(folder / "models" / name, (len(name), len(name)))
    assert read_fields(page, query)["merged-name"]["value"] == "newer"
    write_job(folder, "export", ["merge", "runs/a", "models/mine"], 0, "", target="runs/a")
    assert read_fields(page, query)["merged-name"]["value"] == "mine"
    assert started == []


def test_recipe_form_offers_the_other_data_sets(folder: Path) -> None:
    for name in ("a", "b", "c"):
        import_dataset(folder / "photos", folder / "data" / name, ImportOptions(prompt="Color?"))
    query = {"step": "plan", "data": "data/b", "lang": "en"}
    page = StudioPage(StudioView(Workspace(folder)), ServerAccess())
    others = read_fields(page, query)["other-data"]
    assert (sorted(others["choices"]), others["visible"]) == (["data/a", "data/c"], True)
    values = (["data/c"], "both", "finesight-tiny", "", "", "", "")
    assert call_page(page, "create-the-recipe", query, *values)[0] == ""
    files = Workspace(folder).load_recipe(Path("recipes/both.yaml")).data.train
    assert sorted(str(file.path) for file in files) == [f"data/{name}/data.jsonl" for name in "bc"]


def test_unfinished_run_is_used_with_its_newest_checkpoint(
    folder: Path, started: list[list[str]]
) -> None:
    run = make_run(folder / "runs/a", make_sign_answers(folder, [0.5, 1.0]))
    tune = {**TUNE, "merger": "lora"}
    manifest = {**MANIFEST, "format_version": 2, "tune": tune, "prompts": ["Which color?"]}
    run.write("manifest.json", json.dumps(manifest))
    for name in ("step-9", "step-20", "step-x", "best"):
        (folder / "runs/a/checkpoints" / name).mkdir(parents=True)
    page = StudioPage(StudioView(Workspace(folder)), ServerAccess())
    (folder / "runs/a/adapter").rename(folder / "adapter")
    label_form = ("photos", "Color?", "labels", "finesight-tiny", "", "", "")
    buttons = {"start-the-chat": (), "start-the-server": (), "merge": ("m",)}
    for button, values in {**buttons, "start-labelling": label_form}.items():
        step = {"start-the-chat": "chat", "start-labelling": "label"}.get(button, "export")
        assert click_button(page, button, f"step={step}&run=runs/a", *values) == ""
        with open_client(folder) as client:
            shown = client.get(f"/live?step={step}&lang=en").json()["top"]
        assert "The run is not finished: its newest checkpoint is used" in shown
    assert [words[1] for words in started] == ["runs/a/checkpoints/step-20"] * 4
    (folder / "runs/a/predictions/after.jsonl").unlink()
    (folder / "runs/a/predictions/before.jsonl").write_text('{"image": "photos/00.png"}\n')
    with contextlib.chdir(folder):
        assert read_example(Path("runs/a")) == ("photos/00.png", "Which color?")
    shutil.rmtree(folder / "runs/a/checkpoints")
    for button, values in buttons.items():
        message = click_button(page, button, "step=export&run=runs/a", *values)
        assert "no weights yet" in message
        assert "step Train" in message
    assert click_button(page, "start-labelling", "step=label&run=runs/a", *label_form) == ""
    assert started[4][1] == "finesight-tiny"
    with open_client(folder) as client:
        shown = client.get("/live?step=label&run=runs/a&lang=en").json()["top"]
    assert ("no weights yet" in shown, 'class="command"' in shown) == (True, False)
    (folder / "adapter").rename(folder / "runs/a/adapter")
    assert click_button(page, "start-the-chat", "step=chat&run=runs/a") == ""
    assert started[5][1] == "runs/a"


def test_labelling_needs_no_run(folder: Path, started: list[list[str]]) -> None:
    make_run(folder / "runs/a", make_sign_answers(folder, [0.5, 1.0]))
    page = StudioPage(StudioView(Workspace(folder)), ServerAccess())
    form = ["photos", "Color?", "x", "finesight-tiny", "classes", "red, blue", "a, b", "0.8", ""]
    kinds = read_fields(page, {"step": "label", "lang": "zh"})["kind"]["choices"]
    assert [kind for _, kind in kinds] == ["", *get_args(AnswerKind)]
    assert kinds[0][0] == "自动检测"
    with open_client(folder) as client:
        shown = client.get("/live?step=label&lang=en").json()["top"]
        [link] = re.findall(r'href="([^"]*)">No run: use the model', shown)
        query = urlsplit(html.unescape(link)).query
        assert client.get(f"/live?{query}").json()["url"].count("run=-") == 1
        # Other steps select the newest run again.
        url = client.get(f"/live?{query.replace('step=label', 'step=chat')}").json()["url"]
        assert "run=runs%2Fa" in url
    for text, model in ((query, "finesight-tiny"), ("step=label&run=runs/a", "runs/a")):
        assert click_button(page, "start-labelling", text, *form) == ""
        words = started.pop()
        assert words[1] == model
        # The shown command has the options of the form.
        [preview] = [at for at in page.blocks.fns.values() if len(at.inputs) == len(form)][:1]
        request = SimpleNamespace(query_params=dict(parse_qsl(text)), headers={})
        command = re.sub("<.*?>", "", html.unescape(preview.fn(request, *form)))
        assert shlex.split(command) == ["finesight", *words[: words.index("--port")]]
        assert {"--prompt=Color?", "--kind=classes", "--train-fraction=0.8"} < {*words}
        assert ("--classes=red, blue" in words, "--fields=a, b" in words) == (True, False)


def test_train_step_selects_the_run_of_the_recipe(folder: Path) -> None:
    make_run(folder / "runs/a", make_sign_answers(folder, [0.5, 1.0]))
    for name in ("a", "b"):
        text = f"model: finesight-tiny\ndata: {{train: a.jsonl}}\noutput_dir: runs/{name}\n"
        (folder / f"{name}.yaml").write_text(text)
    with open_client(folder) as client:
        for recipe, shown in (("a", "runs/b"), ("b", "runs/a")):
            page = client.get(f"/live?step=train&recipe={recipe}.yaml&run={shown}").json()
            assert f"run=runs%2F{recipe}" in page["url"]
            assert ("charts" in page["bottom"]) == (recipe == "a")
            assert page["top"].count("selected") == (2 if recipe == "a" else 1)


def test_messages_name_fields_and_steps_of_the_page(folder: Path) -> None:
    (folder / "data/a").mkdir(parents=True)
    (folder / "data/a/data.jsonl").write_text('{"id": 1}\n')
    page = StudioPage(StudioView(Workspace(folder)), ServerAccess())
    labels = {
        label
        for block in page.blocks.blocks.values()
        for label in (getattr(block, "label", None), getattr(block, "value", None))
        if isinstance(label, str)
    }
    assert set(FIELD_NAMES.values()) <= labels
    for lang, name in (("en", "the step “Data”"), ("zh", "步骤“数据”")):
        values = ([], "r", "finesight-tiny", "", "", "", "")
        message = click_button(
            page, "create-the-recipe", f"step=plan&data=data/a&lang={lang}", *values
        )
        assert name in message
        assert "finesight import" not in message


@pytest.mark.parametrize(
    ("step", "arguments", "exit_code", "log", "shown"),
    [
        (
            "data",
            "import a",
            0,
            "next: finesight check a.jsonl --against b.jsonl",
            "the step “Check”",
        ),
        (
            "label",
            "label m a",
            0,
            "next: finesight train r 'data.train=[\"a\"]'",
            "the step “Plan”",
        ),
        (
            "data",
            "import a b",
            2,
            "error: a\n  remedy: with --map image=a --map answer=b --map box=c, or --prompt",
            "with “Columns” image=a answer=b box=c, or “Prompt”",
        ),
        ("train", "train r", 2, "error: a\n  remedy: use --resume", "use “Start or resume”"),
        (
            "label",
            "label m a",
            2,
            "Usage: finesight label X\nTry 'finesight label'.\n\nError: a",
            "Error: a",
        ),
        ("export", "export m", 0, "finesight serve m --port 1", "finesight serve m --port 1"),
        # Other lines may quote data.
        ("train", "train r", 2, "a: b\nfinesight train is fun", "\nfinesight train is fun"),
        (
            "train",
            "train r",
            2,
            "error: finesight train/a.jsonl: the answer 'type --out a' is too long",
            "finesight train/a.jsonl: the answer 'type --out a' is too long",
        ),
        (
            "train",
            "train r",
            2,
            "error: a\n  remedy: check the data (finesight check), or set a lower rate",
            "check the data (the step “Check”), or set a lower rate",
        ),
        ("export", "merge m n", 0, "n: 9 tensors\nnext: finesight export n", "n: 9 tensors"),
        (
            "check",
            "check a",
            0,
            "next: finesight check a --fix b",
            "next: finesight check a --fix b",
        ),
    ],
)
def test_log_names_fields_and_steps_of_the_page(
    folder: Path, step: str, arguments: str, exit_code: int, log: str, shown: str
) -> None:
    write_job(folder, step, arguments.split(), exit_code, log)
    with open_client(folder) as client:
        page = client.get(f"/live?step={step}&lang=en").json()["bottom"]
    [found] = re.findall(r"<pre class=\"log\"[^>]*>(.*?)</pre>", page, re.DOTALL)
    assert shown in html.unescape(found)
    assert "Serve and export" not in found
    assert ("Usage" in found, "no field for" in found) == (False, "--fix" in shown)
    assert "exit code" not in page


@pytest.mark.parametrize(
    ("exit_code", "log", "shown"),
    [
        (2, "a.jsonl: 1 row\nerror: the image file is missing", "finished: errors found"),
        (3, "a.jsonl: 1 row\nwarning: b", "finished: warnings found"),
        (2, "error: a", "failed"),
        (-9, "", "failed: ended by the system, often for lack of memory"),
    ],
)
def test_outcome_of_a_check_is_shown_without_its_exit_code(
    folder: Path, exit_code: int, log: str, shown: str
) -> None:
    write_job(folder, "check", ["check", "a"], exit_code, log, ok_exit_codes=[0, 2, 3])
    with open_client(folder) as client:
        page = client.get("/live?step=check&lang=en").json()["bottom"]
    [chip] = re.findall(r"<h2 id=\"job-h\">.*?<span[^>]*>(.*?)</span>", page)
    assert chip == shown


def write_job(
    folder: Path, step: str, arguments: list[str], exit_code: int, log: str, **values: object
) -> None:
    job = {"step": step, "target": "", "arguments": arguments, **values}
    job_folder = folder / ".finesight/jobs/1"
    job_folder.mkdir(parents=True)
    job["started_at"] = "2000-01-01T00:00:00Z"
    (job_folder / "job.json").write_text(json.dumps(job))
    (job_folder / "log.txt").write_text(log)
    (job_folder / "exit_code").write_text(str(exit_code))


def test_estimate_of_a_changed_recipe_is_marked(folder: Path) -> None:
    (folder / "a.yaml").write_text("model: finesight-tiny\ndata: {train: a.jsonl}\n")
    job = {"step": "plan", "target": "a.yaml", "arguments": ["plan", "a.yaml"]}
    with open_client(folder) as client:
        for started_at in ("2000-01-01T00:00:00Z", "2100-01-01T00:00:00Z"):
            file = folder / ".finesight/jobs/1/job.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(job | {"started_at": started_at}))
            page = client.get("/live?step=plan&recipe=a.yaml&lang=en").json()
            assert ("has changed since" in page["bottom"]) == started_at.startswith("2000")
            assert "saved 2" in page["top"]


def test_remedy_of_a_missing_item_names_its_step(folder: Path) -> None:
    page = StudioPage(StudioView(Workspace(folder)), ServerAccess())
    for button, step, problem in (
        ("check", "check", "step Data"),
        ("estimate-memory-and-time", "plan", "step Plan"),
        ("start-the-chat", "chat", "step Train"),
    ):
        assert problem in click_button(page, button, f"step={step}")


def write_recipe(folder: Path, name: str, data: str) -> Path:
    text = f"model: finesight-tiny\ndata: {{train: {data}}}\noutput_dir: runs/{name}\n"
    (folder / f"{name}.yaml").write_text(text)
    return folder / f"{name}.yaml"


def test_command_that_runs_already_is_named_by_its_step(folder: Path) -> None:
    write_recipe(folder, "mine", "data/a/data.jsonl")
    view = StudioView(Workspace(folder))
    view.jobs.start("plan", "mine.yaml", ["plan", "mine.yaml"])
    page = StudioPage(view, ServerAccess())
    message = click_button(page, "estimate-memory-and-time", "step=plan&recipe=mine.yaml&lang=en")
    assert "the step “Plan”: the command is already running" in message


def test_data_set_that_cannot_be_moved_stays(folder: Path, tmp_path: Path) -> None:
    """The page neither empties folders beyond the workspace nor leaves half a data set."""
    shutil.copytree(folder / "photos", tmp_path / "other/a")
    (tmp_path / "other/a" / UPLOAD_MARKER).touch()
    (folder / "uploads").symlink_to(tmp_path / "other")
    import_dataset(folder / "photos", folder / "data/a", ImportOptions(prompt="Color?"))
    page = StudioPage(StudioView(Workspace(folder)), ServerAccess())
    message = click_button(page, "delete", "step=data&data=data/a")
    assert "cannot be moved to the trash: it is a link to another folder" in message
    assert (folder / "data/a/data.jsonl").exists()
    assert len([*(tmp_path / "other/a").glob("[!.]*")]) == len([*folder.glob("photos/*")])
    assert [*(folder / ".finesight/trash").iterdir()] == []


def test_unused_data_set_is_deleted_with_its_uploads(folder: Path) -> None:
    uploads = folder / "uploads"
    for name in "ab":
        shutil.copytree(folder / "photos", uploads / name)
        (uploads / name / UPLOAD_MARKER).touch()
        import_dataset(uploads / name, folder / "data" / name, ImportOptions(prompt="Color?"))
    import_dataset(folder / "photos", folder / "own", ImportOptions(prompt="Color?"))
    write_recipe(folder, "other", "data/aa/data.jsonl")
    page = StudioPage(StudioView(Workspace(folder)), ServerAccess())
    (folder / ".finesight/check").mkdir(parents=True)
    (folder / ".finesight/check/data--a.html").write_text("old")
    assert "No data set" in click_button(page, "delete", "step=data&data=data/c")
    assert "not created by the studio" in click_button(page, "delete", "step=data&data=own")
    assert click_button(page, "ask-delete", "step=data&data=data/a") == ""
    assert (folder / "data/a/data.jsonl").exists()
    assert click_button(page, "delete", "step=data&data=data/a") == ""
    assert sorted(path.name for path in folder.glob("data/*")) == ["b"]
    assert sorted(path.name for path in uploads.iterdir()) == ["b"]
    assert [*(folder / ".finesight/check").iterdir()] == []
    (trash,) = (folder / ".finesight/trash").iterdir()
    assert sorted(str(path.relative_to(trash)) for path in trash.glob("[du]*/*")) == [
        "data/a",
        "uploads/a",
    ]
    assert (trash / "data/a/data.jsonl").exists()
    assert (trash / ".finesight/check/data--a.html").exists()
    # Another data set keeps the uploads that it uses.
    import_dataset(uploads / "b", folder / "data/c", ImportOptions(prompt="Color?"))
    assert click_button(page, "delete", "step=data&data=data/b") == ""
    assert (uploads / "b/00.png").exists()
    with open_client(folder) as client:
        shown = client.get("/live?step=data").json()["top"]
    assert shown.count('class="delete"') == 1


@pytest.mark.parametrize("user", ["recipe", "pattern", "run", "data/a", "uploads/a", "labels"])
def test_data_set_in_use_is_not_deleted(
    folder: Path, user: str, request: pytest.FixtureRequest
) -> None:
    data = folder / "data/a"
    options = ImportOptions(prompt="Color?", copy_images=True)
    import_dataset(folder / "photos", data, options)
    view = StudioView(Workspace(folder))
    page = StudioPage(view, ServerAccess())
    used_by = "the recipe mine.yaml"
    if user == "recipe":
        write_recipe(folder, "mine", "data/a/data.jsonl")
    elif user == "pattern":
        write_recipe(folder, "mine", "data/*/data.jsonl")
    elif user == "run":
        # A run that holds the lock of its folder is in progress.
        run = make_run(folder / "runs/a", make_sign_answers(folder, [0.5, 1.0])).folder
        (run / "result.json").unlink()
        write_recipe(folder, "mine", "data/a/data.jsonl").rename(run / "recipe.yaml")
        lock = os.open(run, os.O_RDONLY)
        request.addfinalizer(lambda: os.close(lock))
        fcntl.flock(lock, fcntl.LOCK_EX)
        used_by = "the recipe runs/a/recipe.yaml"
    elif user in ("data/a", "uploads/a"):
        command = ["label", "finesight-tiny", user, "--prompt=Color?", "--suggest-only"]
        view.jobs.start("label", "", command)
        used_by = "the running command in the step Label"
    else:
        labels = json.loads((data / "data.jsonl").read_text().splitlines()[0])
        labels["messages"][0]["content"][0]["image"] = "../a/images/00.png"
        (folder / "data/labels").mkdir()
        (folder / "data/labels/labels.jsonl").write_text(f"{json.dumps(labels)}\n")
        used_by = "the data set data/labels"
    # The page asks for confirmation only after the first button.
    for button in ("ask-delete", "delete"):
        message = click_button(page, button, "step=data&data=data/a&lang=en")
        assert f"data/a is used by {used_by}" in message
        assert "Not deleted" in message
    assert (data / "data.jsonl").exists()


def test_recipe_without_an_unfinished_run_is_deleted(folder: Path) -> None:
    (folder / "recipes").mkdir()
    file = write_recipe(folder, "a", "a.jsonl").rename(folder / "recipes/a.yaml")
    write_recipe(folder, "own", "a.jsonl")
    run = make_run(folder / "runs/a", make_sign_answers(folder, [0.5, 1.0])).folder
    (run / "result.json").rename(folder / "result.json")
    page = StudioPage(StudioView(Workspace(folder)), ServerAccess())
    query = "step=plan&recipe=recipes/a.yaml"
    assert "not created by" in click_button(page, "delete", "step=plan&recipe=own.yaml")
    assert "used by the unfinished run runs/a" in click_button(page, "ask-delete", query)
    (folder / "result.json").rename(run / "result.json")
    with open_client(folder) as client:
        assert client.get("/live?step=plan").json()["top"].count('class="delete"') == 1
    assert click_button(page, "ask-delete", query) == ""
    assert file.exists()
    assert click_button(page, "delete", query) == ""
    assert not file.exists()
    assert (folder / "own.yaml").exists()


def test_icon_is_answered_before_sign_in(folder: Path) -> None:
    for password in ("right-password", None):
        with open_client(folder, password) as client:
            assert client.get("/favicon.ico").status_code == 204


class StudioDriver:
    """Studio page in a browser."""

    def __init__(self, browser: Browser, address: str) -> None:
        self.browser, self.address = browser, address

    def open(self, step: str, lang: str = "en") -> None:
        self.browser.visit(f"{self.address}/?step={step}&lang={lang}")
        self.wait_for(f"document.querySelector('#studio-top nav') && ({IS_LOADED})")
        self.check(RELOAD_NOTES)

    def reload(self, state: str) -> None:
        """Wait for a state, which the page must show again after a reload, without errors."""
        # A reload while Gradio is loading would abort its requests.
        self.wait_for(f"({state}) && ({IS_LOADED})")
        self.check()
        self.browser.driver.refresh()
        self.wait_for(f"({state}) && ({IS_LOADED})")
        self.check(RELOAD_NOTES)

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

    def check(self, notes: Sequence[str] = GRADIO_NOTES) -> None:
        messages = self.browser.messages()
        assert [text for text in messages if not any(map(text.__contains__, notes))] == []
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


def test_ticked_data_sets_are_in_the_recipe(folder: Path, studio: StudioDriver) -> None:
    for name in ("a", "b", "c"):
        import_dataset(folder / "photos", folder / "data" / name, ImportOptions(prompt="Color?"))
    studio.open("plan")
    studio.fill(recipe_name="both")
    box = "document.querySelector('#other-data input[type=checkbox]')"
    studio.wait_for(f"{box}?.offsetParent")
    studio.browser.run(f"{box}.click();")
    studio.browser.settle()
    studio.click("create-the-recipe")
    studio.wait_for("document.querySelector('#editor textarea')?.value.includes('train:\\n')")
    data = Workspace(folder).load_recipe(Path("recipes/both.yaml")).data
    assert len({file.path for file in data.train}) == 2


def test_two_marked_runs_are_compared(folder: Path, studio: StudioDriver) -> None:
    for name in ("runs/a", "runs/b"):
        make_run(folder / name, make_sign_answers(folder, [0.5, 1.0] * 4))
    studio.open("results")
    box = "document.querySelector('input[name=run]')"
    assert (
        studio.browser.run(f"{box}.click(); return getComputedStyle({box}).appearance;") == "auto"
    )
    is_sent = studio.browser.run(
        "let isSent = true; document.addEventListener('submit', (event) => {"
        " isSent = !event.defaultPrevented; event.preventDefault(); });"
        " document.querySelector('button[data-missing]').click(); return isSent;"
    )
    assert not is_sent
    assert len(studio.browser.driver.window_handles) == 1


def test_deletion_is_confirmed(folder: Path, studio: StudioDriver) -> None:
    for name in "ab":
        import_dataset(folder / "photos", folder / "data" / name, ImportOptions(prompt="Color?"))
    button = "document.querySelector('button.delete[data-url*=\"data%2Fb\"]')"
    studio.open("data&data=data/a")
    studio.browser.run(
        f"window.confirm = (text) => (window.asked = text, false); {button}.click();"
    )
    studio.wait_for("window.asked?.includes('Move data/b with')")
    studio.browser.settle()
    assert (folder / "data/b").exists()
    # The URL names the selected data set again, also after a refusal.
    studio.wait_for("location.search.includes('data=data%2Fa')")
    recipe = folder / "mine.yaml"
    recipe.write_text("model: finesight-tiny\ndata: {train: data/b/data.jsonl}\n")
    studio.browser.run(f"{button}.click();")
    studio.wait_for("document.querySelector('#message')?.innerText.includes('mine.yaml')")
    studio.wait_for("location.search.includes('data=data%2Fa')")
    recipe.unlink()
    studio.browser.run(f"window.confirm = () => true; {button}.click();")
    studio.wait_for(f"document.querySelector('#studio-top nav') && !{button}")
    assert sorted(path.name for path in folder.glob("data/*")) == ["a"]


def test_edits_are_unsaved_until_saving_succeeds(folder: Path, studio: StudioDriver) -> None:
    text = "model: finesight-tiny\ndata: {train: a.jsonl}\noutput_dir: runs/"
    (folder / "a.yaml").write_text(f"{text}a")
    asks = "!window.dispatchEvent(new Event('beforeunload', {cancelable: true}))"
    studio.open("plan")
    studio.fill(editor=f"{text}a\nunknown: 1")
    studio.wait_for(asks)
    studio.click("save-the-recipe")
    studio.wait_for("document.querySelector('#message .error')?.innerText.includes('unknown')")
    studio.wait_for(asks)
    studio.fill(editor=f"{text}b")
    studio.click("save-the-recipe")
    is_shown = "document.querySelector('#editor textarea')?.value.includes('runs/b')"
    studio.wait_for(f"!document.querySelector('#message .error') && {is_shown}")
    studio.wait_for(f"!({asks})")
    assert "runs/b" in (folder / "a.yaml").read_text()


def test_unlabeled_images_become_a_served_model(
    folder: Path, studio: StudioDriver, browser: Browser
) -> None:
    images = draw_dots(folder / "images", 200)

    studio.open("data")
    studio.fill(source="../images", name="dots", prompt="Which color?")
    studio.wait_for("document.querySelector('#preview .message')")
    studio.click("import")
    studio.wait_for("document.querySelector('#message .error')?.innerText.includes('outside')")
    studio.fill(source="images")
    command = "finesight import images data/dots --prompt 'Which color?' --train-fraction 0.9"
    studio.wait_for(f'document.querySelector("#preview code")?.textContent === "{command}"')
    studio.click("import")
    studio.wait_for("document.querySelector('#message .error')?.innerText.includes('step Label')")
    studio.fill(source="", name="uploaded")
    studio.upload("upload", sorted((folder / "photos").iterdir()))
    studio.click("import")
    studio.wait_for("document.querySelector('.job code')?.textContent.includes('uploads/')")
    studio.wait_for_job("finished")
    studio.reload("document.querySelector('td a')?.textContent === 'data/uploaded'")

    studio.open("label")
    studio.fill(images="images", label_prompt="Which color?", labels_name="dots", kind="classes")
    browser.press("Enter")
    studio.fill(classes=",".join(COLORS))
    studio.click("start-labelling")
    studio.reload(LINK)
    browser.visit(browser.run(f"return {LINK}.href;"))
    studio.wait_for("document.querySelector('#position')?.textContent.includes('1 of 200')")
    for index in range(NUM_LABELS):
        name = browser.run("return document.querySelector('#name').textContent;")
        browser.press(str(1 + COLORS.index(images[name])), "Enter")
        shown = f"document.querySelector('#position')?.textContent.includes('{index + 2} of')"
        studio.wait_for(shown)
    studio.reload(f"document.querySelector('#done')?.textContent === '{NUM_LABELS} of 200 done'")
    studio.open("label")
    studio.click("stop")
    studio.wait_for_job("stopped")
    studio.reload("document.querySelector('td a')?.textContent === 'data/dots'")
    assert browser.run("return document.querySelector('td.number').textContent;") == "24"

    studio.open("check")
    studio.click("check")
    studio.reload("document.querySelector('#studio-bottom iframe')")
    studio.open("plan")
    studio.fill(metric="classification")
    browser.press("Enter")
    studio.fill(recipe_name="dots", epochs="10", learning_rate="2e-3")
    studio.click("create-the-recipe")
    studio.wait_for("document.querySelector('#editor textarea')?.value.includes('epochs: 10')")
    studio.wait_for("document.querySelector('#editor textarea').value.includes('classification')")
    studio.click("estimate-memory-and-time")
    studio.wait_for_job("finished")
    studio.reload("document.querySelector('#editor textarea')?.value.includes('epochs: 10')")
    studio.open("train")
    studio.click("start-or-resume")
    studio.wait_for_job("finished")
    studio.reload("document.querySelectorAll('.chart').length > 2")
    studio.open("results")
    studio.reload("document.querySelector('td:last-child')?.textContent.includes('accuracy')")

    studio.open("chat")
    studio.click("start-the-chat")
    studio.reload(LINK)
    chat = ChatPageDriver(browser, browser.run(f"return {LINK}.href;"))
    labeled = json.loads((folder / "data/dots/labels.jsonl").read_text().splitlines()[0])
    image = folder / "images" / Path(labeled["id"]).name
    chat.ask("Which color?", [image])
    assert chat.read_texts(".reply .message-text") == [images[image.name]]
    studio.reload("document.querySelector('.reply .message-text')")
    studio.open("chat")
    studio.click("stop")
    studio.wait_for_job("stopped")
    studio.open("export")
    studio.click("start-the-server")
    studio.reload(LINK)
    models = browser.run(f"return {LINK}.href;")
    assert ask_server(models.removesuffix("models"), image) == images[image.name]
    studio.click("stop")
    studio.wait_for_job("stopped")
    studio.check()

    checker = AxeChecker()
    for step, lang in product(STEPS, get_args(Language)):
        studio.open(step, lang)
        texts = browser.run(VISIBLE_LABELS_SCRIPT)
        chinese = [text for text in texts if re.search("[\u4e00-\u9fff]", text)]
        assert chinese == (texts if lang == "zh" else []), step
        assert checker.find_layout_problems(browser) == [], (step, lang)
        studio.check()
