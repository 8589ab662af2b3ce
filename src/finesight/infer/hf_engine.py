"""Engine of the transformers backend: one greedy completion per step."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from finesight.encode.hf_renderer import import_transformers
from finesight.encode.packing import pack
from finesight.encode.tokenization import EncodedSample
from finesight.errors import UserError
from finesight.infer.request import EngineEvent, FinishReason, GeneratedToken, GenerationRequest
from finesight.model.hf_backend import HfModel


class HfEngine:
    """Engine for families without native code, with the interface of `InferenceEngine`.

    It decodes greedily with transformers, and generates one full completion per step. `on_progress`
    is called with 0 for each token. It may raise an exception to stop the generation.
    """

    num_free_blocks = 0
    num_blocks = 0
    block_size = 0
    num_running = 0

    def __init__(
        self,
        model: HfModel,
        end_ids: Sequence[int],
        on_progress: Callable[[int], None] | None = None,
    ) -> None:
        self.model = model
        self._end_ids = end_ids
        self._on_progress = on_progress
        self._request_ids = itertools.count()
        self._waiting: deque[tuple[int, GenerationRequest]] = deque()
        self._events: list[EngineEvent] = []

    @property
    def has_work(self) -> bool:
        """True while any request or event is pending."""
        return bool(self._waiting or self._events)

    @property
    def num_waiting(self) -> int:
        """Number of queued requests."""
        return len(self._waiting)

    @property
    def max_model_len(self) -> int:
        """Maximum number of prompt and completion tokens of a request."""
        return self.model.max_position_embeddings

    def get_max_new_tokens(self, prompt: EncodedSample) -> int:
        """Return the maximum completion length, limited by the positions of the model."""
        return max(1, self.model.max_position_embeddings - prompt.tokenized.num_tokens)

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
        waiting = [item for item in self._waiting if item[0] != request_id]
        if len(waiting) < len(self._waiting):
            self._waiting = deque(waiting)
            self._events.append(EngineEvent(request_id, finish_reason="cancelled"))

    def step(self) -> list[EngineEvent]:
        """Generate the full completion of the next request and return its events."""
        if self._waiting and not self._events:
            request_id, request = self._waiting.popleft()
            ids = self._generate(request)
            self._events += [EngineEvent(request_id, GeneratedToken(id_)) for id_ in ids]
            finish_reason: FinishReason = "length"
            if ids and ids[-1] in self._end_ids:
                finish_reason = "stop"
            self._events.append(EngineEvent(request_id, finish_reason=finish_reason))
        events = self._events
        self._events = []
        return events

    @torch.no_grad()
    def _generate(self, request: GenerationRequest) -> list[int]:
        package = import_transformers()

        def report_token(ids_1T: Tensor, scores: object, **_: Any) -> Tensor:
            if self._on_progress is not None:
                self._on_progress(0)
            return torch.zeros(len(ids_1T), dtype=torch.bool, device=ids_1T.device)

        generation_config = package.GenerationConfig(
            do_sample=False,
            num_beams=1,
            max_new_tokens=request.max_new_tokens,
            eos_token_id=list(self._end_ids),
            pad_token_id=self._end_ids[0],
        )
        batch = pack([request.prompt]).to(self.model.inner.device)
        output_ids_1T = self.model.inner.generate(
            **self.model.prepare_inputs(batch),
            generation_config=generation_config,
            stopping_criteria=package.StoppingCriteriaList([report_token]),
        )
        output_ids: list[int] = output_ids_1T[0, request.prompt.tokenized.num_tokens :].tolist()
        return output_ids
