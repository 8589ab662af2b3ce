"""Files that are a configuration, and all the others."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import yaml
from converting import FACTORY, SWIFT, from_script, from_settings, recipe_of, told

from finesight.convert import llama_factory_keys, ms_swift_keys
from finesight.convert.converting import convert
from finesight.errors import UserError

START = "swift sft --model Qwen/Qwen2-VL-2B-Instruct --dataset a.jsonl"


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.yaml", "", "no settings by name"),
        ("a.yaml", "- 1\n- 2\n", "no settings by name"),
        ("a.yaml", "a: [1\n", "cannot be read"),
        ("a.json", "{", "cannot be read"),
        ("a.json", "[" * 100_000, "cannot be read"),
        ("a.yaml", "learning_rate: 1\nfoo: 2\n", "no configuration that is known: learning_rate"),
        ("a.yaml", "model: finesight-tiny\ndata: {train: a}\noutput: b\n", "is a recipe already"),
        ("a.sh", "python train.py\n", "no command of ms-swift or LLaMA-Factory"),
        ("a.sh", "swift rlhf --rlhf_type dpo\n", r"preference .* \(DPO"),
        ("a.sh", "megatron sft --model a\n", "by Megatron"),
        ("a.sh", "swift pt --model a\n", "plain text"),
        ("a.sh", "llamafactory-cli export a.yaml\n", "finesight merge"),
        ("a.sh", "swift sft --model 'a\n", "quotation mark"),
        ("a.sh", "llamafactory-cli train missing.yaml\n", "no such file"),
        ("a.sh", "swift sft\n", "no settings"),
    ],
)
def test_other_files_are_refused(name, text, words, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=words):
        convert(tmp_path / name, tmp_path / "recipe.yaml")
    assert not (tmp_path / "recipe.yaml").exists()


def test_files_that_cannot_be_read_are_refused(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"model: \xff\n")
    for source in (tmp_path / "binary.yaml", tmp_path / "none.yaml", tmp_path, Path("/dev/zero")):
        with pytest.raises(UserError):
            convert(source, tmp_path / "recipe.yaml")


def test_a_recipe_is_never_overwritten(tmp_path):
    from_settings(tmp_path, SWIFT)
    before = (tmp_path / "recipe.yaml").read_text()
    with pytest.raises(UserError, match="never overwritten"):
        convert(tmp_path / "a.yaml", tmp_path / "recipe.yaml")
    assert (tmp_path / "recipe.yaml").read_text() == before


def test_a_script_is_read_as_a_shell_reads_it(tmp_path):
    script = f"""#!/bin/bash
    set -e
    # swift sft --model commented-out
    export MAX_PIXELS=$((1280 * 28 * 28)) MIN_PIXELS=50176
    RANK=16
    more="--lora_alpha 64 --lora_dropout 0"
    unused=1
    mkdir -p out && cd out; NPROC_PER_NODE=2 MAX_PIXELS=401408 {START} \\
        --lora_rank $RANK $more --system "Say 'it' --briefly
in two lines" \\
        --learning_rate=${{RATE:-3e-5}} --freeze_vit false \\
        --warmup_steps 5 2>&1 | tee train.log &
    """
    done = from_script(tmp_path, script)
    made = recipe_of(tmp_path)
    lora = made.tune.lora
    assert (lora.rank, lora.alpha, lora.dropout) == (16, 64.0, 0.0)
    assert made.data.system == "Say 'it' --briefly in two lines"
    assert (made.train.learning_rate.default, made.train.warmup) == (3e-5, 5)
    assert (made.picture.min_pixels, made.picture.max_pixels) == (50_176, 401_408)
    assert made.tune.vision == "lora"
    assert "8 accumulated x 2 GPUs" in told(done, "note")["batch"]
    assert not told(done, "unknown")
    assert "unused" not in str(done.remarks)


def test_what_only_a_run_of_the_script_could_tell_is_named(tmp_path):
    done = from_script(tmp_path, f"{START} --output_dir out/$(date +%s) --system $WORDS\n{START}\n")
    unknown = told(done, "unknown")
    assert set(unknown) == {"output_dir", "system", "also in the file"}
    with pytest.raises(UserError, match="MAX_PIXELS"):
        from_script(tmp_path, f"MAX_PIXELS=$(cat size) {START}")
    stray = told(from_script(tmp_path, START.replace("--model", "stray --model")), "unknown")
    assert set(stray) == {"words without an option"}


@pytest.mark.parametrize(
    "start",
    [
        "/opt/bin/swift sft",
        "python -m swift.cli.sft",
        "torchrun --nproc_per_node=2 /opt/swift/cli/sft.py",
        "nohup env A=1 swift sft",
        "for i in 1; do swift sft",
    ],
)
def test_ways_to_start_it(start, tmp_path):
    from_script(tmp_path, START.replace("swift sft", start) + " --gradient_accumulation_steps 3")
    assert recipe_of(tmp_path).train.batch == (6 if "torchrun" in start else 3)


def test_videos_are_told(tmp_path):
    done = from_script(tmp_path, f"FPS_MAX_FRAMES=12 VIDEO_MAX_PIXELS=50176 {START}")
    assert set(told(done, "differs")) == {"FPS_MAX_FRAMES", "VIDEO_MAX_PIXELS"}


VALUES: list[object] = [
    *(None, True, False, 0, 1, -1, 3, 0.5, 1e-5, 1e308, float("nan"), 10**30, 2**40),
    *("", "true", "none", "null", "auto", "all", "lora", "full", "zero3", "1e-4", "a,b", "{", "[]"),
    *("\x1b[31m", "# not a comment", "a: b", "é\n- x", "$X", "../..", "x" * 5000),
    *([], ["a"], [1, None], {}, {"a": 1}, {"zero_optimization": {"stage": []}}, [["a"]]),
]


@pytest.mark.parametrize("program", ["ms-swift", "LLaMA-Factory"])
def test_no_settings_end_in_a_traceback(program, tmp_path, monkeypatch):
    """Each recipe that is written loads, whatever stood there; everything else is refused."""
    monkeypatch.chdir(tmp_path)
    base = SWIFT if program == "ms-swift" else FACTORY
    keys = ms_swift_keys if program == "ms-swift" else llama_factory_keys
    chance = random.Random(7)
    names = [*keys.RULES, *keys.ALIASES, "ENV", "made up", "é"]
    written = 0
    for turn in range(160):
        count = 1 if turn < 110 else chance.randint(2, 6)
        drawn = {name: chance.choice(VALUES) for name in chance.sample(names, count)}
        try:
            done = from_settings(tmp_path, base | drawn)
        except UserError:
            continue
        written += 1
        recipe_of(tmp_path)
        assert yaml.safe_load(done.recipe)
    assert written > 40


def test_no_script_ends_in_a_traceback(tmp_path):
    chance = random.Random(8)
    pieces = [*START.split(), "--lora_rank", "8", "\n", "\\\n", "$X", "$(", ")", "`", "'", '"', ";"]
    pieces += ["|", "&&", "#", ">", "2>&1", "A=1", "${A", "export", "--", "-", "é", "{", "}"]
    for _ in range(100):
        text = f"{START} {' '.join(chance.choices(pieces, k=12))}"
        try:
            from_script(tmp_path, text)
        except UserError:
            continue
        recipe_of(tmp_path)
