"""Standard normal noise that depends on nothing but (seed, chain, step, shard): own generators, never the global one.

Replicas of one parameter (DDP, replicated dimensions of FSDP2) draw the same numbers and stay equal, shards of one parameter
draw different ones, and a chain that is resumed at a step draws what the uninterrupted chain would have drawn.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prior_hub.distributed import local_tensor, shard_index

__all__ = ["NoiseSource"]

_SHARED = -1  # the stream of vectors that belong to no parameter
_MASK = (1 << 64) - 1


class NoiseSource:
    """Streams of standard normal noise, one per shard index.

    Args:
        seed: of the run.
        chain: of several independent chains with the same seed.
    """

    def __init__(self, seed: int = 0, chain: int = 0) -> None:
        self.seed, self.chain = int(seed), int(chain)
        self._step = 0
        self._generators: dict[tuple[int, torch.device], torch.Generator] = {}
        self._fresh: set[tuple[int, torch.device]] = set()

    def start(self, step: int) -> None:
        """Begin the noise of a step: every stream from its start."""
        self._step = int(step)
        self._fresh.clear()

    def like(self, parameter: Tensor) -> Tensor:
        """(*local_shape) standard normal noise for this rank's part of a parameter, in float32 or wider."""
        local = local_tensor(parameter)
        generator = self._stream(shard_index(parameter), local.device)
        dtype = torch.promote_types(local.dtype, torch.float32)
        return torch.randn(local.shape, dtype=dtype, device=local.device, generator=generator)

    def shared(self, size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """(size,) standard normal noise, the same on every rank."""
        return torch.randn(size, dtype=dtype, device=device, generator=self._stream(_SHARED, device))

    def _stream(self, index: int, device: torch.device) -> torch.Generator:
        key = (index, device)
        if key not in self._generators:
            self._generators[key] = torch.Generator(device=device)
        if key not in self._fresh:
            # consecutive seeds from a start of its own for each stream: torch's CPU generator keeps 32 bits of a seed, so
            # hashing each step would soon give two steps the same noise
            start = _mixed(_mixed(_mixed(self.seed) + self.chain) + index)
            self._generators[key].manual_seed((start + self._step) & (_MASK >> 1))
            self._fresh.add(key)
        return self._generators[key]


def _mixed(value: int) -> int:
    """SplitMix64's finaliser: neighbouring integers become unrelated 64-bit ones."""
    z = (value + 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)
