"""Shards of every kind that FSDP2 makes, on four processes, without transformers.

    python worker_sharding.py FOLDER

For each layout every rank writes rank-RANK.json: errors against full tensors, the dense float64 formula, and the same
training of the same network on one process, which the tests bound. Rank 0 also writes the priors learned on the way.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from models import dense_penalty, random_prior
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from prior_hub import BAOA, PriorHubError, PriorModel, PriorPenalty, SwagEstimator
from prior_hub.distributed import agreed, contribution, copy_full_, is_sharded, local_tensor, shard_like, sum_over_ranks
from prior_hub.priors import gaussian as gaussian_module

RANKS, N = 4, 11
# What is trained how and for how many steps: by the prior's gradient, by its implicit step, by that with a falling rate of
# its own for the vectors (some ranks have no value of some) or with AdamW's lengths, by a sampler at temperature 0.
TRAININGS = {
    "FSDP2": (("implicit", 8), ("two rates", 8), ("adamw", 8), ("cold", 20)),
    "hybrid": (("cold", 4),),
    "FSDP2 and tensor parallelism": (("implicit", 4), ("cold", 4)),
    "one layer only": (("gradient", 4),),
}
# How what SWAG learned in the last of them is written.
WRITTEN: dict[str, dict[str, Any]] = {
    "whole": {"deviations_dtype": torch.bfloat16},
    "compressed": {"explained": 0.9},
    "in two files": {"max_shard_size": 1000, "eps": 0.01},
}


def network() -> nn.Module:
    """Sizes that four ranks cannot share evenly: 7 and 3 rows, and a bias of 1."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 7), nn.Linear(7, 3), nn.Linear(3, 1))


def layouts(mesh: Any) -> dict[str, Callable[[], nn.Module]]:
    """name -> what makes the same network, sharded."""
    four = init_device_mesh("cpu", (4,))

    def split() -> nn.Module:
        return fully_shard(network(), mesh=four)

    def hybrid() -> nn.Module:  # two replicas, each on two ranks
        return fully_shard(network(), mesh=mesh)

    def both() -> nn.Module:
        model = parallelize_module(network(), mesh["inner"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        return fully_shard(model, mesh=mesh["outer"])

    def partly() -> nn.Module:  # the other layers stay plain tensors, as adapters do
        model = network()
        fully_shard(model[2], mesh=four)
        return model

    return {"FSDP2": split, "hybrid": hybrid, "FSDP2 and tensor parallelism": both, "one layer only": partly}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def trained(model: nn.Module, update: str, steps: int) -> tuple[dict[str, torch.Tensor], SwagEstimator]:
    """Weights after a training in which every rank sees the same data, and four snapshots of them on the way."""
    generator = torch.Generator().manual_seed(3)
    inputs, targets = torch.randn(16, 5, generator=generator), torch.randn(16, 1, generator=generator)
    implicit = update in ("implicit", "two rates", "adamw")
    stiff = {"variance": 1e-4} if implicit else {}
    prior = random_prior(network(), head=("4",), **stiff)
    penalty = PriorPenalty(prior, model, num_examples=N, head_variance=0.5)
    if update == "cold":
        optimizer: torch.optim.Optimizer = BAOA(
            model.parameters(), lr=0.05, num_data=N, temperature=0.0, prior=penalty.bound_gaussians("full")
        )
    elif update == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.0)
    elif update == "two rates":
        vectors, matrices = ([p for p in model.parameters() if (p.ndim == 1) == flat] for flat in (True, False))
        optimizer = torch.optim.SGD([{"params": vectors, "lr": 0.3}, {"params": matrices}], lr=0.02, momentum=0.5)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.5)
    if implicit:
        penalty.attach(optimizer)
    estimator = SwagEstimator(3, head=("4",))
    for step in range(steps):
        nn.functional.mse_loss(model(inputs), targets).backward()
        if update == "gradient":
            penalty.add_gradient_()
        optimizer.step()
        optimizer.zero_grad()
        if update == "two rates":
            optimizer.param_groups[0]["lr"] *= 0.9
        if step % (steps // 4) == 0:
            estimator.update(model)
    return {name: whole(p) for name, p in model.named_parameters()}, estimator


@contextmanager
def between_the_sizes_of_the_ranks() -> Iterator[None]:
    """The number of values below which a step is float64 throughout lies between what some ranks hold and what others do."""
    before = gaussian_module._SMALL
    gaussian_module._SMALL = 3 * 30  # K = 3; ranks hold 38, 38, 38 and 21 values of the body
    try:
        yield
    finally:
        gaussian_module._SMALL = before


def distance(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """The largest difference of any two values."""
    assert ours.keys() == theirs.keys()
    return max(float((t.detach() - theirs[n]).abs().max()) for n, t in ours.items())


class Watched(SwagEstimator):
    """Keeps how many values were gathered at a time."""

    def _gathered(self, name: str, local: torch.Tensor, *, leading: int = 0) -> torch.Tensor:
        full = super()._gathered(name, local, leading=leading)
        self.gathered = [*getattr(self, "gathered", []), full.numel()]
        return full


def check_training(make: Callable[[], nn.Module], trainings: tuple[tuple[str, int], ...], folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"weights": {}, "moved": {}, "swag": {}, "spread": {}}
    for update, steps in trainings:
        with between_the_sizes_of_the_ranks() if update in ("two rates", "adamw") else nullcontext():
            weights, estimator = trained(make(), update, steps)
            expected, reference = trained(network(), update, steps)  # on this rank alone
        found["weights"][update] = distance(weights, expected)
        found["moved"][update] = distance(dict(network().named_parameters()), expected)
        prior, single = estimator.prior(), reference.prior()
        deviations = [{n: t.sqrt() for n, t in one.variance.items()} for one in (prior, single)]  # in the weights' own unit
        kinds = [(prior.mean, single.mean), (prior.deviations, single.deviations), tuple(deviations)]
        found["swag"][update] = max(distance(ours, theirs) for ours, theirs in kinds)
        found["spread"][update] = max(float(t.max()) for t in deviations[1].values())
    # the last one, written without being gathered
    estimator.__class__ = Watched
    for name in WRITTEN if len(trainings) > 1 else ("in two files",):
        settings = dict(WRITTEN[name])
        estimator.gathered = []
        estimator.save_prior(folder / name, dataset="synthetic", **settings)
        found[f"{name}: gathered"] = max(estimator.gathered)
        settings.pop("max_shard_size", None)
        gathered = estimator.prior(dataset="synthetic", **settings)
        if dist.get_rank() == 0:
            gathered.save_pretrained(folder / f"{name}, gathered")
    found["largest"] = max(p.numel() for p in network().parameters())
    # on rank 0 alone the disk is not writable: a file stands where the folder is to be
    (folder / f"file {dist.get_rank()}").write_text("")
    try:
        estimator.save_prior(folder / "file 0" / "prior")
        found["refused"] = ""
    except (OSError, PriorHubError) as error:
        found["refused"] = f"{type(error).__name__}: {error}"
    return found


def bytes_of(gaussian: Any) -> int:
    """What its tensors keep in memory: whole storages, not the views of them that are used."""
    tensors = [t for kind in (gaussian.mean, gaussian.variance, gaussian.deviations) for t in kind.values()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def check_loading(mesh: Any, folder: Path) -> dict[str, Any]:
    """A prior on disk, bound to shards: what a rank holds and sends, and a damaged file that only some ranks look at."""
    rank = dist.get_rank()

    def wide() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64), nn.Linear(64, 4))

    path = folder / "wide"
    if rank == 0:
        random_prior(wide(), head=("3",), rank=5).save_pretrained(path)
    dist.barrier()
    prior = PriorModel.from_pretrained_together(path)
    found: dict[str, Any] = {"bytes": {}, "values": sum(t.numel() for t in prior.mean.values())}
    sent: list[int] = []
    original = dist.all_reduce

    def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(tensor.numel())
        return original(tensor, *args, **kwargs)

    for name, ranks in {"two shards": mesh, "four shards": init_device_mesh("cpu", (4,))}.items():
        model = fully_shard(wide(), mesh=ranks)
        for head in (None, 0.5):
            penalty = PriorPenalty(prior, model, num_examples=N, head_variance=head)
            penalty.add_gradient_()  # makes the K x K factor, once
            sent.clear()
            dist.all_reduce = counted
            penalty.add_gradient_()
            dist.all_reduce = original
            found[f"sent with head variance {head}"] = list(sent)
        found["bytes"][name] = bytes_of(penalty.gaussian)

    def refused(job: Callable[[], Any]) -> str:
        try:
            job()
        except Exception as error:  # noqa: BLE001
            return f"{type(error).__name__}: {error}"
        return ""

    dist.barrier()
    if rank == 0:
        damaged = path / "prior.safetensors"
        content = bytearray(damaged.read_bytes())
        content[-3] ^= 1
        damaged.write_bytes(content)
    dist.barrier()
    found["damaged"] = refused(lambda: PriorModel.from_pretrained_together(path))
    found["not verified"] = refused(lambda: PriorModel.from_pretrained_together(path, verify=False))
    reads = PriorModel.from_pretrained
    if rank == 2:  # which comes after rank 0

        def broken(*_: Any, **__: Any) -> Any:
            raise ZeroDivisionError("of rank 2")

        PriorModel.from_pretrained = broken  # type: ignore[method-assign]
    found["rank 2 alone"] = refused(lambda: PriorModel.from_pretrained_together(path, verify=False))
    PriorModel.from_pretrained = reads  # type: ignore[method-assign]
    found["agreed"] = agreed(lambda: rank)
    return found


def check(model: nn.Module) -> dict[str, Any]:
    whole = dict(network().named_parameters())
    found: dict[str, Any] = {"placements": sorted({str(p.placements) for p in model.parameters() if isinstance(p, DTensor)})}

    pairs = {n: p for n, p in model.named_parameters() if is_sharded(p)}
    found["cut as the parameter is"] = all(torch.equal(shard_like(whole[n], p), local_tensor(p)) for n, p in pairs.items())
    rows = {n: torch.stack([whole[n].detach(), 2 * whole[n].detach()]) for n in pairs}
    found["rows too"] = all(
        torch.equal(shard_like(rows[n], p, leading=1), torch.stack([local_tensor(p), 2 * local_tensor(p)]))
        for n, p in pairs.items()
    )
    counts = torch.tensor([contribution(p) * local_tensor(p).numel() for p in model.parameters()], dtype=torch.float64)
    found["entries counted once"] = sum_over_ranks(counts).tolist() == [p.numel() for p in whole.values()]

    prior = random_prior(network(), head=("4",))
    penalty = PriorPenalty(prior, model, num_examples=N, head_variance=0.5)
    value = float(penalty.add_gradient_()) * N
    gradients = {n: p.grad for n, p in model.named_parameters()}
    gradients = {n: (g.full_tensor() if isinstance(g, DTensor) else g) for n, g in gradients.items()}
    nats, dense = dense_penalty(prior, {n: p for n, p in whole.items() if n in prior.mean})
    dense |= {n: p.detach().double() / 0.5 for n, p in whole.items() if n not in prior.mean}
    nats += sum(float(p.detach().double().square().sum()) for n, p in whole.items() if n not in prior.mean)
    found["penalty"] = abs(value / nats - 1)
    found["penalty without gradient"] = abs(float(penalty.penalty()) / nats - 1)
    found["gradient"] = max(float((g - dense[n] / N).norm() / (dense[n] / N).norm()) for n, g in gradients.items())

    estimator = SwagEstimator(2, head=("4",))
    estimator.update(model)
    with torch.no_grad():
        for parameter in pairs.values():
            if dist.get_rank() == 1:
                local_tensor(parameter).fill_(torch.nan)
    try:
        estimator.update(model)
        said = ""
    except PriorHubError as error:
        said = f"{type(error).__name__}: {error}"
    found["diverged on rank 1"] = [said, estimator.num_snapshots]

    new = {n: torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) for n, p in whole.items()}
    for name, parameter in model.named_parameters():
        copy_full_(parameter, new[name])
    full = {n: (p.full_tensor() if isinstance(p, DTensor) else p) for n, p in model.named_parameters()}
    found["written in place"] = all(torch.equal(full[n], new[n]) for n in new)
    return found


def main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    results: dict[str, Any] = {}
    for name, make in layouts(mesh).items():
        place = Path(folder) / name
        place.mkdir(exist_ok=True)
        results[name] = check(make()) | {"training": check_training(make, TRAININGS[name], place)}
    results["loading"] = check_loading(mesh, Path(folder))
    (Path(folder) / f"rank-{rank}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":  # forked rather than started by torchrun: what takes the time is importing torch
    torch.multiprocessing.start_processes(main, args=(sys.argv[1],), nprocs=RANKS, start_method="fork")
