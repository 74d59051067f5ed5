"""Tiny models, data, priors and settings for the tests, and the dense float64 formula they are held against.

Every model has less than two thousand parameters and no dropout; every factory takes a seed and leaves the global random
state alone. transformers is imported inside the factories, so that importing this file is cheap.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from prior_hub import PriorModel
from prior_hub.priors.matching import canonical_parameters, head_parameter_names

IMAGE_SIZE, VOCABULARY, TOKENS = 8, 24, 6

# ------------------------------------------------------------------------------------------------------------- models


def tiny_vit(seed: int = 0, classes: int = 3, **config: Any) -> nn.Module:
    """ViTForImageClassification: its loss divides by num_items_in_batch, as Trainer wants. No BatchNorm."""
    from transformers import ViTConfig, ViTForImageClassification

    settings = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12, "patch_size": 4}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    settings |= {"image_size": IMAGE_SIZE, "num_labels": classes, "initializer_range": 0.2} | still | config
    return _seeded(seed, lambda: ViTForImageClassification(ViTConfig(**settings)))


def tiny_resnet(seed: int = 0, classes: int = 3, **config: Any) -> nn.Module:
    """ResNetForImageClassification: BatchNorm, and a loss that ignores num_items_in_batch."""
    from transformers import ResNetConfig, ResNetForImageClassification

    settings = {"embedding_size": 4, "hidden_sizes": [8], "depths": [1], "layer_type": "basic", "num_labels": classes}
    return _seeded(seed, lambda: ResNetForImageClassification(ResNetConfig(**(settings | config))))


def tiny_bert(seed: int = 0, classes: int = 3, **config: Any) -> nn.Module:
    """BertForSequenceClassification: a loss that ignores num_items_in_batch. No BatchNorm."""
    from transformers import BertConfig, BertForSequenceClassification

    settings = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    settings |= {"vocab_size": VOCABULARY, "max_position_embeddings": TOKENS, "num_labels": classes, "pad_token_id": 0}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.2}
    return _seeded(seed, lambda: BertForSequenceClassification(BertConfig(**(settings | still | config))))


def tiny_llama(seed: int = 0, **config: Any) -> nn.Module:
    """LlamaForCausalLM: the loss is a mean over tokens, and the model has an FSDP2 plan of its own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
    settings |= {"vocab_size": VOCABULARY, "max_position_embeddings": TOKENS, "pad_token_id": 0, "initializer_range": 0.2}
    settings |= {"bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}
    return _seeded(seed, lambda: LlamaForCausalLM(LlamaConfig(**(settings | config))))


def _seeded(seed: int, make: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = make()
        with torch.no_grad():  # so that no parameter starts at exactly 0 or 1, where a wrong formula may look right
            for parameter in model.parameters():
                parameter += 0.02 * torch.randn_like(parameter)
    return model


# --------------------------------------------------------------------------------------------------------------- data


def image_data(rows: int = 26, seed: int = 0, classes: int = 3) -> list[dict[str, Any]]:
    """`rows` images (3, 8, 8) with labels that depend on the image."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(rows, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    labels = [i % classes for i in range(rows)]
    for image, label in zip(images, labels, strict=True):
        image[label % 3] += 0.7
    return [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]


def text_data(rows: int = 26, seed: int = 0, classes: int = 3, *, token_labels: bool = False) -> list[dict[str, Any]]:
    """`rows` sequences of 6 tokens; labels are classes, or with `token_labels` the tokens themselves (a language model)."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, VOCABULARY, (rows, TOKENS), generator=generator)
    labels: list[Any] = [row.clone() for row in tokens] if token_labels else [i % classes for i in range(rows)]
    ones = torch.ones(TOKENS, dtype=torch.long)
    return [{"input_ids": row, "attention_mask": ones, "labels": y} for row, y in zip(tokens, labels, strict=True)]


class Stream(IterableDataset):  # type: ignore[type-arg]
    """The rows of a list in order, without a length."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)


# ------------------------------------------------------------------------------------------------------------- priors


def random_prior(
    model: nn.Module,
    *,
    rank: int = 3,
    seed: int = 1,
    variance: float = 0.01,
    shift: float = 0.05,
    head: Any = "auto",
    **more: Any,
) -> PriorModel:
    """A low-rank prior over the body of `model`, its mean `shift` away from the weights in every entry.

    Variances are spread over a factor of 10 around `variance`, and differ from entry to entry; `more` goes to
    `PriorModel.from_tensors`.
    """
    generator = torch.Generator().manual_seed(seed)
    outside = head_parameter_names(model, head)
    body = {n: p.detach() for n, p in canonical_parameters(model).items() if n not in outside}

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    mean = {n: (p.float() + shift * normal(*p.shape)).contiguous() for n, p in body.items()}
    spread = {n: variance * 10 ** (torch.rand(p.shape, generator=generator) - 0.5) for n, p in body.items()}
    rows = {n: variance**0.5 * normal(rank, *p.shape) for n, p in body.items()} if rank else None
    told = {"license": "mit", "base_model": "org/tiny-net", "source": {"dataset": "org/tiny-data"}}  # what a push asks for
    return PriorModel.from_tensors(mean, spread, rows, head_parameters=tuple(outside), **(told | more))


def dense_covariance(prior: PriorModel, names: list[str] | None = None, *, scale: float | None = None) -> Tensor:
    """Sigma (P, P) in float64 from the formula of the design, over `names` (all when None), in that order.

    Sigma = scale (a diag(variance) + b D^T D) + eps I
    """
    names = list(prior.mean) if names is None else names
    config = prior.config
    factor = config.scale if scale is None else scale
    variance = torch.cat([prior.variance[n].double().flatten() for n in names])
    sigma = torch.diag(config.diagonal_weight * variance)
    if config.rank:
        rows = torch.cat([prior.deviations[n].double().reshape(config.rank, -1) for n in names], dim=1)  # (K, P)
        sigma = sigma + config.low_rank_weight * rows.T @ rows
    return factor * sigma + config.eps * torch.eye(len(variance), dtype=torch.float64)


def dense_penalty(
    prior: PriorModel, theta: Mapping[str, Tensor], *, scale: float | None = None
) -> tuple[float, dict[str, Tensor]]:
    """(penalty in nats, its gradient by name), solved densely in float64; `theta` by the prior's names, in full shape.

    Parameters of the prior missing from `theta` are marginalised (their rows of Sigma dropped).
    """
    names = [n for n in prior.mean if n in theta]
    delta = torch.cat([(theta[n].detach().double() - prior.mean[n].double()).flatten() for n in names])
    solved = torch.linalg.solve(dense_covariance(prior, names, scale=scale), delta)
    parts = solved.split([prior.mean[n].numel() for n in names])
    gradient = {n: part.view(prior.mean[n].shape) for n, part in zip(names, parts, strict=True)}
    return 0.5 * float(delta @ solved), gradient


# ----------------------------------------------------------------------------------------------------------- settings


def quiet_arguments(folder: str | os.PathLike[str], cls: type | None = None, **settings: Any) -> Any:
    """`cls` (PriorTrainingArguments when None) for a CPU test: silent, no reports, no checkpoints, data in order."""
    from prior_hub import PriorTrainingArguments

    defaults = {
        "output_dir": os.fspath(folder),
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "log_level": "error",
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "train_sampling_strategy": "sequential",
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "learning_rate": 1e-3,
        "max_grad_norm": 0.0,
        "dataloader_pin_memory": False,
    }
    return (cls or PriorTrainingArguments)(**(defaults | settings))
