"""Episodes: responses of several turns, in which the model calls the tools of an environment.

An episode is one sequence, whose tokens are only appended: those of an answer as they were sampled,
those of tool results by the renderer. Each turn is a request to the inference engine that continues
the sequence, with the keys and values of its earlier tokens from the prefix cache.
"""

from __future__ import annotations

import base64
import contextlib
import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from finesight.encode.renderer import NativeRenderer, Renderer
from finesight.encode.tokenization import EncodedSample, TokenizedSample
from finesight.environment_components import EpisodeSettings
from finesight.errors import UserError
from finesight.evaluate.environment import (
    Environment,
    EnvironmentSession,
    EpisodeError,
    ToolResult,
    describe_mistake,
)
from finesight.evaluate.eval_case import ReferenceAnswer, get_reference_answer
from finesight.infer.block_manager import hash_image, hash_images
from finesight.infer.prediction import (
    EpisodeRecord,
    EpisodeTurn,
    Prediction,
    append_response,
    box_to_dict,
    derive_seed,
    list_ids,
    predict,
)
from finesight.infer.request import GeneratedToken, GenerationRequest
from finesight.model.backend_model import BackendModel
from finesight.samples.image_file import CorruptImageError
from finesight.samples.sample import (
    ImagePart,
    LocatedSample,
    find_tool_calls,
    join_text,
    parse_tool_call,
)

MAX_CALLS = 8
"""Maximum number of tool calls in a turn."""

NUM_TOOL_THREADS = 32
"""Threads that call tools while the model generates, one for an episode at a time."""

THUMBNAIL_SIDE = 256
"""Maximum side in pixels of the images of tool results in records of episodes."""

MAX_RECORDED_IMAGES = 16
"""Maximum number of images in the record of an episode."""

MAX_RECORDED_CHARS = 3900
"""Number of characters of a text of a tool in records. With the note of the rest, pages show it."""


@dataclass
class Episode:
    """A response of several turns.

    Attributes:
        sequence: Prompt, answers and tool results so far; only tokens of answers are supervised.
        tokens: Sampled tokens of all answers.
        answer_ids: Tokens of the last answer.
        is_truncated: Whether the limit of tokens ended the episode. That of turns does not count.
        turns: Answers and tool results for pages.
        error: Problem of the environment that ended the episode; empty for none.
        reward: Reward of the environment; None without one.
        num_turns: Number of answers.
        num_mistakes: Number of calls of unknown tools or with wrong arguments.
    """

    sequence: EncodedSample
    tokens: list[GeneratedToken] = field(default_factory=list)
    answer_ids: list[int] = field(default_factory=list)
    turns: list[EpisodeTurn] = field(default_factory=list)
    is_truncated: bool = False
    error: str = ""
    reward: float | None = None
    num_turns: int = 0
    num_calls: int = 0
    num_mistakes: int = 0

    @classmethod
    def from_answer(cls, prompt: EncodedSample, tokens: list[GeneratedToken]) -> Episode:
        """Return the episode of one answer, without an environment."""
        return cls(
            sequence=append_response(prompt, tokens),
            tokens=tokens,
            answer_ids=list_ids(tokens),
            num_turns=1,
        )


@dataclass(frozen=True)
class EpisodeStart:
    """Values that an environment receives at the start of an episode, and its image files."""

    row: Mapping[str, Any]
    images: Sequence[Path]


class EpisodeRunner(contextlib.AbstractContextManager["EpisodeRunner"]):
    """Runs the tool calls of concurrent episodes in threads. Close it to end their processes.

    Args:
        build_start: Returns the start of an episode from its index and prompt. It may be called in
            another thread.
        max_iterations: Maximum number of turns with tool calls.

    Attributes:
        episodes: Episodes by index.
    """

    def __init__(
        self,
        environment: Environment,
        renderer: NativeRenderer,
        build_start: Callable[[int, EncodedSample], EpisodeStart],
        max_iterations: int,
    ) -> None:
        self._environment = environment
        self._renderer = renderer
        self._build_start = build_start
        self._max_iterations = max_iterations
        self._pool = ThreadPoolExecutor(NUM_TOOL_THREADS, "finesight-tools")
        self._sessions: dict[int, EnvironmentSession] = {}
        self._turns: dict[int, Future[GenerationRequest | None]] = {}
        self.episodes: dict[int, Episode] = {}

    def __exit__(self, *problem: object) -> None:
        self._end_processes()
        self._pool.shutdown()

    @property
    def errors(self) -> Counter[str]:
        """Number of episodes that ended with each error."""
        return Counter(episode.error for episode in self.episodes.values() if episode.error)

    def restart_unfinished(self) -> None:
        """End the episodes that run. They are sampled again from their prompts."""
        self._end_processes()

    def _end_processes(self) -> None:
        for turn in self._turns.values():
            turn.cancel()
        # A thread may start a process meanwhile.
        while wait(self._turns.values(), timeout=0.1).not_done:
            self._environment.end_episodes()
        for session in self._sessions.values():
            session.close()
        self._turns.clear()
        self._sessions.clear()

    def continue_episode(
        self, index: int, request: GenerationRequest, tokens: list[GeneratedToken]
    ) -> Future[GenerationRequest | None]:
        """Add an answer to an episode, and call its tools in a thread.

        Returns:
            The request of the next turn. None at the end of the episode: after an answer without
            calls, at a limit, or after an error of the environment.
        """
        episode = self.episodes.get(index)
        # An episode that was ended by `restart_unfinished` starts with its first answer again.
        if episode is None or request.prompt is not episode.sequence:
            episode = Episode(request.prompt)
            self.episodes[index] = episode
        episode.sequence = append_response(request.prompt, tokens)
        episode.tokens += tokens
        episode.answer_ids = list_ids(tokens)
        episode.num_turns += 1
        turn = self._pool.submit(self.take_turn, index, episode, request)
        self._turns[index] = turn
        return turn

    def take_turn(
        self, index: int, episode: Episode, request: GenerationRequest
    ) -> GenerationRequest | None:
        """Call the tools of the last answer, and end the process of an episode that ends."""
        further = None
        try:
            further = self._call_tools(index, episode, request)
        except EpisodeError as error:
            episode.error = f"{error.where}: {error.what}"
        if further is None:
            session = self._sessions.pop(index, None)
            if session is not None:
                session.close()
        return further

    def _call_tools(
        self, index: int, episode: Episode, request: GenerationRequest
    ) -> GenerationRequest | None:
        """Call the tools of the last answer; without calls, read the reward of the episode.

        Raises:
            EpisodeError: The environment fails.
        """
        is_thinking = episode.sequence.tokenized.is_thinking
        answer = self._renderer.decode_completion(episode.answer_ids, is_thinking=is_thinking)
        episode.turns.append(EpisodeTurn("assistant", (_as_text_part(answer.raw_text),)))
        calls = self.find_calls(episode, answer.text)
        if calls and episode.num_turns <= self._max_iterations:
            session = self._get_session(index, request.prompt)
            results = [self._call_tool(session, call) for call in calls[:MAX_CALLS]]
            if len(calls) > MAX_CALLS:
                problem = f"a turn has at most {MAX_CALLS} calls; {len(calls)} were made, and the"
                results.append(describe_mistake(f"{problem} others were ignored"))
            episode.num_calls += len(calls)
            episode.num_mistakes += sum(result.is_mistake for result in results)
            further = self.append_results(episode, request, results)
            if further is not None:
                episode.turns.append(_record_results(results, episode.turns))
                return further
            episode.is_truncated = True
        if self._environment.has_reward:
            episode.reward = self._get_session(index, request.prompt).get_reward()
        return None

    def find_calls(self, episode: Episode, answer: str) -> list[str]:
        """Return the texts of the tool calls in the last answer; none if it is truncated."""
        if episode.answer_ids[-1] != self._renderer.end_ids[0]:
            return []
        return find_tool_calls(answer)

    def _get_session(self, index: int, prompt: EncodedSample) -> EnvironmentSession:
        """Return the environment of an episode, which starts with its first call."""
        session = self._sessions.get(index)
        if session is None:
            start = self._build_start(index, prompt)
            session = self._environment.start_episode(start.row, start.images)
            self._sessions[index] = session
        else:
            session.start_turn()
        return session

    def _call_tool(self, session: EnvironmentSession, text: str) -> ToolResult:
        call = parse_tool_call(text, self._environment.tools)
        if call is None:
            return describe_mistake("the tool call has no valid name and arguments")
        return session.call_tool(call.name, call.arguments)

    def append_results(
        self, episode: Episode, request: GenerationRequest, results: Sequence[ToolResult]
    ) -> GenerationRequest | None:
        """Append the results of tools, and return the request of the next answer.

        Returns None, and appends nothing, if no token is left for the answer.

        Raises:
            EpisodeError: An image has sides that the model does not support.
        """
        sequence = episode.sequence
        try:
            extended = self._renderer.append_tool_results(
                sequence, [result.blocks for result in results]
            )
        except UserError as error:
            raise EpisodeError(error.what, where="result of a tool") from error
        num_added = extended.tokenized.num_tokens - request.prompt.tokenized.num_tokens
        max_new_tokens = request.max_new_tokens - num_added
        if max_new_tokens < 1:
            return None
        episode.sequence = extended
        params = request.sampling_params
        if params.seed is not None:
            params = replace(params, seed=derive_seed(f"{params.seed}/{episode.num_turns}"))
        known_hashes = request.image_hashes or hash_images(request.prompt)
        new_spans = range(len(known_hashes), len(extended.tokenized.spans))
        return replace(
            request,
            prompt=extended,
            max_new_tokens=max_new_tokens,
            sampling_params=params,
            image_hashes=(*known_hashes, *(hash_image(extended, index) for index in new_spans)),
        )


def _as_text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _record_results(results: Sequence[ToolResult], turns: Sequence[EpisodeTurn]) -> EpisodeTurn:
    """Return the results of tools for pages, with small copies of their images.

    Texts and images beyond the limits of the record are replaced by notes.

    Args:
        turns: Turns of the episode so far.
    """
    num_images = sum("image" in part for turn in turns for part in turn.content)
    content = []
    for result in results:
        for block in result.blocks:
            if isinstance(block, str):
                content.append(_as_text_part(_shorten(block)))
                continue
            num_images += 1
            if num_images > MAX_RECORDED_IMAGES:
                content.append(_as_text_part("[an image that is not recorded]"))
                continue
            thumbnail = block.copy()
            thumbnail.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
            buffer = io.BytesIO()
            thumbnail.save(buffer, "JPEG")
            data = base64.b64encode(buffer.getvalue()).decode()
            content.append({"type": "image", "image": f"data:image/jpeg;base64,{data}"})
    return EpisodeTurn("tool", tuple(content))


def _shorten(text: str) -> str:
    num_others = len(text) - MAX_RECORDED_CHARS
    if num_others <= 0:
        return text
    return f"{text[:MAX_RECORDED_CHARS]} [and {num_others:,} more characters]"


def open_environment(settings: EpisodeSettings, run_dir: Path | None) -> Environment:
    """Load an environment; see `Environment`."""
    return Environment(settings.environment, run_dir, settings.tool_timeout, settings.turn_timeout)


def add_tools(located: LocatedSample, tools: Sequence[dict[str, Any]]) -> LocatedSample:
    """Return a sample with the definitions of tools after its own."""
    own = located.sample.tools
    further = [tool for tool in tools if tool not in own]
    return replace(located, sample=located.sample.model_copy(update={"tools": (*own, *further)}))


def add_episode(prediction: Prediction, episode: Episode) -> Prediction:
    """Return the prediction of the last answer of an episode with all its turns."""
    finish_reason = prediction.finish_reason
    if episode.is_truncated:
        finish_reason = "length"
    record = EpisodeRecord(tuple(episode.turns), episode.reward, episode.error)
    return replace(prediction, finish_reason=finish_reason, episode=record)


def derive_environment_seed(name: str) -> int:
    """Return the seed of an environment: 31 bits, as most random generators accept."""
    return derive_seed(name) % (1 << 31)


def predict_episodes(
    environment: Environment,
    settings: EpisodeSettings,
    model: BackendModel,
    renderer: Renderer,
    samples: Sequence[LocatedSample],
    *,
    batch_size: int,
    on_progress: Callable[[int], None] | None = None,
    on_corrupt_image: Callable[[int, CorruptImageError], None] | None = None,
    on_batch_reduced: Callable[[int], None] | None = None,
) -> list[Prediction]:
    """Generate an episode for each sample by greedy decoding, as `predict` does for one answer.

    An environment receives the id of a sample as its seed.

    Raises:
        UserError: The family of the model has no native code.
    """
    if not renderer.is_native:
        raise UserError(
            "environments need the native code of a family, which this model does not have",
            where=settings.environment,
            expected="a model of a supported family",
            remedy="evaluate without the environment",
        )
    with_tools = [add_tools(sample, environment.tools) for sample in samples]

    def start(index: int, prompt: EncodedSample) -> EpisodeStart:
        located = with_tools[index]
        has_reasoning = renderer.renders_reasoning
        references: ReferenceAnswer = ((), ())
        with contextlib.suppress(UserError):  # A question needs no reference answer.
            references = get_reference_answer(located.sample, has_reasoning=has_reasoning)
        seed = derive_environment_seed(located.sample.id)
        return build_start(located, prompt.tokenized, references, renderer.native, seed)

    max_iterations = settings.max_tool_calling_iterations
    with EpisodeRunner(environment, renderer.native, start, max_iterations) as runner:

        def skip_sample(index: int, error: CorruptImageError) -> None:
            if on_corrupt_image is None:
                raise error
            # Its episode may have started before the memory was full.
            runner.episodes.pop(index, None)
            on_corrupt_image(index, error)

        def on_full_memory(batch: int) -> None:
            runner.restart_unfinished()
            if on_batch_reduced is not None:
                on_batch_reduced(batch)

        predictions = predict(
            model,
            renderer,
            with_tools,
            max_new_tokens=settings.max_tokens,
            batch_size=batch_size,
            on_progress=on_progress,
            on_corrupt_image=skip_sample,
            on_batch_reduced=on_full_memory,
            follow_up=runner.continue_episode,
        )
    episodes = [runner.episodes[index] for index in sorted(runner.episodes)]
    pairs = zip(predictions, episodes, strict=True)
    return [add_episode(prediction, episode) for prediction, episode in pairs]


def build_start(
    located: LocatedSample,
    prompt: TokenizedSample,
    references: ReferenceAnswer,
    renderer: NativeRenderer,
    seed: int,
) -> EpisodeStart:
    """Return the values of a sample that an environment receives.

    The row has `id`, `prompt` (text of the last question), `references`, `boxes` of the reference
    answer, `frames` (height and width of the frame of the boxes of each image), `meta` and `seed`.
    """
    sample = located.sample
    texts, boxes = references
    question = ""
    images = []
    for message in sample.messages:
        if message.role == "user":
            question = join_text(message.content)
        images += [
            located.resolve_path(p.image) for p in message.content if isinstance(p, ImagePart)
        ]
    frames = []
    for span in prompt.spans:
        if span.kind == "image":
            frames.append(renderer.family.box_frame(span.resized_size))
    row = {
        "id": sample.id,
        "prompt": question,
        "references": list(texts),
        "boxes": [box_to_dict(box) for box in boxes],
        "frames": frames,
        "meta": sample.meta,
        "seed": seed,
    }
    return EpisodeStart(row, images)
