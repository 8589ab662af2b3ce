"""Tests of the processes that the studio starts, without a browser."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import parse_qsl, urlencode

import pytest
from studio_fixtures import call_page, click_button, open_client, read_fields

from finesight.data.import_source import ImportOptions
from finesight.data.importer import import_dataset
from finesight.errors import UserError
from finesight.model_folder import TINY_MODEL
from finesight.storage import write_file
from finesight.studio.studio_jobs import JOB_FILE, PID_FILE, Job, JobStore
from finesight.studio.studio_page import ServerAccess, StudioPage
from finesight.studio.studio_view import StudioView
from finesight.studio.workspace import Workspace

RECIPE = """\
model: finesight-tiny
data: {train: data/photos/train.jsonl, eval: data/photos/eval.jsonl}
train: {steps: 40, batch_size: 4, device: cpu}
eval: {metric: classification, max_new_tokens: 4}
output_dir: runs/photos
"""


def wait_for(happened: Callable[[], bool], timeout_s: float = 90) -> None:
    end = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < end, f"not within {timeout_s} s"
        time.sleep(0.05)


def wait_for_end(job: Job) -> str:
    wait_for(lambda: job.status != "running")
    return job.status


@pytest.mark.parametrize(
    ("source", "status", "exit_code", "output"),
    [
        ("photos", "finished", 0, "24 images"),
        ("photos/00.txt", "failed", 2, "\n  expected: .json"),
    ],
)
def test_command_runs_in_the_workspace(
    folder: Path, source: str, status: str, exit_code: int, output: str
) -> None:
    (folder / "yaml.py").write_text("raise SystemExit('a module of the workspace')")
    job = JobStore(folder).start(
        "data", "data/a", ["import", source, "data/a", "--prompt", "Color?"]
    )
    assert job.status == "running"
    assert wait_for_end(job) == status
    assert job.exit_code == exit_code
    assert output in job.read_log()
    assert job.command == f"finesight import {source} data/a --prompt 'Color?'"
    assert (folder / "data" / "a" / "data.jsonl").exists() == (exit_code == 0)


def test_training_survives_the_studio_and_is_stopped_and_resumed(folder: Path) -> None:
    options = ImportOptions(prompt="Which color?", eval_last=4)
    import_dataset(folder / "photos", folder / "data" / "photos", options)
    (folder / "recipe.yaml").write_text(RECIPE)
    start = (
        "from pathlib import Path; from finesight.studio.studio_jobs import JobStore;"
        " JobStore(Path()).start('train', 'recipe.yaml', ['train', 'recipe.yaml', '--resume'])"
    )
    subprocess.run([sys.executable, "-c", start], cwd=folder, check=True)
    jobs = JobStore(folder)
    (job,) = jobs.list_jobs("train", "recipe.yaml")
    assert job.status == "running"
    with pytest.raises(UserError, match="already running"):
        jobs.start("train", "recipe.yaml", job.arguments)
    metrics = folder / "runs" / "photos" / "metrics.jsonl"
    wait_for(lambda: metrics.is_file() and '"loss"' in metrics.read_text())
    job.stop()
    assert job.is_stopping
    job.stop()
    assert wait_for_end(job) == "stopped"
    assert job.exit_code == 75
    assert [*(folder / "runs" / "photos" / "checkpoints").glob("step-*")]
    resumed = jobs.start("train", "recipe.yaml", job.arguments)
    assert wait_for_end(resumed) == "finished", resumed.read_log()
    assert [found.id for found in jobs.list_jobs("train")] == [resumed.id, job.id]
    assert json.loads((folder / "runs" / "photos" / "result.json").read_text())["after"]
    with pytest.raises(UserError, match="the command is finished"):
        resumed.stop()


def test_killed_and_damaged_jobs(folder: Path) -> None:
    jobs = JobStore(folder)
    job = jobs.start("chat", "finesight-tiny", ["web", "finesight-tiny", "--port", "0"], port=1)
    with pytest.raises(UserError, match="still starting"):
        job.stop()
    for target, port, problem in (("finesight-tiny", 2, "already running"), ("b", 1, "port 1")):
        with pytest.raises(UserError, match=problem):
            jobs.start("chat", target, ["web", target], port=port)
    assert (jobs.list_running(), job.is_ready) == ([job], False)
    wait_for((job.folder / PID_FILE).exists)
    pid = int((job.folder / PID_FILE).read_text())
    os.kill(os.getpgid(pid), signal.SIGKILL)
    assert job.status == "running"
    os.kill(pid, signal.SIGKILL)
    assert wait_for_end(job) == "killed"
    for name, content in (("empty", ""), ("list", "[]"), ("other", '{"step": 1}')):
        (job.folder.parent / name).mkdir()
        (job.folder.parent / name / JOB_FILE).write_text(content)
    (job.folder.parent / "missing").mkdir()
    assert [found.id for found in jobs.list_jobs()] == [job.id]
    assert jobs.list_jobs("train") == []


def write_job(folder: Path, name: str, step: str, *arguments: str, **values: object) -> Job:
    """Write a job that has ended with an error."""
    job_folder = folder / ".finesight/jobs" / name
    values = {"step": step, "target": "", "started_at": datetime.now(UTC), **values}
    job = Job(folder=job_folder, arguments=arguments, **values)
    write_file(job_folder / JOB_FILE, job.model_dump_json(exclude={"folder"}).encode())
    write_file(job_folder / "exit_code", b"2")
    return job


@pytest.mark.parametrize(("hours", "status"), [(1, "killed"), (-1, "killed"), (0, "running")])
def test_job_of_another_time_does_not_block_its_command(
    folder: Path, hours: int, status: str
) -> None:
    started_at = datetime.now(UTC) + timedelta(hours=hours)
    job = write_job(folder, "a", "train", "train", "r.yaml", started_at=started_at)
    (job.folder / "exit_code").unlink()
    assert (job.status, JobStore(folder).list_running()) == (status, [job] if not hours else [])


@pytest.mark.parametrize(
    ("log", "status"),
    [
        ("error: a", "failed"),
        (f"error: {'a' * 30_000}", "failed"),
        ("UserWarning: a\nerror: b: c\n  expected: d\n  remedy: e", "failed"),
        ("Usage: finesight check SOURCE\n\nError: a", "failed"),
        ("a.jsonl: 1 row\nerror: a (b, 1)\n  a.jsonl:1: c\n    remedy: d", "finished"),
    ],
)
def test_check_that_cannot_start_has_failed(folder: Path, log: str, status: str) -> None:
    job = write_job(folder, "1", "check", "check", "a", ok_exit_codes=(0, 2, 3))
    (job.folder / "log.txt").write_text(log)
    assert job.status == status


def test_logs_of_checks_are_distinguished(folder: Path) -> None:
    """A data check with errors and one that cannot write its page have the same exit code."""
    import_dataset(folder / "photos", folder / "a", ImportOptions(prompt="Color?"))
    (folder / "photos/00.png").unlink()
    codes = {"ok_exit_codes": (0, 2, 3)}
    jobs, words = JobStore(folder), ["check", "a/data.jsonl", "--html"]
    for page, status in (("check.html", "finished"), ("/dev/null/check.html", "failed")):
        job = jobs.start("check", "a", [*words, page], **codes)
        assert wait_for_end(job) == status, job.read_log()
        assert "image-missing" in job.read_log()


def test_review_has_a_folder_of_its_own(folder: Path, started: list[list[str]]) -> None:
    import_dataset(folder / "photos", folder / "data/a", ImportOptions(prompt="Color?"))
    write_file(folder / "data/labels/journal.jsonl", b"")
    page = StudioPage(StudioView(Workspace(folder)), ServerAccess())
    form = ["photos", "Color?", "labels", "finesight-tiny", "fields", "", "a, b", "0.8"]
    button = "review-existing-labels"

    def review() -> tuple[str, str]:
        assert click_button(page, button, "step=label&data=data/a", *form) == ""
        words = started.pop()
        assert "--fields=a, b" in words
        assert not any(word.startswith("--train-fraction=0.8") for word in words)
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
    assert click_button(page, "start-labelling", "step=label", *form) == ""
    assert started[0][started[0].index("--out") + 1] == "data/labels"
    assert not any("--train-fraction" in word for word in started[0])
    form[7] = "0.5"
    assert click_button(page, "start-labelling", "step=label", *form) == ""
    assert "--train-fraction=0.5" in started[1]


def test_uploaded_images_precede_the_form_of_an_earlier_command(
    folder: Path, started: list[list[str]]
) -> None:
    page = StudioPage(StudioView(Workspace(folder)), ServerAccess())
    form = ("photos", "Color?", "old", "finesight-tiny", "text", "", "", "0.8")
    write_job(folder, "1", "label", "label", "finesight-tiny", "photos", form=form)
    query = {"step": "label", "images": "uploads/new", "lang": "en"}
    fields = read_fields(page, query)
    names = ("images", "labels-name", "kind")
    assert [fields[name].get("value") for name in names] == ["uploads/new", "new", None]
    assert "images" not in call_page(page, "start-labelling", query, *form)[1]
    fields = read_fields(page, {"step": "label"})
    assert [fields[name].get("value") for name in names] == ["photos", "old", "text"]


def test_missing_item_is_reported_as_a_sentence(folder: Path) -> None:
    page = StudioPage(StudioView(Workspace(folder)), ServerAccess())
    form = ("", "Color?", "a", "finesight-tiny", "", "", "", "0.8")
    for lang, text in (("en", "<pre>No images are given."), ("zh", "<pre>未给出图像。")):
        message = click_button(page, "start-labelling", f"step=label&lang={lang}", *form)
        assert text in message
        assert 'data-field="images"' in message
        assert "expected" not in message


def test_invalid_rows_are_skipped_by_the_import_form(
    folder: Path, started: list[list[str]]
) -> None:
    page = StudioPage(StudioView(Workspace(folder)), ServerAccess())
    form = (None, "photos", "a", "Color?", "", "", "skip")
    assert click_button(page, "import", "step=data", *form) == ""
    assert started[0][-2:] == ["--on-invalid-row", "skip"]


def test_running_server_precedes_a_newer_command(folder: Path) -> None:
    jobs = JobStore(folder)
    # As in a shell that runs the studio in the background.
    previous_handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    server = jobs.start("export", "", ["serve", "finesight-tiny", "--port", "0"], port=1)
    signal.signal(signal.SIGINT, previous_handler)
    write_job(folder, "9", "export", "merge", "runs/a", "models/a")
    with open_client(folder) as client:
        page = client.get("/live?step=export&lang=en").json()
    assert f"job={server.id}" in page["url"]
    wait_for((server.folder / PID_FILE).exists)
    server.stop()
    wait_for_end(server)


def test_reviewed_labels_replace_those_of_the_data_set(
    folder: Path, started: list[list[str]]
) -> None:
    options = ImportOptions(prompt="Color?", train_fraction=0.75)
    import_dataset(folder / "photos", folder / "data/a", options)
    workspace = Workspace(folder)
    page = StudioPage(StudioView(workspace), ServerAccess())
    form = ["", "", "labels", "finesight-tiny", "", "", "", "0.5"]
    names = {"": "data/a-review", "for validation": "data/a-eval-review"}
    button = "review-existing-labels"
    for split, name in names.items():
        # The review of reviewed labels is continued.
        for data in ("data/a", name):
            query = urlencode({"step": "label", "data": data})
            assert click_button(page, button, query, *form, split) == ""
            words = started.pop()
            assert words[2] == f"data/a/{'eval' if split else 'train'}.jsonl"
            assert words[words.index("--out") + 1] == name
            assert not any("--train-fraction" in word for word in words)
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
    with open_client(folder) as client:
        top = client.get("/live?step=label&data=data/a").json()["top"]
    links = map(html.unescape, re.findall(r'<li><a href="./\?(.*?)"', top))
    selected = {query["step"]: query["data"] for query in map(dict, map(parse_qsl, links))}
    assert selected["label"] == "data/a"
    assert selected["plan"] in names.values()
    # A copy with the validation images of the other data set is refused beside it.
    shutil.copytree(folder / "data/a", folder / "data/b")
    query = {"step": "plan", "data": "data/a-review", "lang": "en"}
    others = read_fields(page, query)["other-data"]["choices"]
    assert others == ["data/b"]
    shutil.copy(folder / "data/a/eval.jsonl", folder / "data/b/train.jsonl")
    values = ("both", "finesight-tiny", "", "", "", "")
    message = click_button(page, "create-the-recipe", urlencode(query), others, *values)
    assert "6 validation images of data/a-review are training images of data/b" in message
    assert not (folder / "recipes").exists()
    assert click_button(page, "create-the-recipe", urlencode(query), [], *values) == ""
    data = workspace.load_recipe(Path("recipes/both.yaml")).data
    assert (str(data.train[0].path), str(data.eval[0].path)) == pair
    message = click_button(page, "ask-delete", "step=data&data=data/a")
    assert "is used by the data set data/a-" in message


def test_validation_samples_that_do_not_exist_are_not_reviewed(folder: Path) -> None:
    import_dataset(folder / "photos", folder / "data/a", ImportOptions(prompt="Color?"))
    page = StudioPage(StudioView(Workspace(folder)), ServerAccess())
    form = ["", "", "labels", "finesight-tiny", "", "", "", "", "for validation"]
    message = click_button(page, "review-existing-labels", "step=label&data=data/a", *form)
    assert "The data set has no validation samples" in message


def test_earlier_upload_is_kept_if_the_next_one_is_refused(
    folder: Path, started: list[list[str]]
) -> None:
    files = [folder.parent / "t.csv", *sorted((folder / "photos").glob("*.png"))]
    files[0].write_text("photo,text\n" + "".join(f"{file.name},red\n" for file in files[1:]))
    page = StudioPage(StudioView(Workspace(folder)), ServerAccess())
    assert click_button(page, "import", "", files, "", "a", "Color?", "", "") == ""
    write_job(folder, "1", "data", *started.pop()[:3])
    (folder / ".finesight/jobs/1/exit_code").write_text("2")
    with open_client(folder) as client:
        assert "The uploaded files are kept" in client.get("/live?lang=en").json()["bottom"]
    assert "Prompt" in click_button(page, "import", "", files[:1], "", "a", "", "", "")
    assert len([*folder.glob("uploads/a/*.png")]) == 24
    assert click_button(page, "import", "", files[:1], "", "a", "Color?", "", "") == ""
    assert started.pop()[1:3] == ["uploads/a/t.csv", "data/a"]


FORMS = {
    "import": [None, "table.csv", "a", "What?", "image=photo answer=text", "0.9", ""],
    "start-labelling": ["photos", "Read.", "b", TINY_MODEL, "classes", "a,b", "", "0.9", ""],
    "create-the-recipe": [[], "c", TINY_MODEL, "", "", "", ""],
    "save-the-recipe": ["model: a", ""],
    "merge": ["d"],
}


@pytest.mark.parametrize("text", ["a\0b", "a" * 5000, "a/" * 2500, "\ud800", "\x1b[0m", "nan"])
def test_any_text_in_a_field_is_used_or_refused(
    folder: Path, text: str, started: list[list[str]]
) -> None:
    (folder / "table.csv").write_text("photo,text\nphotos/00.png,red\nphotos/01.png,green\n")
    page = StudioPage(StudioView(Workspace(folder)), ServerAccess())
    for button, values in FORMS.items():
        for index, value in enumerate(values):
            if isinstance(value, str):
                fields = [*values[:index], text, *values[index + 1 :]]
                query = {"step": "data", "data": text, "job": text}
                message, url = call_page(page, button, query, *fields)
                assert bool(message) != bool(url)
    assert all("\0" not in word for words in started for word in words)
