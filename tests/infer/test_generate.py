from __future__ import annotations

import torch
from asking import mixed_questions

from finesight.encode.render import Renderer
from finesight.hub import ModelFolder
from finesight.infer.generate import generate
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
