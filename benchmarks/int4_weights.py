"""Write a model with random 4-bit weights in the layout of AutoGPTQ.

    python benchmarks/int4_weights.py MODEL OUT

MODEL is a folder with 16-bit safetensors. The linear layers of the decoder get random codes, one
scale per 128 inputs for the usual weight magnitude (`init_random_model`), and zero points of 8.
Other tensors are copied.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from finesight.model_folder import ModelFolder

GROUP_SIZE = 128
SCALE = 0.02 / 4.6
"""4.6 is the standard deviation of integers from 0 to 15."""

QUANTIZED_LAYERS = re.compile(
    r"transformer\.h\.\d+\..+\.weight|model\.layers\.\d+\..+_proj\.weight"
)


def random_int4_tensors(out_features: int, in_features: int) -> dict[str, Tensor]:
    """Make the tensors of one layer. A 32-bit integer holds eight codes, or eight zero points minus
    one."""
    groups = -(-in_features // GROUP_SIZE)
    low, high = -(1 << 31), (1 << 31) - 1
    return {
        "qweight": torch.randint(low, high, (in_features // 8, out_features), dtype=torch.int32),
        "qzeros": torch.full((groups, out_features // 8), 0x77777777, dtype=torch.int32),
        "scales": torch.full((groups, out_features), SCALE, dtype=torch.float16),
        "g_idx": torch.arange(in_features, dtype=torch.int32) // GROUP_SIZE,
    }


def write_int4(model: Path, out: Path) -> Path:
    """Write the model folder shard by shard."""
    source = ModelFolder(model)
    out.mkdir(parents=True)
    names: dict[str, str] = {}
    for file in source.weight_files():
        tensors: dict[str, Tensor] = {}
        for name, tensor in load_file(file).items():
            if QUANTIZED_LAYERS.fullmatch(name) and tensor.dim() == 2:
                stem, (outputs, inputs) = name.removesuffix("weight"), tensor.shape
                tensors |= {
                    stem + key: value for key, value in random_int4_tensors(outputs, inputs).items()
                }
            else:
                tensors[name] = tensor
        save_file(tensors, out / file.name)
        names |= dict.fromkeys(tensors, file.name)
    (out / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    gptq = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": GROUP_SIZE,
        "desc_act": False,
        "sym": True,
    }
    config = source.config | {"quantization_config": gptq}
    (out / "config.json").write_text(json.dumps(config, indent=2))
    for path in source.path.iterdir():
        described = path.suffix in (".json", ".tiktoken", ".jinja", ".txt")
        if described and not (out / path.name).exists() and path.name != "sha256.json":
            (out / path.name).write_bytes(path.read_bytes())
    return out


if __name__ == "__main__":
    print(json.dumps({"folder": str(write_int4(Path(sys.argv[1]), Path(sys.argv[2])))}))
