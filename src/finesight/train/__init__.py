"""Supervised fine-tuning: trainer, data loading, optimizers, checkpoints and the run directory."""

from finesight import make_callable

# `finesight.train(...)` is a call of this package.
make_callable(__name__)
