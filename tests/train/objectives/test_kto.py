"""KTO: losses compared with TRL, runs on labels, and the baseline of a step."""

import math
from typing import get_args

import numpy as np
import pytest
import torch
from conversation_fixtures import make_conversation, make_images
from cuda_graph_fixtures import CPU, make_model
from PIL import Image
from preference_task import LONG_RUN, load_train_data
from safetensors.numpy import load_file
from tiny_model import TinyFamily, create_tiny_model
from tiny_task import assert_same_run, edit_samples

from finesight.encode.packing import pack
from finesight.encode.renderer import NativeRenderer
from finesight.model_folder import ModelFolder
from finesight.samples.sample import LocatedSample, Message, TextPart
from finesight.settings.config import TuneSettings
from finesight.train.dataset_stats import MismatchedCorpus
from finesight.train.objectives import kto
from finesight.train.objectives.kto.loss import KtoObjective, compute_kto_losses
from finesight.train.objectives.response_objective import REFERENCE_FILE
from finesight.train.token_logps import compute_token_logps

KTO = "train.objective=kto", "train.kto.beta=0.5"
ALL = TuneSettings.model_validate(
    dict.fromkeys(("vision", "merger", "language", "embeddings"), "full")
)


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_kto_losses_and_gradients_match_trl(loss_type, assert_matches_trl):
    rng = np.random.RandomState(0)
    logps_RT = torch.from_numpy(-rng.rand(4, 9)).requires_grad_()
    reference_R, mismatched_2R = (torch.from_numpy(-9 * rng.rand(*s)) for s in ((4,), (2, 4)))
    baseline = (mismatched_2R[0] - mismatched_2R[1]).mean().clamp(min=0)
    assert baseline > 0
    baseline = baseline if loss_type == "kto" else torch.zeros(())
    settings = kto.Settings(
        loss_type=loss_type, beta=0.2, desirable_weight=1.5, undesirable_weight=0.7
    )
    ratios_R = logps_RT.sum(1) - reference_R
    losses_2R = compute_kto_losses(settings, ratios_R.expand(2, -1), baseline)
    desirable_R = torch.tensor([True, False, True, True])
    loss = losses_2R[0].where(desirable_R, losses_2R[1]).mean()
    assert_matches_trl(loss_type, loss, logps_RT)


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_kto_separates_desirable_and_undesirable_answers(labeled_task, loss_type):
    """Labels and pairs count; the reference equals the model before the first step."""
    options = f"train.kto.loss_type={loss_type}", "train.learning_rate=0.003"
    result = labeled_task.run(*KTO, *LONG_RUN, *options, name=loss_type)
    first, *_, last = (line for line in labeled_task.read_metrics(loss_type) if "loss" in line)
    assert first["loss"] == pytest.approx(0.5, abs=1e-5)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert ("kl" in last) == (loss_type == "kto")
    assert last.get("kl", 0) >= 0
    assert result.after.loss_metrics["rewards/margins"] > 0.5
    assert result.after.validation_loss < 0.4 < result.before.validation_loss
    tensors = load_file(labeled_task.folder / loss_type / REFERENCE_FILE)
    has_mismatched = loss_type == "kto"
    given = {int(row[0]): (~np.isnan(row[1:])).tolist() for row in tensors["train"]}
    assert [given[index] for index in range(3)] == [
        [True, False, has_mismatched],
        [False, True, has_mismatched],
        [True, True, has_mismatched],
    ]


def test_mismatched_answers_are_to_another_question(labeled_task):
    """A bad sample neither removes nor breaks the valid one that gets its answer."""
    path = labeled_task.folder / "train.jsonl"
    answers = [*"abcd", "e", "f", "g " * 200, [{"type": "box", "xyxy": [5, 5, 800, 500]}]]
    with edit_samples(path) as samples:
        asked = [samples[n // 4]["messages"][0] for n in range(8)]
        samples[:] = [
            {"id": f"{n}", "label": True, "messages": [asked[n], {"role": "assistant"} | turn]}
            for n, turn in enumerate({"content": answer} for answer in answers)
        ]
        for n, name in ((4, "missing.png"), (7, "large.png")):
            image = {"type": "image", "image": name}
            samples[n]["messages"][0] = {"role": "user", "content": [image]}
    Image.new("RGB", (840, 560)).save(labeled_task.folder / "large.png")
    options = "train.epochs=null", "train.steps=1", "train.batch_size=6", "data.max_length=100"
    labeled_task.run(*KTO, *options)
    table = load_file(labeled_task.folder / "run" / REFERENCE_FILE)["train"]
    assert table[:, 0].tolist() == [0, 1, 2, 3, 5, 7]
    assert not np.isnan(table[:, 3]).any()
    with edit_samples(path) as samples:
        del samples[5]["label"]
        samples[5]["messages"] *= 2
        samples[5]["messages"][-1] = samples[5]["messages"][-1] | {"loss": False}
    corpus, _ = load_train_data(labeled_task)
    corpus = MismatchedCorpus(corpus.sources, corpus.weights, corpus.fingerprint)
    found = [corpus.read_validated(index).mismatched for index in range(6)]
    expected = [4, 6, 6, 7, 0, 1]  # the loss of answer 5 is false
    assert found == [corpus[index].sample.messages[-1] for index in expected]


def test_kto_baseline_is_the_divergence_of_mismatched_answers(labeled_task, monkeypatch):
    """All packs of a step use the mean of the forward pass before, also in a resumed run."""
    baselines, compute = [], KtoObjective.compute_loss

    def compute_loss(self, h_LD, head_VD, inputs):
        values = compute(self, h_LD, head_VD, inputs)
        baselines.append((torch.is_grad_enabled(), inputs["baseline"].item(), values[-1].item()))
        return values

    options = *KTO, "train.batch_size=3", "train.steps=6", "train.epochs=null"
    monkeypatch.setattr(KtoObjective, "compute_loss", compute_loss)
    run = labeled_task.rewind_to_checkpoint(*options)
    train = [(x, y) for has_grad, x, y in baselines if has_grad]
    measured = max(sum(y for _, y in train[-3:]), 0)
    assert measured > 0
    assert train[-1][0] == pytest.approx(measured, abs=1e-6)
    assert len({x for x, _ in train[-3:]}) == 1
    labeled_task.run(*options, resume=True)
    assert_same_run(run, labeled_task.folder / "whole")


@pytest.mark.parametrize("family", [family for family in get_args(TinyFamily) if family != "qwen"])
def test_answer_with_a_label_matches_single_samples(tmp_path, family):
    """The answer of another sample, with which KTO estimates the divergence, follows the prompt."""
    folder = ModelFolder(create_tiny_model(tmp_path / "model", family))
    model, renderer = make_model(torch.float32, CPU, ALL, folder), NativeRenderer(folder)
    images, objective = make_images(tmp_path), KtoObjective(kto.Settings(beta=0.3))
    renderer.responses = "all"
    sample = make_conversation(3, images, videos=True).sample
    other_answer = Message(role="assistant", content=(TextPart(text="No, it is not."),))
    for label in (True, False):
        labeled = sample.model_copy(update={"label": label})
        batch = pack([renderer.encode(LocatedSample(labeled, tmp_path, other_answer))])
        expected = []
        for answer in (sample.messages[-1], other_answer):
            messages = *sample.messages[:-1], answer
            one = sample.model_copy(update={"messages": messages})
            encoded = renderer.encode(LocatedSample(one, tmp_path))
            alone = pack([encoded])
            logps = compute_token_logps(model(alone), model.lm_head_weight, alone.labels_L)
            expected.append(logps[-encoded.tokenized.num_answer_tokens :].sum().item())
        assert len(batch.patches_ND) == len(alone.patches_ND)
        reference = objective.arrange_logps(labeled, (-8.0, -9.0))
        objective.reference_logps["train"] = {7: reference}
        objective.set_baseline(torch.tensor([0.0, 2.0]))
        inputs = objective.loss_inputs(batch, torch.tensor(1.0), ("train", (7,)))
        loss, *metrics = objective.compute_loss(model(batch), model.lm_head_weight, inputs)
        sign, ratio = (1 if label else -1), expected[0] + 8
        assert loss.item() == pytest.approx(1 / (1 + math.exp(0.3 * sign * (ratio - 2))), abs=1e-5)
        assert metrics[-1].item() == pytest.approx(expected[1] + 9, abs=1e-3)
        found = objective.describe_metrics([metric.item() for metric in metrics])
        name = "chosen" if label else "rejected"
        assert found[f"logps/{name}"] == pytest.approx(expected[0], abs=1e-3)
