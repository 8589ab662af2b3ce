"""Reading, quantization and writing of model weights with published tensor names."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from finesight.config import WeightFormat
from finesight.digests import DIGESTS_FILE, verify_folder
from finesight.errors import UserError
from finesight.manifest import MANIFEST_FILE
from finesight.model.config import ConfigReader
from finesight.model.families.qwen_vl import AttentionPool
from finesight.model.fused_linear import FusedLinear
from finesight.model.lora.layer import hub_name
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
    materialize_parameters,
    raise_on_failed_allocation,
)
from finesight.model_folder import PICKLE_INDEX_FILE, PREPROCESSOR_DEFAULTS, ModelFolder


@dataclass(frozen=True)
class TensorHeader:
    """Header entry of a tensor in a safetensors file.

    `name` is the published name of the tensor and `native_name` its name in the native model.
    """

    file: Path
    name: str
    native_name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def layer_name(self) -> str:
        """Native name of the layer that owns the tensor."""
        return self.native_name.rpartition(".")[0]


def read_header(file: Path, to_native_name: Callable[[str], str] = str) -> list[TensorHeader]:
    """Read the header entries of a safetensors file.

    `to_native_name` maps published tensor names to native names.
    """
    with open_safetensors(file) as file_handle:
        pieces = {name: file_handle.get_slice(name) for name in file_handle.keys()}  # noqa: SIM118
        return [
            TensorHeader(
                file, name, to_native_name(name), tuple(piece.get_shape()), piece.get_dtype()
            )
            for name, piece in pieces.items()
        ]


def tensor_error(names: list[str], problem: str, expected: str, where: Path) -> UserError:
    """Build a UserError that lists up to five affected tensors."""
    listed = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return UserError(
        f"{len(names)} tensors are {problem}: {listed}",
        where=str(where),
        expected=expected,
        remedy=_REMEDY,
    )


@contextmanager
def open_safetensors(file: Path) -> Iterator[Any]:
    """Open a safetensors file for reading; raises UserError if it is damaged."""
    try:
        with safe_open(file, framework="pt") as file_handle:
            yield file_handle
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"not a complete safetensors file ({error})",
            where=str(file),
            expected="a safetensors file as published",
            remedy=_REMEDY,
        ) from error


MATRIX_TYPES: Mapping[str, Callable[[int, int], QuantizedMatrix]] = {
    "nf4": Nf4Matrix,
    "fp8": Fp8Matrix,
    "int8": Int8Matrix,
    "int4": RtnInt4Matrix,
}

_DECODER_PARTS: tuple[ModelPart, ...] = ("language", "embeddings")
"""Model parts that `--weight-format` quantizes, if the head is not tied to the embeddings."""


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
    in that format instead.

    With `weight_format`, vision encoder and merger remain in their stored dtype: they process an
    image once, with more rows than quantized kernels accelerate, and their errors affect all later
    tokens. A tied head remains as well, because it is the embedding table.

    Raises:
        UserError: Quantization was requested for a tied head or for a decoder with experts, or a
            package is missing. The message names `folder`.
    """
    requests: list[tuple[Collection[ModelPart], str, str]] = [
        (nf4_parts, "nf4", "tune.quantize.nf4"),
        (fp8_parts, "fp8", "tune.quantize.fp8"),
    ]
    if weight_format != "auto":
        decoder: tuple[ModelPart, ...] = ("language",) if model.lm_head is None else _DECODER_PARTS
        requests = [(decoder, weight_format, "--weight-format")]
    for parts, bit_format, where in requests:
        _check_quantizable(model, parts, bit_format, where, folder)
        uses_fp8_matmul = where == "tune.quantize.fp8"
        for linear in _select_linears(model, parts):
            if supports_fp8_matmul(linear) or not uses_fp8_matmul:
                with torch.device("meta"):
                    linear.set_quantized_weight(
                        MATRIX_TYPES[bit_format], Fp8Weight if uses_fp8_matmul else QuantizedWeight
                    )


def _check_quantizable(
    model: VisionLanguageModel,
    parts: Collection[ModelPart],
    bit_format: str,
    where: str,
    folder: Path,
) -> None:
    if parts and bit_format == "nf4":
        import_bitsandbytes(where)
    if "embeddings" in parts and model.lm_head is None:
        raise _tied_embeddings_error(folder)
    if "language" in parts and model.config.decoder.moe is not None:
        raise _moe_error(folder, bit_format, where)


def _select_linears(model: nn.Module, parts: Collection[ModelPart]) -> list[FusedLinear]:
    return [
        module
        for path, module in model.named_modules()
        if isinstance(module, FusedLinear) and get_part(f"{path}.weight") in parts
    ]


def supports_fp8_matmul(linear: FusedLinear) -> bool:
    """Return True if the sizes of all layers of a fused linear support FP8 matmuls."""
    return not any(
        size % FP8_ALIGNMENT for size in (linear.in_features, *linear.output_sizes.values())
    )


def count_unquantized_layers(model: nn.Module, fp8_parts: Collection[ModelPart]) -> int:
    """Count the linear layers of `fp8_parts` whose sizes do not support FP8 matmuls."""
    linears = _select_linears(model, fp8_parts)
    return sum(len(linear.output_sizes) for linear in linears if not supports_fp8_matmul(linear))


def _tied_embeddings_error(folder: Path) -> UserError:
    return UserError(
        "embeddings are in nf4, but the head of this model is tied to the embedding table, which "
        "is not quantized",
        where="tune.quantize.nf4",
        expected="embeddings only for a model with a head of its own (tie_word_embeddings false)",
        remedy=f"leave embeddings out of nf4 for {folder.name}",
    )


def _moe_error(folder: Path, weight_format: str, where: str) -> UserError:
    excluded = (
        f"{where} {weight_format} out"
        if where == "--weight-format"
        else f"language out of {weight_format}"
    )
    return UserError(
        f"language is in {weight_format}, but this model has experts, which remain in 16 bits and "
        "hold nearly all of its parameters",
        where=where,
        expected="language only for a model without experts",
        remedy=f"leave {excluded} for {folder.name}",
    )


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""Dtypes of weights and computation by their names in settings."""

_LM_HEAD_KEY = "lm_head.weight"

_PATCH_EMBED_KEY = "visual.patch_embed.proj.weight"

_QWEIGHT_SUFFIX = ".qweight"
"""Suffix of a tensor name that only layers quantized with GPTQ have."""

_INDEX_FILE = "model.safetensors.index.json"

_COPIED_SUFFIXES = {".json", ".txt", ".jinja", ".model", ".tiktoken"}

_REMEDY = "download the model again"


@dataclass(frozen=True)
class HubTensor:
    """Tensor of the published model and its location in the native model.

    Attributes:
        name: Native name, which `Architecture.to_hub_name` maps to the published name.
        data: View of the parameter that holds the tensor, or part of a quantized matrix. Fused
            linears hold several tensors, and the patch embedding is flattened.
        shape: Published shape.
    """

    name: str
    data: Tensor | WeightTensorSpec
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        """Number of elements of the tensor."""
        return math.prod(self.shape)

    @property
    def dtypes(self) -> Collection[str]:
        """Dtypes that a file may have for this tensor, by their safetensors names."""
        return self.data.dtypes if isinstance(self.data, WeightTensorSpec) else SAFETENSORS_DTYPES

    @property
    def is_dense(self) -> bool:
        """True if files store dense values, even if the model quantizes them."""
        return not isinstance(self.data, WeightTensorSpec) or self.data.name == "weight"

    def matches_shape(self, header: TensorHeader) -> bool:
        """Return True if the shape of a tensor in a file matches this tensor.

        Weights of experts may be transposed: transformers 5 writes them with outputs first.
        """
        shape = header.shape
        transposed = (shape[0], shape[2], shape[1]) if len(shape) == 3 else None
        return self.shape in (shape, transposed)

    def load(self, values: Tensor) -> None:
        """Load the values of a file tensor, and quantize them if the model requires it."""
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
        if any(path == prefix or path.startswith(f"{prefix}.") for prefix in skipped):
            continue
        if isinstance(module, FusedLinear):
            skipped += [f"{path}.adapter", f"{path}.weight"]
            yield from _linear_tensors(path, module)
        else:
            # Buffers hold constants that are stored but never trained.
            named_tensors = (
                module.named_parameters(recurse=False),
                module.named_buffers(recurse=False),
            )
            for key, parameter in chain(*named_tensors):
                name, data = f"{path}.{key}", parameter.detach()
                shape = tuple(data.shape)
                if name == _PATCH_EMBED_KEY:
                    shape = (len(data), *model.config.vision.patch_shape)
                yield HubTensor(name, data, shape)


def _linear_tensors(path: str, linear: FusedLinear) -> Iterator[HubTensor]:
    sizes = list(linear.output_sizes.values())
    weights: Sequence[Tensor | QuantizedMatrix] = (
        linear.weight.matrices
        if isinstance(linear.weight, QuantizedWeight)
        else torch.split(linear.weight.detach(), sizes)
    )
    biases = (
        [None] * len(sizes) if linear.bias is None else torch.split(linear.bias.detach(), sizes)
    )
    for output, weight, bias in zip(linear.output_sizes, weights, biases, strict=True):
        layer = hub_name(path, output)
        if isinstance(weight, QuantizedMatrix):
            for spec in weight.tensor_specs():
                yield HubTensor(f"{layer}.{spec.name}", spec, spec.shape)
        else:
            yield HubTensor(
                f"{layer}.weight", weight, (linear.output_sizes[output], linear.in_features)
            )
        if bias is not None:
            yield HubTensor(f"{layer}.bias", bias, tuple(bias.shape))


def load_model(
    folder: ModelFolder,
    dtype: torch.dtype,
    device: torch.device,
    nf4_parts: Collection[ModelPart] = (),
    weight_format: WeightFormat = "auto",
    fp8_parts: Collection[ModelPart] = (),
) -> VisionLanguageModel:
    """Load the native model of a hub folder, reading every tensor exactly once.

    Layers published with GPTQ (`model.quant.int4`) remain in that format.

    Args:
        folder: Folder of the model.
        dtype: Compute dtype.
        device: Target device.
        nf4_parts: Parts whose linear layers are quantized to NF4 one by one while they are read,
            from the stored dtype, so that the codes do not depend on the compute dtype. Of the
            embeddings this is the head.
        weight_format: If not auto, format to which the decoder and an untied head are quantized,
            instead of the other parts (`model.weights_io`).
        fp8_parts: Parts with FP8 weights, which use FP8 matmuls in training (`model.quant.fp8`).

    Raises:
        UserError: A file is damaged; a tensor is missing, unknown, duplicate or wrongly shaped; the
            quantization is unsupported; the folder was changed since finesight wrote it;
            quantization of a tied head or of a decoder with experts was requested; or a package is
            missing.
    """
    group_size = gptq_group_size(folder)
    hf_config = ConfigReader(folder.config, str(folder.path / "config.json"))
    preprocessor = ConfigReader(
        folder.preprocessor_config, str(folder.path / "preprocessor_config.json")
    )
    files = folder.weight_files()
    # Verify digests, also of files converted from pickles.
    for written_folder in dict.fromkeys((folder.path, *(file.parent for file in files))):
        if (written_folder / DIGESTS_FILE).is_file():
            verify_folder(written_folder)
    model = build_model(hf_config, preprocessor, dtype, torch.device("meta"))
    quantize_model_parts(model, nf4_parts, fp8_parts, weight_format, folder.path)
    to_native_name = model.architecture.to_native_name
    headers = [tensor for file in files for tensor in read_header(file, to_native_name)]
    if group_size is not None:
        layers = {t.layer_name for t in headers if t.native_name.endswith(_QWEIGHT_SUFFIX)}
        quantize_gptq_layers(model, layers, group_size, str(folder.path))
    expected = {tensor.name: tensor for tensor in hub_tensors(model)}
    if model.config.decoder.tie_word_embeddings:
        # A tied head may be stored in addition; the embedding is used.
        headers = [tensor for tensor in headers if tensor.native_name != _LM_HEAD_KEY]
    headers = _drop_zero_biases(headers, expected)
    _check_tensors(headers, expected, folder.path)
    with raise_on_failed_allocation(hf_config.file):
        materialize_parameters(model, device)
    # List the tensors again, with allocated parameters.
    expected = {tensor.name: tensor for tensor in hub_tensors(model)}
    transposed = _find_transposed_experts(headers, expected)
    for file in files:
        with open_safetensors(file) as weights:
            for tensor in headers:
                if tensor.file == file:
                    values = weights.get_tensor(tensor.name)
                    expected[tensor.native_name].load(
                        values.mT if tensor.native_name in transposed else values
                    )
    return model


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
    """Remove the zero biases that AutoGPTQ adds to layers without a bias.

    Raises UserError for a bias with other values.
    """
    zero_biases = [
        t
        for t in headers
        if t.native_name.endswith(".bias")
        and t.native_name not in expected
        and t.layer_name + _QWEIGHT_SUFFIX in expected
    ]
    for tensor in zero_biases:
        with open_safetensors(tensor.file) as weights:
            if weights.get_tensor(tensor.name).any():
                raise tensor_error([tensor.name], "of layers without a bias", "zeros", tensor.file)
    return [tensor for tensor in headers if tensor not in zero_biases]


def stored_precision(folder: ModelFolder) -> str:
    """Return the dtype name of a folder's weights, fp32 for mixed dtypes.

    Quantized layers are ignored. Raises UserError for unsupported dtypes.
    """
    is_quantized = gptq_group_size(folder) is not None
    tensors = [tensor for file in folder.weight_files() for tensor in read_header(file)]
    packed_layers = {
        t.layer_name for t in tensors if is_quantized and t.native_name.endswith(_QWEIGHT_SUFFIX)
    }
    dtypes = {tensor.dtype for tensor in tensors if tensor.layer_name not in packed_layers}
    unsupported = sorted(dtypes.difference(SAFETENSORS_DTYPES)) if dtypes else ["none"]
    if unsupported:
        raise UserError(
            f"weights of type {unsupported[0]}",
            where=str(folder.path),
            expected=f"one of {', '.join(SAFETENSORS_DTYPES)}",
            remedy=_REMEDY,
        )
    return SAFETENSORS_DTYPES[dtypes.pop()] if len(dtypes) == 1 else "fp32"


def _check_tensors(
    headers: Sequence[TensorHeader], expected: Mapping[str, HubTensor], folder: Path
) -> None:
    """Check that every expected tensor exists exactly once, and no others.

    Only names, shapes and dtypes in the file headers are checked. Raises UserError.
    """
    unknown = [t for t in headers if t.native_name not in expected]
    if unknown:
        names = [t.name for t in unknown]
        raise tensor_error(
            names, "unknown to this model", "the tensors of config.json", unknown[0].file
        )
    counts = Counter(t.native_name for t in headers)
    repeated = [t for t in headers if counts[t.native_name] > 1]
    if repeated:
        raise tensor_error([t.name for t in repeated], "duplicates", "each once", repeated[-1].file)
    wrong_shape = [t for t in headers if not expected[t.native_name].matches_shape(t)]
    if wrong_shape:
        shapes = [f"{t.name} {t.shape} not {expected[t.native_name].shape}" for t in wrong_shape]
        raise tensor_error(
            shapes, "of another shape", "the shapes of config.json", wrong_shape[0].file
        )
    unsupported = [t for t in headers if t.dtype not in expected[t.native_name].dtypes]
    if unsupported:
        found_dtypes = [f"{t.name} {t.dtype}" for t in unsupported]
        supported = f"one of {', '.join(expected[unsupported[0].native_name].dtypes)}"
        raise tensor_error(found_dtypes, "of another type", supported, unsupported[0].file)
    missing = [name for name in expected if name not in counts]
    if missing:
        raise tensor_error(missing, "missing", "all tensors of config.json", folder)


def save_model(
    model: VisionLanguageModel,
    folder: ModelFolder,
    target: Path,
    dtype: torch.dtype,
    max_shard_bytes: float = 5e9,
) -> None:
    """Write the weights of a model, without adapters, as a hub folder.

    Quantized weights are written as stored in `folder`.

    Args:
        model: Model whose adapters are merged or removed.
        folder: Folder that the model was loaded from; config and tokenizer files are copied.
        target: Target folder; `storage.write_folder` makes the write atomic.
        dtype: Dtype of dense weights.
        max_shard_bytes: Maximum size of a weight file in bytes.
    """
    linears = [module for module in model.modules() if isinstance(module, FusedLinear)]
    num_adapters = sum(linear.adapter is not None for linear in linears)
    assert num_adapters == 0, f"{num_adapters} linear layers still have an adapter"
    tensors = list(hub_tensors(model))
    source_headers = _read_source_headers(folder, model) if find_quantized_weights(model) else {}
    dtypes = {t.name: _stored_dtype(t, dtype, source_headers) for t in tensors}
    shards = _split_shards(tensors, dtypes, max_shard_bytes)
    dropped_keys = (
        () if any(name.endswith(_QWEIGHT_SUFFIX) for name in dtypes) else ("quantization_config",)
    )
    dense_dtypes = {dtypes[t.name] for t in tensors if t.is_dense}
    # config.json names one dtype for all tensors: fp32 if they differ.
    copy_model_files(
        folder, target, dtype if dense_dtypes == {dtype} else torch.float32, dropped_keys
    )
    to_hub_name = model.architecture.to_hub_name
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        single = len(shards) == 1
        file = (
            "model.safetensors" if single else f"model-{number:05}-of-{len(shards):05}.safetensors"
        )
        # Always copy: safetensors rejects views of a shared parameter.
        content = {to_hub_name(t.name): _to_file_tensor(t, dtype, source_headers) for t in shard}
        save_file(content, target / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(content, file)
    if len(shards) > 1:
        size = sum(t.num_elements * dtypes[t.name].itemsize for t in tensors)
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (target / _INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


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


def _read_source_headers(
    folder: ModelFolder, model: VisionLanguageModel
) -> dict[str, TensorHeader]:
    to_native_name = model.architecture.to_native_name
    return {
        t.native_name: t
        for file in folder.weight_files()
        for t in read_header(file, to_native_name)
    }


def _stored_dtype(
    tensor: HubTensor, dtype: torch.dtype, source_headers: Mapping[str, TensorHeader]
) -> torch.dtype:
    if not isinstance(tensor.data, WeightTensorSpec):
        return dtype
    kind = source_headers[tensor.name].dtype
    return torch.int32 if kind == "I32" else DTYPES[SAFETENSORS_DTYPES[kind]]


def _to_file_tensor(
    tensor: HubTensor, dtype: torch.dtype, source_headers: Mapping[str, TensorHeader]
) -> Tensor:
    if isinstance(tensor.data, WeightTensorSpec):
        source = source_headers[tensor.name]
        with open_safetensors(source.file) as weights:
            values: Tensor = weights.get_tensor(source.name)
        return values
    return tensor.data.to("cpu", dtype, copy=True).view(tensor.shape)


def copy_model_files(
    folder: ModelFolder, target: Path, dtype: torch.dtype, dropped_keys: Collection[str] = ()
) -> None:
    """Copy config.json and other small files of a model folder to `target`.

    The config is written with `dtype` and without `dropped_keys`. Weights, manifests and digests
    are not copied.
    """
    for path in sorted(folder.path.iterdir()):
        is_copied = path.suffix in _COPIED_SUFFIXES or path.name.startswith(("LICENSE", "NOTICE"))
        source = folder.find_file(path.name) if is_copied else None
        if source is None or path.name in (
            DIGESTS_FILE,
            MANIFEST_FILE,
            _INDEX_FILE,
            PICKLE_INDEX_FILE,
            "config.json",
        ):
            continue
        (target / path.name).write_bytes(source.read_bytes())
    dtype_name = str(dtype).removeprefix("torch.")
    config = {
        key: dtype_name if key in ("dtype", "torch_dtype") else value
        for key, value in folder.config.items()
        if key not in dropped_keys
    }
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (target / "config.json").write_text(text, encoding="utf-8")


@torch.no_grad()
def init_random_model(
    config: Mapping[str, object],
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
    preprocessor: Mapping[str, object] = PREPROCESSOR_DEFAULTS,
) -> VisionLanguageModel:
    """Build a model with random weights, drawn on `device`.

    Weights and biases are drawn from a normal distribution with standard deviation 0.02, norm
    weights are one and norm biases zero. The values depend on seed, dtype and device type. Constant
    position embeddings are those of published models.
    """
    model = build_model(
        ConfigReader(config), ConfigReader(preprocessor, "preprocessor_config.json"), dtype, device
    )
    generator = torch.Generator(device).manual_seed(seed)
    for module in model.modules():
        norm = isinstance(module, nn.LayerNorm | nn.RMSNorm)
        for key, parameter in module.named_parameters(recurse=False):
            if norm:
                parameter.fill_(1.0 if key == "weight" else 0.0)
            else:
                parameter.normal_(0.0, 0.02, generator=generator)
        if isinstance(module, AttentionPool):
            module.init_position_embeddings()
    return model
