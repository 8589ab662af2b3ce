"""Fixtures for the tests of training."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from case_files import load_cases
from preference_task import labeled_task as labeled_task
from preference_task import pair_task as pair_task
from tiny_task import assets as assets
from tiny_task import task as task
from torch import Tensor


@pytest.fixture(scope="session")
def assert_matches_trl() -> Callable[..., None]:
    """Compare a loss and its gradient with values that TRL has computed of the same numbers."""
    references = load_cases("trl_losses")

    def compare(name: str, loss: Tensor, x: Tensor, tolerance: float = 1e-9) -> None:
        (gradient,) = torch.autograd.grad(loss, x)
        flat = gradient.flatten().numpy()
        vectors = np.random.RandomState(7).standard_normal((3, flat.size))
        found = [loss.item(), *(vectors @ flat), np.linalg.norm(flat)]
        np.testing.assert_allclose(found, references[name], rtol=0, atol=tolerance)

    return compare
