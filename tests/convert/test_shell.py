"""Scripts as people write them: what a shell would make of them is what is converted."""

from __future__ import annotations

import pytest
from converting import from_script, recipe_of, told

from finesight.convert import sums
from finesight.errors import UserError

START = "swift sft --model Qwen/Qwen2-VL-2B-Instruct"


def test_words_in_lists(tmp_path):
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
    done = from_script(tmp_path, script)
    made = recipe_of(tmp_path)
    assert [file.path.parent.name for file in made.data.train] == ["a", "b-c", "d"]
    assert [file.path.parent.name for file in made.data.eval] == ["a-2"]
    assert (made.tune.lora.rank, made.tune.lora.alpha) == (32, 64.0)
    assert not told(done, "unknown")


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
def test_sums_and_values_that_stand_in(script, batch, tmp_path):
    start = f"{START} --dataset a.jsonl --gradient_accumulation_steps"
    from_script(tmp_path, script.format(start))
    assert recipe_of(tmp_path).train.batch == batch


@pytest.mark.parametrize(
    "text", ["1/0", "9**9**9", "x", "1+", "1.5*2", "(1", "a()", "-1", "1+" * 300 + "1"]
)
def test_only_sums_of_whole_numbers_are_worked_out(text):
    assert sums.value(text) is None


def test_sums_are_worked_out():
    assert sums.kept("$((1 + 2)) $(expr $N / 2) $(date) $((`ls` + 1))") == (
        "${=1+2} ${=N/2} $(date) $((`ls` + 1))"
    )
    assert sums.value("100/[3*8]%5+1") == 100 // 24 % 5 + 1


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
def test_launchers_tell_how_many(launcher, processes, program, tmp_path):
    factory = "src" in program
    model = "--do_train --model_name_or_path" if factory else ""
    script = (
        f"{launcher} {program} {model} Qwen/Qwen2-VL-2B-Instruct --dataset a.jsonl"
        " --per_device_train_batch_size 1 --gradient_accumulation_steps 3"
    )
    batch = told(from_script(tmp_path, script), "note")["batch"]
    assert recipe_of(tmp_path).train.batch == 3 * (processes or 1)
    assert ("does not say how many" in batch) == (processes is None)
    assert "is not set" not in batch


def test_processes_that_a_command_counts_are_told(tmp_path):
    """However many GPUs there are, ms-swift accumulates up to 16 samples by itself."""
    count = "NPROC_PER_NODE=$(nvidia-smi -L | wc -l)"
    done = from_script(tmp_path, f"{count} {START} --dataset a.jsonl\n")
    assert recipe_of(tmp_path).train.batch == 16
    assert "up to 16" in told(done, "note")["batch"]
    assert "N times" not in told(done, "note")["batch"]
    done = from_script(tmp_path, f"{count} {START} --dataset a.jsonl --batch_size 8 {_ONCE}")
    assert "N times" in told(done, "note")["batch"]


_ONCE = "--gradient_accumulation_steps 1"


def test_comments_end_with_their_lines(tmp_path):
    """A backslash in a comment joins no lines; a comment among joined lines ends them."""
    script = f"""
    # NPROC_PER_NODE=2 \\
    # MAX_PIXELS=50176 \\
    {START} --dataset a.jsonl \\
      # --learning_rate 1e-3 \\
      --lora_rank 32
    """
    done = from_script(tmp_path, script)
    assert recipe_of(tmp_path).tune.lora.rank == 8
    assert "not a part of the command" in told(done, "unknown")["--lora_rank"]


def test_a_number_sign_within_a_word_begins_no_comment(tmp_path):
    """ms-swift's way to say how many rows of a data set are taken."""
    script = f"{START} --dataset AI-ModelScope/LaTeX_OCR#20 a.jsonl --lora_rank 4 # don't"
    done = from_script(tmp_path, script)
    assert recipe_of(tmp_path).tune.lora.rank == 4
    assert [line.split()[-2:] for line in done.imports] == [
        ["--limit", "20"],
        ["a.jsonl", "samples/a"],
    ]


def test_texts_in_a_script_are_no_commands(tmp_path):
    script = (
        f"cat > note.md <<'EOF' && date\ndon't\nswift sft --model a\nEOF\n{START} --dataset b.jsonl"
    )
    assert from_script(tmp_path, script).imports == ("finesight data import b.jsonl samples/b",)
    from_script(tmp_path, f"echo 'a <<b'\n{START} --dataset c.jsonl --lora_rank 4\n")
    assert recipe_of(tmp_path).tune.lora.rank == 4


def test_values_that_grow_without_end_are_left(tmp_path):
    doubling = "A=$A$A\n" * 60
    from_script(tmp_path, f"A=aa\n{doubling}{START} --dataset a.jsonl --lora_rank 4\n")
    assert recipe_of(tmp_path).tune.lora.rank == 4


def test_what_only_the_caller_knows_is_told(tmp_path):
    done = from_script(tmp_path, f'{START} --dataset "$1" --output_dir o "$@"')
    assert set(told(done, "unknown")) == {"dataset", "words without an option"}
    made = recipe_of(tmp_path)
    assert str(made.output) == "o"
    left = from_script(tmp_path, f"{START} --dataset a.jsonl --output_dir out/${{MODEL##*/}}")
    assert set(told(left, "unknown")) == {"output_dir"}


def test_conditions_and_loops_are_told(tmp_path):
    script = f"""
    if [ "$1" = full ]; then
      KIND=full
    else KIND=lora
    fi
    {START} --dataset a.jsonl --tuner_type $KIND
    """
    done = from_script(tmp_path, script)
    assert "not followed" in told(done, "unknown")["if"]
    assert recipe_of(tmp_path).tune.language == "lora"
    loop = f"for lr in 1e-4 2e-4; do\n{START} --dataset a.jsonl --learning_rate $lr\ndone\n"
    with pytest.raises(UserError, match=r"learning_rate is '\$lr'") as caught:
        from_script(tmp_path, loop)
    assert caught.value.remedy == "write what learning_rate was into a copy"


def test_a_file_beside_the_command_keeps_its_variables(tmp_path):
    """ms-swift sets what ENV holds, unless it is set already."""
    (tmp_path / "swift.yaml").write_text(
        "model: Qwen/Qwen2-VL-2B-Instruct\nlearning_rate: 1e-5\n"
        "ENV: {NPROC_PER_NODE: 8, MAX_PIXELS: 50176}\n"
    )
    started = "MAX_PIXELS=100352 swift sft swift.yaml --dataset a.jsonl --batch_size 4"
    from_script(tmp_path, f"cd {tmp_path}\n{started}\n")
    made = recipe_of(tmp_path)
    assert made.train.batch == 4 * 8
    assert made.picture.max_pixels == 100_352
    assert made.train.learning_rate.default == 1e-5
