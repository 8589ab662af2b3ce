"""Components: objectives and other parts that own their settings, texts, rules and needs.

A component is a module in the folder of its kind, with the constant `COMPONENT`. This is its light
half, which imports pydantic but no torch: recipes, help and estimates read it. Its heavy half does
the work, and is imported by its dotted path. Other packages add components by entry points.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Generic, TypeVar, cast

from finesight.plugins import PluginKind, Registry
from finesight.setting_types import SettingsSection

SettingsT = TypeVar("SettingsT", bound=SettingsSection)
NeedsT = TypeVar("NeedsT")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class SettingProblem:
    """Settings of a recipe that contradict each other, and the remedy."""

    problem: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.problem}: {self.remedy}"


def find_no_problem(settings: SettingsSection, recipe: Any) -> Iterator[SettingProblem]:
    """Return no problem: the rules of a component without any."""
    yield from ()


@dataclass(frozen=True, kw_only=True)
class Component(Generic[SettingsT, NeedsT]):
    """Light half of a component. Functions receive its settings and the complete `Recipe`.

    Attributes:
        kind: Folder of the component, and group `finesight.KIND` of the entry points of plug-ins.
        name: Name in recipes: that of the module, or of the entry point of a plug-in.
        title: Name for users.
        settings: Class of its section of a recipe; one without fields for no section.
        implementation: Heavy half, as `package.module:Class`.
        needs: What the component needs from other modules.
        check: Rules over the settings of a recipe that uses the component.
        position: Place among the components of its kind in lists and files. Components with the
            same position are sorted by name.
    """

    kind: PluginKind
    name: str
    title: str
    settings: type[SettingsT]
    implementation: str
    needs: Callable[[SettingsT, Any], NeedsT]
    check: Callable[[SettingsT, Any], Iterator[SettingProblem]] = field(default=find_no_problem)
    position: int = 1000

    @property
    def has_section(self) -> bool:
        """Return whether a recipe has a section of the component."""
        return bool(self.settings.model_fields)


ComponentT = TypeVar("ComponentT", bound=Component[Any, Any])


class _BuiltInComponents(Mapping[str, ComponentT]):
    """Built-in components of a kind by name, read from the modules of a package.

    Args:
        package: Package of the kind. Its modules are not components, its subpackages are.
    """

    def __init__(self, package: str) -> None:
        self._package = package

    @cached_property
    def _components(self) -> dict[str, ComponentT]:
        spec = find_spec(self._package)
        assert spec is not None, f"no package {self._package}"
        found: list[ComponentT] = []
        for module in pkgutil.iter_modules(spec.submodule_search_locations):
            if module.ispkg:
                component = import_module(f"{self._package}.{module.name}").COMPONENT
                assert component.name == module.name, f"{component.name} in {module.name}"
                found.append(component)
        found.sort(key=lambda component: (component.position, component.name))
        return {component.name: component for component in found}

    def __getitem__(self, name: str) -> ComponentT:
        return self._components[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._components)

    def __len__(self) -> int:
        return len(self._components)


class ComponentRegistry(Registry[ComponentT]):
    """Components of a kind by name: the built-in ones, then those of plug-ins.

    Args:
        interface: Class of the light halves.
        package: Package whose subpackages are the built-in components.
    """

    def __init__(self, kind: PluginKind, interface: type[ComponentT], package: str) -> None:
        super().__init__(kind, interface, _BuiltInComponents(package))

    def built_in(self) -> tuple[ComponentT, ...]:
        """Return the built-in components in their order."""
        return tuple(self._built_in.values())

    def load_implementation(self, name: str, interface: type[T]) -> type[T]:
        """Import the heavy half of a component, a subclass of `interface`.

        Raises:
            UserError: The heavy half of a plug-in cannot be imported, or is another object.
        """
        target = self[name].implementation
        problem = None
        try:
            module, _, attribute = target.partition(":")
            item = getattr(import_module(module), attribute)
            if not (isinstance(item, type) and issubclass(item, interface)):
                problem = f"{item!r:.80} is no subclass of {interface.__name__}"
        except (Exception, SystemExit) as error:
            if self.find_plugin(name) is None:
                raise
            problem = f"{type(error).__name__}: {error}"
        if problem is not None:
            raise self.build_error(name, target, problem, interface)
        return cast(type[T], item)
