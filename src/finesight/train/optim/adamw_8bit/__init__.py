"""AdamW with moments of matrices in 8 bits (Dettmers et al. 2022)."""

from finesight.components import NoSettings
from finesight.optimizer_components import DEFAULT_OPTIMIZER, OptimizerComponent

COMPONENT = OptimizerComponent(
    kind="optimizers",
    name="adamw_8bit",
    title="8-bit AdamW",
    settings=NoSettings,
    implementation="finesight.train.optim.adamw_8bit.update:AdamW8bit",
    position=2,
    only_matrices=True,
    saves_memory_of=DEFAULT_OPTIMIZER,
)
