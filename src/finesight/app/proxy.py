"""Forward requests under `/pages/{job}/` to the page of a job, which listens on a Unix socket.

The studio's sign-in, origin checks and limits so apply to all pages, and one port serves them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx2
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from finesight.app.pages import PREFIX_HEADER

HOP_BY_HOP_HEADERS = frozenset(
    {"connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade", PREFIX_HEADER}
)
"""Headers of one connection, which are not forwarded."""


def make_proxy_route(find_socket: Callable[[str], Path]) -> Route:
    """Build the route of the pages of jobs.

    Args:
        find_socket: Returns the socket of a job by its ID. Raises UserError for an unknown job.
    """

    async def forward(request: Request) -> Response:
        job_id = request.path_params["job"]
        transport = httpx2.AsyncHTTPTransport(uds=str(find_socket(job_id)))
        path, query = f"/{request.path_params['path']}", request.scope["query_string"]
        headers = [pair for pair in request.headers.raw if _is_end_to_end(pair[0])]
        headers.append((PREFIX_HEADER.encode(), f"/pages/{job_id}".encode()))
        upstream = httpx2.Request(
            request.method,
            httpx2.URL(scheme="http", host="page", path=path, query=query),
            headers=headers,
            content=request.stream() if request.method == "POST" else None,
            # The page may think before its answer, and streams answers of any length.
            extensions={"timeout": {"connect": 5.0, "read": None, "write": None, "pool": None}},
        )
        try:
            answer = await transport.handle_async_request(upstream)
        except httpx2.TransportError as error:
            await transport.aclose()
            raise HTTPException(503, "The page is not ready, or has ended.") from error

        async def iterate() -> AsyncIterator[bytes]:
            try:
                async for chunk in answer.aiter_raw():
                    yield chunk
            finally:
                await answer.aclose()
                await transport.aclose()

        response = StreamingResponse(iterate(), answer.status_code)
        response.raw_headers = [pair for pair in answer.headers.raw if _is_end_to_end(pair[0])]
        return response

    return Route("/pages/{job}/{path:path}", forward, methods=["GET", "POST"])


def _is_end_to_end(name: bytes) -> bool:
    return name.decode("latin-1").lower() not in HOP_BY_HOP_HEADERS
