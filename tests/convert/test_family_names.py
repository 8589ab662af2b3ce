"""Families of models by the names that other trainers use."""

import pytest

from finesight.convert.external_config import detect_family
from finesight.family_components import FAMILIES, FamilyComponent, FamilyRegistry, TrainerModels


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("Qwen-VL-Chat-distilled-from-Qwen2.5-VL", "qwen"),
        ("Qwen2.5-VL-7B-teacher-Qwen3-VL", "qwen2_5_vl"),
        ("Qwen3-VL-from-qwen-vl", "qwen3_vl"),
        # Words of other models do not count.
        ("my-vlm-qwen2.5-vl-7b", "qwen2_5_vl"),
        ("paddleocr-vl-qwen2.5-vl", "qwen2_5_vl"),
    ],
)
def test_first_name_in_a_model_name_counts(name, family):
    assert detect_family(f"me/{name}", (), "a.yaml").name == family


def test_plugin_does_not_take_the_names_of_built_in_families(monkeypatch):
    trainer_models = TrainerModels(
        names=("qwen2_vl", "kimi_vl", "acme"),
        pattern="my|kimi",
        token_size=28,
        min_pixels=0,
        max_length=1024,
        vision=("qkv",),
        merger=("fc1",),
        language=("q_proj",),
    )
    acme = FamilyComponent(kind="families", name="acme", title="", trainer_models=trainer_models)
    components = (*FAMILIES.list_built_in(), acme)
    monkeypatch.setattr(FamilyRegistry, "list_available", lambda self: components)
    found = [detect_family("me/model", (hint,), "a.yaml").name for hint in trainer_models.names]
    assert found == ["qwen2_vl", "acme", "acme"]
    models = ("my-qwen2.5-vl-7b", "my-model", "kimi-vlm")
    found = [detect_family(model, (), "a.yaml").name for model in models]
    assert found == ["qwen2_5_vl", "acme", "acme"]
