"""`finesight download`: a model or a data set from a hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from finesight.cli.options import AsJson
from finesight.remote.address import Address, any_address

HubSource = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="[hf:|modelscope:]OWNER/NAME for a model, hf:datasets/OWNER/NAME or "
        "modelscope:datasets/OWNER/NAME for a data set; @REVISION after it as needed, and :SPLIT "
        "after a data set.",
    ),
]
To = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="A folder that does not exist yet, in place of the cache."),
]


def download(source: HubSource, to: To = None, as_json: AsJson = False) -> None:
    """Fetch a model or a data set from a hub, and print its folder.

    Every file is verified by the size and the digest that the hub lists; ModelScope lists some
    without. What was cut off goes on where it stopped when the command is given again. Only data
    are fetched, never code. The addresses of the hubs are HF_ENDPOINT and MODELSCOPE_ENDPOINT, the
    tokens HF_TOKEN and MODELSCOPE_API_TOKEN. With HF_HUB_OFFLINE=1 nothing is asked, of either hub,
    and what is in the cache is used.

    Example: finesight download modelscope:Qwen/Qwen2-VL-2B-Instruct --to models/qwen
    """
    address = any_address(source)
    folder = _fetched(address, to)
    found = {"source": str(address), "folder": str(folder)}
    typer.echo(json.dumps(found, ensure_ascii=False) if as_json else folder)


def _fetched(address: Address, to: Path | None) -> Path:
    from finesight.data.hub_parts import repository_files
    from finesight.hub import WANTED
    from finesight.remote.repository import deliver, fetch_model, model_files, open_repository

    is_model = address.kind == "model"
    if is_model and to is None:
        return fetch_model(address, WANTED)
    found = open_repository(address)
    paths = model_files(found, WANTED) if is_model else repository_files(found)
    if to is None:
        return found.fetch(paths)
    deliver(found, paths, to)
    return to
