"""The prior as an implicit step of its own after each step of the optimizer: stable at any scale and learning rate.

Learned priors are stiff: their variances span many orders of magnitude, and an explicit gradient step is unstable where
learning rate x precision / N > 2. Forward-backward splitting takes the data's gradient explicitly and the penalty implicitly:

    theta' = the optimizer's step with the gradient of the NLL alone
    theta  = argmin_x 1/2 (x - theta')^T M^-1 (x - theta') + penalty(x) / N  =  mean + Sigma (Sigma + M/N)^-1 (theta' - mean)

M is diagonal: what the optimizer multiplies a steady gradient by, so that at rest theta' = theta - M g, and theta stays where
it is exactly if g + Sigma^-1 (theta - mean) / N = 0. That is the minimum of NLL + penalty / N, the same MAP solution as with
the gradient form, whatever M is:

    SGD             lr / (1 - momentum) (times 1 - dampening; Nesterov momentum: the same)
    Adam, AdamW     lr / (sqrt(exp_avg_sq / bias correction) + eps), elementwise: the prior acts in the optimizer's own metric,
                    and its stiffness never enters exp_avg_sq
    clipping        times the clipping coefficient of the step: else data would be clipped against an unclipped prior

Along an eigenvector of precision p the step multiplies the distance from the mean by 1 / (1 + M p / N), never by a negative
number. The linearly implicit form, the whole gradient times (I + M Sigma^-1 / N)^-1 before the optimizer, gives the same
iterates for SGD without momentum. With Adam and noisy gradients it does not hold the stiff weights, whose small gradients
Adam blows up to full steps (benchmarks/prior_update.py compares the forms), so the proximal form is the one used.

Source: Lions and Mercier 1979 (forward-backward splitting); Parikh and Boyd 2014, Proximal Algorithms, section 4.2.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prior_hub.distributed import is_sharded, local_tensor

if TYPE_CHECKING:
    from prior_hub.finetuning.penalty import PriorPenalty

__all__ = ["ProximalStep", "can_step_implicitly", "chosen_update"]

UPDATES = ("auto", "gradient", "implicit")
SUPPORTED = "torch.optim.SGD, Adam and AdamW"

# "auto" takes the implicit step above these.
_STIFF_SGD = 1.0  # learning rate x largest precision / N: above 1 an explicit step overshoots the prior's mean
_STIFF_ADAM = 0.01  # nats per example that one step of size lr in every weight costs under the prior: lr^2 tr(Sigma^-1) / (2N)


def can_step_implicitly(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer's metric M is known here: SGD, Adam or AdamW with their own `step`, not a subclass with another."""
    known = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
    return inspect.unwrap(type(optimizer).step) in [inspect.unwrap(kind.step) for kind in known]


def highest_rate(optimizer: torch.optim.Optimizer) -> float:
    """The highest learning rate of the schedule, as far as the optimizer's groups tell it (OneCycleLR writes max_lr)."""
    names = ("max_lr", "initial_lr", "lr")
    return max(float(group[name]) for group in optimizer.param_groups for name in names if name in group)


def chosen_update(requested: str, penalty: PriorPenalty, optimizer: torch.optim.Optimizer) -> tuple[str, str]:
    """("gradient" or "implicit", why): what `prior_update` comes to for this prior, optimizer, learning rate and N.

    Args:
        requested: "auto", "gradient" or "implicit".
        penalty: the bound prior.
        optimizer: the torch optimizer, with its largest learning rate in `initial_lr` or `lr` of its groups.

    Raises:
        ValueError: no such update, or "implicit" with an optimizer whose metric is not known.
    """
    if requested not in UPDATES:
        raise ValueError(f"prior_update is {requested!r}, expected one of {', '.join(map(repr, UPDATES))}.")
    if penalty.adapters and requested == "implicit":
        penalty.refuse_adapters("prior_update='implicit'")
    if penalty.adapters and requested == "auto":
        return "gradient", "there is no implicit step for a prior that is taken through adapters"
    known = can_step_implicitly(optimizer)
    if requested == "implicit" and not known:
        raise ValueError(
            f"prior_update='implicit' needs the step length of each weight, known for {SUPPORTED}, not for "
            f"{type(optimizer).__name__}. Use one of those, or prior_update='gradient'."
        )
    if requested != "auto":
        return requested, "as asked for"
    if not known:
        return "gradient", f"the step lengths of {type(optimizer).__name__} are not known (they are for {SUPPORTED})"
    rate = highest_rate(optimizer)
    if isinstance(optimizer, torch.optim.SGD):
        stiffness, limit = rate * penalty.curvature(), _STIFF_SGD
        what = f"learning rate {rate:g} x largest precision / N = {stiffness:.3g}"
    else:
        stiffness, limit = rate**2 * penalty.total_curvature() / 2, _STIFF_ADAM
        what = f"a step of {rate:g} in every weight costs {stiffness:.3g} nats per example under the prior"
    if stiffness > limit:
        return "implicit", f"{what}, above {limit:g}: an explicit step would overshoot"
    return "gradient", f"{what}, not above {limit:g}: an explicit step is stable"


class ProximalStep:
    """Takes the prior's implicit step after each step of an optimizer; made by `PriorPenalty.attach(optimizer)`.

        prior_step = penalty.attach(optimizer)
        for batch in loader:
            nll(model, batch).backward()
            prior_step.clip_grad_norm_(model.parameters(), 1.0)   # if you clip; not torch's own function
            optimizer.step()                                      # and the prior's step with it
            optimizer.zero_grad()

    It hangs on the optimizer itself, so it counts once per optimizer step under gradient accumulation, and a step that a
    GradScaler skips is skipped here too. It has no state that a checkpoint would have to hold: what its Gaussian keeps
    from step to step saves work, and changes nothing beyond rounding (with SGD at one learning rate, nothing at all).

    Args:
        penalty: the bound prior.
        optimizer: a `torch.optim.SGD`, `Adam` or `AdamW` over the penalty's parameters, without weight decay on them.

    Raises:
        ValueError: the optimizer's metric is not known, it maximises, decays a parameter under the prior or does not train
            one, or has a prior attached already.
    """

    def __init__(self, penalty: PriorPenalty, optimizer: torch.optim.Optimizer) -> None:
        penalty.refuse_adapters("an implicit step")
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
        if not can_step_implicitly(optimizer):
            raise ValueError(
                f"the implicit step knows the step lengths of {SUPPORTED}, not of {type(optimizer).__name__}: use "
                "PriorPenalty.add_gradient_ with it."
            )
        if any(group.get("maximize") for group in optimizer.param_groups):
            raise ValueError("the optimizer has maximize=True; a penalty is to be minimised.")
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        missing = [name for name, p in penalty.trained_parameters().items() if id(p) not in held]
        if missing:
            raise ValueError(
                f"the optimizer does not train {len(missing)} of the parameters under the prior ({missing[0]!r}). Make it over "
                "the parameters as they are now (after wrapping and sharding), or freeze those with requires_grad_(False)."
            )
        names = {id(p): name for name, p in penalty.covered_parameters().items()}
        for group in optimizer.param_groups:
            decayed = [names[id(p)] for p in group["params"] if id(p) in names] if group.get("weight_decay") else []
            if decayed:
                raise ValueError(
                    f"the optimizer decays {len(decayed)} parameters that are under the prior ({decayed[0]!r}, weight_decay="
                    f"{group['weight_decay']}): they would be pulled to zero as well. Give them weight_decay=0 (note that "
                    "torch.optim.AdamW decays by 0.01 unless told otherwise)."
                )
        hooks = optimizer._optimizer_step_post_hooks.values()
        if any(isinstance(getattr(hook, "__self__", None), ProximalStep) for hook in hooks):
            raise ValueError(
                "a prior is attached to this optimizer already, and would count twice: remove() that one, or make a new "
                "optimizer."
            )
        self.penalty = penalty
        self._clip = 1.0
        self._clips: dict[int, float] = {}
        self._value: Tensor | None = None
        self._handles = (
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        )

    def remove(self) -> None:
        """Detach from the optimizer."""
        for handle in self._handles:
            handle.remove()

    def value(self) -> Tensor:
        """penalty / N at the weights after the last step, 0-d float64; worked out if there was no step yet."""
        if self._value is None:
            self._value = self.penalty.penalty() / self.penalty.num_examples
        return self._value

    def clipped(self, norm: float | Tensor, max_norm: float, parameters: Iterable[Tensor] | None = None) -> None:
        """Say that the coming step's gradient, of norm `norm`, was clipped to `max_norm` (as torch does it).

        Args:
            norm: of the gradient before clipping.
            max_norm: what it was clipped to.
            parameters: those it was the gradient of; all when None.
        """
        if isinstance(norm, Tensor) and is_sharded(norm):
            norm = norm.full_tensor()  # type: ignore[attr-defined]
        coefficient = min(1.0, max_norm / (float(norm) + 1e-6))
        if parameters is None:
            self._clip, self._clips = coefficient, {}
        else:
            self._clips |= {id(p): coefficient for p in parameters}

    def clip_grad_norm_(self, parameters: Tensor | Iterable[Tensor], max_norm: float) -> Tensor:
        """`torch.nn.utils.clip_grad_norm_`, which the prior's step then takes into account; before every step, or never."""
        chosen = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        norm = torch.nn.utils.clip_grad_norm_(chosen, max_norm)
        self.clipped(norm, max_norm, chosen)
        return norm

    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """The hook before `optimizer.step()`: Adam has a step length only for parameters that have a gradient."""
        del optimizer, args, kwargs
        for parameter in self.penalty.trained_parameters().values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    @torch.no_grad()
    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """The hook after `optimizer.step()`."""
        del args, kwargs
        found_inf = getattr(optimizer, "found_inf", None)  # a fused optimizer skips the step by itself under a GradScaler
        if found_inf is None or not float(found_inf) > 0:
            lengths = {}
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    clip = self._clips.get(id(parameter), self._clip)
                    lengths[id(parameter)] = _length(optimizer, group, parameter, clip)
            self._value = self.penalty.proximal_step_(lengths) / self.penalty.num_examples
        self._clip, self._clips = 1.0, {}


def _length(optimizer: torch.optim.Optimizer, group: dict[str, Any], parameter: Tensor, clip: float) -> float | Tensor:
    """M of one parameter: a number, or (*local_shape) for Adam."""
    rate = float(group["lr"])
    if isinstance(optimizer, torch.optim.SGD):
        momentum = float(group["momentum"])
        steady = (1 - float(group["dampening"])) / (1 - momentum) if momentum else 1.0
        return rate * steady * clip
    state = optimizer.state.get(parameter)
    if not state or rate == 0.0:
        return 0.0  # no step was taken for it
    second = local_tensor(state["max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"])
    second = second.to(torch.promote_types(second.dtype, torch.float32))
    length: Tensor = (rate * clip) / (second.sqrt() / _bias_correction(group["betas"][1], state["step"]) + group["eps"])
    return length


def _bias_correction(beta: float | Tensor, step: float | Tensor) -> float | Tensor:
    """sqrt(1 - beta^step), on the device where `step` is on one (fused, capturable): no wait for it."""
    if isinstance(step, Tensor) and step.device.type != "cpu":
        exact = torch.float32 if step.device.type == "mps" else torch.float64
        return (1 - float(beta) ** step.to(exact)).sqrt()
    return math.sqrt(1 - float(beta) ** float(step))
