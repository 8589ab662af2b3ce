"""Addresses of models and datasets."""

from __future__ import annotations

import pytest
from each_value import each

from finesight.errors import UserError
from finesight.hub.address import (
    HubAddress,
    parse_address,
    parse_dataset_address,
    parse_model_address,
)


@each(
    ("text", "address"),
    [
        ("Qwen/Qwen2-VL-2B", HubAddress("hf", "model", "Qwen/Qwen2-VL-2B")),
        ("hf:a/b@v1.0", HubAddress("hf", "model", "a/b", "v1.0")),
        ("modelscope:a/b@refs/pr/4", HubAddress("modelscope", "model", "a/b", "refs/pr/4")),
        ("hf:models/a/b", HubAddress("hf", "model", "a/b")),
        ("hf:datasets/a/b", None),
        ("hf:a/b:train", None),
        *(
            (text, None)
            for text in (
                "a",
                "a/b/c",
                "models/a/b",
                "./a/b",
                "a b/c",
                "hf:",
                "gs:a/b",
                "a/b@..",
                "",
            )
        ),
    ],
)
def test_model_addresses(text: str, address: HubAddress | None) -> None:
    assert parse_model_address(text) == address


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("hf:a/b", HubAddress("hf", "dataset", "a/b")),
        ("hf:datasets/a/b:train", HubAddress("hf", "dataset", "a/b", None, "train")),
        (
            "modelscope:a/b@v1:default/test",
            HubAddress("modelscope", "dataset", "a/b", "v1", "default/test"),
        ),
        (
            "hf:a/b@refs/convert/parquet:data/a.jsonl",
            HubAddress("hf", "dataset", "a/b", "refs/convert/parquet", "data/a.jsonl"),
        ),
    ],
)
def test_dataset_addresses(text: str, address: HubAddress) -> None:
    assert parse_dataset_address(text) == address


@pytest.mark.parametrize("text", ["a/b", "hf:a", "hf:models/a/b", "hf:a/b:../c", "hf:/a/b"])
def test_invalid_dataset_addresses(text: str) -> None:
    with pytest.raises(UserError, match="is not the address of a dataset") as raised:
        parse_dataset_address(text)
    assert text in raised.value.what


def test_address_roundtrip() -> None:
    for text in ("hf:a/b", "modelscope:datasets/a/b@v1"):
        assert str(parse_address(text)) == text
    for text in ("hf:a/b:train", "datasets/a/b"):
        with pytest.raises(UserError, match="is not the address of a repository"):
            parse_address(text)
