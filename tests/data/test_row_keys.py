"""Every key of a row is used, stored in `meta`, named in the summary, or refused with an error."""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fuzzed_sources import JPEG, MAPPED, PNG, ROWS

from finesight.data.formats import get_format
from finesight.data.formats.conversation_rows import REASONING_KEYS
from finesight.data.formats.dataset_format import ImportContext
from finesight.data.image_resolver import ImageResolver
from finesight.data.row_reader import SourceRow
from finesight.errors import UserError

FORMATS = {"alpaca": "llama-factory", "swift-pairs": "ms-swift"}
TRL = {
    "prompt": [{"role": "user", "content": "Where is the dog?"}],
    "completion": [{"role": "assistant", "content": "There."}],
    "images": ["a.png"],
}
KINDS = {kind: ROWS[kind] for kind in ROWS} | {"trl": TRL}
FORMATS["trl"] = "openai"
NAMES = (
    *("image2", "depth_image", "picture", "videos", "reasoning_content", "thinking", "rationale"),
    *("label", "answer", "bbox", "weight", "loss", "train", "mask", "tools", "chosen", "caption"),
    *("note", "source", "Score", "name", "图片", "text", "value", "content", "url", "index"),
)
VALUES = ("fresh zebra", "b.jpg", ["b.jpg", "a.png"], {"inner": "fresh zebra"}, 0, 1, False, None)
STRUCTURE = {"role", "from", "type", "bbox_type", "detail"}
"""Keys whose values do not occur in samples."""


def iter_objects(value: Any) -> Iterator[dict[str, Any]]:
    """Yield all objects of a JSON value."""
    if isinstance(value, dict):
        yield value
    for item in (
        value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    ):
        yield from iter_objects(item)


def mutate(record: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """Rename, add, nest, duplicate, move or clear keys of objects at any depth."""
    mutated = copy.deepcopy(record)
    for _ in range(rng.choice((1, 1, 2, 3))):
        target = rng.choice(list(iter_objects(mutated)))
        key = rng.choice(list(target) or ["note"])
        match rng.randrange(7):
            case 0:
                target[rng.choice(NAMES)] = target.pop(key, None)
            case 1:
                target[key] = None
            case 2:
                target[key] = {rng.choice(NAMES): target.get(key)}
            case 3:
                target[f"{key}_{rng.choice(NAMES)}"] = copy.deepcopy(target.get(key))
            case 4:
                source = copy.deepcopy(rng.choice(list(iter_objects(record))))
                target.update(rng.sample(list(source.items()), min(1, len(source))))
            case _:
                target[rng.choice(NAMES)] = copy.deepcopy(rng.choice(VALUES))
    return mutated


def iter_texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield each text of a JSON value with its key."""
    if isinstance(value, str):
        yield key, value
    items = value.items() if isinstance(value, dict) else ()
    for name, item in items:
        yield from iter_texts(item, name)
    for item in value if isinstance(value, list) else ():
        yield from iter_texts(item, key)


def find_dropped(record: dict[str, Any], output: str, known: set[str]) -> list[str]:
    """Return the keys and texts of a row that its samples and the summary do not contain."""
    keys = {str(key) for target in iter_objects(record) for key in target}
    dropped = [key for key in keys - known if key not in output]
    for key, text in iter_texts(record):
        words = re.findall(r"[^\W\d_]{2,}", re.sub(r"<[^>]*>|Picture|bbox_2d|label", " ", text))
        is_named = f"{key} of " in output or f'"{key}"' in output
        if key not in STRUCTURE and not is_named and any(word not in output for word in words):
            dropped.append(f"{key}: {text}")
    return dropped


def check_mutations(kind: str, count: int, folder: Path) -> None:
    """Parse mutated rows of a format, and fail if one of them loses a key or a text."""
    (folder / "a.png").write_bytes(PNG)
    (folder / "b.jpg").write_bytes(JPEG)
    data_format = get_format(FORMATS.get(kind, kind))
    columns = MAPPED if kind == "table" else {}
    context = ImportContext(ImageResolver(folder, folder / "out"), columns=columns, prompt="Go.")
    known = {*REASONING_KEYS, "videos", "index"}
    known |= {key for row in KINDS.values() for target in iter_objects(row) for key in target}
    num_parsed = 0
    for number in range(count):
        record = mutate(KINDS[kind], random.Random(f"{kind} {number}"))
        try:
            examples = data_format.parse_examples(SourceRow(1, "row 1", record, "rows"), context)
        except UserError:
            continue
        num_parsed += 1
        samples = [sample.model_dump() for one in examples for sample in one.to_train_samples()]
        output = json.dumps([samples, context.other_keys], ensure_ascii=False)
        if kind == "table":  # a column is used or named as a whole
            record = {key: value for key, value in record.items() if key in MAPPED}
        dropped = find_dropped(record, output, known)
        assert not dropped, f"{kind} {number}: {dropped} of {record} in {output}"
    assert num_parsed > count / 20


@pytest.mark.parametrize("kind", KINDS)
def test_some_mutated_rows(tmp_path: Path, kind: str) -> None:
    check_mutations(kind, 100, tmp_path)


@pytest.mark.fuzz
@pytest.mark.parametrize("kind", KINDS)
def test_many_mutated_rows(tmp_path: Path, kind: str) -> None:
    check_mutations(kind, 5000, tmp_path)
