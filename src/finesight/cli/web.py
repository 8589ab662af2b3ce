"""`finesight web`: a page to talk with a model about pictures."""

from __future__ import annotations

import secrets
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from finesight.cli.options import Device, Precision, RunOrModel, Weights
from finesight.errors import UserError

LEAST_PASSWORD = 8


def web(
    run_or_model: RunOrModel,
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0 is reached from the whole network.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 7860,
    password_file: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False,
            help="A file with the password to ask for; beyond this machine one is made up else.",
        ),
    ] = None,
    anybody: Annotated[
        bool, typer.Option("--open", help="No password, also for the whole network.")
    ] = False,
    device: Device = "auto",
    precision: Precision = "auto",
    weights: Weights = "auto",
) -> None:
    """Serve a page to talk with a model: pictures, boxes drawn, tuned beside base. Ctrl-C ends it.

    Example: finesight web runs/latex
    """
    _need_gradio()
    password, made_up = _password(host, password_file, anybody)

    from finesight.infer.load import load_choice
    from finesight.infer.service import Service
    from finesight.web.server import listening, serve

    with listening(host, port) as listener:
        service = Service(load_choice(run_or_model, (), device, precision, weights))
        try:
            typer.echo(f"http://{_name(host)}:{listener.getsockname()[1]}")
            if made_up:
                typer.echo(f"password: {password}")
                typer.echo("It goes over the network as it is: the page is plain HTTP.")
            serve(service, listener, password, _is_loopback(host))
        finally:
            service.close(finish=False)


def _need_gradio() -> None:
    if find_spec("gradio") is None:
        raise UserError(
            "gradio is not installed",
            where="finesight web",
            expected="the extra web",
            remedy="pip install 'finesight[web]'",
        )


def _password(host: str, file: Path | None, anybody: bool) -> tuple[str | None, bool]:
    """The password to ask for, if any, and whether it was made up here."""
    if file is not None and anybody:
        raise UserError(
            f"--open is given together with --password-file {file}",
            where="--open",
            expected="one of the two",
            remedy="leave one of the two out",
        )
    if file is not None:
        return _read_password(file), False
    if anybody or _is_loopback(host):
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
    if len(password) < LEAST_PASSWORD:
        raise UserError(
            f"a password of {len(password)} characters",
            where=str(file),
            expected=f"at least {LEAST_PASSWORD}",
            remedy="write a longer one, or leave --password-file out to have one made up",
        )
    return password


def _is_loopback(host: str) -> bool:
    import ipaddress

    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _name(host: str) -> str:
    """What to type into a browser: the address by which others reach this machine, where it listens
    at all it has."""
    import socket

    if host in ("0.0.0.0", "::"):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as chosen:
            try:
                # Nothing is sent: only the way out is looked up, to an address that is nobody's.
                chosen.connect(("192.0.2.1", 9))
                return str(chosen.getsockname()[0])
            except OSError:
                return socket.gethostname()
    return f"[{host}]" if ":" in host else host
