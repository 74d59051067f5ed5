"""The Hub's client as prior_hub uses it: patient with what may be repeated, bounded in time, its errors explained.

What the client does well (cache, resuming, retries of files, locks, ETags) is used as it is. Added here: requests other than
those of files are repeated too, a silent Hub ends in an error, small files are compared with git's sha1, errors say what to do.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import (
    HfApi,
    ModelInfo,
    constants,
    get_session,
)
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
from huggingface_hub.hf_api import GitRefs, RepoUrl

from prior_hub import __version__
from prior_hub.errors import (
    PriorAccessError,
    PriorConnectionError,
    PriorFormatError,
    PriorHubError,
    PriorNotFoundError,
    PriorStorageError,
)
from prior_hub.priors.config import CONFIG_NAME
from prior_hub.registry.tokens import discreet, remember, scrubbed

try:
    from huggingface_hub.errors import RevisionResolutionError
except ImportError:  # pragma: no cover - name of later clients

    class RevisionResolutionError(Exception):  # type: ignore[no-redef]
        """Never raised by this client."""


__all__ = [
    "DISK_SAYS_NO",
    "LIBRARY_NAME",
    "TRIES",
    "HubClient",
    "bounded",
    "digest",
    "explained",
    "first_line",
    "hub_client",
    "join",
    "pause",
]

_T = TypeVar("_T")
LIBRARY_NAME = "prior-hub"
DISK_SAYS_NO = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
_SMALL_FILE = 10 * 2**20  # bytes; larger ones are never regular files of git on the Hub
TRIES = 3
_WAIT = 1.0  # seconds before the second try; twice that before the third
_PATIENCE = 120.0  # seconds a push waits for any sign of the Hub; PRIOR_HUB_TIMEOUT says otherwise
_WITHOUT_CARD = ["gated", "lastModified", "private", "sha", "siblings", "tags"]
_TRY_AGAIN = (408, 409, 412, 425, 429)  # of the 4xx, those that say nothing against the request itself


class HubClient(HfApi):
    """The client, with the patience that it has for files only.

    Requests that may be repeated without harm are, when the Hub or the connection fails. The description of a repository is
    waited for as long as that of a file (HF_HUB_ETAG_TIMEOUT), not for ever. A small file whose content is not what its name in
    the cache says is downloaded once more: the client compares sizes only.
    """

    def _build_hf_headers(self, *args: Any, **options: Any) -> dict[str, str]:
        """What the client does before each request: by then it may have replaced its session, after a refused connection."""
        _bound()
        return super()._build_hf_headers(*args, **options)

    def preupload_lfs_files(self, *args: Any, **options: Any) -> None:
        """What `create_commit` does before it sends the commit, with headers that it made earlier."""
        super().preupload_lfs_files(*args, **options)
        _bound()

    def repo_info(self, *args: Any, repo_type: str | None = None, **options: Any) -> ModelInfo:
        """What resolve_revision asks, which has the cache to fall back on: not repeated.

        Asked without the card if the client cannot read that: one with a key such as `self:` is a TypeError in every call.
        """
        del repo_type
        options |= {"timeout": options.get("timeout") or constants.HF_HUB_ETAG_TIMEOUT}
        try:
            return super().model_info(*args, **options)
        except TypeError as error:
            if "ModelCardData" not in str(error) or options.get("expand"):
                raise
        return super().model_info(*args, **options | {"expand": _WITHOUT_CARD, "files_metadata": False})

    def resolve_revision(self, *args: Any, **options: Any) -> Any:
        """The commit of a revision."""
        return _patiently(super().resolve_revision, *args, **options)

    def model_info(self, *args: Any, **options: Any) -> ModelInfo:
        """The description of a repository."""
        return _patiently(self.repo_info, *args, **options)

    def list_repo_refs(self, *args: Any, **options: Any) -> GitRefs:
        """Branches and tags."""
        return _patiently(super().list_repo_refs, *args, **options)

    def get_paths_info(self, *args: Any, **options: Any) -> Any:
        """Sizes and hashes of files."""
        return _patiently(super().get_paths_info, *args, **options)

    def update_repo_settings(self, *args: Any, **options: Any) -> None:
        """Visibility and gate."""
        _patiently(super().update_repo_settings, *args, **options)

    def create_tag(self, *args: Any, **options: Any) -> None:
        """A tag; one that is there already is a conflict."""
        _patiently(super().create_tag, *args, **options)

    def create_repo(self, *args: Any, exist_ok: bool = False, **options: Any) -> RepoUrl:
        """A repository; repeated where it may exist already."""
        call = partial(super().create_repo, *args, exist_ok=exist_ok, **options)
        return _patiently(call) if exist_ok else call()

    def create_branch(self, *args: Any, exist_ok: bool = False, **options: Any) -> None:
        """A branch; repeated where it may exist already."""
        call = partial(super().create_branch, *args, exist_ok=exist_ok, **options)
        _patiently(call) if exist_ok else call()

    def hf_hub_download(self, *args: Any, **options: Any) -> Any:
        """A file, its content checked where its name in the cache is git's sha1."""
        path = _patiently(super().hf_hub_download, *args, **options)
        if options.get("local_files_only") or _is_what_its_name_says(Path(path)):
            return path
        return _patiently(super().hf_hub_download, *args, **options | {"force_download": True})


def _patiently(call: Callable[..., _T], *args: Any, **options: Any) -> _T:
    """The result of a call that may be repeated, which it is while the Hub or the connection fails, `TRIES` times in all."""
    for attempt in range(1, TRIES):
        try:
            return call(*args, **options)
        except Exception as error:
            if not _may_pass(error):
                raise
            pause(error, attempt)
    return call(*args, **options)


def _may_pass(error: Exception) -> bool:
    """Whether the same request may succeed in a moment; not if the client has tried it for long already, or is offline."""
    if isinstance(error, LocalEntryNotFoundError) or isinstance(error.__cause__, OfflineModeIsEnabled):
        return False
    try:
        with explained("", None, None):
            raise error
    except PriorConnectionError:
        return not isinstance(error, OfflineModeIsEnabled)
    except Exception:  # noqa: BLE001
        return False


def pause(error: BaseException | None, attempt: int) -> None:
    """Wait before the next try: as long as the Hub asks for (up to a minute), or 1, 2, ... seconds."""
    response = getattr(error, "response", None)
    asked = response.headers.get("Retry-After", "") if response is not None else ""
    time.sleep(min(float(asked), 60.0) if asked.isdigit() else _WAIT * attempt)


def _is_what_its_name_says(path: Path) -> bool:
    """Whether a cached file has the content its name in the cache promises; True where the name says nothing of it.

    Small files are named by their ETag, on the Hub git's sha1; a mirror may have one of its own.
    """
    blob = path.resolve()
    if not re.fullmatch(r"[0-9a-f]{40}", blob.name) or blob.stat().st_size > _SMALL_FILE:
        return True
    content = blob.read_bytes()
    return blob.name in (digest(content, "sha1", f"blob {len(content)}\0".encode()), digest(content, "sha1"))


def hub_client(token: str | bool | None) -> HfApi:
    """The client with this token; the logged-in one when None, none when False."""
    remember(token)
    return HubClient(token=token, library_name=LIBRARY_NAME, library_version=__version__)


_bounded_lock = threading.Lock()
_bounded_sessions: list[tuple[Any, Any, Any]] = []  # a session, its time-out before, and meanwhile
_bounded_depth = 0


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Meanwhile the client's requests that have no time-out of their own get one: a silent Hub fails instead of hanging a push.

    A session of the client that has a time-out already keeps it. It is the session of the process, and is put back.

    Raises:
        ValueError: PRIOR_HUB_TIMEOUT is no number of seconds.
    """
    global _bounded_depth
    _patience()
    with _bounded_lock:
        _bounded_depth += 1
    try:
        _bound()
        yield
    finally:
        with _bounded_lock:
            _bounded_depth -= 1
            while not _bounded_depth and _bounded_sessions:
                session, before, meanwhile = _bounded_sessions.pop()
                if session.timeout == meanwhile:  # nobody else has set it
                    session.timeout = before


def _bound() -> None:
    """Give the client's session a time-out where it has none, if a `bounded` block runs."""
    with _bounded_lock:
        session = get_session() if _bounded_depth else None
        if session is None or session.timeout.read is not None:
            return
        before, patience = session.timeout, _patience()
        limits = {kind: patience if seconds is None else seconds for kind, seconds in before.as_dict().items()}
        session.timeout = meanwhile = type(before)(**limits)
        _bounded_sessions.append((session, before, meanwhile))


def _patience() -> float:
    text = os.environ.get("PRIOR_HUB_TIMEOUT") or str(_PATIENCE)
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ValueError(f"PRIOR_HUB_TIMEOUT is {text!r}, expected a number of seconds above 0, such as 120.")
    return seconds


def digest(content: Path | bytes, kind: str, head: bytes = b"") -> str:
    """The hash of `head` and a content, in hexadecimal digits."""
    digest = hashlib.new(kind, head, usedforsecurity=False)
    if isinstance(content, bytes):
        digest.update(content)
    else:
        with content.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def join(subfolder: str | None, name: str) -> str:
    """The path of a file in the repository."""
    folder = (subfolder or "").strip("/")
    return f"{folder}/{name}" if folder else name


# -------------------------------------------------------------------------------------------------------------- errors


@contextlib.contextmanager
def explained(repo_id: str, revision: str | None, subfolder: str | None) -> Iterator[None]:
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
            "private repository log in (`hf auth login`, HF_TOKEN or token=). A copy in the cache loads with local_files_only."
        ) from error
    except RevisionNotFoundError as error:
        raise PriorNotFoundError(f"{at}: the repository has no such branch, tag or commit. Check revision=.") from error
    except LocalEntryNotFoundError as error:
        why = first_line(error.__cause__) if error.__cause__ else "offline, or local_files_only"
        raise PriorConnectionError(
            f"{at} is not in the local cache, and the Hub cannot be asked ({why.rstrip('.')}). Connect once, try again in a "
            "while, or check cache_dir."
        ) from error
    except EntryNotFoundError as error:
        raise PriorNotFoundError(
            f"{at} holds no prior: there is no {CONFIG_NAME} (or a weight file it lists is missing). If the prior lies in "
            "a folder of the repository, pass subfolder=."
        ) from error
    except (RevisionResolutionError, OfflineModeIsEnabled) as error:
        raise PriorConnectionError(
            f"{at} cannot be looked up: {first_line(error)} Connect, try again in a while, or use a cached copy."
        ) from error
    except LocalTokenNotFoundError as error:
        raise PriorAccessError(f"{at}: token=True was given, but nobody is logged in here (`hf auth login`).") from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None) or 0
        if status in (401, 403):
            raise PriorAccessError(
                f"the Hub refuses {at} ({status}): {first_line(error)} Check the token and its role."
            ) from error
        if 400 <= status < 500 and status not in _TRY_AGAIN:
            raise PriorHubError(
                f"the Hub does not accept the request for {at} ({status}): {first_line(error)} Check what was asked for."
            ) from error
        patience = "is asked too often" if status == 429 else "failed"
        raise PriorConnectionError(
            f"the Hub {patience} on {at} ({status}): {first_line(error)} Try again in a while."
        ) from error
    except (ConnectionError, TimeoutError) as error:
        raise PriorConnectionError(
            f"the Hub could not be reached for {at}: {first_line(error)} Check the connection, then try again."
        ) from error
    except OSError as error:
        if error.errno in DISK_SAYS_NO:
            raise PriorStorageError(
                error.errno,
                f"{os.strerror(error.errno)} while downloading {at}. Make room or give another cache (cache_dir=, HF_HOME), "
                "then try again",
                error.filename,
            ) from error
        if error.errno is not None:
            raise
        raise PriorConnectionError(f"the download of {at} broke off: {first_line(error)} Try again.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PriorConnectionError(
            f"what answered for {at} is not the Hub: no JSON ({error}). A proxy or a login page may stand in between."
        ) from error
    except ValueError as error:
        if isinstance(error.__cause__, Exception) and "force" in str(error).lower():  # "Force download failed ..."
            with explained(repo_id, revision, subfolder):
                raise error.__cause__ from None
        if "Invalid metadata in README.md" not in str(error):
            raise
        raise PriorFormatError(
            f"the Hub refuses the model card for {at}, nothing was pushed: {' '.join(str(error).split())}."
        ) from error
    except RuntimeError as error:  # hf_xet's
        raise PriorConnectionError(f"the transfer for {at} failed: {first_line(error)} Try again.") from error
    except Exception as error:
        # The client lets errors of its HTTP library through raw, and that library differs between its versions.
        if type(error).__module__.split(".")[0] not in ("httpx", "httpx2", "httpcore", "httpcore2", "requests"):
            raise
        raise PriorConnectionError(
            f"the connection to the Hub broke for {at}: {type(error).__name__}. Check the connection, then try again."
        ) from error


def first_line(error: BaseException) -> str:
    """What the Hub said, or else the first line of what the client says; without tokens and signatures."""
    said = getattr(error, "server_message", None) or str(error)
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return (scrubbed(lines[0]) if lines else type(error).__name__).rstrip(".") + "."
