"""Configurations of other programs for tests, and the recipes that they become."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from finesight.config import Recipe
from finesight.convert.converting import Converted, convert
from finesight.recipe import load_recipe

FACTORY: dict[str, object] = {
    "model_name_or_path": "Qwen/Qwen2.5-VL-3B-Instruct",
    "stage": "sft",
    "do_train": True,
    "dataset": "tickets",
    "template": "qwen2_vl",
}
"""As little as LLaMA-Factory needs; the rest is its defaults."""

SWIFT: dict[str, object] = {"model": "Qwen/Qwen2.5-VL-7B-Instruct", "dataset": ["tickets.jsonl"]}
"""As little as ms-swift needs."""


def from_settings(folder: Path, settings: dict[str, object], name: str = "a.yaml") -> Converted:
    """What becomes of settings in a file, whose recipe is at folder/recipe.yaml."""
    source = folder / name
    as_json = source.suffix == ".json"
    source.write_text(json.dumps(settings) if as_json else yaml.safe_dump(settings))
    return _renewed(source, folder / "recipe.yaml")


def from_script(folder: Path, text: str) -> Converted:
    """What becomes of a shell script."""
    source = folder / "train.sh"
    source.write_text(text)
    return _renewed(source, folder / "recipe.yaml")


def _renewed(source: Path, target: Path) -> Converted:
    target.unlink(missing_ok=True)
    return convert(source, target)


def recipe_of(folder: Path) -> Recipe:
    """The recipe that was written, as training loads it."""
    return load_recipe(folder / "recipe.yaml")


def made_of(least: dict[str, object], folder: Path, **settings: object) -> Recipe:
    """The recipe of the least that a program needs and these settings."""
    from_settings(folder, least | settings)
    return recipe_of(folder)


def try_example(
    least: dict[str, object],
    folder: Path,
    settings: dict[str, object],
    expected: dict[str, object],
) -> None:
    """Settings become the values expected at dotted names, and would not without being written."""
    made = made_of(least, folder, **settings).model_dump(mode="json")
    before = made_of(least, folder).model_dump(mode="json")
    for name, value in expected.items():
        assert _at(made, name) == value, name
    assert made != before, "the example would pass without the setting"


def _at(node: object, name: str) -> object:
    """The value at a dotted name; None where there is none."""
    for piece in name.split("."):
        if isinstance(node, list):
            node = node[int(piece)] if int(piece) < len(node) else None
        else:
            node = node.get(piece) if isinstance(node, dict) else None
    return node


def told(done: Converted, kind: str) -> dict[str, str]:
    """The remarks of a kind, by the setting that they are about."""
    return {remark.key: remark.text for remark in done.remarks if remark.kind == kind}
