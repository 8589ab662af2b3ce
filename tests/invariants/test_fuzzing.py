"""Spoilt data and recipes: read, or refused with a message; never a traceback."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from mutations import as_json, mutated_bytes, mutated_json
from test_bounded_files import LAUGHS, MERGED
from tiny_task import make_task

from finesight.cli.app import run_command
from finesight.encode.renderer import NativeRenderer
from finesight.errors import UserError
from finesight.model_folder import ModelFolder
from finesight.samples.corpus import load_corpus
from finesight.samples.sample import read_samples, write_samples
from finesight.settings.config import DataSettings, PixelRange, TrainFileSettings
from finesight.settings.recipe import dump_recipe, load_recipe
from finesight.train.dataset_stats import compute_dataset_stats

LINES, RECIPES, COMMANDS = 1500, 600, 20

SAMPLE = yaml.safe_load("""
id: a
messages:
  - {role: system, content: Be brief.}
  - role: user
    content:
      - {type: image, image: train0.png}
      - {type: text, text: "Where? \\xe9\\L"}
      - {type: video, frames: [train0.png, train0.png], fps: 2.0}
  - role: assistant
    content: [{type: box, image: 0, label: cat, xyxy: [1, 2, 20, 21]}, {type: text, text: ok}]
references: [x]
meta: {k: [1, {b: null}]}
""")

VALUES = (
    *("null", "true", "0", "-1", "1e308", ".nan", "-.inf", "9" * 400, "9" * 5000, "0x_", "1:30"),
    *("[]", "{}", "[[[]]]", "''", '"\\0"', '"\\ud800"', "a" * 100_000, "2020-13-45", "1e-4", "~"),
    *("!!binary aGk=", "!!set {a, b}", "!!int x", "!!python/name:os.system x", "&a [*a]", "*no"),
    *("{path: a, weight: .nan}", "{1: 2}", "{[1]: 2}", "/dev/zero", '"x.py:f"', "100%", "yes"),
)
FILE_CONTENTS = (
    *(b"", b"\0", b"\xff\xfem\0", b"\xef\xbb\xbfmodel: x", b"--- a\n--- b", b"%YAML 9.9\n---\na"),
    *(LAUGHS.encode(), MERGED.encode(), b"a: &a [*a, *a]", b"<<: [1]", b"=: x", b"? [a]\n: b"),
    *(b"[" * 20_000, b"{a: " * 20_000, b"- " * 20_000, b"null: 2", b"1.5: x", b"a: 1\na: 2"),
)
NAMES = (
    *("model", "train.batch_size", "train.learning_rate.default", "data.train.0.path", "data..x"),
    "",
)


def corrupt_line(rng: random.Random, good: dict[str, Any]) -> bytes:
    return mutated_json(rng, as_json(rng.choice((SAMPLE, good))))


def corrupt_recipe(rng: random.Random, good: str) -> bytes:
    match rng.randrange(6):
        case 0:
            return rng.choice(FILE_CONTENTS)
        case 1 | 2:
            return mutated_bytes(rng, good.encode())
        case _:
            lines = good.splitlines()
            for _ in range(rng.choice((1, 1, 2, 4))):
                at = rng.randrange(len(lines))
                key, colon, _ = lines[at].partition(":")
                changed = f"{key}{colon or ':'} {rng.choice(VALUES)}"
                indented = " " * rng.randrange(5) + lines[at].lstrip()
                doubled = f"{lines[at]}\n{rng.choice(lines)}"
                lines[at] = rng.choice((changed, changed, indented, doubled, f"\t{lines[at]}"))
            return "\n".join(lines).encode()


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    recipe = make_task(folder)
    recipe["data"] = {"train": str(folder / "spoilt.jsonl")}
    recipe["output_dir"] = str(folder / "run")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def good_line(folder: Path) -> dict[str, Any]:
    line: dict[str, Any] = json.loads((folder / "train.jsonl").read_text().splitlines()[0])
    return line


def check_messages(refused: list[UserError]) -> None:
    """Each can be written to a terminal, and says where."""
    for error in refused:
        assert error.where
        assert str(error).encode()


def test_corrupt_lines_are_read_or_rejected(task):
    """By the path of training, to the patches; what is read comes back as it was written."""
    rng, path = random.Random(0), task / "spoilt.jsonl"
    rule = PixelRange(min_pixels=784, max_pixels=7056)
    renderer, good = NativeRenderer(ModelFolder(task / "tiny"), rule), good_line(task)
    taken, refused = 0, list[UserError]()
    for _ in range(LINES):
        path.write_bytes(corrupt_line(rng, good) + b"\n")
        files = (TrainFileSettings(path=path),)
        try:
            samples = read_samples(path)
            write_samples(task / "again.jsonl", samples)
            assert repr(read_samples(task / "again.jsonl")) == repr(samples)
            corpus, settings = load_corpus(files), DataSettings(train=files)
            stats = compute_dataset_stats(corpus, renderer, settings, 0)
            for index in stats.sample_indices:
                assert renderer.encode(corpus[index]).tokenized.num_supervised_tokens
            taken += 1
        except UserError as error:
            refused.append(error)
    check_messages(refused)
    assert min(taken, len(refused)) > LINES // 25


def test_corrupt_recipes_are_read_or_rejected(task):
    rng, path = random.Random(0), task / "spoilt.yaml"
    shipped = (Path(__file__).parents[2] / "recipes").glob("*.yaml")
    goods = [dump_recipe(load_recipe(task / "recipe.yaml")), *(p.read_text() for p in shipped)]
    taken, refused = 0, list[UserError]()
    for _ in range(RECIPES):
        path.write_bytes(corrupt_recipe(rng, rng.choice(goods)))
        name, value = rng.choice(NAMES), rng.choice(VALUES)
        try:
            settings = load_recipe(path, [f"{name}={value}"] if rng.random() < 0.3 else [])
            path.write_text(dump_recipe(settings))
            assert load_recipe(path) == settings
            taken += 1
        except UserError as error:
            refused.append(error)
    check_messages(refused)
    assert min(taken, len(refused)) > RECIPES // 50


def run_commands(commands: list[list[str]], capsys: pytest.CaptureFixture[str]) -> set[int]:
    """Return the exit codes of commands, each of which says what is wrong if anything is."""
    codes = set()
    for command in commands:
        code = run_command(command)
        output = capsys.readouterr()
        assert (output.out + output.err).encode()
        assert code != 2 or "error" in output.out + output.err, command
        codes.add(code)
    return codes


SHORT = ["train.steps=1", "train.epochs=null", "train.num_workers=0", "train.batch_size=2"]


def test_commands_exit_cleanly_on_corrupt_data(task, capsys):
    rng, good = random.Random(1), good_line(task)
    path, recipe = task / "spoilt.jsonl", str(task / "recipe.yaml")
    found: set[int] = set()
    for number in range(COMMANDS):
        lines = [json.dumps(good).encode(), corrupt_line(rng, good), json.dumps(good).encode()]
        path.write_bytes(b"\n".join(lines if number % 2 else lines[1:2]) + b"\n")
        fixed, imported, exported = (str(task / f"{n}{number}") for n in ("fix", "import", "out"))
        commands = [
            ["train", recipe, *SHORT, f"output_dir={task / f'run{number}'}"],
            ["check", str(path), "--fix", fixed],
            ["show", recipe],
            ["import", str(path), imported],
            ["data", "export", str(path), exported, "--to", "ms-swift"],
        ]
        found |= run_commands(commands, capsys)
    assert {0, 2} <= found <= {0, 2, 3}
