"""Prediction pipeline: encode prompts, generate in batches, parse and draw boxes."""

from __future__ import annotations

import gc
import hashlib
import io
import operator
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from PIL import Image, ImageDraw, ImageFont

from finesight.encode.renderer import Renderer
from finesight.encode.tokenization import EncodedSample, TokenizedSample
from finesight.errors import format_count
from finesight.files.storage import find_free_path, make_folder, write_new_file
from finesight.infer.block_manager import append_tokens
from finesight.infer.engine import (
    GPU_BLOCK_SIZE,
    Engine,
    InferenceEngine,
    build_engine,
    compute_required_tokens,
)
from finesight.infer.request import GeneratedToken, GenerationRequest, SamplingParams
from finesight.model.backend_model import BackendModel
from finesight.model.vlm import VisionLanguageModel
from finesight.samples.boxes import sort_corners
from finesight.samples.frames import ImageSize
from finesight.samples.image_file import DEFAULT_SIZE, CorruptImageError, get_file
from finesight.samples.marked_prompt import write_marked_prompt
from finesight.samples.prompt_format import DEFAULT_PROMPT_FORMAT, PromptFormat
from finesight.samples.question_forms import find_question
from finesight.samples.sample import (
    BoxPart,
    ContentPart,
    ImagePart,
    LocatedSample,
    Sample,
    is_video_path,
    join_text,
    list_coordinates,
)
from finesight.samples.video_file import read_visual_size
from finesight.vision.image_processing import load_image

T = TypeVar("T")

NUM_READER_THREADS = 4
"""Threads that load and resize images while the model generates."""

BOX_COLORS = (
    "#e6194b",
    "#3cb44b",
    "#4363d8",
    "#f58231",
    "#911eb4",
    "#008080",
    "#9a6324",
    "#808000",
)


@dataclass(frozen=True, slots=True)
class EpisodeTurn:
    """An answer (`assistant`), or the results of its tool calls (`tool`).

    Attributes:
        content: Parts as in a sample, but the images are data URLs of thumbnails.
    """

    role: Literal["assistant", "tool"]
    content: tuple[dict[str, str], ...]


@dataclass(frozen=True, slots=True)
class EpisodeRecord:
    """Turns of a response that called the tools of an environment.

    Attributes:
        reward: Reward of the environment; None without one.
        error: Problem of the environment that ended the episode; empty for none.
    """

    turns: tuple[EpisodeTurn, ...]
    reward: float | None = None
    error: str = ""


@dataclass(frozen=True, slots=True)
class Prediction:
    """Generated answer for one sample, with parsed boxes.

    Attributes:
        images: Image files of the sample without videos; `BoxPart.image` is an index into them.
        raw_text: Text with special tokens, including the end token.
        finish_reason: "stop" after an end token or a stop string, "length" at the token limit.
        reasoning: Reasoning of a thinking model; None for other models.
        tokens: Generated tokens with log probabilities, if `predict` was called with `logprobs`.
        question: First question with images, with `<image>` for each, or else the first question.
        image_size: Height and width in pixels of the image that boxes refer to.
        episode: All turns of a response with tools, of which `answer` is the last one.
    """

    id: str
    images: tuple[Path, ...]
    prompt: str
    answer: str
    raw_text: str
    boxes: tuple[BoxPart, ...]
    num_tokens: int
    finish_reason: Literal["stop", "length"]
    reasoning: str | None = None
    tokens: tuple[GeneratedToken, ...] = ()
    image_size: ImageSize = DEFAULT_SIZE
    question: str = ""
    episode: EpisodeRecord | None = None

    @property
    def text(self) -> str:
        """Alias of `answer`."""
        return self.answer

    def as_json(self) -> dict[str, Any]:
        """Return the prediction as a JSON record.

        `image` is a path, a list of several paths, or None.
        """
        paths = [str(path) for path in self.images]
        image: str | list[str] | None = paths
        if not paths:
            image = None
        elif len(paths) == 1:
            image = paths[0]
        record: dict[str, Any] = {"id": self.id, "image": image, "prompt": self.prompt}
        if self.reasoning is not None:
            record["reasoning"] = self.reasoning
        record["answer"] = self.answer
        record["raw_text"] = self.raw_text
        record["boxes"] = [box_to_dict(box) for box in self.boxes]
        if self.episode is not None:
            record["episode"] = asdict(self.episode)
        return record

    def as_text(self) -> str:
        """Format the prediction for the console, with one line per box."""
        paths = [*self.images]
        if len(paths) > 1:
            paths = [*dict.fromkeys(map(get_file, self.images))]
        text = self.answer
        if paths:
            text = f"{', '.join(map(str, paths))}: {text}"
        elif is_video_path(self.id):
            text = f"{self.id}: {text}"
        if self.finish_reason == "length":
            text += f" [truncated after {self.num_tokens} tokens]"
        for box in self.boxes:
            coordinates = ", ".join(f"{number:.1f}" for number in list_coordinates(box))
            text += f"\n  {box.type} {coordinates}"
            if box.label:
                text += f"  {box.label}"
        if self.reasoning:
            text += f"\n  reasoning  {self.reasoning}"
        return text


def box_to_dict(box: BoxPart) -> dict[str, Any]:
    """Convert a box or a point, with equal corners, to JSON data, rounded to 0.01 pixels."""
    corners = [round(number, 2) for number in box.xyxy]
    return {"image": box.image, "label": box.label, "xyxy": corners}


def build_question(
    image_paths: Sequence[Path],
    prompt: str,
    sample_id: str,
    prompt_format: PromptFormat = DEFAULT_PROMPT_FORMAT,
) -> LocatedSample:
    """Build a sample of one question about images or video files.

    Args:
        prompt_format: Form of the questions in the training of the model; by default images, then
            text.

    Raises:
        CorruptImageError: An image is missing or unreadable.
        UserError: The prompt has another number of `<image>` than there are images.
    """
    for path in image_paths:
        read_visual_size(path)
    return prompt_format.build_sample(prompt, image_paths, sample_id)


def predict(
    model: BackendModel,
    renderer: Renderer,
    samples: Sequence[LocatedSample],
    *,
    max_new_tokens: int,
    batch_size: int,
    on_progress: Callable[[int], None] | None = None,
    on_corrupt_image: Callable[[int, CorruptImageError], None] | None = None,
    on_batch_reduced: Callable[[int], None] | None = None,
    logprobs: bool = False,
    get_sampling: Callable[[int], SamplingParams] = lambda index: SamplingParams(),
    follow_up: FollowUp | None = None,
) -> list[Prediction]:
    """Generate a prediction for each sample, in the order of the samples.

    The prompt of a sample contains all turns except a final assistant turn. The model's training
    mode is restored.

    Args:
        on_progress: Called after each step with the number of finished completions; an exception
            stops generation.
        on_corrupt_image: Called with index and error of a sample with an unreadable image, which is
            skipped. Without it the error is raised.
        on_batch_reduced: Called with the new batch size after the GPU runs out of memory.
        logprobs: Whether predictions contain their tokens with log probabilities. Only for models
            with native code.
        get_sampling: Returns the sampling parameters of a sample. Default: greedy decoding.
        follow_up: See `iter_completions`. A prediction is that of the last completion.

    Raises:
        CorruptImageError: An image cannot be read and `on_corrupt_image` is None.
    """
    was_training = model.training
    model.eval()
    predictions: dict[int, Prediction] = {}

    def iter_requests(
        prompts: Iterable[tuple[int, EncodedSample]],
    ) -> Iterator[tuple[int, GenerationRequest]]:
        for i, prompt in prompts:
            request = GenerationRequest(
                prompt=prompt,
                max_new_tokens=max_new_tokens,
                logprobs=0 if logprobs else None,
                sampling_params=get_sampling(i),
            )
            yield i, request

    try:
        with _PromptReader(renderer, samples, on_corrupt_image) as prompt_reader:
            while prompt_reader.remaining:
                try:
                    lengths = [prompt.num_tokens for prompt in prompt_reader.remaining.values()]
                    source = model, renderer.end_ids, lengths, max_new_tokens, batch_size
                    requests = iter_requests(prompt_reader.iter_prompts(batch_size))
                    for i, _, tokens in iter_completions(
                        build_engine(*source, on_progress),
                        requests,
                        batch_size,
                        on_progress,
                        follow_up,
                    ):
                        prompt = prompt_reader.remaining.pop(i)
                        output_ids = list_ids(tokens)
                        prediction = build_prediction(renderer, samples[i], prompt, output_ids)
                        if logprobs:
                            prediction = replace(prediction, tokens=tuple(tokens))
                        predictions[i] = prediction
                    break
                except torch.OutOfMemoryError:
                    batch_size = min(batch_size, len(prompt_reader.remaining)) // 2
                    if not (batch_size and model.capabilities.batches):
                        raise
                # After the except block, no exception references frames that hold GPU memory.
                gc.collect()
                if on_batch_reduced is not None:
                    on_batch_reduced(batch_size)
    finally:
        model.train(was_training)
    return [predictions[index] for index in sorted(predictions)]


FollowUp = Callable[
    [int, GenerationRequest, list[GeneratedToken]], Future[GenerationRequest | None]
]
"""Function of the index, request and tokens of a completion that prepares the next request.

The result is None after the last one. The next request continues the sequence, whose keys and
values are in the prefix cache of the engine.
"""

FOLLOW_UP_STEPS = 8
"""Number of engine steps after which a further request joins the batch."""

POLL_SECONDS = 1.0
"""Interval at which a stop is noticed while tools run."""


@dataclass(frozen=True, slots=True)
class _Turn:
    """Ended completion, whose next request is prepared in another thread."""

    last_step: int
    index: int
    tokenized: TokenizedSample
    tokens: list[GeneratedToken]
    further: Future[GenerationRequest | None]


def iter_completions(
    engine: InferenceEngine,
    requests: Iterable[tuple[int, GenerationRequest]],
    batch_size: int,
    on_progress: Callable[[int], None] | None = None,
    follow_up: FollowUp | None = None,
) -> Iterator[tuple[int, TokenizedSample, list[GeneratedToken]]]:
    """Generate completions with continuous batching, and yield each at its end.

    A completion ends with an end token (included), after `max_new_tokens` tokens, or at the last
    position of the model. Except for rounding, completions do not depend on the batch.

    Args:
        requests: Index and request of each sample; read when a sequence can start.
        on_progress: Called after each step with the number of completions that ended in it; an
            exception stops generation.
        follow_up: Prepares further requests of a sample. Only its last completion is yielded.
    """
    # Rounding depends on the batch. A further request joins it after a fixed number of steps and
    # in the order of the completions, so that tokens do not depend on the time of its preparation.
    turns: deque[_Turn] = deque()
    num_steps = 0
    waiting = iter(requests)
    active: dict[int, tuple[int, GenerationRequest, list[GeneratedToken]]] = {}
    has_more = True
    while has_more or engine.has_work or turns:
        while has_more and engine.num_waiting + engine.num_running + len(turns) < batch_size:
            next_request = next(waiting, None)
            has_more = next_request is not None
            if next_request is not None:
                index, request = next_request
                limit = engine.get_max_new_tokens(request.prompt)
                request = replace(request, max_new_tokens=min(request.max_new_tokens, limit))
                active[engine.add_request(request)] = (index, request, [])
        num_finished = 0
        for event in engine.step():
            if event.error is not None:
                raise event.error
            if event.token is not None:
                active[event.request_id][2].append(event.token)
            if event.finish_reason is not None:
                index, request, tokens = active.pop(event.request_id)
                tokenized = request.prompt.tokenized
                if follow_up is not None:
                    further = follow_up(index, request, tokens)
                    last_step = num_steps + FOLLOW_UP_STEPS
                    turns.append(_Turn(last_step, index, tokenized, tokens, further))
                    continue
                num_finished += 1
                yield index, tokenized, tokens
        num_steps += 1
        is_idle = not engine.has_work
        while turns and (is_idle or turns[0].last_step <= num_steps):
            turn = turns.popleft()
            next_turn = _await_result(turn.further, on_progress)
            if next_turn is not None:
                active[engine.add_request(next_turn)] = (turn.index, next_turn, [])
                continue
            num_finished += 1
            yield turn.index, turn.tokenized, turn.tokens
        if on_progress is not None:
            on_progress(num_finished)


def _await_result(future: Future[T], on_progress: Callable[[int], None] | None) -> T:
    """Return the result of a future. An exception of `on_progress` ends the wait."""
    while on_progress is not None and wait([future], POLL_SECONDS).not_done:
        on_progress(0)
    return future.result()


def generate(
    model: VisionLanguageModel,
    prompts: Sequence[EncodedSample],
    *,
    max_new_tokens: int,
    end_ids: Sequence[int],
    on_progress: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """Generate a greedy completion of each prompt, all in one batch. See `iter_completions`."""
    assert max_new_tokens >= 1, f"max_new_tokens is {max_new_tokens}, less than 1"
    lengths = []
    requests = []
    for prompt in prompts:
        lengths.append(prompt.tokenized.num_tokens)
        requests.append(GenerationRequest(prompt=prompt, max_new_tokens=max_new_tokens))
    batch_size = len(prompts)
    engine = build_engine(model, end_ids, lengths, max_new_tokens, batch_size, on_progress)
    output_ids: dict[int, list[int]] = {}
    for index, _, tokens in iter_completions(engine, enumerate(requests), batch_size, on_progress):
        output_ids[index] = [token.id for token in tokens]
    return [output_ids[index] for index in range(batch_size)]


def describe_reduced_batch(batch_size: int) -> str:
    """Return the message for a batch that was reduced after the GPU ran out of memory."""
    answers = format_count(batch_size, "answer")
    return f"the GPU memory is full: continuing with a batch of {answers}"


MAX_CACHE_SHARE = 1 / 6
"""Maximum share of GPU memory for the KV cache of sampled responses."""


@dataclass
class ResponseSampler:
    """Sampler of several responses to each prompt; it keeps its engine while the weights change.

    `batch_size` limits the concurrent sequences. `is_sharded` weights are gathered for one call.
    """

    model: VisionLanguageModel
    end_ids: Sequence[int]
    batch_size: int
    is_sharded: bool
    engine: Engine | None = None
    capacity: tuple[int, int, int, int] = 0, 0, 0, 0

    def sample(
        self,
        requests: Sequence[GenerationRequest],
        on_progress: Callable[[int], None],
        on_full_memory: Callable[[], object],
        follow_up: FollowUp | None = None,
    ) -> list[list[GeneratedToken]]:
        """Return the tokens of each request. Out-of-memory errors halve the batch size.

        Args:
            on_full_memory: Called after such an error, before the unfinished requests start again.
            follow_up: See `iter_completions`. The tokens are those of the last completions.
        """
        responses: dict[int, list[GeneratedToken]] = {}
        engine: Engine | None
        while waiting := {n: one for n, one in enumerate(requests) if n not in responses}:
            try:
                engine = self._prepare_engine([*waiting.values()])
                for n, _, tokens in iter_completions(
                    engine, waiting.items(), self.batch_size, on_progress, follow_up
                ):
                    responses[n] = tokens
            except torch.OutOfMemoryError:
                engine = None
                self.engine = None
                self.capacity = (0, 0, 0, 0)
                self.batch_size = min(self.batch_size, len(waiting)) // 2
                if not self.batch_size:
                    raise
            # Outside of the block, no exception refers to frames that hold GPU memory.
            if self.engine is None:
                on_full_memory()
                gc.collect()
        return [responses[n] for n in range(len(requests))]

    def _prepare_engine(self, requests: Sequence[GenerationRequest]) -> Engine:
        """Return the engine of the previous call with its CUDA graphs, or a larger one."""
        num_seqs = min(self.batch_size, len(requests))
        num_prompts = min(num_seqs, len({id(request.prompt) for request in requests}))
        max_length = max(request.prompt.tokenized.num_tokens for request in requests)
        max_tokens = max(request.max_new_tokens for request in requests)
        required = num_seqs, num_prompts, max_length, max_tokens
        if self.engine is None or any(map(operator.gt, required, self.capacity)):
            self.engine = None  # free its memory first
            num_seqs, num_prompts, max_length, max_tokens = map(max, required, self.capacity)
            self.capacity = num_seqs, num_prompts, max_length, max_tokens
            # Responses to one prompt share its blocks, except for the last one.
            lengths = [max_length] * num_prompts + [GPU_BLOCK_SIZE] * (num_seqs - num_prompts)
            self.engine = Engine(
                self.model,
                self.end_ids,
                max_num_seqs=num_seqs,
                num_cache_tokens=compute_required_tokens(
                    self.model, lengths, max_tokens, MAX_CACHE_SHARE
                ),
                matches_training=not self.is_sharded and self.model.match_decoding(),
                num_snapshots=num_prompts,
            )
        else:
            self.engine.clear_caches()
        if not self.is_sharded:
            # CUDA graphs refer to the fused weights, which training has not updated.
            self.model.sync_fused_weights()
        return self.engine


def list_ids(tokens: Sequence[GeneratedToken]) -> list[int]:
    """List the ids of generated tokens."""
    return [token.id for token in tokens]


def append_response(prompt: EncodedSample, tokens: Sequence[GeneratedToken]) -> EncodedSample:
    """Return a prompt with its response, of which all tokens are supervised."""
    tokenized = append_tokens(prompt.tokenized, list_ids(tokens), is_supervised=True)
    return replace(prompt, tokenized=tokenized)


def derive_seed(name: str) -> int:
    """Return the seed of 56 bits that belongs to a name."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:7], "little")


class _PromptReader:
    """Loads prompt images in background threads, longest prompts first; skips corrupt images."""

    def __init__(
        self,
        renderer: Renderer,
        samples: Sequence[LocatedSample],
        on_corrupt_image: Callable[[int, CorruptImageError], None] | None,
    ) -> None:
        self._renderer = renderer
        self._on_corrupt_image = on_corrupt_image
        self.remaining: dict[int, TokenizedSample] = {}
        """Tokenized prompts that are not finished, by sample index."""
        tokenized_by_index = self._collect_results(
            (i, partial(renderer.tokenize_prompt, sample)) for i, sample in enumerate(samples)
        )
        # Longest prompt first, so that an out-of-memory error occurs at the start.
        for i in sorted(tokenized_by_index, key=lambda i: (-tokenized_by_index[i].num_tokens, i)):
            self.remaining[i] = tokenized_by_index[i]
        self._pool = ThreadPoolExecutor(NUM_READER_THREADS)

    def __enter__(self) -> _PromptReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def iter_prompts(self, num_prefetched: int) -> Iterator[tuple[int, EncodedSample]]:
        """Yield sample indices and encoded prompts; prefetch `num_prefetched` more prompts."""
        remaining = iter([*self.remaining.items()])
        pending: deque[tuple[int, Future[EncodedSample]]] = deque()
        while True:
            for i, tokenized in islice(remaining, num_prefetched + 1 - len(pending)):
                pending.append((i, self._pool.submit(self._renderer.load_patches, tokenized)))
            if not pending:
                return
            i, future = pending.popleft()
            yield from self._collect_results([(i, future.result)]).items()

    def _collect_results(self, calls: Iterable[tuple[int, Callable[[], T]]]) -> dict[int, T]:
        """Return the results of calls by sample index; skip calls with a CorruptImageError."""
        results: dict[int, T] = {}
        for i, call in calls:
            try:
                results[i] = call()
            except CorruptImageError as error:
                if self._on_corrupt_image is None:
                    raise
                self._on_corrupt_image(i, error)
                self.remaining.pop(i, None)
        return results


def build_prediction(
    renderer: Renderer,
    located_sample: LocatedSample,
    prompt: TokenizedSample,
    output_ids: Sequence[int],
    image_index: int | None = None,
) -> Prediction:
    """Decode a completion, parse its boxes and build the prediction of a sample.

    Args:
        image_index: Index of the image that predicted boxes refer to. If None, that of the boxes in
            the reference answer, or else the first image.
    """
    completion = renderer.decode_completion(output_ids, is_thinking=prompt.is_thinking)
    sample = located_sample.sample
    last_question: Sequence[ContentPart] = ()
    for message in sample.messages:
        if message.role == "user":
            last_question = message.content
    if image_index is None:
        image_index = _get_target_image(sample)
    sizes = [span.original_size for span in prompt.spans if span.kind == "image"]
    image_size = DEFAULT_SIZE
    if sizes:
        image_size = sizes[image_index]
    has_ended = bool(output_ids) and output_ids[-1] in renderer.end_ids
    images = []
    for part in sample.iter_parts():
        if isinstance(part, ImagePart):
            images.append(located_sample.resolve_path(part.image))
    return Prediction(
        id=sample.id,
        images=tuple(images),
        prompt=join_text(last_question),
        answer=completion.text,
        raw_text=completion.raw_text,
        boxes=tuple(renderer.parse_boxes(completion.raw_text, prompt.spans, image_index)),
        num_tokens=len(output_ids),
        finish_reason="stop" if has_ended else "length",
        reasoning=completion.reasoning,
        image_size=image_size,
        question=write_marked_prompt(find_question(sample) or ()),
    )


def _get_target_image(sample: Sample) -> int:
    """Return the index of the image that predicted boxes refer to.

    Box formats do not name an image. If all boxes of the reference answer refer to the same image,
    that image is used, else the first.
    """
    answer = sample.messages[-1]
    if answer.role != "assistant":
        return 0
    image_indices = {part.image for part in answer.content if isinstance(part, BoxPart)}
    if len(image_indices) != 1:
        return 0
    return image_indices.pop()


def save_annotated_images(
    predictions: Sequence[Prediction],
    out_dir: Path,
    on_corrupt_image: Callable[[CorruptImageError], None] | None = None,
) -> list[Path]:
    """Write one PNG with drawn boxes per image of each prediction, and return the paths.

    Existing files are not overwritten: a new file gets a numeric suffix.

    Args:
        on_corrupt_image: Called with the error of an image that is no longer readable, which is
            skipped. Without it, the error is raised.

    Raises:
        CorruptImageError: An image cannot be read and `on_corrupt_image` is None.
    """
    make_folder(out_dir)
    paths = []
    for prediction in predictions:
        for image_index, path in enumerate(prediction.images):
            target = find_free_path(out_dir / f"{path.stem}.png")
            buffer = io.BytesIO()
            try:
                annotated = annotate_image(prediction, image_index)
            except CorruptImageError as error:
                if on_corrupt_image is None:
                    raise
                on_corrupt_image(error)
                continue
            annotated.save(buffer, format="PNG")
            write_new_file(target, buffer.getvalue())
            paths.append(target)
    return paths


def annotate_image(prediction: Prediction, image_index: int) -> Image.Image:
    """Return an RGB copy of one image of a prediction with its boxes drawn."""
    boxes = [box for box in prediction.boxes if box.image == image_index]
    return draw_boxes(load_image(prediction.images[image_index]), boxes)


def draw_boxes(image: Image.Image, boxes: Sequence[BoxPart]) -> Image.Image:
    """Draw boxes and their labels on a copy of an RGB image."""
    annotated = image.copy()
    draw = ImageDraw.Draw(annotated)
    short_side = min(annotated.size)
    line_width = max(1, round(short_side / 150))
    font = ImageFont.load_default(size=max(10, short_side / 30))
    for box_index, box in enumerate(boxes):
        color = BOX_COLORS[box_index % len(BOX_COLORS)]
        # Inverted corners are sorted for drawing only; metrics still reject such a box.
        corners = sort_corners(box.xyxy)
        if box.is_point:
            draw.circle(corners[:2], 2 * line_width, fill=color, outline="white")
        draw.rectangle(corners, outline=color, width=line_width)
        if box.label:
            # At the upper image border, there is no space for the label above the box.
            _, _, width, height = draw.textbbox((0, 0), box.label, font=font)
            left, top, _, _ = corners
            if top >= height:
                top -= height
            draw.rectangle((left, top, left + width, top + height), fill=color)
            draw.text((left, top), box.label, fill="white", font=font)
    return annotated
