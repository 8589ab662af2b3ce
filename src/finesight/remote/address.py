"""What names a repository on a hub: hf:OWNER/NAME@REVISION, modelscope:OWNER/NAME@REVISION."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from finesight.errors import UserError

Hub = Literal["hf", "modelscope"]
Kind = Literal["model", "dataset"]

_NAME = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
_ADDRESS = re.compile(
    # Without a hub, models/my/tiny is a path that was mistyped, not the hub's my/tiny.
    r"(?:(?P<hub>hf|modelscope):(?P<kind>datasets/|models/)?)?"
    rf"(?P<name>{_NAME})"
    r"(?:@(?P<revision>[\w][\w./-]*))?"
    r"(?::(?P<part>[\w][\w./ -]*))?"
)


@dataclass(frozen=True, slots=True)
class Address:
    """A repository on a hub. No `revision` is the newest one; `part` is what is meant of a data
    set: a split, SUBSET/SPLIT, or the path of one of its files."""

    hub: Hub
    kind: Kind
    name: str
    revision: str | None = None
    part: str | None = None

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.hub}:{'datasets/' * (self.kind == 'dataset')}{self.name}{revision}"


def is_on_a_hub(source: str) -> bool:
    """Whether a source is said to be on a hub, rightly written or not."""
    return source.startswith(("hf:", "modelscope:"))


def model_address(text: str) -> Address | None:
    """The model that OWNER/NAME, hf:OWNER/NAME or modelscope:OWNER/NAME means, each with or without
    @REVISION; None for anything else."""
    found = _parsed(text)
    if found is None or found.kind == "dataset" or found.part is not None:
        return None
    return found


def data_address(text: str) -> Address:
    """The data set that hf:OWNER/NAME[@REVISION][:PART] or modelscope:... means.

    Raises UserError for anything else.
    """
    found = _parsed(text, "dataset")
    if found is None or found.kind == "model" or not is_on_a_hub(text):
        raise UserError(
            f"{text!r} names no data set on a hub",
            where="SOURCE",
            expected="hf:OWNER/NAME or modelscope:OWNER/NAME, then perhaps @REVISION and :SPLIT",
            remedy="for example hf:jrzhang/TextVQA_GT_bbox:train",
        )
    return found


def any_address(text: str) -> Address:
    """A model as `model_address` takes it, or a data set: datasets/ before its name.

    Raises UserError for anything else.
    """
    found = _parsed(text)
    if found is None or (found.kind == "model" and found.part is not None):
        raise UserError(
            f"{text!r} names nothing on a hub",
            where="SOURCE",
            expected="[hf:|modelscope:]OWNER/NAME for a model, hf:datasets/OWNER/NAME or"
            " modelscope:datasets/OWNER/NAME for a data set, then perhaps @REVISION",
            remedy="for example hf:Qwen/Qwen2-VL-2B-Instruct or"
            " hf:datasets/jrzhang/TextVQA_GT_bbox",
        )
    return found


def _parsed(text: str, usual: Kind = "model") -> Address | None:
    found = _ADDRESS.fullmatch(text)
    if found is None or ".." in text:
        return None
    kinds: dict[str | None, Kind] = {None: usual, "datasets/": "dataset", "models/": "model"}
    hub: Hub = "modelscope" if found["hub"] == "modelscope" else "hf"
    return Address(hub, kinds[found["kind"]], found["name"], found["revision"], found["part"])
