"""A loaded model, which generates answers and encodes samples.

Shapes: T tokens, N image patches, D values per patch.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Unpack

from finesight.errors import UserError
from finesight.operations.operation import Outcome, StrPath, as_function, check_counts, to_name
from finesight.operations.options import LoadingOptions, RunOrModelArgument
from finesight.progress import ProgressConsole

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from finesight.encode.tokenization import (
        EncodedSample,
        TextTokenizer,
        TokenizedSample,
        VisualSpan,
    )
    from finesight.evaluate.generation_eval import GenerationEvalResult
    from finesight.evaluate.python_functions import PythonFunction
    from finesight.export.model_card import VerifiedMerge
    from finesight.infer.model_loader import InferenceModel
    from finesight.infer.prediction import Prediction
    from finesight.samples.memory_samples import AnySample, ImageInput
    from finesight.samples.prompt_format import PromptFormat
    from finesight.samples.sample import LocatedSample, Message

IGNORE_INDEX = -100
"""Label of tokens that do not count in the loss.

It is the default `ignore_index` of `torch.nn.functional.cross_entropy`.
"""


def list_gpus(device: str) -> list[str]:
    """Return the value of CUDA_VISIBLE_DEVICES for each GPU of this process; none for `cpu`."""
    import torch

    count = 0
    if device != "cpu":
        count = torch.cuda.device_count()
    numbers = ",".join(map(str, range(count)))
    return os.environ.get("CUDA_VISIBLE_DEVICES", numbers).split(",")[:count]


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

    def build_question(
        self, images: ImageInput | Sequence[ImageInput], prompt: str
    ) -> LocatedSample:
        """Build a question in the form of the training: an input of `generate_batch`.

        A run records the order of images and text, the white space around the text, and the system
        prompt of its training samples. `<image>` in the prompt sets the position of an image.

        Args:
            images: One image, PDF or video file, several, or an empty list. An image may also be in
                memory, as in `finesight.Sample`.
            prompt: The question.

        Raises:
            UserError: A file is missing, or not an image or video, or the prompt has another number
                of `<image>` than there are images.
        """
        return _build_question(images, prompt, self.inference_model.get_prompt_format())

    def arrange(self, messages: Sequence[Message]) -> tuple[Message, ...]:
        """Give the questions of a conversation the form of the training, and its system prompt.

        Only user turns of images and one text change.
        """
        return self.inference_model.get_prompt_format().arrange(messages)

    def generate(
        self, images: ImageInput | Sequence[ImageInput], prompt: str, *, max_new_tokens: int = 512
    ) -> Prediction:
        """Generate the answer to a question about any number of images.

        Decoding is greedy, so the answer is deterministic.

        Args:
            images: One image or video, several, or an empty list. An image is a path, the content
                of a file, a PIL image, or an array of uint8 of shape (height, width, 3).
            prompt: The question.
            max_new_tokens: Maximum number of tokens of the answer.

        Returns:
            The prediction: `text` for display, `boxes` in pixels of the original images, and
                `finish_reason`, which is "length" if the answer was truncated, else "stop".

        Raises:
            UserError: An image is missing or corrupt, or the prompt exceeds the context length.
        """
        prompt_sample = self.build_question(images, prompt)
        return self.generate_batch([prompt_sample], max_new_tokens=max_new_tokens)[0]

    def generate_batch(
        self, samples: Sequence[AnySample], *, max_new_tokens: int = 512, batch_size: int = 16
    ) -> list[Prediction]:
        """Generate answers to many questions with continuous batching.

        Args:
            samples: Questions from `finesight.Sample`, `Model.build_question` or `read_samples`.
                For a sample with an answer, the preceding turns are the prompt.
            max_new_tokens: Maximum number of tokens per answer.
            batch_size: Number of answers that are generated at the same time; halved when GPU
                memory is exhausted.

        Returns:
            The predictions in the order of the samples.

        Raises:
            UserError: See `generate`.
        """
        from finesight.infer.prediction import predict
        from finesight.samples.memory_samples import locate_samples

        check_counts(max_new_tokens=max_new_tokens, batch_size=batch_size)
        return predict(
            self.inference_model.model,
            self.inference_model.renderer,
            locate_samples(samples),
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
        )

    def stream(
        self,
        images: ImageInput | Sequence[ImageInput],
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

        prompt_sample = self.build_question(images, prompt)
        sampling = SamplingParams(temperature=temperature, seed=seed)
        options = GenerationOptions(max_new_tokens=max_new_tokens, sampling_params=sampling)
        service = InferenceService(self.inference_model, max_num_seqs=1)
        try:
            for delta in service.submit(prompt_sample, options):
                yield delta.text
        finally:
            service.close()

    def encode(self, sample: AnySample, *, add_generation_prompt: bool = False) -> Encoding:
        """Encode a sample as model input, exactly as in training and inference.

        Args:
            sample: The sample to encode.
            add_generation_prompt: Encode only the prompt of the last answer, as `generate_batch`
                does, instead of the whole conversation.

        Raises:
            UserError: An image is corrupt, or a box is outside its image.
        """
        from finesight.samples.memory_samples import locate_samples

        renderer = self.inference_model.renderer
        (located,) = locate_samples([sample])
        if add_generation_prompt:
            encoded = renderer.load_patches(renderer.tokenize_prompt(located))
        else:
            encoded = renderer.encode(located)
        return Encoding(encoded, renderer.tokenizer)

    def evaluate(
        self,
        samples: Sequence[AnySample] | StrPath | None = None,
        metric: str | PythonFunction | None = None,
        *,
        limit: int | None = None,
        max_new_tokens: int | None = None,
        batch_size: int = 32,
    ) -> GenerationEvalResult:
        """Generate the answers to samples and compute metrics; see `finesight.api.evaluate`.

        Args:
            samples: Samples with answers, or a file of them. Default for a run: its validation
                split.
            metric: Name of a metric, or a function of an `EvalCase` that returns a number, or
                several by name. Default for a run: that of its recipe.

        Raises:
            UserError: A sample is invalid, or the metric is missing or fails.
        """
        from finesight.evaluate.python_functions import read_function, use_functions
        from finesight.operations import find_operation
        from finesight.samples.memory_samples import (
            convert_samples,
            open_session_store,
            write_sample_file,
        )

        data: StrPath | None = None
        if samples is None or isinstance(samples, str | os.PathLike):
            data = samples
        else:
            store = open_session_store()
            data = store.folder / f"{secrets.token_hex(8)}.jsonl"
            write_sample_file(convert_samples(samples, store, "samples"), data)
        functions: dict[str, PythonFunction] = {}
        if metric is not None:
            metric = read_function(metric, "metric", functions)
        evaluate = as_function(find_operation("eval"))
        with use_functions(functions):
            result: GenerationEvalResult = evaluate(
                self, data, metric, limit, batch_size, max_new_tokens
            )
        return result

    def save(self, path: StrPath) -> Path:
        """Copy the files of the model, or of the adapter of a LoRA run, to a new folder.

        `finesight.load` loads the folder, as do PEFT and transformers. Subfolders and other files
        are not copied.

        Raises:
            UserError: The folder exists, or the run has an adapter and fully trained parts.
        """
        from finesight.files.storage import DIGESTS_FILE, write_folder
        from finesight.infer.model_loader import resolve_model_source
        from finesight.model_folder import list_files, list_model_files
        from finesight.settings.manifest import MANIFEST_FILE, find_manifest_file

        source = resolve_model_source(self.name)
        folder = source.adapter or source.folder.path
        if source.adapter is not None and source.folder.path.parent == source.adapter.parent:
            raise UserError(
                "a run with an adapter and fully trained parts",
                where=self.name,
                expected="a run of LoRA only, or of full fine-tuning only",
                remedy=f"model.merge({str(path)!r}) writes one complete model",
            )
        # The manifest has the image size and the form of the questions.
        manifest_file = find_manifest_file(folder)
        saved = Path(os.path.expanduser(to_name(path, "path")))
        if saved.resolve().is_relative_to(folder.resolve()):
            raise UserError(
                "a folder inside the one that is copied",
                where=str(path),
                expected=f"a folder outside {folder}",
                remedy="set another folder",
            )
        files = list_files(folder)
        if source.adapter is None:
            files = list_model_files(source.folder)
        with write_folder(saved) as target:
            for name, file in files.items():
                if name != DIGESTS_FILE:
                    shutil.copy2(file, target / name)
            if manifest_file is not None:
                shutil.copy2(manifest_file, target / MANIFEST_FILE)
        return saved

    def merge(self, path: StrPath) -> VerifiedMerge:
        """Merge the adapter into its base model in a new folder; see `finesight.api.merge`.

        Raises:
            UserError: The folder exists, or the model has no adapter.
        """
        from finesight.operations import find_operation

        merged: VerifiedMerge = as_function(find_operation("merge"))(self.name, path)
        return merged


ModelArgument = Annotated[StrPath | Model, *RunOrModelArgument.__metadata__]
"""A loaded model, or the name or path of one."""


def get_model_name(run_or_model: StrPath | Model) -> str:
    """Return the name of a loaded model, or of one that is to be loaded."""
    if isinstance(run_or_model, Model):
        return run_or_model.name
    return str(run_or_model)


def get_prompt_format(run_or_model: StrPath | Model) -> PromptFormat:
    """Return the form of questions to a model, which need not be loaded."""
    from finesight.model_folder import resolve_model_path
    from finesight.samples.prompt_format import PromptFormat

    if isinstance(run_or_model, Model):
        return run_or_model.inference_model.get_prompt_format()
    return PromptFormat.from_run(resolve_model_path(str(run_or_model)))


def load_model(run_or_model: ModelArgument, **loading: Unpack[LoadingOptions]) -> Outcome[Model]:
    """Load a run, a model or adapter folder, a hub model, or `finesight-tiny`.

    Raises:
        UserError: The model is missing, incomplete, or not the base model of the run or adapter;
            or it does not have this thinking mode or reasoning effort.
    """
    from finesight.infer.model_loader import load_inference_model

    if isinstance(run_or_model, Model):
        return Outcome(run_or_model)
    name = os.fspath(run_or_model)
    with ProgressConsole().activity(f"loading the weights of {name}"):
        return Outcome(Model(name, load_inference_model(name, **_complete(loading))))


def load_adapters(
    run_or_model: str, adapters: Sequence[str], **loading: Unpack[LoadingOptions]
) -> InferenceModel:
    """Load a model with further adapters, which requests select by name."""
    from finesight.infer.model_loader import load_multi_adapter_model

    return load_multi_adapter_model(run_or_model, adapters, **_complete(loading))


def _complete(loading: LoadingOptions) -> dict[str, Any]:
    """Return options with those of the thinking mode as one argument."""
    from finesight.encode.family import ThinkingOptions

    options: dict[str, Any] = {**loading}
    options["thinking"] = ThinkingOptions(
        enable_thinking=options.pop("thinking", None),
        reasoning_effort=options.pop("reasoning_effort", None),
    )
    return options


def build_question(images: ImageInput | Sequence[ImageInput], prompt: str) -> LocatedSample:
    """Build a question about images, pages of PDF files and videos, or none: images, then text.

    `Model.build_question` builds one in the form of the training samples of a run.

    Raises:
        UserError: A file is missing, or not an image or video, or the prompt has another number of
            `<image>` than there are images.
    """
    from finesight.samples.prompt_format import DEFAULT_PROMPT_FORMAT

    return _build_question(images, prompt, DEFAULT_PROMPT_FORMAT)


def _build_question(
    images: ImageInput | Sequence[ImageInput], prompt: str, prompt_format: PromptFormat
) -> LocatedSample:
    from finesight.infer.prediction import build_question as build_sample
    from finesight.samples.memory_samples import (
        check_text,
        list_images,
        open_session_store,
        save_images,
    )

    check_text(prompt, "prompt")
    if images is None:
        images = [None]  # An error: only an empty list stands for no image.
    store = open_session_store()
    pages = [store.folder / path for path in save_images(images, store, "images")]
    sample_id = prompt
    image_list = list_images(images)
    if len(image_list) == 1:
        sample_id = str(pages[0])
        if isinstance(image_list[0], str | os.PathLike):
            sample_id = os.path.expanduser(image_list[0])
    return build_sample(pages, prompt, sample_id, prompt_format)


def token_table_to_dict(tokenized: TokenizedSample, tokenizer: TextTokenizer) -> dict[str, Any]:
    """Convert the token table of a sample to JSON data: token counts, images and rows."""
    from finesight.encode.tokenization import iter_token_rows

    spans = []
    for span in tokenized.spans:
        spans.append(asdict(span) | {"files": [*map(str, span.files)]})
    rows = []
    for row in iter_token_rows(tokenized, tokenizer):
        # Spans are listed once, not in each of their rows.
        values = asdict(replace(row, span=None))
        del values["span"]
        rows.append(values)
    return {
        "id": tokenized.id,
        "num_tokens": tokenized.num_tokens,
        "num_supervised_tokens": tokenized.num_supervised_tokens,
        "images": spans,
        "rows": rows,
    }
