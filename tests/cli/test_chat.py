import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from case_files import load_cases
from click.testing import CliRunner
from service_fixture import write_shape_image
from tiny_task import ANSWER, THOUGHT

from finesight.cli.app import app
from finesight.cli.chat import COMMAND_HELP
from finesight.errors import UserError
from finesight.infer import engine
from finesight.infer.engine import Engine
from finesight.samples.sample import ImagePart, read_samples
from finesight.vision.image_processing import load_image

CASES = load_cases("chat")


@pytest.fixture(scope="module")
def image_question(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    return write_shape_image(tmp_path_factory.mktemp("images with blanks"), 0)


def run_chat(*lines, model="finesight-tiny", options=()):
    """Return the printed lines; an error message is the last line."""
    typed = "".join(f"{line}\n" for line in lines)
    command = ["chat", str(model), "--device", "cpu", "--precision", "fp32", *options]
    result = CliRunner().invoke(app, command, input=typed)
    if isinstance(result.exception, UserError):
        return [*result.stdout.splitlines(), str(result.exception)]
    assert result.exit_code == 0, result.output
    return result.stdout.splitlines()


def test_session_with_images_is_drawn_saved_and_undone(image_question, tmp_path):
    path, question = image_question
    drawn, saved = tmp_path / "drawn.png", tmp_path / "chat.jsonl"
    commands = [f"/box {drawn}", "Why?", "/undo", f"/save {saved}", "/again", "/new", "/undo"]
    lines = run_chat(f"/image {path}", question, *commands, "/help", "/quit", "never asked")
    width, height = load_image(path).size
    assert lines[0] == f"{path}: {width} x {height}, attached to the next question"
    assert lines[2].startswith("  box "), lines[:4]
    assert lines[2].endswith("hollow gray hexagon")
    assert load_image(drawn).tobytes() != load_image(path).tobytes()
    assert "removed: Why?" in lines
    assert lines.count(lines[1]) == 2, "at temperature 0 the same question has the same answer"
    assert "nothing to undo" in lines
    printed = [line for line in lines if line.partition(" ")[0] in COMMAND_HELP]
    assert len(printed) == len(COMMAND_HELP)
    assert lines[-1].startswith("/quit")
    [sample] = read_samples(saved)
    images = [part.image for part in sample.iter_parts() if isinstance(part, ImagePart)]
    assert (images, len(sample.messages)) == ([str(path)], 2)


@pytest.mark.parametrize(("line", "output"), CASES["test_script_ends_at_first_error"])
def test_script_ends_at_first_error(line, output, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert output in run_chat(line, "never asked")[-1]


def test_chat_allocates_one_sequence(monkeypatch):
    """More sequences would take memory of linear attention states from the KV cache."""
    sizes = []

    class RecordedEngine(Engine):
        def __init__(self, *args: Any, max_num_seqs: int, **options: Any) -> None:
            sizes.append(max_num_seqs)
            super().__init__(*args, max_num_seqs=max_num_seqs, **options)

    monkeypatch.setattr(engine, "Engine", RecordedEngine)
    run_chat("/quit")
    assert sizes == [1]


def test_ctrl_c_cancels_reply_but_not_session():
    command = [sys.executable, "-m", "finesight", "chat", "finesight-tiny", "--device", "cpu"]
    command += ["--max-new-tokens", "900", "--temperature", "90", "--seed", "1"]
    pipe = subprocess.PIPE
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment) as chat:
        chat.stdin.write(b"Tell me everything.\n")
        chat.stdin.flush()
        assert chat.stdout.read(1), "no answer has begun"
        chat.send_signal(signal.SIGINT)
        output, complaints = chat.communicate(b"/undo\n/quit\n", timeout=120)
    assert chat.returncode == 0, complaints
    lines = output.decode().splitlines()
    assert lines[-2].endswith("[stopped]")
    assert lines[-1] == "removed: Tell me everything."


def test_reasoning_is_printed_before_the_answer(thinking_run):
    lines = run_chat("Which colour?", model=thinking_run)
    assert "\n".join(lines) == f"{THOUGHT}\n\n{ANSWER}"
    assert run_chat("Which colour?", model=thinking_run, options=["--no-thinking"]) == [ANSWER]
