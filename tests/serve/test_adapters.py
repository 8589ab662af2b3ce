"""Several adapters over one base, chosen by the model that a request names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from openai import NotFoundError
from serving import Running, asked, data_url, idle, image, png, running
from tuned import TUNES, randomise

from finesight.config import Tune
from finesight.data.jsonl import Located
from finesight.data.sample import ImagePart, Message, Sample, TextPart
from finesight.hub import ModelFolder
from finesight.infer.load import load_answerer, load_choice
from finesight.infer.predict import predict
from finesight.model.adapter import write_adapter
from finesight.model.lora import adapters
from finesight.model.parts import apply_tuning
from finesight.model.tiny import make_tiny
from finesight.model.weights import load_model

NAMES = ("tickets", "formulas")
PICTURE = png(84, 84, seed=2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base, and adapters of different parts that change what it says."""
    folder = tmp_path_factory.mktemp("adapters")
    base = make_tiny(folder / "base")
    for name, how in zip(NAMES, ("language", "all parts"), strict=True):
        model = load_model(ModelFolder(base), torch.float32, torch.device("cpu"))
        apply_tuning(model, Tune.model_validate(TUNES[how]), seed=0)
        randomise(factor for _, _, one in adapters(model) for factor in one.parameters())
        (folder / name).mkdir()
        write_adapter(folder / name, model.eval(), base=str(base))
    return {name: folder / name for name in (*NAMES, "base")}


@pytest.fixture(scope="module")
def several(folders, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    first, *more = (str(folders[name]) for name in NAMES)
    answerer = load_choice(first, more, "cpu", "fp32")
    with running(answerer, tmp_path_factory.mktemp("several")) as server:
        yield server


def test_each_answers_as_it_does_alone(several, folders, tmp_path):
    client = several.client()
    assert [model.id for model in client.models.list()] == [*NAMES, "base"]
    (tmp_path / "a.png").write_bytes(PICTURE)
    parts = (ImagePart(image="a.png"), TextPart(text="What is it?"))
    sample = Located(Sample(id="a", messages=(Message(role="user", content=parts),)), tmp_path)
    answers = []
    for name, folder in folders.items():
        alone = load_answerer(str(folder), "cpu", "fp32")
        (expected,) = predict(alone.model, alone.renderer, [sample], max_new_tokens=12, batch=1)
        found = client.chat.completions.create(
            model=name, messages=asked(image(data_url(PICTURE)), "What is it?"), max_tokens=12
        )
        assert found.model == name
        assert found.choices[0].message.model_extra["raw"] == expected.raw
        answers.append(expected.raw)
    assert len(set(answers)) == 3
    with pytest.raises(NotFoundError):
        client.models.retrieve("other")
    idle(several)
