"""LLaMA-Factory's data sets by name, as its dataset_info.json describes them."""

from __future__ import annotations

import os
from pathlib import Path

from finesight.bounded_files import read_json_object
from finesight.convert.draft import Draft
from finesight.convert.given import Given
from finesight.convert.sources import Source
from finesight.errors import UserError

INFO = "dataset_info.json"

_USUAL = {
    "messages": ("conversations", "messages"),
    "images": ("images",),
    "prompt": ("instruction",),
    "query": ("input",),
    "response": ("output",),
    "system": ("system",),
    "history": ("history",),
}
"""What columns are called in the formats that `finesight data import` knows."""


def sources_of(given: Given, draft: Draft, key: str) -> list[Source]:
    """The data sets that `key` lists. Raises UserError for a name that the description lacks."""
    names = given.words(key)
    folder = given.text("dataset_dir") or "data"
    if not names:
        return []
    if folder == "ONLINE":
        return [_limited(given, Source(_hub(given, name))) for name in names]
    info = _info(given, folder)
    if info is None:
        text = f"{folder}/{INFO} is not here: correct the commands below, or run this where it is"
        draft.note("dataset_dir", folder, text)
        return [_limited(given, Source(f"{folder}/{name}.json")) for name in names]
    path, entries = info
    return [_limited(given, _source(given, draft, path, name, entries)) for name in names]


def _limited(given: Given, source: Source) -> Source:
    most = given.count("max_samples")
    if most is not None and most < 1:
        raise given.refused("max_samples", "a whole number above 0")
    limits = [limit for limit in (source.limit, most) if limit is not None]
    return Source(source.name, min(limits, default=None), source.title)


def _hub(given: Given, name: str) -> str:
    return f"{'modelscope' if given.switched('USE_MODELSCOPE_HUB') else 'hf'}:{name}"


def _info(given: Given, folder: str) -> tuple[Path, dict[str, object]] | None:
    """The description and its folder: as seen from here, else from the configuration's folder or
    one above it."""
    beside = Path(given.where).parent
    places = (Path(folder), *(above / folder for above in (beside, *beside.resolve().parents[:3])))
    for place in places:
        path = place / INFO
        if os.path.exists(path):
            expected = "descriptions of data sets by name"
            return place, read_json_object(path, expected=expected, remedy="correct the file")
    return None


def _wrong(where: str, what: str, expected: str) -> UserError:
    return UserError(what, where=where, expected=expected, remedy="correct the file")


def _source(
    given: Given, draft: Draft, folder: Path, name: str, entries: dict[str, object]
) -> Source:
    entry = entries.get(name)
    if not isinstance(entry, dict):
        known = ", ".join(list(entries)[:8])
        raise UserError(
            f"{name} is not in it",
            where=str(folder / INFO),
            expected=f"one of {known}",
            remedy=f"add {name}, or correct the name in {given.where}",
        )
    if entry.get("ranking"):
        raise _wrong(str(folder / INFO), f"{name} is for preference learning", "answers to learn")
    _tell_columns(draft, name, entry)
    limit = entry.get("num_samples")
    if isinstance(limit, int) and limit > 0:
        text = "the first ones are taken, there they were drawn by chance"
        draft.differs(f"{name}: num_samples", limit, text)
    else:
        limit = None
    online = _online(given, entry)
    if online is not None:
        return Source(online, limit, name)
    file = entry.get("file_name")
    if not isinstance(file, str):
        raise _wrong(str(folder / INFO), f"{name} has no file_name", "a file, or a hub's name")
    media = given.text("media_dir")
    if media is not None and Path(media) != (folder / file).parent:
        text = "import where its paths are found: they start at the file's folder, or where you are"
        draft.note("media_dir", media, text)
    return Source(str(folder / file), limit, name)


def _online(given: Given, entry: dict[str, object]) -> str | None:
    """A hub's name, as LLaMA-Factory chooses where there are two."""
    hf, modelscope = entry.get("hf_hub_url"), entry.get("ms_hub_url")
    first = given.switched("USE_MODELSCOPE_HUB")
    if isinstance(modelscope, str) and (first or not isinstance(hf, str)):
        hub = f"modelscope:{modelscope}"
    elif isinstance(hf, str):
        hub = f"hf:{hf}"
    else:
        return None
    subset, split = entry.get("subset"), entry.get("split")
    if isinstance(subset, str):
        return f"{hub}:{subset}/{split if isinstance(split, str) else 'train'}"
    return f"{hub}:{split}" if isinstance(split, str) and split != "train" else hub


def _tell_columns(draft: Draft, name: str, entry: dict[str, object]) -> None:
    columns = entry.get("columns")
    if not isinstance(columns, dict):
        return
    odd = [
        f"{role}={column}"
        for role, column in columns.items()
        if column not in _USUAL.get(str(role), ()) and column is not None
    ]
    if odd:
        text = "columns of other names: rename them, or say them by --map in the command below"
        draft.note(f"{name}: columns", ", ".join(odd), text)
