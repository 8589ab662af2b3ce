"""Merge an adapter, and verify the merged model before the output folder appears."""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from finesight.encode.renderer import Renderer, require_native
from finesight.encode.tokenization import EncodedSample
from finesight.errors import UserError
from finesight.export import merge_parity
from finesight.export.hf_files import (
    PEFT_MERGE,
    complete_hf_folder,
    find_dropped_sampling,
    find_missing_files,
)
from finesight.export.merge_parity import (
    MergeParity,
    ModelOutputs,
    draw_questions,
    encode_prompts,
    load_validation_samples,
)
from finesight.export.model_card import VerifiedMerge, write_model_card
from finesight.files.storage import (
    check_new_path,
    require_free_space,
    temporary_folder,
    write_folder,
)
from finesight.host_memory import available_memory
from finesight.infer.model_loader import ModelSource, resolve_device, resolve_model_source
from finesight.model.linear import iter_adapters
from finesight.model.lora.merge import (
    MAX_SHARD_BYTES,
    dequantize_model,
    merge_adapters,
    resolve_precision,
    round_weights,
    save_merged_model,
)
from finesight.model.lora.peft_io import load_adapter
from finesight.model.trainable import ModelPart
from finesight.model.vlm import VisionLanguageModel
from finesight.model.weights_io import DTYPES, build_empty_model, hub_tensors, load_model
from finesight.model_folder import ModelFolder
from finesight.samples.sample import LocatedSample
from finesight.settings.config import Device, Precision

NUM_PARITY_SAMPLES = 4
"""Default number of questions on which the merged and the trained model are compared."""

MEMORY_RESERVE_BYTES = 2 * 10**9
"""Memory in bytes for activations, KV cache and the process, in addition to the weights."""

DISK_RESERVE_BYTES = 64 * 2**20
"""Disk space in bytes for index, model card and digests, in addition to weights and copies."""

LogFn = Callable[[str], None]


def merge_and_verify(
    source: str,
    model_source: ModelSource,
    out: Path,
    *,
    precision: Precision = "auto",
    device: Device = "auto",
    num_samples: int = NUM_PARITY_SAMPLES,
    max_shard_bytes: float = MAX_SHARD_BYTES,
    log: LogFn = print,
) -> VerifiedMerge:
    """Merge an adapter into a new folder, and compare it with the trained model.

    Args:
        num_samples: Number of questions about images: validation samples of the run, or generated
            images.

    Raises UserError for an existing `out`, too little disk space, an unsupported family, an
    incompatible adapter, and a merged model that differs from the trained one. `out` does not exist
    then, nor after an interruption.
    """
    base_folder = model_source.folder
    require_native(base_folder, "merge", PEFT_MERGE)
    check_new_path(out)
    weight_precision, fallback_dtype = resolve_precision(base_folder, precision)
    empty_model = build_empty_model(base_folder, torch.float32)
    num_params = sum(tensor.num_elements for tensor in hub_tensors(empty_model))
    small_file_bytes = sum(
        path.stat().st_size
        for path in base_folder.path.iterdir()
        if path.is_file() and path.suffix not in (".safetensors", ".bin")
    )
    require_free_space(
        out,
        num_params * DTYPES[weight_precision].itemsize + small_file_bytes + DISK_RESERVE_BYTES,
        "the merged model",
        "free some space, or choose another output folder",
    )
    target = _select_compute_target(device, num_params, fallback_dtype)
    with temporary_folder("merge") as temp_dir, write_folder(out) as folder:
        questions = _collect_questions(source, model_source, num_samples, temp_dir)
        trained_outputs = _run_quantized(model_source, questions, target, log)
        written_outputs = _write_merged(
            model_source, questions, target, folder, DTYPES[weight_precision], max_shard_bytes
        )
        complete_hf_folder(folder, base_folder.family, questions.renderer.end_ids)
        parity = _compare_folder(
            questions, target, written_outputs, trained_outputs, folder, weight_precision
        )
        merge_parity.check_parity(parity, merge_parity.LOGIT_TOLERANCES[target.dtype])
        merge = VerifiedMerge(
            out,
            Path(source),
            model_source,
            written_outputs.merged_layers,
            written_outputs.dequantized_layers,
            weight_precision,
            parity,
            tuple(find_missing_files(ModelFolder(folder))),
            find_dropped_sampling(base_folder),
        )
        write_model_card(folder, merge)
    return merge


@dataclass(frozen=True, slots=True)
class _ParityQuestions:
    """Questions on which two models are compared, as samples and as encoded prompts."""

    origin: str
    samples: list[LocatedSample]
    prompts: list[EncodedSample]
    renderer: Renderer

    @property
    def sample_ids(self) -> list[str]:
        return [prompt.tokenized.id for prompt in self.prompts]


@dataclass(frozen=True, slots=True)
class _ComputeTarget:
    device: torch.device
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class _WrittenOutputs:
    """Outputs before the model is saved, for the completions of base and adapter.

    Attributes:
        dequantized_layers: Number of layers dequantized from 4 bits.
        expected_logits: Logits of the merged weights in the written precision.
        changes: Differences of logits by field of `MergeParity`.
    """

    merged_layers: int
    dequantized_layers: int
    adapter_outputs: ModelOutputs
    expected_logits: tuple[Tensor, ...]
    changes: dict[str, float | None]


def _collect_questions(
    source: str, model_source: ModelSource, num_samples: int, folder: Path
) -> _ParityQuestions:
    renderer = model_source.build_renderer()
    for origin, load_questions in (
        ("validation images", partial(load_validation_samples, source)),
        ("generated images", partial(draw_questions, folder)),
    ):
        pairs = encode_prompts(renderer, load_questions(num_samples))
        if pairs:
            samples, prompts = zip(*pairs, strict=True)
            return _ParityQuestions(origin, list(samples), list(prompts), renderer)
    raise UserError(
        f"none of {num_samples} generated images could be encoded",
        where=str(model_source.folder.path),
        expected="a model for images of 200 x 200 pixels and a short question",
        remedy="check the image settings in the manifest of the run",
    )


def _load_model(
    folder: ModelFolder,
    adapter: Path | None,
    target: _ComputeTarget,
    nf4_parts: Collection[ModelPart] = (),
    fp8_parts: Collection[ModelPart] = (),
) -> VisionLanguageModel:
    model = load_model(folder, target.dtype, target.device, nf4_parts, fp8_parts=fp8_parts)
    if adapter is not None:
        load_adapter(model, adapter, base_folder=folder)
    return model.eval()


def _run_quantized(
    model_source: ModelSource, questions: _ParityQuestions, target: _ComputeTarget, log: LogFn
) -> ModelOutputs | None:
    """Generate with the quantized weights of the training.

    Returns None if the run did not quantize weights, or if they cannot be quantized here.
    """
    if not model_source.quantization_summary:
        return None
    try:
        model = _load_model(
            model_source.folder,
            model_source.adapter,
            target,
            model_source.nf4_parts,
            model_source.fp8_parts,
        )
    except UserError as error:
        log(f"not compared with {model_source.quantization_summary}: {error.what}")
        return None
    return merge_parity.generate_outputs(model, questions.prompts, questions.renderer.end_ids)


def _write_merged(
    model_source: ModelSource,
    questions: _ParityQuestions,
    target: _ComputeTarget,
    folder: Path,
    weight_dtype: torch.dtype,
    max_shard_bytes: float,
) -> _WrittenOutputs:
    model = _load_model(model_source.folder, model_source.adapter, target)
    prompts = questions.prompts
    adapter_outputs = merge_parity.generate_outputs(model, prompts, questions.renderer.end_ids)
    compute = partial(merge_parity.compute_logits, model, prompts, adapter_outputs.completions)
    for _, linear, _ in list(iter_adapters(model)):
        linear.adapter = None
    base_logits = compute()
    dequantized_layers = dequantize_model(model)
    if model_source.adapter is not None:
        # The compute dtype would round the stored fp32 factors before the merge.
        load_adapter(
            model, model_source.adapter, base_folder=model_source.folder, dtype=torch.float32
        )
    merged_layers = merge_adapters(model)
    merged_logits = expected_logits = compute()
    if weight_dtype != target.dtype:
        round_weights(model, weight_dtype)
        expected_logits = compute()
    save_merged_model(
        model, model_source.folder, folder, weight_dtype, model_source.manifest, max_shard_bytes
    )
    reference = adapter_outputs.logits
    steps = {
        "adapter_change": (reference, base_logits, merged_layers),
        "merge_change": (merged_logits, reference, merged_layers or dequantized_layers),
        "rounding_change": (expected_logits, merged_logits, weight_dtype != target.dtype),
    }
    changes = {
        name: merge_parity.relative_difference(actual, expected, reference) if is_changed else None
        for name, (actual, expected, is_changed) in steps.items()
    }
    return _WrittenOutputs(
        merged_layers, dequantized_layers, adapter_outputs, expected_logits, changes
    )


def _compare_folder(
    questions: _ParityQuestions,
    target: _ComputeTarget,
    written_outputs: _WrittenOutputs,
    trained_outputs: ModelOutputs | None,
    folder: Path,
    weight_precision: str,
) -> MergeParity:
    written_source = resolve_model_source(str(folder))
    renderer = written_source.build_renderer()
    prompts = [prompt for _, prompt in encode_prompts(renderer, questions.samples)]
    merge_parity.check_same_prompts(prompts, questions.prompts)
    # The written model is already freed: only one model is in memory at a time.
    gc.collect()
    model = _load_model(written_source.folder, None, target)
    adapter_outputs = written_outputs.adapter_outputs
    completions = merge_parity.generate_completions(model, prompts, renderer.end_ids)
    reference = adapter_outputs.logits
    reloaded_outputs = ModelOutputs(
        completions, merge_parity.compute_logits(model, prompts, adapter_outputs.completions)
    )
    num_equal, divergences = merge_parity.find_divergences(
        adapter_outputs, reloaded_outputs, questions.sample_ids
    )
    quantized_comparison = None
    if trained_outputs is not None:
        trained = trained_outputs.completions
        trained_logits = merge_parity.compute_logits(model, prompts, trained)
        quantized_comparison = (
            merge_parity.relative_difference(trained_logits, trained_outputs.logits, reference),
            fmean(a == b for a, b in zip(completions, trained, strict=True)),
        )
    return MergeParity(
        origin=questions.origin,
        num_prompts=len(prompts),
        num_tokens=sum(map(len, adapter_outputs.completions)),
        compute_precision=next(name for name, dtype in DTYPES.items() if dtype == target.dtype),
        weight_precision=weight_precision,
        **written_outputs.changes,
        reload_difference=merge_parity.relative_difference(
            reloaded_outputs.logits, written_outputs.expected_logits, reference
        ),
        num_equal=num_equal,
        divergences=divergences,
        quantized_comparison=quantized_comparison,
    )


def _select_compute_target(
    requested: Device, num_params: int, fallback_dtype: torch.dtype
) -> _ComputeTarget:
    """Select device and precision of the comparison.

    It runs in fp32 on the GPU if the model fits or the user requested cuda, else in fp32 on the CPU
    if it fits into memory, else in `fallback_dtype` on the CPU.
    """
    device = resolve_device(requested)
    num_bytes = num_params * torch.float32.itemsize + MEMORY_RESERVE_BYTES
    if device.type == "cuda" and (
        requested == "cuda" or torch.cuda.mem_get_info(device)[0] > num_bytes
    ):
        return _ComputeTarget(device, torch.float32)
    fits_memory = num_bytes <= available_memory()
    return _ComputeTarget(torch.device("cpu"), torch.float32 if fits_memory else fallback_dtype)
