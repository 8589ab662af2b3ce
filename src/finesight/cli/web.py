"""`finesight web`: chat UI in the browser."""

from __future__ import annotations

import secrets
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from finesight.cli.options import (
    DeviceOption,
    PrecisionOption,
    RunOrModelArgument,
    WeightFormatOption,
)
from finesight.errors import UserError

MIN_PASSWORD_LENGTH = 8


def web(
    run_or_model: RunOrModelArgument,
    host: Annotated[
        str, typer.Option(help="Listen address; 0.0.0.0 accepts connections from the network.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port; 0 selects a free port.")
    ] = 7860,
    password_file: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False,
            help="File with the password. Default: no password on loopback, else a generated one.",
        ),
    ] = None,
    no_password: Annotated[
        bool, typer.Option("--no-password", help="Disable the password, also for the network.")
    ] = False,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    weight_format: WeightFormatOption = "auto",
) -> None:
    """Start a chat UI with images, predicted boxes and comparison with the base model.

    Ctrl-C stops the server.

    Example: finesight web runs/latex
    """
    _require_gradio()
    password, is_generated = _resolve_password(host, password_file, no_password)

    from finesight.infer.inference_service import InferenceService
    from finesight.infer.model_loader import load_multi_adapter_model
    from finesight.web.web_server import bind_socket, run_web_server

    with bind_socket(host, port) as listener:
        service = InferenceService(
            load_multi_adapter_model(run_or_model, (), device, precision, weight_format)
        )
        try:
            typer.echo(f"http://{_get_reachable_host(host)}:{listener.getsockname()[1]}")
            if is_generated:
                typer.echo(f"password: {password}")
                typer.echo(
                    "The page uses HTTP without encryption: the password is sent as plain text."
                )
            run_web_server(service, listener, password, _is_loopback(host))
        finally:
            service.close(wait_for_running=False)


def _require_gradio() -> None:
    if find_spec("gradio") is None:
        raise UserError(
            "gradio is not installed",
            where="finesight web",
            expected="the extra web",
            remedy="pip install 'finesight[web]'",
        )


def _resolve_password(host: str, file: Path | None, no_password: bool) -> tuple[str | None, bool]:
    """Return the password, if any, and whether it is generated."""
    if file is not None and no_password:
        raise UserError(
            f"--no-password is given with --password-file {file}",
            where="--no-password",
            expected="one of the two options",
            remedy="remove one of the options",
        )
    if file is not None:
        return _read_password(file), False
    if no_password or _is_loopback(host):
        return None, False
    return secrets.token_urlsafe(12), True


def _read_password(file: Path) -> str:
    try:
        password = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot be read ({error})",
            where=str(file),
            expected="a text file with the password",
            remedy="correct --password-file",
        ) from error
    if len(password) < MIN_PASSWORD_LENGTH:
        raise UserError(
            f"the password has {len(password)} characters",
            where=str(file),
            expected=f"at least {MIN_PASSWORD_LENGTH}",
            remedy="choose a longer password, or remove --password-file to generate one",
        )
    return password


def _is_loopback(host: str) -> bool:
    import ipaddress

    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _get_reachable_host(host: str) -> str:
    """Return the host for the printed URL; resolve wildcard addresses."""
    import socket

    if host in ("0.0.0.0", "::"):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe_socket:
            try:
                # Selects the outgoing interface for a documentation address; sends no packet.
                probe_socket.connect(("192.0.2.1", 9))
                return str(probe_socket.getsockname()[0])
            except OSError:
                return socket.gethostname()
    return f"[{host}]" if ":" in host else host
