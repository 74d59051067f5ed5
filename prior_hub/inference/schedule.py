"""When to explore and when to sample: cyclical learning rates, and the steps after which a sample is taken.

    lr_k = lr_0 / 2 (cos(pi r) + 1)          r: the share of its cycle that step k has done

The first part of a cycle explores at temperature 0 and a high rate, the rest samples at the chosen temperature while the rate
falls, so that each cycle ends near a mode and tells its neighbourhood. "constant" is one long chain: exploration once, at
the beginning, and one learning rate throughout.

Source: Zhang et al. 2020 (arXiv 1902.03932), eq. 1 and algorithm 1. Differs: cycles share the steps evenly.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

__all__ = ["SCHEDULES", "CyclicalSchedule", "SamplingScheduler"]

SCHEDULES = ("cyclical", "constant")


@dataclass(frozen=True)
class CyclicalSchedule:
    """Explore / sample phases over a training run.

    Attributes:
        num_steps: optimizer steps in all.
        num_cycles: M.
        samples_per_cycle: samples taken in each cycle, evenly spaced over its sampling phase, the last at its end.
        exploration: share of a cycle ("constant": of the run) that explores at temperature 0.
        kind: "cyclical" or "constant".

    Raises:
        ValueError: an argument out of its range, or fewer sampling steps than samples.
    """

    num_steps: int
    num_cycles: int = 4
    samples_per_cycle: int = 3
    exploration: float = 0.5
    kind: str = "cyclical"

    def __post_init__(self) -> None:
        for name in ("num_steps", "num_cycles", "samples_per_cycle"):
            if not getattr(self, name) >= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 1 or more.")
        if not 0 <= self.exploration < 1:
            raise ValueError(f"exploration is {self.exploration}, expected a share of a cycle, 0 <= exploration < 1.")
        if self.kind not in SCHEDULES:
            raise ValueError(f"schedule is {self.kind!r}, expected one of {', '.join(map(repr, SCHEDULES))}.")
        for start, first, stop in self.cycles:
            wanted = self.samples_per_cycle * (self.num_cycles if self.kind == "constant" else 1)
            if stop - first < wanted:
                raise ValueError(
                    f"{self.num_steps} steps in {self.num_cycles} cycles leave the cycle that begins at step {start} only "
                    f"{stop - first} steps that sample, too few for {wanted} samples: train longer, or take fewer cycles, "
                    "fewer samples, or less exploration."
                )

    @cached_property
    def cycles(self) -> Sequence[tuple[int, int, int]]:
        """(first step, first step that samples, step after the last) of each cycle, steps counted from 0."""
        count = self.num_cycles if self.kind == "cyclical" else 1
        bounds = [round(i * self.num_steps / count) for i in range(count + 1)]
        return [(a, a + round(self.exploration * (b - a)), b) for a, b in itertools.pairwise(bounds)]

    def cycle(self, step: int) -> int:
        """The number of the cycle that `step` is in; the last one's for steps beyond the end."""
        return max(i for i, (start, _, _) in enumerate(self.cycles) if start <= step)

    def factor(self, step: int) -> float:
        """What the learning rate is multiplied by in `step`."""
        if self.kind == "constant":
            return 1.0
        start, _, stop = self.cycles[self.cycle(step)]
        return 0.5 * (math.cos(math.pi * min(1.0, (step - start) / (stop - start))) + 1)

    def is_sampling(self, step: int) -> bool:
        """Whether `step` is at the chosen temperature, not at 0."""
        return step >= self.cycles[self.cycle(step)][1]

    def begins_to_sample(self, step: int) -> bool:
        """Whether `step` is the first at the chosen temperature in its cycle."""
        return step == self.cycles[self.cycle(step)][1]

    @cached_property
    def sample_after(self) -> dict[int, int]:
        """Number of steps done -> the cycle that a sample taken then belongs to."""
        found: dict[int, int] = {}
        for index, (_, first, stop) in enumerate(self.cycles):
            count = self.samples_per_cycle * (self.num_cycles if self.kind == "constant" else 1)
            for j in range(1, count + 1):
                found[first + (stop - first) * j // count] = index
        return found


class SamplingScheduler(LRScheduler):
    """Writes the schedule's learning rate and temperature into the sampler's groups; `step()` after each optimizer step.

    Args:
        optimizer: a `Sampler`; its groups' lr and temperature are those at the top.
        schedule: the `CyclicalSchedule`.
    """

    def __init__(self, optimizer: Optimizer, schedule: CyclicalSchedule) -> None:
        self.schedule = schedule
        for group in optimizer.param_groups:
            group.setdefault("initial_temperature", group["temperature"])
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:  # type: ignore[override]
        """The learning rate of each group; the temperatures are written beside."""
        step = self.last_epoch
        for group in self.optimizer.param_groups:
            group["temperature"] = group["initial_temperature"] if self.schedule.is_sampling(step) else 0.0
        return [float(base) * self.schedule.factor(step) for base in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """Numbers only: the schedule itself is made anew from its settings."""
        return {key: value for key, value in super().state_dict().items() if key != "schedule"}
