"""Fixtures of local hub servers."""

import hashlib
import io
import json
import shutil
import socket
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_hub_servers as fake
import pytest
from container_fixtures import make_png
from huggingface_hub import constants

from finesight.hub import download
from finesight.samples.sample import Sample


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty cache, no tokens, and no delay between retries."""
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "cache" / "assets"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache" / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "cache" / "token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "MODELSCOPE_API_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(download, "RETRY_DELAYS_S", (0.0, 0.0, 0.0))
    return tmp_path / "cache"


@pytest.fixture
def huggingface(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[fake.FakeHubServer]:
    """Local server of the Hugging Face hub."""
    with fake.run_hub_server(fake.HuggingFaceHandler) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield hub


@pytest.fixture
def modelscope(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[fake.FakeHubServer]:
    """Local server of the ModelScope hub."""
    with fake.run_hub_server(fake.ModelScopeHandler) as hub:
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", hub.url)
        monkeypatch.setattr("modelscope_hub._legacy_api.REPO_TREE_PAGE_RETRY_MAX_DELAY_SECONDS", 0)
        yield hub


class FileHandler(fake.HubHandler):
    """Serves the file /NAME, and redirects /to/URL."""

    def respond(self, path: str, query: dict[str, list[str]]) -> None:
        if path.startswith("/to/"):
            self.send(302, b"", {"Location": path.removeprefix("/to/")})
        elif path.strip("/") in self.server.repositories["files"]:
            data = self.server.repositories["files"][path.strip("/")]
            tag = f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"'
            if self.headers.get("If-None-Match") == tag:
                self.send(304)
            else:
                self.send_file(path.strip("/"), data, {"ETag": tag})
        else:
            self.send(404)


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for localhost and 127.0.0.1, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    folder = tmp_path_factory.mktemp("certificate")
    key, certificate_file = folder / "key.pem", folder / "certificate.pem"
    names = "subjectAltName=DNS:localhost,IP:127.0.0.1"
    command = (
        f"openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext {names}"
    )
    files = ["-keyout", str(key), "-out", str(certificate_file)]
    subprocess.run([*command.split(), *files], check=True, capture_output=True)
    return certificate_file, key


@pytest.fixture
def web_server(
    certificate: tuple[Path, Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[fake.FakeHubServer]:
    """HTTPS file server."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    with fake.run_in_thread(fake.FakeHubServer(FileHandler, certificate=certificate)) as server:
        server.repositories["files"] = {}
        yield server


@pytest.fixture
def without_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test on any connection or name resolution."""

    def refuse(*arguments: Any) -> None:
        pytest.fail(f"network access: {arguments[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def make_image_cell(gray_level: int) -> dict[str, Any]:
    return {"bytes": make_png(gray_level), "path": f"{gray_level}.png"}


def get_text(sample: Sample, message: int) -> str:
    return "".join(getattr(part, "text", "") for part in sample.messages[message].content)


def read_image_bytes(sample: Sample, out: Path) -> bytes:
    return (out / sample.messages[0].content[0].image).read_bytes()


def build_coco_files(folder: str = "") -> dict[str, bytes]:
    """Write the COCO layout: a document, and images in a folder beside it."""
    document = {
        "images": [{"id": n, "file_name": f"{n}.png", "width": 64, "height": 48} for n in (1, 2)],
        "annotations": [
            {"id": n, "image_id": n, "category_id": 1, "bbox": [1, 2, 3, 4]} for n in (1, 2)
        ],
        "categories": [{"id": 1, "name": "dog"}],
    }
    images = {f"{folder}images/{n}.png": make_png(n) for n in (1, 2)}
    return {f"{folder}instances.json": json.dumps(document).encode(), **images}


def make_zip(files: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return file.getvalue()
