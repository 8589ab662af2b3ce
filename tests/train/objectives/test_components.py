"""Tests of objectives as components: light halves, and no other module knows their names."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import finesight
from finesight.errors import UserError
from finesight.objective_components import OBJECTIVES
from finesight.recipe import recipe_from_dict

SOURCE = Path(finesight.__file__).parent
RECIPE = {"model": "m", "data": {"train": "train.jsonl"}, "output_dir": "run"}

WITHOUT_TORCH = """
import sys
for name in ("torch", "numpy", "transformers", "PIL"):
    sys.modules[name] = None  # an import fails
from finesight.cli.app import run_command
from finesight.objective_components import OBJECTIVES
from finesight.operations import OPERATIONS
from finesight.recipe import dump_recipe, recipe_from_dict

for component in OBJECTIVES.list_built_in():
    recipe = RECIPE | {"train": {"objective": component.name}}
    if component.first_recipe.has_rewards:
        recipe["rewards"] = ["exact"]
    for setting in component.model_settings:
        recipe["train"][component.name] = {setting: "m"}
    recipe = recipe_from_dict(recipe)
    assert recipe_from_dict(recipe.model_dump(mode="json")) == recipe
    assert recipe.needs and dump_recipe(recipe)
for group in OPERATIONS.values():
    for name in group:
        assert run_command([*name.split(), "--help"]) == 0, name
"""


def test_light_halves_recipes_and_help_need_no_torch():
    code = WITHOUT_TORCH.replace("RECIPE", repr(RECIPE))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_errors_of_both_stages_have_the_order_of_the_settings():
    train = {"sft": {}, "epochs": "x", "kto": {"bta": 1, "beta": -1}, "dpo": 3, "objective": "ppo"}
    with pytest.raises(UserError) as raised:
        recipe_from_dict(RECIPE | {"train": train})
    lines = str(raised.value).splitlines()
    wrong = [line.split(": ")[1] for line in lines if line.startswith("recipe: ")]
    assert wrong[1:] == [
        *("train.objective", "train.dpo", "train.kto.beta", "train.kto.bta"),
        *("train.epochs", "train.sft"),
    ]


COMPARED_NAMES = {
    "convert/config_loader.py": "names of subcommands of other trainers",
    "convert/ms_swift.py": "methods of ms-swift",
    "convert/trainer_converter.py": "methods and losses of other trainers",
    "convert/trl.py": "methods of TRL",
}
"""Files that compare texts equal to the name of an objective, and what these are."""


def list_compared_names(tree: ast.AST) -> list[str]:
    """List the names of objectives that code compares with a value, also in a container."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            sides = [node.value]
        else:
            continue
        texts = [one for side in sides for one in ast.walk(side) if isinstance(one, ast.Constant)]
        found += [one.value for one in texts if one.value in {*OBJECTIVES}]
    return found


def list_checked_types(tree: ast.AST) -> list[str]:
    """List the classes of objectives in calls of isinstance and issubclass."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
            names = [one.id for one in ast.walk(node.args[1]) if isinstance(one, ast.Name)]
            found += [name for name in names if name.endswith("Objective")]
    return found


def test_no_other_module_compares_the_name_or_type_of_an_objective():
    compared = {}
    for path in sorted(SOURCE.rglob("*.py")):
        name = path.relative_to(SOURCE).as_posix()
        tree = ast.parse(path.read_text("utf-8"))
        assert not list_checked_types(tree), name
        if not name.startswith("train/objectives/"):
            compared[name] = list_compared_names(tree)
    assert {name for name, found in compared.items() if found} == {*COMPARED_NAMES}
