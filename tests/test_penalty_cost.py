"""What a step of the penalty may cost, counted and not timed: bytes that are read, temporaries, operations.

A dispatch mode sees every operation of torch in this thread (so torch has one here). What was there before the step and is
large (the prior, the weights, the gradients, however they are stored) is memory; what is read of it is what a step costs.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import random_prior, tiny_bert
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prior_hub import LowRankGaussian, PriorPenalty

LARGE = 2 << 20  # bytes from which a tensor counts as memory: every vector of P below does, and no block
TEMPORARY = 10 << 20  # bytes that a temporary may have: a block of the deviations in float32, whatever P
RANK, SHAPES = 20, {"large.weight": (1024, 1024), "small.bias": (7,)}  # 84 MB of deviations
TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
MOST_OPERATIONS = 2  # of one small tensor more in one step: they are joined (24 to 26 when each was taken by itself)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Traffic(TorchDispatchMode):
    """Counts what operations read and allocate."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.read = 0  # bytes, of storages that were there before and are LARGE
        self.written = 0  # the same
        self.largest = 0  # bytes of the largest storage that was made
        self.fresh: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        places = {_place(tensor) for tensor in given}
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        new = [tensor for tensor in made if _place(tensor) not in places]
        self.fresh |= {_place(tensor) for tensor in new}
        self.largest = max([self.largest, *(tensor.untyped_storage().nbytes() for tensor in new)])
        is_view = made and not new and not func._schema.is_mutable
        if is_view:
            return result
        if func._schema.name == "aten::copy_" and given[0].data_ptr() == given[1].data_ptr():
            return result  # a[i:j] += x ends with a[i:j] = a[i:j], which torch leaves undone
        self.operations += 1
        outputs = _outputs(func, args, kwargs or {})
        for tensor in given:
            if _place(tensor) in self.fresh or tensor.untyped_storage().nbytes() < LARGE:
                continue
            is_output = any(tensor is output for output in outputs)
            if not (is_output and (func._overloadname == "out" or func._schema.name in OVERWRITES)):
                self.read += tensor.numel() * tensor.itemsize
            if is_output:
                self.written += tensor.numel() * tensor.itemsize
        return result


OVERWRITES = ("aten::copy_", "aten::fill_", "aten::zero_")


def _outputs(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The arguments that an operation writes to."""
    named = {a.name: value for a, value in zip(func._schema.arguments, args, strict=False)} | kwargs
    written = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return [leaf for name in written for leaf in tree_leaves(named.get(name)) if isinstance(leaf, Tensor)]


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def problem(
    dtype: torch.dtype, shapes: dict[str, tuple[int, ...]] = SHAPES, rank: int = RANK
) -> tuple[LowRankGaussian, dict[str, Tensor], dict[str, Tensor]]:
    """(Gaussian, weights, gradients)."""
    g = torch.Generator().manual_seed(0)
    mean = {n: torch.randn(s, generator=g) for n, s in shapes.items()}
    variance = {n: torch.rand(s, generator=g) + 0.5 for n, s in shapes.items()}
    rows = {n: torch.randn(rank, *s, generator=g).to(dtype) for n, s in shapes.items()}
    theta = {n: m + torch.randn(m.shape, generator=g) for n, m in mean.items()}
    return LowRankGaussian(mean, variance, rows), theta, {n: torch.zeros_like(m) for n, m in mean.items()}


def nbytes(tensors: dict[str, Tensor]) -> int:
    """Of large tensors."""
    return sum(size for t in tensors.values() if (size := t.numel() * t.itemsize) >= LARGE)


def once(gaussian: LowRankGaussian, theta: dict[str, Tensor]) -> int:
    """Bytes of one pass over the prior and the weights."""
    return sum(nbytes(tensors) for tensors in (gaussian.mean, gaussian.variance, gaussian.deviations, theta))


@TYPES
def test_a_step_reads_prior_and_weights_twice_and_the_gradient_once(dtype):
    gaussian, theta, gradient = problem(dtype)
    gaussian.add_gradient_(theta, gradient, 1.0)  # makes the K x K factor
    with Traffic() as traffic:
        gaussian.add_gradient_(theta, gradient, 1.0)
    passes = (traffic.read - nbytes(gradient)) / once(gaussian, theta)
    assert 0.99 < passes < 2.01  # below 1 the counter is blind: operations in another thread, or not torch's
    assert traffic.written <= 1.01 * nbytes(gradient)


@TYPES
def test_the_first_step_reads_the_deviations_once_more(dtype):
    gaussian, theta, gradient = problem(dtype)
    with Traffic() as traffic:
        gaussian.add_gradient_(theta, gradient, 1.0)
    assert traffic.read - nbytes(gradient) <= 3.01 * once(gaussian, theta)


@TYPES
def test_the_penalty_alone_reads_no_more_than_a_step(dtype):
    gaussian, theta, _ = problem(dtype)
    gaussian.penalty(theta)
    with Traffic() as traffic:
        gaussian.penalty(theta)
    assert traffic.read <= 2.01 * once(gaussian, theta)
    assert traffic.written == 0
    assert traffic.largest <= TEMPORARY


@TYPES
def test_no_temporary_is_larger_than_a_block(dtype):
    gaussian, theta, gradient = problem(dtype)
    with Traffic() as traffic:  # the factor too
        gaussian.add_gradient_(theta, gradient, 1.0)
        gaussian.add_gradient_(theta, gradient, torch.tensor(0.5))
    assert traffic.largest <= TEMPORARY


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@TYPES
def test_a_step_adds_to_the_process_s_memory_a_small_part_of_the_deviations(dtype):
    # whoever allocates, in whatever thread: the kernel's own high-water mark
    torch.set_num_threads(2)
    gaussian, theta, gradient = problem(dtype, {"w": (2048, 2048)}, 12)  # 200 MB of rows, or 100
    gaussian.add_gradient_(theta, gradient, 1.0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("this kernel does not set VmHWM back")
    before = resident("VmRSS")
    gaussian.add_gradient_(theta, gradient, 1.0)
    assert resident("VmHWM") - before < 4 * TEMPORARY


@TYPES
def test_a_prior_of_many_small_tensors_costs_few_operations_for_each(dtype):
    def operations(tensors: int) -> int:
        gaussian, theta, gradient = problem(dtype, {f"layer{i}.bias": (5,) for i in range(tensors)}, 3)
        gaussian.add_gradient_(theta, gradient, 1.0)
        with Traffic() as traffic:
            gaussian.add_gradient_(theta, gradient, 1.0)
        return traffic.operations

    assert (operations(60) - operations(20)) / 40 <= MOST_OPERATIONS


def test_a_step_of_prior_penalty_costs_what_the_gaussian_s_does():
    model = tiny_bert(vocab_size=2048, hidden_size=512, intermediate_size=8)
    penalty = PriorPenalty(random_prior(model, rank=3), model, num_examples=10)
    penalty.add_gradient_()
    theta = {name: parameter.detach() for name, parameter in model.named_parameters()}
    with Traffic() as traffic:
        penalty.add_gradient_()
    covered = {name: theta[name] for name in penalty.gaussian.names}
    passes = (traffic.read - nbytes(covered)) / once(penalty.gaussian, covered)
    assert 0.99 < passes < 2.01
    assert traffic.largest <= TEMPORARY
    assert traffic.written <= 1.01 * nbytes(covered)


def test_the_counter_sees_a_temporary_a_third_pass_and_a_copy():
    gaussian, theta, gradient = problem(torch.float32)
    rows = gaussian.deviations["large.weight"]
    with Traffic() as traffic:
        (rows.flatten(1) / 2).sum()
    assert traffic.largest == nbytes(gaussian.deviations)
    with Traffic() as traffic:
        for _ in range(3):
            for part in range(0, 1024, 128):
                rows[:, part : part + 128].sum()
    assert traffic.read == 3 * nbytes(gaussian.deviations)
    assert traffic.operations == 24
    with Traffic() as traffic:
        theta["large.weight"] += 1.0
    assert (traffic.read, traffic.written, traffic.largest) == (4 << 20, 4 << 20, 0)
    with Traffic() as traffic:
        torch.mul(theta["large.weight"], 2.0, out=gradient["large.weight"])
        gradient["large.weight"][:512] += 1.0
    assert (traffic.read, traffic.written, traffic.largest) == (6 << 20, 6 << 20, 0)


def resident(field: str) -> int:
    """Bytes of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))
