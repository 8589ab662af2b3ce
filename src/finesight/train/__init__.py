"""Training: loop, data loading, objectives, optimizers, checkpoints and the run folder."""

from finesight import make_callable

# `finesight.train(...)` is a call of this package.
make_callable(__name__)
