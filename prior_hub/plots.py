"""Pictures: methods against the number of training examples, and a prior at a glance. The one place with matplotlib.

Figures are made without pyplot, so that neither a display nor a global state is needed, and are written as files whose
ending names the format (.png, .pdf, .svg).
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

from prior_hub.model import PriorModel

__all__ = ["plot_comparison", "plot_prior"]

# Okabe and Ito's colours, told apart by colour-blind readers; the line styles and markers tell the same on paper.
_STYLES = (
    ("#0072B2", "o", "-"),
    ("#E69F00", "s", "--"),
    ("#009E73", "^", "-."),
    ("#CC79A7", "D", ":"),
    ("#D55E00", "v", (0, (5, 1))),
    ("#56B4E9", "P", (0, (1, 1))),
)
_GREY = "#666666"


def plot_comparison(
    rows: Sequence[Mapping[str, Any]], path: str | os.PathLike[str], *, title: str = "", chance: float | None = None
) -> Path:
    """Test accuracy and NLL against the number of training examples, one line per method.

    Lines are means, error bars one sample standard deviation over the rows of one method and number (none where there is
    one row), and every row is a small dot.

    Args:
        rows: one per run, with the keys "method", "n", "accuracy" (a share) and "nll" (nats per example).
        path: file to write.
        title: heading.
        chance: accuracy of guessing (a share), named on the axis.

    Returns:
        `path`.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: there are no rows.
    """
    if not rows:
        raise ValueError("no rows to plot.")
    methods = list(dict.fromkeys(row["method"] for row in rows))
    numbers = sorted({int(row["n"]) for row in rows})
    figure = _figure(9.6, 4.2)
    panels = figure.subplots(1, 2)
    for index, method in enumerate(methods):
        colour, marker, line = _STYLES[index % len(_STYLES)]
        sideways = 1.03 ** (index - (len(methods) - 1) / 2)  # error bars side by side
        known = [n for n in numbers if any(row["method"] == method and row["n"] == n for row in rows)]
        for panel, key, unit in ((panels[0], "accuracy", 100.0), (panels[1], "nll", 1.0)):
            groups = [[unit * float(r[key]) for r in rows if r["method"] == method and r["n"] == n] for n in known]
            panel.errorbar(
                [n * sideways for n in known],
                [fmean(group) for group in groups],
                [stdev(group) if len(group) > 1 else 0.0 for group in groups],
                color=colour,
                marker=marker,
                linestyle=line,
                markersize=6,
                linewidth=1.6,
                elinewidth=1.1,
                capsize=3,
                label=method,
            )
            dots = [(n * sideways, value) for n, group in zip(known, groups, strict=True) for value in group]
            panel.plot(*zip(*dots, strict=True), color=colour, marker=".", markersize=4, linestyle="none", alpha=0.5)
    guess = "" if chance is None else f", chance {100 * chance:.3g} %"
    for panel, label in ((panels[0], f"test accuracy [%{guess}]"), (panels[1], "test NLL [nats per example]")):
        _tidy(panel)
        if len(numbers) > 1:
            panel.set_xscale("log")
        panel.set_xticks(numbers, labels=[f"{n:,}" for n in numbers])
        panel.set_xticks([], minor=True)
        panel.set_xlabel("training examples of the target task, n")
        panel.set_ylabel(label)
    panels[1].set_ylim(bottom=0)
    seeds = max(sum(1 for r in rows if r["method"] == m and r["n"] == n) for m in methods for n in numbers)
    handles, labels = panels[0].get_legend_handles_labels()
    note = f" (mean of {seeds} seeds, bars: one standard deviation, dots: seeds)" if seeds > 1 else ""
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(methods), 5), frameon=False)
    figure.suptitle((title + note).strip(), fontsize=11)
    return _save(figure, path)


def plot_prior(prior: PriorModel, path: str | os.PathLike[str]) -> Path:
    """A prior at a glance: marginal standard deviation by parameter tensor, and the spectrum of the low-rank part.

    Args:
        prior: the prior, at its own scale.
        path: file to write.

    Returns:
        `path`.

    Raises:
        ImportError: matplotlib is missing.
    """
    figure = _figure(9.6, 4.4)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    spread = {name: tensor.double().sqrt().flatten() for name, tensor in prior.gaussian.marginal_variance().items()}
    levels = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)
    bounds = torch.stack([_quantiles(values, levels) for values in spread.values()])  # (tensors, 3)
    place = list(range(len(spread)))
    colour, marker, _ = _STYLES[0]
    left.vlines(place, bounds[:, 0].tolist(), bounds[:, 2].tolist(), color=colour, alpha=0.35, linewidth=2.2)
    left.plot(place, bounds[:, 1].tolist(), color=colour, marker=marker, markersize=3, linestyle="none")
    left.set_yscale("log")
    left.set_xlabel("parameter tensor, in the model's order")
    left.set_ylabel("prior standard deviation of a weight")
    left.set_title("median and 5 % to 95 % of each tensor's weights", fontsize=9, color=_GREY)
    _label_blocks(left, list(spread))
    values = _singular_values(prior)
    if values:
        colour, marker, _ = _STYLES[2]
        right.plot(range(1, len(values) + 1), values, color=colour, marker=marker, markersize=4, linewidth=1.2)
        right.set_yscale("log")
        right.set_xlabel("direction of the low-rank part")
        right.set_ylabel("standard deviation along it")
        share = _low_rank_share(prior)
        right.set_title(f"{len(values)} directions with {100 * share:.0f} % of the total variance", fontsize=9, color=_GREY)
    else:
        right.text(0.5, 0.5, "no low-rank part:\na diagonal prior", ha="center", va="center", transform=right.transAxes)
        right.set_axis_off()
    for panel in (left, right):
        _tidy(panel)
    base = f" of {prior.config.base_model}" if prior.config.base_model else ""
    figure.suptitle(f"Prior{base}: {prior.num_parameters:,} values, rank {prior.rank}, scale {prior.scale:g}", fontsize=11)
    return _save(figure, path)


# ------------------------------------------------------------------------------------------------------------ internals


def _figure(width: float, height: float) -> Any:
    """A figure of `width` x `height` inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "prior-hub[plots]"') from error
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def _tidy(panel: Any) -> None:
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="y", color="#dddddd", linewidth=0.6)
    panel.set_axisbelow(True)


def _save(figure: Any, path: str | os.PathLike[str]) -> Path:
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target)
    return target


def _quantiles(values: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Quantiles by sorting: `torch.quantile` refuses more than 2^24 values."""
    ordered = values.sort().values
    return ordered[(levels * (len(ordered) - 1)).round().long()]


def _label_blocks(panel: Any, names: Sequence[str]) -> None:
    """Mark where the model's blocks begin, by the first two parts of the name that tell tensors apart."""
    parts = [name.split(".")[:-1] or [name] for name in names]  # the modules that own the tensors
    pairs = zip(min(parts), max(parts), strict=False)  # the first and the last in order differ where any two do
    shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    blocks = [".".join(p[shared : shared + 2]) or p[-1] for p in parts]
    starts = [i for i, block in enumerate(blocks) if i == 0 or block != blocks[i - 1]]
    chosen: list[int] = []
    for start in starts:  # as many labels as there is room for
        if not chosen or start - chosen[-1] >= len(names) / 24:
            chosen.append(start)
    panel.set_xticks(chosen, labels=[blocks[i] for i in chosen], rotation=60, ha="right", rotation_mode="anchor", fontsize=7)


def _singular_values(prior: PriorModel) -> list[float]:
    """Standard deviations along the principal directions of scale * b * D^T D, largest first; zeros left out."""
    values = prior.gaussian.spectrum()
    return [math.sqrt(value) for value in values if value > 1e-9 * values[0]]


def _low_rank_share(prior: PriorModel) -> float:
    return prior.diagnose().low_rank_share
