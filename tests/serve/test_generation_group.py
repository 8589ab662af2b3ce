from __future__ import annotations

from finesight.infer.request import CompletionDelta, GeneratedToken
from finesight.serve.chat_completions import merge_deltas


def test_pending_deltas_are_merged_per_choice():
    fault = RuntimeError("late")
    come = [
        (0, CompletionDelta("a", (GeneratedToken(1),))),
        (1, CompletionDelta("", (GeneratedToken(2),))),
        (0, CompletionDelta("b", (GeneratedToken(3), GeneratedToken(4)))),
        (1, CompletionDelta("c", ())),
        (0, None),
        (1, CompletionDelta("d", (GeneratedToken(5),))),
        (1, fault),
    ]
    assert merge_deltas(come) == [
        (0, CompletionDelta("ab", (GeneratedToken(1), GeneratedToken(3), GeneratedToken(4)))),
        (1, CompletionDelta("cd", (GeneratedToken(2), GeneratedToken(5)))),
        (0, None),
        (1, fault),
    ]
    assert merge_deltas([]) == []
