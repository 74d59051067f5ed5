"""SwagCallback: learn a prior while any transformers `Trainer` trains."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from prior_hub.distributed import is_sharded, reshard
from prior_hub.errors import PriorHubError, PriorWarning
from prior_hub.learning.swag import SwagEstimator
from prior_hub.model import PriorModel
from prior_hub.priors.batch_norm import has_batch_norm, over_ranks, recompute_batch_norm

__all__ = ["SwagCallback"]

_STATE_NAME = "swag_state.safetensors"
_RATES_NAME = "swag_learning_rates.json"


class SwagCallback(TrainerCallback):
    """Takes SWAG snapshots during training; `prior()` makes the prior afterwards.

        callback = SwagCallback(rank=20, start=0.75, every_n_steps=50)
        Trainer(model=model, args=args, train_dataset=data, callbacks=[callback]).train()
        callback.prior(base_model="org/name", dataset="cifar10", license="mit").push_to_hub("me/name-prior")

    SWAG needs weights that keep moving: a schedule that decays to zero, as Trainer's default does, gives snapshots of one point
    (a warning says so). Either give Trainer a constant one, or pass `swa_lr`: from `start` on the callback then sets the
    learning rate of every optimizer step itself, whatever the scheduler says, and logs show what was set:

        constant    swa_lr
        cyclic      a(t) = (1 - t) swa_lr + t swa_lr_min,  t = 1/c, 2/c, ..., 1 within each cycle of c = every_n_steps steps,
                    with a snapshot at the low end   (Izmailov et al. 2018, arXiv 1803.05407, section 3.1)

    The state goes into every checkpoint as safetensors, and a run resumed from one gives
    the same prior, bit for bit, as the uninterrupted run. It is rank + 2 copies of the weights, written anew each time,
    where model and Adam's moments are 3. Save less often, or pass snapshots_dtype=torch.bfloat16, where that is too much.

    Args:
        rank: K, how many of the last snapshots are kept as deviations.
        start: first optimizer step to take snapshots after: a number of steps (int), or a share of training (float
            below 1).
        every_n_steps: optimizer steps between snapshots; None spreads max(2 rank, 30) snapshots over what is left after
            `start`.
        swa_lr: learning rate after `start`, of the parameter group with the largest one; the others keep their ratio to it
            (that of their initial rates). None leaves Trainer's schedule as it is.
        schedule: "constant" or "cyclic".
        swa_lr_min: the low end of a cycle.
        variance_floor: as `SwagEstimator`.
        head: as `SwagEstimator`.
        device: where snapshots are kept; the parameters' own device when None. "cpu" saves accelerator memory.
        snapshots_dtype: as `SwagEstimator`; torch.bfloat16 halves the memory of the snapshots, and what they add to a
            checkpoint.
        batch_norm: "recompute" runs the training data through the model at the mean when training ends; "last" stores
            the statistics of the last snapshot.
        batch_norm_batches: at most so many batches for that; all when None.
        resume_from: folder of the checkpoint resumed from, if it is not in `args.output_dir`. A state that was saved with
            other weights than the model resumes with is refused.

    Attributes:
        estimator: the `SwagEstimator`.
    """

    def __init__(
        self,
        rank: int = 20,
        *,
        start: int | float = 0.5,
        every_n_steps: int | None = None,
        swa_lr: float | None = None,
        schedule: str = "constant",
        swa_lr_min: float | None = None,
        variance_floor: float = 1e-12,
        head: str | Sequence[str] | None = "auto",
        device: torch.device | str | None = None,
        snapshots_dtype: torch.dtype | None = None,
        batch_norm: str = "recompute",
        batch_norm_batches: int | None = None,
        resume_from: str | os.PathLike[str] | None = None,
    ) -> None:
        if isinstance(start, float) and not 0 <= start < 1:
            raise ValueError(f"start is {start}: a float is a share of training, 0 <= start < 1; give steps as an int.")
        if isinstance(start, int) and start < 0:
            raise ValueError(f"start is {start}, expected 0 or more steps.")
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"every_n_steps is {every_n_steps}, expected 1 or more.")
        _check_schedule(swa_lr, schedule, swa_lr_min)
        if batch_norm not in ("recompute", "last"):
            raise ValueError(f"batch_norm is {batch_norm!r}, expected 'recompute' or 'last'.")
        self.estimator = SwagEstimator(
            rank, variance_floor=variance_floor, head=head, device=device, snapshots_dtype=snapshots_dtype
        )
        self.start = start
        self.every_n_steps = every_n_steps
        self.swa_lr = swa_lr
        self.schedule = schedule
        self.swa_lr_min = swa_lr_min
        self.batch_norm = batch_norm
        self.batch_norm_batches = batch_norm_batches
        self.resume_from = None if resume_from is None else Path(resume_from)
        self._first = 0
        self._interval = 1
        self._buffers: dict[str, Tensor] | None = None
        self._learning_rates: list[float] = []

    # ------------------------------------------------------------------------------------------------ Trainer's events

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Reset, or read the state of the checkpoint that is resumed from."""
        self._buffers = None
        self._learning_rates = []
        share = self.start if isinstance(self.start, float) else None
        self._first = math.floor(share * state.max_steps) if share is not None else int(self.start)
        left = max(state.max_steps - self._first, 1)
        self._interval = self.every_n_steps or max(1, left // max(2 * self.estimator.rank, 30))
        planned = (state.max_steps - self._first) // self._interval
        if planned < max(2, self.estimator.rank):
            warnings.warn(
                f"{state.max_steps} steps with start={self.start} and every {self._interval} steps give {max(planned, 0)} "
                f"snapshots, fewer than rank={self.estimator.rank}: start earlier, take them more often, or train longer.",
                PriorWarning,
                stacklevel=2,
            )
        if self.swa_lr is not None:
            if self.schedule == "cyclic" and self._interval < 2:
                raise ValueError(
                    f"schedule='cyclic' with every_n_steps={self._interval}: a cycle is as long as the time between snapshots, "
                    "at least 2 steps. Take snapshots less often, or use schedule='constant'."
                )
            for group in kwargs["optimizer"].param_groups if kwargs.get("optimizer") is not None else ():
                group.setdefault("initial_lr", group["lr"])  # plateau schedulers do not; it goes into the optimizer's state
        self.estimator.reset()
        if state.global_step > 0:
            self._resume(args, state, model)
        del control

    def _resume(self, args: TrainingArguments, state: TrainerState, model: nn.Module) -> None:
        folder = self.resume_from or Path(args.output_dir) / f"checkpoint-{state.global_step}"
        path = folder / _STATE_NAME
        own = folder / _rank_name()
        if own.is_file() or path.is_file():
            self.estimator.load(own if own.is_file() else path)
            self.estimator.attach(model)  # refuse another model or run now, and learn how this one is sharded
            if (folder / _RATES_NAME).is_file():
                self._learning_rates = json.loads((folder / _RATES_NAME).read_text(encoding="utf-8"))
            return
        if state.global_step > self._first:
            if others := sorted(folder.glob("swag_state-*-of-*.safetensors")):
                raise PriorHubError(
                    f"training resumes at step {state.global_step} on other processes than those that wrote its checkpoint: "
                    f"{folder} has {others[0].name}, one shard of so many, and not {own.name}. Resume on as many processes, "
                    "sharded alike."
                )
            raise PriorHubError(
                f"training resumes at step {state.global_step}, after the first snapshot, but {path} is not there: the "
                "checkpoint was written without SwagCallback or lies elsewhere. Pass SwagCallback(resume_from=folder)."
            )

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the learning rate of the step that is about to be taken, after `start`.

        Here, after every scheduler has had its say: what a scheduler sets afterwards is for the next step, which passes here
        too. The rate is a function of the step alone, so that a resumed run needs no state for it.
        """
        rate = self._rate(state.global_step + 1)
        optimizer, scheduler = kwargs.get("optimizer"), kwargs.get("lr_scheduler")
        if rate is None or optimizer is None:
            return
        initial = [float(group["initial_lr"]) for group in optimizer.param_groups]
        largest = max(initial)
        for group, own in zip(optimizer.param_groups, initial, strict=True):
            value = rate * (own / largest) if largest > 0 else rate
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(value)
            else:
                group["lr"] = value
        inner: Any = getattr(scheduler, "scheduler", scheduler)  # inside accelerate's wrapper
        if hasattr(inner, "_last_lr"):
            inner._last_lr = [group["lr"] for group in optimizer.param_groups]  # what Trainer logs
        del args, control

    def _rate(self, step: int) -> float | None:
        """The learning rate of optimizer step 1, 2, ...; None where Trainer's own schedule holds."""
        since = step - self._first
        if self.swa_lr is None or since <= 0:
            return None
        if self.swa_lr_min is None:
            return self.swa_lr
        along = ((since - 1) % self._interval + 1) / self._interval
        return (1 - along) * self.swa_lr + along * self.swa_lr_min

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Take a snapshot when one is due."""
        since = state.global_step - self._first
        extra = state.global_step > state.max_steps  # Trainer takes one more step where it resumes a run that was finished
        if since > 0 and since % self._interval == 0 and not extra:
            self.estimator.update(model)
            scheduler, rate = kwargs.get("lr_scheduler"), self._rate(state.global_step)
            if rate is not None:
                self._learning_rates.append(rate)
            elif scheduler is not None and hasattr(scheduler, "get_last_lr"):
                self._learning_rates.append(float(max(scheduler.get_last_lr())))
        del args, control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the state into the checkpoint that Trainer has just written."""
        model: nn.Module | None = kwargs.get("model")
        if model is not None:
            reshard(model)  # else a sharded model does not look like one right after an evaluation
        sharded = model is not None and any(is_sharded(p) for p in model.parameters())
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if (state.is_world_process_zero or sharded) and folder.is_dir():
            self.estimator.save(folder / (_rank_name() if sharded else _STATE_NAME), model=model)
        if state.is_world_process_zero and folder.is_dir():
            (folder / _RATES_NAME).write_text(json.dumps(self._learning_rates), encoding="utf-8")
        del control

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Recompute BatchNorm statistics at the mean."""
        loader = kwargs.get("train_dataloader")
        if self.batch_norm == "recompute" and self.estimator.num_snapshots and has_batch_norm(model) and loader is not None:
            reshard(model)  # the weights of sharded modules are exchanged, not the full ones that an evaluation may leave
            with torch.random.fork_rng():  # the pass must not depend on how training was split into runs,
                torch.manual_seed(args.seed)
                if hasattr(loader, "set_epoch"):  # and accelerate's loader shuffles by the epochs it has seen itself
                    loader.set_epoch(0)
                own = recompute_batch_norm(
                    model,
                    loader,
                    parameters=self.estimator.mean(),
                    max_batches=self.batch_norm_batches,
                    progress=not args.disable_tqdm and state.is_local_process_zero,
                )
            reshard(model)  # the full ones are those of the mean now
            self._buffers = over_ranks(own)
        if len(self._learning_rates) > 1 and self._learning_rates[-1] < 0.05 * self._learning_rates[0]:
            warnings.warn(
                f"the learning rate fell from {self._learning_rates[0]:.3g} to {self._learning_rates[-1]:.3g} while snapshots "
                "were taken: the last ones are nearly one point, and the variances too small. Use "
                "lr_scheduler_type='constant' or 'constant_with_warmup' for the source task, or SwagCallback(swa_lr=...), "
                "which takes over after start.",
                PriorWarning,
                stacklevel=2,
            )
        del control

    # ------------------------------------------------------------------------------------------------------- the prior

    def prior(
        self,
        *,
        buffers: Mapping[str, Tensor] | None = None,
        estimator: Mapping[str, Any] | None = None,
        **arguments: Any,
    ) -> PriorModel:
        """The prior of the snapshots; arguments as `SwagEstimator.prior` (base_model, dataset, license, scale, explained...).

        Raises:
            PriorNumericsError: fewer than two snapshots were taken.
        """
        return self.estimator.prior(
            buffers=self._buffers if buffers is None else buffers,
            estimator={**self._facts(), **(estimator or {})},
            **arguments,
        )

    def save_prior(
        self,
        save_directory: str | os.PathLike[str],
        *,
        buffers: Mapping[str, Tensor] | None = None,
        estimator: Mapping[str, Any] | None = None,
        **arguments: Any,
    ) -> Path:
        """Write the prior's folder, as `prior(...).save_pretrained(save_directory)`, without any process holding all of it.

        Of a sharded model every rank must call it; see `SwagEstimator.save_prior`, also for the arguments.

        Raises:
            PriorNumericsError: fewer than two snapshots were taken.
        """
        return self.estimator.save_prior(
            save_directory,
            buffers=self._buffers if buffers is None else buffers,
            estimator={**self._facts(), **(estimator or {})},
            **arguments,
        )

    def _facts(self) -> dict[str, Any]:
        """When snapshots were taken, at which learning rates."""
        schedule: dict[str, Any] = {"start_step": self._first, "every_n_steps": self._interval}
        if self.swa_lr is not None:
            schedule |= {"schedule": self.schedule, "swa_lr": self.swa_lr}
            schedule |= {} if self.swa_lr_min is None else {"swa_lr_min": self.swa_lr_min}
        if self._learning_rates:
            schedule["learning_rate"] = [self._learning_rates[0], self._learning_rates[-1]]
        return schedule


def _check_schedule(swa_lr: float | None, schedule: str, swa_lr_min: float | None) -> None:
    if schedule not in ("constant", "cyclic"):
        raise ValueError(f"schedule is {schedule!r}, expected 'constant' or 'cyclic'.")
    if swa_lr is None:
        if schedule != "constant" or swa_lr_min is not None:
            raise ValueError("schedule and swa_lr_min say how swa_lr is used: pass swa_lr, the learning rate after start.")
        return
    if not (math.isfinite(swa_lr) and swa_lr > 0):
        raise ValueError(f"swa_lr is {swa_lr}, expected a number > 0.")
    if schedule == "constant" and swa_lr_min is not None:
        raise ValueError(f"swa_lr_min={swa_lr_min} is the low end of a cycle: pass schedule='cyclic' too.")
    if schedule == "cyclic" and (swa_lr_min is None or not 0 < swa_lr_min <= swa_lr):
        raise ValueError(
            f"schedule='cyclic' needs swa_lr_min, the low end: 0 < swa_lr_min <= swa_lr={swa_lr}; it is {swa_lr_min}."
        )


def _rank_name() -> str:
    """One file per rank where parameters are sharded; ranks of DDP all read the one file."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return f"swag_state-{dist.get_rank():05d}-of-{dist.get_world_size():05d}.safetensors"
    return _STATE_NAME
