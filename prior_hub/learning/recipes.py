"""From a model's name and a data set's name to a prior, in one call: `learn_prior`, behind `prior-hub learn`.

    base model      transformers model (Hub name or local folder), or a timm one ("timm/resnet18.a1_in1k", or its folder)
    data set        Hub name, or a local folder of parquet, json, csv files or images in one folder per class
    objective       supervised    the images or texts and their labels
                    masked-lm     the texts alone; the prior is over the encoder
                    simclr, barlow-twins    the images alone, two views of each; the prior is over the backbone
    estimator       swag, diagonal-swag    train on, with a constant learning rate, and take snapshots (swag.py)
                    fisher                 1/(N F + tau) at the trained weights (fisher.py)
                    isotropic              the checkpoint and one variance, no data (isotropic.py)

The head of the source task is never under the prior. A head that does not fit the data set's classes is made anew and trained
with the rest. Everything the run depended on is in the prior's configuration.
"""

from __future__ import annotations

import functools
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from prior_hub.errors import PriorHubError, PriorNotFoundError
from prior_hub.learning.barlow_twins import BarlowTwins
from prior_hub.learning.callback import SwagCallback
from prior_hub.learning.fisher import DiagonalFisherEstimator
from prior_hub.learning.isotropic import isotropic_prior
from prior_hub.learning.self_supervised import SelfSupervised
from prior_hub.learning.simclr import SimCLR
from prior_hub.learning.swag import source_facts
from prior_hub.learning.views import TwoViews
from prior_hub.model import PriorModel
from prior_hub.priors.config import CONFIG_NAME
from prior_hub.priors.matching import head_parameter_names

__all__ = ["ESTIMATORS", "OBJECTIVES", "learn_prior"]

ESTIMATORS = ("swag", "diagonal-swag", "fisher", "isotropic")
OBJECTIVES = ("supervised", "masked-lm", "simclr", "barlow-twins")
_OF_VIEWS: dict[str, type[SimCLR] | type[BarlowTwins]] = {"simclr": SimCLR, "barlow-twins": BarlowTwins}
_LABEL_NAMES = ("label", "labels")
_TEXT_NAMES = ("text", "sentence", "content", "document", "review")
_STEPS = 1000
_MASKED = 0.15  # share of tokens that a masked language model has to guess (Devlin et al. 2018)
_BATCH_NORM_BATCHES = 200


def learn_prior(
    base_model: str | os.PathLike[str],
    dataset: str | os.PathLike[str] | None = None,
    *,
    output: str | os.PathLike[str] | None = None,
    estimator: str = "swag",
    objective: str = "supervised",
    subset: str | None = None,
    split: str = "train",
    image_column: str | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    max_examples: int | None = None,
    steps: int | None = None,
    batch_size: int = 32,
    learning_rate: float | None = None,
    optimizer: str | None = None,
    weight_decay: float = 0.0,
    augment: bool = True,
    max_length: int = 128,
    rank: int = 20,
    start: int | float = 0.5,
    every_n_steps: int | None = None,
    variance_floor: float = 1e-12,
    labels: str = "model",
    prior_precision: float = 1.0,
    variance: float = 1.0,
    head: str | Sequence[str] | None = "auto",
    revision: str | None = None,
    license: str | None = None,  # noqa: A002 (the Hub's word)
    dataset_license: str | None = None,
    seed: int = 0,
    use_cpu: bool = False,
    progress: bool | None = None,
) -> PriorModel:
    """Learn a prior over the weights of `base_model` on `dataset`.

        prior = learn_prior("microsoft/resnet-50", "uoft-cs/cifar10", output="cifar10-prior")

    Args:
        base_model: Hub name or local folder of a transformers or timm model.
        dataset: Hub name or local folder; not for estimator="isotropic".
        output: folder to write the prior to; checked before anything else is done.
        estimator: one of `ESTIMATORS`.
        objective: one of `OBJECTIVES`.
        subset: configuration of a data set that has several.
        split: split of the data set, also a slice such as "train[:1000]".
        image_column: column of images; the only one when None.
        text_column: column of texts; the only one, or one called text, sentence, content, document or review, when None.
        label_column: column of classes; the only one of class type, or one called label or labels, when None.
        max_examples: take a random draw of so many. The Fisher is averaged over them; its N stays the length of the data set.
        steps: optimizer steps; 1000 when None. For the Fisher 0 when None, unless the head is new.
        batch_size: examples per step and device.
        learning_rate: constant throughout; 0.01 for images (SGD) and 2e-5 for texts (AdamW) when None.
        optimizer: "sgd" (momentum 0.9) or "adamw".
        weight_decay: of that optimizer.
        augment: flip and shift images at random while training; the two views of "simclr" and "barlow-twins" are always made.
        max_length: tokens that longer texts are cut to.
        rank: K, for "swag".
        start: first step to take snapshots after, or a share of training, as `SwagCallback`.
        every_n_steps: as `SwagCallback`.
        variance_floor: as `SwagCallback` and `DiagonalFisherEstimator.prior`.
        labels: of the Fisher: "model", "expectation" or "data".
        prior_precision: tau of the Fisher.
        variance: of "isotropic".
        head: as in `SwagEstimator`.
        revision: branch, tag or commit of the base model.
        license: licence of the prior, a Hub identifier.
        dataset_license: licence of the data set, where it does not say it itself.
        seed: of the head, the order of the data, augmentation and drawn labels.
        use_cpu: do not use an accelerator that is there.
        progress: progress bars; where standard error is a terminal when None.

    Raises:
        ValueError: an argument is wrong; a column is missing (the message lists those there are).
        PriorHubError: a library is missing, the folder is not free, the data set is not there or no good for the objective.
        OSError: the model or the data set cannot be found or fetched.
        PriorNumericsError: training diverged, or too few snapshots were taken.
    """
    _check_choice("estimator", estimator, ESTIMATORS)
    _check_choice("objective", objective, OBJECTIVES)
    if optimizer is not None:
        _check_choice("optimizer", optimizer, ("sgd", "adamw"))
    for name, value in (("batch_size", batch_size), ("max_examples", max_examples), ("max_length", max_length)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}, expected 1 or more.")
    if steps is not None and steps < (0 if estimator == "fisher" else 1):
        raise ValueError(f"steps is {steps}, expected {'0' if estimator == 'fisher' else '1'} or more.")
    target = None if output is None else _free(Path(output).expanduser())
    name = os.fspath(base_model)
    where: dict[str, Any] = {"pretrained_model_name_or_path": name, **({} if revision is None else {"revision": revision})}
    set_seed(seed)
    if estimator == "isotropic":
        if dataset is not None:
            raise ValueError("the isotropic prior is the checkpoint and one variance: it takes no data set.")
        model, new = _loaded(AutoModel, where, head)
        outside = [*head_parameter_names(model, head), *new]  # what the checkpoint does not hold has no mean to offer
        known = _base_commit(model, revision)
        prior = isotropic_prior(model, variance=variance, head=tuple(dict.fromkeys(outside)), license=license, **known)
        return _saved(prior, target)
    if dataset is None:
        raise ValueError(f"estimator={estimator!r} needs a data set; only 'isotropic' does without.")

    if objective in _OF_VIEWS and estimator == "fisher":
        raise ValueError(f"objective={objective!r} is no likelihood of the images, and so has no Fisher: use estimator='swag'.")
    data, about = _dataset(dataset, subset, split)
    whole = len(data)
    if max_examples is not None and max_examples < whole:
        data = data.shuffle(seed=seed).select(range(max_examples))
    task = _task(objective, where, data, image_column, text_column, label_column)
    model, new = _loaded(task.model_class, where, head, **task.model_arguments)
    outside = head_parameter_names(model, head)
    about |= _base_commit(model, revision)
    if objective in _OF_VIEWS:
        if len(data) < max(2, batch_size):
            raise ValueError(f"{len(data)} images do not fill one batch of {batch_size}: pass a smaller batch_size.")
        model, outside = _OF_VIEWS[objective](model), []
    fresh_head = bool(set(new) & set(outside))
    if steps is None:
        steps = 0 if estimator == "fisher" and not fresh_head else _STEPS
    if estimator == "fisher" and fresh_head and not steps:
        raise ValueError(
            f"the head of {name} does not fit the {task.num_labels} classes of {dataset} and is new: a "
            "Fisher needs a trained one. Pass steps (for example 1000), or leave it out."
        )
    images = task.kind == "image classification" or objective in _OF_VIEWS
    optimizer = optimizer or ("sgd" if images else "adamw")
    learning_rate = learning_rate if learning_rate is not None else (0.01 if optimizer == "sgd" else 2e-5)
    training = {"steps": steps, "batch_size": batch_size, "optimizer": optimizer, "learning_rate": learning_rate}
    augmentation = "two views" if objective in _OF_VIEWS else "flip and shift" if augment else "none"
    training |= {"weight_decay": weight_decay, **({"augmentation": augmentation} if images else {})}
    source = {**about.pop("more"), **task.columns, "num_examples": len(data) if steps else whole}
    source |= {} if task.num_labels is None else {"num_labels": task.num_labels}
    source |= {"seed": seed, **(training if steps else {})}
    about |= {"dataset_license": dataset_license} if dataset_license else {}
    facts: dict[str, Any] = {"objective": task.kind, "license": license, **about}

    swag = None
    if estimator in ("swag", "diagonal-swag"):
        swag = SwagCallback(
            rank if estimator == "swag" else 0,
            start=start,
            every_n_steps=every_n_steps,
            variance_floor=variance_floor,
            head=head,
            batch_norm_batches=_BATCH_NORM_BATCHES,
        )
    shown = sys.stderr.isatty() if progress is None else progress
    if steps:
        arguments = _arguments(training, seed=seed, use_cpu=use_cpu)
        arguments["dataloader_drop_last"] = objective in _OF_VIEWS  # images are compared within a batch
        loss = _train(model, arguments, data, task.collator(model, augment=augment, seed=seed, length=max_length), swag, shown)
        source |= {} if loss is None else {"training_loss": loss}
    if swag is not None:
        return _saved(swag.prior(source=source, **facts), target)
    fisher = DiagonalFisherEstimator(labels=labels, head=head, generator=torch.Generator().manual_seed(seed))
    device = "cpu" if use_cpu or not torch.accelerator.is_available() else torch.accelerator.current_accelerator()
    collator = task.collator(model, augment=False, seed=seed, length=max_length)
    fisher.fit(model.to(device), data, batch_size=batch_size, collator=collator, progress=shown)
    prior = fisher.prior(
        prior_precision=prior_precision, num_examples=whole, variance_floor=variance_floor, source=source, **facts
    )
    return _saved(prior, target)


# --------------------------------------------------------------------------------------------------------- the source task


class _Task:
    """One kind of source task: which model class, how many classes, and how a list of rows becomes a batch."""

    def __init__(
        self,
        kind: str,
        model_class: Any,
        collator: Callable[..., Callable[[list[dict[str, Any]]], dict[str, Tensor]]],
        columns: dict[str, str],
        names: list[str] | None = None,
    ) -> None:
        self.kind = kind
        self.model_class = model_class
        self.collator = collator
        self.columns = columns
        self.num_labels = None if names is None else len(names)
        self.model_arguments: dict[str, Any] = {}
        if names is not None:
            self.model_arguments["id2label"] = dict(enumerate(names))
            self.model_arguments["label2id"] = {name: i for i, name in enumerate(names)}


def _task(objective: str, where: Mapping[str, Any], data: Any, image: str | None, text: str | None, label: str | None) -> _Task:
    """What the columns of the data and the objective make it."""
    if objective == "masked-lm":
        words = _text_column(data, text)
        masked = functools.partial(_MaskedTexts, where, words)
        return _Task("masked language modelling", AutoModelForMaskedLM, masked, {"text_column": words})
    found = _image_column(data, image) if text is None else None
    if objective in _OF_VIEWS:
        if found is None:
            raise ValueError(f"objective={objective!r} learns from images, and there is no column of them: {_columns(data)}.")
        views = functools.partial(_Views, where, found)
        return _Task(_OF_VIEWS[objective].objective, AutoModel, views, {"image_column": found})
    words = _text_column(data, text) if found is None else ""
    label = _label_column(data, label)
    classes = _classes(data, label)
    names = [str(name) for name in getattr(data.features[label], "names", None) or classes]
    if found is not None:
        images = functools.partial(_Images, where, found, label, classes)
        columns = {"image_column": found, "label_column": label}
        return _Task("image classification", AutoModelForImageClassification, images, columns, names)
    texts = functools.partial(_Texts, where, words, label, classes)
    columns = {"text_column": words, "label_column": label}
    return _Task("text classification", AutoModelForSequenceClassification, texts, columns, names)


class _Images:
    """Rows -> pixel_values (B, C, H, W) by the model's own image processor, and labels (B,)."""

    def __init__(
        self,
        where: Mapping[str, Any],
        image: str,
        label: str,
        classes: dict[Any, int],
        model: nn.Module,
        *,
        augment: bool,
        seed: int,
        length: int,
    ) -> None:
        del length
        with _extra():
            self.processor = AutoImageProcessor.from_pretrained(**where)
        self.image, self.label, self.classes, self.augment = image, label, classes, augment
        self.mode = "L" if getattr(model.config, "num_channels", 3) == 1 else "RGB"
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        pixels = self.processor([row[self.image].convert(self.mode) for row in rows], return_tensors="pt")["pixel_values"]
        labels = torch.tensor([self.classes[row[self.label]] for row in rows])
        return {"pixel_values": _flipped_and_shifted(pixels, self.generator) if self.augment else pixels, "labels": labels}


class _Views:
    """Rows -> pixel_values (B, 2, C, H, W), two views of each image, of the size and normalisation the model wants."""

    def __init__(
        self, where: Mapping[str, Any], image: str, model: SelfSupervised, *, augment: bool, seed: int, length: int
    ) -> None:
        del augment, seed, length
        with _extra():
            from PIL import Image

            processor = AutoImageProcessor.from_pretrained(**where)
            if getattr(getattr(model.backbone, "config", None), "num_channels", 3) != 3:
                raise ValueError("two views are made of colour images, and this model takes another number of channels.")
            size = processor([Image.new("RGB", (256, 256))], return_tensors="pt")["pixel_values"].shape[-2:]
            mean, std = getattr(processor, "image_mean", None), getattr(processor, "image_std", None)
            normal = {} if mean is None or std is None else {"mean": mean, "std": std}
            self.views = TwoViews((int(size[0]), int(size[1])), column=image, **normal)
        model.prior_source["views"] = self.views.description
        self.image = image

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {"pixel_values": torch.stack([self.views(row[self.image]) for row in rows])}


class _Texts:
    """Rows -> what the model's own tokenizer makes of the texts, padded to the longest, and labels (B,)."""

    def __init__(
        self,
        where: Mapping[str, Any],
        text: str,
        label: str,
        classes: dict[Any, int],
        model: nn.Module,
        *,
        augment: bool,
        seed: int,
        length: int,
    ) -> None:
        del augment, seed
        self.tokenizer = _tokenizer(where, model)
        self.text, self.label, self.classes, self.length = text, label, classes, length

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        texts = [row[self.text] for row in rows]
        batch = self.tokenizer(texts, truncation=True, max_length=self.length, padding=True, return_tensors="pt")
        return {**batch, "labels": torch.tensor([self.classes[row[self.label]] for row in rows])}


class _MaskedTexts:
    """Rows -> texts with some tokens masked, and labels (B, T): the masked tokens, -100 elsewhere."""

    def __init__(self, where: Mapping[str, Any], text: str, model: nn.Module, *, augment: bool, seed: int, length: int) -> None:
        del augment
        self.tokenizer = _tokenizer(where, model)
        if self.tokenizer.mask_token is None:
            raise PriorHubError("the model's tokenizer has no mask token: masked-lm needs a model such as BERT or RoBERTa.")
        self.text, self.length = text, length
        self.mask = DataCollatorForLanguageModeling(self.tokenizer, mlm_probability=_MASKED, seed=seed)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        encoded = self.tokenizer([row[self.text] for row in rows], truncation=True, max_length=self.length)
        return dict(self.mask([{key: values[i] for key, values in encoded.items()} for i in range(len(rows))]))


def _tokenizer(where: Mapping[str, Any], model: nn.Module) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(**where)
    if tokenizer.pad_token is None:  # decoders: padded with the end of text, which the attention mask hides
        tokenizer.pad_token = tokenizer.eos_token
    config: Any = model.config
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = tokenizer.pad_token_id
    return tokenizer


def _flipped_and_shifted(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Each image mirrored with probability 1/2 and moved by up to an eighth of its size, edges reflected: (B, C, H, W)."""
    height, width = pixels.shape[-2:]
    flip = torch.rand(len(pixels), 1, 1, 1, generator=generator) < 0.5
    pixels = torch.where(flip, pixels.flip(3), pixels)
    down, right = height // 8, width // 8
    padded = nn.functional.pad(pixels, (right, right, down, down), mode="reflect")
    tops = torch.randint(2 * down + 1, (len(pixels),), generator=generator).tolist()
    lefts = torch.randint(2 * right + 1, (len(pixels),), generator=generator).tolist()
    parts = zip(padded, tops, lefts, strict=True)
    return torch.stack([image[:, top : top + height, left : left + width] for image, top, left in parts])


# ---------------------------------------------------------------------------------------------------------------- the data


def _dataset(dataset: str | os.PathLike[str], subset: str | None, split: str) -> tuple[Any, dict[str, Any]]:
    """(the rows, what to record about them); a folder of that name wins over the Hub."""
    with _extra():
        from datasets import Image, load_dataset
    name = os.fspath(dataset)
    folder = Path(name).expanduser()
    local = folder.is_dir()
    if not local and (name.startswith((".", "~")) or folder.is_absolute()):
        raise PriorNotFoundError(f"there is no folder {name!r} to read a data set from.")
    data = load_dataset(str(folder) if local else name, subset, split=split)
    for column, feature in data.features.items():
        if isinstance(feature, dict) and set(feature) == {"bytes", "path"}:  # an image whose type the parquet file lacks
            data = data.cast_column(column, Image())
    about: dict[str, Any] = {"dataset": f"local folder {folder.resolve().name}" if local else name}
    if getattr(data.info, "license", None):
        about["dataset_license"] = data.info.license
    about["more"] = {"split": split} | ({} if subset is None else {"subset": subset})
    return data, about


def _image_column(data: Any, wanted: str | None) -> str | None:
    from datasets import Image

    images = [name for name, feature in data.features.items() if isinstance(feature, Image)]
    if wanted is not None:
        if wanted not in images:
            raise ValueError(f"image_column={wanted!r} is no column of images. There are: {_columns(data)}.")
        return wanted
    if len(images) > 1:
        raise ValueError(f"the data set has several columns of images; pass image_column. There are: {_columns(data)}.")
    return images[0] if images else None


def _text_column(data: Any, wanted: str | None) -> str:
    texts: list[str] = [
        name for name, feature in data.features.items() if getattr(feature, "dtype", None) in ("string", "large_string")
    ]
    if wanted is not None:
        if wanted not in texts:
            raise ValueError(f"text_column={wanted!r} is no column of texts. There are: {_columns(data)}.")
        return wanted
    usual = [name for name in texts if name in _TEXT_NAMES]
    others = [name for name in texts if name not in _LABEL_NAMES]
    found = usual if len(usual) == 1 else others
    if len(found) != 1:
        raise ValueError(
            f"cannot tell which column holds the {'texts' if texts else 'images or texts'}: pass image_column or text_column. "
            f"There are: {_columns(data)}."
        )
    return found[0]


def _label_column(data: Any, wanted: str | None) -> str:
    from datasets import ClassLabel

    if wanted is not None:
        if wanted not in data.features:
            raise ValueError(f"label_column={wanted!r} is not there. There are: {_columns(data)}.")
        return wanted
    usual = [name for name in _LABEL_NAMES if name in data.features]
    typed = [name for name, feature in data.features.items() if isinstance(feature, ClassLabel)]
    found = usual if len(usual) == 1 else typed
    if len(found) != 1:
        raise ValueError(f"cannot tell which column holds the classes: pass label_column. There are: {_columns(data)}.")
    return found[0]


def _classes(data: Any, label: str) -> dict[Any, int]:
    """Value of the label column -> class 0, 1, ..."""
    from datasets import ClassLabel

    feature = data.features[label]
    values = data.unique(label)
    if not all(isinstance(value, (int, str)) for value in values):
        odd = next(value for value in values if not isinstance(value, (int, str)))
        raise ValueError(f"label_column={label!r} holds {odd!r}: expected classes, as integers or texts.")
    if isinstance(feature, ClassLabel):
        known = {i: i for i in range(feature.num_classes)}
    else:
        known = {value: i for i, value in enumerate(sorted(values, key=lambda v: (str(type(v)), v)))}
    unlabelled = [value for value in values if value not in known or value == -1]
    if unlabelled:
        raise PriorHubError(f"label_column={label!r} holds {unlabelled[0]!r}: this split has examples without labels.")
    if len(known) < 2:
        raise PriorHubError(f"label_column={label!r} has one class only ({values[0]!r}): there is nothing to learn.")
    return known


def _columns(data: Any) -> str:
    """Every column with its type, for errors."""

    def kind(feature: Any) -> str:
        name = str(type(feature).__name__)
        return f"{feature.dtype}" if name == "Value" else name

    return ", ".join(f"{name} ({kind(feature)})" for name, feature in data.features.items())


# ---------------------------------------------------------------------------------------------------- model and training


def _loaded(
    model_class: Any, where: Mapping[str, Any], head: str | Sequence[str] | None, **arguments: Any
) -> tuple[nn.Module, list[str]]:
    """(model, names of parameters that are not from the checkpoint: missing there, or of another shape)."""
    with _extra():
        config = AutoConfig.from_pretrained(**where, **arguments)
        if getattr(
            config, "model_args", None
        ):  # timm 1.0.31 writes num_classes there too, and transformers 5.24 then has it twice
            config.model_args = {key: value for key, value in config.model_args.items() if key != "num_classes"}
        options = {"ignore_mismatched_sizes": True, "output_loading_info": True}
        model, info = model_class.from_pretrained(**where, config=config, **options)
    new = {*info["missing_keys"], *(item[0] if isinstance(item, tuple) else item for item in info["mismatched_keys"])}
    found = [key for key, _ in model.named_parameters() if key in new]
    outside = set(head_parameter_names(model, head))
    body = {key: p.numel() for key, p in model.named_parameters() if key not in outside}
    lost = [key for key in body if key in new]
    if sum(body[key] for key in lost) > 0.5 * sum(body.values()):
        raise PriorHubError(
            f"{where['pretrained_model_name_or_path']} holds {len(body) - len(lost)} of the {len(body)} parameters of a "
            f"{type(model).__name__} (not {lost[0]!r}, for example): it is the checkpoint of another kind of model."
        )
    return model, found


def _base_commit(model: nn.Module, revision: str | None) -> dict[str, str]:
    """The commit a checkpoint just loaded is from, by the Hub client's cache: transformers 5.24 keeps no `_commit_hash`."""
    name = source_facts(model, ())["base_model"]
    path = None if name is None else try_to_load_from_cache(name, "config.json", revision=revision)
    return {"base_model_revision": Path(path).parent.name} if isinstance(path, str) else {}


def _arguments(training: Mapping[str, Any], *, seed: int, use_cpu: bool) -> dict[str, Any]:
    optim = {"optim": "sgd", "optim_args": "momentum=0.9"} if training["optimizer"] == "sgd" else {"optim": "adamw_torch"}
    return {
        "max_steps": training["steps"],
        "per_device_train_batch_size": training["batch_size"],
        "learning_rate": training["learning_rate"],
        "weight_decay": training["weight_decay"],
        "lr_scheduler_type": "constant",
        "logging_steps": max(1, training["steps"] // 10),
        "save_strategy": "no",
        "report_to": "none",
        "remove_unused_columns": False,
        "dataloader_pin_memory": torch.accelerator.is_available() and not use_cpu,
        "disable_tqdm": True,
        "log_level": "error",
        "seed": seed,
        "use_cpu": use_cpu,
        **optim,
    }


def _train(
    model: nn.Module, arguments: dict[str, Any], data: Any, collator: Any, swag: SwagCallback | None, progress: bool
) -> float | None:
    """Train in place; returns the mean loss per example over the last tenth of the steps, in nats."""
    with tempfile.TemporaryDirectory(prefix="prior-hub-learn-") as folder:
        callbacks: list[TrainerCallback] = [_Progress(progress), *([swag] if swag is not None else [])]
        args = TrainingArguments(output_dir=folder, **arguments)
        trainer = Trainer(model=model, args=args, train_dataset=data, data_collator=collator, callbacks=callbacks)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses[-1] if losses else None


class _Progress(TrainerCallback):
    """One bar on standard error with the loss; Trainer's own writes its logs to standard output."""

    def __init__(self, shown: bool) -> None:
        self.shown = shown
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar."""
        del args, control, kwargs
        self.bar = tqdm(total=state.max_steps, desc="training", disable=not self.shown)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One step on."""
        del args, state, control, kwargs
        self.bar.update()

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        """Show the loss."""
        del args, state, control, kwargs
        if logs and "loss" in logs:
            self.bar.set_postfix(loss=f"{float(logs['loss']):.3f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        del args, state, control, kwargs
        self.bar.close()


# ----------------------------------------------------------------------------------------------------------------- helpers


def _check_choice(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(repr, known))}.")


@contextmanager
def _extra() -> Iterator[None]:
    """timm, datasets, torchvision and pillow are in an extra; what is missing is told with how to get it."""
    try:
        yield
    except ImportError as error:
        raise PriorHubError(f"{str(error).strip()} Install it: pip install 'prior-hub[vision]'") from error


def _free(folder: Path) -> Path:
    """A folder that a prior may be written to: a new one, an empty one, or one that holds a prior (which is replaced)."""
    if folder.exists() and not folder.is_dir():
        raise PriorHubError(f"{folder} is a file: name a folder to write the prior to.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / CONFIG_NAME).is_file():
        raise PriorHubError(f"{folder} is not empty and holds no prior: name another folder, or empty this one.")
    return folder


def _saved(prior: PriorModel, folder: Path | None) -> PriorModel:
    if folder is not None:
        prior.save_pretrained(folder)
    return prior
