"""Pictures: methods compared, a prior at a glance, calibration, chains, segmentations. The one place with matplotlib.

Figures are made without pyplot, so that neither a display nor a global state is needed, and are written as files whose
ending names the format (.png, .pdf, .svg); another ending is a ValueError.
"""

from __future__ import annotations

import colorsys
import itertools
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor

from prior_hub.finetuning.scale import ScaleChoice
from prior_hub.inference.metrics import ReliabilityBins, reliability_bins
from prior_hub.model import PriorModel
from prior_hub.priors.profile import Profile, profile

__all__ = [
    "PICTURES",
    "card_pictures",
    "check_picture",
    "plot_average",
    "plot_comparison",
    "plot_prior",
    "plot_reliability",
    "plot_scale",
    "plot_segmentation",
    "plot_trace",
]

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
_CLASSES = ("#56B4E9", "#E69F00", "#009E73", "#D55E00", "#0072B2", "#CC79A7", "#F0E442", "#000000")  # Okabe and Ito's
_IGNORED = (0.87, 0.87, 0.87)
_MOST_PANELS = 8
PICTURES = ("all", "variance", "spectrum", "freedom")  # what `plot_prior` draws
_MANY = 80  # blocks; beyond it lines have no markers
_CARD_DPI = 120
_SIZES = {"all": (10.0, 8.0), "variance": (8.0, 4.0), "spectrum": (5.2, 4.0), "freedom": (7.2, 4.0)}  # inches


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
    _accuracy_and_nll(panels, rows, methods, "n", numbers)
    guess = "" if chance is None else f", chance {100 * chance:.3g} %"
    for panel, label in ((panels[0], f"test accuracy [%{guess}]"), (panels[1], "test NLL [nats per example]")):
        panel.set_xlabel("training examples of the target task, n")
        panel.set_ylabel(label)
    values = [float(row["nll"]) for row in rows if math.isfinite(row["nll"])]
    if values and 3 * min(values) <= max(values):  # else the differences would be lost in the space above zero
        panels[1].set_ylim(bottom=0)
    seeds = max(sum(1 for r in rows if r["method"] == m and r["n"] == n) for m in methods for n in numbers)
    handles, labels = panels[0].get_legend_handles_labels()
    note = f" (mean of {seeds} seeds, bars: one standard deviation, dots: seeds)" if seeds > 1 else ""
    _legend_below(figure, handles, labels, most=5)
    figure.suptitle((title + note).strip(), fontsize=11)
    return _save(figure, path)


def plot_prior(
    prior: PriorModel,
    path: str | os.PathLike[str],
    *,
    what: str = "all",
    found: Profile | None = None,
    title: str | None = None,
) -> Path:
    """A prior in pictures: how far each weight may move, in which directions, and where in the network.

    "variance": standard deviation of the weights by parameter tensor, in the network's order (median, 5 % and 95 %).
    "spectrum": share of the low-rank part's variance along each of its principal directions.
    "freedom": by block of the network, the standard deviation in relation to the size of the weights themselves, both root mean
    squares over the block, split into what the diagonal and what the low-rank part allow. At 100 % a weight may be anything;
    at 1 % it stays what it is.
    "all": the three in one picture.

    Every number is read once, a few megabytes at a time; from 1 GB on with a progress bar.

    Args:
        prior: the prior, at its own scale.
        path: file to write.
        what: which picture.
        found: `profile(prior.gaussian)` where there is one already.
        title: heading; names the prior when None.

    Returns:
        `path`.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: there is no such picture, "spectrum" of a prior without a low-rank part, or a file's ending that names no
            kind of picture.
    """
    if what not in PICTURES:
        raise ValueError(f"what is {what!r}, expected one of {', '.join(map(repr, PICTURES))}.")
    if what == "spectrum" and not prior.gaussian._low_rank_scale():
        raise ValueError("the prior has no low-rank part, and so no spectrum: it is diagonal.")
    check_picture(path)  # before anything is read: matplotlib may be missing, the ending unknown
    return _draw_prior(prior, path, what, found or profile(prior.gaussian, title=_name(prior)), title)


def card_pictures(prior: PriorModel, folder: Path) -> dict[str, str]:
    """Write the pictures of a model card, small PNG files, and say what is seen on each.

    Args:
        prior: the prior, at its own scale.
        folder: where to write; created if missing.

    Returns:
        File name -> alternative text, one sentence with the prior's numbers: "prior_variance.png", "prior_freedom.png" and,
        where there is a low-rank part, "prior_spectrum.png".

    Raises:
        ImportError: matplotlib is missing; nothing is written.
    """
    _figure(1, 1)
    found = profile(prior.gaussian, title=_name(prior))
    texts = {}
    for what, describe in (("variance", _say_variance), ("freedom", _say_freedom), ("spectrum", _say_spectrum)):
        if text := describe(found, prior.scale):
            _draw_prior(prior, folder / f"prior_{what}.png", what, found, None, dpi=_CARD_DPI)
            texts[f"prior_{what}.png"] = text
    return texts


def plot_scale(
    choice: ScaleChoice,
    path: str | os.PathLike[str],
    *,
    measured: Mapping[float, float] | None = None,
    title: str = "",
) -> Path:
    """NLL against the prior's scale, with the chosen one marked.

    Args:
        choice: what `prior_scale="auto"` or `select_scale` found (`trainer.prior_scale_choice`, or prior_scale.json read back).
        path: file to write.
        measured: scale -> NLL on other data (nats per example), such as whole trainings on the test set.
        title: heading.

    Returns:
        `path`.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: no trial has a finite NLL.
    """
    shown = [t for t in choice.trials if math.isfinite(t.nll)]
    if not shown:
        raise ValueError("no trial has a finite NLL: there is nothing to plot.")
    figure = _figure(6.4, 4.2)
    panel = figure.subplots()
    heads = list(dict.fromkeys(t.head_variance for t in shown))
    several = choice.method == "grid" and len(heads) > 1
    for k, head in enumerate(heads if several else [None]):
        colour, marker, line = _STYLES[k % len(_STYLES)]
        mine = [t for t in shown if t.head_variance == head] if several else shown[-len({t.scale for t in shown}) :]
        mine = sorted(mine, key=lambda t: t.scale)
        name = f"head variance {head:.2g}" if several else f"{choice.held_out} held-out examples ({choice.method})"
        panel.plot([t.scale for t in mine], [t.nll for t in mine], color=colour, marker=marker, linestyle=line, label=name)
    if choice.checks:
        colour, marker, line = _STYLES[1]
        low, high = (f(t.nll for t in (*shown, *(c for c in choice.checks if c.scale == choice.scale))) for f in (min, max))
        limit = high + 2 * (high - low)  # a check that diverged would flatten all the rest
        whole = sorted((t for t in choice.checks if t.nll <= limit), key=lambda t: t.scale)
        panel.plot(
            [t.scale for t in whole],
            [t.nll for t in whole],
            color=colour,
            marker=marker,
            linestyle=line,
            label="the same (whole trainings)",
        )
        beyond = [t.scale for t in choice.checks if not t.nll <= limit]
        if beyond:
            top = [0.98] * len(beyond)
            panel.plot(
                beyond,
                top,
                transform=panel.get_xaxis_transform(),
                color=colour,
                marker="^",
                linestyle="none",
                label="whole training beyond the picture, or diverged",
            )
    if measured:
        colour, marker, line = _STYLES[-1]
        scales = sorted(measured)
        panel.plot(scales, [measured[s] for s in scales], color=colour, marker=marker, linestyle=line, label="measured")
    panel.axvline(choice.scale, color=_GREY, linewidth=1, linestyle=":")
    panel.annotate(
        f" chosen: {choice.scale:.3g}",
        (choice.scale, 1),
        xycoords=("data", "axes fraction"),
        va="top",
        color=_GREY,
        fontsize=9,
    )
    panel.set_xscale("log")
    panel.set_xlabel("scale of the prior's covariance (right: the data move the weights more)")
    panel.set_ylabel("NLL [nats per example]")
    panel.legend(frameon=False, fontsize=9)
    _tidy(panel)
    figure.suptitle(title or "How wide should the prior be?", fontsize=11)
    return _save(figure, path)


def plot_reliability(
    methods: Mapping[str, ReliabilityBins | tuple[Tensor, Tensor]],
    path: str | os.PathLike[str],
    *,
    bins: int = 15,
    title: str = "",
) -> Path:
    """Reliability diagram: accuracy against confidence, one line per method, and how many examples have which confidence.

    A calibrated model is on the diagonal, an overconfident one below it. Bins that hold less than one example in a thousand
    are drawn hollow: their accuracy is chance. The legend gives each method's calibration error over the bins drawn.

    Args:
        methods: by name, a `ReliabilityBins`, or (probabilities, labels) of which one is made.
        path: file to write.
        bins: number of bins of equal width, where they are made here.
        title: heading.

    Returns:
        `path`.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: there are no methods; as `reliability_bins`.
    """
    if not methods:
        raise ValueError("no methods to plot.")
    figure = _figure(5.2, 5.8)
    top, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    top.plot([0, 1], [0, 1], color=_GREY, linewidth=0.8, linestyle=(0, (4, 3)))
    lowest = 1.0
    for index, (name, given) in enumerate(methods.items()):
        found = given if isinstance(given, ReliabilityBins) else reliability_bins(*given, bins=bins)
        total = sum(found.count)
        colour, marker, line = _STYLES[index % len(_STYLES)]
        full = [b for b, n in enumerate(found.count) if n]
        x, y = [found.confidence[b] for b in full], [found.accuracy[b] for b in full]
        lowest = min([lowest, *x])
        few = [i for i, b in enumerate(full) if found.count[b] < 1e-3 * total]
        label = f"{name}: ECE {100 * found.expected_calibration_error:.1f} %"
        top.plot(x, y, color=colour, marker=marker, linestyle=line, markersize=5, linewidth=1.5, label=label)
        top.plot(
            [x[i] for i in few], [y[i] for i in few], color=colour, marker=marker, linestyle="none", mfc="white", markersize=5
        )
        shares = [100 * n / total if total else 0.0 for n in found.count]
        below.stairs(shares, found.edges, color=colour, linestyle=line, linewidth=1.4)
    left = math.floor(10 * lowest) / 10
    top.set_xlim(left, 1.005)
    top.set_ylim(-0.01, 1.01)
    top.set_ylabel("accuracy")
    top.legend(loc="upper left", frameon=False, fontsize=9)
    below.set_ylim(bottom=0)
    below.set_xlabel("confidence (largest probability)")
    below.set_ylabel("examples in bin [%]")
    for panel in (top, below):
        _tidy(panel)
    figure.suptitle(title, fontsize=11)
    return _save(figure, path)


def plot_average(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike[str], *, title: str = "") -> Path:
    """Test accuracy and NLL against the number of posterior samples averaged: when do more no longer help?

    Args:
        rows: one per average, with the keys "samples" (how many), "accuracy" (a share), "nll" (nats per example) and, for
            several lines, "method". Several rows of one method and number are drawn as their mean and standard deviation.
        path: file to write.
        title: heading.

    Returns:
        `path`.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: there are no rows.
    """
    if not rows:
        raise ValueError("no rows to plot.")
    named = [{"method": "posterior average", **row} for row in rows]
    methods = list(dict.fromkeys(row["method"] for row in named))
    figure = _figure(9.6, 4.2)
    panels = figure.subplots(1, 2)
    _accuracy_and_nll(panels, named, methods, "samples", sorted({int(row["samples"]) for row in named}))
    for panel, label in zip(panels, ("test accuracy [%]", "test NLL [nats per example]"), strict=True):
        panel.set_xlabel("posterior samples averaged")
        panel.set_ylabel(label)
    if len(methods) > 1:
        handles, labels = panels[0].get_legend_handles_labels()
        _legend_below(figure, handles, labels, most=5)
    most = max(sum(1 for r in named if (r["method"], r["samples"]) == (row["method"], row["samples"])) for row in named)
    note = f" (mean of {most} runs, bars: one standard deviation, dots: runs)" if most > 1 else ""
    figure.suptitle((title + note).strip(), fontsize=11)
    return _save(figure, path)


def plot_trace(
    values: Tensor,
    path: str | os.PathLike[str],
    *,
    log_posterior: Tensor | None = None,
    nll: Tensor | None = None,
    names: Sequence[str] | None = None,
    title: str = "",
) -> Path:
    """Function values against draws, one line per chain: chains that mix lie over each other and go nowhere.

    Args:
        values: (chains, draws, functions), or (chains, draws) of one; at most 8 functions are drawn.
        path: file to write.
        log_posterior: (chains, draws) in nats, drawn above them.
        nll: (chains, draws) in nats, drawn above them.
        names: of the functions.
        title: heading.

    Returns:
        `path`.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: shapes do not fit.
    """
    values = values.unsqueeze(2) if values.ndim == 2 else values
    if values.ndim != 3 or not values.numel():
        raise ValueError(f"values have shape {tuple(values.shape)}, expected (chains, draws, functions).")
    chains, draws, functions = values.shape
    names = [f"function {i}" for i in range(functions)] if names is None else list(names)
    if len(names) != functions:
        raise ValueError(f"there are {len(names)} names for {functions} functions.")
    above = [(label, t) for label, t in (("log posterior [nats]", log_posterior), ("NLL [nats]", nll)) if t is not None]
    for label, tensor in above:
        if tensor.shape != (chains, draws):
            raise ValueError(f"{label} has shape {tuple(tensor.shape)}, expected {(chains, draws)}.")
    lines = [*above, *((name, values[:, :, i]) for i, name in enumerate(names[:_MOST_PANELS]))]
    figure = _figure(8.0, 0.9 + 1.35 * len(lines))
    panels = figure.subplots(len(lines), 1, sharex=True, squeeze=False)[:, 0]
    for panel, (label, tensor) in zip(panels, lines, strict=True):
        for chain, series in enumerate(tensor.detach().cpu().double().tolist()):
            colour, _, _ = _STYLES[chain % len(_STYLES)]
            panel.plot(range(1, draws + 1), series, color=colour, linewidth=0.9, alpha=0.85, label=f"chain {chain + 1}")
        panel.set_title(label, fontsize=9, loc="left")
        panel.tick_params(labelsize=8)
        panel.ticklabel_format(axis="y", useOffset=False)
        panel.margins(x=0.01)
        _tidy(panel)
    panels[-1].set_xlabel("draw")
    if chains > 1:
        handles, labels = panels[0].get_legend_handles_labels()
        _legend_below(figure, handles, labels, most=6, size=9)
    left_out = f" (the first {_MOST_PANELS} of {functions} functions)" if functions > _MOST_PANELS else ""
    figure.suptitle((title + left_out).strip(), fontsize=11)
    return _save(figure, path)


def plot_segmentation(
    images: Tensor,
    labels: Tensor,
    predictions: Tensor,
    entropy: Tensor,
    mutual_information: Tensor,
    path: str | os.PathLike[str],
    *,
    class_names: Sequence[str] | None = None,
    ignore_index: int = 255,
    title: str = "",
) -> Path:
    """A grid of pictures, a row per example: image, true classes, predicted ones, entropy, mutual information.

    Classes have the same colours everywhere, and all pictures of one kind of uncertainty the same scale. Pixels that do not
    count are light grey.

    Args:
        images: (B, 3, H, W) or (B, 1, H, W); normalised ones are stretched to black and white, each by itself.
        labels: (B, H, W) integers.
        predictions: (B, H, W) integers.
        entropy: predictive entropy, (B, H, W), in nats.
        mutual_information: (B, H, W), in nats.
        path: file to write.
        class_names: by class; those that occur are named below.
        ignore_index: label of the pixels that do not count (-100 never does).
        title: heading.

    Returns:
        `path`.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: shapes do not fit.
    """
    shape = (images.shape[0], *images.shape[2:])
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not images.numel():
        raise ValueError(f"images have shape {tuple(images.shape)}, expected (B, 3, H, W) or (B, 1, H, W).")
    maps = {"labels": labels, "predictions": predictions, "entropy": entropy, "mutual_information": mutual_information}
    for name, tensor in maps.items():
        if tensor.shape != shape:
            raise ValueError(f"{name} have shape {tuple(tensor.shape)}, expected {shape}.")
    rows, height, width = shape
    known = labels[(labels != ignore_index) & (labels >= 0)]
    occurring = sorted({*torch.unique(known).tolist(), *torch.unique(predictions).tolist()})
    side = 1.9
    note = 0.0 if class_names is None else 0.3 * math.ceil(len(occurring) / 6)
    figure = _figure(5 * side + 0.4, rows * (side * height / width + 0.05) + 0.75 + note + (0.25 if title else 0.0))
    panels = figure.subplots(rows + 1, 5, squeeze=False, height_ratios=[*[side * height / width] * rows, 0.1])
    heads = ("image", "true", "predicted", "predictive entropy [nats]", "mutual information [nats]")
    for panel, head in zip(panels[0], heads, strict=True):
        panel.set_title(head, fontsize=9)
    for panel in panels[rows, :3]:
        panel.set_axis_off()
    for row, line in enumerate(panels[:rows]):
        line[0].imshow(_picture(images[row]).tolist())
        line[1].imshow(_coloured(labels[row], ignore_index).tolist(), interpolation="nearest")
        line[2].imshow(_coloured(predictions[row], ignore_index).tolist(), interpolation="nearest")
        for panel in line:
            panel.set_xticks([])
            panel.set_yticks([])
            panel.spines[:].set_visible(False)
    for column, tensor in ((3, entropy), (4, mutual_information)):
        most = max(float(tensor.max()), 1e-6)
        for row in range(rows):
            shown = panels[row, column].imshow(tensor[row].detach().cpu().double().tolist(), cmap="magma", vmin=0, vmax=most)
        bar = figure.colorbar(shown, cax=panels[rows, column], orientation="horizontal")
        bar.ax.tick_params(labelsize=7)
        bar.outline.set_visible(False)
    if class_names is not None:
        from matplotlib.patches import Patch

        handles = [Patch(facecolor=_class_colour(c)) for c in occurring]
        _legend_below(figure, handles, [class_names[c] for c in occurring], most=6, size=8)
    figure.suptitle(title, fontsize=11)
    return _save(figure, path)


# ------------------------------------------------------------------------------------------------------------ internals


def _accuracy_and_nll(
    panels: Any, rows: Sequence[Mapping[str, Any]], methods: Sequence[str], key: str, numbers: Sequence[int]
) -> None:
    """Accuracy on the left panel and NLL on the right against `row[key]`: mean, standard deviation and rows of each method."""
    for index, method in enumerate(methods):
        colour, marker, line = _STYLES[index % len(_STYLES)]
        sideways = 1.03 ** (index - (len(methods) - 1) / 2)  # error bars side by side
        known = [n for n in numbers if any(row["method"] == method and row[key] == n for row in rows)]
        for panel, what, unit in ((panels[0], "accuracy", 100.0), (panels[1], "nll", 1.0)):
            groups = [[unit * float(r[what]) for r in rows if r["method"] == method and r[key] == n] for n in known]
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
    for panel in panels:
        _tidy(panel)
        if len(numbers) > 1:
            panel.set_xscale("log")
        ticks = _apart(numbers)
        panel.set_xticks(ticks, labels=[f"{n:,}" for n in ticks])
        panel.set_xticks([], minor=True)


def _apart(numbers: Sequence[int]) -> list[int]:
    """Those rising numbers whose labels have room on a logarithmic axis."""
    chosen: list[int] = []
    for number in numbers:
        if not chosen or math.log(number / chosen[-1]) > math.log(numbers[-1] / numbers[0]) / 14:
            chosen.append(number)
    return chosen


def _picture(image: Tensor) -> Tensor:
    """(H, W, 3) in [0, 1]."""
    image = image.detach().cpu().double()
    low, high = float(image.min()), float(image.max())
    if low < 0 or high > 1:
        low, high = (0.0, 255.0) if low >= 0 and high > 32 else (low, high)
        image = (image - low) / max(high - low, 1e-12)
    return image.expand(3, *image.shape[1:]).movedim(0, -1)


def _coloured(classes: Tensor, ignore_index: int) -> Tensor:
    """Each class's colour, (H, W, 3)."""
    classes = classes.cpu().long()
    ignored = (classes == ignore_index) | (classes < 0)
    classes = classes.masked_fill(ignored, 0)
    colours = torch.tensor([_class_colour(c) for c in range(int(classes.max()) + 1)], dtype=torch.float64)
    return torch.where(ignored.unsqueeze(-1), torch.tensor(_IGNORED, dtype=torch.float64), colours[classes])


def _class_colour(index: int) -> tuple[float, float, float]:
    """Okabe and Ito's for the first eight classes, then hues a golden angle apart."""
    if index < len(_CLASSES):
        red, green, blue = (int(_CLASSES[index][i : i + 2], 16) / 255 for i in (1, 3, 5))
        return (red, green, blue)
    return colorsys.hsv_to_rgb(index * 0.618034 % 1, 0.45 + 0.15 * (index % 3), 0.95 - 0.2 * (index % 2))


def _figure(width: float, height: float, dpi: int = 150) -> Any:
    """A figure of `width` x `height` inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "prior-hub[plots]"') from error
    return Figure(figsize=(width, height), dpi=dpi, layout="constrained")


def _legend_below(figure: Any, handles: Sequence[Any], labels: Sequence[str], *, most: int, size: float = 10) -> None:
    """Under the panels, in as many columns as the figure is wide, `most` at the most."""
    for columns in range(max(1, min(most, len(handles))), 0, -1):
        legend = figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=size)
        figure.draw_without_rendering()
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            return
        legend.remove()


def _tidy(panel: Any) -> None:
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="y", color="#dddddd", linewidth=0.6)
    panel.set_axisbelow(True)


def _save(figure: Any, path: str | os.PathLike[str]) -> Path:
    kind = check_picture(path)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, format=kind)
    return target


def check_picture(path: str | os.PathLike[str]) -> str:
    """The kind of picture that the path's ending names, such as "png", before the work of drawing it.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: the ending names no kind that can be written.
    """
    target = Path(path)
    kinds = sorted(_figure(1, 1).canvas.get_supported_filetypes())
    suffix = os.path.splitext(target.name)[1].lower()  # noqa: PTH122 - Path.suffix takes "..png" for an ending
    if suffix.removeprefix(".") not in kinds:
        ending = f"ends in {suffix!r}" if suffix else "has no ending"
        raise ValueError(
            f"cannot draw {str(target)!r}: it {ending}, which names no kind of picture. Use .png, .svg or .pdf (or one of "
            f"{', '.join(kinds)})."
        )
    return suffix.removeprefix(".")


# ------------------------------------------------------------------------------------------------ pictures of a prior


def _name(prior: PriorModel) -> str:
    """A heading: where the prior is from, over which model, learned on what."""
    config = prior.config
    base = f"Prior over {config.base_model or config.model_type}" if config.base_model or config.model_type else "Prior"
    data = config.source.get("dataset")
    learned = f", learned on {', '.join(map(str, data)) if isinstance(data, (list, tuple)) else data}" if data else ""
    return shorten((f"{prior.repo_id}: " if prior.repo_id else "") + base + learned, 110, placeholder=" ...")


def _draw_prior(
    prior: PriorModel, path: str | os.PathLike[str], what: str, found: Profile, title: str | None, dpi: int = 150
) -> Path:
    figure = _figure(*_SIZES[what], dpi)
    if what == "all":
        grid = figure.add_gridspec(2, 2, width_ratios=(3, 2))
        _draw_variance(figure.add_subplot(grid[0, :]), found)
        _draw_freedom(figure.add_subplot(grid[1, 0]), found)
        _draw_spectrum(figure.add_subplot(grid[1, 1]), found)
    else:
        {"variance": _draw_variance, "freedom": _draw_freedom, "spectrum": _draw_spectrum}[what](figure.subplots(), found)
    facts = f"{prior.num_parameters:,} values, rank {prior.rank}, scale {prior.scale:g}"
    figure.suptitle(f"{title or _name(prior)}\n{facts}", fontsize=10)
    return _save(figure, path)


def _draw_variance(panel: Any, found: Profile) -> None:
    """Standard deviations by parameter tensor: a point at the median, a line from 5 % to 95 %."""
    by_name = {t.name: t for t in found.tensors}
    blocks = [(b.name, [by_name[n] for n in b.parameters if by_name[n].size]) for b in found.blocks()]
    tensors = [tensor for _, members in blocks for tensor in members]
    low, middle, high = ([t.deviation[i] for t in tensors] for i in range(3))
    place = range(len(tensors))
    colour, marker, _ = _STYLES[0]
    width, size = _fitting(len(tensors))
    panel.vlines(place, low, high, color=colour, alpha=0.4, linewidth=width, label="5 % to 95 % of the tensor's weights")
    panel.plot(place, middle, color=colour, marker=marker, markersize=size, linestyle="none", label="median weight")
    starts = itertools.accumulate((len(members) for _, members in blocks), initial=0)
    _mark_blocks(panel, [name for name, _ in blocks], list(starts)[:-1], len(tensors))
    _logarithmic(panel, [*low, *high])
    panel.set_xlabel("parameter tensors, in the network's order (named where a block begins)", fontsize=8)
    panel.set_ylabel("standard deviation of a weight\n[in the weight's own units]", fontsize=8)
    _legend(panel, "How far the prior lets a weight move")


def _draw_spectrum(panel: Any, found: Profile) -> None:
    """Share of the low-rank variance by direction, and of all directions up to it."""
    shares = _shares(found)
    if not shares:
        panel.text(0.5, 0.5, "no low-rank part:\na diagonal prior", ha="center", va="center", transform=panel.transAxes)
        panel.set_axis_off()
        return
    place = range(1, len(shares) + 1)
    together = list(itertools.accumulate(shares))
    for values, label, (colour, marker, line) in (
        (together, "with those before", _STYLES[2]),
        (shares, "alone", _STYLES[4]),
    ):
        size = 4 if len(shares) <= 40 else 2
        panel.plot(place, values, color=colour, marker=marker, linestyle=line, markersize=size, linewidth=1.2, label=label)
    equal = 100 / len(shares)
    panel.axhline(equal, color=_GREY, linewidth=0.9, linestyle=":", label=f"if all were equal ({equal:.3g} %)")
    _logarithmic(panel, [*shares, *together])
    _in_per_cent(panel)
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.set_xlim(0.5, len(shares) + 0.5)
    panel.set_xlabel("principal direction of the deviations, largest first", fontsize=8)
    panel.set_ylabel("share of the low-rank variance", fontsize=8)
    panel.tick_params(axis="x", labelsize=7.5)
    share = f"{100 * found.low_rank_share:.0f} % of the total variance"
    _legend(panel, f"Low-rank part: {share},\neffective rank {found.effective_rank:.1f} of {len(shares)}")


def _draw_freedom(panel: Any, found: Profile) -> None:
    """By block: standard deviation over the size of the weights, together and of either part alone."""
    blocks = [b for b in found.blocks() if b.freedom]
    drawn = [
        ("together", [b.total / b.weight for b in blocks], _STYLES[0]),
        ("diagonal alone", [b.diagonal / b.weight for b in blocks], _STYLES[1]),
        ("low-rank part alone", [b.low_rank / b.weight for b in blocks], _STYLES[2]),
    ]
    shown = [(label, values, style) for label, values, style in drawn if any(values)]
    if len(shown) == 2:  # only one part there is: the same as together
        shown = shown[:1]
    _, size = _fitting(len(blocks))
    for label, values, (colour, marker, line) in shown:
        heights = [value if value > 0 else math.nan for value in values]
        options = {"marker": marker if len(blocks) <= _MANY else "", "markersize": size + 1, "linestyle": line}
        panel.plot(
            range(len(blocks)), heights, color=colour, linewidth=1.2 if label == "together" else 0.8, label=label, **options
        )
    panel.axhline(1, color=_GREY, linewidth=0.9, linestyle=":", label="as large as the weights")
    _logarithmic(panel, [1.0, *(value for _, values, _ in shown for value in values)])
    _in_per_cent(panel, 100)
    _mark_blocks(panel, [b.name for b in blocks], list(range(len(blocks))), len(blocks))
    zero = len(found.blocks()) - len(blocks)
    left = f" ({zero} with a mean or variance of zero left out)" if zero else ""
    panel.set_xlabel(f"blocks of the network, in its order{left}", fontsize=8)
    panel.set_ylabel("standard deviation / size of the weights\n[root mean squares over the block]", fontsize=8)
    _legend(panel, "Where the prior lets the network move")


def _say_variance(found: Profile, scale: float) -> str:
    medians = {t.name: t.deviation[1] for t in found.tensors if t.size}
    if not medians:
        return ""
    low, high = min(medians, key=medians.__getitem__), max(medians, key=medians.__getitem__)
    span = f"goes from {medians[low]:.2g} in {low} to {medians[high]:.2g} in {high}"
    return (
        f"Standard deviation of the weights under the prior by parameter tensor, at scale {scale:g}: the median "
        f"{span if low != high else f'is {medians[low]:.2g} in {low}'}."
    )


def _say_freedom(found: Profile, scale: float) -> str:
    freedom = {b.name: b.freedom for b in found.blocks() if b.freedom}
    if not freedom:
        return ""
    low, high = min(freedom, key=freedom.__getitem__), max(freedom, key=freedom.__getitem__)
    span = f"from {100 * freedom[low]:.2g} % in {low} to {100 * freedom[high]:.2g} % in {high}"
    return (
        "Standard deviation of the weights under the prior in relation to their size, by block of the network, at scale "
        f"{scale:g}: {span if low != high else f'{100 * freedom[low]:.2g} % in {low}'}."
    )


def _say_spectrum(found: Profile, scale: float) -> str:  # noqa: ARG001 - shares do not depend on it
    shares = _shares(found)
    if not shares:
        return ""
    useful = sum(1 for value in itertools.accumulate(shares) if value < 99) + 1
    return (
        f"Share of the low-rank variance by principal direction: the first of {len(shares)} holds {shares[0]:.3g} %, "
        f"the first {useful} hold 99 %; the effective rank is {found.effective_rank:.1f}."
    )


def _shares(found: Profile) -> list[float]:
    """Per cent of the low-rank variance along each direction; directions that hold nothing are left out."""
    total = math.fsum(found.spectrum)
    return [100 * value / total for value in found.spectrum if value > 1e-12 * found.spectrum[0]] if total > 0 else []


def _fitting(count: int) -> tuple[float, float]:
    """(width of a line, size of a marker) in points, so that so many stand beside each other."""
    return max(0.6, min(4.0, 240 / max(1, count))), max(1.2, min(4.0, 240 / max(1, count)))


def _logarithmic(panel: Any, values: Sequence[float]) -> None:
    """A logarithmic axis with room around the values, a decade at least, and labels within a decade where it is short."""
    from matplotlib.ticker import LogLocator, NullFormatter

    positive = [value for value in values if value > 0] or [1.0]
    low, high = min(positive), max(positive)
    panel.set_yscale("log")
    spread = max(1.25, math.sqrt(10 / (high / low)) if high / low < 10 else 1.25)
    panel.set_ylim(low / spread, high * spread)
    if high / low < 300:
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    panel.yaxis.set_minor_formatter(NullFormatter())


def _in_per_cent(panel: Any, factor: float = 1.0) -> None:
    """Labels of the y axis as per cent of `factor` times its values."""
    panel.yaxis.set_major_formatter(
        lambda value, _: f"{factor * value:.3g} %" if factor * value < 1000 else f"{factor * value:,.0f} %"
    )


def _mark_blocks(panel: Any, names: Sequence[str], starts: Sequence[int], length: int) -> None:
    """Name as many blocks on the x axis as there is room for."""
    chosen: list[int] = []
    for i, start in enumerate(starts):
        if not chosen or start - starts[chosen[-1]] >= length / 26:
            chosen.append(i)
    labels = [_short_path(names[i]) for i in chosen]
    panel.set_xticks([starts[i] for i in chosen], labels=labels, rotation=50, ha="right", rotation_mode="anchor", fontsize=6.5)
    panel.set_xlim(-0.7, length - 0.3)


def _short_path(path: str, longest: int = 24) -> str:
    """A module's path with its words cut to three letters, from the left, as far as it is too long."""
    parts = path.split(".")
    for i, part in enumerate(parts):
        if len(".".join(parts)) > longest:
            parts[i] = part[:3]
    text = ".".join(parts)
    return text if len(text) <= longest else f"...{text[-longest + 3 :]}"


def _legend(panel: Any, title: str) -> None:
    """A heading, the legend in one line below it and above the panel, where it covers nothing."""
    panel.tick_params(axis="y", labelsize=7.5)
    handles, labels = panel.get_legend_handles_labels()
    options = {"loc": "lower center", "bbox_to_anchor": (0.5, 0.99), "ncols": len(handles), "columnspacing": 1.2}
    panel.legend(handles, labels, frameon=False, fontsize=7, handlelength=1.8, borderaxespad=0.2, **options)
    panel.set_title(title, fontsize=9, pad=19)
    _tidy(panel)
