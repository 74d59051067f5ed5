"""The picture of the README: a loss surface over two weights, three times: python docs/figure.py writes docs/idea.png.

Everything in it is computed. A classifier of two weights (logistic regression) learns a source task of 400 examples whose two
inputs are nearly equal, so that the sum of the weights is well determined and their difference is not. A Langevin chain
(`SGLD`) walks through its posterior, `SwagEstimator` makes a prior of the walk. The target task has 12 examples; its true
weights differ from the source's along the direction that the source task left open, which is the case a learned prior is made
for. Drawn, in nats per example: the target's mean negative log-likelihood, and that plus penalty / N under an isotropic prior
of the same mean and total variance, and under the learned one. Tasks, seed and scale were chosen so that the three differ
visibly: it shows the idea, and is no evidence that learned priors help (README, "What to expect").
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from prior_hub import SGLD, PriorModel, SwagEstimator

HERE = Path(__file__).resolve().parent
SOURCE_WEIGHTS, TARGET_WEIGHTS = (2.0, 2.0), (3.4, 0.6)
SOURCE_EXAMPLES, TARGET_EXAMPLES = 400, 12
SCALE = 4.0  # chosen for the picture
NAME = "weight"


@dataclass(frozen=True)
class Idea:
    """What is drawn: the target's examples x (N, 2) with labels y (N,), and the two priors over `weight` (1, 2)."""

    x: Tensor
    y: Tensor
    learned: PriorModel
    isotropic: PriorModel

    def loss(self, weights: Tensor, prior: PriorModel | None) -> Tensor:
        """Mean NLL per example plus the penalty over N, in nats: weights (..., 2) -> (...)."""
        nll = nn.functional.softplus(-(2 * self.y - 1) * (weights @ self.x.T)).mean(-1)
        if prior is None:
            return nll
        delta = weights - prior.mean[NAME].reshape(2)
        return nll + 0.5 * ((delta @ torch.linalg.inv(covariance(prior))) * delta).sum(-1) / len(self.x)

    def separable(self) -> bool:
        """Whether some weights classify every example rightly: the data alone have no minimum then."""
        angle = torch.arange(0, 2 * math.pi, 1e-3, dtype=torch.float64)
        directions = torch.stack([angle.cos(), angle.sin()], -1)
        return bool(((2 * self.y - 1) * (directions @ self.x.T) > 0).all(-1).any())

    def lowest(self, prior: PriorModel) -> Tensor:
        """The minimum of the loss under a prior, (2,), by Newton's method on the true gradient."""
        w = prior.mean[NAME].reshape(2).clone()
        inverse = torch.linalg.inv(covariance(prior))
        for _ in range(50):
            p = torch.sigmoid(self.x @ w)
            gradient = self.x.T @ (p - self.y) + inverse @ (w - prior.mean[NAME].reshape(2))
            w = w - torch.linalg.solve(self.x.T @ ((p * (1 - p))[:, None] * self.x) + inverse, gradient)
        return w


def covariance(prior: PriorModel) -> Tensor:
    """Sigma of a prior over two weights, (2, 2)."""
    g = prior.gaussian
    rows = g.deviations[NAME].reshape(-1, 2) if g.rank else torch.zeros(0, 2, dtype=torch.float64)
    diagonal = g.diagonal_weight * torch.diag(g.variance[NAME].reshape(2))
    return g.scale * (diagonal + g.low_rank_weight * rows.T @ rows) + g.eps * torch.eye(2, dtype=torch.float64)


def make_idea() -> Idea:
    """Learn the prior on the source task; draw the target's examples."""
    random = torch.Generator().manual_seed(1)

    def examples(count: int, weights: tuple[float, float], spread: float) -> tuple[Tensor, Tensor]:
        common, apart = torch.randn(2, count, 1, generator=random, dtype=torch.float64)
        x = torch.cat([common + spread * apart, common - spread * apart], 1)
        chance = torch.sigmoid(x @ torch.tensor(weights, dtype=torch.float64))
        return x, (torch.rand(count, generator=random, dtype=torch.float64) < chance).double()

    x, y = examples(SOURCE_EXAMPLES, SOURCE_WEIGHTS, spread=0.12)
    model = nn.Linear(2, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([SOURCE_WEIGHTS]))
    estimator = SwagEstimator(rank=20, head=(), dtype=torch.float64)
    chain = SGLD(model.parameters(), lr=0.5, num_data=len(x), seed=0)
    for step in range(4000):
        chain.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(model(x)[:, 0], y).backward()
        chain.step()
        if step >= 1000 and step % 50 == 0:
            estimator.update(model)
    learned = estimator.prior(scale=SCALE)
    total = float(covariance(learned).trace())
    isotropic = PriorModel.from_tensors(learned.mean, {NAME: torch.full((1, 2), total / 2, dtype=torch.float64)})
    return Idea(*examples(TARGET_EXAMPLES, TARGET_WEIGHTS, spread=1.0), learned, isotropic)


def draw(idea: Idea, path: Path) -> None:
    """Three panels of contours, one scale of colours."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Ellipse

    axis = torch.linspace(-0.5, 5.0, 111, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)
    priors = (None, idea.isotropic, idea.learned)
    titles = ("the data alone", "with an isotropic prior", "with the learned low-rank prior")
    figure = Figure(figsize=(10.5, 3.9), layout="constrained", facecolor="white")
    panels = figure.subplots(1, 3, sharex=True, sharey=True)
    levels = [0.1 * 1.25**i for i in range(18)]
    for panel, prior, title in zip(panels, priors, titles, strict=True):
        values = idea.loss(grid, prior)
        shown = panel.contourf(
            axis, axis, values.clamp(min=levels[0], max=levels[-1]), levels=levels, cmap="Blues_r", norm="log"
        )
        panel.contour(axis, axis, values, levels=levels, colors="white", linewidths=0.4)
        mean = idea.learned.mean[NAME].reshape(2)
        panel.plot(*mean, "o", color="black", markersize=5, label="mean of the source task")
        panel.plot(
            *TARGET_WEIGHTS, "*", color="#D55E00", markersize=13, markeredgecolor="white", label="true weights of the target"
        )
        if prior is not None:
            variances, directions = torch.linalg.eigh(covariance(prior))
            angle = math.degrees(math.atan2(float(directions[1, 1]), float(directions[0, 1])))
            width, height = (2 * float(v) ** 0.5 for v in (variances[1], variances[0]))
            ellipse = Ellipse(tuple(map(float, mean)), width, height, angle=angle, fill=False, color="black", linestyle="--")
            panel.add_patch(ellipse)
            panel.plot([], [], "--", color="black", label="prior, one standard deviation")
            panel.plot(*idea.lowest(prior), "X", color="#009E73", markersize=9, markeredgecolor="white", label="minimum")
        else:
            if idea.separable():
                panel.text(0.1, 4.35, "no minimum: the loss\nfalls for ever to the right", fontsize=9)
        panel.set(title=title, xlabel="first weight", aspect="equal", xlim=(-0.5, 5.0), ylim=(-0.5, 5.0))
    panels[0].set_ylabel("second weight")
    figure.colorbar(shown, ax=panels, label="loss, nats per example", ticks=[0.1, 0.3, 1, 3], format="%g")
    handles, labels = panels[2].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(path, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    idea = make_idea()
    print("mean", idea.learned.mean[NAME].tolist(), "Sigma", covariance(idea.learned).tolist())
    for name in ("isotropic", "learned"):
        print(name, "minimum", idea.lowest(getattr(idea, name)).tolist())
    draw(idea, HERE / "idea.png")
