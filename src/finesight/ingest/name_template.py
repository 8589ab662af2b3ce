"""Find how files of images and videos are named after the values of a column."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from finesight.files.bounded_files import SpecialFileError
from finesight.ingest.folder_listing import iter_files, list_entries
from finesight.samples.image_file import IMAGE_SUFFIXES
from finesight.samples.sample import VIDEO_SUFFIXES, is_video_path

COMMON_SUFFIXES = (".jpg", ".png", ".jpeg", ".webp", ".JPG", *VIDEO_SUFFIXES)
"""Suffixes that are tried for the identifier of a file."""

ALL_FOLDERS = "**/"
"""Start of a path that stands for any folder below that of the data."""

MAX_SEARCHED_FOLDERS = 100
"""Maximum number of folders next to the data that are searched for a file."""

MAX_SEARCHES = 5
"""Maximum number of names that are searched without success."""

MAX_SUGGESTED_FILES = 10_000
"""Maximum number of files in all folders of which an error suggests one."""

MAX_NAME_CHARS = 255
"""Maximum length of a value that may stand for a file."""

MAX_SHOWN_TEMPLATES = 3
"""Maximum number of templates in a remedy."""


@dataclass(frozen=True, slots=True)
class NameTemplate:
    """Path of a file, relative to the folder of the data, around the value of a column.

    Attributes:
        width: Number of digits to which zeros pad a number; 0 without padding.
    """

    before: str
    after: str
    width: int = 0

    def fill(self, name: str) -> str:
        """Return the path for a value of the column."""
        return f"{self.before}{name.zfill(self.width)}{self.after}"

    def format(self, column: str = "COLUMN") -> str:
        """Return the template for a mapping file, for the path of a column."""
        if self.width:
            column = f"{column}:0{self.width}"
        return f"{_escape(self.before)}{{{column}}}{_escape(self.after)}"


def _is_relative_name(name: str) -> bool:
    """Return whether a value may stand for a file in a folder."""
    is_short = 0 < len(name) <= MAX_NAME_CHARS
    return is_short and not os.path.isabs(name) and ".." not in Path(name).parts


def _list_suffixes(name: str) -> tuple[str, ...]:
    """Return the suffixes that may complete a name."""
    if Path(name).suffix.lower() in (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES):
        return ("",)
    return COMMON_SUFFIXES


def _escape(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def _select_paths(paths: Mapping[str, Sequence[str]], name: str) -> list[str]:
    """Return the paths that end with a name or a path, of those by file name."""
    found = paths.get(Path(name).name, [])
    return [path for path in found if f"/{path}".endswith(f"/{name}")]


class TemplateSearch:
    """Search of the files that values without a suffix, a prefix or a folder stand for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._folders: list[str] = []
        self._templates: list[NameTemplate] = []
        self._remedy = ""
        self._num_failed = 0
        self._files: dict[str, list[str]] | None = None
        self._first_files: dict[str, list[str]] | None = None
        self._names: dict[str, list[str]] = {}

    def find_below(self, name: str) -> list[str]:
        """Return the paths of the files in all folders that end with a name or a path."""
        if self._files is None:
            self._files = {}
            self._files = self._group_by_name(iter_files(self._folder))
        return _select_paths(self._files, name)

    def _find_first_below(self, name: str) -> list[str]:
        """Return the paths that end with a name, among the first files in all folders."""
        if self._first_files is None:
            self._first_files = {}
            with suppress(SpecialFileError):  # a search in all folders would fail
                files = itertools.islice(iter_files(self._folder), MAX_SUGGESTED_FILES)
                self._first_files = self._group_by_name(files)
        return _select_paths(self._first_files, name)

    def _group_by_name(self, files: Iterable[Path]) -> dict[str, list[str]]:
        """Return the paths of files, relative to the folder of the data, by file name."""
        paths: dict[str, list[str]] = {}
        for file in files:
            paths.setdefault(file.name, []).append(file.relative_to(self._folder).as_posix())
        return paths

    def suggest(self, name: str) -> str:
        """Return a remedy with the templates of the file of a value.

        The remedy is empty if no file is found.
        """
        if not _is_relative_name(name):
            return ""
        if not self._templates and self._num_failed < MAX_SEARCHES and self._folder.is_dir():
            self._templates = [*self._find_named(name), *self._find_numbered(name)]
            self._num_failed += not self._templates
            self._remedy = self._format_remedy(name)
        if any(self._exists(template.fill(name)) for template in self._templates):
            return self._remedy
        return self._suggest_all_folders(name)

    def _suggest_all_folders(self, name: str) -> str:
        """Return a remedy for a file in any folder, or an empty text."""
        if not self._folder.is_dir():
            return ""
        for suffix in _list_suffixes(name):
            found = self._find_first_below(f"{name}{suffix}")
            if len(found) == 1:
                role = "videos" if is_video_path(found[0]) else "images"
                template = json.dumps(NameTemplate(ALL_FOLDERS, suffix).format())
                return (
                    f"give a mapping file (--mapping) with {role}: {{template: {template}}}, for"
                    f" the column with the names, which searches all folders"
                )
        return ""

    def find(self, names: Sequence[str]) -> NameTemplate | None:
        """Return a template with a file for each of several values; None without one."""
        if not all(map(_is_relative_name, names)):
            return None
        for template in (*self._find_named(names[0]), *self._find_numbered(names[0])):
            if all(self._exists(template.fill(name)) for name in names):
                return template
        return None

    def _format_remedy(self, name: str) -> str:
        shown: list[str] = []
        for template in self._templates[:MAX_SHOWN_TEMPLATES]:
            role = "images"
            if is_video_path(template.fill(name)):
                role = "videos"
            text = json.dumps(template.format(), ensure_ascii=False)
            shown.append(f"{role}: {{template: {text}}}")
        first = "complete the names"
        if self._templates and not self._templates[0].after:
            folder = self._templates[0].before.rstrip("/")
            first = f"change to the folder {folder}, in which the paths start"
        return (
            f"{first}, or give a mapping file (--mapping) with {' or '.join(shown)}, for the column"
            f" with the names; {ALL_FOLDERS} at the start searches all folders"
        )

    def _list_folders(self) -> list[str]:
        """Return the prefixes of paths in the folder of the data and in its subfolders."""
        if not self._folders:
            entries = list_entries(str(self._folder))
            found = [f"{entry.name}/" for entry in entries if entry.is_dir()]
            self._folders = ["", *sorted(found)[:MAX_SEARCHED_FOLDERS]]
        return self._folders

    def _list_names(self, folder: str) -> list[str]:
        """Return the names in a folder, which is listed once."""
        if folder not in self._names:
            entries = list_entries(os.path.join(self._folder, folder))
            self._names[folder] = [entry.name for entry in entries]
        return self._names[folder]

    def _exists(self, file: str) -> bool:
        return os.path.isfile(os.path.join(self._folder, file))

    def _find_named(self, name: str) -> list[NameTemplate]:
        """Return the templates of files that have a name or a path in one of the folders."""
        templates: list[NameTemplate] = []
        for folder, suffix in itertools.product(self._list_folders(), _list_suffixes(name)):
            template = NameTemplate(folder, suffix)
            if self._exists(template.fill(name)):
                templates.append(template)
        return templates

    def _find_numbered(self, number: str) -> list[NameTemplate]:
        """Return the templates of files whose names end with a number."""
        if re.fullmatch("[0-9]+", number) is None:
            return []
        templates: dict[NameTemplate, None] = {}
        pattern = re.compile(rf"(?P<prefix>(?:.*[^0-9])?)(?P<zeros>0*){number}(?P<suffix>\.[^.]+)")
        for folder in self._list_folders():
            for name in self._list_names(folder):
                match = pattern.fullmatch(name)
                if match is None or match["suffix"] not in COMMON_SUFFIXES:
                    continue
                width = 0
                if match["zeros"]:
                    width = len(match["zeros"] + number)
                if match["prefix"] or width:
                    found = NameTemplate(f"{folder}{match['prefix']}", match["suffix"], width)
                    templates[found] = None
        return list(templates)
