"""Start the HTTP server, the chat page, the studio or the labelling page."""

from __future__ import annotations

import json
import mimetypes
import os
import secrets
import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Unpack

from finesight.bounded_files import translate_os_errors
from finesight.credentials import is_readable_by_others, read_secret_file
from finesight.errors import Step, UserError, escape_unprintable_json
from finesight.operations.dataset import build_init_step
from finesight.operations.model import (
    get_prompt_format,
    list_gpus,
    load_adapters,
    load_model,
)
from finesight.operations.operation import (
    EXIT_SKIPPED,
    Outcome,
    Parameter,
    StrPath,
    list_words,
    to_path,
)
from finesight.operations.options import (
    LoadingOptions,
    MaxNewTokensOption,
    PortOption,
    RunOrModelArgument,
)
from finesight.progress import ProgressConsole

if TYPE_CHECKING:
    import socket

    from finesight.app.server import Access
    from finesight.config import Recipe
    from finesight.data.example_question import ExampleQuestion
    from finesight.data.prompt_format import PromptFormat
    from finesight.infer.model_loader import InferenceModel

TrustedProxyOption = Annotated[
    list[str] | None,
    Parameter(
        "Address or network of a proxy in front of the server, whose header X-Forwarded-For "
        "names the client. Repeatable. Default: the header is ignored.",
        metavar="ADDRESS",
    ),
]


AdapterOption = Annotated[
    list[str] | None,
    Parameter(
        "Additional run or adapter of the same base model. Requests and the chat select it by "
        "folder name. Repeatable.",
        metavar="RUN",
        path="name",
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


def serve(
    run_or_model: RunOrModelArgument,
    adapter: AdapterOption = None,
    host: str = "127.0.0.1",
    port: PortOption = 8000,
    socket_file: SocketOption = None,
    key_file: Path | None = None,
    trusted_proxy: TrustedProxyOption = None,
    data_parallel_size: Annotated[int, Parameter(minimum=1)] = 1,
    allow_media_host: Annotated[list[str] | None, Parameter(metavar="HOST")] = None,
    image_format: Annotated[list[str] | None, Parameter(metavar="FORMAT")] = None,
    label_studio: bool = False,
    label_studio_files: Annotated[
        Path | None, Parameter(metavar="FOLDER", path="existing folder")
    ] = None,
    label_studio_url: Annotated[str | None, Parameter(metavar="URL")] = None,
    label_studio_prompt: str | None = None,
    max_num_seqs: Annotated[int | None, Parameter(minimum=1)] = None,
    max_queue: Annotated[int, Parameter(minimum=0)] = 256,
    timeout: Annotated[float, Parameter(minimum=1)] = 300.0,
    **loading: Unpack[LoadingOptions],
) -> None:
    """Start an OpenAI-compatible HTTP server (POST /v1/chat/completions).

    Prints its base URL and an example request with curl. Ctrl-C stops the server.

    Example: finesight serve runs/latex

    Args:
        host: Address to listen on. 127.0.0.1: this machine only. 0.0.0.0: also the network, which
            requires an API key, as does --trusted-proxy.
        key_file: File with one API key per line, each of at least 16 characters. Requests then need
            the header "Authorization: Bearer KEY". Default: the environment variable FINESIGHT_KEY,
            if set, else no key.
        data_parallel_size: Number of replicas of the model, one per GPU. Each is a process that
            restarts after a crash.
        allow_media_host: Allow image downloads over https from this host. Repeatable.
        image_format: Additional image format besides JPEG, PNG, WEBP and GIF: AVIF, BMP, HEIF,
            JPEG2000, PDF, PPM or TIFF. Repeatable.
        label_studio: Also serve an ML backend for Label Studio at the path /label-studio. It
            predicts boxes, choices and texts of the labeling configuration.
        label_studio_files: With --label-studio: folder of the images, the root of local files of
            Label Studio or its media folder. Other local files are not read.
        label_studio_url: With --label-studio: load images from this Label Studio server, with the
            access token of the environment variable LABEL_STUDIO_API_KEY.
        label_studio_prompt: With --label-studio: question about the images; {labels} inserts the
            class names. Default: the question of `import` for each control.
        max_num_seqs: Maximum number of answers that are generated at the same time. Default: 64, or
            fewer for a model with linear attention if the GPU has little memory.
        max_queue: Maximum number of waiting requests; further ones get HTTP status 429.
        timeout: Seconds from the first byte of a request, waiting included, until it is canceled.
    """
    arguments = {**locals(), **loading}
    packages = ("starlette", "uvicorn", "prometheus_client", "python_multipart", "llguidance")
    require_extra("serve", "serve", packages)
    from finesight.data.example_question import read_example
    from finesight.data.prompt_format import PromptFormat
    from finesight.encode.renderer import require_native
    from finesight.infer.model_loader import resolve_model_source
    from finesight.manifest import find_run_dir
    from finesight.serve.api_schema import ServerLimits
    from finesight.serve.api_server import run_api_server
    from finesight.serve.http_protocol import bind_socket
    from finesight.serve.label_studio_backend import TOKEN_VARIABLE, LabelStudioOptions
    from finesight.serve.media_sources import LabelStudioImages, read_formats
    from finesight.serve.replica_router import build_environments, run_replicas
    from finesight.serve.request_middleware import check_exposure, read_api_keys

    if not label_studio and (label_studio_files or label_studio_url or label_studio_prompt):
        names = "--label-studio-files, --label-studio-url, --label-studio-prompt"
        raise _build_option_error(names, "without --label-studio", "--label-studio")
    # A mistyped path is reported before a port in use.
    source, *_ = [resolve_model_source(name) for name in (run_or_model, *(adapter or ()))]
    page = Step("web", {"run_or_model": run_or_model}, "start a chat page")
    require_native(source.folder, "serve", page)
    formats = read_formats(image_format or ())
    keys, proxies = read_api_keys(key_file), check_proxies(trusted_proxy)
    if key_file is not None:
        _warn_of_readers(key_file)
    if socket_file is None:
        check_exposure(host, keys, proxies)
    environments = build_environments(data_parallel_size, list_gpus(loading.get("device", "auto")))
    listener = bind_socket(host, port, socket_file)
    limits = ServerLimits(max_queue=max_queue, timeout=timeout)
    backend = None
    if label_studio:
        token = os.environ.get(TOKEN_VARIABLE)
        images = LabelStudioImages(label_studio_files, label_studio_url, token, limits)
        backend = LabelStudioOptions(images, label_studio_prompt)
    address = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}/v1"
    # curl reads the API key from its file or environment variable.
    key = f"$(grep -m 1 '^[^#]' {shlex.quote(str(key_file))})" if key_file else "$FINESIGHT_KEY"
    curl_options = f' -H "Authorization: Bearer {key}"' if keys else ""
    if socket_file is not None:
        address = "http://localhost/v1"
        curl_options += f" --unix-socket {shlex.quote(str(socket_file))}"
    print_address = partial(
        _print_address,
        address,
        read_example(find_run_dir(Path(run_or_model))) if source.manifest else None,
        PromptFormat.from_manifest(source.manifest),
        curl_options=curl_options,
        has_label_studio=label_studio,
    )
    if data_parallel_size > 1:
        # The router alone has the address and the keys.
        for name in ("loading", "host", "port", "socket_file", "key_file", "trusted_proxy"):
            del arguments[name]
        run_replicas(
            list_words(Step("serve", arguments | {"data_parallel_size": 1})),
            environments,
            listener,
            api_keys=keys,
            limits=limits,
            trusted_proxies=proxies,
            on_ready=print_address,
        )
        return
    inference_model = load_adapters(run_or_model, adapter or (), **loading)
    max_num_seqs = max_num_seqs or _select_num_seqs(inference_model, limits.max_num_seqs)
    run_api_server(
        inference_model,
        listener,
        api_keys=keys,
        limits=replace(limits, max_num_seqs=max_num_seqs),
        allowed_media_hosts=allow_media_host or (),
        image_formats=formats,
        label_studio=backend,
        trusted_proxies=proxies,
        on_ready=lambda service: print_address(service.model_names),
    )


def _select_num_seqs(inference_model: InferenceModel, default: int) -> int:
    """Return the default number of concurrent answers; print it if GPU memory limits it."""
    from finesight.infer.inference_service import fit_num_seqs

    num_seqs = fit_num_seqs(inference_model, default)
    if num_seqs < default:
        text = f"at most {num_seqs} answers at the same time instead of {default}"
        ProgressConsole().log(f"{text}, because of the GPU memory for linear attention")
    return num_seqs


def _print_address(
    address: str,
    example: ExampleQuestion | None,
    prompt_format: PromptFormat,
    model_names: Sequence[str],
    *,
    curl_options: str,
    has_label_studio: bool,
) -> None:
    """Print the base URL of the server and an example request with curl.

    Args:
        example: Question of the request; None for a text.
        prompt_format: Order of its images and text.
        curl_options: Options of curl for the API key and the socket, each after a space.
    """
    print(f"serving {', '.join(model_names)} at {address}", flush=True)
    curl = f"curl {address}/chat/completions{curl_options} -H 'Content-Type: application/json'"
    content: str | list[dict[str, Any]] = "Hello"
    marks: dict[str, str] = {}
    if example is not None and all(map(_get_image_type, example.images)):
        # Neither the prompt nor the name of the model contains the placeholder of an image.
        marks = {secrets.token_hex(16): image for image in example.images}
        urls = [f"data:{_get_image_type(image)};base64,{mark}" for mark, image in marks.items()]
        try:
            content = prompt_format.build_request_content(example.prompt, urls)
        except UserError:  # a prompt of a manifest that was edited
            marks = {}
    message = {"role": "user", "content": content}
    body = json.dumps({"model": model_names[0], "messages": [message]}, ensure_ascii=False)
    body = escape_unprintable_json(body)
    if marks:
        # An image exceeds the maximum length of an argument.
        commands = []
        for mark, image in marks.items():
            start, body = body.split(mark)
            commands.append(f"printf %s {shlex.quote(start)}")
            commands.append(f"base64 < {shlex.quote(image)} | tr -d '\\n'")
        commands.append(f"printf %s {shlex.quote(body)}")
        print(f"  ({'; '.join(commands)}) | {curl} -d @-", flush=True)
    else:
        print(f"  {curl} -d {shlex.quote(body)}", flush=True)
    if has_label_studio:
        backend = f"{address.removesuffix('/v1')}/label-studio"
        print(f"  ML backend of Label Studio: {backend}", flush=True)


def _get_image_type(path: str) -> str:
    """Return the media type of an image for an example request; empty for others."""
    from finesight.data.image_file import get_file
    from finesight.serve.media_sources import DEFAULT_IMAGE_FORMATS

    media_type = mimetypes.guess_type(path)[0] or "image/jpeg"
    is_page = get_file(Path(path)) != Path(path)  # or a file in an archive
    if is_page or media_type.removeprefix("image/").upper() not in DEFAULT_IMAGE_FORMATS:
        return ""
    return media_type


Password = tuple[str | None, bool]
"""Password of a page, None for an open one, and whether it was generated."""

MIN_PASSWORD_LENGTH = 16
"""Minimum characters of a chosen password, whose length makes guesses hopeless."""

WEB_MAX_NUM_SEQS = 8
"""Maximum number of concurrent answers of the chat page; further ones wait."""

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

MAX_STUDIO_UPLOAD_BYTES = 160 << 20
"""Maximum size of a file that the studio imports, such as an archive."""

STUDIO_UPLOAD_TTL_S = 300
"""Seconds for which the files of an action, which copies them, are kept without enough space."""

OpenOption = Annotated[bool, Parameter("Open the page in the default browser.", option="--open")]


def web(
    run_or_model: RunOrModelArgument,
    adapter: AdapterOption = None,
    host: PageHostOption = "127.0.0.1",
    port: PortOption = 7860,
    password_file: PasswordFileOption = None,
    no_auth: NoAuthOption = False,
    trusted_proxy: TrustedProxyOption = None,
    socket_file: SocketOption = None,
    open_page: OpenOption = False,
    **loading: Unpack[LoadingOptions],
) -> None:
    """Start a chat UI in the browser.

    The page shows predicted boxes, formulas and JSON, and compares answers of runs and of their
    base model. Prints its address. Ctrl-C stops the server. Requires finesight[web].

    Example: finesight web runs/latex
    """
    require_extra("web")
    proxies = check_proxies(trusted_proxy)
    password = resolve_password(host, password_file, no_auth or bool(socket_file), proxies)

    from finesight.app.chat_page import make_chat_app
    from finesight.app.server import serve_app
    from finesight.infer.inference_service import InferenceService
    from finesight.label.label_session import has_single_questions
    from finesight.serve.http_protocol import bind_socket
    from finesight.serve.preprocessing_jobs import encode_in_worker
    from finesight.storage import temporary_folder
    from finesight.vision.image_reader import create_image_pool

    with bind_socket(host, port, socket_file) as listener:
        inference_model = load_adapters(run_or_model, adapter or (), **loading)
        num_seqs = _select_num_seqs(inference_model, WEB_MAX_NUM_SEQS)
        pool = create_image_pool(inference_model.renderer, encode_in_worker.__module__)
        service = InferenceService(
            inference_model, max_num_seqs=num_seqs, encode_prompt=partial(encode_in_worker, pool)
        )
        try:
            access = announce_page("chat", host, listener, password, open_page=open_page)
            with temporary_folder("web") as folder, closing(pool):
                pool.start()
                is_single = has_single_questions(run_or_model)
                app = make_chat_app(service, folder, pool, access, ask_alone=is_single)
                serve_app(app, listener, pool, proxies)
        finally:
            service.close(wait_for_running=False)


def studio(
    folder: Annotated[
        Path, Parameter(metavar="WORKSPACE", is_positional=True, path="existing folder")
    ] = Path(),
    host: PageHostOption = "127.0.0.1",
    port: PortOption = 7870,
    password_file: Annotated[Path | None, Parameter(path="file")] = None,
    no_auth: Annotated[bool, Parameter(option="--no-auth")] = False,
    trusted_proxy: TrustedProxyOption = None,
    open_page: OpenOption = False,
    api_port: Annotated[int, Parameter(minimum=0, maximum=65535)] = 7872,
    teacher: Annotated[str | None, Parameter(metavar="URL")] = None,
) -> None:
    """Start a web UI for import, data check, training, evaluation and serving.

    The steps are Data, Label, Check, Plan, Train, Results, Chat, and Serve and export. The page
    shows the commands that it starts. They run in processes of their own and continue when the page
    or this command ends. Ctrl-C stops the page. Requires finesight[web].

    Example: finesight studio work

    Args:
        folder: Folder for data sets, recipes and runs.
        password_file: File with the password, of at least 16 characters. Default: a generated one
            is printed.
        no_auth: Require no password, also from other users of the machine.
        api_port: Port of the HTTP API. 0: any free port.
        teacher: OpenAI-compatible server that may suggest labels, and receives images and prompts.
    """
    require_extra("studio")
    # The page starts commands as this user, so other users of the machine need a password too.
    proxies = check_proxies(trusted_proxy)
    password = resolve_password(host, password_file, no_auth, proxies, open_loopback=False)

    from finesight.app.server import serve_app
    from finesight.serve.http_protocol import bind_socket
    from finesight.storage import temporary_folder

    with bind_socket(host, port) as listener, temporary_folder("web") as uploads:
        from finesight.app.pages import UploadStore
        from finesight.app.studio_page import StudioPage, make_studio_app
        from finesight.app.studio_view import StudioView
        from finesight.app.workspace import Workspace

        # Recipes and runs name paths relative to the workspace, as commands in a terminal there.
        os.chdir(folder)
        workspace = Workspace(Path())
        workspace.remove_leftovers()
        view = StudioView(workspace)
        view.jobs.protect()
        store = UploadStore(uploads, MAX_STUDIO_UPLOAD_BYTES, used_ttl_s=STUDIO_UPLOAD_TTL_S)
        page = StudioPage(view, store, password[0] is not None, teacher, api_port)
        access = announce_page("studio", host, listener, password, open_page=open_page)
        access = replace(access, max_upload_bytes=MAX_STUDIO_UPLOAD_BYTES)
        serve_app(make_studio_app(page, access), listener, workspace.pool, proxies)


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


def require_extra(
    command: str, extra: str = "web", packages: Sequence[str] = ("starlette", "uvicorn")
) -> None:
    """Raise UserError if packages of an extra that a command needs are not installed."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise UserError(
            f"{' and '.join(missing)} cannot be imported",
            where=command,
            expected=f"the extra {extra}",
            remedy=f"pip install 'finesight[{extra}]'",
        )


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
        raise _build_option_error("--no-auth", f"with --password-file {file}", "one of them")
    if file is not None:
        return _read_password(file), False
    from finesight.serve.http_protocol import is_loopback

    if no_auth or (open_loopback and is_loopback(host) and not proxies):
        return None, False
    return secrets.token_urlsafe(18), True


def _read_password(file: Path) -> str:
    with translate_os_errors(file, "a text file with the password", "correct --password-file"):
        password = read_secret_file(file).strip()
        _warn_of_readers(file)
    if len(password) < MIN_PASSWORD_LENGTH:
        raise UserError(
            f"the password has {len(password)} characters",
            where=str(file),
            expected=f"at least {MIN_PASSWORD_LENGTH}",
            remedy="choose a longer password, or remove --password-file to generate one",
        )
    return password


def _warn_of_readers(file: Path) -> None:
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


def label(
    run_or_model: RunOrModelArgument,
    sources: Annotated[Sequence[StrPath], Parameter(metavar="IMAGES")],
    prompt: str | None = None,
    out: Annotated[StrPath | None, Parameter(metavar="FOLDER", path="folder")] = None,
    kind: Literal["text", "fields", "classes", "boxes", "points"] | None = None,
    classes: Annotated[str | None, Parameter(metavar="A,B,C")] = None,
    fields: Annotated[str | None, Parameter(metavar="A,B,C")] = None,
    review: Annotated[bool, Parameter(option="--review")] = False,
    train_fraction: Annotated[float | None, Parameter(minimum=0.0, maximum=1.0)] = None,
    suggestions: Annotated[bool, Parameter(option="--suggestions/--no-suggestions")] = True,
    suggest_only: Annotated[bool, Parameter(option="--suggest-only")] = False,
    teacher: Annotated[str | None, Parameter(metavar="URL|RUN_OR_MODEL", path="server")] = None,
    teacher_model: Annotated[str | None, Parameter(metavar="NAME")] = None,
    teacher_key: Annotated[str, Parameter(metavar="VARIABLE")] = "FINESIGHT_TEACHER_KEY",
    teacher_answers: Annotated[int, Parameter(minimum=2, maximum=32)] = 3,
    teacher_boxes: Literal["auto", "pixels", "thousandths", "thousandths-yx"] = "auto",
    teacher_pixels: Annotated[int, Parameter(minimum=1024)] = 2_000_000,
    teacher_budget: Annotated[int | None, Parameter(minimum=1, metavar="REQUESTS")] = None,
    teacher_concurrency: Annotated[int, Parameter(minimum=1, maximum=64)] = 4,
    max_new_tokens: MaxNewTokensOption = 512,
    batch_size: Annotated[int, Parameter(minimum=1)] = 16,
    host: PageHostOption = "127.0.0.1",
    port: PortOption = 7873,
    password_file: PasswordFileOption = None,
    no_auth: NoAuthOption = False,
    trusted_proxy: TrustedProxyOption = None,
    socket_file: SocketOption = None,
    on_record: Callable[[Mapping[str, Any]], None] | None = None,
    **loading: Unpack[LoadingOptions],
) -> Outcome[Mapping[str, int]]:
    """Suggest labels for images, and accept, correct or skip them on a page.

    The least certain suggestions come first. Each decision is saved at once. `finesight train`
    reads labels.jsonl. The next command is printed at the end. The page requires finesight[web].

    Example: finesight label runs/receipts photos

    Args:
        sources: Images, folders of images, or a JSONL file.
        prompt: Question about every image. Default: that of FOLDER or else the run.
        out: Folder of the labels (labels.jsonl) and their history (journal.jsonl). An existing one
            is continued. Default: that of the run's training data, else labels.
        kind: Kind of the answers. Default: detected from the training data.
        classes: Classes to choose from: the answers, or the labels of boxes. Default: those of the
            training data.
        fields: Keys of the JSON answers, with --kind fields. Default: those of the training data or
            of the existing labels.
        review: Review the existing answers of a JSONL file, most probably wrong first.
        train_fraction: Fraction of the labels for training; the others are in labels_eval.jsonl.
            Default: that of FOLDER, else 1.
        suggestions: Suggest answers with the model.
        suggest_only: Print the suggestions, and start no page.
        teacher: Source of the suggestions instead of RUN_OR_MODEL: another run or model, or an
            OpenAI-compatible server (https://HOST/v1), which receives the images and prompts.
        teacher_model: Name of the model on the server.
        teacher_key: Environment variable with the API key of the server.
        teacher_answers: Answers of the server per image; their agreement is the confidence.
        teacher_boxes: Frame of the coordinates of the server: pixels of the sent image, or
            thousandths of its sides, x or y first. auto: that in which it finds a drawn rectangle.
        teacher_pixels: Maximum size of the images for the server; larger ones are scaled.
        teacher_budget: Maximum number of requests to the server, with retries. Default: any number.
        teacher_concurrency: Requests to the server at the same time.
        batch_size: Answers generated at the same time; halved when GPU memory is exhausted.
    """
    from finesight.label.label_session import open_session
    from finesight.label.suggestion import rank_labels, suggest_labels
    from finesight.manifest import find_run_dir

    console = ProgressConsole()
    if on_record is not None and not suggest_only:
        raise _build_option_error("--json", "without --suggest-only", "--json with --suggest-only")
    for option, value in (("--suggest-only", suggest_only), ("--teacher", teacher)):
        if value and not suggestions:
            raise _build_option_error(option, "with --no-suggestions", "one of the two options")
    server, suggester = None, teacher or run_or_model
    if "://" in (teacher or ""):
        from finesight.label.teacher import TeacherSettings

        sizes = teacher_answers, teacher_pixels, teacher_budget, teacher_concurrency, max_new_tokens
        server = TeacherSettings(suggester, teacher_model, teacher_key, teacher_boxes, *sizes)
        suggester = server.name
    if suggestions:
        from finesight.model_folder import check_model_path

        for name in [run_or_model] if server else [run_or_model, suggester]:
            check_model_path(name)
    names, field_names = (
        [*dict.fromkeys(name.strip() for name in (text or "").split(",") if name.strip())]
        for text in (classes, fields)
    )
    if field_names and (names or kind not in (None, "fields")):
        other = f"with {'--classes' if names else f'--kind {kind}'}"
        raise _build_option_error("--fields", other, "--fields with --kind fields")
    paths, run_dir = [*map(Path, sources)], find_run_dir(Path(run_or_model))
    proxies, reviewed = check_proxies(trusted_proxy), paths if review else []
    # Answers are data of the user, so a page on the network needs a password.
    password = resolve_password(host, password_file, no_auth or bool(socket_file), proxies)
    folder = to_path(out) or _select_label_folder(run_dir, reviewed, console)
    suggested: list[dict[str, Any]] = []
    missing: list[str] = []
    with ExitStack() as stack:
        listener = None
        if not suggest_only:
            require_extra("label")
            from finesight.app.label_page import make_label_app
            from finesight.app.server import serve_app
            from finesight.serve.http_protocol import bind_socket
            from finesight.vision.image_reader import create_image_pool

            # A port in use is reported before the suggestions, which take minutes.
            listener = stack.enter_context(bind_socket(host, port, socket_file))
        options: dict[str, Any] = {"prompt": prompt, "kind": kind, "review": review}
        options |= {"choices": names, "field_names": field_names, "train_fraction": train_fraction}
        with console.activity("reading the samples"):
            session = open_session(folder, run_or_model, paths, **options)
        session.model = suggester
        stack.enter_context(session.store)
        if suggestions and server is None and not review:
            prompt_format = get_prompt_format(suggester)
            for note in prompt_format.describe_difference(session.task.prompt or "", num_images=1):
                console.log(f"note: {note}")
        if suggestions and (pending := session.store.list_unsuggested(suggester)):
            suggest: Callable[..., Any]
            if server is None:
                model = load_model(suggester, **loading).value.inference_model
                rank = rank_labels if review else suggest_labels
                suggest = partial(
                    rank,
                    model,
                    max_new_tokens=max_new_tokens,
                    batch_size=batch_size,
                    log=console.log,
                )
                del model
            else:
                from finesight.label.teacher import Teacher

                suggest = Teacher(server, session, console.log).suggest
            with console.progress_stage("suggestions", len(pending)) as on_progress:
                reasons = session.add_suggestions(suggest, on_progress)
            for reason in reasons.values():
                message = f"no suggestion: {reason}"
                if suggest_only:
                    missing.append(message)
                else:
                    console.log(message)
            del suggest
        session.complete_task()
        if listener is None:
            suggested = [session.describe_item(item) for item in session.store.items]
        else:
            pool, access = create_image_pool(), announce_page("label", host, listener, password)
            serve_app(make_label_app(session, access, pool), listener, pool, proxies)
    for one in suggested:
        if on_record is not None:
            on_record({key: value for key, value in one.items() if key != "history"})
    exit_code = 0
    if missing:
        exit_code = EXIT_SKIPPED
    counts = session.store.count_events()
    console.log(f"{', '.join(f'{count} {name}' for name, count in counts.items())}: {folder}")
    has_labels = any(n for name, n in counts.items() if name not in ("open", "skipped"))
    return Outcome(
        counts,
        [*map(_format_suggestion, suggested)],
        data=[],  # given to `on_record`
        next_steps=[_find_next_step(folder, run_dir, reviewed)] if has_labels else [],
        exit_code=exit_code,
        notes=missing,
    )


def _build_option_error(option: str, other: str, expected: str) -> UserError:
    remedy = "add or remove one of the options"
    return UserError(f"{option} is given {other}", where=option, expected=expected, remedy=remedy)


def _select_label_folder(run_dir: Path, reviewed: Sequence[Path], console: ProgressConsole) -> Path:
    """Return the folder of a review, of the labels in the recipe of the run, or `labels`."""
    from finesight.label.label_store import REVIEWED_FILE, can_review, find_label_folder
    from finesight.manifest import RECIPE_FILE
    from finesight.recipe import load_recipe
    from finesight.train.run_dir import RunDir

    if reviewed:
        default = Path("labels-review")
        folders = [file.parent for file in sorted(Path().glob(f"{default}*/{REVIEWED_FILE}"))]
        folders += [default, RunDir(default).next_path]
        out = next(one for one in folders if can_review(one, reviewed))
        console.log(f"reviewed labels: {out}")
        return out
    folder = None
    if (run_dir / RECIPE_FILE).is_file():
        with suppress(UserError):
            folder = find_label_folder(load_recipe(run_dir / RECIPE_FILE))
    if folder is not None:
        console.log(f"continuing the labels in {folder}, training data of {run_dir}")
    return folder or Path("labels")


def _find_next_step(out: Path, run_dir: Path, reviewed: Sequence[Path]) -> Step:
    """Return the next step for the labels in `out`.

    It trains with them, continues their review, or checks reviewed labels that replace no file of
    the recipe of the run. Without a recipe, it is `init`.

    Args:
        reviewed: Data files whose samples the labels contain.
    """
    from finesight.label.label_session import is_imported
    from finesight.label.label_store import LABELS_FILE, REVIEWED_FILE, read_sources
    from finesight.manifest import RECIPE_FILE
    from finesight.recipe import load_recipe
    from finesight.train.run_dir import RunDir

    labels, recipe = out / LABELS_FILE, run_dir / RECIPE_FILE
    init_step = build_init_step(labels)
    try:
        settings = load_recipe(recipe)
    except UserError:
        return init_step
    overrides: list[str] = []
    files = (*settings.data.train, *settings.data.eval)
    if os.path.abspath(labels) not in {os.path.abspath(file.path) for file in files}:
        folders = [Path(file.path).parent for file in settings.data.train]
        reviews = {folder: read_sources(folder, REVIEWED_FILE) for folder in folders}
        for folder, names in reviews.items():
            if os.path.realpath(labels) in names:
                arguments = {"sources": [*map(os.path.relpath, names)], "review": True}
                return Step("label", {"run_or_model": run_dir, **arguments, "out": folder})
        is_copy = not reviewed and is_imported(out, run_dir)
        if is_copy and not any(reviews.values()):
            return init_step
        overrides = [] if is_copy else _replace_reviewed_files(settings, out, reviewed)
        if not overrides:
            # No file of the recipe has exactly these samples, or one has copies of them.
            return Step("check", {"sources": [labels]})
    if settings.output_dir.exists():
        overrides.append(f"output_dir={RunDir(settings.output_dir).next_path}")
    return Step("train", {"recipe": recipe, "overrides": overrides})


def _replace_reviewed_files(recipe: Recipe, out: Path, reviewed: Sequence[Path]) -> list[str]:
    """Return the overrides of a recipe that train with labels instead of the reviewed files.

    New labels are added to the training data. Empty if no split of the recipe has all reviewed
    files.
    """
    from finesight.config import DataFileSettings
    from finesight.label.label_store import EVAL_FILE, LABELS_FILE

    labels, paths = out / LABELS_FILE, {*map(os.path.abspath, reviewed)}
    has_eval_labels = bool(reviewed) and (out / EVAL_FILE).exists()
    splits: dict[str, Sequence[DataFileSettings]] = {"train": recipe.data.train}
    if not has_eval_labels:
        splits["eval"] = recipe.data.eval
    for split, files in splits.items():
        replaced = [file for file in files if os.path.abspath(file.path) in paths]
        if not paths <= {os.path.abspath(file.path) for file in replaced}:
            continue
        added = replaced[0] if len(replaced) == 1 else DataFileSettings(path=labels)
        others = [file for file in files if file not in replaced]
        data = [*others, added.model_copy(update={"path": labels})]
        entries = [file.model_dump(mode="json", exclude_defaults=True) for file in data]
        items = [entry if len(entry) > 1 else entry["path"] for entry in entries]
        changes = [f"data.{split}={json.dumps(items)}"]
        return [*changes, f"data.eval={out / EVAL_FILE}"] if has_eval_labels else changes
    return []


def _format_suggestion(values: Mapping[str, Any]) -> str:
    score = values["confidence"] if values["score"] is None else values["score"]
    answer = values["suggestion"] or values["answer"]
    boxes = (f"{box['label'] or 'box'} {box['xyxy']}" for box in answer["boxes"])
    text = answer["text"] or ", ".join(boxes)
    return f"{'-' if score is None else f'{score:.3f}'}  {values['id']}  {text}"
