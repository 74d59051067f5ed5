"""Shards of every kind that FSDP2 makes, on four processes, without transformers.

    python worker_sharding.py FOLDER

For each layout every rank writes rank-RANK.json: errors against full tensors and the dense float64 formula, which the
test bounds.
"""

from __future__ import annotations

import json
import sys
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

from prior_hub import PriorPenalty
from prior_hub.distributed import contribution, copy_full_, is_sharded, local_tensor, shard_like, sum_over_ranks

RANKS, N = 4, 11


def network() -> nn.Module:
    """Sizes that four ranks cannot share evenly: 7 and 3 rows, and a bias of 1."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 7), nn.Linear(7, 3), nn.Linear(3, 1))


def layouts(mesh: Any) -> dict[str, nn.Module]:
    """name -> the same network, sharded."""
    split, hybrid, both, partly = network(), network(), network(), network()
    fully_shard(split, mesh=init_device_mesh("cpu", (4,)))
    fully_shard(hybrid, mesh=mesh)  # two replicas, each on two ranks
    parallelize_module(both, mesh["inner"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(both, mesh=mesh["outer"])
    fully_shard(partly[2], mesh=init_device_mesh("cpu", (4,)))  # the other layers stay plain tensors, as adapters do
    return {"FSDP2": split, "hybrid": hybrid, "FSDP2 and tensor parallelism": both, "one layer only": partly}


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
    results = {name: check(model) for name, model in layouts(mesh).items()}
    (Path(folder) / f"rank-{rank}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":  # forked rather than started by torchrun: what takes the time is importing torch
    torch.multiprocessing.start_processes(main, args=(sys.argv[1],), nprocs=RANKS, start_method="fork")
