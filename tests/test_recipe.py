"""Recipes: read, overridden, written back, and refused with everything a person needs."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_yaml_text import LAUGHS

from finesight.config import ExactSize, Rates
from finesight.errors import UserError
from finesight.recipe import MOST_TOLD, dump_recipe, load_recipe, recipe_of, setting_names

SHORTEST = "model: some/model\ndata: {train: a.jsonl}\noutput: runs/one\n"


def _written(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def _refusal(folder: Path, text: str, *overrides: str) -> UserError:
    with pytest.raises(UserError) as caught:
        load_recipe(_written(folder, text), overrides)
    return caught.value


def test_shortest_recipe_takes_the_defaults(tmp_path):
    recipe = load_recipe(_written(tmp_path, SHORTEST))
    assert recipe.data.train[0].path == Path("a.jsonl")
    assert recipe.train.learning_rate.default == 1e-4
    assert recipe.tune.lora.rank == 64
    assert recipe.output == Path("runs/one")


def test_several_files_weights_rates_and_a_size(tmp_path):
    text = SHORTEST.replace("a.jsonl", "[a.jsonl, {path: b.jsonl, weight: 2, limit: 10}]") + (
        "picture: {height: 112, width: 504}\n"
        "train: {learning_rate: {default: 1e-5, vision: 2e-6}, warmup: 5e-2, betas: [0.9, 0.95]}\n"
    )
    recipe = load_recipe(_written(tmp_path, text))
    assert [(f.path.name, f.weight, f.limit) for f in recipe.data.train] == [
        ("a.jsonl", 1.0, None),
        ("b.jsonl", 2.0, 10),
    ]
    assert recipe.picture == ExactSize(height=112, width=504)
    assert recipe.train.learning_rate == Rates(default=1e-5, vision=2e-6)
    assert recipe.train.warmup == 0.05
    assert recipe.train.betas == (0.9, 0.95)


def test_layers_are_recomputed_all_none_or_a_share(tmp_path):
    for written, meant in (("true", True), ("false", False), ("0.25", 0.25), (".5", 0.5)):
        recipe = load_recipe(_written(tmp_path, SHORTEST), [f"train.recompute={written}"])
        assert recipe.train.recompute == meant
        assert isinstance(recipe.train.recompute, type(meant))
    for wrong in ("2", "1.5", "-0.5", "often"):
        assert "train.recompute" in _refusal(tmp_path, SHORTEST, f"train.recompute={wrong}").where


def test_overrides_replace_add_and_reach_into_lists(tmp_path):
    recipe = load_recipe(
        _written(tmp_path, SHORTEST),
        ["train.batch=8", "data.train=[a.jsonl, b.jsonl]", "data.train.1=c.jsonl", "train.clip="],
    )
    assert recipe.train.batch == 8
    assert [f.path.name for f in recipe.data.train] == ["a.jsonl", "c.jsonl"]
    assert recipe.train.clip is None


@pytest.mark.parametrize(
    "addition",
    ["", "picture: {longest_side: 256}\n", "train: {clip: null, learning_rate: 1e-5, epochs: 2}\n"],
)
def test_written_recipe_reads_back_as_the_same(tmp_path, addition):
    recipe = load_recipe(_written(tmp_path, SHORTEST + addition))
    text = dump_recipe(recipe)
    assert load_recipe(_written(tmp_path, text)) == recipe
    assert "weight_decay: 0.0" in text, "defaults in force are written out"


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("lr: 0.1\n", "train.learning_rate"),
        ("trian: {batch: 8}\n", "train"),
        ("train: {learningrate: 0.1}\n", "train.learning_rate"),
        ("tune: {lora: {rang: 8}}\n", "tune.lora.rank"),
        ("lora_rank: 8\n", "tune.lora.rank"),
        ("max_steps: 8\n", "train.steps"),
    ],
)
def test_unknown_setting_is_refused_with_the_nearest_name(tmp_path, wrong, near):
    error = _refusal(tmp_path, SHORTEST + wrong)
    assert error.where == f"{tmp_path / 'recipe.yaml'}:4"
    assert "unknown setting" in error.what
    assert error.remedy == f"did you mean {near}?"


def test_unknown_setting_like_no_other_lists_what_there_is(tmp_path):
    error = _refusal(tmp_path, SHORTEST + "train: {zzzzz: 1}\n")
    assert "weight_decay" in error.expected
    assert "did you mean" not in error.remedy


@pytest.mark.parametrize(
    ("addition", "key", "value", "expected"),
    [
        ("train: {batch: 1.5}\n", "train.batch", "1.5", "a whole number"),
        ("train: {batch: '8'}\n", "train.batch", "'8'", "a whole number"),
        ("train: {batch: 0}\n", "train.batch", "0", "a number above 0"),
        ("train: {learning_rate: fast}\n", "train.learning_rate", "'fast'", "a number"),
        ("train: {warmup: lots}\n", "train.warmup", "'lots'", "a whole number or a number"),
        ("train: {warmup: 1.5}\n", "train.warmup", "1.5", "below 1.0"),
        ("train: {betas: [0.9]}\n", "train.betas", "0.9", "item number 1"),
        ("train: {betas: [0.9, 0.9, 0.9]}\n", "train.betas", "0.9", "a list of at most 2"),
        ("train: {betas: [0.9, 1.0]}\n", "train.betas.1", "1.0", "a number below 1.0"),
        ("train: {epochs: .inf}\n", "train.epochs", "inf", "a finite number"),
        ("train: {learning_rate: {default: inf}}\n", "learning_rate.default", "inf", "finite"),
        ("tune: {language: loar}\n", "tune.language", "'loar'", "'frozen', 'lora' or 'full'"),
        ("tune: {lora: 8}\n", "tune.lora", "8", "a group with rank, alpha"),
        ("picture: 280\n", "picture", "280", "longest_side"),
        ("train: {recompute: often}\n", "train.recompute", "'often'", "true or false"),
        ("track: [tensorbord]\n", "track.0", "'tensorbord'", "'tensorboard'"),
        ("track: {kind: wandb, project: 1}\n", "track", "1", "text"),
    ],
)
def test_wrong_type_shows_line_value_and_what_was_expected(
    tmp_path, addition, key, value, expected
):
    error = _refusal(tmp_path, SHORTEST + addition)
    assert error.where == f"{tmp_path / 'recipe.yaml'}:4"
    assert key in error.what
    assert value in error.what
    assert expected in error.expected
    assert error.remedy


def test_a_path_may_start_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "recipe.yaml").write_text("model: m\ndata: {train: ~/a.jsonl}\noutput: ~/runs/x\n")
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert recipe.data.train[0].path == tmp_path / "a.jsonl"
    assert recipe.output == tmp_path / "runs" / "x"


def test_the_form_of_a_picture_rule_that_was_meant_is_the_one_spoken_of(tmp_path):
    error = _refusal(tmp_path, SHORTEST + "picture: {heigth: 112, width: 504}\n")
    assert "picture.heigth" in str(error)
    assert "did you mean picture.height?" in str(error)
    assert "min_pixels: this setting is missing" not in str(error)


def test_missing_settings_are_all_named_with_an_example(tmp_path):
    error = _refusal(tmp_path, "data: {eval: b.jsonl}\n")
    assert "3 settings are wrong" in error.what
    for name in ("model", "data.train", "output"):
        assert f"{name}: this setting is missing" in error.what
    assert "Qwen/Qwen2-VL-2B-Instruct" in error.what


def test_settings_that_contradict_each_other(tmp_path):
    error = _refusal(tmp_path, SHORTEST + "train: {epochs: 1, steps: 5}\n")
    assert "epochs and steps are both set" in error.what
    error = _refusal(tmp_path, SHORTEST + "tune: {language: frozen}\n")
    assert "every part is frozen" in error.what


def test_parts_in_four_bits_are_one_or_several_and_never_trained_whole(tmp_path):
    for written, expected in (
        ("language", ("language",)),
        ("[vision, merger]", ("vision", "merger")),
        ("[language, embeddings]", ("language", "embeddings")),
        ("[language, vision, language]", ("vision", "language")),
    ):
        (tmp_path / "recipe.yaml").write_text(SHORTEST + f"tune: {{nf4: {written}}}\n")
        assert load_recipe(tmp_path / "recipe.yaml").tune.nf4 == expected
    error = _refusal(tmp_path, SHORTEST + "tune: {vision: full, nf4: [language, vision]}\n")
    assert "vision is full and in nf4" in error.what
    assert "set tune.vision to lora or frozen" in error.what
    error = _refusal(tmp_path, SHORTEST + "tune: {embeddings: full, nf4: [embeddings]}\n")
    assert "embeddings is full and in nf4" in error.what
    assert "set tune.embeddings to frozen" in error.what
    error = _refusal(tmp_path, SHORTEST + "tune: {nf4: [head]}\n")
    assert "'head'" in error.what
    assert "'vision', 'merger', 'language' or 'embeddings'" in error.expected
    assert "a list of at least 1" in _refusal(tmp_path, SHORTEST + "tune: {nf4: []}\n").expected


def test_parts_in_fp8_stay_as_they_are_and_in_no_other_bits(tmp_path):
    for written, expected in (
        ("language", ("language",)),
        ("[language, vision]", ("vision", "language")),
    ):
        (tmp_path / "recipe.yaml").write_text(SHORTEST + f"tune: {{fp8: {written}}}\n")
        assert load_recipe(tmp_path / "recipe.yaml").tune.fp8 == expected
    error = _refusal(tmp_path, SHORTEST + "tune: {vision: full, fp8: [language, vision]}\n")
    assert "vision is full and in fp8" in error.what
    assert "set tune.vision to lora or frozen" in error.what
    error = _refusal(tmp_path, SHORTEST + "tune: {nf4: [language], fp8: [language]}\n")
    assert "language is in nf4 and in fp8" in error.what
    error = _refusal(tmp_path, SHORTEST + "tune: {fp8: [merger]}\n")
    assert "'merger'" in error.what
    assert "'vision' or 'language'" in error.expected


def test_mistake_in_an_override_is_placed_there(tmp_path):
    error = _refusal(tmp_path, SHORTEST, "train.batchh=8")
    assert error.where == "override train.batchh=8"
    assert error.remedy == "did you mean train.batch?"
    assert _refusal(tmp_path, SHORTEST, "trian.batch=8").where == "override trian.batch=8"
    assert _refusal(tmp_path, SHORTEST, "train.batch=x").where == "override train.batch=x"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.batch", "is not an override"),
        ("=8", "is not an override"),
        ("train.betas=[1", "cannot be read as YAML"),
        ("data.train.limit=5", "data.train is 'a.jsonl'"),
        ("data.eval.0=b.jsonl", "data.eval is {}"),
    ],
)
def test_override_that_cannot_be_followed(tmp_path, override, said):
    assert said in str(_refusal(tmp_path, SHORTEST, override))


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("model: a\n  data: b\n", 2, "broken YAML"),
        ("model: a\ndata: [\n", 3, "broken YAML"),
        ("model: a\noutput: b\nmodel: c\n", 3, "model is given twice, first on line 1"),
        ("model: a\ntrain:\n  batch: 1\n  batch: 2\n", 4, "train.batch is given twice"),
        ("model: !!python/name:os.system x\n", 1, "broken YAML"),
    ],
)
def test_broken_yaml_names_the_line(tmp_path, text, line, said):
    error = _refusal(tmp_path, text)
    assert error.where == f"{tmp_path / 'recipe.yaml'}:{line}"
    assert said in error.what


@pytest.mark.parametrize("text", ["", "just words\n", "- model\n"])
def test_a_file_that_is_no_recipe(tmp_path, text):
    assert "not a recipe" in _refusal(tmp_path, text).what


def test_a_yaml_alias_of_its_own_parent_ends(tmp_path):
    assert "model" in str(_refusal(tmp_path, "model: &a [*a]\ndata: {train: x}\noutput: y\n"))


@pytest.mark.parametrize("value", ["[*a, *a, *a, *a]", "{train: *a, x: *a, y: *a, z: *a}"])
def test_aliases_that_never_end_are_named(tmp_path, value):
    refusal = _refusal(tmp_path, f"model: x\ndata: &a {value}\noutput: y\n")
    assert "stands inside of itself" in refusal.what
    assert refusal.where.endswith(":2")


def test_nine_lines_that_stand_for_a_billion_values(tmp_path):
    assert "aliases that stand for" in _refusal(tmp_path, LAUGHS).what


@pytest.mark.parametrize("value", ["2020-13-45", "!!int foo", "0x_", "9" * 5000, '"a\\0b"'])
def test_an_impossible_value_names_its_line(tmp_path, value):
    refusal = _refusal(tmp_path, f"model: x\noutput: {value}\n")
    assert refusal.where.endswith(":2")
    assert "broken YAML" in refusal.what
    refusal = _refusal(tmp_path, SHORTEST, f"output={value}")
    assert "cannot be read" in refusal.what
    assert len(str(refusal)) < 400


@pytest.mark.parametrize("name", ["\u00b2", "data.train.\u0663", "data.train." + "9" * 5000])
def test_a_place_that_only_looks_like_a_number(tmp_path, name):
    assert _refusal(tmp_path, SHORTEST, f"{name}=1").where.startswith("override")


def test_a_device_is_no_recipe():
    with pytest.raises(UserError, match="a device"):
        load_recipe(Path("/dev/zero"))


@pytest.mark.parametrize(
    "setting",
    [
        "train.epochs=1e30",
        "train.steps=9223372036854775807",
        "train.batch=10000000000000000000000000000000",
        "train.workers=99999999",
        "tune.lora.rank=1000000000",
        "tune.lora.alpha=1e308",
        "picture={longest_side: 99999999}",
        "picture={height: 9223372036854775807, width: 28}",
        "eval={metric: captions, max_new_tokens: 1000000000}",
        "data.train=[{path: a, weight: 1e30}]",
    ],
)
def test_more_than_any_machine_holds(tmp_path, setting):
    """Each of these ended in a traceback, or in no end at all."""
    refusal = _refusal(tmp_path, SHORTEST, setting)
    assert refusal.where.startswith("override")
    assert "wrong value" in refusal.what


def test_missing_recipe_names_a_neighbour(tmp_path):
    path = _written(tmp_path, SHORTEST)
    with pytest.raises(UserError, match="no such recipe") as caught:
        load_recipe(path.with_name("recipes.yaml"))
    assert str(path) in caught.value.remedy
    with pytest.raises(UserError, match="no such recipe"):
        load_recipe(tmp_path / "no" / "where.yaml")


def test_a_folder_and_bytes_are_no_recipes(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        load_recipe(tmp_path)
    path = tmp_path / "bytes.yaml"
    path.write_bytes(b"model: \xff\xfe\n")
    with pytest.raises(UserError, match="byte 7 is not UTF-8"):
        load_recipe(path)


def test_names_of_settings_are_unique_and_dotted():
    names = setting_names()
    assert len(names) == len(set(names))
    assert "tune.lora.rank" in names
    assert "picture.longest_side" in names
    assert "tune" not in names, "groups are opened up"


def test_a_metric_is_a_known_name_or_a_function_in_a_file(tmp_path):
    text = SHORTEST + "eval: {metric: captoins}\n"
    refusal = _refusal(tmp_path, text)
    assert "'captoins'" in refusal.what
    assert "'captions'" in refusal.expected
    assert "metric.py:score" in refusal.expected
    recipe = load_recipe(_written(tmp_path, text), ["eval.metric=some/metric.py:plates"])
    assert recipe.eval is not None
    assert recipe.eval.metric == "some/metric.py:plates"


def test_patience_needs_measurements_to_count(tmp_path):
    text = SHORTEST + "eval: {metric: ocr, patience: 3}\n"
    assert "every is not set" in _refusal(tmp_path, text).what
    recipe = load_recipe(_written(tmp_path, text), ["eval.every=0.1"])
    assert recipe.eval is not None
    assert recipe.eval.patience == 3


def test_trackers_are_names_or_groups_one_or_several(tmp_path):
    for written, meant in (
        ("tensorboard", ["tensorboard"]),
        ("[tensorboard, wandb]", ["tensorboard", "wandb"]),
        ("{kind: swanlab, address: cloud}", ["swanlab"]),
        ("[trackio, {kind: mlflow, address: 'http://tracking:5000'}]", ["trackio", "mlflow"]),
        ("[]", []),
        ("", []),
    ):
        recipe = load_recipe(_written(tmp_path, SHORTEST), [f"track={written}"])
        assert [tracker.kind for tracker in recipe.track] == meant
        assert load_recipe(_written(tmp_path, dump_recipe(recipe))) == recipe


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("[wandb, tensorboard, wandb]", "wandb is listed twice"),
        ("{kind: tensorboard, address: logs}", "tensorboard writes into the run's folder"),
        ("{kind: wandb, address: local}", "it knows cloud, offline, https://HOST"),
        ("{kind: swanlab, address: swanlab.mine}", "it knows cloud, local, offline, https://HOST"),
        ("{swanlab: {project: mine}}", "unknown setting"),
        ("{project: mine}", "track.kind: this setting is missing"),
    ],
)
def test_trackers_that_cannot_be(tmp_path, written, said):
    assert said in str(_refusal(tmp_path, SHORTEST, f"track={written}"))


@pytest.mark.parametrize(
    "address",
    ["http://me:planted@host:5000", "http://host/?write_token=planted", "https://planted@host"],
)
def test_an_address_with_a_password_is_refused_and_not_repeated(tmp_path, address):
    error = _refusal(tmp_path, SHORTEST + f"track: {{kind: mlflow, address: '{address}'}}\n")
    assert "holds a password or token" in str(error)
    assert "planted" not in str(error)


def test_no_data_at_all_is_refused(tmp_path):
    error = _refusal(tmp_path, SHORTEST, "data.train=[]")
    assert error.where == "override data.train=[]"
    assert error.expected == "a list of at least 1"


def test_very_many_mistakes_are_counted_and_the_first_explained(tmp_path):
    """Each costs a search for the nearest name: 100,000 took minutes, and so did their message."""
    unknown = {f"k{number}": number for number in range(100_000)}
    with pytest.raises(UserError, match="100,000 settings are wrong") as caught:
        recipe_of({"model": "m", "data": {"train": "a.jsonl"}, "output": "o"} | unknown)
    assert caught.value.what.count("unknown setting") == MOST_TOLD
    assert f"and {100_000 - MOST_TOLD:,} more" in caught.value.what
    text = SHORTEST + "eval:\n" + "".join(f"  k{number}: 0\n" for number in range(5_000))
    error = _refusal(tmp_path, text)
    assert "5,001 settings are wrong" in error.what
    assert len(error.what) < 20_000


def test_a_recipe_of_very_many_settings_is_not_read_to_its_end(tmp_path):
    error = _refusal(tmp_path, SHORTEST + "".join(f"k{number}: 0\n" for number in range(100_000)))
    assert "more than 20,000 values" in error.what
    assert error.where.endswith("recipe.yaml:9999")
    assert "more than 1,048,576 bytes" in _refusal(tmp_path, "# " + "x" * 2**20).what


def test_a_name_of_any_length_is_told_in_a_line(tmp_path):
    error = _refusal(tmp_path, SHORTEST + "? " + "x" * 500_000 + "\n: 1\n")
    assert "unknown setting" in error.what
    assert len(error.what) < 200
