"""Distillation: imitation of a teacher on its or on the own answers (Agarwal et al. 2024, GKD).

The teacher has the same tokenizer and image processing. It processes the packs of the trained
model, and only its hidden states of supervised tokens are stored.

Shapes: L supervised tokens, D and E model widths, V vocabulary size, C rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from finesight.encode.batch import PackedBatch
from finesight.encode.renderer import Renderer
from finesight.errors import UserError
from finesight.infer.model_loader import load_inference_model, resolve_model_source
from finesight.model.backend import as_native
from finesight.model.vlm import VisionLanguageModel
from finesight.settings.config import TrainSettings
from finesight.train.objectives.distill import Settings
from finesight.train.objectives.objective import Objective, PackKey
from finesight.train.token_logps import map_chunks

if TYPE_CHECKING:
    from finesight.train.state import TrainState
    from finesight.train.step_batch import StepBatch

MAX_TOKEN_IDS = 1 << 18
"""Number of token ids of which the vocabularies are compared."""


class DistillObjective(Objective[Settings]):
    """Generalized Jensen-Shannon divergence from the teacher, as a mean over tokens.

    Attributes:
        teacher: Frozen model; None for estimates of memory and time.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.teacher: VisionLanguageModel | None = None

    def check_renderer(self, renderer: Renderer) -> None:
        """Verify that the teacher has the tokenizer and image processing of the trained model.

        Raises:
            UserError: The teacher cannot process the tokens and patches of the trained model.
        """
        check_teacher(self.settings, renderer)

    def load_models(self, train: TrainSettings) -> None:
        """Load the teacher, which `check_renderer` has accepted."""
        self.teacher = load_teacher(self.settings, train)

    def sample_steps(self, state: TrainState, start: int) -> Generator[StepBatch, None, None]:
        """Return the steps from `start` on with responses to a share of the samples."""
        # Other objectives need no inference engine.
        from finesight.train.objectives.distill.rollout import StudentRollout

        return StudentRollout(state).read_steps(start)

    @torch.no_grad()
    def loss_inputs(
        self, batch: PackedBatch, loss_weight: Tensor, key: PackKey | None = None
    ) -> dict[str, Tensor]:
        """Return labels, loss weight, and the hidden states of the teacher."""
        inputs = super().loss_inputs(batch, loss_weight)
        if self.teacher is not None:
            inputs["teacher_h_LE"] = self.teacher(batch)[: len(batch.labels_L)]
        return inputs

    def compute_loss(self, h_LD: Tensor, head_VD: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the weighted sum of the divergence, [1]."""
        labels_L = inputs["labels_L"]
        h_LD = h_LD[: len(labels_L)]
        # Estimates compare the model with itself.
        teacher_h_LE = h_LD.detach()
        head_VE = head_VD
        if self.teacher is not None:
            teacher_h_LE = inputs["teacher_h_LE"][: len(labels_L)]
            head_VE = self.teacher.lm_head_weight
        losses_L = compute_divergence(self.settings, h_LD, head_VD, teacher_h_LE, head_VE)
        loss = losses_L.where(labels_L >= 0, 0).sum()
        return (loss * inputs["loss_weight"])[None]


def compute_divergence(
    settings: Settings, h_LD: Tensor, head_VD: Tensor, teacher_h_LE: Tensor, head_VE: Tensor
) -> Tensor:
    """Return the divergence of each token, [L], in fp32 or higher.

    Heads may have rows beyond the vocabulary, whose number differs between models.
    """
    num_rows = min(len(head_VD), len(head_VE))

    def compute_chunk(h_CD: Tensor, teacher_h_CE: Tensor) -> Tensor:
        logits_CV = h_CD @ head_VD[:num_rows].T
        return generalized_jsd(settings, logits_CV, teacher_h_CE @ head_VE[:num_rows].T)

    return map_chunks(compute_chunk, num_rows, h_LD, teacher_h_LE)


def generalized_jsd(settings: Settings, logits_CV: Tensor, teacher_CV: Tensor) -> Tensor:
    """Return the generalized Jensen-Shannon divergence of each row, [C], as in TRL (`GKDTrainer`).

    With `top_k`, both distributions are restricted to the teacher's most probable tokens.
    """
    dtype = torch.promote_types(logits_CV.dtype, torch.float32)
    if settings.top_k is not None and settings.top_k < teacher_CV.shape[1]:
        teacher_CV, indices = teacher_CV.topk(settings.top_k)
        logits_CV = logits_CV.gather(1, indices)
    beta = settings.beta
    temperature = settings.temperature
    own_CV = (logits_CV.to(dtype) / temperature).log_softmax(1)
    other_CV = (teacher_CV.to(dtype) / temperature).log_softmax(1)
    if beta == 0:
        return _kl_divergence(other_CV, own_CV)
    if beta == 1:
        return _kl_divergence(own_CV, other_CV)
    weights = torch.tensor([1 - beta, beta], dtype=dtype, device=own_CV.device).log()
    mixture_CV = torch.logaddexp(own_CV + weights[0], other_CV + weights[1])
    divergence_C = beta * _kl_divergence(other_CV, mixture_CV)
    return divergence_C + (1 - beta) * _kl_divergence(own_CV, mixture_CV)


def _kl_divergence(log_p_CV: Tensor, log_q_CV: Tensor) -> Tensor:
    return (log_p_CV.exp() * (log_p_CV - log_q_CV)).sum(1)


def check_teacher(settings: Settings, renderer: Renderer) -> None:
    """Verify that the teacher has the tokenizer and image processing of the trained model.

    Its weights are not read.

    Raises:
        UserError: The teacher cannot process the tokens and patches of the trained model.
    """
    assert settings.teacher is not None, "distillation without a teacher"
    other = resolve_model_source(settings.teacher).build_renderer()
    difference = _find_difference(renderer, other)
    if difference:
        raise UserError(
            f"the teacher {settings.teacher} has {difference}",
            where="train.distill.teacher",
            expected="a larger model of the family of the trained model",
            remedy="choose another teacher, or generate its answers to the data, and set"
            " train.objective=sft",
        )


def load_teacher(settings: Settings, train: TrainSettings) -> VisionLanguageModel:
    """Load the teacher, which `check_teacher` has accepted."""
    assert settings.teacher is not None, "distillation without a teacher"
    model = load_inference_model(
        settings.teacher, train.device, train.precision, settings.weight_format
    ).model
    return as_native(model).requires_grad_(False)


def _find_difference(renderer: Renderer, other: Renderer) -> str:
    """Return what prevents a model from processing the tokens of another; empty if nothing."""
    if not (renderer.is_native and other.is_native):
        return "no native family"
    other_family = other.native.family
    if type(renderer.native.family) is not type(other_family):
        return f"another family ({type(other_family).__name__})"
    if renderer.native.patch_config != other.native.patch_config:
        return "another image processing"
    for n in range(MAX_TOKEN_IDS):
        own = renderer.tokenizer.id_to_token(n)
        found = other.tokenizer.id_to_token(n)
        if own != found:
            return f"another vocabulary: token {n} is {found!r} instead of {own!r}"
    return ""
