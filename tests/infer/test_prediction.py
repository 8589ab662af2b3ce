from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_fixtures import make_mixed_questions, make_sample, write_noise_image
from PIL import Image
from tiny_model import create_tiny_model
from video_fixtures import save_frames, write_video

from finesight.data.image_header import CorruptImageError
from finesight.data.sample import (
    BoxPart,
    ImagePart,
    LocatedSample,
    Message,
    Sample,
    TextPart,
    VideoPart,
)
from finesight.data.video_file import iter_video_frames
from finesight.encode.renderer import NativeRenderer
from finesight.infer.engine import generate
from finesight.infer.model_runner import ModelRunner
from finesight.infer.prediction import (
    Prediction,
    build_prediction,
    build_questions,
    draw_boxes,
    predict,
    save_annotated_images,
)
from finesight.model.vlm import VisionLanguageModel
from finesight.model.weights_io import load_model
from finesight.model_folder import ModelFolder


@pytest.fixture(scope="module")
def loaded_model(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[VisionLanguageModel, NativeRenderer]:
    folder = ModelFolder(create_tiny_model(tmp_path_factory.mktemp("model") / "tiny"))
    return load_model(folder, torch.float32, torch.device("cpu")), NativeRenderer(folder)


def test_predictions_are_ordered_across_batches(loaded_model, tmp_path):
    model, renderer = loaded_model
    requested = make_mixed_questions(tmp_path) * 2
    result: list[int] = []
    found = predict(
        model, renderer, requested, max_new_tokens=5, batch_size=5, on_progress=result.append
    )
    assert [prediction.id for prediction in found] == [sample.sample.id for sample in requested]
    # Twelve answers of up to five tokens, five at a time.
    assert sum(result) == len(requested)
    assert 12 < len(result) < 30
    for prediction, sample in zip(found, requested, strict=True):
        prompt = renderer.encode_prompt(sample)
        (ids,) = generate(model, [prompt], max_new_tokens=5, end_ids=renderer.end_ids)
        answer = renderer.decode_completion(ids)
        assert (prediction.answer, prediction.raw_text) == (answer.text, answer.raw_text)
        assert prediction.num_tokens == len(ids)
    assert found[2].prompt == "and thenwhich is larger?"
    assert [path.name for path in found[2].images] == ["b.png", "c.png"]


def test_short_answers_use_full_batches(loaded_model, tmp_path):
    """Check that more than one request is submitted per step, so that the batch is full."""
    model, renderer = loaded_model
    requested = make_mixed_questions(tmp_path) * 4
    result: list[int] = []
    predict(model, renderer, requested, max_new_tokens=2, batch_size=12, on_progress=result.append)
    assert sum(result) == 24
    assert len(result) < 10


@pytest.mark.parametrize("training", [True, False])
def test_training_mode_is_restored_and_dropout_disabled(loaded_model, tmp_path, training):
    model, renderer = loaded_model
    model.train(training)
    seen: list[bool] = []
    handle = model.model.layers[0].register_forward_hook(
        lambda layer, *_: seen.append(layer.training)
    )
    predict(model, renderer, [make_sample("a", tmp_path, "Why?")], max_new_tokens=2, batch_size=1)
    handle.remove()
    assert seen
    assert not any(seen)
    assert model.training is training


def test_training_mode_is_restored_if_a_prompt_is_invalid(loaded_model, tmp_path):
    model, renderer = loaded_model
    model.train()
    samples = [make_sample("a", tmp_path, "missing.png", "Why?")]
    with pytest.raises(CorruptImageError):
        predict(model, renderer, samples, max_new_tokens=2, batch_size=1)
    assert model.training


def test_callback_can_stop_generation(loaded_model, tmp_path):
    model, renderer = loaded_model
    model.train()
    result: list[int] = []

    def stop(count: int) -> None:
        result.append(count)
        if len(result) == 3:
            raise KeyboardInterrupt

    samples, options = [make_sample("a", tmp_path, "Why?")], {"max_new_tokens": 50, "batch_size": 1}
    with pytest.raises(KeyboardInterrupt):
        predict(model, renderer, samples, **options, on_progress=stop)
    assert result == [0, 0, 0]
    assert model.training


def test_no_gradients_are_stored(loaded_model, tmp_path):
    model, renderer = loaded_model
    retained: list[bool] = []
    handle = model.model.norm.register_forward_hook(
        lambda *args: retained.append(args[2].requires_grad)
    )
    predict(model, renderer, [make_sample("a", tmp_path, "Why?")], max_new_tokens=2, batch_size=1)
    handle.remove()
    assert retained == [False, False]


def test_damaged_image_is_reported_or_raised(loaded_model, tmp_path):
    model, renderer = loaded_model
    write_noise_image(tmp_path / "a.png", 56, 56)
    full = write_noise_image(tmp_path / "cut.png", 200, 200).read_bytes()
    (tmp_path / "cut.png").write_bytes(full[: len(full) // 2])
    requested = [
        make_sample(name, tmp_path, f"{name}.png", "What?") for name in ("a", "cut", "missing", "a")
    ]
    options: dict[str, Any] = {"max_new_tokens": 2, "batch_size": 4}
    for samples, name in ((requested, "missing"), (requested[:2], "cut")):
        with pytest.raises(CorruptImageError, match=rf"{name}\.png"):
            predict(model, renderer, samples, **options)
    result: list[tuple[int, str]] = []
    options["on_corrupt_image"] = lambda index, error: result.append((index, str(error)))
    found = predict(model, renderer, requested, **options)
    assert [prediction.id for prediction in found] == ["a", "a"]
    # A missing file is reported before any image is decoded, a truncated one while decoding.
    assert [index for index, _ in result] == [2, 1]
    assert "missing.png" in result[0][1]
    assert "cut.png" in result[1][1]


def test_boxes_refer_to_the_target_image(loaded_model, tmp_path):
    _, renderer = loaded_model
    write_noise_image(tmp_path / "a.png", 100, 200)
    write_noise_image(tmp_path / "b.png", 400, 300)
    answer = BoxPart(image=1, label="dog", xyxy=(40, 30, 200, 150))
    sample = make_sample("s", tmp_path, "a.png", "b.png", "Where?", answer=answer)
    prompt = renderer.encode_prompt(sample)
    answer_ids = renderer.tokenize(sample).ids_T[prompt.tokenized.num_tokens :].tolist()
    answer_ids = answer_ids[: answer_ids.index(renderer.end_ids[0]) + 1]
    prediction = build_prediction(renderer, sample, prompt.tokenized, answer_ids)
    assert prediction.finish_reason == "stop"
    (box,) = prediction.boxes
    assert (box.image, box.label) == (1, "dog")
    assert np.allclose(box.xyxy, answer.xyxy, atol=0.5)


def test_videos_are_no_target_images(loaded_model, tmp_path):
    model, renderer = loaded_model
    write_noise_image(tmp_path / "frame.png", 56, 56)
    write_noise_image(tmp_path / "a.png", 200, 100)
    content = (
        VideoPart(frames=("frame.png", "frame.png")),
        ImagePart(image="a.png"),
        TextPart(text="Where?"),
    )
    sample = LocatedSample(
        Sample(id="s", messages=(Message(role="user", content=content),)), tmp_path
    )
    (prediction,) = predict(model, renderer, [sample], max_new_tokens=1, batch_size=1)
    assert prediction.images == (tmp_path / "a.png",)
    answer_ids = renderer.tokenizer.encode("(100,100),(500,500)")
    prompt = renderer.tokenize_prompt(sample)
    (box,) = build_prediction(renderer, sample, prompt, list(answer_ids)).boxes
    assert (box.image, box.xyxy) == (0, (20, 10, 100, 50))


def test_video_file_gives_the_answer_of_its_frames(loaded_model, tmp_path):
    model, renderer = loaded_model
    clip = write_video(tmp_path / "clip.mp4")
    frames = save_frames(tmp_path / "frames", [*iter_video_frames(clip, [0, 4, 8, 12])])
    (question,) = build_questions([clip], "What moves?")
    listed = VideoPart(frames=tuple(frames), fps=2.0)
    message = Message(role="user", content=(listed, TextPart(text="What moves?")))
    samples = [question, LocatedSample(Sample(id="frames", messages=(message,)), tmp_path)]
    first, second = predict(model, renderer, samples, max_new_tokens=4, batch_size=2)
    assert first.raw_text == second.raw_text
    assert (first.id, first.images) == (str(clip), ())
    clip.write_bytes(b"")
    with pytest.raises(CorruptImageError, match=r"clip\.mp4: corrupt"):
        build_questions([clip], "What moves?")


def test_build_questions_validates_images(tmp_path):
    path = write_noise_image(tmp_path / "a.png", 30, 30)
    (requested,) = build_questions([path], "What is it?")
    assert requested.resolve_path(requested.sample.messages[0].content[0].image) == path
    assert len(build_questions([path, path], "What is it?")) == 2
    (text_only,) = build_questions([], "Why?")
    assert len(text_only.sample.messages[0].content) == 1
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(CorruptImageError, match=r"text\.png: not an image"):
        build_questions([path, tmp_path / "text.png"], "What is it?")


@pytest.mark.parametrize(
    ("images", "expected"),
    [((), None), (("a.png",), "a.png"), (("a.png", "b.png"), ["a.png", "b.png"])],
)
def test_as_json_and_text(images, expected):
    box = BoxPart(label="dog", xyxy=(1, 2.3456, 3, 4))
    prediction = replace(_prediction(tuple(map(Path, images)), box), finish_reason="length")
    assert prediction.as_json() == {
        "id": "s",
        "image": expected,
        "prompt": "Where?",
        "answer": "there",
        "raw_text": "there<|im_end|>",
        "boxes": [{"image": 0, "label": "dog", "xyxy": [1, 2.35, 3, 4]}],
    }
    text = prediction.as_text()
    assert "there [truncated after 2 tokens]\n  box 1.0, 2.3, 3.0, 4.0  dog" in text
    assert all(name in text for name in images)


@pytest.mark.parametrize("capacity", [3, 1, 0])
def test_out_of_memory_reduces_the_batch_size(loaded_model, tmp_path, capacity):
    """Simulate a GPU whose memory suffices for `capacity` sequences only."""
    model, renderer = loaded_model
    full = write_noise_image(tmp_path / "cut.png", 200, 200).read_bytes()
    (tmp_path / "cut.png").write_bytes(full[: len(full) // 2])
    requested = [
        *make_mixed_questions(tmp_path),
        make_sample("damaged", tmp_path, "cut.png", "What?"),
    ]
    damaged: list[int] = []
    wanted = {"max_new_tokens": 5, "on_corrupt_image": lambda i, error: damaged.append(i)}
    expected = predict(model, renderer, requested, batch_size=7, **wanted)
    assert damaged == [6]
    real = ModelRunner.decode
    result, done, refused = [], [], []

    def step(self, num_seqs, longest):
        assert all(gone() is None for gone in refused), "two caches at once"
        if num_seqs > capacity:
            refused.append(weakref.ref(self))
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(self, num_seqs, longest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelRunner, "decode", step)
        wanted |= {"on_progress": done.append, "on_batch_reduced": result.append}
        if not capacity:
            with pytest.raises(torch.OutOfMemoryError):
                predict(model, renderer, requested, batch_size=7, **wanted)
            assert result == [3, 1]
            return
        found = predict(model, renderer, requested, batch_size=7, **wanted)
    assert found == expected
    assert result == ([3] if capacity == 3 else [3, 1])
    assert sum(done) == 6
    assert set(damaged) == {6}


def _prediction(images: tuple[Path, ...], *boxes: BoxPart) -> Prediction:
    return Prediction("s", images, "Where?", "there", "there<|im_end|>", boxes, 2, "stop")


def _write_gray(path: Path, size: tuple[int, int] = (60, 40)) -> Path:
    Image.new("RGB", size, (128, 128, 128)).save(path)
    return path


def _changed(path: Path) -> np.ndarray:
    return (np.asarray(Image.open(path)) != 128).any(-1)


def test_box_is_drawn_at_its_coordinates():
    drawn = draw_boxes(Image.new("RGB", (60, 40), (128,) * 3), [BoxPart(xyxy=(10, 5, 50, 30))])
    changed = (np.asarray(drawn) != 128).any(-1)
    assert drawn.size == (60, 40)
    assert changed[5, 10:51].all()
    assert changed[30, 10:51].all()
    assert changed[5:31, 10].all()
    assert changed[5:31, 50].all()
    assert not changed[7:29, 12:49].any()
    assert not changed[:4].any()


def test_labels_and_reversed_corners_are_drawn():
    image = Image.new("RGB", (200, 100), (128,) * 3)
    baseline = draw_boxes(image, [BoxPart(xyxy=(100, 80, 20, 40))])
    named = draw_boxes(image, [BoxPart(label="dog", xyxy=(100, 80, 20, 40))])
    assert (np.asarray(baseline) != 128).any()
    assert (np.asarray(named) != np.asarray(baseline)).any()
    assert (np.asarray(image) == 128).all()


def test_each_image_gets_its_own_file(tmp_path):
    first, second = _write_gray(tmp_path / "a.png"), _write_gray(tmp_path / "b.jpg.png")
    box = BoxPart(image=1, xyxy=(10, 5, 50, 30))
    written = save_annotated_images([_prediction((first, second), box)], tmp_path / "out")
    assert written == [tmp_path / "out/a.png", tmp_path / "out/b.jpg.png"]
    assert not _changed(written[0]).any()
    assert _changed(written[1]).any()


def test_existing_files_are_not_overwritten(tmp_path):
    image = _write_gray(tmp_path / "a.png")
    bytes_before = image.read_bytes()
    prediction = _prediction((image,), BoxPart(xyxy=(1, 1, 9, 9)))
    written = save_annotated_images([prediction, prediction], tmp_path)
    assert [path.name for path in written] == ["a-2.png", "a-3.png"]
    assert image.read_bytes() == bytes_before
