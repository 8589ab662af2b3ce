"""Rollouts of distillation: responses of the trained model instead of some answers."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import chain
from random import Random

import numpy as np

from finesight.infer.prediction import append_response
from finesight.train.rollout import Rollout
from finesight.train.step_batch import SkippedSample, StepBatch


class StudentRollout(Rollout):
    """Sampler of responses of the model for distillation, beside the answers of the data.

    A sample has a response of the model with the probability `Sampling.share`, depending only
    on seed, step and sample.
    """

    def build_step(self, step: int) -> StepBatch:
        """Generate responses to a share of the samples of a step, and pack all samples.

        Raises:
            TrainingInterrupted: A stop was requested.
        """
        state = self.state
        process_group = state.run.hardware.process_group
        skipped: list[SkippedSample] = []
        start_time = time.perf_counter()
        renderer = state.data.renderer
        indices = state.engine.step_dataset.sampler.batch_indices(step)
        sampled = []
        others = []
        for index in indices:
            draw = Random(f"{self.seed}/{step}/{index}").random()
            if draw < self.sampling.share:
                sampled.append(index)
            else:
                others.append(index)
        with state.engine.parallel.summon_full_params(), process_group.sync_errors():
            prompts = self.read_samples(sampled, renderer.encode_prompt, skipped)
            responses = self.generate(step, prompts)
            encoded = dict(self.read_samples(others, None, skipped))
        own_lengths = []
        for (index, prompt), (tokens,) in zip(prompts, responses, strict=True):
            own_lengths.append(len(tokens))
            encoded[index] = append_response(prompt, tokens)
        lengths = list(chain.from_iterable(process_group.all_gather_object(own_lengths)))
        metrics = {"rollout_s": time.perf_counter() - start_time}
        if lengths:
            metrics["completions/mean_length"] = float(np.mean(lengths))
        samples = [(index, encoded[index]) for index in indices if index in encoded]
        dataset = state.engine.step_dataset.with_pack_tokens(state.progress.budget.pack_tokens)
        step_batch, _ = dataset.pack_step(step, samples, skipped)
        return replace(step_batch, metrics=metrics)
