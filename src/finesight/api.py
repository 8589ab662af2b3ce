"""Python API: the operations as functions, models, and samples.

Each function has the behavior, defaults and errors of the corresponding command, because both are
the same operation. Errors that the user can fix are `UserError`, with the location, the problem,
the expected value and a remedy. Options in messages are arguments: `--map image=path` is
`columns={"image": "path"}`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finesight.errors import TrainingInterrupted, UserError, describe_indices
from finesight.operations import (
    evaluation,
    find_operation,
    is_installed,
    model,
    responses,
    training,
)
from finesight.operations.first_guesses import suggest_function
from finesight.operations.model import IGNORE_INDEX, Encoding, Model, build_question
from finesight.operations.operation import StrPath, as_function, check_counts, to_name
from finesight.operations.show import show as show_operation

if TYPE_CHECKING:
    from PIL import Image

    from finesight.convert import convert_operation
    from finesight.doctor import doctor_operation
    from finesight.export import export_operations
    from finesight.infer.prediction import Prediction
    from finesight.ingest import data_operations, download_operation, init_operation
    from finesight.label import pairs_operation
    from finesight.launch import launch_operations
    from finesight.plan import plan_operation
    from finesight.samples.sample import LocatedSample

__all__ = [
    "IGNORE_INDEX", "Encoding", "Model", "TrainingInterrupted", "UserError", "build_question",
    "check_data", "compare", "convert", "doctor", "download", "draw_boxes",
    "evaluate", "export", "export_data", "guard", "import_data", "init", "launch", "load_model",
    "merge", "pairs", "plan", "predict", "quickstart", "read_samples", "report", "sample", "search",
    "show", "train",
]  # fmt: skip

show = as_function(show_operation)
load_model = as_function(model.load_model)
evaluate = as_function(evaluation.evaluate)
predict = as_function(evaluation.predict)
sample = as_function(responses.sample)
report = as_function(evaluation.report)
compare = as_function(evaluation.compare)
guard = as_function(evaluation.guard)
train = as_function(training.train)

if TYPE_CHECKING:
    init = as_function(init_operation.init)
    import_data = as_function(data_operations.import_data)
    export_data = as_function(data_operations.export_data)
    check_data = as_function(data_operations.check_data)
    pairs = as_function(pairs_operation.pairs)
    plan = as_function(plan_operation.plan)
    doctor = as_function(doctor_operation.doctor)
    search = as_function(launch_operations.search)
    launch = as_function(launch_operations.launch)
    convert = as_function(convert_operation.convert)
    quickstart = as_function(init_operation.quickstart)
    download = as_function(download_operation.download)
    merge = as_function(export_operations.merge)
    export = as_function(export_operations.export)

_OPERATION_NAMES = {"import_data": "import", "export_data": "data export", "check_data": "check"}
"""Names of operations that differ from those of their functions."""


def __getattr__(name: str) -> Any:
    """Import the function of an operation on its first use.

    Raises AttributeError with a similar name, or the one of a first guess, for other names.
    """
    if name in __all__:
        operation = _OPERATION_NAMES.get(name, name)
        if not is_installed(operation):
            raise AttributeError(f"finesight is installed without {operation}")
        function = as_function(find_operation(operation))
        globals()[name] = function
        return function
    similar = suggest_function(name, __all__)
    hint = f". Did you mean {similar}?" if similar else ""
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}{hint}")


def __dir__() -> list[str]:
    installed = [name for name in __all__ if is_installed(_OPERATION_NAMES.get(name, name))]
    return sorted({*globals(), *installed})


def draw_boxes(prediction: Prediction, image_index: int = 0) -> Image.Image:
    """Draw the predicted boxes on a copy of an image of a prediction.

    Args:
        prediction: The prediction.
        image_index: 0-based index of the image.

    Returns:
        An RGB image of the original size.

    Raises:
        UserError: The prediction has no such image.
    """
    from finesight.infer.prediction import annotate_image

    if not 0 <= image_index < len(prediction.images):
        raise UserError(
            f"image {image_index}",
            where="draw_boxes",
            expected=describe_indices(len(prediction.images), "image"),
            remedy="omit it to draw the first image"
            if prediction.images
            else "draw the boxes of predictions with images",
        )
    return annotate_image(prediction, image_index)


def read_samples(
    *files: StrPath, limit: int | None = None, require_answer: bool = True
) -> list[LocatedSample]:
    """Read and validate samples from files.

    Args:
        files: JSONL, Parquet or tar files as paths, patterns such as `shards/*.tar`, or object
            storage URLs.
        limit: Number of samples to read from the start of each file; None for all.
        require_answer: Reject samples whose last turn is a question.

    Returns:
        Samples with turns in `sample.messages` and image paths relative to `folder`.

    Raises:
        UserError: A sample is invalid. The error names file and line.
    """
    from finesight.samples.corpus import load_corpus
    from finesight.settings.config import DataFileSettings

    check_counts(limit=limit)
    sources = [DataFileSettings(path=to_name(file), limit=limit) for file in files]
    return load_corpus(sources, require_answer=require_answer).read_samples()
