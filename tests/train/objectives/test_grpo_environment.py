"""GRPO with an environment: episodes in which the model calls tools."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tiny_task import TinyTask, assert_same_run, edit_samples, rewind_to_checkpoint

from finesight.errors import UserError
from finesight.evaluate.custom_metric import check_recipe_metric
from finesight.evaluate.environment import Environment
from finesight.evaluate.episode import Episode
from finesight.evaluate.eval_case import EvalCase
from finesight.infer.request import GeneratedToken
from finesight.operations.evaluation import evaluate
from finesight.samples.sample import ToolCallPart
from finesight.settings.recipe import load_recipe, recipe_from_dict
from finesight.train.objectives.grpo import Settings
from finesight.train.objectives.grpo.rollout import Group, GrpoRollout

ENVIRONMENT = """
class Letters:
    def reset(self, id, **values):
        if id == "train3":
            raise ValueError("no sample")
        assert sorted(values) == ["boxes", "frames", "images", "meta", "prompt", "references"]
        (image,) = values["images"]
        assert image.mode == "RGB"
        self.value = (image.width + len(values["references"][0])) % 3

    def count(self, text: str) -> str:
        '''Count letters.

        Args:
            text: Any text.
        '''
        return str(len(text))

    def get_reward(self):
        self.value += 1
        return self.value


def early(case):
    assert case.environment_reward in (None, 1, 2, 3)
    return sum(letter < "n" for letter in case.answer) / max(1, len(case.answer))
"""


@pytest.fixture
def environment_task(tmp_path) -> TinyTask:
    task = TinyTask(tmp_path)
    (tmp_path / "letters.py").write_text(ENVIRONMENT)
    task.recipe["rewards"] = ["environment", f"{tmp_path / 'letters.py'}:early"]
    task.recipe["train"] |= {
        "objective": "grpo",
        "grpo": {
            "num_generations": 2,
            "max_completion_length": 8,
            "max_refills": 0,
            "environment": f"{tmp_path / 'letters.py'}:Letters",
        },
    }
    return task


def test_run_continues_after_errors_of_an_environment(environment_task):
    """A resumed run equals an uninterrupted one, also if the file is missing."""
    task = environment_task
    task.run()
    run = task.folder / "run"
    steps = [line for line in task.read_metrics() if "loss" in line]
    errors = [line["episodes/error_ratio"] for line in steps]
    # Sample 3 of 11 is used twice.
    assert sum(ratio * line["num_samples"] for ratio, line in zip(errors, steps, strict=True)) > 0
    assert all(line["episodes/mean_turns"] == 1 for line in steps)
    assert all(line["tools/call_frequency"] == 0 for line in steps)
    assert all(1 <= line["rewards/environment/mean"] <= 3 for line in steps)
    warning = r"warning: 2 episodes without a reward: \S+letters.py:5: ValueError: no sample"
    assert len(re.findall(warning, task.console_output)) == 1
    assert (run / "environment.py").read_text() == ENVIRONMENT
    lines = [json.loads(line) for line in (run / "responses.jsonl").read_text().splitlines()]
    assert all("environment" in line["scores"] for line in lines)
    for line in lines:
        (turn,) = line["episode"]["turns"]
        assert turn["role"] == "assistant"
        assert line["episode"]["reward"] == line["scores"]["environment"]
    shutil.copytree(run, task.folder / "whole")
    rewind_to_checkpoint(run)
    (task.folder / "letters.py").unlink()
    task.run(resume=True)
    assert_same_run(run, task.folder / "whole")


@pytest.mark.parametrize("masks_truncated", [False, True])
def test_failed_episodes_have_no_loss(masks_truncated):
    tokens = [GeneratedToken(1, -1.0)] * 3
    episodes = []
    cases = []
    for error, has_ended in (("", True), ("failed", True), ("", False)):
        episodes.append(Episode(None, tokens, error=error))  # type: ignore[arg-type]
        cases.append(EvalCase("", (), ("",), (), ended_with_eos=has_ended))
    rewards_GF = np.array([[1.0], [np.nan], [0.0]])
    group = Group(0, None, episodes, rewards_GF, [], cases)  # type: ignore[arg-type]
    rollout = object.__new__(GrpoRollout)
    rollout.settings = Settings(mask_truncated_completions=masks_truncated)
    rollout.environment = None
    used = [0] if masks_truncated else [0, 2]
    assert rollout.list_used(group) == used
    record = rollout.build_record([group], [group])
    assert (record.num_responses, record.num_tokens) == (2, 3 * len(used))


def test_failed_episodes_are_no_missing_rewards(monkeypatch):
    """The check of the first responses counts those that the environment could reward."""
    episodes = []
    cases = []
    for name, error in (("a", ""), ("b", "failed"), ("c", "")):
        episodes.append(Episode(None, error=error))  # type: ignore[arg-type]
        cases.append(EvalCase("", (), ("",), (), id=name))
    rewards_GF = np.array([[1.0], [np.nan], [0.0]])
    group = Group(0, None, episodes, rewards_GF, [], cases)  # type: ignore[arg-type]
    counted = []
    rollout = object.__new__(GrpoRollout)
    rollout.weights_F = np.ones(1)
    prompt = SimpleNamespace(tokenized=SimpleNamespace(spans=()))
    rollout.check = SimpleNamespace(add=lambda *values: counted.append(values))  # type: ignore
    monkeypatch.setattr(rollout, "read_samples", lambda *values: [(0, prompt)])
    monkeypatch.setattr(rollout, "sample_episodes", lambda *values: [episodes])
    monkeypatch.setattr(rollout, "score_responses", lambda *values: group)
    rollout.sample_groups(0, [0], [])
    ((checked, totals_G, _),) = counted
    assert [case.id for case in checked] == ["a", "c"]
    assert totals_G.tolist() == [1.0, 0.0]


def test_environment_of_a_received_run_needs_trust(environment_task, monkeypatch):
    task = environment_task
    monkeypatch.setenv("HOME", str(task.folder / "home"))
    run = task.folder / "run"
    run.mkdir()
    for name in ("manifest.json", "recipe.yaml"):
        (run / name).write_text("{}")
    (run / "environment.py").write_text(f"{ENVIRONMENT}\n# received\n")
    recipe = recipe_from_dict(task.recipe | {"output_dir": str(run)})
    named = recipe_from_dict(task.recipe | {"output_dir": str(task.folder / "own")})
    check_recipe_metric(named, None, (), trust=False)
    (task.folder / "letters.py").unlink()
    with pytest.raises(UserError, match="an untrusted program in a run folder") as caught:
        check_recipe_metric(recipe, run / "recipe.yaml", (), trust=False)
    assert caught.value.where == str(run / "environment.py")
    check_recipe_metric(recipe, run / "recipe.yaml", (), trust=True)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"environment": "zoom"}, "train.grpo.environment is 'zoom'"),
        ({"environment": "letters.txt:Letters"}, "train.grpo.environment is 'letters.txt:Lett"),
        ({"environment": None}, "the reward environment needs an environment"),
        ({"environment": "missing.py:Letters"}, "no such file"),
        ({"tool_timeout": 90, "turn_timeout": 60}, "turn_timeout is 60, less than the 90 s"),
    ],
)
def test_recipes_with_environments_are_checked(environment_task, changes, problem):
    environment_task.recipe["train"]["grpo"] |= changes
    with pytest.raises(UserError, match=problem):
        environment_task.run()


def test_environment_is_tried_before_training(environment_task):
    task = environment_task
    file = task.folder / "letters.py"
    file.write_text(ENVIRONMENT.replace("train3", "train0"))
    with pytest.raises(UserError, match=r"an episode without calls failed: .*no sample") as caught:
        task.run()
    assert caught.value.where == f"{file}:5"
    assert str(caught.value.remedy) == f"correct the environment {file}:Letters"
    assert not (task.folder / "run" / "metrics.jsonl").exists()


def test_trial_skips_truncated_images(environment_task, monkeypatch):
    """A run that skips a sample also starts if it is the first one."""
    task = environment_task
    image = task.folder / "train0.png"
    image.write_bytes(image.read_bytes()[:-40])
    tried: list[str] = []
    start = Environment.start_episode

    def record(self: Environment, row: Any, images: Any) -> Any:
        tried.append(row["id"])
        return start(self, row, images)

    monkeypatch.setattr(Environment, "start_episode", record)
    task.run("train.epochs=null", "train.steps=1")
    assert tried[0] == "train1"


def test_run_names_an_environment_that_fails(environment_task):
    task = environment_task
    file = task.folder / "letters.py"
    failing = ENVIRONMENT.replace('if id == "train3"', 'if id != "train0"')
    file.write_text(failing)
    task.recipe["rewards"] = ["environment"]
    problem = r"the environment failed in \d\d+% of the episodes"
    with pytest.raises(UserError, match=problem) as caught:
        task.run("train.epochs=null", "train.steps=2")
    assert caught.value.where == "train.grpo.environment"
    assert f"{file}:Letters" in str(caught.value.remedy)


def test_path_is_relative_to_the_recipe(environment_task):
    task = environment_task
    task.recipe["train"]["grpo"]["environment"] = "letters.py:Letters"
    path = task.folder / "recipe.yaml"
    path.write_text(json.dumps(task.recipe | {"output_dir": "run"}))
    sampling = load_recipe(path).needs.sampling
    assert sampling is not None
    assert sampling.episodes is not None
    assert sampling.episodes.environment == f"{task.folder / 'letters.py'}:Letters"


ALTERNATING_REWARD = """
import itertools

COUNT = itertools.count()

def alternate(case):
    return next(COUNT) % 2
"""


def test_model_zooms_after_fine_tuning_on_calls(tmp_path):
    """Sampler and trainer agree on episodes with images in tool results."""
    task = TinyTask(tmp_path)
    train = tmp_path / "train.jsonl"
    shutil.copy(tmp_path / "train0.png", tmp_path / "crop.png")
    write_calls(train, tmp_path)
    del task.recipe["data"]["eval"]
    task.recipe["tune"] = {"language": "full", "embeddings": "full"}
    steps = "train.epochs=null", "train.save_every=null"
    task.run(
        *steps,
        *("train.steps=300", "train.learning_rate=0.005", "train.batch_size=2"),
        *("train.pack_tokens=4000", f"data.train={{path: {train}, limit: 4}}"),
        name="calls",
    )
    with edit_samples(train) as samples:
        for sample in samples:
            del sample["tools"]
            sample["messages"] = [sample["messages"][0], sample["messages"][-1]]
    # The answers of the fine-tuned model may all be equal; this reward always differs.
    file = tmp_path / "rewards.py"
    file.write_text(ALTERNATING_REWARD)
    rewards = ["exact", f"{file}:alternate"]
    task.recipe |= {"model": str(tmp_path / "calls"), "rewards": rewards}
    task.recipe["train"] |= {
        "objective": "grpo",
        "grpo": {
            "environment": "image_zoom_in_tool",
            "max_completion_length": 400,
            "max_refills": 0,
            "temperature": 0.3,
            "scale_rewards": "none",
        },
    }
    task.run(*steps, "train.steps=3", "train.learning_rate=0.0001", "train.grpo.num_generations=4")
    first, *others = [line for line in task.read_metrics() if "reward" in line]
    assert first["tools/call_frequency"] > 0.5
    assert first["tools/failure_frequency"] < 0.5
    assert first["episodes/mean_turns"] > 1.5
    assert first["episodes/error_ratio"] == 0
    differences = [one["sampling/sampling_logp_difference/mean"] for one in (first, *others)]
    assert max(differences) <= 2e-6

    # Evaluation calls the tools, too, and pages show the crops.
    out = tmp_path / "out.jsonl"
    answers = evaluate(str(tmp_path / "run"), data=train, metric="qa", limit=2, out=out)
    (line, *_) = [json.loads(line) for line in out.read_text().splitlines()]
    roles = [turn["role"] for turn in line["episode"]["turns"]]
    assert roles[:3] == ["assistant", "tool", "assistant"]
    assert "environment_reward" not in answers.value.scores
    without = evaluate(str(tmp_path / "run"), data=train, metric="qa", limit=2, environment="none")
    assert all(one.episode is None for one in without.value.predictions)


def write_calls(train: Path, folder: Path) -> None:
    """Add a call of the zoom tool and its result to all samples."""
    with Environment("image_zoom_in_tool", folder, 30.0) as environment:
        tools = list(environment.tools)
    arguments = {"bbox_2d": [0, 0, 500, 500], "label": "a", "img_idx": 0}
    call = ToolCallPart(name="image_zoom_in_tool", arguments=arguments).model_dump(mode="json")
    crop = {"type": "image", "image": "crop.png"}
    with edit_samples(train) as samples:
        for sample in samples:
            question, answer = sample["messages"]
            called = {"role": "assistant", "content": [call]}
            sample["tools"] = tools
            sample["messages"] = [question, called, {"role": "tool", "content": [crop]}, answer]
