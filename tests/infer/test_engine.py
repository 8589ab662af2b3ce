from __future__ import annotations

import contextlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from asking import ask

from finesight.encode.render import Renderer
from finesight.errors import UserError
from finesight.hub import ModelFolder
from finesight.infer import engine
from finesight.infer.engine import cache_tokens, generate, plan_batches
from finesight.model.tiny import make_tiny
from finesight.model.weights import load_model

MOST = 1 << 18


def test_prompts_of_similar_length_run_together_the_longest_first():
    assert plan_batches([5, 90, 7, 88, 6], 2, 10, MOST) == [[1, 3], [2, 4], [0]]


def test_no_prompts_no_batches():
    assert plan_batches([], 4, 10, MOST) == []


@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_batches_hold_each_prompt_once_within_their_limits(batch):
    lengths = [100 + 97 * i % 3000 for i in range(500)]
    batches = plan_batches(lengths, batch, 512, MOST)
    assert sorted(i for members in batches for i in members) == list(range(500))
    for members in batches:
        assert len(members) <= batch
        room = max(lengths[i] for i in members) + 512
        assert len(members) * room <= MOST or len(members) == 1


def test_a_prompt_beyond_the_caches_limit_runs_alone():
    assert plan_batches([10, MOST, 10], 8, 1, MOST) == [[1], [0, 2]]


def test_the_cache_is_bound_in_bytes(tiny):
    """As many tokens of the published 2B model as ever, and of the first Qwen-VL far fewer."""
    model = load_model(tiny, torch.bfloat16, torch.device("cpu"))
    language = model.geometry.language
    for depth, kv_heads, tokens in ((28, 2, 1 << 18), (32, 32, 14336)):
        sizes = replace(language, depth=depth, kv_heads=kv_heads, head_width=128)
        model.geometry = replace(model.geometry, language=sizes)
        assert cache_tokens(model) == tokens
    assert cache_tokens(model.float()) == 14336 // 2


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return ModelFolder(make_tiny(tmp_path_factory.mktemp("model") / "tiny"))


def test_a_prompt_beyond_the_models_positions_is_refused(tiny, tmp_path):
    model, renderer = load_model(tiny, torch.float32, torch.device("cpu")), Renderer(tiny)
    prompts = [renderer.prompt(ask(name, tmp_path, text)) for name, text in (("s", "Why?"),) * 2]
    last = prompts[0].outline.tokens - 1
    model.geometry = replace(
        model.geometry, language=replace(model.geometry.language, positions=last + 1)
    )
    assert generate(model, prompts, max_new_tokens=1, end_ids=())
    longer = [*prompts, renderer.prompt(ask("long", tmp_path, "Why? Why?"))]
    with pytest.raises(UserError, match=f"(?s)long: .*below {last + 1}"):
        generate(model, longer, max_new_tokens=1, end_ids=())


def test_numbers_that_overflow_are_told(tiny, tmp_path):
    model = load_model(tiny, torch.float16, torch.device("cpu"))
    prompts = [Renderer(tiny).prompt(ask("s", tmp_path, "Why?"))]
    assert generate(model, prompts, max_new_tokens=1, end_ids=())
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(60000)
    with pytest.raises(UserError, match="overflow in float16"):
        generate(model, prompts, max_new_tokens=1, end_ids=())


class Graph:
    """A recording that no card is needed for; its end may fail too."""

    def __init__(self, spoiled: bool) -> None:
        self.open, self._spoiled = False, spoiled

    def capture_begin(self, **_: object) -> None:
        self.open = True

    def capture_end(self) -> None:
        self.open = False
        if self._spoiled:
            raise RuntimeError("the recording is invalid")


@pytest.mark.parametrize("spoiled", [False, True])
def test_an_error_while_recording_closes_it_and_is_the_one_told(monkeypatch, spoiled):
    graph, stream = Graph(spoiled), SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(engine, "_recording_stream", lambda device: stream)

    def grow(ids_R, seen):
        if graph.open:
            raise torch.OutOfMemoryError("the first error")
        return ids_R

    recorded, ids_R = engine.Recorded(), torch.zeros(2, dtype=torch.int64)
    recorded.run(grow, ids_R, 256)
    with pytest.raises(torch.OutOfMemoryError, match="the first error"):
        recorded.run(grow, ids_R, 256)
    assert not graph.open


def test_less_than_one_new_token_is_refused():
    with pytest.raises(AssertionError, match="max_new_tokens is 0"):
        generate(None, [], max_new_tokens=0, end_ids=())
