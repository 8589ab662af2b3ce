"""Heavy half of an objective for finesight: the focal loss of the answers (Lin et al. 2017)."""

from finesight_plugin_focal import Settings

from finesight.train.objectives.objective import Objective
from finesight.train.token_logps import compute_token_logps


class FocalObjective(Objective[Settings]):
    def compute_loss(self, h_LD, head_VD, inputs):
        labels_L = inputs["labels_L"]
        logps_L = compute_token_logps(h_LD, head_VD, labels_L)
        # A probability may be rounded to 1 or more: the power or its gradient is not finite.
        misses_L = (1 - logps_L.exp()).clamp(min=1e-6)
        losses_L = -logps_L * misses_L**self.settings.gamma
        loss = losses_L.where(labels_L >= 0, 0).sum()  # padding has the label -1
        return loss[None] * inputs["loss_weight"]
