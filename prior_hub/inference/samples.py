"""Samples of the posterior as files: FOLDER/chain-C/sample-STEP.safetensors, written whole or not at all.

keys     parameter.<name>  (*shape)      every parameter that is trained, by its canonical name
         buffer.<name>     (*shape)      BatchNorm statistics that go with them
metadata prior_hub, step, chain; frozen: the sha256 of the parameters that are not trained; from PriorTrainer also sampler,
         temperature, effective_temperature, learning_rate, scale, num_data and cycle

Frozen parameters are the same in every sample and are not stored; a model with others is refused by that hash.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from prior_hub import __version__
from prior_hub.distributed import is_sharded
from prior_hub.errors import PriorFormatError, PriorNumericsError
from prior_hub.priors.batch_norm import batch_norm_buffers
from prior_hub.priors.matching import canonical_parameters
from prior_hub.priors.storage import open_tensors, save_tensors, sync

__all__ = ["Sample", "StoredSample", "frozen_digest", "list_samples", "remove_samples", "write_sample"]

_NAME = re.compile(r"sample-([0-9]{8,})\.safetensors")
_CHAIN = re.compile(r"chain-([0-9]+)")


@dataclass(frozen=True)
class Sample:
    """One sample in memory.

    Attributes:
        parameters: canonical name -> (*shape).
        buffers: canonical name -> (*shape), BatchNorm statistics.
        frozen: sha256 of the parameters that are not in it, "" if that is not known.
    """

    parameters: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    frozen: str = ""

    def read(self) -> Sample:
        """Itself."""
        return self


@dataclass(frozen=True)
class StoredSample:
    """One sample in a file; its tensors are read by `read()`.

    Attributes:
        path: the file.
        chain: number of its chain.
        step: optimizer steps that the chain had taken.
    """

    path: Path
    chain: int
    step: int

    def read(self) -> Sample:
        """Read and check the tensors.

        Raises:
            PriorFormatError: not a sample: truncated, another format, or a key that does not belong there.
            PriorNumericsError: NaN or infinity.
        """
        parameters: dict[str, Tensor] = {}
        buffers: dict[str, Tensor] = {}
        with open_tensors(self.path) as handle:
            metadata = handle.metadata() or {}
            for key in handle.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
                kind, _, name = key.partition(".")
                if kind not in ("parameter", "buffer") or not name:
                    raise PriorFormatError(f"{self.path}: {key!r} is no key of a sample (parameter.NAME or buffer.NAME).")
                (parameters if kind == "parameter" else buffers)[name] = handle.get_tensor(key)
        if not parameters:
            raise PriorFormatError(f"{self.path} holds no parameter.")
        _check_finite({**parameters, **buffers}, str(self.path))
        return Sample(parameters, buffers, metadata.get("frozen", ""))

    def metadata(self) -> dict[str, Any]:
        """What was written beside: sampler, temperature, learning_rate, scale, num_data, cycle, version."""
        with open_tensors(self.path) as handle:
            found: dict[str, Any] = handle.metadata() or {}
        return found


def write_sample(
    folder: str | os.PathLike[str],
    model: nn.Module,
    *,
    step: int,
    chain: int = 0,
    buffers: Mapping[str, Tensor] | None = None,
    frozen: str | None = None,
    **metadata: Any,
) -> StoredSample:
    """Write the model's trained parameters and BatchNorm statistics as a sample; called on every rank, written by the first.

    Args:
        folder: of all chains.
        model: the model, possibly wrapped or sharded.
        step: optimizer steps that the chain has taken.
        chain: its number.
        buffers: the statistics to write; the model's own when None.
        frozen: what `frozen_digest(model)` gave, where it is known already.
        **metadata: written as text.

    Returns:
        The sample.

    Raises:
        PriorNumericsError: a weight is NaN or infinite: the chain has diverged. Nothing is written.
    """
    tensors = {f"parameter.{n}": _whole(p) for n, p in canonical_parameters(model).items() if p.requires_grad}
    statistics = batch_norm_buffers(model) if buffers is None else buffers
    tensors |= {f"buffer.{n}": _whole(b) for n, b in statistics.items()}
    _check_finite(tensors, f"the chain at step {step}")
    digest = frozen_digest(model) if frozen is None else frozen
    sample = StoredSample(_place(Path(folder), chain, step), chain, step)
    if not dist.is_initialized() or dist.get_rank() == 0:
        sample.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = sample.path.with_name(f".{sample.path.name}-{secrets.token_hex(4)}")
        text = {"prior_hub": __version__, "step": str(step), "chain": str(chain), "frozen": digest}
        try:
            save_tensors(tensors, unfinished, text | {key: str(value) for key, value in metadata.items()})
            sync(unfinished)
            unfinished.replace(sample.path)
        finally:
            unfinished.unlink(missing_ok=True)
        sync(sample.path.parent)
    return sample


def list_samples(folder: str | os.PathLike[str], *, chain: int | None = None) -> list[StoredSample]:
    """The samples in a folder, by chain and step; empty where there are none.

    Args:
        folder: of all chains.
        chain: only this one.
    """
    found = []
    for sub in Path(folder).glob("chain-*"):
        number = _CHAIN.fullmatch(sub.name)
        if number is None or not sub.is_dir() or (chain is not None and int(number[1]) != chain):
            continue
        for path in sub.iterdir():
            step = _NAME.fullmatch(path.name)
            # only under its own name: 9 digits where 8 do would count a sample twice
            if step is not None and path.is_file() and path == _place(Path(folder), int(number[1]), int(step[1])):
                found.append(StoredSample(path, int(number[1]), int(step[1])))
    return sorted(found, key=lambda s: (s.chain, s.step))


def remove_samples(folder: str | os.PathLike[str], *, chain: int, after: int) -> int:
    """Remove a chain's samples of later steps than `after`, and what a killed run left half written; how many there were."""
    later = [sample for sample in list_samples(folder, chain=chain) if sample.step > after]
    for sample in later:
        sample.path.unlink()
    for path in (Path(folder) / f"chain-{chain}").glob(".sample-*"):
        if path.is_file():
            path.unlink()
    return len(later)


def frozen_digest(model: nn.Module) -> str:
    """sha256 over the parameters that are not trained, by name; "" where all are."""
    frozen = {name: p for name, p in sorted(canonical_parameters(model).items()) if not p.requires_grad}
    if not frozen:
        return ""
    digest = hashlib.sha256()
    for name, parameter in frozen.items():
        whole = _whole(parameter)
        digest.update(f"{name} {tuple(whole.shape)} {whole.dtype}".encode())
        digest.update(whole.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _place(folder: Path, chain: int, step: int) -> Path:
    return folder / f"chain-{chain}" / f"sample-{step:08d}.safetensors"


def _whole(tensor: Tensor) -> Tensor:
    full: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return full.detach().to("cpu")


def _check_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    for name, tensor in tensors.items():
        bad = int((~torch.isfinite(tensor)).sum()) if tensor.is_floating_point() else 0
        if bad:
            raise PriorNumericsError(
                f"{what}: {name!r} has {bad} of {math.prod(tensor.shape)} entries that are NaN or infinite. If the chain has "
                "diverged, take a smaller learning rate."
            )
