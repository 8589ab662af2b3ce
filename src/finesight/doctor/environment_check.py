"""Check environment variables for proxies, tokens, hub addresses and certificates."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from finesight.doctor.diagnosis import Diagnosis, make_error, make_ok, make_warning
from finesight.doctor.package_check import InstalledPackages

PROXY_VARIABLES = (
    "http_proxy",
    "https_proxy",
    "all_proxy",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "ALL_PROXY",
)
ENDPOINT_VARIABLES = ("HF_ENDPOINT", "MODELSCOPE_ENDPOINT")
TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "MODELSCOPE_API_TOKEN")
CERTIFICATE_VARIABLES = ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
PROXY_SCHEMES = ("http", "https", "socks5", "socks5h")
"""URL schemes of supported proxies."""


def check_environment(
    environment: Mapping[str, str], packages: InstalledPackages
) -> list[Diagnosis]:
    """Check the environment variables. Diagnoses never contain secret values."""
    diagnoses = [
        *_check_proxies(environment, packages),
        *_check_endpoints(environment),
        *_check_tokens(environment),
        *_check_certificates(environment),
        *_check_offline(environment),
    ]
    return diagnoses or [
        make_ok("environment", "proxies, tokens, addresses and certificates are well-formed")
    ]


def _check_proxies(
    environment: Mapping[str, str], packages: InstalledPackages
) -> Iterator[Diagnosis]:
    for name in PROXY_VARIABLES:
        value = environment.get(name, "")
        if not value:
            continue
        scheme = value.partition("://")[0].lower() if "://" in value else ""
        if scheme not in PROXY_SCHEMES or not _get_host(value):
            description = f"{scheme or 'no'} scheme, host {_get_host(value) or 'none'}"
            yield make_error(
                "proxy-malformed",
                f"{name} is not a proxy address: {description}",
                why=f"downloads fail; expected {' or '.join(PROXY_SCHEMES)}://HOST:PORT",
                remedy=_fix_proxy_command(name, value),
            )
        elif scheme.startswith("socks") and importlib.util.find_spec("socksio") is None:
            yield make_error(
                "proxy-socks",
                f"{name} is a SOCKS proxy, but the package socksio is not installed",
                why="downloads through this proxy fail",
                remedy=packages.install_command("socksio"),
            )


def _get_host(value: str) -> str:
    """Return the host and port of an address without its credentials.

    Returns an empty string if the address has no host.
    """
    try:
        parts = urlsplit(value if "://" in value else f"//{value}")
        return f"{parts.hostname}:{parts.port}" if parts.port else parts.hostname or ""
    except ValueError:
        return ""


def _fix_proxy_command(name: str, value: str) -> str:
    host_match = re.fullmatch(r"[A-Za-z0-9.-]+(:\d+)?/?", value)
    return f"export {name}=http://{value}" if host_match else f"unset {name}"


def _check_endpoints(environment: Mapping[str, str]) -> Iterator[Diagnosis]:
    for name in ENDPOINT_VARIABLES:
        value = environment.get(name, "")
        # finesight adds the scheme for ModelScope; huggingface_hub uses its variable unchanged.
        has_scheme = name == "MODELSCOPE_ENDPOINT" or re.match(r"https?://[^/\s]", value)
        if value and not (has_scheme and _get_host(value)):
            yield make_error(
                "endpoint-malformed",
                f"{name} is {value[:80]!r}",
                why="not a hub address; expected https://HOST",
                remedy=f"unset {name}",
            )


def _check_tokens(environment: Mapping[str, str]) -> Iterator[Diagnosis]:
    for name in TOKEN_VARIABLES:
        value = environment.get(name, "")
        if value and not re.fullmatch(r"[!-~]+", value.strip()):
            problem = "contains characters that are invalid in a token"
        elif value != value.strip() or re.search(r"^['\"]|['\"]$|^Bearer", value):
            problem = "has spaces, quotes or the word Bearer around the token"
        elif name != TOKEN_VARIABLES[-1] and value and not value.startswith("hf_"):
            problem = "does not start with hf_"
        else:
            continue
        yield make_error(
            "token-malformed",
            f"{name} {problem}",
            why="the hub rejects every request with this token, including public models",
            remedy=f"unset {name}",
        )


def _check_certificates(environment: Mapping[str, str]) -> Iterator[Diagnosis]:
    for name in CERTIFICATE_VARIABLES:
        value = environment.get(name, "")
        if value and not Path(os.path.expanduser(value)).exists():
            yield make_error(
                "certificates-missing",
                f"{name} is {value}, which does not exist",
                why="connections to a hub cannot be verified",
                remedy=f"unset {name}",
            )


def _check_offline(environment: Mapping[str, str]) -> Iterator[Diagnosis]:
    if environment.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        yield make_warning(
            "offline",
            "HF_HUB_OFFLINE is set",
            why="downloads are disabled; only cached files are available",
            remedy="unset HF_HUB_OFFLINE",
        )
