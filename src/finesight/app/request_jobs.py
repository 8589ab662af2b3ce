"""Blocking work of requests of a page, which ends when the client disconnects."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from anyio import CapacityLimiter, create_task_group, to_thread
from starlette.requests import ClientDisconnect, Request

from finesight.files.worker_pool import CURRENT_CANCELLATION, JobCancellation

T = TypeVar("T")


class RequestJobs:
    """Blocking functions of requests, of which a limited number runs at a time.

    Each kind of work has its own limit, so that cheap requests never wait for slow images.

    Args:
        limit: Maximum number of threads. Further requests wait.
    """

    def __init__(self, limit: int) -> None:
        self._limiter = CapacityLimiter(limit)

    async def run(self, request: Request, function: Callable[[], T]) -> T:
        """Run a function in a thread, and return its result.

        If the client disconnects or the task is cancelled, a waiting function is not started, and
        the worker processes of a running one are killed, which ends its thread. The body of the
        request must have been read.

        Raises:
            ClientDisconnect: The client disconnected.
        """
        cancellation = JobCancellation()
        token = CURRENT_CANCELLATION.set(cancellation)
        try:
            return await run_until_disconnect(
                request,
                lambda: to_thread.run_sync(function, limiter=self._limiter),
                on_disconnect=cancellation.cancel,
            )
        except asyncio.CancelledError:
            # A sign-out cancels the task, but not the thread, which waits for its workers.
            cancellation.cancel()
            raise
        finally:
            CURRENT_CANCELLATION.reset(token)


async def run_until_disconnect(
    request: Request,
    function: Callable[[], Awaitable[T]],
    *,
    on_disconnect: Callable[[], None] = lambda: None,
    body_read: asyncio.Event | None = None,
) -> T:
    """Await the result of a function, or cancel it when the client disconnects.

    Args:
        on_disconnect: Called before the function is cancelled.
        body_read: Event after which nobody else receives messages of the request.

    Raises:
        ClientDisconnect: The client disconnected.
        HTTPException: The rest of the request is too slow or too large.
    """
    results: list[T] = []
    errors: list[Exception] = []
    async with create_task_group() as group:

        async def watch() -> None:
            if body_read is not None:
                await body_read.wait()
            try:
                while (await request.receive())["type"] != "http.disconnect":
                    pass
                errors.append(ClientDisconnect())
            except Exception as error:  # A task group would wrap it in a group of exceptions.
                errors.append(error)
            on_disconnect()
            group.cancel_scope.cancel()

        group.start_soon(watch)
        try:
            results.append(await function())
        except Exception as error:
            errors.append(error)
        group.cancel_scope.cancel()
    if results:  # also if the client disconnected meanwhile
        return results[0]
    raise errors[0]
