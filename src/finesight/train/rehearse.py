"""What a run's kernels are compiled for is known before its first step: where none is there yet,
all of them at once."""

from __future__ import annotations

import torch

from finesight.errors import UserError
from finesight.model.frozen import KERNELS
from finesight.model.network import VisionLanguageModel
from finesight.train.loss import label_loss
from finesight.train.prepare import Session

if KERNELS:
    from finesight.model.kernels.together import compiled_together, nothing_compiled


def rehearse(session: Session) -> None:
    """On a machine that has no kernel of Triton's yet, take the next pack through the model and
    back, so that they are compiled: they compute nothing meanwhile, and nothing is learned. What is
    wrong with the pack or the device shows in the step that learns it."""
    model, device = session.model, session.machine.device
    if not (KERNELS and device.type == "cuda" and isinstance(model, VisionLanguageModel)):
        return
    if nothing_compiled() and session.progress.step < len(session.course):
        with torch.random.fork_rng([device]):
            _learn_nothing(session, model)


def _learn_nothing(session: Session, model: VisionLanguageModel) -> None:
    device = session.machine.device
    share = torch.zeros((), device=device)
    try:
        for packed in session.data.step(session.progress.step).packs[:1]:
            batch = session.placed(packed)
            with compiled_together(device):
                loss = label_loss(model(batch), model.head_weight, batch.target_L, share)
                loss.backward()  # type: ignore[no-untyped-call]
    except (UserError, torch.OutOfMemoryError):
        pass
    finally:
        session.masters.forget_gradients()
