"""Servers on this machine that speak the hubs' protocols, and fail as networks do.

Hugging Face's: /api/models/NAME/revision/REV, /api/models/NAME/tree/REV in pages joined by Link
headers, /NAME/resolve/REV/PATH with X-Repo-Commit, and for files in LFS a redirect to another
host with X-Linked-Etag and X-Linked-Size. ModelScope's: /api/v1/models/NAME/repo/files in one
piece, /api/v1/datasets/NAME/repo/tree in pages, /api/v1/.../repo?FilePath=.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "secret-token"
LFS_THRESHOLD = 1000
"""Bytes from which a file is in LFS: elsewhere, with a SHA-256."""


@dataclass(slots=True)
class HubFaults:
    """Injected server faults.

    Attributes:
        cuts: Byte counts after which responses for a path end, one entry per response.
        stalls: Byte counts after which the next response waits for `resume_event`.
        corrupted: Paths with other bytes.
        redirect_url: Target of redirects instead of the other host.
        statuses: Response statuses for a path.
    """

    cuts: dict[str, list[int]] = field(default_factory=dict)
    stalls: dict[str, int] = field(default_factory=dict)
    corrupted: set[str] = field(default_factory=set)
    redirect_url: str | None = None
    statuses: dict[str, list[int]] = field(default_factory=dict)
    without_ranges: bool = False
    without_sizes: bool = False
    resume_event: threading.Event = field(default_factory=threading.Event)
    stalled_event: threading.Event = field(default_factory=threading.Event)


@dataclass(slots=True)
class RecordedRequest:
    """One request as it came."""

    path: str
    headers: Message

    @property
    def range(self) -> str | None:
        return self.headers.get("Range")

    @property
    def token(self) -> str | None:
        return self.headers.get("Authorization")


class FakeHubServer(ThreadingHTTPServer):
    """A server and the one for large files; `repositories` by datasets/NAME or models/NAME."""

    daemon_threads = True

    def __init__(self, handler: type[HubHandler], storage: FakeHubServer | None = None) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.faults = HubFaults()
        self.requests: list[RecordedRequest] = []
        self.page = 1000
        self.storage = storage
        self.blobs: dict[str, tuple[str, bytes]] = {}

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing on the screen: who asked may have been killed."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def lfs_requests(self) -> list[RecordedRequest]:
        """The requests for large files."""
        assert self.storage is not None
        return self.storage.requests


class HubHandler(BaseHTTPRequestHandler):
    """What both hubs and the storage behind them have in common."""

    server: FakeHubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing on the screen."""

    def do_GET(self) -> None:
        self.server.requests.append(RecordedRequest(self.path, self.headers))
        self.respond(urlsplit(self.path).path, parse_qs(urlsplit(self.path).query))

    def do_HEAD(self) -> None:
        self.do_GET()

    def respond(self, path: str, query: dict[str, list[str]]) -> None:
        raise NotImplementedError

    def send(
        self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_json(
        self, content: object, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        kind = {"Content-Type": "application/json"}
        self.send(status, json.dumps(content).encode(), {**kind, **(headers or {})})

    def send_file(self, name: str, data: bytes, headers: Mapping[str, str]) -> None:
        """The file or the asked part of it, as far as the faults let it come."""
        faults = self.server.faults
        if faults.statuses.get(name):
            return self.send(faults.statuses[name].pop(0), b"later", {"Retry-After": "0"})
        if name in faults.corrupted:
            data = bytes(len(data))
        first, status, more = 0, 200, {"Accept-Ranges": "bytes", **headers}
        byte_range = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        changed = self.headers.get("If-Range") not in (None, headers.get("ETag"))
        if byte_range and not faults.without_ranges and not changed:
            first, status = int(byte_range[1]), 206
            if first >= len(data):
                return self.send(416, b"", {"Content-Range": f"bytes */{len(data)}"})
            total = "*" if faults.without_sizes else len(data)
            more["Content-Range"] = f"bytes {first}-{len(data) - 1}/{total}"
        cuts = faults.cuts.get(name)
        end = first + cuts.pop(0) if cuts and self.command == "GET" else len(data)
        if faults.without_sizes:
            more["Connection"] = "close"
        else:
            more["Content-Length"] = str(len(data) - first)
        self.send_response(status)
        for header, value in more.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command == "GET" and name in faults.stalls:
            first, pause = first + faults.stalls[name], first
            del faults.stalls[name]
            self.wfile.write(data[pause:first])
            self.wfile.flush()
            faults.stalled_event.set()
            faults.resume_event.wait(60)
        if self.command == "GET":
            with contextlib.suppress(OSError):  # who asked may be dead by now
                self.wfile.write(data[first:end])
        if end < len(data):
            self.wfile.flush()
            self.close_connection = True
        return None

    def redirect(self, name: str, data: bytes, headers: Mapping[str, str]) -> None:
        """To where large files lie, by their digest, signed in the query."""
        assert self.server.storage is not None
        digest = hashlib.sha256(data).hexdigest()
        self.server.storage.blobs[digest] = (name, data)
        base = self.server.faults.redirect_url or f"{self.server.storage.url}/{digest}"
        self.send(302, b"Found", {"Location": f"{base}?Signature=x", **headers})


class LfsStorageHandler(HubHandler):
    """Where large files lie. A token here would be a leak, and is refused as S3 refuses it."""

    def respond(self, path: str, query: dict[str, list[str]]) -> None:
        if "Authorization" in self.headers or "Cookie" in self.headers:
            return self.send(400, b"Only one auth mechanism allowed")
        name, data = self.server.blobs[path.strip("/")]
        return self.send_file(name, data, {"ETag": f'"{path.strip("/")}"'})


class HuggingFaceHandler(HubHandler):
    """Hugging Face's hub."""

    def respond(self, path: str, query: dict[str, list[str]]) -> None:
        if self.headers.get("Authorization") not in (None, f"Bearer {TOKEN}"):
            message = "Invalid credentials in Authorization header"
            return self.send_json({"error": message}, 401, {"X-Error-Message": message})
        resolve = re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        api = re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/(revision|tree)/([^/]+)", path)
        if resolve:
            kind = (resolve[1] or "models/") + resolve[2]
            self._send_file(kind, unquote(resolve[3]), unquote(resolve[4]))
        elif api:
            name, revision = f"{api[1]}/{api[2]}", unquote(api[4])
            if self._check_revision(name, revision):
                self._send_info(api[2]) if api[3] == "revision" else self._send_tree(name, query)
        else:
            self.send(404)
        return None

    def _check_revision(self, name: str, revision: str) -> bool:
        if name not in self.server.repositories:
            # The hub does not tell a private repository from none.
            code = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
            self.send_json({"error": "Repository not found"}, 401, code)
            return False
        if revision not in ("main", "v1", "refs/pr/4", COMMIT):
            code = {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"}
            self.send_json({"error": "Invalid rev id"}, 404, code)
            return False
        return True

    def _send_info(self, name: str) -> None:
        self.send_json({"_id": "1", "id": name, "sha": COMMIT, "siblings": [], "tags": []})

    def _send_tree(self, name: str, query: dict[str, list[str]]) -> None:
        entries = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": "data"}]
        entries += [_make_hf_entry(*item) for item in self.server.repositories[name].items()]
        start = int(query.get("cursor", ["0"])[0])
        stop = start + self.server.page
        path = urlsplit(self.path).path
        following = f'<{self.server.url}{path}?recursive=True&cursor={stop}>; rel="next"'
        self.send_json(
            entries[start:stop], headers={"Link": following} if stop < len(entries) else None
        )

    def _send_file(self, name: str, revision: str, path: str) -> None:
        if not self._check_revision(name, revision):
            return
        if name in self.server.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            message = (
                f"Access to {name} is restricted. You must have access to it and be authenticated"
            )
            code = {"X-Error-Code": "GatedRepo", "X-Error-Message": message}
            self.send_json({"error": message}, 401, code)
            return
        if path not in self.server.repositories[name]:
            self.send(404, b"Entry not found", {"X-Error-Code": "EntryNotFound"})
            return
        data = self.server.repositories[name][path]
        headers = {"X-Repo-Commit": COMMIT}
        if len(data) < LFS_THRESHOLD:
            self.send_file(path, data, {**headers, "ETag": f'"{git_blob_sha1(data)}"'})
        else:
            linked = {
                "X-Linked-Size": str(len(data)),
                "X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"',
            }
            self.redirect(path, data, {**headers, **linked})


class ModelScopeHandler(HubHandler):
    """ModelScope's hub."""

    def respond(self, path: str, query: dict[str, list[str]]) -> None:
        found = re.fullmatch(r"/api/v1/(models|datasets)/([^/]+/[^/]+)/repo(/tree|/files)?", path)
        name = f"{found[1]}/{found[2]}" if found else ""
        if not found or query.get("Revision", ["master"])[0] not in ("master", "v1"):
            self._send_error(404, 10010205001, "Not found")
        elif name not in self.server.repositories:
            self._send_error(404, 10010205001, f"获取数据集信息失败，信息不存在: {name}")
        elif name in self.server.gated and not self._is_authorized():
            self._send_error(403, 10030000001, "无访问权限")
        elif found[3] is None:
            self._send_file(name, query["FilePath"][0])
        elif found[3] == ("/tree" if found[1] == "datasets" else "/files"):
            self._send_tree(name, query, paged=found[1] == "datasets")
        else:
            self._send_error(404, 404, "no such endpoint")

    def _is_authorized(self) -> bool:
        cookie = f"m_session_id={TOKEN}" in self.headers.get("Cookie", "")
        return cookie or self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _send_error(self, status: int, code: int, message: str) -> None:
        body = {"Code": code, "Message": message, "RequestId": "1", "Success": False}
        self.send_json(body, status)

    def _send_tree(self, name: str, query: dict[str, list[str]], *, paged: bool) -> None:
        entries = [{"Name": "data", "Path": "data", "Size": 0, "Type": "tree", "Sha256": ""}]
        entries += [_make_ms_entry(*item) for item in self.server.repositories[name].items()]
        if paged:
            number = int(query.get("PageNumber", ["1"])[0])
            if self.server.faults.statuses.get(f"page {number}"):
                status = self.server.faults.statuses[f"page {number}"].pop(0)
                self._send_error(status, 10030000001, "access denied")
                return
            size = min(self.server.page, int(query.get("PageSize", ["100"])[0]))
            entries = entries[(number - 1) * size : number * size]
        data = {"Files": entries, "LatestCommitter": {"Name": "somebody"}}
        self.send_json({"Code": 200, "Data": data, "Message": "success", "Success": True})

    def _send_file(self, name: str, path: str) -> None:
        if path not in self.server.repositories[name]:
            self._send_error(404, 10010205001, "文件不存在")
            return
        data = self.server.repositories[name][path]
        if len(data) < LFS_THRESHOLD:
            self.send_file(path, data, {"ETag": f'"{git_blob_sha1(data)}"'})
        else:
            self.redirect(path, data, {"X-Linked-Etag": hashlib.sha256(data).hexdigest()})


def git_blob_sha1(data: bytes) -> str:
    """The digest by which git names a file of these bytes."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _make_hf_entry(path: str, data: bytes) -> dict[str, Any]:
    entry = {"type": "file", "oid": git_blob_sha1(data), "size": len(data), "path": path}
    if len(data) < LFS_THRESHOLD:
        return entry
    lfs = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return {**entry, "lfs": lfs, "xetHash": "ab" * 32}


def _make_ms_entry(path: str, data: bytes) -> dict[str, Any]:
    return {
        "CommitMessage": "Upload",
        "CommittedDate": 1700000000,
        "IsLFS": len(data) >= LFS_THRESHOLD,
        "Mode": "33188",
        "Name": path.rpartition("/")[2],
        "Path": path,
        "Revision": "fedcba9876543210fedcba9876543210fedcba98",
        "Sha256": hashlib.sha256(data).hexdigest(),
        "Size": len(data),
        "Type": "blob",
    }


@contextlib.contextmanager
def run_hub_server(
    handler: type[HubHandler], storage_handler: type[HubHandler] = LfsStorageHandler
) -> Iterator[FakeHubServer]:
    """A hub of that kind, and the storage behind it, for as long as the block lasts."""
    storage = FakeHubServer(storage_handler)
    hub = FakeHubServer(handler, storage)
    storage.faults = hub.faults
    threads = [
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        for server in (storage, hub)
    ]
    for thread in threads:
        thread.start()
    try:
        yield hub
    finally:
        for server in (hub, storage):
            server.shutdown()
            server.server_close()
