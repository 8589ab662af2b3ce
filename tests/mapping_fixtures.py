"""Golden records of presets, and mutations of records of which no key may be lost."""

import json
import random
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

from box_fixtures import summarize_content

from finesight.errors import UserError
from finesight.ingest.formats.dataset_format import ImportContext, ImportExample
from finesight.ingest.image_resolver import ImageResolver
from finesight.ingest.mapped_rows import MappedRow, read_mapped_row
from finesight.ingest.mapping import RecordMapping
from finesight.ingest.row_reader import SourceRow
from finesight.samples.sample import ToolCallPart


class Mutation(NamedTuple):
    """A changed record, the name of the changed key, and the kind of change."""

    record: dict[str, Any]
    key: str
    kind: str


def read_record(
    record: dict[str, Any], mapping: RecordMapping, folder: Path, prompt: str | None = None
) -> MappedRow:
    """Read a record by a mapping; images are in `folder`."""
    row = SourceRow(number=3, location="line 3", record=record, stem="rows")
    return read_mapped_row(row, build_context(folder, prompt), mapping)


def build_context(folder: Path, prompt: str | None = None) -> ImportContext:
    """Build the context of an import; an empty prompt is for data without questions."""
    return ImportContext(ImageResolver(folder, folder / "out"), prompt=prompt)


def summarize_example(example: ImportExample) -> dict[str, Any]:
    """Return the roles of an example as simple data: images by name, boxes as label and corners."""
    found: dict[str, Any] = {}
    turns: list[Any] = []
    for message in example.prompt_messages:
        content = _summarize(message.content)
        if message.role == "system":
            found["system"] = content[0]
        else:
            turns.append(content)
    found["user"] = turns[0] if len(turns) == 1 else turns
    found["answers"] = [_summarize(answer) for answer in example.answers]
    if example.rejected:
        found["rejected"] = _summarize(example.rejected)
    if example.references:
        found["references"] = list(example.references)
    if example.label is not None:
        found["label"] = example.label
    if example.tools:
        found["tools"] = [tool["function"]["name"] for tool in example.tools]
    if example.is_eval:
        found["is_eval"] = True
    if example.meta:
        found["meta"] = json.loads(json.dumps(example.meta))
    return found


def _summarize(content: Any) -> list[Any]:
    summary: list[Any] = []
    for part in summarize_content(content):
        if isinstance(part, Path):
            summary.append(part.name)
        elif isinstance(part, tuple):
            summary.append([part[1], *map(float, part[2])])
        elif isinstance(part, ToolCallPart):
            summary.append({"call": part.name, "arguments": part.arguments})
        else:
            summary.append(part)
    return summary


def mutate_record(record: dict[str, Any], rng: random.Random) -> Mutation:
    """Rename, nest, repeat, empty or list the value of one key of a record or of an inner one."""
    changed = deepcopy(record)
    objects = list(_iter_objects(changed))
    holder = rng.choice(objects)
    key = rng.choice(list(holder))
    kind = rng.choice(("rename", "nest", "repeat", "null", "list"))
    if kind == "rename":
        renamed = {f"{key}_x" if name == key else name: value for name, value in holder.items()}
        holder.clear()
        holder.update(renamed)
    elif kind == "nest":
        holder[key] = {"value": holder[key]}
    elif kind == "repeat":
        holder[f"{key}_x"] = deepcopy(holder[key])
    elif kind == "null":
        holder[key] = None
    else:
        holder[key] = [holder[key], holder[key]]
    return Mutation(changed, str(key), kind)


def _iter_objects(value: Any) -> Any:
    if isinstance(value, dict):
        is_list = all(str(key).isdecimal() for key in value)  # items by number: one more is valid
        if not is_list:
            yield value
        for item in value.values():
            yield from _iter_objects(item)
    elif isinstance(value, list):
        for item in value:
            yield from _iter_objects(item)


def find_silent_change(
    mutation: Mutation, original: MappedRow, mapping: RecordMapping, folder: Path
) -> str:
    """Return how a changed record was read wrongly without naming its key; "" if it was not.

    The samples are those of the original record, or an error, the list of keys without a role or
    the counts of the import name the key, or the samples contain the changed value as it is.
    """
    context = build_context(folder, "")
    row = SourceRow(number=3, location="line 3", record=mutation.record, stem="rows")
    try:
        found = read_mapped_row(row, context, mapping)
    except UserError as error:
        named = (
            f"{error} {mutation.key}" if mutation.kind == "nest" and "value" in str(error) else ""
        )
        return "" if mutation.key in f"{error}{named}" else f"an error without the key: {error}"
    if any(mutation.key in reading.location for reading in found.unused):
        return ""
    account = [*context.other_keys, *context.row_notes, *context.skipped_rows]
    if any(mutation.key in text for text in account):
        return ""
    before = [_without_meta(example) for example in original.examples]
    after = [_without_meta(example) for example in found.examples]
    if before == after:
        return ""
    written = json.dumps(mutation.record)
    return f"{before} became {after} of {written}"


def _without_meta(example: ImportExample) -> dict[str, Any]:
    found = summarize_example(example)
    found.pop("meta", None)
    return found
