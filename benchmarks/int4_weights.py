"""A model's folder with random four bits in the layout of AutoGPTQ, to measure with.

    python benchmarks/int4_weights.py MODEL OUT

MODEL is a folder with safetensors in 16 bits. The linear layers of its decoder are replaced: codes
are random, a scale for 128 inputs makes them as large as the weights that models are made with
(`random_model`), and every zero is 8. All other tensors are copied.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from finesight.hub import ModelFolder

GROUP = 128
SCALE = 0.02 / 4.6
"""4.6 is the standard deviation of whole numbers from 0 to 15."""

LAYERS = re.compile(r"transformer\.h\.\d+\..+\.weight|model\.layers\.\d+\..+_proj\.weight")


def pieces(outputs: int, inputs: int) -> dict[str, Tensor]:
    """The tensors of one layer; a number of 32 bits holds eight codes, or eight zeros less one."""
    groups = -(-inputs // GROUP)
    low, high = -(1 << 31), (1 << 31) - 1
    return {
        "qweight": torch.randint(low, high, (inputs // 8, outputs), dtype=torch.int32),
        "qzeros": torch.full((groups, outputs // 8), 0x77777777, dtype=torch.int32),
        "scales": torch.full((groups, outputs), SCALE, dtype=torch.float16),
        "g_idx": torch.arange(inputs, dtype=torch.int32) // GROUP,
    }


def write_int4(model: Path, out: Path) -> Path:
    """Write the folder, shard by shard."""
    source = ModelFolder(model)
    out.mkdir(parents=True)
    names: dict[str, str] = {}
    for file in source.weight_files():
        tensors: dict[str, Tensor] = {}
        for name, tensor in load_file(file).items():
            if LAYERS.fullmatch(name) and tensor.dim() == 2:
                stem, (outputs, inputs) = name.removesuffix("weight"), tensor.shape
                tensors |= {stem + key: value for key, value in pieces(outputs, inputs).items()}
            else:
                tensors[name] = tensor
        save_file(tensors, out / file.name)
        names |= dict.fromkeys(tensors, file.name)
    (out / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}
    config = source.config | {"quantization_config": gptq}
    (out / "config.json").write_text(json.dumps(config, indent=2))
    for path in source.path.iterdir():
        described = path.suffix in (".json", ".tiktoken", ".jinja", ".txt")
        if described and not (out / path.name).exists() and path.name != "sha256.json":
            (out / path.name).write_bytes(path.read_bytes())
    return out


if __name__ == "__main__":
    print(json.dumps({"folder": str(write_int4(Path(sys.argv[1]), Path(sys.argv[2])))}))
