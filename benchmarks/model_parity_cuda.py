"""Are the native models those of transformers at their true size, in the type they are served in?

    python benchmarks/model_parity_cuda.py FOLDER [NAME...] [--out FILE]
    python benchmarks/model_parity_cuda.py --tiny

FOLDER holds model folders (config.json is enough), NAME chooses among them. On random weights in
bf16, prints one JSON line a model: how far the native logits of a pack (pictures, a video, text)
are from those of transformers with SDPA attention on each sample alone, beside how far transformers
is from itself when its attention kernel changes (SDPA's own choice, SDPA's plain arithmetic,
eager), and all of them from transformers in fp32. Distances are the largest and the root mean
square difference, relative to the same figure of the reference. `within` says that the native
logits are no farther from SDPA's than two of the reference's kernels are from each other. --tiny
does it with two small models on the processor.
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

from finesight.encode.encoded import Grid
from finesight.encode.pack import PackedBatch
from finesight.hub import PREPROCESSOR_DEFAULTS
from finesight.model.geometry import Settings
from finesight.model.network import FAMILIES, VisionLanguageModel, build
from finesight.model.weights import hub_tensors


@dataclass(frozen=True)
class Case:
    """Random text around random pictures or a video."""

    name: str
    ids_T: Tensor
    kinds_T: Tensor
    grids: tuple[Grid, ...]
    patches_ND: Tensor


def make_case(config: dict[str, Any], name: str, grids: Sequence[Grid], seed: int) -> Case:
    """12 tokens of text before, between and after the grids; `name` says what they are. Qwen3-VL
    takes the pairs of frames of a video one by one."""
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
    rows = sum(t * h * w for t, h, w in grids)
    numbers = 6 * config["vision_config"]["patch_size"] ** 2
    patches = rng.integers(0, 256, (rows, numbers), dtype=np.uint8)
    return Case(name, torch.tensor(ids), torch.tensor(kinds), tuple(grids), torch.tensor(patches))


def reference_inputs(model: Any, case: Case, device: torch.device) -> dict[str, Tensor]:
    """What transformers reads: fp32 pixels, grids, and its own 3-D positions."""
    inputs = {"input_ids": case.ids_T[None], "mm_token_type_ids": case.kinds_T[None]}
    if not case.grids:
        index = torch.arange(len(case.ids_T)).expand(3, 1, -1)
        return {name: x.to(device) for name, x in {**inputs, "position_ids": index}.items()}
    mean, std = (
        torch.tensor(PREPROCESSOR_DEFAULTS[key])[:, None] for key in ("image_mean", "image_std")
    )
    pixels = ((case.patches_ND.unflatten(1, (3, -1)) / 255 - mean) / std).flatten(1)
    pixel_key, grid_key = (
        ("pixel_values_videos", "video_grid_thw")
        if case.name == "video"
        else ("pixel_values", "image_grid_thw")
    )
    grids = {grid_key: torch.tensor(case.grids)}
    index, _ = model.model.get_rope_index(**inputs, **grids)
    inputs |= {"position_ids": index, pixel_key: pixels, **grids}
    return {name: x.to(device) for name, x in inputs.items()}


def pack_cases(cases: Sequence[Case], inputs: Sequence[dict[str, Tensor]]) -> PackedBatch:
    """All cases end to end, logits wanted everywhere, positions as the reference has them."""
    lengths = tuple(len(case.ids_T) for case in cases)
    ids_T = torch.cat([case.ids_T for case in cases])
    return PackedBatch(
        sample_ids=tuple(case.name for case in cases),
        lengths=lengths,
        grids=tuple(grid for case in cases for grid in case.grids),
        ids_T=ids_T,
        positions_3T=torch.cat([x["position_ids"][:, 0].cpu() for x in inputs], dim=1),
        bounds_S1=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
        patches_ND=torch.cat([case.patches_ND for case in cases]),
        visual_at_M=torch.cat([case.kinds_T for case in cases]).nonzero().squeeze(1),
        predict_L=torch.arange(len(ids_T)),
        target_L=ids_T,
    )


def reference_model(config: dict[str, Any], device: torch.device) -> Any:
    """transformers' model in bf16, weights and biases from N(0, 0.02), norms at one."""
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
    """The native model with the reference's weights, copied in memory."""
    settings, pixels = Settings(config), Settings(PREPROCESSOR_DEFAULTS)
    model = build(settings, pixels, torch.bfloat16, device)
    named = model.architecture.native_name
    found = {named(name): p.detach() for name, p in reference.named_parameters()}
    for tensor in hub_tensors(model):
        tensor.data.copy_(found.pop(tensor.name).view(tensor.data.shape))
    assert not found, f"not in the native model: {sorted(found)[:5]}"
    return model


def distance(found: Tensor, expected: Tensor) -> dict[str, float]:
    """Largest and root mean square difference, each relative to that of `expected`."""
    difference = found.float() - expected.float()
    largest = difference.abs().max() / expected.float().abs().max()
    spread = difference.square().mean().sqrt() / expected.float().square().mean().sqrt()
    return {"max": float(f"{largest:.3g}"), "rms": float(f"{spread:.3g}")}


@torch.no_grad()
def measure(config: dict[str, Any], cases: Sequence[Case], device: torch.device) -> dict[str, Any]:
    """Distances by case and over all of them."""
    theirs = reference_model(config, device)
    ours = native_model(config, theirs, device)
    inputs = [reference_inputs(theirs, case, device) for case in cases]
    batch = pack_cases(cases, inputs).to(device)
    native = ours.logits(ours(batch)).split(batch.lengths)
    del ours

    def run(attention: str) -> list[Tensor]:
        theirs.set_attn_implementation(attention)
        return [theirs(**x, use_cache=False).logits[0] for x in inputs]

    sdpa, eager = run("sdpa"), run("eager")
    with sdpa_kernel(SDPBackend.MATH):
        plain = run("sdpa")
    for parameter in theirs.parameters():
        parameter.data = parameter.data.float()
    exact = run("sdpa")
    pairs = {
        "native-sdpa": (native, sdpa),
        "eager-sdpa": (eager, sdpa),
        "plain-sdpa": (plain, sdpa),
        "eager-plain": (eager, plain),
        "native-fp32": (native, exact),
        "sdpa-fp32": (sdpa, exact),
        "eager-fp32": (eager, exact),
    }
    result: dict[str, Any] = {
        case.name: {
            name: distance(found[number], expected[number])
            for name, (found, expected) in pairs.items()
        }
        for number, case in enumerate(cases)
    }
    result["all"] = {
        name: distance(torch.cat(list(found)), torch.cat(list(expected)))
        for name, (found, expected) in pairs.items()
    }
    allowed = [result["all"][pair] for pair in ("eager-sdpa", "plain-sdpa", "eager-plain")]
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


def configurations(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and config.json of each model to measure."""
    if options.tiny:
        for family, vision in TINY.items():
            config = {**TINY_LANGUAGE, "model_type": family}
            if family == "qwen3_vl":
                config["text_config"] = TINY_LANGUAGE | TINY_QWEN3
            yield family, {**config, "vision_config": {**TINY_VISION, **vision}}
        return
    for file in sorted(options.folder.glob("*/config.json")):
        config = json.loads(file.read_text())
        chosen = not options.names or file.parent.name in options.names
        if chosen and config.get("model_type") in FAMILIES:
            yield file.parent.name, config


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("."))
    parser.add_argument("names", nargs="*")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    device = torch.device("cpu" if options.tiny else "cuda")
    shrink = 4 if options.tiny else 1
    for name, config in configurations(options):
        start = time.perf_counter()
        sizes: list[tuple[str, list[Grid]]] = [
            ("pictures", [(1, 40 // shrink, 56 // shrink), (1, 24 // shrink, 16 // shrink)]),
            ("video", [(4, 24 // shrink, 32 // shrink)]),
            ("text", []),
        ]
        cases = [make_case(config, kind, grids, n) for n, (kind, grids) in enumerate(sizes)]
        result = measure(config, cases, device)
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
