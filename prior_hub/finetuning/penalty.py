"""A prior bound to a model: the penalty and its gradient, once per optimizer step.

    loss = mean NLL per example + penalty / N            N = num_examples
    p.grad += factor * (Sigma^-1 (theta - mean)) / N     after backward, before clipping and the optimizer's step

Parameters the prior does not know (a new head) get N(0, head_variance I), or nothing when it is None.

Where the model is sharded each rank holds its shards of the prior, and evaluating it takes two messages, of K numbers and of
one, whether there is a head prior or not.

A stiff prior (large precision) is better taken as an implicit step after the optimizer's: `attach`, see proximal.py. Base
weights that are frozen under LoRA adapters count as the weights that the model computes with, W0 + s B A: see adapters.py.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prior_hub.distributed import contribution, cut, is_sharded, local_tensor, reshard, shard_slices, sum_over_ranks
from prior_hub.errors import PriorMatchError, PriorWarning
from prior_hub.finetuning.adapters import AdaptedWeight, adapted_weights, is_quantised, largest_curvature, rounding_cost
from prior_hub.finetuning.proximal import ProximalStep
from prior_hub.inference.baoa import BoundGaussian
from prior_hub.model import PriorModel
from prior_hub.priors.architecture import match_config
from prior_hub.priors.config import PriorConfig
from prior_hub.priors.gaussian import LowRankGaussian, check_length
from prior_hub.priors.matching import Match, NameMap, canonical_parameters

__all__ = ["PriorPenalty"]

_ROUNDING = 0.01  # nats per example of rounding in frozen base weights that are worth a warning
_MARGIN = 1.001  # on advice given as a number: the largest precision is an estimate, in float32


class PriorPenalty:
    """The prior's part of the loss, for any training loop.

        prior = PriorModel.from_pretrained("org/name")
        prior.initialize(model)
        penalty = PriorPenalty(prior, model, num_examples=len(train_set))
        for batch in loader:
            loss = nll(model, batch)                # mean over the batch
            loss.backward()
            penalty.add_gradient_()                 # once per optimizer step, after the last backward
            optimizer.step()
            optimizer.zero_grad()

    or, where learning rate x largest precision / N is large, in place of `add_gradient_`:

        penalty.attach(optimizer)                   # once; from now on optimizer.step() takes the prior's step too

    With a GradScaler pass `add_gradient_(factor=scaler.get_scale())`; with accelerate call it when
    `accelerator.sync_gradients`. Under DDP and FSDP2 make it after the model is wrapped or sharded, and call it on every
    rank. Do not decay the covered parameters a second time: their names are in `covered_names`.

    Args:
        prior: the prior.
        model: the model, possibly wrapped, sharded or with adapters.
        num_examples: N: training examples for a loss that is a mean over examples, label tokens for a mean over tokens.
            Epochs and augmentation do not multiply it.
        scale: instead of the prior's own scale.
        rank: use only this many deviations, as `PriorModel.truncated`.
        head_variance: variance of the zero-mean Gaussian over trainable parameters the prior does not know; None leaves
            them to the optimizer's weight decay.
        name_map: as `match_names`.
        include_head: as `match_names`.
        on_mismatch: as `match_names`.
        min_coverage: as `match_names`.
        through_adapters: whether a prior over weights under a LoRA adapter is one over W0 + s B A, so that its gradient goes
            to A and B. None: wherever there are such adapters; True: and an error if there are none; False: never, W0 is
            conditioned on as if there were no adapter, and where all covered weights are frozen that is an error.
        device: where the prior is kept; beside the parameters when None. "cpu": the model alone takes the accelerator's memory,
            and weights and gradients cross over block by block in each step, which takes longer. What `bound_gaussians` gives a
            sampler lies beside the parameters all the same: 2 copies of them, for the metric "full" the whole prior.

    Attributes:
        match: the `Match`; print it.
        adapters: covered weights that are taken through an adapter, by name; empty without any.
        gaussian: the Gaussian over the matched parameters (this rank's shards), by the model's names.
        num_examples: N.
        covered_names: canonical names of the model's parameters that must not be decayed.

    Raises:
        PriorMatchError: prior and model do not fit, every covered parameter is frozen, or an adapter is of a kind through which
            no prior can be taken.
        ValueError: `num_examples` or `head_variance` is not positive.
        NotImplementedError: adapters on sharded weights.
    """

    def __init__(
        self,
        prior: PriorModel,
        model: nn.Module,
        *,
        num_examples: int,
        scale: float | None = None,
        rank: int | None = None,
        head_variance: float | None = None,
        name_map: NameMap | None = None,
        include_head: bool = False,
        on_mismatch: str = "error",
        min_coverage: float = 0.5,
        through_adapters: bool | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if not num_examples >= 1:
            raise ValueError(f"num_examples is {num_examples}, expected the number of training examples, 1 or more.")
        if head_variance is not None and not (head_variance > 0 and math.isfinite(head_variance)):
            raise ValueError(f"head_variance is {head_variance}, expected a finite number > 0, or None for no head prior.")
        self.num_examples = int(num_examples)
        self.head_variance = head_variance
        matching: dict[str, Any] = {
            "name_map": name_map,
            "include_head": include_head,
            "on_mismatch": on_mismatch,
            "min_coverage": min_coverage,
        }
        self.match: Match = match_for_penalty(prior.config, model, **matching)
        parameters = canonical_parameters(model)
        covered = {target: parameters[target] for target in self.match.pairs.values()}
        self.adapters: dict[str, AdaptedWeight] = {} if through_adapters is False else adapted_weights(model, covered)
        if through_adapters and not self.adapters:
            raise PriorMatchError("through_adapters=True, but there is no active LoRA adapter on a weight under the prior.")
        self._trained = [name for name, p in covered.items() if p.requires_grad]
        adapted = {name: p for weight in self.adapters.values() for name, p in weight.trained.items()}
        if not self._trained and not adapted:
            raise PriorMatchError(
                f"all {len(covered)} parameters under the prior are frozen, so that the prior can do nothing (adapters such "
                "as LoRA freeze the base weights). Unfreeze them, let it act through the adapter (through_adapters, "
                "prior_through_adapters), or use a prior over the adapter's own parameters."
            )
        self._parameters = covered
        self._adapted = adapted  # A and B
        self._head = {
            name: parameters[name]
            for name in self.match.new
            if parameters[name].requires_grad and head_variance is not None and name not in adapted
        }
        self.covered_names = frozenset(covered) | frozenset(self._head) | frozenset(adapted)
        self._device = local_tensor(next(iter(covered.values()))).device
        if device is not None and self.adapters:
            raise ValueError(
                f"device (prior_device) is {str(device)!r}: a prior that is taken through adapters must be where they are. "
                "Leave it out, or use a prior over the adapter's own parameters."
            )
        self._sum = _Sum(self._device) if any(is_sharded(p) for p in covered.values()) else None
        self.gaussian = _localised(prior, self.match, covered, scale, rank, self._sum, device)
        self._any_sharded = any(is_sharded(p) for p in (*covered.values(), *self._head.values()))
        self._warned = False
        rounding = rounding_cost(self.gaussian, self.adapters) / self.num_examples
        if rounding > _ROUNDING:
            kind = str(next(iter(self.adapters.values())).base.dtype).removeprefix("torch.")
            warnings.warn(
                f"the frozen base weights are {kind}, and rounding alone puts them {rounding:.2g} nats per example away from "
                "the prior's mean, which their adapters would be trained to undo. Load the base model in float32, or use a "
                "larger prior_scale.",
                PriorWarning,
                stacklevel=2,
            )

    def penalty(self) -> Tensor:
        """The penalty of prior and head prior together, in nats (not divided by N): 0-d float64, no graph."""
        with torch.no_grad():
            return self._with_head(partial(self.gaussian.penalty, self._values()))

    def loss(self) -> Tensor:
        """penalty / N as a differentiable 0-d tensor, to be added to a mean NLL before `backward()`.

        Simple, but it counts once per backward: with gradient accumulation it must be added on one micro-batch only, and
        under DDP it costs an all-reduce of gradients that are equal already. `add_gradient_` has neither problem.

        Raises:
            NotImplementedError: the model is sharded; use `add_gradient_`.
        """
        if self._any_sharded:
            raise NotImplementedError("loss() does not know shards; call add_gradient_() after backward instead.")
        total = self.gaussian.penalty(self._parameters | {name: w.effective() for name, w in self.adapters.items()})
        for parameter in self._head.values():
            total = total + 0.5 * parameter.to(torch.promote_types(parameter.dtype, torch.float32)).square().sum() / (
                self.head_variance or 1.0
            )
        return total / self.num_examples

    @torch.no_grad()
    def add_gradient_(self, factor: float | Tensor = 1.0) -> Tensor:
        """Add factor * gradient of penalty / N to `p.grad` of every trained parameter, in place.

        Args:
            factor: the GradScaler's scale, if there is one whose `unscale_` comes later.

        Returns:
            penalty / N at the present weights, 0-d float64: what the prior adds to the loss (not times factor).

        Raises:
            ValueError: a gradient is sparse.
        """
        into = {}
        for name in self._trained:
            into[name] = local_tensor(_gradient(name, self._parameters[name]))
        adapted = {name: _gradient(name, p) for name, p in self._adapted.items()}
        self._warn_if_rounded(into | adapted)
        share = factor / self.num_examples
        theta = self._values()
        whole = {name: torch.zeros_like(theta[name]) for name in self.adapters}  # G, by the weights that are computed with
        value = self._with_head(partial(self.gaussian.add_gradient_, theta, into | whole, share))
        for name, gradient in whole.items():
            if name in into:  # W0 is trained beside its adapter
                into[name] += gradient.to(into[name].dtype)
            for own, part in self.adapters[name].pulled_back(gradient).items():
                adapted[own] += part.to(adapted[own].dtype)
        for name, parameter in self._head.items():
            gradient = local_tensor(_gradient(name, parameter))
            gradient += (local_tensor(parameter).to(gradient.dtype) * (share / (self.head_variance or 1.0))).to(gradient.dtype)
        return value / self.num_examples

    def attach(self, optimizer: torch.optim.Optimizer) -> ProximalStep:
        """Let every `optimizer.step()` be followed by the prior's implicit step, in place of `add_gradient_`.

        Stable at any scale and learning rate, with the same solution: see `ProximalStep`, also for clipping.

        Args:
            optimizer: `torch.optim.SGD`, `Adam` or `AdamW`, or accelerate's wrapper of one.

        Returns:
            The `ProximalStep`; `remove()` takes it off again.

        Raises:
            ValueError: the optimizer is another one, maximises, decays parameters under the prior, does not train all of
                them, or has a prior attached already.
        """
        return ProximalStep(self, optimizer)

    @property
    def has_head(self) -> bool:
        """Whether there are parameters under the head prior."""
        return bool(self._head)

    def rescale(self, scale: float | None = None, *, head_variance: float | None = None) -> None:
        """Go on with another scale, or another variance of the head prior (only where there is one already).

        Raises:
            ValueError: not positive, or there is no head prior.
        """
        if scale is not None:
            self.gaussian = self.gaussian.rescaled(scale)
        if head_variance is not None:
            if self.head_variance is None:
                raise ValueError("there is no head prior to change: make the penalty with a head_variance.")
            if not (head_variance > 0 and math.isfinite(head_variance)):
                raise ValueError(f"head_variance is {head_variance}, expected a finite number > 0.")
            self.head_variance = head_variance

    def trained_parameters(self) -> dict[str, Tensor]:
        """Trainable parameters under the prior or the head prior, adapters that it acts through among them, by name."""
        return {name: self._parameters[name] for name in self._trained} | self._adapted | self._head

    def covered_parameters(self) -> dict[str, Tensor]:
        """Parameters under the prior or the head prior, frozen ones too, by canonical name."""
        return self._parameters | self._adapted | self._head

    @torch.no_grad()
    def proximal_step_(self, lengths: Mapping[int, float | Tensor]) -> Tensor:
        """The implicit step: theta <- argmin_x 1/2 (x - theta)^T M^-1 (x - theta) + penalty(x) / N, M = diag(lengths).

        Args:
            lengths: id(parameter) -> M, the learning rate in plain gradient descent: a number, 0-d or (*local_shape).
                Parameters that are missing stay where they are.

        Returns:
            The penalty (head prior included) at the new weights in nats, 0-d float64.

        Raises:
            ValueError: a number is negative, above 1e300 or NaN (nothing has moved then); or the prior is taken through
                adapters.
        """
        self.refuse_adapters("an implicit step")
        steps: dict[str, float | Tensor] = {}
        for name, parameter in self.trained_parameters().items():  # before anything moves
            check_length(name, lengths.get(id(parameter), 0.0))
        for name in self._trained:
            if (length := lengths.get(id(self._parameters[name]))) is not None:
                steps[name] = length / self.num_examples
        self._warn_if_rounded({name: local_tensor(self._parameters[name]) for name in self._trained})
        variance = self.head_variance or 1.0
        for parameter in self._head.values():
            length = lengths.get(id(parameter), 0.0) / self.num_examples
            local = local_tensor(parameter)
            local.copy_(local * (variance / (variance + length)))
        return self._with_head(partial(self.gaussian.proximal_step_, self._local(self._parameters), steps))

    @torch.no_grad()
    def bound_gaussians(self, metric: str = "diagonal") -> list[BoundGaussian]:
        """What `BAOA(prior=...)` takes of the prior and the head prior over the trained parameters.

        Args:
            metric: "diagonal": the flow of the prior's diagonal part; `add_gradient_` is called as with any optimizer.
                "full": the flow of the whole prior (given the covered parameters that are frozen); `add_gradient_` is not
                called.

        Raises:
            ValueError: another metric.
        """
        if metric not in ("diagonal", "full"):
            raise ValueError(f"metric is {metric!r}, expected 'diagonal' or 'full'.")
        self.refuse_adapters("a sampler")
        trained = {name: self._parameters[name] for name in self._trained}
        if metric == "diagonal":
            gaussian = self.gaussian.select(tuple(trained)).diagonal_part().to(self._device)
        else:
            local = self._local(self._parameters)
            gaussian = self.gaussian.to(self._device).conditional(
                {name: value for name, value in local.items() if name not in trained}
            )
        bound = [BoundGaussian(gaussian, trained, in_gradient=metric == "diagonal")]
        if self._head:
            mean = {name: torch.zeros_like(local_tensor(p)) for name, p in self._head.items()}
            variance = {name: torch.full_like(m, self.head_variance or 1.0) for name, m in mean.items()}
            bound.append(BoundGaussian(LowRankGaussian(mean, variance), dict(self._head), in_gradient=metric == "diagonal"))
        return bound

    def preconditioner(self) -> dict[Tensor, Tensor | float]:
        """The diagonal A of the prior's Sigma over the trained parameters, for `SGLD` and `SGHMC`: (*local_shape), or a number.

        In its metric no curvature of the prior is above 1/N, however stiff the prior is.
        """
        self.refuse_adapters("a sampler")
        variances = self.gaussian.diagonal_part().marginal_variance()
        found: dict[Tensor, Tensor | float] = {self._parameters[n]: variances[n].to(self._device) for n in self._trained}
        return found | dict.fromkeys(self._head.values(), self.head_variance or 1.0)

    def total_curvature(self) -> float:
        """tr(Sigma^-1) / N over all that is under the prior, from above (the K low-rank directions lower it a little)."""
        head = 0.0
        if self.head_variance is not None:
            head = sum(p.numel() for p in self._head.values()) / self.head_variance
        return (self.gaussian.diagonal_precision() + head) / self.num_examples

    def curvature(self) -> float:
        """The largest curvature the prior adds to the loss: largest precision / N. Gradient descent needs lr * this < 2.

        Through adapters it is that in A and B, where they are now: s^2 |A|^2 of the precision along B, and so on.
        """
        return max(self._body_precision(), self._head_precision()) / self.num_examples

    def warn_if_unstable(self, learning_rate: float, *, stacklevel: int = 2) -> bool:
        """Warn if learning rate x largest precision / N is above 2, where an explicit step overshoots; True if so."""
        curvature = self.curvature()
        product = learning_rate * curvature
        if product <= 2:
            return False
        if self.adapters:
            self._warn_of_stiff_adapters(learning_rate, curvature, stacklevel + 1)
            return True
        stable = learning_rate / (2 * self.num_examples)  # no eigenvalue of Sigma may be smaller
        smallest, eps, scale = 1 / self.gaussian.largest_precision(), self.gaussian.eps, self.gaussian.scale
        wider = []
        if self._head_precision() * stable > 1:
            wider.append(
                f"prior_head_variance from {self.head_variance:g} to {_two_digits(stable * _MARGIN, math.ceil)} or more"
            )
        if smallest < stable and smallest - eps > 1e-3 * smallest:
            enough = _two_digits(_MARGIN * scale * (stable - eps) / (smallest - eps), math.ceil)
            wider.append(f"prior_scale from {scale:g} to {enough} or more")
        elif smallest < stable:
            wider.append(f"the prior's eps, {eps:g}, which prior_scale does not change")
        changes = [f"learning_rate to {_two_digits(2 / curvature / _MARGIN, math.floor)} or less", " and ".join(wider)]
        if smallest < stable:
            changes.append("or learn the prior with a larger variance_floor")
        changes.append("or use prior_update='implicit' (SGD, Adam, AdamW), which is stable at any scale")
        warnings.warn(
            f"the prior is too stiff for this learning rate: learning rate {learning_rate:g} x largest precision "
            f"{curvature * self.num_examples:.3g} / N {self.num_examples} = {product:.3g}, and plain gradient steps are stable "
            "only below 2. The weights will oscillate or stay at the prior's mean, and gradient clipping hides why (an "
            "adaptive optimizer will not diverge, but follows the prior's gradient and little else). Change one of: "
            f"{'; '.join(changes)}.",
            PriorWarning,
            stacklevel=stacklevel + 1,
        )
        return True

    def report(self) -> str:
        """One line for logs: what is covered, with which scale and N."""
        head = "" if self.head_variance is None else f", head variance {self.head_variance:g} over {len(self._head)} parameters"
        through = f"; {self.report_of_adapters()}" if self.adapters else ""
        settings = f"rank {self.gaussian.rank}, scale {self.gaussian.scale:g}, N = {self.num_examples}{head}"
        return f"{self.match.report()}{through}; {settings}"

    def report_of_adapters(self) -> str:
        """What is taken through adapters, and what is conditioned on beside them."""
        still = sum(not p.requires_grad for name, p in self._parameters.items() if name not in self.adapters)
        return (
            f"{len(self.adapters)} weights under the prior are taken through their LoRA adapter, as W0 + s B A "
            f"({', '.join(list(self.adapters)[:2])}, ...), {still} others are frozen and conditioned on"
        )

    # ------------------------------------------------------------------------------------------------------- internals

    def _values(self) -> dict[str, Tensor]:
        """The covered weights that the model computes with (this rank's shards), detached where there are adapters."""
        return self._local(self._parameters) | {name: w.effective().detach() for name, w in self.adapters.items()}

    def _body_precision(self) -> float:
        if not self.adapters:
            return self.gaussian.largest_precision()
        trained = {name: self._parameters[name] for name in self._trained}
        return largest_curvature(self.gaussian, self.adapters, trained)

    def refuse_adapters(self, what: str) -> None:
        """Raise `ValueError` where the prior is taken through adapters, which `what` cannot be."""
        if self.adapters:
            raise ValueError(
                f"{what} needs a prior that is Gaussian in the parameters that are trained. This one is taken through LoRA "
                f"adapters ({next(iter(self.adapters))!r} is W0 + s B A), and in A and B it is none. Use gradients "
                "(prior_update='gradient'), or a prior over the adapter's own parameters."
            )

    def _warn_of_stiff_adapters(self, learning_rate: float, curvature: float, stacklevel: int) -> None:
        changes = [f"learning_rate to {_two_digits(2 / curvature / _MARGIN, math.floor)} or less"]
        if self.gaussian.eps == 0.0 and self._head_precision() / self.num_examples < curvature:
            wider = _two_digits(_MARGIN * self.gaussian.scale * learning_rate * curvature / 2, math.ceil)
            changes.append(f"prior_scale from {self.gaussian.scale:g} to {wider} or more")
        stable = learning_rate / (2 * self.num_examples)
        if self._head_precision() * stable > 1:
            changes.append(
                f"prior_head_variance from {self.head_variance:g} to {_two_digits(stable * _MARGIN, math.ceil)} or more"
            )
        changes.append("or learn the prior with a larger variance_floor")
        warnings.warn(
            f"the prior is too stiff for this learning rate, taken through the adapters as they are now: learning rate "
            f"{learning_rate:g} x largest curvature of penalty / N in A and B, {curvature:.3g}, is "
            f"{learning_rate * curvature:.3g}, and plain gradient steps are stable only below 2 (an adaptive optimizer will "
            "not diverge, but follows the prior's gradient and little else). There is no implicit step through adapters. "
            f"Change one of: {'; '.join(changes)}.",
            PriorWarning,
            stacklevel=stacklevel + 1,
        )

    def _local(self, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: local_tensor(p) for name, p in parameters.items()}

    def _with_head(self, evaluate: Callable[[], Tensor]) -> Tensor:
        """What `evaluate` says the Gaussian's penalty is, and the head prior's."""
        if not self._head:
            return self._placed(evaluate())
        device = self._device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        squares = torch.zeros((), dtype=dtype, device=device)
        for parameter in self._head.values():
            weight = contribution(parameter) if self._any_sharded else 1.0
            squares += weight * local_tensor(parameter).detach().to(dtype).square().sum()
        squares /= self.head_variance or 1.0
        if self._sum is not None:
            self._sum.rider = squares  # the Gaussian's own sum of squares takes it along
            try:
                value = evaluate()
            finally:
                delivered = self._sum.has_delivered()
            if delivered:
                return self._placed(value)
        else:
            value = evaluate()
        return self._placed(value) + 0.5 * (sum_over_ranks(squares) if self._any_sharded else squares)

    def _placed(self, value: Tensor) -> Tensor:
        """A sum of the Gaussian's, beside the model: float64 where that has it."""
        return value.to(device=self._device, dtype=torch.float32 if self._device.type == "mps" else value.dtype)

    def _head_precision(self) -> float:
        return 1 / self.head_variance if self._head and self.head_variance is not None else 0.0

    def _warn_if_rounded(self, into: dict[str, Tensor]) -> None:
        if self._warned:
            return
        self._warned = True
        low = sorted({str(g.dtype).removeprefix("torch.") for g in into.values() if g.dtype.itemsize < 4})
        if low:
            warnings.warn(
                f"weights or gradients are {', '.join(low)}: adding the prior's part to them rounds away up to half of it "
                "where it is a thousandth of the data's. Keep the parameters in float32 and use autocast (bf16=True) instead.",
                PriorWarning,
                stacklevel=4,
            )


def match_for_penalty(config: PriorConfig, model: nn.Module, **matching: Any) -> Match:
    """`match_config`, with the likely reason where the base is quantised: its weights have other names, shapes and types."""
    _refuse_wrappers(model)  # first: what FSDP 1 leaves of names and shapes would only give a confusing mismatch
    reshard(model)  # after an evaluation FSDP2's root group holds full tensors in place of its parameters
    try:
        match = match_config(config, model, **matching)
    except PriorMatchError as error:
        if "adapter" in config.source or not is_quantised(model):  # an adapter's own weights are not quantised
            raise
        raise PriorMatchError(
            f"the model's weights are quantised, so that a prior over them has nothing to compare its mean with: load it "
            f"unquantised, or use a prior over the adapter's own parameters. ({error})"
        ) from error
    parameters = canonical_parameters(model)
    odd = [target for target in match.pairs.values() if not parameters[target].is_floating_point()]
    if odd:
        raise PriorMatchError(
            f"{len(odd)} parameters under the prior are quantised ({odd[0]!r} is {parameters[odd[0]].dtype}): load the model "
            "unquantised, or use a prior over the adapter's own parameters."
        )
    return match


class _Sum:
    """`sum_over_ranks`, where a number may ride along with the next single number: it saves a message of its own.

    The message is sent from the device of the model, which is the one that its process group knows.
    """

    def __init__(self, device: torch.device) -> None:
        self.rider: Tensor | None = None
        self._device = device

    def __call__(self, values: Tensor) -> Tensor:
        if self.rider is not None and values.ndim == 0:
            values += self.rider.to(values)
            self.rider = None
        if values.device == self._device:
            return sum_over_ranks(values)
        return values.copy_(sum_over_ranks(values.to(self._device)))

    def has_delivered(self) -> bool:
        """Whether the rider has gone along; it gets off now if it has not."""
        waiting, self.rider = self.rider, None
        return waiting is None


def _localised(
    prior: PriorModel,
    match: Match,
    covered: dict[str, Tensor],
    scale: float | None,
    rank: int | None,
    total: _Sum | None,
    kept_on: torch.device | str | None,
) -> LowRankGaussian:
    """The prior's Gaussian over the matched parameters, by the model's names, cut as the parameters are, and placed."""
    gaussian = prior.gaussian if rank is None else prior.truncated(rank).gaussian  # which knows what its rows are
    if scale is not None:
        gaussian = gaussian.rescaled(scale)
    tensors: dict[str, dict[str, Tensor]] = {"mean": {}, "variance": {}, "deviations": {}}
    for name, target in match.pairs.items():
        parameter = covered[target]
        device, slices = kept_on or local_tensor(parameter).device, shard_slices(parameter)
        for kind, leading in (("mean", 0), ("variance", 0), ("deviations", 1)):
            source: dict[str, Tensor] = getattr(gaussian, kind)
            if name in source:
                tensors[kind][target] = cut(source[name], slices, leading=leading, device=device)
    settings: dict[str, Any] = {}
    if total is not None:
        settings = {"contributions": {n: contribution(p) for n, p in covered.items()}, "sum_over_ranks": total}
    return gaussian._with(**tensors, **settings)


def _two_digits(value: float, rounded: Callable[[float], int]) -> str:
    """`value` with two significant digits, rounded by `rounded` (floor or ceil) so that advice given as a number holds."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return f"{rounded(value / unit) * unit:.2g}"


def _gradient(name: str, parameter: Tensor) -> Tensor:
    if parameter.grad is None:  # unused in the forward pass: the prior holds all the same
        parameter.grad = torch.zeros_like(parameter)
    if parameter.grad.layout != torch.strided:
        raise ValueError(
            f"the gradient of {name!r} is sparse (an Embedding with sparse=True), and the prior holds every row in every step: "
            "make the embedding with sparse=False, or take the prior as an implicit step (attach, with SGD)."
        )
    return parameter.grad


def _refuse_wrappers(model: nn.Module) -> None:
    kinds = {type(module).__name__ for module in model.modules()}
    if "FullyShardedDataParallel" in kinds:
        raise PriorMatchError(
            "this model is wrapped by FSDP version 1, which flattens parameters and loses their shapes. Use FSDP2 "
            "(fsdp_version: 2 in the accelerate configuration), or DDP."
        )
    if "DeepSpeedEngine" in kinds or any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise PriorMatchError(
            "this model belongs to DeepSpeed, whose engine keeps parameters and gradients in partitions of its own, where the "
            "prior cannot add its gradient. Use FSDP2 (fsdp_version: 2 in the accelerate configuration), or DDP."
        )
