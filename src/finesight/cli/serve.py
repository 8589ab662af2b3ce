"""`finesight serve`: the model behind HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finesight.cli.options import Device, Precision, RunOrModel, Weights
from finesight.errors import UserError

if TYPE_CHECKING:
    from finesight.infer.service import Service


def serve(
    run_or_model: RunOrModel,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RUN",
            help="A further run or adapter of the same base, which requests choose by its folder's "
            "name. Repeatable.",
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Where to listen; beyond this machine a key is needed.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any that is free.")] = 8000,
    key_file: Annotated[
        Path | None,
        typer.Option(help="A file with a key on each line; else FINESIGHT_KEY, if it is set."),
    ] = None,
    allow_media_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HOST", help="A host that pictures may be fetched from over https. Repeatable."
        ),
    ] = None,
    image_format: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FORMAT",
            help="A format that images may have besides JPEG, PNG, WEBP and GIF: AVIF, BMP, "
            "JPEG2000, PPM or TIFF. Repeatable.",
        ),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Answers that grow together.")] = 64,
    waiting: Annotated[
        int, typer.Option(min=0, help="Questions that may wait; the next one is refused.")
    ] = 256,
    seconds: Annotated[
        float, typer.Option(min=1, help="Longest time for one request; then it is given up.")
    ] = 300.0,
    device: Device = "auto",
    precision: Precision = "auto",
    weights: Weights = "auto",
) -> None:
    """Serve a model over HTTP as OpenAI's clients speak it, until Ctrl-C; see docs/en/serving.md.

    Example: finesight serve runs/latex
    """
    try:
        from finesight.serve.formats import read_formats
        from finesight.serve.keys import read_keys
        from finesight.serve.limits import Limits
        from finesight.serve.run import listen
        from finesight.serve.run import serve as serve_until_stopped
    except ImportError as error:
        raise UserError(
            f"the package {error.name} cannot be imported: {error}",
            where="finesight serve",
            expected="fastapi, uvicorn, prometheus-client, python-multipart and llguidance",
            remedy="pip install 'finesight[serve]'",
        ) from error
    from finesight.infer.load import load_choice

    formats = read_formats(image_format or ())
    keys = read_keys(key_file)
    place = listen(host, port, keys)
    limits = Limits(rows=rows, waiting=waiting, seconds=seconds)
    answerer = load_choice(run_or_model, adapter or (), device, precision, weights)
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{place.getsockname()[1]}/v1"

    serve_until_stopped(
        answerer,
        place,
        keys=keys,
        limits=limits,
        hosts=allow_media_host or (),
        formats=formats,
        ready=lambda service: _announce(service, address, with_key=bool(keys)),
    )


def _announce(service: Service, address: str, *, with_key: bool) -> None:
    """Say where it listens, with a line to try."""
    bearer = ' -H "Authorization: Bearer $FINESIGHT_KEY"' if with_key else ""
    question = (
        f'{{"model": "{service.names[0]}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    )
    typer.echo(f"serving {', '.join(service.names)} at {address}")
    typer.echo(
        f"  curl {address}/chat/completions{bearer} -H 'Content-Type: application/json'"
        f" -d '{question}'"
    )
