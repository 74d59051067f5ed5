"""Priors pushed to the Hub: one commit, or none.

One `create_commit` per push, with the parent commit; after a lost answer the head is compared before anything is tried again.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    EvalResult,
    HfApi,
    ModelInfo,
    constants,
    get_session,
    get_token,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile

from prior_hub.errors import (
    PriorConnectionError,
    PriorFormatError,
    PriorHubError,
    PriorMetadataError,
    PriorNotFoundError,
    PriorStorageError,
)
from prior_hub.priors.config import CONFIG_NAME, PriorConfig, check_weight_file_name
from prior_hub.priors.storage import CARD_NAME, INDEX_NAME, prior_files, read_bounded, read_config
from prior_hub.registry.card import (
    PICTURES,
    card_pictures,
    card_problems,
    card_versions,
    read_card,
    render_card,
    update_card,
)
from prior_hub.registry.client import DISK_SAYS_NO, TRIES, bounded, digest, explained, first_line, hub_client, join, pause
from prior_hub.registry.completeness import check_complete, completed, missing_in, refuse_tokens
from prior_hub.registry.evaluation import Evaluation, eval_results
from prior_hub.registry.versions import Version, new_versions

_fcntl: ModuleType | None
try:
    import fcntl as _fcntl
except ImportError:  # Windows
    _fcntl = None


__all__ = ["PlannedFile", "PushOptions", "PushPlan", "PushResult", "plan_push", "push_folder", "scratch_folder", "upload_prior"]

_LARGE_PUSH = 256_000_000  # bytes


@dataclass(frozen=True)
class PushResult:
    """Where a push landed."""

    repo_id: str
    commit_url: str
    commit_hash: str
    pull_request_url: str | None = None
    tag: str | None = None
    collection_url: str | None = None


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


@contextlib.contextmanager
def push_folder(size: int) -> Iterator[Path]:
    """A temporary folder for files of `size` bytes that are to be pushed (see `scratch_folder`); gone afterwards.

    A process that is killed leaves its folder behind. It is removed by the next push: the lock on it ended with the process.
    """
    where = Path(scratch_folder(size) or tempfile.gettempdir())
    _remove_abandoned(where)
    folder = Path(tempfile.mkdtemp(prefix="prior-hub-new-", dir=where))
    handle = None
    try:
        with contextlib.suppress(OSError):  # a file system without locks: nobody can tell, so nobody removes it
            handle = _locked(folder)
            folder = folder.rename(where / folder.name.replace("-new-", "-push-"))  # by this name only with the lock held
        (inner := folder / "prior").mkdir()
        yield inner
    except OSError as error:
        if error.errno not in DISK_SAYS_NO or isinstance(error, PriorHubError):
            raise
        raise PriorStorageError(
            error.errno,
            f"{os.strerror(error.errno)} while the {size / 1e6:.3g} MB to push were written. Nothing was pushed. Make room, or "
            "set TMPDIR to a folder with room, then push again",
            error.filename or str(where),
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if handle is not None:
            os.close(handle)


def _remove_abandoned(where: Path) -> None:
    """Remove the folders of pushes whose process is gone."""
    for folder in where.glob("prior-hub-push-*"):
        with contextlib.suppress(OSError):  # somebody else's, or under way
            handle = _locked(folder)
            if handle is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(handle)


def _locked(folder: Path) -> int | None:
    """A handle that holds the lock on a folder; None where there are no such locks (Windows).

    Raises:
        OSError: it is held by somebody else.
    """
    if _fcntl is None:
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        _fcntl.flock(handle, _fcntl.LOCK_EX | _fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise
    return handle


@dataclass(frozen=True, kw_only=True)
class PushOptions:
    """How a prior is pushed. A name that is not here is a TypeError.

    Attributes:
        revision: branch to push to, created if missing; "main" when None.
        subfolder: folder of the repository.
        token: an access token; the logged-in one when None.
        private: make a new repository private; refused if there is a public one.
        gated: "auto" or "manual": who wants the files must accept the terms first, before anything is uploaded; None: as it is.
        resource_group_id: resource group of an Enterprise organisation, for a new repository.
        create_pr: open a pull request instead.
        commit_message: first line of the commit; the card's list of versions shows it too.
        commit_description: rest of the commit message.
        tag: tag the commit; refused if it exists.
        license, base_model, dataset, dataset_license: put in place of what the configuration says, in what is pushed.
        allow_incomplete: push without licence, base model or source data set.
        evaluation: see `eval_results`; None keeps those of the card that is there if it is of the same prior.
        evaluation_dataset, evaluation_task: where `evaluation` names none.
        compute: see `check_compute`; None as for `evaluation`.
        pictures: path of a file -> alternative text; pushed into the folder prior_pictures; None as for `evaluation`.
    """

    revision: str | None = None
    subfolder: str | None = None
    token: str | bool | None = None
    private: bool | None = None
    gated: Literal["auto", "manual"] | None = None
    resource_group_id: str | None = None
    create_pr: bool = False
    commit_message: str | None = None
    commit_description: str | None = None
    tag: str | None = None
    license: str | None = None
    base_model: str | None = None
    dataset: str | list[str] | None = None
    dataset_license: str | None = None
    allow_incomplete: bool = False
    evaluation: Evaluation | None = None
    evaluation_dataset: str | None = None
    evaluation_task: str | None = None
    compute: Mapping[str, Any] | None = None
    pictures: Mapping[str | os.PathLike[str], str] | None = None

    def __post_init__(self) -> None:
        if self.tag and self.create_pr:
            raise ValueError("a pull request cannot be tagged: push without tag=, and tag the commit once it is merged.")
        if self.gated not in (None, "auto", "manual"):
            raise ValueError(f"gated is {self.gated!r}, expected 'auto' or 'manual'.")

    @property
    def branch(self) -> str:
        """Where it is pushed to."""
        return self.revision or "main"

    def config(self, config: PriorConfig) -> PriorConfig:
        """The configuration that is pushed.

        Raises:
            PriorMetadataError: what a reader needs is missing.
        """
        config = completed(
            config,
            license=self.license,
            base_model=self.base_model,
            dataset=self.dataset,
            dataset_license=self.dataset_license,
        )
        if not self.allow_incomplete:
            check_complete(missing_in(config))
        return config


@dataclass(frozen=True)
class PlannedFile:
    """A file of a push. status: "new", "changed", "unchanged" or "deleted"; size: bytes, 0 if it is deleted."""

    path: str
    size: int
    status: str


@dataclass(frozen=True)
class PushPlan:
    """What a push would do: nothing is sent to find out.

    Attributes:
        repo_id: the repository's full name.
        exists: whether it is there, as far as this token sees.
        private: whether it is private, or would be; None: as its owner's new repositories are.
        branch: where it would be pushed to.
        head: the commit that is there.
        create_pr, tag, gated: as they were asked for.
        files: every file.
        card_diff: the card that is there against the new one, as a unified diff; "" if they are the same.
        missing: what the metadata lack, and how it is given.
        problems: why this push would be refused; empty if nothing is known against it.
    """

    repo_id: str
    exists: bool
    private: bool | None
    branch: str
    head: str | None
    create_pr: bool
    tag: str | None
    gated: str | None
    files: tuple[PlannedFile, ...]
    card_diff: str
    missing: tuple[str, ...]
    problems: tuple[str, ...]

    def __str__(self) -> str:
        """For a person: where to, every file, what is new in the card, and what stands against it."""
        there = f"at {self.head[:8]}" if self.head else "not there yet, or not seen by this token: it would be made"
        access = {True: ", private", False: ", public", None: ""}[self.private]
        lines = [f"dry run: nothing is sent; {self.repo_id}, branch {self.branch} ({there}{access})"]
        lines += [f"  {file.status:<9} {file.path} ({file.size:,} bytes)" for file in self.files]
        lines += [self.card_diff.rstrip() or "the card stays as it is"]
        return "\n".join([*lines, *(f"would be refused: {problem}" for problem in self.problems)])


@dataclass(frozen=True)
class _Push:
    """One push under way: what is sent, whatever is there. stored: the configuration in the folder, config: the one pushed."""

    stored: PriorConfig
    config: PriorConfig
    files: Mapping[str, Path | bytes]
    results: list[EvalResult]
    options: PushOptions

    @classmethod
    def of(cls, folder: str | os.PathLike[str], options: PushOptions) -> _Push:
        """Read and check everything that can be told without a request."""
        stored = read_config(folder)
        config = options.config(stored)
        sub = options.subfolder
        files: dict[str, Path | bytes] = {join(sub, path.name): path for path in prior_files(folder, stored)}
        if config != stored:
            files[join(sub, CONFIG_NAME)] = config.to_json().encode()
        names = [Path(path).name for path in options.pictures or {}]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise PriorMetadataError(
                f"pictures= has two files of the name {twice[0]}, which would lie in one place: rename one."
            )
        for path in options.pictures or {}:
            files[join(sub, f"{PICTURES}/{Path(path).name}")] = Path(path)
            if not Path(path).is_file():
                raise PriorNotFoundError(f"{os.fspath(path)} is not there: nothing was sent. pictures= takes paths of files.")
        results = eval_results(options.evaluation, dataset=options.evaluation_dataset, task=options.evaluation_task)
        push = cls(stored, config, files, results, options)
        texts = [("commit_message", options.commit_message), ("commit_description", options.commit_description)]
        texts += [(CONFIG_NAME, config.to_json()), ("the model card", push.card(None, "o/n", []))]
        token = options.token if isinstance(options.token, str) else get_token()
        refuse_tokens(texts, token)
        return push

    def card(
        self,
        there: str | None,
        repo_id: str,
        versions: Sequence[Version],
        previous: PriorConfig | None = None,
        published: str | None = None,
    ) -> str:
        """The card to push: rendered anew, with a person's text of the folder's card and of the one that is there."""
        path = self.files.get(join(self.options.subfolder, CARD_NAME))
        rendered = render_card(
            self.config,
            repo_id=repo_id,
            subfolder=self.options.subfolder,
            evaluation=self.results,
            compute=self.options.compute,
            pictures={Path(file).name: text for file, text in (self.options.pictures or {}).items()},
            versions=versions,
        )
        if isinstance(path, Path):
            rendered = update_card(read_card(path), rendered, previous=self.stored, config=self.stored)
        return update_card(
            there,
            rendered,
            previous=previous,
            config=self.config,
            repo_id=repo_id,
            subfolder=self.options.subfolder,
            published=published,
        )


@bounded()
def upload_prior(folder: str | os.PathLike[str], repo_id: str, **arguments: Any) -> PushResult:
    """Push a prior's folder in one commit; creates the repository if it is missing.

    Weight files of an older prior in the same place are removed by the same commit. A model card that is already in the
    repository keeps everything a person wrote in it, and its list of versions grows.

    Args:
        folder: as `save_pretrained` wrote it.
        repo_id: "organisation/name", or a name of the token's owner.
        **arguments: the attributes of `PushOptions`.

    Raises:
        PriorMetadataError: no licence, base model or source data set, and not `allow_incomplete`; or an access token in a text
            that would be published. Nothing was asked of the Hub.
        PriorNotFoundError: `folder` holds no prior, or the repository cannot be seen with this token.
        PriorAccessError: the token may not write there.
        PriorConnectionError: the Hub cannot be reached or fails; says whether anything landed.
        PriorFormatError: a weight file is not the one the configuration describes, or the card is not valid.
        PriorHubError: somebody else pushed meanwhile, or the tag exists, or the repository is public and `private` was asked.
        ValueError: `tag` together with `create_pr`.
    """
    options = PushOptions(**arguments)
    push = _Push.of(folder, options)
    api, tag, branch = hub_client(options.token), options.tag, options.branch
    with explained(repo_id, options.revision, options.subfolder):
        if "/" in repo_id and (new_name := _new_name(_info_if_there(api, repo_id, None), repo_id)):
            raise PriorHubError(_RENAMED.format(name=repo_id, new=new_name))
        name: str = api.create_repo(
            repo_id,
            private=options.private,
            exist_ok=True,
            repo_type="model",
            resource_group_id=options.resource_group_id,
        ).repo_id
        if options.private and not api.model_info(name).private:
            raise PriorHubError(_IS_PUBLIC.format(name=name))
        if tag and not _may_be_tagged(api, name, push):
            raise PriorHubError(_HAS_TAG.format(name=name, tag=tag))
        if options.gated and api.model_info(name).gated != options.gated:
            api.update_repo_settings(name, gated=options.gated)
        if branch != "main" and not options.create_pr and not branch.startswith("refs/"):
            api.create_branch(name, branch=branch, exist_ok=True)
    result = _commit(api, name, push)
    if tag:
        _tag(api, name, tag, result.commit_hash)
        result = replace(result, tag=tag)
    return result


_IS_PUBLIC = (
    "{name} exists already and is public: nothing was pushed. Make it private first, on its page under Settings "
    "or with huggingface_hub.HfApi().update_repo_settings({name!r}, private=True), or push to a new name."
)
_RENAMED = (
    "{name} was renamed, it is {new} now; nothing was pushed. Push to that: a new repository would take the old name away."
)
_HAS_TAG = "{name} already has a tag {tag!r}; nothing was pushed. Choose another, or delete it."


@bounded()
def plan_push(folder: str | os.PathLike[str], repo_id: str, **arguments: Any) -> PushPlan:
    """What `upload_prior` would do with these arguments. The Hub is asked, and nothing of it is changed.

    Raises:
        PriorHubError: as `upload_prior`, where the plan cannot be made. What would be refused later is told by the plan.
    """
    options = PushOptions(**arguments)
    push = _Push.of(folder, replace(options, allow_incomplete=True))
    missing = tuple(missing_in(push.config).values())
    api, branch, sub = hub_client(options.token), options.branch, options.subfolder
    problems = [] if options.allow_incomplete else list(missing)
    with explained(repo_id, options.revision, sub):
        name = repo_id if "/" in repo_id else f"{api.whoami()['name']}/{repo_id}"
        info = _info_if_there(api, name, branch)
        remote = {sibling.rfilename for sibling in info.siblings or []} if info else set()
        head = info.sha if info else None
        contents, stale, there = _contents(api, name, push, remote, head or "")
        if info is not None:
            if new_name := _new_name(info, name):
                problems.append(_RENAMED.format(name=name, new=new_name))
            if options.private and not info.private:
                problems.append(_IS_PUBLIC.format(name=name))
            if options.tag and not _may_be_tagged(api, name, push):
                problems.append(_HAS_TAG.format(name=name, tag=options.tag))
            with contextlib.suppress(GatedRepoError):
                problems += _only_reads(api) if options.create_pr else _may_write(api, name)
        else:
            problems += _may_make(api, name)
        found = _paths_info(api, name, [*contents, *stale], head) if head else {}
        card = contents[join(sub, CARD_NAME)]
        assert isinstance(card, bytes)  # noqa: S101
        problems += [f"the model card: {problem}." for problem in _card_problems(api, card.decode())]
    files = []
    for path, content in contents.items():
        item = found.get(path)
        status = "new" if item is None else "unchanged" if _is_file(item, content) else "changed"
        files.append(PlannedFile(path, _size(content), status))
    files += [PlannedFile(path, 0, "deleted") for path in sorted(stale)]
    before, after = ((text or "").splitlines(keepends=True) for text in (there, card.decode()))
    return PushPlan(
        repo_id=name,
        exists=info is not None,
        private=info.private if info is not None else options.private,
        branch=branch,
        head=head,
        create_pr=options.create_pr,
        tag=options.tag,
        gated=options.gated,
        files=tuple(files),
        card_diff="".join(difflib.unified_diff(before, after, "README.md on the Hub", "README.md of this push")),
        missing=missing,
        problems=tuple(problems),
    )


def _info_if_there(api: HfApi, repo_id: str, branch: str | None) -> ModelInfo | None:
    """The repository at the branch, or at main if there is no such branch yet; None if there is no repository."""
    try:
        return api.model_info(repo_id, revision=branch)
    except RevisionNotFoundError:
        return api.model_info(repo_id)
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        return None


def _may_write(api: HfApi, repo_id: str) -> list[str]:
    """Why this token may not write there; [] if it may."""
    try:
        api.auth_check(repo_id, write=True)
    except HfHubHTTPError as error:
        if getattr(error.response, "status_code", None) not in (401, 403):
            raise
        return [f"this token may not write to {repo_id}: {first_line(error)}"]
    return []


def _new_name(info: ModelInfo | None, repo_id: str) -> str | None:
    """The name a repository has now, if it was found under an older one: the Hub sends readers on, but not who makes one."""
    return info.id if info is not None and info.id.casefold() != repo_id.casefold() else None


def _only_reads(api: HfApi) -> list[str]:
    """Why this token may write nothing at all; [] if nothing is known against it."""
    if api.token is False or not (api.token or get_token()):
        return ["nobody is logged in here: `hf auth login`, HF_TOKEN or token=."]
    read = _role(api.whoami()) == "read"
    return ["this token may only read (its role is 'read'): make one that may write."] if read else []


def _may_make(api: HfApi, repo_id: str) -> list[str]:
    """Why this token may not make a repository; [] if nothing is known against it."""
    if problems := _only_reads(api):
        return problems
    said, owner = api.whoami(), repo_id.split("/")[0]
    names = [said["name"], *(org.get("name") for org in said.get("orgs") or [])]
    if _role(said) == "write" and owner.casefold() not in [str(name).casefold() for name in names]:  # finer ones may not tell
        return [f"{said['name']!r}, whose token this is, is no member of {owner!r}: it may not make {repo_id}."]
    return []


def _role(said: Mapping[str, Any]) -> str | None:
    """The role of the token, of what the Hub says of its owner."""
    token = (said.get("auth") or {}).get("accessToken") or {}
    return token.get("role") if isinstance(token, Mapping) else None


def _card_problems(api: HfApi, text: str) -> list[str]:
    """What the Hub has against a card, by its own validator and by the client's parser."""
    body = {"content": text, "repoType": "model"}
    response = get_session().post(f"{api.endpoint}/api/validate-yaml", json=body)
    if response.status_code not in (200, 400):
        raise PriorConnectionError(f"the Hub could not check the model card ({response.status_code}). Try again.")
    said = [str(error.get("message")) for error in response.json().get("errors", [])]
    return [*said, *card_problems(text)]


def _tag(api: HfApi, repo_id: str, tag: str, commit: str) -> None:
    try:
        with explained(repo_id, None, None):
            api.create_tag(repo_id, tag=tag, revision=commit)
            if _tagged(api, repo_id, tag) != commit:  # the client does not read the answer
                raise PriorConnectionError("what answered is not the Hub. Try again.")
    except PriorHubError as error:
        with contextlib.suppress(PriorHubError), explained(repo_id, None, None):
            if _tagged(api, repo_id, tag) == commit:
                return  # only the answer was lost, this time or the last
        raise type(error)(f"The prior was pushed to {repo_id} as {commit[:8]}, but not tagged {tag!r}: {error}") from error


def _may_be_tagged(api: HfApi, repo_id: str, push: _Push) -> bool:
    """Whether the tag is free, or on this very prior at the head of the branch, as after a push whose answer was lost."""
    refs = api.list_repo_refs(repo_id)
    there = next((ref.target_commit for ref in refs.tags if ref.name == push.options.tag), None)
    if there is None:
        return True
    if there not in [ref.target_commit for ref in refs.branches if ref.name == push.options.branch]:
        return False
    with contextlib.suppress(EntryNotFoundError, PriorFormatError):
        path = join(push.options.subfolder, CONFIG_NAME)
        data = read_bounded(Path(api.hf_hub_download(repo_id, path, revision=there)))
        return PriorConfig.from_json(data, where=f"{path} of {repo_id}") == push.config  # the hashes of the weights are in it
    return False


def _tagged(api: HfApi, repo_id: str, tag: str) -> str | None:
    """The commit a tag is on."""
    return next((ref.target_commit for ref in api.list_repo_refs(repo_id).tags if ref.name == tag), None)


def _commit(api: HfApi, repo_id: str, push: _Push) -> PushResult:
    branch, subfolder, create_pr = push.options.branch, push.options.subfolder, push.options.create_pr
    message = push.options.commit_message or f"Upload prior (rank {push.config.rank}) with prior_hub"
    for attempt in range(1, TRIES + 1):
        with explained(repo_id, branch, subfolder):
            info = api.model_info(repo_id, revision=branch)
            head = info.sha or ""
            remote = {sibling.rfilename for sibling in info.siblings or []}
            contents, stale, _ = _contents(api, repo_id, push, remote, head)
            opened = _pull_requests(api, repo_id) if create_pr else {}
        card = contents[join(subfolder, CARD_NAME)]
        problems = card_problems(card.decode()) if isinstance(card, bytes) else []
        if problems:
            raise PriorFormatError(
                f"the model card for {repo_id!r} is not valid, nothing was pushed: {'; '.join(problems)}. Correct the metadata "
                "at the top of its README.md."
            )
        operations: list[Any] = [CommitOperationAdd(path, content) for path, content in contents.items()]
        _check_hashes(push.config, operations)
        operations += [CommitOperationDelete(path) for path in sorted(stale)]
        try:
            with explained(repo_id, branch, subfolder):
                commit = api.create_commit(
                    repo_id,
                    operations,
                    commit_message=message,
                    commit_description=push.options.commit_description,
                    revision=branch,
                    create_pr=create_pr,
                    parent_commit=head,
                )
        except PriorConnectionError as error:
            try:
                with explained(repo_id, branch, subfolder):
                    if create_pr:
                        now = head
                        for ref, oid in _pull_requests(api, repo_id).items():
                            if ref not in opened and _landed(api, repo_id, contents, oid):
                                url = f"{api.endpoint}/{repo_id}/discussions/{ref.rsplit('/', 1)[-1]}"
                                return PushResult(repo_id, _commit_url(api, repo_id, oid), oid, url)
                    else:
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
            late = _may_come_late(error.__cause__)
            if late and (create_pr or attempt == TRIES):  # a second pull request would not meet the parent commit's guard
                what = "The pull request may still be opened" if create_pr else "This push may still land"
                raise PriorConnectionError(f"{error} {what}: look at {repo_id} before pushing again.") from error
            if attempt == TRIES:
                raise PriorConnectionError(f"{error} Nothing of this push landed after {attempt} tries.") from error
            pause(error.__cause__, attempt)
        else:
            return PushResult(repo_id, commit.commit_url, commit.oid, commit.pr_url)
    raise AssertionError("unreachable")


def _may_come_late(error: BaseException | None) -> bool:
    """Whether it was the commit that the Hub, or a gateway in front of it, only took longer for than somebody waited."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status != 504 and not type(error).__name__.endswith(("Timeout", "TimeoutError")):
        return False
    with contextlib.suppress(AttributeError, RuntimeError):  # an error without its request
        return "/commit/" in str(error.request.url)  # type: ignore[union-attr]
    return True


def _pull_requests(api: HfApi, repo_id: str) -> dict[str, str]:
    """References of the pull requests ("refs/pr/1") and the commits they are at."""
    refs = api.list_repo_refs(repo_id, include_pull_requests=True).pull_requests or []
    return {ref.ref: ref.target_commit for ref in refs}


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
    api: HfApi, repo_id: str, push: _Push, remote: set[str], head: str
) -> tuple[dict[str, Path | bytes], set[str], str | None]:
    """(what to upload by path, paths to delete, the card that is there). The card is joined with the one that is there."""
    options, subfolder = push.options, push.options.subfolder
    path, config_path = join(subfolder, CARD_NAME), join(subfolder, CONFIG_NAME)
    there = previous = last = published = None
    if path in remote:
        there = read_card(Path(api.hf_hub_download(repo_id, path, revision=head)))
    if config_path in remote:
        with contextlib.suppress(PriorFormatError):  # what cannot be read is replaced all the same
            data = read_bounded(Path(api.hf_hub_download(repo_id, config_path, revision=head)))
            previous = PriorConfig.from_json(data, where=f"{config_path} of {repo_id}")
            commit = _paths_info(api, repo_id, [config_path], head, expand=True)[config_path].last_commit
            last = (commit.oid, f"{commit.date:%Y-%m-%d}") if commit is not None else None
    if there is not None and last is not None and path in push.files:
        with contextlib.suppress(EntryNotFoundError, PriorFormatError):  # the client has it, unless somebody committed since
            published = read_card(Path(api.hf_hub_download(repo_id, path, revision=last[0])))
    rows = new_versions(
        card_versions(there or ""),
        push.config,
        previous,
        last=last,
        date=f"{datetime.now(UTC):%Y-%m-%d}",
        tag=options.tag,
        message=options.commit_message,
    )
    card = push.card(there, repo_id, rows, previous, published)
    contents = {**push.files, path: card.encode()}
    stale = _stale(remote, contents, subfolder)
    shown = {join(subfolder, f"{PICTURES}/{name}") for name in card_pictures(there or "")}
    still = {join(subfolder, f"{PICTURES}/{name}") for name in card_pictures(card)}
    return contents, stale | ((shown - still) & remote), there


def _stale(remote: set[str], files: Mapping[str, Path | bytes], subfolder: str | None) -> set[str]:
    """Weight files and index of an older prior in the same place, which the new one does not have."""
    stale = set()
    for path in remote - files.keys():
        name = path.rsplit("/", 1)[-1]
        if path != join(subfolder, name):
            continue
        try:
            check_weight_file_name(name)
        except PriorHubError:
            if name != INDEX_NAME:
                continue
        stale.add(path)
    return stale


def _landed(api: HfApi, repo_id: str, contents: Mapping[str, Path | bytes], revision: str) -> bool:
    """Whether the repository at `revision` holds exactly these files."""
    found = _paths_info(api, repo_id, list(contents), revision)
    return all(path in found and _is_file(found[path], content) for path, content in contents.items())


def _paths_info(api: HfApi, repo_id: str, paths: list[str], revision: str, *, expand: bool = False) -> dict[str, RepoFile]:
    items = api.get_paths_info(repo_id, paths, revision=revision, expand=expand)
    return {item.path: item for item in items if isinstance(item, RepoFile)}


def _is_file(item: RepoFile, content: Path | bytes) -> bool:
    """Whether a file on the Hub has this content."""
    size = _size(content)
    if item.size != size:
        return False
    if item.lfs is not None:
        return item.lfs.sha256 == digest(content, "sha256")
    return item.blob_id == digest(content, "sha1", f"blob {size}\0".encode())


def _size(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _commit_url(api: HfApi, repo_id: str, commit: str) -> str:
    return f"{api.endpoint}/{repo_id}/commit/{commit}"
