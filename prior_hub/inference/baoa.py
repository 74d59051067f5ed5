"""BAOA: Langevin dynamics by splitting, exact on Gaussians, with the prior as its own metric.

One step kicks by the gradient (B), drifts half a step (A), refreshes the momentum (O), and drifts again (A):

    B   m <- m - sqrt(lr) C g                           C: the identity, a diagonal, or the prior's covariance
    A   theta, m <- the flow for half a step            twice, around O
    O   m <- (1 - friction) m + sqrt((1 - (1 - friction)^2) T / N) C^1/2 noise

**Without a prior** g is the gradient of the whole loss and A is theta <- theta + sqrt(lr)/2 m. For a quadratic loss the weights
have the exact variance T / (N h) at every learning rate below the limit lr h < 4.

**With a prior** a Gaussian N(mean, C) enters not by its gradient but by its own flow: g is the gradient of the rest of the
loss, and A is an exact rotation in the plane of (theta - mean) and the momentum,

    theta - mean <-  c (theta - mean) + s sqrt(N) m          c = cos w, s = sin w, tan w = sqrt(lr / N) / 2
    m            <- -s (theta - mean) / sqrt(N) + c m

C is the whole Sigma of the prior, and no K x K system is solved; or its diagonal, and the low-rank rest of the prior's
gradient, which in these coordinates has a curvature between -1/N and 0, stays in the kick. Either way a stiff prior (variances
from 1e-12 to 1e-4) limits no learning rate. With the angle w (a Cayley transform) the law is exact for every quadratic NLL,
below lr h < 4 with h its largest curvature in the coordinates in which N(mean, C) is standard normal, in which lr is meant.
With T = 0 the chain comes to rest at the MAP solution, for every lr and friction. The whole Sigma mixes at once without data;
with data its few wide directions have by far the largest h and limit lr for all others, so that the diagonal is the better
choice for a network.

Source: Leimkuhler and Matthews 2013 (arXiv 1203.5428) for the splitting; Korol, Bou-Rabee and Miller 2019 (arXiv 1907.07941)
for the Cayley angle; Cotter et al. 2013 (arXiv 1202.0709) for proposals that keep a Gaussian prior. Differs: SWAG's low-rank
Gaussian as that prior, and minibatch gradients.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from prior_hub.distributed import local_tensor
from prior_hub.inference.sampler import Sampler
from prior_hub.inference.sghmc import start_momentum
from prior_hub.priors.gaussian import LowRankGaussian

__all__ = ["BAOA", "BoundGaussian"]


@dataclass(frozen=True)
class BoundGaussian:
    """A Gaussian whose flow a sampler takes, and the parameters it is over; `PriorPenalty.bound_gaussians()` makes them.

    Attributes:
        gaussian: N(mean, C) over this rank's parts of the parameters.
        parameters: the Gaussian's names -> the parameters; all of them are to be sampled.
        in_gradient: whether the gradient is that of the whole loss, penalty included, so that this Gaussian's part of it,
            C^-1 (theta - mean) / N, is to be taken off again. Where False it is the gradient of the NLL alone.
    """

    gaussian: LowRankGaussian
    parameters: dict[str, Tensor] = field(repr=False)
    in_gradient: bool = False


class BAOA(Sampler):
    """Langevin dynamics by splitting, exact on Gaussians.

        penalty = PriorPenalty(prior, model, num_examples=len(train_dataset), scale=1e4, head_variance=1.0)
        optimizer = BAOA(model.parameters(), lr=0.1, num_data=len(train_dataset), prior=penalty.bound_gaussians())
        nll(model, batch).backward(); penalty.add_gradient_(); optimizer.step()

    Args:
        params: as `Sampler`.
        lr: as `Sampler`; for parameters under `prior` in coordinates in which the prior is standard normal. Parameters under
            one Gaussian need one lr, temperature and friction.
        num_data: as `Sampler`.
        friction: in (0, 1]; 1 - friction of the momentum is kept from step to step.
        prior: Gaussians that are to be kept exactly. Parameters under none of them have a flat prior, beside what is in
            the gradient.
        **more: as `Sampler`.

    Raises:
        ValueError: as `Sampler`, or a parameter of the prior is not in `params`, or is under two Gaussians.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        num_data: int,
        friction: float = 0.1,
        prior: Sequence[BoundGaussian] = (),
        **more: Any,
    ) -> None:
        self._prior: list[BoundGaussian] = []
        self._diagonals: dict[int, tuple[list[Tensor], list[Tensor]]] = {}  # of diagonal Gaussians, by id
        self._under_prior: set[int] = set()
        super().__init__(params, lr, num_data=num_data, friction=friction, **more)
        self.attach(prior)

    def attach(self, prior: Sequence[BoundGaussian]) -> None:
        """Take `prior` in place of the one there is: where parameters are wrapped or sharded after the sampler was made.

        Raises:
            ValueError: as for the class.
        """
        groups = {id(p): group for group in self.param_groups for p in group["params"]}
        seen: set[int] = set()
        for bound in prior:
            if set(bound.parameters) != set(bound.gaussian.names):
                raise ValueError("a BoundGaussian's parameters have other names than its Gaussian.")
            for name, parameter in bound.parameters.items():
                if id(parameter) not in groups:
                    raise ValueError(
                        f"{name!r} is under the prior but not among the sampler's parameters: make it over the parameters as "
                        "they are now (after wrapping and sharding)."
                    )
                if id(parameter) in seen or parameter in self._precondition:
                    raise ValueError(f"{name!r} has two priors, or a prior (which is its metric) and a preconditioner.")
                seen.add(id(parameter))
        self._prior, self._under_prior, self._diagonals = list(prior), seen, {}

    def _moved(self, group: dict[str, Any]) -> list[Tensor]:
        for parameter in group["params"]:
            if parameter.grad is None and id(parameter) in self._under_prior:
                parameter.grad = torch.zeros_like(parameter)  # unused in the forward pass: the prior holds all the same
        return super()._moved(group)

    def _advance(self) -> None:
        for bound in self._prior:
            self._advance_under(bound)
        for group in self.param_groups:
            rate, friction, variance = float(group["lr"]), float(group["friction"]), float(group["temperature"]) / self.num_data
            for parameter in self._moved(group):
                if id(parameter) in self._under_prior or parameter.grad is None:
                    continue
                start_momentum(self.state[parameter], parameter, self._noise, variance)
                momentum, weight = local_tensor(self.state[parameter]["momentum_buffer"]), local_tensor(parameter)
                diagonal = self._diagonal(parameter)
                root = math.sqrt(rate) * (1.0 if diagonal is None else diagonal**0.5)
                momentum.sub_(root * local_tensor(parameter.grad))
                weight.add_(0.5 * root * momentum)
                momentum.mul_(1 - friction)
                if variance:
                    momentum.add_(self._noise.like(parameter), alpha=math.sqrt((1 - (1 - friction) ** 2) * variance))
                weight.add_(0.5 * root * momentum)

    def _advance_under(self, bound: BoundGaussian) -> None:
        group = self._settings(bound)
        rate, friction, variance = float(group["lr"]), float(group["friction"]), float(group["temperature"]) / self.num_data
        if rate == 0.0:
            return  # no flow of time, so no noise either
        gaussian, parameters = bound.gaussian, bound.parameters
        self._moved({"params": list(parameters.values())})
        fresh = [name for name, p in parameters.items() if "momentum_buffer" not in self.state[p]]
        if fresh:
            start = self._coloured(bound) if variance else {}
            for name in fresh:
                momentum = torch.zeros_like(parameters[name])
                if start:
                    local_tensor(momentum).copy_(start[name] * math.sqrt(variance))
                self.state[parameters[name]]["momentum_buffer"] = momentum
        if self._is_plain(bound):
            self._advance_plainly(bound, rate, friction, variance)
            return
        gradients = {name: local_tensor(p.grad) for name, p in parameters.items() if p.grad is not None}
        kick = gaussian.covariance_product(gradients)
        momenta = {name: local_tensor(self.state[p]["momentum_buffer"]) for name, p in parameters.items()}
        weights = {name: local_tensor(p) for name, p in parameters.items()}
        for name, momentum in momenta.items():
            push = kick.pop(name).to(momentum.dtype)
            if bound.in_gradient:
                push -= (weights[name].to(momentum.dtype) - gaussian.mean[name].to(momentum.dtype)) / self.num_data
            momentum.sub_(push, alpha=math.sqrt(rate))
        half_angle = math.atan(0.5 * math.sqrt(rate / self.num_data))
        self._rotate(gaussian, weights, momenta, half_angle)
        noise = self._coloured(bound) if variance else {}
        for name, momentum in momenta.items():
            momentum.mul_(1 - friction)
            if noise:
                momentum.add_(noise.pop(name).to(momentum.dtype), alpha=math.sqrt((1 - (1 - friction) ** 2) * variance))
        self._rotate(gaussian, weights, momenta, half_angle)

    def _is_plain(self, bound: BoundGaussian) -> bool:
        """A diagonal Gaussian over tensors of one type, for which few operations on all of them together are enough."""
        tensors = [local_tensor(t) for p in bound.parameters.values() for t in (p, p.grad) if t is not None]
        kinds = {(t.dtype, t.device) for t in (*tensors, *bound.gaussian.mean.values())}
        return bound.gaussian.rank == 0 and len(kinds) == 1 and tensors[0].dtype in (torch.float32, torch.float64)

    def _advance_plainly(self, bound: BoundGaussian, rate: float, friction: float, variance: float) -> None:
        """The same step on lists of tensors."""
        if id(bound) not in self._diagonals:
            diagonal = list(bound.gaussian.marginal_variance().values())
            self._diagonals[id(bound)] = (diagonal, list(torch._foreach_sqrt(diagonal)))
        diagonal, roots = self._diagonals[id(bound)]
        parameters = [bound.parameters[name] for name in bound.gaussian.names]
        weights, means = [local_tensor(p) for p in parameters], list(bound.gaussian.mean.values())
        momenta = [local_tensor(self.state[p]["momentum_buffer"]) for p in parameters]
        kick = torch._foreach_mul([local_tensor(p.grad) for p in parameters if p.grad is not None], diagonal)
        if bound.in_gradient:
            torch._foreach_add_(kick, torch._foreach_sub(weights, means), alpha=-1 / self.num_data)
        torch._foreach_add_(momenta, kick, alpha=-math.sqrt(rate))
        del kick
        angle = math.atan(0.5 * math.sqrt(rate / self.num_data))
        cosine, sine, root = math.cos(angle), math.sin(angle), math.sqrt(self.num_data)
        for half in (0, 1):
            away = torch._foreach_sub(weights, means)
            torch._foreach_add_(weights, momenta, alpha=sine * root)
            torch._foreach_add_(weights, away, alpha=-2 * math.sin(angle / 2) ** 2)
            torch._foreach_mul_(momenta, cosine)
            torch._foreach_add_(momenta, away, alpha=-sine / root)
            if half:
                return
            torch._foreach_mul_(momenta, 1 - friction)
            if variance:
                noise = [self._noise.like(p) for p in parameters]
                torch._foreach_mul_(noise, roots)
                torch._foreach_add_(momenta, noise, alpha=math.sqrt((1 - (1 - friction) ** 2) * variance))

    def _rotate(self, gaussian: LowRankGaussian, weights: dict[str, Tensor], momenta: dict[str, Tensor], angle: float) -> None:
        cosine, sine, root = math.cos(angle), math.sin(angle), math.sqrt(self.num_data)
        for name, weight in weights.items():
            momentum = momenta[name]
            mean = gaussian.mean[name].to(momentum.dtype)
            away = weight.to(momentum.dtype) - mean
            # 1 - cos is of the order of lr / N: written so, a small angle changes a weight by no rounding of the mean
            weight.add_((sine * root * momentum - (2 * math.sin(angle / 2) ** 2) * away).to(weight.dtype))
            momentum.mul_(cosine).sub_(away, alpha=sine / root)

    def _coloured(self, bound: BoundGaussian) -> dict[str, Tensor]:
        device = local_tensor(next(iter(bound.parameters.values()))).device
        exact = torch.float32 if device.type == "mps" else torch.float64
        shared = self._noise.shared(bound.gaussian.rank, device, exact)
        return bound.gaussian.coloured_noise(lambda name: self._noise.like(bound.parameters[name]), shared)

    def _settings(self, bound: BoundGaussian) -> dict[str, Any]:
        group_of = {id(p): group for group in self.param_groups for p in group["params"]}
        groups = [group_of[id(p)] for p in bound.parameters.values()]
        for name in ("lr", "temperature", "friction"):
            values = {float(group[name]) for group in groups}
            if len(values) > 1:
                raise ValueError(f"parameters under one Gaussian need one {name}, found {sorted(values)}.")
        return groups[0]

    def _metric_product(self, vectors: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        found = super()._metric_product({p: v for p, v in vectors.items() if id(p) not in self._under_prior})
        for bound in self._prior:
            if all(p in vectors for p in bound.parameters.values()):
                product = bound.gaussian.covariance_product({name: vectors[p] for name, p in bound.parameters.items()})
                found |= {bound.parameters[name]: v for name, v in product.items()}
        return found

    def _heating(self, group: dict[str, Any]) -> float:
        friction = float(group["friction"])  # the gradient's noise is damped by O before half of the drift, O's own is not
        return float(group["lr"]) * (2 - friction) / (4 * friction)
