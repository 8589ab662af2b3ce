"""Convert models to GGUF files for llama.cpp, with the converter of llama.cpp.

One file contains the language model, the other the vision encoder and merger. The user installs the
converter (convert_hf_to_gguf.py with its requirements). It runs offline in a child process that
receives only a few environment variables, such as PATH, and no tokens.
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
from finesight.infer.model_loader import ModelSource
from finesight.model.weights_io import stored_precision
from finesight.storage import raise_if_exists, require_free_space, write_folder

GgufType = Literal["auto", "f32", "f16", "bf16", "q8_0"]

CONVERTER_SCRIPT = "convert_hf_to_gguf.py"
GGUF_MODEL_FILE, MMPROJ_FILE = "model.gguf", "mmproj.gguf"

SUPPORTED_FAMILIES = (
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
    "qwen3_5",
    "qwen3_5_moe",
)
"""Families that the converter supports; Qwen3.5 since llama.cpp pull request 19468.

It does not support the vision encoder of Qwen-VL (2023).
"""

_PASSED_VARIABLES = (
    "PATH",
    "HOME",
    "LANG",
    "LC_ALL",
    "TMPDIR",
    "TEMP",
    "SYSTEMROOT",
    "LD_LIBRARY_PATH",
)
_NUM_ERROR_LINES = 5


@dataclass(frozen=True, slots=True)
class GgufFiles:
    """Paths of the GGUF files, for the options `--model` and `--mmproj` of llama.cpp."""

    model: Path
    mmproj: Path


def find_converter(path: Path | None) -> Path:
    """Return the path of the converter, by default the one in PATH.

    Raises UserError if it does not exist.
    """
    converter = path if path is not None else shutil.which(CONVERTER_SCRIPT)
    if converter is None or not Path(converter).is_file():
        raise UserError(
            f"{converter} does not exist" if converter else f"{CONVERTER_SCRIPT} is not in PATH",
            where="--converter",
            expected=f"{CONVERTER_SCRIPT} of llama.cpp, which creates GGUF files",
            remedy="git clone https://github.com/ggml-org/llama.cpp, install its"
            " requirements/requirements-convert_hf_to_gguf.txt in a separate environment,"
            f" and set --converter llama.cpp/{CONVERTER_SCRIPT} (and --python to the"
            " Python of that environment)",
        )
    return Path(converter).resolve()


def write_gguf(
    model_source: ModelSource,
    out: Path,
    converter: Path,
    outtype: GgufType = "auto",
    python: Path | None = None,
) -> GgufFiles:
    """Convert a model to GGUF files of the language model and of the vision encoder.

    Args:
        outtype: Data type of the language model. Vision encoder and merger have at least 16 bits,
            since fewer bits degrade the image features.

    Raises UserError for an adapter, an existing `out`, an unsupported family, too little disk
    space, and a failing converter. No files remain then.
    """
    folder = model_source.folder
    if (
        model_source.adapter is not None
        or model_source.quantization_summary
        or folder.family not in SUPPORTED_FAMILIES
    ):
        raise UserError(
            f"{folder.path.name} is of the family {folder.family}"
            + (", with an adapter" if model_source.adapter is not None else ""),
            where="finesight export",
            expected=f"a merged model of the families {', '.join(SUPPORTED_FAMILIES)}",
            remedy="merge the adapter first: finesight merge RUN OUT",
        )
    raise_if_exists(out)
    weight_files = folder.weight_files()
    size_factor = 2 if outtype == "f32" and stored_precision(folder) != "fp32" else 1
    require_free_space(
        out,
        size_factor * sum(file.stat().st_size for file in weight_files),
        "the GGUF files",
        "free some space, or choose another output folder",
    )
    mmproj_outtype: GgufType = "f16" if outtype == "q8_0" else outtype
    command = [str(python or sys.executable), str(converter), str(folder.path.resolve())]
    with write_folder(out) as partial:
        _run_converter(
            [*command, "--outfile", str(partial / GGUF_MODEL_FILE), "--outtype", outtype], converter
        )
        options = ["--outfile", str(partial / MMPROJ_FILE), "--outtype", mmproj_outtype, "--mmproj"]
        _run_converter([*command, *options], converter)
        # The converter adds a prefix to the file name.
        prefixed = partial / f"mmproj-{MMPROJ_FILE}"
        if prefixed.is_file():
            prefixed.rename(partial / MMPROJ_FILE)
        written_names = sorted(path.name for path in partial.iterdir())
        if written_names != sorted((GGUF_MODEL_FILE, MMPROJ_FILE)):
            raise UserError(
                f"the converter wrote {', '.join(written_names) or 'no files'}",
                where=str(converter),
                expected=f"{GGUF_MODEL_FILE} and {MMPROJ_FILE}",
                remedy="use another version of llama.cpp",
            )
        for name in written_names:
            _check_magic(partial / name, converter)
    return GgufFiles(out / GGUF_MODEL_FILE, out / MMPROJ_FILE)


def _run_converter(command: list[str], converter: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key in _PASSED_VARIABLES}
    offline_variables = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    completed = subprocess.run(
        command,
        env=environment | offline_variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    if completed.returncode != 0:
        last_lines = " / ".join(completed.stdout.strip().splitlines()[-_NUM_ERROR_LINES:])
        raise UserError(
            f"the converter failed with exit code {completed.returncode}: {last_lines[-600:]}",
            where=str(converter),
            expected="a converter of llama.cpp that supports the family, and its packages",
            remedy="install its requirements, set --python to the environment with them, or use"
            " a newer llama.cpp",
        )


def _check_magic(path: Path, converter: Path) -> None:
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise UserError(
            f"{path.name} starts with {magic!r}",
            where=str(converter),
            expected="a GGUF file",
            remedy="use another version of llama.cpp",
        )
