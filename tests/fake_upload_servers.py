"""The hubs of hub_servers, taking files too: repositories are made, large files put elsewhere.

Hugging Face's: POST /api/repos/create, /api/validate-yaml, /api/models/NAME/preupload/REV,
/NAME.git/info/lfs/objects/batch and /api/models/NAME/commit/REV (a line of JSON each).
ModelScope's: GET /api/v1/models/NAME, POST /api/v1/models,
/api/v1/repos/models/NAME/info/lfs/objects/batch and /api/v1/repos/models/NAME/commit/master.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from typing import Any
from urllib.parse import urlsplit

from fake_hub_servers import (
    COMMIT,
    LFS_THRESHOLD,
    TOKEN,
    HuggingFaceHandler,
    LfsStorageHandler,
    ModelScopeHandler,
    RecordedRequest,
)


class UploadStorageHandler(LfsStorageHandler):
    """Where large files are put, by their digest; nothing else is taken, and no token."""

    def do_PUT(self) -> None:
        path = urlsplit(self.path).path
        self.server.requests.append(RecordedRequest(self.path, self.headers))
        data = self.rfile.read(int(self.headers["Content-Length"]))
        statuses = self.server.faults.statuses.get("PUT")
        if "Authorization" in self.headers or "Cookie" in self.headers:
            self.send(400, b"Only one auth mechanism allowed")
        elif statuses:
            self.send(statuses.pop(0), b"later")
        elif hashlib.sha256(data).hexdigest() != path.strip("/"):
            self.send(400, b"BadDigest")
        else:
            self.server.blobs[path.strip("/")] = ("", data)
            self.send(200)


class _UploadMixin:
    """What both have in common; `private` repositories are in `gated`."""

    server: Any
    rfile: Any
    headers: Any

    def read_body(self) -> bytes:
        """The body of the request."""
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def upload_action(self, sha256: str) -> dict[str, Any]:
        """Where an object is to be put, as both hubs say it; nothing for one that is there."""
        if sha256 in self.server.storage.blobs:
            return {}
        url = f"{self.server.storage.url}/{sha256}?Signature=x"
        return {"actions": {"upload": {"href": url, "header": {}}}}

    def read_stored(self, sha256: str) -> bytes:
        """A large file that was put before it is committed."""
        return self.server.storage.blobs[sha256][1]


class UploadHuggingFaceHandler(_UploadMixin, HuggingFaceHandler):
    """Hugging Face's hub."""

    def do_POST(self) -> None:
        self.server.requests.append(RecordedRequest(self.path, self.headers))
        path, body = urlsplit(self.path).path, self.read_body()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.send_json({"error": "no"}, 401, {"X-Error-Message": "no right to write"})
            return
        statuses = self.server.faults.statuses.get(path)
        found = re.match(r"/api/models/([^/]+/[^/]+)/commit/", path)
        if statuses:
            self.send_json({"error": "later"}, statuses.pop(0))
        elif path == "/api/repos/create":
            self._create_repository(json.loads(body))
        elif path == "/api/validate-yaml":
            self.send_json({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["size"] >= LFS_THRESHOLD else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self.send_json({"files": modes})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            placed = [{**one, **self.upload_action(one["oid"])} for one in objects]
            self.send_json({"transfer": "basic", "objects": placed})
        elif found:
            self._commit(f"models/{found[1]}", [json.loads(line) for line in body.splitlines()])
        else:
            self.send(404)

    def respond(self, path: str, query: dict[str, list[str]]) -> None:
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)", path)
        if not found:
            super().respond(path, query)
        elif self._check_revision(f"models/{found[1]}", "main"):
            private = f"models/{found[1]}" in self.server.gated
            self.send_json({"id": found[1], "sha": COMMIT, "private": private, "siblings": []})

    def _create_repository(self, body: dict[str, Any]) -> None:
        name = f"models/{body['organization']}/{body['name']}"
        self.server.repositories[name] = {}
        if body.get("visibility") == "private":
            self.server.gated.add(name)
        self.send_json({"url": f"{self.server.url}/{body['organization']}/{body['name']}"})

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        files = self.server.repositories[name]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.read_stored(value["oid"])
        page = f"{self.server.url}/{name.removeprefix('models/')}"
        self.send_json({"commitUrl": f"{page}/commit/{COMMIT}", "commitOid": COMMIT})


class UploadModelScopeHandler(_UploadMixin, ModelScopeHandler):
    """ModelScope's hub."""

    def do_POST(self) -> None:
        self.server.requests.append(RecordedRequest(self.path, self.headers))
        path, body = urlsplit(self.path).path, json.loads(self.read_body())
        found = re.fullmatch(r"/api/v1/repos/(models/[^/]+/[^/]+)/(info|commit)/.+", path)
        if not self._is_authorized():
            self._send_error(403, 10030000001, "无权限")
        elif path == "/api/v1/models":
            name = f"models/{body['Path']}/{body['Name']}"
            self.server.repositories[name] = {}
            if body["Visibility"] == 1:
                self.server.gated.add(name)
            self._send_data({"Name": body["Name"]})
        elif found and found[2] == "info":
            placed = [{**one, **self.upload_action(one["oid"])} for one in body["objects"]]
            self._send_data({"objects": placed})
        elif found:
            files = self.server.repositories[found[1]]
            for action in body["actions"]:
                lfs = action["type"] == "lfs"
                content = base64.b64decode(action["content"])
                files[action["path"]] = self.read_stored(action["sha256"]) if lfs else content
            self._send_data({"Oid": COMMIT})
        else:
            self._send_error(404, 404, "no such endpoint")

    def respond(self, path: str, query: dict[str, list[str]]) -> None:
        found = re.fullmatch(r"/api/v1/(models/[^/]+/[^/]+)", path)
        if not found:
            super().respond(path, query)
        elif found[1] not in self.server.repositories:
            self._send_error(404, 10010205001, "模型不存在")
        else:
            self._send_data({"Visibility": 1 if found[1] in self.server.gated else 5})

    def _send_data(self, data: object) -> None:
        self.send_json({"Code": 200, "Data": data, "Message": "success", "Success": True})
