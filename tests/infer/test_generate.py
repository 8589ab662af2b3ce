from __future__ import annotations

from dataclasses import replace

import torch
from engine_fixtures import make_mixed_questions, make_sample
from tiny_model import create_tiny_model

from finesight.encode.renderer import NativeRenderer
from finesight.infer.engine import generate
from finesight.infer.prediction import predict
from finesight.model.weights_io import load_model
from finesight.model_folder import ModelFolder


def test_progress_callback_counts_finished_answers(tmp_path):
    tiny = ModelFolder(create_tiny_model(tmp_path / "tiny"))
    model, renderer = (
        load_model(tiny, torch.float32, torch.device("cpu")).eval(),
        NativeRenderer(tiny),
    )
    prompts = [renderer.encode_prompt(question) for question in make_mixed_questions(tmp_path)]
    result: list[int] = []
    answers = generate(model, prompts, max_new_tokens=4, end_ids=(), on_progress=result.append)
    assert sum(result) == len(prompts) == len(answers)
    assert generate(model, [], max_new_tokens=4, end_ids=()) == []


def test_generation_stops_at_max_positions(tmp_path):
    """Check that no KV cache is reserved for tokens that are never generated."""
    tiny = ModelFolder(create_tiny_model(tmp_path / "tiny"))
    model, renderer = (
        load_model(tiny, torch.float32, torch.device("cpu")).eval(),
        NativeRenderer(tiny),
    )
    requested = [make_sample(name, tmp_path, name) for name in ("Why?", "Why? Why?")]
    prompts = [renderer.encode_prompt(question) for question in requested]
    lengths = [prompt.tokenized.num_tokens for prompt in prompts]
    language = replace(model.config.decoder, max_position_embeddings=max(lengths) + 3)
    model.config = replace(model.config, decoder=language)
    answers = generate(model, prompts, max_new_tokens=10**12, end_ids=())
    full = [tokens + len(answer) for tokens, answer in zip(lengths, answers, strict=True)]
    assert full == [language.max_position_embeddings] * 2
    ended = generate(model, prompts, max_new_tokens=10**12, end_ids=renderer.end_ids)
    found = predict(model, renderer, requested, max_new_tokens=10**12, batch_size=1)
    assert [prediction.num_tokens for prediction in found] == [len(answer) for answer in ended]
