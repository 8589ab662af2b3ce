import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_fixtures import make_mixed_questions, make_sample, write_noise_image
from image_fixtures import write_gray_image
from PIL import Image
from tiny_model import create_tiny_model

from finesight.encode.renderer import NativeRenderer
from finesight.infer import engine as engine_module
from finesight.infer.engine import GPU_BLOCK_SIZE
from finesight.infer.model_runner import ModelRunner
from finesight.infer.prediction import (
    Prediction,
    ResponseSampler,
    build_question,
    draw_boxes,
    generate,
    predict,
    save_annotated_images,
)
from finesight.infer.request import FinishReason, GenerationRequest
from finesight.model.vlm import VisionLanguageModel
from finesight.model.weights_io import load_model
from finesight.model_folder import ModelFolder
from finesight.samples.image_file import CorruptImageError
from finesight.samples.sample import BoxPart


@pytest.fixture(scope="module")
def loaded_model(tmp_path_factory) -> tuple[VisionLanguageModel, NativeRenderer]:
    folder = ModelFolder(create_tiny_model(tmp_path_factory.mktemp("model") / "tiny"))
    return load_model(folder, torch.float32, torch.device("cpu")), NativeRenderer(folder)


def write_cut_image(path: Path) -> None:
    content = write_noise_image(path, 200, 200).read_bytes()
    path.write_bytes(content[: len(content) // 2])


def test_predictions_are_ordered_across_batches(loaded_model, tmp_path):
    model, renderer = loaded_model
    requested = make_mixed_questions(tmp_path) * 2
    progress: list[int] = []
    options = {"max_new_tokens": 5, "batch_size": 5, "on_progress": progress.append}
    found = predict(model, renderer, requested, **options)
    assert [prediction.id for prediction in found] == [sample.sample.id for sample in requested]
    # Twelve answers of up to five tokens, five at a time.
    assert sum(progress) == len(requested)
    assert 12 < len(progress) < 30
    for prediction, sample in zip(found, requested, strict=True):
        prompt = renderer.encode_prompt(sample)
        (ids,) = generate(model, [prompt], max_new_tokens=5, end_ids=renderer.end_ids)
        answer = renderer.decode_completion(ids)
        assert (prediction.answer, prediction.raw_text) == (answer.text, answer.raw_text)
        assert prediction.num_tokens == len(ids)
    assert found[2].prompt == "and thenwhich is larger?"
    assert [path.name for path in found[2].images] == ["b.png", "c.png"]


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


def test_damaged_image_is_reported_or_raised(loaded_model, tmp_path):
    model, renderer = loaded_model
    write_noise_image(tmp_path / "a.png", 56, 56)
    write_cut_image(tmp_path / "cut.png")
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


def test_build_question_validates_images(tmp_path):
    path = write_noise_image(tmp_path / "a.png", 30, 30)
    assert len(build_question([path, path], "What is it?", "a").sample.messages[0].content) == 3
    for name, problem in (("text.png", "not an image"), ("clip.mp4", "corrupt")):
        (tmp_path / name).write_text("neither an image nor a video")
        with pytest.raises(CorruptImageError, match=f"{name}: {problem}"):
            build_question([path, tmp_path / name], "What is it?", "a")


@pytest.mark.parametrize(
    ("images", "expected"),
    [((), None), (("a.png",), "a.png"), (("a.png", "b.png"), ["a.png", "b.png"])],
)
def test_as_json_and_text(images, expected):
    box = BoxPart(label="dog", xyxy=(1, 2.3456, 3, 4))
    prediction = _prediction(tuple(map(Path, images)), box, finish_reason="length")
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


@pytest.mark.parametrize(("capacity", "batch_sizes"), [(3, [3]), (1, [3, 1]), (0, [3, 1])])
def test_out_of_memory_reduces_the_batch_size(
    loaded_model, tmp_path, monkeypatch, capacity, batch_sizes
):
    """Simulate a GPU whose memory suffices for `capacity` sequences only."""
    write_cut_image(tmp_path / "cut.png")
    damaged = make_sample("damaged", tmp_path, "cut.png", "What?")
    requested = [*make_mixed_questions(tmp_path), damaged]
    damaged_indices: set[int] = set()
    options = {"on_corrupt_image": lambda index, error: damaged_indices.add(index)}
    options |= {"max_new_tokens": 5, "batch_size": 7}
    expected = predict(*loaded_model, requested, **options)
    decode, refused = ModelRunner.decode, []

    def step(self, num_seqs, longest):
        assert all(runner() is None for runner in refused), "two caches at once"
        if num_seqs > capacity:
            refused.append(weakref.ref(self))
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return decode(self, num_seqs, longest)

    monkeypatch.setattr(ModelRunner, "decode", step)
    reduced, done = [], []
    options |= {"on_progress": done.append, "on_batch_reduced": reduced.append}
    if capacity:
        assert predict(*loaded_model, requested, **options) == expected
        assert sum(done) == 6
    else:
        with pytest.raises(torch.OutOfMemoryError):
            predict(*loaded_model, requested, **options)
    assert reduced == batch_sizes
    assert damaged_indices == {6}


def test_sampled_responses_share_their_prompts(loaded_model, tmp_path, monkeypatch):
    """All responses run at once, also with more prompts, and half of them in half the memory."""
    monkeypatch.setattr(engine_module, "CPU_BLOCK_SIZE", GPU_BLOCK_SIZE)
    (model, renderer), sizes, running = loaded_model, [], set[int]()
    texts = ["Name the colours. " * 9, "Name the shapes. " * 9]
    prompts = [renderer.encode_prompt(make_sample("s", tmp_path, text)) for text in texts]
    # The last block of each response has one token, and its first one the end of the prompt.
    tokens = 2 * GPU_BLOCK_SIZE + 1 - prompts[0].tokenized.num_tokens % GPU_BLOCK_SIZE
    sampler = ResponseSampler(model, (), batch_size=16, is_sharded=False)
    few, more = [prompts[0]] * 16, prompts * 8
    for chosen in (few, more, few, [replace(prompt) for prompt in more]):
        running.clear()
        requests = [GenerationRequest(prompt=one, max_new_tokens=tokens) for one in chosen]
        responses = sampler.sample(
            requests, lambda _: running.add(sampler.engine.num_running), lambda: None
        )
        assert max(running) == 16
        ids = [tuple(token.id for token in response) for response in responses]
        assert len({*zip(map(id, chosen), ids, strict=True)}) == len({*map(id, chosen)})
        sizes.append(sampler.engine.num_blocks)
    assert sizes[0] < sizes[1] == sizes[2] < sizes[3]
    decode = ModelRunner.decode

    def step(self, num_seqs, longest):
        if num_seqs > 8:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return decode(self, num_seqs, longest)

    monkeypatch.setattr(ModelRunner, "decode", step)
    running.clear()
    again = sampler.sample(
        requests, lambda _: running.add(sampler.engine.num_running), lambda: None
    )
    assert (again, sampler.batch_size, max(running)) == (responses, 8, 8)
    assert sampler.engine.num_blocks == sizes[3] // 2 + 1


def _prediction(
    images: tuple[Path, ...], *boxes: BoxPart, finish_reason: FinishReason = "stop"
) -> Prediction:
    return Prediction("s", images, "Where?", "there", "there<|im_end|>", boxes, 2, finish_reason)


def test_box_is_drawn_at_its_coordinates():
    image = Image.new("RGB", (60, 40), (128,) * 3)
    for corners in ((10, 5, 50, 30), (50, 30, 10, 5)):
        changed = (np.asarray(draw_boxes(image, [BoxPart(xyxy=corners)])) != 128).any(-1)
        for edge in (changed[5, 10:51], changed[30, 10:51], changed[5:31, 10], changed[5:31, 50]):
            assert edge.all()
        assert not changed[7:29, 12:49].any()
        assert not changed[:4].any()
        named = draw_boxes(image, [BoxPart(label="dog", xyxy=corners)])
        assert ((np.asarray(named) != 128).any(-1) != changed).any()
    assert (np.asarray(image) == 128).all()


def test_annotated_images_do_not_overwrite_files(tmp_path):
    paths = [write_gray_image(tmp_path / name, gray_level=128) for name in ("a.png", "b.jpg.png")]
    before = [path.read_bytes() for path in paths]
    prediction = _prediction(tuple(paths), BoxPart(image=1, xyxy=(10, 5, 30, 15)))
    written = save_annotated_images([prediction, prediction], tmp_path)
    names = ["a-2.png", "b.jpg-2.png", "a-3.png", "b.jpg-3.png"]
    assert sorted(path.name for path in written) == sorted(names)
    assert [path.read_bytes() for path in paths] == before
    for path in written:
        assert (np.asarray(Image.open(path)) != 128).any() == path.name.startswith("b")
