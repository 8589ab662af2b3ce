"""Files to ModelScope's hub, by the requests that its own client makes.

A repository by POST /api/v1/models; large files by the batch request of Git LFS and a PUT each to
where its answer says; all in one commit, small files within it as base64.
"""

from __future__ import annotations

import base64
import itertools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2

from finesight import __version__
from finesight.digests import digest
from finesight.errors import UserError
from finesight.remote.address import Address
from finesight.remote.modelscope import NEWEST, endpoint, site
from finesight.remote.web import CONNECT_SECONDS, LATER, READ_SECONDS, TryAgain, without_query

PRIVATE, PUBLIC = 1, 5
"""The hub's numbers for who may see a repository."""

LARGE = 2**20
"""Bytes above which a file goes to LFS, whatever its name."""

ALWAYS_LARGE = (".safetensors", ".gguf", ".bin", ".model")
"""Endings of files that go there at any size."""

PIECE = 2**20

Files = Sequence[tuple[str, Path]]


def publish(address: Address, files: Files, *, public: bool, message: str) -> str:
    """As `publishing.publish`, for a name on this hub; `files` are names there and paths here."""
    headers = dict(site(address).headers)
    page = f"{endpoint()}/models/{address.name}"
    if not headers:
        raise UserError(
            f"no token for {address}",
            where="MODELSCOPE_API_TOKEN",
            expected="a token of an account that may write",
            remedy=f"make one at {endpoint()}/my/myaccesstoken, then: export"
            " MODELSCOPE_API_TOKEN=ms-...",
        )
    timeout = httpx2.Timeout(READ_SECONDS, connect=CONNECT_SECONDS)
    agent = {"User-Agent": f"finesight/{__version__}"}
    with httpx2.Client(follow_redirects=False, timeout=timeout, headers=agent) as client:
        hub = _Hub(address, client, headers)
        hub.have_repository(public, page)
        hub.commit(files, message)
    return page


def visibility_refused(address: Address, page: str, public: bool) -> UserError:
    """Where there is a repository of that name whose visibility is not the one asked for."""
    is_now = "private" if public else "public"
    return UserError(
        f"there is a repository {address} already, and it is {is_now}",
        where=page,
        expected=f"one that is {'public' if public else 'private'}, or a new name",
        remedy="leave --public out" if public else "give --public if the world may have it",
    )


class _Hub:
    def __init__(self, address: Address, client: httpx2.Client, headers: Mapping[str, str]) -> None:
        self._address, self._client, self._headers = address, client, headers
        self._api = f"{endpoint()}/api/v1"

    def have_repository(self, public: bool, page: str) -> None:
        """Make the repository, or find one that is as visible as asked."""
        url = f"{self._api}/models/{self._address.name}"
        found = self._send("GET", url, missing=True)
        if found is None:
            owner, _, name = self._address.name.partition("/")
            visibility = PUBLIC if public else PRIVATE
            body = {"Path": owner, "Name": name, "Visibility": visibility}
            self._send("POST", f"{self._api}/models", body)
            return
        data = found.get("Data")
        visible = data.get("Visibility") if isinstance(data, dict) else None
        if visible != (PUBLIC if public else PRIVATE):
            raise visibility_refused(self._address, page, public)

    def commit(self, files: Files, message: str) -> None:
        """Bring the large files, then all of them in one commit."""
        large = {
            path: digest(path)
            for name, path in files
            if path.stat().st_size > LARGE or name.endswith(ALWAYS_LARGE)
        }
        repository = f"{self._api}/repos/models/{self._address.name}"
        objects = [{"oid": sha256, "size": path.stat().st_size} for path, sha256 in large.items()]
        if objects:
            url = f"{repository}/info/lfs/objects/batch"
            answer = self._send("POST", url, {"operation": "upload", "objects": objects})
            places = _places(answer or {})
            for path, sha256 in large.items():
                # None for what the hub has already.
                if places.get(sha256) is not None:
                    self._put(str(places[sha256]), path)
        actions = [_action(name, path, large.get(path)) for name, path in files]
        body = {"commit_message": message, "actions": actions}
        self._send("POST", f"{repository}/commit/{NEWEST}", body)

    def _put(self, url: str, path: Path) -> None:
        headers = {"Content-Length": str(path.stat().st_size)}
        if is_of(url, endpoint()):
            headers |= self._headers
        self._answer("PUT", url, headers, path)

    def _send(
        self, method: str, url: str, body: object = None, *, missing: bool = False
    ) -> dict[str, Any] | None:
        content = None if body is None else json.dumps(body).encode()
        headers = {**self._headers, "Content-Type": "application/json"}
        response = self._answer(method, url, headers, content, missing)
        if response is None:
            return None
        try:
            answer = response.json()
        except ValueError:
            answer = None
        told = answer if isinstance(answer, dict) else {}
        if not told or told.get("Success") is False or told.get("Code") not in (200, "200", None):
            raise self._refused(url, response.status_code, str(told.get("Message", "no JSON")))
        return told

    def _answer(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        content: bytes | Path | None,
        missing: bool = False,
    ) -> httpx2.Response | None:
        """The answer, asked again after failures that may pass; None for a 404 that is `missing`.
        What makes a repository or a commit is asked once."""
        once = method == "POST" and not url.endswith("/batch")
        for failures in itertools.count(1):
            try:
                sent = _pieces(content) if isinstance(content, Path) else content
                response = self._client.request(method, url, headers=headers, content=sent)
                status, said = response.status_code, response.text[:200]
            except httpx2.TransportError as error:
                status, said = 0, f"{type(error).__name__}: {error}"
            if status not in (0, *LATER):
                break
            pause = None if once else TryAgain(said).pause(failures)
            if pause is None:
                raise self._refused(url, status, said)
            time.sleep(pause)
        if missing and status == 404:
            return None
        if status >= 300:
            raise self._refused(url, status, said)
        return response

    def _refused(self, url: str, status: int, said: str) -> UserError:
        return UserError(
            f"the hub refuses to write {self._address} (status {status}): {said[:200]}",
            where=without_query(url),
            expected="a token (MODELSCOPE_API_TOKEN) of an account that may write there",
            remedy="check name and token, and start again: the commit is the last step, without it"
            " nothing has changed",
        )


def _places(answer: Mapping[str, Any]) -> dict[str, str | None]:
    """Where each object is to be put, by its digest; None for one that is there."""
    data = answer.get("Data", answer)
    objects = data.get("objects") if isinstance(data, dict) else None
    places: dict[str, str | None] = {}
    for one in objects if isinstance(objects, list) else []:
        upload = (one.get("actions") or {}).get("upload") or {}
        places[str(one.get("oid"))] = upload.get("href")
    return places


def _action(name: str, path: Path, sha256: str | None) -> dict[str, Any]:
    size = path.stat().st_size
    common = {"action": "create", "path": name, "size": size}
    if sha256 is not None:
        return common | {"type": "lfs", "sha256": sha256, "content": "", "encoding": ""}
    content = base64.b64encode(path.read_bytes()).decode()
    return common | {"type": "normal", "sha256": "", "content": content, "encoding": "base64"}


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            yield piece


def is_of(url: str, hub: str) -> bool:
    """Whether an address is the hub's own or within its domain: the token goes nowhere else."""
    asked, own = urlsplit(url), urlsplit(hub)
    host, domain = asked.hostname or "", (own.hostname or "").removeprefix("www.")
    within = not domain.replace(".", "").isdigit() and host.endswith(f".{domain}")
    return asked.scheme == own.scheme and (asked.netloc == own.netloc or within)
