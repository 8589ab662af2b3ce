"""Steps that several operations propose as the next one."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from finesight.errors import Step
from finesight.operations.operation import StrPath
from finesight.operations.options import (
    OverridesArgument,
)

if TYPE_CHECKING:
    from finesight.encode.renderer import Renderer


def build_init_step(data: StrPath, model: str | None = None) -> Step:
    """Return the step that writes a recipe for data, in a free folder.

    Args:
        model: Run or model to start from; None for the default.
    """
    from finesight.train.run_dir import RunDir

    arguments: dict[str, object] = {"data": data, "model": model}
    folder = get_init_folder(str(data))
    if os.path.lexists(folder):
        arguments["out"] = RunDir(folder).next_path
    return Step("init", arguments)


def get_init_folder(source: str) -> Path:
    """Return the folder of the recipe that `init` writes by default for a dataset."""
    from finesight.files.hub_address import is_hub_address

    name = source
    if is_hub_address(source):
        name = re.split("[:@]", source)[1]
    return Path(f"{Path(name).resolve().stem}-finetune")


def propose_plan(
    recipe: Path, renderer: Renderer | None, overrides: OverridesArgument = None
) -> Step:
    """Return the step that plans a run, or trains it without a plan."""
    operation = "train"
    if renderer is not None and renderer.is_native:
        operation = "plan"
    return Step(operation, {"recipe": recipe, "overrides": overrides})
