"""Architectures by name, without weights: names, shapes and order of parameters to read other people's files by.

    torchvision:resnet50        torchvision.models.get_model
    timm:resnet50               timm.create_model
    transformers:ORG/NAME       the architecture of a model on the Hub, or of a local folder (its config.json alone is read)

Nothing is allocated: the models are made on torch's "meta" device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prior_hub.errors import PriorNotFoundError

__all__ = ["named_model", "reference_model"]

_EXPECTED = "expected torchvision:NAME, timm:NAME or transformers:ORG/NAME, such as torchvision:resnet50"


def reference_model(name: str) -> nn.Module:
    """The architecture of that name on the meta device.

    Args:
        name: "torchvision:resnet50", "timm:resnet50" or "transformers:microsoft/resnet-50".

    Raises:
        ValueError: the name has another form.
        PriorNotFoundError: the library is not installed, or knows no such model.
    """
    library, _, model = name.partition(":")
    makers = {"torchvision": _torchvision, "timm": _timm, "transformers": _transformers}
    if library not in makers or not model:
        raise ValueError(f"reference {name!r}: {_EXPECTED}.")
    try:
        return _without_weights(lambda: makers[library](model))
    except ImportError as error:
        raise PriorNotFoundError(f"reference {name!r}: {error}. Install it: pip install 'prior-hub[vision]'.") from error


def named_model(name: str, *, revision: str | None = None) -> nn.Module:
    """The architecture of a model by the name a person has for it, on the meta device: its configuration alone is read.

    Args:
        name: a name on the Hub ("microsoft/resnet-50", "timm/resnet18.a1_in1k"), a folder with a config.json, timm's name of an
            architecture ("resnet18"), or any name of `reference_model`.
        revision: branch, tag or commit on the Hub.

    Returns:
        The model of the class that the configuration names, its head included; without one the bare network.

    Raises:
        PriorNotFoundError: there is no such model, or its library is not installed.
    """
    if name.split(":")[0] in ("torchvision", "timm", "transformers") and ":" in name:
        return reference_model(name)
    import transformers

    if "/" not in name and not Path(name).is_dir():
        with contextlib.suppress(ImportError):
            import timm

            if timm.is_model(name):
                return reference_model(f"timm:{name}")
    try:
        config = transformers.AutoConfig.from_pretrained(name, revision=revision or "main", trust_remote_code=False)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise PriorNotFoundError(f"no model {name!r}: its configuration cannot be read ({first})") from error
    named = [getattr(transformers, kind, None) for kind in getattr(config, "architectures", None) or ()]
    made = next((kind for kind in named if kind is not None), None)
    if made is None and config.model_type == "timm_wrapper":
        made = transformers.TimmWrapperForImageClassification
        if getattr(config, "model_args", None):  # timm 1.0.31 writes num_classes there too, transformers 5.24 has it twice
            config.model_args = {key: value for key, value in config.model_args.items() if key != "num_classes"}
    try:
        make = transformers.AutoModel.from_config if made is None else made._from_config
        return _without_weights(lambda: _module(make(config)))
    except ImportError as error:
        raise PriorNotFoundError(f"model {name!r}: {error}. Install it: pip install 'prior-hub[vision]'.") from error


def _without_weights(make: Callable[[], nn.Module]) -> nn.Module:
    """What `make` makes, its parameters on the meta device."""
    try:
        with torch.device("meta"):
            return make()
    except (RuntimeError, NotImplementedError) as error:
        if "meta" not in str(error):
            raise
    from accelerate import init_empty_weights

    with init_empty_weights():  # which leaves all else real: timm 1.0.20 reads numbers that it computes
        return make()


def _torchvision(name: str) -> nn.Module:
    from torchvision.models import get_model, list_models

    if name not in list_models():
        raise PriorNotFoundError(f"torchvision has no model {name!r}{_like(name, list_models())}")
    return _module(get_model(name, weights=None, **({"init_weights": False} if name in ("googlenet", "inception_v3") else {})))


def _timm(name: str) -> nn.Module:
    import timm

    if not timm.is_model(name):
        raise PriorNotFoundError(f"timm has no model {name!r}{_like(name, timm.list_models())}")
    return _module(timm.create_model(name, pretrained=False))


def _transformers(name: str) -> nn.Module:
    from transformers import AutoConfig, AutoModel

    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise PriorNotFoundError(f"transformers cannot read the configuration of {name!r}: {first}") from error
    return _module(AutoModel.from_config(config))


def _module(model: Any) -> nn.Module:
    assert isinstance(model, nn.Module)  # noqa: S101 - the libraries are not typed
    return model


def _like(name: str, known: list[str]) -> str:
    import difflib

    close = difflib.get_close_matches(name, known, n=3)
    return f". Did you mean {', '.join(close)}?" if close else "."
