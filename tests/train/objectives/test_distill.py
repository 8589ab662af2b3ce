"""Distillation: the divergence compared with TRL, and runs with a teacher."""

import math

import numpy as np
import pytest
import torch
from tiny_model import create_tiny_model
from tiny_task import TinyTask, assert_same_run

from finesight.errors import UserError
from finesight.train.objectives.distill import Settings
from finesight.train.objectives.distill.loss import compute_divergence, generalized_jsd


@pytest.mark.parametrize("beta", [0, 0.1, 0.5, 1])
@pytest.mark.parametrize("temperature", [1, 0.7])
def test_divergence_and_gradients_match_trl(beta, temperature, assert_matches_trl):
    rng = np.random.RandomState(0)
    logits_CV, teacher_CV = (torch.from_numpy(rng.standard_normal((5, 11))) for _ in range(2))
    settings = Settings(beta=beta, temperature=temperature)
    loss = generalized_jsd(settings, logits_CV.requires_grad_(), teacher_CV).mean()
    assert_matches_trl(f"distill {beta} {temperature}", loss, logits_CV)


def test_divergence_of_the_most_probable_tokens():
    """The third token is not among the teacher's two most probable ones."""
    own, other = (torch.tensor([[p, 1 - p, 1e-4]]).log() for p in (0.2, 0.6))
    found = generalized_jsd(Settings(beta=0, top_k=2), own, other).item()
    assert found == pytest.approx(0.6 * math.log(0.6 / 0.2) + 0.4 * math.log(0.4 / 0.8))


@pytest.mark.parametrize("max_bytes", [1, 4 * 11 * 3, 1 << 28])
def test_chunks_and_rows_beyond_the_vocabulary_do_not_change_the_divergence(monkeypatch, max_bytes):
    monkeypatch.setattr("finesight.train.token_logps.MAX_LOGITS_BYTES", max_bytes)
    torch.manual_seed(0)
    h_LD, head_VD = torch.randn(7, 8).double().requires_grad_(), torch.randn(11, 8).double()
    other_LE, head_VE = torch.randn(7, 5).double(), torch.randn(13, 5).double()
    settings = Settings()
    found = compute_divergence(settings, h_LD, head_VD, other_LE, head_VE)
    expected = generalized_jsd(settings, h_LD @ head_VD.T, other_LE @ head_VE[:11].T)
    torch.testing.assert_close(found, expected)
    grads = [torch.autograd.grad(x.sum(), h_LD)[0] for x in (found, expected)]
    torch.testing.assert_close(*grads)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> TinyTask:
    """Task whose teacher is a fine-tuned run of the same model."""
    task = TinyTask(tmp_path_factory.mktemp("task"))
    task.run(*LONG_RUN, name="teacher")
    return task


LONG_RUN = "train.learning_rate=0.003", "train.epochs=12", "train.save_every=null"


def options(task: TinyTask, *more: str) -> tuple[str, ...]:
    teacher = f"train.distill.teacher={task.folder / 'teacher'}"
    limits = "train.distill.max_completion_length=6", "train.distill.lmbda=0.5"
    return "train.objective=distill", teacher, *limits, *more


def test_student_approaches_its_teacher(task):
    """Half of the samples have answers of the student; validation is on the answers of the data."""
    result = task.run(*options(task, *LONG_RUN), name="student")
    assert result.after.validation_loss < 0.3 * result.before.validation_loss
    lines = [line for line in task.read_metrics("student") if "loss" in line]
    lengths = [x for line in lines if (x := line.get("completions/mean_length"))]
    assert len(lengths) > len(lines) / 2
    assert max(lengths) <= 6
    off_policy = task.run(*options(task, "train.distill.lmbda=0", "train.epochs=1"), name="off")
    assert off_policy.after.validation_loss < off_policy.before.validation_loss
    assert not any("rollout_s" in line for line in task.read_metrics("off"))


def test_resumed_run_equals_uninterrupted_run(task):
    run = task.rewind_to_checkpoint(*options(task))
    task.run(*options(task), resume=True)
    assert_same_run(run, task.folder / "whole")


def test_teacher_with_other_tokens_is_rejected(task):
    other = create_tiny_model(task.folder / "other", "qwen3_vl")
    with pytest.raises(UserError, match="another family") as caught:
        task.run(*options(task, f"train.distill.teacher={other}"), name="refused")
    assert caught.value.where == "train.distill.teacher"
    with pytest.raises(UserError, match=r"set train\.distill\.teacher"):
        task.run("train.objective=distill", name="refused")
