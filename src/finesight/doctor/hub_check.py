"""Check the connection to a model hub, with and without the proxy and the token.

This is the only check of `finesight doctor` that sends requests, and only to the selected hub.
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
from finesight.doctor.diagnosis import Diagnosis, format_command, make_error, make_ok, make_warning
from finesight.doctor.environment_check import PROXY_VARIABLES
from finesight.hub.url_policy import is_offline

HubService = Literal["huggingface", "modelscope"]

TIMEOUT_S = 10.0
"""Timeout of each request to the hub in seconds."""


@dataclass(frozen=True, slots=True)
class HubResponse:
    """HTTP status of a response of the hub, or the error if there is none."""

    status: int | None
    error: str = ""

    @property
    def is_ok(self) -> bool:
        """True if the hub responded without an error. Status 404 is no error."""
        return self.status is not None and (self.status < 400 or self.status == 404)


@dataclass(frozen=True, slots=True)
class HubReachability:
    """Results of the test requests to a hub.

    Attributes:
        url: Address of the hub.
        response: Response with the proxies of the environment, if any.
        direct_response: Response without proxies. None if no request without proxies was sent.
        token_response: Response to a request with the token. None if there is no token.
        token_source: Environment variable or file that contains the token.
        proxy_variables: Environment variables that set a proxy.
        hub: Name of the hub.
        endpoint_variable: Environment variable that sets the address. Empty for the default
            address.
    """

    url: str
    response: HubResponse
    direct_response: HubResponse | None
    token_response: HubResponse | None
    token_source: str
    proxy_variables: tuple[str, ...]
    hub: HubService = "huggingface"
    endpoint_variable: str = ""


def probe_hub(hub: HubService, environment: Mapping[str, str]) -> HubReachability | None:
    """Send up to three test requests to a hub. Returns None in offline mode."""
    if is_offline():
        return None
    url, probe_url, token, token_source = (
        _huggingface_probe() if hub == "huggingface" else _modelscope_probe()
    )
    proxy_variables = tuple(variable for variable in PROXY_VARIABLES if environment.get(variable))
    hub_response = _send_request(probe_url, {}, use_proxies=True)
    direct_response = (
        _send_request(probe_url, {}, use_proxies=False)
        if proxy_variables and not hub_response.is_ok
        else None
    )
    token_response = None
    if token and hub == "huggingface" and (hub_response.is_ok or hub_response.status in (401, 403)):
        # ModelScope has no address that validates a token.
        token_response = _send_request(
            f"{url}/api/whoami-v2", {"Authorization": f"Bearer {token}"}, use_proxies=True
        )
    variable = "HF_ENDPOINT" if hub == "huggingface" else "MODELSCOPE_ENDPOINT"
    endpoint_variable = variable if environment.get(variable) else ""
    return HubReachability(
        url,
        hub_response,
        direct_response,
        token_response,
        token_source,
        proxy_variables,
        hub,
        endpoint_variable,
    )


def _huggingface_probe() -> tuple[str, str, str | None, str]:
    from huggingface_hub import constants, get_token

    names = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
    token_source = next((name for name in names if os.environ.get(name)), constants.HF_TOKEN_PATH)
    url = constants.ENDPOINT.rstrip("/")
    return url, f"{url}/api/models?limit=1", get_token(), token_source


def _modelscope_probe() -> tuple[str, str, str | None, str]:
    from finesight.hub.modelscope import get_endpoint

    return get_endpoint(), f"{get_endpoint()}/api/v1/models", None, ""


def _send_request(url: str, headers: Mapping[str, str], *, use_proxies: bool) -> HubResponse:
    """Send one GET request. A redirect counts as a response and is not followed.

    Args:
        url: Address of the request.
        headers: Headers of the request.
        use_proxies: Whether to use the proxies of the environment.
    """
    request_headers = {"User-Agent": f"finesight/{__version__}", **headers}
    try:
        with (
            httpx2.Client(timeout=TIMEOUT_S, trust_env=use_proxies) as client,
            client.stream("GET", url, headers=request_headers) as response,
        ):
            return HubResponse(response.status_code)
    except (httpx2.HTTPError, httpx2.InvalidURL, ValueError, ImportError, OSError) as error:
        return HubResponse(None, f"{type(error).__name__}: {str(error).strip()[:200]}")


def check_hub(reachability: HubReachability | None) -> list[Diagnosis]:
    """Diagnose the connection to a hub from the responses to the test requests.

    Args:
        reachability: Result of `probe_hub`. None in offline mode.
    """
    if reachability is None:
        return [
            make_warning(
                "hub-offline",
                "no request was sent: HF_HUB_OFFLINE is set",
                why="only cached files are used",
                remedy="unset HF_HUB_OFFLINE",
            )
        ]
    if reachability.response.is_ok or (
        reachability.response.status == 401 and not reachability.proxy_variables
    ):
        return [make_ok("hub", f"{reachability.url} responds"), *_check_token(reachability)]
    if reachability.direct_response is not None and reachability.direct_response.is_ok:
        host = urlsplit(reachability.url).hostname or reachability.url
        return [
            make_error(
                "proxy-rejects",
                f"the proxy in {', '.join(reachability.proxy_variables)} blocks {host}:"
                f" {_describe_response(reachability.response)}",
                why="the hub responds without the proxy",
                remedy=f'export no_proxy="{host}${{no_proxy:+,$no_proxy}}"',
            )
        ]
    return [_diagnose_unreachable(reachability)]


def _describe_response(response: HubResponse) -> str:
    return response.error or f"status {response.status}"


def _diagnose_unreachable(reachability: HubReachability) -> Diagnosis:
    description = _describe_response(reachability.response)
    host = urlsplit(reachability.url).hostname or reachability.url
    if reachability.response.status == 407:
        return make_error(
            "proxy-authentication",
            f"the proxy in {', '.join(reachability.proxy_variables)} requires a username"
            " and password",
            why="downloads fail",
            remedy=f"export {reachability.proxy_variables[0]}=http://USER:PASSWORD@HOST:PORT",
        )
    if reachability.response.status is not None and reachability.response.status >= 500:
        return make_warning(
            "hub-down",
            f"{reachability.url} responds with {description}",
            why="temporary failure of the hub or its mirror",
            remedy=f"finesight doctor --hub {reachability.hub}   # try again later",
        )
    if reachability.endpoint_variable:
        remedy = f"unset {reachability.endpoint_variable}"
    else:
        other = "modelscope" if reachability.hub == "huggingface" else "huggingface"
        remedy = (
            "export https_proxy=http://HOST:PORT   # if the network has a"
            f" proxy\nfinesight doctor --hub {other}   # test the other hub"
        )
    variable_note = f" ({reachability.endpoint_variable})" if reachability.endpoint_variable else ""
    return make_error(
        "hub-unreachable",
        f"{reachability.url}{variable_note} does not respond: {description}",
        why=f"downloads from {host} fail; download on another machine and use the folder",
        remedy=remedy,
    )


def _logout_command() -> str:
    """Return the shell command that deletes the stored token of Hugging Face.

    It uses the `hf` program of the current Python environment if it exists.
    """
    hf_program = Path(sys.executable).with_name("hf")
    return format_command(str(hf_program) if hf_program.exists() else "hf", "auth", "logout")


def _check_token(reachability: HubReachability) -> list[Diagnosis]:
    token_response = reachability.token_response
    if token_response is None:
        return []
    if token_response.status in (401, 403):
        is_stored = os.sep in reachability.token_source
        return [
            make_error(
                "token-rejected",
                f"the hub rejects the token from {reachability.token_source}:"
                f" {_describe_response(token_response)}",
                why="the token was revoked or truncated; requests for public models fail with"
                " it, too",
                remedy=_logout_command() if is_stored else f"unset {reachability.token_source}",
            )
        ]
    return [make_ok("token", f"the hub accepts the token from {reachability.token_source}")]
