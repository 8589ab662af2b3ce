"""Vision encoding: once per image, in passes of limited size, with bounded caching."""

from __future__ import annotations

import pytest
import torch
from engine_fixtures import make_mixed_questions, make_sample, run_requests, write_noise_image
from tiny_model import create_tiny_model

from finesight.encode.renderer import NativeRenderer
from finesight.infer import model_runner as model_runner_module
from finesight.infer.engine import Engine, generate
from finesight.model.vlm import VisionLanguageModel
from finesight.model.weights_io import load_model
from finesight.model_folder import ModelFolder

Loaded = tuple[VisionLanguageModel, NativeRenderer]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return ModelFolder(create_tiny_model(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture
def loaded_model(tiny: ModelFolder) -> Loaded:
    return load_model(tiny, torch.float32, torch.device("cpu")).eval(), NativeRenderer(tiny)


def _count_encoded_images(model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the number of images of each vision-encoder pass."""
    batch_sizes: list[int] = []
    encode_images = model.encode_images

    def count(patches, grids):
        batch_sizes.append(len(grids))
        return encode_images(patches, grids)

    monkeypatch.setattr(model, "encode_images", count)
    return batch_sizes


def test_image_is_encoded_once(loaded_model, tmp_path, monkeypatch):
    """Beside others, in one prompt and in many, before another text; not where all of it is known
    from the cache."""
    model, renderer = loaded_model
    make_mixed_questions(tmp_path)
    texts = [("What?", "a.png"), ("a.png", "Where?"), ("a.png", "b.png", "Why?", "b.png")]
    prompts = [
        renderer.encode_prompt(make_sample(f"{n}", tmp_path, *text)) for n, text in enumerate(texts)
    ]
    wanted = [
        run_requests(Engine(model, (), max_num_seqs=1, num_cache_tokens=1024), prompt)[0].ids
        for prompt in prompts
    ]
    batch_sizes = _count_encoded_images(model, monkeypatch)
    engine = Engine(model, (), max_num_seqs=4, num_cache_tokens=1024)
    assert [told.ids for told in run_requests(engine, *prompts)] == wanted
    assert batch_sizes == [2]
    assert [told.ids for told in run_requests(engine, *reversed(prompts))] == wanted[::-1]
    assert batch_sizes == [2]


def test_vision_feature_cache_is_bounded(loaded_model, tmp_path, monkeypatch):
    """Check that the least recently used features are evicted and computed again on demand."""
    model, renderer = loaded_model
    prompts = []
    for seed in range(4):
        write_noise_image(tmp_path / f"{seed}.png", 56, 56, seed)
        prompts.append(
            renderer.encode_prompt(make_sample("s", tmp_path, f"x{seed}", f"{seed}.png"))
        )
    (span,) = prompts[0].tokenized.spans
    image = (span.stop - span.start) * model.config.decoder.hidden_size * 4
    monkeypatch.setattr(model_runner_module, "CPU_FEATURE_CACHE_BYTES", 2 * image)
    batch_sizes = _count_encoded_images(model, monkeypatch)
    # Blocks for one request only: prefix cache entries are soon evicted.
    engine = Engine(model, (), max_num_seqs=1, num_cache_tokens=80)
    outcome = []
    for number in (0, 1, 0, 2, 0, 1):
        before = len(batch_sizes)
        run_requests(engine, prompts[number], tokens=80 - prompts[number].tokenized.num_tokens)
        assert engine._runner._feature_cache._num_bytes <= 2 * image
        outcome.append(len(batch_sizes) > before)
    assert outcome == [True, True, False, True, False, True]


def test_images_are_encoded_in_bounded_batches(loaded_model, tmp_path, monkeypatch):
    model, renderer = loaded_model
    prompts = [renderer.encode_prompt(question) for question in make_mixed_questions(tmp_path)]
    wanted = generate(model, prompts, max_new_tokens=5, end_ids=())
    sizes: list[int] = []
    encode_images = model.encode_images

    def counted(patches_ND, grids):
        sizes.append(len(patches_ND))
        return encode_images(patches_ND, grids)

    monkeypatch.setattr(model, "encode_images", counted)
    generate(model, prompts, max_new_tokens=1, end_ids=())
    assert len(sizes) == 1
    largest = max(
        len(model_runner_module.get_span_patches(p, n))
        for p in prompts
        for n in range(len(p.tokenized.spans))
    )
    monkeypatch.setattr(model_runner_module, "MAX_ENCODER_PATCHES", largest)
    sizes.clear()
    assert generate(model, prompts, max_new_tokens=5, end_ids=()) == wanted
    assert len(sizes) > 1
    assert max(sizes) <= largest
