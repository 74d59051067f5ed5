"""How near a step of the penalty is to reading and writing its own bytes.

    python benchmarks/bandwidth.py --threads 2
    python benchmarks/bandwidth.py --device cuda

Counted for a step: theta, mean, variance and the K deviation rows read twice, the gradient read and written once, so

    bytes = 2 P (3 * 4 + K * itemsize of a deviation) + 2 * 4 P

The machine's bandwidth is measured on the same arrays: the fastest of torch's sum and dot over theta, mean, variance and
deviations reads them, and an addition in place reads and writes the gradient, each as one operation over all of an array with
all threads, where a step goes through the parameters tensor by tensor. `limit` is the time in which the bytes of a step pass
at these rates; all methods in turns, medians.
"""

from __future__ import annotations

from typing import Any

import torch
from common import Row, finish, median_times, number, options, parser
from penalty import our_step
from problems import TYPES, count, problem, shapes_of

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
    most = 1.5 if given.device == "cpu" else 1.3
    claims = [
        {
            "claim": f"{row['model']}, K = {row['K']}, {row['deviations']} deviations: within {most} times of the limit",
            "measured": f"{number(row['step / limit'])} times",
            "met": row["step / limit"] <= most,
        }
        for row in rows
        if row["model"] == "resnet50"
    ]
    notes = [
        "Bytes of a step: theta, mean, variance and the K deviations read twice, the gradient read and written once. Read and "
        "add are GB/s of one operation over each whole array; limit is the time of the step's bytes at these rates."
    ]
    finish("bandwidth", CLAIM, rows, given.json, claims=claims, notes=notes, device=given.device)


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

        def add(arrays: list[torch.Tensor] = arrays) -> None:
            for array in arrays:
                array.sum()

        def dot(arrays: list[torch.Tensor] = arrays) -> None:
            for array in arrays:
                torch.dot(array, array)

        seconds = median_times(
            {"step": step, "sum": add, "dot": dot, "in place": lambda: of.gradient.add_(1e-3)}, given.repeats
        )
        once = 4 * (3 * size + words)
        read, rate = once / min(seconds["sum"], seconds["dot"]), 8 * size / seconds["in place"]
        limit = 2 * once / read + 8 * size / rate
        row: Row = {"model": model, "P": size, "K": rank, "deviations": kind, "GB of a step": 1e-9 * (2 * once + 8 * size)}
        row |= {"read GB/s": 1e-9 * read, "add GB/s": 1e-9 * rate, "limit ms": 1e3 * limit, "step ms": 1e3 * seconds["step"]}
        row |= {"step GB/s": row["GB of a step"] / seconds["step"], "step / limit": seconds["step"] / limit}
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
