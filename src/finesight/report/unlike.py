"""What differs between runs: settings, data, machine; and what each cost."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from finesight.report import facts
from finesight.report.entries import Entry
from finesight.report.language import say
from finesight.report.record import Record

Row = tuple[str, list[str]]
"""A name, and what each run has there."""

NONE = "–"

NOT_A_SETTING = {"output"}
"""Where a run lies says nothing of it."""

DIGITS = 12
"""Of a digest that are shown."""

DATA = {
    "train": {
        "samples": "training samples",
        "tokens": "training tokens",
        "fingerprint": "training data, SHA-256",
    },
    "eval": {
        "samples": "held-out samples",
        "tokens": "held-out tokens",
        "fingerprint": "held-out data, SHA-256",
    },
}
"""What a run notes of its data, and what that is called."""


def unlike(entries: Sequence[Entry]) -> list[Row]:
    """What is not the same in all runs: settings by their names in a recipe, then facts."""
    recipes = [_flat(entry.record.recipe) if entry.record else {} for entry in entries]
    names = dict.fromkeys(name for recipe in recipes for name in recipe)
    rows = [
        (name, [recipe.get(name, NONE) for recipe in recipes])
        for name in names
        if name not in NOT_A_SETTING
    ]
    told = [_facts(entry.record) if entry.record else {} for entry in entries]
    for name in dict.fromkeys(name for one in told for name in one):
        rows.append((name, [one.get(name, NONE) for one in told]))
    return [(name, values) for name, values in rows if _differ(values, entries)]


def _differ(values: Sequence[str], entries: Sequence[Entry]) -> bool:
    """Whether runs differ; a file of answers knows of none of it."""
    known = [
        value for value, entry in zip(values, entries, strict=True) if entry.record is not None
    ]
    return len(set(known)) > 1


def _flat(content: object, above: str = "") -> dict[str, str]:
    """Settings by their whole names; lists and what holds no more are values."""
    if isinstance(content, dict) and content:
        found: dict[str, str] = {}
        for name, value in content.items():
            found |= _flat(value, f"{above}.{name}" if above else str(name))
        return found
    if isinstance(content, str):
        return {above: content}
    return {above: json.dumps(content, ensure_ascii=False, default=str)} if above else {}


def _facts(record: Record) -> dict[str, str]:
    start = facts.last_start(record)
    found: dict[str, str] = {}
    for name, titles in DATA.items():
        data = facts.data_of(record, name)
        for key, title in titles.items():
            if isinstance(data.get(key), int):
                found[say(title)] = f"{data[key]:,}"
            elif data.get(key):
                found[say(title)] = str(data[key])[:DIGITS]
    found[say("base model, SHA-256")] = str(record.manifest.get("base_fingerprint"))[:DIGITS]
    for key, title in (
        ("device", "device"),
        ("precision", "number format"),
        ("processes", "processes"),
    ):
        if start.get(key) is not None:
            found[say(title)] = str(start[key])
    versions: Any = start.get("versions")
    for name, value in (versions or {}).items():
        found[say("version of {}", name)] = str(value)
    return found


def counts_of(record: Record, name: str) -> object:
    """How the training samples are spread, as a run has noted it under this name."""
    spread: Any = facts.last_start(record).get("spread")
    return spread.get(name) if isinstance(spread, dict) else None


def costs(entries: Sequence[Entry]) -> list[Row]:
    """Speed, memory and time of each run."""
    told = [_cost(entry.record) if entry.record else {} for entry in entries]
    names = dict.fromkeys(name for one in told for name in one)
    return [(name, [one.get(name, NONE) for one in told]) for name in names]


def _cost(record: Record) -> dict[str, str]:
    whole = sum(phase.seconds for phase in facts.phases(record))
    devices = facts.last_start(record).get("processes")
    devices = devices if isinstance(devices, int) else 1
    return {
        say("time in all"): facts.duration(whole),
        say("hours of one device"): f"{whole * devices / 3600:,.3g}",
        **{phase.name: phase.text for phase in facts.phases(record)},
        **dict(facts.cost(record)),
    }
