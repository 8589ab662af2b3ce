"""Access to the files of a hub repository at one commit, and publication of models.

Files are stored in the assets cache of huggingface_hub (below HF_HOME), in one folder per hub,
repository and commit. Mirrors have separate folders. File listings are cached as well, so that
downloaded files are available offline.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Protocol
from urllib.parse import quote

from finesight.errors import Step, UnavailableError, UserError
from finesight.files.archive import safe_join
from finesight.files.bounded_files import read_json_object
from finesight.files.hub_address import HubAccess, HubAddress, is_offline
from finesight.files.storage import (
    check_new_path,
    make_folder,
    raise_if_exists,
    require_free_space,
    translate_os_errors,
)
from finesight.hub.download import (
    SPACE_REMEDY,
    Downloader,
    HttpSite,
    RemoteFile,
    raise_if_offline,
)

DEFAULT_ENDPOINTS = {"hf": "https://huggingface.co", "modelscope": "https://www.modelscope.cn"}

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
"""Suffixes of pickled weights, which can execute code when they are loaded."""

WEIGHT_SUFFIXES = (".safetensors", *PICKLE_SUFFIXES)
"""Suffixes of weight files.

Commands that do not load weights do not download these large files.
"""

PICKLED_WEIGHTS_PATTERN = "pytorch_model*.bin"
"""Pattern of pickled weights that can be converted without executing code.

See `finesight.model_folder`.
"""


class _Hub(Protocol):
    """Functions of the modules `huggingface` and `modelscope`."""

    def get_access(self) -> HubAccess: ...

    def build_site(self, address: HubAddress) -> HttpSite: ...

    def list_files(self, address: HubAddress) -> tuple[str, list[RemoteFile]]: ...

    def check_publish(self, address: HubAddress, *, public: bool) -> None: ...

    def publish_files(
        self, address: HubAddress, files: Mapping[str, Path], *, public: bool, commit_message: str
    ) -> str: ...


@dataclass(frozen=True, slots=True)
class HubRepository:
    """A hub repository at one commit."""

    address: HubAddress
    commit: str
    files: tuple[RemoteFile, ...]
    folder: Path

    @property
    def paths(self) -> list[str]:
        """Paths of all files, relative to the repository."""
        return [file.path for file in self.files]

    def fetch_files(self, paths: Sequence[str]) -> Path:
        """Download and verify files of the repository, and return their local folder."""
        return self.download_files(paths, self.locate_folder(paths))

    def locate_folder(self, paths: Sequence[str]) -> Path:
        """Return the local folder of the given files, which may not be downloaded yet.

        If another program has downloaded all of them, this is the cache folder of huggingface_hub.
        """
        for path in paths:
            safe_join(self.folder, path, str(self.address))
        if self.address.hub == "hf":
            from finesight.hub.huggingface import find_cached_snapshot

            cached = find_cached_snapshot(replace(self.address, revision=self.commit), paths)
            if cached is not None and all((cached / path).exists() for path in paths):
                return cached
        return self.folder

    def list_missing(self, paths: Sequence[str], folder: Path) -> list[RemoteFile]:
        """Return the files that are missing in a folder."""
        source = str(self.address)
        missing = []
        for file in self._select_files(paths):
            if not safe_join(folder, file.path, source).exists():
                missing.append(file)
        return missing

    def _select_files(self, paths: Sequence[str]) -> list[RemoteFile]:
        """Return the files with these paths."""
        names = set(paths)
        return [file for file in self.files if file.path in names]

    def require_space(self, paths: Sequence[str], folder: Path) -> None:
        """Raise UserError if the disk of a folder has no space for its missing files."""
        missing = self.list_missing(paths, folder)
        num_bytes = sum(file.size or 0 for file in missing)
        require_free_space(folder, num_bytes, str(self.address), SPACE_REMEDY)

    def download_files(self, paths: Sequence[str], folder: Path) -> Path:
        """Download the files that are missing in a folder."""
        source = str(self.address)
        missing = self.list_missing(paths, folder)
        if missing and is_offline():
            more_note = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise UnavailableError(
                f"{missing[0].path} of {source}{more_note} is not downloaded,"
                " and HF_HUB_OFFLINE is set",
                where=str(folder),
                expected="all required files",
                remedy=Step("download", {"source": source}, "unset HF_HUB_OFFLINE, or online"),
            )
        if missing:
            with Downloader(_get_hub(self.address).build_site(self.address)) as downloader:
                downloader.download_all(self._select_files(paths), folder, source)
        return folder


def open_repository(address: HubAddress) -> HubRepository:
    """Request the file listing of a repository from the hub and cache it.

    In offline mode, the cached listing is used.
    """
    listing_path = _get_listing_path(address)
    if is_offline():
        return _load_listing(address, listing_path)
    commit, files = _get_hub(address).list_files(address)
    _check_path_conflicts(files, str(address))
    text = json.dumps({"commit": commit, "files": [asdict(file) for file in files]})
    for path in {listing_path, listing_path.with_name(f"{commit}.json")}:
        _save_listing(path, text)
    return HubRepository(address, commit, tuple(files), _get_cache_folder(address) / commit)


def _check_path_conflicts(files: Sequence[RemoteFile], source: str) -> None:
    paths = {file.path for file in files}
    for path in sorted(paths):
        for parent in map(str, PurePosixPath(path).parents):
            if parent in paths:
                raise UserError(
                    f"{parent} is listed as a file and as the folder of {path}",
                    where=source,
                    expected="a listing without conflicting paths",
                    remedy="check the hub address (HF_ENDPOINT, MODELSCOPE_ENDPOINT)",
                )


def open_model_repository(address: HubAddress, patterns: Sequence[str]) -> HubRepository:
    """Open a model repository, restricted to files that match patterns.

    No file is downloaded. In offline mode without a cached listing, the repository is the cached
    snapshot of huggingface_hub and `files` is empty.
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
    """Download the files of a model that match patterns, and return their folder."""
    repository = open_model_repository(address, patterns)
    return repository.download_files(repository.paths, repository.folder)


def select_model_files(repository: HubRepository, patterns: Sequence[str]) -> list[str]:
    """Return the paths of a model repository that match patterns.

    If no safetensors file matches, pickled weights that can be converted are added.
    """
    selected = []
    for path in repository.paths:
        if any(fnmatch(path, pattern) for pattern in patterns):
            selected.append(path)
    if any(path.endswith(".safetensors") for path in selected):
        return selected
    loadable = []
    pickled = []
    for path in repository.paths:
        if fnmatch(path, PICKLED_WEIGHTS_PATTERN):
            loadable.append(path)
        if path.endswith(PICKLE_SUFFIXES):
            pickled.append(path)
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
    """
    check_new_path(target)
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
            raise_if_exists(target)
            raise


def check_publish_address(address: HubAddress) -> None:
    """Raise UserError for an address to which no model can be uploaded."""
    if address.repo_type != "model" or address.revision or address.data_part:
        raise UserError(
            f"{address} is not a model, or has a revision",
            where="OUT",
            expected="hf:OWNER/NAME or modelscope:OWNER/NAME, without a revision",
            remedy="remove the other parts",
        )


def check_publish(address: HubAddress) -> None:
    """Raise UserError for a private upload that would fail, with at most one request.

    It needs a connection and a token, and an existing repository must be private.
    """
    check_publish_address(address)
    raise_if_offline(str(address))
    _get_hub(address).check_publish(address, public=False)


def publish_model(
    address: HubAddress, files: Mapping[str, Path], *, public: bool, message: str
) -> str:
    """Upload files to a model repository in one commit.

    A missing repository is created. Files that exist in the repository under other names are kept.
    """
    check_publish_address(address)
    raise_if_offline(str(address))
    assert files, f"no files for {address}"
    return _get_hub(address).publish_files(address, files, public=public, commit_message=message)


def _get_cache_folder(address: HubAddress) -> Path:
    from huggingface_hub import constants

    cache_root = Path(constants.HF_ASSETS_CACHE) / "finesight" / address.hub
    endpoint = _get_hub(address).get_access().endpoint
    if endpoint != DEFAULT_ENDPOINTS[address.hub]:
        cache_root = cache_root / quote(endpoint, safe="")
    return cache_root / f"{address.repo_type}s" / address.repo_id


def _get_hub(address: HubAddress) -> _Hub:
    """Return the module of a hub, imported when it is needed."""
    if address.hub == "hf":
        from finesight.hub import huggingface

        return huggingface
    from finesight.hub import modelscope

    return modelscope


def _get_listing_path(address: HubAddress) -> Path:
    return (
        _get_cache_folder(address)
        / "listings"
        / f"{quote(address.revision or 'newest', safe='')}.json"
    )


def _load_listing(address: HubAddress, listing_path: Path) -> HubRepository:
    if not listing_path.exists():
        raise UnavailableError(
            f"{address} is not downloaded, and HF_HUB_OFFLINE is set",
            where=str(listing_path.parent.parent),
            expected="a downloaded copy",
            remedy=Step("download", {"source": str(address)}, "unset HF_HUB_OFFLINE, or online"),
        )
    expected = "the file listing of a model or dataset, written by a download"
    remedy = str(Step("download", {"source": str(address)}, "delete it, and with a connection"))
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
        os.chmod(name, path.parent.stat().st_mode & 0o666)
        os.replace(name, path)
