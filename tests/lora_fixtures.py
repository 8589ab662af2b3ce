"""Random adapters of tiny models and modified adapter files."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from hf_reference import make_config, make_native_model, make_reference_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from finesight.files.storage import write_folder
from finesight.model.linear import FusedLinear, hub_name, iter_adapters
from finesight.model.lora import merge, peft_io
from finesight.model.trainable import configure_tuning
from finesight.model.vlm import VisionLanguageModel
from finesight.model.weights_io import DTYPES, load_model
from finesight.model_folder import ModelFolder
from finesight.settings.config import Precision, TuneSettings
from finesight.settings.manifest import Manifest

FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "qwen3_5_moe"]
LORA = {"rank": 4, "alpha": 6, "dropout": 0.1}
TUNE_SETTINGS: dict[str, dict[str, Any]] = {
    "language": {"language": "lora", "lora": LORA},
    "all parts": {"language": "lora", "vision": "lora", "merger": "lora", "lora": LORA},
    "some targets": {
        "language": "lora",
        "lora": LORA | {"target_modules": ["gate_proj", "v_proj"]},
    },
    "merger, vision encoder frozen": {"language": "frozen", "merger": "lora", "lora": LORA},
}


def get_tolerance(family: str) -> float:
    """Return the relative error of logits; linear attention amplifies rounding errors."""
    return 1e-4 if family.startswith("qwen3_5") else 1e-5


GROUP_WIDTHS = {"q_proj": 5, "k_proj": 3, "v_proj": 4}


def make_group(
    widths: dict[str, int] = GROUP_WIDTHS, inputs: int = 6, dtype: torch.dtype = torch.float32
) -> FusedLinear:
    """Return a frozen fused linear with random weights."""
    torch.manual_seed(0)
    group = FusedLinear(inputs, widths, bias=True).to(dtype)
    for parameter in group.parameters():
        nn.init.normal_(parameter)
    return group.requires_grad_(False)


def quantize_linear(
    group: FusedLinear, *types: type[Any], weight_OI: Tensor | None = None
) -> FusedLinear:
    weight_OI = group.weight.detach() if weight_OI is None else weight_OI
    weights, device = weight_OI.split(list(group.output_sizes.values())), group.weight.device
    group.set_quantized_weight(*types)
    group.weight.to(device)
    for matrix, dense_OI in zip(group.weight.matrices, weights, strict=True):
        (spec,) = matrix.tensor_specs()
        spec.load(dense_OI)
    return group


@torch.no_grad()
def randomize_parameters(
    parameters: Iterable[nn.Parameter], seed: int = 5, std: float = 0.1
) -> None:
    """Randomize factors; B is nonzero so that a missing B changes results."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.normal_(0.0, std, generator=generator)


def tune_with_lora(
    model: VisionLanguageModel, tune: dict[str, Any], seed: int = 5, std: float = 0.1
) -> VisionLanguageModel:
    """Add random adapters to the model and set evaluation mode."""
    configure_tuning(model, TuneSettings.model_validate(tune), seed=0)
    factors = [one for _, _, adapter in iter_adapters(model) for one in adapter.parameters()]
    randomize_parameters(factors, seed, std)
    return model.eval()


def install_random_adapter(
    model: VisionLanguageModel, seed: int, tune: dict[str, Any]
) -> VisionLanguageModel:
    """Install an adapter of random values, large enough to change generations."""
    return tune_with_lora(model, tune, seed, std=0.3)


def list_adapted_layers(model: VisionLanguageModel) -> set[str]:
    """Return the names of the layers with an adapter."""
    return {hub_name(path, output) for path, _, a in iter_adapters(model) for output in a.configs}


def save_random_adapter(base: ModelFolder, folder: Path, tune: dict[str, Any]) -> Path:
    model = tune_with_lora(load_model(base, torch.float32, torch.device("cpu")), tune)
    folder.mkdir(parents=True)
    names = {"base_model": str(base.path), "base_fingerprint": base.fingerprint()}
    peft_io.save_adapter(folder, model, **names)
    return folder


def write_random_adapter(
    folder: Path, family: str = "qwen2_vl", tune_name: str = "language"
) -> Path:
    """Write a random adapter of the tiny model to files."""
    model = make_native_model(make_config(family), make_reference_model(make_config(family)))
    peft_io.save_adapter(
        folder, tune_with_lora(model, TUNE_SETTINGS[tune_name]), base_model="some/base"
    )
    return folder


def rename_adapter_keys(folder: Path, change: Callable[[str], str]) -> Path:
    """Rename the adapter's keys and drop those that `change` maps to an empty string."""
    file = folder / peft_io.ADAPTER_WEIGHTS_FILE
    tensors = {change(key): tensor for key, tensor in load_file(file).items()}
    tensors.pop("", None)
    save_file(tensors, file)
    return folder


def edit_adapter_config(folder: Path, **settings: Any) -> Path:
    """Change settings in the adapter's config."""
    content = json.loads((folder / peft_io.ADAPTER_CONFIG_FILE).read_text()) | settings
    (folder / peft_io.ADAPTER_CONFIG_FILE).write_text(json.dumps(content))
    return folder


def to_transformers4_name(key: str) -> str:
    return key.replace(".model.language_model.", ".model.").replace(".model.visual.", ".visual.")


def merge_to_folder(
    base_folder: ModelFolder,
    adapter: Path | None,
    out: Path,
    precision: Precision = "auto",
    manifest: Manifest | None = None,
) -> SimpleNamespace:
    """Merge an adapter into its base model on the CPU, without comparing the results."""
    with write_folder(out) as folder:
        resolved, compute_dtype = merge.resolve_precision(base_folder, precision)
        model = load_model(base_folder, compute_dtype, torch.device("cpu"))
        dequantized_layers = merge.dequantize_model(model)
        if adapter is not None:
            peft_io.load_adapter(model, adapter, base_folder=base_folder, dtype=torch.float32)
        merged_layers = merge.merge_adapters(model)
        merge.save_merged_model(model, base_folder, folder, DTYPES[resolved], manifest)
    counts = {"merged_layers": merged_layers, "dequantized_layers": dequantized_layers}
    return SimpleNamespace(folder=out, precision=resolved, **counts)
