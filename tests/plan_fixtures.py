"""Models, packed batches and traced steps for tests of estimated memory."""

import gc
import io
import json
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tiny_task import TinyTask, write_recipe
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from finesight.encode.batch import PackedBatch
from finesight.encode.packing import find_shared_prefix_length, pack
from finesight.encode.renderer import NativeRenderer
from finesight.model.trainable import configure_tuning
from finesight.model.vlm import VisionLanguageModel
from finesight.model.weights_io import build_meta_model, load_model
from finesight.model_folder import ModelFolder, locate_model
from finesight.plan.dry_run import ComputeTarget, PlannedPack, StepTracer
from finesight.plan.run_plan import RunPlan, plan_run
from finesight.plan.settings_search import PlannedModel, build_planned_model
from finesight.plan.step_time import TargetDevice
from finesight.progress import ProgressConsole
from finesight.samples.corpus import load_corpus
from finesight.settings import config
from finesight.settings.recipe import load_recipe
from finesight.train.objectives.objective import fused_linear_cross_entropy
from finesight.train.objectives.sft import Settings
from finesight.train.objectives.sft.loss import SftObjective

GPU = ComputeTarget(is_cuda=True, dtype=torch.bfloat16, capability=(9, 0))
Tune = dict[str, Any]


def make_batch(
    folder: ModelFolder, data: Path, shares_prefix: bool = False, limit: int | None = None
) -> PackedBatch:
    """Pack the samples of a file, with a shared prefix or without."""
    image_rule = (
        None if folder.family == "qwen" else config.PixelRange(min_pixels=784, max_pixels=7056)
    )
    renderer = NativeRenderer(folder, image_rule)
    corpus = load_corpus((config.TrainFileSettings(path=data),))
    samples = [renderer.encode(sample) for sample in corpus.read_samples()[:limit]]
    prefix = find_shared_prefix_length([sample.tokenized for sample in samples])
    return pack(samples, prefix_length=prefix if shares_prefix else 0)


def make_planned_pack(batch: PackedBatch) -> PlannedPack:
    return PlannedPack(
        batch.lengths, batch.grid_thw, batch.num_supervised_tokens, batch.prefix_length
    )


def make_model(
    folder: ModelFolder, dtype: torch.dtype, tune: Tune, device: str = "cpu"
) -> VisionLanguageModel:
    model = load_model(folder, dtype, torch.device(device)).train()
    configure_tuning(model, config.TuneSettings.model_validate(tune), 0)
    return model


def plan_tiny_model(
    target: TargetDevice,
    tune: Tune | None = None,
    nf4_parts: tuple[config.QuantizablePart, ...] = (),
    **train: Any,
) -> PlannedModel:
    """Plan a recipe of finesight-tiny with LoRA unless `tune` tells otherwise."""
    settings = {"model": "finesight-tiny", "data": {"train": "none"}, "output_dir": "none"}
    settings |= {"tune": {"language": "lora"} | (tune or {}), "train": {"num_workers": 4, **train}}
    recipe = config.Recipe.model_validate(settings)
    return build_planned_model(locate_model("finesight-tiny"), recipe, nf4_parts, target)


def make_tracer(folder: ModelFolder, compute: ComputeTarget, tune: Tune) -> StepTracer:
    model = build_meta_model(folder, compute.dtype, (), ()).train()
    configure_tuning(model, config.TuneSettings.model_validate(tune), 0)
    return StepTracer(model, SftObjective(Settings()), compute)


def compute_loss(model: VisionLanguageModel, batch: PackedBatch) -> Tensor:
    device = batch.ids_T.device
    h_LD = model(batch, dropout_seed_1=torch.ones(1, dtype=torch.int32, device=device))
    scale = torch.tensor(1.0, device=device)
    return fused_linear_cross_entropy(h_LD, model.lm_head_weight, batch.labels_L, scale)


def measure_peak(
    folder: ModelFolder,
    batch: PackedBatch,
    dtype: torch.dtype,
    tune: Tune,
    checkpointed_fraction: float,
) -> tuple[int, int]:
    """Return the estimated and measured peak of a forward and backward pass, with gradients."""
    model = make_model(folder, dtype, tune)
    model.activation_checkpointing = checkpointed_fraction
    compute_loss(model, batch).backward()
    model.zero_grad(set_to_none=True)
    # Reference cycles of the previous model must not be freed while memory is measured.
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        compute_loss(model, batch).backward()
    assert profiled.profiler is not None
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    peak_bytes = max(accumulate(sizes, initial=0))
    tracer = make_tracer(folder, ComputeTarget(is_cuda=False, dtype=dtype), tune)
    memory = tracer.trace(make_planned_pack(batch), checkpointed_fraction)
    return memory.total, peak_bytes


def edit_config(task: TinyTask, **values: object) -> None:
    """Change the configuration of the model of a task."""
    file = task.folder / "tiny" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def make_plan(
    task: TinyTask,
    *overrides: str,
    gpu: str | None = "A10",
    gpus: int | None = None,
    **groups: Any,
) -> RunPlan:
    """Plan a recipe of a task with overrides and changed sections."""
    recipe = task.recipe | groups | {"output_dir": str(task.folder / "run")}
    path = write_recipe(task.folder / "recipe.yaml", recipe)
    console = ProgressConsole(Console(file=io.StringIO()))
    return plan_run(load_recipe(path, overrides), gpu, console, gpus)
