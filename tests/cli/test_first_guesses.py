"""First guesses of commands, options, values and functions: each proposal is executed."""

import re
import shlex
import shutil
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from image_fixtures import write_jsonl
from tiny_task import TinyTask, edit_samples, write_recipe

from finesight import api
from finesight.cli.app import app, build_command, run_command
from finesight.errors import UserError, describe_choices, describe_indices
from finesight.launch.launcher_component import LAUNCHERS
from finesight.objective_components import OBJECTIVES
from finesight.operations import OPERATIONS, find_operation, first_guesses
from finesight.operations.first_guesses import find_option
from finesight.operations.operation import list_parameters
from finesight.settings.recipe import load_recipe, suggest_override

COMMANDS = [name for group in OPERATIONS.values() for name in group]
METHODS = {
    guess: hint
    for one in OBJECTIVES.list_built_in()
    for hint, guesses in (
        (f"train RECIPE train.objective={one.name}", one.name),
        (one.command, one.guesses),
    )
    for guess in guesses.split()
}
GUESSES = {name: hint for hint, names in first_guesses.COMMANDS.items() for name in names.split()}
GUESSES = (
    METHODS
    | dict.fromkeys((one.name for one in LAUNCHERS.list_built_in()), "launch RECIPE")
    | GUESSES
)

VALUES = {
    "RECIPE": "recipe.yaml",
    "RUN": "run",
    "RUN2": "run2",
    "MODEL": "finesight-tiny",
    "DATA": "train.jsonl",
    "IMAGE": "train0.png",
    "OUT": "out",
    "TEXT": "What?",
    "FILE": "llama.yaml",
    "NEW": "new.yaml",
    "NAME": "ocr",
    "FORMAT": "llava",
}
"""Values of the words in capitals."""

PLACEHOLDER = re.compile("[A-Z]+[0-9]?")

PARSED = {"chat", "label", "serve", "studio", "web", "quickstart", "search", "download"}
"""Commands that wait for a person, a server or many runs: only their words are parsed."""

LLAMA_FACTORY = """
model_name_or_path: Qwen/Qwen2-VL-2B-Instruct
stage: sft
finetuning_type: lora
dataset: tickets
template: qwen2_vl
output_dir: out
"""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with pairs, a recipe that any objective accepts, and a run."""
    task = TinyTask(tmp_path_factory.mktemp("guesses"))
    recipe = task.recipe | {"model": "finesight-tiny", "output_dir": "new-run"}
    recipe["data"] = {"train": "train.jsonl", "eval": "eval.jsonl"}
    recipe["tune"] = {"language": "lora", "lora": {"rank": 4, "alpha": 8}}
    recipe["eval"] = {"metric": "ocr", "max_new_tokens": 2, "every": 0}
    train = {"epochs": None, "steps": 1, "save_every": None}
    write_recipe(task.folder / "recipe.yaml", recipe, **train)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(task.folder)
        for name in ("run", "run2"):
            assert run_command(["train", "recipe.yaml", f"output_dir={name}"]) == 0
    shutil.copy(task.folder / "train.jsonl", task.folder / "pairs.jsonl")
    with edit_samples(task.folder / "pairs.jsonl") as samples:
        for sample in samples:
            sample["rejected"] = "nothing"
    recipe["data"] = {"train": "pairs.jsonl"}
    del recipe["eval"]
    write_recipe(task.folder / "pairs.yaml", recipe, **train)
    (task.folder / "llama.yaml").write_text(LLAMA_FACTORY)
    return task.folder


@pytest.fixture
def folder(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    copy = tmp_path / "work"
    shutil.copytree(workspace, copy)
    monkeypatch.chdir(copy)
    return copy


def find_error(words: list[str]) -> UserError:
    """Return the error of a command line."""
    error = CliRunner().invoke(app, words).exception
    assert isinstance(error, UserError), (words, error)
    return error


def parse_words(words: list[str]) -> None:
    """Parse a command line, without running it. An unknown option or a wrong value raises."""
    name = "data export" if words[0] == "data" else words[0]
    parent = click.Context(app, info_name="finesight")
    command = build_command(name, find_operation(name))
    command.make_context(name, words[len(name.split()) :], parent=parent)


def run_hint(hint: str) -> None:
    """Execute a proposed command with values for its words in capitals."""
    words = hint.replace("hf:OWNER/NAME", "hf:me/model").split()
    words = [PLACEHOLDER.sub(lambda match: VALUES[match[0]], word) for word in words]
    if any(word.endswith(("=dpo", "=orpo", "=simpo", "=kto")) for word in words):
        words[words.index("recipe.yaml")] = "pairs.yaml"
    needs_other_program = {"--quantize", "--converter"} & {*words}
    if words[0] in PARSED or needs_other_program:
        parse_words(words)
        return
    assert run_command(words) == 0, hint


@pytest.mark.parametrize("hint", sorted({*GUESSES.values()}))
def test_proposed_commands_succeed(folder, hint):
    if hint.startswith("train RUN"):
        (folder / "run" / "result.json").unlink()
    run_hint(hint)


def test_first_guesses_of_commands_name_the_right_one():
    assert not {*GUESSES} & {*COMMANDS}
    for guess, hint in GUESSES.items():
        for name in {guess, guess.upper(), guess.replace("-", "_"), f"--{guess}"}:
            if name.startswith("--"):
                continue
            error = find_error([name, "a", "b"])
            assert error.what == f"no such command: {name}"
            assert error.remedy == f"use finesight {hint}"
    for name in COMMANDS:
        typos = {name.replace(" ", " x", 1), f"{name}s"} if " " in name else {f"{name}x"}
        for typo in typos:
            assert find_error(typo.split()).remedy == f"did you mean finesight {name}?", typo
    for words, remedy in {
        "trane": "did you mean finesight train?",
        "finetun": "use finesight train RECIPE",
        "data exprt": "did you mean finesight data export?",
        "data import a": "did you mean finesight import?",
        "xyzzyx": "see finesight --help",
        "rm": "see finesight --help",
        "--verison": "did you mean finesight --version?",
        "--halp": "use finesight --help",
        "-V": "use finesight --version",
        "--gpu 0 train": "write the options after the command",
        "--json check a": "write the options after the command",
    }.items():
        program = find_error(words.split())
        assert str(program.remedy).replace("app --help", "finesight --help") == remedy
    assert CliRunner().invoke(app, ["-h"]).exit_code == 0
    assert "Usage" in CliRunner().invoke(app, ["train", "-h"]).output


def list_words(name: str) -> tuple[list[str], list[str], list[str]]:
    """Return values of the required arguments of a command, its options and its arguments."""
    params = build_command(name, find_operation(name)).params
    options = [one for param in params for one in (*param.opts, *param.secondary_opts)]
    arguments = [param for param in params if isinstance(param, click.Argument)]
    required = ["recipe.yaml" for param in arguments if param.required]
    for param in params:
        if param.required and isinstance(param, click.Option):
            required += [param.opts[0], "llava"]
    return required, [one for one in options if one[0] == "-"], [str(p.name) for p in arguments]


def get_valid_value(name: str, option: str) -> str:
    """Return a value that an option of a command accepts; empty for a flag."""
    params = build_command(name, find_operation(name)).params
    param = next(one for one in params if option in (*one.opts, *one.secondary_opts))
    if isinstance(param, click.Option) and param.is_flag:
        return ""
    if isinstance(param.type, click.Choice):
        return str(next(iter(param.type.choices)))
    if isinstance(param.type, click.IntRange | click.FloatRange):
        return "2"
    return "new-name" if isinstance(param.type, click.Path) else "text"


def iter_option_guesses() -> Iterator[tuple[str, str]]:
    """Yield each command with each guess of the tables that applies to it."""
    for name in COMMANDS:
        _, options, arguments = list_words(name)
        tables = [first_guesses.OPTIONS.get(name, {}), first_guesses.OPTIONS[""]]
        if "overrides" in arguments:
            tables.append(first_guesses.OPTIONS["overrides"])
        if name == "export":
            targets = " ".join(first_guesses.EXPORT_TARGETS.values()).split()
            yield from ((name, f"--{target}") for target in targets)
        for table in tables:
            for hint, guesses in table.items():
                first = hint.partition(" ")[0]
                if first.startswith("--") and first not in options:
                    continue
                yield from ((name, guess) for guess in guesses.split() if guess not in options)
        for argument in {*arguments} & {*first_guesses.ARGUMENTS}:
            guesses = first_guesses.ARGUMENTS[argument].split()
            yield from ((name, guess) for guess in guesses if guess not in options)


def test_first_guesses_of_options_lead_to_words_that_the_command_accepts(folder):
    found = [*dict.fromkeys(iter_option_guesses())]
    assert len(found) > 500
    kinds = set()
    for name, option in found:
        required, options, arguments = list_words(name)
        guess = find_option(name, option, "1", options, arguments)
        assert guess is not None, (name, option)
        kinds.add(guess.kind)
        error = find_error([*name.split(), *required, option, "1"])
        assert error.what == f"no such option: {option}", (name, option)
        proposals = [guess.format(option)]
        if "overrides" in arguments:
            # Settings of recipes and of other trainers precede other options.
            proposals.append(suggest_override(option.removeprefix("--"), "1") or proposals[0])
        assert str(error.remedy).startswith(tuple(proposals)), (name, option)
        words = [*guess.words]
        if guess.kind == "option":
            given = get_valid_value(name, words[0])
            words = [words[0], *([given] if given and words[1:] == ["1"] else words[1:])]
            words = words if given else words[:1]
            parse_words([*name.split(), *required, *words])
        elif guess.kind == "setting":
            key = words[0].partition("=")[0]
            value = "1" if key in ("train.batch_size", "train.epochs") else "train.jsonl"
            load_recipe(Path("recipe.yaml"), [f"{key}={value}"])
        elif guess.kind == "argument":
            assert words[0] in arguments
    assert kinds == {"option", "setting", "argument", "command"}


OPTION_COMMANDS = {
    hint for name, table in first_guesses.OPTIONS.items() for hint in table if "finesight " in hint
}


@pytest.mark.parametrize("hint", sorted(OPTION_COMMANDS | {*first_guesses.EXPORT_TARGETS}))
def test_commands_that_options_propose_succeed(folder, hint):
    words = shlex.split(hint.format("1").partition("finesight ")[2])
    run_hint(" ".join(words))


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        ("export run --gguf", "use finesight export MODEL OUT --converter FILE"),
        ("export run --format gguf", "use finesight export MODEL OUT --converter FILE"),
        ("export run --format=vllm", "use finesight export RUN"),
        ("export run vllm", "use finesight export RUN"),
        ("export vllm", "use finesight export RUN"),
        ("export SGLang run", "use finesight export RUN"),
        ("export gguf", "use finesight export MODEL OUT --converter FILE"),
        ("export run awq", "use finesight export RUN OUT --quantize w4a16"),
        ("export run --format onnx", "see "),
        ("export vllm hf:me/model", "use finesight export RUN"),
        ("export --push me/model", "use finesight export RUN hf:OWNER/NAME"),
        ("train r.yaml --lr 1e-4", "use train.learning_rate=1e-4"),
        ("train r.yaml --epochs 3", "use train.epochs=3"),
        ("train r.yaml --gpu 0", "use env CUDA_VISIBLE_DEVICES=0 finesight train RECIPE"),
        ("train r.yaml --device cpu", "use train.device=cpu"),
        ("train r.yaml --output x", "use output_dir=x"),
        ("train r.yaml -o x", "use output_dir=x"),
        ("train r.yaml --batch-size 4", "use train.batch_size=4"),
        ("train r.yaml --data a.jsonl", "use data.train=a.jsonl"),
        ("train --config r.yaml", "write r.yaml without --config"),
        ("train r.yaml --resum", "use --resume"),
        ("plan r.yaml --device cuda", "use train.device=cuda"),
        ("predict run --gpu", "use --device cuda"),
        ("predict run --device gpu", "use --device cuda"),
        ("predict run --device cuda:0", "use --device cuda"),
        ("predict run --precision float16", "use --precision fp16"),
        ("predict run --weight-format 4bit", "use --weight-format nf4"),
        ("predict --model run", "write run without --model"),
        ("predict run --image a.png", "write a.png without --image"),
        ("predict run --image 'a b.png'", "write 'a b.png' without --image"),
        ("predict run --images-per-question 2 --image a.png", "write a.png without --image"),
        ("predict run --question 'What is it?'", "use --prompt 'What is it?'"),
        ("train r.yaml --dataset 'my data.jsonl'", "use 'data.train=my data.jsonl'"),
        ("predict run --max-tokens 3", "use --max-new-tokens 3"),
        ("predict run --temperature 0.5", "use finesight chat RUN --temperature 0.5"),
        ("eval run -n 3", "use --limit 3"),
        ("eval run -n3 a.png", "use --limit 3"),
        ("import a.csv --output out", "write out without --output"),
        ("import a.csv out --split 0.1", "use --train-fraction 0.9"),
        ("init a.csv --output out", "use --out out"),
        ("serve run --api-key k", "use --key-file FILE"),
        ("serve run --tensor-parallel-size 2", "use finesight export RUN"),
        ("merge run --output out", "write out without --output"),
        ("check a.jsonl --verbose", "remove it"),
    ],
)
def test_frequent_guesses_have_a_remedy(folder, words, remedy):
    assert str(find_error(shlex.split(words)).remedy).startswith(remedy)


def test_values_are_choices_of_their_parameter():
    parameters = [one for name in COMMANDS for one in list_parameters(find_operation(name))]
    for name, values in first_guesses.VALUES.items():
        choices = {choice for one in parameters if one.name == name for choice in one.choices}
        assert {*values} <= choices, name


def test_python_names_and_arguments_have_a_proposal():
    assert {*first_guesses.FUNCTIONS} <= {*api.__all__}
    functions = first_guesses.FUNCTIONS.items()
    guesses = {guess: name for name, texts in functions for guess in texts.split()}
    for guess, name in (guesses | {"trian": "train", "predct": "predict"}).items():
        with pytest.raises(AttributeError, match=rf"Did you mean {name}\?"):
            getattr(api, guess)
    with pytest.raises(AttributeError, match=r"no attribute 'xyzzyx'$"):
        _ = api.xyzzyx
    assert not hasattr(api, "finetune")


@pytest.mark.parametrize(
    ("call", "hint"),
    [
        (lambda: api.train("r.yaml", lr=1e-4), r"overrides=\['train.learning_rate=0.0001'\]"),
        (lambda: api.train("r.yaml", output="x"), r"overrides=\['output_dir=x'\]"),
        (lambda: api.plan("r.yaml", epochs=3), r"overrides=\['train.epochs=3'\]"),
        (lambda: api.predict("run", max_tokens=3), "use max_new_tokens=3"),
        (lambda: api.predict("run", image="a.png"), "use images='a.png'"),
        (lambda: api.predict("run", foo=1), "it has run_or_model, images, prompt, data"),
        (lambda: api.evaluate("run", outt="x"), "use out='x'"),
        (lambda: api.evaluate("run", num_samples=""), "use limit=''"),
        (lambda: api.init("a.csv", type="json"), "use metric='json'"),
        (lambda: api.check_data("a.jsonl", verbose=True), "remove it"),
        (lambda: api.import_data("a", "b", split=0.1), "use train_fraction=0.9$"),
        (lambda: api.merge("run", output="x"), "use out='x'"),
    ],
)
def test_unknown_arguments_have_a_proposal(call, hint):
    with pytest.raises(TypeError, match=rf"unexpected keyword argument '\w+': .*{hint}"):
        call()


def test_value_of_python_has_a_proposal():
    with pytest.raises(UserError) as raised:
        api.predict("run", device="gpu")
    assert raised.value.remedy == "use 'cuda'"


def test_missing_choices_and_indices_are_described():
    assert describe_choices(["a", "b"], "split") == "one of a, b"
    assert describe_choices([], "split") == "no split: there is none"
    assert describe_indices(3, "image") == "an index below 3, the number of images"
    assert describe_indices(1, "image") == "index 0: there is one image"
    assert describe_indices(0, "image") == "no image: there is none"


EMPTY_RANGE = r"one of ?(\n|$|\(\)|,)|at most 0\b|below 0\b|to -1\b|numbers below|fewer than [01] "


@pytest.mark.parametrize(
    "words",
    [
        "import empty.jsonl out",
        "import header.csv out --map image=image --map answer=text --prompt x",
        "import objects.jsonl out --map image=a --map answer=b --prompt x",
        "import box.jsonl out",
        "import empty out",
        "check empty.jsonl",
        "init header.csv --yes",
        "predict finesight-tiny --data box.jsonl",
        "search recipe.yaml --gpus 0",
        "train recipe.yaml data.eval=[] data.eval.0.path=x",
        "train recipe.yaml rewards.0.name=x",
        "train recipe.yaml tune.lora.target_modules=[]",
        "train recipe.yaml data.train=texts.jsonl train.warmup=5",
        "eval finesight-tiny --data empty.jsonl --metric ocr",
        "compare empty empty",
        "pairs empty out --data train.jsonl",
    ],
)
def test_messages_show_no_empty_range(folder, words):
    """Nothing to choose from is said as such."""
    box: dict[str, Any] = {"type": "box", "xyxy": [0, 0, 1, 1]}
    question = {"role": "user", "content": "q"}
    row = {"id": "1", "messages": [question, {"role": "assistant", "content": [box]}]}
    text = {"id": "1", "messages": [question, {"role": "assistant", "content": "a"}]}
    write_jsonl(folder / "box.jsonl", [row])
    write_jsonl(folder / "texts.jsonl", [text])
    write_jsonl(folder / "objects.jsonl", [{}])
    (folder / "empty.jsonl").write_text("")
    (folder / "header.csv").write_text("image,text\n")
    (folder / "empty").mkdir(exist_ok=True)
    error = find_error(words.split())
    assert error.expected
    assert not re.search(EMPTY_RANGE, str(error)), str(error)


def test_boxes_of_a_prediction_without_images_cannot_be_drawn():
    prediction = types.SimpleNamespace(images=[])
    with pytest.raises(UserError, match="image 0") as raised:
        api.draw_boxes(prediction)
    assert "no image: there is none" in str(raised.value)
