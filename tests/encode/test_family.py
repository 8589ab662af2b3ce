"""Families are told by their configuration alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finesight.encode.family import FAMILIES, family_of
from finesight.encode.qwen2_5_vl import Qwen25VL
from finesight.encode.qwen2_vl import Qwen2VL
from finesight.encode.qwen3_vl import Qwen3VL
from finesight.errors import UserError
from finesight.hub import ModelFolder
from finesight.model import network


def folder_of(path: Path, family: str, **config: object) -> ModelFolder:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": family, **config}))
    return ModelFolder(path)


def test_every_family_is_known_by_its_name(tmp_path: Path) -> None:
    found = {name: family_of(folder_of(tmp_path / name, name, visual={})) for name in FAMILIES}
    assert {name: family.name for name, family in found.items()} == {n: n for n in FAMILIES}
    assert found["qwen2_vl"] == Qwen2VL()
    assert found["qwen3_vl"] == Qwen3VL(thinks=False)
    vision = {"tokens_per_second": 25}
    fast = family_of(folder_of(tmp_path / "fast", "qwen2_5_vl", vision_config=vision))
    assert fast == Qwen25VL(tokens_per_second=25)


def test_families_that_are_encoded_have_a_model() -> None:
    assert list(FAMILIES) == list(network.FAMILIES)


@pytest.mark.parametrize("value", ["2", 0, True, None])
def test_a_wrong_measure_of_time_is_refused(value: object, tmp_path: Path) -> None:
    vision = {"tokens_per_second": value}
    with pytest.raises(UserError, match=f"tokens_per_second is {value!r}"):
        family_of(folder_of(tmp_path / "wrong", "qwen2_5_vl", vision_config=vision))
    # Whether there is a vision_config at all is the model's to say.
    none = folder_of(tmp_path / "none", "qwen2_5_vl", vision_config=None)
    assert family_of(none) == Qwen25VL()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("chat_template.jinja", "{{ '<think>' }}"),
        ("chat_template.json", json.dumps({"chat_template": "<think>"})),
        ("tokenizer_config.json", json.dumps({"chat_template": "<think>"})),
    ],
)
def test_the_thinking_edition_is_told_by_its_template(
    tmp_path: Path, name: str, content: str
) -> None:
    folder = folder_of(tmp_path / "model", "qwen3_vl")
    (folder.path / name).write_text(content)
    assert family_of(folder) == Qwen3VL(thinks=True)


@pytest.mark.parametrize("name", ["qwen3_next", "llama", ""])
def test_another_family_is_refused(tmp_path: Path, name: str) -> None:
    # The folder's name is no evidence.
    folder = folder_of(tmp_path / "Qwen2-VL-2B-Instruct", name)
    with pytest.raises(UserError, match=f"family {name}") as raised:
        family_of(folder)
    assert raised.value.where == str(folder.path / "config.json")
    assert raised.value.expected == f"one of {', '.join(FAMILIES)}"
