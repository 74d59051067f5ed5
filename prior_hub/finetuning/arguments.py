"""The scalar settings of a fine-tuning under a prior, beside Trainer's own."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments

from prior_hub.finetuning.counting import COUNTS
from prior_hub.finetuning.proximal import UPDATES
from prior_hub.finetuning.sampling import METRICS, SAMPLERS
from prior_hub.finetuning.scale import checks_allowed, number_or_auto
from prior_hub.inference.schedule import SCHEDULES

__all__ = ["PriorArgumentsMixin", "PriorTrainingArguments", "SamplingArgumentsMixin"]


@dataclass
class PriorArgumentsMixin:
    """The prior's settings, to be mixed into any `TrainingArguments` (see `PriorTrainerMixin`).

    Attributes:
        prior: Hub name or folder of the prior; `PriorTrainer(prior=...)` wins over it.
        prior_scale: scale of the prior's covariance; the stored one when None; "auto": chosen by a rehearsal before the
            training, with a fifth of the training set held out: a path of at least 104 steps, and the checks below.
        prior_scale_checks: whole trainings on the four fifths that may check what "auto" chose, at most: one where it holds,
            two or more where the training ends worse than the rehearsal promised. 0: none, which is blind to what a long
            training overfits. Callbacks (early stopping) have no part in them.
        prior_rank: use only this many deviations; all when None, 0 for a diagonal prior.
        prior_head_variance: variance of the zero-mean prior over parameters the prior does not know; None leaves them to
            weight_decay, or is 1 with a sampler; "auto": chosen by the rehearsal.
        prior_update: how the prior enters a step: "gradient" (added to the data's gradient), "implicit" (a step of its own
            after the optimizer's, stable at any scale and learning rate, with the same solution), or "auto": implicit where
            a gradient step would overshoot.
        prior_num_examples: N, as a number; see `prior_count` when None.
        prior_count: what counts as one observation of the N in (mean loss + penalty / N), where the loss is a mean over tokens
            or pixels. "labels": every label that is not ignored, counted once over the training set; pixels of an image are not
            independent, so this takes the data for more than they are, and makes the posterior narrower than it should be.
            "examples": each image or text once; the prior is stronger, and the posterior wider (its variance), by the number of
            labels in one. The truth is between; compare on held-out data. Default: the length of the training set, and an error
            where labels are per token or pixel.
        prior_initialize: start from the prior's mean and its BatchNorm statistics: making the trainer overwrites the model's
            weights, unless it has no train_dataset. False to go on from the model's own weights.
        prior_include_head: bind the source task's head too (same classes on both sides).
        prior_on_mismatch: "error" or "drop" for parameters of another shape.
        prior_min_coverage: share of the prior's values that must find a place in the model.
        prior_through_adapters: whether a prior over base weights is taken through the LoRA adapters on them, as one over
            W0 + s B A. None: wherever there are such adapters, with a line in the log; True: and an error if there are none;
            False: never, so that frozen weights are conditioned on, and an error if all are frozen.
        prior_device: where the prior is kept: "cpu" leaves the accelerator's memory to the model, at a longer step (a sampler's
            metric of its own lies beside the model all the same). Default: beside the model.
        prior_revision: branch, tag or commit of the prior's repository.
        prior_subfolder: folder of the prior in its repository.
    """

    prior: str | None = field(
        default=None, metadata={"help": "Hub name (organisation/name) or folder of the prior to fine-tune under."}
    )
    prior_scale: float | str | None = field(  # in this order: HfArgumentParser reads text
        default=None,
        metadata={
            "help": "Scale of the prior's covariance: larger lets the data move the weights more. 'auto': chosen by a "
            "rehearsal with a fifth held out, which takes several times as long as the training. Default: as stored."
        },
    )
    prior_scale_checks: int = field(
        default=4,
        metadata={
            "help": "With prior_scale='auto': at most this many whole trainings check the choice and make it narrower where "
            "that improves. 0: none, which is blind to what a long training overfits."
        },
    )
    prior_rank: int | None = field(
        default=None, metadata={"help": "Use only this many deviations of the prior (0: its diagonal). Default: all."}
    )
    prior_head_variance: float | str | None = field(
        default=None,
        metadata={
            "help": "Variance of the zero-mean prior over new parameters (the head). 'auto': chosen by the rehearsal. Default: "
            "weight_decay acts on them (with a sampler: 1)."
        },
    )
    prior_update: str = field(
        default="auto",
        metadata={
            "help": "How the prior enters a step: 'gradient' (added to the data's), 'implicit' (a step of its own, stable at "
            "any scale and learning rate), or 'auto': implicit where a gradient step would overshoot.",
            "choices": list(UPDATES),
        },
    )
    prior_num_examples: int | None = field(
        default=None,
        metadata={
            "help": "N, by which the penalty is divided: number of training examples, or of label tokens if the loss is a "
            "mean over tokens. Default: see prior_count."
        },
    )
    prior_count: str | None = field(
        default=None,
        metadata={
            "help": "What counts as one observation in N: 'examples' (each image or text once) or 'labels' (every token or "
            "pixel that is not ignored). Default: the length of the training set; an error for losses over tokens or pixels.",
            "choices": list(COUNTS),
        },
    )
    prior_initialize: bool = field(
        default=True,
        metadata={
            "help": "Start from the prior's mean and its BatchNorm statistics, overwriting the model's weights, unless there "
            "is no train_dataset."
        },
    )
    prior_include_head: bool = field(
        default=False, metadata={"help": "Bind the source task's head too: only if the classes are the same."}
    )
    prior_on_mismatch: str = field(
        default="error", metadata={"help": "What to do with parameters of another shape: 'error' or 'drop'."}
    )
    prior_min_coverage: float = field(
        default=0.5, metadata={"help": "Share of the prior's values that must find a place in the model."}
    )
    prior_through_adapters: bool | None = field(
        default=None,
        metadata={
            "help": "Whether a prior over base weights is taken through the LoRA adapters on them, as one over W0 + s B A. "
            "Default: where there are any; True refuses to go without, False never does."
        },
    )
    prior_device: str | None = field(
        default=None,
        metadata={"help": "Where the prior is kept: 'cpu' leaves the accelerator's memory to the model. Default: beside it."},
    )
    prior_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the prior's repository."})
    prior_subfolder: str | None = field(default=None, metadata={"help": "Folder of the prior inside its repository."})

    def __post_init__(self) -> None:
        """Numbers from the command line come as text, because "auto" may stand in their place."""
        self.prior_scale = number_or_auto(self.prior_scale, "prior_scale")
        self.prior_head_variance = number_or_auto(self.prior_head_variance, "prior_head_variance")
        self.prior_scale_checks = checks_allowed(self.prior_scale_checks)
        further = getattr(super(), "__post_init__", None)
        if further is not None:
            further()


@dataclass
class SamplingArgumentsMixin:
    """The settings of a posterior sampler, beside `PriorArgumentsMixin`'s; apart, because their names are short.

    Attributes:
        sampler: None optimises (one MAP solution); "sgld", "sghmc" or "baoa" sample the posterior with learning_rate, write
            samples to OUTPUT_DIR/samples, and evaluate and predict by their average. "baoa" is the accurate choice, stable
            for priors of any scale. `optim`, `lr_scheduler_type` and, except in the exploration of an identity metric,
            `max_grad_norm` have no effect then.
        temperature: of the posterior, 1 for the posterior itself.
        friction: of "sghmc" and "baoa", 1 - momentum, in (0, 1].
        num_cycles: cycles of exploration and sampling.
        samples_per_cycle: samples taken in each.
        exploration: share of a cycle that explores at temperature 0.
        sampling_schedule: "cyclical" (cosine learning rate in each cycle) or "constant" (one exploration, then one chain).
        sampler_metric: "identity": learning_rate is that of SGD. "diagonal": each weight's learning rate is multiplied by the
            diagonal of the prior's covariance, so that learning_rate is in units in which the prior has variance 1. "full": by
            the whole covariance ("baoa" only). "auto": diagonal for "baoa", identity for the others.
        chain: number of this chain: run again with another number into the same output_dir for several. It trains with
            seed + chain, so that the order of the data and its augmentation differ as the noise does.
        sample_batch_norm_batches: batches of training data from which each sample's BatchNorm statistics are worked out.
    """

    sampler: str | None = field(
        default=None,
        metadata={
            "help": "Sample the posterior instead of optimising: 'sgld', 'sghmc' or 'baoa' (the accurate one, stable for "
            "priors of any scale). Default: one MAP solution.",
            "choices": sorted(SAMPLERS),
        },
    )
    temperature: float = field(default=1.0, metadata={"help": "Temperature of the posterior that is sampled."})
    friction: float = field(
        default=0.1, metadata={"help": "Friction of 'sghmc' and 'baoa', 1 - momentum, above 0 and at most 1."}
    )
    num_cycles: int = field(default=4, metadata={"help": "Cycles of exploration and sampling."})
    samples_per_cycle: int = field(default=3, metadata={"help": "Samples taken in each cycle."})
    exploration: float = field(default=0.5, metadata={"help": "Share of a cycle that explores at temperature 0."})
    sampling_schedule: str = field(
        default="cyclical",
        metadata={
            "help": "'cyclical': a cosine learning rate in each cycle. 'constant': one exploration, then one long chain.",
            "choices": list(SCHEDULES),
        },
    )
    sampler_metric: str = field(
        default="auto",
        metadata={
            "help": "What a sampler's learning rate is multiplied by: 'identity' (as SGD), 'diagonal' or 'full' (of the "
            "prior's covariance, so that it is in the prior's own units). 'auto': diagonal for baoa, identity for the others.",
            "choices": list(METRICS),
        },
    )
    chain: int = field(
        default=0, metadata={"help": "Number of this chain; run again with another one into the same output_dir for several."}
    )
    sample_batch_norm_batches: int = field(
        default=100, metadata={"help": "Batches of training data for each sample's BatchNorm statistics."}
    )


@dataclass
class PriorTrainingArguments(PriorArgumentsMixin, SamplingArgumentsMixin, TrainingArguments):
    """`TrainingArguments` with the prior's settings; everything else is as in transformers."""
