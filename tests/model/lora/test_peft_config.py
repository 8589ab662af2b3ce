"""Adapter configs: settings handled as in peft, and rejected settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from case_files import load_cases
from lora_fixtures import edit_adapter_config, write_random_adapter

from finesight.errors import UserError
from finesight.model.lora.peft_io import ADAPTER_CONFIG_FILE, PeftConfig, read_adapter


def load_error(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_adapter(folder)
    assert str(folder / ADAPTER_CONFIG_FILE) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_lora_weights": "pissa"}, "merge_and_unload"),
        ({"a_setting_of_tomorrow": {"x": 1}}, "merge_and_unload"),
        ({"peft_type": "LOHA"}, "merge_and_unload"),
        ({"layer_replication": [[0, 1], [0, 2]]}, "train the adapter again"),
        (
            {"peft_type": "PREFIX_TUNING", "use_dora": True},
            "train the adapter again, with peft_type=LORA",
        ),
    ],
)
def test_unsupported_settings_are_rejected(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """Those with tensors of their own are in `test_peft_io`."""
    found = load_error(edit_adapter_config(write_random_adapter(tmp_path), **settings))
    assert message in found
    name, value = next(iter(settings.items()))
    if "peft_type=LORA" not in message:
        assert f"the adapter was made with {name}={json.dumps(value)}, which" in found


@pytest.mark.parametrize("alpha", ["1e308", "1" + "0" * 400, "NaN", "-Infinity"])
def test_an_alpha_that_no_weight_can_hold_is_refused(alpha: str, tmp_path: Path) -> None:
    path = write_random_adapter(tmp_path) / ADAPTER_CONFIG_FILE
    text = path.read_text()
    assert '"lora_alpha": 6' in text
    path.write_text(text.replace('"lora_alpha": 6', f'"lora_alpha": {alpha}'))
    assert "lora_alpha" in load_error(tmp_path)
    path.write_text(text.replace('"alpha_pattern": {}', f'"alpha_pattern": {{"q_proj": {alpha}}}'))
    assert "alpha_pattern.q_proj" in load_error(tmp_path)


def test_neutral_settings_are_accepted(tmp_path: Path) -> None:
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
    spec, _ = read_adapter(tmp_path)
    assert {(low.rank, low.scale) for low in spec.configs.values()} == {(4, 1.5)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 8}, "has rank 8, but 4 in the adapter's tensors"),
        ({"r": "4"}, "r: Input should be a valid integer (found '4')"),
        ({"target_modules": "("}, "'(' is not a regular expression"),
    ],
)
def test_inconsistent_config_is_rejected(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    assert message in load_error(edit_adapter_config(write_random_adapter(tmp_path), **settings))


@pytest.mark.parametrize(("settings", "expected"), load_cases("peft_config_errors"))
def test_target_modules_match_peft(settings: dict[str, Any], expected: bool) -> None:
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    name = "model.language_model.layers.12.self_attn.q_proj"
    assert PeftConfig(**settings).is_target(name) == expected
    if settings["target_modules"] not in (None, "all-linear"):  # peft resolves these elsewhere.
        found = check_target_module_exists(LoraConfig(**settings), name)
        assert (bool(found) and type(found).__name__ != "_ExcludedModule") == expected
