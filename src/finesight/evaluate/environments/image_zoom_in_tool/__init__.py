"""Zoom tool of Qwen3-VL: a crop of an image of the question as a new image."""

from __future__ import annotations

from finesight.environment_components import EnvironmentComponent

COMPONENT = EnvironmentComponent(
    kind="environments",
    name="image_zoom_in_tool",
    title="Zoom tool",
    implementation="finesight.evaluate.environments.image_zoom_in_tool.tool:ImageZoomInTool",
    position=0,
)
