"""Client and handlers of a studio page without a browser."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qsl

from fastapi.testclient import TestClient

from finesight.storage import write_file
from finesight.studio.studio_jobs import JOB_FILE, Job
from finesight.studio.studio_page import ServerAccess, StudioPage, make_studio_app
from finesight.studio.studio_view import StudioView
from finesight.studio.workspace import Workspace
from finesight.web.web_server import create_private_folder


@contextmanager
def open_client(folder: Path, password: str | None = None) -> Iterator[TestClient]:
    with create_private_folder() as private_folder:
        access = ServerAccess(password=password)
        app = make_studio_app(StudioView(Workspace(folder)), private_folder, access, True)
        yield TestClient(app, base_url="http://127.0.0.1", follow_redirects=False)


def read_live(folder: Path, query: str) -> dict[str, str]:
    """Return the URL and the shown HTML (`top`, `bottom`) of a step."""
    with open_client(folder) as client:
        return dict(client.get(f"/live?{query}").json())


def write_job(
    folder: Path, step: str, arguments: str, *, name: str = "1", log: str = "", **values: Any
) -> Job:
    """Write a job that ended with the exit code 2, if no other is given; with None, it runs."""
    exit_code = values.pop("exit_code", 2)
    values = {"target": "", "started_at": datetime.now(UTC)} | values
    job_folder = folder / ".finesight/jobs" / name
    job = Job(folder=job_folder, step=step, arguments=tuple(arguments.split()), **values)
    write_file(job_folder / JOB_FILE, job.model_dump_json(exclude={"folder"}).encode())
    write_file(job_folder / "log.txt", log.encode())
    if exit_code is not None:
        write_file(job_folder / "exit_code", str(exit_code).encode())
    return job


def write_recipe(folder: Path, name: str, data: str) -> Path:
    text = f"model: finesight-tiny\ndata: {{train: {data}}}\noutput_dir: runs/{name}\n"
    (folder / f"{name}.yaml").write_text(text)
    return folder / f"{name}.yaml"


def call_page(page: StudioPage, elem_id: str, query: dict[str, str], *values: object) -> Any:
    """Call the handler of a button, or of the loaded page for an empty ID.

    Further fields are empty.
    """
    ids = [id for id, at in page.blocks.blocks.items() if getattr(at, "elem_id", "") == elem_id]
    event = ("click" if elem_id else "load",)
    [function] = [
        fn
        for fn in page.blocks.fns.values()
        if any(target[1:] == event and (not elem_id or target[0] in ids) for target in fn.targets)
    ]
    empty = ("",) * (len(function.inputs) - len(values))
    return function.fn(SimpleNamespace(query_params=query, headers={}), *values, *empty)


def click_button(page: StudioPage, elem_id: str, query: str, *values: object) -> str:
    """Run the action of a button, and return its message."""
    message, url = call_page(page, elem_id, dict(parse_qsl(query)), *values)
    assert bool(message) != bool(url)
    return message


def read_fields(page: StudioPage, query: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Return the updates of the fields of a loaded page by element ID."""
    updates = call_page(page, "", query)
    return {item.elem_id: update for item, update in updates.items() if isinstance(update, dict)}
