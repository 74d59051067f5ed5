"""The penalty's two passes as Triton kernels over all tensors at once, for CUDA (and ROCm).

On an accelerator the penalty is limited by memory where tensors are large and by kernel launches where they are small: a
ResNet-50 has 159 tensors, and a dozen operations on each take longer than reading the prior. Here a pass is one launch: a table
holds the addresses of all tensors, and each program takes one block of one of them, with everything in between in registers.
Nothing of the size of a tensor is written but the gradient (or the moved weights).

    project    x = (theta - mean) / (A + C), or (D^T v) / (A + C)       partial[program, k] = sum D_k x
    finish     r = theta - mean - D^T z,  g = r / A                     gradient += factor g,  partial[program] = sum r g
    move       e = D^T z,  g = (theta - mean - e) / (A + C)             theta = mean + (A delta + C e) / (A + C),
                                                                        partial[program] = sum A g^2

Sums within a block are float32 trees, sums over blocks float64. `gaussian.py` has the same in plain torch operations, which is
the reference, and what runs where there is no Triton, or types it does not take (float64).
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prior_hub.errors import PriorWarning

__all__ = ["Tables", "is_available", "takes", "works"]

_BLOCK = 4096  # entries of a program
_WARPS = 8
_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def is_available(device: torch.device) -> bool:
    """Whether the kernels can run there; PRIOR_HUB_FUSED=0 in the environment says never."""
    return device.type == "cuda" and os.environ.get("PRIOR_HUB_FUSED", "1") != "0" and _has_triton()


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def takes(tensors: Sequence[Tensor], device: torch.device) -> bool:
    """Whether the kernels can read all of these: float32, bfloat16 or float16 on that device."""
    if not all(tensor.dtype in _TYPES and tensor.device == device for tensor in tensors):
        return False
    return all(works(device, dtype) for dtype in {tensor.dtype for tensor in tensors})


@functools.cache
def works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels can be compiled for that device, and run there; found out once, with a warning where they cannot.

    Triton needs a C compiler where it runs, and some GPUs are too old for it, or for bfloat16.
    """
    one = torch.ones(8, dtype=dtype, device=device)
    try:
        tables = Tables({"w": (one, one, one.view(1, 8))}, {"w": 1.0}, factor=1.0, eps=1.0)
        tables.finish({"w": one}, tables.project({"w": one}), {"w": one.clone()}, 1.0)
    except Exception as error:  # noqa: BLE001 (whatever it is, plain operations do the same work)
        warnings.warn(
            f"Triton's kernels cannot be used on {device} with {dtype} ({type(error).__name__}: {str(error)[:200]}): the "
            "penalty goes by plain torch operations, which takes longer. PRIOR_HUB_FUSED=0 in the environment asks for that "
            "from the start.",
            PriorWarning,
            stacklevel=2,
        )
        return False
    return True


class _Group(NamedTuple):
    """Tensors of the same types, which one launch takes together."""

    names: tuple[str, ...]
    stored: Tensor  # (3, tensors) int64: addresses of mean, variance, deviations
    sizes: Tensor  # (tensors,) int64: entries
    tensor_of: Tensor  # (programs,) int32
    start_of: Tensor  # (programs,) int64
    weights: Tensor  # (programs,) float64: this rank's share of its sums
    aligned: bool  # whether stored tensors can be read 16 bytes at a time
    types: tuple[torch.dtype, torch.dtype, torch.dtype]


class Tables:
    """A Gaussian's tensors as the kernels find them; made once, kept with the Gaussian.

    Args:
        operands: name -> (mean (n,), variance (n,), deviations (K, n) or None), contiguous, on one device.
        weights: name -> this rank's share of the sums over a tensor.
        factor: of the variance in A.
        eps: added to it.
    """

    def __init__(
        self,
        operands: Mapping[str, tuple[Tensor, Tensor, Tensor | None]],
        weights: Mapping[str, float],
        *,
        factor: float,
        eps: float,
    ) -> None:
        self._keep = operands  # the addresses are those of these tensors
        self._factor, self._eps = factor, eps
        self._sent: dict[tuple[str, tuple[str, ...]], tuple[list[int], Tensor]] = {}  # role, group -> addresses, table
        self._selected: dict[tuple[tuple[str, ...], tuple[int, ...]], Tensor] = {}  # group, tensors -> programs
        alike: dict[tuple[object, ...], list[str]] = {}
        self.rank = 0
        self._device = torch.device("cpu")
        for name, (mean, variance, rows) in operands.items():
            self._device = mean.device
            self.rank = 0 if rows is None else rows.shape[0]
            if mean.numel():
                stored = [mean, variance] if rows is None else [mean, variance, rows]
                alike.setdefault((_is_aligned(stored), *(t.dtype for t in stored)), []).append(name)
        self._groups = [self._grouped(names, weights) for names in alike.values()]

    def _grouped(self, names: list[str], weights: Mapping[str, float]) -> _Group:
        tensors = [self._keep[name] for name in names]
        sizes = [mean.numel() for mean, _, _ in tensors]
        programs = [(i, start) for i, size in enumerate(sizes) for start in range(0, size, _BLOCK)]
        addresses = [[0 if t is None else t.data_ptr() for t in column] for column in zip(*tensors, strict=True)]
        mean, variance, rows = tensors[0]
        place: dict[str, Any] = {"device": self._device}
        return _Group(
            tuple(names),
            torch.tensor(addresses, dtype=torch.int64, **place),
            torch.tensor(sizes, dtype=torch.int64, **place),
            torch.tensor([i for i, _ in programs], dtype=torch.int32, **place),
            torch.tensor([start for _, start in programs], dtype=torch.int64, **place),
            torch.tensor([weights[names[i]] for i, _ in programs], dtype=torch.float64, **place),
            _is_aligned([t for group in tensors for t in group if t is not None]),
            (mean.dtype, variance.dtype, mean.dtype if rows is None else rows.dtype),
        )

    def project(self, theta: Mapping[str, Tensor], lengths: Mapping[str, float | Tensor] | None = None) -> Tensor:
        """D (A + C)^-1 (theta - mean), (K,) float64; C = 0 where `lengths` is None. `theta` is flat and contiguous."""
        return self._projected(theta, None, lengths)

    def through(self, vector: Tensor, lengths: Mapping[str, float | Tensor]) -> Tensor:
        """D (A + C)^-1 D^T vector, (K,) float64."""
        return self._projected(None, vector.float(), lengths)

    def finish(
        self, theta: Mapping[str, Tensor], z: Tensor | None, into: Mapping[str, Tensor], factor: float | Tensor
    ) -> Tensor:
        """sum r A^-1 r for r = theta - mean - D^T z, 0-d float64; adds factor A^-1 r to `into`, flat and contiguous."""
        return self._finished(theta, z, into, factor, None)

    def move_(self, theta: Mapping[str, Tensor], z: Tensor | None, lengths: Mapping[str, float | Tensor]) -> Tensor:
        """theta <- mean + (A delta + C D^T z) / (A + C) in place where C is given; returns sum A g^2 (module head)."""
        return self._finished(theta, z, {}, 1.0, lengths)

    # ----------------------------------------------------------------------------------------------------- launches

    def _projected(
        self, theta: Mapping[str, Tensor] | None, vector: Tensor | None, lengths: Mapping[str, float | Tensor] | None
    ) -> Tensor:
        kernels = _kernels()
        lengths = None if lengths is None else _readable(lengths)  # held till the end: the kernels read it
        total = torch.zeros(self.rank, dtype=torch.float64, device=self._device)
        for group, names, indices in self._launches(theta or {}, {}, lengths or {}):
            where, steps, has_tensors = self._step_tables(group, lengths or {})
            programs = indices.numel()
            partial = torch.empty(programs, self.rank, dtype=torch.float32, device=self._device)
            first = None if theta is None else theta[names[0]]
            self._launch(
                kernels.project,
                programs,
                partial,
                self._table("theta", group, theta) if theta is not None else group.stored,
                group.stored,
                group.sizes,
                indices,
                group.tensor_of,
                group.start_of,
                partial if vector is None else vector,
                where,
                steps,
                self._factor,
                self._eps,
                len(group.names),
                RANK=self.rank,
                THETA=_triton_type(first.dtype) if first is not None else None,
                MEAN=_triton_type(group.types[0]),
                VARIANCE=_triton_type(group.types[1]),
                ROWS=_triton_type(group.types[2]),
                IMPLICIT=lengths is not None,
                STEP_TENSORS=has_tensors,
                ALIGNED=group.aligned,
                BLOCK=_BLOCK,
                num_warps=_WARPS,
            )
            total += group.weights[indices.long()] @ partial.double()
        return total

    def _finished(
        self,
        theta: Mapping[str, Tensor],
        z: Tensor | None,
        into: Mapping[str, Tensor],
        factor: float | Tensor,
        lengths: Mapping[str, float | Tensor] | None,
    ) -> Tensor:
        kernels = _kernels()
        lengths = None if lengths is None else _readable(lengths)  # held till the end: the kernels read it
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        scalar = factor.to(device=self._device, dtype=torch.float32).reshape(()) if isinstance(factor, Tensor) else None
        for group, names, indices in self._launches(theta, into, lengths or {}):
            where, steps, has_tensors = self._step_tables(group, lengths or {})
            programs = indices.numel()
            partial = torch.empty(programs, dtype=torch.float32, device=self._device)
            out = into.get(names[0])
            addresses = self._table("theta", group, theta)
            self._launch(
                kernels.finish,
                programs,
                partial,
                addresses,
                addresses if out is None else self._table("into", group, into),
                group.stored,
                group.sizes,
                indices,
                group.tensor_of,
                group.start_of,
                partial if z is None else z.float(),
                partial if scalar is None else scalar,
                1.0 if scalar is not None else float(factor),
                where,
                steps,
                self._factor,
                self._eps,
                len(group.names),
                RANK=0 if z is None else self.rank,
                THETA=_triton_type(theta[names[0]].dtype),
                MEAN=_triton_type(group.types[0]),
                VARIANCE=_triton_type(group.types[1]),
                ROWS=_triton_type(group.types[2]),
                INTO=None if out is None else _triton_type(out.dtype),
                FACTOR_TENSOR=scalar is not None,
                IMPLICIT=lengths is not None,
                MOVES=lengths is not None and names[0] in lengths,
                STEP_TENSORS=has_tensors,
                ALIGNED=group.aligned,
                BLOCK=_BLOCK,
                num_warps=_WARPS,
            )
            total += group.weights[indices.long()] @ partial.double()
        written = into if lengths is None else {name: theta[name] for name in lengths}
        torch.autograd.graph.increment_version([t for t in written.values() if not t.is_inference()])  # as torch's own would
        return total

    def _launch(self, kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        """Triton launches on the current device, whichever one the addresses are of."""
        with _current(self._device):
            kernel[(programs,)](*arguments, **constants)

    def _launches(
        self, theta: Mapping[str, Tensor], into: Mapping[str, Tensor], lengths: Mapping[str, float | Tensor]
    ) -> list[tuple[_Group, tuple[str, ...], Tensor]]:
        """(group, names, programs) with one type of theta and of the gradient in each, and a gradient for all or for none."""
        result = []
        for group in self._groups:
            kinds: dict[tuple[object, ...], list[int]] = {}
            for index, name in enumerate(group.names):
                kind = (
                    theta[name].dtype if name in theta else None,
                    into[name].dtype if name in into else None,
                    name in lengths,
                )
                kinds.setdefault(kind, []).append(index)
            for indices in kinds.values():
                result.append((group, tuple(group.names[i] for i in indices), self._programs(group, tuple(indices))))
        return result

    def _programs(self, group: _Group, tensors: tuple[int, ...]) -> Tensor:
        """Which programs of a group work on these of its tensors, (n,) int32."""
        key = (group.names, tensors)
        if key not in self._selected:
            chosen = torch.isin(group.tensor_of.cpu(), torch.tensor(tensors, dtype=torch.int32, device="cpu"))
            self._selected[key] = chosen.nonzero()[:, 0].to(dtype=torch.int32, device=self._device)
        return self._selected[key]

    def _table(self, role: str, group: _Group, tensors: Mapping[str, Tensor]) -> Tensor:
        """Addresses of a group's tensors, (tensors,) int64, 0 for those not given; sent anew only when one has moved."""
        addresses = [tensors[name].data_ptr() if name in tensors else 0 for name in group.names]
        before = self._sent.get((role, group.names))
        if before is not None and before[0] == addresses:
            return before[1]
        table = torch.tensor(addresses, dtype=torch.int64, device="cpu")
        if self._device.type == "cuda":
            table = table.pin_memory().to(self._device, non_blocking=True)
        self._sent[role, group.names] = addresses, table
        return table

    def _step_tables(self, group: _Group, lengths: Mapping[str, float | Tensor]) -> tuple[Tensor, Tensor, bool]:
        """Addresses of step lengths that are tensors, those that are numbers, and whether there are any of the former."""
        flat = {n: c for n, c in lengths.items() if isinstance(c, Tensor) and c.ndim}
        numbers = [lengths.get(name, 0.0) if name not in flat else 0.0 for name in group.names]
        if any(isinstance(number, Tensor) for number in numbers):  # 0-d, of a capturable optimizer: stays on the device
            steps = torch.stack([torch.as_tensor(n, dtype=torch.float32, device=self._device) for n in numbers])
        else:
            steps = torch.tensor(numbers, dtype=torch.float32, device=self._device)
        return self._table("step", group, flat) if flat else group.sizes, steps, bool(flat)


def _readable(lengths: Mapping[str, float | Tensor]) -> dict[str, float | Tensor]:
    """Step lengths as the kernels read them: tensors that are not 0-d in float32, contiguous."""
    return {
        name: length.to(torch.float32).contiguous() if isinstance(length, Tensor) and length.ndim else length
        for name, length in lengths.items()
    }


def _current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes a GPU the current one, for Triton."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _is_aligned(tensors: Sequence[Tensor]) -> bool:
    return all(t.data_ptr() % 16 == 0 and t.shape[-1] % 8 == 0 for t in tensors)


# ---------------------------------------------------------------------------------------------------------------- kernels


class _Kernels(NamedTuple):
    project: Any
    finish: Any


@functools.cache
def _kernels() -> _Kernels:
    """The kernels; triton is imported here, when they are first needed."""
    from prior_hub.priors import kernels

    return _Kernels(kernels.project, kernels.finish)


def _triton_type(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]
