"""A study: the learned prior together with a pull to zero, as weight decay beside it would be.

    python benchmarks/transfer/with_decay.py benchmarks/transfer/cifar.toml --seed 0 --variance 0.02 --scale 3e4

The prior becomes the product N(mean, scale Sigma) N(0, variance I), normalised, which is a Gaussian of the same form,

    Sigma' = (Sigma^-1 + I / variance)^-1        mean' = mean - Sigma' mean / variance

so that weights which the source task left free go towards zero and the others stay at the mean. Prints the scores on the
held-out fifth of the seed's n images, of a fine-tuning like every other cell's (cells.py); no test image is looked at.
A scale of 1e9 leaves the zero-mean prior alone.
"""

from __future__ import annotations

import time
import tomllib

import cells
import torch

from prior_hub import PriorModel


def with_decay(prior: PriorModel, variance: float) -> PriorModel:
    """The normalised product with N(0, variance I), in float64; scale 1, its own weights."""
    names, config = list(prior.mean), prior.config
    mean, spread = (torch.cat([t[n].flatten() for n in names]).double() for t in (prior.mean, prior.variance))
    diagonal = config.scale * config.diagonal_weight * spread + config.eps
    rows = torch.cat([prior.deviations[n].reshape(prior.rank, -1) for n in names], 1).double()
    low_rank = (config.scale * config.low_rank_weight) ** 0.5 * rows.T  # Sigma = diagonal + low_rank low_rank^T
    identity = torch.eye(prior.rank, dtype=torch.float64)
    scaled = low_rank / diagonal[:, None]
    factor = torch.linalg.cholesky(identity + low_rank.T @ scaled)
    taken = torch.linalg.solve_triangular(factor, scaled.T, upper=False).T  # Sigma^-1 = 1 / diagonal - taken taken^T
    precision = 1 / diagonal + 1 / variance
    inner = identity - taken.T @ (taken / precision[:, None])
    new_rows = (taken / precision[:, None]) @ torch.linalg.cholesky(torch.linalg.inv(inner))
    new_mean = mean - (mean / precision + new_rows @ (new_rows.T @ mean)) / variance

    def apart(flat: torch.Tensor) -> dict[str, torch.Tensor]:
        pieces = flat.split([prior.mean[n].numel() for n in names], dim=-1)
        return {n: p.reshape((*p.shape[:-1], *prior.mean[n].shape)).float() for n, p in zip(names, pieces, strict=True)}

    parts = apart(new_mean), apart(1 / precision), apart(new_rows.T)
    head = prior.config.head_parameters
    return PriorModel.from_tensors(*parts, diagonal_weight=1.0, low_rank_weight=1.0, head_parameters=head)


def main() -> None:
    """One cell."""
    parser = cells.study_arguments(__doc__)
    parser.add_argument("--scale", type=float, default=3e4, help="of the learned prior (default: %(default)s)")
    parser.add_argument("--variance", type=float, default=0.02, help="of the zero-mean one (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=0.02)
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = tomllib.loads(options.config.read_text())
    task = cells.TASKS[config["task"]](config, options.work / options.config.stem)
    cells.METHODS["with decay"] = lambda prior, scale: (with_decay(prior.rescaled(scale), options.variance), {})
    began = time.perf_counter()
    cell = cells.Cell(config["task"], "tune", "with decay", options.n, options.seed, options.scale, options.learning_rate)
    row = cells.run_cell(cell, config, task)
    print(f"accuracy {row['accuracy']}, NLL {row['nll']}, ECE {row['ece']}, {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
