"""Priors on the Hub, over the real `huggingface_hub` client.

What the client does well (cache, resuming, retries, locks, ETags) is used as it is. Added here: the revision is resolved
once and every file taken from that commit; one `create_commit` per push, with the parent commit, and after a lost answer
the head is compared before anything is tried again; errors that say what to do.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile

from prior_hub import __version__
from prior_hub.errors import (
    PriorAccessError,
    PriorConnectionError,
    PriorFormatError,
    PriorHubError,
    PriorNotFoundError,
)
from prior_hub.priors.config import CONFIG_NAME, PriorConfig, check_weight_file_name
from prior_hub.priors.storage import CARD_NAME, INDEX_NAME, file_sha256, prior_files, read_bounded, read_config
from prior_hub.priors.tensor_files import side_by_side
from prior_hub.registry.card import read_card, render_card, update_card
from prior_hub.registry.tokens import discreet, remember

try:
    from huggingface_hub.errors import RevisionResolutionError
except ImportError:  # pragma: no cover - name of later clients

    class RevisionResolutionError(Exception):  # type: ignore[no-redef]
        """Never raised by this client."""


__all__ = [
    "LIBRARY_NAME",
    "DownloadedPrior",
    "PushResult",
    "download_config",
    "download_legacy",
    "download_prior",
    "scratch_folder",
    "upload_prior",
]

LIBRARY_NAME = "prior-hub"
_LARGE_PUSH = 256_000_000  # bytes
_DOWNLOADS = 8  # files at a time
_PUSH_TRIES = 3
_PUSH_WAIT = 1.0  # seconds before the second try; twice that before the third
_TRY_AGAIN = (408, 409, 412, 425, 429)  # of the 4xx, those that say nothing against the request itself


@dataclass(frozen=True)
class DownloadedPrior:
    """A prior's files in the client's cache: the folder, and the commit all of them are from."""

    folder: Path
    repo_id: str
    commit_hash: str


@dataclass(frozen=True)
class PushResult:
    """Where a push landed."""

    repo_id: str
    commit_url: str
    commit_hash: str
    pull_request_url: str | None = None
    tag: str | None = None


def _api(token: str | bool | None) -> HfApi:
    remember(token)
    return HfApi(token=token, library_name=LIBRARY_NAME, library_version=__version__)


# ----------------------------------------------------------------------------------------------------------- downloads


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

    Raises:
        PriorNotFoundError: no such repository, revision or sub-folder, or no prior there, or not in the cache.
        PriorAccessError: the token is wrong or not enough.
        PriorConnectionError: the Hub cannot be reached or fails, and nothing is cached.
        PriorFormatError: the configuration is not one.
    """
    api = _api(token)
    again = force_download or repair
    config_path, commit = _download_config(api, repo_id, revision, subfolder, cache_dir, local_files_only, again)
    config = PriorConfig.from_json(read_bounded(config_path), where=f"{CONFIG_NAME} of {repo_id}")
    names = [*config.weight_files, *([INDEX_NAME] if len(config.weight_files) > 1 else [])]

    def fetch(name: str) -> None:
        path = config_path.parent / name
        damaged = repair and not (path.is_file() and config.weight_files.get(name) == file_sha256(path))
        with _explained(repo_id, revision, subfolder):
            api.hf_hub_download(
                repo_id,
                _join(subfolder, name),
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
    api = _api(token)
    with _explained(repo_id, revision, None):
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
    path, commit = _download_config(_api(token), repo_id, revision, subfolder, cache_dir, local_files_only, False)
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
    with _explained(repo_id, revision, subfolder):
        commit = api.resolve_revision(
            repo_id,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        path = api.hf_hub_download(
            repo_id,
            _join(subfolder, CONFIG_NAME),
            revision=commit,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )
    return Path(path), commit.resolved  # its string value is the name asked for, `resolved` the hash


# ------------------------------------------------------------------------------------------------------------- uploads


def scratch_folder(size: int) -> Path | None:
    """Where to make files of `size` bytes that are to be pushed; None: where the system makes its temporary files.

    That place is often in memory, or small. Large files go where the client keeps its own (HF_HOME), as far as there is room,
    unless TMPDIR says where.
    """
    if size < _LARGE_PUSH or any(os.environ.get(name) for name in ("TMPDIR", "TEMP", "TMP")):
        return None
    folder = Path(constants.HF_HOME)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        room = shutil.disk_usage(folder).free
    except OSError:  # it cannot be made
        return None
    return folder if os.access(folder, os.W_OK) and room > 1.05 * size else None


def upload_prior(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    private: bool | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
    tag: str | None = None,
) -> PushResult:
    """Push a prior's folder in one commit; creates the repository if it is missing.

    Weight files of an older prior in the same place are removed by the same commit. A model card that is already in the
    repository keeps everything a person wrote in it.

    Raises:
        PriorNotFoundError: `folder` holds no prior, or the repository cannot be seen with this token.
        PriorAccessError: the token may not write there.
        PriorConnectionError: the Hub cannot be reached or fails; says whether anything landed.
        PriorFormatError: a weight file is not the one the configuration describes, or the card is not valid.
        PriorHubError: somebody else pushed meanwhile, or the tag exists, or the repository is public and `private` was asked.
        ValueError: `tag` together with `create_pr`.
    """
    if tag and create_pr:
        raise ValueError("a pull request cannot be tagged: push without tag=, and tag the commit once it is merged.")
    config = read_config(folder)
    files = {_join(subfolder, path.name): path for path in prior_files(folder, config)}
    api = _api(token)
    with _explained(repo_id, revision, subfolder):
        name: str = api.create_repo(repo_id, private=private, exist_ok=True, repo_type="model").repo_id
        if private and not api.model_info(name).private:
            raise PriorHubError(
                f"{name} exists already and is public: nothing was pushed. Make it private first, on its page under Settings "
                f"or with huggingface_hub.HfApi().update_repo_settings({name!r}, private=True), or push to a new name."
            )
        branch = revision or "main"
        if tag and any(ref.name == tag for ref in api.list_repo_refs(name).tags):
            raise PriorHubError(f"{name} already has a tag {tag!r}; nothing was pushed. Choose another, or delete it.")
        if branch != "main" and not create_pr and not branch.startswith("refs/"):
            api.create_branch(name, branch=branch, exist_ok=True)
    message = commit_message or f"Upload prior (rank {config.rank}) with prior_hub"
    result = _commit(api, name, config, files, branch, subfolder, message, commit_description, create_pr)
    if tag:
        _tag(api, name, tag, result.commit_hash)
        result = PushResult(result.repo_id, result.commit_url, result.commit_hash, result.pull_request_url, tag)
    return result


def _tag(api: HfApi, repo_id: str, tag: str, commit: str) -> None:
    try:
        with _explained(repo_id, None, None):
            api.create_tag(repo_id, tag=tag, revision=commit)
    except PriorHubError as error:
        with contextlib.suppress(PriorHubError), _explained(repo_id, None, None):
            if any(ref.name == tag and ref.target_commit == commit for ref in api.list_repo_refs(repo_id).tags):
                return  # only the answer was lost
        raise type(error)(f"The prior was pushed to {repo_id} as {commit[:8]}, but not tagged {tag!r}: {error}") from error


def _commit(
    api: HfApi,
    repo_id: str,
    config: PriorConfig,
    files: dict[str, Path],
    branch: str,
    subfolder: str | None,
    message: str,
    description: str | None,
    create_pr: bool,
) -> PushResult:
    for attempt in range(1, _PUSH_TRIES + 1):
        with _explained(repo_id, branch, subfolder):
            info = api.model_info(repo_id, revision=branch)
            head = info.sha or ""
            remote = {sibling.rfilename for sibling in info.siblings or []}
            contents = _contents(api, repo_id, config, files, remote, head, subfolder)
        operations: list[Any] = [CommitOperationAdd(path, content) for path, content in contents.items()]
        _check_hashes(config, operations)
        operations += [CommitOperationDelete(path) for path in sorted(_stale(remote, files, subfolder))]
        try:
            with _explained(repo_id, branch, subfolder):
                commit = api.create_commit(
                    repo_id,
                    operations,
                    commit_message=message,
                    commit_description=description,
                    revision=branch,
                    create_pr=create_pr,
                    parent_commit=head,
                )
        except PriorConnectionError as error:
            if create_pr:
                raise PriorConnectionError(
                    f"{error} The pull request may have been opened all the same: look before pushing again."
                ) from error
            try:
                with _explained(repo_id, branch, subfolder):
                    now = api.model_info(repo_id, revision=branch).sha or ""
                    if now != head and _landed(api, repo_id, contents, now):
                        return PushResult(repo_id, _commit_url(api, repo_id, now), now)
            except PriorConnectionError:
                raise PriorConnectionError(
                    f"{error} Whether this push landed could not be found out: look at {repo_id} before pushing again."
                ) from error
            if now != head:
                raise PriorHubError(
                    f"somebody else pushed to {repo_id} ({branch}) meanwhile: it is at {now[:8]}, this push started from "
                    f"{head[:8]}. Nothing of this push landed. Look at the new commit, then push again."
                ) from error
            if attempt == _PUSH_TRIES:
                raise PriorConnectionError(f"{error} Nothing of this push landed after {attempt} tries.") from error
            time.sleep(_PUSH_WAIT * attempt)
        else:
            return PushResult(repo_id, commit.commit_url, commit.oid, commit.pr_url)
    raise AssertionError("unreachable")


def _check_hashes(config: PriorConfig, operations: list[Any]) -> None:
    """Refuse to push weights that are not those of the configuration; the client has hashed them already."""
    for operation in operations:
        expected = config.weight_files.get(operation.path_in_repo.rsplit("/", 1)[-1])
        if expected is not None and operation.upload_info.sha256.hex() != expected:
            raise PriorFormatError(
                f"{operation.path_or_fileobj} is not the file this prior was saved with (its sha256 differs): it was "
                "altered, or another process is saving there. Nothing was pushed. Save the prior again."
            )


def _contents(
    api: HfApi,
    repo_id: str,
    config: PriorConfig,
    files: dict[str, Path],
    remote: set[str],
    head: str,
    subfolder: str | None,
) -> dict[str, Path | bytes]:
    """What to upload: paths, and for the card the text that joins it with the one already there."""
    path = _join(subfolder, CARD_NAME)
    local = read_card(files[path]) if path in files else render_card(config)
    there = previous = None
    if path in remote:
        there = read_card(Path(api.hf_hub_download(repo_id, path, revision=head)))
        config_path = _join(subfolder, CONFIG_NAME)
        if config_path in remote:
            with contextlib.suppress(PriorFormatError):  # what cannot be read is replaced all the same
                data = read_bounded(Path(api.hf_hub_download(repo_id, config_path, revision=head)))
                previous = PriorConfig.from_json(data, where=f"{config_path} of {repo_id}")
    return files | {path: update_card(there, local, previous=previous, repo_id=repo_id, subfolder=subfolder).encode()}


def _stale(remote: set[str], files: dict[str, Path], subfolder: str | None) -> set[str]:
    """Weight files and index of an older prior in the same place, which the new one does not have."""
    stale = set()
    for path in remote - files.keys():
        name = path.rsplit("/", 1)[-1]
        if path != _join(subfolder, name):
            continue
        try:
            check_weight_file_name(name)
        except PriorHubError:
            if name != INDEX_NAME:
                continue
        stale.add(path)
    return stale


def _landed(api: HfApi, repo_id: str, contents: dict[str, Path | bytes], revision: str) -> bool:
    """Whether the repository at `revision` holds exactly these files."""
    found = {
        item.path: item for item in api.get_paths_info(repo_id, list(contents), revision=revision) if isinstance(item, RepoFile)
    }
    for path, content in contents.items():
        item = found.get(path)
        data = content if isinstance(content, bytes) else None
        size = len(data) if data is not None else Path(content).stat().st_size  # type: ignore[arg-type]
        if item is None or item.size != size:
            return False
        if item.lfs is not None:
            if item.lfs.sha256 != _digest(content, "sha256"):
                return False
        elif item.blob_id != _digest(content, "sha1", f"blob {size}\0".encode()):
            return False
    return True


def _digest(content: Path | bytes, kind: str, head: bytes = b"") -> str:
    digest = hashlib.new(kind, head, usedforsecurity=False)
    if isinstance(content, bytes):
        digest.update(content)
    else:
        with content.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _commit_url(api: HfApi, repo_id: str, commit: str) -> str:
    return f"{api.endpoint}/{repo_id}/commit/{commit}"


def _join(subfolder: str | None, name: str) -> str:
    folder = (subfolder or "").strip("/")
    return f"{folder}/{name}" if folder else name


# -------------------------------------------------------------------------------------------------------------- errors


@contextlib.contextmanager
def _explained(repo_id: str, revision: str | None, subfolder: str | None) -> Iterator[None]:
    """Turn the client's errors into ours, which say what to do; anything else passes through."""
    at = f"{repo_id!r}" + (f" at {revision!r}" if revision else "") + (f", folder {subfolder!r}" if subfolder else "")
    try:
        with discreet():
            yield
    except PriorHubError:
        raise
    except HFValidationError as error:
        raise PriorNotFoundError(
            f"{repo_id!r} is neither a local folder nor a name on the Hub ('organisation/name'): {error}"
        ) from error
    except GatedRepoError as error:
        raise PriorAccessError(
            f"{at} is gated: accept its terms on its page with the account the token belongs to, and log in "
            "(`hf auth login`, HF_TOKEN or token=)."
        ) from error
    except RepositoryNotFoundError as error:
        raise PriorNotFoundError(
            f"{at} does not exist on the Hub, or is private and this token cannot see it. Check the spelling; for a "
            "private repository log in (`hf auth login`, HF_TOKEN or token=)."
        ) from error
    except RevisionNotFoundError as error:
        raise PriorNotFoundError(f"{at}: the repository has no such branch, tag or commit.") from error
    except LocalEntryNotFoundError as error:
        raise PriorConnectionError(
            f"{at} is not in the local cache, and the Hub cannot be asked (offline, or local_files_only). Connect once, "
            "or check cache_dir."
        ) from error
    except EntryNotFoundError as error:
        raise PriorNotFoundError(
            f"{at} holds no prior: there is no {CONFIG_NAME} (or a weight file it lists is missing). If the prior lies in "
            "a folder of the repository, pass subfolder=."
        ) from error
    except (RevisionResolutionError, OfflineModeIsEnabled) as error:
        raise PriorConnectionError(f"{at} cannot be looked up: {_first_line(error)} Connect, or use a cached copy.") from error
    except LocalTokenNotFoundError as error:
        raise PriorAccessError(f"{at}: token=True was given, but nobody is logged in here (`hf auth login`).") from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None) or 0
        if status in (401, 403):
            raise PriorAccessError(
                f"the Hub refuses {at} ({status}): {_first_line(error)} Check the token and its role."
            ) from error
        if 400 <= status < 500 and status not in _TRY_AGAIN:
            raise PriorHubError(f"the Hub does not accept the request for {at} ({status}): {_first_line(error)}") from error
        raise PriorConnectionError(f"the Hub failed on {at} ({status}): {_first_line(error)}") from error
    except (ConnectionError, TimeoutError) as error:
        raise PriorConnectionError(f"the Hub could not be reached for {at}: {_first_line(error)}") from error
    except OSError as error:
        if error.errno is not None:  # a full disk, a cache that cannot be written
            raise
        raise PriorConnectionError(f"the download of {at} broke off: {_first_line(error)} Try again.") from error
    except json.JSONDecodeError as error:
        raise PriorConnectionError(
            f"what answered for {at} is not the Hub: no JSON ({error}). A proxy or a login page may stand in between."
        ) from error
    except ValueError as error:
        if "Invalid metadata in README.md" not in str(error):
            raise
        raise PriorFormatError(
            f"the Hub refuses the model card for {at}, nothing was pushed: {' '.join(str(error).split())}."
        ) from error
    except RuntimeError as error:  # hf_xet's
        raise PriorConnectionError(f"the transfer for {at} failed: {_first_line(error)}") from error
    except Exception as error:
        # The client lets errors of its HTTP library through raw, and that library differs between its versions.
        if type(error).__module__.split(".")[0] not in ("httpx", "httpx2", "httpcore", "httpcore2", "requests"):
            raise
        raise PriorConnectionError(f"the connection to the Hub broke for {at}: {type(error).__name__}.") from error


def _first_line(error: BaseException) -> str:
    """What the Hub said, or else the first line of what the client says; without the signatures of signed addresses."""
    said = getattr(error, "server_message", None) or str(error)
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    line = re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\")]+", r"\1", lines[0]) if lines else type(error).__name__
    return line.rstrip(".") + "."
