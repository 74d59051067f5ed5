"""Which of the published scale conventions a prior follows: what its scale multiplies.

The same snapshots make another Gaussian in each published code, and the same number "scale" another width (priors/legacy.py). A
prior's weights a and b and its eps say which formula it follows; its estimator says what it was imported as.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from prior_hub.priors.config import PriorConfig
from prior_hub.priors.gaussian import swag_weights

__all__ = ["Convention", "scale_convention"]


@dataclass(frozen=True)
class Convention:
    """What the scale s of a prior means.

    Attributes:
        name: "swag", "paper", "paper-unscaled", "tufts", "tufts-elbo" (as in `PriorModel.from_legacy`), "diagonal",
            "principal" for compressed deviations, or "own".
        words: a sentence or two.
        formula: Sigma with s the scale, e the eps, v the variances, D or Q the K rows of deviations.
    """

    name: str
    words: str
    formula: str


_KNOWN = {
    "swag": (
        "SWAG (Maddox et al. 2019, eq. 6): half the variances, half the sample covariance of the snapshots, both times the "
        "scale",
        "s * (diag(v) / 2 + D^T D / (2 * (K - 1))) + e * I",
    ),
    "diagonal": ("a diagonal covariance: the variances times the scale", "s * diag(v) + e * I"),
    "paper": (
        'the published code of "Pre-Train Your Loss" (hsouri/BayesianTransferLearning), its default: the variances times the '
        "scale, the products of the rows times its square",
        "s * diag(v) + s**2 * Q^T Q + e * I",
    ),
    "paper-unscaled": (
        'the published code of "Pre-Train Your Loss" with scale_low_rank=False: the scale multiplies the variances alone',
        "s * diag(v) + Q^T Q + e * I",
    ),
    "tufts": (
        "tufts-ml/bdl-transfer-learning: half the variances and half the sample covariance of the rows, both times the scale",
        "s * (diag(v) / 2 + Q^T Q / (2 * (K - 1))) + e * I",
    ),
    "tufts-elbo": (
        "tufts-ml/data-emphasized-ELBo: as tufts, and eps is multiplied by the scale too",
        "s * (diag(v) / 2 + e * I + Q^T Q / (2 * (K - 1)))",
    ),
}


def scale_convention(config: PriorConfig) -> Convention:
    """The convention of a prior, told from its weights; one it was imported with is named as such.

    Args:
        config: of the prior.
    """
    imported, at = config.estimator.get("convention"), config.estimator.get("imported_scale")
    if isinstance(imported, str) and imported in _KNOWN and imported != "swag":
        words, formula = _KNOWN[imported]
        if at != config.scale:
            words += f"; imported at scale {at}, and rescaled here as SWAG's, so that the formula holds at that scale alone"
        return Convention(imported, words, f"Sigma = {formula}")
    spectrum = config.estimator.get("spectrum")
    principal = config.estimator.get("deviations") == "principal directions" and isinstance(spectrum, list)
    rows = len(spectrum) if principal and isinstance(spectrum, list) else config.rank
    weights = swag_weights(rows)
    if _close(config.diagonal_weight, weights[0]) and _close(config.low_rank_weight, weights[1]):
        if not principal or not config.rank:
            return Convention(*_named("swag" if config.rank >= 2 else "diagonal"))
        words = f"SWAG's weights for the {rows} snapshots that the deviations were; D holds their principal directions"
        return Convention("principal", words, f"Sigma = s * (diag(v) / 2 + D^T D / (2 * ({rows} - 1))) + e * I")
    a, b = config.diagonal_weight, config.low_rank_weight
    words = "weights of its own, both times the scale"
    low_rank = f" + {b!r} * D^T D" if config.rank and b else ""
    return Convention("own", words, f"Sigma = s * ({a!r} * diag(v){low_rank}) + e * I")


def _named(name: str) -> tuple[str, str, str]:
    words, formula = _KNOWN[name]
    return name, words, f"Sigma = {formula}"


def _close(found: float, expected: float) -> bool:
    return math.isclose(found, expected, rel_tol=1e-6)
