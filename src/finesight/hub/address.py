"""Addresses of repositories on the Hugging Face Hub and ModelScope.

The syntax is `hf:OWNER/NAME@REVISION` or `modelscope:OWNER/NAME@REVISION`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from finesight.errors import UserError

HubName = Literal["hf", "modelscope"]
RepoType = Literal["model", "dataset"]

_REPO_ID_PATTERN = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
_ADDRESS_PATTERN = re.compile(
    # Without a hub prefix, models/my/tiny is a mistyped path, not a repository.
    r"(?:(?P<hub>hf|modelscope):(?P<kind>datasets/|models/)?)?"
    rf"(?P<name>{_REPO_ID_PATTERN})"
    r"(?:@(?P<revision>[\w][\w./-]*))?"
    r"(?::(?P<part>[\w][\w./ -]*))?"
)


@dataclass(frozen=True, slots=True)
class HubAddress:
    """Address of a model or dataset repository on a hub.

    Attributes:
        revision: Branch, tag or commit; None for the default branch.
        data_part: Split, `SUBSET/SPLIT` or file of a data set; None for the complete data set.
    """

    hub: HubName
    repo_type: RepoType
    repo_id: str
    revision: str | None = None
    data_part: str | None = None

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.hub}:{'datasets/' * (self.repo_type == 'dataset')}{self.repo_id}{revision}"


def is_hub_address(source: str) -> bool:
    """Return whether a string starts with `hf:` or `modelscope:`.

    The rest of the string is not validated.
    """
    return source.startswith(("hf:", "modelscope:"))


def parse_model_address(text: str) -> HubAddress | None:
    """Parse the hub address of a model.

    Accepted forms are `OWNER/NAME`, `hf:OWNER/NAME` and `modelscope:OWNER/NAME`, each optionally
    with `@REVISION`.

    Returns:
        The address, or None if the text is not the address of a model, such as a local path.
    """
    address = _parse(text)
    if address is None or address.repo_type == "dataset" or address.data_part is not None:
        return None
    return address


def parse_dataset_address(text: str) -> HubAddress:
    """Parse the hub address of a data set.

    Accepted forms are `hf:OWNER/NAME` and `modelscope:OWNER/NAME`, optionally followed by
    `@REVISION` and `:PART`.
    """
    address = _parse(text, "dataset")
    if address is None or address.repo_type == "model" or not is_hub_address(text):
        raise UserError(
            f"{text!r} is not the address of a dataset",
            where="SOURCE",
            expected="hf:OWNER/NAME or modelscope:OWNER/NAME, optionally with @REVISION and :SPLIT",
            remedy="for example hf:jrzhang/TextVQA_GT_bbox:train",
        )
    return address


def parse_address(text: str) -> HubAddress:
    """Parse the hub address of a model or data set.

    The address of a data set has the prefix `datasets/`, as in `hf:datasets/OWNER/NAME`.
    """
    address = _parse(text)
    if address is None or (address.repo_type == "model" and address.data_part is not None):
        raise UserError(
            f"{text!r} is not the address of a repository",
            where="SOURCE",
            expected="[hf:|modelscope:]OWNER/NAME for a model, hf:datasets/OWNER/NAME or"
            " modelscope:datasets/OWNER/NAME for a dataset, optionally with @REVISION",
            remedy="for example hf:Qwen/Qwen2-VL-2B-Instruct or"
            " hf:datasets/jrzhang/TextVQA_GT_bbox",
        )
    return address


def _parse(text: str, default_type: RepoType = "model") -> HubAddress | None:
    match = _ADDRESS_PATTERN.fullmatch(text)
    if match is None or ".." in text:
        return None
    repo_types: dict[str | None, RepoType] = {
        None: default_type,
        "datasets/": "dataset",
        "models/": "model",
    }
    hub: HubName = "modelscope" if match["hub"] == "modelscope" else "hf"
    return HubAddress(
        hub, repo_types[match["kind"]], match["name"], match["revision"], match["part"]
    )
