"""Servers on this machine: of the hubs' protocols, which fail as networks do, and of others.

Hugging Face's: /api/models/NAME/revision/REV, /api/models/NAME/tree/REV in pages joined by Link
headers, /NAME/resolve/REV/PATH with X-Repo-Commit, and for files in LFS a redirect to another
host with X-Linked-Etag and X-Linked-Size; uploads by /api/repos/create, preupload, LFS batch and
commit. ModelScope's: /api/v1/models/NAME/repo/files in one piece, /api/v1/datasets/NAME/repo/tree
in pages, /api/v1/.../repo?FilePath=; uploads by /api/v1/models, LFS batch and commit.
"""

import base64
import contextlib
import hashlib
import json
import re
import ssl
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "secret-token"
LFS_THRESHOLD = 1000
"""Bytes from which a file is in LFS: elsewhere, with a SHA-256."""


@dataclass(slots=True)
class HubFaults:
    """Injected server faults by path.

    `cuts` are byte counts after which responses end, and `stalls` byte counts after which the next
    response waits for `resume_event`. `redirect_url` replaces the storage host.
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


class RecordedRequest(NamedTuple):
    """One request."""

    path: str
    headers: Message
    range: str | None
    token: str | None


class FakeHubServer(ThreadingHTTPServer):
    """A server and the one for large files; `repositories` by datasets/NAME or models/NAME."""

    daemon_threads = True

    def __init__(
        self,
        handler: "type[HubHandler]",
        storage: "FakeHubServer | None" = None,
        address: tuple[str, int] = ("127.0.0.1", 0),
        certificate: tuple[Path, Path] | None = None,
    ) -> None:
        super().__init__(address, handler)
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*certificate)
            self.socket = context.wrap_socket(self.socket, server_side=True)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.faults = HubFaults() if storage is None else storage.faults
        self.requests: list[RecordedRequest] = []
        self.lfs_requests = [] if storage is None else storage.requests
        self.page = 1000
        self.storage = storage
        self.blobs: dict[str, tuple[str, bytes]] = {}
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print nothing: the client may have been killed."""


class HubHandler(BaseHTTPRequestHandler):
    """Requests of both hubs and of their storage of large files."""

    server: FakeHubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: Any) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        """Record the request, and respond by its method."""
        range_and_token = (self.headers.get(name) for name in ("Range", "Authorization"))
        self.server.requests.append(RecordedRequest(self.path, self.headers, *range_and_token))
        url = urlsplit(self.path)
        if self.command in ("GET", "HEAD"):
            self.respond(url.path, parse_qs(url.query))
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.receive(url.path, body)

    do_HEAD = do_POST = do_PUT = do_GET

    def respond(self, path: str, query: dict[str, list[str]]) -> None:
        raise NotImplementedError

    def receive(self, path: str, body: bytes) -> None:
        """Respond to a request with a body, which only hubs of uploads support."""
        self.send(501)

    def send_head(self, status: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def send(
        self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> None:
        self.send_head(status, {"Content-Length": str(len(body)), **(headers or {})})
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_json(
        self, content: object, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        kind = {"Content-Type": "application/json"}
        self.send(status, json.dumps(content).encode(), {**kind, **(headers or {})})

    def has_token(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def send_file(self, name: str, data: bytes, headers: Mapping[str, str]) -> None:
        """Send a file or the requested range of it, with the faults of its name."""
        faults = self.server.faults
        if faults.statuses.get(name):
            self.send(faults.statuses[name].pop(0), b"later", {"Retry-After": "0"})
            return
        if name in faults.corrupted:
            data = bytes(len(data))
        first, status, more = 0, 200, {"Accept-Ranges": "bytes", **headers}
        byte_range = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        changed = self.headers.get("If-Range") not in (None, headers.get("ETag"))
        if byte_range and not faults.without_ranges and not changed:
            first, status = int(byte_range[1]), 206
            if first >= len(data):
                self.send(416, b"", {"Content-Range": f"bytes */{len(data)}"})
                return
            total = "*" if faults.without_sizes else len(data)
            more["Content-Range"] = f"bytes {first}-{len(data) - 1}/{total}"
        if faults.without_sizes:
            more["Connection"] = "close"
        else:
            more["Content-Length"] = str(len(data) - first)
        self.send_head(status, more)
        if self.command == "GET":
            self._write_with_faults(name, data, first)

    def _write_with_faults(self, name: str, data: bytes, first: int) -> None:
        faults = self.server.faults
        cuts = faults.cuts.get(name)
        end = first + cuts.pop(0) if cuts else len(data)
        if name in faults.stalls:
            first, pause = first + faults.stalls.pop(name), first
            self.wfile.write(data[pause:first])
            self.wfile.flush()
            faults.stalled_event.set()
            faults.resume_event.wait(60)
        with contextlib.suppress(OSError):  # the client may have been killed
            self.wfile.write(data[first:end])
        if end < len(data):
            self.wfile.flush()
            self.close_connection = True

    def redirect(self, name: str, data: bytes, headers: Mapping[str, str]) -> None:
        """Redirect to the storage by digest, signed in the query."""
        assert self.server.storage is not None
        digest = hashlib.sha256(data).hexdigest()
        self.server.storage.blobs[digest] = (name, data)
        base = self.server.faults.redirect_url or f"{self.server.storage.url}/{digest}"
        self.send(302, b"Found", {"Location": f"{base}?Signature=x", **headers})

    def add_upload_actions(self, objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Add the upload URL to each large file that does not exist."""
        assert self.server.storage is not None
        storage = self.server.storage
        for one in objects:
            if one["oid"] not in storage.blobs:
                url = f"{storage.url}/{one['oid']}?Signature=x"
                one["actions"] = {"upload": {"href": url}}
        return objects

    def create_repository(self, name: str, is_private: bool) -> None:
        self.server.repositories[f"models/{name}"] = {}
        if is_private:
            self.server.gated.add(f"models/{name}")

    def commit_file(self, name: str, path: str, content: str, sha256: str | None) -> None:
        """Add a file to a repository: base64 text, or a large file that was uploaded before."""
        assert self.server.storage is not None
        stored = self.server.storage.blobs[sha256][1] if sha256 else base64.b64decode(content)
        self.server.repositories[name][path] = stored


class LfsStorageHandler(HubHandler):
    """Storage of large files by digest; as S3, it rejects tokens, which would be leaked."""

    def respond(self, path: str, query: dict[str, list[str]]) -> None:
        if "Authorization" in self.headers or "Cookie" in self.headers:
            self.send(400, b"Only one auth mechanism allowed")
        else:
            name, data = self.server.blobs[path.strip("/")]
            self.send_file(name, data, {"ETag": f'"{path.strip("/")}"'})

    def receive(self, path: str, body: bytes) -> None:
        statuses = self.server.faults.statuses.get("PUT")
        if "Authorization" in self.headers or "Cookie" in self.headers:
            self.send(400, b"Only one auth mechanism allowed")
        elif statuses:
            self.send(statuses.pop(0), b"later")
        elif hashlib.sha256(body).hexdigest() != path.strip("/"):
            self.send(400, b"BadDigest")
        else:
            self.server.blobs[path.strip("/")] = ("", body)
            self.send(200)


class HuggingFaceHandler(HubHandler):
    """Hugging Face's hub."""

    def respond(self, path: str, query: dict[str, list[str]]) -> None:
        resolve = re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        api = re.fullmatch(
            r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path
        )
        if "Authorization" in self.headers and not self.has_token():
            self.send_error_code(401, None, "Invalid credentials in Authorization header")
        elif resolve:
            kind = (resolve[1] or "models/") + resolve[2]
            self._send_file(kind, unquote(resolve[3]), unquote(resolve[4]))
        elif api:
            name = f"{api[1]}/{api[2]}"
            if self.check_revision(name, unquote(api[4] or "main")):
                self._send_tree(name, query) if api[3] == "tree" else self._send_info(name)
        else:
            self.send(404)

    def receive(self, path: str, body: bytes) -> None:
        statuses = self.server.faults.statuses.get(path)
        commit = re.match(r"/api/models/([^/]+/[^/]+)/commit/", path)
        lines = [json.loads(line) for line in body.splitlines()]
        if not self.has_token():
            self.send_error_code(401, None, "no right to write")
        elif statuses:
            self.send_json({"error": "later"}, statuses.pop(0))
        elif path == "/api/repos/create":
            name = f"{lines[0]['organization']}/{lines[0]['name']}"
            self.create_repository(name, lines[0].get("visibility") == "private")
            self.send_json({"url": f"{self.server.url}/{name}"})
        elif path == "/api/validate-yaml":
            self.send_json({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = [{"path": one["path"], "shouldIgnore": False} for one in lines[0]["files"]]
            for file, one in zip(files, lines[0]["files"], strict=True):
                file["uploadMode"] = "lfs" if one["size"] >= LFS_THRESHOLD else "regular"
            self.send_json({"files": files})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = self.add_upload_actions(lines[0]["objects"])
            self.send_json({"transfer": "basic", "objects": objects})
        elif commit:
            for line in lines:
                value = line["value"]
                if line["key"] in ("file", "lfsFile"):
                    content, sha256 = value.get("content", ""), value.get("oid")
                    self.commit_file(f"models/{commit[1]}", value["path"], content, sha256)
            url = f"{self.server.url}/{commit[1]}/commit/{COMMIT}"
            self.send_json({"commitUrl": url, "commitOid": COMMIT})
        else:
            self.send(404)

    def send_error_code(self, status: int, code: str | None, message: str) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.send_json({"error": message}, status, headers)

    def check_revision(self, name: str, revision: str) -> bool:
        if name not in self.server.repositories:
            # The hub does not tell a private repository from none.
            self.send_error_code(401, "RepoNotFound", "Repository not found")
        elif revision not in ("main", "v1", "refs/pr/4", COMMIT):
            self.send_error_code(404, "RevisionNotFound", "Invalid rev id")
        else:
            return True
        return False

    def _send_info(self, name: str) -> None:
        info = {"_id": "1", "id": name.partition("/")[2], "sha": COMMIT, "siblings": [], "tags": []}
        self.send_json(info | {"private": name in self.server.gated})

    def _send_tree(self, name: str, query: dict[str, list[str]]) -> None:
        entries = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": "data"}]
        entries += [_make_hf_entry(*item) for item in self.server.repositories[name].items()]
        start = int(query.get("cursor", ["0"])[0])
        stop = start + self.server.page
        url = f"{self.server.url}{urlsplit(self.path).path}?recursive=True&cursor={stop}"
        link = {"Link": f'<{url}>; rel="next"'} if stop < len(entries) else None
        self.send_json(entries[start:stop], headers=link)

    def _send_file(self, name: str, revision: str, path: str) -> None:
        if not self.check_revision(name, revision):
            return
        files, headers = self.server.repositories[name], {"X-Repo-Commit": COMMIT}
        if name in self.server.gated and not self.has_token():
            message = f"Access to {name} is restricted. You must be authenticated to access it"
            self.send_error_code(401, "GatedRepo", message)
        elif path not in files:
            self.send(404, b"Entry not found", {"X-Error-Code": "EntryNotFound"})
        elif len(data := files[path]) < LFS_THRESHOLD:
            self.send_file(path, data, {**headers, "ETag": f'"{git_blob_sha1(data)}"'})
        else:
            headers["X-Linked-Size"] = str(len(data))
            headers["X-Linked-Etag"] = f'"{hashlib.sha256(data).hexdigest()}"'
            self.redirect(path, data, headers)


class ModelScopeHandler(HubHandler):
    """ModelScope's hub."""

    def respond(self, path: str, query: dict[str, list[str]]) -> None:
        found = re.fullmatch(
            r"/api/v1/(models|datasets)/([^/]+/[^/]+)(/repo)?(/tree|/files)?", path
        )
        name = f"{found[1]}/{found[2]}" if found else ""
        if not found or query.get("Revision", ["master"])[0] not in ("master", "v1"):
            self.send_error_code(404, 10010205001, "Not found")
        elif name not in self.server.repositories:
            self.send_error_code(404, 10010205001, f"获取数据集信息失败，信息不存在: {name}")
        elif name in self.server.gated and not self.has_token():
            self.send_error_code(403, 10030000001, "无访问权限")
        elif found[3] is None:
            self.send_data({"Visibility": 1 if name in self.server.gated else 5})
        elif found[4] is None:
            self._send_file(name, query["FilePath"][0])
        elif found[4] == ("/tree" if found[1] == "datasets" else "/files"):
            self._send_tree(name, query, paged=found[1] == "datasets")
        else:
            self.send_error_code(404, 404, "no such endpoint")

    def receive(self, path: str, body: bytes) -> None:
        content = json.loads(body)
        found = re.fullmatch(r"/api/v1/repos/(models/[^/]+/[^/]+)/(info|commit)/.+", path)
        if not self.has_token():
            self.send_error_code(403, 10030000001, "无权限")
        elif path == "/api/v1/models":
            name = f"{content['Path']}/{content['Name']}"
            self.create_repository(name, content["Visibility"] == 1)
            self.send_data({"Name": content["Name"]})
        elif found and found[2] == "info":
            self.send_data({"objects": self.add_upload_actions(content["objects"])})
        elif found:
            for action in content["actions"]:
                sha256 = action["sha256"] if action["type"] == "lfs" else None
                self.commit_file(found[1], action["path"], action["content"], sha256)
            self.send_data({"Oid": COMMIT})
        else:
            self.send_error_code(404, 404, "no such endpoint")

    def has_token(self) -> bool:
        return f"m_session_id={TOKEN}" in self.headers.get("Cookie", "") or super().has_token()

    def send_error_code(self, status: int, code: int, message: str) -> None:
        body = {"Code": code, "Message": message, "RequestId": "1", "Success": False}
        self.send_json(body, status)

    def send_data(self, data: object) -> None:
        self.send_json({"Code": 200, "Data": data, "Message": "success", "Success": True})

    def _send_tree(self, name: str, query: dict[str, list[str]], *, paged: bool) -> None:
        entries = [{"Name": "data", "Path": "data", "Size": 0, "Type": "tree", "Sha256": ""}]
        entries += [_make_ms_entry(*item) for item in self.server.repositories[name].items()]
        number = int(query.get("PageNumber", ["1"])[0])
        if paged and self.server.faults.statuses.get(f"page {number}"):
            status = self.server.faults.statuses[f"page {number}"].pop(0)
            self.send_error_code(status, 10030000001, "access denied")
            return
        if paged:
            size = min(self.server.page, int(query.get("PageSize", ["100"])[0]))
            entries = entries[(number - 1) * size : number * size]
        self.send_data({"Files": entries, "LatestCommitter": {"Name": "somebody"}})

    def _send_file(self, name: str, path: str) -> None:
        data = self.server.repositories[name].get(path)
        if data is None:
            self.send_error_code(404, 10010205001, "文件不存在")
        elif len(data) < LFS_THRESHOLD:
            self.send_file(path, data, {"ETag": f'"{git_blob_sha1(data)}"'})
        else:
            self.redirect(path, data, {"X-Linked-Etag": hashlib.sha256(data).hexdigest()})


def git_blob_sha1(data: bytes) -> str:
    """Return the digest by which git names a file of these bytes."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _make_hf_entry(path: str, data: bytes) -> dict[str, Any]:
    entry = {"type": "file", "oid": git_blob_sha1(data), "size": len(data), "path": path}
    lfs = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return entry if len(data) < LFS_THRESHOLD else {**entry, "lfs": lfs, "xetHash": "ab" * 32}


def _make_ms_entry(path: str, data: bytes) -> dict[str, Any]:
    sha256, is_lfs = hashlib.sha256(data).hexdigest(), len(data) >= LFS_THRESHOLD
    entry = {"Name": path.rpartition("/")[2], "Path": path, "Type": "blob", "Mode": "33188"}
    entry |= {"Size": len(data), "Sha256": sha256, "IsLFS": is_lfs}
    return entry | {"CommittedDate": 1700000000, "Revision": COMMIT[::-1]}


@contextlib.contextmanager
def run_hub_server(handler: type[HubHandler]) -> Iterator[FakeHubServer]:
    """Run a hub and its storage of large files within the block."""
    storage = FakeHubServer(LfsStorageHandler)
    hub = FakeHubServer(handler, storage)
    with run_in_thread(storage), run_in_thread(hub):
        yield hub


@contextlib.contextmanager
def run_in_thread(server: FakeHubServer) -> Iterator[FakeHubServer]:
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
