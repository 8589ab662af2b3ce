"""Tests of the studio page: access and forms without a browser, and the way to a chat reply."""

import contextlib
import html
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated
from urllib.parse import parse_qsl, urlencode, urlsplit

import pytest
from case_files import load_cases
from run_dir_fixtures import MANIFEST, TUNE, make_run, make_sign_answers
from studio_fixtures import (
    RUNNING,
    call_page,
    click_button,
    make_page,
    open_client,
    read_fields,
    read_live,
    store_upload,
    write_job,
    write_outcome,
    write_recipe,
)

from finesight.app import studio_page, studio_view
from finesight.app.jobs import Job, JobStore
from finesight.app.studio_page import Form, StudioPage
from finesight.app.studio_view import (
    FORMS,
    FORMS_OF_STEPS,
    STEPS,
    Selection,
    build_form,
    list_field_names,
)
from finesight.app.workspace import UPLOAD_MARKER, Workspace
from finesight.cli.app import build_command, run_command
from finesight.errors import Step, UserError
from finesight.files.storage import write_file
from finesight.files.worker_pool import WorkerLimitError
from finesight.ingest.import_source import ImportOptions
from finesight.ingest.importer import import_dataset
from finesight.model_folder import TINY_MODEL
from finesight.operations import evaluation, find_operation
from finesight.operations.operation import Outcome, Parameter, as_function
from finesight.operations.options import RunOrModelArgument
from finesight.report.i18n import translate, use_language
from finesight.report.run_reader import read_run
from finesight.report.run_verdict import judge_run
from finesight.samples.example_question import read_example
from finesight.serve.request_middleware import read_api_keys
from finesight.settings.recipe import load_recipe

CASES = load_cases("studio")
OPTIONS = ImportOptions(prompt="Which color?")
LABEL_FORM = ("photos", "Color?", "labels", TINY_MODEL, "", "", "", "")
RECIPE_FORM = ([], "r", TINY_MODEL, "", "", "", "")


def add_run(folder: Path, name: str = "runs/a") -> Path:
    return make_run(folder / name, make_sign_answers(folder, [0.5, 1.0] * 4)).folder


def add_data(folder: Path, *names: str) -> None:
    for name in names:
        import_dataset(folder / "photos", folder / "data" / name, OPTIONS)


def read_others(page: StudioPage, query: dict[str, str]) -> list[str]:
    """Return the data sets that the recipe form offers besides the selected one."""
    text = page.render(Selection.parse(query, "en"))
    return re.findall('name="others" value="(.*?)"', text)


def upload_files(folder: Path) -> list[Path]:
    """Return a table and the images that it names."""
    files = [folder.parent / "t.csv", *sorted((folder / "photos").glob("*.png"))]
    files[0].write_text("photo,text\n" + "".join(f"{file.name},red\n" for file in files[1:]))
    return files


@pytest.mark.parametrize(
    ("source", "columns", "found"),
    [
        ("table.csv", "", []),
        ("table.csv", "--map image=photo --map answer=text", ["image=photo"]),
        ("table.csv", "image=photo answer=text", ["--map", "answer=text"]),
        ("table.csv", "image=photo 'answer", "open quote"),
        ("table.csv", "image", "not a mapping"),
    ],
)
def test_import_form_is_checked_before_the_command_starts(
    folder, page, started, source, columns, found
):
    (folder / "table.csv").write_text("photo,text\nphotos/00.png,a b\nphotos/01.png,c d\n")
    message = click_button(page, "import", "step=data", None, source, "a", "What?", columns)
    if isinstance(found, str):
        assert found in message
        assert started == []
    else:
        assert message == ""
        assert {"What?", *found} <= {*started[0]}


def test_last_rows_for_validation_replace_the_prefilled_share(folder, page, started):
    texts = {"import:source": "photos", "import:out": "a", "import:eval_last": "4"}
    shown = read_fields(page, {})["import:train_fraction"]
    page.run_action("import", Selection(), Form(texts=texts | {"import:train_fraction": shown}))
    assert "--train-fraction" not in started[0]
    assert started[0][started[0].index("--eval-last") + 1] == "4"
    page.run_action("import", Selection(), Form(texts=texts | {"import:train_fraction": "0.5"}))
    assert "--train-fraction" in started[1]


def test_names_of_uploads_are_taken(folder, page):
    add_data(folder, "a")
    (folder / "uploads/dots").mkdir(parents=True)
    assert 'data-taken="a dots"' in page.render(Selection())


def test_missing_thumbnail_is_not_stored(folder, monkeypatch):
    add_data(folder, "a")
    limits = ["too slow"]
    run_job = Workspace.run_job

    def fail_once(workspace, *arguments):
        if limits:
            raise WorkerLimitError(limits.pop())
        return run_job(workspace, *arguments)

    monkeypatch.setattr(Workspace, "run_job", fail_once)
    with open_client(folder) as client:
        answers = [client.get("/view/image?data=data/a&version=1") for _ in range(2)]
    types = [answer.headers["content-type"] for answer in answers]
    assert types == ["image/svg+xml", "image/png"]
    stored = ["max-age" in answer.headers.get("cache-control", "") for answer in answers]
    assert stored == [False, True]


def test_refused_or_failed_import_does_not_block_its_name(folder, page, started):
    files = upload_files(folder)
    # The command fails: its uploads stay for another attempt, with files of the next upload.
    for source in ("", "uploads/a/t.csv"):
        assert click_button(page, "import", "", files, source, "a", "Color?", "", "") == ""
        assert started[-1][1:3] == ["uploads/a/t.csv", "data/a"]
    write_job(folder, "data", " ".join(started[-1][:3]))
    assert "The uploaded files are kept" in read_live(folder, "lang=en")["bottom"]
    # A refused upload changes nothing.
    assert "not a mapping" in click_button(page, "import", "", files[:1], "", "a", "", "image", "")
    assert len([*folder.glob("uploads/a/*.png")]) == 24
    assert click_button(page, "import", "", files[:1], "", "a", "Color?", "", "") == ""
    assert click_button(page, "import", "", None, "uploads/a/t.csv", "a", "Color?", "", "") == ""
    message = click_button(page, "import", "", files, "photos", "a", "Color?", "", "")
    assert "or enter one file or folder" in message


def test_folders_and_columns_of_an_uploaded_archive_are_found(folder, page, started):
    home = folder.parent / "upload"
    home.mkdir()
    for file in (folder / "photos").glob("*.png"):
        shutil.copy(file, home)
    rows = [f"shapes/{file.name},red\n" for file in sorted(home.iterdir())]
    (home / "t.csv").write_text("image,class\n" + "".join(rows))
    (home / "shapes").mkdir()
    for file in home.glob("*.png"):
        file.rename(home / "shapes" / file.name)
    files = [Path(shutil.make_archive(str(folder.parent / "a"), "zip", home))]
    assert click_button(page, "import", "", files, "", "a", "Which color?", "", "") == ""
    assert "--map" not in started[0]
    with contextlib.chdir(folder):
        assert run_command(started[0]) == 0
    assert len((folder / "data/a/data.jsonl").read_text().splitlines()) == 24


def test_uploaded_images_without_labels_are_labeled_next(folder, page, started):
    # They precede the form of an earlier command.
    form = ("photos", "Color?", "old", TINY_MODEL, "text", "", "", "0.8")
    texts = {f"label:{name}": text for name, text in zip(FORMS["label"], form, strict=False)}
    write_job(folder, "label", "label finesight-tiny photos", form=texts)
    files = sorted((folder / "photos").glob("*.png"))
    assert 'data-kind="classes"' in page.render(Selection())
    message, url = call_page(page, "import", {"lang": "en"}, files, "", "dots", "Hue?", "", "0.9")
    query = dict(parse_qsl(urlsplit(url).query))
    assert (message, query["step"], started) == ("", "label", [])
    names = ("label:sources", "label:out", "label:kind", "label:prompt")
    fields = read_fields(page, query)
    assert [fields[name] for name in names] == ["uploads/dots", "dots", "", "Hue?"]
    assert "images=uploads%2Fdots" in read_live(folder, url[3:])["url"]
    assert "label:sources" not in call_page(page, "label", query, *form)[1]
    fields = read_fields(page, {"step": "label"})
    assert [fields[name] for name in names] == ["photos", "old", "text", "Color?"]
    # The task of the first page, such as Classify, determines the kind.
    form = Form(
        texts={"import:out": "hues", "import:kind": "classes"},
        uploads=[store_upload(page, files[0])],
    )
    url = page.run_action("import", Selection(), form)
    fields = read_fields(page, dict(parse_qsl(urlsplit(url).query)))
    assert [fields[name] for name in names[1:3]] == ["hues", "classes"]


def test_only_runs_of_the_workspace_are_shown(folder):
    for name in ("runs/a", "runs/b", "../outside"):
        add_run(folder, name)
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
        assert ">../outside<" not in client.get("/?step=results&run=../outside").text


def test_ended_page_leads_to_its_step_and_items(folder):
    add_run(folder)
    add_data(folder, "a", "b")
    write_job(folder, "label", "label runs/a photos --out data/a", target="runs/a", has_page=True)
    write_job(folder, "chat", "web runs/a", name="2", target="runs/a", has_page=True)
    with open_client(folder) as client:
        for job, items in (("1", {"step": "label", "data": "data/a"}), ("2", {"step": "chat"})):
            navigation = {"sec-fetch-mode": "navigate"}
            ended = client.get(f"/pages/{job}/?lang=zh", headers=navigation)
            assert (ended.status_code, ended.headers["location"]) == (303, "studio?lang=zh")
            location = client.get(f"/pages/{job}/studio?lang=zh").headers["location"]
            assert urlsplit(location).path == "../.././"
            expected = items | {"job": job, "run": "runs/a", "lang": "zh"}
            assert dict(parse_qsl(urlsplit(location).query)) == expected


def test_running_server_has_its_address_to_copy(folder, monkeypatch):
    add_run(folder)
    monkeypatch.setattr(Job, "is_ready", True)
    server = {"target": "runs/a", "port": 7, "exit_code": None}
    write_job(folder, "export", "serve runs/a --port 7", **server)
    shown = read_live(folder, "step=export&run=runs/a&lang=en")["bottom"]
    assert 'data-copy="http://127.0.0.1:7/v1"' in shown
    assert 'id="program"' not in shown, "its log does not name the address yet"


def test_few_validation_samples_are_named_before_the_training(folder, page, monkeypatch):
    monkeypatch.chdir(folder)
    add_data(folder, "a")
    file = folder / "data/a/eval.jsonl"
    write_recipe(folder, "r", "data/a/data.jsonl, eval: data/a/eval.jsonl")
    for count, is_warning in ((3, True), (19, True), (20, False)):
        file.write_text("{}\n" * count)
        text = f"{count} validation samples show only very large changes; with 20 or more"
        for step in ("data", "label", "check", "plan", "train"):
            shown = page.render(Selection(step=step))
            assert (text in shown) == is_warning, step
    write_recipe(folder, "r", "data/a/data.jsonl")
    assert "0 validation samples show only" in page.render(Selection(step="train"))
    assert "validation samples show" not in page.render(Selection(step="results"))


def test_first_page_names_a_training_that_stopped(folder, page):
    add_run(folder)
    assert "Resume it" not in page.render(Selection())
    (folder / "runs/a/result.json").unlink()
    shown = page.render(Selection())
    assert "The run was killed after" in shown
    assert "Resume it in the step Train" in shown
    assert "Resume it" not in page.render(Selection(step="check"))
    write_recipe(folder, "a", "photos")
    write_job(folder, "train", "train a.yaml --resume", target="a.yaml", exit_code=None)
    assert "Resume it" not in page.render(Selection())
    assert ">resuming<" in page.render(Selection(step="train"))


def test_run_that_ends_while_it_is_read_is_finished(folder, page, monkeypatch):
    result = add_run(folder) / "result.json"
    content = result.read_bytes()
    result.unlink()
    get_run_status = studio_view.get_run_status

    def end_before(record):
        write_file(result, content)
        return get_run_status(record)

    def find_report(shown: str) -> str:
        return re.search('iframe src="(.*?)"', shown)[1]

    running = page.render(Selection(step="results"))
    monkeypatch.setattr(studio_view, "get_run_status", end_before)
    finished = page.render(Selection(step="results"))
    assert ">finished<" in finished
    # The report shows the result, so it is loaded again.
    assert find_report(finished) != find_report(running)


def test_selected_run_is_quantized_to_a_new_folder(folder, page, started):
    add_run(folder)
    assert click_button(page, "quantize", "step=export&run=runs/a", "mine") == ""
    assert started == [["export", "runs/a", "models/mine-w4a16", "--quantize", "w4a16"]]


def test_only_servers_and_hosts_of_the_command_line_are_used(folder, started):
    url = "http://localhost:9/v1"
    page = make_page(folder, teacher=url)
    names = {one.name for form in FORMS for one in build_form(form)}
    hidden = {"label:teacher_key", "import:allow_host", "serve:allow_media_host"}
    assert names & {"label:teacher", *hidden} == {"label:teacher"}
    texts = {"label:sources": "photos", "label:out": "new", **dict.fromkeys(hidden, "HOST")}
    for teacher in (url, TINY_MODEL):
        form = Form(texts=texts | {"label:teacher": teacher, "label:teacher_model": "m"})
        page.run_action("label", Selection(step="label"), form)
        assert started[-1][started[-1].index("--teacher") + 1] == teacher
    for teacher, reason in (
        *(("http://elsewhere:9/v1", "is a URL"), ("/etc/model", "outside of the workspace")),
        ("../model", "outside of the workspace"),
    ):
        form = Form(texts=texts | {"label:teacher": teacher})
        with pytest.raises(UserError, match=reason):
            page.run_action("label", Selection(step="label"), form)
    assert len(started) == 2
    assert "HOST" not in str(started)


def evaluate_more(
    run_or_model: RunOrModelArgument,
    tolerance: Annotated[float | None, Parameter(minimum=0)] = None,
) -> Outcome[float]:
    """Evaluate with a new option.

    Args:
        tolerance: Accepted difference.
    """
    return Outcome(tolerance or 0.0)


def test_new_option_of_an_operation_appears_in_command_function_and_form(
    folder, page, started, monkeypatch
):
    add_run(folder)
    monkeypatch.setattr(evaluation, "evaluate", evaluate_more)
    selection = Selection(step="results", run="runs/a")
    assert 'name="eval:tolerance"' in page.render(selection)
    page.run_action("eval", selection, Form(texts={"eval:tolerance": "0.5"}))
    assert started == [["eval", "runs/a", "--tolerance", "0.5"]]
    with pytest.raises(UserError, match="at least 0") as caught:
        page.run_action("eval", selection, Form(texts={"eval:tolerance": "-1"}))
    assert caught.value.where == "eval:tolerance"
    command = build_command("eval", find_operation("eval"))
    assert "--tolerance" in {word for param in command.params for word in param.opts}
    assert as_function(evaluation.evaluate)("runs/a", tolerance=0.25) == 0.25


def test_options_of_operations_are_fields_of_the_page(folder, page, started):
    add_run(folder)
    assert "editor:text" not in page.render(Selection(step="plan")), "without a recipe"
    write_recipe(folder, "a", "a.jsonl")
    for step in STEPS:
        shown = re.findall(r' name="([\w:.]+)"', page.render(Selection(step=step, run="runs/a")))
        names = {one.name for form in FORMS_OF_STEPS[step] for one in build_form(form)}
        assert {name for name in names if not name.startswith("export:")} <= {*shown}, step
    (folder / "new.jsonl").write_text("")
    texts = {"eval:data": "new.jsonl", "eval:limit": "3", "eval:thinking": "no", "eval:device": ""}
    texts["eval:out"] = "answers.jsonl"  # a new file
    selection = Selection(step="results", run="runs/a")
    page.run_action("eval", selection, Form(texts=texts))
    words = ["--data", "new.jsonl", "--limit", "3", "--out", "answers.jsonl", "--no-thinking"]
    assert started == [["eval", "runs/a", *words]]
    invalid = {"data": "../other.jsonl", "metric": "new.py:score", "limit": "0", "batch_size": "a"}
    for name, text in invalid.items():
        with pytest.raises(UserError) as caught:
            page.run_action("eval", selection, Form(texts={f"eval:{name}": text}))
        assert caught.value.where == f"eval:{name}"
    texts = {"import:source": "photos", "import:out": "a", "import:rows": "0:3"}
    page.run_action("import", Selection(), Form(texts=texts))
    assert started[1] == ["import", "photos", "data/a", "--rows", "0:3"]


@pytest.mark.parametrize("operation", ["eval", "predict"])
def test_page_names_no_environment(folder, page, started, operation):
    """An uploaded file may be one."""
    add_run(folder)
    (folder / "photos" / "a.txt").write_text("")
    assert f"{operation}:environment" not in {one.name for one in build_form(operation)}
    texts = {f"{operation}:environment": "photos/a.txt:A", "predict:out": "out"}
    texts |= {"predict:images": "photos", "predict:prompt": "Which?"}
    page.run_action(operation, Selection(step="results", run="runs/a"), Form(texts=texts))
    assert "--environment" not in started[0]


def test_answers_of_an_evaluation_get_a_free_name(folder, page, started):
    add_run(folder)
    query, selection = {"step": "results", "run": "runs/a"}, Selection(step="results", run="runs/a")
    assert read_fields(page, query)["eval:out"] == "answers/a-eval.jsonl"
    write_file(folder / "answers/a-eval.jsonl", b"mine")
    # A running command has not written its file yet.
    write_job(folder, "results", "eval runs/a --out answers/a-eval-2.jsonl", exit_code=None)
    free = "answers/a-eval-3.jsonl"
    assert read_fields(page, query)["eval:out"] == free
    for name in ("answers/a-eval.jsonl", "answers/a-eval-2.jsonl", "photos", "recipes/../own.csv"):
        (folder / "own.csv").touch()
        with pytest.raises(UserError, match="never overwritten") as caught:
            page.run_action("eval", selection, Form(texts={"eval:out": name}))
        assert caught.value.where == "eval:out"
        assert str(caught.value.remedy).startswith("choose another name, such as answers/")
    page.run_action("eval", selection, Form(texts={"eval:out": free}))
    assert started == [["eval", "runs/a", "--out", free]]


def test_file_names_are_escaped(folder):
    write_recipe(folder, "<b>", "a.jsonl")
    for step in STEPS:
        shown = read_live(folder, f"step={step}&recipe=<b>.yaml&job=<b>")
        assert "<b>" not in shown["top"] + shown["bottom"], step


@pytest.mark.parametrize("password", ["right-password", None])
def test_served_api_needs_a_key_if_the_studio_has_a_password(folder, password, started):
    add_run(folder)
    page = make_page(folder, has_password=password is not None)
    for _ in range(2):
        assert click_button(page, "serve", "step=export&run=runs/a") == ""
    if password is None:
        assert "--key-file" not in started[0]
        return
    assert started[0][-2:] == started[1][-2:]
    option, name = started[0][-2:]
    assert option == "--key-file"
    file = Path(name)
    assert (file.stat().st_mode & 0o777, file.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    [key] = read_api_keys(file)
    assert len(key) > 40
    assert password not in key
    assert not any(key in word for word in started[0])


def test_key_of_a_received_workspace_is_not_used(folder, page, started, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    add_run(folder)
    write_file(folder / ".finesight/api-key", b"a-key-that-the-sender-knows")
    page = make_page(folder, has_password=True)
    assert click_button(page, "serve", "step=export&run=runs/a") == ""
    file = tmp_path / "state/finesight/api-key"
    assert started[0][-1] == str(file)
    assert "sender" not in file.read_text()


def test_many_images_are_read_into_tables(folder, page, started):
    add_run(folder)
    (folder / "runs/a/adapter").mkdir(exist_ok=True)
    selection = Selection(step="chat", run="runs/a")
    texts = {"predict:prompt": "Color?", "predict:out": "a"}
    with pytest.raises(UserError, match="Upload files") as caught:
        page.run_action("predict", selection, Form(texts=texts))
    assert caught.value.where == "files"
    uploads = [store_upload(page, folder / f"photos/0{n}.png") for n in (1, 2)]
    page.run_action("predict", selection, Form(texts=texts, uploads=uploads))
    page.run_action("predict", selection, Form(texts={**texts, "predict:images": "photos"}))
    options = ["--prompt", "Color?", "--out", "answers/a"]
    assert started == [["predict", "runs/a", path, *options] for path in ("uploads/a", "photos")]
    write_job(folder, "chat", " ".join(started[0]), target="runs/a", exit_code=0)
    assert "deleted or moved" in read_live(folder, "step=chat")["bottom"]
    write_file(folder / "answers/a/answers.csv", b"image")
    shown = read_live(folder, "step=chat")["bottom"]
    assert re.findall('href="(answers/.*?)"', shown) == ["answers/1/answers.csv"]
    assert "First answers" not in shown
    answer = b'{"id": "1", "image": "photos/01.png", "answer": "<i>red</i>"}\n'
    write_file(folder / "answers/a/answers.jsonl", answer)
    shown = read_live(folder, "step=chat")["bottom"]
    assert re.findall("<td>(.*?)</td>", shown) == ["01.png", "&lt;i&gt;red&lt;/i&gt;"]
    (folder / "answers/a/answers.jsonl").unlink()
    write_file(folder / "answers/a/answers.xlsx", b"workbook")
    shown = read_live(folder, "step=chat")["bottom"]
    main, *others = re.findall('class="button(.*?)" href="answers/1/answers.(.*?)"', shown)
    assert (main, others) == ((" primary result-action", "xlsx"), [("", "csv")])
    with open_client(folder) as client:
        table = client.get("/answers/1/answers.csv")
        assert (table.text, "attachment" in table.headers["content-disposition"]) == ("image", True)
        for path in ("1/answers.jsonl", "1/sha256.json"):
            assert client.get(f"/answers/{path}").status_code == 404
        assert client.get("/answers/2/answers.csv").status_code == 422


def test_name_of_a_table_is_that_of_a_folder(folder, page, started):
    """With a suffix, the command would write a single file, which the page does not show."""
    add_run(folder)
    texts = {"predict:prompt": "?", "predict:images": "photos", "predict:out": "a.XLSX"}
    page.run_action("predict", Selection(step="chat", run="runs/a"), Form(texts=texts))
    assert started[0][-1] == "answers/a"


def test_two_tabs_read_their_own_images(folder, page, monkeypatch):
    """Both propose the same name, of which no folder exists while the first one runs."""
    add_run(folder)
    started: list[list[str]] = []

    def start(jobs, step, target, arguments, **options):
        started.append(arguments)
        name = str(len(started))
        return write_job(folder, step, " ".join(arguments), name=name, exit_code=None)

    monkeypatch.setattr(JobStore, "start", start)
    texts = {"predict:prompt": "Color?", "predict:out": "a"}
    for number in (1, 2):
        uploads = [store_upload(page, folder / f"photos/0{number}.png")]
        form = Form(texts=texts, uploads=uploads)
        page.run_action("predict", Selection(step="chat", run="runs/a"), form)
    outs = [(words[2], words[-1]) for words in started]
    assert outs == [("uploads/a/01.png", "answers/a"), ("uploads/a-2/02.png", "answers/a-2")]
    files = {file.name for file in (folder / "uploads/a-2").glob("*.png")}
    assert files == {"02.png"}
    # A rejected form leaves no files behind.
    uploads = [store_upload(page, folder / "photos/03.png")]
    form = Form(texts={**texts, "predict:batch_size": "x"}, uploads=uploads)
    with pytest.raises(UserError):
        page.run_action("predict", Selection(step="chat", run="runs/a"), form)
    assert not (folder / "uploads/a-3").exists()


@pytest.mark.parametrize("out", ["../outside", ".finesight/jobs/1", "answers/link", "-x", ""])
def test_answers_of_a_received_workspace_are_in_its_folder(folder, out):
    """A job file may name any folder."""
    add_run(folder)
    outside = folder.parent / "outside"
    for parent in (outside, folder / ".finesight/jobs/1", folder / "-x", folder):
        write_file(parent / "answers.csv", b"secret")
    (folder / "answers").mkdir()
    (folder / "answers/link").symlink_to(outside)
    options = f"--out {out}" if out else ""
    write_job(folder, "chat", f"predict runs/a photos {options}", target="runs/a", exit_code=0)
    assert "answers.csv" not in read_live(folder, "step=chat&run=runs/a")["bottom"]
    with open_client(folder) as client:
        assert client.get("/answers/1/answers.csv").status_code == 404


def test_folders_of_uploads_are_proposed(folder, page):
    add_run(folder)
    for name in ("b", ".hidden", "<i>"):
        (folder / "uploads" / name).mkdir(parents=True)
    (folder / "uploads/link").symlink_to(folder)
    (folder / "uploads/mapping.yaml").touch()
    shown = page.render(Selection(step="chat", run="runs/a"))
    found = re.findall('<option value="(uploads/.*?)">', shown)
    assert sorted(found) == ["uploads/&lt;i&gt;", "uploads/b"]


def test_label_form_offers_the_prompt_of_the_data(folder, page):
    query = {"step": "label", "lang": "en"}
    assert read_fields(page, query)["label:prompt"] == ""
    add_data(folder, "a")
    assert read_fields(page, query)["label:prompt"] == "Which color?"
    assert "Prompt (required)" not in page.render(Selection.parse(query, "en"))


RENDER_STEPS = """
import sys
from pathlib import Path
from finesight.app.pages import UploadStore
from finesight.app.studio_page import StudioPage
from finesight.app.studio_view import STEPS, Selection, StudioView
from finesight.app.workspace import Workspace
view, store = StudioView(Workspace(Path(sys.argv[1]))), UploadStore(Path("uploads"), 1)
page = StudioPage(view, store, False, None, 0)
texts = [page.render(Selection.parse({"step": s, "run": "runs/a"}, "en")) for s in STEPS]
assert all("run=runs%2Fa" in text for text in texts[4:])
print("torch" in sys.modules)
"""


def test_no_step_imports_torch(folder, tmp_path):
    """Its import takes seconds, in which no page is answered."""
    run = add_run(folder)
    shutil.rmtree(run / "adapter")
    command = [sys.executable, "-c", RENDER_STEPS, str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.stdout == "False\n", result.stderr


def test_unfinished_run_is_used_with_its_newest_checkpoint(folder, page, started):
    run = add_run(folder)
    manifest = {**MANIFEST, "format_version": 2, "prompts": ["Which color?"]}
    manifest["tune"] = {**TUNE, "merger": "lora"}
    (run / "manifest.json").write_text(json.dumps(manifest))
    for name in ("step-9", "step-20", "step-x", "best"):
        (run / "checkpoints" / name).mkdir(parents=True)
    (run / "adapter").rename(folder / "adapter")
    buttons = {"web": (), "serve": (), "merge": ("m",)}
    for button, values in {**buttons, "label": LABEL_FORM}.items():
        step = {"web": "chat", "label": "label"}.get(button, "export")
        assert click_button(page, button, f"step={step}&run=runs/a", *values) == ""
        shown = read_live(folder, f"step={step}&lang=en")["top"]
        assert "The run is not finished: its newest checkpoint is used" in shown
    assert [words[1] for words in started] == ["runs/a/checkpoints/step-20"] * 4
    (run / "predictions/after.jsonl").unlink()
    (run / "predictions/before.jsonl").write_text(
        '{"image": "photos/00.png", "question": "<image>Which color?"}\n'
    )
    with contextlib.chdir(folder):
        assert read_example(Path("runs/a")) == (("photos/00.png",), "Which color?")
    shutil.rmtree(run / "checkpoints")
    for button, values in buttons.items():
        message = click_button(page, button, "step=export&run=runs/a", *values)
        assert "no weights yet" in message
        assert "step Train" in message
    assert click_button(page, "label", "step=label&run=runs/a", *LABEL_FORM) == ""
    assert started[4][1] == TINY_MODEL
    shown = read_live(folder, "step=label&run=runs/a&lang=en")["top"]
    assert ("no weights yet" in shown, 'class="command"' in shown) == (True, False)
    (folder / "adapter").rename(run / "adapter")
    assert click_button(page, "web", "step=chat&run=runs/a") == ""
    assert started[5][1] == "runs/a"


def test_labelling_needs_no_run(folder, page, started):
    add_run(folder)
    form = ["photos", "Color?", "x", TINY_MODEL, "classes", "red, blue", "a, b", "0.8", ""]
    with use_language("zh"):
        assert "自动检测" in page.render(Selection(step="label"))
    for run, needs_prompt in (("", False), ("-", True)):
        text = page.render(Selection.parse({"step": "label", "run": run}, "en"))
        assert ("(required)" in text) == needs_prompt
    shown = read_live(folder, "step=label&lang=en")["top"]
    [link] = re.findall(r'href="([^"]*)">No run: use the model', shown)
    query = urlsplit(html.unescape(link)).query
    assert read_live(folder, query)["url"].count("run=-") == 1
    # Other steps select the newest run again.
    url = read_live(folder, query.replace("step=label", "step=chat"))["url"]
    assert "run=runs%2Fa" in url
    for text, model in ((query, TINY_MODEL), ("step=label&run=runs/a", "runs/a")):
        assert click_button(page, "label", text, *form) == ""
        words = started.pop()
        assert words[1] == model
        options = ["--prompt", "Color?", "--out", "data/x", "--kind", "classes"]
        assert words[3:] == [*options, "--classes", "red, blue", "--train-fraction", "0.8"]


def test_run_without_its_plugins_is_listed(folder):
    plugins = [{"kind": "metrics", "name": "gone", "package": "gone", "version": "1"}]
    manifest = {**MANIFEST, "format_version": 2, "tune": {**TUNE, "merger": "lora"}}
    (add_run(folder) / "manifest.json").write_text(json.dumps({**manifest, "plugins": plugins}))
    assert "run=runs%2Fa" in read_live(folder, "step=train")["top"]
    # Its report names the missing package.
    with pytest.raises(UserError, match="gone==1"):
        read_run(folder / "runs/a")


def test_cards_show_an_image_of_the_workspace(folder, tmp_path):
    add_data(folder, "a")
    outside = shutil.copytree(folder / "photos", tmp_path / "photos")
    import_dataset(outside, folder / "data/b", OPTIONS)
    run = add_run(folder)
    recipe = "model: finesight-tiny\ndata: {train: data/a/data.jsonl}\noutput_dir: runs/a\n"
    (run / "recipe.yaml").write_text(recipe)
    with open_client(folder) as client:
        page = html.unescape(client.get("/?step=data").text + client.get("/?step=results").text)
        types = {}
        for url in re.findall(r'<img src="(view/image[^"]*)"', page):
            answer = client.get(f"/{url}")
            assert "sandbox" in answer.headers["content-security-policy"]
            types[dict(parse_qsl(urlsplit(url).query)).popitem()[0], url.split("=")[1][:9]] = (
                answer.headers["content-type"]
            )
        unknown = client.get("/view/image?data=../../etc")
        assert answer.headers["cache-control"].startswith("private")
        # A null byte in the name of an image, and folders that are no data sets.
        record = (folder / "data/a/data.jsonl").read_text().splitlines()[0]
        broken = re.sub('"image": *"[^"]*"', '"image": "a\\\\u0000.png"', record)
        assert broken != record
        write_file(folder / "data/c/data.jsonl", f"{broken}\n".encode())
        for query in ("data=data/c", "data=photos", "run=photos", "data=.finesight", "data=%00"):
            answer = client.get(f"/view/image?{query}")
            assert (answer.status_code, answer.headers["content-type"]) == (200, "image/svg+xml")
    assert unknown.headers["content-type"] == "image/svg+xml"
    assert sorted(types.values()) == ["image/png", "image/png", "image/svg+xml"]


def test_card_of_a_run_has_score_interval_and_curve(folder):
    add_run(folder)
    shown = read_live(folder, "step=results&run=runs/a&lang=en")["top"]
    card = shown[shown.index('<li class="card item">') :]
    assert re.search(r"<strong>[\d.]+</strong>", card)
    assert re.search(r"\([\d.]+ to [\d.]+\)", card)
    assert '<polyline points="0.0,' in card
    assert re.search(r'<time datetime="[^"]+[+-]\d\d:\d\d">', card)
    assert "UTC" not in shown
    assert str(folder) not in shown


@pytest.mark.parametrize("step", STEPS)
def test_practice_model_is_named_on_pages_that_use_it(folder, step):
    add_data(folder, "a")
    recipe = write_recipe(folder, "a", "data/a/data.jsonl")
    run = add_run(folder)
    for model, is_practice in ((TINY_MODEL, True), ("Qwen/Qwen2-VL-2B-Instruct", False)):
        recipe.write_text(re.sub("(?<=model: ).*", model, recipe.read_text()))
        (run / "manifest.json").write_text(json.dumps({**MANIFEST, "base_model": model}))
        (run / "metrics.jsonl").touch()
        shown = read_live(folder, f"step={step}&recipe=a.yaml&run=runs/a&lang=en")["top"]
        assert ("it cannot read photos" in shown) is is_practice


def test_model_cards_say_what_fits_this_machine(folder, page, monkeypatch):
    add_data(folder, "a")
    for gpu_gb, num_dense, num_nf4 in ((0.0, 0, 0), (8.6, 1, 1), (25.8, 3, 0)):
        num_fitting = num_dense + num_nf4
        monkeypatch.setattr(studio_page, "find_gpu_memory", lambda gpu_gb=gpu_gb: gpu_gb)
        text = page.render(Selection(step="plan"))
        assert text.count("fits this machine") == num_dense
        assert text.count("fits with weights in 4 bits") == num_nf4
        assert text.count("needs a GPU with at least") == 3 - num_fitting
        assert len(re.findall(r"About [\d,]+ min for", text)) == num_fitting
    assert re.search(r'value="finesight-tiny"\s+checked', text)


def test_training_starts_with_the_proposed_recipe(folder, page, started):
    assert "train-now" not in read_live(folder, "step=data")["bottom"]
    add_data(folder, "dots")
    write_recipe(folder, "older", "data/dots/train.jsonl")
    for step in ("data", "label", "check"):
        write_job(folder, step, f"{step} a", exit_code=0)
        assert ("train-now" in read_live(folder, f"step={step}")["bottom"]) is (step != "check")
    message, url = call_page(page, "train-now", {"step": "data", "data": "data/dots"})
    assert (message, started) == ("", [["train", "recipes/dots.yaml", "--resume"]])
    assert dict(parse_qsl(urlsplit(url).query))["step"] == "train"
    recipe = load_recipe(folder / "recipes/dots.yaml")
    assert (recipe.model, recipe.output_dir) == (TINY_MODEL, Path("runs/dots"))
    message, _ = call_page(page, "train-now", {"data": "data/none"})
    assert "No data set is selected" in message
    recipe = "recipes/dots.yaml"
    write_job(folder, "train", f"train {recipe}", name="2", target=recipe, exit_code=None)
    assert "train-now" not in read_live(folder, "step=data")["bottom"]
    message, _ = call_page(page, "train-now", {"step": "data", "data": "data/dots"})
    assert "a training of recipes/dots.yaml is running" in message
    assert len(started) == 1


def test_labelling_ends_before_a_run_with_its_labels(folder, page, started, monkeypatch):
    write_recipe(folder, "a", "data/dots/labels.jsonl")
    stopped = list[str]()
    monkeypatch.setattr(studio_page, "CLOSE_TIMEOUT_S", 0.2)
    monkeypatch.setattr(Job, "stop", lambda job: stopped.append(job.arguments[-1]))
    write_job(folder, "label", "label tiny images --out data/other", name="1", exit_code=None)
    assert click_button(page, "train", "step=train&recipe=a.yaml") == ""
    job = write_job(folder, "label", "label tiny images --out data/dots", name="2", exit_code=None)
    message = click_button(page, "train", "step=train&recipe=a.yaml")
    assert "data/dots, whose labelling page is open" in message
    monkeypatch.setattr(Job, "stop", lambda job: RUNNING.pop().close())
    assert click_button(page, "search", "step=train&recipe=a.yaml") == ""
    assert (stopped, job.status, len(started)) == (["data/dots"], "killed", 2)


@pytest.mark.parametrize("action", ["plan", "train", "search"])
def test_uploaded_recipe_runs_no_python_file(folder, page, started, action):
    write_recipe(folder, "a", "data/dots/labels.jsonl")
    with (folder / "a.yaml").open("a") as recipe:
        recipe.write("eval: {metric: photos/m.py:f}\n")
    assert "never runs" in click_button(page, action, "step=train&recipe=a.yaml")
    assert started == []


def test_port_of_another_server_is_rejected(folder, started):
    add_run(folder)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        page = make_page(folder, api_port=port)
        assert str(port) in click_button(page, "serve", "step=export&run=runs/a")
    assert started == []


def test_plan_that_does_not_fit_is_a_result(folder):
    write_recipe(folder, "a", "a.jsonl")
    write_job(folder, "plan", "plan a.yaml", target="a.yaml", exit_code=2)
    assert "已完成: 放不下" in read_live(folder, "step=plan&lang=zh")["bottom"]


def test_running_training_precedes_newer_recipes(folder):
    for name in ("a", "b"):
        write_recipe(folder, name, "a.jsonl")
    os.utime(folder / "a.yaml", (1, 1))
    assert "recipe=b.yaml" in read_live(folder, "step=train")["url"]
    write_job(folder, "train", "train a.yaml", target="a.yaml", exit_code=None)
    assert "recipe=a.yaml" in read_live(folder, "step=train")["url"]
    assert "recipe=b.yaml" in read_live(folder, "step=train&recipe=b.yaml")["url"]


@pytest.mark.parametrize(("button", "query", "values", "problem"), CASES["messages"])
def test_messages_name_fields_and_steps_of_the_page(folder, page, button, query, values, problem):
    if "data=" in query:
        add_data(folder, "a")
        write_file(folder / "data/bad/data.jsonl", b'{"id": 1}\n')
    if "recipe=" in query:
        write_recipe(folder, "mine", "data/a/data.jsonl")
        write_job(folder, "plan", "plan mine.yaml", target="mine.yaml", exit_code=None)
    message = click_button(page, button, query if "lang" in query else f"{query}&lang=en", *values)
    assert problem in message
    assert not re.search("finesight import|null", message)


def test_sample_project_is_drawn_and_imported(folder, page, started, monkeypatch):
    monkeypatch.setattr(studio_page, "NUM_TICKETS", 6)
    monkeypatch.setattr(studio_page, "NUM_EVAL_TICKETS", 2)
    for name in ("tickets", "tickets-2"):
        assert click_button(page, "sample", "step=data&lang=zh") == ""
        words = started.pop()
        assert words[:3] == ["import", f"uploads/{name}/tickets.csv", f"data/{name}"]
        assert "Read the ticket." in words
        assert len([*(folder / f"uploads/{name}/images").iterdir()]) == 6
        # It can be deleted with its data set.
        assert (folder / f"uploads/{name}" / UPLOAD_MARKER).is_file()
        with contextlib.chdir(folder):
            assert run_command(words) == 0
    (first, second) = Workspace(folder).scan().datasets
    assert {(one.num_train, one.num_eval) for one in (first, second)} == {(4, 2)}


def test_names_of_fields_in_messages_are_labels_of_the_page(folder, page):
    add_run(folder)
    write_recipe(folder, "a", "a.jsonl")
    pages = "".join(page.render(Selection(step=step, run="runs/a")) for step in STEPS)
    names = {**list_field_names()}
    assert names.pop("--resume")
    assert [name for name in names.values() if f">{name}<" not in pages] == []


@pytest.mark.parametrize(("step", "arguments", "error", "shown"), CASES["errors_of_commands"])
def test_errors_of_commands_name_fields_and_steps(folder, step, arguments, error, shown):
    job = write_job(folder, step, arguments, log="finesight train is fun")
    write_outcome(job, 2, error=error)
    page = html.unescape(read_live(folder, f"step={step}&lang=en")["bottom"])
    assert shown in re.findall(r'<p class="error"[^>]*>(.*?)</p>', page, re.DOTALL)[0]
    assert "finesight train is fun</pre>" in page


def follow(page: StudioPage, query: str, operation: str) -> dict[str, str]:
    """Click the button of a proposal, and return the query of the page that opens."""
    selection = Selection.parse(dict(parse_qsl(query)), "en")
    url = page.run_action("follow", selection, Form(texts={"operation": operation}))
    return dict(parse_qsl(urlsplit(url).query))


def write_steps(job: Job, *steps: Step) -> None:
    write_outcome(job, 0, next_steps=[asdict(step) for step in steps])


def test_proposals_of_commands_are_followed_by_buttons(folder, page, started):
    add_data(folder, "a")
    query = "step=check&data=data/a&lang=en&job=1"
    job = write_job(folder, "check", "check data/a/data.jsonl", exit_code=0, target="data/a")
    fix = {"sources": ["data/a/data.jsonl"], "fix": "b"}
    write_steps(job, Step("check", fix), Step("plan", {"recipe": "r"}))
    assert read_live(folder, query)["bottom"].count('data-action="follow"') == 1
    assert follow(page, query, "check")["data"] == "data/a-fixed"
    assert started == [["check", "data/a/data.jsonl", "--fix", "data/a-fixed"]]
    with pytest.raises(UserError, match="no longer proposed"):
        follow(page, query, "plan")
    # The settings of a plan change the recipe once.
    recipe = write_recipe(folder, "mine", "data/a/data.jsonl")
    os.utime(recipe, (0, 0))
    job = write_job(folder, "plan", "plan mine.yaml", exit_code=0, target="mine.yaml")
    overrides = ["train.pack_tokens=2048", "tune.quantize.nf4=[language]"]
    arguments = {"recipe": "mine.yaml", "overrides": overrides}
    write_steps(job, Step("train", arguments), Step("train", arguments | {"resume": True}))
    query = "step=plan&recipe=mine.yaml&lang=zh&job=1"
    assert read_live(folder, query)["bottom"].count("使用这些设置") == 1
    assert follow(page, query, "train")["recipe"] == "mine.yaml"
    settings = load_recipe(recipe)
    assert (settings.train.pack_tokens, settings.tune.quantize.nf4) == (2048, ("language",))
    assert "follow" not in read_live(folder, query)["bottom"]


def test_settings_for_several_gpus_change_the_recipe(folder, page):
    """A job file cannot be started by the page, but its settings are used."""
    recipe = write_recipe(folder, "mine", "a.jsonl")
    os.utime(recipe, (0, 0))
    query = "step=plan&recipe=mine.yaml&lang=en&job=1"
    job = write_job(folder, "plan", "plan mine.yaml --gpus 4", exit_code=0, target="mine.yaml")
    arguments = {"recipe": "mine.yaml", "overrides": ["train.parallel=fsdp"]}
    launch = Step("launch", arguments | {"gpus_per_node": 4})
    # More GPUs than those of the plan are only advice.
    write_steps(job, Step("plan", {"recipe": "mine.yaml", "gpus": 4}), launch)
    assert "follow" not in read_live(folder, query)["bottom"]
    write_steps(job, launch)
    assert "Use these settings" in read_live(folder, query)["bottom"]
    assert follow(page, query, "launch")["step"] == "plan"
    assert load_recipe(recipe).train.parallel == "fsdp"


def test_plan_of_the_page_is_that_of_one_gpu_by_default():
    """The page trains on one GPU; the field takes other numbers."""
    (field,) = [one for one in build_form("plan") if one.name == "plan:gpus"]
    assert field.value == "1"
    assert field.parameter is not None
    assert field.parameter.minimum == 1
    with use_language("zh"):
        assert translate(field.label) == "GPU 数量"


def test_advice_after_training_is_followed_by_buttons(folder, page):
    run = add_run(folder)
    write_recipe(folder, "a", "a.jsonl").replace(run / "recipe.yaml")
    record = read_run(run)
    losses = [record.steps[-1] | {"step": step, "loss": 2 / step} for step in range(11, 41)]
    result = {**record.result, "after": {"scores": {"accuracy": 0.25}, "num_samples": 12}}
    train = judge_run(replace(record, steps=losses, result=result), run=Path("runs/a")).next_step
    assert train is not None
    assert train.purpose == "train twice as long. The training loss still falls."
    assert train.arguments["overrides"][-1] == "output_dir=runs/a-2"
    label = judge_run(replace(record, steps=[], result=result)).next_step
    assert label is not None
    assert label.purpose == "label about 95 more images. 3 of 12 answers are correct."
    assert judge_run(replace(record, result=None)).next_step is None
    serve = judge_run(replace(record, steps=[], result={**result, "after": None})).next_step
    assert serve is not None
    assert serve.operation == "serve"
    few = {**result, "after": {"scores": {"accuracy": 1.0}, "num_samples": 8}}
    honest = judge_run(replace(record, steps=[], result=few))
    assert honest.next_step == serve
    assert honest.sentence.startswith("8 of 8 answers are ")
    assert "For new samples, expect 63 to 100 of 100 (95 % interval)." in honest.sentence
    texts = {"after": {"scores": {"accuracy": "<b>"}, "num_samples": "x"}}
    assert judge_run(replace(record, steps=[], result=texts)).next_step == serve
    (run / "result.json").write_text(json.dumps(result))
    query = "step=results&run=runs/a&lang=zh"
    # The verdict and its proposal come before the lists.
    assert "3 / 12 个回答正确" in read_live(folder, query)["top"]
    assert follow(page, query, "label")["step"] == "label"
    # The page proposes one step.
    lines = [json.dumps(line) for line in losses]
    with (run / "metrics.jsonl").open("a") as file:
        file.write("\n".join(lines) + "\n")
    top = read_live(folder, query)["top"]
    assert "训练两倍时长。训练损失仍在下降。" in top
    assert top.count('data-action="follow"') == 1
    for _ in range(2):
        assert follow(page, query, "train")["recipe"] == "recipes/a-2.yaml"
    assert load_recipe(folder / "recipes/a-2.yaml").output_dir == Path("runs/a-2")


def test_link_leads_to_the_next_step_once_a_result_exists(folder):
    def find_next(step: str) -> list[str]:
        shown = html.unescape(read_live(folder, f"step={step}&lang=en")["bottom"])
        return re.findall(r'class="next button[^"]*" href="./\?step=(\w+)', shown)

    assert [find_next(step) for step in STEPS] == [[]] * len(STEPS)
    add_data(folder, "a")
    write_recipe(folder, "a", "data/a/data.jsonl")
    shown = [find_next(step) for step in ("data", "label", "check", "plan", "train", "results")]
    assert shown == [["check"], ["check"], [], ["train"], [], []]
    add_run(folder)
    write_file(folder / ".finesight/check/data%2Fa%2Fdata.jsonl.html", b"page")
    shown = [find_next(step) for step in ("check", "train", "results", "chat", "export")]
    assert shown == [["plan"], ["results"], ["chat"], ["export"], []]
    write_job(folder, "train", "train a.yaml", target="a.yaml", exit_code=None)
    assert find_next("train") == []


def test_estimate_of_a_changed_recipe_is_marked(folder):
    write_recipe(folder, "a", "a.jsonl")
    for year, is_old in ((2000, True), (2100, False)):
        started_at = f"{year}-01-01T00:00:00Z"
        write_job(folder, "plan", "plan a.yaml", target="a.yaml", started_at=started_at)
        shown = read_live(folder, "step=plan&recipe=a.yaml&lang=en")["bottom"]
        assert ("has changed since" in shown) == is_old


def test_review_has_a_folder_of_its_own(folder, page, started):
    add_data(folder, "a")
    write_file(folder / "data/labels/journal.jsonl", b"")
    form = ["photos", "Color?", "labels", TINY_MODEL, "fields", "", "a, b", "0.8"]
    button = "review"

    def review() -> tuple[str, str]:
        assert click_button(page, button, "step=label&data=data/a", *form) == ""
        words = started.pop()
        assert words[words.index("--fields") + 1] == "a, b"
        assert "--train-fraction" not in words
        return words[2], words[words.index("--out") + 1]

    assert review() == ("data/a/data.jsonl", "data/a-review")
    # The last review is continued, unless the folder is in use for something else.
    reviewed = folder / "data/a-review/reviewed.json"
    write_file(reviewed, json.dumps([str(folder / "data/a/data.jsonl")]).encode())
    assert review() == ("data/a/data.jsonl", "data/a-review")
    reviewed.unlink()
    assert review() == ("data/a/data.jsonl", "data/a-review-2")
    # Labels of images.
    assert "No data set" in click_button(page, button, "step=label", *form)
    for fraction in ("0.8", "0.5"):
        form[7] = fraction
        assert click_button(page, "label", "step=label", *form) == ""
        words = started.pop()
        assert words[words.index("--out") + 1] == "data/labels"
        assert ("--train-fraction" in words) == (fraction == "0.5")


def test_reviewed_labels_replace_those_of_the_data_set(folder, page, started):
    options = ImportOptions(prompt="Color?", train_fraction=0.75)
    import_dataset(folder / "photos", folder / "data/a", options)
    workspace = Workspace(folder)
    form = ["", "", "labels", TINY_MODEL, "", "", "", "0.5"]
    names = {"": "data/a-review", "for validation": "data/a-eval-review"}
    for split, name in names.items():
        # The review of reviewed labels is continued.
        for data in ("data/a", name):
            query = urlencode({"step": "label", "data": data})
            assert click_button(page, "review", query, *form, split) == ""
            words = started.pop()
            assert words[2] == f"data/a/{'eval' if split else 'train'}.jsonl"
            assert words[words.index("--out") + 1] == name
            assert "--train-fraction" not in words
            # The command creates these files.
            (folder / name).mkdir(exist_ok=True)
            reviewed = json.dumps([str(folder / words[2])])
            (folder / name / "reviewed.json").write_text(reviewed)
            shutil.copy(folder / words[2], folder / name / "labels.jsonl")
    pair = ("data/a-review/labels.jsonl", "data/a-eval-review/labels.jsonl")
    files = {str(one.path): one for one in workspace.scan().datasets}
    assert files.keys() == {"data/a", *names.values()}
    for name in names.values():
        assert (str(files[name].train_file), str(files[name].eval_file)) == pair
        assert (files[name].num_train, files[name].num_eval) == (18, 6)
    side = read_live(folder, "step=label&data=data/a")["side"]
    links = map(html.unescape, re.findall(r'<li[^>]*><a href="./\?(.*?)"', side))
    selected = {query["step"]: query["data"] for query in map(dict, map(parse_qsl, links))}
    assert selected["label"] == "data/a"
    assert selected["plan"] in names.values()
    # A review replaces its data set, and other ones can be added to it.
    shutil.copytree(folder / "data/a", folder / "data/b")
    query = {"step": "plan", "data": "data/a-review", "lang": "en"}
    assert read_others(page, query) == ["data/b"]
    values = ("both", *RECIPE_FORM[2:])
    assert click_button(page, "create-recipe", urlencode(query), [], *values) == ""
    data = workspace.load_recipe(Path("recipes/both.yaml")).data
    assert (str(data.train[0].path), str(data.eval[0].path)) == pair
    message = click_button(page, "delete", "step=data&data=data/a")
    assert "is used by the data set data/a-" in message


VALUES = {
    "import": [None, "table.csv", "a", "What?", "image=photo answer=text", "0.9", ""],
    "label": ["photos", "Read.", "b", TINY_MODEL, "classes", "a,b", "", "0.9", ""],
    "create-recipe": [[], "c", TINY_MODEL, "", "", "", ""],
    "save-recipe": ["model: a", ""],
    "merge": ["d"],
}


@pytest.mark.parametrize("text", ["a\0b", "a" * 5000, "a/" * 2500, "\ud800", "\x1b[0m", "nan"])
def test_any_text_in_a_field_is_used_or_refused(folder, page, text, started):
    (folder / "table.csv").write_text("photo,text\nphotos/00.png,red\nphotos/01.png,green\n")
    for button, values in VALUES.items():
        for index, value in enumerate(values):
            if isinstance(value, str):
                fields = [*values[:index], text, *values[index + 1 :]]
                query = {"step": "data", "data": text, "job": text}
                message, url = call_page(page, button, query, *fields)
                assert bool(message) != bool(url)
    assert all("\0" not in word for words in started for word in words)


def test_data_set_that_cannot_be_moved_stays(folder, page, tmp_path):
    """The page neither empties folders beyond the workspace nor leaves half a data set."""
    other = shutil.copytree(folder / "photos", tmp_path / "other/a")
    (other / UPLOAD_MARKER).touch()
    (folder / "uploads").symlink_to(tmp_path / "other")
    add_data(folder, "a")
    message = click_button(page, "delete", "step=data&data=data/a")
    assert "cannot be moved to the trash: it is a link to another folder" in message
    assert (folder / "data/a/data.jsonl").exists()
    assert len([*other.glob("[!.]*")]) == len([*folder.glob("photos/*")])
    assert [*(folder / ".finesight/trash").iterdir()] == []


def test_unused_data_set_is_deleted_with_its_uploads(folder, page):
    uploads = folder / "uploads"
    for name in "ab":
        shutil.copytree(folder / "photos", uploads / name)
        (uploads / name / UPLOAD_MARKER).touch()
        import_dataset(uploads / name, folder / "data" / name, OPTIONS)
    import_dataset(folder / "photos", folder / "own", OPTIONS)
    write_recipe(folder, "other", "data/aa/data.jsonl")
    write_file(folder / ".finesight/check/data%2Fa%2Fdata.jsonl.html", b"old")
    assert "No data set" in click_button(page, "delete", "step=data&data=data/c")
    assert "not created by the studio" in click_button(page, "delete", "step=data&data=own")
    assert click_button(page, "delete", "step=data&data=data/a") == ""
    assert sorted(path.name for path in folder.glob("data/*")) == ["b"]
    assert sorted(path.name for path in uploads.iterdir()) == ["b"]
    assert [*(folder / ".finesight/check").iterdir()] == []
    (trash,) = (folder / ".finesight/trash").iterdir()
    moved = ("data/a/data.jsonl", "uploads/a", ".finesight/check/data%2Fa%2Fdata.jsonl.html")
    assert all((trash / path).exists() for path in moved)
    # Another data set keeps the uploads that it uses.
    import_dataset(uploads / "b", folder / "data/c", OPTIONS)
    assert click_button(page, "delete", "step=data&data=data/b") == ""
    assert (uploads / "b/00.png").exists()
    assert read_live(folder, "step=data")["top"].count('class="delete"') == 1


def test_recipe_without_an_unfinished_run_is_deleted(folder, page):
    (folder / "recipes").mkdir()
    file = write_recipe(folder, "a", "a.jsonl").rename(folder / "recipes/a.yaml")
    write_recipe(folder, "own", "a.jsonl")
    run = add_run(folder)
    (run / "result.json").rename(folder / "result.json")
    query = "step=plan&recipe=recipes/a.yaml"
    assert "not created by" in click_button(page, "delete", "step=plan&recipe=own.yaml")
    assert "used by the unfinished run runs/a" in click_button(page, "delete", query)
    (folder / "result.json").rename(run / "result.json")
    assert read_live(folder, "step=plan")["top"].count('class="delete"') == 1
    assert click_button(page, "delete", query) == ""
    assert not file.exists()
    assert (folder / "own.yaml").exists()


def test_run_that_nothing_uses_is_deleted(folder, page):
    run = add_run(folder)
    add_run(folder, "own")
    query, model = "step=results&run=runs/a", "model: finesight-tiny"
    assert "not created by" in click_button(page, "delete", "step=results&run=own")
    recipe = write_recipe(folder, "next", "a.jsonl")
    text = recipe.read_text()
    uses = "adapter: runs/a", "train: {distill: {teacher: runs/a}}", "model: runs/a/model"
    for used in uses:
        recipe.write_text(text.replace(model, used))
        assert "used by the recipe next.yaml" in click_button(page, "delete", query)
    # An earlier run needs its base model.
    recipe.rename(add_run(folder, "runs/c") / "recipe.yaml")
    assert "used by the recipe runs/c/recipe.yaml" in click_button(page, "delete", query)
    (folder / "runs/c/recipe.yaml").write_text(text)
    add_run(folder, "runs/b")
    write_job(folder, "export", "serve runs/b --port 1", exit_code=None)
    used = click_button(page, "delete", "step=results&run=runs/b")
    assert "used by the running command" in used
    assert read_live(folder, "step=results")["top"].count('class="delete"') == 3
    assert click_button(page, "delete", query) == ""
    assert [one.name for one in (folder / ".finesight/trash").glob("*/runs/*")] == [run.name]


def test_items_of_the_selected_data_set_precede_newer_ones(folder, page):
    for name in "ab":
        add_data(folder, name)
        write_recipe(folder, name, f"data/{name}/train.jsonl")
        shutil.copy(folder / f"{name}.yaml", add_run(folder, f"runs/{name}") / "recipe.yaml")
    for name in "ab":
        state = page.view.read_state(Selection(step="label", data=f"data/{name}"))
        assert (state.recipe, state.run) == (Path(f"{name}.yaml"), Path(f"runs/{name}"))
        named = Selection(step="chat", data=f"data/{name}", run="runs/a")
        assert page.view.read_state(named).run == Path("runs/a")
    write_job(folder, "chat", "web runs/b", target="runs/b", exit_code=None)
    state = page.view.read_state(Selection(step="chat", data="data/a"))
    assert state.run == Path("runs/b"), "its chat is running"
