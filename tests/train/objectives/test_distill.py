"""Distillation: the divergence compared with TRL, and runs with a teacher."""

import math

import pytest
import torch
from each_value import each
from rich.console import Console
from tiny_model import create_tiny_model
from tiny_task import TinyTask, assert_same_run, rewind_to_checkpoint

from finesight.config import DistillSettings
from finesight.errors import UserError
from finesight.plan.run_plan import plan_run
from finesight.progress import ProgressConsole
from finesight.recipe import recipe_from_dict
from finesight.train.objectives.distill import compute_divergence, generalized_jsd


@each("beta", [0, 0.1, 0.5, 1])
@each("temperature", [1, 0.7])
def test_divergence_and_gradients_match_trl(beta, temperature):
    module = pytest.importorskip("trl.experimental.gkd", reason="TRL is not installed")
    torch.manual_seed(0)
    logits_CV = torch.randn(5, 11, dtype=torch.float64).requires_grad_()
    teacher_CV = torch.randn(5, 11, dtype=torch.float64)
    settings = DistillSettings(beta=beta, temperature=temperature)
    loss = module.GKDTrainer.generalized_jsd_loss
    expected = loss(logits_CV, teacher_CV, beta=beta, temperature=temperature)
    found = generalized_jsd(settings, logits_CV, teacher_CV).mean()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    (found_grad,) = torch.autograd.grad(found, logits_CV)
    (expected_grad,) = torch.autograd.grad(expected, logits_CV)
    torch.testing.assert_close(found_grad, expected_grad, rtol=0, atol=1e-9)


def test_divergence_of_two_tokens_matches_formulas():
    student, teacher, mixture = (0.2, 0.8), (0.6, 0.4), (0.4, 0.6)

    def kl(p: tuple[float, float], q: tuple[float, float]) -> float:
        return sum(x * math.log(x / y) for x, y in zip(p, q, strict=True))

    own, other = (torch.tensor([one], dtype=torch.float64).log() for one in (student, teacher))
    for beta, expected in (
        (0, kl(teacher, student)),
        (1, kl(student, teacher)),
        (0.5, 0.5 * kl(teacher, mixture) + 0.5 * kl(student, mixture)),
    ):
        assert generalized_jsd(DistillSettings(beta=beta), own, other).item() == pytest.approx(
            expected
        )
    # The third token is not among the teacher's two most probable ones.
    wide = [torch.cat([x, torch.full((1, 1), -9.0)], 1) for x in (own, other)]
    found = generalized_jsd(DistillSettings(beta=0, top_k=2), *wide).item()
    assert found == pytest.approx(kl(teacher, student))


@each("max_bytes", [1, 4 * 11 * 3, 1 << 28])
def test_chunks_and_rows_beyond_the_vocabulary_do_not_change_the_divergence(monkeypatch, max_bytes):
    monkeypatch.setattr("finesight.train.objectives.dpo.MAX_LOGITS_BYTES", max_bytes)
    torch.manual_seed(0)
    h_LD, head_VD = torch.randn(7, 8).double().requires_grad_(), torch.randn(11, 8).double()
    other_LE, head_VE = torch.randn(7, 5).double(), torch.randn(13, 5).double()
    settings = DistillSettings()
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
    off_policy = task.run(*options(task, "train.distill.lmbda=0"), name="off")
    assert off_policy.after.validation_loss < off_policy.before.validation_loss
    assert not any("rollout_s" in line for line in task.read_metrics("off"))


def test_resumed_run_equals_uninterrupted_run(task):
    task.run(*options(task), name="expected")
    task.run(*options(task))
    run = rewind_to_checkpoint(task.folder / "run")
    task.run(*options(task), resume=True)
    assert_same_run(run, task.folder / "expected")


def test_plan_counts_the_teacher(task):
    """A teacher in 4 bits is smaller."""
    console, weights = ProgressConsole(Console(quiet=True)), []
    for overrides in (
        ("train.objective=sft",),
        options(task),
        options(task, "train.distill.weight_format=nf4"),
    ):
        overrides = *overrides, "train.precision=fp32"
        recipe = recipe_from_dict({**task.recipe, "output_dir": "r"}, overrides)
        weights.append(plan_run(recipe, None, console).chosen_estimate.peak.weights)
    assert 1.8 * weights[0] < weights[1] < 2.2 * weights[0]
    assert weights[0] < weights[2] < weights[1]


def test_teacher_with_other_tokens_is_rejected(task):
    other = create_tiny_model(task.folder / "other", "qwen3_vl")
    with pytest.raises(UserError, match="another family") as caught:
        task.run(*options(task, f"train.distill.teacher={other}"), name="refused")
    assert caught.value.where == "train.distill.teacher"
    with pytest.raises(UserError, match=r"set train\.distill\.teacher"):
        task.run("train.objective=distill", name="refused")
