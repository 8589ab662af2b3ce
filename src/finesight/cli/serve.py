"""`finesight serve`: start an OpenAI-compatible HTTP server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finesight.cli.options import (
    DeviceOption,
    PortOption,
    PrecisionOption,
    RunOrModelArgument,
    WeightFormatOption,
)
from finesight.errors import UserError

if TYPE_CHECKING:
    from finesight.infer.inference_service import InferenceService


def serve(
    run_or_model: RunOrModelArgument,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RUN",
            help="Additional run or adapter of the same base model. Requests select it by folder "
            "name. Repeatable.",
        ),
    ] = None,
    host: Annotated[
        str,
        typer.Option(
            help="Address to listen on. 127.0.0.1: this machine only. 0.0.0.0: also the network, "
            "which requires an API key."
        ),
    ] = "127.0.0.1",
    port: PortOption = 8000,
    key_file: Annotated[
        Path | None,
        typer.Option(
            help="File with one API key per line, each of at least 16 characters. Requests then "
            'need the header "Authorization: Bearer KEY". Default: the environment variable '
            "FINESIGHT_KEY, if set, else no key."
        ),
    ] = None,
    allow_media_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HOST", help="Allow image downloads over https from this host. Repeatable."
        ),
    ] = None,
    image_format: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FORMAT",
            help="Additional image format besides JPEG, PNG, WEBP and GIF: AVIF, BMP, JPEG2000, "
            "PPM or TIFF. Repeatable.",
        ),
    ] = None,
    max_num_seqs: Annotated[
        int,
        typer.Option(min=1, help="Maximum number of answers that are generated at the same time."),
    ] = 64,
    max_waiting: Annotated[
        int,
        typer.Option(
            min=0, help="Maximum number of waiting requests; further ones get HTTP status 429."
        ),
    ] = 256,
    request_timeout_s: Annotated[
        float,
        typer.Option(
            min=1,
            help="Seconds from the first byte of a request, waiting included, until it is "
            "canceled.",
        ),
    ] = 300.0,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    weight_format: WeightFormatOption = "auto",
) -> None:
    """Start an OpenAI-compatible HTTP server (POST /v1/chat/completions).

    Prints its base URL and an example request with curl. Ctrl-C stops the server.

    Example: finesight serve runs/latex
    """
    try:
        from finesight.serve.api_server import bind_socket, run_api_server
        from finesight.serve.image_sources import read_formats
        from finesight.serve.request_middleware import read_api_keys
        from finesight.serve.server_limits import ServerLimits
    except ImportError as error:
        raise UserError(
            f"the package {error.name} cannot be imported: {error}",
            where="finesight serve",
            expected="starlette, uvicorn, prometheus-client, python-multipart and llguidance",
            remedy="pip install 'finesight[serve]'",
        ) from error
    from finesight.infer.model_loader import load_multi_adapter_model

    formats = read_formats(image_format or ())
    keys = read_api_keys(key_file)
    listener = bind_socket(host, port, keys)
    limits = ServerLimits(
        max_num_seqs=max_num_seqs, max_waiting=max_waiting, request_timeout_s=request_timeout_s
    )
    inference_model = load_multi_adapter_model(
        run_or_model, adapter or (), device, precision, weight_format
    )
    url_host = f"[{host}]" if ":" in host else host
    address = f"http://{url_host}:{listener.getsockname()[1]}/v1"

    run_api_server(
        inference_model,
        listener,
        api_keys=keys,
        limits=limits,
        allowed_media_hosts=allow_media_host or (),
        image_formats=formats,
        on_ready=lambda service: _print_address(service, address, has_api_key=bool(keys)),
    )


def _print_address(service: InferenceService, address: str, *, has_api_key: bool) -> None:
    """Print the base URL of the server and an example request with curl."""
    auth_header = ' -H "Authorization: Bearer $FINESIGHT_KEY"' if has_api_key else ""
    messages = '[{"role": "user", "content": "Hello"}]'
    request_body = f'{{"model": "{service.model_names[0]}", "messages": {messages}}}'
    typer.echo(f"serving {', '.join(service.model_names)} at {address}")
    typer.echo(
        f"  curl {address}/chat/completions{auth_header} -H 'Content-Type: application/json'"
        f" -d '{request_body}'"
    )
