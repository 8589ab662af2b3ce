"""Adapters here and in peft: the same files, the same logits, and what is refused."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from oracle import config, conversation, distance, native, packed, reference, reference_logits
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from tuned import (
    FAMILIES,
    TUNES,
    adapted,
    old_name,
    randomise,
    reconfigured,
    renamed,
    tuned,
    written,
)

from finesight.config import Tune
from finesight.errors import UserError
from finesight.model.adapter import (
    CONFIG,
    WEIGHTS,
    continue_adapter,
    install_adapter,
    read_adapter,
    target_pattern,
    write_adapter,
)
from finesight.model.lora import adaptable_layers, adapters, hub_name
from finesight.model.network import VisionLanguageModel
from finesight.model.parts import apply_tuning
from finesight.model.peft_config import layer_name

SAMPLES = [
    conversation(3, 2, ("image", (1, 10, 14)), 3, ("image", (1, 2, 2)), 4),
    conversation(1, 11),
]


def our_model(theirs: Any, family: str, how: str = "language") -> VisionLanguageModel:
    return tuned(native(config(family), theirs), TUNES[how])


@torch.no_grad()
def our_logits(model: VisionLanguageModel, theirs: Any) -> torch.Tensor:
    return model.eval().logits(model(packed(theirs, SAMPLES)))


@torch.no_grad()
def their_logits(theirs: Any) -> torch.Tensor:
    return torch.cat([reference_logits(theirs.eval(), sample) for sample in SAMPLES])


def adapted_by_peft(model: Any) -> set[str]:
    names = {name for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    return {layer_name(name.removeprefix("base_model.model.")) for name in names}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how", TUNES)
def test_an_adapter_from_here_loads_in_peft_with_the_same_logits(
    family: str, how: str, tmp_path: Path
) -> None:
    theirs = reference(config(family))
    plain = their_logits(theirs)
    ours = our_model(theirs, family, how)
    write_adapter(tmp_path, ours, base="some/base")
    with warnings.catch_warnings():
        # peft only warns of keys that are missing or of no use.
        warnings.simplefilter("error", UserWarning)
        loaded = peft.PeftModel.from_pretrained(theirs, tmp_path)
    expected = their_logits(theirs)
    assert adapted_by_peft(loaded) == adapted(ours)
    assert distance(our_logits(ours, theirs), expected) <= 1e-5
    assert distance(plain, expected) > 1e-2


PEFT_CONFIGS: dict[str, dict[str, Any]] = {
    "language list": {
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"],
    },
    "all linear layers": {"target_modules": "all-linear"},
    "part of a group": {"target_modules": ["q_proj", "v_proj", "up_proj"], "r": 2},
    "tower and merger": {
        "target_modules": r"model\.visual\..*(qkv|attn\.proj|fc1|down_proj|mlp\.0|mlp\.2)"
    },
    "ranks of their own": {
        "target_modules": ["q_proj", "v_proj", "o_proj"],
        "rank_pattern": {"v_proj": 3, "layers.1.self_attn.q_proj": 5},
        "alpha_pattern": {r"layers\.1\.self_attn\.[qv]_proj": 20},
    },
    "rank-stabilised": {"target_modules": ["qkv", "v_proj"], "use_rslora": True},
    "some layers": {"target_modules": ["o_proj"], "layers_to_transform": [1]},
    "some excluded": {
        "target_modules": ["q_proj", "down_proj"],
        "exclude_modules": r".*visual.*",
    },
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how", PEFT_CONFIGS)
def test_an_adapter_from_peft_loads_here_with_the_same_logits(
    family: str, how: str, tmp_path: Path
) -> None:
    theirs = reference(config(family))
    ours = native(config(family), theirs)
    plain = their_logits(theirs)
    model = peft.get_peft_model(
        theirs, peft.LoraConfig(**{"r": 4, "lora_alpha": 7, **PEFT_CONFIGS[how]})
    )
    randomise(p for name, p in model.named_parameters() if ".lora_" in name)
    model.save_pretrained(tmp_path)
    expected = their_logits(theirs)
    install_adapter(ours, tmp_path)
    assert adapted(ours) == adapted_by_peft(model)
    assert distance(our_logits(ours, theirs), expected) <= 1e-5
    assert distance(plain, expected) > 1e-2
    assert not any(p.requires_grad for p in ours.parameters())

    # And out again: whatever ranks and layers came in, peft reads what goes out the same.
    again = tmp_path / "again"
    again.mkdir()
    write_adapter(again, ours, base="some/base")
    fresh = reference(config(family))
    reloaded = peft.PeftModel.from_pretrained(fresh, again)
    assert adapted_by_peft(reloaded) == adapted(ours)
    assert distance(their_logits(fresh), expected) <= 1e-5


# Qwen3-VL came when transformers had its present names.
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_names_of_transformers_4_are_read_the_same(family: str, tmp_path: Path) -> None:
    theirs = reference(config(family))
    ours = our_model(theirs, family, "all parts")
    write_adapter(tmp_path, ours, base="some/base")
    listed = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    listed += ["qkv", "attn.proj", "fc1", "fc2", "mlp.0", "mlp.2"]
    reconfigured(renamed(tmp_path, old_name), target_modules=listed)
    keys = load_file(tmp_path / WEIGHTS)
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in keys
    assert "base_model.model.visual.merger.mlp.0.lora_B.weight" in keys
    old = native(config(family), theirs)
    install_adapter(old, tmp_path)
    assert torch.equal(our_logits(old, theirs), our_logits(ours, theirs))


@pytest.mark.filterwarnings("ignore")
def test_peft_itself_loads_the_old_names_as_an_adapter_that_does_nothing(tmp_path: Path) -> None:
    # Why every key is checked here. When peft learns to refuse or read them, this test may go.
    renamed(written(tmp_path), old_name)
    theirs = reference(config("qwen2_vl"))
    plain = their_logits(theirs)
    peft.PeftModel.from_pretrained(theirs, tmp_path)
    assert torch.equal(their_logits(theirs), plain)


def test_what_is_written_is_current_fp32_and_tells_its_base(tmp_path: Path) -> None:
    theirs = reference(config("qwen2_vl"))
    ours = our_model(theirs, "qwen2_vl", "all parts").bfloat16()
    write_adapter(tmp_path, ours, base="some/base", base_fingerprint="f00d")
    keys = load_file(tmp_path / WEIGHTS)
    assert {tensor.dtype for tensor in keys.values()} == {torch.float32}
    start = "base_model.model.model."
    assert all(k.startswith((f"{start}language_model.layers.", f"{start}visual.")) for k in keys)
    settings = json.loads((tmp_path / CONFIG).read_text())
    assert (settings["r"], settings["lora_alpha"], settings["lora_dropout"]) == (4, 6, 0.1)
    assert settings["base_model_name_or_path"] == "some/base"
    spec, factors = read_adapter(tmp_path)
    assert (spec.base, spec.base_fingerprint, spec.dropout) == ("some/base", "f00d", 0.1)
    assert factors.keys() == spec.layers.keys() == adapted(ours)


def test_the_same_adapter_is_the_same_file(tmp_path: Path) -> None:
    ours = our_model(reference(config("qwen2_vl")), "qwen2_vl")
    contents = set()
    for number in range(8):
        folder = tmp_path / str(number)
        folder.mkdir()
        write_adapter(folder, ours, base="some/base", base_fingerprint="f00d")
        contents.add((folder / WEIGHTS).read_bytes())
    assert len(contents) == 1


def test_exacter_values_are_written_in_place_of_the_parameters(tmp_path: Path) -> None:
    ours = our_model(reference(config("qwen2_vl")), "qwen2_vl")
    exact = {name: p.detach() + 1e-4 for name, p in ours.named_parameters() if ".adapter." in name}
    write_adapter(tmp_path, ours, base="some/base", values=exact)
    _, factors = read_adapter(tmp_path)
    for path, _, adapter in adapters(ours):
        for output, (a_RI, b_OR) in adapter.factors().items():
            found = factors[hub_name(path, output)]
            assert torch.equal(found.a, a_RI + 1e-4)
            assert torch.equal(found.b, b_OR + 1e-4)


def test_the_target_pattern_matches_the_chosen_layers_and_no_other() -> None:
    model = native(config("qwen2_5_vl"), reference(config("qwen2_5_vl")))
    existing = list(adaptable_layers(model))
    choices = [
        [name for name in existing if name.endswith("gate_proj") and "visual" not in name],
        [name for name in existing if name.endswith(("q_proj", "mlp.0", "attn.proj"))],
        ["model.layers.1.self_attn.q_proj"],
        existing,
    ]
    published = {
        name.replace("model.layers", "model.language_model.layers"): name for name in existing
    }
    published = {re.sub("^visual", "model.visual", name): old for name, old in published.items()}
    for chosen in choices:
        pattern = target_pattern(chosen, existing)
        assert [old for name, old in published.items() if re.fullmatch(pattern, name)] == chosen
    assert r"layers\.\d+\." in target_pattern(choices[0], existing)


def test_training_goes_on_from_an_adapter_of_the_same_make(tmp_path: Path) -> None:
    theirs = reference(config("qwen2_vl"))
    first = our_model(theirs, "qwen2_vl", "all parts")
    write_adapter(tmp_path, first, base="some/base")
    second = native(config("qwen2_vl"), theirs)
    apply_tuning(second, Tune.model_validate(TUNES["all parts"]), seed=9)
    continue_adapter(second, tmp_path)
    assert torch.equal(our_logits(second, theirs), our_logits(first, theirs))
    assert all(p.requires_grad for _, _, a in adapters(second) for p in a.parameters())


@pytest.mark.parametrize(
    ("how", "change", "message"),
    [
        ("all parts", {}, "10 keys are not in the adapter: visual.blocks.0.attn.qkv"),
        ("some targets", {}, "10 keys have no adapter here: model.layers.0.mlp.down_proj, "),
        ("language", {"rank": 3}, "has rank 4 and scale 1.5 in the adapter\n"),
        ("language", {"alpha": 8}, "expected: rank 4 and scale 2, as the recipe says"),
    ],
)
def test_training_does_not_go_on_from_an_adapter_of_another_make(
    how: str, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    written(tmp_path)
    model = native(config("qwen2_vl"), reference(config("qwen2_vl")))
    tune = TUNES[how] | {"lora": TUNES[how]["lora"] | change}
    apply_tuning(model, Tune.model_validate(tune), seed=9)
    with pytest.raises(UserError) as caught:
        continue_adapter(model, tmp_path)
    assert message in str(caught.value)
    assert "finesight merge" in str(caught.value)


FIRST = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight"


def refused(folder: Path, family: str = "qwen2_vl") -> str:
    model = native(config(family), reference(config(family)))
    with pytest.raises(UserError) as caught:
        install_adapter(model, folder)
    assert not list(adapters(model))
    return str(caught.value)


def test_keys_that_fit_no_layer_are_refused_by_name(tmp_path: Path) -> None:
    written(tmp_path)
    message = refused(renamed(tmp_path, lambda key: key.replace("layers.1.", "layers.7.")))
    assert "7 keys are no layers of the model: model.layers.7.mlp.down_proj, " in message
    assert "and 2 more" in message
    garbage = refused(renamed(tmp_path, lambda key: key.replace("lora_A.weight", "lora_A.x")))
    assert "14 keys are not factors of linear layers: " in garbage
    assert "and 9 more" in garbage


UNSUPPORTED: dict[str, dict[str, Any]] = {
    "use_dora=true": {"use_dora": True},
    'modules_to_save=["lm_head"]': {"modules_to_save": ["lm_head"]},
    'bias="all"': {"bias": "all"},
    'bias="lora_only"': {"bias": "lora_only"},
    "lora_bias=true": {"lora_bias": True},
    'trainable_token_indices={"embed_tokens": [1, 2]}': {
        "trainable_token_indices": {"embed_tokens": [1, 2]}
    },
}


@pytest.mark.parametrize("setting", UNSUPPORTED)
def test_an_adapter_of_peft_that_is_not_plain_is_refused_by_its_setting(
    setting: str, tmp_path: Path
) -> None:
    """Not by the keys of its tensors, which are others than those of factors, too."""
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj"], **UNSUPPORTED[setting]}
    model = peft.get_peft_model(reference(config("qwen2_vl")), peft.LoraConfig(**settings))
    model.save_pretrained(tmp_path)
    message = refused(tmp_path)
    assert f"{tmp_path / CONFIG}: the adapter was made with {setting}, which" in message
    assert "merge the adapter into its base with peft (merge_and_unload)" in message
    # Such adapters do merge in peft: the remedy is one.
    model.merge_and_unload()


def test_embeddings_beside_factors_are_refused_with_the_same_remedy(tmp_path: Path) -> None:
    written(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    key = "base_model.model.model.language_model.embed_tokens.weight"
    save_file(tensors | {key: torch.zeros(4, 4)}, tmp_path / WEIGHTS)
    message = refused(tmp_path)
    assert f"1 keys are not factors of linear layers: {key}" in message
    assert "merge_and_unload" in message


def test_factors_in_whole_numbers_are_refused(tmp_path: Path) -> None:
    written(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    save_file(tensors | {FIRST: tensors[FIRST].to(torch.int8)}, tmp_path / WEIGHTS)
    assert f"1 keys are not factors of linear layers: {FIRST}" in refused(tmp_path)


def test_an_adapter_of_the_other_family_is_refused(tmp_path: Path) -> None:
    written(tmp_path, "qwen2_vl", "all parts")
    assert "keys are no layers of the model: visual.blocks.0.mlp.fc1" in refused(
        tmp_path, "qwen2_5_vl"
    )


def test_a_lost_half_of_a_layer_is_refused(tmp_path: Path) -> None:
    written(tmp_path)
    message = refused(renamed(tmp_path, lambda key: "" if key == FIRST else key))
    assert "1 keys lack the other factor of their layer (A or B): model.language_model" in message


def test_a_lost_layer_is_refused(tmp_path: Path) -> None:
    written(tmp_path)
    message = refused(renamed(tmp_path, lambda key: "" if "layers.1.mlp.up" in key else key))
    assert "1 keys are named by target_modules" in message
    assert "model.layers.1.mlp.up_proj" in message
    # The same by a list, and with the old names.
    renamed(tmp_path, old_name)
    reconfigured(tmp_path, target_modules=["up_proj"])
    assert "model.layers.1.mlp.up_proj" in refused(tmp_path)


def test_a_layer_under_both_names_is_refused(tmp_path: Path) -> None:
    written(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    save_file(tensors | {old_name(FIRST): tensors[FIRST].clone()}, tmp_path / WEIGHTS)
    message = refused(tmp_path)
    assert "1 keys name layers that other keys name as well: " in message
    assert "layers.0.self_attn.q_proj.lora_A.weight" in message


def test_damaged_and_missing_files_are_refused(tmp_path: Path) -> None:
    written(tmp_path)
    content = (tmp_path / CONFIG).read_text()
    (tmp_path / CONFIG).write_text(content[:50])
    assert "Invalid JSON" in refused(tmp_path)
    (tmp_path / CONFIG).unlink()
    assert f"{CONFIG} is missing" in refused(tmp_path)
    (tmp_path / CONFIG).write_text(content)
    (tmp_path / WEIGHTS).write_bytes((tmp_path / WEIGHTS).read_bytes()[:1000])
    assert "not readable as safetensors" in refused(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    assert f"{WEIGHTS} is missing" in refused(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    assert "is a pickle" in refused(tmp_path)


def test_an_adapter_of_a_larger_model_is_refused_with_both_shapes(tmp_path: Path) -> None:
    written(tmp_path)
    settings = config("qwen2_vl", intermediate_size=84)
    model = native(settings, reference(settings))
    with pytest.raises(UserError) as caught:
        install_adapter(model, tmp_path)
    assert "mlp.down_proj have shapes (4, 80) and (48, 4)" in str(caught.value)
    assert "expected: (4, 84) and (48, 4) for this model" in str(caught.value)
