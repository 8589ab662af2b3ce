"""The whole model: pictures to features, features among the tokens, tokens to logits.

Shapes: T tokens of a pack, D width, N patches, M features of pictures, L tokens that predict a
learned one, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finesight.encode.encoded import Grid
from finesight.encode.pack import PackedBatch
from finesight.errors import UserError
from finesight.model import qwen2_5_vl, qwen2_vl
from finesight.model.attention import Attention, PackedAttention, Segments
from finesight.model.geometry import Geometry, Pixels, Settings, read_language, read_pixels
from finesight.model.language import Decoder
from finesight.model.tower import VisionTower

FAMILIES: Mapping[str, Callable[[Settings, Pixels], VisionTower]] = {
    "qwen2_vl": qwen2_vl.vision_tower,
    "qwen2_5_vl": qwen2_5_vl.vision_tower,
}
"""Vision tower by `model_type` of config.json: a new family is a file and a row here."""


class VisionLanguageModel(nn.Module):
    """One model for training and generation. Parameters have the hub's published names, grouped
    where linear layers share their input (`hub_tensors` in model.weights lists them singly)."""

    def __init__(self, geometry: Geometry, visual: VisionTower) -> None:
        super().__init__()
        self.geometry = geometry
        self.recompute = False
        self.visual = visual
        self.model = Decoder(geometry.language)
        language = geometry.language
        self.lm_head = (
            None if language.tied else nn.Linear(language.width, language.vocabulary, bias=False)
        )

    @property
    def head_weight(self) -> Tensor:
        """[V, D], the embedding's own where the head is tied."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def see(self, patches_ND: Tensor, grids: Sequence[Grid]) -> Tensor:
        """uint8 patches to features [M, D], without a graph where no part of it trains."""
        features_MD: Tensor = self.visual(patches_ND, grids, self.recompute)
        return features_MD

    def embed(self, ids_T: Tensor, features_MD: Tensor | None, visual_at_M: Tensor) -> Tensor:
        """Ids to [T, D], with the features at the placeholder tokens."""
        x_TD = self.model.embed(ids_T)
        if features_MD is None:
            return x_TD
        found = f"{len(visual_at_M)} placeholder tokens for {len(features_MD)} picture features"
        assert len(visual_at_M) == len(features_MD), found
        return x_TD.index_copy(0, visual_at_M, features_MD)

    def decode(
        self,
        x_TD: Tensor,
        positions_3T: Tensor,
        attention: Attention,
        only_L: Tensor | None = None,
    ) -> Tensor:
        """Embedded tokens to hidden states before the last norm: [T, D], or [L, D] for the tokens
        `only_L`."""
        h_TD: Tensor = self.model(x_TD, positions_3T, attention, self.recompute, only_L)
        return h_TD

    def normed(self, h_TD: Tensor) -> Tensor:
        """The last norm, after which the head reads."""
        y_TD: Tensor = self.model.norm(h_TD)
        return y_TD

    def logits(self, h_TD: Tensor) -> Tensor:
        """Normed hidden states to [T, V]."""
        return F.linear(h_TD, self.head_weight)

    def forward(self, batch: PackedBatch, features_MD: Tensor | None = None) -> Tensor:
        """A pack to the normed hidden states [L, D] of the tokens that predict learned ones;
        `features_MD` are those of its pictures where they are known."""
        if features_MD is None and batch.grids:
            features_MD = self.see(batch.patches_ND, batch.grids)
        x_TD = self.embed(batch.ids_T, features_MD, batch.visual_at_M)
        segments = Segments(batch.lengths, batch.bounds_S1, max(batch.lengths))
        attention = PackedAttention(segments)
        return self.normed(self.decode(x_TD, batch.positions_3T, attention, batch.predict_L))


def build(
    config: Settings, preprocessor: Settings, dtype: torch.dtype, device: torch.device
) -> VisionLanguageModel:
    """The model that config.json describes, its parameters not yet set.

    Raises UserError for an unknown family and for values that are missing or wrong.
    """
    family = config.text("model_type")
    if family not in FAMILIES:
        config.refuse("model_type", " or ".join(FAMILIES))
    language = read_language(config)
    with torch.device("meta"):
        visual = FAMILIES[family](config.section("vision_config"), read_pixels(preprocessor))
        model = VisionLanguageModel(Geometry(language, visual.geometry), visual)
    if visual.geometry.out_width != language.width:
        raise UserError(
            f"features of pictures are {visual.geometry.out_width} wide",
            where=config.file,
            expected=f"the language model's hidden_size, {language.width}",
            remedy="take the file from the model's own folder",
        )
    return model.to(dtype).to_empty(device=device).eval()
