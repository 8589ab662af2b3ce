"""Compare native models to transformers at full size in the inference data type.

    python benchmarks/model_parity_cuda.py FOLDER [NAME...] [--out FILE]
    python benchmarks/model_parity_cuda.py --tiny

FOLDER contains model folders (config.json suffices); NAME selects some of them. With random bf16
weights, the script prints one JSON line per model. It compares native logits of a packed batch
(images, a video, text) to transformers with SDPA attention on single samples. It also compares
transformers to itself with other attention kernels (SDPA default, SDPA math, eager), and all of
them to transformers in fp32. Errors are the maximum and RMS difference, relative to the same value
of the reference. `within` is true if the native error is not larger than the error between two
kernels of transformers. --tiny uses two small models on the CPU.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from finesight.encode.batch import PackedBatch
from finesight.family_components import FAMILIES
from finesight.model.config import ConfigReader
from finesight.model.vlm import VisionLanguageModel, build_model
from finesight.model.weights_io import hub_tensors
from finesight.model_folder import PREPROCESSOR_DEFAULTS
from finesight.vision.image_processing import GridTHW


@dataclass(frozen=True)
class ParityCase:
    """Random text with random images or a video."""

    name: str
    ids_T: Tensor
    modality_T: Tensor
    grids: tuple[GridTHW, ...]
    patches_ND: Tensor


def make_case(config: dict[str, Any], name: str, grids: Sequence[GridTHW], seed: int) -> ParityCase:
    """Make a case: 12 text tokens before, between and after the grids.

    `name` selects images or a video. Qwen3-VL processes the frame pairs of a video separately.
    """
    rng = np.random.default_rng(seed)
    film = name == "video"
    if film and config["model_type"] == "qwen3_vl":
        grids = [(1, h, w) for t, h, w in grids for _ in range(t)]
    marker = config["video_token_id" if film else "image_token_id"]
    vocabulary = config.get("text_config", config)["vocab_size"]
    words = min(vocabulary, config["vision_start_token_id"])
    ids = rng.integers(0, words, 12).tolist()
    kinds = [0] * 12
    for t, h, w in grids:
        count = t * h * w // 4
        ids += [config["vision_start_token_id"], *[marker] * count, config["vision_end_token_id"]]
        ids += rng.integers(0, words, 12).tolist()
        kinds += [0, *[2 if film else 1] * count, *[0] * 13]
    num_patches = sum(t * h * w for t, h, w in grids)
    patch_size = 6 * config["vision_config"]["patch_size"] ** 2
    patches = rng.integers(0, 256, (num_patches, patch_size), dtype=np.uint8)
    return ParityCase(
        name, torch.tensor(ids), torch.tensor(kinds), tuple(grids), torch.tensor(patches)
    )


def reference_inputs(
    model: Any, parity_case: ParityCase, device: torch.device
) -> dict[str, Tensor]:
    """Build the inputs of transformers: fp32 pixels, grids, 3-D position ids."""
    inputs = {
        "input_ids": parity_case.ids_T[None],
        "mm_token_type_ids": parity_case.modality_T[None],
    }
    if not parity_case.grids:
        index = torch.arange(len(parity_case.ids_T)).expand(3, 1, -1)
        return {name: x.to(device) for name, x in {**inputs, "position_ids": index}.items()}
    mean, std = (
        torch.tensor(PREPROCESSOR_DEFAULTS[key])[:, None] for key in ("image_mean", "image_std")
    )
    pixels = ((parity_case.patches_ND.unflatten(1, (3, -1)) / 255 - mean) / std).flatten(1)
    pixel_key, grid_key = (
        ("pixel_values_videos", "video_grid_thw")
        if parity_case.name == "video"
        else ("pixel_values", "image_grid_thw")
    )
    grids = {grid_key: torch.tensor(parity_case.grids)}
    index, _ = model.model.get_rope_index(**inputs, **grids)
    inputs |= {"position_ids": index, pixel_key: pixels, **grids}
    return {name: x.to(device) for name, x in inputs.items()}


def pack_cases(
    cases: Sequence[ParityCase], reference_inputs: Sequence[dict[str, Tensor]]
) -> PackedBatch:
    """Pack all cases with logits at every position and the position ids of the reference."""
    lengths = tuple(len(case.ids_T) for case in cases)
    ids_T = torch.cat([case.ids_T for case in cases])
    return PackedBatch(
        sample_ids=tuple(case.name for case in cases),
        lengths=lengths,
        grid_thw=tuple(grid for case in cases for grid in case.grids),
        ids_T=ids_T,
        position_ids_3T=torch.cat([x["position_ids"][:, 0].cpu() for x in reference_inputs], dim=1),
        cu_seqlens_S1=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
        patches_ND=torch.cat([case.patches_ND for case in cases]),
        visual_indices_M=torch.cat([case.modality_T for case in cases]).nonzero().squeeze(1),
        logit_indices_L=torch.arange(len(ids_T)),
        labels_L=ids_T,
    )


def reference_model(config: dict[str, Any], device: torch.device) -> Any:
    """Build the transformers model in bf16: weights and biases from N(0, 0.02), norms one."""
    from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

    typed = CONFIG_MAPPING[config["model_type"]].from_dict(config)
    with device:
        model = AutoModelForImageTextToText.from_config(
            typed, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1 or not bool((parameter == 1).all()):
            parameter.data.normal_(0.0, 0.02, generator=generator)
    return model


def native_model(
    config: dict[str, Any], reference: Any, device: torch.device
) -> VisionLanguageModel:
    """Build the native model with a copy of the weights of the reference."""
    settings, pixels = ConfigReader(config), ConfigReader(PREPROCESSOR_DEFAULTS)
    model = build_model(settings, pixels, torch.bfloat16, device)
    named = model.architecture.to_native_name
    found = {named(name): p.detach() for name, p in reference.named_parameters()}
    for tensor in hub_tensors(model):
        tensor.data.copy_(found.pop(tensor.name).view(tensor.data.shape))
    assert not found, f"not in the native model: {sorted(found)[:5]}"
    return model


def relative_error(actual: Tensor, expected: Tensor) -> dict[str, float]:
    """Return maximum and RMS difference, each relative to the value of `expected`."""
    difference = actual.float() - expected.float()
    largest = difference.abs().max() / expected.float().abs().max()
    spread = difference.square().mean().sqrt() / expected.float().square().mean().sqrt()
    return {"max": float(f"{largest:.3g}"), "rms": float(f"{spread:.3g}")}


@torch.no_grad()
def measure_parity(
    config: dict[str, Any], cases: Sequence[ParityCase], device: torch.device
) -> dict[str, Any]:
    """Measure the errors per case and in total."""
    reference = reference_model(config, device)
    ours = native_model(config, reference, device)
    inputs = [reference_inputs(reference, case, device) for case in cases]
    batch = pack_cases(cases, inputs).to(device)
    native = ours.compute_logits(ours(batch)).split(batch.lengths)
    del ours

    def run(attention: str) -> list[Tensor]:
        reference.set_attn_implementation(attention)
        return [reference(**x, use_cache=False).logits[0] for x in inputs]

    sdpa, eager = run("sdpa"), run("eager")
    with sdpa_kernel(SDPBackend.MATH):
        sdpa_fp32 = run("sdpa")
    for parameter in reference.parameters():
        parameter.data = parameter.data.float()
    exact = run("sdpa")
    pairs = {
        "native-sdpa": (native, sdpa),
        "eager-sdpa": (eager, sdpa),
        "math-sdpa": (sdpa_fp32, sdpa),
        "eager-math": (eager, sdpa_fp32),
        "native-fp32": (native, exact),
        "sdpa-fp32": (sdpa, exact),
        "eager-fp32": (eager, exact),
    }
    result: dict[str, Any] = {
        case.name: {
            name: relative_error(found[number], expected[number])
            for name, (found, expected) in pairs.items()
        }
        for number, case in enumerate(cases)
    }
    result["all"] = {
        name: relative_error(torch.cat(list(found)), torch.cat(list(expected)))
        for name, (found, expected) in pairs.items()
    }
    allowed = [result["all"][pair] for pair in ("eager-sdpa", "math-sdpa", "eager-math")]
    found = result["all"]["native-sdpa"]
    result["within"] = all(found[key] <= max(a[key] for a in allowed) for key in ("max", "rms"))
    return result


TINY_LANGUAGE = {
    "vocab_size": 200,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    "tie_word_embeddings": False,
    "bos_token_id": 190,
    "eos_token_id": 191,
    "vision_start_token_id": 192,
    "vision_end_token_id": 193,
    "image_token_id": 194,
    "video_token_id": 195,
}
TINY_VISION = {"depth": 2, "num_heads": 2, "patch_size": 14, "spatial_merge_size": 2} | {
    "temporal_patch_size": 2,
}
TINY = {
    "qwen2_vl": {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 4},
    "qwen2_5_vl": {"hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 72}
    | {"window_size": 112, "fullatt_block_indexes": [1], "hidden_act": "silu"},
    "qwen3_vl": {"hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 72}
    | {"patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "num_position_embeddings": 49}
    | {"deepstack_visual_indexes": [0]},
}
TINY_QWEN3 = {"head_dim": 16, "attention_bias": False} | {
    "rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [4, 2, 2]},
}


def load_configs(args: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Return name and config.json of each model."""
    if args.tiny:
        for family, vision in TINY.items():
            config = {**TINY_LANGUAGE, "model_type": family}
            if family == "qwen3_vl":
                config["text_config"] = TINY_LANGUAGE | TINY_QWEN3
            yield family, {**config, "vision_config": {**TINY_VISION, **vision}}
        return
    for file in sorted(args.folder.glob("*/config.json")):
        config = json.loads(file.read_text())
        chosen = not args.names or file.parent.name in args.names
        if chosen and config.get("model_type") in FAMILIES:
            yield file.parent.name, config


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("."))
    parser.add_argument("names", nargs="*")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    device = torch.device("cpu" if options.tiny else "cuda")
    shrink = 4 if options.tiny else 1
    for name, config in load_configs(options):
        start = time.perf_counter()
        sizes: list[tuple[str, list[GridTHW]]] = [
            ("images", [(1, 40 // shrink, 56 // shrink), (1, 24 // shrink, 16 // shrink)]),
            ("video", [(4, 24 // shrink, 32 // shrink)]),
            ("text", []),
        ]
        cases = [make_case(config, kind, grids, n) for n, (kind, grids) in enumerate(sizes)]
        result = measure_parity(config, cases, device)
        head = {"model": name, "torch": torch.__version__, "device": device.type}
        if device.type == "cuda":
            torch.cuda.empty_cache()
            head |= {"card": torch.cuda.get_device_name()}
        line = json.dumps({**head, **result, "seconds": round(time.perf_counter() - start, 1)})
        print(line, flush=True)
        if options.out is not None:
            with options.out.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
