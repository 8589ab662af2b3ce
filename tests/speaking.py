"""A service of the package's own model, beside a random adapter of it, and pictures for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tuned import TUNES, tuned

from finesight.hub import TINY
from finesight.infer.load import load_answerer, load_choice
from finesight.infer.service import Service
from finesight.model.adapter import write_adapter
from finesight.model.lora import adapters
from finesight.model.network import VisionLanguageModel
from finesight.synth.tasks import Task, of_kind


def random_adapter(folder: Path) -> Path:
    """An adapter of the package's model with random numbers: it says something else."""
    model = load_answerer(TINY, "cpu", "fp32").model
    assert isinstance(model, VisionLanguageModel), type(model)
    tuned(model, TUNES["all parts"])
    with torch.no_grad():
        for _, _, adapter in adapters(model):
            for factor in adapter.parameters():
                factor.mul_(5.0)
    folder.mkdir()
    write_adapter(folder, model, base=TINY)
    return folder


@contextmanager
def speaking(run_or_model: str) -> Iterator[Service]:
    """The model answering, for the length of the block."""
    service = Service(load_choice(run_or_model, (), "cpu", "fp32"), rows=8)
    try:
        yield service
    finally:
        service.close()


def shapes(folder: Path, number: int) -> tuple[Path, str]:
    """A picture of coloured shapes, and a question whose right answer is a box."""
    for index, drawn in of_kind(Task("scene"), 7, "find_shapes"):
        if index >= number:
            path = folder / f"shapes-{index}.png"
            drawn.picture.save(path)
            return path, "".join(part for part in drawn.question if isinstance(part, str))
    raise AssertionError(f"no picture from number {number} on")
