"""Loading of a run, model folder, adapter or hub model for inference."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NoReturn

import torch
from safetensors.torch import load_file

from finesight.encode.family import DEFAULT_THINKING, ThinkingOptions
from finesight.encode.renderer import Renderer, is_native, require_native
from finesight.encode.renderer_builder import build_renderer
from finesight.errors import Remedy, Step, UserError
from finesight.files.storage import verify_folder, write_folder_once
from finesight.model.backend import as_native, load_auto_model
from finesight.model.backend_model import BackendModel
from finesight.model.kernels.runtime import load_compiler_in_background
from finesight.model.linear import LoraLinear
from finesight.model.lora.multi import detach_adapter, install_lora_routing
from finesight.model.lora.peft_io import (
    ADAPTER_CONFIG_FILE,
    load_adapter,
    read_peft_config,
    save_adapter,
)
from finesight.model.trainable import ModelPart, configure_tuning
from finesight.model.weights_io import DTYPES
from finesight.model_folder import ModelFolder, locate_model, resolve_model_path
from finesight.samples.prompt_format import PromptFormat
from finesight.settings.config import Device, Precision
from finesight.settings.manifest import (
    MANIFEST_FILE,
    RECIPE_FILE,
    Manifest,
    find_manifest_file,
    find_newest_checkpoint,
    find_run_dir,
    load_manifest,
)
from finesight.settings.setting_types import WeightFormat


@dataclass(frozen=True, slots=True)
class InferenceModel:
    """A model in evaluation mode with the renderer of its training run.

    Attributes:
        adapters: Adapter index by model name; None selects the base model.
        thinking_modes: Default thinking mode by model name; that of the renderer for other names.
        manifest: Manifest of the run that the first model is from; None for other models.
        prompt_formats: Form of questions by model name; that of `manifest` for other names.
    """

    model: BackendModel
    renderer: Renderer
    adapters: Mapping[str, int | None]
    thinking_modes: Mapping[str, bool] = field(default_factory=dict)
    manifest: Manifest | None = None
    prompt_formats: Mapping[str, PromptFormat] = field(default_factory=dict)

    def get_prompt_format(self, name: str | None = None) -> PromptFormat:
        """Return the form of questions to a model, by default to the first one.

        The base model of a run is asked as the run is.
        """
        first = PromptFormat.from_manifest(self.manifest)
        if name is None:
            return first
        return self.prompt_formats.get(name, first)


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Files of a model for inference, located by `resolve_model_source`.

    Attributes:
        folder: Base model or full fine-tuned weights.
        adapter: LoRA adapter to load on top; None without one.
        manifest: Manifest of the run; None if the model is not a run.
    """

    folder: ModelFolder
    adapter: Path | None
    manifest: Manifest | None
    nf4_parts: tuple[ModelPart, ...] = ()
    fp8_parts: tuple[ModelPart, ...] = ()

    def build_renderer(self) -> Renderer:
        """Create the renderer with the settings in the manifest of the run."""
        if self.manifest is None:
            return build_renderer(self.folder)
        manifest = self.manifest
        renderer = build_renderer(self.folder, manifest.image_rule, manifest.system_prompt)
        return renderer.with_thinking(ThinkingOptions(enable_thinking=manifest.enable_thinking))

    @property
    def quantization_summary(self) -> str:
        """Description of the quantized parts; empty without quantization."""
        summaries = []
        if self.nf4_parts:
            summaries.append(f"{' and '.join(self.nf4_parts)} in NF4")
        if self.fp8_parts:
            summaries.append(f"{' and '.join(self.fp8_parts)} in FP8")
        return " and ".join(summaries)


def load_inference_model(
    run_or_model: str,
    device: Device = "auto",
    precision: Precision = "auto",
    weight_format: WeightFormat = "auto",
    thinking: ThinkingOptions = DEFAULT_THINKING,
) -> InferenceModel:
    """Load a single model for inference, for predictions and evaluations.

    Args:
        run_or_model: Run folder (its manifest sets image size, system prompt and base model), one
            of its LoRA checkpoints, model folder in Hugging Face layout, PEFT adapter folder with
            a base model, or hub name.
        device: Device of the model; `auto` is CUDA if available.
        precision: `auto` is bf16 on GPUs that support it, fp16 on older GPUs, fp32 on CPU.
        weight_format: `auto` is the stored format, or the format of the training run. Other formats
            are converted while loading.
        thinking: Thinking mode and reasoning effort; by default those of the training run.
    """
    source = resolve_model_source(run_or_model)
    model, renderer = _load_base_model(source, device, precision, weight_format, thinking)
    if source.adapter is not None:
        load_adapter(model, source.adapter, base_folder=source.folder)
    model.eval()
    name = get_model_name(run_or_model)
    return InferenceModel(model, renderer, {name: None}, manifest=source.manifest)


def _load_base_model(
    source: ModelSource,
    device: Device,
    precision: Precision,
    weight_format: WeightFormat,
    thinking: ThinkingOptions,
) -> tuple[BackendModel, Renderer]:
    torch_device = resolve_device(device)
    with load_compiler_in_background(torch_device):
        # The renderer reads small files and rejects an unsupported family before weights are
        # loaded.
        renderer = source.build_renderer().with_thinking(thinking)
        dtype = resolve_precision(precision, torch_device)
        model = load_auto_model(
            source.folder, dtype, torch_device, source.nf4_parts, weight_format, source.fp8_parts
        )
    return model, renderer


BASE_MODEL_NAME = "base"


def load_multi_adapter_model(
    run_or_model: str,
    extra_adapters: Sequence[str] = (),
    device: Device = "auto",
    precision: Precision = "auto",
    weight_format: WeightFormat = "auto",
    thinking: ThinkingOptions = DEFAULT_THINKING,
) -> InferenceModel:
    """Load a model with several LoRA adapters that requests select by name.

    The name of a model is its folder name. The name `base` selects the base model. Other arguments
    are those of `load_inference_model`.
    """
    base_source = resolve_model_source(run_or_model)
    if extra_adapters:
        require_native(base_source.folder, "adapters", "serve one model without --adapter")
    # The transformers backend has no base model beside an adapter.
    is_single = base_source.adapter is None or not is_native(base_source.folder)
    if is_single and not extra_adapters:
        return load_inference_model(run_or_model, device, precision, weight_format, thinking)
    model, renderer = _load_base_model(base_source, device, precision, weight_format, thinking)
    adapters: list[Mapping[str, LoraLinear]] = []
    adapter_indices: dict[str, int | None] = {}
    thinking_modes: dict[str, bool] = {}
    prompt_formats: dict[str, PromptFormat] = {}
    for run_or_adapter in (run_or_model, *extra_adapters):
        source = resolve_model_source(run_or_adapter)
        _check_same_base(run_or_adapter, source, base_source, adapter_indices)
        name = get_model_name(run_or_adapter)
        if source.manifest is not None and thinking == DEFAULT_THINKING:
            mode = source.manifest.enable_thinking
            if mode is not None:
                thinking_modes[name] = mode
        prompt_formats[name] = PromptFormat.from_manifest(source.manifest)
        if source.adapter is None:
            adapter_indices[name] = None
            continue
        load_adapter(model, source.adapter, base_folder=base_source.folder)
        adapter_indices[name] = len(adapters)
        adapters.append(detach_adapter(model))
    native_model = as_native(model)
    native_model.lora_routing = install_lora_routing(native_model, adapters)
    model.eval()
    if base_source.adapter is not None:
        adapter_indices[BASE_MODEL_NAME] = None
    manifest = base_source.manifest
    return InferenceModel(
        model, renderer, adapter_indices, thinking_modes, manifest, prompt_formats
    )


def _check_same_base(
    run_or_adapter: str,
    source: ModelSource,
    base_source: ModelSource,
    existing_names: Mapping[str, int | None],
) -> None:
    """Raise UserError unless an adapter can be served together with the first one."""

    def reject(what: str, expected: str, remedy: str) -> NoReturn:
        raise UserError(
            f"{run_or_adapter} {what}", where="adapters", expected=expected, remedy=remedy
        )

    name = get_model_name(run_or_adapter)
    base_path = base_source.folder.path
    if source.folder.path.resolve() != base_path.resolve():
        expected = f"adapters of {base_path}, the base of the first adapter"
        reject(f"has the base model {source.folder.path}", expected, "start another server for it")
    if source.adapter is None and existing_names:
        expected = "adapters; the base model is always available"
        reject("is the base model, not an adapter", expected, "omit it")
    if base_source.adapter is not None and name == BASE_MODEL_NAME:
        what = f"has the name {name}, which selects the base model"
        reject(what, "another folder name", "rename the folder")
    if name in existing_names:
        reject(f"has the duplicate name {name}", "unique folder names", "rename the folder")
    if source.manifest is not None and base_source.manifest is not None:
        settings = source.manifest.model_dump()
        first_settings = base_source.manifest.model_dump()
        for key in ("image_rule", "system_prompt"):
            value = str(settings[key])
            first = str(first_settings[key])
            if value != first:
                expected = f"{first}, the value of the first adapter"
                reject(f"was trained with {key} {value}", expected, "start another server for it")


def get_model_name(run_or_model: str) -> str:
    """Return the model name for requests: the folder name, or a hub name without owner.

    A folder `run`, as new recipes name it, has the name of its parent folder. The name of a
    checkpoint starts with that of its run.
    """
    path = Path(run_or_model)
    run_dir = find_run_dir(path)
    if run_dir != path:
        return f"{get_model_name(str(run_dir))}-{path.name}"
    name = path.name or path.resolve().name
    if name == "run":
        return path.resolve().parent.name
    return name


def select_cpu_precision() -> Literal["bf16", "fp32"]:
    """Return the fastest training precision of this CPU: bf16 with native support, else fp32."""
    capabilities = torch.cpu.get_capabilities()
    has_bf16 = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return "bf16" if has_bf16 else "fp32"


def resolve_device(device: Device) -> torch.device:
    """Return the torch device of a setting; `auto` is CUDA if available, else CPU."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"device is {device}, but torch {torch.__version__} finds no CUDA device",
            where="device",
            expected="a GPU and a matching torch build (torch.cuda.is_available())",
            remedy="use the CPU (--device cpu, in a recipe train.device: cpu), or install a torch"
            " build for your driver",
        )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def resolve_precision(precision: Precision, device: torch.device) -> torch.dtype:
    """Return the compute dtype of a precision setting.

    `auto` is bf16 on GPUs with compute capability 8.0 or higher, fp16 on older GPUs, and fp32 on
    CPU.
    """
    if precision != "auto":
        return DTYPES[precision]
    if device.type == "cpu":
        return torch.float32
    if torch.cuda.get_device_capability(device) >= (8, 0):
        return torch.bfloat16
    return torch.float16


def resolve_model_source(run_or_model: str, base: str | None = None) -> ModelSource:
    """Locate the files of a run, adapter or model without loading the weights.

    The first use of a checkpoint (RUN/checkpoints/step-N) of LoRA training writes its adapter to
    RUN/adapter-step-N.
    """
    # os.path.isfile returns False for invalid paths (unknown home, name too long).
    path = resolve_model_path(run_or_model)
    run_dir = find_run_dir(path)
    manifest_file = run_dir / MANIFEST_FILE
    manifest = None
    if os.path.isdir(path) and os.path.isfile(manifest_file):
        manifest = load_manifest(manifest_file)
    is_adapter = os.path.isfile(path / ADAPTER_CONFIG_FILE)
    # An uploaded adapter has the manifest of its run.
    if manifest is not None and not is_adapter and not (path / "config.json").is_file():
        checkpoint = None if path == run_dir else path
        return _resolve_run(run_dir, manifest, base, checkpoint)
    if is_adapter:
        # Reject unsupported adapter settings before reading weights.
        settings = read_peft_config(path / ADAPTER_CONFIG_FILE)
        base = base or settings.base_model_name_or_path
        if not base:
            raise UserError(
                f"base_model_name_or_path is {base!r}",
                where=str(path / ADAPTER_CONFIG_FILE),
                expected="the folder or hub name of the adapter's base model",
                remedy="set it in this file",
            )
        folder = locate_model(base)
        return ModelSource(folder, path, _load_adapter_manifest(path, folder))
    _reject_base(base, run_or_model, "is a complete model")
    return ModelSource(locate_model(run_or_model), None, manifest)


def _load_adapter_manifest(adapter: Path, base: ModelFolder) -> Manifest | None:
    """Load the manifest of the run that wrote an adapter; None for other adapters."""
    file = find_manifest_file(adapter)
    if file is None:
        return None
    manifest = load_manifest(file)
    if manifest.family != base.family:
        return None
    return manifest


def _reject_base(base: str | None, source: str, reason: str) -> None:
    if base is not None:
        raise UserError(
            f"{source} {reason}, but base is {base}",
            where="base",
            expected="base only for an adapter, or a run with only an adapter",
            remedy="omit base",
        )


def _resolve_run(
    run_dir: Path, manifest: Manifest, base: str | None, checkpoint: Path | None
) -> ModelSource:
    model_dir = run_dir / "model" if manifest.tune.has_mode("full") else None
    adapter_dir = run_dir / "adapter" if manifest.tune.has_mode("lora") else None
    if checkpoint is not None and model_dir is None:
        adapter_dir = run_dir / f"adapter-{checkpoint.name}"
        if adapter_dir.is_dir():
            checkpoint = None
    _check_finished(run_dir, model_dir, adapter_dir, checkpoint)
    if model_dir is not None:
        _reject_base(base, str(run_dir), "contains a complete model in model/")
        folder = ModelFolder(model_dir)
    else:
        folder = locate_model(base or manifest.base_model)
        fingerprint = folder.fingerprint()
        if fingerprint != manifest.base_fingerprint:
            raise UserError(
                f"the base model {folder.path} has the fingerprint {fingerprint}",
                where=str(run_dir / MANIFEST_FILE),
                expected=f"{manifest.base_fingerprint}, the base model of the run",
                remedy=f"use {manifest.base_model} as in the training; an adapter fits no other",
            )
    if folder.family != manifest.family:
        raise UserError(
            f"{folder.path} has the family {folder.family}",
            where=str(run_dir / MANIFEST_FILE),
            expected=f"{manifest.family}, the family of the run",
            remedy="restore the base model of the run",
        )
    quantize = manifest.tune.quantize
    if checkpoint is not None and adapter_dir is not None:
        _write_checkpoint_adapter(checkpoint, adapter_dir, manifest, folder)
    return ModelSource(folder, adapter_dir, manifest, quantize.nf4 or (), quantize.fp8 or ())


def _check_finished(
    run_dir: Path, model_dir: Path | None, adapter_dir: Path | None, checkpoint: Path | None
) -> None:
    """Raise UserError for an unfinished run, or a checkpoint of full fine-tuning.

    `checkpoint` is None for the run itself, and for a checkpoint whose adapter has been written.
    """
    missing = [f"{part.name}/" for part in (model_dir, adapter_dir) if part and not part.is_dir()]
    what = ""
    where = "model"
    resume = {"recipe": str(run_dir / RECIPE_FILE), "resume": True}
    remedy: Remedy = Step("train", resume, "resume it")
    if model_dir is not None and checkpoint is not None:
        what = f"{checkpoint} is a checkpoint of full fine-tuning, which is no model"
        if not missing:
            remedy = f"give the run, {run_dir}"
    elif missing and checkpoint is None:
        what = f"{run_dir.name} has no {' and no '.join(missing)}: the run is not finished"
        where = str(run_dir)
        newest = find_newest_checkpoint(run_dir)
        if newest is not None and model_dir is None:
            remedy = Step("train", resume, f"give its newest checkpoint, {newest}, or resume it")
    if what:
        expected = "a finished run, or a checkpoint of LoRA training"
        raise UserError(what, where=where, expected=expected, remedy=remedy)


def _write_checkpoint_adapter(
    checkpoint: Path, target: Path, manifest: Manifest, base: ModelFolder
) -> None:
    """Write the LoRA weights of a checkpoint to a PEFT folder.

    The base model is loaded once, because its layers determine the names and ranks.
    """
    verify_folder(checkpoint)
    parts: dict[str, list[torch.Tensor]] = {}
    for file in sorted(checkpoint.glob("trainable*.safetensors")):
        for name, tensor in load_file(file).items():
            parts.setdefault(name, []).append(tensor)
    model = load_auto_model(base, torch.bfloat16, torch.device("cpu"))
    configure_tuning(model, manifest.tune, seed=0)
    values = {name: torch.cat(tensors) for name, tensors in parts.items()}
    trainable = [name for name, param in model.named_parameters() if param.requires_grad]
    if missing := [name for name in trainable if name not in values]:
        raise UserError(
            f"the checkpoint lacks {len(missing)} of {len(trainable)} LoRA weights: {missing[0]}",
            where=str(checkpoint),
            expected="the weights of all layers with LoRA in the manifest of the run",
            remedy="use another checkpoint, with the finesight version that wrote it",
        )

    def write(out: Path) -> None:
        save_adapter(
            out,
            model,
            base_model=manifest.base_model,
            base_fingerprint=manifest.base_fingerprint,
            master_values=values,
        )

    # Another process may use the checkpoint for the first time as well.
    write_folder_once(target, write)
