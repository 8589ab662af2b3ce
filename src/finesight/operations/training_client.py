"""Training client: the pieces of a training loop as calls of a Python program.

A program decides what happens in a step: which samples, which loss, which learning rate. The client
has the model, its optimizer and the encoding, and writes files only on request.

Shapes: L supervised tokens.
"""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from numbers import Real
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import BaseModel
from torch import Tensor

from finesight.encode.batch import PackedBatch
from finesight.encode.family import ThinkingOptions
from finesight.encode.packing import pack, plan_sample_packs
from finesight.encode.renderer import is_native
from finesight.encode.tokenization import find_sample_error
from finesight.errors import UserError
from finesight.evaluate.eval_case import get_reference_answer
from finesight.evaluate.prediction_file import create_case
from finesight.files.storage import verify_folder, write_folder
from finesight.infer.prediction import (
    NUM_READER_THREADS,
    ResponseSampler,
    build_prediction,
    list_ids,
)
from finesight.model.backend import as_native
from finesight.model.linear import disable_dropout, stacked_row_counts
from finesight.model.lora.peft_io import save_adapter
from finesight.objective_components import OBJECTIVES
from finesight.operations.operation import StrPath, check_counts
from finesight.operations.python_training import (
    build_settings,
    read_path,
    read_world_size,
    translate_remedies,
)
from finesight.operations.training_batch import (
    Batch,
    BatchLoader,
    ResponseGroup,
    add_inputs,
    check_batch,
    check_kinds,
    check_single_answers,
    index_responses,
    pack_group,
)
from finesight.progress import ProgressConsole
from finesight.samples.memory_samples import (
    AnySample,
    ImageStore,
    convert_samples,
    locate_samples,
    open_session_store,
    write_sample_file,
)
from finesight.samples.prompt_format import DEFAULT_PROMPT_FORMAT
from finesight.samples.sample import LocatedSample
from finesight.samples.sample import Sample as FileSample
from finesight.settings.manifest import MANIFEST_FILE
from finesight.settings.recipe import recipe_from_dict
from finesight.train.checkpoint import (
    OPTIMIZER_FILE,
    STATE_FILE,
    WEIGHTS_FILE,
    check_resume_config,
    open_shards,
    write_shards,
)
from finesight.train.cuda_graphs import CudaGraphRunner
from finesight.train.finalize import save_full_model
from finesight.train.function_loss import FunctionLoss, LossFunction
from finesight.train.master_weight_optimizer import LossScaler
from finesight.train.objectives.objective import Objective
from finesight.train.recipe_check import check_recipe, load_run_data
from finesight.train.rollout import build_requests, has_memory_for_engine
from finesight.train.setup import (
    build_device_loader,
    build_hardware,
    build_manifest,
    build_optimizer,
    build_step_dataset,
    load_base_model,
    parallelize_model,
    select_device,
    start_device,
)
from finesight.train.step import forward_backward, micro_batch_seed

if TYPE_CHECKING:
    from finesight.infer.request import GeneratedToken, GenerationRequest
    from finesight.settings.config import Recipe

LOOP_SETTINGS = (
    "epochs",
    "steps",
    "batch_size",
    "learning_rate",
    "lr_schedule",
    "warmup",
    "objective",
    "data.train",
)
"""Settings of a run that a program decides itself."""

UNUSED_SETTINGS = (
    "vision_cache",
    "parallel",
    "save_every",
    "keep_checkpoints",
    "eval",
    "rewards",
    "track",
    "output_dir",
    "data.eval",
)
"""Settings of a run that a client has no use for."""


class ClientState(BaseModel):
    """State of a training client apart from tensors; also read from checkpoints of runs.

    Attributes:
        loss_scale: State of the fp16 loss scaler.
        resume_config: Settings and fingerprints that must be the same, by name.
        num_samplings: Number of calls of `sample`, from which their seeds derive.
    """

    step: int
    loss_scale: dict[str, float]
    resume_config: dict[str, Any]
    num_samplings: int = 0


class TrainingClient:
    """A model in training, whose steps a Python program runs.

    Attributes:
        step: Number of optimizer steps.
        model: The model, a module of PyTorch.
        renderer: Tokenizer, chat template and image processor.
    """

    @translate_remedies()
    def __init__(self, model: StrPath, *, thinking: bool | None = None, **settings: Any) -> None:
        """Load a model for training.

        Args:
            model: Name or folder of the model, as in a recipe. An adapter is trained further.
            thinking: Whether prompts of `sample` ask a thinking model to reason. By default, as
                most samples of `load_batches` do, and not before.
            settings: Settings of a recipe: those of its section `train` by name, such as
                `weight_decay=0.1`, and other sections as dictionaries, such as
                `tune={"language": "lora"}`. `epochs`, `batch_size` and the learning rate are
                arguments of the methods.

        Raises:
            UserError: The model or a setting is invalid.
        """
        _check_settings(settings)
        if read_world_size() > 1:
            raise UserError(
                "a training client in a training with several processes",
                where="TrainingClient",
                expected="one process",
                remedy="start the program without torchrun, or use finesight.train",
            )
        self._name = read_path(model, "model", "the name or folder of a model")
        self._settings = settings
        # A recipe names files. The samples come later, so that this one does not exist.
        recipe = self._build_recipe(open_session_store().folder / "samples.jsonl")
        if recipe.tune.has_mode("lora") and recipe.tune.has_mode("full"):
            raise UserError(
                "an adapter beside fully trained parts",
                where="tune",
                expected="LoRA only, or full fine-tuning only",
                remedy="use one mode for all parts, or finesight.train",
            )
        self._checked = check_recipe(recipe)
        self._is_native = is_native(self._checked.base_model.folder)
        self._console = ProgressConsole()
        device, dtype = select_device(recipe)
        self._hardware = build_hardware(recipe, device, dtype, start_device(device, dtype))
        base_model = self._checked.base_model
        self._thinking = thinking
        renderer = self._checked.renderer
        renderer.responses = "pairs" if self._is_native else "none"
        renderer.accepted_samples = None  # `_check_kinds` decides.
        self.renderer = renderer.with_thinking(ThinkingOptions(enable_thinking=bool(thinking)))
        self.model = load_base_model(recipe, base_model, self._hardware, self._console)
        self.step = 0
        process_group = self._hardware.process_group
        stacked_rows = stacked_row_counts(self.model)
        self._parallel = parallelize_model(recipe, self.model, dtype, process_group)
        self._optimizer = build_optimizer(recipe, process_group, self._parallel, stacked_rows)
        self.model.activation_checkpointing = recipe.train.activation_checkpointing
        self.model.train()
        self._device_loader = build_device_loader(self.model, self._parallel, self._hardware)
        self._loss_scaler = LossScaler(is_enabled=dtype == torch.float16)
        self._cross_entropy = self._checked.objective
        self._graph_runner = CudaGraphRunner(
            forward_backward,
            self.model,
            self._cross_entropy,
            list(self._parallel.trainable_params.values()),
        )
        self._sampler: ResponseSampler | None = None
        self._sample_batch_size = 0
        self._num_samplings = 0
        self._num_packs = 0  # since the last optimizer step
        self._loss_sum = torch.zeros((), device=device)
        self._prompt_format = DEFAULT_PROMPT_FORMAT

    def __repr__(self) -> str:
        device = self._hardware.device
        return f"<{type(self).__name__} of {self._name!r} on {device}, step {self.step}>"

    def _check_kinds(self, samples: Iterable[FileSample]) -> None:
        family = self._checked.base_model.folder.family
        check_kinds(samples, family, is_native=self._is_native)

    def _build_recipe(self, file: Path, **train: Any) -> Recipe:
        """Build the recipe of the settings, for the samples of a file."""
        recipe = build_settings({**self._settings, **train})
        recipe["model"] = self._name
        recipe["output_dir"] = str(file.parent)
        recipe["data"] = {**(recipe.get("data") or {}), "train": str(file)}
        # `optim_step` multiplies by the learning rate.
        recipe["train"] = {"learning_rate": 1.0, **(recipe.get("train") or {})}
        return recipe_from_dict(recipe)

    @translate_remedies()
    def encode(self, samples: Sequence[AnySample]) -> Batch:
        """Encode the samples of a step in this process, and pack them.

        Images are not augmented.

        Args:
            samples: Samples with answers, or preference pairs, each of which is a pack of its own.

        Raises:
            UserError: A sample is invalid, has no answer or exceeds `data.max_length`.
        """
        max_length = self._checked.recipe.data.max_length
        with _locate_temporarily(samples) as located:
            self._check_kinds(one.sample for one in located)
            with ThreadPoolExecutor(NUM_READER_THREADS) as pool:
                encoded = [*pool.map(self.renderer.encode, located)]
        for one in encoded:
            error = find_sample_error(one.tokenized, max_length)
            if error is not None:
                error.remedy = 'add an answer, raise data={"max_length": ...}, or leave it out'
                raise error
        token_budget = self._checked.recipe.train.pack_tokens
        positions, prefix_length = plan_sample_packs(
            encoded, token_budget, use_shared_prefix=self._is_native
        )
        packs = []
        for group in positions:
            packed_batch = pack([encoded[position] for position in group], None, prefix_length)
            packs.append(index_responses(packed_batch))
        return tuple(packs)

    @translate_remedies()
    def load_batches(
        self,
        samples: Sequence[AnySample],
        batch_size: int,
        *,
        epochs: float = 1.0,
        start: int = 0,
    ) -> BatchLoader:
        """Prepare the batches of a training, which worker processes encode in advance.

        Samples, their order and packs are those of `finesight.train` with the same `seed`. Each
        epoch has another order, but each iteration over the result has the same one.

        Args:
            samples: Samples with answers, or preference pairs.
            batch_size: Number of samples of a batch.
            epochs: Number of passes over the samples.
            start: Number of batches to leave out, such as the step of a loaded state. Batches whose
                samples cannot be read count, although the iteration leaves them out.

        Raises:
            UserError: A sample is invalid. Those that are too long or cannot be read are skipped,
                unless `data={"on_invalid_sample": "fail"}` is set.
        """
        store = open_session_store()
        file = store.folder / f"{secrets.token_hex(8)}.jsonl"
        converted = convert_samples(samples, store, "samples")
        self._check_kinds(converted)
        write_sample_file(converted, file)
        recipe = self._build_recipe(file, batch_size=batch_size, epochs=epochs, warmup=0)
        num_workers = self._hardware.num_workers
        checked = replace(self._checked, recipe=recipe)
        data = load_run_data(checked, num_workers, self._console)
        if self._prompt_format is DEFAULT_PROMPT_FORMAT:
            # The first samples are those of the training, and later ones may be for validation.
            self._prompt_format = data.train.find_prompt_format()
            if self._thinking is None:
                self.renderer = data.renderer
        dataset = build_step_dataset(recipe, data, data.sampler, self.model)
        if not 0 <= start <= len(dataset):
            raise UserError(
                f"start={start}",
                where="load_batches",
                expected=f"0 to {len(dataset)}, the number of batches",
                remedy="correct start or epochs",
            )
        pin_memory = self._hardware.device.type == "cuda"
        return BatchLoader(dataset, start, num_workers, pin_memory, self._console)

    def forward_backward(
        self,
        batch: Sequence[PackedBatch],
        loss: LossFunction | None = None,
        *,
        temperature: float = 1.0,
    ) -> Tensor:
        """Compute the loss of a batch, and add its gradients to those since the last step.

        The random seed of PyTorch is set, on which dropout depends.

        Args:
            batch: Packs of `encode`, `load_batches` or `encode_responses`. The packs of several
                batches may be joined.
            loss: Function of the log-probabilities of supervised tokens, which are without dropout;
                by default, the mean cross entropy over the supervised tokens of the batch.
            temperature: Divisor of the logits for `loss`. For sampled responses, that of `sample`.

        Returns:
            The loss, an fp32 scalar on the device, which may still be computing it.

        Raises:
            UserError: The batch is empty, has pairs without a loss function, or the function
                returns no scalar with a gradient; or the memory is full.
        """
        if not torch.is_grad_enabled():
            raise UserError(
                "gradients are disabled, as within torch.no_grad()",
                where="forward_backward",
                expected="enabled gradients",
                remedy="call client.forward(batch) for a loss without gradients",
            )
        objective = self._select_objective(batch, loss, temperature, "forward_backward")
        scale = self._loss_scaler.scale
        loss_weight = self._build_weight(batch, loss, scale)
        total = torch.zeros((), device=self._hardware.device)
        try:
            for one in batch:
                total += self._run_pack(one, objective, loss_weight)
        except BaseException as error:
            self.zero_grad()
            if isinstance(error, torch.OutOfMemoryError):
                raise _build_memory_error(batch, "forward_backward") from error
            raise
        self._loss_sum += total
        return total / scale

    def forward(
        self,
        batch: Sequence[PackedBatch],
        loss: LossFunction | None = None,
        *,
        temperature: float = 1.0,
    ) -> Tensor:
        """Compute the loss of a batch without gradients and dropout, such as a validation loss.

        Arguments and result are those of `forward_backward`.

        Raises:
            UserError: As in `forward_backward`.
        """
        objective = self._select_objective(batch, loss, temperature, "forward")
        loss_weight = self._build_weight(batch, loss, 1.0)
        total = torch.zeros((), device=self._hardware.device)
        try:
            with torch.no_grad(), disable_dropout(self.model):
                for one in batch:
                    pack_on_device = self._device_loader.load(one)
                    inputs = objective.loss_inputs(pack_on_device, loss_weight)
                    losses = forward_backward(self.model, objective, pack_on_device, None, inputs)
                    total += losses[0]
        except torch.OutOfMemoryError as error:
            raise _build_memory_error(batch, "forward") from error
        return total

    def compute_logps(
        self, batch: Sequence[PackedBatch], *, temperature: float = 1.0
    ) -> list[Tensor]:
        """Return the log-probabilities of the supervised tokens of each pack, [L], in fp32.

        They have no gradient and are in memory of the CPU. `add_inputs` passes them to a loss
        function, for example as those of a reference model.

        Args:
            temperature: Divisor of the logits.

        Raises:
            UserError: The batch is empty.
        """
        found: list[Tensor] = []

        def record(logps_L: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
            found.append(logps_L.float().cpu())
            return logps_L.sum()

        self.forward(batch, record, temperature=temperature)
        return found

    def _select_objective(
        self,
        batch: Sequence[PackedBatch],
        loss: LossFunction | None,
        temperature: float,
        where: str,
    ) -> Objective[Any]:
        """Check the arguments of a loss, and return its objective.

        Args:
            where: Name of the method, for errors.
        """
        check_batch(batch, where)
        if loss is None:
            check_single_answers(batch, temperature, where)
            return self._cross_entropy
        is_valid = isinstance(temperature, Real) and 0 < temperature < math.inf
        if not callable(loss) or not is_valid:
            raise UserError(
                f"loss={loss!r:.60}, temperature={temperature!r:.60}",
                where=where,
                expected="a function of log-probabilities and inputs, and a number above 0",
                remedy="such as loss=lambda logps_L, inputs: -logps_L.sum()",
            )
        return FunctionLoss(loss, temperature, self.renderer.visual_token_ids)

    def _build_weight(
        self, batch: Sequence[PackedBatch], loss: LossFunction | None, scale: float
    ) -> Tensor:
        """Return the scalar that multiplies the loss of each pack."""
        num_terms = 1
        if loss is None:
            num_terms = sum(one.num_supervised_tokens for one in batch)
        return torch.full((), scale / num_terms, device=self._hardware.device)

    def _run_pack(
        self, packed_batch: PackedBatch, objective: Objective[Any], loss_weight: Tensor
    ) -> Tensor:
        """Return the weighted loss of a pack, a scalar, and add its gradients."""
        seed = self._checked.recipe.train.seed
        torch.manual_seed(micro_batch_seed(seed, self.step, self._num_packs))
        if self._num_packs:
            # Otherwise, autograd adds the next gradients in 16 bits.
            self._optimizer.accumulate_gradients()
        self._num_packs += 1
        pack_on_device = self._device_loader.load(packed_batch)
        loss_inputs = objective.loss_inputs(pack_on_device, loss_weight)
        if objective is not self._cross_entropy:
            # Dropout would change the likelihoods that a function compares.
            with disable_dropout(self.model):
                losses = forward_backward(self.model, objective, pack_on_device, None, loss_inputs)
        elif self._graph_runner.graphs is not None:
            losses = self._graph_runner.run(pack_on_device, None, loss_inputs)
        else:
            losses = forward_backward(self.model, objective, pack_on_device, None, loss_inputs)
        return losses[0].detach()

    def zero_grad(self) -> None:
        """Discard the gradients since the last optimizer step."""
        self._optimizer.zero_grad()
        self._loss_sum.zero_()
        self._num_packs = 0

    def optim_step(self, learning_rate: float) -> Tensor:
        """Update the weights with the sum of the gradients since the last step.

        Gradients are clipped to `max_grad_norm`. A step with a loss or gradient that is not finite
        changes no weight.

        Args:
            learning_rate: Learning rate of this step.

        Returns:
            Norm of the gradients before clipping, an fp32 scalar on the device.

        Raises:
            UserError: There are no gradients, or the learning rate is no number of at least 0.
        """
        if not isinstance(learning_rate, Real) or not 0 <= learning_rate < math.inf:
            raise UserError(
                f"learning_rate={learning_rate!r:.60}",
                where="optim_step",
                expected="a finite number of at least 0",
                remedy="such as client.optim_step(1e-4)",
            )
        if not self._num_packs:
            raise UserError(
                "no gradients since the last step",
                where="optim_step",
                expected="at least one call of forward_backward before",
                remedy="call client.forward_backward(batch)",
            )
        grad_norm = self._parallel.reduce_gradients(self._optimizer)
        scale = self._loss_scaler.scale
        is_finite = self._loss_sum.isfinite()
        is_applied = True
        if self._loss_scaler.is_enabled and is_finite:
            is_applied = self._loss_scaler.update(grad_norm.item())
        if is_applied:
            masked_norm = grad_norm.masked_fill(~is_finite, math.nan)
            self._optimizer.step(float(learning_rate), masked_norm, scale)
            self._parallel.sync_params()
        else:
            self._optimizer.zero_grad()
        self._loss_sum.zero_()
        self._num_packs = 0
        self.step += 1
        return grad_norm / scale

    @translate_remedies()
    def sample(
        self,
        prompts: Sequence[AnySample],
        num_responses: int = 1,
        *,
        max_new_tokens: int = 512,
        temperature: float = 1.0,
        seed: int | None = None,
        batch_size: int = 64,
    ) -> list[ResponseGroup]:
        """Sample responses of the current model to prompts.

        Predictions of images in memory do not name their images. In 16 bits on a GPU, the first
        call selects kernels whose log-probabilities equal those of the losses, so that later losses
        differ in their rounding.

        Args:
            prompts: Samples. Of one with an answer, the preceding turns are the prompt.
            num_responses: Number of responses to each prompt.
            temperature: Divisor of the logits; 0 selects the most probable tokens.
            seed: Random seed; the same one gives the same responses of the same weights. By
                default, each call has another one, which derives from the seed of the client.
            batch_size: Number of responses that are generated at the same time; halved when the GPU
                memory is exhausted.

        Raises:
            UserError: A prompt is invalid, or the model family has no native implementation.
        """
        check_counts(
            num_responses=num_responses, max_new_tokens=max_new_tokens, batch_size=batch_size
        )
        if not self.model.capabilities.logprobs:
            raise UserError(
                f"responses of a model of the family {self._checked.base_model.folder.family}",
                where="sample",
                expected="a natively implemented model family",
                remedy="choose another model, or save the weights and use finesight.load",
            )
        with (
            _locate_temporarily(prompts) as located,
            ThreadPoolExecutor(NUM_READER_THREADS) as pool,
        ):
            encoded = [*pool.map(self.renderer.encode_prompt, located)]
        name = f"seed {seed}"
        if seed is None:
            name = f"{self._checked.recipe.train.seed}/{self._num_samplings}"
            self._num_samplings += 1
        requests = build_requests(
            encoded,
            [f"{name}/{position}" for position in range(len(encoded))],
            num_responses,
            max_new_tokens,
            temperature,
            self.renderer.visual_token_ids,
        )
        responses = self._generate(requests, batch_size)
        groups = []
        for position, (prompt, sample) in enumerate(zip(encoded, located, strict=True)):
            references: tuple[tuple[str, ...], Any] = (sample.sample.references, ())
            if sample.sample.messages[-1].role == "assistant":
                references = get_reference_answer(
                    sample.sample, has_reasoning=self.renderer.renders_reasoning
                )
            predictions = []
            for tokens in responses[position :: len(encoded)]:
                prediction = build_prediction(
                    self.renderer, sample, prompt.tokenized, list_ids(tokens)
                )
                images = prediction.images
                if not all(map(Path.exists, images)):
                    images = ()  # They were written for the encoding only.
                predictions.append(replace(prediction, tokens=tuple(tokens), images=images))
            cases = tuple(create_case(prediction, references) for prediction in predictions)
            groups.append(ResponseGroup(prompt, tuple(predictions), cases))
        return groups

    def _generate(
        self, requests: Sequence[GenerationRequest], batch_size: int
    ) -> list[list[GeneratedToken]]:
        """Return the tokens of each request, which the model in evaluation mode generates."""
        if self._sampler is None or batch_size != self._sample_batch_size:
            self._sampler = ResponseSampler(
                as_native(self.model), self.renderer.end_ids, batch_size, is_sharded=False
            )
            self._sample_batch_size = batch_size
        # If the memory is full, graphs are released with the gradients of the pack before.
        self._optimizer.accumulate_gradients()
        self.model.eval()
        try:
            responses = self._sampler.sample(
                requests, lambda count: None, self._graph_runner.release_graphs
            )
        except BaseException:
            self._sampler = None  # Its engine may have unfinished requests.
            raise
        finally:
            self.model.train()
        if not has_memory_for_engine(self._hardware.device):
            self._sampler.engine = None
        return responses

    def encode_responses(
        self, groups: Sequence[ResponseGroup], advantages: Sequence[Sequence[float]]
    ) -> Batch:
        """Pack sampled responses for a loss function, the prompt with its images once per pack.

        Args:
            advantages: Number of each response of each group, which `advantages_L` repeats for its
                tokens. Groups whose numbers are all 0 have no gradient, and are left out.

        Raises:
            UserError: The numbers of groups or responses differ, or a number is not finite.
        """
        sizes = [(len(group.predictions),) for group in groups]
        given = [np.asarray(values, np.float64) for values in advantages]
        is_finite = all(np.isfinite(values).all() for values in given)
        if [values.shape for values in given] != sizes or not is_finite:
            raise UserError(
                f"advantages {[values.tolist() for values in given]!r:.60}",
                where="encode_responses",
                expected=f"{len(groups)} lists of finite numbers, of {sizes!r:.60} responses",
                remedy="pass one number for each response of each group; if a standard deviation"
                " may be 0, add a small number to it",
            )
        token_budget = self._checked.recipe.train.pack_tokens
        packs: list[PackedBatch] = []
        for group, values in zip(groups, given, strict=True):
            if values.any():
                packs += pack_group(group, values.tolist(), token_budget)
        return tuple(packs)

    def add_inputs(self, batch: Sequence[PackedBatch], **inputs: Sequence[Tensor]) -> Batch:
        """Return the packs of a batch with further tensors for loss functions.

        Args:
            inputs: Tensor of each pack by name, with one value per supervised token, [L].

        Raises:
            UserError: The number of tensors or their lengths differ from those of the packs.
        """
        return add_inputs(batch, inputs)

    def save(self, path: StrPath) -> Path:
        """Write the trained weights to a new folder: an adapter, or a complete model.

        `finesight.load`, PEFT and transformers load the folder.

        Raises:
            UserError: The folder exists.
        """
        recipe = self._checked.recipe
        base = self._checked.base_model
        saved = Path(os.path.expanduser(path))
        manifest = build_manifest(recipe, base, self.renderer, self._prompt_format)
        with write_folder(saved) as folder:
            if recipe.tune.has_mode("lora"):
                save_adapter(
                    folder,
                    self.model,
                    base_model=base.name,
                    base_fingerprint=base.folder.fingerprint(),
                    master_values=self._optimizer.master_weights(break_ties=True),
                )
            else:
                dtype = self._hardware.dtype
                rule = self.renderer.image_rule
                save_full_model(folder, self.model, base.folder, dtype, rule)
            (folder / MANIFEST_FILE).write_text(manifest.model_dump_json(indent=1) + "\n")
        return saved

    def save_state(self, path: StrPath) -> Path:
        """Write weights in fp32, optimizer state and step to a new folder, for `load_state`.

        Raises:
            UserError: The folder exists.
        """
        saved = Path(os.path.expanduser(path))
        optimizer = self._optimizer
        tensors = {
            WEIGHTS_FILE: optimizer.master_weights(),
            OPTIMIZER_FILE: optimizer.optimizer_state(),
        }
        state = ClientState(
            step=self.step,
            loss_scale=self._loss_scaler.state_dict(),
            resume_config=self._describe_model(),
            num_samplings=self._num_samplings,
        )
        with write_folder(saved) as folder:
            write_shards(folder, tensors, self._hardware.process_group)
            (folder / STATE_FILE).write_text(state.model_dump_json(indent=1) + "\n")
        return saved

    def load_state(self, path: StrPath) -> None:
        """Continue from the weights, optimizer state and step of `save_state`.

        The folder of a checkpoint of a run is valid, too. Gradients are discarded.

        Raises:
            UserError: The folder is missing, was changed, or is of another model.
        """
        folder = Path(os.path.expanduser(path))
        if folder.is_dir() and not (folder / STATE_FILE).exists():
            raise UserError(
                f"no {STATE_FILE} in the folder",
                where=str(folder),
                expected="a folder of save_state, or a checkpoint of a run",
                remedy="for a run, pass one of its folders checkpoints/step-N; to start from an"
                " adapter or a run, create the client with its path",
            )
        verify_folder(folder)
        state = ClientState.model_validate_json((folder / STATE_FILE).read_bytes())
        current = self._describe_model()
        stored = {name: state.resume_config.get(name) for name in current}
        remedy = "create the client with the model and the settings of the saved state"
        try:
            check_resume_config(stored, current, folder, lambda changes: remedy)
        except UserError as error:
            error.remedy = remedy
            raise
        self.zero_grad()
        weights = open_shards(folder, WEIGHTS_FILE)
        optimizer_state = open_shards(folder, OPTIMIZER_FILE)
        self._optimizer.load_state(weights, optimizer_state)
        self._parallel.sync_params()
        self._loss_scaler.load_state_dict(state.loss_scale)
        self.step = state.step
        self._num_samplings = state.num_samplings

    def _describe_model(self) -> dict[str, Any]:
        """Return the settings and fingerprints on which the tensors of a state depend."""
        recipe = self._checked.recipe
        tune = recipe.tune.model_dump(mode="json")
        settings = {f"tune.{name}": value for name, value in tune.items()}
        return {
            "model": self._checked.base_model.folder.fingerprint(),
            **settings,
            "train.optimizer": recipe.train.optimizer,
            "train.precision": self._hardware.precision,
        }


@contextmanager
def _locate_temporarily(samples: Sequence[AnySample]) -> Iterator[list[LocatedSample]]:
    """Write the images of samples to files that exist within the context."""
    with TemporaryDirectory(prefix="finesight-images-") as folder:
        yield locate_samples(samples, ImageStore(Path(folder)))


def _build_memory_error(batch: Sequence[PackedBatch], where: str) -> UserError:
    largest = max(batch, key=lambda one: one.num_tokens)
    return UserError(
        f"the GPU memory is full in a pack of {largest.num_tokens:,} tokens",
        where=where,
        expected="memory for each pack",
        remedy="create the client with a smaller pack_tokens, activation_checkpointing=True, or a"
        " smaller image size",
    )


def _check_settings(settings: Mapping[str, Any]) -> None:
    """Verify that a client uses all settings."""
    data = settings.get("data") or {}
    given = [*settings, *(settings.get("train") or {}), *(f"data.{name}" for name in data)]
    objectives = [component.name for component in OBJECTIVES.list_available()]
    for name in given:
        if name in LOOP_SETTINGS:
            remedy = "pass samples, epochs and batch_size to load_batches, learning_rate to"
            remedy += " optim_step, and a function as loss to forward_backward"
        elif name in UNUSED_SETTINGS or name in objectives:
            remedy = "remove it, or use finesight.train"
        else:
            continue
        raise UserError(
            f"the setting {name}",
            where="TrainingClient",
            expected="settings of the model, the optimizer and the encoding",
            remedy=remedy,
        )
