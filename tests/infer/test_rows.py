"""Pictures are looked at once, in passes of bounded size, and forgotten in time."""

from __future__ import annotations

import pytest
import torch
from asking import ask, mixed_questions, noise, told_of

from finesight.encode.render import Renderer
from finesight.hub import ModelFolder
from finesight.infer import rows as rows_area
from finesight.infer.engine import Engine
from finesight.infer.generate import generate
from finesight.model.network import VisionLanguageModel
from finesight.model.tiny import make_tiny
from finesight.model.weights import load_model

Loaded = tuple[VisionLanguageModel, Renderer]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return ModelFolder(make_tiny(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture
def loaded(tiny: ModelFolder) -> Loaded:
    return load_model(tiny, torch.float32, torch.device("cpu")).eval(), Renderer(tiny)


def _seen(model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pictures the model looks at, call by call."""
    seen: list[int] = []
    see = model.see

    def count(patches, grids):
        seen.append(len(grids))
        return see(patches, grids)

    monkeypatch.setattr(model, "see", count)
    return seen


def test_a_picture_is_looked_at_once(loaded, tmp_path, monkeypatch):
    """Beside others, in one prompt and in many, before another text; not where all of it is known
    from the cache."""
    model, renderer = loaded
    mixed_questions(tmp_path)
    texts = [("What?", "a.png"), ("a.png", "Where?"), ("a.png", "b.png", "Why?", "b.png")]
    prompts = [renderer.prompt(ask(f"{n}", tmp_path, *text)) for n, text in enumerate(texts)]
    wanted = [told_of(Engine(model, (), rows=1, tokens=1024), prompt)[0].ids for prompt in prompts]
    seen = _seen(model, monkeypatch)
    engine = Engine(model, (), rows=4, tokens=1024)
    assert [told.ids for told in told_of(engine, *prompts)] == wanted
    assert seen == [2]
    assert [told.ids for told in told_of(engine, *reversed(prompts))] == wanted[::-1]
    assert seen == [2]


def test_features_of_pictures_do_not_pile_up(loaded, tmp_path, monkeypatch):
    """The longest unused go; a picture of which they are gone is looked at again."""
    model, renderer = loaded
    prompts = []
    for seed in range(4):
        noise(tmp_path / f"{seed}.png", 56, 56, seed)
        prompts.append(renderer.prompt(ask("s", tmp_path, f"x{seed}", f"{seed}.png")))
    (span,) = prompts[0].outline.spans
    picture = (span.stop - span.start) * model.geometry.language.width * 4
    monkeypatch.setattr(rows_area, "CPU_PICTURE_BYTES", 2 * picture)
    seen = _seen(model, monkeypatch)
    # Pages for one question only: what is known by them is soon forgotten.
    engine = Engine(model, (), rows=1, tokens=80)
    looked = []
    for number in (0, 1, 0, 2, 0, 1):
        before = len(seen)
        told_of(engine, prompts[number], tokens=80 - prompts[number].outline.tokens)
        assert engine._rows._pictures._bytes <= 2 * picture
        looked.append(len(seen) > before)
    assert looked == [True, True, False, True, False, True]


def test_pictures_are_seen_in_passes_of_bounded_size(loaded, tmp_path, monkeypatch):
    model, renderer = loaded
    prompts = [renderer.prompt(question) for question in mixed_questions(tmp_path)]
    wanted = generate(model, prompts, max_new_tokens=5, end_ids=())
    sizes: list[int] = []
    see = model.see

    def counted(patches_ND, grids):
        sizes.append(len(patches_ND))
        return see(patches_ND, grids)

    monkeypatch.setattr(model, "see", counted)
    generate(model, prompts, max_new_tokens=1, end_ids=())
    assert len(sizes) == 1
    largest = max(
        len(rows_area.patches_of(p, n)) for p in prompts for n in range(len(p.outline.spans))
    )
    monkeypatch.setattr(rows_area, "PATCHES", largest)
    sizes.clear()
    assert generate(model, prompts, max_new_tokens=5, end_ids=()) == wanted
    assert len(sizes) > 1
    assert max(sizes) <= largest
