"""Write the model card (README.md) of a merged model or adapter, and list the files to upload."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined

from finesight import __version__
from finesight.encode.hf_renderer import NO_RESIZE_RULE
from finesight.encode.renderer import is_native
from finesight.errors import Step, UserError
from finesight.evaluate.eval_case import note_lines
from finesight.export.deployment import describe_questions, format_serving_commands
from finesight.export.hf_files import list_uploads
from finesight.export.merge_parity import MergeParity
from finesight.export.resize_code import describe_image_size, format_resize_code
from finesight.files.bounded_files import load_yaml, read_bytes, read_json_object
from finesight.files.hub_address import parse_model_address
from finesight.files.storage import temporary_folder
from finesight.infer.model_loader import ModelSource, get_model_name
from finesight.model.lora.merge import public_model_name
from finesight.model.lora.peft_io import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE
from finesight.model_folder import TINY_MODEL, TINY_MODEL_FOLDER, ModelFolder
from finesight.report.metric_rows import get_note
from finesight.report.run_reader import RunRecord, pair_evaluations, read_json_lines, read_run
from finesight.samples.example_question import ExampleQuestion, build_placeholder
from finesight.samples.prompt_format import PromptFormat
from finesight.settings.config import PixelRange
from finesight.settings.manifest import MANIFEST_FILE, Manifest, find_run_dir
from finesight.vision.image_processing import load_patch_config
from finesight.vision.processor_limits import get_processor_limits, has_fixed_image_size

MODEL_CARD_FILE = "README.md"

MAX_SHOWN_PROMPTS = 3
"""Maximum number of prompts in the model card; the most frequent ones are shown."""

_PRIVATE_SECTIONS = ("output_dir", "track")
"""Recipe sections with folders, accounts and projects, which the model card omits."""

_PATH_SETTINGS = ("model", "adapter", "train", "eval", "path", "metric")
"""Recipe settings with local paths or URLs, of which the model card contains the last component."""


@dataclass(frozen=True, slots=True, repr=False)
class VerifiedMerge:
    """A merged model that was compared with the trained model.

    Attributes:
        folder: Folder of the merged model, whose name is the title of the model card.
        source: Run, adapter or model that was merged.
        precision: Data type of the written weights.
        missing_files: Files that other programs need and the base model does not contain.
        dropped_sampling: Generation settings of the base model that were removed.
    """

    folder: Path
    source: Path
    model_source: ModelSource
    merged_layers: int
    dequantized_layers: int
    precision: str
    parity: MergeParity
    missing_files: tuple[str, ...]
    dropped_sampling: dict[str, Any]

    def __repr__(self) -> str:
        text = f"{str(self.folder)!r}: {self.merged_layers} merged layers, {self.precision}"
        return f"<{type(self).__name__} {text}>"


def write_model_card(folder: Path, info: VerifiedMerge, quantized: Sequence[str] = ()) -> None:
    """Write the model card of a merged folder, which already contains all other files.

    `quantized` describes the quantization of the merged weights in this folder.
    """
    name = info.folder.name
    manifest = info.model_source.manifest
    commands = [str(_build_predict_step(manifest, name))]
    for operation in ("chat", "web", "serve"):
        commands.append(str(Step(operation, {"run_or_model": name})))
    merged = ModelFolder(folder)
    serving = None
    if "serving" in merged.family_component.exports:
        code = "the code of the section Image size"
        serving = format_serving_commands(merged, name, name, manifest, code=code)
    card = _render_card(
        info.model_source,
        info.source,
        folder,
        title=name,
        commands=commands,
        serving=serving,
        merge=info,
        quantized=quantized,
        dropped_sampling=json.dumps(info.dropped_sampling),
    )
    (folder / MODEL_CARD_FILE).write_text(card, encoding="utf-8")


@dataclass(frozen=True, slots=True)
class HubUpload:
    """Hub address, visibility, sizes of the files in bytes, and page; None if only listed."""

    to: str
    public: bool
    files: Mapping[str, int]
    page: str | None


@contextmanager
def collect_uploads(model_source: ModelSource, source: str) -> Iterator[dict[str, Path]]:
    """Yield the files of a model upload by their repository name.

    For an adapter, these are its weights, its configuration with the public name of the base model,
    and a model card. `source` is the run or folder as the user named it.
    """
    manifest = model_source.manifest
    adapter = model_source.adapter
    if adapter is None or (manifest is not None and manifest.tune.has_mode("full")):
        yield list_uploads(model_source, source)
        return
    with temporary_folder("export") as folder:
        config = read_json_object(adapter / ADAPTER_CONFIG_FILE, expected="a PEFT configuration")
        base_name = _get_base_name(model_source)
        address = parse_model_address(base_name)
        if address is not None:
            base_name = address.repo_id
        config["base_model_name_or_path"] = base_name
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (folder / ADAPTER_CONFIG_FILE).write_text(text, encoding="utf-8")
        card = _render_adapter_card(model_source, Path(source))
        (folder / MODEL_CARD_FILE).write_text(card, encoding="utf-8")
        generated = {file: folder / file for file in (MODEL_CARD_FILE, ADAPTER_CONFIG_FILE)}
        if manifest is not None:
            # Inference needs the form of the questions and the image size. The base model may be a
            # local path, which is replaced.
            named = manifest.model_copy(update={"base_model": base_name})
            generated[MANIFEST_FILE] = folder / MANIFEST_FILE
            content = named.model_dump_json(indent=1) + "\n"
            generated[MANIFEST_FILE].write_text(content, encoding="utf-8")
        yield {**generated, ADAPTER_WEIGHTS_FILE: adapter / ADAPTER_WEIGHTS_FILE}


def _render_adapter_card(model_source: ModelSource, source: Path) -> str:
    title = get_model_name(str(source.resolve()))
    base = _get_base_name(model_source)
    steps = [
        Step("download", {"source": "OWNER/NAME", "to": title}),
        _build_predict_step(model_source.manifest, title),
    ]
    if is_native(model_source.folder):
        steps.append(Step("merge", {"source": title, "out": "merged", "base": base}))
    commands = list(map(str, steps))
    return _render_card(model_source, source, source, title=title, commands=commands, merge=None)


def _build_predict_step(manifest: Manifest | None, name: str) -> Step:
    """Return the step that asks a question about as many images as in the training."""
    example = build_placeholder(PromptFormat.from_manifest(manifest))
    return ExampleQuestion(example.images, "TEXT").build_step(name)


def _render_card(
    model_source: ModelSource, source: Path, license_folder: Path, **values: object
) -> str:
    """Render the template `model_card.md` for a merged model or, without `merge`, an adapter.

    Args:
        source: Run, adapter or model of the weights.
        license_folder: Folder with the license files.
    """
    run_record = _read_run_record(source)
    manifest = model_source.manifest
    result: Mapping[str, Any] = {}
    data: Mapping[str, Any] = {}
    if run_record is not None:
        result = run_record.result or {}
        if run_record.starts:
            data = run_record.starts[-1].get("data") or {}
    trained_parts = []
    if manifest is not None:
        trained_parts = [f"{k} ({v})" for k, v in manifest.tune if v in ("lora", "full")]
    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined
    )
    template = (Path(__file__).parent / "model_card.md").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        metadata=_format_metadata(model_source, "transformers" if values["merge"] else "peft"),
        base=_get_base_name(model_source),
        family=model_source.folder.family,
        version=__version__,
        manifest=manifest,
        trained_parts=trained_parts,
        num_train=(data.get("train") or {}).get("num_samples"),
        num_eval=(data.get("eval") or {}).get("num_samples"),
        steps=result.get("steps"),
        quantization=model_source.quantization_summary,
        has_adapter=model_source.adapter is not None,
        prompts=_list_prompts(run_record),
        question_notes=describe_questions(manifest),
        max_prompts=MAX_SHOWN_PROMPTS,
        scores=_list_scores(result),
        image_size=_describe_image_size(model_source, is_merged=values["merge"] is not None),
        notes=_list_notes(result),
        recipe=_format_recipe(run_record),
        license=_read_license(model_source.folder.path),
        license_files=_list_license_files(license_folder),
        **values,
    )


def _list_license_files(folder: Path) -> list[str]:
    names = []
    for path in folder.iterdir():
        if path.name.startswith(("LICENSE", "NOTICE")):
            names.append(path.name)
    return sorted(names)


@dataclass(frozen=True, slots=True)
class _ImageSize:
    """Text about the image size of a training, and Python code or an empty text."""

    text: str
    code: str


def _describe_image_size(model_source: ModelSource, *, is_merged: bool) -> _ImageSize | None:
    """Describe the image size for other programs; None for the size of the published model."""
    manifest = model_source.manifest
    folder = model_source.folder
    if manifest is None or manifest.image_rule == NO_RESIZE_RULE:
        return None
    rule = manifest.image_rule
    if not is_native(folder):
        # The processor of the family resizes images again.
        text = f"The training resized images to {describe_image_size(rule, 1)}, before the"
        text += " processor of the base. Resize each image first:"
        return _ImageSize(text, format_resize_code(rule, 1))
    if has_fixed_image_size(folder):
        return None
    factor = load_patch_config(folder).resize_factor
    text = f"The training resized images to {describe_image_size(rule, factor)}."
    limits = get_processor_limits(rule, factor)
    if is_merged:
        text += " The image processor settings of this folder contain the pixel limits"
        text += f" {limits.min_pixels} to {limits.max_pixels}."
        if isinstance(rule, PixelRange):
            return _ImageSize(text, "")
        text += " They do not change images that were resized first:"
        return _ImageSize(text, format_resize_code(rule, factor))
    code = f"""\
from transformers import AutoProcessor

processor = AutoProcessor.from_pretrained(
    {_get_base_name(model_source)!r}, min_pixels={limits.min_pixels}, max_pixels={limits.max_pixels}
)
"""
    text += " The processor of the base has other pixel limits"
    if isinstance(rule, PixelRange):
        text += ":"
    else:
        text += ", so resize each image first:"
        code = f"{code}\n{format_resize_code(rule, factor)}"
    return _ImageSize(text, code)


def _read_run_record(source: Path) -> RunRecord | None:
    """Read the run of a model; for a checkpoint, with the evaluation of its step as the result."""
    run_dir = find_run_dir(source)
    if not (run_dir / MANIFEST_FILE).is_file():
        return None
    run_record = read_run(run_dir)
    if run_dir == source:
        return run_record
    step = source.name.removeprefix("step-")
    evaluations = {str(line["step"]): line for line in run_record.evaluations}
    before, after = pair_evaluations(evaluations.get("0", {}), evaluations.get(step, {}))
    result = {"before": before, "after": after}
    return replace(run_record, result=result | {"steps": int(step) if step.isdecimal() else 0})


def _get_base_name(model_source: ModelSource) -> str:
    if model_source.folder.path.resolve() == TINY_MODEL_FOLDER.resolve():
        return TINY_MODEL
    if model_source.manifest is None:
        return public_model_name(str(model_source.folder.path))
    return public_model_name(model_source.manifest.base_model)


def _format_metadata(model_source: ModelSource, library: str) -> str:
    base_name = _get_base_name(model_source)
    metadata: dict[str, Any] = {
        "library_name": library,
        "pipeline_tag": "image-text-to-text",
        "tags": ["finesight", model_source.folder.family],
    }
    if license_name := _read_license(model_source.folder.path):
        metadata["license"] = license_name
    if base_name != TINY_MODEL and parse_model_address(base_name) is not None:
        metadata["base_model"] = base_name
    return yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)


def _list_prompts(run_record: RunRecord | None) -> list[str]:
    """Return the prompts of the validation samples, with which users should ask; frequent first."""
    if run_record is None:
        return []
    counts: Counter[str] = Counter()
    for path in run_record.predictions_files[-1:]:
        for line in read_json_lines(path):
            prompt = line.get("prompt")
            if isinstance(prompt, str) and prompt.strip():
                counts[prompt] += 1
    return [prompt for prompt, _ in counts.most_common()]


def _list_scores(result: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """Return the name, value before and after training, and interval of each score."""
    before = result.get("before") or {}
    after = result.get("after") or {}
    scores_before = before.get("scores") or {}
    intervals = after.get("intervals") or {}
    rows = []
    for name, value in (after.get("scores") or {}).items():
        rows.append((name, scores_before.get(name), value, intervals.get(name)))
    if after.get("validation_loss") is not None:
        name = "validation_loss"
        rows.append((name, before.get(name), after[name], None))
    return rows


def _list_notes(result: Mapping[str, Any]) -> list[str]:
    after = result.get("after") or {}
    return note_lines((name, get_note(after, name)) for name in after.get("scores") or {})


def _format_recipe(run_record: RunRecord | None) -> str:
    if run_record is None:
        return ""
    public = {}
    for name, value in run_record.recipe.items():
        if name not in _PRIVATE_SECTIONS:
            public[name] = _strip_paths(value, name)
    if not public:
        return ""
    return yaml.safe_dump(public, sort_keys=False, allow_unicode=True).strip()


def _strip_paths(value: Any, key: str = "") -> Any:
    """Replace paths in recipe settings by their last component, to hide folder names.

    Args:
        key: Name of the setting.
    """
    if isinstance(value, Mapping):
        return {name: _strip_paths(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [_strip_paths(item, key) for item in value]
    if not isinstance(value, str) or (key == "model" and parse_model_address(value) is not None):
        return value
    if key in _PATH_SETTINGS or re.match(r"[/~.\\]|[A-Za-z]:[/\\]", value):
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    return value


def _read_license(folder: Path) -> str | None:
    """Return the license in the YAML front matter of the model card, if any."""
    path = folder / MODEL_CARD_FILE
    try:
        text = read_bytes(path, expected="a model card").decode(errors="replace")
    except UserError:
        return None
    header, separator, _ = text.removeprefix("---\n").partition("\n---")
    if not text.startswith("---\n") or not separator:
        return None
    try:
        content = load_yaml(header)
    except yaml.YAMLError:
        return None
    if not isinstance(content, dict):
        return None
    license_name = content.get("license")
    return license_name if isinstance(license_name, str) else None
