"""`finesight download`: a model or a data set from a hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

HubSource = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="[hf:|modelscope:]OWNER/NAME for a model, with datasets/ before OWNER for a data set; "
        "@REVISION after it as needed, and :SPLIT after a data set.",
    ),
]
To = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="A folder that does not exist yet, in place of the cache."),
]


def download(source: HubSource, to: To = None) -> None:
    """Fetch a model or a data set from a hub, and print its folder.

    Every file is verified by its size and digest. What was cut off goes on where it stopped when
    the command is given again. Only data are fetched, never code. The addresses of the hubs are
    HF_ENDPOINT and MODELSCOPE_ENDPOINT, the tokens HF_TOKEN and MODELSCOPE_API_TOKEN. With
    HF_HUB_OFFLINE=1 nothing is asked, of either hub, and what is in the cache is used.

    Example: finesight download modelscope:Qwen/Qwen2-VL-2B-Instruct --to models/qwen
    """
    from finesight.data.hub_parts import repository_files
    from finesight.hub import WANTED
    from finesight.remote.address import any_address
    from finesight.remote.repository import deliver, fetch_model, model_files, open_repository

    address = any_address(source)
    if address.kind == "model" and to is None:
        typer.echo(fetch_model(address, WANTED))
        return
    repository = open_repository(address)
    if address.kind == "model":
        paths = model_files(repository, WANTED)
    else:
        paths = repository_files(repository)
    if to is None:
        typer.echo(repository.fetch(paths))
    else:
        deliver(repository, paths, to)
        typer.echo(to)
