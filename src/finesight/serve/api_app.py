"""Starlette application of the inference server, with all routes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from finesight.infer.inference_service import InferenceService
from finesight.serve.api_errors import ApiError, ClientDisconnectedError, internal_error
from finesight.serve.chat_completions import ChatCompletionsHandler
from finesight.serve.image_sources import (
    DEFAULT_IMAGE_FORMATS,
    FILE_PURPOSE,
    FileStore,
    ImageFetcher,
)
from finesight.serve.request_middleware import CLIENT_CLOSED_REQUEST, ApiKeys, RequestMiddleware
from finesight.serve.request_preprocessor import RequestPreprocessor
from finesight.serve.server_limits import ServerLimits
from finesight.serve.server_metrics import ServerMetrics
from finesight.serve.worker_constraint import ConstraintFactory
from finesight.worker_pool import WorkerPool


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
        worker_pool: Worker processes with the state of `load_worker_state`.
        vocab_size: Number of logits of the model.
        folder: Private folder for files of clients.
        api_keys: API keys of clients. Without keys, every client is accepted.
        limits: Limits on requests.
        fetcher: Fetches images from the web. Without it, image URLs are rejected.
        image_formats: Accepted image formats.
    """
    limits = limits or ServerLimits()
    request_folder = folder / "requests"
    request_folder.mkdir(mode=0o700)
    metrics = ServerMetrics(service)
    completions = ChatCompletionsHandler(
        service=service,
        worker_pool=worker_pool,
        constraint_factory=ConstraintFactory(
            worker_pool, limits, vocab_size, service.renderer.end_ids
        ),
        image_formats=image_formats,
        limits=limits,
        metrics=metrics,
        fetcher=fetcher
        or ImageFetcher((), timeout_s=limits.fetch_timeout_s, max_bytes=limits.max_image_bytes),
        store=FileStore(folder / "files", limits),
        folder=request_folder,
    )

    async def get_metrics(request: Request) -> Response:
        return Response(metrics.render_text(), media_type=CONTENT_TYPE_LATEST)

    app = Starlette(
        routes=[
            Route("/v1/chat/completions", completions.create_chat_completion, methods=["POST"]),
            Route("/metrics", get_metrics),
            *_build_model_routes(service),
            *_build_file_routes(completions),
        ],
        exception_handlers={
            ApiError: _handle_api_error,
            ClientDisconnectedError: _handle_client_disconnect,
            HTTPException: _handle_http_error,
            Exception: _handle_internal_error,
        },
    )
    app.router.redirect_slashes = False
    return RequestMiddleware(app, ApiKeys(api_keys), limits, metrics)


def _build_model_routes(service: InferenceService) -> list[Route]:
    created_at = int(time.time())

    def model_to_dict(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": created_at, "owned_by": "finesight"}

    async def list_models(request: Request) -> Response:
        models = [model_to_dict(name) for name in service.model_names]
        return JSONResponse({"object": "list", "data": models})

    async def get_model(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in service.model_names:
            raise ApiError(404, f"unknown model {name[:80]!r}", "model", "model_not_found")
        return JSONResponse(model_to_dict(name))

    async def get_health(request: Request) -> Response:
        if service.is_alive:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "unavailable"}, status_code=503)

    return [
        Route("/v1/models", list_models),
        Route("/v1/models/{name:path}", get_model),
        Route("/health", get_health),
    ]


def _build_file_routes(completions: ChatCompletionsHandler) -> list[Route]:
    store = completions.store

    async def upload_file(request: Request) -> Response:
        async with request.form(max_files=1, max_fields=8) as form:
            file, purpose = form.get("file"), form.get("purpose")
            if not isinstance(file, UploadFile):
                raise ApiError(400, f"no file in {len(form)} form fields", "file")
            if purpose != FILE_PURPOSE:
                raise ApiError(
                    400, f"purpose is {purpose!r:.40}; expected {FILE_PURPOSE}", "purpose"
                )
            uploaded_file = await completions.run_in_thread(
                store.add, request.state.owner, file.filename or "", file.file
            )
        preprocessor = RequestPreprocessor(
            completions.worker_pool,
            completions.limits,
            completions.image_formats,
            uploaded_file.path.parent,
        )
        try:
            await completions.run_in_thread(preprocessor.inspect_image, uploaded_file.path, "file")
        except BaseException:
            store.delete(uploaded_file.owner, uploaded_file.id)
            raise
        return JSONResponse(uploaded_file.as_json())

    async def list_files(request: Request) -> Response:
        files = [file.as_json() for file in store.list_files(request.state.owner)]
        return JSONResponse({"object": "list", "data": files, "has_more": False})

    async def get_file(request: Request) -> Response:
        file = store.get(request.state.owner, request.path_params["name"])
        return JSONResponse(file.as_json())

    async def delete_file(request: Request) -> Response:
        name = request.path_params["name"]
        store.delete(request.state.owner, name)
        return JSONResponse({"id": name, "object": "file", "deleted": True})

    return [
        Route("/v1/files", upload_file, methods=["POST"]),
        Route("/v1/files", list_files),
        Route("/v1/files/{name}", get_file),
        Route("/v1/files/{name}", delete_file, methods=["DELETE"]),
    ]


async def _handle_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError), f"unexpected {type(error)}"
    return JSONResponse(error.body, error.status, error.response_headers)


async def _handle_client_disconnect(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def _handle_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException), f"unexpected {type(error)}"
    messages = {404: "unknown path", 405: "method not allowed"}
    message = messages.get(error.status_code, str(error.detail)[:200])
    return JSONResponse(ApiError(error.status_code, message).body, error.status_code, error.headers)


async def _handle_internal_error(request: Request, error: Exception) -> Response:
    return JSONResponse(internal_error().body, internal_error().status)
