"""`finesight download`: a model or dataset of a hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from finesight.errors import Step, UserError
from finesight.files.hub_address import HubAddress, parse_address
from finesight.operations.operation import Outcome, Parameter, StrPath, to_path


def download(
    source: str, to: Annotated[StrPath | None, Parameter(metavar="FOLDER")] = None
) -> Outcome[Path]:
    """Download a model or dataset from a hub and print its folder.

    Each file is verified with the size and digest from the hub; some ModelScope files have no
    digest. Run the command again to resume an interrupted download. Only data files are downloaded,
    no code. Environment variables: HF_ENDPOINT, MODELSCOPE_ENDPOINT (hub URLs), HF_TOKEN,
    MODELSCOPE_API_TOKEN (tokens), HF_HUB_OFFLINE=1 (use only the cache, for both hubs).

    Example: finesight download modelscope:Qwen/Qwen2-VL-2B-Instruct --to models/qwen

    Args:
        source: OWNER/NAME or modelscope:OWNER/NAME for a model, hf:datasets/OWNER/NAME or
            modelscope:datasets/OWNER/NAME for a dataset; optional @REVISION, and :SPLIT for a
            dataset. Default hub: Hugging Face (hf:).
        to: Folder to create for the files. Default: the hub cache (HF_HOME).
    """
    address = parse_address(source)
    folder = _fetch_repository(address, to_path(to))
    data = {"source": str(address), "folder": folder}
    return Outcome(folder, [str(folder)], data, _propose_use(address, folder))


def _propose_use(address: HubAddress, folder: Path) -> list[Step]:
    """Return the next step with a downloaded repository; none for a model that is unsupported."""
    from finesight.encode.renderer_builder import build_renderer
    from finesight.files.storage import find_free_path
    from finesight.infer.model_loader import resolve_model_source

    if address.repo_type != "model":
        out = find_free_path(Path(address.repo_id.rpartition("/")[2]))
        return [Step("import", {"source": folder, "out": out})]
    try:
        build_renderer(resolve_model_source(str(folder)).folder)
    except UserError:
        return []
    return [Step("chat", {"run_or_model": folder})]


def _fetch_repository(address: HubAddress, to: Path | None) -> Path:
    from finesight.files.storage import check_new_path
    from finesight.hub import repository as hub_repository
    from finesight.ingest.source_fetch import select_repository_files
    from finesight.model_folder import DOWNLOAD_PATTERNS

    if to is not None:
        check_new_path(to)
    is_model = address.repo_type == "model"
    if is_model and to is None:
        return hub_repository.fetch_model(address, DOWNLOAD_PATTERNS)
    repository = hub_repository.open_repository(address)
    if is_model:
        paths = hub_repository.select_model_files(repository, DOWNLOAD_PATTERNS)
    else:
        paths = select_repository_files(repository)
    if to is None:
        return repository.fetch_files(paths)
    hub_repository.download_folder(repository, paths, to)
    return to
