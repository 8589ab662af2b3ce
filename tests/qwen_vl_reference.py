"""Reference values of the published code of Qwen-VL with small random models.

`model/reference_values/qwen_vl.json` and `.npz` contain, for each case, the loss, the product of
the logits of each token with a random vector, all logits of three tokens, for the gradient of each
parameter its products with three random vectors and its norm, and the tokens of greedy generation.
Weights, tokens and images are not stored: both sides draw them with the rules below. The numbers
were computed in fp32 with torch 2.13 on a CPU.
"""

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from finesight.encode.tokenization import EncodedSample, TokenizedSample, VisualSpan
from finesight.model.config import ConfigReader
from finesight.model.vlm import VisionLanguageModel, build_model
from finesight.model.weights_io import hub_tensors
from finesight.model_folder import PREPROCESSOR_DEFAULTS
from finesight.vision.image_processing import GridTHW, PatchConfig, patchify

_REFERENCE_DIR = Path(__file__).parent / "model" / "reference_values"
_REFERENCE_DATA = json.loads((_REFERENCE_DIR / "qwen_vl.json").read_text(encoding="utf-8"))
ARRAYS: Mapping[str, NDArray[np.float32]] = dict(np.load(_REFERENCE_DIR / "qwen_vl.npz"))
CONFIGS: dict[str, dict[str, Any]] = {
    name: {"model_type": "qwen", **config} for name, config in _REFERENCE_DATA["configs"].items()
}
CASES: list[dict[str, Any]] = _REFERENCE_DATA["cases"]
GENERATED: list[dict[str, Any]] = _REFERENCE_DATA["generated"]
START, END, PAD = 300, 301, 302


def make_native_model(config: Mapping[str, Any]) -> VisionLanguageModel:
    """The native model of that configuration with the weights that the published one had."""
    settings = ConfigReader(config), ConfigReader(PREPROCESSOR_DEFAULTS)
    model = build_model(*settings, torch.float32, torch.device("cpu"))
    for name, tensor in to_published_layout(model).items():
        tensor.copy_(torch.from_numpy(_make_weight(name, tuple(tensor.shape))))
    return model


def to_published_layout(model: VisionLanguageModel) -> dict[str, Tensor]:
    """The model's tensors by their published names, in their published shapes."""
    named = model.architecture.to_hub_name
    return {named(tensor.name): tensor.data.view(tensor.shape) for tensor in hub_tensors(model)}


def _make_weight(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    noise = _make_noise(name, shape)
    if name.endswith(("pos_embed", "wte.weight")):
        return (0.5 * noise).astype(np.float32)
    if len(shape) == 1:
        return (0.1 * noise + name.endswith("weight")).astype(np.float32)
    return (1.2 / np.sqrt(np.prod(shape[1:])) * noise).astype(np.float32)


def _make_noise(name: str, shape: tuple[int, ...]) -> NDArray[np.float64]:
    return np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)


@dataclass(frozen=True)
class ReferenceConversation:
    """Make tokens and images of a case; `labels_T` are -100 for tokens without a target."""

    encoded: EncodedSample
    labels_T: NDArray[np.int64]


def make_conversation(
    config: Mapping[str, Any], parts: Sequence[Any], seed: int
) -> ReferenceConversation:
    """Draw random tokens for a number, and a random image for ("p", its seed)."""
    visual = config["visual"]
    side, queries = visual["image_size"] // visual["patch_size"], visual["n_queries"]
    geometry = PatchConfig(visual["patch_size"], side // int(queries**0.5), 1)
    rng = np.random.RandomState(seed)
    ids: list[int] = []
    spans: list[VisualSpan] = []
    patches = [np.empty((0, geometry.patch_dim), np.uint8)]
    for part in parts:
        if isinstance(part, int):
            ids += rng.randint(0, START, part).tolist()
            continue
        size = (visual["image_size"],) * 2
        pixels = np.random.RandomState(part[1]).randint(0, 256, (*size, 3)).astype(np.uint8)
        patches.append(patchify([Image.fromarray(pixels)], size, geometry))
        start = len(ids) + 1
        ids += [START, *[PAD] * queries, END]
        grid: GridTHW = (1, side, side)
        spans.append(VisualSpan("image", start, start + queries, grid, (Path("p"),), size, size))
    position_ids_3T = np.tile(np.arange(len(ids), dtype=np.int32), (3, 1))
    ids_T = np.array(ids, dtype=np.int32)
    loss_mask_T = np.zeros(len(ids), dtype=bool)
    outline = TokenizedSample(f"{parts}", ids_T, loss_mask_T, position_ids_3T, tuple(spans))
    return ReferenceConversation(
        EncodedSample(outline, np.concatenate(patches)), _make_labels(ids_T, seed)
    )


def _make_labels(ids_T: NDArray[np.int32], seed: int) -> NDArray[np.int64]:
    """Two of five tokens of text."""
    labels_T = np.where(np.random.RandomState(1000 + seed).rand(len(ids_T)) < 0.4, ids_T, -100)
    labels_T[ids_T >= START] = -100
    return labels_T.astype(np.int64)


def project_gradient(name: str, gradient: Tensor) -> NDArray[np.float64]:
    """What is stored of a gradient: its products with three random vectors, and its norm."""
    flat = gradient.double().flatten().numpy()
    seed = zlib.crc32(f"projection {name}".encode())
    vectors = np.random.RandomState(seed).standard_normal((3, flat.size))
    return np.append(vectors @ flat, np.linalg.norm(flat))


def project_logits(logits_TV: Tensor) -> NDArray[np.float64]:
    """What is stored of each token's logits."""
    vector_V = np.random.RandomState(77).standard_normal(logits_TV.shape[1])
    products_T: NDArray[np.float64] = logits_TV.detach().double().numpy() @ vector_V
    return products_T
