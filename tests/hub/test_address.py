"""Addresses of models and datasets."""

import pytest

from finesight.errors import UserError
from finesight.files.hub_address import (
    HubAddress,
    parse_address,
    parse_dataset_address,
    parse_model_address,
)

MODELS = {
    "Qwen/Qwen2-VL-2B": HubAddress("hf", "model", "Qwen/Qwen2-VL-2B"),
    "hf:a/b@v1.0": HubAddress("hf", "model", "a/b", "v1.0"),
    "modelscope:a/b@refs/pr/4": HubAddress("modelscope", "model", "a/b", "refs/pr/4"),
    "hf:models/a/b": HubAddress("hf", "model", "a/b"),
}
NO_MODELS = ("hf:datasets/a/b", "hf:a/b:train", "a", "a/b/c", "models/a/b", "./a/b", "a b/c")
DATASETS = {
    "hf:a/b": ("hf", None, None),
    "hf:datasets/a/b:train": ("hf", None, "train"),
    "modelscope:a/b@v1:default/test": ("modelscope", "v1", "default/test"),
    "hf:a/b@refs/convert/parquet:data/a.jsonl": ("hf", "refs/convert/parquet", "data/a.jsonl"),
}


def test_model_addresses() -> None:
    for text, address in MODELS.items():
        assert parse_model_address(text) == address
    for text in (*NO_MODELS, "hf:", "gs:a/b", "a/b@..", ""):
        assert parse_model_address(text) is None, text


def test_dataset_addresses() -> None:
    for text, (hub, revision, part) in DATASETS.items():
        assert parse_dataset_address(text) == HubAddress(hub, "dataset", "a/b", revision, part)
    for text in ("a/b", "hf:a", "hf:models/a/b", "hf:a/b:../c", "hf:/a/b"):
        with pytest.raises(UserError, match="is not the address of a dataset") as raised:
            parse_dataset_address(text)
        assert text in raised.value.what


def test_address_roundtrip() -> None:
    for text in ("hf:a/b", "modelscope:datasets/a/b@v1"):
        assert str(parse_address(text)) == text
    for text in ("hf:a/b:train", "datasets/a/b"):
        with pytest.raises(UserError, match="is not the address of a repository"):
            parse_address(text)
