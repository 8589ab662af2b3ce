"""Where data come from: a path, an archive, a hub or the web; brought to where an import reads.

Hubs and the web are asked only for a source that says so: hf:, modelscope: or https://. What is
fetched stays in the cache, see `repository`; archives are unpacked beside the output for as long as
the import takes.
"""

from __future__ import annotations

import contextlib
import filecmp
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from finesight.data.formats import FORMATS
from finesight.data.formats.inventory import ROW_SUFFIXES, inventory
from finesight.data.hub_parts import LEGAL, WHOLE, Chosen, card_in, choose, read_card
from finesight.data.opening import Request
from finesight.data.rows import open_rows
from finesight.data.tar_rows import is_tar, is_webdataset, open_tar
from finesight.errors import UserError, look_beside
from finesight.regular_file import refuse_special
from finesight.remote.address import data_address, is_on_a_hub
from finesight.remote.archive import is_archive, unpack
from finesight.remote.https import Pictures, fetch_address, is_address
from finesight.remote.repository import Repository, open_repository
from finesight.storage import explained, make_folder, refuse_existing, working_folder


@dataclass(frozen=True, slots=True)
class Brought:
    """A source on this machine: what to import, how, and what was decided on the way."""

    path: Path
    request: Request
    notes: tuple[str, ...] = ()


@contextlib.contextmanager
def brought(
    source: str, out: Path, request: Request, hosts: Sequence[str] = ()
) -> Iterator[Brought]:
    """What `source` names, for an import into `out`, for as long as the block lasts.

    `hosts` are those that https:// addresses, of sources and of pictures, may be answered by.
    Pictures of sources that are not the user's own files are copied into `out`, and only those that
    came with them. Raises UserError for a source that cannot be had.
    """
    refuse_existing(out)
    if hosts:
        request = replace(request, web=Pictures(hosts, _shelf() / "pictures"))
    on_the_web = is_address(source) and not source.startswith("file://")
    if is_on_a_hub(source) or on_the_web:
        with _unpacking(out) as work:
            copied = replace(request, copy_pictures=True, within=work)
            if on_the_web:
                yield _from_file(fetch_address(source, hosts, _shelf()), work, copied)
            else:
                yield _from_hub(source, work, copied)
    elif Path(source).is_dir():
        yield _from_own_folder(Path(source), request)
    elif not is_archive(source):
        yield Brought(Path(source), request)
    else:
        _refuse_missing(Path(source))
        with _unpacking(out) as work:
            yield _from_file(Path(source), work, replace(request, within=work))


@contextlib.contextmanager
def _unpacking(out: Path) -> Iterator[Path]:
    """A folder to be made, by a name that is always the same, as rows may be called after it."""
    with working_folder(out.absolute()) as folder:
        yield folder / "unpacked"


def _shelf() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_ASSETS_CACHE) / "finesight" / "https"


def _from_file(file: Path, work: Path, request: Request) -> Brought:
    """An archive unpacked, unless it is a WebDataset; any other file as it is."""
    if not is_archive(file.name):
        return Brought(file, request)
    if is_tar(file) and is_webdataset(file):
        return Brought(file, request)
    unpack(file, work)
    return _from_folder(_trunk(work), replace(request, copy_pictures=True))


def _refuse_missing(archive: Path) -> None:
    refuse_special(archive)
    if not archive.is_file():
        raise UserError(
            "no such file",
            where=str(archive),
            expected="an archive",
            remedy=look_beside(archive),
        )


def _trunk(folder: Path) -> Path:
    """The folder itself or, where all it holds is one folder, that one."""
    inner = list(folder.iterdir())
    return _trunk(inner[0]) if len(inner) == 1 and inner[0].is_dir() else folder


def _from_own_folder(folder: Path, request: Request) -> Brought:
    """The user's folder as it is or, of a downloaded data set, its Parquet files."""
    found = inventory(folder)
    holds = {suffix for suffix in ROW_SUFFIXES if found.ending(suffix)}
    return _from_folder(folder, request) if ".parquet" in holds else Brought(folder, request)


def _from_folder(folder: Path, request: Request) -> Brought:
    """A folder that a format reads as a whole, or the files in it that hold rows."""
    paths = [path.relative_to(folder).as_posix() for path in inventory(folder).files]
    rows = [path for path in paths if path.lower().endswith(ROW_SUFFIXES)]
    if not rows or _is_read_whole(folder):
        return Brought(folder, request)
    chosen = choose(paths, None, card_in(folder), str(folder))
    return _with_rows(folder, chosen, request)


def _is_read_whole(folder: Path) -> bool:
    return any(form.open is not None and form.open(folder) is not None for form in FORMATS)


def _with_rows(folder: Path, chosen: Chosen, request: Request) -> Brought:
    """One file of rows by itself, so that its paths start at its folder, or several end to end."""
    notes = (f"split {chosen.split}, not {', '.join(chosen.others)}",) if chosen.others else ()
    files = tuple(folder / path for path in chosen.rows)
    if len(files) == 1:
        return Brought(files[0], request, notes)
    return Brought(folder, replace(request, files=files), notes)


def _from_hub(source: str, work: Path, request: Request) -> Brought:
    address = data_address(source)
    repository = open_repository(address)
    chosen = choose(repository.paths, address.part, read_card(repository), str(address))
    if chosen.rows and all(path.lower().endswith(WHOLE) for path in chosen.rows):
        rows, folder = _enough(repository, chosen.rows, request)
        if not is_tar(Path(rows[0])) or is_webdataset(folder / rows[0]):
            found = _with_rows(folder, replace(chosen, rows=rows), request)
            skipped = len(chosen.rows) - len(rows)
            note = (f"{skipped} of {len(chosen.rows)} files not fetched: --rows needs none",)
            return replace(found, notes=(*found.notes, *(note if skipped else ())))
    folder = repository.fetch([*chosen.rows, *chosen.needed])
    _lay_out(folder, [*chosen.rows, *chosen.needed], work)
    rows = tuple(path for path in chosen.rows if not is_archive(path))
    if rows and not _is_read_whole(work):
        return _with_rows(work, replace(chosen, rows=rows), request)
    return _from_folder(_trunk(work), request)


def _enough(
    repository: Repository, rows: Sequence[str], request: Request
) -> tuple[tuple[str, ...], Path]:
    """The files, from the first, that hold the rows which are asked for, and where they are."""
    most = _last_row(request)
    if most is None:
        return tuple(rows), repository.fetch(rows)
    taken: list[str] = []
    held = 0
    for path in rows:
        if held >= most and taken:
            break
        taken.append(path)
        file = repository.fetch([path]) / path
        held += (open_tar(file) if is_tar(file) else open_rows(file)).total
    return tuple(taken), repository.fetch(taken)


def _last_row(request: Request) -> int | None:
    """The number of rows, from the first, that --rows and --limit look at; None for all."""
    start, stop = request.rows
    if (start or 0) < 0 or (stop is not None and stop < 0):
        return None
    ends = [] if stop is None else [stop]
    if request.limit is not None:
        ends.append((start or 0) + request.limit)
    return min(ends, default=None)


def _lay_out(folder: Path, paths: Sequence[str], work: Path) -> None:
    """Files of the cache under their names below `work`, and archives unpacked at their places."""
    for path in paths:
        place = work / path
        if not is_archive(path):
            _put(folder / path, place, path, Path.symlink_to)
            continue
        unpacked = work / ".unpacked"
        unpack(folder / path, unpacked)
        for file in filter(Path.is_file, sorted(unpacked.rglob("*"))):
            _put(file, place.parent / file.relative_to(unpacked), path, _move)
        shutil.rmtree(unpacked)


def _is_legal(file: Path) -> bool:
    return file.name.lower().startswith(LEGAL)


def _move(place: Path, file: Path) -> None:
    file.rename(place)


def _put(file: Path, place: Path, source: str, put: Callable[[Path, Path], None]) -> None:
    """Put a file at its place, at which the same one of another part of a repository may be.

    Of licences the first stays, as an import reads none: each archive has one.
    """
    with explained(place):
        make_folder(place.parent)
        if not os.path.lexists(place):
            put(place, file.resolve())
        elif not (place.is_file() and (_is_legal(place) or filecmp.cmp(file, place, False))):
            raise UserError(
                f"{place.name} is in this repository twice, with different content",
                where=source,
                expected="one file for each path, once its archives are unpacked",
                remedy="`finesight download` it, unpack the archives into folders of their own, and"
                " import the one that you want",
            )
