"""The transfer grid: source -> prior -> target, over methods, training-set sizes and seeds, cell by cell.

    python benchmarks/transfer/run.py benchmarks/transfer/cifar.toml                 # run what is missing, two at a time
    python benchmarks/transfer/run.py benchmarks/transfer/cifar.toml --list          # what is done and what is not
    python benchmarks/transfer/run.py benchmarks/transfer/cifar.toml --only n=500 method="low rank" seed=1 --again

A cell is one fine-tuning; its row is appended to results/CONFIG.csv as soon as it ends (the reliability diagram of a final one
goes to results/CONFIG_reliability.csv), and a row that is there is not run again, so that the grid can be stopped at any time
and goes on where it was. Stages: `tune` (every candidate of every method, a strength and a learning rate, on four fifths of the
first seed's n images, measured on the fifth), `final` (the candidate with the lowest validation NLL, on all n images of every
seed, measured once on the test set), `oracle` (strengths at the chosen learning rate measured on the test set: only to say what
a choice on validation data misses). Nothing chosen depends on a test image.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import multiprocessing
import os
import platform
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
COLUMNS = (
    *("task", "stage", "method", "n", "seed", "strength", "learning_rate"),
    *("accuracy", "nll", "ece", "source_accuracy", "source_nll"),
    *("head_variance", "scale", "update", "steps", "seconds", "threads", "torch", "machine"),
)
SEARCH = ("method", "n", "seed", "part", "scale", "nll")
BINS = ("method", "n", "seed", "lower", "upper", "count", "confidence", "accuracy")
KEY = ("stage", "method", "n", "seed", "strength", "learning_rate")
NUMBERS = ("strength", "learning_rate")
Candidate = tuple[float, float]  # strength, learning rate


def read(path: Path) -> list[dict[str, str]]:
    """The rows so far."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def key(row: dict[str, Any]) -> tuple[str, ...]:
    """What identifies a row."""
    return tuple(f"{float(row[k]):g}" if k in NUMBERS else str(row[k]) for k in KEY)


def append(path: Path, row: dict[str, Any]) -> None:
    """Write one row at the end, with the heading if the file is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.is_file()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def keep_bins(path: Path, row: dict[str, Any]) -> None:
    """The reliability diagram of a final cell, one line for each bin that is not empty."""
    found = row.pop("bins", None)
    if found is None:
        return
    lines = []
    for lower, upper, count, confidence, accuracy in zip(
        found.edges, found.edges[1:], found.count, found.confidence, found.accuracy, strict=False
    ):
        if count:
            values = {"lower": lower, "upper": upper, "confidence": confidence, "accuracy": accuracy}
            lines.append({"count": str(count)} | {k: f"{v:.6f}" for k, v in values.items()})
    keep(path, BINS, row, lines)


def keep_search(path: Path, row: dict[str, Any]) -> None:
    """What `auto` measured on its held-out part for a final cell, along its path and by whole trainings."""
    choice = row.pop("choice", None)
    if choice is None:
        return
    parts = (("path", choice.trials), ("whole training", choice.checks))
    keep(
        path,
        SEARCH,
        row,
        [{"part": part, "scale": f"{t.scale:.6g}", "nll": f"{t.nll:.5f}"} for part, trials in parts for t in trials],
    )


def keep(path: Path, columns: tuple[str, ...], row: dict[str, Any], lines: list[dict[str, str]]) -> None:
    """Lines of one final cell, in place of what was there for it; the whole file, or what it was before."""
    cell = {name: str(row[name]) for name in ("method", "n", "seed")}
    others = [line for line in read(path) if any(line[name] != value for name, value in cell.items())]
    partial = path.with_suffix(".tmp")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows([*others, *(cell | line for line in lines)])
    partial.replace(path)


def candidates(config: dict[str, Any], method: str) -> list[Candidate]:
    """As many for each method."""
    return list(itertools.product(config["strengths"][method], config["target"]["learning_rates"]))


def chosen(rows: list[dict[str, str]], method: str, n: int, tried: list[Candidate]) -> Candidate | None:
    """The candidate with the lowest validation NLL; None while one is missing."""
    scores = {
        (float(r["strength"]), float(r["learning_rate"])): math.inf if math.isnan(nll := float(r["nll"])) else nll
        for r in rows
        if r["stage"] == "tune" and r["method"] == method and int(r["n"]) == n
    }
    return min(tried, key=scores.__getitem__) if all(c in scores for c in tried) else None


def cells(config: dict[str, Any], rows: list[dict[str, str]]) -> Iterator[dict[str, Any]]:
    """Every cell that can be named now (finals once their candidates are known), small training sets first."""
    for n in config["target"]["numbers"]:
        first = config["seeds"][0]
        for method in config["strengths"]:
            for strength, rate in candidates(config, method):
                yield {**cell("tune", method, n, first), "strength": strength, "learning_rate": rate}
        for seed in config["seeds"]:
            yield {**cell("final", "frozen", n, seed), "strength": 0.0, "learning_rate": 0.0}
            for method in config["strengths"]:
                if best := chosen(rows, method, n, candidates(config, method)):
                    yield {**cell("final", method, n, seed), "strength": best[0], "learning_rate": best[1]}
        for method, like in config.get("auto", {}).items():  # no candidates: at the learning rate that was chosen for `like`
            best = chosen(rows, like, n, candidates(config, like))
            for seed in config["seeds"]:
                if best:
                    yield {**cell("final", method, n, seed), "strength": 0.0, "learning_rate": best[1]}
        for method, strengths in config.get("oracle", {}).items():
            if method == "seeds":
                continue
            tuned = method in config["strengths"]
            best = (
                chosen(rows, method, n, candidates(config, method)) if tuned else (0.0, config["target"]["learning_rates"][0])
            )
            for seed, strength in itertools.product(config["oracle"]["seeds"], strengths):
                if best is not None:
                    yield {**cell("oracle", method, n, seed), "strength": strength, "learning_rate": best[1]}


def cell(stage: str, method: str, n: int, seed: int) -> dict[str, Any]:
    """What a cell is called, but for the candidate."""
    return {"stage": stage, "method": method, "n": n, "seed": seed}


def matches(cell: dict[str, Any], only: list[str]) -> bool:
    """Whether a cell has all the KEY=VALUE pairs."""
    for pair in only:
        name, _, value = pair.partition("=")
        if name not in KEY:
            raise SystemExit(f"--only {pair}: the names are {', '.join(KEY)}.")
        if name in NUMBERS:
            if float(value) != cell[name]:
                return False
        elif value != str(cell[name]):
            return False
    return True


def work(job: tuple[dict[str, Any], dict[str, Any], str, int]) -> dict[str, Any]:
    """One cell in a process of its own."""
    import cells as grid
    import torch

    one, config, folder, threads = job
    torch.set_num_threads(threads)
    if folder not in _TASKS:
        _TASKS[folder] = grid.TASKS[config["task"]](config, Path(folder))
    row = grid.run_cell(grid.Cell(task=config["task"], **one), config, _TASKS[folder])
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()}, {os.cpu_count()} cores"
    return row | {"threads": threads, "torch": torch.__version__, "machine": device}


_TASKS: dict[str, Any] = {}


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="a TOML file beside this program, such as cifar.toml")
    parser.add_argument("--only", nargs="*", default=[], metavar="KEY=VALUE", help=f"cells with these: {', '.join(KEY)}")
    parser.add_argument("--again", action="store_true", help="also cells that have a row (the new row replaces it)")
    parser.add_argument("--list", action="store_true", help="list the cells and run none")
    parser.add_argument("--workers", type=int, default=2, help="cells at a time (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of each (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=HERE / "work", help="folder for the learned prior (default: %(default)s)")
    parser.add_argument("--results", type=Path, help="CSV file (default: results/CONFIG.csv)")
    options = parser.parse_args(arguments)
    config = tomllib.loads(options.config.read_text())
    results = options.results or HERE / "results" / f"{options.config.stem}.csv"
    folder = str(options.work / options.config.stem)

    if options.list:
        done = {key(row) for row in read(results)}
        for one in cells(config, read(results)):
            if matches(one, options.only):
                print("done   " if key(one) in done else "missing", *one.values())
        return
    sys.path.insert(0, str(HERE))
    again = [c for c in cells(config, read(results)) if options.again and matches(c, options.only)]
    if again:
        kept = [row for row in read(results) if key(row) not in {key(c) for c in again}]
        results.unlink(missing_ok=True)
        for row in kept:
            append(results, row)
    import cells as grid

    grid.TASKS[config["task"]](config, Path(folder)).prior()  # once, before the workers ask for it
    with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
        while True:  # finals become known as their candidates are done
            done = {key(row) for row in read(results)}
            missing = [c for c in cells(config, read(results)) if key(c) not in done and matches(c, options.only)]
            if not missing:
                break
            jobs = [(one, config, folder, options.threads) for one in missing]
            for number, row in enumerate(pool.imap_unordered(work, jobs), 1):
                keep_bins(results.with_name(f"{results.stem}_reliability.csv"), row)
                keep_search(results.with_name(f"{results.stem}_auto.csv"), row)
                append(results, row)
                told = ", ".join(f"{name} {row[name]}" for name in KEY)
                print(
                    f"[{number}/{len(jobs)}] {told}: accuracy {row['accuracy']}, NLL {row['nll']} ({row['seconds']} s)",
                    flush=True,
                )


if __name__ == "__main__":
    main()
