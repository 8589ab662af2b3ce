"""Registry of dataset formats that can be imported and exported.

To add a format, write a module with a `COMPONENT` (description, detection, parser and writer), and
copy a row from its documentation to tests/ingest/formats. Other packages add formats as plug-ins.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from finesight.components import ComponentRegistry
from finesight.errors import UserError, suggest_name
from finesight.ingest.format_names import FORMAT_HELPERS, FORMAT_PACKAGE
from finesight.ingest.formats import table
from finesight.ingest.formats.conversation_rows import TURN_KEYS
from finesight.ingest.formats.dataset_format import (
    IMAGE_KEYS,
    DatasetFormat,
    decode_json_lists,
    describe_value,
    split_preference,
)
from finesight.ingest.row_reader import Record
from finesight.samples.sample import InvalidRowError

MAX_LISTED_CHARS = 100
"""Maximum length of the columns that an error lists."""

FORMATS = ComponentRegistry("formats", DatasetFormat, FORMAT_PACKAGE, FORMAT_HELPERS)
"""Dataset formats by name, in the order in which detection tries them."""


def iter_formats(with_plugins: bool = True) -> Iterator[DatasetFormat]:
    """Yield the built-in formats, then those of plug-ins, which are imported at their turn."""
    yield from FORMATS.list_built_in()
    yield from (FORMATS[name] for name in FORMATS.plugin_names if with_plugins)


def get_native_format() -> DatasetFormat:
    """Return the format of samples, as training reads them."""
    return next(one for one in FORMATS.list_built_in() if one.is_native)


def get_format(name: str, option: str = "--format") -> DatasetFormat:
    """Return the dataset format with a given name.

    Args:
        name: Name of the format, such as "coco".
    """
    if name in FORMATS:
        FORMATS.find_plugin(name)  # raises UserError if several packages define it
        return FORMATS[name]
    raise UserError(
        f"unknown format {name!r}",
        where=option,
        expected=f"one of {', '.join(FORMATS)}",
        remedy=suggest_name(name, FORMATS, f"name one of these with {option}"),
    )


def get_writable_format(name: str, option: str) -> DatasetFormat:
    """Return the dataset format with a given name, which must have an exporter."""
    problem = f"unknown format {name!r}"
    if name in FORMATS:
        data_format = get_format(name, option)
        if data_format.write_files is not None:
            return data_format
        problem = f"{name} can be imported only"
    names = []
    for data_format in FORMATS.list_available():
        if data_format.write_files is not None:
            names.append(data_format.name)
    raise UserError(
        problem,
        where=option,
        expected=f"one of {', '.join(names)}",
        remedy=suggest_name(name, names, f"name one of these with {option}"),
    )


def detect_format(records: Sequence[Record], where: str) -> tuple[DatasetFormat, str]:
    """Detect the dataset format of the first records of a source."""
    records = [split_preference(decode_json_lists(record))[0] for record in records]
    for data_format in iter_formats():
        detected_by = data_format.detect and data_format.detect(records)
        if detected_by is not None:
            return data_format, detected_by
    for number, record in enumerate(records, start=1):
        for key in ("messages", "conversations", "conversation"):
            description = describe_value(record.get(key))
            if "which is not valid JSON" in description:
                raise InvalidRowError(
                    f"the selected row {number}: {key} is {description}",
                    "a list of turns",
                    where=where,
                )
    turns = records[0].get("conversations", records[0].get("messages"))
    first_turn = turns[0] if isinstance(turns, list) and turns else None
    turn_keys = first_turn if isinstance(first_turn, dict) else {}
    record_keys = {*records[0], *turn_keys}.difference(IMAGE_KEYS)
    # `max` returns the first of equally close formats. General ones, which accept more rows, are
    # the last ones.
    num_common: dict[str, int] = {}
    for one in FORMATS.list_built_in():
        described = re.findall(r'"(\w+)":', one.description)
        num_common[one.name] = len(record_keys.intersection(described))
    closest = max(reversed(FORMATS.list_built_in()), key=lambda one: num_common[one.name])
    # One common key, such as "type", is no sign of a conversation.
    if num_common[closest.name] < 2 and TURN_KEYS.isdisjoint(record_keys):
        closest = table.COMPONENT
    suggestion = f"write the rows in its form, {closest.description}"
    names = list(map(str, records[0]))
    has_names = names != list(map(str, range(1, len(names) + 1)))
    mapping = _suggest_mapping(names if has_names else list(map(str, records[0].values())))
    if closest is table.COMPONENT:
        columns = table.suggest_mapping(records) if has_names or not mapping else mapping
        suggestion = f"name its columns, perhaps with {columns}"
        left_out = table.list_left_out(records)
        if left_out and "COLUMN" not in columns:
            suggestion += f", which leaves out {', '.join(left_out)[:MAX_LISTED_CHARS]}"
    if has_names and mapping:
        suggestion += f"; if the first line contains values, import with --no-header {mapping}"
    raise table.UnknownRolesError(
        f"the format cannot be detected from rows with the keys {', '.join(map(str, records[0]))}",
        where=where,
        expected=f"one of {', '.join(FORMATS)}",
        remedy=f"the closest is {closest.name}: {suggestion}",
    )


def _suggest_mapping(cells: Sequence[str]) -> str:
    """Return `--map` options for a first line with numbers, which are perhaps values; else ""."""
    is_number = [re.fullmatch(r"[+-]?\d+(?:\.\d+)?", cell) is not None for cell in cells]
    if not any(is_number):
        return ""
    starts = [n for n in range(1, len(cells) - 3) if all(is_number[n : n + 4])]
    texts = [n for n, is_value in enumerate(is_number, start=1) if not is_value] or [1]
    image = str(texts[0]) if starts or len(texts) > 1 else "COLUMN"
    first = starts[0] if starts else 0
    box = ",".join(str(first + n) for n in range(1, 5))
    label = f" --map label={texts[1]}" if len(texts) > 1 else ""
    answer = f"--map box={box}{label}" if starts else f"--map answer={texts[-1]}"
    return f"--map image={image} {answer}"
