"""Access to the pages: password, host, proxies, and the printed address."""

from __future__ import annotations

import secrets
import shlex
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from finesight.credentials import is_readable_by_others, read_secret_file
from finesight.errors import UserError
from finesight.files.bounded_files import translate_os_errors
from finesight.operations.operation import Parameter
from finesight.progress import ProgressConsole

if TYPE_CHECKING:
    import socket

    from finesight.app.server import Access


TrustedProxyOption = Annotated[
    list[str] | None,
    Parameter(
        "Address or network of a proxy in front of the server, whose header X-Forwarded-For "
        "names the client. Repeatable. Default: the header is ignored.",
        metavar="ADDRESS",
    ),
]

SocketOption = Annotated[
    Path | None,
    Parameter(
        "Listen on a Unix socket instead, for a proxy of this user, such as the studio. It "
        "needs no password.",
        option="--socket",
        metavar="FILE",
    ),
]

Password = tuple[str | None, bool]
"""Password of a page, None for an open one, and whether it was generated."""

MIN_PASSWORD_LENGTH = 16
"""Minimum characters of a chosen password, whose length makes guesses hopeless."""

PageHostOption = Annotated[
    str,
    Parameter(
        "Address to listen on. 127.0.0.1: this machine only. 0.0.0.0: also the network, "
        "with a password."
    ),
]
PasswordFileOption = Annotated[
    Path | None,
    Parameter(
        "File with the password, of at least 16 characters. Default: no password on 127.0.0.1 "
        "without --trusted-proxy; otherwise, a generated one is printed.",
        path="file",
    ),
]
NoAuthOption = Annotated[
    bool, Parameter("Require no password, also from the network.", option="--no-auth")
]


def announce_page(
    name: str, host: str, listener: socket.socket, password: Password, *, open_page: bool = False
) -> Access:
    """Print the address of a page and any generated password, and return who may use the page.

    With `open_page`, the default browser opens the page. It waits for the server to start.
    """
    from finesight.app.server import Access
    from finesight.serve.http_protocol import is_loopback

    bound, (secret, is_generated) = listener.getsockname(), password
    if isinstance(bound, str):
        print(f"listening on {bound}", flush=True)
        return Access(loopback_only=False)
    address = f"http://{_get_reachable_host(host)}:{bound[1]}"
    print(address, flush=True)
    if is_generated:
        print(f"password: {secret}", flush=True)
    if is_generated and not is_loopback(host):
        warning = "The page uses HTTP without encryption: the password is sent as plain text."
        print(warning, flush=True)
    if open_page:
        import threading
        import webbrowser

        def open_browser() -> None:
            if not webbrowser.open(address):
                print("no browser found: open the address above in a browser", flush=True)

        # In a thread, because browsers in the terminal return at their end.
        threading.Thread(target=open_browser, daemon=True).start()
    # Cookies do not consider the port, so their names have it.
    return Access(secret, is_loopback(bound[0]), cookie=f"finesight-{name}-{bound[1]}")


def resolve_password(
    host: str,
    file: Path | None,
    no_auth: bool,
    proxies: Sequence[str],
    *,
    open_loopback: bool = True,
) -> Password:
    """Return the password of a page.

    A page is open by default on a loopback address without proxies, which forward the requests of
    other machines.
    """
    if file is not None and no_auth:
        raise build_option_error("--no-auth", f"with --password-file {file}", "one of them")
    if file is not None:
        return _read_password(file), False
    from finesight.serve.http_protocol import is_loopback

    if no_auth or (open_loopback and is_loopback(host) and not proxies):
        return None, False
    return secrets.token_urlsafe(18), True


def _read_password(file: Path) -> str:
    with translate_os_errors(file, "a text file with the password", "correct --password-file"):
        password = read_secret_file(file).strip()
        warn_of_readers(file)
    if len(password) < MIN_PASSWORD_LENGTH:
        raise UserError(
            f"the password has {len(password)} characters",
            where=str(file),
            expected=f"at least {MIN_PASSWORD_LENGTH}",
            remedy="choose a longer password, or remove --password-file to generate one",
        )
    return password


def warn_of_readers(file: Path) -> None:
    if is_readable_by_others(file):
        command = shlex.join(["chmod", "600", str(file)])
        ProgressConsole().log(f"warning: other users can read {file}; {command} prevents it")


def check_proxies(proxies: Sequence[str] | None) -> tuple[str, ...]:
    """Return the addresses of trusted proxies. Raises UserError for an invalid one."""
    import ipaddress

    for proxy in proxies or ():
        try:
            ipaddress.ip_network(proxy)
        except ValueError as error:
            raise UserError(
                f"{proxy!r:.80} is not an address: {error}",
                where="--trusted-proxy",
                expected="the IP address or network of a proxy, such as 10.0.0.5 or 10.0.0.0/24",
                remedy="correct the option",
            ) from error
    return tuple(proxies or ())


def _get_reachable_host(host: str) -> str:
    """Return the host name for the printed URL.

    For a wildcard address (`0.0.0.0` or `::`), return the address of the outgoing network
    interface, or the host name of the machine.
    """
    import socket

    if host in ("0.0.0.0", "::"):
        with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe_socket:
            # Selects the outgoing interface for a documentation address; sends no packet.
            probe_socket.connect(("192.0.2.1", 9))
            return str(probe_socket.getsockname()[0])
        return socket.gethostname()
    return f"[{host}]" if ":" in host else host


def build_option_error(option: str, other: str, expected: str) -> UserError:
    remedy = "add or remove one of the options"
    return UserError(f"{option} is given {other}", where=option, expected=expected, remedy=remedy)
