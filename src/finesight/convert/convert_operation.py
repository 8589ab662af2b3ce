"""`finesight convert`: recipes from the files of other trainers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from finesight.errors import Step
from finesight.operations.operation import Outcome, StrPath

if TYPE_CHECKING:
    from finesight.convert.external_config import ConversionNote
    from finesight.convert.recipe_converter import ConvertedRecipe


def convert(source: StrPath, recipe: StrPath) -> Outcome[ConvertedRecipe]:
    """Convert a configuration or script of another trainer to a recipe.

    Writes the recipe, including defaults of the other program that differ. train.batch_size is the
    product of batch size per device, gradient accumulation steps and GPUs. Settings that finesight
    does not have are printed with a recommendation. Then run the printed `finesight import`
    and `finesight train` commands. Scripts are parsed, not executed.

    Example: finesight convert train_lora.yaml recipe.yaml

    Args:
        source: YAML or JSON of LLaMA-Factory, ms-swift or TRL; args.json of an ms-swift run; a
            shell script with the command of a training; or a Python script or notebook with a
            trainer of transformers, TRL or Unsloth.
        recipe: Recipe file to create.
    """
    from finesight.convert.recipe_converter import convert_config

    conversion = convert_config(Path(source), Path(recipe))
    lines = [f"{recipe}: from {conversion.program}, {source}", *_format_notes(conversion.notes)]
    imports = [Step("import", arguments) for arguments in conversion.imports]
    data = asdict(conversion) | {"import_commands": [*map(str, imports)]}
    del data["imports"]
    return Outcome(conversion, lines, data, [*imports, Step("train", {"recipe": recipe})])


def _format_notes(notes: Sequence[ConversionNote]) -> list[str]:
    lines = [f"  {note.key} {note.value}: {note.text}" for note in notes if note.kind == "note"]
    titles = {"different in finesight:": ("differs", "unknown"), "not needed:": ("ignored",)}
    for title, kinds in titles.items():
        names_by_reason = _group_by_reason(notes, kinds)
        if not names_by_reason:
            continue
        lines.append(title)
        reasons = sorted(names_by_reason) if "ignored" in kinds else names_by_reason
        for reason in reasons:
            lines.append(f"  {', '.join(names_by_reason[reason])}: {reason}")
    return lines


def _group_by_reason(notes: Sequence[ConversionNote], kinds: Sequence[str]) -> dict[str, list[str]]:
    """Return the settings of notes by their text, those of the first kind first."""
    names_by_reason: dict[str, list[str]] = {}
    for kind in kinds:
        for note in notes:
            if note.kind != kind:
                continue
            # The value of a setting without effect does not matter.
            name = note.key if kind == "ignored" else f"{note.key} {note.value}"
            names_by_reason.setdefault(note.text, []).append(name)
    return names_by_reason
