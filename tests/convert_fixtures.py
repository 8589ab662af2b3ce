"""Configurations of other programs for tests, and the recipes that they become."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from finesight.config import Recipe
from finesight.convert.recipe_converter import ConvertedRecipe, convert_config
from finesight.recipe import load_recipe

LLAMA_FACTORY_SETTINGS: dict[str, object] = {
    "model_name_or_path": "Qwen/Qwen2.5-VL-3B-Instruct",
    "stage": "sft",
    "do_train": True,
    "dataset": "tickets",
    "template": "qwen2_vl",
}
"""As little as LLaMA-Factory needs; the rest is its defaults."""

SWIFT_SETTINGS: dict[str, object] = {
    "model": "Qwen/Qwen2.5-VL-7B-Instruct",
    "dataset": ["tickets.jsonl"],
}
"""As little as ms-swift needs."""


def convert_settings(
    folder: Path, settings: dict[str, object], name: str = "a.yaml"
) -> ConvertedRecipe:
    """What becomes of settings in a file, whose recipe is at folder/recipe.yaml."""
    source = folder / name
    as_json = source.suffix == ".json"
    source.write_text(json.dumps(settings) if as_json else yaml.safe_dump(settings))
    return _convert_again(source, folder / "recipe.yaml")


def convert_script(folder: Path, text: str) -> ConvertedRecipe:
    """What becomes of a shell script."""
    source = folder / "train.sh"
    source.write_text(text)
    return _convert_again(source, folder / "recipe.yaml")


def _convert_again(source: Path, target: Path) -> ConvertedRecipe:
    target.unlink(missing_ok=True)
    return convert_config(source, target)


def load_converted_recipe(folder: Path) -> Recipe:
    """The recipe that was written, as training loads it."""
    return load_recipe(folder / "recipe.yaml")


def convert_to_recipe(base_settings: dict[str, object], folder: Path, **settings: object) -> Recipe:
    """The recipe of the least that a program needs and these settings."""
    convert_settings(folder, base_settings | settings)
    return load_converted_recipe(folder)


def check_conversion(
    base_settings: dict[str, object],
    folder: Path,
    settings: dict[str, object],
    expected: dict[str, object],
) -> None:
    """Settings become the values expected at dotted names, and would not without being written."""
    made = convert_to_recipe(base_settings, folder, **settings).model_dump(mode="json")
    before = convert_to_recipe(base_settings, folder).model_dump(mode="json")
    for name, value in expected.items():
        assert _get_nested(made, name) == value, name
    assert made != before, "the example would pass without the setting"


def _get_nested(node: object, name: str) -> object:
    """The value at a dotted name; None where there is none."""
    for piece in name.split("."):
        if isinstance(node, list):
            node = node[int(piece)] if int(piece) < len(node) else None
        else:
            node = node.get(piece) if isinstance(node, dict) else None
    return node


def notes_by_setting(done: ConvertedRecipe, kind: str) -> dict[str, str]:
    """The remarks of a kind, by the setting that they are about."""
    return {remark.key: remark.text for remark in done.notes if remark.kind == kind}
