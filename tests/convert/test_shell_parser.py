"""Scripts as people write them: what a shell would make of them is what is converted."""

from __future__ import annotations

import pytest
from convert_fixtures import convert_script, load_converted_recipe, notes_by_setting

from finesight.convert import shell_arithmetic
from finesight.errors import UserError

START = "swift sft --model Qwen/Qwen2-VL-2B-Instruct"


def test_arrays_are_expanded(tmp_path):
    script = """
    SETS=(a.jsonl "b c.jsonl")  # two
    more=()
    ARGS=(
        --model Qwen/Qwen2-VL-2B-Instruct   # (a small one)
        --dataset "${SETS[@]}" 'd.jsonl'
    )
    ARGS+=(--lora_rank 32 --val_dataset ${SETS[0]})
    CUDA_VISIBLE_DEVICES= swift sft "${ARGS[@]}" ${more[@]} --lora_alpha 64 | tee log
    """
    done = convert_script(tmp_path, script)
    made = load_converted_recipe(tmp_path)
    assert [file.path.parent.name for file in made.data.train] == ["a", "b-c", "d"]
    assert [file.path.parent.name for file in made.data.eval] == ["a-2"]
    assert (made.tune.lora.rank, made.tune.lora.alpha) == (32, 64.0)
    assert not notes_by_setting(done, "unknown")


@pytest.mark.parametrize(
    ("script", "batch"),
    [
        ("n=4\nNPROC_PER_NODE=$n {} $(expr 32 / $n)", 32),
        ("n=4\nNPROC_PER_NODE=$n {} `expr 32 / $n`", 32),
        ("n=2\nm=2\nNPROC_PER_NODE=$n NNODES=${{m}} {} $((64 / (n * m)))", 64),
        ("NPROC_PER_NODE=2 {} $(expr 4 \\* 2)", 16),
        ("{} ${{STEPS:-3}}", 3),
        (": ${{STEPS:=5}}\n{} $STEPS", 5),
        ('STEPS=7\n{} "${{STEPS:?is missing}}"', 7),
    ],
)
def test_arithmetic_and_default_values(script, batch, tmp_path):
    start = f"{START} --dataset a.jsonl --gradient_accumulation_steps"
    convert_script(tmp_path, script.format(start))
    assert load_converted_recipe(tmp_path).train.batch_size == batch


@pytest.mark.parametrize(
    "text", ["1/0", "9**9**9", "x", "1+", "1.5*2", "(1", "a()", "-1", "1+" * 300 + "1"]
)
def test_invalid_arithmetic_returns_none(text):
    assert shell_arithmetic.evaluate_arithmetic(text) is None


def test_arithmetic_is_evaluated():
    assert shell_arithmetic.mark_arithmetic("$((1 + 2)) $(expr $N / 2) $(date) $((`ls` + 1))") == (
        "${=1+2} ${=N/2} $(date) $((`ls` + 1))"
    )
    assert shell_arithmetic.evaluate_arithmetic("100/[3*8]%5+1") == 100 // 24 % 5 + 1


@pytest.mark.parametrize(
    ("launcher", "processes"),
    [
        ("torchrun --nproc_per_node 4 --nnodes=2", 8),
        ("torchrun --standalone", 1),
        ("NPROC_PER_NODE=8 torchrun --nproc-per-node=2", 2),
        ("python -m torch.distributed.run --nproc-per-node 4 --nnodes 1", 4),
        ("deepspeed --num_gpus 4 --num_nodes 2", 8),
        ("deepspeed --include localhost:0,1,3 --master_port 9901", 3),
        ("accelerate launch --num_processes 6 --num_machines 2", 6),
        ("torchrun --nproc_per_node gpu", None),
        ("torchrun --nproc_per_node $(nvidia-smi -L | wc -l)", None),
        ("deepspeed --hostfile hosts", None),
        ("accelerate launch --config_file fsdp.yaml", None),
    ],
)
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


def test_process_count_from_command_is_reported(tmp_path):
    """However many GPUs there are, ms-swift accumulates up to 16 samples by itself."""
    count = "NPROC_PER_NODE=$(nvidia-smi -L | wc -l)"
    done = convert_script(tmp_path, f"{count} {START} --dataset a.jsonl\n")
    assert load_converted_recipe(tmp_path).train.batch_size == 16
    assert "accumulation to 16" in notes_by_setting(done, "note")["batch"]
    assert "multiply by it" not in notes_by_setting(done, "note")["batch"]
    done = convert_script(tmp_path, f"{count} {START} --dataset a.jsonl --batch_size 8 {_ONCE}")
    assert "multiply by it" in notes_by_setting(done, "note")["batch"]


_ONCE = "--gradient_accumulation_steps 1"


def test_comments_end_with_their_line(tmp_path):
    """A backslash in a comment joins no lines; a comment among joined lines ends them."""
    script = f"""
    # NPROC_PER_NODE=2 \\
    # MAX_PIXELS=50176 \\
    {START} --dataset a.jsonl \\
      # --learning_rate 1e-3 \\
      --lora_rank 32
    """
    done = convert_script(tmp_path, script)
    assert load_converted_recipe(tmp_path).tune.lora.rank == 8
    assert "not a part of the command" in notes_by_setting(done, "unknown")["--lora_rank"]


def test_hash_inside_a_word_starts_no_comment(tmp_path):
    """ms-swift's way to say how many rows of a dataset are taken."""
    script = f"{START} --dataset AI-ModelScope/LaTeX_OCR#20 a.jsonl --lora_rank 4 # don't"
    done = convert_script(tmp_path, script)
    assert load_converted_recipe(tmp_path).tune.lora.rank == 4
    assert [line.split()[-2:] for line in done.import_commands] == [
        ["--limit", "20"],
        ["a.jsonl", "samples/a"],
    ]


def test_quoted_text_is_no_command(tmp_path):
    script = (
        f"cat > note.md <<'EOF' && date\ndon't\nswift sft --model a\nEOF\n{START} --dataset b.jsonl"
    )
    assert convert_script(tmp_path, script).import_commands == (
        "finesight data import b.jsonl samples/b",
    )
    convert_script(tmp_path, f"echo 'a <<b'\n{START} --dataset c.jsonl --lora_rank 4\n")
    assert load_converted_recipe(tmp_path).tune.lora.rank == 4


def test_exponentially_growing_values_are_skipped(tmp_path):
    doubling = "A=$A$A\n" * 60
    convert_script(tmp_path, f"A=aa\n{doubling}{START} --dataset a.jsonl --lora_rank 4\n")
    assert load_converted_recipe(tmp_path).tune.lora.rank == 4


def test_values_known_only_to_caller_are_reported(tmp_path):
    done = convert_script(tmp_path, f'{START} --dataset "$1" --output_dir o "$@"')
    assert set(notes_by_setting(done, "unknown")) == {"dataset", "arguments without an option"}
    made = load_converted_recipe(tmp_path)
    assert str(made.output_dir) == "o"
    left = convert_script(tmp_path, f"{START} --dataset a.jsonl --output_dir out/${{MODEL##*/}}")
    assert set(notes_by_setting(left, "unknown")) == {"output_dir"}


def test_conditions_and_loops_are_reported(tmp_path):
    script = f"""
    if [ "$1" = full ]; then
      KIND=full
    else KIND=lora
    fi
    {START} --dataset a.jsonl --tuner_type $KIND
    """
    done = convert_script(tmp_path, script)
    assert "not evaluated" in notes_by_setting(done, "unknown")["if"]
    assert load_converted_recipe(tmp_path).tune.language == "lora"
    loop = f"for lr in 1e-4 2e-4; do\n{START} --dataset a.jsonl --learning_rate $lr\ndone\n"
    with pytest.raises(UserError, match=r"learning_rate is '\$lr'") as caught:
        convert_script(tmp_path, loop)
    assert caught.value.remedy == "replace learning_rate with its value in a copy of the script"


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
