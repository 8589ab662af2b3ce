"""Rewards as components: their settings in recipes, the packages they need, their registry."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Generic, TypeVar

from pydantic import Field, SerializerFunctionWrapHandler, ValidationError, model_serializer
from pydantic.fields import FieldInfo

from finesight.components import Component, ComponentRegistry, find_wrong_type
from finesight.settings.setting_types import CoercedFloat, SettingsSection

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint


class RewardSettings(SettingsSection):
    """An item of `rewards` in a recipe: the function that scores a response, and its weight.

    A reward with options has a subclass, to which it adds them as fields. In recipes of runs, each
    item also has the options of other built-in rewards: null, which must be their default.

    Attributes:
        name: Reward, metric of `eval.metric` with an optional score, as in `latex.similarity`, or
            `path/to/rewards.py:function`.
    """

    name: str
    weight: Annotated[CoercedFloat, Field(gt=0.0)] = 1.0

    @classmethod
    def list_fields(cls) -> dict[str, FieldInfo]:
        """Return the fields by name, with the options of all built-in rewards."""
        fields = dict(RewardSettings.model_fields)
        for component in REWARDS.list_built_in():
            fields |= component.settings.model_fields
        return fields | cls.model_fields

    @classmethod
    def find_field(cls, name: str) -> FieldInfo | None:
        """Return the field of a setting, or of an option of a built-in reward."""
        return cls.list_fields().get(name)

    @model_serializer(mode="wrap")
    def _serialize(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Return the settings as dictionary, with the options of other built-in rewards."""
        content = handler(self)
        return {name: content.get(name) for name in self.list_fields()}


RewardSettingsT = TypeVar("RewardSettingsT", bound=RewardSettings)

_REWARD_SETTINGS: Any = RewardSettings  # a default has no type parameter


@dataclass(frozen=True, slots=True)
class ExtraPackage:
    """A package that a reward imports, and the extra of finesight that installs it."""

    name: str
    extra: str


def need_no_package(settings: RewardSettings) -> Sequence[ExtraPackage]:
    """Return no package: the needs of most rewards."""
    return ()


@dataclass(frozen=True, kw_only=True)
class RewardComponent(Component[RewardSettingsT], Generic[RewardSettingsT]):
    """Light half of a reward. The heavy half is a subclass of `Reward`.

    Attributes:
        settings: Class of its items in `rewards` of a recipe.
        packages: Packages that a reward with these settings imports.
        unscored_reason: Reason why a response has no score.
        compares_references: Whether the score depends on the references. Otherwise, its gains may
            be those of the format only.
        metrics: Metrics of which it is the reward in new recipes, instead of the metric itself.
        function: Function that scores a case: a plug-in for finesight 0.1.0, without component.
    """

    settings: type[RewardSettingsT] = _REWARD_SETTINGS
    packages: Callable[[RewardSettingsT], Sequence[ExtraPackage]] = field(default=need_no_package)
    unscored_reason: str = "it returned no number"
    compares_references: bool = True
    metrics: tuple[str, ...] = ()
    function: Callable[[Any], Any] | None = None

    @property
    def options(self) -> list[str]:
        """Names of the own settings."""
        return [name for name in self.settings.model_fields if name not in _COMMON_SETTINGS]

    @property
    def needs_options(self) -> bool:
        """Whether the name alone is no valid item of a recipe."""
        try:
            self.settings(name=self.name)
        except ValidationError:
            return True
        return False

    def find_problem(self) -> str | None:
        """Return why other modules cannot use the reward; None if they can."""
        problem = find_wrong_type(self)
        if problem is not None:
            return problem
        if not isinstance(self.settings, type) or not issubclass(self.settings, RewardSettings):
            return f"settings is {self.settings!r:.80}, no subclass of RewardSettings"
        if not self.implementation and self.function is None:
            return "it has no implementation"
        return None


_COMMON_SETTINGS = frozenset(RewardSettings.model_fields)


class RewardRegistry(ComponentRegistry[RewardComponent[Any]]):
    """Rewards by name. Functions of plug-ins are components without options."""

    def adapt(self, entry: EntryPoint, item: Any) -> Any:
        """Return the component of a function, as plug-ins for finesight 0.1.0 define it."""
        if not callable(item) or isinstance(item, type):
            return item
        return RewardComponent[RewardSettings](
            kind="rewards", name=entry.name, title=entry.name, function=item
        )

    def suggest_for_metric(self, metric: str) -> str:
        """Return the reward of a new recipe with a metric."""
        for component in self.list_built_in():
            if metric in component.metrics:
                return component.name
        return metric


REWARDS = RewardRegistry("rewards", RewardComponent, "finesight.evaluate.rewards")
"""Rewards by name: values of `rewards.name`, beside metrics and functions in Python files."""
