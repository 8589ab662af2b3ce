"""Rollouts for GRPO: responses of the current model, their rewards and advantages.

The inference engine runs in the training process, on the weights of the step. Responses depend only
on weights, seed, step and sample, so a resumed run generates the same ones.

Shapes: Q groups, G responses of a group, F rewards, L supervised tokens, T tokens.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from finesight.data.boxes import measure_overlap, sort_corners
from finesight.data.sample import LocatedSample
from finesight.encode.family import FRAME_1000, scale_box
from finesight.encode.packing import PackedBatch, pack
from finesight.encode.renderer import NativeRenderer, Renderer
from finesight.encode.tokenization import EncodedSample, VisualSpan
from finesight.evaluate.eval_case import EvalCase, get_reference_answer
from finesight.evaluate.prediction_file import create_case, format_prediction_line
from finesight.evaluate.rewards import RewardScorer
from finesight.infer.block_manager import append_tokens, hash_images
from finesight.infer.prediction import (
    NUM_READER_THREADS,
    Prediction,
    ResponseSampler,
    build_prediction,
)
from finesight.infer.request import GeneratedToken, GenerationRequest, SamplingParams
from finesight.model.hf_backend import AnyModel
from finesight.model.linear import LoraLinear
from finesight.model.vlm import VisionLanguageModel
from finesight.storage import append_line
from finesight.train.objectives.preferences import compute_token_logps
from finesight.train.recipe_check import MAX_TRUNCATED_SHARE, suggest_completion_length
from finesight.train.state import TrainState
from finesight.train.step_dataset import IndexedSample, SkippedSample, StepBatch
from finesight.train.vision_cache_builder import free_gpu_memory

FloatArray = NDArray[np.float64]

STD_EPSILON = 1e-4
"""Added to the standard deviation of rewards, as in TRL."""

NUM_CHECKED_RESPONSES = 128
"""Number of responses after which a run warns that nearly all rewards are 0."""

MAX_USELESS_SHARE = 0.02
"""Share of responses with a reward up to which a run warns."""

FRAMES = (
    "thousandths of the image",
    "pixels of the image",
    "pixels of the resized image",
    "fractions of the image",
)
"""Coordinate frames of boxes in texts."""

MAX_CORNER = 1.05
"""Maximum coordinate of a box as a fraction of its image; other boxes are in another frame."""

MAX_FRAME_CHECKS = 4
"""Number of comparisons of coordinate frames, each after twice as many responses."""

MAX_FRAME_P_VALUE = 1e-3
"""P-value of a one-sided sign test over samples, up to which a frame is better than the usual one.

The frame also has at least twice the mean IoU, and `MIN_FRAME_IOU`. A model that was tuned on boxes
in another frame has a low IoU in every frame.
"""

MIN_FRAME_IOU = 0.01

MAX_RECORDED_GROUPS = 100
"""Maximum number of groups in `responses.jsonl` of a run."""


class Group(NamedTuple):
    """Encoded prompt of a sample, its responses, and their rewards [G, F], NaN if not scored."""

    sample_index: int
    prompt: EncodedSample
    responses: list[list[GeneratedToken]]
    rewards_GF: FloatArray
    predictions: list[Prediction]
    cases: list[EvalCase]


class RolloutRecord(NamedTuple):
    """Responses of a step on one rank, as all ranks exchange them.

    Attributes:
        rewards: Rewards by group, response and reward function; NaN if not scored.
        num_useful: Number of groups of the update.
        num_tokens: Number of tokens of the update.
    """

    rewards: list[list[list[float]]]
    lengths: list[int]
    is_truncated: list[bool]
    num_useful: int
    num_tokens: int


class RewardCheck:
    """Check of the first responses of a run, which warns once if nearly all rewards are 0.

    It warns of truncated responses instead if they are most of them, because truncation explains
    missing rewards. It also warns once if predicted boxes match the references better in another
    coordinate frame, and names the frame.

    Args:
        length_remedy: What to do about responses that reach `max_completion_length`.
    """

    def __init__(
        self, renderer: Renderer, log: Callable[[str], None], length_remedy: str = ""
    ) -> None:
        self._renderer, self._log = renderer, log
        self._length_remedy = length_remedy
        self._num_responses = self._num_rewarded = self._num_checks = self._num_truncated = 0
        self._matches: dict[str, list[list[tuple[float, bool]]]] = {}
        """Overlap of each box, and if it is within the image, in all frames, by sample."""

    def add(
        self, cases: Sequence[EvalCase], totals_G: FloatArray, spans: Sequence[VisualSpan]
    ) -> None:
        """Count the responses of a group with their weighted rewards, and warn if necessary."""
        if self._num_checks >= MAX_FRAME_CHECKS:
            return
        self._num_responses += len(cases)
        self._num_rewarded += int((np.nan_to_num(totals_G) > 0).sum())
        self._num_truncated += sum(not case.ended_with_eos for case in cases)
        if isinstance(self._renderer, NativeRenderer):
            images = [span for span in spans if span.kind == "image"]
            self._compare_boxes(self._renderer, cases, images)
        if self._num_responses >= NUM_CHECKED_RESPONSES << self._num_checks:
            self._num_checks += 1
            frame = self._describe_frame()
            if text := "; ".join(filter(None, (self._describe_rewards(), frame))):
                self._log(text)
            self._num_checks = MAX_FRAME_CHECKS if frame else self._num_checks

    def finish(self) -> None:
        """Warn about missing rewards of a run that ended before the check."""
        if 0 < self._num_responses < NUM_CHECKED_RESPONSES and (text := self._describe_rewards()):
            self._log(text)

    def _compare_boxes(
        self, renderer: NativeRenderer, cases: Sequence[EvalCase], images: Sequence[VisualSpan]
    ) -> None:
        """Collect the overlap of predicted boxes and references, in each coordinate frame.

        Corners are sorted, because a model in a wrong frame often writes them in reverse.
        """
        for case in cases:
            for box, reference in zip(case.boxes, case.reference_boxes, strict=False):
                image = images[box.image]
                own = renderer.family.box_frame(image.resized_size)
                raw = scale_box(box.xyxy, image.original_size, own)
                frames = own, FRAME_1000, image.original_size, image.resized_size, (1, 1)
                expected = scale_box(reference.xyxy, image.original_size, (1, 1))
                found = [sort_corners(scale_box(raw, frame, (1, 1))) for frame in frames]
                matches = [(measure_overlap(b, expected), max(b) <= MAX_CORNER) for b in found]
                self._matches.setdefault(case.id, []).append(matches)

    def _describe_rewards(self) -> str:
        """Return the warning of the first check; empty for complete responses with rewards."""
        if self._num_checks > 1:
            return ""
        if self._num_truncated > MAX_TRUNCATED_SHARE * self._num_responses:
            return (
                f"{self._num_truncated} of the first {self._num_responses} responses are"
                f" truncated: {self._length_remedy}"
            )
        num_useless = self._num_responses - self._num_rewarded
        if self._num_rewarded > MAX_USELESS_SHARE * self._num_responses:
            return ""
        return (
            f"{num_useless} of the first {self._num_responses} responses have no reward: fine-tune"
            " with train.objective=sft on some labelled samples first, or check rewards and the"
            " format of the answers"
        )

    def _describe_frame(self) -> str:
        """Return the warning of a coordinate frame; empty if none is better than the usual one."""
        if not self._matches:
            return ""
        # Responses to one sample are alike, so samples are compared.
        samples = np.array([np.mean(one, axis=0) for one in self._matches.values()])
        overlaps_NC, inside_NC = samples[..., 0], samples[..., 1]
        usual, *others = overlaps_NC.mean(axis=0)
        # Most boxes of the frame are within their images.
        best = int(np.argmax(others * (inside_NC.mean(axis=0)[1:] > 0.5)))
        gains_N = overlaps_NC[:, 1 + best] - overlaps_NC[:, 0]
        num_better, num_worse = int((gains_N > 0).sum()), int((gains_N < 0).sum())
        total = num_better + num_worse
        # One-sided sign test: as many successes or more by chance.
        outcomes = (math.comb(total, n) for n in range(num_better, total + 1))
        p_value = sum(outcomes) / 2**total
        if p_value > MAX_FRAME_P_VALUE or others[best] < max(2 * usual, MIN_FRAME_IOU):
            return ""
        return (
            f"the boxes match the references as {FRAMES[best]} (mean overlap {others[best]:.2f},"
            f" now {usual:.2f}): boxes of answers or of data probably have another coordinate frame"
        )


class Rollout:
    """Sampler of responses to the prompts of training steps, on this rank."""

    def __init__(self, state: TrainState) -> None:
        recipe = state.run.recipe
        self.state = state
        self.settings, self.seed = recipe.train.grpo, recipe.train.seed
        self.sampling = recipe.train.sampling or recipe.train.grpo
        self.banned_ids = state.data.renderer.visual_token_ids
        self.scorer = RewardScorer(recipe.rewards, state.run.run_dir.path)
        self.weights_F = np.array(self.scorer.weights)
        self.log = state.run.console.log
        length_remedy = suggest_completion_length(recipe, state.data.train)
        self.check = RewardCheck(state.data.renderer, self.log, length_remedy)
        self.reward_s, self.first_step = 0.0, 0
        engine = state.engine
        assert isinstance(engine.model, VisionLanguageModel), "a model of the transformers backend"
        self.sampler = ResponseSampler(
            engine.model,
            state.data.renderer.end_ids,
            self.sampling.batch_size,
            engine.parallel.is_sharded,
        )

    def read_steps(self, start: int) -> Generator[StepBatch, None, None]:
        """Yield the steps from `start` on, each generated when it is requested."""
        self.first_step = start
        with self.scorer:
            for step in range(start, len(self.state.data.sampler)):
                yield self.build_step(step)
        self.check.finish()

    def build_step(self, step: int) -> StepBatch:
        """Generate, score and pack the responses of a step.

        Raises:
            TrainingInterrupted: A stop was requested.
            RewardError: A reward function failed.
        """
        process_group = self.state.run.hardware.process_group
        skipped: list[SkippedSample] = []
        start_time, self.reward_s = time.perf_counter(), 0.0
        with self.state.engine.parallel.summon_full_params(), process_group.sync_errors():
            sampled, useful = self.sample_useful(step, skipped)
        own = RolloutRecord(
            rewards=[group.rewards_GF.tolist() for group in sampled],
            lengths=[len(tokens) for group in sampled for tokens in group.responses],
            is_truncated=[not one.ended_with_eos for group in sampled for one in group.cases],
            num_useful=len(useful),
            num_tokens=sum(map(self.count_tokens, useful)),
        )
        records = [RolloutRecord(*one) for one in process_group.all_gather_object(own)]
        rewards_QGF = np.array([group for one in records for group in one.rewards], np.float64)
        if step == self.first_step:
            for text in describe_unscored(self.scorer.names, rewards_QGF):
                self.log(text)
        times = {
            "rollout_s": time.perf_counter() - start_time - self.reward_s,
            "reward_s": self.reward_s,
        }
        interval = -(-len(self.state.data.sampler) // MAX_RECORDED_GROUPS)
        if step % interval == 0 and useful and process_group.is_main:
            self.record_group(step, useful[0], rewards_QGF)
        packs = [
            (group.sample_index, packed_batch)
            for group in useful
            for packed_batch in self.pack_group(group, records, rewards_QGF)
        ]
        return StepBatch(
            step,
            tuple(packed_batch for _, packed_batch in packs),
            tuple(skipped),
            tuple((index,) for index, _ in packs),
            metrics={
                **describe_rewards(self.scorer.names, self.weights_F, rewards_QGF, records),
                **times,
            },
        )

    def sample_useful(
        self, step: int, skipped: list[SkippedSample]
    ) -> tuple[list[Group], list[Group]]:
        """Sample the groups of a step, and return all of them and those with different rewards.

        Groups with equal rewards have no gradient. Groups of later samples replace them, up to
        `train.grpo.max_refills` times.
        """
        state, max_refills = self.state, self.settings.max_refills
        indices = state.engine.step_dataset.sampler.batch_indices(step)
        num_wanted = len(indices)
        sampled, useful = list[Group](), list[Group]()
        for attempt in range(max_refills + 1):
            if attempt:
                others = state.data.sampler.replacement_indices(step * max_refills + attempt - 1)
                own = state.run.hardware.process_group.shard(others)
                indices = own[: num_wanted - len(useful)]
            groups = self.sample_groups(step, indices, skipped)
            sampled += groups
            totals = [_drop_nan(_weigh(one.rewards_GF, self.weights_F)) for one in groups]
            useful += [one for one, x in zip(groups, totals, strict=True) if len({*x.tolist()}) > 1]
            if len(useful) >= num_wanted:
                break
        return sampled, useful

    def sample_groups(
        self, step: int, indices: Sequence[int], skipped: list[SkippedSample]
    ) -> list[Group]:
        """Generate and score the responses of samples; unreadable ones are skipped."""
        renderer = self.state.data.renderer
        prompts = self.read_samples(indices, renderer.encode_prompt, skipped)
        groups, corpus = list[Group](), self.state.data.train.corpus
        for (index, prompt), tokens in zip(prompts, self.generate(step, prompts), strict=True):
            sample = corpus[index]
            predictions = [
                build_prediction(renderer, sample, prompt.tokenized, [one.id for one in ids])
                for ids in tokens
            ]
            references = get_reference_answer(
                sample.sample, has_reasoning=renderer.renders_reasoning
            )
            cases = [create_case(one, references) for one in predictions]
            start_time = time.perf_counter()
            rewards_FG = np.array(self.scorer.score(cases), dtype=np.float64)
            self.reward_s += time.perf_counter() - start_time
            groups.append(Group(index, prompt, tokens, rewards_FG.T, predictions, cases))
            totals_G = _weigh(rewards_FG.T, self.weights_F)
            self.check.add(cases, totals_G, prompt.tokenized.spans)
        return groups

    def read_samples(
        self,
        indices: Sequence[int],
        encode: Callable[[LocatedSample], EncodedSample] | None,
        skipped: list[SkippedSample],
    ) -> list[IndexedSample]:
        """Read and encode samples in several threads, and add those that cannot be to `skipped`."""
        with ThreadPoolExecutor(NUM_READER_THREADS) as pool:
            read = self.state.engine.step_dataset.read_samples
            samples, own_skipped = read(indices, encode, pool.map)
        skipped += own_skipped
        return samples

    def generate(
        self, step: int, prompts: Sequence[IndexedSample]
    ) -> list[list[list[GeneratedToken]]]:
        """Sample the responses of each prompt; prompts share their keys and values."""
        state, count = self.state, len(prompts)
        image_hashes = [hash_images(prompt) for _, prompt in prompts]

        def build_request(number: int, position: int) -> GenerationRequest:
            index, prompt = prompts[position]
            name = f"{self.seed}/{step}/{index}/{number}"
            params = SamplingParams(
                temperature=self.sampling.temperature,
                seed=int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little"),
                banned_ids=self.banned_ids,
            )
            return GenerationRequest(
                prompt=prompt,
                max_new_tokens=self.sampling.max_completion_length,
                sampling_params=params,
                logprobs=0,
                processed_logprobs=True,
                image_hashes=image_hashes[position],
            )

        def on_progress(num_finished: int) -> None:
            if state.run.hardware.process_group.is_single_process:
                state.run.stop.raise_if_requested()

        # The first responses of all prompts precede the others, which reuse their prompts.
        numbers = range(self.sampling.num_generations)
        requests = [build_request(n, position) for n in numbers for position in range(count)]
        state.engine.model.eval()
        try:
            responses = self.sampler.sample(
                requests, on_progress, state.engine.graph_runner.release_graphs
            )
        finally:
            state.engine.model.train()
            # The graphs of an engine refer to the weights, which sharded modes gather elsewhere.
            device = state.run.hardware.device
            free = 0 if self.sampler.is_sharded else free_gpu_memory(device)
            # Graphs need half of the GPU memory; a CPU has none.
            if not free or 2 * free <= torch.cuda.get_device_properties(device).total_memory:
                self.sampler.engine = None
        return [responses[position::count] for position in range(count)]

    def record_group(self, step: int, group: Group, rewards_QGF: FloatArray) -> None:
        """Append responses with rewards and advantages as lines to `responses.jsonl`."""
        names, text = self.scorer.names, ""
        advantages = self.compute_advantages(group, rewards_QGF).tolist()
        for n, one in enumerate(zip(group.predictions, group.cases, strict=True)):
            scores = dict(zip(names, group.rewards_GF[n].tolist(), strict=True))
            further = {"step": step + 1, "response": n, "advantage": advantages[n]}
            text += format_prediction_line(*one, scores, **further)
        append_line(self.state.run.run_dir.responses_path, text.rstrip())

    def compute_advantages(self, group: Group, rewards_QGF: FloatArray) -> FloatArray:
        """Return the advantage of each response, [G]."""
        totals_G = _weigh(group.rewards_GF, self.weights_F)
        scale = 1.0
        if self.settings.scale_rewards != "none":
            is_group = self.settings.scale_rewards == "group"
            totals = totals_G if is_group else _weigh(rewards_QGF, self.weights_F)
            scale = float(np.nanstd(totals, ddof=1)) + STD_EPSILON
        return np.nan_to_num((totals_G - np.nanmean(totals_G)) / scale)

    def count_tokens(self, group: Group) -> int:
        """Return the number of tokens of a group that contribute to the loss."""
        return sum(len(group.responses[i]) for i in self.list_used(group))

    def list_used(self, group: Group) -> list[int]:
        """Return the responses of a group that contribute to the loss."""
        is_masked = self.settings.mask_truncated_completions
        return [n for n, one in enumerate(group.cases) if one.ended_with_eos or not is_masked]

    def pack_group(
        self, group: Group, records: Sequence[RolloutRecord], rewards_QGF: FloatArray
    ) -> Iterator[PackedBatch]:
        """Pack a group, in several packs if it exceeds the token budget.

        Args:
            records: Responses of the step on all ranks.
            rewards_QGF: Rewards of the step on all ranks.
        """
        advantages_G = self.compute_advantages(group, rewards_QGF)
        num_responses = sum(one.num_useful for one in records) * self.settings.num_generations
        mean_length = sum(one.num_tokens for one in records) / num_responses
        budget = self.state.progress.budget.pack_tokens - group.prompt.tokenized.num_tokens
        chunks: list[list[int]] = [[]]
        for n in self.list_used(group):
            length = sum(len(group.responses[other]) + 1 for other in chunks[-1])
            if chunks[-1] and length + len(group.responses[n]) + 1 > budget:
                chunks.append([])
            chunks[-1].append(n)
        for chunk in filter(None, chunks):
            responses = [group.responses[n] for n in chunk]
            encoded = join_responses(group.prompt, responses)
            lengths = np.array([len(tokens) for tokens in responses])
            # The loss is divided by the number of tokens of the step.
            weights_G = {
                "grpo": mean_length / lengths,
                "sapo": mean_length / lengths,
                "dr_grpo": np.full(len(chunk), mean_length / self.settings.max_completion_length),
            }.get(self.settings.loss_type, np.ones(len(chunk)))
            inputs = {
                "advantages_L": np.repeat(advantages_G[chunk], lengths),
                "token_weights_L": np.repeat(weights_G, lengths),
                "sampled_logps_L": np.array([one.logprob for ids in responses for one in ids]),
            }
            tensors = {name: torch.from_numpy(x).float() for name, x in inputs.items()}
            packed_batch = pack([encoded])
            if self.settings.beta:
                tensors["reference_logps_L"] = self.compute_reference(packed_batch)
            yield replace(packed_batch, loss_inputs=tensors)

    @torch.no_grad()
    def compute_reference(self, packed_batch: PackedBatch) -> Tensor:
        """Return the log-probabilities of the model without adapter, [L]."""
        engine = self.state.engine
        batch = engine.device_loader.load(packed_batch)
        with disable_adapters(engine.model):
            logps_L = compute_token_logps(
                engine.model(batch),
                engine.model.lm_head_weight,
                batch.labels_L,
                self.settings.temperature,
                self.banned_ids,
            )
        return logps_L.float().cpu()


class StudentRollout(Rollout):
    """Sampler of responses of the model for distillation, beside the answers of the data.

    A sample has a response of the model with the probability `train.distill.lmbda`, depending only
    on seed, step and sample.
    """

    def build_step(self, step: int) -> StepBatch:
        """Generate responses to a share of the samples of a step, and pack all samples.

        Raises:
            TrainingInterrupted: A stop was requested.
        """
        state, process_group = self.state, self.state.run.hardware.process_group
        skipped: list[SkippedSample] = []
        start_time, renderer = time.perf_counter(), state.data.renderer
        indices = state.engine.step_dataset.sampler.batch_indices(step)
        share = state.run.recipe.train.distill.lmbda
        draws = {index: Random(f"{self.seed}/{step}/{index}").random() for index in indices}
        sampled = [index for index in indices if draws[index] < share]
        others = [index for index in indices if draws[index] >= share]
        with state.engine.parallel.summon_full_params(), process_group.sync_errors():
            prompts = self.read_samples(sampled, renderer.encode_prompt, skipped)
            responses = self.generate(step, prompts)
            encoded = dict(self.read_samples(others, None, skipped))
        for (index, prompt), (tokens,) in zip(prompts, responses, strict=True):
            ids = [token.id for token in tokens]
            tokenized = append_tokens(prompt.tokenized, ids, is_supervised=True)
            encoded[index] = replace(prompt, tokenized=tokenized)
        counts_by_rank = process_group.all_gather_object([len(one) for (one,) in responses])
        counts = [*chain.from_iterable(counts_by_rank)]
        metrics = {"rollout_s": time.perf_counter() - start_time}
        if counts:
            metrics["completions/mean_length"] = float(np.mean(counts))
        samples = [(index, encoded[index]) for index in indices if index in encoded]
        dataset = state.engine.step_dataset.with_pack_tokens(state.progress.budget.pack_tokens)
        return replace(dataset.pack_step(step, samples, skipped)[0], metrics=metrics)


def join_responses(
    prompt: EncodedSample, responses: Sequence[Sequence[GeneratedToken]]
) -> EncodedSample:
    """Return the sample with the responses of a prompt, of which all tokens are supervised."""
    first, *others = (
        append_tokens(prompt.tokenized, [one.id for one in tokens], is_supervised=True)
        for tokens in responses
    )
    return replace(prompt, tokenized=first.join_responses(others))


@contextmanager
def disable_adapters(model: AnyModel) -> Iterator[None]:
    """Set the up-projections of all LoRA adapters to zero within the context."""
    layers = [module for module in model.modules() if isinstance(module, LoraLinear)]
    parameters = [parameter for layer in layers for parameter in layer.lora_B.values()]
    saved = [parameter.detach().clone() for parameter in parameters]
    torch._foreach_zero_(parameters)
    try:
        yield
    finally:
        torch._foreach_copy_(parameters, saved)


def describe_rewards(
    names: Sequence[str],
    weights_F: FloatArray,
    rewards_QGF: FloatArray,
    records: Sequence[RolloutRecord],
) -> Mapping[str, float]:
    """Return the metrics of the responses of a step, with the names of TRL."""
    lengths = np.array([length for one in records for length in one.lengths])
    if not len(lengths):
        return {}
    totals_QG = _weigh(rewards_QGF, weights_F)
    scored = [x for totals_G in totals_QG if len(x := _drop_nan(totals_G)) > 1]
    spread_Q = np.array([np.std(x, ddof=1) for x in scored])
    metrics = {
        "reward": _mean(_drop_nan(totals_QG)),
        "reward_std": _mean(spread_Q),
        "frac_reward_zero_std": _mean(spread_Q == 0),
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/clipped_ratio": np.mean([f for one in records for f in one.is_truncated]),
    }
    for name, rewards_QG in zip(names, np.moveaxis(rewards_QGF, 2, 0), strict=True):
        values = _drop_nan(rewards_QG)
        metrics[f"rewards/{name}/mean"] = _mean(values)
        metrics[f"rewards/{name}/std"] = np.std(values, ddof=1) if len(values) > 1 else np.nan
    return {name: float(value) for name, value in metrics.items() if np.isfinite(value)}


UNSCORED_REASONS = {
    "json": "these references are no JSON",
    "math": "these references are no formulas",
    "latex": "these references are no LaTeX that can be rendered",
}
"""Reasons why no response has a score of a reward, by its name or metric."""


def describe_unscored(names: Sequence[str], rewards_QGF: FloatArray) -> list[str]:
    """Describe the rewards that scored no response of a step."""
    texts = list[str]()
    for name, rewards_QG in zip(names, np.moveaxis(rewards_QGF, -1, 0), strict=False):
        if rewards_QG.size and np.isnan(rewards_QG).all():
            reason = UNSCORED_REASONS.get(name.partition(".")[0], "it returned no number")
            count = f"0 of {rewards_QG.size} responses have a score of the reward {name}"
            texts.append(f"warning: {count}: {reason}")
    return texts


def _weigh(rewards: FloatArray, weights_F: FloatArray) -> FloatArray:
    """Return the weighted sums over the last axis; NaN for responses that no reward scores."""
    sums: FloatArray = np.nansum(rewards * weights_F, axis=-1)
    return np.where(np.isnan(rewards).all(axis=-1), np.nan, sums)


def _drop_nan(values: FloatArray) -> FloatArray:
    return values[~np.isnan(values)]


def _mean(values: NDArray[Any]) -> float:
    return float(values.mean()) if len(values) else np.nan
