"""Priors over the weights of an adapter (LoRA): what must agree before the numbers mean the same.

    W = W0 + s B A          A: (r, in), B: (out, r), s = lora_alpha / r (lora_alpha / sqrt(r) with rslora), W0 frozen

A prior over A and B says something about W only together with s and W0, neither of which is among its parameters. Rank and
modules show in names and shapes; s, and a few values of W0, are recorded when a prior is learned and compared when it is bound.
PEFT is never imported here: its layers are told by what they have.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prior_hub.distributed import is_sharded
from prior_hub.errors import PriorMatchError
from prior_hub.priors.matching import Match, active_adapters, canonical_parameters, is_tuner_layer

__all__ = ["adapter_facts", "adapter_remarks", "refuse_other_adapter", "refuse_other_scaling"]

_PARTS = re.compile(r"(?:^|(?P<module>.*)\.)(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B)(?:\.|$)")
_DOWN = ("lora_A", "lora_embedding_A")  # (r, ...)
_PROBED = 4  # values of W0 that are recorded
_CLOSE = 0.02  # how far they may differ, relative to their size: rounding to bfloat16 moves them by 0.4 %


def adapter_facts(model: nn.Module) -> dict[str, Any] | None:
    """What a prior records about the active LoRA adapter of its source model (JSON values); None where there is no one such.

    type, r, lora_alpha, use_rslora, target_modules and what else decides where the adapter sits, `scaling` (s, or canonical
    module -> s where it differs), and `base_values`: some values of the first adapted W0.
    """
    active = active_adapters(model)
    layers = lora_layers(model)
    if len(active) != 1 or not layers:
        return None
    carriers = [m for m in model.modules() if isinstance(getattr(m, "peft_config", None), Mapping)]
    configured = next((m.peft_config[active[0]] for m in carriers if active[0] in m.peft_config), None)  # type: ignore[operator,index]
    kind = getattr(configured, "peft_type", None)
    facts: dict[str, Any] = {"type": str(getattr(kind, "value", "LORA"))}
    for key in ("r", "lora_alpha", "use_rslora", "bias", "rank_pattern", "alpha_pattern", "layers_to_transform"):
        value = getattr(configured, key, None)
        if value not in (None, {}, []):
            facts[key] = value
    targets = getattr(configured, "target_modules", None)
    facts["target_modules"] = targets if targets is None or isinstance(targets, str) else sorted(targets)
    scaling = {module: float(layer.scaling[active[0]]) for module, layer in layers.items()}
    same = len(set(scaling.values())) == 1
    facts["scaling"] = next(iter(scaling.values())) if same else scaling
    for module, layer in layers.items():
        values = _some_values(getattr(layer.get_base_layer(), "weight", None))
        if values is not None:
            facts["base_values"] = {"name": f"{module}.weight", "values": [float(f"{v:.5g}") for v in values.tolist()]}
            break
    return facts


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """Canonical name of the adapted module -> PEFT's layer, for layers that hold the one active LoRA adapter."""
    active = active_adapters(model)
    if len(active) != 1:
        return {}
    names = {id(p): name for name, p in canonical_parameters(model).items()}
    found: dict[str, Any] = {}
    for module in model.modules():
        if not is_tuner_layer(module):
            continue
        for kind in _DOWN:
            part = getattr(module, kind, {})
            if active[0] not in part:
                continue
            held = part[active[0]]
            name = names.get(id(held if isinstance(held, Tensor) else held.weight))
            if name is not None:
                found[name[: name.rindex(f".{kind}")]] = module
    return found


def refuse_other_adapter(
    prior: Mapping[str, Sequence[int]], facts: Mapping[str, Any] | None, model: nn.Module, *, head: Iterable[str] = ()
) -> None:
    """Raise where a prior over a LoRA adapter meets a model without one, of another rank, or on other modules.

    Args:
        prior: name -> shape in the prior; a prior over no adapter passes.
        facts: as `adapter_facts` recorded them.
        model: the model, wrapped by PEFT or not.
        head: the source task's head as recorded; adapters on it are no part of the prior.

    Raises:
        PriorMatchError: with what to pass to `LoraConfig`.
    """
    wanted = _layout(prior)
    if not wanted:
        return
    advice = _advice(facts, wanted)
    active = active_adapters(model)
    if len(active) > 1:
        raise PriorMatchError(
            f"the prior is over one LoRA adapter, and {len(active)} are active in the model ({', '.join(map(repr, active))}): "
            f"choose one with model.set_adapter({active[0]!r})."
        )
    found = _layout({name: tuple(p.shape) for name, p in canonical_parameters(model).items()})
    if not found:
        raise PriorMatchError(
            f"the prior is over a LoRA adapter, and the model has none that is active: wrap it first, {advice} "
            "(the adapter's name does not matter)."
        )
    aside = {m["module"].rsplit(".", 1)[-1] for n in head if (m := _PARTS.match(n)) is not None and m["module"]}
    more, less = sorted(found.keys() - wanted.keys() - aside), sorted(wanted.keys() - found.keys())
    drop = "Pass on_mismatch='drop' to leave out what does not fit."
    if more or less:
        raise PriorMatchError(
            f"other target_modules: the prior's adapter is on {', '.join(map(repr, sorted(wanted)))}, the model's on "
            f"{', '.join(map(repr, sorted(found)))}. Make the model's adapter {advice}. {drop}"
        )
    for module, ranks in wanted.items():
        own = found[module]
        if len(ranks) != len(own):
            raise PriorMatchError(
                f"the prior's adapter is on {len(ranks)} modules called {module!r}, the model's on {len(own)}: another number "
                f"of layers, or other layers_to_transform. {drop}"
            )
        if sorted(ranks) != sorted(own):
            raise PriorMatchError(
                f"other rank: on {module!r} the prior's adapter has r = {_range(ranks)}, the model's r = {_range(own)}. Make "
                f"the model's adapter {advice}. {drop}"
            )


def refuse_other_scaling(facts: Mapping[str, Any] | None, match: Match, model: nn.Module) -> None:
    """Raise where the bound A and B would be multiplied by another s, and so be another function.

    Raises:
        PriorMatchError: with both scalings, and the `lora_alpha` that gives the prior's.
    """
    recorded = (facts or {}).get("scaling")
    if recorded is None:
        return
    layers = lora_layers(model)
    active = active_adapters(model)
    for name, target in match.pairs.items():
        there, here = _PARTS.match(target), _PARTS.match(name)
        if there is None or here is None or there["part"] not in _DOWN or there["module"] not in layers:
            continue
        expected = recorded.get(here["module"]) if isinstance(recorded, Mapping) else recorded
        layer = layers[there["module"]]
        actual = float(layer.scaling[active[0]])
        if isinstance(expected, (int, float)) and not math.isclose(expected, actual, rel_tol=1e-6):
            rank = layer.r[active[0]]
            power = 0.5 if layer.use_rslora.get(active[0], False) else 1.0
            raise PriorMatchError(
                f"other scaling: the prior's adapter is multiplied by {expected:g} at {here['module']!r}, the model's by "
                f"{actual:g} (lora_alpha {layer.lora_alpha[active[0]]:g}, r {rank}), so that the same weights would be another "
                f"function. Make it with lora_alpha={expected * rank**power:g}{', use_rslora=True' if power < 1 else ''}."
            )


def adapter_remarks(facts: Mapping[str, Any] | None, match: Match, model: nn.Module) -> list[str]:
    """Remark on a frozen base that is not the one the prior's adapter was learned on, as far as a few values tell."""
    probe = (facts or {}).get("base_values")
    if not isinstance(probe, Mapping):
        return []
    values = probe.get("values")
    if not isinstance(values, list) or not values or not all(isinstance(v, (int, float)) for v in values):
        return []
    place = match.rename(str(probe.get("name", "")))
    parameter = canonical_parameters(model).get(place or "")
    own = None if parameter is None else _some_values(parameter)
    if own is None:
        return []
    there = torch.tensor(values, dtype=torch.float64)
    if own.shape == there.shape and bool((own - there).norm() <= _CLOSE * there.norm()):
        return []
    return [
        f"the base model is another one than the prior's adapter was learned on ({place!r} begins with {own[0]:.4g}, there "
        f"with {there[0]:.4g}): the adapter's weights mean nothing on it. Load the base model that the prior names."
    ]


def _layout(shapes: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """Last part of the names of adapted modules ("query") -> rank of each."""
    ranks = defaultdict(list)
    for name, shape in shapes.items():
        found = _PARTS.match(name)
        if found is not None and found["part"] in _DOWN and len(shape) >= 2:
            ranks[(found["module"] or "").rsplit(".", 1)[-1]].append(int(shape[0]))
    return dict(ranks)


def _advice(facts: Mapping[str, Any] | None, wanted: Mapping[str, list[int]]) -> str:
    """The `LoraConfig` that a prior's adapter was made with."""
    known = facts or {}
    rank = known.get("r", max(r for ranks in wanted.values() for r in ranks))
    parts = [f"r={rank}"]
    if "lora_alpha" in known:
        parts.append(f"lora_alpha={known['lora_alpha']}")
    if known.get("use_rslora"):
        parts.append("use_rslora=True")
    parts.append(f"target_modules={known.get('target_modules') or sorted(wanted)!r}")
    parts += [f"{key}={known[key]!r}" for key in ("rank_pattern", "alpha_pattern", "layers_to_transform") if key in known]
    return f"with get_peft_model(model, LoraConfig({', '.join(parts)}))"


def _range(ranks: Sequence[int]) -> str:
    return str(ranks[0]) if len(set(ranks)) == 1 else f"{min(ranks)} to {max(ranks)}"


def _some_values(weight: Any) -> Tensor | None:
    """The first few values of a weight, float64 on the CPU; None where it is quantised, sharded or has none."""
    if (
        not isinstance(weight, Tensor)
        or is_sharded(weight)
        or not weight.is_floating_point()
        or weight.is_meta
        or not weight.numel()
    ):
        return None
    return weight.detach().reshape(-1)[:_PROBED].double().cpu()
