"""Models in four bits as AutoGPTQ publishes them, packed number by number, and dense twins."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from finesight.files.storage import DIGESTS_FILE
from finesight.model_folder import ModelFolder

QUANTIZED_LAYERS = re.compile(
    r"(transformer\.h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.(w1|w2|c_proj))"
    r"|model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj)\.weight"
)
"""The linear layers of the language model, which alone are quantised."""

INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True)
class GptqConfig:
    """How a model is quantised."""

    group: int = 32
    act_order: bool = False
    symmetric: bool = True

    @property
    def config(self) -> dict[str, Any]:
        """Its `quantization_config`, as in the published release."""
        config = {"quant_method": "gptq", "bits": 4, "group_size": self.group, "damp_percent": 0.01}
        config |= {"sym": self.symmetric, "desc_act": self.act_order, "static_groups": False}
        config |= {"model_file_base_name": "model", "model_name_or_path": None}
        return config | {"true_sequential": True}


GPTQ_CONFIGS = [
    *(GptqConfig(), GptqConfig(act_order=True), GptqConfig(symmetric=False), GptqConfig(group=-1)),
    GptqConfig(group=64, act_order=True, symmetric=False),
]


def pack_weight(
    weight: Tensor, gptq_config: GptqConfig, seed: int = 0
) -> tuple[dict[str, Tensor], Tensor]:
    """The four tensors of a matrix [O, I], and the fp32 numbers that they stand for."""
    w = weight.float().numpy()
    outputs, inputs = w.shape
    group = inputs if gptq_config.group == -1 else gptq_config.group
    rng = np.random.default_rng(seed)
    order = rng.permutation(inputs) if gptq_config.act_order else np.arange(inputs)
    g_idx = np.empty(inputs, np.int32)
    g_idx[order] = np.arange(inputs) // group
    groups = range(g_idx.max() + 1)
    largest = np.stack([np.abs(w[:, g_idx == g]).max(axis=1) for g in groups])
    scales = (largest / 7 + 1e-4).astype(np.float16)
    zeros = np.full((len(groups), outputs), 8, np.int64)
    if not gptq_config.symmetric:
        zeros = rng.integers(0, 16, zeros.shape)
    scale, zero = scales[g_idx].astype(np.float32), zeros[g_idx]
    codes = np.clip(np.round(w.T / scale) + zero, 0, 15).astype(np.int64)
    dense = scale * (codes - zero).astype(np.float32)
    qzeros = _pack_eight_nibbles(((zeros - 1) % 16).T).T
    arrays = {"qweight": _pack_eight_nibbles(codes), "qzeros": qzeros}
    arrays |= {"scales": scales, "g_idx": g_idx}
    tensors = {name: torch.tensor(array) for name, array in arrays.items()}
    return tensors, torch.tensor(np.ascontiguousarray(dense.T))


def _pack_eight_nibbles(values: NDArray[np.int64]) -> NDArray[np.int32]:
    """[8 A, B] to [A, B], the first of eight in the lowest bits."""
    shifts = 4 * np.arange(8, dtype=np.uint32)[:, None]
    nibbles = values.reshape(-1, 8, values.shape[1]).astype(np.uint32)
    return np.bitwise_or.reduce(nibbles << shifts, axis=1).view(np.int32)


def write_quantized_model(
    source: ModelFolder, target: Path, gptq_config: GptqConfig
) -> tuple[ModelFolder, ModelFolder]:
    """The model of `source` in four bits, in two files, and in full as what these stand for."""
    pair = []
    for name in ("int4", "dense"):
        (target / name).mkdir(parents=True)
        for path in source.path.iterdir():
            if path.suffix != ".safetensors" and path.name != DIGESTS_FILE:
                (target / name / path.name).write_bytes(path.read_bytes())
        pair.append(ModelFolder(target / name))
    tensors, dense, four = load_file(source.path / "model.safetensors"), {}, {}
    for seed, (name, tensor) in enumerate(sorted(tensors.items())):
        if QUANTIZED_LAYERS.fullmatch(name):
            stem = name.removesuffix("weight")
            pieces, dense[name] = pack_weight(tensor, gptq_config, seed)
            four |= {stem + piece: values for piece, values in pieces.items()}
            # Every quantised layer has a bias in a file, zeros where the model has none.
            four.setdefault(f"{stem}bias", torch.zeros(len(tensor), dtype=torch.float16))
        else:
            dense[name] = tensor
            four[name] = tensor
    save_file(dense, pair[1].path / "model.safetensors")
    names = sorted(four)
    shards = {f"model-0000{n + 1}-of-00002.safetensors": names[n::2] for n in range(2)}
    for shard, own in shards.items():
        save_file({name: four[name].contiguous() for name in own}, pair[0].path / shard)
    index = {"weight_map": {name: shard for shard, own in shards.items() for name in own}}
    (pair[0].path / INDEX_FILE).write_text(json.dumps(index))
    change_config(pair[0], quantization_config=gptq_config.config)
    return pair[0], pair[1]


def change_config(folder: ModelFolder, **changes: Any) -> None:
    """Write other settings into a folder's config.json."""
    path = folder.path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def read_index(folder: ModelFolder) -> dict[str, str]:
    """The names of a folder's tensors and the files that hold them."""
    found: dict[str, str] = json.loads((folder.path / INDEX_FILE).read_text())["weight_map"]
    return found


def change_tensor(
    folder: ModelFolder, ending: str, tensor: Tensor | None, more: dict[str, Tensor] | None = None
) -> None:
    """Put another tensor in the place of the first with that ending, or none, and more beside."""
    index = read_index(folder)
    name = next(n for n in sorted(index) if n.endswith(ending))
    file = folder.path / index[name]
    tensors = load_file(file)
    del tensors[name]
    changed = {} if tensor is None else {name: tensor}
    save_file(tensors | changed | (more or {}), file)


def with_untied_head(folder: ModelFolder) -> ModelFolder:
    """The same model with a head of its own, of other numbers than its embeddings."""
    file = folder.path / "model.safetensors"
    tensors = load_file(file)
    table = next(t for n, t in tensors.items() if n.endswith("embed_tokens.weight"))
    save_file(tensors | {"lm_head.weight": table.flip(1).contiguous()}, file)
    assert folder.config["tie_word_embeddings"]
    change_config(folder, tie_word_embeddings=False)
    return ModelFolder(folder.path)
