"""Priors brought from the Hub into the client's cache.

The revision is resolved once and every file taken from that commit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from huggingface_hub import (
    HfApi,
)

from prior_hub.errors import (
    PriorNotFoundError,
)
from prior_hub.priors.config import CONFIG_NAME, PriorConfig
from prior_hub.priors.storage import INDEX_NAME, file_sha256, read_bounded
from prior_hub.priors.tensor_files import side_by_side
from prior_hub.registry.client import explained, hub_client, join

__all__ = ["DownloadedPrior", "download_config", "download_legacy", "download_prior"]

_DOWNLOADS = 8  # files at a time


@dataclass(frozen=True)
class DownloadedPrior:
    """A prior's files in the client's cache: the folder, and the commit all of them are from."""

    folder: Path
    repo_id: str
    commit_hash: str


def download_prior(
    repo_id: str,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    repair: bool = False,
    check: Callable[[PriorConfig], object] | None = None,
) -> DownloadedPrior:
    """Bring a prior's configuration and weights into the client's cache, all from one commit.

    Args:
        repo_id: "organisation/name".
        revision: branch, tag or commit.
        subfolder: folder inside the repository.
        token: an access token; the logged-in one when None, none when False.
        cache_dir: where downloads are kept.
        local_files_only: use the cache only.
        force_download: download everything again.
        repair: download again what is damaged: the configuration, and the weight files that have not its hashes.
        check: called with the configuration before any weights are asked for; what it raises ends the download.

    Raises:
        PriorNotFoundError: no such repository, revision or sub-folder, or no prior there, or not in the cache.
        PriorAccessError: the token is wrong or not enough.
        PriorConnectionError: the Hub cannot be reached or fails, and nothing is cached.
        PriorFormatError: the configuration is not one.
    """
    api = hub_client(token)
    again = force_download or repair
    config_path, commit = _download_config(api, repo_id, revision, subfolder, cache_dir, local_files_only, again)
    config = PriorConfig.from_json(read_bounded(config_path), where=f"{CONFIG_NAME} of {repo_id}")
    if check is not None:
        check(config)
    names = [*config.weight_files, *([INDEX_NAME] if len(config.weight_files) > 1 else [])]

    def fetch(name: str) -> None:
        path = config_path.parent / name
        damaged = repair and not (path.is_file() and config.weight_files.get(name) == file_sha256(path))
        with explained(repo_id, revision, subfolder):
            api.hf_hub_download(
                repo_id,
                join(subfolder, name),
                revision=commit,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                force_download=force_download or damaged,
            )

    side_by_side([partial(fetch, name) for name in names], _DOWNLOADS)  # as many as the client's snapshot_download
    return DownloadedPrior(config_path.parent, repo_id, str(commit))


def download_legacy(
    repo_id: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> DownloadedPrior:
    """Bring other people's prior files (`*.pt`, `*.pth`, `*.tar` at the top of a repository) into the cache, from one commit.

    Raises:
        PriorNotFoundError: no such repository or revision, or no such file in it or in the cache.
        PriorAccessError, PriorConnectionError: as `download_prior`.
    """
    api = hub_client(token)
    with explained(repo_id, revision, None):
        resolved = api.resolve_revision(repo_id, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only)
        folder = api.snapshot_download(
            repo_id,
            revision=resolved,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            allow_patterns=["*.pt", "*.pth", "*.tar"],
            ignore_patterns=["*/*"],
        )
    if not any(path.suffix in (".pt", ".pth", ".tar") for path in Path(folder).glob("*")):  # the folder may not even be made
        raise PriorNotFoundError(
            f"{repo_id} has no *.pt, *.pth or *.tar file: nothing to import. Is it a prior already? Pull it."
        )
    return DownloadedPrior(Path(folder), repo_id, str(resolved.resolved))


def download_config(
    repo_id: str,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> tuple[PriorConfig, str]:
    """The configuration of a prior on the Hub and its commit; no weights are downloaded. Errors as `download_prior`."""
    path, commit = _download_config(hub_client(token), repo_id, revision, subfolder, cache_dir, local_files_only, False)
    return PriorConfig.from_json(read_bounded(path), where=f"{CONFIG_NAME} of {repo_id}"), str(commit)


def _download_config(
    api: HfApi,
    repo_id: str,
    revision: str | None,
    subfolder: str | None,
    cache_dir: str | Path | None,
    local_files_only: bool,
    force_download: bool,
) -> tuple[Path, str]:
    with explained(repo_id, revision, subfolder):
        commit = api.resolve_revision(
            repo_id,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        path = api.hf_hub_download(
            repo_id,
            join(subfolder, CONFIG_NAME),
            revision=commit,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )
    return Path(path), commit.resolved  # its string value is the name asked for, `resolved` the hash
