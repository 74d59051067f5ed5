"""`PriorModel`: the object users hold. It joins what a prior is (priors/) with where priors live (registry/)."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from prior_hub import __version__
from prior_hub.distributed import agreed, copy_full_, first_on_its_host, is_sharded, process_index, told_by_rank_0
from prior_hub.errors import (
    PriorConnectionError,
    PriorFormatError,
    PriorHubError,
    PriorMatchError,
    PriorNotFoundError,
    PriorWarning,
)
from prior_hub.priors.architecture import match_config
from prior_hub.priors.config import PriorConfig, is_hub_name
from prior_hub.priors.diagnosis import Diagnosis, diagnose
from prior_hub.priors.gaussian import LowRankGaussian, truncated_weights
from prior_hub.priors.legacy import legacy_files, read_legacy
from prior_hub.priors.matching import Match, NameMap, canonical_parameters, persistent_buffers, without_head
from prior_hub.priors.storage import CARD_NAME, StoredPrior, read_config, read_prior, write_prior
from prior_hub.registry.card import read_card, render_card, update_card
from prior_hub.registry.collections import add_to_collection
from prior_hub.registry.download import download_legacy, download_prior
from prior_hub.registry.evaluation import Evaluation
from prior_hub.registry.upload import PushOptions, PushPlan, PushResult, plan_push, push_folder, upload_prior

__all__ = ["PriorModel", "library_versions", "push_prior_to_hub"]

PRINCIPAL = "principal directions"  # estimator["deviations"] in the configuration of a compressed prior


class PriorModel:
    """A pre-trained prior: a Gaussian over named weights, its configuration, and BatchNorm buffers.

        prior = PriorModel.from_pretrained("org/resnet50-simclr-prior")
        print(prior.match(model))
        prior.initialize(model)            # start at the prior's mean
        loss = nll + prior.penalty(model) / num_examples

    It is immutable: `rescaled` and `truncated` return new objects that share the tensors, `compressed` one with fewer. To
    train with a prior use `PriorTrainer`, or `PriorPenalty` in a loop of your own; both keep what `penalty(model)` works out
    each time.

    Attributes:
        gaussian: the maths, `LowRankGaussian`.
        config: `PriorConfig`.
        buffers: name -> tensor, BatchNorm statistics that go with the mean.
        repo_id: where it was loaded from, None for a local folder.
        commit_hash: the commit it was loaded from.
    """

    def __init__(
        self,
        gaussian: LowRankGaussian,
        config: PriorConfig,
        buffers: Mapping[str, Tensor] | None = None,
        *,
        repo_id: str | None = None,
        commit_hash: str | None = None,
    ) -> None:
        self.gaussian = gaussian
        self.config = config
        self.buffers = dict(buffers or {})
        self.repo_id = repo_id
        self.commit_hash = commit_hash

    # ------------------------------------------------------------------------------------------------------- creation

    @classmethod
    def from_tensors(
        cls,
        mean: Mapping[str, Tensor],
        variance: Mapping[str, Tensor],
        deviations: Mapping[str, Tensor] | None = None,
        *,
        buffers: Mapping[str, Tensor] | None = None,
        scale: float = 1.0,
        diagonal_weight: float | None = None,
        low_rank_weight: float | None = None,
        eps: float = 0.0,
        **metadata: Any,
    ) -> PriorModel:
        """A prior from its numbers.

        Args:
            mean: name -> (*shape), float32 or float64.
            variance: name -> (*shape), positive.
            deviations: name -> (K, *shape), most recent snapshot first; also bfloat16 or float16.
            buffers: name -> tensor, BatchNorm statistics.
            scale: multiplies variances and deviations.
            diagonal_weight: SWAG's for K when None.
            low_rank_weight: SWAG's for K when None.
            eps: added to the diagonal.
            **metadata: further fields of `PriorConfig`, such as base_model, source, license.

        Raises:
            PriorMatchError: names or shapes disagree.
            PriorNumericsError: NaN, infinities, or variances that are not positive.
            PriorFormatError: a field of the configuration is not valid, or tensors of one kind differ in type.
        """
        weights = {"scale": scale, "diagonal_weight": diagonal_weight, "low_rank_weight": low_rank_weight, "eps": eps}
        mean, variance = _apart(mean), _apart(variance)
        gaussian = LowRankGaussian(mean, variance, _apart(deviations or {}), **weights)  # type: ignore[arg-type]
        gaussian.check()
        return cls._declared(gaussian, buffers, metadata)

    @classmethod
    def _declared(
        cls,
        gaussian: LowRankGaussian,
        buffers: Mapping[str, Tensor] | None,
        metadata: dict[str, Any],
        shapes: Mapping[str, tuple[int, ...]] | None = None,
    ) -> PriorModel:
        """The prior of a Gaussian, with a new configuration; `shapes` are the full ones where the Gaussian holds shards."""
        metadata = dict(metadata)
        config = PriorConfig(
            parameters={name: tuple(t.shape if shapes is None else shapes[name]) for name, t in gaussian.mean.items()},
            rank=gaussian.rank,
            scale=gaussian.scale,
            diagonal_weight=gaussian.diagonal_weight,
            low_rank_weight=gaussian.low_rank_weight,
            eps=gaussian.eps,
            dtype=_dtypes(gaussian),
            buffers=tuple(buffers or ()),
            prior_hub_version=__version__,
            libraries=metadata.pop("libraries", None) or library_versions(),
            **metadata,
        )
        return cls(gaussian, config, buffers)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_prior_name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        rank: int | None = None,
        scale: float | None = None,
        verify: bool = True,
        check: Callable[[PriorConfig], object] | None = None,
    ) -> PriorModel:
        """Load a prior from a local folder or from the Hub; a folder of that name wins, as everywhere on the Hub.

        Args:
            pretrained_prior_name_or_path: "organisation/name", or a folder.
            revision: branch, tag or commit; resolved once, and every file is taken from that commit.
            subfolder: folder inside the repository or the local folder.
            token: an access token; the logged-in one when None, none when False.
            cache_dir: where downloads are kept.
            local_files_only: use the cache only.
            force_download: download again even if cached.
            rank: read only this many deviations (the first ones, as `truncated`).
            scale: use this scale instead of the stored one.
            verify: compare every file with its sha256 and refuse NaN and infinities; reads each byte once.
            check: called with the configuration before weights are downloaded or read; what it raises is raised. With
                `functools.partial(match_config, model=model)` a prior that does not fit fails after some kilobytes.

        Raises:
            PriorNotFoundError: no such folder, repository, revision, or no prior in it.
            PriorAccessError: the token is wrong or not enough.
            PriorConnectionError: the Hub cannot be reached, and nothing is cached.
            PriorFormatError: truncated, altered, hostile, or too new.
            PriorNumericsError: NaN, infinities, or variances that are not positive.
        """
        name = os.fspath(pretrained_prior_name_or_path)
        path = Path(name).expanduser()
        repo_id = commit = None
        if path.is_dir():
            folder = path / (subfolder or "").strip("/")
            if check is not None:
                check(read_config(folder))
            stored = read_prior(folder, rank=rank, verify=verify)
        else:
            if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
                raise PriorNotFoundError(f"{name} is not a folder, and not a name on the Hub ('organisation/name').")
            if path.is_file():
                raise PriorNotFoundError(f"{name} is a file. Name the folder that holds prior_config.json.")
            options: dict[str, Any] = {
                "revision": revision,
                "subfolder": subfolder,
                "token": token,
                "cache_dir": cache_dir,
                "local_files_only": local_files_only,
            }
            try:
                downloaded = download_prior(name, force_download=force_download, check=check, **options)
                stored = read_prior(downloaded.folder, rank=rank, verify=verify)
            except PriorFormatError as damaged:
                if local_files_only:
                    raise
                # The client verifies sizes, never contents: one more download tells a bad transfer from a bad file.
                try:
                    downloaded = download_prior(name, repair=True, check=check, **options)
                except PriorConnectionError:
                    raise damaged from None
                stored = read_prior(downloaded.folder, rank=rank, verify=verify)
            repo_id, commit = name, downloaded.commit_hash
        prior = cls._from_stored(stored, rank, repo_id, commit, verify)
        return prior if scale is None else prior.rescaled(scale)

    @classmethod
    def from_pretrained_together(
        cls,
        pretrained_prior_name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        verify: bool = True,
        **arguments: Any,
    ) -> PriorModel:
        """As `from_pretrained`, called by all processes of a run at once: each file is verified once on each machine.

        Rank 0 loads first and the others take the commit that it found; then one process on each other machine; these verify.
        The rest wait and then map the files, of which they read what they use. If one fails, all raise.

        Args:
            pretrained_prior_name_or_path: as `from_pretrained`.
            revision: the same.
            verify: the same.
            **arguments: the same.

        Raises:
            PriorHubError: as `from_pretrained`, on every rank.
        """
        rank, leads = process_index(), first_on_its_host()
        load = partial(cls.from_pretrained, pretrained_prior_name_or_path, **arguments)
        found = agreed(partial(load, revision=revision, verify=verify) if rank == 0 else None)
        revision = told_by_rank_0(None if found is None else found.commit_hash) or revision
        for leading in (True, False):
            mine = rank != 0 and leads is leading
            again = {} if leading else {"verify": False, "force_download": False}  # the files are there, and right
            loaded = agreed(partial(load, **{"revision": revision, "verify": verify} | again) if mine else None)
            found = loaded if mine else found
        assert found is not None  # noqa: S101
        return found

    @classmethod
    def from_legacy(
        cls,
        path: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]],
        *,
        convention: str = "swag",
        reference: nn.Module | None = None,
        head: str | Sequence[str] | None = "auto",
        rank: int | None = None,
        scale: float | None = None,
        eps: float | None = None,
        covmat: str = "auto",
        recentre: bool | None = None,
        variance_floor: float | None = None,
        deviations_dtype: torch.dtype | None = None,
        trust_order: bool = False,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        **metadata: Any,
    ) -> PriorModel:
        """Import the four files of "Pre-Train Your Loss", or a checkpoint of swa_gaussian; nothing is ever unpickled.

        What was decided (names, raw or divided rows, re-centred or not, convention, sha256 of the files) is recorded in
        `config.estimator`. The formulas of the conventions are in `prior_hub.priors.legacy`.

        Args:
            path: folder with `*_mean.pt`, `*_variance.pt`, `*_covmat.pt`, `*_model.pt`; or the common beginning of their names;
                or a mapping of "mean", "variance", "covmat", "model" to files; or a swa_gaussian checkpoint, a file with
                `n_models` and `base.<parameter>_{mean,sq_mean,cov_mat_sqrt}`; or the name of a Hub repository that holds them.
            convention: "swag", the Gaussian of every other prior here; or what a published code makes of the same files:
                "paper", "paper-unscaled", "tufts", "tufts-elbo". The latter are exact at the scale they are imported at.
            reference: a model of the source architecture, for names and order (on the meta device will do); None takes
                them from the model file.
            head: the source task's head, as in `SwagEstimator`. The vectors may hold it or not.
            rank: k, rows used. "swag": all, newest first; the others: the first 5 of the file, oldest first.
            scale: s. "swag": 1; the others: 1e10.
            eps: e. "swag": 0; the others: 0.1.
            covmat: "raw", "divided" (by sqrt(K-1)), or "auto": told by Welford's relation to the variance.
            recentre: deviations from the final mean. None: for "swag" where a first row of zeros certifies that all
                snapshots are there, never for the others, which use the file's rows as they are.
            variance_floor: variances below are raised to it. None: refused if not positive; for swa_gaussian, whose
                variances cancel, a floor at the rounding error, with a warning.
            deviations_dtype: storage type of the deviations (torch.bfloat16: half the bytes).
            trust_order: do not refuse a mean whose tensors are unlike those of the model file.
            revision: of a Hub repository, as `from_pretrained`.
            token: the same.
            cache_dir: the same.
            local_files_only: the same.
            **metadata: fields of `PriorConfig`: base_model, source, license and so on.

        Raises:
            PriorNotFoundError: a file is missing.
            PriorFormatError: a file holds an object, is cut, or its numbers do not fit the others; says what to check.
            PriorMatchError: the files and the reference have not the same number of values, or another order.
            PriorNumericsError: NaN, infinities, or variances that are not positive.
            ValueError: an unknown convention, or a setting that no Gaussian has.
        """
        hub = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        local = isinstance(path, Mapping) or Path(path).expanduser().exists() or not is_hub_name(os.fspath(path))
        if local or Path(f"{os.fspath(path)}_mean.pt").expanduser().exists():  # type: ignore[arg-type]
            files = legacy_files(path)
        else:
            downloaded = download_legacy(os.fspath(path), **hub)  # type: ignore[arg-type]
            files = legacy_files(downloaded.folder)
            metadata["source"] = {
                "repository": downloaded.repo_id,
                "commit": downloaded.commit_hash,
                **metadata.get("source", {}),
            }
        found = read_legacy(
            files,
            convention=convention,
            reference=reference,
            head=head,
            rank=rank,
            scale=scale,
            eps=eps,
            covmat=covmat,
            recentre=recentre,
            variance_floor=variance_floor,
            deviations_dtype=deviations_dtype,
            trust_order=trust_order,
        )
        facts = {
            "num_snapshots": found.num_snapshots,
            "variance_floor": found.variance_floor,
            "head_parameters": found.head_parameters,
            "tied_parameters": found.tied_parameters,
            "model_type": found.model_type,
            "estimator": found.estimator | metadata.pop("estimator", {}),
        }
        return cls.from_tensors(
            found.mean,
            found.variance,
            found.deviations,
            buffers=found.buffers,
            **found.weights,
            **(facts | metadata),
        )

    @classmethod
    def _from_stored(
        cls, stored: StoredPrior, rank: int | None, repo_id: str | None, commit: str | None, verify: bool
    ) -> PriorModel:
        config = stored.config
        if rank is not None and rank < config.rank:
            weights = _weights_at(config, rank)
            changes = {"diagonal_weight": weights[0], "low_rank_weight": weights[1], "weight_files": {}}
            changes["estimator"] = _recorded(config.estimator, rank)
            if rank == 0:
                changes["dtype"] = {**config.dtype, "deviations": config.dtype["mean"]}
            config = config.replace(rank=rank, **changes)
        gaussian = LowRankGaussian(
            stored.mean,
            stored.variance,
            stored.deviations,
            scale=config.scale,
            diagonal_weight=config.diagonal_weight,
            low_rank_weight=config.low_rank_weight,
            eps=config.eps,
        )
        if verify:
            gaussian.check_positive()
        return cls(gaussian, config, stored.buffers, repo_id=repo_id, commit_hash=commit)

    # ----------------------------------------------------------------------------------------------------- the numbers

    @property
    def mean(self) -> dict[str, Tensor]:
        """name -> (*shape)."""
        return self.gaussian.mean

    @property
    def variance(self) -> dict[str, Tensor]:
        """name -> (*shape), before scale and weight."""
        return self.gaussian.variance

    @property
    def deviations(self) -> dict[str, Tensor]:
        """name -> (K, *shape), most recent snapshot first, or of a `compressed` prior the leading direction; {} if diagonal."""
        return self.gaussian.deviations

    @property
    def rank(self) -> int:
        """K, the number of deviations."""
        return self.gaussian.rank

    @property
    def scale(self) -> float:
        """The factor on variances and deviations."""
        return self.gaussian.scale

    @property
    def num_parameters(self) -> int:
        """P, the number of values under the prior."""
        return self.gaussian.num_parameters

    def penalty(self, theta: nn.Module | Mapping[str, Tensor], **matching: Any) -> Tensor:
        """1/2 (theta - mean)^T Sigma^-1 (theta - mean) in nats, a 0-d float64 tensor, differentiable once.

        Args:
            theta: a model (matched as `match` does; parameters it lacks are marginalised), or name -> tensor.
            **matching: passed to `match`.
        """
        gaussian, values = self._bound(theta, matching)
        return gaussian.penalty(values)

    def log_prob(self, theta: nn.Module | Mapping[str, Tensor], **matching: Any) -> Tensor:
        """log N(theta; mean, Sigma) in nats, normalised; arguments as `penalty`."""
        gaussian, values = self._bound(theta, matching)
        return gaussian.log_prob(values)

    def sample(self, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """One draw of the weights: name -> (*shape)."""
        return self.gaussian.sample(generator=generator)

    def rescaled(self, scale: float) -> PriorModel:
        """The same prior with `scale` in place of its own; shares all tensors."""
        return self._with(self.gaussian.rescaled(scale))

    def truncated(self, rank: int) -> PriorModel:
        """The prior the estimator would have given with this `rank`: the most recent deviations, re-weighted.

        Of a `compressed` prior the leading directions, which keep their weight: each holds its own variance, however many
        there are. With rank 0 both come to the same diagonal prior.
        """
        weights = _weights_at(self.config, rank) if _is_principal(self.config) else None
        return self._with(self.gaussian.truncated(rank, weights=weights))

    def compressed(self, explained: float = 0.99, *, rank: int | None = None) -> PriorModel:
        """The prior with its deviations turned into principal directions, without those that hold next to nothing.

        Deviations of weights that wander overlap, so that a few directions hold nearly all of their variance: `diagnose`
        prints the spectrum, and the file shrinks by what is dropped. Along the kept directions the covariance stays as it
        was; see `LowRankGaussian.principal`. The configuration's `estimator` records it: "deviations", "spectrum" (the
        variance along every direction there was, at scale 1, largest first) and "explained" (the share of it that is kept).

        Args:
            explained: share of the low-rank variance to keep, 0 < explained <= 1.
            rank: how many directions to keep, 1 or more, in place of `explained`; `truncated(0)` is the diagonal prior.

        Raises:
            ValueError: `explained` or `rank` is out of range.
            PriorNumericsError: the deviations hold NaN or infinities.
        """
        gaussian = self.gaussian.principal(explained, rank=rank)
        if not self.rank:
            return self
        estimator = dict(self.config.estimator)
        if not _is_principal(self.config):
            spectrum = [float(f"{value / self.scale:.4g}") for value in self.gaussian.spectrum()]
            estimator |= {"deviations": PRINCIPAL, "spectrum": spectrum}
        return self._with(gaussian, estimator=_recorded(estimator, gaussian.rank))

    def astype(self, *, deviations: torch.dtype) -> PriorModel:
        """The same prior with its deviations stored in another type (torch.bfloat16: half the bytes)."""
        rows = {name: tensor.to(deviations) for name, tensor in self.deviations.items()}
        return self._with(self.gaussian._with(deviations=rows))

    def diagnose(self) -> Diagnosis:
        """What it looks like (spectrum, effective rank, variances), and whether it is degenerate; print it.

        Reads every number once. Of a `compressed` prior, the remarks are about the deviations that it was made of.
        `prior-hub check` prints the same.
        """
        before = _spectrum_before(self.config)
        return diagnose(self.gaussian, variance_floor=self.config.variance_floor, before=before)

    def _with(self, gaussian: LowRankGaussian, *, estimator: Mapping[str, Any] | None = None) -> PriorModel:
        config = self.config.replace(
            estimator=_recorded(self.config.estimator, gaussian.rank) if estimator is None else estimator,
            rank=gaussian.rank,
            scale=gaussian.scale,
            diagonal_weight=gaussian.diagonal_weight,
            low_rank_weight=gaussian.low_rank_weight,
            dtype=_dtypes(gaussian),
            weight_files={},
        )
        return PriorModel(gaussian, config, self.buffers, repo_id=self.repo_id, commit_hash=self.commit_hash)

    # -------------------------------------------------------------------------------------------------- with a model

    def match(
        self,
        model: nn.Module,
        *,
        name_map: NameMap | None = None,
        include_head: bool = False,
        on_mismatch: str = "error",
        min_coverage: float = 0.5,
    ) -> Match:
        """Which parameters of `model` are under this prior; print it. Arguments, errors and warnings as `match_parameters`.

        A prior over a LoRA adapter is refused for a model without one, of another rank or scaling, or on other modules.
        """
        return match_config(
            self.config,
            model,
            name_map=name_map,
            include_head=include_head,
            on_mismatch=on_mismatch,
            min_coverage=min_coverage,
        )

    def initialize(self, model: nn.Module, **matching: Any) -> Match:
        """Set the matched parameters of `model` to the prior's mean and its BatchNorm buffers to the stored ones.

        Args:
            model: changed in place; sharded (DTensor) parameters too.
            **matching: passed to `match`.

        Returns:
            The match; nothing is changed when it raises.
        """
        match = self.match(model, **matching)
        parameters = canonical_parameters(model)
        targets = persistent_buffers(model)
        wanted = without_head(self.buffers, self.config.head_parameters, self.config.parameters)
        places = {place: name for name in wanted if (place := match.rename(name)) in targets}
        for place, name in list(places.items()):
            if self.buffers[name].shape != targets[place].shape:
                if matching.get("on_mismatch") == "drop":
                    del places[place]
                    continue
                raise PriorMatchError(
                    f"buffer {place!r} has shape {tuple(targets[place].shape)} in the model, "
                    f"{tuple(self.buffers[name].shape)} in the prior. Pass on_mismatch='drop' to leave it as it is."
                )
        for name, target_name in match.pairs.items():
            copy_full_(parameters[target_name], self.mean[name])
        for place, name in places.items():
            copy_full_(targets[place], self.buffers[name])
        if wanted and not places:
            warnings.warn(
                f"none of the prior's {len(wanted)} BatchNorm statistics ({wanted[0]!r}, ...) has a place in the model, which "
                "keeps its own. If it has BatchNorm too, name_map must cover the buffers' names as well as the parameters'.",
                PriorWarning,
                stacklevel=2,
            )
        return match

    def _bound(
        self, theta: nn.Module | Mapping[str, Tensor], matching: Mapping[str, Any]
    ) -> tuple[LowRankGaussian, dict[str, Tensor]]:
        if not isinstance(theta, nn.Module):
            return self.gaussian, dict(theta)
        match = self.match(theta, **matching)
        parameters = canonical_parameters(theta)
        values = {name: parameters[target] for name, target in match.pairs.items()}
        if any(is_sharded(value) for value in values.values()):
            raise NotImplementedError("the model is sharded (FSDP2, tensor parallelism): use PriorPenalty, which knows shards.")
        device = next(iter(values.values())).device
        return self.gaussian.select(tuple(values)).to(device), values

    # --------------------------------------------------------------------------------------------------------- storing

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        max_shard_size: int | str = "5GB",
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **push_arguments: Any,
    ) -> PushResult | None:
        """Write the prior and its card into a folder, atomically: a crash leaves the old prior or the new one.

        Args:
            save_directory: created if missing; other files in it stay, and so does a person's text in its README.md.
            max_shard_size: bytes or a text such as "5GB"; larger priors are written in several files.
            push_to_hub: also push the folder; `repo_id` is the folder's name when None.
            repo_id: name on the Hub.
            **push_arguments: passed to `push_to_hub`.

        Raises:
            PriorNumericsError: NaN or infinities; nothing is written.
            OSError: the disk is full or not writable; nothing is lost.
        """
        folder = Path(save_directory).expanduser()
        self._write(folder, self._card_in(folder, repo_id), max_shard_size)
        if not push_to_hub:
            return None
        return _upload(folder, repo_id or folder.resolve().name, **push_arguments)

    def _card_in(self, folder: Path, repo_id: str | None = None) -> str:
        """The card for a folder, with what a person wrote into the one that is there."""
        path = folder / CARD_NAME
        existing = read_card(path) if path.is_file() else None
        rendered = render_card(self.config, repo_id=repo_id)
        return update_card(existing, rendered, previous=_config_in(folder), config=self.config)

    def _save_parts(self, folder: Path, make: Callable[[str], Tensor], max_shard_size: int | str) -> PriorConfig:
        """As `save_pretrained`, with tensors that `make(key)` makes as they are written; the prior's own are not looked at."""
        kinds = ("mean", "variance", "deviations") if self.rank else ("mean", "variance")
        keys = [f"{kind}.{name}" for name in self.config.parameters for kind in kinds]
        tensors = _Made(keys, make, {f"buffer.{name}": tensor for name, tensor in self.buffers.items()})
        card = {CARD_NAME: self._card_in(folder)}
        return write_prior(folder, self.config, tensors, max_shard_size=max_shard_size, extra_files=card)

    def _write(self, folder: Path, card: str, max_shard_size: int | str) -> PriorConfig:
        tensors: dict[str, Tensor] = {}
        for name in self.config.parameters:
            tensors[f"mean.{name}"] = self.mean[name]
            tensors[f"variance.{name}"] = self.variance[name]
            if self.deviations:
                tensors[f"deviations.{name}"] = self.deviations[name]
        tensors |= {f"buffer.{name}": tensor for name, tensor in self.buffers.items()}
        self.gaussian.check_positive()
        return write_prior(folder, self.config, tensors, max_shard_size=max_shard_size, extra_files={CARD_NAME: card})

    def push_to_hub(
        self,
        repo_id: str,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | bool | None = None,
        private: bool | None = None,
        gated: Literal["auto", "manual"] | None = None,
        resource_group_id: str | None = None,
        create_pr: bool = False,
        commit_message: str | None = None,
        commit_description: str | None = None,
        tag: str | None = None,
        license: str | None = None,  # noqa: A002 - the Hub's word
        base_model: str | None = None,
        dataset: str | list[str] | None = None,
        dataset_license: str | None = None,
        allow_incomplete: bool = False,
        evaluation: Evaluation | None = None,
        evaluation_dataset: str | None = None,
        evaluation_task: str | None = None,
        compute: Mapping[str, Any] | None = None,
        pictures: Mapping[str | os.PathLike[str], str] | None = None,
        collection: str | None = None,
        max_shard_size: int | str = "5GB",
    ) -> PushResult:
        """Push the prior and its card in one commit; creates the repository if it is missing.

        A prior without licence, base model or source data set is refused before anything is asked of the Hub: give them here,
        or say `allow_incomplete`. `push_prior_to_hub(prior, name, dry_run=True)` tells what a push would do.

        The files are written to a temporary folder first: from 256 MB on in the Hub client's own folder (HF_HOME), since
        the system's may lie in memory; TMPDIR says otherwise.

        Args:
            repo_id: "organisation/name", or "name" under your own account.
            revision: branch to push to, created if missing; "main" when None.
            subfolder: folder of the repository, so that a prior can live beside a model.
            token: an access token; the logged-in one when None.
            private: make a new repository private; refused before anything is pushed if there is a public one.
            gated: "auto" or "manual": the Hub hands the files only to whom accepts the terms (and is let in by you).
            resource_group_id: resource group of an Enterprise organisation that a new repository belongs to.
            create_pr: open a pull request instead.
            commit_message: first line of the commit, shown in the card's list of versions too.
            commit_description: rest of the commit message.
            tag: tag the commit ("v1.0"); refused before anything is pushed if it exists.
            license: the prior's licence, a Hub identifier such as "apache-2.0"; replaces what the configuration says in what is
                pushed, and so do `base_model`, `dataset` and `dataset_license`.
            base_model: Hub name of the model whose weights the prior is over.
            dataset: name of the source task's data set, or several.
            dataset_license: its licence, which may bind who uses the prior.
            allow_incomplete: push without them.
            evaluation: results of models fine-tuned under the prior, for the card and the Hub's model-index: {"task":
                "image-classification", "dataset": "org/data", "metrics": {"accuracy": 0.91}}, also with what
                `trainer.evaluate()` returned as "metrics"; the client's `EvalResult`s; or a list. None keeps those of the card
                that is there, as long as it is of the same prior; so do `compute` and `pictures`.
            evaluation_dataset: the data set, if `evaluation` names none.
            evaluation_task: the task, if `evaluation` names none.
            compute: what the prior cost: some of "emissions" (grams of CO2 equivalent), "source" (of that number),
                "training_type", "geographical_location", "hardware_used", "hours".
            pictures: path of a picture -> alternative text, shown in the card.
            collection: slug or title of a collection to add the prior to, see `add_to_collection`.
            max_shard_size: as `save_pretrained`.

        Raises:
            PriorMetadataError: something a reader needs is missing, or the evaluation or compute is not in a form of the Hub.
            PriorAccessError, PriorConnectionError, PriorNotFoundError, PriorHubError: see `upload_prior`.
        """
        arguments = {name: value for name, value in locals().items() if name not in ("self", "repo_id", "max_shard_size")}
        with self._to_push(repo_id, max_shard_size, arguments) as folder:
            return _upload(folder, repo_id, **arguments)

    @contextmanager
    def _to_push(self, repo_id: str, max_shard_size: int | str, arguments: Mapping[str, Any]) -> Iterator[Path]:
        """A temporary folder with the prior, if its metadata are complete."""
        options = PushOptions(**{name: value for name, value in arguments.items() if name != "collection"})
        config = options.config(self.config)
        kinds = (self.mean, self.variance, self.deviations, self.buffers)
        size = sum(tensor.numel() * tensor.element_size() for tensors in kinds for tensor in tensors.values())
        with push_folder(size) as folder:
            card = render_card(config, title=repo_id.rsplit("/", 1)[-1])  # the push fills in the full name
            self._write(folder, card, max_shard_size)
            yield folder

    def card(self, *, repo_id: str | None = None) -> str:
        """The text of the model card."""
        return render_card(self.config, repo_id=repo_id or self.repo_id)

    def __repr__(self) -> str:
        base = f", base_model={self.config.base_model!r}" if self.config.base_model else ""
        return (
            f"PriorModel({self.num_parameters:,} values in {len(self.mean)} tensors, rank={self.rank}, "
            f"scale={self.scale:g}{base})"
        )


class _Made(Mapping[str, Tensor]):
    """Tensors that are made each time they are asked for, and some that are there."""

    def __init__(self, keys: Sequence[str], make: Callable[[str], Tensor], there: Mapping[str, Tensor]) -> None:
        self._keys, self._make, self._there = dict.fromkeys(keys), make, there

    def __getitem__(self, key: str) -> Tensor:
        return self._there[key] if key in self._there else self._make(key)

    def __contains__(self, key: object) -> bool:  # Mapping's own would make the tensor
        return key in self._there or key in self._keys

    def __iter__(self) -> Iterator[str]:
        yield from self._keys
        yield from self._there

    def __len__(self) -> int:
        return len(self._keys) + len(self._there)


@overload
def push_prior_to_hub(
    prior: PriorModel | str | os.PathLike[str], repo_id: str, *, dry_run: Literal[False] = False, **arguments: Any
) -> PushResult: ...
@overload
def push_prior_to_hub(
    prior: PriorModel | str | os.PathLike[str], repo_id: str, *, dry_run: Literal[True], **arguments: Any
) -> PushPlan: ...
def push_prior_to_hub(
    prior: PriorModel | str | os.PathLike[str], repo_id: str, *, dry_run: bool = False, **arguments: Any
) -> PushResult | PushPlan:
    """Push a prior to the Hub in one commit, its card included.

        push_prior_to_hub(prior, "me/my-prior", license="apache-2.0", base_model="org/model", dataset="org/data", tag="v1.0")

    Args:
        prior: a `PriorModel`, or a folder that `save_pretrained` wrote (checked before anything is sent).
        repo_id: "organisation/name".
        dry_run: only tell what would be uploaded: every file with its size and whether it is new, the card's changes, what the
            metadata lack. The Hub is asked, and nothing is made there.
        **arguments: as `PriorModel.push_to_hub`; for a folder all but `max_shard_size`.

    Returns:
        Where it landed: commit URL and hash, pull request, tag; a `PushPlan` of a dry run.

    Raises:
        PriorMetadataError: something a reader needs is missing: the licence, the base model, the source data set.
        PriorHubError: see `upload_prior`.
    """
    if isinstance(prior, PriorModel):
        if not dry_run:
            return prior.push_to_hub(repo_id, **arguments)
        shard = arguments.pop("max_shard_size", "5GB")
        with prior._to_push(repo_id, shard, {**arguments, "allow_incomplete": True}) as written:
            return _plan(written, repo_id, **arguments)
    folder = Path(prior).expanduser()
    if dry_run:
        return _plan(folder, repo_id, **arguments)
    read_prior(folder, verify=True)
    return _upload(folder, repo_id, **arguments)


def _plan(folder: Path, repo_id: str, *, collection: str | None = None, **arguments: Any) -> PushPlan:  # noqa: ARG001
    return plan_push(folder, repo_id, **arguments)


def _upload(folder: Path, repo_id: str, *, collection: str | None = None, **arguments: Any) -> PushResult:
    result = upload_prior(folder, repo_id, **arguments)
    if collection is None:
        return result
    try:
        return replace(result, collection_url=add_to_collection(result.repo_id, collection, token=arguments.get("token")))
    except PriorHubError as error:
        at = result.commit_hash[:8]
        raise type(error)(
            f"The prior was pushed to {result.repo_id} as {at}, but not put into {collection!r}: {error}"
        ) from error


def library_versions(extra: Sequence[str] = ()) -> dict[str, str]:
    """Installed versions of the libraries a prior depends on, for its configuration."""
    found = {}
    for name in ("torch", "transformers", "timm", *extra):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _config_in(folder: Path) -> PriorConfig | None:
    """The configuration of the prior in a folder that is about to be replaced; None if there is none that can be read."""
    try:
        return read_config(folder)
    except (PriorNotFoundError, PriorFormatError):
        return None


def _is_principal(config: PriorConfig) -> bool:
    """Whether the deviations are principal directions (`PriorModel.compressed`) and not snapshots."""
    return config.estimator.get("deviations") == PRINCIPAL


def _spectrum_before(config: PriorConfig) -> tuple[float, ...]:
    """Variance along each direction before `PriorModel.compressed` dropped some, as recorded; () where nothing usable is."""
    recorded = config.estimator.get("spectrum") if _is_principal(config) else None
    values = recorded if isinstance(recorded, (list, tuple)) else ()
    usable = all(isinstance(v, (int, float)) and 0 <= v <= sys.float_info.max for v in values)
    return tuple(map(float, values)) if usable else ()


def _weights_at(config: PriorConfig, rank: int) -> tuple[float, float]:
    """(diagonal_weight, low_rank_weight) when the first `rank` deviations of a prior are kept."""
    before = config.rank
    if _is_principal(config):
        if rank:
            return config.diagonal_weight, config.low_rank_weight
        spectrum = config.estimator.get("spectrum")
        before = len(spectrum) if isinstance(spectrum, list) else before  # the weights are those of so many snapshots
    return truncated_weights(before, rank, config.diagonal_weight, config.low_rank_weight)


def _recorded(estimator: Mapping[str, Any], rank: int) -> Mapping[str, Any]:
    """What the configuration says of the estimate when `rank` deviations are left: the share that principal ones hold."""
    spectrum = estimator.get("spectrum")
    if estimator.get("deviations") != PRINCIPAL or not isinstance(spectrum, list):
        return estimator
    if not all(isinstance(value, (int, float)) and value >= 0 for value in spectrum):  # somebody's own words
        return estimator
    total = sum(spectrum)
    return {**estimator, "explained": float(f"{sum(spectrum[:rank]) / total:.6g}") if total > 0 else 0.0}


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, with parameters copied: a prior must not follow a model that goes on training."""
    return {name: t.detach().clone() if t.requires_grad else t for name, t in tensors.items()}


def _dtypes(gaussian: LowRankGaussian) -> dict[str, str]:
    result: dict[str, str] = {}
    for kind in ("mean", "variance", "deviations"):
        found = {t.dtype for t in getattr(gaussian, kind).values()}
        if len(found) > 1:
            names = ", ".join(sorted(str(d).removeprefix("torch.") for d in found))
            raise PriorFormatError(f"{kind} is stored in one type for all parameters, found {names}: convert them.")
        result[kind] = str(found.pop()).removeprefix("torch.") if found else result.get("mean", "float32")
    return result
