"""Scripts with training commands: launchers, comments and configuration files."""

from __future__ import annotations

import pytest
from convert_fixtures import convert_script, load_converted_recipe, notes_by_setting

START = "swift sft --model Qwen/Qwen2-VL-2B-Instruct"


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
