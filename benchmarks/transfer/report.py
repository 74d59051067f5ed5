"""Tables and figures from the rows of the transfer grid; nothing is computed but means, spreads and differences.

    python benchmarks/transfer/report.py benchmarks/transfer/results/cifar.csv [--figures FOLDER]

Prints, for each n whose cells are all there, accuracy, NLL, ECE and what is left of the source task (mean ± sample standard
deviation over seeds), the difference in NLL from plain fine-tuning over the same seeds, and the regret: how far the NLL of the
scale that validation chose lies above the best scale on the test set. Numbers with missing cells are named, not shown.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

from prior_hub.plots import plot_comparison

ORDER = ("frozen", "plain", "zero-mean", "at the mean", "diagonal", "low rank", "low rank, auto")
NAMES = {
    "frozen": "frozen features, fitted head",
    "plain": "plain fine-tuning, weight decay",
    "zero-mean": "zero-mean isotropic prior",
    "at the mean": "isotropic prior at the mean",
    "diagonal": "learned prior, diagonal",
    "low rank": "learned low-rank prior",
    "low rank, auto": "learned low-rank prior, auto",
}


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean ± sample standard deviation."""
    tail = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{tail}"


def picked(method: str, mine: list[dict[str, str]]) -> str:
    """The strength and the learning rate that the rows had; the scales that "auto" chose."""
    if method == "frozen":
        return "-"
    auto = method.endswith("auto")
    what = ", ".join(f"{float(r['scale']):.2g}" for r in mine) if auto else f"{float(mine[0]['strength']):g}"
    return f"{what} ({float(mine[0]['learning_rate']):g})"


def table(rows: list[dict[str, str]], n: int) -> str:
    """One n, as Markdown."""
    final = {(r["method"], int(r["seed"])): r for r in rows if r["stage"] == "final" and int(r["n"]) == n}
    methods = [m for m in ORDER if any(key[0] == m for key in final)]
    seeds = sorted({seed for _, seed in final})
    missing = [f"{NAMES[m]} seed {s}" for m in methods for s in seeds if (m, s) not in final]
    if not seeds or "plain" not in methods:
        return f"n = {n}: plain fine-tuning has no final rows yet"
    if missing:
        return f"n = {n}: {len(missing)} final rows are missing ({missing[0]}, ...)"
    best = min(methods, key=lambda m: fmean(float(final[m, s]["nll"]) for s in seeds))
    lines = [
        f"n = {n}, seeds {', '.join(map(str, seeds))}",
        "",
        "| method | chosen (learning rate) | accuracy | NLL (nats) | NLL - plain | ECE | source accuracy left |",
        "|---|---|---|---|---|---|---|",
    ]
    for m in methods:
        mine = [final[m, s] for s in seeds]
        nll = [float(r["nll"]) for r in mine]
        less = [a - float(final["plain", s]["nll"]) for a, s in zip(nll, seeds, strict=True)]
        shown = f"**{spread(nll)}**" if m == best else spread(nll)
        cells = [
            NAMES[m],
            picked(m, mine),
            spread([float(r["accuracy"]) for r in mine]),
            shown,
            "" if m == "plain" else spread(less),
            spread([float(r["ece"]) for r in mine]),
            spread([float(r["source_accuracy"]) for r in mine]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def regret(rows: list[dict[str, str]], n: int) -> str:
    """The low-rank prior's scales on the test set, and what the validation grid and auto miss."""
    oracle = {
        (int(r["seed"]), float(r["strength"])): float(r["nll"])
        for r in rows
        if r["stage"] == "oracle" and r["method"] == "low rank" and int(r["n"]) == n
    }
    lines = []
    for seed in sorted({s for s, _ in oracle}):
        scores = {scale: nll for (s, scale), nll in sorted(oracle.items()) if s == seed}
        best = min(scores, key=scores.__getitem__)
        told = ", ".join(f"{scale:g}: {nll:.3f}" for scale, nll in scores.items())
        line = f"seed {seed}, test NLL by scale: {told}; best {best:g}"
        final = [r for r in rows if r["stage"] == "final" and int(r["n"]) == n and int(r["seed"]) == seed]
        line += "".join(
            f"; validation chose {float(r['strength']):g}, {float(r['nll']) - scores[best]:+.3f} nats"
            for r in final
            if r["method"] == "low rank"
        )
        line += "".join(
            f"; auto chose {float(r['scale']):.3g}, {float(r['nll']) - scores[best]:+.3f} nats"
            for r in final
            if r["method"] == "low rank, auto"
        )
        lines.append(line)
    return "\n".join(lines)


def main() -> None:
    """Print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, help="results/CONFIG.csv")
    parser.add_argument("--figures", type=Path, help="folder to write comparison.png into")
    options = parser.parse_args()
    with options.rows.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for n in sorted({int(r["n"]) for r in rows}):
        print(table(rows, n) + "\n")
        if told := regret(rows, n):
            print(told + "\n")
    cost = sum(float(r["seconds"]) for r in rows)
    machines = sorted({f"{r['machine']}, {r['threads']} thread(s), torch {r['torch']}" for r in rows})
    print(f"{len(rows)} cells, {cost / 3600:.1f} hours of one cell at a time; {'; '.join(machines)}")
    if options.figures:
        options.figures.mkdir(parents=True, exist_ok=True)
        final = [
            {"method": NAMES[r["method"]], "n": int(r["n"]), "accuracy": float(r["accuracy"]), "nll": float(r["nll"])}
            for r in rows
            if r["stage"] == "final"
        ]
        print(plot_comparison(final, options.figures / "comparison.png", title="CIFAR-10 to CIFAR-100's superclasses"))


if __name__ == "__main__":
    main()
