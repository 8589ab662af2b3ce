"""The lines by which vLLM and SGLang serve a model folder as it was measured.

The flags are those of vLLM's engine arguments (docs.vllm.ai, `vllm serve`) and of SGLang's server
arguments (docs.sglang.io); docs/en/handing-over.md says what each is for.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finesight.config import PictureRule, PixelRange
from finesight.errors import UserError
from finesight.export.files import ARCHITECTURES, missing
from finesight.hub import ModelFolder
from finesight.infer.load import Parts

ROOM = 2048
"""Tokens for a question and its answer beside the largest picture."""

LEAST = 4096
"""Tokens of a context that is asked for, at least, where the model has as many positions."""

REQUEST: dict[str, Any] = {"temperature": 0, "skip_special_tokens": False}
"""What a request says beside its messages: without the second, both engines leave the tokens out
that boxes are written with, and neither has a setting of the server for it."""


@dataclass(frozen=True, slots=True)
class Serving:
    """The two lines, what each request has to say, and what else a caller must know."""

    vllm: str
    sglang: str
    request: str
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        return asdict(self) | {"request": json.loads(self.request)}


def serving_of(parts: Parts, source: str) -> Serving:
    """The lines for what `find_parts` found for `source`. Raises UserError for an adapter, for
    weights in few bits and for a family that these engines do not serve from such a folder."""
    if parts.adapter is not None or parts.quantised:
        raise UserError(
            f"{source} is an adapter on a base",
            where="serving",
            expected="a merged model: vLLM ignores adapters on the vision tower",
            remedy=f"finesight merge {shlex.quote(source)} OUT, then give OUT",
        )
    if parts.folder.family not in ARCHITECTURES:
        raise UserError(
            f"{source} is of the family {parts.folder.family}",
            where="serving",
            expected=f"one of {', '.join(ARCHITECTURES)}",
            remedy="serve it with finesight serve",
        )
    parts.folder.fetch_weights()  # which these engines will look for in it
    manifest = parts.manifest
    rule = manifest.picture if manifest else None
    system = manifest.system if manifest else None
    return lines(parts.folder, str(parts.folder.path), Path(source).name, rule, system)


def lines(
    folder: ModelFolder, path: str, name: str, rule: PictureRule | None, system: str | None
) -> Serving:
    """The lines for a folder that will lie at `path` and be asked for by `name`; `rule` and
    `system` are those of the run."""
    settings = folder.preprocessor
    if isinstance(rule, PixelRange):
        limits = {"min_pixels": rule.min_pixels, "max_pixels": rule.max_pixels}
    else:
        limits = {key: settings[key] for key in ("min_pixels", "max_pixels")}
    length = _length(folder, limits["max_pixels"])
    quoted, common = shlex.quote(path), f"--served-model-name {shlex.quote(name or 'model')}"
    greedy = _json({"temperature": 0})
    return Serving(
        vllm=f"vllm serve {quoted} {common} --max-model-len {length}"
        f" --mm-processor-kwargs {_json(limits)} --override-generation-config {greedy}",
        sglang=f"python -m sglang.launch_server --model-path {quoted} {common}"
        f" --context-length {length} --mm-process-config {_json({'image': limits})}",
        request=json.dumps(REQUEST),
        notes=tuple(_notes(folder, rule, system)),
    )


def _notes(folder: ModelFolder, rule: PictureRule | None, system: str | None) -> list[str]:
    notes = [
        'each request has to say "skip_special_tokens": false (the openai client:'
        " extra_body={'skip_special_tokens': False}), or boxes come without their tokens"
    ]
    if rule is not None and not isinstance(rule, PixelRange):
        sizes = ", ".join(f"{key} {value}" for key, value in rule)
        notes.append(f"these engines know limits of pixels alone: send pictures resized to {sizes}")
    if system is not None and system not in folder.chat_template:
        notes.append(f"begin each talk with the system prompt of the training: {system!r}")
    lacking = missing(folder)
    if lacking:
        notes.append(f"the folder lacks {'; '.join(lacking)}: take them from the base's repository")
    return notes


def _length(folder: ModelFolder, max_pixels: int) -> int:
    """Room for the largest picture and ROOM, a power of two, within the model's positions."""
    settings = folder.preprocessor
    side: int = settings["patch_size"] * settings["merge_size"]
    wanted = max(LEAST, 1 << (max_pixels // side**2 + ROOM - 1).bit_length())
    text = folder.config.get("text_config")
    places = text if isinstance(text, dict) else folder.config
    positions = places.get("max_position_embeddings")
    return min(wanted, positions) if isinstance(positions, int) else wanted


def _json(content: object) -> str:
    return shlex.quote(json.dumps(content))
