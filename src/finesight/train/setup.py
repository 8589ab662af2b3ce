"""Setup of a training run: loads and checks data, model and checkpoint before writing files."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

from finesight import __version__
from finesight.encode.context_shard import SampleShape
from finesight.encode.renderer import Renderer, is_native
from finesight.errors import UserError
from finesight.evaluate.python_functions import hash_functions
from finesight.family_components import FAMILIES
from finesight.files.storage import sha256_file
from finesight.infer.model_loader import resolve_device, resolve_precision
from finesight.metric_components import METRICS
from finesight.model.backend import as_native, load_auto_model
from finesight.model.backend_model import BackendModel
from finesight.model.kernels.runtime import load_compiler
from finesight.model.linear import stacked_row_counts
from finesight.model.lora.peft_io import ADAPTER_WEIGHTS_FILE as ADAPTER_WEIGHTS
from finesight.model.lora.peft_io import load_trainable_adapter
from finesight.model.trainable import configure_tuning
from finesight.model.vlm import PLUGIN_ARCHITECTURES
from finesight.objective_components import DEFAULT_OBJECTIVE
from finesight.optimizer_components import DEFAULT_OPTIMIZER
from finesight.plugins import PluginRecord
from finesight.progress import ProgressConsole
from finesight.reward_components import REWARDS, RewardSettings
from finesight.samples.augmentation import Augmenter
from finesight.samples.prompt_format import PromptFormat
from finesight.settings.config import Recipe, TrainSettings, find_section_owner
from finesight.settings.manifest import Manifest
from finesight.tracker_components import TRACKERS
from finesight.train.checkpoint import (
    Checkpoint,
    CheckpointManager,
    CheckpointState,
    TrainProgress,
    check_resume_config,
)
from finesight.train.cuda_graphs import CudaGraphRunner
from finesight.train.dataset_stats import DatasetStats, SampleStats, check_image_record
from finesight.train.device_loader import DeviceLoader
from finesight.train.flops import FlopCounter, measure_peak_flops
from finesight.train.master_weight_optimizer import LossScaler, LRSchedule, MasterWeightOptimizer
from finesight.train.objectives.objective import Objective
from finesight.train.oom import MemoryBudget
from finesight.train.parallel.distributed import SINGLE_PROCESS, ParallelStrategy, ProcessGroup
from finesight.train.param_audit import ParamAudit
from finesight.train.prefetch import default_num_workers
from finesight.train.recipe_check import (
    CheckedRecipe,
    check_machine,
    check_recipe,
    describe_limits,
    load_run_data,
    resolve_tune,
)
from finesight.train.run_dir import RunDir
from finesight.train.sampler import DistributedSampler, StepSampler
from finesight.train.state import (
    BaseModelRef,
    Hardware,
    RunContext,
    RunData,
    TrainEngine,
    TrainState,
)
from finesight.train.step import forward_backward
from finesight.train.step_dataset import StepDataset

MUTABLE_SETTINGS = {
    "num_workers",
    "vision_cache",
    "parallel",
    "pack_tokens",
    "activation_checkpointing",
    "keep_checkpoints",
    "save_every",
    "device",
    "precision",
}
"""Settings of `train` that may change when a run is resumed.

They do not affect the results, except that `pack_tokens` changes the dropout masks. A change of the
resolved `precision` is still rejected.
"""


def library_versions() -> dict[str, str]:
    """Return the versions of finesight, PyTorch and Python."""
    return {
        "finesight": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def list_train_plugins(train: TrainSettings) -> Iterator[PluginRecord]:
    """Yield the plug-ins of objective and optimizer, then those with sections in the recipe."""
    owners = {component.name: registry for registry, component in train.components}
    for name in train.sections:
        registry = find_section_owner(name)
        if registry is not None:
            owners.setdefault(name, registry)
    for name, registry in owners.items():
        plugin = None if registry.is_built_in(name) else registry.find_plugin(name)
        if plugin is not None:
            yield plugin


def build_manifest(
    recipe: Recipe, base_model: BaseModelRef, renderer: Renderer, prompt_format: PromptFormat
) -> Manifest:
    """Build the manifest of a run, which evaluation, prediction and merging read."""
    family = base_model.folder.family
    settings = recipe.eval
    plugins = [FAMILIES.find_plugin(family)]
    if not FAMILIES.describe(family).architecture:
        plugins.append(PLUGIN_ARCHITECTURES.find_plugin(family))
    plugins += list_train_plugins(recipe.train)
    plugins += [REWARDS.find_plugin(reward.name) for reward in recipe.rewards]
    plugins += [TRACKERS.find_plugin(tracker.kind) for tracker in recipe.track]
    metric = None
    max_new_tokens = None
    if settings is not None:
        plugins.append(METRICS.find_plugin(settings.metric))
        max_new_tokens = settings.max_new_tokens
        if settings.metric in METRICS:
            metric = settings.metric
    enable_thinking = None
    if renderer.renders_reasoning:
        enable_thinking = renderer.has_reasoning
    return Manifest(
        family=family,
        base_model=base_model.name,
        base_fingerprint=base_model.folder.fingerprint(),
        image_rule=renderer.image_rule,
        system_prompt=renderer.system_prompt,
        enable_thinking=enable_thinking,
        eos_token=renderer.tokenizer.id_to_token(renderer.end_ids[0]),
        tune=recipe.tune,
        versions=library_versions(),
        metric=metric,
        max_new_tokens=max_new_tokens,
        prompts=prompt_format.prompts,
        prompt_templates=prompt_format.templates,
        plugins=tuple(filter(None, plugins)),
        sections=(*recipe.train.sections,),
        functions=hash_functions(),
    )


InputCheck = Callable[[RunContext, RunData], None]
"""Check of the inputs of a new run, which raises UserError to reject them."""


def build_state(
    recipe: Recipe,
    run_dir: RunDir,
    console: ProgressConsole,
    resume: bool,
    process_group: ProcessGroup = SINGLE_PROCESS,
    check_inputs: InputCheck | None = None,
) -> TrainState:
    """Load and check everything that a training run needs.

    Small files are read first, so that errors appear before the weights are loaded. With `resume`,
    the newest checkpoint is restored.

    Args:
        console: Console for progress and messages.
        resume: Whether to restore the newest checkpoint.
        check_inputs: Further check of a new run, before the weights are loaded.

    Raises:
        UserError: Settings, data, model or checkpoint are invalid.
    """
    device, dtype = select_device(recipe, process_group)
    # The first use of a GPU takes a second. The thread ends before data loader workers are forked.
    with ThreadPoolExecutor(1) as pool:
        peak_flops = pool.submit(start_device, device, dtype)
        if device.type != "cuda":
            wait([peak_flops])  # the other work would slow down the measured one
        checked = check_recipe(recipe)
    if not process_group.is_single_process:
        is_native_model = is_native(checked.base_model.folder)
        check_sharding(recipe.train, device.type, is_native=is_native_model)
    hardware = build_hardware(recipe, device, dtype, peak_flops.result(), process_group)
    data = build_data(checked, hardware, console)
    run = build_run(checked, hardware, data, run_dir, console)
    checkpoint = load_latest_checkpoint(run, resume)
    if checkpoint is not None:
        _check_resumed_run(run, data, checkpoint.state)
    elif check_inputs is not None:
        with process_group.sync_errors():
            if process_group.is_main:
                check_inputs(run, data)
    model = load_base_model(recipe, checked.base_model, hardware, console)
    engine = build_train_engine(run, data, model, checked.objective)
    state = TrainState(run, data, engine, build_progress(recipe))
    if checkpoint is not None:
        state.load_state_dict(checkpoint)
    state.apply_budget(state.progress.budget)
    _log_overrides(state)
    return state


def select_device(
    recipe: Recipe, process_group: ProcessGroup = SINGLE_PROCESS
) -> tuple[torch.device, torch.dtype]:
    """Select the device and the compute dtype of this rank.

    Raises:
        UserError: The machine does not support the recipe.
    """
    device = process_group.select_device(resolve_device(recipe.train.device))
    dtype = resolve_precision(recipe.train.precision, device)
    check_machine(recipe, device)
    return device, dtype


def start_device(device: torch.device, dtype: torch.dtype) -> float:
    """Load the libraries of a device, and return its measured peak FLOP/s.

    Raises the errors of its first use, which a run cannot do without.
    """
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # a setting of each thread
    peak_flops = measure_peak_flops(device, dtype)
    load_compiler(device)
    return peak_flops


def build_hardware(
    recipe: Recipe,
    device: torch.device,
    dtype: torch.dtype,
    peak_flops: float,
    process_group: ProcessGroup = SINGLE_PROCESS,
) -> Hardware:
    """Build the hardware settings of this rank."""
    num_workers = recipe.train.num_workers
    if num_workers is None:
        num_workers = default_num_workers(device, process_group.local_world_size)
    return Hardware(device, dtype, num_workers, peak_flops, process_group)


def build_data(checked: CheckedRecipe, hardware: Hardware, console: ProgressConsole) -> RunData:
    """Load and check the samples, and warn about limits below the lengths of the answers."""
    data = load_run_data(checked, hardware.num_workers, console)
    for warning in filter(None, describe_limits(checked.recipe, data)):
        console.log(warning)
    return data


def build_run(
    checked: CheckedRecipe,
    hardware: Hardware,
    data: RunData,
    run_dir: RunDir,
    console: ProgressConsole,
) -> RunContext:
    """Build the settings, files and hardware of a run, with what must not change on resume."""
    recipe = checked.recipe
    sampling = recipe.needs.sampling
    return RunContext(
        recipe=recipe,
        run_dir=run_dir,
        checkpoint_manager=CheckpointManager(run_dir.checkpoint_dir, recipe.train.keep_checkpoints),
        hardware=hardware,
        base_model=checked.base_model,
        resume_config=_build_resume_config(recipe, hardware, checked.base_model, data),
        console=console,
        episodes=None if sampling is None else sampling.episodes,
    )


def build_progress(recipe: Recipe) -> TrainProgress:
    """Build the progress of a run before its first step."""
    budget = MemoryBudget(
        pack_tokens=recipe.train.pack_tokens,
        activation_checkpointing=recipe.train.activation_checkpointing,
    )
    return TrainProgress(budget=budget, step=0, last_eval_step=-1, best=None)


def build_train_engine(
    run: RunContext, data: RunData, model: BackendModel, objective: Objective[Any]
) -> TrainEngine:
    """Distribute the model over the ranks, and build all that the steps of a run use.

    The audit records the parameters of the base model, before a checkpoint is restored.
    """
    recipe = run.recipe
    hardware = run.hardware
    objective.load_models(recipe.train)
    flop_counter = None
    if model.capabilities.flops:
        flop_counter = FlopCounter(as_native(model))
    sampler = build_rank_sampler(
        data.sampler,
        hardware.process_group,
        data.train.stats,
        flop_counter,
        recipe.train.pack_tokens,
        can_split_samples=recipe.needs.supports_splitting and model.supports_splitting,
    )
    # Read before the model is distributed, which replaces its parameters.
    stacked_rows = stacked_row_counts(model)
    parallel = parallelize_model(recipe, model, hardware.dtype, hardware.process_group)
    optimizer = build_optimizer(recipe, hardware.process_group, parallel, stacked_rows)
    model.train()
    return TrainEngine(
        model=model,
        objective=objective,
        parallel=parallel,
        step_dataset=build_step_dataset(recipe, data, sampler, model),
        device_loader=build_device_loader(model, parallel, hardware),
        optimizer=optimizer,
        graph_runner=CudaGraphRunner(
            forward_backward,
            model,
            objective,
            list(parallel.trainable_params.values()),
            is_local=not parallel.is_sharded,
        ),
        loss_scaler=LossScaler(is_enabled=hardware.dtype == torch.float16),
        lr_schedule=LRSchedule(recipe.train, len(data.sampler)),
        flop_counter=flop_counter,
        param_audit=ParamAudit(model, optimizer.master_weights()),
    )


def build_optimizer(
    recipe: Recipe,
    process_group: ProcessGroup,
    parallel: ParallelStrategy,
    stacked_rows: Mapping[str, Sequence[int]],
) -> MasterWeightOptimizer:
    """Build the optimizer of the trainable parameters of this rank.

    Args:
        stacked_rows: Result of `stacked_row_counts`.
    """
    optimizer = MasterWeightOptimizer(parallel.trainable_params, recipe.train, stacked_rows)
    if not (process_group.is_single_process or parallel.is_sharded):
        optimizer.use_flat_gradients()
    optimizer.keep_out_of_forks()
    return optimizer


def build_step_dataset(
    recipe: Recipe, data: RunData, sampler: StepSampler, model: BackendModel
) -> StepDataset:
    """Build the dataset of the steps of this rank, with augmented images if the recipe has them."""
    step_dataset = data.train.build_step_dataset(
        data.renderer,
        sampler,
        recipe.train.pack_tokens,
        recipe.data,
        use_shared_prefix=model.capabilities.batches,
    )
    return replace(step_dataset, augmenter=Augmenter.from_recipe(recipe))


def _check_resumed_run(run: RunContext, data: RunData, stored: CheckpointState) -> None:
    """Verify that a run has the settings, samples and images of its checkpoint.

    Raises:
        UserError: They differ.
    """
    process_group = run.hardware.process_group
    current = run.resume_config
    folder = run.checkpoint_manager.step_dir(stored.step)
    suggest = partial(run.run_dir.suggest_restart, run.recipe, folder)
    recorded = dict(stored.resume_config)
    for name in ("model weights", "rewards"):  # which older checkpoints do not have
        if name in current:
            recorded.setdefault(name, current[name])
    # Changed images may explain other samples, so the samples are compared after the images.
    samples = {name: value for name, value in recorded.items() if name.startswith("samples of")}
    check_resume_config(recorded, current | samples, folder, suggest)
    with process_group.sync_errors():
        if process_group.is_main:
            check_image_record(run.run_dir, data.splits, run.console.log)
    check_resume_config(recorded, current, folder, suggest)


def build_device_loader(
    model: BackendModel, parallel: ParallelStrategy, hardware: Hardware
) -> DeviceLoader:
    """Build the loader of packs, which pads those of a native model in 16 bits on a CPU."""
    is_16_bit_cpu = hardware.device.type == "cpu" and hardware.dtype != torch.float32
    return DeviceLoader(
        parallel,
        hardware.device,
        pads_shapes=is_16_bit_cpu and model.capabilities.batches,
        padding_merge_size=model.padding_merge_size,
    )


def build_rank_sampler(
    sampler: StepSampler,
    process_group: ProcessGroup,
    stats: DatasetStats,
    flop_counter: FlopCounter | None,
    pack_tokens: int,
    *,
    can_split_samples: bool,
) -> StepSampler:
    """Create the step sampler of this rank, balanced by estimated FLOPs.

    The cost ignores the shared prefix, which adds almost no computation.

    Args:
        sampler: Sampler of complete steps, returned unchanged in a single-process run.
        stats: Statistics of the dataset. After a partial scan, all ranks get the same number of
            samples, because the ranks must agree on the costs.
        flop_counter: Counter that estimates the cost of a sample; None to use its tokens.
        can_split_samples: Split long samples over all ranks (context parallelism).
    """
    if process_group.is_single_process:
        return sampler
    if not stats.is_complete:
        return DistributedSampler(sampler, process_group, lambda index: 1.0, None, pack_tokens)
    samples = dict(zip(stats.scanned_indices, stats.sample_stats, strict=True))

    def estimate_cost(index: int) -> float:
        return estimate_sample_cost(samples[index], stats.prefix_length, flop_counter)

    def count_tokens(index: int) -> int:
        return samples[index].num_packed_tokens

    count_fn = None
    if can_split_samples:
        count_fn = count_tokens
    return DistributedSampler(sampler, process_group, estimate_cost, count_fn, pack_tokens)


def estimate_sample_cost(
    sample: SampleStats, prefix_length: int, flop_counter: FlopCounter | None
) -> float:
    """Return the FLOPs of a sample without the shared prefix; its tokens without a counter."""
    lengths = (max(0, sample.num_packed_tokens - prefix_length),)
    shape = SampleShape(lengths, sample.grid_thw, sample.num_supervised_tokens)
    return (flop_counter and flop_counter.count(shape)) or sample.num_packed_tokens


def _log_overrides(state: TrainState) -> None:
    """Log a memory budget of the checkpoint that differs from the recipe, and split samples."""
    console = state.run.console
    requested = build_progress(state.run.recipe).budget
    if state.progress.budget != requested:
        change = state.progress.budget.describe_change(requested)
        console.log(f"continuing with {change}: a resumed run keeps its reduced memory budget")
    max_tokens = state.max_unsplit_tokens
    if max_tokens is None:
        return
    samples = state.data.train.stats.sample_stats
    if any(sample.num_packed_tokens > max_tokens for sample in samples):
        console.log(f"samples of more than {max_tokens:,} tokens are split over all ranks")


def load_base_model(
    recipe: Recipe, base_model: BaseModelRef, hardware: Hardware, console: ProgressConsole
) -> BackendModel:
    """Load the base model, and set up its trainable and frozen parts."""
    with console.activity(f"loading the weights of {recipe.model}"):
        model = load_auto_model(
            base_model.folder,
            hardware.dtype,
            hardware.device,
            recipe.tune.quantize.nf4 or (),
            fp8_parts=recipe.tune.quantize.fp8 or (),
        )
    configure_tuning(model, resolve_tune(recipe), recipe.train.seed)
    if base_model.adapter is not None:
        load_trainable_adapter(model, base_model.adapter, base_folder=base_model.folder)
    if model.limitations:
        console.log(f"{base_model.folder.family} {model.limitations}")
    return model


def load_latest_checkpoint(run: RunContext, resume: bool) -> Checkpoint | None:
    """Load the checkpoint to resume from; None to start with step 0.

    Only the main process verifies the digests; the other ranks load the same step.
    """
    checkpoint = None
    process_group = run.hardware.process_group
    with process_group.sync_errors():
        if process_group.is_main and resume:
            checkpoint = run.checkpoint_manager.load_latest(run.console.log)
    step_text = ""
    if checkpoint is not None:
        step_text = str(checkpoint.state.step)
    step_text = process_group.broadcast_str(step_text)
    if step_text and not process_group.is_main:
        remedy = "start again with --resume"
        checkpoint = run.checkpoint_manager.load(int(step_text), remedy, is_verified=True)
    return checkpoint


def _build_resume_config(
    recipe: Recipe, hardware: Hardware, base_model: BaseModelRef, data: RunData
) -> dict[str, Any]:
    """Collect the settings and fingerprints that must be the same when the run is resumed."""
    adapter = base_model.adapter
    renderer = data.renderer
    settings: dict[str, Any] = {
        "model": base_model.folder.fingerprint(),
        "model weights": base_model.folder.fingerprint(num_blocks=64),
        "adapter": sha256_file(adapter / ADAPTER_WEIGHTS) if adapter else None,
        "image": renderer.image_rule.model_dump(mode="json"),
        "data.system_prompt": renderer.system_prompt,
        "data.max_length": recipe.data.max_length,
        "data.on_invalid_sample": recipe.data.on_invalid_sample,
    }
    if renderer.supervise != "all":
        settings["data.supervise"] = renderer.supervise
    settings |= recipe.data.model_dump(include={"augment"}, exclude_none=True)
    settings["train.precision"] = hardware.precision
    for name, split in (("train", data.train), ("eval", data.validation)):
        fingerprint = None
        signature = ""
        if split is not None:
            fingerprint = split.corpus.fingerprint
            indices = split.stats.sample_indices
            # After a partial scan, a list of millions of indices would be too long.
            signature = f"all of {len(indices)}"
            if split.stats.is_complete:
                signature = json.dumps(indices)
        settings[f"data.{name}"] = fingerprint
        settings[f"samples of data.{name}"] = hashlib.sha256(signature.encode()).hexdigest()
    tune = recipe.tune.model_dump(mode="json")
    settings |= {f"tune.{name}": value for name, value in tune.items()}
    unused = recipe.train.sections.keys() - {recipe.train.objective, recipe.train.optimizer}
    train = recipe.train.model_dump(mode="json", exclude=MUTABLE_SETTINGS | unused)
    if recipe.train.component.name == DEFAULT_OBJECTIVE:
        # Checkpoints of earlier versions have no objective.
        del train["objective"]
    settings |= {f"train.{name}": value for name, value in train.items()}
    if recipe.needs.rewards:
        settings["rewards"] = [_describe_reward(reward) for reward in recipe.rewards]
    # Checkpoints of earlier versions have a seed of their own for the order of the samples.
    settings["train.data_seed"] = recipe.train.seed
    resume_config: dict[str, Any] = json.loads(json.dumps(settings))
    return resume_config


def _describe_reward(reward: RewardSettings) -> dict[str, Any]:
    """Return the settings of a reward. The folder of its Python file may change on resume."""
    # Recipes of runs have the options of all built-in rewards, null for those of others.
    settings: dict[str, Any] = {}
    for name, value in reward.model_dump(mode="json").items():
        if value is not None:
            settings[name] = value
    settings["name"] = Path(reward.name).name
    return settings


def parallelize_model(
    recipe: Recipe, model: BackendModel, dtype: torch.dtype, process_group: ProcessGroup
) -> ParallelStrategy:
    """Distribute a model over the ranks by `train.parallel`, which `check_sharding` accepts."""
    mode = recipe.train.parallel
    if mode == "ddp" or process_group.is_single_process:
        return ParallelStrategy(model, process_group)
    # Imported on demand, because the FSDP modules of torch take a second to import.
    from finesight.train.parallel.fsdp import FSDPStrategy

    return FSDPStrategy(as_native(model), dtype, mode)


def check_sharding(train: TrainSettings, device_type: str, *, is_native: bool) -> None:
    """Verify that several ranks can shard a model as `train.parallel` requires.

    Args:
        device_type: Type of the device of the weights, `cpu` or `cuda`.
        is_native: Whether the model family has a native implementation.

    Raises:
        UserError: The model, the device or the optimizer does not support the mode.
    """
    mode = train.parallel
    if mode == "ddp":
        return
    if not is_native:
        _raise_unsupported(mode, "models of the transformers backend")
    if mode == "fsdp_offload" and device_type == "cpu":
        _raise_unsupported(mode, "models on a CPU")
    if not train.optimizer_component.supports_sharding:
        _raise_unsupported(mode, f"the state of train.optimizer={train.optimizer}")


def _raise_unsupported(mode: str, feature: str) -> NoReturn:
    raise UserError(
        f"train.parallel={mode} does not support {feature}",
        where="train.parallel",
        expected=f"a natively implemented model family and train.optimizer={DEFAULT_OPTIMIZER}",
        remedy="set train.parallel=ddp, which replicates the model on every rank",
    )
