"""N where the loss is a mean over labels, tokens or pixels: how many labels of a training set count."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from prior_hub.distributed import sum_over_ranks
from prior_hub.errors import PriorHubError

__all__ = ["COUNTS", "count_labels"]

COUNTS = ("examples", "labels")
IGNORED = -100


def count_labels(
    dataset: Any,
    collate: Any,
    *,
    ignore_index: Callable[[Tensor], int] = lambda _: IGNORED,
    shifted: bool = False,
    batch_size: int = 8,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | None = None,
) -> int:
    """Number of labels in one pass over `dataset` that the loss counts, as it sees them: after the collator.

    The global random states are left as they were. Where the data set crops at random, the number is that of this pass.

    Args:
        dataset: with a length.
        collate: a list of its rows -> a batch with "labels" (or "shift_labels", which are taken as they are).
        ignore_index: a batch's labels -> the label that the loss leaves out; -100 unless given.
        shifted: the loss predicts each token from those before (a causal language model), so that the first label of a row
            is no target.
        batch_size: rows at once.
        workers: processes that load.
        rank: of this process, which counts each `world_size`-th row; the sum over all is returned on each.
        world_size: number of processes.
        device: where ranks can sum; the CPU when None.

    Raises:
        PriorHubError: there are no labels, or none that counts.
    """
    rows = dataset if world_size == 1 else Subset(dataset, range(rank, len(dataset), world_size))
    total = 0
    with _random_states_kept():
        loader: Any = DataLoader(rows, batch_size=batch_size, collate_fn=collate, num_workers=workers)
        for batch in tqdm(loader, desc="counting labels", disable=rank != 0, delay=3):
            total += _counted(batch, ignore_index, shifted)
    found = int(sum_over_ranks(torch.tensor([total], dtype=torch.int64, device=device)).item())
    if found < 1:
        raise PriorHubError("all labels of the training set are ignored ones: N would be 0.")
    return found


def _counted(batch: Any, ignore_index: Callable[[Tensor], int], shifted: bool) -> int:
    labels = None
    if isinstance(batch, Mapping):
        labels = batch.get("shift_labels")
        if labels is None and isinstance(batch.get("labels"), Tensor):
            labels = batch["labels"][..., 1:] if shifted else batch["labels"]
    if not isinstance(labels, Tensor):
        keys = ", ".join(map(repr, batch)) if isinstance(batch, Mapping) else type(batch).__name__
        raise PriorHubError(f"prior_count='labels' finds no tensor of labels in a batch ({keys}): pass prior_num_examples.")
    if labels.is_floating_point():
        return len(labels)  # several yes-or-no labels or a regression target: one observation per example
    return int((labels != ignore_index(labels)).sum())


@contextmanager
def _random_states_kept() -> Iterator[None]:
    """Augmentation draws from these three."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 (its state is what is kept)
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
