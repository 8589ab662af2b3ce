"""Recipes: read, overridden, written back, and refused with everything a person needs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml
from case_files import load_cases
from test_bounded_files import LAUGHS

from finesight.config import ExactSize, LearningRates, LongestSide
from finesight.errors import UserError
from finesight.recipe import (
    MAX_REPORTED_ERRORS,
    choose_duration,
    dump_recipe,
    list_setting_names,
    load_recipe,
    load_trainer_settings,
    recipe_from_dict,
)

CASES = load_cases("recipe")

SHORTEST = "model: some/model\ndata: {train: a.jsonl}\noutput_dir: runs/one\n"


def _write_recipe(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def _load_error(folder: Path, text: str, *overrides: str) -> UserError:
    with pytest.raises(UserError) as caught:
        load_recipe(_write_recipe(folder, text), overrides)
    return caught.value


def test_minimal_recipe_uses_defaults(tmp_path):
    recipe = load_recipe(_write_recipe(tmp_path, SHORTEST))
    assert recipe.data.train[0].path == Path("a.jsonl")
    assert recipe.train.learning_rate.default == 1e-4
    assert recipe.tune.lora.rank == 64
    assert recipe.output_dir == Path("runs/one")


def test_multiple_files_rates_and_image_size(tmp_path):
    text = SHORTEST.replace("a.jsonl", "[a.jsonl, {path: b.jsonl, weight: 2, limit: 10}]") + (
        "image: {height: 112, width: 504}\n"
        "train: {learning_rate: {default: 1e-5, vision: 2e-6}, warmup: 5e-2, betas: [0.9, 0.95]}\n"
    )
    recipe = load_recipe(_write_recipe(tmp_path, text))
    assert [(f.path.name, f.weight, f.limit) for f in recipe.data.train] == [
        ("a.jsonl", 1.0, None),
        ("b.jsonl", 2.0, 10),
    ]
    assert recipe.image == ExactSize(height=112, width=504)
    assert recipe.train.learning_rate == LearningRates(default=1e-5, vision=2e-6)
    assert recipe.train.warmup == 0.05
    assert recipe.train.betas == (0.9, 0.95)


def test_activation_checkpointing_values(tmp_path):
    for written, meant in (("true", True), ("false", False), ("0.25", 0.25), (".5", 0.5)):
        recipe = load_recipe(
            _write_recipe(tmp_path, SHORTEST), [f"train.activation_checkpointing={written}"]
        )
        assert recipe.train.activation_checkpointing == meant
        assert isinstance(recipe.train.activation_checkpointing, type(meant))
    for wrong in ("2", "1.5", "-0.5", "often"):
        assert (
            "train.activation_checkpointing"
            in _load_error(tmp_path, SHORTEST, f"train.activation_checkpointing={wrong}").where
        )


def test_overrides_replace_and_extend_settings(tmp_path):
    recipe = load_recipe(
        _write_recipe(tmp_path, SHORTEST),
        [
            "train.batch_size=8",
            "data.train=[a.jsonl, b.jsonl]",
            "data.train.1=c.jsonl",
            "train.max_grad_norm=",
        ],
    )
    assert recipe.train.batch_size == 8
    assert [f.path.name for f in recipe.data.train] == ["a.jsonl", "c.jsonl"]
    assert recipe.train.max_grad_norm is None


@pytest.mark.parametrize("addition", CASES["test_recipe_roundtrip"])
def test_recipe_roundtrip(tmp_path, addition):
    recipe = load_recipe(_write_recipe(tmp_path, SHORTEST + addition))
    text = dump_recipe(recipe)
    assert load_recipe(_write_recipe(tmp_path, text)) == recipe
    assert "weight_decay: 0.0" in text, "defaults in force are written out"


def test_misnamed_section_is_recognized_by_its_settings(tmp_path):
    text = "model: some/model\ndataset: {train: a.jsonl}\noutput_dir: runs/one\n"
    assert "rename it to data" in str(_load_error(tmp_path, text))


@pytest.mark.parametrize(("wrong", "near"), CASES["test_unknown_setting_suggests_closest_name"])
def test_unknown_setting_suggests_closest_name(tmp_path, wrong, near):
    error = _load_error(tmp_path, SHORTEST + wrong)
    assert error.where == f"{tmp_path / 'recipe.yaml'}:4"
    assert "unknown setting" in error.what
    assert error.remedy == f"did you mean {near}?"


def test_unknown_setting_lists_alternatives(tmp_path):
    error = _load_error(tmp_path, SHORTEST + "train: {zzzzz: 1}\n")
    assert "weight_decay" in error.expected
    assert "did you mean" not in error.remedy


@pytest.mark.parametrize(
    "wrong",
    [
        *(
            "train.report",
            "train.gpus",
            "train.size",
            "train.log_eval",
            "train.max",
            "data.shuffle",
        ),
        *("image.side", "tune.head", "size", "max", "sampling_steps", "loss", "tokens"),
    ],
)
def test_setting_of_other_spelling_is_not_suggested(tmp_path, wrong):
    error = _load_error(tmp_path, SHORTEST, f"{wrong}=true")
    assert error.remedy == "remove it or correct its name"


@pytest.mark.parametrize(
    ("addition", "key", "value", "expected"), CASES["test_wrong_type_error_has_line_and_value"]
)
def test_wrong_type_error_has_line_and_value(tmp_path, addition, key, value, expected):
    error = _load_error(tmp_path, SHORTEST + addition)
    assert error.where == f"{tmp_path / 'recipe.yaml'}:4"
    assert key in error.what
    assert value in error.what
    assert expected in error.expected
    assert error.remedy


def test_home_paths_are_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "recipe.yaml").write_text(
        "model: m\ndata: {train: ~/a.jsonl}\noutput_dir: ~/runs/x\n"
    )
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert recipe.data.train[0].path == tmp_path / "a.jsonl"
    assert recipe.output_dir == tmp_path / "runs" / "x"


def test_image_rule_error_names_the_intended_form(tmp_path):
    error = _load_error(tmp_path, SHORTEST + "image: {heigth: 112, width: 504}\n")
    assert "image.heigth" in str(error)
    assert "did you mean image.height?" in str(error)
    assert "min_pixels: this setting is missing" not in str(error)


def test_all_missing_settings_are_reported(tmp_path):
    error = _load_error(tmp_path, "data: {eval: b.jsonl}\n")
    assert "3 settings are wrong" in error.what
    for name in ("model", "data.train", "output_dir"):
        assert f"{name}: this setting is missing" in error.what
    assert "Qwen/Qwen2-VL-2B-Instruct" in error.what


def test_contradicting_settings(tmp_path):
    error = _load_error(tmp_path, SHORTEST + "train: {epochs: 1, steps: 5}\n")
    assert "epochs and steps are both set" in error.what
    error = _load_error(tmp_path, SHORTEST + "tune: {language: frozen}\n")
    assert "every part is frozen" in error.what


def test_nf4_parts_must_be_frozen(tmp_path):
    for written, expected in (
        ("language", ("language",)),
        ("[vision, merger]", ("vision", "merger")),
        ("[language, embeddings]", ("language", "embeddings")),
        ("[language, vision, language]", ("vision", "language")),
    ):
        (tmp_path / "recipe.yaml").write_text(
            SHORTEST + f"tune: {{quantize: {{nf4: {written}}}}}\n"
        )
        assert load_recipe(tmp_path / "recipe.yaml").tune.quantize.nf4 == expected
    error = _load_error(
        tmp_path, SHORTEST + "tune: {vision: full, quantize: {nf4: [language, vision]}}\n"
    )
    assert "vision is full and in quantize.nf4" in error.what
    assert "set tune.vision to lora or frozen" in error.what
    error = _load_error(
        tmp_path, SHORTEST + "tune: {embeddings: full, quantize: {nf4: [embeddings]}}\n"
    )
    assert "embeddings is full and in quantize.nf4" in error.what
    assert "set tune.embeddings to frozen" in error.what
    error = _load_error(tmp_path, SHORTEST + "tune: {quantize: {nf4: [head]}}\n")
    assert "'head'" in error.what
    assert "'vision', 'merger', 'language' or 'embeddings'" in error.expected
    assert (
        "a list of at least 1"
        in _load_error(tmp_path, SHORTEST + "tune: {quantize: {nf4: []}}\n").expected
    )


def test_fp8_parts_must_be_frozen(tmp_path):
    for written, expected in (
        ("language", ("language",)),
        ("[language, vision]", ("vision", "language")),
    ):
        (tmp_path / "recipe.yaml").write_text(
            SHORTEST + f"tune: {{quantize: {{fp8: {written}}}}}\n"
        )
        assert load_recipe(tmp_path / "recipe.yaml").tune.quantize.fp8 == expected
    error = _load_error(
        tmp_path, SHORTEST + "tune: {vision: full, quantize: {fp8: [language, vision]}}\n"
    )
    assert "vision is full and in quantize.fp8" in error.what
    assert "set tune.vision to lora or frozen" in error.what
    error = _load_error(
        tmp_path, SHORTEST + "tune: {quantize: {nf4: [language], fp8: [language]}}\n"
    )
    assert "language is in quantize.nf4 and in quantize.fp8" in error.what
    error = _load_error(tmp_path, SHORTEST + "tune: {quantize: {fp8: [merger]}}\n")
    assert "'merger'" in error.what
    assert "'vision' or 'language'" in error.expected


def test_override_error_names_the_override(tmp_path):
    error = _load_error(tmp_path, SHORTEST, "train.batchh=8")
    assert error.where == "override train.batchh=8"
    assert error.remedy == "did you mean train.batch_size?"
    assert (
        _load_error(tmp_path, SHORTEST, "trian.batch_size=8").where == "override trian.batch_size=8"
    )
    assert (
        _load_error(tmp_path, SHORTEST, "train.batch_size=x").where == "override train.batch_size=x"
    )


@pytest.mark.parametrize(("override", "output"), CASES["test_invalid_overrides"])
def test_invalid_overrides(tmp_path, override, output):
    assert output in str(_load_error(tmp_path, SHORTEST, override))


SHORT_FORMS = """\
data: {train: a.jsonl, eval: b.jsonl}
train: {learning_rate: 1.0e-4}
tune: {quantize: {nf4: language}}
track: tensorboard
"""
LONG_FORMS = """\
data: {train: {path: a.jsonl}, eval: {path: b.jsonl}}
train: {learning_rate: {default: 1.0e-4}, betas: [0.9, 0.999]}
tune: {quantize: {nf4: [language]}}
track: {kind: tensorboard}
image: {min_pixels: null}
"""
LIST_FORMS = """\
data: {train: [a.jsonl], eval: [{path: b.jsonl}]}
tune: {quantize: {nf4: [language]}}
track: [tensorboard]
image: {longest_side: 512}
"""
BASES = [
    pytest.param(f"model: some/model\noutput_dir: runs/one\n{forms}", id=name)
    for name, forms in (("short", SHORT_FORMS), ("long", LONG_FORMS), ("lists", LIST_FORMS))
]


LEARNING_RATES = {"default": 1e-4, "vision": 2e-5}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(
    ("override", "setting", "expected"), CASES["test_overrides_of_short_and_long_forms"]
)
def test_overrides_of_short_and_long_forms(tmp_path, base, override, setting, expected):
    recipe = load_recipe(_write_recipe(tmp_path, base), [override])
    value = recipe.model_dump(mode="json", exclude_none=True)
    for name in setting.split("."):
        value = value[name]
    assert value == expected


@pytest.mark.parametrize(
    ("override", "indexed"), CASES["test_override_of_one_of_several_entries_needs_an_index"]
)
def test_override_of_one_of_several_entries_needs_an_index(tmp_path, override, indexed):
    text = (
        "model: some/model\noutput_dir: runs/one\ntrack: [wandb, tensorboard]\n"
        "data: {train: [a.jsonl, b.jsonl], eval: [c.jsonl, d.jsonl]}\n"
    )
    error = _load_error(tmp_path, text, override)
    assert "has 2 entries" in error.what
    assert error.expected == "an index from 0 to 1"
    assert f"use {indexed} for the first" in error.remedy
    changed = load_recipe(_write_recipe(tmp_path, text), [indexed, "data.train.1.limit=7"])
    assert changed.data.train[1].limit == 7


def test_override_of_absent_list_creates_its_entry(tmp_path):
    overrides = ["data.eval.path=b.jsonl", "data.eval.limit=5", "track.kind=wandb"]
    recipe = load_recipe(_write_recipe(tmp_path, SHORTEST), overrides)
    assert [(str(file.path), file.limit) for file in recipe.data.eval] == [("b.jsonl", 5)]
    assert recipe.track[0].kind == "wandb"


def test_override_replaces_settings_that_it_excludes(tmp_path):
    text = SHORTEST + "image: {height: 112, width: 504}\ntrain: {epochs: 2}\n"
    path = _write_recipe(tmp_path, text)
    recipe = load_recipe(path, ["image.longest_side=512", "train.steps=10"])
    assert recipe.image == LongestSide(longest_side=512)
    assert (recipe.train.steps, recipe.train.epochs) == (10, None)
    assert load_recipe(path, ["image.width=112"]).image == ExactSize(height=112, width=112)
    assert load_recipe(path, ["train.steps=null"]).train.epochs == 2
    assert "both set" in _load_error(tmp_path, text, "train.steps=1", "train.epochs=1").what
    error = _load_error(tmp_path, text, "image.longest_side=512", "image.max_pixels=100")
    assert "image.max_pixels: this setting excludes the others" in error.what
    assert "did you mean" not in error.what


def test_typo_next_to_an_override_keeps_its_line(tmp_path):
    error = _load_error(
        tmp_path, SHORTEST + "train: {learning_rate: {visoin: 1}}\n", "train.seed=1"
    )
    assert error.where.endswith("recipe.yaml:4")
    error = _load_error(tmp_path, SHORTEST, "data.train.limit=many")
    assert error.where == "override data.train.limit=many"


REPLACEMENTS = load_cases("setting_replacements")
"""Remedies for settings of other trainers."""


@pytest.mark.parametrize(("override", "remedy"), REPLACEMENTS.items())
def test_settings_of_other_trainers_are_replaced(tmp_path, override, remedy):
    text = SHORTEST + "eval: {metric: ocr}\ntune: {vision: lora}\n"
    error = _load_error(tmp_path, text, override)
    assert error.remedy.startswith(remedy)
    name, _, value = override.partition("=")
    if "." not in name:
        assert _load_error(tmp_path, f"{text}{name}: {value}\n").remedy == error.remedy
    replacement = error.remedy.removeprefix("use ").partition(": ")[0]
    if "use" in remedy and "=" in replacement and " or " not in replacement:
        load_recipe(_write_recipe(tmp_path, text), shlex.split(replacement))


def test_every_setting_of_other_trainers_has_advice():
    content = load_trainer_settings()
    least = {"model": "m", "data": {"train": "a.jsonl"}, "output_dir": "o"}
    for trainer in ("transformers", "LLaMA-Factory", "ms-swift"):
        keys = content[trainer]["converted"].split() + list(content[trainer].get("aliases", {}))
        for key in set(keys) - {"model", "output_dir"}:
            with pytest.raises(UserError) as caught:
                recipe_from_dict(least | {key: "4"})
            assert caught.value.remedy.startswith(("use ", "remove it: ")), key


def test_replacements_are_settings():
    names = [tuple(name.split(".")) for name in list_setting_names()]
    known = {".".join(name[:depth]) for name in names for depth in range(1, len(name) + 1)}
    content = load_trainer_settings()
    renamed = [{"use": f"{name}={{}}"} for name in content["renamed"]]
    for group in content["replacements"] + renamed:
        texts = [group["use"]]
        if texts == ["{}"]:
            texts = [*group["values"], group["other"]]
        for name in re.findall(r"([a-z_0-9.]+)=", " ".join(texts)):
            assert re.sub(r"\.\d$", "", name) in known, group


def test_configuration_of_another_trainer_is_recognized(tmp_path):
    text = "model_name_or_path: m\ndataset: d\nlora_rank: 8\noutput_dir: o\n"
    error = _load_error(tmp_path, text)
    assert "use tune.lora.rank=8" in error.what
    assert "finesight convert" in error.remedy
    assert not _load_error(tmp_path, "modl: m\ndta: d\nlora_rank: 8\n").remedy


@pytest.mark.parametrize(("text", "line", "output"), CASES["test_broken_yaml_error_has_line"])
def test_broken_yaml_error_has_line(tmp_path, text, line, output):
    error = _load_error(tmp_path, text)
    assert error.where == f"{tmp_path / 'recipe.yaml'}:{line}"
    assert output in error.what


@pytest.mark.parametrize("text", ["", "just words\n", "- model\n"])
def test_file_that_is_no_recipe(tmp_path, text):
    assert "not a recipe" in _load_error(tmp_path, text).what


def test_self_referencing_alias_is_rejected(tmp_path):
    assert "model" in str(
        _load_error(tmp_path, "model: &a [*a]\ndata: {train: x}\noutput_dir: y\n")
    )


@pytest.mark.parametrize("value", ["[*a, *a, *a, *a]", "{train: *a, x: *a, y: *a, z: *a}"])
def test_recursive_aliases_are_reported(tmp_path, value):
    refusal = _load_error(tmp_path, f"model: x\ndata: &a {value}\noutput_dir: y\n")
    assert "contains itself" in refusal.what
    assert refusal.where.endswith(":2")


def test_billion_laughs_is_rejected(tmp_path):
    assert "aliases that expand to" in _load_error(tmp_path, LAUGHS).what


@pytest.mark.parametrize("value", ["2020-13-45", "!!int foo", "0x_", "9" * 5000, '"a\\0b"'])
def test_impossible_value_error_has_line(tmp_path, value):
    refusal = _load_error(tmp_path, f"model: x\noutput_dir: {value}\n")
    assert refusal.where.endswith(":2")
    assert "broken YAML" in refusal.what
    refusal = _load_error(tmp_path, SHORTEST, f"output_dir={value}")
    assert "cannot be read" in refusal.what
    assert len(str(refusal)) < 400


@pytest.mark.parametrize("name", ["\u00b2", "data.train.\u0663", "data.train." + "9" * 5000])
def test_invalid_list_index_in_override(tmp_path, name):
    assert _load_error(tmp_path, SHORTEST, f"{name}=1").where.startswith("override")


def test_device_file_is_rejected():
    with pytest.raises(UserError, match="a device"):
        load_recipe(Path("/dev/zero"))


@pytest.mark.parametrize("setting", CASES["test_out_of_range_values_are_rejected"])
def test_out_of_range_values_are_rejected(tmp_path, setting):
    """Each of these ended in a traceback, or in no end at all."""
    refusal = _load_error(tmp_path, SHORTEST, setting)
    assert refusal.where.startswith("override")
    assert "invalid value" in refusal.what


def test_missing_recipe_suggests_closest_name(tmp_path):
    path = _write_recipe(tmp_path, SHORTEST)
    with pytest.raises(UserError, match="no such file") as caught:
        load_recipe(path.with_name("recipes.yaml"))
    assert str(path) in caught.value.remedy
    with pytest.raises(UserError, match="no such file"):
        load_recipe(tmp_path / "no" / "where.yaml")


def test_folder_and_binary_file_are_rejected(tmp_path):
    with pytest.raises(UserError, match="is a folder"):
        load_recipe(tmp_path)
    run_recipe = _write_recipe(tmp_path, SHORTEST)
    with pytest.raises(UserError, match=f"give the recipe of this run: {run_recipe}"):
        load_recipe(tmp_path)
    path = tmp_path / "bytes.yaml"
    path.write_bytes(b"model: \xff\xfe\n")
    with pytest.raises(UserError, match="byte 7 is not UTF-8"):
        load_recipe(path)


def test_setting_names_are_unique_and_dotted():
    names = list_setting_names()
    assert len(names) == len(set(names))
    assert "tune.lora.rank" in names
    assert "image.longest_side" in names
    assert "tune" not in names, "groups are opened up"


def test_metric_is_a_known_name_or_function(tmp_path):
    text = SHORTEST + "eval: {metric: captoins}\n"
    refusal = _load_error(tmp_path, text)
    assert "'captoins'" in refusal.what
    assert "'captions'" in refusal.expected
    assert "metric.py:score" in refusal.expected
    recipe = load_recipe(_write_recipe(tmp_path, text), ["eval.metric=some/metric.py:plates"])
    assert recipe.eval is not None
    assert recipe.eval.metric == "some/metric.py:plates"


def test_patience_requires_eval_every(tmp_path):
    text = SHORTEST + "eval: {metric: ocr, patience: 3}\n"
    error = _load_error(tmp_path, text)
    assert "patience requires an explicit eval.every, because" in error.what
    assert error.remedy == "add eval.every=0.1"
    recipe = load_recipe(_write_recipe(tmp_path, text), ["eval.every=0.1"])
    assert recipe.eval is not None
    assert recipe.eval.patience == 3


def test_tracker_settings(tmp_path):
    for written, meant in (
        ("tensorboard", ["tensorboard"]),
        ("[tensorboard, wandb]", ["tensorboard", "wandb"]),
        ("{kind: swanlab, uri: cloud}", ["swanlab"]),
        ("[trackio, {kind: mlflow, uri: 'http://tracking:5000'}]", ["trackio", "mlflow"]),
        ("[]", []),
        ("", []),
    ):
        recipe = load_recipe(_write_recipe(tmp_path, SHORTEST), [f"track={written}"])
        assert [tracker.kind for tracker in recipe.track] == meant
        assert load_recipe(_write_recipe(tmp_path, dump_recipe(recipe))) == recipe


@pytest.mark.parametrize(("written", "output"), CASES["test_invalid_trackers"])
def test_invalid_trackers(tmp_path, written, output):
    assert output in str(_load_error(tmp_path, SHORTEST, f"track={written}"))


@pytest.mark.parametrize(
    "address",
    ["http://me:planted@host:5000", "http://host/?write_token=planted", "https://planted@host"],
)
def test_tracker_uri_with_password_is_rejected(tmp_path, address):
    error = _load_error(tmp_path, SHORTEST + f"track: {{kind: mlflow, uri: '{address}'}}\n")
    assert "contains a password or token" in str(error)
    assert "planted" not in str(error)


def test_no_data_at_all_is_refused(tmp_path):
    error = _load_error(tmp_path, SHORTEST, "data.train=[]")
    assert error.where == "override data.train=[]"
    assert error.expected == "a list of at least 1"


def test_very_many_mistakes_are_counted_and_the_first_explained(tmp_path):
    """Each costs a search for the nearest name: 100,000 took minutes, and so did their message."""
    unknown = {f"k{number}": number for number in range(100_000)}
    with pytest.raises(UserError, match="100,000 settings are wrong") as caught:
        recipe_from_dict({"model": "m", "data": {"train": "a.jsonl"}, "output_dir": "o"} | unknown)
    assert caught.value.what.count("unknown setting") == MAX_REPORTED_ERRORS
    assert f"and {100_000 - MAX_REPORTED_ERRORS:,} more" in caught.value.what
    text = SHORTEST + "eval:\n" + "".join(f"  k{number}: 0\n" for number in range(5_000))
    error = _load_error(tmp_path, text)
    assert "5,001 settings are wrong" in error.what
    assert len(error.what) < 20_000


def test_a_recipe_of_very_many_settings_is_not_read_to_its_end(tmp_path):
    error = _load_error(
        tmp_path, SHORTEST + "".join(f"k{number}: 0\n" for number in range(100_000))
    )
    assert "more than 20,000 values" in error.what
    assert error.where.endswith("recipe.yaml:9999")
    assert "more than 1,048,576 bytes" in _load_error(tmp_path, "# " + "x" * 2**20).what


def test_long_name_is_shortened_in_the_message(tmp_path):
    error = _load_error(tmp_path, SHORTEST + "? " + "x" * 500_000 + "\n: 1\n")
    assert "unknown setting" in error.what
    assert len(error.what) < 200


@pytest.mark.parametrize(
    ("num_samples", "is_short", "key", "value"),
    [
        (24, False, "steps", 100),
        (24, True, "steps", 100),
        (160, False, "epochs", 5),
        (600, True, "epochs", 5),
        (800, True, "steps", 200),
        (800, False, "epochs", 5),
        (2000, False, "epochs", 3),
        (50_000, False, "epochs", 1),
        (50_000, True, "steps", 200),
        (None, True, "steps", 100),
    ],
)
def test_duration_follows_the_number_of_samples(num_samples, is_short, key, value):
    batch_size = 8 if (num_samples or 0) < 200 else 16
    [(name, text)] = choose_duration(num_samples, batch_size, is_short).items()
    number, _, comment = text.partition("  # ")
    assert (name, int(number)) == (f"train.{key}", value)
    assert 20 < len(comment) < 80
    settings = yaml.safe_load(f"{key}: {text}")
    assert settings == {key: value}


def test_inputs_are_also_found_in_the_folder_of_the_recipe(tmp_path, monkeypatch):
    folder = tmp_path / "recipes"
    folder.mkdir()
    text = (
        "model: weights\nadapter: adapter\noutput_dir: runs/one\n"
        "data: {train: [both.jsonl, 'shards/*.tar', {path: c.jsonl, weight: 2}], eval: no.jsonl}\n"
        "eval: {metric: 'score.py:f'}\n"
    )
    for name in ("both.jsonl", "shards/1.tar", "c.jsonl", "score.py", "weights/a", "runs/one"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    (tmp_path / "both.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(_write_recipe(folder, text).relative_to(tmp_path), ["data.eval=c.jsonl"])
    paths = [str(file.path) for file in (*recipe.data.train, *recipe.data.eval)]
    assert paths == ["both.jsonl", "recipes/shards/*.tar", "recipes/c.jsonl", "c.jsonl"]
    assert (recipe.model, str(recipe.adapter)) == ("recipes/weights", "adapter")
    assert (recipe.eval.metric, str(recipe.output_dir)) == ("recipes/score.py:f", "runs/one")
