"""Figures are written, without pyplot, and a missing matplotlib says what to install."""

import sys

import pytest
import torch

from prior_hub import PriorModel
from prior_hub.plots import _label_blocks, _singular_values, plot_comparison, plot_prior

PNG = b"\x89PNG"


def rows(methods=("plain", "prior"), numbers=(10, 50), seeds=3):
    return [
        {"method": m, "n": n, "seed": s, "accuracy": 0.5 + 0.01 * s, "nll": 1.0 / (1 + s)}
        for m in methods
        for n in numbers
        for s in range(seeds)
    ]


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


def test_nothing_to_compare_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no rows"):
        plot_comparison([], tmp_path / "figure.png")


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_a_prior_is_drawn_at_every_rank(tmp_path, rank):
    assert plot_prior(prior(rank), tmp_path / "prior.png").read_bytes()[:4] == PNG


@pytest.mark.parametrize(("rank", "scale"), [(2, 1.0), (3, 7.0)])
def test_singular_values_are_those_of_the_dense_low_rank_part(rank, scale):
    p = prior(rank, scale)
    d = torch.cat([rows.reshape(rank, -1).double() for rows in p.deviations.values()], dim=1)  # (K, P)
    dense = torch.linalg.eigvalsh(scale * p.gaussian.low_rank_weight * d.T @ d).flip(0)[:rank].sqrt()
    assert _singular_values(p) == pytest.approx(dense.tolist(), rel=1e-9)


def test_labels_name_the_blocks_without_the_prefix_they_share():
    class Panel:
        def set_xticks(self, ticks, labels, **_):
            self.found = dict(zip(ticks, labels, strict=True))

    panel = Panel()
    _label_blocks(panel, list(prior().mean))
    assert panel.found == {0: "conv1", 1: "layer1.0", 2: "layer2.0"}
    _label_blocks(panel, ["weight"])
    assert panel.found == {0: "weight"}


def test_missing_matplotlib_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "prior-hub\[plots\]"'):
        plot_comparison(rows(), tmp_path / "figure.png")
    with pytest.raises(ImportError, match=r'pip install "prior-hub\[plots\]"'):
        plot_prior(prior(), tmp_path / "prior.png")


def test_drawing_leaves_pyplot_alone(tmp_path):
    before = "matplotlib.pyplot" in sys.modules
    plot_comparison(rows(), tmp_path / "figure.png")
    assert ("matplotlib.pyplot" in sys.modules) == before
