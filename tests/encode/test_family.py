"""Families are told by their configuration alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finesight.encode.family import FAMILIES, family_of, family_of_folder
from finesight.encode.qwen2_5_vl import Qwen25VL
from finesight.encode.qwen2_vl import Qwen2VL
from finesight.errors import UserError
from finesight.hub import ModelFolder


def test_every_family_is_known_by_its_name() -> None:
    assert [family_of(name).name for name in FAMILIES] == list(FAMILIES)
    assert family_of("qwen2_vl") == Qwen2VL()
    config = {"vision_config": {"tokens_per_second": 25}}
    assert family_of("qwen2_5_vl", config) == Qwen25VL(tokens_per_second=25)


@pytest.mark.parametrize("value", ["2", 0, True, None])
def test_a_wrong_measure_of_time_is_refused(value: object) -> None:
    with pytest.raises(UserError, match=f"tokens_per_second is {value!r}"):
        family_of("qwen2_5_vl", {"vision_config": {"tokens_per_second": value}})
    # Whether there is a vision_config at all is the model's to say.
    assert family_of("qwen2_5_vl", {"vision_config": None}) == Qwen25VL()


@pytest.mark.parametrize("name", ["qwen3_vl", "llama", ""])
def test_another_family_is_refused(tmp_path: Path, name: str) -> None:
    # The folder's name is no evidence.
    folder = tmp_path / "Qwen2-VL-2B-Instruct"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": name}))
    with pytest.raises(UserError, match=f"family {name}") as raised:
        family_of_folder(ModelFolder(folder))
    assert raised.value.where == str(folder / "config.json")
    assert raised.value.expected == "one of qwen2_vl, qwen2_5_vl"
