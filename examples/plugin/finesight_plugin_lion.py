"""Light half of an optimizer for finesight: Lion."""

from typing import Annotated

from pydantic import Field

from finesight.optimizer_components import OptimizerComponent
from finesight.settings.setting_types import CoercedFloat, SettingsSection

Beta = Annotated[CoercedFloat, Field(ge=0.0, lt=1.0)]


class Settings(SettingsSection):
    beta_1: Beta = 0.9
    beta_2: Beta = 0.99


COMPONENT = OptimizerComponent(
    kind="optimizers",
    name="lion",
    title="Lion",
    settings=Settings,
    implementation="finesight_plugin_lion_update:Lion",
    supports_sharding=True,
)
