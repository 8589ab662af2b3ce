"""What a family of models must say for one of it to be built: a file for each, a row in network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from finesight.model.geometry import LanguageGeometry, Pixels, Settings
from finesight.model.language import Decoder
from finesight.model.peft_config import CURRENT, Names
from finesight.model.tower import VisionTower

TRANSFORMERS_5 = {"model.": "model.language_model.", "visual.": "model.visual."}
"""How transformers 5 starts the names of tensors, whatever they were published as."""


@dataclass(frozen=True)
class Architecture:
    """How config.json is read, and under which names the weights are published.

    `language` and `vision` take the whole of config.json, and raise UserError for what is missing
    or not built. `published` has the start of a published name for the start of a name here, where
    they differ; `modules` are the names of layers for adapters. A family with a decoder of its own
    names it.
    """

    language: Callable[[Settings], LanguageGeometry]
    vision: Callable[[Settings, Pixels], VisionTower]
    published: Mapping[str, str] = field(default_factory=dict)
    decoder: Callable[[LanguageGeometry], Decoder] = Decoder
    modules: Names = CURRENT

    def published_name(self, name: str) -> str:
        """The published name of a tensor."""
        for ours, theirs in self.published.items():
            if name.startswith(ours):
                return theirs + name.removeprefix(ours)
        return name

    def native_name(self, stored: str) -> str:
        """The name here of a tensor that was published or written by transformers 5."""
        for starts in (self.published, TRANSFORMERS_5):
            for ours, theirs in starts.items():
                if stored.startswith(theirs):
                    return ours + stored.removeprefix(theirs)
        return stored
