"""Time of a step against the number of weights P and the number of deviations K: does it grow linearly?

    python benchmarks/growth.py --threads 2

P is varied in tensors of 2^18 values at K = 5, K at P = 2^22 (GPU: 2^26). Fitted by least squares to the medians:

    seconds = intercept + slope P         and the exponent e of seconds = c P^e, in logarithms, with its standard error
    seconds = intercept + slope K         at K = 0 the diagonal alone is left, so that the exponent in K is below 1 by nature

All sizes are taken in turns. Sizes that fit into a cache are left out: they are faster, and the line would not be straight.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from common import Row, finish, median_times, number, options, parser
from penalty import our_step
from problems import TILE, problem, tiles

CLAIM = "the time of a step grows linearly in P and in K"


def main() -> None:
    """Print and write the tables."""
    given = options(parser(__doc__, devices=True, repeats=9))
    powers = range(3) if given.quick else range(3, 8) if given.device == "cpu" else range(6, 12)  # smaller: all start-up
    sizes = [TILE << i for i in powers]
    ranks, fixed = ([2, 4, 6], TILE) if given.quick else ([2, 5, 10, 20, 40], TILE << (4 if given.device == "cpu" else 8))
    steps = {size: our_step(problem(tiles(size), 5, device=given.device)) for size in sizes}
    over_p = median_times(steps, given.repeats, at_least=0.02)
    del steps
    over_k = median_times(
        {rank: our_step(problem(tiles(fixed), rank, device=given.device)) for rank in ranks}, given.repeats, at_least=0.02
    )
    rows: list[Row] = [
        {"table": "Over P, K = 5", "P": size, "ms": 1e3 * t, "ns per weight": 1e9 * t / size} for size, t in over_p.items()
    ]
    rows += [
        {"table": f"Over K, P = {fixed:,}", "K": rank, "ms": 1e3 * t, "ns per weight and row": 1e9 * t / fixed / rank}
        for rank, t in over_k.items()
    ]
    in_p, in_k = fit(list(over_p), list(over_p.values())), fit(list(over_k), list(over_k.values()))
    for what, unit, found in (("P", 1e9, in_p), ("K", 1e9 / fixed, in_k)):
        row: Row = {
            "table": "Fits",
            "over": what,
            "slope": f"{number(unit * found['slope'])} ns per weight{' and row' * (what == 'K')}",
        }
        row |= {"intercept ms": 1e3 * found["intercept"], "largest deviation from the line": found["away"]}
        rows.append(row | {"exponent": found["exponent"], "standard error": found["error"]})
    finish("growth", CLAIM, rows, given.json, claims=[] if given.quick else claims(in_p, in_k), device=given.device)


def claims(in_p: dict[str, float], in_k: dict[str, float]) -> list[dict[str, Any]]:
    """By the two fits. An exponent whose error alone may put it where it is says nothing."""
    away = abs(in_p["exponent"] - 1)
    noisy = 0.05 < away <= 2 * in_p["error"]
    return [
        {
            "claim": "linear in P: exponent within 0.05 of 1",
            "measured": f"{in_p['exponent']:.3f} +- {in_p['error']:.3f}",
            "met": None if noisy else away <= 0.05,
            "why": "1 is within two standard errors, 0.05 is less than that" if noisy else "",
        },
        {
            "claim": "linear in K: no median further than 15 % from the fitted line",
            "measured": f"{100 * in_k['away']:.1f} %",
            "met": in_k["away"] <= 0.15,
        },
    ]


def fit(x: Sequence[float], y: Sequence[float]) -> dict[str, float]:
    """Line and exponent by least squares; `away` is the largest |y / line - 1|, `error` the exponent's standard error.

    The line is fitted with weights 1 / y^2: times have errors in proportion to themselves.
    """
    weights = [1 / value**2 for value in y]
    total = sum(weights)
    middle_x = sum(w * a for w, a in zip(weights, x, strict=True)) / total
    middle_y = sum(w * b for w, b in zip(weights, y, strict=True)) / total
    above = sum(w * (a - middle_x) * (b - middle_y) for w, a, b in zip(weights, x, y, strict=True))
    slope = above / sum(w * (a - middle_x) ** 2 for w, a in zip(weights, x, strict=True))
    intercept = middle_y - slope * middle_x
    away = max(abs(b / (intercept + slope * a) - 1) for a, b in zip(x, y, strict=True))
    log_x, log_y = [math.log(a) for a in x], [math.log(b) for b in y]
    exponent, constant = statistics.linear_regression(log_x, log_y)
    left = sum((b - constant - exponent * a) ** 2 for a, b in zip(log_x, log_y, strict=True))
    spread = sum((a - statistics.fmean(log_x)) ** 2 for a in log_x)
    error = math.sqrt(left / max(1, len(x) - 2) / spread)
    return {"slope": slope, "intercept": intercept, "away": away, "exponent": exponent, "error": error}


if __name__ == "__main__":
    main()
