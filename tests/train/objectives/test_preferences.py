"""Preference tuning: losses compared with TRL, and runs on preference pairs."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from preference_task import LONG_RUN, load_train_data
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
from finesight.encode.tokenization import format_token_table
from finesight.errors import UserError
from finesight.objective_components import SampleKind, suggest_objectives
from finesight.report.data_pages import render_sample_page
from finesight.report.run_page import render_run_page
from finesight.train.cuda_graphs import CudaGraphRunner
from finesight.train.objectives import dpo, orpo, simpo
from finesight.train.objectives.dpo.loss import compute_pair_losses
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


DPO = "train.objective=dpo", "train.dpo.beta=0.5"


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


@pytest.mark.parametrize(("objective", "learning_rate"), [("orpo", 0.003), ("simpo", 0.002)])
def test_runs_without_reference_model_raise_reward_accuracy(pair_task, objective, learning_rate):
    options = f"train.objective={objective}", f"train.learning_rate={learning_rate}"
    result = pair_task.run(*options, *LONG_RUN, name=objective)
    assert result.after.loss_metrics["rewards/accuracies"] == 1
    assert result.after.validation_loss < result.before.validation_loss
    assert not (pair_task.folder / objective / REFERENCE_FILE).exists()


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


def test_shown_sample_names_its_label(labeled_task, monkeypatch, capsys):
    monkeypatch.chdir(labeled_task.folder)
    write_recipe(labeled_task.folder / "recipe.yaml", {**labeled_task.recipe, "output_dir": "r"})
    assert run_command(["show", "recipe.yaml", "--num-samples", "3"]) == 0
    assert re.findall(r"^label: (\w+)$", capsys.readouterr().out, re.MULTILINE) == ["true", "false"]
    roles = [list_shown_roles(labeled_task, index)[-1] for index in range(2)]
    assert roles == ["assistant", "rejected"]


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


def test_labels_need_an_objective(labeled_task):
    objective: str | None
    kind: SampleKind
    for objective, kind in ((None, "label true"), ("sft", "label false"), ("dpo", "label true")):
        options = [] if objective is None else [f"train.objective={objective}"]
        with pytest.raises(UserError, match=kind) as caught:
            labeled_task.run(*options, name="refused")
        assert caught.value.remedy == suggest_objectives(objective, kind)


def test_settings_are_checked():
    for settings in ({"loss_weights": [1, 2]}, {"label_smoothing": 0.1}, {"loss_type": []}):
        with pytest.raises(ValueError, match="loss"):
            dpo.Settings.model_validate(settings)
