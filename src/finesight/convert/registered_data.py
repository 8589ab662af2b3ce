"""Data sets that dataset_info.json of LLaMA-Factory describes: how an import reads their keys."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finesight.errors import UserError
from finesight.ingest.field_path import format_key
from finesight.ingest.formats.conversation_rows import ROLES
from finesight.ingest.formats.row_keys import has_value
from finesight.ingest.import_source import NUM_PREVIEW_ROWS
from finesight.ingest.mapping import MAPPING_VERSION
from finesight.ingest.row_reader import Record, read_first_records

_COLUMNS = {
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    "messages": "conversations",
}
"""Names of keys if an entry has no `columns`; those of other roles are not used then."""

_REQUIRED_COLUMNS = ("prompt", "response", "messages")

_TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "system_tag": "system",
    "observation_tag": "observation",
    "function_tag": "function_call",
}
_ROLES = {"user_tag": "user", "assistant_tag": "assistant", "system_tag": "system"}

_DETECTED_COLUMNS: Mapping[str, tuple[str, ...]] = {
    "prompt": ("instruction",),
    "query": ("input",),
    "response": ("output",),
    "history": ("history",),
    "system": ("system",),
    "tools": ("tools", "functions"),
    "images": ("images", "image"),
    "videos": ("videos", "video"),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
    "kto_tag": ("kto_tag", "label"),
}
"""Names of keys that an import detects."""

_TURN_KEYS = {("conversations", "value"), ("messages", "content")}
"""Keys of turns and of their texts that an import detects."""


@dataclass(frozen=True)
class Reading:
    """How an import reads a data set.

    Attributes:
        columns: Roles of columns, for --map.
        mapping: Content of a mapping file; None without one.
        problem: What neither can state; empty for none.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    mapping: Mapping[str, Any] | None = None
    problem: str = ""


def describe_reading(entry: Mapping[str, Any], file: Path | None) -> Reading:
    """Return how an import reads the data set of an entry.

    Args:
        file: File of the data set; None for one on a hub. Its first records show which of the keys
            they have, and which keys LLaMA-Factory does not read.
    """
    tags = _read_names(entry.get("tags"), _TAGS, tuple(_TAGS)[:4])
    has_turns = entry.get("formatting", "alpaca") != "alpaca"
    used = _read_names(entry.get("columns"), _COLUMNS, _REQUIRED_COLUMNS)
    for role in ("prompt", "query", "response", "history") if has_turns else ("messages",):
        used.pop(role, None)
    if "chosen" in used:
        used.pop("response", None)  # the pair replaces it
    if _is_detected(used, tags):
        return Reading()
    if {*used} <= {"prompt", "query", "response", "images"}:
        return _map_columns(used)
    for role in ("tools", "history", "audios"):
        if role in used:
            name = f"{role} ({used[role]})"
            return Reading(problem=f"rename its keys to the defaults of LLaMA-Factory: {name}")
    return _build_mapping(used, tags, _read_preview(file))


def _build_mapping(
    used: Mapping[str, str], tags: Mapping[str, str], records: Sequence[Record]
) -> Reading:
    """Return a mapping of the names of roles, which ignores the other keys of the records."""
    mapping: dict[str, Any] = {"version": MAPPING_VERSION}
    for role in ("images", "videos"):
        if role in used:
            mapping[role] = _format_media(used[role], records)
    if used.get("system"):
        mapping["system"] = f"{format_key(used['system'])}?"
    if "messages" in used:
        _add_turns(mapping, used, tags, records)
    else:
        problem = _add_question(mapping, used, records)
        if problem:
            return Reading(problem=problem)
    if used.get("kto_tag"):
        mapping["verdict"] = format_key(used["kto_tag"])
    ignored: list[str] = mapping.pop("ignore", [])
    for key in _list_keys(records):
        if key != "id" and key not in used.values():
            ignored.append(format_key(key))
    if ignored:
        mapping["ignore"] = ignored
    return Reading(mapping=mapping)


def _read_names(
    given: object, defaults: Mapping[str, str], required: Sequence[str]
) -> dict[str, str]:
    """Return the names that an entry gives; the defaults without any, and of required ones."""
    if not isinstance(given, Mapping):
        return dict(defaults)
    names: dict[str, str] = {}
    for role in required:
        names[role] = defaults[role]
    for role, name in given.items():
        if name:
            names[str(role)] = str(name)
    return names


def _is_detected(used: Mapping[str, str], tags: Mapping[str, str]) -> bool:
    """Return whether an import detects all names."""
    for role, name in used.items():
        if role != "messages" and name not in _DETECTED_COLUMNS.get(role, ()):
            return False
    if "messages" not in used:
        return True
    if (used["messages"], tags["content_tag"]) not in _TURN_KEYS:
        return False
    if tags["role_tag"] not in ("from", "role"):
        return False
    roles = {tag: ROLES.get(name) for tag, name in tags.items() if tag in _ROLES}
    return roles.items() <= _ROLES.items()


def _map_columns(used: Mapping[str, str]) -> Reading:
    """Return the roles of the columns of a question and its answer."""
    question = used["prompt"]
    if "query" in used:
        question += f",{used['query']}"
    columns = {"question": question, "answer": used["response"]}
    if used.get("images"):
        columns = {"image": used["images"], **columns}
    if any(map(re.compile("[,=]").search, used.values())):
        return Reading(problem="rename its keys with a comma or an equals sign")
    return Reading(columns=columns)


def _format_media(name: str, records: Sequence[Record]) -> str:
    """Return the path of files: those of a list, or a single one."""
    given = [record[name] for record in records if has_value(record.get(name))]
    path = format_key(name)
    if len(given) < len(records):
        path += "?"
    kinds = {type(value) for value in given}
    if kinds and kinds.isdisjoint((list, tuple)):
        return path
    return f"{path}.*"


def _add_turns(
    mapping: dict[str, Any],
    used: Mapping[str, str],
    tags: Mapping[str, str],
    records: Sequence[Record],
) -> None:
    """Add the roles of turns, and of the answers of a pair after them."""
    role_key = format_key(tags["role_tag"])
    content_key = format_key(tags["content_tag"])
    values: dict[str, str] = {}
    for tag, role in _ROLES.items():
        if tag in tags:
            values[tags[tag]] = role
    messages = format_key(used["messages"])
    mapping["messages"] = {
        "each": messages,
        "role": {"path": role_key, "values": values},
        "content": content_key,
    }
    known = (tags["role_tag"], tags["content_tag"])
    ignored: list[str] = []
    turns: list[object] = []
    for record in records:
        found = record.get(used["messages"])
        turns += found if isinstance(found, list) else []
    for key in _list_keys(turns):
        if key not in known:
            ignored.append(f"{messages}.*.{format_key(key)}")
    for role, target in (("chosen", "answer"), ("rejected", "rejected")):
        if not used.get(role):
            continue
        name = format_key(used[role])
        mapping[target] = f"{name}.{content_key}"
        answers = [record.get(used[role]) for record in records]
        for key in _list_keys(answers) or [tags["role_tag"]]:
            if key != tags["content_tag"]:
                ignored.append(f"{name}.{format_key(key)}")
    mapping["ignore"] = ignored


def _add_question(
    mapping: dict[str, Any], used: Mapping[str, str], records: Sequence[Record]
) -> str:
    """Add the roles of a question and its answers; return what a mapping cannot state."""
    prompt = format_key(used["prompt"])
    mapping["question"] = prompt
    if used.get("query"):
        has_query = [has_value(record.get(used["query"])) for record in records]
        if all(has_query):
            query = format_key(used["query"])
            mapping["question"] = {"template": f"{{{prompt}}}\n{{{query}}}"}
        elif any(has_query):
            return f"append {used['query']} to {used['prompt']} in the rows that have it"
    answer = used.get("chosen") or used["response"]
    mapping["answer"] = format_key(answer)
    if used.get("rejected"):
        mapping["rejected"] = format_key(used["rejected"])
    return ""


def _list_keys(values: Iterable[object]) -> list[str]:
    """Return the keys of objects, in order."""
    keys: dict[str, None] = {}
    for value in values:
        if isinstance(value, dict):
            keys |= dict.fromkeys(map(str, value))
    return list(keys)


def _read_preview(file: Path | None) -> list[Record]:
    """Return the first records of a file; none if it cannot be read here."""
    if file is None:
        return []
    try:
        return list(read_first_records(file, NUM_PREVIEW_ROWS))
    except UserError:
        return []
