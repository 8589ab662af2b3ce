"""Imports of packages that the core does not import: its satellites, such as `finesight.hub`."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from operator import attrgetter
from typing import Any

from finesight.errors import UserError


def load_satellite(target: str) -> Any:
    """Import an object of a package that the core does not import, such as `finesight.hub`.

    Args:
        target: Dotted path, as `package.module:object`.

    Raises:
        UserError: The package is not installed.
    """
    item = find_satellite(target)
    if item is None:
        raise build_missing_error(_get_package(target), target)
    return item


def find_satellite(target: str) -> Any:
    """Import an object like `load_satellite`; None if its package is not installed."""
    if find_spec(_get_package(target)) is None:
        return None
    module, _, attribute = target.partition(":")
    return attrgetter(attribute)(import_module(module))


def build_missing_error(part: str, where: str) -> UserError:
    """Return the error for a package or an operation that is not installed."""
    return UserError(
        f"finesight is installed without {part}",
        where=where,
        expected="a complete installation",
        remedy="install finesight again: pip install --force-reinstall finesight",
    )


def _get_package(target: str) -> str:
    module = target.partition(":")[0]
    return ".".join(module.split(".")[:2])
