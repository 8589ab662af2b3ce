"""What a family's own processor and template make of samples, and what is refused."""

from __future__ import annotations

import json
import pickle
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import hf_models
import pytest

from finesight.config import ExactSize, PixelLimits
from finesight.data.sample import LocatedSample, Sample
from finesight.encode.hf_renderer import HfRenderer, import_transformers
from finesight.encode.renderer import build_renderer
from finesight.errors import UserError
from finesight.model_folder import ModelFolder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf_models.make_llava(tmp_path_factory.mktemp("models") / "llava")


@pytest.fixture(scope="module")
def renderer(folder: Path) -> HfRenderer:
    found = build_renderer(ModelFolder(folder))
    assert isinstance(found, HfRenderer)
    return found


def with_template(folder: Path, tmp_path: Path, template: str) -> HfRenderer:
    """The renderer of the same model with another chat template."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (copy / file.name).write_bytes(file.read_bytes())
    (copy / "chat_template.jinja").write_text(template)
    return HfRenderer(ModelFolder(copy))


def decode_with_loss_mask(
    renderer: HfRenderer, located_sample: LocatedSample
) -> tuple[str, list[str]]:
    """Return all tokens of a sample as text, and the supervised spans."""
    outline = renderer.tokenize(located_sample)
    stretches: list[list[int]] = []
    for at, (token, supervised) in enumerate(zip(outline.ids_T, outline.loss_mask_T, strict=True)):
        if supervised and not (at and outline.loss_mask_T[at - 1]):
            stretches.append([])
        if supervised:
            stretches[-1].append(int(token))
    decode = renderer.tokenizer.decode
    full = decode(outline.ids_T.tolist(), skip_special_tokens=False)
    return full, [decode(ids, skip_special_tokens=False) for ids in stretches]


def test_loss_mask_covers_answers_with_end_token(renderer: HfRenderer, tmp_path: Path) -> None:
    located_sample = hf_models.make_sample(tmp_path, ("Which?", "red and blue"), ("Sure?", "yes"))
    full, supervised = decode_with_loss_mask(renderer, located_sample)
    locations = "<|image_pad|>" * 4
    assert full == (
        f"<|im_start|>user\n{locations}Which?<|im_end|>\n"
        "<|im_start|>assistant\nred and blue<|im_end|>\n"
        "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
    )
    assert supervised == ["red and blue<|im_end|>", "yes<|im_end|>"]


def test_images_are_processed_once_without_later_images(
    renderer: HfRenderer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    image = renderer.load_image
    monkeypatch.setattr(renderer, "load_image", lambda path: (read.append(path), image(path))[1])
    first = hf_models.make_sample(tmp_path, ("Which?", "red"), ("Sure?", "yes"), num_images=2)
    assert decode_with_loss_mask(renderer, first)[1] == ["red<|im_end|>", "yes<|im_end|>"]
    assert len(read) == 2
    requested, answered = hf_models.make_sample(tmp_path, ("Which?", "red")).sample.messages
    duplicate = Sample(id="s", messages=(requested, answered, requested, answered))
    assert decode_with_loss_mask(renderer, LocatedSample(duplicate, tmp_path))[1] == [
        "red<|im_end|>",
        "red<|im_end|>",
    ]
    assert len(read) == 2 + 2 + 1


def test_prompt_is_prefix_of_sample(renderer: HfRenderer, tmp_path: Path) -> None:
    located_sample = hf_models.make_sample(
        tmp_path, ("Which?", "red"), ("Sure?", "yes"), num_images=2
    )
    prompt, full = renderer.tokenize_prompt(located_sample), renderer.tokenize(located_sample)
    assert full.ids_T[: prompt.num_tokens].tolist() == prompt.ids_T.tolist()
    assert not prompt.loss_mask_T.any()
    encoded = renderer.load_patches(prompt)
    assert encoded.hf_inputs["pixel_values"].shape == (
        2,
        3,
        hf_models.IMAGE_SIZE,
        hf_models.IMAGE_SIZE,
    )
    assert "input_ids" not in encoded.hf_inputs


def test_system_prompt_of_sample_or_recipe(folder: Path, tmp_path: Path) -> None:
    renderer = HfRenderer(ModelFolder(folder), system_prompt="Be brief.")
    full, _ = decode_with_loss_mask(
        renderer, hf_models.make_sample(tmp_path, ("Which?", "red"), num_images=0)
    )
    assert full.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")


def test_image_rule_is_applied_before_processor(folder: Path, tmp_path: Path) -> None:
    located_sample = hf_models.make_sample(tmp_path, ("Which?", "red"))
    rule = ExactSize(height=7, width=9)
    retained, scaled = (
        HfRenderer(ModelFolder(folder)),
        HfRenderer(ModelFolder(folder), rule),
    )
    assert retained.load_image(tmp_path / "0.png").size == (40, 30)
    assert scaled.load_image(tmp_path / "0.png").size == (9, 7)
    limited = HfRenderer(ModelFolder(folder), PixelLimits(max_pixels=300))
    assert limited.load_image(tmp_path / "0.png").size == (20, 15)
    assert (
        scaled.tokenize(located_sample).num_tokens == retained.tokenize(located_sample).num_tokens
    )


def test_renderer_is_picklable(renderer: HfRenderer, tmp_path: Path) -> None:
    located_sample = hf_models.make_sample(tmp_path, ("Which?", "red"))
    copy = pickle.loads(pickle.dumps(renderer))
    assert (
        copy.tokenize(located_sample).ids_T.tolist()
        == renderer.tokenize(located_sample).ids_T.tolist()
    )


def test_reasoning_model_gets_empty_reasoning(folder: Path, tmp_path: Path) -> None:
    renderer = with_template(folder, tmp_path, hf_models.QWEN3_5_CHAT_TEMPLATE)
    _, supervised = decode_with_loss_mask(
        renderer, hf_models.make_sample(tmp_path, ("Which?", "red"), num_images=0)
    )
    assert supervised == ["red<|im_end|>"]


REFUSED = {
    "turns rewritten": (hf_models.QWEN3_5_CHAT_TEMPLATE, [("A?", "red"), ("B?", "blue")],
                        "renders the prompt"),
    "no end": ("{{ messages[0]['content'][0]['text'] }} A:{{ ' b' if messages[1:] else '' }}",
               [("A?", "b")], "no end token"),
    "the users end only": (
        "{% for turn in messages %}{{ turn['content'][0]['text'] }}"
        "{{ '<|im_end|>\n<|im_start|>' if turn['role'] == 'user' else '\n<|im_start|>' }}"
        "{% endfor %}",
        [("A?", "b"), ("C?", "d")], "no end token"),
    "template raises": ("{{ raise_exception('no such role') }}", [("A?", "b")], "no such role"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_template_that_hides_the_answer_is_rejected(
    folder: Path, tmp_path: Path, case: str
) -> None:
    template, turns, message = REFUSED[case]
    renderer = with_template(folder, tmp_path, template)
    with pytest.raises(UserError, match=message):
        renderer.tokenize(hf_models.make_sample(tmp_path, *turns, num_images=0))


def test_template_that_omits_images_is_rejected(folder: Path, tmp_path: Path) -> None:
    first = hf_models.CHAT_TEMPLATE.replace(
        "part['type'] == 'image'", "part['type'] == 'image' and loop.first"
    ).replace("part['text']", "part['text'] | default('')")
    renderer = with_template(folder, tmp_path, first)
    renderer.tokenize(hf_models.make_sample(tmp_path, ("A?", "b")))
    with pytest.raises(UserError, match="omits an image"):
        renderer.tokenize(hf_models.make_sample(tmp_path, ("A?", "b"), num_images=2))


PARTS: dict[str, tuple[list[dict[str, Any]], str]] = {
    "box": ([{"type": "box", "xyxy": [0, 0, 9, 9]}], "box content for"),
    "video": ([{"type": "video", "frames": ["0.png"]}], "video content for"),
    "special token": ([{"type": "text", "text": "<|im_end|>"}], "a special token of"),
}


@pytest.mark.parametrize("case", PARTS)
def test_unsupported_parts_are_rejected(renderer: HfRenderer, tmp_path: Path, case: str) -> None:
    content, message = PARTS[case]
    turns = [{"role": "user", "content": "A?"}, {"role": "assistant", "content": content}]
    sample = Sample.model_validate({"id": "s", "messages": turns})
    with pytest.raises(UserError, match=message):
        renderer.tokenize(LocatedSample(sample, tmp_path))


def test_boxes_in_prompt_are_rejected(renderer: HfRenderer, tmp_path: Path) -> None:
    box = [{"type": "box", "xyxy": [0, 0, 9, 9]}]
    turns = [{"role": "user", "content": "A?"}, {"role": "assistant", "content": box}]
    sample = Sample.model_validate({"id": "s", "messages": turns})
    with pytest.raises(UserError, match="box content for"):
        renderer.tokenize_prompt(LocatedSample(sample, tmp_path))


def test_folder_without_template_is_rejected(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no chat template"):
        with_template(folder, tmp_path, "")


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is there")
def test_package_required_by_processor_is_named(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text('{"model_type": "glm4v"}')
    (tmp_path / "processor_config.json").unlink()
    read = {"image_processor_type": "Qwen2VLImageProcessor"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(read))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    with pytest.raises(UserError, match=r"(?i)processor of glm4v: .*torchvision"):
        build_renderer(ModelFolder(tmp_path))


def test_missing_transformers_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    import_transformers.cache_clear()
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    with pytest.raises(UserError, match=r"pip install 'finesight\[hf\]'"):
        build_renderer(ModelFolder(tmp_path))


CONFIGS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "remote code": (
        {"model_type": "chatty", "auto_map": {"AutoModel": "modeling_chatty.Chatty"}},
        ["chatty", "modeling_chatty.Chatty", "qwen2_vl", "remote code is never"],
    ),
    "unknown": ({"model_type": "chatty"}, ["chatty", "unknown to", "install a transformers"]),
    "text only": ({"model_type": "llama"}, ["llama", "has no image-text-to-text class"]),
    "with an encoder": ({"model_type": "florence2"}, ["is an encoder-decoder model"]),
    "quantised": (
        {"model_type": "llava", "quantization_config": {"bits": 4}},
        ["quantized", "'bits': 4"],
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_unsupported_families_are_rejected(tmp_path: Path, case: str) -> None:
    config, words = CONFIGS[case]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "modeling_chatty.py").write_text("raise SystemExit('code was run')")
    with pytest.raises(UserError) as caught:
        build_renderer(ModelFolder(tmp_path))
    assert all(word in str(caught.value) for word in words), str(caught.value)
