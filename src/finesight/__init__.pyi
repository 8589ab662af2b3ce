"""Types of the names that `finesight` imports on their first use."""

from finesight import api as api
from finesight.api import load_model as load
from finesight.errors import StopTraining as StopTraining
from finesight.errors import TrainingInterrupted as TrainingInterrupted
from finesight.errors import UserError as UserError
from finesight.operations.model import Model as Model
from finesight.operations.python_training import train as train
from finesight.operations.training_client import TrainingClient as TrainingClient
from finesight.samples.memory_samples import Message as Message
from finesight.samples.memory_samples import Sample as Sample
from finesight.serve.model_server import start_server as start_server

__version__: str
__all__ = [
    "Message", "Model", "Sample", "StopTraining", "TrainingClient", "TrainingInterrupted",
    "UserError", "load", "start_server", "train",
]  # fmt: skip

def make_callable(package: str) -> None: ...
