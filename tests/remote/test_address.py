"""Names of repositories, as they are typed."""

from __future__ import annotations

import pytest

from finesight.errors import UserError
from finesight.remote.address import Address, any_address, data_address, model_address


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("Qwen/Qwen2-VL-2B", Address("hf", "model", "Qwen/Qwen2-VL-2B")),
        ("hf:a/b@v1.0", Address("hf", "model", "a/b", "v1.0")),
        ("modelscope:a/b@refs/pr/4", Address("modelscope", "model", "a/b", "refs/pr/4")),
        ("hf:models/a/b", Address("hf", "model", "a/b")),
        ("hf:datasets/a/b", None),
        ("hf:a/b:train", None),
        *(
            (bad, None)
            for bad in ("a", "a/b/c", "models/a/b", "./a/b", "a b/c", "hf:", "gs:a/b", "a/b@..", "")
        ),
    ],
)
def test_models(text: str, address: Address | None) -> None:
    assert model_address(text) == address


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("hf:a/b", Address("hf", "dataset", "a/b")),
        ("hf:datasets/a/b:train", Address("hf", "dataset", "a/b", None, "train")),
        (
            "modelscope:a/b@v1:default/test",
            Address("modelscope", "dataset", "a/b", "v1", "default/test"),
        ),
        (
            "hf:a/b@refs/convert/parquet:data/a.jsonl",
            Address("hf", "dataset", "a/b", "refs/convert/parquet", "data/a.jsonl"),
        ),
    ],
)
def test_data_sets(text: str, address: Address) -> None:
    assert data_address(text) == address


@pytest.mark.parametrize("text", ["a/b", "hf:a", "hf:models/a/b", "hf:a/b:../c", "hf:/a/b"])
def test_no_data_sets(text: str) -> None:
    with pytest.raises(UserError, match="names no data set on a hub") as raised:
        data_address(text)
    assert text in raised.value.what


def test_either_is_written_as_it_is_read() -> None:
    for text in ("hf:a/b", "modelscope:datasets/a/b@v1"):
        assert str(any_address(text)) == text
    for text in ("hf:a/b:train", "datasets/a/b"):
        with pytest.raises(UserError, match="names nothing on a hub"):
            any_address(text)
