"""BatchNorm statistics at other weights: the moving averages of training do not fit the SWA mean, nor any sample."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sized
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from prior_hub.distributed import local_tensor, sum_over_ranks
from prior_hub.errors import PriorHubError
from prior_hub.priors.matching import canonical_parameters, persistent_buffers, unwrapped

_MOST_UNSIZED = 1000

__all__ = ["batch_norm_buffers", "has_batch_norm", "over_ranks", "recompute_batch_norm"]


def _normalisation_modules(model: nn.Module) -> list[Any]:
    """Modules that average statistics while they train; frozen BatchNorm (torchvision's, DETR's) does not."""
    kept = [m for m in model.modules() if isinstance(getattr(m, "running_mean", None), Tensor)]
    return [m for m in kept if hasattr(m, "reset_running_stats") and hasattr(m, "momentum")]


def has_batch_norm(model: nn.Module) -> bool:
    """Whether any module averages statistics over batches."""
    return bool(_normalisation_modules(model))


def batch_norm_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Canonical name -> buffer of every module with a running mean: running_mean, running_var, num_batches_tracked.

    Frozen BatchNorm's are among them.
    """
    with_statistics = [m for m in model.modules() if isinstance(getattr(m, "running_mean", None), Tensor)]
    ids = {id(buffer) for module in with_statistics for buffer in module.buffers(recurse=False)}
    return {name: buffer for name, buffer in persistent_buffers(model).items() if id(buffer) in ids}


def recompute_batch_norm(
    model: nn.Module,
    dataloader: Iterable[Any],
    *,
    parameters: Mapping[str, Tensor] | None = None,
    max_batches: int | None = None,
    progress: bool = True,
    in_training_mode_only: bool = False,
) -> dict[str, Tensor]:
    """Running statistics of `model` at other weights, as equal-weight averages over batches.

    The model is left exactly as it was: weights, statistics and modes are put back.

    Args:
        model: the model; only its BatchNorm modules are put into training mode, so that dropout stays off.
        dataloader: batches of training data: dictionaries (passed as keywords), tuples (first element), or tensors.
        parameters: canonical name -> (*shape), the weights to measure at (this rank's shard of sharded ones); the
            model's own when None. Parameters not named stay as they are.
        max_batches: stop after so many batches; all when None (of a data loader without a length, which may never end, 1000).
        progress: show a progress bar.
        in_training_mode_only: leave alone the BatchNorm modules that are in eval mode, which their user has frozen.

    Returns:
        Canonical name -> buffer; empty for a model without running statistics.

    Raises:
        PriorHubError: the data loader gave no batch, or only batches with one value for some module.
    """
    modules = [m for m in _normalisation_modules(model) if m.training or not in_training_mode_only]
    if not modules:
        kept = batch_norm_buffers(model) if in_training_mode_only else {}
        return {name: buffer.detach().clone() for name, buffer in kept.items()}
    own = canonical_parameters(model)
    saved = {name: local_tensor(own[name]).detach().clone() for name in parameters or {}}
    buffers = batch_norm_buffers(model)
    statistics = {name: buffer.detach().clone() for name, buffer in buffers.items()}
    modes = {module: module.training for module in model.modules()}
    momenta = {module: module.momentum for module in modules}
    device = next(iter(own.values())).device
    total = _length(dataloader)
    limit = max_batches if max_batches is not None or total is not None else _MOST_UNSIZED
    seen = 0
    single: ValueError | None = None
    try:
        with torch.no_grad():
            for name, value in (parameters or {}).items():
                local_tensor(own[name]).copy_(value)
            model.eval()
            for module in modules:
                module.reset_running_stats()
                module.momentum = None  # None: the average over all batches
                module.train()
            bar = tqdm(dataloader, desc="BatchNorm statistics", total=_least(total, limit), disable=not progress)
            for batch in bar:
                if limit is not None and seen >= limit:
                    break
                before = {name: buffer.clone() for name, buffer in buffers.items()}
                try:
                    _forward(model, batch, device)
                except ValueError as error:
                    if "more than 1 value per channel" not in str(error):
                        raise
                    for name, buffer in buffers.items():
                        buffer.copy_(before[name])
                    single = error  # a last batch of one image, pooled to one pixel (UperNet, DeepLab): it has no variance
                    continue
                seen += 1
            if not seen and single is not None:
                raise PriorHubError(
                    "every batch had a single value for some BatchNorm module (one image, pooled to one pixel), which has no "
                    "variance: pass a data loader with larger batches."
                ) from single
            if not seen:
                raise PriorHubError("the data loader gave no batch to recompute BatchNorm statistics from.")
            return {name: buffer.detach().clone() for name, buffer in batch_norm_buffers(model).items()}
    finally:
        with torch.no_grad():
            for name, value in saved.items():
                local_tensor(own[name]).copy_(value)
            for name, buffer in batch_norm_buffers(model).items():
                buffer.copy_(statistics[name])
        for module, momentum in momenta.items():
            module.momentum = momentum
        for module, training in modes.items():
            module.training = training


def over_ranks(buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The statistics over the batches of all ranks, from each rank's equal-weight average over its own."""
    result = {}
    for name, buffer in buffers.items():
        seen = buffers.get(f"{name.rpartition('.')[0]}.num_batches_tracked")
        if not buffer.is_floating_point():  # num_batches_tracked itself
            result[name] = sum_over_ranks(buffer.clone())
            continue
        weight = torch.ones_like(buffer.reshape(-1)[:1]) if seen is None else seen.to(buffer.dtype).reshape(1)
        total = sum_over_ranks(weight.clone())
        if total.item() == 0:  # a module that no batch reaches
            result[name] = buffer.clone()
            continue
        result[name] = sum_over_ranks(buffer * (weight / total))
    return result


def _forward(model: nn.Module, batch: Any, device: torch.device) -> None:
    if isinstance(batch, Mapping):
        accepted = inspect.signature(unwrapped(model).forward).parameters
        takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values())
        wanted = [key for key in batch if takes_all or key in accepted or key != "labels"]  # a loss of Trainer's own takes them
        model(**{key: _moved(batch[key], device) for key in wanted})
    elif isinstance(batch, (tuple, list)):
        model(_moved(batch[0], device))
    else:
        model(_moved(batch, device))


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _length(dataloader: Iterable[Any]) -> int | None:
    try:
        return len(dataloader) if isinstance(dataloader, Sized) else None
    except TypeError:  # a DataLoader over an iterable data set has __len__, and raises in it
        return None


def _least(*numbers: int | None) -> int | None:
    return min((n for n in numbers if n is not None), default=None)
