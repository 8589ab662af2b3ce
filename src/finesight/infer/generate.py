"""Greedy batch generation for evaluation and the Python API."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from finesight.encode.tokenized_sample import EncodedSample
from finesight.infer.engine import Engine, compute_required_tokens
from finesight.infer.request import GenerationRequest
from finesight.model.vlm import VisionLanguageModel


def generate(
    model: VisionLanguageModel,
    prompts: Sequence[EncodedSample],
    *,
    max_new_tokens: int,
    end_ids: Sequence[int],
    on_progress: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """Generate a greedy completion of each prompt with continuous batching.

    A completion ends with one of `end_ids` (included), after `max_new_tokens` tokens, or at the
    last position of the model. Except for rounding, completions do not depend on the batch.

    Args:
        model: Model in evaluation mode.
        prompts: Encoded prompts.
        max_new_tokens: Maximum length of a completion, at least 1.
        end_ids: Token ids that end a completion.
        on_progress: Called after each step with the number of completions that ended in it; an
            exception stops generation.

    Returns:
        Token ids of each completion.

    Raises:
        UserError: A prompt exceeds the model's positions, or logits overflow.
    """
    assert max_new_tokens >= 1, f"max_new_tokens is {max_new_tokens}, less than 1"
    if not prompts:
        return []
    prompt_lengths = [prompt.tokenized.num_tokens for prompt in prompts]
    num_cache_tokens = compute_required_tokens(model, prompt_lengths, max_new_tokens, len(prompts))
    engine = Engine(model, end_ids, max_num_seqs=len(prompts), num_cache_tokens=num_cache_tokens)
    index_by_request = {}
    for index, prompt in enumerate(prompts):
        max_tokens = min(max_new_tokens, engine.get_max_new_tokens(prompt))
        index_by_request[
            engine.add_request(GenerationRequest(prompt=prompt, max_new_tokens=max_tokens))
        ] = index
    completions: list[list[int]] = [[] for _ in prompts]
    while engine.has_work:
        num_finished = 0
        for event in engine.step():
            if event.error is not None:
                raise event.error
            if event.token is not None:
                completions[index_by_request[event.request_id]].append(event.token.id)
            num_finished += event.finish_reason is not None
        if on_progress is not None:
            on_progress(num_finished)
    return completions
