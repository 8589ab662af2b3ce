"""Images, videos and text in one batch are answered as each is alone."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import pytest
import torch
from engine_fixtures import (
    Generated,
    generate_cached,
    generate_uncached,
    make_sample,
    record_encoder_calls,
    run_alone,
    run_requests,
    write_noise_image,
)
from tiny_model import TinyFamily, create_tiny_model

from finesight.data.jsonl import LocatedSample
from finesight.encode.renderer import NativeRenderer
from finesight.infer.engine import Engine
from finesight.infer.prediction import predict
from finesight.model.vlm import VisionLanguageModel
from finesight.model.weights_io import load_model
from finesight.model_folder import ModelFolder

STEPS = 4
VIDEO_FAMILIES: list[TinyFamily] = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"]

Loaded = tuple[VisionLanguageModel, NativeRenderer]


def _loaded(folder: Path, family: TinyFamily) -> Loaded:
    """A random model whose weights are large enough that attention matters."""
    tiny = ModelFolder(create_tiny_model(folder / "tiny", family, 2))
    model = load_model(tiny, torch.float32, torch.device("cpu")).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and name.startswith("model.layers"):
                parameter.mul_(2)
    return model, NativeRenderer(tiny)


@pytest.fixture(scope="module", params=VIDEO_FAMILIES)
def loaded_model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Loaded:
    return _loaded(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture
def questions(tmp_path: Path) -> dict[str, LocatedSample]:
    """Text, images, and videos of one, two, three and five frames, alone and in one sample."""
    for seed, (width, height) in enumerate([(84, 56), (112, 84)]):
        write_noise_image(tmp_path / f"image{seed}.png", width, height, seed)
    frames = [
        write_noise_image(tmp_path / f"frame{seed}.png", 84, 84, 10 + seed).name
        for seed in range(5)
    ]
    contents: dict[str, tuple[str | tuple[str, ...], ...]] = {
        "text": ("Why is the sky blue?",),
        "image": ("image0.png", "What is it?"),
        "one frame": (tuple(frames[:1]), "What happens?"),
        "two frames": (tuple(frames[1:3]), "Who is there?"),
        "five frames": (tuple(frames), "Count them."),
        "both": ("image1.png", tuple(frames[:3]), "image0.png", "Which one moves?"),
    }
    return {name: make_sample(name, tmp_path, *content) for name, content in contents.items()}


def _assert_equal(found: Sequence[Generated], wanted: Sequence[Generated]) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert one.tokens == other.tokens
        for found_V, wanted_V in zip(one.logits, other.logits, strict=True):
            assert (found_V - wanted_V).abs().max() <= 1e-5 * wanted_V.abs().max()


def test_mixed_batch_matches_single_samples(
    loaded_model: Loaded, questions: dict[str, LocatedSample], tmp_path: Path
) -> None:
    model, renderer = loaded_model
    prompts = {name: renderer.encode_prompt(one) for name, one in questions.items()}
    alone = {name: generate_uncached(model, one, STEPS) for name, one in prompts.items()}
    assert len({tuple(grown.tokens) for grown in alone.values()}) == len(alone)
    for size in range(2, len(prompts) + 1):
        for mix in combinations(prompts, size):
            found = generate_cached(model, [prompts[name] for name in mix], STEPS)
            _assert_equal(found, [alone[name] for name in mix])


def test_engine_and_predict_match_single_samples(
    loaded_model: Loaded, questions: dict[str, LocatedSample]
) -> None:
    model, renderer = loaded_model
    located_sample = [*questions.values()]
    prompts = [renderer.encode_prompt(one) for one in located_sample]
    alone = [run_alone(model, one, STEPS) for one in prompts]
    batched = run_requests(
        Engine(model, (), max_num_seqs=len(prompts), num_cache_tokens=4096), *prompts, tokens=STEPS
    )
    assert [told.ids for told in batched] == [told.ids for told in alone]
    single = [
        predict(model, renderer, [one], max_new_tokens=STEPS, batch_size=1)[0]
        for one in located_sample
    ]
    options = {"max_new_tokens": STEPS, "batch_size": len(located_sample)}
    assert predict(model, renderer, located_sample, **options) == single


def test_image_only_batch_uploads_one_frame_per_patch(
    loaded_model: Loaded, questions: dict[str, LocatedSample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a batch with a video of several frames uploads the temporal repetition."""
    model, renderer = loaded_model
    calls = record_encoder_calls(model, monkeypatch)
    prompts = {name: renderer.encode_prompt(one) for name, one in questions.items()}
    values = renderer.patch_config.patch_dim
    generate_cached(model, [prompts["image"], prompts["one frame"], prompts["text"]], 1)
    generate_cached(model, [prompts["image"], prompts["two frames"]], 1)
    assert [call.patch_width for call in calls] == [
        values // renderer.patch_config.temporal_patch_size,
        values,
    ]


def test_cached_image_is_reused_with_a_later_video(
    loaded_model: Loaded,
    questions: dict[str, LocatedSample],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its features are reused, and so are the tokens up to the video of a later turn."""
    model, renderer = loaded_model
    frames = tuple(f"frame{number}.png" for number in range(4))
    first = renderer.encode_prompt(make_sample("one", tmp_path, "image0.png", "What is it? " * 3))
    later = renderer.encode_prompt(
        make_sample("two", tmp_path, "image0.png", "What is it? " * 3, frames, "Now?")
    )
    alone = run_alone(model, later, STEPS)
    engine = Engine(model, (), max_num_seqs=1, num_cache_tokens=1024)
    run_requests(engine, first, tokens=STEPS)
    calls = record_encoder_calls(model, monkeypatch)
    (found,) = run_requests(engine, later, tokens=STEPS)
    assert found.ids == alone.ids
    assert [call.num_images for call in calls] == [len(later.tokenized.spans) - 1]
    image = first.tokenized.spans[0]
    assert found.num_cached_tokens > image.stop
