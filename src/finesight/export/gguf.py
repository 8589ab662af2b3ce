"""GGUF files by llama.cpp's own converter: the language model in one, tower and projector in one.

The converter (convert_hf_to_gguf.py of llama.cpp, with the packages that its requirements name) is
the user's own: it runs as a process of its own, which sees nothing of this one's environment but
where programs lie, and is asked to reach no hub.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from finesight.errors import UserError
from finesight.export.space import check_space
from finesight.infer.load import Parts
from finesight.model.weights import stored_precision
from finesight.storage import refuse_existing, write_folder

Kind = Literal["auto", "f32", "f16", "bf16", "q8_0"]

PROGRAM = "convert_hf_to_gguf.py"
MODEL, PROJECTOR = "model.gguf", "mmproj.gguf"

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
"""What the converter makes both files of; it does not know the first Qwen-VL's tower."""

_KEPT = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "TEMP", "SYSTEMROOT", "LD_LIBRARY_PATH")
_LAST_LINES = 5


@dataclass(frozen=True, slots=True)
class Gguf:
    """The two files that llama.cpp takes as --model and --mmproj."""

    model: Path
    projector: Path


def find_converter(given: Path | None) -> Path:
    """The converter: `given`, or the one on PATH. Raises UserError without one."""
    found = given if given is not None else shutil.which(PROGRAM)
    if found is None or not Path(found).is_file():
        raise UserError(
            f"no file {found}" if found else f"no {PROGRAM} on PATH",
            where="--converter",
            expected=f"{PROGRAM} of llama.cpp, which makes GGUF files",
            remedy="git clone https://github.com/ggml-org/llama.cpp, install its"
            " requirements/requirements-convert_hf_to_gguf.txt in an environment of its own, and"
            f" give --converter llama.cpp/{PROGRAM} (with --python, that environment's)",
        )
    return Path(found).resolve()


def write_gguf(
    parts: Parts, out: Path, converter: Path, kind: Kind = "auto", python: Path | None = None
) -> Gguf:
    """Write both files of what `find_parts` found into the new folder `out`.

    The language model is written in `kind`; the tower and the projector in 16 bits at least, as
    pictures lose more by fewer. Raises UserError for an adapter, an existing `out`, a family that
    the converter does not know, too little room, and a converter that fails: nothing is then left.
    """
    folder = parts.folder
    if parts.adapter is not None or parts.quantised or folder.family not in FAMILIES:
        raise UserError(
            f"{folder.path.name} is of the family {folder.family}"
            + (", with an adapter on it" if parts.adapter is not None else ""),
            where="finesight export",
            expected=f"a whole model of the families {', '.join(FAMILIES)}",
            remedy="merge an adapter before: finesight merge RUN OUT",
        )
    refuse_existing(out)
    weights = folder.weight_files()
    factor = 2 if kind == "f32" and stored_precision(folder) != "fp32" else 1
    check_space(out, factor * sum(file.stat().st_size for file in weights))
    tower: Kind = "f16" if kind == "q8_0" else kind
    program = [str(python or sys.executable), str(converter), str(folder.path.resolve())]
    with write_folder(out) as partial:
        _run([*program, "--outfile", str(partial / MODEL), "--outtype", kind], converter)
        options = ["--outfile", str(partial / PROJECTOR), "--outtype", tower, "--mmproj"]
        _run([*program, *options], converter)
        # The converter puts a prefix before the name that it was given.
        prefixed = partial / f"mmproj-{PROJECTOR}"
        if prefixed.is_file():
            prefixed.rename(partial / PROJECTOR)
        made = sorted(path.name for path in partial.iterdir())
        if made != sorted((MODEL, PROJECTOR)):
            raise UserError(
                f"the converter left {', '.join(made) or 'nothing'}",
                where=str(converter),
                expected=f"{MODEL} and {PROJECTOR}",
                remedy="take another version of llama.cpp",
            )
        for name in made:
            _check(partial / name, converter)
    return Gguf(out / MODEL, out / PROJECTOR)


def _run(command: list[str], converter: Path) -> None:
    own = {key: value for key, value in os.environ.items() if key in _KEPT}
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    done = subprocess.run(
        command,
        env=own | offline,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode != 0:
        last = " / ".join(done.stdout.strip().splitlines()[-_LAST_LINES:])
        raise UserError(
            f"the converter ended with {done.returncode}: {last[-600:]}",
            where=str(converter),
            expected="a converter of llama.cpp that knows the family, and its packages",
            remedy="install its requirements, give the environment that has them with --python, or"
            " take a newer llama.cpp",
        )


def _check(path: Path, converter: Path) -> None:
    with path.open("rb") as file:
        start = file.read(4)
    if start != b"GGUF":
        raise UserError(
            f"{path.name} begins with {start!r}",
            where=str(converter),
            expected="a GGUF file",
            remedy="take another version of llama.cpp",
        )
