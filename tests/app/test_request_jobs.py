"""Slow images: other requests of a page do not wait for them, and they end with their clients."""

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pool_jobs as jobs
import pytest
from attack_client import list_process_tree, list_running
from engine_fixtures import write_noise_image
from label_fixtures import MODEL, draw_images, open_suggested_session
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Message
from studio_fixtures import make_page
from web_server_fixture import ScriptedService, run_app, run_web_page

from finesight.app import chat_page, server, studio_page, workspace
from finesight.app.label_page import make_label_app
from finesight.app.pages import create_app
from finesight.app.request_jobs import RequestJobs
from finesight.app.server import Access, AccessMiddleware, make_proxy_route
from finesight.app.studio_page import make_studio_app
from finesight.app.studio_view import StudioView
from finesight.files.worker_pool import WorkerPool
from finesight.label.label_session import open_session
from finesight.samples.frames import ImageSize
from finesight.vision import image_reader
from finesight.vision.image_reader import ImageReader, create_image_pool

TIMEOUT_S = 60.0
"""Guards a test. Jobs take hours."""


@pytest.fixture
def pool() -> Iterator[WorkerPool]:
    # Without idle workers, all of its processes run jobs.
    with contextlib.closing(create_image_pool()) as made:
        yield made


@pytest.fixture
def slow_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the decoding of every image take hours."""
    monkeypatch.setattr(image_reader, "MAX_IMAGE_CPU_S", 10_000.0)

    def encode(reader: ImageReader, path: Path, *args: object) -> Any:
        return reader.call(jobs.hang, path, *args)

    monkeypatch.setattr(image_reader.ImageReader, "encode", encode)


def list_workers(pool: WorkerPool) -> set[int]:
    if pool.process is None:
        return set()
    return {one.pid for one in list_process_tree(pool.process.pid)} - {pool.process.pid}


def wait_for_jobs(pool: WorkerPool, num_jobs: int) -> set[int]:
    """Wait until a number of jobs run, and return the IDs of their processes."""
    end = time.monotonic() + TIMEOUT_S
    while pool.idle_workers or len(busy := list_workers(pool)) < num_jobs:
        assert time.monotonic() < end, "the jobs have not started"
        time.sleep(0.02)
    return busy


@contextlib.contextmanager
def hold_requests(
    pool: WorkerPool, num_jobs: int, port: int, request: str, *, number: int = 12, body: bytes = b""
) -> Iterator[None]:
    """Send equal requests, and wait until some of them run jobs. Disconnect after the block.

    The jobs must then end.
    """
    lines = [f"{request} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}", "", ""]
    with contextlib.ExitStack() as stack:
        for _ in range(number):
            there = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            there.sendall("\r\n".join(lines).encode() + body)
        busy = wait_for_jobs(pool, num_jobs)
        yield
    assert list_running(busy, TIMEOUT_S) == []


def test_text_questions_do_not_wait_for_images(pool, slow_images, tmp_path):
    content = write_noise_image(tmp_path / "a.png", 30, 30).read_bytes()
    service = ScriptedService()
    with (
        run_web_page(service, pool=pool) as page,
        httpx.Client(base_url=page.address, timeout=TIMEOUT_S) as client,
    ):
        client.get("/")  # sets the cookie of the browser
        [image] = client.post("/uploads", params={"name": "a.png"}, content=content).json()
        held = f"GET /images/{image}"
        with hold_requests(pool, chat_page.MAX_IMAGE_JOBS, page.port, held):
            answer = client.post("/answers", json={"text": "What?"})
            assert answer.status_code == 200, answer.text
            assert len(service.samples) == 1


def test_question_of_a_client_that_left_ends(pool, monkeypatch, tmp_path):
    content = write_noise_image(tmp_path / "a.png", 30, 30).read_bytes()
    service = ScriptedService()
    with (
        run_web_page(service, pool=pool) as page,
        httpx.Client(base_url=page.address, timeout=TIMEOUT_S) as client,
    ):
        client.get("/")
        [image] = client.post("/uploads", params={"name": "a.png"}, content=content).json()
        chat = client.post("/answers", json={"text": "First?"}).json()["chat"]
        (name, secret), url = next(iter(client.cookies.items())), f"/turns/{chat}"
        question = {"chat": chat, "text": "Second?", "images": [image]}
        body = json.dumps(question).encode()
        with monkeypatch.context() as patch:
            patch.setattr(image_reader, "MAX_IMAGE_CPU_S", 10_000.0)
            patch.setattr(image_reader, "read_size", jobs.hang)
            held = f"POST /answers HTTP/1.1\r\nCookie: {name}={secret}\r\nX-A: "
            with hold_requests(pool, 1, page.port, held, number=1, body=body):
                assert "being generated" in client.post("/answers", json=question).text
        # The conversation is unchanged, and the question can be asked again.
        assert "Second?" not in client.get(url).text
        assert client.post("/answers", json=question).status_code == 200
        assert "Second?" in client.get(url).text


def test_work_that_ended_counts_although_its_client_left():
    """A thread cannot be interrupted. Its answer, which is being generated, belongs to the chat."""
    is_running, has_left = threading.Event(), asyncio.Event()

    async def receive() -> Message:
        await asyncio.to_thread(is_running.wait)
        has_left.set()
        return {"type": "http.disconnect"}

    async def run() -> int:
        loop = asyncio.get_running_loop()

        def work() -> int:
            is_running.set()
            asyncio.run_coroutine_threadsafe(has_left.wait(), loop).result(TIMEOUT_S)
            return 3

        return await RequestJobs(1).run(Request({"type": "http"}, receive), work)

    assert asyncio.run(run()) == 3


def test_items_and_decisions_do_not_wait_for_thumbnails(pool, slow_images, tmp_path):
    session = open_session(tmp_path / "labels", MODEL, [draw_images(tmp_path)], prompt="Read.")
    app = make_label_app(session, Access(), pool)
    with (
        session.store,
        run_app(app) as port,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=TIMEOUT_S) as client,
        hold_requests(pool, image_reader.NUM_IMAGE_WORKERS, port, "GET /images/0/0?small=1"),
    ):
        item = client.get("/items/0").json()
        decision = {"id": item["id"], "action": "save", "text": "A"}
        assert client.post("/decision", json=decision).json()["item"]["decision"] == "written"


def test_decisions_do_not_wait_for_images_of_other_ones(pool, tmp_path, monkeypatch):
    """Reading the size of an image never holds the lock of the decisions."""
    session = open_session(tmp_path / "labels", MODEL, [draw_images(tmp_path)], prompt="Read.")
    app, read = make_label_app(session, Access(), pool), image_reader.ImageReader.read_size
    first, other = session.store.items[:2]
    is_waiting, can_end = threading.Event(), threading.Event()

    def wait_for_first(reader: ImageReader, path: Path) -> ImageSize:
        if path == first.images[0]:
            is_waiting.set()
            assert can_end.wait(TIMEOUT_S)
        return read(reader, path)

    monkeypatch.setattr(image_reader.ImageReader, "read_size", wait_for_first)
    with (
        session.store,
        run_app(app) as port,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=TIMEOUT_S) as client,
        ThreadPoolExecutor(1) as thread,
    ):
        decide = {"action": "save", "text": "A"}
        bodies = [{"id": item.sample.sample.id, **decide} for item in (first, other)]
        slow = thread.submit(partial(client.post, "/decision", json=bodies[0]))
        assert is_waiting.wait(TIMEOUT_S)
        fast = client.post("/decision", json=bodies[1])
        can_end.set()
        assert [slow.result().status_code, fast.status_code] == [200, 200]


def test_accepting_at_once_does_not_delay_or_undo_other_decisions(pool, tmp_path, monkeypatch):
    session = open_suggested_session(tmp_path, "A", "B")
    app, read = make_label_app(session, Access(), pool), image_reader.ImageReader.read_size
    first, second, other = session.store.items
    is_waiting, can_end = threading.Event(), threading.Event()

    def wait_for_second(reader: ImageReader, path: Path) -> ImageSize:
        if path == second.images[0] and not is_waiting.is_set():
            is_waiting.set()
            assert can_end.wait(TIMEOUT_S)
        return read(reader, path)

    monkeypatch.setattr(image_reader.ImageReader, "read_size", wait_for_second)
    with (
        session.store,
        run_app(app) as port,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=TIMEOUT_S) as client,
        ThreadPoolExecutor(1) as thread,
    ):
        slow = thread.submit(partial(client.post, "/decisions", json={"action": "accept"}))
        assert is_waiting.wait(TIMEOUT_S)
        for item in (first, other):
            body = {"id": item.sample.sample.id, "action": "save", "text": "C"}
            assert client.post("/decision", json=body).status_code == 200
        can_end.set()
        # The first one was corrected meanwhile.
        assert [index for index, _ in slow.result().json()["items"]] == [1]
        decisions = client.get("/items").json()["decisions"]
    assert decisions == ["corrected", "accepted", "written"]


def test_pages_of_the_studio_do_not_wait_for_reports(pool, tmp_path, monkeypatch):
    def render_report(view: StudioView, *values: object) -> str:
        return str(view.workspace.run_job(jobs.hang))

    monkeypatch.setattr(workspace, "JOB_CPU_SECONDS", 10_000.0)
    monkeypatch.setattr(StudioView, "render_report", render_report)
    page = make_page(tmp_path / "workspace")
    page.view.workspace.pool = pool
    with (
        run_app(make_studio_app(page, Access())) as port,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=TIMEOUT_S) as client,
        # More than the threads of the other requests.
        hold_requests(pool, 2, port, "GET /view/report", number=50),
    ):
        assert client.get("/").status_code == 200


def test_pages_of_the_studio_do_not_wait_for_previews(pool, tmp_path, monkeypatch):
    monkeypatch.setattr(workspace, "JOB_CPU_SECONDS", 10_000.0)
    monkeypatch.setattr(studio_page, "preview_source", jobs.hang)
    folder = tmp_path / "workspace"
    folder.mkdir()
    (folder / "rows.csv").write_text("image,caption\na.png,a\n")
    page = make_page(folder)
    page.view.workspace.pool = pool
    body = json.dumps({"texts": {"import:source": "rows.csv", "import:out": "a"}}).encode()
    with (
        run_app(make_studio_app(page, Access())) as port,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=TIMEOUT_S) as client,
        hold_requests(pool, 2, port, "POST /preview", number=50, body=body),
    ):
        assert client.get("/").status_code == 200


def make_hanging_app(pool: WorkerPool, password: str | None = None) -> AccessMiddleware:
    """Build an application with jobs that take hours, and others that end at once."""
    request_jobs = RequestJobs(2)

    def hang() -> None:
        with pool.borrow_worker() as worker:
            worker.call(jobs.hang, max_cpu_s=10_000.0)

    async def answer(request: Request) -> Response:
        if request.method == "POST":
            await request.body()
        await request_jobs.run(request, hang)
        return JSONResponse({})

    async def answer_at_once(request: Request) -> Response:
        return JSONResponse(await request_jobs.run(request, dict))

    hanging = Route("/{path:path}", answer, methods=["GET", "POST"])
    routes = [Route("/quick", answer_at_once), hanging]
    return AccessMiddleware(create_app(routes), Access(password))


@contextlib.contextmanager
def run_behind_studio(app: AccessMiddleware, file: Path) -> Iterator[int]:
    """Run an application on a Unix socket, and yield the port that forwards requests to it."""
    outer = AccessMiddleware(create_app([make_proxy_route(lambda job: file)]), Access())
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(file))
        listener.listen()
        with run_app(app, listener=listener), run_app(outer) as port:
            yield port


def test_jobs_behind_the_studio_end_with_their_clients(pool, tmp_path):
    with run_behind_studio(make_hanging_app(pool), tmp_path / "page.sock") as port:
        for method, body in (("GET", b""), ("POST", b"text")):
            with hold_requests(pool, 2, port, f"{method} /pages/1/a", number=2, body=body):
                pass


@pytest.mark.parametrize("is_behind_studio", [False, True])
def test_job_of_an_incomplete_request_ends(pool, tmp_path, monkeypatch, is_behind_studio):
    monkeypatch.setattr(server, "UPLOAD_IDLE_TIMEOUT_S", 0.5)
    # An idle worker takes the job at once, before the request times out.
    pool.start()
    app = make_hanging_app(pool)
    started = run_behind_studio(app, tmp_path / "page.sock") if is_behind_studio else run_app(app)
    with started as port, socket.create_connection(("127.0.0.1", port), TIMEOUT_S) as link:
        link.sendall(b"GET /pages/1/a HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n")
        assert b" 408 " in link.recv(1000)
        # An idle worker replaces that of the job.
        end = time.monotonic() + TIMEOUT_S
        while len(list_workers(pool)) > len(pool.idle_workers):
            assert time.monotonic() < end, "the job has not ended"
            time.sleep(0.02)


def test_sign_out_ends_jobs_of_the_browser(pool):
    with (
        run_app(make_hanging_app(pool, "right-password")) as port,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=TIMEOUT_S) as client,
        ThreadPoolExecutor(2) as threads,
    ):
        sign_in = partial(client.post, "/sign-in", data={"password": "right-password"})
        sign_in()
        for _ in range(2):
            threads.submit(partial(client.get, "/slow"))
        busy = wait_for_jobs(pool, 2)
        client.post("/sign-out")
        assert list_running(busy, TIMEOUT_S) == []
        # The threads are free again.
        sign_in()
        assert client.get("/quick").status_code == 200
