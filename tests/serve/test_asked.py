from __future__ import annotations

from finesight.infer.request import Delta, Token
from finesight.serve.asked import joined


def test_what_has_come_meanwhile_is_one_piece_for_each_answer():
    fault = RuntimeError("late")
    come = [
        (0, Delta("a", (Token(1),))),
        (1, Delta("", (Token(2),))),
        (0, Delta("b", (Token(3), Token(4)))),
        (1, Delta("c", ())),
        (0, None),
        (1, Delta("d", (Token(5),))),
        (1, fault),
    ]
    assert joined(come) == [
        (0, Delta("ab", (Token(1), Token(3), Token(4)))),
        (1, Delta("cd", (Token(2), Token(5)))),
        (0, None),
        (1, fault),
    ]
    assert joined([]) == []
