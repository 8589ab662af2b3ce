"""Adapters chosen by request = each installed alone = each merged (principle 6)."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from engine_fixtures import RequestEvents, make_mixed_questions, run_engine, step_engine
from lora_fixtures import TUNE_SETTINGS, install_random_adapter
from tiny_model import create_tiny_model

from finesight.data.sample import LocatedSample
from finesight.encode.renderer import NativeRenderer
from finesight.encode.tokenization import EncodedSample
from finesight.infer.engine import Engine
from finesight.infer.inference_service import InferenceService
from finesight.infer.model_loader import InferenceModel, load_multi_adapter_model
from finesight.infer.request import GenerationOptions, GenerationRequest
from finesight.model.linear import FusedLinear, iter_adapters
from finesight.model.lora.merge import merge_adapters
from finesight.model.lora.multi import MultiLora
from finesight.model.lora.peft_io import save_adapter
from finesight.model.vlm import VisionLanguageModel
from finesight.model.weights_io import load_model
from finesight.model_folder import ModelFolder

STEPS = 7
FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "qwen"]
WIDE = {"language": "lora", "lora": {"rank": 3, "alpha": 9}}
ADAPTERS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, TUNE_SETTINGS["all parts"]),
    "two": (2, WIDE),
    "three": (3, TUNE_SETTINGS["merger, vision encoder frozen"]),
}
"""Of different parts, ranks and scales, each with a seed for its numbers."""


class MultiLoraSetup(NamedTuple):
    renderer: NativeRenderer
    questions: list[LocatedSample]
    prompts: list[EncodedSample]
    base: VisionLanguageModel
    multi_lora_model: VisionLanguageModel
    alone: Mapping[str, VisionLanguageModel]


@pytest.fixture(scope="module", params=FAMILIES)
def setup(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> MultiLoraSetup:
    if request.param == "qwen":
        pytest.importorskip("tiktoken")
    folder = tmp_path_factory.mktemp(request.param)
    tiny = ModelFolder(create_tiny_model(folder / "tiny", request.param))
    renderer, questions = NativeRenderer(tiny), make_mixed_questions(folder)
    base = load_model(tiny, torch.float32, torch.device("cpu")).eval()
    alone = {
        name: install_random_adapter(copy.deepcopy(base), *how) for name, how in ADAPTERS.items()
    }
    multi_lora_model = copy.deepcopy(base)
    multi_lora = MultiLora(multi_lora_model)
    for how in ADAPTERS.values():
        install_random_adapter(multi_lora_model, *how)
        multi_lora.collect_adapter()
    multi_lora_model.lora_routing = multi_lora.install()
    prompts = [renderer.encode_prompt(question) for question in questions]
    return MultiLoraSetup(renderer, questions, prompts, base, multi_lora_model, alone)


def _answers(model: VisionLanguageModel, prompts: list[EncodedSample]) -> list[RequestEvents]:
    """Each alone, with log probabilities."""
    found = []
    for prompt in prompts:
        engine = Engine(model, (), max_num_seqs=1, num_cache_tokens=1024)
        ticket = engine.add_request(
            GenerationRequest(prompt=prompt, max_new_tokens=STEPS, logprobs=1)
        )
        found.append(run_engine(engine)[ticket])
    return found


@pytest.fixture(scope="module")
def single_adapter_answers(setup: MultiLoraSetup) -> dict[str | None, list[RequestEvents]]:
    """What each adapter answers where it is the only one, and the base without any."""
    models = {None: setup.base, **setup.alone}
    return {name: _answers(model, setup.prompts) for name, model in models.items()}


def _assert_equal_events(found: RequestEvents, wanted: RequestEvents) -> None:
    assert found.ids == wanted.ids
    for token, other in zip(found.tokens, wanted.tokens, strict=True):
        assert token.logprob == pytest.approx(other.logprob, abs=1e-4)


def test_adapters_give_different_answers(single_adapter_answers):
    # Otherwise the equalities below would hold for a model that knows no adapter.
    for answers in zip(*single_adapter_answers.values(), strict=True):
        assert len({tuple(told.ids) for told in answers}) >= 3


def test_merged_model_answers_like_its_adapter(setup, single_adapter_answers):
    for name, model in setup.alone.items():
        merged = copy.deepcopy(model)
        assert merge_adapters(merged) > 0
        for found, wanted in zip(
            _answers(merged, setup.prompts), single_adapter_answers[name], strict=True
        ):
            _assert_equal_events(found, wanted)


@pytest.mark.parametrize(("max_num_seqs", "late", "seed"), [(1, 0, 0), (5, 0, 1), (24, 1, 2)])
def test_mixed_adapter_batch_matches_single_adapters(
    setup, single_adapter_answers, max_num_seqs, late, seed
):
    """Run all adapters and the base in one batch, in any order, twice.

    The second time uses cached blocks and features, which each adapter has for itself.
    """
    values = {None: None, **{name: n for n, name in enumerate(ADAPTERS)}}
    engine = Engine(setup.multi_lora_model, (), max_num_seqs=max_num_seqs, num_cache_tokens=1 << 14)
    engine._max_pending = late
    order = [(name, n) for name in values for n in range(len(setup.prompts))]
    random.Random(seed).shuffle(order)
    known: list[dict[str | None, int]] = []
    for _ in range(2):
        result: dict[int, RequestEvents] = {}
        tickets = {}
        for name, n in order:
            request = GenerationRequest(
                prompt=setup.prompts[n],
                max_new_tokens=STEPS,
                logprobs=1,
                adapter_index=values[name],
            )
            tickets[engine.add_request(request)] = name, n
            step_engine(engine, result)
        run_engine(engine, result)
        known.append(dict.fromkeys(values, 0))
        for ticket, (name, n) in tickets.items():
            _assert_equal_events(result[ticket], single_adapter_answers[name][n])
            known[-1][name] += result[ticket].num_cached_tokens
    full = sum((prompt.tokenized.num_tokens - 1) // 16 * 16 for prompt in setup.prompts)
    if setup.multi_lora_model.config.decoder.linear_attention is not None:
        # States of linear attention are not cached.
        full = 0
    assert set(known[1].values()) == {full}
    assert max(known[0].values()) <= full
    assert engine.num_free_blocks == engine.num_blocks


def test_service_selects_adapter_by_name(setup, single_adapter_answers):
    names = {name: number for number, name in enumerate(ADAPTERS)} | {"base": None}
    service = InferenceService(
        InferenceModel(setup.multi_lora_model, setup.renderer, names),
        max_num_seqs=6,
        kv_cache_bytes=1 << 24,
    )
    wanted = {
        **{name: single_adapter_answers[name] for name in ADAPTERS},
        "base": single_adapter_answers[None],
    }
    end_ids = setup.renderer.end_ids
    try:
        assert service.model_names == (*ADAPTERS, "base")
        options = {name: GenerationOptions(max_new_tokens=STEPS, model=name) for name in names}
        requested_adapter = [
            (service.submit(question, options[name]), wanted[name][n].ids)
            for n, question in enumerate(setup.questions)
            for name in names
        ]
        first = service.submit(setup.questions[0], GenerationOptions(max_new_tokens=STEPS))
        for answering, ids in [*requested_adapter, (first, wanted["one"][0].ids)]:
            list(answering)
            ends = [at for at, token in enumerate(ids) if token in end_ids]
            assert answering.output_ids == (ids[: ends[0] + 1] if ends else ids)
    finally:
        service.close()


@pytest.fixture
def write_published(tmp_path: Path) -> Callable[[str], Path]:
    """Adapters in files, beside their base."""
    tiny = create_tiny_model(tmp_path / "tiny")

    def publish(name: str) -> Path:
        model = load_model(ModelFolder(tiny), torch.float32, torch.device("cpu"))
        folder = tmp_path / name
        folder.mkdir()
        save_adapter(folder, install_random_adapter(model, *ADAPTERS[name]), base_model=str(tiny))
        return folder

    return publish


def test_adapters_from_files_match_written_ones(write_published, tmp_path):
    """By their folders' names, whatever order they are given in, and the base beside them."""
    folders = {name: write_published(name) for name in ("two", "one")}
    choice = load_multi_adapter_model(str(folders["two"]), (str(folders["one"]),), "cpu", "fp32")
    assert dict(choice.adapters) == {"two": 0, "one": 1, "base": None}
    prompts = [
        choice.renderer.encode_prompt(question) for question in make_mixed_questions(tmp_path)
    ]
    base = load_model(ModelFolder(tmp_path / "tiny"), torch.float32, torch.device("cpu")).eval()
    for name, number in choice.adapters.items():
        alone = copy.deepcopy(base)
        if number is not None:
            install_random_adapter(alone, *ADAPTERS[name])
        engine = Engine(choice.model, (), max_num_seqs=6, num_cache_tokens=1024)
        result: dict[int, RequestEvents] = {}
        for prompt in prompts:
            engine.add_request(
                GenerationRequest(
                    prompt=prompt, max_new_tokens=STEPS, logprobs=1, adapter_index=number
                )
            )
        run_engine(engine, result)
        wanted = _answers(alone, prompts)
        for ticket, found in result.items():
            _assert_equal_events(found, wanted[ticket])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("use_cuda_graphs", [False, True])
def test_multi_lora_on_gpu(setup, single_adapter_answers, use_cuda_graphs):
    """Check that graph replay uses the adapters of the current step."""
    model = _to_device(setup, torch.device("cuda"))
    engine = Engine(
        model, (), max_num_seqs=24, num_cache_tokens=1 << 14, use_cuda_graphs=use_cuda_graphs
    )
    values = {None: None, **{name: n for n, name in enumerate(ADAPTERS)}}
    tickets = {}
    for name, number in values.items():
        for n, prompt in enumerate(setup.prompts):
            request = GenerationRequest(
                prompt=prompt, max_new_tokens=STEPS, logprobs=1, adapter_index=number
            )
            tickets[engine.add_request(request)] = name, n
    result = run_engine(engine)
    for ticket, (name, n) in tickets.items():
        _assert_equal_events(result[ticket], single_adapter_answers[name][n])


def _to_device(overrides: MultiLoraSetup, device: torch.device) -> VisionLanguageModel:
    """Copy the base and all adapters to a device, as multi-LoRA."""
    model = copy.deepcopy(overrides.base).to(device)
    multi_lora = MultiLora(model)
    for name in ADAPTERS:
        for path, _, adapter in iter_adapters(overrides.alone[name]):
            group = model.get_submodule(path)
            assert isinstance(group, FusedLinear), path
            group.adapter = copy.deepcopy(adapter).to(device)
        multi_lora.collect_adapter()
    model.lora_routing = multi_lora.install()
    return model.eval()
