"""Client and handlers of a studio page without a browser."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qsl

from fastapi.testclient import TestClient

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
