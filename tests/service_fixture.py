"""Inference service of the bundled model, with a random adapter and images."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_fixtures import TUNE_SETTINGS, tune_with_lora
from synthetic_tasks.tasks import SyntheticTask, iter_samples_of_kind

from finesight.infer.inference_service import InferenceService
from finesight.infer.model_loader import load_inference_model, load_multi_adapter_model
from finesight.model.lora.peft_io import save_adapter
from finesight.model.vlm import VisionLanguageModel
from finesight.model_folder import TINY_MODEL


def write_random_adapter(folder: Path) -> Path:
    """Write a random adapter of the bundled model, which changes its answers."""
    model = load_inference_model(TINY_MODEL, "cpu", "fp32").model
    assert isinstance(model, VisionLanguageModel), type(model)
    tune_with_lora(model, TUNE_SETTINGS["all parts"], std=0.5)
    folder.mkdir()
    save_adapter(folder, model, base_model=TINY_MODEL)
    return folder


@contextmanager
def run_service(run_or_model: str, encode_prompt: Any = None) -> Iterator[InferenceService]:
    """Run the service within the block."""
    model = load_multi_adapter_model(run_or_model, (), "cpu", "fp32")
    service = InferenceService(model, max_num_seqs=8, encode_prompt=encode_prompt)
    try:
        yield service
    finally:
        service.close()


def write_shape_image(folder: Path, seed: int) -> tuple[Path, str]:
    """Write an image of colored shapes. Returns a question whose answer is a box."""
    for index, drawn in iter_samples_of_kind(SyntheticTask("scene"), 7, "find_shapes"):
        if index >= seed:
            path = folder / f"shapes-{index}.png"
            drawn.image.save(path)
            return path, "".join(part for part in drawn.question if isinstance(part, str))
    raise AssertionError(f"no image from number {seed} on")
