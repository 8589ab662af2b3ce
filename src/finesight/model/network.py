"""The whole model: pictures to features, features among the tokens, tokens to logits.

Shapes: T tokens of a pack, D width, N patches, M places of pictures, K features of each, L tokens
that predict a learned one, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finesight.encode.encoded import Grid
from finesight.encode.pack import PackedBatch
from finesight.errors import UserError
from finesight.model import fused_layer, qwen2_5_vl, qwen2_vl, qwen3_vl, qwen3_vl_moe, qwen_vl
from finesight.model.architecture import Architecture
from finesight.model.attention import Attention, BranchedAttention, PackedAttention, Segments
from finesight.model.bank import Readers
from finesight.model.experts import waits
from finesight.model.frozen import FrozenWeight
from finesight.model.geometry import Geometry, Settings, read_pixels
from finesight.model.joined import Laying
from finesight.model.language import DecoderLayer, Deepstack
from finesight.model.linear import GroupedLinear, only
from finesight.model.peft_config import CURRENT, FIRST, Names
from finesight.model.sequence_parallel import SharedAttention, exchanged
from finesight.model.tower import VisionTower

FAMILIES: Mapping[str, Architecture] = {
    "qwen2_vl": qwen2_vl.ARCHITECTURE,
    "qwen2_5_vl": qwen2_5_vl.ARCHITECTURE,
    "qwen3_vl": qwen3_vl.ARCHITECTURE,
    "qwen3_vl_moe": qwen3_vl_moe.ARCHITECTURE,
    "qwen": qwen_vl.ARCHITECTURE,
}
"""By `model_type` of config.json: a new family is a file and a row here."""


class VisionLanguageModel(nn.Module):
    """One model for training and generation. Parameters have the hub's published names, grouped
    where linear layers share their input (`hub_tensors` in model.weights lists them singly)."""

    known_names: tuple[Names, ...] = (CURRENT, FIRST)
    """How names of layers in adapters become names here."""

    def __init__(self, architecture: Architecture, geometry: Geometry, visual: VisionTower) -> None:
        super().__init__()
        self.architecture = architecture
        self.geometry = geometry
        self.recompute = 0.0
        """The share of layers whose activations are computed twice, to keep fewer."""
        self.readers: Readers | None = None
        self._laying = Laying()
        self.visual = visual
        self.model = architecture.decoder(geometry.language)
        language = geometry.language
        self.lm_head = (
            None
            if language.tied
            else GroupedLinear(language.width, {"lm_head": language.vocabulary}, bias=False)
        )

    @property
    def head_weight(self) -> Tensor:
        """[V, D], the embedding's own where the head is tied. In few bits it is made anew each time
        that it is asked for: ask once for a pack."""
        if self.lm_head is None:
            return self.model.embed_tokens.weight
        weight = self.lm_head.weight
        return next(weight.dense()) if isinstance(weight, FrozenWeight) else weight

    @property
    def recordable(self) -> bool:
        """Whether a step of generation can be recorded: nothing in it waits for the device."""
        weight = self.model.embed_tokens.weight
        has_experts = self.geometry.language.experts is not None
        return weight.is_cuda and not (has_experts and waits(weight.dtype, weight.device))

    @property
    def module_names(self) -> Names:
        """How names of layers here become those that adapters are published under."""
        return self.architecture.modules

    def see(self, patches_ND: Tensor, grids: Sequence[Grid]) -> Tensor:
        """uint8 patches to features [M, K, D], without a graph where no part of it trains."""
        features_MKD: Tensor = self.visual(patches_ND, grids, self.recompute)
        return features_MKD

    def _features(self, batch: PackedBatch, known_MKD: Tensor | None) -> Tensor | None:
        """Those that the pack's tokens stand for, [M, K, D]; None of one without pictures. What
        several processes share, all of them have to ask for."""
        share = batch.share
        if known_MKD is not None:
            return known_MKD
        made_MKD = self.see(batch.patches_ND, batch.grids) if batch.grids else None
        if share is None:
            return made_MKD
        if made_MKD is None and any(share.features):
            # Frames are fewer than processes. Gradients come back to all or to none.
            weight = self.model.embed_tokens.weight
            made_MKD = weight.new_empty(0, self.visual.features, self.geometry.language.width)
            made_MKD.requires_grad_(any(p.requires_grad for p in self.visual.parameters()))
        return None if made_MKD is None else exchanged(made_MKD, share)

    def read(
        self,
        batch: PackedBatch,
        attention: Attention,
        only_L: Tensor | None = None,
        features_MKD: Tensor | None = None,
    ) -> Tensor:
        """A pack to hidden states before the last norm: [T, D], or [L, D] for the tokens `only_L`.

        The first feature of a place of a picture stands for its placeholder token, the others join
        after the first layers; `features_MKD` are those of the pack where they are known.
        """
        x_TD = self.model.embed(batch.ids_T)
        features_MKD = self._features(batch, features_MKD)
        deepstack = None
        if features_MKD is not None:
            at_M = batch.visual_at_M
            found = f"{len(at_M)} placeholder tokens for {len(features_MKD)} picture features"
            assert len(at_M) == len(features_MKD), found
            x_TD = x_TD.index_copy(0, at_M, features_MKD[:, 0])
            deepstack = Deepstack(at_M, features_MKD[:, 1:])
        h_TD: Tensor = self.model(
            x_TD, batch.positions_3T, attention, self.recompute, only_L, deepstack
        )
        return h_TD

    def step(self, ids_R: Tensor, positions_3R: Tensor, attention: Attention) -> Tensor:
        """One more token of text for each of R rows to hidden states before the last norm."""
        h_RD: Tensor = self.model(self.model.embed(ids_R), positions_3R, attention)
        return h_RD

    def normed(self, h_TD: Tensor) -> Tensor:
        """The last norm, after which the head reads."""
        y_TD: Tensor = self.model.norm(h_TD)
        return y_TD

    def logits(self, h_TD: Tensor) -> Tensor:
        """Normed hidden states to [T, V]."""
        if self.lm_head is None:
            return F.linear(h_TD, self.model.embed_tokens.weight)
        return only(self.lm_head(h_TD))

    def forward(
        self,
        batch: PackedBatch,
        features_MKD: Tensor | None = None,
        seed_1: Tensor | None = None,
    ) -> Tensor:
        """A pack to the normed hidden states [L, D] of the tokens that predict learned ones;
        `features_MKD` are those of its pictures where they are known. `seed_1` (int32, on the
        device) is what drop-outs are a function of on a GPU; by default it is drawn."""
        # Before a seed is drawn: who knows the features has had the tower draw first, too.
        features_MKD = self._features(batch, features_MKD)
        if seed_1 is None and self.training and batch.ids_T.is_cuda:
            seed_1 = torch.randint(2**31 - 1, (1,), device=batch.ids_T.device, dtype=torch.int32)
        attention = _attention(batch, seed_1)
        if fused_layer.takes(self.model.embed_tokens.weight):
            layers = (layer for layer in self.model.layers if isinstance(layer, DecoderLayer))
            groups = (group for layer in layers for group in layer.fusible)
            self._laying.lay(fused_layer.joined_groups(groups))
        return self.normed(self.read(batch, attention, batch.predict_L, features_MKD))


def _attention(batch: PackedBatch, seed_1: Tensor | None) -> PackedAttention:
    """How the tokens of a pack look at each other."""
    segments = Segments(batch.lengths, batch.bounds_S1, max(batch.lengths))
    if batch.beginning:
        return BranchedAttention(segments, seed_1, rows=len(batch.ids_T))
    if batch.share is not None:
        return SharedAttention(segments, seed_1, share=batch.share)
    return PackedAttention(segments, seed_1)


@contextmanager
def fitting(file: str) -> Iterator[None]:
    """Turn a refusal of memory for the sizes in `file` into a UserError; a full card's is left to
    who knows how to save on it."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError) as error:
        said = str(error)
        if "overflow" not in said.lower() and "allocate memory" not in said:
            raise
        raise UserError(
            "its sizes make a model that is too large for this machine's memory",
            where=file,
            expected="a model that fits into memory",
            remedy="take the file from the model's own folder, or a smaller model",
        ) from error


def build(
    config: Settings, preprocessor: Settings, dtype: torch.dtype, device: torch.device
) -> VisionLanguageModel:
    """The model that config.json describes, its parameters not yet set.

    Raises UserError for an unknown family, for values that are missing or wrong, and for sizes
    beyond any memory.
    """
    family = config.text("model_type")
    if family not in FAMILIES:
        config.refuse("model_type", " or ".join(FAMILIES))
    architecture = FAMILIES[family]
    language = architecture.language(config)
    with fitting(config.file), torch.device("meta"):
        visual = architecture.vision(config, read_pixels(preprocessor))
        model = VisionLanguageModel(architecture, Geometry(language, visual.geometry), visual)
    if visual.geometry.out_width != language.width:
        raise UserError(
            f"features of pictures are {visual.geometry.out_width} wide",
            where=config.file,
            expected=f"the language model's hidden_size, {language.width}",
            remedy="take the file from the model's own folder",
        )
    model.to(dtype)
    make_room(model, device)
    return model.eval()


def make_room(model: nn.Module, device: torch.device) -> None:
    """Parameters and buffers on `device` in place of those on the meta device, not yet set.

    As `to_empty` does; but to copy the form of a tensor on meta, torch imports what it calculates
    with symbols by, half a second of every command.
    """
    for module in model.modules():
        for name, parameter in [*module.named_parameters(recurse=False)]:
            numbers = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            setattr(module, name, nn.Parameter(numbers, requires_grad=parameter.requires_grad))
        for name, buffer in [*module.named_buffers(recurse=False)]:
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device=device))
