"""Tests of objectives as components: light halves, and no other module knows their names."""

import ast
import re
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

import finesight
from finesight.errors import UserError
from finesight.files.bounded_files import load_yaml
from finesight.objective_components import (
    DEFAULT_OBJECTIVE,
    OBJECTIVES,
    describe_samples,
    get_accepted_samples,
    suggest_objectives,
)
from finesight.settings.recipe import recipe_from_dict

SOURCE = Path(finesight.__file__).parent
RECIPE = {"model": "m", "data": {"train": "train.jsonl"}, "output_dir": "run"}

WITHOUT_TORCH = """
import sys
for name in ("torch", "numpy", "transformers", "PIL"):
    sys.modules[name] = None  # an import fails
from finesight.cli.app import run_command
from finesight.objective_components import OBJECTIVES
from finesight.operations import OPERATIONS
from finesight.settings.recipe import dump_recipe, recipe_from_dict

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
    train = {
        "sft": {},
        "epochs": "x",
        "simpo": {"bta": 1, "beta": -1},
        "dpo": 3,
        "objective": "ppo",
    }
    with pytest.raises(UserError) as raised:
        recipe_from_dict(RECIPE | {"train": train})
    lines = str(raised.value).splitlines()
    wrong = [line.split(": ")[1] for line in lines if line.startswith("recipe: ")]
    assert wrong[1:] == [
        *("train.objective", "train.dpo", "train.simpo.beta", "train.simpo.bta"),
        *("train.epochs", "train.sft"),
    ]


TRAINER_TABLES = {
    *("renamed", "rules", "defaults", "method_keys", "method_classes", "scripts", "losses"),
    *("unsupported", "converted"),
}
"""Tables of `trainers.yaml`."""

FOREIGN_NAMES = {
    "convert/config_loader.py": "the default method of ms-swift",
    "ingest/formats/row_keys.py": "keys of rows of other trainers",
    "train/objectives/orpo/trainers.yaml": "the method of LLaMA-Factory that has this loss",
    "train/objectives/simpo/trainers.yaml": "the method of LLaMA-Factory that has this loss",
    "settings/trainer_settings.yaml": "values of settings of other trainers",
}
"""Files in which the name of an objective has another meaning, and which."""


def list_checked_types(tree: ast.AST) -> list[str]:
    """List the classes of objectives in calls of isinstance and issubclass."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
            names = [one.id for one in ast.walk(node.args[1]) if isinstance(one, ast.Name)]
            found += [name for name in names if name.endswith("Objective")]
    return found


def test_no_other_file_names_an_objective():
    """Apart from the default, and translations, which are keyed by English texts."""
    names = [name for name in OBJECTIVES if name != DEFAULT_OBJECTIVE]
    pattern = re.compile(rf"(?i)\b({'|'.join(names)})\b")
    found = {}
    for path in sorted(SOURCE.rglob("*")):
        name = path.relative_to(SOURCE).as_posix()
        if path.suffix not in {".py", ".yaml", ".html", ".js", ".sh", ".j2"} or path.stem == "zh":
            continue
        text = path.read_text("utf-8")
        own = name.removeprefix("train/objectives/").partition("/")[0]
        others = {match.lower() for match in pattern.findall(text)} - {own}
        if others:
            found[name] = others
    assert {*found} <= {*FOREIGN_NAMES}, found


def test_no_module_checks_the_type_of_an_objective():
    for path in sorted(SOURCE.rglob("*.py")):
        assert not list_checked_types(ast.parse(path.read_text("utf-8"))), path


def test_names_of_objectives_in_other_trainers_are_theirs():
    """Each row of `trainers.yaml` belongs to its objective."""
    for component in OBJECTIVES.list_built_in():
        if not component.trainers:
            continue
        package, _, file = component.trainers.partition(":")
        content = load_yaml((files(package) / file).read_text("utf-8"))
        assert {*content} <= TRAINER_TABLES, component.name
        section = f"train.{component.name}."
        for setting in content.get("renamed", {}):
            assert setting.removeprefix(section) in component.settings.model_fields, setting
        rules = content.get("rules", {})
        for table in ("names", "values", "switches", "reset"):
            assert {*rules.get(table, {})} <= {*component.settings.model_fields}, table
        methods = {component.name, *component.methods}
        for defaults in content.get("defaults", {}).values():
            assert {*defaults} <= methods


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (None, "neither a rejected answer nor a label"),
        ("sft", "a rejected answer or no label or the label true"),
        ("kto", "a rejected answer or a label"),
    ],
)
def test_accepted_samples_are_described_by_what_they_have(name, text):
    assert describe_samples(get_accepted_samples(name)) == text


@pytest.mark.parametrize(
    ("objective", "kind", "remedy"),
    [
        (None, "pair", "set train.objective=dpo (on pairs of answers; sft: on the chosen ones)"),
        (None, "label false", "set train.objective=kto (on answers with a label)"),
        ("sft", "label false", "set train.objective=kto"),
        ("dpo", "label none", "add rejected answers, or set train.objective=sft, or remove"),
        ("dpo", "label true", "set train.objective=kto (on answers with a label), or to sft, or"),
        ("kto", "label none", "add rejected answers, or set train.objective=sft"),
    ],
)
def test_remedies_for_samples_name_objectives_that_accept_them(objective, kind, remedy):
    assert kind not in get_accepted_samples(objective)
    text = suggest_objectives(objective, kind)
    assert text.startswith(remedy)
    assert text.endswith(", or remove these samples")
    # Rewards and a teacher are no property of the samples.
    assert "grpo" not in text
    assert "distill" not in text
