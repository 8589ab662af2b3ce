from __future__ import annotations

import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from asking import ask, mixed_questions, noise

from finesight.data.headers import DamagedPicture
from finesight.data.jsonl import Located
from finesight.data.sample import BoxPart, ImagePart, Message, Sample, TextPart, VideoPart
from finesight.encode.render import Renderer
from finesight.hub import ModelFolder
from finesight.infer.generate import generate
from finesight.infer.predict import Prediction, predict, questions, read_prediction
from finesight.infer.rows import Rows
from finesight.model.network import VisionLanguageModel
from finesight.model.tiny import make_tiny
from finesight.model.weights import load_model


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[VisionLanguageModel, Renderer]:
    folder = ModelFolder(make_tiny(tmp_path_factory.mktemp("model") / "tiny"))
    return load_model(folder, torch.float32, torch.device("cpu")), Renderer(folder)


def test_answers_come_in_order_over_several_batches(loaded, tmp_path):
    model, renderer = loaded
    asked = mixed_questions(tmp_path) * 2
    told: list[int] = []
    found = predict(model, renderer, asked, max_new_tokens=5, batch=5, advance=told.append)
    assert [prediction.id for prediction in found] == [sample.sample.id for sample in asked]
    # Twelve answers of up to five tokens, five at a time.
    assert sum(told) == len(asked)
    assert 12 < len(told) < 30
    for prediction, sample in zip(found, asked, strict=True):
        prompt = renderer.prompt(sample)
        (ids,) = generate(model, [prompt], max_new_tokens=5, end_ids=renderer.end_ids)
        answer = renderer.answer(ids)
        assert (prediction.answer, prediction.raw) == (answer.text, answer.raw)
        assert prediction.tokens == len(ids)
    assert found[2].prompt == "and thenwhich is larger?"
    assert [path.name for path in found[2].images] == ["b.png", "c.png"]


def test_short_answers_are_made_as_many_at_once_as_asked_for(loaded, tmp_path):
    """Not one more with each step: that would leave most rows idle."""
    model, renderer = loaded
    asked = mixed_questions(tmp_path) * 4
    told: list[int] = []
    predict(model, renderer, asked, max_new_tokens=2, batch=12, advance=told.append)
    assert sum(told) == 24
    assert len(told) < 10


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_in_its_mode_and_answers_without_dropout(loaded, tmp_path, training):
    model, renderer = loaded
    model.train(training)
    seen: list[bool] = []
    handle = model.model.layers[0].register_forward_hook(
        lambda layer, *_: seen.append(layer.training)
    )
    predict(model, renderer, [ask("a", tmp_path, "Why?")], max_new_tokens=2, batch=1)
    handle.remove()
    assert seen
    assert not any(seen)
    assert model.training is training


def test_being_told_can_stop_the_generation(loaded, tmp_path):
    model, renderer = loaded
    model.train()
    told: list[int] = []

    def stop(count: int) -> None:
        told.append(count)
        if len(told) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict(
            model,
            renderer,
            [ask("a", tmp_path, "Why?")],
            max_new_tokens=50,
            batch=1,
            advance=stop,
        )
    assert told == [0, 0, 0]
    assert model.training


def test_no_gradients_are_kept(loaded, tmp_path):
    model, renderer = loaded
    kept: list[bool] = []
    handle = model.model.norm.register_forward_hook(
        lambda *args: kept.append(args[2].requires_grad)
    )
    predict(model, renderer, [ask("a", tmp_path, "Why?")], max_new_tokens=2, batch=1)
    handle.remove()
    assert kept == [False, False]


def test_a_damaged_picture_is_told_or_raised(loaded, tmp_path):
    model, renderer = loaded
    noise(tmp_path / "a.png", 56, 56)
    whole = noise(tmp_path / "cut.png", 200, 200).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    asked = [ask(name, tmp_path, f"{name}.png", "What?") for name in ("a", "cut", "missing", "a")]
    with pytest.raises(DamagedPicture, match=r"missing\.png"):
        predict(model, renderer, asked, max_new_tokens=2, batch=4)
    with pytest.raises(DamagedPicture, match=r"cut\.png"):
        predict(model, renderer, asked[:2], max_new_tokens=2, batch=4)
    told: list[tuple[int, str]] = []
    found = predict(
        model,
        renderer,
        asked,
        max_new_tokens=2,
        batch=4,
        damaged=lambda index, error: told.append((index, str(error))),
    )
    assert [prediction.id for prediction in found] == ["a", "a"]
    # A missing file shows before any picture is decoded, a cut one only then.
    assert [index for index, _ in told] == [2, 1]
    assert "missing.png" in told[0][1]
    assert "cut.png" in told[1][1]


def test_boxes_are_read_for_the_picture_that_the_sample_means(loaded, tmp_path):
    _, renderer = loaded
    noise(tmp_path / "a.png", 100, 200)
    noise(tmp_path / "b.png", 400, 300)
    answer = BoxPart(image=1, label="dog", xyxy=(40, 30, 200, 150))
    sample = ask("s", tmp_path, "a.png", "b.png", "Where?", answer=answer)
    prompt = renderer.prompt(sample)
    spoken = renderer.outline(sample).ids_T[prompt.outline.tokens :].tolist()
    spoken = spoken[: spoken.index(renderer.end_ids[0]) + 1]
    prediction = read_prediction(renderer, sample, prompt.outline, spoken)
    assert prediction.stopped
    (box,) = prediction.boxes
    assert (box.image, box.label) == (1, "dog")
    assert np.allclose(box.xyxy, answer.xyxy, atol=0.5)


def test_videos_are_no_pictures_that_a_box_could_mean(loaded, tmp_path):
    model, renderer = loaded
    noise(tmp_path / "frame.png", 56, 56)
    noise(tmp_path / "a.png", 200, 100)
    content = (
        VideoPart(frames=("frame.png", "frame.png")),
        ImagePart(image="a.png"),
        TextPart(text="Where?"),
    )
    sample = Located(Sample(id="s", messages=(Message(role="user", content=content),)), tmp_path)
    (prediction,) = predict(model, renderer, [sample], max_new_tokens=1, batch=1)
    assert prediction.images == (tmp_path / "a.png",)
    spoken = renderer.tokenizer.encode("(100,100),(500,500)")
    prompt = renderer.prompt_outline(sample)
    (box,) = read_prediction(renderer, sample, prompt, list(spoken)).boxes
    assert (box.image, box.xyxy) == (0, (20, 10, 100, 50))


def test_questions_check_their_pictures_at_once(tmp_path):
    path = noise(tmp_path / "a.png", 30, 30)
    (asked,) = questions([path], "What is it?")
    assert asked.path(asked.sample.messages[0].content[0].image) == path
    assert len(questions([path, path], "What is it?")) == 2
    (text_only,) = questions([], "Why?")
    assert len(text_only.sample.messages[0].content) == 1
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(DamagedPicture, match=r"text\.png: not a picture"):
        questions([path, tmp_path / "text.png"], "What is it?")


@pytest.mark.parametrize(
    ("images", "expected"),
    [((), None), (("a.png",), "a.png"), (("a.png", "b.png"), ["a.png", "b.png"])],
)
def test_as_json_and_text(images, expected):
    prediction = Prediction(
        id="s",
        images=tuple(map(Path, images)),
        prompt="Where?",
        answer="there",
        raw="there<|im_end|>",
        boxes=(BoxPart(label="dog", xyxy=(1, 2.3456, 3, 4)),),
        tokens=2,
        stopped=False,
    )
    assert prediction.as_json() == {
        "id": "s",
        "image": expected,
        "prompt": "Where?",
        "answer": "there",
        "raw": "there<|im_end|>",
        "boxes": [{"image": 0, "label": "dog", "xyxy": [1, 2.35, 3, 4]}],
    }
    text = prediction.as_text()
    assert "there [cut off after 2 tokens]\n  box 1.0, 2.3, 3.0, 4.0  dog" in text
    assert all(name in text for name in images)


@pytest.mark.parametrize("room", [3, 1, 0])
def test_where_memory_is_full_fewer_are_answered_at_once(loaded, tmp_path, room):
    """Played by rows that refuse to grow when they are more than so many."""
    model, renderer = loaded
    whole = noise(tmp_path / "cut.png", 200, 200).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    asked = [*mixed_questions(tmp_path), ask("damaged", tmp_path, "cut.png", "What?")]
    damaged: list[int] = []
    wanted = {"max_new_tokens": 5, "damaged": lambda i, error: damaged.append(i)}
    expected = predict(model, renderer, asked, batch=7, **wanted)
    assert damaged == [6]
    real = Rows.step
    told, done, refused = [], [], []

    def step(self, rows, longest):
        assert all(gone() is None for gone in refused), "two caches at once"
        if rows > room:
            refused.append(weakref.ref(self))
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(self, rows, longest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rows, "step", step)
        wanted |= {"advance": done.append, "fewer": told.append}
        if not room:
            with pytest.raises(torch.OutOfMemoryError):
                predict(model, renderer, asked, batch=7, **wanted)
            assert told == [3, 1]
            return
        found = predict(model, renderer, asked, batch=7, **wanted)
    assert found == expected
    assert told == ([3] if room == 3 else [3, 1])
    assert sum(done) == 6
    assert set(damaged) == {6}
