"""Tests of rewards as components: light halves, and no other module knows their names."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import finesight
from finesight.errors import UserError
from finesight.reward_components import REWARDS
from finesight.settings.recipe import dump_recipe, list_setting_names, recipe_from_dict

SOURCE = Path(finesight.__file__).parent
RECIPE = {
    "model": "m",
    "data": {"train": "train.jsonl"},
    "train": {"objective": "grpo", "grpo": {"environment": "image_zoom_in_tool"}},
    "output_dir": "run",
}
OPTIONS = {"format": {"json_schema": {}}, "length": {"max_length": 3}}
REWARD_ITEMS = [{"name": name} | OPTIONS.get(name, {}) for name in REWARDS]

WITHOUT_TORCH = """
import sys
for name in ("torch", "numpy", "transformers", "PIL"):
    sys.modules[name] = None  # an import fails
import finesight.settings.config
assert not [name for name in sys.modules if name.startswith("finesight.evaluate")]
from finesight.settings.recipe import dump_recipe, recipe_from_dict
from finesight.reward_components import REWARDS

recipe = recipe_from_dict(RECIPE)
assert dump_recipe(recipe)
for one in recipe.rewards:
    assert type(one) is REWARDS[one.name].settings
    assert [*REWARDS[one.name].packages(one)] == [] or one.name in ("math", "format")
"""


def test_light_halves_and_recipes_need_no_torch():
    code = WITHOUT_TORCH.replace("RECIPE", repr(RECIPE | {"rewards": REWARD_ITEMS}))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_settings_are_those_of_the_reward():
    """A dump has the options of all rewards, so that recipes of runs do not change."""
    recipe = recipe_from_dict(RECIPE | {"rewards": REWARD_ITEMS})
    for reward in recipe.rewards:
        options = OPTIONS.get(reward.name, {})
        assert {*dict(reward)} == {"name", "weight", *REWARDS[reward.name].options}
        dumped = {"name", "weight", "pattern", "json_schema", "max_length"}
        assert reward.model_dump().keys() == dumped
        assert reward.model_dump(exclude_none=True).items() >= options.items()
    assert recipe_from_dict(recipe.model_dump(mode="json")) == recipe
    assert "max_length: 3" in dump_recipe(recipe)
    names = [name for name in list_setting_names() if name.startswith("rewards.")]
    settings = ("name", "weight", "pattern", "json_schema", "max_length")
    assert names == [f"rewards.{name}" for name in settings]


def test_options_of_other_rewards_may_be_null():
    """As in the recipe of a run."""
    for component in REWARDS.list_built_in():
        for option in component.options:
            assert component.settings.model_fields[option].default is None


WRONG = {
    "{name: length}": "the reward length requires max_length",
    "{name: format}": "the reward format requires pattern or json_schema",
    "{name: format, pattern: a, json_schema: {}}": "format requires pattern or json_schema",
    "{name: format, max_length: 3}": "the reward format requires pattern or json_schema",
    "{name: length, pattern: a}": "the reward length does not use pattern",
    "{name: json, pattern: a, json_schema: {}}": "json does not use pattern or json_schema",
    "{name: exact, max_length: x}": "rewards.0.max_length: has the invalid value 'x'",
    "{name: length, max_length: 0, wieght: 1}": "2 settings are wrong",
    "{max_length: 3}": "for example length",
    "{weight: 3}": "for example exact",
    "lenght": "did you mean rewards.0: length?",
    "{name: exact, max_lenght: 3}": "did you mean rewards.0.max_length?",
    "length": "the reward length requires max_length",
    "3": "expected: a section with name, weight, pattern, json_schema, max_length",
}


@pytest.mark.parametrize("reward", WRONG)
def test_wrong_items_are_explained(reward):
    with pytest.raises(UserError) as caught:
        recipe_from_dict(RECIPE, [f"rewards=[{reward}]"])
    assert WRONG[reward] in str(caught.value)


OTHER_MEANINGS = {
    "report/summary.py": {"boxes"},
    "settings/recipe.py": {"environment"},
}
"""Files about rewards with equal texts of another meaning: boxes of an answer, and the setting
`environment`."""


def test_no_other_module_names_a_reward():
    """Of those that use rewards: the names are common words."""
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        name = path.relative_to(SOURCE).as_posix()
        code = path.read_text("utf-8")
        uses_rewards = "reward_components" in code or "reward_scorer" in code
        if name.startswith("evaluate/rewards/") or not uses_rewards:
            continue
        constants = [one for one in ast.walk(ast.parse(code)) if isinstance(one, ast.Constant)]
        texts = {one.value for one in constants if isinstance(one.value, str)}
        found[name] = texts & {*REWARDS}
    assert {"settings/config.py", "settings/recipe.py", "evaluate/reward_scorer.py"} <= found.keys()
    assert {name: texts for name, texts in found.items() if texts} == OTHER_MEANINGS
