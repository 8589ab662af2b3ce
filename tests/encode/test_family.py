"""Families are told by their configuration alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finesight.encode.box_migration import convert_boxes
from finesight.encode.family import (
    FRAME_1000,
    ImageBox,
    ModelFamily,
    SpecialToken,
    ThinkingOptions,
)
from finesight.encode.qwen2_5_vl import Qwen25VL
from finesight.encode.qwen2_vl import Qwen2VL
from finesight.encode.qwen3_vl import Qwen3VL
from finesight.encode.qwen_vl import QwenVL
from finesight.encode.renderer import FAMILIES, load_family
from finesight.errors import UserError
from finesight.model import vlm
from finesight.model_folder import ModelFolder


def write_config(path: Path, family: str, **config: object) -> ModelFolder:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": family, **config}))
    return ModelFolder(path)


def test_family_is_detected_from_config(tmp_path: Path) -> None:
    found = {name: load_family(write_config(tmp_path / name, name, visual={})) for name in FAMILIES}
    assert {name: family.name for name, family in found.items()} == {n: n for n in FAMILIES}
    assert found["qwen2_vl"] == Qwen2VL()
    assert found["qwen3_vl"] == Qwen3VL(has_reasoning=False)
    vision = {"tokens_per_second": 25}
    fast = load_family(write_config(tmp_path / "fast", "qwen2_5_vl", vision_config=vision))
    assert fast == Qwen25VL(tokens_per_second=25)


def test_every_encoded_family_has_a_model() -> None:
    assert list(FAMILIES) == list(vlm.ARCHITECTURES)


@pytest.mark.parametrize("value", ["2", 0, True, None])
def test_invalid_tokens_per_second_is_rejected(value: object, tmp_path: Path) -> None:
    vision = {"tokens_per_second": value}
    with pytest.raises(UserError, match=f"tokens_per_second is {value!r}"):
        load_family(write_config(tmp_path / "wrong", "qwen2_5_vl", vision_config=vision))
    # Whether there is a vision_config at all is the model's to say.
    none = write_config(tmp_path / "none", "qwen2_5_vl", vision_config=None)
    assert load_family(none) == Qwen25VL()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("chat_template.jinja", "{{ '<think>' }}"),
        ("chat_template.json", json.dumps({"chat_template": "<think>"})),
        ("tokenizer_config.json", json.dumps({"chat_template": "<think>"})),
    ],
)
def test_thinking_edition_is_detected_from_template(
    tmp_path: Path, name: str, content: str
) -> None:
    folder = write_config(tmp_path / "model", "qwen3_vl")
    (folder.path / name).write_text(content)
    assert load_family(folder) == Qwen3VL(has_reasoning=True)


@pytest.mark.parametrize("has_reasoning", [False, True])
def test_single_mode_cannot_be_changed(has_reasoning: bool) -> None:
    family = Qwen3VL(has_reasoning=has_reasoning)
    assert family.with_thinking(ThinkingOptions(enable_thinking=has_reasoning)) == family
    with pytest.raises(UserError, match="the only mode of this model"):
        family.with_thinking(ThinkingOptions(enable_thinking=not has_reasoning))
    with pytest.raises(UserError, match="no reasoning effort"):
        family.with_thinking(ThinkingOptions(reasoning_effort="low"))


@pytest.mark.parametrize("name", ["qwen3_next", "llama", ""])
def test_unknown_family_is_rejected(tmp_path: Path, name: str) -> None:
    # The folder's name is no evidence.
    folder = write_config(tmp_path / "Qwen2-VL-2B-Instruct", name)
    with pytest.raises(UserError, match=f"family {name}") as raised:
        load_family(folder)
    assert raised.value.where == str(folder.path / "config.json")
    assert raised.value.expected == f"one of {', '.join(FAMILIES)}"


@pytest.mark.parametrize("family", [QwenVL(), Qwen2VL(), Qwen25VL(), Qwen3VL()])
@pytest.mark.parametrize(
    "texts",
    [
        ('{"place": "', '", "colour": "grey"}'),
        ('Report: [{"a": ["', '", "', '"]}]'),
        ('{"note": "the car at ', ' in front of \\"', '\\""}'),
        ('{"', '": 1}'),
    ],
)
def test_boxes_in_json_strings_leave_valid_json(
    family: ModelFamily, texts: tuple[str, ...]
) -> None:
    boxes = [
        [ImageBox('a "b"', (20.0, 30.0, 40.0, 50.0), (200, 300), (196, 308))] * n
        for n in range(1, len(texts))
    ]
    segments = [piece for pair in zip(texts, [*boxes, []], strict=True) for piece in pair if piece]
    pieces = family.write_segments(segments)
    text = "".join(one.token if isinstance(one, SpecialToken) else one for one in pieces)
    value = json.loads(text.removeprefix("Report: "))
    assert ("bbox_2d" in str(value)) == (not family.box_tokens)
    if texts[0] == '{"place": "' and not family.box_tokens:
        assert value["place"].keys() == {"bbox_2d", "label"}


def test_migration_keeps_json_around_boxes_valid() -> None:
    text = '{"cars": [{"place": "<box>(200,250),(600,700)</box>"}]}'
    converted, count = convert_boxes(text, "qwen_vl", "qwen3_vl", lambda: (FRAME_1000, FRAME_1000))
    assert count == 1
    assert json.loads(converted) == {"cars": [{"place": {"bbox_2d": [200, 250, 600, 700]}}]}
