"""Qwen2-VL's vision tower (Wang et al. 2024): pre-norm blocks, attention over whole frames."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from finesight.model.architecture import Architecture
from finesight.model.epilogue import QUICK
from finesight.model.fp8 import Rows, quantised_gelu
from finesight.model.geometry import Pixels, Settings, read_language, read_vision
from finesight.model.layers import FeedForward, PatchMerger, VisionBlock
from finesight.model.linear import GroupedLinear, only
from finesight.model.tower import VisionTower

_norm = partial(nn.LayerNorm, eps=1e-6)


class Mlp(FeedForward):
    """fc2(quick_gelu(fc1(x))), where quick_gelu(x) = x sigmoid(1.702 x)."""

    def __init__(self, width: int, mlp_width: int) -> None:
        super().__init__()
        self.fc1 = GroupedLinear(width, {"fc1": mlp_width}, bias=True)
        self.fc2 = GroupedLinear(mlp_width, {"fc2": width}, bias=True)

    @property
    def first(self) -> GroupedLinear:
        """That inside."""
        return self.fc1

    def forward(self, x_ND: Tensor | Rows) -> Tensor:
        """[N, width] to [N, width]."""
        if self.fc2.takes_rows:
            return only(self.fc2(quantised_gelu(only(self.fc1(x_ND)))))
        return only(self.fc2(QUICK.of(self.fc1, x_ND)))


def vision_tower(config: Settings, pixels: Pixels) -> VisionTower:
    """From `vision_config`, where hidden_size is the width of the features, not of the tower."""
    vision = config.section("vision_config")
    vision.require("hidden_act", "quick_gelu", ("quick_gelu",))
    mlp_width = int(vision.whole("embed_dim") * vision.number("mlp_ratio"))
    geometry = read_vision(vision, width="embed_dim", out_width="hidden_size", mlp_width=mlp_width)

    def block() -> VisionBlock:
        return VisionBlock(geometry, _norm, Mlp(geometry.width, mlp_width))

    tower = VisionTower(geometry, pixels, block, PatchMerger(geometry, _norm(geometry.width)))
    tower.recordable = True
    return tower


ARCHITECTURE = Architecture(read_language, vision_tower)
