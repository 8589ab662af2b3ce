"""Python API: load a model, encode samples, train, evaluate and generate.

Each function has the behavior, defaults and errors of the corresponding command, because both run
the same code. Errors that the user can fix are `UserError`, with the location, the problem, the
expected value and a remedy.

Shapes: T tokens, N image patches, D values per patch.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from finesight.errors import TrainingInterrupted, UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

    from finesight.check.check_issues import CheckResult
    from finesight.config import Device, MetricSpec, Precision, Recipe, WeightFormat
    from finesight.data.importer import ImportSummary
    from finesight.data.sample import LocatedSample
    from finesight.encode.tokenization import EncodedSample, TextTokenizer, VisualSpan
    from finesight.evaluate.generation_eval import GenerationEvalResult
    from finesight.infer.model_loader import InferenceModel
    from finesight.infer.prediction import Prediction
    from finesight.train.finalize import RunResult


StrPath = str | Path
"""Name or path of a file, run or model; `~` stands for the home folder."""


def to_paths(paths: StrPath | Sequence[StrPath]) -> list[Path]:
    """Convert one or several file names to a list of paths.

    Raises UserError for objects other than text and paths, such as in-memory images.
    """
    is_sequence = isinstance(paths, Iterable) and not isinstance(paths, str | bytes | os.PathLike)
    items: Iterable[object] = paths if is_sequence else [paths]  # type: ignore[assignment]
    return [Path(os.path.expanduser(to_name(name))) for name in items]


def to_name(value: object) -> str:
    """Convert the name or path of a file, run or model to text.

    Raises UserError for objects of other types.
    """
    if isinstance(value, str | os.PathLike):
        return str(value)
    raise UserError(
        f"a {type(value).__name__} instead of a file name",
        expected="a str or a Path",
        remedy='save in-memory data to a file, such as image.save("image.png"), and pass its name',
    )


def check_choice(name: str, value: object, literal: object) -> None:
    """Raise UserError unless the argument `name` has one of the values of a Literal type."""
    if value not in get_args(literal):
        raise UserError(
            f"{name} is {value!r}",
            where=name,
            expected=f"one of {', '.join(get_args(literal))}",
            remedy="choose one of these",
        )


def check_counts(**counts: int | None) -> None:
    """Raise UserError if one of the named counts is below 1; None is valid."""
    for name, count in counts.items():
        if count is not None and count < 1:
            raise UserError(
                f"{name} is {count}",
                where=name,
                expected="an integer of at least 1",
                remedy="correct or remove it",
            )


__all__ = [
    "Encoding",
    "Model",
    "TrainingInterrupted",
    "UserError",
    "build_question",
    "check_data",
    "draw_boxes",
    "evaluate",
    "import_data",
    "load_model",
    "read_samples",
    "train",
]

IGNORE_INDEX = -100
"""Label of tokens that do not count in the loss.

It is the default `ignore_index` of `torch.nn.functional.cross_entropy`.
"""


@dataclass(frozen=True, slots=True, repr=False)
class Encoding:
    """A sample encoded as model input: token ids, labels, position ids and image patches.

    Its `repr` is a table of the tokens, with a star at each supervised token.
    """

    encoded: EncodedSample
    tokenizer: TextTokenizer

    @property
    def input_ids(self) -> NDArray[np.int32]:
        """Token IDs of shape (T,)."""
        return self.encoded.tokenized.ids_T

    @property
    def loss_mask(self) -> NDArray[np.bool_]:
        """Mask of shape (T,) of the supervised tokens: every answer and its end token."""
        return self.encoded.tokenized.loss_mask_T

    @property
    def labels(self) -> NDArray[np.int32]:
        """Labels of shape (T,): IDs of supervised tokens, `IGNORE_INDEX` for all others.

        Labels are not shifted: the token that predicts a label precedes it.
        """
        import numpy as np

        return np.where(self.loss_mask, self.input_ids, np.int32(IGNORE_INDEX))

    @property
    def position_ids(self) -> NDArray[np.int32]:
        """Position IDs (time, height, width) of each token for M-RoPE, of shape (3, T)."""
        return self.encoded.tokenized.position_ids_3T

    @property
    def visual_spans(self) -> tuple[VisualSpan, ...]:
        """Token range, original size and resized size (in pixels) of each image or video."""
        return self.encoded.tokenized.spans

    @property
    def patches(self) -> NDArray[np.uint8]:
        """Patches of all images as pixel values before normalization, of shape (N, D)."""
        return self.encoded.patches_ND

    def __repr__(self) -> str:
        from finesight.encode.tokenization import format_token_table

        return "\n".join(format_token_table(self.encoded.tokenized, self.tokenizer))


@dataclass(frozen=True, slots=True)
class Model:
    """A loaded model, with the image size and system prompt of its training."""

    name: str
    inference_model: InferenceModel = field(repr=False)

    def generate(
        self, images: StrPath | Sequence[StrPath], prompt: str, *, max_new_tokens: int = 512
    ) -> Prediction:
        """Generate the answer to a question about any number of images.

        Decoding is greedy, so the answer is deterministic.

        Args:
            images: One image or video file, several, or an empty list.
            prompt: The question.
            max_new_tokens: Maximum number of tokens of the answer.

        Returns:
            The prediction: `text` for display, `boxes` in pixels of the original images, and
                `finish_reason`, which is "length" if the answer was truncated, else "stop".

        Raises:
            UserError: An image is missing or corrupt, or the prompt exceeds the context length.
        """
        prompt_sample = build_question(images, prompt)
        return self.generate_batch([prompt_sample], max_new_tokens=max_new_tokens)[0]

    def generate_batch(
        self, samples: Sequence[LocatedSample], *, max_new_tokens: int = 512, batch_size: int = 16
    ) -> list[Prediction]:
        """Generate answers to many questions with continuous batching.

        Args:
            samples: Questions from `build_question` or `read_samples`. For a sample with an answer,
                the preceding turns are the prompt.
            max_new_tokens: Maximum number of tokens per answer.
            batch_size: Number of answers that are generated at the same time; halved when GPU
                memory is exhausted.

        Returns:
            The predictions in the order of the samples.

        Raises:
            UserError: See `generate`.
        """
        from finesight.infer.prediction import predict

        check_counts(max_new_tokens=max_new_tokens, batch_size=batch_size)
        model, renderer = self.inference_model.model, self.inference_model.renderer
        return predict(
            model, renderer, samples, max_new_tokens=max_new_tokens, batch_size=batch_size
        )

    def stream(
        self,
        images: StrPath | Sequence[StrPath],
        prompt: str,
        *,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> Iterator[str]:
        """Generate the answer to one question, and yield its text in pieces.

        A `temperature` above 0 enables sampling, which is reproducible with the same `seed`. The
        prompt is encoded when the first piece is requested, and UserError is raised then. Closing
        the generator stops decoding.
        """
        from finesight.infer.inference_service import InferenceService
        from finesight.infer.request import GenerationOptions, SamplingParams

        prompt_sample = build_question(images, prompt)
        sampling = SamplingParams(temperature=temperature, seed=seed)
        options = GenerationOptions(max_new_tokens=max_new_tokens, sampling_params=sampling)
        service = InferenceService(self.inference_model, max_num_seqs=1)
        try:
            for delta in service.submit(prompt_sample, options):
                yield delta.text
        finally:
            service.close()

    def encode(self, sample: LocatedSample, *, add_generation_prompt: bool = False) -> Encoding:
        """Encode a sample as model input, exactly as in training and inference.

        Args:
            sample: The sample to encode.
            add_generation_prompt: Encode only the prompt of the last answer, as `generate_batch`
                does, instead of the whole conversation.

        Raises:
            UserError: An image is corrupt, or a box is outside its image.
        """
        renderer = self.inference_model.renderer
        if add_generation_prompt:
            encoded = renderer.load_patches(renderer.tokenize_prompt(sample))
        else:
            encoded = renderer.encode(sample)
        return Encoding(encoded, renderer.tokenizer)


def load_model(
    model: StrPath,
    *,
    device: Device = "auto",
    precision: Precision = "auto",
    weights: WeightFormat = "auto",
    thinking: bool | None = None,
    reasoning_effort: str | None = None,
) -> Model:
    """Load a run, a model or adapter folder, a hub model, or `finesight-tiny`.

    Args:
        model: Name or path. `finesight-tiny` is the bundled model.
        device: auto is the GPU if there is one, else the CPU.
        precision: auto is bf16 on GPUs that support it, fp16 on older ones, fp32 on a CPU.
        weights: auto is the stored format, or the format of the run's training; nf4, fp8, int8 and
            int4 quantize the weights while loading.
        thinking: Whether to generate reasoning before answers, with models that have both modes;
            None for the mode of the run's training, else without reasoning.
        reasoning_effort: Reasoning effort in thinking mode, such as `low` for Qwen3.8.

    Raises:
        UserError: The model is missing, incomplete, or not the base model of the run or adapter;
            or it does not have this thinking mode or reasoning effort.
    """
    from finesight.config import Device, Precision, WeightFormat
    from finesight.encode.family import ThinkingOptions
    from finesight.infer.model_loader import load_inference_model

    check_choice("device", device, Device)
    check_choice("precision", precision, Precision)
    check_choice("weights", weights, WeightFormat)
    name = to_name(model)
    options = ThinkingOptions(enable_thinking=thinking, reasoning_effort=reasoning_effort)
    return Model(name, load_inference_model(name, device, precision, weights, options))


def build_question(images: StrPath | Sequence[StrPath], prompt: str) -> LocatedSample:
    """Build a question about one or more images and video files, or none.

    It is an input of `Model.generate_batch`.

    Raises:
        UserError: A file is missing, or not an image or video.
    """
    from finesight.infer.prediction import build_question as build_sample

    files = to_paths(images)
    return build_sample(files, prompt, str(files[0]) if len(files) == 1 else prompt)


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


def evaluate(
    model: Model | StrPath,
    data: StrPath | None = None,
    metric: MetricSpec | None = None,
    *,
    limit: int | None = None,
    max_new_tokens: int | None = None,
    batch_size: int | None = None,
    out: StrPath | None = None,
    trust_metric: bool = False,
) -> GenerationEvalResult:
    """Generate answers to validation samples, and compute metrics.

    Args:
        model: A loaded model, or its name or path.
        data: JSONL file of samples; for a run, defaults to the validation data of its recipe.
        metric: captions, latex, ocr, qa, classification, json, grounding, detection, or a custom
            function `FILE.py:FUNCTION`; for a run, defaults to that of its recipe.
        limit: Number of randomly selected samples; for a run, defaults to its recipe.
        max_new_tokens: Maximum number of tokens per answer; for a run, defaults to its recipe.
        batch_size: Number of answers generated at the same time; for a run, defaults to its recipe.
        out: JSONL file to write, with each answer and its scores.
        trust_metric: Execute the custom metric (`metric.py`) in a run folder, even if someone else
            created it.

    Returns:
        The result: `scores` by name, `intervals` with 95 % confidence intervals (None if
            unavailable; `notes` give the reason), `primary_metric`, and `predictions`.

    Raises:
        UserError: Data or metric is neither given nor in a recipe, or a sample lacks content that
            the metric needs.
    """

    from finesight.evaluate.custom_metric import check_metric
    from finesight.evaluate.generation_eval import evaluate as run_evaluation
    from finesight.evaluate.generation_eval import load_eval_inputs
    from finesight.progress import ProgressConsole

    check_counts(limit=limit, max_new_tokens=max_new_tokens, batch_size=batch_size)
    samples, settings = load_eval_inputs(
        model.name if isinstance(model, Model) else to_name(model),
        data=None if data is None else Path(to_name(data)),
        metric=metric,
        limit=limit,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
    )
    check_metric(settings.metric, named=metric is not None, trust=trust_metric)
    inference_model = (model if isinstance(model, Model) else load_model(model)).inference_model
    total = min(len(samples), settings.limit or len(samples))
    with ProgressConsole().progress_stage("answers", total) as on_progress:
        predictions_file = None if out is None else Path(out)
        return run_evaluation(
            inference_model.model,
            inference_model.renderer,
            samples,
            settings,
            predictions_file,
            on_progress,
        )
