"""Python scripts with a trainer: what the training uses, and what their code does."""

import ast
import json
import random
from pathlib import Path

import pytest
import yaml
from case_files import load_cases
from convert_fixtures import convert_script, load_converted_recipe, notes_by_setting
from image_fixtures import write_gray_image

from finesight.convert.python_values import evaluate_constant
from finesight.convert.recipe_converter import ConvertedRecipe
from finesight.errors import UserError

TABLES = load_cases("python_scripts")
NOTED = {"callbacks", "encode", "dataset", "prompt"}


@pytest.fixture(autouse=True)
def _work_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def read_settings(folder: Path, done: ConvertedRecipe) -> dict[str, object]:
    """Return the settings that the scripts below differ in."""
    made = load_converted_recipe(folder)
    given = yaml.safe_load(done.recipe_text)
    lora = given["tune"].get("lora")
    return {
        **{"model": made.model, "adapter": given.get("adapter"), "image": given.get("image")},
        **{"rank": lora and lora["rank"], "epochs": made.train.epochs},
        **{"learning_rate": made.train.learning_rate.default, "output_dir": str(made.output_dir)},
        **{"max_length": made.data.max_length, "system_prompt": made.data.system_prompt},
        **{"batch_size": made.train.batch_size, "source": done.imports[0]["source"]},
        "max_pixels": given.get("image", {}).get("max_pixels"),
    }


@pytest.mark.parametrize("case", TABLES["test_training_counts_not_inference"])
def test_training_counts_not_inference(case, tmp_path):
    assert case["old"] in TABLES["SCRIPT"]
    text = TABLES["SCRIPT"].replace(case["old"], case["new"], 1)
    if "Other(" in text:
        text = "class Other(Trainer):\n    def compute_loss(self):\n        return 1\n" + text
    done = convert_script(tmp_path, text, "train.py")
    expected = {
        **{"model": "modelscope:Qwen/Qwen2-VL-2B-Instruct", "adapter": None, "rank": 12},
        **{"image": {"height": 140, "width": 280}, "max_length": 4096, "epochs": 2},
        **{"source": "all.json", "output_dir": "out", "system_prompt": None},
    }
    expected |= case.get("expected", {})
    found = read_settings(tmp_path, done)
    if "adapter" in case.get("expected", {}):
        del expected["rank"]
    assert {key: found[key] for key in expected} == expected
    noted = NOTED - {*case.get("less", [])} | {*case.get("more", [])}
    assert notes_by_setting(done, "differs").keys() == noted
    assert not notes_by_setting(done, "unknown")


def test_notes_name_the_setting_with_the_same_effect(tmp_path):
    done = convert_script(tmp_path, TABLES["SCRIPT"], "train.py")
    notes = notes_by_setting(done, "differs")
    assert "[{kind: swanlab, project: animals}]" in notes["callbacks"]
    assert "packed" in notes_by_setting(done, "ignored")["data_collator"]
    assert "Another question" not in str(done.notes)
    stopping = TABLES["SCRIPT"].replace("[tracker]", "[EarlyStoppingCallback(3), Own()]")
    done = convert_script(tmp_path, stopping, "train.py")
    texts = [note.text for note in done.notes if note.key == "callbacks"]
    assert ["eval.patience" in text for text in texts] == [True, False]


def test_import_gets_the_question_that_the_data_lack(tmp_path):
    write_gray_image(tmp_path / "a.png")
    turns = [{"role": "user", "value": "a.png"}, {"role": "assistant", "value": "a cat"}]
    (tmp_path / "all.json").write_text(json.dumps([{"conversations": turns}] * 4))
    done = convert_script(tmp_path, TABLES["SCRIPT"], "train.py")
    assert done.imports[0]["prompt"] == "Which animal?"
    turns[0]["value"] = "What?<|vision_start|>a.png<|vision_end|>"
    (tmp_path / "all.json").write_text(json.dumps([{"conversations": turns}] * 4))
    done = convert_script(tmp_path, TABLES["SCRIPT"], "train.py")
    assert "prompt" not in done.imports[0]
    assert "--prompt" in notes_by_setting(done, "differs")["prompt"]


def test_existing_model_folder_remains(tmp_path):
    folder = tmp_path / "Qwen" / "Qwen2-VL-2B-Instruct"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "qwen2_vl", "vision_config": {}}')
    convert_script(tmp_path, TABLES["SCRIPT"], "train.py")
    assert load_converted_recipe(tmp_path).model == "./Qwen/Qwen2-VL-2B-Instruct"
    missing = TABLES["SCRIPT"].replace('"./Qwen/Qwen2-VL', '"/data/Qwen3-VL')
    done = convert_script(tmp_path, missing, "train.py")
    assert "does not exist here" in notes_by_setting(done, "note")["model"]


@pytest.mark.parametrize(("command", "settings"), TABLES["test_arguments_of_the_command_are_read"])
def test_arguments_of_the_command_are_read(command, settings, tmp_path):
    (tmp_path / "train.py").write_text(TABLES["ARGPARSE"])
    (tmp_path / "start.sh").write_text(TABLES["START"])
    done = convert_script(tmp_path, command, "run.sh")
    found = read_settings(tmp_path, done)
    assert {key: found[key] for key in settings} == settings
    assert notes_by_setting(done, "unknown").keys() == {"shuffle"}


def test_script_alone_has_the_defaults_of_its_arguments(tmp_path):
    done = convert_script(tmp_path, TABLES["ARGPARSE"], "train.py")
    found = read_settings(tmp_path, done)
    assert (found["rank"], found["learning_rate"]) == (8, 2e-4)
    assert notes_by_setting(done, "differs").keys() == {"dataset", "output_dir"}


def test_arguments_of_a_nested_script_are_asked_for(tmp_path):
    (tmp_path / "train.py").write_text(TABLES["ARGPARSE"])
    (tmp_path / "start.sh").write_text("python train.py --out $1\n")
    with pytest.raises(UserError, match=r"\$1") as caught:
        convert_script(tmp_path, (tmp_path / "start.sh").read_text(), "start.sh")
    start = str(tmp_path / "start.sh")
    assert f"bash {start} ARGUMENTS" in str(caught.value.remedy)
    convert_script(tmp_path, f"bash {start} here", "run.sh")
    assert str(load_converted_recipe(tmp_path).output_dir) == "here"


@pytest.mark.parametrize(("options", "settings"), TABLES["test_defaults_of_dataclasses_are_read"])
def test_defaults_of_dataclasses_are_read(options, settings, tmp_path):
    (tmp_path / "a.yaml").write_text(
        "model_name_or_path: Qwen/Qwen2-VL-2B-Instruct\nnum_train_epochs: 9\noutput_dir: o\n"
    )
    for name in ("own.py", "sft.py"):
        (tmp_path / name).write_text(TABLES["DATACLASSES"])
        done = convert_script(tmp_path, f"python {name} {options}\n")
        found = read_settings(tmp_path, done)
        assert {key: found[key] for key in settings} == settings
        assert found["image"] == {"longest_side": 320}
        assert load_converted_recipe(tmp_path).train.weight_decay == 0.2
        assert "output_dir" in notes_by_setting(done, "differs")
        assert notes_by_setting(done, "unknown").keys() == {"background"}


HF_PARSER = """
from typing import Optional
@dataclass
class ModelArguments:
    adapt: {annotation} = {default}
    level: Optional[int] = None
    rank: Rank = None
parser = HfArgumentParser((ModelArguments, TrainingArguments))
model_args, args = parser.parse_args_into_dataclasses()
"""
ARGPARSE_PARSER = """
parser = argparse.ArgumentParser()
parser.add_argument("--adapt", {arguments})
parser.add_argument("--level", type=int)
parser.add_argument("--rank", type=check_rank)
model_args = parser.parse_args()
args = TrainingArguments("o")
"""
ADAPTED = """
config = None
if model_args.level == 4:
    config = BitsAndBytesConfig(load_in_4bit=True)
model = AutoModel.from_pretrained("Qwen/Qwen2-VL-2B-Instruct", quantization_config=config)
if model_args.adapt:
    model = get_peft_model(model, LoraConfig(r=model_args.rank, lora_alpha=9))
Trainer(model=model, args=args).train()
"""
BOOLEAN = "action=argparse.BooleanOptionalAction"
FUNCTION = """
def main(adapt{annotation}, level=8, rank{rank}):
    if level == 4:
        config = BitsAndBytesConfig(load_in_4bit=True)
    model = AutoModel.from_pretrained("Qwen/Qwen2-VL-2B-Instruct", quantization_config=config)
    if adapt:
        model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=9))
    Trainer(model=model, args=TrainingArguments("o")).train()
fire.Fire(main)
"""


def hf_parser(annotation: str, default: str = "None") -> str:
    return HF_PARSER.format(annotation=annotation, default=default) + ADAPTED


def argparse_parser(arguments: str) -> str:
    return ARGPARSE_PARSER.format(arguments=arguments) + ADAPTED


def function(annotation: str, rank: str = "=None") -> str:
    return FUNCTION.format(annotation=annotation, rank=rank)


def invert(text: str) -> str:
    return text.replace("if model_args.adapt", "if not model_args.adapt")


@pytest.mark.parametrize(
    ("text", "options", "rank"),
    [
        (hf_parser("bool", "True"), "--adapt False", None),
        (hf_parser("bool", "True"), "--adapt 0", None),
        (hf_parser("bool", "True"), "", 6),
        (hf_parser("Optional[bool]"), "--adapt no", None),
        (hf_parser("'bool'"), "--adapt false", None),
        (hf_parser("bool | None"), "--adapt true", 6),
        (hf_parser("bool"), "--adapt", 6),
        (hf_parser("Flag", "False"), "--adapt False", None),
        (hf_parser("Flag"), "--adapt False", 6),
        (hf_parser("bool", "True"), "--no_adapt", None),
        (hf_parser("bool", "True"), "--no-adapt", None),
        (hf_parser("Optional[bool]", "field(default=True)"), "--no_adapt", None),
        (hf_parser("bool", "True\n    no_adapt: bool = False"), "--no_adapt", 6),
        (hf_parser("int"), "--adapt 0", None),
        (hf_parser("float"), "--adapt 0.0", None),
        (hf_parser("Optional[str]"), "--adapt 0", 6),
        (argparse_parser("type=int"), "--adapt 0", None),
        (argparse_parser("type=bool"), "--adapt False", 6),
        (argparse_parser("default=''"), "", None),
        (argparse_parser("type=int, default='0'"), "", None),
        (argparse_parser("type=int, default='1'"), "", 6),
        (argparse_parser("type=check, default='0'"), "", 6),
        (invert(argparse_parser("type=check, default='1'")), "", 6),
        (argparse_parser(BOOLEAN), "--adapt", 6),
        (argparse_parser(BOOLEAN), "--no-adapt", None),
        (argparse_parser(f"{BOOLEAN}, default=True"), "", 6),
        (argparse_parser(f"{BOOLEAN}, default=True"), "--no-adapt", None),
        (invert(argparse_parser(BOOLEAN)), "--adapt", None),
        (argparse_parser("type=lambda text: text.lower() == 'true'"), "--adapt False", 6),
        (invert(argparse_parser("type=lambda text: text.lower() == 'true'")), "--adapt False", 6),
        (invert(argparse_parser("type=int")), "--adapt 0", 6),
        (invert(hf_parser("Flag")), "--adapt False", 6),
        (invert(hf_parser("bool")), "--adapt True", None),
        (function(": bool = True"), "--adapt False", None),
        (function("=True"), "--adapt False", None),
        (function(": int = 1"), "--adapt 0", None),
        (function("=True"), "", 6),
        (function("=True", ": Rank = None"), "", 6),
        (function("=True", ": int = 8"), "", 6),
        (function("=None"), "--adapt False", 6),
    ],
)
def test_options_have_the_types_that_the_script_defines(text, options, rank, tmp_path):
    """Check conditions on them: if the type is unknown, the condition is, too."""
    (tmp_path / "own.py").write_text(text)
    command = f"python own.py {options} --level 4 --rank 6 --output_dir o\n"
    done = convert_script(tmp_path, command)
    assert read_settings(tmp_path, done)["rank"] == rank
    # Only frozen parts are quantized.
    assert (load_converted_recipe(tmp_path).tune.quantize.nf4 is None) == (rank is None)
    convert_script(tmp_path, command.replace("--level 4", "--level 8"))
    assert load_converted_recipe(tmp_path).tune.quantize.nf4 is None


@pytest.mark.parametrize("option", ["--no_adapt", "--no-adapt"])
@pytest.mark.parametrize(
    "text", [hf_parser("bool", "True"), argparse_parser(f"{BOOLEAN}, default=True")]
)
def test_option_that_negates_a_flag_is_no_setting(text, option, tmp_path):
    (tmp_path / "own.py").write_text(text)
    done = convert_script(tmp_path, f"python own.py {option} --rank 6 --output_dir o\n")
    assert not notes_by_setting(done, "unknown").keys() & {"no_adapt"}


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ('os.path.join("", "train.json")', "train.json"),
        ('os.path.join("a", "/b")', "/b"),
        ('os.path.join("a/", "b", "")', "a/b/"),
        ('os.path.join("a", "b", "c.json")', "a/b/c.json"),
        ('Path("/")', "/"),
        ('Path("/") / "b"', "/b"),
        ('Path("") / "b"', "b"),
        ('Path("a/") / "b"', "a/b"),
        ('Path("a") / "/b"', "/b"),
        ('Path("a", "b/")', "a/b"),
        ('str("a/")', "a/"),
        ('str("/")', "/"),
        ("str(2)", "2"),
    ],
)
def test_paths_are_joined_as_by_python(expression, value):
    node = ast.parse(expression, mode="eval").body
    assert evaluate_constant(node, {}) == value


CELL = """
model = AutoModel.from_pretrained("Qwen/Qwen2-VL-2B-Instruct")
Trainer(model=model, args=TrainingArguments("o", num_train_epochs=2)).train()
"""


@pytest.mark.parametrize(
    "cells",
    [
        ["!pip install \\\n  transformers \\\n  'peft>=0.18'\n", CELL],
        ["if True:\n  !pip install \\\n  transformers\n", CELL],
        ["!pip install \\", CELL],
        ["%%bash\npip install transformers\n", CELL],
        ["\n%%writefile train.py\nTrainingArguments('o', num_train_epochs=9)\n", CELL],
        ["%%capture out\n!ls\n" + CELL],
        ["%%time\n" + CELL],
        ["files = !ls *.json\n%pip install peft\n" + CELL],
        ["first, rest = !ls \\\n  data\nseconds = %timeit -o f()\n" + CELL],
        ["%%prun -l 9\n" + CELL],
        [CELL, "?model\n"],
        [CELL, "model?\nTrainer.train?? \n"],
        ["if True:\n  Trainer?\n", CELL],
    ],
)
def test_commands_in_a_notebook_are_no_code(cells, tmp_path):
    content = [{"cell_type": "code", "source": text.splitlines(keepends=True)} for text in cells]
    convert_script(tmp_path, json.dumps({"cells": content}), "train.ipynb")
    assert load_converted_recipe(tmp_path).train.epochs == 2


def test_data_of_the_evaluation_are_no_further_training_data(tmp_path):
    """One dict holds both datasets, so that the training depends on both calls."""
    loading = (
        "      rows = DatasetDict({'train': load_dataset('json', data_files=data_args.train_file),"
        " 'test': load_dataset('json', data_files=data_args.validation_file)})\n"
    )
    text = TABLES["DATACLASSES"].replace(
        "max_image_side", "validation_file: str = None\n    max_image_side", 1
    )
    text = text.replace("    Trainer(", f"{loading[2:]}    Trainer(train_dataset=rows['train'], ")
    (tmp_path / "own.py").write_text(text)
    options = "--model_name_or_path Qwen/Qwen2-VL-2B-Instruct --train_file a.json --output_dir o"
    done = convert_script(tmp_path, f"python own.py {options} --validation_file b.json\n")
    assert [one["source"] for one in done.imports] == ["a.json", "b.json"]
    assert "dataset" not in notes_by_setting(done, "differs")
    made = yaml.safe_load(done.recipe_text)
    assert made["data"]["eval"] == "samples/b/data.jsonl"


@pytest.mark.parametrize(
    ("revision", "model"),
    [
        ("", "modelscope:Qwen/Qwen2-VL-2B-Instruct"),
        (', revision="master"', "modelscope:Qwen/Qwen2-VL-2B-Instruct"),
        (', revision="v1.2"', "modelscope:Qwen/Qwen2-VL-2B-Instruct@v1.2"),
    ],
)
def test_revision_of_a_download_is_kept(revision, model, tmp_path):
    download = 'snapshot_download("Qwen/Qwen2-VL-2B-Instruct"'
    convert_script(
        tmp_path, TABLES["SCRIPT"].replace(download, f"{download}{revision}"), "train.py"
    )
    assert load_converted_recipe(tmp_path).model == model


@pytest.mark.parametrize("count", [2, 5, 40])
def test_several_configurations_are_refused_until_one_is_left(count, tmp_path):
    used = "config = LoraConfig(r=12"
    others = "".join(f"other{i} = LoraConfig(r={i + 1})\n" for i in range(count))
    uses = "".join(f"get_peft_model(base, other{i})\n" for i in range(count))
    text = TABLES["SCRIPT"].replace("trainer.train()", f"trainer.train()\n{uses}")
    text = text.replace(used, f"{others}{used}").replace("base, config)", "base, pick())", 1)
    message = r"several LoraConfig, in lines \d+, .{1,50} of which"
    with pytest.raises(UserError, match=message) as caught:
        convert_script(tmp_path, text, "train.py")
    assert "copy" in str(caught.value.remedy)
    kept = text.replace(others, "").replace(uses, "").replace("pick()", "config")
    convert_script(tmp_path, kept, "copy.py")
    assert load_converted_recipe(tmp_path).tune.lora.rank == 12


def test_missing_script_is_noted(tmp_path):
    command = "python own.py --model_name_or_path Qwen/Qwen2-VL-2B-Instruct --num_train_epochs 4"
    done = convert_script(tmp_path, f'{command} --report_to "" --some_size 3\n')
    assert load_converted_recipe(tmp_path).train.epochs == 4
    assert "own.py" in notes_by_setting(done, "differs")
    assert notes_by_setting(done, "unknown").keys() == {"some_size"}


@pytest.mark.parametrize(
    ("text", "words", "remedy"), TABLES["test_script_without_training_is_refused_with_its_purpose"]
)
def test_script_without_training_is_refused_with_its_purpose(text, words, remedy, tmp_path):
    with pytest.raises(UserError, match=words) as caught:
        convert_script(tmp_path, text, "a.py")
    assert remedy in str(caught.value.remedy)
    assert not (tmp_path / "recipe.yaml").exists()


def test_rows_of_a_dataset_are_refused_with_an_import(tmp_path):
    with pytest.raises(UserError, match="rows of a dataset") as caught:
        convert_script(tmp_path, '[{"id": 1, "conversations": []}]', "rows.json")
    assert "finesight import" in str(caught.value.remedy)


def test_random_changes_of_a_script_raise_no_traceback(tmp_path):
    """Each recipe that is written loads, whatever lines are left, moved or cut."""
    chance = random.Random(9)
    written = 0
    for turn in range(150):
        name = chance.choice(["SCRIPT", "ARGPARSE", "DATACLASSES"])
        lines = TABLES[name].splitlines()
        for _ in range(chance.randint(1, 3)):
            index = chance.randrange(len(lines))
            line = lines[index]
            change = chance.choice([[], [line, line], [line[: len(line) // 2]], [f"  {line}"]])
            lines[index : index + 1] = change
        if turn % 3 == 0:
            chance.shuffle(lines)
            lines = [line.lstrip() for line in lines]
        try:
            convert_script(tmp_path, "\n".join(lines), "train.py")
        except UserError:
            continue
        written += 1
        load_converted_recipe(tmp_path)
    assert written > 20


def test_script_with_the_name_and_the_arguments_of_trl_is_read(tmp_path):
    """Its code sets values that the options of the command do not have."""
    script = """
from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, TrlParser, get_peft_config
parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig))
script_args, training_args, model_args = parser.parse_args_and_config()
training_args.max_length = None
training_args.weight_decay = 0.3
model = AutoModelForImageTextToText.from_pretrained(
    model_args.model_name_or_path, revision=model_args.model_revision
)
rows = load_dataset(script_args.dataset_name, name=script_args.dataset_config)
SFTTrainer(model=model, args=training_args, train_dataset=rows["train"],
           peft_config=get_peft_config(model_args)).train()
"""
    (tmp_path / "sft_vlm.py").write_text(script)
    command = (
        "accelerate launch sft_vlm.py --model_name_or_path Qwen/Qwen2.5-VL-3B-Instruct"
        " --dataset_name a/b --output_dir o --use_peft"
    )
    done = convert_script(tmp_path, command)
    made = load_converted_recipe(tmp_path)
    assert made.data.max_length > 100_000
    assert made.train.weight_decay == 0.3
    assert made.tune.lora.rank == 16
    assert done.imports[0]["source"] == "hf:a/b"
    assert not notes_by_setting(done, "differs")
    convert_script(tmp_path, f"{command} --model_revision v2 --lora_r 4")
    made = load_converted_recipe(tmp_path)
    assert (made.model, made.tune.lora.rank) == ("Qwen/Qwen2.5-VL-3B-Instruct@v2", 4)
    (tmp_path / "sft_vlm.py").unlink()
    convert_script(tmp_path, command)
    assert load_converted_recipe(tmp_path).data.max_length == 1024
