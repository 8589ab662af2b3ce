"""Write the model card (README.md) of a merged model or adapter, and list the files to upload."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from finesight import __version__
from finesight.bounded_files import load_yaml, read_bytes, read_json_object
from finesight.errors import Step, UserError
from finesight.evaluate.eval_case import note_lines
from finesight.export.deployment import format_serving_commands, get_prompt_settings
from finesight.export.hf_files import HF_ARCHITECTURES, list_uploads
from finesight.export.merge_parity import MergeParity
from finesight.hub.address import parse_model_address
from finesight.infer.model_loader import ModelSource, get_model_name
from finesight.manifest import MANIFEST_FILE, find_run_dir
from finesight.model.lora.merge import public_model_name
from finesight.model.lora.peft_io import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE
from finesight.model_folder import TINY_MODEL, TINY_MODEL_FOLDER, ModelFolder
from finesight.report.metric_rows import get_note
from finesight.report.run_reader import RunRecord, pair_evaluations, read_json_lines, read_run
from finesight.storage import temporary_folder

MODEL_CARD_FILE = "README.md"

MAX_SHOWN_PROMPTS = 3
"""Maximum number of prompts in the model card; the most frequent ones are shown."""

_PRIVATE_SECTIONS = ("output_dir", "track")
"""Recipe sections with folders, accounts and projects, which the model card omits."""

_PATH_SETTINGS = ("model", "adapter", "train", "eval", "path", "metric")
"""Recipe settings with local paths or URLs, of which the model card contains the last component."""


@dataclass(frozen=True, slots=True)
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


def write_model_card(folder: Path, info: VerifiedMerge) -> None:
    """Write the model card of a merged folder, which already contains all other files."""
    run_record = _read_run_record(info.source)
    blocks = [
        _format_front_matter(info.model_source, "transformers"),
        f"# {info.folder.name}",
        _format_summary(info, run_record),
        *_format_prompts(run_record),
        *_format_scores(run_record),
        *_format_recipe(run_record),
        _format_parity(info),
        _format_serving(ModelFolder(folder), info),
        _format_license(info.model_source.folder, folder),
    ]
    (folder / MODEL_CARD_FILE).write_text("\n\n".join(blocks) + "\n", encoding="utf-8")


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
    manifest, adapter = model_source.manifest, model_source.adapter
    if adapter is None or (manifest is not None and manifest.tune.has_mode("full")):
        yield list_uploads(model_source, source)
        return
    with temporary_folder("export") as folder:
        config = read_json_object(adapter / ADAPTER_CONFIG_FILE, expected="a PEFT configuration")
        config["base_model_name_or_path"] = _get_base_name(model_source)
        address = parse_model_address(_get_base_name(model_source))
        if address is not None:
            config["base_model_name_or_path"] = address.repo_id
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (folder / ADAPTER_CONFIG_FILE).write_text(text, encoding="utf-8")
        card = _render_adapter_card(model_source, Path(source))
        (folder / MODEL_CARD_FILE).write_text(card, encoding="utf-8")
        generated = {file: folder / file for file in (MODEL_CARD_FILE, ADAPTER_CONFIG_FILE)}
        yield {**generated, ADAPTER_WEIGHTS_FILE: adapter / ADAPTER_WEIGHTS_FILE}


def _render_adapter_card(model_source: ModelSource, source: Path) -> str:
    run_record = _read_run_record(source)
    title, base = get_model_name(str(source.resolve())), _get_base_name(model_source)
    summary = [
        f"LoRA adapter of {base} (family {model_source.folder.family}), trained with finesight"
        f" {__version__}.",
        *_format_training(model_source, run_record),
    ]
    if model_source.quantization_summary:
        summary.append(f"Training used {model_source.quantization_summary} weights of the base.")
    question = {"run_or_model": title, "images": ["IMAGE"], "prompt": "TEXT"}
    usage = (
        f"{Step('download', {'source': 'OWNER/NAME', 'to': title})}\n"
        f"{Step('predict', question)}\n"
        f"{Step('merge', {'source': title, 'out': 'merged', 'base': base})}"
    )
    blocks = [
        _format_front_matter(model_source, "peft"),
        f"# {title}",
        " ".join(summary),
        *_format_prompts(run_record),
        *_format_scores(run_record),
        *_format_recipe(run_record),
        f"## Usage\n\n```sh\n{usage}\n```\n\nPEFT loads it with PeftModel.from_pretrained.",
        _format_license(model_source.folder, source),
    ]
    return "\n\n".join(blocks) + "\n"


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
    return public_model_name(
        model_source.manifest.base_model if model_source.manifest else str(model_source.folder.path)
    )


def _format_front_matter(model_source: ModelSource, library: str) -> str:
    base_name = _get_base_name(model_source)
    metadata: dict[str, Any] = {
        "library_name": library,
        "pipeline_tag": "image-text-to-text",
        "tags": ["finesight", model_source.folder.family],
    }
    license_name = _read_front_matter(model_source.folder.path).get("license")
    if isinstance(license_name, str):
        metadata["license"] = license_name
    if base_name != TINY_MODEL and parse_model_address(base_name) is not None:
        metadata["base_model"] = base_name
    return f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---"


def _format_summary(info: VerifiedMerge, run_record: RunRecord | None) -> str:
    parity = info.parity
    sentences = [
        f"{_get_base_name(info.model_source)} (family {info.model_source.folder.family}),"
        f" fine-tuned with finesight {__version__}; weights in {info.precision}.",
        *_format_training(info.model_source, run_record),
    ]
    if info.model_source.quantization_summary:
        sentences.append(
            (
                f"The run used the weights of {info.model_source.quantization_summary}; this"
                " folder contains them unquantized."
            )
            + (
                ""
                if parity.quantized_comparison
                else " The difference of completions was not measured."
            )
        )
    if info.dequantized_layers:
        sentences.append(
            f"{info.dequantized_layers} layers were dequantized from 4 bits; their values"
            " are unchanged."
        )
    if info.dropped_sampling:
        sentences.append(
            "Completions are greedy, as in the evaluation; these settings of the base's"
            f" generation_config.json were removed: {json.dumps(info.dropped_sampling)}."
        )
    return " ".join(sentences)


def _format_training(model_source: ModelSource, run_record: RunRecord | None) -> list[str]:
    manifest, sentences = model_source.manifest, []
    if manifest is not None:
        tuned_parts = {name: mode for name, mode in manifest.tune if mode in ("lora", "full")}
        sentences.append(
            "Trained: " + ", ".join(f"{name} ({mode})" for name, mode in tuned_parts.items()) + "."
        )
        sentences.append(f"The fingerprint of the base is {manifest.base_fingerprint}.")
    if run_record is None:
        return sentences
    data = (run_record.starts[-1].get("data") if run_record.starts else None) or {}
    counts = {name: data[name].get("num_samples") for name in ("train", "eval") if data.get(name)}
    if counts.get("train"):
        validation_note = f", {counts['eval']:,} validation samples" if counts.get("eval") else ""
        sentences.append(f"Data: {counts['train']:,} training samples{validation_note}.")
    result = run_record.result or {}
    if result.get("steps"):
        sentences.append(f"{result['steps']:,} steps.")
    return sentences


def _format_prompts(run_record: RunRecord | None) -> list[str]:
    """Return the section with the most frequent prompts of the validation samples.

    Users need these prompts because the model was trained with them.
    """
    prompt_counts: Counter[str] = Counter()
    for path in (run_record.predictions_files if run_record else [])[-1:]:
        for line in read_json_lines(path):
            prompt = line.get("prompt")
            if isinstance(prompt, str) and prompt.strip():
                prompt_counts[prompt] += 1
    if not prompt_counts:
        return []
    shortened = (
        prompt_text[:300].replace("\n", "\n> ")
        for prompt_text, _ in prompt_counts.most_common(MAX_SHOWN_PROMPTS)
    )
    quotes = "\n".join(f"> {prompt_text}\n" for prompt_text in shortened)
    num_more = len(prompt_counts) - MAX_SHOWN_PROMPTS
    more_note = f"\nAnd {num_more:,} similar ones." if num_more > 0 else ""
    return ["## Prompts", f"Prompts of the validation samples:\n\n{quotes}{more_note}".strip()]


def _format_scores(run_record: RunRecord | None) -> list[str]:
    result = (run_record.result if run_record else None) or {}
    before, after = result.get("before") or {}, result.get("after") or {}
    scores = {"before": before.get("scores") or {}, "after": after.get("scores") or {}}
    intervals = after.get("intervals") or {}
    rows = [
        f"| {name} | {_format_number(scores['before'].get(name))} | {_format_number(value)} |"
        f" {_format_interval(intervals.get(name))} |"
        for name, value in scores["after"].items()
    ]
    losses = (before.get("validation_loss"), after.get("validation_loss"))
    if losses[1] is not None:
        rows.append(
            f"| validation_loss | {_format_number(losses[0])} | {_format_number(losses[1])} | - |"
        )
    if not rows:
        return []
    header = "| validation samples | before | after | 95 % interval |\n| --- | --- | --- | --- |"
    notes = note_lines((name, get_note(after, name)) for name in scores["after"])
    return ["## Evaluation", "\n".join([header, *rows]), *notes]


def _format_interval(bounds: object) -> str:
    if not isinstance(bounds, list) or len(bounds) != 2:
        return "-"
    return f"{_format_number(bounds[0])} to {_format_number(bounds[1])}"


def _format_number(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else "-"


def _format_recipe(run_record: RunRecord | None) -> list[str]:
    if run_record is None or not run_record.recipe:
        return []
    public_settings = {
        key: _strip_paths(value, key)
        for key, value in run_record.recipe.items()
        if key not in _PRIVATE_SECTIONS
    }
    text = yaml.safe_dump(public_settings, sort_keys=False, allow_unicode=True).strip()
    return ["## Recipe", f"```yaml\n{text}\n```"]


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
    is_path = key in _PATH_SETTINGS or re.match(r"[/~.\\]|[A-Za-z]:[/\\]", value)
    return re.split(r"[/\\]", value.rstrip("/\\"))[-1] if is_path else value


def _format_parity(info: VerifiedMerge) -> str:
    lines = "\n".join(info.parity.format_lines())
    is_full_model = info.model_source.adapter is None
    return (
        f"## {'Saved' if is_full_model else 'Merged'} model equals trained model\n\nThe"
        " folder, loaded from disk, compared with"
        f" {'the trained model' if is_full_model else 'the adapter on its base'}:"
        f"\n\n```\n{lines}\n```"
    )


def _format_serving(folder: ModelFolder, info: VerifiedMerge) -> str:
    title = "## Serving"
    name = {"run_or_model": info.folder.name}
    steps = [Step("predict", name | {"images": ["IMAGE"], "prompt": "TEXT"})]
    steps += [Step(operation, name) for operation in ("chat", "web", "serve")]
    command_lines = "\n".join(["```sh", *map(str, steps), "```"])
    if folder.family not in HF_ARCHITECTURES:
        return f"{title}\n\n{command_lines}"
    settings = get_prompt_settings(info.model_source.manifest)
    serving_commands = format_serving_commands(
        folder, info.folder.name, info.folder.name, *settings
    )
    notes = "\n".join(f"- {note}" for note in serving_commands.notes)
    engine_commands = f"```sh\n{serving_commands.vllm}\n\n{serving_commands.sglang}\n```"
    return f"{title}\n\n{command_lines}\n\nvLLM and SGLang:\n\n{engine_commands}\n\n{notes}"


def _format_license(base_folder: ModelFolder, folder: Path) -> str:
    files = sorted(p.name for p in folder.iterdir() if p.name.startswith(("LICENSE", "NOTICE")))
    license_name = _read_front_matter(base_folder.path).get("license")
    license_note = f" ({license_name})" if isinstance(license_name, str) else ""
    if files:
        text = (
            f"The license of the base{license_note} applies to these weights: {', '.join(files)}."
        )
    elif license_note:
        text = f"The license of the base{license_note} applies to these weights."
    else:
        text = (
            "The license of the base applies to these weights; its folder does not"
            " contain it: see where it was published."
        )
    return f"## License\n\n{text}"


def _read_front_matter(folder: Path) -> dict[str, Any]:
    """Parse the YAML front matter of the model card, empty if there is none."""
    path = folder / MODEL_CARD_FILE
    try:
        text = read_bytes(path, expected="a model card").decode(errors="replace")
    except UserError:
        text = ""
    header, separator, _ = text.removeprefix("---\n").partition("\n---")
    if not text.startswith("---\n") or not separator:
        return {}
    try:
        content = load_yaml(header)
    except yaml.YAMLError:
        return {}
    return content if isinstance(content, dict) else {}
