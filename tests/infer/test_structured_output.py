import json
import random
import re
from copy import copy

import pytest
from engine_fixtures import list_allowed
from tiny_model import create_tiny_model

from finesight.encode.renderer import NativeRenderer
from finesight.errors import UserError
from finesight.families.qwen3_5.renderer import Qwen35
from finesight.infer.structured_output import GrammarCompiler, GrammarConstraint
from finesight.model_folder import ModelFolder

FAMILIES = ["qwen", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
VOCABULARY = 3000
"""More than any of the small tokenizers has, as published models have more rows than tokens."""

TICKET = {
    "type": "object",
    "properties": {
        "seat": {"type": "string", "maxLength": 5},
        "row": {"type": "integer", "minimum": 1, "maximum": 99},
        "class": {"enum": ["first", "second"]},
    },
    "required": ["seat", "row", "class"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def renderers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, NativeRenderer]:
    folder = tmp_path_factory.mktemp("models")
    made = [create_tiny_model(folder / family, family=family) for family in FAMILIES]
    return {path.name: NativeRenderer(ModelFolder(path)) for path in made}


def walk(
    renderer: NativeRenderer, constraint: GrammarConstraint, seed: int, hurry: int = 40
) -> str:
    """A random answer that the constraint allows, ended as soon as it may after `hurry` tokens."""
    rng, ids = random.Random(seed), []
    for _ in range(2000):
        choices = list_allowed(constraint)
        assert choices, "no token may come"
        assert max(choices) < VOCABULARY
        ends = [token for token in choices if token in renderer.end_ids]
        token = rng.choice(ends if ends and len(ids) >= hurry else choices)
        constraint.accept_token(token)
        ids.append(token)
        if token in renderer.end_ids:
            return renderer.tokenizer.decode(ids[:-1], skip_special_tokens=False)
    raise AssertionError(f"no end after {len(ids)} tokens")


def follows(renderer: NativeRenderer, constraint: GrammarConstraint, text: str) -> bool:
    """Check that the text may come, in the largest tokens allowed, and then the end."""
    rest = text.encode()
    while rest:
        spelled = {
            token: renderer.tokenizer.id_to_bytes(token) for token in list_allowed(constraint)
        }
        fitting = [token for token, word in spelled.items() if word and rest.startswith(word)]
        if not fitting:
            return False
        token = max(fitting, key=lambda token: len(spelled[token]))
        constraint.accept_token(token)
        rest = rest[len(spelled[token]) :]
    return renderer.end_ids[0] in list_allowed(constraint)


@pytest.mark.parametrize("family", FAMILIES)
def test_constrained_output_matches_schema(renderers, family):
    grammars = GrammarCompiler(renderers[family], VOCABULARY)
    for seed in range(3):
        value = json.loads(walk(renderers[family], grammars.compile_json_schema(TICKET), seed))
        assert set(value) == {"seat", "row", "class"}
        assert 1 <= value["row"] <= 99
        assert value["class"] in ("first", "second")
    text = '{"a": [1, "b\\n", null], "c": {}}'
    assert follows(renderers[family], grammars.compile_json_object(), text)
    spaces = "{" + " " * 100 + "}"
    assert not follows(renderers[family], grammars.compile_json_object(), spaces)


BOX_LISTS = {
    "qwen": "<ref>dog</ref><box>(0,10),(500,999)</box><box>(1,1),(22,22)</box>",
    "qwen2_vl": "<|object_ref_start|>dog<|object_ref_end|><|box_start|>(0,10),(500,1000)"
    "<|box_end|><|box_start|>(1,1),(22,22)<|box_end|>",
    "qwen2_5_vl": '[{"bbox_2d": [0, 10, 5000, 999], "label": "a"}, {"bbox_2d": [1, 1, 2, 2]}]',
    "qwen3_vl": '[{"bbox_2d": [0, 10, 500, 1000], "label": "a"}, {"bbox_2d": [1, 1, 2, 2]}]',
}
LARGEST = {"qwen": "999", "qwen2_vl": "1000", "qwen2_5_vl": "5000", "qwen3_vl": "1000"}


@pytest.mark.parametrize("key", ["bbox_2d", "point_2d"])
@pytest.mark.parametrize("family", FAMILIES)
def test_boxes_in_the_format_of_the_family(renderers, family, key):
    renderer, text, other = renderers[family], BOX_LISTS[family], BOX_LISTS[family]
    points = re.sub(r"(\d+), (\d+), \d+, \d+", r"\1, \2", text).replace("bbox_2d", "point_2d")
    points = re.sub(r"\),\(\d+,\d+", "", points).replace("10", LARGEST[family])
    text, other = (text, points) if key == "bbox_2d" else (points, text)
    grammars = GrammarCompiler(renderer, VOCABULARY)
    assert follows(renderer, grammars.compile_boxes(key), text)
    for wrong in ("A dog at " + text, text.replace(LARGEST[family], "123456"), other):
        assert not follows(renderer, grammars.compile_boxes(key), wrong)
    for seed in range(3):
        text = walk(renderer, grammars.compile_boxes(key), seed)
        boxes = renderer.family.read_boxes(text, (100, 100), (100, 100))
        assert all(box.is_point == (key == "point_2d") for box in boxes)
        marks = text.count(key) + text.count("<box>") + text.count("<|box_start|>")
        assert len(boxes) == marks


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_tool_call_of_a_listed_function(renderers, family):
    grammars = GrammarCompiler(renderers[family], VOCABULARY)
    arguments = '{"seat": "1A", "row": 7, "class": "first"}'
    for name, is_listed in (("book", True), ("steal", False)):
        constraint = grammars.compile_tool_calls([("book", TICKET), ("stop", None)])
        text = f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'
        assert follows(renderers[family], constraint, text) == is_listed


def test_tool_call_in_xml(renderers):
    renderer = copy(renderers["qwen3_vl"])
    renderer.family = Qwen35()
    grammars = GrammarCompiler(renderer, VOCABULARY)
    for name, argument, is_valid in (
        ("book", "seat", True),
        ("steal", "seat", False),
        ("book", "x", False),
    ):
        constraint = grammars.compile_tool_calls([("book", TICKET), ("stop", None)])
        value = f"<parameter={argument}>\n1 <A>\nb\n</parameter>\n"
        text = f"<tool_call>\n<function={name}>\n{value * 2}</function>\n</tool_call>"
        assert follows(renderer, constraint, text) == is_valid


def test_unsupported_schemas_are_rejected(renderers):
    grammars = GrammarCompiler(renderers["qwen2_vl"], VOCABULARY)
    for schema in (
        {"type": "strange"},
        {"$ref": "https://example.com/schema.json"},
        {"$ref": "file:///etc/passwd"},
    ):
        with pytest.raises(UserError, match="cannot be compiled"):
            grammars.compile_json_schema(schema)


def test_published_tokenizers(shared):
    for name in ("Qwen-VL-Chat", "Qwen2.5-VL-7B-Instruct"):
        renderer = NativeRenderer(ModelFolder(shared / "qwen_assets" / name))
        grammars = GrammarCompiler(renderer, 151936)
        constraint = grammars.compile_json_object()
        assert len(constraint.compute_bitmask()) == 151936 // 32
        for token in (*renderer.tokenizer.encode('{"größe": "12 ½"}'), renderer.end_ids[0]):
            assert token in list_allowed(constraint)
            constraint.accept_token(token)
    # One token of its own here, several in older families.
    assert len(renderer.tokenizer.encode("<tool_call>")) == 1
    called = '<tool_call>\n{"name": "book", "arguments": {}}\n</tool_call>'
    assert follows(renderer, grammars.compile_tool_calls([("book", None)]), called)


def test_reasoning_is_unconstrained_and_answer_is_constrained(tmp_path):
    folder = create_tiny_model(tmp_path / "thinks", family="qwen3_vl")
    template = folder / "chat_template.json"
    content = json.loads(template.read_text())
    content["chat_template"] += "{# opens a thought: <think> #}"
    template.write_text(json.dumps(content))
    renderer = NativeRenderer(ModelFolder(folder))
    grammars = GrammarCompiler(renderer, VOCABULARY)
    for text, is_valid in (
        ('so {a\nor }</think>\n\n{"a": 1}', True),
        ('{"a": 1}', False),
        ("so</think>\n\nand more", False),
    ):
        assert follows(renderer, grammars.compile_json_object(), text) == is_valid
