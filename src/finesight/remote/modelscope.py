"""ModelScope's hub, or another one that speaks its protocol (MODELSCOPE_ENDPOINT).

A thin client of our own: the package modelscope reads its token from a pickle, verifies no digest
where a listing has none, needs compiled cryptography, and knows no offline mode; what is needed of
it here are two requests.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlencode

import httpx2

from finesight.errors import UserError
from finesight.remote.address import Address
from finesight.remote.transfer import RemoteFile
from finesight.remote.web import Site, Web, without_query

NEWEST = "master"
PAGE = 200
"""Entries of a data set's listing that are asked for at once; a shorter page is the last."""

CUT = 3000
"""Entries at which the hub cuts the listing of a model, without a word and without further pages.
"""

PAGES = 5000
DENIALS = 3
"""A page after the first may be denied by mistake; it is asked for so often."""


def endpoint() -> str:
    """The address of the hub, without a slash at its end."""
    given = os.environ.get("MODELSCOPE_ENDPOINT") or os.environ.get("MODELSCOPE_DOMAIN") or ""
    address = given.strip() or "https://www.modelscope.cn"
    return (address if "://" in address else f"https://{address}").rstrip("/")


def listing(address: Address) -> tuple[str, list[RemoteFile]]:
    """What stands for the commit, and every file of it. Raises UserError as the hub refuses.

    The hub does not tell the commit of a branch: it is a digest of the names and digests of all
    files, which changes when one of them does.
    """
    with Web(site(address)) as web:
        entries = [entry for entry in _entries(address, web) if entry.get("Type") != "tree"]
    files = [_file(address, entry) for entry in entries]
    total = hashlib.sha256()
    for file in sorted(files, key=lambda file: file.path):
        total.update(f"{file.path}\0{file.size}\0{file.sha256}\n".encode())
    return total.hexdigest()[:40], files


def site(address: Address) -> Site:
    """Who answers requests for the repository: the token goes to the hub alone."""
    token = os.environ.get("MODELSCOPE_API_TOKEN", "").strip()
    if not re.fullmatch(r"[!-~]*", token):
        raise UserError(
            f"{len(token)} characters, some of which no token has",
            where="MODELSCOPE_API_TOKEN",
            expected="a token such as ms-..., of letters, digits and signs without accents",
            remedy=f"copy it again from {endpoint()}/my/myaccesstoken, or unset the variable",
        )
    # Older parts of the hub read the cookie, newer ones the other header.
    headers = {"Authorization": f"Bearer {token}", "Cookie": f"m_session_id={token}"}
    return Site(lambda *answer: _refusal(address, *answer), headers if token else {})


def _entries(address: Address, web: Web) -> Iterator[Mapping[str, Any]]:
    url = f"{_api(address)}/repo/{'tree' if address.kind == 'dataset' else 'files'}"
    params = {"Revision": address.revision or NEWEST, "Recursive": "True"}
    if address.kind == "model":
        entries = _page(address, web, url, params)
        if len(entries) >= CUT:
            raise UserError(
                f"{address} has {CUT} files or more, and the hub lists no more of them",
                where=url,
                expected="a model of fewer files",
                remedy="download it with another program and give its folder",
            )
        yield from entries
        return
    for number in range(1, PAGES + 1):
        asked = {**params, "PageNumber": str(number), "PageSize": str(PAGE)}
        entries = _page(address, web, url, asked, patience=DENIALS if number > 1 else 1)
        yield from entries
        if len(entries) < PAGE:
            return


def _page(
    address: Address, web: Web, url: str, params: Mapping[str, str], patience: int = 1
) -> list[Mapping[str, Any]]:
    try:
        answer = web.json(url, params)
    except UserError:
        if patience == 1:
            raise
        return _page(address, web, url, params, patience - 1)
    data = answer.get("Data") if isinstance(answer, dict) else None
    found = data.get("Files") if isinstance(data, dict) else None
    files = found if isinstance(found, list) else None
    entries: list[Mapping[str, Any]] = (
        [entry for entry in files if isinstance(entry, dict)] if files else []
    )
    if isinstance(answer, dict) and answer.get("Success") is not False and entries == files:
        return entries
    told = answer.get("Message") if isinstance(answer, dict) else answer
    raise UserError(
        f"{address} cannot be listed: {str(told)[:200]}",
        where=url,
        expected="the files of a repository",
        remedy="check the name and the revision (the hub's main branch is called master)",
    )


def _file(address: Address, entry: Mapping[str, Any]) -> RemoteFile:
    path, size, sha256 = entry.get("Path"), entry.get("Size"), entry.get("Sha256")
    if not isinstance(path, str) or not isinstance(size, int):
        raise UserError(
            f"{address} lists a file as {str(dict(entry))[:200]}",
            where=_api(address),
            expected="files with Path and Size",
            remedy="check MODELSCOPE_ENDPOINT",
        )
    query = urlencode({"Revision": address.revision or NEWEST, "FilePath": path})
    return RemoteFile(
        path,
        f"{_api(address)}/repo?{query}",
        size or None,  # 0 is an empty file, or a size that the hub does not know
        sha256=sha256 if isinstance(sha256, str) and sha256 else None,
    )


def _api(address: Address) -> str:
    return f"{endpoint()}/api/v1/{address.kind}s/{address.name}"


def _refusal(address: Address, response: httpx2.Response, said: str) -> UserError:
    page = f"{endpoint()}/{address.kind}s/{address.name}"
    status = response.status_code
    if status in (401, 403):
        return UserError(
            f"{address} is private or gated, or its owner asks to accept a licence first"
            f" (status {status})",
            where=page,
            expected="a token (MODELSCOPE_API_TOKEN) of an account that may read it",
            remedy=f"log in and ask for access at {page}, make a token at"
            f" {endpoint()}/my/myaccesstoken, then: export MODELSCOPE_API_TOKEN=ms-...",
        )
    if status == 404:
        return UserError(
            f"the hub has no {address}, no such revision, or it is private (status 404)",
            where=page,
            expected="a public repository, or a token (MODELSCOPE_API_TOKEN) that may read it",
            remedy="check the name (its main branch is called master); a data set is not a model"
            " and the other way round",
        )
    return UserError(
        f"the hub refuses {address} with status {status}: {said[:200]!r}",
        where=without_query(str(response.request.url)),
        expected="the file",
        remedy="try again later, or download it elsewhere and give its folder",
    )
