"""SWAG: time per snapshot and peak memory, at ResNet-50's tensors (25.6 million weights), K = 5 and 20.

    python benchmarks/swag_snapshot.py --threads 2

Per snapshot, once the ring of K is full and taken in turns:

    copies          the weights copied once into memory that is there, mean and squares read and written: the bytes of a
                    snapshot, without its arithmetic and without a look whether the weights are finite
    prior_hub       SwagEstimator.update
    of it: finite?  its look whether all weights are finite, which reads them once more
    bfloat16        the same with snapshots_dtype=torch.bfloat16
    concatenated    the method of swa_gaussian (Maddox et al. 2019), written again here: first and second moments per tensor by
                    out-of-place arithmetic, the deviation flattened and joined to the others by torch.cat, the oldest cut off
    AveragedModel   torch.optim.swa_utils: the mean only

Peak memory is that of a new process over what the model takes, in copies of the weights (4 bytes each): of K + 2 snapshots,
and of making the prior from them (SwagEstimator.prior, with and without release=True; its own snapshots are not counted).
On a GPU (--device cuda) a further row has the snapshots go to the CPU (device="cpu"): what `update` keeps the GPU waiting.
"""

from __future__ import annotations

import functools

import torch
from common import Row, finish, median_times, options, parser, peak_memory
from torch.optim.swa_utils import AveragedModel

from prior_hub import SwagEstimator
from prior_hub.learning.moments import surely_finite

CLAIM = "a SWAG snapshot costs at most 1.5 times the copies that it needs, whatever K"
LIMIT = 1.5


def main() -> None:
    """Print and write the tables."""
    given = options(parser(__doc__, devices=True, repeats=11))
    name, ranks = ("resnet18", (2, 4)) if given.quick else ("resnet50", (5, 20))
    ratios, rows = {}, []
    for rank in ranks:
        seconds = time_of(name, rank, given.device, given.repeats)
        ratios[rank] = seconds["prior_hub"] / seconds["copies"]
        rows += [
            {"table": f"Time per snapshot, K = {rank}", "method": m, "ms": 1e3 * s, "x copies": s / seconds["copies"]}
            for m, s in seconds.items()
        ]
    if given.device == "cpu":
        rows += memory_of(name, ranks[:1] if given.quick else ranks)
    low, high = (ratios[rank] for rank in ranks)
    claims = [
        {
            "claim": f"a snapshot costs at most {LIMIT} times its copies, K = {rank}",
            "measured": f"{ratios[rank]:.2f} x",
            "met": None if given.quick else ratios[rank] <= LIMIT,
            "why": "the look for NaN reads the weights once more, and three operations pass over every block in the cache",
        }
        for rank in ranks
    ]
    claims.append(
        {
            "claim": f"its cost does not grow with K: {ranks[1]} against {ranks[0]}",
            "measured": f"{high / low:.2f} x",
            "met": None if given.quick else high / low <= 1.15,
        }
    )
    finish("swag_snapshot", CLAIM, rows, given.json, claims=claims, device=given.device)


# ---------------------------------------------------------------------------------------------------------------- time


def time_of(name, rank, device, repeats):
    """Method -> median seconds of one snapshot."""
    model = make(name, device)
    methods = {
        "copies": Copies(model).update,
        "prior_hub": ours(rank).update,
        "of it: finite?": look,
        "bfloat16": ours(rank, snapshots_dtype=torch.bfloat16).update,
        "concatenated": Concatenated(rank).update,
        "AveragedModel": AveragedModel(model).update_parameters,
    }
    if device == "cuda":
        methods["prior_hub, to the CPU"] = ours(rank, device="cpu").update
    for _ in range(rank + 2):  # the rings are full
        move(model)
        for update in methods.values():
            update(model)
    return median_times({key: functools.partial(update, model) for key, update in methods.items()}, repeats)


def make(name, device="cpu"):
    """ResNet-50's tensors, or another model's of timm."""
    import timm

    torch.manual_seed(0)
    return timm.create_model(name, num_classes=1000).to(device)


@torch.no_grad()
def move(model):
    """Other weights, without a temporary."""
    for p in model.parameters():
        p.mul_(1.001).add_(1e-4)


def look(model):
    """What `update` refuses a diverged model by."""
    return surely_finite([p.detach() for p in model.parameters()])


def ours(rank, **options):
    """An estimator of all parameters."""
    return SwagEstimator(rank, head=(), **options)


class Copies:
    """The bytes of a snapshot."""

    def __init__(self, model):
        self.row, self.mean, self.squares = ([torch.zeros_like(p) for p in model.parameters()] for _ in range(3))

    @torch.no_grad()
    def update(self, model):
        """Move them."""
        for p, row, mean, squares in zip(model.parameters(), self.row, self.mean, self.squares, strict=True):
            row.copy_(p)
            mean.mul_(1.0)
            squares.mul_(1.0)


class Concatenated:
    """swa_gaussian's method."""

    def __init__(self, rank):
        self.rank, self.n = rank, 0
        self.mean, self.second, self.rows = {}, {}, {}

    @torch.no_grad()
    def update(self, model):
        """One snapshot."""
        n = self.n
        for name, p in model.named_parameters():
            if n == 0:
                self.mean[name], self.second[name] = torch.zeros_like(p), torch.zeros_like(p)
                self.rows[name] = p.new_empty((0, p.numel()))
            mean = self.mean[name] * n / (n + 1.0) + p.data / (n + 1.0)
            second = self.second[name] * n / (n + 1.0) + p.data**2 / (n + 1.0)
            deviation = (p.data - mean).view(-1, 1)
            rows = torch.cat((self.rows[name], deviation.t()), dim=0)
            if n + 1 > self.rank:
                rows = rows[1:]
            self.mean[name], self.second[name], self.rows[name] = mean, second, rows
        self.n += 1


# -------------------------------------------------------------------------------------------------------------- memory


def memory_of(name, ranks):
    """Rows of peak memory."""
    copies = 4 * sum(p.numel() for p in make(name).parameters())
    rows: list[Row] = []
    for rank in ranks:
        for method, collect in (
            ("prior_hub", functools.partial(collected, rank=rank)),
            ("bfloat16", functools.partial(collected, rank=rank, snapshots_dtype=torch.bfloat16)),
            ("concatenated", functools.partial(concatenated, rank=rank)),
        ):
            peak = peak_memory(collect, functools.partial(make, name))
            rows.append({"table": "Peak memory", "what": "snapshots", "method": method, "K": rank, "copies": peak / copies})
        for method, release in (("prior_hub", False), ("prior_hub, release=True", True)):
            peak = peak_memory(functools.partial(SwagEstimator.prior, release=release), functools.partial(full, name, rank))
            rows.append({"table": "Peak memory", "what": "prior", "method": method, "K": rank, "copies": peak / copies})
    return rows


def collected(model, rank, **options):
    """K + 2 snapshots."""
    estimator = ours(rank, **options)
    for _ in range(rank + 2):
        move(model)
        estimator.update(model)
    return estimator


def concatenated(model, rank):
    """K + 2 snapshots by swa_gaussian's method."""
    found = Concatenated(rank)
    for _ in range(rank + 2):
        move(model)
        found.update(model)
    return found


def full(name, rank):
    """An estimator with K + 2 snapshots."""
    return collected(make(name), rank)


if __name__ == "__main__":
    main()
