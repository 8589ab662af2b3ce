"""Tests of optimizers of other packages: names, mistakes, limits, and groups of parameters."""

import sys
from typing import Any

import pytest
import torch
from plugin_fixtures import install, write_package
from torch import nn

from finesight.errors import UserError
from finesight.settings.recipe import recipe_from_dict
from finesight.train.master_weight_optimizer import MasterWeightOptimizer, load_optimizer_class
from finesight.train.optim.adamw.update import AdamW
from finesight.train.setup import check_sharding, list_train_plugins

RECIPE: dict[str, Any] = {"model": "m", "data": {"train": "train.jsonl"}, "output_dir": "run"}
MATRIX, VECTOR = "model.layers.0.mlp.down_proj.weight", "visual.blocks.0.norm1.weight"

CODE = """
from pathlib import Path
from finesight.components import SettingProblem
from finesight.optimizer_components import OptimizerComponent
from finesight.settings.setting_types import ExpandedPath, SettingsSection
from finesight.train.master_weight_optimizer import Optimizer

class Settings(SettingsSection):
    momentum: float = 0.9
    file: ExpandedPath = Path("state")

def check(settings, recipe):
    if settings.momentum == 0:
        yield SettingProblem("train.sgd.momentum=0", "set it")

def fail(*arguments):
    raise KeyError("absent")

class Sgd(Optimizer):
    def step(self, grad_factor, lr, weight_decay):
        everything = slice(0, len(self.master_weights))
        master_E = self.master_weights.read(everything)
        master_E -= lr * self.settings.momentum * self.gradients.read_slice(everything)
        self.master_weights.write(master_E, everything)
    def state_tensors(self, flat_slice, shape): return {}
    def workspace_bytes(self, is_cuda): return 0
    def traffic_bytes(self, is_cuda): return 0

class Incomplete(Optimizer):
    pass

class Unaligned(Sgd):
    alignment = 96

class TextAlignment(Sgd):
    alignment = "64"

class Failing(Sgd):
    __init__ = fail

class FailingState(Sgd):
    state_tensors = fail

class NoState(Sgd):
    def state_tensors(self, flat_slice, shape): return None

class NoSize(Sgd):
    def traffic_bytes(self, is_cuda): return None

class NoSteps(Sgd):
    num_steps = None

values = dict(kind="optimizers", name="NAME", title="SGD", implementation="strange:Sgd")
values |= dict(settings=Settings, check=check) | dict(CHANGE)
COMPONENT = OptimizerComponent(**values)
"""


@pytest.fixture
def add(tmp_path, monkeypatch):
    """Return a function that installs an optimizer with changed arguments of its component."""

    def add_optimizer(name: str, change: str = "") -> None:
        code = CODE.replace("NAME", name).replace("CHANGE", change)
        entries = {f"optimizers {name}": "strange:COMPONENT"}
        write_package(tmp_path / "site", "strange", entries, code)
        monkeypatch.delitem(sys.modules, "strange", raising=False)
        install(tmp_path / "site", monkeypatch)

    yield add_optimizer
    sys.modules.pop("strange", None)


def load(**train: object) -> Any:
    return recipe_from_dict(RECIPE | {"train": train})


def make_parameters() -> dict[str, nn.Parameter]:
    named = {MATRIX: nn.Parameter(torch.ones(4, 6)), VECTOR: nn.Parameter(torch.ones(6))}
    for parameter in named.values():
        parameter.grad = torch.ones_like(parameter)
    return named


def test_name_of_an_optimizer_is_no_section_of_an_objective(add, tmp_path):
    """The plug-in is not imported, and does not change the recipes of others."""
    write_package(tmp_path / "site", "other", {"objectives adamw_8bit": "absent:COMPONENT"})
    add("sgd")
    assert load(optimizer="adamw_8bit").train.sections.keys() == load().train.sections.keys()
    with pytest.raises(UserError, match=r"train.adamw_8bit: unknown setting"):
        load(adamw_8bit={"beta": 0.1})


TAKEN_NAMES = {
    "steps": "the name steps is a setting of train",
    "optimizer": "the name optimizer is a setting of train",
    "dpo": "finesight has a component of the same name, for train.objective",
    "sft": "finesight has a component of the same name, for train.objective",
}


@pytest.mark.parametrize("name", TAKEN_NAMES)
def test_plugin_cannot_have_the_name_of_a_setting_or_objective(add, name):
    add(name)
    with pytest.raises(UserError, match=TAKEN_NAMES[name]) as raised:
        load(optimizer=name)
    assert "strange 1.0" in str(raised.value)
    assert load(dpo={"beta": 0.2}).train.sections["dpo"].beta == 0.2


def test_two_plugins_of_one_name_are_named(add, tmp_path):
    write_package(tmp_path / "site", "other", {"objectives sgd": "absent:COMPONENT"})
    add("sgd")
    with pytest.raises(UserError, match=r"other 1\.0 has a component of the same name") as raised:
        load(optimizer="sgd")
    assert "plug-in sgd of strange 1.0" in str(raised.value)


def test_manifest_lists_plugins_of_the_recipe_only(add, tmp_path):
    """A package with the name of an objective's section is none of them."""
    write_package(tmp_path / "site", "other", {"optimizers dpo": "absent:COMPONENT"})
    add("sgd")
    assert not [*list_train_plugins(load().train)]
    plugins = [*list_train_plugins(load(optimizer="sgd").train)]
    assert [(one.kind, one.name) for one in plugins] == [("optimizers", "sgd")]


MISTAKES = {
    "implementation=''": "it has no implementation",
    "kind='objectives'": "its kind is 'objectives' instead of 'optimizers'",
    "settings=fail": "no subclass of SettingsSection",
    "check=fail": "KeyError: 'absent'",
    "check=lambda *_: ['a']": "yields 'a' instead of SettingProblem",
}


@pytest.mark.parametrize("change", MISTAKES)
def test_mistake_of_a_plugin_names_it(add, change):
    add("sgd", change)
    with pytest.raises(UserError) as raised:
        load(optimizer="sgd")
    assert MISTAKES[change] in str(raised.value)
    assert "plug-in sgd of strange 1.0" in str(raised.value)


HEAVY_MISTAKES = {
    "fail": "is no subclass of Optimizer",
    "Absent": "AttributeError",
    "Unaligned": "alignment is 96, no multiple of 64",
    "Incomplete": "Incomplete'> lacks methods of Optimizer",
    "Failing": "KeyError: 'absent'",
    "TextAlignment": "alignment is '64', no multiple of 64",
    "FailingState": "KeyError: 'absent'",
    "NoState": "returns None instead of",
    "NoSize": "returns None instead of a number of bytes",
    "NoSteps": "num_steps is None",
}


@pytest.mark.parametrize("target", HEAVY_MISTAKES)
def test_mistake_of_a_heavy_half_names_its_package(add, target):
    add("sgd", f"implementation='strange:{target}'")
    train = load(optimizer="sgd").train
    with pytest.raises(UserError, match=HEAVY_MISTAKES[target]) as raised:
        MasterWeightOptimizer(make_parameters(), train)
    assert "plug-in sgd of strange 1.0" in str(raised.value)


def test_settings_and_rules_are_those_of_the_plugin(add):
    add("sgd")
    recipe = load(optimizer="sgd", sgd={"momentum": 0.5})
    assert recipe_from_dict(recipe.model_dump(mode="json")) == recipe
    assert recipe.train.sections["sgd"].momentum == 0.5
    assert load(sgd={"file": "/other/file"}).train.list_models() == ["/other/file"]
    assert "sgd" not in load().train.sections
    with pytest.raises(UserError, match=r"train.sgd.momentum=0(.|\n)*remedy: set it"):
        load(optimizer="sgd", sgd={"momentum": 0.0})
    with pytest.raises(UserError, match=r"train.sgd.momentun(.|\n)*expected: one of momentum"):
        load(sgd={"momentun": 0.5})


@pytest.mark.parametrize("only_matrices", [False, True])
def test_group_has_the_plugin_or_the_default_optimizer(add, only_matrices):
    add("sgd", f"only_matrices={only_matrices}")
    train = load(
        optimizer="sgd", learning_rate=0.1, sgd={"momentum": 0.5}, max_grad_norm=None
    ).train
    named = make_parameters()
    masters = MasterWeightOptimizer(named, train)
    masters.step(1.0, masters.grad_norm())
    sgd_class = load_optimizer_class("sgd")
    found = {group.param_slices[0].name: group.optimizer for group in masters.param_groups}
    assert isinstance(found[MATRIX], sgd_class)
    assert isinstance(found[VECTOR], AdamW if only_matrices else sgd_class)
    torch.testing.assert_close(named[MATRIX].detach(), torch.full((4, 6), 0.95))
    # Without a state, gradients of earlier steps are unknown.
    assert masters.params_with_grad() == {MATRIX, VECTOR}
    expected = 0.9 if only_matrices else 0.95
    torch.testing.assert_close(named[VECTOR].detach(), torch.full((6,), expected))


def test_plugin_says_whether_its_state_may_be_sharded(add):
    add("sgd", "supports_sharding=True")
    check_sharding(load(optimizer="sgd", parallel="fsdp").train, "cuda", is_native=True)


def test_state_of_a_plugin_is_not_sharded_by_default(add):
    add("sgd")
    whole = load(optimizer="sgd", parallel="fsdp").train
    with pytest.raises(UserError, match=r"train.optimizer=sgd(.|\n)*train.optimizer=adamw"):
        check_sharding(whole, "cuda", is_native=True)
