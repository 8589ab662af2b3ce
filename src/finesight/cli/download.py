"""`finesight download`: download a model or dataset from a hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from finesight.cli.options import AsJsonOption
from finesight.hub.address import HubAddress, parse_address

HubSourceArgument = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="OWNER/NAME or modelscope:OWNER/NAME for a model, hf:datasets/OWNER/NAME or "
        "modelscope:datasets/OWNER/NAME for a dataset; optional @REVISION, and :SPLIT for a "
        "dataset. Default hub: Hugging Face (hf:).",
    ),
]
ToFolderOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER", help="Folder to create for the files. Default: the hub cache (HF_HOME)."
    ),
]


def download(
    source: HubSourceArgument, to: ToFolderOption = None, as_json: AsJsonOption = False
) -> None:
    """Download a model or dataset from a hub and print its folder.

    Each file is verified with the size and digest from the hub; some ModelScope files have no
    digest. Run the command again to resume an interrupted download. Only data files are downloaded,
    no code. Environment variables: HF_ENDPOINT, MODELSCOPE_ENDPOINT (hub URLs), HF_TOKEN,
    MODELSCOPE_API_TOKEN (tokens), HF_HUB_OFFLINE=1 (use only the cache, for both hubs).

    Example: finesight download modelscope:Qwen/Qwen2-VL-2B-Instruct --to models/qwen
    """
    address = parse_address(source)
    folder = _fetch_repository(address, to)
    result = {"source": str(address), "folder": str(folder)}
    typer.echo(json.dumps(result, ensure_ascii=False) if as_json else folder)


def _fetch_repository(address: HubAddress, to: Path | None) -> Path:
    from finesight.data.source_fetch import select_repository_files
    from finesight.hub.repository import (
        download_folder,
        fetch_model,
        open_repository,
        select_model_files,
    )
    from finesight.model_folder import DOWNLOAD_PATTERNS

    is_model = address.repo_type == "model"
    if is_model and to is None:
        return fetch_model(address, DOWNLOAD_PATTERNS)
    repository = open_repository(address)
    paths = (
        select_model_files(repository, DOWNLOAD_PATTERNS)
        if is_model
        else select_repository_files(repository)
    )
    if to is None:
        return repository.fetch_files(paths)
    download_folder(repository, paths, to)
    return to
