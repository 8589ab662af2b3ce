"""Launchers as components: their job files, commands and options, and their registry."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from finesight.components import Component, ComponentRegistry, NoSettings
from finesight.errors import UserError
from finesight.launch.name_format import PLAIN_NAME, NameFormat

if TYPE_CHECKING:
    from finesight.launch.launch_job import LaunchJob

COMMON_OPTIONS = frozenset(
    [
        "recipe",
        "overrides",
        "engine",
        "gpus_per_node",
        "nodes",
        "name",
        "out",
        "submit",
        "push",
        "force",
        "options",
        "on",
        "json",
        "as_json",
        "help",
    ]
)
"""Names of options of all launchers, which no launcher can have for its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LauncherOption:
    """Option of a launcher on the command line.

    Attributes:
        help: Description. Launchers may share an option.
        format: Format of the value. A template may have to quote values of another format than the
            default.
        example: Value in the message about a missing or invalid one.
        is_required: Whether the launcher needs the option.
        is_flag: Whether the option has no value.
    """

    help: str
    format: NameFormat = PLAIN_NAME
    example: str = "NAME"
    is_required: bool = False
    is_flag: bool = False


IMAGE_OPTION = LauncherOption(
    help="container image with finesight. Required.",
    example="registry.example/finesight:1",
    is_required=True,
)
"""Container image of launchers whose nodes start containers."""


@dataclass(frozen=True, kw_only=True)
class LauncherComponent(Component[NoSettings]):
    """Launcher of training jobs.

    Attributes:
        build: Returns the text of the job file, from the job and the values of the own options that
            are given and valid; a flag has the value "True".
        file_suffix: Suffix of the default name of the job file.
        command: Words that start or submit a job, before the file.
        has_queue: Whether `command` submits the job and returns.
        options: Own options by name, such as `max_time` for `--max-time`.
        supports_elastic_nodes: Whether a job can have a range of nodes.
    """

    build: Callable[[LaunchJob, Mapping[str, str]], str]
    file_suffix: str
    command: tuple[str, ...]
    has_queue: bool = True
    options: Mapping[str, LauncherOption] = field(default_factory=dict)
    supports_elastic_nodes: bool = False

    def find_problem(self) -> str | None:
        """Return why other modules cannot use the launcher; None if they can."""
        problem = Component.find_problem(self)
        if problem is not None:
            return problem
        if not re.fullmatch(r"(\.[A-Za-z0-9_-]+)+", self.file_suffix):
            return f"file_suffix is {self.file_suffix!r:.60} instead of a suffix such as .yaml"
        if not self.command or not isinstance(self.command, tuple):
            return f"command is {self.command!r:.60} instead of a tuple of words"
        if not all(isinstance(word, str) for word in self.command) or not callable(self.build):
            return "command has other items than words, or build is no function"
        for name, option in self.options.items():
            if not isinstance(option, LauncherOption):
                return f"the option {name} is {option!r:.60}, no LauncherOption"
            if not isinstance(option.help, str) or not isinstance(option.format, NameFormat):
                return f"the option {name} has no text as help, or no NameFormat"
            if name in COMMON_OPTIONS:
                return f"the option {name} is one of all launchers"
            if not re.fullmatch("[a-z][a-z0-9_]*", name):
                return f"the name {name!r:.60} of an option is invalid"
        return None

    def check_options(self, given: Mapping[str, str]) -> None:
        """Raise UserError for an own option that is missing or has an invalid value."""
        for name, option in self.options.items():
            value = given.get(name)
            if option.is_flag and value not in (None, "True"):
                raise UserError(
                    f"has the value {value!r:.60}",
                    where=format_option(name),
                    expected="no value, or True in Python",
                    remedy="remove the value, or the option",
                )
            if option.is_flag or (value is None and not option.is_required):
                continue
            option.format.check(format_option(name), value, option.example)


def format_option(name: str) -> str:
    """Format the name of an option as a word of the command line."""
    return f"--{name.replace('_', '-')}"


class LauncherRegistry(ComponentRegistry[LauncherComponent]):
    """Launchers by name, whose options of the same name all are flags, or all have values."""

    def find_problem(self, name: str, item: object) -> str | None:
        """Return why an object is no launcher, or its options contradict those of others."""
        problem = super().find_problem(name, item)
        if problem is not None or not isinstance(item, LauncherComponent):
            return problem
        for other in self.list_built_in():
            for option in other.options.keys() & item.options.keys():
                if other.options[option].is_flag != item.options[option].is_flag:
                    kind = "a flag" if other.options[option].is_flag else "an option with a value"
                    return f"{format_option(option)} is {kind} of {other.name}: rename it"
        return None


LAUNCHERS = LauncherRegistry("launchers", LauncherComponent, "finesight.launch.launchers")
"""Launchers by name: the values of `launch --on`."""


def join_names(names: Sequence[str]) -> str:
    """Join names as alternatives."""
    first = ", ".join(names[:-1])
    if not first:
        return names[-1]
    return f"{first} or {names[-1]}"
