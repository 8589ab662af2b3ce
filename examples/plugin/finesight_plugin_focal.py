"""Light half of an objective for finesight: the focal loss of the answers."""

from typing import Annotated

from pydantic import Field

from finesight.components import SettingProblem
from finesight.objective_components import Needs, ObjectiveComponent
from finesight.settings.setting_types import CoercedFloat, SettingsSection


class Settings(SettingsSection):
    gamma: Annotated[CoercedFloat, Field(ge=0.0)] = 2.0


def needs(settings, recipe):
    return Needs(supports_dropout=True)


def check(settings, recipe):
    if settings.gamma == 0:
        problem = "train.focal.gamma=0 is the loss of supervised fine-tuning"
        yield SettingProblem(problem, "set train.objective=sft, or gamma above 0")


COMPONENT = ObjectiveComponent(
    kind="objectives",
    name="focal",
    title="Focal loss",
    settings=Settings,
    implementation="finesight_plugin_focal_loss:FocalObjective",
    needs=needs,
    accepted_samples=frozenset({"label none", "label true"}),
    check=check,
)
