"""Mapping file from the role that a person chooses for each path of a record."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from finesight.errors import UserError
from finesight.ingest.field_path import EACH, parse_path
from finesight.ingest.mapping import MAPPING_VERSION, parse_mapping
from finesight.ingest.record_values import MissingKeyError, RecordValues, Scope, is_empty
from finesight.ingest.row_reader import Record

CHOICES = (
    "images",
    "videos",
    "question",
    "choices",
    "answer",
    "fields",
    "rejected",
    "verdict",
    "system",
    "id",
    "meta",
    "ignore",
)
"""Roles that a path may have."""

REQUIRED_ROLES = ("images", "videos", "answer")
"""Roles without which a record is invalid."""

SEVERAL_PATHS = ("images", "videos", "question", "fields", "meta", "ignore")
"""Roles that may have several paths."""


def build_mapping(roles: Mapping[str, str], records: Sequence[Record]) -> dict[str, Any]:
    """Build a mapping from the role of each path.

    If question and answer are inside of the same list, each of its items becomes a sample. Keys
    that a record lacks are optional.

    Args:
        roles: Role by path, one of `CHOICES`.
        records: First records of the source.

    Raises:
        UserError: A role has several paths, or there is no answer.
    """
    paths = _group_by_role(roles)
    sample = _find_sample_list(paths)
    mapping: dict[str, Any] = {"version": MAPPING_VERSION}
    if sample is not None:
        mapping["sample"] = sample
    for role in CHOICES:
        if role not in paths:
            continue
        written: list[str] = []
        for path in paths[role]:
            if role not in REQUIRED_ROLES:
                path = mark_optional(path, records)
            # Ignored paths start at the record, also with a list of samples.
            if role != "ignore":
                path = _make_relative(path, sample)
            written.append(path)
        if role == "answer" and EACH in written[0].split("."):
            mapping["answers"] = {"path": written[0], "use": "all"}
        elif role == "question" and len(written) > 1:
            mapping["question"] = {"template": _join_paths(written)}
        elif role in ("fields", "meta", "ignore") or len(written) > 1:
            mapping[role] = written
        else:
            mapping[role] = written[0]
    parse_mapping(mapping, "roles")
    return mapping


def _group_by_role(roles: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the paths of each role. Raises UserError for several paths of a single value."""
    paths: defaultdict[str, list[str]] = defaultdict(list)
    for path, role in roles.items():
        if role not in CHOICES:
            raise UserError(
                f"{path!r:.80} has the unknown role {role!r:.80}",
                expected=f"one of {', '.join(CHOICES)}",
                remedy="choose a role of the list",
            )
        try:
            parse_path(path)
        except ValueError as error:
            raise UserError(
                str(error), expected="a path of the records", remedy="choose another key"
            ) from error
        paths[role].append(path)
    for role, found in paths.items():
        if len(found) > 1 and role not in SEVERAL_PATHS:
            raise UserError(
                f"{len(found)} keys have the same role: {', '.join(found)}",
                expected="one key with this role",
                remedy="choose “part of the answer” for several values of one answer, or leave"
                " one out",
            )
    return paths


def format_mapping(mapping: Mapping[str, Any]) -> str:
    """Return a mapping as the text of a YAML file."""
    text: str = yaml.safe_dump(dict(mapping), sort_keys=False, allow_unicode=True, width=100)
    return text


def add_folder(paths: Sequence[str], folder: str) -> list[dict[str, str]]:
    """Return templates for the files at some paths in a folder next to the records."""
    prefix = folder.replace("{", "{{").replace("}", "}}")
    templates: list[dict[str, str]] = []
    for path in paths:
        templates.append({"template": f"{prefix}/{{{path}}}"})
    return templates


def _find_sample_list(paths: Mapping[str, Sequence[str]]) -> str | None:
    """Return the list whose items have both a question and an answer."""
    lists: list[str] = []
    for role in ("question", "answer"):
        for path in paths.get(role, ()):
            outer, separator, _ = path.partition(f".{EACH}.")
            if separator:
                lists.append(outer)
    if len(lists) < 2 or len(set(lists)) > 1:
        return None
    return lists[0]


def _join_paths(paths: Sequence[str]) -> str:
    """Return a template with a line for each path. Raises UserError for keys with braces."""
    for path in paths:
        if "{" in path or "}" in path:
            raise UserError(
                f"the key {path!r} with a brace is one of several parts of the question",
                expected="keys without braces",
                remedy="rename the key, or choose one key as the question",
            )
    return "\n".join(f"{{{path}}}" for path in paths)


def _make_relative(path: str, sample: str | None) -> str:
    """Return a path as seen from an item of the list of samples."""
    if sample is None:
        return path
    prefix = f"{sample}.{EACH}."
    if path.startswith(prefix):
        return path.removeprefix(prefix)
    return f"$.{path}"


def mark_optional(path: str, records: Sequence[Record]) -> str:
    """Return a path with `?` after its last key if a record has no value there."""
    if path.endswith(EACH):
        return path
    parsed = parse_path(path)
    for record in records:
        values = RecordValues(Scope(record, ""))
        try:
            found = values.read(parsed, values.root, "meta")
        except MissingKeyError:
            return f"{path}?"
        if is_empty(found):
            return f"{path}?"
    return path
