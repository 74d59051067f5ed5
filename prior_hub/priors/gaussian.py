"""Low-rank-plus-diagonal Gaussian over named parameters.

    theta[p], mean[p], variance[p]: (*shape_p)        deviations[p]: (K, *shape_p), row k = snapshot_k - final mean
    A     = scale * diagonal_weight * variance + eps                                  (*shape_p), the diagonal
    U     = sqrt(scale * low_rank_weight) * D^T                                       (P, K)
    Sigma = A + U U^T
    penalty(theta) = 1/2 (theta - mean)^T Sigma^-1 (theta - mean)                     nats

The penalty is evaluated as a sum of squares,

    z = (I + U^T A^-1 U)^-1 U^T A^-1 delta      r = delta - U z
    penalty = 1/2 (|A^-1/2 r|^2 + |z|^2)        gradient = A^-1 r

and never as Woodbury's difference delta^T A^-1 delta - |...|^2, whose two terms agree in most of their digits when the
deviations explain delta. As a function of z the sum of squares has its minimum at the exact z, so that rounding errors in
z enter the value only in second order. Elementwise work is float32 (float64 if the parameters are), in blocks that stay
in cache and are shared out among threads (blocks.py); K-vectors, the K x K factor and all sums over blocks are float64.

The same penalty taken as an implicit (backward Euler, proximal) step of length C = diag(step) has a closed form too,

    argmin_x 1/2 (x - theta)^T C^-1 (x - theta) + penalty(x)  =  mean + Sigma (Sigma + C)^-1 delta
                                                             =  mean + (A delta + C U z) / (A + C)
    z = (I + U^T (A + C)^-1 U)^-1 U^T (A + C)^-1 delta

each entry goes to a weighted mean of where it is and where the low-rank part expects it, which never overshoots, whatever
the precision, and in which nothing cancels.

Source: Shwartz-Ziv et al. 2022 (arXiv 2205.10279), section 3; Maddox et al. 2019 (arXiv 1902.02476), eq. 5-6 for the
SWAG weights diagonal_weight = 1/2, low_rank_weight = 1/(2(K-1)).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from prior_hub.errors import PriorMatchError, PriorNumericsError
from prior_hub.priors.blocks import DEVICE_BLOCK, Block, Scratch, blocks_of, part_length, sweep
from prior_hub.priors.fused import Tables, is_available, takes

__all__ = ["LowRankGaussian", "swag_weights"]

# Entries of a block where one thread does the work: below the size from which torch starts threads for one elementwise
# operation, whose barriers cost more than they bring.
_CPU_BLOCK = 1 << 14
_JOINED = 1 << 14  # entries of a tensor up to which it is joined with others
_PIECE = 1 << 10  # entries that one float32 sum runs over
_SMALL = 1 << 20  # K x P up to which an implicit step works in float64 throughout
_GRAM_COST = 0.1  # of U^T (A + C)^-1 U, in products with it, for each row (measured on CPU: 0.75 at K = 5, 1 to 2 at K = 20)
_KEPT = 1 << 22  # numbers of such matrices to keep: 32 MB

_Key = tuple[int, tuple[tuple[str, float], ...]]  # of a point on the grid of step lengths


def swag_weights(rank: int) -> tuple[float, float]:
    """(diagonal_weight, low_rank_weight) of SWAG's Gaussian with `rank` deviations; (1, 0) below two deviations."""
    return (0.5, 0.5 / (rank - 1)) if rank >= 2 else (1.0, 0.0)


class LowRankGaussian:
    """N(mean, Sigma) over named tensors; immutable, shares the memory of the tensors it is given.

    Values, gradients and step lengths may be on another device than the Gaussian, which then stays where it is: they are
    copied block by block.

    Args:
        mean: name -> (*shape).
        variance: name -> (*shape), positive (zero is allowed where `eps` > 0).
        deviations: name -> (K, *shape), the same K for all; `None` or empty for a diagonal Gaussian.
        scale: multiplies variances and deviations, not `eps`.
        diagonal_weight: weight of `variance` in the diagonal; SWAG's for K when None.
        low_rank_weight: weight of the deviations' outer products; SWAG's for K when None.
        eps: added to the diagonal after scaling.
        contributions: for sharded tensors, name -> weight of this rank's sums (1 / replicas); None on one process.
        sum_over_ranks: for sharded tensors, the in-place sum of a small float tensor over all ranks.

    Raises:
        PriorMatchError: names, shapes or ranks disagree.
        PriorNumericsError: scale, weights or eps are not finite, or negative.
    """

    def __init__(
        self,
        mean: Mapping[str, Tensor],
        variance: Mapping[str, Tensor],
        deviations: Mapping[str, Tensor] | None = None,
        *,
        scale: float = 1.0,
        diagonal_weight: float | None = None,
        low_rank_weight: float | None = None,
        eps: float = 0.0,
        contributions: Mapping[str, float] | None = None,
        sum_over_ranks: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.mean = {name: tensor.detach() for name, tensor in mean.items()}
        self.variance = {name: tensor.detach() for name, tensor in variance.items()}
        self.deviations = {name: tensor.detach() for name, tensor in (deviations or {}).items()}
        self.rank = _check_layout(self.mean, self.variance, self.deviations)
        if self.rank == 0:
            self.deviations = {}
        default_diagonal, default_low_rank = swag_weights(self.rank)
        self.scale = float(scale)
        self.diagonal_weight = float(default_diagonal if diagonal_weight is None else diagonal_weight)
        self.low_rank_weight = float(default_low_rank if low_rank_weight is None else low_rank_weight)
        self.eps = float(eps)
        for name, positive in (("scale", True), ("diagonal_weight", False), ("low_rank_weight", False), ("eps", False)):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0 or (positive and value == 0):
                wanted = "a finite number > 0" if positive else "a finite number >= 0"
                raise PriorNumericsError(f"{name} is {value}, expected {wanted}. For no prior at all pass prior=None.")
        self._largest: dict[tuple[int, int], float] = {}  # of largest_precision
        self._views: dict[Block, tuple[Tensor, ...]] = {}  # of _sweep: mean (n,), variance (n,), deviations (K, n)
        self._tables: Tables | None = None  # of _fused
        self._packed: tuple[_Packed] | None = None  # of _pack
        self._chunks: list[list[Block]] | None = None  # of _sweep
        self._parts: dict[Block, list[tuple[int, int, Tensor]]] = {}  # of _row_parts
        self._contributions = None if contributions is None else dict(contributions)
        self._sum = sum_over_ranks
        self._factor: Tensor | None = None
        self._count: float | None = None  # of _entries
        self._grams: dict[tuple[torch.dtype, *_Key], Tensor] = {}  # of _interpolated: (K, K), at the last grid points
        self._worn: tuple[Tensor, int] | None = None  # of _step_solution: (K, K) inverse, iterations since it was fresh

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: without views, each of which would be written with all it is a view of, and addresses."""
        return self.__dict__ | {"_views": {}, "_parts": {}, "_chunks": None, "_tables": None, "_packed": None}

    # ---------------------------------------------------------------------------------------------- shape and views

    @property
    def names(self) -> tuple[str, ...]:
        """Parameter names, in stored order."""
        return tuple(self.mean)

    @property
    def num_parameters(self) -> int:
        """P, the number of values under the Gaussian (on this rank)."""
        return sum(t.numel() for t in self.mean.values())

    def _with(self, **changes: Any) -> LowRankGaussian:
        settings: dict[str, Any] = {
            "mean": self.mean,
            "variance": self.variance,
            "deviations": self.deviations,
            "scale": self.scale,
            "diagonal_weight": self.diagonal_weight,
            "low_rank_weight": self.low_rank_weight,
            "eps": self.eps,
            "contributions": self._contributions,
            "sum_over_ranks": self._sum,
        }
        return LowRankGaussian(**(settings | changes))

    def rescaled(self, scale: float) -> LowRankGaussian:
        """The same Gaussian with `scale` in place of its own (not multiplied to it); shares all tensors."""
        return self._with(scale=scale)

    def select(self, names: list[str] | tuple[str, ...]) -> LowRankGaussian:
        """The marginal over `names`: all other rows are dropped before the K x K matrix is made."""
        return self._with(
            mean={n: self.mean[n] for n in names},
            variance={n: self.variance[n] for n in names},
            deviations={n: self.deviations[n] for n in names} if self.deviations else {},
            low_rank_weight=self.low_rank_weight,
        )

    def truncated(self, rank: int, *, weights: tuple[float, float] | None = None) -> LowRankGaussian:
        """Keep the first `rank` deviations (the most recent snapshots), re-weighted as the estimator would have.

        The weight of an outer product is proportional to 1/(K-1), so it is multiplied by (K-1)/(rank-1). Below two
        deviations there is no low-rank part, and a Gaussian with SWAG's own weights gives all variance to the diagonal.
        That is right for snapshots and wrong for principal directions, which a Gaussian cannot tell apart:
        `PriorModel.truncated` can.

        Args:
            rank: how many to keep.
            weights: (diagonal_weight, low_rank_weight) of what is kept, in place of those.

        Raises:
            ValueError: `rank` is negative or above the rank there is.
        """
        if not 0 <= rank <= self.rank:
            raise ValueError(f"rank {rank} is not between 0 and the prior's own rank {self.rank}.")
        if rank == self.rank:
            return self
        diagonal, low_rank = weights or truncated_weights(self.rank, rank, self.diagonal_weight, self.low_rank_weight)
        kept = {name: rows[:rank] for name, rows in self.deviations.items()} if rank else {}
        return self._with(deviations=kept, diagonal_weight=diagonal, low_rank_weight=low_rank)

    def principal(self, explained: float = 0.99, *, rank: int | None = None) -> LowRankGaussian:
        """The same Gaussian with its deviations turned into principal directions, and the least of them dropped.

        With D D^T = E diag(l) E^T (K x K, l_1 >= l_2 >= ..., float64) the rows of D' = E^T D are orthogonal, |d'_j|^2 = l_j,
        and D'^T D' = D^T D: a rotation of the rows changes nothing. Then the first rows are kept, the fewest that hold
        `explained` of the low-rank variance sum l_j. Weights, diagonal, scale and eps stay, so that the covariance along a
        kept direction is exact and what the low-rank part said of all others is gone; of all Gaussians with so few rows this
        one has the nearest low-rank part (Eckart and Young 1936). It needs the memory of the kept rows.

        A sharded Gaussian is turned by the same E on every rank: all ranks decompose the same sum.

        Args:
            explained: share of the low-rank variance to keep, 0 < explained <= 1.
            rank: how many directions to keep, 1 or more, in place of `explained`; for none at all see `truncated`.

        Returns:
            The Gaussian, row j of its deviations the j-th principal direction times its standard deviation / sqrt(scale b),
            b the low_rank_weight. Without low-rank variance no row is kept.

        Raises:
            ValueError: `explained` or `rank` is out of range.
            PriorNumericsError: the deviations hold NaN or infinities.
        """
        if not 0 < explained <= 1:
            raise ValueError(f"explained is {explained}, expected a share of the low-rank variance, above 0 and at most 1.")
        if rank is not None and not 1 <= rank <= self.rank:
            raise ValueError(
                f"rank {rank} is not between 1 and the prior's own rank {self.rank}; truncated(0) is the diagonal."
            )
        if not self.deviations:
            return self
        gram = self._products()
        if not torch.isfinite(gram).all():
            raise PriorNumericsError("the deviations hold NaN or infinities. `prior-hub check` says where.")
        values, vectors = torch.linalg.eigh(gram)
        values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
        if rank is None:
            held = (values if self._low_rank_scale() else torch.zeros_like(values)).cumsum(0)
            rank = min(self.rank, int((held < explained * held[-1]).sum()) + 1) if held[-1] > 0 else 0
        if rank == 0:
            return self._with(deviations={}, low_rank_weight=0.0)
        turned = {}
        for name, rows in self.deviations.items():
            out = torch.empty((rank, *rows.shape[1:]), dtype=rows.dtype, device=rows.device)
            turn = vectors[:, :rank].T.to(_accumulator(rows.device)).to(rows.device)
            for start, stop in self._blocks(name):
                out.view(rank, -1)[:, start:stop] = turn @ self._rows(name, start, stop, turn.dtype)
            turned[name] = out
        return self._with(deviations=turned)

    def diagonal_part(self) -> LowRankGaussian:
        """N(mean, A), without the low-rank part and without what it explains: a smaller Gaussian, not the marginal one."""
        return self._with(deviations={}, low_rank_weight=0.0)

    def to(self, device: torch.device | str) -> LowRankGaussian:
        """The same Gaussian with its tensors on `device`, in their own types."""
        return self._with(
            mean={n: t.to(device) for n, t in self.mean.items()},
            variance={n: t.to(device) for n, t in self.variance.items()},
            deviations={n: t.to(device) for n, t in self.deviations.items()},
        )

    # ---------------------------------------------------------------------------------------------------- evaluation

    def penalty(self, theta: Mapping[str, Tensor]) -> Tensor:
        """1/2 (theta - mean)^T Sigma^-1 (theta - mean), in nats: a 0-d float64 tensor, differentiable in `theta`.

        Args:
            theta: name -> (*shape) for every name of the Gaussian; other names are ignored.

        Raises:
            PriorMatchError: a name is missing or a shape differs.
        """
        tensors = [theta[name] for name in self._checked_names(theta)]
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            value: Tensor = _PenaltyFunction.apply(self, *tensors)
            return value
        return self._evaluate(dict(zip(self.names, tensors, strict=True)))

    def penalty_and_gradient(self, theta: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The penalty (0-d float64, nats) and its gradient Sigma^-1 (theta - mean), name -> (*shape), without autograd."""
        flat: dict[str, Tensor] = {}
        for name in self._checked_names(theta):
            mean = self.mean[name]
            flat[name] = torch.zeros(mean.numel(), dtype=self._work_type(theta[name], name), device=theta[name].device)
        with torch.no_grad():
            value = self._evaluate(theta, flat)
        return value, {name: values.view(theta[name].shape) for name, values in flat.items()}

    def add_gradient_(self, theta: Mapping[str, Tensor], into: Mapping[str, Tensor], factor: float | Tensor) -> Tensor:
        """Add `factor` * gradient to `into[name]` (*shape) in place, for the names in `into`; returns the penalty.

        No gradient-sized temporary is made. Names of the Gaussian missing from `into` are conditioned on: they count in
        the penalty and get no gradient.
        """
        self._checked_names(theta)
        for name, out in into.items():
            if name not in self.mean or out.shape != self.mean[name].shape:
                raise PriorMatchError(f"cannot write the gradient of {name!r}: no such parameter, or another shape.")
        _refuse_shared_memory(into)
        flat = {name: out.reshape(-1) for name, out in into.items()}  # a copy where `out` is not contiguous
        with torch.no_grad():
            value = self._evaluate(theta, flat, factor)
            for name, out in into.items():
                if not out.is_contiguous():  # e.g. channels_last gradients
                    out.copy_(flat[name].view(out.shape))
        return value

    def proximal_step_(self, theta: Mapping[str, Tensor], step: Mapping[str, float | Tensor]) -> Tensor:
        """theta <- mean + Sigma (Sigma + C)^-1 (theta - mean) in place, C = diag(step): the implicit step of the penalty.

        It minimises 1/2 (x - theta)^T C^-1 (x - theta) + penalty(x), so it is stable for every step and precision, and it
        leaves a weight where the penalty's gradient is zero. No temporary of the size of theta or of a deviation is made.

        Args:
            theta: name -> (*shape) for every name of the Gaussian, changed in place.
            step: name -> step length c >= 0 in units of weight^2 per nat, a number, a 0-d tensor or (*shape). Names that
                are missing have step 0: they are conditioned on and stay where they are.

        Returns:
            The penalty at the new theta in nats, 0-d float64, a by-product: with y = Sigma^-1 (new theta - mean) it is
            1/2 (|A^1/2 y|^2 + |z|^2). It is that of the new theta before it is rounded to its own type.

        Raises:
            PriorMatchError: a name is missing or a shape differs.
            ValueError: a number is negative, above 1e300 or NaN.
        """
        self._checked_names(theta)
        for name, length in step.items():
            known = name in self.mean
            check_length(name, length)
            if not known or (isinstance(length, Tensor) and length.ndim and length.shape != self.mean[name].shape):
                raise PriorMatchError(f"cannot step {name!r}: no such parameter, or the step has another shape.")
        _refuse_shared_memory({name: theta[name] for name in step})
        device = self._device()
        # flat once: a tensor in channels_last would be copied for every block; and a step of 0 leaves a weight alone
        lengths = {n: c.reshape(-1) if isinstance(c, Tensor) and c.ndim else c for n, c in step.items()}
        lengths = {n: c for n, c in lengths.items() if isinstance(c, Tensor) or c != 0}
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            if not lengths:
                return self._evaluate(theta)
            # joined tensors of different lengths take another path: ranks, which hold different ones, would part ways
            packed = self._pack() if self._sum is None else None
            return self._step(theta, lengths, device) if packed is None else packed.step_(theta, lengths, device)

    def _step(self, theta: Mapping[str, Tensor], step: dict[str, float | Tensor], device: torch.device) -> Tensor:
        accumulator = _accumulator(device)
        low_rank = self._low_rank_scale()
        z = self._step_solution(theta, step, device) if low_rank else torch.zeros(0, dtype=accumulator, device=device)
        flat = {name: theta[name].detach().reshape(-1) for name in self.names}  # a copy where not contiguous
        combination = {dtype: (low_rank * z).to(dtype) for dtype in {self._work_type(flat[n], n) for n in self.names}}

        def move(block: Block, scratch: Scratch, total: Tensor) -> None:
            name, dtype = block.name, self._work_type(flat[block.name], block.name)
            delta = self._offset(block, flat[name], scratch, dtype)
            diagonal = self._scaled_variance(block, scratch, dtype)
            length = _block(step.get(name, 0.0), block.start, block.stop, dtype, device)
            whole = torch.add(diagonal, length, out=scratch.take("whole", delta.shape, dtype))
            expected = scratch.take("expected", delta.shape, dtype).zero_()
            if low_rank:
                self._combine(block, combination[dtype], expected, scratch)
            gradient = torch.sub(delta, expected, out=scratch.take("gradient", delta.shape, dtype)).div_(whole)
            weighted = torch.mul(gradient, diagonal, out=scratch.take("weighted", delta.shape, dtype))
            self._add_weighted(total, _dot(gradient, weighted), name)
            if name in step:
                moved = delta.mul_(diagonal).add_(expected.mul_(length)).div_(whole)
                flat[name][block.start : block.stop] = moved.add_(self._views[block][0])

        tables = self._fused([*flat.values(), *(c for c in step.values() if isinstance(c, Tensor))])
        total = tables.move_(flat, low_rank * z if low_rank else None, step) if tables else self._sweep(move, ())
        for name in step:
            if not theta[name].is_contiguous():  # e.g. channels_last weights
                theta[name].copy_(flat[name].view(theta[name].shape))
        if self._sum is not None:
            self._sum(total)
        return 0.5 * (total + z.square().sum())

    def _step_solution(self, theta: Mapping[str, Tensor], step: Mapping[str, float | Tensor], device: torch.device) -> Tensor:
        """z of the implicit step: (I + U^T (A + C)^-1 U) z = U^T (A + C)^-1 delta, (K,).

        The K x K matrix of this C costs more than a few passes over the deviations, and C changes with every learning rate.
        So the system is solved by conjugate gradients, at one pass per iteration, with the inverse of a matrix near by:

        - numbers: of U^T (A + C)^-1 U interpolated between learning rates on a fixed grid, whose matrices are kept. It is
          within 1e-3 of the true one in every direction (see `_grid`), so that two iterations bring six to seven digits.
        - tensors (Adam's): of the matrix of an earlier step, made anew when the iterations that it costs have added up to
          what a new one takes.

        Where that does not settle, because float32 is too coarse or an earlier matrix too far away, all is done once more
        in the accumulator's type with the matrix of this C. Every rank of a sharded Gaussian takes the same path: what
        decides are lengths, which are the same on all, and sums over the ranks.
        """
        accumulator, low_rank = _accumulator(device), self._low_rank_scale()
        small = self.rank * self._entries() <= _SMALL  # then all in float64: it costs nothing
        work = accumulator if small else self._elementwise(theta)

        flat = {name: theta[name].detach().reshape(-1) for name in self.names}
        given = [*flat.values(), *(c for c in step.values() if isinstance(c, Tensor))]

        def denominator(block: Block, at: Mapping[str, float | Tensor], scratch: Scratch, dtype: torch.dtype) -> Tensor:
            """A + C of a block."""
            length = _block(at.get(block.name, 0.0), block.start, block.stop, dtype, device)
            return self._scaled_variance(block, scratch, dtype).add_(length)

        def summed(local: Tensor) -> Tensor:
            return local if self._sum is None else self._sum(local)

        def right_side(dtype: torch.dtype, tables: Tables | None) -> Tensor:
            """U^T (A + C)^-1 delta, (K,)."""

            def visit(block: Block, scratch: Scratch, total: Tensor) -> None:
                offset = self._offset(block, flat[block.name], scratch, dtype)
                self._project(block, offset.div_(denominator(block, step, scratch, dtype)), total, scratch)

            return low_rank * summed(tables.project(flat, step) if tables else self._sweep(visit, (self.rank,)))

        def through(vector: Tensor, dtype: torch.dtype, tables: Tables | None) -> Tensor:
            """(I + U^T (A + C)^-1 U) vector."""
            combination = vector.to(dtype)

            def visit(block: Block, scratch: Scratch, total: Tensor) -> None:
                whole = denominator(block, step, scratch, dtype)
                weight = self._weight(block.name)
                for start, stop, rows in self._row_parts(block, scratch, dtype, copied=True):  # read once, then in cache
                    image = torch.mv(rows.T, combination, out=scratch.take("image", (stop - start,), dtype))
                    total.add_(torch.mv(rows, image.div_(whole[start:stop])), alpha=weight)

            out = summed(tables.through(vector, step) if tables else self._sweep(visit, (self.rank,)))
            return vector + low_rank**2 * out

        def gram(at: Mapping[str, float | Tensor], dtype: torch.dtype) -> Tensor:
            """U^T (A + C)^-1 U at one C, (K, K)."""

            def visit(block: Block, scratch: Scratch, total: Tensor) -> None:
                self._add_gram(block, denominator(block, at, scratch, dtype), total, scratch)

            found = summed(self._sweep(visit, (self.rank, self.rank)))
            return (0.5 * low_rank**2) * (found + found.T)

        def solved(dtype: torch.dtype, inverse: Tensor | None, tables: Tables | None = None) -> tuple[Tensor, int | None]:
            right = right_side(dtype, tables)
            if inverse is None or not torch.isfinite(right).all():  # of weights or lengths that are not
                return torch.full_like(right, math.nan), None
            tolerance = 1e-13 if dtype == torch.float64 else 1e-7
            return _conjugate_gradients(lambda v: through(v, dtype, tables), right, inverse, tolerance)

        numbers = {name: length for name, length in step.items() if not isinstance(length, Tensor)}
        worn = self._worn  # once: another thread may step too
        if len(numbers) == len(step):
            inverse, worn = _inverse(self._interpolated(numbers, work, lambda at: gram(at, work))), None
        else:
            if worn is None and (made := _inverse(gram(step, work))) is not None:
                worn = (made, 0)
            inverse = None if worn is None else worn[0]
        solution, iterations = solved(work, inverse, None if small else self._fused(given))
        if iterations is None:
            inverse = _inverse(gram(step, accumulator))
            solution, _ = solved(accumulator, inverse)
            worn = None if worn is None or inverse is None else (inverse, 0)
        elif worn is not None:
            spent = worn[1] + max(0, iterations - (4 if work == torch.float64 else 2))  # which it takes with a fresh one
            worn = (worn[0], spent) if spent <= self.rank * _GRAM_COST else None
        self._worn = worn
        return solution

    def _interpolated(
        self, step: Mapping[str, float], dtype: torch.dtype, gram: Callable[[Mapping[str, float]], Tensor]
    ) -> Tensor:
        """U^T (A + C)^-1 U at C = diag(step), to 1e-3 of itself in every direction, from its values at three points near by.

        Those of the last points are kept: a schedule goes on to the next one, and clipping jumps between many.
        """
        known = self._grams  # once: another thread may step too
        points = [((dtype, *key), lengths, weight) for key, lengths, weight in _grid(step)]
        used = {key: known[key] if key in known else gram(lengths) for key, lengths, _ in points}
        kept = {key: found for key, found in known.items() if key not in used} | used  # the last used last
        most = max(3, min(64, _KEPT // self.rank**2))
        self._grams = dict(list(kept.items())[-most:])
        return torch.stack([weight * used[key] for key, _, weight in points]).sum(0)

    def _elementwise(self, theta: Mapping[str, Tensor]) -> torch.dtype:
        """The type of the elementwise work."""
        found = torch.float32
        for name, mean in self.mean.items():
            found = torch.promote_types(found, torch.promote_types(theta[name].dtype, mean.dtype))
        return found

    def log_prob(self, theta: Mapping[str, Tensor]) -> Tensor:
        """log N(theta; mean, Sigma) in nats, normalised: a 0-d float64 tensor, differentiable in `theta`."""
        return -self.penalty(theta) - 0.5 * (self.log_determinant() + self._total_entries() * math.log(2 * math.pi))

    def log_determinant(self) -> Tensor:
        """log |Sigma| in nats: sum log A + log |I + U^T A^-1 U|, a 0-d float64 tensor."""
        device = self._device()
        total = torch.zeros((), dtype=_accumulator(device), device=device)
        for name in self.names:
            weight = self._weight(name)
            for start, stop in self._blocks(name):
                total += weight * self._diagonal(name, start, stop, total.dtype).log().sum()
        if self._sum is not None:
            self._sum(total)
        factor = self._cholesky()
        if factor is not None:
            total = total + 2 * factor.diagonal().log().sum()
        return total

    def sample(self, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """One draw: name -> (*shape), mean + A^1/2 noise + U noise_K.

        The K-vector of noise is drawn once per sample and shared by every parameter tensor; drawing it per tensor would
        lose the covariance between layers.
        """
        if self._sum is not None:
            raise NotImplementedError("Sampling from a sharded Gaussian is not supported; sample from the full prior.")
        device = generator.device if generator is not None else self._device()
        shared = torch.randn(self.rank, dtype=_accumulator(device), device=device, generator=generator)
        shared = shared.to(dtype=_accumulator(self._device())).to(self._device())

        def white(name: str) -> Tensor:
            mean = self.mean[name]
            dtype = torch.promote_types(mean.dtype, torch.float32)
            return torch.randn(mean.shape, dtype=dtype, device=device, generator=generator).to(mean.device)

        noise = self.coloured_noise(white, shared)
        return {name: self.mean[name] + noise[name] for name in self.names}

    def coloured_noise(self, white: Callable[[str], Tensor], shared: Tensor) -> dict[str, Tensor]:
        """Sigma^1/2 noise: A^1/2 white + U shared, which has covariance Sigma and mean zero where both are standard normal.

        Args:
            white: called once for every name, in order, gives standard normal noise of its (local) shape.
            shared: (K,) standard normal, one vector for all parameters, the same on every rank.

        Returns:
            name -> (*shape).
        """
        low_rank = self._low_rank_scale()
        draw: dict[str, Tensor] = {}
        with torch.autocast(self._device().type, enabled=False):
            for name in self.names:
                noise = white(name)
                out = torch.empty(noise.numel(), dtype=noise.dtype, device=noise.device)
                for start, stop in self._blocks(name):
                    block = noise.reshape(-1)[start:stop] * self._diagonal(name, start, stop, noise.dtype).sqrt()
                    if low_rank:
                        block += (low_rank * shared).to(noise.dtype) @ self._rows(name, start, stop, noise.dtype)
                    out[start:stop] = block
                draw[name] = out.view(noise.shape)
        return draw

    def covariance_product(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sigma v = A v + U U^T v: what turns a gradient into a step in the Gaussian's own metric; no solve, two reads of D.

        Args:
            vectors: name -> (*shape) for every name of the Gaussian (this rank's shards of sharded ones).

        Returns:
            name -> (*shape), float32 or wider.

        Raises:
            PriorMatchError: a name is missing or a shape differs.
        """
        self._checked_names(vectors)
        low_rank, device = self._low_rank_scale(), self._device()
        flat = {name: vectors[name].detach().reshape(-1) for name in self.names}
        types = {name: torch.promote_types(tensor.dtype, torch.float32) for name, tensor in flat.items()}
        product = {name: torch.empty(t.numel(), dtype=types[name], device=device) for name, t in flat.items()}

        def vector(block: Block, scratch: Scratch) -> Tensor:
            values = flat[block.name][block.start : block.stop]
            dtype = types[block.name]
            return (
                values
                if values.dtype == dtype and values.device == device
                else scratch.take("vector", values.shape, dtype).copy_(values)
            )

        def project(block: Block, scratch: Scratch, total: Tensor) -> None:
            self._project(block, vector(block, scratch), total, scratch)

        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            inner = torch.zeros(self.rank, dtype=_accumulator(device), device=device)
            if low_rank:
                inner = self._sweep(project, (self.rank,))
                inner = inner if self._sum is None else self._sum(inner)
            combination = {dtype: (low_rank**2 * inner).to(dtype) for dtype in set(types.values())}

            def write(block: Block, scratch: Scratch, total: Tensor) -> None:
                del total
                dtype, out = types[block.name], product[block.name][block.start : block.stop]
                torch.mul(self._scaled_variance(block, scratch, dtype), vector(block, scratch), out=out)
                if low_rank:
                    self._combine(block, combination[dtype], out, scratch)

            self._sweep(write, ())
        return {name: out.view(vectors[name].shape) for name, out in product.items()}

    def conditional(self, given: Mapping[str, Tensor]) -> LowRankGaussian:
        """The Gaussian over the other names, given the values of some: what a prior says once a part of the model is frozen.

        With G the given names, L L^T = (I + U_G^T A_G^-1 U_G)^-1 and m = L L^T U_G^T A_G^-1 delta_G, the others keep their
        diagonal, their mean moves by U m, and U becomes U L.

        Args:
            given: name -> (*shape), some of the names but not all.

        Raises:
            PriorMatchError: a name that is unknown, all of them, or another shape.
        """
        for name, value in given.items():
            if name not in self.mean or value.shape != self.mean[name].shape:
                raise PriorMatchError(f"cannot condition on {name!r}: no such parameter, or its value has another shape.")
        rest = [name for name in self.names if name not in given]
        if not rest:
            raise PriorMatchError("all parameters of the prior are given: nothing is left of it.")
        if not given:
            return self
        if not self._low_rank_scale():
            return self.select(rest)
        known, low_rank = self.select([name for name in self.names if name in given]), self._low_rank_scale()
        accumulator, device = _accumulator(self._device()), self._device()
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            right = torch.zeros(self.rank, dtype=accumulator, device=device)
            for name in known.names:
                flat = given[name].detach().reshape(-1)
                for start, stop in known._blocks(name):
                    delta, diagonal = known._delta(name, flat, start, stop, accumulator)
                    right += self._weight(name) * (known._rows(name, start, stop, accumulator) @ (delta / diagonal))
            right = low_rank * (right if self._sum is None else self._sum(right))
            factor = known._factorised(known._gram(accumulator))
            shift = torch.cholesky_solve(right[:, None], factor)[:, 0]
            # (C C^T)^-1 = L L^T with L = C^-T, so that the rows become L^T D = C^-1 D
            mean, deviations = {}, {}
            for name in rest:
                rows = self.deviations[name].reshape(self.rank, -1).to(accumulator)
                own = self.mean[name].to(accumulator)
                mean[name] = (own + (low_rank * shift @ rows).view(own.shape)).to(self.mean[name].dtype)
                mixed = torch.linalg.solve_triangular(factor, rows, upper=False)
                deviations[name] = mixed.view(self.deviations[name].shape).to(self.deviations[name].dtype)
        return self._with(mean=mean, variance={n: self.variance[n] for n in rest}, deviations=deviations)

    def marginal_variance(self) -> dict[str, Tensor]:
        """The diagonal of Sigma, name -> (*shape)."""
        low_rank = self._low_rank_scale()
        result: dict[str, Tensor] = {}
        for name, mean in self.mean.items():
            dtype = torch.promote_types(mean.dtype, torch.float32)
            out = torch.empty(mean.numel(), dtype=dtype, device=mean.device)
            for start, stop in self._blocks(name):
                out[start:stop] = self._diagonal(name, start, stop, dtype)
                if low_rank:
                    out[start:stop] += (low_rank * self._rows(name, start, stop, dtype)).square().sum(0)
            result[name] = out.view(mean.shape)
        return result

    def largest_precision(self, *, iterations: int = 20, seed: int = 0) -> float:
        """The largest eigenvalue of Sigma^-1, by Lanczos iteration (from below; within a few per cent), found once.

        This is the stiffest curvature the penalty has: gradient descent on penalty / N is stable only while
        learning rate * largest_precision / N < 2.

        Args:
            iterations: at most so many, each as costly as a gradient; it stops when the estimate grows by less than 0.1 %.
            seed: of the start vector.
        """
        key = (iterations, seed)
        if key not in self._largest:
            self._largest[key] = self._lanczos(iterations, torch.Generator().manual_seed(seed))
        return self._largest[key]

    def _flat(self) -> LowRankGaussian:
        """The same covariance around zero, every tensor flat; a mean would round what is added to it."""
        flat = self._with(
            mean={n: torch.zeros(1, dtype=t.dtype, device=t.device).expand(t.numel()) for n, t in self.mean.items()},
            variance={n: t.reshape(-1) for n, t in self.variance.items()},
            deviations={n: t.reshape(self.rank, -1) for n, t in self.deviations.items()},
        )
        flat._factor = self._cholesky()
        return flat

    def _lanczos(self, iterations: int, generator: torch.Generator) -> float:
        """The largest Ritz value of Sigma^-1, v, Sigma^-1 v, ... (Golub and Van Loan, section 10.1).

        Differs: not orthogonalised anew, which gives copies of the largest value and leaves it what it is.
        """
        flat = self._flat()
        vector = {name: flat._unit_start(name, generator) for name in flat.names}
        previous: dict[str, Tensor] = {}
        for _ in range(2):  # lean to where the diagonal is small: iterations that cost nothing
            for name, tensor in vector.items():
                for start, stop in flat._blocks(name):
                    tensor[start:stop] /= flat._diagonal(name, start, stop, tensor.dtype)
            norm = flat._norm(vector)
            if norm == 0.0:
                return 0.0
            for tensor in vector.values():
                tensor /= norm
        diagonal: list[float] = []  # of T = V^T Sigma^-1 V, tridiagonal,
        beside: list[float] = []  # and what stands beside it
        estimate = 0.0
        for step in range(iterations):
            value, image = flat.penalty_and_gradient(vector)
            diagonal.append(2 * value.item())
            last, estimate = estimate, _largest_eigenvalue(diagonal, beside)
            if step >= 3 and estimate - last < 1e-3 * estimate:
                break
            for name, tensor in image.items():
                tensor -= diagonal[-1] * vector[name]
                if previous:
                    tensor -= beside[-1] * previous[name]
            norm = flat._norm(image)
            if norm < 1e-5 * estimate:  # all there is, up to rounding
                break
            for tensor in image.values():
                tensor /= norm
            beside.append(norm)
            previous, vector = vector, image
        return estimate

    def spectrum(self) -> list[float]:
        """The K eigenvalues of the low-rank part U U^T, largest first: variance along its principal directions."""
        if not self._low_rank_scale():
            return []
        values = torch.linalg.eigvalsh(self._products())
        return [max(0.0, float(value)) * self.scale * self.low_rank_weight for value in values.flip(0)]

    def _products(self) -> Tensor:
        """D D^T over all ranks, (K, K), float64, on the CPU."""
        device = self._device()
        dtype = _accumulator(device)
        gram = torch.zeros(self.rank, self.rank, dtype=dtype, device=device)
        for name in self.names:
            for start, stop in self._blocks(name):
                rows = self._rows(name, start, stop, dtype)
                gram += self._weight(name) * rows @ rows.T
        return (gram if self._sum is None else self._sum(gram)).double().cpu()

    def diagonal_precision(self) -> float:
        """The sum of 1 / A over all entries: tr(Sigma^-1) from above; the K low-rank directions lower it a little."""
        accumulator = _accumulator(self._device())
        total = torch.zeros((), dtype=accumulator, device=self._device())
        for name in self.names:
            for start, stop in self._blocks(name):
                total += self._weight(name) * self._diagonal(name, start, stop, accumulator).reciprocal().sum()
        return float(total if self._sum is None else self._sum(total))

    def _unit_start(self, name: str, generator: torch.Generator) -> Tensor:
        """Noise of unit variance, flat, from the CPU's generator."""
        mean = self.mean[name]
        dtype = torch.promote_types(mean.dtype, torch.float32)
        return torch.randn(mean.numel(), generator=generator, dtype=dtype).to(mean.device)

    def _norm(self, vectors: Mapping[str, Tensor]) -> float:
        """The 2-norm of flat tensors over all ranks."""
        device = self._device()
        total = torch.zeros((), dtype=_accumulator(device), device=device)
        for name, vector in vectors.items():
            for start, stop in self._blocks(name):
                total += self._weight(name) * vector[start:stop].to(total.dtype).square().sum()
        if self._sum is not None:
            self._sum(total)
        return math.sqrt(total.item())

    # -------------------------------------------------------------------------------------------------------- checks

    def check(self) -> None:
        """Read every value once.

        Raises:
            PriorNumericsError: a value is NaN or infinite, or an entry of the diagonal is not positive; names the
                parameter and counts the entries.
        """
        for kind, tensors in (("mean", self.mean), ("variance", self.variance), ("deviations", self.deviations)):
            for name, tensor in tensors.items():
                check_finite(f"{kind} of {name!r}", tensor)
        self.check_positive()

    def check_positive(self) -> None:
        """Raise `PriorNumericsError` if an entry of the diagonal A is not positive."""
        for name, tensor in self.variance.items():
            if not tensor.numel():
                continue
            smallest, largest = torch.aminmax(tensor)  # one pass, and nothing of the tensor's size
            if smallest.isnan():
                check_finite(f"variance of {name!r}", tensor)
            if smallest < 0 or (smallest == 0 and self.eps == 0):
                wrong = "< 0" if self.eps > 0 else "<= 0"
                bad = int((tensor < 0 if self.eps > 0 else tensor <= 0).sum())
                raise PriorNumericsError(
                    f"variance of {name!r} has {bad} of {tensor.numel()} entries {wrong} (smallest "
                    f"{smallest.item():.3e}). Parameters that never moved, or too few snapshots, give this: "
                    "collect more, or pass variance_floor."
                )
            smallest = smallest.to(torch.promote_types(tensor.dtype, torch.float32))
            diagonal = smallest * (self.scale * self.diagonal_weight) + self.eps
            if not diagonal >= torch.finfo(diagonal.dtype).tiny:
                raise PriorNumericsError(
                    f"scale {self.scale:g} x diagonal_weight {self.diagonal_weight:g} x the smallest variance of {name!r}, "
                    f"{smallest.item():.3e}, + eps {self.eps:g} is {diagonal.item():.3e}: not a positive number that "
                    f"{str(diagonal.dtype).removeprefix('torch.')} can hold. Use a larger scale or eps."
                )
            diagonal = largest.to(diagonal.dtype) * (self.scale * self.diagonal_weight) + self.eps
            if not diagonal.isfinite():
                raise PriorNumericsError(
                    f"scale {self.scale:g} x diagonal_weight {self.diagonal_weight:g} x the largest variance of {name!r}, "
                    f"{largest.item():.3e}, + eps {self.eps:g} is more than {str(diagonal.dtype).removeprefix('torch.')} can "
                    "hold. Use a smaller scale or eps."
                )

    # ----------------------------------------------------------------------------------------------------- internals

    def _evaluate(
        self, theta: Mapping[str, Tensor], into: Mapping[str, Tensor] | None = None, share: float | Tensor = 1.0
    ) -> Tensor:
        """The penalty; adds share * gradient to `into`, name -> (n,), flat and contiguous."""
        device = self._device()
        with torch.autocast(device.type, enabled=False):  # an autocast region around us would multiply in bfloat16
            if (packed := self._pack()) is not None:
                return packed.evaluate(theta, into or {}, share, self._cholesky())
            return self._evaluate_in_full(theta, into or {}, share, device)

    def _evaluate_in_full(
        self, theta: Mapping[str, Tensor], into: Mapping[str, Tensor], share: float | Tensor, device: torch.device
    ) -> Tensor:
        share = share.to(device) if isinstance(share, Tensor) else share
        accumulator = _accumulator(device)
        low_rank = self._low_rank_scale()
        factor = self._cholesky()
        flat = {name: theta[name].detach().reshape(-1) for name in self.names}
        tables = self._fused([*flat.values(), *into.values()])
        z = torch.zeros(self.rank, dtype=accumulator, device=device)
        if factor is not None:

            def project(block: Block, scratch: Scratch, total: Tensor) -> None:
                """U^T A^-1 delta, without the factor of U."""
                dtype = self._work_type(flat[block.name], block.name)
                scaled = self._offset(block, flat[block.name], scratch, dtype)
                scaled.div_(self._scaled_variance(block, scratch, dtype))
                self._project(block, scaled, total, scratch)

            z = tables.project(flat) if tables else self._sweep(project, (self.rank,))
            if self._sum is not None:
                self._sum(z)
            z = torch.cholesky_solve((low_rank * z).unsqueeze(1), factor).squeeze(1)
        combination = {dtype: (low_rank * z).to(dtype) for dtype in {self._work_type(flat[n], n) for n in self.names}}

        def residual_and_gradient(block: Block, scratch: Scratch, total: Tensor) -> None:
            """r = delta - U z and A^-1 r, and what r adds to the penalty."""
            dtype = self._work_type(flat[block.name], block.name)
            residual = self._offset(block, flat[block.name], scratch, dtype)
            if factor is not None:
                self._combine(block, combination[dtype], residual, scratch, alpha=-1)
            gradient = self._scaled_variance(block, scratch, dtype)
            torch.div(residual, gradient, out=gradient)
            self._add_weighted(total, _dot(residual, gradient), block.name)
            if block.name in into:
                _add_scaled_(into[block.name][block.start : block.stop], gradient, share)

        if tables:
            total = tables.finish(flat, None if factor is None else low_rank * z, into, share)
        else:
            total = self._sweep(residual_and_gradient, ())
        if self._sum is not None:
            self._sum(total)
        return 0.5 * (total + z.square().sum())

    def _cholesky(self) -> Tensor | None:
        """The K x K factor of I + U^T A^-1 U, made once, float64; None without a low-rank part."""
        low_rank = self._low_rank_scale()
        if not low_rank:
            return None
        if self._factor is None:
            device = self._device()
            with torch.autocast(device.type, enabled=False):
                gram = self._gram(_accumulator(device))
            self._factor = self._factorised(gram)
        return self._factor

    def _factorised(self, gram: Tensor) -> Tensor:
        """The Cholesky factor of I + low_rank_scale^2 gram, (K, K)."""
        matrix = torch.eye(self.rank, dtype=gram.dtype, device=gram.device) + self._low_rank_scale() ** 2 * gram
        factor: Tensor
        factor, info = torch.linalg.cholesky_ex(matrix)
        if int(info) or not torch.isfinite(factor).all():
            raise PriorNumericsError(
                "I + U^T A^-1 U has no Cholesky factor: the variances are too small for the deviations, or a value "
                "is NaN. `prior-hub check` says which; a larger variance_floor or eps mends the first."
            )
        return factor

    def _gram(self, dtype: torch.dtype) -> Tensor:
        """D A^-1 D^T, (K, K), over all ranks."""

        def visit(block: Block, scratch: Scratch, total: Tensor) -> None:
            self._add_gram(block, self._scaled_variance(block, scratch, dtype), total, scratch)

        gram = self._sweep(visit, (self.rank, self.rank))
        return gram if self._sum is None else self._sum(gram)

    def _low_rank_scale(self) -> float:
        return math.sqrt(self.scale * self.low_rank_weight) if self.deviations else 0.0

    def _delta(self, name: str, flat: Tensor, start: int, stop: int, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """theta - mean and A of one block (fresh tensors), flat, in `dtype` or the type of the elementwise work."""
        mean = self.mean[name]
        dtype = dtype or torch.promote_types(torch.promote_types(flat.dtype, mean.dtype), torch.float32)
        block = flat[start:stop].to(dtype)
        return block - mean.reshape(-1)[start:stop].to(dtype), self._diagonal(name, start, stop, dtype)

    def _diagonal(self, name: str, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        variance = self.variance[name].reshape(-1)[start:stop].to(dtype)
        return variance * (self.scale * self.diagonal_weight) + self.eps

    def _rows(self, name: str, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        return self.deviations[name].reshape(self.rank, -1)[:, start:stop].to(dtype)

    def _blocks(self, name: str) -> Iterator[tuple[int, int]]:
        tensor = self.mean[name]
        size = _CPU_BLOCK if tensor.device.type == "cpu" else DEVICE_BLOCK
        for start in range(0, tensor.numel(), size):
            yield start, min(start + size, tensor.numel())

    # What `sweep` needs: views of each block's operands, made once, and their values in memory that is used again.

    def _sweep(self, visit: Callable[[Block, Scratch, Tensor], None], shape: tuple[int, ...]) -> Tensor:
        """`sweep` over all blocks, with sums in the accumulator's type."""
        device = self._device()
        if self._chunks is None:
            chunks = blocks_of([(name, mean.numel()) for name, mean in self.mean.items()], device)
            flat: tuple[Tensor, ...] = ()
            last = None
            for block in itertools.chain.from_iterable(chunks):
                if block.name != last:  # a tensor that is not contiguous is copied here, once
                    last, flat = block.name, (self.mean[block.name].reshape(-1), self.variance[block.name].reshape(-1))
                    if self.deviations:
                        flat += (self.deviations[block.name].reshape(self.rank, -1),)
                self._views[block] = tuple(t[..., block.start : block.stop] for t in flat)
            self._chunks = chunks  # last: another thread may be looking
        numbers = self.num_parameters * (self.rank + 3)
        return sweep(self._chunks, visit, shape, dtype=_accumulator(device), device=device, numbers=numbers)

    def _row_parts(
        self, block: Block, scratch: Scratch, dtype: torch.dtype, *, copied: bool = False
    ) -> Iterator[tuple[int, int, Tensor]]:
        """(start, stop, rows (K, n)) within a block: all at once where they are stored in that type, else copies of a few.

        Args:
            block: which.
            scratch: for the copies.
            dtype: the type of the rows.
            copied: whether the caller makes copies too, so that a few at a time are wanted in any case.
        """
        rows = self._views[block][2]
        if rows.dtype == dtype and not copied:
            yield 0, rows.shape[1], rows
            return
        if block not in self._parts:
            length = part_length(self.rank, rows.device)
            starts = range(0, rows.shape[1], length)
            self._parts[block] = [(s, min(s + length, rows.shape[1]), rows[:, s : s + length]) for s in starts]
        for start, stop, part in self._parts[block]:
            yield start, stop, part if part.dtype == dtype else scratch.take("rows", part.shape, dtype).copy_(part)

    def _project(self, block: Block, vector: Tensor, total: Tensor, scratch: Scratch) -> None:
        """total += D v over a block, this rank's share of it; v is (n,) in the type of the elementwise work."""
        for start, stop, rows in self._row_parts(block, scratch, vector.dtype):
            part = vector if stop - start == vector.numel() else vector[start:stop]
            self._add_weighted(total, torch.mv(rows, part), block.name)

    def _combine(self, block: Block, coefficients: Tensor, out: Tensor, scratch: Scratch, *, alpha: float = 1.0) -> None:
        """out += alpha D^T coefficients over a block; both in the type of the elementwise work."""
        for start, stop, rows in self._row_parts(block, scratch, out.dtype):
            part = out if stop - start == out.numel() else out[start:stop]
            part.addmv_(rows.T, coefficients, alpha=alpha)

    def _add_gram(self, block: Block, diagonal: Tensor, total: Tensor, scratch: Scratch) -> None:
        """total += D diag(1 / diagonal) D^T over a block, this rank's share of it, in the type of `diagonal`."""
        for start, stop, rows in self._row_parts(block, scratch, diagonal.dtype, copied=True):
            scaled = scratch.take("scaled rows", rows.shape, rows.dtype)
            torch.div(rows, diagonal[start:stop], out=scaled)
            self._add_weighted(total, scaled @ rows.T, block.name)

    def _pack(self) -> _Packed | None:
        """The same Gaussian with its small tensors together; None where there are not two of them, or kernels need it not."""
        if self._packed is None:
            self._packed = (_Packed(self),)
        packed = self._packed[0]
        return packed if packed.groups and not is_available(self._device()) else None

    def _fused(self, given: Sequence[Tensor]) -> Tables | None:
        """The kernels' view of this Gaussian, if they can do the work with what is given; see fused.py."""
        device = self._device()
        stored = [*self.mean.values(), *self.variance.values(), *self.deviations.values()]
        if not is_available(device) or not takes([*stored, *given], device) or not all(t.is_contiguous() for t in given):
            return None
        if self._tables is None:
            operands = {}
            for name, mean in self.mean.items():
                rows = self.deviations[name].reshape(self.rank, -1).contiguous() if self.deviations else None
                operands[name] = mean.reshape(-1).contiguous(), self.variance[name].reshape(-1).contiguous(), rows
            weights = {name: self._weight(name) for name in self.names}
            self._tables = Tables(operands, weights, factor=self.scale * self.diagonal_weight, eps=self.eps)
        return self._tables

    def _work_type(self, theta: Tensor, name: str) -> torch.dtype:
        """The type of the elementwise work on one tensor: float32 or wider."""
        return torch.promote_types(torch.promote_types(theta.dtype, self.mean[name].dtype), torch.float32)

    def _offset(self, block: Block, flat: Tensor, scratch: Scratch, dtype: torch.dtype) -> Tensor:
        """theta - mean of a block, (n,), in scratch memory."""
        mean = self._views[block][0]
        theta = flat[block.start : block.stop]
        out = scratch.take("offset", mean.shape, dtype)
        if torch.promote_types(theta.dtype, mean.dtype) == dtype and theta.device == mean.device:
            return torch.sub(theta, mean, out=out)
        return out.copy_(theta).sub_(mean)  # torch would subtract two bfloat16 tensors in bfloat16

    def _scaled_variance(self, block: Block, scratch: Scratch, dtype: torch.dtype) -> Tensor:
        """A of a block, (n,), in scratch memory."""
        variance = self._views[block][1]
        out = scratch.take("diagonal", variance.shape, dtype)
        factor = self.scale * self.diagonal_weight
        out = torch.mul(variance, factor, out=out) if variance.dtype == dtype else out.copy_(variance).mul_(factor)
        return out.add_(self.eps) if self.eps else out

    def _add_weighted(self, total: Tensor, part: Tensor, name: str) -> None:
        """total += part, this rank's share of it where ranks hold the same entries."""
        total.add_(part, alpha=self._weight(name))

    def _weight(self, name: str) -> float:
        return 1.0 if self._contributions is None else self._contributions[name]

    def _entries(self) -> float:
        """`_total_entries`, summed over the ranks once."""
        if self._count is None:
            self._count = self._total_entries()
        return self._count

    def _total_entries(self) -> float:
        total = sum(self._weight(name) * t.numel() for name, t in self.mean.items())
        if self._sum is None:
            return total
        # a vector of one: what a penalty has added to its own sums of squares, 0-d, must not ride on this
        return float(self._sum(torch.tensor([total], dtype=_accumulator(self._device()), device=self._device())))

    def _device(self) -> torch.device:
        for tensor in self.mean.values():
            return tensor.device
        return torch.device("cpu")

    def _checked_names(self, theta: Mapping[str, Tensor]) -> tuple[str, ...]:
        for name, mean in self.mean.items():
            if name not in theta:
                raise PriorMatchError(f"no value given for parameter {name!r} of the prior.")
            if theta[name].shape != mean.shape:
                raise PriorMatchError(f"{name!r} has shape {tuple(theta[name].shape)}, the prior {tuple(mean.shape)}.")
        return self.names


class _Packed:
    """A Gaussian whose small tensors are joined, so that a hundred of them cost as few operations as one.

    Joined are those of the same types that count the same; they are copied once, their values in each evaluation.

    Attributes:
        groups: name of the joined tensor -> names of its parts.
    """

    def __init__(self, owner: LowRankGaussian) -> None:
        alike: dict[tuple[object, ...], list[str]] = {}
        for name, mean in owner.mean.items():
            if 0 < mean.numel() <= _JOINED:
                rows = owner.deviations[name].dtype if owner.deviations else None
                alike.setdefault((mean.dtype, owner.variance[name].dtype, rows, owner._weight(name)), []).append(name)
        self.groups = {f"{parts[0]} and {len(parts) - 1} more": parts for parts in alike.values() if len(parts) > 1}
        self._sizes = {joined: [owner.mean[n].numel() for n in parts] for joined, parts in self.groups.items()}
        if not self.groups:
            return
        together = {name for parts in self.groups.values() for name in parts}
        self._alone = [name for name in owner.names if name not in together]
        tensors: dict[str, dict[str, Tensor]] = {}
        for kind, lead in (("mean", ()), ("variance", ()), ("deviations", (owner.rank,))):
            source: dict[str, Tensor] = getattr(owner, kind)
            tensors[kind] = {name: source[name] for name in self._alone if source}
            for joined, parts in self.groups.items() if source else ():
                tensors[kind][joined] = torch.cat([source[name].reshape(*lead, -1) for name in parts], dim=-1)
        weights = None
        if owner._contributions is not None:
            weights = {n: owner._weight(n) for n in self._alone} | {j: owner._weight(p[0]) for j, p in self.groups.items()}
        self.gaussian = owner._with(**tensors, contributions=weights)

    def evaluate(
        self, theta: Mapping[str, Tensor], into: Mapping[str, Tensor], share: float | Tensor, factor: Tensor | None
    ) -> Tensor:
        """`LowRankGaussian._evaluate`, given the K x K factor."""
        self.gaussian._factor = factor
        targets = {name: into[name] for name in self._alone if name in into}
        values = self._joined(theta)
        for joined, parts in self.groups.items():
            if any(name in into for name in parts):
                dtype = self.gaussian._work_type(values[joined], joined)
                targets[joined] = torch.zeros(values[joined].numel(), dtype=dtype, device=self.gaussian._device())
        value = self.gaussian._evaluate_in_full(values, targets, share, self.gaussian._device())
        for joined, parts in self.groups.items():
            if joined in targets:
                pairs = zip(parts, targets[joined].split_with_sizes(self._sizes[joined]), strict=True)
                _add_each_([(into[name], part) for name, part in pairs if name in into])
        return value

    def step_(self, theta: Mapping[str, Tensor], step: dict[str, float | Tensor], device: torch.device) -> Tensor:
        """`LowRankGaussian._step`: a name without a step stays what it is, to the bit."""
        values = self._joined(theta)
        steps = {name: step[name] for name in self._alone if name in step}
        for joined, parts in self.groups.items():
            lengths = [step.get(name, 0.0) for name in parts]
            if any(isinstance(c, Tensor) for c in lengths) or len(set(lengths)) > 1:
                numbers = zip(lengths, self._sizes[joined], strict=True)
                dtype, place = self.gaussian._work_type(values[joined], joined), self.gaussian._device()
                steps[joined] = torch.cat(
                    [
                        c.to(device=place, dtype=dtype).expand(n)
                        if isinstance(c, Tensor)
                        else torch.full((n,), c, dtype=dtype, device=place)
                        for c, n in numbers
                    ]
                )
            elif lengths[0]:
                steps[joined] = lengths[0]
        value = self.gaussian._step(values, steps, device)
        for joined, parts in self.groups.items():
            for name, part in zip(parts, values[joined].split_with_sizes(self._sizes[joined]), strict=True):
                if name in step:
                    theta[name][...] = part.view(theta[name].shape)
        return value

    def _joined(self, theta: Mapping[str, Tensor]) -> dict[str, Tensor]:
        values = {name: theta[name] for name in self._alone}
        for joined, parts in self.groups.items():
            values[joined] = torch.cat([theta[name].detach().reshape(-1) for name in parts])
        return values


class _PenaltyFunction(torch.autograd.Function):
    """The penalty with its analytic gradient as its backward; not differentiable twice."""

    @staticmethod
    def forward(ctx: Any, gaussian: LowRankGaussian, *theta: Tensor) -> Tensor:
        value, gradient = gaussian.penalty_and_gradient(dict(zip(gaussian.names, theta, strict=True)))
        ctx.save_for_backward(*(gradient[name] for name in gaussian.names))
        ctx.dtypes = [t.dtype for t in theta]
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, output: Tensor) -> tuple[Tensor | None, ...]:
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return (None, *((g * output.to(g.dtype)).to(dtype) for g, dtype in pairs))


def _refuse_shared_memory(tensors: Mapping[str, Tensor]) -> None:
    """Raise `PriorMatchError` if two tensors to be written are the same: blocks are written by several threads at once."""
    seen: dict[tuple[torch.device, int], str] = {}
    for name, tensor in tensors.items():
        if tensor.device.type not in ("cpu", "cuda") or not (address := tensor.data_ptr()):  # empty, or no memory of its own
            continue
        if (first := seen.setdefault((tensor.device, address), name)) != name and tensor.numel():
            raise PriorMatchError(
                f"{first!r} and {name!r} are one tensor, and each would be written to under both names. A prior holds tied "
                "weights once, under one name."
            )


def _add_scaled_(out: Tensor, values: Tensor, factor: float | Tensor) -> None:
    """out += factor * values, rounded to the type of `out` once; `values` may be overwritten."""
    if out.dtype == values.dtype and out.device == values.device and not isinstance(factor, Tensor):
        out.add_(values, alpha=factor)
    else:
        out += values.mul_(factor).to(out)


def _add_each_(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """out += values for each pair, all at once where types and devices agree."""
    alike: list[tuple[Tensor, Tensor]] = []
    others: list[tuple[Tensor, Tensor]] = []
    for out, values in pairs:
        fits = out.dtype == values.dtype and out.device == values.device and out.device.type in ("cpu", "cuda")
        (alike if fits else others).append((out, values))
    if alike:
        torch._foreach_add_([out for out, _ in alike], [values for _, values in alike])
    for out, values in others:
        out += values.to(out)


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """The inner product of two flat tensors, 0-d: in float32 in pieces, so that rounding does not grow with their length."""
    if left.dtype == torch.float64 or left.numel() <= _PIECE:
        return torch.dot(left, right)
    whole = left.numel() // _PIECE * _PIECE
    parts: Tensor = torch.linalg.vecdot(left[:whole].view(-1, _PIECE), right[:whole].view(-1, _PIECE))
    return parts.sum(dtype=_accumulator(left.device)) + torch.dot(left[whole:], right[whole:])


def _block(length: float | Tensor, start: int, stop: int, dtype: torch.dtype, device: torch.device) -> float | Tensor:
    """The part of a step length (a number, 0-d, or flat) that belongs to one block."""
    if not isinstance(length, Tensor):
        return length
    return (length[start:stop] if length.ndim else length).to(device=device, dtype=dtype)


def _grid(step: Mapping[str, float]) -> Iterator[tuple[_Key, dict[str, float], float]]:
    """Three step lengths near by on a fixed grid, and what their matrices count in the one that is interpolated.

    As a function of s = log c, 1 / (a + c) times sqrt(c) is 1 / (a e^(-s/2) + e^(s/2)), which three points log(2)/2 apart
    give to 6e-4 of itself for every a > 0 (Lagrange's parabola). U^T (A + C)^-1 U is a sum of such terms with positive
    semi-definite coefficients, so what holds for each holds for it. Where names have different lengths, their relation to the
    largest is rounded to 1/1024 of an octave, another 3.4e-4 at most; a relation that changes at every step makes three new
    points each time. The grid does not depend on the steps before, and so neither does the matrix, to the bit.

    Args:
        step: name -> length > 0.

    Yields:
        (what identifies the point, name -> length there, weight), for the nearest point and those on both sides of it.
    """
    lengths = {name: math.log2(length) for name, length in step.items()}
    largest = max(lengths.values())
    relations = tuple((name, round(1024 * (length - largest)) / 1024) for name, length in lengths.items())
    nearest = round(2 * largest)
    t = 2 * largest - nearest  # -1/2 to 1/2
    for offset, weight in ((-1, 0.5 * t * (t - 1)), (0, 1 - t * t), (1, 0.5 * t * (t + 1))):
        at = {name: 2.0 ** ((nearest + offset) / 2 + relation) for name, relation in relations}
        yield (nearest + offset, relations), at, weight * 2.0 ** ((offset - t) / 4)


def check_length(name: str, length: float | Tensor) -> None:
    """Raise `ValueError` where a number is no step length; tensors are not looked into."""
    if not isinstance(length, Tensor) and not 0 <= length <= 1e300:
        raise ValueError(f"the step of {name!r} is {length}, expected a length between 0 and 1e300.")


def _inverse(gram: Tensor) -> Tensor | None:
    """(I + gram)^-1, (K, K), of a positive semi-definite matrix; None of one that is not finite.

    Its small eigenvalues may be off by rounding, and negative.
    """
    there = gram.cpu()
    if not torch.isfinite(there).all():
        return None
    values, vectors = torch.linalg.eigh(there)
    inverse: Tensor = ((vectors / (1 + values.clamp(min=0))) @ vectors.T).to(gram.device)
    return inverse


def _conjugate_gradients(
    matrix: Callable[[Tensor], Tensor], right: Tensor, inverse: Tensor, tolerance: float, iterations: int = 12
) -> tuple[Tensor, int | None]:
    """(x with matrix(x) = right, products it took), preconditioned by an inverse near by, (K, K); None if it did not settle."""
    x, residual = torch.zeros_like(right), right
    direction = preconditioned = inverse @ residual
    size = first = float(residual @ preconditioned)
    for taken in range(iterations):
        if not math.isfinite(size):
            break
        if size <= tolerance**2 * first:
            return x, taken
        image = matrix(direction)
        length = size / float(direction @ image)
        x, residual = x + length * direction, residual - length * image
        preconditioned = inverse @ residual
        before, size = size, float(residual @ preconditioned)
        direction = preconditioned + (size / before) * direction
    return x, iterations if size <= tolerance**2 * first else None


def truncated_weights(rank: int, kept: int, diagonal: float, low_rank: float) -> tuple[float, float]:
    """The weights after keeping `kept` of `rank` deviations: (diagonal_weight, low_rank_weight)."""
    if kept == rank:
        return diagonal, low_rank
    if math.isclose(diagonal, swag_weights(rank)[0]) and math.isclose(low_rank, swag_weights(rank)[1]):
        return swag_weights(kept)
    return diagonal, low_rank * (rank - 1) / (kept - 1) if kept >= 2 else 0.0


def check_finite(what: str, tensor: Tensor) -> None:
    """Raise `PriorNumericsError` naming `what` and counting the entries if any value is NaN or infinite."""
    flat = tensor.reshape(-1)
    size = _CPU_BLOCK if tensor.device.type == "cpu" else DEVICE_BLOCK
    for start in range(0, flat.numel(), size):
        low, high = torch.aminmax(flat[start : start + size])  # one pass; isfinite takes five, and three temporaries
        if not (low.isfinite() and high.isfinite()):
            bad = flat.numel() - int(torch.isfinite(flat).sum())
            raise PriorNumericsError(f"{what} has {bad} of {flat.numel()} entries that are NaN or infinite.")


def _largest_eigenvalue(diagonal: list[float], beside: list[float]) -> float:
    """Of a symmetric tridiagonal matrix, on the CPU."""
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    matrix += torch.diag(torch.tensor(beside, dtype=torch.float64), -1)
    return float(torch.linalg.eigvalsh(matrix)[-1])  # reads the lower triangle


def _check_layout(mean: dict[str, Tensor], variance: dict[str, Tensor], deviations: dict[str, Tensor]) -> int:
    """K, after checking that names, shapes and ranks agree."""
    for kind, tensors in (("variance", variance), ("deviations", deviations)):
        if kind == "deviations" and not tensors:
            continue
        if tensors.keys() != mean.keys():
            odd = sorted(tensors.keys() ^ mean.keys())
            raise PriorMatchError(f"mean and {kind} name different parameters: {', '.join(odd[:5])} ({len(odd)} in all).")
    flat = [name for name, rows in deviations.items() if not rows.ndim]
    if flat:
        raise PriorMatchError(f"deviations of {flat[0]!r} are a single number, expected (K, *shape).")
    ranks = {rows.shape[0] for rows in deviations.values()}
    if len(ranks) > 1:
        raise PriorMatchError(f"deviations have different numbers of rows: {sorted(ranks)}.")
    for name, tensor in mean.items():
        if not tensor.is_floating_point():
            raise PriorMatchError(f"mean of {name!r} is {tensor.dtype}, expected real floating-point numbers.")
        if variance[name].shape != tensor.shape:
            raise PriorMatchError(f"variance of {name!r} is {tuple(variance[name].shape)}, mean {tuple(tensor.shape)}.")
        if deviations and deviations[name].shape[1:] != tensor.shape:
            found = tuple(deviations[name].shape)
            raise PriorMatchError(f"deviations of {name!r} are {found}, expected (K, *{tuple(tensor.shape)}).")
    return ranks.pop() if ranks else 0


def _accumulator(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
