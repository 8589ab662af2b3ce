"""Router of replicas: several model processes behind one port.

A replica is a process with the server of `api_server` on a Unix socket. The router is the process
that listens on the port. It checks API keys, receives bodies within the limits, and forwards them
without parsing. The replicas parse requests and decode images, in their worker processes.

A request goes to the replica whose prefix cache has most of its messages, as in the cache-aware
policy of the SGLang router. Here, a table of body prefixes replaces a radix tree per replica. Other
requests go to the replica with the fewest requests in progress.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import resource
import shutil
import socket
import sys
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from finesight.errors import UserError, format_count
from finesight.serve.api_schema import ApiError, ServerLimits
from finesight.serve.api_server import ENDING_SECONDS, ERROR_HANDLERS, ApiServer
from finesight.serve.chat_completions import (
    SSE_END,
    SSE_EVENT_END,
    format_sse_event,
    stop_at_disconnect,
)
from finesight.serve.http_protocol import build_upstream_request
from finesight.serve.media_sources import FILES_VARIABLE
from finesight.serve.request_middleware import (
    API_KEY_VARIABLE,
    OWNER_HEADER,
    ApiKeys,
    RequestMetrics,
    RequestMiddleware,
    get_reservation,
    read_body,
)
from finesight.storage import temporary_folder

LOGGER = logging.getLogger("finesight.serve")

HEALTH_INTERVAL_S, HEALTH_TIMEOUT_S, METRICS_TIMEOUT_S = 1.0, 60.0, 5.0
MIN_RESTART_DELAY_S, MAX_RESTART_DELAY_S = 1.0, 60.0

MIN_PREFIX_BYTES, PREFIX_GROWTH = 128, 1.2
"""Shortest prefix of messages in the table, and ratio of the lengths of successive prefixes."""

MAX_PREFIXES = 1 << 17
MIN_MATCH = 0.5
"""Minimum fraction of the messages in the prefix cache of a replica that attracts a request.

Below it, the common prefix is often a system prompt, which each replica caches soon.
"""

MAX_LOAD_DIFFERENCE = 8
"""Requests in progress that a replica with the prefix may have more than another one."""

BODY_PIECE_BYTES = 1 << 18
"""Size of the pieces of a forwarded body, of which no second copy is in memory."""

FORWARDED_RESPONSE_HEADERS = {"content-type", "retry-after", "cache-control", "x-accel-buffering"}

NOT_INHERITED = {API_KEY_VARIABLE, "FINESIGHT_OUTCOME", "GOMP_SPINCOUNT"}
"""Environment variables of the router only: API keys, the file of its outcome, its spin count."""

_PROGRAM = """
import os, runpy, signal, threading
def stop():
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGTERM)
threading.Thread(target=stop, daemon=True).start()
runpy.run_module("finesight", run_name="__main__", alter_sys=True)
"""
"""Program of a replica: the command line, and a thread that stops it when the router ends.

The standard input is then closed.
"""


@dataclass(eq=False)
class Replica:
    """Model process with a server on a Unix socket, which restarts after a failure.

    Attributes:
        command: Command line of the process.
        load: Number of requests in progress.
        num_requests: Number of requests so far.
        num_restarts: Number of restarts so far.
        has_started: Set when the model has been loaded once.
    """

    index: int
    command: Sequence[str]
    environment: Mapping[str, str]
    socket_file: Path
    load: int = 0
    num_requests: int = 0
    num_restarts: int = 0
    is_ready: bool = False
    has_started: asyncio.Event = field(default_factory=asyncio.Event)
    process: asyncio.subprocess.Process | None = None

    def __post_init__(self) -> None:
        # Each request has its own connection, so that none is sent on one that the replica closes.
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=0)
        self._transport = httpx2.AsyncHTTPTransport(uds=str(self.socket_file), limits=limits)

    async def run(self) -> None:
        """Run the process, and restart it with increasing delays when it ends.

        Raises UserError if it ends before the model has been loaded once.
        """
        delay_s = MIN_RESTART_DELAY_S
        while True:
            start_time = time.monotonic()
            try:
                code = await self._run_process()
            except OSError:  # no memory for a process, which the restart may find
                code = os.EX_OSERR
            if not self.has_started.is_set():
                raise UserError(
                    f"replica {self.index} ended with exit code {code} before it was ready",
                    where="--data-parallel-size",
                    expected=f"{self.index + 1} or more processes that load the model",
                    remedy="correct the error above",
                )
            if time.monotonic() - start_time > MAX_RESTART_DELAY_S:
                delay_s = MIN_RESTART_DELAY_S
            text = "replica %d ended with exit code %d and restarts in %g s"
            LOGGER.warning(text, self.index, code, delay_s)
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, MAX_RESTART_DELAY_S)
            self.num_restarts += 1

    async def _run_process(self) -> int:
        """Run the process until it ends or the task is canceled, and return the exit code."""
        pipe = asyncio.subprocess.PIPE
        self.process = process = await asyncio.create_subprocess_exec(
            *self.command,
            stdin=pipe,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=pipe,
            env=self.environment,
            start_new_session=True,  # Ctrl-C reaches the router only, which stops the replicas
        )
        assert process.stderr is not None, f"replica {self.index} has no output"
        log = asyncio.create_task(self._log_lines(process.stderr))
        health = asyncio.create_task(self._check_health(process))
        try:
            return await process.wait()
        finally:
            self.is_ready = False
            health.cancel()
            if process.returncode is None:
                process.terminate()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(process.wait(), ENDING_SECONDS)
            self.kill()
            await process.wait()
            await asyncio.wait([log], timeout=ENDING_SECONDS)

    def kill(self) -> None:
        """End the process immediately, if it runs."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()

    async def _log_lines(self, stream: asyncio.StreamReader) -> None:
        while True:
            with contextlib.suppress(ValueError):  # a line beyond the limit of the stream
                line = await stream.readline()
                if not line:
                    return
                text = line.decode("utf-8", "replace").rstrip()
                LOGGER.warning("replica %d: %s", self.index, text)

    async def _check_health(self, process: asyncio.subprocess.Process) -> None:
        """Update `is_ready`, and kill a process that fails after it was ready."""
        was_ready = False
        while True:
            status = ""
            try:
                async with asyncio.timeout(HEALTH_TIMEOUT_S):
                    status = (await self.get("/health")).json().get("status", "")
            except TimeoutError:
                status = "unavailable"
            except httpx2.TransportError:  # it loads the model, or ends after its last answers
                self.is_ready = False
            if status == "ok":
                self.is_ready = was_ready = True
                self.has_started.set()
            elif status == "unavailable" and was_ready:
                process.kill()
                return
            await asyncio.sleep(HEALTH_INTERVAL_S)

    async def get(self, path: str) -> httpx2.Response:
        """Return the response of the replica to a GET request, with its body."""
        answer = await self.send("GET", path.encode(), {})
        try:
            await answer.aread()
        finally:
            await answer.aclose()
        return answer

    async def send(
        self,
        method: str,
        target: bytes,
        headers: Mapping[str, str],
        body: AsyncIterator[bytes] | None = None,
    ) -> httpx2.Response:
        """Send a request, and return the response before its body.

        Raises TransportError, or HTTPException with status 404 for an invalid target.
        """
        pairs = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
        request = build_upstream_request(method, target, pairs, body)
        return await self._transport.handle_async_request(request)


def hash_prefixes(body: bytes | bytearray) -> list[tuple[float, bytes]]:
    """Return (fraction, digest) pairs of prefixes of the messages in a body, shortest first.

    A fraction is that of the messages in the prefix. Quotes in a text are escaped, so the key of
    the messages is found without parsing. Clients may send other parameters before and after them.
    """
    start = body.find(b'"messages"')
    if start < 0:
        return []
    messages = memoryview(body)[start:]
    hasher, prefixes, position, end = hashlib.blake2b(digest_size=16), [], 0, MIN_PREFIX_BYTES
    while end <= len(messages):
        hasher.update(messages[position:end])
        prefixes.append((end / len(messages), hasher.digest()))
        position, end = end, int(end * PREFIX_GROWTH)
    return prefixes


@dataclass
class MergedMetrics(Collector):
    """Prometheus metrics of several processes, by name."""

    families: dict[str, Metric] = field(default_factory=dict)

    def add(self, families: Iterable[Metric], labels: Mapping[str, str]) -> None:
        """Add the metrics of a process, with further labels."""
        for one in families:
            empty = Metric(one.name, one.documentation, one.type)
            merged = self.families.setdefault(one.name, empty)
            for sample in one.samples:
                merged.add_sample(sample.name, {**sample.labels, **labels}, sample.value)

    def collect(self) -> Iterable[Metric]:
        """Return all metrics."""
        return self.families.values()


class ReplicaRouter:
    """ASGI application that forwards requests to replicas."""

    def __init__(self, replicas: Sequence[Replica]) -> None:
        self.replicas = replicas
        self._replica_by_prefix: OrderedDict[bytes, Replica] = OrderedDict()

    def make_app(self, api_keys: Sequence[str], limits: ServerLimits) -> RequestMiddleware:
        """Build the application with the access rules and limits of the port."""
        metrics = RequestMetrics("finesight_router")

        async def get_metrics(request: Request) -> Response:
            merged = await self._collect_metrics(metrics.registry)
            return Response(generate_latest(merged), media_type=CONTENT_TYPE_LATEST)

        async def get_health(request: Request) -> Response:
            states = ["ready" if one.is_ready else "starting" for one in self.replicas]
            is_ready = "ready" in states
            content = {"status": "ok" if is_ready else "unavailable", "replicas": states}
            return JSONResponse(content, 200 if is_ready else 503)

        routes = [
            Route("/metrics", get_metrics),
            Route("/health", get_health),
            Route("/{path:path}", self),
        ]
        app = Starlette(routes=routes, exception_handlers=ERROR_HANDLERS)
        return RequestMiddleware(app, ApiKeys(api_keys), limits, metrics)

    async def get_model_names(self) -> list[str]:
        """Return the names of the models from a replica that answers, and wait for one."""
        while True:
            for replica in self.replicas:
                with contextlib.suppress(httpx2.TransportError):
                    models = (await replica.get("/v1/models")).json()["data"]
                    return [model["id"] for model in models]
            await asyncio.sleep(HEALTH_INTERVAL_S)

    async def _collect_metrics(self, registry: Collector) -> MergedMetrics:
        """Return the metrics of the router, and those of each replica with the label `replica`."""
        merged = MergedMetrics()
        merged.add(registry.collect(), {})
        for replica in self.replicas:
            labels = {"replica": str(replica.index)}
            for name, value in (
                ("ready", replica.is_ready),
                ("requests_in_progress", replica.load),
                ("restarts", replica.num_restarts),
            ):
                gauge = GaugeMetricFamily(
                    f"finesight_replica_{name}", f"Replica: {name.replace('_', ' ')}.", value
                )
                merged.add([gauge], labels)
            with contextlib.suppress(TimeoutError, httpx2.TransportError):
                async with asyncio.timeout(METRICS_TIMEOUT_S):
                    answer = await replica.get("/metrics")
                merged.add(text_string_to_metric_families(answer.text), labels)
        return merged

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a request to a replica (ASGI).

        Raises:
            ApiError: The replica ended before its response, or none is ready.
            ClientDisconnectedError: The client disconnected.
        """
        body, reservation = await read_body(Request(scope, receive)), get_reservation(scope)
        prefixes = await asyncio.to_thread(hash_prefixes, body)
        headers = {OWNER_HEADER: scope["state"]["owner"], "content-length": str(len(body))}
        if content_type := Headers(scope=scope).get("content-type"):
            headers["content-type"] = content_type

        async def iterate_body() -> AsyncIterator[bytes]:
            for start in range(0, len(body), BODY_PIECE_BYTES):
                yield bytes(memoryview(body)[start : start + BODY_PIECE_BYTES])
            # The replica has received it, and may take minutes to answer.
            body.clear()
            reservation.release()

        async with stop_at_disconnect(receive):
            while True:
                replica = self._select_replica(prefixes)
                replica.load += 1
                try:
                    await _forward(replica, scope, headers, iterate_body(), receive, send)
                    return
                except httpx2.ConnectError:
                    # It ended before it got the request, so that another one can answer it.
                    replica.is_ready = False
                finally:
                    replica.load -= 1

    def _select_replica(self, prefixes: Sequence[tuple[float, bytes]]) -> Replica:
        """Select the replica of a request, and remember its prefixes.

        Raises ApiError if no replica is ready.
        """
        ready = [one for one in self.replicas if one.is_ready]
        if not ready:
            raise ApiError(503, f"0 of {len(self.replicas)} replicas are ready", retry_after_s=5)
        selected = min(ready, key=lambda one: (one.load, one.num_requests))
        for fraction, digest in reversed(prefixes):
            known = self._replica_by_prefix.get(digest)
            if known is not None:
                has_capacity = known.load <= selected.load + MAX_LOAD_DIFFERENCE
                if fraction >= MIN_MATCH and known.is_ready and has_capacity:
                    selected = known
                break
        selected.num_requests += 1
        for _, digest in prefixes:
            self._replica_by_prefix[digest] = selected
            self._replica_by_prefix.move_to_end(digest)
        while len(self._replica_by_prefix) > MAX_PREFIXES:
            self._replica_by_prefix.popitem(last=False)
        return selected


async def _forward(
    replica: Replica,
    scope: Scope,
    headers: Mapping[str, str],
    body: AsyncIterator[bytes],
    receive: Receive,
    send: Send,
) -> None:
    """Send a request to a replica, and its response to the client.

    A request that the replica has received is not sent to another one: it may have caused the end.

    Raises:
        ConnectError: The replica has not received the request.
        ApiError: The replica ended before its response was complete. Its error is the last event
            of a stream instead.
    """
    target = b"?".join(part for part in (scope["raw_path"], scope["query_string"]) if part)
    is_stream, rest = False, b""
    try:
        answer = await replica.send(scope["method"], target, headers, body)
        try:
            names = answer.headers.keys() & FORWARDED_RESPONSE_HEADERS
            forwarded = {name: answer.headers[name] for name in names}
            is_stream = forwarded.get("content-type", "").startswith("text/event-stream")
            if not is_stream:
                response = Response(await answer.aread(), answer.status_code, forwarded)
                await response(scope, receive, send)
                return
            raw_headers = [(name.encode(), value.encode()) for name, value in forwarded.items()]
            await send({"type": "http.response.start", "status": 200, "headers": raw_headers})
            async for chunk in answer.aiter_raw():
                # A client could not parse an event that is cut off.
                events, end, rest = (rest + chunk).rpartition(SSE_EVENT_END)
                message = {"type": "http.response.body", "body": events + end, "more_body": True}
                await send(message)
        finally:
            await answer.aclose()
    except httpx2.ConnectError:
        raise
    except httpx2.TransportError as error:
        text = f"replica {replica.index} ended during the request; send it again"
        api_error = ApiError(503, text, code="replica_ended", retry_after_s=1)
        if not is_stream:
            raise api_error from error
        await send(format_sse_event(api_error.body))
        rest = SSE_END
    await send({"type": "http.response.body", "body": rest})


def build_environments(num_replicas: int, gpus: Sequence[str]) -> list[dict[str, str]]:
    """Return the environment variables of each replica: its GPU, or its share of the CPU cores.

    Args:
        gpus: Values of CUDA_VISIBLE_DEVICES for one GPU each; empty for replicas on the CPU.

    Raises:
        UserError: There are fewer GPUs than replicas.
    """
    if gpus and num_replicas > len(gpus):
        raise UserError(
            f"{num_replicas} replicas with {format_count(len(gpus), 'GPU')}",
            where="--data-parallel-size",
            expected=f"at most {len(gpus)}",
            remedy="choose a lower number, or use the CPU (--device cpu)",
        )
    if gpus:
        return [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus[:num_replicas]]
    num_threads = str(max(1, (os.cpu_count() or 1) // num_replicas))
    return [{"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", num_threads)}] * num_replicas


def run_replicas(
    command: Sequence[str],
    environments: Sequence[Mapping[str, str]],
    listener: socket.socket,
    *,
    api_keys: Sequence[str],
    limits: ServerLimits,
    trusted_proxies: Sequence[str] = (),
    on_ready: Callable[[Sequence[str]], None],
) -> None:
    """Serve requests with several replicas until a signal stops the server.

    At shutdown, running requests have `shutdown_timeout_s` to complete; then the replicas end.

    Args:
        command: Words of the command line of a replica, without its socket.
        environments: Variables of each replica, in addition to those of this process.
        on_ready: Called with the model names when all replicas are ready.

    Raises:
        UserError: A replica ended before it was ready.
    """
    # A request in progress has two connections.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft = max(soft, min(hard, 4 * limits.max_connections))
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    with contextlib.ExitStack() as stack:
        stack.callback(listener.close)
        folder = stack.enter_context(temporary_folder("serve"))
        program = [sys.executable, "-P", "-c", _PROGRAM, *command, "--socket"]
        # The router checks the keys, and reports the outcome of the command.
        inherited = {k: v for k, v in os.environ.items() if k not in NOT_INHERITED}
        inherited[FILES_VARIABLE] = str(folder / "files")
        replicas = []
        for index, environment in enumerate(environments):
            file = folder / str(index)
            replicas.append(
                Replica(index, [*program, str(file)], {**inherited, **environment}, file)
            )
        router = ReplicaRouter(replicas)

        def abort() -> None:
            for replica in replicas:
                replica.kill()
            shutil.rmtree(folder, ignore_errors=True)
            os._exit(0)

        async def serve() -> None:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(replica.run()) for replica in replicas]
                await asyncio.gather(*(replica.has_started.wait() for replica in replicas))
                names = await router.get_model_names()
                app = router.make_app(api_keys, limits)
                server = ApiServer(app, limits, lambda: on_ready(names), abort, trusted_proxies)
                await server.serve(sockets=[listener])
                for task in tasks:
                    task.cancel()

        try:
            asyncio.run(serve())
        except* UserError as errors:
            raise errors.exceptions[0] from None
