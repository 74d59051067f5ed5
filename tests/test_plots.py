"""Figures are written, without pyplot, and a missing matplotlib says what to install."""

import sys

import pytest
import torch
from priors_for_tests import random_prior

from prior_hub import PriorModel, ScaleChoice, ScaleTrial, plots
from prior_hub.inference.metrics import reliability_bins
from prior_hub.plots import (
    _apart,
    _coloured,
    _picture,
    card_pictures,
    plot_average,
    plot_comparison,
    plot_prior,
    plot_reliability,
    plot_scale,
    plot_segmentation,
    plot_trace,
)

PNG = b"\x89PNG"


def rows(methods=("plain", "prior"), numbers=(10, 50), seeds=3):
    return [
        {"method": m, "n": n, "seed": s, "accuracy": 0.5 + 0.01 * s, "nll": 1.0 / (1 + s)}
        for m in methods
        for n in numbers
        for s in range(seeds)
    ]


@pytest.mark.parametrize("names", [6, 2])
def test_a_legend_of_long_names_stays_inside_the_picture(tmp_path, figures, names):
    methods = [f"a method with a rather long name, number {k}" for k in range(names)]
    plot_comparison(rows(methods), tmp_path / "c.png")
    plot_average([{**row, "samples": row["n"]} for row in rows(methods)], tmp_path / "a.png")
    images, labels, predictions, entropy, information = masks(1)
    classes = ["a class with quite a long name"] * 4
    plot_segmentation(images, labels, predictions, entropy, information, tmp_path / "s.png", class_names=classes)
    for figure in figures:
        extent = figure.legends[0].get_window_extent()
        assert extent.x0 >= 0
        assert extent.x1 <= figure.bbox.width
    assert len(figures[0].legends[0].get_texts()) == names  # every one of them, once


def test_nll_is_drawn_from_zero_unless_that_would_hide_the_differences(tmp_path, figures):
    near = [{**row, "nll": 2.0 + 0.1 * row["seed"]} for row in rows()]
    for some in (rows(), near):
        plot_comparison(some, tmp_path / "c.png")
    bottoms = [figure.axes[1].get_ylim()[0] for figure in figures]
    assert bottoms[0] == 0
    assert 1.9 < bottoms[1] < 2.0


def prior(rank=3, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    shapes = {"net.conv1.weight": (4, 2), "net.layer1.0.weight": (3,), "net.layer2.0.weight": (5,)}
    mean = {name: torch.zeros(shape) for name, shape in shapes.items()}
    deviations = {name: torch.randn(rank, *shape, generator=generator) for name, shape in shapes.items()}
    return PriorModel.from_tensors(
        mean, {n: torch.ones_like(t) for n, t in mean.items()}, deviations if rank else None, scale=scale
    )


@pytest.mark.parametrize(("numbers", "seeds"), [((10, 50), 3), ((10,), 1)])
def test_a_comparison_is_written(tmp_path, numbers, seeds):
    path = plot_comparison(rows(numbers=numbers, seeds=seeds), tmp_path / "new" / "figure.png", title="digits", chance=0.2)
    assert path.read_bytes()[:4] == PNG


def test_methods_may_have_different_numbers_of_rows(tmp_path):
    some = [*rows()[:-1], {"method": "third", "n": 10, "accuracy": 0.1, "nll": 2.0}]
    assert plot_comparison(some, tmp_path / "figure.svg").read_text().startswith("<?xml")


def test_scales_are_drawn_with_the_chosen_one_marked(tmp_path):
    heads = tuple(ScaleTrial(0.1, head, 2.0 + head) for head in (0.01, 1.0))
    path = tuple(ScaleTrial(10.0**k, 0.01, 2.0 - 0.1 * k if k < 3 else float("inf")) for k in range(-1, 4))
    checks = (ScaleTrial(100.0, 0.01, 1.85), ScaleTrial(10.0, 0.01, float("inf")), ScaleTrial(1.0, 0.01, 1e9))
    choice = ScaleChoice(100.0, 0.01, heads + path, 20, 80, "path", 70, checks=checks)
    written = plot_scale(choice, tmp_path / "scale.svg", measured={1.0: 2.2, 100.0: 1.9}, title="CIFAR")
    text = written.read_text()
    assert "chosen: 100" in text.replace("<!-- ", "").replace(" -->", "")
    assert "whole trainings" in text
    assert "beyond the picture" in text
    assert "1e9" not in text  # nor does the axis go there
    grid = ScaleChoice(1.0, 0.1, tuple(ScaleTrial(s, h, 1.0) for s in (1.0, 2.0) for h in (0.1, 0.2)), 20, 80, "grid", 8)
    assert plot_scale(grid, tmp_path / "grid.png").read_bytes()[:4] == PNG
    with pytest.raises(ValueError, match="nothing to plot"):
        plot_scale(ScaleChoice(1.0, None, (ScaleTrial(1.0, None, float("inf")),), 1, 4, "path", 1), tmp_path / "x.png")


def test_nothing_to_compare_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no rows"):
        plot_comparison([], tmp_path / "figure.png")


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_a_prior_is_drawn_at_every_rank(tmp_path, rank):
    assert plot_prior(prior(rank), tmp_path / "prior.png").read_bytes()[:4] == PNG


# ------------------------------------------------------------------------------------------------- pictures of a prior


def bars(panel):
    """The first lines of a panel that are many: [(x, low, high), ...]."""
    return [(float(s[0][0]), *sorted(map(float, s[:, 1]))) for s in panel.collections[0].get_segments()]


def test_the_picture_of_the_variance_holds_the_quantiles_of_each_tensor(tmp_path, figures):
    p = prior(3, 4.0)
    plot_prior(p, tmp_path / "v.png", what="variance")
    (panel,) = figures[0].axes
    drawn = dict(lines(panel)["median weight"])
    assert len(drawn) == 3
    for x, (name, variance) in enumerate(p.gaussian.marginal_variance().items()):
        low, middle, high = variance.sqrt().quantile(torch.tensor([0.05, 0.5, 0.95]), interpolation="nearest").tolist()
        assert drawn[x] == pytest.approx(middle, rel=2e-3), name
        assert bars(panel)[x] == (x, pytest.approx(low, rel=2e-3), pytest.approx(high, rel=2e-3))
    assert (panel.get_yscale(), panel.get_ylim()[0] < min(bars(panel))[1]) == ("log", True)
    assert [t.get_text() for t in panel.get_xticklabels()] == ["conv1", "layer1", "layer2"]
    assert "rank 3, scale 4" in figures[0].get_suptitle()


def test_the_picture_of_the_spectrum_holds_the_shares_of_the_dense_low_rank_part(tmp_path, figures):
    p = prior(3, 7.0)
    plot_prior(p, tmp_path / "s.png", what="spectrum")
    (panel,) = figures[0].axes
    d = torch.cat([rows.reshape(3, -1).double() for rows in p.deviations.values()], dim=1)  # (K, P)
    values = torch.linalg.eigvalsh(d.T @ d).flip(0)[:3]
    shares = (100 * values / values.sum()).tolist()
    assert [y for _, y in lines(panel)["alone"]] == pytest.approx(shares, rel=1e-9)
    assert [y for _, y in lines(panel)["with those before"]] == pytest.approx([shares[0], sum(shares[:2]), 100], rel=1e-9)
    assert [x for x, _ in lines(panel)["alone"]] == [1, 2, 3]
    assert lines(panel)["if all were equal (33.3 %)"][0][1] == pytest.approx(100 / 3)
    assert f"effective rank {p.diagnose().effective_rank:.1f} of 3" in panel.get_title()


@pytest.mark.parametrize("name", ["..png", ".png", "a.b/x", "x.", "x.png.bak"])
def test_a_file_whose_ending_names_no_picture_is_refused_and_not_written_under_another_name(tmp_path, name):
    with pytest.raises(ValueError, match="names no kind of picture"):
        plot_prior(prior(3), tmp_path / name)
    assert not list(tmp_path.iterdir())
    assert plot_prior(prior(3), tmp_path / "x.PNG").read_bytes()[:4] == PNG


def test_a_direction_that_centred_deviations_cannot_have_is_neither_drawn_nor_counted(tmp_path, figures):
    p = prior(3)
    centred = {name: rows - rows.mean(0) for name, rows in p.deviations.items()}  # as SWAG's are: K rows, K - 1 directions
    plot_prior(PriorModel.from_tensors(p.mean, p.variance, centred), tmp_path / "s.png", what="spectrum")
    (panel,) = figures[0].axes
    assert len(lines(panel)["alone"]) == 2
    assert " of 2" in panel.get_title()


def test_the_picture_of_the_freedom_holds_deviation_over_size_by_block(tmp_path, figures):
    p = prior(3, 4.0)
    mean = {name: torch.full_like(t, 0.5 * (i + 1)) for i, (name, t) in enumerate(p.mean.items())}
    mean["net.layer2.0.weight"].zero_()
    moved = PriorModel.from_tensors(mean, p.variance, p.deviations, scale=4.0)
    plot_prior(moved, tmp_path / "f.png", what="freedom")
    (panel,) = figures[0].axes
    drawn = lines(panel)
    g = moved.gaussian
    for x, name in enumerate(list(mean)[:2]):
        diagonal = g.scale * g.diagonal_weight * moved.variance[name].double().mean()
        both = g.marginal_variance()[name].double().mean()
        for label, value in (("together", both), ("diagonal alone", diagonal), ("low-rank part alone", both - diagonal)):
            assert drawn[label][x] == (x, pytest.approx(float(value.sqrt()) / (0.5 * (x + 1)), rel=1e-5)), label
    assert len(drawn["together"]) == 2
    assert "1 with a mean or variance of zero left out" in panel.get_xlabel()
    assert [t.get_text() for t in panel.get_xticklabels()] == ["conv1", "layer1"]
    plot_prior(moved.truncated(0), tmp_path / "d.png", what="freedom")
    assert list(lines(figures[1].axes[0])) == ["together", "as large as the weights"]


def test_all_of_a_prior_is_its_three_pictures(tmp_path, figures):
    plot_prior(prior(3), tmp_path / "all.png", title="mine")
    for what in ("variance", "freedom", "spectrum"):
        plot_prior(prior(3), tmp_path / "one.png", what=what)
    together, *single = figures
    assert [lines(panel) for panel in together.axes] == [lines(figure.axes[0]) for figure in single]
    assert together.get_suptitle().startswith("mine\n16 values, rank 3")
    with pytest.raises(ValueError, match="expected one of 'all', 'variance', 'spectrum', 'freedom'"):
        plot_prior(prior(3), tmp_path / "x.png", what="covariance")
    with pytest.raises(ValueError, match="no low-rank part"):
        plot_prior(prior(0), tmp_path / "x.png", what="spectrum")


def test_card_pictures_are_small_and_their_texts_have_the_numbers(tmp_path):
    shapes = {f"model.layers.{i}.{part}.weight": (3, 2) for i in range(300) for part in ("q", "k", "v", "norm")}
    deep = random_prior(0, 4, shapes, buffers=False)
    texts = card_pictures(deep, tmp_path / "new")
    assert list(texts) == ["prior_variance.png", "prior_freedom.png", "prior_spectrum.png"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted(texts)
    for name in texts:
        data = (tmp_path / "new" / name).read_bytes()
        assert data[:4] == PNG
        assert len(data) < 150_000
    found = deep.diagnose()
    assert f"the first of 4 holds {100 * found.spectrum[0] / sum(found.spectrum):.3g} %" in texts["prior_spectrum.png"]
    assert f"effective rank is {found.effective_rank:.1f}." in texts["prior_spectrum.png"]
    assert f"at scale {deep.scale:g}" in texts["prior_freedom.png"]
    assert all(text.endswith(".") and "\n" not in text for text in texts.values())


def test_card_pictures_of_a_diagonal_prior_are_two(tmp_path):
    one = PriorModel.from_tensors({"linear.weight": torch.full((4,), 2.0)}, {"linear.weight": torch.full((4,), 0.01)})
    assert card_pictures(one, tmp_path) == {
        "prior_variance.png": "Standard deviation of the weights under the prior by parameter tensor, at scale 1: the median "
        "is 0.1 in linear.weight.",
        "prior_freedom.png": "Standard deviation of the weights under the prior in relation to their size, by block of the "
        "network, at scale 1: 5 % in weight.",
    }


def test_long_paths_keep_their_numbers():
    assert plots._short_path("encoder.layer.10") == "encoder.layer.10"
    assert plots._short_path("encoder.stages.0.layers.10.layer.2") == "enc.sta.0.lay.10.layer.2"
    assert plots._short_path("x" * 40) == "xxx"


def test_missing_matplotlib_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "prior-hub\[plots\]"'):
        plot_comparison(rows(), tmp_path / "figure.png")
    with pytest.raises(ImportError, match=r'pip install "prior-hub\[plots\]"'):
        plot_prior(prior(), tmp_path / "prior.png")
    with pytest.raises(ImportError, match=r'pip install "prior-hub\[plots\]"'):
        card_pictures(prior(), tmp_path / "card")
    assert not (tmp_path / "card").exists()


def test_drawing_leaves_pyplot_alone(tmp_path):
    before = "matplotlib.pyplot" in sys.modules
    plot_comparison(rows(), tmp_path / "figure.png")
    assert ("matplotlib.pyplot" in sys.modules) == before


# ---------------------------------------------------------------------------------- calibration, averages, chains, masks


@pytest.fixture
def figures(monkeypatch):
    """Figures that were saved, to look into; they are still written."""
    kept = []
    save = plots._save

    def keep(figure, path):
        kept.append(figure)
        return save(figure, path)

    monkeypatch.setattr(plots, "_save", keep)
    return kept


def lines(panel):
    """Labelled lines: {label: [(x, y), ...]}."""
    return {li.get_label(): [tuple(map(float, p)) for p in li.get_xydata()] for li in panel.lines if li.get_label()[0] != "_"}


def classified(n=3000, temperature=1.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = 1.5 * torch.randn(n, 5, generator=g)
    return (logits / temperature).softmax(1), torch.multinomial(logits.softmax(1), 1, generator=g).squeeze(1)


def test_a_reliability_diagram_shows_the_bins_of_each_method(tmp_path, figures):
    p, y = classified(temperature=0.4)
    adaptive = reliability_bins(*classified(), bins=8, adaptive=True)
    path = plot_reliability({"single": (p, y), "average": adaptive}, tmp_path / "new" / "r.png", bins=10, title="digits")
    assert path.read_bytes()[:4] == PNG
    top, below = figures[0].axes
    bins = reliability_bins(p, y, bins=10)
    assert lines(top) == {
        f"{name}: ECE {100 * b.expected_calibration_error:.1f} %": [
            (c, a) for c, a, n in zip(b.confidence, b.accuracy, b.count, strict=True) if n
        ]
        for name, b in (("single", bins), ("average", adaptive))
    }
    shares = [stairs.get_data().values.sum() for stairs in below.patches]
    assert shares == pytest.approx([100.0, 100.0])
    lowest = min(min(c for c, n in zip(b.confidence, b.count, strict=True) if n) for b in (bins, adaptive))
    assert lowest - 0.1 < top.get_xlim()[0] <= lowest


def test_averages_are_drawn_against_their_number_of_samples(tmp_path, figures):
    some = [{"samples": s, "accuracy": 0.5 + 0.01 * s, "nll": 1 / s} for s in (1, 2, 10)]
    assert plot_average(some, tmp_path / "a.png").read_bytes()[:4] == PNG
    left, right = figures[0].axes
    (drawn,) = [c.lines[0].get_xydata().tolist() for c in right.containers]
    assert drawn == [[s["samples"], pytest.approx(s["nll"])] for s in some]
    (drawn,) = [c.lines[0].get_xydata().tolist() for c in left.containers]
    assert drawn == [[s["samples"], pytest.approx(100 * s["accuracy"])] for s in some]
    several = [{**row, "method": m, "nll": row["nll"] + k} for row in some for m in ("one chain", "four") for k in (0, 1)]
    plot_average(several, tmp_path / "b.svg", title="digits")
    assert figures[1].get_suptitle().startswith("digits (mean of 2 runs")
    assert [t.get_text() for t in figures[1].legends[0].get_texts()] == ["one chain", "four"]
    with pytest.raises(ValueError, match="no rows"):
        plot_average([], tmp_path / "a.png")


def test_labels_of_many_numbers_keep_apart():
    assert _apart([1, 2, 5, 10, 20, 50]) == [1, 2, 5, 10, 20, 50]
    assert len(_apart(range(1, 1001))) <= 15
    assert _apart([7]) == [7]


@pytest.mark.parametrize("chains", [1, 3])
def test_traces_are_the_values_one_line_per_chain(tmp_path, figures, chains):
    values = torch.randn(chains, 20, 2, generator=torch.Generator().manual_seed(0))
    nll = values.square().sum(2)
    plot_trace(values, tmp_path / "t.png", nll=nll, log_posterior=-nll, names=["a", "b"], title="chains")
    panels = figures[0].axes
    assert [panel.get_title(loc="left") for panel in panels] == ["log posterior [nats]", "NLL [nats]", "a", "b"]
    for panel, expected in zip(panels, (-nll, nll, values[:, :, 0], values[:, :, 1]), strict=True):
        assert [[y for _, y in line] for line in lines(panel).values()] == [pytest.approx(e) for e in expected.tolist()]
    assert bool(figures[0].legends) == (chains > 1)
    assert plot_trace(values[:, :, 0], tmp_path / "one.png").read_bytes()[:4] == PNG


def test_only_the_first_functions_of_many_are_drawn_and_it_says_so(tmp_path, figures):
    plot_trace(torch.zeros(2, 5, 30), tmp_path / "t.png")
    assert len(figures[0].axes) == 8
    assert figures[0].get_suptitle() == "(the first 8 of 30 functions)"


def masks(rows=2, height=6, width=9):
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (rows, height, width), generator=g)
    labels[:, 0] = 255
    entropy = torch.rand(rows, height, width, generator=g)
    return torch.randn(rows, 3, height, width, generator=g), labels, labels.clamp_max(3), entropy, 0.2 * entropy


@pytest.mark.parametrize(("rows", "names"), [(1, None), (3, ["sky", "sea", "ship", "shore"])])
def test_segmentations_are_rows_of_five_pictures_on_common_scales(tmp_path, figures, rows, names):
    images, labels, predictions, entropy, information = masks(rows)
    path = tmp_path / "s.png"
    assert plot_segmentation(images, labels, predictions, entropy, information, path, class_names=names) == path
    assert path.read_bytes()[:4] == PNG
    shown = [panel.images[0] for panel in figures[0].axes if panel.images]
    assert len(shown) == 5 * rows
    for column, tensor in ((3, entropy), (4, information)):
        assert {image.get_clim() for image in shown[column::5]} == {(0.0, float(tensor.max()))}
        for image, expected in zip(shown[column::5], tensor, strict=True):
            assert torch.equal(torch.as_tensor(image.get_array()), expected.double())
    for row in range(rows):  # where the prediction is right, it has the colour of the truth
        truth, guess = (torch.as_tensor(shown[5 * row + i].get_array()) for i in (1, 2))
        assert torch.equal(truth[1:], guess[1:])
        assert not torch.equal(truth[0], guess[0])
    assert [t.get_text() for legend in figures[0].legends for t in legend.get_texts()] == (names or [])


def test_classes_have_colours_of_their_own_and_ignored_pixels_grey():
    classes = torch.arange(40).view(4, 10)
    colours = _coloured(classes, 255)
    assert len({tuple(c) for c in colours.view(-1, 3).tolist()}) == 40
    assert 0 <= float(colours.min()) <= float(colours.max()) <= 1
    assert torch.equal(_coloured(classes.flip(0), 255), colours.flip(0))
    grey = _coloured(torch.tensor([[255, -100, 3]]), 255)[0]
    assert torch.equal(grey[0], grey[1])
    assert grey[0].unique().numel() == 1
    assert torch.equal(grey[2], colours[0, 3])


def test_pictures_are_brought_to_zero_to_one():
    unit = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(_picture(unit), unit.double().movedim(0, -1))
    assert torch.allclose(_picture(255 * unit), _picture(unit))
    normalised = _picture((unit - 0.5) / 0.2)
    assert (float(normalised.min()), float(normalised.max())) == (0.0, 1.0)
    assert _picture(unit[:1]).shape == (4, 5, 3)


def test_wrong_shapes_are_refused_with_what_was_found(tmp_path):
    images, labels, predictions, entropy, information = masks()
    path = tmp_path / "x.png"
    with pytest.raises(ValueError, match=r"images have shape \(2, 6, 9\)"):
        plot_segmentation(labels, labels, predictions, entropy, information, path)
    with pytest.raises(ValueError, match=r"entropy have shape \(2, 6, 8\), expected \(2, 6, 9\)"):
        plot_segmentation(images, labels, predictions, entropy[..., 1:], information, path)
    with pytest.raises(ValueError, match=r"expected \(chains, draws, functions\)"):
        plot_trace(torch.zeros(3), path)
    with pytest.raises(ValueError, match="1 names for 2 functions"):
        plot_trace(torch.zeros(2, 3, 2), path, names=["a"])
    with pytest.raises(ValueError, match=r"NLL \[nats\] has shape \(3,\), expected \(2, 3\)"):
        plot_trace(torch.zeros(2, 3, 2), path, nll=torch.zeros(3))
    with pytest.raises(ValueError, match="no methods"):
        plot_reliability({}, path)
    assert not path.exists()
