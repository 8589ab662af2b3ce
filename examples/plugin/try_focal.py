"""Test of the focal loss without a training."""

import torch
from finesight_plugin_focal import Settings
from finesight_plugin_focal_loss import FocalObjective

from finesight.settings.recipe import recipe_from_dict

recipe = {"model": "m", "data": {"train": "a.jsonl"}, "output_dir": "run"}
recipe = recipe_from_dict(recipe, ["train.objective=focal", "train.focal.gamma=1"])
assert recipe.train.sections["focal"].gamma == 1

hidden, head = torch.randn(3, 8, requires_grad=True), torch.randn(16, 8)
inputs = {"labels_L": torch.tensor([1, 5, -1]), "loss_weight": torch.tensor(0.5)}
(loss,) = FocalObjective(Settings(gamma=2.0)).compute_loss(hidden, head, inputs)
loss.backward()
assert loss.isfinite()
assert hidden.grad.isfinite().all()
