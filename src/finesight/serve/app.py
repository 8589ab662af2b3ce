"""The routes of the server, and everything that stands before and behind them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from fastapi.telemetry import TelemetryConfig
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from finesight.infer.service import Service
from finesight.serve.chat import Desk
from finesight.serve.constraints import Constraints
from finesight.serve.errors import ClientGone, Refused, broken
from finesight.serve.fetch import Fetcher
from finesight.serve.formats import IMAGE_FORMATS
from finesight.serve.guard import GONE, Guard
from finesight.serve.keys import Keys
from finesight.serve.limits import Limits
from finesight.serve.metrics import Metrics
from finesight.serve.pool import Pool
from finesight.serve.preparation import Preparation
from finesight.serve.store import PURPOSE, Store
from finesight.worker_pool import WorkerPool

SILENT: TelemetryConfig = {
    "tracing": False,
    "metrics": False,
    "logs": False,
    "operation_spans": False,
    "auto_configure": False,
}
"""Else FastAPI sends paths and messages of errors wherever the environment's OpenTelemetry says."""


def make_app(
    service: Service,
    workers: WorkerPool,
    vocabulary: int,
    folder: Path,
    *,
    keys: Sequence[str] = (),
    limits: Limits | None = None,
    fetcher: Fetcher | None = None,
    formats: Sequence[str] = IMAGE_FORMATS,
) -> Guard:
    """Build the server as an ASGI application.

    Args:
        service: The model.
        workers: Worker processes whose state is `worker_jobs.load_state` of the model.
        vocabulary: Number of logits of the model.
        folder: Private folder that keeps what clients send.
        keys: Keys of clients; without any, everyone is let in.
        limits: Limits on requests.
        fetcher: Takes images from the web; without one, none is taken.
        formats: Formats that images may have.
    """
    limits = limits or Limits()
    store = Store(folder / "files", limits)
    requests = folder / "requests"
    requests.mkdir(mode=0o700)
    metrics = Metrics(lambda: _state(service))
    none = Fetcher((), seconds=limits.fetch_seconds, most=limits.picture_bytes)
    desk = Desk(
        service=service,
        workers=workers,
        constraints=Constraints(workers, limits, vocabulary, service.renderer.end_ids),
        formats=formats,
        limits=limits,
        metrics=metrics,
        pool=Pool(limits.readers),
        askers=Pool(limits.readers),
        fetcher=fetcher or none,
        store=store,
        folder=requests,
        open=set(),
    )
    # No pages of FastAPI's own: they are for who may not have a key.
    app = FastAPI(
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        telemetry=SILENT,
    )
    app.post("/v1/chat/completions")(desk.complete)
    _add_facts(app, service, metrics)
    _add_files(app, store, desk)
    _add_errors(app)
    return Guard(app, Keys(keys), limits, metrics)


def _state(service: Service) -> dict[str, float]:
    facts = service.facts()
    return {
        "running": facts.running,
        "waiting": facts.waiting,
        "cache_pages_free": facts.pages_free,
        "cache_pages": facts.pages,
    }


def _add_facts(app: FastAPI, service: Service, metrics: Metrics) -> None:
    made = int(time.time())

    def as_json(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": made, "owned_by": "finesight"}

    @app.get("/v1/models")
    async def list_models(request: Request) -> Response:
        names = [as_json(name) for name in service.names]
        return JSONResponse({"object": "list", "data": names})

    @app.get("/v1/models/{name:path}")
    async def get_model(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in service.names:
            raise Refused(404, f"no model {name[:80]!r}", "model", "model_not_found")
        return JSONResponse(as_json(name))

    @app.get("/health")
    async def health(request: Request) -> Response:
        if service.alive:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "no questions are taken"}, status_code=503)

    @app.get("/metrics")
    async def figures(request: Request) -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)


def _add_files(app: FastAPI, store: Store, desk: Desk) -> None:
    def owner(request: Request) -> str:
        return str(request.scope["state"]["owner"])

    @app.post("/v1/files")
    async def upload(request: Request) -> Response:
        async with request.form(max_files=1, max_fields=8) as form:
            file, purpose = form.get("file"), form.get("purpose")
            if not isinstance(file, UploadFile):
                raise Refused(400, f"{len(form)} fields and no file", "file")
            if purpose != PURPOSE:
                raise Refused(400, f"purpose {purpose!r:.40}: expected {PURPOSE}", "purpose")
            kept = await desk.pool.run(store.add, owner(request), file.filename or "", file.file)
        preparation = Preparation(desk.workers, desk.limits, desk.formats, kept.path.parent)
        try:
            await desk.pool.run(preparation.inspect, kept.path, "file")
        except BaseException:
            store.delete(kept.owner, kept.id)
            raise
        return JSONResponse(kept.as_json())

    @app.get("/v1/files")
    async def list_files(request: Request) -> Response:
        files = [kept.as_json() for kept in store.listed(owner(request))]
        return JSONResponse({"object": "list", "data": files, "has_more": False})

    @app.get("/v1/files/{name}")
    async def get_file(request: Request) -> Response:
        return JSONResponse(store.get(owner(request), request.path_params["name"]).as_json())

    @app.delete("/v1/files/{name}")
    async def delete_file(request: Request) -> Response:
        name = request.path_params["name"]
        store.delete(owner(request), name)
        return JSONResponse({"id": name, "object": "file", "deleted": True})


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(Refused)
    async def on_refused(request: Request, refusal: Refused) -> Response:
        return JSONResponse(refusal.body, refusal.status, refusal.extra_headers)

    @app.exception_handler(ClientGone)
    async def on_gone(request: Request, error: ClientGone) -> Response:
        return Response(status_code=GONE)

    @app.exception_handler(HTTPException)
    async def on_http(request: Request, error: HTTPException) -> Response:
        words = {404: "no such path", 405: "no such method here"}
        refusal = Refused(error.status_code, words.get(error.status_code, str(error.detail)[:200]))
        return JSONResponse(refusal.body, refusal.status, error.headers)

    @app.exception_handler(Exception)
    async def on_fault(request: Request, error: Exception) -> Response:
        return JSONResponse(broken().body, broken().status)
