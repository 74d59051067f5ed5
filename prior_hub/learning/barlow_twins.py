"""Barlow Twins: the features of two views are to be the same, and each to say something the others do not.

    C_ij = sum_b zA_bi zB_bj / ( sqrt(sum_b zA_bi^2) sqrt(sum_b zB_bj^2) )        z centred over the batch: correlations, (D, D)
    loss = sum_i (1 - C_ii)^2 + redundancy_weight sum_i sum_{j != i} C_ij^2

Source: Zbontar, Jing, Misra, LeCun and Deny 2021, "Barlow Twins: Self-Supervised Learning via Redundancy Reduction" (arXiv
2103.03230), eq. 1-2. Differs: both views go through the backbone as one batch, so that its BatchNorm sees both; the projection
head is (2048, 2048, 2048) unless told otherwise, theirs 8,192 wide (better, and larger than most backbones). b counts the
images of all processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from prior_hub.distributed import gather_over_ranks
from prior_hub.learning.self_supervised import SelfSupervised, full_precision

__all__ = ["BarlowTwins", "barlow_twins_loss"]


class BarlowTwins(SelfSupervised):
    """Barlow Twins over any backbone, for any transformers `Trainer`; used as `SimCLR` is.

    Args:
        backbone: as `SelfSupervised`.
        redundancy_weight: lambda of the paper.
        projection: widths of the projection head's layers; the last is D.
        batch_norm: as `SelfSupervised`.
        num_features: as `SelfSupervised`.
        pool: as `SelfSupervised`.

    Raises:
        ValueError: `redundancy_weight` is negative; also as `SelfSupervised`.
    """

    objective: ClassVar[str] = "Barlow Twins"

    def __init__(
        self,
        backbone: nn.Module,
        *,
        redundancy_weight: float = 0.005,
        projection: Sequence[int] = (2048, 2048, 2048),
        batch_norm: bool = True,
        num_features: int | None = None,
        pool: Callable[[Any], Tensor] | None = None,
    ) -> None:
        if not (redundancy_weight >= 0 and math.isfinite(redundancy_weight)):
            raise ValueError(f"redundancy_weight is {redundancy_weight}, expected a finite number >= 0.")
        super().__init__(backbone, projection=projection, batch_norm=batch_norm, num_features=num_features, pool=pool)
        self.redundancy_weight = float(redundancy_weight)
        self.prior_source["redundancy_weight"] = self.redundancy_weight

    def loss(self, projections: Tensor) -> dict[str, Tensor]:
        """See the class; projections (2, B, D)."""
        return {"loss": barlow_twins_loss(projections, self.redundancy_weight)}


def barlow_twins_loss(projections: Tensor, redundancy_weight: float) -> Tensor:
    """The loss of the whole batch, over all processes.

    Args:
        projections: (2, B, D), the same B on every process.
        redundancy_weight: of the correlations between different features.

    Raises:
        ValueError: there is one image, which has no correlations.
    """
    with torch.autocast(projections.device.type, enabled=False):
        z = gather_over_ranks(full_precision(projections)).transpose(0, 1).flatten(1, 2)  # (2, W B, D)
        if z.shape[1] < 2:
            raise ValueError("a batch of one image has no correlations: pass dataloader_drop_last=True.")
        first, second = nn.functional.normalize(z - z.mean(1, keepdim=True), dim=1, eps=1e-6)
        correlations = first.T @ second  # (D, D)
        same = torch.diagonal(correlations)
        different = correlations.square().sum() - same.square().sum()
        loss: Tensor = (1 - same).square().sum() + redundancy_weight * different
    return loss
