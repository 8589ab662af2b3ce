"""Every setting of a recipe, by name: a new one is a decision, not an accident."""

from __future__ import annotations

import re
from pathlib import Path

import yaml
from case_files import load_cases
from each_value import each

from finesight.recipe import list_setting_names, load_recipe

SETTINGS = load_cases("settings")


PAGE = (Path(__file__).parents[1] / "docs" / "en" / "recipe.md").read_text(encoding="utf-8")
ROWS = {
    name: (default, meaning)
    for table in re.findall(r"^\| setting \|.*\n(?:\|.*\n)+", PAGE, re.MULTILINE)
    for name, default, meaning in re.findall(
        r"^\| `([a-z0-9_.]+)` \| (.*?) ?\| (.*?) ?\|$", table, re.MULTILINE
    )
}
"""Default and meaning of each setting on the page."""

LEAST = "model: m\noutput_dir: runs/one\neval: {metric: ocr}\n"
RECIPES = {
    "short": "data: {train: a.jsonl, eval: b.jsonl}\ntrack: wandb\ntrain: {learning_rate: 1e-5}\n",
    "long": "data: {train: [{path: a.jsonl}], eval: {path: b.jsonl}}\ntrack: [{kind: wandb}]\n"
    "train: {learning_rate: {default: 1e-5}, epochs: 2}\nimage: {longest_side: 512}\n",
}
REQUIRED_SETTINGS = {
    "image.height": ["image.width=280"],
    "image.width": ["image.height=280"],
    "eval.patience": ["eval.every=0.5"],
    "track.uri": ["track.kind=swanlab"],
}
"""Settings that require another one."""


def test_settings_are_listed_and_documented():
    assert sorted(list_setting_names()) == sorted(SETTINGS) == sorted(ROWS)
    assert len(SETTINGS) <= 60


def _list_documented_values(name: str) -> list[str]:
    """Return the default of a setting on the page if it is a value, and the examples."""
    default, meaning = ROWS[name]
    values = r"((?:`[^`]+`(?:, or | or |, )?)+)"
    texts = re.findall(rf"(?:for example|such as) {values}", meaning)
    if default in ("", "all", "none", "default", "planned", "the family's", "the model's"):
        texts = texts or re.findall(rf"^{values}", meaning)
    else:
        texts.append(f"`{default}`")
    return re.findall("`([^`]+)`", " ".join(texts))


@each("text", RECIPES.values())
@each("name", SETTINGS)
def test_documented_values_can_be_overridden(tmp_path, text, name):
    values = _list_documented_values(name)
    assert values, "the page has neither a default nor an example"
    path = tmp_path / "recipe.yaml"
    path.write_text(LEAST + text)
    for value in values:
        overrides = [f"{name}={value}", *REQUIRED_SETTINGS.get(name, ())]
        node = load_recipe(path, overrides).model_dump(mode="json")
        for part in name.split("."):
            (node,) = node if isinstance(node, list) else (node,)
            node = node[part]
        expected = yaml.safe_load(value)
        if isinstance(node, list):
            assert sorted(node) == sorted(expected if isinstance(expected, list) else [expected])
        else:
            assert node == expected or float(node) == float(expected)
