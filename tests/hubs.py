"""Hubs on this machine in place of the real ones, for tests of what asks them."""

from __future__ import annotations

import io
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_servers import HuggingFace, ModelScope, Serving, serving
from huggingface_hub import constants
from PIL import Image

from finesight.remote import web


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, no tokens, and no waiting between attempts."""
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "cache" / "assets"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache" / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "cache" / "token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "MODELSCOPE_API_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(web, "PAUSES", (0.0, 0.0, 0.0))
    return tmp_path / "cache"


@pytest.fixture
def huggingface(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serving]:
    """Hugging Face's hub, for this process."""
    with serving(HuggingFace) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield hub


@pytest.fixture
def modelscope(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serving]:
    """ModelScope's hub."""
    with serving(ModelScope) as hub:
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", hub.url)
        yield hub


@pytest.fixture
def without_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any attempt to connect, or to look a name up, fails the test."""

    def refuse(*arguments: Any) -> None:
        pytest.fail(f"the network was touched: {arguments[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def picture(shade: int, width: int = 64, height: int = 48) -> bytes:
    """A PNG, different for each shade."""
    file = io.BytesIO()
    Image.new("RGB", (width, height), (shade % 256, shade // 256, 7)).save(file, "PNG")
    return file.getvalue()


def parquet(rows: Sequence[dict[str, Any]]) -> bytes:
    """A Parquet file as the library datasets writes it: pictures as {bytes, path}."""
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows)), file)
    return file.getvalue()


def image(shade: int) -> dict[str, Any]:
    """A cell of an Image column."""
    return {"bytes": picture(shade), "path": f"{shade}.png"}
