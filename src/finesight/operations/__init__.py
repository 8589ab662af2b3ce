"""Operations: what the commands, the Python API and the web application do.

An operation is a function. Its signature is the request: the name, type, bounds and description of
each parameter. The options of the command, the arguments of the Python function and the fields of
the page are derived from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

OPERATIONS: Mapping[str, Mapping[str, str]] = {
    "Start": {
        "init": "operations.init:init",
        "quickstart": "operations.init:quickstart",
        "studio": "app.start:studio",
        "doctor": "operations.evaluation:doctor",
        "download": "operations.deployment:download",
    },
    "Data": {
        "import": "operations.dataset:import_data",
        "check": "operations.dataset:check_data",
        "label": "app.start_label:label",
        "sample": "operations.responses:sample",
        "pairs": "operations.responses:pairs",
        "show": "operations.dataset:show",
        "data export": "operations.dataset:export_data",
    },
    "Training": {
        "plan": "operations.training:plan",
        "train": "operations.training:train",
        "search": "operations.training:search",
        "launch": "operations.training:launch",
        "convert": "operations.training:convert",
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
        "merge": "operations.deployment:merge",
        "export": "operations.deployment:export",
    },
}
"""Module and function of the operations by group and name, in the order of the help.

A name may have two words.
"""


def find_operation(name: str) -> Callable[..., Any]:
    """Import the operation with a name."""
    target = {one: group[one] for group in OPERATIONS.values() for one in group}[name]
    module, _, function = target.partition(":")
    operation: Callable[..., Any] = getattr(import_module(f"finesight.{module}"), function)
    return operation
