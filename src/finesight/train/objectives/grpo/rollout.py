"""Rollouts of GRPO: groups of responses, their rewards and advantages.

Shapes: Q groups, G responses of a group, F rewards, L supervised tokens, T tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import chain, starmap
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from finesight.encode.batch import PackedBatch
from finesight.encode.packing import pack
from finesight.encode.renderer import NativeRenderer, Renderer
from finesight.encode.tokenization import EncodedSample, VisualSpan
from finesight.errors import format_count
from finesight.evaluate.environment import Environment
from finesight.evaluate.episode import (
    Episode,
    EpisodeRunner,
    add_episode,
    add_tools,
    build_start,
    derive_environment_seed,
    open_environment,
)
from finesight.evaluate.eval_case import EvalCase, ReferenceAnswer, get_reference_answer
from finesight.evaluate.prediction_file import create_case, format_prediction_line
from finesight.evaluate.reward_scorer import RewardScorer, describe_unscored
from finesight.files.storage import append_line
from finesight.infer.prediction import (
    Prediction,
    build_prediction,
)
from finesight.infer.request import GeneratedToken
from finesight.model.backend_model import BackendModel
from finesight.model.linear import LoraLinear
from finesight.samples.boxes import measure_overlap, sort_corners
from finesight.samples.frames import FRAME_1000, rescale
from finesight.samples.sample import LocatedSample
from finesight.train.objectives.grpo import COMPONENT
from finesight.train.recipe_check import MAX_TRUNCATED_SHARE, suggest_completion_length
from finesight.train.rollout import Rollout, join_sequences, split_responses
from finesight.train.state import TrainState
from finesight.train.step_batch import SkippedSample, StepBatch
from finesight.train.step_dataset import IndexedSample
from finesight.train.token_logps import compute_token_logps

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

MAX_LOGGED_ERRORS = 10
"""Maximum number of different errors of environments that a run prints."""

MAX_RECORDED_GROUPS = 100
"""Maximum number of groups in `responses.jsonl` of a run."""


class Group(NamedTuple):
    """Encoded prompt of a sample, its responses, and their rewards [G, F], NaN if not scored."""

    sample_index: int
    prompt: EncodedSample
    episodes: list[Episode]
    rewards_GF: FloatArray
    predictions: list[Prediction]
    cases: list[EvalCase]

    @property
    def responses(self) -> list[list[GeneratedToken]]:
        """Sampled tokens of each response."""
        return [episode.tokens for episode in self.episodes]


class RolloutRecord(NamedTuple):
    """Responses of a step on one rank, as all ranks exchange them.

    Attributes:
        rewards: Rewards by group, response and reward function; NaN if not scored.
        num_responses: Number of responses of the groups of the update, without failed episodes.
        num_tokens: Number of tokens of the update.
        episodes: Number of turns, tool calls and mistakes of each response, and whether the
            environment failed; empty without an environment.
    """

    rewards: list[list[list[float]]]
    lengths: list[int]
    is_truncated: list[bool]
    num_responses: int
    num_tokens: int
    episodes: Sequence[tuple[int, int, int, bool]] = ()


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
        self._renderer = renderer
        self._log = log
        self._length_remedy = length_remedy
        self._num_responses = 0
        self._totals: list[float] = []
        self._num_truncated = 0
        self._num_checks = 0
        self._matches: dict[str, list[list[tuple[float, bool]]]] = {}
        """Overlap of each box, and if it is within the image, in all frames, by sample."""

    def add(
        self, cases: Sequence[EvalCase], totals_G: FloatArray, spans: Sequence[VisualSpan]
    ) -> None:
        """Count the responses of a group with their weighted rewards, and warn if necessary."""
        if self._num_checks >= MAX_FRAME_CHECKS:
            return
        self._num_responses += len(cases)
        self._totals += np.nan_to_num(totals_G).tolist()
        self._num_truncated += sum(not case.ended_with_eos for case in cases)
        if self._renderer.is_native:
            images = [span for span in spans if span.kind == "image"]
            self._compare_boxes(self._renderer.native, cases, images)
        if self._num_responses >= NUM_CHECKED_RESPONSES << self._num_checks:
            self._num_checks += 1
            frame_warning = self._describe_frame()
            warnings = [self._describe_rewards(), frame_warning]
            text = "; ".join(filter(None, warnings))
            if text:
                self._log(text)
            if frame_warning:
                self._num_checks = MAX_FRAME_CHECKS

    def finish(self) -> None:
        """Warn about missing rewards of a run that ended before the check."""
        if 0 < self._num_responses < NUM_CHECKED_RESPONSES:
            text = self._describe_rewards()
            if text:
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
                usual_frame = renderer.family.box_frame(image.resized_size)
                # The numbers of the answer, before they were read in the usual frame.
                written = rescale(box.xyxy, image.original_size, usual_frame)
                frames = (
                    usual_frame,
                    FRAME_1000,
                    image.original_size,
                    image.resized_size,
                    (1, 1),
                )
                expected = rescale(reference.xyxy, image.original_size, (1, 1))
                matches = []
                for frame in frames:
                    found = sort_corners(rescale(written, frame, (1, 1)))
                    is_inside = max(found) <= MAX_CORNER
                    matches.append((measure_overlap(found, expected), is_inside))
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
        # Rewards that are penalties are below 0.
        lowest = min(0.0, *self._totals)
        num_useless = sum(total <= lowest for total in self._totals)
        if num_useless < (1 - MAX_USELESS_SHARE) * self._num_responses:
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
        samples = np.array([np.mean(matches, axis=0) for matches in self._matches.values()])
        overlaps_NC = samples[..., 0]
        inside_NC = samples[..., 1]
        usual, *others = overlaps_NC.mean(axis=0)
        # Most boxes of the frame are within their images.
        is_plausible = inside_NC.mean(axis=0)[1:] > 0.5
        best = int(np.argmax(others * is_plausible))
        gains_N = overlaps_NC[:, 1 + best] - overlaps_NC[:, 0]
        num_better = int((gains_N > 0).sum())
        num_worse = int((gains_N < 0).sum())
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


class GrpoRollout(Rollout):
    """Sampler of groups of responses with rewards and advantages, on this rank."""

    def __init__(self, state: TrainState) -> None:
        super().__init__(state)
        recipe = state.run.recipe
        self.settings = COMPONENT.settings_of(recipe.train)
        self.scorer = RewardScorer(recipe.rewards, state.run.run_dir.path)
        self.weights_F = np.array(self.scorer.weights)
        length_remedy = suggest_completion_length(recipe, state.data.train)
        self.check = RewardCheck(state.data.renderer, self.log, length_remedy)
        self.reward_s = 0.0
        self.environment: Environment | None = None
        if self.sampling.episodes is not None:
            self.environment = open_environment(self.sampling.episodes, recipe.output_dir)
        self.logged_errors: set[str] = set()

    def read_steps(self, start: int) -> Generator[StepBatch, None, None]:
        """Yield the steps from `start` on, each generated when it is requested."""
        with self.scorer, self.environment or nullcontext():
            yield from super().read_steps(start)
        self.check.finish()

    def build_step(self, step: int) -> StepBatch:
        """Generate, score and pack the responses of a step.

        Raises:
            TrainingInterrupted: A stop was requested.
            RewardError: A reward function failed.
        """
        process_group = self.state.run.hardware.process_group
        skipped: list[SkippedSample] = []
        start_time = time.perf_counter()
        self.reward_s = 0.0
        with self.state.engine.parallel.summon_full_params():
            with process_group.sync_errors():
                sampled, useful = self.sample_useful(step, skipped)
            own_record = self.build_record(sampled, useful)
            records = list(starmap(RolloutRecord, process_group.all_gather_object(own_record)))
            rewards = chain.from_iterable(record.rewards for record in records)
            rewards_QGF = np.array(list(rewards), np.float64)
            rollout_s = time.perf_counter() - start_time - self.reward_s
            packs: list[PackedBatch] = []
            sample_indices: list[tuple[int, ...]] = []
            # The ranks have different numbers of packs, which run the reference model.
            with process_group.sync_errors():
                for group in useful:
                    for packed_batch in self.pack_group(group, records, rewards_QGF):
                        packs.append(packed_batch)
                        sample_indices.append((group.sample_index,))
        if step == self.first_step:
            for text in describe_unscored(self.scorer.names, rewards_QGF):
                self.log(text)
        record_interval = -(-len(self.state.data.sampler) // MAX_RECORDED_GROUPS)
        if step % record_interval == 0 and process_group.is_main:
            compared = next(filter(self.has_different_rewards, useful), None)
            if compared is not None:
                self.record_group(step, compared, rewards_QGF)
        metrics = {
            **describe_rewards(self.scorer.names, self.weights_F, rewards_QGF, records),
            "rollout_s": rollout_s,
            "reward_s": self.reward_s,
        }
        return StepBatch(step, tuple(packs), tuple(skipped), tuple(sample_indices), metrics=metrics)

    def build_record(self, sampled: Sequence[Group], useful: Sequence[Group]) -> RolloutRecord:
        """Build the record of all groups of this rank and those of the update."""
        rewards = []
        lengths: list[int] = []
        is_truncated = []
        for group in sampled:
            rewards.append(group.rewards_GF.tolist())
            lengths += map(len, group.responses)
            for case in group.cases:
                is_truncated.append(not case.ended_with_eos)
        num_responses = 0
        for group in useful:
            num_responses += sum(not episode.error for episode in group.episodes)
        record = RolloutRecord(
            rewards,
            lengths,
            is_truncated,
            num_responses=num_responses,
            num_tokens=sum(map(self.count_tokens, useful)),
        )
        if self.environment is None:
            return record
        counts = []
        for episode in chain.from_iterable(group.episodes for group in sampled):
            has_error = bool(episode.error)
            counts.append((episode.num_turns, episode.num_calls, episode.num_mistakes, has_error))
        return record._replace(episodes=counts)

    def sample_useful(
        self, step: int, skipped: list[SkippedSample]
    ) -> tuple[list[Group], list[Group]]:
        """Sample the groups of a step, and return all and those with a gradient.

        Groups of later samples replace the others, up to `train.grpo.max_refills` times.
        """
        state = self.state
        max_refills = self.settings.max_refills
        indices = state.engine.step_dataset.sampler.batch_indices(step)
        num_wanted = len(indices)
        sampled: list[Group] = []
        useful: list[Group] = []
        for attempt in range(max_refills + 1):
            if attempt:
                others = state.data.sampler.replacement_indices(step * max_refills + attempt - 1)
                own = state.run.hardware.process_group.shard(others)
                indices = own[: num_wanted - len(useful)]
            groups = self.sample_groups(step, indices, skipped)
            sampled += groups
            useful += filter(self.has_gradient, groups)
            if len(useful) >= num_wanted:
                break
        return sampled, useful

    def has_gradient(self, group: Group) -> bool:
        """Return whether rewards or KL divergence of a group have a gradient."""
        return self.settings.beta > 0 or self.has_different_rewards(group)

    def has_different_rewards(self, group: Group) -> bool:
        """Return whether the responses of a group have at least two different rewards."""
        return not are_equal(_drop_nan(_weigh(group.rewards_GF, self.weights_F)))

    def sample_groups(
        self, step: int, indices: Sequence[int], skipped: list[SkippedSample]
    ) -> list[Group]:
        """Generate and score the responses of samples; unreadable ones are skipped."""
        prompts = self.read_samples(indices, self.encode_prompt, skipped)
        groups = []
        all_episodes = self.sample_episodes(step, prompts)
        for (index, prompt), episodes in zip(prompts, all_episodes, strict=True):
            group = self.score_responses(index, prompt, episodes)
            groups.append(group)
            totals_G = _weigh(group.rewards_GF, self.weights_F)
            # A failed episode has no reward, but says nothing about the rewards.
            scored = [n for n, episode in enumerate(episodes) if not episode.error]
            cases = [group.cases[n] for n in scored]
            self.check.add(cases, totals_G[scored], prompt.tokenized.spans)
        return groups

    def encode_prompt(self, located_sample: LocatedSample) -> EncodedSample:
        """Encode the prompt of a sample, with the tools of the environment."""
        if self.environment is not None:
            located_sample = add_tools(located_sample, self.environment.tools)
        return self.state.data.renderer.encode_prompt(located_sample)

    def sample_episodes(self, step: int, prompts: Sequence[IndexedSample]) -> list[list[Episode]]:
        """Sample the responses of each prompt, which have one turn without an environment."""
        if self.environment is None:
            responses = self.generate(step, prompts)
            single_turns = []
            for (_, prompt), group in zip(prompts, responses, strict=True):
                single_turns.append([Episode.from_answer(prompt, tokens) for tokens in group])
            return single_turns
        renderer = self.state.data.renderer.native
        starts = []
        for index, prompt in prompts:
            sample = self.state.data.train.corpus[index]
            references = self.get_references(index)
            # The responses of a group have the same seed, so that their rewards are comparable.
            seed = derive_environment_seed(f"{self.seed}/{step}/{index}")
            starts.append(build_start(sample, prompt.tokenized, references, renderer, seed))
        num_generations = self.settings.num_generations
        with EpisodeRunner(
            self.environment,
            renderer,
            lambda number, prompt: starts[number % len(starts)],
            self.settings.max_tool_calling_iterations,
        ) as runner:
            self.generate(step, prompts, runner.continue_episode, runner.restart_unfinished)
        self.log_errors(runner.errors)
        episodes = [runner.episodes[n] for n in range(len(starts) * num_generations)]
        return [episodes[position :: len(starts)] for position in range(len(starts))]

    def log_errors(self, errors: Mapping[str, int]) -> None:
        """Print new errors of the environment, at most `MAX_LOGGED_ERRORS` in a run."""
        for text, count in errors.items():
            if text in self.logged_errors or len(self.logged_errors) >= MAX_LOGGED_ERRORS:
                continue
            self.logged_errors.add(text)
            self.log(f"warning: {format_count(count, 'episode')} without a reward: {text}")

    def get_references(self, index: int) -> ReferenceAnswer:
        """Return the reference texts and boxes of a sample."""
        sample = self.state.data.train.corpus[index].sample
        has_reasoning = self.state.data.renderer.renders_reasoning
        return get_reference_answer(sample, has_reasoning=has_reasoning)

    def score_responses(self, index: int, prompt: EncodedSample, episodes: list[Episode]) -> Group:
        """Return the responses to the prompt of a sample as a group with its rewards.

        The answer of an episode is that of its last turn. An episode whose environment failed has
        no reward.
        """
        renderer = self.state.data.renderer
        sample = self.state.data.train.corpus[index]
        references = self.get_references(index)
        predictions = []
        cases = []
        for episode in episodes:
            ids = episode.answer_ids
            prediction = build_prediction(renderer, sample, prompt.tokenized, ids)
            if self.environment is not None:
                prediction = add_episode(prediction, episode)
            predictions.append(prediction)
            cases.append(create_case(prediction, references))
        start_time = time.perf_counter()
        rewards_GF = np.array(self.scorer.score(cases), dtype=np.float64).T
        self.reward_s += time.perf_counter() - start_time
        for n, episode in enumerate(episodes):
            if episode.error:
                rewards_GF[n] = np.nan
        return Group(index, prompt, episodes, rewards_GF, predictions, cases)

    def record_group(self, step: int, group: Group, rewards_QGF: FloatArray) -> None:
        """Append responses with rewards and advantages as lines to `responses.jsonl`."""
        text = ""
        advantages = self.compute_advantages(group, rewards_QGF).tolist()
        for n, (prediction, case) in enumerate(zip(group.predictions, group.cases, strict=True)):
            rewards = group.rewards_GF[n].tolist()
            scores = dict(zip(self.scorer.names, rewards, strict=True))
            text += format_prediction_line(
                prediction, case, scores, step=step + 1, response=n, advantage=advantages[n]
            )
        append_line(self.state.run.run_dir.responses_path, text.rstrip())

    def compute_advantages(self, group: Group, rewards_QGF: FloatArray) -> FloatArray:
        """Return the advantage of each response, [G]."""
        totals_G = _weigh(group.rewards_GF, self.weights_F)
        if not self.has_different_rewards(group):
            return np.zeros_like(totals_G)
        scale = 1.0
        if self.settings.scale_rewards != "none":
            totals = totals_G
            if self.settings.scale_rewards != "group":
                totals = _weigh(rewards_QGF, self.weights_F)
            scale = float(np.nanstd(totals, ddof=1)) + STD_EPSILON
        return np.nan_to_num((totals_G - np.nanmean(totals_G)) / scale)

    def count_tokens(self, group: Group) -> int:
        """Return the number of tokens of a group that contribute to the loss."""
        return sum(len(group.responses[i]) for i in self.list_used(group))

    def list_used(self, group: Group) -> list[int]:
        """Return the responses of a group that contribute to the loss, without failed episodes."""
        used = []
        for n, (case, episode) in enumerate(zip(group.cases, group.episodes, strict=True)):
            is_masked = self.settings.mask_truncated_completions and not case.ended_with_eos
            if not (is_masked or episode.error):
                used.append(n)
        return used

    def pack_group(
        self, group: Group, records: Sequence[RolloutRecord], rewards_QGF: FloatArray
    ) -> Iterator[PackedBatch]:
        """Pack a group, in several packs if it exceeds the token budget.

        Args:
            records: Responses of the step on all ranks.
            rewards_QGF: Rewards of the step on all ranks.
        """
        advantages_G = self.compute_advantages(group, rewards_QGF)
        num_responses = sum(one.num_responses for one in records)
        mean_length = sum(one.num_tokens for one in records) / max(1, num_responses)
        for chunk in self.split_group(group):
            episodes = [group.episodes[n] for n in chunk]
            encoded = join_sequences(group.prompt, [episode.sequence for episode in episodes])
            responses = [episode.tokens for episode in episodes]
            lengths_G = np.array([len(tokens) for tokens in responses])
            # The loss is divided by the number of tokens of the step. With these weights, it is a
            # mean over the responses.
            response_weights_G = mean_length / lengths_G
            if self.settings.loss_type in ("grpo", "sapo"):
                weights_G = response_weights_G
            elif self.settings.loss_type == "dr_grpo":
                weights_G = np.full(len(chunk), mean_length / self.settings.max_completion_length)
            else:
                weights_G = np.ones(len(chunk))
            logps = [token.logprob for token in chain.from_iterable(responses)]
            tensors = {
                "advantages_L": _repeat(advantages_G[chunk], lengths_G),
                "token_weights_L": _repeat(weights_G, lengths_G),
                "sampled_logps_L": torch.from_numpy(np.array(logps)).float(),
            }
            if self.settings.importance_sampling_level == "sequence":
                tensors["response_weights_L"] = _repeat(response_weights_G, lengths_G)
            packed_batch = pack([encoded])
            if self.settings.beta:
                tensors["reference_logps_L"] = self.compute_reference(packed_batch)
            yield replace(packed_batch, loss_inputs=tensors)

    def split_group(self, group: Group) -> list[list[int]]:
        """Split the responses of a group that contribute to the loss by the token budget."""
        used = self.list_used(group)
        num_prompt_tokens = group.prompt.tokenized.num_tokens
        lengths = []
        for n in used:
            num_tokens = group.episodes[n].sequence.tokenized.num_tokens
            lengths.append(num_tokens - num_prompt_tokens)
        budget = self.state.progress.budget.pack_tokens
        chunks = split_responses(num_prompt_tokens, lengths, budget)
        return [[used[position] for position in chunk] for chunk in chunks]

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


@contextmanager
def disable_adapters(model: BackendModel) -> Iterator[None]:
    """Set the up-projections of all LoRA adapters to zero within the context."""
    parameters: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, LoraLinear):
            parameters += module.lora_B.values()
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
    lengths: list[int] = []
    is_truncated: list[bool] = []
    for record in records:
        lengths += record.lengths
        is_truncated += record.is_truncated
    if not lengths:
        return {}
    totals_QG = _weigh(rewards_QGF, weights_F)
    deviations = []
    has_equal_rewards = []
    for totals_G in totals_QG:
        scored_G = _drop_nan(totals_G)
        if len(scored_G) > 1:
            deviations.append(np.std(scored_G, ddof=1))
            has_equal_rewards.append(are_equal(scored_G))
    metrics: dict[str, Any] = {
        "reward": _mean(_drop_nan(totals_QG)),
        "reward_std": _mean(np.array(deviations)),
        # Not by the standard deviation: that of equal rewards may differ from 0 by rounding.
        "frac_reward_zero_std": _mean(np.array(has_equal_rewards)),
        "completions/mean_length": np.mean(lengths),
        "completions/min_length": min(lengths),
        "completions/max_length": max(lengths),
        "completions/clipped_ratio": np.mean(is_truncated),
    }
    for name, rewards_QG in zip(names, np.moveaxis(rewards_QGF, 2, 0), strict=True):
        values = _drop_nan(rewards_QG)
        metrics[f"rewards/{name}/mean"] = _mean(values)
        if len(values) > 1:
            metrics[f"rewards/{name}/std"] = np.std(values, ddof=1)
    counts = [*chain.from_iterable(record.episodes for record in records)]
    if counts:
        num_turns, num_calls, num_mistakes, has_error = np.array(counts, dtype=np.float64).T
        metrics["episodes/mean_turns"] = num_turns.mean()
        metrics["episodes/error_ratio"] = has_error.mean()
        metrics["tools/call_frequency"] = num_calls.mean()
        metrics["tools/failure_frequency"] = num_mistakes.sum() / max(1, num_calls.sum())
    return {name: float(value) for name, value in metrics.items() if np.isfinite(value)}


def _weigh(rewards: FloatArray, weights_F: FloatArray) -> FloatArray:
    """Return the weighted sums over the last axis; NaN for responses that no reward scores."""
    sums: FloatArray = np.nansum(rewards * weights_F, axis=-1)
    return np.where(np.isnan(rewards).all(axis=-1), np.nan, sums)


def are_equal(scored_G: FloatArray) -> bool:
    """Return whether all rewards of a group are equal, so that they have no gradient."""
    return len(set(scored_G.tolist())) <= 1


def _drop_nan(values: FloatArray) -> FloatArray:
    return values[~np.isnan(values)]


def _mean(values: NDArray[Any]) -> float:
    if not len(values):
        return np.nan
    return float(values.mean())


def _repeat(values_G: FloatArray, lengths_G: NDArray[np.int64]) -> Tensor:
    """Repeat the value of each response for its tokens, in fp32."""
    return torch.from_numpy(np.repeat(values_G, lengths_G)).float()
