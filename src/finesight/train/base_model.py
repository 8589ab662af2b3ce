"""Resolution of the `model` and `adapter` settings to the base model of a run."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from finesight.config import Recipe
from finesight.encode.renderer import Renderer, build_renderer
from finesight.errors import UserError
from finesight.infer.model_loader import resolve_model_source
from finesight.manifest import MANIFEST_FILE, Manifest
from finesight.model.lora.peft_io import ADAPTER_CONFIG_FILE as ADAPTER_CONFIG
from finesight.model_folder import ModelFolder, get_portable_name


@dataclass(frozen=True, slots=True)
class BaseModelRef:
    """Base model that a run starts from.

    Attributes:
        name: Name stored in manifests and adapters: an absolute path, or the name of a hub model.
        folder: Folder of the model files.
        adapter: Folder of an adapter to continue training; None to start with a new one.
        manifest: Manifest of the run that produced the model or adapter, if any.
    """

    name: str
    folder: ModelFolder
    adapter: Path | None
    manifest: Manifest | None

    def build_renderer(self, recipe: Recipe) -> Renderer:
        """Create the renderer (tokenizer, chat template and image processor) of a recipe.

        Image settings and the system prompt that the recipe does not set are read from the manifest
        of the run that produced the model.
        """
        image_rule, system_prompt = recipe.image, recipe.data.system_prompt
        if self.manifest is not None:
            image_rule = self.manifest.image_rule if image_rule is None else image_rule
            system_prompt = self.manifest.system_prompt if system_prompt is None else system_prompt
        return build_renderer(self.folder, image_rule, system_prompt)


def resolve_base_model(recipe: Recipe) -> BaseModelRef:
    """Resolve the `model` and `adapter` settings of a recipe.

    `model` is a model folder, a hub name, an adapter folder or a run directory.

    Raises:
        UserError: The model or adapter does not exist, or the recipe specifies two adapters.
    """
    parts = resolve_model_source(recipe.model)
    # Store absolute paths of folders, and names of hub models and packaged models.
    is_path = Path(recipe.model).expanduser().exists()
    name = get_portable_name(parts.folder) if is_path else recipe.model
    adapter = recipe.adapter
    if adapter is None:
        return BaseModelRef(name, parts.folder, parts.adapter, parts.manifest)
    if parts.adapter is not None:
        raise UserError(
            f"model {recipe.model} already has an adapter, and adapter is {adapter}",
            where="adapter",
            expected="a single adapter to continue",
            remedy="remove adapter, or set model to the base model of the adapter",
        )
    manifest = parts.manifest
    if os.path.isfile(adapter / MANIFEST_FILE):
        parts.folder.fetch_weights()  # needed for the fingerprint of the base model
        manifest = resolve_model_source(str(adapter), base=str(parts.folder.path)).manifest
    if not os.path.isfile(adapter / ADAPTER_CONFIG) and os.path.isdir(adapter / "adapter"):
        adapter = adapter / "adapter"
    if not os.path.isfile(adapter / ADAPTER_CONFIG):
        raise UserError(
            f"no {ADAPTER_CONFIG} in {adapter}",
            where="adapter",
            expected="an adapter folder, or a run folder with an adapter",
            remedy="correct the path",
        )
    return BaseModelRef(name, parts.folder, adapter, manifest)
