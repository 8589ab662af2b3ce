"""Data sets of another program: the samples in the recipe, and the commands that make them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from finesight.convert.draft import Draft

FOLDER = "samples"
"""Where the commands write, a folder for each data set."""


@dataclass(frozen=True)
class Source:
    """A data set as `finesight data import` takes it; `limit` is how many of its rows are taken,
    none for all, and `title` what it is called, if it has a name of its own."""

    name: str
    limit: int | None = None
    title: str | None = None

    def folder(self) -> str:
        """What its samples are called."""
        name = self.name
        if name.startswith(("hf:", "modelscope:")):
            name = name.split(":")[1]
        path = Path(name)
        telling = path.stem if path.stem not in _USUAL else path.parent.name or path.stem
        return re.sub(r"[^\w.-]+", "-", self.title or telling).strip("-.") or "data"


_USUAL = ("data", "train", "dataset")
"""Names of files that say nothing: their folders' do."""


@dataclass(frozen=True)
class HeldOut:
    """What is measured on: data sets of their own, or a part of each data set by the options of
    `finesight data import` that set it aside."""

    sources: tuple[Source, ...] = ()
    options: tuple[str, ...] = ()


@dataclass
class _Folders:
    taken: set[str] = field(default_factory=set)

    def free(self, stem: str) -> str:
        name, number = stem, 2
        while name in self.taken:
            name, number = f"{stem}-{number}", number + 1
        self.taken.add(name)
        return f"{FOLDER}/{name}"


def set_data(draft: Draft, sources: list[Source], held_out: HeldOut) -> None:
    """Name the samples in the recipe, and note the commands that make them."""
    folders = _Folders()
    out = [_imported(draft, folders, source, held_out.options) for source in sources]
    kind = "train" if held_out.options else "data"
    train = [f"{folder}/{kind}.jsonl" for folder in out]
    draft.set("data.train", _one_or_all(train), "by the commands that `finesight convert` printed")
    if held_out.options:
        draft.set("data.eval", _one_or_all([f"{folder}/eval.jsonl" for folder in out]))
    elif held_out.sources:
        own = [_imported(draft, folders, source, ()) for source in held_out.sources]
        draft.set("data.eval", _one_or_all([f"{folder}/data.jsonl" for folder in own]))


def _imported(draft: Draft, folders: _Folders, source: Source, apart: tuple[str, ...]) -> str:
    out = folders.free(source.folder())
    limit = () if source.limit is None else ("--limit", str(source.limit))
    draft.imports.append(
        shlex.join(["finesight", "data", "import", source.name, out, *limit, *apart])
    )
    return out


def _one_or_all(items: list[str]) -> str | list[object]:
    return items[0] if len(items) == 1 else list[object](items)


def set_apart(share: float) -> tuple[str, ...]:
    """The options that hold out a share of the pictures."""
    return ("--split", f"{round(1 - share, 6):g}")
