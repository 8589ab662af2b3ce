"""Settings of other trainers that belong to one objective: its file `trainers.yaml`."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any

from pydantic import Field

from finesight.files.bounded_files import load_yaml
from finesight.settings.setting_types import SettingsSection


class TrainerRules(SettingsSection):
    """Rules for the settings of an objective in addition to those of a program.

    Settings of the same name are converted, and those in `names` and `renamed`.

    Attributes:
        names: Names in other trainers, by setting. An empty text stands for none.
        values: Values of finesight by value of the other trainers, by setting.
        switches: Another setting, and the value that the setting has if that one is false.
        responses: Setting that the batch size of other trainers includes as a factor.
        max_length: Setting of other trainers for the maximum length of a sample.
        reset: Settings that compare with the base model, and a note for a run that changes it.
        converted: Other settings that the conversion reads.
        unsupported: Reasons, with the settings that they apply to.
    """

    names: dict[str, str] = Field(default_factory=dict)
    values: dict[str, dict[str, str]] = Field(default_factory=dict)
    switches: dict[str, list[Any]] = Field(default_factory=dict)
    responses: str = ""
    max_length: str = ""
    reset: dict[str, str] = Field(default_factory=dict)
    converted: str = ""
    unsupported: dict[str, str] = Field(default_factory=dict)


class TrainerTables(SettingsSection):
    """Content of a file `trainers.yaml`, which is added to `trainer_settings.yaml`.

    Attributes:
        renamed: Names in other trainers, by setting of finesight.
        rules: Rules for the settings of the objective.
        defaults: Default values of its methods, by trainer.
        method_keys: Settings that identify a method, by method.
        method_classes: Methods of TRL with classes `...Config` and `...Trainer`.
        scripts: Names of scripts of TRL.
        losses: Methods in which the name of a loss selects the objective, by loss.
        unsupported: Reasons for settings of all methods, with these settings.
        converted: Settings that the conversion reads, by trainer.
    """

    renamed: dict[str, str] = Field(default_factory=dict)
    rules: TrainerRules = TrainerRules()
    defaults: dict[str, dict[str, dict[str, Any]]] = Field(default_factory=dict)
    method_keys: dict[str, str] = Field(default_factory=dict)
    method_classes: str = ""
    scripts: str = ""
    losses: dict[str, str] = Field(default_factory=dict)
    unsupported: dict[str, str] = Field(default_factory=dict)
    converted: dict[str, str] = Field(default_factory=dict)


@cache
def load_trainer_tables(path: str) -> TrainerTables:
    """Load the file at `package:file`.

    Raises:
        OSError, ImportError, TypeError: There is no such package or file.
        ValueError, yaml.YAMLError: The content is invalid.
    """
    package, _, name = path.partition(":")
    text = (files(package) / name).read_text(encoding="utf-8")
    return TrainerTables.model_validate(load_yaml(text))
