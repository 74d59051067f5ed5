"""How the names of a prior meet the names of a model.

A prior knows parameters by the names of its source model; the model to fine-tune may hold the same network under another
prefix (`resnet.`, `timm_model.`, `backbone.`), inside wrappers (DDP, torch.compile, FSDP, PEFT), with some parameters
missing, frozen, new, or of another shape. Matching strips the wrappers, infers one (strip, add) prefix by votes weighted
with the number of values over pairs of the same suffix and shape, and says what it did in a report a person can read.
Everything that would bind by luck is an error that says what to pass; what binds, but looks like the prior of another model, is
a warning.
"""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from prior_hub.errors import PriorMatchError, PriorWarning

__all__ = [
    "Match",
    "NameMap",
    "canonical_parameters",
    "declared_backbone",
    "head_by_name",
    "head_parameter_names",
    "match_names",
    "match_parameters",
    "persistent_buffers",
    "tied_names",
    "unwrapped",
    "without_head",
]

NameMap = Mapping[str, str] | Sequence[tuple[str, str]] | Callable[[str], str | None]

_WRAPPER_PARTS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_PEFT_PREFIX = "base_model.model."
_HEAD_NAMES = (
    *("fc", "classifier", "head", "heads", "linear", "score", "classification_head", "head_dist", "lm_head", "logits"),
    *("qa_outputs", "cls", "predictions", "decode_head", "class_predictor", "bbox_predictor", "mask_head"),
)
_INNER_HEAD_NAMES = ("class_embed", "bbox_embed", "enc_score_head", "enc_bbox_head", "class_labels_classifier")
_NUMBER = re.compile(r"\d+")
_MODEL_TYPE = re.compile(r"[a-z0-9][a-z0-9_.-]*")  # transformers'
_PART = re.compile(r"(backbone|encoder|decoder|_model|_tower)\.")  # a part that is a whole model elsewhere
_CANDIDATES = 64  # proposals that are scored
_MOST_PAIRS = 50_000  # pairs of names that propose
_AMBIGUOUS = 0.9  # a second prefix that explains this share of what the best one explains makes the choice a guess


# ---------------------------------------------------------------------------------------------------- names of a model


def canonical_parameters(model: nn.Module) -> dict[str, Tensor]:
    """name -> parameter, wrappers stripped from the names, tied weights once, in `named_parameters()` order.

    Strips DDP's `module.`, `torch.compile`'s, FSDP's and the checkpoint wrapper's parts, PEFT's `base_model.model.`,
    `.base_layer` and the name of the active adapter (`query.lora_A.weight`, as PEFT's own files have it; where several are
    active they keep their names). Adapters that are not active are left out; of a PEFT `modules_to_save` pair the trained copy
    is taken.

    Raises:
        PriorMatchError: two parameters get the same name.
    """
    return _canonical(model, dict(model.named_parameters()))


def _canonical(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    strip = _stripper(model)
    result: dict[str, Tensor] = {}
    for raw, tensor in tensors.items():
        name = strip(raw)
        if name is None:
            continue
        if name in result:
            raise PriorMatchError(f"two parameters of the model are called {name!r} once wrappers are stripped.")
        result[name] = tensor
    return result


def raw_names(model: nn.Module) -> dict[str, str]:
    """`named_parameters()` name -> canonical name."""
    by_id = {id(tensor): name for name, tensor in canonical_parameters(model).items()}
    return {raw: by_id[id(tensor)] for raw, tensor in model.named_parameters() if id(tensor) in by_id}


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Canonical name -> buffer, for the buffers that a state_dict holds (BatchNorm statistics)."""
    kept = {}
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                kept[f"{prefix}.{name}" if prefix else name] = buffer
    return _canonical(model, kept)


def tied_names(model: nn.Module) -> dict[str, str]:
    """Alias -> canonical name, for every further name of a shared parameter."""
    strip = _stripper(model)
    first = {id(tensor): name for name, tensor in canonical_parameters(model).items()}
    result = {}
    for raw, tensor in model.named_parameters(remove_duplicate=False):
        name = strip(raw)
        canonical = first.get(id(tensor))
        if name is not None and canonical is not None and name != canonical:
            result[name] = canonical
    return result


def flattened_parts(model: nn.Module) -> dict[str, str]:
    """Prefix as the whole network has it -> as timm's `features_only=True` has it: "stages.0." -> "stages_0.".

    timm takes the first level of Sequential containers apart in some networks (ConvNeXt, ByobNet), so that no one prefix leads
    from the names of the whole network to those of its features.
    """
    strip = _stripper(model)
    found = {}
    for raw, module in model.named_modules():
        if not {"FeatureListNet", "FeatureDictNet"} & {kind.__name__ for kind in type(module).__mro__}:
            continue
        for child, part in module.named_children():
            before, underscore, number = child.rpartition("_")
            if not (before and underscore and number.isdigit()):
                continue
            for name, _ in part.named_parameters():
                inside = strip(".".join(p for p in (raw, child, name) if p))
                if inside is not None and inside.endswith(f".{name}" if raw else f"{child}.{name}"):
                    actual = inside.removesuffix(name)
                    found[f"{actual.removesuffix(f'{child}.')}{before}.{number}."] = actual
                    break
    return found


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DDP, DataParallel, torch.compile and PEFT wrappers; the model itself without them."""
    inner: Any = _chain(model)[-1]
    base: Any = inner.get_base_model() if hasattr(inner, "peft_config") and hasattr(inner, "get_base_model") else inner
    return base if isinstance(base, nn.Module) else _chain(model)[-1]


def _chain(model: nn.Module) -> list[nn.Module]:
    """`model` and what is inside its DDP, DataParallel and torch.compile wrappers, outermost first."""
    chain = [model]
    while True:
        parts = chain[-1]._modules
        data_parallel = type(chain[-1]).__name__ in ("DistributedDataParallel", "DataParallel")
        inner = parts.get("module") if data_parallel else parts.get("_orig_mod")
        if inner is None:
            return chain
        chain.append(inner)


def active_adapters(model: nn.Module) -> tuple[str, ...]:
    """Names of the active PEFT adapters of a model, also inside DDP and torch.compile; () for a model without any."""
    peft = next((m for m in _chain(model) if hasattr(m, "peft_config")), None)
    active = getattr(peft, "active_adapters", None) or getattr(peft, "active_adapter", None) or ()
    return (active,) if isinstance(active, str) else tuple(active() if callable(active) else active)


def is_tuner_layer(module: nn.Module) -> bool:
    """Whether a module is one of PEFT's layers around a layer of the base model, told without importing PEFT."""
    return hasattr(type(module), "adapter_layer_names") and hasattr(type(module), "get_base_layer")


def _adapter_places(model: nn.Module) -> dict[str, str]:
    """Raw prefix of an adapter's part of a layer ("...query.lora_A.default") -> name of the adapter."""
    places: dict[str, str] = {}
    for raw, module in model.named_modules():
        if not is_tuner_layer(module):
            continue
        names: Any = module.adapter_layer_names
        for kind in names:
            container = getattr(module, str(kind), None)
            if isinstance(container, (nn.ModuleDict, nn.ParameterDict)):
                places |= {f"{raw}.{kind}.{adapter}" if raw else f"{kind}.{adapter}": adapter for adapter in container}
    return places


def _stripper(model: nn.Module) -> Callable[[str], str | None]:
    """The function from a raw name to a canonical one; None for PEFT's untrained copies and adapters that are not active."""
    chain = _chain(model)
    wrapped = any(type(m).__name__ in ("DistributedDataParallel", "DataParallel") for m in chain)
    peft = next((m for m in chain if hasattr(m, "peft_config")), None)
    adapters = set(active_adapters(model))
    places = {} if peft is None else _adapter_places(model)

    def strip(raw: str) -> str | None:
        if places:
            pieces = raw.split(".")
            at = next((i for i in range(len(pieces), 0, -1) if ".".join(pieces[:i]) in places), 0)
            if at and adapters and pieces[at - 1] not in adapters:
                return None
            if at and len(adapters) == 1:
                raw = ".".join(pieces[: at - 1] + pieces[at:])
        parts = [part for part in raw.split(".") if part not in _WRAPPER_PARTS]
        if wrapped and parts[0] == "module":
            parts = parts[1:]
        name = ".".join(parts)
        if peft is None:
            return name
        name = re.sub(r"\.base_layer(?=\.)", "", name.removeprefix(_PEFT_PREFIX))
        copy = re.search(r"\.modules_to_save\.([^.]+)\.", name)
        if ".original_module." in name or (copy and adapters and copy[1] not in adapters):
            return None
        return re.sub(r"\.modules_to_save\.[^.]+\.", ".", name)

    return strip


def without_head(names: Iterable[str], head: Iterable[str], body: Iterable[str]) -> list[str]:
    """Those of `names` (buffers) that are not the head's: their nearest module with parameters has some of the body's."""
    head_modules = {prefix for name in head for prefix in _module_prefixes(name)}
    body_modules = {prefix for name in body for prefix in _module_prefixes(name)}
    kept = []
    for name in names:
        nearest = next((p for p in _module_prefixes(name) if p in head_modules or p in body_modules), "")
        if nearest in body_modules or nearest not in head_modules:
            kept.append(name)
    return kept


def _module_prefixes(name: str) -> list[str]:
    """Modules a name lies in, nearest first: of a.b.c they are a.b, a, and the model itself."""
    parts = name.split(".")[:-1]
    return [".".join(parts[:i]) for i in range(len(parts), -1, -1)]


def head_parameter_names(model: nn.Module, head: str | Sequence[str] | None = "auto") -> list[str]:
    """Canonical names of the parameters of the task's head.

    Args:
        model: any model.
        head: "auto" asks the model: everything outside the module that it declares (`declared_backbone`), timm's
            `get_classifier()`, everything outside `base_model` or `backbone` of a transformers model, or a top-level module
            with one of the usual names (fc, classifier, head, ...); with PEFT also its `modules_to_save`. A sequence names
            modules or parameters; () or None says there is no head.

    Raises:
        PriorMatchError: "auto" finds nothing, or a given name does not exist. A head that goes unnoticed would bind to
            a same-shaped head for other classes, so this is never guessed.
    """
    inner = unwrapped(model)
    names = canonical_parameters(model)
    if head is None or (not isinstance(head, str) and not head):
        return []
    if head != "auto":
        wanted = [head] if isinstance(head, str) else list(head)
        found = [n for n in names if any(n == w or n.startswith(f"{w}.") for w in wanted)]
        unused = [w for w in wanted if not any(n == w or n.startswith(f"{w}.") for n in found)]
        if unused:
            raise PriorMatchError(f"head={unused[0]!r} names no parameter; the model has {', '.join(list(names)[-3:])}.")
        return found
    ids = _head_ids(inner)
    if ids is None:
        top = ", ".join(dict.fromkeys(n.split(".")[0] for n in names))
        raise PriorMatchError(
            f"cannot tell which part of {type(inner).__name__} is the source task's head. Pass head=('name',) with the "
            f"module that is replaced downstream (top-level modules: {top}), or head=() if the model has none."
        )
    if active_adapters(model):
        ids = ids | {id(p) for raw, p in model.named_parameters() if ".modules_to_save." in raw}
    return [name for name, tensor in names.items() if id(tensor) in ids]


def declared_backbone(model: nn.Module) -> str | None:
    """Path of the one module that a prior of this model is over, where the model declares it; None where it does not.

    A model of one's own (a self-supervised objective) declares it as `prior_backbone = "backbone"`, or "student.backbone". All
    else is its head, and a prior learned from it has the backbone's own names.

    Raises:
        PriorMatchError: the model has no such module, or it holds no parameters.
    """
    inner = unwrapped(model)
    name = getattr(inner, "prior_backbone", None)
    if name is None:
        return None
    module: nn.Module | None = None
    if isinstance(name, str) and name:
        with suppress(AttributeError):
            module = inner.get_submodule(name)
    if module is None or not any(True for _ in module.parameters()):
        parts = ", ".join(inner._modules)
        raise PriorMatchError(
            f"{type(inner).__name__}.prior_backbone is {name!r}, which names no module with parameters; the model has {parts}."
        )
    return str(name)


def head_by_name(names: Iterable[str], head: str | Sequence[str] | None = "auto") -> list[str]:
    """Those of `names` that are the head's where there are names and no model: "auto" goes by the first part of a name.

    Raises:
        PriorMatchError: a given head names nothing.
    """
    names = list(names)
    if head == "auto":
        return [name for name in names if name.split(".")[0] in _HEAD_NAMES]
    wanted = [] if head is None else [head] if isinstance(head, str) else list(head)
    unused = [w for w in wanted if not any(n == w or n.startswith(f"{w}.") for n in names)]
    if unused:
        raise PriorMatchError(f"head={unused[0]!r} names no parameter; there are {', '.join(names[-3:])}.")
    return [n for n in names if any(n == w or n.startswith(f"{w}.") for w in wanted)]


def _head_ids(model: Any) -> set[int] | None:
    backbone = declared_backbone(model)
    if backbone is not None:
        return {id(p) for p in model.parameters()} - {id(p) for p in model.get_submodule(backbone).parameters()}
    inner = model.timm_model if hasattr(model, "timm_model") else model
    if callable(getattr(inner, "get_classifier", None)):  # timm; a model built with num_classes=0 has an empty head
        heads = inner.get_classifier()
        modules = heads if isinstance(heads, (tuple, list)) else (heads,)
        return {id(p) for module in modules if isinstance(module, nn.Module) for p in module.parameters()}
    if hasattr(model, "base_model_prefix"):  # a transformers model
        body = getattr(model, "base_model", model)
        if body is model and isinstance(getattr(model, "backbone", None), nn.Module):
            body = model.backbone
        outside = {id(p) for p in model.parameters()} - {id(p) for p in body.parameters()}
        return outside if outside else _headless(model)
    return _named_heads(model, _HEAD_NAMES, model.named_children())


def _headless(model: Any) -> set[int] | None:
    """The head of a transformers model that keeps no parameter outside its base: none, a tied one, an inner one, or unknown."""
    name = type(model).__name__
    if re.search(r"(Model|Backbone|Encoder|Decoder)$", name) or getattr(model.config, "num_labels", None) == 0:
        return set()
    inner = _named_heads(model, _HEAD_NAMES, model.named_children())
    inner = inner or _named_heads(model, _INNER_HEAD_NAMES, model.named_modules())
    embeddings = [m for m in (_embeddings(model, "get_input_embeddings"), _embeddings(model, "get_output_embeddings")) if m]
    if len(embeddings) == 2 and embeddings[0].weight is embeddings[1].weight:
        return (inner or set()) - {id(embeddings[0].weight)}  # a language model: its head is its embedding
    return inner


def _embeddings(model: Any, getter: str) -> Any:
    try:
        found = getattr(model, getter)()
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(getattr(found, "weight", None), Tensor) else None


def _named_heads(model: nn.Module, names: Sequence[str], modules: Iterable[tuple[str, nn.Module]]) -> set[int] | None:
    """The parameters of all modules with a usual name, auxiliary heads too; None if there is no such module."""
    found = {name: module for name, module in modules if name.rsplit(".", 1)[-1] in names}
    ids = {id(p) for module in found.values() for p in module.parameters()}
    if not ids:
        return None
    auxiliary = [m for name, m in model.named_children() if name.lower().startswith("aux")]
    return ids | {id(p) for module in auxiliary for p in module.parameters()}


# ------------------------------------------------------------------------------------------------------------ matching


@dataclass(frozen=True)
class Match:
    """Which parameter of the model each parameter of the prior is, and what is left over on both sides.

    Attributes:
        pairs: prior name -> model name.
        strip: prefix taken off the prior's names.
        add: prefix put before them.
        marginalised: prior names the model does not have; their rows are dropped.
        excluded_head: prior names of the source task's head, never bound by default.
        dropped: prior name -> model name of pairs whose shapes differ, with on_mismatch="drop".
        frozen: model names under the prior that are not trained; the prior is conditioned on them.
        new: model names the prior does not know.
        new_frozen: those of them that are not trained.
        remarks: why this may be the prior of another model; given as warnings too.
        flattened: prefixes as the whole network has them -> as timm's `features_only` has them.
    """

    pairs: Mapping[str, str]
    strip: str = ""
    add: str = ""
    marginalised: tuple[str, ...] = ()
    excluded_head: tuple[str, ...] = ()
    dropped: Mapping[str, str] = field(default_factory=dict)
    frozen: tuple[str, ...] = ()
    new: tuple[str, ...] = ()
    new_frozen: tuple[str, ...] = ()
    covered_values: int = 0
    model_values: int = 0
    remarks: tuple[str, ...] = ()
    name_map: NameMap | None = field(default=None, compare=False)
    flattened: Mapping[str, str] = field(default_factory=dict)

    def rename(self, name: str) -> str | None:
        """The name in the model of any name of the source model, a buffer's for example; None if it has none."""
        if self.name_map is not None:
            return _apply_map([name], self.name_map).get(name)
        if not name.startswith(self.strip):
            return None
        place = self.add + name.removeprefix(self.strip)
        part = next((p for p in self.flattened if place.startswith(p)), None)
        return place if part is None else self.flattened[part] + place.removeprefix(part)

    def report(self) -> str:
        """What a person wants to know, in one or a few lines."""
        total = len(self.pairs) + len(self.new)
        change = _describe_prefix(self.strip, self.add) if self.name_map is None else ", names by name_map"
        lines = [
            f"{len(self.pairs)} of {total} parameters under the prior "
            f"({_count(self.covered_values)} of {_count(self.model_values)} values){change}"
        ]
        for what, names in (
            ("new", self.new),
            ("frozen (conditioned on)", self.frozen),
            ("in the prior, not in the model (marginalised)", self.marginalised),
            ("source task's head (excluded)", self.excluded_head),
            ("other shape (dropped)", tuple(self.dropped.values())),
        ):
            if names:
                shown = ", ".join(names[:4]) + (f", ... ({len(names)} in all)" if len(names) > 4 else "")
                lines.append(f"{what}: {shown}")
        lines += [f"warning: {remark.rstrip('.')}" for remark in self.remarks]
        return "; ".join(lines)

    def __str__(self) -> str:
        return self.report()


def match_parameters(
    prior: Mapping[str, Sequence[int]],
    model: nn.Module,
    *,
    head_parameters: Sequence[str] = (),
    tied_parameters: Mapping[str, str] | None = None,
    model_type: str | None = None,
    name_map: NameMap | None = None,
    include_head: bool = False,
    on_mismatch: str = "error",
    min_coverage: float = 0.5,
) -> Match:
    """Match a prior's names to a model; see `match_names` for the other arguments and errors.

    Warns (`PriorWarning`, and in the report) where the names fit and the architecture seems to be another: a deeper model of
    the same family, whose further layers look like those under the prior, or another type of model.

    Args:
        prior: name -> shape in the prior.
        model: any model; its weights are not read.
        head_parameters: as `match_names`.
        tied_parameters: as `match_names`.
        model_type: type of the source model as the prior records it.
        name_map: as `match_names`.
        include_head: as `match_names`.
        on_mismatch: as `match_names`.
        min_coverage: as `match_names`.
    """
    parameters = canonical_parameters(model)
    flattened = flattened_parts(model)
    whole = {part + n.removeprefix(here): n for part, here in flattened.items() for n in parameters if n.startswith(here)}
    match = match_names(
        prior,
        {name: tuple(p.shape) for name, p in parameters.items()},
        frozen=[name for name, p in parameters.items() if not p.requires_grad],
        aliases={name: n for name, n in whole.items() if name not in parameters} | tied_names(model),
        head_parameters=head_parameters,
        tied_parameters=tied_parameters,
        name_map=name_map,
        include_head=include_head,
        on_mismatch=on_mismatch,
        min_coverage=min_coverage,
    )
    remarks = [*_siblings(match, model, parameters, head_parameters), *_other_type(match, model, model_type)]
    for remark in remarks:
        warnings.warn(remark, PriorWarning, stacklevel=2)
    return replace(match, remarks=tuple(remarks), flattened=flattened)


def _siblings(match: Match, model: nn.Module, parameters: Mapping[str, Tensor], head: Iterable[str]) -> list[str]:
    """Remark on trained parameters without a prior that one number in the name, not the shape, tells from bound ones.

    A ResNet-101 has every name and shape of a ResNet-50, and so its prior binds. Left aside are heads, what the user left out
    with a `name_map` or dropped, and copies of the whole network (numbers before the part of the name that is the prior's).
    """
    if match.name_map is not None and match.marginalised:
        return []
    bound: dict[tuple[str, str, tuple[int, ...]], str] = {}
    for name, target in match.pairs.items():
        _, add = _prefixes(name, target)
        for pattern in _patterns(target.removeprefix(add)):
            bound.setdefault((add, pattern, tuple(parameters[target].shape)), target)
    prefixes = sorted({add for add, _, _ in bound})
    aside = {*match.new_frozen, *match.dropped.values(), *(match.rename(name) for name in head)}
    found: dict[str, str] = {}
    for name in match.new:
        shape = tuple(parameters[name].shape)
        keys = [(p, pattern, shape) for p in prefixes if name.startswith(p) for pattern in _patterns(name.removeprefix(p))]
        like = next((bound[key] for key in keys if key in bound), None)
        if like is not None and name not in aside:
            found[name] = like
    if found:
        try:
            own_head = set(head_parameter_names(model))
        except PriorMatchError:  # it cannot be told; the recorded one is left aside all the same
            own_head = set()
        found = {name: like for name, like in found.items() if name not in own_head}
    if not found:
        return []
    shown = ", ".join(f"{name!r} like {like!r}" for name, like in list(found.items())[:2])
    return [
        f"{len(found)} of the model's {len(parameters)} parameters have no place in the prior, and look like some that have "
        f"({shown}{', ...' if len(found) > 2 else ''}): this is probably the prior of a smaller model of the same family, "
        "whose mean means nothing in this one (or it was learned with a part of the model frozen). Use a prior learned with "
        "this architecture."
    ]


def _patterns(name: str) -> list[str]:
    """The name with one of its numbers left open, for each of them."""
    return [f"{name[: number.start()]}#{name[number.end() :]}" for number in _NUMBER.finditer(name)]


def _other_type(match: Match, model: nn.Module, source: str | None) -> list[str]:
    """Remark on a transformers model of another type than the source model.

    Types are as in `config.model_type`; a class name, which a prior records of other models, begins with a capital letter and
    is not compared. Any part of the model may be of the source's type (a backbone), the prior may be of such a part itself, and
    types of one family begin alike (clip, clip_vision_model).
    """
    if not source or not _MODEL_TYPE.fullmatch(source) or _PART.search(match.strip):
        return []
    types = _model_types(model)
    if not types or any(a == b or a.startswith((f"{b}_", f"{b}-")) for t in types for a, b in ((t, source), (source, t))):
        return []
    return [
        f"the prior is of a model of type {source!r}, this one is {' with '.join(map(repr, types))}: names and shapes fit, the "
        "weights may mean something else. Use a prior learned with this architecture."
    ]


def _model_types(model: nn.Module) -> list[str]:
    """Types of the transformers models in a model, its own first."""
    configs = [config for module in model.modules() if (config := getattr(module, "config", None)) is not None]
    inner = [value for config in configs for value in getattr(config, "__dict__", {}).values()]  # backbone_config and the like
    found = [getattr(config, "model_type", None) for config in [*configs, *inner]]
    return list(dict.fromkeys(t for t in found if isinstance(t, str) and _MODEL_TYPE.fullmatch(t)))


def match_names(
    prior: Mapping[str, Sequence[int]],
    model: Mapping[str, Sequence[int]],
    *,
    frozen: Iterable[str] = (),
    aliases: Mapping[str, str] | None = None,
    head_parameters: Sequence[str] = (),
    tied_parameters: Mapping[str, str] | None = None,
    name_map: NameMap | None = None,
    include_head: bool = False,
    on_mismatch: str = "error",
    min_coverage: float = 0.5,
) -> Match:
    """Match names and shapes; reads no weights.

    Args:
        prior: name -> shape in the prior.
        model: canonical name -> shape in the model.
        frozen: model names that are not trained.
        aliases: alias -> canonical name of the model's tied weights; a prior's name may be either.
        head_parameters: the source task's head as the prior records it; never bound unless `include_head`.
        tied_parameters: alias -> name in the prior, of the source model's tied weights.
        name_map: instead of an inferred prefix: {regular expression: replacement} rules, of which the first that
            matches at the beginning of a name is applied once with `re.sub`, or a callable from a prior name to a model
            name (None: leave out). A name that no rule matches is left out: end with {"^": ""} to keep the others as they are.
        include_head: bind the source task's head too (same classes on both sides).
        on_mismatch: "error" or "drop" for pairs whose shapes differ.
        min_coverage: share of the prior's parameters, and of their values, that must find a place (its head aside). One large
            embedding of another architecture is not enough.

    Raises:
        PriorMatchError: no or too few pairs, two prefixes that fit about as well, two names that map to one, or shapes
            that differ.
        ValueError: `on_mismatch` or `min_coverage` is out of range.
    """
    if on_mismatch not in ("error", "drop"):
        raise ValueError(f"on_mismatch is {on_mismatch!r}, expected 'error' or 'drop'.")
    if not 0 <= min_coverage <= 1:
        raise ValueError(f"min_coverage is {min_coverage}, expected a share between 0 and 1.")
    if include_head and head_parameters and not set(head_parameters) & set(prior):
        raise PriorMatchError(
            f"include_head=True, but this prior does not hold the source task's head ({head_parameters[0]!r}, ...): it was "
            "left out when the prior was learned."
        )
    head = () if include_head else tuple(n for n in prior if n in set(head_parameters))
    body = {n: tuple(shape) for n, shape in prior.items() if n not in set(head)}
    if not body:
        raise PriorMatchError("the prior has no parameters beside the source task's head; pass include_head=True.")
    shapes = {name: tuple(shape) for name, shape in model.items()}
    known = {**shapes, **{alias: shapes[name] for alias, name in (aliases or {}).items()}}
    if name_map is None:
        strip, add = _infer_prefix(body, known, aliases or {}, min_coverage)
        targets = {n: add + n.removeprefix(strip) for n in body if n.startswith(strip)}
    else:
        strip = add = ""
        targets = _apply_map(body, name_map)
    also = defaultdict(list)
    for alias, name in (tied_parameters or {}).items():
        also[name].append(alias)
    pairs: dict[str, str] = {}
    dropped: dict[str, str] = {}
    for name, shape in body.items():
        candidates = [targets[name]] if name in targets else []
        if name_map is None:
            candidates += [add + alias.removeprefix(strip) for alias in also[name] if alias.startswith(strip)]
        target = next((c for c in candidates if c in known), None)
        if target is None:
            if name_map is not None and name in targets:
                raise PriorMatchError(f"name_map sends {name!r} to {targets[name]!r}, which the model does not have.")
            continue
        target = (aliases or {}).get(target, target)
        if shapes[target] != shape:
            dropped[name] = target
        else:
            pairs[name] = target
    _refuse_collisions(pairs)
    if dropped and on_mismatch == "error":
        name, target = next(iter(dropped.items()))
        raise PriorMatchError(
            f"{len(dropped)} parameters differ in shape, the first is {name!r}: {list(body[name])} in the prior, "
            f"{list(shapes[target])} as {target!r} in the model. Pass on_mismatch='drop' to leave them out of the prior."
        )
    covered = sum(math.prod(shapes[t]) for t in pairs.values())
    total = sum(math.prod(shape) for shape in body.values())
    if not pairs or covered < min_coverage * total or len(pairs) < min_coverage * len(body):
        raise PriorMatchError(_coverage_message(body, shapes, pairs, covered, total, min_coverage))
    bound = set(pairs.values())
    frozen_set = set(frozen)
    new = [n for n in shapes if n not in bound]
    return Match(
        pairs=pairs,
        strip=strip,
        add=add,
        marginalised=tuple(n for n in body if n not in pairs and n not in dropped),
        excluded_head=head,
        dropped=dropped,
        frozen=tuple(n for n in shapes if n in bound and n in frozen_set),
        new=tuple(new),
        new_frozen=tuple(n for n in new if n in frozen_set),
        covered_values=covered,
        model_values=sum(math.prod(shape) for shape in shapes.values()),
        name_map=name_map,
    )


def _infer_prefix(
    prior: Mapping[str, tuple[int, ...]],
    model: Mapping[str, tuple[int, ...]],
    aliases: Mapping[str, str],
    min_coverage: float,
) -> tuple[str, str]:
    """The one (strip, add) that gives the most values a place of the same shape.

    A pair of names with the same last part and shape proposes the prefixes left after their longest common suffix; a
    proposal's score is the number of values that find a same-shaped place under it. Names that share their shape with few
    others are asked first, and where thousands are alike (the experts of a mixture) only some.
    """
    proposals = _proposals(prior, model)
    scores: list[tuple[int, tuple[str, str], frozenset[tuple[str, str]]]] = []
    for strip, add in sorted(proposals, key=lambda pair: (-proposals[pair], len(pair[0]) + len(pair[1]), pair))[:_CANDIDATES]:
        places = {n: add + n.removeprefix(strip) for n in prior if n.startswith(strip)}
        hits = {n: aliases.get(place, place) for n, place in places.items() if model.get(place) == prior[n]}
        scores.append((sum(math.prod(prior[n]) for n in hits), (strip, add), frozenset(hits.items())))
    scores.sort(key=lambda item: (-item[0], len(item[1][0]) + len(item[1][1])))
    best, chosen, hits_of_best = scores[0]
    if any(prefix == ("", "") and count == best for count, prefix, _ in scores):
        return "", ""  # the names as they are, which is also what load_state_dict would do
    if best < min_coverage * sum(math.prod(shape) for shape in prior.values()):
        return chosen  # too little to choose from: the caller says so
    for count, prefix, hits_of_other in scores[1:]:
        if best and count >= _AMBIGUOUS * best and hits_of_other != hits_of_best:
            raise PriorMatchError(
                f"the prior fits this model in more than one place: with {_describe_prefix(*chosen).lstrip(', ')} "
                f"({_count(best)} values) and with {_describe_prefix(*prefix).lstrip(', ')} ({_count(count)} values). "
                "Say which is meant: name_map={r'^" + re.escape(chosen[0]) + "': '" + chosen[1] + "'}."
            )
    return chosen


def _proposals(prior: Mapping[str, tuple[int, ...]], model: Mapping[str, tuple[int, ...]]) -> Counter[tuple[str, str]]:
    """(strip, add) -> number of values of the pairs that propose it."""
    left: dict[tuple[str, tuple[int, ...]], list[str]] = defaultdict(list)
    right: dict[tuple[str, tuple[int, ...]], list[str]] = defaultdict(list)
    for names, groups in ((prior, left), (model, right)):
        for name, shape in names.items():
            groups[name.rsplit(".", 1)[-1], shape].append(name)
    proposals: Counter[tuple[str, str]] = Counter({("", ""): 0})
    pairs = 0
    for key in sorted(left.keys() & right.keys(), key=lambda k: len(left[k]) * len(right[k])):
        some = left[key][: max(1, _MOST_PAIRS // len(right[key]))]
        if pairs > _MOST_PAIRS:
            break
        for name in some:
            for other in right[key]:
                proposals[_prefixes(name, other)] += math.prod(key[1])
        pairs += len(some) * len(right[key])
    return proposals


def _prefixes(name: str, other: str) -> tuple[str, str]:
    """What is left of two dotted names before their longest common dotted suffix, each "" or ending in a dot."""
    left, right = name.split("."), other.split(".")
    while left and right and left[-1] == right[-1]:
        left.pop()
        right.pop()
    return "".join(part + "." for part in left), "".join(part + "." for part in right)


def _apply_map(prior: Iterable[str], name_map: NameMap) -> dict[str, str]:
    if callable(name_map):
        return {name: target for name in prior if (target := name_map(name)) is not None}
    rules = list(name_map.items()) if isinstance(name_map, Mapping) else list(name_map)
    targets = {}
    for name in prior:
        for pattern, replacement in rules:
            if re.match(pattern, name):
                targets[name] = re.sub(pattern, replacement, name, count=1)
                break
    return targets


def _refuse_collisions(pairs: Mapping[str, str]) -> None:
    counts = Counter(pairs.values())
    twice = [target for target, count in counts.items() if count > 1]
    if twice:
        names = [name for name, target in pairs.items() if target == twice[0]]
        raise PriorMatchError(f"{' and '.join(map(repr, names))} of the prior both map to {twice[0]!r} of the model.")


def _coverage_message(
    prior: Mapping[str, tuple[int, ...]],
    model: Mapping[str, tuple[int, ...]],
    pairs: Mapping[str, str],
    covered: int,
    total: int,
    wanted: float,
) -> str:
    first, second = next(iter(prior)), next(iter(model), "nothing")
    found = f"only {len(pairs)} of {len(prior)}" if pairs else f"none of the {len(prior)}"
    same = set(prior.values()) & set(model.values())
    hint = (
        "pass name_map with rules from the prior's names to the model's"
        if len(same) > len(set(prior.values())) / 2
        else "the shapes differ too: this is probably a prior for another architecture"
    )
    share = min(covered / max(total, 1), len(pairs) / len(prior))
    lower = f", or min_coverage of {math.floor(share * 100) / 100:.2f} or less if so small a part is meant" if pairs else ""
    return (
        f"{found} parameters of the prior ({covered} of {total} values, min_coverage={wanted}) have a place in the model. "
        f"The prior has names like {first!r}, the model like {second!r}: {hint}{lower}."
    )


def _describe_prefix(strip: str, add: str) -> str:
    if strip and add:
        return f", prefix {strip!r} replaced by {add!r}"
    if strip:
        return f", prefix {strip!r} stripped"
    return f", prefix {add!r} added" if add else ", names as they are"


def _count(values: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if values >= size:
            return f"{values / size:.1f} {unit}"
    return str(values)
