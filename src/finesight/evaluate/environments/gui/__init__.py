"""A synthetic window, which a model uses by screenshots: click, type and scroll."""

from __future__ import annotations

from finesight.environment_components import EnvironmentComponent

COMPONENT = EnvironmentComponent(
    kind="environments",
    name="gui",
    title="Synthetic window",
    implementation="finesight.evaluate.environments.gui.tools:Gui",
    position=1,
)
