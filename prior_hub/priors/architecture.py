"""Which network a prior is over, told by names and shapes alone, and whether a model is one.

fingerprint = first 16 hex digits of sha256(JSON of the sorted [name, shape] of the body), where the body is every parameter but
those of the task's head and of a `pooler`, which one class of a transformers model has and another of the same model has not,
and the longest dotted prefix that all its names share is taken off.

So `resnet.encoder.weight` in a classifier, `encoder.weight` in the bare model and `module.backbone.encoder.weight` in a model
of one's own are the same, while one more layer or another width is another fingerprint. Equal fingerprints say that a prior's
names and shapes are the model's; they are for finding, and `match_config` is what decides.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from prior_hub.errors import PriorMatchError, PriorWarning
from prior_hub.priors.adapters import adapter_remarks, refuse_other_adapter, refuse_other_scaling
from prior_hub.priors.config import PriorConfig, is_hub_name
from prior_hub.priors.matching import (
    Match,
    NameMap,
    active_adapters,
    canonical_parameters,
    flattened_parts,
    head_parameter_names,
    match_parameters,
)

__all__ = [
    "architecture_fingerprint",
    "base_model_names",
    "config_fingerprint",
    "match_config",
    "model_fingerprints",
    "share_of_body",
]

_DIGITS = 16
_ADAPTER = re.compile(r"(^|\.)lora_")  # PEFT's own names for everything a LoRA adapter adds


def architecture_fingerprint(shapes: Mapping[str, Sequence[int]], head: Iterable[str] = ()) -> str | None:
    """The fingerprint of a network, 16 hex digits; None where nothing is left beside the head.

    Args:
        shapes: name -> shape of every parameter, in any order.
        head: names that are the task's head, and left out.
    """
    outside = set(head)
    body = {name: [int(n) for n in shape] for name, shape in shapes.items() if name not in outside}
    body = {name: shape for name, shape in body.items() if "pooler" not in name.split(".")} or body
    if not body:
        return None
    start = len(_common_prefix(body))
    text = json.dumps(sorted([name[start:], shape] for name, shape in body.items()), separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:_DIGITS]


def _common_prefix(names: Iterable[str]) -> str:
    """The longest prefix of whole dotted parts that all names begin with, their last parts aside."""
    parts = [name.split(".")[:-1] for name in names]
    first, last = min(parts), max(parts)  # what these two share, all share
    shared = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return "".join(f"{part}." for part in first[:shared])


def config_fingerprint(config: PriorConfig) -> str | None:
    """The fingerprint of the network a prior is over; None for a prior over a head alone."""
    return architecture_fingerprint(config.parameters, config.head_parameters)


def model_fingerprints(model: nn.Module) -> tuple[str, ...]:
    """What the fingerprint of a prior over this model would be: of its body, and under PEFT of its LoRA adapter too.

    Wrappers (DDP, torch.compile, PEFT) do not change it, and no weight is read: the meta device will do. A head that cannot be
    told from the body counts as body.
    """
    shapes, head = _shapes(model), _head(model)
    added = {name for name in shapes if _ADAPTER.search(name)} if active_adapters(model) else set()
    parts = [{n: s for n, s in shapes.items() if n not in added}, {n: s for n, s in shapes.items() if n in added}]
    found = [architecture_fingerprint(part, head) for part in parts]
    return tuple(dict.fromkeys(text for text in found if text))


def share_of_body(match: Match, model: nn.Module) -> float:
    """Share of the values of a model's body that are under a prior; of its LoRA adapter where the prior is over that."""
    outside, adapted = set(_head(model)), bool(active_adapters(model))
    parameters = {name: p.numel() for name, p in canonical_parameters(model).items() if name not in outside}
    covered = [name for name in match.pairs.values() if name in parameters]
    of_adapter = adapted and all(_ADAPTER.search(name) for name in covered)
    body = {n: size for n, size in parameters.items() if not adapted or bool(_ADAPTER.search(n)) == of_adapter}
    total = sum(body.values())
    return sum(body.get(name, 0) for name in covered) / total if total else 0.0


def _head(model: nn.Module) -> list[str]:
    try:
        return head_parameter_names(model)
    except PriorMatchError:
        return []


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape; of what timm's `features_only` takes apart under its name in the whole network."""
    flattened = flattened_parts(model)
    shapes = {}
    for name, parameter in canonical_parameters(model).items():
        part = next((whole for whole, here in flattened.items() if name.startswith(here)), None)
        whole = name if part is None else part + name.removeprefix(flattened[part])
        shapes[whole] = tuple(parameter.shape)
    return shapes


def base_model_names(model: nn.Module) -> list[str]:
    """Hub names that a model, or a part of it, says its weights are from; [] where it does not say.

    transformers keeps the name it loaded from in `config._name_or_path`, timm in `pretrained_cfg["hf_hub_id"]`.
    """
    found: list[Any] = []
    for module in model.modules():
        config, pretrained = getattr(module, "config", None), getattr(module, "pretrained_cfg", None)
        found.append(getattr(config, "_name_or_path", None))
        for known in (pretrained, getattr(config, "pretrained_cfg", None)):
            found.append(known.get("hf_hub_id") if isinstance(known, Mapping) else None)
    return list(dict.fromkeys(name for name in found if is_hub_name(name)))


def match_config(
    config: PriorConfig,
    model: nn.Module,
    *,
    name_map: NameMap | None = None,
    include_head: bool = False,
    on_mismatch: str = "error",
    min_coverage: float = 0.5,
) -> Match:
    """Which parameters of `model` a prior of this configuration is over; arguments, errors and warnings as `match_parameters`.

    A prior over a LoRA adapter is refused for a model without one, of another rank or scaling, or on other modules.
    """
    adapter = config.source.get("adapter")
    adapter = adapter if isinstance(adapter, Mapping) else None
    if name_map is None and on_mismatch == "error":
        refuse_other_adapter(config.parameters, adapter, model, head=config.head_parameters)
    match = match_parameters(
        config.parameters,
        model,
        head_parameters=config.head_parameters,
        tied_parameters=config.tied_parameters,
        model_type=config.model_type,
        name_map=name_map,
        include_head=include_head,
        on_mismatch=on_mismatch,
        min_coverage=min_coverage,
    )
    refuse_other_scaling(adapter, match, model)
    remarks = adapter_remarks(adapter, match, model)
    for remark in remarks:
        warnings.warn(remark, PriorWarning, stacklevel=2)
    return replace(match, remarks=(*match.remarks, *remarks)) if remarks else match
