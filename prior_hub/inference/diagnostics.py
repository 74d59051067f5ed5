"""Whether posterior samples may be trusted: R-hat and effective sample size of function values, and how much samples differ.

Weights of a network cannot be compared between chains (permute two units and nothing changes), its function values can. Take
some dozens of them, logits or log-probabilities at fixed inputs, or the NLL of a fixed set.

    R-hat   spread between chains against spread within them: 1 where chains tell the same story. Rank-normalised and split,
            the larger of that for location and that for spread (Vehtari et al. 2021, arXiv 1903.08008, eq. 4 and section 4.2)
    ESS     bulk effective sample size: as many independent draws would give means as precise (there, section 4.3)
    total variation of two predictions  1/2 sum_c |p[c] - q[c]|, 0 to 1

R-hat and ESS are ArviZ's (`pip install prior-hub[metrics]`).
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from prior_hub.errors import PriorNumericsError, PriorWarning

__all__ = ["ChainDiagnostics", "Disagreement", "chain_diagnostics", "disagreement", "warn_without_variability"]

_R_HAT = 1.01  # Vehtari et al. 2021, section 4.2
_ESS_PER_CHAIN = 100  # there, section 4.3: 400 for four chains
_MOST_VALUES = 2**22  # of all samples, that are sorted at once


@dataclass(frozen=True)
class ChainDiagnostics:
    """What `chain_diagnostics` found; print it.

    Attributes:
        num_chains: chains.
        num_draws: draws of each.
        num_functions: functions looked at.
        num_constant: those of them that never change, which the numbers below leave out.
        r_hat_max: largest R-hat; infinite where chains stand still at different values, NaN where every function is constant.
        r_hat_median: median R-hat.
        share_above: share of functions whose R-hat exceeds 1.01.
        ess_min: smallest bulk effective sample size, of num_chains x num_draws.
        ess_median: median of them.
        remarks: what is wrong and what to do; empty for healthy chains.
    """

    num_chains: int
    num_draws: int
    num_functions: int
    num_constant: int
    r_hat_max: float
    r_hat_median: float
    share_above: float
    ess_min: float
    ess_median: float
    remarks: tuple[str, ...]

    def __str__(self) -> str:
        """A few lines for a person."""
        chains = f"{self.num_chains} chain{'s' if self.num_chains > 1 else ''} x {self.num_draws} draws"
        constant = f" ({self.num_constant} of them constant)" if self.num_constant else ""
        lines = [
            f"{chains}, {self.num_functions} functions{constant}",
            f"R-hat at most {self.r_hat_max:.3f}, median {self.r_hat_median:.3f}; {100 * self.share_above:.0f} % > {_R_HAT}",
            f"effective sample size {self.ess_min:.0f} at least, median {self.ess_median:.0f}, "
            f"of {self.num_chains * self.num_draws} draws",
        ]
        return "\n".join([*lines, *(f"note: {remark}" for remark in self.remarks)])


@dataclass(frozen=True)
class Disagreement:
    """How much the predictions of posterior samples differ.

    Attributes:
        total_variation: mean over examples and pairs of samples of the total-variation distance, 0 to 1.
        argmax: share of examples and pairs whose most probable classes differ.
    """

    total_variation: float
    argmax: float


def chain_diagnostics(values: Tensor) -> ChainDiagnostics:
    """R-hat and bulk effective sample size of function values along chains.

    A single chain is cut in halves that stand for two: then R-hat says whether the chain wanders, not whether another one
    would go elsewhere. Takes about 3 ms a function: a few hundred are plenty.

    Args:
        values: (chains, draws, functions), or (chains, draws) of one function; draws in their order, without warm-up.

    Raises:
        ImportError: arviz-stats is missing.
        ValueError: another shape, or fewer than 4 draws (8 of a single chain).
        PriorNumericsError: NaN or infinities.
    """
    if values.ndim == 2:
        values = values.unsqueeze(2)
    if values.ndim != 3 or not values.shape[0] or not values.shape[2]:
        raise ValueError(f"values have shape {tuple(values.shape)}, expected (chains, draws, functions).")
    chains, draws, functions = values.shape
    if draws < (least := 8 if chains == 1 else 4):
        raise ValueError(f"{draws} draws a chain are too few: {least} or more are needed for {chains} chain(s).")
    bad = int((~values.isfinite()).sum())
    if bad:
        raise PriorNumericsError(
            f"{bad} of {values.numel()} function values are NaN or infinite: a chain diverged. Lower the learning rate."
        )
    try:
        from arviz_stats.base import array_stats
    except ImportError as error:
        raise ImportError('chain_diagnostics needs arviz-stats: pip install "prior-hub[metrics]"') from error
    moving = values.detach().cpu().double().numpy()
    moving = moving[:, :, (moving != moving[:1, :1]).any((0, 1))]
    half = draws // 2
    compared = moving if chains > 1 else np.concatenate([moving[:, :half], moving[:, -half:]])
    r_hat, ess = [math.nan], [math.nan]
    if moving.shape[2]:
        with np.errstate(divide="ignore", invalid="ignore"):  # chains that stand still at different values: infinite
            r_hat = array_stats.rhat(compared, chain_axis=0, draw_axis=1, method="rank").tolist()
            ess = array_stats.ess(moving, chain_axis=0, draw_axis=1, method="bulk").tolist()
    found = ChainDiagnostics(
        num_chains=chains,
        num_draws=draws,
        num_functions=functions,
        num_constant=functions - moving.shape[2],
        r_hat_max=max(r_hat),
        r_hat_median=median(r_hat),
        share_above=sum(r > _R_HAT for r in r_hat) / len(r_hat),
        ess_min=min(ess),
        ess_median=median(ess),
        remarks=(),
    )
    return replace(found, remarks=_remarks(found))


def _remarks(found: ChainDiagnostics) -> tuple[str, ...]:
    remarks = []
    if found.num_constant:
        remarks.append(
            f"{found.num_constant} of {found.num_functions} functions never change: the sampler does not move them "
            "(temperature 0, a learning rate decayed to nothing), or they do not depend on the sampled weights."
        )
    if found.share_above > 0:
        where = "chains sit in different places" if found.num_chains > 1 else "the chain still wanders"
        remarks.append(
            f"{100 * found.share_above:.0f} % of the functions have an R-hat above {_R_HAT}: {where}. Run longer and leave out "
            "more of the start. Networks have many modes that no chain leaves; then the samples are an ensemble, good for an "
            "average, but their spread is no posterior variance."
        )
    if found.ess_min < _ESS_PER_CHAIN * found.num_chains:
        remarks.append(
            f"an effective sample size of {found.ess_min:.0f} is below {_ESS_PER_CHAIN} a chain, less than R-hat and variances "
            "need. Draw more samples; further apart, they cost less memory for the same worth."
        )
    return tuple(remarks)


def disagreement(probabilities: Tensor) -> Disagreement:
    """How far the predictions of each two samples are apart, on average over pairs and examples.

    Exact, without looking at pairs: sorted along the samples, sum_{i<j} |p_i - p_j| = sum_k (2k - S - 1) p_(k), and votes
    are counted. Takes memory for a few million values besides its input.

    Args:
        probabilities: (S, B, C, ...), S samples' predictions of the same inputs, classes in dimension 2.

    Raises:
        ValueError: another shape, or fewer than two samples.
        PriorNumericsError: NaN.
    """
    if probabilities.ndim < 3 or probabilities.shape[0] < 2 or not probabilities.numel():
        raise ValueError(f"probabilities have shape {tuple(probabilities.shape)}, expected (S, B, C, ...) with S >= 2 samples.")
    samples, classes = probabilities.shape[0], probabilities.shape[2]
    examples = probabilities.detach().movedim(2, -1).flatten(1, -2)  # (S, n, C)
    pairs = samples * (samples - 1) / 2
    rank = 2 * torch.arange(1, samples + 1, dtype=torch.float64) - samples - 1  # (S,)
    distance = agreeing = 0.0
    for some in torch.split(examples, max(1, _MOST_VALUES // (samples * classes)), dim=1):  # (S, b, C)
        values = some.cpu().double()
        bad = int(values.isnan().any(2).sum())
        if bad:
            raise PriorNumericsError(
                f"at least {bad} of {samples * examples.shape[1]} predictions have NaN: a sample diverged. Lower the learning "
                "rate."
            )
        ordered = (values - values[:1]).sort(0).values  # differences: what samples share must not round them away
        distance += 0.5 * float(torch.einsum("s,sbc->", rank, ordered))
        votes = F.one_hot(values.argmax(2), classes).sum(0)  # (b, C)
        agreeing += float((votes * (votes - 1)).sum()) / 2
    total = pairs * examples.shape[1]
    return Disagreement(total_variation=max(0.0, distance / total), argmax=1 - agreeing / total)


def warn_without_variability(probabilities: Tensor, *, least: float = 1e-3) -> Disagreement:
    """Warn when posterior samples predict nearly the same, so that their average is a single model at many times its price.

    Args:
        probabilities: as `disagreement`; a few hundred inputs that were not trained on will do.
        least: mean total-variation distance of two samples below which to warn; 1e-3 is a tenth of a percent of probability.

    Returns:
        the disagreement.

    Raises:
        ValueError, PriorNumericsError: as `disagreement`.
    """
    found = disagreement(probabilities)
    if found.total_variation < least:
        warnings.warn(
            f"the {probabilities.shape[0]} posterior samples predict nearly the same: two of them differ by a total variation "
            f"of {found.total_variation:.2g} on average, and in the class of {100 * found.argmax:.2g} % of the examples. "
            "Likely reasons: the temperature is 0 or very small (no noise); the learning rate has decayed to nothing where "
            "samples are taken (use a constant or cyclical schedule); the samples were taken too close together; the prior's "
            "scale is too small to let the weights move.",
            PriorWarning,
            stacklevel=2,
        )
    return found
