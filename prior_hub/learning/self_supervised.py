"""Learning without labels: two views of each image, a backbone, a projection head, and a loss between the projections.

    h = backbone(view)            (B, F) features
    z = projection_head(h)        (B, D) projections
    loss = loss(z_1, z_2)         a number; what the objective is, one small file each (simclr.py, barlow_twins.py)

The prior is over the backbone alone, under the backbone's own names, so that it fits any model with that network inside; the
projection head is thrown away.

**Another objective** needs one of these:

1. a subclass of `SelfSupervised` with an `objective` (its name) and a `loss(projections)`; see barlow_twins.py;
2. any module of your own whose `forward` returns {"loss": ...}, and which says `prior_backbone = "student.backbone"` or where
   else it is: all outside is its head. What it holds in `prior_source` (JSON values) is recorded in the prior;
3. a model of a library as it is: transformers' `AutoModelForMaskedLM`, `ViTMAEForPreTraining`, `ViTForMaskedImageModeling`, ...
   say themselves what their head is; of others say `SwagCallback(head=("projector", "predictor"))`. What such a model does not
   train (the sine positions of ViTMAE) is not under the prior: start the downstream model from the checkpoint.

**Under Trainer.** No `**kwargs` in `forward`: Trainer would take it for a model that divides by the number of items itself, and
would not divide the loss by the accumulation steps. `return_loss: bool = True`: so Trainer knows that there is a loss without
labels, and evaluation gives `eval_loss`.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from prior_hub.errors import PriorMatchError
from prior_hub.priors.matching import head_parameter_names

__all__ = ["SelfSupervised", "pooled_features", "projection_head"]


class SelfSupervised(nn.Module, ABC):
    """A backbone and a projection head that learn from two views of each image; subclasses say how.

    Any transformers `Trainer` trains it, on a data set of `TwoViews`, with `remove_unused_columns=False` (the images are a
    column that `forward` does not know) and `dataloader_drop_last=True` (a last batch of one image has none to compare with).

    Gradient accumulation does not enlarge the batch that images are compared within. More processes do: projections are
    gathered over all ranks, each with as many images, and the gradient that DDP averages is that of the whole batch. With
    BatchNorm use `nn.SyncBatchNorm.convert_sync_batchnorm` there: statistics of one rank tell which views belong together.

    Args:
        backbone: a timm model with `num_classes=0`, a transformers vision model without a head (`AutoModel`, `ViTModel`), or
            any module from (B, C, H, W) to (B, F).
        projection: widths of the projection head's layers, None for F; the last is D.
        batch_norm: BatchNorm after each of its hidden layers.
        num_features: F; read from the backbone where it says so (timm, transformers).
        pool: what makes (B, F) of the backbone's output; `pooled_features` when None.

    Attributes:
        backbone: what the prior is over.
        projection_head: what it is not over.
        prior_source: the objective and its settings, recorded in the prior.

    Raises:
        ValueError: the backbone has a classifier, or does not tell its number of features.
    """

    prior_backbone: ClassVar[str] = "backbone"
    objective: ClassVar[str]

    def __init__(
        self,
        backbone: nn.Module,
        *,
        projection: Sequence[int | None],
        batch_norm: bool = True,
        num_features: int | None = None,
        pool: Callable[[Any], Tensor] | None = None,
    ) -> None:
        super().__init__()
        _refuse_classifier(backbone)
        self.num_features = _num_features(backbone) if num_features is None else num_features
        self.pool = pool
        self.backbone = backbone
        widths = [self.num_features if width is None else width for width in (None, *projection)]
        self.projection_head = projection_head(widths, batch_norm=batch_norm)
        self.prior_source: dict[str, Any] = {
            "objective": self.objective,
            "projection_head": widths,
            "projection_head_batch_norm": batch_norm,
        }

    @abstractmethod
    def loss(self, projections: Tensor) -> dict[str, Tensor]:
        """The objective.

        Args:
            projections: (2, B, D), of both views of each image of this process.

        Returns:
            "loss", a number (its mean over processes is what is learned); what else there is has one entry per image, (B, ...).
        """

    def features(self, pixel_values: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, F), what the backbone knows about each image."""
        output = self.backbone(pixel_values)
        features = pooled_features(output) if self.pool is None else self.pool(output)
        if features.ndim != 2 or features.shape[1] != self.num_features:
            raise ValueError(
                f"the backbone gives features of shape {list(features.shape)} for {len(pixel_values)} images, expected "
                f"[{len(pixel_values)}, {self.num_features}]: pass num_features={features.shape[-1]}, or pool=a function from "
                "the backbone's output to (B, F)."
            )
        return features

    def forward(self, pixel_values: Tensor, other_view: Tensor | None = None, return_loss: bool = True) -> dict[str, Tensor]:
        """Loss between two views.

        Args:
            pixel_values: (B, 2, C, H, W), both views of each image; or the first views, (B, C, H, W).
            other_view: the second views then, (B, C, H, W).
            return_loss: False for the projections (2, B, D) alone, as "projections".

        Raises:
            ValueError: not two views, or features of another width than the projection head is made for.
        """
        if other_view is not None:
            if pixel_values.shape != other_view.shape:
                raise ValueError(f"views differ in shape: {list(pixel_values.shape)} and {list(other_view.shape)}.")
            views = torch.stack([pixel_values, other_view])
        elif pixel_values.ndim == 5 and pixel_values.shape[1] == 2:
            views = pixel_values.transpose(0, 1)
        else:
            raise ValueError(
                f"pixel_values has shape {list(pixel_values.shape)}, expected (B, 2, C, H, W): two views of each image, as "
                "TwoViews makes them. Pass single views as pixel_values=..., other_view=..."
            )
        projections = self.projection_head(self.features(views.flatten(0, 1))).unflatten(0, (2, -1))  # (2, B, D)
        return self.loss(projections) if return_loss else {"projections": projections}


def projection_head(widths: Sequence[int], *, batch_norm: bool = True) -> nn.Sequential:
    """An MLP, ReLU between its layers: (B, widths[0]) -> (B, widths[-1]).

    Args:
        widths: of the input and of every layer.
        batch_norm: BatchNorm before each ReLU; the linear layer before it has no bias then.

    Raises:
        ValueError: there is no layer, or one without a width.
    """
    if len(widths) < 2 or min(widths) < 1:
        raise ValueError(f"a projection head of widths {list(widths)} cannot be: give the input's and each layer's, 1 or more.")
    layers: list[nn.Module] = []
    for inside, outside in itertools.pairwise(widths[:-1]):
        layers += [
            nn.Linear(inside, outside, bias=not batch_norm),
            *([nn.BatchNorm1d(outside)] if batch_norm else []),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1]))


def pooled_features(output: Any) -> Tensor:
    """One vector of features per image, (B, F), from the output of any usual backbone.

    A tensor, or of a transformers output its pooler_output, its last_hidden_state or the last of its feature_maps, whichever is
    there first; averaged over tokens (B, T, F) or places (B, F, H, W).

    Raises:
        TypeError: the output is none of these.
    """
    found = output
    if not isinstance(output, Tensor):
        maps = getattr(output, "feature_maps", None) or (None,)
        values = (getattr(output, "pooler_output", None), getattr(output, "last_hidden_state", None), maps[-1])
        found = next((value for value in values if isinstance(value, Tensor)), None)
    if not isinstance(found, Tensor) or found.ndim not in (2, 3, 4):
        what = f"a tensor of shape {list(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
        raise TypeError(f"the backbone returns {what}: pass pool=a function from that to features (B, F).")
    if found.ndim == 2:
        return found
    return found.mean(1) if found.ndim == 3 else found.mean((2, 3))


def full_precision(projections: Tensor) -> Tensor:
    """float32 at least: similarities and correlations are sums of hundreds of products."""
    return projections.float() if projections.dtype in (torch.float16, torch.bfloat16) else projections


def _refuse_classifier(backbone: nn.Module) -> None:
    """A timm or transformers model says what its classifier is; it would be learned as features, and be under the prior."""
    head: list[str] = []
    if hasattr(backbone, "get_classifier") or hasattr(backbone, "base_model_prefix"):
        with suppress(PriorMatchError):
            head = head_parameter_names(backbone)
    if head:
        raise ValueError(
            f"the backbone is a {type(backbone).__name__} with a head ({', '.join(head[:3])}), expected one that gives "
            "features. Pass timm.create_model(name, num_classes=0), or of a transformers model its base: "
            "AutoModel.from_pretrained(name), or model.base_model."
        )


def _num_features(backbone: nn.Module) -> int:
    """F, as timm or transformers say it."""
    config, inner = getattr(backbone, "config", None), getattr(backbone, "timm_model", backbone)
    channels, hidden = getattr(backbone, "channels", None), getattr(config, "hidden_sizes", None)
    values = (
        getattr(inner, "head_hidden_size", None),  # timm: after the last convolution of MobileNetV3 and the like
        getattr(inner, "num_features", None),
        channels[-1] if isinstance(channels, list) and channels else None,  # transformers' backbones
        getattr(config, "hidden_size", None),
        hidden[-1] if hidden else None,
    )
    found = next((value for value in values if isinstance(value, int)), None)
    if found is None:
        raise ValueError(
            f"{type(backbone).__name__} does not say how many features it gives: pass num_features. A classifier at its end is "
            "to be replaced by nn.Identity() first."
        )
    return found
