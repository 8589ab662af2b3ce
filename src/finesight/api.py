"""Python API: the operations as functions, models, and samples.

Each function has the behavior, defaults and errors of the corresponding command, because both are
the same operation. Errors that the user can fix are `UserError`, with the location, the problem,
the expected value and a remedy. Options in messages are arguments: `--map image=path` is
`columns={"image": "path"}`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from finesight.errors import TrainingInterrupted, UserError
<<<<<<< HEAD
from finesight.operations import deployment, evaluation, model, training
from finesight.operations import quickstart as quickstart_workflow
=======
from finesight.operations import dataset, evaluation, model
from finesight.operations import init as initialize
>>>>>>> o1
from finesight.operations.model import IGNORE_INDEX, Encoding, Model, build_question
from finesight.operations.operation import StrPath, as_function, check_counts, to_name

if TYPE_CHECKING:
    from PIL import Image

<<<<<<< HEAD
    from finesight.check.check_issues import CheckResult
    from finesight.data.importer import ImportSummary
=======
    from finesight.config import Recipe
>>>>>>> o1
    from finesight.data.sample import LocatedSample
    from finesight.infer.prediction import Prediction

__all__ = [
    "IGNORE_INDEX",
    "Encoding",
    "Model",
    "TrainingInterrupted",
    "UserError",
    "build_question",
    "check_data",
    "compare",
<<<<<<< HEAD
    "convert",
=======
    "convert_boxes",
>>>>>>> o1
    "doctor",
    "download",
    "draw_boxes",
    "evaluate",
<<<<<<< HEAD
    "export",
    "import_data",
    "launch",
    "load_model",
    "merge",
=======
    "export_data",
    "import_data",
    "init",
    "load_model",
    "plan",
>>>>>>> o1
    "predict",
    "quickstart",
    "read_samples",
    "report",
<<<<<<< HEAD
    "train",
=======
    "show",
>>>>>>> o1
]


init = as_function(initialize.init)
import_data = as_function(dataset.import_data)
export_data = as_function(dataset.export_data)
convert_boxes = as_function(dataset.convert_boxes)
check_data = as_function(dataset.check)
show = as_function(dataset.show)
plan = as_function(dataset.plan)
load_model = as_function(model.load_model)
evaluate = as_function(evaluation.evaluate)
predict = as_function(evaluation.predict)
report = as_function(evaluation.report)
compare = as_function(evaluation.compare)
doctor = as_function(evaluation.doctor)
train = as_function(training.train)
launch = as_function(training.launch)
convert = as_function(training.convert)
quickstart = as_function(quickstart_workflow.quickstart)
download = as_function(deployment.download)
merge = as_function(deployment.merge)
export = as_function(deployment.export)


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
            expected=f"an index below {len(prediction.images)}, the number of images",
            remedy="omit it to draw the first image, and use predictions with images",
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
    from finesight.config import DataFileSettings
    from finesight.data.corpus import load_corpus

    check_counts(limit=limit)
    sources = [DataFileSettings(path=to_name(file), limit=limit) for file in files]
    return load_corpus(sources, require_answer=require_answer).read_samples()


<<<<<<< HEAD
def import_data(
    source: StrPath,
    out: StrPath,
    *,
    columns: Mapping[str, str] | None = None,
    prompt: str | None = None,
    train_fraction: float | None = None,
    eval_last: int | None = None,
    limit: int | None = None,
    format: str | None = None,
) -> ImportSummary:
    """Import a labeled image dataset as samples in the new folder `out`.

    The output is `data.jsonl`, or `train.jsonl` and `eval.jsonl` with `train_fraction` or
    `eval_last`. No image is in both files. `finesight import` has further options.

    Args:
        source: A file, a folder, an archive, or `hf:OWNER/NAME` and `modelscope:OWNER/NAME`.
        out: The folder to create.
        columns: Table columns by role: `image`, `answer`, `question`, `box`, `label`, or `fields`,
            a comma-separated list of columns for a JSON answer.
        prompt: Question for each image.
        train_fraction: Fraction of the rows for training; the others are for validation.
        eval_last: Number of rows at the end for validation.
        limit: Number of rows to import from the start; None for all.
        format: Dataset format; detected by default.

    Raises:
        UserError: Rows are invalid; no folder is created. In messages, the option `--map
            image=path` is `columns={"image": "path"}`.
    """
    from finesight.data.import_source import ImportOptions
    from finesight.data.importer import import_dataset
    from finesight.data.source_fetch import fetch_source

    check_counts(limit=limit, eval_last=eval_last)
    options = ImportOptions(
        format=format,
        columns=columns or {},
        prompt=prompt,
        limit=limit,
        eval_last=eval_last,
        train_fraction=train_fraction,
    )
    with fetch_source(str(source), Path(out), options) as fetched:
        for note in fetched.notes:
            warnings.warn(f"{source}: {note}", stacklevel=2)
        return import_dataset(fetched.path, Path(out), fetched.options)


def check_data(
    data: StrPath | Sequence[StrPath], validation: StrPath | Sequence[StrPath] = ()
) -> CheckResult:
    """Check samples for invalid content, duplicates, and validation images in training data.

    Images, boxes, texts and turns are checked. No file is changed.

    Returns:
        The result: `issue_counts` is the number of issues by code (empty without issues), `issues`
            contains the first issues of each code, and `severity` is the highest severity.

    Raises:
        UserError: A file is unreadable.
    """
    from finesight.check.data_checker import check_sources, inputs_from_files
    from finesight.data.import_source import ImportOptions

    return check_sources(inputs_from_files(to_paths(data), to_paths(validation), ImportOptions()))
=======
def train(
    recipe: StrPath | Mapping[str, Any] | Recipe,
    overrides: Mapping[str, object] | None = None,
    *,
    resume: bool = False,
    trust_metric: bool = False,
) -> RunResult:
    """Fine-tune a model with a recipe, and evaluate it before and after training.

    Args:
        recipe: A recipe file, a `Recipe`, or its settings as a dict.
        overrides: Settings by dotted name that replace those of the recipe: `{"train.steps": 100}`.
        resume: Continue an interrupted run from its newest checkpoint, or return the result of a
            finished run.
        trust_metric: Execute the custom metric (`metric.py`) in a run folder, even if someone else
            created it.

    Returns:
        The result, on every rank. Progress is logged to stderr.

    Raises:
        UserError: A problem that the user can fix, raised before any output is written where
            possible.
        TrainingInterrupted: Ctrl-C or a scheduler stopped the run; a checkpoint was saved.
    """
    from finesight.config import Recipe
    from finesight.evaluate.custom_metric import check_recipe_metric
    from finesight.recipe import load_recipe, recipe_from_dict
    from finesight.train.finalize import load_result
    from finesight.train.run_dir import RunDir
    from finesight.train.training_run import train as run_training

    if isinstance(recipe, Recipe):
        recipe = recipe.model_dump(mode="json")
    path = None if isinstance(recipe, Mapping) else Path(recipe)
    if isinstance(recipe, Mapping):
        settings = recipe_from_dict(recipe, overrides or {})
    else:
        settings = load_recipe(Path(recipe), overrides or {})
    check_recipe_metric(settings, path, overrides or {}, trust=trust_metric)
    result = run_training(settings, resume=resume) or load_result(RunDir(settings.output_dir))
    if result is None:
        raise UserError(
            "no result after the end of the run",
            where=str(settings.output_dir),
            expected="an output folder shared by all ranks",
            remedy="check the log of rank 0",
        )
    return result
>>>>>>> o1
