"""GRPO: losses compared with TRL, rollouts, and runs with rewards."""

import contextlib
import json
import math
import re
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from tiny_model import create_tiny_model
from tiny_task import TinyTask, assert_same_run, edit_samples, make_task
from torch import Tensor
from vision_cache_fixtures import make_train_state

from finesight import api
from finesight.encode.packing import pack
from finesight.encode.renderer import NativeRenderer
from finesight.errors import TrainingInterrupted, UserError
from finesight.evaluate.eval_case import EvalCase
from finesight.evaluate.score_function import RewardError
from finesight.infer.prediction import ResponseSampler
from finesight.model.trainable import trainable_parameters
from finesight.model_folder import ModelFolder
from finesight.progress import ProgressConsole
from finesight.samples.frames import rescale
from finesight.samples.sample import BoxPart, ImagePart, LocatedSample, Message, Sample
from finesight.settings.config import Recipe
from finesight.train.objectives.grpo import Settings
from finesight.train.objectives.grpo.loss import (
    GrpoObjective,
    compute_token_losses,
    list_clipping_metrics,
)
from finesight.train.objectives.grpo.rollout import (
    Group,
    GrpoRollout,
    RewardCheck,
    RolloutRecord,
    describe_rewards,
    disable_adapters,
)
from finesight.train.oom import GpuOutOfMemoryError
from finesight.train.prefetch import DataWorkerError
from finesight.train.recipe_check import suggest_completion_length
from finesight.train.rollout import join_responses
from finesight.train.state import TrainState
from finesight.train.step import train_step

QUIET = ProgressConsole(Console(quiet=True))

LOSS_TYPES = "dapo", "grpo", "dr_grpo", "bnpo", "cispo", "sapo"
MODES = "sequence_mask", "sequence_truncate", "token_mask", "token_truncate"
NUM_RESPONSES, MAX_LENGTH = 6, 7

VARIANTS = [
    {"loss_type": loss_type, "importance_sampling_level": level, "beta": beta, "is_first": first}
    | {"use_bias_correction_kl": first, "importance_sampling_mode": MODES[number % 4]}
    for number, loss_type in enumerate(LOSS_TYPES)
    for level in ("token", "sequence")
    for beta in (0.0, 0.04)
    for first in (True, False)
]


def make_settings(is_first: bool, **settings: object) -> Settings:
    number = {"num_generations": NUM_RESPONSES, "num_iterations": 1 if is_first else 2}
    return Settings.model_validate(settings | number)


def draw_group() -> dict[str, Tensor]:
    """Log-probabilities of trainer, sampler and reference, [N, T], mask and advantages."""
    rng, shape = np.random.RandomState(0), (NUM_RESPONSES, MAX_LENGTH)
    logps = -3 * rng.rand(*shape)
    lengths = rng.randint(1, MAX_LENGTH + 1, (NUM_RESPONSES, 1))
    group = {
        "logps": logps,
        "sampled": logps + 0.6 * rng.standard_normal(shape),
        "reference": logps + 0.3 * rng.standard_normal(shape),
        "mask": np.arange(MAX_LENGTH) < lengths,
        "advantages": rng.standard_normal(NUM_RESPONSES),
    }
    return {name: torch.from_numpy(values) for name, values in group.items()}


def compute_loss(settings: Settings, group: dict[str, Tensor], logps: Tensor) -> Tensor:
    """Return the loss of one group as a training step normalizes it."""
    mask = group["mask"]
    lengths, total = mask.sum(1).double(), mask.sum().double()
    advantages, responses = (
        one[:, None].expand(mask.shape)[mask]
        for one in (group["advantages"], torch.arange(NUM_RESPONSES))
    )
    reference = group["reference"][mask] if settings.beta else None
    losses, _ = compute_token_losses(
        settings, logps[mask], group["sampled"][mask], reference, advantages, responses
    )
    weights = torch.ones(NUM_RESPONSES, dtype=torch.float64)
    if settings.loss_type in ("grpo", "sapo"):
        weights = total / (NUM_RESPONSES * lengths)
    if settings.loss_type == "dr_grpo":
        weights *= total / (NUM_RESPONSES * MAX_LENGTH)
    return (losses * weights[:, None].expand(mask.shape)[mask]).sum() / total


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_and_gradients_match_trl(variant, assert_matches_trl):
    settings, group = make_settings(**variant), draw_group()
    logps = group["logps"].clone().requires_grad_()
    words = [str(value) for name, value in variant.items() if name != "use_bias_correction_kl"]
    assert_matches_trl(" ".join(["grpo", *words]), compute_loss(settings, group, logps), logps)


def test_gradients_of_clipped_tokens():
    """The gradient of a clipped token is 0, or, with `cispo`, as at the largest ratio."""
    group = draw_group()
    mask = group["mask"]
    advantages = group["advantages"][:, None].expand(mask.shape)[mask]
    responses = torch.arange(NUM_RESPONSES)[:, None].expand(mask.shape)[mask]
    for loss_type in LOSS_TYPES:
        settings = make_settings(is_first=False, loss_type=loss_type, epsilon_high=0.4)
        logps = group["logps"][mask].requires_grad_()
        losses, metrics = compute_token_losses(
            settings, logps, group["sampled"][mask], None, advantages, responses
        )
        (gradient,) = torch.autograd.grad(losses.sum(), logps)
        clipped = sum(metrics[name] for name in list_clipping_metrics(settings))
        if loss_type == "sapo":
            assert (gradient != 0).all()
        elif loss_type == "cispo":
            # As in TRL, the ratio counts positive advantages.
            at_limit = torch.isclose(gradient, -0.4 * advantages)
            assert torch.equal(clipped.bool(), at_limit & (advantages > 0))
        else:
            assert torch.equal(clipped.bool(), gradient == 0)


def list_clipped(
    loss_type: str, level: str, ratios: list[list[float]], advantages: list[float]
) -> dict[str, list[bool]]:
    """Return for each token, or for each response, if it is clipped at 0.8 and at 1.4 or 0.4."""
    clipped: dict[str, list[bool]] = {}
    for values, advantage in zip(ratios, advantages, strict=True):
        compared = values
        if level == "sequence":
            compared = [math.exp(sum(map(math.log, values)) / len(values))]
        for ratio in compared:
            if loss_type == "cispo":
                clipped.setdefault("cispo_clip_ratio", []).append(ratio > 0.4 and advantage > 0)
            elif loss_type != "sapo":
                is_low = ratio < 0.8 and advantage < 0
                is_high = ratio > 1.4 and advantage > 0
                clipped.setdefault("clip_ratio/low_mean", []).append(is_low)
                clipped.setdefault("clip_ratio/high_mean", []).append(is_high)
    return clipped


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_metrics_count_the_tokens_or_responses_that_the_loss_limits(loss_type, level):
    group = draw_group()
    mask = group["mask"]
    settings = make_settings(
        is_first=False,
        loss_type=loss_type,
        importance_sampling_level=level,
        epsilon_high=0.4,
        beta=0.04,
    )
    lengths = mask.sum(1)
    num_tokens = int(lengths.sum())
    # Hidden states are logits of two tokens.
    h_LD = torch.stack([group["logps"][mask], torch.log1p(-group["logps"][mask].exp())], 1)
    mean_weights = num_tokens / NUM_RESPONSES / lengths.double()
    inputs = {
        "labels_L": torch.zeros(num_tokens, dtype=torch.int64),
        "response_L": torch.arange(NUM_RESPONSES).repeat_interleave(lengths),
        "advantages_L": group["advantages"].repeat_interleave(lengths),
        "token_weights_L": torch.ones(num_tokens, dtype=torch.float64),
        "response_weights_L": mean_weights.repeat_interleave(lengths),
        "sampled_logps_L": group["sampled"][mask],
        "reference_logps_L": group["reference"][mask],
        "loss_weight": torch.tensor(1 / num_tokens, dtype=torch.float64),
    }
    objective = GrpoObjective(settings)
    head = torch.eye(2, dtype=torch.float64)
    _, *means = objective.compute_loss(h_LD, head, inputs).tolist()
    found = objective.describe_metrics(means)
    ratios = (group["logps"] - group["sampled"]).exp()
    rows = [ratios[n, : lengths[n]].tolist() for n in range(NUM_RESPONSES)]
    expected = list_clipped(loss_type, level, rows, group["advantages"].tolist())
    reported = {name: value for name, value in found.items() if "clip_ratio" in name}
    shares = {name: sum(values) / len(values) for name, values in expected.items()}
    assert reported == pytest.approx(shares, abs=1e-12)
    if level == "token":
        assert all(0 < share < 1 for share in shares.values())
    differences = (group["logps"] - group["sampled"])[mask].abs()
    sampler_difference = found["sampling/sampling_logp_difference/mean"]
    assert sampler_difference == pytest.approx(differences.mean().item(), abs=1e-12)
    assert found["kl"] > 0
    assert "kl" not in GrpoObjective(settings.model_copy(update={"beta": 0.0})).metric_names


REWARD = """
def early(case):
    return sum(letter < "n" for letter in case.answer) / max(1, len(case.answer))

def unscored(case):
    return None if len(case.answer) % 2 else float("nan") if case.answer else 1.0

def partly(case):
    return None if len(case.answer) % 2 else early(case)
"""


LETTERS = [
    {"name": "format", "pattern": rf"([n-\uffff]*[\x00-m]){{{count}}}.*", "weight": 0.1}
    for count in range(1, 25)
]
"""As the function `early`: the number of such letters."""


@pytest.fixture
def reward_task(tmp_path) -> TinyTask:
    """Task with a function that rewards letters at the start of the alphabet."""
    task = TinyTask(tmp_path)
    (tmp_path / "rewards.py").write_text(REWARD)
    task.recipe["rewards"] = [f"{tmp_path / 'rewards.py'}:early", {"name": "exact", "weight": 0.5}]
    task.recipe["train"] |= {
        "objective": "grpo",
        "grpo": {"num_generations": 4, "max_completion_length": 8, "max_refills": 0},
    }
    return task


def read_steps(task: TinyTask, name: str = "run") -> list[dict[str, float]]:
    return [line for line in task.read_metrics(name) if "loss" in line]


def test_run_raises_the_reward(reward_task, monkeypatch):
    """Sampler and trainer agree, and the prompt is packed once for a group."""
    # Each sampling takes so long that the load of the machine does not count.
    sampling_s = 1000.0
    perf_counter = time.perf_counter
    sample = ResponseSampler.sample
    num_samplings = 0

    def slow_sample(*arguments):
        nonlocal num_samplings
        num_samplings += 1
        return sample(*arguments)

    monkeypatch.setattr(ResponseSampler, "sample", slow_sample)
    monkeypatch.setattr(time, "perf_counter", lambda: perf_counter() + sampling_s * num_samplings)
    # At a low temperature, the nearly equal logits of a random model can concentrate.
    reward_task.recipe["rewards"].append({"name": "json", "weight": 0.1})
    sharp = "train.grpo.temperature=0.1", "train.grpo.max_completion_length=4"
    size = "train.steps=20", "train.epochs=null", "train.save_every=null"
    reward_task.run(*sharp, *size, "train.learning_rate=0.003", "train.grpo.num_generations=8")
    steps = read_steps(reward_task)
    printed = reward_task.console_output
    assert "32 responses have a score of the reward json: these references are no JSON" in printed
    change = r"Reward of the first and last 5 steps: \S+ → \S+; early \S+ to \S+: better"
    assert re.search(change, printed)
    # Sampling is not the wait for data.
    assert all(line["data_wait_s"] < sampling_s / 2 < line["rollout_s"] for line in steps)
    rewards = [line["reward"] for line in steps]
    assert np.mean(rewards[-4:]) > np.mean(rewards[:4]) + 0.15
    assert steps[0]["rewards/early/mean"] == pytest.approx(rewards[0], abs=1e-6)
    differences = [line["sampling/sampling_logp_difference/mean"] for line in steps]
    assert max(differences) <= 2e-6
    ratios = [line["sampling/importance_sampling_ratio/mean"] for line in steps]
    assert ratios == pytest.approx([1] * len(steps), abs=1e-4)
    assert all(line["completions/max_length"] <= 4 for line in steps)


@pytest.mark.gpu
@pytest.mark.parametrize("tuned", ["lora", "full"])
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_5"])
def test_sampler_and_trainer_compute_the_same_bits(reward_task, family, tuned):
    """Log-probabilities in bf16 are equal while the weights change."""
    name = f"{family}-{tuned}"
    model = create_tiny_model(reward_task.folder / f"model-{name}", family)
    reward_task.run(
        f"model={model}",
        *("train.device=cuda", "train.precision=bf16", "tune.lora.dropout=0"),
        *("train.steps=4", "train.epochs=null", "train.save_every=null"),
        *(f"tune.language={tuned}", "train.learning_rate=0.003", "train.grpo.num_generations=8"),
        name=name,
    )
    steps = read_steps(reward_task, name)
    assert max(one["sampling/sampling_logp_difference/mean"] for one in steps) <= 2e-6
    assert len({one["reward"] for one in steps}) > 1


def test_changed_rewards_are_refused_on_resume(reward_task):
    """The folder of a Python file may change."""
    run = reward_task.folder / "run"
    rewards = reward_task.folder / "rewards.py"
    fails = f"import os\n    1 / (not os.path.exists({str(run / 'checkpoints' / 'step-2')!r}))"
    rewards.write_text(REWARD.replace("return sum", f"{fails}\n    return sum"))
    with pytest.raises(RewardError, match="ZeroDivisionError"):
        reward_task.run()
    rewards.write_text(REWARD)
    function, other = reward_task.recipe["rewards"]
    (manifest, *_) = (run / "checkpoints").glob("*/*.json")
    assert '"json_schema"' not in manifest.read_text()
    reward_task.recipe["rewards"] = [{"name": function, "weight": 3.0}, other]
    with pytest.raises(UserError, match=r"rewards is \[.*'weight': 3.0"):
        reward_task.run(resume=True)
    moved = reward_task.folder / "moved" / "rewards.py"
    moved.parent.mkdir()
    moved.write_text(REWARD)
    reward_task.recipe["rewards"] = [f"{moved}:early", other]
    reward_task.run(resume=True)


def test_run_resumed_after_a_failed_reward_equals_uninterrupted_run(reward_task):
    rewards, run = reward_task.folder / "rewards.py", reward_task.folder / "run"
    rewards.write_text(REWARD.replace("max(1, len(case.answer))", "len(case.answer)"))
    with pytest.raises(UserError, match=r"ZeroDivisionError.*answer ''"):
        reward_task.run()
    assert not run.exists()
    # The step after the first checkpoint fails.
    missing, repaired = run / "checkpoints" / "step-2", reward_task.folder / "repaired"
    works = f"not os.path.exists({str(missing)!r}) or os.path.exists({str(repaired)!r})"
    failure = f"import os\n    1 / ({works})\n    return sum"
    rewards.write_text(REWARD.replace("return sum", failure))
    two_updates = "train.grpo.num_iterations=2", "train.grpo.max_refills=2"
    reward_task.run(*two_updates, name="expected")
    with pytest.raises(RewardError, match=r"ZeroDivisionError.*sample") as caught:
        reward_task.run(*two_updates)
    assert "rewards.py:4" in caught.value.where
    assert caught.value.what.endswith("in step 3, checkpoint of step 2 written")
    repaired.touch()
    rewards.unlink()  # the run has a copy
    with (run / "responses.jsonl").open("a") as file:
        file.write('{"step": 7, "respon')
    reward_task.run(*two_updates, resume=True)
    assert_same_run(run, reward_task.folder / "expected")
    recorded, expected = (
        (path / "responses.jsonl").read_text() for path in (run, reward_task.folder / "expected")
    )
    assert recorded == expected
    lines = [json.loads(line) for line in recorded.splitlines()]
    numbers = [(line["step"], line["response"]) for line in lines]
    assert numbers == [(step, n) for step in range(1, 7) for n in range(4)]
    assert [*lines[0]["scores"]] == ["early", "exact"]
    best = max(lines[:4], key=lambda line: line["scores"]["early"])
    assert best["advantage"] > 0 > min(line["advantage"] for line in lines[:4])


def test_settings_change_training(reward_task):
    """A reference model, unscored and truncated responses, and several packs of a group."""
    steps = ("train.steps=2", "train.epochs=null", "train.save_every=null")
    losses = {}
    reward_task.recipe["rewards"] = LETTERS
    del reward_task.recipe["data"]["eval"]
    for name, overrides in {
        "plain": (),
        "packs": ("train.pack_tokens=1",),
        "reference": (
            *("train.grpo.beta=0.5", "train.grpo.temperature=2.0", "tune.merger=lora"),
            *("train.grpo.scale_rewards=batch", "train.grpo.loss_type=grpo"),
        ),
        "truncated": ("train.grpo.mask_truncated_completions=true",),
        "sequence": (
            *("train.grpo.importance_sampling_level=sequence", "train.grpo.num_iterations=2"),
            *("train.grpo.epsilon=1e-6", "train.grpo.epsilon_high=1e-6"),
        ),
    }.items():
        reward_task.run(*steps, *overrides, name=name)
        lines = read_steps(reward_task, name)
        losses[name] = [line["loss"] for line in lines]
        num_tokens = [16 * line["completions/mean_length"] for line in lines]
        num_used = [line["num_supervised_tokens"] for line in lines]
        assert (num_used == num_tokens) == (name != "truncated"), name
        if name == "reference":
            assert lines[0]["kl"] == pytest.approx(0, abs=1e-6)
            assert lines[1]["kl"] > 1e-6
        if name == "sequence":
            clipped = [16 * line["clip_ratio/low_mean"] for line in lines]
            assert clipped == pytest.approx([round(count) for count in clipped], abs=1e-4)
            assert max(clipped) > 0.5
    assert losses["packs"] == pytest.approx(losses["plain"], abs=1e-5)
    reward_task.recipe["rewards"] = [f"{reward_task.folder / 'rewards.py'}:unscored"]
    with pytest.raises(
        UserError, match=r"training did not change.*equal rewards or none \(.*:unscored"
    ) as e:
        reward_task.run(*steps, name="unscored")
    assert e.value.where == "rewards"
    # Other responses of a group with an unscored one are compared.
    reward_task.recipe["rewards"] = [f"{reward_task.folder / 'rewards.py'}:partly"]
    reward_task.run(*steps, name="partly")
    assert all(line["num_samples"] > 0 for line in read_steps(reward_task, "partly"))


EQUAL_REWARDS = """
def score(case):
    if int(case.id.removeprefix("train")) % 2:
        return 0.3
    return sum(map(ord, case.answer)) % 7 / 7
"""


def compute_logps(state: TrainState, group: Group, number: int, banned: list[int]) -> Tensor:
    """Return the log-probabilities of the tokens of one response without shared prefix."""
    batch = pack([join_responses(group.prompt, [group.responses[number]])])
    model = state.engine.model
    logits = model(batch) @ model.lm_head_weight.T
    logits[:, banned] = -torch.inf
    return logits.log_softmax(1).gather(1, batch.labels_L.long()[:, None])[:, 0]


def compute_kl_formula(
    state: TrainState, groups: list[Group], loss_type: str, beta: float, max_length: int
) -> Tensor:
    """Return the loss of all responses of a step, each without shared prefix."""
    banned = list(state.data.renderer.visual_token_ids)
    references: list[list[Tensor]] = []
    with torch.no_grad(), disable_adapters(state.engine.model):
        for group in groups:
            references.append([compute_logps(state, group, number, banned) for number in range(3)])
    sums: list[Tensor] = []
    lengths: list[int] = []
    for group, group_references in zip(groups, references, strict=True):
        rewards = torch.from_numpy(group.rewards_GF[:, 0])
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        for number, reference in enumerate(group_references):
            logps = compute_logps(state, group, number, banned)
            ratio = (logps - logps.detach()).exp()
            kl = (reference - logps).exp() - (reference - logps) - 1
            sums.append((-advantages[number] * ratio + beta * kl * ratio).sum())
            lengths.append(len(logps))
    if loss_type == "grpo":
        return torch.stack([one / length for one, length in zip(sums, lengths, strict=True)]).mean()
    if loss_type == "dr_grpo":
        return torch.stack(sums).sum() / (len(sums) * max_length)
    return torch.stack(sums).sum() / sum(lengths)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
def test_kl_divergence_counts_responses_with_equal_rewards(tmp_path, monkeypatch, loss_type):
    """Loss and gradient are those of a formula over all responses of the step."""
    beta, max_length = 0.04, 5
    folder = tmp_path / "task"
    recipe = make_task(folder) | {"output_dir": str(folder / "run")}
    recipe["tune"] = {"language": "lora", "lora": {"rank": 4, "dropout": 0.0}}
    recipe["rewards"] = [f"{folder / 'rewards.py'}:score"]
    (folder / "task.json").write_text(json.dumps(recipe))
    (folder / "rewards.py").write_text(EQUAL_REWARDS)
    grpo = {"num_generations": 3, "max_completion_length": max_length, "beta": beta}
    grpo |= {"loss_type": loss_type, "importance_sampling_mode": "none", "max_refills": 1}
    state = make_train_state(folder, objective="grpo", batch_size=4, grpo=grpo)
    (folder / "run").mkdir()
    # The adapter differs from the reference.
    generator = torch.Generator().manual_seed(0)
    parameters = trainable_parameters(state.engine.model)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    groups: list[Group] = []
    sample_groups = GrpoRollout.sample_groups

    def record_groups(*arguments):
        found = sample_groups(*arguments)
        groups.extend(found)
        return found

    monkeypatch.setattr(GrpoRollout, "sample_groups", record_groups)
    state.engine.model.train()
    with contextlib.closing(state.engine.objective.sample_steps(state, 0)) as steps:
        step = next(steps)
    assert len(groups) == 4  # none is replaced
    found: dict[str, Tensor] = {}

    def store_gradients(*arguments):
        for group in state.engine.optimizer.param_groups:
            sums = group.gradients.per_parameter()
            for param_slice, gradient in zip(group.param_slices, sums, strict=True):
                found[param_slice.name] = gradient.clone()

    monkeypatch.setattr(state.engine.optimizer, "step", store_gradients)
    loss, _ = train_step(state, step).wait()

    num_equal = sum(len(set(group.rewards_GF[:, 0].tolist())) == 1 for group in groups)
    assert 0 < num_equal < len(groups)
    expected = compute_kl_formula(state, groups, loss_type, beta, max_length)
    assert loss == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)
    gradients = torch.autograd.grad(expected, list(parameters.values()))
    for name, gradient in zip(parameters, gradients, strict=True):
        scale = gradient.abs().max().item()
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4 * scale, msg=name)


@pytest.mark.parametrize(
    ("rewards", "is_different"),
    [
        ([0.0, 1.0, 0.0], True),
        ([0.1, 0.1, 0.1], False),  # their standard deviation is not exactly 0
        ([0.5, 0.5 + 1e-12, 0.5], True),
        ([0.5, 0.5, math.nan], False),
        ([0.5, math.nan, math.nan], False),
    ],
)
def test_share_of_equal_rewards_agrees_with_the_groups_of_the_update(rewards, is_different):
    rewards_GF = np.array(rewards)[:, None]
    weights_F = np.ones(1)
    rollout = SimpleNamespace(weights_F=weights_F)
    group = SimpleNamespace(rewards_GF=rewards_GF)
    record = RolloutRecord([rewards_GF.tolist()], [4] * 3, [False] * 3, 1, 12)
    metrics = describe_rewards(["exact"], weights_F, rewards_GF[None], [record])
    assert GrpoRollout.has_different_rewards(rollout, group) == is_different
    # As the audit at the end of a run reads it.
    assert (metrics.get("frac_reward_zero_std", 1) < 1) == is_different


def test_equal_rewards_are_named_with_a_kl_divergence(reward_task):
    """The update contains the groups, but has no gradient where policy and reference are equal."""
    reward_task.recipe["rewards"] = [f"{reward_task.folder / 'rewards.py'}:unscored"]
    steps = "train.steps=2", "train.epochs=null", "train.save_every=null"
    with pytest.raises(UserError, match="equal rewards or none") as caught:
        reward_task.run(*steps, "train.grpo.beta=0.04", "tune.merger=lora")
    assert caught.value.where == "rewards"
    lines = read_steps(reward_task)
    assert [line["num_supervised_tokens"] > 0 for line in lines] == [True, True]
    assert not (reward_task.folder / "run" / "responses.jsonl").exists()


def test_unreadable_images_are_skipped(reward_task, monkeypatch):
    image, sample_groups = reward_task.folder / "train0.png", GrpoRollout.sample_groups
    with edit_samples(reward_task.folder / "train.jsonl") as samples:
        del samples[4:]

    def damage(*args):
        image.write_bytes(image.read_bytes()[:50])
        return sample_groups(*args)

    monkeypatch.setattr(GrpoRollout, "sample_groups", damage)
    reward_task.recipe["rewards"] = LETTERS
    reward_task.run("train.steps=1", "train.epochs=null", "data.on_invalid_sample=skip")
    (step,) = read_steps(reward_task)
    assert step["skipped_samples"] == ["train0"]


FRAMES = {"thousandths of the image": (1000, 1000), "pixels of the image": (800, 400)}


@pytest.mark.parametrize("kind", ["exact", "weak", "point"])
@pytest.mark.parametrize("frame", [*FRAMES, ""])
def test_useless_rewards_name_the_coordinate_frame(tmp_path, frame, kind):
    """The model is of a family with boxes in pixels of the resized image.

    A weak model hits a corner of the reference, and reverses its own corners, as if it was tuned
    on a few boxes in another frame.
    """
    renderer = NativeRenderer(ModelFolder(create_tiny_model(tmp_path / "model", "qwen2_5_vl")))
    Image.new("RGB", (400, 800)).save(tmp_path / "image.png")
    part = ImagePart(image=str(tmp_path / "image.png"))
    question = Sample(id="a", messages=(Message(role="user", content=(part,)),))
    (span,) = renderer.tokenize_prompt(LocatedSample(question, tmp_path)).spans
    corners = (100, 200, 100, 200) if kind == "point" else (100, 200, 300, 600)
    reference = BoxPart(image=0, xyxy=corners)
    # The model writes the reference in the frame, or another box.
    box = (350, 240, 260, 140) if kind == "weak" else reference.xyxy
    written = rescale(box, (800, 400), FRAMES[frame]) if frame else (0, 0, 9, 9)
    found = rescale(written, span.resized_size, (800, 400))
    cases = [
        EvalCase("", (BoxPart(image=0, xyxy=found),), ("",), (reference,), str(number))
        for number in range(64)
    ]

    def report(cases: list[EvalCase], rewards: list[float]) -> str:
        lines: list[str] = []
        check = RewardCheck(renderer, lines.append)
        for case in cases:
            check.add([case] * 4, np.array(rewards), [span])
        check.finish()
        return " ".join(lines)

    line = report(cases, [0, 0, 0, 0])
    assert "128 of the first 128 responses have no reward" in line
    assert ("coordinate frame" in line) == bool(frame)
    assert frame in line
    rewarded = report(cases, [0, 0, 0, 0.5])
    assert (("coordinate frame" in rewarded), "no reward" in rewarded) == (bool(frame), False)
    # Penalties differ; equal ones are as useless as no reward.
    assert report(cases[:1], [-8, -9, -7, -8]) == ""
    assert "4 of the first 4 responses have no reward" in report(cases[:1], [-1, -1, -1, -1])
    # The responses to one sample are no evidence.
    assert report(cases[:1] * 64, [1, 1, 1, 1]) == ""
    assert "4 of the first 4 responses have no reward" in report(cases[:1], [0, 0, 0, 0])


@pytest.mark.parametrize(
    ("objective", "lengths", "remedy"),
    [
        ("grpo", [65] * 20, "set train.grpo.max_completion_length to 65 or more"),
        ("grpo", [4] * 9 + [900], "set train.grpo.max_completion_length to 900 or more"),
        ("grpo", [64] * 20, "raise train.grpo.max_completion_length, lower train.grpo.temperature"),
        ("grpo", [4] * 99 + [900], "raise train.grpo.max_completion_length"),
        ("distill", [65], "set train.distill.max_completion_length to 65 or more"),
    ],
)
def test_remedy_of_truncated_responses_follows_from_the_references(objective, lengths, remedy):
    """A single long reference does not explain responses without an end."""
    samples = [SimpleNamespace(num_answer_tokens=length) for length in lengths]
    data = SimpleNamespace(stats=SimpleNamespace(sample_stats=samples))
    section = {"max_completion_length": 64}
    if objective == "distill":
        section["teacher"] = "finesight-tiny"
    recipe = {"model": "m", "data": {"train": "train.jsonl"}, "output_dir": "run"}
    recipe["train"] = {"objective": objective, objective: section}
    recipe["rewards"] = ["exact"] if objective == "grpo" else []
    found = suggest_completion_length(Recipe.model_validate(recipe), data)
    assert found.startswith(remedy)


@pytest.mark.parametrize("is_masked", [False, True])
def test_truncated_responses_are_named_before_rewards(tmp_path, is_masked):
    """The limit is below the references: warned before the first step, and named at the end."""
    task = TinyTask(tmp_path)
    task.recipe["rewards"] = ["exact"]
    grpo = {"num_generations": 2, "max_completion_length": 1, "max_refills": 0}
    grpo["mask_truncated_completions"] = is_masked
    task.recipe["train"] |= {"objective": "grpo", "grpo": grpo, "epochs": 1, "save_every": None}
    with pytest.raises(UserError) as raised:
        task.run()
    warning, _, _ = task.console_output.partition("step 1/")
    count = re.search(
        r"max_completion_length 1 is too small for 11 of 11 reference answers \(100%\),"
        r" which have up to (\d+) tokens: set it to (\d+) or more",
        " ".join(warning.split()),
    )
    assert count is not None
    assert count[1] == count[2]
    assert "22 of the first 22 responses are truncated" in task.console_output
    error = raised.value
    assert error.where == "train.grpo.max_completion_length"
    assert "100% of the responses were truncated" in error.what
    assert ("mask_truncated_completions" in error.what) == is_masked
    assert f"set train.grpo.max_completion_length to {count[1]} or more" in str(error.remedy)
    with pytest.raises(UserError, match="no responses") as refused:
        api.pairs(tmp_path / "run", tmp_path / "pairs.jsonl")
    assert "sample(" in str(refused.value.remedy)
    # With the proposed length, nothing is warned of.
    limit = f"train.grpo.max_completion_length={count[1]}"
    with contextlib.suppress(UserError):  # of equal rewards, which is another problem
        task.run(limit, "train.steps=1", "train.epochs=null", name="longer")
    assert "is too small" not in task.console_output


@pytest.mark.parametrize(
    ("recipe", "text"),
    [
        ({"rewards": []}, "requires rewards"),
        ({"rewards": ["exakt"]}, "'exact'"),
        ({"rewards": [{"name": "format", "pattern": "("}]}, "regular expression"),
        ({"rewards": ["format"]}, "requires pattern"),
        ({"rewards": [{"name": "exact", "pattern": "a"}]}, "does not use pattern"),
        ({"tune": {"language": "full"}, "train": {"grpo": {"beta": 0.1}}}, "adapter"),
        ({"train": {"objective": "sft"}}, "remedy: add it, or remove rewards"),
        ({"rewards": ["json.nothing"]}, "no score 'nothing'"),
        ({"rewards": ["rewards.py:score"]}, "rewards.py: no such file"),
    ],
)
def test_recipes_are_checked(tmp_path, recipe, text):
    task = TinyTask(tmp_path)
    base = {"rewards": ["exact"], "train": {}}
    merged = base | recipe
    train = task.recipe["train"] | {"objective": "grpo"} | merged.pop("train")
    with pytest.raises(UserError, match=text):
        task.run(**merged, train=train)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("fails", [False, True])
def test_step_of_several_updates_is_complete_or_repeated(reward_task, monkeypatch, fails):
    """A signal in its second update waits for its end; an error leaves no checkpoint of it."""
    two_updates = "train.grpo.num_iterations=2", "train.save_every=0"
    reward_task.run(*two_updates, name="expected")
    updates = []

    def disturb(state, *arguments, **options):
        updates.append(state.progress.step)
        if len(updates) == 4:
            if fails:
                raise DataWorkerError("killed", where="x", expected="y", remedy="z")
            state.run.stop.request(signal.SIGTERM)
        return train_step(state, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr("finesight.train.trainer.train_step", disturb)
        with pytest.raises(DataWorkerError if fails else TrainingInterrupted):
            reward_task.run(*two_updates)
    assert updates == [0, 0, 1, 1]
    run = reward_task.folder / "run"
    checkpoints = sorted(path.name for path in run.glob("checkpoints/*"))
    assert checkpoints == ([] if fails else ["step-2"])
    reward_task.run(*two_updates, resume=True)
    assert_same_run(run, reward_task.folder / "expected")


def test_memory_error_after_an_update_does_not_repeat_the_step(reward_task, monkeypatch):
    updates = []

    def fill_memory(state, *arguments, **options):
        updates.append(state.progress.step)
        if len(updates) == 2:
            budget = state.progress.budget
            error = GpuOutOfMemoryError("full", where="x", expected="y", remedy="z")
            error.next_budget = budget
            raise error
        return train_step(state, *arguments, **options)

    monkeypatch.setattr("finesight.train.trainer.train_step", fill_memory)
    with pytest.raises(GpuOutOfMemoryError):
        reward_task.run("train.grpo.num_iterations=2")
    assert updates == [0, 0]
