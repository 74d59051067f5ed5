"""The isotropic prior at the mean (L2-SP): a checkpoint and one variance. The strong, cheap rival of every learned prior.

    Sigma = scale * variance * I        mean = the checkpoint

Source: Li, Grandvalet and Davoine 2018, "Explicit Inductive Bias for Transfer Learning with Convolutional Networks"
(arXiv 1802.01483), eq. 3, with alpha = N / (scale * variance) in their notation.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from prior_hub.distributed import is_sharded
from prior_hub.learning.swag import provenance, renaming, source_facts
from prior_hub.model import PriorModel
from prior_hub.priors.batch_norm import batch_norm_buffers
from prior_hub.priors.matching import canonical_parameters, without_head

__all__ = ["isotropic_prior"]


def isotropic_prior(
    source: nn.Module | PriorModel,
    /,
    *,
    variance: float = 1.0,
    head: str | Sequence[str] | None = "auto",
    **metadata: Any,
) -> PriorModel:
    """An isotropic Gaussian at the weights of a model, or at the mean of a prior.

        prior = isotropic_prior(AutoModel.from_pretrained("org/name"))  # the base model is recorded

    Args:
        source: a model (its head is left out), or a prior whose mean, names and buffers are taken.
        variance: the one variance; `prior_scale` multiplies it.
        head: as in `SwagEstimator`; not used for a prior.
        **metadata: fields of `PriorConfig`, such as base_model, license, or source={"dataset": ...}.

    Raises:
        ValueError: `variance` is not positive, or `source` is a name.
        PriorMatchError: the head cannot be told.
    """
    if not variance > 0:
        raise ValueError(f"variance is {variance}, expected a number > 0.")
    if isinstance(source, (str, os.PathLike)):  # names in a checkpoint need not be those in its model (ViT: they are not)
        raise ValueError(
            f"source is the name {os.fspath(source)!r}, expected a model or a prior: its class decides what the weights are "
            f"called and what its head is. Load it, isotropic_prior(AutoModel.from_pretrained({os.fspath(source)!r})), or use "
            "learn_prior(name, estimator='isotropic')."
        )
    facts: dict[str, Any]
    if isinstance(source, PriorModel):
        known = source.config
        mean, buffers = source.mean, source.buffers
        facts = {
            "head_parameters": known.head_parameters,
            "tied_parameters": known.tied_parameters,
            "base_model": known.base_model,
            "base_model_revision": known.base_model_revision,
            "model_type": known.model_type,
            "source": known.source,
            "license": known.license,
        }
    else:
        known_facts = source_facts(source, head)
        outside = set(known_facts["head_parameters"])
        parameters = {n: p for n, p in canonical_parameters(source).items() if n not in outside}
        if any(is_sharded(p) for p in parameters.values()):
            raise NotImplementedError("make the isotropic prior before the model is sharded.")
        dtype = torch.float64 if any(p.dtype == torch.float64 for p in parameters.values()) else torch.float32
        own_name = renaming(parameters, known_facts["prefix"])
        mean = {own_name(n): p.detach().to("cpu", dtype, copy=True).contiguous() for n, p in parameters.items()}
        found = batch_norm_buffers(source)
        buffers = {own_name(n): found[n].detach().cpu().clone() for n in without_head(found, outside, parameters)}
        facts = provenance(known_facts, parameters, own_name=own_name)
    facts["estimator"] = {"name": "isotropic", "variance": float(variance)}
    return PriorModel.from_tensors(
        mean,
        {name: torch.full_like(tensor, variance) for name, tensor in mean.items()},
        buffers=buffers,
        **(facts | metadata),
    )
