"""Small priors for the tests, and what it means that two priors are the same: every bit and every field."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prior_hub.model import PriorModel

SHAPES: dict[str, tuple[int, ...]] = {
    "layer.weight": (4, 3),
    "layer.bias": (4,),
    "temperature": (),
    "head.weight": (2, 4),
}
METADATA: dict[str, Any] = {
    "base_model": "org/tiny-net",
    "base_model_revision": "0123456789abcdef0123456789abcdef01234567",
    "model_type": "tiny",
    "license": "apache-2.0",
    "source": {"objective": "cross entropy", "dataset": "org/tiny-images", "dataset_license": "cc-by-4.0", "epochs": 3},
    "estimator": {"name": "swag", "learning_rate": 0.05, "batch_norm": "recomputed"},
    "head_parameters": ("head.weight",),
    "tied_parameters": {"decoder.weight": "layer.weight"},
    "num_snapshots": 24,
    "variance_floor": 1e-12,
}


def random_prior(
    seed: int = 0,
    rank: int = 3,
    shapes: Mapping[str, tuple[int, ...]] = SHAPES,
    *,
    mean: torch.dtype = torch.float32,
    deviations: torch.dtype = torch.float32,
    buffers: bool = True,
    **fields: Any,
) -> PriorModel:
    """A prior of random numbers; `fields` replace those of METADATA."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    known = {"tied_parameters": {}, "head_parameters": ()} if "layer.weight" not in shapes else {}
    return PriorModel.from_tensors(
        {name: randn(*shape).to(mean) for name, shape in shapes.items()},
        {name: (randn(*shape).square() * 1e-3 + 1e-6).to(mean) for name, shape in shapes.items()},
        {name: (0.03 * randn(rank, *shape)).to(deviations) for name, shape in shapes.items()} if rank else None,
        buffers={
            "bn.running_mean": randn(4).float(),
            "bn.running_var": randn(4).float().square(),
            "bn.num_batches_tracked": torch.tensor(2**40 + seed),
        }
        if buffers
        else None,
        **(METADATA | known | {"scale": 0.3 + seed, "eps": 1e-9} | fields),
    )


def tensors_of(prior: PriorModel) -> dict[str, Tensor]:
    """Storage key -> tensor, in order."""
    kinds = (("mean", prior.mean), ("variance", prior.variance), ("deviations", prior.deviations), ("buffer", prior.buffers))
    return {f"{kind}.{name}": tensor for kind, tensors in kinds for name, tensor in tensors.items()}


def bits(tensor: Tensor) -> bytes:
    """The bytes of a tensor: NaN equals NaN, -0 differs from 0."""
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist()) if tensor.numel() else b""


def description(prior: PriorModel) -> dict[str, Any]:
    """Every field of the configuration but the hashes of the files it lies in."""
    return json.loads(prior.config.replace(weight_files={}).to_json())


def differences(found: PriorModel, expected: PriorModel) -> list[str]:
    """What differs between two priors: names, order, shapes, types, bits, settings, configuration; [] if nothing does."""
    a, b = tensors_of(found), tensors_of(expected)
    if list(a) != list(b):
        return [f"keys {list(a)} != {list(b)}"]
    wrong = [f"type of {key}: {a[key].dtype} != {b[key].dtype}" for key in a if a[key].dtype != b[key].dtype]
    wrong += [f"shape of {key}: {a[key].shape} != {b[key].shape}" for key in a if a[key].shape != b[key].shape]
    wrong += [f"values of {key}" for key in a if bits(a[key]) != bits(b[key])]
    for name in ("scale", "diagonal_weight", "low_rank_weight", "eps", "rank"):
        if getattr(found.gaussian, name) != getattr(expected.gaussian, name):
            wrong.append(f"{name}: {getattr(found.gaussian, name)} != {getattr(expected.gaussian, name)}")
    left, right = description(found), description(expected)
    return wrong + [f"config {key}: {left[key]} != {right[key]}" for key in left if left[key] != right[key]]


def assert_same(found: PriorModel, expected: PriorModel) -> None:
    """Fail with the list of differences."""
    assert differences(found, expected) == []


def edit_config(folder: Path, **changes: Any) -> None:
    """Change keys of the prior_config.json in `folder`, as a person with an editor would."""
    path = folder / "prior_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


class TinyNet(nn.Module):
    """The model the SHAPES are from: all but "temperature" and the buffers have a use."""

    def __init__(self, seed: int = 0, classes: int = 2) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.layer = nn.Linear(3, 4)
            self.temperature = nn.Parameter(torch.ones(()))
            self.head = nn.Linear(4, classes, bias=False)
        self.bn = nn.BatchNorm1d(4)
        self.bn.weight.requires_grad_(False)
        self.bn.bias.requires_grad_(False)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.head(torch.relu(self.layer(x))) / self.temperature
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}
