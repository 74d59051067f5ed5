"""How the names of a prior meet the names of a model.

A prior knows parameters by the names of its source model; the model to fine-tune may hold the same network under another
prefix (`resnet.`, `timm_model.`, `backbone.`), inside wrappers (DDP, torch.compile, FSDP, PEFT), with some parameters
missing, frozen, new, or of another shape. Matching strips the wrappers, infers one (strip, add) prefix by votes weighted
with the number of values over pairs of the same suffix and shape, and says what it did in a report a person can read.
Everything that would bind by luck is an error that says what to pass.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from prior_hub.errors import PriorMatchError

__all__ = [
    "Match",
    "NameMap",
    "canonical_parameters",
    "head_parameter_names",
    "match_names",
    "match_parameters",
    "persistent_buffers",
    "tied_names",
]

NameMap = Mapping[str, str] | Sequence[tuple[str, str]] | Callable[[str], str | None]

_WRAPPER_PARTS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer"}
_PEFT_PREFIX = "base_model.model."
_HEAD_NAMES = (
    "fc",
    "classifier",
    "head",
    "heads",
    "linear",
    "score",
    "classification_head",
    "head_dist",
    "lm_head",
    "logits",
)
_AMBIGUOUS = 0.9  # a second prefix that explains this share of what the best one explains makes the choice a guess


# ---------------------------------------------------------------------------------------------------- names of a model


def canonical_parameters(model: nn.Module) -> dict[str, Tensor]:
    """name -> parameter, wrappers stripped from the names, tied weights once, in `named_parameters()` order.

    Strips DDP's `module.`, `torch.compile`'s, FSDP's and the checkpoint wrapper's parts, PEFT's `base_model.model.` and
    `.base_layer`; of a PEFT `modules_to_save` pair the trained copy is taken.

    Raises:
        PriorMatchError: two parameters get the same name.
    """
    return _canonical(model, dict(model.named_parameters()))


def _canonical(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    peft = any(hasattr(m, "peft_config") for m in _unwrapped_chain(model))
    wrapped = type(model).__name__ in ("DistributedDataParallel", "DataParallel")
    result: dict[str, Tensor] = {}
    for raw, tensor in tensors.items():
        name = _strip(raw, peft=peft, wrapped=wrapped)
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
    first = {id(tensor): name for name, tensor in canonical_parameters(model).items()}
    result = {}
    for raw, tensor in model.named_parameters(remove_duplicate=False):
        name = _strip_all(model, raw)
        canonical = first.get(id(tensor))
        if name is not None and canonical is not None and name != canonical:
            result[name] = canonical
    return result


def _strip_all(model: nn.Module, raw: str) -> str | None:
    peft = any(hasattr(m, "peft_config") for m in _unwrapped_chain(model))
    return _strip(raw, peft=peft, wrapped=type(model).__name__ in ("DistributedDataParallel", "DataParallel"))


def _unwrapped_chain(model: nn.Module) -> Iterable[nn.Module]:
    current: nn.Module | None = model
    while isinstance(current, nn.Module):
        yield current
        inner = current._modules.get("_orig_mod") or current._modules.get("module")
        current = inner if isinstance(inner, nn.Module) else None


def _strip(raw: str, *, peft: bool, wrapped: bool) -> str | None:
    parts = [part for part in raw.split(".") if part not in _WRAPPER_PARTS]
    if wrapped and parts[0] == "module":
        parts = parts[1:]
    name = ".".join(parts)
    if peft:
        name = name.removeprefix(_PEFT_PREFIX)
        if ".original_module." in name:
            return None
        name = re.sub(r"\.modules_to_save\.[^.]+\.", ".", name)
    return name


def head_parameter_names(model: nn.Module, head: str | Sequence[str] | None = "auto") -> list[str]:
    """Canonical names of the parameters of the task's head.

    Args:
        model: any model.
        head: "auto" asks the model: timm's `get_classifier()`, everything outside `base_model` or `backbone` of a
            transformers model, or a top-level module with one of the usual names (fc, classifier, head, ...). A sequence
            names modules or parameters; () or None says there is no head.

    Raises:
        PriorMatchError: "auto" finds nothing, or a given name does not exist. A head that goes unnoticed would bind to
            a same-shaped head for other classes, so this is never guessed.
    """
    inner = list(_unwrapped_chain(model))[-1]
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
    peft_inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner  # type: ignore[operator]
    ids = _head_ids(peft_inner)
    if ids is None:
        top = ", ".join(dict.fromkeys(n.split(".")[0] for n in names))
        raise PriorMatchError(
            f"cannot tell which part of {type(inner).__name__} is the source task's head. Pass head=('name',) with the "
            f"module that is replaced downstream (top-level modules: {top}), or head=() if the model has none."
        )
    return [name for name, tensor in names.items() if id(tensor) in ids]


def _head_ids(model: Any) -> set[int] | None:
    inner = model.timm_model if hasattr(model, "timm_model") else model
    if callable(getattr(inner, "get_classifier", None)):  # timm; a model built with num_classes=0 has an empty head
        heads = inner.get_classifier()
        modules = heads if isinstance(heads, (tuple, list)) else (heads,)
        return {id(p) for module in modules if isinstance(module, nn.Module) for p in module.parameters()}
    if hasattr(model, "base_model_prefix"):  # a transformers model
        body = getattr(model, "base_model", model)
        if body is model and isinstance(getattr(model, "backbone", None), nn.Module):
            body = model.backbone
        inside = {id(p) for p in body.parameters()} if isinstance(body, nn.Module) else set()
        return {id(p) for p in model.parameters() if id(p) not in inside}
    for name in _HEAD_NAMES:
        module = model._modules.get(name)
        if isinstance(module, nn.Module):
            return {id(p) for p in module.parameters()}
    return None


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
    mapped: bool = False

    def rename(self, name: str) -> str:
        """The name in the model of `name` of the source model, under the inferred prefix."""
        return self.add + name.removeprefix(self.strip)

    def report(self) -> str:
        """What a person wants to know, in one or a few lines."""
        total = len(self.pairs) + len(self.new)
        change = _describe_prefix(self.strip, self.add) if not self.mapped else ", names by name_map"
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
        return "; ".join(lines)

    def __str__(self) -> str:
        return self.report()


def match_parameters(
    prior: Mapping[str, Sequence[int]],
    model: nn.Module,
    *,
    head_parameters: Sequence[str] = (),
    tied_parameters: Mapping[str, str] | None = None,
    name_map: NameMap | None = None,
    include_head: bool = False,
    on_mismatch: str = "error",
    min_coverage: float = 0.5,
) -> Match:
    """Match a prior's names to a model; see `match_names` for the arguments and errors."""
    parameters = canonical_parameters(model)
    return match_names(
        prior,
        {name: tuple(p.shape) for name, p in parameters.items()},
        frozen=[name for name, p in parameters.items() if not p.requires_grad],
        aliases=tied_names(model),
        head_parameters=head_parameters,
        tied_parameters=tied_parameters,
        name_map=name_map,
        include_head=include_head,
        on_mismatch=on_mismatch,
        min_coverage=min_coverage,
    )


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
            matches the whole beginning of a name is applied with `re.sub`, or a callable from a prior name to a model
            name (None: leave out).
        include_head: bind the source task's head too (same classes on both sides).
        on_mismatch: "error" or "drop" for pairs whose shapes differ.
        min_coverage: share of the prior's values (its head aside) that must find a place.

    Raises:
        PriorMatchError: no or too few pairs, two prefixes that fit about as well, two names that map to one, or shapes
            that differ.
        ValueError: `on_mismatch` or `min_coverage` is out of range.
    """
    if on_mismatch not in ("error", "drop"):
        raise ValueError(f"on_mismatch is {on_mismatch!r}, expected 'error' or 'drop'.")
    if not 0 <= min_coverage <= 1:
        raise ValueError(f"min_coverage is {min_coverage}, expected a share between 0 and 1.")
    head = () if include_head else tuple(n for n in prior if n in set(head_parameters))
    body = {n: tuple(shape) for n, shape in prior.items() if n not in set(head)}
    if not body:
        raise PriorMatchError("the prior has no parameters beside the source task's head; pass include_head=True.")
    shapes = {name: tuple(shape) for name, shape in model.items()}
    known = {**shapes, **{alias: shapes[name] for alias, name in (aliases or {}).items()}}
    if name_map is None:
        strip, add = _infer_prefix(body, known, min_coverage)
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
    if not pairs or covered < min_coverage * total:
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
        mapped=name_map is not None,
    )


def _infer_prefix(
    prior: Mapping[str, tuple[int, ...]], model: Mapping[str, tuple[int, ...]], min_coverage: float
) -> tuple[str, str]:
    """The one (strip, add) that gives the most values a place of the same shape.

    Every pair of names with the same last part and shape proposes the prefixes left after their longest common suffix;
    a proposal's score is the number of values that find a same-shaped place under it.
    """
    by_tail: dict[tuple[str, tuple[int, ...]], list[str]] = defaultdict(list)
    for name, shape in model.items():
        by_tail[name.rsplit(".", 1)[-1], shape].append(name)
    proposals: Counter[tuple[str, str]] = Counter()
    for name, shape in prior.items():
        for other in by_tail.get((name.rsplit(".", 1)[-1], shape), ()):
            proposals[_prefixes(name, other)] += math.prod(shape)
    proposals[("", "")] += 0
    scores: list[tuple[int, tuple[str, str], frozenset[tuple[str, str]]]] = []
    for strip, add in sorted(proposals, key=lambda pair: (-proposals[pair], len(pair[0]) + len(pair[1]), pair))[:64]:
        hits = frozenset(
            (n, add + n.removeprefix(strip))
            for n, shape in prior.items()
            if n.startswith(strip) and model.get(add + n.removeprefix(strip)) == shape
        )
        scores.append((sum(math.prod(prior[n]) for n, _ in hits), (strip, add), hits))
    scores.sort(key=lambda item: (-item[0], len(item[1][0]) + len(item[1][1])))
    best, chosen, hits = scores[0]
    as_is = next(item for item in scores if item[1] == ("", "")) if any(s[1] == ("", "") for s in scores) else None
    if as_is is not None and as_is[0] == best:
        return as_is[1]  # the names as they are, which is also what load_state_dict would do
    if best < min_coverage * sum(math.prod(shape) for shape in prior.values()):
        return chosen  # too little to choose from: the caller says so
    for count, prefix, other_hits in scores[1:]:
        if best and count >= _AMBIGUOUS * best and other_hits != hits:
            raise PriorMatchError(
                f"the prior fits this model in more than one place: with {_describe_prefix(*chosen).lstrip(', ')} "
                f"({_count(best)} values) and with {_describe_prefix(*prefix).lstrip(', ')} ({_count(count)} values). "
                "Say which is meant: name_map={r'^" + re.escape(chosen[0]) + "': '" + chosen[1] + "'}."
            )
    return chosen


def _prefixes(name: str, other: str) -> tuple[str, str]:
    """What is left of two dotted names before their longest common dotted suffix, each "" or ending in a dot."""
    left, right = name.split("."), other.split(".")
    while left and right and left[-1] == right[-1]:
        left.pop()
        right.pop()
    return "".join(part + "." for part in left), "".join(part + "." for part in right)


def _apply_map(prior: Mapping[str, object], name_map: NameMap) -> dict[str, str]:
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
    lower = f", or min_coverage below {covered / max(total, 1):.2f} if so small a part is meant" if pairs else ""
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
