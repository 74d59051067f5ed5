"""Sampling the downstream posterior in a training loop: settings, the sampler over a bound prior, and when a sample is taken.

The law that is sampled is exp(-(N NLL + penalty) / temperature). What would falsify it is refused: weight decay (a second
prior), a prior step of the optimizer's own (the implicit one is no gradient). New parameters without a variance get 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from prior_hub.finetuning.penalty import PriorPenalty
from prior_hub.inference.baoa import BAOA
from prior_hub.inference.sampler import Sampler
from prior_hub.inference.schedule import CyclicalSchedule
from prior_hub.inference.sghmc import SGHMC
from prior_hub.inference.sgld import SGLD

__all__ = ["SAMPLERS", "Sampling"]

SAMPLERS: dict[str, type[Sampler]] = {"baoa": BAOA, "sghmc": SGHMC, "sgld": SGLD}
METRICS = ("auto", "identity", "diagonal", "full")
DEFAULT_HEAD_VARIANCE = 1.0  # a flat prior over a new head is no prior: its softmax can be shifted for nothing


@dataclass(frozen=True)
class Sampling:
    """How the posterior is sampled; the fields are those of `PriorTrainingArguments`.

    Raises:
        ValueError: an unknown sampler, or settings that do not go together.
    """

    sampler: str
    temperature: float = 1.0
    friction: float = 0.1
    num_cycles: int = 4
    samples_per_cycle: int = 3
    exploration: float = 0.5
    sampling_schedule: str = "cyclical"
    sampler_metric: str = "auto"
    chain: int = 0
    sample_batch_norm_batches: int = 100

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler is {self.sampler!r}, expected one of {', '.join(map(repr, sorted(SAMPLERS)))}, or None.")
        if self.chain < 0:
            raise ValueError(f"chain is {self.chain}, expected 0 or more.")
        if self.sample_batch_norm_batches < 1:
            raise ValueError(f"sample_batch_norm_batches is {self.sample_batch_norm_batches}, expected 1 or more.")
        if self.sampler_metric not in METRICS:
            raise ValueError(f"sampler_metric is {self.sampler_metric!r}, expected one of {', '.join(map(repr, METRICS))}.")
        if self.sampler_metric == "full" and self.sampler != "baoa":
            raise ValueError(f"sampler_metric='full' is for 'baoa'; {self.sampler!r} takes 'diagonal' or 'identity'.")

    @property
    def metric(self) -> str:
        """What "auto" comes to: "identity", "diagonal" or "full"."""
        if self.sampler_metric != "auto":
            return self.sampler_metric
        return "diagonal" if self.sampler == "baoa" else "identity"

    def make(self, params: Iterable[Any], lr: float, *, num_data: int, seed: int) -> Sampler:
        """The sampler; `bind` it to the prior once parameters are wrapped and sharded."""
        more: dict[str, Any] = {} if self.sampler == "sgld" else {"friction": self.friction}
        return SAMPLERS[self.sampler](
            params, lr, num_data=num_data, temperature=self.temperature, seed=seed, chain=self.chain, **more
        )

    def bind(self, sampler: Sampler, penalty: PriorPenalty) -> None:
        """Give the sampler the prior as its metric, where it takes one."""
        if self.metric == "identity":
            return
        if isinstance(sampler, BAOA):
            sampler.attach(penalty.bound_gaussians(self.metric))
        else:
            sampler.precondition(penalty.preconditioner())

    def schedule(self, num_steps: int) -> CyclicalSchedule:
        """When the chain explores, samples, and has a sample taken, over so many optimizer steps."""
        return CyclicalSchedule(num_steps, self.num_cycles, self.samples_per_cycle, self.exploration, self.sampling_schedule)
