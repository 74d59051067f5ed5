"""What the samplers share: checks, noise of their own, the prior's diagonal as a metric, and the measured temperature.

All sample exp(-U / temperature), U = N L the negative log posterior in nats, from gradients g of the loss
L = mean NLL + penalty / N, the quantity that is minimised anyway. With T the temperature, h a curvature of L and lr the
learning rate, the exact stationary variance is T / (N h); each class says what its own discretisation has.

**Temperature.** The noise of minibatches heats the chain as well. With V the variance of one gradient entry between batches,

    T_effective = T + N lr V / (2 friction)                        SGLD (friction 1) and SGHMC
    T_effective = T + N lr V (2 - friction) / (4 friction)         BAOA; its last term is divided by 1 - lr h / 4

`measure()` and `effective_temperature()` find it from the difference of the gradients of two consecutive steps, whose mean
square is 2 V, and a little more, from the chain's own movement: up to a share lr h of what V gives, and of T a share of
(lr h)^2 / 2 for SGLD, (lr h)^2 / (2 friction (2 - friction)) for SGHMC and (lr h)^2 (2 - friction)^2 / (16 friction) for BAOA.

**Preconditioner.** With a positive diagonal C, lr becomes lr C and the noise gets C^1/2: the same target for a constant C.
With the prior's variances as C the learning rate is in units in which the prior is standard normal.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from prior_hub.distributed import contribution, is_sharded, local_tensor, sum_over_ranks
from prior_hub.errors import PriorWarning
from prior_hub.inference.noise import NoiseSource

__all__ = ["Sampler"]


class Sampler(torch.optim.Optimizer):
    """A torch optimizer that samples; see `SGLD`, `SGHMC` and `BAOA`.

    Parameters without a gradient are left alone, as in torch.optim. The state (momentum, number of steps) is in
    `state_dict`; the noise needs none, see `NoiseSource`.

    Args:
        params: as any torch optimizer; groups may have their own lr, temperature and friction.
        lr: learning rate, as in torch.optim.SGD.
        num_data: N: number of training examples (or label tokens), as for the prior.
        temperature: T; 1 samples the posterior, below 1 a colder one, 0 optimises.
        seed: of the noise.
        chain: number of this chain, for several with the same seed.
        preconditioner: parameter -> its positive diagonal C, a number or (*local_shape); 1 for those that are missing.
        friction: for those that have one.

    Raises:
        ValueError: an argument out of its range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        num_data: int,
        temperature: float = 1.0,
        seed: int = 0,
        chain: int = 0,
        preconditioner: Mapping[Tensor, Tensor | float] | None = None,
        friction: float | None = None,
    ) -> None:
        if not num_data >= 1:
            raise ValueError(f"num_data is {num_data}, expected the number of training examples, 1 or more.")
        defaults = {"lr": lr, "temperature": temperature}
        super().__init__(params, defaults if friction is None else defaults | {"friction": friction})
        self.num_data = int(num_data)
        self._noise = NoiseSource(seed, chain)
        self._precondition: dict[Tensor, Tensor | float] = {}
        self._measuring: dict[int, Tensor] | None = None
        self._measured: float | None = None
        self._check()
        self.precondition(preconditioner or {})

    def precondition(self, preconditioner: Mapping[Tensor, Tensor | float]) -> None:
        """Take this diagonal in place of the one there is: where parameters are wrapped or sharded after the sampler was made.

        Raises:
            ValueError: an entry that is not positive, or a shape that is not its parameter's.
        """
        for parameter, diagonal in preconditioner.items():
            if isinstance(diagonal, Tensor):
                lowest = float(diagonal.min()) if diagonal.numel() else math.inf  # a rank may hold no entries
            else:
                lowest = float(diagonal)
            if not lowest > 0:
                raise ValueError(f"the preconditioner has an entry of {lowest}, expected positive ones.")
            if isinstance(diagonal, Tensor) and diagonal.ndim and diagonal.shape != local_tensor(parameter).shape:
                shapes = f"{tuple(diagonal.shape)}, its parameter {tuple(local_tensor(parameter).shape)}"
                raise ValueError(f"a preconditioner has shape {shapes}.")
        self._precondition = dict(preconditioner)

    def _check(self) -> None:
        for group in self.param_groups:
            for name, low, high in (("lr", 0.0, math.inf), ("temperature", 0.0, math.inf), ("friction", 0.0, 1.0)):
                value = float(group.get(name, 1.0))
                wrong_friction = name == "friction" and value == 0.0
                if not (low <= value <= high and math.isfinite(value)) or wrong_friction:
                    wanted = "above 0 and at most 1" if name == "friction" else "a finite number >= 0"
                    raise ValueError(f"{name} is {value}, expected {wanted}.")
        coarse = {p.dtype for group in self.param_groups for p in group["params"] if p.dtype.itemsize < 4}
        if coarse:
            warnings.warn(
                f"parameters are {', '.join(sorted(str(d).removeprefix('torch.') for d in coarse))}: most of a sampler's small "
                "steps and noise are rounded away there, so the samples are not those of the posterior. Keep the parameters "
                "in float32 and use autocast (bf16=True) instead.",
                PriorWarning,
                stacklevel=4,
            )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the chain.

        Args:
            closure: computes the loss again and gives it back, as in torch.optim.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._compare_gradients()
        self._noise.start(self.steps_taken())
        self._advance()
        for group in self.param_groups:
            for parameter in self._moved(group):
                self.state[parameter]["step"] += 1
        return loss

    def _advance(self) -> None:
        raise NotImplementedError

    def _moved(self, group: dict[str, Any]) -> list[Tensor]:
        """The group's parameters that take part, each with its state made."""
        moved = [p for p in group["params"] if p.grad is not None]
        for parameter in moved:
            if not self.state[parameter]:
                self.state[parameter]["step"] = torch.zeros((), dtype=torch.float32)  # as Adam's: checkpoints know it
        return moved

    def steps_taken(self) -> int:
        """Number of steps that the chain has taken."""
        return max((int(state["step"]) for state in self.state.values() if "step" in state), default=0)

    def _diagonal(self, parameter: Tensor) -> Tensor | float | None:
        return self._precondition.get(parameter)

    # -------------------------------------------------------------------------------------------------- temperature

    def measure(self) -> None:
        """Compare the gradients of the next two steps, for `effective_temperature`; takes the memory of one gradient."""
        self._measuring, self._measured = {}, None

    def effective_temperature(self) -> float | None:
        """The temperature that the last measurement found: the mean over the weights of the warmest group; None without one.

        It is at least the chain's own, and well above it where minibatches add more noise than the sampler does: then take
        a larger batch or a smaller learning rate.
        """
        return self._measured

    def _compare_gradients(self) -> None:
        if self._measuring is None:
            return
        if not self._measuring:
            self._measuring = {
                id(p): local_tensor(p.grad).clone()
                for group in self.param_groups
                for p in self._moved(group)
                if p.grad is not None
            }
            return
        before, self._measuring = self._measuring, None
        found, sharded = [], False
        for group in self.param_groups:
            heat = own = count = 0.0
            moved = [p for p in self._moved(group) if p.grad is not None and id(p) in before]
            difference = {p: local_tensor(p.grad) - before[id(p)] for p in moved if p.grad is not None}
            for parameter, product in self._metric_product(difference).items():
                weight = contribution(parameter)
                sharded = sharded or is_sharded(parameter)
                square = float((difference[parameter] * product).sum(dtype=torch.float64))
                heat += weight * 0.5 * square * self.num_data * self._heating(group)
                own += weight * product.numel() * float(group["temperature"])
                count += weight * product.numel()
            found.append([heat + own, count])
        sums = torch.tensor(found, dtype=torch.float64)
        if sharded:
            device = local_tensor(self.param_groups[0]["params"][0]).device
            sums = sum_over_ranks(sums.to(device=device, dtype=torch.float32)).double().cpu()
        sums = sums[sums[:, 1] > 0]
        self._measured = float((sums[:, 0] / sums[:, 1]).max()) if len(sums) else None

    def _metric_product(self, vectors: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """C v, where lr C is what multiplies a gradient."""
        found = {}
        for parameter, vector in vectors.items():
            diagonal = self._diagonal(parameter)
            found[parameter] = vector if diagonal is None else vector * diagonal
        return found

    def _heating(self, group: dict[str, Any]) -> float:
        """Temperature / N per unit of gradient variance."""
        return float(group["lr"]) / (2 * float(group.get("friction", 1.0)))


def groups_by_type(tensors: list[Tensor]) -> list[list[int]]:
    """Positions of tensors that one foreach call can take: same device and type."""
    found: dict[Any, list[int]] = {}
    for index, tensor in enumerate(tensors):
        found.setdefault((tensor.device, tensor.dtype), []).append(index)
    return list(found.values())
