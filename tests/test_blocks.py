"""Sweeps over blocks: the same sums whatever the threads do, and no trace of the threads afterwards."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from prior_hub.priors import blocks
from prior_hub.priors.blocks import Scratch, blocks_of, sweep
from prior_hub.priors.gaussian import LowRankGaussian

CPU = torch.device("cpu")


@pytest.fixture
def threads():
    """Sets the number of threads; the old number returns with the test's end."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def problem(rank=3, dtype=torch.float32):
    """A Gaussian over tensors that make many blocks, with its theta: sizes are no multiples of anything."""
    g = torch.Generator().manual_seed(0)
    shapes = {"a": (700_001,), "b": (3,), "c": (250, 1001), "empty": (0, 4)}
    mean = {n: torch.randn(s, generator=g) for n, s in shapes.items()}
    variance = {n: torch.rand(s, generator=g) + 0.5 for n, s in shapes.items()}
    rows = {n: torch.randn(rank, *s, generator=g).to(dtype) for n, s in shapes.items()}
    theta = {n: m + torch.randn(m.shape, generator=g) for n, m in mean.items()}
    return LowRankGaussian(mean, variance, rows), theta


def test_blocks_cover_every_entry_once_in_order_in_few_chunks():
    sizes = [("a", 5_000_001), ("b", 1), ("none", 0), ("c", 40_000_000)]
    chunks = blocks_of(sizes, CPU)
    covered = [block for chunk in chunks for block in chunk]
    for name, size in sizes:
        mine = [block for block in covered if block.name == name]
        assert [b.start for b in mine] == [0, *(b.stop for b in mine)][: len(mine)]
        assert (mine[-1].stop if mine else 0) == size
    assert [b.name for b in covered] == sorted((b.name for b in covered), key=[n for n, _ in sizes].index)
    assert 1 <= len(chunks) <= 64
    entries = [sum(b.stop - b.start for b in chunk) for chunk in chunks]
    assert max(entries) < 2 * max(sum(entries) / 64, max(b.stop - b.start for b in covered))
    assert blocks_of([], CPU) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_the_same_to_the_bit_for_any_number_of_threads(threads, dtype):
    prior, theta = problem(dtype=dtype)
    found = []
    for number in (1, 2, 5):
        threads(number)
        fresh = prior.rescaled(0.7)  # whose factor is made anew
        value, gradient = fresh.penalty_and_gradient(theta)
        moved = {n: t.clone() for n, t in theta.items()}
        fresh.proximal_step_(moved, dict.fromkeys(moved, 0.1))
        found.append([value, *gradient.values(), *moved.values(), *fresh.covariance_product(theta).values()])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_several_threads_share_the_blocks_and_torch_keeps_its_number(threads):
    threads(3)
    seen = set()
    both = threading.Barrier(2, timeout=30)

    def visit(block, scratch, total):
        del scratch
        if block.name == "a" and len(seen) < 2:
            seen.add(threading.get_ident())
            if block.start == 0 or len(seen) == 2:
                both.wait()  # passed only if a second thread comes
        total += block.stop - block.start

    chunks = [[block] for chunk in blocks_of([("a", 1 << 20)], CPU) for block in chunk]
    total = sweep(chunks, visit, (), dtype=torch.float64, device=CPU, numbers=1 << 30)
    assert total == 1 << 20
    assert len(seen) == 2
    assert threading.get_ident() not in seen
    assert torch.get_num_threads() == 3
    later = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [3]


def test_torch_is_single_threaded_in_a_thread_of_the_sweep_and_stays_so(threads):
    threads(3)
    blocks._POOL.forget()
    seen = []

    def visit(block, scratch, total):
        del block, scratch, total
        torch.ones(1 << 17).add_(1)  # at its first operation in a thread torch looks up how many threads there should be
        seen.append(torch.get_num_threads())

    chunks = blocks_of([("a", 1 << 22)], CPU)
    for number in (3, 2):  # the second time after the process's own number was set
        threads(number)
        sweep(chunks, visit, (), dtype=torch.float64, device=CPU, numbers=1 << 30)
    assert set(seen) == {1}
    assert torch.get_num_threads() == 2


def test_an_error_in_a_block_reaches_the_caller_and_the_next_sweep_works(threads):
    threads(2)

    def fails(block, scratch, total):
        del scratch, total
        raise KeyError(block.start)

    chunks = blocks_of([("a", 1 << 22)], CPU)
    arguments = {"dtype": torch.float64, "device": CPU, "numbers": 1 << 30}
    with pytest.raises(KeyError):
        sweep(chunks, fails, (), **arguments)

    def counts(block, scratch, total):
        del scratch
        total += block.stop - block.start

    assert sweep(chunks, counts, (), **arguments) == 1 << 22


def test_a_sweep_within_a_sweep_does_not_wait_for_itself(threads):
    threads(2)
    chunks = blocks_of([("a", 1 << 21)], CPU)

    def inner(block, scratch, total):
        del scratch
        total += block.stop - block.start

    def outer(block, scratch, total):
        del block, scratch
        total += sweep(chunks, inner, (), dtype=torch.float64, device=CPU, numbers=1 << 30)

    total = sweep(chunks, outer, (), dtype=torch.float64, device=CPU, numbers=1 << 30)
    assert total == (1 << 21) * sum(map(len, chunks))


def test_it_works_in_inference_mode_and_under_autocast(threads):
    threads(2)
    prior, theta = problem()
    expected = prior.penalty(theta)
    with torch.inference_mode():
        assert prior.rescaled(1.0).penalty(theta) == expected
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert prior.rescaled(1.0).penalty(theta) == expected


def test_a_thread_works_on_the_cuda_stream_of_its_caller(threads, monkeypatch):
    """What the caller has queued there may be the very values that a block copies from the GPU."""
    threads(2)
    local = threading.local()
    seen = []

    @contextlib.contextmanager
    def pretended(stream):
        local.stream = stream
        yield
        del local.stream

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "the caller's")
    monkeypatch.setattr(torch.cuda, "stream", pretended)

    def visit(block, scratch, total):
        del block, scratch, total
        seen.append((threading.current_thread().name.startswith("prior-hub"), local.stream))

    sweep(blocks_of([("a", 1 << 22)], CPU), visit, (), dtype=torch.float64, device=CPU, numbers=1 << 30)
    assert set(seen) == {(True, "the caller's")}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_makes_threads_of_its_own():
    program = """
import os, sys, torch
torch.set_num_threads(2)
sys.path.insert(0, sys.argv[1])
from test_blocks import problem
prior, theta = problem()
before = prior.penalty(theta)
child = os.fork()
if child == 0:
    os._exit(0 if prior.penalty(theta) == before else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    command = [sys.executable, "-c", program, str(Path(__file__).parent)]
    assert subprocess.run(command, timeout=120, check=False).returncode == 0


def test_where_no_thread_can_be_started_the_caller_does_the_work(threads, monkeypatch):
    threads(3)

    class Full(ThreadPoolExecutor):
        def submit(self, *work):
            if self._threads:
                raise RuntimeError("can't start new thread")  # as Python says it
            return super().submit(*work)

    monkeypatch.setattr(blocks, "_POOL", blocks._Pool())
    monkeypatch.setattr(blocks, "ThreadPoolExecutor", Full)
    others = set(threading.enumerate())

    def visit(block, scratch, total):
        del scratch
        total += block.stop - block.start

    chunks = blocks_of([("a", 1 << 22)], CPU)
    assert sweep(chunks, visit, (), dtype=torch.float64, device=CPU, numbers=1 << 30) == 1 << 22
    assert set(threading.enumerate()) == others  # the one that could be started has gone home
    assert torch.get_num_threads() == 3


@pytest.mark.slow
def test_a_thread_that_outlives_the_main_thread_goes_on():
    program = """
import sys, threading, torch
torch.set_num_threads(2)
sys.path.insert(0, sys.argv[1])
from test_blocks import problem
prior, theta = problem()
def train():
    before = prior.penalty(theta)
    threading.main_thread().join()
    print(prior.penalty(theta) == before)
threading.Thread(target=train).start()
"""
    command = [sys.executable, "-c", program, str(Path(__file__).parent)]
    done = subprocess.run(command, timeout=120, check=False, capture_output=True, text=True)
    assert done.stdout == "tensor(True)\n", done.stderr


def test_scratch_memory_is_used_again_and_grows():
    scratch = Scratch(CPU)
    first = scratch.take("x", (4, 5), torch.float32)
    assert first.shape == (4, 5)
    assert scratch.take("x", (3,), torch.float32).data_ptr() == first.data_ptr()
    assert scratch.take("y", (4, 5), torch.float32).data_ptr() != first.data_ptr()
    assert scratch.take("x", (4, 5), torch.float64).dtype == torch.float64
    assert scratch.take("x", (1000,), torch.float32).shape == (1000,)
    small = scratch.take("x", (4, 5), torch.float32)
    assert small.data_ptr() == scratch.take("x", (1000,), torch.float32).data_ptr()


def test_small_priors_start_no_threads(threads, monkeypatch):
    threads(2)
    monkeypatch.setattr(blocks._POOL, "submit", lambda *_: pytest.fail("a thread was started"))
    g = torch.Generator().manual_seed(0)
    mean = {"w": torch.randn(1000, generator=g)}
    prior = LowRankGaussian(mean, {"w": torch.ones(1000)}, {"w": torch.randn(2, 1000, generator=g)})
    prior.penalty(mean)
