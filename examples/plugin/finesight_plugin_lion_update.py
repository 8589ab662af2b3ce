"""Heavy half of an optimizer for finesight: Lion (Chen et al. 2023)."""

import torch
from finesight_plugin_lion import Settings

from finesight.train.master_weight_optimizer import Optimizer

CHUNK_ELEMENTS = 1 << 24  # limits the memory of a step


class Lion(Optimizer[Settings]):
    def __init__(self, group, settings, train):
        super().__init__(group, settings, train)
        self.momentum_E = torch.zeros(len(self.master_weights), device=self.gradients.device)

    @torch.no_grad()
    def step(self, grad_factor, lr, weight_decay):
        if grad_factor.isnan():
            return
        end = len(self.master_weights)
        for start in range(0, end, CHUNK_ELEMENTS):
            part = slice(start, min(start + CHUNK_ELEMENTS, end))
            grad_N = self.gradients.read_slice(part).mul_(grad_factor)
            momentum_N = self.momentum_E[part]
            update_N = momentum_N.lerp(grad_N, 1 - self.settings.beta_1).sign_()
            master_N = self.master_weights.read(part).mul_(1 - lr * weight_decay)
            self.master_weights.write(master_N.sub_(update_N, alpha=lr), part)
            momentum_N.lerp_(grad_N, 1 - self.settings.beta_2)

    def state_tensors(self, flat_slice, shape):
        return {"momentum": self.momentum_E[flat_slice].view(shape)}

    def workspace_bytes(self, is_cuda):
        return 20 * min(CHUNK_ELEMENTS, len(self.master_weights))

    def traffic_bytes(self, is_cuda):
        return 60 * len(self.master_weights)
