"""Components: objectives and other parts that own their settings, texts, rules and needs.

A component is a module or package in the folder of its kind, with the constant `COMPONENT`. This is
its light half, which imports pydantic but no torch: recipes, help and estimates read it. Its heavy
half does the work, and is imported by its dotted path. Other packages add components by entry
points.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields
from functools import cached_property, wraps
from importlib import import_module
from inspect import isabstract
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from finesight.errors import UserError
from finesight.plugins import PluginKind, Registry, list_modules
from finesight.settings.setting_types import SettingsSection

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

SettingsT = TypeVar("SettingsT", bound=SettingsSection)
T = TypeVar("T")

_NAME_PATTERN = re.compile("[a-z][a-z0-9_-]*")
"""Names of components, which are keys of recipes and parts of overrides."""


def join_problems(problems: Sequence[SettingProblem]) -> str:
    """Join problems as one: all of them, then all remedies."""
    what = "; ".join(one.problem for one in problems)
    remedies = "; ".join(one.remedy for one in problems)
    return f"{what}: {remedies}"


class NoSettings(SettingsSection):
    """Settings of a component without any."""


_NO_SETTINGS: Any = NoSettings  # a default has no type parameter


@dataclass(frozen=True, slots=True)
class SettingProblem:
    """Settings of a recipe that contradict each other, and the remedy."""

    problem: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.problem}: {self.remedy}"


def find_no_problem(*values: Any) -> Iterator[SettingProblem]:
    """Return no problem: the rules of a component without any."""
    yield from ()


@dataclass(frozen=True, kw_only=True)
class Component(Generic[SettingsT]):
    """Light half of a component. Functions receive its settings and the complete `Recipe`.

    Attributes:
        kind: Folder of the component, and group `finesight.KIND` of the entry points of plug-ins.
        name: Name in recipes and options: that of the module, or of the entry point of a plug-in.
        title: Name for users.
        settings: Class of its section of a recipe; one without fields for no section. All settings
            have a default.
        implementation: Heavy half, as `package.module:Class`; empty for none.
        check: Rules over the settings of a recipe that uses the component.
        position: Place among the components of its kind in lists and files. Components with the
            same position are sorted by name.
    """

    kind: PluginKind
    name: str
    title: str
    settings: type[SettingsT] = _NO_SETTINGS
    implementation: str = ""
    check: Callable[[SettingsT, Any], Iterator[SettingProblem]] = field(default=find_no_problem)
    position: int = 1000

    @property
    def has_section(self) -> bool:
        """Return whether a recipe has a section of the component."""
        return bool(self.settings.model_fields)

    def settings_of(self, section: Any) -> SettingsT:
        """Return the settings of this component in a section of a recipe, such as `train`."""
        settings = section.sections.get(self.name)
        if settings is None:
            return self.settings()
        assert isinstance(settings, self.settings), f"{settings!r} for {self.name}"
        return settings

    def find_problem(self) -> str | None:
        """Return why other modules cannot use the component; None if they can."""
        problem = find_wrong_type(self)
        if problem is not None:
            return problem
        if not isinstance(self.settings, type) or not issubclass(self.settings, SettingsSection):
            return f"settings is {self.settings!r:.80}, no subclass of SettingsSection"
        try:
            self.settings()
        except ValueError as error:  # pydantic's, too
            reason = " ".join(str(error).split())
            return f"its settings need defaults: {reason:.300}"
        return None


def find_wrong_type(values: DataclassInstance) -> str | None:
    """Return which attribute has another type than its default; None if there is none.

    `kind`, `name` and `title` are texts. Attributes without default or with None are not checked.
    """
    for attribute in fields(values):
        default = attribute.default
        if attribute.default_factory is not MISSING:
            default = attribute.default_factory()
        value = attrgetter(attribute.name)(values)
        if attribute.name in ("kind", "name", "title"):
            fits = isinstance(value, str)
        elif default is None or default is MISSING or attribute.name == "settings":
            fits = True  # the class checks it
        elif callable(default):
            fits = callable(value)
        elif isinstance(default, Mapping):
            fits = isinstance(value, Mapping)
        elif isinstance(default, Set):
            fits = isinstance(value, Set)
        elif isinstance(default, float):
            fits = isinstance(value, int | float)
        else:
            fits = isinstance(value, type(default))
        if isinstance(default, tuple) and fits and all(isinstance(x, str) for x in default):
            fits = all(isinstance(item, str) for item in value)
        if not fits:
            return f"{attribute.name} is {value!r:.60}, which has another type than its default"
    return None


ComponentT = TypeVar("ComponentT", bound=Component[Any])


class _BuiltInComponents(Mapping[str, ComponentT]):
    """Built-in components of a kind by name, read from the modules of a package.

    Args:
        kind: Kind of the components.
        package: Package of the kind, whose modules and subpackages are the components.
        helpers: Names of modules that are no components.
    """

    def __init__(self, kind: PluginKind, package: str, helpers: Collection[str]) -> None:
        self._kind = kind
        self._package = package
        self._helpers = helpers

    @cached_property
    def _components(self) -> dict[str, ComponentT]:
        found: list[ComponentT] = []
        for module in list_modules(self._package, self._helpers):
            component = import_module(f"{self._package}.{module}").COMPONENT
            # Names have dashes where those of modules have underscores.
            file = component.name.replace("-", "_")
            assert file == module, f"{component.name} in {module}"
            assert component.kind == self._kind, f"{module} is of {component.kind}"
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

    A look-up of a built-in name scans no packages. `find_plugin` reports those that define it, too.

    Args:
        interface: Class of the light halves.
        package: Package whose modules and subpackages are the built-in components.
        helpers: Names of modules of the package that are no components.
    """

    def __init__(
        self,
        kind: PluginKind,
        interface: type[ComponentT],
        package: str,
        helpers: Collection[str] = (),
    ) -> None:
        built_in = _BuiltInComponents[ComponentT](kind, package, helpers)
        super().__init__(kind, interface, built_in, has_names=True)

    def __getitem__(self, name: str) -> ComponentT:
        if name in self._built_in:
            return self._built_in[name]
        if name not in self:
            raise self.build_missing_error(name)
        return super().__getitem__(name)

    def list_built_in(self) -> tuple[ComponentT, ...]:
        """List the built-in components in their order."""
        return tuple(self._built_in.values())

    def list_available(self) -> tuple[ComponentT, ...]:
        """List the built-in components, then those of plug-ins that work. Imports the plug-ins."""
        found = [*self.list_built_in()]
        for name in self.plugin_names:
            with suppress(UserError):  # An error names the plug-in where a recipe chooses it.
                found.append(self[name])
        return tuple(found)

    def is_built_in(self, name: str) -> bool:
        """Return whether a name is that of a built-in component."""
        return name in self._built_in

    def find_problem(self, name: str, item: Any) -> str | None:
        """Return why an object is no component of the registry; None if it is one."""
        problem = super().find_problem(name, item)
        if problem is not None:
            return problem
        # Names are parts of file names.
        if not re.fullmatch(r"[^./\\\x00-\x20][^/\\\x00-\x1f\x7f]*", name):
            return (
                "its name starts with a dot or a space, or contains a slash or a control character"
            )
        if item.kind != self._kind:
            return f"its kind is {item.kind!r:.60} instead of {self._kind!r}"
        found: str | None = item.find_problem()
        return found

    def check_name(self, name: str, reserved: Collection[str], section: str) -> None:
        """Verify that a name is usable as section of a recipe, and defined only once.

        Args:
            reserved: Names of other settings in the section.
            section: Section of the recipe that contains those of the components.

        Raises:
            UserError: The name of a plug-in is invalid, or several packages define it.
        """
        plugin = self.find_plugin(name)
        if plugin is None:
            return
        problem = ""
        if name in reserved:
            problem = f"the name {name} is a setting of {section}"
        elif not is_component_name(name):
            problem = f"the name {name!r:.80} is invalid"
        if problem:
            raise UserError(
                problem,
                where=plugin.describe(),
                expected="an entry point named by lower-case letters, digits, - and _, unlike the"
                f" settings of {section}",
                remedy="rename it in the package, or remove the package",
            )

    def call(
        self,
        name: str,
        function: Callable[..., T],
        *arguments: Any,
        passes: tuple[type[Exception], ...] = (),
    ) -> T:
        """Call a function of a component.

        Args:
            passes: Other exceptions that the caller handles.

        Raises:
            UserError: A function of a plug-in raises another exception than `UserError`.
        """
        try:
            return function(*arguments)
        except (Exception, SystemExit) as error:
            if self.is_built_in(name) or isinstance(error, (UserError, *passes)):
                raise
            problem = f"{type(error).__name__}: {error}"
            raise self.build_call_error(name, function, problem) from error

    def list_problems(
        self, name: str, rule: Callable[..., Iterator[SettingProblem]], *values: Any
    ) -> Sequence[SettingProblem]:
        """List the problems that a rule of a component finds.

        Raises:
            UserError: The rule of a plug-in does not work.
        """

        @wraps(rule)  # for the name in an error
        def collect() -> list[SettingProblem]:
            return list(rule(*values))

        problems = self.call(name, collect)
        for problem in problems:
            if not isinstance(problem, SettingProblem):
                text = f"yields {problem!r:.80} instead of SettingProblem"
                raise self.build_call_error(name, rule, text)
        return problems

    def build_call_error(self, name: str, function: Callable[..., Any], problem: str) -> UserError:
        """Build the error for a function of a plug-in that does not work."""
        module = getattr(function, "__module__", "")
        target = f"{module}:{getattr(function, '__qualname__', function)}"
        return self.build_error(name, target, problem, self._interface)

    def load_implementation(self, name: str, interface: type[T]) -> type[T]:
        """Import the heavy half of a component, a subclass of `interface`.

        Raises:
            UserError: The heavy half of a plug-in cannot be imported, or is another object.
        """

        def find_problem(item: Any) -> str | None:
            if not (isinstance(item, type) and issubclass(item, interface)):
                return f"{item!r:.80} is no subclass of {interface.__name__}"
            if isabstract(item):
                return f"{item!r:.80} lacks methods of {interface.__name__}"
            return None

        target = self[name].implementation
        return cast(type[T], self.load_object(name, target, interface, find_problem))

    def load_function(self, name: str) -> Callable[..., Any]:
        """Import the heavy half of a component, a function.

        Raises:
            UserError: The heavy half of a plug-in cannot be imported, or is another object.
        """

        def find_problem(item: Any) -> str | None:
            return None if callable(item) else f"{item!r:.80} is no function"

        target = self[name].implementation
        function = self.load_object(name, target, self._interface, find_problem)
        return cast(Callable[..., Any], function)

    def load_object(
        self,
        name: str,
        target: str,
        interface: Any,
        find_problem: Callable[[Any], str | None],
    ) -> Any:
        """Import an object of a component by its dotted path.

        Args:
            target: Dotted path, as `package.module:object`.
            interface: Class that the object should implement, for errors.
            find_problem: Function that returns why the object does not implement it, or None.

        Raises:
            UserError: The object of a plug-in cannot be imported, or is another one.
        """
        try:
            module, _, attribute = target.partition(":")
            item = attrgetter(attribute)(import_module(module))
            problem = find_problem(item)
        except (Exception, SystemExit) as error:
            if self.is_built_in(name):
                raise
            problem = f"{type(error).__name__}: {error}"
        if problem is not None:
            raise self.build_error(name, target, problem, interface)
        return item


def is_component_name(name: str) -> bool:
    """Return whether a name can be a section of a recipe: no dots, which separate settings."""
    return _NAME_PATTERN.fullmatch(name) is not None
