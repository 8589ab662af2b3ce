"""Recipes: loaded, overridden, written back, and rejected; documented and shipped ones."""

import contextlib
import csv
import json
import os
import re
import shlex
import shutil
from pathlib import Path
from typing import get_args

import pytest
import yaml
from case_files import load_cases
from container_fixtures import make_parquet
from PIL import Image
from test_bounded_files import LAUGHS

from finesight.cli.app import run_command
from finesight.errors import UserError
from finesight.objective_components import OBJECTIVES
from finesight.samples.sample import BoxPart, read_samples
from finesight.settings import recipe as recipes
from finesight.settings.config import ExactSize, LongestSide, Recipe, SettingsSection
from finesight.settings.recipe_template import choose_duration, override_settings

CASES = load_cases("recipe")
REPLACEMENTS = load_cases("setting_replacements")
"""Remedies for settings of other trainers."""

SHORTEST = "model: some/model\ndata: {train: a.jsonl}\noutput_dir: runs/one\n"


def _get_section(row: list[str]) -> str:
    """Return the section that a case is about, by which `satellite_tests.yaml` selects cases."""
    return row[0][: re.search(r"\W|$", row[0]).start()]


def _write_recipe(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def _load_error(folder: Path, text: str, *overrides: str) -> UserError:
    with pytest.raises(UserError) as caught:
        recipes.load_recipe(_write_recipe(folder, text), overrides)
    return caught.value


def _missing_words(error: UserError, words: list[str]) -> list[str]:
    return [word for word in words if word not in str(error)]


def _get_setting(recipe: Recipe, name: str) -> object:
    node = recipe.model_dump(mode="json", exclude_none=True)
    for part in name.split("."):
        node = node[int(part)] if isinstance(node, list) else node.get(part)
    return node


def test_minimal_recipe_uses_defaults(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    text = SHORTEST.replace("runs/one", "~/runs/one").replace("a.jsonl", "~/a.jsonl")
    recipe = recipes.load_recipe(_write_recipe(tmp_path, text))
    assert recipe.data.train[0].path == tmp_path / "a.jsonl"
    assert recipe.output_dir == tmp_path / "runs" / "one"
    assert (recipe.train.learning_rate.default, recipe.tune.lora.rank) == (1e-4, 64)
    assert "weight_decay: 0.0" in recipes.dump_recipe(recipe), "defaults in force are written out"


@pytest.mark.parametrize(("override", "name", "expected"), CASES["test_setting_values"])
def test_setting_values(tmp_path, override, name, expected):
    text = SHORTEST + "eval: {metric: ocr}\n"
    recipe = recipes.load_recipe(_write_recipe(tmp_path, text), [override])
    assert json.dumps(_get_setting(recipe, name)) == json.dumps(expected)
    assert recipes.load_recipe(_write_recipe(tmp_path, recipes.dump_recipe(recipe))) == recipe


@pytest.mark.parametrize("row", CASES["test_invalid_settings"], ids=_get_section)
def test_invalid_settings(tmp_path, row):
    addition, *words = row
    error = _load_error(tmp_path, f"{SHORTEST}{addition}\n")
    assert error.where == f"{tmp_path / 'recipe.yaml'}:4"
    assert _missing_words(error, words) == []
    assert error.remedy
    assert "planted" not in str(error)


@pytest.mark.parametrize("row", CASES["test_invalid_overrides"], ids=_get_section)
def test_invalid_overrides(tmp_path, row):
    override, *words = row
    error = _load_error(tmp_path, SHORTEST, override)
    location = f"override {override.partition('=')[0]}"
    assert location in str(error) or error.where == "command line"
    assert _missing_words(error, words) == []


def _replace_line(setting: str, line: str) -> str:
    """Return the shortest recipe with a first line instead of that of a setting's section."""
    section, _, _ = setting.partition(".")
    others = [one for one in SHORTEST.splitlines() if not one.startswith(f"{section}:")]
    return "\n".join([line, *others, ""])


@pytest.mark.parametrize(
    ("line", "setting"), CASES["test_missing_setting_has_an_example_that_can_be_added"]
)
def test_missing_setting_has_an_example_that_can_be_added(tmp_path, line, setting):
    text = _replace_line(setting, line)
    if line.startswith("rewards"):
        text += "train: {objective: grpo}\n"
    error = _load_error(tmp_path, text)
    path = tmp_path / "recipe.yaml"
    assert error.where == (f"{path}:1" if line else str(path))
    assert error.what == f"{setting}: this setting is missing"
    _, _, name = setting.rpartition(".")
    assert error.remedy.startswith(f"add {name} ")
    example = error.expected.removeprefix("for example ")
    recipes.load_recipe(path, [f"{setting}={example}"])


def _list_required(annotation: object, prefix: str = "") -> set[str]:
    """The required settings of all sections in a type."""
    names = set()
    for member in get_args(annotation):
        names |= _list_required(member, prefix)
    if isinstance(annotation, type) and issubclass(annotation, SettingsSection):
        for name, field in annotation.model_fields.items():
            if field.is_required():
                names.add(f"{prefix}{name}")
            names |= _list_required(field.annotation, f"{prefix}{name}.")
    return names


def test_every_required_setting_can_be_missing():
    cases = CASES["test_missing_setting_has_an_example_that_can_be_added"]
    settings = {re.sub(r"\.\d", "", setting) for _, setting in cases}
    # The only setting of its rule: without it, an image section is one of another rule.
    assert settings == _list_required(Recipe) - {"image.longest_side"}


def test_several_mistakes_of_a_reward_are_listed(tmp_path):
    error = _load_error(tmp_path, SHORTEST + "rewards: {pattern: -1}\n")
    assert _missing_words(error, ["2 settings", "for example format", "value -1", ":4"]) == []


@pytest.mark.parametrize("row", CASES["test_overrides_inside_invalid_values"], ids=_get_section)
def test_overrides_inside_invalid_values(tmp_path, row):
    line, override, *words = row
    error = _load_error(tmp_path, _replace_line(override, line), override)
    assert _missing_words(error, words) == []
    assert error.remedy


def test_override_corrects_an_invalid_value(tmp_path):
    path = _write_recipe(tmp_path, SHORTEST + "track: {kind: wandb, config: {rate: .nan}}\n")
    recipe = recipes.load_recipe(path, ["track.config.rate=1"])
    assert recipe.track[0].config == {"rate": 1}


@pytest.mark.parametrize("base", CASES["bases"].values())
@pytest.mark.parametrize(
    ("override", "name", "expected"), CASES["test_overrides_of_short_and_long_forms"]
)
def test_overrides_of_short_and_long_forms(tmp_path, base, override, name, expected):
    text = f"model: some/model\noutput_dir: runs/one\n{base}"
    recipe = recipes.load_recipe(_write_recipe(tmp_path, text), [override])
    assert _get_setting(recipe, name) == expected


@pytest.mark.parametrize(
    ("override", "indexed"), CASES["test_override_of_one_of_several_entries_needs_an_index"]
)
def test_override_of_one_of_several_entries_needs_an_index(tmp_path, override, indexed):
    text = (
        "model: some/model\noutput_dir: runs/one\ntrack: [wandb, tensorboard]\n"
        "data: {train: [a.jsonl, b.jsonl], eval: [c.jsonl, d.jsonl]}\n"
    )
    words = ["has 2 entries", "expected: an index from 0 to 1", f"use {indexed} for the first"]
    assert _missing_words(_load_error(tmp_path, text, override), words) == []
    changed = recipes.load_recipe(_write_recipe(tmp_path, text), [indexed, "data.train.1.limit=7"])
    assert changed.data.train[1].limit == 7


def test_override_replaces_settings_that_it_excludes(tmp_path):
    text = SHORTEST + "image: {height: 112, width: 504}\ntrain: {epochs: 2}\n"
    path = _write_recipe(tmp_path, text)
    recipe = recipes.load_recipe(path, ["image.longest_side=512", "train.steps=10"])
    assert recipe.image == LongestSide(longest_side=512)
    assert (recipe.train.steps, recipe.train.epochs) == (10, None)
    assert recipes.load_recipe(path, ["image.width=112"]).image == ExactSize(height=112, width=112)
    assert recipes.load_recipe(path, ["train.steps=null"]).train.epochs == 2
    assert "both set" in _load_error(tmp_path, text, "train.steps=1", "train.epochs=1").what
    error = _load_error(tmp_path, text, "image.longest_side=512", "image.max_pixels=100")
    assert "image.max_pixels: this setting excludes the others" in error.what
    assert "did you mean" not in error.what


@pytest.mark.parametrize("conflict", ["train.vision_cache=disk", "train.objective=dpo"])
def test_augmentation_excludes_stored_features_and_other_objectives(tmp_path, conflict):
    error = _load_error(tmp_path, SHORTEST, "data.augment=light", conflict)
    assert _missing_words(error, ["data.augment", conflict]) == []


def test_recipes_of_earlier_versions_load(tmp_path):
    former = "train: {seed: 3, data_seed: %d}\neval: {metric: ocr, batch_size: 8}\n"
    path = _write_recipe(tmp_path, SHORTEST + former % 3)
    assert recipes.load_recipe(path).train.seed == 3
    assert "use train.seed=4" in _load_error(tmp_path, SHORTEST + former % 4).remedy


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
        recipes.load_recipe(_write_recipe(tmp_path, text), shlex.split(replacement))


def test_every_setting_of_other_trainers_has_advice():
    content = recipes.load_trainer_settings()
    least = {"model": "m", "data": {"train": "a.jsonl"}, "output_dir": "o"}
    for trainer in ("transformers", "LLaMA-Factory", "ms-swift"):
        aliases = content[trainer].get("aliases", {})
        keys = [*content[trainer]["converted"].split(), *recipes.invert_groups(aliases)]
        keys += {*aliases, *content[trainer]["defaults"]}
        keys += ["dataloader_pin_memory", "galore_rank"]  # by the prefix of a group of settings
        for key in set(keys) - {"model", "output_dir"}:
            with pytest.raises(UserError) as caught:
                recipes.recipe_from_dict(least | {key: "4"})
            assert caught.value.remedy.startswith(("use ", "remove it: ")), key


def test_replacements_are_settings():
    names = [tuple(name.split(".")) for name in recipes.list_setting_names()]
    known = {".".join(name[:depth]) for name in names for depth in range(1, len(name) + 1)}
    content = recipes.load_trainer_settings()
    groups = [{"settings": content["renamed"]}, *content["replacements"]]
    texts = [f"{name}=" for group in groups for name in group["settings"]]
    texts += [text for one in groups for text in (*one.get("values", ()), one.get("other", ""))]
    for name in re.findall(r"([a-z_0-9.]+)=", " ".join(texts)):
        assert re.sub(r"\.\d$", "", name) in known, name


def test_configuration_of_another_trainer_is_recognized(tmp_path):
    text = "model_name_or_path: m\ndataset: d\nlora_rank: 8\noutput_dir: o\n"
    error = _load_error(tmp_path, text)
    assert "use tune.lora.rank=8" in error.what
    assert error.remedy.operation == "convert"
    assert not _load_error(tmp_path, "modl: m\ndta: d\nlora_rank: 8\n").remedy


@pytest.mark.parametrize(("text", "line", "words"), CASES["test_unreadable_recipe"])
def test_unreadable_recipe(tmp_path, text, line, words):
    error = _load_error(tmp_path, text)
    path = tmp_path / "recipe.yaml"
    assert error.where == (f"{path}:{line}" if line else str(path))
    assert words in error.what


def test_other_files_are_rejected(tmp_path):
    (tmp_path / "bytes.yaml").write_bytes(b"model: \xff\xfe\n")
    for path, words in (
        (tmp_path, "is a folder"),
        (tmp_path / "no" / "where.yaml", "no such file"),
        (tmp_path / "bytes.yaml", "byte 7 is not UTF-8"),
        (Path("/dev/zero"), "a device"),
    ):
        with pytest.raises(UserError, match=words):
            recipes.load_recipe(path)
    run_recipe = _write_recipe(tmp_path, SHORTEST)
    with pytest.raises(UserError, match=f"give the recipe of this run: {run_recipe}"):
        recipes.load_recipe(tmp_path)
    with pytest.raises(UserError, match="no such file") as caught:
        recipes.load_recipe(tmp_path / "recipes.yaml")
    assert str(run_recipe) in caught.value.remedy


def test_very_many_mistakes_are_counted_and_the_first_explained(tmp_path):
    """Each costs a search for the nearest name: 100,000 took minutes, and so did their message."""
    unknown = {f"k{number}": number for number in range(100_000)}
    with pytest.raises(UserError, match="100,000 settings are wrong") as caught:
        recipes.recipe_from_dict(
            {"model": "m", "data": {"train": "a.jsonl"}, "output_dir": "o"} | unknown
        )
    assert caught.value.what.count("unknown setting") == recipes.MAX_REPORTED_ERRORS
    assert f"and {100_000 - recipes.MAX_REPORTED_ERRORS:,} more" in caught.value.what
    text = SHORTEST + "eval:\n" + "".join(f"  k{number}: 0\n" for number in range(5_000))
    error = _load_error(tmp_path, text)
    assert "5,001 settings are wrong" in error.what
    assert len(error.what) < 20_000


def test_large_recipes_are_rejected(tmp_path):
    many_values = "".join(f"k{number}: 0\n" for number in range(100_000))
    error = _load_error(tmp_path, SHORTEST + many_values)
    assert "more than 20,000 values" in error.what
    assert error.where.endswith("recipe.yaml:9999")
    assert "more than 1,048,576 bytes" in _load_error(tmp_path, "# " + "x" * 2**20).what
    assert "aliases that expand to" in _load_error(tmp_path, LAUGHS).what
    error = _load_error(tmp_path, SHORTEST + "? " + "x" * 500_000 + "\n: 1\n")
    assert "unknown setting" in error.what
    assert len(error.what) < 200
    long_index = f"data.train.{'9' * 5000}=1"
    assert _load_error(tmp_path, SHORTEST, long_index).where.startswith("override")


@pytest.mark.parametrize(
    ("num_samples", "is_short", "key", "value"),
    CASES["test_duration_follows_the_number_of_samples"],
)
def test_duration_follows_the_number_of_samples(num_samples, is_short, key, value):
    batch_size = 8 if num_samples < 200 else 16
    [(name, text)] = choose_duration(num_samples, batch_size, is_short).items()
    assert (name, yaml.safe_load(text)) == (f"train.{key}", value)
    assert 20 < len(text.partition("  # ")[2]) < 80


def test_inputs_are_also_found_in_the_folder_of_the_recipe(tmp_path, monkeypatch):
    folder = tmp_path / "recipes"
    folder.mkdir()
    text = (
        "model: weights\nadapter: adapter\noutput_dir: runs/one\n"
        "data: {train: [both.jsonl, 'shards/*.tar', {path: c.jsonl, weight: 2}], eval: no.jsonl}\n"
        "eval: {metric: 'score.py:f'}\ntrain: {objective: grpo}\n"
        "rewards: [json, 'score.py:f', {name: 'score.py:g', weight: 2}]\n"
    )
    for name in (
        "json",
        "both.jsonl",
        "shards/1.tar",
        "c.jsonl",
        "score.py",
        "weights/a",
        "runs/one",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    (tmp_path / "both.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    recipe = recipes.load_recipe(
        _write_recipe(folder, text).relative_to(tmp_path), ["data.eval=c.jsonl"]
    )
    paths = [str(file.path) for file in (*recipe.data.train, *recipe.data.eval)]
    assert paths == ["both.jsonl", "recipes/shards/*.tar", "recipes/c.jsonl", "c.jsonl"]
    assert (recipe.model, str(recipe.adapter)) == ("recipes/weights", "adapter")
    assert (recipe.eval.metric, str(recipe.output_dir)) == ("recipes/score.py:f", "runs/one")
    names = [reward.name for reward in recipe.rewards]
    assert names == ["json", "recipes/score.py:f", "recipes/score.py:g"]


SETTINGS = load_cases("settings")


PAGE = (Path(__file__).parents[1] / "docs" / "en" / "recipe.md").read_text(encoding="utf-8")
ROWS = {
    name: (default, meaning)
    for table in re.findall(r"^\| setting \|.*\n(?:\|.*\n)+", PAGE, re.MULTILINE)
    for name, default, meaning in re.findall(
        r"^\| `([a-z0-9_.]+)` \| (.*?) ?\| (.*?) ?\|$", table, re.MULTILINE
    )
}
"""Default and meaning of each setting on the page."""

LEAST = "model: m\noutput_dir: runs/one\neval: {metric: ocr}\n"


def test_settings_are_listed_and_documented():
    assert sorted(recipes.list_setting_names()) == sorted(SETTINGS) == sorted(ROWS)
    # The sections of objectives, rewards and trackers do not count; the operations of data.augment
    # are one setting.
    sections = (f"train.{name}." for name in OBJECTIVES)
    components = ("train.objective", "rewards.", "track.", *sections)
    counted = [name for name in SETTINGS if not name.startswith(components)]
    assert len({name.partition("augment.")[0] for name in counted}) <= 57


def _list_documented_values(name: str) -> list[str]:
    """Return the default of a setting on the page if it is a value, and the examples."""
    default, meaning = ROWS[name]
    values = r"((?:`[^`]+`(?:, or | or |, )?)+)"
    texts = re.findall(rf"(?:for example|such as) {values}", meaning)
    if default in ("", "all", "none", "default", "planned", "the family's", "the model's"):
        texts = texts or re.findall(rf"^{values}", meaning)
    else:
        texts.append(f"`{default}`")
    return re.findall("`([^`]+)`", " ".join(texts))


@pytest.mark.parametrize("text", CASES["forms"].values())
@pytest.mark.parametrize("name", SETTINGS)
def test_documented_values_can_be_overridden(tmp_path, text, name):
    values = _list_documented_values(name)
    assert values, "the page has neither a default nor an example"
    path = tmp_path / "recipe.yaml"
    path.write_text(LEAST + text)
    for value in values:
        override = f"{name}={value}"
        required = CASES["required_settings"]
        required = required.get(override) or required.get(name, [])
        overrides = [override, *required]
        node = recipes.load_recipe(path, overrides).model_dump(mode="json")
        for part in name.split("."):
            (node,) = node if isinstance(node, list) else (node,)
            node = node[part]
        expected = yaml.safe_load(value)
        if isinstance(node, list):
            assert sorted(node) == sorted(expected if isinstance(expected, list) else [expected])
        else:
            assert node == expected or float(node) == float(expected)


@pytest.mark.parametrize(
    ("text", "override", "expected"), CASES["test_text_of_a_recipe_is_overridden"]
)
def test_text_of_a_recipe_is_overridden(text, override, expected):
    assert override_settings(text, [override]) == expected


SHIPPED = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))


def _commands(recipe: Path) -> list[list[str]]:
    """The commands in a recipe's comments, without the word finesight."""
    comments = [line[1:] for line in recipe.read_text().splitlines() if line.startswith("#")]
    text = re.sub(r"\\\n", " ", "\n".join(comments))
    return [shlex.split(line)[1:] for line in text.splitlines() if line.strip()[:9] == "finesight"]


PREPARATIONS = [
    pytest.param(recipe, command, id=f"{recipe.stem}-{command[2]}")
    for recipe in SHIPPED
    for command in _commands(recipe)
]


@pytest.fixture(scope="module")
def source_data(tmp_path_factory):
    """A folder with small files of the names and columns that the comments speak of."""
    folder = tmp_path_factory.mktemp("source")
    with contextlib.chdir(folder):
        _write_source_data()
    return folder


def _write_source_data() -> None:
    rows = []
    for number in range(400):
        path = f"images/{number}.png"
        Path(path).parent.mkdir(exist_ok=True)
        Image.new("RGB", (40, 30), (number % 256, number // 256, 0)).save(path)
        row = {"image_path": path, "text": f"x ^ {number}", "caption": f"Number {number}."}
        rows.append(row | {"number": str(number), "date": "2 May 2026", "total": f"${number}.00"})
    for name in ("coco.csv", "latex_ocr_train.csv", "invoices.csv"):
        with Path(name).open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    question = "COCO Yes: <|vision_start|>{image_path}<|vision_end|>"
    questions = dict.fromkeys(("data_vl.json", "dataset.json"), question)
    # As the first Qwen-VL's script reads them.
    questions["chat.json"] = "Picture 1: <img>{image_path}</img>\nWhat is it?"
    for name, question in questions.items():
        Path(name).write_text(json.dumps([_converse(row, question) for row in rows]))
    box = {"question": "Where is it?", "bbox": [3.0, 4.0, 20.0, 10.0]}
    images = [{"bytes": Path(row["image_path"]).read_bytes(), "path": None} for row in rows]
    Path("textvqa.parquet").write_bytes(make_parquet([{"image": one, **box} for one in images]))


def _converse(row: dict[str, str], question: str) -> dict[str, object]:
    texts = {"user": question.format_map(row), "assistant": row["caption"]}
    turns = [{"from": role, "value": text} for role, text in texts.items()]
    return {"id": row["image_path"], "conversations": turns}


@pytest.mark.parametrize("recipe", SHIPPED)
def test_recipe_is_valid(recipe):
    loaded = recipes.load_recipe(recipe)
    assert loaded.data.eval, f"{recipe} has no validation data"
    assert loaded.eval is not None, f"{recipe} measures nothing"
    assert _commands(recipe), f"{recipe} does not say how to prepare its data"


@pytest.mark.parametrize(("recipe", "command"), PREPARATIONS)
def test_commands_in_comments_prepare_the_data(recipe, command, source_data, tmp_path, monkeypatch):
    shutil.copytree(source_data, tmp_path, copy_function=os.link, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    assert run_command(command) == 0
    data = recipes.load_recipe(recipe).data
    train = read_samples(data.train[0].path)
    validation = read_samples(data.eval[0].path)
    assert len(train) + len(validation) == 400
    answer = train[0].messages[-1].content[0]
    metric = recipes.load_recipe(recipe).eval.metric
    if metric == "grounding":
        assert isinstance(answer, BoxPart)
        assert answer.xyxy == (3.0, 4.0, 23.0, 14.0)
    elif metric == "json":
        fields = json.loads(answer.text)
        assert fields["total"] == f"${fields['number']}.00"
        assert list(fields) == ["number", "date", "total"]
    else:
        assert answer.text.startswith(("x ^", "Number"))
