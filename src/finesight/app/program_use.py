"""Use of a served model in a program: code with the example question of a run, and a test of it.

The key of the server is neither in the code nor in the page. It is sent to a browser that asks for
it, and to the server of a test, whose process has reported that it listens at its port.
"""

from __future__ import annotations

import asyncio
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import httpx2

from finesight.app.jobs import Job
from finesight.app.key_file import load_key_file
from finesight.app.program_question import Content, read_question
from finesight.app.thumbnail import find_samples
from finesight.app.workspace import Workspace
from finesight.errors import UserError, escape_unprintable_json, shorten
from finesight.files.worker_pool import WorkerJobError, WorkerLimitError, WorkerLostError

KEY_MARK = "API_KEY_OF_THE_SERVER"
"""Place of the key in the code, for which the page shows dots."""

MAX_TEST_SECONDS = 120.0
MAX_TEST_TOKENS = 512
MAX_ANSWER_BYTES = 1 << 20
MAX_ANSWER_CHARS = 20_000
MAX_ERROR_CHARS = 500

MAX_PROMPT_CHARS = 2000
"""Maximum number of characters of the question in the code."""

DEFAULT_PROMPT = "Describe the image."


@dataclass(frozen=True, slots=True)
class Snippet:
    """Code of a language, in pieces between which the key is."""

    name: str
    file: str
    pieces: Sequence[str]


def build_default_content(prompt: str) -> Content:
    """Return a question about one image, for a run without a readable sample."""
    image = {"type": "image_url", "image_url": {"url": ""}}
    return [image, {"type": "text", "text": prompt or DEFAULT_PROMPT}]


def read_example_content(workspace: Workspace, run: Path) -> Content | None:
    """Return the first question of a run with images, or None.

    Only images in the workspace are read.
    """
    try:
        file = find_samples(workspace, {"run": str(run)})
        if file is None or not workspace.contains(file):
            return None
        return _read_version(workspace, file, file.stat().st_mtime_ns)
    except (UserError, OSError, WorkerJobError, WorkerLostError):
        return None


@lru_cache(maxsize=8)
def _read_version(workspace: Workspace, file: Path, version: int) -> Content | None:
    """Return the question of a version of a data file.

    Raises WorkerLimitError if reading takes too long, which the next attempt may not.
    """
    try:
        content: Content = workspace.run_job(read_question, workspace.folder, file)
    except WorkerLimitError:
        raise
    except UserError:
        return None
    return content


def list_image_names(content: Content) -> list[str]:
    """Return the file names of the images of a question in the code."""
    num_images = sum(part["type"] == "image_url" for part in content)
    if num_images == 1:
        return ["photo.jpg"]
    return [f"photo-{number}.jpg" for number in range(1, num_images + 1)]


def list_snippets(address: str, model: str, content: Content, *, has_key: bool) -> list[Snippet]:
    """Return programs that ask a question about files of images.

    The question may come from data of another person. It is quoted, and characters that could
    reorder the code are escaped.

    Args:
        content: Question, whose images are replaced by names of files.
    """
    files = list_image_names(content)
    names = iter(files)
    parts: Content = []
    for part in content:
        if part["type"] == "image_url":
            parts.append({"type": "image_url", "image_url": {"url": f"\0{next(names)}\0"}})
        else:
            text = shorten(part["text"].replace("\0", ""), MAX_PROMPT_CHARS)
            parts.append({"type": "text", "text": text})
    key = "no-key"
    if has_key:
        key = KEY_MARK
    writers = {
        ("Python", "ask.py"): _write_python,
        ("JavaScript", "ask.mjs"): _write_javascript,
        ("curl", ""): _write_curl,
    }
    snippets: list[Snippet] = []
    for (name, file), write in writers.items():
        code = write(address, model, parts, files, key)
        # Without a key, the code does not have its mark.
        snippets.append(Snippet(name, file, code.split(KEY_MARK)))
    return snippets


def _format_json(value: object, indent: int | None = None) -> str:
    """Return JSON that is also code of Python and JavaScript: it has only texts."""
    # The question must not contain the mark of the key.
    text = json.dumps(value, ensure_ascii=False, indent=indent).replace(
        KEY_MARK, KEY_MARK.replace("_", "\\u005f")
    )
    return escape_unprintable_json(text)


_IMAGE_MARK = re.compile(r'"\\u0000([\w.-]+)\\u0000"')


def _format_content(parts: Content, function: str, margin: str) -> str:
    """Return the parts of a question, one a line, as code that reads the images."""
    lines = [f"{margin}{_format_json(part)},\n" for part in parts]
    return _IMAGE_MARK.sub(rf'{function}("\1")', "".join(lines))


def _write_python(address: str, model: str, parts: Content, files: Sequence[str], key: str) -> str:
    content = _format_content(parts, "read_image", " " * 8)
    return f'''\
import base64

from openai import OpenAI  # pip install openai


def read_image(path):
    with open(path, "rb") as file:
        return "data:image/jpeg;base64," + base64.b64encode(file.read()).decode()


client = OpenAI(base_url="{address}", api_key="{key}")
answer = client.chat.completions.create(
    model={_format_json(model)},
    messages=[{{"role": "user", "content": [
{content}    ]}}],
)
print(answer.choices[0].message.content)
'''


def _write_javascript(
    address: str, model: str, parts: Content, files: Sequence[str], key: str
) -> str:
    content = _format_content(parts, "await readImage", " " * 6)
    return f'''\
import {{ readFile }} from "node:fs/promises"; // Node.js 18 or later

const readImage = async (path) =>
  "data:image/jpeg;base64," + (await readFile(path)).toString("base64");

const response = await fetch("{address}/chat/completions", {{
  method: "POST",
  headers: {{ "Content-Type": "application/json", Authorization: "Bearer {key}" }},
  body: JSON.stringify({{
    model: {_format_json(model)},
    messages: [{{ role: "user", content: [
{content}    ]}}],
  }}),
}});
const answer = await response.json();
console.log(answer.choices?.[0].message.content ?? answer);
'''


def _write_curl(address: str, model: str, parts: Content, files: Sequence[str], key: str) -> str:
    body = _format_json({"model": model, "messages": [{"role": "user", "content": parts}]})
    lines: list[str] = []
    for file in files:
        start, body = body.split(f"\\u0000{file}\\u0000", 1)
        lines.append(f"printf %s {shlex.quote(start + 'data:image/jpeg;base64,')}")
        lines.append(f"base64 < {file} | tr -d '\\n'")
    lines.append(f"printf %s {shlex.quote(body)}")
    # An image exceeds the maximum length of an argument.
    return (
        "("
        + "\n  ".join(f"{line};" for line in lines)
        + f") |\ncurl {address}/chat/completions \\\n"
        + f'  -H "Authorization: Bearer {key}" \\\n'
        + '  -H "Content-Type: application/json" -d @-\n'
    )


def read_key(job: Job) -> str:
    """Return the key of a running server of the studio.

    A workspace may be from another person, so the file is never one that a job names.

    Raises:
        UserError: The command is no running server, has no key, or has another one.
    """
    _read_models(job)
    if "--key-file" not in job.arguments:
        raise UserError("the server has no key", where="job", remedy="no key is needed")
    file = load_key_file()
    words = (*job.arguments, "")
    if words[words.index("--key-file") + 1] != str(file):
        raise UserError(
            "the server has a key of its own",
            where="job",
            expected=f"a server with the key in {file.name}",
            remedy="stop the server, and start it again on this page",
        )
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            return line.strip()
    raise UserError(
        f"{file.name} has no key", where=str(file), remedy="delete it, and start the server again"
    )


def _read_models(job: Job) -> list[str]:
    models = job.read_model_names()
    if not models:
        raise UserError(
            "the server is not running",
            where="job",
            expected="a server that has loaded its model",
            remedy="start the server, or wait until it is ready",
        )
    return models


async def ask_server(job: Job, content: Content) -> str:
    """Ask the model of a running server a question, and return its answer.

    Raises:
        UserError: The server is not running, refuses the request, or does not answer in time.
    """
    model = _read_models(job)[0]
    headers: dict[str, str] = {}
    if "--key-file" in job.arguments:
        headers["authorization"] = f"Bearer {read_key(job)}"
    body = {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": MAX_TEST_TOKENS,
    }
    try:
        # Neither a proxy of the environment nor another address may get the key.
        async with (
            asyncio.timeout(MAX_TEST_SECONDS),
            httpx2.AsyncClient(trust_env=False, timeout=MAX_TEST_SECONDS) as client,
            client.stream(
                "POST", f"{job.address}/chat/completions", json=body, headers=headers
            ) as response,
        ):
            received = b""
            async for chunk in response.aiter_bytes():
                received += chunk
                if len(received) > MAX_ANSWER_BYTES:
                    break
    except (httpx2.HTTPError, TimeoutError) as error:
        raise UserError(
            f"the server does not answer ({type(error).__name__})",
            where="job",
            expected="an answer within two minutes",
            remedy="see its log under “Details”",
        ) from error
    return _parse_answer(received)


def _parse_answer(received: bytes) -> str:
    """Return the text of an answer. Raises UserError for a message of an error."""
    message = "the reply of the server has no answer"
    try:
        reply: Any = json.loads(received)
        if isinstance(reply, Mapping) and "error" in reply:
            message = shorten(str(reply["error"]["message"]), MAX_ERROR_CHARS)
        else:
            text = reply["choices"][0]["message"]["content"]
            return shorten(str(text), MAX_ANSWER_CHARS).encode(errors="replace").decode()
    except (ValueError, LookupError, TypeError, RecursionError):
        pass
    raise UserError(
        message, where="job", expected="an answer", remedy="see its log under “Details”"
    )
