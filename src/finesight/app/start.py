"""Start the HTTP server, the chat page or the studio."""

from __future__ import annotations

import json
import mimetypes
import os
import secrets
import shlex
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Unpack

from finesight.app.page_access import (
    NoAuthOption,
    PageHostOption,
    PasswordFileOption,
    SocketOption,
    TrustedProxyOption,
    announce_page,
    build_option_error,
    check_proxies,
    resolve_password,
    warn_of_readers,
)
from finesight.errors import Step, UserError, escape_unprintable_json
from finesight.operations.model import load_adapters
from finesight.operations.operation import Parameter, require_extra
from finesight.operations.options import LoadingOptions, PortOption, RunOrModelArgument
from finesight.progress import ProgressConsole
from finesight.serve.model_server import SERVER_PACKAGES

if TYPE_CHECKING:
    from finesight.infer.model_loader import InferenceModel
    from finesight.samples.example_question import ExampleQuestion
    from finesight.samples.prompt_format import PromptFormat


AdapterOption = Annotated[
    list[str] | None,
    Parameter(
        "Additional run or adapter of the same base model. Requests and the chat select it by "
        "folder name. Repeatable.",
        metavar="RUN",
        path="name",
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
    require_extra("serve", "serve", SERVER_PACKAGES)
    from finesight.encode.renderer import require_native
    from finesight.infer.model_loader import resolve_model_source
    from finesight.samples.example_question import read_example
    from finesight.samples.prompt_format import PromptFormat
    from finesight.serve.api_schema import ServerLimits
    from finesight.serve.api_server import run_api_server
    from finesight.serve.http_protocol import bind_socket
    from finesight.serve.label_studio_backend import TOKEN_VARIABLE, LabelStudioOptions
    from finesight.serve.media_sources import LabelStudioImages, read_formats
    from finesight.serve.request_middleware import check_exposure, read_api_keys
    from finesight.settings.manifest import find_run_dir

    if not label_studio and (label_studio_files or label_studio_url or label_studio_prompt):
        names = "--label-studio-files, --label-studio-url, --label-studio-prompt"
        raise build_option_error(names, "without --label-studio", "--label-studio")
    # A mistyped path is reported before a port in use.
    source, *_ = [resolve_model_source(name) for name in (run_or_model, *(adapter or ()))]
    page = Step("web", {"run_or_model": run_or_model}, "start a chat page")
    require_native(source.folder, "serve", page)
    formats = read_formats(image_format or ())
    keys, proxies = read_api_keys(key_file), check_proxies(trusted_proxy)
    if key_file is not None:
        warn_of_readers(key_file)
    if socket_file is None:
        check_exposure(host, keys, proxies)
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
        on_ready=lambda service, stop: print_address(service.model_names),
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
    from finesight.samples.image_file import get_file
    from finesight.serve.media_sources import DEFAULT_IMAGE_FORMATS

    media_type = mimetypes.guess_type(path)[0] or "image/jpeg"
    is_page = get_file(Path(path)) != Path(path)  # or a file in an archive
    if is_page or media_type.removeprefix("image/").upper() not in DEFAULT_IMAGE_FORMATS:
        return ""
    return media_type


WEB_MAX_NUM_SEQS = 8
"""Maximum number of concurrent answers of the chat page; further ones wait."""

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
    from finesight.files.storage import temporary_folder
    from finesight.infer.inference_service import InferenceService
    from finesight.samples.run_examples import has_single_questions
    from finesight.serve.http_protocol import bind_socket
    from finesight.serve.preprocessing_jobs import encode_in_worker
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

    The steps are Data, Label, Check, Plan, Train, Results, Use, and Use in a program. The page
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
    from finesight.files.storage import temporary_folder
    from finesight.serve.http_protocol import bind_socket

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
