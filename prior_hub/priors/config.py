"""The schema of `prior_config.json`, format 1.0: everything about a prior except its numbers.

Reading is strict about what decides a number (ranks, weights, shapes, types, hashes) and tolerant about what does not:
an unknown key is kept out, warned about and named. A newer minor version warns, a newer major version is refused.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import reprlib
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from prior_hub.errors import PriorFormatError, PriorWarning

__all__ = ["CONFIG_NAME", "FORMAT_VERSION", "PriorConfig", "parse_json"]

FORMAT_VERSION = "1.0"
CONFIG_NAME = "prior_config.json"
FAMILY = "low_rank_gaussian"
MAX_CONFIG_BYTES = 64 * 2**20
_MAX_PARSED_BYTES = 112 * 2**20  # of memory; a configuration of 100,000 parameters takes about half of it
WEIGHTS_PATTERN = re.compile(r"prior\.safetensors|prior-([0-9]{5})-of-([0-9]{5})\.safetensors")
_HUB_NAME = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_HUB_ID = re.compile(rf"(?!.*(?:--|\.\.)){_HUB_NAME}(?:/{_HUB_NAME})?")
MEAN_DTYPES = ("float32", "float64")
DEVIATION_DTYPES = ("float32", "float64", "bfloat16", "float16")
_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
_MAX_ENTRIES = 2**53  # entries a shape may declare; beyond it products are no longer exact in JSON readers
_SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, which no file can hold
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 120
_REPR.maxlist = _REPR.maxtuple = 8
_MAX_NAME = 1024  # characters; names of parameters have some 60
_MAX_COUNT = 2**31  # of snapshots and deviations
_MAX_DEPTH = 100  # levels of nesting; what is read must not exhaust the stack when it is written or described


@dataclass(frozen=True, kw_only=True)
class PriorConfig:
    """What a prior is and where it comes from.

    Attributes:
        parameters: name -> shape of every parameter under the prior, in stored order.
        rank: K, the number of deviation rows.
        scale: multiplies variances and deviations (not eps).
        diagonal_weight: a in Sigma = scale (a diag(variance) + b D^T D) + eps I.
        low_rank_weight: b in the same formula.
        eps: added to the diagonal after scaling.
        variance_floor: variances below it were raised to it when the prior was made.
        num_snapshots: number of weight vectors the moments were taken over; None where there were none.
        dtype: storage type of "mean", "variance" and "deviations".
        head_parameters: names of the source task's head, which never bind to a model by default.
        buffers: names of stored buffers (BatchNorm statistics).
        tied_parameters: alias -> name in `parameters`, for weights the source model shares.
        base_model: Hub name of the model whose weights the prior is over.
        base_model_revision: its commit.
        model_type: `config.model_type` or the class name of the source model.
        source: the source task: "objective", "dataset", "dataset_license", and whatever else describes it.
        estimator: "name" and the arguments it ran with, "batch_norm" among them.
        license: Hub licence identifier of the prior.
        libraries: versions of the libraries the prior was made with.
        weight_files: file name -> sha256 of every weight file; filled in by the writer.
    """

    parameters: Mapping[str, tuple[int, ...]]
    rank: int
    scale: float = 1.0
    diagonal_weight: float
    low_rank_weight: float
    eps: float = 0.0
    variance_floor: float = 0.0
    num_snapshots: int | None = None
    dtype: Mapping[str, str] = field(
        default_factory=lambda: {"mean": "float32", "variance": "float32", "deviations": "float32"}
    )
    head_parameters: tuple[str, ...] = ()
    buffers: tuple[str, ...] = ()
    tied_parameters: Mapping[str, str] = field(default_factory=dict)
    base_model: str | None = None
    base_model_revision: str | None = None
    model_type: str | None = None
    source: Mapping[str, Any] = field(default_factory=dict)
    estimator: Mapping[str, Any] = field(default_factory=dict)
    license: str | None = None
    libraries: Mapping[str, str] = field(default_factory=dict)
    weight_files: Mapping[str, str] = field(default_factory=dict)
    family: str = FAMILY
    format_version: str = FORMAT_VERSION
    prior_hub_version: str | None = None

    def __post_init__(self) -> None:
        if self.family != FAMILY:
            raise PriorFormatError(f"family is {_short(self.family)}; this version knows {FAMILY!r} only.")
        for name in ("scale", "diagonal_weight", "low_rank_weight", "eps", "variance_floor"):
            value = getattr(self, name)
            if not _is_finite(value) or value < 0 or (name == "scale" and value == 0):
                wanted = "> 0" if name == "scale" else ">= 0"
                raise PriorFormatError(f"{name} is {_short(value)}, expected a finite number {wanted}.")
            object.__setattr__(self, name, float(value))
        for name, weight in (("diagonal_weight", self.diagonal_weight), ("low_rank_weight", self.low_rank_weight)):
            if not math.isfinite(self.scale * weight):
                raise PriorFormatError(f"scale {self.scale:g} x {name} {weight:g} is beyond the largest number there is.")
        if not _is_int(self.rank) or not 0 <= self.rank < _MAX_COUNT:
            raise PriorFormatError(f"rank is {_short(self.rank)}, expected an integer >= 0 and below {_MAX_COUNT}.")
        if self.num_snapshots is not None and (not _is_int(self.num_snapshots) or not 0 <= self.num_snapshots < _MAX_COUNT):
            raise PriorFormatError(
                f"num_snapshots is {_short(self.num_snapshots)}, expected an integer >= 0 and below {_MAX_COUNT}, or null."
            )
        object.__setattr__(self, "parameters", _checked_shapes(self.parameters))
        _check_dtypes(self.dtype)
        for name in ("head_parameters", "buffers"):
            object.__setattr__(self, name, _checked_names(name, getattr(self, name)))
        for alias, target in self.tied_parameters.items():
            if not _is_name(alias) or not _is_name(target) or target not in self.parameters:
                raise PriorFormatError(
                    f"tied_parameters maps {_short(alias)} to {_short(target)}, expected a name and one of the parameters."
                )
            if alias in self.parameters:
                raise PriorFormatError(f"tied_parameters maps {_short(alias)} to another name, but it is a parameter itself.")
        for file, digest in self.weight_files.items():
            check_weight_file_name(file)
            if not isinstance(digest, str) or not re.fullmatch(r"[0-9a-f]{64}", digest):
                raise PriorFormatError(f"weight_files gives {file!r} the hash {_short(digest)}, expected 64 hex digits.")
        _check_weight_files(self.weight_files)
        most = (3 if self.rank else 2) * len(self.parameters) + len(self.buffers)
        if len(self.weight_files) > max(1, most):
            raise PriorFormatError(f"weight_files names {len(self.weight_files)} files for {most} tensors.")

    @property
    def num_parameters(self) -> int:
        """P, the number of values under the prior."""
        return sum(math.prod(shape) for shape in self.parameters.values())

    @property
    def stored_bytes(self) -> dict[str, int]:
        """Bytes of "mean", "variance" and "deviations" as they are stored; buffers and file headers aside."""
        copies = {"mean": 1, "variance": 1, "deviations": self.rank}
        return {kind: self.num_parameters * count * _BYTES[self.dtype[kind]] for kind, count in copies.items()}

    def replace(self, **changes: Any) -> PriorConfig:
        """A checked copy with `changes`."""
        return dataclasses.replace(self, **changes)

    def to_json(self) -> str:
        """The text of prior_config.json: indented, keys in schema order, newline at the end."""
        order = ["format_version", "prior_hub_version", "family", "rank", "scale", "diagonal_weight", "low_rank_weight"]
        order += ["eps", "variance_floor", "num_snapshots", "num_parameters", "dtype", "base_model"]
        order += ["base_model_revision", "model_type", "license", "source", "estimator", "libraries", "weight_files"]
        order += ["head_parameters", "buffers", "tied_parameters", "parameters"]
        try:
            values = dataclasses.asdict(self) | {"num_parameters": self.num_parameters}
            text = json.dumps({key: values[key] for key in order}, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
            parse_json(text.encode("utf-8"), where="it")  # what is written can be read: keys once, depth, size, Unicode
        except (TypeError, ValueError, RecursionError) as error:
            raise PriorFormatError(
                f"source or estimator holds a value JSON cannot: {error}. Use strings, numbers, lists and dictionaries."
            ) from error
        return text

    @classmethod
    def from_json(cls, text: str | bytes, *, where: str = CONFIG_NAME) -> PriorConfig:
        """Parse and check the text of a prior_config.json; `where` names it in errors.

        Raises:
            PriorFormatError: not JSON, not a prior's configuration, inconsistent, or of a newer major version.
        """
        raw = parse_json(text, where=where)
        if not isinstance(raw, dict) or "format_version" not in raw:
            raise PriorFormatError(f"{where} is no prior configuration: it has no 'format_version'.")
        _check_version(raw["format_version"], where)
        known = {f.name for f in dataclasses.fields(cls)} | {"num_parameters"}
        unknown = sorted(raw.keys() - known)
        if unknown:
            warnings.warn(
                f"{where} has keys this version of prior_hub does not know, and ignores: {_listed(unknown)} "
                f"(format {raw['format_version']}, this is {FORMAT_VERSION}). Upgrade prior_hub if they matter.",
                PriorWarning,
                stacklevel=2,
            )
        declared = raw.get("num_parameters")
        values = {key: value for key, value in raw.items() if key in known and key != "num_parameters"}
        missing = sorted({"parameters", "rank", "diagonal_weight", "low_rank_weight"} - values.keys())
        if missing:
            raise PriorFormatError(f"{where} lacks {', '.join(missing)}.")
        for key, kind in _TYPES.items():
            if key in values and not isinstance(values[key], kind):
                raise PriorFormatError(f"{where}: {key} is {type(values[key]).__name__}, expected {_type_name(kind)}.")
        try:
            config = cls(**values)
        except PriorFormatError as error:
            raise PriorFormatError(f"{where}: {error}") from error
        if declared is not None and declared != config.num_parameters:
            raise PriorFormatError(
                f"{where}: num_parameters is {_short(declared)}, but the shapes under 'parameters' make "
                f"{config.num_parameters}."
            )
        return config


_COSTS = {"[": 88, "{": 240, ":": 190, ",": 32, '"': 32}  # bytes of memory per character, by what Python makes of it
_OPEN: dict[type, Any] = {str: "[", bytes: b"["}


def parsed_bytes(text: str | bytes) -> int:
    """At most so many bytes of memory are taken while this JSON is read, beside the text itself; nothing is parsed.

    A list of empty lists takes 25 times its length: what is small on the disk may be too much to look at.
    """
    if isinstance(text, str):
        width = 1 if text.isascii() else 4
        return sum(cost * text.count(sign) for sign, cost in _COSTS.items()) + 2 * width * len(text)
    wide = any(bytes([lead]) in text for lead in range(0xF0, 0xF8))  # the first byte of a character that takes four
    width = 1 if text.isascii() else 4 if wide else 2
    return sum(cost * text.count(sign.encode()) for sign, cost in _COSTS.items()) + 2 * width * len(text)


def parse_json(text: str | bytes, *, where: str, bounded: bool = True) -> Any:
    """Strict JSON: UTF-8, no duplicate keys, no NaN or Infinity, bounded size, depth and memory.

    Args:
        text: what was read.
        where: names it in errors.
        bounded: refuse what would take more than 112 MB; False where the caller has held it to what it must hold.

    Raises:
        PriorFormatError: anything else.
    """
    if len(text) > MAX_CONFIG_BYTES:
        raise PriorFormatError(f"{where} has {len(text)} bytes, more than the {MAX_CONFIG_BYTES} a prior's may have.")
    if bounded and (needed := parsed_bytes(text)) > _MAX_PARSED_BYTES:
        raise PriorFormatError(
            f"{where} would take up to {needed // 2**20} MB of memory to read ({len(text)} bytes, "
            f"{text.count(_OPEN[type(text)])} lists), more than the {_MAX_PARSED_BYTES // 2**20} MB a prior's may: no honest "
            "one is so full of small things."
        )

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            twice = sorted(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            raise PriorFormatError(f"{where} gives {_listed(twice)} more than once.")
        return result

    def no_constant(name: str) -> Any:
        raise PriorFormatError(f"{where} contains {_short(name)[1:-1]}, which is no finite number.")

    def finite(number: str) -> float:
        value = float(number)
        return value if math.isfinite(value) else no_constant(number)

    try:
        decoded = text.decode("utf-8") if isinstance(text, bytes) else text
        value = json.loads(decoded, object_pairs_hook=unique, parse_constant=no_constant, parse_float=finite)
    except PriorFormatError:
        raise
    except (RecursionError, MemoryError):
        raise PriorFormatError(f"{where} is nested more than {_MAX_DEPTH} deep, no prior's configuration is.") from None
    except ValueError as error:
        raise PriorFormatError(f"{where} is not valid JSON ({error}); it may be truncated: fetch it again.") from error
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(_MAX_DEPTH):
        level = [inner for item in level for inner in _items(item) if isinstance(inner, (dict, list))]
        if not level:
            return value
    raise PriorFormatError(f"{where} is nested more than {_MAX_DEPTH} deep, no prior's configuration is.")


def _items(value: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def is_hub_name(name: Any) -> bool:
    """Whether `name` could be the name of a repository on the Hub ("organisation/name", or an old "name")."""
    return isinstance(name, str) and _HUB_ID.fullmatch(name) is not None


def check_weight_file_name(name: str) -> None:
    """Refuse any weight file name but those the format defines, so that no name can leave the prior's folder."""
    if not isinstance(name, str) or not WEIGHTS_PATTERN.fullmatch(name):
        raise PriorFormatError(
            f"{_short(name)} is no name for a prior's weights: expected prior.safetensors or prior-00001-of-0000N.safetensors."
        )


def _check_weight_files(files: Mapping[str, str]) -> None:
    """One file, or files 1 to N of N, each of other contents."""
    numbers = [(match[1], match[2]) for file in files if (match := WEIGHTS_PATTERN.fullmatch(file)) is not None]
    wanted = [(f"{i:05d}", f"{len(files):05d}") for i in range(1, len(files) + 1)]
    if numbers and sorted(numbers, key=str) != wanted and numbers != [(None, None)]:
        raise PriorFormatError(
            f"weight_files names {_listed(sorted(files))}, expected prior.safetensors alone, or "
            "prior-00001-of-0000N.safetensors and so on up to N."
        )
    if len(set(files.values())) < len(files):
        counts = Counter(files.values())
        twice = [file for file, digest in files.items() if counts[digest] > 1]
        raise PriorFormatError(f"weight_files gives {_listed(twice)} the same hash: no two files of a prior are alike.")


_TYPES: dict[str, Any] = {
    "parameters": dict,
    "dtype": dict,
    "tied_parameters": dict,
    "source": dict,
    "estimator": dict,
    "libraries": dict,
    "weight_files": dict,
    "head_parameters": list,
    "buffers": list,
    "family": str,
    "base_model": (str, type(None)),
    "base_model_revision": (str, type(None)),
    "model_type": (str, type(None)),
    "license": (str, type(None)),
    "prior_hub_version": (str, type(None)),
}


def _type_name(kind: Any) -> str:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    names = {dict: "an object", list: "a list", str: "a string", type(None): "null"}
    return " or ".join(names[k] for k in kinds)


def _check_version(version: Any, where: str) -> None:
    match = re.fullmatch(r"(0|[1-9][0-9]{0,5})\.(0|[1-9][0-9]{0,5})", version) if isinstance(version, str) else None
    if match is None:
        raise PriorFormatError(f"{where}: format_version is {_short(version)}, expected one like {FORMAT_VERSION!r}.")
    major, minor = int(match[1]), int(match[2])
    own_major, own_minor = (int(part) for part in FORMAT_VERSION.split("."))
    if major != own_major:
        raise PriorFormatError(
            f"{where} is of format {version}; this version of prior_hub reads {own_major}.x. Upgrade prior_hub."
        )
    if minor > own_minor:
        warnings.warn(
            f"{where} is of format {version}, newer than {FORMAT_VERSION}: what is new in it is ignored.",
            PriorWarning,
            stacklevel=3,
        )


def _checked_shapes(parameters: Any) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    total = 0
    for name, shape in parameters.items():
        if not _is_name(name):
            raise PriorFormatError(f"parameters has the name {_short(name)}, expected 1 to {_MAX_NAME} characters of Unicode.")
        if not isinstance(shape, (list, tuple)) or not all(_is_int(n) and n >= 0 for n in shape):
            raise PriorFormatError(
                f"parameters gives {_short(name)} the shape {_short(shape)}, expected a list of integers >= 0."
            )
        possible = len(shape) <= 64 and all(n <= _MAX_ENTRIES for n in shape)  # before the product: it may have 10**9 digits
        total += math.prod(shape) if possible else 0
        if not possible or total > _MAX_ENTRIES:
            raise PriorFormatError(f"parameters declares an impossible size at {_short(name)}: shape {_short(shape)}.")
        shapes[name] = tuple(shape)
    return shapes


def _check_dtypes(dtype: Mapping[str, Any]) -> None:
    wanted = {"mean": MEAN_DTYPES, "variance": MEAN_DTYPES, "deviations": DEVIATION_DTYPES}
    for kind, allowed in wanted.items():
        if dtype.get(kind) not in allowed:
            raise PriorFormatError(f"dtype of {kind} is {_short(dtype.get(kind))}, expected one of {', '.join(allowed)}.")


def _checked_names(what: str, names: Any) -> tuple[str, ...]:
    if not all(_is_name(name) for name in names):
        raise PriorFormatError(f"{what} holds something that is not a name.")
    if len(set(names)) != len(names):
        raise PriorFormatError(f"{what} names something twice.")
    return tuple(names)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= _MAX_NAME and _SURROGATE.search(value) is None


def _is_finite(value: Any) -> bool:
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond the largest float
        return False


def _short(value: Any) -> str:
    """repr, cut to a readable length: the value may be megabytes of somebody's file."""
    return _REPR.repr(value)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(_short(name)[1:-1] for name in names[:8]) + more
