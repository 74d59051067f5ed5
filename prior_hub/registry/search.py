"""Find priors on the Hub: list, search, look at one, and ask which fit a model. No weights are ever downloaded.

What a listing knows of a prior is in the metadata of its card (`library_name`, `base_model`, `datasets`, `license`, tags, and
the mapping `prior_hub:` that `registry/card.py` writes), which the Hub sends with the listing: one request per page, none per
prior. Filters the Hub has (tags, `base_model:`, `dataset:`, `license:`, author, name) are asked of it; the others are applied
here. A card is a person's text: what it says wrongly is a `PriorWarning` and unknown, never an error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, paginate  # type: ignore[attr-defined]
from torch import nn

from prior_hub import __version__
from prior_hub.errors import (
    PriorConnectionError,
    PriorFormatError,
    PriorHubError,
    PriorMatchError,
    PriorWarning,
)
from prior_hub.priors.architecture import (
    base_model_names,
    config_fingerprint,
    match_config,
    model_fingerprints,
    share_of_body,
)
from prior_hub.priors.config import CONFIG_NAME, MAX_CONFIG_BYTES, PriorConfig, is_hub_name
from prior_hub.priors.matching import Match
from prior_hub.priors.tensor_files import side_by_side
from prior_hub.registry.card import METADATA_KEY, architecture_tag
from prior_hub.registry.client import LIBRARY_NAME, explained, hub_client, join
from prior_hub.registry.download import download_config

__all__ = ["PriorFit", "PriorInfo", "list_priors", "prior_info", "priors_for", "search_priors"]

_SORTS = {  # ours, which are the client's -> the Hub's
    "created_at": "createdAt",
    "downloads": "downloads",
    "last_modified": "lastModified",
    "likes": "likes",
    "trending_score": "trendingScore",
}
_PAGE = 1000  # rows of a page; the Hub may send fewer
_AT_ONCE = 8  # configurations at a time
_MOST_IN_ONE = 100  # priors of one repository
_TAG = re.compile(r"[a-z0-9-]+")
_FINGERPRINT = re.compile(r"[0-9a-f]{16}")
_LONGEST = 1000  # characters of a name or a description
_MOST_BASES = 3  # base models of one model that are asked for
_LISTING = "the list of priors"


@dataclass(frozen=True, kw_only=True)
class PriorInfo:
    """What is known of a prior without its weights; None, or empty, where the card does not say.

    Attributes:
        repo_id: "organisation/name".
        commit_hash: the commit this is true of.
        subfolder: folder of the repository the prior lies in; None at its top.
        base_model: Hub name of the model whose weights the prior is over.
        estimator: how it was learned ("swag", "fisher", ...).
        task: objective of the source task.
        datasets: Hub names of the source task's data sets.
        rank: K, number of deviations.
        num_parameters: P, values under the prior.
        scale: the stored scale.
        stored_bytes: bytes of mean, variance and deviations.
        license: Hub identifier.
        private: whether only some accounts see it.
        gated: False, or "auto" or "manual": terms must be accepted first.
        downloads: in the last 30 days.
        likes: number of them.
        last_modified: time of the last commit.
        tags: the Hub's tags.
        architecture: fingerprint of names and shapes (see `prior_hub.priors.architecture`), as the card or the configuration
            has it.
        config: the configuration where it was read (`prior_info`, `priors_for`), None in a listing.
    """

    repo_id: str
    commit_hash: str | None = None
    subfolder: str | None = None
    base_model: str | None = None
    estimator: str | None = None
    task: str | None = None
    datasets: tuple[str, ...] = ()
    rank: int | None = None
    num_parameters: int | None = None
    scale: float | None = None
    stored_bytes: int | None = None
    license: str | None = None
    private: bool = False
    gated: str | bool = False
    downloads: int | None = None
    likes: int | None = None
    last_modified: datetime | None = None
    tags: tuple[str, ...] = ()
    architecture: str | None = None
    config: PriorConfig | None = field(default=None, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """JSON values by name, `last_modified` in ISO 8601; without the configuration."""
        names = [f.name for f in dataclasses.fields(self) if f.name != "config"]
        values = {name: getattr(self, name) for name in names}
        modified = self.last_modified.isoformat() if self.last_modified else None
        return values | {"datasets": list(self.datasets), "tags": list(self.tags), "last_modified": modified}

    def __repr__(self) -> str:
        place = f", subfolder={self.subfolder!r}" if self.subfolder else ""
        known = {"base_model": self.base_model, "estimator": self.estimator, "task": self.task, "rank": self.rank}
        said = "".join(f", {name}={value!r}" for name, value in known.items() if value is not None)
        return f"PriorInfo({self.repo_id!r}{place}{said})"


@dataclass(frozen=True, kw_only=True)
class PriorFit:
    """A published prior that fits a model.

    Attributes:
        info: the prior, its configuration included.
        match: which parameters of the model are under it, and the remarks of the match; print it.
        coverage: share of the model's values, its head aside, that are under the prior.
        exact: whether prior and model have the same names and shapes; prefixes, head and pooler aside.
        why: in words.
    """

    info: PriorInfo
    match: Match
    coverage: float
    exact: bool
    why: str

    @property
    def repo_id(self) -> str:
        """The repository."""
        return self.info.repo_id

    def to_dict(self) -> dict[str, Any]:
        """JSON values: the prior's, with how it fits."""
        own = {"exact": self.exact, "coverage": self.coverage, "why": self.why, "match": self.match.report()}
        return self.info.to_dict() | own

    def __repr__(self) -> str:
        place = f", subfolder={self.info.subfolder!r}" if self.info.subfolder else ""
        return f"PriorFit({self.repo_id!r}{place}, coverage={self.coverage:.3g}, exact={self.exact})"


# -------------------------------------------------------------------------------------------------------------- listings


def list_priors(
    *,
    base_model: str | None = None,
    author: str | None = None,
    estimator: str | None = None,
    task: str | None = None,
    dataset: str | None = None,
    license: str | None = None,  # noqa: A002 (the Hub's word)
    min_rank: int | None = None,
    search: str | None = None,
    sort: str | None = None,
    limit: int | None = None,
    token: str | bool | None = None,
) -> Iterator[PriorInfo]:
    """The priors on the Hub that this token may see, page by page as they are asked for.

    All given filters must hold. A prior whose card does not say what is asked (`min_rank`, `task`) is not listed.

    Args:
        base_model: Hub name of the model the prior is over; a name without its owner ("resnet-50") is looked for under all.
        author: user or organisation.
        estimator: "swag", "fisher", "isotropic", ...
        task: words of the source task's objective, in any order ("image classification").
        dataset: Hub name of a source data set, with or without its owner.
        license: Hub licence identifier.
        min_rank: least number of deviations.
        search: part of the repository's name, as the Hub searches. For words anywhere use `search_priors`.
        sort: "downloads", "likes", "last_modified", "created_at" or "trending_score", largest first; None: the Hub's own order.
        limit: at most this many.
        token: an access token; the logged-in one when None, none when False.

    Returns:
        An iterator; the Hub is asked when its first item is.

    Raises:
        PriorAccessError: the token is not valid.
        PriorConnectionError: the Hub cannot be reached or fails.
        ValueError: `sort`, `limit` or `min_rank` is out of range.
    """
    if sort is not None and sort not in _SORTS:
        raise ValueError(f"sort is {sort!r}, expected one of {', '.join(map(repr, _SORTS))}.")
    if limit is not None and limit < 0:
        raise ValueError(f"limit is {limit}, expected 0 or more.")
    if min_rank is not None and min_rank < 0:
        raise ValueError(f"min_rank is {min_rank}, expected 0 or more.")
    filters: list[str] = []
    tests: list[Callable[[PriorInfo], bool]] = []
    for prefix, value in (("base_model", base_model), ("dataset", dataset)):
        if value and "/" in value:
            filters.append(f"{prefix}:{value}")
        elif value:
            tests.append(partial(_is_called, prefix, value))
    if estimator:
        is_tag = _TAG.fullmatch(estimator.lower()) is not None
        filters += [estimator.lower()] if is_tag else []  # another tag may be called so too ("bayesian")
        unknown = estimator if is_tag else ""
        tests.append(lambda info: (info.estimator or unknown).casefold() == estimator.casefold())
    if license:
        filters.append(f"license:{license}")
    if task:
        wanted = _words(task)
        tests.append(lambda info: set(wanted) <= set(_words(info.task or "")))
    if min_rank is not None:
        tests.append(lambda info: info.rank is not None and info.rank >= min_rank)
    page = min(_PAGE, limit) if limit and not tests else _PAGE
    found = _priors(filters, author=author, search=search, sort=sort, page=page, token=token)
    return itertools.islice((info for info in found if all(test(info) for test in tests)), limit)


def search_priors(query: str, *, limit: int = 20, token: str | bool | None = None) -> list[PriorInfo]:
    """The priors of which every word of `query` is true: in name, base model, estimator, task, data sets or tags.

    The Hub's own search looks for one piece of the repository's name, so all priors are listed (one request per page) and
    searched here. Case and punctuation do not matter: "resnet50" finds microsoft/resnet-50.

    A word scores 3 where it is a whole word, 2 at the beginning of one, 1 inside; times 4 in the repository's name, 3 in the
    base model's, 2 in estimator, task and data sets, 1 in tags; its best place counts. Sums decide, then downloads, then likes.

    Args:
        query: words, such as "resnet50 simclr".
        limit: at most this many.
        token: as `list_priors`.

    Raises:
        PriorAccessError, PriorConnectionError: as `list_priors`.
        ValueError: no word is in `query`, or `limit` is below 1.
    """
    words = _words(query)
    if not words:
        raise ValueError(f"query is {query!r}: give a word or more, such as 'resnet50 simclr'; list_priors() lists all.")
    if limit < 1:
        raise ValueError(f"limit is {limit}, expected 1 or more.")
    scored = []
    for info in _priors([], token=token):
        scores = [_score(word, info) for word in words]
        if all(scores):
            scored.append((-sum(scores), -(info.downloads or 0), -(info.likes or 0), info.repo_id, info.subfolder or "", info))
    return [entry[-1] for entry in sorted(scored, key=lambda entry: entry[:-1])[:limit]]


def prior_info(
    repo_id: str,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> PriorInfo:
    """What is known of one prior: its configuration, and what the Hub says of the repository. No weights are downloaded.

    Where the Hub cannot be asked (offline, `local_files_only`) a cached configuration answers alone, and downloads, likes and
    so on are not known.

    Args:
        repo_id: "organisation/name".
        revision: branch, tag or commit.
        subfolder: folder inside the repository.
        token: an access token; the logged-in one when None, none when False.
        cache_dir: where downloads are kept.
        local_files_only: use the cache only.

    Raises:
        PriorNotFoundError: no such repository or revision, or no prior there.
        PriorAccessError: the token is wrong or not enough, or terms must be accepted first.
        PriorConnectionError: the Hub cannot be reached, and nothing is cached.
        PriorFormatError: the configuration is not one.
    """
    options: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    config, commit = download_config(repo_id, revision=revision, subfolder=subfolder, **options)
    row: dict[str, Any] = {}
    if not local_files_only:
        with contextlib.suppress(PriorConnectionError), explained(repo_id, revision, subfolder):
            # not the card: what it says of the prior is in the configuration, and the client cannot read every card
            asked: Any = ["author", "downloads", "gated", "lastModified", "likes", "private", "sha", "tags"]
            answer = hub_client(token).model_info(repo_id, revision=commit, expand=asked)
            row = {key: getattr(answer, key, None) for key in ("downloads", "likes", "private", "gated", "tags")}
            row["lastModified"] = answer.last_modified
    known = _info({"id": repo_id, **row}, (subfolder or "").strip("/") or None, {}, {})
    return _with_config(dataclasses.replace(known, commit_hash=commit), config)


def _priors(
    filters: Sequence[str],
    *,
    author: str | None = None,
    search: str | None = None,
    sort: str | None = None,
    page: int = _PAGE,
    token: str | bool | None = None,
) -> Iterator[PriorInfo]:
    """The Hub's listing of priors, as priors.

    The client's `list_models` would do, if it did not end at the first card with a key such as `self:` (a TypeError): so its
    pages are read as they come, with its own `paginate`.
    """
    params: dict[str, Any] = {"filter": [LIBRARY_NAME, *filters], "full": True, "cardData": True, "limit": page}
    params |= {key: value for key, value in (("author", author), ("search", search)) if value}
    if sort is not None:
        params["sort"] = _SORTS[sort]
    headers = build_hf_headers(token=token, library_name=LIBRARY_NAME, library_version=__version__)
    rows = iter(paginate(f"{hub_client(token).endpoint}/api/models", params=params, headers=headers))
    while True:
        with _asking():
            row = next(rows, None)
        if row is None:
            return
        yield from _from_row(row)


@contextlib.contextmanager
def _asking() -> Iterator[None]:
    try:
        with explained(_LISTING, None, None):
            yield
    except PriorConnectionError as error:
        if isinstance(error.__cause__, OfflineModeIsEnabled):
            raise PriorConnectionError(
                "priors cannot be listed offline (HF_HUB_OFFLINE is set): the Hub is asked each time. Unset it; what is "
                "cached can still be loaded by its name."
            ) from error
        raise


def _from_row(row: Any) -> list[PriorInfo]:
    """The priors of one repository of a listing: wherever it has a prior_config.json."""
    if not isinstance(row, dict) or _text(row.get("id")) is None:
        _warn(f"the Hub's listing has an entry without a name ({type(row).__name__}), which is skipped.")
        return []
    files = row.get("siblings")
    places: list[str | None] = [None]
    if isinstance(files, list):
        names = [file.get("rfilename") for file in files if isinstance(file, dict)]
        places = [
            name.removesuffix(CONFIG_NAME).strip("/") or None
            for name in names
            if isinstance(name, str) and (name == CONFIG_NAME or name.endswith(f"/{CONFIG_NAME}"))
        ]
        if len(places) > _MOST_IN_ONE:
            _warn(f"{row['id']} holds {len(places)} priors; the first {_MOST_IN_ONE} are listed.")
    card = row.get("cardData")
    card = card if isinstance(card, dict) else {}
    facts = _facts(row["id"], card)
    described = [None] if None in places else places if len(places) == 1 else []  # what the repository's card tells of
    return [_info(row, place, card, facts if place in described else {}) for place in places[:_MOST_IN_ONE]]


def _facts(repo_id: str, card: Mapping[str, Any]) -> dict[str, Any]:
    """What the card says under `prior_hub:`, as far as it can be true."""
    said = card.get(METADATA_KEY, {})
    if not isinstance(said, dict):
        _warn(f"the card of {repo_id} has {METADATA_KEY}: without keys; it is left aside. Push the prior again to mend it.")
        return {}
    readers: dict[str, Callable[[Any], Any]] = {"rank": _count, "num_parameters": _count, "stored_bytes": _count}
    readers |= {"scale": _number, "estimator": _text, "objective": _text, "architecture": _fingerprint}
    found = {key: read(said[key]) for key, read in readers.items() if key in said}
    wrong = [key for key, value in found.items() if value is None]
    if wrong:
        _warn(
            f"the card of {repo_id} has no such value as {METADATA_KEY}: {', '.join(wrong)} needs; it is left aside. Push "
            "the prior again to mend it."
        )
    return found


def _info(row: Mapping[str, Any], subfolder: str | None, card: Mapping[str, Any], facts: Mapping[str, Any]) -> PriorInfo:
    tags = _texts(row.get("tags"))
    tagged = {kind: [tag.removeprefix(f"{kind}:") for tag in tags if tag.startswith(f"{kind}:")] for kind in _TAGGED}
    bases = _texts(card.get("base_model")) or [name for name in tagged["base_model"] if ":" not in name]
    licenses = _texts(card.get("license")) or tagged["license"]
    architectures = [_fingerprint(tag.removeprefix("prior-arch-")) for tag in tags if tag.startswith("prior-arch-")]
    one_architecture = architectures[0] if len(architectures) == 1 else None
    gated = row.get("gated")
    return PriorInfo(
        repo_id=row["id"],
        commit_hash=_text(row.get("sha")),
        subfolder=subfolder,
        base_model=next((name for name in bases if is_hub_name(name)), None),
        estimator=facts.get("estimator"),
        task=facts.get("objective"),
        datasets=tuple(_texts(card.get("datasets")) or tagged["dataset"]),
        rank=facts.get("rank"),
        num_parameters=facts.get("num_parameters"),
        scale=facts.get("scale"),
        stored_bytes=facts.get("stored_bytes"),
        license=licenses[0] if licenses else None,
        private=row.get("private") is True,
        gated=gated if isinstance(gated, str) else bool(gated),
        downloads=_count(row.get("downloads")),
        likes=_count(row.get("likes")),
        last_modified=_time(row.get("lastModified")),
        tags=tuple(tags),
        architecture=facts.get("architecture") or (one_architecture if subfolder is None else None),
    )


_TAGGED = ("base_model", "dataset", "license")


def _with_config(info: PriorInfo, config: PriorConfig) -> PriorInfo:
    """The same with what the configuration says, which is surer than the card."""
    dataset = config.source.get("dataset")
    return dataclasses.replace(
        info,
        base_model=config.base_model or info.base_model,
        estimator=_text(config.estimator.get("name")) or info.estimator,
        task=_text(config.source.get("objective")) or info.task,
        datasets=tuple(_texts(dataset)) or info.datasets,
        rank=config.rank,
        num_parameters=config.num_parameters,
        scale=config.scale,
        stored_bytes=sum(config.stored_bytes.values()),
        license=config.license or info.license,
        architecture=config_fingerprint(config),
        config=config,
    )


# ------------------------------------------------------------------------------------------------------- fitting a model


def priors_for(
    model: nn.Module,
    *,
    limit: int | None = None,
    min_coverage: float = 0.5,
    max_configs: int = 200,
    others: bool | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> list[PriorFit]:
    """Which published priors fit this model. Configurations are read, a few kB each; weights never.

    Candidates are, in this order: priors with the model's architecture fingerprint (one request, however many priors there
    are); priors over a base model that the model names (`config._name_or_path`, timm's `pretrained_cfg`); and, where none of
    these is an exact fit or with `others=True`, all other priors, whose configurations are read too: of those with one
    fingerprint only the first, if it does not fit. Each is then matched as `PriorModel.match` does. What cannot be read, or
    is ambiguous, is left out, the former with a `PriorWarning`.

    Args:
        model: a timm, transformers or other model, wrapped or not (DDP, torch.compile, PEFT), also on the meta device.
        limit: at most this many fits, the best ones; all when None.
        min_coverage: share of a prior's parameters, and of their values, that must have a place in the model.
        max_configs: configurations that are read at most, several at a time; cached by commit. A `PriorWarning` says so where
            that was too few.
        others: whether to read the configurations of priors that nothing points to; None: where there is no exact fit.
        token: an access token; the logged-in one when None, none when False.
        cache_dir: where configurations are kept.

    Returns:
        Exact fits first; then those the match has no remark on, by coverage; then the same base model; then downloads.

    Raises:
        PriorAccessError: the token is not valid.
        PriorConnectionError: the Hub cannot be reached or fails.
        TypeError: `model` is no `torch.nn.Module`.
        ValueError: `min_coverage`, `limit` or `max_configs` is out of range.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model is {type(model).__name__}, expected a torch.nn.Module. For the name of a model on the Hub: `prior-hub fits "
            "NAME`, or build it on the meta device and pass that."
        )
    if not 0 <= min_coverage <= 1:
        raise ValueError(f"min_coverage is {min_coverage}, expected a share between 0 and 1.")
    if (limit is not None and limit < 1) or max_configs < 1:
        raise ValueError(f"limit={limit}, max_configs={max_configs}: expected 1 or more.")
    search = _Fitting(model, min_coverage, max_configs, token, cache_dir)
    for fingerprint in search.fingerprints:
        search.read(_priors([str(architecture_tag(fingerprint))], sort="downloads", token=token))
    for name in search.bases:
        search.read(_priors([f"base_model:{name}"], sort="downloads", token=token))
    if others or (others is None and not any(fit.exact for fit in search.fits)):
        search.read(_priors([], sort="downloads", token=token))
    if search.left:
        _warn(
            f"{search.left} more priors could fit and were not looked at: {max_configs} configurations were read. Pass a "
            "larger max_configs, or narrow the list with list_priors."
        )
    return sorted(search.fits, key=search.order)[:limit]


class _Fitting:
    """The search for priors that fit one model: what it is, what was read, what fits."""

    def __init__(
        self,
        model: nn.Module,
        min_coverage: float,
        max_configs: int,
        token: str | bool | None,
        cache_dir: str | Path | None,
    ) -> None:
        self.model, self.min_coverage = model, min_coverage
        self.token, self.cache_dir = token, cache_dir
        self.fingerprints = model_fingerprints(model)
        self.bases = base_model_names(model)[:_MOST_BASES]
        self.values = sum(p.numel() for p in model.parameters())
        self.budget = max_configs
        self.fits: list[PriorFit] = []
        self.left = 0  # priors that were not read for want of budget
        self._seen: set[tuple[str, str | None]] = set()
        self._unfit: set[str] = set()  # fingerprints that were read and do not fit

    def read(self, candidates: Iterable[PriorInfo]) -> None:
        """Read and match the configurations of those that were not read before."""
        groups: dict[str | None, int] = {}
        waiting: list[tuple[int, int, PriorInfo]] = []
        for info in candidates:
            if (info.repo_id, info.subfolder) in self._seen or self._too_large(info):
                continue
            self._seen.add((info.repo_id, info.subfolder))
            turn = 0 if info.architecture is None else groups.get(info.architecture, 0)
            groups[info.architecture] = turn + 1
            waiting.append((turn, len(waiting), info))
        queue = [info for _, _, info in sorted(waiting, key=lambda item: item[:2])]  # one of each architecture first
        while queue:
            queue = [info for info in queue if info.architecture not in self._unfit]
            count = min(_AT_ONCE, self.budget)
            if not count:
                self.left += len(queue)
                return
            batch, queue = queue[:count], queue[count:]
            self.budget -= len(batch)
            self._read_batch(batch)

    def _too_large(self, info: PriorInfo) -> bool:
        """Whether a prior has more values than could find so many places, with as many again for a head of its own."""
        return info.num_parameters is not None and info.num_parameters * self.min_coverage > 2 * self.values

    def _read_batch(self, batch: Sequence[PriorInfo]) -> None:
        with warnings.catch_warnings():  # of unknown keys: it is other people's configurations that are looked through
            warnings.simplefilter("ignore", PriorWarning)
            answers = side_by_side([partial(_config_or_error, info, self.token, self.cache_dir) for info in batch], _AT_ONCE)
        lost = [answer for answer in answers if isinstance(answer, PriorConnectionError)]
        if lost and len(lost) == len(batch):
            raise lost[0]
        for info, answer in zip(batch, answers, strict=True):
            if isinstance(answer, PriorConfig):
                self._fit(_with_config(info, answer), answer, info.architecture)
            else:
                likely = " (its card says that it is of this architecture)" if info.architecture in self.fingerprints else ""
                _warn(f"{_place(info)} was not looked at{likely}: {answer}")

    def _fit(self, info: PriorInfo, config: PriorConfig, said: str | None) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", PriorWarning)  # they are in the match
                match = match_config(config, self.model, min_coverage=self.min_coverage)
        except PriorMatchError:
            if said is not None and said == info.architecture:  # a card that lies speaks for itself only
                self._unfit.add(said)
            return
        exact = info.architecture in self.fingerprints
        coverage = share_of_body(match, self.model)
        reasons = ["same architecture (names and shapes)"] if exact else []
        if not exact:
            whole = len(match.pairs) + len(match.marginalised)
            reasons.append(f"{len(match.pairs)} of its {whole} parameters have a place, {coverage:.0%} of the model's values")
        if info.base_model in self.bases:
            reasons.append(f"same base model ({info.base_model})")
        reasons += [f"but {remark.rstrip('.')}" for remark in match.remarks]
        self.fits.append(PriorFit(info=info, match=match, coverage=coverage, exact=exact, why="; ".join(reasons)))

    def order(self, fit: PriorFit) -> tuple[Any, ...]:
        """Key for sorting: the best fit first."""
        base = fit.info.base_model in self.bases
        first = (not fit.exact, bool(fit.match.remarks), -fit.coverage, not base)
        return (*first, -(fit.info.downloads or 0), fit.repo_id, fit.info.subfolder or "")


def _config_or_error(info: PriorInfo, token: str | bool | None, cache_dir: str | Path | None) -> PriorConfig | PriorHubError:
    """The configuration of a stranger's prior: none is downloaded that is larger than a configuration may be."""
    path = join(info.subfolder, CONFIG_NAME)
    try:
        cached = None
        if info.commit_hash:
            folder = cache_dir or constants.HF_HUB_CACHE
            cached = try_to_load_from_cache(info.repo_id, path, cache_dir=folder, revision=info.commit_hash)
        if not isinstance(cached, str):
            with explained(info.repo_id, info.commit_hash, info.subfolder):
                listed = hub_client(token).get_paths_info(info.repo_id, path, revision=info.commit_hash)
            size = max((item.size for item in listed if isinstance(item, RepoFile)), default=0)
            if size > MAX_CONFIG_BYTES:
                raise PriorFormatError(f"its {CONFIG_NAME} has {size} bytes, more than the {MAX_CONFIG_BYTES} one may have.")
        options: dict[str, Any] = {"subfolder": info.subfolder, "token": token, "cache_dir": cache_dir}
        return download_config(info.repo_id, revision=info.commit_hash, **options)[0]
    except PriorHubError as error:
        return error


# --------------------------------------------------------------------------------------------------------------- helpers


def _words(text: str) -> list[str]:
    """Words in lower case, of letters and digits: what stands between white space, without its punctuation."""
    squeezed = ("".join(c for c in word if c.isalnum()) for word in text.casefold().split())
    return list(dict.fromkeys(word for word in squeezed if word))


def _score(word: str, info: PriorInfo) -> int:
    """How well a word describes a prior; 0: not at all."""
    fields = [(4, info.repo_id), (3, info.base_model), (2, info.estimator), (2, info.task)]
    fields += [*((2, name) for name in info.datasets), *((1, tag) for tag in info.tags if ":" not in tag)]
    return max(weight * _quality(word, text) for weight, text in fields if text)


def _quality(word: str, text: str) -> int:
    """3: a whole word of the text, or several joined; 2: the beginning of such; 1: inside; 0: not there."""
    parts = re.findall(r"[^\W\d_]+|\d+", text.casefold())
    best = 0
    joined = "".join(parts)
    starts = set(itertools.accumulate(map(len, parts), initial=0))
    at = joined.find(word)
    while at >= 0:
        best = max(best, 1 + (at in starts) + (at in starts and at + len(word) in starts))
        at = joined.find(word, at + 1)
    return best


def _is_called(kind: str, name: str, info: PriorInfo) -> bool:
    """Whether a prior's base model, or one of its data sets, has this name, whoever its owner."""
    names = [info.base_model or ""] if kind == "base_model" else list(info.datasets)
    return any(found.casefold().rsplit("/", 1)[-1] == name.casefold() for found in names)


def _place(info: PriorInfo) -> str:
    return f"{info.repo_id}/{info.subfolder}" if info.subfolder else info.repo_id


def _text(value: Any) -> str | None:
    """A text on one line, without what a terminal would act on; None for anything else, and for what is no text of a card."""
    if not isinstance(value, str) or len(value) > _LONGEST:
        return None
    seen = value if value.isprintable() else "".join(c if c.isprintable() else " " for c in value)
    return " ".join(seen.split()) or None


def _texts(value: Any) -> list[str]:
    """The texts in a value that may be one, or several."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return [text for item in values if (text := _text(item)) is not None]


def _fingerprint(value: Any) -> str | None:
    return value if isinstance(value, str) and _FINGERPRINT.fullmatch(value) else None


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _number(value: Any) -> float | None:
    try:
        found = float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def _time(value: Any) -> datetime | None:
    if isinstance(value, datetime):
        return value
    with contextlib.suppress(ValueError):
        return datetime.fromisoformat(value) if isinstance(value, str) else None
    return None


def _warn(message: str) -> None:
    warnings.warn(message, PriorWarning, stacklevel=3)
