"""Samples through a family's own processor and template, and what is refused."""

import json
import pickle
import sys
from importlib.util import find_spec
from pathlib import Path

import hf_models
import pytest
from case_files import load_cases

from finesight.encode.hf_renderer import HfRenderer, import_transformers
from finesight.encode.renderer_builder import build_renderer
from finesight.errors import UserError
from finesight.model_folder import ModelFolder
from finesight.samples.sample import LocatedSample, Sample
from finesight.settings.config import ExactSize, PixelLimits

CASES = load_cases("hf_renderer")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf_models.make_llava(tmp_path_factory.mktemp("models") / "llava")


@pytest.fixture(scope="module")
def renderer(folder: Path) -> HfRenderer:
    found = build_renderer(ModelFolder(folder))
    assert isinstance(found, HfRenderer)
    return found


def copy_model(folder: Path, target: Path, template: str = hf_models.CHAT_TEMPLATE) -> Path:
    """Copy a model without its weights, with another chat template."""
    target.mkdir(exist_ok=True)
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (target / file.name).write_bytes(file.read_bytes())
    (target / "chat_template.jinja").write_text(template)
    return target


def mark_supervised(renderer: HfRenderer, located_sample: LocatedSample) -> str:
    """Return the text of a sample with its supervised parts in [[ ]]."""
    outline, text, before = renderer.tokenize(located_sample), "", False
    for token, supervised in zip(outline.ids_T.tolist(), outline.loss_mask_T, strict=True):
        text += "[[" if supervised and not before else "]]" if before and not supervised else ""
        text += renderer.tokenizer.decode([token], skip_special_tokens=False)
        before = supervised
    return text


def test_loss_mask_covers_answers_with_end_token(renderer, tmp_path):
    located_sample = hf_models.make_sample(tmp_path, ("Which?", "red and blue"), ("Sure?", "yes"))
    assert mark_supervised(renderer, located_sample) == (
        f"<|im_start|>user\n{'<|image_pad|>' * 4}Which?<|im_end|>\n"
        "<|im_start|>assistant\n[[red and blue<|im_end|>]]\n"
        "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n[[yes<|im_end|>]]\n"
    )


def test_images_are_processed_once_without_later_images(renderer, tmp_path, monkeypatch):
    read: list[Path] = []
    image = renderer.load_image
    monkeypatch.setattr(renderer, "load_image", lambda path: (read.append(path), image(path))[1])
    first = hf_models.make_sample(tmp_path, ("Which?", "red"), ("Sure?", "yes"), num_images=2)
    assert mark_supervised(renderer, first).count("[[") == 2
    assert len(read) == 2
    requested, answered = hf_models.make_sample(tmp_path, ("Which?", "red")).sample.messages
    duplicate = Sample(id="s", messages=(requested, answered, requested, answered))
    text = mark_supervised(renderer, LocatedSample(duplicate, tmp_path))
    assert text.count("[[red<|im_end|>]]") == 2
    assert len(read) == 2 + 2 + 1


def test_prompt_is_prefix_of_sample(renderer, tmp_path):
    turns = ("Which?", "red"), ("Sure?", "yes")
    located_sample = hf_models.make_sample(tmp_path, *turns, num_images=2)
    prompt, full = renderer.tokenize_prompt(located_sample), renderer.tokenize(located_sample)
    assert full.ids_T[: prompt.num_tokens].tolist() == prompt.ids_T.tolist()
    assert not prompt.loss_mask_T.any()
    inputs = renderer.load_patches(prompt).hf_inputs
    side = hf_models.IMAGE_SIZE
    assert inputs["pixel_values"].shape == (2, 3, side, side)
    assert "input_ids" not in inputs
    copy = pickle.loads(pickle.dumps(renderer))
    assert copy.tokenize(located_sample).ids_T.tolist() == full.ids_T.tolist()


def test_system_prompt_of_recipe(folder, tmp_path):
    renderer = HfRenderer(ModelFolder(folder), system_prompt="Be brief.")
    sample = hf_models.make_sample(tmp_path, ("Which?", "red"), num_images=0)
    start = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
    assert mark_supervised(renderer, sample).startswith(start)


@pytest.mark.parametrize(
    ("rule", "size"),
    [
        (None, (40, 30)),
        (ExactSize(height=7, width=9), (9, 7)),
        (PixelLimits(max_pixels=300), (20, 15)),
    ],
)
def test_image_rule_is_applied_before_processor(folder, tmp_path, rule, size):
    renderer = HfRenderer(ModelFolder(folder), rule)
    located_sample = hf_models.make_sample(tmp_path, ("Which?", "red"))
    assert renderer.load_image(tmp_path / "0.png").size == size
    assert mark_supervised(renderer, located_sample).count("<|image_pad|>") == 4


def test_reasoning_model_gets_empty_reasoning(folder, tmp_path):
    copy = copy_model(folder, tmp_path / "copy", hf_models.QWEN3_5_CHAT_TEMPLATE)
    sample = hf_models.make_sample(tmp_path, ("Which?", "red"), num_images=0)
    text = mark_supervised(HfRenderer(ModelFolder(copy)), sample)
    assert text.count("[[") == text.count("[[red<|im_end|>]]") == 1


END_OF_USER_ONLY = (
    "{% for turn in messages %}{{ turn['content'][0]['text'] }}"
    "{{ '<|im_end|>\n<|im_start|>' if turn['role'] == 'user' else '\n<|im_start|>' }}"
    "{% endfor %}"
)
WITHOUT_END = "{{ messages[0]['content'][0]['text'] }} A:{{ ' b' if messages[1:] else '' }}"


@pytest.mark.parametrize(
    ("template", "turns", "message"),
    [
        (hf_models.QWEN3_5_CHAT_TEMPLATE, [("A?", "red"), ("B?", "blue")], "renders the prompt"),
        (WITHOUT_END, [("A?", "b")], "no end token"),
        (END_OF_USER_ONLY, [("A?", "b"), ("C?", "d")], "no end token"),
        ("{{ raise_exception('no such role') }}", [("A?", "b")], "no such role"),
        ("", [("A?", "b")], "has no chat template"),
    ],
)
def test_template_that_hides_the_answer_is_rejected(folder, tmp_path, template, turns, message):
    copy = copy_model(folder, tmp_path / "copy", template)
    with pytest.raises(UserError, match=message):
        HfRenderer(ModelFolder(copy)).tokenize(
            hf_models.make_sample(tmp_path, *turns, num_images=0)
        )


def test_template_that_omits_images_is_rejected(folder, tmp_path):
    is_image = "part['type'] == 'image'"
    first = hf_models.CHAT_TEMPLATE.replace(is_image, f"{is_image} and loop.first")
    template = first.replace("part['text']", "part['text'] | default('')")
    renderer = HfRenderer(ModelFolder(copy_model(folder, tmp_path / "copy", template)))
    renderer.tokenize(hf_models.make_sample(tmp_path, ("A?", "b")))
    with pytest.raises(UserError, match="omits an image"):
        renderer.tokenize(hf_models.make_sample(tmp_path, ("A?", "b"), num_images=2))


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "box", "xyxy": [0, 0, 9, 9]}, "box content for"),
        ({"type": "video", "frames": ["0.png"]}, "video content for"),
        ({"type": "text", "text": "<|im_end|>"}, "a special token of"),
    ],
)
def test_unsupported_parts_are_rejected(renderer, tmp_path, part, message):
    turns = [{"role": "user", "content": "A?"}, {"role": "assistant", "content": [part]}]
    located_sample = LocatedSample(Sample.model_validate({"id": "s", "messages": turns}), tmp_path)
    with pytest.raises(UserError, match=message):
        renderer.tokenize(located_sample)
    if part["type"] == "box":
        with pytest.raises(UserError, match=message):
            renderer.tokenize_prompt(located_sample)


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is installed")
def test_package_required_by_processor_is_named(folder, tmp_path):
    copy_model(folder, tmp_path)
    (tmp_path / "processor_config.json").unlink()
    for name, content in (
        ("config", {"model_type": "glm4v"}),
        ("preprocessor_config", {"image_processor_type": "Qwen2VLImageProcessor"}),
        ("tokenizer_config", {"eos_token": "<|im_end|>"}),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"(?i)processor of glm4v: .*torchvision"):
        build_renderer(ModelFolder(tmp_path))


def test_missing_transformers_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "transformers", None)
    import_transformers.cache_clear()
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    with pytest.raises(UserError, match=r"pip install 'finesight\[hf\]'"):
        build_renderer(ModelFolder(tmp_path))


@pytest.mark.parametrize(("config", "words"), CASES["test_unsupported_families_are_rejected"])
def test_unsupported_families_are_rejected(tmp_path, config, words):
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "modeling_chatty.py").write_text("raise SystemExit('code was run')")
    with pytest.raises(UserError) as caught:
        build_renderer(ModelFolder(tmp_path))
    assert all(word in str(caught.value) for word in words), str(caught.value)
