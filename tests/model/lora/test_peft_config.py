"""Adapter configs: settings handled as in peft, and rejected settings."""

from pathlib import Path

import pytest
from case_files import load_cases
from each_value import each
from lora_fixtures import edit_adapter_config, write_random_adapter

from finesight.errors import UserError
from finesight.model.lora.peft_io import ADAPTER_CONFIG_FILE, PeftConfig, read_adapter


def load_error(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_adapter(folder)
    assert str(folder / ADAPTER_CONFIG_FILE) in str(caught.value)
    return str(caught.value)


@each(
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
    assert message in load_error(edit_adapter_config(write_random_adapter(tmp_path), **settings))


@each("alpha", ["1e308", "1" + "0" * 400, "NaN", "-Infinity"])
def test_alpha_beyond_fp32_is_rejected(alpha, tmp_path):
    path = write_random_adapter(tmp_path) / ADAPTER_CONFIG_FILE
    text = path.read_text()
    path.write_text(text.replace('"lora_alpha": 6', f'"lora_alpha": {alpha}'))
    assert "lora_alpha" in load_error(tmp_path)
    path.write_text(text.replace('"alpha_pattern": {}', f'"alpha_pattern": {{"q_proj": {alpha}}}'))
    assert "alpha_pattern.q_proj" in load_error(tmp_path)


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
    spec, _ = read_adapter(tmp_path)
    assert {(low.rank, low.scale) for low in spec.configs.values()} == {(4, 1.5)}


@each(("settings", "expected"), load_cases("peft_config_errors"))
def test_target_modules_match_peft(settings, expected):
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    name = "model.language_model.layers.12.self_attn.q_proj"
    assert PeftConfig(**settings).is_target(name) == expected
    if settings["target_modules"] not in (None, "all-linear"):  # peft resolves these elsewhere.
        found = check_target_module_exists(LoraConfig(**settings), name)
        assert (bool(found) and type(found).__name__ != "_ExcludedModule") == expected
