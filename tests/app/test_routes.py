"""Each route of each page needs the sign-in, except static files and the sign-in itself."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from label_fixtures import open_fields_session
from starlette.applications import Starlette
from starlette.routing import Route
from starlette.testclient import TestClient
from studio_fixtures import make_page
from web_server_fixture import ScriptedService, get_image_pool

from finesight.app.access import Access, AccessMiddleware
from finesight.app.chat_page import make_chat_app
from finesight.app.chat_store import ChatStore
from finesight.app.label_page import make_label_app
from finesight.app.pages import PREFIX_HEADER
from finesight.app.studio_page import make_studio_app

ACCESS = Access("right-password")
PREFIX = {PREFIX_HEADER: "/pages/1"}


def make_chat(folder: Path) -> AccessMiddleware:
    return make_chat_app(ChatStore(ScriptedService(), folder / "chat", get_image_pool()), ACCESS)


def make_label(folder: Path) -> AccessMiddleware:
    session = open_fields_session(folder)
    with closing(session.store):
        return make_label_app(session, ACCESS, get_image_pool())


def make_studio(folder: Path) -> AccessMiddleware:
    return make_studio_app(make_page(folder / "work"), ACCESS)


@pytest.mark.parametrize("make", [make_chat, make_label, make_studio])
def test_routes_need_the_sign_in(tmp_path: Path, make: Callable[[Path], AccessMiddleware]) -> None:
    app = make(tmp_path)
    assert isinstance(app.app, Starlette)
    routes = [route for route in app.app.routes if isinstance(route, Route)]
    assert len(routes) == len(app.app.routes) > 5
    client = TestClient(app, "http://127.0.0.1", follow_redirects=False)
    for route in routes:
        path = re.sub(r"{.*?}", "1", route.path)
        for method in sorted(route.methods or ()):
            answer = client.request(method, path)
            if path == "/static/1":
                assert answer.status_code == 404
            elif path == "/":
                assert (answer.status_code, answer.headers["location"]) == (303, "sign-in")
            else:
                assert answer.status_code == 401, (method, path)
    assert client.get("/favicon.ico").status_code == 204


@pytest.mark.parametrize(("make", "step"), [(make_chat, "chat"), (make_label, "label")])
def test_pages_of_jobs_link_to_their_studio(
    tmp_path: Path, make: Callable[[Path], AccessMiddleware], step: str
) -> None:
    client = TestClient(make(tmp_path), "http://127.0.0.1")
    client.post("/sign-in", data={"password": ACCESS.password})
    link = f'href="../../?step={step}"'
    assert link in client.get("/", headers=PREFIX).text
    assert link not in client.get("/").text
    train_link = "../../?step=plan&amp;data="
    assert (train_link in client.get("/", headers=PREFIX).text) == (step == "label")
