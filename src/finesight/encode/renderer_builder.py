"""Choice between the native renderer and that of transformers."""

from __future__ import annotations

from finesight.encode.renderer import NativeRenderer, Renderer, is_native
from finesight.model_folder import ModelFolder
from finesight.settings.config import ImageSettings


def build_renderer(
    folder: ModelFolder, image_rule: ImageSettings | None = None, system_prompt: str | None = None
) -> Renderer:
    """Create the native renderer of a model family, or else the transformers renderer.

    `image_rule` and `system_prompt` are those of the recipe; the model provides missing ones.
    """
    if is_native(folder):
        return NativeRenderer(folder, image_rule, system_prompt)
    # Lazy import: it imports torch, which native rendering does not need.
    from finesight.encode.hf_renderer import HfRenderer

    return HfRenderer(folder, image_rule, system_prompt)
