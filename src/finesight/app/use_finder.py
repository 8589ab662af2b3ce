"""Search for what uses a folder of a workspace, in a bounded number of bytes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from finesight.app.line_counter import CHUNK_BYTES
from finesight.app.recipe_detector import YamlBudget, read_recipe_text
from finesight.errors import UserError
from finesight.files.bounded_files import open_regular_file
from finesight.files.path_patterns import SearchBudget, iter_matches
from finesight.files.storage import FileLock
from finesight.label.label_store import JOURNAL_FILE, REVIEWED_FILE, read_sources

MAX_SEARCHED_BYTES = 4 << 30
"""Maximum size of all data files that one search reads."""

MAX_SEARCHED_VALUES = 100_000
"""Maximum number of YAML values of all recipes that one search parses.

The text of further recipes is searched for the name of the folder.
"""


class UseFinder:
    """Finds what uses the files of a folder.

    Args:
        workspace: Resolved folder of the workspace.
        folder: Folder below it, relative.
    """

    def __init__(self, workspace: Path, folder: Path) -> None:
        self._workspace = workspace
        self._folder = folder
        self._root = os.path.realpath(workspace / folder)
        self._bytes_left = MAX_SEARCHED_BYTES
        self._yaml_budget = YamlBudget(MAX_SEARCHED_VALUES)
        self._search_budget = SearchBudget()

    def is_overlapping(self, name: str) -> bool:
        """Return whether a path is in the folder, or contains it below the workspace."""
        path = Path(os.path.realpath(self._workspace / name))
        root = Path(self._root)
        is_parent = self._workspace in path.parents and root.is_relative_to(path)
        return is_parent or path.is_relative_to(root)

    def is_used_by_data(self, home: Path, files: Iterable[Path]) -> bool:
        """Return whether a data set has images in the folder, or was labeled from it.

        Args:
            home: Folder of the data set.
            files: Data files of it.

        Raises:
            UserError: The files are too large to search.
        """
        home_path = os.path.realpath(home)
        if home_path == self._root:
            return False
        sources = [*read_sources(home), *read_sources(home, REVIEWED_FILE)]
        if any(map(self.is_overlapping, sources)):
            return True
        # Image paths are relative to the data set, or absolute.
        relative_path = os.path.relpath(self._root, home_path)
        words = [f'"{relative_path}/'.encode(), f'"{self._root}/'.encode()]
        return any(self._contains_any(file, words) for file in files)

    def _contains_any(self, file: Path, words: Sequence[bytes]) -> bool:
        """Return whether a file contains one of several words. Its lines may have any length."""
        overlap = max(map(len, words)) - 1
        rest = b""
        with open_regular_file(file) as stream:
            self._bytes_left -= os.fstat(stream.fileno()).st_size
            if self._bytes_left < 0:
                name = os.path.relpath(file, self._workspace)
                raise UserError(
                    f"{name} is too large to search for uses of {self._folder}",
                    where="delete",
                    expected=f"data files of at most {MAX_SEARCHED_BYTES >> 30} GiB together",
                    remedy=f"delete or move {name} first,"
                    f" or delete {self._folder} with another program",
                )
            while chunk := stream.read(CHUNK_BYTES):
                content = rest + chunk
                if any(word in content for word in words):
                    return True
                rest = content[-overlap:]
        return False

    def is_used_by_recipe(self, recipe: Path) -> bool:
        """Return whether a recipe, also an invalid one, uses data or weights of the folder."""
        text = read_recipe_text(self._workspace / recipe)[0]
        try:
            return self._uses_folder(self._yaml_budget.compose(text).data())
        except (OSError, UserError, ValueError, yaml.YAMLError):
            return os.path.relpath(self._root, self._workspace) in text

    def _uses_folder(self, content: Any) -> bool:
        if not isinstance(content, dict):
            return False
        used = [content.get(name, []) for name in ("data", "model", "adapter", "train")]
        patterns = [str(self._workspace / name) for name in _list_texts(used)]
        # Names are compared before the search, which may exceed its budget.
        if any(map(self._is_inside, patterns)):
            return True
        for pattern in patterns:
            if any(map(self._is_inside, iter_matches(pattern, self._search_budget))):
                return True
        return False

    def _is_inside(self, path: str) -> bool:
        return Path(os.path.realpath(path)).is_relative_to(self._root)

    def list_open_sessions(self) -> list[Path]:
        """Return the folders below the folder whose labels a page is changing."""
        sessions = []
        for journal in Path(self._root).rglob(JOURNAL_FILE):
            with contextlib.suppress(OSError), FileLock(journal) as lock:
                try:
                    lock.acquire(shared=True, wait=False)
                except BlockingIOError:
                    sessions.append(journal.parent)
        return sessions


def _list_texts(value: object) -> list[str]:
    """Return all values of nested settings as texts."""
    if isinstance(value, Mapping):
        value = [*value.values()]
    if not isinstance(value, list):
        return [str(value)]
    texts = []
    for item in value:
        texts += _list_texts(item)
    return texts
