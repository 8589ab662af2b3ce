"""Files that are a configuration, and all the others."""

import random
from pathlib import Path

import pytest
import yaml
from case_files import load_cases
from convert_fixtures import (
    LLAMA_FACTORY_SETTINGS,
    SWIFT_SETTINGS,
    convert_script,
    convert_settings,
    load_converted_recipe,
    notes_by_setting,
)

from finesight.convert.external_config import load_rules
from finesight.convert.recipe_converter import convert_config
from finesight.errors import UserError

TABLES = load_cases("config_loader")

CASES = load_cases("conversions")
DEEP = ("a.json", "[" * 100_000, "cannot be read")
START = "swift sft --model Qwen/Qwen2-VL-2B-Instruct --dataset a.jsonl"


@pytest.mark.parametrize(("name", "text", "words"), [*CASES["files"], DEEP])
def test_files_without_settings_are_rejected(name, text, words, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=words):
        convert_config(tmp_path / name, tmp_path / "recipe.yaml")
    assert not (tmp_path / "recipe.yaml").exists()


def test_unreadable_files_are_rejected(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"model: \xff\n")
    for source in (tmp_path / "binary.yaml", tmp_path / "none.yaml", tmp_path, Path("/dev/zero")):
        with pytest.raises(UserError):
            convert_config(source, tmp_path / "recipe.yaml")


def test_recipe_is_never_overwritten(tmp_path):
    convert_settings(tmp_path, SWIFT_SETTINGS)
    before = (tmp_path / "recipe.yaml").read_text()
    with pytest.raises(UserError, match="never overwritten"):
        convert_config(tmp_path / "a.yaml", tmp_path / "recipe.yaml")
    assert (tmp_path / "recipe.yaml").read_text() == before


def test_script_is_parsed_like_a_shell(tmp_path):
    script = f"""#!/bin/bash
    set -e
    # swift sft --model commented-out
    export MAX_PIXELS=1003520 MIN_PIXELS=50176
    unused=1
    mkdir -p $HOME/out && cd $HOME/out; NPROC_PER_NODE=2 MAX_PIXELS=401408 {START} \\
        --lora_rank 16 --lora_alpha 64 --lora_dropout 0 --system "Say 'it' --briefly # really
in two lines" \\
        --learning_rate=3e-5 --freeze_vit false \\
        --warmup_steps 5 2>&1 | tee train.log &
    """
    done = convert_script(tmp_path, script)
    made = load_converted_recipe(tmp_path)
    lora = made.tune.lora
    assert (lora.rank, lora.alpha, lora.dropout) == (16, 64.0, 0.0)
    assert made.data.system_prompt == "Say 'it' --briefly # really in two lines"
    assert (made.train.learning_rate.default, made.train.warmup) == (3e-5, 5)
    assert (made.image.min_pixels, made.image.max_pixels) == (50_176, 401_408)
    assert made.tune.vision == "lora"
    assert "8 accumulation steps x 2 GPUs" in notes_by_setting(done, "note")["batch"]
    assert not notes_by_setting(done, "unknown")
    assert "unused" not in str(done.notes)


@pytest.mark.parametrize(("script", "text"), CASES["unresolved"])
def test_unresolved_command_is_rejected(script, text, tmp_path):
    """Check that a command whose values only the shell knows asks for the resolved command."""
    with pytest.raises(UserError, match="does not execute scripts") as caught:
        convert_script(tmp_path, script)
    assert repr(text) in caught.value.what
    assert "resolved command" in caught.value.remedy
    assert not (tmp_path / "recipe.yaml").exists()


@pytest.mark.parametrize(
    ("script", "kind", "keys"),
    [
        (START.replace("--model", "stray --model"), "unknown", {"arguments without an option"}),
        (
            f"FPS_MAX_FRAMES=12 VIDEO_MAX_PIXELS=50176 {START}",
            "differs",
            {"FPS_MAX_FRAMES", "VIDEO_MAX_PIXELS"},
        ),
    ],
)
def test_other_words_and_variables_are_reported(script, kind, keys, tmp_path):
    assert set(notes_by_setting(convert_script(tmp_path, script), kind)) == keys


@pytest.mark.parametrize("start", TABLES["test_start_commands_are_recognized"])
def test_start_commands_are_recognized(start, tmp_path):
    convert_script(tmp_path, START.replace("swift sft", start) + " --gradient_accumulation_steps 3")
    assert load_converted_recipe(tmp_path).train.batch_size == (6 if "torchrun" in start else 3)


VALUES: list[object] = [
    *(None, True, False, 0, 1, -1, 3, 0.5, 1e-5, 1e308, float("nan"), 10**30, 2**40),
    *("", "true", "none", "null", "auto", "all", "lora", "full", "zero3", "1e-4", "a,b", "{", "[]"),
    *("\x1b[31m", "# not a comment", "a: b", "é\n- x", "$X", "../..", "x" * 5000),
    *([], ["a"], [1, None], {}, {"a": 1}, {"zero_optimization": {"stage": []}}, [["a"]]),
]


@pytest.mark.parametrize("program", ["ms-swift", "LLaMA-Factory", "TRL"])
def test_random_settings_raise_no_traceback(program, tmp_path, monkeypatch):
    """Each recipe that is written loads, whatever stood there; everything else is refused."""
    monkeypatch.chdir(tmp_path)
    trl = {"model_name_or_path": "Qwen/Qwen2-VL-2B-Instruct", "dataset_name": "a", "use_peft": True}
    base = {"ms-swift": SWIFT_SETTINGS, "TRL": trl}.get(program, LLAMA_FACTORY_SETTINGS)
    rules = load_rules(program)
    chance = random.Random(7)
    names = [*sorted(rules.converted), *rules.other, *rules.aliases, "ENV", "made up", "é"]
    written = 0
    for turn in range(80):
        count = 1 if turn < 55 else chance.randint(2, 6)
        drawn = {name: chance.choice(VALUES) for name in chance.sample(names, count)}
        try:
            done = convert_settings(tmp_path, base | drawn)
        except UserError:
            continue
        written += 1
        load_converted_recipe(tmp_path)
        assert yaml.safe_load(done.recipe_text)
    assert written > 20


def test_random_scripts_raise_no_traceback(tmp_path):
    chance = random.Random(8)
    pieces = [*START.split(), "--lora_rank", "8", "\n", "\\\n", "$X", "$(", ")", "`", "'", '"', ";"]
    pieces += ["|", "&&", "#", ">", "2>&1", "A=1", "${A", "export", "--", "-", "é", "{", "}"]
    for _ in range(100):
        text = f"{START} {' '.join(chance.choices(pieces, k=12))}"
        try:
            convert_script(tmp_path, text)
        except UserError:
            continue
        load_converted_recipe(tmp_path)


@pytest.mark.parametrize(("launcher", "processes"), CASES["launchers"])
@pytest.mark.parametrize("program", ["swift/cli/sft.py --model", "src/train.py --stage sft"])
def test_launcher_gives_process_count(launcher, processes, program, tmp_path):
    factory = "src" in program
    model = "--do_train --model_name_or_path" if factory else ""
    script = (
        f"{launcher} {program} {model} Qwen/Qwen2-VL-2B-Instruct --dataset a.jsonl"
        " --per_device_train_batch_size 1 --gradient_accumulation_steps 3"
    )
    batch = notes_by_setting(convert_script(tmp_path, script), "note")["batch"]
    assert load_converted_recipe(tmp_path).train.batch_size == 3 * (processes or 1)
    assert ("number of GPUs unknown" in batch) == (processes is None)
    assert "is not set" not in batch


@pytest.mark.parametrize(
    ("before", "settings"),
    [
        ("NPROC_PER_NODE=4\nexport NPROC_PER_NODE", (4, 12_845_056)),
        ("export NPROC_PER_NODE\nNPROC_PER_NODE=4", (4, 12_845_056)),
        ("declare -x NPROC_PER_NODE=2 MAX_PIXELS\nMAX_PIXELS=200704", (2, 200_704)),
        ("export MAX_PIXELS=100352\nMAX_PIXELS=200704", (1, 200_704)),
        ("export MAX_PIXELS=100352 NPROC_PER_NODE=2\nexport NPROC_PER_NODE=3", (3, 100_352)),
        (
            "NPROC_PER_NODE=4\nexport MAX_PIXELS=$((NPROC_PER_NODE * 50176)) NPROC_PER_NODE",
            (4, 200_704),
        ),
        ("NPROC_PER_NODE=4", (1, 12_845_056)),
        ("declare NPROC_PER_NODE=4", (1, 12_845_056)),
        ("export NPROC_PER_NODE=4\nexport -n NPROC_PER_NODE", (1, 12_845_056)),
        ("export NPROC_PER_NODE=4\ndeclare +x NPROC_PER_NODE", (1, 12_845_056)),
        ("export NPROC_PER_NODE=4 MAX_PIXELS=100352\nunset NPROC_PER_NODE", (1, 100_352)),
        ("export NPROC_PER_NODE=4\nunset -f NPROC_PER_NODE", (4, 12_845_056)),
        ("source variables.sh", (8, 12_845_056)),
        ("source variables.sh 5", (8, 12_845_056)),
        ("NPROC_PER_NODE=2\nbash variables.sh", (1, 12_845_056)),
    ],
)
@pytest.mark.parametrize("start", ["{}", "bash -c '{}'"])
def test_command_gets_exported_variables(before, settings, start, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "variables.sh").write_text("export NPROC_PER_NODE=8\n")
    command = f"{START} --per_device_train_batch_size 1 --gradient_accumulation_steps 1"
    convert_script(tmp_path, f"{before}\n{start.format(command)}\n")
    made = load_converted_recipe(tmp_path)
    assert (made.train.batch_size, made.image.max_pixels) == settings


@pytest.mark.parametrize(
    ("before", "text", "value"),
    [
        ("LR=", "${LR:-3e-5}", 3e-5),
        ("LR=''", "${LR:=3e-5}", 3e-5),
        ("LR=\n: ${LR:=3e-5}", "$LR", 3e-5),
        ("LR=2e-5", "${LR:-3e-5}", 2e-5),
        ("LR=", "${LR-3e-5}2e-5", 2e-5),
        ("", "${LR-3e-5}", 3e-5),
    ],
)
def test_default_of_a_variable_replaces_an_empty_value(before, text, value, tmp_path):
    convert_script(tmp_path, f"{before}\n{START} --learning_rate {text}\n")
    assert load_converted_recipe(tmp_path).train.learning_rate.default == value


@pytest.mark.parametrize(
    "before",
    [
        'LR=2e-5\n[ -z "$LR" ] && LR=3e-5',
        'LR=2e-5\n[ -n "$LR" ] || export LR=3e-5',
        "LR=2e-5\n[[ $A == b ]] && B=1 && LR=3e-5",
        "LR=2e-5\n! test -n $LR &&\n  LR=3e-5",
        "LR=2e-5\n[ -z $LR ] && { echo default; LR=3e-5; }",
        "LR=2e-5\n[ -z $LR ] && unset LR",
        "LR=2e-5\ncd /data || declare LR=3e-5",
        "LR=2e-5\ncd /data || LR+=5",
        "LR=2e-5\n[[ $A =~ (a|b) ]] && LR=3e-5",
        "LR=2e-5\n[[ ( $A == 1 ) ]] && LR=3e-5",
        "LR=2e-5\nset_rate() { LR=3e-5; }",
    ],
)
@pytest.mark.parametrize("value", ["$LR", "${LR:-1e-5}", "$COPY"])
def test_variable_of_a_conditional_assignment_is_unknown(before, value, tmp_path):
    with pytest.raises(UserError, match=r"depends on '\$LR'"):
        convert_script(tmp_path, f"{before}\nCOPY=$LR\n{START} --learning_rate {value}\n")
    convert_script(tmp_path, f"{before}\nLR=4e-5\n{START} --learning_rate $LR\n")
    assert load_converted_recipe(tmp_path).train.learning_rate.default == 4e-5


@pytest.mark.parametrize(
    "before",
    [
        "LR=1\ncd /data && LR=3e-5",
        "LR=3e-5\n[ -n $LR ] && echo 1; A=1",
        "[ -d /data ] && cd /data\nLR=3e-5",
        "cd /data || { echo missing; exit 1; }\nexport LR=3e-5",
        "[ -d /data ] && ROWS=(a.jsonl)\nLR=3e-5",
        "declare -a ROWS=(a.jsonl)\nexport LR=3e-5",
        "readonly ROWS=(a.jsonl)\nLR=3e-5",
        "LR=3\nLR+=e-5",
        "[ -d /data ] || A=1 & LR=3e-5",
        "[ -d /data ]\nROWS=(a.jsonl) && LR=3e-5",
    ],
)
def test_other_assignments_of_a_script_with_conditions_remain(before, tmp_path):
    convert_script(tmp_path, f"{before}\n{START} --learning_rate $LR\n")
    assert load_converted_recipe(tmp_path).train.learning_rate.default == 3e-5


@pytest.mark.parametrize(
    ("before", "text"),
    [
        ("[ -z $A ] && export MAX_PIXELS=100352", "$MAX_PIXELS"),
        ("MAX_PIXELS=100352\n[ -z $A ] || declare -x MAX_PIXELS", "$MAX_PIXELS"),
        ("MORE=(--lora_rank 4)\n[ -z $A ] && MORE+=(--lora_alpha 9)", "${MORE[@]}"),
        ("[ -z $A ] && MORE+=(--lora_alpha 9)\nMORE+=(--lora_rank 4)", "${MORE[@]}"),
        ("MORE=(--lora_rank 4)\n[ -z $A ] && unset MORE", "${MORE[@]}"),
        ("A=1\n((GPUS > 1)) && A=2", "((...))"),
    ],
)
def test_conditional_export_or_array_is_refused(before, text, tmp_path):
    start = START
    if "MORE" in text:
        start = f'{START} "${{MORE[@]}}"'
    with pytest.raises(UserError) as caught:
        convert_script(tmp_path, f"{before}\n{start}\n")
    assert text in str(caught.value.what)


def test_conditional_shift_makes_arguments_unknown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "start.sh").write_text(f"[ -z $A ] && shift\n{START} --learning_rate $1\n")
    with pytest.raises(UserError, match=r"depends on '\$1'"):
        convert_script(tmp_path, "bash start.sh 2e-5 3e-5")


@pytest.mark.parametrize(
    "command",
    [
        f"{START} --output_dir . --learning_rate 3e-5",
        f"{START} --output_dir runs/sh --learning_rate 3e-5",
        f"{START} --run_name bash --learning_rate 3e-5",
        "python own.py --output_dir zsh --learning_rate 3e-5 --report_to none"
        " --model_name_or_path Qwen/Qwen2-VL-2B-Instruct",
        "srun -N 1 --gpus 2 bash start.sh",
        "docker run image /bin/bash -e start.sh",
        "find . -name start.sh\nnohup sh start.sh",
        ". ./start.sh",
        f"bash -lc '{START} --learning_rate 3e-5'",
        f"srun bash -xc '{START} --learning_rate 3e-5'",
        f"bash -o pipefail -c '{START} --learning_rate 3e-5'",
        f"bash -ceo pipefail -- '{START} --learning_rate $1' name 3e-5",
        f"bash -c -l '{START} --learning_rate 3e-5'",
        "bash -euo pipefail start.sh",
        "bash +x --rcfile other.sh --norc -O extglob start.sh",
    ],
)
def test_only_a_shell_that_starts_a_script_is_one(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "start.sh").write_text(f"{START} --learning_rate 3e-5\n")
    convert_script(tmp_path, command)
    assert load_converted_recipe(tmp_path).train.learning_rate.default == 3e-5


@pytest.mark.parametrize("start", ["bash start.sh 2e-5", "bash -c '. ./start.sh' start 2e-5"])
@pytest.mark.parametrize("text", ["$1", "$@"])
def test_sourced_script_has_arguments_of_its_own(start, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "setup.sh").write_text("RANK=$1\n")
    script = f"source setup.sh 4\n{START} --lora_rank $RANK --learning_rate {text}\n"
    (tmp_path / "start.sh").write_text(script)
    convert_script(tmp_path, start)
    made = load_converted_recipe(tmp_path)
    assert (made.tune.lora.rank, made.train.learning_rate.default) == (4, 2e-5)
    with pytest.raises(UserError, match="ARGUMENTS"):
        convert_script(tmp_path, script)


def test_hash_inside_a_word_starts_no_comment(tmp_path):
    """ms-swift's way to say how many rows of a dataset are taken."""
    script = (
        f"{START.replace('a.jsonl', 'AI-ModelScope/LaTeX_OCR#20 a.jsonl')} --lora_rank 4 # don't"
    )
    done = convert_script(tmp_path, script)
    assert load_converted_recipe(tmp_path).tune.lora.rank == 4
    assert [source.get("limit") for source in done.imports] == [20, None]


def test_config_file_gets_command_variables(tmp_path):
    """ms-swift sets what ENV holds, unless it is set already."""
    (tmp_path / "swift.yaml").write_text(
        "model: Qwen/Qwen2-VL-2B-Instruct\nlearning_rate: 1e-5\n"
        "ENV: {NPROC_PER_NODE: 8, MAX_PIXELS: 50176}\n"
    )
    started = "MAX_PIXELS=100352 swift sft swift.yaml --dataset a.jsonl --batch_size 4"
    convert_script(tmp_path, f"cd {tmp_path}\n{started}\n")
    made = load_converted_recipe(tmp_path)
    assert made.train.batch_size == 4 * 8
    assert made.image.max_pixels == 100_352
    assert made.train.learning_rate.default == 1e-5
