"""finesight: fine-tune Qwen vision-language models on images.

The names of this module work with Python objects: samples, images in memory, functions as metrics
and rewards. `finesight.api` has the commands as functions, which work with files. Importing the
package imports no dependencies. `__init__.pyi` has the types of the names.
"""

from __future__ import annotations

import sys
from importlib import import_module
from inspect import signature
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

_LOCATIONS = {
    "Message": "finesight.samples.memory_samples:Message",
    "Model": "finesight.operations.model:Model",
    "Sample": "finesight.samples.memory_samples:Sample",
    "StopTraining": "finesight.errors:StopTraining",
    "TrainingClient": "finesight.operations.training_client:TrainingClient",
    "TrainingInterrupted": "finesight.errors:TrainingInterrupted",
    "UserError": "finesight.errors:UserError",
    "load": "finesight.api:load_model",
    "start_server": "finesight.serve.model_server:start_server",
}

__all__ = [*_LOCATIONS, "train"]


def __getattr__(name: str) -> Any:
    """Import a name on its first use."""
    if name in ("api", "train"):
        return import_module(f"finesight.{name}")
    if name not in _LOCATIONS:
        own = ", ".join(__all__)
        text = f"it has {own}; finesight.api has the commands as functions"
        raise AttributeError(f"module 'finesight' has no attribute {name!r}: {text}")
    module, _, attribute = _LOCATIONS[name].partition(":")
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "api"})


class CallablePackage(ModuleType):
    """The package `finesight.train`, which is also the function of this name."""

    @property
    def __wrapped__(self) -> Any:
        """The function, of which `inspect.signature` shows the arguments."""
        return import_module("finesight.operations.python_training").train

    @property
    def __doc__(self) -> str:  # type: ignore[override]
        """The usage and the arguments of the function, which `help` shows."""
        function = self.__wrapped__
        return f"finesight.train{signature(function)}\n\n{function.__doc__}"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function; see `finesight.operations.python_training.train`."""
        return self.__wrapped__(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return import_module, (self.__name__,)


def make_callable(package: str) -> None:
    """Make a package callable, whichever of its modules was imported first."""
    module = sys.modules[package]
    module.__class__ = CallablePackage
