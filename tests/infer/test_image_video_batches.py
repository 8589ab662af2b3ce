"""Images, videos and text in one batch are answered as each is alone."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import pytest
import torch
from asking import Grown, ask, generate_uncached, grow, noise, told_of

from finesight.data.jsonl import Located
from finesight.encode.render import Renderer
from finesight.hub import ModelFolder
from finesight.infer.engine import Engine
from finesight.infer.predict import predict
from finesight.model.network import VisionLanguageModel
from finesight.model.tiny import TinyFamily, make_tiny
from finesight.model.weights import load_model

STEPS = 4
VIDEO_FAMILIES: list[TinyFamily] = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"]

Loaded = tuple[VisionLanguageModel, Renderer]


def _loaded(folder: Path, family: TinyFamily) -> Loaded:
    """A random model whose weights are large enough that attention matters."""
    tiny = ModelFolder(make_tiny(folder / "tiny", family, 2))
    model = load_model(tiny, torch.float32, torch.device("cpu")).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and name.startswith("model.layers"):
                parameter.mul_(2)
    return model, Renderer(tiny)


@pytest.fixture(scope="module", params=VIDEO_FAMILIES)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return _loaded(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture
def questions(tmp_path: Path) -> dict[str, Located]:
    """Text, images, and videos of one, two, three and five frames, alone and in one sample."""
    for seed, (width, height) in enumerate([(84, 56), (112, 84)]):
        noise(tmp_path / f"image{seed}.png", width, height, seed)
    frames = [noise(tmp_path / f"frame{seed}.png", 84, 84, 10 + seed).name for seed in range(5)]
    contents: dict[str, tuple[str | tuple[str, ...], ...]] = {
        "text": ("Why is the sky blue?",),
        "image": ("image0.png", "What is it?"),
        "one frame": (tuple(frames[:1]), "What happens?"),
        "two frames": (tuple(frames[1:3]), "Who is there?"),
        "five frames": (tuple(frames), "Count them."),
        "both": ("image1.png", tuple(frames[:3]), "image0.png", "Which one moves?"),
    }
    return {name: ask(name, tmp_path, *content) for name, content in contents.items()}


def _assert_equal(found: Sequence[Grown], wanted: Sequence[Grown]) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert one.tokens == other.tokens
        for found_V, wanted_V in zip(one.logits, other.logits, strict=True):
            assert (found_V - wanted_V).abs().max() <= 1e-5 * wanted_V.abs().max()


def test_every_mix_equals_its_samples_alone(
    loaded: Loaded, questions: dict[str, Located], tmp_path: Path
) -> None:
    model, renderer = loaded
    prompts = {name: renderer.prompt(one) for name, one in questions.items()}
    alone = {name: generate_uncached(model, one, STEPS) for name, one in prompts.items()}
    assert len({tuple(grown.tokens) for grown in alone.values()}) == len(alone)
    for size in range(2, len(prompts) + 1):
        for mix in combinations(prompts, size):
            found = grow(model, [prompts[name] for name in mix], STEPS)
            _assert_equal(found, [alone[name] for name in mix])


def test_engine_and_predict_answer_a_mix_as_alone(
    loaded: Loaded, questions: dict[str, Located]
) -> None:
    model, renderer = loaded
    located = [*questions.values()]
    prompts = [renderer.prompt(one) for one in located]
    alone = [
        told_of(Engine(model, (), rows=1, tokens=1024), one, tokens=STEPS)[0] for one in prompts
    ]
    together = told_of(Engine(model, (), rows=len(prompts), tokens=4096), *prompts, tokens=STEPS)
    assert [told.ids for told in together] == [told.ids for told in alone]
    single = [predict(model, renderer, [one], max_new_tokens=STEPS, batch=1)[0] for one in located]
    assert predict(model, renderer, located, max_new_tokens=STEPS, batch=len(located)) == single


def test_images_alone_keep_one_frame_for_each_patch(
    loaded: Loaded, questions: dict[str, Located], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a batch with a video of several frames uploads the temporal repetition."""
    model, renderer = loaded
    widths: list[int] = []
    see = model.see

    def record(patches_ND, grids):
        widths.append(patches_ND.shape[1])
        return see(patches_ND, grids)

    monkeypatch.setattr(model, "see", record)
    prompts = {name: renderer.prompt(one) for name, one in questions.items()}
    numbers = renderer.geometry.numbers
    grow(model, [prompts["image"], prompts["one frame"], prompts["text"]], 1)
    grow(model, [prompts["image"], prompts["two frames"]], 1)
    assert widths == [numbers // renderer.geometry.temporal, numbers]


def test_an_image_is_known_beside_a_video(
    loaded: Loaded, questions: dict[str, Located], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its features are reused, and so are the tokens up to the video of a later turn."""
    model, renderer = loaded
    frames = tuple(f"frame{number}.png" for number in range(4))
    first = renderer.prompt(ask("one", tmp_path, "image0.png", "What is it? " * 3))
    later = renderer.prompt(ask("two", tmp_path, "image0.png", "What is it? " * 3, frames, "Now?"))
    (alone,) = told_of(Engine(model, (), rows=1, tokens=1024), later, tokens=STEPS)
    engine = Engine(model, (), rows=1, tokens=1024)
    told_of(engine, first, tokens=STEPS)
    seen: list[int] = []
    see = model.see

    def record(patches_ND, grids):
        seen.append(len(grids))
        return see(patches_ND, grids)

    monkeypatch.setattr(model, "see", record)
    (found,) = told_of(engine, later, tokens=STEPS)
    assert found.ids == alone.ids
    assert seen == [len(later.outline.spans) - 1]
    image = first.outline.spans[0]
    assert found.known > image.stop
