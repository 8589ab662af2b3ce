"""Regular expressions from files: matched as by `re`, and ended at a limit of time."""

import re
from collections.abc import Iterator
from functools import partial

import pytest

from finesight.errors import UserError
from finesight.files import pattern_matcher
from finesight.files.pattern_matcher import PatternMatcher


@pytest.fixture
def matcher() -> Iterator[PatternMatcher]:
    with PatternMatcher("file.json", "correct it") as made:
        yield made


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (r"(.*\.)?(q_proj)$", "layers.0.q_proj"),
        (r"^(language(?=\.).*\.(q|k)_proj)$", "language.0.k_proj"),
        (r"(a)|(b)", "b"),
        # The package regex matches these.
        (r"\w+", "कि"),
        (r"[[:alpha:]]+", "abc"),
        (r"(?:abc){e<=1}", "abd"),
    ],
)
def test_matches_are_those_of_re(matcher, pattern, text):
    for is_full in (False, True):
        expected = (re.fullmatch if is_full else re.match)(pattern, text)
        groups = None if expected is None else [*expected.groups()]
        assert matcher.match(pattern, [text], is_full=is_full) == [groups]


def test_flags_apply_to_the_pattern(matcher):
    assert matcher.match("a.b", ["a\nb"], is_full=True) == [None]
    assert matcher.match("a.b", ["a\nb"], is_full=True, flags=re.DOTALL) == [[]]


@pytest.mark.parametrize(
    "pattern", ["(", "a{99999999999999999999}", "(" * 5000 + ")" * 5000, "[z-a]", "(?P<a>b)(?i)"]
)
def test_invalid_patterns_are_errors_of_the_user(matcher, pattern):
    with pytest.raises(UserError, match="is not a regular expression") as caught:
        matcher.match(pattern)
    assert (caught.value.where, caught.value.remedy) == ("file.json", "correct it")


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (r"(\w+\s?)+\.", "a" * 61),
        (r"((a+)+)+b", "a" * 50),
        (r"(.*)*x", "a" * 50),
        (r"(?:(a+)(?=\1))+b", "a" * 60),
        (r"(a|a)*b", "a" * 60),
        ("(?i)" + r"[\0-\U0010ffff]" * 2000, ""),  # takes seconds to compile
    ],
)
def test_exponential_patterns_are_ended(monkeypatch, pattern, text):
    monkeypatch.setattr(pattern_matcher, "MAX_PATTERN_CPU_S", 0.2)
    with PatternMatcher("file.json", "correct it") as matcher:
        with pytest.raises(UserError, match="took more than") as caught:
            matcher.match(pattern, [text])
        assert pattern[:20] in caught.value.what
        # The next match has another process.
        assert matcher.match("a", ["a"]) == [[]]


def test_matches_share_one_limit(matcher):
    matcher.budget_s = 0.5
    text = "a" * 21
    seconds = []
    with pytest.raises(UserError, match="took more than"):
        # Each match alone is within the limit.
        seconds.extend(matcher.budget_s for _ in iter(partial(matcher.match, "(a+)+b", [text]), 0))
    assert len(seconds) > 1
    assert seconds == sorted(seconds, reverse=True)


def test_the_first_pattern_that_matches_is_found(matcher):
    found = matcher.match_first(["a(b)?", "(.)", "b"], ["ab", "b", "a", ""])
    assert found == [(0, ["b"]), (1, ["b"]), (0, [None]), None]
    assert matcher.match_first([], ["a"]) == [None]


def test_many_patterns_share_one_limit(matcher):
    """Each of them takes less time than the clock of the kernel measures."""
    matcher.budget_s = 0.2
    with pytest.raises(UserError, match="one of 20000 patterns, from a0, took more than"):
        matcher.match_first([f"a{index}" for index in range(20_000)])


def test_nothing_is_matched_beyond_the_limit(matcher):
    matcher.budget_s = 0.0
    with pytest.raises(UserError, match="the pattern abc took more than the time that is left"):
        matcher.match("abc", ["abc"])
