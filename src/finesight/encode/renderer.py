"""Renderers convert samples to tokens and image inputs, and completions to text and boxes.

Native families are rendered here, with M-RoPE position ids and image patches; other families by
`HfRenderer`.

A turn of a model with reasoning is `<think>`, newline, reasoning, newline, `</think>`, two
newlines, answer (chat template of Qwen3-VL Thinking). The prompt ends after `<think>` and its
newline. If `</think>` occurs several times, the answer in a turn of a sample starts after the last
one, as in the template. The answer of a completion starts after the first one, as in vLLM, because
it is streamed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from finesight.encode.family import (
    THINK_END,
    THINK_START,
    ModelFamily,
    PromptPiece,
    SpecialToken,
    ThinkingOptions,
    VideoSegment,
    merge_text_parts,
    strip_content,
)
from finesight.encode.tokenization import (
    EncodedSample,
    TextTokenizer,
    TokenizedSample,
    VisualSpan,
    iter_video_runs,
    load_tokenizer,
)
from finesight.errors import Remedy, UserError, describe_indices
from finesight.family_components import FAMILIES
from finesight.model_folder import ModelFolder
from finesight.objective_components import SampleKind, describe_samples, suggest_objectives
from finesight.samples.augmentation import AugmentedSample, ImageVariant
from finesight.samples.boxes import is_inside_image
from finesight.samples.frames import ImageSize, ImageSizes
from finesight.samples.image_file import read_image_size
from finesight.samples.sample import (
    BoxPart,
    ContentPart,
    ImagePart,
    LocatedSample,
    Message,
    Sample,
    TextPart,
    VideoPart,
    list_media_paths,
)
from finesight.samples.video_file import iter_video_frames, read_video_header
from finesight.settings.config import ImageRule, ImageSettings
from finesight.vision.image_processing import (
    compute_video_size,
    concat_patches,
    get_frame_size,
    load_image,
    load_patch_config,
    load_video_limits,
    patchify,
    resize_frame,
    resolve_image_rule,
)

_THINK_TAG = "<think>"
_THINK_END_TAG = "</think>"

VISUAL_TOKENS = frozenset(
    ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"]
)
"""Special tokens around and instead of images and videos."""

Responses = Literal["pairs", "all", "none"]
"""Samples of which answers are rendered as responses to a prompt (`TokenizedSample`)."""


@dataclass(frozen=True, slots=True)
class ReasoningAndAnswer:
    """Content parts of an assistant turn, split into reasoning and answer.

    `reasoning` is None if the turn contains no `</think>`.
    """

    reasoning: tuple[ContentPart, ...] | None
    answer: tuple[ContentPart, ...]


def split_reasoning(content: Sequence[ContentPart]) -> ReasoningAndAnswer:
    """Split the content of an assistant turn at its last `</think>`.

    A leading `<think>` and newlines around both parts are removed.
    """
    content = merge_text_parts(content)
    end_index = None
    for index, part in enumerate(content):
        if isinstance(part, TextPart) and _THINK_END_TAG in part.text:
            end_index = index
    if end_index is None:
        return ReasoningAndAnswer(None, tuple(content))
    end_part = content[end_index]
    assert isinstance(end_part, TextPart), f"reasoning that ends in a {end_part.type} part"
    before, _, after = end_part.text.rpartition(_THINK_END_TAG)
    reasoning = [*content[:end_index], TextPart(text=before.rstrip("\n"))]
    first = reasoning[0]
    if isinstance(first, TextPart):
        reasoning_text = first.text
        start, tag, rest = reasoning_text.partition(_THINK_TAG)
        if tag and not start.strip():
            reasoning_text = rest
        reasoning[0] = TextPart(text=reasoning_text.lstrip("\n"))
    answer = (TextPart(text=after.lstrip("\n")), *content[end_index + 1 :])
    return ReasoningAndAnswer(tuple(reasoning), answer)


def parse_reasoning(text: str) -> tuple[str, str]:
    """Split the text of a completion at its first `</think>` into reasoning and answer.

    The text starts within the reasoning, because the prompt already contains `<think>`. Without
    `</think>`, the answer is empty.
    """
    reasoning, _, answer = text.partition(_THINK_END_TAG)
    return reasoning.strip("\n"), answer.lstrip("\n")


class TokenBuilder:
    """Builds the token ids and loss mask of a sample from text and special tokens.

    Adjacent texts are tokenized together, so that byte pairs merge across their boundaries as in
    the published chat template (for example, the newline after "user" with a newline at the start
    of a caption). Supervised and unsupervised text is never merged: during generation, the prompt
    ends before the answer, so the answer is tokenized separately.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._loss_mask: list[bool] = []
        self._pending_texts: list[str] = []
        self._is_pending_supervised = False

    @property
    def length(self) -> int:
        """Number of tokens added so far. Reading it tokenizes pending text."""
        self.flush()
        return len(self._ids)

    def add_text(self, text: str, *, is_supervised: bool) -> None:
        """Append text; special tokens in it are tokenized as ordinary text."""
        if is_supervised != self._is_pending_supervised:
            self.flush()
            self._is_pending_supervised = is_supervised
        self._pending_texts.append(text)

    def add_special_token(self, token: str, *, is_supervised: bool, count: int = 1) -> None:
        """Append a special token `count` times."""
        self.flush()
        self._ids += [self._tokenizer.token_to_id(token)] * count
        self._loss_mask += [is_supervised] * count

    def add_pieces(self, pieces: Iterable[PromptPiece], *, is_supervised: bool) -> None:
        """Append prompt pieces, each of which is text or a special token."""
        for piece in pieces:
            if isinstance(piece, SpecialToken):
                self.add_special_token(piece.token, is_supervised=is_supervised)
            else:
                self.add_text(piece, is_supervised=is_supervised)

    def to_arrays(self) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Return the token ids and the loss mask of all added pieces, both [T]."""
        self.flush()
        return np.array(self._ids, dtype=np.int32), np.array(self._loss_mask, dtype=np.bool_)

    def flush(self) -> None:
        """Tokenize pending text now, so that it does not merge with later text."""
        if self._pending_texts:
            ids = self._tokenizer.encode("".join(self._pending_texts))
            self._ids += ids
            self._loss_mask += [self._is_pending_supervised] * len(ids)
            self._pending_texts = []


def compute_position_ids(
    num_tokens: int,
    spans: Sequence[VisualSpan],
    temporal_ids: Sequence[NDArray[np.int64]],
    merge_size: int,
) -> NDArray[np.int32]:
    """Compute M-RoPE position ids [3, T] of time, height and width.

    See Wang et al. 2024 (Qwen2-VL), section 2.1. A text token has the same position in all three
    rows. The placeholder tokens of an image or video start at the next text position, to which
    their temporal id, row and column are added. Later text continues at the largest position in any
    row plus one, as in transformers 4.45 to 5.2, the official fine-tuning code, vLLM and SGLang.

    transformers 5.3 and later continue after the larger side of the grid instead. If a video is
    longer than its frames are wide, text then reuses positions of the video, while generation
    continues from the largest position. Both rules agree if time is the smallest dimension
    (tests/export/test_video_in_transformers.py).

    Args:
        spans: Images and videos in token order.
        temporal_ids: Temporal position ids of the frame groups of each span, starting at 0.
    """
    position_ids_3T = np.empty((3, num_tokens), dtype=np.int32)
    num_filled = 0
    next_position = 0
    for span, frame_ids in zip(spans, temporal_ids, strict=True):
        t, num_patch_rows, num_patch_columns = span.grid_thw
        h = num_patch_rows // merge_size
        w = num_patch_columns // merge_size
        assert len(frame_ids) == t, f"{len(frame_ids)} temporal ids for {t} frame groups"
        assert span.stop - span.start == t * h * w, f"{span} has not {t * h * w} placeholders"
        next_position += span.start - num_filled
        position_ids_3T[:, num_filled : span.start] = np.arange(
            next_position - span.start + num_filled, next_position
        )
        span_ids_3M = position_ids_3T[:, span.start : span.stop]
        span_ids_3M[0] = np.repeat(frame_ids, h * w) + next_position
        np.add(_grid_rows_columns(t, h, w), next_position, out=span_ids_3M[1:])
        num_filled = span.stop
        next_position += max(int(frame_ids[-1]) + 1, h, w)
    position_ids_3T[:, num_filled:] = np.arange(
        next_position, next_position + num_tokens - num_filled
    )
    return position_ids_3T


@lru_cache(maxsize=256)
def _grid_rows_columns(t: int, h: int, w: int) -> NDArray[np.int32]:
    """Return the row and column of each placeholder token of a grid: [2, t x h x w]."""
    return np.indices((t, h, w), dtype=np.int32)[1:].reshape(2, -1)


IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True, slots=True)
class DecodedCompletion:
    """Text of a generated completion, separated into reasoning and answer.

    Attributes:
        reasoning: Reasoning before the answer; None for models without reasoning.
    """

    text: str
    raw_text: str
    reasoning: str | None


_IMAGE_SEGMENT = VideoSegment("", slice(1), 0.0)
"""Segment of an image, which has no timestamp."""

_Visual = tuple[VisualSpan, VideoSegment]
"""An image or video segment of a sample before tokenization, when its span is empty."""


@dataclass(frozen=True, slots=True)
class _RenderState:
    """State of the token builder while a sample is rendered.

    Attributes:
        pending_visuals: Images or video segments of each image and video part that is not rendered
            yet.
        images: All images of the sample, including those of later turns, because boxes may refer to
            any image.
        spans: Images and video segments rendered so far.
        variants: Variants of images that are not rendered yet; empty without augmentation.
    """

    sample_id: str
    token_builder: TokenBuilder
    pending_visuals: Iterator[Sequence[_Visual]]
    images: Sequence[VisualSpan]
    image_sizes: Sequence[ImageSizes]
    spans: list[VisualSpan]
    temporal_ids: list[NDArray[np.int64]]
    variants: Iterator[ImageVariant]


def load_family(folder: ModelFolder) -> ModelFamily:
    """Create the `ModelFamily` of the model in a folder."""
    if folder.family not in FAMILIES:
        raise UserError(
            f"unsupported model family {folder.family}",
            where=str(folder.path / "config.json"),
            expected=f"one of {', '.join(FAMILIES)}",
            remedy="choose a model of another one",
        )
    FAMILIES.find_plugin(folder.family)  # raises an error if several packages define the family
    target = FAMILIES[folder.family].renderer
    from_folder = FAMILIES.load_half(folder.family, target, Callable)
    family = FAMILIES.call(folder.family, from_folder, folder)
    if not isinstance(family, ModelFamily):
        problem = f"returns {family!r:.60} instead of a ModelFamily"
        raise FAMILIES.build_call_error(folder.family, from_folder, problem)
    return family


def is_native(folder: ModelFolder) -> bool:
    """Return whether finesight has its own implementation of the model family."""
    return folder.family in FAMILIES


def require_native(folder: ModelFolder, operation: str, remedy: Remedy) -> None:
    """Raise UserError for a model family without a native implementation."""
    if not is_native(folder):
        raise UserError(
            f"a model of the family {folder.family}, which has no native implementation",
            where=operation,
            expected="a native family",
            remedy=remedy,
        )


_LABEL_KINDS: dict[bool | None, SampleKind] = {
    None: "label none",
    True: "label true",
    False: "label false",
}
"""Kind of a sample without a rejected answer, by its label."""


class Renderer(ABC):
    """Converts samples to tokens and image inputs, and completions to answers.

    Attributes:
        is_native: Whether the family is native, so that the frames of boxes are known, images can
            be augmented, and runs can be planned.
        system_prompt: System prompt of samples without one; None for the default of the model.
        responses: Samples whose answers are rendered as responses; preference pairs by default.
        objective: Value of `train.objective`, for errors.
        accepted_samples: Kinds of samples that the objective can train on; None for all.
        supervise: Answers that training uses, unless their `loss` is false.
        max_length: Length to which a mismatched answer is truncated.
        has_thinking_modes: Whether the chat template has a thinking and a non-thinking mode.
        renders_reasoning: Whether the reasoning of assistant turns is separated from their answers.
    """

    is_native: ClassVar[bool] = False
    responses: Responses = "pairs"
    objective: str | None = None
    accepted_samples: frozenset[SampleKind] | None = None
    supervise: Literal["all", "last"] = "all"
    max_length: int | None = None
    has_thinking_modes: bool = False
    renders_reasoning: bool = False
    image_rule: ImageRule
    system_prompt: str | None
    tokenizer: TextTokenizer
    end_ids: tuple[int, ...]

    @property
    def native(self) -> NativeRenderer:
        """This renderer, of a native family."""
        raise AssertionError(f"{type(self).__name__} is no renderer of a native family")

    @property
    def has_reasoning(self) -> bool:
        """True if prompts are rendered in thinking mode."""
        return False

    @abstractmethod
    def with_thinking(self, options: ThinkingOptions) -> Self:
        """Return a copy of the renderer whose prompts have a thinking mode.

        Raises:
            UserError: The chat template does not define this mode or reasoning effort.
        """

    @abstractmethod
    def _tokenize_messages(
        self,
        located_sample: LocatedSample,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
    ) -> TokenizedSample:
        """Tokenize messages of a sample, optionally followed by the header of an answer."""

    @abstractmethod
    def load_patches(self, tokenized: TokenizedSample) -> EncodedSample:
        """Decode the images and videos of a tokenized sample into patches."""

    @abstractmethod
    def parse_boxes(
        self, raw_text: str, spans: Sequence[VisualSpan], image_index: int = 0
    ) -> list[BoxPart]:
        """Parse the boxes of an answer, in pixels of an original image.

        Args:
            spans: Images and videos of the prompt. Without images, there are no boxes.
            image_index: Index of the image that the boxes refer to, because answers do not name an
                image.
        """

    def tokenize(self, located_sample: LocatedSample) -> TokenizedSample:
        """Tokenize a sample from its text and image headers.

        Raises:
            CorruptImageError: An image cannot be used, or its aspect ratio exceeds 200.
            UserError: The model does not support a part of the sample, a box exceeds its image, or
                `accepted_samples` lacks the kind of the sample.
        """
        sample = located_sample.sample
        self._check_kind(sample)
        tokenize = partial(self._tokenize_messages, add_generation_prompt=False)
        tokenized = tokenize(located_sample, sample.messages)
        others: list[TokenizedSample] = []
        if sample.rejected and self.responses != "none":
            others.append(tokenize(located_sample, sample.rejected_messages))
        joined = tokenized
        if others or self.responses == "all":
            joined = tokenized.join_responses(others)
        mismatched = self._replace_answer(located_sample, tokenized.spans)
        if mismatched is not None:
            with suppress(UserError):  # A bad answer to another sample does not exclude this one.
                others.append(tokenize(mismatched, mismatched.sample.messages))
                extended = tokenized.join_responses(others, self.max_length)
                if extended.loss_mask_T[extended.response_starts[-1] :].any():
                    return extended
        return joined

    def _check_kind(self, sample: Sample) -> None:
        """Raise UserError for a sample of an excluded kind."""
        if sample.rejected:
            kind: SampleKind = "pair"
            what = "a rejected answer"
        else:
            kind = _LABEL_KINDS[sample.label]
            what = f"no rejected answer, {kind}"
        if self.accepted_samples is not None and kind not in self.accepted_samples:
            raise UserError(
                what,
                where=f"sample {sample.id}",
                expected=describe_samples(self.accepted_samples),
                remedy=suggest_objectives(self.objective, kind),
            )

    def _replace_answer(
        self, located_sample: LocatedSample, images: Sequence[VisualSpan]
    ) -> LocatedSample | None:
        """Return a sample with its mismatched answer as the last turn; None without one."""
        sample = located_sample.sample
        turns = self.list_supervised_turns(sample.messages)
        if not turns or located_sample.mismatched is None:
            return None
        answer = located_sample.mismatched
        content = tuple(_fit_box(part, images) for part in answer.content)
        last_turn = answer.model_copy(update={"content": content})
        messages = (*sample.messages[: turns[-1]], last_turn)
        return replace(located_sample, sample=sample.model_copy(update={"messages": messages}))

    def list_supervised_turns(self, messages: Sequence[Message]) -> list[int]:
        """Return the indices of the turns whose tokens contribute to the loss."""
        turns = [i for i, one in enumerate(messages) if one.role == "assistant" and one.loss]
        if self.supervise == "last":
            return turns[-1:]
        return turns

    @property
    def visual_token_ids(self) -> tuple[int, ...]:
        """Ids of placeholders of images and videos, which an answer must not contain."""
        names = set(self.tokenizer.list_special_tokens()) & VISUAL_TOKENS
        return tuple(sorted(map(self.tokenizer.token_to_id, names)))

    def tokenize_prompt(self, located_sample: LocatedSample) -> TokenizedSample:
        """Tokenize the prompt of a sample for generation; no token is supervised.

        The prompt contains all turns except a final assistant turn, followed by the generation
        prompt.
        """
        messages = located_sample.sample.messages
        prompt_messages = messages[:-1] if messages[-1].role == "assistant" else messages
        return self._tokenize_messages(located_sample, prompt_messages, add_generation_prompt=True)

    def encode(self, located_sample: LocatedSample) -> EncodedSample:
        """Tokenize a sample and decode its images and videos into patches."""
        return self.load_patches(self.tokenize(located_sample))

    def encode_without_patches(self, located_sample: LocatedSample) -> EncodedSample:
        """Encode a sample with empty patches, for training with a vision cache."""
        raise AssertionError(f"image features of {located_sample.sample.id} cannot be cached")

    def encode_prompt(self, located_sample: LocatedSample) -> EncodedSample:
        """Encode the prompt of a sample for generation; see `tokenize_prompt`."""
        return self.load_patches(self.tokenize_prompt(located_sample))

    def decode_completion(
        self, ids: Sequence[int], *, is_thinking: bool | None = None
    ) -> DecodedCompletion:
        """Decode the token ids of a completion up to its end token.

        `raw_text` is decoded from all ids and contains special tokens, but not the reasoning.

        Args:
            is_thinking: Whether the completion starts within the reasoning
                (`TokenizedSample.is_thinking`); None for the mode of the renderer.
        """
        end = len(ids)
        for position, token in enumerate(ids):
            if token in self.end_ids:
                end = position
                break
        text = self.tokenizer.decode(ids[:end], skip_special_tokens=True)
        raw_text = self.tokenizer.decode(ids, skip_special_tokens=False)
        if is_thinking is None:
            is_thinking = self.has_reasoning
        if not is_thinking:
            return DecodedCompletion(text, raw_text, None)
        reasoning, answer = parse_reasoning(text)
        return DecodedCompletion(answer, parse_reasoning(raw_text)[1], reasoning)

    def _with_system_prompt(self, messages: Sequence[Message]) -> tuple[Message, ...]:
        if messages[0].role == "system" or self.system_prompt is None:
            return tuple(messages)
        return (Message(role="system", content=(TextPart(text=self.system_prompt),)), *messages)


class NativeRenderer(Renderer):
    """Converts samples to tokens and patches for one model, image rule and system prompt.

    Each turn is `<|im_start|>role`, a newline, the content, `<|im_end|>` and a newline, as in the
    published chat template. The system turn is that of the sample, else `system_prompt`, else the
    default of the family. An image is `<|vision_start|>`, one `<|image_pad|>` per merged patch, and
    `<|vision_end|>`. Adjacent boxes are formatted by the family. For models with reasoning, only
    the reasoning of the last answer is rendered. If the template has two modes, a sample whose last
    answer contains reasoning is rendered in thinking mode, and any other in non-thinking mode.

    Supervised tokens are the content of assistant turns and their `<|im_end|>`, without the newline
    after it, except for turns that `list_supervised_turns` leaves out. Answers are tokenized
    separately from the `assistant` header, because the prompt ends there during generation: the
    tokens of `encode_prompt` are always a prefix of the tokens of `encode`. Tokenizing the full
    template text gives the same ids, except for answers that start with whitespace and a newline,
    which would merge with the newline of the prompt.
    """

    is_native = True

    def __init__(
        self,
        folder: ModelFolder,
        image_rule: ImageSettings | None = None,
        system_prompt: str | None = None,
    ) -> None:
        """Load the tokenizer and check its token ids against config.json.

        Args:
            image_rule: Image settings of the recipe; the model provides missing ones.
            system_prompt: System prompt of the recipe; None for the default of the family.
        """
        self.family: ModelFamily = load_family(folder)
        self.has_thinking_modes = self.family.has_thinking_modes
        self.renders_reasoning = self.family.renders_reasoning
        self.patch_config = load_patch_config(folder)
        self.image_rule: ImageRule = resolve_image_rule(folder.preprocessor_config, image_rule)
        self._video_limits = load_video_limits(folder) if self.family.limits_video_pixels else None
        self.system_prompt = system_prompt
        if system_prompt is None:
            self.system_prompt = self.family.system_prompt
        self.tokenizer = load_tokenizer(folder)
        self.end_ids = (self.tokenizer.token_to_id(IM_END), self.tokenizer.token_to_id(END_OF_TEXT))
        for token, key in self.family.token_id_keys.items():
            self._check_token_id(folder, key, token)

    @property
    def native(self) -> NativeRenderer:
        return self

    @property
    def has_reasoning(self) -> bool:
        return self.family.has_reasoning

    def with_thinking(self, options: ThinkingOptions) -> Self:
        renderer = copy(self)
        renderer.family = self.family.with_thinking(options)
        return renderer

    def encode_without_patches(self, located_sample: LocatedSample) -> EncodedSample:
        empty = np.empty((0, self.patch_config.patch_dim), dtype=np.uint8)
        return EncodedSample(self.tokenize(located_sample), empty)

    def load_patches(self, tokenized: TokenizedSample) -> EncodedSample:
        empty = np.empty((0, self.patch_config.patch_dim), dtype=np.uint8)
        runs = map(self._load_run, iter_video_runs(tokenized.spans))
        return EncodedSample(tokenized, concat_patches([*chain.from_iterable(runs)] or [empty]))

    def parse_boxes(
        self, raw_text: str, spans: Sequence[VisualSpan], image_index: int = 0
    ) -> list[BoxPart]:
        images = [span for span in spans if span.kind == "image"]
        if not images:
            return []
        sizes = images[image_index].original_size, images[image_index].resized_size
        boxes = self.family.read_boxes(raw_text, *sizes)
        return [box.model_copy(update={"image": image_index}) for box in boxes]

    def _tokenize_messages(
        self,
        located_sample: LocatedSample,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
    ) -> TokenizedSample:
        state = self._create_state(located_sample)
        token_builder = state.token_builder
        family = self.family
        if family.has_thinking_modes and not add_generation_prompt:
            family = replace(family, has_reasoning=_has_reasoning(messages))
        tools = located_sample.sample.tools
        messages = family.format_tools(self._with_system_prompt(messages), tools)
        messages = family.format_messages(messages)
        supervised_turns = self.list_supervised_turns(messages)
        unsupervised: list[slice] = []
        for index in range(len(messages)):
            start = token_builder.length
            self._add_turn(state, family, messages, index)
            if index not in supervised_turns:
                unsupervised.append(slice(start, token_builder.length))
            token_builder.add_text("\n", is_supervised=False)
        if add_generation_prompt:
            self._add_generation_prompt(token_builder)
        ids_T, loss_mask_T = token_builder.to_arrays()
        if add_generation_prompt:
            unsupervised = [slice(None)]
        for turn in unsupervised:
            loss_mask_T[turn] = False
        spans = state.spans
        temporal_ids = state.temporal_ids
        if family.uses_1d_positions:
            spans = []
            temporal_ids = []
        position_ids_3T = compute_position_ids(
            len(ids_T), spans, temporal_ids, self.patch_config.merge_size
        )
        return TokenizedSample(
            located_sample.sample.id,
            ids_T,
            loss_mask_T,
            position_ids_3T,
            tuple(state.spans),
            is_thinking=family.has_reasoning,
        )

    def append_tool_results(
        self, encoded: EncodedSample, results: Sequence[Sequence[str | Image.Image]]
    ) -> EncodedSample:
        """Append the results of tools to a sequence, and the prompt of the next answer.

        The sequence ends with the end token of an answer. Its tokens do not change: texts of the
        results are tokenized on their own, as between the special tokens of the chat template.

        Args:
            results: Texts and RGB images of the result of each call, in the order of the calls.

        Raises:
            UserError: The aspect ratio of an image exceeds 200.
        """
        sample_id = encoded.tokenized.id
        images = [block for blocks in results for block in blocks if isinstance(block, Image.Image)]
        visuals = [self._build_result_visual(image, sample_id) for image in images]
        state = _RenderState(
            sample_id=sample_id,
            token_builder=TokenBuilder(self.tokenizer),
            pending_visuals=iter([[visual] for visual in visuals]),
            images=(),
            image_sizes=(),
            spans=[],
            temporal_ids=[],
            variants=iter(()),
        )
        token_builder = state.token_builder
        token_builder.add_text("\n", is_supervised=False)
        turn = self._format_results(results)
        self._add_turn(state, self.family, [turn], 0)
        token_builder.add_text("\n", is_supervised=False)
        self._add_generation_prompt(token_builder)

        before = encoded.tokenized
        ids_T, loss_mask_T = token_builder.to_arrays()
        position_ids_3T = compute_position_ids(
            len(ids_T), state.spans, state.temporal_ids, self.patch_config.merge_size
        )
        position_ids_3T += before.position_ids_3T.max() + 1
        spans = list(before.spans)
        patches = list(encoded.appended_patches)
        for span, image in zip(state.spans, images, strict=True):
            start = before.num_tokens + span.start
            stop = before.num_tokens + span.stop
            spans.append(replace(span, start=start, stop=stop))
            patches.append(patchify([image], span.resized_size, self.patch_config))
        tokenized = replace(
            before,
            ids_T=np.concatenate([before.ids_T, ids_T]),
            loss_mask_T=np.concatenate([before.loss_mask_T, loss_mask_T]),
            position_ids_3T=np.concatenate([before.position_ids_3T, position_ids_3T], axis=1),
            spans=tuple(spans),
        )
        return replace(encoded, tokenized=tokenized, appended_patches=tuple(patches))

    def _build_result_visual(self, image: Image.Image, sample_id: str) -> _Visual:
        """Return an image of a tool result, which has no file."""
        name = Path(f"{sample_id}, result of a tool")
        return self._build_visual("image", (name,), (image.height, image.width), _IMAGE_SEGMENT)

    def _format_results(self, results: Sequence[Sequence[str | Image.Image]]) -> Message:
        """Return the results of several calls as the turn that the template renders."""
        messages = [Message.model_construct(role="assistant", content=())]
        for blocks in results:
            content: list[ContentPart] = []
            for block in blocks:
                if isinstance(block, str):
                    content.append(TextPart(text=block))
                else:
                    content.append(ImagePart(image=""))
            messages.append(Message.model_construct(role="tool", content=tuple(content)))
        return self.family.format_messages(self.family.format_tools(messages, ()))[-1]

    def _add_turn(
        self, state: _RenderState, family: ModelFamily, messages: Sequence[Message], index: int
    ) -> None:
        """Append a turn of a conversation, without the newline after it."""
        message = messages[index]
        token_builder = state.token_builder
        token_builder.add_special_token(IM_START, is_supervised=False)
        self._add_role(token_builder, message.role)
        is_assistant = message.role == "assistant"
        content: Sequence[ContentPart] = message.content
        if family.renders_reasoning and is_assistant:
            content = self._add_reasoning(state, family, messages, index)
        self._add_content(state, content, is_supervised=is_assistant)
        token_builder.add_special_token(IM_END, is_supervised=is_assistant)

    def _add_generation_prompt(self, token_builder: TokenBuilder) -> None:
        """Append the header of the next answer."""
        token_builder.add_special_token(IM_START, is_supervised=False)
        self._add_role(token_builder, "assistant")
        token_builder.add_text(self.family.generation_prompt, is_supervised=False)

    def _create_state(self, located_sample: LocatedSample) -> _RenderState:
        """Return the state before the first turn; reads the headers of images and videos."""
        visuals_by_part: list[list[_Visual]] = []
        images: list[VisualSpan] = []
        for part in located_sample.sample.iter_parts():
            if isinstance(part, ImagePart | VideoPart):
                visuals = self._build_visuals(part, located_sample)
                visuals_by_part.append(visuals)
                images += [span for span, _ in visuals if span.kind == "image"]
        variants: Iterator[ImageVariant] = iter(())
        if isinstance(located_sample, AugmentedSample):
            variants = iter(located_sample.variants)
        return _RenderState(
            sample_id=located_sample.sample.id,
            token_builder=TokenBuilder(self.tokenizer),
            pending_visuals=iter(visuals_by_part),
            images=images,
            image_sizes=[ImageSizes(one.original_size, one.resized_size) for one in images],
            spans=[],
            temporal_ids=[],
            variants=variants,
        )

    def _add_role(self, token_builder: TokenBuilder, role: str) -> None:
        if not self.family.splits_role_tokens:
            token_builder.add_text(f"{role}\n", is_supervised=False)
            return
        for piece in (role, "\n"):
            token_builder.add_text(piece, is_supervised=False)
            token_builder.flush()

    def _add_reasoning(
        self, state: _RenderState, family: ModelFamily, messages: Sequence[Message], index: int
    ) -> Sequence[ContentPart]:
        """Append the reasoning of a turn if the template keeps it, and return the answer.

        An answer without reasoning is rendered with an empty reasoning section.
        """
        parts = split_reasoning(messages[index].content)
        reasoning = parts.reasoning or ()
        answer = parts.answer
        if family.strips_content:
            reasoning = strip_content(reasoning)
        if family.strips_answer:
            answer = strip_content(answer)
        has_reasoning = any(not isinstance(part, TextPart) or part.text for part in reasoning)
        if not family.keeps_reasoning(messages, index, has_reasoning=has_reasoning):
            return answer
        is_supervised = bool(reasoning) or family.supervises_empty_reasoning
        state.token_builder.add_text(THINK_START, is_supervised=False)
        self._add_content(state, reasoning, is_supervised=is_supervised)
        state.token_builder.add_text(THINK_END, is_supervised=is_supervised)
        if answer and isinstance(first := answer[0], TextPart):
            answer = (TextPart(text=first.text.lstrip("\n")), *answer[1:])
        return answer

    def _add_content(
        self, state: _RenderState, content: Sequence[ContentPart], *, is_supervised: bool
    ) -> None:
        """Append the content parts of a turn; adjacent boxes are formatted together."""
        segments: list[str | list[BoxPart]] = []
        for part in content:
            if isinstance(part, TextPart):
                segments.append(part.text)
            elif isinstance(part, BoxPart):
                _check_box(part, state.images, state.sample_id)
                last = segments[-1] if segments else None
                if isinstance(last, list):
                    last.append(part)
                else:
                    segments.append([part])
            else:
                self._add_segments(state, segments, is_supervised=is_supervised)
                segments = []
                for span, segment in next(state.pending_visuals):
                    self._add_visual(state, span, segment)
        self._add_segments(state, segments, is_supervised=is_supervised)

    def _add_segments(
        self, state: _RenderState, segments: Sequence[str | list[BoxPart]], *, is_supervised: bool
    ) -> None:
        pieces = self.family.write_segments(segments, state.image_sizes)
        state.token_builder.add_pieces(pieces, is_supervised=is_supervised)

    def _add_visual(self, state: _RenderState, span: VisualSpan, segment: VideoSegment) -> None:
        token_builder = state.token_builder
        token_builder.add_text(segment.timestamp_text, is_supervised=False)
        markers = self.family.visual_markers(span.kind, len(state.spans) + 1)
        token_builder.add_pieces(markers.prefix, is_supervised=False)
        start = token_builder.length
        count = self.patch_config.count_tokens(span.grid_thw)
        token_builder.add_special_token(markers.placeholder, is_supervised=False, count=count)
        token_builder.add_pieces(markers.suffix, is_supervised=False)
        variant = next(state.variants, None) if span.kind == "image" else None
        state.spans.append(replace(span, start=start, stop=start + count, variant=variant))
        state.temporal_ids.append(
            self.family.temporal_position_ids(span.grid_thw[0], segment.seconds_per_grid)
        )

    def _build_visuals(
        self, part: ImagePart | VideoPart, located_sample: LocatedSample
    ) -> list[_Visual]:
        if isinstance(part, ImagePart):
            path = located_sample.resolve_path(part.image)
            return [self._build_visual("image", (path,), read_image_size(path), _IMAGE_SEGMENT)]
        files = tuple(map(located_sample.resolve_path, list_media_paths(part)))
        frame_indices: Sequence[int] = ()
        fps = part.fps
        temporal_size = self.patch_config.temporal_patch_size
        if part.video is None:
            original_size = get_frame_size(files)
            times = [index / fps for index in range(len(files))]
        else:
            header = read_video_header(files[0])
            original_size = header.size
            frame_indices = self.family.sample_frames(
                header.num_frames, header.fps, fps, temporal_size
            )
            times = [index / header.fps for index in frame_indices]
            fps = len(times) / header.num_frames * header.fps
        try:
            segments = self.family.split_video(times, fps, temporal_size)
        except UserError as error:
            error.where = f"sample {located_sample.sample.id}"
            raise
        return [
            self._build_visual("video", files, original_size, segment, tuple(frame_indices))
            for segment in segments
        ]

    def _build_visual(
        self,
        kind: Literal["image", "video"],
        files: tuple[Path, ...],
        original_size: ImageSize,
        segment: VideoSegment,
        frame_indices: tuple[int, ...] = (),
    ) -> _Visual:
        resized_size = compute_video_size(
            original_size,
            len(frame_indices),
            self.image_rule,
            self._video_limits if frame_indices else None,
            self.patch_config,
            where=str(files[0]),
        )
        frame_indices = frame_indices[segment.frame_slice]
        files = files if frame_indices else files[segment.frame_slice]
        grid_thw = self.patch_config.compute_grid(resized_size, len(frame_indices or files))
        sizes = original_size, resized_size
        return VisualSpan(kind, 0, 0, grid_thw, files, *sizes, frame_indices), segment

    def span_patches(self, span: VisualSpan) -> NDArray[np.uint8]:
        """Decode one image or video of a tokenized sample into patches."""
        return self._load_run([span])[0]

    def _load_run(self, run: Sequence[VisualSpan]) -> list[NDArray[np.uint8]]:
        """Decode an image, a list of frames, or consecutive spans of a video file."""
        first = run[0]
        size = first.resized_size
        if not first.frame_indices:
            images = [load_image(file) for file in first.files]
            if first.variant is not None:
                images = [first.variant.apply(image, size) for image in images]
            return [patchify(images, size, self.patch_config)]
        frame_indices = [*chain.from_iterable(span.frame_indices for span in run)]
        # Frames are resized while they are decoded, which limits memory.
        frames = (
            resize_frame(frame, size) for frame in iter_video_frames(first.files[0], frame_indices)
        )
        patches = []
        for span in run:
            # The frames have no name here, so that they are freed before the next ones.
            patches.append(
                patchify(
                    list(islice(frames, span.num_frames)), span.resized_size, self.patch_config
                )
            )
        return patches

    def _check_token_id(self, folder: ModelFolder, key: str, token: str) -> None:
        found = self.tokenizer.token_to_id(token)
        expected: Any = folder.config
        for name in key.split("."):
            expected = expected.get(name) if isinstance(expected, dict) else None
        if expected not in (None, found):
            raise UserError(
                f"{token} is {found} in {folder.tokenizer_file.name}, but {key} is {expected} in"
                " config.json",
                where=str(folder.path),
                expected="the same id in both files",
                remedy="use both files of the same model",
            )


def _has_reasoning(messages: Sequence[Message]) -> bool:
    """Return whether the last assistant turn of a conversation contains reasoning."""
    answers = [message.content for message in messages if message.role == "assistant"]
    return any(strip_content(split_reasoning(one).reasoning or ()) for one in answers[-1:])


def _fit_box(part: ContentPart, images: Sequence[VisualSpan]) -> ContentPart:
    """Scale a box of an answer to another sample so that it fits in the first image."""
    if not isinstance(part, BoxPart) or not images:
        return part
    height, width = images[0].original_size
    _, _, x2, y2 = part.xyxy
    scale = min(1.0, width / max(x2, 1), height / max(y2, 1))
    return part.model_copy(update={"image": 0, "xyxy": tuple(scale * one for one in part.xyxy)})


def _check_box(box: BoxPart, images: Sequence[VisualSpan], sample_id: str) -> None:
    """Raise UserError for a box outside of its image, or of an image that the sample lacks."""
    if box.image >= len(images):
        raise UserError(
            f"a box refers to image {box.image} (0-based)",
            where=f"sample {sample_id}",
            expected=describe_indices(len(images), "image"),
            remedy="correct `image` of the box, or add the image",
        )
    image = images[box.image]
    height, width = image.original_size
    if not is_inside_image(box.xyxy, image.original_size, is_point=box.is_point):
        raise UserError(
            f"the {box.type} {list(box.xyxy)} in an image of {width} x {height} pixels",
            where=f"sample {sample_id} ({image.files[0]})",
            expected=f"[x1, y1, x2, y2] with x1 < x2 up to {width} and y1 < y2 up to {height}",
            remedy="use pixels of the original image after EXIF rotation;"
            " an import with --box-format and --box-units converts boxes",
        )
