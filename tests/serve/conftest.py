"""Shared model and server of the server tests."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from api_server_fixtures import (
    PROMPT,
    RunningServer,
    make_data_url,
    make_image_part,
    make_messages,
    run_server,
)
from openai import OpenAI
from synthetic_tasks.dataset_writer import write_task
from synthetic_tasks.tasks import SyntheticTask

from finesight.infer.model_loader import InferenceModel, load_inference_model


@pytest.fixture(scope="session")
def inference_model() -> InferenceModel:
    return load_inference_model("finesight-tiny", "cpu", "fp32")


@pytest.fixture(scope="session")
def server(
    inference_model: InferenceModel, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    with run_server(inference_model, tmp_path_factory.mktemp("server")) as there:
        yield there


@pytest.fixture(scope="session")
def client(server: RunningServer) -> OpenAI:
    return server.client()


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Synthetic scenes known to the model. The fourth contains one hollow gray hexagon."""
    file = write_task(
        tmp_path_factory.mktemp("drawn") / "scene", SyntheticTask("scene", "built-in"), 4, 7
    )
    return sorted((file.parent / "images").iterdir())


@pytest.fixture(scope="session")
def ask_about_scene(server: RunningServer, scenes: list[Path]) -> Callable[..., Any]:
    """Send a question about a scene, by default with the first image."""

    def ask(client: OpenAI, there: RunningServer = server, **given: Any) -> Any:
        given.setdefault("model", there.service.model_names[0])
        given.setdefault(
            "messages",
            make_messages(make_image_part(make_data_url(scenes[0].read_bytes())), PROMPT),
        )
        given.setdefault("max_tokens", 30)
        return client.chat.completions.create(**given)

    return ask
