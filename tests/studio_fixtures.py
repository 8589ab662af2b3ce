"""Client and handlers of a studio page without a browser."""

import html
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from html_text import compact
from pydantic import ValidationError
from starlette.testclient import TestClient
from web_server_fixture import get_image_pool

from finesight.app.jobs import JOB_FILE, LOCK_FILE, OUTCOME_FILE, Job
from finesight.app.pages import UploadStore, describe_error
from finesight.app.server import Access
from finesight.app.studio_page import Form, StudioPage, make_studio_app
from finesight.app.studio_view import FORMS, Selection, StudioView, name_actions
from finesight.app.workspace import Workspace
from finesight.errors import UserError
from finesight.files.storage import FileLock, write_file
from finesight.report.i18n import use_language


@contextmanager
def open_client(folder: Path, password: str | None = None) -> Iterator[TestClient]:
    app = make_studio_app(make_page(folder, has_password=password is not None), Access(password))
    yield TestClient(app, base_url="http://127.0.0.1", follow_redirects=False)


def make_page(folder: Path, **options: Any) -> StudioPage:
    uploads = folder.parent / "uploads"
    uploads.mkdir(exist_ok=True)
    store = UploadStore(uploads, 1 << 20)
    view = StudioView(Workspace(folder, get_image_pool()))
    return StudioPage(view, store, **{"api_port": 0, **options})


def read_live(folder: Path, query: str) -> dict[str, str]:
    """Return the URL and the shown HTML (`side`, `top`, `bottom`) of a step."""
    with open_client(folder) as client:
        page = compact(client.get(f"/?{query}").text)
    parts = re.split('<div id="(?:top" data-url="(.*?)"[^>]*|message"[^>]*|bottom")>', page)
    side = parts[0].partition('<div id="side">')[2]
    return {"side": side, "url": html.unescape(parts[1]), "top": parts[2], "bottom": parts[-1]}


def write_job(
    folder: Path, step: str, arguments: str, *, name: str = "1", log: str = "", **values: Any
) -> Job:
    """Write a job that ended with the exit code 1, if no other is given; with None, it runs."""
    exit_code = values.pop("exit_code", 1)
    values = {"target": "", "started_at": datetime.now(UTC)} | values
    job_folder = folder / ".finesight/jobs" / name
    job = Job(folder=job_folder, step=step, arguments=tuple(arguments.split()), **values)
    write_file(job_folder / JOB_FILE, job.model_dump_json(exclude={"folder"}).encode())
    write_file(job_folder / "log.txt", log.encode())
    if exit_code is None:
        # As the process of a command does, until the end of the tests.
        (job_folder / LOCK_FILE).unlink(missing_ok=True)
        RUNNING.append(FileLock(job_folder / LOCK_FILE, os.O_RDWR | os.O_CREAT))
        RUNNING[-1].acquire(wait=False)
    else:
        write_outcome(job, exit_code)
    return job


def write_outcome(job: Job, exit_code: int, **values: Any) -> None:
    content = json.dumps({"exit_code": exit_code, **values})
    write_file(job.folder / OUTCOME_FILE, content.encode())


RUNNING: list[FileLock] = []


def write_recipe(folder: Path, name: str, data: str) -> Path:
    text = f"model: finesight-tiny\ndata: {{train: {data}}}\noutput_dir: runs/{name}\n"
    (folder / f"{name}.yaml").write_text(text)
    return folder / f"{name}.yaml"


FORM_OF_ACTION = {"import": "import", "create-recipe": "recipe", "save-recipe": "editor"}
FORM_OF_ACTION |= dict.fromkeys(("label", "review"), "label")
FORM_OF_ACTION |= dict.fromkeys(("merge", "export", "quantize"), "merge")


def call_page(page: StudioPage, action: str, query: dict[str, str], *values: Any) -> Any:
    """Run an action with the values of its fields, and return its message and the URL to open.

    Further fields are empty. The values of an import start with the uploaded files, those of a new
    recipe with its further data sets.
    """
    uploads, others = [], []
    if action == "import":
        files, *values = values
        uploads = [store_upload(page, Path(file)) for file in files or ()]
    if action == "create-recipe":
        others, *values = values
    form_name = FORM_OF_ACTION.get(action, "")
    names = [f"{form_name}:{name}" for name in FORMS.get(form_name, ())]
    names += ["digest"] if action == "save-recipe" else []
    texts = dict(zip(names, values, strict=False))
    selection = Selection.parse(query, "zh" if query.get("lang") == "zh" else "en")
    try:
        form = Form(texts=texts, uploads=uploads, others=list(others))
        return "", page.run_action(action, selection, form)
    except ValidationError as error:
        return str(error), ""
    except UserError as error:
        with use_language(selection.lang):
            return describe_error(error, name_actions), ""


def store_upload(page: StudioPage, file: Path) -> str:
    """Store a copy of a file as an upload, and return its ID."""
    upload_id = secrets.token_urlsafe(24)
    folder = page.uploads._folder / upload_id
    folder.mkdir()
    shutil.copy(file, folder)
    return upload_id


def click_button(page: StudioPage, action: str, query: str, *values: Any) -> str:
    """Run the action of a button, and return its message."""
    message, url = call_page(page, action, dict(parse_qsl(query)), *values)
    assert bool(message) != bool(url)
    return str(message)


def read_fields(page: StudioPage, query: dict[str, str]) -> dict[str, str]:
    """Return the values of the fields of a loaded page by name."""
    selection = Selection.parse(query, "en")
    return page.read_values(page.view.read_state(selection))
