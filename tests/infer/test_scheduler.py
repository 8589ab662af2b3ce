"""The scheduler without a model."""

from collections.abc import Sequence

import numpy as np

from finesight.encode.tokenization import EncodedSample, TokenizedSample
from finesight.infer import scheduler as area
from finesight.infer.request import GenerationRequest
from finesight.infer.scheduler import Scheduler, SequenceState

BLOCK_SIZE = 4
NUM_BLOCKS = 16
"""Usable blocks of `_create_scheduler`."""


def _create_scheduler() -> Scheduler:
    return Scheduler(max_num_seqs=8, num_blocks=NUM_BLOCKS + 1, block_size=BLOCK_SIZE)


def _add_requests(
    scheduler: Scheduler, lengths: Sequence[int], adapters: Sequence[int | None] = ()
) -> list[SequenceState]:
    """Queue prompts of the given lengths that share no prefix, and return their states."""
    for index, length in enumerate(lengths):
        tokenized = TokenizedSample(
            id=str(index),
            ids_T=np.full(length, index, dtype=np.int32),
            loss_mask_T=np.zeros(length, dtype=np.bool_),
            position_ids_3T=np.tile(np.arange(length, dtype=np.int32), (3, 1)),
            spans=(),
        )
        request = GenerationRequest(
            prompt=EncodedSample(tokenized, np.empty((0, 3), dtype=np.uint8)),
            max_new_tokens=4,
            adapter_index=adapters[index] if adapters else None,
        )
        scheduler.add_request(request, str(request.adapter_index))
    return list(scheduler.waiting)


def _admit_all(scheduler: Scheduler) -> list[int]:
    admitted = []
    while (sequence := scheduler.admit_next()) is not None:
        admitted.append(sequence.request_id)
    return admitted


def _run_prefill(scheduler: Scheduler) -> list[tuple[int, int]]:
    """Prefill one step in place of the engine; return the request ids and chunk ends."""
    _admit_all(scheduler)
    chunks = scheduler.schedule_prefill()
    for sequence, stop in chunks:
        sequence.prompt.num_computed_tokens = stop
    completed = scheduler.complete_prefill(chunks)
    for sequence in completed:
        assert scheduler.add_to_batch(sequence) == sequence.batch_index
    scheduler.count_scheduled(completed)
    return [(sequence.request_id, stop) for sequence, stop in chunks]


def _request_ids(scheduler: Scheduler) -> list[int]:
    assert [one.batch_index for one in scheduler.decoding] == list(range(len(scheduler.decoding)))
    return [sequence.request_id for sequence in scheduler.decoding]


def test_requests_are_admitted_in_fifo_order():
    """A short request does not overtake a long one that must wait for blocks."""
    scheduler = _create_scheduler()
    first, _, _ = _add_requests(scheduler, [40, 36, 4])
    assert _admit_all(scheduler) == [0]
    assert len(first.prompt.block_ids) == 11
    assert scheduler.block_manager.num_free_blocks == NUM_BLOCKS - 11
    scheduler.finish(first)
    assert _admit_all(scheduler) == [1, 2]
    assert (scheduler.num_running, len(scheduler.waiting)) == (2, 0)


def test_prefill_chunks_fit_the_token_budget(monkeypatch):
    monkeypatch.setattr(area, "MAX_PREFILL_TOKENS", 12)
    monkeypatch.setattr(area, "MAX_MIXED_PREFILL_TOKENS", 5)
    scheduler = _create_scheduler()
    _add_requests(scheduler, [8, 9, 7, 3])
    assert _run_prefill(scheduler) == [(0, 8), (1, 4)]
    # The last request is not admitted while the unread tokens exceed the budget.
    assert [sequence.request_id for sequence in scheduler.waiting] == [2, 3]
    # Prompts are divided at the ends of blocks of 4 tokens.
    assert _run_prefill(scheduler) == [(1, 8)]
    assert _run_prefill(scheduler) == [(1, 9), (2, 4)]
    assert _run_prefill(scheduler) == [(2, 7)]
    assert _run_prefill(scheduler) == [(3, 3)]
    assert _request_ids(scheduler) == [0, 1, 2, 3]


def test_prefill_batch_has_one_adapter():
    scheduler = _create_scheduler()
    _add_requests(scheduler, [4] * 5, adapters=[0, 1, 0, None, 1])
    chunks = [[request_id for request_id, _ in _run_prefill(scheduler)] for _ in range(3)]
    assert chunks == [[0, 2], [1, 4], [3]]
