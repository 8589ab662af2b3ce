"""`finesight web`: start a chat UI in the browser."""

from __future__ import annotations

import secrets
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from finesight.cli.options import (
    DeviceOption,
    PortOption,
    PrecisionOption,
    RunOrModelArgument,
    WeightFormatOption,
)
from finesight.errors import UserError

MIN_PASSWORD_LENGTH = 8


def web(
    run_or_model: RunOrModelArgument,
    host: Annotated[
        str,
        typer.Option(
            help="Address to listen on. 127.0.0.1: this machine only. 0.0.0.0: also the network, "
            "with a password."
        ),
    ] = "127.0.0.1",
    port: PortOption = 7860,
    password_file: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False,
            help="File with the password, of at least 8 characters. Default: no password on "
            "127.0.0.1; for other addresses, a generated one is printed.",
        ),
    ] = None,
    no_password: Annotated[
        bool, typer.Option("--no-password", help="Require no password, also from the network.")
    ] = False,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    weight_format: WeightFormatOption = "auto",
) -> None:
    """Start a chat UI in the browser.

    The page shows predicted boxes and compares answers with the base model. Prints its address.
    Ctrl-C stops the server. Requires finesight[web].

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
    """Return the password of the chat UI, and whether it was generated.

    The password is None if the chat UI is open.
    """
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
    """Return the host name for the printed URL.

    For a wildcard address (`0.0.0.0` or `::`), return the address of the outgoing network
    interface, or the host name of the machine.
    """
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
