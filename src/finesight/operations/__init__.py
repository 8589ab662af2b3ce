"""Operations: what the commands, the Python API and the web application do.

An operation is a function. Its signature is the request: the name, type, bounds and description of
each parameter. The options of the command, the arguments of the Python function and the fields of
the page are derived from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from finesight.satellites import build_missing_error

_TARGETS: Mapping[str, Mapping[str, str]] = {
    "Start": {
        "init": "ingest.init_operation:init",
        "quickstart": "ingest.init_operation:quickstart",
        "studio": "app.start:studio",
        "doctor": "doctor.doctor_operation:doctor",
        "download": "ingest.download_operation:download",
    },
    "Data": {
        "import": "ingest.data_operations:import_data",
        "check": "ingest.data_operations:check_data",
        "label": "app.start_label:label",
        "sample": "operations.responses:sample",
        "pairs": "label.pairs_operation:pairs",
        "show": "operations.show:show",
        "data export": "ingest.data_operations:export_data",
    },
    "Training": {
        "plan": "plan.plan_operation:plan",
        "train": "operations.training:train",
        "search": "launch.launch_operations:search",
        "launch": "launch.launch_operations:launch",
        "convert": "convert.convert_operation:convert",
    },
    "Evaluation": {
        "eval": "operations.evaluation:evaluate",
        "report": "operations.evaluation:report",
        "compare": "operations.evaluation:compare",
        "guard": "operations.evaluation:guard",
    },
    "Inference": {
        "predict": "operations.evaluation:predict",
        "chat": "cli.chat:chat",
        "web": "app.start:web",
        "serve": "app.start:serve",
    },
    "Deployment": {
        "merge": "export.export_operations:merge",
        "export": "export.export_operations:export",
    },
}


def _list_installed() -> dict[str, dict[str, str]]:
    """Return the operations whose packages exist: the core works without the others."""
    installed: dict[str, dict[str, str]] = {}
    for group, targets in _TARGETS.items():
        for name, target in targets.items():
            if find_spec(f"finesight.{target.partition('.')[0]}") is not None:
                installed.setdefault(group, {})[name] = target
    return installed


OPERATIONS = _list_installed()
"""Module and function of the operations by group and name, in the order of the help.

A name may have two words.
"""


def is_installed(name: str) -> bool:
    """Return whether the package of an operation is installed."""
    return any(name in group for group in OPERATIONS.values())


def find_operation(name: str) -> Callable[..., Any]:
    """Import the operation with a name.

    Raises:
        UserError: Its package is not installed.
    """
    if not is_installed(name):
        raise build_missing_error(name, name)
    target = {one: group[one] for group in OPERATIONS.values() for one in group}[name]
    module, _, function = target.partition(":")
    operation: Callable[..., Any] = getattr(import_module(f"finesight.{module}"), function)
    return operation
