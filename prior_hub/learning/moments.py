"""Running moments and a ring of the last K snapshots, at about one pass over memory per snapshot.

Over snapshots w_1, ..., w_n, entry by entry, with mean_0 = 0:

    d_n       = w_n - mean_{n-1}                        (*shape), the ring keeps it for the last K snapshots; d_1 := 0
    mean_n    = mean_{n-1} + d_n / n                    (*shape)
    squares_n = squares_{n-1} + d_n^2 (n-1) / n         (*shape), sum of squared differences from mean_n

    w_j - mean_n = d_j - sum_{i=j..n} d_i / i           a deviation about the FINAL mean, from the differences alone

The differences are kept instead of the weights for two reasons. The subtraction writes the ring's row itself, so that a
snapshot is copied at no further cost. And a row may be rounded to bfloat16, where a weight would lose its deviation: with
u_i = d_i sqrt((i-1)/i) the deviations are an orthonormal (Helmert's) transform of u, and sum_i u_i^2 = squares, so that
rounding every d_i by at most a share r of itself (bfloat16: r = 2^-8, 2^-9.3 in root mean square) changes the deviations
of an entry by

    sum_j error_j^2  <=  r^2 sum_{i in the ring} u_i^2  <=  r^2 (n-1) variance

whatever way the weights went. A difference from a fixed reference has no such bound: it grows with the way gone since.

Source: Welford 1962 (Technometrics 4:419) in the form of West 1979 (CACM 22:532).
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from prior_hub.priors.blocks import in_threads

__all__ = ["Offload", "add_snapshot", "centre_rows", "count_not_finite", "differences_from_snapshots", "surely_finite"]

# Entries of a block on the CPU: what costs least with one thread (measured: 44 ms at 2^17, 45 at 2^15, 55 at 2^14, for one
# tensor of 25.6 million and 34 ms of plain copies); with several, blocks are shared out (priors/blocks.py), and shorter ones
# wait for Python more than they work.
_CPU_BLOCK = 1 << 17
_LEAST_BLOCK = 1 << 14  # of K rows at once: a third faster than 2^12, where Python takes its time
_THREADS = 4  # at most: memory is the limit
_WORTH_THREADS = 1 << 21  # entries from which starting them pays
_DEVICE_BLOCK = 1 << 24  # on accelerators: few kernels, temporaries of at most 64 MB


def surely_finite(values: Sequence[Tensor]) -> bool:
    """Whether a sum over all values is finite, so that all of them are; False also where that sum overflows."""
    on_cpu = [v for v in values if v.device.type == "cpu" and v.numel()]
    elsewhere = [v for v in values if v.device.type != "cpu" and v.numel()]
    if elsewhere and not torch.isfinite(get_total_norm(elsewhere)):
        return False
    sums: list[Tensor] = []
    wide = torch.float32 if all(v.dtype != torch.float64 for v in on_cpu) else torch.float64

    def work(thread: int, threads: int) -> None:
        whole = iter([(value,) for value in on_cpu]) if threads == 1 else _shares(thread, threads, [on_cpu])
        for (piece,) in whole:
            sums.append(piece.sum(dtype=wide))

    _in_threads(work, sum(v.numel() for v in on_cpu))
    return not sums or bool(torch.isfinite(torch.stack(sums)).all())


def count_not_finite(value: Tensor) -> int:
    """How many entries are NaN or infinite."""
    pieces = _pieces(value, _block(value.device))
    return sum(piece.numel() - int(torch.isfinite(piece).sum()) for piece in pieces)


def add_snapshot(
    values: Sequence[Tensor], mean: Sequence[Tensor], squares: Sequence[Tensor], rows: Sequence[Tensor] | None, count: int
) -> None:
    """Take snapshot number `count` = 1, 2, ... into the moments, and its difference from the mean so far into `rows`.

    Args:
        values: (*shape) each, finite, of any floating type, layout and device.
        mean: (*shape) each, contiguous, updated in place.
        squares: like `mean`.
        rows: (*shape) each, contiguous, of the ring's type; None without a ring. Zeros before the first snapshot.
        count: n, this snapshot included.
    """
    if count == 1:
        torch._foreach_copy_(list(mean), list(values))
        return
    for kind in ("cpu", "other"):
        chosen = [i for i, m in enumerate(mean) if (m.device.type == "cpu") == (kind == "cpu") and m.numel()]
        if chosen:
            add = _add_in_blocks if kind == "cpu" else _add_in_groups
            ring = None if rows is None else [rows[i] for i in chosen]
            add([values[i] for i in chosen], [mean[i] for i in chosen], [squares[i] for i in chosen], ring, count)


def _add_in_blocks(
    values: Sequence[Tensor], mean: Sequence[Tensor], squares: Sequence[Tensor], rows: Sequence[Tensor] | None, count: int
) -> None:
    """On the CPU: every block passes through the cache once."""

    def work(thread: int, threads: int) -> None:
        scratch = mean[0].new_empty(0)
        for w, m, s, *ring in _shares(thread, threads, [values, mean, squares, *([] if rows is None else [rows])]):
            if ring and ring[0].dtype == m.dtype:
                difference = ring[0]
            else:
                if scratch.numel() < m.numel():
                    scratch = m.new_empty(m.numel())
                difference = scratch[: m.numel()].view(m.shape)
            torch.sub(w if w.device == m.device else w.to(m.device), m, out=difference)
            if ring and ring[0] is not difference:
                ring[0].copy_(difference)
            m.add_(difference, alpha=1 / count)
            s.addcmul_(difference, difference, value=(count - 1) / count)

    _in_threads(work, sum(m.numel() for m in mean))


def _add_in_groups(
    values: Sequence[Tensor], mean: Sequence[Tensor], squares: Sequence[Tensor], rows: Sequence[Tensor] | None, count: int
) -> None:
    """On an accelerator: four kernels for a group of tensors, one more for a ring of another type."""
    for group in _grouped(values, mean, squares, rows):
        w, m, s, r = (list(column) for column in zip(*group, strict=True))
        if rows is None or r[0].dtype != m[0].dtype:
            sizes = [t.numel() for t in m]
            difference = list(torch.split(m[0].new_empty(sum(sizes)), sizes))
        else:
            difference = r
        torch._foreach_copy_(difference, w)
        torch._foreach_sub_(difference, m)
        if rows is not None and difference is not r:
            torch._foreach_copy_(r, difference)
        torch._foreach_add_(m, difference, alpha=1 / count)
        torch._foreach_addcmul_(s, difference, difference, value=(count - 1) / count)


def _grouped(
    values: Sequence[Tensor], mean: Sequence[Tensor], squares: Sequence[Tensor], rows: Sequence[Tensor] | None
) -> Iterator[list[tuple[Tensor, Tensor, Tensor, Tensor]]]:
    """Flat views of the four, in groups of one device and at most `_DEVICE_BLOCK` entries."""
    group: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    held = 0
    for value, m, s, row in zip(values, mean, squares, mean if rows is None else rows, strict=True):
        flat = value.reshape(-1)  # a copy where not contiguous
        for piece in zip(*(torch.split(t.view(-1), _DEVICE_BLOCK) for t in (flat, m, s, row)), strict=True):
            if group and (held + piece[1].numel() > _DEVICE_BLOCK or group[0][1].device != m.device):
                yield group
                group, held = [], 0
            group.append(piece)
            held += piece[1].numel()
    if group:
        yield group


def centre_rows(ring: Tensor, count: int, out: Tensor) -> None:
    """The deviations of the last snapshots from the mean of all `count`, most recent first, block by block.

    Args:
        ring: (K, *shape), the differences; snapshot i in row (i - 1) % K.
        count: n.
        out: (min(n, K), *shape), contiguous; may be the ring's own first rows, which are then overwritten.
    """
    capacity, size = ring.shape[0], ring[0].numel()
    rows = min(count, capacity)
    order = [(count - 1 - k) % capacity for k in range(rows)]
    flat, target = ring.view(capacity, size), out.view(rows, size)
    block = max(_LEAST_BLOCK, _block(ring.device) // rows)
    for start in range(0, size, block):
        part = flat[:, start : start + block][order].to(torch.promote_types(ring.dtype, torch.float32))
        later = torch.zeros_like(part[0])  # sum_{i >= j} d_i / i
        for k, difference in enumerate(part):
            later.add_(difference, alpha=1 / (count - k))
            difference.sub_(later)
        target[:, start : start + block] = part


def differences_from_snapshots(ring: Tensor, mean: Tensor, count: int) -> None:
    """Turn a ring of weights (K, *shape), as states of version 1 have it, into one of differences, in place."""
    capacity = ring.shape[0]
    centre = mean.double()
    for j in range(count, max(count - capacity, 0), -1):
        row = ring[(j - 1) % capacity]
        difference = (row.double() - centre) * (j / (j - 1)) if j > 1 else torch.zeros_like(centre)
        row.copy_(difference)
        centre = centre - difference / j


# ------------------------------------------------------------------------------------------------------------- offload


class Offload:
    """Snapshots of weights on an accelerator taken into moments on the CPU, while training goes on.

    `take` queues copies of the weights into pinned memory on a stream of its own and returns; a thread waits for them and
    updates the moments. Whatever changes the weights must come after `fence()`, which makes the accelerator's current
    stream wait for the copies (the CPU does not wait). One snapshot is under way at a time: `take` first settles the last.

    Args:
        streams: device -> the module with its streams (torch.cuda).
    """

    def __init__(self, streams: Callable[[torch.device], Any] = torch.get_device_module) -> None:
        self._streams = streams
        self._side: dict[torch.device, Any] = {}  # device -> its stream
        self._landing: list[Tensor] = []
        self._copied: list[tuple[Any, torch.device, Any]] = []  # streams, device, event: the copies under way
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._fences: list[Any] = []  # handles of hooks

    def take(self, values: Sequence[Tensor], then: Callable[[Sequence[Tensor]], None]) -> None:
        """Queue the copies of `values`; a thread calls `then` with them, on the CPU in pinned memory, when they are there."""
        self.settle()
        if [(t.shape, t.dtype) for t in self._landing] != [(v.shape, v.dtype) for v in values]:
            pinned: dict[str, Any] = {"device": "cpu", "pin_memory": any(v.device.type != "cpu" for v in values)}
            self._landing = [torch.empty(v.shape, dtype=v.dtype, **pinned) for v in values]
        for device in dict.fromkeys(v.device for v in values):
            streams = self._streams(device)
            if device not in self._side:
                self._side[device] = streams.Stream(device)
            side = self._side[device]
            side.wait_stream(streams.current_stream(device))  # the last step has written the weights
            with streams.stream(side):
                for landing, value in zip(self._landing, values, strict=True):
                    if value.device == device:
                        copy_across(landing, value)
                        if device.type != "cpu":
                            value.record_stream(side)  # else a model deleted now leaves its memory to others too early
                event = side.record_event()
            self._copied.append((streams, device, event))
        copied = list(self._copied)

        def work() -> None:
            try:
                for _, _, event in copied:
                    event.synchronize()
                with torch.no_grad():
                    then(self._landing)
            except BaseException as error:  # noqa: BLE001 (raised again by settle, in the caller's thread)
                self._error = error

        self._thread = threading.Thread(target=work, name="swag-offload")
        self._thread.start()

    def fence(self) -> None:
        """What is queued on the accelerator from here on starts when the copies are done. Without copies, nothing."""
        for streams, device, event in self._copied:
            streams.current_stream(device).wait_event(event)
        self._copied = []

    def fence_before(self, optimizer: torch.optim.Optimizer) -> None:
        """`fence()` when `optimizer` takes its next step."""

        def hook(*_: Any) -> None:
            self.fence()

        inner = getattr(optimizer, "optimizer", optimizer)  # inside accelerate's wrapper, which has no hooks of its own
        self._fences.append(inner.register_step_pre_hook(hook))

    def settle(self) -> None:
        """Wait until the last snapshot is in the moments; raises what its thread raised, then and ever after."""
        self.join()
        if self._error is not None:
            raise self._error

    def join(self) -> None:
        """Wait for what is under way, whatever came of it."""
        self.fence()
        for handle in self._fences:  # not in the hook: the optimizer is going through its hooks then
            handle.remove()
        self._fences = []
        if self._thread is not None:
            self._thread.join()
            self._thread = None


def copy_across(landing: Tensor, value: Tensor) -> None:
    """Queue a copy from an accelerator into pinned memory on the current stream."""
    landing.copy_(value, non_blocking=True)


# ----------------------------------------------------------------------------------------------------------- internals


def _block(device: torch.device) -> int:
    return _CPU_BLOCK if device.type == "cpu" else _DEVICE_BLOCK


def _pieces(value: Tensor, block: int) -> Sequence[Tensor]:
    """Views of `value` in order, of about `block` entries: parts of a flat view, or rows of one that is not contiguous."""
    if value.numel() <= block:
        return (value,)
    if value.is_contiguous():
        return _cut(value.view(-1), block)
    return _cut(value, max(1, block // value[0].numel()))


def _cut(tensor: Tensor, rows: int) -> Sequence[Tensor]:
    whole, rest = divmod(len(tensor), rows)
    parts: Sequence[Tensor] = tensor.split_with_sizes([rows] * whole + [rest] * (rest > 0))  # `split` is slow Python
    return parts


def _shares(thread: int, threads: int, columns: Sequence[Sequence[Tensor]]) -> Iterator[tuple[Tensor, ...]]:
    """Every threads-th block of tensors of one shape, over all of them; the first column's layout says how they are cut."""
    block, passed = _CPU_BLOCK, 0
    for tensors in zip(*columns, strict=True):
        first = tensors[0]
        if first.numel() <= block:
            blocks: Iterator[tuple[Tensor, ...]] = iter((tensors,))
            number = 1
        else:
            pieces = _pieces(first, block)
            number = len(pieces)
            flat = first.is_contiguous()
            rest = (_cut(t.view(-1) if flat else t, len(pieces[0])) for t in tensors[1:])
            blocks = zip(pieces, *rest, strict=True)
        yield from itertools.islice(blocks, (thread - passed) % threads, None, threads)
        passed += number


def _in_threads(work: Callable[[int, int], None], entries: int) -> None:
    """work(0, T), ..., work(T - 1, T) in as many threads as torch may use; torch's operations let them run side by side."""
    threads = min(torch.get_num_threads(), _THREADS) if entries >= _WORTH_THREADS else 1

    def without_graph(thread: int) -> None:
        with torch.no_grad():  # holds for one thread only
            work(thread, threads)

    in_threads([partial(without_graph, thread) for thread in range(threads)])
