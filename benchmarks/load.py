"""Loading a prior against `torch.load` of the paper's four .pt files: time and peak memory, whole and truncated.

    python benchmarks/load.py
    python benchmarks/load.py --model resnet50 --rank 20 --kept 5 --folder /scratch

The other side is what "Pre-Train Your Loss" ships and its code does (hsouri/BayesianTransferLearning): *_model.pt, *_mean.pt,
*_variance.pt (P,) and *_covmat.pt (K, P), each read by torch.load, whole; rows beyond the wanted ones are dropped afterwards.
torch.load can map a file too (mmap=True), which nobody's code for these files does; it is here for comparison. Ours is
PriorModel.from_pretrained of the same numbers, with the sha256 of each file compared and every value checked (verify=True, the
default) and without.

"load": until the object is there. "load and read": and every value that was asked for is summed, since mapped values are read
only then. Times are medians, all methods in turns, with the files in the system's cache. Memory is the peak of a new process
that loads and reads: "own" is anonymous memory, which the machine must have; "mapped" are pages of the files, which are the
system's cache and are given back when memory is short.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import Row, finish, median_times, options, parser
from problems import Shapes, count, shapes_of
from torch import Tensor
from watch import in_new_process

from prior_hub import PriorModel

CLAIM = "a prior is loaded without a copy in memory, and what is not asked for is not read"
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PARTS = ("model", "mean", "variance", "covmat")


def main() -> None:
    """Make the files, print and write the table."""
    made = parser(__doc__, repeats=5)
    made.add_argument("--model", help="resnet18, resnet50, or a number of values P (default: resnet50)")
    made.add_argument("--rank", type=int, help="K (default: 20)")
    made.add_argument("--kept", type=int, default=5, help="rows kept in the truncated loads (default: %(default)s)")
    made.add_argument("--folder", type=Path, help="where 5 GB of files are made and removed (default: the temporary folder)")
    given = options(made)
    shapes = shapes_of(given.model or ("1e6" if given.quick else "resnet50"))
    rank = given.rank or (6 if given.quick else 20)
    with tempfile.TemporaryDirectory(dir=given.folder, prefix="prior-hub-load-") as folder:
        write(Path(folder), shapes, rank)
        rows = measure(Path(folder), rank, min(given.kept, rank), given.repeats)
    size = 4 * count(shapes) * (2 + rank)
    notes = [
        f"P = {count(shapes):,}; the prior has {1e-6 * size:,.0f} MB in fp32, the .pt files those and the model's weights."
    ]
    finish("load", CLAIM, rows, given.json, claims=claims(rows), notes=notes)


# -------------------------------------------------------------------------------------------------------------- the files


def write(folder: Path, shapes: Shapes, rank: int) -> None:
    """The four files of the paper, and the same numbers as a prior with fp32 and with bf16 deviations."""
    size = count(shapes)
    flat = {"mean": noise(1, size)[0], "variance": noise(1, size)[0].square_().mul_(1e-4).add_(1e-8)}
    covmat = noise(rank, size).mul_(0.03)
    for kind, tensor in (*flat.items(), ("covmat", covmat)):
        torch.save(tensor, folder / f"prior_{kind}.pt")
    mean, variance = (split(flat[kind], shapes) for kind in ("mean", "variance"))
    torch.save({name: tensor.clone() for name, tensor in mean.items()}, folder / "prior_model.pt")
    for name, dtype in TYPES.items():
        deviations = {key: rows.to(dtype) for key, rows in split(covmat, shapes).items()}
        PriorModel.from_tensors(mean, variance, deviations).save_pretrained(folder / name)


def noise(rows: int, size: int) -> Tensor:
    """(rows, size) of normal numbers, repeated after 1e6: making them is not what is measured."""
    few = torch.randn(min(rows * size, 1_000_003))
    return few.repeat(math.ceil(rows * size / len(few)))[: rows * size].view(rows, size).clone()


def split(flat: Tensor, shapes: Shapes) -> dict[str, Tensor]:
    """(..., P) -> name -> (..., *shape), views."""
    parts = flat.split([math.prod(shape) for shape in shapes.values()], dim=-1)
    return {name: part.unflatten(-1, shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


# -------------------------------------------------------------------------------------------------------------- loading


def four_files(folder: Path, rank: int | None, mmap: bool) -> list[Tensor]:
    """What the paper's code reads, rows beyond `rank` dropped."""
    model, mean, variance, covmat = (
        torch.load(folder / f"prior_{part}.pt", map_location="cpu", weights_only=True, mmap=mmap) for part in PARTS
    )
    del model
    return [mean, variance, covmat if rank is None else covmat[:rank]]


def ours(folder: Path, rank: int | None, name: str, verify: bool) -> list[Tensor]:
    """The same of a prior."""
    prior = PriorModel.from_pretrained(folder / name, rank=rank, verify=verify)
    return [t for tensors in (prior.mean, prior.variance, prior.deviations) for t in tensors.values()]


def read(load: Callable[[], Iterable[Tensor]]) -> float:
    """Load, and use every value once."""
    return sum(float(tensor.sum()) for tensor in load())


def methods(folder: Path, rank: int | None) -> dict[str, Callable[[], list[Tensor]]]:
    """Name -> what loads `rank` rows."""
    return {
        "torch.load of the four .pt files": partial(four_files, folder, rank, mmap=False),
        "torch.load, mmap=True": partial(four_files, folder, rank, mmap=True),
        "from_pretrained": partial(ours, folder, rank, "fp32", verify=True),
        "from_pretrained, verify=False": partial(ours, folder, rank, "fp32", verify=False),
        "from_pretrained, bf16 deviations": partial(ours, folder, rank, "bf16", verify=True),
        "from_pretrained, bf16 deviations, verify=False": partial(ours, folder, rank, "bf16", verify=False),
    }


def measure(folder: Path, rank: int, kept: int, repeats: int) -> list[Row]:
    """A row per method, whole and truncated."""
    rows: list[Row] = []
    for wanted in (None, kept, 0):
        loads = methods(folder, wanted)
        loading = median_times(loads, repeats)
        reading = median_times({name: partial(read, load) for name, load in loads.items()}, repeats)
        for name, load in loads.items():
            cost = in_new_process(partial(read, load))
            row: Row = {"rows read": f"{rank} of {rank}" if wanted is None else f"{wanted} of {rank}", "method": name}
            row |= {"load ms": 1e3 * loading[name], "load and read ms": 1e3 * reading[name]}
            rows.append(row | {"own MB": 1e-6 * cost.own, "mapped MB": 1e-6 * cost.mapped})
    return rows


def claims(rows: list[Row]) -> list[dict[str, Any]]:
    """What the figures are held to."""
    theirs, _, checked, unchecked = rows[:4]
    truncated = rows[len(rows) // 3 : 2 * len(rows) // 3]
    faster = theirs["load ms"] / unchecked["load ms"]
    fewer = truncated[0]["load and read ms"] / truncated[3]["load and read ms"]
    verified = checked["load ms"] / theirs["load ms"]
    return [
        {
            "claim": "loading with every check takes at most 32 MB of memory of its own, whatever the prior's size",
            "measured": f"{checked['own MB']:.0f} MB (torch.load: {theirs['own MB']:,.0f} MB)",
            "met": checked["own MB"] <= 32,
        },
        {
            "claim": "without verification it is loaded at least 10 times faster than by torch.load",
            "measured": f"{faster:.1f} x",
            "met": faster >= 10,
        },
        {
            "claim": "without verification the first rows are loaded and read at least twice as fast as torch.load gets them",
            "measured": f"{fewer:.1f} x",
            "met": fewer >= 2,
        },
        {
            "claim": "with every hash and value checked, loading takes at most 3 times what torch.load takes without any check",
            "measured": f"{verified:.2f} x",
            "met": verified <= 3,
        },
    ]


if __name__ == "__main__":
    main()
