"""Other people's prior files, read as a prior: the four files of "Pre-Train Your Loss", and swa_gaussian checkpoints.

    v = variance (P,)      Q = covmat (K, P), rows oldest first      s = scale, e = eps, k rows used

| convention       | diagonal      | low rank                | who                                                   |
|------------------|---------------|-------------------------|-------------------------------------------------------|
| "swag"           | s v/2 + e     | s D^T D/(2(k-1))        | Maddox et al. 2019, eq. 6: every other prior here     |
| "paper"          | s v + e       | s^2 Q^T Q               | hsouri/BayesianTransferLearning, its default          |
| "paper-unscaled" | s v + e       | Q^T Q                   | the same with scale_low_rank=False                    |
| "tufts"          | s v/2 + e     | s Q^T Q/(2(k-1))        | tufts-ml/bdl-transfer-learning                        |
| "tufts-elbo"     | s (v/2 + e)   | s Q^T Q/(2(k-1))        | tufts-ml/data-emphasized-ELBo                         |

All five have the form scale (a diag(v) + b Q^T Q) + eps I of `LowRankGaussian`, and equal the original at the scale they are
imported at. At another scale s' (`rescaled`, `prior_scale`) a, b and eps stay as they are: "paper" then has s' s Q^T Q where
the original would have s'^2 Q^T Q, "paper-unscaled" s'/s Q^T Q where it would have Q^T Q, and "tufts-elbo" keeps s e where it
would have s' e. Import again with the other scale to get those; and with another rank, since `truncated` re-weights the rows as
SWAG does. Only "swag" uses D, snapshot minus final mean.

**Is covmat divided by sqrt(K-1) already?** Nobody wrote it down, but the running mean m_i = m_{i-1} + (w_i - m_{i-1})/i and its
deviations d_i = w_i - m_i obey Welford's relation n var = sum_{i>=2} i/(i-1) d_i^2 entry by entry. So

    r = median of K v / sum_{i>=2} i/(i-1) Q_i^2       over the 5 % of the entries with the largest v

is 1 for raw rows and K-1 for divided ones: exactly when all n snapshots were kept (n = K), and 0.4 to 1.2 times that where old
rows were dropped. The first deviation is w_1 - m_1 = 0, so that a first row of zeros certifies n = K. Then e_i = m_i - m_K
follows from e_K = 0, e_{i-1} = e_i - d_i/(i-1), and d_i + e_i = w_i - m_K are the deviations from the final mean.

Nothing is unpickled: files are read with `torch.load(weights_only=True)`, memory-mapped where their format allows it. A file
that holds an object is refused, with the lines that turn it into tensors where its code is at home.

Sources: the code named in the table; Shwartz-Ziv et al. 2022 (arXiv 2205.10279); Maddox et al. 2019 (arXiv 1902.02476) and
wjmaddox/swa_gaussian.
"""

from __future__ import annotations

import errno
import io
import math
import os
import pickletools  # which takes a pickle apart and runs nothing of it
import re
import struct
import warnings
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError  # the error alone: nothing is unpickled
from typing import Any

import torch
from torch import Tensor, nn

from prior_hub.errors import PriorFormatError, PriorMatchError, PriorNotFoundError, PriorNumericsError, PriorWarning
from prior_hub.priors.gaussian import check_finite, swag_weights
from prior_hub.priors.matching import canonical_parameters, head_by_name, head_parameter_names, persistent_buffers, tied_names
from prior_hub.priors.storage import file_sha256
from prior_hub.priors.tensor_files import open_regular

__all__ = ["CONVENTIONS", "LegacyPrior", "Welford", "convention_weights", "legacy_files", "read_legacy", "welford_test"]

CONVENTIONS = ("swag", "paper", "paper-unscaled", "tufts", "tufts-elbo")
_SCALE, _EPS, _ROWS = 1e10, 0.1, 5  # defaults of the published code
_KINDS = ("model", "mean", "variance", "covmat")
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
_PREFIX = re.compile(r"^(module\.)?base\.")  # of swa_gaussian's names
_NESTED = ("state_dict", "model_state_dict", "model", "resnet", "backbone", "encoder")  # where checkpoints keep theirs
_SAMPLED = 1 << 17  # entries that a test looks at, evenly spaced: 5 % of them give r to a few thousandths
_FEWEST = 64  # entries below which a test says nothing
_EXACT = (0.9, 1.1)  # of r, and of r/(K-1), when all snapshots were kept
_ROUGH = (0.35, 1.5)  # when old rows were dropped; simulated, K of 5 to 14: 0.38 (random walks) to 1.24
_ALIKE = 0.5  # correlation of two versions of one tensor; unrelated ones have 0 +- 1/sqrt(entries)


# ------------------------------------------------------------------------------------------------------- conventions


def convention_weights(convention: str, scale: float, eps: float, rows: int) -> dict[str, float]:
    """What `LowRankGaussian` needs to be the convention's Gaussian at this scale.

    Args:
        convention: one of `CONVENTIONS`.
        scale: s > 0.
        eps: e >= 0.
        rows: k, the number of rows used.

    Returns:
        scale, diagonal_weight, low_rank_weight and eps.

    Raises:
        ValueError: an unknown convention, a scale that is not positive, or one row where the convention divides by k-1.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"convention is {convention!r}, expected one of {', '.join(map(repr, CONVENTIONS))}.")
    if not (scale > 0 and math.isfinite(scale) and eps >= 0 and math.isfinite(eps)):
        raise ValueError(f"scale is {scale} and eps {eps}, expected finite numbers, scale > 0 and eps >= 0.")
    if convention == "swag":
        diagonal, low_rank = swag_weights(rows)
        return {"scale": scale, "diagonal_weight": diagonal, "low_rank_weight": low_rank, "eps": eps}
    if convention in ("paper", "paper-unscaled"):
        low_rank = scale if convention == "paper" else 1 / scale
        return {"scale": scale, "diagonal_weight": 1.0, "low_rank_weight": low_rank if rows else 0.0, "eps": eps}
    if rows == 1:
        raise ValueError(f"convention {convention!r} divides by k-1, and one row was asked for: use rank=0, or 2 or more.")
    low_rank = 0.5 / (rows - 1) if rows else 0.0
    inside = scale * eps if convention == "tufts-elbo" else eps
    return {"scale": scale, "diagonal_weight": 0.5, "low_rank_weight": low_rank, "eps": inside}


@dataclass(frozen=True)
class LegacyPrior:
    """What `read_legacy` made of the files: what `PriorModel.from_tensors` takes."""

    mean: dict[str, Tensor]
    variance: dict[str, Tensor]
    deviations: dict[str, Tensor]
    buffers: dict[str, Tensor]
    weights: dict[str, float]
    estimator: dict[str, Any]
    num_snapshots: int | None
    variance_floor: float
    head_parameters: tuple[str, ...]
    tied_parameters: dict[str, str]
    model_type: str | None


@dataclass
class _Raw:
    """The numbers of the files by name, rows oldest first and as they are."""

    mean: dict[str, Tensor]
    variance: dict[str, Tensor]
    rows: dict[str, Tensor]
    buffers: dict[str, Tensor] = field(default_factory=dict)
    head: tuple[str, ...] = ()
    tied: dict[str, str] = field(default_factory=dict)
    model_type: str | None = None
    num_snapshots: int | None = None
    floor: float = 0.0
    divided: bool | None = None  # None: to be decided
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        return next(iter(self.rows.values())).shape[0] if self.rows else 0


def read_legacy(
    files: Mapping[str, Path],
    *,
    convention: str = "swag",
    reference: nn.Module | None = None,
    head: str | Sequence[str] | None = "auto",
    rank: int | None = None,
    scale: float | None = None,
    eps: float | None = None,
    covmat: str = "auto",
    recentre: bool | None = None,
    variance_floor: float | None = None,
    deviations_dtype: torch.dtype | None = None,
    trust_order: bool = False,
) -> LegacyPrior:
    """Read other people's files as a prior. Arguments and errors are those of `PriorModel.from_legacy`.

    Args:
        files: what `legacy_files` returns: "mean", "variance", "covmat", "model", or "checkpoint".
        convention: one of `CONVENTIONS`.
        reference: a model of the source architecture.
        head: which of its parameters are the source task's head.
        rank: k, the number of rows used.
        scale: s.
        eps: e.
        covmat: "raw", "divided" or "auto".
        recentre: deviations from the final mean instead of the running one.
        variance_floor: variances below are raised to it.
        deviations_dtype: storage type of the deviations.
        trust_order: do not compare the model file's values with the mean.
    """
    if covmat not in ("auto", "raw", "divided"):
        raise ValueError(f"covmat is {covmat!r}, expected 'auto', 'raw' or 'divided'.")
    own = convention == "swag"
    scale = (1.0 if own else _SCALE) if scale is None else float(scale)
    eps = (0.0 if own else _EPS) if eps is None else float(eps)
    convention_weights(convention, scale, eps, 2 if rank is None else rank)  # refuses nonsense before gigabytes are read
    if rank is not None and rank < 0:
        raise ValueError(f"rank is {rank}, expected 0 or more.")
    if "checkpoint" in files:
        raw = _read_swa_gaussian(files["checkpoint"], reference, head, variance_floor)
    else:
        raw = _read_four(files, reference, head, trust_order, with_rows=rank != 0)
        _floor_variance(raw, variance_floor, zero_allowed=eps > 0)
    kept = raw.rank
    if rank is not None and rank > kept:
        raise PriorFormatError(f"rank {rank} was asked for, the files hold {kept} rows.")
    used = rank if rank is not None else kept if own else min(_ROWS, kept)
    weights = convention_weights(convention, scale, eps, used)
    record = {
        "name": "swag",
        "imported_from": raw.record.pop("imported_from"),
        "convention": convention,
        "imported_scale": scale,
    }
    certified = _decide(raw, covmat) if kept and used else False
    if recentre and not certified:
        raise PriorFormatError(
            "recentre=True needs every snapshot since the first, certified by a first row of zeros and Welford's relation; "
            f"here {'old rows were dropped' if kept else 'there are no rows'}. Leave recentre out: the deviations are then "
            "from the running mean, as in the files."
        )
    moved = certified and (own if recentre is None else recentre)
    raw.record["recentred"] = moved
    rows = _deviations(raw, own, moved, used, deviations_dtype) if used else {}
    if used:
        raw.record["rows"] = f"{used} of {kept}, {'newest' if own else 'oldest'} first"
    return LegacyPrior(
        mean=raw.mean,
        variance=raw.variance,
        deviations=rows,
        buffers=raw.buffers,
        weights=weights,
        estimator={**record, **raw.record, "files": _hashes(files)},
        num_snapshots=kept if certified else raw.num_snapshots,
        variance_floor=raw.floor,
        head_parameters=raw.head,
        tied_parameters=raw.tied,
        model_type=raw.model_type,
    )


def _hashes(files: Mapping[str, Path]) -> dict[str, str]:
    """File name -> sha256; the kind where two have one name."""
    names = [path.name for path in files.values()]
    return {path.name if names.count(path.name) == 1 else kind: file_sha256(path) for kind, path in files.items()}


# ------------------------------------------------------------------------------------------------------------ covmat


@dataclass(frozen=True)
class Welford:
    """How variance and covmat go together.

    Attributes:
        ratio: r: about 1 for raw rows, about K-1 for divided ones; NaN where nothing can be said.
        correlation: of log v with the log of the rows' sum, over all sampled entries that can tell; NaN where too few.
        entries: how many entries could tell.
        zero_rows: rows that are zero in every entry.
    """

    ratio: float
    correlation: float
    entries: int
    zero_rows: tuple[int, ...]


def welford_test(variance: Mapping[str, Tensor], rows: Mapping[str, Tensor]) -> Welford:
    """Welford's relation between a variance and the deviations from a running mean.

    Args:
        variance: name -> (*shape).
        rows: name -> (K, *shape), oldest first, K >= 2.
    """
    count = sum(v.numel() for v in variance.values())
    step = max(1, count // _SAMPLED)
    v = torch.cat([x.reshape(-1)[::step].double() for x in variance.values()])
    q = torch.cat([rows[name].flatten(1)[:, ::step].double() for name in variance], dim=1)  # (K, entries)
    zero = [i for i in range(len(q)) if not q[i].any() and not any(bool(r[i].any()) for r in rows.values())]
    i = torch.arange(2, len(q) + 1, dtype=torch.float64).unsqueeze(1)
    total = (i / (i - 1) * q[1:].square()).sum(0)
    low = v.min()
    clamped = low if int((v == low).sum()) > max(1, 0.01 * len(v)) else low - 1  # a floor, which says nothing of the rows
    telling = (v > clamped) & (total > 0) & (v > 0)
    v, total = v[telling], total[telling]
    if not len(v):
        return Welford(math.nan, math.nan, 0, tuple(zero))
    top = v.topk(max(1, len(v) // 20)).indices
    ratio = float((len(q) * v[top] / total[top]).median())
    correlation = math.nan
    if len(v) >= _FEWEST:
        correlation = _correlation(v.log(), total.log())
    return Welford(ratio, correlation, len(v), tuple(zero))


def _correlation(a: Tensor, b: Tensor) -> float:
    """Of two flat tensors; NaN where one is constant."""
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    size = a.norm() * b.norm()
    return float(a @ b / size) if size > 0 else math.nan


def _decide(raw: _Raw, covmat: str) -> bool:
    """Raw or divided rows, into `raw`; returns whether a first row of zeros certifies that no snapshot is missing."""
    rank = raw.rank
    if rank < 2:
        raw.divided = False
        raw.record["covmat"] = "one row, nothing to decide"
        return False
    test = welford_test(raw.variance, raw.rows)
    certified = 0 in test.zero_rows
    what = f"K v / sum(i/(i-1) Q_i^2) is {test.ratio:.3g} over {test.entries:,} entries"
    advice = (
        "Check that variance and covmat are from one run, complete, in one order, and that the rows are oldest first; "
        "if you know, pass covmat='raw' or covmat='divided'."
    )
    if covmat == "auto":
        _refuse_odd(test, rank, advice, apart=raw.divided is None)
    low, high = _EXACT if certified else _ROUGH
    fits = {"raw": low <= test.ratio <= high, "divided": low <= test.ratio / (rank - 1) <= high}
    if covmat != "auto":
        form, told_by = covmat, "argument"
    elif raw.divided is not None:
        form, told_by = ("divided" if raw.divided else "raw"), "the format"
    elif fits["raw"] != fits["divided"] or (rank == 2 and fits["raw"]):  # K = 2: the same either way
        form, told_by = ("raw" if fits["raw"] else "divided"), "Welford's relation"
    else:
        near = f"neither near 1 (raw rows) nor near K-1 = {rank - 1} (divided by sqrt(K-1))"
        if fits["raw"]:
            near = f"which both raw rows and rows divided by sqrt(K-1) = {math.sqrt(rank - 1):.3g} can give with so few of them"
        if not test.entries:
            near = "no variance lies above the floor with a deviation that is not zero"
        raise PriorFormatError(f"cannot tell whether covmat is divided by sqrt(K-1): {what}: {near}. {advice}")
    raw.divided = form == "divided"
    raw.record["covmat"] = "the same raw or divided (K = 2)" if rank == 2 else f"{form}{' by sqrt(K-1)' if raw.divided else ''}"
    raw.record["covmat_told_by"] = told_by
    if math.isfinite(test.ratio):
        raw.record["welford_ratio"] = float(f"{test.ratio:.6g}")
    if told_by == "the format":
        return certified and raw.num_snapshots == rank
    if not test.entries:
        return False
    if not fits[form]:
        times = f" times {rank - 1}" if raw.divided else ""
        warnings.warn(
            f"{what}, which does not fit {form} rows ({low:g} to {high:g}{times}). {advice}", PriorWarning, stacklevel=2
        )
        return False
    return certified


def _refuse_odd(test: Welford, rank: int, advice: str, *, apart: bool) -> None:
    """Refuse rows in another order, and, from a file `apart` from theirs, a variance that is not theirs."""
    odd = [i for i in test.zero_rows if i > 0]
    if len(test.zero_rows) == rank:
        raise PriorFormatError(
            "covmat is all zero: the weights never moved, or the file is empty. rank=0 imports the diagonal."
        )
    if odd:
        what = (
            "the last row is zero: are the rows newest first"
            if odd == [rank - 1]
            else f"row {odd[0] + 1} is zero: shuffled rows"
        )
        raise PriorFormatError(
            f"covmat: {what}? In these formats rows are deviations from the running mean, oldest first, of which only the "
            f"first can be zero. {advice}"
        )
    if apart and test.entries >= _FEWEST and test.correlation < 5 / math.sqrt(test.entries):
        raise PriorFormatError(
            f"variance and covmat do not go together: where one is large the other is not (correlation {test.correlation:.3f} "
            f"over {test.entries:,} entries, near 1 for files of one run). One of them is shuffled, or of another run. {advice}"
        )


def _deviations(raw: _Raw, own: bool, recentred: bool, used: int, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Name -> (used, *shape): newest first and without the division for SWAG's Gaussian, else the files' first rows."""
    rank = raw.rank
    factor = math.sqrt(rank - 1) if own and raw.divided and rank > 2 else 1.0
    result = {}
    for name, rows in raw.rows.items():
        kind = dtype or rows.dtype
        if recentred:
            rows = _recentred(rows)
        if own:
            rows = rows[rank - used :].flip(0)
            rows = (rows.double() * factor if factor != 1 else rows).to(kind)
        else:
            rows = rows[:used].to(kind)
        result[name] = rows
    return result


def _recentred(rows: Tensor) -> Tensor:
    """(K, *shape) deviations from the running mean, all of them, oldest first -> from the final mean, float64."""
    moved = rows.double()
    behind = torch.zeros_like(moved[0])  # m_i - m_K
    for i in range(len(rows), 0, -1):
        deviation = moved[i - 1].clone()
        moved[i - 1] += behind
        if i > 1:
            behind -= deviation / (i - 1)
    return moved


def _floor_variance(raw: _Raw, floor: float | None, *, zero_allowed: bool) -> None:
    count = sum(v.numel() for v in raw.variance.values())
    low = min(float(v.min()) for v in raw.variance.values() if v.numel())
    if floor is not None:
        _check_floor(floor)
        raw.record["variance_entries_at_floor"] = sum(int((v < floor).sum()) for v in raw.variance.values())
        raw.variance = {name: v.clamp(min=floor) for name, v in raw.variance.items()}
        raw.floor = float(floor)
    elif low < 0 or (low == 0 and not zero_allowed):
        bad = sum(int((v < 0 if low < 0 else v <= 0).sum()) for v in raw.variance.values())
        raise PriorNumericsError(
            f"variance has {bad} of {count} entries {'< 0' if low < 0 else '<= 0'} (smallest {low:.3e}). The original raises "
            "variances to a floor before it writes them, so check that the file holds variances (not deviations or their "
            "logarithms) and is whole; or pass variance_floor, 1e-6 in the original."
        )


def _check_floor(floor: float) -> None:
    if not (floor > 0 and math.isfinite(floor)):
        raise ValueError(f"variance_floor is {floor}, expected a finite number > 0.")


# ----------------------------------------------------------------------------------------------------- the four files


def legacy_files(path: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]]) -> dict[str, Path]:
    """Find the files: "mean", "variance", "covmat" and "model", or "checkpoint" alone.

    Args:
        path: a folder that holds one set `*_mean.pt`, `*_variance.pt`, `*_covmat.pt`, `*_model.pt` or one checkpoint; the
            common beginning of their names ("folder/resnet50_ssl_prior", the original's `prior_path`); one of the four, or a
            checkpoint; or a mapping of kinds to files.

    Raises:
        PriorNotFoundError: there are none.
        PriorFormatError: several sets, or a set without mean and variance.
    """
    if isinstance(path, Mapping):
        unknown = sorted(set(path) - {*_KINDS, "checkpoint"})
        if unknown:
            raise ValueError(f"unknown kind of file {unknown[0]!r}, expected {', '.join(_KINDS)}, or checkpoint alone.")
        found = {kind: Path(file).expanduser() for kind, file in path.items()}
        missing = [str(file) for file in found.values() if not file.is_file()]
        if missing:
            raise PriorNotFoundError(f"{missing[0]} is no file.")
        return _complete(found, "the mapping")
    path = Path(path).expanduser()
    if path.is_dir():
        stems = sorted({p.name.removesuffix(f"_{kind}.pt") for kind in _KINDS for p in path.glob(f"*_{kind}.pt")})
        if len(stems) > 1:
            raise PriorFormatError(
                f"{path} holds {len(stems)} priors ({', '.join(stems[:4])}): name one, as {path / stems[0]}."
            )
        if stems:
            return _complete(_set_of(path / stems[0]), str(path))
        others = sorted(p for p in path.iterdir() if p.suffix in (".pt", ".pth", ".tar", ".bin") and p.is_file())
        if len(others) == 1:
            return {"checkpoint": others[0]}
        told = f"holds {len(others)} checkpoints: name one" if others else "holds no such file"
        raise PriorNotFoundError(
            f"{path} {told}. Expected *_mean.pt, *_variance.pt, *_covmat.pt and *_model.pt, or a checkpoint."
        )
    kind = next((kind for kind in _KINDS if path.name.endswith(f"_{kind}.pt")), None)
    if kind and path.is_file():
        return _complete(_set_of(path.with_name(path.name.removesuffix(f"_{kind}.pt"))), str(path))
    if path.is_file():
        return {"checkpoint": path}
    found = _set_of(path)
    if not found:
        raise PriorNotFoundError(f"{path} is no folder, no file, and no file {path.name}_mean.pt is beside it.")
    return _complete(found, str(path))


def _set_of(stem: Path) -> dict[str, Path]:
    candidates = {kind: stem.with_name(f"{stem.name}_{kind}.pt") for kind in _KINDS}
    return {kind: file for kind, file in candidates.items() if file.is_file()}


def _complete(found: dict[str, Path], where: str) -> dict[str, Path]:
    if "checkpoint" in found:
        if len(found) > 1:
            raise ValueError("name a checkpoint alone, or the files mean, variance, covmat and model.")
        return found
    missing = [kind for kind in ("mean", "variance") if kind not in found]
    if missing:
        raise PriorFormatError(f"{where}: no *_{missing[0]}.pt beside {', '.join(sorted(p.name for p in found.values()))}.")
    return found


def _read_four(
    files: Mapping[str, Path], reference: nn.Module | None, head: Any, trust_order: bool, *, with_rows: bool
) -> _Raw:
    mean, variance = (_vector(files[kind], kind) for kind in ("mean", "variance"))
    count = mean.numel()
    if variance.numel() != count:
        raise PriorFormatError(
            f"{files['mean'].name} has {count:,} values and {files['variance'].name} {variance.numel():,}: one of them is "
            "cut or of another network."
        )
    rows = None
    if with_rows:
        if "covmat" not in files:
            raise PriorNotFoundError(
                f"no *_covmat.pt beside {files['mean'].name}. Fetch it, or pass rank=0 for the diagonal prior without it."
            )
        rows = _tensor(files["covmat"])
        if rows.ndim != 2 or rows.shape[1] != count:
            turned = " Its first axis has that length: transpose it." if rows.ndim == 2 and rows.shape[0] == count else ""
            raise PriorFormatError(
                f"{files['covmat'].name} has the shape {tuple(rows.shape)}, expected (K, {count}) beside "
                f"{files['mean'].name} with {count:,} values.{turned}"
            )
        check_finite(files["covmat"].name, rows)
    state = _model_state(files["model"]) if "model" in files else None
    shapes, raw = _named(count, state, reference, head)
    if state is not None and not trust_order:
        _compare_with_model(raw, state, shapes, mean, files)
    raw.record["imported_from"] = "four files of Pre-Train Your Loss (mean, variance, covmat, model)"
    start = 0
    for name, (shape, _) in shapes.items():
        stop = start + math.prod(shape)
        raw.mean[name] = mean[start:stop].view(shape)
        raw.variance[name] = variance[start:stop].view(shape)
        if rows is not None:
            raw.rows[name] = rows[:, start:stop].reshape(len(rows), *shape)
        start = stop
    return raw


def _vector(path: Path, kind: str) -> Tensor:
    tensor = _tensor(path)
    if tensor.ndim != 1 or not tensor.numel():
        raise PriorFormatError(
            f"{path.name} has the shape {tuple(tensor.shape)}, expected one axis: the {kind} of all weights."
        )
    check_finite(path.name, tensor)
    if tensor.dtype in (torch.float16, torch.bfloat16):
        lost = ": variances below 6e-8 are lost, and the others have 3 digits or less" if kind == "variance" else ""
        warnings.warn(
            f"{path.name} is stored in {str(tensor.dtype).removeprefix('torch.')}{lost}. It is read as float32; use the "
            "original file where there is one.",
            PriorWarning,
            stacklevel=2,
        )
        tensor = tensor.float()
    return tensor


def _tensor(path: Path) -> Tensor:
    value = _load(path)
    if not isinstance(value, Tensor):
        raise PriorFormatError(f"{path.name} holds a {type(value).__name__}, expected a tensor.")
    value = value.detach()
    if not value.is_floating_point() or value.layout != torch.strided:
        raise PriorFormatError(f"{path.name} holds {value.dtype} ({value.layout}), expected dense real numbers.")
    return value


def _model_state(path: Path) -> dict[str, Tensor]:
    """The state_dict in a model file, wrappers stripped from its names."""
    state = _load(path)
    for _ in range(3):
        if not isinstance(state, Mapping) or any(isinstance(v, Tensor) for v in state.values()):
            break
        state = next((state[key] for key in _NESTED if isinstance(state.get(key), Mapping)), None)
    if not isinstance(state, Mapping):
        raise PriorFormatError(f"{path.name} holds no state_dict: expected a mapping of names to tensors.")
    state = {str(name): value.detach() for name, value in state.items() if isinstance(value, Tensor)}
    for wrapper in ("module.", "_orig_mod."):
        if state and all(name.startswith(wrapper) for name in state):
            state = {name.removeprefix(wrapper): value for name, value in state.items()}
    return state


def _split(state: Mapping[str, Tensor], known: Iterable[str] = ()) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(parameters, buffers) of a state_dict, by the names and types of buffers."""
    known = set(known)
    buffers = {
        name: value
        for name, value in state.items()
        if name in known or name.rsplit(".", 1)[-1] in _BUFFERS or not value.is_floating_point()
    }
    return {name: value for name, value in state.items() if name not in buffers}, buffers


def _named(
    count: int, state: Mapping[str, Tensor] | None, reference: nn.Module | None, head: Any
) -> tuple[dict[str, tuple[tuple[int, ...], str]], _Raw]:
    """Names and shapes in the order of the vectors: name -> (shape, name in the model file); the rest of the facts."""
    raw = _Raw({}, {}, {})
    found, buffers = (
        _split(state, () if reference is None else persistent_buffers(reference)) if state is not None else ({}, {})
    )
    if reference is None:
        if state is None:
            raise PriorMatchError(
                f"the files hold {count:,} values in the order of the network's parameters and no names: pass reference=, a "
                "model of that architecture (--reference torchvision:resnet50), or put its state_dict beside them as *_model.pt"
            )
        shapes = {name: tuple(value.shape) for name, value in found.items()}
        outside = head_by_name(shapes, head)
        chosen = _that_fit(count, shapes, outside, "the model file", len(buffers))
        raw.head = tuple(name for name in outside if name in chosen)
        raw.buffers = {n: b for n, b in buffers.items() if not _of_modules(n, [h for h in outside if h not in chosen])}
        told = f"its {len(buffers)} entries named {', '.join(_BUFFERS)} taken for buffers" if buffers else "no buffers in it"
        raw.record["names"] = f"state_dict of the model file, in its order; {told}"
        return {name: (shape, name) for name, shape in chosen.items()}, raw
    shapes = {name: tuple(p.shape) for name, p in canonical_parameters(reference).items()}
    outside = _head_of(reference, head)
    theirs = {name: tuple(value.shape) for name, value in found.items()}
    hint = ""
    if state is not None and _total(theirs) == count:
        more = [name for name in theirs if name not in shapes]
        hint = (
            f" The model file has just as many, with {', '.join(more[:3])}: leave reference out to take its names."
            if more
            else ""
        )
    chosen = _that_fit(count, shapes, outside, type(reference).__name__, None, hint)
    raw.head = tuple(outside)
    raw.tied = {alias: name for alias, name in tied_names(reference).items() if name in chosen}
    raw.model_type = _model_type(reference)
    raw.record["names"] = f"parameters of {type(reference).__name__}, the reference, in its order"
    if state is None:
        return {name: (shape, "") for name, shape in chosen.items()}, raw
    theirs = _that_fit(count, theirs, head_by_name(theirs), "the model file", len(buffers))
    if theirs.keys() == chosen.keys():  # the model file is of the author's own network: its order is that of the vectors
        pairs = {name: name for name in theirs}
        if list(theirs) != list(chosen):
            raw.record["names"] = "state_dict of the model file, in its order, which is not the reference's"
    else:
        pairs = dict(zip(chosen, theirs, strict=False))
    for i, (name, other) in enumerate(pairs.items()):
        if chosen[name] != theirs[other] or len(chosen) != len(theirs):
            raise PriorMatchError(
                f"the reference's parameters are not those of the model file, one by one: number {i + 1} of {len(chosen)} is "
                f"{name!r} {chosen[name]} in the reference, {other!r} {theirs[other]} in the file, which has {len(theirs)}. "
                "The vectors follow the file: leave reference out to take its names, and give name_map where the prior meets "
                "a model."
            )
    modules = {other.rpartition(".")[0]: name.rpartition(".")[0] for name, other in pairs.items()}
    for name, buffer in buffers.items():
        module, _, last = name.rpartition(".")
        if module in modules:
            raw.buffers[f"{modules[module]}.{last}" if modules[module] else last] = buffer
    return {name: (chosen[name], other) for name, other in pairs.items()}, raw


def _that_fit(
    count: int, shapes: Mapping[str, tuple[int, ...]], head: Sequence[str], what: str, buffers: int | None, hint: str = ""
) -> dict[str, tuple[int, ...]]:
    """The parameters whose values are `count` together: all, or all but the head."""
    body = {name: shape for name, shape in shapes.items() if name not in set(head)}
    for choice in (shapes, body):
        if _total(choice) == count:
            return dict(choice)
    without = f", {_total(body):,} without its head ({', '.join(head[:4])})" if head else ""
    took = f" (its {buffers} BatchNorm statistics not counted)" if buffers else ""
    advice = "the vectors must hold the parameters of exactly this network, with its head or without."
    if not head and not hint:
        advice += " If it has a head that they leave out, name it: head=('fc',)."
    raise PriorMatchError(f"the files hold {count:,} values, {what} has {_total(shapes):,}{took}{without}: {advice}{hint}")


def _total(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def _of_modules(name: str, parameters: Iterable[str]) -> bool:
    """Whether a buffer lies in the module of one of these parameters."""
    return name.rpartition(".")[0] in {p.rpartition(".")[0] for p in parameters}


def _head_of(reference: nn.Module, head: Any) -> list[str]:
    try:
        return head_parameter_names(reference, head)
    except PriorMatchError:
        if head != "auto":
            raise
        return []  # a backbone, whose head is gone


def _model_type(reference: nn.Module) -> str:
    config = getattr(reference, "config", None)
    return getattr(config, "model_type", None) or type(reference).__name__


def _compare_with_model(
    raw: _Raw,
    state: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[tuple[int, ...], str]],
    mean: Tensor,
    files: Mapping[str, Path],
) -> None:
    """Refuse a mean whose tensors do not look like the model's: another order, another network, a shuffled file."""
    start, far, size, values = 0, 0.0, 0.0, 0
    unlike: list[tuple[str, float]] = []
    for name, (shape, other) in shapes.items():
        stop = start + math.prod(shape)
        ours, theirs = mean[start:stop].double(), state[other].reshape(-1).double()
        start = stop
        far += float((ours - theirs).square().sum())
        size += float(theirs.square().sum())
        if len(ours) >= _FEWEST:
            values += 1
            likeness = _correlation(ours, theirs)
            if likeness < _ALIKE:  # NaN, of a constant tensor, says nothing
                unlike.append((name, likeness))
    distance = math.sqrt(far / size) if size > 0 else math.nan
    if unlike:
        name, likeness = unlike[0]
        raise PriorFormatError(
            f"{len(unlike)} of {values} tensors of {files['mean'].name} are unlike those of {files['model'].name} (correlation "
            f"{likeness:.2f} for {name!r}; versions of one network have nearly 1). Check that both are of one run and that the "
            "vectors follow the order of the model's parameters; if the model file is of another stage of training, pass "
            "trust_order=True (--trust-order)."
        )
    if math.isfinite(distance):
        raw.record["model_tensors_compared"] = values
        raw.record["model_distance"] = float(f"{distance:.6g}")  # |mean - model| / |model|


# ------------------------------------------------------------------------------------------------------- swa_gaussian


def _read_swa_gaussian(path: Path, reference: nn.Module | None, head: Any, floor: float | None) -> _Raw:
    state = _load(path)
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not any(str(key).endswith("_sq_mean") for key in state):
        raise PriorFormatError(
            f"{path.name} is no checkpoint of swa_gaussian: no name in it ends in '_sq_mean'. The other format read here is "
            "*_mean.pt, *_variance.pt, *_covmat.pt and *_model.pt."
        )
    stems = {stem: _PREFIX.sub("", stem) for key in state if (stem := str(key).removesuffix("_sq_mean")) != key}
    raw = _Raw({}, {}, {}, divided=False)
    squares: dict[str, Tensor] = {}
    for stem, name in stems.items():
        for suffix, into in (("_mean", raw.mean), ("_sq_mean", squares), ("_cov_mat_sqrt", raw.rows)):
            tensor = state.get(stem + suffix)
            if tensor is None and suffix == "_cov_mat_sqrt":
                continue
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                raise PriorFormatError(
                    f"{path.name} has no {stem + suffix!r} beside {stem + '_sq_mean'!r}: it is cut or altered."
                )
            check_finite(f"{stem + suffix!r}", tensor)
            into[name] = tensor.detach()
        if squares[name].shape != raw.mean[name].shape:
            raise PriorFormatError(f"{stem!r}: mean and squares have different shapes.")
    if raw.rows and raw.rows.keys() != raw.mean.keys():
        raise PriorFormatError(f"{path.name} has rows for {len(raw.rows)} of {len(raw.mean)} parameters: it is cut or altered.")
    for name, rows in raw.rows.items():
        if rows.ndim != 2 or rows.shape[1] != raw.mean[name].numel():
            raise PriorFormatError(f"rows of {name!r} are {tuple(rows.shape)}, expected (K, {raw.mean[name].numel()}).")
    ranks = {rows.shape[0] for rows in raw.rows.values()}
    if len(ranks) > 1:
        raise PriorFormatError(f"{path.name} has {sorted(ranks)} rows for different parameters: it is cut or altered.")
    if ranks == {0}:
        raw.rows = {}
    raw.rows = {name: rows.detach().reshape(len(rows), *raw.mean[name].shape) for name, rows in raw.rows.items()}
    count = state.get("n_models")
    raw.num_snapshots = int(count.reshape(-1)[0]) if isinstance(count, Tensor) and count.numel() == 1 else None
    if raw.num_snapshots is not None and (raw.num_snapshots < 1 or raw.num_snapshots < raw.rank):
        raise PriorFormatError(f"{path.name} counts {raw.num_snapshots} snapshots and holds {raw.rank} rows.")
    raw.record["imported_from"] = "swa_gaussian checkpoint"
    _put_right(raw, squares, reference)
    _swa_variance(raw, squares, floor)
    _swa_buffers(raw, state, stems)
    if reference is None:
        raw.head = tuple(head_by_name(raw.mean, head))
    else:
        raw.head = tuple(n for n in _head_of(reference, head) if n in raw.mean)
        raw.model_type = _model_type(reference)
    return raw


def _swa_variance(raw: _Raw, squares: Mapping[str, Tensor], floor: float | None) -> None:
    """variance = E[w^2] - E[w]^2, which cancels: what rounding left of it is raised to a floor."""
    variance = {name: squares[name].double() - mean.double().square() for name, mean in raw.mean.items()}
    count = sum(v.numel() for v in variance.values())
    bad = sum(int((v <= 0).sum()) for v in variance.values())
    if floor is not None:
        _check_floor(floor)
    elif bad:  # rounding of E[w^2] at the entries whose variance it has swallowed
        noise = torch.cat(
            [
                squares[n][v <= 0].double() * torch.finfo(squares[n].dtype).eps
                for n, v in variance.items()
                if bool((v <= 0).any())
            ]
        )
        floor = float(noise[noise > 0].median()) if bool((noise > 0).any()) else 1e-30
        floor = float(f"{floor:.2g}")
    raw.floor = floor or 0.0
    raised = sum(int((v < raw.floor).sum()) for v in variance.values())
    raw.variance = {
        n: v.clamp(min=raw.floor).to(torch.promote_types(raw.mean[n].dtype, torch.float32)) for n, v in variance.items()
    }
    raw.record["variance_entries_not_positive"] = bad
    raw.record["variance_entries_at_floor"] = raised
    raw.mean = {n: m.to(torch.promote_types(m.dtype, torch.float32)) for n, m in raw.mean.items()}
    if bad:
        warnings.warn(
            f"{bad:,} of {count:,} variances are <= 0: swa_gaussian keeps E[w^2] and E[w] and their difference is lost in "
            f"rounding where weights hardly move. {raised:,} variances are raised to variance_floor={raw.floor:g}; those near "
            "it are rounding errors, not knowledge. A larger floor is the safer prior.",
            PriorWarning,
            stacklevel=2,
        )


def _swa_buffers(raw: _Raw, state: Mapping[str, Any], stems: Mapping[str, str]) -> None:
    """BatchNorm statistics of the checkpoint, unless they were never computed."""
    taken = {stem + suffix for stem in stems for suffix in ("_mean", "_sq_mean", "_cov_mat_sqrt")}
    found = {
        _PREFIX.sub("", str(key)): value.detach()
        for key, value in state.items()
        if isinstance(value, Tensor) and key not in taken and str(key).rsplit(".", 1)[-1] in _BUFFERS
    }
    moved = [
        n
        for n, b in found.items()
        if (n.endswith("running_mean") and b.any()) or (n.endswith("running_var") and (b != 1).any())
    ]
    if found and not moved:
        warnings.warn(
            f"the {len(found)} BatchNorm statistics of the checkpoint are those of a new network: its bn_update was not run "
            "before it was saved. They are left out; recompute them for the mean (recompute_batch_norm).",
            PriorWarning,
            stacklevel=2,
        )
        return
    raw.buffers = found
    raw.record["batch_norm"] = "as in the checkpoint" if found else "none"


def _put_right(raw: _Raw, squares: dict[str, Tensor], reference: nn.Module | None) -> None:
    """Undo the mix-up of swa_gaussian: what it keeps under its i-th name, children first, is of the i-th parameter."""
    names = list(raw.mean)
    theirs = _children_first(names)
    wrong = [(name, held) for name, held in zip(names, theirs, strict=True) if name != held]
    if not wrong:
        return
    groups: tuple[dict[str, Tensor], ...] = (raw.mean, squares, raw.rows)
    told = (
        f"{len(wrong)} of {len(names)} parameters ({', '.join(name for name, _ in wrong[:3])}, ...) are under wrong names in "
        "this checkpoint: swa_gaussian goes through the modules children first to keep statistics and parents first to "
        "collect them, which differ where a module has parameters beside its children"
    )
    verdict = _order_by_reference(raw, wrong, reference) if reference is not None else None
    if verdict == "as it is":
        raw.record["names"] = "as in the checkpoint, which has them in order (told by the reference)"
        return
    for group in groups:
        if group:
            right = {name: group[held] for name, held in wrong} if verdict == "moved" else {}
            for name, _ in wrong:
                group.pop(name)
            ordered = {name: right.get(name, group.get(name)) for name in names if name in right or name in group}
            group.clear()
            group.update({name: tensor for name, tensor in ordered.items() if tensor is not None})
    if not raw.mean:
        raise PriorMatchError(
            f"{told}. Nothing is left without them: pass reference=, the network with weights of that training."
        )
    raw.record["names"] = f"{len(wrong)} {'put right by the reference' if verdict else 'left out: under wrong names'}"
    done = "They were put right by the reference."
    if not verdict:
        done = (
            "They are left out; to have them put right pass reference=, the network with weights of that training (a "
            "pre-trained or final checkpoint)."
        )
    warnings.warn(f"{told}. {done}", PriorWarning, stacklevel=2)


def _order_by_reference(raw: _Raw, wrong: Sequence[tuple[str, str]], reference: nn.Module) -> str | None:
    """Says "moved" or "as it is", by the shapes of the reference or else its values; None when they cannot tell."""
    known = {name: p.detach() for name, p in canonical_parameters(reference).items()}
    missing = [name for name, _ in wrong if name not in known]
    if missing:
        raise PriorMatchError(
            f"the checkpoint has a parameter {missing[0]!r}, the reference has not: they are different networks."
        )
    as_is = all(raw.mean[name].shape == known[name].shape for name, _ in wrong)
    moved = all(raw.mean[held].shape == known[name].shape for name, held in wrong)
    if as_is != moved:
        return "moved" if moved else "as it is"
    if not as_is:
        raise PriorMatchError(f"shapes of the checkpoint fit the reference in neither order ({wrong[0][0]!r}, ...).")
    if any(known[name].is_meta for name, _ in wrong):
        return None
    flat = {name: known[name].reshape(-1).cpu() for name, _ in wrong}
    likeness = [
        _correlation(torch.cat([raw.mean[pair[i]].reshape(-1) for pair in wrong]), torch.cat([flat[name] for name, _ in wrong]))
        for i in (0, 1)
    ]
    if abs(likeness[0] - likeness[1]) < _ALIKE or max(likeness) < _ALIKE:
        return None
    return "moved" if likeness[1] > likeness[0] else "as it is"


def _children_first(names: Sequence[str]) -> list[str]:
    """The names in the order of `module.apply`: those of a module's children before its own."""
    children: dict[str, list[str]] = {"": []}
    own: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        for i in range(1, len(parts)):
            path, parent = ".".join(parts[:i]), ".".join(parts[: i - 1])
            if path not in children:
                children[path] = []
                children[parent].append(path)
        own.setdefault(".".join(parts[:-1]), []).append(name)

    order: list[str] = []

    def visit(module: str) -> None:
        for child in children[module]:
            visit(child)
        order.extend(own.get(module, []))

    visit("")
    return order


# ------------------------------------------------------------------------------------------------------------ reading

_WAY_OUT = """\
Where the code it was made with is installed, and if you trust the file, turn it into tensors first:

    import torch
    made = torch.load({name!r}, map_location="cpu", weights_only=False)   # runs whatever the file says
    # hsouri/BayesianTransferLearning: a SWAG object
    for kind, tensor in zip(("mean", "variance", "covmat"), made.get_space()):
        torch.save(tensor, f"my_prior_{{kind}}.pt")
    torch.save(made.base_model.state_dict(), "my_prior_model.pt")
    # swa_gaussian, or a whole model as *_model.pt
    torch.save({{"state_dict": made.state_dict()}}, "checkpoint.pt")"""


def _load(path: Path) -> Any:
    """The tensors of a file of torch.save, memory-mapped where it can be; no object is ever made."""
    try:
        _refuse_bombs(path)
        try:
            return _as_large_as_stored(torch.load(os.fspath(path), map_location="cpu", weights_only=True, mmap=True), path)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            value = torch.load(os.fspath(path), map_location="cpu", weights_only=True)  # the format before torch 1.6
            return _as_large_as_stored(value, path)
    except UnpicklingError as error:
        objects = sorted(set(re.findall(r"GLOBAL ([\w.]+)", str(error))))
        if not objects and "invalid load key" in str(error):
            raise PriorFormatError(f"{path.name} is no file that torch.save wrote, or is damaged: fetch it again.") from error
        raise PriorFormatError(
            f"{path.name} holds a pickled object ({', '.join(objects) or _first_line(error)}), not tensors alone. Reading one "
            f"runs code of the file's choosing: prior_hub never does.\n{_WAY_OUT.format(name=path.name)}"
        ) from error
    except PriorFormatError:
        raise
    except _UNREADABLE as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # a seek to nowhere, in a file that is cut
            raise
        raise PriorFormatError(
            f"{path.name} cannot be read ({_first_line(error)}): it is cut, damaged, or no file that torch.save wrote. Compare "
            "its size with the original's and fetch it again."
        ) from error


_UNREADABLE = (
    *(OSError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, AssertionError, ArithmeticError),
    *(struct.error, MemoryError, zipfile.BadZipFile),
)
_MOST_DIRECTORY = 12 * 2**20  # bytes of a zip archive's list of files: more than 100,000 tensors need
_MOST_PICKLED = 16 * 2**20  # bytes of what says how the tensors are made, in the format before torch 1.6
_MOST_STEPS = 500_000  # of it
_NEVER = (  # which torch would make: bytes as many as the file says, and tensors that are not dense
    *("builtins bytearray", "__builtin__ bytearray"),
    *("torch._utils _rebuild_sparse_tensor", "torch._utils _rebuild_nested_tensor", "torch._utils _rebuild_qtensor"),
)


def _refuse_bombs(path: Path) -> None:
    """Refuse a file that would take more memory or time than its size allows: compressed, or endless instructions.

    Nothing is unpickled: the steps of the pickle are counted.

    Raises:
        PriorFormatError: it is such a file.
        ValueError, BadZipFile: it is damaged.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if file.read(4) != b"PK\x03\x04":
            file.seek(0)
            return _count_steps(file.read(_MOST_PICKLED) or b"", path)
        file.seek(max(0, size - 66_000))
        tail = file.read(66_000) or b""
        at = tail.rfind(b"PK\x05\x06")
        directory: int = struct.unpack_from("<I", tail, at + 12)[0] if at >= 0 else 0
        if directory == 0xFFFFFFFF:
            where = tail.rfind(b"PK\x06\x06")
            directory = struct.unpack_from("<Q", tail, where + 40)[0] if where >= 0 else 0
    if directory > _MOST_DIRECTORY:
        raise PriorFormatError(
            f"{path.name} lists files in {directory} bytes, more than the {_MOST_DIRECTORY} tensors can need."
        )
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        held = sum(record.file_size for record in records)
        if held > size or any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise PriorFormatError(
                f"{path.name} is a compressed archive ({held} bytes in a file of {size}): torch.save compresses nothing. "
                "Unpack it if it holds the files, or fetch the original."
            )
        for record in records:
            if record.filename.endswith(".pkl"):
                if record.file_size > 2**20 + 1024 * len(records):
                    raise PriorFormatError(
                        f"{path.name} has {record.file_size} bytes of instructions for {len(records)} records: tensors need no "
                        f"more than {2**20 + 1024 * len(records)}."
                    )
                _count_steps(archive.read(record), path)
    return None


def _count_steps(data: bytes, path: Path) -> None:
    stream, steps = io.BytesIO(data), 0
    for _ in range(5):  # pickles, one behind the other, in the format before torch 1.6
        try:
            for step, argument, _place in pickletools.genops(stream):
                steps += 1
                if steps > _MOST_STEPS:
                    raise PriorFormatError(f"{path.name} has more than {_MOST_STEPS} instructions: tensors need no more.")
                if step.name in ("GLOBAL", "INST") and argument in _NEVER:
                    raise PriorFormatError(f"{path.name} asks for {argument.replace(' ', '.')}: only dense tensors are read.")
        except PriorFormatError:
            raise
        except (ValueError, LookupError, TypeError, ArithmeticError, MemoryError, struct.error):
            return  # torch says what is wrong with it; what it sees of it is as short as this


def _as_large_as_stored(value: Any, path: Path) -> Any:
    """The value, unless it has a tensor that claims more numbers than the file has (a stride of 0), or that has none at all."""
    stack = [value]
    seen = 0
    while stack:
        item = stack.pop()
        seen += 1
        if isinstance(item, Tensor) and (
            item.layout != torch.strided
            or item.is_meta
            or item.is_quantized
            or item.numel() * item.element_size() > item.untyped_storage().nbytes()
        ):
            raise PriorFormatError(
                f"{path.name} has a tensor of shape {list(item.shape)[:8]} that is not stored as so many numbers: expected "
                "dense tensors. Save it again with .contiguous()."
            )
        if isinstance(item, (Mapping, list, tuple)) and seen <= _MOST_STEPS:
            stack += item.values() if isinstance(item, Mapping) else item
        elif isinstance(item, (Mapping, list, tuple)):
            raise PriorFormatError(f"{path.name} nests more than {_MOST_STEPS} things: a list that contains itself, perhaps.")
    return value


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
