"""Imports of packages that the core does not import: its satellites, such as `finesight.hub`."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from operator import attrgetter
from typing import Any


def load_satellite(target: str) -> Any:
    """Import an object of a package that the core does not import, such as `finesight.hub`.

    Args:
        target: Dotted path, as `package.module:object`.
    """
    module, _, attribute = target.partition(":")
    return attrgetter(attribute)(import_module(module))


def find_satellite(target: str) -> Any:
    """Import an object like `load_satellite`; None if its package is not installed."""
    package = ".".join(target.split(".")[:2])
    if find_spec(package) is None:
        return None
    return load_satellite(target)
