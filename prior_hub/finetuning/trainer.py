"""`PriorTrainer`: the Hugging Face `Trainer` with a prior in its loss.

The prior's gradient is added in `training_step`, after backward and the reduction over ranks are done and before clipping,
and only on the micro-batch whose gradients the optimizer will use (`accelerator.sync_gradients`). There it counts exactly
once per optimizer step under gradient accumulation, short last windows, clipping, fp16 scaling, DDP and FSDP2. Evaluation
loss stays the plain NLL.

With `PriorTrainingArguments(sampler=...)` the optimizer is a sampler of the posterior: samples are written to
OUTPUT_DIR/samples while it trains, and `evaluate` and `predict` report the model's own figures beside those of the average over
the samples (`eval_loss` and `eval_bma_loss`).
"""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from prior_hub.distributed import reshard
from prior_hub.errors import PriorWarning
from prior_hub.finetuning.adapters import initialize_through_adapters
from prior_hub.finetuning.arguments import SamplingArgumentsMixin
from prior_hub.finetuning.counting import COUNTS, count_labels
from prior_hub.finetuning.penalty import PriorPenalty, match_for_penalty
from prior_hub.finetuning.proximal import UPDATES, ProximalStep, can_step_implicitly, chosen_update, highest_rate
from prior_hub.finetuning.sampling import DEFAULT_HEAD_VARIANCE, Sampling
from prior_hub.finetuning.scale import (
    AUTO,
    ScaleChoice,
    number_or_auto,
    read_choice,
    refuse_impossible_search,
    walk,
    write_choice,
)
from prior_hub.inference.average import (
    BayesianModelAverage,
    averaged,
    class_dimension,
    enlarged,
    ignore_index_of,
    nll_of,
)
from prior_hub.inference.diagnostics import warn_without_variability
from prior_hub.inference.sampler import Sampler
from prior_hub.inference.samples import frozen_digest, list_samples, remove_samples, write_sample
from prior_hub.inference.schedule import CyclicalSchedule, SamplingScheduler
from prior_hub.model import PriorModel
from prior_hub.priors.batch_norm import has_batch_norm, over_ranks, recompute_batch_norm
from prior_hub.priors.config import PriorConfig
from prior_hub.priors.matching import NameMap, raw_names, unwrapped

__all__ = ["PriorTrainer", "PriorTrainerMixin"]

logger = logging.get_logger(__name__)

if TYPE_CHECKING:
    _TrainerBase: Any = Trainer  # what the mixin is mixed into
else:
    _TrainerBase = object

_DEFAULTS: dict[str, Any] = {
    "prior_scale": None,
    "prior_scale_checks": 4,
    "prior_rank": None,
    "prior_head_variance": None,
    "prior_update": "auto",
    "prior_num_examples": None,
    "prior_count": None,
    "prior_initialize": True,
    "prior_include_head": False,
    "prior_on_mismatch": "error",
    "prior_min_coverage": 0.5,
    "prior_through_adapters": None,
    "prior_device": None,
    "prior_revision": None,
    "prior_subfolder": None,
    "sampler": None,
}

_KEPT_BYTES = 1 << 30  # samples up to so much together stay in memory while their average is evaluated

_STEPS_IN_BACKWARD = "{} updates the weights inside backward, before the prior's gradient is added: choose another."


class PriorTrainerMixin(_TrainerBase):
    """Everything a prior adds to a `Trainer`; other Trainers take it by two classes.

        class PriorSFTTrainer(PriorTrainerMixin, SFTTrainer): ...

        @dataclass
        class PriorSFTConfig(PriorArgumentsMixin, SFTConfig): ...     # else there is no prior_num_examples to set

    Settings are read from `args` (`PriorTrainingArguments`, or any class with `PriorArgumentsMixin`); with plain
    `TrainingArguments` the defaults hold. Without a prior it is the Trainer it is mixed into, to the last bit.

    With `prior_initialize`, the default, making the trainer sets the model to the prior's mean: where it is refused, or has no
    `train_dataset` (it only evaluates or predicts), the model keeps its weights. To go on from a model that is fine-tuned
    already pass `prior_initialize=False`.

    Args:
        prior: a Hub name, a folder, or a `PriorModel`; `args.prior` when None.
        prior_name_map: rules from the prior's names to the model's, as in `match_names`.
        *args: as the Trainer.
        **kwargs: as the Trainer.

    Raises:
        PriorMatchError: prior and model do not fit, or every covered parameter is frozen and no LoRA adapter is on any of them.
        ValueError: N is not known, or a setup in which the prior's gradient cannot be right (DeepSpeed, optimizers that
            step inside backward, weight decay on covered parameters, FSDP version 1).
    """

    model_accepts_loss_kwargs: bool
    prior_update: str | None  # how the prior entered the last training: "gradient", "implicit" or "flow"; None before it
    optimizer: Any
    lr_scheduler: Any
    optimizer_cls_and_kwargs: Any

    def __init__(
        self,
        *args: Any,
        prior: str | os.PathLike[str] | PriorModel | None = None,
        prior_name_map: NameMap | None = None,
        **kwargs: Any,
    ) -> None:
        settings = kwargs.get("args", args[1] if len(args) > 1 else None)
        chosen = getattr(settings, "prior", None) if prior is None else prior
        self.args: Any = settings
        self.train_dataset: Any = kwargs.get("train_dataset", args[3] if len(args) > 3 else None)  # asked by call_model_init
        self._prior_name_map = prior_name_map
        self._covered_names: frozenset[str] = frozenset()  # outlives a binding that fails
        self.prior: PriorModel | None = None
        self.prior_penalty: PriorPenalty | None = None
        self.prior_update: str | None = None
        self.prior_scale_choice: ScaleChoice | None = None  # what prior_scale="auto" came to
        self._searching = False  # for the scale
        self._proximal: ProximalStep | None = None
        self._nll_total: Tensor | None = None
        self._prior_total: Tensor | None = None
        self._prior_steps = 0
        self._probed = False
        self._ignores_item_count = False
        self._schedule: CyclicalSchedule | None = None
        self._average: BayesianModelAverage | None = None  # while it is evaluated
        self._compared = False  # whether its members' predictions were
        self._label_counts: list[tuple[Any, int]] = []  # data sets and how many labels each was found to have, the last two
        self._written: set[Path] = set()  # folders of chains that this call of train() has written samples to
        self._frozen: str | None = None  # digest of the parameters that are not trained
        if chosen is not None:
            given = kwargs.get("model", args[0] if args else None)
            if kwargs.get("peft_config") is not None:  # TRL's trainers add the adapter that the prior may be over
                given = None
            self.prior = self._load_prior(chosen, getattr(settings, "hub_token", None), given)
        if self.sampling is not None and self.sampling.chain:
            # another order of the data, other augmentation and dropout: chains that share them are not independent
            own: Any = copy.copy(self.args)
            own.seed += self.sampling.chain
            args, kwargs = _with_settings(own, args, kwargs)
        super().__init__(*args, **kwargs)
        self._given_optimizer = self.optimizer is not None
        if self.prior is None:
            if self.sampling is not None:
                raise ValueError(
                    f"sampler={self.sampling.sampler!r} samples a posterior, which needs a prior: pass prior=... "
                    "(isotropic_prior(model, variance=...) makes a plain one)."
                )
            return
        self._refuse_impossible_setups()
        if self._prior_settings["prior_update"] not in UPDATES:
            raise ValueError(
                f"prior_update is {self._prior_settings['prior_update']!r}, expected one of {', '.join(map(repr, UPDATES))}."
            )
        if self.sampling is not None:
            self._refuse_what_falsifies_the_law(self.sampling)
        if self._asked_for("prior_scale") or self._asked_for("prior_head_variance"):
            refuse_impossible_search(self)
        penalty = self._bind()  # first: what is refused leaves the model as it came
        if self.model_init is None and self._starts_at_the_mean():
            reshard(self.model)  # after an evaluation FSDP2's root group holds full tensors in place of its parameters
            self._initialize(self.model)
        logger.info(f"Prior: {penalty.report()}")
        if penalty.adapters and self._prior_settings["prior_through_adapters"] is None and self._speaks():
            logger.warning_advice(f"Prior: {penalty.report_of_adapters()} (prior_through_adapters=False refuses that).")
        self.add_callback(_BindPrior(self))
        if self.sampling is not None:
            self.add_callback(_TakeSamples(self))

    # ---------------------------------------------------------------------------------------------------------- set-up

    @property
    def _prior_settings(self) -> dict[str, Any]:
        """Read anew each time: a hyperparameter search writes into `self.args` between two runs."""
        settings = {key: getattr(self.args, key, default) for key, default in _DEFAULTS.items()}
        choice = self.prior_scale_choice
        for key, chosen, before in (
            ("prior_scale", choice and choice.scale, None),
            ("prior_head_variance", choice and choice.head_variance, DEFAULT_HEAD_VARIANCE),
        ):
            value = number_or_auto(settings[key], key)
            settings[key] = (before if choice is None else chosen) if value == AUTO else value
        return settings

    def _asked_for(self, key: str) -> bool:
        """Whether a setting is to be chosen by the trainer."""
        return bool(number_or_auto(getattr(self.args, key, None), key) == AUTO)

    def _load_prior(self, prior: str | os.PathLike[str] | PriorModel, token: str | None, model: Any) -> PriorModel:
        if isinstance(prior, PriorModel):
            return prior

        def check(config: PriorConfig) -> None:
            """Before weights are downloaded: a prior that does not fit fails after some kilobytes."""
            if isinstance(model, nn.Module):  # or a name, or None where there is model_init
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", PriorWarning)  # given when the prior is bound
                    match_for_penalty(config, model, **self._matching())

        return PriorModel.from_pretrained_together(  # every rank makes its trainer
            prior,
            revision=self._prior_settings["prior_revision"],
            subfolder=self._prior_settings["prior_subfolder"],
            token=token,
            check=check,
        )

    def _starts_at_the_mean(self) -> bool:
        """Whether a model is to be set to the prior's mean; not for a trainer that only evaluates or predicts."""
        if not self._prior_settings["prior_initialize"]:
            return False
        if self.train_dataset is None:
            logger.info("Prior: no train_dataset, so the model keeps its own weights (prior_initialize has no effect).")
            return False
        return True

    def _matching(self) -> dict[str, Any]:
        return {
            "name_map": self._prior_name_map,
            "include_head": self._prior_settings["prior_include_head"],
            "on_mismatch": self._prior_settings["prior_on_mismatch"],
            "min_coverage": self._prior_settings["prior_min_coverage"],
        }

    def _initialize(self, model: nn.Module) -> None:
        """Set a model to the prior's mean: the weights it computes with, where they are taken through adapters."""
        assert self.prior is not None  # noqa: S101
        if self._prior_settings["prior_through_adapters"] is False:
            self.prior.initialize(model, **self._matching())
        else:
            initialize_through_adapters(self.prior, model, **self._matching())

    def _speaks(self) -> bool:
        return bool(self.is_world_process_zero()) and logging.get_verbosity() <= logging.WARNING

    def _bind(self) -> PriorPenalty:
        """Bind the prior to the parameters as they are now (after wrapping and sharding: called when training begins)."""
        assert self.prior is not None  # noqa: S101
        num_examples = self._num_examples()
        self.prior_penalty = None  # frees its copy of the prior on the accelerator before the next one is made
        self.prior_penalty = PriorPenalty(
            self.prior,
            self.model,
            num_examples=num_examples,
            scale=self._prior_settings["prior_scale"],
            rank=self._prior_settings["prior_rank"],
            head_variance=self._head_variance(),
            through_adapters=self._prior_settings["prior_through_adapters"],
            device=self._prior_settings["prior_device"],
            **self._matching(),
        )
        if self.sampling is not None:
            self.prior_penalty.refuse_adapters(f"sampler={self.sampling.sampler!r}")
        self._covered_names = self.prior_penalty.covered_names
        return self.prior_penalty

    def _head_variance(self) -> float | None:
        given: float | None = self._prior_settings["prior_head_variance"]
        return DEFAULT_HEAD_VARIANCE if given is None and self.sampling is not None else given

    def _num_examples(self) -> int:
        given, what = self._prior_settings["prior_num_examples"], self._prior_settings["prior_count"]
        if what is not None and what not in COUNTS:
            raise ValueError(f"prior_count is {what!r}, expected one of {', '.join(map(repr, COUNTS))}, or None.")
        if given is not None and what is not None:
            raise ValueError(f"prior_num_examples={given} is N already: leave out prior_count={what!r}, or the number.")
        if given is not None:
            return int(given)
        dataset = self.train_dataset
        if dataset is None:
            return 1  # nothing to train on: the prior is only bound to be looked at
        try:
            examples = len(dataset)
        except TypeError:
            raise ValueError(
                "the training set has no length, so the N that the prior's penalty is divided by is not known. "
                f"{self._how_to_pass_n()} the number of different training examples (label tokens for a loss that is a mean "
                "over tokens)."
            ) from None
        return self._num_labels() if what == "labels" else examples

    def _num_labels(self) -> int:
        """Labels of the training set that the loss counts; one pass over each data set."""
        dataset = self.train_dataset
        found = next((count for counted, count in self._label_counts if counted is dataset), None)
        if found is None:
            found = count_labels(
                dataset,
                self._get_collator_with_removed_columns(self.data_collator, description="Training"),
                ignore_index=lambda labels: ignore_index_of(self.model, labels),
                shifted=bool(getattr(self, "_loss_shifts_labels", False)),
                batch_size=self.args.per_device_train_batch_size,
                workers=self.args.dataloader_num_workers,
                rank=self.args.process_index,
                world_size=self.args.world_size,
                device=self.args.device,
            )
            self._label_counts = [*self._label_counts[-1:], (dataset, found)]
            logger.info(f"Prior: {found:,} labels count in the training set.")
        return found

    def _how_to_pass_n(self) -> str:
        name = type(self.args).__name__
        if hasattr(self.args, "prior_num_examples"):
            return f"Pass {name}(prior_num_examples=...):"
        return (
            f"{name} has no prior_num_examples: use PriorTrainingArguments, or a class of your own, '@dataclass class "
            f"Prior{name}(PriorArgumentsMixin, {name})', and pass prior_num_examples=...:"
        )

    def _refuse_impossible_setups(self) -> None:
        if getattr(self, "is_deepspeed_enabled", False):
            raise ValueError("DeepSpeed partitions gradients in its own engine, where the prior cannot add its own: use FSDP2.")
        name = str(getattr(self.args.optim, "value", self.args.optim)).lower()
        if name in ("lomo", "adalomo") or "layerwise" in name:
            raise ValueError(_STEPS_IN_BACKWARD.format(f"optim={name!r}"))

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """As Trainer; a fresh model starts from the prior's mean."""
        model: nn.Module = super().call_model_init(trial)
        if self.prior is not None and self._starts_at_the_mean():
            self._initialize(model)
        return model

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """As Trainer, without the parameters that a prior holds already."""
        names: list[str] = super().get_decay_parameter_names(model)
        if not self._covered_names:
            return names
        canonical = raw_names(model)
        return [name for name in names if canonical.get(name) not in self._covered_names]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As Trainer; an optimizer that decays covered parameters, or steps inside backward, is refused."""
        if self.prior is not None:
            reshard(self.model)  # else the optimizer would get the full tensors that an evaluation leaves, which nobody uses
        if self.sampling is not None and self.optimizer is None:
            model = args[0] if args else kwargs.get("model") or self.model
            self.optimizer = self._make_sampler(model)
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        if self.prior is not None:
            for kind in type(getattr(optimizer, "optimizer", optimizer)).__mro__:
                if kind.__name__.lower() in ("lomo", "adalomo", "layerwisedummyoptimizer"):
                    raise ValueError(_STEPS_IN_BACKWARD.format(f"the optimizer, {kind.__name__},"))
            self._refuse_double_decay(optimizer)
        return optimizer

    def _refuse_double_decay(self, optimizer: torch.optim.Optimizer) -> None:
        names = raw_names(self.model)
        covered = {id(p): names[raw] for raw, p in self.model.named_parameters() if names.get(raw) in self._covered_names}
        for group in optimizer.param_groups:
            decay = group.get("weight_decay", 0) or 0
            decayed = [covered[id(p)] for p in group["params"] if id(p) in covered] if decay else []
            if decayed:
                raise ValueError(
                    f"the optimizer decays {len(decayed)} parameters that are under the prior ({decayed[0]!r}, weight_decay="
                    f"{decay}): they would be pulled to zero as well as to the prior's mean. Give them weight_decay=0 (note "
                    "that torch.optim.AdamW decays by 0.01 unless told otherwise), or let PriorTrainer make the optimizer."
                )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer; with `prior_scale="auto"` a rehearsal before it chooses the scale (see `ScaleChoice`).

        The prior leaves the optimizer when training ends, however it ends.
        """
        self._written = set()
        if self._sampler() is not None and self._schedule is not None:
            self.optimizer = self.lr_scheduler = None  # made anew, from the settings as they are now
        if self.prior is not None:
            resumed = kwargs.get("resume_from_checkpoint", args[0] if args else None)
            trial = kwargs.get("trial", args[1] if len(args) > 1 else None)
            self._choose_scale(resumed, trial)
        return self._train_as_it_is(*args, **kwargs)

    def _train_as_it_is(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().train(*args, **kwargs)
        finally:
            self._detach()

    def _choose_scale(self, resumed: str | bool | None, trial: Any) -> None:
        """What "auto" comes to in the training that is about to begin."""
        auto, auto_head = self._asked_for("prior_scale"), self._asked_for("prior_head_variance")
        self.prior_scale_choice = None
        if not (auto or auto_head) or trial is not None:  # a search's trial may still set a number: see _begin
            return
        if resumed:
            folder = get_last_checkpoint(self.args.output_dir) if resumed is True else resumed
            if folder is None:
                raise ValueError(f"No valid checkpoint found in output directory ({self.args.output_dir})")  # as Trainer
            self.prior_scale_choice = read_choice(folder)
            if self.prior_scale_choice is None:
                raise ValueError(
                    f"training resumes from {folder}, which does not say which scale prior_scale='auto' had chosen "
                    "(prior_scale.json is missing): pass the number."
                )
        else:
            scale = None if auto else self._prior_settings["prior_scale"]
            given = self.prior_penalty.gaussian.scale if self.prior_penalty is not None else None
            self.prior_scale_choice = walk(self, scale=None if auto else scale or given, auto_head=auto_head)
            if self.is_world_process_zero():
                _write_or_warn(self.args.output_dir, self.prior_scale_choice)
                if self._speaks():
                    asked = "prior_scale" if auto else "prior_head_variance"
                    logger.warning_advice(f"{asked}='auto': {self.prior_scale_choice.report()}")
        self._bind()  # which parameters are under the head prior is asked before training begins

    # --------------------------------------------------------------------------------------------------- the one seam

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """As Trainer, then the prior's gradient / N into `p.grad`, once per optimizer step."""
        if self.prior_penalty is None:
            plain: Tensor = super().training_step(model, inputs, num_items_in_batch)
            return plain
        if not self._probed:
            self._probed = True
            self._refuse_unknown_n(inputs)
            self._probe_loss_scaling(model, inputs, num_items_in_batch)
        if self._ignores_item_count:
            num_items_in_batch = None
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        nll = loss.detach().to(torch.promote_types(loss.dtype, torch.float32))  # bfloat16 would lose a sum over steps
        self._nll_total = nll.clone() if self._nll_total is None else self._nll_total + nll
        if not self.accelerator.sync_gradients:
            return loss
        if self.prior_update == "flow":  # the sampler's own step holds the prior
            share = self.prior_penalty.penalty() / self.prior_penalty.num_examples
        elif self._proximal is None:
            scaler = getattr(self.accelerator, "scaler", None)
            factor = scaler.get_scale() if scaler is not None and scaler.is_enabled() else 1.0
            share = self.prior_penalty.add_gradient_(factor)
        else:  # the optimizer's step will be followed by the prior's
            share = self._proximal.value()
        share = share.to(device=nll.device, dtype=nll.dtype)
        self._prior_total = share if self._prior_total is None else self._prior_total + share
        self._prior_steps += 1
        return nll + share

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """As Trainer; the prior's implicit step is shortened by as much as the gradient. Not while a posterior is sampled."""
        if self.sampling is not None and (self.sampling.metric != "identity" or self._is_at_temperature()):
            # At a temperature the stationary law would be another one. And where the prior's own metric makes a stiff prior
            # harmless, most of the gradient's norm is the prior's, and clipping would switch the prior off.
            return None
        norm = super()._clip_grad_norm(model)
        if self._proximal is not None and norm is not None:
            self._proximal.clipped(norm, self.args.max_grad_norm)
        return norm

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As Trainer; beside `loss` stand `nll` and `prior_loss` (penalty / N), the means over the same steps."""
        if "loss" in logs and self._prior_steps and self._nll_total is not None and self._prior_total is not None:
            nll = self.accelerator.gather(self._nll_total.reshape(1)).mean().item()
            logs["nll"] = nll / self._prior_steps
            logs["prior_loss"] = self._prior_total.item() / self._prior_steps
            self._reset_totals()
            sampler = self._sampler()
            if sampler is not None:
                last = max(0, self._steps_of_the_chain() - 1)  # the scheduler has gone on already
                sampling = self._schedule is None or self._schedule.is_sampling(last)
                group = sampler.param_groups[0]
                logs["temperature"] = float(group.get("initial_temperature", group["temperature"])) if sampling else 0.0
                if sampler.effective_temperature() is not None:
                    logs["effective_temperature"] = float(sampler.effective_temperature() or 0.0)
        super().log(logs, *args, **kwargs)

    def _reset_totals(self) -> None:
        self._nll_total = self._prior_total = None
        self._prior_steps = 0

    def _begin(self) -> None:
        """Training begins: the model is wrapped, sharded and resumed, the optimizer made."""
        self._reset_totals()
        self._probed = False
        self._detach()
        penalty = self._bind()
        optimizer: Any = getattr(self.optimizer, "optimizer", self.optimizer)  # without accelerate's wrapper
        asked = self._prior_settings["prior_update"]
        if self.prior_scale_choice is None and (self._asked_for("prior_scale") or self._asked_for("prior_head_variance")):
            raise ValueError(
                "prior_scale='auto' (or prior_head_variance='auto') does not go into the trials of a hyperparameter search: "
                "let the search set a number, e.g. trial.suggest_float('prior_scale', 1e0, 1e6, log=True)."
            )
        if self.sampling is not None:
            self._begin_sampling(penalty, optimizer)
            return
        if self._searching and asked == "auto":  # priors of all scales follow
            asked = "implicit" if can_step_implicitly(optimizer) and not penalty.adapters else "gradient"
        self.prior_update, reason = chosen_update(asked, penalty, optimizer)
        if asked == "auto" and self._speaks():
            logger.warning_advice(f"prior_update='auto' takes the {self.prior_update} form: {reason}.")
        if self.prior_update == "implicit":
            self._proximal = penalty.attach(optimizer)
            return
        if self._searching:  # leaves out what would be unstable
            return
        penalty.warn_if_unstable(highest_rate(optimizer))

    def _detach(self) -> None:
        """Training has ended, or begins anew: a later optimizer step of somebody else is none of the prior's business."""
        if self._proximal is not None:
            self._proximal.remove()
            self._proximal = None

    # -------------------------------------------------------------------------------------------------------- sampling

    @property
    def sampling(self) -> Sampling | None:
        """How the posterior is sampled, as the arguments have it now; None for one MAP solution."""
        if not isinstance(self.args, SamplingArgumentsMixin) or self.args.sampler is None:
            return None
        return Sampling(**{name: getattr(self.args, name) for name in Sampling.__dataclass_fields__})

    @property
    def samples_folder(self) -> Path:
        """Where the samples of all chains are."""
        return Path(self._get_output_dir(trial=getattr(self, "_trial", None))) / "samples"

    def _sampler(self) -> Sampler | None:
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return optimizer if isinstance(optimizer, Sampler) else None

    def _steps_of_the_chain(self) -> int:
        """Steps that the optimizer has taken; a GradScaler skips some of Trainer's."""
        return int(self.lr_scheduler.last_epoch)

    def _is_at_temperature(self) -> bool:
        sampler = self._sampler()
        return sampler is not None and any(float(group["temperature"]) > 0 for group in sampler.param_groups)

    def _refuse_what_falsifies_the_law(self, sampling: Sampling) -> None:
        if self.args.weight_decay:
            raise ValueError(
                f"weight_decay={self.args.weight_decay} beside a sampler would be a second prior that nobody asked for: use 0, "
                "and prior_head_variance for the new parameters (weight decay w is a variance of 1 / (N w))."
            )
        if self._prior_settings["prior_update"] == "implicit":
            raise ValueError(
                "prior_update='implicit' is a step for optimizers: with it a chain has another law. sampler='baoa' is stable "
                "at any scale, with the right one."
            )
        auxiliary = getattr(unwrapped(self.model), "auxiliary_head", None)
        if isinstance(auxiliary, nn.Module):
            weight = getattr(getattr(self.model, "config", None), "auxiliary_loss_weight", "some share")
            raise ValueError(
                f"{type(self.model).__name__} adds {weight} times the loss of an auxiliary head to its own: both would be "
                "sampled as one likelihood, and the average predicts with one head only. Make the model with "
                "use_auxiliary_head=False."
            )
        if self.optimizer is not None or self.lr_scheduler is not None or self.optimizer_cls_and_kwargs is not None:
            raise ValueError("a sampler is an optimizer with a schedule of its own: pass no other beside sampler=...")
        if self.args.label_smoothing_factor:
            raise ValueError("label_smoothing_factor changes the likelihood that is sampled: use 0 with a sampler.")
        if self.args.warmup_steps:
            raise ValueError("warmup_steps has no effect on a sampler, whose exploration comes first: use exploration.")
        if getattr(self.args, "neftune_noise_alpha", None) is not None:
            raise ValueError("neftune_noise_alpha changes the likelihood that is sampled: leave it out with a sampler.")
        if "_bma_" in (self.args.metric_for_best_model or ""):
            raise ValueError(
                f"metric_for_best_model={self.args.metric_for_best_model!r}: averages are evaluated after training only."
            )
        if sampling.metric != "identity" and self.args.learning_rate == 5e-5:
            warnings.warn(
                "learning_rate is transformers' default, 5e-5. In units in which the prior has variance 1, as "
                f"sampler={sampling.sampler!r} takes it, that is far too small: try 0.01 to 1.",
                PriorWarning,
                stacklevel=4,
            )

    def _make_sampler(self, model: nn.Module) -> Sampler:
        assert self.sampling is not None  # noqa: S101
        assert self.prior_penalty is not None  # noqa: S101
        names = raw_names(model)
        pairs = [(names.get(raw), p) for raw, p in model.named_parameters() if p.requires_grad]
        body = [p for name, p in pairs if name in self.prior_penalty.match.pairs.values()]
        head = [p for name, p in pairs if name not in self.prior_penalty.match.pairs.values()]
        groups = [{"params": part} for part in (body, head) if part]
        return self.sampling.make(groups, self.args.learning_rate, num_data=self._num_examples(), seed=self.args.seed)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """As Trainer; a sampler has its own schedule of learning rate and temperature."""
        if self.sampling is None:
            return super().create_scheduler(num_training_steps, optimizer)
        if self.lr_scheduler is None:
            self._schedule = self.sampling.schedule(num_training_steps)
            self.lr_scheduler = SamplingScheduler(self.optimizer if optimizer is None else optimizer, self._schedule)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _begin_sampling(self, penalty: PriorPenalty, sampler: Sampler) -> None:
        """Training begins under a sampler."""
        assert self.sampling is not None  # noqa: S101
        self.sampling.bind(sampler, penalty)
        self.prior_update = "flow" if self.sampling.metric == "full" else "gradient"
        if self.sampling.metric == "identity":
            penalty.warn_if_unstable(highest_rate(sampler))
        chain, step = self.sampling.chain, self._steps_of_the_chain()
        self._refuse_a_broken_chain(sampler, step)
        self._warn_of_dropout()
        self._frozen = frozen_digest(self.model)
        there = list_samples(self.samples_folder, chain=chain)
        if there and step == 0 and there[0].path.parent not in self._written:
            raise ValueError(
                f"{there[0].path.parent} has {len(there)} samples of an earlier run. Pass resume_from_checkpoint to go on with "
                f"it, another chain (chain={chain + 1}) or output_dir, or delete the folder."
            )
        if self.is_world_process_zero():
            remove_samples(self.samples_folder, chain=chain, after=step)  # made again, the same
        self.accelerator.wait_for_everyone()

    def _refuse_a_broken_chain(self, sampler: Sampler, step: int) -> None:
        """A resumed chain goes on as it was, or not at all."""
        assert self.sampling is not None  # noqa: S101
        if self.state.global_step > 0 and step == 0:
            raise ValueError(
                f"training resumes at step {self.state.global_step} from a checkpoint without optimizer and scheduler "
                "(save_only_model), which would begin the chain anew at that step: resume from a whole one, or start anew."
            )
        for group in sampler.param_groups if step else ():
            wanted = {"temperature": ("initial_temperature", self.sampling.temperature)}
            wanted |= {
                "learning_rate": ("initial_lr", self.args.learning_rate),
                "friction": ("friction", self.sampling.friction),
            }
            for name, (key, value) in wanted.items():
                if key in group and float(group[key]) != value:
                    raise ValueError(
                        f"the checkpoint's chain has {name} {group[key]}, the arguments {value}: "
                        "resume with the same, or begin another chain."
                    )

    def _warn_of_dropout(self) -> None:
        rates = [getattr(m, "p", getattr(m, "drop_prob", 0.0)) or 0.0 for m in self.model.modules() if _drops(m)]
        if any(rate > 0 for rate in rates):
            warnings.warn(
                f"the model has dropout (up to {max(rates):g}), which adds noise to the gradients and samples another loss "
                "than the one that is evaluated: set it to 0 with a sampler (hidden_dropout_prob=0.0 and the like).",
                PriorWarning,
                stacklevel=3,
            )

    def _batch_norm_batches(self) -> list[Any] | DataLoader[Any] | None:
        """Batches of training data for BatchNorm statistics: random, the same each time, this rank's share of them.

        None where a pass would take them from the training itself (a stream), or there is no data set to take them from.
        """
        assert self.sampling is not None  # noqa: S101
        dataset: Any = self.train_dataset
        if dataset is None or isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            return None
        generator = torch.Generator().manual_seed(self.args.seed)
        order = torch.randperm(len(dataset), generator=generator).tolist()
        size = int(self.args.train_batch_size)
        batches = [order[i : i + size] for i in range(0, len(order), size)][: self.sampling.sample_batch_norm_batches]
        if len(batches) > 1 and len(batches[-1]) < size:
            batches.pop()  # all batches count the same
        world, rank = self.args.world_size, self.args.process_index
        mine = batches[rank::world] or batches[:1]
        collate = self.data_collator
        if hasattr(dataset, "set_format") and hasattr(dataset, "column_names"):
            dataset = self._remove_unused_columns(dataset, description="BatchNorm")
        else:
            collate = self._get_collator_with_removed_columns(collate, description="BatchNorm")
        workers = self.args.dataloader_num_workers
        return DataLoader(dataset, batch_sampler=mine, collate_fn=collate, num_workers=workers)

    def _take_sample(self, step: int, cycle: int) -> None:
        model, sampler = self.model, self._sampler()
        assert self.sampling is not None  # noqa: S101
        assert self.prior_penalty is not None  # noqa: S101
        assert sampler is not None  # noqa: S101
        reshard(model)
        buffers = None
        batches = self._batch_norm_batches() if has_batch_norm(model) else None
        if batches is not None:
            # a pass over the training data that leaves no trace: neither in the global random state nor in its loader's
            devices = [self.args.device] if self.args.device.type == "cuda" else []
            with torch.random.fork_rng(devices):
                torch.manual_seed(self.args.seed)
                buffers = over_ranks(recompute_batch_norm(model, batches, progress=False, in_training_mode_only=True))
            reshard(model)
        sample = write_sample(
            self.samples_folder,
            model,
            step=step,
            chain=self.sampling.chain,
            buffers=buffers,
            frozen=self._frozen,
            cycle=cycle,
            sampler=self.sampling.sampler,
            learning_rate=sampler.param_groups[0]["lr"],
            temperature=sampler.param_groups[0]["initial_temperature"],
            effective_temperature=sampler.effective_temperature(),
            num_data=sampler.num_data,
            scale=self.prior_penalty.gaussian.scale,
        )
        self._written.add(sample.path.parent)

    def _has_average(self) -> bool:
        """Whether there are samples to average over; not in the middle of training, where each evaluation would be S."""
        searching = getattr(self, "hp_search_backend", None) is not None  # its objective is the sum of all metrics
        if self.sampling is None or self.is_in_train or searching or self._average is not None:
            return False
        if not list_samples(self.samples_folder):
            return False
        if self._frozen is None:
            self._frozen = frozen_digest(self.model)  # now: evaluation in bfloat16 casts the model for good
        return True

    @contextmanager
    def averaging(self) -> Iterator[BayesianModelAverage]:
        """Within, evaluation and prediction are by the average over the samples; the model has its own weights afterwards."""
        average = BayesianModelAverage.from_folder(self.samples_folder, self.model, frozen=self._frozen)
        if sum(sample.path.stat().st_size for sample in list_samples(self.samples_folder)) <= _KEPT_BYTES:
            average.members = [member.read() for member in average.members]
        with average.own_weights_kept():
            self._average, self._compared = average, False
            try:
                yield average
            finally:
                self._average = None

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        **more: Any,
    ) -> dict[str, float]:
        """As Trainer; where there are samples, the figures of their average stand beside (`eval_bma_loss`, ...)."""
        has_average = self._has_average()
        metrics: dict[str, float] = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix, **more)
        datasets = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(datasets, dict) or not has_average:  # a dictionary comes here again, one by one
            return metrics
        try:
            with self.averaging():
                own: dict[str, float] = super().evaluate(eval_dataset, ignore_keys, f"{metric_key_prefix}_bma", **more)
        except _NoAverageError as reason:
            _warn_without_average(reason)
            return metrics
        return metrics | own

    def predict(
        self,
        test_dataset: Any,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "test",
        **more: Any,
    ) -> Any:
        """As Trainer; where there are samples, predictions are their average's log-probabilities, `test_bma_...` beside."""
        has_average = self._has_average()
        single = super().predict(test_dataset, ignore_keys, metric_key_prefix, **more)
        if not has_average:
            return single
        try:
            with self.averaging():
                output = super().predict(test_dataset, ignore_keys, f"{metric_key_prefix}_bma", **more)
        except _NoAverageError as reason:
            _warn_without_average(reason)
            return single
        return output._replace(metrics={**single.metrics, **output.metrics})

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **more: Any,
    ) -> tuple[Tensor | None, Any, Any]:
        """As Trainer; within `averaging()` the loss is the NLL of the average, and the logits its log-probabilities."""
        average = self._average
        if average is None:
            step: tuple[Tensor | None, Any, Any]
            step = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys, **more)
            return step
        whole: Any = unwrapped(self.model)
        if hasattr(whole, "can_generate") and whole.can_generate():
            raise _NoAverageError("a model that generates text shifts its labels against its logits")
        labels: Any = None
        seen: list[Tensor] = []  # a few of each member's predictions, of the first batch

        def members() -> Iterator[Tensor]:
            nonlocal labels
            for member in average.members:
                average.put(member)
                found = super(PriorTrainerMixin, self).prediction_step(model, dict(inputs), False, ignore_keys, **more)
                _, logits, labels = found
                first = logits[0] if isinstance(logits, (tuple, list)) else logits
                _refuse_other_tasks(first, labels)
                if not self._compared:
                    seen.append(first[:8].softmax(class_dimension(first)).movedim(class_dimension(first), 1))
                yield enlarged(first, labels) if isinstance(labels, Tensor) else first

        found = averaged(members()).log_probabilities
        if len(seen) > 1:
            warn_without_variability(torch.stack(seen))
        self._compared = True
        loss = None
        if isinstance(labels, Tensor):
            loss = nll_of(found, labels, ignore_index_of(self.model, labels))
        return (loss, None, None) if prediction_loss_only else (loss, found, labels)

    # ---------------------------------------------------------------------------------------------------------- checks

    def _refuse_unknown_n(self, inputs: Mapping[str, Any]) -> None:
        """A mean over tokens or pixels has another N than the number of examples, and only the user knows it."""
        labels: Any = inputs.get("labels") if isinstance(inputs, Mapping) else None
        dense = isinstance(labels, Tensor) and labels.ndim >= 2 and not labels.is_floating_point()
        if dense and self._prior_settings["prior_num_examples"] is None and self._prior_settings["prior_count"] is None:
            raise ValueError(
                f"labels have shape {tuple(labels.shape)}: the loss is a mean over tokens or pixels, so it must be said what "
                f"counts as one observation. {self._how_to_pass_n()} the number N itself, or in its place prior_count='labels' "
                "(every token or pixel that is not ignored, as if they were independent) or prior_count='examples' (each image "
                "or text once: a prior as many times stronger as there are labels in one)."
            )

    @torch.no_grad()
    def _probe_loss_scaling(self, model: nn.Module, inputs: dict[str, Any], num_items: Any) -> None:
        """Does the loss halve when num_items_in_batch doubles? If not, Trainer over-counts it, and the prior looks weak.

        Many models accept the argument and ignore it; Trainer then neither divides by the accumulation steps nor averages
        over ranks (transformers issue 47688).
        """
        windows = self.args.gradient_accumulation_steps * self.args.world_size * max(1, self.args.n_gpu)
        asked = self.model_accepts_loss_kwargs and self.compute_loss_func is None
        decided = getattr(self, "loss_is_scaled_for_ga", None) is not None
        if windows == 1 or not asked or decided or num_items is None:
            return
        training = model.training
        prepared = self._prepare_inputs(inputs)
        model.eval()
        try:
            with torch.random.fork_rng(), self.compute_loss_context_manager():
                once = self.compute_loss(model, dict(prepared), num_items_in_batch=num_items)
                twice = self.compute_loss(model, dict(prepared), num_items_in_batch=2 * num_items)
        finally:
            model.train(training)
        single, double = float(once.float().mean()), float(twice.float().mean())
        if not math.isfinite(single) or single == 0.0 or abs(double - single / 2) <= 1e-3 * abs(single):
            return
        self._ignores_item_count = True
        self.model_accepts_loss_kwargs = False
        warnings.warn(
            f"{type(self.model).__name__} ignores num_items_in_batch, so Trainer would count its loss {windows} times "
            "(gradient accumulation steps x processes) against one prior. Corrected: model_accepts_loss_kwargs=False.",
            PriorWarning,
            stacklevel=2,
        )


class _NoAverageError(Exception):
    """Why the predictions of samples cannot be averaged as probabilities."""


def _warn_without_average(reason: _NoAverageError) -> None:
    warnings.warn(
        f"no average over the samples here, only the single model: {reason}. BayesianModelAverage(..., logits=...) can still "
        "average what you take from the model's output.",
        PriorWarning,
        stacklevel=3,
    )


def _refuse_other_tasks(logits: Any, labels: Any) -> None:
    """Averages are of class probabilities: one integer label for each of them."""
    if not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.ndim not in (2, 3, 4):
        raise _NoAverageError("the model's first output are no logits of classes")
    if labels is None:
        return
    if not isinstance(labels, Tensor):
        raise _NoAverageError("there are several kinds of labels")
    kept = (logits.shape[0], *logits.shape[2:]) if logits.ndim == 4 else logits.shape[:-1]
    fits = labels.shape == kept or (logits.ndim == 4 and labels.ndim == 3)
    if labels.is_floating_point() or not fits:
        raise _NoAverageError("labels are not one class each (regression, or several classes at once)")


def _with_settings(settings: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a Trainer with other TrainingArguments."""
    if len(args) > 1:
        return (args[0], settings, *args[2:]), kwargs
    return args, {**kwargs, "args": settings}


def _drops(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.dropout._DropoutNd) or type(module).__name__.endswith("DropPath")


def _write_or_warn(folder: str | os.PathLike[str], choice: ScaleChoice) -> None:
    """The search is paid for, and other ranks go on: a disk that cannot be written to is no reason to stop."""
    try:
        write_choice(folder, choice)
    except OSError as error:
        warnings.warn(
            f"prior_scale.json cannot be written to {folder} ({error}): a run that resumes from there has to be given "
            f"prior_scale={choice.scale!r} and prior_head_variance={choice.head_variance!r} as numbers.",
            PriorWarning,
            stacklevel=3,
        )


class _BindPrior(TrainerCallback):
    """Binds the prior anew when training begins."""

    def __init__(self, trainer: PriorTrainerMixin) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainer's event."""
        del args, state, control, kwargs
        self._trainer._begin()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainer's event: a run that goes on from the checkpoint keeps the scale."""
        del control, kwargs
        choice = self._trainer.prior_scale_choice
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if choice is not None and args.should_save and folder.is_dir():
            _write_or_warn(folder, choice)


class _TakeSamples(TrainerCallback):
    """Takes samples of the posterior when they are due, and measures the temperature where sampling begins."""

    def __init__(self, trainer: PriorTrainerMixin) -> None:
        self._trainer = trainer
        self._done = 0  # steps that were looked at

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainer's event."""
        del args, state, control, kwargs
        self._done = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainer's event."""
        del args, state, control, kwargs
        schedule, sampler = self._trainer._schedule, self._trainer._sampler()
        if schedule is None or sampler is None:
            return
        step = self._trainer._steps_of_the_chain()
        if step == self._done:  # a GradScaler skipped the step
            return
        self._done = step
        if step in schedule.sample_after:
            self._trainer._take_sample(step, schedule.sample_after[step])
        if schedule.begins_to_sample(step):  # where the learning rate is highest, and minibatches heat most
            sampler.measure()


class PriorTrainer(PriorTrainerMixin, Trainer):
    """The Hugging Face `Trainer` with a prior: `PriorTrainer(model=model, prior="org/name", args=..., ...)`."""
