"""The reference models of transformers, small and random, and packs that both sides can read."""

import json
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from case_files import load_cases
from torch import Tensor, nn

from finesight.encode.batch import PackedBatch
from finesight.model.config import ConfigReader
from finesight.model.vlm import VisionLanguageModel, build_model
from finesight.model.weights_io import hub_tensors, save_model
from finesight.model_folder import PREPROCESSOR_DEFAULTS, ModelFolder
from finesight.vision.image_processing import GridTHW

IMAGE, VIDEO, START, END = 96, 97, 98, 99
TOKEN_IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO}
TOKEN_IDS |= {"vision_start_token_id": START, "vision_end_token_id": END}
CONFIGS = load_cases("tiny_configs")
CPU = torch.device("cpu")


def make_config(family: str, **changes: Any) -> dict[str, Any]:
    """A small config.json in the hub's style; `vision` holds changes of its vision_config."""
    config = deepcopy(CONFIGS[family])
    vision = config["vision"] | changes.pop("vision", {})
    tied = changes.pop("tie_word_embeddings", True)
    top = {"model_type": family, "tie_word_embeddings": tied, **TOKEN_IDS, "vision_config": vision}
    text = config["text"] | changes
    if family == "qwen3_5_moe":
        # All layers have experts.
        del text["intermediate_size"]
    return top | (text if family.startswith("qwen2") else {"text_config": text})


def make_reference_model(settings: dict[str, Any], seed: int = 0, attention: str = "sdpa") -> Any:
    """The transformers model of this config.json, every parameter random, in fp32."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    family = settings["model_type"]
    config = AutoConfig.for_model(**deepcopy(settings))
    model = AutoModelForImageTextToText.from_config(config, attn_implementation=attention).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.15, generator=generator)
            # The norms of Qwen3.5 are zero-centred, except that of linear attention.
            is_centred = family.startswith("qwen3_5") and ".visual." not in name
            is_norm = parameter.ndim == 1 and name.endswith("weight")
            if is_norm and (not is_centred or ".linear_attn." in name):
                parameter.add_(1.0)
            if name.endswith(".linear_attn.out_proj.weight"):
                # The norm amplifies the rounding error of small outputs.
                parameter.mul_(0.1)
    return model


def make_native_model(settings: dict[str, Any], weights: nn.Module) -> VisionLanguageModel:
    """The native model of this config.json with the reference's weights."""
    dtype = next(weights.parameters()).dtype
    device = next(weights.parameters()).device
    model = build_model(ConfigReader(settings), ConfigReader(PREPROCESSOR_DEFAULTS), dtype, device)
    wanted = {tensor.name: tensor for tensor in hub_tensors(model)}
    found = to_published_layout(model, {name: p.detach() for name, p in weights.named_parameters()})
    assert wanted.keys() == found.keys(), sorted(wanted.keys() ^ found.keys())
    for name, tensor in wanted.items():
        assert tensor.shape == tuple(found[name].shape), name
        tensor.data.copy_(found[name].reshape(tensor.data.shape))
    return model


def write_model_folder(
    folder: Path,
    settings: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    theirs: Any = None,
    max_shard_bytes: float = 5e9,
) -> ModelFolder:
    """Write a model in the format of the hub, with the reference's weights."""
    folder.mkdir()
    precision = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(settings | {"torch_dtype": precision}))
    (folder / "preprocessor_config.json").write_text(json.dumps(dict(PREPROCESSOR_DEFAULTS)))
    model = make_native_model(settings, theirs or make_reference_model(settings))
    save_model(model, ModelFolder(folder), folder, dtype, max_shard_bytes)
    return ModelFolder(folder)


def to_published_layout(
    model: VisionLanguageModel, tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The reference's tensors by native name; it holds experts outputs first."""
    named = {model.architecture.to_native_name(name): tensor for name, tensor in tensors.items()}
    if model.config.decoder.linear_attention is not None:
        return named
    return {name: t.mT if ".experts." in name else t for name, t in named.items()}


ConversationPart = int | tuple[str, GridTHW]
"""A number of text tokens, or an image or video of this grid."""


ConversationSpec = Callable[[Any], "RandomConversation"]
"""Builds the input of the family of a model."""


def make_conversation(seed: int, *parts: ConversationPart) -> ConversationSpec:
    """Concatenate the parts, images between their start and end tokens.

    Qwen3-VL takes pairs of frames with text before each.
    """

    def build_for(model: Any) -> RandomConversation:
        if not model.config.model_type.startswith("qwen3_"):
            return _draw_conversation(seed, parts, side=14)
        own: list[ConversationPart] = []
        for part in parts:
            if isinstance(part, int) or part[0] == "image":
                own.append(part)
            else:
                t, h, w = part[1]
                own += [2, ("video", (1, h, w))] * t
        return _draw_conversation(seed, own, side=16)

    return build_for


@dataclass(frozen=True)
class RandomConversation:
    """Make random tokens and images; `kinds_T` is 0 for text, 1 for image and 2 for video."""

    ids_T: Tensor
    kinds_T: Tensor
    media: tuple[tuple[str, GridTHW], ...]
    patches: tuple[Tensor, ...]

    def pixels(self, kind: str) -> Tensor | None:
        """Return normalized patches of all images or videos, as the processor of the reference."""
        chosen = [p for (k, _), p in zip(self.media, self.patches, strict=True) if k == kind]
        if not chosen:
            return None
        values = [PREPROCESSOR_DEFAULTS[key] for key in ("image_mean", "image_std")]
        mean, std = torch.tensor(values, dtype=torch.float64)[:, :, None]
        unit = torch.cat(chosen).unflatten(1, (3, -1)).double() / 255
        return ((unit - mean) / std).flatten(1).float()

    def grids(self, kind: str) -> Tensor | None:
        chosen = [grid for k, grid in self.media if k == kind]
        return torch.tensor(chosen) if chosen else None


def _draw_conversation(
    seed: int, parts: Sequence[ConversationPart], side: int
) -> RandomConversation:
    rng = np.random.default_rng(seed)
    ids, kinds, media, patches = [], [], [], []
    for part in parts:
        if isinstance(part, int):
            ids += rng.integers(0, IMAGE, part).tolist()
            kinds += [0] * part
            continue
        kind, (t, h, w) = part
        count = t * h * w // 4
        ids += [START, *[IMAGE if kind == "image" else VIDEO] * count, END]
        kinds += [0, *[1 if kind == "image" else 2] * count, 0]
        media.append(part)
        pixels = rng.integers(0, 256, (t * h * w, 6 * side**2), dtype=np.uint8)
        patches.append(torch.from_numpy(pixels))
    return RandomConversation(torch.tensor(ids), torch.tensor(kinds), tuple(media), tuple(patches))


def reference_position_ids(model: Any, sample: RandomConversation) -> Tensor:
    """The reference's own rope index, [3, T]."""
    if not sample.media:
        return torch.arange(len(sample.ids_T)).expand(3, -1)
    index, _ = model.model.get_rope_index(
        sample.ids_T[None],
        mm_token_type_ids=sample.kinds_T[None],
        image_grid_thw=sample.grids("image"),
        video_grid_thw=sample.grids("video"),
    )
    return index[:, 0]


def reference_logits(model: Any, spec: ConversationSpec) -> Tensor:
    """Logits [T, V] of one sample alone."""
    sample = spec(model)
    inputs = {
        "input_ids": sample.ids_T[None],
        "position_ids": reference_position_ids(model, sample)[:, None],
        "mm_token_type_ids": sample.kinds_T[None],
        "pixel_values": sample.pixels("image"),
        "pixel_values_videos": sample.pixels("video"),
        "image_grid_thw": sample.grids("image"),
        "video_grid_thw": sample.grids("video"),
    }
    given = {name: one.to(model.device) for name, one in inputs.items() if one is not None}
    return model(**given, use_cache=False).logits[0]


def pack_conversations(model: Any, specs: Sequence[ConversationSpec]) -> PackedBatch:
    """The samples end to end, every token asked for its logits."""
    samples = [spec(model) for spec in specs]
    lengths = tuple(len(sample.ids_T) for sample in samples)
    ids_T = torch.cat([sample.ids_T for sample in samples])
    kinds_T = torch.cat([sample.kinds_T for sample in samples])
    patches = [patch for sample in samples for patch in sample.patches]
    positions = [reference_position_ids(model, sample) for sample in samples]
    return PackedBatch(
        sample_ids=tuple(str(number) for number in range(len(samples))),
        lengths=lengths,
        grid_thw=tuple(grid for sample in samples for _, grid in sample.media),
        ids_T=ids_T,
        position_ids_3T=torch.cat(positions, dim=1),
        cu_seqlens_S1=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
        patches_ND=torch.cat(patches) if patches else torch.empty(0, 6, dtype=torch.uint8),
        visual_indices_M=(kinds_T > 0).nonzero().squeeze(1),
        logit_indices_L=torch.arange(len(ids_T)),
        labels_L=ids_T,
    )


@torch.no_grad()
def native_logits(
    model: VisionLanguageModel, theirs: Any, specs: Sequence[ConversationSpec]
) -> Tensor:
    """Logits [T, V] of the packed samples, of the model in evaluation mode."""
    return model.eval().compute_logits(model(pack_conversations(theirs, specs)))


def max_relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest expected value."""
    found, expected = found.detach().double(), expected.detach().double()
    difference = (found - expected).abs().max()
    return float(difference / expected.abs().max())


def collect_gradients(model: VisionLanguageModel) -> dict[str, Tensor]:
    """The gradient of every parameter by its hub name, in the hub's shape."""
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.data = parameter.grad
    return {tensor.name: tensor.data.view(tensor.shape) for tensor in hub_tensors(model)}
