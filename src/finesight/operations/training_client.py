"""Training client: the pieces of a training loop as calls of a Python program.

A program decides what happens in a step: which samples, which loss, which learning rate. The client
has the model, its optimizer and the encoding, and writes files only on request.

Shapes: L supervised tokens.
"""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel
from torch import Tensor

from finesight.data.memory_samples import (
    AnySample,
    convert_samples,
    locate_samples,
    open_session_store,
    write_sample_file,
)
from finesight.data.prompt_format import DEFAULT_PROMPT_FORMAT
from finesight.encode.batch import PackedBatch
from finesight.encode.family import ThinkingOptions
from finesight.encode.packing import pack, plan_sample_packs
from finesight.encode.renderer import is_native
from finesight.encode.tokenization import EncodedSample, find_sample_error
from finesight.errors import UserError, format_count
from finesight.evaluate.eval_case import EvalCase, get_reference_answer
from finesight.evaluate.prediction_file import create_case
from finesight.infer.prediction import (
    NUM_READER_THREADS,
    Prediction,
    ResponseSampler,
    build_prediction,
)
from finesight.manifest import MANIFEST_FILE
from finesight.model.hf_backend import HfModel
from finesight.model.linear import disable_dropout, stacked_row_counts
from finesight.model.lora.peft_io import save_adapter
from finesight.model.vlm import VisionLanguageModel
from finesight.operations.operation import StrPath, check_counts
from finesight.operations.python_training import build_settings, read_path, translate_remedies
from finesight.progress import ProgressConsole
from finesight.recipe import recipe_from_dict
from finesight.storage import verify_folder, write_folder
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
from finesight.train.rollout import (
    build_requests,
    has_memory_for_engine,
    join_responses,
    list_ids,
    split_responses,
)
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
from finesight.train.step_dataset import StepDataset, read_steps

if TYPE_CHECKING:
    from finesight.config import Recipe
    from finesight.encode.renderer import Renderer

Batch = tuple[PackedBatch, ...]
"""Packs of a training step."""

UNUSED_SETTINGS = (
    "epochs",
    "steps",
    "batch_size",
    "learning_rate",
    "lr_schedule",
    "warmup",
    "objective",
    "vision_cache",
    "parallel",
    "save_every",
    "keep_checkpoints",
    "eval",
    "rewards",
    "track",
    "output_dir",
    "data.train",
    "data.eval",
)
"""Settings of a run that a program decides itself, or that a client has no use for."""


@dataclass(frozen=True, slots=True, repr=False)
class ResponseGroup:
    """Sampled responses to one prompt.

    Attributes:
        predictions: Responses with their texts, tokens and log-probabilities.
        cases: Responses with the references of the prompt, inputs of metrics and rewards.
    """

    prompt: EncodedSample
    predictions: tuple[Prediction, ...]
    cases: tuple[EvalCase, ...]

    @property
    def texts(self) -> list[str]:
        return [prediction.text for prediction in self.predictions]

    def __repr__(self) -> str:
        first = self.predictions[0].text
        count = format_count(len(self.predictions), "response")
        return f"<{type(self).__name__} of {count}, the first is {first!r:.60}>"


@dataclass(frozen=True, slots=True)
class BatchLoader:
    """Batches of a training, read by worker processes during the iteration."""

    dataset: StepDataset
    num_workers: int
    pin_memory: bool
    console: ProgressConsole

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[Batch]:
        for step_batch in read_steps(self.dataset, 0, self.num_workers, self.pin_memory):
            for one in step_batch.skipped:
                self.console.log(f"skipped {one.id}: {one.reason}")
            if step_batch.packs:
                yield step_batch.packs


class ClientState(BaseModel):
    """State of a training client apart from tensors; also read from checkpoints of runs.

    Attributes:
        loss_scale: State of the fp16 loss scaler.
        resume_config: Settings and fingerprints that must be the same, by name.
    """

    step: int
    loss_scale: dict[str, float]
    resume_config: dict[str, Any]


class TrainingClient:
    """A model in training, whose steps a Python program runs.

    Attributes:
        step: Number of optimizer steps.
        model: The model, a module of PyTorch.
        renderer: Tokenizer, chat template and image processor.
    """

    def __init__(self, model: StrPath, *, thinking: bool = False, **settings: Any) -> None:
        """Load a model for training.

        Args:
            model: Name or folder of the model, as in a recipe. An adapter is trained further.
            thinking: Whether prompts of `sample` ask a thinking model to reason.
            settings: Settings of a recipe: those of its section `train` by name, such as
                `weight_decay=0.1`, and other sections as dictionaries, such as
                `tune={"language": "lora"}`. `epochs`, `batch_size` and the learning rate are
                arguments of the methods.

        Raises:
            UserError: The model or a setting is invalid.
        """
        _check_settings(settings)
        if int(os.environ.get("WORLD_SIZE") or "1") > 1:
            raise UserError(
                "a training client in a training with several processes",
                where="TrainingClient",
                expected="one process",
                remedy="start the program without torchrun, or use finesight.train",
            )
        self._name = read_path(model, "model", "the name or folder of a model")
        self._settings = settings
        # A recipe names files; this one is written only by `load_batches`.
        recipe = self._build_recipe(open_session_store().folder / "none.jsonl")
        self._checked = check_recipe(recipe)
        self._console = ProgressConsole()
        device, dtype = select_device(recipe)
        self._hardware = build_hardware(recipe, device, dtype, start_device(device, dtype))
        base_model = self._checked.base_model
        self._accept_pairs(self._checked.renderer)
        self.renderer = self._checked.renderer.with_thinking(
            ThinkingOptions(enable_thinking=thinking)
        )
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
        self._num_packs = 0  # since the last optimizer step
        self._loss_sum = torch.zeros((), device=device)
        self._prompt_format = DEFAULT_PROMPT_FORMAT

    def __repr__(self) -> str:
        device = self._hardware.device
        return f"<{type(self).__name__} of {self._name!r} on {device}, step {self.step}>"

    def _build_recipe(self, file: Path, **train: Any) -> Recipe:
        """Build the recipe of the settings, for the samples of a file."""
        with translate_remedies():
            recipe = build_settings({**self._settings, **train})
            recipe["model"] = self._name
            recipe["output_dir"] = str(file.parent)
            recipe["data"] = {**(recipe.get("data") or {}), "train": str(file)}
            # `optim_step` multiplies by the learning rate.
            recipe["train"] = {"learning_rate": 1.0, **(recipe.get("train") or {})}
            return recipe_from_dict(recipe)

    def _accept_pairs(self, renderer: Renderer) -> None:
        """Encode both answers of a pair, which the packs of a native family represent."""
        if is_native(self._checked.base_model.folder):
            renderer.responses = "pairs"
            renderer.accepted_samples = frozenset({"pair", "label none", "label true"})

    def encode(self, samples: Sequence[AnySample]) -> Batch:
        """Encode the samples of a step in this process, and pack them.

        Args:
            samples: Samples with answers, or preference pairs.

        Raises:
            UserError: A sample is invalid, has no answer or exceeds `data.max_length`.
        """
        located = locate_samples(samples)
        max_length = self._checked.recipe.data.max_length
        with ThreadPoolExecutor(NUM_READER_THREADS) as pool:
            encoded = [*pool.map(self.renderer.encode, located)]
        for one in encoded:
            error = find_sample_error(one.tokenized, max_length)
            if error is not None:
                error.remedy = 'add an answer, raise data={"max_length": ...}, or leave it out'
                raise error
        positions, prefix_length = plan_sample_packs(
            encoded, self._checked.recipe.train.pack_tokens, use_shared_prefix=self._is_native
        )
        packs = [[encoded[position] for position in one] for one in positions]
        return tuple(pack(one, None, prefix_length) for one in packs)

    @property
    def _is_native(self) -> bool:
        return not isinstance(self.model, HfModel)

    def load_batches(
        self, samples: Sequence[AnySample], batch_size: int, *, epochs: float = 1.0
    ) -> BatchLoader:
        """Prepare the batches of a training, which worker processes encode in advance.

        Samples, their order and packs are those of `finesight.train` with the same `seed`.

        Args:
            samples: Samples with answers, or preference pairs.
            batch_size: Number of samples of a batch.
            epochs: Number of passes over the samples.

        Raises:
            UserError: A sample is invalid. Those that are too long or cannot be read are skipped,
                unless `data={"on_invalid_sample": "fail"}` is set.
        """
        store = open_session_store()
        file = store.folder / f"{secrets.token_hex(8)}.jsonl"
        write_sample_file(convert_samples(samples, store, "samples"), file)
        recipe = self._build_recipe(file, batch_size=batch_size, epochs=epochs, warmup=0)
        num_workers = self._hardware.num_workers
        checked = replace(self._checked, recipe=recipe)
        data = load_run_data(checked, num_workers, self._console)
        self._prompt_format = data.train.find_prompt_format()
        dataset = build_step_dataset(recipe, data, data.sampler, self.model)
        pin_memory = self._hardware.device.type == "cuda"
        return BatchLoader(dataset, num_workers, pin_memory, self._console)

    def forward_backward(
        self,
        batch: Sequence[PackedBatch],
        loss: LossFunction | None = None,
        *,
        temperature: float = 1.0,
    ) -> Tensor:
        """Compute the loss of a batch, and add its gradients to those since the last step.

        Args:
            batch: Packs of `encode`, `load_batches` or `encode_responses`.
            loss: Function of the log-probabilities of supervised tokens, which are without dropout;
                by default, the mean cross entropy over the supervised tokens of the batch.
            temperature: Divisor of the logits for `loss`. For sampled responses, that of `sample`.

        Returns:
            The loss, an fp32 scalar on the device, which may still be computing it.

        Raises:
            UserError: The batch is empty, has pairs without a loss function, or the function
                returns no scalar.
        """
        if not batch:
            raise UserError(
                "an empty batch",
                where="forward_backward",
                expected="packs of encode, load_batches or encode_responses",
                remedy="leave out the step",
            )
        objective = self._cross_entropy
        num_terms = sum(one.num_supervised_tokens for one in batch)
        if loss is None:
            _check_single_answers(batch)
        else:
            objective = FunctionLoss(loss, temperature, self.renderer.visual_token_ids)
            num_terms = 1
        scale = self._loss_scaler.scale
        loss_weight = torch.full((), scale / num_terms, device=self._hardware.device)
        total = torch.zeros((), device=self._hardware.device)
        try:
            for one in batch:
                total += self._run_pack(one, objective, loss_weight)
        except BaseException:
            self.zero_grad()
            raise
        self._loss_sum += total
        return total / scale

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
            UserError: There are no gradients, or the learning rate is no finite number above 0.
        """
        if not math.isfinite(learning_rate) or learning_rate <= 0:
            raise UserError(
                f"learning_rate={learning_rate!r:.60}",
                where="optim_step",
                expected="a finite number above 0",
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
            self._optimizer.step(learning_rate, masked_norm, scale)
            self._parallel.sync_params()
        else:
            self._optimizer.zero_grad()
        self._loss_sum.zero_()
        self._num_packs = 0
        self.step += 1
        return grad_norm / scale

    def sample(
        self,
        prompts: Sequence[AnySample],
        num_responses: int = 1,
        *,
        max_new_tokens: int = 512,
        temperature: float = 1.0,
        seed: int = 0,
        batch_size: int = 64,
    ) -> list[ResponseGroup]:
        """Sample responses of the current model to prompts.

        The responses depend only on weights, `seed`, step and position of the prompt.

        Args:
            prompts: Samples. Of one with an answer, the preceding turns are the prompt.
            num_responses: Number of responses to each prompt.
            temperature: Divisor of the logits; 0 selects the most probable tokens.
            batch_size: Number of responses that are generated at the same time; halved when the GPU
                memory is exhausted.

        Raises:
            UserError: A prompt is invalid, or the model family has no native implementation.
        """
        check_counts(
            num_responses=num_responses, max_new_tokens=max_new_tokens, batch_size=batch_size
        )
        if not isinstance(self.model, VisionLanguageModel):
            raise UserError(
                f"responses of a model of the family {self._checked.base_model.folder.family}",
                where="sample",
                expected="a natively implemented model family",
                remedy="choose another model, or save the weights and use finesight.load",
            )
        located = locate_samples(prompts)
        with ThreadPoolExecutor(NUM_READER_THREADS) as pool:
            encoded = [*pool.map(self.renderer.encode_prompt, located)]
        requests = build_requests(
            encoded,
            [f"{seed}/{self.step}/{position}" for position in range(len(encoded))],
            num_responses,
            max_new_tokens,
            temperature,
            self.renderer.visual_token_ids,
        )
        if self._sampler is None:
            self._sampler = ResponseSampler(
                self.model, self.renderer.end_ids, batch_size, is_sharded=False
            )
        self._sampler.batch_size = batch_size
        self.model.eval()
        try:
            responses = self._sampler.sample(
                requests, lambda count: None, self._graph_runner.release_graphs
            )
        finally:
            self.model.train()
            if not has_memory_for_engine(self._hardware.device):
                self._sampler.engine = None
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
                predictions.append(replace(prediction, tokens=tuple(tokens)))
            cases = tuple(create_case(prediction, references) for prediction in predictions)
            groups.append(ResponseGroup(prompt, tuple(predictions), cases))
        return groups

    def encode_responses(
        self, groups: Sequence[ResponseGroup], advantages: Sequence[Sequence[float]]
    ) -> Batch:
        """Pack sampled responses for a loss function, the prompt with its images once per pack.

        Args:
            advantages: Number of each response of each group, which `advantages_L` repeats for its
                tokens. Groups whose numbers are all 0 have no gradient, and are left out.

        Raises:
            UserError: The numbers of groups or responses differ.
        """
        if [*map(len, advantages)] != [len(group.predictions) for group in groups]:
            raise UserError(
                f"advantages of {[*map(len, advantages)]!r:.60} responses",
                where="encode_responses",
                expected=f"{[len(group.predictions) for group in groups]!r:.60}",
                remedy="pass one number for each response of each group",
            )
        packs: list[PackedBatch] = []
        for group, values in zip(groups, advantages, strict=True):
            if any(values):
                packs += self._pack_group(group, values)
        return tuple(packs)

    def _pack_group(
        self, group: ResponseGroup, advantages: Sequence[float]
    ) -> Iterator[PackedBatch]:
        """Pack a group, in several packs if it exceeds the token budget."""
        tokens = [prediction.tokens for prediction in group.predictions]
        num_prompt_tokens = group.prompt.tokenized.num_tokens
        token_budget = self._checked.recipe.train.pack_tokens
        for chunk in split_responses(num_prompt_tokens, [*map(len, tokens)], token_budget):
            chosen = [tokens[position] for position in chunk]
            values: list[float] = []
            for position in chunk:
                values += [float(advantages[position])] * len(tokens[position])
            logps = [token.logprob for token in chain.from_iterable(chosen)]
            loss_inputs = {
                "advantages_L": torch.tensor(values),
                "sampled_logps_L": torch.tensor(logps),
            }
            packed_batch = pack([join_responses(group.prompt, chosen)])
            yield replace(packed_batch, loss_inputs=loss_inputs)

    def save(self, path: StrPath) -> Path:
        """Write the trained weights to a new folder: an adapter, or a complete model.

        `finesight.load`, PEFT and transformers load the folder.

        Raises:
            UserError: The folder exists, or the model has an adapter and fully trained parts.
        """
        recipe = self._checked.recipe
        base = self._checked.base_model
        saved = Path(os.path.expanduser(path))
        if recipe.tune.has_mode("lora") and recipe.tune.has_mode("full"):
            raise UserError(
                "an adapter and fully trained parts",
                where="save",
                expected="LoRA only, or full fine-tuning only",
                remedy='use one mode in tune={"language": ..., "merger": ...}',
            )
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
        verify_folder(folder)
        state = ClientState.model_validate_json((folder / STATE_FILE).read_bytes())
        current = self._describe_model()
        stored = {name: state.resume_config.get(name) for name in current}
        remedy = "create the client with the model and the settings of the saved state"
        check_resume_config(stored, current, folder, lambda changes: remedy)
        self.zero_grad()
        weights = open_shards(folder, WEIGHTS_FILE)
        optimizer_state = open_shards(folder, OPTIMIZER_FILE)
        self._optimizer.load_state(weights, optimizer_state)
        self._parallel.sync_params()
        self._loss_scaler.load_state_dict(state.loss_scale)
        self.step = state.step

    def _describe_model(self) -> dict[str, Any]:
        """Return the settings and fingerprints on which the tensors of a state depend."""
        recipe = self._checked.recipe
        tune = recipe.tune.model_dump(mode="json")
        settings = {f"tune.{name}": value for name, value in tune.items()}
        return {
            "model": self._checked.base_model.folder.fingerprint(),
            **settings,
            "train.optimizer": recipe.train.optimizer,
        }


def _check_settings(settings: Mapping[str, Any]) -> None:
    """Verify that a client uses all settings."""
    data = settings.get("data") or {}
    given = [*settings, *(settings.get("train") or {}), *(f"data.{name}" for name in data)]
    for name in given:
        if name in UNUSED_SETTINGS:
            raise UserError(
                f"the setting {name}",
                where="TrainingClient",
                expected="settings of the model, the optimizer and the encoding",
                remedy="pass samples, epochs and batch_size to load_batches, learning_rate to"
                " optim_step, and a function as loss to forward_backward",
            )


def _check_single_answers(batch: Sequence[PackedBatch]) -> None:
    """Verify that the cross entropy would not raise the probability of rejected answers."""
    for one in batch:
        # The prompt is the first sequence.
        has_pair = len(one.lengths) > len(one.sample_ids) + 1
        if has_pair and not one.loss_inputs:
            raise UserError(
                f"a rejected answer in sample {one.sample_ids[0]!r:.80}",
                where="forward_backward",
                expected="a loss function, which compares the answers of a pair",
                remedy="pass loss=FUNCTION, or leave out rejected to train on the answer",
            )
