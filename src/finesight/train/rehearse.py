"""What a run's kernels are compiled for is known before its first step: where none is there yet,
all of them at once."""

from __future__ import annotations

import logging

import torch

from finesight.model.frozen import KERNELS
from finesight.model.network import VisionLanguageModel
from finesight.train.prepare import Session

if KERNELS:
    from finesight.model.kernels.together import compiled_together, nothing_compiled


def rehearse(session: Session) -> None:
    """On a machine that has no kernel of Triton's yet, take the next pack through the model and
    back, so that they are compiled: they compute nothing meanwhile, and nothing is learned.
    Whatever goes wrong here is no reason to end a run: what is wrong with the pack or the device
    shows in the step that learns it."""
    device = session.machine.device
    native = isinstance(session.model, VisionLanguageModel)
    if not (KERNELS and device.type == "cuda" and native) or session.parallel.sharded:
        return
    if not nothing_compiled() or session.progress.step == len(session.course):
        return
    try:
        packs = session.data.step(session.progress.step).packs
        # One that all processes share would wait for the others. One alone has other kernels.
        own = [packed for packed in packs if packed.share is None]
        ways = {packed.beginning > 0: packed for packed in own}
        for packed in ways.values():
            with torch.random.fork_rng([device]), compiled_together(device):
                session.passes.rehearse(session.placed(packed))
    except Exception as error:
        logging.getLogger(__name__).debug("kernels were not compiled beforehand: %s", error)
    finally:
        session.masters.forget_gradients()
