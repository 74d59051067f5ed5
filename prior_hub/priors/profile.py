"""What a Gaussian says of each parameter tensor, in one pass over its numbers, and how tensors group into blocks of a network.

    Sigma = A + U U^T (see gaussian.py);  variance of entry i = A_ii + (U U^T)_ii
    freedom of a block = sqrt(mean variance of its entries) / root mean square of the prior's mean over them

A prior is mostly on disk (memory-mapped): pieces of a few megabytes are read in stored order, each once, and nothing as large
as a tensor is made. Sums are float64; quantiles are of a histogram whose bins are 0.4 % wide.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prior_hub.priors.diagnosis import effective_rank
from prior_hub.priors.gaussian import LowRankGaussian
from prior_hub.priors.tensor_files import progress

__all__ = ["BlockProfile", "Profile", "TensorProfile", "network_blocks", "profile"]

LEVELS = (0.05, 0.5, 0.95)
_NUMBERS = 1 << 20  # read at a time: 8 MB in float64
_SHIFT = 15  # bits of a float32 that a bin does not tell apart: 8 bits of mantissa are left, bins 0.2 to 0.4 % wide
_BINS = 1 << (31 - _SHIFT)
_LIMITS = (20, 10, 5, 2)  # tensors of a block: a layer of a transformer has 9 to 16, a bottleneck of a ResNet 9 or 12
_FEWEST_BLOCKS = 8


@dataclass(frozen=True)
class TensorProfile:
    """One parameter tensor under a prior.

    Attributes:
        name: the parameter.
        size: number of values.
        deviation: 5 %, 50 % and 95 % quantile of the values' standard deviations, to 0.4 %; zeros for an empty tensor.
        diagonal: sum over the values of the diagonal's variance A.
        low_rank: sum over the values of the low-rank part's variance.
        square: sum of the squares of the prior's mean.
    """

    name: str
    size: int
    deviation: tuple[float, float, float]
    diagonal: float
    low_rank: float
    square: float


@dataclass(frozen=True)
class BlockProfile:
    """A block of the network under a prior: root mean squares over its values.

    Attributes:
        name: path of the module, without what all names of the network have in common.
        parameters: their names.
        size: number of values.
        diagonal: standard deviation that the diagonal gives a value.
        low_rank: standard deviation that the low-rank part gives a value.
        total: both together, sqrt(diagonal^2 + low_rank^2).
        weight: size of the prior's mean.
    """

    name: str
    parameters: tuple[str, ...]
    size: int
    diagonal: float
    low_rank: float
    total: float
    weight: float

    @property
    def freedom(self) -> float | None:
        """Standard deviation in relation to the size of the weights; None where the mean is zero."""
        return self.total / self.weight if self.weight > 0 else None


@dataclass(frozen=True)
class Profile:
    """What `profile` found.

    Attributes:
        tensors: one for each parameter, in stored order.
        spectrum: variance along each principal direction of the low-rank part, at the prior's scale, largest first.
    """

    tensors: tuple[TensorProfile, ...]
    spectrum: tuple[float, ...]

    @property
    def low_rank_share(self) -> float:
        """Share of the total variance that the low-rank part holds."""
        low_rank = math.fsum(t.low_rank for t in self.tensors)
        total = low_rank + math.fsum(t.diagonal for t in self.tensors)
        return low_rank / total if total > 0 else 0.0

    @property
    def effective_rank(self) -> float:
        """(sum of the spectrum)^2 / sum of its squares; 0 without a low-rank part."""
        return effective_rank(self.spectrum)

    def blocks(self) -> tuple[BlockProfile, ...]:
        """The network's blocks, in order of their first parameter."""
        by_name = {t.name: t for t in self.tensors}
        found = []
        for label, names in network_blocks(list(by_name)).items():
            members = [by_name[name] for name in names]
            size = sum(t.size for t in members)
            diagonal, low_rank, square = (
                math.fsum(getattr(t, kind) for t in members) / max(1, size) for kind in ("diagonal", "low_rank", "square")
            )
            parts = (math.sqrt(v) for v in (diagonal, low_rank, diagonal + low_rank, square))
            found.append(BlockProfile(label, names, size, *parts))
        return tuple(found)


def profile(gaussian: LowRankGaussian, *, title: str = "prior") -> Profile:
    """Look at every number of a Gaussian once; from 1 GB on with a progress bar.

    Args:
        gaussian: the Gaussian, whole (not one rank's shards).
        title: what the progress bar says is read.
    """
    rank, low_rank = gaussian.rank, gaussian._low_rank_scale() ** 2
    gram = torch.zeros(rank, rank, dtype=torch.float64)
    found = []
    with progress(stored_bytes(gaussian), f"Reading {title}") as advance:
        for name, mean in gaussian.mean.items():
            counts = torch.zeros(_BINS, dtype=torch.int64)
            sums = torch.zeros(3, dtype=torch.float64)
            for start, stop in pieces(mean.numel(), rank + 2):
                part, diagonal, rows = numbers(gaussian, name, start, stop)
                explained = torch.zeros_like(diagonal)
                if rows is not None:
                    gram += rows @ rows.T
                    explained = low_rank * rows.square_().sum(0)
                sums += torch.stack([diagonal.sum(), explained.sum(), part.dot(part)])
                deviation = (diagonal + explained).sqrt_().float()
                counts += torch.bincount(deviation.view(torch.int32) >> _SHIFT, minlength=_BINS)
                advance((stop - start) * bytes_per_value(gaussian, name))
            found.append(TensorProfile(name, mean.numel(), _quantiles(counts), *sums.tolist()))
    values = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0) * low_rank if low_rank else torch.zeros(0)
    return Profile(tuple(found), tuple(values.tolist()))


def pieces(size: int, rows: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of so many entries that `rows` rows of them are a few megabytes."""
    length = max(1 << 12, _NUMBERS // max(1, rows))
    for start in range(0, size, length):
        yield start, min(start + length, size)


def numbers(gaussian: LowRankGaussian, name: str, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Mean (n,), diagonal A (n,) and deviations (K, n) of a piece, float64 copies on the CPU; None without a low-rank part."""

    def flat(tensor: Tensor, *lead: int) -> Tensor:
        piece = tensor.reshape(*lead, -1)[..., start:stop].cpu()
        return piece.clone() if piece.dtype == torch.float64 else piece.double()

    diagonal = flat(gaussian.variance[name]).mul_(gaussian.scale * gaussian.diagonal_weight).add_(gaussian.eps)
    rows = flat(gaussian.deviations[name], gaussian.rank) if gaussian._low_rank_scale() else None
    return flat(gaussian.mean[name]), diagonal, rows


def bytes_per_value(gaussian: LowRankGaussian, name: str) -> int:
    """Bytes that are stored of one entry: its mean, variance and deviations."""
    kept = gaussian.rank * gaussian.deviations[name].element_size() if gaussian.deviations else 0
    return gaussian.mean[name].element_size() + gaussian.variance[name].element_size() + kept


def stored_bytes(gaussian: LowRankGaussian) -> int:
    """Bytes of all its numbers."""
    return sum(tensor.numel() * bytes_per_value(gaussian, name) for name, tensor in gaussian.mean.items())


def _quantiles(counts: Tensor) -> tuple[float, float, float]:
    """Quantiles (nearest rank) of float32 numbers >= 0 from how many share their first bits."""
    held = counts.cumsum(0)
    total = int(held[-1])
    if not total:
        return (0.0, 0.0, 0.0)
    wanted = torch.tensor([1 + round(level * (total - 1)) for level in LEVELS])
    bins = torch.searchsorted(held, wanted).to(torch.int32)
    edges = torch.stack([(bins << _SHIFT).view(torch.float32), ((bins + 1) << _SHIFT).view(torch.float32)])
    low, middle, high = edges.double().mean(0).tolist()
    return (low, middle, high)


# ------------------------------------------------------------------------------------------------------------- blocks


def network_blocks(names: Sequence[str]) -> Mapping[str, tuple[str, ...]]:
    """Group parameter names into the blocks of their network, by the modules they lie in.

    A block is the largest module with at most 20 parameter tensors: a layer of a transformer, a bottleneck of a ResNet. Where
    that makes fewer than 8 blocks, smaller ones are taken (10, 5, 2 tensors), so that a small network shows its layers.

    Args:
        names: parameter names, in the network's order.

    Returns:
        Path of the module, without what all names have in common -> names.
    """
    if not names:
        return {}
    owners = [name.split(".")[:-1] for name in names]
    pairs = zip(min(owners), max(owners), strict=False)  # the first and the last in order differ where any two do
    shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    if shared and any(name.split(".")[shared].isdigit() for name in names):
        shared -= 1  # "layers.0", not "0"
    groups: dict[str, tuple[str, ...]] = {}
    for limit in _LIMITS:
        groups = {".".join(module[shared:]): tuple(group) for module, group in _split(list(names), shared, limit)}
        if len(groups) >= _FEWEST_BLOCKS:
            break
    return groups


def _split(names: list[str], depth: int, limit: int) -> list[tuple[list[str], list[str]]]:
    """(module, its names) of `names`, alike in their first `depth` parts; those of more than `limit` are taken apart."""
    children: dict[str, list[str]] = {}
    for name in names:
        children.setdefault(name.split(".")[depth], []).append(name)
    found = []
    for group in children.values():
        module = group[0].split(".")[: depth + 1]
        found += [(module, group)] if len(group) <= limit else _split(group, depth + 1, limit)
    return found
