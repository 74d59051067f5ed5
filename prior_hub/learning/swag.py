"""SWAG: a Gaussian from the weights that training visits.

Over n snapshots w_1, ..., w_n (taken late in training, at a learning rate that keeps moving):

    mean     = 1/n sum w_i                                    (*shape), Welford's running mean
    variance = 1/(n-1) sum (w_i - mean)^2, at least variance_floor
    deviations, row k = w_{n-k} - mean, k = 0 .. K-1          (K, *shape), most recent first, centred on the FINAL mean

`prior_hub.learning.moments` has the update, and the ring from which the deviations are made.

Source: Maddox et al. 2019, "A Simple Baseline for Bayesian Uncertainty in Deep Learning" (arXiv 1902.02476), Algorithm 1.
Differs: deviations are centred on the final mean, not on the running one (which shrinks them: a factor 0.73 in variance at
7 snapshots); the variance comes from Welford's update instead of E[w^2] - mean^2, which in float32 is not even positive
where the spread is small against the weight; it is the unbiased one, so that with n = K diagonal and low-rank part agree.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from prior_hub.distributed import (
    agreed,
    contribution_of,
    is_sharded,
    local_tensor,
    moved_placements,
    process_index,
    reshard,
    sum_over_ranks,
    told_by_rank_0,
    world_size,
)
from prior_hub.errors import PriorFormatError, PriorHubError, PriorMatchError, PriorNumericsError
from prior_hub.learning.moments import (
    Offload,
    add_snapshot,
    centre_rows,
    count_not_finite,
    differences_from_snapshots,
    surely_finite,
)
from prior_hub.model import PriorModel
from prior_hub.priors.adapters import adapter_facts
from prior_hub.priors.batch_norm import batch_norm_buffers
from prior_hub.priors.config import is_hub_name
from prior_hub.priors.gaussian import LowRankGaussian, swag_weights
from prior_hub.priors.matching import (
    canonical_parameters,
    declared_backbone,
    head_parameter_names,
    tied_names,
    unwrapped,
    without_head,
)

__all__ = ["SwagEstimator"]

_STATE_VERSION = "2"  # 1: the ring held weights, not differences, all K rows of it


class SwagEstimator:
    """Collects snapshots of a model's weights; `prior()` makes the Gaussian.

        estimator = SwagEstimator(rank=20)
        for step, batch in enumerate(loader):
            ...                                  # your own training step
            if step >= start and step % 50 == 0:
                estimator.update(model)
        prior = estimator.prior(base_model="org/name", dataset="cifar10")

    Memory: rank + 2 copies of the weights under the prior, allocated at the first update and never again; with
    snapshots_dtype=torch.bfloat16 the rank copies take half. `update` needs no more than a block of 0.5 MB on the CPU (64 MB
    on an accelerator) besides; `prior` makes another rank + 2 copies, or takes these over (`release`).

    Time: `update` reads the weights twice (once to see that all are finite) and the moments once, and writes the moments
    and one row of the ring, whatever the rank.

    On an accelerator with device="cpu" (CUDA), `update` queues copies into pinned memory, one more copy of the weights, and
    a thread takes them into the moments while training goes on; every method waits for it.

    Args:
        rank: K, how many of the last snapshots are kept as deviations.
        variance_floor: variances below it are raised to it (and counted in the configuration). Weights that never moved,
            behind a dead unit for example, have none.
        head: which parameters are the source task's head and stay out of the prior: "auto" asks the model, a sequence
            names modules, () says there is none. See `head_parameter_names`.
        dtype: type of the moments; float32, or float64.
        device: where moments and snapshots are kept; the parameters' own device when None. "cpu" saves accelerator memory.
        snapshots_dtype: type of the snapshots; `dtype` when None. torch.bfloat16 rounds the deviations of an entry by at
            most 0.4 % of its standard deviation, in root mean square over n = K snapshots, whatever way the weights went
            (`prior_hub.learning.moments` has the proof); mean and variance are not touched by it.

    Attributes:
        num_snapshots: n.
    """

    def __init__(
        self,
        rank: int = 20,
        *,
        variance_floor: float = 1e-12,
        head: str | Sequence[str] | None = "auto",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        snapshots_dtype: torch.dtype | None = None,
    ) -> None:
        if rank < 0:
            raise ValueError(f"rank is {rank}, expected 0 (diagonal only) or more.")
        if not variance_floor >= 0:
            raise ValueError(f"variance_floor is {variance_floor}, expected a number >= 0.")
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"moments in {dtype} lose the variance: use torch.float32 or torch.float64.")
        if snapshots_dtype not in (None, torch.bfloat16, torch.float32, torch.float64):
            raise ValueError(
                f"snapshots in {snapshots_dtype} are not kept: use torch.bfloat16 (half the memory), torch.float32 or "
                "torch.float64; in torch.float16 the differences of trained weights underflow."
            )
        self.rank = rank
        self.variance_floor = float(variance_floor)
        self.head = head
        self.dtype = dtype
        self.snapshots_dtype = snapshots_dtype or dtype
        self.device = None if device is None else torch.device(device)
        self._offload: Offload | None = None
        self.reset()

    def reset(self) -> None:
        """Forget every snapshot."""
        if self._offload is not None:
            self._offload.join()
        self._offload = None
        self.num_snapshots = 0
        self._mean: dict[str, Tensor] = {}
        self._squares: dict[str, Tensor] = {}  # sum of squared differences from the mean
        self._ring: dict[str, Tensor] = {}  # (K, *shape); the difference of snapshot i lies in row (i - 1) % K
        self._buffers: dict[str, Tensor] = {}
        self._facts: dict[str, Any] = {}
        self._layout: dict[str, Any] = {}  # name -> (mesh, placements, full shape) of sharded parameters
        self._sharded = False  # whether a loaded state is one rank's part
        self._loaded: Path | None = None  # the file of a loaded state,
        self._weights: dict[str, str] = {}  # and name -> digest of the weights it was saved with

    @torch.no_grad()
    def update(self, model: nn.Module, *, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Take one snapshot of the trainable parameters, the head's aside, and of the BatchNorm statistics.

        Args:
            model: the model in training.
            optimizer: what changes the weights next, and nothing else does. Used where snapshots go from an accelerator to
                the CPU: the accelerator then waits for the copies at the optimizer's next step; at once when None, which is
                right whatever happens to the weights.

        Raises:
            PriorMatchError: the model is not the one of the first snapshot, or its head cannot be told.
            PriorNumericsError: a weight is NaN or infinite (of a sharded model: on any rank); the estimate is left as it was.
        """
        self._settle()
        reshard(model)
        parameters, facts = self._covered(model)
        values = {name: local_tensor(p).detach() for name, p in parameters.items()}
        if self._layout:  # else ranks whose own shard is finite would count one snapshot more than the others
            agreed(lambda: self._refuse_not_finite(values))
        else:
            self._refuse_not_finite(values)
        if not self._mean:
            self._facts = facts
            self._allocate(values)
        self.num_snapshots += 1
        across = [name for name, value in values.items() if self._asynchronous(name, value)]
        if across:
            if self._offload is None:
                self._offload = Offload(_streams)
            count = self.num_snapshots
            self._offload.take([values[name] for name in across], lambda landed: self._add(across, landed, count))
            if optimizer is None:
                self._offload.fence()
            else:
                self._offload.fence_before(optimizer)
        beside = set(across)
        here = [name for name in values if name not in beside]
        self._add(here, [values[name] for name in here], self.num_snapshots)
        buffers = batch_norm_buffers(model)
        for name in without_head(buffers, facts["head_parameters"], parameters):
            self._buffers[name] = local_tensor(buffers[name]).detach().clone()

    def _refuse_not_finite(self, values: Mapping[str, Tensor]) -> None:
        if surely_finite(list(values.values())):
            return
        for name, value in values.items():
            if bad := count_not_finite(value):
                raise PriorNumericsError(
                    f"{name!r} has {bad} of {value.numel()} values that are NaN or infinite at snapshot "
                    f"{self.num_snapshots + 1}: training has diverged. Lower the learning rate or start later."
                )

    def _add(self, names: Sequence[str], values: Sequence[Tensor], count: int) -> None:
        if not names:
            return
        rows = [self._ring[name][(count - 1) % self.rank] for name in names] if self.rank else None
        add_snapshot(values, [self._mean[n] for n in names], [self._squares[n] for n in names], rows, count)

    def _asynchronous(self, name: str, value: Tensor) -> bool:
        return self._mean[name].device.type == "cpu" and _has_streams(value.device)

    def _settle(self) -> None:
        """Wait for the snapshot that is under way to the CPU, if there is one."""
        if self._offload is not None:
            self._offload.settle()

    def mean(self) -> dict[str, Tensor]:
        """The running mean, name -> (*shape) (this rank's shard of sharded parameters)."""
        self._settle()
        return dict(self._mean)

    def prior(
        self,
        *,
        scale: float = 1.0,
        eps: float = 0.0,
        explained: float | None = None,
        deviations_dtype: torch.dtype | None = None,
        release: bool = False,
        buffers: Mapping[str, Tensor] | None = None,
        base_model: str | None = None,
        base_model_revision: str | None = None,
        objective: str | None = None,
        dataset: str | Sequence[str] | None = None,
        dataset_license: str | None = None,
        license: str | None = None,  # noqa: A002 (the Hub's word)
        source: Mapping[str, Any] | None = None,
        estimator: Mapping[str, Any] | None = None,
    ) -> PriorModel:
        """The prior of the snapshots so far, all of it in this process (`save_prior` writes it without that).

        Args:
            scale: stored scale.
            eps: stored eps.
            explained: keep only the principal directions that hold this share of the low-rank variance, 0.99 for example
                (`PriorModel.compressed`); every snapshot when None.
            deviations_dtype: storage type of the deviations, `snapshots_dtype` when None; torch.bfloat16 halves the file.
            release: give the estimate's memory to the prior instead of copying it. The estimator is empty afterwards, even
                where this call raises once it has begun (too few snapshots, or an `explained` that is no share, leave it as
                it was). Peak memory for ResNet-50's tensors at K = 20, in copies of the weights and with the estimate's own
                22: 46.2 without it, 23.7 with it (13.6 with snapshots in bfloat16).
            buffers: BatchNorm statistics to store, as `recompute_batch_norm` returns them (the head's are left out); those
                of the last snapshot when None.
            base_model: Hub name of the model; read from the model's own config when None.
            base_model_revision: its commit.
            objective: what the source task optimised ("supervised classification"); a model with `prior_source` (SimCLR) has
                said so itself.
            dataset: Hub name(s) of the source data.
            dataset_license: licence of that data.
            license: licence of the prior, a Hub identifier.
            source: anything else to record about the source task.
            estimator: anything else to record about the estimate.

        Returns:
            The prior, under the model's names; under its backbone's own where the model declares one (`prior_backbone`).

        Raises:
            PriorNumericsError: fewer than two snapshots, or variances of zero with a floor of zero.
            ValueError: `explained` is not a share.
        """
        if explained is not None and not 0 < explained <= 1:  # asked here too: before anything is given up
            raise ValueError(f"explained is {explained}, expected a share of the low-rank variance, above 0 and at most 1.")
        self._ready()
        mean, variance, deviations = {}, {}, {}
        floored = 0
        kept = deviations_dtype or self.snapshots_dtype
        wanted = (
            torch.promote_types(self.snapshots_dtype, torch.float32) if explained is not None else kept
        )  # rotate, then round
        try:
            for name in list(self._mean):
                centre, squares = self._mean[name], self._squares[name]
                raw = self._gathered(
                    name, squares.div_(self.num_snapshots - 1) if release else squares / (self.num_snapshots - 1)
                )
                whole = self._gathered(name, centre)
                mean[name] = whole.clone() if whole is centre and not release else whole
                floored += int((raw < self.variance_floor).sum())
                variance[name] = raw.clamp_(min=self.variance_floor)
                if self.rank:
                    deviations[name] = self._gathered(name, self._centred(name, wanted, in_place=release), leading=1)
                if release:
                    for group in (self._mean, self._squares, self._ring):
                        group.pop(name, None)
            own_name, fields = self._described(
                mean,
                floored,
                buffers=buffers,
                estimator=estimator,
                base_model=base_model,
                base_model_revision=base_model_revision,
                objective=objective,
                dataset=dataset,
                dataset_license=dataset_license,
                license=license,
                source=source,
            )
        finally:
            if release:  # else what is left after an error would pass for an estimate
                self.reset()
        prior = PriorModel.from_tensors(
            {own_name(name): tensor for name, tensor in mean.items()},
            {own_name(name): tensor for name, tensor in variance.items()},
            {own_name(name): tensor for name, tensor in deviations.items()},
            scale=scale,
            eps=eps,
            **fields,
        )
        if explained is None:
            return prior
        compressed = prior.compressed(explained)
        return compressed if deviations_dtype is None else compressed.astype(deviations=deviations_dtype)

    def save_prior(
        self,
        save_directory: str | os.PathLike[str],
        *,
        max_shard_size: int | str = "5GB",
        scale: float = 1.0,
        eps: float = 0.0,
        explained: float | None = None,
        deviations_dtype: torch.dtype | None = None,
        buffers: Mapping[str, Tensor] | None = None,
        estimator: Mapping[str, Any] | None = None,
        **about: Any,
    ) -> Path:
        """Write the folder that `prior(...).save_pretrained(save_directory)` writes, without holding the prior.

        It is made and written one tensor at a time. Of a sharded model every rank must call this: tensors are put together
        from the shards as rank 0 comes to write them, so that a rank needs memory for one of them beside its own share. Other
        models are the same on every rank, and rank 0 alone does it. With `explained` there are up to two more copies of the
        share's deviations, in float32 at least and on the mesh's device (memory of the accelerator, for one that has one).

        Args:
            save_directory: as `PriorModel.save_pretrained`; on rank 0's disk.
            max_shard_size: the same.
            scale: as `prior`.
            eps: as `prior`.
            explained: as `prior`.
            deviations_dtype: as `prior`.
            buffers: as `prior`.
            estimator: as `prior`.
            **about: base_model, dataset and so on, as `prior`.

        Returns:
            The folder; `push_prior_to_hub(folder, name)` publishes it (from one rank).

        Raises:
            PriorNumericsError: as `prior`, on every rank.
            OSError: the disk is full or not writable; on other ranks than 0 a PriorHubError.
        """
        folder = Path(save_directory).expanduser()
        self._ready()
        sharded = bool(self._layout)
        if not sharded and process_index():
            return folder
        prior, part = self._in_parts(
            scale, eps, explained, deviations_dtype, {"buffers": buffers, "estimator": estimator} | about
        )
        names = dict(zip(prior.config.parameters, self._mean, strict=True))
        largest = max(math.prod(shape) for shape in prior.config.parameters.values())

        def whole(key: str) -> Tensor:
            """The full tensor of a key, on rank 0; a block of its rows at a time elsewhere."""
            kind, own = key.split(".", 1)
            if kind != "deviations":
                return self._gathered(names[own], part(kind, own, slice(None)))
            shape = prior.config.parameters[own]
            step = max(1, largest // max(1, math.prod(shape)))
            blocks = range(0, prior.rank, step)
            rows: Tensor | None = None
            for begin in blocks:
                block = self._gathered(names[own], part(kind, own, slice(begin, begin + step)), leading=1)
                if process_index() == 0:
                    rows = torch.empty(prior.rank, *shape, dtype=block.dtype, device="cpu") if rows is None else rows
                    rows[begin : begin + step] = block
            return block if rows is None else rows

        if not sharded:
            prior._save_parts(folder, whole, max_shard_size)
            return folder

        def ask(key: str) -> Tensor:
            told_by_rank_0(key)
            return whole(key)

        def write() -> None:
            try:
                prior._save_parts(folder, ask, max_shard_size)
            finally:
                told_by_rank_0(None)

        def serve() -> None:
            while (key := told_by_rank_0(None)) is not None:
                whole(key)

        agreed(serve if process_index() else write)
        return folder

    # ------------------------------------------------------------------------------------------------------- the state

    def state_dict(self) -> dict[str, Tensor]:
        """Every tensor of the estimate: "mean.x", "squares.x", "ring.x", "buffer.x"; not copied."""
        self._settle()
        state = {f"mean.{name}": t for name, t in self._mean.items()}
        state |= {f"squares.{name}": t for name, t in self._squares.items()}
        state |= {f"ring.{name}": t for name, t in self._ring.items()}
        return state | {f"buffer.{name}": t for name, t in self._buffers.items()}

    def save(self, path: str | os.PathLike[str], *, model: nn.Module | None = None) -> None:
        """Write the state as safetensors, atomically.

        It is mean, squares and the snapshots so far: min(n, rank) + 2 copies of the weights, each time. With
        snapshots_dtype=torch.bfloat16 the snapshots take half. No copy is made of what lies on the CPU.

        Args:
            path: the file.
            model: the model at this point of training; digests of its trainable weights go into the file, so that `attach`
                can tell whether a run is resumed with its own state.
        """
        header = {
            "version": _STATE_VERSION,
            "rank": self.rank,
            "num_snapshots": self.num_snapshots,
            "variance_floor": self.variance_floor,
            "dtype": _type_name(self.dtype),
            "snapshots_dtype": _type_name(self.snapshots_dtype),
            "sharded": bool(self._layout),
            "facts": self._facts,
            "weights": None if model is None else _digests(model, trainable=True),
        }
        path = Path(path)
        temporary = path.with_name(f".{path.name}.tmp")
        filled = min(self.num_snapshots, self.rank)
        state = self.state_dict()
        tensors = {
            key: (tensor[:filled] if key.startswith("ring.") else tensor).detach().cpu().contiguous()
            for key, tensor in state.items()
        }
        save_file(tensors, temporary, metadata={"format": "pt", "swag": json.dumps(header)})
        temporary.replace(path)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Read a state that `save` wrote, in place of the present one.

        Raises:
            PriorFormatError: not such a file, or taken with another rank, floor or type.
        """
        try:
            with safe_open(path, framework="pt", device="cpu") as handle:
                text = (handle.metadata() or {}).get("swag")
                tensors = {key: handle.get_tensor(key).clone() for key in handle.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise PriorFormatError(f"{path} is not a valid safetensors file ({error}).") from error
        if text is None:
            raise PriorFormatError(f"{path} is a safetensors file, but not the state of a SwagEstimator.")
        header = json.loads(text)
        if header.get("version") not in ("1", _STATE_VERSION):
            raise PriorFormatError(
                f"{path} is a state of version {header.get('version')}, this prior_hub reads 1 and {_STATE_VERSION}: resume "
                "with the prior_hub that wrote it."
            )
        mine = {
            "rank": self.rank,
            "variance_floor": self.variance_floor,
            "dtype": _type_name(self.dtype),
            "snapshots_dtype": _type_name(self.snapshots_dtype),
        }
        theirs = {"snapshots_dtype": header.get("dtype")} | header
        for key, value in mine.items():
            if theirs.get(key) != value:
                raise PriorFormatError(
                    f"{path} was taken with {key}={theirs.get(key)!r}, this estimator has {value!r}: use the same to resume."
                )
        self.reset()
        self.num_snapshots = int(header["num_snapshots"])
        self._facts = header["facts"]
        self._sharded = bool(header.get("sharded"))
        self._loaded = Path(path)
        self._weights = header.get("weights") or {}  # older states have none
        groups = {"mean": self._mean, "squares": self._squares, "ring": self._ring, "buffer": self._buffers}
        for key in list(tensors):
            kind, name = key.split(".", 1)
            tensor = tensors.pop(key)
            if kind == "ring" and len(tensor) < self.rank:  # the rows that were filled
                rows, tensor = tensor, tensor.new_zeros((self.rank, *tensor.shape[1:]))
                tensor[: len(rows)] = rows
            groups[kind][name] = tensor if self.device is None or kind == "buffer" else tensor.to(self.device)
        if header.get("version") == "1":
            for name, ring in self._ring.items():
                differences_from_snapshots(ring, self._mean[name], self.num_snapshots)

    # ------------------------------------------------------------------------------------------------------- internals

    def attach(self, model: nn.Module) -> None:
        """Check that this is the model of the snapshots, and learn how its parameters are sharded now (after `load`).

        Raises:
            PriorMatchError: it is another model, or not at the weights that the state was saved with.
        """
        self._settle()
        reshard(model)
        self._covered(model)
        present = _digests(model) if self._weights else {}
        odd = [name for name, digest in self._weights.items() if present.get(name) != digest]
        if odd:
            raise PriorMatchError(
                f"{self._loaded} is the state of another run or another step: {len(odd)} of the model's {len(self._weights)} "
                f"trained tensors ({', '.join(map(repr, odd[:3]))}) have other values than when it was saved. Load the state "
                "in the checkpoint that the weights are from: SwagCallback(resume_from=folder of that checkpoint)."
            )

    def _covered(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
        parameters = canonical_parameters(model)
        facts = self._facts or source_facts(model, self.head)
        outside = set(facts["head_parameters"])
        covered = {n: p for n, p in parameters.items() if n not in outside and (p.requires_grad or n in self._mean)}
        if not covered:
            raise PriorMatchError("the model has no trainable parameters beside its head: there is nothing to learn.")
        if self._mean and covered.keys() != self._mean.keys():
            odd = sorted(covered.keys() ^ self._mean.keys())
            raise PriorMatchError(
                f"this is not the model of the first snapshot, or other parameters are trained now: {', '.join(odd[:3])} "
                f"({len(odd)} names differ)."
            )
        for name, p in covered.items():
            local = local_tensor(p)
            if self._mean and self._mean[name].shape != local.shape:
                raise PriorMatchError(f"{name!r} has changed its shape since the first snapshot.")
            if self._mean and self.device is None and self._mean[name].device != local.device:
                self._move(name, local.device)  # a state loaded from a file, on the CPU until now
        self._layout = {
            name: (p.device_mesh, p.placements, p.shape)  # type: ignore[attr-defined]
            for name, p in covered.items()
            if is_sharded(p)
        }
        return covered, facts

    def _ready(self) -> None:
        """Wait for the snapshot that is under way; raise where there is no prior yet."""
        if self.num_snapshots < 2:
            raise PriorNumericsError(
                f"a variance needs two snapshots, there {'is' if self.num_snapshots == 1 else 'are'} "
                f"{self.num_snapshots}. Start earlier, or take them more often (every_n_steps)."
            )
        if self._sharded and not self._layout:
            raise PriorHubError("this state is one rank's shard: call attach(model) with the sharded model on all ranks first.")
        self._settle()

    def _in_parts(
        self, scale: float, eps: float, explained: float | None, deviations_dtype: torch.dtype | None, about: dict[str, Any]
    ) -> tuple[PriorModel, Callable[[str, str, slice], Tensor]]:
        """The prior without its numbers, and what gives this rank's part of them: (kind, prior's name, rows) -> tensor."""
        rows, sharded = min(self.num_snapshots, self.rank), bool(self._layout)
        wanted = deviations_dtype or self.snapshots_dtype
        if explained is not None:  # rotate, then round
            wanted = torch.promote_types(self.snapshots_dtype, torch.float32)
        place = torch.device(next(iter(self._layout.values()))[0].device_type if sharded else "cpu")
        weights = {name: 1.0 / world_size() for name in self._mean} if sharded else {}
        weights |= {name: contribution_of(mesh, placements) for name, (mesh, placements, _) in self._layout.items()}

        def variance_of(name: str) -> Tensor:
            return (self._squares[name] / (self.num_snapshots - 1)).clamp_(min=self.variance_floor)

        def floored() -> float:
            found, diagonal = 0.0, swag_weights(rows)[0]
            for name, squares in self._squares.items():
                found += weights.get(name, 1.0) * int((squares / (self.num_snapshots - 1) < self.variance_floor).sum())
                own = LowRankGaussian(
                    {name: squares}, {name: variance_of(name)}, scale=scale, eps=eps, diagonal_weight=diagonal
                )
                own.check_positive()
            return found

        if sharded:
            entries = float(sum_over_ranks(torch.tensor(agreed(floored), dtype=torch.float64, device=place)))
        else:
            entries = floored()
        own_name, fields = self._described(self._mean, round(entries), **about)
        numbers: dict[str, dict[str, Tensor]] = {"mean": {}, "variance": {}, "deviations": {}}
        for name, mean in self._mean.items():
            own, empty = own_name(name), torch.empty_like(mean, device="meta")
            numbers["mean"][own] = empty if explained is None else mean.to(place)
            numbers["variance"][own] = empty if explained is None else variance_of(name).to(place)
            if rows and explained is None:
                numbers["deviations"][own] = empty.new_empty((rows, *mean.shape), dtype=wanted)
            elif rows:
                numbers["deviations"][own] = self._centred(name, wanted, in_place=False).to(place)
        gaussian = LowRankGaussian(
            numbers["mean"],
            numbers["variance"],
            numbers["deviations"],
            scale=scale,
            eps=eps,
            contributions={own_name(name): weight for name, weight in weights.items()} if sharded else None,
            sum_over_ranks=sum_over_ranks if sharded else None,
        )
        shapes = {own_name(n): tuple(self._layout[n][2] if n in self._layout else t.shape) for n, t in self._mean.items()}
        stored = fields.pop("buffers")
        prior = PriorModel._declared(gaussian, stored, fields, shapes)
        if explained is not None:
            prior = prior.compressed(explained)
            prior = prior if deviations_dtype is None else prior.astype(deviations=deviations_dtype)
            return prior, partial(_rows_of, prior.gaussian)
        names = {own_name(name): name for name in self._mean}
        last: dict[str, Tensor] = {}  # the deviations that are being written; all rows of a tensor come out together

        def part(kind: str, own: str, rows: slice) -> Tensor:
            name = names[own]
            if kind != "deviations":
                return self._mean[name] if kind == "mean" else variance_of(name)
            if own not in last:
                last.clear()
                last[own] = self._centred(name, wanted, in_place=False)
            return last[own][rows]

        return prior, part

    def _described(
        self,
        covered: Mapping[str, Tensor],
        floored: int,
        *,
        buffers: Mapping[str, Tensor] | None = None,
        estimator: Mapping[str, Any] | None = None,
        license: str | None = None,  # noqa: A002
        **about: Any,
    ) -> tuple[Callable[[str], str], dict[str, Any]]:
        """What makes the prior's names of the model's, and what `PriorModel.from_tensors` takes beside the Gaussian."""
        facts = self._facts
        stored = self._buffers if buffers is None else buffers
        own_name = renaming(covered, facts.get("prefix", ""))
        body = without_head(stored, facts["head_parameters"], covered)
        own = {
            "name": "swag",
            "rank": self.rank,
            "snapshots": self.num_snapshots,
            "variance_entries_at_floor": floored,
            "batch_norm": _batch_norm_note(body, recomputed=buffers is not None),
        }
        fields = {
            "buffers": {own_name(name): stored[name].detach().cpu().clone() for name in body},
            "variance_floor": self.variance_floor,
            "num_snapshots": self.num_snapshots,
            "estimator": {**own, **(estimator or {})},
            "license": license,
        }
        return own_name, fields | provenance(facts, covered, own_name=own_name, **about)

    def _move(self, name: str, device: torch.device) -> None:
        for group in (self._mean, self._squares, self._ring):
            if name in group:
                group[name] = group[name].to(device)

    def _allocate(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            options: dict[str, Any] = {"dtype": self.dtype, "device": self.device or value.device}
            self._mean[name] = torch.zeros(value.shape, **options)
            self._squares[name] = torch.zeros(value.shape, **options)
            if self.rank:
                self._ring[name] = torch.zeros((self.rank, *value.shape), **(options | {"dtype": self.snapshots_dtype}))

    def _centred(self, name: str, dtype: torch.dtype, *, in_place: bool) -> Tensor:
        """The deviations, most recent first: in the ring's own memory if they fit there and `in_place`, else on the CPU."""
        ring = self._ring[name]
        rows = ring[: min(self.num_snapshots, self.rank)]
        if in_place and dtype == ring.dtype:
            out = rows
        else:
            out = torch.empty(rows.shape, dtype=dtype, device=ring.device if name in self._layout else "cpu")
        centre_rows(ring, self.num_snapshots, out)
        return out

    def _gathered(self, name: str, local: Tensor, *, leading: int = 0) -> Tensor:
        """The full tensor, on the CPU, from every rank's shard (a collective call when sharded)."""
        if name not in self._layout:
            return local.cpu()
        from torch.distributed.tensor import DTensor

        mesh, placements, shape = self._layout[name]
        moved = moved_placements(placements, leading)
        full_shape = torch.Size((*local.shape[:leading], *shape))
        stride = torch.empty(full_shape, device="meta").stride()
        sharded = DTensor.from_local(local.to(mesh.device_type), mesh, moved, run_check=False, shape=full_shape, stride=stride)
        return sharded.full_tensor().cpu()


def _rows_of(gaussian: LowRankGaussian, kind: str, name: str, rows: slice) -> Tensor:
    tensor: Tensor = getattr(gaussian, kind)[name]
    return tensor[rows] if kind == "deviations" else tensor


def _has_streams(device: torch.device) -> bool:
    """Whether copies from there into pinned memory run beside what the device computes."""
    return device.type in ("cuda", "xpu")


def _streams(device: torch.device) -> Any:
    return torch.get_device_module(device)


def _type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _digests(model: nn.Module, *, trainable: bool = False) -> dict[str, str]:
    """name -> SHA-256 (64 bits of it) of this rank's values, of all parameters or the trainable ones."""
    digests = {}
    for name, parameter in canonical_parameters(model).items():
        if parameter.requires_grad or not trainable:
            values = local_tensor(parameter).detach().contiguous().cpu()
            digest = hashlib.sha256(f"{values.dtype} {tuple(values.shape)}".encode())
            digest.update(values.reshape(-1).view(torch.uint8).numpy().data)
            digests[name] = digest.hexdigest()[:16]
    return digests


def source_facts(model: nn.Module, head: str | Sequence[str] | None) -> dict[str, Any]:
    """What a prior records about its source model (JSON values): head, tied weights, base model and its commit, type, adapter.

    Of a model of one's own also what it declares: "prefix" is what names lose, from its `prior_backbone`, and "source" its
    `prior_source`, what to record about the source task.
    """
    inner = unwrapped(model)
    backbone = declared_backbone(model)
    inner = inner if backbone is None else inner.get_submodule(backbone)
    config = getattr(inner, "config", None)
    outside = head_parameter_names(model, head)
    base = getattr(config, "_name_or_path", None)
    on_the_hub = isinstance(base, str) and is_hub_name(base) and not Path(base).exists()
    return {
        "head_parameters": outside,
        "tied_parameters": {alias: name for alias, name in tied_names(model).items() if name not in set(outside)},
        "base_model": base if on_the_hub else None,  # a path of this machine means nothing to others
        "base_model_revision": getattr(config, "_commit_hash", None) if on_the_hub else None,
        "model_type": getattr(config, "model_type", None) or type(inner).__name__,
        "adapter": adapter_facts(model),
        "prefix": "" if backbone is None else f"{backbone}.",
        "source": dict(getattr(unwrapped(model), "prior_source", None) or {}),
    }


def renaming(names: Iterable[str], prefix: str) -> Callable[[str], str]:
    """The function that takes `prefix` off a name, if all `names` have it; else the one that leaves names as they are."""
    common = prefix if all(name.startswith(prefix) for name in names) else ""
    return lambda name: name.removeprefix(common)


def provenance(
    facts: Mapping[str, Any],
    covered: Container[str],
    *,
    base_model: str | None = None,
    base_model_revision: str | None = None,
    objective: str | None = None,
    dataset: str | Sequence[str] | None = None,
    dataset_license: str | None = None,
    source: Mapping[str, Any] | None = None,
    own_name: Callable[[str], str] = str,
) -> dict[str, Any]:
    """The fields of `PriorConfig` about where a prior comes from: `source_facts`, and what the caller knows better.

    `own_name` makes the prior's names of the model's (see `renaming`).
    """
    given = {"objective": objective, "dataset": _listed(dataset), "dataset_license": dataset_license}
    known = {"adapter": facts.get("adapter"), **facts.get("source", {})}
    recorded = known | {key: value for key, value in given.items() if value is not None} | dict(source or {})
    return {
        "head_parameters": tuple(facts["head_parameters"]),
        "tied_parameters": {own_name(a): own_name(n) for a, n in facts["tied_parameters"].items() if n in covered},
        "base_model": base_model or facts["base_model"],
        "base_model_revision": base_model_revision
        or (facts["base_model_revision"] if base_model in (None, facts["base_model"]) else None),
        "model_type": facts["model_type"],
        "source": {key: value for key, value in recorded.items() if value is not None},
    }


def _listed(dataset: str | Sequence[str] | None) -> str | list[str] | None:
    return dataset if dataset is None or isinstance(dataset, str) else list(dataset)


def _batch_norm_note(stored: Sequence[str], *, recomputed: bool) -> str:
    if not stored:
        return "none"
    return "recomputed at the mean" if recomputed else "last snapshot"
