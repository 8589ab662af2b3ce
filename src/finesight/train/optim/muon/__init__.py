"""Muon (Jordan et al. 2024), for training from scratch."""

from finesight.components import NoSettings
from finesight.optimizer_components import OptimizerComponent

COMPONENT = OptimizerComponent(
    kind="optimizers",
    name="muon",
    title="Muon",
    settings=NoSettings,
    implementation="finesight.train.optim.muon.update:Muon",
    position=3,
    only_matrices=True,
)
