"""Tests of grammar constraints in worker processes against in-process constraints."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from api_server_fixtures import LIMITS, get_worker_pool
from engine_fixtures import list_allowed
from hostile_requests import SCHEMAS

from finesight.infer.structured_output import GrammarCompiler
from finesight.serve import request_preprocessor as module
from finesight.serve.request_preprocessor import ConstraintFactory, WorkerConstraint

TICKET = {
    "type": "object",
    "properties": {"seat": {"type": "string", "maxLength": 5}, "row": {"type": "integer"}},
    "required": ["seat", "row"],
}


@pytest.fixture
def vocab_size(inference_model) -> int:
    return inference_model.model.config.decoder.vocab_size


@pytest.fixture
def factory(inference_model, vocab_size) -> ConstraintFactory:
    limits = replace(LIMITS, max_schema_cpu_s=0.5)
    pool = get_worker_pool(inference_model.renderer, vocab_size)
    return ConstraintFactory(pool, limits, vocab_size, inference_model.renderer.end_ids)


@pytest.fixture
def constraint_of_ticket(factory) -> Iterator[WorkerConstraint]:
    constraint = WorkerConstraint(factory, ("json_schema", (TICKET,)))
    constraint.start()
    yield constraint
    constraint.close()


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
def test_worker_bitmasks_match_the_grammar(inference_model, factory, vocab_size, spec):
    grammars = GrammarCompiler(inference_model.renderer, vocab_size)
    name, args = spec
    local_constraint = {
        "json_schema": grammars.compile_json_schema,
        "json_object": grammars.compile_json_object,
        "boxes": grammars.compile_boxes,
        "calls": grammars.compile_tool_calls,
    }[name](*args)
    worker_constraint = WorkerConstraint(factory, spec)
    worker_constraint.start()
    rng = random.Random(0)
    for _ in range(100):
        mask = local_constraint.compute_bitmask()
        for _ in range(2):
            assert np.array_equal(worker_constraint.compute_bitmask(), mask)
        token = rng.choice(list_allowed(local_constraint))
        if token in inference_model.renderer.end_ids:
            break
        local_constraint.accept_token(token)
        worker_constraint.accept_token(token)
    assert not worker_constraint.has_failed
    worker_constraint.close()


def test_exceeded_limit_allows_only_the_end_token(inference_model, factory):
    slow_constraint = WorkerConstraint(factory, ("json_schema", (SCHEMAS["stars"],)))
    slow_constraint.start()
    end = sorted(inference_model.renderer.end_ids)
    assert list_allowed(slow_constraint) == end
    assert slow_constraint.has_failed
    slow_constraint.accept_token(end[0])
    assert list_allowed(slow_constraint) == end


def test_cpu_time_limit_covers_all_tokens(inference_model, factory, constraint_of_ticket):
    factory.limits = replace(factory.limits, max_constraint_cpu_s=0.0)
    assert list_allowed(constraint_of_ticket) == sorted(inference_model.renderer.end_ids)
    assert constraint_of_ticket.has_failed


@pytest.mark.parametrize("when", ["before", "while it computes", "between"])
def test_constraint_can_be_closed_at_any_time(factory, when):
    schema = SCHEMAS["stars"] if when == "while it computes" else TICKET
    factory.limits = replace(factory.limits, max_schema_cpu_s=60.0)
    constraint = WorkerConstraint(factory, ("json_schema", (schema,)))
    if when == "before":
        constraint.close()
    constraint.start()
    if when == "while it computes":
        threading.Timer(0.3, constraint.close).start()
    if when == "between":
        constraint.compute_bitmask()
        constraint.close()
        constraint.accept_token(0)
    assert constraint.compute_bitmask() is factory.eos_only_bitmask
    assert constraint.has_failed


def test_accepted_grammars_are_cached(factory, monkeypatch):
    monkeypatch.setattr(module, "MAX_ACCEPTED_GRAMMARS", 2)
    specs = [("json_schema", ({"const": number},)) for number in range(3)]
    for spec in specs:
        assert not factory.is_accepted(spec)
        factory.mark_accepted(spec)
    assert [factory.is_accepted(spec) for spec in specs] == [False, True, True]
