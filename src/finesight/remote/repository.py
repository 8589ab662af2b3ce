"""A repository of a hub at one commit: its listing, and those of its files that are asked for.

Files lie in the folder for assets of huggingface_hub's cache, which HF_HOME moves, by hub, name and
commit; those of a mirror apart, as it says itself what a commit holds. The listing is kept too, so
that everything that was fetched is found again offline.
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
from finesight.remote.address import Address
from finesight.remote.download import download
from finesight.remote.inside import inside
from finesight.remote.transfer import RemoteFile
from finesight.remote.web import Site, Web, offline
from finesight.storage import explained, make_folder

USUAL_ENDPOINTS = {"hf": "https://huggingface.co", "modelscope": "https://www.modelscope.cn"}

PICKLED = (".bin", ".pt", ".pth", ".ckpt")
"""Endings of weights that are code as much as data: loading them runs what they say."""

WEIGHTS = (".safetensors", *PICKLED)
"""Endings of a model's weights, which are large: commands that do not read them do without."""

OF_TENSORS = "pytorch_model*.bin"
"""Pickled weights that `finesight.pickled` converts, by a loader that runs nothing."""


@dataclass(frozen=True, slots=True)
class Repository:
    """What a hub's repository holds at a commit; `folder` is where its files go."""

    address: Address
    commit: str
    files: tuple[RemoteFile, ...]
    folder: Path

    @property
    def paths(self) -> list[str]:
        """The names of all files, by which they are asked for."""
        return [file.path for file in self.files]

    def fetch(self, paths: Sequence[str]) -> Path:
        """The folder in which these files are, each whole and verified. Raises UserError for a file
        that cannot be had."""
        return self.bring(paths, self.place(paths))

    def place(self, paths: Sequence[str]) -> Path:
        """The folder where these files go, or are: a copy of all of them in huggingface_hub's own
        cache, from another program, is as good."""
        for path in paths:
            inside(self.folder, path, str(self.address))
        if self.address.hub == "hf":
            from finesight.remote.huggingface import elsewhere

            return elsewhere(self.address, self.commit, list(paths)) or self.folder
        return self.folder

    def bring(self, paths: Sequence[str], folder: Path) -> Path:
        """Put these files below `folder`; those that are there stay. Gives the folder."""
        names = set(paths)
        wanted = [file for file in self.files if file.path in names]
        source = str(self.address)
        missing = [f.path for f in wanted if not inside(folder, f.path, source).exists()]
        if missing and offline():
            more = f", nor {len(missing) - 1} more" if len(missing) > 1 else ""
            raise UserError(
                f"{missing[0]} of {source} was not downloaded before{more}, and HF_HUB_OFFLINE is"
                " set",
                where=str(folder),
                expected="every file that is needed",
                remedy=f"unset HF_HUB_OFFLINE, or run `finesight download {source}` with a"
                " connection",
            )
        if missing:
            with Web(_site(self.address)) as web:
                download(wanted, folder, web, source)
        return folder


def open_repository(address: Address) -> Repository:
    """The repository as the hub lists it now or, offline, as it did when it was last asked.

    Raises UserError when it cannot be had.
    """
    kept = _kept_at(address)
    if offline():
        return _kept(address, kept)
    commit, files = _listing(address)
    _refuse_files_in_files(files, str(address))
    text = json.dumps({"commit": commit, "files": [asdict(file) for file in files]})
    for place in {kept, kept.with_name(f"{commit}.json")}:
        _keep(place, text)
    return Repository(address, commit, tuple(files), _home(address) / commit)


def _refuse_files_in_files(files: Sequence[RemoteFile], source: str) -> None:
    paths = {file.path for file in files}
    for path in sorted(paths):
        both = next((str(p) for p in PurePosixPath(path).parents if str(p) in paths), None)
        if both is not None:
            raise UserError(
                f"{both} is listed as a file, and as the folder of {path}",
                where=source,
                expected="a listing of files that can lie beside each other",
                remedy="check the address of the hub (HF_ENDPOINT, MODELSCOPE_ENDPOINT)",
            )


def open_model(address: Address, wanted: Sequence[str]) -> Repository:
    """Of a model's repository the files that fit a pattern of `wanted`, none of which is fetched
    yet, and the one folder for all of them. A copy that was found offline, without a listing, has
    no further files to fetch.

    Raises UserError when it cannot be had, and for a model without weights that can be read.
    """
    if offline() and address.hub == "hf" and not _kept_at(address).exists():
        from finesight.remote.huggingface import newest_elsewhere

        there = newest_elsewhere(address, wanted)
        if there is not None:
            return Repository(address, there.name, (), there)
    found = open_repository(address)
    paths = model_files(found, wanted)
    files = tuple(file for file in found.files if file.path in paths)
    return replace(found, files=files, folder=found.place(paths))


def fetch_model(address: Address, wanted: Sequence[str]) -> Path:
    """The folder of a model of which every file is there that fits a pattern of `wanted`; UserError
    as from `open_model`, and for a file that cannot be had."""
    model = open_model(address, wanted)
    return model.bring(model.paths, model.folder)


def model_files(repository: Repository, wanted: Sequence[str]) -> list[str]:
    """The files of a model that fit a pattern of `wanted`; see `open_model`."""
    paths = repository.paths
    chosen = [path for path in paths if any(fnmatch(path, pattern) for pattern in wanted)]
    if any(path.endswith(".safetensors") for path in chosen):
        return chosen
    tensors = [path for path in paths if fnmatch(path, OF_TENSORS)]
    pickled = [path for path in paths if path.endswith(PICKLED)]
    if pickled and not tensors:
        raise UserError(
            f"the only weights of {repository.address} are pickled: {pickled[0]}",
            where="model",
            expected=f"weights as .safetensors, or {OF_TENSORS}, which are read without running"
            " what else a pickle may hold",
            remedy="look for a revision with safetensors (on Hugging Face often @refs/pr/N), or"
            " convert it with another program and give its folder",
        )
    return chosen + tensors


def deliver(repository: Repository, paths: Sequence[str], to: Path) -> None:
    """Make the folder `to` of these files, whole or not at all.

    What came before an error waits in a hidden neighbour for the next attempt. Raises UserError
    when `to` exists.
    """
    _refuse_existing(to)
    partial = to.absolute().with_name(f".{to.absolute().name}.{repository.commit[:12]}.partial")
    with explained(to):
        if partial.is_symlink():  # somebody else's, who would be given the files
            partial.unlink()
        make_folder(partial)
        try:
            repository.bring(paths, partial)
            partial.rename(to)
        except OSError:
            if to.exists():  # another process was quicker, and has renamed what both worked at
                shutil.rmtree(partial, ignore_errors=True)
            _refuse_existing(to)
            raise


def _refuse_existing(to: Path) -> None:
    if to.exists():
        raise UserError(
            f"{to.name} exists already and is never overwritten",
            where="--to",
            expected="a folder that does not exist yet",
            remedy="choose another name",
        )


def _home(address: Address) -> Path:
    from huggingface_hub import constants

    shelf = Path(constants.HF_ASSETS_CACHE) / "finesight" / address.hub
    if address.hub == "hf":
        endpoint = constants.ENDPOINT
    else:
        from finesight.remote.modelscope import endpoint as asked

        endpoint = asked()
    if endpoint.rstrip("/") != USUAL_ENDPOINTS[address.hub]:
        shelf = shelf / quote(endpoint.rstrip("/"), safe="")
    return shelf / f"{address.kind}s" / address.name


def _listing(address: Address) -> tuple[str, list[RemoteFile]]:
    list_files: Callable[[Address], tuple[str, list[RemoteFile]]]
    if address.hub == "hf":
        from finesight.remote.huggingface import listing as list_files
    else:
        from finesight.remote.modelscope import listing as list_files
    return list_files(address)


def _site(address: Address) -> Site:
    if address.hub == "hf":
        from finesight.remote import huggingface

        return huggingface.site(address)
    from finesight.remote import modelscope

    return modelscope.site(address)


def _kept_at(address: Address) -> Path:
    return _home(address) / "listings" / f"{quote(address.revision or 'newest', safe='')}.json"


def _kept(address: Address, kept: Path) -> Repository:
    if not kept.exists():
        raise UserError(
            f"{address} was not downloaded before, and HF_HUB_OFFLINE is set",
            where=str(kept.parent.parent),
            expected="a copy on this machine",
            remedy=f"unset HF_HUB_OFFLINE, or run `finesight download {address}` with a connection",
        )
    expected = "the files of a model or data set, as `finesight download` listed them"
    remedy = f"delete it, and run `finesight download {address}` with a connection"
    try:
        content = read_json_object(kept, expected=expected, remedy=remedy)
        files = tuple(RemoteFile(**file) for file in content["files"])
        return Repository(address, content["commit"], files, _home(address) / content["commit"])
    except (KeyError, TypeError) as error:
        raise UserError(
            f"not a list of files: {type(error).__name__} {error}",
            where=str(kept),
            expected=expected,
            remedy=remedy,
        ) from error


def _keep(place: Path, text: str) -> None:
    """Write a listing in one rename, from a name of its own: several processes do it at once."""
    make_folder(place.parent)
    with explained(place):
        number, name = tempfile.mkstemp(dir=place.parent, prefix=".")
        with os.fdopen(number, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(name, place)
