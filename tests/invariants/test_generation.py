"""Cached generation = uncached; batched generation = single (principle 6)."""

from __future__ import annotations

import copy
import gc
from itertools import chain

import pytest
import torch
from asking import generate_uncached, mixed_questions

from finesight.encode.encoded import Encoded
from finesight.encode.pack import plan_packs
from finesight.encode.render import Renderer
from finesight.hub import ModelFolder
from finesight.infer import engine
from finesight.infer.engine import PREFILL_TOKENS, Session, generate
from finesight.model.network import VisionLanguageModel
from finesight.model.tiny import make_tiny
from finesight.model.weights import load_model

STEPS = 9


@pytest.fixture(
    scope="module", params=["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen"]
)
def asked(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[VisionLanguageModel, list[Encoded]]:
    """A random model and prompts for it, with weights large enough that attention matters."""
    folder = tmp_path_factory.mktemp(request.param)
    # Of the others' seed an answer is one token again and again, by chance.
    seed = 2 if request.param == "qwen3_vl_moe" else 0
    tiny = ModelFolder(make_tiny(folder / "tiny", request.param, seed))
    model = load_model(tiny, torch.float32, torch.device("cpu")).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and name.startswith("model.layers"):
                parameter.mul_(2)
    renderer = Renderer(tiny)
    return model, [renderer.prompt(question) for question in mixed_questions(folder)]


@pytest.fixture(scope="module")
def uncached(
    asked: tuple[VisionLanguageModel, list[Encoded]],
) -> list[tuple[list[int], list[torch.Tensor]]]:
    model, prompts = asked
    return [generate_uncached(model, prompt, STEPS) for prompt in prompts]


@torch.no_grad()
def _grown(
    model: VisionLanguageModel,
    prompts: list[Encoded],
    drop_after: int | None = None,
    prefill_tokens: int = PREFILL_TOKENS,
    spoken: list[list[int]] | None = None,
) -> list[tuple[list[int], list[torch.Tensor]]]:
    """Tokens and logits of each prompt by the cache; after `drop_after` steps every second row
    leaves the batch; `spoken` tokens are said in place of the most probable ones."""
    session = Session(model, prompts, STEPS, prefill_tokens)
    owner = list(range(len(prompts)))
    grown: list[tuple[list[int], list[torch.Tensor]]] = [([], []) for _ in prompts]
    logits_RV = session.prefill()
    for step in range(STEPS):
        next_R = logits_RV.argmax(-1)
        if spoken is not None:
            next_R = torch.tensor([spoken[who][step] for who in owner], device=next_R.device)
        for row, who in enumerate(owner):
            grown[who][0].append(int(next_R[row]))
            grown[who][1].append(logits_RV[row].clone())
        if step == drop_after:
            order = session.keep(range(1, len(owner), 2))
            owner, next_R = [owner[row] for row in order], next_R[order]
        if step + 1 < STEPS:
            logits_RV = session.step(next_R)
    return grown


def _assert_equal(
    found: tuple[list[int], list[torch.Tensor]], wanted: tuple[list[int], list[torch.Tensor]]
) -> None:
    assert found[0] == wanted[0]
    for found_V, wanted_V in zip(found[1], wanted[1], strict=True):
        assert (found_V - wanted_V).abs().max() <= 1e-5 * wanted_V.abs().max()


def test_answers_differ_between_questions_and_steps(asked, uncached):
    # Otherwise the equalities below would hold for a model that ignores what it is asked.
    answers = [tuple(tokens) for tokens, _ in uncached]
    assert len(set(answers)) == len(answers)
    assert all(len(set(answer)) > 2 for answer in answers)


def test_cached_equals_uncached(asked, uncached):
    model, prompts = asked
    for prompt, wanted in zip(prompts, uncached, strict=True):
        _assert_equal(_grown(model, [prompt])[0], wanted)


def test_batched_equals_single(asked, uncached):
    model, prompts = asked
    for found, wanted in zip(_grown(model, prompts), uncached, strict=True):
        _assert_equal(found, wanted)


def test_rows_that_leave_the_batch_do_not_change_the_others(asked, uncached):
    model, prompts = asked
    grown = _grown(model, prompts, drop_after=3)
    for found, wanted in zip(grown[1::2], uncached[1::2], strict=True):
        _assert_equal(found, wanted)
    for found, wanted in zip(grown[::2], uncached[::2], strict=True):
        _assert_equal(found, (wanted[0][:4], wanted[1][:4]))


def test_prefill_in_pieces_equals_prefill_at_once(asked, uncached):
    model, prompts = asked
    lengths = [prompt.outline.tokens for prompt in prompts]
    # A budget at which a later prompt joins an earlier pack, so rows are not filled in order.
    budget = next(
        tokens
        for tokens in range(max(lengths), sum(lengths))
        if sorted(flat := list(chain(*plan_packs(lengths, tokens)))) != flat
    )
    grown = _grown(model, prompts, prefill_tokens=budget)
    for found, wanted in zip(grown, uncached, strict=True):
        _assert_equal(found, wanted)


@pytest.mark.parametrize("batch", [1, 2, 4, 6])
def test_generate_gives_answers_in_order_whatever_the_batch(asked, uncached, batch):
    model, prompts = asked
    answers = [
        answer
        for start in range(0, len(prompts), batch)
        for answer in generate(
            model, prompts[start : start + batch], max_new_tokens=STEPS, end_ids=()
        )
    ]
    assert answers == [tokens for tokens, _ in uncached]


def test_one_token_is_enough(asked, uncached):
    model, prompts = asked
    found = generate(model, prompts, max_new_tokens=1, end_ids=())
    assert found == [tokens[:1] for tokens, _ in uncached]


def test_answers_end_with_the_first_end_token(asked, uncached):
    model, prompts = asked
    # Tokens that really come, at different steps of different answers.
    end_ids = {uncached[0][0][0], uncached[1][0][2], uncached[2][0][4], uncached[3][0][6]}
    wanted = []
    for tokens, _ in uncached:
        stop = next((i for i, token in enumerate(tokens) if token in end_ids), STEPS - 1)
        wanted.append(tokens[: stop + 1])
    assert len({len(answer) for answer in wanted}) > 2, wanted
    found = generate(model, prompts, max_new_tokens=STEPS, end_ids=tuple(end_ids))
    assert found == wanted


def test_generation_in_bfloat16_runs_through_the_same_path(asked):
    model, prompts = asked
    narrow = copy.deepcopy(model).to(torch.bfloat16)
    answers = generate(narrow, prompts, max_new_tokens=3, end_ids=())
    assert [len(answer) for answer in answers] == [3] * len(prompts)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05), (torch.float16, 0.01)]
)
def test_batched_and_cached_on_a_card_equals_single_and_uncached(
    tmp_path, family, dtype, tolerance, monkeypatch
):
    # Several recordings, and recordings for fewer rows after some have left.
    monkeypatch.setattr(engine, "EVEN", 4)
    # The tokens of one are given to the other: in 16 bits near ties would lead them apart.
    tiny = ModelFolder(make_tiny(tmp_path / "tiny", family))
    model = load_model(tiny, dtype, torch.device("cuda")).eval()
    prompts = [Renderer(tiny).prompt(question) for question in mixed_questions(tmp_path)]
    single = [generate_uncached(model, prompt, STEPS) for prompt in prompts]
    spoken = [tokens for tokens, _ in single]
    for found, wanted in zip(_grown(model, prompts, 3, spoken=spoken), single, strict=True):
        assert len(found[1]) in (4, STEPS)
        for found_V, wanted_V in zip(found[1], wanted[1], strict=False):
            difference = (found_V.float() - wanted_V.float()).abs().max()
            assert difference <= tolerance * wanted_V.abs().max()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_generation_leaves_no_memory_behind(tmp_path):
    tiny = ModelFolder(make_tiny(tmp_path / "tiny"))
    model = load_model(tiny, torch.bfloat16, torch.device("cuda")).eval()
    prompts = [Renderer(tiny).prompt(question) for question in mixed_questions(tmp_path)]
    generate(model, prompts, max_new_tokens=STEPS, end_ids=())
    gc.collect()
    gc.disable()
    try:
        before = torch.cuda.memory_allocated()
        generate(model, prompts, max_new_tokens=STEPS, end_ids=())
        assert torch.cuda.memory_allocated() == before
    finally:
        gc.enable()
