"""HTTP server in a thread of a Python program: access, models, shutdown and errors."""

import gc
import json
import multiprocessing
import random
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import weakref
from contextlib import suppress
from typing import Any

import hf_models
import pytest
from test_python_api import draw, make_samples

import finesight
from finesight.infer.engine import Engine
from finesight.model_folder import TINY_MODEL
from finesight.serve.api_server import ApiServer
from finesight.serve.model_server import HOST, ModelServer

TUNE = {"language": "lora", "lora": {"rank": 4, "alpha": 8}}


def send(server: ModelServer, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    """Send a request, and return status and JSON of the response."""
    content = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(server.url + path, content, headers)
    try:
        with urllib.request.urlopen(request) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def ask(server: ModelServer, **fields: Any) -> str:
    """Ask a question with the key of the server."""
    messages = [{"role": "user", "content": "Which colour?"}]
    body = {"model": server.model_names[0], "messages": messages, "max_tokens": 4, **fields}
    headers = {"Authorization": f"Bearer {server.key}", "Content-Type": "application/json"}
    status, answer = send(server, "/chat/completions", body, **headers)
    assert status == 200, answer
    text: str = answer["choices"][0]["message"]["content"]
    return text


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Train two adapters, of which the second one answers `blue`."""
    folder = tmp_path_factory.mktemp("adapters")
    client = finesight.TrainingClient(TINY_MODEL, tune=TUNE, device="cpu", num_workers=0)
    batch = client.encode(make_samples(3))
    client.forward_backward(batch)
    client.optim_step(1e-5)
    first = client.save(folder / "first")
    question = finesight.Sample(question="Which colour?", answer="blue")
    for _ in range(12):
        client.forward_backward(client.encode([question]))
        client.optim_step(3e-3)
    return first, client.save(folder / "second")


def test_requests_need_the_key(adapters):
    model = finesight.load(adapters[1], device="cpu")
    with finesight.start_server(model) as server:
        assert server.url.startswith(f"http://{HOST}:")
        assert server.model_names == ("second",)
        assert server.key not in repr(server)
        status, answer = send(server, "/models")
        assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
        status, answer = send(server, "/models", Authorization="Bearer wrong")
        assert status == 401
        assert ask(server) == "blue"
        texts: list[str] = []

        def generate() -> None:
            texts.append(model.generate([], "Which colour?", max_new_tokens=4).text)

        # Calls of the model and requests do not disturb each other.
        threads = [threading.Thread(target=generate) for _ in range(2)]
        for thread in threads:
            thread.start()
        assert ask(server, model="second") == "blue"
        for thread in threads:
            thread.join()
        assert texts == ["blue", "blue"]
    assert repr(server).endswith(", closed>")
    with pytest.raises(urllib.error.URLError):
        send(server, "/models")
    server.close()


def test_web_sources_are_rejected(adapters):
    """Images come from requests only: no files of this machine, no addresses."""
    with finesight.start_server(adapters[0], device="cpu") as server:
        headers = {"Authorization": f"Bearer {server.key}", "Content-Type": "application/json"}
        for url in ("file:///etc/passwd", "http://127.0.0.1/a.png", "https://example.com/a.png"):
            image = {"type": "image_url", "image_url": {"url": url}}
            messages = [{"role": "user", "content": [image]}]
            body = {"model": "first", "messages": messages}
            status, answer = send(server, "/chat/completions", body, **headers)
            assert 400 <= status < 500, answer


def test_requests_select_an_adapter(adapters):
    with finesight.start_server(TINY_MODEL, adapters=adapters, device="cpu") as server:
        assert server.model_names == (TINY_MODEL, "first", "second")
        answers = {name: ask(server, model=name) for name in server.model_names}
    assert answers["second"] == "blue"
    assert answers["first"] == answers[TINY_MODEL] != "blue"


def test_program_ends_without_close(adapters):
    code = (
        "import finesight\n"
        f"server = finesight.start_server({str(adapters[0])!r}, device='cpu')\n"
        "print(server.url)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("http://127.0.0.1:")
    assert "Traceback" not in done.stderr


def test_errors_name_the_call(adapters, tmp_path):
    model = finesight.load(adapters[0], device="cpu")
    llava = hf_models.make_llava(tmp_path / "llava")
    with finesight.start_server(model) as server:
        port = int(server.url.rpartition(":")[2].removesuffix("/v1"))
        cases = [
            ((model,), {"port": "8000"}, "port=0"),
            ((model,), {"port": 70000}, "port=0"),
            ((model,), {"adapters": [adapters[1]]}, "start_server("),
            ((model,), {"port": port}, "port=0"),
            ((3,), {}, "pass a name or a path"),
            (("missing",), {}, ""),
            ((llava,), {}, "finesight.load("),
        ]
        for arguments, settings, remedy in cases:
            with pytest.raises(finesight.UserError) as caught:
                finesight.start_server(*arguments, **settings)
            assert remedy in str(caught.value.remedy)
            assert "--" not in str(caught.value.remedy)


def test_image_in_a_request(adapters):
    import base64
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(draw("red")).save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
        {"type": "text", "text": "Which colour?"},
    ]
    model = finesight.load(adapters[0], device="cpu")
    expected = model.generate(draw("red"), "Which colour?", max_new_tokens=4).text
    with finesight.start_server(model) as server:
        assert ask(server, messages=[{"role": "user", "content": content}]) == expected


def test_closed_server_frees_its_memory(adapters):
    """Closing frees the engine with its cache, although the variable of the server remains."""
    model = finesight.load(adapters[0], device="cpu")
    for _ in range(2):
        others = {*map(id, list_engines())}
        server = finesight.start_server(model)
        assert ask(server)
        engines = [weakref.ref(one) for one in list_engines() if id(one) not in others]
        assert len(engines) == 1
        server.close()
        gc.collect()
        assert engines[0]() is None
        assert server.model_names == ("first",)


def list_engines() -> list[Engine]:
    gc.collect()
    return [one for one in gc.get_objects() if isinstance(one, Engine)]


def test_interrupted_start_leaves_no_server(adapters):
    """Ctrl-C during the start ends the thread and frees the port."""
    script = INTERRUPTED_START.format(model=str(adapters[0]), port=choose_port())
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == ["interrupted", "ended", "free"], done.stderr
    assert done.returncode == 0, done.stderr


INTERRUPTED_START = """
import signal, threading, time
import finesight
from finesight.serve import api_server

run = api_server.run_api_server
# A shell starts programs in the background with ignored interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

def interrupt(model, listener, **options):
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
    time.sleep(0.2)
    run(model, listener, **options)

model = finesight.load({model!r}, device="cpu")
api_server.run_api_server = interrupt
try:
    finesight.start_server(model, port={port})
except KeyboardInterrupt:
    print("interrupted")
api_server.run_api_server = run
if "finesight-server" not in [thread.name for thread in threading.enumerate()]:
    print("ended")
with finesight.start_server(model, port={port}):
    print("free")
"""


def choose_port() -> int:
    """Return a free port that no connection of another test can have, unlike one of port 0."""
    for port in random.sample(range(10_000, 30_000), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no free port")


def test_failure_of_a_running_server_is_raised(adapters, monkeypatch):
    async def fail(server: Any) -> None:
        raise RuntimeError("the loop failed")

    monkeypatch.setattr(ApiServer, "main_loop", fail)
    model = finesight.load(adapters[0], device="cpu")
    with pytest.raises(RuntimeError, match="the loop failed"):
        finesight.start_server(model).close()


def test_port_is_free_although_a_fork_has_the_socket(adapters):
    model = finesight.load(adapters[0], device="cpu")
    port = choose_port()
    server = finesight.start_server(model, port=port)
    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    process.start()
    try:
        server.close()
        with pytest.raises(urllib.error.URLError):
            send(server, "/models")
        with finesight.start_server(model, port=port):
            pass
    finally:
        process.kill()
        process.join()
