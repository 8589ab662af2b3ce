"""Detection of recipes among YAML files, within a bound on the work of a page."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path

import yaml

from finesight.errors import UserError
from finesight.files.bounded_files import (
    ComposedYaml,
    SpecialFileError,
    open_regular_file,
    read_text,
)

MAX_RECIPE_BYTES = 100_000

MAX_RECIPE_VALUES, MAX_PAGE_VALUES = 5000, 40_000
"""Maximum number of YAML values of a recipe, and of all files that one page parses.

Parsing takes up to 15 microseconds per value.
"""

MAX_KNOWN_FILES = 10_000


def read_recipe_text(file: Path) -> tuple[str, str]:
    """Return the start of a recipe and its digest; empty if it is unreadable."""
    content = b""
    with suppress(OSError, SpecialFileError), open_regular_file(file) as stream:
        content = stream.read(MAX_RECIPE_BYTES)
    return content.decode("utf-8", "replace"), hashlib.sha256(content).hexdigest()


class YamlBudget:
    """Number of YAML values that several recipes may have together. The last one may exceed it."""

    def __init__(self, num_values: int) -> None:
        self._values_left = num_values

    @property
    def is_used_up(self) -> bool:
        """Return whether no further recipe is parsed."""
        return self._values_left <= 0

    def compose(self, text: str) -> ComposedYaml:
        """Parse the text of a recipe.

        Raises YAMLError for invalid text, for too many values, and if the budget is used up.
        """
        if self.is_used_up:
            raise yaml.YAMLError("too many values of several recipes")
        try:
            document = ComposedYaml(text, MAX_RECIPE_VALUES)
        except yaml.YAMLError:
            # The number of values before the error is unknown.
            self._values_left -= min(MAX_RECIPE_VALUES, len(text))
            raise
        self._values_left -= document.num_values
        return document


class RecipeDetector:
    """Tells recipes from other YAML files, and remembers those that have not changed."""

    def __init__(self) -> None:
        self._known: dict[Path, tuple[tuple[int, int], bool]] = {}
        self._budget = YamlBudget(0)

    def start_page(self) -> None:
        """Allow to parse the files of one page. The next page parses further ones."""
        self._budget = YamlBudget(MAX_PAGE_VALUES)

    def is_recipe(self, file: Path) -> bool:
        """Return whether a file is a recipe; False beyond the bound of the page."""
        try:
            state = file.stat()
        except OSError:  # deleted meanwhile
            return False
        version = state.st_mtime_ns, state.st_size
        known = self._known.get(file)
        if known is not None and known[0] == version:
            return known[1]
        if self._budget.is_used_up:
            return False
        is_recipe = self._parse(file)
        if len(self._known) >= MAX_KNOWN_FILES:
            self._known.clear()
        self._known[file] = version, is_recipe
        return is_recipe

    def _parse(self, file: Path) -> bool:
        try:
            text = read_text(file, expected="a recipe", max_bytes=MAX_RECIPE_BYTES)
            root = self._budget.compose(text).root
        except (UserError, yaml.YAMLError):
            return False
        if not isinstance(root, yaml.MappingNode):
            return False
        return {"model", "data"} <= {str(name.value) for name, _ in root.value}
