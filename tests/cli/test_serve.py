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
from openai import OpenAI

from finesight.infer import model_loader
from finesight.infer.model_loader import get_model_name
from finesight.model.vlm import VisionLanguageModel
from finesight.model_folder import TINY_MODEL_FOLDER, ModelFolder
from finesight.serve import api_server
from finesight.settings.manifest import PromptTemplate

KEY = "a-key-of-this-test-0123456789"
ENDLESS = {"type": "array", "items": {"type": "integer"}, "minItems": 9999}
PLAIN_DECODER = SimpleNamespace(linear_attention=None)
LINEAR_DECODER = SimpleNamespace(
    linear_attention=SimpleNamespace(
        conv_kernel_size=4, conv_size=1024, num_value_heads=16, key_head_dim=128, value_head_dim=128
    ),
    num_layers=28,
    num_full_attention_layers=7,
    num_kv_heads=2,
    head_dim=256,
)


class FakeModel(VisionLanguageModel):
    """Native model without weights."""

    def __init__(self):
        torch.nn.Module.__init__(self)


@pytest.fixture
def serve_fake(monkeypatch, cli):
    """Serve a fake model: a function that returns the output and the limits of the server."""

    def serve(run, *options, decoder=PLAIN_DECODER, device="cpu", key="", templates=()):
        monkeypatch.setenv("FINESIGHT_KEY", key)
        limits = [None]

        def run_server(model, listener, *, on_ready, **options):
            listener.close()
            limits.append(options["limits"])
            on_ready(SimpleNamespace(model_names=(*model.adapters, "base")), lambda: None)

        weight = SimpleNamespace(dtype=torch.bfloat16, device=torch.device(device))
        model = FakeModel()
        object.__setattr__(
            model, "model", SimpleNamespace(embed_tokens=SimpleNamespace(weight=weight))
        )
        object.__setattr__(model, "config", SimpleNamespace(decoder=decoder))
        names = {get_model_name(run): None}
        manifest = SimpleNamespace(prompts=(), prompt_templates=templates)
        folder = ModelFolder(TINY_MODEL_FOLDER)
        loaded = SimpleNamespace(manifest=manifest, adapters=names, model=model, folder=folder)
        for name in ("load_multi_adapter_model", "resolve_model_source"):
            monkeypatch.setattr(model_loader, name, lambda *arguments, **options: loaded)
        monkeypatch.setattr(api_server, "run_api_server", run_server)
        return cli("serve", run, *options, "--port", "0"), limits[-1]

    return serve


@pytest.mark.parametrize(
    ("free_gb", "options", "num_seqs"),
    [(80, (), 64), (1, (), 6), (0.01, (), 1), (1, ("--max-num-seqs", "64"), 64)],
)
def test_default_number_of_sequences_fits_into_gpu_memory(
    serve_fake, monkeypatch, free_gb, options, num_seqs
):
    """States take 22 MB per sequence, its KV cache 73 MB, and both 60 % of the free memory."""
    free_bytes = int(free_gb * 1e9), int(80e9)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: free_bytes)
    printed, limits = serve_fake("run", *options, decoder=LINEAR_DECODER, device="cuda")
    assert limits.max_num_seqs == num_seqs
    text = f"at most {num_seqs} answers at the same time instead of 64"
    assert (text in printed.err) == (num_seqs < 64)


def test_several_gpus_are_a_step_of_export(cli):
    """The error names the command of the programs that serve a model on several GPUs."""
    error = cli("serve", "finesight-tiny", "--data-parallel-size", "2", code=2).err
    remedy = error.partition("remedy: use finesight ")[2].split()
    command = [word.replace("RUN", "finesight-tiny") for word in remedy]
    printed = cli(*command).text
    assert "--data-parallel-size 2" in printed
    assert "--dp-size 2" in printed


@pytest.mark.parametrize(
    "template", [None, "{question}\n<image>", "A <image> B <image> {question}"]
)
def test_example_request_of_a_run_has_its_images_and_prompt(
    tmp_path, monkeypatch, serve_fake, template
):
    """The shell command sends a valid request; quotes and backslashes of the prompt survive.

    Images and text have the order of the training samples.
    """
    monkeypatch.chdir(tmp_path)
    num_images, templates = 1, ()
    if template is not None:
        num_images = template.count("<image>")
        numbers = {"min_images": num_images, "max_images": num_images}
        templates = (PromptTemplate(template=template, **numbers, share=1.0),)
    names = [f"my image {number}.png" for number in range(num_images)]
    for number, name in enumerate(names):
        Path(name).write_bytes(b"\x89PNG" + bytes([number]) * 200)
    predictions = Path("first/run/predictions/after.jsonl")
    predictions.parent.mkdir(parents=True)
    prompt = r"Write $x' of $(image) as \LaTeX: `$(image)` %s."
    paths = [f"first/../{name}" for name in names]
    written = (template or "<image>{question}").replace("{question}", prompt)
    record = {"image": paths if num_images > 1 else paths[0], "question": written}
    predictions.write_text(json.dumps(record) + "\n")
    Path("my keys.txt").write_text(f"# server\n\n{KEY}\n")
    options = "first/run", "--key-file", "my keys.txt"
    lines = serve_fake(*options, templates=templates)[0].text.splitlines()
    assert lines[0].startswith("serving first, base at ")
    sender, _, curl = lines[1].strip().rpartition(" | ")
    assert curl.startswith("curl http://127.0.0.1:")

    def run_shell(command: str) -> str:
        return subprocess.run(["sh", "-c", command], capture_output=True, text=True).stdout

    header = re.findall('-H (".*?") ', curl)[0]
    assert run_shell(f"printf %s {header}") == f"Authorization: Bearer {KEY}"
    body = json.loads(run_shell(sender))
    assert body["model"] == "first"
    found = ""
    for part in body["messages"][0]["content"]:
        if part["type"] == "text":
            found += part["text"]
        else:
            found += "<image>"
            content = base64.b64encode(Path(names.pop(0)).read_bytes()).decode()
            assert part["image_url"]["url"] == f"data:image/png;base64,{content}"
    assert (found, names) == (written, [])


def test_sigterm_finishes_running_requests_and_exits_with_0(tmp_path):
    command = [sys.executable, "-m", "finesight", "serve", "finesight-tiny", "--port", "0"]
    variables = {"PYTHONUNBUFFERED": "1", "FINESIGHT_KEY": KEY, "TMPDIR": str(tmp_path)}
    program = subprocess.Popen(
        [*command, "--device", "cpu"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | variables,
    )
    try:
        first, second = program.stdout.readline(), program.stdout.readline()
        assert first.startswith("serving finesight-tiny at http://127.0.0.1:"), first
        address = first.split()[-1]
        assert second.strip().startswith(f"curl {address}/chat/completions"), second
        schema = {"name": "numbers", "schema": ENDLESS}
        stream = OpenAI(base_url=address, api_key=KEY, max_retries=0).chat.completions
        chunks = iter(
            stream.create(
                model="finesight-tiny",
                messages=[{"role": "user", "content": "Count."}],
                max_tokens=100,
                response_format={"type": "json_schema", "json_schema": schema},
                stream=True,
            )
        )
        next(chunks)
        (folder,) = tmp_path.glob("finesight-serve-*")
        assert folder.stat().st_mode & 0o777 == 0o700
        program.send_signal(signal.SIGTERM)
        assert list(chunks)[-1].choices[0].finish_reason == "length"
        assert program.wait(30) == 0
    finally:
        program.kill()
    output, errors = program.communicate()
    assert KEY not in output
    assert errors == ""
    assert not list(tmp_path.glob("finesight-serve-*")), "temporary files of requests"


def test_invalid_servers_are_rejected(tmp_path, monkeypatch, cli):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FINESIGHT_KEY", raising=False)
    tiny = ("serve", "finesight-tiny", "--port", "0", "--device", "cpu")
    # A mistyped run is reported before a port in use.
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert "no folder" in cli("serve", "./mistyped", "--port", port, code=2).err
    assert "there is no API key" in cli(*tiny, "--host", "0.0.0.0", code=2).err
    assert "cannot be read" in cli(*tiny, "--key-file", "missing", code=2).err
    assert "error: thinking: " in cli(*tiny, "--thinking", code=2).err
    error = cli(*tiny, "--reasoning-effort", "low", code=2).err
    assert "error: reasoning_effort: " in error
    for name in [name for name in sys.modules if name.startswith("finesight.serve")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "finesight[serve]" in cli(*tiny, code=2).err
