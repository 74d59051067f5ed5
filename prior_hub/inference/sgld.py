"""Stochastic gradient Langevin dynamics.

    theta <- theta - lr C g + sqrt(2 lr T C / N) noise

Stationary variance for curvature h (of the loss; of C^1/2 H C^1/2 with a preconditioner): T / (N h) / (1 - lr h / 2), stable
for lr h < 2. With T = 0 it is torch.optim.SGD.

Source: Welling and Teh 2011 (ICML). Differs: lr multiplies the gradient of the mean loss, as in torch.optim.SGD, which is N / 2
times their step size. (The paper this library follows runs it at twice the temperature, by an lr / 2 beside sqrt(2 lr T / N).)
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from prior_hub.distributed import local_tensor
from prior_hub.inference.sampler import Sampler, groups_by_type

__all__ = ["SGLD"]


class SGLD(Sampler):
    """Stochastic gradient Langevin dynamics; arguments as `Sampler`, without friction.

    optimizer = SGLD(model.parameters(), lr=1e-3, num_data=len(train_dataset))
    """

    def __init__(self, params: Iterable[Any], lr: float, *, num_data: int, **more: Any) -> None:
        if "friction" in more:
            raise TypeError("SGLD has no friction: leave it out, or take SGHMC or BAOA.")
        super().__init__(params, lr, num_data=num_data, **more)

    def _advance(self) -> None:
        for group in self.param_groups:
            moved = self._moved(group)
            rate = float(group["lr"])
            spread = math.sqrt(2 * rate * float(group["temperature"]) / self.num_data)
            weights = [local_tensor(p) for p in moved]
            gradients = [local_tensor(p.grad) for p in moved if p.grad is not None]
            gradients = list(self._metric_product(dict(zip(moved, gradients, strict=True))).values())
            for part in groups_by_type(weights):
                torch._foreach_add_([weights[i] for i in part], [gradients[i] for i in part], alpha=-rate)
            if not spread:
                continue
            for parameter, weight in zip(moved, weights, strict=True):
                noise = self._noise.like(parameter)
                diagonal = self._diagonal(parameter)
                if diagonal is not None:
                    noise *= diagonal**0.5
                weight.add_(noise.to(weight.dtype), alpha=spread)
