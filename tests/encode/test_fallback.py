"""What a family's own processor and template make of samples, and what is refused."""

from __future__ import annotations

import json
import pickle
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import borrowed
import pytest

from finesight.config import ExactSize
from finesight.data.jsonl import Located
from finesight.data.sample import Sample
from finesight.encode.borrowed import transformers
from finesight.encode.fallback import FallbackRenderer
from finesight.encode.rendering import renderer_of
from finesight.errors import UserError
from finesight.hub import ModelFolder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return borrowed.llava(tmp_path_factory.mktemp("models") / "llava")


@pytest.fixture(scope="module")
def renderer(folder: Path) -> FallbackRenderer:
    found = renderer_of(ModelFolder(folder))
    assert isinstance(found, FallbackRenderer)
    return found


def with_template(folder: Path, tmp_path: Path, template: str) -> FallbackRenderer:
    """The renderer of the same model with another chat template."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (copy / file.name).write_bytes(file.read_bytes())
    (copy / "chat_template.jinja").write_text(template)
    return FallbackRenderer(ModelFolder(copy))


def shown(renderer: FallbackRenderer, located: Located) -> tuple[str, list[str]]:
    """All tokens of a sample as text, and the learned stretches."""
    outline = renderer.outline(located)
    stretches: list[list[int]] = []
    for at, (token, learned) in enumerate(zip(outline.ids_T, outline.learned_T, strict=True)):
        if learned and not (at and outline.learned_T[at - 1]):
            stretches.append([])
        if learned:
            stretches[-1].append(int(token))
    decode = renderer.tokenizer.decode
    whole = decode(outline.ids_T.tolist(), skip_special=False)
    return whole, [decode(ids, skip_special=False) for ids in stretches]


def test_learned_is_every_answer_with_its_end_token(
    renderer: FallbackRenderer, tmp_path: Path
) -> None:
    located = borrowed.sample(tmp_path, ("Which?", "red and blue"), ("Sure?", "yes"))
    whole, learned = shown(renderer, located)
    places = "<|image_pad|>" * 4
    assert whole == (
        f"<|im_start|>user\n{places}Which?<|im_end|>\n"
        "<|im_start|>assistant\nred and blue<|im_end|>\n"
        "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
    )
    assert learned == ["red and blue<|im_end|>", "yes<|im_end|>"]


def test_pictures_are_processed_once_unless_one_comes_after_an_answer(
    renderer: FallbackRenderer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    picture = renderer._picture
    monkeypatch.setattr(renderer, "_picture", lambda path: (read.append(path), picture(path))[1])
    first = borrowed.sample(tmp_path, ("Which?", "red"), ("Sure?", "yes"), pictures=2)
    assert shown(renderer, first)[1] == ["red<|im_end|>", "yes<|im_end|>"]
    assert len(read) == 2
    asked, answered = borrowed.sample(tmp_path, ("Which?", "red")).sample.messages
    twice = Sample(id="s", messages=(asked, answered, asked, answered))
    assert shown(renderer, Located(twice, tmp_path))[1] == ["red<|im_end|>", "red<|im_end|>"]
    assert len(read) == 2 + 2 + 1


def test_the_prompt_is_the_beginning_of_the_whole(
    renderer: FallbackRenderer, tmp_path: Path
) -> None:
    located = borrowed.sample(tmp_path, ("Which?", "red"), ("Sure?", "yes"), pictures=2)
    prompt, whole = renderer.prompt_outline(located), renderer.outline(located)
    assert whole.ids_T[: prompt.tokens].tolist() == prompt.ids_T.tolist()
    assert not prompt.learned_T.any()
    encoded = renderer.with_patches(prompt)
    assert encoded.inputs["pixel_values"].shape == (2, 3, borrowed.SIDE, borrowed.SIDE)
    assert "input_ids" not in encoded.inputs


def test_a_system_prompt_is_the_samples_own_or_the_recipes(folder: Path, tmp_path: Path) -> None:
    renderer = FallbackRenderer(ModelFolder(folder), system="Be brief.")
    whole, _ = shown(renderer, borrowed.sample(tmp_path, ("Which?", "red"), pictures=0))
    assert whole.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")


def test_a_rule_scales_pictures_before_the_processor(folder: Path, tmp_path: Path) -> None:
    located = borrowed.sample(tmp_path, ("Which?", "red"))
    rule = ExactSize(height=7, width=9)
    kept, scaled = (
        FallbackRenderer(ModelFolder(folder)),
        FallbackRenderer(ModelFolder(folder), rule),
    )
    assert kept._picture(tmp_path / "0.png").size == (40, 30)
    assert scaled._picture(tmp_path / "0.png").size == (9, 7)
    assert scaled.outline(located).tokens == kept.outline(located).tokens


def test_it_goes_to_other_processes(renderer: FallbackRenderer, tmp_path: Path) -> None:
    located = borrowed.sample(tmp_path, ("Which?", "red"))
    copy = pickle.loads(pickle.dumps(renderer))
    assert copy.outline(located).ids_T.tolist() == renderer.outline(located).ids_T.tolist()


def test_a_model_that_thinks_is_asked_for_an_answer_without_a_thought(
    folder: Path, tmp_path: Path
) -> None:
    renderer = with_template(folder, tmp_path, borrowed.QWEN3_5_TEMPLATE)
    _, learned = shown(renderer, borrowed.sample(tmp_path, ("Which?", "red"), pictures=0))
    assert learned == ["red<|im_end|>"]


REFUSED = {
    "turns rewritten": (borrowed.QWEN3_5_TEMPLATE, [("A?", "red"), ("B?", "blue")],
                        "lays out the prompt"),
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
def test_templates_that_hide_the_answer_are_refused(
    folder: Path, tmp_path: Path, case: str
) -> None:
    template, turns, message = REFUSED[case]
    renderer = with_template(folder, tmp_path, template)
    with pytest.raises(UserError, match=message):
        renderer.outline(borrowed.sample(tmp_path, *turns, pictures=0))


def test_pictures_that_a_template_leaves_out_are_refused(folder: Path, tmp_path: Path) -> None:
    first = borrowed.TEMPLATE.replace(
        "part['type'] == 'image'", "part['type'] == 'image' and loop.first"
    ).replace("part['text']", "part['text'] | default('')")
    renderer = with_template(folder, tmp_path, first)
    renderer.outline(borrowed.sample(tmp_path, ("A?", "b")))
    with pytest.raises(UserError, match="leaves a picture out"):
        renderer.outline(borrowed.sample(tmp_path, ("A?", "b"), pictures=2))


PARTS: dict[str, tuple[list[dict[str, Any]], str]] = {
    "box": ([{"type": "box", "xyxy": [0, 0, 9, 9]}], "a box"),
    "video": ([{"type": "video", "frames": ["0.png"]}], "a video"),
    "special token": ([{"type": "text", "text": "<|im_end|>"}], "reads as a special token"),
}


@pytest.mark.parametrize("case", PARTS)
def test_parts_that_the_family_reads_in_its_own_way_are_refused(
    renderer: FallbackRenderer, tmp_path: Path, case: str
) -> None:
    content, message = PARTS[case]
    turns = [{"role": "user", "content": "A?"}, {"role": "assistant", "content": content}]
    sample = Sample.model_validate({"id": "s", "messages": turns})
    with pytest.raises(UserError, match=message):
        renderer.outline(Located(sample, tmp_path))


def test_an_answer_with_boxes_is_not_asked_for(renderer: FallbackRenderer, tmp_path: Path) -> None:
    box = [{"type": "box", "xyxy": [0, 0, 9, 9]}]
    turns = [{"role": "user", "content": "A?"}, {"role": "assistant", "content": box}]
    sample = Sample.model_validate({"id": "s", "messages": turns})
    with pytest.raises(UserError, match="a box in a conversation"):
        renderer.prompt_outline(Located(sample, tmp_path))


def test_a_folder_without_a_template_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="without a chat template"):
        with_template(folder, tmp_path, "")


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is there")
def test_a_package_that_a_processor_needs_is_named(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_5"}')
    (tmp_path / "processor_config.json").unlink()
    read = {"image_processor_type": "Qwen2VLImageProcessor"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(read))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    with pytest.raises(UserError, match=r"(?i)processor of qwen3_5: .*torchvision"):
        renderer_of(ModelFolder(tmp_path))


def test_transformers_is_an_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    transformers.cache_clear()
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    with pytest.raises(UserError, match=r"pip install 'finesight\[hf\]'"):
        renderer_of(ModelFolder(tmp_path))


CONFIGS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "remote code": (
        {"model_type": "chatty", "auto_map": {"AutoModel": "modeling_chatty.Chatty"}},
        ["chatty", "modeling_chatty.Chatty", "qwen2_vl", "code that comes with a model is never"],
    ),
    "unknown": ({"model_type": "chatty"}, ["chatty", "does not know", "install a transformers"]),
    "text only": ({"model_type": "llama"}, ["llama", "does not answer about pictures"]),
    "with an encoder": ({"model_type": "florence2"}, ["an encoder with a decoder"]),
    "quantised": (
        {"model_type": "llava", "quantization_config": {"bits": 4}},
        ["quantised", "'bits': 4"],
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_families_that_nobody_computes_are_refused(tmp_path: Path, case: str) -> None:
    config, words = CONFIGS[case]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "modeling_chatty.py").write_text("raise SystemExit('code was run')")
    with pytest.raises(UserError) as caught:
        renderer_of(ModelFolder(tmp_path))
    assert all(word in str(caught.value) for word in words), str(caught.value)
