"""Preference tuning: losses compared with TRL, and runs on preference pairs."""

import itertools
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.numpy import load_file
from tiny_task import (
    TinyTask,
    assert_same_run,
    edit_samples,
    read_losses,
    rewind_to_checkpoint,
    write_recipe,
)

from finesight.cli.app import run_command
from finesight.config import DataSettings
from finesight.data.corpus import Corpus, load_corpus
from finesight.encode.renderer import NativeRenderer
from finesight.encode.tokenization import format_token_table
from finesight.errors import UserError
from finesight.model_folder import ModelFolder
from finesight.plan.run_plan import plan_run
from finesight.progress import ProgressConsole
from finesight.recipe import recipe_from_dict
from finesight.report.data_pages import render_sample_page
from finesight.report.run_page import render_run_page
from finesight.train.cuda_graphs import CudaGraphRunner
from finesight.train.dataset_stats import MismatchedCorpus
from finesight.train.objectives import dpo, kto, orpo, simpo
from finesight.train.objectives.dpo.loss import compute_pair_losses
from finesight.train.objectives.kto.loss import KtoObjective, compute_kto_losses
from finesight.train.objectives.orpo.loss import compute_odds_losses
from finesight.train.objectives.response_objective import REFERENCE_FILE, PairObjective
from finesight.train.objectives.simpo.loss import compute_margin_losses
from finesight.train.token_logps import compute_token_logps

LOSS_TYPES = "sigmoid", "hinge", "ipo", "robust", "apo_zero", "apo_down", "sft"


@pytest.mark.parametrize(
    "loss_type", [*LOSS_TYPES, ["sigmoid", "sft"], ["robust", "ipo", "apo_zero"]]
)
def test_losses_and_gradients_match_trl(loss_type, assert_matches_trl):
    """The `sft` loss of TRL is a mean over the tokens of a batch: here, all are of equal length."""
    rng = np.random.RandomState(0)
    logps_RT = torch.from_numpy(-rng.rand(10, 9)).requires_grad_()
    lengths_R1 = torch.from_numpy(rng.randint(1, 9, (10, 1)))
    reference_2N = torch.from_numpy(-5 * rng.rand(2, 5))
    lengths_R1 = torch.full_like(lengths_R1, 9) if "sft" in loss_type else lengths_R1
    logps_2N = (logps_RT * (torch.arange(9) < lengths_R1)).sum(1).view(2, 5)
    weights = [0.3 + n for n in range(len(loss_type))] if isinstance(loss_type, list) else [1]
    settings = {"loss_type": loss_type, "loss_weights": weights, "beta": 0.2}
    if "robust" in loss_type:
        settings["label_smoothing"] = 0.1
    settings = dpo.Settings.model_validate(settings)
    losses_N = compute_pair_losses(settings, logps_2N, reference_2N, lengths_R1.view(2, 5))
    assert_matches_trl(f"dpo {loss_type}", losses_N.mean(), logps_RT)


def test_mean_losses_and_gradients_match_trl(assert_matches_trl):
    """TRL computes ORPO in fp32. Its likelihood term, which includes the prompt, is left out."""
    means_2N = torch.from_numpy(-np.random.RandomState(0).rand(2, 5) - 1e-3).requires_grad_()
    losses_N = compute_odds_losses(orpo.Settings(beta=0.2), means_2N)
    assert_matches_trl("orpo", losses_N.sum(), means_2N, 2e-6)
    losses_N = compute_margin_losses(simpo.Settings(beta=2.5, simpo_gamma=0.7), means_2N)
    assert_matches_trl("simpo", losses_N.sum(), means_2N, 1e-9)


@pytest.mark.parametrize("max_bytes", [1, 4 * 101 * 5, 1 << 28])
def test_token_logps_and_gradients_match_log_softmax(monkeypatch, max_bytes):
    monkeypatch.setattr("finesight.train.token_logps.MAX_LOGITS_BYTES", max_bytes)
    torch.manual_seed(0)
    h_LD, head_VD = (
        torch.randn(rows, 16, dtype=torch.float64).requires_grad_() for rows in (9, 101)
    )
    labels_L = torch.randint(101, (7,))
    found = compute_token_logps(h_LD, head_VD, labels_L)
    expected = (h_LD[:7] @ head_VD.T).log_softmax(1).gather(1, labels_L[:, None])[:, 0]
    weights = torch.rand(7, dtype=torch.float64)
    torch.testing.assert_close(found, expected)
    for one in (h_LD, head_VD):
        grads = (
            torch.autograd.grad((x * weights).sum(), one, retain_graph=True)[0]
            for x in (found, expected)
        )
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_kto_losses_and_gradients_match_trl(loss_type, assert_matches_trl):
    rng = np.random.RandomState(0)
    logps_RT = torch.from_numpy(-rng.rand(4, 9)).requires_grad_()
    reference_R, mismatched_2R = (torch.from_numpy(-9 * rng.rand(*s)) for s in ((4,), (2, 4)))
    baseline = (mismatched_2R[0] - mismatched_2R[1]).mean().clamp(min=0)
    assert baseline > 0
    baseline = baseline if loss_type == "kto" else torch.zeros(())
    settings = kto.Settings(
        loss_type=loss_type, beta=0.2, desirable_weight=1.5, undesirable_weight=0.7
    )
    ratios_R = logps_RT.sum(1) - reference_R
    losses_2R = compute_kto_losses(settings, ratios_R.expand(2, -1), baseline)
    desirable_R = torch.tensor([True, False, True, True])
    loss = losses_2R[0].where(desirable_R, losses_2R[1]).mean()
    assert_matches_trl(loss_type, loss, logps_RT)


def add_preferences(task: TinyTask, labels: tuple[bool | None, ...] = (None,)) -> None:
    """Add a rejected answer to each sample, another color, or a label and the answer it has.

    Args:
        labels: Labels of successive samples; None for a pair.
    """
    colors = ["red", "green", "light blue", "white", "red"]
    for split in ("train", "eval"):
        with edit_samples(task.folder / f"{split}.jsonl") as samples:
            for sample, label in zip(samples, itertools.cycle(labels), strict=False):
                chosen = sample["messages"][-1]["content"]
                rejected = colors[colors.index(chosen) + 1]
                if label is None:
                    sample["rejected"] = rejected
                    continue
                sample["label"] = label
                sample["messages"][-1]["content"] = chosen if label else rejected


@pytest.fixture
def pair_task(tmp_path) -> TinyTask:
    task = TinyTask(tmp_path)
    add_preferences(task)
    return task


@pytest.fixture
def kto_task(tmp_path) -> TinyTask:
    task = TinyTask(tmp_path)
    add_preferences(task, (True, False, None))
    return task


KTO = "train.objective=kto", "train.kto.beta=0.5"
DPO = "train.objective=dpo", "train.dpo.beta=0.5"
LONG_RUN = "train.epochs=8", "train.save_every=null"


def test_run_raises_reward_accuracy_of_validation_pairs(pair_task):
    """The reference equals the model before the first step, so that the loss is log 2."""
    result = pair_task.run(*DPO, *LONG_RUN, "train.learning_rate=0.003")
    first, *_ = (line for line in pair_task.read_metrics() if "loss" in line)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)
    before, after = result.before.loss_metrics, result.after.loss_metrics
    assert before["rewards/accuracies"] <= 0.5
    assert after["rewards/accuracies"] == 1
    assert after["rewards/margins"] > 0.5
    assert result.before.validation_loss == pytest.approx(math.log(2), abs=1e-5)
    assert result.after.validation_loss < 0.5
    tensors = load_file(pair_task.folder / "run" / REFERENCE_FILE)
    assert {name: len(table) for name, table in tensors.items()} == {"train": 11, "eval": 3}
    page = render_run_page(pair_task.folder / "run")
    assert "reward margin" in page
    assert "mean over pairs" in page


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_kto_separates_desirable_and_undesirable_answers(kto_task, loss_type):
    """Labels and pairs count; the reference equals the model before the first step."""
    options = f"train.kto.loss_type={loss_type}", "train.learning_rate=0.003"
    result = kto_task.run(*KTO, *LONG_RUN, *options, name=loss_type)
    first, *_, last = (line for line in kto_task.read_metrics(loss_type) if "loss" in line)
    assert first["loss"] == pytest.approx(0.5, abs=1e-5)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert ("kl" in last) == (loss_type == "kto")
    assert last.get("kl", 0) >= 0
    assert result.after.loss_metrics["rewards/margins"] > 0.5
    assert result.after.validation_loss < 0.4 < result.before.validation_loss
    tensors = load_file(kto_task.folder / loss_type / REFERENCE_FILE)
    has_mismatched = loss_type == "kto"
    given = {int(row[0]): (~np.isnan(row[1:])).tolist() for row in tensors["train"]}
    assert [given[index] for index in range(3)] == [
        [True, False, has_mismatched],
        [False, True, has_mismatched],
        [True, True, has_mismatched],
    ]


def test_mismatched_answers_are_to_another_question(kto_task):
    """A bad sample neither removes nor breaks the valid one that gets its answer."""
    path = kto_task.folder / "train.jsonl"
    answers = [*"abcd", "e", "f", "g " * 200, [{"type": "box", "xyxy": [5, 5, 800, 500]}]]
    with edit_samples(path) as samples:
        asked = [samples[n // 4]["messages"][0] for n in range(8)]
        samples[:] = [
            {"id": f"{n}", "label": True, "messages": [asked[n], {"role": "assistant"} | turn]}
            for n, turn in enumerate({"content": answer} for answer in answers)
        ]
        for n, name in ((4, "missing.png"), (7, "large.png")):
            image = {"type": "image", "image": name}
            samples[n]["messages"][0] = {"role": "user", "content": [image]}
    Image.new("RGB", (840, 560)).save(kto_task.folder / "large.png")
    options = "train.epochs=null", "train.steps=1", "train.batch_size=6", "data.max_length=100"
    kto_task.run(*KTO, *options)
    table = load_file(kto_task.folder / "run" / REFERENCE_FILE)["train"]
    assert table[:, 0].tolist() == [0, 1, 2, 3, 5, 7]
    assert not np.isnan(table[:, 3]).any()
    with edit_samples(path) as samples:
        del samples[5]["label"]
        samples[5]["messages"] *= 2
        samples[5]["messages"][-1] = samples[5]["messages"][-1] | {"loss": False}
    corpus, _ = load_train_data(kto_task)
    corpus = MismatchedCorpus(corpus.sources, corpus.weights, corpus.fingerprint)
    found = [corpus.read_validated(index).mismatched for index in range(6)]
    expected = [4, 6, 6, 7, 0, 1]  # the loss of answer 5 is false
    assert found == [corpus[index].sample.messages[-1] for index in expected]


def test_kto_baseline_is_the_divergence_of_mismatched_answers(kto_task, monkeypatch):
    """All packs of a step use the mean of the forward pass before, also in a resumed run."""
    baselines, compute = [], KtoObjective.compute_loss

    def compute_loss(self, h_LD, head_VD, inputs):
        values = compute(self, h_LD, head_VD, inputs)
        baselines.append((torch.is_grad_enabled(), inputs["baseline"].item(), values[-1].item()))
        return values

    options = *KTO, "train.batch_size=3", "train.steps=6", "train.epochs=null"
    monkeypatch.setattr(KtoObjective, "compute_loss", compute_loss)
    run = kto_task.rewind_to_checkpoint(*options)
    train = [(x, y) for has_grad, x, y in baselines if has_grad]
    measured = max(sum(y for _, y in train[-3:]), 0)
    assert measured > 0
    assert train[-1][0] == pytest.approx(measured, abs=1e-6)
    assert len({x for x, _ in train[-3:]}) == 1
    kto_task.run(*options, resume=True)
    assert_same_run(run, kto_task.folder / "whole")


@pytest.mark.parametrize(("objective", "learning_rate"), [("orpo", 0.003), ("simpo", 0.002)])
def test_runs_without_reference_model_raise_reward_accuracy(pair_task, objective, learning_rate):
    options = f"train.objective={objective}", f"train.learning_rate={learning_rate}"
    result = pair_task.run(*options, *LONG_RUN, name=objective)
    assert result.after.loss_metrics["rewards/accuracies"] == 1
    assert result.after.validation_loss < result.before.validation_loss
    assert not (pair_task.folder / objective / REFERENCE_FILE).exists()


def load_train_data(task: TinyTask) -> tuple[Corpus, NativeRenderer]:
    corpus = load_corpus(DataSettings.model_validate(task.recipe["data"]).train)
    return corpus, NativeRenderer(ModelFolder(task.folder / "tiny"))


def test_shown_pair_separates_both_answers(pair_task):
    corpus, renderer = load_train_data(pair_task)
    tokenized = renderer.tokenize(corpus[0])
    _, summary, *_ = format_token_table(tokenized, renderer.tokenizer)
    assert summary.endswith(f"rejected answer from {tokenized.response_starts[1]}")
    assert list_shown_roles(pair_task, 0)[-2:] == ["assistant", "rejected"]


def list_shown_roles(task: TinyTask, index: int) -> list[str]:
    corpus, renderer = load_train_data(task)
    page = render_sample_page(renderer, [corpus[index]], "Data", lambda _: None, lambda *_: None)
    return re.findall(r'"role":"(\w+)"', page)


def test_shown_sample_names_its_label(kto_task, monkeypatch, capsys):
    monkeypatch.chdir(kto_task.folder)
    write_recipe(kto_task.folder / "recipe.yaml", {**kto_task.recipe, "output_dir": "r"})
    assert run_command(["show", "recipe.yaml", "--num-samples", "3"]) == 0
    assert re.findall(r"^label: (\w+)$", capsys.readouterr().out, re.MULTILINE) == ["true", "false"]
    roles = [list_shown_roles(kto_task, index)[-1] for index in range(2)]
    assert roles == ["assistant", "rejected"]


def test_planned_step_of_kto_includes_the_baseline(kto_task):
    """The step runs one more forward pass than without a baseline, over the same packs."""
    steps = []
    for loss_type in ("kto", "apo_zero_unpaired"):
        recipe = kto_task.recipe | {"output_dir": str(kto_task.folder / "run")}
        recipe = recipe_from_dict(recipe, [*KTO, f"train.kto.loss_type={loss_type}"])
        plan = plan_run(recipe, "A10", ProgressConsole(Console(quiet=True)))
        steps.append(plan.recipe_estimate.step_time.host_s)
    assert steps[0] == pytest.approx(4 / 3 * steps[1])


def test_planned_start_includes_the_reference_model(pair_task):
    """The reference pass is a third of the training steps of an epoch, and of validation."""
    console = ProgressConsole(Console(quiet=True))
    plans = [
        plan_run(
            recipe_from_dict({**pair_task.recipe, "output_dir": "r"}, overrides), None, console
        )
        for overrides in (["train.objective=sft"], [*DPO])
    ]
    added_s = plans[1].startup_s - plans[0].startup_s
    step_s = plans[1].chosen_estimate.step_time.total
    assert added_s > plans[1].total_steps / pair_task.recipe["train"]["epochs"] * step_s / 3 * 0.9


def test_reference_pass_continues_after_the_memory_was_full(pair_task, monkeypatch):
    compute, losses = PairObjective.compute_loss, []

    def compute_loss(*args):
        losses.append(None)
        if len(losses) == 3:
            raise torch.OutOfMemoryError("full")
        return compute(*args)

    monkeypatch.setattr(PairObjective, "compute_loss", compute_loss)
    monkeypatch.setattr(CudaGraphRunner, "release_graphs", lambda _: len(losses) == 3)
    pair_task.run(*DPO, "train.steps=1", "train.epochs=null")
    tensors = load_file(pair_task.folder / "run" / REFERENCE_FILE)
    assert [len(set(tensors[split][:, 0])) for split in ("train", "eval")] == [4, 3]
    assert [len(tensors[split]) for split in ("train", "eval")] == [4, 3]


def test_resumed_run_equals_uninterrupted_run(pair_task):
    run = pair_task.rewind_to_checkpoint(*DPO)
    pair_task.run(*DPO, resume=True)
    assert_same_run(run, pair_task.folder / "whole")
    rewind_to_checkpoint(run)
    # Other weights of the same shapes would not fit the stored values.
    weights = Path(pair_task.recipe["model"]) / "model.safetensors"
    content = weights.read_bytes()
    (weights.parent / "sha256.json").unlink()
    half = len(content) // 2
    weights.write_bytes(content[:half] + content[half:][::-1])
    with pytest.raises(UserError, match="model weights is"):
        pair_task.run(*DPO, resume=True)
    weights.write_bytes(content)
    (run / REFERENCE_FILE).write_bytes(b"damaged")
    with pytest.raises(UserError, match="reference model cannot be read"):
        pair_task.run(*DPO, resume=True)


def test_checkpointing_and_vision_cache_do_not_change_results(pair_task):
    common = "tune.merger=frozen", "train.steps=3", "train.epochs=null", "train.save_every=null"
    losses = []
    for name in ("plain", "activation_checkpointing=true", "vision_cache=memory"):
        overrides = () if name == "plain" else (f"train.{name}",)
        pair_task.run(*DPO, *common, *overrides, name=name)
        losses.append([line["loss"] for line in pair_task.read_metrics(name) if "loss" in line])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[2] == pytest.approx(losses[0], rel=1e-4)


def test_rejected_answers_need_an_objective(pair_task):
    with pytest.raises(UserError, match="rejected answer") as caught:
        pair_task.run()
    assert "train.objective=dpo" in caught.value.remedy
    pair_task.run("train.objective=sft", name="chosen")
    for split in ("train", "eval"):
        with edit_samples(pair_task.folder / f"{split}.jsonl") as samples:
            for sample in samples:
                del sample["rejected"]
    pair_task.run(name="plain")
    assert read_losses(pair_task.folder / "plain") == read_losses(pair_task.folder / "chosen")
    with pytest.raises(UserError, match="no rejected answer"):
        pair_task.run(*DPO, name="dpo")


def test_labels_need_an_objective(kto_task):
    for options, what in (
        ((), "label true"),
        (("train.objective=sft",), "label false"),
        (DPO, "label true"),
    ):
        with pytest.raises(UserError, match=what) as caught:
            kto_task.run(*options, name="refused")
        assert "objective=kto" in caught.value.remedy


def test_settings_are_checked():
    for settings in ({"loss_weights": [1, 2]}, {"label_smoothing": 0.1}, {"loss_type": []}):
        with pytest.raises(ValueError, match="loss"):
            dpo.Settings.model_validate(settings)
