"""Batches of training loops in Python programs: packs, sampled responses, and their checks.

Shapes: L supervised tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from finesight.encode.batch import PackedBatch
from finesight.encode.packing import pack
from finesight.encode.tokenization import EncodedSample
from finesight.errors import UserError, format_count
from finesight.evaluate.eval_case import EvalCase
from finesight.infer.prediction import Prediction
from finesight.infer.request import GeneratedToken
from finesight.progress import ProgressConsole
from finesight.samples.sample import Sample
from finesight.train.objectives.response_objective import find_responses
from finesight.train.rollout import join_responses, split_responses
from finesight.train.step_dataset import StepDataset, read_steps

Batch = tuple[PackedBatch, ...]
"""Packs of a training step."""


OWN_INPUTS = ("labels_L", "loss_weight", "response_L", "advantages_L", "sampled_logps_L")
"""Names of the tensors that batches and losses have themselves."""


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
    """Batches of a training from `start` on, read by worker processes during the iteration."""

    dataset: StepDataset
    start: int
    num_workers: int
    pin_memory: bool
    console: ProgressConsole

    def __len__(self) -> int:
        return len(self.dataset) - self.start

    def __iter__(self) -> Iterator[Batch]:
        for step_batch in read_steps(self.dataset, self.start, self.num_workers, self.pin_memory):
            for one in step_batch.skipped:
                self.console.log(f"skipped {one.id}: {one.reason}")
            if step_batch.packs:
                yield tuple(map(index_responses, step_batch.packs))


def add_inputs(batch: Sequence[PackedBatch], inputs: Mapping[str, Sequence[Tensor]]) -> Batch:
    """Return packs with further tensors, one for each pack by name; see the client.

    Raises:
        UserError: The number of tensors or their lengths differ from those of the packs.
    """
    check_batch(batch, "add_inputs")
    packs = list(batch)
    for name, tensors in inputs.items():
        if name in OWN_INPUTS:
            raise UserError(
                f"the name {name}",
                where="add_inputs",
                expected=f"another name than {', '.join(OWN_INPUTS)}",
                remedy=f"rename it, such as my_{name}",
            )
        if len(tensors) != len(packs):
            raise _build_input_error(name, f"{len(tensors)} tensors", f"{len(packs)} tensors")
        for position, tensor in enumerate(tensors):
            one = packs[position]
            shape = one.labels_L.shape
            if not isinstance(tensor, Tensor) or tensor.shape != shape:
                given = getattr(tensor, "shape", type(tensor).__name__)
                expected = f"a tensor of the shape {tuple(shape)} for pack {position}"
                raise _build_input_error(name, f"{type(tensor).__name__} {given}", expected)
            packs[position] = replace(one, loss_inputs={**one.loss_inputs, name: tensor})
    return tuple(packs)


def _build_input_error(name: str, given: str, expected: str) -> UserError:
    return UserError(
        f"{name}: {given:.80}",
        where="add_inputs",
        expected=expected,
        remedy="pass one tensor for each pack, such as client.compute_logps(batch)",
    )


def pack_group(
    group: ResponseGroup, advantages: Sequence[float], token_budget: int
) -> Iterator[PackedBatch]:
    """Pack a group, in several packs if it exceeds the token budget."""
    lengths = [len(prediction.tokens) for prediction in group.predictions]
    num_prompt_tokens = group.prompt.tokenized.num_tokens
    for chunk in split_responses(num_prompt_tokens, lengths, token_budget):
        responses: list[Sequence[GeneratedToken]] = []
        values: list[float] = []
        logps: list[float | None] = []
        for position in chunk:
            tokens = group.predictions[position].tokens
            responses.append(tokens)
            for token in tokens:
                values.append(advantages[position])
                logps.append(token.logprob)
        packed_batch = pack([join_responses(group.prompt, responses)])
        loss_inputs = {
            "response_L": find_responses(packed_batch),
            "advantages_L": torch.tensor(values),
            "sampled_logps_L": torch.tensor(logps),
        }
        yield replace(packed_batch, loss_inputs=loss_inputs)


def check_kinds(samples: Iterable[Sample], family: str, *, is_native: bool) -> None:
    """Verify that a loss function can tell the answers of samples apart."""
    for position, sample in enumerate(samples):
        problem = ""
        if sample.rejected and not is_native:
            problem = f"a pair for a model of the family {family}"
        if sample.label is False:
            problem = "a wrong answer (label=False)"
        if problem:
            raise UserError(
                problem,
                where=f"samples[{position}]",
                expected="samples with correct answers, and pairs for native model families",
                remedy="leave the sample out, or use finesight.train with an objective for it",
            )


def index_responses(packed_batch: PackedBatch) -> PackedBatch:
    """Add the response of each label to the pack of a pair."""
    # The first sequence is the prompt. Other packs have a sequence per sample.
    if len(packed_batch.lengths) <= len(packed_batch.sample_ids) + 1:
        return packed_batch
    return replace(packed_batch, loss_inputs={"response_L": find_responses(packed_batch)})


def check_batch(batch: Sequence[PackedBatch], where: str) -> None:
    """Verify the type of a batch, which has at least one pack."""
    is_list = isinstance(batch, list | tuple)
    if is_list and batch and all(isinstance(one, PackedBatch) for one in batch):
        return
    raise UserError(
        f"a batch of {len(batch)} packs" if is_list and not batch else f"{batch!r:.60}",
        where=where,
        expected="at least one pack of encode, load_batches or encode_responses",
        remedy="pass client.encode(samples), and leave out the step if there are no packs",
    )


def check_single_answers(batch: Sequence[PackedBatch], temperature: float, where: str) -> None:
    """Verify that the cross entropy would not raise the probability of rejected answers."""
    if temperature != 1.0:
        raise UserError(
            f"temperature={temperature!r:.60} without a loss function",
            where=where,
            expected="a temperature for a loss function only",
            remedy="remove it, or pass loss=FUNCTION",
        )
    for one in batch:
        if "response_L" in one.loss_inputs and "sampled_logps_L" not in one.loss_inputs:
            raise UserError(
                f"a rejected answer in sample {one.sample_ids[0]!r:.80}",
                where=where,
                expected="a loss function, which compares the answers of a pair",
                remedy="pass loss=FUNCTION, or leave out rejected to train on the answer",
            )
