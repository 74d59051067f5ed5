"""SimCLR: an image's other view is to be told from the views of all other images.

    sim(u, v) = u . v / (|u| |v|)
    l(i, j) = -log( exp(sim(z_i, z_j) / temperature) / sum_{k != i} exp(sim(z_i, z_k) / temperature) )        k: all 2 N views
    loss = 1/(2N) sum over images, l(i, j) + l(j, i)        i, j: the two views of an image; NT-Xent, in nats per view

Source: Chen, Kornblith, Norouzi and Hinton 2020, "A Simple Framework for Contrastive Learning of Visual Representations" (arXiv
2002.05709), eq. 1 and Algorithm 1. Differs: none in the loss; N counts the images of all processes, as theirs does. Their
projection head is the one here, for CIFAR they take a temperature of 0.5, and a batch of 256 to 8,192.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from prior_hub.distributed import gather_over_ranks, process_index
from prior_hub.learning.self_supervised import SelfSupervised, full_precision

__all__ = ["SimCLR", "nt_xent"]


class SimCLR(SelfSupervised):
    """SimCLR over any backbone, for any transformers `Trainer`.

        model = SimCLR(timm.create_model("resnet18", num_classes=0))
        images.set_transform(TwoViews(224))                             # a `datasets.Dataset`
        args = TrainingArguments("out", remove_unused_columns=False, dataloader_drop_last=True, lr_scheduler_type="constant")
        callback = SwagCallback(rank=20)
        Trainer(model=model, args=args, train_dataset=images, callbacks=[callback]).train()
        prior = callback.prior(dataset="org/images", license="mit")     # over the backbone, by its own names
        prior.push_to_hub("me/resnet18-simclr-prior", base_model="me/resnet18")

    More in `SelfSupervised`: batches, accumulation, several processes.

    Args:
        backbone: as `SelfSupervised`.
        temperature: of the softmax; smaller ones look at the most similar images only.
        hidden: width of the projection head's hidden layer; F when None.
        projection: D.
        batch_norm: as `SelfSupervised`.
        num_features: as `SelfSupervised`.
        pool: as `SelfSupervised`.

    Returns (of `forward`):
        "loss", and "accuracy" (B,): how often each image's two views are most similar to one another (0, 0.5 or 1).

    Raises:
        ValueError: the temperature is not positive; also as `SelfSupervised`.
    """

    objective: ClassVar[str] = "SimCLR"

    def __init__(
        self,
        backbone: nn.Module,
        *,
        temperature: float = 0.1,
        hidden: int | None = None,
        projection: int = 128,
        batch_norm: bool = True,
        num_features: int | None = None,
        pool: Callable[[Any], Tensor] | None = None,
    ) -> None:
        if not (temperature > 0 and math.isfinite(temperature)):
            raise ValueError(f"temperature is {temperature}, expected a finite number > 0.")
        super().__init__(backbone, projection=(hidden, projection), batch_norm=batch_norm, num_features=num_features, pool=pool)
        self.temperature = float(temperature)
        self.prior_source["temperature"] = self.temperature

    def loss(self, projections: Tensor) -> dict[str, Tensor]:
        """See the class; projections (2, B, D)."""
        loss, accuracy = nt_xent(projections, self.temperature)
        return {"loss": loss, "accuracy": accuracy}


def nt_xent(projections: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The loss of this process's images among those of all processes, and which of them are told.

    Args:
        projections: (2, B, D), the same B on every process.
        temperature: positive.

    Returns:
        (loss, in nats per view: the mean over processes is that of the whole batch; accuracy (B,)).
    """
    with torch.autocast(projections.device.type, enabled=False):
        z = nn.functional.normalize(full_precision(projections), dim=-1)
        count = 2 * z.shape[1]
        everyone = gather_over_ranks(z).flatten(0, 2)  # (W 2 B, D): rank, view, image
        similarity = z.flatten(0, 1) @ everyone.T / temperature  # (2 B, W 2 B)
        own = torch.arange(count, device=z.device)
        first = process_index() * count
        itself = torch.zeros_like(similarity, dtype=torch.bool)
        itself[own, first + own] = True
        similarity = similarity.masked_fill(itself, -math.inf)
        other = first + (own + count // 2) % count
        loss = nn.functional.cross_entropy(similarity, other)
    accuracy = (similarity.argmax(1) == other).to(z.dtype).view(2, -1).mean(0)
    return loss, accuracy
