"""Long tensors block by block, in as many threads as torch may use, with working memory that is allocated once.

A penalty is limited by memory: it reads every number of the prior twice and computes little. So its temporaries must stay in
cache (blocks), must not be allocated anew (`Scratch`), and the cores must share the blocks. torch's own threads share out one
elementwise operation, whose barriers cost more than such a block (and very much more where other processes want the cores
too). Here each thread takes whole blocks instead, with torch single-threaded in it; torch releases the interpreter's lock
within each operation.

The blocks of a sweep are cut into chunks by the sizes of the tensors alone, and each chunk has accumulators of its own, which
are summed in order: results are the same to the bit whatever the number of threads, and whichever takes which chunk.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["MOST_THREADS", "Block", "Scratch", "blocks_of", "in_threads", "part_length", "sweep"]

# Entries. Two operands of a block stay in cache, and Python's time for a block (20 to 30 microseconds, in which the other
# threads wait) is small against reading its rows. Measured with 1 and 2 threads: half of it takes a quarter longer.
_CPU_BLOCK = 1 << 18
_COPIED = 1 << 20  # rows x entries where rows are copied: 4 MB
DEVICE_BLOCK = 1 << 24  # on accelerators: few large kernels, temporaries bounded at 64 MB per row
_DEVICE_COPIED = 1 << 26
_CHUNKS = 64  # so many accumulators at most
MOST_THREADS = 16  # beyond it Python's own time per block is what limits
_INLINE = 1 << 20  # numbers read, below which starting threads costs more than it brings


class Block(NamedTuple):
    """Entries start to stop of a flat tensor."""

    name: str
    start: int
    stop: int


class Scratch:
    """Working memory of one thread: a buffer for each purpose and type, grown when needed and used again."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}
        self._views: dict[tuple[str, torch.dtype, tuple[int, ...]], Tensor] = {}

    def take(self, purpose: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """(*shape), with whatever is in it: the next `take` for this purpose and type is the same memory."""
        key = (purpose, dtype, shape)
        if key not in self._views:
            size, buffer = math.prod(shape), self._buffers.get((purpose, dtype))
            if buffer is None or buffer.numel() < size:
                buffer = torch.empty(size, dtype=dtype, device=self._device)
                self._buffers[purpose, dtype] = buffer
                self._views = {k: v for k, v in self._views.items() if k[:2] != key[:2]}  # of the smaller buffer
            self._views[key] = buffer[:size].view(shape)
        return self._views[key]


def blocks_of(sizes: Sequence[tuple[str, int]], device: torch.device) -> list[list[Block]]:
    """The blocks of tensors with so many entries, in order, in at most 64 chunks of about the same number of entries."""
    length = _CPU_BLOCK if device.type == "cpu" else DEVICE_BLOCK
    blocks = [Block(n, start, min(start + length, size)) for n, size in sizes for start in range(0, size, length)]
    share = max(length, sum(size for _, size in sizes) / _CHUNKS)
    chunks: list[list[Block]] = []
    held = share
    for block in blocks:
        if held >= share and len(chunks) < _CHUNKS:
            chunks.append([])
            held = 0
        chunks[-1].append(block)
        held += block.stop - block.start
    return chunks


def part_length(rows: int, device: torch.device) -> int:
    """How many entries of so many rows to copy at a time, to convert their type: those of a block would not stay in cache."""
    copied, longest = (_COPIED, _CPU_BLOCK) if device.type == "cpu" else (_DEVICE_COPIED, DEVICE_BLOCK)
    return 1 << max(12, min(longest, copied // max(1, rows)).bit_length() - 1)


def sweep(
    chunks: Sequence[Sequence[Block]],
    visit: Callable[[Block, Scratch, Tensor], None],
    shape: tuple[int, ...],
    *,
    dtype: torch.dtype,
    device: torch.device,
    numbers: int,
) -> Tensor:
    """Call `visit(block, scratch, accumulator)` for every block and return the sum of the accumulators.

    Args:
        chunks: of `blocks_of`.
        visit: adds to the accumulator in place; must not depend on other blocks. It runs without gradients, with autocast as
            in a new thread, and may run in several threads at once.
        shape: of an accumulator, which starts at zero.
        dtype: of the accumulators.
        device: where blocks and accumulators are; only CPU blocks are shared out among threads.
        numbers: how many numbers the sweep reads, which decides whether threads are worth it.

    Returns:
        (*shape), in the order of the chunks whatever the threads do.
    """
    accumulators = torch.zeros(len(chunks), *shape, dtype=dtype, device=device)
    waiting = deque(range(len(chunks)))
    inference = torch.is_inference_mode_enabled()  # a thread does not inherit it
    on_cuda: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    stream = torch.cuda.current_stream() if on_cuda else None  # nor that one, on which values may be pending

    def work() -> None:
        scratch = Scratch(device)
        here = contextlib.nullcontext() if stream is None else torch.cuda.stream(stream)
        with here, torch.inference_mode(inference), torch.no_grad(), torch.autocast(device.type, enabled=False):
            while True:
                try:
                    index = waiting.popleft()
                except IndexError:
                    return
                for block in chunks[index]:
                    visit(block, scratch, accumulators[index])

    threads = min(torch.get_num_threads(), len(chunks), MOST_THREADS) if device.type == "cpu" else 1
    # after an error (or an interrupt) the other threads stop at their next chunk
    in_threads([work] * (threads if numbers >= _INLINE else 1), stop=waiting.clear)
    return accumulators.sum(0)


def in_threads(jobs: Sequence[Callable[[], None]], *, stop: Callable[[], None] = lambda: None) -> None:
    """Run jobs side by side, each in a thread in which torch is single-threaded, and wait; one job runs where it is.

    Args:
        jobs: at most `MOST_THREADS`; a new thread has gradients enabled.
        stop: called when one has failed, and at the end; the error is raised when all have ended.
    """
    if len(jobs) == 1 or getattr(_here, "worker", False):
        for job in jobs:
            job()
        return
    futures: list[Future[None]] = []
    try:
        try:
            for job in jobs:
                futures.append(_POOL.submit(job, len(jobs)))
        except RuntimeError:  # no thread can be started, or none any more: the main thread has ended
            for job in jobs[len(futures) :]:
                job()
        wait(futures, return_when=FIRST_EXCEPTION)
    finally:
        stop()
        wait(futures)
    for future in futures:
        future.result()


_here = threading.local()


class _Pool:
    """Threads in which torch is single-threaded, made when first needed; a forked process makes its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._executor: ThreadPoolExecutor | None = None
        self._threads = 0

    def forget(self) -> None:
        """After a fork the threads are the parent's, and a lock may be held by one of them."""
        self.__init__()  # type: ignore[misc]

    def submit(self, work: Callable[[], None], threads: int) -> Future[None]:
        with self._lock:
            if self._executor is None or self._threads < threads:
                self._executor, self._threads = self._started(threads), threads
            return self._executor.submit(work)

    def _started(self, threads: int) -> ThreadPoolExecutor:
        before = torch.get_num_threads()
        ready = threading.Barrier(threads + 1)
        executor = ThreadPoolExecutor(threads, "prior-hub", initializer=_become_worker, initargs=(ready,))
        try:
            for _ in range(threads):
                executor.submit(int)  # which starts a thread, since none is idle before the barrier
            ready.wait()
        except BaseException:
            ready.abort()  # else those that wait there would wait for ever, and the interpreter's end for them
            executor.shutdown()
            raise
        finally:
            torch.set_num_threads(before)  # a thread's number is also that of every thread that starts later
        return executor


def _become_worker(ready: threading.Barrier) -> None:
    _here.worker = True
    torch.get_num_threads()  # else torch, at its first operation here, would set the process's number in place of ours
    torch.set_num_threads(1)
    with contextlib.suppress(threading.BrokenBarrierError):  # another thread could not be started: this one is sent home
        ready.wait()


_POOL = _Pool()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_POOL.forget)
