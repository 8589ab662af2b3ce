"""Checks of a recipe before a run: all that training would refuse at its set-up, without weights.

Every command that accepts a recipe runs the same checks. `check_recipe` reads the small files of
the model and the adapter, `load_run_data` the samples.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finesight.encode.answer_lengths import describe_cut_answers
from finesight.encode.renderer import Renderer, is_native
from finesight.encode.tokenization import EncodedSample
from finesight.errors import Step, UserError
from finesight.evaluate import custom_metric
from finesight.evaluate.environment import EpisodeError
from finesight.evaluate.episode import add_tools, build_start, open_environment
from finesight.evaluate.eval_case import EvalCase, get_reference_answer
from finesight.evaluate.eval_result import select_eval_samples
from finesight.evaluate.reward_scorer import RewardScorer
from finesight.evaluate.score_function import RewardError
from finesight.evaluate.task_metrics import check_references, check_task_metric
from finesight.family_components import FAMILIES
from finesight.files.hub_address import is_offline
from finesight.files.storage import require_free_space
from finesight.infer.model_loader import resolve_device, resolve_model_source
from finesight.model.lora.peft_io import ADAPTER_CONFIG_FILE as ADAPTER_CONFIG
from finesight.model.lora.peft_io import AdapterMismatchError, load_trainable_adapter, read_adapter
from finesight.model.quant.fp8 import require_fp8_support
from finesight.model.quant.nf4 import import_bitsandbytes
from finesight.model.trainable import MODEL_PARTS, configure_tuning, infer_tuning
from finesight.model.weights_io import build_checked_model, build_meta_model
from finesight.model_folder import TINY_MODEL, get_portable_name, resolve_model_path
from finesight.objective_components import OBJECTIVES, Needs
from finesight.progress import ProgressConsole
from finesight.reward_components import RewardSettings
from finesight.samples.image_file import CorruptImageError
from finesight.samples.sample import LocatedSample, Sample
from finesight.settings.config import QuantizeSettings, Recipe, TuneSettings
from finesight.settings.manifest import MANIFEST_FILE, find_run_dir, load_manifest
from finesight.settings.recipe_template import StartModel, describe_run
from finesight.tracker_components import require_trackers
from finesight.train.checkpoint import resolve_save_interval
from finesight.train.dataset_stats import TrainingData, list_image_paths, load_training_data
from finesight.train.master_weight_optimizer import LRSchedule, load_optimizer_class
from finesight.train.objectives.objective import Objective
from finesight.train.prefetch import default_num_workers
from finesight.train.run_dir import RunDir
from finesight.train.sampler import TrainSampler
from finesight.train.state import BaseModelRef, RunData

MAX_TRUNCATED_SHARE = 0.5
"""Share of truncated responses up to which missing or equal rewards have other reasons."""


@dataclass(frozen=True, slots=True)
class CheckedRecipe:
    """Recipe that `check_recipe` accepts, with its base model, renderer and objective.

    Attributes:
        runs_functions: Whether the Python file of a custom metric may be executed.
    """

    recipe: Recipe
    base_model: BaseModelRef
    renderer: Renderer
    objective: Objective[Any]
    runs_functions: bool = True


def check_recipe(
    recipe: Recipe, *, runs_functions: bool = True, needs_weights: bool = True
) -> CheckedRecipe:
    """Check a recipe without its samples, and without the machine of the run.

    Args:
        runs_functions: Whether the Python file of a custom metric may be executed.
        needs_weights: Whether the model must be complete. The weights of a hub model may be
            missing, because the training downloads them.

    Raises:
        UserError: Training would refuse the recipe.
    """
    base_model = resolve_base_model(recipe)
    renderer = base_model.build_renderer(recipe)
    objective = build_objective(recipe, base_model.folder.family)
    load_optimizer_class(recipe.train.optimizer)
    for _, name, copy_name in custom_metric.list_functions(recipe):
        path = custom_metric.resolve_metric_path(name, recipe.output_dir, copy_name=copy_name)
        location = custom_metric.parse_metric_path(path)
        assert location is not None, f"{path} is a function of a file"
        custom_metric.require_metric_file(location[0])
    if recipe.eval is not None and recipe.data.eval:
        metric = custom_metric.resolve_metric_path(recipe.eval.metric, recipe.output_dir)
        if runs_functions or custom_metric.parse_metric_path(metric) is None:
            check_task_metric(metric)
    tune = recipe.tune
    names_layers = base_model.adapter is not None or tune.lora.target_modules is not None
    names_layers = names_layers or tune.quantize != QuantizeSettings()
    # The layers of the transformers backend are unknown without the weights.
    if is_native(base_model.folder) and (needs_weights or names_layers):
        check_tuning(recipe, base_model, needs_weights=needs_weights)
    objective.check_renderer(renderer)
    return CheckedRecipe(recipe, base_model, renderer, objective, runs_functions)


def check_tuning(recipe: Recipe, base_model: BaseModelRef, *, needs_weights: bool) -> None:
    """Verify that the section `tune` fits the model and its adapter.

    The model has no storage. The headers of its weights are read if they are on this machine.

    Raises:
        UserError: A file or tensor of the model is missing, a target of LoRA does not exist, or the
            adapter has other layers, ranks or scales than the recipe.
    """
    folder, tune = base_model.folder, resolve_tune(recipe)
    nf4_parts = tune.quantize.nf4 or ()
    fp8_parts = tune.quantize.fp8 or ()
    if needs_weights and is_offline():
        folder.fetch_weights()  # raises an error if files are missing
    elif needs_weights:
        folder.require_space()
    if needs_weights and (is_offline() or folder.is_local) and not folder.has_pickled_weights:
        model, _ = build_checked_model(folder, torch.bfloat16, nf4_parts, fp8_parts=fp8_parts)
    else:
        model = build_meta_model(folder, torch.bfloat16, nf4_parts, fp8_parts)
    configure_tuning(model, tune, recipe.train.seed)
    if base_model.adapter is None:
        return
    try:
        load_trainable_adapter(model, base_model.adapter, base_folder=folder)
    except AdapterMismatchError as error:
        own = read_adapter_tuning(base_model)
        if own is not None:
            overrides = " ".join(_list_overrides(tune, own))
            error.remedy = f"add {overrides}, as the adapter was trained, or merge the adapter"
            error.remedy += " and start from the merged model"
        raise


def read_adapter_tuning(base_model: BaseModelRef) -> TuneSettings | None:
    """Return the section `tune` of an adapter; None if no section describes it."""
    if base_model.manifest is not None:
        return base_model.manifest.tune
    if base_model.adapter is None or not is_native(base_model.folder):
        return None
    model = build_meta_model(base_model.folder, torch.bfloat16, (), ())
    spec, _ = read_adapter(base_model.adapter, model.adapter_key_mappings)
    return infer_tuning(model, spec.configs, spec.dropout)


def _list_overrides(current: TuneSettings, wanted: TuneSettings) -> list[str]:
    """List the overrides that change the parts and adapters of a recipe."""
    lora = wanted.lora
    targets = "null" if lora.target_modules is None else f"[{','.join(lora.target_modules)}]"
    settings = {
        **{f"tune.{part}": (dict(current)[part], dict(wanted)[part]) for part in MODEL_PARTS},
        "tune.lora.rank": (current.lora.rank, lora.rank),
        "tune.lora.alpha": (current.lora.alpha, lora.alpha),
        "tune.lora.target_modules": (current.lora.target_modules, lora.target_modules),
    }
    texts = {"tune.lora.alpha": f"{lora.alpha:g}", "tune.lora.target_modules": targets}
    return [f"{name}={texts.get(name, new)}" for name, (old, new) in settings.items() if old != new]


def describe_start(name: str) -> StartModel:
    """Return the model of a new recipe, and the settings that follow from it.

    Raises:
        UserError: The model does not exist, or no recipe can continue its adapter.
    """
    source = resolve_model_source(name)
    own = describe_run(name, resolve_model_path(name))
    if own is not None:
        return own
    is_tiny = get_portable_name(source.folder) == TINY_MODEL
    if source.adapter is None:
        return StartModel(name, is_tiny)
    tune = read_adapter_tuning(BaseModelRef(name, source.folder, source.adapter, None))
    if tune is None:
        raise UserError(
            f"no section tune has the layers and ranks of the adapter {name}",
            where="model",
            expected="an adapter with one rank and scale, on layers that names select",
            remedy=Step("merge", {"source": name, "out": "OUT"}, "merge it, and start from OUT"),
        )
    return StartModel(name, is_tiny, tune)


def resolve_base_model(recipe: Recipe) -> BaseModelRef:
    """Resolve the `model` and `adapter` settings of a recipe.

    `model` is a model folder, a hub name, an adapter folder, a run directory or a LoRA checkpoint.

    Raises:
        UserError: The model or adapter does not exist, or the recipe specifies two adapters.
    """
    parts = resolve_model_source(recipe.model)
    # Manifests store this name and are read in other working directories, and the path of the
    # packaged model differs between installations.
    is_path = Path(recipe.model).expanduser().exists()
    name = get_portable_name(parts.folder) if is_path else recipe.model
    adapter = recipe.adapter
    if adapter is None:
        return BaseModelRef(name, parts.folder, parts.adapter, parts.manifest)
    if parts.adapter is not None:
        raise UserError(
            f"model {recipe.model} already has an adapter, and adapter is {adapter}",
            where="adapter",
            expected="a single adapter to continue",
            remedy="remove adapter, or set model to the base model of the adapter",
        )
    manifest = parts.manifest
    run_dir = find_run_dir(adapter)
    if os.path.isfile(run_dir / MANIFEST_FILE):
        if load_manifest(run_dir / MANIFEST_FILE).tune.has_mode("full"):
            raise UserError(
                f"the run {run_dir} has fully trained parts, which are not in an adapter",
                where="adapter",
                expected="a run with LoRA only, or one of its checkpoints",
                remedy=f"remove adapter, and set model: {run_dir} after the end of that run",
            )
        parts.folder.fetch_weights()  # needed for the fingerprint of the base model
        source = resolve_model_source(str(adapter), base=str(parts.folder.path))
        manifest, adapter = source.manifest, source.adapter or adapter
    if not os.path.isfile(adapter / ADAPTER_CONFIG) and os.path.isdir(adapter / "adapter"):
        adapter = adapter / "adapter"
    if not os.path.isfile(adapter / ADAPTER_CONFIG):
        raise UserError(
            f"no {ADAPTER_CONFIG} in {adapter}",
            where="adapter",
            expected="an adapter folder, a run with an adapter, or one of its LoRA checkpoints",
            remedy="correct the path",
        )
    return BaseModelRef(name, parts.folder, adapter, manifest)


def build_objective(recipe: Recipe, family: str) -> Objective[Any]:
    """Create the objective of a run.

    Raises:
        UserError: The model family does not support `train.objective`, or its plug-in does not
            work.
    """
    train = recipe.train
    is_supported = family in FAMILIES and not FAMILIES.describe(family).depends_on_length
    if not (is_supported or recipe.needs.supports_all_families):
        supported = [one.name for one in FAMILIES.list_available() if not one.depends_on_length]
        raise UserError(
            f"train.objective={train.objective} does not support the family {family}",
            where="train.objective",
            expected=f"one of the families {', '.join(supported)}",
            remedy="choose another model, or set train.objective=sft",
        )
    component = train.component
    objective_class = OBJECTIVES.load_implementation(component.name, Objective)
    settings = component.settings_of(train)
    objective: Objective[Any] = OBJECTIVES.call(component.name, objective_class, settings)
    problem = _find_missing_method(recipe.needs, objective)
    if problem is not None:
        raise OBJECTIVES.build_error(component.name, component.implementation, problem, Objective)
    return objective


def _find_missing_method(needs: Needs, objective: Objective[Any]) -> str | None:
    """Return which method of an objective is missing for its needs; None if it has all."""
    required = {
        "sampling": (needs.has_rollouts, "sample_steps"),
        "teacher": (needs.teacher is not None, "load_models"),
        "reference": (needs.reference, "prepare"),
        "has_baseline": (objective.has_baseline, "set_baseline"),
    }
    cls = type(objective)
    for need, (is_given, method) in required.items():
        if is_given and getattr(cls, method) is getattr(Objective, method):
            return f"{cls.__name__} has {need}, but no method {method}"
    return None


def resolve_tune(recipe: Recipe) -> TuneSettings:
    """Return the section `tune`, without dropout for objectives that compare likelihoods."""
    if recipe.needs.supports_dropout:
        return recipe.tune
    lora = recipe.tune.lora.model_copy(update={"dropout": 0.0})
    return recipe.tune.model_copy(update={"lora": lora})


def check_trainable_parts(tune: TuneSettings, data: TrainingData, sampler: TrainSampler) -> None:
    """Verify that the samples of a run give every trainable part of the model a gradient.

    Raises:
        UserError: Vision encoder or merger are trainable, but the run has no images.
    """
    modes = {"vision": tune.vision, "merger": tune.merger}
    parts = [part for part, mode in modes.items() if mode != "frozen"]
    indices = (index for step in range(len(sampler)) for index in sampler.batch_indices(step))

    def has_images(index: int) -> bool:
        with suppress(UserError):  # Samples beyond a partial scan may be invalid.
            return bool(list_image_paths(data.corpus.read_validated(index)))
        return False

    if parts and not any(map(has_images, indices)):
        raise UserError(
            f"no sample of this run has an image, so no gradient would reach {' and '.join(parts)}",
            where=f"tune.{parts[0]}",
            expected="images or videos, which give these parts a gradient",
            remedy="add samples with images, or set"
            f" {' and '.join(f'tune.{part}=frozen' for part in parts)}",
        )


def check_rewards(rewards: Sequence[RewardSettings], run: Path | None, sample: Sample) -> None:
    """Score the reference of a sample and an empty answer by all rewards.

    Raises:
        UserError: A score, a file, a function or a package is missing, or a function fails.
    """
    if not rewards:
        return
    texts, boxes = get_reference_answer(sample)
    answers = (texts[0], boxes), ("", ())
    try:
        with RewardScorer(rewards, run) as scorer:
            scorer.score([EvalCase(*answer, texts, boxes, sample.id) for answer in answers])
    except RewardError as error:
        error.remedy = "correct it; it was called with a reference and with an empty answer"
        raise


def check_environment(recipe: Recipe, renderer: Renderer, samples: Iterable[LocatedSample]) -> None:
    """Try an episode without calls for the first readable sample, if there is an environment.

    Raises:
        UserError: The file fails, its class is no environment, or the episode fails.
    """
    sampling = recipe.needs.sampling
    if sampling is None or sampling.episodes is None:
        return
    with open_environment(sampling.episodes, recipe.output_dir) as environment:
        found = _find_readable(renderer, (add_tools(one, environment.tools) for one in samples))
        if found is None:
            return
        located, prompt = found
        references = get_reference_answer(located.sample, has_reasoning=renderer.renders_reasoning)
        start = build_start(located, prompt.tokenized, references, renderer.native, seed=0)
        try:
            with closing(environment.start_episode(start.row, start.images)) as session:
                if environment.has_reward:
                    session.get_reward()
        except EpisodeError as error:
            raise UserError(
                f"an episode without calls failed: {error.what}",
                where=error.where,
                expected=f"an environment that starts for sample {located.sample.id!r}",
                remedy=f"correct the environment {sampling.episodes.environment}",
            ) from error


def _find_readable(
    renderer: Renderer, samples: Iterable[LocatedSample]
) -> tuple[LocatedSample, EncodedSample] | None:
    """Return the first sample with readable images, and its prompt. The run skips others."""
    for located in samples:
        with suppress(CorruptImageError):
            return located, renderer.encode_prompt(located)
    return None


def check_machine(recipe: Recipe, device: torch.device) -> None:
    """Verify the packages and the device that a run needs on this machine.

    Raises:
        UserError: A package is missing, or the device does not support a setting.
    """
    if recipe.tune.quantize.nf4:
        import_bitsandbytes("tune.quantize.nf4")
    if recipe.tune.quantize.fp8:
        require_fp8_support(device, "tune.quantize.fp8")
    require_trackers(recipe.track)


def load_run_data(checked: CheckedRecipe, num_workers: int, console: ProgressConsole) -> RunData:
    """Load the samples of a run, and check them against the recipe.

    Raises:
        UserError: Training would refuse the samples.
    """
    recipe = checked.recipe
    train, validation = load_training_data(recipe, checked.renderer, num_workers, console)
    renderer = train.select_thinking_mode(checked.renderer)
    sampler = TrainSampler(train.corpus, train.stats.sample_indices, recipe.train)
    LRSchedule(recipe.train, len(sampler))  # rejects a warmup beyond the end
    check_trainable_parts(recipe.tune, train, sampler)
    check_rewards(recipe.rewards, recipe.output_dir, train.first_sample)
    check_environment(recipe, renderer, map(train.corpus.__getitem__, train.stats.sample_indices))
    if recipe.eval is not None and validation is not None:
        indices = select_eval_samples(validation.stats.sample_indices, recipe.eval.limit)
        samples = [validation.corpus[index].sample for index in indices]
        check_eval_references(checked, samples)
    return RunData(renderer, train, validation, sampler)


def describe_limits(recipe: Recipe, data: RunData) -> Iterator[str]:
    """Yield warnings about limits of generated tokens below the lengths of the answers."""
    sampling = recipe.needs.sampling
    if sampling is not None:
        setting = f"{sampling.section}.max_completion_length"
        lengths = list_answer_lengths(data.train)
        yield describe_cut_answers(
            lengths, sampling.max_completion_length, setting, "reference answer"
        )
    if recipe.eval is not None and data.validation is not None:
        lengths = list_answer_lengths(data.validation)
        limit = recipe.eval.max_new_tokens
        yield describe_cut_answers(lengths, limit, "eval.max_new_tokens", "validation answer")


def list_answer_lengths(data: TrainingData) -> list[int]:
    """Return the numbers of tokens of the answers of all scanned samples."""
    return [stats.num_answer_tokens for stats in data.stats.sample_stats]


def suggest_completion_length(recipe: Recipe, data: TrainingData) -> str:
    """Return the remedy for responses that reach `max_completion_length`."""
    sampling = recipe.needs.sampling
    assert sampling is not None, "a run without responses"
    section = sampling.section
    setting = f"{section}.max_completion_length"
    lengths = list_answer_lengths(data)
    longest = max(lengths)
    if describe_cut_answers(lengths, sampling.max_completion_length, setting, "reference answer"):
        return f"set {setting} to {longest} or more, the tokens of the longest reference answer"
    return (
        f"raise {setting}, lower {section}.temperature, or train with train.objective=sft first:"
        f" the reference answers have up to {longest} tokens, and the responses do not end"
    )


def check_training(recipe: Recipe, console: ProgressConsole) -> None:
    """Check a recipe as a training on this machine does before it loads the weights.

    Raises:
        UserError: Training would refuse the recipe.
    """
    RunDir(recipe.output_dir).check_available(resume=False)
    device = resolve_device(recipe.train.device)
    check_machine(recipe, device)
    num_workers = recipe.train.num_workers
    if num_workers is None:
        num_workers = default_num_workers(device, 1)
    load_run_data(check_recipe(recipe), num_workers, console)


def check_eval_references(checked: CheckedRecipe, samples: Sequence[Sample]) -> None:
    """Verify that the answers of validation samples have what the metric compares.

    Raises:
        UserError: A sample has no reference answer, or the answers do not fit the metric.
    """
    settings = checked.recipe.eval
    assert settings is not None, "no metric"
    metric = custom_metric.resolve_metric_path(settings.metric, checked.recipe.output_dir)
    has_reasoning = checked.renderer.renders_reasoning
    references = [get_reference_answer(one, has_reasoning=has_reasoning) for one in samples]
    if checked.runs_functions or custom_metric.parse_metric_path(metric) is None:
        check_references(metric, references, [one.id for one in samples])


def check_disk_space(
    recipe: Recipe,
    model: nn.Module,
    num_trainable: int,
    checkpoint_bytes: int,
    total_steps: int,
    num_finished: int = 0,
    num_existing: int = 0,
) -> None:
    """Verify that the disk has space for the checkpoints and trained weights of a run.

    The estimate includes the retained checkpoints, the best checkpoint and one that is being
    written. Checkpoints that are already on disk need no more space.

    Args:
        model: Model of the run, whose tensors may have no storage.
        num_trainable: Number of trainable parameters.
        num_finished: Number of finished steps.
        num_existing: Number of checkpoints on disk.

    Raises:
        UserError: There is not enough free space.
    """
    interval = resolve_save_interval(recipe.train, total_steps)
    num_remaining = 1
    max_kept = 1
    if interval:
        num_remaining += (total_steps - num_finished) // interval
        max_kept = num_remaining + 1
    max_kept = min(recipe.train.keep_checkpoints + 2, max_kept)
    num_new = max(1, max_kept - num_existing)
    weight_bytes = 0
    if recipe.tune.has_mode("lora"):
        weight_bytes += 4 * num_trainable
    if recipe.tune.has_mode("full"):
        weight_bytes += sum(parameter.nbytes for parameter in model.parameters())
    require_free_space(
        recipe.output_dir,
        num_new * checkpoint_bytes + weight_bytes,
        f"{num_new} checkpoints of {checkpoint_bytes / 1e9:.3g} GB and"
        f" {weight_bytes / 1e9:.3g} GB of trained weights",
        "free disk space, set another output_dir, or lower train.keep_checkpoints",
    )
