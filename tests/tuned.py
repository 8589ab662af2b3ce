"""Random adapters on small models, and their files changed on purpose."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from oracle import config, native, reference
from safetensors.torch import load_file, save_file
from torch import nn

from finesight.config import Tune
from finesight.model.adapter import CONFIG, WEIGHTS, write_adapter
from finesight.model.lora import adapters, hub_name
from finesight.model.network import VisionLanguageModel
from finesight.model.parts import apply_tuning

FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
LORA = {"rank": 4, "alpha": 6, "dropout": 0.1}
TUNES: dict[str, dict[str, Any]] = {
    "language": {"language": "lora", "lora": LORA},
    "all parts": {"language": "lora", "vision": "lora", "merger": "lora", "lora": LORA},
    "some targets": {"language": "lora", "lora": LORA | {"targets": ["gate_proj", "v_proj"]}},
    "merger, tower frozen": {"language": "frozen", "merger": "lora", "lora": LORA},
}


@torch.no_grad()
def randomise(parameters: Iterable[nn.Parameter]) -> None:
    """B is not zero, so that a lost one shows."""
    generator = torch.Generator().manual_seed(5)
    for parameter in parameters:
        parameter.normal_(0.0, 0.1, generator=generator)


def tuned(model: VisionLanguageModel, tune: dict[str, Any]) -> VisionLanguageModel:
    """The model with random adapters, evaluating."""
    apply_tuning(model, Tune.model_validate(tune), seed=0)
    randomise(factor for _, _, adapter in adapters(model) for factor in adapter.parameters())
    return model.eval()


@torch.no_grad()
def put(model: VisionLanguageModel, seed: int, tune: dict[str, Any]) -> VisionLanguageModel:
    """Install an adapter of random numbers, large enough to change the answers."""
    apply_tuning(model, Tune.model_validate(tune), seed=0)
    generator = torch.Generator().manual_seed(seed)
    for _, _, adapter in adapters(model):
        for factor in adapter.parameters():
            factor.normal_(0.0, 0.3, generator=generator)
    return model.eval()


def adapted(model: VisionLanguageModel) -> set[str]:
    """The layers that carry an adapter."""
    return {hub_name(path, output) for path, _, a in adapters(model) for output in a.layers}


def written(folder: Path, family: str = "qwen2_vl", how: str = "language") -> Path:
    """A random adapter of the small model as files."""
    model = native(config(family), reference(config(family)))
    write_adapter(folder, tuned(model, TUNES[how]), base="some/base")
    return folder


def renamed(folder: Path, change: Callable[[str], str]) -> Path:
    """The adapter's keys changed; those that `change` makes empty are left out."""
    tensors = {change(key): tensor for key, tensor in load_file(folder / WEIGHTS).items()}
    tensors.pop("", None)
    save_file(tensors, folder / WEIGHTS)
    return folder


def reconfigured(folder: Path, **settings: Any) -> Path:
    """The adapter's configuration with other settings."""
    content = json.loads((folder / CONFIG).read_text()) | settings
    (folder / CONFIG).write_text(json.dumps(content))
    return folder


def old_name(key: str) -> str:
    """As peft wrote it on transformers 4."""
    return key.replace(".model.language_model.", ".model.").replace(".model.visual.", ".visual.")
