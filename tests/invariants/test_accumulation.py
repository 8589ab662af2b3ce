"""How a step's samples are shared out to packs does not matter: 1x8 = 2x4 = 8x1."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny_task import make_task, write_recipe
from torch import Tensor

from finesight.progress import ProgressConsole
from finesight.settings.recipe import load_recipe
from finesight.train.run_dir import RunDir
from finesight.train.setup import build_state
from finesight.train.state import TrainState
from finesight.train.step import train_step
from finesight.train.step_batch import StepBatch

FULL_FINETUNE = {"vision": "full", "merger": "full", "language": "full", "embeddings": "full"}
LORA = {"language": "lora", "lora": {"rank": 4, "dropout": 0.0}}


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return make_task(tmp_path_factory.mktemp("task"), num_samples=16)


def make_train_state(
    task: dict[str, Any], folder: Path, tune: dict[str, Any], budget: int
) -> TrainState:
    recipe = task | {"tune": tune, "output_dir": str(folder / "run")}
    path = write_recipe(folder / f"{budget}.yaml", recipe, batch_size=8, pack_tokens=budget)
    screen = ProgressConsole(Console(file=sys.stderr))
    return build_state(load_recipe(path), RunDir(folder / "run"), screen, resume=False)


def gradients(session: TrainState, step: StepBatch) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of a step: ten times AdamW's first moments after it."""
    loss, _ = train_step(session, step).wait()
    moments = session.engine.optimizer.optimizer_state()
    return loss, {
        name: 10 * moment for name, moment in moments.items() if name.startswith("exp_avg.")
    }


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Of the Euclidean norm: the largest rounding of many thousand numbers is a matter of luck."""
    return float((found - expected).norm() / expected.norm())


def end_to_end(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradients[name].flatten() for name in sorted(gradients)])


def gradients_of_packings(
    task: dict[str, Any], folder: Path, tune: dict[str, Any], *, double: bool = False, **train: Any
) -> dict[int, tuple[float, dict[str, Tensor]]]:
    found = {}
    for packs, budget in ((8, 1), (2, 230), (1, 8192)):
        changed = task | {"train": task["train"] | train}
        session = make_train_state(changed, folder, tune, budget)
        if double:
            session.engine.model.double()
        step = session.engine.step_dataset.get_step(0)
        assert len(step.packs) == packs
        found[packs] = gradients(session, step)
    return found


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("tune", [FULL_FINETUNE, LORA], ids=["full", "lora"])
def test_loss_and_gradients_are_independent_of_packing(task, tmp_path, tune, seed):
    found = gradients_of_packings(task, tmp_path, tune, seed=seed)
    loss, expected = found.pop(1)
    assert max(gradient.abs().max().item() for gradient in expected.values()) > 1e-3
    for packs, (other_loss, other) in found.items():
        assert other_loss == pytest.approx(loss, rel=1e-6)
        assert relative_error(end_to_end(other), end_to_end(expected)) <= 1e-6, f"{packs} packs"


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_fp64_gradients_are_independent_of_packing(task, tmp_path, seed):
    """The model is in fp64, whose roundings hide nothing; a norm for clipping would be in fp32."""
    settings = {"seed": seed, "max_grad_norm": None}
    found = gradients_of_packings(task, tmp_path, FULL_FINETUNE, double=True, **settings)
    _, expected = found.pop(1)
    for packs, (_, other) in found.items():
        for name, gradient in expected.items():
            # Gradients are added up in fp32.
            assert relative_error(other[name], gradient) <= 3e-7, f"{name} in {packs} packs"


def test_loss_is_averaged_over_supervised_tokens(task, tmp_path):
    """Answers of different lengths: a mean of the packs' means would be another number."""
    session = make_train_state(task, tmp_path, LORA, 1)
    step = session.engine.step_dataset.get_step(0)
    assert len({batch.num_supervised_tokens for batch in step.packs}) > 1
    with torch.no_grad():
        each = []
        for batch in step.packs:
            logits_LV = session.engine.model.compute_logits(session.engine.model(batch))
            each.append(torch.nn.functional.cross_entropy(logits_LV, batch.labels_L))
    counts = torch.tensor([batch.num_supervised_tokens for batch in step.packs])
    losses = torch.stack(each)
    loss, _ = train_step(session, step).wait()
    assert loss == pytest.approx(((losses * counts).sum() / counts.sum()).item(), rel=1e-6)
    assert loss != pytest.approx(losses.mean().item(), rel=1e-6)
