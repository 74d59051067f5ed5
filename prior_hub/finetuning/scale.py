"""How wide a prior should be, found on a held-out part of the training set.

    width = tr(Sigma) / |mean|^2        expected squared distance of a draw from the mean, against the squared norm of the mean

`prior_scale="auto"`: a rehearsal before the training, with a fifth of the training set held out. The prior begins so narrow
(width 1e-3) that the weights stay where they are, and is widened by half decades to a width of 1e3, where it is practically
none. Every rung goes on from the weights of the last one, with a learning rate that falls to zero (constant, if the training's
is), and ends with the NLL of the held-out examples: a regularisation path. The scale with the lowest NLL (smoothed over
neighbours) is what the path proposes. It costs about as much as the training, at least 8 and at most 100 steps a rung.

A rung is much shorter than the training, and does not see what a long training overfits. So the proposal is checked by a whole
training on the four fifths. Where that ends no worse than the path was at this scale, the scale is taken. Where it ends worse,
narrower priors, a decade apart, are trained under as long as that improves, at most `prior_scale_checks` trainings in all (4; 0
for the path alone; none where the training is shorter than the path up to there, and cannot overfit more). Then everything is
put back and the training itself runs on all examples. `find_scale` does it without.

No callback of yours has a part in it, early stopping and `load_best_model_at_end` neither: where they keep a training from
overfitting, the checks do not know, and `prior_scale_checks=0` leaves them out.

The held-out examples must be new to the model: it should start from the prior's mean (`prior_initialize`, the default) or from
other weights, the head's too, that were not fitted to this training set, and not be trained a second time. With label smoothing
the NLL is the smoothed one. A subclass's `get_train_dataloader` must use `self.train_dataset`.

`prior_head_variance="auto"` does the same with the variance of the new parameters, before, under the narrowest prior.

`select_scale`: the grid of the literature. Every candidate is a whole training on four fifths, measured on the fifth.

A joint MAP estimate of weights and scale is degenerate (the scale goes to 0 as the weights go to the mean), and the moment and
evidence estimates of the model linearised at the mean do not see what fine-tuning gains: benchmarks/transfer/README.md.

Source: the path is that of Friedman, Hastie and Tibshirani 2010 (glmnet), section 2.5, run from strong to weak regularisation.
Differs: for each rung a few steps of the user's own optimizer, not a solution; the checks are ours.
"""

from __future__ import annotations

import copy
import json
import math
import os
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import IterableDataset, Subset
from tqdm.auto import tqdm
from transformers import DefaultFlowCallback, TrainerCallback

from prior_hub.distributed import is_sharded
from prior_hub.errors import PriorFormatError, PriorNumericsError
from prior_hub.finetuning.proximal import highest_rate
from prior_hub.priors.gaussian import LowRankGaussian

if TYPE_CHECKING:
    from prior_hub.finetuning.trainer import PriorTrainerMixin

__all__ = ["AUTO", "ScaleChoice", "ScaleTrial", "find_scale", "number_or_auto", "scale_ladder", "select_scale"]

AUTO = "auto"
FILE_NAME = "prior_scale.json"
WIDTHS = (1e-3, 1e3)
HEAD_VARIANCES = tuple(10 ** (k / 2) for k in range(-5, 3))  # 0.003 to 10
PER_DECADE = 2
STEPS_PER_RUNG = (8, 100)  # at least and at most
_FORWARD = ("forward", "_original_forward", "_is_accelerate_prepared")  # accelerate wraps it, and the flag says that it has
_PREPARED = ("_models", "_optimizers", "_schedulers", "_dataloaders")  # what accelerate remembers
_DATA = ("train_dataset", "eval_dataset")
_FOUND_OUT = ("_ignores_item_count", "model_accepts_loss_kwargs", "_label_counts")  # of model and data, and told once


@dataclass(frozen=True)
class ScaleTrial:
    """One candidate: its scale, the variance of the head prior (None: there was none), the held-out NLL in nats per example."""

    scale: float
    head_variance: float | None
    nll: float


@dataclass(frozen=True)
class ScaleChoice:
    """What was tried and what was taken.

    Attributes:
        scale: the chosen scale.
        head_variance: the chosen, or given, variance of the head prior; None without one.
        trials: in the order in which they were measured; of a path, its rungs.
        held_out: examples held out.
        num_examples: N while they were.
        method: "path" (`prior_scale="auto"`) or "grid" (`select_scale`).
        steps: optimizer steps that the search took.
        checks: whole trainings that checked a path's choice, in their order; none with `prior_scale_checks=0`, and where they
            could change nothing.
    """

    scale: float
    head_variance: float | None
    trials: tuple[ScaleTrial, ...]
    held_out: int
    num_examples: int
    method: str
    steps: int
    checks: tuple[ScaleTrial, ...] = ()

    def report(self) -> str:
        """One to three sentences for a log."""
        scales = sorted({t.scale for t in self.trials})
        best = min(t.nll for t in self.checks or self.trials)
        told = (
            f"scale {self.scale:.4g} of {len(scales)} from {scales[0]:.3g} to {scales[-1]:.3g} "
            f"(lowest NLL {best:.4f} nats on {self.held_out} held-out examples"
        )
        told += "" if self.head_variance is None else f"; head variance {self.head_variance:.3g}"
        told += ")"
        if self.checks and self.scale != self.checks[0].scale:
            first, last = self.checks[0], self.checks[-1]
            ends = f"ends worse (NLL {first.nll:.4f})" if math.isfinite(first.nll) else "diverges"
            told += f". The path chose {first.scale:.3g}, where a whole training {ends}"
            if self.scale == last.scale > scales[0]:
                told += "; narrower priors may do better still, and prior_scale_checks trainings are used up: see select_scale"
        finite = (t for t in self.trials if math.isfinite(t.nll))
        start = min(finite, key=lambda t: (t.scale, t.nll), default=None)  # of a head's variances the best
        if self.checks and start is not None and best > start.nll + 0.1 * abs(start.nll):
            told += (
                f". A whole training ends worse than the narrowest prior begins (NLL {start.nll:.4f}): lower the learning "
                "rate, or train for less"
            )
        elif len(scales) > 1 and self.scale == scales[-1]:
            told += ". It is the widest one: these data do not ask for this prior, and plain fine-tuning may do as well"
        elif len(scales) > 1 and self.scale == scales[0]:
            told += ". It is the narrowest one tried: these examples give no reason for the weights to leave the prior's mean"
        return told + "."

    def to_json(self) -> str:
        """As text; `from_json` reads it back exactly. The NLL of a trial that diverged is null: JSON has no infinity."""
        values = asdict(self)
        for trial in (*values["trials"], *values["checks"]):
            trial["nll"] = trial["nll"] if math.isfinite(trial["nll"]) else None
        return json.dumps(values, indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> ScaleChoice:
        """Read what `to_json` wrote.

        Raises:
            PriorFormatError: it is something else.
        """
        try:
            found = json.loads(text)
            trials, checks = found.pop("trials"), found.pop("checks", [])  # the first version had no checks
            for trial in (*trials, *checks):
                trial["nll"] = math.inf if trial["nll"] is None else trial["nll"]
            return cls(**found, trials=tuple(ScaleTrial(**t) for t in trials), checks=tuple(ScaleTrial(**t) for t in checks))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise PriorFormatError(f"{FILE_NAME} is not what prior_scale='auto' wrote: {error}") from error


def number_or_auto(value: float | str | None, name: str) -> float | str | None:
    """A setting that may be a number, "auto" or None; a number may come as text (command line, hyperparameter search).

    Raises:
        ValueError: it is neither.
    """
    if value is None or value == AUTO:
        return value
    if isinstance(value, str) and value.strip().lower() in ("none", ""):
        return None
    try:
        number = float(value)
    except ValueError:
        raise ValueError(f"{name} is {value!r}, expected a number > 0, 'auto' or None.") from None
    if not (number > 0 and math.isfinite(number)):
        raise ValueError(f"{name} is {value!r}, expected a finite number > 0, 'auto' or None.")
    return number


def scale_ladder(
    gaussian: LowRankGaussian, *, widths: tuple[float, float] = WIDTHS, per_decade: int = PER_DECADE
) -> list[float]:
    """Scales from narrow to wide, evenly spaced in their logarithm.

    Args:
        gaussian: the prior, over the parameters that are trained.
        widths: of the narrowest and the widest: expected squared distance of a draw from the mean / squared norm of the mean.
        per_decade: scales for each factor of 10.

    Raises:
        ValueError: the mean is zero, or nothing but eps spreads the prior, so that the scale has no meaning.
    """
    unit = gaussian.rescaled(1.0)
    spread = sum(float((v.double() - unit.eps).sum()) for v in unit.marginal_variance().values())
    norm = sum(float(m.double().square().sum()) for m in unit.mean.values())
    if not norm > 0:
        raise ValueError(
            "the prior's mean is zero, so that there is no natural range of scales: pass scales=[...] or a number."
        )
    if not spread > 0:
        raise ValueError("the prior's spread is its eps alone, which prior_scale does not change.")
    low, high = widths
    rungs = max(2, round(per_decade * math.log10(high / low)) + 1)
    return [low * (high / low) ** (k / (rungs - 1)) * norm / spread for k in range(rungs)]


def checks_allowed(value: Any) -> int:
    """`prior_scale_checks`, which may come as text.

    Raises:
        ValueError: it is not a whole number, negative, or 1, which could change nothing.
    """
    try:
        number = int(value) if isinstance(value, str) else value
    except ValueError:
        number = None
    if not isinstance(number, int) or isinstance(number, bool) or number < 0 or number == 1:
        raise ValueError(
            f"prior_scale_checks is {value!r}, expected 0 (the path alone) or a whole number of at least 2: one training alone "
            "has nothing to be compared with."
        )
    return number


def smoothed(values: Sequence[float]) -> list[float]:
    """Each value and its neighbours, weights 1/4, 1/2, 1/4; the ends count twice for what is beyond them."""
    padded = [values[0], *values, values[-1]]
    return [0.25 * a + 0.5 * b + 0.25 * c for a, b, c in zip(padded, padded[1:], padded[2:], strict=False)]


def held_out_split(dataset: Any, share: float, seed: int) -> tuple[Any, Any]:
    """(the rest, the held-out part): a random share, the same for the same seed.

    Raises:
        ValueError: the data set has no length, or is too small.
    """
    if not 0 < share < 1:
        raise ValueError(f"held_out is {share}, expected a share between 0 and 1.")
    if dataset is None or isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise ValueError(
            "a part of the training set has to be held out to choose the scale, and this one has no length: pass "
            "prior_scale as a number."
        )
    count = len(dataset)
    held = round(share * count)
    if held < 5 or count - held < 5:
        raise ValueError(
            f"{count} training examples are too few to hold out a share of {share:g} and choose the scale by it: pass "
            "prior_scale as a number (a larger one lets the data move the weights more)."
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    rest, out = sorted(order[held:]), sorted(order[:held])
    if hasattr(dataset, "select") and hasattr(dataset, "column_names"):  # datasets.Dataset: keeps its columns and formats
        return dataset.select(rest), dataset.select(out)
    return Subset(dataset, rest), Subset(dataset, out)


# ------------------------------------------------------------------------------------------------------------ rehearsals


def training_steps(trainer: PriorTrainerMixin) -> int:
    """Optimizer steps that `trainer.train()` will take."""
    args = trainer.args
    if args.max_steps > 0:
        return int(args.max_steps)
    window: int = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return max(1, math.ceil(float(args.num_train_epochs) * max(1, math.ceil(_length(trainer.train_dataset) / window))))


def _length(dataset: Any) -> int:
    return len(dataset)


@contextmanager
def rehearsal(trainer: PriorTrainerMixin, dataset: Any, callbacks: list[TrainerCallback], **settings: Any) -> Iterator[None]:
    """Within, `trainer` trains on `dataset` with other settings, and nobody hears of it; afterwards all is as it was.

    Put back: weights, buffers and modes, random states, loss scaler, and every attribute of the trainer (arguments, callbacks,
    state, optimizer, scheduler, loaders, counters, a subclass's own too).
    """
    attributes = trainer.__dict__
    kept = dict(attributes)
    handler, accelerator = trainer.callback_handler, trainer.accelerator
    heard, loaders = handler.callbacks, (handler.train_dataloader, handler.eval_dataloader)
    prepared = {name: list(getattr(accelerator, name)) for name in _PREPARED if hasattr(accelerator, name)}
    fresh = trainer.model_init is not None  # train() will make a new model anyway
    put_back = None if fresh else _model_as_it_is(trainer.model)
    states = _random_states()
    scaler = getattr(accelerator, "scaler", None)
    scaling = scaler.state_dict() if scaler is not None else None
    args: Any = copy.copy(trainer.args)
    quiet = {"save_strategy": "no", "eval_strategy": "no", "logging_strategy": "no", "eval_on_start": False}
    quiet |= {"load_best_model_at_end": False, "push_to_hub": False, "logging_first_step": False}
    for name, value in (quiet | settings).items():
        setattr(args, name, value)
    given = args.prior_num_examples if hasattr(args, "prior_num_examples") else None
    if given is not None:
        args.prior_num_examples = max(1, round(given * len(dataset) / len(trainer.train_dataset)))
    own = [c for c in heard if type(c).__module__.startswith("prior_hub.finetuning")]
    try:
        attributes.update({name: _containers_copied(value) for name, value in kept.items() if name not in _DATA})
        trainer.args, trainer.train_dataset, trainer.model_wrapped = args, dataset, trainer.model
        trainer.control = copy.copy(trainer.control)
        trainer.optimizer = trainer.lr_scheduler = None
        attributes.pop("_eval_dataloaders", None)  # of the evaluation set, with dataloader_persistent_workers
        attributes["log"] = _say_nothing
        attributes["_speaks"] = _no  # how the prior enters is told once, of the training itself
        handler.callbacks = [DefaultFlowCallback(), *own, *callbacks]
        trainer._bind()
        yield
    finally:
        noise = attributes.get("neftune_hook_handle")
        if trainer.is_in_train and noise is not None:  # an error ended the training: nobody has taken it off
            noise.remove()
        found = {name: attributes[name] for name in _FOUND_OUT if name in attributes}
        attributes.clear()
        attributes.update(kept | found)
        handler.callbacks = heard
        handler.train_dataloader, handler.eval_dataloader = loaders
        for name in ("model", "optimizer", "lr_scheduler"):
            setattr(handler, name, getattr(trainer, name))
        for name, objects in prepared.items():
            getattr(accelerator, name)[:] = objects
        if put_back is not None:
            put_back()
        if scaler is not None:
            scaler.load_state_dict(scaling)
        trainer._bind()
        _put_random_states(states)


def _say_nothing(*args: Any, **kwargs: Any) -> None:
    """In place of `Trainer.log`, which a subclass may have made its own."""
    del args, kwargs


def _no() -> bool:
    return False


def _containers_copied(value: Any, depth: int = 3) -> Any:
    """Dictionaries and lists are other ones, so that what is counted or gathered in them is not counted in the first ones."""
    if depth and isinstance(value, dict):
        copied: Any = copy.copy(value)
        for key, inner in value.items():
            copied[key] = _containers_copied(inner, depth - 1)
        return copied
    return copy.copy(value) if depth and isinstance(value, (list, set, deque)) else value


def _model_as_it_is(model: nn.Module) -> Callable[[], None]:
    """A function that puts weights, buffers (also those that are not saved), modes and `requires_grad` back.

    What is frozen is kept on the CPU: it is most of a model that is trained through adapters.
    """
    parameters = [
        (p, p.requires_grad, p.detach().clone() if p.requires_grad else p.detach().to("cpu", copy=True))
        for p in model.parameters()
        if not p.is_meta  # accelerate has moved it elsewhere: nothing trains it
    ]
    buffers = [(m, n, b, b.detach().clone()) for m in model.modules() for n, b in m._buffers.items() if b is not None]
    modes = [(m, m.training) for m in model.modules()]
    forward = {name: vars(model)[name] for name in _FORWARD if name in vars(model)}

    def put_back() -> None:
        with torch.no_grad():
            for parameter, needed, value in parameters:
                _fill(parameter, value)
                parameter.requires_grad_(needed)
                parameter.grad = None
            for module, name, buffer, value in buffers:
                _fill(buffer, value)
                module._buffers[name] = buffer
        for module, mode in modes:
            module.training = mode
        for name in _FORWARD:
            vars(model).pop(name, None)
        vars(model).update(forward)

    return put_back


def _fill(tensor: torch.Tensor, value: torch.Tensor) -> None:
    if tensor.dtype == value.dtype and tensor.shape == value.shape:
        tensor.copy_(value)
    else:  # an evaluation in bfloat16 casts the model for good
        tensor.data = value.to(tensor.device)


def _random_states() -> tuple[Any, ...]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda  # noqa: NPY002  # Trainer seeds this one


def _put_random_states(states: tuple[Any, ...]) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    torch.set_rng_state(states[2])
    if states[3] is not None:
        torch.cuda.set_rng_state_all(states[3])


def held_out_nll(trainer: PriorTrainerMixin, loader: Any, count: int) -> float:
    """Mean loss over the `count` held-out examples, in nats.

    Raises:
        ValueError: the trainer evaluates without a loss, or on other examples.
    """
    trained, trainer.is_in_train = trainer.is_in_train, True  # else bf16_full_eval would cast the model for good
    try:
        output = trainer.evaluation_loop(loader, "held-out part", prediction_loss_only=True, metric_key_prefix="held_out")
    finally:
        trainer.is_in_train = trained
    if "held_out_loss" not in output.metrics:
        raise ValueError(
            "there is no loss on the held-out examples to choose the scale by: the Trainer's evaluation finds labels under "
            f"{trainer.label_names} only (label_names=[...] names others). Or pass prior_scale as a number."
        )
    if output.num_samples != count:
        raise ValueError(
            f"{output.num_samples} examples were measured in place of the {count} that are held out: get_eval_dataloader of "
            f"{type(trainer).__name__} does not take the data set it is given. Pass prior_scale as a number."
        )
    return float(output.metrics["held_out_loss"])


def held_out_loader(trainer: PriorTrainerMixin, held: Any) -> Any:
    """Batches of all held-out examples; within `rehearsal`, whose arguments it may change."""
    args: Any = trainer.args
    dropped, args.dataloader_drop_last = args.dataloader_drop_last, False
    try:
        return trainer.get_eval_dataloader(held)
    finally:
        args.dataloader_drop_last = dropped


def refuse_impossible_search(trainer: PriorTrainerMixin) -> None:
    """Where a rehearsal cannot be put back, or would not say what is asked."""
    if trainer.sampling is not None:
        raise ValueError(
            "prior_scale='auto' chooses the scale of a MAP fine-tuning, with that one's learning rate: find it by a run "
            "without a sampler, and pass the number to the sampler's run."
        )
    if trainer.is_fsdp_enabled or any(is_sharded(p) for p in trainer.model.parameters()):
        raise ValueError("prior_scale='auto' does not work with a sharded model: find the scale on one device or with DDP.")
    if trainer._given_optimizer:
        raise ValueError(
            "the scale is chosen by a rehearsal with an optimizer of its own, and this trainer was given one: pass "
            "optimizer_cls_and_kwargs=(torch.optim.SGD, {...}) instead."
        )


# --------------------------------------------------------------------------------------------------------------- the path


class _Walk(TrainerCallback):
    """Widens the prior rung by rung while the trainer trains, and measures at the end of each."""

    def __init__(self, trainer: PriorTrainerMixin, ladder: list[float], heads: list[float], each: int, count: int) -> None:
        self.trainer, self.each, self.count = trainer, each, count
        self.loader: Any = None  # of the `count` held-out examples
        self.ladder, self.heads = ladder, heads
        self.trials: list[ScaleTrial] = []
        self.head_trials: list[ScaleTrial] = []
        self.bar: Any = None

    @property
    def rungs(self) -> int:
        return len(self.heads) + len(self.ladder)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainer's event."""
        del control, kwargs
        self.trials, self.head_trials = [], []  # auto_find_batch_size may begin again
        self._leave_out_what_overshoots()
        self.bar = tqdm(
            total=self.rungs, desc="looking for the prior's scale", disable=args.disable_tqdm or not state.is_local_process_zero
        )
        self._set(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainer's event."""
        del args, kwargs
        if state.global_step % self.each:
            return
        done = state.global_step // self.each
        trainer = self.trainer
        penalty = trainer.prior_penalty
        assert penalty is not None  # noqa: S101
        nll = held_out_nll(trainer, self.loader, self.count)
        trial = ScaleTrial(penalty.gaussian.scale, penalty.head_variance, nll if math.isfinite(nll) else math.inf)
        (self.head_trials if done <= len(self.heads) else self.trials).append(trial)
        self.bar.set_postfix_str(f"scale {trial.scale:.2g}, NLL {nll:.4f}")
        self.bar.update()
        if done < self.rungs and math.isfinite(nll):
            self._set(done)
        else:
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainer's event."""
        del args, state, control, kwargs
        self.bar.close()

    def _leave_out_what_overshoots(self) -> None:
        """Without an implicit step the narrowest priors are too stiff for the learning rate."""
        trainer = self.trainer
        penalty = trainer.prior_penalty
        assert penalty is not None  # noqa: S101
        if trainer.prior_update != "gradient":
            return
        rate = highest_rate(getattr(trainer.optimizer, "optimizer", trainer.optimizer))

        def stable(scale: float, head: float | None) -> bool:
            penalty.rescale(scale, head_variance=head)
            return rate * penalty.curvature() <= 2

        heads = [h for h in self.heads if stable(self.ladder[-1], h)]
        ladder = [scale for scale in self.ladder if stable(scale, heads[0] if heads else None)]
        if not ladder:
            raise ValueError(
                f"a gradient step of the prior overshoots at every scale from {self.ladder[0]:.3g} to {self.ladder[-1]:.3g} "
                f"with learning rate {rate:g}: use SGD, Adam or AdamW with prior_update='auto', or a lower learning rate."
            )
        self.ladder, self.heads = ladder, heads

    def _set(self, rung: int) -> None:
        penalty = self.trainer.prior_penalty
        assert penalty is not None  # noqa: S101
        if rung < len(self.heads):
            penalty.rescale(self.ladder[0], head_variance=self.heads[rung])
            return
        if rung == len(self.heads) and self.heads:
            penalty.rescale(self.ladder[0], head_variance=best(self.head_trials).head_variance)
        penalty.rescale(self.ladder[rung - len(self.heads)])


def best(trials: Sequence[ScaleTrial]) -> ScaleTrial:
    """The trial with the lowest smoothed NLL.

    Raises:
        ValueError: there are none.
        PriorNumericsError: none has a finite one.
    """
    if not trials:
        raise ValueError(
            "the rehearsal ended before its first measurement: with a fifth held out there may be no whole batch left "
            "(dataloader_drop_last=True). Use a smaller batch, or pass prior_scale as a number."
        )
    finite = [t for t in trials if math.isfinite(t.nll)]
    if not finite:
        raise PriorNumericsError(
            "the held-out loss is not finite under the narrowest prior already: lower the learning rate, or look for NaN in "
            "the data."
        )
    scores = smoothed([t.nll for t in finite])
    return finite[scores.index(min(scores))]


def walk(trainer: PriorTrainerMixin, *, scale: float | None, auto_head: bool) -> ScaleChoice:
    """`prior_scale="auto"` and `prior_head_variance="auto"`; leaves the trainer as it was.

    Args:
        trainer: with its prior bound.
        scale: the given scale, if only the head's variance is asked for; None for a ladder.
        auto_head: whether the head's variance is asked for.
    """
    refuse_impossible_search(trainer)
    at_most = checks_allowed(trainer._prior_settings["prior_scale_checks"])
    rest, held = held_out_split(trainer.train_dataset, 0.2, trainer.args.seed)
    steps_of_training = training_steps(trainer)
    penalty = trainer.prior_penalty
    assert penalty is not None  # noqa: S101
    ladder = scale_ladder(penalty.gaussian) if scale is None else [scale]
    heads = list(HEAD_VARIANCES) if auto_head and penalty.has_head else []
    each = min(max(steps_of_training // (len(ladder) + len(heads)), STEPS_PER_RUNG[0]), STEPS_PER_RUNG[1])
    callback = _Walk(trainer, ladder, heads, each, len(held))
    settings = {
        "max_steps": each * callback.rungs,
        **_schedule(trainer.args, callback.rungs, each),
        "prior_scale": ladder[0],
        "prior_head_variance": heads[0] if heads else penalty.head_variance,
    }
    with rehearsal(trainer, rest, [callback], **settings):
        callback.loader = held_out_loader(trainer, held)
        num_examples = trainer._num_examples()
        trainer._searching = True
        try:
            trainer._train_as_it_is()
        finally:
            trainer._searching = False
    head = penalty.head_variance
    if heads:
        head = best(callback.head_trials).head_variance
    proposed, trials = best(callback.trials), (*callback.head_trials, *callback.trials)
    checks: list[ScaleTrial] = []
    steps = len(trials) * each
    until_there = (len(callback.head_trials) + callback.trials.index(proposed) + 1) * each
    if scale is None and steps_of_training >= until_there:
        scores = smoothed([t.nll for t in callback.trials if math.isfinite(t.nll)])
        scales = _decades_below(proposed.scale, callback.ladder)[:at_most]
        checks, taken = _check(trainer, scales, min(scores), head, rest, held)
        steps += taken
    _forget_parts(trainer)
    chosen = min(checks or [proposed], key=lambda t: t.nll).scale
    return ScaleChoice(chosen, head, trials, len(held), num_examples, "path", steps, tuple(checks))


def _decades_below(scale: float, ladder: Sequence[float]) -> list[float]:
    """The rung at `scale`, those whole decades below it, and the lowest."""
    below = [rung for rung in reversed(ladder) if rung <= scale]
    return list(dict.fromkeys([*below[::PER_DECADE], below[-1]]))


def _forget_parts(trainer: PriorTrainerMixin) -> None:
    """The parts of the training set whose labels were counted."""
    trainer._label_counts = [known for known in trainer._label_counts if known[0] is trainer.train_dataset]


def _check(
    trainer: PriorTrainerMixin, scales: Sequence[float], promised: float, head: float | None, rest: Any, held: Any
) -> tuple[list[ScaleTrial], int]:
    """Whole trainings on `rest`, from wide to narrow while that improves; with the optimizer steps that they took.

    None where there is nothing narrower to go to; only one where that ends no worse than `promised`.

    Raises:
        PriorNumericsError: none has a finite held-out loss.
    """
    if len(scales) < 2:
        return [], 0
    visible = not trainer.args.disable_tqdm and trainer.is_world_process_zero()
    checks: list[ScaleTrial] = []
    steps = 0
    with tqdm(total=len(scales), desc="checking the prior's scale", disable=not visible) as bar:
        for scale in scales:
            nll, taken, _ = _whole_training(trainer, scale, head, rest, held)
            steps += taken
            checks.append(ScaleTrial(scale, head, nll))
            bar.set_postfix_str(f"scale {scale:.2g}, NLL {nll:.4f}")
            bar.update()
            if nll <= promised if len(checks) == 1 else math.isfinite(checks[-2].nll) and nll >= checks[-2].nll:
                break
    if checks and not any(math.isfinite(t.nll) for t in checks):
        raise PriorNumericsError(
            f"a whole training has no finite loss at the scales {', '.join(f'{t.scale:.3g}' for t in checks)}, though a few "
            "steps had: lower the learning rate."
        )
    return checks, steps


def _whole_training(
    trainer: PriorTrainerMixin, scale: float, head: float | None, rest: Any, held: Any
) -> tuple[float, int, int]:
    """(held-out NLL, infinite where it is not a number; optimizer steps; N) of the training, without callbacks, on `rest`."""
    with rehearsal(trainer, rest, [], prior_scale=scale, prior_head_variance=head):
        loader = held_out_loader(trainer, held)
        num_examples = trainer._num_examples()
        trainer._train_as_it_is()
        steps = trainer.state.global_step
        nll = held_out_nll(trainer, loader, len(held))
    return (nll if math.isfinite(nll) else math.inf), steps, num_examples


def _schedule(args: Any, rungs: int, each: int) -> dict[str, Any]:
    """Where the training's learning rate falls, each rung's does too: the noise of large steps hides what is learned."""
    if str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)).startswith("constant"):
        return {"lr_scheduler_type": "constant_with_warmup", "lr_scheduler_kwargs": {}, "warmup_steps": max(1, each // 2)}
    return {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": rungs}, "warmup_steps": 0}


def find_scale(trainer: PriorTrainerMixin) -> ScaleChoice:
    """What `prior_scale="auto"` would choose for this trainer, without training; the trainer is left as it was.

    The variance of the head prior is chosen too where the trainer has `prior_head_variance="auto"`.

        choice = find_scale(trainer)
        trainer.args.prior_scale = choice.scale

    Args:
        trainer: a `PriorTrainer` with a prior and a training set of known length, its weights not fitted to that set.

    Raises:
        ValueError: no prior, no length, a sampler, a sharded model, or an optimizer that was given.
        PriorNumericsError: the loss is not finite.
    """
    if trainer.prior is None:
        raise ValueError("this trainer has no prior, and so no scale to choose.")
    auto_head = trainer._asked_for("prior_head_variance")
    return walk(trainer, scale=None, auto_head=auto_head)


# --------------------------------------------------------------------------------------------------------------- the grid


def select_scale(
    trainer: PriorTrainerMixin,
    scales: Sequence[float] | None = None,
    *,
    head_variances: Sequence[float] | None = None,
    held_out: float = 0.2,
) -> ScaleChoice:
    """The scale with the lowest NLL on a held-out part of the training set: one whole training for every candidate.

        choice = select_scale(trainer, [1e2, 1e3, 1e4])
        trainer.args.prior_scale = choice.scale
        trainer.train()

    The thorough, expensive form of `prior_scale="auto"`, and the protocol of the literature (validation NLL on a fifth). The
    trainer is left as it was: weights, random states, callbacks. The trainings do not evaluate and none of your callbacks hears
    of them, so that early stopping, `load_best_model_at_end` and schedules that watch a metric have no part in them.

    Args:
        trainer: a `PriorTrainer` with a prior and a training set of known length.
        scales: candidates; a decade apart over the range of `scale_ladder` when None.
        head_variances: candidates for the head prior, each with each scale; the trainer's own when None.
        held_out: share of the training set that is held out.

    Returns:
        The `ScaleChoice`.

    Raises:
        ValueError: no prior, no length, a sampler, a sharded model, or candidates that are not positive numbers.
        PriorNumericsError: no candidate has a finite loss.
    """
    if trainer.prior is None or trainer.prior_penalty is None:
        raise ValueError("this trainer has no prior, and so no scale to choose.")
    refuse_impossible_search(trainer)
    candidates = scale_ladder(trainer.prior_penalty.gaussian, per_decade=1) if scales is None else [*scales]
    heads: list[float | None] = [trainer.prior_penalty.head_variance] if head_variances is None else [*head_variances]
    if not candidates or not heads:
        raise ValueError("no candidates to choose from.")
    for value in (*candidates, *(h for h in heads if h is not None)):
        number_or_auto(value, "a candidate")
    rest, held = held_out_split(trainer.train_dataset, held_out, trainer.args.seed)
    trials: list[ScaleTrial] = []
    pairs = [(scale, head) for head in heads for scale in candidates]
    visible = not trainer.args.disable_tqdm and trainer.is_world_process_zero()
    num_examples = steps = 0
    for scale, head in tqdm(pairs, desc="choosing the prior's scale", disable=not visible):
        nll, taken, num_examples = _whole_training(trainer, scale, head, rest, held)
        steps += taken
        trials.append(ScaleTrial(scale, head, nll))
    _forget_parts(trainer)
    chosen = min(trials, key=lambda t: t.nll)
    if not math.isfinite(chosen.nll):
        raise PriorNumericsError("the held-out loss is not finite for any candidate: lower the learning rate.")
    return ScaleChoice(chosen.scale, chosen.head_variance, tuple(trials), len(held), num_examples, "grid", steps)


# ------------------------------------------------------------------------------------------------------------- on the disk


def write_choice(folder: str | os.PathLike[str], choice: ScaleChoice) -> None:
    """`prior_scale.json`, whole or not at all."""
    path = Path(folder) / FILE_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".tmp")
    partial.write_text(choice.to_json(), encoding="utf-8")
    partial.replace(path)


def read_choice(folder: str | os.PathLike[str]) -> ScaleChoice | None:
    """What `write_choice` wrote; None where there is nothing."""
    path = Path(folder) / FILE_NAME
    return ScaleChoice.from_json(path.read_text(encoding="utf-8")) if path.is_file() else None
