"""Tests of plug-ins: formats, metrics, rewards, trackers and families of other packages."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
import yaml
from case_files import load_cases
from docs_code_blocks import list_code_blocks
from html_text import read_visible_text
from image_fixtures import write_gray_image, write_jsonl
from plugin_fixtures import install, write_package
from safetensors.torch import load_file
from tiny_model import create_tiny_model

import finesight
from finesight.cli.app import run_command
from finesight.evaluate.eval_case import EvalCase
from finesight.evaluate.reward_scorer import RewardScorer
from finesight.evaluate.score_function import RewardError, ScoringError
from finesight.evaluate.task_metrics import compute_metrics
from finesight.ingest.formats import get_format
from finesight.metric_components import METRICS
from finesight.model_folder import ModelFolder
from finesight.plugins import PluginRecord
from finesight.settings.config import TrainSettings, parse_reward
from finesight.settings.manifest import load_manifest
from finesight.settings.recipe import load_recipe, recipe_from_dict
from finesight.train.master_weight_optimizer import MasterWeightOptimizer

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "plugin"
PACKAGE = "finesight-plugin-example"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the example into a folder with pip, without network."""
    folder = tmp_path_factory.mktemp("plugin")
    source = shutil.copytree(EXAMPLE, folder / "source")
    options = ["--no-index", "--no-deps", "--no-build-isolation", "--no-compile", "--quiet"]
    pip = [sys.executable, "-m", "pip", "install", *options]
    subprocess.run([*pip, "--target", folder / "site", source], check=True)
    return folder / "site"


@pytest.fixture(scope="module")
def recipe(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a step with the format, the metric and the tracker of the example."""
    folder = tmp_path_factory.mktemp("meters")
    for number in range(12):
        write_gray_image(folder / f"{number}.png", 56, 56, 20 * number)
    rows = [{"id": f"m{n}", "photo": f"{n}.png", "kwh": 37 * n} for n in range(12)]
    source, data = write_jsonl(folder / "log.jsonl", rows), folder / "data"
    settings = {
        "model": str(create_tiny_model(folder / "tiny")),
        "data": {name: str(data / f"{name}.jsonl") for name in ("train", "eval")},
        "train": {"steps": 1, "batch_size": 2, "num_workers": 0, "device": "cpu"},
        "eval": {"metric": "meter-reading", "max_new_tokens": 4},
        "track": "csv",
        "output_dir": str(folder / "run"),
    }
    recipe = folder / "recipe.yaml"
    recipe.write_text(json.dumps(settings))
    with pytest.MonkeyPatch.context() as patch:
        install(site, patch)
        words = ["import", source, data, "--format", "meter-log", "--eval-last", 8]
        assert run_command([*map(str, words)]) == 0
        assert run_command(["train", str(recipe)]) == 0
    return recipe


def test_package_adds_format_metric_and_tracker(recipe, site, monkeypatch, cli):
    install(site, monkeypatch)
    run = recipe.parent / "run"
    rows = [line.split(",") for line in (run / "track/csv/metrics.csv").read_text().splitlines()]
    names = {(step, name) for step, name, _ in rows}
    assert {("0", "scores/correct"), ("1", "loss")} <= names
    result = cli("eval", run, "--json").json
    assert result["primary_metric"] == "correct"
    assert len(result["intervals"]["correct"]) == 2
    cli("report", run)
    assert "correct" in read_visible_text((run / "report.html").read_text())
    plugins = json.loads((run / "manifest.json").read_text())["plugins"]
    found = [PluginRecord(**plugin) for plugin in plugins]
    names = [("trackers", "csv"), ("metrics", "meter-reading")]
    assert found == [PluginRecord(kind, name, PACKAGE, "1.0") for kind, name in names]


@pytest.mark.parametrize(
    ("former", "current"),
    [
        ("finesight.data.sample", "finesight.samples.sample"),
        ("finesight.data.formats", "finesight.ingest.formats"),
        ("finesight.data.formats.dataset_format", "finesight.ingest.formats.dataset_format"),
    ],
)
def test_former_modules_have_the_same_names(former, current):
    """Plug-ins for version 0.1.0 import from them."""
    names = {name: item for name, item in vars(import_module(current)).items() if name[0] != "_"}
    assert len(names) > 5
    assert names.items() <= vars(import_module(former)).items()


WRONG_FOCAL = {
    "train.focal.gama=3": "expected: one of gamma",
    "train.focal.gamma=-1": "train.focal.gamma: has the invalid value -1",
    "train.focal.gamma=0": "remedy: set train.objective=sft, or gamma above 0",
    "data.augment=light": "data.augment does not support train.objective=focal",
    "train.objective=foca": "remedy: did you mean train.objective: focal?",
}


def test_package_adds_an_objective(recipe, site, tmp_path, monkeypatch, cli):
    """Its settings and rules are checked; a run records it, and needs the package."""
    install(site, monkeypatch)
    changes = ("track=[]", "eval=null", "train.objective=focal")
    for change, message in WRONG_FOCAL.items():
        assert message in cli("plan", recipe, *changes, change, code=2).text

    losses = []
    other = "train.objective=sft train.focal.gamma=3"
    for change in ("train.focal.gamma=1", "train.focal.gamma=1e-9", other):
        run = tmp_path / f"run{len(losses)}"
        cli("train", recipe, *changes, *change.split(), f"output_dir={run}")
        rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        losses += [row["loss"] for row in rows if "loss" in row]
    assert losses[0] < losses[1] == pytest.approx(losses[2], rel=1e-4)

    run = tmp_path / "run0"
    saved = yaml.safe_load((run / "recipe.yaml").read_text())["train"]
    assert saved["focal"] == {"gamma": 1.0}
    (plugin,) = json.loads((run / "manifest.json").read_text())["plugins"]
    assert PluginRecord(**plugin) == PluginRecord("objectives", "focal", PACKAGE, "1.0")
    monkeypatch.undo()
    assert f"pip install {PACKAGE}==1.0" in cli("doctor", run, code=2).text

    # The third run only has the section. It survives the removal; its user recipe does not.
    cli("report", tmp_path / "run2")
    assert load_recipe(tmp_path / "run2" / "recipe.yaml").train.objective == "sft"
    words = ("plan", recipe, *changes[:2], *other.split(), f"output_dir={tmp_path / 'run2'}")
    assert f"pip install {PACKAGE}==1.0" in cli(*words, code=2).text


WRONG_REWARDS = {
    "{name: close, tolerence: 1}": "remedy: did you mean tolerance?",
    "{name: close, tolerance: 0}": "rewards.0.tolerance: has the invalid value 0",
    "{name: close, max_length: 3}": "the reward close does not use max_length",
    "{name: exact, tolerance: 1}": "expected: one of name, weight, pattern",
    "closer": "remedy: did you mean rewards.0: close?",
}


def test_package_adds_a_reward(recipe, site, tmp_path, monkeypatch, cli):
    """Its settings are checked; a run records it, and needs the package."""
    install(site, monkeypatch)
    changes = ("track=[]", "eval=null", "train.objective=grpo", "train.grpo.num_generations=2")
    for reward, message in WRONG_REWARDS.items():
        assert message in cli("plan", recipe, *changes, f"rewards=[{reward}]", code=2).text

    run = tmp_path / "run"
    reward = "rewards=[{name: close, tolerance: 1}, {name: length, max_length: 3}]"
    changes = (*changes, "train.grpo.max_completion_length=4", "train.grpo.max_refills=0")
    cli("train", recipe, *changes, reward, f"output_dir={run}")
    first, second = yaml.safe_load((run / "recipe.yaml").read_text())["rewards"]
    nothing = {"pattern": None, "json_schema": None}
    assert first == {"name": "close", "weight": 1, **nothing, "max_length": None, "tolerance": 1}
    assert second == {"name": "length", "weight": 1, **nothing, "max_length": 3}
    (plugin,) = json.loads((run / "manifest.json").read_text())["plugins"]
    assert PluginRecord(**plugin) == PluginRecord("rewards", "close", PACKAGE, "1.0")
    with RewardScorer(load_recipe(run / "recipe.yaml").rewards) as scorer:
        cases = [EvalCase(answer, (), ("4",), ()) for answer in ("4", "2", "four")]
        assert scorer.score(cases) == [[1, 0.5, 0], [1, 1, pytest.approx(2 / 3)]]
    monkeypatch.undo()
    assert f"pip install {PACKAGE}==1.0" in cli("doctor", run, code=2).text


WRONG_LION = {
    "train.lion.beta_3=0.9": "expected: one of beta_1, beta_2",
    "train.lion.beta_1=1": "train.lion.beta_1: has the invalid value 1",
    "train.optimizer=lio": "remedy: did you mean train.optimizer: lion?",
}


def test_package_adds_an_optimizer(recipe, site, tmp_path, monkeypatch, cli):
    """Its settings are checked, a run resumes with its state, and needs the package."""
    install(site, monkeypatch)
    run = tmp_path / "run"
    changes = ("track=[]", "eval=null", "train.optimizer=lion", "train.steps=2")
    for change, message in WRONG_LION.items():
        assert message in cli("plan", recipe, *changes, change, code=2).text
    plan = cli("plan", recipe, *changes, f"output_dir={run}", "--json").json
    bytes_per_param = plan["recipe"]["memory"]["optimizer_states"] / plan["num_trainable"]
    assert bytes_per_param == pytest.approx(4, rel=0.01)

    words = ("train", recipe, *changes, "train.lion.beta_2=0.98", "train.save_every=1")
    cli(*words, f"output_dir={run}")
    stopped = tmp_path / "stopped"
    cli(*words, f"output_dir={stopped}", "--stop-after", 1, code=75)
    resume = ("train", stopped, "--resume")
    assert "train.lion" in cli(*resume, "train.lion.beta_2=0.9", code=2).text
    cli(*resume)
    states = []
    for folder in (run, stopped):
        states.append(load_file(folder / "checkpoints" / "step-2" / "optimizer.safetensors"))
    assert {name.partition(".")[0] for name in states[0]} == {"num_steps", "momentum"}
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())

    saved = yaml.safe_load((run / "recipe.yaml").read_text())["train"]
    assert saved["lion"] == {"beta_1": 0.9, "beta_2": 0.98}
    (plugin,) = json.loads((run / "manifest.json").read_text())["plugins"]
    assert PluginRecord(**plugin) == PluginRecord("optimizers", "lion", PACKAGE, "1.0")
    monkeypatch.undo()
    assert f"pip install {PACKAGE}==1.0" in cli("doctor", run, code=2).text


OLD_REWARD = """
import os

def score(case):
    return None if case.answer == "none" else 1 / 0 if case.answer == "fail" else os.getpid()
"""


def test_functions_of_plugins_are_rewards(tmp_path, monkeypatch):
    """As packages for finesight 0.1.0 define them. They run in a process of their own."""
    write_package(tmp_path, "old_reward", {"rewards old.reward": "old_reward:score"}, OLD_REWARD)
    install(tmp_path, monkeypatch)
    reward = parse_reward({"name": "old.reward", "weight": 2})
    with RewardScorer([reward]) as scorer:
        first, none, second = scorer.score([EvalCase(a, (), ("",), ()) for a in ("", "none", "")])[
            0
        ]
        assert none is None
        assert first == second != os.getpid()
        with pytest.raises(RewardError, match=r"reward old\.reward: ZeroDivisionError") as caught:
            scorer.score([EvalCase("fail", (), ("",), (), "s1")])
    assert "plug-in old.reward of old_reward 1.0" in caught.value.where
    with pytest.raises(ValueError, match="does not use pattern"):
        parse_reward({"name": "old.reward", "pattern": "a"})


WITHOUT_LENGTH = """
import pkgutil
import sys

iter_modules = pkgutil.iter_modules
pkgutil.iter_modules = lambda *path: [one for one in iter_modules(*path) if one.name != "length"]
from finesight.evaluate.eval_case import EvalCase
from finesight.evaluate.reward_scorer import RewardScorer
from finesight.settings.recipe import recipe_from_run

exact, length = recipe_from_run(RECIPE).rewards
assert exact.model_dump() == RECIPE["rewards"][0] and length.model_dump() == RECIPE["rewards"][1]
with RewardScorer([length]) as scorer:
    print(scorer.score([EvalCase("four", (), ("",), ())]))
"""


def test_built_in_reward_works_as_plugin(tmp_path, monkeypatch):
    """A run with a reward that was built in needs the plug-in."""
    settings = {"model": "m", "data": {"train": "a"}, "output_dir": "run"}
    settings |= {"train": {"objective": "grpo"}, "rewards": ["exact"]}
    recipe = recipe_from_dict(settings).model_dump(mode="json")
    (exact,) = recipe["rewards"]
    del exact["max_length"]  # no longer an option of a built-in reward
    recipe["rewards"].append({**exact, "name": "length", "max_length": 3})
    command = [sys.executable, "-c", WITHOUT_LENGTH.replace("RECIPE", repr(recipe))]

    failed = subprocess.run(command, capture_output=True, text=True)
    assert "not one of 'exact', 'boxes', 'click', 'format', 'math'" in failed.stderr
    source = Path(finesight.__file__).parent / "evaluate" / "rewards" / "length.py"
    code = source.read_text("utf-8").replace("finesight.evaluate.rewards.length", "long_answers")
    write_package(tmp_path, "long_answers", {"rewards length": "long_answers:COMPONENT"}, code)
    install(tmp_path, monkeypatch)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "[[0.6666666666666667]]\n", done.stderr


def test_lion_is_that_of_the_paper(site, monkeypatch):
    install(site, monkeypatch)
    import finesight_plugin_lion_update

    monkeypatch.setattr(finesight_plugin_lion_update, "CHUNK_ELEMENTS", 7)
    given = {"optimizer": "lion", "learning_rate": 0.1, "weight_decay": 0.5, "max_grad_norm": None}
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 5, generator=generator)
    momentum = torch.zeros_like(weight)
    name = "model.layers.0.mlp.down_proj.weight"
    parameter = torch.nn.Parameter(weight.clone())
    masters = MasterWeightOptimizer({name: parameter}, TrainSettings.model_validate(given))
    for _ in range(4):
        grad = torch.randn(3, 5, generator=generator)
        parameter.grad = grad.clone()
        masters.step(1.0, masters.grad_norm())
        update = (0.9 * momentum + 0.1 * grad).sign()
        weight = weight - 0.1 * (update + 0.5 * weight)
        momentum = 0.99 * momentum + 0.01 * grad
        torch.testing.assert_close(parameter.detach(), weight)
    parameter.grad = torch.full_like(weight, torch.nan)
    masters.step(1.0, masters.grad_norm())
    torch.testing.assert_close(parameter.detach(), weight)
    torch.testing.assert_close(masters.optimizer_state()[f"momentum.{name}"], momentum)


def test_help_and_suggestions_name_plugins(recipe, site, monkeypatch, cli):
    install(site, monkeypatch)
    source, out = recipe.parent / "log.jsonl", recipe.parent / "other"
    misspelled = {
        "meter-log?": ("import", source, out, "--format", "meter-lo"),
        "eval.metric: meter-reading?": ("plan", recipe, "eval.metric=meter-readin"),
        "did you mean meter-reading?": ("eval", recipe.parent / "run", "--metric", "meter-readin"),
    }
    for suggestion, words in misspelled.items():
        assert suggestion in cli(*words, code=2).text
    code = "from finesight.cli.app import main; main()"
    for command, name in {"import": "meter-log", "eval": "meter-reading"}.items():
        words = [sys.executable, "-c", code, command, "--help"]
        printed = subprocess.run(words, capture_output=True, text=True)
        assert f"Plug-ins:{name}." in "".join(printed.stdout.split())


def test_focal_loss_of_certain_tokens_is_finite(site, monkeypatch):
    """Rounding makes probabilities 1 or above. The script on the page passes, too."""
    install(site, monkeypatch)
    from finesight_plugin_focal import Settings
    from finesight_plugin_focal_loss import FocalObjective

    for gamma in (0.0, 0.5, 1.5, 2.0):
        hidden = torch.tensor([[100.0, 0.0], [0.0, 100.0]], requires_grad=True)
        inputs = {"labels_L": torch.tensor([0, 1]), "loss_weight": torch.tensor(1.0)}
        (loss,) = FocalObjective(Settings(gamma=gamma)).compute_loss(hidden, torch.eye(2), inputs)
        loss.backward()
        assert loss.isfinite()
        assert hidden.grad is not None
        assert hidden.grad.isfinite().all()
    exec((EXAMPLE / "try_focal.py").read_text("utf-8"), {})


def test_page_contains_the_example():
    files = {f"examples/plugin/{file.name}": file.read_text("utf-8") for file in EXAMPLE.iterdir()}
    blocks = list_code_blocks(EXAMPLE.parents[1] / "docs" / "en" / "plugins.md")
    assert {one.caption: one.text for one in blocks if one.caption} == files


def test_other_processes_can_unpickle_objects_of_plugins(site, monkeypatch):
    install(site, monkeypatch)
    items = pickle.dumps([get_format("meter-log"), METRICS["meter-reading"]])
    code = "import pickle, sys; print(len(pickle.load(sys.stdin.buffer)))"
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, input=items, stdout=subprocess.PIPE).stdout == b"2\n"


def test_invalid_row_of_a_plugin_format_is_named(recipe, site, tmp_path, monkeypatch, cli):
    install(site, monkeypatch)
    source = write_jsonl(tmp_path / "log.jsonl", [{"photo": str(recipe.parent / "1.png")}])
    text = cli("import", source, tmp_path / "out", "--format", "meter-log", code=2).text
    assert "line 1" in text
    assert "no reading" in text


@pytest.mark.parametrize(
    "command", ["eval RUN", "report RUN", "doctor RUN", "train RECIPE --resume"]
)
def test_run_without_its_plugin_names_the_package(recipe, command, cli):
    words = command.replace("RUN", str(recipe.parent / "run")).replace("RECIPE", str(recipe))
    assert f"pip install {PACKAGE}==1.0" in cli(*words.split(), code=2).text


def test_model_of_a_run_needs_no_metric_and_tracker(recipe, cli):
    words = ("--prompt", "Read the meter.", "--max-new-tokens", 2)
    cli("predict", recipe.parent / "run", recipe.parent / "3.png", *words)


BROKEN = load_cases("plugins")["broken"]


@pytest.mark.parametrize("problem", BROKEN)
def test_broken_plugin_is_a_user_error(problem, recipe, tmp_path, monkeypatch, cli):
    """The error has the package, the entry point and the cause. Other commands are unaffected."""
    key, target, code = BROKEN[problem]
    write_package(tmp_path / "site", "broken", {key: target}, code)
    monkeypatch.delitem(sys.modules, "broken", raising=False)
    install(tmp_path / "site", monkeypatch)
    kind = key.split()[0]
    data = recipe.parent / "data"
    commands = {
        "formats": ("import", recipe.parent / "log.jsonl", tmp_path / "new", "--format", "meters"),
        "metrics": ("eval", "finesight-tiny", "--data", data / "eval.jsonl", "--metric", "meters"),
        "trackers": (
            "train",
            recipe,
            "track=meters",
            "eval=null",
            f"output_dir={tmp_path / 'run'}",
        ),
        "objectives": (
            "plan",
            recipe,
            "train.objective=meters",
            "track=[]",
            "eval=null",
            f"output_dir={tmp_path / 'run'}",
        ),
        "rewards": (
            "plan",
            recipe,
            "train.objective=grpo",
            "rewards=[meters]",
            "track=[]",
            "eval=null",
            f"output_dir={tmp_path / 'run'}",
        ),
        "optimizers": (
            "plan",
            recipe,
            "train.optimizer=meters",
            "track=[]",
            "eval=null",
            f"output_dir={tmp_path / 'run'}",
        ),
    }
    if kind == "families":
        model = rename_family(recipe.parent / "tiny", tmp_path / "model", "meters")
        question = ("--prompt", "Read the meter.", "--max-new-tokens", 2)
        commands[kind] = ("predict", model, recipe.parent / "3.png", *question)
    text = cli(*commands[kind], code=2).text
    assert all(part in text for part in (problem, "broken 1.0", f"finesight.{kind}", target))
    cli("import", data / "eval.jsonl", tmp_path / "copied")


MISBEHAVING = load_cases("plugins")["misbehaving"]


@pytest.mark.parametrize("body", MISBEHAVING)
def test_misbehaving_metric_of_a_plugin_is_a_user_error(body, tmp_path, monkeypatch):
    code = (
        "import sys\n"
        "from finesight.evaluate.eval_case import MetricResult, mean_metrics\n"
        "from finesight.evaluate.task_metrics import TaskMetric\n"
        f"def score(cases):\n    {body}\n"
        "def means(scores): return MetricResult(scores, mean_metrics(scores[:1]))\n"
        "METRIC = TaskMetric('a', score)\n"
    )
    write_package(tmp_path, "strange", {"metrics strange": "strange:METRIC"}, code)
    monkeypatch.delitem(sys.modules, "strange", raising=False)
    install(tmp_path, monkeypatch)
    cases = [EvalCase("a", (), ("a",), (), name) for name in ("s1", "s2")]
    with pytest.raises(ScoringError, match=MISBEHAVING[body]) as caught:
        compute_metrics("strange", cases)
    assert "plug-in strange of strange 1.0" in caught.value.where
    with (
        RewardScorer([parse_reward({"name": "strange"})]) as scorer,
        pytest.raises(RewardError, match=f"reward strange: .*{MISBEHAVING[body]}") as caught,
    ):
        scorer.score(cases)
    assert "--resume" in caught.value.remedy


def test_name_of_two_packages_is_refused(recipe, tmp_path, monkeypatch, cli):
    write_package(tmp_path, "first", {"formats meters": "first:F", "formats yolo": "first:F"})
    write_package(tmp_path, "second", {"formats meters": "second:F", "trackers wandb": "second:T"})
    install(tmp_path, monkeypatch)
    source = recipe.parent / "log.jsonl"
    changed = ("track=wandb", "eval.metric=ocr", f"output_dir={tmp_path}")
    for packages, words in {
        ("first 1.0", "second 1.0"): ("import", source, tmp_path / "out", "--format", "meters"),
        ("finesight", "first 1.0"): ("import", source, tmp_path / "out", "--format", "yolo"),
        ("finesight", "second 1.0"): ("plan", recipe, *changed),
    }.items():
        text = cli(*words, code=2).text
        assert f"several packages define it: {', '.join(packages)}" in text
    cli("import", recipe.parent / "data" / "eval.jsonl", tmp_path / "copied")


FAMILY_HALVES = """
from finesight.families.qwen2_vl.renderer import from_folder
from finesight.families.qwen2_vl.architecture import ARCHITECTURE
"""
FAMILY_COMPONENT = """
from finesight.family_components import FamilyComponent
COMPONENT = FamilyComponent(
    kind="families",
    name="acme_vl",
    title="Acme",
    renderer="acme_halves:from_folder",
    architecture="acme_halves:ARCHITECTURE",
    hf_class="AcmeModel",
    exports=("serving",),
)
"""


def rename_family(model: Path, folder: Path, family: str) -> Path:
    """Copy a model of Qwen2-VL, with another family."""
    renamed = shutil.copytree(model, folder)
    config = (renamed / "config.json").read_text().replace('"qwen2_vl"', f'"{family}"')
    (renamed / "config.json").write_text(config)
    (renamed / "sha256.json").unlink()
    return renamed


@pytest.mark.parametrize("is_component", [True, False])
def test_family_of_a_package_equals_the_native_one(
    is_component, recipe, tmp_path, monkeypatch, cli
):
    """A component, or a function and an architecture as for version 0.1.0."""
    entries = {"families acme_vl": "acme:COMPONENT"}
    architecture = "AcmeModel"
    if not is_component:
        entries = {
            "families acme_vl": "acme_halves:from_folder",
            "architectures acme_vl": "acme_halves:ARCHITECTURE",
        }
        architecture = "Qwen2VLForConditionalGeneration"  # of the base
    write_package(tmp_path / "site", "acme", entries, FAMILY_COMPONENT)
    (tmp_path / "site" / "acme_halves.py").write_text(FAMILY_HALVES)
    renamed = rename_family(recipe.parent / "tiny", tmp_path / "renamed", "acme_vl")
    words = ["--prompt", "Read the meter.", "--max-new-tokens", 8, "--json"]
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        install(tmp_path / "site", patch)
        models = recipe.parent / "tiny", renamed
        answers = [cli("predict", model, recipe.parent / "3.png", *words).json for model in models]
        cli("train", recipe, f"model={renamed}", f"output_dir={run}", "eval=null", "track=[]")
        exported = cli("export", renamed, code=0 if is_component else 2).text
        cli("merge", run, tmp_path / "merged")
        plugins = load_manifest(run / "manifest.json").plugins
    assert answers[0]["answer"] == answers[1]["answer"]
    assert ("vllm serve" in exported) is is_component
    found = [f"{one.kind} {one.name}" for one in plugins]
    assert [one for one in found if one.endswith(" acme_vl")] == [*entries]
    assert ModelFolder(tmp_path / "merged").config["architectures"] == [architecture]
    text = cli("predict", run, recipe.parent / "3.png", *words, code=2).text
    assert "pip install acme==1.0" in text
    # The next version of the package may have a component instead of both functions.
    shutil.rmtree(tmp_path / "site" / "acme-1.0.dist-info")
    entries = {"families acme_vl": "acme:COMPONENT"}
    write_package(tmp_path / "site", "acme", entries, FAMILY_COMPONENT)
    install(tmp_path / "site", monkeypatch)
    cli("report", run, "--out", tmp_path / "report.html")


FAMILY_THAT_FAILS = """
from finesight.families.qwen2_vl.renderer import from_folder
from finesight.family_components import FamilyComponent

def answer_nothing(folder):
    pass

COMPONENT = FamilyComponent(kind="families", name="meters", title="", {arguments})
"""


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ('renderer="broken:from_folder"', "it has no architecture"),
        ('renderer="broken:answer_nothing"', "returns None instead of a ModelFamily"),
        (
            'renderer="broken:from_folder", read_image_settings=lambda read_count: 3',
            "returns 3 instead of a dictionary",
        ),
        (
            'renderer="broken:from_folder", read_image_settings=lambda read_count: 1 / 0',
            "ZeroDivisionError",
        ),
    ],
)
def test_family_that_fails_is_a_user_error(arguments, problem, recipe, tmp_path, monkeypatch, cli):
    code = FAMILY_THAT_FAILS.format(arguments=arguments)
    write_package(tmp_path / "site", "broken", {"families meters": "broken:COMPONENT"}, code)
    monkeypatch.delitem(sys.modules, "broken", raising=False)
    install(tmp_path / "site", monkeypatch)
    model = rename_family(recipe.parent / "tiny", tmp_path / "model", "meters")
    text = cli("predict", model, recipe.parent / "3.png", "--prompt", "Read it.", code=2).text
    assert problem in text
    assert "plug-in meters of broken 1.0 (finesight.families: broken:" in text


def test_architecture_of_another_package_is_refused(recipe, tmp_path, monkeypatch, cli):
    """That of the component would be used without a word."""
    write_package(
        tmp_path / "site", "acme", {"families acme_vl": "acme:COMPONENT"}, FAMILY_COMPONENT
    )
    (tmp_path / "site" / "acme_halves.py").write_text(FAMILY_HALVES)
    entries = {"architectures acme_vl": "other:ARCHITECTURE"}
    write_package(tmp_path / "site", "other", entries, "ARCHITECTURE = 1")
    install(tmp_path / "site", monkeypatch)
    renamed = rename_family(recipe.parent / "tiny", tmp_path / "renamed", "acme_vl")
    words = ("--prompt", "Read the meter.", "--max-new-tokens", 2)
    text = cli("predict", renamed, recipe.parent / "3.png", *words, code=2).text
    assert "several packages define it: acme 1.0, other 1.0" in text


@pytest.mark.parametrize("kind", ["families", "architectures"])
def test_native_family_of_a_package_is_refused(kind, recipe, tmp_path, monkeypatch, cli):
    write_package(tmp_path / "site", "acme", {f"{kind} qwen2_vl": "acme:FAMILY"}, "FAMILY = print")
    install(tmp_path / "site", monkeypatch)
    words = ("--prompt", "Read the meter.", "--max-new-tokens", 2)
    text = cli("predict", recipe.parent / "tiny", recipe.parent / "3.png", *words, code=2).text
    assert "several packages define it: finesight, acme 1.0" in text
