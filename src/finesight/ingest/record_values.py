"""Values of a record by strict paths, with an account of the keys that a mapping used."""

from __future__ import annotations

import ast
import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from finesight.errors import suggest_name
from finesight.files.bounded_files import parse_unique_json
from finesight.ingest.field_path import EACH, FieldPath, PathStep, format_key, join_location
from finesight.ingest.formats.dataset_format import (
    decode_base64_text,
    describe_value,
    dump_json,
)
from finesight.ingest.mapping import (
    GROUPED_ROWS,
    Condition,
    Elements,
    Lookup,
    Rows,
    Scalar,
    Value,
    format_key_text,
    format_scalar,
)
from finesight.ingest.row_reader import Record
from finesight.samples.sample import InvalidRowError, check_json, check_limit

MAX_ITEMS = 100_000
"""Maximum number of items of a list that a mapping iterates over in a record."""

META_ROLE = "meta"
PART_ROLE = "part"
UNCOUNTED_ROLES = (META_ROLE, PART_ROLE)
"""Roles of which values may be missing without a note: metadata, and the kinds of a part."""

MAX_INTEGER = 2**63

MAX_INDEX_DIGITS = 9

MAX_LITERAL_CHARS = 1_000_000
"""Maximum length of a Python literal that is parsed."""


class Missing:
    """Type of `MISSING`, the value of an optional key that a record does not have."""

    def __repr__(self) -> str:
        return "missing"


MISSING: Final = Missing()


class MissingKeyError(InvalidRowError):
    """Raised if a path names a key that the record does not have."""


class GroupedRows(list[Record]):
    """Rows of a file with the same value at the path `group` of a mapping."""


Slot = tuple[int, str | int]
"""Identity of a value in a record: the id of its list or object, and its index or key there."""


class Scope(NamedTuple):
    """A value in which paths start.

    Attributes:
        start: Location of a value without a holder.
        holder: List or object that contains the value.
        key: Index or key of the value in its holder.
    """

    value: Any
    start: str = ""
    holder: Scope | None = None
    key: str | int = ""

    @property
    def slot(self) -> Slot | None:
        """Return the identity of the value in the record; None without a holder."""
        if self.holder is None:
            return None
        return id(self.holder.value), self.key

    @property
    def location(self) -> str:
        """Return the location in the record. Few values need it, so that it is not stored."""
        if self.holder is None:
            return self.start
        return join_location(self.holder.location, self.key)

    def list_general_keys(self) -> tuple[str, ...]:
        """Return the keys on the way to the value, with `*` for numbers below the record.

        Keys of the record itself may be numbers of columns.
        """
        if self.holder is None:
            return ()
        holder_keys = self.holder.list_general_keys()
        if holder_keys and _is_number(self.key):
            return (*holder_keys, EACH)
        return (*holder_keys, format_key(self.key))

    def get_item(self, path: FieldPath) -> Scope:
        """Return the item that the last `*` of the path to the value stands for."""
        scope = self
        for step in reversed(path.steps):
            if step.is_each or scope.holder is None:
                break
            scope = scope.holder
        return scope


class RoleAssignment(NamedTuple):
    """A value of a record, and the role that the mapping gives it."""

    scope: Scope
    role: str

    @property
    def location(self) -> str:
        """Return the location of the value in the record."""
        return self.scope.location

    @property
    def value(self) -> Any:
        """Return the value."""
        return self.scope.value


@dataclass(slots=True)
class RecordValues:
    """Values of one record, and which of them were used.

    Attributes:
        readings: Values that were read, in order.
        num_missing: Number of missing values of optional keys by path, without metadata.
        num_object_keys: Number of keys of objects whose values a path lists, by path.
    """

    root: Scope
    readings: list[RoleAssignment] = field(default_factory=list)
    num_missing: Counter[str] = field(default_factory=Counter)
    num_object_keys: Counter[str] = field(default_factory=Counter)
    _used: set[Slot] = field(default_factory=set)
    # Items of `zip` are built for the mapping. Each of their values has a slot in the record.
    _origins: dict[Slot, Slot] = field(default_factory=dict)
    _zipped: list[Record] = field(default_factory=list)
    # Values of the items that some lookup did not select, by its list and by item.
    _unselected: dict[str, dict[Slot | None, list[Scope]]] = field(default_factory=dict)

    def read(self, path: FieldPath, scope: Scope, role: str) -> Any:
        """Return the value at a path: a list with an item for each value of `*`, if it has one.

        Returns `MISSING` if an optional key is missing.

        Raises:
            MissingKeyError: A key that is not optional is missing.
        """
        found: list[Scope] = []
        value = self._find(path, scope, found)
        self._use(found, role)
        return value

    def _find(self, path: FieldPath, scope: Scope, found: list[Scope]) -> Any:
        """Return the value at a path, and append its parts to `found`; they are not used yet."""
        return self._read_steps(self._get_start(path, scope), path.steps, path, found)

    def _get_start(self, path: FieldPath, scope: Scope) -> Scope:
        if path.from_root:
            return self.root
        return scope

    def read_optional(self, path: FieldPath, scope: Scope, role: str) -> list[Scope]:
        """Mark the values at a path as used, and return those that are new."""
        found: list[Scope] = []
        with suppress(InvalidRowError):  # a value without keys has no value at the path
            self._read_steps(self._get_start(path, scope), path.optional_steps, path, found)
        new = [one for one in found if one.slot not in self._used]
        self._use(new, role)
        return new

    def discard(self, scope: Scope) -> None:
        """Mark an item that the mapping leaves out, with all its values, as used."""
        if scope.slot is not None:
            self._used.add(scope.slot)
            return
        if isinstance(scope.value, dict):
            for key in scope.value:
                slot = (id(scope.value), key)
                self._used.add(self._origins.get(slot, slot))

    def discard_key(self, key: str) -> None:
        """Mark a key of the record as used."""
        self._used.add((id(self.root.value), key))

    def use_repeated(self, rows: Sequence[Record]) -> None:
        """Mark values as used that are equal to a used one of the first row."""
        first, *others = rows
        for other in others:
            self._use_equal(first, other)

    def _use_equal(self, first: Record, other: Record) -> None:
        for key, value in first.items():
            if key not in other:
                continue
            if (id(first), key) in self._used:
                if other[key] == value:
                    self._used.add((id(other), key))
            elif isinstance(value, dict) and isinstance(other[key], dict):
                self._use_equal(value, other[key])

    def _use(self, found: Sequence[Scope], role: str) -> None:
        for one in found:
            slot = one.slot
            if slot is not None:
                self._used.add(self._origins.get(slot, slot))
            self.readings.append(RoleAssignment(one, role))

    def _read_steps(
        self, scope: Scope, steps: Sequence[PathStep], path: FieldPath, found: list[Scope]
    ) -> Any:
        """Return the value at the steps of a path, and append its parts to `found`."""
        for number, step in enumerate(steps, start=1):
            if step.is_each:
                return self._read_items(scope, step, steps[number:], path, found)
            key = _find_key(scope, step, path)
            if key is MISSING:
                return MISSING
            scope = Scope(scope.value[key], "", scope, key)
            if step.is_optional and number < len(steps) and is_empty(scope.value):
                return MISSING
        found.append(scope)
        return scope.value

    def _read_items(
        self,
        scope: Scope,
        step: PathStep,
        rest: Sequence[PathStep],
        path: FieldPath,
        found: list[Scope],
    ) -> list[Any]:
        """Return the value at the remaining steps for each item of a list or an object."""
        values: list[Any] = []
        for inner in self._list_inner(scope, step, path):
            if step.is_optional and rest and is_empty(inner.value):
                continue
            value = self._read_steps(inner, rest, path, found)
            if value is MISSING:
                self.num_missing[path.text] += 1
            else:
                values.append(value)
        return values

    def _list_inner(self, scope: Scope, step: PathStep, path: FieldPath) -> list[Scope]:
        """Return the values that a step of a path names, and count keys that become unknown."""
        container = scope.value
        keys = list(find_keys(scope, step, path))
        if step.is_each and isinstance(container, dict) and not all(map(_is_number, keys)):
            self.num_object_keys[path.text] += len(keys)
        return [Scope(container[key], "", scope, key) for key in keys]

    def iterate(self, elements: Elements, scope: Scope, role: str) -> list[Scope]:
        """Return the items of a list, or of several lists of equal length.

        Without a list, the only item is the scope itself.

        Raises:
            InvalidRowError: A path is no list, or lists have unequal lengths.
        """
        if elements.zip is not None:
            return self._zip(elements.zip, scope, role)
        if elements.each is None:
            return [scope]
        items = self.list_items(elements.each, scope)
        if not items and elements.each.is_optional:
            self.num_missing[elements.each.text] += 1
        check_limit(len(items), MAX_ITEMS, f"items of {role}")
        return items

    def list_items(self, path: FieldPath, scope: Scope) -> list[Scope]:
        """Return the items of the lists at a path; a final `*` may be left out."""
        return self._list_values(list_item_steps(path), path, scope)

    def _list_values(self, steps: Sequence[PathStep], path: FieldPath, scope: Scope) -> list[Scope]:
        """Return the values at the steps of a path, with those of optional keys if not empty."""
        scopes = [self._get_start(path, scope)]
        last = len(steps) - 1
        for number, step in enumerate(steps):
            inner: list[Scope] = []
            for one in scopes:
                inner += self._list_inner(one, step, path)
            scopes = inner
            if step.is_optional and number < last:
                scopes = [one for one in inner if not is_empty(one.value)]
        return scopes

    def _zip(self, paths: Mapping[str, FieldPath], scope: Scope, role: str) -> list[Scope]:
        columns: dict[str, list[Scope]] = {}
        for name, path in paths.items():
            if any(step.is_each for step in path.steps):
                columns[name] = self._list_values(path.steps, path, scope)
            else:
                columns[name] = self.list_items(path, scope)
        _require_lists(columns, role)
        lengths = {name: len(items) for name, items in columns.items()}
        if len(set(lengths.values())) > 1:
            counts = ", ".join(f"{name}: {count}" for name, count in lengths.items())
            raise InvalidRowError(
                f"lists of unequal lengths for {role} ({counts})",
                "lists with an item for each other",
                "correct the row, or remove it",
            )
        scopes: list[Scope] = []
        for items in zip(*columns.values(), strict=True):
            record = {name: one.value for name, one in zip(columns, items, strict=True)}
            self._zipped.append(record)  # its id must stay unique
            for name, one in zip(columns, items, strict=True):
                if one.slot is not None:
                    self._origins[id(record), name] = self._origins.get(one.slot, one.slot)
            scopes.append(Scope(record, items[0].location))
        return scopes

    def find_unmet(self, conditions: Sequence[Condition], scope: Scope) -> str | None:
        """Return the path of the first condition that a value does not meet, or None."""
        unmet: list[str] = []
        # All conditions are read, so that the account has the keys of each.
        for condition in conditions:
            value = self.read(condition.path, scope, "condition")
            if isinstance(value, dict | list | tuple):
                raise InvalidRowError(
                    f"the condition on {condition.path.text} has {describe_value(value)}",
                    "a text or a number",
                    "name a key of the value in the condition",
                )
            _check_booleans(condition, value)
            text = ""
            if value is not MISSING and not (condition.path.is_optional and is_empty(value)):
                text = format_key_text(value)
            is_met = text in map(format_key_text, condition.equals or ())
            if condition.equals is None:
                is_met = text not in map(format_key_text, condition.differs_from or ())
            if not is_met:
                unmet.append(condition.path.text)
        if not unmet:
            return None
        return unmet[0]

    def evaluate(self, value: Value, scope: Scope, role: str) -> Any:
        """Return the value of a role; `MISSING` if an optional key is missing.

        Raises:
            MissingKeyError: A key is missing.
            InvalidRowError: `values` does not have the value of the source.
        """
        found = self._read_source(value, scope, role)
        if found is MISSING:
            return MISSING
        role = value.name_role(role)
        if value.split is not None:
            found = _split_text(found, value.split, role)
        if value.values is not None:
            found = _translate(found, value.values, role)
        if isinstance(value.lookup, Lookup):
            found = self._look_up(found, value.lookup, scope, role)
        is_chosen = value.lookup in ("choices", "letters")  # the choices are written
        if value.write == "json" and not isinstance(found, str) and not is_chosen:
            found = write_json(found, role)
        return found

    def _look_up(self, found: Any, lookup: Lookup, scope: Scope, role: str) -> Any:
        """Return the value of the item whose key is equal to a value."""
        matches: list[Any] = []
        unselected = self._unselected.setdefault(lookup.list.text, {})
        for item in self.list_items(lookup.list, scope):
            parts: list[Scope] = []
            key = self._find(lookup.key, item, parts)
            value = self._find(lookup.value, item, parts)
            if format_key_text(key) == format_key_text(found):
                matches.append(value)
                self._use(parts, role)
            else:
                unselected.setdefault(item.slot, []).extend(parts)
        if len(matches) != 1:
            raise InvalidRowError(
                f"{len(matches)} items of {lookup.list.text} have the {lookup.key.text} of the"
                f" {role}, {describe_value(found)}",
                "one item",
                "correct the row, or the lookup of the mapping",
            )
        return matches[0]

    def discard_unselected(self) -> Counter[str]:
        """Mark items that no lookup selected as used, and count them."""
        counts: Counter[str] = Counter()
        for list_path, items in self._unselected.items():
            for parts in items.values():
                slots = {self._origins.get(one.slot, one.slot) for one in parts if one.slot}
                counts[list_path] += slots.isdisjoint(self._used)
                self._used |= slots
        return counts

    def evaluate_text(self, value: Value, scope: Scope, role: str) -> str:
        """Return the value of a role as text. Raises InvalidRowError if it is empty or no text."""
        return to_text(self.evaluate(value, scope, role), value.name_role(role))

    def _read_source(self, value: Value, scope: Scope, role: str) -> Any:
        if value.path is not None:
            parts: list[Scope] = []
            found = self._find_present(value.path, scope, role, parts)
            self._use(parts, role)
            return found
        if value.any_of is not None:
            found = self._read_first(value.any_of, scope, role)
            if found is MISSING and not value.is_optional:
                raise InvalidRowError(
                    f"no value for the {value.name_role(role)}",
                    "a value at one of the paths",
                    "add it, or write ? after the keys that rows may lack",
                )
            return found
        if value.template is None:
            return value.const
        texts: dict[str, str] = {}
        parts = []
        for text, template_field in value.template_fields().items():
            found = self._find_present(template_field.path, scope, role, parts)
            if found is MISSING:
                return MISSING  # the other values of the template have no role yet
            texts[text] = to_text(found, value.name_role(role))
            if template_field.width is not None:
                texts[text] = _pad_integer(found, template_field.width, value.name_role(role))
        self._use(parts, role)
        return value.fill_template(texts)

    def _find_present(self, path: FieldPath, scope: Scope, role: str, parts: list[Scope]) -> Any:
        """Return the value at a path; `MISSING` for an optional key that is missing or empty."""
        found = self._find(path, scope, parts)
        if found is not MISSING and not (path.is_optional and is_empty(found)):
            return found
        if role not in UNCOUNTED_ROLES:
            self.num_missing[path.text] += 1
        return MISSING

    def _read_first(self, choices: Sequence[Value], scope: Scope, role: str) -> Any:
        """Return the first of several values that is neither missing nor empty."""
        for one in choices:
            try:
                found = self.evaluate(one, scope, role)
            except MissingKeyError:
                continue
            if found is not MISSING and not is_empty(found):
                return found
        return MISSING

    def iter_unused(self) -> Iterator[RoleAssignment]:
        """Yield the values of the record that no path used, except empty ones."""
        yield from self._iter_unused(self.root)

    def _iter_unused(self, scope: Scope) -> Iterator[RoleAssignment]:
        for key, value in iter_children(scope.value):
            if (id(scope.value), key) in self._used:
                continue
            inner = Scope(value, "", scope, key)
            if isinstance(value, dict | list | tuple) and value:
                yield from self._iter_unused(inner)
            elif not is_empty(value):
                yield RoleAssignment(inner, "")


def _check_booleans(condition: Condition, value: Any) -> None:
    """Reject true or false in a condition on a text, which YAML reads from yes or no."""
    scalars = (*(condition.equals or ()), *(condition.differs_from or ()))
    is_text = isinstance(value, str) and value.lower() not in ("true", "false", "")
    is_named = value in scalars
    if is_text and not is_named and any(isinstance(scalar, bool) for scalar in scalars):
        raise InvalidRowError(
            f"a condition with true or false on {condition.path.text}, which is the text"
            f" {value[:40]!r}",
            "a text in the condition",
            "write it in quotes in the mapping, because YAML reads yes, no, on and off as true or"
            " false",
        )


def list_item_steps(path: FieldPath) -> list[PathStep]:
    """Return the steps of a path to the items of lists. A final `*` may be left out."""
    steps = list(path.steps)
    if not steps or not steps[-1].is_each:
        steps.append(PathStep("*", is_each=True))
    return steps


def _require_lists(columns: Mapping[str, Sequence[Scope]], role: str) -> None:
    """Reject values of objects, which have keys instead of an order, for `zip`."""
    for name, items in columns.items():
        for one in items:
            if one.holder is not None and isinstance(one.key, str):
                raise InvalidRowError(
                    f"{name} of {role} has the key {one.key!r:.40}: values of an object",
                    "lists, whose items have an order",
                    "correct the row, or write it as lists",
                )


def _is_number(key: object) -> bool:
    return str(key).isdecimal()


def find_keys(scope: Scope, step: PathStep, path: FieldPath) -> Iterator[Any]:
    """Yield the keys of a value that a step of a path names."""
    value = scope.value
    if step.is_each:
        if not isinstance(value, dict | list | tuple):
            raise build_type_error(scope, path, "a list or an object")
        for key, _ in iter_children(value):
            yield key
        return
    key = _find_key(scope, step, path)
    if key is not MISSING:
        yield key


def _find_key(scope: Scope, step: PathStep, path: FieldPath) -> Any:
    """Return the key of a value that a step other than `*` names; `MISSING` without it."""
    value = scope.value
    if isinstance(value, dict) and step.key in value:  # the usual case, without an error
        return step.key
    if not isinstance(value, dict | list | tuple):
        raise build_type_error(scope, path, "an object with keys")
    key = _to_index(value, step.key)
    if _has_key(value, key):
        return key
    if step.is_optional:
        return MISSING
    keys = [one for one, _ in iter_children(value)]
    raise build_missing_error(step.key, keys, scope.location or "the record", path)


def build_missing_error(
    key: Hashable, keys: Sequence[Hashable], location: str, path: FieldPath
) -> MissingKeyError:
    """Build the error of a missing key, which lists the other keys."""
    names = list(map(format_key, keys))
    shown = ", ".join(names[:20]) or "no keys"
    name = format_key(key)
    return MissingKeyError(
        f"no key {name} in {location} (path {path.text})",
        f"one of its keys: {shown}",
        f"{suggest_name(name, names, 'correct the path')}; or write {name}? if rows may lack it",
    )


def _has_key(container: Any, key: Any) -> bool:
    if isinstance(container, dict):
        return key in container
    return isinstance(key, int) and key < len(container)


def build_type_error(scope: Scope, path: FieldPath, expected: str) -> InvalidRowError:
    remedy = "correct the path, or the row"
    if scope.value is None:
        remedy = f"{remedy}; or write ? after {path.last_key} if rows may have no value there"
    return InvalidRowError(
        f"{scope.location or 'the record'} is {describe_value(scope.value)} (path {path.text})",
        expected,
        remedy,
    )


def iter_children(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the keys and values of an object, or the indices and items of a list."""
    if isinstance(value, dict):
        yield from value.items()
    else:
        yield from enumerate(value)


def _to_index(container: Any, key: str) -> Any:
    """Return the key of a step in a container: the index of a list, or the key of an object."""
    is_index = key.isascii() and key.isdecimal() and len(key) <= MAX_INDEX_DIGITS
    if isinstance(container, list | tuple) and is_index:
        return int(key)
    return key


def is_empty(value: object) -> bool:
    """Return whether a value has no content: None, NaN, a blank text, an empty list or object."""
    if isinstance(value, float):
        return math.isnan(value)
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, dict | list | tuple | bytes) and not value)


def to_text(value: object, role: str) -> str:
    """Return a text or a number as text.

    Raises:
        InvalidRowError: The value is empty, a list, an object, or no text.
    """
    if isinstance(value, list | tuple):
        raise InvalidRowError(
            f"the {role} is a list of {len(value)}: {describe_value(list(value))}",
            "one text or number",
            "map an item of the list, give write: json, or answers for alternatives",
        )
    if isinstance(value, dict):
        raise InvalidRowError(
            f"the {role} is an object with the keys {', '.join(map(str, value))[:80]}",
            "one text or number",
            "map a key of the object, or give write: json",
        )
    if value is MISSING or is_empty(value) or isinstance(value, bytes):
        raise InvalidRowError(
            f"the {role} is empty",
            "a text or a number",
            "add it, or remove the row",
        )
    return format_scalar(value)


def read_record(item: Scope, rows: Rows) -> Record:
    """Return a record of a document, with its key in the document under the name of `rows`.

    A list at a key is a record with this list under `rows`, such as the objects of an image.

    Raises:
        InvalidRowError: The item is no object, or has a key of this name.
    """
    record = item.value
    if isinstance(record, list) and rows.key is not None:
        record = {GROUPED_ROWS: record}
    if not isinstance(record, dict):
        raise InvalidRowError(
            f"{item.location} is {describe_value(record)}",
            "an object",
            f"correct the path {rows.path.text} in the mapping",
        )
    if rows.key is None or item.holder is None:
        return record
    if rows.key in record:
        raise InvalidRowError(
            f"the record {item.location} has a key {rows.key} of its own",
            "another name for the key of the object",
            "give rows another key in the mapping",
        )
    return {**record, rows.key: item.key}


def read_group(record: Record, path: FieldPath) -> str:
    """Return the value by which a row is grouped, as text.

    Raises:
        InvalidRowError: The row has no value at the path, or one that is no text or number.
    """
    return check_key(find_value(Scope(record, ""), path.steps, path), path, "group")


def find_value(scope: Scope, steps: Sequence[PathStep], path: FieldPath) -> Any:
    """Return the value at the steps of a path without `*`.

    Returns `MISSING` if an optional key is missing or empty.
    """
    value = scope.value
    passed: list[Hashable] = []
    for step in steps:
        key: Any = step.key
        if not isinstance(value, dict) or key not in value:  # the quick case of many rows
            location = functools.reduce(join_location, passed, scope.location)
            key = next(find_keys(Scope(value, location), step, path), MISSING)
            if key is MISSING:
                return MISSING
        value = value[key]
        passed.append(key)
        if step.is_optional and is_empty(value):
            return MISSING
    return value


def check_key(value: object, path: FieldPath, role: str) -> str:
    """Return a value by which rows are found, as text.

    Raises:
        InvalidRowError: The value is no text or number.
    """
    if is_empty(value) or isinstance(value, dict | list | tuple | bytes):
        raise InvalidRowError(
            f"the {role} ({path.text}) is {describe_value(value)}",
            "a text or a number, which other rows have in common",
            f"add it, or correct the path of {role} in the mapping",
        )
    return format_key_text(value)


def write_json(value: object, role: str) -> str:
    """Write a value as JSON. Raises InvalidRowError for bytes and for numbers without value."""
    try:
        return dump_json(value)
    except ValueError as error:
        raise InvalidRowError(
            f"the {role} cannot be written as JSON ({error})",
            "a text, a number, or a list or object of them",
            "correct the row, or remove it",
        ) from error


def _pad_integer(value: object, width: int, role: str) -> str:
    """Return an integer as text with zeros up to a width in characters."""
    text = format_key_text(value)
    if not re.fullmatch("-?[0-9]+", text):
        raise InvalidRowError(
            f"the {role} is {describe_value(value)}, which zeros cannot pad",
            "an integer",
            f"correct the row, or remove :0{width} from the template",
        )
    return text.zfill(width)


def _split_text(value: object, separator: str, role: str) -> list[str]:
    if not isinstance(value, str):
        raise InvalidRowError(
            f"the {role} is {describe_value(value)}, which cannot be split",
            f"a text with {separator!r} between its items",
            "correct the row, or remove split",
        )
    return [item.strip() for item in value.split(separator) if item.strip()]


def _translate(value: Any, values: Mapping[str, Any], role: str) -> Any:
    """Replace a value, or each item of a list, by its translation."""
    if isinstance(value, list | tuple):
        return [_translate(item, values, role) for item in value]
    text = format_key_text(value)
    if text not in values:
        raise InvalidRowError(
            f"the {role} {text[:60]!r} is not listed under values",
            f"one of {', '.join(values)}"[:200],
            "add it to values, or correct the row",
        )
    return values[text]


def parse_texts(record: Record, paths: Sequence[tuple[FieldPath, str]]) -> Record:
    """Return a record whose texts at some paths are parsed or decoded by their notation."""
    for path, notation in paths:
        parse_text = functools.partial(_parse_text, notation=notation)
        record = replace_at(record, path, path.steps, parse_text)
    return record


def replace_at(
    value: Any,
    path: FieldPath,
    steps: Sequence[PathStep],
    build_value: Callable[[Any, str], Any],
    location: str = "",
) -> Any:
    """Return a copy of a value with other values at the steps of a path.

    Args:
        build_value: Function that returns the new value for a value and its location.
    """
    if not steps:
        return build_value(value, location)
    step, *rest = steps
    copy: Any = value
    if isinstance(value, dict):
        copy = dict(value)
    elif isinstance(value, list | tuple):
        copy = list(value)
    for key in list(find_keys(Scope(value, location), step, path)):
        if not (step.is_optional and is_empty(value[key])):
            inner = join_location(location, key)
            copy[key] = replace_at(value[key], path, rest, build_value, inner)
    return copy


def _to_json_types(value: object) -> object:
    """Return a Python literal as data of the types of JSON. Raises ValueError for other types."""
    if isinstance(value, dict):
        copy: dict[str, object] = {}
        for key, item in value.items():
            name = format_scalar(key)
            if name in copy or not isinstance(key, Scalar):
                raise ValueError(f"the key {name[:40]} twice, or of another type")
            copy[name] = _to_json_types(item)
        return copy
    if isinstance(value, list | tuple):
        return [_to_json_types(item) for item in value]
    is_large = isinstance(value, int) and abs(value) > MAX_INTEGER
    if is_large or not isinstance(value, Scalar):
        raise ValueError(f"a {type(value).__name__}, which JSON does not have or is too large")
    return value


def _parse_text(value: object, location: str, notation: str) -> object:
    """Parse a text; an empty one has no content, which is None."""
    if is_empty(value):
        return None
    if not isinstance(value, str):
        raise InvalidRowError(
            f"{location} is {describe_value(value)}",
            f"{notation.capitalize()} as text",
            "remove it from parse",
        )
    decoded = decode_base64_text(value, min_chars=1)
    if notation == "base64" and decoded is not None:
        return decoded
    try:
        if notation == "base64":
            raise ValueError("no text")
        if notation == "json":
            check_json(value.encode(errors="replace"), "")
            return parse_unique_json(value)
        check_limit(len(value), MAX_LITERAL_CHARS, "characters of a Python literal")
        return _to_json_types(ast.literal_eval(value))
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
        remedy = "correct the row, or remove it"
        if decoded is not None:
            remedy = f"give [base64, {notation}] in parse: the text is base64"
        raise InvalidRowError(
            f"{location} is not valid {notation}: {describe_value(value)}",
            f"{notation} as text",
            remedy,
        ) from error
