"""Optimizers: one folder each, with its texts and limits in `__init__.py`."""
