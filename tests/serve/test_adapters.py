"""Tests of several adapters of one base model, selected by the model name of a request."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from api_server_fixtures import (
    RunningServer,
    make_data_url,
    make_image_part,
    make_messages,
    make_noise_png,
    run_server,
    wait_until_idle,
)
from lora_fixtures import TUNE_SETTINGS, randomize_parameters
from openai import NotFoundError
from tiny_model import create_tiny_model

from finesight.config import TuneSettings
from finesight.data.jsonl import LocatedSample
from finesight.data.sample import ImagePart, Message, Sample, TextPart
from finesight.errors import UserError
from finesight.infer.model_loader import load_inference_model, load_multi_adapter_model
from finesight.infer.prediction import predict
from finesight.model.lora.layer import iter_adapters
from finesight.model.lora.peft_io import save_adapter
from finesight.model.trainable import configure_tuning
from finesight.model.weights_io import load_model
from finesight.model_folder import ModelFolder

NAMES = ("tickets", "formulas")
IMAGE_BYTES = make_noise_png(84, 84, seed=2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base model, and adapters of different parts that change its answers."""
    folder = tmp_path_factory.mktemp("adapters")
    base = create_tiny_model(folder / "base")
    for name, how in zip(NAMES, ("language", "all parts"), strict=True):
        model = load_model(ModelFolder(base), torch.float32, torch.device("cpu"))
        configure_tuning(model, TuneSettings.model_validate(TUNE_SETTINGS[how]), seed=0)
        randomize_parameters(
            factor for _, _, one in iter_adapters(model) for factor in one.parameters()
        )
        (folder / name).mkdir()
        save_adapter(folder / name, model.eval(), base_model=str(base))
    return {name: folder / name for name in (*NAMES, "base")}


@pytest.fixture(scope="module")
def multi_adapter_server(
    folders, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    first, *more = (str(folders[name]) for name in NAMES)
    inference_model = load_multi_adapter_model(first, more, "cpu", "fp32")
    with run_server(inference_model, tmp_path_factory.mktemp("several")) as server:
        yield server


def test_adapter_named_base_is_rejected(folders, tmp_path):
    """The name selects the base model."""
    named_base = shutil.copytree(folders[NAMES[0]], tmp_path / "base")
    for first, more in ((named_base, ()), (folders[NAMES[1]], (named_base,))):
        with pytest.raises(UserError, match="has the name base, which selects the base model"):
            load_multi_adapter_model(str(first), [str(path) for path in more], "cpu", "fp32")


def test_base_model_among_adapters_is_rejected(folders):
    first, base = str(folders[NAMES[0]]), str(folders["base"])
    with pytest.raises(UserError, match="is the base model, not an adapter"):
        load_multi_adapter_model(first, (base,), "cpu", "fp32")


def test_each_adapter_answers_like_alone(multi_adapter_server, folders, tmp_path):
    client = multi_adapter_server.client()
    assert [model.id for model in client.models.list()] == [*NAMES, "base"]
    (tmp_path / "a.png").write_bytes(IMAGE_BYTES)
    parts = (ImagePart(image="a.png"), TextPart(text="What is it?"))
    sample = LocatedSample(
        Sample(id="a", messages=(Message(role="user", content=parts),)), tmp_path
    )
    answers = []
    for name, folder in folders.items():
        alone = load_inference_model(str(folder), "cpu", "fp32")
        (expected,) = predict(
            alone.model, alone.renderer, [sample], max_new_tokens=12, batch_size=1
        )
        found = client.chat.completions.create(
            model=name,
            messages=make_messages(make_image_part(make_data_url(IMAGE_BYTES)), "What is it?"),
            max_tokens=12,
        )
        assert found.model == name
        assert found.choices[0].message.model_extra["raw_text"] == expected.raw_text
        answers.append(expected.raw_text)
    assert len(set(answers)) == 3
    with pytest.raises(NotFoundError):
        client.models.retrieve("other")
    wait_until_idle(multi_adapter_server)
