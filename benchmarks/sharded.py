"""Memory and time of a prior whose model FSDP2 has sharded over 1, 2 and 4 processes.

    python benchmarks/sharded.py [--quick] [--json FILE]

A prior over linear layers (25 million parameters; K = 5 and 20 deviations, float32) lies in a folder. Processes on gloo, one
thread each, shard the model with `fully_shard`, load the prior together and bind it with `PriorPenalty`. For each process:

    prior, MB        bytes of the tensors that it holds of the prior, whole storages
    RssAnon, MB      by how much its own memory grew from before loading to after binding (the mapped file is not its own)
    step, ms         one `add_gradient_`: K numbers and one are summed over the processes; of the slowest process
    load + bind, s   from the folder to a bound prior, without and with the verification, which one process does for all

A second table: the memory that two processes need, beside their snapshots, to write the prior that SWAG learned from the
sharded model: `save_prior`, one tensor at a time, and `prior`, which gathers all of it in every process.

Processes that share a machine also share its memory bandwidth, which bounds the step; with more processes than cores they
take turns.
"""

from __future__ import annotations

import gc
import json
import statistics
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from common import Row, finish, options, parser, resident
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from prior_hub import PriorModel, PriorPenalty, SwagEstimator

MEGABYTE = 1e6
FULL = {"width": 1024, "layers": 24, "ranks": (5, 20), "processes": (1, 2, 4), "saved": 5}
QUICK = {"width": 64, "layers": 3, "ranks": (3,), "processes": (1, 2), "saved": 3}


def network(size: dict[str, Any]) -> nn.Module:
    """The same one each time."""
    torch.manual_seed(0)
    width = size["width"]
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(size["layers"])))


def write_a_prior(model: nn.Module, rank: int, folder: Path) -> int:
    """Bytes of its numbers."""
    mean = {name: p.detach() for name, p in model.named_parameters()}
    variance = {name: torch.full_like(t, 1e-4) for name, t in mean.items()}
    generator = torch.Generator().manual_seed(1)
    rows = {n: torch.empty(rank, *t.shape).uniform_(-0.02, 0.02, generator=generator) for n, t in mean.items()}
    PriorModel.from_tensors(mean, variance, rows).save_pretrained(folder)
    return sum(t.numel() * 4 for t in mean.values()) * (rank + 2)


def bytes_of(penalty: PriorPenalty) -> int:
    """What the tensors of a bound prior keep in memory, whole storages."""
    kinds = (penalty.gaussian.mean, penalty.gaussian.variance, penalty.gaussian.deviations)
    storages = [tensor.untyped_storage() for kind in kinds for tensor in kind.values()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def step_here(rank: int, world: int, size: dict[str, Any], folder: str, repeats: int) -> None:
    """In each process: load, bind and step."""
    model = _sharded(rank, world, size, folder)
    found: dict[str, Any] = {}
    for verify in (True, False):
        penalty = prior = None  # the first one's memory is given back before the second is measured
        gc.collect()
        before = resident("RssAnon")
        dist.barrier()
        start = perf_counter()
        prior = PriorModel.from_pretrained_together(Path(folder) / "prior", verify=verify)
        penalty = PriorPenalty(prior, model, num_examples=1000)
        dist.barrier()
        found["verified" if verify else "load"] = perf_counter() - start
        found["anonymous"] = resident("RssAnon") - before
    assert penalty is not None
    found["bytes"] = bytes_of(penalty)
    penalty.add_gradient_()  # makes the K x K factor and the gradients
    seconds = []
    for _ in range(repeats):
        dist.barrier()
        start = perf_counter()
        penalty.add_gradient_()
        seconds.append(perf_counter() - start)
    found["seconds"] = seconds
    _tell(found, rank, folder)


def save_here(rank: int, world: int, size: dict[str, Any], folder: str, repeats: int) -> None:
    """In each process: snapshots of the sharded model, and what writing the prior needs beside them."""
    del repeats
    model = _sharded(rank, world, size, folder)
    estimator = SwagEstimator(size["saved"], head=())
    for _ in range(size["saved"]):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.ones_like(parameter), alpha=0.01)
        estimator.update(model)
    found = {"snapshots": resident("RssAnon")}
    for name, job in {
        "save_prior": lambda: estimator.save_prior(Path(folder) / "learned"),
        "prior": lambda: estimator.prior(),
    }.items():
        gc.collect()
        dist.barrier()
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
        before, start = resident(), perf_counter()
        kept = job()
        dist.barrier()
        found[name] = resident("VmHWM") - before
        found[f"{name}, seconds"] = perf_counter() - start
        del kept
    _tell(found, rank, folder)


def _sharded(rank: int, world: int, size: dict[str, Any], folder: str) -> nn.Module:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store-{world}", rank=rank, world_size=world)
    model = network(size)
    mesh = init_device_mesh("cpu", (world,))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _tell(found: dict[str, Any], rank: int, folder: str) -> None:
    (Path(folder) / f"found-{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def in_processes(job: Any, world: int, size: dict[str, Any], folder: Path, repeats: int) -> list[dict[str, Any]]:
    """What each process found."""
    (folder / f"store-{world}").unlink(missing_ok=True)
    torch.multiprocessing.start_processes(job, (world, size, str(folder), repeats), nprocs=world, start_method="fork")
    return [json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(world)]


def main() -> None:
    """Measure and tell."""
    given = options(parser(__doc__))
    torch.set_num_threads(1)  # before any other thread is there: the processes are forked
    size = QUICK if given.quick else FULL
    rows: list[Row] = []
    share = 1.0
    with tempfile.TemporaryDirectory(prefix="prior-hub-sharded-") as place:
        folder = Path(place)
        values = sum(p.numel() for p in network(size).parameters())
        for rank in size["ranks"]:
            everything = write_a_prior(network(size), rank, folder / "prior")
            for world in size["processes"]:
                found = in_processes(step_here, world, size, folder, given.repeats)
                held = [one["bytes"] for one in found]
                if world == 2:
                    share = max(share, *(abs(bytes_held / (everything / 2) - 1) + 1 for bytes_held in held))
                slowest = [max(seconds) for seconds in zip(*(one["seconds"] for one in found), strict=True)]
                rows.append(
                    {
                        "table": "A bound prior",
                        "K": rank,
                        "processes": world,
                        "prior, MB": max(held) / MEGABYTE,
                        "share of all": max(held) / everything,
                        "RssAnon, MB": max(one["anonymous"] for one in found) / MEGABYTE,
                        "step, ms": 1e3 * statistics.median(slowest),
                        "load + bind, s": max(one["load"] for one in found),
                        "verified, s": max(one["verified"] for one in found),
                    }
                )
        found = in_processes(save_here, 2, size, folder, given.repeats)
        everything = 4 * values * (size["saved"] + 2)
        for name in ("save_prior", "prior"):
            rows.append(
                {
                    "table": f"Writing what SWAG learned, K = {size['saved']}, 2 processes",
                    "how": name,
                    "rank 0, MB": found[0][name] / MEGABYTE,
                    "rank 1, MB": found[1][name] / MEGABYTE,
                    "most, of the prior": max(one[name] for one in found) / everything,
                    "seconds": max(one[f"{name}, seconds"] for one in found),
                }
            )
        del rows[-1]["seconds"]  # it only gathers
        saved = max(one["save_prior"] for one in found) / everything
    claims = [
        {
            "claim": "per-rank prior memory within 5 % of half under FSDP2 with 2 processes",
            "measured": f"{100 * (share - 1):.2g} % away from half",
            "met": share < 1.05,
        },
        {
            "claim": "to write a learned prior a rank needs less than a fifth of the prior's memory, beside its snapshots",
            "measured": f"{100 * saved:.3g} %",
            "met": None if given.quick else saved < 0.2,
            "why": "the process's own noise is larger than so small tensors",
        },
    ]
    notes = [f"{values:,} parameters in {size['layers']} linear layers of {size['width']}; gloo, one thread per process."]
    finish("sharded", "a rank holds its share of the prior only", rows, given.json, claims=claims, notes=notes)


if __name__ == "__main__":
    main()
