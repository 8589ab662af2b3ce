"""Tests of objectives of other packages: names, mistakes, needs, and run folders without them."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import yaml
from plugin_fixtures import install, write_package

from finesight.components import Component, ComponentRegistry, SettingProblem, join_problems
from finesight.errors import UserError
from finesight.objective_components import (
    OBJECTIVES,
    Needs,
    Sampling,
    get_needs,
    list_reward_objectives,
)
from finesight.operations.first_guesses import suggest_command
from finesight.plugins import PluginRecord, require_plugins
from finesight.report.run_reader import RunRecord
from finesight.report.summary import load_run_recipe
from finesight.settings.config import PixelRange, TuneSettings
from finesight.settings.manifest import Manifest
from finesight.settings.recipe import dump_recipe, load_recipe, recipe_from_dict
from finesight.train.recipe_check import build_objective

RECIPE: dict[str, Any] = {"model": "m", "data": {"train": "train.jsonl"}, "output_dir": "run"}

CODE = """
from typing import Annotated
from pydantic import BaseModel, BeforeValidator
from finesight.components import SettingProblem
from finesight.objective_components import FirstRecipe, Needs, ObjectiveComponent, Sampling, Teacher
from pathlib import Path
from finesight.settings.setting_types import ExpandedPath, SettingsSection
from finesight.train.objectives.objective import Objective

class Settings(SettingsSection):
    gamma: float = 2.0

def needs(settings, recipe):
    return Needs()

def fail(*arguments):
    raise KeyError("absent")

class Inner(SettingsSection):
    files: Annotated[tuple[ExpandedPath, ...], BeforeValidator(tuple)] = ()

class Loss(Objective):
    pass

class WrongLoss(Objective):
    def __init__(self):
        pass

class Broken(SettingsSection):
    gamma: Annotated[float, BeforeValidator(lambda value: fail())] = 2.0

class Required(SettingsSection):
    gamma: float

values = dict(kind="objectives", name="NAME", title="A", implementation="strange:Loss")
values |= dict(settings=Settings, needs=needs) | dict(CHANGE)
COMPONENT = ObjectiveComponent(**values)
"""


@pytest.fixture
def add(tmp_path, monkeypatch):
    """Return a function that installs an objective with changed arguments of its component."""

    def add_objective(name: str, change: str = "") -> None:
        code = CODE.replace("NAME", name).replace("CHANGE", change)
        write_package(
            tmp_path / "site", "strange", {f"objectives {name}": "strange:COMPONENT"}, code
        )
        monkeypatch.delitem(sys.modules, "strange", raising=False)
        install(tmp_path / "site", monkeypatch)

    yield add_objective
    sys.modules.pop("strange", None)


def load(**train: object) -> Any:
    return recipe_from_dict(RECIPE | {"train": train})


def test_plugin_cannot_take_over_a_setting(add):
    """It is not imported, and the setting keeps its value in the saved recipe."""
    add("steps")
    recipe = load(steps=4)
    assert "strange" not in sys.modules
    assert yaml.safe_load(dump_recipe(recipe))["train"]["steps"] == 4
    with pytest.raises(UserError, match="the name steps is a setting of train") as raised:
        load(objective="steps", steps=4)
    assert "strange 1.0" in str(raised.value)


@pytest.mark.parametrize("name", ["a.b", "5", "Focal", "_x"])
def test_names_of_plugins_are_keys_of_overrides(add, name):
    add(name)
    with pytest.raises(UserError, match=r"the name .* is invalid"):
        load(objective=name)
    with pytest.raises(UserError, match="unknown setting"):
        load(**{name: {"gamma": 1.0}})


MISTAKES = {
    "needs=fail": "KeyError: 'absent'",
    "needs=lambda settings, recipe: None": "returns None instead of Needs",
    "needs=None": "needs is None, no function",
    "accepted_samples={'labels'}": "unknown kind of samples 'labels'",
    "needs=lambda *_: Needs(rewards=True)": "set sampling, too",
    "check=lambda settings, recipe: None": "TypeError: 'NoneType' object is not iterable",
    "check=lambda settings, recipe: ['a']": "yields 'a' instead of SettingProblem",
    "check_settings=fail": "KeyError: 'absent'",
    "settings=Required": "its settings need defaults: 1 validation error for Required gamma",
    "settings=BaseModel": "no subclass of SettingsSection",
    "settings=Broken": "KeyError: 'absent'",
    "model_settings=('teacher',)": "model_settings has 'teacher', which is no setting",
    "first_recipe=None": "first_recipe is None, which has another type than its default",
    "methods=None": "methods is None",
    "methods=(1,)": "methods is (1,)",
    "guesses=None": "guesses is None",
    "check=None": "check is None",
    "title=3": "title is 3",
    "trainers='strange:none.yaml'": "trainers 'strange:none.yaml' cannot be read",
    "trainers='absent:none.yaml'": "cannot be read: No module named 'absent'",
    "first_recipe=FirstRecipe(has_rewards=True)": "needs the setting max_completion_length",
    "kind='metrics'": "its kind is 'metrics' instead of 'objectives'",
    "implementation=''": "it has no implementation",
}


@pytest.mark.parametrize("change", MISTAKES)
def test_mistake_of_a_plugin_names_it(add, change):
    """The other invalid settings are reported, too."""
    add("focal", change)
    with pytest.raises(UserError) as raised:
        load(objective="focal", focal={"gamma": 1.0})
    text = str(raised.value)
    assert MISTAKES[change] in text
    assert "plug-in focal of strange 1.0" in text
    assert "remedy: update the package, or remove it: pip uninstall strange" in text


def test_mistake_of_a_plugin_hides_no_other_setting(add):
    add("focal", "kind='metrics'")
    with pytest.raises(UserError) as raised:
        load(focal={}, batch_size=0)
    assert "2 settings are wrong" in str(raised.value)
    assert "train.batch_size" in str(raised.value)


INCOMPLETE = {
    "needs=lambda *_: Needs(reference=True)": "Loss has reference, but no method prepare",
    "needs=lambda *_: Needs(teacher=Teacher('m', 'auto', 'train.focal'))": "no method load_models",
    "needs=lambda *_: Needs(sampling=Sampling(section='a', num_generations=1,"
    " max_completion_length=1, temperature=1.0, batch_size=1))": "no method sample_steps",
    "implementation='strange:WrongLoss'": "TypeError",
    "implementation='strange:fail'": "is no subclass of Objective",
}


@pytest.mark.parametrize("change", INCOMPLETE)
def test_objective_implements_its_needs(add, change):
    add("focal", change)
    recipe = load(objective="focal")
    with pytest.raises(UserError, match=INCOMPLETE[change]) as raised:
        build_objective(recipe, "qwen2_vl")
    assert "strange 1.0" in raised.value.where


def test_recipe_without_its_package_is_a_user_error(add, monkeypatch):
    add("focal")
    recipe = load(objective="focal")
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"the plug-in focal .* is not installed"):
        get_needs(recipe)


def test_needs_are_strict_by_default():
    needs = Needs()
    assert not needs.steps_contain_images
    sampling = Sampling(
        section="train.a",
        num_generations=1,
        max_completion_length=1,
        temperature=1.0,
        batch_size=1,
    )
    assert Needs(sampling=sampling).steps_contain_images


MODELS = """model_settings=('teacher',),
    settings=type("S", (Settings,), {
        "__annotations__": {"teacher": str, "file": ExpandedPath, "inner": Inner},
        "inner": Inner(),
        "teacher": "a",
        "file": Path("b"),
    }),
"""


def test_app_knows_all_models_and_paths_of_sections(add):
    """Otherwise, a recipe of the studio could read outside of its workspace."""
    add("focal", MODELS)
    recipe = load(focal={"teacher": "/x", "file": "/y", "inner": {"files": ["/z"]}})
    assert {"/x", "/y", "/z"} <= {*recipe.train.list_models()}


def write_run(folder: Path, **train: object) -> Path:
    folder.mkdir()
    manifest = Manifest(
        family="qwen2_vl",
        base_model="m",
        base_fingerprint="0",
        image_rule=PixelRange(min_pixels=3136, max_pixels=12544),
        system_prompt=None,
        eos_token="</s>",
        tune=TuneSettings(),
        versions={},
        sections=("dpo", "gone"),
    )
    (folder / "manifest.json").write_text(manifest.model_dump_json())
    path = folder / "recipe.yaml"
    content = yaml.safe_load(dump_recipe(load(objective="dpo", batch_size=3)))
    content["train"] |= train
    path.write_text(json.dumps(content))
    return path


def test_all_problems_come_before_the_remedies():
    problems = [SettingProblem("a is odd", "set it even"), SettingProblem("b is 0", "raise it")]
    assert join_problems(problems) == "a is odd; b is 0: set it even; raise it"


@pytest.mark.parametrize(("name", "fits"), [("跟踪", True), ("a+b", True), ("../a", False)])
def test_names_of_components_are_parts_of_file_names(add, name, fits):
    add(name)
    problem = OBJECTIVES.find_problem(name, replace(OBJECTIVES["dpo"], name=name))
    assert (problem is None) == fits


def test_run_loads_without_an_objective_that_it_did_not_use(tmp_path):
    path = write_run(tmp_path / "run", gone={"gamma": 1.0}, seed=1, data_seed=1)
    assert load_recipe(path).train.batch_size == 3
    record = RunRecord.__new__(RunRecord)
    object.__setattr__(record, "recipe", yaml.safe_load(path.read_text()))
    object.__setattr__(record, "folder", path.parent)
    assert load_run_recipe(record).train.batch_size == 3
    other = tmp_path / "recipe.yaml"
    other.write_text(path.read_text())  # without a manifest
    with pytest.raises(UserError, match=r"train\.gone: unknown setting"):
        load_recipe(other)


@pytest.mark.parametrize("name", ["dpoo", "learning_rates", "absent"])
def test_run_with_a_misspelled_section_does_not_load(tmp_path, name):
    path = write_run(tmp_path / "run")
    path.write_text(path.read_text().replace('"dpo": {', f'"{name}": {{'))
    with pytest.raises(UserError, match=rf"train\.{name}: unknown setting"):
        load_recipe(path)


def test_broken_plugin_changes_no_command_without_it(add, tmp_path, monkeypatch):
    """Lists and errors leave it out."""
    add("focal", "first_recipe=None, guesses=None, methods=None, trainers='absent:a.yaml'")
    names = [one.name for one in OBJECTIVES.list_available()]
    assert "focal" in OBJECTIVES
    assert "focal" not in names
    assert list_reward_objectives() == ["grpo"]
    assert suggest_command("ppo", []).startswith("use finesight init")
    with pytest.raises(UserError, match="unknown setting"):
        load(learning_rats=1)


@pytest.mark.parametrize(
    ("package", "version"), [("-rhttps://x/y#", "1"), ("a b", "1"), ("a", "1 -r b"), ("", "1")]
)
def test_foreign_manifest_adds_no_words_to_commands(package, version):
    plugin = PluginRecord("metrics", "absent", package, version)
    with pytest.raises(UserError) as raised:
        require_plugins([plugin], "run")
    assert "pip install" not in str(raised.value.remedy)


def test_sections_of_a_recipe_are_immutable():
    assert isinstance(load().train.sections, MappingProxyType)


def test_registry_finds_modules_and_packages(tmp_path, monkeypatch):
    """Settings and implementation are optional; helpers are not imported."""
    folder = tmp_path / "shelf"
    (folder / "large").mkdir(parents=True)
    code = "from finesight.components import Component\nCOMPONENT = Component({})"
    for file, name in (("small.py", "small"), ("large/__init__.py", "large")):
        text = code.format(f"kind='rewards', name='{name}', title='A'")
        (folder / file).write_text(text)
    (folder / "__init__.py").write_text("")
    (folder / "helper.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    registry = ComponentRegistry[Component[Any]]("rewards", Component, "shelf", ["helper"])
    assert [*registry] == ["large", "small"]
    assert not registry["small"].has_section
    assert registry["small"].find_problem() is None
