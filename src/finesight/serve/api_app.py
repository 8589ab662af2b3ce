"""FastAPI application of the inference server, with all routes."""

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

from finesight.infer.inference_service import InferenceService
from finesight.serve.api_errors import ApiError, ClientDisconnectedError, internal_error
from finesight.serve.api_keys import ApiKeys
from finesight.serve.chat_completions import ChatCompletionsHandler
from finesight.serve.file_store import FILE_PURPOSE, FileStore
from finesight.serve.formats import DEFAULT_IMAGE_FORMATS
from finesight.serve.image_fetcher import ImageFetcher
from finesight.serve.request_middleware import CLIENT_CLOSED_REQUEST, RequestMiddleware
from finesight.serve.request_preprocessor import RequestPreprocessor
from finesight.serve.server_limits import ServerLimits
from finesight.serve.server_metrics import ServerMetrics
from finesight.serve.thread_pool import ThreadPool
from finesight.serve.worker_constraint import ConstraintFactory
from finesight.worker_pool import WorkerPool

TELEMETRY_DISABLED: TelemetryConfig = {
    "tracing": False,
    "metrics": False,
    "logs": False,
    "operation_spans": False,
    "auto_configure": False,
}
"""Settings that disable the OpenTelemetry export of FastAPI.

If OpenTelemetry is configured in the environment, FastAPI would export paths and error messages.
"""


def make_app(
    service: InferenceService,
    worker_pool: WorkerPool,
    vocab_size: int,
    folder: Path,
    *,
    api_keys: Sequence[str] = (),
    limits: ServerLimits | None = None,
    fetcher: ImageFetcher | None = None,
    image_formats: Sequence[str] = DEFAULT_IMAGE_FORMATS,
) -> RequestMiddleware:
    """Build the inference server as an ASGI application.

    Args:
        service: Inference service that generates completions.
        worker_pool: Worker processes with the state of `worker_jobs.load_worker_state`.
        vocab_size: Number of logits of the model.
        folder: Private folder for files of clients.
        api_keys: API keys of clients. Without keys, every client is accepted.
        limits: Limits on requests.
        fetcher: Fetches images from the web. Without it, image URLs are rejected.
        image_formats: Accepted image formats.
    """
    limits = limits or ServerLimits()
    store = FileStore(folder / "files", limits)
    request_folder = folder / "requests"
    request_folder.mkdir(mode=0o700)
    metrics = ServerMetrics(lambda: _get_service_gauges(service))
    disabled_fetcher = ImageFetcher(
        (), timeout_s=limits.fetch_timeout_s, max_bytes=limits.max_image_bytes
    )
    completions = ChatCompletionsHandler(
        service=service,
        worker_pool=worker_pool,
        constraint_factory=ConstraintFactory(
            worker_pool, limits, vocab_size, service.renderer.end_ids
        ),
        image_formats=image_formats,
        limits=limits,
        metrics=metrics,
        thread_pool=ThreadPool(limits.num_reader_threads),
        submit_pool=ThreadPool(limits.num_reader_threads),
        fetcher=fetcher or disabled_fetcher,
        store=store,
        folder=request_folder,
        active_requests=set(),
    )
    # The documentation pages of FastAPI would be accessible without an API key.
    app = FastAPI(
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        telemetry=TELEMETRY_DISABLED,
    )
    app.post("/v1/chat/completions")(completions.create_chat_completion)
    _add_info_routes(app, service, metrics)
    _add_file_routes(app, store, completions)
    _add_error_handlers(app)
    return RequestMiddleware(app, ApiKeys(api_keys), limits, metrics)


def _get_service_gauges(service: InferenceService) -> dict[str, float]:
    stats = service.get_stats()
    return {
        "requests_running": stats.num_running,
        "requests_waiting": stats.num_waiting,
        "kv_cache_blocks_free": stats.num_free_blocks,
        "kv_cache_blocks": stats.num_blocks,
    }


def _add_info_routes(app: FastAPI, service: InferenceService, metrics: ServerMetrics) -> None:
    created_at = int(time.time())

    def model_to_dict(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": created_at, "owned_by": "finesight"}

    @app.get("/v1/models")
    async def list_models(request: Request) -> Response:
        models = [model_to_dict(name) for name in service.model_names]
        return JSONResponse({"object": "list", "data": models})

    @app.get("/v1/models/{name:path}")
    async def get_model(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in service.model_names:
            raise ApiError(404, f"unknown model {name[:80]!r}", "model", "model_not_found")
        return JSONResponse(model_to_dict(name))

    @app.get("/health")
    async def get_health(request: Request) -> Response:
        if service.is_alive:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "unavailable"}, status_code=503)

    @app.get("/metrics")
    async def get_metrics(request: Request) -> Response:
        return Response(metrics.render_text(), media_type=CONTENT_TYPE_LATEST)


def _add_file_routes(app: FastAPI, store: FileStore, completions: ChatCompletionsHandler) -> None:
    def get_owner(request: Request) -> str:
        return str(request.scope["state"]["owner"])

    @app.post("/v1/files")
    async def upload_file(request: Request) -> Response:
        async with request.form(max_files=1, max_fields=8) as form:
            file, purpose = form.get("file"), form.get("purpose")
            if not isinstance(file, UploadFile):
                raise ApiError(400, f"no file in {len(form)} form fields", "file")
            if purpose != FILE_PURPOSE:
                raise ApiError(
                    400, f"purpose is {purpose!r:.40}; expected {FILE_PURPOSE}", "purpose"
                )
            uploaded_file = await completions.thread_pool.run(
                store.add, get_owner(request), file.filename or "", file.file
            )
        preprocessor = RequestPreprocessor(
            completions.worker_pool,
            completions.limits,
            completions.image_formats,
            uploaded_file.path.parent,
        )
        try:
            await completions.thread_pool.run(
                preprocessor.inspect_image, uploaded_file.path, "file"
            )
        except BaseException:
            store.delete(uploaded_file.owner, uploaded_file.id)
            raise
        return JSONResponse(uploaded_file.as_json())

    @app.get("/v1/files")
    async def list_files(request: Request) -> Response:
        files = [uploaded_file.as_json() for uploaded_file in store.list_files(get_owner(request))]
        return JSONResponse({"object": "list", "data": files, "has_more": False})

    @app.get("/v1/files/{name}")
    async def get_file(request: Request) -> Response:
        return JSONResponse(store.get(get_owner(request), request.path_params["name"]).as_json())

    @app.delete("/v1/files/{name}")
    async def delete_file(request: Request) -> Response:
        name = request.path_params["name"]
        store.delete(get_owner(request), name)
        return JSONResponse({"id": name, "object": "file", "deleted": True})


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def handle_api_error(request: Request, api_error: ApiError) -> Response:
        return JSONResponse(api_error.body, api_error.status, api_error.response_headers)

    @app.exception_handler(ClientDisconnectedError)
    async def handle_client_disconnect(
        request: Request, error: ClientDisconnectedError
    ) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    @app.exception_handler(HTTPException)
    async def handle_http_error(request: Request, error: HTTPException) -> Response:
        messages = {404: "unknown path", 405: "method not allowed"}
        api_error = ApiError(
            error.status_code, messages.get(error.status_code, str(error.detail)[:200])
        )
        return JSONResponse(api_error.body, api_error.status, error.headers)

    @app.exception_handler(Exception)
    async def handle_internal_error(request: Request, error: Exception) -> Response:
        return JSONResponse(internal_error().body, internal_error().status)
