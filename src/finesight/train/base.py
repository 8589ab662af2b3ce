"""The model that a run starts from."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from finesight.config import Recipe
from finesight.encode.rendering import Rendering, renderer_of
from finesight.errors import UserError
from finesight.hub import ModelFolder, lasting_name
from finesight.infer.load import find_parts
from finesight.manifest import MANIFEST, Manifest
from finesight.model.adapter import CONFIG as ADAPTER_CONFIG


@dataclass(frozen=True, slots=True)
class Base:
    """The model that a run starts from: the name it is found by, its folder, an adapter to go on
    with, and the manifest of the run that made them."""

    name: str
    folder: ModelFolder
    adapter: Path | None
    manifest: Manifest | None

    def renderer(self, recipe: Recipe) -> Rendering:
        """As the recipe says; where it does not, as the run that goes on was trained."""
        picture, system = recipe.picture, recipe.data.system
        if self.manifest is not None:
            picture = self.manifest.picture if picture is None else picture
            system = self.manifest.system if system is None else system
        return renderer_of(self.folder, picture, system)


def base_of(recipe: Recipe) -> Base:
    """The recipe's model may be a model folder, a hub name, an adapter or a run to go on from.
    Raises UserError for one that is not there, or with an adapter where one is given."""
    parts = find_parts(recipe.model)
    # A folder is found again by its absolute path, a model of the hub or the package by its name.
    is_path = Path(recipe.model).expanduser().exists()
    name = lasting_name(parts.folder) if is_path else recipe.model
    adapter = recipe.adapter
    if adapter is None:
        return Base(name, parts.folder, parts.adapter, parts.manifest)
    if parts.adapter is not None:
        raise UserError(
            f"model is {recipe.model}, which has an adapter of its own, and adapter is {adapter}",
            where="adapter",
            expected="one adapter to go on with",
            remedy="leave adapter out, or name the model that it belongs to",
        )
    manifest = parts.manifest
    if os.path.isfile(adapter / MANIFEST):
        parts.folder.fetch_weights()  # by which the adapter's run knows its base
        manifest = find_parts(str(adapter), base=str(parts.folder.path)).manifest
    if not os.path.isfile(adapter / ADAPTER_CONFIG) and os.path.isdir(adapter / "adapter"):
        adapter = adapter / "adapter"
    if not os.path.isfile(adapter / ADAPTER_CONFIG):
        raise UserError(
            f"no {ADAPTER_CONFIG} in {adapter}",
            where="adapter",
            expected="the folder of an adapter, or of a run that trained one",
            remedy="correct the path",
        )
    return Base(name, parts.folder, adapter, manifest)
