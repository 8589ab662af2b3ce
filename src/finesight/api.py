"""What people do from Python: load a model, encode samples, train, evaluate, generate.

Each function does what the command of the same purpose does, by the same code, with the same
defaults and the same errors: `UserError` says where, what, what was expected and the remedy. A
`FileName` is a str or a Path. Shapes: T tokens, N patches of pictures, D numbers of a patch.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finesight.arguments import FileName, check_choice, check_counts, named, paths
from finesight.errors import Interrupted, UserError

if TYPE_CHECKING:
    # What these bring takes seconds to import: each function does, when it is called.
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

    from finesight.check.findings import Checked
    from finesight.config import Device, Metric, Precision, Recipe, Weights
    from finesight.data.importing import Summary
    from finesight.data.jsonl import Located
    from finesight.encode.encoded import Encoded, Span
    from finesight.encode.tokenizer import TextTokenizer
    from finesight.evaluate.evaluate import Evaluation
    from finesight.infer.load import Answerer
    from finesight.infer.predict import Prediction
    from finesight.train.finish import RunResult

__all__ = [
    "Encoding",
    "Interrupted",
    "Model",
    "UserError",
    "check_data",
    "draw",
    "evaluate",
    "import_data",
    "load",
    "question",
    "read",
    "train",
]

UNLEARNED = -100
"""The label of a token that carries no loss, which `torch.nn.functional.cross_entropy` passes over
by default."""


@dataclass(frozen=True, slots=True, repr=False)
class Encoding:
    """A sample as the model reads it. Printed, or the last line of a notebook's cell, it is a table
    of its tokens, with a star at each that is learned."""

    encoded: Encoded
    tokenizer: TextTokenizer

    @property
    def ids(self) -> NDArray[np.int32]:
        """The tokens, of shape (T,)."""
        return self.encoded.outline.ids_T

    @property
    def learned(self) -> NDArray[np.bool_]:
        """Which of them carry loss, every answer and its end, of shape (T,)."""
        return self.encoded.outline.learned_T

    @property
    def labels(self) -> NDArray[np.int32]:
        """The ids of the learned tokens, `UNLEARNED` in the places of the others, of shape (T,).

        They are not moved: the token that predicts a label stands before it.
        """
        import numpy as np

        return np.where(self.learned, self.ids, np.int32(UNLEARNED))

    @property
    def positions(self) -> NDArray[np.int32]:
        """Time, height and width of each token for the rotary embedding, of shape (3, T)."""
        return self.encoded.outline.positions_3T

    @property
    def pictures(self) -> tuple[Span, ...]:
        """Where each picture or video stands among the tokens, and its sizes in pixels."""
        return self.encoded.outline.spans

    @property
    def patches(self) -> NDArray[np.uint8]:
        """All pictures in patches, end to end, not yet normalised, of shape (N, D)."""
        return self.encoded.patches_ND

    def __repr__(self) -> str:
        from finesight.encode.show import as_lines

        return "\n".join(as_lines(self.encoded.outline, self.tokenizer))


@dataclass(frozen=True, slots=True)
class Model:
    """A model that `load` has brought into memory, with the picture sizes and the system prompt
    that belong to it."""

    name: str
    answerer: Answerer = field(repr=False)

    def generate(
        self, pictures: FileName | Sequence[FileName], prompt: str, *, max_new_tokens: int = 512
    ) -> Prediction:
        """The answer to one question about a picture, about several together, or about none (an
        empty list). The most probable token is taken each time: the answer is always the same.

        Of the result, `text` is for people, `boxes` are in pixels of the original pictures, and
        `stopped` is False where it was cut off. Raises UserError for a picture that is missing or
        damaged, and for a question that is too long for the model.
        """
        asked = question(pictures, prompt)
        return self.generate_all([asked], max_new_tokens=max_new_tokens)[0]

    def generate_all(
        self, questions: Sequence[Located], *, max_new_tokens: int = 512, batch: int = 16
    ) -> list[Prediction]:
        """Answers to many questions, in their order, `batch` of them at once.

        Questions are made by `question` or come from `read`: of a sample with an answer, the turns
        before that are asked. Where a GPU's memory is full, half as many are answered at once.
        Raises UserError as `generate` does.
        """
        from finesight.infer.predict import predict

        check_counts(max_new_tokens=max_new_tokens, batch=batch)
        model, renderer = self.answerer.model, self.answerer.renderer
        return predict(model, renderer, questions, max_new_tokens=max_new_tokens, batch=batch)

    def stream(
        self,
        pictures: FileName | Sequence[FileName],
        prompt: str,
        *,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> Iterator[str]:
        """The answer to one question piece by piece, as it grows.

        At a `temperature` above 0 tokens are drawn, the same ones from the same `seed`. The
        question is read when the first piece is asked for, and raises UserError then; the answer
        stops when nobody listens any more.
        """
        from finesight.infer.request import Options, Sampling
        from finesight.infer.service import Service

        asked = question(pictures, prompt)
        sampling = Sampling(temperature=temperature, seed=seed)
        options = Options(max_new_tokens=max_new_tokens, sampling=sampling)
        service = Service(self.answerer, rows=1)
        try:
            for delta in service.ask(asked, options):
                yield delta.text
        finally:
            service.close()

    def encode(self, sample: Located, *, add_generation_prompt: bool = False) -> Encoding:
        """What the model reads of a sample, in training and in answering alike.

        With `add_generation_prompt`, the turns before the sample's last answer and what stands
        before an answer: the prompt that `generate_all` answers. Pictures are opened and resized
        by the model's rule or, of a run, by the run's. Raises UserError for a damaged picture and
        for a box outside of its picture.
        """
        renderer = self.answerer.renderer
        if add_generation_prompt:
            encoded = renderer.with_patches(renderer.prompt_outline(sample))
        else:
            encoded = renderer.encode(sample)
        return Encoding(encoded, renderer.tokenizer)


def load(
    model: FileName,
    *,
    device: Device = "auto",
    precision: Precision = "auto",
    weights: Weights = "auto",
) -> Model:
    """Load a run, a folder of a model or of an adapter, a model of a hub by its name, or
    `finesight-tiny`, which comes with the package.

    `device` auto is the GPU where there is one. `precision` auto is bf16 on a GPU that computes in
    it, fp16 on older ones, fp32 on a CPU. `weights` auto is as they are stored, or as a run trained
    with them; nf4, fp8, int8 and int4 are made while they are loaded. Raises UserError for what is
    missing, half-written, or not the base that a run or adapter was trained on.
    """
    from finesight.config import Device, Precision, Weights
    from finesight.infer.load import load_answerer

    check_choice("device", device, Device)
    check_choice("precision", precision, Precision)
    check_choice("weights", weights, Weights)
    name = named(model)
    return Model(name, load_answerer(name, device, precision, weights))


def question(pictures: FileName | Sequence[FileName], prompt: str) -> Located:
    """A question about a picture, about several together, or about none, for
    `Model.generate_all`. Raises UserError for what is missing or no picture."""
    from finesight.infer.predict import question as asked

    files = paths(pictures)
    return asked(files, prompt, str(files[0]) if len(files) == 1 else prompt)


def draw(answer: Prediction, picture: int = 0) -> Image.Image:
    """A copy of one of the answer's pictures, counted from 0, with the boxes that are in it.

    In RGB, in the size of the original; a notebook shows it. Raises UserError where the answer has
    no such picture.
    """
    from finesight.infer.draw import drawn

    if not 0 <= picture < len(answer.images):
        raise UserError(
            f"picture {picture}",
            where="draw",
            expected=f"a number below {len(answer.images)}: so many pictures were shown",
            remedy="leave it out to draw the first one, and draw answers about pictures only",
        )
    return drawn(answer, picture)


def read(*files: FileName, limit: int | None = None, answered: bool = True) -> list[Located]:
    """The samples of files, each checked: JSONL, Parquet or tar, by paths, patterns such as
    `shards/*.tar`, or addresses in object storage; `limit` takes the first ones of each.

    A sample's `sample.messages` are its turns; its pictures are relative to its `folder`. Without
    `answered`, the last turn may be a question. Raises UserError with file and line.
    """
    from finesight.config import HeldOutFile
    from finesight.data.sources import load_sources

    check_counts(limit=limit)
    sources = [HeldOutFile(path=named(file), limit=limit) for file in files]
    return load_sources(sources, answered=answered).read()


def import_data(
    source: FileName,
    out: FileName,
    *,
    columns: Mapping[str, str] | None = None,
    prompt: str | None = None,
    split: float | None = None,
    eval_last: int | None = None,
    limit: int | None = None,
    format: str | None = None,
) -> Summary:
    """Turn pictures with labels into samples in the new folder `out`: `data.jsonl`, or with
    `split` or `eval_last` `train.jsonl` and `eval.jsonl`.

    `source` is a file, a folder, an archive, or `hf:OWNER/NAME` and `modelscope:OWNER/NAME`.
    `columns` says which columns of a table are `image`, `answer`, `question`, `box`, `label`, or
    under `fields` the names, with commas, of those whose values make an answer in JSON. `split` is
    the share of rows to train on, `eval_last` how many rows at the end are held out; no picture is
    in both files. The format is detected where `format` does not name it. What else there is to
    say about a source, `finesight data import` has options for. Raises UserError, and leaves no
    folder, for rows that cannot be used; where it names that command's options, `--map image=path`
    is `columns={"image": "path"}`.
    """
    from finesight.data.importing import import_file
    from finesight.data.opening import Request
    from finesight.data.origins import brought

    check_counts(limit=limit, eval_last=eval_last)
    request = Request(
        format=format,
        columns=columns or {},
        prompt=prompt,
        limit=limit,
        eval_last=eval_last,
        split=split,
    )
    with brought(str(source), Path(out), request) as found:
        for note in found.notes:
            warnings.warn(f"{source}: {note}", stacklevel=2)
        return import_file(found.path, Path(out), found.request)


def check_data(
    data: FileName | Sequence[FileName], held_out: FileName | Sequence[FileName] = ()
) -> Checked:
    """What is wrong with samples: pictures, boxes, texts, turns, what repeats, and held-out
    pictures that are trained on.

    Of the result, `counts` has the number of findings by fault, empty where all is well,
    `findings` are the first of each, and `severity` is that of the gravest. Nothing is changed.
    Raises UserError for a file that cannot be read at all.
    """
    from finesight.check.run import check_sources
    from finesight.check.subjects import of_files
    from finesight.data.opening import Request

    return check_sources(of_files(paths(data), paths(held_out), Request()))


def train(
    recipe: FileName | Mapping[str, Any] | Recipe,
    changes: Mapping[str, object] | None = None,
    *,
    resume: bool = False,
    trust_metric: bool = False,
) -> RunResult:
    """Train what a recipe says, measured before and after: a file, or its settings by name.

    `changes` are settings in place of the recipe's, by their dotted names:
    `{"train.steps": 100}`. With `resume` a run that was stopped goes on from its newest checkpoint,
    as if it never had been, and one that is finished gives its result. Progress goes to stderr. Of
    several processes that a launcher started, each gets the result. `trust_metric` executes a
    `metric.py` that comes from the folder of a run, whoever made it.

    Raises UserError for what the user can mend, before anything is written where possible, and
    Interrupted, with a checkpoint written, when Ctrl-C or a scheduler stops it.
    """
    from finesight.config import Recipe
    from finesight.evaluate.metric_trust import check_recipe_metric
    from finesight.recipe import load_recipe, recipe_of
    from finesight.train.finish import finished
    from finesight.train.loop import train as run
    from finesight.train.run import Run

    if isinstance(recipe, Recipe):
        recipe = recipe.model_dump(mode="json")
    path = None if isinstance(recipe, Mapping) else Path(recipe)
    if isinstance(recipe, Mapping):
        settings = recipe_of(recipe, changes or {})
    else:
        settings = load_recipe(Path(recipe), changes or {})
    check_recipe_metric(settings, path, changes or {}, trust=trust_metric)
    result = run(settings, resume=resume) or finished(Run(settings.output))
    if result is None:
        raise UserError(
            "no result after the end of the run",
            where=str(settings.output),
            expected="a folder that all processes of a run see",
            remedy="see what the first process of the run has said",
        )
    return result


def evaluate(
    model: Model | FileName,
    data: FileName | None = None,
    metric: Metric | None = None,
    *,
    limit: int | None = None,
    max_new_tokens: int | None = None,
    batch: int | None = None,
    out: FileName | None = None,
    trust_metric: bool = False,
) -> Evaluation:
    """Answer held-out samples of a JSONL file and score the answers.

    `metric` is captions, latex, ocr, qa, classification, json, grounding, detection, or a function
    of your own, `FILE.py:FUNCTION`. Of a run, what is left out is as its recipe says. `limit` takes
    the first samples, `out` is a file for every answer with its scores. `trust_metric` executes the
    `metric.py` of a run folder that you did not make.

    Of the result, `scores` are the figures by name, `intervals` their 95 % confidence intervals
    (None where there is none: `notes` say why), `headline` names the one that stands for all,
    `predictions` are the answers. Raises UserError where data or metric is neither given nor in a
    recipe, and for samples without what the metric compares.
    """
    from rich.console import Console

    from finesight.evaluate.evaluate import evaluate as measure
    from finesight.evaluate.held_out import held_out
    from finesight.evaluate.metric_trust import check_metric
    from finesight.train.progress import Screen

    check_counts(limit=limit, max_new_tokens=max_new_tokens, batch=batch)
    samples, settings = held_out(
        model.name if isinstance(model, Model) else named(model),
        data=None if data is None else Path(named(data)),
        metric=metric,
        limit=limit,
        batch=batch,
        max_new_tokens=max_new_tokens,
    )
    check_metric(settings.metric, named=metric is not None, trust=trust_metric)
    answerer = (model if isinstance(model, Model) else load(model)).answerer
    total = min(len(samples), settings.limit or len(samples))
    with Screen(Console(stderr=True)).stage("answers", total) as advance:
        answers = None if out is None else Path(out)
        return measure(answerer.model, answerer.renderer, samples, settings, answers, advance)
