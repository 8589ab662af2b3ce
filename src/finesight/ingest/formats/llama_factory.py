"""LLaMA-Factory: sharegpt (turns with a list of images) and alpaca.

Keys have the default names of the README of its `data` folder. In alpaca, the question is the
instruction followed by the input on a new line. Messages with `role` and `content` are read as
`ms-swift`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from finesight.errors import UserError
from finesight.ingest.formats.conversation_placeholders import (
    SPEAKERS,
    parse_conversation,
    render_checked,
)
from finesight.ingest.formats.conversation_rows import (
    JSONL_FILE,
    format_tools,
    list_calls,
    list_turn_texts,
    write_rows,
)
from finesight.ingest.formats.dataset_format import DatasetFormat, ExportContext, Files
from finesight.ingest.row_reader import Record
from finesight.samples.sample import LocatedSample

BOX_NOTE = (
    ". LLaMA-Factory trains on these coordinates unchanged, even if it resizes images to"
    " image_max_pixels (768 x 768 unless set): set that above your largest image"
)


def _detect_llama_factory(records: Sequence[Record]) -> str | None:
    """Detect alpaca, or sharegpt in which at least one record lists images."""
    if all({"instruction", "output"} <= record.keys() for record in records):
        return f"keys instruction and output in all of the first {len(records)} (alpaca)"
    if not all(list_turn_texts(record) for record in records):
        return None
    num_with_images = sum(
        any(isinstance(record.get(key), list) for key in ("images", "videos")) for record in records
    )
    reason = f"turns, and a list of images in {num_with_images} of the first {len(records)}"
    return f"{reason} (sharegpt)" if num_with_images else None


def _may_be_table(records: Sequence[Record]) -> bool:
    """Return whether rows of instructions have no placeholders, so that columns name images."""
    if "conversations" in records[0]:
        return False
    for record in records:
        if "<image>" in str(record.get("instruction")) + str(record.get("input")):
            return False
    return True


def _write_llama_factory(samples: Sequence[LocatedSample], context: ExportContext) -> Files:
    """Write sharegpt rows, and a dataset_info.json that registers them as `finesight`."""

    def make_fields(located_sample: LocatedSample, context: ExportContext) -> Record:
        sample = located_sample.sample
        turns, image_names = render_checked(located_sample, context, "<image>")
        rows = [{"from": SPEAKERS[role], "value": text} for role, text in turns]
        for message, row, (before, _) in zip(
            sample.messages, rows, [("", ""), *turns], strict=False
        ):
            calls = list_calls(message)
            if (calls and row["value"]) or before == message.role == "tool":
                raise UserError(
                    f"a tool call next to {row['value'][:40]!r}, or several tool results in a row",
                    expected="a turn of either text or tool calls, and one result",
                    remedy="export to openai or ms-swift, or remove the sample",
                )
            if calls:
                value = json.dumps(calls[0] if len(calls) == 1 else calls, ensure_ascii=False)
                row |= {"from": "function_call", "value": value}
        return {**format_tools(sample), "conversations": rows, "images": image_names}

    yield from write_rows(samples, context, make_fields, ("tools",), BOX_NOTE)
    info: Record = {"file_name": JSONL_FILE, "formatting": "sharegpt"}
    info["columns"] = {"messages": "conversations", "images": "images"}
    if all(located_sample.sample.rejected for located_sample in samples):
        info["ranking"] = True
        info["columns"] |= {"chosen": "chosen", "rejected": "rejected"}
    if any(located_sample.sample.label is not None for located_sample in samples):
        info["columns"]["kto_tag"] = "label"
    yield "dataset_info.json", f"{json.dumps({'finesight': info}, indent=2)}\n".encode()


COMPONENT = DatasetFormat(
    name="llama-factory",
    description='"conversations": [{"from": "human", "value": "<image>..."}], "images": ["path"]'
    '; "instruction": "...", "output": "..."',
    detect=_detect_llama_factory,
    parse_row=parse_conversation,
    write_files=_write_llama_factory,
    may_be_table=_may_be_table,
    # After `llava`: any turns with a list of images match.
    position=190,
)
