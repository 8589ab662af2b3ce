"""Qwen3.5, 3.6 and 3.8 are rendered token by token like the published chat templates."""

import json
import random
from collections.abc import Callable
from copy import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from case_files import load_cases
from conversation_fixtures import (
    decode_supervised,
    get_text,
    make_text_sample,
    render_published,
)
from PIL import Image
from tokenizer_strings import random_text_without_specials

from finesight.encode import renderer as renderer_area
from finesight.encode.family import ThinkingOptions
from finesight.encode.renderer import NativeRenderer
from finesight.encode.tokenization import load_tokenizer
from finesight.errors import UserError
from finesight.families.qwen3_5.renderer import Qwen35
from finesight.model_folder import ModelFolder
from finesight.samples.sample import (
    ContentPart,
    ImagePart,
    LocatedSample,
    Message,
    Role,
    Sample,
    TextPart,
    ToolCallPart,
)

CASES = load_cases("encode_qwen3_5")

ASSETS = Path(__file__).resolve().parents[3] / "shared" / "qwen_assets"
pytestmark = pytest.mark.skipif(
    not (ASSETS / "Qwen3.5-4B" / "tokenizer.json").exists(), reason="no published files"
)
IMAGE_TOKENS = 4


@pytest.fixture(scope="module")
def renderers(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], NativeRenderer]:
    """Function that returns the renderer of a model; loading a tokenizer takes a second."""
    folder = tmp_path_factory.mktemp("models")
    first = load_tokenizer(make_model_folder("Qwen3.5-4B", folder / "first"))

    @cache
    def make_renderer(name: str) -> NativeRenderer:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(renderer_area, "load_tokenizer", lambda folder: first)
            return NativeRenderer(make_model_folder(name, folder / name))

    return make_renderer


def make_model_folder(name: str, target: Path) -> ModelFolder:
    target.mkdir()
    for file in ("config.json", "chat_template.jinja", "tokenizer_config.json"):
        (target / file).write_bytes((ASSETS / name / file).read_bytes())
    # All models of the family have the same tokenizer.
    (target / "tokenizer.json").symlink_to(ASSETS / "Qwen3.5-4B" / "tokenizer.json")
    limits = {"size": {"shortest_edge": 64 * 64, "longest_edge": 64 * 64}}
    given = json.loads((ASSETS / name / "preprocessor_config.json").read_text())
    (target / "preprocessor_config.json").write_text(json.dumps(given | limits))
    return ModelFolder(target)


def make_conversation(rng: random.Random) -> list[Message]:
    messages = []
    if rng.random() < 0.4:
        messages.append(Message(role="system", content=split_text(rng, make_text(rng))))
    for _ in range(rng.randrange(1, 5)):
        images = [ImagePart(image="image.png") for _ in range(rng.randrange(3))]
        messages.append(Message(role="user", content=(*images, *split_text(rng, make_text(rng)))))
        messages.append(make_answer(rng))
        for _ in range(rng.choice([0, 0, 1, 2])):
            messages += [make_tool_turn(rng), make_answer(rng)]
    return messages


def make_answer(rng: random.Random) -> Message:
    answer = make_text(rng)
    if rng.random() < 0.6:
        space, reasoning = make_space(rng), make_text(rng) if rng.random() < 0.8 else ""
        # Answers that start with a space and a newline are tokenized apart from the prompt.
        separator = rng.choice(["", "\n", "\n\n", "  ", "\n\n  ", "\t"])
        answer = f"{space}<think>{reasoning}</think>{separator}{answer.lstrip()}"
    return Message(role="assistant", content=split_text(rng, answer))


def make_tool_turn(rng: random.Random) -> Message:
    responses = [f"<tool_response>{make_text(rng)}</tool_response>" for _ in range(2)]
    before, after = (rng.choice(["", "", "", "x"]) for _ in range(2))
    text = before + make_space(rng).join(responses[rng.randrange(2) :]) + after
    parts = split_text(rng, f"{make_space(rng)}{text}{make_space(rng)}")
    if rng.random() < 0.3:
        index = rng.randrange(len(parts) + 1)
        parts = (*parts[:index], ImagePart(image="image.png"), *parts[index:])
    return Message(role="user", content=parts)


def split_text(rng: random.Random, text: str) -> tuple[ContentPart, ...]:
    """Split a text into one to three parts; tags may be split."""
    cuts = sorted(rng.randrange(len(text) + 1) for _ in range(rng.choice([0, 0, 1, 2])))
    ends = zip([0, *cuts], [*cuts, len(text)], strict=True)
    return tuple(TextPart(text=text[start:end]) for start, end in ends)


def make_space(rng: random.Random) -> str:
    return rng.choice(["", "", " ", "  ", "\n", " \n\n", "\n \n", "\t"])


def make_text(rng: random.Random) -> str:
    text = random_text_without_specials(rng).replace("<", "(") + "x"
    return make_space(rng) + text + make_space(rng)


@cache
def load_published_tokenizer(name: str = "Qwen3.5-4B") -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(ASSETS / name / "tokenizer.json"))


@pytest.mark.parametrize(
    ("name", "thinking", "effort"), CASES["test_tokens_equal_published_template"]
)
def test_tokens_equal_published_template(name, thinking, effort, renderers, tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "image.png")
    effort_of_mode = effort if thinking else None
    options = ThinkingOptions(enable_thinking=thinking, reasoning_effort=effort_of_mode)
    renderer = renderers(name).with_thinking(options)
    assert renderer.has_reasoning == thinking
    assert isinstance(renderer.family, Qwen35)
    assert renderer.family.preserves_reasoning == (name == "Qwen3.8-27B")
    rng = random.Random(f"{name} {thinking} {effort}")
    kwargs = {} if effort is None else {"reasoning_effort": effort}
    for number in range(60):
        messages = make_conversation(rng)
        sample = Sample(id=str(number), messages=tuple(messages))
        for is_prompt in (False, True):
            # The last answer of a training sample selects its mode.
            thought = get_text(messages[-1]).partition("<think>")[2].partition("</think>")[0]
            mode = thinking if is_prompt else bool(thought.strip())
            rendered = render_published(
                ModelFolder(ASSETS / name),
                messages[:-1] if is_prompt else messages,
                inline_reasoning=effort is None,
                add_generation_prompt=is_prompt,
                enable_thinking=mode,
                **kwargs,
            )
            pad = "<|image_pad|>"
            text = rendered.replace(pad, pad * IMAGE_TOKENS)
            tokenize = renderer.tokenize_prompt if is_prompt else renderer.tokenize
            found = tokenize(LocatedSample(sample, tmp_path))
            assert found.ids_T.tolist() == load_published_tokenizer().encode(text).ids, rendered
            assert found.is_thinking == mode


def make_value(rng: random.Random, depth: int = 0) -> Any:
    inner = [make_value(rng, depth + 1) for _ in range(rng.randrange(3))] if depth < 2 else []
    values = (make_text(rng), rng.randrange(-9, 10**9), rng.random() * 1e20, True, None, "5", "")
    return rng.choice((*values, inner, dict(zip("aé", inner, strict=False))))


def make_tool_conversation(rng: random.Random, *, thinks: bool) -> Sample:
    def answer(*parts: ContentPart) -> Message:
        reasoning = f"<think>\n{make_text(rng).strip()}\n</think>\n\n" if thinks else ""
        reasoning = reasoning if rng.random() < 0.5 else ""
        return Message(role="assistant", content=(TextPart(text=reasoning), *parts))

    def result_or_question(role: Role) -> Message:
        images = [ImagePart(image="image.png") for _ in range(rng.randrange(2))]
        return Message(role=role, content=(*images, TextPart(text=make_text(rng))))

    messages = [Message(role="system", content=make_text(rng))]
    for _ in range(rng.randrange(1, 4)):
        messages.append(result_or_question("user"))
        for _ in range(rng.randrange(3)):
            texts = [TextPart(text=make_text(rng).lstrip()) for _ in range(rng.randrange(2))]
            calls = [
                ToolCallPart(name="zoom", arguments={key: make_value(rng) for key in "aé"[:number]})
                for number in range(rng.randrange(3) + 1)
            ]
            messages.append(answer(*texts, *calls))
            messages += [result_or_question("tool") for _ in range(rng.randrange(1, 3))]
        messages.append(answer(TextPart(text=make_text(rng).strip())))
    parameters = {"type": "object", "properties": {"a": {"type": "string"}}}
    function = {"name": "zoom", "description": make_text(rng), "parameters": parameters}
    tools = ({"type": "function", "function": function},)[: rng.randrange(3)]
    return Sample(id="tools", messages=tuple(messages), tools=tools)


@pytest.mark.parametrize(
    ("name", "template"),
    [
        *((name, name) for name in ("Qwen3.5-4B", "Qwen3.5-0.8B", "Qwen3.6-27B", "Qwen3.8-27B")),
        # The templates of Qwen2.5-VL have no tools; those of Qwen2.5 and Qwen3-VL are equal.
        ("Qwen3-VL-Embedding-8B", "Qwen3-VL-Embedding-8B"),
        ("Qwen2.5-VL-7B-Instruct", "Qwen3-VL-Embedding-8B"),
    ],
)
def test_tools_equal_published_template(name, template, renderers, tmp_path):
    Image.new("RGB", (56, 56)).save(tmp_path / "image.png")
    is_xml, has_effort = name.startswith("Qwen3."), name == "Qwen3.8-27B"
    renderer = renderers(name) if is_xml else NativeRenderer(ModelFolder(ASSETS / name))
    tokenizer = load_published_tokenizer("Qwen3.5-4B" if is_xml else name)
    rng = random.Random(name)
    for _ in range(200):
        sample = make_tool_conversation(rng, thinks=is_xml)
        located_sample = LocatedSample(sample, tmp_path)
        for is_prompt in (False, True):
            thought = get_text(sample.messages[-1]).partition("<think>")[2]
            mode = is_prompt or bool(thought.partition("</think>")[0].strip())
            options = ThinkingOptions(enable_thinking=True if is_xml else None)
            rendered = render_published(
                ModelFolder(ASSETS / template),
                list(sample.messages[:-1] if is_prompt else sample.messages),
                inline_reasoning=not has_effort,
                add_generation_prompt=is_prompt,
                tools=sample.tools,
                **({"enable_thinking": mode} if is_xml else {}),
            )
            prompting = renderer.with_thinking(options)
            found = (prompting.tokenize_prompt if is_prompt else prompting.tokenize)(located_sample)
            size = found.spans[0].stop - found.spans[0].start if found.spans else 0
            text = rendered.replace("<|image_pad|>", "<|image_pad|>" * size)
            assert found.ids_T.tolist() == tokenizer.encode(text).ids, rendered


def test_results_of_tools_and_excluded_turns_are_not_supervised(renderers):
    renderer = copy(renderers("Qwen3.5-4B"))
    call = ToolCallPart(name="zoom", arguments={"x": 1})
    messages = (
        Message(role="user", content="Which?"),
        Message(role="assistant", content=(TextPart(text="Look."), call)),
        Message(role="tool", content="blank"),
        Message(role="assistant", content="None.", loss=False),
        Message(role="user", content="Sure?"),
        Message(role="assistant", content="Yes."),
    )
    located_sample = LocatedSample(Sample(id="x", messages=messages), Path())
    called = "Look.\n\n<tool_call>\n<function=zoom>\n<parameter=x>\n1\n</parameter>\n</function>\n"
    called += "</tool_call><|im_end|>"
    full = renderer.tokenize(located_sample)
    assert decode_supervised(renderer, located_sample) == f"{called}Yes.<|im_end|>"
    renderer.supervise = "last"
    assert decode_supervised(renderer, located_sample) == "Yes.<|im_end|>"
    assert renderer.tokenize(located_sample).ids_T.tolist() == full.ids_T.tolist()


def test_answers_and_their_reasoning_are_supervised(renderers):
    renderer = renderers("Qwen3.5-4B")
    thought, output = "<think>\nIt glows.\n</think>\n\n", "It glows.\n</think>\n\n"
    tool = "<tool_response>\n7\n</tool_response>"
    for turns, expected in (
        (("Which?", "blue", "Sure?", "red"), ("blue", "red")),
        (("Which?", "blue", "Sure?", f"{thought}red"), ("blue", f"{output}red")),
        (("Which?", f"{thought}blue", "Sure?", "red"), ("blue", "red")),
        (("Which?", f"{thought}call", tool, f"{thought}red"), (f"{output}call", f"{output}red")),
        (("Which?", f"{thought}call", tool, "call", tool, "red"), (f"{output}call", "call", "red")),
    ):
        text = "".join(f"{answer}<|im_end|>" for answer in expected)
        for thinking in (False, True):
            options = ThinkingOptions(enable_thinking=thinking)
            found = decode_supervised(renderer.with_thinking(options), make_text_sample(*turns))
            assert found == text


@pytest.mark.parametrize("name", ["Qwen3.5-4B", "Qwen3.8-27B"])
@pytest.mark.parametrize("answer", ["red", "<think>\nIt glows.\n</think>\n\nred"])
def test_prompt_in_mode_of_sample_is_its_prefix(name, answer, renderers):
    renderer = renderers(name)
    located_sample = make_text_sample("Which?", answer)
    full = renderer.tokenize(located_sample)
    options = ThinkingOptions(enable_thinking=full.is_thinking)
    prompt = renderer.with_thinking(options).tokenize_prompt(located_sample)
    start = prompt.num_tokens
    assert prompt.is_thinking == full.is_thinking == ("think" in answer)
    assert prompt.ids_T.tolist() == full.ids_T[:start].tolist()
    assert full.loss_mask_T[start:].tolist().count(False) == 1
    ids = full.ids_T[start:].tolist()
    completion = renderer.decode_completion(ids, is_thinking=prompt.is_thinking)
    reasoning = "It glows." if prompt.is_thinking else None
    assert (completion.text, completion.reasoning) == ("red", reasoning)


def test_mode_without_support_is_rejected(renderers):
    newest, older = renderers("Qwen3.8-27B"), renderers("Qwen3.5-4B")
    assert newest.with_thinking(ThinkingOptions(reasoning_effort="low")).has_reasoning
    thinking = newest.with_thinking(ThinkingOptions(enable_thinking=True))
    assert not thinking.with_thinking(ThinkingOptions(reasoning_effort="none")).has_reasoning
    for renderer, enable_thinking, effort, expected in (
        (newest, None, "high", "xhigh, medium, low"),
        (newest, False, "low", "thinking mode"),
        (newest, True, "none", "xhigh, medium, low"),
        (older, None, "low", "no value"),
    ):
        options = ThinkingOptions(enable_thinking=enable_thinking, reasoning_effort=effort)
        with pytest.raises(UserError) as caught:
            renderer.with_thinking(options)
        assert expected in caught.value.expected
        assert not renderer.has_reasoning
