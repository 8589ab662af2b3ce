"""Whether a hub answers: through the proxy of the environment, without it, and with the token.

The one part of `doctor` that sends requests, and only to the hub that was named.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import httpx2

from finesight import __version__
from finesight.doctor.environment import PROXIES
from finesight.doctor.findings import Finding, fault, fine, hint, typed
from finesight.remote.web import offline

Hub = Literal["huggingface", "modelscope"]

SECONDS = 10.0
"""How long each answer may take."""


@dataclass(frozen=True, slots=True)
class Answered:
    """The status of an answer, or what there was in its place."""

    status: int | None
    problem: str = ""

    @property
    def well(self) -> bool:
        """Whether the hub itself has answered: for an address that it does not know, too."""
        return self.status is not None and (self.status < 400 or self.status == 404)


@dataclass(frozen=True, slots=True)
class Reached:
    """How a hub answers: as finesight asks it, without the proxies of the environment (None where
    there are none), and with the token (None without one). `proxies` are the variables that are
    set, `given_by` the one that names the hub's address, empty for the usual one."""

    url: str
    plain: Answered
    direct: Answered | None
    tokened: Answered | None
    token_from: str
    proxies: tuple[str, ...]
    hub: Hub = "huggingface"
    given_by: str = ""


def ask(hub: Hub, environment: Mapping[str, str]) -> Reached | None:
    """Ask it up to three times; nothing, and None, where the user wants no request to be sent."""
    if offline():
        return None
    url, page, token, source = _huggingface() if hub == "huggingface" else _modelscope()
    proxies = tuple(name for name in PROXIES if environment.get(name))
    plain = _answer(page, {}, trust=True)
    direct = _answer(page, {}, trust=False) if proxies and not plain.well else None
    known = None
    if token and hub == "huggingface" and (plain.well or plain.status in (401, 403)):
        # Not ModelScope: it has no address that tells whose a token is.
        known = _answer(f"{url}/api/whoami-v2", {"Authorization": f"Bearer {token}"}, trust=True)
    name = "HF_ENDPOINT" if hub == "huggingface" else "MODELSCOPE_ENDPOINT"
    given = name if environment.get(name) else ""
    return Reached(url, plain, direct, known, source, proxies, hub, given)


def _huggingface() -> tuple[str, str, str | None, str]:
    from huggingface_hub import constants, get_token

    names = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
    source = next((name for name in names if os.environ.get(name)), constants.HF_TOKEN_PATH)
    url = constants.ENDPOINT.rstrip("/")
    return url, f"{url}/api/models?limit=1", get_token(), source


def _modelscope() -> tuple[str, str, str | None, str]:
    from finesight.remote.modelscope import endpoint

    return endpoint(), f"{endpoint()}/api/v1/models", None, ""


def _answer(url: str, headers: Mapping[str, str], *, trust: bool) -> Answered:
    """What one GET is answered with; `trust` takes the proxies of the environment. Redirects are
    not followed: that there is one is answer enough."""
    more = {"User-Agent": f"finesight/{__version__}", **headers}
    try:
        with (
            httpx2.Client(timeout=SECONDS, trust_env=trust) as client,
            client.stream("GET", url, headers=more) as response,
        ):
            return Answered(response.status_code)
    except (httpx2.HTTPError, httpx2.InvalidURL, ValueError, ImportError, OSError) as error:
        return Answered(None, f"{type(error).__name__}: {str(error).strip()[:200]}")


def judge(reached: Reached | None) -> list[Finding]:
    """What stands between this machine and the hub."""
    if reached is None:
        return [
            hint(
                "hub-offline",
                "no hub was asked: HF_HUB_OFFLINE is set",
                why="what was downloaded before is used",
                remedy="unset HF_HUB_OFFLINE",
            )
        ]
    if reached.plain.well or (reached.plain.status == 401 and not reached.proxies):
        return [fine("hub", f"{reached.url} answers"), *_token(reached)]
    if reached.direct is not None and reached.direct.well:
        host = urlsplit(reached.url).hostname or reached.url
        return [
            fault(
                "proxy-refuses",
                f"the proxy of {', '.join(reached.proxies)} does not let {host} through:"
                f" {_said(reached.plain)}",
                why="without the proxy the hub answers",
                remedy=f'export no_proxy="{host}${{no_proxy:+,$no_proxy}}"',
            )
        ]
    return [_unreached(reached)]


def _said(answered: Answered) -> str:
    return answered.problem or f"status {answered.status}"


def _unreached(reached: Reached) -> Finding:
    said = _said(reached.plain)
    host = urlsplit(reached.url).hostname or reached.url
    if reached.plain.status == 407:
        return fault(
            "proxy-login",
            f"the proxy of {', '.join(reached.proxies)} wants a name and a password",
            why="nothing can be fetched",
            remedy=f"export {reached.proxies[0]}=http://USER:PASSWORD@HOST:PORT",
        )
    if reached.plain.status is not None and reached.plain.status >= 500:
        return hint(
            "hub-down",
            f"{reached.url} answers with {said}",
            why="the hub, or a mirror of it, has a bad moment",
            remedy=f"finesight doctor --hub {reached.hub}   # again, later",
        )
    if reached.given_by:
        remedy = f"unset {reached.given_by}"
    else:
        other = "modelscope" if reached.hub == "huggingface" else "huggingface"
        remedy = (
            "export https_proxy=http://HOST:PORT   # where the network has a proxy\n"
            f"finesight doctor --hub {other}   # the other hub may answer"
        )
    given = f" ({reached.given_by})" if reached.given_by else ""
    return fault(
        "hub-unreachable",
        f"{reached.url}{given} does not answer: {said}",
        why=f"nothing can be fetched from {host}; download elsewhere and give the folder",
        remedy=remedy,
    )


def _logout() -> str:
    """The hub's own command, of the environment that runs this where it has one."""
    beside = Path(sys.executable).with_name("hf")
    return typed(str(beside) if beside.exists() else "hf", "auth", "logout")


def _token(reached: Reached) -> list[Finding]:
    answer = reached.tokened
    if answer is None:
        return []
    if answer.status in (401, 403):
        stored = os.sep in reached.token_from
        return [
            fault(
                "token-refused",
                f"the hub refuses the token from {reached.token_from}: {_said(answer)}",
                why="it was revoked or cut off; public models are refused with it, too",
                remedy=_logout() if stored else f"unset {reached.token_from}",
            )
        ]
    return [fine("token", f"the token from {reached.token_from} is known to the hub")]
