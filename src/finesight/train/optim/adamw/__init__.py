"""AdamW (Loshchilov & Hutter 2019)."""

from finesight.components import NoSettings
from finesight.optimizer_components import OptimizerComponent

COMPONENT = OptimizerComponent(
    kind="optimizers",
    name="adamw",
    title="AdamW",
    settings=NoSettings,
    implementation="finesight.train.optim.adamw.update:AdamW",
    position=1,
    supports_sharding=True,
)
