"""Model folder of a hub repository, whose weights are downloaded on access."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from finesight.errors import Step, UnavailableError, UserError
from finesight.files.hub_address import HubAddress, is_hub_address
from finesight.hub.repository import WEIGHT_SUFFIXES, HubRepository, open_model_repository
from finesight.model_folder import DOWNLOAD_PATTERNS, TINY_MODEL, ModelFolder


def open_hub_model(name: str, address: HubAddress) -> ModelFolder:
    """Open a model of a hub: the small files are downloaded now, the weights on access.

    Args:
        name: Name of the model as the user gave it, for errors.

    Raises:
        UserError: The repository does not exist, or cannot be downloaded.
    """
    try:
        repository = open_model_repository(address, DOWNLOAD_PATTERNS)
        small_files = [path for path in repository.paths if not path.endswith(WEIGHT_SUFFIXES)]
        folder = repository.download_files(small_files, repository.folder)
        fetch_weights = partial(_fetch_weights, repository, folder)
        require_space = partial(repository.require_space, repository.paths, folder)
        return ModelFolder(folder, fetch_weights, require_space)
    except UserError as error:
        if isinstance(error, UnavailableError) and isinstance(error.remedy, str):
            error.remedy += f"; the bundled {TINY_MODEL} needs no download"
        if is_hub_address(name):
            raise
        raise type(error)(
            f"{name} is not a local folder and cannot be downloaded from the hub: {error.what}",
            where=error.where,
            expected=error.expected,
            remedy=error.remedy,
        ) from error


def _fetch_weights(repository: HubRepository, folder: Path) -> None:
    """Download the weights of a repository that are missing in its folder."""
    repository.download_files(repository.paths, folder)
    if repository.files:
        return
    # The snapshot in the cache of huggingface_hub has no listing, and may be incomplete.
    try:
        ModelFolder(folder).weight_files()
    except UserError as error:
        source = str(repository.address)
        raise UnavailableError(
            f"the cached copy of {source} is incomplete: {error.what}",
            where=str(folder),
            expected="all weights of the model",
            remedy=Step("download", {"source": source}, "unset HF_HUB_OFFLINE, or online"),
        ) from error
