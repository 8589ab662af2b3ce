"""Foreign formats, one file each; the first that recognises a source reads it.

To add one: a file with its `FORMAT` (how it looks, how it is detected, how a row is read and how
samples are written), a line in FORMATS below, a row written by hand from its documentation in
tests/data/formats/test_documented.py, and its name in the help of `--format` in cli/options.py.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from finesight.data.formats import (
    coco,
    conversations,
    folder,
    labelme,
    llama_factory,
    llava,
    ms_swift,
    openai,
    picture_path,
    query,
    qwen_vl,
    samples,
    table,
    voc,
    yolo,
)
from finesight.data.formats.format import PICTURE_KEYS, Format
from finesight.data.rows import Record
from finesight.errors import UserError

FORMATS = (
    coco.FORMAT,
    yolo.FORMAT,
    voc.FORMAT,
    labelme.FORMAT,
    folder.FORMAT,
    samples.FORMAT,
    openai.FORMAT,
    ms_swift.FORMAT,
    qwen_vl.FORMAT,
    picture_path.FORMAT,
    query.FORMAT,
    llava.FORMAT,
    llama_factory.FORMAT,
    conversations.FORMAT,
    table.FORMAT,
)
"""The particular before the general: any turns are `conversations`, anything is a `table`."""


def format_named(name: str, option: str = "--format") -> Format:
    """The format that the user chose. Raises UserError with the nearest name and all others."""
    for form in FORMATS:
        if form.name == name:
            return form
    names = [form.name for form in FORMATS]
    near = difflib.get_close_matches(name, names, n=1)
    raise UserError(
        f"unknown format {name!r}",
        where=option,
        expected=f"one of {', '.join(names)}",
        remedy=f"did you mean {near[0]}?" if near else f"name one of these with {option}",
    )


def recognised(records: Sequence[Record], where: str) -> tuple[Format, str]:
    """The format of the first records and what it was known by.

    Raises UserError with the nearest format when none of them is sure.
    """
    for form in FORMATS:
        reason = form.detect(records)
        if reason is not None:
            return form, reason
    seen = _keys_of(records[0])
    # Of equally near ones the most general.
    nearest = max(reversed(FORMATS), key=lambda form: len(form.keys & seen))
    advice = f"--format {nearest.name}, for rows such as {nearest.looks}"
    if nearest is table.FORMAT:
        advice = f"name its columns, perhaps with {table.suggestion(records[0])}"
    raise UserError(
        f"the format cannot be told from rows with the keys {', '.join(map(str, records[0]))}",
        where=where,
        expected=f"one of {', '.join(form.name for form in FORMATS)}",
        remedy=f"the nearest is {nearest.name}: {advice}",
    )


def _keys_of(record: Record) -> set[str]:
    """A record's keys and those of its first turn; where a picture is tells nothing."""
    turns = record.get("conversations", record.get("messages"))
    first = turns[0] if isinstance(turns, list) and turns else {}
    return {*record, *(first if isinstance(first, dict) else {})}.difference(PICTURE_KEYS)
