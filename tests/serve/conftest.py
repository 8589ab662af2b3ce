"""One model for all tests here, and one server for those that leave it as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI
from serving import QUESTION, Running, asked, data_url, image, running

from finesight.infer.load import Answerer, load_answerer
from finesight.synth.tasks import Task
from finesight.synth.writing import write_task


@pytest.fixture(scope="session")
def answerer() -> Answerer:
    return load_answerer("finesight-tiny", "cpu", "fp32")


@pytest.fixture(scope="session")
def server(answerer: Answerer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(answerer, tmp_path_factory.mktemp("server")) as there:
        yield there


@pytest.fixture(scope="session")
def client(server: Running) -> OpenAI:
    return server.client()


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Drawn scenes that the model can speak of; the fourth holds one hollow gray hexagon."""
    file = write_task(tmp_path_factory.mktemp("drawn") / "scene", Task("scene", "built-in"), 4, 7)
    return sorted((file.parent / "pictures").iterdir())


@pytest.fixture(scope="session")
def plain(server: Running, scenes: list[Path]) -> Callable[..., Any]:
    """Asks about a scene, unless told otherwise."""

    def ask(client: OpenAI, there: Running = server, **given: Any) -> Any:
        given.setdefault("model", there.service.names[0])
        given.setdefault("messages", asked(image(data_url(scenes[0].read_bytes())), QUESTION))
        given.setdefault("max_tokens", 30)
        return client.chat.completions.create(**given)

    return ask
