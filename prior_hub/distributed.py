"""Local shards of a tensor and sums over ranks: the only place that knows about DTensor.

A parameter is either a plain tensor (one process, or a DDP replica: every rank holds all of it) or a `DTensor` (FSDP2,
tensor parallelism: every rank holds a shard). Elementwise work always runs on `local_tensor(...)`; a sum over entries is
the sum over ranks of each local sum times `contribution(...)`, so that replicated entries count once.

A rank's part of a full tensor is cut where that tensor lies (`shard_slices`, `cut`): of a memory-mapped file only the pages of
that part are read, and only that part is moved to an accelerator.
"""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from prior_hub import errors

__all__ = [
    "agreed",
    "contribution",
    "contribution_of",
    "copy_full_",
    "cut",
    "first_on_its_host",
    "gather_over_ranks",
    "is_sharded",
    "local_tensor",
    "moved_placements",
    "process_index",
    "reshard",
    "shard_index",
    "shard_like",
    "shard_slices",
    "sum_over_ranks",
    "told_by_rank_0",
    "world_size",
]

_T = TypeVar("_T")


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
        (*leading_shape, *local_shape) on the device of the shard, with memory of its own; `full` itself when `reference` is a
        plain tensor. No communication, and nothing but this part of `full` is read or moved.
    """
    if not is_sharded(reference):
        return full
    return cut(full, shard_slices(reference), leading=leading, device=local_tensor(reference).device)


def shard_slices(reference: Tensor) -> tuple[slice | Tensor, ...]:
    """Which part of a full tensor this rank holds of `reference`: a slice for each dimension; () of a plain tensor, never cut.

    Where tensor parallelism and FSDP2 share a dimension unevenly, a part may have holes: then indices stand for the slice.
    """
    if not is_sharded(reference):
        return ()
    from torch.distributed.tensor import distribute_tensor
    from torch.distributed.tensor.placement_types import Replicate

    mesh, dimensions = reference.device_mesh, reference.ndim  # type: ignore[attr-defined]
    found: list[slice | Tensor] = []
    for dimension, size in enumerate(reference.shape):
        along = [
            _at(placement, 0)
            if not isinstance(placement, Replicate) and placement.dim % dimensions == dimension
            else Replicate()
            for placement in reference.placements  # type: ignore[attr-defined]
        ]
        if all(isinstance(placement, Replicate) for placement in along):
            found.append(slice(0, size))
            continue
        # torch itself cuts 0, 1, ..., size - 1, so that a part is what torch says it is, whatever the placements are
        entries = torch.arange(size, device="cpu")  # whatever the default device is
        own = distribute_tensor(entries, mesh, along, src_data_rank=None).to_local().cpu()
        start = int(own[0]) if len(own) else 0
        whole = torch.equal(own, entries[start : start + len(own)])
        found.append(slice(start, start + len(own)) if whole else own)
    return tuple(found)


def cut(
    full: Tensor, slices: Sequence[slice | Tensor], *, leading: int = 0, device: torch.device | str | None = None
) -> Tensor:
    """The part of `full` (*leading_shape, *shape) that `slices` name, copied to `device`; without slices `full`, moved there.

    The copy has memory of its own, of its own size: of a memory-mapped tensor no page outside the part is touched, and none
    stays in use.
    """
    device = full.device if device is None else torch.device(device)
    if not slices:
        return full.to(device)
    part = full
    for dimension, own in enumerate(slices, start=leading):
        part = (
            part.narrow(dimension, own.start, own.stop - own.start) if isinstance(own, slice) else _picked(part, dimension, own)
        )
    return torch.empty(part.shape, dtype=full.dtype, device=device).copy_(part)


def _picked(tensor: Tensor, dimension: int, indices: Tensor) -> Tensor:
    return tensor.index_select(dimension, indices.to(tensor.device))


def _at(placement: Any, dimension: int) -> Any:
    """The placement that cuts `dimension` as `placement` cuts its own."""
    from torch.distributed.tensor.placement_types import Shard

    if type(placement) is Shard:
        return Shard(dimension)
    # _StridedShard of FSDP2 with tensor parallelism, which is no Shard in every version
    return type(placement)(dimension, split_factor=placement.split_factor)


def moved_placements(placements: Sequence[Any], leading: int) -> list[Any]:
    """DTensor placements for a tensor with `leading` further dimensions in front, none of which is cut."""
    from torch.distributed.tensor.placement_types import Replicate

    return [p if leading == 0 or isinstance(p, Replicate) else _at(p, p.dim + leading) for p in placements]


def copy_full_(target: Tensor, full: Tensor) -> None:
    """Write the full-shaped values `full` (*shape) into `target` in place, each rank its own shard."""
    with torch.no_grad():
        local = local_tensor(target)
        local.copy_(shard_like(full, target).to(device=local.device, dtype=local.dtype))


def contribution(tensor: Tensor) -> float:
    """The weight of this rank's local sum in a sum over all ranks: 1 / (number of ranks holding the same entries)."""
    if not is_sharded(tensor):
        return 1.0 / world_size()
    return contribution_of(tensor.device_mesh, tensor.placements)  # type: ignore[attr-defined]


def contribution_of(mesh: Any, placements: Sequence[Any]) -> float:
    """`contribution` of a DTensor with these placements on this mesh."""
    from torch.distributed.tensor.placement_types import Replicate

    pairs = zip(mesh.shape, placements, strict=True)
    shards: int = math.prod(size for size, placement in pairs if not isinstance(placement, Replicate))
    return float(shards) / world_size()


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
    if world_size() > 1:
        dist.all_reduce(values, op=dist.ReduceOp.SUM)
    return values


def gather_over_ranks(tensor: Tensor) -> Tensor:
    """(*shape) -> (W, *shape), the tensor of every rank, with gradients; `tensor` must have one shape on all W ranks.

    Each rank's tensor gets the sum of the gradients of all ranks' losses, so that DDP, which averages gradients over ranks,
    gives the gradient of the mean of the ranks' losses.
    """
    gathered: Tensor = _Gather.apply(tensor) if world_size() > 1 else tensor.unsqueeze(0)
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        del ctx
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(world_size())]
        dist.all_gather(parts, tensor.contiguous())
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        del ctx
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total, op=dist.ReduceOp.SUM)
        return total[process_index()]


def agreed(job: Callable[[], _T] | None) -> _T | None:
    """What `job` returns, once it is done on every rank; if it raises on one rank, every rank raises.

    For work that some ranks do and others wait for (those pass None), or that may fail on some ranks only: a rank that raised
    alone would leave the others waiting for it for ever. To be called on all ranks.

    Raises:
        Exception: what `job` raised, on the rank where it did. On the others an error of the same kind where it is one of
            prior_hub's, a `PriorHubError` where it is not, which names the rank and holds the message.
    """
    result, problem = None, None
    try:
        result = job() if job is not None else None
    except Exception as error:  # noqa: BLE001 (whatever it is: the others must hear of it, and it is raised below)
        problem = error
    if world_size() == 1:
        if problem is not None:
            raise problem
        return result
    told: list[Any] = [None] * world_size()
    dist.all_gather_object(told, None if problem is None else (type(problem).__name__, str(problem)))
    if problem is not None:
        raise problem
    for rank, said in enumerate(told):
        if said is not None:
            kind = getattr(errors, said[0], errors.PriorHubError)
            raise kind(f"rank {rank} could not go on, so no rank does: {said[0]}: {said[1]}")
    return result


def told_by_rank_0(text: str | None) -> str | None:
    """The text of rank 0, on every rank."""
    if world_size() == 1:
        return text
    told = [text]
    dist.broadcast_object_list(told, src=0)
    return told[0]


def first_on_its_host() -> bool:
    """Whether this process is the first of those on its machine (LOCAL_RANK, or by the machines' names). On all ranks."""
    if world_size() == 1:
        return True
    known = os.environ.get("LOCAL_RANK")
    names: list[Any] = [None] * world_size()
    dist.all_gather_object(names, (socket.gethostname(), known))
    if all(local is not None for _, local in names):
        return known == "0"
    hosts = [name for name, _ in names]
    return hosts.index(hosts[process_index()]) == process_index()


def process_index() -> int:
    """This process's rank; 0 where there is one process."""
    return dist.get_rank() if world_size() > 1 else 0


def reshard(model: torch.nn.Module) -> None:
    """Give FSDP2 modules back to their sharded state, which `evaluate()` leaves for the root group."""
    for module in model.modules():
        if hasattr(module, "reshard") and hasattr(module, "unshard"):
            module.reshard()  # type: ignore[operator]


def world_size() -> int:
    """The number of processes; 1 where there is one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
