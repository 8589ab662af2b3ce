"""Hubs that also accept uploads: they create repositories, and redirect large files.

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

from fake_hub_servers import (
    COMMIT,
    LFS_THRESHOLD,
    HubHandler,
    HuggingFaceHandler,
    LfsStorageHandler,
    ModelScopeHandler,
)


class UploadStorageHandler(LfsStorageHandler):
    """Accepts large files by their digest, and no token."""

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


class _UploadHandler(HubHandler):
    """Operations of both hubs; private repositories are in `gated`."""

    def add_upload_actions(self, objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Add the upload URL to each large file that does not exist."""
        assert self.server.storage is not None
        storage = self.server.storage
        return [
            one
            if one["oid"] in storage.blobs
            else {**one, "actions": {"upload": {"href": f"{storage.url}/{one['oid']}?Signature=x"}}}
            for one in objects
        ]

    def create_repository(self, name: str, is_private: bool) -> None:
        self.server.repositories[f"models/{name}"] = {}
        if is_private:
            self.server.gated.add(f"models/{name}")

    def commit_file(self, name: str, path: str, content: str, sha256: str | None) -> None:
        """Add a file to a repository: base64 text, or a large file that was uploaded before."""
        assert self.server.storage is not None
        stored = self.server.storage.blobs[sha256][1] if sha256 else base64.b64decode(content)
        self.server.repositories[name][path] = stored


class UploadHuggingFaceHandler(_UploadHandler, HuggingFaceHandler):
    """Hugging Face's hub."""

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
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["size"] >= LFS_THRESHOLD else "regular",
                    "shouldIgnore": False,
                }
                for file in lines[0]["files"]
            ]
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

    def respond(self, path: str, query: dict[str, list[str]]) -> None:
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)", path)
        if not found:
            super().respond(path, query)
        elif self.check_revision(f"models/{found[1]}", "main"):
            private = f"models/{found[1]}" in self.server.gated
            self.send_json({"id": found[1], "sha": COMMIT, "private": private, "siblings": []})


class UploadModelScopeHandler(_UploadHandler, ModelScopeHandler):
    """ModelScope's hub."""

    def receive(self, path: str, body: bytes) -> None:
        content = json.loads(body)
        found = re.fullmatch(r"/api/v1/repos/(models/[^/]+/[^/]+)/(info|commit)/.+", path)
        if not self.has_token():
            self.send_error_code(403, 10030000001, "无权限")
        elif path == "/api/v1/models":
            self.create_repository(
                f"{content['Path']}/{content['Name']}", content["Visibility"] == 1
            )
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

    def respond(self, path: str, query: dict[str, list[str]]) -> None:
        found = re.fullmatch(r"/api/v1/(models/[^/]+/[^/]+)", path)
        if not found:
            super().respond(path, query)
        elif found[1] not in self.server.repositories:
            self.send_error_code(404, 10010205001, "模型不存在")
        else:
            self.send_data({"Visibility": 1 if found[1] in self.server.gated else 5})
