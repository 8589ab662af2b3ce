from __future__ import annotations

from dataclasses import replace

import torch
from asking import ask, mixed_questions

from finesight.encode.render import Renderer
from finesight.hub import ModelFolder
from finesight.infer.generate import generate
from finesight.infer.predict import predict
from finesight.model.tiny import make_tiny
from finesight.model.weights import load_model


def test_being_told_how_many_have_ended(tmp_path):
    tiny = ModelFolder(make_tiny(tmp_path / "tiny"))
    model, renderer = load_model(tiny, torch.float32, torch.device("cpu")).eval(), Renderer(tiny)
    prompts = [renderer.prompt(question) for question in mixed_questions(tmp_path)]
    told: list[int] = []
    answers = generate(model, prompts, max_new_tokens=4, end_ids=(), ended=told.append)
    assert sum(told) == len(prompts) == len(answers)
    assert generate(model, [], max_new_tokens=4, end_ids=()) == []


def test_an_answer_ends_where_the_models_positions_do(tmp_path):
    """However long it may be: there is no room made for what is never said."""
    tiny = ModelFolder(make_tiny(tmp_path / "tiny"))
    model, renderer = load_model(tiny, torch.float32, torch.device("cpu")).eval(), Renderer(tiny)
    asked = [ask(name, tmp_path, name) for name in ("Why?", "Why? Why?")]
    prompts = [renderer.prompt(question) for question in asked]
    lengths = [prompt.outline.tokens for prompt in prompts]
    language = replace(model.geometry.language, positions=max(lengths) + 3)
    model.geometry = replace(model.geometry, language=language)
    answers = generate(model, prompts, max_new_tokens=10**12, end_ids=())
    whole = [tokens + len(answer) for tokens, answer in zip(lengths, answers, strict=True)]
    assert whole == [language.positions] * 2
    ended = generate(model, prompts, max_new_tokens=10**12, end_ids=renderer.end_ids)
    found = predict(model, renderer, asked, max_new_tokens=10**12, batch=1)
    assert [prediction.tokens for prediction in found] == [len(answer) for answer in ended]
