"""Access to the files of a hub repository at one commit.

Files are stored in the assets cache of huggingface_hub (below HF_HOME), in one folder per hub,
repository and commit. Mirrors have separate folders. File listings are cached as well, so that
downloaded files are available offline.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from urllib.parse import quote

from finesight.bounded_files import read_json_object
from finesight.errors import UserError
from finesight.hub.address import HubAddress
from finesight.hub.downloader import download_files
from finesight.hub.http_client import HttpClient, HttpSite, is_offline
from finesight.hub.safe_path import safe_join
from finesight.hub.transfer import RemoteFile
from finesight.storage import make_folder, translate_os_errors

DEFAULT_ENDPOINTS = {"hf": "https://huggingface.co", "modelscope": "https://www.modelscope.cn"}

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
"""Suffixes of pickled weights, which can execute code when they are loaded."""

WEIGHT_SUFFIXES = (".safetensors", *PICKLE_SUFFIXES)
"""Suffixes of weight files.

Commands that do not load weights do not download these large files.
"""

PICKLED_WEIGHTS_PATTERN = "pytorch_model*.bin"
"""Pattern of pickled weights that can be converted without executing code.

See `finesight.pickle_conversion`.
"""


@dataclass(frozen=True, slots=True)
class HubRepository:
    """A hub repository at one commit.

    Attributes:
        files: Files in the listing of the hub.
        folder: Local folder of downloaded files.
    """

    address: HubAddress
    commit: str
    files: tuple[RemoteFile, ...]
    folder: Path

    @property
    def paths(self) -> list[str]:
        """Paths of all files, relative to the repository."""
        return [file.path for file in self.files]

    def fetch_files(self, paths: Sequence[str]) -> Path:
        """Download and verify files of the repository, and return their local folder.

        Raises:
            UserError: A download or the verification of a file fails.
        """
        return self.download_files(paths, self.locate_folder(paths))

    def locate_folder(self, paths: Sequence[str]) -> Path:
        """Return the local folder of the given files, which may not be downloaded yet.

        If another program has downloaded all of them, this is the cache folder of huggingface_hub.
        """
        for path in paths:
            safe_join(self.folder, path, str(self.address))
        if self.address.hub == "hf":
            from finesight.hub.huggingface import find_cached_files

            return find_cached_files(self.address, self.commit, list(paths)) or self.folder
        return self.folder

    def download_files(self, paths: Sequence[str], folder: Path) -> Path:
        """Download the files that are missing in a folder.

        Returns:
            The same folder.

        Raises:
            UserError: A download fails, or files are missing in offline mode.
        """
        names = set(paths)
        requested = [file for file in self.files if file.path in names]
        source = str(self.address)
        missing = [
            file.path for file in requested if not safe_join(folder, file.path, source).exists()
        ]
        if missing and is_offline():
            more_note = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise UserError(
                f"{missing[0]} of {source}{more_note} is not downloaded, and HF_HUB_OFFLINE is set",
                where=str(folder),
                expected="all required files",
                remedy=f"unset HF_HUB_OFFLINE, or run `finesight download {source}` with a"
                " connection",
            )
        if missing:
            with HttpClient(_build_site(self.address)) as http_client:
                download_files(requested, folder, http_client, source)
        return folder


def open_repository(address: HubAddress) -> HubRepository:
    """Request the file listing of a repository from the hub and cache it.

    In offline mode, the cached listing is used.

    Raises:
        UserError: The repository is unknown or private, the hub does not respond, or offline mode
            is set and there is no cached listing.
    """
    listing_path = _get_listing_path(address)
    if is_offline():
        return _load_listing(address, listing_path)
    commit, files = _list_files(address)
    _check_path_conflicts(files, str(address))
    text = json.dumps({"commit": commit, "files": [asdict(file) for file in files]})
    for path in {listing_path, listing_path.with_name(f"{commit}.json")}:
        _save_listing(path, text)
    return HubRepository(address, commit, tuple(files), _get_cache_folder(address) / commit)


def _check_path_conflicts(files: Sequence[RemoteFile], source: str) -> None:
    paths = {file.path for file in files}
    for path in sorted(paths):
        conflicting = next(
            (str(parent) for parent in PurePosixPath(path).parents if str(parent) in paths), None
        )
        if conflicting is not None:
            raise UserError(
                f"{conflicting} is listed as a file and as the folder of {path}",
                where=source,
                expected="a listing without conflicting paths",
                remedy="check the hub address (HF_ENDPOINT, MODELSCOPE_ENDPOINT)",
            )


def open_model_repository(address: HubAddress, patterns: Sequence[str]) -> HubRepository:
    """Open a model repository, restricted to files that match patterns.

    No file is downloaded. In offline mode without a cached listing, the repository is the cached
    snapshot of huggingface_hub and `files` is empty.

    Raises:
        UserError: The repository is not available, or contains only weights that cannot be read
            safely.
    """
    if is_offline() and address.hub == "hf" and not _get_listing_path(address).exists():
        from finesight.hub.huggingface import find_cached_snapshot

        cached = find_cached_snapshot(address, patterns)
        if cached is not None:
            return HubRepository(address, cached.name, (), cached)
    repository = open_repository(address)
    paths = select_model_files(repository, patterns)
    files = tuple(file for file in repository.files if file.path in paths)
    return replace(repository, files=files, folder=repository.locate_folder(paths))


def fetch_model(address: HubAddress, patterns: Sequence[str]) -> Path:
    """Download the files of a model that match patterns, and return their folder.

    Raises:
        UserError: The repository is not available, has no readable weights, or a download fails.
    """
    repository = open_model_repository(address, patterns)
    return repository.download_files(repository.paths, repository.folder)


def select_model_files(repository: HubRepository, patterns: Sequence[str]) -> list[str]:
    """Return the paths of a model repository that match patterns.

    If no safetensors file matches, pickled weights that can be converted are added.

    Raises:
        UserError: The repository contains only pickled weights that cannot be converted.
    """
    paths = repository.paths
    selected = [path for path in paths if any(fnmatch(path, pattern) for pattern in patterns)]
    if any(path.endswith(".safetensors") for path in selected):
        return selected
    loadable = [path for path in paths if fnmatch(path, PICKLED_WEIGHTS_PATTERN)]
    pickled = [path for path in paths if path.endswith(PICKLE_SUFFIXES)]
    if pickled and not loadable:
        raise UserError(
            f"{repository.address} has only pickled weights: {pickled[0]}",
            where="model",
            expected=f"weights as .safetensors, or {PICKLED_WEIGHTS_PATTERN}, which can be read"
            " without running code",
            remedy="look for a revision with safetensors (on Hugging Face often @refs/pr/N), or"
            " convert it with another program and use the folder",
        )
    return selected + loadable


def download_folder(repository: HubRepository, paths: Sequence[str], target: Path) -> None:
    """Download files into a new folder, which appears only when it is complete.

    After an error, partial files remain in a hidden folder next to the target, so that the next
    attempt resumes them.

    Raises:
        UserError: The target exists, or a download fails.
    """
    _raise_if_exists(target)
    partial = target.absolute().with_name(
        f".{target.absolute().name}.{repository.commit[:12]}.partial"
    )
    with translate_os_errors(target):
        if partial.is_symlink():  # owned by another user, who would receive the files
            partial.unlink()
        make_folder(partial)
        try:
            repository.download_files(paths, partial)
            partial.rename(target)
        except OSError:
            if target.exists():  # another process finished first and renamed the shared folder
                shutil.rmtree(partial, ignore_errors=True)
            _raise_if_exists(target)
            raise


def _raise_if_exists(target: Path) -> None:
    if target.exists():
        raise UserError(
            f"{target.name} exists already and is never overwritten",
            where="--to",
            expected="a folder that does not exist",
            remedy="choose another name",
        )


def _get_cache_folder(address: HubAddress) -> Path:
    from huggingface_hub import constants

    cache_root = Path(constants.HF_ASSETS_CACHE) / "finesight" / address.hub
    if address.hub == "hf":
        endpoint = constants.ENDPOINT
    else:
        from finesight.hub.modelscope import get_endpoint

        endpoint = get_endpoint()
    if endpoint.rstrip("/") != DEFAULT_ENDPOINTS[address.hub]:
        cache_root = cache_root / quote(endpoint.rstrip("/"), safe="")
    return cache_root / f"{address.repo_type}s" / address.repo_id


def _list_files(address: HubAddress) -> tuple[str, list[RemoteFile]]:
    list_files: Callable[[HubAddress], tuple[str, list[RemoteFile]]]
    if address.hub == "hf":
        from finesight.hub.huggingface import list_files
    else:
        from finesight.hub.modelscope import list_files
    return list_files(address)


def _build_site(address: HubAddress) -> HttpSite:
    if address.hub == "hf":
        from finesight.hub import huggingface

        return huggingface.build_site(address)
    from finesight.hub import modelscope

    return modelscope.build_site(address)


def _get_listing_path(address: HubAddress) -> Path:
    return (
        _get_cache_folder(address)
        / "listings"
        / f"{quote(address.revision or 'newest', safe='')}.json"
    )


def _load_listing(address: HubAddress, listing_path: Path) -> HubRepository:
    if not listing_path.exists():
        raise UserError(
            f"{address} is not downloaded, and HF_HUB_OFFLINE is set",
            where=str(listing_path.parent.parent),
            expected="a downloaded copy",
            remedy=f"unset HF_HUB_OFFLINE, or run `finesight download {address}` with a connection",
        )
    expected = "the file listing of a model or dataset, written by `finesight download`"
    remedy = f"delete it, and run `finesight download {address}` with a connection"
    try:
        content = read_json_object(listing_path, expected=expected, remedy=remedy)
        files = tuple(RemoteFile(**file) for file in content["files"])
        return HubRepository(
            address, content["commit"], files, _get_cache_folder(address) / content["commit"]
        )
    except (KeyError, TypeError) as error:
        raise UserError(
            f"invalid file listing: {type(error).__name__} {error}",
            where=str(listing_path),
            expected=expected,
            remedy=remedy,
        ) from error


def _save_listing(path: Path, text: str) -> None:
    """Write a file listing atomically, because several processes may write it at once."""
    make_folder(path.parent)
    with translate_os_errors(path):
        fd, name = tempfile.mkstemp(dir=path.parent, prefix=".")
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(name, path)
