"""Renderer of families without native code, based on the model's processor and chat template.

Code from model repositories is never executed: only classes of transformers itself are used. The
processor parses special tokens in texts, so texts that contain one are rejected.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from finesight.encode.family import ThinkingOptions
from finesight.encode.renderer import Renderer
from finesight.encode.tokenization import (
    LARGEST_ID,
    EncodedSample,
    TokenizedSample,
    Tokenizer,
    VisualSpan,
    check_tokenizer_file,
    is_rust_panic,
)
from finesight.errors import UserError
from finesight.family_components import FAMILIES
from finesight.model_folder import ModelFolder
from finesight.samples.image_file import MAX_IMAGE_PIXELS
from finesight.samples.sample import (
    BoxPart,
    ContentPart,
    ImagePart,
    LocatedSample,
    Message,
    TextPart,
)
from finesight.settings.config import ImageRule, ImageSettings, PixelLimits, PixelRange
from finesight.vision.image_processing import compute_resized_size, load_image

FROM_PRETRAINED_OPTIONS = {"local_files_only": True, "trust_remote_code": False}
"""Arguments of `from_pretrained`: no downloads, and no code from the model folder."""


@lru_cache
def import_transformers() -> Any:
    """Import transformers, with hub kernels and progress bars disabled."""
    # Hub kernels would download and execute code from the hub.
    os.environ.setdefault("USE_HUB_KERNELS", "NO")
    try:
        import transformers as package
    except ImportError as error:
        raise UserError(
            f"cannot import transformers: {error}",
            where="model",
            expected=f"a model of the families {', '.join(FAMILIES)}, or installed transformers",
            remedy="pip install 'finesight[hf]'",
        ) from error
    package.utils.logging.disable_progress_bar()
    return package


def load_hf_config(folder: ModelFolder) -> Any:
    """Load the config of a model folder with transformers."""
    package = import_transformers()
    config_file = str(folder.path / "config.json")
    expected = (
        f"one of {', '.join(FAMILIES)}, or a family with an image-text-to-text class in"
        f" transformers {package.__version__}"
    )
    if folder.family not in package.CONFIG_MAPPING:
        what = f"the family {folder.family} is unknown to transformers {package.__version__}"
        remedy = "choose another model, or install a transformers version with this family"
        remote_code = folder.config.get("auto_map")
        if remote_code:
            what += f": it needs remote code, auto_map is {remote_code}"
            remedy = (
                "remote code is never executed: use a version of the model in transformers'"
                " native format, if available"
            )
        raise UserError(what, where=config_file, expected=expected, remedy=remedy)
    if "quantization_config" in folder.config:
        quantization = folder.config["quantization_config"]
        raise UserError(
            f"quantized weights: quantization_config is {quantization!r:.80}",
            where=config_file,
            expected="weights in bf16, fp16 or fp32",
            remedy="use the unquantized version of the model",
        )
    try:
        config = package.AutoConfig.from_pretrained(str(folder.path), **FROM_PRETRAINED_OPTIONS)
    except Exception as error:  # families raise different exceptions
        raise UserError(
            f"invalid config of the family {folder.family} for transformers"
            f" {package.__version__} ({str(error).strip().splitlines()[-1].strip():.200})",
            where=config_file,
            expected=expected,
            remedy="use the config.json of the published model",
        ) from error
    reason = ""
    if type(config) not in package.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        reason = "has no image-text-to-text class"
    elif config.is_encoder_decoder:
        reason = "is an encoder-decoder model"
    if reason:
        raise UserError(
            f"the family {folder.family} {reason}",
            where=config_file,
            expected=expected + ", decoder-only",
            remedy="choose another model",
        )
    return config


NO_RESIZE_RULE = PixelRange(min_pixels=1, max_pixels=MAX_IMAGE_PIXELS)
"""Image rule that leaves resizing to the model's processor."""


@dataclass(frozen=True, slots=True)
class HfTokenizedSample(TokenizedSample):
    """A tokenized sample of the transformers backend.

    Stores the messages, from which `HfRenderer.load_patches` processes the images again.
    """

    messages: tuple[Message, ...]
    folder: Path
    add_generation_prompt: bool


@dataclass(frozen=True, slots=True)
class _ProcessorOutput:
    """Output of a transformers processor: token ids [T] and other model inputs by name."""

    ids_T: NDArray[np.int32]
    hf_inputs: dict[str, Tensor]


class HfRenderer(Renderer):
    """Converts samples to inputs of a transformers model.

    The chat template renders the turns, with `enable_thinking=False` if it supports that.
    Supervised tokens are those of each assistant turn after its generation prompt, up to and
    including the first end token. The tokens of the prompt must be a prefix of the tokens of the
    full conversation. Samples are rejected if the chat template rewrites earlier turns.

    Images are resized by the recipe's rule and then by the processor. Boxes and videos are not
    supported, because their format depends on the family.
    """

    def __init__(
        self,
        folder: ModelFolder,
        image_rule: ImageSettings | None = None,
        system_prompt: str | None = None,
    ) -> None:
        """Load the tokenizer and the processor of a model folder.

        Args:
            image_rule: Image rule of the recipe; None for the resizing of the processor.
            system_prompt: System prompt of the recipe; None for the default of the chat template.
        """
        self._init_args = (folder, image_rule, system_prompt)
        self._lock = Lock()
        self.family = folder.family
        if isinstance(image_rule, PixelLimits):
            image_rule = image_rule.complete(NO_RESIZE_RULE)
        self.image_rule: ImageRule = image_rule or NO_RESIZE_RULE
        self.system_prompt = system_prompt
        load_hf_config(folder)
        check_tokenizer_file(folder.tokenizer_file, is_native_family=False, vocabulary=LARGEST_ID)
        self.tokenizer = Tokenizer(folder.tokenizer_file)
        self._processor = _load_processor(folder)
        # The processor warns about variables that the template does not use.
        supports_thinking = "enable_thinking" in str(self._processor.chat_template)
        self._template_kwargs = {"enable_thinking": False} if supports_thinking else {}
        self._special_tokens = self.tokenizer.list_special_tokens()
        self._special_ids = [self.tokenizer.token_to_id(token) for token in self._special_tokens]
        self.end_ids = _read_end_ids(folder, self._processor.tokenizer)

    def __reduce__(self) -> tuple[type[HfRenderer], tuple[Any, ...]]:
        # Spawned processes load the processor again.
        return HfRenderer, self._init_args

    def with_thinking(self, options: ThinkingOptions) -> Self:
        """Return the renderer, which supports the non-thinking mode only."""
        if options.enable_thinking or options.reasoning_effort is not None:
            raise UserError(
                f"thinking mode for a model of the family {self.family}",
                where="thinking",
                expected="non-thinking mode: the transformers backend supports only this mode",
                remedy="omit the mode, or use a model of a native family",
            )
        return self

    def encode(self, located_sample: LocatedSample) -> EncodedSample:
        """Encode a sample as model inputs, including its processed images."""
        return self._encode_messages(
            located_sample.sample.id,
            self._check_messages(located_sample, located_sample.sample.messages),
            located_sample.folder,
            False,
        )

    def _tokenize_messages(
        self,
        located_sample: LocatedSample,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
    ) -> TokenizedSample:
        return self._encode_messages(
            located_sample.sample.id,
            self._check_messages(located_sample, messages),
            located_sample.folder,
            add_generation_prompt,
        ).tokenized

    def load_patches(self, tokenized: TokenizedSample) -> EncodedSample:
        """Process the images of a sample that an `HfRenderer` tokenized."""
        assert isinstance(tokenized, HfTokenizedSample), (
            f"sample {tokenized.id} was tokenized by another renderer"
        )
        output = self._run_processor(
            tokenized.messages, tokenized.folder, tokenized.add_generation_prompt, tokenized.id
        )
        return EncodedSample(tokenized, _EMPTY_PATCHES, output.hf_inputs)

    def parse_boxes(
        self, raw_text: str, spans: Sequence[VisualSpan], image_index: int = 0
    ) -> list[BoxPart]:
        """Return an empty list, because the box format of the family is unknown."""
        return []

    def _check_messages(
        self, located_sample: LocatedSample, messages: Sequence[Message]
    ) -> tuple[Message, ...]:
        sample = located_sample.sample
        kinds = {part.type for part in sample.iter_parts()} | {"tool" for _ in sample.tools}
        for kind in sorted(kinds - {"text", "image"}):
            raise UserError(
                f"{kind} content for a model of the family {self.family}",
                where=f"sample {sample.id:.80}",
                expected="text and images: the transformers backend supports only these",
                remedy="use a model of a native family, or remove these parts",
            )
        return self._with_system_prompt(messages)

    def _encode_messages(
        self,
        sample_id: str,
        messages: tuple[Message, ...],
        folder: Path,
        add_generation_prompt: bool,
    ) -> EncodedSample:
        self._check_images_rendered(messages, sample_id)
        output = self._run_processor(messages, folder, add_generation_prompt, sample_id)
        loss_mask_T = np.zeros(len(output.ids_T), dtype=np.bool_)
        supervised_turns: Sequence[int] = ()
        if not add_generation_prompt:
            supervised_turns = self.list_supervised_turns(messages)
        for index in supervised_turns:
            start = self._find_answer_start(output.ids_T, messages, index, folder, sample_id)
            loss_mask_T[self._find_answer_span(output.ids_T, start, sample_id)] = True
        # The transformers model computes its own position ids.
        position_ids_3T = np.tile(np.arange(len(output.ids_T), dtype=np.int32), (3, 1))
        tokenized = HfTokenizedSample(
            sample_id,
            output.ids_T,
            loss_mask_T,
            position_ids_3T,
            (),
            messages,
            folder,
            add_generation_prompt,
        )
        return EncodedSample(tokenized, _EMPTY_PATCHES, output.hf_inputs)

    def _find_answer_start(
        self,
        ids_T: NDArray[np.int32],
        messages: tuple[Message, ...],
        index: int,
        folder: Path,
        sample_id: str,
    ) -> int:
        """Return the index of the first token of the answer `messages[index]`.

        If no image follows, text-only tokenization determines the length of the remaining tokens,
        so that images are not processed again.
        """
        has_later_images = any(
            isinstance(part, ImagePart) for message in messages[index:] for part in message.content
        )
        if not has_later_images:
            full_ids = self._tokenize_text(messages, False, sample_id)
            prompt_ids = self._tokenize_text(messages[:index], True, sample_id)
            answer_ids = full_ids[len(prompt_ids) :]
            if (
                full_ids[: len(prompt_ids)] == prompt_ids
                and ids_T[len(ids_T) - len(answer_ids) :].tolist() == answer_ids
            ):
                return len(ids_T) - len(answer_ids)
        prompt_ids_T = self._run_processor(messages[:index], folder, True, sample_id).ids_T
        if not np.array_equal(ids_T[: len(prompt_ids_T)], prompt_ids_T):
            raise UserError(
                f"the chat template of {self.family} renders the prompt of an answer differently"
                " if the answer or a later turn follows",
                where=f"sample {sample_id:.80}",
                expected="a template that renders earlier turns independently of later turns",
                remedy="use single-turn conversations, without reasoning and without leading"
                " whitespace in the answer",
            )
        return len(prompt_ids_T)

    def _check_images_rendered(self, messages: Sequence[Message], sample_id: str) -> None:
        """Raise UserError if the chat template omits the last image of a conversation."""
        reduced = _drop_last_image(messages)
        if reduced is not None and self._render_text(
            messages, False, sample_id
        ) == self._render_text(reduced, False, sample_id):
            raise UserError(
                f"the chat template of {self.family} omits an image",
                where=f"sample {sample_id:.80}",
                expected="a template that renders every image of the sample",
                remedy="use samples with fewer images; many families support only one",
            )

    def _tokenize_text(
        self, messages: Sequence[Message], add_generation_prompt: bool, sample_id: str
    ) -> list[int]:
        """Tokenize rendered messages with a single placeholder token per image."""
        text = self._render_text(messages, add_generation_prompt, sample_id)
        ids: list[int] = self._processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _render_text(
        self, messages: Sequence[Message], add_generation_prompt: bool, sample_id: str
    ) -> str:
        """Render messages with the chat template, without image data."""
        conversation = _build_conversation(messages, _describe_part)
        texts = self._apply_chat_template(
            conversation, add_generation_prompt, sample_id, tokenize=False
        )
        return str(texts[0])

    def _apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        sample_id: str,
        **kwargs: object,
    ) -> Any:
        """Call the processor's chat template and convert its errors to UserError."""
        try:
            # Tokenizers are not thread-safe, and prediction prefetches in several threads.
            with self._lock:
                return self._processor.apply_chat_template(
                    [conversation],
                    add_generation_prompt=add_generation_prompt,
                    **kwargs,
                    **self._template_kwargs,
                )
        except Exception as error:  # templates and processors raise arbitrary exceptions
            raise UserError(
                f"the processor of {self.family} failed: {type(error).__name__}: {error}",
                where=f"sample {sample_id:.80}",
                expected="a conversation that the model's chat template and processor support",
                remedy="correct or remove the sample; many families support only one image",
            ) from error

    def _find_answer_span(self, ids_T: NDArray[np.int32], start: int, sample_id: str) -> slice:
        """Return the token slice of the answer at `start`, including its end token."""
        is_special = np.isin(ids_T[start:], [*self._special_ids, *self.end_ids])
        end_positions = start + np.flatnonzero(is_special)
        if not len(end_positions) or int(ids_T[end_positions[0]]) not in self.end_ids:
            raise UserError(
                "no end token"
                f" ({', '.join(map(self.tokenizer.id_to_token, self.end_ids))}) follows an"
                f" answer in the chat template of {self.family}",
                where=f"sample {sample_id:.80}",
                expected="a template that ends assistant turns with an end token",
                remedy="add the end token to the chat template in the model folder",
            )
        return slice(start, int(end_positions[0]) + 1)

    def _run_processor(
        self, messages: Sequence[Message], folder: Path, add_generation_prompt: bool, sample_id: str
    ) -> _ProcessorOutput:
        conversation = _build_conversation(
            messages, lambda part: self._to_chat_part(part, folder, sample_id)
        )
        kwargs = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        output = self._apply_chat_template(conversation, add_generation_prompt, sample_id, **kwargs)
        non_tensor_keys = [key for key, value in output.items() if not isinstance(value, Tensor)]
        if non_tensor_keys:
            raise UserError(
                f"the processor of {self.family} returns {', '.join(non_tensor_keys)} as a list",
                where=f"sample {sample_id:.80}",
                expected="one tensor per input, as for images of one size",
                remedy="use samples with one image each, or with images of one size",
            )
        hf_inputs: dict[str, Tensor] = dict(output.items())
        ids_T = hf_inputs.pop("input_ids")[0].to(torch.int32).numpy()
        return _ProcessorOutput(ids_T, hf_inputs)

    def _to_chat_part(self, part: ContentPart, folder: Path, sample_id: str) -> dict[str, Any]:
        """Convert a content part to the dict that transformers chat templates expect."""
        if isinstance(part, ImagePart):
            return {"type": "image", "image": self.load_image(folder / part.image)}
        assert isinstance(part, TextPart), f"a {part.type} in sample {sample_id}"
        found_tokens = [token for token in self._special_tokens if token in part.text]
        if found_tokens:
            raise UserError(
                f"the text contains {found_tokens[0]}, a special token of {self.family}",
                where=f"sample {sample_id:.80}",
                expected="texts without special tokens",
                remedy="remove it from the text",
            )
        return {"type": "text", "text": part.text}

    def load_image(self, path: Path) -> Image.Image:
        """Load an image and resize it by the image rule of the recipe."""
        image = load_image(path)
        if self.image_rule == NO_RESIZE_RULE:
            return image
        size = (image.height, image.width)
        height, width = compute_resized_size(size, self.image_rule, 1, where=str(path))
        return image.resize((width, height), Image.Resampling.BICUBIC)


def _build_conversation(
    messages: Sequence[Message], to_part: Callable[[ContentPart], dict[str, Any]]
) -> list[dict[str, Any]]:
    return [{"role": one.role, "content": [*map(to_part, one.content)]} for one in messages]


def _describe_part(part: ContentPart) -> dict[str, Any]:
    """Convert a content part to that of a chat template, without the data of an image."""
    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text}
    return {"type": "image"}


def _drop_last_image(messages: Sequence[Message]) -> list[Message] | None:
    """Return the messages without their last image, or None if they have no image."""
    for index in reversed(range(len(messages))):
        parts = messages[index].content
        for position in reversed(range(len(parts))):
            if isinstance(parts[position], ImagePart):
                remaining = (*parts[:position], *parts[position + 1 :])
                reduced = Message(role=messages[index].role, content=remaining)
                return [*messages[:index], reduced, *messages[index + 1 :]]
    return None


_EMPTY_PATCHES: NDArray[np.uint8] = np.empty((0, 0), dtype=np.uint8)


def _load_processor(folder: ModelFolder) -> Any:
    try:
        processor = import_transformers().AutoProcessor.from_pretrained(
            str(folder.path), **FROM_PRETRAINED_OPTIONS
        )
    except BaseException as error:  # missing files and packages raise various exceptions
        if not (isinstance(error, Exception) or is_rust_panic(error)):
            raise
        raise UserError(
            f"transformers cannot load the processor of {folder.family}:"
            f" {' '.join(str(error).split())}",
            where=str(folder.path),
            expected="the processor files of the published model and the packages it requires",
            remedy="download the model again, or install missing packages",
        ) from error
    if not processor.chat_template:
        raise UserError(
            f"the {folder.family} model has no chat template",
            where=str(folder.path),
            expected="a chat template, which defines the prompt format",
            remedy="use the chat or instruct version of the model",
        )
    return processor


def _read_end_ids(folder: ModelFolder, tokenizer: Any) -> tuple[int, ...]:
    """Return the ids of the end tokens from the tokenizer and generation_config.json."""
    eos_token_id = folder.generation_config.get("eos_token_id")
    ids = [tokenizer.eos_token_id]
    if isinstance(eos_token_id, list):
        ids += eos_token_id
    else:
        ids.append(eos_token_id)
    end_ids = tuple(dict.fromkeys(token for token in ids if isinstance(token, int)))
    if not end_ids:
        raise UserError(
            f"eos_token_id is {eos_token_id!r}, and the tokenizer has none",
            where=str(folder.path),
            expected="a token id that ends completions",
            remedy="use the generation_config.json of the published model",
        )
    return end_ids
