"""Greedy generation with transformers for families without native code."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from finesight.encode.hf_renderer import import_transformers
from finesight.encode.packing import pack
from finesight.encode.tokenized_sample import EncodedSample
from finesight.errors import UserError
from finesight.infer.request import EngineEvent, GeneratedToken, GenerationRequest
from finesight.model.hf_backend import HfModel


@torch.no_grad()
def generate_hf(
    model: HfModel,
    prompts: Sequence[EncodedSample],
    *,
    max_new_tokens: int,
    end_ids: Sequence[int],
    on_progress: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """Generate greedy completions with transformers, one prompt at a time.

    Arguments and results are those of `infer.engine.generate`.
    """
    report_progress = on_progress or _ignore_progress

    def progress_criterion(ids_1T: Tensor, scores: object, **_: Any) -> Tensor:
        """Report progress without stopping generation; the callback may raise."""
        report_progress(0)
        return torch.zeros(len(ids_1T), dtype=torch.bool, device=ids_1T.device)

    package = import_transformers()
    generation_config = package.GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(end_ids),
        pad_token_id=end_ids[0],
    )
    completions: list[list[int]] = []
    for prompt in prompts:
        batch = pack([prompt]).to(model.inner.device)
        output_ids_1T = model.inner.generate(
            **model.prepare_inputs(batch),
            generation_config=generation_config,
            stopping_criteria=package.StoppingCriteriaList([progress_criterion]),
        )
        completions.append(output_ids_1T[0, prompt.tokenized.num_tokens :].tolist())
        report_progress(1)
    return completions


def get_max_new_tokens(model: HfModel, prompt: EncodedSample) -> int:
    """Return the maximum completion length of a prompt, limited by the positions of the model."""
    return max(1, model.max_position_embeddings - prompt.tokenized.num_tokens)


def _ignore_progress(num_finished: int) -> None:
    """Ignore a progress update."""


class HfEngine:
    """Engine of the transformers backend, with the interface of `infer.engine.Engine`.

    It decodes greedily and generates one full completion per step.
    """

    num_free_blocks = num_blocks = block_size = 0

    def __init__(self, model: HfModel, end_ids: Sequence[int]) -> None:
        self.model = model
        self._end_ids = end_ids
        self._request_ids = itertools.count()
        self._waiting: deque[tuple[int, GenerationRequest]] = deque()
        self._events: list[EngineEvent] = []

    @property
    def has_work(self) -> bool:
        """True while any request or event is pending."""
        return bool(self._waiting or self._events)

    @property
    def num_running(self) -> int:
        """Number of running requests; always 0 between two steps."""
        return 0

    @property
    def num_waiting(self) -> int:
        """Number of queued requests."""
        return len(self._waiting)

    def get_max_new_tokens(self, prompt: EncodedSample) -> int:
        """Return the maximum completion length of a prompt."""
        return get_max_new_tokens(self.model, prompt)

    def add_request(self, request: GenerationRequest) -> int:
        """Queue a request and return its id."""
        native_only = {
            "temperature": not request.sampling_params.is_greedy,
            "repetition_penalty": request.sampling_params.repetition_penalty != 1.0,
            "logprobs": request.logprobs is not None,
            "a decoding constraint": request.constraint is not None,
        }
        unsupported = [name for name, is_requested in native_only.items() if is_requested]
        if unsupported:
            raise UserError(
                f"{' and '.join(unsupported)}: not supported by the transformers backend",
                where="sampling",
                expected="greedy decoding for a family without native code",
                remedy="remove the option",
            )
        request_id = next(self._request_ids)
        self._waiting.append((request_id, request))
        return request_id

    def cancel(self, request_id: int) -> None:
        """Cancel a queued request."""
        if any(request_id == other for other, _ in self._waiting):
            self._waiting = deque(item for item in self._waiting if item[0] != request_id)
            self._events.append(EngineEvent(request_id, finish_reason="cancelled"))

    def step(self) -> list[EngineEvent]:
        """Generate the full completion of the next request and return its events."""
        if self._waiting and not self._events:
            request_id, request = self._waiting.popleft()
            (ids,) = generate_hf(
                self.model,
                [request.prompt],
                max_new_tokens=request.max_new_tokens,
                end_ids=self._end_ids,
            )
            self._events += [EngineEvent(request_id, GeneratedToken(id_)) for id_ in ids]
            has_stopped = bool(ids) and ids[-1] in self._end_ids
            self._events.append(
                EngineEvent(request_id, finish_reason="stop" if has_stopped else "length")
            )
        events, self._events = self._events, []
        return events
