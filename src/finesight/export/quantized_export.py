"""Export of runs with 4-bit weights in GPTQ format, calibrated on their training samples.

auto-round (Cheng et al. 2023, arXiv:2309.05516) optimizes the rounding in each decoder layer so
that the outputs of the layer change least. All other weights keep their values. vLLM, SGLang and
finesight load the folder.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor

from finesight.encode.hf_renderer import FROM_PRETRAINED_OPTIONS, import_transformers
from finesight.encode.tokenization import EncodedSample
from finesight.errors import Remedy, Step, UserError
from finesight.evaluate.custom_metric import check_metric
from finesight.evaluate.generation_eval import evaluate, load_eval_inputs
from finesight.evaluate.metric_difference import MetricDifference, compare_cases
from finesight.evaluate.prediction_file import read_predictions
from finesight.export.hf_files import propose_merge
from finesight.export.model_card import MODEL_CARD_FILE, write_model_card
from finesight.export.verified_merge import merge_and_verify
from finesight.family_components import FAMILIES
from finesight.files.storage import DIGESTS_FILE, check_new_path, write_file, write_folder
from finesight.infer.model_loader import (
    ModelSource,
    load_inference_model,
    resolve_device,
    resolve_model_source,
)
from finesight.model.quant.nf4 import import_bitsandbytes
from finesight.model.weights_io import open_safetensors, read_headers
from finesight.model_folder import ModelFolder
from finesight.progress import ProgressConsole
from finesight.samples.corpus import load_corpus
from finesight.samples.image_file import CorruptImageError
from finesight.samples.sample import LocatedSample
from finesight.settings.config import Device, EvalSettings, Recipe
from finesight.settings.manifest import RECIPE_FILE, find_run_dir
from finesight.settings.recipe import load_recipe
from finesight.train.finalize import format_differences
from finesight.vision.image_processing import NUM_CHANNELS, repeat_still_frames

GROUP_SIZES = (128, 64, 32)
"""Numbers of inputs that share a scale, for which vLLM and finesight have kernels."""

NUM_CALIBRATION_SAMPLES = 128
"""Default number of samples of auto-round."""

QUANTIZATION_FILE = "quantization.json"

_LINEAR_WEIGHT = re.compile(
    r"model\.(language_model\.)?layers\.\d+\.\w+\.(?!in_proj_)\w*proj\w*\.weight"
)
"""Weights that are quantized. The input projections of linear attention (Qwen3.5) are not: vLLM and
finesight fuse them, and two of them are too small for 4-bit kernels."""

_PACKED_TENSORS = ("qweight", "qzeros", "scales", "g_idx")

_SKIPPED_MODULES = (".*visual.*", ".*mtp.*", ".*in_proj_.*")
"""Patterns of the layers in 16 bits, for engines that do not derive them from the tensors."""


@dataclass(frozen=True, slots=True)
class QuantizedExport:
    """A quantized model and its scores beside those of the merged model.

    Attributes:
        num_layers: Number of quantized linear layers.
        num_bytes: Size of the weight files of the merged and of the quantized model.
        differences: Scores of the merged (before) and the quantized model (after) on the validation
            split; empty if the run has no metric or no validation split.
    """

    folder: Path
    group_size: int
    num_layers: int
    num_calibration_samples: int
    num_bytes: tuple[int, int]
    primary_metric: str | None
    differences: tuple[MetricDifference, ...]
    auto_round: str

    def as_json(self) -> dict[str, Any]:
        """Return the result as JSON data."""
        return asdict(self) | {"folder": self.folder.name}

    def format_lines(self) -> list[str]:
        """Return the result as console lines."""
        bytes_before, bytes_after = self.num_bytes
        lines = [
            f"{self.num_layers} layers in 4 bits (GPTQ format, groups of {self.group_size} inputs),"
            f" calibrated on {self.num_calibration_samples} training samples by auto-round"
            f" {self.auto_round}; {bytes_before / 1e6:,.1f} MB before,"
            f" {bytes_after / 1e6:,.1f} MB after"
        ]
        if self.differences:
            table = format_differences(self.differences, self.primary_metric)
            lines += ["merged model (before) and quantized model (after):", *table.splitlines()]
        else:
            lines.append("not evaluated: the recipe has no metric or no validation split")
        return lines


def export_quantized(
    source: str,
    model_source: ModelSource,
    out: Path,
    console: ProgressConsole,
    device: Device = "auto",
    trust_metric: bool = False,
    *,
    num_samples: int = NUM_CALIBRATION_SAMPLES,
    iterations: int | None = None,
) -> QuantizedExport:
    """Merge a run, quantize its language model, and evaluate both on the validation split.

    Args:
        num_samples: Number of training samples for the calibration.
        iterations: Optimization steps per decoder layer; None for the default of auto-round, 0 to
            round to nearest.

    Raises UserError for a source without a recipe, an unsupported family, missing packages, an
    existing `out`, and layers without a suitable group size. `out` does not exist then.
    """
    recipe_file = find_run_dir(Path(source)) / RECIPE_FILE
    family = model_source.folder.family
    is_run = recipe_file.is_file()
    found = "no run"
    remedy: Remedy = "give the output_dir of a run"
    if is_run:
        found = "a run"
        remedy = propose_merge(model_source.folder, source)
    if not is_run or "quantize" not in FAMILIES.describe(family).exports:
        raise UserError(
            f"{source} is {found} of the family {family}",
            where="--quantize",
            expected="a run, whose training samples calibrate the rounding, of the families"
            f" {', '.join(FAMILIES.list_exported('quantize'))}",
            remedy=remedy,
        )
    check_new_path(out)
    group_size = select_group_size(model_source.folder, source, out)
    auto_round = import_auto_round()
    recipe = load_recipe(recipe_file)
    target = resolve_device(device)
    eval_inputs = None
    if recipe.eval is not None and recipe.data.eval:
        eval_inputs = load_eval_inputs(source)
        check_metric(eval_inputs[1].metric, named=False, trust=trust_metric)
    with write_folder(out) as folder:
        # Its name is the title in the model card.
        merged_folder = folder / "work" / out.name
        with console.activity(f"merging {source}"):
            merge = merge_and_verify(
                source, model_source, merged_folder, device=device, log=console.log
            )
        merged = resolve_model_source(str(merged_folder))
        inputs = list(_iter_calibration_inputs(merged, recipe, num_samples))
        if not inputs:
            raise UserError(
                f"{len(inputs)} training samples are usable for the calibration",
                where="--quantize",
                expected="samples with readable images and without videos in data.train",
                remedy=Step("check", {"sources": [recipe_file]}, "check them"),
            )
        with console.activity(f"quantizing {source} with {len(inputs)} samples"):
            packed = _run_auto_round(
                auto_round, merged.folder, inputs, folder / "work", group_size, target, iterations
            )
        num_layers = _write_quantized(merged.folder, packed, folder, group_size)
        differences: list[MetricDifference] = []
        primary_metric = None
        if eval_inputs is not None:
            models = {"merged": merged_folder, "quantized": folder}
            differences, primary_metric = _compare_models(
                models, eval_inputs, folder / "work", device, console
            )
        result = QuantizedExport(
            out,
            group_size,
            num_layers,
            len(inputs),
            (_count_bytes(merged.folder), _count_bytes(ModelFolder(folder))),
            primary_metric,
            tuple(differences),
            version("auto-round"),
        )
        shutil.rmtree(folder / "work")
        text = json.dumps(result.as_json(), ensure_ascii=False, indent=1)
        (folder / QUANTIZATION_FILE).write_text(text + "\n", encoding="utf-8")
        write_model_card(folder, replace(merge, folder=out), result.format_lines())
    return result


def _compare_models(
    models: Mapping[str, Path],
    eval_inputs: tuple[Sequence[LocatedSample], EvalSettings],
    work: Path,
    device: Device,
    console: ProgressConsole,
) -> tuple[list[MetricDifference], str | None]:
    """Evaluate two models, and return the score differences and the primary metric.

    Args:
        models: Model folders by display name, first the one before the change.
        work: Folder for prediction files.
    """
    samples, settings = eval_inputs
    num_evaluated = min(len(samples), settings.limit or len(samples))
    answers = []
    for name, path in models.items():
        file = work / f"{name}.jsonl"
        model = load_inference_model(str(path), device)
        with console.progress_stage(f"{name} model", num_evaluated) as on_progress:
            write = partial(write_file, file)
            evaluation = evaluate(
                model.model, model.renderer, samples, settings, write, on_progress
            )
        answers.append([one.case for one in read_predictions(file)])
        del model  # The next one may need the memory.
    return compare_cases(evaluation.metric, *answers), evaluation.primary_metric


def import_auto_round() -> Any:
    """Import auto-round and transformers. Raises UserError if they are missing."""
    # auto-round imports it, too, and without this guard it may download code.
    with suppress(UserError):
        import_bitsandbytes("--quantize")
    try:
        import_transformers()
        import auto_round
    except ImportError as error:
        raise UserError(
            f"cannot import auto_round: {error}",
            where="--quantize",
            expected="the package auto-round, of the extra quantize",
            remedy="pip install 'finesight[quantize]'",
        ) from error
    logging.getLogger("autoround").setLevel(logging.ERROR)
    return auto_round


def select_group_size(folder: ModelFolder, source: str, out: Path) -> int:
    """Select the largest group size that divides the inputs of all layers to be quantized.

    Raises UserError if there is none.
    """
    shapes = set()
    for tensor in read_headers(folder.weight_files()):
        if _is_quantized(tensor.name):
            shapes.add(tensor.shape)
    for size in GROUP_SIZES:
        if all(inputs % size == 0 and outputs % 32 == 0 for outputs, inputs in shapes):
            return size
    raise UserError(
        f"linear layers have the shapes {sorted(shapes)} (outputs, inputs)",
        where="--quantize",
        expected="multiples of 32 for groups of 32, 64 or 128 inputs",
        remedy=Step("merge", {"source": source, "out": out}, "serve the model in 16 bits"),
    )


def _is_quantized(name: str) -> bool:
    return _LINEAR_WEIGHT.fullmatch(name) is not None


def _count_bytes(folder: ModelFolder) -> int:
    return sum(file.stat().st_size for file in folder.weight_files())


def _iter_calibration_inputs(
    merged: ModelSource, recipe: Recipe, num_samples: int
) -> Iterator[dict[str, Tensor]]:
    """Yield training samples without videos as inputs of the transformers model."""
    renderer = merged.build_renderer()
    corpus = load_corpus(recipe.data.train, require_answer=False)
    order = torch.randperm(len(corpus), generator=torch.Generator().manual_seed(0)).tolist()
    for index in order:
        try:
            sample = corpus[index]
            if sample.sample.messages[-1].role == "assistant":
                encoded = renderer.encode(sample)
            else:
                encoded = renderer.encode_prompt(sample)
        except (CorruptImageError, UserError):
            continue
        is_short = encoded.tokenized.num_tokens <= recipe.data.max_length
        if is_short and all(span.kind == "image" for span in encoded.tokenized.spans):
            yield to_hf_inputs(encoded, merged.folder.preprocessor_config)
            num_samples -= 1
        if not num_samples:
            return


def to_hf_inputs(encoded: EncodedSample, preprocessor_config: dict[str, Any]) -> dict[str, Tensor]:
    """Convert an encoded sample to the inputs of a model of transformers."""
    tokenized = encoded.tokenized
    config = preprocessor_config
    ids_1T = torch.from_numpy(tokenized.ids_T).long()[None]
    positions_31T = torch.from_numpy(tokenized.position_ids_3T).long()[:, None]
    inputs = {
        "input_ids": ids_1T,
        "attention_mask": torch.ones_like(ids_1T),
        "position_ids": positions_31T,
    }
    if tokenized.spans:
        size = NUM_CHANNELS * config["temporal_patch_size"] * config["patch_size"] ** 2
        patches_ND = torch.from_numpy(repeat_still_frames(encoded.patches_ND, size))
        mean = torch.tensor(config["image_mean"])[:, None]
        std = torch.tensor(config["image_std"])[:, None]
        values_NCP = (patches_ND.view(len(patches_ND), NUM_CHANNELS, -1) / 255 - mean) / std
        inputs["pixel_values"] = values_NCP.flatten(1)
        inputs["image_grid_thw"] = torch.tensor([span.grid_thw for span in tokenized.spans])
    return inputs


def _run_auto_round(
    auto_round: Any,
    merged: ModelFolder,
    inputs: list[dict[str, Tensor]],
    work: Path,
    group_size: int,
    device: torch.device,
    iterations: int | None,
) -> ModelFolder:
    """Quantize a merged model, and return the folder that auto-round writes."""
    transformers = import_transformers()
    path = str(merged.path)
    load = transformers.AutoModelForImageTextToText.from_pretrained
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, **FROM_PRETRAINED_OPTIONS)
    quantizer = auto_round.AutoRound(
        load(path, dtype="auto", **FROM_PRETRAINED_OPTIONS),
        tokenizer=tokenizer,
        # auto-round requires a processor, but does not use it for inputs that are tensors.
        processor=tokenizer,
        scheme="W4A16",
        group_size=group_size,
        iters=iterations,
        dataset=inputs,
        nsamples=len(inputs),
        seqlen=max(one["input_ids"].numel() for one in inputs),
        # The samples have different lengths.
        batch_size=1,
        gradient_accumulate_steps=8,
        ignore_layers="in_proj_",
        # Compilation needs a C++ compiler on a CPU.
        enable_torch_compile=False,
        device_map=str(device),
    )
    try:
        quantizer.quantize_and_save(str(work / "auto-round"), format="auto_gptq")
    except SystemExit as error:  # auto-round exits after an error of the model
        raise RuntimeError(f"auto-round failed with exit code {error.code}") from error
    (config_file,) = (work / "auto-round").rglob("config.json")
    return ModelFolder(config_file.parent)


def _write_quantized(
    merged: ModelFolder, packed: ModelFolder, folder: Path, group_size: int
) -> int:
    """Write the merged model with the layers that auto-round packed; return their number.

    All other tensors and files are those of the merged model.
    """
    files = merged.weight_files()
    layers = set()
    for tensor in read_headers(files):
        if _is_quantized(tensor.name):
            layers.add(tensor.name.removesuffix(".weight"))
    tensors: dict[str, Tensor] = {}
    for file in (*files, *packed.weight_files()):
        with open_safetensors(file) as weights:
            for name in weights.keys():  # noqa: SIM118
                is_packed = name.rpartition(".")[2] in _PACKED_TENSORS
                if is_packed or (file in files and not _is_quantized(name)):
                    tensors[name] = weights.get_tensor(name)
    found = {name.rpartition(".")[0] for name in tensors if name.endswith(".qweight")}
    assert found == layers, f"auto-round quantized {sorted(found ^ layers)}"
    for path in merged.path.iterdir():
        if path not in files and path.name not in (DIGESTS_FILE, MODEL_CARD_FILE):
            shutil.copyfile(path, folder / path.name)
    # Also replaces the index of the merged model.
    save_torch_state_dict(tensors, folder)
    settings = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": 4,
        "group_size": group_size,
        "sym": True,
        "desc_act": False,
        "lm_head": False,
        "dynamic": {f"-:{pattern}": {} for pattern in _SKIPPED_MODULES},
    }
    config = json.dumps(merged.config | {"quantization_config": settings}, indent=2)
    (folder / "config.json").write_text(config + "\n", encoding="utf-8")
    return len(layers)
