"""Variables of the environment that break something: proxies, tokens, addresses, certificates."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from finesight.doctor.findings import Finding, fault, fine, hint
from finesight.doctor.packages import Packages

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
ENDPOINTS = ("HF_ENDPOINT", "MODELSCOPE_ENDPOINT")
TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "MODELSCOPE_API_TOKEN")
CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
SCHEMES = ("http", "https", "socks5", "socks5h")
"""Ways to speak to a proxy."""


def judge(environment: Mapping[str, str], packages: Packages) -> list[Finding]:
    """What is wrong with the variables. Values that may be secret are never shown."""
    found = [
        *_proxies(environment, packages),
        *_endpoints(environment),
        *_tokens(environment),
        *_certificates(environment),
        *_offline(environment),
    ]
    return found or [
        fine("environment", "proxies, tokens, addresses and certificates: well-formed")
    ]


def _proxies(environment: Mapping[str, str], packages: Packages) -> Iterator[Finding]:
    for name in PROXIES:
        value = environment.get(name, "")
        if not value:
            continue
        scheme = value.partition("://")[0].lower() if "://" in value else ""
        if scheme not in SCHEMES or not _host(value):
            shown = f"{scheme or 'no'} scheme, host {_host(value) or 'none'}"
            yield fault(
                "proxy-malformed",
                f"{name} is no address of a proxy: {shown}",
                why=f"nothing can be fetched; it has to be {' or '.join(SCHEMES)}://HOST:PORT",
                remedy=_proxy_mended(name, value),
            )
        elif scheme.startswith("socks") and importlib.util.find_spec("socksio") is None:
            yield fault(
                "proxy-socks",
                f"{name} is a SOCKS proxy, and the package socksio is not installed",
                why="nothing can be fetched through it",
                remedy=packages.install("socksio"),
            )


def _host(value: str) -> str:
    """The host and port of an address, without what may be secret; empty where it has none."""
    try:
        parts = urlsplit(value if "://" in value else f"//{value}")
        return f"{parts.hostname}:{parts.port}" if parts.port else parts.hostname or ""
    except ValueError:
        return ""


def _proxy_mended(name: str, value: str) -> str:
    plain = re.fullmatch(r"[A-Za-z0-9.-]+(:\d+)?/?", value)
    return f"export {name}=http://{value}" if plain else f"unset {name}"


def _endpoints(environment: Mapping[str, str]) -> Iterator[Finding]:
    for name in ENDPOINTS:
        value = environment.get(name, "")
        # finesight adds the scheme to ModelScope's; huggingface_hub takes its own as it is.
        scheme = name == "MODELSCOPE_ENDPOINT" or re.match(r"https?://[^/\s]", value)
        if value and not (scheme and _host(value)):
            yield fault(
                "endpoint-malformed",
                f"{name} is {value[:80]!r}",
                why="no address of a hub: it has to be https://HOST",
                remedy=f"unset {name}",
            )


def _tokens(environment: Mapping[str, str]) -> Iterator[Finding]:
    for name in TOKENS:
        value = environment.get(name, "")
        if value and not re.fullmatch(r"[!-~]+", value.strip()):
            problem = "has characters that no token has"
        elif value != value.strip() or re.search(r"^['\"]|['\"]$|^Bearer", value):
            problem = "has spaces, quotes or the word Bearer around the token"
        elif name != TOKENS[-1] and value and not value.startswith("hf_"):
            problem = "does not begin with hf_"
        else:
            continue
        yield fault(
            "token-malformed",
            f"{name} {problem}",
            why="the hub refuses every request that comes with it, of public models, too",
            remedy=f"unset {name}",
        )


def _certificates(environment: Mapping[str, str]) -> Iterator[Finding]:
    for name in CERTIFICATES:
        value = environment.get(name, "")
        if value and not Path(os.path.expanduser(value)).exists():
            yield fault(
                "certificates-missing",
                f"{name} is {value}, which does not exist",
                why="no connection to a hub can be verified",
                remedy=f"unset {name}",
            )


def _offline(environment: Mapping[str, str]) -> Iterator[Finding]:
    if environment.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        yield hint(
            "offline",
            "HF_HUB_OFFLINE is set",
            why="nothing is fetched: what was not downloaded before cannot be had",
            remedy="unset HF_HUB_OFFLINE",
        )
