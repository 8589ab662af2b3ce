"""What clients send is never logged, and one function opens media."""

from __future__ import annotations

import ast
import base64
import json
import logging
from functools import cache
from pathlib import Path

import pytest
from fastapi.telemetry import TelemetryConfig
from serving import KEY, bearer, data_url, image, png, question, running, send

from finesight.serve.app import SILENT

PACKAGE = Path(__file__).parents[2] / "src" / "finesight"

SECRET = "wehrlos-4711"

OPENERS = {
    "data/headers.py": "the one that all others use",
    "synth/sheet.py": "pictures that the package has drawn itself",
    "track/records.py": "the same, on their way to a tracker's process",
}
"""Modules that hand a file to Pillow."""

CLIENTS = {
    "doctor/hubs.py",
    "remote/huggingface.py",
    "remote/https.py",
    "remote/modelscope.py",
    "remote/modelscope_upload.py",
    "remote/publishing.py",
    "remote/transfer.py",
    "remote/web.py",
    "serve/fetch.py",
    "track/swanlab.py",
}
"""Modules that send requests: to hubs and addresses that the user names, and for clients of the
server to hosts that the user has allowed."""

NETWORK = {"httpx", "httpx2", "requests", "aiohttp", "urllib3", "urllib.request", "http.client"}


def test_payloads_are_not_logged(answerer, tmp_path, caplog, capfd, monkeypatch):
    caplog.set_level(logging.DEBUG)
    with running(answerer, tmp_path, keys=[KEY]) as server:
        picture = png(seed=5)
        body = question(server, image(data_url(picture)), SECRET, stop=[SECRET], user=SECRET)
        status, said, _ = send(server, "POST", "/v1/chat/completions", body, bearer(KEY))
        assert status == 200
        answer = said["choices"][0]["message"]["content"]
        for path, given in (
            ("/v1/chat/completions", body.replace(": 4", f': "{SECRET}"')),
            ("/v1/chat/completions", body + SECRET),
            (f"/v1/files/{SECRET}", ""),
            (f"/{SECRET}?{SECRET}", ""),
        ):
            assert send(server, "POST", path, given, bearer(KEY))[0] in (400, 404, 405)
        assert send(server, "GET", "/v1/models", headers=bearer(SECRET * 3))[0] == 401
        with server.client(KEY) as client:
            kept = client.files.create(file=(f"{SECRET}.png", picture), purpose="vision")
        caplog.set_level(logging.DEBUG)

        def fail(*arguments: object) -> None:
            raise RuntimeError(f"{SECRET} in our own fault")

        monkeypatch.setattr(server.service, "ask", fail)
        for stream in (False, True):
            given = question(server, SECRET, stream=stream)
            status, said, _ = send(server, "POST", "/v1/chat/completions", given, bearer(KEY))
            assert status == 500
            assert SECRET not in json.dumps(said)
    records = [r for r in caplog.records if not r.name.startswith(("openai", "httpcore2.client"))]
    ours = [r for r in records if r.name == "finesight.serve"]
    assert any("POST /v1/chat/completions 200" in r.getMessage() for r in ours)
    assert any("RuntimeError" in r.getMessage() for r in ours)
    logged = "\n".join(logging.Formatter().format(record) for record in records)
    printed = "".join(capfd.readouterr())
    hidden = [SECRET, KEY, base64.b64encode(picture).decode()[:40], kept.id]
    hidden += [answer] if len(answer) > 8 else []
    for text in (logged, printed):
        assert not [secret for secret in hidden if secret in text]


def test_nothing_is_sent_to_whom_the_environment_names(answerer, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTAPI_OTEL_AUTO_CONFIGURE", "true")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    with running(answerer, tmp_path) as server:
        inner = server.app._app
        # The names are FastAPI's own: were they others, what is switched off would be on.
        known = set(TelemetryConfig.__annotations__)
        assert set(SILENT) == known - {
            "tracer_provider",
            "meter_provider",
            "logger_provider",
            "exclude",
        }
        assert not any(inner._telemetry[name] for name in SILENT)


@cache
def _modules() -> list[tuple[str, ast.Module]]:
    return [
        (str(path.relative_to(PACKAGE)), ast.parse(path.read_text(encoding="utf-8")))
        for path in sorted(PACKAGE.rglob("*.py"))
    ]


def test_only_one_function_opens_pictures():
    found = {
        name
        for name, tree in _modules()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("Image.open", "PIL.Image.open")
    }
    assert found == set(OPENERS)


def test_only_some_modules_send_requests():
    found = set()
    for name, tree in _modules():
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            if NETWORK & set(names):
                found.add(name)
    assert found <= CLIENTS, f"more modules send requests: {found - CLIENTS}"


def _calling(*ends: str) -> set[str]:
    """Modules of the server that call a function whose name ends so."""
    return {
        name
        for name, tree in _modules()
        if name.startswith("serve/")
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(ends)
    }


def test_in_the_server_media_is_opened_in_one_place():
    assert _calling(".fetcher.take", "store.link") == {"serve/media.py"}


def test_in_the_server_only_workers_read_what_clients_send():
    reading = ("a2b_base64", "picture_size", "prompt_outline", "span_patches", "Grammars")
    assert _calling(*reading) == {"serve/worker_jobs.py"}
    assert _calling("parsed", "model_validate_json") == {"serve/worker_jobs.py", "serve/schema.py"}
    assert not _calling("open_picture", "with_patches", "renderer.encode", "tokenizer.encode")


@pytest.mark.parametrize("name", sorted(OPENERS))
def test_those_modules_exist(name):
    assert (PACKAGE / name).is_file()
