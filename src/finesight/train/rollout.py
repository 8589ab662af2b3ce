"""Rollouts: responses of the current model to the prompts of training steps.

The inference engine runs in the training process, on the weights of the step. Responses depend only
on weights, seed, step and sample, so a resumed run generates the same ones.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import torch

from finesight.encode.tokenization import EncodedSample
from finesight.infer.block_manager import hash_images
from finesight.infer.prediction import (
    NUM_READER_THREADS,
    FollowUp,
    ResponseSampler,
    append_response,
    derive_seed,
)
from finesight.infer.request import GeneratedToken, GenerationRequest, SamplingParams
from finesight.model.backend import as_native
from finesight.samples.sample import LocatedSample
from finesight.train.state import TrainState
from finesight.train.step_batch import SkippedSample, StepBatch
from finesight.train.step_dataset import IndexedSample
from finesight.train.vision_cache_builder import free_gpu_memory


class Rollout(ABC):
    """Sampler of responses to the prompts of training steps, on this rank."""

    def __init__(self, state: TrainState) -> None:
        recipe = state.run.recipe
        self.state = state
        self.seed = recipe.train.seed
        sampling = recipe.needs.sampling
        assert sampling is not None, f"{recipe.train.objective} samples no responses"
        self.sampling = sampling
        self.banned_ids = state.data.renderer.visual_token_ids
        self.log = state.run.console.log
        self.first_step = 0
        engine = state.engine
        self.sampler = ResponseSampler(
            as_native(engine.model),
            state.data.renderer.end_ids,
            self.sampling.batch_size,
            engine.parallel.is_sharded,
        )

    def read_steps(self, start: int) -> Generator[StepBatch, None, None]:
        """Yield the steps from `start` on, each generated when it is requested."""
        self.first_step = start
        for step in range(start, len(self.state.data.sampler)):
            yield self.build_step(step)

    @abstractmethod
    def build_step(self, step: int) -> StepBatch:
        """Generate and pack the responses of a step.

        Raises:
            TrainingInterrupted: A stop was requested.
        """

    def read_samples(
        self,
        indices: Sequence[int],
        encode: Callable[[LocatedSample], EncodedSample] | None,
        skipped: list[SkippedSample],
    ) -> list[IndexedSample]:
        """Read and encode samples in several threads, and add those that cannot be to `skipped`."""
        with ThreadPoolExecutor(NUM_READER_THREADS) as pool:
            read = self.state.engine.step_dataset.read_samples
            samples, own_skipped = read(indices, encode, pool.map)
        skipped += own_skipped
        return samples

    def generate(
        self,
        step: int,
        prompts: Sequence[IndexedSample],
        follow_up: FollowUp | None = None,
        on_restart: Callable[[], object] | None = None,
    ) -> list[list[list[GeneratedToken]]]:
        """Sample the responses of each prompt; prompts share their keys and values.

        Args:
            follow_up: Returns the request of the next turn (`iter_completions`). The tokens are
                then those of the last turns. Response `n` to a prompt has the index
                `n * len(prompts) + position`.
            on_restart: Called when unfinished responses start again after a memory error.
        """
        state = self.state
        count = len(prompts)

        def on_progress(num_finished: int) -> None:
            if state.run.hardware.process_group.is_single_process:
                state.run.stop.raise_if_requested()

        requests = build_requests(
            [prompt for _, prompt in prompts],
            [f"{self.seed}/{step}/{index}" for index, _ in prompts],
            self.sampling.num_generations,
            self.sampling.max_completion_length,
            self.sampling.temperature,
            self.banned_ids,
        )

        def on_full_memory() -> None:
            if on_restart is not None:
                on_restart()
            state.engine.graph_runner.release_graphs()

        state.engine.model.eval()
        try:
            responses = self.sampler.sample(requests, on_progress, on_full_memory, follow_up)
        finally:
            state.engine.model.train()
            if not self.can_keep_engine():
                self.sampler.engine = None
        return [responses[position::count] for position in range(count)]

    def can_keep_engine(self) -> bool:
        """Return whether the inference engine with its CUDA graphs can stay for the next step."""
        # The graphs of an engine refer to the weights, which sharded modes gather elsewhere.
        return not self.sampler.is_sharded and has_memory_for_engine(self.state.run.hardware.device)


def has_memory_for_engine(device: torch.device) -> bool:
    """Return whether an inference engine with its CUDA graphs can stay beside the training."""
    free = free_gpu_memory(device)
    if not free:  # on a CPU
        return False
    # Graphs need half of the GPU memory.
    return 2 * free > torch.cuda.get_device_properties(device).total_memory


def build_requests(
    prompts: Sequence[EncodedSample],
    names: Sequence[str],
    num_responses: int,
    max_new_tokens: int,
    temperature: float,
    banned_ids: tuple[int, ...],
) -> list[GenerationRequest]:
    """Build the requests for the responses to prompts, of which each has its own seed.

    The first responses of all prompts precede the others, which reuse their prompts.

    Args:
        names: Name of each prompt, from which the seeds of its responses derive.
        banned_ids: Tokens that responses never contain.
    """
    image_hashes = [*map(hash_images, prompts)]
    requests = []
    for number in range(num_responses):
        for prompt, name, hashes in zip(prompts, names, image_hashes, strict=True):
            params = SamplingParams(
                temperature=temperature,
                seed=derive_seed(f"{name}/{number}"),
                banned_ids=banned_ids,
            )
            request = GenerationRequest(
                prompt=prompt,
                max_new_tokens=max_new_tokens,
                sampling_params=params,
                logprobs=0,
                processed_logprobs=True,
                image_hashes=hashes,
            )
            requests.append(request)
    return requests


def join_responses(
    prompt: EncodedSample, responses: Sequence[Sequence[GeneratedToken]]
) -> EncodedSample:
    """Return the sample with the responses of a prompt, of which all tokens are supervised."""
    return join_sequences(prompt, [append_response(prompt, tokens) for tokens in responses])


def join_sequences(prompt: EncodedSample, sequences: Sequence[EncodedSample]) -> EncodedSample:
    """Return the sample with a prompt and several continuations, which may have images.

    Args:
        sequences: The prompt with each continuation. Supervised tokens, of which the last one ends
            the continuation, are those of its loss mask.
    """
    # A continuation starts with the last token of the prompt, which predicts its first token.
    start = prompt.tokenized.num_tokens - 1
    before = prompt.tokenized
    ids = [before.ids_T[:start]]
    loss_masks = [before.loss_mask_T[:start]]
    position_ids = [before.position_ids_3T[:, :start]]
    spans = list(before.spans)
    patches = list(prompt.appended_patches)
    response_starts = []
    num_tokens = start
    for sequence in sequences:
        tokenized = sequence.tokenized
        stop = int(np.flatnonzero(tokenized.loss_mask_T)[-1]) + 1
        ids.append(tokenized.ids_T[start:stop])
        loss_masks.append(tokenized.loss_mask_T[start:stop])
        position_ids.append(tokenized.position_ids_3T[:, start:stop])
        offset = num_tokens - start
        for span in tokenized.spans[len(before.spans) :]:
            spans.append(replace(span, start=span.start + offset, stop=span.stop + offset))
        patches += sequence.appended_patches[len(prompt.appended_patches) :]
        response_starts.append(num_tokens)
        num_tokens += stop - start
    tokenized = replace(
        before,
        ids_T=np.concatenate(ids),
        loss_mask_T=np.concatenate(loss_masks),
        position_ids_3T=np.hstack(position_ids),
        spans=tuple(spans),
        response_starts=tuple(response_starts),
    )
    return replace(prompt, tokenized=tokenized, appended_patches=tuple(patches))


def split_responses(
    num_prompt_tokens: int, lengths: Sequence[int], token_budget: int
) -> list[list[int]]:
    """Return the responses to a prompt of each pack by position, within a token budget.

    Args:
        lengths: Number of tokens of each response.
    """
    budget = token_budget - num_prompt_tokens
    chunks: list[list[int]] = []
    chunk_length = 0
    for position, num_tokens in enumerate(lengths):
        # With the last token of the prompt, which predicts the first token of the response.
        length = num_tokens + 1
        if not chunks or chunk_length + length > budget:
            chunks.append([])
            chunk_length = 0
        chunks[-1].append(position)
        chunk_length += length
    return chunks
