"""Grammars that are followed in worker processes allow what they allow in this one."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from hostile_requests import SCHEMAS
from serving import LIMITS, workers_of

from finesight.infer.constrain import Grammars
from finesight.serve import constraints as area
from finesight.serve.constraints import Constraints, WorkerConstraint

TICKET = {
    "type": "object",
    "properties": {"seat": {"type": "string", "maxLength": 5}, "row": {"type": "integer"}},
    "required": ["seat", "row"],
}


@pytest.fixture
def vocabulary(answerer) -> int:
    return answerer.model.geometry.language.vocabulary


@pytest.fixture
def made(answerer, vocabulary) -> Constraints:
    limits = replace(LIMITS, schema_seconds=0.5)
    pool = workers_of(answerer.renderer, vocabulary)
    return Constraints(pool, limits, vocabulary, answerer.renderer.end_ids)


@pytest.fixture
def following(made) -> Iterator[WorkerConstraint]:
    constraint = made.create(("json_schema", (TICKET,)))
    constraint.begin()
    yield constraint
    constraint.close()


def tokens(mask: np.ndarray) -> list[int]:
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()


@pytest.mark.parametrize(
    "spec",
    [
        ("json_schema", (TICKET,)),
        ("json_object", ()),
        ("boxes", ()),
        ("calls", ([("book", TICKET), ("stop", None)],)),
    ],
    ids=lambda spec: spec[0],
)
def test_masks_are_those_of_the_grammar(answerer, made, vocabulary, spec):
    grammars = Grammars(answerer.renderer, vocabulary)
    name, args = spec
    here = {
        "json_schema": grammars.json_schema,
        "json_object": grammars.json_object,
        "boxes": grammars.boxes,
        "calls": grammars.calls,
    }[name](*args)
    there = made.create(spec)
    there.begin()
    rng = random.Random(0)
    for _ in range(100):
        mask = here.allow()
        assert np.array_equal(there.allow(), mask)
        assert np.array_equal(there.allow(), mask)
        token = rng.choice(tokens(mask))
        if token in answerer.renderer.end_ids:
            break
        here.take(token)
        there.take(token)
    assert not there.failed
    there.close()


def test_beyond_its_limits_only_the_end_is_allowed(answerer, made):
    slow = made.create(("json_schema", (SCHEMAS["stars"],)))
    slow.begin()
    end = sorted(answerer.renderer.end_ids)
    assert tokens(slow.allow()) == end
    assert slow.failed
    slow.take(end[0])
    assert tokens(slow.allow()) == end


def test_all_tokens_of_an_answer_have_one_budget_of_time(answerer, made, following):
    made.limits = replace(made.limits, answer_schema_seconds=0.0)
    assert tokens(following.allow()) == sorted(answerer.renderer.end_ids)
    assert following.failed


@pytest.mark.parametrize("when", ["before", "while it computes", "between"])
def test_it_may_be_closed_at_any_time(made, when):
    schema = SCHEMAS["stars"] if when == "while it computes" else TICKET
    made.limits = replace(made.limits, schema_seconds=60.0)
    constraint = made.create(("json_schema", (schema,)))
    if when == "before":
        constraint.close()
    constraint.begin()
    if when == "while it computes":
        threading.Timer(0.3, constraint.close).start()
    if when == "between":
        constraint.allow()
        constraint.close()
        constraint.take(0)
    assert constraint.allow() is made.end_only
    assert constraint.failed


def test_grammars_that_compile_are_remembered(made, monkeypatch):
    monkeypatch.setattr(area, "REMEMBERED", 2)
    specs = [("json_schema", ({"const": number},)) for number in range(3)]
    for spec in specs:
        assert not made.is_accepted(spec)
        made.accept(spec)
    assert [made.is_accepted(spec) for spec in specs] == [False, True, True]
