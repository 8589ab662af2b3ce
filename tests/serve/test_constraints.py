"""Tests of grammar constraints in worker processes against in-process constraints."""

import random
import threading
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from api_server_fixtures import LIMITS, get_worker_pool
from engine_fixtures import list_allowed
from hostile_requests import SCHEMAS

from finesight.infer.structured_output import GrammarCompiler
from finesight.serve import request_preprocessor as module
from finesight.serve.api_schema import ApiError
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


@pytest.mark.parametrize(
    ("compile_grammar", "spec"),
    [
        (GrammarCompiler.compile_json_schema, ("json_schema", (TICKET,))),
        (GrammarCompiler.compile_json_object, ("json_object", ())),
        (GrammarCompiler.compile_boxes, ("boxes", ())),
        (GrammarCompiler.compile_tool_calls, ("calls", ([("book", TICKET), ("stop", None)],))),
    ],
)
def test_worker_bitmasks_match_the_grammar(
    inference_model, factory, vocab_size, compile_grammar, spec
):
    grammars = GrammarCompiler(inference_model.renderer, vocab_size)
    local_constraint = compile_grammar(grammars, *spec[1])
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


def test_exceeded_limits_allow_only_the_end_token(inference_model, factory):
    end = sorted(inference_model.renderer.end_ids)
    for schema, max_cpu_s in ((SCHEMAS["stars"], LIMITS.max_constraint_cpu_s), (TICKET, 0.0)):
        factory.limits = replace(factory.limits, max_constraint_cpu_s=max_cpu_s)
        constraint = WorkerConstraint(factory, ("json_schema", (schema,)))
        constraint.start()
        assert list_allowed(constraint) == end
        assert constraint.has_failed
        constraint.accept_token(end[0])
        assert list_allowed(constraint) == end
        constraint.close()


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
    checked: list[int] = []

    def reject() -> None:
        raise ApiError(400, "too large")

    with pytest.raises(ApiError):
        factory.check_once(("json_schema", (0,)), reject)
    for number in (0, 1, 2, 2, 1, 0):
        factory.check_once(("json_schema", (number,)), partial(checked.append, number))
    assert checked == [0, 1, 2, 0]
