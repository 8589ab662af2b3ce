"""Items of the lists in a JSON document, read one by one: the document may exceed the memory."""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from finesight.errors import UserError
from finesight.files.bounded_files import DuplicateKeyError, parse_json, reject_duplicates
from finesight.ingest.field_path import FieldPath, PathStep, join_location
from finesight.ingest.record_values import (
    Scope,
    build_missing_error,
    build_type_error,
    is_empty,
    list_item_steps,
)
from finesight.samples.sample import check_json

WINDOW_CHARS = 2**18
"""Number of characters that are read at once."""

MAX_ITEM_CHARS = 2**28
"""Maximum number of characters of an item."""

MAX_NESTED = 200
"""Maximum depth of lists and objects, which is that of `parse_json`."""

MAX_LISTED_KEYS = 1000
"""Number of keys of an object that the error of a missing one is built from."""

_TOKEN_CHARS = 16
"""Length that no literal, number without digits at its end, or escape sequence exceeds."""


# Finds the end of a value. Its numbers and objects are not used.
_DECODER = json.JSONDecoder(parse_int=str, parse_float=str, object_pairs_hook=reject_duplicates)

_ITEM_POSITION = re.compile(r" at line [0-9]+ column [0-9]+$")

_WHITE_SPACE = re.compile(r"[ \t\n\r]*")


class DocumentItem(NamedTuple):
    """An item of a list in a document.

    Attributes:
        list_name: Name of the list.
        scope: Parsed value of the item, with its location and its key.
        text: Its JSON.
    """

    list_name: str
    scope: Scope
    text: str


class _OpenPath(NamedTuple):
    """Steps that remain of the path of a list, from a value of the document.

    Attributes:
        is_optional: Whether the step to the value is optional, so that the value may be empty.
    """

    list_name: str
    path: FieldPath
    steps: Sequence[PathStep]
    is_optional: bool = False


class JsonStream:
    """A JSON document that is read once, from a sliding window of its text.

    Attributes:
        unused_keys: Number of values outside of the lists by path. `*` stands for all items of a
            list.
        named_lists: Names of the lists whose items have names in the document instead of numbers.
    """

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._reader = io.TextIOWrapper(file, "utf-8-sig", newline="")
        self._path = path
        self._text = ""
        self._position = 0
        self._is_complete = False
        self._num_nested = 0
        # Of the text before the window, for messages:
        self._num_chars = 0
        self._num_lines = 0
        self._line_start = 0
        self.unused_keys: Counter[str] = Counter()
        self.named_lists: set[str] = set()

    def iter_items(self, lists: Mapping[str, FieldPath]) -> Iterator[DocumentItem]:
        """Yield the items of lists in the order of the document.

        Args:
            lists: Path of each list by its name; a final `*` may be left out.

        Raises:
            UserError: The document is not valid, or has no list at a path.
        """
        paths: list[_OpenPath] = []
        for name, path in lists.items():
            paths.append(_OpenPath(name, path, list_item_steps(path)))
        yield from self._walk(paths, Scope(None, ""), "")
        if self._peek():
            raise self._build_error("more text after the document", self._position)

    def _walk(
        self, paths: Sequence[_OpenPath], scope: Scope, pattern: str
    ) -> Iterator[DocumentItem]:
        """Yield the items inside of the list or object at the location of `scope`.

        Args:
            pattern: The location, with `*` for the keys that a path names by `*`.
        """
        if self._peek() not in ("[", "{"):
            self._check_scalar(paths, scope.location)
            return
        keys: list[Hashable] = []
        missing: set[str] = set()
        has_each = False
        for path in paths:
            step = path.steps[0]
            has_each = has_each or step.is_each
            if not (step.is_each or step.is_optional):
                missing.add(step.key)
        for key in self._iter_members():
            if len(keys) < MAX_LISTED_KEYS:
                keys.append(key)
            missing.discard(str(key))
            inner = self._descend(paths, key)
            location = join_location(scope.location, key)
            is_unused_item = isinstance(key, int) and not inner
            inner_pattern = join_location(pattern, key)
            if has_each or is_unused_item:
                inner_pattern = f"{pattern}.*" if pattern else "*"
            if not inner:
                self.unused_keys[inner_pattern] += 1
                self._skip(location)
            elif all(path.steps for path in inner):
                yield from self._walk(inner, Scope(None, location), inner_pattern)
            else:
                yield from self._read_item(inner, Scope(None, "", scope, key))
        for path in paths:
            may_be_empty = path.is_optional and not keys
            if path.steps[0].key in missing and not may_be_empty:
                location = scope.location or "the document"
                error = build_missing_error(path.steps[0].key, keys, location, path.path)
                error.where = str(self._path)
                raise error

    def _check_scalar(self, paths: Sequence[_OpenPath], location: str) -> None:
        """Read a value that is no list or object. Raises UserError unless it may be empty."""
        scope = Scope(self._parse(self._read_text(location), location), location)
        for path in paths:
            if not (path.is_optional and is_empty(scope.value)):
                error = build_type_error(scope, path.path, "a list or an object")
                error.where = str(self._path)
                raise error

    def _descend(self, paths: Sequence[_OpenPath], key: object) -> list[_OpenPath]:
        """Return the paths that pass through a key, without their first step."""
        inner: list[_OpenPath] = []
        for list_name, path, (step, *rest), _ in paths:
            if step.is_each or step.key == str(key):
                inner.append(_OpenPath(list_name, path, rest, step.is_optional))
            if step.is_each and isinstance(key, str) and not key.isdecimal():
                self.named_lists.add(list_name)
        return inner

    def _read_item(self, paths: Sequence[_OpenPath], scope: Scope) -> Iterator[DocumentItem]:
        """Yield the next value as an item of all lists whose paths end there."""
        if any(path.steps for path in paths):
            names = ", ".join(path.path.text for path in paths)
            raise UserError(
                f"one of the lists {names} is inside of another",
                where=str(self._path),
                expected="lists that do not contain each other",
                remedy="name other lists under rows and from in the mapping",
            )
        text = self._read_text(scope.location)
        item = scope._replace(value=self._parse(text, scope.location))
        for path in paths:
            yield DocumentItem(path.list_name, item, text)

    def _iter_members(self) -> Iterator[Any]:
        """Yield the keys of a list or an object. The caller reads the value after each."""
        is_object = self._peek() == "{"
        closing = "}" if is_object else "]"
        self._position += 1
        self._num_nested += 1
        if self._num_nested > MAX_NESTED:
            raise self._build_error(f"more than {MAX_NESTED} nested values", self._position)
        names: set[str] = set()
        index = 0
        is_last = self._peek() == closing
        while not is_last:
            if is_object:
                name = self._read_name()
                if name in names:
                    problem = f"the key {name[:60]!r} occurs twice in one object"
                    raise self._build_error(problem, self._position)
                names.add(name)
                yield name
            else:
                yield index
            index += 1
            is_last = self._peek() == closing
            if not is_last:
                self._expect(",")
        self._expect(closing)
        self._num_nested -= 1

    def _read_name(self) -> str:
        """Return the key of an object, and read the colon after it."""
        if self._peek() != '"':
            raise self._build_error("no key in double quotes", self._position)
        text = self._read_text("a key")
        self._expect(":")
        try:
            name: str = parse_json(text)
        except ValueError as error:
            raise self._build_error(str(error), self._position) from error
        return name

    def _expect(self, character: str) -> None:
        """Read a character. Raises UserError for another one."""
        if self._peek() != character:
            raise self._build_error(f"no {character!r}", self._position)
        self._position += 1

    def _skip(self, location: str) -> None:
        """Read a value that no list contains. A large one is read member by member."""
        is_container = self._peek() in ("[", "{")
        end = self._find_end(location)
        if end is not None:
            self._position = end
        elif is_container:
            for key in self._iter_members():
                self._skip(join_location(location, key))
        else:
            self._read_text(location)

    def _parse(self, text: str, location: str) -> Any:
        """Return the value of a text from `_read_text` with the limits of a row."""
        check_json(text.encode(), f"{self._path}, {location}")
        try:
            return parse_json(text)
        except ValueError as error:
            problem = _ITEM_POSITION.sub("", str(error))  # inside of the item
            raise self._build_error(f"{problem} in {location}", self._position) from error

    def _read_text(self, location: str) -> str:
        """Return the JSON of the next value, in which no key of an object occurs twice."""
        self._peek()
        end = self._find_end(location)
        while end is None:
            self._read_more()
            end = self._find_end(location)
        text = self._text[self._position : end]
        self._position = end
        return text

    def _find_end(self, location: str) -> int | None:
        """Return the end of the next value in the window.

        Returns None if the window may not contain all of it.

        Raises:
            UserError: The value is not valid.
        """
        try:
            _, end = _DECODER.raw_decode(self._text, self._position)
        except json.JSONDecodeError as error:
            if self._is_cut(error.pos):
                return None
            raise self._build_error(error.msg, error.pos) from error
        except DuplicateKeyError as error:
            raise self._build_error(f"{error} in {location}", self._position) from error
        except RecursionError as error:
            problem = f"more than {MAX_NESTED} nested values"
            raise self._build_error(problem, self._position) from error
        if len(self._text) - end < _TOKEN_CHARS and not self._is_complete:
            return None  # the digits of a number may continue
        return int(end)

    def _is_cut(self, position: int) -> bool:
        """Return whether an error may be due to the end of the window."""
        num_chars = len(self._text) - self._position
        if self._is_complete or num_chars > MAX_ITEM_CHARS:
            return False
        if position > len(self._text) - _TOKEN_CHARS:
            return True
        if self._text[position] != '"':
            return False
        try:
            _DECODER.raw_decode(self._text, position)
        except json.JSONDecodeError:
            return True  # a text without its end
        return False

    def _peek(self) -> str:
        """Return the next character after white space; empty at the end of the document."""
        while True:
            match = _WHITE_SPACE.match(self._text, self._position)
            assert match is not None, "it may be empty"
            self._position = match.end()
            if self._position < len(self._text):
                return self._text[self._position]
            if self._is_complete:
                return ""
            self._read_more()

    def _read_more(self) -> None:
        """Move the window to the next value, and at least double the text of it."""
        passed = self._text[: self._position]
        rest = self._text[self._position :]
        self._num_lines += passed.count("\n")
        if "\n" in passed:
            self._line_start = self._num_chars + passed.rindex("\n") + 1
        self._num_chars += len(passed)
        self._position = 0
        try:
            more = self._reader.read(max(WINDOW_CHARS, len(rest)))
        except UnicodeDecodeError as error:
            self._text = rest
            problem = f"bytes after this position are not UTF-8 ({error.reason})"
            raise self._build_error(problem, len(rest)) from error
        self._is_complete = not more
        self._text = rest + more

    def _build_error(self, problem: str, position: int) -> UserError:
        """Build an error of the document at a position of the window."""
        line = self._num_lines + self._text.count("\n", 0, position) + 1
        line_start = self._line_start
        if "\n" in self._text[:position]:
            line_start = self._num_chars + self._text.rindex("\n", 0, position) + 1
        column = self._num_chars + position - line_start + 1
        return UserError(
            f"not a JSON document: {problem[:200]}, at line {line} column {column}",
            where=str(self._path),
            expected="one JSON document, in which the mapping names lists",
            remedy="correct the file, or the mapping",
        )
