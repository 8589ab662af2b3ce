"""Adapter files shared with peft: equal logits, and rejected files."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from case_files import load_cases
from hf_reference import (
    make_config,
    make_conversation,
    make_native_model,
    make_reference_model,
    max_relative_error,
    native_logits,
    reference_logits,
)
from lora_fixtures import (
    FAMILIES,
    TUNE_SETTINGS,
    edit_adapter_config,
    get_tolerance,
    list_adapted_layers,
    randomize_parameters,
    rename_adapter_keys,
    to_transformers4_name,
    tune_with_lora,
    write_random_adapter,
)
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor

from finesight.errors import UserError
from finesight.files import pattern_matcher
from finesight.files.pattern_matcher import PatternMatcher
from finesight.model.families import to_layer_name
from finesight.model.linear import hub_name, iter_adapters
from finesight.model.lora import peft_io
from finesight.model.trainable import configure_tuning
from finesight.model.vlm import VisionLanguageModel
from finesight.settings.config import TuneSettings

SAMPLES = [
    make_conversation(3, 2, ("image", (1, 10, 14)), 3, ("image", (1, 2, 2)), 4),
    make_conversation(1, 11),
]


def our_model(theirs: Any, family: str = "qwen2_vl", how: str = "language") -> VisionLanguageModel:
    return tune_with_lora(make_native_model(make_config(family), theirs), TUNE_SETTINGS[how])


@torch.no_grad()
def their_logits(theirs: Any) -> Tensor:
    return torch.cat([reference_logits(theirs.eval(), sample) for sample in SAMPLES])


@cache
def baseline_logits(family: str) -> Tensor:
    return their_logits(make_reference_model(make_config(family)))


def list_peft_layers(model: Any) -> set[str]:
    names = {name for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    return {to_layer_name(name.removeprefix("base_model.model.")) for name in names}


PEFT_CONFIGS: dict[str, dict[str, Any]] = {
    "language list": {
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
    },
    "all linear layers": {"target_modules": "all-linear"},
    "part of a group": {"target_modules": ["q_proj", "v_proj", "up_proj"], "r": 2},
    "vision encoder and merger": {
        "target_modules": r"model\.visual\..*(qkv|attn\.proj|fc1|down_proj|mlp\.0|mlp\.2)"
    },
    "ranks of their own": {
        "target_modules": ["q_proj", "v_proj", "o_proj"],
        "rank_pattern": {"v_proj": 3, "layers.1.self_attn.q_proj": 5},
        "alpha_pattern": {r"layers\.1\.self_attn\.[qv]_proj": 20},
    },
    "rank-stabilised": {"target_modules": ["qkv", "v_proj"], "use_rslora": True},
    "some layers": {"target_modules": ["o_proj", "out_proj"], "layers_to_transform": [1]},
    "some excluded": {"target_modules": ["q_proj", "down_proj"], "exclude_modules": ".*visual.*"},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how", PEFT_CONFIGS)
def test_peft_adapter_gives_the_same_logits(family, how, tmp_path):
    theirs = make_reference_model(make_config(family))
    ours = make_native_model(make_config(family), theirs)
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 7, **PEFT_CONFIGS[how]})
    model = peft.get_peft_model(theirs, config)
    randomize_parameters(p for name, p in model.named_parameters() if ".lora_" in name)
    model.save_pretrained(tmp_path)
    expected = their_logits(theirs)
    peft_io.load_adapter(ours, tmp_path)
    assert list_adapted_layers(ours) == list_peft_layers(model)
    assert max_relative_error(native_logits(ours, theirs, SAMPLES), expected) <= get_tolerance(
        family
    )
    assert max_relative_error(baseline_logits(family), expected) > 1e-2
    assert not any(p.requires_grad for p in ours.parameters())

    # Round trip: whatever ranks and layers are loaded, peft reads the saved files equally.
    again = tmp_path / "again"
    again.mkdir()
    peft_io.save_adapter(again, ours, base_model="some/base")
    fresh = make_reference_model(make_config(family))
    reloaded = peft.PeftModel.from_pretrained(fresh, again)
    assert list_peft_layers(reloaded) == list_adapted_layers(ours)
    assert max_relative_error(their_logits(fresh), expected) <= get_tolerance(family)


# transformers had its present names before Qwen3-VL was added.
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_transformers_4_key_names_are_accepted(family, tmp_path):
    theirs = make_reference_model(make_config(family))
    ours = our_model(theirs, family, "all parts")
    peft_io.save_adapter(tmp_path, ours, base_model="some/base")
    listed = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    listed += ["qkv", "attn.proj", "fc1", "fc2", "mlp.0", "mlp.2"]
    rename_adapter_keys(tmp_path, to_transformers4_name)
    edit_adapter_config(tmp_path, target_modules=listed)
    keys = load_file(tmp_path / peft_io.ADAPTER_WEIGHTS_FILE)
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in keys
    assert "base_model.model.visual.merger.mlp.0.lora_B.weight" in keys
    old = make_native_model(make_config(family), theirs)
    peft_io.load_adapter(old, tmp_path)
    assert torch.equal(native_logits(old, theirs, SAMPLES), native_logits(ours, theirs, SAMPLES))


def test_saved_adapter_is_fp32_with_base_fingerprint(tmp_path):
    """Master weights are saved instead of the parameters, deterministically."""
    ours = our_model(make_reference_model(make_config("qwen2_vl")), how="all parts").bfloat16()
    exact = {n: p.detach().float() + 1e-4 for n, p in ours.named_parameters() if ".adapter." in n}
    contents = set()
    for number in range(4):
        folder = tmp_path / str(number)
        folder.mkdir()
        options = {"base_model": "some/base", "base_fingerprint": "f00d"}
        peft_io.save_adapter(folder, ours, **options, master_values=exact)
        contents.add((folder / peft_io.ADAPTER_WEIGHTS_FILE).read_bytes())
    assert len(contents) == 1
    settings = json.loads((folder / peft_io.ADAPTER_CONFIG_FILE).read_text())
    assert (settings["r"], settings["lora_alpha"], settings["lora_dropout"]) == (4, 6, 0.1)
    assert settings["base_model_name_or_path"] == "some/base"
    spec, saved = peft_io.read_adapter(folder)
    assert (spec.base_model, spec.base_fingerprint, spec.dropout) == ("some/base", "f00d", 0.1)
    assert saved.keys() == spec.configs.keys() == list_adapted_layers(ours)
    for path, _, adapter in iter_adapters(ours):
        for output, (a_RI, b_OR) in adapter.factors().items():
            found = saved[hub_name(path, output)]
            assert torch.equal(found.lora_A, a_RI.float() + 1e-4)
            assert torch.equal(found.lora_B, b_OR.float() + 1e-4)


@pytest.mark.parametrize(
    ("how", "change", "message"),
    [
        ("all parts", {}, "10 keys are not in the adapter"),
        ("some targets", {}, "10 keys have no adapter here"),
        ("language", {"rank": 3}, "has rank 4 and scale 1.5"),
        ("language", {"alpha": 8}, "expected: rank 4 and scale 2"),
    ],
)
def test_mismatched_adapter_is_rejected_for_training(how, change, message, tmp_path):
    write_random_adapter(tmp_path)
    settings = make_config("qwen2_vl")
    model = make_native_model(settings, make_reference_model(settings))
    tune = TUNE_SETTINGS[how] | {"lora": TUNE_SETTINGS[how]["lora"] | change}
    configure_tuning(model, TuneSettings.model_validate(tune), seed=9)
    with pytest.raises(UserError) as caught:
        peft_io.load_trainable_adapter(model, tmp_path)
    assert message in str(caught.value)


FIRST = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight"


def load_error(folder: Path, **changes: Any) -> str:
    """Load the adapter into a model of another config. Returns the error."""
    settings = make_config(changes.pop("family", "qwen2_vl"), **changes)
    model = make_native_model(settings, make_reference_model(settings))
    with pytest.raises(UserError) as caught:
        peft_io.load_adapter(model, folder)
    assert not list(iter_adapters(model))
    return str(caught.value)


EMBEDDINGS = "base_model.model.model.language_model.embed_tokens.weight"
DAMAGES: list[tuple[Callable[[str], str], dict[str, Tensor], str]] = [
    (lambda n: n.replace("layers.1.", "layers.7."), {}, "7 keys are no layers of the model"),
    (lambda n: n.replace("A.weight", "A.x"), {}, "14 keys are not factors"),
    (lambda n: n, {EMBEDDINGS: torch.zeros(4, 4)}, "1 keys are not factors"),
    (lambda n: n, {FIRST: torch.zeros(4, 48, dtype=torch.int8)}, "1 keys are not factors"),
    (lambda n: "" if n == FIRST else n, {}, "1 keys lack the other factor"),
    (lambda n: "" if "1.mlp.up" in n else n, {}, "1 keys are named by target_modules"),
    (lambda n: n, {to_transformers4_name(FIRST): torch.zeros(4, 48)}, "1 keys duplicate the layer"),
]


@pytest.mark.parametrize(("rename", "more", "message"), DAMAGES)
def test_inconsistent_keys_are_rejected(rename, more, message, tmp_path):
    write_random_adapter(tmp_path)
    file = rename_adapter_keys(tmp_path, rename) / peft_io.ADAPTER_WEIGHTS_FILE
    save_file(load_file(file) | more, file)
    assert message in load_error(tmp_path)
    # The same with the old names, and with a list where the pattern would name them.
    rename_adapter_keys(tmp_path, to_transformers4_name)
    if "target_modules" in message:
        edit_adapter_config(tmp_path, target_modules=["up_proj"])
        assert "model.layers.1.mlp.up_proj" in load_error(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("use_dora", True),
        ("modules_to_save", ["lm_head"]),
        ("bias", "all"),
        ("bias", "lora_only"),
        ("lora_bias", True),
        ("trainable_token_indices", {"embed_tokens": [1, 2]}),
    ],
)
def test_unsupported_peft_setting_is_named(name, value, tmp_path):
    """The error names the setting, not the tensor keys that it changes."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **{name: value})
    model = peft.get_peft_model(make_reference_model(make_config("qwen2_vl")), config)
    model.save_pretrained(tmp_path)
    message = load_error(tmp_path)
    assert f"the adapter was made with {name}={json.dumps(value)}, which" in message
    assert "merge_and_unload" in message
    # peft can merge such adapters: the remedy applies.
    model.merge_and_unload()


def test_damaged_and_missing_files_are_rejected(tmp_path):
    write_random_adapter(tmp_path)
    config, weights = (
        tmp_path / peft_io.ADAPTER_CONFIG_FILE,
        tmp_path / peft_io.ADAPTER_WEIGHTS_FILE,
    )
    content = config.read_text()
    config.write_text(content[:50])
    assert "Invalid JSON" in load_error(tmp_path)
    config.unlink()
    assert f"{config.name} is missing" in load_error(tmp_path)
    config.write_text(content)
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "not a complete safetensors file" in load_error(tmp_path)
    weights.unlink()
    assert f"{weights.name} is missing" in load_error(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    assert "is a pickle" in load_error(tmp_path)


def test_adapter_of_another_model_is_rejected(tmp_path):
    write_random_adapter(tmp_path, "qwen2_vl", "all parts")
    message = load_error(tmp_path, intermediate_size=84)
    assert "mlp.down_proj have shapes (4, 80) and (48, 4)" in message
    assert "expected: (4, 84) and (48, 4) for this model" in message
    message = load_error(tmp_path, family="qwen2_5_vl")
    assert "keys are no layers of the model: visual.blocks.0.mlp.fc1" in message


def read_error(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        peft_io.read_adapter(folder)
    assert str(folder / peft_io.ADAPTER_CONFIG_FILE) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_lora_weights": "pissa"}, "merge_and_unload"),
        ({"a_setting_of_tomorrow": {"x": 1}}, "merge_and_unload"),
        ({"peft_type": "LOHA"}, "merge_and_unload"),
        ({"layer_replication": [[0, 1], [0, 2]]}, "train the adapter again"),
        ({"peft_type": "PREFIX_TUNING", "use_dora": True}, "with peft_type=LORA"),
        ({"r": 8}, "has rank 8, but 4"),
        ({"r": "4"}, "r: Input should be a valid integer"),
        ({"target_modules": "("}, "not a regular expression"),
    ],
)
def test_unsupported_and_inconsistent_settings_are_rejected(settings, message, tmp_path):
    """Those with tensors of their own are in `test_peft_io`."""
    assert message in read_error(edit_adapter_config(write_random_adapter(tmp_path), **settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"rank_pattern": {r"([\w.]+)+!": 4}},
        {"alpha_pattern": {r"([\w.]+)+!": 4}},
        {"target_modules": r"([\w.]+)+!"},
        {"exclude_modules": r"([\w.]+)+!"},
        {"target_modules": ["qkv"], "layers_to_transform": 0, "layers_pattern": r"([\w.]+)+!"},
    ],
)
def test_exponential_patterns_are_rejected(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(pattern_matcher, "MAX_PATTERN_CPU_S", 0.2)
    edit_adapter_config(write_random_adapter(tmp_path), **settings)
    config = make_config("qwen2_vl")
    model = make_native_model(config, make_reference_model(config))
    with pytest.raises(UserError, match="took more than") as caught:
        peft_io.load_adapter(model, tmp_path)
    assert caught.value.where == str(tmp_path / peft_io.ADAPTER_CONFIG_FILE)


@pytest.mark.parametrize("alpha", ["1e308", "1" + "0" * 400, "NaN", "-Infinity"])
def test_alpha_beyond_fp32_is_rejected(alpha, tmp_path):
    path = write_random_adapter(tmp_path) / peft_io.ADAPTER_CONFIG_FILE
    text = path.read_text()
    path.write_text(text.replace('"lora_alpha": 6', f'"lora_alpha": {alpha}'))
    assert "lora_alpha" in read_error(tmp_path)
    path.write_text(text.replace('"alpha_pattern": {}', f'"alpha_pattern": {{"q_proj": {alpha}}}'))
    assert "alpha_pattern.q_proj" in read_error(tmp_path)


def test_neutral_settings_are_accepted(tmp_path):
    edit_adapter_config(
        write_random_adapter(tmp_path),
        peft_version="0.21.0",
        use_dora=False,
        layer_replication=None,
        megatron_core="megatron.core",
        init_lora_weights="gaussian",
        loftq_config={},
        a_setting_of_tomorrow=None,
    )
    spec, _ = peft_io.read_adapter(tmp_path)
    assert {(low.rank, low.scale) for low in spec.configs.values()} == {(4, 1.5)}


@pytest.mark.parametrize(("settings", "expected"), load_cases("peft_config_errors"))
def test_target_modules_match_peft(settings, expected):
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    name = "model.language_model.layers.12.self_attn.q_proj"
    with PatternMatcher("adapter_config.json", "") as matcher:
        targets = peft_io.PeftConfig(**settings).select_targets([name], matcher)
    assert (targets == [name]) == expected
    if settings["target_modules"] not in (None, "all-linear"):  # peft resolves these elsewhere.
        found = check_target_module_exists(LoraConfig(**settings), name)
        assert (bool(found) and type(found).__name__ != "_ExcludedModule") == expected
