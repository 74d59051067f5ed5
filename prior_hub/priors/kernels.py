"""Triton kernels of fused.py, which says what they compute; importing this module needs triton."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["finish", "project"]


@triton.jit
def project(  # type: ignore[no-untyped-def]
    partial, theta_table, stored_table, sizes, programs, tensor_of, start_of, vector, step_table, steps,
    factor, eps, tensors,
    RANK: tl.constexpr, THETA: tl.constexpr, MEAN: tl.constexpr, VARIANCE: tl.constexpr, ROWS: tl.constexpr,
    IMPLICIT: tl.constexpr, STEP_TENSORS: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """partial[program, k] = sum of D_k x over a block; x from theta, or from D^T vector where there is no THETA."""
    own = tl.program_id(0)
    program = tl.load(programs + own)
    tensor = tl.load(tensor_of + program)
    size = tl.load(sizes + tensor)
    if ALIGNED:
        size = tl.multiple_of(size, 8)
    offsets = tl.multiple_of(tl.load(start_of + program), BLOCK) + tl.arange(0, BLOCK)
    inside = offsets < size
    rows = tl.load(stored_table + 2 * tensors + tensor).to(tl.pointer_type(ROWS))
    variances = tl.load(stored_table + tensors + tensor).to(tl.pointer_type(VARIANCE))
    if ALIGNED:
        rows = tl.multiple_of(rows, 16)
        variances = tl.multiple_of(variances, 16)
    whole = tl.load(variances + offsets, mask=inside, other=1.0).to(tl.float32) * factor + eps
    if IMPLICIT:
        whole += tl.load(steps + tensor)
        if STEP_TENSORS:
            lengths = tl.load(step_table + tensor)
            whole += tl.load(lengths.to(tl.pointer_type(tl.float32)) + offsets, mask=inside & (lengths != 0), other=0.0)
    if THETA is None:
        x = tl.zeros([BLOCK], dtype=tl.float32)
        for k in range(RANK):
            row = tl.load(rows + k * size + offsets, mask=inside, other=0.0).to(tl.float32)
            x += tl.load(vector + k) * row
    else:
        values = tl.load(theta_table + tensor).to(tl.pointer_type(THETA))
        means = tl.load(stored_table + tensor).to(tl.pointer_type(MEAN))
        if ALIGNED:
            means = tl.multiple_of(means, 16)
        x = tl.load(values + offsets, mask=inside, other=0.0).to(tl.float32)
        x -= tl.load(means + offsets, mask=inside, other=0.0).to(tl.float32)
    x = tl.where(inside, x / whole, 0.0)
    for k in range(RANK):
        row = tl.load(rows + k * size + offsets, mask=inside, other=0.0).to(tl.float32)
        tl.store(partial + own * RANK + k, tl.sum(row * x, axis=0))


@triton.jit
def finish(  # type: ignore[no-untyped-def]
    partial, theta_table, into_table, stored_table, sizes, programs, tensor_of, start_of, z, factor_tensor, share,
    step_table, steps, factor, eps, tensors,
    RANK: tl.constexpr, THETA: tl.constexpr, MEAN: tl.constexpr, VARIANCE: tl.constexpr, ROWS: tl.constexpr,
    INTO: tl.constexpr, FACTOR_TENSOR: tl.constexpr, IMPLICIT: tl.constexpr, MOVES: tl.constexpr,
    STEP_TENSORS: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of a block, or its implicit step, and what it adds to the penalty."""
    own = tl.program_id(0)
    program = tl.load(programs + own)
    tensor = tl.load(tensor_of + program)
    size = tl.load(sizes + tensor)
    if ALIGNED:
        size = tl.multiple_of(size, 8)
    offsets = tl.multiple_of(tl.load(start_of + program), BLOCK) + tl.arange(0, BLOCK)
    inside = offsets < size
    values = tl.load(theta_table + tensor).to(tl.pointer_type(THETA))
    means = tl.load(stored_table + tensor).to(tl.pointer_type(MEAN))
    variances = tl.load(stored_table + tensors + tensor).to(tl.pointer_type(VARIANCE))
    if ALIGNED:
        means = tl.multiple_of(means, 16)
        variances = tl.multiple_of(variances, 16)
    mean = tl.load(means + offsets, mask=inside, other=0.0).to(tl.float32)
    delta = tl.load(values + offsets, mask=inside, other=0.0).to(tl.float32) - mean
    diagonal = tl.load(variances + offsets, mask=inside, other=1.0).to(tl.float32) * factor + eps
    expected = tl.zeros([BLOCK], dtype=tl.float32)
    if RANK > 0:
        rows = tl.load(stored_table + 2 * tensors + tensor).to(tl.pointer_type(ROWS))
        if ALIGNED:
            rows = tl.multiple_of(rows, 16)
        for k in range(RANK):
            row = tl.load(rows + k * size + offsets, mask=inside, other=0.0).to(tl.float32)
            expected += tl.load(z + k) * row
    residual = delta - expected
    if IMPLICIT:
        length = tl.zeros([BLOCK], dtype=tl.float32) + tl.load(steps + tensor)
        if STEP_TENSORS:
            lengths = tl.load(step_table + tensor)
            length += tl.load(lengths.to(tl.pointer_type(tl.float32)) + offsets, mask=inside & (lengths != 0), other=0.0)
        whole = diagonal + length
        gradient = residual / whole
        part = tl.where(inside, gradient * gradient * diagonal, 0.0)
        if MOVES:
            moved = mean + (diagonal * delta + length * expected) / whole
            tl.store(values + offsets, moved.to(THETA), mask=inside)
    else:
        gradient = residual / diagonal
        part = tl.where(inside, residual * gradient, 0.0)
        if INTO is not None:
            out = tl.load(into_table + tensor).to(tl.pointer_type(INTO)) + offsets
            scaled = gradient * share
            if FACTOR_TENSOR:
                scaled = gradient * tl.load(factor_tensor)
            before = tl.load(out, mask=inside, other=0.0).to(tl.float32)
            tl.store(out, (before + scaled).to(INTO), mask=inside)
    tl.store(partial + own, tl.sum(part, axis=0))
