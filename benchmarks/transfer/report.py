"""Tables and figures from the rows of the transfer grid; nothing is computed but means, spreads and differences.

    python benchmarks/transfer/report.py benchmarks/transfer/results/cifar.csv [--figures FOLDER]
    python benchmarks/transfer/report.py benchmarks/transfer/results/cifar.csv --write   # into the README files

Prints, for each n whose cells are all there, accuracy, NLL, ECE and what is left of the source task (mean ± sample standard
deviation over seeds), the difference in NLL from plain fine-tuning over the same seeds, and the regret: how far the NLL of the
scale that validation chose lies above the best scale on the test set. Numbers with missing cells are named, not shown.
`--write` puts the same tables of cifar.csv between their marks in benchmarks/transfer/README.md, README.md and docs/scale.md,
and those of cifar_trial.csv and cifar_long.csv in the first.
"""

from __future__ import annotations

import argparse
import csv
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean, median, stdev

from prior_hub.inference.metrics import ReliabilityBins
from prior_hub.plots import plot_comparison, plot_reliability

ROOT = Path(__file__).parents[2]
Row = dict[str, str]
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


def _short(scale: float) -> str:
    """Two digits, no needless exponent."""
    return f"{float(f'{scale:.2g}'):g}"


def picked(method: str, mine: list[Row]) -> str:
    """The strength and the learning rate that the rows had; the scales that "auto" chose."""
    if method == "frozen":
        return "-"
    auto = method.endswith("auto")
    what = ", ".join(_short(float(r["scale"])) for r in mine) if auto else f"{float(mine[0]['strength']):g}"
    return f"{what} ({float(mine[0]['learning_rate']):g})"


def table(rows: list[Row], n: int) -> str:
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


def scales(rows: list[Row], n: int) -> dict[int, dict[float, float]]:
    """seed -> scale of the low-rank prior -> test NLL; only seeds that have every scale which another one has."""
    found: dict[int, dict[float, float]] = {}
    for r in rows:
        if r["stage"] == "oracle" and r["method"] == "low rank" and int(r["n"]) == n:
            found.setdefault(int(r["seed"]), {})[float(r["strength"])] = float(r["nll"])
    every = {scale for scores in found.values() for scale in scores}
    return {seed: dict(sorted(scores.items())) for seed, scores in sorted(found.items()) if set(scores) == every}


def choices(rows: list[Row], n: int, method: str) -> dict[int, tuple[float, float]]:
    """seed -> (the scale that was chosen, the test NLL with it)."""
    return {
        int(r["seed"]): (float(r["scale"] or r["strength"]), float(r["nll"]))
        for r in rows
        if r["stage"] == "final" and r["method"] == method and int(r["n"]) == n
    }


def regrets(rows: list[Row], n: int, method: str) -> dict[int, float]:
    """seed -> test NLL of the choice minus the lowest over the scales tried on the test set (nats; below 0: between two)."""
    chosen, tried = choices(rows, n, method), scales(rows, n)
    return {seed: chosen[seed][1] - min(tried[seed].values()) for seed in tried if seed in chosen}


def regret_table(rows: list[Row]) -> str:
    """The low-rank prior's scales on the test set, and what the validation grid and auto miss."""
    lines = [
        "| n | seed | test NLL by scale | validation chose | misses (nats) | `auto` chose | misses (nats) |",
        "|---|---|---|---|---|---|---|",
    ]
    missed: dict[str, list[float]] = {"low rank": [], "low rank, auto": []}
    for n in sorted({int(r["n"]) for r in rows}):
        for seed, scores in scales(rows, n).items():
            told = ", ".join(f"{scale:g}: {nll:.3f}" for scale, nll in scores.items())
            cells = [str(n), str(seed), told]
            for method, gathered in missed.items():
                missing = regrets(rows, n, method).get(seed)
                cells += ["", ""] if missing is None else [_short(choices(rows, n, method)[seed][0]), f"{missing:+.3f}"]
                gathered += [] if missing is None else [missing]
            lines.append(f"| {' | '.join(cells)} |")
    if len(lines) == 2:
        return ""
    named = {"low rank": "validation grid", "low rank, auto": "`auto`"}
    told = "; ".join(
        f"{named[m]}: median {median(v):+.3f}, from {min(v):+.3f} to {max(v):+.3f} nats ({len(v)} cells)"
        for m, v in missed.items()
        if v
    )
    return "\n".join(lines) + (f"\n\n{told}." if told else "")


def overview(rows: list[Row]) -> str:
    """Test NLL of every n that is complete, a line each; bold: the lowest."""
    methods = [m for m in ORDER if any(r["method"] == m and r["stage"] == "final" for r in rows)]
    lines = [f"| n | {' | '.join(NAMES[m] for m in methods)} |", "|---" * (1 + len(methods)) + "|"]
    for n in complete(rows):
        nll = {m: [float(r["nll"]) for r in rows if (r["stage"], r["method"], r["n"]) == ("final", m, str(n))] for m in methods}
        best = min(methods, key=lambda m: fmean(nll[m]))
        shown = [re.sub(r"^(\S+)", r"**\1**", spread(nll[m])) if m == best else spread(nll[m]) for m in methods]
        lines.append(f"| {n} | {' | '.join(shown)} |")
    return "\n".join(lines)


def complete(rows: list[Row]) -> list[int]:
    """The numbers of training images with a final row for every method and seed that any of them has."""
    final = {(r["method"], r["n"], r["seed"]) for r in rows if r["stage"] == "final"}
    methods, numbers, seeds = ({key[i] for key in final} for i in range(3))
    return sorted(int(n) for n in numbers if all((m, n, s) in final for m in methods for s in seeds))


def cost(rows: list[Row]) -> str:
    """Cells, hours and machines."""
    hours = sum(float(r["seconds"]) for r in rows) / 3600
    machines = sorted({f"{r['machine']}, {r['threads']} thread(s), torch {r['torch']}" for r in rows})
    return f"{len(rows)} cells, {hours:.1f} hours of one cell at a time; {'; '.join(machines)}"


def whole(rows: list[Row]) -> str:
    """Every table, as benchmarks/transfer/README.md has them."""
    parts = [table(rows, n) for n in sorted({int(r["n"]) for r in rows})]
    if told := regret_table(rows):
        parts.append(f"What a choice of scale misses, against the best of those tried on the test set itself:\n\n{told}")
    return "\n\n".join([*parts, f"{cost(rows)}."])


WRITTEN: dict[str, dict[str, Callable[[list[Row]], str]]] = {  # results/NAME.csv -> text -> its tables
    "cifar": {"benchmarks/transfer/README.md": whole, "README.md": overview, "docs/scale.md": overview},
    "cifar_trial": {"benchmarks/transfer/README.md": whole},
    "cifar_long": {"benchmarks/transfer/README.md": whole},
}


def written(text: str, name: str, tables: str) -> str:
    """The text with the tables of results/NAME.csv between their marks.

    Raises:
        SystemExit: there are no such marks.
    """
    begin, end = f"<!-- {name}.csv: written by benchmarks/transfer/report.py -->", f"<!-- {name}.csv: end -->"
    found = re.subn(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: f"{begin}\n\n{tables}\n\n{end}", text, flags=re.DOTALL)
    if found[1] != 1:
        raise SystemExit(f"there is not one place between {begin} and {end}.")
    return found[0]


def scale_figure(rows: list[Row], path: Path) -> Path | None:
    """Test NLL against the scale: a panel for each n, a line for each seed, stars for `auto`, rings for validation."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    numbers = [n for n in sorted({int(r["n"]) for r in rows}) if scales(rows, n)]
    if not numbers:
        return None
    figure, panels = plt.subplots(1, len(numbers), figsize=(3.6 * len(numbers) + 0.8, 3.6), squeeze=False, layout="constrained")
    for panel, n in zip(panels[0], numbers, strict=True):
        for seed, scores in scales(rows, n).items():
            (line,) = panel.plot(list(scores), list(scores.values()), marker=".", label=f"seed {seed}")
            for method, marker, face in (("low rank", "o", "none"), ("low rank, auto", "*", line.get_color())):
                if at := choices(rows, n, method).get(seed):
                    panel.plot(
                        *at, marker=marker, markersize=11, linestyle="none", color=line.get_color(), markerfacecolor=face
                    )
        panel.set_xscale("log")
        panel.set_title(f"n = {n}", fontsize=10)
        panel.set_xlabel("scale of the prior's covariance")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("test NLL [nats per image]")
    for marker, name in (("o", "chosen on validation images"), ("*", '"auto"')):
        panels[0][-1].plot([], [], marker=marker, color="0.4", markerfacecolor="none", linestyle="none", label=name)
    panels[0][-1].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def diagrams(rows: list[Row], n: int) -> dict[str, ReliabilityBins]:
    """method -> reliability diagram over the test images of all seeds, from results/NAME_reliability.csv."""
    found: dict[str, ReliabilityBins] = {}
    for method in ORDER:
        mine = [r for r in rows if r["method"] == method and int(r["n"]) == n]
        if not mine:
            continue
        edges = [k / 15 for k in range(16)]
        sums = [[0.0, 0.0, 0.0] for _ in range(15)]
        for r in mine:
            k, count = round(float(r["lower"]) * 15), float(r["count"])
            for j, value in enumerate((1.0, float(r["confidence"]), float(r["accuracy"]))):
                sums[k][j] += count * value
        confidence, accuracy = (tuple(s[j] / s[0] if s[0] else math.nan for s in sums) for j in (1, 2))
        found[NAMES[method]] = ReliabilityBins(tuple(edges), confidence, accuracy, tuple(int(s[0]) for s in sums))
    return found


def draw(results: Path, rows: list[Row], folder: Path, title: str) -> Iterator[Path]:
    """Every figure there are rows for."""
    folder.mkdir(parents=True, exist_ok=True)
    final = [
        {"method": NAMES[r["method"]], "n": int(r["n"]), "accuracy": float(r["accuracy"]), "nll": float(r["nll"])}
        for m in ORDER
        for r in rows
        if r["stage"] == "final" and r["method"] == m and int(r["n"]) in complete(rows)
    ]
    if final:
        yield plot_comparison(final, folder / "comparison.png", title=title)
    if drawn := scale_figure(rows, folder / "scale.png"):
        yield drawn
    bins = read(results.with_name(f"{results.stem}_reliability.csv"))
    for n in sorted({int(r["n"]) for r in bins}):
        if len(diagrams(bins, n)) < len({r["method"] for r in rows if r["stage"] == "final" and int(r["n"]) == n}):
            continue  # rows from before diagrams were kept: a picture of one method compares nothing
        seeds = len({r["seed"] for r in bins if int(r["n"]) == n})
        name = f"{title}, n = {n} ({seeds} seeds together)"
        yield plot_reliability(diagrams(bins, n), folder / f"reliability_n{n}.png", title=name)


def read(path: Path) -> list[Row]:
    """Its rows; none where there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def main() -> None:
    """Print, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, help="results/CONFIG.csv")
    parser.add_argument("--figures", type=Path, help="folder for comparison.png, scale.png and reliability_nN.png")
    parser.add_argument("--title", default="CIFAR-10 to CIFAR-100's superclasses", help="of the figures (default: %(default)s)")
    parser.add_argument("--write", action="store_true", help="put the tables between their marks in the texts")
    options = parser.parse_args()
    rows = read(options.rows)
    if not rows:
        parser.error(f"there are no rows in {options.rows}.")
    print(whole(rows))
    if options.write:
        for name, tables in WRITTEN.get(options.rows.stem, {}).items():
            path = ROOT / name
            path.write_text(written(path.read_text(), options.rows.stem, tables(rows)))
    if options.figures:
        for path in draw(options.rows, rows, options.figures, options.title):
            print(path)


if __name__ == "__main__":
    main()
