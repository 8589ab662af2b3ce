"""Tests that client data is never logged, and that one function opens media."""

import base64
import json
import logging
import re
from pathlib import Path

from api_server_fixtures import (
    CHAT,
    KEY,
    make_auth_header,
    make_data_url,
    make_image_part,
    make_noise_png,
    make_request_body,
    post_chat,
    run_server,
    send_request,
)

PACKAGE = Path(__file__).parents[2] / "src" / "finesight"

SECRET = "wehrlos-4711"

OPENERS = {
    "samples/image_file.py": "the one that all others use",
    "samples/augmentation.py": "the JPEG copy that it has just encoded",
    "ingest/formats/labelme.py": "PNG masks in LabelMe files",
    "export/resize_code.py": "code that is printed for other programs, and not executed",
}
"""Modules that open files with Pillow."""

CLIENTS = {
    "app/jobs.py",
    "app/program_use.py",
    "app/server.py",
    "hub/bounded_request.py",
    "hub/download.py",
    "hub/huggingface.py",
    "hub/modelscope.py",
    "hub/url_files.py",
    "label/teacher.py",
    "serve/http_protocol.py",
    "serve/media_sources.py",
    "track/trackers/swanlab.py",
}
"""Modules that send requests: to hubs, URLs and teachers of the user, to allowed media hosts, and
to servers that this program has started."""


def test_request_content_is_not_logged(inference_model, tmp_path, caplog, capfd, monkeypatch):
    caplog.set_level(logging.DEBUG)
    with run_server(inference_model, tmp_path, keys=[KEY]) as server:
        input_image = make_noise_png(seed=5)
        image, headers = make_image_part(make_data_url(input_image)), make_auth_header(KEY)
        body = make_request_body(server, image, SECRET, stop=[SECRET], user=SECRET)
        status, output, _ = send_request(server, "POST", CHAT, body, headers)
        assert status == 200
        answer = output["choices"][0]["message"]["content"]
        for path, given in (
            (CHAT, body.replace(": 4", f': "{SECRET}"')),
            (CHAT, body + SECRET),
            (f"/v1/files/{SECRET}", ""),
            (f"/{SECRET}?{SECRET}", ""),
        ):
            assert send_request(server, "POST", path, given, headers)[0] in (400, 404, 405)
        wrong = make_auth_header(SECRET * 3)
        assert send_request(server, "GET", "/v1/models", headers=wrong)[0] == 401
        with server.client(KEY) as client:
            retained = client.files.create(file=(f"{SECRET}.png", input_image), purpose="vision")
        caplog.set_level(logging.DEBUG)

        def fail(*arguments: object) -> None:
            raise RuntimeError(f"{SECRET} in our own fault")

        monkeypatch.setattr(server.service, "submit", fail)
        for stream in (False, True):
            status, error = post_chat(server, SECRET, stream=stream, headers=headers)
            assert status == 500
            assert SECRET not in json.dumps(error)
    records = [r for r in caplog.records if not r.name.startswith(("openai", "httpcore2.client"))]
    ours = [r for r in records if r.name == "finesight.serve"]
    assert any("POST /v1/chat/completions 200" in r.getMessage() for r in ours)
    assert any("RuntimeError" in r.getMessage() for r in ours)
    logged = "\n".join(logging.Formatter().format(record) for record in records)
    printed = "".join(capfd.readouterr())
    hidden = [SECRET, KEY, base64.b64encode(input_image).decode()[:40], retained.id]
    hidden += [answer] if len(answer) > 8 else []
    for text in (logged, printed):
        assert not [secret for secret in hidden if secret in text]


def find_modules(pattern: str) -> set[str]:
    """Return the modules of the package with a line that matches."""
    lines = re.compile(pattern, re.MULTILINE)
    paths = [path for path in PACKAGE.rglob("*.py") if lines.search(path.read_text("utf-8"))]
    return {path.relative_to(PACKAGE).as_posix() for path in paths}


def test_only_one_function_opens_images():
    assert find_modules(r"^[^#\n]*\bImage\.open\(") == set(OPENERS)


def test_only_listed_modules_send_requests():
    name = r"(httpx2?|requests|aiohttp|urllib3|urllib\.request|http\.client)\b"
    pattern = rf"^\s*((import|from) {name}|from urllib import .*request|from http import .*client)"
    assert find_modules(pattern) == CLIENTS
