"""Two priors of the same network beside each other: how far apart are they, and in what?

    a: N(mu_a, S_a), S_a = A_a + U_a U_a^T, and b alike (gaussian.py);  P values in common, d = mu_a - mu_b

    distance under b   d^T S_b^-1 d                       a draw from b itself has P +- sqrt(2 P)
    KL(a||b)           1/2 (tr(S_b^-1 S_a) - P + d^T S_b^-1 d + log|S_b| - log|S_a|)      nats

Written so that nothing cancels, whatever the range of the variances. With D = A_a / A_b, X = A_b^-1/2 U_b, Y = A_b^-1/2 U_a,
e = A_b^-1/2 d, and h the diagonal of X (I + X^T X)^-1 X^T, between 0 and 1,

    2 KL(a||b) = sum (D - 1 - log D) - sum D h + |(I + X X^T)^-1/2 Y|^2 + |(I + X X^T)^-1/2 e|^2
                 + log|I + X^T X| - log|I + U_a^T A_a^-1 U_a|

[Y X e] = Q R is made piece by piece (R of the rows so far above the next ones, Demmel et al. 2012, section 2: TSQR), never as a
Gram matrix, whose condition is the square of R's. With the singular values s of R's columns of X all of it is small:
(I + X X^T)^-1 is 1 / (1 + s^2) in their directions. h needs a second reading. Memory: a few megabytes for each thread.

Angles between the spans of U_a and U_b are found from R of [U_a U_b], small ones by their sines, as cosines near 1 cannot tell
them apart (Bjoerck and Golub 1973; Knyazev and Argentati 2002, algorithm 3.1). Directions with less than 1e-12 of the largest
variance are the rounding of float32 and left out.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from prior_hub.errors import PriorMatchError, PriorNumericsError
from prior_hub.priors.blocks import MOST_THREADS, in_threads
from prior_hub.priors.config import PriorConfig
from prior_hub.priors.gaussian import LowRankGaussian
from prior_hub.priors.matching import Match, NameMap, match_names
from prior_hub.priors.profile import bytes_per_value, network_blocks, numbers, pieces, stored_bytes
from prior_hub.priors.tensor_files import progress

if TYPE_CHECKING:
    from prior_hub.model import PriorModel

__all__ = ["BlockComparison", "PriorComparison", "compare_priors"]

_T = TypeVar("_T")
_SMALL_CHUNK = 1 << 16  # entries, below which a thread is not worth waking
_LEAST = 1e-12  # of the largest variance along a direction
_SHOWN = 12  # blocks of the report
_SETTINGS = (
    *("base_model", "base_model_revision", "model_type", "rank", "scale", "diagonal_weight", "low_rank_weight", "eps"),
    *("variance_floor", "num_snapshots", "dtype", "license", "source", "estimator", "libraries", "prior_hub_version"),
)


@dataclass(frozen=True)
class BlockComparison:
    """One block of the network under both priors.

    Attributes:
        name: path of the module in the first prior, without what all names have in common.
        size: number of values.
        variance_ratio: total variance under the first prior / under the second.
        shift: root mean square of the difference of the means / of the standard deviation, that of both priors' mean variance.
    """

    name: str
    size: int
    variance_ratio: float
    shift: float


@dataclass(frozen=True)
class PriorComparison:
    """What `compare_priors` found; print it.

    Attributes:
        match: names of the first prior -> names of the second, and what is left over.
        num_parameters: P, values that both have.
        shares: share of the first prior's values, and of the second's, that are compared.
        settings: what the configurations say differently, name -> (first, second); None where one says nothing. Without
            the scale where both were compared at one.
        distance_under_a: (mu_a - mu_b)^T S_a^-1 (mu_a - mu_b), without unit: P for a draw from a itself.
        distance_under_b: the same under the second prior.
        kl_ab: KL(a||b) in nats.
        kl_ba: KL(b||a) in nats.
        angles: principal angles between the spans of the deviations in radians, smallest first; empty where one has none.
        overlap: share of the first prior's low-rank variance that lies in the second's directions, and of the second's in the
            first's; None where one has none.
        blocks: by block of the network, in order.
    """

    match: Match
    num_parameters: int
    shares: tuple[float, float]
    settings: Mapping[str, tuple[Any, Any]]
    distance_under_a: float
    distance_under_b: float
    kl_ab: float
    kl_ba: float
    angles: tuple[float, ...]
    overlap: tuple[float, float] | None
    blocks: tuple[BlockComparison, ...]

    @property
    def kl_symmetric(self) -> float:
        """The mean of both divergences in nats, half of Jeffreys' divergence."""
        return 0.5 * (self.kl_ab + self.kl_ba)

    def to_dict(self) -> dict[str, Any]:
        """Everything as numbers, texts, lists and dictionaries, for JSON; quantities per value beside their sums."""
        per_value = {
            f"{name}_per_value": getattr(self, name) / self.num_parameters
            for name in ("distance_under_a", "distance_under_b", "kl_ab", "kl_ba", "kl_symmetric")
        }
        return {
            "num_parameters": self.num_parameters,
            "num_tensors": len(self.match.pairs),
            "shares": list(self.shares),
            "names": {"strip": self.match.strip, "add": self.match.add},
            "only_in_a": [*self.match.marginalised, *self.match.excluded_head],
            "only_in_b": [name for name in self.match.new if name not in self.match.dropped.values()],
            "other_shape": dict(self.match.dropped),
            "settings": {name: list(values) for name, values in self.settings.items()},
            "distance_under_a": self.distance_under_a,
            "distance_under_b": self.distance_under_b,
            "kl_ab": self.kl_ab,
            "kl_ba": self.kl_ba,
            "kl_symmetric": self.kl_symmetric,
            **per_value,
            "angles": list(self.angles),
            "overlap": None if self.overlap is None else list(self.overlap),
            "blocks": [asdict(block) for block in self.blocks],
        }

    def __str__(self) -> str:
        """A report for a person: A is the first prior, B the second."""
        count = self.num_parameters
        prefix = f", names: {self.match.strip!r} -> {self.match.add!r}" if self.match.strip or self.match.add else ""
        lines = [
            f"compared: {len(self.match.pairs)} tensors, {count:,} values ({100 * self.shares[0]:.3g} % of A's, "
            f"{100 * self.shares[1]:.3g} % of B's){prefix}"
        ]
        if self.match.dropped:
            lines.append(f"left out, of another shape: {', '.join(self.match.dropped)}")
        lines += ["settings that differ (A | B):"] if self.settings else ["settings: the same"]
        lines += [f"  {name}: {_said(first)} | {_said(second)}" for name, (first, second) in self.settings.items()]
        lines += [
            "squared distance of the means in prior units, per value (1: as far as a draw from the prior itself):",
            f"  {self.distance_under_a / count:.3g} under A, {self.distance_under_b / count:.3g} under B "
            f"(in all {self.distance_under_a:.4g} and {self.distance_under_b:.4g})",
            "Kullback-Leibler divergence:",
            f"  KL(A||B) {self.kl_ab:.4g} nats ({self.kl_ab / count:.3g} per value), KL(B||A) {self.kl_ba:.4g} nats "
            f"({self.kl_ba / count:.3g} per value), mean {self.kl_symmetric:.4g} nats",
        ]
        if self.angles and self.overlap:
            degrees = [math.degrees(angle) for angle in self.angles]
            shown = ", ".join(f"{angle:.3g}" for angle in (degrees if len(degrees) <= 10 else [*degrees[:9], degrees[-1]]))
            cut = " (the 9 smallest and the largest)" if len(degrees) > 10 else ""
            lines += [
                f"low-rank parts: {len(degrees)} principal angles{cut} of {shown} degrees",
                f"  B's directions hold {100 * self.overlap[0]:.3g} % of A's low-rank variance, A's hold "
                f"{100 * self.overlap[1]:.3g} % of B's",
            ]
        else:
            lines.append("low-rank parts: one of the priors has none")
        ratios = sorted(block.variance_ratio for block in self.blocks)
        middle = statistics.median(ratios)
        lines.append(f"variance of A / variance of B by block: {ratios[0]:.3g} to {ratios[-1]:.3g}, median {middle:.3g}")
        most = sorted(self.blocks, key=lambda b: -abs(math.log(b.variance_ratio)))[:_SHOWN]
        chosen = [block for block in self.blocks if block in most]
        width = max(len(block.name) for block in chosen)
        lines += [f"  {b.name:<{width}}  {b.variance_ratio:<9.3g}  means {b.shift:.3g} sd apart" for b in chosen]
        if len(chosen) < len(self.blocks):
            lines.append(f"  (the {len(chosen)} of {len(self.blocks)} blocks that differ most in variance)")
        return "\n".join(lines)


def compare_priors(
    a: PriorModel,
    b: PriorModel,
    *,
    scale: float | None = None,
    name_map: NameMap | None = None,
    include_head: bool = False,
    min_coverage: float = 0.5,
) -> PriorComparison:
    """Compare two priors of the same network, exactly, over the values that both have; the rest is marginalised.

    Names may carry another prefix, as with a model; what has another shape is left out. Both priors are read twice, a few
    megabytes at a time; from 1 GB on with a progress bar. Exchanging the priors exchanges what is found.

    Args:
        a: the first prior.
        b: the second one.
        scale: compare both at this scale instead of each at its own.
        name_map: from names of `a` to names of `b`, as `match_names`.
        include_head: also compare the source task's head where both hold it.
        min_coverage: share of each prior's parameters, and of their values, that must be in the other.

    Returns:
        What was found.

    Raises:
        PriorMatchError: they are not of the same network; says what they have in common.
        PriorNumericsError: a variance is not positive, or a number is not finite.
    """
    match = _matched(a.config, b.config, name_map, include_head, min_coverage)
    first, second = a.gaussian.select(list(match.pairs)), b.gaussian.select(list(match.pairs.values()))
    if scale is not None:
        first, second = first.rescaled(scale), second.rescaled(scale)
    found = _Reading(first, second, match.pairs)
    count = first.num_parameters
    return PriorComparison(
        match=match,
        num_parameters=count,
        shares=(count / a.num_parameters, count / b.num_parameters),
        settings={k: v for k, v in _settings(a.config, b.config).items() if scale is None or k != "scale"},
        distance_under_a=found.under_a.distance,
        distance_under_b=found.under_b.distance,
        kl_ab=found.under_b.divergence(found.under_a),
        kl_ba=found.under_a.divergence(found.under_b),
        angles=found.angles,
        overlap=found.overlap,
        blocks=found.blocks(),
    )


def _matched(a: PriorConfig, b: PriorConfig, name_map: NameMap | None, include_head: bool, least: float) -> Match:
    head = () if include_head else b.head_parameters
    other = {name: shape for name, shape in b.parameters.items() if name not in head}
    try:
        if not other:
            raise PriorMatchError("the second has no parameters beside its head; pass include_head=True.")
        match = match_names(
            a.parameters,
            other,
            aliases={alias: name for alias, name in b.tied_parameters.items() if name in other},
            head_parameters=() if include_head else a.head_parameters,
            tied_parameters=a.tied_parameters,
            name_map=name_map,
            on_mismatch="drop",
            min_coverage=least,
        )
    except PriorMatchError as error:
        raise PriorMatchError(
            f"the two are not priors of the same network (the first is called the prior here, the second the model): {error}"
        ) from error
    total = sum(math.prod(shape) for shape in other.values())
    if match.covered_values < least * total or len(match.pairs) < least * len(other):
        raise PriorMatchError(
            f"the two are not priors of the same network: only {len(match.pairs)} of {len(other)} parameters of the second "
            f"({match.covered_values} of {total} values, min_coverage={least}) are in the first, which has no "
            f"{match.new[0]!r} of that shape. Pass a lower min_coverage if so small a part is meant."
        )
    return match


def _settings(a: PriorConfig, b: PriorConfig) -> dict[str, tuple[Any, Any]]:
    """Dotted name -> both values, where the configurations differ."""

    def flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(value, Mapping) and value:
            for key, inner in value.items():
                yield from flat(f"{name}.{key}", inner)
        elif not isinstance(value, Mapping):
            yield name, list(value) if isinstance(value, tuple) else value

    first, second = (dict(item for name in _SETTINGS for item in flat(name, getattr(c, name))) for c in (a, b))
    names = dict.fromkeys([*first, *second])
    return {n: (first.get(n), second.get(n)) for n in names if first.get(n) != second.get(n)}


def _said(value: Any) -> str:
    text = "not recorded" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class _Piece(NamedTuple):
    """Entries start to stop of a tensor, by its names in both priors."""

    name: str
    other: str
    start: int
    stop: int


class _Measured(NamedTuple):
    """Sums over some pieces.

    Attributes:
        plain: R of [U_a U_b].
        in_a: R of A_a^-1/2 [U_a U_b d].
        in_b: R of A_b^-1/2 [U_a U_b d].
        excess_a: sum of D - 1 - log D with D = A_b / A_a.
        excess_b: the same with D = A_a / A_b.
        by_name: a's name -> sums of the variance under a, under b, and of the squared difference of the means, (3,).
    """

    plain: Tensor
    in_a: Tensor
    in_b: Tensor
    excess_a: float
    excess_b: float
    by_name: dict[str, Tensor]


class _Reading:
    """Both Gaussians, read twice, by as many threads as torch may use; what is found does not depend on how many.

    Attributes:
        under_a: what is measured with a's covariance.
        under_b: the same with b's.
        angles: between the spans of the deviations.
        overlap: of their variances.
    """

    def __init__(self, a: LowRankGaussian, b: LowRankGaussian, pairs: Mapping[str, str]) -> None:
        self._a, self._b, self._pairs = a, b, pairs
        ranks = [g.rank if g._low_rank_scale() else 0 for g in (a, b)]
        self._of_a, self._of_b = slice(0, ranks[0]), slice(ranks[0], sum(ranks))
        self._sums: dict[str, Tensor] = {}
        chunks = self._chunks()
        plain, in_a, in_b = (torch.zeros(0, sum(ranks) + more, dtype=torch.float64) for more in (0, 1, 1))
        with progress(2 * (stored_bytes(a) + stored_bytes(b)), "Comparing") as advance:
            found = _each(chunks, lambda chunk: self._measure(chunk, advance))
            for part in found:
                plain, in_a, in_b = (
                    _stacked(r, more.T) for r, more in ((plain, part.plain), (in_a, part.in_a), (in_b, part.in_b))
                )
                for name, sums in part.by_name.items():
                    self._sums[name] = self._sums[name] + sums if name in self._sums else sums
            self.under_a = _Under(in_a, self._of_a, self._of_b, math.fsum(part.excess_a for part in found))
            self.under_b = _Under(in_b, self._of_b, self._of_a, math.fsum(part.excess_b for part in found))
            if sum(ranks):
                leverages = _each(chunks, lambda chunk: self._leverages(chunk, advance))
                self.under_a.leverage, self.under_b.leverage = (math.fsum(values) for values in zip(*leverages, strict=True))
        self.angles, self.overlap = _angles(plain[:, self._of_a], plain[:, self._of_b])

    def _chunks(self) -> list[list[_Piece]]:
        """All pieces in order, in 16 lists of about as many entries, or fewer: by their sizes alone."""
        rows = 3 * (self._a.rank + self._b.rank + 4)  # as they are, and under either
        share = max(_SMALL_CHUNK, self._a.num_parameters / MOST_THREADS)
        chunks: list[list[_Piece]] = [[]]
        held = 0
        for name, other in self._pairs.items():
            for start, stop in pieces(self._a.mean[name].numel(), rows):
                if held >= share:
                    chunks.append([])
                    held = 0
                chunks[-1].append(_Piece(name, other, start, stop))
                held += stop - start
        return chunks

    def _measure(self, chunk: list[_Piece], advance: Callable[[int], None]) -> _Measured:
        columns = sum(g.rank for g in (self._a, self._b) if g._low_rank_scale())
        plain, in_a, in_b = (torch.zeros(0, columns + more, dtype=torch.float64) for more in (0, 1, 1))
        excess_a = excess_b = 0.0
        by_name: dict[str, Tensor] = {}
        for piece in chunk:
            delta, of_a, of_b, rows = self._read(piece, advance)
            plain = _stacked(plain, rows)
            both = torch.cat([rows, delta.unsqueeze(0)])
            in_a, in_b = _stacked(in_a, both / of_a.sqrt()), _stacked(in_b, both / of_b.sqrt())
            excess_a += _excess(of_a, of_b)
            excess_b += _excess(of_b, of_a)
            explained = [rows[which].square().sum() for which in (self._of_a, self._of_b)]
            sums = torch.stack([of_a.sum() + explained[0], of_b.sum() + explained[1], delta.square().sum()])
            by_name[piece.name] = by_name[piece.name] + sums if piece.name in by_name else sums
        return _Measured(plain, in_a, in_b, excess_a, excess_b, by_name)

    def _leverages(self, chunk: list[_Piece], advance: Callable[[int], None]) -> tuple[float, float]:
        """sum D h under a, and under b."""
        under_a = under_b = 0.0
        for piece in chunk:
            _, of_a, of_b, rows = self._read(piece, advance)
            under_a += self.under_a.leverage_of(rows[self._of_a], of_a, of_b)
            under_b += self.under_b.leverage_of(rows[self._of_b], of_b, of_a)
        return under_a, under_b

    def _read(self, piece: _Piece, advance: Callable[[int], None]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Difference of the means (n,), both diagonals (n,), [U_a U_b]^T (K_a + K_b, n); float64."""
        name, other, start, stop = piece
        mean_a, of_a, rows_a = numbers(self._a, name, start, stop)
        mean_b, of_b, rows_b = numbers(self._b, other, start, stop)
        for gaussian, values, label in ((self._a, of_a, name), (self._b, of_b, other)):
            if not bool((values > 0).all()):
                raise PriorNumericsError(
                    f"the variance of {label!r} times scale {gaussian.scale:g} is not positive everywhere: "
                    "`prior-hub check` says where."
                )
        rows = [r.mul_(g._low_rank_scale()) for g, r in ((self._a, rows_a), (self._b, rows_b)) if r is not None]
        advance((stop - start) * (bytes_per_value(self._a, name) + bytes_per_value(self._b, other)))
        return mean_a.sub_(mean_b), of_a, of_b, torch.cat(rows) if rows else of_a.new_zeros(0, stop - start)

    def blocks(self) -> tuple[BlockComparison, ...]:
        """By block of a's names."""
        found = []
        for label, names in network_blocks(list(self._pairs)).items():
            sums = [self._sums[name] for name in names if name in self._sums]  # not of empty tensors
            if not sums:
                continue
            variance_a, variance_b, square = torch.stack(sums).sum(0).tolist()
            size = sum(self._a.mean[name].numel() for name in names)
            shift = math.sqrt(2 * square / (variance_a + variance_b))
            found.append(BlockComparison(label, size, variance_a / variance_b, shift))
        return tuple(found)


class _Under:
    """What is measured with one prior's covariance, S = A + U U^T: itself, and the other one.

    Attributes:
        distance: squared distance of the means.
        log_determinant: log |I + U^T A^-1 U|.
        leverage: sum D h, which a second reading sums up.
    """

    def __init__(self, factor: Tensor, own: slice, other: slice, excess: float) -> None:
        """From R of A^-1/2 [U_a U_b d], the columns of this prior and the other one, and the sum of D - 1 - log D."""
        if not torch.isfinite(factor).all():
            raise PriorNumericsError("a prior holds NaN or infinities. `prior-hub check` says where.")
        left, values, right = torch.linalg.svd(factor[:, own])
        weights = torch.ones(len(factor), dtype=torch.float64)  # of (I + X X^T)^-1 in the basis `left`
        weights[: len(values)] = 1 / (1 + values.square())
        coordinates = left.T @ factor
        self.distance = float((weights * coordinates[:, -1].square()).sum())
        self.log_determinant = float(values.square().log1p().sum())
        self._excess = excess
        self._other_rows = float((weights.unsqueeze(1) * coordinates[:, other].square()).sum())
        shrink = torch.ones(len(right), dtype=torch.float64)
        shrink[: len(values)] = (1 + values.square()).rsqrt()
        self._turn = shrink.unsqueeze(1) * right  # (K, K)
        self.leverage = 0.0

    def leverage_of(self, rows: Tensor, own: Tensor, other: Tensor) -> float:
        """sum D h over a piece: this prior's rows of U^T (K, n), diagonals (n,)."""
        return float((self._turn @ (rows * (other.sqrt() / own))).square_().sum())

    def divergence(self, other: _Under) -> float:
        """KL(other||this) in nats; rounding may leave an exact 0 a little below it."""
        of_diagonals = self._excess - self.leverage + self._other_rows
        return max(0.0, 0.5 * (of_diagonals + self.distance + self.log_determinant - other.log_determinant))


def _stacked(factor: Tensor, rows: Tensor) -> Tensor:
    """R of the columns whose R so far is `factor`, and of which `rows` (m, n), transposed, come next."""
    return torch.linalg.qr(torch.cat([factor.T, rows], dim=1).T, mode="r").R if len(rows) else factor


def _excess(own: Tensor, other: Tensor) -> float:
    """The sum of D - 1 - log D with D = other / own, exact where D is near 1."""
    beyond = (other - own) / own
    logarithm = torch.where(beyond.abs() < 0.5, beyond.log1p(), (other / own).log())
    return float((beyond - logarithm).sum())


def _each(chunks: Sequence[list[_Piece]], visit: Callable[[list[_Piece]], _T]) -> list[_T]:
    """What `visit` returns for each chunk, in their order, side by side."""
    results: dict[int, _T] = {}
    waiting = deque(range(len(chunks)))

    def work() -> None:
        with torch.no_grad():
            while True:
                try:
                    index = waiting.popleft()
                except IndexError:
                    return
                results[index] = visit(chunks[index])

    in_threads([work] * min(torch.get_num_threads(), len(chunks), MOST_THREADS), stop=waiting.clear)
    return [results[index] for index in range(len(chunks))]


def _angles(a: Tensor, b: Tensor) -> tuple[tuple[float, ...], tuple[float, float] | None]:
    """Principal angles between two spans of columns (m, K) in radians, smallest first; the share of each in the other."""
    bases = [_basis(columns) for columns in (a, b)]
    larger, smaller = sorted(bases, key=lambda basis: -basis.shape[1])
    if not smaller.shape[1]:
        return (), None
    shares = [float((q.T @ u).square().sum() / u.square().sum()) for u, q in zip((a, b), reversed(bases), strict=True)]
    cosines = torch.linalg.svdvals(larger.T @ smaller)  # largest first
    sines = torch.linalg.svdvals(smaller - larger @ (larger.T @ smaller)).flip(0)  # smallest first
    angles = torch.where(cosines.square() >= 0.5, sines.clamp(0, 1).asin(), cosines.clamp(0, 1).acos())
    return tuple(angles.tolist()), (min(1.0, shares[0]), min(1.0, shares[1]))


def _basis(columns: Tensor) -> Tensor:
    """An orthonormal basis of the span of columns (m, K), without directions that hold next to nothing."""
    left: Tensor
    left, values, _ = torch.linalg.svd(columns, full_matrices=False)
    return left[:, values.square() > _LEAST * values.square().max()] if values.numel() else left
