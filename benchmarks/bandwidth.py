"""How near a step of the penalty is to reading and writing its own bytes.

    python benchmarks/bandwidth.py --threads 2
    python benchmarks/bandwidth.py --device cuda

Counted for a step: theta, mean, variance and the K deviation rows read twice, the gradient read and written once, so

    bytes = 2 P (3 * 4 + K * itemsize of a deviation) + 2 * 4 P

The machine's bandwidth is measured on arrays of the same sizes. theta, mean, variance and deviations are read in the fastest
of these ways: torch's sum, dot, or (the rows) mv over a whole array with torch's threads, and on a CPU also numpy's sum or
maximum over blocks of 1 MB in as many threads of our own. The gradient is read and written by the faster of two ways to add a
number in place. `limit` is the time in which the bytes of a step pass at these rates; all methods in turns, medians.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from common import Row, finish, median_times, number, options, parser
from penalty import our_step
from problems import TILE, TYPES, count, problem, shapes_of

CLAIM = "a step of the penalty takes at most 1.5 times (GPU: 1.3 times) as long as reading and writing the same bytes"


def main() -> None:
    """Print and write the table."""
    made = parser(__doc__, devices=True, repeats=9)
    made.add_argument("--models", nargs="+", help="resnet18, resnet50, bert, or a number P (default: resnet50)")
    made.add_argument("--ranks", nargs="+", type=int, help="K (default: 5 20)")
    given = options(made)
    rows = [
        row
        for model in given.models or (["1e5"] if given.quick else ["resnet50"])
        for rank in given.ranks or ([3] if given.quick else [5, 20])
        for row in measure(model, rank, given)
    ]
    notes = [
        "Bytes of a step: theta, mean, variance and the K deviations read twice, the gradient read and written once. Read and "
        "add are the rates of the fastest way to read arrays of these sizes, and to add to one in place; limit is the time of "
        "the step's bytes at these rates."
    ]
    if any(row["step / limit"] < 1 for row in rows) and not given.quick:
        notes.append(
            "A step below its limit: other processes took the memory while the limit was measured. It must be done again."
        )
    finish("bandwidth", CLAIM, rows, given.json, claims=claims(rows, given.device), notes=notes, device=given.device)


def claims(rows: list[Row], device: str) -> list[dict[str, Any]]:
    """The issue's; a step below its limit shows that the limit is wrong, and nothing else."""
    most = 1.5 if device == "cpu" else 1.3
    found = []
    for row in rows:
        ratio = row["step / limit"]
        if row["model"] == "resnet50":
            what = f"{row['model']}, K = {row['K']}, {row['deviations']} deviations: within {most} times of the limit"
            claim = {"claim": what, "measured": f"{number(ratio)} times", "met": None if ratio < 1 else ratio <= most}
            found.append(claim | ({"why": "below 1: the limit was disturbed"} if ratio < 1 else {}))
    return found


def measure(model: str, rank: int, given: Any) -> list[Row]:
    """A row for each type of the deviations."""
    shapes = shapes_of(model)
    size = count(shapes)
    of = problem(shapes, rank, device=given.device)
    rows = []
    for kind, dtype in TYPES.items():
        step = our_step(of, dtype)
        words = rank * size * dtype.itemsize // 4
        # as many bytes of fp32 as the rows have, since adding up bf16 costs more than reading it
        like_rows = torch.cat([tensor.flatten() for tensor in of.rows.values()])[:words]
        arrays = [of.theta, of.mean, of.diagonal, like_rows]

        methods = {"step": step} | reads(arrays, rank, given.device) | writes(of.gradient, given.device)
        seconds = median_times(methods, given.repeats)
        once = 4 * (3 * size + words)
        read = once / min(value for name, value in seconds.items() if name.startswith("read"))
        rate = 8 * size / min(value for name, value in seconds.items() if name.startswith("write"))
        limit = 2 * once / read + 8 * size / rate
        row: Row = {"model": model, "P": size, "K": rank, "deviations": kind, "GB of a step": 1e-9 * (2 * once + 8 * size)}
        row |= {"read GB/s": 1e-9 * read, "add GB/s": 1e-9 * rate, "limit ms": 1e3 * limit, "step ms": 1e3 * seconds["step"]}
        row |= {"step GB/s": row["GB of a step"] / seconds["step"], "step / limit": seconds["step"] / limit}
        rows.append(row)
    return rows


def reads(arrays: list[torch.Tensor], rank: int, device: str) -> dict[str, Callable[[], Any]]:
    """Ways to read arrays once, the last of them being the rows."""
    *vectors, rows = arrays
    matrix = rows[: rows.numel() // rank * rank].view(rank, -1)
    ways: dict[str, Callable[[], Any]] = {
        "read, sum": lambda: [array.sum() for array in arrays],
        "read, dot": lambda: [torch.dot(array, array) for array in arrays],
        "read, mv": lambda: (torch.mv(matrix, vectors[0][: matrix.shape[1]]), *(torch.dot(v, v) for v in vectors)),
    }
    if device == "cpu":
        ways["read, blocks, sum"] = in_threads(arrays, np.add.reduce)
        ways["read, blocks, maximum"] = in_threads(arrays, np.maximum.reduce)
    return ways


def writes(array: torch.Tensor, device: str) -> dict[str, Callable[[], Any]]:
    """Ways to read and write an array once."""
    ways: dict[str, Callable[[], Any]] = {"write": lambda: array.add_(1e-3)}
    if device == "cpu":
        ways["write, blocks"] = in_threads([array], lambda part: np.add(part, np.float32(1e-3), out=part))
    return ways


def in_threads(arrays: list[torch.Tensor], method: Callable[[np.ndarray], Any]) -> Callable[[], Any]:
    """numpy's `method` on every block of 2^18 numbers, in as many threads as torch has, each of which takes the next one."""
    parts = [array.numpy()[i : i + TILE] for array in arrays for i in range(0, array.numel(), TILE)]
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads)

    def work(waiting: deque[np.ndarray]) -> None:
        while True:
            try:
                part = waiting.popleft()
            except IndexError:
                return
            method(part)

    def call() -> None:
        waiting = deque(parts)
        list(pool.map(work, [waiting] * threads))

    return call


if __name__ == "__main__":
    main()
