"""prior_hub: pre-trained priors, as easy to share and use as pre-trained weights.

    prior = PriorModel.from_pretrained("org/resnet50-simclr-prior")
    trainer = PriorTrainer(model=model, prior=prior, args=PriorTrainingArguments(...), train_dataset=...)

Names are loaded when first used: importing `prior_hub` loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from prior_hub.errors import (
    PriorAccessError,
    PriorConnectionError,
    PriorFormatError,
    PriorHubError,
    PriorMatchError,
    PriorMetadataError,
    PriorNotFoundError,
    PriorNumericsError,
    PriorStorageError,
    PriorWarning,
)

__version__ = "0.1.0"

_LAZY = {
    "AveragedPrediction": "prior_hub.inference.average",
    "BAOA": "prior_hub.inference.baoa",
    "BarlowTwins": "prior_hub.learning.barlow_twins",
    "BayesianModelAverage": "prior_hub.inference.average",
    "BoundGaussian": "prior_hub.inference.baoa",
    "CategoricalLikelihood": "prior_hub.learning.fisher",
    "ChainDiagnostics": "prior_hub.inference.diagnostics",
    "CyclicalSchedule": "prior_hub.inference.schedule",
    "DiagonalFisherEstimator": "prior_hub.learning.fisher",
    "GaussianLikelihood": "prior_hub.learning.fisher",
    "LowRankGaussian": "prior_hub.priors.gaussian",
    "Match": "prior_hub.priors.matching",
    "PriorArgumentsMixin": "prior_hub.finetuning.arguments",
    "PriorComparison": "prior_hub.priors.comparison",
    "PriorConfig": "prior_hub.priors.config",
    "PriorFit": "prior_hub.registry.search",
    "PriorInfo": "prior_hub.registry.search",
    "PriorModel": "prior_hub.model",
    "PriorPenalty": "prior_hub.finetuning.penalty",
    "PriorTrainer": "prior_hub.finetuning.trainer",
    "PriorTrainerMixin": "prior_hub.finetuning.trainer",
    "PriorTrainingArguments": "prior_hub.finetuning.arguments",
    "ProximalStep": "prior_hub.finetuning.proximal",
    "SGHMC": "prior_hub.inference.sghmc",
    "SGLD": "prior_hub.inference.sgld",
    "SamplingArgumentsMixin": "prior_hub.finetuning.arguments",
    "SamplingScheduler": "prior_hub.inference.schedule",
    "ScaleChoice": "prior_hub.finetuning.scale",
    "ScaleTrial": "prior_hub.finetuning.scale",
    "SelfSupervised": "prior_hub.learning.self_supervised",
    "SimCLR": "prior_hub.learning.simclr",
    "SwagCallback": "prior_hub.learning.callback",
    "SwagEstimator": "prior_hub.learning.swag",
    "TemperatureScaling": "prior_hub.inference.metrics",
    "TwoViews": "prior_hub.learning.views",
    "add_to_collection": "prior_hub.registry.collections",
    "chain_diagnostics": "prior_hub.inference.diagnostics",
    "classification_metrics": "prior_hub.inference.metrics",
    "compare_priors": "prior_hub.priors.comparison",
    "disagreement": "prior_hub.inference.diagnostics",
    "find_scale": "prior_hub.finetuning.scale",
    "isotropic_prior": "prior_hub.learning.isotropic",
    "learn_prior": "prior_hub.learning.recipes",
    "list_priors": "prior_hub.registry.search",
    "list_samples": "prior_hub.inference.samples",
    "match_parameters": "prior_hub.priors.matching",
    "prior_info": "prior_hub.registry.search",
    "priors_for": "prior_hub.registry.search",
    "push_prior_to_hub": "prior_hub.model",
    "recompute_batch_norm": "prior_hub.priors.batch_norm",
    "scale_ladder": "prior_hub.finetuning.scale",
    "search_priors": "prior_hub.registry.search",
    "segmentation_metrics": "prior_hub.inference.metrics",
    "select_scale": "prior_hub.finetuning.scale",
    "write_sample": "prior_hub.inference.samples",
}

__all__ = [
    "BAOA",
    "SGHMC",
    "SGLD",
    "AveragedPrediction",
    "BarlowTwins",
    "BayesianModelAverage",
    "BoundGaussian",
    "CategoricalLikelihood",
    "ChainDiagnostics",
    "CyclicalSchedule",
    "DiagonalFisherEstimator",
    "GaussianLikelihood",
    "LowRankGaussian",
    "Match",
    "PriorAccessError",
    "PriorArgumentsMixin",
    "PriorComparison",
    "PriorConfig",
    "PriorConnectionError",
    "PriorFit",
    "PriorFormatError",
    "PriorHubError",
    "PriorInfo",
    "PriorMatchError",
    "PriorMetadataError",
    "PriorModel",
    "PriorNotFoundError",
    "PriorNumericsError",
    "PriorPenalty",
    "PriorStorageError",
    "PriorTrainer",
    "PriorTrainerMixin",
    "PriorTrainingArguments",
    "PriorWarning",
    "ProximalStep",
    "SamplingArgumentsMixin",
    "SamplingScheduler",
    "ScaleChoice",
    "ScaleTrial",
    "SelfSupervised",
    "SimCLR",
    "SwagCallback",
    "SwagEstimator",
    "TemperatureScaling",
    "TwoViews",
    "__version__",
    "add_to_collection",
    "chain_diagnostics",
    "classification_metrics",
    "compare_priors",
    "disagreement",
    "find_scale",
    "isotropic_prior",
    "learn_prior",
    "list_priors",
    "list_samples",
    "match_parameters",
    "prior_info",
    "priors_for",
    "push_prior_to_hub",
    "recompute_batch_norm",
    "scale_ladder",
    "search_priors",
    "segmentation_metrics",
    "select_scale",
    "write_sample",
]

if TYPE_CHECKING:
    from prior_hub.finetuning.arguments import PriorArgumentsMixin, PriorTrainingArguments, SamplingArgumentsMixin
    from prior_hub.finetuning.penalty import PriorPenalty
    from prior_hub.finetuning.proximal import ProximalStep
    from prior_hub.finetuning.scale import ScaleChoice, ScaleTrial, find_scale, scale_ladder, select_scale
    from prior_hub.finetuning.trainer import PriorTrainer, PriorTrainerMixin
    from prior_hub.inference.average import AveragedPrediction, BayesianModelAverage
    from prior_hub.inference.baoa import BAOA, BoundGaussian
    from prior_hub.inference.diagnostics import ChainDiagnostics, chain_diagnostics, disagreement
    from prior_hub.inference.metrics import TemperatureScaling, classification_metrics, segmentation_metrics
    from prior_hub.inference.samples import list_samples, write_sample
    from prior_hub.inference.schedule import CyclicalSchedule, SamplingScheduler
    from prior_hub.inference.sghmc import SGHMC
    from prior_hub.inference.sgld import SGLD
    from prior_hub.learning.barlow_twins import BarlowTwins
    from prior_hub.learning.callback import SwagCallback
    from prior_hub.learning.fisher import CategoricalLikelihood, DiagonalFisherEstimator, GaussianLikelihood
    from prior_hub.learning.isotropic import isotropic_prior
    from prior_hub.learning.recipes import learn_prior
    from prior_hub.learning.self_supervised import SelfSupervised
    from prior_hub.learning.simclr import SimCLR
    from prior_hub.learning.swag import SwagEstimator
    from prior_hub.learning.views import TwoViews
    from prior_hub.model import PriorModel, push_prior_to_hub
    from prior_hub.priors.batch_norm import recompute_batch_norm
    from prior_hub.priors.comparison import PriorComparison, compare_priors
    from prior_hub.priors.config import PriorConfig
    from prior_hub.priors.gaussian import LowRankGaussian
    from prior_hub.priors.matching import Match, match_parameters
    from prior_hub.registry.collections import add_to_collection
    from prior_hub.registry.search import PriorFit, PriorInfo, list_priors, prior_info, priors_for, search_priors


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'prior_hub' has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
