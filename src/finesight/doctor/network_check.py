"""Check environment variables for hubs and proxies, and the connection to a model hub.

`check_hub` is the only check of `finesight doctor` that sends requests, and only to the selected
hub.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import httpx2

from finesight import __version__
from finesight.doctor.diagnosis import Diagnosis, join_command, make_diagnosis
from finesight.doctor.package_check import install_command
from finesight.hub.download import is_offline

HubService = Literal["huggingface", "modelscope"]

PROXY_VARIABLES = (
    *("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"),
)
ENDPOINT_VARIABLES = {"huggingface": "HF_ENDPOINT", "modelscope": "MODELSCOPE_ENDPOINT"}
HF_TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
CERTIFICATE_VARIABLES = ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
PROXY_SCHEMES = ("http", "https", "socks5", "socks5h")
"""URL schemes of supported proxies."""

TIMEOUT_S = 10.0
"""Timeout of each request to the hub in seconds."""


def check_environment(environment: Mapping[str, str]) -> list[Diagnosis]:
    """Check the environment variables. Diagnoses never contain secret values."""
    diagnoses = [
        diagnosis
        for name, value in environment.items()
        if value and (diagnosis := _check_variable(name, value))
    ]
    return diagnoses or [make_diagnosis("environment")]


def _check_variable(name: str, value: str) -> Diagnosis | None:
    if name in PROXY_VARIABLES:
        scheme = value.partition("://")[0].lower() if "://" in value else ""
        host = _get_host(value)
        if scheme not in PROXY_SCHEMES or not host:
            has_host_only = re.fullmatch(r"[A-Za-z0-9.-]+(:\d+)?/?", value)
            return make_diagnosis(
                "proxy-malformed",
                name=name,
                description=f"{scheme or 'no'} scheme, host {host or 'none'}",
                schemes=" or ".join(PROXY_SCHEMES),
                remedy=f"export {name}=http://{value}" if has_host_only else f"unset {name}",
            )
        if scheme.startswith("socks") and importlib.util.find_spec("socksio") is None:
            return make_diagnosis("proxy-socks", name=name, install=install_command("socksio"))
    elif name in ENDPOINT_VARIABLES.values():
        # finesight adds the scheme for ModelScope; huggingface_hub uses its variable unchanged.
        has_scheme = name == "MODELSCOPE_ENDPOINT" or re.match(r"https?://[^/\s]", value)
        if not (has_scheme and _get_host(value)):
            return make_diagnosis("endpoint-malformed", name=name, value=value[:80])
    elif name in (*HF_TOKEN_VARIABLES, "MODELSCOPE_API_TOKEN"):
        problem = ""
        if not re.fullmatch(r"[!-~]+", value.strip()):
            problem = "contains characters that are invalid in a token"
        elif value != value.strip() or re.search(r"^['\"]|['\"]$|^Bearer", value):
            problem = "has spaces, quotes or the word Bearer around the token"
        elif name in HF_TOKEN_VARIABLES and not value.startswith("hf_"):
            problem = "does not start with hf_"
        return make_diagnosis("token-malformed", name=name, problem=problem) if problem else None
    elif name in CERTIFICATE_VARIABLES and not Path(os.path.expanduser(value)).exists():
        return make_diagnosis("certificates-missing", name=name, value=value)
    elif name == "HF_HUB_OFFLINE" and value.upper() in ("1", "ON", "YES", "TRUE"):
        return make_diagnosis("offline")
    return None


def _get_host(value: str) -> str:
    """Return the host and port of an address without its credentials, empty if it has no host."""
    try:
        parts = urlsplit(value if "://" in value else f"//{value}")
        return f"{parts.hostname}:{parts.port}" if parts.port else parts.hostname or ""
    except ValueError:
        return ""


@dataclass(frozen=True, slots=True)
class HubResponse:
    """HTTP status of a response of the hub, or the error if there is none."""

    status: int | None
    error: str = ""

    @property
    def is_ok(self) -> bool:
        """True if the hub responded without an error. Status 404 is no error."""
        return self.status is not None and (self.status < 400 or self.status == 404)

    def __str__(self) -> str:
        return self.error or f"status {self.status}"


def check_hub(hub: HubService, environment: Mapping[str, str]) -> list[Diagnosis]:
    """Check the connection to a hub with up to three requests, none in offline mode."""
    if is_offline():
        return [make_diagnosis("hub-offline")]
    token = None
    if hub == "huggingface":
        from huggingface_hub import constants, get_token

        url, path, token = constants.ENDPOINT.rstrip("/"), "/api/models?limit=1", get_token()
    else:
        from finesight.hub.modelscope import get_endpoint

        url, path = get_endpoint(), "/api/v1/models"
    proxies = [variable for variable in PROXY_VARIABLES if environment.get(variable)]
    response = _send_request(url + path)
    values = {
        "hub": hub,
        "url": url,
        "host": urlsplit(url).hostname or url,
        "response": response,
        "variables": ", ".join(proxies),
    }
    # ModelScope has no address that validates a token.
    token_diagnoses = [_check_hub_token(url, token)] if token else []
    if response.is_ok or (response.status == 401 and not proxies):
        return [make_diagnosis("hub", **values), *token_diagnoses]
    if proxies and _send_request(url + path, use_proxies=False).is_ok:
        return [make_diagnosis("proxy-rejects", **values)]
    if response.status == 407:
        return [make_diagnosis("proxy-authentication", **values, variable=proxies[0])]
    if response.status is not None and response.status >= 500:
        return [make_diagnosis("hub-down", **values)]
    variable = ENDPOINT_VARIABLES[hub] if environment.get(ENDPOINT_VARIABLES[hub]) else ""
    other = "modelscope" if hub == "huggingface" else "huggingface"
    remedy = (
        "export https_proxy=http://HOST:PORT   # if the network has a proxy\n"
        f"finesight doctor --hub {other}   # test the other hub"
    )
    values["variable_note"] = f" ({variable})" if variable else ""
    remedy = f"unset {variable}" if variable else remedy
    return [make_diagnosis("hub-unreachable", **values, remedy=remedy)]


def _check_hub_token(url: str, token: str) -> Diagnosis:
    """Validate a token of Hugging Face."""
    from huggingface_hub import constants

    variables = (name for name in HF_TOKEN_VARIABLES if os.environ.get(name))
    source = next(variables, constants.HF_TOKEN_PATH)
    response = _send_request(f"{url}/api/whoami-v2", token=token)
    if response.status not in (401, 403):
        return make_diagnosis("token", source=source)
    remedy = f"unset {source}"
    if source not in HF_TOKEN_VARIABLES:
        hf_program = Path(sys.executable).with_name("hf")
        program = str(hf_program) if hf_program.exists() else "hf"
        remedy = join_command(program, "auth", "logout")
    return make_diagnosis("token-rejected", source=source, response=response, remedy=remedy)


def _send_request(url: str, *, token: str = "", use_proxies: bool = True) -> HubResponse:
    """Send one GET request. A redirect counts as a response and is not followed."""
    headers = {"User-Agent": f"finesight/{__version__}"}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    try:
        with (
            httpx2.Client(timeout=TIMEOUT_S, trust_env=use_proxies) as client,
            client.stream("GET", url, headers=headers) as response,
        ):
            return HubResponse(response.status_code)
    except (httpx2.HTTPError, httpx2.InvalidURL, ValueError, ImportError, OSError) as error:
        return HubResponse(None, f"{type(error).__name__}: {str(error).strip()[:200]}")
