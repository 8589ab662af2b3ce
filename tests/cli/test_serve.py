from __future__ import annotations

import base64
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer
from click.testing import Result
from openai import OpenAI
from typer.testing import CliRunner

from finesight.cli.servers import serve
from finesight.errors import UserError
from finesight.infer import model_loader
from finesight.infer.model_loader import get_model_name
from finesight.manifest import read_example
from finesight.serve import api_server

KEY = "a-key-of-this-test-0123456789"
ENDLESS = {
    "name": "numbers",
    "schema": {"type": "array", "items": {"type": "integer"}, "minItems": 9999},
}


def run_serve(*arguments: object) -> Result:
    app = typer.Typer()
    app.command()(serve)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def start_server(*arguments: str, **environment: str) -> tuple[subprocess.Popen[str], str]:
    """Start the server as a subprocess. Yields it with its URL."""
    command = [sys.executable, "-m", "finesight", "serve", "finesight-tiny", "--port", "0"]
    program = subprocess.Popen(
        [*command, "--device", "cpu", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
    )
    first, second = program.stdout.readline(), program.stdout.readline()
    assert first.startswith("serving finesight-tiny at http://127.0.0.1:"), first
    address = first.split()[-1]
    assert second.strip().startswith(f"curl {address}/chat/completions"), second
    return program, address


def test_mistyped_run_is_reported_before_a_port_in_use(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        error = run_serve("./mistyped", "--port", taken.getsockname()[1]).exception
    assert isinstance(error, UserError)
    assert "no folder" in error.what


def test_name_of_a_checkpoint_starts_with_that_of_its_run() -> None:
    names = [get_model_name(f"{run}/checkpoints/step-40") for run in ("runs/a", "b/run")]
    assert names == ["a-step-40", "b-step-40"]


def test_example_of_several_images_is_the_first(tmp_path: Path) -> None:
    (tmp_path / "predictions").mkdir()
    line = {"image": ["a.png", "b.png"], "prompt": "Compare."}
    (tmp_path / "predictions" / "after.jsonl").write_text(json.dumps(line) + "\n")
    assert read_example(tmp_path) == ("a.png", "Compare.")


@pytest.fixture
def run_fake_server(monkeypatch):
    """Serve a fake model: a function that returns the result and the limits of the server."""

    def run(*arguments, model=None):
        limits = []

        def run_server(model, listener, *, on_ready, **options):
            listener.close()
            limits.append(options["limits"])
            on_ready(SimpleNamespace(model_names=(*model.adapters, "base")))

        names = {get_model_name(str(arguments[0])): None}
        loaded = SimpleNamespace(manifest="of a run", adapters=names, model=model)
        for name in ("load_multi_adapter_model", "resolve_model_source"):
            monkeypatch.setattr(model_loader, name, lambda *arguments: loaded)
        monkeypatch.setattr(api_server, "run_api_server", run_server)
        result = run_serve(*arguments, "--port", "0")
        assert result.exit_code == 0, result.exception
        return result, limits[0]

    return run


@pytest.mark.parametrize(
    ("free_gb", "options", "num_seqs"),
    [(80, (), 64), (1, (), 6), (0.01, (), 1), (1, ("--max-num-seqs", "64"), 64)],
)
def test_default_number_of_sequences_fits_into_gpu_memory(
    run_fake_server, monkeypatch, free_gb, options, num_seqs
):
    """States take 22 MB per sequence, its KV cache 73 MB, and both 60 % of the free memory."""
    weight = SimpleNamespace(dtype=torch.bfloat16, device=torch.device("cuda"))
    linear = SimpleNamespace(
        conv_kernel_size=4, conv_size=1024, num_value_heads=16, key_head_dim=128, value_head_dim=128
    )
    decoder = SimpleNamespace(
        linear_attention=linear,
        num_layers=28,
        num_full_attention_layers=7,
        num_kv_heads=2,
        head_dim=256,
    )
    model = SimpleNamespace(
        model=SimpleNamespace(embed_tokens=SimpleNamespace(weight=weight)),
        config=SimpleNamespace(decoder=decoder),
    )
    free_bytes = int(free_gb * 1e9), int(80e9)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: free_bytes)
    result, limits = run_fake_server("run", *options, model=model)
    assert limits.max_num_seqs == num_seqs
    text = f"at most {num_seqs} answers at the same time instead of 64"
    assert (text in result.stderr) == (num_seqs < 64)


def test_example_request_of_a_run_has_its_image_and_prompt(tmp_path, monkeypatch, run_fake_server):
    """The shell command sends a valid request; quotes and backslashes of the prompt survive."""
    monkeypatch.chdir(tmp_path)
    Path("my image.png").write_bytes(b"\x89PNG" + bytes(200))
    predictions = Path("first/run/predictions/after.jsonl")
    predictions.parent.mkdir(parents=True)
    prompt = r"Write $x' of $(image) as \LaTeX: `$(image)` %s."
    predictions.write_text(json.dumps({"image": "first/../my image.png", "prompt": prompt}) + "\n")
    Path("my keys.txt").write_text(f"# server\n\n{KEY}\n")
    model = SimpleNamespace(
        model=SimpleNamespace(embed_tokens=torch.nn.Embedding(1, 1)),
        config=SimpleNamespace(decoder=SimpleNamespace(linear_attention=None)),
    )
    output = run_fake_server("first/run", "--key-file", "my keys.txt", model=model)[0].output
    assert output.startswith("serving first, base at ")
    sender, _, curl = output.splitlines()[1].strip().rpartition(" | ")
    assert curl.startswith("curl http://127.0.0.1:")
    header = re.findall('-H (".*?") ', curl)[0]
    command = ["sh", "-c", f"printf %s {header}"]
    assert subprocess.run(command, capture_output=True).stdout.decode() == (
        f"Authorization: Bearer {KEY}"
    )
    body = json.loads(subprocess.run(["sh", "-c", sender], capture_output=True).stdout)
    image, text = body["messages"][0]["content"]
    assert (body["model"], text["text"]) == ("first", prompt)
    content = base64.b64encode(Path("my image.png").read_bytes()).decode()
    assert image["image_url"]["url"] == f"data:image/png;base64,{content}"


@pytest.mark.parametrize(("number", "key"), [(signal.SIGTERM, KEY), (signal.SIGINT, "")])
def test_sigterm_finishes_running_requests_and_exits_with_0(number, key, tmp_path):
    """Without a key, a server on loopback accepts any."""
    program, address = start_server(FINESIGHT_KEY=key, TMPDIR=str(tmp_path))
    try:
        client = OpenAI(base_url=address, api_key=key or "none", max_retries=0)
        stream = client.chat.completions.create(
            model="finesight-tiny",
            messages=[{"role": "user", "content": "Count."}],
            max_tokens=100,
            response_format={"type": "json_schema", "json_schema": ENDLESS},
            stream=True,
        )
        chunks = iter(stream)
        next(chunks)
        (folder,) = tmp_path.glob("finesight-serve-*")
        assert folder.stat().st_mode & 0o777 == 0o700
        program.send_signal(number)
        rest = list(chunks)
        assert rest[-1].choices[0].finish_reason == "length"
        assert program.wait(30) == 0
    finally:
        program.kill()
    printed = program.communicate()
    assert KEY not in "".join(printed)
    assert printed[1] == ""
    # Temporary files of requests are removed with the server.
    assert not list(tmp_path.glob("finesight-serve-*"))


def test_public_host_requires_a_key(monkeypatch):
    monkeypatch.delenv("FINESIGHT_KEY", raising=False)
    result = run_serve("finesight-tiny", "--host", "0.0.0.0", "--port", 0)
    assert isinstance(result.exception, UserError)
    assert "there is no API key" in str(result.exception)


def test_missing_key_file_is_rejected(tmp_path):
    result = run_serve("finesight-tiny", "--key-file", tmp_path / "missing")
    assert isinstance(result.exception, UserError)
    assert "cannot be read" in str(result.exception)


def test_missing_extra_is_reported(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("finesight.serve")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    result = run_serve("finesight-tiny")
    assert isinstance(result.exception, UserError)
    assert "finesight[serve]" in str(result.exception)


def test_unsupported_thinking_mode_is_rejected():
    for options in (("--thinking",), ("--reasoning-effort", "low")):
        result = run_serve("finesight-tiny", "--port", 0, "--device", "cpu", *options)
        assert isinstance(result.exception, UserError), result.output
        assert result.exception.where in ("thinking", "reasoning_effort")
