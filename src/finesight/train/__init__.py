"""Supervised fine-tuning: trainer, data loading, optimizers, checkpoints and the run directory."""

import sys

from finesight import CallablePackage

# `finesight.train(...)` is a call of this package, whichever module was imported first.
sys.modules[__name__].__class__ = CallablePackage
