"""Stochastic gradient Hamiltonian Monte Carlo, velocity first.

    m <- (1 - friction) m - sqrt(lr) C^1/2 g + sqrt(2 friction T / N) noise
    theta <- theta + sqrt(lr) C^1/2 m

The same chain as v <- (1 - friction) v - lr g + sqrt(2 friction lr T / N) noise, theta <- theta + v with v = sqrt(lr) m, but m
needs no rescaling when the learning rate changes: its variance is T / N times 2 / (2 - friction), whatever lr is. Stationary
variance for curvature h (of C^1/2 H C^1/2): T / (N h) / (1 - lr h / (2 (2 - friction))), stable for lr h < 2 (2 - friction);
the last factor is the momentum's too. With T = 0 and a constant learning rate it is
torch.optim.SGD with momentum 1 - friction; while the rate changes torch rescales its velocity by lr and this by sqrt(lr).

Source: Chen et al. 2014, eq. 15 (arXiv 1402.4102), in the form of Zhang et al. 2020 (arXiv 1902.03932) and Wenzel et al. 2020
(arXiv 2002.02405, appendix C). Differs: lr multiplies the gradient of the mean loss, noise variance times T / N.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from prior_hub.distributed import local_tensor
from prior_hub.inference.sampler import Sampler, groups_by_type

__all__ = ["SGHMC"]


class SGHMC(Sampler):
    """Stochastic gradient Hamiltonian Monte Carlo.

        optimizer = SGHMC(model.parameters(), lr=1e-3, num_data=len(train_dataset), friction=0.1)

    Args:
        params: as `Sampler`.
        lr: as `Sampler`.
        num_data: as `Sampler`.
        friction: in (0, 1], 1 - momentum; at 1 it is SGLD.
        **more: as `Sampler`.
    """

    def __init__(self, params: Iterable[Any], lr: float, *, num_data: int, friction: float = 0.1, **more: Any) -> None:
        super().__init__(params, lr, num_data=num_data, friction=friction, **more)

    def _advance(self) -> None:
        for group in self.param_groups:
            moved = self._moved(group)
            if not moved:
                continue
            root, friction = math.sqrt(float(group["lr"])), float(group["friction"])
            spread = math.sqrt(2 * friction * float(group["temperature"]) / self.num_data)
            variance = float(group["temperature"]) / self.num_data * 2 / (2 - friction)
            for parameter in moved:
                start_momentum(self.state[parameter], parameter, self._noise, variance)
            momenta = [local_tensor(self.state[p]["momentum_buffer"]) for p in moved]
            torch._foreach_mul_(momenta, 1 - friction)
            for parameter, momentum in zip(moved, momenta, strict=True):
                if parameter.grad is None:
                    continue
                momentum.add_(self._rooted(parameter, local_tensor(parameter.grad)), alpha=-root)
                if spread:
                    momentum.add_(self._noise.like(parameter).to(momentum.dtype), alpha=spread)
            weights = [local_tensor(p) for p in moved]
            steps = [self._rooted(p, m) for p, m in zip(moved, momenta, strict=True)]
            for part in groups_by_type(weights):
                torch._foreach_add_([weights[i] for i in part], [steps[i] for i in part], alpha=root)

    def _rooted(self, parameter: Tensor, vector: Tensor) -> Tensor:
        """C^1/2 v."""
        diagonal = self._diagonal(parameter)
        return vector if diagonal is None else vector * diagonal**0.5


def start_momentum(state: Mapping[str, Any], parameter: Tensor, noise: Any, variance: float) -> None:
    """The momentum of a chain that begins: drawn from its stationary law, zero at temperature 0."""
    if "momentum_buffer" in state:
        return
    momentum = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    if variance > 0:
        local = local_tensor(momentum)
        local.copy_(noise.like(parameter) * math.sqrt(variance))
    state["momentum_buffer"] = momentum  # type: ignore[index]
