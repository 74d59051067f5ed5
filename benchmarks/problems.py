"""What the benchmarks measure on: the tensors of real models, and made-up priors over them.

Times and memory depend on shapes and types, not on values, so that all values are random. They are made so that a prior is as
hard for float32 as learned ones are: variances of 1e-4, deviations ten times as large (0.03), weights that are a draw from it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prior_hub import LowRankGaussian, PriorModel
from prior_hub.priors.matching import canonical_parameters, head_parameter_names

Shapes = dict[str, tuple[int, ...]]
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TILE = 1 << 18  # values of one tensor where only their number matters


def shapes_of(what: str) -> Shapes:
    """Name -> shape of "resnet18", "resnet50" (timm's, without head), "bert" (BERT-base), or of so many values ("1e6")."""
    if what.startswith("resnet"):
        import timm

        return _shapes(timm.create_model(what, num_classes=0))
    if what == "bert":
        from transformers import BertConfig, BertModel

        with torch.device("meta"):
            return _shapes(BertModel(BertConfig()))
    return tiles(int(float(what)))


def tiles(size: int) -> Shapes:
    """Tensors of 2^18 values (a convolution of 170 channels) and the rest, `size` values together."""
    full, rest = divmod(size, TILE)
    return {f"layer{i}.weight": (TILE // 512, 512) for i in range(full)} | ({"rest.weight": (rest,)} if rest else {})


def _shapes(model: nn.Module) -> Shapes:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def count(shapes: Shapes) -> int:
    """P."""
    return sum(math.prod(shape) for shape in shapes.values())


@dataclass
class Problem:
    """A prior's tensors, weights and their gradient; A = diagonal, U = rows^T. Flat along P but for the rows, as in a file."""

    shapes: Shapes
    mean: Tensor  # (P,)
    diagonal: Tensor  # (P,)
    rows: dict[str, Tensor]  # name -> (K, *shape), fp32
    theta: Tensor  # (P,)
    gradient: Tensor  # (P,)

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """Views by name: (P,) -> name -> (*shape)."""
        parts = flat.split([math.prod(shape) for shape in self.shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def gaussian(self, dtype: torch.dtype = torch.float32) -> LowRankGaussian:
        """Ours; deviations in `dtype`, all else shared with this problem."""
        rows = {name: tensor.to(dtype) for name, tensor in self.rows.items()}
        one = {"diagonal_weight": 1.0, "low_rank_weight": 1.0}
        return LowRankGaussian(self.split(self.mean), self.split(self.diagonal), rows, **one)

    def flat_rows(self) -> Tensor:
        """(K, P), a copy."""
        return torch.cat([tensor.reshape(len(tensor), -1) for tensor in self.rows.values()], dim=1)

    def blocks(self, dtype: torch.dtype, block: int = 1 << 20) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """(where in P, theta - mean, A, rows rounded to `dtype`), float64, a block of a tensor at a time."""
        start = 0
        for tensor in self.rows.values():
            rows = tensor.reshape(len(tensor), -1)
            for first in range(0, rows.shape[1], block):
                some = rows[:, first : first + block].to(dtype).double()
                part = slice(start + first, start + first + some.shape[1])
                yield part, self.theta[part].double() - self.mean[part].double(), self.diagonal[part].double(), some
            start += rows.shape[1]


def problem(
    shapes: Shapes, rank: int, *, device: str = "cpu", variance: float = 1e-4, deviation: float = 1e-3, seed: int = 0
) -> Problem:
    """Variances around `variance`, deviations of standard deviation sqrt(`deviation`), theta an exact draw.

    Row k of a tensor is a long random vector from its 1009 k-th entry on: as good as independent, and made in no time.
    """
    size, step = count(shapes), 1009
    generator = torch.Generator(device).manual_seed(seed)

    def noise(length: int) -> Tensor:
        return torch.randn(length, generator=generator, device=device)

    mean = noise(size)
    diagonal = torch.rand(size, generator=generator, device=device).add_(0.5).mul_(variance)
    theta = noise(size).mul_(diagonal.sqrt()).add_(mean)
    rows = {}
    for name, shape in shapes.items():
        length = math.prod(shape)
        long = noise(length + step * rank).mul_(math.sqrt(deviation))
        rows[name] = long.as_strided((rank, length), (step, 1)).clone().view(rank, *shape)
    made = Problem(shapes, mean, diagonal, rows, theta, torch.zeros(size, device=device))
    combination = noise(rank)
    for name, weights in made.split(theta).items():
        weights += torch.tensordot(combination, rows[name], 1)
    return made


def prior_of(model: nn.Module, rank: int, dtype: torch.dtype, *, head: Any = "auto", variance: float = 1e-2) -> PriorModel:
    """A prior over the body of a model, with its weights as the mean; `head` as in `head_parameter_names`."""
    outside = head_parameter_names(model, head)
    body = {n: p.detach().clone() for n, p in canonical_parameters(model).items() if n not in outside}
    shapes = {n: tuple(p.shape) for n, p in body.items()}
    device = str(next(iter(body.values())).device)
    made = problem(shapes, rank, device=device, variance=variance, deviation=variance)
    rows = {n: made.rows.pop(n).to(dtype) for n in shapes}
    return PriorModel.from_tensors(body, made.split(made.diagonal), rows, head_parameters=tuple(outside))


# ------------------------------------------------------------------------------------------------- float64, in blocks


@dataclass
class Exact:
    """The penalty in float64 from the formulas, independent of the package: z is (I + U^T A^-1 U)^-1 U^T A^-1 delta."""

    value: float
    z: Tensor  # (K,)


def exact(of: Problem, dtype: torch.dtype = torch.float32) -> Exact:
    """Value and z in float64, with the rows rounded to `dtype`."""
    rank = next(iter(of.rows.values())).shape[0]
    inner = torch.eye(rank, dtype=torch.float64, device=of.mean.device)
    right = torch.zeros(rank, dtype=torch.float64, device=of.mean.device)
    plain = 0.0
    for _, delta, diagonal, rows in of.blocks(dtype):
        over = rows / diagonal
        inner += over @ rows.T
        right += over @ delta
        plain += float(delta @ (delta / diagonal))
    z = torch.linalg.solve(inner, right)
    return Exact(0.5 * (plain - float(right @ z)), z)  # Woodbury's difference: float64 has the digits for it


def gradient_errors(of: Problem, found: Exact, gradients: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, float]:
    """|g - exact| / |exact| (2-norms) of flat gradients (P,)."""
    away, norm = dict.fromkeys(gradients, 0.0), 0.0
    for part, delta, diagonal, rows in of.blocks(dtype):
        right = (delta - found.z @ rows) / diagonal
        norm += float(right.square().sum())
        for name, gradient in gradients.items():
            away[name] += float((gradient[part].double() - right).square().sum())
    return {name: math.sqrt(value / norm) for name, value in away.items()}
