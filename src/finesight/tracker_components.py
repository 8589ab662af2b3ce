"""Experiment trackers as components: modes of `uri`, required packages, and their registry."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from inspect import isabstract
from typing import TYPE_CHECKING, Any, Literal

from finesight.components import Component, ComponentRegistry
from finesight.errors import UserError
from finesight.satellites import build_missing_error, load_satellite
from finesight.settings.setting_types import is_url

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint


AlertLevel = Literal["info", "warning", "error"]


def accept_uri(uri: str) -> str | None:
    """Return no problem: the package of the tracker interprets the value."""
    return None


@dataclass(frozen=True, kw_only=True)
class TrackerComponent(Component[Any]):
    """Light half of an experiment tracker. The heavy half is a subclass of `Tracker`.

    Both may be one module, which imports the package of the tracker in methods only.

    Attributes:
        extra: Extra of finesight with the package, which has the name of the tracker; empty for no
            package.
        modes: Values of the setting `uri` that are no URLs: the cloud service of the tracker, or
            local files. Without modes, `check_uri` decides.
        mode_packages: Other packages that modes need: the argument of `pip install` by package, by
            mode.
        check_uri: Function that returns the problem of a given value of `uri`, or None. A remedy
            may follow a colon.
        needs_uri: Whether recipes must set `uri`.
        writes_run_folder: Whether the tracker writes to the run folder only, so that it has no
            `uri`.
        telemetry_off_env: Environment variables that disable error and usage reports of the
            package. Variables that the user sets take precedence.
        guesses: Words that users type for the command `report`.
    """

    extra: str = ""
    modes: tuple[str, ...] = ()
    mode_packages: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    check_uri: Callable[[str], str | None] = field(default=accept_uri)
    needs_uri: bool = False
    writes_run_folder: bool = False
    telemetry_off_env: Mapping[str, str] = field(default_factory=dict)
    guesses: str = ""

    def find_problem(self) -> str | None:
        """Return why other modules cannot use the tracker; None if they can."""
        problem = Component.find_problem(self)
        if problem is not None:
            return problem
        if not self.implementation:
            return "it has no implementation"
        if self.has_section:
            return "it has settings, but those of trackers are the same: use track.config"
        if self.needs_uri and self.writes_run_folder:
            return "it needs a uri, but writes to the run folder only"
        return None

    def find_uri_problem(self, uri: str) -> str | None:
        """Return why the tracker does not support a value of `uri`; None if it does."""
        if uri in self.modes:
            return None
        if self.writes_run_folder:
            return f"{self.name} writes to the run folder and does not support uri"
        if self.modes and not is_url(uri):
            known = ", ".join((*self.modes, "https://HOST"))
            return f"{self.name} does not support uri {uri!r}: use {known}"
        return self.check_uri(uri)

    def list_packages(self, uri: str | None) -> dict[str, str]:
        """Return the argument of `pip install` by package that the tracker imports."""
        packages: dict[str, str] = {}
        if self.extra:
            packages[self.name] = f"finesight[{self.extra}]"
        if uri is not None:
            packages |= self.mode_packages.get(uri, {})
        return packages


class TrackerRegistry(ComponentRegistry[TrackerComponent]):
    """Trackers by name. Entry points of plug-ins may be subclasses of `Tracker`, too."""

    def adapt(self, entry: EntryPoint, item: Any) -> Any:
        """Return the component of a subclass of `Tracker`, as plug-ins of version 0.1.0 have."""
        tracker: Any = item
        interface = _import_interface()
        if not isinstance(item, type) or not issubclass(item, interface) or isabstract(item):
            return item
        return TrackerComponent(
            kind="trackers",
            name=entry.name,
            title=entry.name,
            implementation=f"{entry.module}:{entry.attr}",
            extra=tracker.extra or "",
            telemetry_off_env=tracker.telemetry_off_env,
        )

    def find_problem(self, name: str, item: Any) -> str | None:
        """Return why an object is no tracker; None if it is one."""
        if isinstance(item, type):
            return f"{item!r:.80} does not implement Tracker"
        return super().find_problem(name, item)

    def load_tracker(self, name: str) -> Any:
        """Import the heavy half of a tracker, a subclass of `Tracker`."""
        return self.load_implementation(name, _import_interface())


TRACKERS = TrackerRegistry("trackers", TrackerComponent, "finesight.track.trackers")
"""Trackers by name: the values of `track.kind`."""


def _import_interface() -> Any:
    """Import the class `Tracker`, whose package depends on the settings of recipes."""
    return load_satellite("finesight.track.tracker:Tracker")


def require_track_package() -> None:
    """Raise UserError if finesight is installed without the package of its trackers."""
    if not TRACKERS.list_built_in():
        raise build_missing_error("finesight.track", "")


def get_example_tracker() -> str:
    """Return the tracker that examples use: one that needs no service."""
    names = [one.name for one in TRACKERS.list_built_in() if one.writes_run_folder]
    return names[0] if names else "NAME"


def require_trackers(trackers: Sequence[Any]) -> None:
    """Raise UserError if a tracker of a recipe, or a package that it needs, is not installed.

    No package of a built-in tracker is imported.

    Args:
        trackers: The settings `TrackerSettings` of a recipe.
    """
    for tracker in trackers:
        for package, install in TRACKERS[tracker.kind].list_packages(tracker.uri).items():
            if find_spec(package) is None:
                raise UserError(
                    f"{package} is not installed",
                    where=f"track: {tracker.kind}",
                    expected=f"the packages of '{install}'",
                    remedy=f"Run pip install '{install}', or remove {tracker.kind} from track.",
                )
        TRACKERS.load_tracker(tracker.kind)
