"""Generations of one chat completion request, submitted and canceled together."""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections.abc import AsyncGenerator, Sequence

from finesight.data.jsonl import LocatedSample
from finesight.encode.tokenized_sample import EncodedSample
from finesight.errors import UserError
from finesight.infer.inference_service import GenerationStream, InferenceService, ServiceBusyError
from finesight.infer.request import CompletionDelta, GenerationOptions, TokenUsage
from finesight.serve.api_errors import ApiError, from_user_error

ChoiceDelta = tuple[int, CompletionDelta | Exception | None]
"""Index of a choice, and its next text delta.

None instead of a delta marks the end of the choice. An exception means that the choice failed.
"""


class GenerationGroup:
    """Generations of one request, one for each choice (`n` in the OpenAI API).

    `submit` runs in a thread that cannot be interrupted. If `cancel` is called meanwhile,
    generations that `submit` still adds are canceled as well.
    """

    def __init__(self, service: InferenceService) -> None:
        self._service = service
        self._lock = threading.Lock()
        self._is_cancelled = False
        self.id = f"chatcmpl-{secrets.token_hex(12)}"
        self.streams: list[GenerationStream] = []

    def submit(
        self,
        located_sample: LocatedSample,
        options: Sequence[GenerationOptions],
        prompt: EncodedSample,
    ) -> None:
        """Submit one generation per choice of a chat completion request.

        Args:
            located_sample: Images of the request.
            options: Generation options of each choice.
            prompt: Encoded prompt, which all choices share.

        Raises:
            ApiError: The inference service is busy, or the request is invalid.
        """
        for choice_options in options:
            if self._is_cancelled:
                return
            try:
                stream = self._service.submit(located_sample, choice_options, prompt)
            except ServiceBusyError as error:
                raise ApiError(
                    429, error.what, code="rate_limit_exceeded", retry_after_s=1
                ) from error
            except UserError as error:
                raise from_user_error(
                    error, "messages", hidden_path=f"{located_sample.folder}/"
                ) from error
            with self._lock:
                self.streams.append(stream)
                if self._is_cancelled:
                    stream.cancel()

    def cancel(self) -> None:
        """Cancel all generations, including those that are submitted later."""
        with self._lock:
            self._is_cancelled = True
            for stream in self.streams:
                stream.cancel()

    @property
    def usages(self) -> list[TokenUsage]:
        """Token usage of each choice so far."""
        return [stream.usage for stream in self.streams]

    async def iter_deltas(self) -> AsyncGenerator[tuple[int, CompletionDelta | None]]:
        """Yield (choice index, text delta) pairs of all choices as tokens arrive.

        A delta of None marks the end of a choice. The first error of any choice is raised.
        """
        queue: asyncio.Queue[ChoiceDelta] = asyncio.Queue()
        tasks = [
            asyncio.create_task(_forward_deltas(choice_index, stream, queue))
            for choice_index, stream in enumerate(self.streams)
        ]
        try:
            num_running = len(tasks)
            while num_running:
                received = [await queue.get()]
                while not queue.empty():
                    received.append(queue.get_nowait())
                for choice_index, delta in merge_deltas(received):
                    if isinstance(delta, UserError):
                        raise ApiError(503, delta.what, retry_after_s=5) from delta
                    if isinstance(delta, Exception):
                        raise delta
                    num_running -= delta is None
                    yield choice_index, delta
        finally:
            for task in tasks:
                task.cancel()


def merge_deltas(deltas: Sequence[ChoiceDelta]) -> list[ChoiceDelta]:
    """Merge the text deltas of each choice that have arrived together.

    With many clients, tokens arrive faster than single deltas can be sent.
    """
    merged: list[ChoiceDelta] = []
    last_by_choice: dict[int, tuple[int, CompletionDelta]] = {}
    for choice_index, delta in deltas:
        if not isinstance(delta, CompletionDelta):
            merged.append((choice_index, delta))
        elif choice_index in last_by_choice:
            position, previous = last_by_choice[choice_index]
            combined = CompletionDelta(previous.text + delta.text, previous.tokens + delta.tokens)
            merged[position], last_by_choice[choice_index] = (
                (choice_index, combined),
                (position, combined),
            )
        else:
            last_by_choice[choice_index] = (len(merged), delta)
            merged.append((choice_index, delta))
    return merged


async def _forward_deltas(
    choice_index: int, stream: GenerationStream, queue: asyncio.Queue[ChoiceDelta]
) -> None:
    try:
        async for delta in stream:
            queue.put_nowait((choice_index, delta))
        assert stream.finish_reason is not None, (
            f"choice {choice_index} ended without a finish reason"
        )
    except Exception as error:
        queue.put_nowait((choice_index, error))
    else:
        queue.put_nowait((choice_index, None))
