"""`PriorTrainer`: the Hugging Face `Trainer` with a prior in its loss.

The prior's gradient is added in `training_step`, after backward and the reduction over ranks are done and before clipping,
and only on the micro-batch whose gradients the optimizer will use (`accelerator.sync_gradients`). There it counts exactly
once per optimizer step under gradient accumulation, short last windows, clipping, fp16 scaling, DDP and FSDP2. Evaluation
loss stays the plain NLL.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.utils import logging

from prior_hub.distributed import reshard
from prior_hub.errors import PriorWarning
from prior_hub.finetuning.penalty import PriorPenalty
from prior_hub.finetuning.proximal import UPDATES, ProximalStep, chosen_update, highest_rate
from prior_hub.model import PriorModel
from prior_hub.priors.matching import NameMap, raw_names

__all__ = ["PriorTrainer", "PriorTrainerMixin"]

logger = logging.get_logger(__name__)

if TYPE_CHECKING:
    _TrainerBase: Any = Trainer  # what the mixin is mixed into
else:
    _TrainerBase = object

_DEFAULTS: dict[str, Any] = {
    "prior_scale": None,
    "prior_rank": None,
    "prior_head_variance": None,
    "prior_update": "auto",
    "prior_num_examples": None,
    "prior_initialize": True,
    "prior_include_head": False,
    "prior_on_mismatch": "error",
    "prior_min_coverage": 0.5,
    "prior_revision": None,
    "prior_subfolder": None,
}

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
        PriorMatchError: prior and model do not fit, or every covered parameter is frozen (LoRA).
        ValueError: N is not known, or a setup in which the prior's gradient cannot be right (DeepSpeed, optimizers that
            step inside backward, weight decay on covered parameters, FSDP version 1).
    """

    model_accepts_loss_kwargs: bool
    prior_update: str | None  # "gradient" or "implicit": how the prior entered the last training, None before it

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
        self._proximal: ProximalStep | None = None
        self._nll_total: Tensor | None = None
        self._prior_total: Tensor | None = None
        self._prior_steps = 0
        self._probed = False
        self._ignores_item_count = False
        if chosen is not None:
            self.prior = self._load_prior(chosen, getattr(settings, "hub_token", None))
        super().__init__(*args, **kwargs)
        if self.prior is None:
            return
        self._refuse_impossible_setups()
        if self._prior_settings["prior_update"] not in UPDATES:
            raise ValueError(
                f"prior_update is {self._prior_settings['prior_update']!r}, expected one of {', '.join(map(repr, UPDATES))}."
            )
        penalty = self._bind()  # first: what is refused leaves the model as it came
        if self.model_init is None and self._starts_at_the_mean():
            reshard(self.model)  # after an evaluation FSDP2's root group holds full tensors in place of its parameters
            self.prior.initialize(self.model, **self._matching())
        logger.info(f"Prior: {penalty.report()}")
        self.add_callback(_BindPrior(self))

    # ---------------------------------------------------------------------------------------------------------- set-up

    @property
    def _prior_settings(self) -> dict[str, Any]:
        """Read anew each time: a hyperparameter search writes into `self.args` between two runs."""
        return {key: getattr(self.args, key, default) for key, default in _DEFAULTS.items()}

    def _load_prior(self, prior: str | os.PathLike[str] | PriorModel, token: str | None) -> PriorModel:
        if isinstance(prior, PriorModel):
            return prior
        return PriorModel.from_pretrained(
            prior,
            revision=self._prior_settings["prior_revision"],
            subfolder=self._prior_settings["prior_subfolder"],
            token=token,
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
            head_variance=self._prior_settings["prior_head_variance"],
            **self._matching(),
        )
        self._covered_names = self.prior_penalty.covered_names
        return self.prior_penalty

    def _num_examples(self) -> int:
        given = self._prior_settings["prior_num_examples"]
        if given is not None:
            return int(given)
        dataset = self.train_dataset
        if dataset is None:
            return 1  # nothing to train on: the prior is only bound to be looked at
        try:
            return len(dataset)
        except TypeError:
            raise ValueError(
                "the training set has no length, so the N that the prior's penalty is divided by is not known. "
                f"{self._how_to_pass_n()} the number of different training examples (label tokens for a loss that is a mean "
                "over tokens)."
            ) from None

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
            self.prior.initialize(model, **self._matching())
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
        """As Trainer; the prior leaves the optimizer when training ends, however it ends."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self._detach()

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
        if self._proximal is None:
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
        """As Trainer; the prior's implicit step is shortened by as much as the gradient."""
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
        self.prior_update, reason = chosen_update(asked, penalty, optimizer)
        if asked == "auto" and self.is_world_process_zero() and logging.get_verbosity() <= logging.WARNING:
            logger.warning_advice(f"prior_update='auto' takes the {self.prior_update} form: {reason}.")
        if self.prior_update == "implicit":
            self._proximal = penalty.attach(optimizer)
            return
        penalty.warn_if_unstable(highest_rate(optimizer))

    def _detach(self) -> None:
        """Training has ended, or begins anew: a later optimizer step of somebody else is none of the prior's business."""
        if self._proximal is not None:
            self._proximal.remove()
            self._proximal = None

    # ---------------------------------------------------------------------------------------------------------- checks

    def _refuse_unknown_n(self, inputs: Mapping[str, Any]) -> None:
        """A mean over tokens or pixels has another N than the number of examples, and only the user knows it."""
        labels: Any = inputs.get("labels") if isinstance(inputs, Mapping) else None
        dense = isinstance(labels, Tensor) and labels.ndim >= 2 and not labels.is_floating_point()
        if dense and self._prior_settings["prior_num_examples"] is None:
            raise ValueError(
                f"labels have shape {tuple(labels.shape)}: the loss is a mean over tokens or pixels, so N is their number, "
                f"not the number of examples. {self._how_to_pass_n()} the label tokens in the training set (without ignored "
                "ones), or the images if each is to count as one observation."
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


class _BindPrior(TrainerCallback):
    """Binds the prior anew when training begins."""

    def __init__(self, trainer: PriorTrainerMixin) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainer's event."""
        del args, state, control, kwargs
        self._trainer._begin()


class PriorTrainer(PriorTrainerMixin, Trainer):
    """The Hugging Face `Trainer` with a prior: `PriorTrainer(model=model, prior="org/name", args=..., ...)`."""
