"""Locate, validate and save the images that dataset rows refer to during import."""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from finesight.errors import UserError
from finesight.files.bounded_files import is_utf8, iter_spellings, to_readable_name
from finesight.files.storage import translate_os_errors
from finesight.ingest.name_template import ALL_FOLDERS, TemplateSearch
from finesight.samples.image_file import (
    DOCUMENT_SUFFIXES,
    IMAGE_MAGICS,
    CorruptImageError,
    PageRanges,
    find_image_suffix,
    is_container_path,
    is_embedded_media,
    is_image_value,
    is_page,
    list_pages,
    resolve_content,
    save_page,
    split_page,
)
from finesight.samples.sample import (
    MAX_PARTS,
    VIDEO_SUFFIXES,
    InvalidRowError,
    check_limit,
    is_video_path,
)
from finesight.samples.video_file import read_visual_size

if TYPE_CHECKING:
    # Imported for type checking only: the import is slow, and only web imports need it.
    from finesight.hub.url_files import RemoteImages

IMAGES_FOLDER = "images"
"""Name of the output subfolder with saved and copied images."""


_FROM_URL_SAFE = str.maketrans("-_", "+/")
_DIGITS = re.compile(r"[0-9]+")
_WEB_URL = re.compile("https?://", re.IGNORECASE)


class ImageResolver:
    """Resolve the image values of dataset rows to files on disk.

    Embedded images (bytes, base64, data URLs) are saved in the output folder. A relative path is
    searched in `folder` and then in the current directory; see `iter_spellings` for variations.

    Args:
        validate: Reject missing and invalid images. Otherwise, they keep their expected path.
        exact_paths: Search relative paths only in `folder` and without variations, as in training.
        web_images: Downloader of image URLs. None rejects URLs.
        allowed_root: Folder of an untrusted source. Images outside of it count as missing, and it
            is searched instead of the current directory.
        pages: Pages to use of documents (PDF, multi-page TIFF); empty for all of them.
    """

    def __init__(
        self,
        folder: Path,
        output_folder: Path,
        *,
        validate: bool = True,
        exact_paths: bool = False,
        web_images: RemoteImages | None = None,
        allowed_root: Path | None = None,
        pages: PageRanges = (),
    ) -> None:
        self._ranges = pages
        self.pages: dict[Path, list[Path]] = {}
        self._folder = folder
        self._images_folder = output_folder / IMAGES_FOLDER
        self._validate = validate
        self._exact_paths = exact_paths
        self._web_images = web_images
        self._allowed_root = allowed_root.resolve() if allowed_root else None
        self.saved_names: set[str] = set()
        self._sizes: dict[Path, tuple[int, int]] = {}
        self._saved_paths: dict[str, Path] = {}
        self._found: dict[str, Path] = {}
        self._templates = TemplateSearch(folder)
        self._resolved: dict[str, str] = {}

    def resolve(self, value: object) -> Path:
        """Return the file or page of an image value in a dataset row.

        The path of several pages is that of the document; see `list_pages`.

        Args:
            value: A path, bytes, base64 with or without the header of a data URL (RFC 2397), or
                {bytes, path} as in the datasets library.

        Raises:
            CorruptImageError: The image is missing or invalid.
            UserError: The value has another type.
        """
        path = self._find_image(value)
        pages = self.list_pages(path)
        return pages[0] if len(pages) == 1 else path

    def list_pages(self, path: Path) -> list[Path]:
        """Return the selected pages of a document, or the path of another image alone.

        Training does not select pages, and a data check reports invalid documents elsewhere.
        """
        if path.suffix.lower() not in DOCUMENT_SUFFIXES or self._exact_paths:
            return [path]
        if path not in self.pages:
            try:
                self.pages[path] = list_pages(path, self._ranges)
            except CorruptImageError:
                if self._validate:
                    raise
                self.pages[path] = [path]
        return self.pages[path]

    def _check_image(self, path: Path) -> None:
        for page in self.list_pages(path):
            self.image_size(page)

    def _find_image(self, value: object) -> Path:
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            return self._save_image(value)
        name = value.strip() if isinstance(value, str) else ""
        if not name:
            raise UserError(
                f"an image given as {type(value).__name__} {str(value)[:60]!r}",
                expected="a path, or an image column in Parquet",
                remedy=self._suggest_template(value) or "correct the row, or name another column",
            )
        if name in self._found:
            return self._found[name]
        if name[:5].lower() == "data:" or is_embedded_media(name):
            return self._save_image(_decode_data_url(name))
        if self._web_images is not None and _WEB_URL.match(name):
            return self._fetch_image(self._web_images, name)
        found = self._found[name] = self._resolve_path(name)
        return found

    def image_size(self, path: Path) -> tuple[int, int]:
        """Return height and width in pixels of an image or video, upright, cached per path."""
        if path not in self._sizes:
            self._sizes[path] = read_visual_size(path)
        return self._sizes[path]

    def is_saved(self, path: Path) -> bool:
        """Return whether a path is an embedded image that was saved in the output folder."""
        return path.parent == self._images_folder

    def resolve_frames(self, value: object) -> list[Path]:
        """Return the images of a video given as a list of frames, or as a folder of frames.

        Frames of a folder are ordered by name, with numbers by value.
        """
        frames = value
        if isinstance(value, str) and value.strip():
            folder = self._find(value.strip())[0] or ""
            names: Iterable[str] = ()
            if os.path.isdir(folder):
                names = filter(is_image_value, os.listdir(folder))
            frames = [os.path.join(folder, name) for name in sorted(names, key=_pad_numbers)]
        if isinstance(frames, list | tuple) and frames:
            check_limit(len(frames), MAX_PARTS, "frames")
            return list(map(self.resolve, frames))
        raise InvalidRowError(
            f"a video given as {str(value)[:60]!r}",
            f"the path of a file with one of the suffixes {', '.join(VIDEO_SUFFIXES)}, of a folder"
            " of images, or a list of images",
            self._suggest_template(value)
            or "correct the path; relative paths start at the folder of the data file",
        )

    def _resolve_path(self, name: str) -> Path:
        if _WEB_URL.match(name):
            raise CorruptImageError(
                f"{name[:200]} is a web URL, not a file",
                expected="a path",
                remedy="allow their host with --allow-host HOST, or download the images and put"
                " their paths into the data",
            )
        if "://" in name and not name.startswith("file://"):
            raise CorruptImageError(
                f"{name[:200]} is the URL of a storage, not a file",
                expected="a path",
                remedy="download the files, and write their paths into the data, relative to its"
                " folder",
            )
        document, page = split_page(name)
        candidate, expected_path = self._find(document)
        if candidate is None and not self._validate:
            return Path(expected_path + page).absolute()
        if candidate is None and self._allowed_root:
            raise CorruptImageError(
                "no such image in the source",
                where=name[:200],
                expected="an image inside the source: for safety, a downloaded or unpacked source"
                " cannot use other files of this machine",
                remedy="correct the path; to use other files, import the source as a local folder",
            )
        if candidate is None:
            home = self._folder.resolve()
            current = "" if home == Path.cwd() else f", or at {Path.cwd()}, the current one"
            kind = "video" if is_video_path(name) else "image"
            raise CorruptImageError(
                f"no such {kind}",
                where=name[:200],
                expected=f"an existing file; a relative path starts at {home}, the folder of the"
                f" data file or of its {kind}s{current}",
                remedy=self._suggest_template(document)
                or "correct the path, or change to the base folder of the paths",
            )
        path = Path(self._settled(candidate) + page)
        if self._validate:
            self._check_image(path)
        return path

    def _find(self, name: str) -> tuple[str | None, str]:
        """Return the path of an existing file or folder or None, and the expected path."""
        if name.startswith(ALL_FOLDERS) and not self._exact_paths:
            return self._find_below(name), name
        # Scripts often write paths relative to the directory in which they were started.
        folders = (self._folder, self._allowed_root or Path.cwd())
        if self._exact_paths:
            candidates = [os.path.join(self._folder, name)]
        else:
            names = iter_spellings(name.removeprefix("file://"))
            pairs = itertools.product(names, folders)
            candidates = [os.path.join(folder, spelling) for spelling, folder in pairs]
        # os.path accepts invalid names: too long or with a null byte.
        return next(filter(self._is_available, candidates), None), candidates[0]

    def _find_below(self, name: str) -> str | None:
        """Return the only file in all folders of the data that a path with `**/` stands for.

        Raises:
            CorruptImageError: There are several such files.
        """
        found = self._templates.find_below(name.removeprefix(ALL_FOLDERS))
        if len(found) > 1:
            raise CorruptImageError(
                f"{len(found)} files of this name: {', '.join(found[:3])}",
                where=name[:200],
                expected=f"one file in the folders below {self._folder}",
                remedy="add the folder to the template of the mapping, or remove the copies",
            )
        paths = [os.path.join(self._folder, path) for path in found]
        return next(filter(self._is_available, paths), None)

    def _suggest_template(self, value: object) -> str:
        """Return how to name the file that a text or a number stands for.

        The remedy is empty if no file is found.
        """
        is_name = isinstance(value, str | int) and not isinstance(value, bool)
        name = str(value).strip()
        return self._templates.suggest(name) if is_name and name else ""

    def _is_available(self, path: str) -> bool:
        if not os.path.exists(path) or self._allowed_root is None:
            return os.path.exists(path)
        return Path(self._settled(path)).is_relative_to(self._allowed_root)

    def _settled(self, path_text: str) -> str:
        # Resolve the folder first: `..` is relative to the target of a link.
        path = Path(path_text)
        folder = str(path.parent)
        if folder not in self._resolved:
            self._resolved[folder] = os.path.realpath(folder)
        return os.path.join(self._resolved[folder], path.name)

    def _fetch_image(self, web_images: RemoteImages, url: str) -> Path:
        try:
            return self._save_image(web_images.fetch(url).read_bytes())
        except CorruptImageError:
            raise
        except UserError as error:
            # A failed download is an error of the row, like a missing file.
            raise CorruptImageError(
                error.what, where=error.where, expected=error.expected, remedy=error.remedy
            ) from error

    def _save_image(self, data: bytes) -> Path:
        key = hashlib.sha256(data).hexdigest()
        if key not in self._saved_paths:
            suffix = find_image_suffix(data)
            counter = itertools.count(len(self._saved_paths) + 1)
            names = (f"{number:06d}{suffix}" for number in counter)
            unused = (name for name in names if name not in self.saved_names)
            path = self._images_folder / next(unused)
            self.saved_names.add(path.name)
            self._images_folder.mkdir(exist_ok=True)
            path.write_bytes(data)
            try:
                if self._validate:
                    self._check_image(path)
            except CorruptImageError as error:
                # Omit the path from the error: the staging folder is deleted when the import fails.
                error.what = f"the image of {len(data)} bytes: {error.what}"
                error.where = ""
                raise
            self._saved_paths[key] = path
        return self._saved_paths[key]


def _pad_numbers(name: str) -> str:
    """Return a name whose alphabetical order is that of the values of its numbers."""
    return _DIGITS.sub(lambda match: match[0].zfill(18), name)


def encode_data_url(path: Path) -> str:
    """Encode an image file, or a page as PNG, as a base64 data URL (RFC 2397)."""
    buffer = io.BytesIO()
    if is_page(path):
        save_page(path, buffer)
    data = buffer.getvalue() or path.read_bytes()
    suffix = find_image_suffix(data)
    if suffix not in IMAGE_MAGICS.values():
        raise UserError(
            "an image format that data URLs do not support",
            where=str(path),
            expected=f"one of {', '.join(dict.fromkeys(IMAGE_MAGICS.values()))}",
            remedy="save the image as PNG or JPEG",
        )
    image_type = {".jpg": "jpeg", ".tif": "tiff"}.get(suffix, suffix[1:])
    return f"data:image/{image_type};base64,{base64.b64encode(data).decode()}"


def _decode_data_url(url: str) -> bytes:
    header, comma, data = url.rpartition(",")
    try:
        if not comma or header.lower().endswith(";base64"):
            data = "".join(data.split()).rstrip("=").translate(_FROM_URL_SAFE)
            return base64.b64decode(data + "=" * (-len(data) % 4), validate=True)
    except ValueError:
        pass
    raise CorruptImageError(
        f"the data URL {url[:60]!r} of {len(url)} characters",
        expected="data:image/png;base64, and the image bytes in base64",
        remedy="correct the URL, or save the image and use its path",
    )


class ImageNames:
    """Assign the image paths in the data files that are written to a folder.

    Paths are relative to the final folder `out`, while files are still written to `staging`. Images
    outside of `staging` are referenced where they are. They are copied to `staging`/images if
    `copy` is set, if they are inside a tar or Parquet file, or if their path is not valid UTF-8.
    Copies keep their file names unless a name is in use; the names in `taken` are reserved.
    """

    def __init__(
        self, staging: Path, out: Path, taken: set[str] | None = None, *, copy: bool
    ) -> None:
        self._staging = staging
        self._home = out.resolve()
        self._copy = copy
        self._taken = set[str]() if taken is None else taken
        self._names: dict[str, str] = {}
        self._copies: dict[str, Path] = {}
        self._counters: defaultdict[str, Iterator[int]] = defaultdict(lambda: itertools.count(2))

    def name(self, image: str) -> str:
        """Return the path in the data files for an image, given by its absolute path."""
        document, page = split_page(image)
        if document not in self._names:
            self._names[document] = self._new_name(Path(document))
        return self._names[document] + page

    def copy(self, images: Iterable[str]) -> None:
        """Copy those of the given images that cannot be referenced where they are, each once."""
        for image, _ in map(split_page, images):
            target = self._copies.pop(image, None)
            if target is not None:
                with translate_os_errors(target):
                    target.parent.mkdir(exist_ok=True)
                    found = resolve_content(Path(image))
                    if isinstance(found, Path):
                        shutil.copyfile(found, target)
                    else:
                        target.write_bytes(found.getbuffer())

    def _new_name(self, path: Path) -> str:
        if path.is_relative_to(self._staging):
            return path.relative_to(self._staging).as_posix()
        name = Path(os.path.relpath(path, self._home)).as_posix()
        if not self._copy and is_utf8(name) and not is_container_path(path):
            return name
        free = name = to_readable_name(path.name)
        stem, suffix = os.path.splitext(name)
        while free in self._taken:
            free = f"{stem}-{next(self._counters[name])}{suffix}"
        self._taken.add(free)
        self._copies[str(path)] = self._staging / IMAGES_FOLDER / free
        return f"{IMAGES_FOLDER}/{free}"
