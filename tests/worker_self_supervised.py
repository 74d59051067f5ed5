"""Run by torchrun from test_self_supervised.py: this rank's half of a batch through a DDP-wrapped self-supervised model."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from prior_hub import BarlowTwins, SimCLR
from prior_hub.learning.self_supervised import SelfSupervised

IMAGES = 10


def model(name: str) -> SelfSupervised:
    """Without BatchNorm, in float64."""
    torch.manual_seed(3)
    backbone = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    if name == "simclr":
        return SimCLR(backbone, num_features=24, projection=5, batch_norm=False, temperature=0.3).double()
    return BarlowTwins(backbone, num_features=24, projection=(7, 5), batch_norm=False, redundancy_weight=0.1).double()


def views() -> Tensor:
    """(B, 2, 3, 6, 6), two alike views of each image."""
    generator = torch.Generator().manual_seed(4)
    images = torch.randn(IMAGES, 1, 3, 6, 6, generator=generator, dtype=torch.float64)
    return images + 0.5 * torch.randn(IMAGES, 2, 3, 6, 6, generator=generator, dtype=torch.float64)


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank, half = dist.get_rank(), IMAGES // dist.get_world_size()
    for name in ("simclr", "barlow"):
        wrapped = DistributedDataParallel(model(name))
        loss = wrapped(pixel_values=views()[rank * half : (rank + 1) * half])["loss"]
        loss.backward()
        gradients = {n: p.grad for n, p in wrapped.module.named_parameters()}
        save_file(gradients | {"loss": loss.detach().reshape(1)}, folder / f"{name}-{rank}.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
