"""Options of `launch` that the launchers define. The launchers are imported when these are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from finesight.operations.operation import Parameter

if TYPE_CHECKING:
    from finesight.launch.launcher_component import LauncherOption


def list_names() -> tuple[str, ...]:
    """List the names of the launchers."""
    from finesight.launch.launcher_component import LAUNCHERS

    return (*LAUNCHERS,)


def list_options() -> tuple[Parameter, ...]:
    """List the options of single launchers. An option that several have is one parameter."""
    from finesight.launch.launcher_component import LAUNCHERS, format_option

    owners: dict[str, dict[str, LauncherOption]] = {}
    for launcher in LAUNCHERS.list_available():
        for name, option in launcher.options.items():
            owners.setdefault(name, {})[launcher.name] = option
    parameters: list[Parameter] = []
    for name, options in owners.items():
        parameter = Parameter(
            name=name,
            option=format_option(name),
            help=_describe_option(options),
            default=None,
            is_optional=True,
        )
        if all(option.is_flag for option in options.values()):
            parameter = replace(parameter, kind="flag", default=False, is_optional=False)
        parameters.append(parameter)
    return tuple(parameters)


def _describe_option(options: Mapping[str, LauncherOption]) -> str:
    """Describe an option by the names of its launchers, which may differ in its meaning."""
    names: dict[str, list[str]] = {}
    for name, option in options.items():
        names.setdefault(option.help, []).append(name)
    parts: list[str] = []
    for text, owners in names.items():
        parts.append(f"{', '.join(owners)}: {text}")
    return " ".join(parts)


def describe_nodes() -> str:
    """Describe the option `--nodes`."""
    from finesight.launch.launcher_component import LAUNCHERS

    elastic = [one.name for one in LAUNCHERS.list_available() if one.supports_elastic_nodes]
    return (
        f"Number of nodes. MIN:MAX ({', '.join(elastic)}) is elastic: training continues with the"
        " nodes that are available."
    )


def describe_files() -> str:
    """Describe the option `--out`."""
    from finesight.launch.launcher_component import LAUNCHERS, join_names

    files = [f"NAME{one.file_suffix} ({one.name})" for one in LAUNCHERS.list_available()]
    return f"Job file. Default: {join_names(files)}."


def describe_submission() -> str:
    """Describe the option `--submit`."""
    from finesight.launch.launcher_component import LAUNCHERS, join_names

    commands = [
        f"{one.command[0]} ({one.name})" for one in LAUNCHERS.list_available() if one.has_queue
    ]
    text = f"Start the job now, with {join_names(commands)}."
    others = [one.name for one in LAUNCHERS.list_available() if not one.has_queue]
    if others:
        text += f" Without a queue ({', '.join(others)}), run the script instead."
    return text
