"""Local shards of a tensor and sums over ranks: the only place that knows about DTensor.

A parameter is either a plain tensor (one process, or a DDP replica: every rank holds all of it) or a `DTensor` (FSDP2,
tensor parallelism: every rank holds a shard). Elementwise work always runs on `local_tensor(...)`; a sum over entries is
the sum over ranks of each local sum times `contribution(...)`, so that replicated entries count once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = [
    "contribution",
    "copy_full_",
    "gather_over_ranks",
    "is_sharded",
    "local_tensor",
    "moved_placements",
    "process_index",
    "reshard",
    "shard_index",
    "shard_like",
    "sum_over_ranks",
]


def is_sharded(tensor: Tensor) -> bool:
    """Whether `tensor` is a `DTensor`, that is, whether this rank may hold only a part of it."""
    return type(tensor).__name__ == "DTensor" and hasattr(tensor, "device_mesh")


def local_tensor(tensor: Tensor) -> Tensor:
    """The part of `tensor` that this rank holds, sharing its memory: (*local_shape)."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def shard_like(full: Tensor, reference: Tensor, *, leading: int = 0) -> Tensor:
    """This rank's part of `full`, cut exactly as `reference` is.

    Args:
        full: (*leading_shape, *shape), the same values on every rank.
        reference: (*shape), a plain tensor or a DTensor.
        leading: number of leading dimensions of `full` that `reference` does not have (1 for deviations); they are
            never cut.

    Returns:
        (*leading_shape, *local_shape); `full` itself when `reference` is a plain tensor. No communication.
    """
    if not is_sharded(reference):
        return full
    from torch.distributed.tensor import distribute_tensor

    placements = moved_placements(reference.placements, leading)  # type: ignore[attr-defined]
    mesh = reference.device_mesh  # type: ignore[attr-defined]
    moved_full = full.to(reference.device)
    return distribute_tensor(moved_full, mesh, placements, src_data_rank=None).to_local()


def moved_placements(placements: Sequence[Any], leading: int) -> list[Any]:
    """DTensor placements for a tensor with `leading` further dimensions in front, none of which is cut."""
    from torch.distributed.tensor.placement_types import Replicate, Shard

    moved: list[Any] = []
    for placement in placements:
        if leading == 0 or isinstance(placement, Replicate):
            moved.append(placement)
        elif type(placement) is Shard:
            moved.append(Shard(placement.dim + leading))
        else:  # _StridedShard of FSDP2 with tensor parallelism, which is no Shard in every version
            moved.append(type(placement)(placement.dim + leading, split_factor=placement.split_factor))
    return moved


def copy_full_(target: Tensor, full: Tensor) -> None:
    """Write the full-shaped values `full` (*shape) into `target` in place, each rank its own shard."""
    with torch.no_grad():
        local = local_tensor(target)
        local.copy_(shard_like(full, target).to(device=local.device, dtype=local.dtype))


def contribution(tensor: Tensor) -> float:
    """The weight of this rank's local sum in a sum over all ranks: 1 / (number of ranks holding the same entries)."""
    if not is_sharded(tensor):
        return 1.0 / _world_size()
    from torch.distributed.tensor.placement_types import Replicate

    mesh = tensor.device_mesh  # type: ignore[attr-defined]
    pairs = zip(mesh.shape, tensor.placements, strict=True)  # type: ignore[attr-defined]
    shards: int = math.prod(size for size, placement in pairs if not isinstance(placement, Replicate))
    return float(shards) / _world_size()


def shard_index(tensor: Tensor) -> int:
    """Which of a tensor's shards this rank holds, 0, 1, ...; ranks that hold the same entries have the same index."""
    if not is_sharded(tensor):
        return 0
    from torch.distributed.tensor.placement_types import Replicate

    mesh = tensor.device_mesh  # type: ignore[attr-defined]
    index = 0
    for size, place, placement in zip(mesh.shape, mesh.get_coordinate(), tensor.placements, strict=True):  # type: ignore[attr-defined]
        if not isinstance(placement, Replicate):
            index = index * size + place
    return index


def sum_over_ranks(values: Tensor) -> Tensor:
    """All-reduce `values` in place over every rank (a few floats: nothing is gained by making it asynchronous)."""
    if _world_size() > 1:
        dist.all_reduce(values, op=dist.ReduceOp.SUM)
    return values


def gather_over_ranks(tensor: Tensor) -> Tensor:
    """(*shape) -> (W, *shape), the tensor of every rank, with gradients; `tensor` must have one shape on all W ranks.

    Each rank's tensor gets the sum of the gradients of all ranks' losses, so that DDP, which averages gradients over ranks,
    gives the gradient of the mean of the ranks' losses.
    """
    gathered: Tensor = _Gather.apply(tensor) if _world_size() > 1 else tensor.unsqueeze(0)
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        del ctx
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(_world_size())]
        dist.all_gather(parts, tensor.contiguous())
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        del ctx
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total, op=dist.ReduceOp.SUM)
        return total[process_index()]


def process_index() -> int:
    """This process's rank; 0 where there is one process."""
    return dist.get_rank() if _world_size() > 1 else 0


def reshard(model: torch.nn.Module) -> None:
    """Give FSDP2 modules back to their sharded state, which `evaluate()` leaves for the root group."""
    for module in model.modules():
        if hasattr(module, "reshard") and hasattr(module, "unshard"):
            module.reshard()  # type: ignore[operator]


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
