"""Tests of optimizers as components: light halves, and no other module knows their names."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import finesight
from finesight.optimizer_components import (
    DEFAULT_OPTIMIZER,
    OPTIMIZERS,
    find_smaller_optimizer,
)
from finesight.train.master_weight_optimizer import load_optimizer_class

SOURCE = Path(finesight.__file__).parent
NAMES = [one.name for one in OPTIMIZERS.list_built_in()]

WITHOUT_TORCH = """
import sys
for name in ("torch", "numpy", "transformers", "PIL"):
    sys.modules[name] = None  # an import fails
from finesight.optimizer_components import OPTIMIZERS
from finesight.settings.recipe import dump_recipe, recipe_from_dict

recipe = {"model": "m", "data": {"train": "train.jsonl"}, "output_dir": "run"}
for name in OPTIMIZERS:
    dump_recipe(recipe_from_dict(recipe, [f"train.optimizer={name}"]))
"""


def test_light_halves_and_recipes_need_no_torch():
    command = [sys.executable, "-c", WITHOUT_TORCH]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_heavy_half_is_in_the_folder_of_its_optimizer(name):
    assert load_optimizer_class(name).__module__ == f"finesight.train.optim.{name}.update"


def test_smaller_optimizer_is_another_one():
    smaller = find_smaller_optimizer(DEFAULT_OPTIMIZER)
    assert smaller in {*NAMES} - {DEFAULT_OPTIMIZER}
    assert find_smaller_optimizer(smaller) is None


NAMING_FILES = {
    "optimizer_components.py": "the default",
    "settings/trainer_settings.yaml": "names of optimizers in other trainers",
    "convert/trainer_converter.py": "class of torch in a configuration of DeepSpeed",
}
"""Files apart from the folders of optimizers that have their names, and for what."""


def test_no_other_module_names_an_optimizer():
    word = re.compile(rf"\b({'|'.join(NAMES)})\b", re.IGNORECASE)
    naming = set()
    for path in SOURCE.rglob("*"):
        name = path.relative_to(SOURCE).as_posix()
        is_own = name.startswith("train/optim/")
        if is_own or path.suffix not in (".py", ".yaml", ".html", ".js", ".j2"):
            continue
        if word.search(path.read_text("utf-8")):
            naming.add(name)
    assert naming == {*NAMING_FILES}
