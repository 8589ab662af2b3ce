"""Configurations of other programs for tests, and the recipes that they become."""

import json
from pathlib import Path
from typing import Any

import yaml

from finesight.convert.recipe_converter import ConvertedRecipe, convert_config
from finesight.settings.config import Recipe
from finesight.settings.recipe import load_recipe

LLAMA_FACTORY_SETTINGS: dict[str, object] = yaml.safe_load(
    "{model_name_or_path: Qwen/Qwen2.5-VL-3B-Instruct, stage: sft, do_train: true,"
    " dataset: tickets, template: qwen2_vl}"
)
SWIFT_SETTINGS: dict[str, object] = yaml.safe_load(
    "{model: Qwen/Qwen2.5-VL-7B-Instruct, dataset: [tickets.jsonl]}"
)
"""As little as the program needs; the rest is its defaults."""


def convert_settings(
    folder: Path, settings: dict[str, object], name: str = "a.yaml"
) -> ConvertedRecipe:
    dump = json.dumps if name.endswith(".json") else yaml.safe_dump
    return convert_script(folder, dump(settings), name)


def convert_script(folder: Path, text: str, name: str = "train.sh") -> ConvertedRecipe:
    (folder / name).write_text(text)
    (folder / "recipe.yaml").unlink(missing_ok=True)
    return convert_config(folder / name, folder / "recipe.yaml")


def load_converted_recipe(folder: Path) -> Recipe:
    return load_recipe(folder / "recipe.yaml")


def convert_to_recipe(base_settings: dict[str, object], folder: Path, **settings: object) -> Recipe:
    """Convert the least that a program needs and these settings."""
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
        found: Any = made
        for key in name.split("."):
            found = (
                dict(enumerate(found)).get(int(key)) if key.isdigit() else (found or {}).get(key)
            )
        assert found == value, name
    assert made != before or not settings, "the example would pass without the setting"


def notes_by_setting(done: ConvertedRecipe, kind: str) -> dict[str, str]:
    return {note.key: note.text for note in done.notes if note.kind == kind}
