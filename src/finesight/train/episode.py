"""Episodes: responses of several turns, in which the model calls the tools of an environment.

An episode is one sequence, whose tokens are only appended: those of an answer as they were sampled,
those of tool results by the renderer. Each turn is a request to the inference engine that continues
the sequence, with the keys and values of its earlier tokens from the prefix cache.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from finesight.encode.renderer import NativeRenderer
from finesight.encode.tokenization import EncodedSample
from finesight.errors import UserError
from finesight.evaluate.environment import (
    Environment,
    EnvironmentSession,
    EpisodeError,
    ToolResult,
    describe_mistake,
)
from finesight.evaluate.eval_case import ReferenceAnswer
from finesight.infer.block_manager import hash_images
from finesight.infer.prediction import box_to_dict
from finesight.infer.request import GeneratedToken, GenerationRequest
from finesight.samples.sample import (
    TOOL_CALL_TEXT,
    ImagePart,
    LocatedSample,
    join_text,
    parse_tool_call,
)
from finesight.train.rollout import append_response, list_ids

MAX_CALLS = 8
"""Maximum number of tool calls in a turn."""


@dataclass
class Episode:
    """A response of several turns.

    Attributes:
        sequence: Prompt, answers and tool results so far; only tokens of answers are supervised.
        tokens: Sampled tokens of all answers.
        answer_ids: Tokens of the last answer.
        is_truncated: Whether the tokens ended before the model ended the episode.
        error: Problem of the environment that ended the episode; empty for none.
        reward: Reward of the environment; None without one.
        num_turns: Number of answers.
        num_mistakes: Number of calls of unknown tools or with wrong arguments.
    """

    sequence: EncodedSample
    tokens: list[GeneratedToken] = field(default_factory=list)
    answer_ids: list[int] = field(default_factory=list)
    is_finished: bool = False
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
            is_finished=True,
            num_turns=1,
        )


@dataclass(frozen=True)
class EpisodeStart:
    """Values that an environment receives at the start of an episode, and its image files."""

    row: Mapping[str, Any]
    images: Sequence[Path]


class EpisodeRunner(contextlib.AbstractContextManager["EpisodeRunner"]):
    """Runs the tool calls of concurrent episodes. Close it to end their processes.

    Args:
        starts: Start of each episode by index.
        max_iterations: Maximum number of turns with tool calls.

    Attributes:
        episodes: Episodes by index.
        errors: Number of episodes that ended with each error.
    """

    def __init__(
        self,
        environment: Environment,
        renderer: NativeRenderer,
        starts: Sequence[EpisodeStart],
        max_iterations: int,
    ) -> None:
        self._environment = environment
        self._renderer = renderer
        self._starts = starts
        self._max_iterations = max_iterations
        self._sessions: dict[int, EnvironmentSession] = {}
        self.episodes: dict[int, Episode] = {}
        self.errors: Counter[str] = Counter()

    def __exit__(self, *problem: object) -> None:
        self._end_processes()

    def _end_processes(self) -> None:
        for session in self._sessions.values():
            session.close()
        self._sessions.clear()

    def restart_unfinished(self) -> None:
        """Remove unfinished episodes, which are sampled again from their prompts."""
        self._end_processes()
        self.episodes = {n: one for n, one in self.episodes.items() if one.is_finished}

    def continue_episode(
        self, index: int, request: GenerationRequest, tokens: list[GeneratedToken]
    ) -> GenerationRequest | None:
        """Add an answer to an episode, call its tools, and return the request of the next turn.

        Returns:
            None at the end of the episode: after an answer without calls, at a limit, or after an
            error of the environment.
        """
        episode = self.episodes.setdefault(index, Episode(request.prompt))
        episode.sequence = append_response(request.prompt, tokens)
        episode.tokens += tokens
        episode.answer_ids = list_ids(tokens)
        episode.num_turns += 1
        try:
            further = self._take_turn(index, episode, request)
        except EpisodeError as error:
            further = None
            episode.error = f"{error.where}: {error.what}"
            self.errors[episode.error] += 1
        if further is None:
            episode.is_finished = True
            session = self._sessions.pop(index, None)
            if session is not None:
                session.close()
        return further

    def _take_turn(
        self, index: int, episode: Episode, request: GenerationRequest
    ) -> GenerationRequest | None:
        """Call the tools of the last answer; without calls, read the reward of the episode.

        Raises:
            EpisodeError: The environment fails.
        """
        session = self._sessions.get(index)
        if session is None:
            start = self._starts[index]
            session = self._environment.start_episode(start.row, start.images)
            self._sessions[index] = session
        calls = self._find_calls(episode)
        if calls and episode.num_turns <= self._max_iterations:
            results = [self._call_tool(session, call) for call in calls]
            episode.num_calls += len(results)
            episode.num_mistakes += sum(result.is_mistake for result in results)
            further = self._append_results(episode, request, results)
            if further is not None:
                return further
            episode.is_truncated = True
        episode.reward = session.get_reward()
        return None

    def _find_calls(self, episode: Episode) -> list[str]:
        """Return the texts of the tool calls in the last answer; none if it is truncated."""
        end_of_turn = self._renderer.end_ids[0]
        if episode.answer_ids[-1] != end_of_turn:
            return []
        is_thinking = episode.sequence.tokenized.is_thinking
        completion = self._renderer.decode_completion(episode.answer_ids, is_thinking=is_thinking)
        return [match["call"] for match in TOOL_CALL_TEXT.finditer(completion.text)][:MAX_CALLS]

    def _call_tool(self, session: EnvironmentSession, text: str) -> ToolResult:
        call = parse_tool_call(text, self._environment.tools)
        if call is None:
            return describe_mistake("the tool call has no valid name and arguments")
        return session.call_tool(call.name, call.arguments)

    def _append_results(
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
        seed = f"{request.sampling_params.seed}/{episode.num_turns}".encode()
        digest = hashlib.sha256(seed).digest()
        return replace(
            request,
            prompt=extended,
            max_new_tokens=max_new_tokens,
            sampling_params=replace(
                request.sampling_params, seed=int.from_bytes(digest[:7], "little")
            ),
            image_hashes=hash_images(extended),
        )


def add_tools(located: LocatedSample, tools: Sequence[dict[str, Any]]) -> LocatedSample:
    """Return a sample with the definitions of tools after its own."""
    own = located.sample.tools
    further = [tool for tool in tools if tool not in own]
    return replace(located, sample=located.sample.model_copy(update={"tools": (*own, *further)}))


def build_start(
    located: LocatedSample,
    prompt: EncodedSample,
    references: ReferenceAnswer,
    renderer: NativeRenderer,
) -> EpisodeStart:
    """Return the values of a sample that an environment receives.

    The row has `id`, `prompt` (text of the last question), `references`, `boxes` of the reference
    answer, `frames` (height and width of the frame of the boxes of each image) and `meta`.
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
    for span in prompt.tokenized.spans:
        if span.kind == "image":
            frames.append(renderer.family.box_frame(span.resized_size))
    row = {
        "id": sample.id,
        "prompt": question,
        "references": list(texts),
        "boxes": [box_to_dict(box) for box in boxes],
        "frames": frames,
        "meta": sample.meta,
    }
    return EpisodeStart(row, images)
