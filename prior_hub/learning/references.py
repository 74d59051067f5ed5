"""Architectures by name, without weights: names, shapes and order of parameters to read other people's files by.

    torchvision:resnet50        torchvision.models.get_model
    timm:resnet50               timm.create_model
    transformers:ORG/NAME       the architecture of a model on the Hub, or of a local folder (its config.json alone is read)

Nothing is allocated: the models are made on torch's "meta" device.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from prior_hub.errors import PriorNotFoundError

__all__ = ["model_by_name", "reference_model"]

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
        try:
            with torch.device("meta"):
                return makers[library](model)
        except RuntimeError as error:  # timm 1.0.20 reads numbers from a tensor as it builds some models
            if "meta" not in str(error):
                raise
            from accelerate import init_empty_weights

            with init_empty_weights():
                return makers[library](model)
    except ImportError as error:
        raise PriorNotFoundError(f"reference {name!r}: {error}. Install it: pip install 'prior-hub[vision]'.") from error


def model_by_name(name: str) -> nn.Module:
    """The model a person means by a name, on the meta device: its configuration is read, its weights are not.

    Args:
        name: Hub name or local folder of a transformers or timm model ("microsoft/resnet-50", "timm/resnet18.a1_in1k"), a name
            of timm ("resnet18"), or a name as `reference_model` has them.

    Raises:
        PriorNotFoundError: there is no such model.
    """
    if name.split(":")[0] in ("torchvision", "timm", "transformers") and not Path(name).exists():
        return reference_model(name)
    folder = Path(name).expanduser()
    if "/" not in name and not folder.is_dir() and _known_to_timm(name):
        return reference_model(f"timm:{name}")
    return reference_model(f"transformers:{folder if folder.is_dir() else name}")


def _known_to_timm(name: str) -> bool:
    try:
        import timm
    except ImportError:
        return False
    return bool(timm.is_model(name))


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
