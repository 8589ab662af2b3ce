"""Evaluation with an environment: the same episodes as in training, their scores and pages."""

import base64
import io
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_model import create_tiny_model

from finesight.encode.renderer import NativeRenderer
from finesight.environment_components import EpisodeSettings
from finesight.errors import UserError
from finesight.evaluate.custom_metric import ENVIRONMENT_COPY
from finesight.evaluate.generation_eval import (
    evaluate,
    find_episode_settings,
    predict_answers,
)
from finesight.evaluate.prediction_file import read_predictions
from finesight.infer import prediction
from finesight.infer.prediction import FollowUp
from finesight.infer.request import GeneratedToken, GenerationRequest
from finesight.model_folder import ModelFolder
from finesight.operations.evaluation import predict
from finesight.report.examples import Example, ExampleDataBuilder, read_turns
from finesight.samples.image_file import CorruptImageError
from finesight.samples.sample import LocatedSample, Message, Sample, ToolCallPart
from finesight.settings.config import EvalSettings

ENVIRONMENT = """
from PIL import Image

class Paint:
    def reset(self, id, references, seed, images):
        self.answer = references
        self.seed = seed
        self.color = None
        if id == "broken":
            raise ValueError("no canvas")

    def paint(self, color: str) -> Image.Image:
        '''Paint an image.

        Args:
            color: Name of the color.
        '''
        self.color = color
        return ["painted", Image.new("RGB", (600, 300), color)]

    def get_reward(self):
        return 2.0 * (self.color == self.answer[0])
"""

CALL = ToolCallPart(name="paint", arguments={"color": "red"}).to_text()


@pytest.fixture
def episodes(tmp_path) -> EpisodeSettings:
    (tmp_path / "paint.py").write_text(ENVIRONMENT)
    return EpisodeSettings(environment=f"{tmp_path / 'paint.py'}:Paint")


def make_samples(folder: Path) -> list[LocatedSample]:
    samples = []
    for name, answer in (("a", "red"), ("b", "blue"), ("broken", "red"), ("d", "red")):
        messages = (
            Message(role="user", content="Which?"),
            Message(role="assistant", content=answer),
        )
        samples.append(LocatedSample(Sample(id=name, messages=messages), folder))
    return samples


@pytest.fixture
def answer_with(monkeypatch, tmp_path) -> Callable[..., NativeRenderer]:
    """Replace the engine by given answers of each episode."""
    renderer = NativeRenderer(ModelFolder(create_tiny_model(tmp_path / "tiny")))

    def tokenize(text: str) -> list[GeneratedToken]:
        ids = [*renderer.tokenizer.encode(text), renderer.end_ids[0]]
        return [GeneratedToken(one, -1.0) for one in ids]

    def script(*answers: str) -> NativeRenderer:
        def complete(
            engine: object,
            requests: Iterable[tuple[int, GenerationRequest]],
            batch_size: int,
            on_progress: object = None,
            follow_up: FollowUp | None = None,
        ) -> Iterator[tuple[int, Any, list[GeneratedToken]]]:
            for index, request in requests:
                further: GenerationRequest | None = request
                for text in answers:
                    if further is None:  # The environment failed.
                        break
                    tokens = tokenize(text)
                    if follow_up is not None:
                        further = follow_up(index, further, tokens).result()
                yield index, request.prompt.tokenized, tokens

        monkeypatch.setattr(prediction, "iter_completions", complete)
        monkeypatch.setattr(prediction, "build_engine", lambda *args: None)
        return renderer

    return script


class NoModel:
    """Model whose answers are scripted."""

    training = False

    def eval(self) -> None:
        pass

    def train(self, mode: bool) -> None:
        pass


def test_evaluation_scores_episodes(episodes, answer_with, tmp_path):
    """The reward has an interval, failed episodes are noted, and pages show crops."""
    file = tmp_path / "predictions.jsonl"
    settings = EvalSettings.model_validate({"metric": "qa"})
    result = evaluate(
        NoModel(),  # type: ignore[arg-type]  # its answers are scripted
        answer_with(CALL, "red"),
        make_samples(tmp_path),
        settings,
        lambda content: file.write_bytes(content),  # type: ignore[arg-type, return-value]
        episodes=episodes,
    )
    # Of four episodes, two have the reward 2, one has 0, and one failed.
    assert result.scores["environment_reward"] == pytest.approx(4 / 3)
    assert result.intervals["environment_reward"] is not None
    assert (
        result.notes["environment_reward"] == "without 1 episode whose environment gave no reward"
    )
    assert result.scores["exact"] == 0.5
    assert "environment_reward" in result.as_table()
    saved = read_predictions(file)
    assert [one.case.environment_reward for one in saved] == [2.0, 0.0, None, 2.0]
    assert [one.scores.get("environment_reward") for one in saved] == [2.0, 0.0, None, 2.0]
    record = saved[0].record["episode"]
    assert [turn["role"] for turn in record["turns"]] == ["assistant", "tool", "assistant"]
    turns = read_turns(saved[0].record)
    assert turns[0]["parts"][0]["text"].startswith("<tool_call>")
    assert turns[1]["parts"][0] == {"text": "painted"}
    assert turns[1]["parts"][1]["image"].startswith("data:image/jpeg;base64,")
    assert "no canvas" in saved[2].record["episode"]["error"]
    # Addresses of a received file are not loaded.
    record["turns"][1]["content"][1]["image"] = "https://example.com/a.jpg"
    assert read_turns(saved[0].record)[1]["parts"] == [{"text": "painted"}]


def test_pages_limit_the_images_of_episodes():
    def make_url(side: int) -> str:
        buffer = io.BytesIO()
        Image.new("RGB", (side, 2)).save(buffer, "JPEG")
        return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"

    small = make_url(256)
    urls = [small, make_url(257), "data:image/jpeg;base64,AAAA", small]
    content = [{"type": "image", "image": url} for url in urls]
    turns = [{"role": "tool", "content": content}, {"role": "assistant", "content": []}]
    line = {"episode": {"turns": turns}}
    assert read_turns(line)[0]["parts"] == [{"image": small}] * 2
    assert read_turns(line, 2 * len(small) - 1)[0]["parts"] == [{"image": small}]
    examples = [Example((None, {"id": "a", **line}), (), "right", 0.0, 0, False) for _ in range(3)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("finesight.report.examples.MAX_TURN_BYTES", 3 * len(small))
        data = ExampleDataBuilder((), False).build(examples)["examples"]
    counts = [len(one["predictions"][1]["turns"][0]["parts"]) for one in data]
    assert counts == [2, 1, 0]


def test_samples_without_an_environment_are_predicted(episodes, answer_with, tmp_path):
    """Predictions need no reference, but an environment receives those that exist."""
    samples = []
    for located in make_samples(tmp_path)[:3]:
        changes = {"label": False, "references": () if located.sample.id == "a" else ("red",)}
        samples.append(replace(located, sample=located.sample.model_copy(update=changes)))
    renderer = answer_with(CALL, "red")
    predictions = predict_answers(
        NoModel(),  # type: ignore[arg-type]
        renderer,
        samples,
        max_new_tokens=100,
        batch_size=2,
        episodes=episodes,
    )
    records = [one.episode for one in predictions]
    assert [record and record.reward for record in records] == [None, 2.0, None]


def test_episode_of_a_corrupt_image_is_left_out(episodes, answer_with, tmp_path, monkeypatch):
    """An image that becomes unreadable after the memory was full does not shift the others."""
    renderer = answer_with(CALL, "red")
    complete = prediction.iter_completions
    corrupt: list[int] = []

    def fail_once(engine: object, requests: Any, *args: Any) -> Any:
        if not corrupt:
            list(complete(engine, requests, *args))  # type: ignore[arg-type]
            corrupt.append(0)
            raise torch.OutOfMemoryError
        yield from complete(engine, requests, *args)  # type: ignore[arg-type]

    def load(tokenized: Any) -> Any:
        if corrupt and tokenized is first[0]:
            raise CorruptImageError("truncated", where="a.png")
        first.append(tokenized)
        return load_patches(tokenized)

    first: list[Any] = []
    load_patches = renderer.load_patches
    monkeypatch.setattr(renderer, "load_patches", load)
    monkeypatch.setattr(prediction, "iter_completions", fail_once)
    model = NoModel()
    model.capabilities = SimpleNamespace(batches=True)  # type: ignore[attr-defined]
    skipped = []
    predictions = predict_answers(
        model,  # type: ignore[arg-type]
        renderer,
        make_samples(tmp_path),
        max_new_tokens=100,
        batch_size=1 << 10,
        on_corrupt_image=lambda index, error: skipped.append(index),
        episodes=episodes,
    )
    assert len(skipped) == 1
    assert len(predictions) == 3
    for one in predictions:
        assert one.episode is not None
        assert one.episode.reward == {"b": 0.0, "broken": None}.get(one.id, 2.0)


def test_answers_without_an_environment_have_no_reward(answer_with, tmp_path):
    settings = EvalSettings.model_validate({"metric": "qa"})
    renderer = answer_with("red")
    result = evaluate(NoModel(), renderer, make_samples(tmp_path), settings)  # type: ignore[arg-type]
    assert "environment_reward" not in result.scores
    assert "episode" not in result.predictions[0].as_json()


def test_environment_is_that_of_the_recipe_or_the_option(episodes, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    recipe = {
        "model": "finesight-tiny",
        "data": {"train": "train.jsonl"},
        "train": {
            "objective": "grpo",
            "grpo": {
                "environment": episodes.environment,
                "max_completion_length": 77,
                "tool_timeout": 3,
                "max_tool_calling_iterations": 2,
            },
        },
        "rewards": ["environment"],
        "output_dir": str(run),
    }
    (run / "recipe.yaml").write_text(json.dumps(recipe))
    found = find_episode_settings(str(run))
    assert found == EpisodeSettings(
        environment=episodes.environment,
        max_tool_calling_iterations=2,
        tool_timeout=3.0,
        turn_timeout=6.0,
        max_tokens=77,
    )
    # The copy is the code with which the run was trained.
    (run / ENVIRONMENT_COPY).write_text(ENVIRONMENT)
    copied = find_episode_settings(str(run), max_new_tokens=9)
    assert copied is not None
    assert copied.environment == f"{run / ENVIRONMENT_COPY}:Paint"
    assert copied.max_tokens == 9
    assert find_episode_settings(str(run), "none") is None
    other = find_episode_settings(str(run), "image_zoom_in_tool")
    assert other is not None
    assert (other.environment, other.max_tokens) == ("image_zoom_in_tool", 77)
    assert find_episode_settings("finesight-tiny") is None
    for objective in (["grpo"], {}):
        (run / "recipe.yaml").write_text(json.dumps({"train": {"objective": objective}}))
        assert find_episode_settings(str(run)) is None
    assert find_episode_settings("finesight-tiny", "a.py:A") == EpisodeSettings(
        environment="a.py:A"
    )


def test_predictions_of_a_received_run_need_trust(episodes, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    run = tmp_path / "run"
    run.mkdir()
    for name in ("manifest.json", "recipe.yaml"):
        (run / name).write_text("{}")
    (run / "environment.py").write_text(f"{ENVIRONMENT}\n# received\n")
    recipe = {
        "model": "finesight-tiny",
        "data": {"train": "train.jsonl"},
        "train": {"objective": "grpo", "grpo": {"environment": "environment.py:Paint"}},
        "rewards": ["environment"],
        "output_dir": str(run),
    }
    (run / "recipe.yaml").write_text(json.dumps(recipe))
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="an untrusted program in a run folder") as caught:
        predict(str(run), [tmp_path / "a.png"], prompt="Which?")
    assert caught.value.where == str(run / "environment.py")
    assert "--environment none" in str(caught.value.remedy)
    # Another file that the recipe names, such as an uploaded one, is no better.
    (run / "environment.py").rename(tmp_path / "uploaded.py")
    recipe["train"] = {
        "objective": "grpo",
        "grpo": {"environment": f"{tmp_path / 'uploaded.py'}:Paint"},
    }
    (run / "recipe.yaml").write_text(json.dumps(recipe))
    with pytest.raises(UserError, match="an untrusted program") as caught:
        predict(str(run), [tmp_path / "a.png"], prompt="Which?")
    assert caught.value.where == str(tmp_path / "uploaded.py")
