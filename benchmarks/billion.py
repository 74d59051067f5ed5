"""A prior of 1e9 parameters at rank 4: written, verified, loaded, truncated and used on a machine it fills half of.

    python benchmarks/billion.py --folder /scratch
    python benchmarks/billion.py --values 3e8

The tensors are those of a decoder-only transformer: an embedding of 128,256 x 2,048 and layers of four 2,048 x 2,048 and three
2,048 x 8,192 matrices. Mean and variance are float32 (the format has no narrower type for them), the four deviations bfloat16:
16 bytes a parameter, 16 GB. They are made tensor by tensor while they are written: `write_prior` takes a mapping that makes
its values when it is asked for them. The weights and their gradients, 2 GB each, are bfloat16.

Each step is a process of its own. "own" is its anonymous memory at the peak, over what it had before (torch, and for the
penalty weights and gradients): what the machine must have. "mapped" are pages of the files, at most those that were used; the
system gives them back when memory is short. Times are of one call each; whether the files lie in the system's cache is decided
by how much memory there is.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import Row, finish, options, parser
from torch import Tensor
from watch import in_new_process

from prior_hub import PriorModel
from prior_hub.priors.config import PriorConfig
from prior_hub.priors.gaussian import swag_weights
from prior_hub.priors.storage import read_prior, write_prior

CLAIM = "a prior of a billion parameters at rank 4 is written, checked, loaded and used without being held in memory once"
RANK = 4
TABLE = 1_000_003  # random values that are repeated: making them is not what is measured


def main() -> None:
    """Write it, use it, remove it; print and write the table."""
    made = parser(__doc__, repeats=1)
    made.add_argument("--values", type=float, help="parameters, roughly (default: 1e9)")
    made.add_argument(
        "--folder", type=Path, help="where 16 bytes a parameter are written and removed (default: temporary files)"
    )
    given = options(made)
    shapes = transformer(int(given.values or (1e7 if given.quick else 1e9)))
    values = sum(map(math.prod, shapes.values()))
    with tempfile.TemporaryDirectory(dir=given.folder, prefix="prior-hub-billion-") as folder:
        free = shutil.disk_usage(folder).free
        if free < 17 * values:
            made.error(f"{folder} has room for {1e-9 * free:.0f} GB, {17e-9 * values:.0f} GB are needed: pass --folder")
        costs = measure(Path(folder) / "prior", shapes)
    rows: list[Row] = []
    for name, (cost, size) in costs.items():
        row: Row = {"step": name, "s": cost.seconds, "GB/s": 1e-9 * size / cost.seconds if size else None}
        rows.append(row | {"own MB": 1e-6 * cost.own, "mapped MB": 1e-6 * cost.mapped})
    largest = max(map(math.prod, shapes.values()))
    notes = [
        f"P = {values:,} in {len(shapes)} tensors; {16e-9 * values:.1f} GB of files. The largest tensor, the deviations of the "
        f"embedding, has {8e-6 * largest:,.0f} MB."
    ]
    finish("billion", CLAIM, rows, given.json, claims=claims({n: c for n, (c, _) in costs.items()}, largest), notes=notes)


# ------------------------------------------------------------------------------------------------------------ the prior


def transformer(values: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of a decoder of about so many parameters, with the widths of a 1B model or, below 3e8, an eighth."""
    width, vocabulary = (2048, 128_256) if values >= 3e8 else (256, 16_032)
    layer = 4 * width**2 + 3 * width * 4 * width + 2 * width
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (vocabulary, width)}
    for i in range(max(1, round((values - vocabulary * width) / layer))):
        own = {f"self_attn.{kind}_proj.weight": (width, width) for kind in "qkvo"}
        own |= {"mlp.gate_proj.weight": (4 * width, width), "mlp.up_proj.weight": (4 * width, width)}
        own |= {"mlp.down_proj.weight": (width, 4 * width), "norm1.weight": (width,), "norm2.weight": (width,)}
        shapes |= {f"layers.{i}.{name}": shape for name, shape in own.items()}
    return shapes


class Made(Mapping[str, Tensor]):
    """The tensors of the prior by storage key, each made when it is asked for."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.shapes = shapes
        noise = torch.randn(TABLE, generator=torch.Generator().manual_seed(0))
        self.tables = {"mean": 0.02 * noise, "variance": 1e-6 * noise.square() + 1e-9, "deviations": (1e-3 * noise).bfloat16()}

    def __getitem__(self, key: str) -> Tensor:
        kind, name = key.split(".", 1)
        shape, table = self.shapes[name], self.tables[kind]
        made = torch.empty((RANK, *shape) if kind == "deviations" else shape, dtype=table.dtype)
        flat = made.view(-1)
        for start in range(0, len(flat), TABLE):
            flat[start : start + TABLE] = table[: len(flat) - start]
        return made

    def __iter__(self) -> Iterator[str]:
        return (f"{kind}.{name}" for name in self.shapes for kind in ("mean", "variance", "deviations"))

    def __len__(self) -> int:
        return 3 * len(self.shapes)


def write(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """The files, in shards of 5 GB."""
    dtype = {"mean": "float32", "variance": "float32", "deviations": "bfloat16"}
    weights = dict(zip(("diagonal_weight", "low_rank_weight"), swag_weights(RANK), strict=True))
    write_prior(folder, PriorConfig(parameters=shapes, rank=RANK, dtype=dtype, **weights), Made(shapes))


# ---------------------------------------------------------------------------------------------------------- what is done


def verify(folder: Path) -> None:
    """Hashes, layout, every value finite."""
    read_prior(folder, verify=True)


def load(folder: Path, rank: int | None = None, verified: bool = False) -> None:
    """As users do."""
    PriorModel.from_pretrained(folder, rank=rank, verify=verified)


def load_and_read(folder: Path, rank: int) -> float:
    """Every value that a truncated prior has, once."""
    prior = PriorModel.from_pretrained(folder, rank=rank, verify=False)
    parts = (prior.mean, prior.variance, prior.deviations)
    return sum(float(tensor.sum()) for tensors in parts for tensor in tensors.values())


def weights(folder: Path) -> tuple[PriorModel, dict[str, Tensor], dict[str, Tensor]]:
    """The prior, the weights (its mean, rounded to bfloat16) and their gradients."""
    prior = PriorModel.from_pretrained(folder, verify=False)
    theta = {name: mean.bfloat16() for name, mean in prior.mean.items()}
    return prior, theta, {name: torch.zeros_like(values) for name, values in theta.items()}


def steps(count: int, given: tuple[PriorModel, dict[str, Tensor], dict[str, Tensor]]) -> list[float]:
    """Seconds of penalty and gradient, `count` times; the first makes the K x K factor too."""
    prior, theta, gradient = given
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        value = float(prior.gaussian.add_gradient_(theta, gradient, 1e-6))
        seconds.append(time.perf_counter() - start)
    if not (math.isfinite(value) and value > 0):
        raise AssertionError(f"the penalty is {value}")
    return seconds


def measure(folder: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[Any, int]]:
    """Step -> its cost, and the bytes of the prior that it must read or write."""
    values = sum(map(math.prod, shapes.values()))
    found: dict[str, tuple[Any, int]] = {}
    found["write"] = in_new_process(partial(write, folder, shapes)), 16 * values
    found["verify"] = in_new_process(partial(verify, folder)), 16 * values
    found["load, verify=False"] = in_new_process(partial(load, folder)), 0
    found["load, verify=True"] = in_new_process(partial(load, folder, verified=True)), 16 * values
    found["load, rank=1, verify=False"] = in_new_process(partial(load, folder, 1)), 0
    for rank in (0, 1):
        cost = in_new_process(partial(load_and_read, folder, rank))
        found[f"load and read every value, rank={rank}, verify=False"] = cost, (8 + 2 * rank) * values
    cost = in_new_process(partial(steps, 2), partial(weights, folder))
    for name, seconds in zip(("first step", "next step"), cost.result, strict=True):
        found[f"penalty + gradient, {name}"] = replace(cost, seconds=seconds), 16 * values
    return found


def claims(costs: Mapping[str, Any], largest: int) -> list[dict[str, Any]]:
    """What the figures are held to."""

    def held(step: str, what: str, limit: float) -> dict[str, Any]:
        own = 1e-6 * costs[step].own
        return {"claim": f"{what} takes at most {limit:,.0f} MB", "measured": f"{own:,.0f} MB", "met": own <= limit}

    return [
        held("write", "writing (the largest tensor, made once, and 64 MB)", 8e-6 * largest + 64),
        held("verify", "verifying hashes and values", 100),
        held("load, verify=False", "loading", 50),
        held("penalty + gradient, next step", "penalty and gradient, beside weights and gradients,", 100),
    ]


if __name__ == "__main__":
    main()
