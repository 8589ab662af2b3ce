"""Registries of named objects, which other packages extend by entry points (plug-ins)."""

from __future__ import annotations

import pkgutil
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from inspect import isabstract
from shlex import quote
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, cast

from finesight.errors import UserError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint, EntryPoints

T = TypeVar("T")

PluginKind = Literal[
    "formats",
    "metrics",
    "rewards",
    "environments",
    "trackers",
    "objectives",
    "optimizers",
    "families",
    "architectures",
    "launchers",
]
"""Kind of a plug-in. Its entry points are in the group `finesight.KIND`."""


def list_modules(package: str, helpers: Collection[str]) -> list[str]:
    """List the names of the modules and subpackages of a package, without importing it.

    Args:
        helpers: Names of modules that are left out.
    """
    try:
        spec = find_spec(package)
    except ModuleNotFoundError:
        return []  # The package that contains it is not installed.
    assert spec is not None, f"no package {package}"
    modules = pkgutil.iter_modules(spec.submodule_search_locations)
    return [module.name for module in modules if module.name not in helpers]


@dataclass(frozen=True, slots=True)
class PluginRecord:
    """A plug-in and the package that defines it, as in the manifest of a run."""

    kind: PluginKind
    name: str
    package: str
    version: str

    def describe(self) -> str:
        """Name the plug-in with its package, as the location of an error."""
        return f"plug-in {self.name} of {self.package} {self.version} (finesight.{self.kind})"


def require_plugins(plugins: Iterable[PluginRecord], where: str) -> None:
    """Raise UserError if a plug-in of a run is not installed."""
    for one in plugins:
        names = _scan(one.kind, (*sys.path,)).names
        if one.kind == "architectures":  # a family that is a component has its own
            names |= _scan("families", (*sys.path,)).names
        if one.name not in names:
            raise UserError(
                f"the plug-in {one.name} (finesight.{one.kind}) is not installed",
                where=where,
                expected=f"the package {one.package} {one.version}, with which the run was trained",
                remedy=_suggest_install(one),
            )


def _suggest_install(plugin: PluginRecord) -> str:
    """Return the command that installs the package of a plug-in.

    The manifest may be a foreign one, and pip reads other texts as options, files or URLs.
    """
    from packaging.utils import InvalidName, canonicalize_name
    from packaging.version import InvalidVersion, Version

    try:
        name = canonicalize_name(plugin.package, validate=True)
        return f"pip install {quote(f'{name}=={Version(plugin.version)}')}"
    except (InvalidName, InvalidVersion):
        return "install the plug-in: the manifest names no valid package and version"


def _suggest_uninstall(package: str) -> str:
    """Return the command that removes a package, whose metadata may have any name."""
    from packaging.utils import InvalidName, canonicalize_name

    try:
        return f"pip uninstall {canonicalize_name(package, validate=True)}"
    except InvalidName:
        return "remove its folder: the name of the package is invalid"


@cache
def _scan(kind: PluginKind, path: tuple[str, ...]) -> EntryPoints:
    """Return the entry points of a kind. Their packages are not imported."""
    from importlib.metadata import entry_points  # slow to import

    return entry_points(group=f"finesight.{kind}")


class Registry(Generic[T]):
    """Objects of a kind by name: the built-in ones, then those of plug-ins.

    Listing names imports no plug-in, a look-up imports one.

    Args:
        interface: Class of the objects, or base class if the objects are classes.
        has_names: Whether the objects have a name, which is that of their entry point.
    """

    def __init__(
        self,
        kind: PluginKind,
        interface: Any,
        built_in: Mapping[Any, T],
        *,
        has_names: bool = False,
    ) -> None:
        self._kind = kind
        self._interface = interface
        self._built_in = built_in
        self._has_names = has_names

    def __iter__(self) -> Iterator[str]:
        yield from self._built_in
        yield from self.plugin_names

    def __contains__(self, name: object) -> bool:
        return name in self._built_in or name in self.plugin_names

    @property
    def plugin_names(self) -> list[str]:
        """Names that plug-ins add."""
        return sorted(_scan(self._kind, (*sys.path,)).names - {*self._built_in})

    def find_plugin(self, name: str) -> PluginRecord | None:
        """Return the plug-in of a name; None for a built-in or unknown name.

        Raises UserError if several packages define the name.
        """
        entries = _scan(self._kind, (*sys.path,)).select(name=name)
        packages = sorted((one.dist.name, one.dist.version) for one in entries if one.dist)
        owners = [" ".join(one) for one in packages]
        if name in self._built_in:
            owners.insert(0, "finesight")
        if len(owners) > 1:
            raise UserError(
                f"several packages define it: {', '.join(owners)}",
                where=f"plug-in {name} (finesight.{self._kind})",
                expected="one package that defines the name",
                remedy=_suggest_uninstall(packages[-1][0]),
            )
        return PluginRecord(self._kind, name, *packages[0]) if packages else None

    def get(self, name: str) -> T | None:
        """Return an object, or None for an unknown name."""
        if name not in self:
            return None
        return self[name]

    def __getitem__(self, name: str) -> T:
        plugin = self.find_plugin(name)
        if plugin is None:
            return self._built_in[name]
        (entry,) = _scan(self._kind, (*sys.path,)).select(name=name)
        problem = None
        try:
            item = self.adapt(entry, entry.load())
            problem = self.find_problem(name, item)
        except (Exception, SystemExit) as error:
            problem = f"{type(error).__name__}: {error}"
        if problem is not None:
            raise self.build_error(name, entry.value, problem, self._interface)
        return cast(T, item)

    def adapt(self, entry: EntryPoint, item: Any) -> Any:
        """Convert an object of a plug-in for an earlier version."""
        return item

    def find_problem(self, name: str, item: Any) -> str | None:
        """Return why an object does not fit the registry; None if it does."""
        fits = issubclass if isinstance(item, type) else isinstance
        if not fits(item, self._interface) or isabstract(item):
            return f"{item!r:.80} does not implement {self._interface.__name__}"
        if self._has_names and item.name != name:
            kind = self._kind.replace("ies", "y").removesuffix("s")
            return f"the {kind} is named {item.name!r:.60}, its entry point {name!r}"
        return None

    def build_error(self, name: str, target: str, problem: str, interface: Any) -> UserError:
        """Build the error for an object of a plug-in that is not usable.

        Args:
            target: Dotted path of the object.
            interface: Class that the object should implement.
        """
        plugin = self.find_plugin(name)
        if plugin is None:  # its folder is no longer on the path of Python
            return self.build_missing_error(name)
        return UserError(
            problem,
            where=f"plug-in {name} of {plugin.package} {plugin.version}"
            f" (finesight.{self._kind}: {target})",
            expected=f"an importable object that implements {interface.__name__}",
            remedy=f"update the package, or remove it: {_suggest_uninstall(plugin.package)}",
        )

    def build_missing_error(self, name: str) -> UserError:
        """Build the error for a plug-in that is no longer installed."""
        return UserError(
            f"the plug-in {name} (finesight.{self._kind}) is not installed",
            where=f"plug-in {name}",
            expected="the package that defines it on the path of Python",
            remedy="install the package again",
        )
