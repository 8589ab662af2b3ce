"""Send HTTP requests with limits on the bytes and the total time of their responses.

The time limits of httpx2 apply to single reads, which a server may repeat forever.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import httpx2

CONNECT_SECONDS = 15.0
"""Maximum seconds until a connection is established."""


class ResponseLimitError(Exception):
    """Raised with the reason if a response exceeds a limit."""


@dataclass(frozen=True, slots=True)
class BoundedResponse:
    """Complete response of a server. Invalid UTF-8 is replaced in the text."""

    status: int
    headers: Mapping[str, str]
    text: str


def send_request(
    method: str,
    url: str,
    *,
    headers: Mapping[str, str],
    max_bytes: int,
    max_seconds: float,
    json: object = None,
) -> BoundedResponse:
    """Send a request, and return its response. Redirects are not followed.

    Args:
        max_seconds: Maximum seconds until the response is complete.

    Raises:
        ResponseLimitError: The response exceeds a limit, or is compressed.
        httpx2.RequestError: There is no response.
    """

    async def send() -> BoundedResponse:
        timeout = httpx2.Timeout(max_seconds, connect=CONNECT_SECONDS)
        sent_headers = {**headers, "Accept-Encoding": "identity"}
        async with (
            asyncio.timeout(max_seconds),
            httpx2.AsyncClient(timeout=timeout, verify=_create_ssl_context()) as client,
            client.stream(method, url, json=json, headers=sent_headers) as response,
        ):
            content = await read_content(response, max_bytes)
        text = content.decode(errors="replace")
        return BoundedResponse(response.status_code, response.headers, text)

    try:
        return asyncio.run(send())
    except TimeoutError as error:
        reason = f"no complete response within {max_seconds:g} s"
        raise ResponseLimitError(reason) from error


async def read_content(response: httpx2.Response, max_bytes: int) -> bytes:
    """Read the body of a response. Raises ResponseLimitError if it is too large or compressed."""
    encoding = response.headers.get("content-encoding", "identity").lower()
    if encoding != "identity":
        raise ResponseLimitError(f"a response with the content encoding {encoding!r:.40}")
    content = bytearray()
    async for chunk in response.aiter_raw():
        content += chunk
        if len(content) > max_bytes:
            raise ResponseLimitError(f"a response of over {max_bytes} bytes")
    return bytes(content)


@cache
def _create_ssl_context() -> ssl.SSLContext:
    return httpx2.create_ssl_context()
