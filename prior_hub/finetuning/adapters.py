"""A prior over base weights that are frozen, taken through the LoRA adapters on them.

    W = W0 + s B A                 W0: (out, in) frozen, A: (r, in), B: (out, r), s = lora_alpha / r
    penalty(A, B) = 1/2 (W - mean)^T Sigma^-1 (W - mean)      over all covered weights, those without an adapter as they are
    G = d penalty / d W            dB = s G A^T            dA = s B^T G

So an adapter is fine-tuned under any prior of the whole model: what counts is the weight that the model computes with. Weights
without an adapter are conditioned on; their share of the value is in it. In (A, B) the penalty is no Gaussian: there is no
implicit step, and no sampler here knows its law (s B A is the same for c A and B / c, so that the law has no norm).

Embeddings hold A: (r, n), B: (dim, r) for W: (n, dim); convolutions A: (r, in, h, w), B: (out, r, 1, 1), one matrix product all
the same. Dropout before A is no part of W. PEFT is not imported; its layers are told by their class, and those whose W is not
W0 + s B A are refused.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prior_hub.distributed import is_sharded
from prior_hub.errors import PriorMatchError, PriorWarning
from prior_hub.model import PriorModel
from prior_hub.priors.gaussian import LowRankGaussian
from prior_hub.priors.matching import Match, active_adapters, canonical_parameters, is_tuner_layer, tied_names

__all__ = [
    "AdaptedWeight",
    "adapted_weights",
    "initialize_through_adapters",
    "is_quantised",
    "largest_curvature",
    "rounding_cost",
]

_KNOWN = ("Linear", "Embedding", "Conv2d")  # of peft.tuners.lora.layer
_ITERATIONS = 30


@dataclass(frozen=True, eq=False)
class AdaptedWeight:
    """One weight W = W0 + s B A under a LoRA adapter.

    Attributes:
        name: canonical name of W0.
        base: W0 (*shape).
        down: A, (r, ...).
        up: B, (out, r, ...).
        down_name: canonical name of A.
        up_name: canonical name of B.
        transposed: W is (s B A)^T + W0 (embeddings; linear layers with fan_in_fan_out, as GPT-2's).
        layer: PEFT's layer, which is asked for s each time.
        adapter: the adapter's name in it.
    """

    name: str
    base: Tensor
    down: Tensor
    up: Tensor
    down_name: str
    up_name: str
    transposed: bool
    layer: Any
    adapter: str

    @property
    def scaling(self) -> float:
        """The factor s."""
        return float(self.layer.scaling[self.adapter])

    @property
    def trained(self) -> dict[str, Tensor]:
        """Those of A and B that are trained, by canonical name."""
        return {n: p for n, p in ((self.down_name, self.down), (self.up_name, self.up)) if p.requires_grad}

    def change(self) -> Tensor:
        """The product s B A in the shape of W0, float32 or wider; differentiable in A and B."""
        dtype = self._dtype()
        with torch.autocast(self.base.device.type, enabled=False):
            product = self.scaling * (self.up.to(dtype).flatten(1) @ self.down.to(dtype).flatten(1))
        return (product.T if self.transposed else product).reshape(self.base.shape)

    def effective(self) -> Tensor:
        """W = W0 + s B A, (*shape), float32 or wider; differentiable in A and B."""
        return self.base.to(self._dtype()) + self.change()

    def pulled_back(self, gradient: Tensor) -> dict[str, Tensor]:
        """The gradient G for W (*shape) -> those for the trained ones of A and B, by canonical name: s B^T G and s G A^T."""
        g = gradient.reshape(self.base.shape[0], -1)
        g = g.T if self.transposed else g
        found = {}
        with torch.autocast(self.base.device.type, enabled=False):
            if self.down.requires_grad:
                found[self.down_name] = (self.scaling * (self.up.to(g.dtype).flatten(1).T @ g)).reshape(self.down.shape)
            if self.up.requires_grad:
                found[self.up_name] = (self.scaling * (g @ self.down.to(g.dtype).flatten(1).T)).reshape(self.up.shape)
        return found

    def moved(self, directions: Mapping[str, Tensor]) -> Tensor:
        """The change of W, to first order, when A and B move along `directions`: s (dB A + B dA), (*shape)."""
        dtype = self._dtype()
        down, up = self.down.detach().to(dtype).flatten(1), self.up.detach().to(dtype).flatten(1)
        total = torch.zeros(up.shape[0], down.shape[1], dtype=dtype, device=up.device)
        if self.up_name in directions:
            total += directions[self.up_name].to(dtype).flatten(1) @ down
        if self.down_name in directions:
            total += up @ directions[self.down_name].to(dtype).flatten(1)
        total = self.scaling * total
        return (total.T if self.transposed else total).reshape(self.base.shape)

    def _dtype(self) -> torch.dtype:
        found = torch.promote_types(torch.promote_types(self.base.dtype, self.down.dtype), self.up.dtype)
        return torch.promote_types(found, torch.float32)


def adapted_weights(model: nn.Module, covered: Mapping[str, Tensor]) -> dict[str, AdaptedWeight]:
    """The covered weights that an active LoRA adapter changes, by canonical name.

    Layers whose A or B is itself among the covered are left out: there the prior speaks of the adapter already.

    Args:
        model: the model, possibly wrapped.
        covered: canonical name -> parameter under the prior.

    Raises:
        PriorMatchError: an adapter of which W = W0 + s B A is not true (DoRA, several active ones, merged, lora_bias,
            another kind of adapter), on a quantised weight or on one that another layer shares.
        NotImplementedError: the model is sharded.
    """
    names = {id(p): name for name, p in canonical_parameters(model).items()}
    by_id = {id(p): name for name, p in covered.items()}
    shared = set(tied_names(model).values())
    found: dict[str, AdaptedWeight] = {}
    for raw, module, active in _active_layers(model):
        base: Any = module.get_base_layer()
        touched = [by_id[id(p)] for p in base.parameters() if id(p) in by_id]
        if not touched:
            continue
        weight: Tensor | None = getattr(base, "weight", None)
        name = by_id.get(id(weight)) if isinstance(weight, Tensor) else None
        where = f"the adapter on {name or touched[0]!r}"
        if any(is_sharded(p) for p in module.parameters()):
            raise NotImplementedError(
                f"{where} is sharded (FSDP2, tensor parallelism): a prior over base weights is taken through adapters on one "
                "process or under DDP only. prior_through_adapters=False conditions on them instead."
            )
        _refuse_other_kinds(raw, module, active, where)
        if name is None:
            continue  # a covered bias of a layer whose weight is not under the prior
        embedding = type(module).__name__ == "Embedding"
        down: Any = module.lora_embedding_A[active[0]] if embedding else module.lora_A[active[0]].weight
        up: Any = module.lora_embedding_B[active[0]] if embedding else module.lora_B[active[0]].weight
        if id(down) in by_id or id(up) in by_id:
            continue
        if name in shared:
            raise PriorMatchError(
                f"{where} changes one use of a weight that the model uses in two places, so that there is no one W0 + s B A "
                "for the prior. Leave that layer out of target_modules, or pass prior_through_adapters=False."
            )
        transposed = embedding or bool(getattr(module, "fan_in_fan_out", False))
        found[name] = AdaptedWeight(
            name, covered[name], down, up, names[id(down)], names[id(up)], transposed, module, active[0]
        )
    return found


def _active_layers(model: nn.Module) -> Iterator[tuple[str, Any, list[str]]]:
    """(raw name, PEFT's layer, its active adapters), for layers where one is active and adapters are not switched off."""
    for raw, module in model.named_modules():
        if not is_tuner_layer(module):
            continue
        layer: Any = module
        held = {a for kind in layer.adapter_layer_names for a in getattr(layer, str(kind), ())}
        active = [a for a in layer.active_adapters if a in held]
        if active and not layer.disable_adapters:
            yield raw, layer, active


def _refuse_other_kinds(raw: str, layer: Any, active: list[str], where: str) -> None:
    """Raise unless what the layer computes with is W0 + s B A."""
    kind, base = type(layer), layer.get_base_layer()
    out = "Use a prior over the adapter's own parameters, or prior_through_adapters=False to condition on W0."
    if layer.merged:
        raise PriorMatchError(f"{where} is merged into the base weights: call model.unmerge_adapter() before training.")
    if len(active) > 1:
        raise PriorMatchError(
            f"{where} is one of {len(active)} that are active ({', '.join(map(repr, active))}): a prior over base weights is "
            f"taken through one. Call model.set_adapter({active[0]!r}). {out}"
        )
    weight = getattr(base, "weight", None)
    if getattr(layer, "quantization_backend", None) is not None or not (
        isinstance(weight, Tensor) and weight.is_floating_point()
    ):
        raise PriorMatchError(
            f"{where} is on a quantised layer ({kind.__name__} over {type(base).__name__}), of which W0 is not at hand. Load "
            f"the base model unquantised. {out}"
        )
    if kind.__module__ != "peft.tuners.lora.layer" or kind.__name__ not in _KNOWN or hasattr(layer.base_layer, "base_layer"):
        raise PriorMatchError(
            f"{where} is a {kind.__module__}.{kind.__name__} at {raw!r}: a prior over base weights is taken through LoRA's "
            f"{', '.join(_KNOWN)} layers only. {out}"
        )
    variant = layer.lora_variant.get(active[0]) if hasattr(layer, "lora_variant") else None
    if variant is not None or layer.use_dora.get(active[0], False):
        what = "DoRA" if layer.use_dora.get(active[0], False) else type(variant).__name__
        raise PriorMatchError(f"{where} is a variant of LoRA ({what}), whose weight is not W0 + s B A. {out}")
    if layer.lora_bias.get(active[0], False):
        raise PriorMatchError(f"{where} has a bias of its own (lora_bias=True), which is not under the prior. {out}")
    if getattr(base, "groups", 1) != 1:
        raise PriorMatchError(f"{where} is on a convolution of {base.groups} groups, whose weight is not W0 + s B A. {out}")


def is_quantised(model: nn.Module) -> bool:
    """Whether a model was loaded with quantised weights (bitsandbytes, GPTQ, AWQ, ...)."""
    configs = [getattr(module, "config", None) for module in model.modules()]
    if any(getattr(config, "quantization_config", None) is not None for config in configs):
        return True
    return any(not p.is_floating_point() and not p.is_complex() for p in model.parameters())


def initialize_through_adapters(prior: PriorModel, model: nn.Module, **matching: Any) -> Match:
    """As `PriorModel.initialize`, of the weights that the model computes with: W0 becomes mean - s B A under an adapter.

    Warns where that changes frozen base weights, which PEFT does not save with an adapter.

    Args:
        prior: the prior.
        model: changed in place.
        **matching: as `PriorModel.match`.
    """
    if not active_adapters(model):
        return prior.initialize(model, **matching)
    match = prior.match(model, **matching)
    parameters = canonical_parameters(model)
    covered = {target: parameters[target] for target in match.pairs.values()}
    adapted = adapted_weights(model, covered)
    if not adapted:
        return prior.initialize(model, **matching)
    with torch.no_grad():
        changes = {name: weight.change() for name, weight in adapted.items()}
        moved = []
        for source, target in match.pairs.items():
            wanted = prior.mean[source].to(covered[target].device) - changes.get(target, 0.0)
            if not covered[target].requires_grad and not torch.equal(covered[target], wanted.to(covered[target].dtype)):
                moved.append(target)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PriorWarning)  # given by match above
            match = prior.initialize(model, **matching)
        for name, change in changes.items():
            if change.any():
                adapted[name].base.copy_(adapted[name].base.to(change.dtype) - change)
    if moved:
        warnings.warn(
            f"{len(moved)} frozen base weights ({moved[0]!r}, ...) are set to the prior's mean, and PEFT saves the adapter "
            "only: it belongs to these weights, not to those that the base model came with. Save them too "
            "(model.get_base_model().save_pretrained(...), or model.merge_and_unload()), or pass prior_initialize=False to "
            "start from the base model as it is.",
            PriorWarning,
            stacklevel=3,
        )
    return match


@torch.no_grad()
def rounding_cost(gaussian: LowRankGaussian, adapted: Mapping[str, AdaptedWeight]) -> float:
    """What the rounding of W0 to bfloat16 or float16 alone costs under the prior, in nats: the expectation, by its diagonal.

    Rounding errors are spread evenly over the gap between two numbers, 2^e x the type's eps for those from 2^e to 2^(e + 1).
    """
    low = {name: w.base.dtype for name, w in adapted.items() if w.base.dtype.itemsize < 4}
    if not low:
        return 0.0
    diagonal = gaussian.select(tuple(low)).diagonal_part().marginal_variance()
    total = 0.0
    for name, dtype in low.items():
        mean = gaussian.mean[name].float()
        gap = torch.exp2(mean.frexp().exponent.float() - 1) * torch.finfo(dtype).eps
        total += float((torch.where(mean == 0, 0.0, gap).square() / 24 / diagonal[name]).sum())
    return total


@torch.no_grad()
def largest_curvature(
    gaussian: LowRankGaussian, adapted: Mapping[str, AdaptedWeight], trained: Mapping[str, Tensor], *, seed: int = 0
) -> float:
    """The largest eigenvalue of J^T Sigma^-1 J, J = dW / d(A, B), at the present A and B; by power iteration, from below.

    That is the stiffest curvature which the penalty has in the parameters that are trained, without the term that a residual
    of the penalty adds. A and B grow while they are trained, and so does it: s^2 |A|^2 of the prior's own along B.

    Args:
        gaussian: over the covered weights.
        adapted: those under an adapter.
        trained: covered weights that are trained themselves, by name.
        seed: of the start vector.
    """
    generator = torch.Generator().manual_seed(seed)
    flat = gaussian._flat()
    parameters = dict(trained)
    for weight in adapted.values():
        parameters |= weight.trained
    vector = {
        n: torch.randn(p.shape, generator=generator).to(p.device, torch.promote_types(p.dtype, torch.float32))
        for n, p in parameters.items()
    }
    estimate, last = 0.0, -1.0
    for step in range(_ITERATIONS):
        norm = float(torch.stack([v.square().sum() for v in vector.values()]).sum().sqrt())
        if norm == 0.0:
            return 0.0
        if step:
            last, estimate = estimate, norm  # |H v| of a unit vector v
            if abs(estimate - last) < 1e-3 * estimate:
                break
        vector = {name: v / norm for name, v in vector.items()}
        image = {}
        for name in gaussian.names:
            moved = adapted[name].moved(vector) if name in adapted else torch.zeros_like(gaussian.mean[name])
            image[name] = (moved + vector[name].to(moved.dtype) if name in trained else moved).reshape(-1)
        _, solved = flat.penalty_and_gradient(image)
        vector = {name: solved[name].reshape(p.shape) for name, p in trained.items()}
        for name, weight in adapted.items():
            for own, gradient in weight.pulled_back(solved[name].reshape(weight.base.shape)).items():
                vector[own] = vector.get(own, 0.0) + gradient  # two layers may share an A
    return estimate
