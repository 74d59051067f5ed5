"""What a learned Gaussian looks like, and when it is degenerate.

total variance  tr Sigma = tr A + tr U U^T, A the diagonal and U U^T the low-rank part (see gaussian.py)
spectrum        the K eigenvalues of U U^T, largest first: variance along each principal direction
effective rank  (sum of eigenvalues)^2 / sum of their squares: K for equal ones, 1 where one direction holds everything
useful rank     directions that hold 99 % of the low-rank variance
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prior_hub.priors.gaussian import LowRankGaussian

__all__ = ["Diagnosis", "diagnose", "effective_rank"]

_BLOCK = 1 << 20  # entries
_MOST_ENTRIES = 1_000_000  # of which quantiles are taken


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found; print it.

    Attributes:
        num_parameters: P.
        rank: K.
        share_at_floor: share of the P variances that are at the variance floor; 0 without a floor.
        variance_range: smallest, median and largest variance, before scale and weight.
        low_rank_share: share of the total variance that the low-rank part holds.
        spectrum: variance along each principal direction of the low-rank part, at the prior's scale, largest first.
        effective_rank: of the low-rank part; 0 where there is none.
        useful_rank: directions that hold 99 % of the low-rank variance.
        remarks: what is degenerate, why, and what to do; empty for a healthy prior.
        notes: what is worth knowing and no reason to learn it again.
    """

    num_parameters: int
    rank: int
    share_at_floor: float
    variance_range: tuple[float, float, float]
    low_rank_share: float
    spectrum: tuple[float, ...]
    effective_rank: float
    useful_rank: int
    remarks: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """A few lines for a person."""
        low, middle, high = self.variance_range
        lines = [f"variances {low:.2g} to {high:.2g}, median {middle:.2g}; {100 * self.share_at_floor:.1f} % at the floor"]
        if self.rank:
            lines.append(
                f"low-rank part: {100 * self.low_rank_share:.0f} % of the total variance, effective rank "
                f"{self.effective_rank:.1f} of {self.rank}, 99 % of it in {self.useful_rank} directions"
            )
        return "\n".join([*lines, *(f"note: {said}" for said in (*self.remarks, *self.notes))])


def diagnose(gaussian: LowRankGaussian, *, variance_floor: float = 0.0, before: Sequence[float] = ()) -> Diagnosis:
    """Look at every number of a Gaussian once.

    Args:
        gaussian: the Gaussian, whole (not one rank's shards).
        variance_floor: the floor its variances were held to.
        before: where directions were dropped (`PriorModel.compressed`), the variance along each one that the deviations had
            before, in any unit: the remarks on them are about those, since a few directions that are left say nothing of how
            the snapshots were taken.
    """
    count = max(1, gaussian.num_parameters)
    floored = 0
    if variance_floor > 0:
        floored = sum(int((v <= variance_floor * (1 + 1e-6)).sum()) for v in _in_blocks(gaussian))
    eigenvalues = torch.tensor(gaussian.spectrum(), dtype=torch.float64)
    held = float(eigenvalues.sum())
    variances = sum(float(v.double().sum()) for v in _in_blocks(gaussian))
    total = gaussian.scale * gaussian.diagonal_weight * variances + gaussian.num_parameters * gaussian.eps + held
    effective = effective_rank(eigenvalues.tolist())
    useful = int((eigenvalues.cumsum(0) < 0.99 * held).sum()) + 1 if held > 0 else 0
    share = floored / count
    remarks, notes = list[str](), list[str]()
    if share > 0.5:
        remarks.append(
            f"{100 * share:.0f} % of the variances are at the floor ({variance_floor:g}): the prior says little more than an "
            "isotropic one. The weights hardly moved between snapshots: use a larger, constant learning rate and augmentation "
            "on the source task, or a lower variance_floor."
        )
    taken, spanned = (len(before), effective_rank(before)) if len(before) > gaussian.rank > 0 else (gaussian.rank, effective)
    if taken >= 4 and 0 < spanned < 1.5:
        remarks.append(
            f"the {taken} deviations span little more than one direction (effective rank {spanned:.1f}): the weights "
            "drifted along a line while snapshots were taken. Start later (start), keep the learning rate constant, or take "
            "snapshots further apart (every_n_steps)."
        )
    elif taken >= 8 and 0 < spanned < 3:
        notes.append(
            f"the deviations have an effective rank of {spanned:.1f} of {taken}, that of a random walk (2.5): "
            "the low-rank part says where the weights went, not how far they may go. In our studies longer and hotter runs "
            "had the same, and a few principal directions did as well as all deviations (prior-hub compress)."
        )
    elif gaussian.rank >= 4 and held == 0:
        remarks.append("the deviations are all zero: the weights did not move between snapshots.")
    return Diagnosis(
        num_parameters=gaussian.num_parameters,
        rank=gaussian.rank,
        share_at_floor=share,
        variance_range=_range(gaussian),
        low_rank_share=held / total if total > 0 else 0.0,
        spectrum=tuple(eigenvalues.tolist()),
        effective_rank=effective,
        useful_rank=useful,
        remarks=tuple(remarks),
        notes=tuple(notes),
    )


def effective_rank(spectrum: Sequence[float]) -> float:
    """(sum)^2 / sum of squares of the variances along each direction; 0 where they are all 0."""
    largest = max(spectrum, default=0.0)
    if not largest > 0:
        return 0.0
    shares = [value / largest for value in spectrum]  # their squares neither overflow nor vanish
    return math.fsum(shares) ** 2 / math.fsum(share**2 for share in shares)


def _in_blocks(gaussian: LowRankGaussian) -> Iterator[Tensor]:
    """All variances, flat, few enough at a time that what is computed of them takes no memory to speak of."""
    for variance in gaussian.variance.values():
        yield from torch.split(variance.reshape(-1), _BLOCK)


def _range(gaussian: LowRankGaussian) -> tuple[float, float, float]:
    """(smallest, median, largest) variance; the median over evenly spaced entries where there are many."""
    tensors = [v for v in gaussian.variance.values() if v.numel()]
    if not tensors:
        return (0.0, 0.0, 0.0)
    every = max(1, gaussian.num_parameters // _MOST_ENTRIES)
    entries: Tensor = torch.cat([v.reshape(-1)[::every].double().cpu() for v in tensors])
    return (min(float(v.min()) for v in tensors), float(entries.median()), max(float(v.max()) for v in tensors))
