"""The pictures that rows of a foreign file speak of: found, checked, and saved out of tables."""

from __future__ import annotations

import base64
import hashlib
import itertools
import os
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from finesight.data.headers import DamagedPicture, picture_size
from finesight.data.inside import content, is_inside
from finesight.digests import digest
from finesight.errors import UserError
from finesight.file_names import is_utf8, readable_name, spellings
from finesight.storage import explained

if TYPE_CHECKING:
    # Not needed but for imports from the web, and slow to import.
    from finesight.remote.https import Pictures as WebPictures

FOLDER = "pictures"
"""Where pictures lie that an import saves or copies, inside of its output folder."""

_SUFFIXES = {
    b"\xff\xd8": ".jpg",
    b"\x89PNG": ".png",
    b"RIFF": ".webp",
    b"GIF8": ".gif",
    b"BM": ".bmp",
    b"II": ".tif",
    b"MM": ".tif",
}


class Pictures:
    """Pictures named by paths, or given as bytes and saved in `target`.

    A relative path starts at `folder` or, where no picture lies there, at the current folder; one
    with backslashes, as Windows writes it, is looked for with slashes as well.
    Unless `checked`, missing pictures and files that are no picture are taken as well: a missing
    one is where its path, from `folder` on, says that it is. Taken `literally`, a path is where it
    says from `folder` on and nowhere else, as training takes the paths of samples. An address on
    the web is fetched from `web`, and saved, or refused without one. With `within`, names come from
    a stranger: what lies outside of that folder is as missing, and it stands for the current one.
    """

    def __init__(
        self,
        folder: Path,
        target: Path,
        *,
        checked: bool = True,
        literally: bool = False,
        web: WebPictures | None = None,
        within: Path | None = None,
    ) -> None:
        self._folder, self._target = folder, target / FOLDER
        self._checked, self._literally, self._web = checked, literally, web
        self._within = within.resolve() if within else None
        self.saved_names: set[str] = set()
        self._sizes: dict[Path, tuple[int, int]] = {}
        self._saved: dict[str, Path] = {}
        self._found: dict[str, Path] = {}
        self._resolved: dict[str, str] = {}

    def take(self, value: object) -> Path:
        """The picture that a cell means: a path, its bytes, a data URL (RFC 2397, in base64), or
        {bytes, path} as the library datasets stores it.

        Raises DamagedPicture when it is missing or no picture, UserError for anything else.
        """
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            return self._save(value)
        if isinstance(value, str) and value in self._found:
            return self._found[value]
        if isinstance(value, str) and value.lstrip()[:5].lower() == "data:":
            return self._save(_decoded(value.strip()))
        if self._web is not None and isinstance(value, str) and "://" in value:
            return self._fetch(self._web, value.strip())
        if isinstance(value, str) and value.strip():
            found = self._found[value] = self._find(value.strip())
            return found
        raise UserError(
            f"a picture given as {type(value).__name__} {str(value)[:60]!r}",
            expected="a path, or a column of pictures in Parquet",
            remedy="correct the row, or name another column",
        )

    def size(self, path: Path) -> tuple[int, int]:
        """Height and width of a picture that was taken; see `picture_size`."""
        if path not in self._sizes:
            self._sizes[path] = picture_size(path)
        return self._sizes[path]

    def _find(self, name: str) -> Path:
        if "://" in name and not name.startswith("file://"):
            raise DamagedPicture(
                f"{name[:200]} is an address on the web, not a file",
                expected="a path",
                remedy="allow their host by --allow-host HOST, or download the pictures and put"
                " their paths into the data",
            )
        # Scripts write paths that start at the folder they were run in, not at their file's.
        folders = (self._folder, self._within or Path.cwd())
        if self._literally:
            places = [os.path.join(self._folder, name)]
        else:
            names = spellings(name.removeprefix("file://"))
            places = [os.path.join(folder, one) for one in names for folder in folders]
        # os.path's test also stands names that cannot be one, too long or with a zero byte.
        place = next(filter(self._is_there, places), None)
        if place is None and not self._checked:
            return Path(places[0]).absolute()
        if place is None and self._within:
            raise DamagedPicture(
                "no such picture in the source",
                where=name[:200],
                expected="a path to a file that came with the rows: what else lies on this machine"
                " is not taken for a source that is not your own",
                remedy="unpack or download the source yourself, look at it, and give its folder",
            )
        if place is None:
            raise DamagedPicture(
                "no such picture",
                where=name[:200],
                expected=f"an existing file; a relative path starts at {self._folder.resolve()},"
                f" the folder of the data file, or at {Path.cwd()}, the current one",
                remedy="correct the path, or change to the folder where the paths start",
            )
        path = Path(self._settled(place))
        if self._checked:
            self.size(path)
        return path

    def _is_there(self, place: str) -> bool:
        if not os.path.exists(place):
            return False
        return self._within is None or Path(self._settled(place)).is_relative_to(self._within)

    def _settled(self, place: str) -> str:
        # The folder resolved, as `..` steps out of where a link leads to, not of where it stands.
        path = Path(place)
        folder = str(path.parent)
        if folder not in self._resolved:
            self._resolved[folder] = os.path.realpath(folder)
        return os.path.join(self._resolved[folder], path.name)

    def _fetch(self, web: WebPictures, address: str) -> Path:
        if address.startswith("file://"):
            return self._find(address)
        try:
            return self._save(web.take(address).read_bytes())
        except DamagedPicture:
            raise
        except UserError as error:
            # One picture that cannot be had is a fault of its row, as a missing file is.
            raise DamagedPicture(
                error.what, where=error.where, expected=error.expected, remedy=error.remedy
            ) from error

    def _save(self, data: bytes) -> Path:
        key = hashlib.sha256(data).hexdigest()
        if key not in self._saved:
            suffix = next((s for magic, s in _SUFFIXES.items() if data.startswith(magic)), "")
            numbers = itertools.count(len(self._saved) + 1)
            names = (f"{number:06d}{suffix}" for number in numbers)
            path = self._target / next(name for name in names if name not in self.saved_names)
            self.saved_names.add(path.name)
            self._target.mkdir(exist_ok=True)
            path.write_bytes(data)
            try:
                if self._checked:
                    self.size(path)
            except DamagedPicture as error:
                # Where it was saved is gone by the time that anyone reads this.
                raise DamagedPicture(
                    f"the picture of {len(data)} bytes: {error.what}",
                    expected=error.expected,
                    remedy=error.remedy,
                ) from error
            self._saved[key] = path
        return self._saved[key]


def _settled(path: Path) -> Path:
    # The folder resolved, as `..` steps out of where a link leads to, not of where it stands.
    return path.parent.resolve() / path.name


def data_url(path: Path) -> str:
    """A picture's file as a data URL (RFC 2397). Raises UserError for a file of an unknown kind."""
    data = path.read_bytes()
    suffix = next((s for magic, s in _SUFFIXES.items() if data.startswith(magic)), None)
    if suffix is None:
        raise UserError(
            "a picture of a kind that has no place in a data URL here",
            where=str(path),
            expected=f"one of {', '.join(dict.fromkeys(_SUFFIXES.values()))}",
            remedy="save the picture as PNG or JPEG",
        )
    kind = {".jpg": "jpeg", ".tif": "tiff"}.get(suffix, suffix[1:])
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _decoded(url: str) -> bytes:
    head, comma, data = url.partition(",")
    try:
        if comma and head.lower().endswith(";base64"):
            return base64.b64decode(data, validate=True)
    except ValueError:
        pass
    raise DamagedPicture(
        f"the data URL {url[:60]!r} of {len(url)} characters",
        expected="data:image/png;base64, and the picture's bytes in base64",
        remedy="write the URL again, or save the picture and give its path",
    )


class ImageNames:
    """What files of `out` call each image: its path from `out`, which is still `staging`.

    An image outside of `staging` keeps its place. It is to be copied into `staging`/pictures with
    `copy`, where it lies inside of a tar or a Parquet file, as what lies where in there may change,
    and where a name on its path is not UTF-8, as files of samples are. Copies keep their names, as
    far as these are free and can be written; `taken` are names that are not free.
    """

    def __init__(
        self, staging: Path, out: Path, taken: set[str] | None = None, *, copy: bool
    ) -> None:
        self._staging, self._home, self._copy = staging, out.resolve(), copy
        self._taken = set[str]() if taken is None else taken
        self._names: dict[str, str] = {}
        self._copies: dict[str, Path] = {}
        self._numbers: defaultdict[str, Iterator[int]] = defaultdict(lambda: itertools.count(2))

    def name(self, image: str) -> str:
        """Return the name of an image by its absolute path."""
        if image not in self._names:
            self._names[image] = self._new_name(Path(image))
        return self._names[image]

    def copy(self, images: Iterable[str]) -> None:
        """Copy those of the named images that are to be copied, each once."""
        for image in images:
            target = self._copies.pop(image, None)
            if target is not None:
                with explained(target):
                    target.parent.mkdir(exist_ok=True)
                    found = content(Path(image))
                    if isinstance(found, Path):
                        shutil.copyfile(found, target)
                    else:
                        target.write_bytes(found.getbuffer())

    def _new_name(self, path: Path) -> str:
        if path.is_relative_to(self._staging):
            return path.relative_to(self._staging).as_posix()
        name = Path(os.path.relpath(path, self._home)).as_posix()
        if not self._copy and is_utf8(name) and not is_inside(path):
            return name
        target = self._staging / FOLDER / self._free(readable_name(path.name))
        self._copies[str(path)] = target
        return target.relative_to(self._staging).as_posix()

    def _free(self, name: str) -> str:
        stem, suffix = os.path.splitext(name)
        free = name
        while free in self._taken:
            free = f"{stem}-{next(self._numbers[name])}{suffix}"
        self._taken.add(free)
        return free


def named(pictures: Iterable[Path], staging: Path, out: Path, *, copy: bool) -> dict[Path, str]:
    """What files of `out` call each picture, those to be copied now copied; see `ImageNames`."""
    names = ImageNames(staging, out, copy=copy)
    found = {path: names.name(str(path)) for path in pictures}
    names.copy(map(str, found))
    return found


def same_pictures(paths: Iterable[Path]) -> dict[Path, str]:
    """A key for each picture, equal for files of equal content.

    Only files that share their length are read. The same picture saved twice in different ways
    (scaled, another JPEG quality) is not recognised.
    """
    by_length: defaultdict[int, set[Path]] = defaultdict(set)
    resolved = {path: path.resolve() for path in set(paths)}
    for file in resolved.values():
        by_length[file.stat().st_size].add(file)
    keys = {
        file: digest(file) if len(files) > 1 else str(file)
        for files in by_length.values()
        for file in files
    }
    return {path: keys[file] for path, file in resolved.items()}
