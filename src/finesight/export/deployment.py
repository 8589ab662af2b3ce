"""Convert models to GGUF files, and build serving commands of vLLM and SGLang.

One GGUF file contains the language model, the other the vision encoder and merger. The user
installs the converter (convert_hf_to_gguf.py with its requirements). It runs offline in a child
process that receives only a few environment variables, such as PATH, and no tokens.

The commands use the image size, context length and greedy decoding of the evaluation. Options are
those of vLLM's engine arguments (docs.vllm.ai, `vllm serve`), and of SGLang's server arguments and
router (docs.sglang.io); docs/en/export.md explains them.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from finesight.encode.renderer import load_family
from finesight.errors import Step, UserError
from finesight.export.hf_files import (
    find_missing_files,
    require_export_family,
    require_merged_model,
)
from finesight.export.resize_code import (
    describe_image_size,
    describe_resizing,
    format_resize_code,
)
from finesight.family_components import FamilyComponent
from finesight.files.storage import check_new_path, require_free_space, write_folder
from finesight.infer.model_loader import ModelSource, get_model_name
from finesight.model.families import TRANSFORMERS_V5_MAPPING
from finesight.model.lora.peft_io import read_adapter
from finesight.model.weights_io import stored_precision
from finesight.model_folder import ModelFolder
from finesight.samples.example_question import build_placeholder
from finesight.samples.prompt_format import PromptFormat
from finesight.settings.config import ImageRule
from finesight.settings.manifest import Manifest
from finesight.vision.image_processing import get_default_image_rule, load_patch_config
from finesight.vision.processor_limits import get_processor_limits

GgufType = Literal["auto", "f32", "f16", "bf16", "q8_0"]

CONVERTER_SCRIPT = "convert_hf_to_gguf.py"
GGUF_MODEL_FILE = "model.gguf"
MMPROJ_FILE = "mmproj.gguf"

_PASSED_VARIABLES = {
    "PATH",
    "HOME",
    "LANG",
    "LC_ALL",
    "TMPDIR",
    "TEMP",
    "SYSTEMROOT",
    "LD_LIBRARY_PATH",
}
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
        what = f"{CONVERTER_SCRIPT} is not in PATH"
        if converter:
            what = f"{converter} does not exist"
        raise UserError(
            what,
            where="--converter",
            expected=f"{CONVERTER_SCRIPT} of llama.cpp, which creates GGUF files",
            remedy="for an upload, give hf:OWNER/NAME as OUT; for GGUF,"
            " git clone https://github.com/ggml-org/llama.cpp, install its"
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
    *,
    source: str,
) -> GgufFiles:
    """Convert a model to GGUF files of the language model and of the vision encoder.

    Args:
        outtype: Data type of the language model. Vision encoder and merger have at least 16 bits,
            since fewer bits degrade the image features.
        source: Model as the user named it, for messages.

    Raises UserError for an adapter, an existing `out`, an unsupported family, too little disk
    space, and a failing converter. No files remain then.
    """
    folder = model_source.folder
    require_export_family(folder, "gguf", source)
    require_merged_model(model_source, source, "export")
    check_new_path(out)
    weight_files = folder.weight_files()
    size_factor = 1
    if outtype == "f32" and stored_precision(folder) != "fp32":
        size_factor = 2
    require_free_space(
        out,
        size_factor * sum(file.stat().st_size for file in weight_files),
        "the GGUF files",
        "free some space, or choose another output folder",
    )
    mmproj_outtype = outtype
    if outtype == "q8_0":
        mmproj_outtype = "f16"
    command = [str(python or sys.executable), str(converter), str(folder.path.resolve())]
    with write_folder(out) as partial:
        options = ["--outfile", str(partial / GGUF_MODEL_FILE), "--outtype", outtype]
        _run_converter([*command, *options], converter)
        options = ["--outfile", str(partial / MMPROJ_FILE), "--outtype", mmproj_outtype, "--mmproj"]
        _run_converter([*command, *options], converter)
        # The converter adds a prefix to the file name.
        prefixed = partial / f"mmproj-{MMPROJ_FILE}"
        if prefixed.is_file():
            prefixed.rename(partial / MMPROJ_FILE)
        starts: dict[str, bytes] = {}
        for path in sorted(partial.iterdir()):
            with path.open("rb") as file:
                starts[path.name] = file.read(4)
        if starts != dict.fromkeys((GGUF_MODEL_FILE, MMPROJ_FILE), b"GGUF"):
            wrote = ", ".join(f"{name} (starts with {start!r})" for name, start in starts.items())
            raise UserError(
                f"the converter wrote {wrote or 'no files'}",
                where=str(converter),
                expected=f"GGUF files named {GGUF_MODEL_FILE} and {MMPROJ_FILE}",
                remedy="use another version of llama.cpp",
            )
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


RESERVED_TEXT_TOKENS = 2048
"""Number of tokens for question and answer, in addition to those of the largest image."""

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values of vLLM's option --max-lora-rank."""

MIN_CONTEXT_LENGTH = 4096
"""Minimum context length of a server in tokens, if the model supports it."""

REQUEST_PARAMETERS: dict[str, Any] = {"temperature": 0, "skip_special_tokens": False}
"""Parameters that clients must send with each request.

By default, vLLM and SGLang remove special tokens, and with them the boxes, from answers. Neither
has a server option to keep them.
"""


@dataclass(frozen=True, slots=True)
class ServingCommands:
    """Serving commands of vLLM and SGLang, and what clients must do.

    Attributes:
        sglang: Empty for an adapter.
        request: Request parameters as JSON.
        resize_code: Python code with which clients resize images; empty if the servers do it.
    """

    vllm: str
    sglang: str
    request: str
    notes: tuple[str, ...]
    resize_code: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return the commands as JSON data, with the request parameters as an object."""
        return asdict(self) | {"request": json.loads(self.request)}


def build_serving_commands(
    model_source: ModelSource, source: str, num_gpus: int = 1
) -> ServingCommands:
    """Build the serving commands of a model with the settings of its run.

    An adapter of the language model is served on its base by vLLM only.

    Raises UserError for an adapter that vLLM would not apply completely, for quantized weights
    without an adapter, and for a family that vLLM and SGLang do not support.
    """
    folder = model_source.folder
    adapter = model_source.adapter
    require_export_family(folder, "serving", source)
    if adapter is None:
        require_merged_model(model_source, source, "serving")
    name = get_model_name(source)
    lora = None
    if adapter is not None:
        lora = _build_lora_options(folder.family_component, adapter, name, source)
    folder.fetch_weights()  # file names that these engines expect
    commands = format_serving_commands(
        folder, str(folder.path), name, model_source.manifest, lora, num_gpus=num_gpus
    )
    if not model_source.quantization_summary:
        return commands
    note = f"the run used {model_source.quantization_summary}, and vLLM the published weights"
    return replace(commands, notes=(*commands.notes, note))


def _build_lora_options(family: FamilyComponent, adapter: Path, name: str, source: str) -> str:
    """Build the options of vLLM for an adapter. Raises UserError if it must be merged.

    vLLM 0.33 reads the names of transformers 5, and older ones for some families
    (`hf_to_vllm_mapper` of each model). The ranks are those of its `LoRAConfig`.
    """
    spec, _ = read_adapter(adapter)
    visual = [layer for layer in spec.configs if layer.startswith("visual.")]
    rank = max(config.rank for config in spec.configs.values())
    reason = ""
    if visual:
        reason = f"{len(visual)} of {len(spec.configs)} adapted layers are in the vision encoder"
        reason += " or merger, where vLLM applies adapters only with an experimental option"
    elif family.has_experts:
        reason = f"the family {family.name} has experts"
    elif spec.key_mapping != TRANSFORMERS_V5_MAPPING and not family.serves_v4_adapters:
        reason = "its tensors have names that vLLM does not read"
    elif len({config.alpha / config.rank for config in spec.configs.values()}) > 1:
        reason = "its layers have different scales alpha / rank, of which vLLM may use one"
    elif rank > VLLM_RANKS[-1]:
        reason = f"its rank {rank} is above {VLLM_RANKS[-1]}"
    if reason:
        raise UserError(
            f"vLLM cannot serve the adapter {source}: {reason}",
            where="serving",
            expected="an adapter of the language model only, or a merged model",
            remedy=Step("merge", {"source": source, "out": "OUT"}, "merge it, and use OUT"),
        )
    path = str(adapter.resolve())
    module = f"{name}={path}"
    if "," in module or module.count("=") > 1:  # vLLM reads such names as JSON only
        module = json.dumps({"name": name, "path": path})
    max_rank = next(one for one in VLLM_RANKS if one >= rank)
    return f"--enable-lora --lora-modules {shlex.quote(module)} --max-lora-rank {max_rank}"


def format_serving_commands(
    folder: ModelFolder,
    path: str,
    name: str,
    manifest: Manifest | None,
    lora: str | None = None,
    *,
    num_gpus: int = 1,
    code: str = "the code below",
) -> ServingCommands:
    """Format the serving commands of a model folder, with the prompt settings of its run.

    Args:
        lora: Options of vLLM for an adapter named `name` on the model; None without one.
        num_gpus: Number of GPUs, each with a copy of the model.
        code: Where the reader finds the code that resizes images.
    """
    rule = _get_image_rule(folder, manifest)
    factor = load_patch_config(folder).resize_factor
    limits = get_processor_limits(rule, factor)
    pixel_limits = limits.model_dump()
    context_length = _compute_context_length(folder, limits.max_pixels)
    quoted = shlex.quote(path)
    common_options = f"--served-model-name {shlex.quote(name or 'model')}"
    greedy_config: dict[str, float] = {"temperature": 0}
    if lora is not None:
        base_name = "base" if name != "base" else "base-model"
        common_options = f"--served-model-name {base_name} {lora}"
        # Those of Qwen2.5-VL penalize repetitions.
        greedy_config["repetition_penalty"] = 1.0
    arguments = _get_trained_template_arguments(folder, manifest)
    template_options = ""
    if arguments:
        template_options = f" --default-chat-template-kwargs {_quote_json(arguments)}"
    parser = folder.family_component.reasoning_parser
    if arguments.get("enable_thinking") and parser:
        # Without a parser, the answer of the API would contain the reasoning.
        template_options += f" --reasoning-parser {parser}"
    vllm = (
        f"vllm serve {quoted} {common_options} --max-model-len {context_length}"
        f" --mm-processor-kwargs {_quote_json(pixel_limits)}"
        f" --override-generation-config {_quote_json(greedy_config)}{template_options}"
    )
    # Without the router, --dp-size ignores which GPU has the prefix of a request in its cache.
    module = "sglang.launch_server" if num_gpus == 1 else "sglang_router.launch_server"
    sglang = (
        f"python -m {module} --model-path {quoted} {common_options}"
        f" --context-length {context_length}"
        f" --mm-process-config {_quote_json({'image': pixel_limits})}{template_options}"
    )
    if num_gpus > 1:
        vllm += f" --data-parallel-size {num_gpus}"
        sglang += f" --dp-size {num_gpus}"
    notes = _list_notes(folder, manifest, arguments)
    resize_code = ""
    if note := describe_resizing(rule, factor, "vLLM and SGLang", code):
        notes.append(note)
        resize_code = format_resize_code(rule, factor)
    if lora is not None:
        sglang = ""
        notes.append(
            f'"model": {json.dumps(name)} in a request selects the adapter, "{base_name}" none'
        )
        notes.append("for SGLang and others, merge the adapter")
    elif num_gpus > 1:
        notes.append("for several GPUs, SGLang needs the package sglang-router")
    return ServingCommands(
        vllm=vllm,
        sglang=sglang,
        request=json.dumps(REQUEST_PARAMETERS),
        notes=tuple(notes),
        resize_code=resize_code,
    )


def _get_image_rule(folder: ModelFolder, manifest: Manifest | None) -> ImageRule:
    if manifest is not None:
        return manifest.image_rule
    return get_default_image_rule(folder.preprocessor_config)


def get_template_arguments(
    folder: ModelFolder, enable_thinking: bool | None = None
) -> dict[str, bool]:
    """Return the arguments of the chat template that select the prompt format of finesight.

    They are empty for templates without a thinking mode. By default, finesight prompts models of
    Qwen3.5 and later in non-thinking mode, while most of their templates select thinking mode.
    """
    family = load_family(folder)
    if not family.renders_reasoning or "enable_thinking" not in folder.chat_template:
        return {}
    if enable_thinking is None:
        enable_thinking = family.has_reasoning
    return {"enable_thinking": enable_thinking}


def _get_trained_template_arguments(
    folder: ModelFolder, manifest: Manifest | None
) -> dict[str, bool]:
    """Return the arguments of the chat template for a model, with the mode of its training."""
    if manifest is None:
        return get_template_arguments(folder)
    return get_template_arguments(folder, manifest.enable_thinking)


@dataclass(frozen=True, slots=True)
class LlamaServerCommand:
    """Command of llama.cpp that serves GGUF files, a note, and Python code to resize images."""

    command: str
    note: str
    resize_code: str


def build_llama_server_command(
    model_source: ModelSource, gguf_files: GgufFiles
) -> LlamaServerCommand:
    """Build the command of llama.cpp that serves the GGUF files of a model.

    llama.cpp reads no pixel limits from the files. It resizes images with another filter and, in
    some versions, with bars, but does not change images whose sizes are within the limits and
    multiples of `factor`.
    """
    folder = model_source.folder
    manifest = model_source.manifest
    rule = _get_image_rule(folder, manifest)
    factor = load_patch_config(folder).resize_factor
    limits = get_processor_limits(rule, factor)
    arguments = _get_trained_template_arguments(folder, manifest)
    model = shlex.quote(str(gguf_files.model))
    mmproj = shlex.quote(str(gguf_files.mmproj))
    min_tokens = math.ceil(limits.min_pixels / factor**2)
    max_tokens = max(min_tokens, limits.max_pixels // factor**2)
    command = (
        f"llama-server -m {model} --mmproj {mmproj} --special --temp 0"
        f" --image-min-tokens {min_tokens} --image-max-tokens {max_tokens}"
    )
    if arguments:
        command += f" --chat-template-kwargs {_quote_json(arguments)}"
    note = (
        f"the training resized images to {describe_image_size(rule, factor)}. llama.cpp resizes"
        " with another filter: for equal pixels, resize each image with the code below before"
        " sending it"
    )
    return LlamaServerCommand(command, note, format_resize_code(rule, factor))


def _list_notes(
    folder: ModelFolder, manifest: Manifest | None, template_arguments: Mapping[str, bool]
) -> list[str]:
    notes = [
        'each request must set "skip_special_tokens": false (the openai client:'
        " extra_body={'skip_special_tokens': False}), otherwise boxes lose their tokens"
    ]
    if template_arguments:
        notes.append(
            "vLLM supports this family from version 0.17.0. For SGLang versions without"
            " --default-chat-template-kwargs, remove the option and set"
            f' "chat_template_kwargs": {json.dumps(template_arguments)} in each request'
        )
    notes += describe_questions(manifest, folder.chat_template)
    missing_files = find_missing_files(folder)
    if missing_files:
        notes.append(
            f"missing files: {'; '.join(missing_files)}: copy them from the repository of the base"
        )
    return notes


def describe_questions(manifest: Manifest | None, chat_template: str = "") -> list[str]:
    """Return notes about the form and system prompt of the training questions.

    Args:
        chat_template: Template of the served model. A system prompt that it contains needs no note.
    """
    if manifest is None:
        return []
    prompt_format = PromptFormat.from_manifest(manifest)
    example = build_placeholder(prompt_format)
    notes = []
    if prompt_format.templates:
        urls = ["URL"] * len(example.images)
        content = prompt_format.build_request_content("QUESTION", urls)
        notes.append(
            "ask questions in the form of the training, with the parts of a user message in this"
            f" order and with this white space: `{json.dumps(content, ensure_ascii=False)}`"
        )
        notes += map(str, prompt_format.describe_forms())
    system_prompt = prompt_format.get_system_prompt(len(example.images))
    if system_prompt is None:
        system_prompt = manifest.system_prompt
    if system_prompt is not None and system_prompt not in chat_template:
        notes.append(
            f"start each conversation with the system prompt of the training: {system_prompt!r}"
        )
    return notes


def _compute_context_length(folder: ModelFolder, max_pixels: int) -> int:
    """Return the context length of a server in tokens.

    It is the smallest power of two for an image of `max_pixels` and RESERVED_TEXT_TOKENS, but at
    most the maximum of the model.
    """
    preprocessor_config = folder.preprocessor_config
    token_size: int = preprocessor_config["patch_size"] * preprocessor_config["merge_size"]
    num_tokens = max_pixels // token_size**2 + RESERVED_TEXT_TOKENS
    required = max(MIN_CONTEXT_LENGTH, 1 << (num_tokens - 1).bit_length())
    text_config = folder.config.get("text_config")
    config = text_config if isinstance(text_config, dict) else folder.config
    max_positions = config.get("max_position_embeddings")
    if not isinstance(max_positions, int):
        return required
    return min(required, max_positions)


def _quote_json(content: object) -> str:
    return shlex.quote(json.dumps(content))
