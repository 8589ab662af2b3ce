"""Reading, quantization and writing of model weights with published tensor names."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from finesight.errors import UserError
from finesight.files.storage import DIGESTS_FILE, open_tensors, verify_folder
from finesight.model.config import ConfigReader
from finesight.model.fused_ops import split_outputs
from finesight.model.layers import MoeExperts
from finesight.model.linear import FusedLinear, find_adaptable_layers, hub_name
from finesight.model.quant.base import (
    SAFETENSORS_DTYPES,
    QuantizedMatrix,
    QuantizedWeight,
    WeightTensorSpec,
    find_quantized_weights,
)
from finesight.model.quant.fp8 import FP8_ALIGNMENT, Fp8Matrix, Fp8Weight
from finesight.model.quant.int4 import RtnInt4Matrix, gptq_group_size, quantize_gptq_layers
from finesight.model.quant.int8 import Int8Matrix
from finesight.model.quant.nf4 import Nf4Matrix, import_bitsandbytes
from finesight.model.trainable import ModelPart, get_part
from finesight.model.vlm import (
    VisionLanguageModel,
    build_model,
    load_architecture,
    materialize_parameters,
    raise_on_failed_allocation,
)
from finesight.model_folder import PICKLE_INDEX_FILE, ModelFolder
from finesight.settings.manifest import MANIFEST_FILE
from finesight.settings.setting_types import WeightFormat


@dataclass(frozen=True)
class TensorHeader:
    """Header entry of a tensor in a safetensors file."""

    file: Path
    name: str
    native_name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def layer_name(self) -> str:
        return self.native_name.rpartition(".")[0]


def read_headers(
    files: Sequence[Path], to_native_name: Callable[[str], str] = str
) -> list[TensorHeader]:
    headers = []
    for file in files:
        with open_safetensors(file) as weights:
            for name in weights.keys():  # noqa: SIM118
                piece = weights.get_slice(name)
                shape = tuple(piece.get_shape())
                headers.append(
                    TensorHeader(file, name, to_native_name(name), shape, piece.get_dtype())
                )
    return headers


def _damaged_file(
    problem: str, where: Path, expected: str, remedy: str = "download the model again"
) -> UserError:
    return UserError(problem, where=str(where), expected=expected, remedy=remedy)


def _reject_tensors(wrong: Sequence[tuple[str, Path]], problem: str, expected: str) -> None:
    """Raise a UserError with up to five tensors and the file of the first, if any."""
    if not wrong:
        return
    listed = ", ".join(name for name, _ in wrong[:5])
    if len(wrong) > 5:
        listed += ", ..."
    _, first_file = wrong[0]
    raise _damaged_file(f"{len(wrong)} tensors are {problem}: {listed}", first_file, expected)


@contextmanager
def open_safetensors(file: Path, remedy: str = "download the model again") -> Iterator[Any]:
    """Open a safetensors file for reading; raises UserError if it is damaged."""
    try:
        with open_tensors(file) as file_handle:
            yield file_handle
    except (SafetensorError, OSError) as error:
        problem = f"not a complete safetensors file ({error})"
        raise _damaged_file(problem, file, "a safetensors file as published", remedy) from error


MATRIX_TYPES: Mapping[str, Callable[[int, int], QuantizedMatrix]] = {
    "nf4": Nf4Matrix,
    "fp8": Fp8Matrix,
    "int8": Int8Matrix,
    "int4": RtnInt4Matrix,
}


class _QuantizationRequest(NamedTuple):
    """Model parts to quantize, and the setting that requests it."""

    parts: Collection[ModelPart]
    bit_format: str
    where: str
    weight_type: type[QuantizedWeight]


def quantize_model_parts(
    model: VisionLanguageModel,
    nf4_parts: Collection[ModelPart],
    fp8_parts: Collection[ModelPart],
    weight_format: WeightFormat,
    folder: Path,
) -> None:
    """Replace weights of a model by empty quantized matrices before the weights are loaded.

    `nf4_parts` selects all linear layers of these parts, `fp8_parts` those whose sizes support FP8
    matmuls (`model.quant.fp8`). A `weight_format` other than auto selects the decoder and the head
    instead. Vision encoder and merger then remain in their stored dtype: they process an image
    once, with more rows than quantized kernels accelerate, and their errors affect all later
    tokens. A tied head remains as well, because it is the embedding table.
    """
    requests = [
        _QuantizationRequest(nf4_parts, "nf4", "tune.quantize.nf4", QuantizedWeight),
        _QuantizationRequest(fp8_parts, "fp8", "tune.quantize.fp8", Fp8Weight),
    ]
    if weight_format != "auto":
        parts: list[ModelPart] = ["language"]
        if model.lm_head is not None:
            parts.append("embeddings")
        requests = [
            _QuantizationRequest(parts, weight_format, "--weight-format", QuantizedWeight),
        ]
    for request in requests:
        _check_quantizable(model, request, folder)
        matrix_type = MATRIX_TYPES[request.bit_format]
        uses_fp8_matmul = request.weight_type is Fp8Weight
        for linear in _select_linears(model, request.parts):
            if uses_fp8_matmul and not supports_fp8_matmul(linear):
                continue
            with torch.device("meta"):
                linear.set_quantized_weight(matrix_type, request.weight_type)


def _check_quantizable(
    model: VisionLanguageModel, request: _QuantizationRequest, folder: Path
) -> None:
    parts, bit_format, where, _ = request
    if parts and bit_format == "nf4":
        import_bitsandbytes(where)
    if "embeddings" in parts and model.lm_head is None:
        raise UserError(
            f"embeddings are in {bit_format}, but the head of this model is tied to the embedding "
            "table, which is not quantized",
            where=where,
            expected="embeddings only for a model with a head of its own (tie_word_embeddings "
            "false)",
            remedy=f"leave embeddings out of {bit_format} for {folder.name}",
        )
    if "language" in parts and model.config.decoder.moe is not None:
        excluded = f"language out of {bit_format}"
        if where == "--weight-format":
            excluded = f"{where} {bit_format} out"
        raise UserError(
            f"language is in {bit_format}, but this model has experts, which remain in 16 bits "
            "and hold nearly all of its parameters",
            where=where,
            expected="language only for a model without experts",
            remedy=f"leave {excluded} for {folder.name}",
        )


def _select_linears(model: nn.Module, parts: Collection[ModelPart]) -> list[FusedLinear]:
    linears = []
    for path, module in model.named_modules():
        if isinstance(module, FusedLinear) and get_part(f"{path}.weight") in parts:
            linears.append(module)
    return linears


def supports_fp8_matmul(linear: FusedLinear) -> bool:
    """Return True if the sizes of all layers of a fused linear support FP8 matmuls."""
    sizes = (linear.in_features, *linear.output_sizes.values())
    return not any(size % FP8_ALIGNMENT for size in sizes)


def count_unquantized_layers(model: nn.Module, fp8_parts: Collection[ModelPart]) -> int:
    """Count the linear layers of `fp8_parts` whose sizes do not support FP8 matmuls."""
    num_layers = 0
    for linear in _select_linears(model, fp8_parts):
        if not supports_fp8_matmul(linear):
            num_layers += len(linear.output_sizes)
    return num_layers


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""Dtypes of weights and computation by their names in settings."""

_FILE_DTYPES = {name: DTYPES[dtype] for name, dtype in SAFETENSORS_DTYPES.items()} | {
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Dtypes of tensors that are copied unchanged, by their names in safetensors files."""

_LM_HEAD_KEY = "lm_head.weight"

_PATCH_EMBED_KEY = "visual.patch_embed.proj.weight"

_QWEIGHT_SUFFIX = ".qweight"
"""Suffix of a tensor name that only layers quantized with GPTQ have."""

_EXPERT_PATTERN = re.compile(r"(.+\.experts)\.\d+\.(gate|up|down)_proj\.weight")
"""Native name of a weight of a single expert."""

_INDEX_FILE = "model.safetensors.index.json"

_COPIED_SUFFIXES = {".json", ".txt", ".jinja", ".model", ".tiktoken"}

_OWN_FILES = {DIGESTS_FILE, MANIFEST_FILE, _INDEX_FILE, PICKLE_INDEX_FILE, "config.json"}
"""Files that describe one folder and are not copied to another."""


@dataclass(frozen=True)
class HubTensor:
    """Tensor of the published model and its location in the native model.

    `data` is None for a tensor that the model does not load.
    """

    name: str
    data: Tensor | WeightTensorSpec | None
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def dtypes(self) -> Collection[str]:
        if isinstance(self.data, WeightTensorSpec):
            return self.data.dtypes
        return SAFETENSORS_DTYPES

    @property
    def is_dense(self) -> bool:
        """True if files store dense values, even if the model quantizes them."""
        if isinstance(self.data, WeightTensorSpec):
            return self.data.name == "weight"
        return self.data is not None

    def matches_shape(self, header: TensorHeader) -> bool:
        """Return True if the shape of a tensor in a file matches this tensor.

        Weights of experts may be transposed: transformers 5 writes them with outputs first.
        """
        if header.shape == self.shape:
            return True
        if len(header.shape) != 3:
            return False
        num_experts, num_outputs, num_inputs = header.shape
        return self.shape == (num_experts, num_inputs, num_outputs)

    def load(self, values: Tensor) -> None:
        assert self.data is not None, f"{self.name} is not loaded"
        if isinstance(self.data, WeightTensorSpec):
            self.data.load(values)
        else:
            self.data.copy_(values.reshape(self.data.shape))


def hub_tensors(model: VisionLanguageModel) -> Iterator[HubTensor]:
    """Yield every tensor of the published model, without adapters.

    A head that is tied to the embeddings has no tensor.
    """
    skipped: list[str] = []
    for path, module in model.named_modules():
        if f"{path}.".startswith(tuple(skipped)):
            continue
        if isinstance(module, FusedLinear):
            skipped += [f"{path}.adapter.", f"{path}.weight."]
            yield from _linear_tensors(path, module)
            continue
        # Buffers hold constants that are stored but never trained.
        for key, parameter in chain(
            module.named_parameters(recurse=False), module.named_buffers(recurse=False)
        ):
            name = f"{path}.{key}"
            data = parameter.detach()
            shape = tuple(data.shape)
            if name == _PATCH_EMBED_KEY:
                shape = (len(data), *model.config.vision.patch_shape)
            yield HubTensor(name, data, shape)


def _linear_tensors(path: str, linear: FusedLinear) -> Iterator[HubTensor]:
    sizes = list(linear.output_sizes.values())
    weights = _split_weight(linear.weight, sizes)
    bias: Tensor | None = linear.bias
    if bias is not None:
        bias = bias.detach()
    biases = split_outputs(bias, sizes)
    for output, layer_weight, layer_bias in zip(linear.output_sizes, weights, biases, strict=True):
        layer = hub_name(path, output)
        if isinstance(layer_weight, QuantizedMatrix):
            for spec in layer_weight.tensor_specs():
                yield HubTensor(f"{layer}.{spec.name}", spec, spec.shape)
        else:
            yield HubTensor(f"{layer}.weight", layer_weight, tuple(layer_weight.shape))
        if layer_bias is not None:
            yield HubTensor(f"{layer}.bias", layer_bias, tuple(layer_bias.shape))


def _split_weight(
    weight: Tensor | QuantizedWeight, sizes: list[int]
) -> Sequence[Tensor | QuantizedMatrix]:
    """Return the weight of each layer of a fused linear."""
    if isinstance(weight, QuantizedWeight):
        return weight.matrices
    return torch.split(weight.detach(), sizes)


def build_empty_model(
    folder: ModelFolder,
    dtype: torch.dtype,
    nf4_parts: Collection[ModelPart] = (),
    weight_format: WeightFormat = "auto",
    fp8_parts: Collection[ModelPart] = (),
) -> VisionLanguageModel:
    """Build the model of a hub folder on the meta device.

    Layers published with GPTQ are not quantized yet.
    """
    hf_config = ConfigReader(folder.config, str(folder.path / "config.json"))
    preprocessor_path = str(folder.path / "preprocessor_config.json")
    preprocessor = ConfigReader(folder.preprocessor_config, preprocessor_path)
    model = build_model(hf_config, preprocessor, dtype, torch.device("meta"))
    quantize_model_parts(model, nf4_parts, fp8_parts, weight_format, folder.path)
    return model


def build_meta_model(
    folder: ModelFolder,
    dtype: torch.dtype,
    nf4_parts: Collection[ModelPart],
    fp8_parts: Collection[ModelPart],
) -> VisionLanguageModel:
    """Build the model that `load_model` would load, on the meta device, without its weights."""
    model = build_empty_model(folder, dtype, nf4_parts, fp8_parts=fp8_parts)
    group_size = gptq_group_size(folder)
    if group_size is not None:
        layers = [name for name in find_adaptable_layers(model) if get_part(name) == "language"]
        quantize_gptq_layers(model, layers, group_size, str(folder.path))
    return model


def build_checked_model(
    folder: ModelFolder,
    dtype: torch.dtype,
    nf4_parts: Collection[ModelPart] = (),
    weight_format: WeightFormat = "auto",
    fp8_parts: Collection[ModelPart] = (),
) -> tuple[VisionLanguageModel, list[TensorHeader]]:
    """Build the model of a folder on the meta device, and check its weight headers.

    Returns:
        Model, and the headers of the tensors to load.

    Raises:
        UserError: A file or a tensor is missing, or does not fit the configuration.
    """
    group_size = gptq_group_size(folder)
    files = folder.weight_files()
    model = build_empty_model(folder, dtype, nf4_parts, weight_format, fp8_parts)
    headers = []
    copied_headers = []
    for header in read_headers(files, model.architecture.to_native_name):
        if header.native_name.startswith(model.architecture.copied_prefixes):
            copied_headers.append((header, _FILE_DTYPES))
        else:
            headers.append(header)
    # Reject unsupported dtypes now instead of when the trained model is saved.
    _check_dtypes(copied_headers)
    if group_size is not None:
        layers = _find_gptq_layers(headers)
        quantize_gptq_layers(model, layers, group_size, str(folder.path))
    expected = _list_expected(model, headers)
    if model.config.decoder.tie_word_embeddings:
        # A tied head may be stored in addition; the embedding is used.
        headers = [tensor for tensor in headers if tensor.native_name != _LM_HEAD_KEY]
    headers = _drop_zero_biases(headers, expected)
    _check_tensors(headers, expected, folder.path)
    return model, headers


def _find_gptq_layers(headers: Sequence[TensorHeader]) -> set[str]:
    """Return the names of the layers that are stored in the format of GPTQ."""
    return {t.layer_name for t in headers if t.native_name.endswith(_QWEIGHT_SUFFIX)}


def load_model(
    folder: ModelFolder,
    dtype: torch.dtype,
    device: torch.device,
    nf4_parts: Collection[ModelPart] = (),
    weight_format: WeightFormat = "auto",
    fp8_parts: Collection[ModelPart] = (),
) -> VisionLanguageModel:
    """Load the native model of a hub folder, reading every tensor exactly once.

    Layers published with GPTQ (`model.quant.int4`) remain in that format. Layers of `nf4_parts` are
    quantized one by one while they are read, from the stored dtype, so that the codes do not depend
    on the compute dtype. `quantize_model_parts` describes the formats.
    """
    # Another quantization is reported before a changed file.
    gptq_group_size(folder)
    files = folder.weight_files()
    # Files converted from pickles are in a folder of their own, with their own digests.
    weight_folders = [file.parent for file in files]
    for written_folder in dict.fromkeys([folder.path, *weight_folders]):
        if (written_folder / DIGESTS_FILE).is_file():
            verify_folder(written_folder)
    model, headers = build_checked_model(folder, dtype, nf4_parts, weight_format, fp8_parts)
    with raise_on_failed_allocation(str(folder.path / "config.json")):
        materialize_parameters(model, device)
    # The tensors in an earlier list would be those on the meta device, which were replaced.
    expected = _list_expected(model, headers)
    transposed = _find_transposed_experts(headers, expected)
    for file in files:
        with open_safetensors(file) as weights:
            for header in headers:
                if header.file != file:
                    continue
                is_transposed = header.native_name in transposed
                # A name would keep the values until those of the next tensor are read.
                target = expected[header.native_name]
                target.load(_read_values(weights, header.name, is_transposed))
    return model


def _read_values(weights: Any, name: str, is_transposed: bool) -> Tensor:
    """Read a tensor of an open safetensors file, transposed if `is_transposed`."""
    values: Tensor = weights.get_tensor(name)
    if is_transposed:
        values = values.mT
    return values


def _list_expected(
    model: VisionLanguageModel, headers: Sequence[TensorHeader]
) -> dict[str, HubTensor]:
    """Return the tensors of a model by native name, with experts as in the files.

    transformers writes each expert of Qwen3.5 separately. Published files have stacked weights.
    """
    expected = {tensor.name: tensor for tensor in hub_tensors(model)}
    paths: dict[str, None] = {}  # without duplicates, in the order of the files
    for header in headers:
        match = _EXPERT_PATTERN.fullmatch(header.native_name)
        if match is not None and f"{match[1]}.gate_up_proj" in expected:
            paths[match[1]] = None
    for path in paths:
        module = model.get_submodule(path)
        if not isinstance(module, MoeExperts):
            continue
        for name in ("gate_up_proj", "down_proj"):
            del expected[f"{path}.{name}"]
        for index, weights in enumerate(module.split_experts()):
            for name, weight in weights.items():
                hub_tensor = HubTensor(f"{path}.{index}.{name}.weight", weight, tuple(weight.shape))
                expected[hub_tensor.name] = hub_tensor
    return expected


def _find_transposed_experts(
    headers: Sequence[TensorHeader], expected: Mapping[str, HubTensor]
) -> set[str]:
    """Return the native names of stacked expert weights that a file stores with outputs first.

    A square weight is ambiguous. The two expert weights of a layer are never both square, since
    their widths are I and 2 I, and both use the same layout.
    """
    layers = {t.layer_name for t in headers if t.shape != expected[t.native_name].shape}
    return {t.native_name for t in headers if t.layer_name in layers and len(t.shape) == 3}


def _drop_zero_biases(
    headers: Sequence[TensorHeader], expected: Mapping[str, HubTensor]
) -> list[TensorHeader]:
    """Remove the zero biases that AutoGPTQ adds to layers without a bias."""
    kept = []
    for header in headers:
        is_bias = header.native_name.endswith(".bias")
        is_quantized = header.layer_name + _QWEIGHT_SUFFIX in expected
        is_unexpected = header.native_name not in expected
        is_added = is_bias and is_quantized and is_unexpected
        if not is_added:
            kept.append(header)
            continue
        with open_safetensors(header.file) as weights:
            if weights.get_tensor(header.name).any():
                wrong = [(header.name, header.file)]
                _reject_tensors(wrong, "of layers without a bias", "zeros")
    return kept


def stored_precision(folder: ModelFolder) -> str:
    """Return the dtype name of a folder's weights, fp32 for mixed dtypes.

    Quantized layers, parameters that are always in fp32 and tensors that the model does not load
    are ignored. Raises UserError for unsupported dtypes.
    """
    architecture = load_architecture(folder.family)
    fp32_suffixes: tuple[str, ...] = ()
    copied_prefixes: tuple[str, ...] = ()
    if architecture is not None:
        fp32_suffixes = architecture.fp32_suffixes
        copied_prefixes = architecture.copied_prefixes
    is_quantized = gptq_group_size(folder) is not None
    headers = read_headers(folder.weight_files())
    packed_layers = _find_gptq_layers(headers) if is_quantized else set()
    dtypes = set()
    for header in headers:
        is_fp32 = header.name.endswith(fp32_suffixes)
        is_copied = header.name.startswith(copied_prefixes)
        if not (is_fp32 or is_copied or header.layer_name in packed_layers):
            dtypes.add(header.dtype)
    unsupported = sorted(dtypes.difference(SAFETENSORS_DTYPES)) if dtypes else ["none"]
    if unsupported:
        raise _damaged_file(
            f"weights of type {unsupported[0]}",
            folder.path,
            f"one of {', '.join(SAFETENSORS_DTYPES)}",
        )
    if len(dtypes) > 1:
        return "fp32"
    return SAFETENSORS_DTYPES[dtypes.pop()]


def _check_tensors(
    headers: Sequence[TensorHeader], expected: Mapping[str, HubTensor], folder: Path
) -> None:
    """Check that every expected tensor exists exactly once, and no others."""
    unknown = [(t.name, t.file) for t in headers if t.native_name not in expected]
    _reject_tensors(unknown, "unknown to this model", "the tensors of config.json")
    counts = Counter(t.native_name for t in headers)
    repeated = [t for t in headers if counts[t.native_name] > 1]
    _reject_tensors([(t.name, repeated[-1].file) for t in repeated], "duplicates", "each once")
    misshapen = []
    for header in headers:
        target = expected[header.native_name]
        if not target.matches_shape(header):
            problem = f"{header.name} {header.shape} not {target.shape}"
            misshapen.append((problem, header.file))
    _reject_tensors(misshapen, "of another shape", "the shapes of config.json")
    _check_dtypes([(t, expected[t.native_name].dtypes) for t in headers])
    missing = [(name, folder) for name in expected if name not in counts]
    _reject_tensors(missing, "missing", "all tensors of config.json")


def _check_dtypes(tensors: Sequence[tuple[TensorHeader, Collection[str]]]) -> None:
    """Check that each tensor has one of the given dtypes."""
    wrong = [(t, dtypes) for t, dtypes in tensors if t.dtype not in dtypes]
    if not wrong:
        return
    _, first_dtypes = wrong[0]
    listed = [(f"{t.name} {t.dtype}", t.file) for t, _ in wrong]
    _reject_tensors(listed, "of another type", f"one of {', '.join(first_dtypes)}")


def save_model(
    model: VisionLanguageModel,
    folder: ModelFolder,
    target: Path,
    dtype: torch.dtype,
    max_shard_bytes: float = 5e9,
) -> None:
    """Write the weights of a model, without adapters, as a hub folder.

    Dense weights are written in `dtype`, quantized weights as stored in `folder`, the folder that
    the model was loaded from. Parameters that are always in fp32 are written in the wider of
    `dtype` and their stored dtype. Tensors that the model does not load are copied, as are the
    config and tokenizer files. Use `storage.write_folder` for an atomic write.
    """
    num_adapters = 0
    for module in model.modules():
        if isinstance(module, FusedLinear) and module.adapter is not None:
            num_adapters += 1
    assert num_adapters == 0, f"{num_adapters} linear layers still have an adapter"
    tensors = list(hub_tensors(model))
    has_packed = any(tensor.name.endswith(_QWEIGHT_SUFFIX) for tensor in tensors)
    architecture = model.architecture
    source_headers = _read_source_headers(model, folder, target)
    for name, header in source_headers.items():
        if name.startswith(architecture.copied_prefixes):
            tensors.append(HubTensor(name, None, header.shape))
    dtypes: dict[str, torch.dtype] = {}
    dense_dtypes = set()
    for tensor in tensors:
        is_fp32 = tensor.name.endswith(architecture.fp32_suffixes)
        stored_dtype = _stored_dtype(tensor, dtype, source_headers.get(tensor.name), is_fp32)
        dtypes[tensor.name] = stored_dtype
        if tensor.is_dense and not is_fp32:
            dense_dtypes.add(stored_dtype)
    shards = _split_shards(tensors, dtypes, max_shard_bytes)
    # config.json names one dtype for all tensors: fp32 if they differ.
    file_dtype = dtype if dense_dtypes == {dtype} else torch.float32
    dropped_keys = () if has_packed else ("quantization_config",)
    copy_model_files(folder, target, file_dtype, dropped_keys)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        names = _save_shard(model, shard, dtypes, source_headers, target / file)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        size = sum(t.num_elements * dtypes[t.name].itemsize for t in tensors)
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (target / _INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _save_shard(
    model: VisionLanguageModel,
    shard: Sequence[HubTensor],
    dtypes: Mapping[str, torch.dtype],
    source_headers: Mapping[str, TensorHeader],
    file: Path,
) -> list[str]:
    """Write tensors to a file, and return their published names.

    Their copies are freed at the end, before those of the next shard are made.
    """
    content = {}
    for tensor in shard:
        # Always copy: safetensors rejects views of a shared parameter.
        copied = _to_file_tensor(tensor, dtypes[tensor.name], source_headers)
        content[model.architecture.to_hub_name(tensor.name)] = copied
    save_file(content, file, metadata={"format": "pt"})
    return list(content)


def _read_source_headers(
    model: VisionLanguageModel, folder: ModelFolder, target: Path
) -> dict[str, TensorHeader]:
    """Read the weight headers of the source folder, by native name.

    The result is empty if the model takes neither dtypes nor tensors from that folder.
    """
    architecture = model.architecture
    # A new model has no source files yet.
    if folder.path == target:
        return {}
    has_own_dtypes = architecture.fp32_suffixes or find_quantized_weights(model)
    if not (has_own_dtypes or architecture.copied_prefixes):
        return {}
    headers = read_headers(folder.weight_files(), architecture.to_native_name)
    return {header.native_name: header for header in headers}


def _split_shards(
    tensors: Sequence[HubTensor], dtypes: Mapping[str, torch.dtype], max_shard_bytes: float
) -> list[list[HubTensor]]:
    shards: list[list[HubTensor]] = [[]]
    size = 0
    for tensor in tensors:
        num_bytes = tensor.num_elements * dtypes[tensor.name].itemsize
        if shards[-1] and size + num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += num_bytes
    return shards


def _stored_dtype(
    tensor: HubTensor, dtype: torch.dtype, header: TensorHeader | None, is_fp32: bool
) -> torch.dtype:
    """Return the dtype of a tensor in files, where `header` describes its source, if any."""
    if isinstance(tensor.data, Tensor):
        if header is None or not is_fp32:
            return dtype
        return torch.promote_types(dtype, _FILE_DTYPES[header.dtype])
    assert header is not None, f"{tensor.name} has no source"
    return _FILE_DTYPES[header.dtype]


def _to_file_tensor(
    tensor: HubTensor, dtype: torch.dtype, source_headers: Mapping[str, TensorHeader]
) -> Tensor:
    if isinstance(tensor.data, Tensor):
        return tensor.data.to("cpu", dtype, copy=True).view(tensor.shape)
    source = source_headers[tensor.name]
    with open_safetensors(source.file) as weights:
        values: Tensor = weights.get_tensor(source.name)
    return values


def copy_model_files(
    folder: ModelFolder, target: Path, dtype: torch.dtype, dropped_keys: Collection[str] = ()
) -> None:
    """Copy config.json and other small files of a model folder to `target`."""
    for path in sorted(folder.path.iterdir()):
        is_copied = path.suffix in _COPIED_SUFFIXES or path.name.startswith(("LICENSE", "NOTICE"))
        if not is_copied:
            continue
        source = folder.find_file(path.name)
        if source is not None and path.name not in _OWN_FILES:
            (target / path.name).write_bytes(source.read_bytes())
    kept = {key: value for key, value in folder.config.items() if key not in dropped_keys}
    config = _set_dtype(kept, str(dtype).removeprefix("torch."))
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (target / "config.json").write_text(text, encoding="utf-8")


def _set_dtype(section: Mapping[str, Any], dtype_name: str) -> dict[str, Any]:
    """Return a section of a config with another dtype, also in sections inside it."""
    values: dict[str, Any] = {}
    for key, value in section.items():
        if key in ("dtype", "torch_dtype"):
            values[key] = dtype_name
        elif isinstance(value, dict):
            values[key] = _set_dtype(value, dtype_name)
        else:
            values[key] = value
    return values
