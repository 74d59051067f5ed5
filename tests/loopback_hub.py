"""A small Hugging Face Hub on loopback: what `huggingface_hub` needs of the real one, for tests without a network.

    hub = LoopbackHub(folder).start()       # hub.endpoint is the client's HF_ENDPOINT, with HF_HUB_DISABLE_XET=1
    hub.add_fault("status", status=503, method="HEAD", path="/resolve/")
    hub.stop()

Two listening sockets, because the client treats a redirect to another *host* differently: the Hub (API, /resolve, LFS
batch) on 127.0.0.1, the CDN (pre-signed LFS GET and PUT) on 127.0.0.2. Models (data sets among them) and LFS only: no Xet,
no multipart.
Contents are content addressed on disk, references and settings in memory:

    <root>/objects/<git sha1>   regular files, and commits as JSON
    <root>/lfs/<sha256>         LFS files, verified on arrival

A route is a function (hub, request, ...) -> Response; `repo` in its pattern arrives as a `Repo` the caller may read.
Routes run one at a time under `hub.lock`; answers are sent outside it, so that a stalled one stalls nobody else.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import os
import re
import secrets
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit

import yaml

Json = dict[str, Any]

HUB_HOST = "127.0.0.1"
CDN_HOST = "127.0.0.2" if sys.platform.startswith("linux") else "localhost"  # elsewhere only 127.0.0.1 is configured
LARGEST_REGULAR_FILE = 10 * 1024 * 1024
LFS_SUFFIXES = (
    ".7z .arrow .bin .bz2 .ckpt .ftz .gz .h5 .joblib .mlmodel .model .msgpack .npy .npz .onnx .ot .parquet .pb .pickle "
    ".pkl .pt .pth .rar .safetensors .tar .tflite .tgz .wasm .xz .zip .zst"
)
LICENSES = (  # the common ones of the Hub's list
    "apache-2.0 mit bsd bsd-2-clause bsd-3-clause cc cc0-1.0 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 "
    "cc-by-nc-4.0 cc-by-nc-sa-4.0 cc-by-nc-nd-4.0 cdla-permissive-2.0 openrail agpl-3.0 gpl-2.0 gpl-3.0 lgpl-3.0 "
    "mpl-2.0 epl-2.0 odc-by odbl ofl-1.1 isc llama2 llama3 llama3.1 llama3.2 gemma unlicense unknown other"
)
FAULTS = {
    "status", "close", "reset", "drop", "truncate", "corrupt", "delay", "stall", "ignore_range", "header",
    "lost_response", "call",
}  # fmt: skip
NAME = re.compile(r"(?!.*(?:--|\.\.))[A-Za-z0-9_](?:[\w.\-]{0,94}[\w\-])?")
BAD_REFERENCE = re.compile(r"[\x00-\x20~^:?*\[\\]|\.\.|@\{|//|^/|/$|^-|\.lock$|\.$|^refs/|^$")
CARD = re.compile(r"^\s*---\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", re.DOTALL)


def timestamp() -> str:
    """Now, as the Hub writes it: 2025-01-31T12:00:00.000Z."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def git_sha(kind: str, data: bytes) -> str:
    """The id git gives to an object (checked by nobody, but the client expects 40 hex digits)."""
    return hashlib.sha1(f"{kind} {len(data)}\0".encode() + data, usedforsecurity=False).hexdigest()


def truthy(text: str | None) -> bool:
    """Query flags arrive as 1, true or True."""
    return (text or "").lower() in ("1", "true", "yes", "on")


class HubError(Exception):
    """An HTTP error as the Hub words it: status, message, and the X-Error-Code that the client maps to an exception."""

    def __init__(
        self, status: int, message: str, code: str | None = None, headers: Mapping[str, str] | None = None, **extra: str
    ) -> None:
        super().__init__(message)
        head = {"X-Error-Message": message.encode("latin-1", "replace").decode("latin-1"), **(headers or {})}
        self.response = as_json({"error": message, **extra}, status, head | ({"X-Error-Code": code} if code else {}))


class HungUp(Exception):
    """The connection was torn down on purpose: nothing more can be sent."""


@dataclass
class Request:
    """What a route sees of a request. headers: lower-case names; base: the endpoint that was called."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes
    base: str
    who: dict[str, str] | None = None

    def get(self, name: str) -> str | None:
        """First value of a query parameter."""
        return self.query.get(name, [None])[0]

    def json(self) -> Json:
        """The body as a JSON object."""
        try:
            value = json.loads(self.body or b"{}")
        except ValueError as error:
            raise HubError(400, "Invalid JSON body") from error
        return value or {}

    @property
    def user(self) -> str:
        """Name of the caller, who must have sent a token."""
        if self.who is None:
            raise unauthorized()
        return self.who["user"]


@dataclass
class Response:
    """status, body and headers; Content-Length is added when it is sent."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


def as_json(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON answer."""
    return Response(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})


def unauthorized() -> HubError:
    """The real Hub sends no code here; the client then maps it to RepositoryNotFoundError, but for https only."""
    return HubError(401, "Invalid username or password.", "RepoNotFound", {"WWW-Authenticate": "Bearer"})


@dataclass(frozen=True)
class Entry:
    """One file of a tree. oid: git sha1 of its content, or of its pointer if it is an LFS file (sha256 set)."""

    oid: str
    size: int
    sha256: str | None = None
    pointer_size: int = 0

    @classmethod
    def lfs(cls, sha256: str, size: int) -> Entry:
        """The entry of an LFS file."""
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
        return cls(git_sha("blob", pointer), size, sha256, len(pointer))


@dataclass(frozen=True)
class Commit:
    """A snapshot of the whole repository."""

    id: str
    parent: str | None
    tree: dict[str, Entry]
    author: str
    title: str
    message: str
    date: str

    def folders(self) -> set[str]:
        """Every folder that holds a file, at any depth."""
        return {parent.as_posix() for path in self.tree for parent in Path(path).parents} - {"."}


@dataclass
class Discussion:
    """A pull request; base: the reference it wants to enter."""

    num: int
    title: str
    description: str
    author: str
    base: str
    created: str = field(default_factory=timestamp)


@dataclass
class Repo:
    """A model repository. refs: full reference name -> commit id; lfs: sha256 -> size of what was uploaded to it."""

    id: str
    private: bool
    gated: str | bool = False
    resource_group: str | None = None
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    lfs: dict[str, int] = field(default_factory=dict)
    discussions: list[Discussion] = field(default_factory=list)
    created: str = field(default_factory=timestamp)

    @property
    def owner(self) -> str:
        """The user or the organisation."""
        return self.id.split("/")[0]

    def at(self, revision: str) -> Commit:
        """The commit of a branch, a tag, a full reference, a commit id or its first five digits or more."""
        for name in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if name in self.refs:
                return self.commits[self.refs[name]]
        found = [c for i, c in self.commits.items() if i.startswith(revision)]
        if len(found) == 1 and re.fullmatch(r"[0-9a-f]{5,40}", revision):
            return found[0]
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def writable_ref(self, revision: str) -> str:
        """The reference a commit can be pushed to: a branch or refs/pr/N, never a tag or a commit id."""
        name = revision if re.match(r"refs/(heads|pr)/", revision) else f"refs/heads/{revision}"
        if name not in self.refs:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return name

    def history(self, commit: Commit) -> Iterator[Commit]:
        """The commit and its ancestors, newest first."""
        yield commit
        while commit.parent:
            commit = self.commits[commit.parent]
            yield commit

    def discussion(self, num: str) -> Discussion:
        """A discussion by its number."""
        if not 1 <= int(num) <= len(self.discussions):
            raise HubError(404, "Discussion not found")
        return self.discussions[int(num) - 1]


@dataclass
class Collection:
    """A page that lists repositories. slug: owner, title and an id, the end of its address."""

    slug: str
    title: str
    owner: str
    private: bool
    items: list[Json] = field(default_factory=list)
    updated: str = field(default_factory=timestamp)


@dataclass
class Upload:
    """An LFS upload that was announced; who knows its key may PUT it to the CDN."""

    repo: Repo
    oid: str
    size: int


class LoopbackHub:
    """The server: `start()`, `stop()`, `endpoint`; faults and the request log have the interface of our full fakehub.

    page_size: longest page of a listing.
    """

    xet = False

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        for folder in ("objects", "lfs"):
            (self.root / folder).mkdir(parents=True, exist_ok=True)
        self.orgs: dict[str, dict[str, str]] = {"prior-hub": {"alice": "admin", "carol": "read"}}
        self.tokens: dict[str, dict[str, str]] = {
            "hf_alice_write": {"user": "alice", "role": "write"},
            "hf_alice_read": {"user": "alice", "role": "read"},
            "hf_bob_write": {"user": "bob", "role": "write"},
            "hf_carol_write": {"user": "carol", "role": "write"},
        }
        self.page_size = 1000
        self.lock = threading.RLock()
        self.repos: dict[str, Repo] = {}
        self.collections: dict[str, Collection] = {}
        self.uploads: dict[str, Upload] = {}
        self.cards: dict[str, str] = {}  # id of a README.md -> its metadata: a listing of many models reads them all
        self.log: list[Json] = []
        self._secret = secrets.token_bytes(16)
        self._faults: list[Json] = []
        self._servers: list[_Server] = []

    # ------------------------------------------------------------------ lifecycle
    def start(self) -> Self:
        """Listen on two free ports."""
        for role, host in (("hub", HUB_HOST), ("cdn", HUB_HOST if CDN_HOST == "localhost" else CDN_HOST)):
            server = _Server(self, role, host)
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True, name=f"loopback-{role}").start()
            self._servers.append(server)
        return self

    def stop(self) -> None:
        """Close the sockets, also those of kept-alive connections: after this the hub is really gone."""
        for server in self._servers:
            server.shutdown()
            server.server_close()
            server.disconnect_clients()
        self._servers.clear()

    @property
    def endpoint(self) -> str:
        """What HF_ENDPOINT must be."""
        return f"http://{HUB_HOST}:{self._servers[0].server_port}"

    @property
    def cdn_endpoint(self) -> str:
        """Where LFS files are."""
        return f"http://{CDN_HOST}:{self._servers[1].server_port}"

    # ------------------------------------------------------------------ faults and log
    def add_fault(
        self, action: str, *, method: str | None = None, path: str = "", role: str | None = None, times: int = 1,
        skip: int = 0, **options: object,
    ) -> Json:  # fmt: skip
        """Break the next `times` (-1: all) matching requests after `skip` of them; returns the rule, it counts `hits`.

        method: "HEAD" or "GET|HEAD"; path: a regular expression searched in "path?query"; role: "hub" or "cdn".
        status(status, headers={}, body=): answered instead; close() and reset(after_bytes=0): FIN and RST, before
        anything is handled (unless after_bytes); drop(after_bytes): FIN inside the body; truncate(keep_bytes): a
        shorter body that looks complete; corrupt(offset): one byte flipped; delay(seconds) before handling;
        stall(after_bytes, seconds) inside the body; ignore_range(); header(set={}, remove=[]);
        lost_response(rst=False): handled, never answered; call(function): what else happens just before handling.
        """
        if action not in FAULTS:
            raise ValueError(f"unknown fault action {action!r}; one of {sorted(FAULTS)}")
        re.compile(path)
        rule = {"action": action, "method": method, "path": path, "role": role, "times": times, "skip": skip, "hits": 0}
        with self.lock:
            self._faults.append(rule | options)
            return self._faults[-1]

    def clear_faults(self) -> None:
        """Forget all faults."""
        with self.lock:
            self._faults.clear()

    def requests(self, path: str = "", method: str | None = None, role: str | None = None) -> list[Json]:
        """Log entries, oldest first; path is searched in "path?query". For the keys see `_Handler.handle_request`."""
        with self.lock:
            return [
                dict(e)
                for e in self.log
                if re.search(path, e["target"]) and method in (None, e["method"]) and role in (None, e["role"])
            ]

    def clear_log(self) -> None:
        """Forget all requests."""
        with self.lock:
            self.log.clear()

    def matching_faults(self, role: str, method: str, target: str) -> list[Json]:
        """Rules that hit this request: any number of delays, calls and header changes, then at most one other."""
        hits = []
        with self.lock:
            for rule in self._faults:
                wanted = rule["role"] in (None, role) and (not rule["method"] or method in rule["method"].split("|"))
                if not wanted or not re.search(rule["path"], target):
                    continue
                if rule["skip"] > 0:
                    rule["skip"] -= 1
                elif rule["times"] != 0:
                    rule["times"] -= rule["times"] > 0
                    rule["hits"] += 1
                    hits.append(rule)
                    if rule["action"] not in ("delay", "header", "call"):
                        break
        return hits

    # ------------------------------------------------------------------ storage
    def store(self, kind: str, data: bytes) -> str:
        """Write a blob or a commit, return its id."""
        oid = git_sha(kind, data)
        (self.root / "objects" / oid).write_bytes(data)
        return oid

    def store_lfs(self, upload: Upload, data: bytes) -> None:
        """Keep an uploaded LFS file if it is what was announced."""
        found = hashlib.sha256(data).hexdigest()
        if (found, len(data)) != (upload.oid, upload.size):
            raise HubError(400, f"Uploaded content does not match the announced oid (got sha256 {found})")
        (self.root / "lfs" / found).write_bytes(data)
        upload.repo.lfs[found] = upload.size

    def read(self, entry: Entry) -> bytes:
        """Content of a file."""
        return (self.root / "lfs" / entry.sha256 if entry.sha256 else self.root / "objects" / entry.oid).read_bytes()

    def commit(self, repo: Repo, tree: dict[str, Entry], **fields: str | None) -> Commit:
        """Make a commit (fields: parent, author, title, message) that no reference points to yet."""
        files = {path: [entry.oid, entry.sha256, entry.size] for path, entry in sorted(tree.items())}
        fields["date"] = timestamp()
        oid = self.store("commit", json.dumps({"repo": repo.id, "tree": files, **fields}).encode())
        repo.commits[oid] = Commit(oid, tree=tree, **fields)
        return repo.commits[oid]

    def card(self, commit: Commit) -> Json:
        """The metadata block of README.md; {} if there is none or it is not YAML."""
        readme = commit.tree.get("README.md")
        if readme and readme.oid in self.cards:
            return json.loads(self.cards[readme.oid])
        match = CARD.match(self.read(readme).decode("utf-8", "replace")) if readme else None
        try:
            data = yaml.safe_load(match[1]) if match else None
        except yaml.YAMLError:
            data = None
        text = json.dumps(data, default=str) if isinstance(data, dict) else "{}"
        if readme:
            self.cards[readme.oid] = text
        return json.loads(text)

    def sign(self, oid: str) -> str:
        """The query of a pre-signed URL: who has it may read the object."""
        return urlencode({"X-Amz-Signature": hmac.new(self._secret, oid.encode(), "sha256").hexdigest()})

    # ------------------------------------------------------------------ who may do what
    def authenticate(self, header: str | None) -> dict[str, str] | None:
        """The token's owner. A bad token fails even on public resources."""
        if not header:
            return None
        token = header.removeprefix("Bearer ")
        if token not in self.tokens:
            raise HubError(401, "Invalid credentials in Authorization header", headers={"WWW-Authenticate": "Bearer"})
        return self.tokens[token]

    def may_read(self, repo: Repo, who: dict[str, str] | None) -> bool:
        """Private repositories exist only for their owner or for the members of the organisation."""
        user = who and who["user"]
        return not repo.private or user == repo.owner or user in self.orgs.get(repo.owner, {})

    def may_write(self, owner: str, who: dict[str, str] | None) -> bool:
        """Whether the caller may write in a namespace (whatever the token's role)."""
        user = who["user"] if who else ""
        return user == owner or self.orgs.get(owner, {}).get(user) in ("admin", "write", "contributor")

    def readable_repo(self, repo_id: str, request: Request) -> Repo:
        """The repository; what the caller may not see does not exist (401 to the unknown, 404 to the known)."""
        repo = self.repos.get(repo_id)
        if repo is None or not self.may_read(repo, request.who):
            raise unauthorized() if request.who is None else HubError(404, "Repository not found", "RepoNotFound")
        return repo

    def check_write(self, owner: str, request: Request, *, pull_request: bool = False) -> None:
        """403 unless the caller may write; anybody with a write token may open a pull request."""
        if request.user and request.who["role"] == "read":
            raise HubError(403, "Forbidden: you must use a write token to upload to a repository.")
        if not pull_request and not self.may_write(owner, request.who):
            raise HubError(403, f"Forbidden: you don't have the rights to write in {owner!r}; pass `create_pr=1`")

    def check_gate(self, repo: Repo, request: Request) -> None:
        """GatedRepo unless the repository is open to the caller: 401 for anonymous callers, 403 for known ones."""
        user = request.who and request.who["user"]
        if repo.gated and not self.may_write(repo.owner, request.who):
            raise HubError(403 if user else 401, f"Access to model {repo.id} is restricted.", "GatedRepo")

    # ------------------------------------------------------------------ dispatch
    def answer(self, role: str, request: Request) -> Response:
        """Find the route and run it."""
        if role == "hub":
            request.who = self.authenticate(request.headers.get("authorization"))
        method = "GET" if request.method == "HEAD" else request.method
        # data sets are kept among the models, enough for `datasets.load_dataset`
        request.path = re.sub("^/api/datasets/", "/api/models/", re.sub("^/datasets/", "/", request.path))
        for route_role, route_method, pattern, function in ROUTES:
            match = pattern.fullmatch(request.path) if (route_role, route_method) == (role, method) else None
            if match:
                values: Json = {name: unquote(value) for name, value in match.groupdict(default="").items()}
                if "repo" in values:
                    values["repo"] = self.readable_repo(values["repo"], request)
                return function(self, request, **values)
        if re.match(r"/api/models/[^/]+(/(revision|tree|refs|commits?|preupload)/|$)|/[^/]+/resolve/", request.path):
            self.readable_repo("", request)  # a name without owner: no such repository
        raise HubError(404, "Sorry, we can't find the page you are looking for.")


ROUTES: list[tuple[str, str, re.Pattern[str], Callable[..., Response]]] = []


def route(method: str, pattern: str, role: str = "hub") -> Callable[[Callable[..., Response]], Callable[..., Response]]:
    """Register a route: {repo} is two segments, {path} is the rest, any other {name} is one segment."""
    names = {"repo": "[^/]+/[^/]+", "path": ".+"}
    regex = re.compile(re.sub(r"\{(\w+)\}", lambda m: f"(?P<{m[1]}>{names.get(m[1], '[^/]+')})", pattern))

    def register(function: Callable[..., Response]) -> Callable[..., Response]:
        ROUTES.append((role, method, regex, function))
        return function

    return register


# ---------------------------------------------------------------------- account, model card, repositories
@route("GET", "/api/whoami-v2")
def whoami(hub: LoopbackHub, request: Request) -> Response:
    if request.who is None:
        raise HubError(401, "Invalid username or password.")
    user = request.user
    orgs = [{"type": "org", "name": o, "fullname": o, "roleInOrg": m[user]} for o, m in hub.orgs.items() if user in m]
    token = {"displayName": "test", "role": request.who["role"], "createdAt": timestamp()}
    account = {"type": "user", "id": user, "name": user, "fullname": user.title(), "email": f"{user}@example.org"}
    return as_json(account | {"orgs": orgs, "auth": {"type": "access_token", "accessToken": token}})


@route("POST", "/api/validate-yaml")
def validate_yaml(hub: LoopbackHub, request: Request) -> Response:
    match = CARD.match(request.json().get("content") or "")
    errors, warnings = [], []
    try:
        data = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError as error:
        data, errors = {}, [f"YAML Metadata Error: {error}"]
    if not data and not errors:
        warnings.append("empty or missing yaml metadata in repo card")
    data = data or {}
    if not isinstance(data, dict):
        data, errors = {}, ["YAML Metadata Error: metadata must be an object"]
    tags, licenses, models = data.get("tags") or [], as_list(data.get("license")), as_list(data.get("base_model"))
    if not (isinstance(tags, list) and all(isinstance(tag, str) for tag in tags)):
        errors.append('"tags" must be an array of strings')
    if not isinstance(data.get("library_name", ""), str):
        errors.append('"library_name" must be a string')
    errors += [f'"license" must be one of the Hub\'s, not {x!r}' for x in licenses if x not in LICENSES.split()]
    errors += [f'"base_model": {x!r} is no model id' for x in models if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(x))]
    for i, entry in enumerate(as_list(data.get("model-index"))):
        for key, kind in (("name", str), ("results", list)):
            if not isinstance(entry, dict) or not isinstance(entry.get(key), kind):
                errors.append(f'"model-index[{i}].{key}" is required')
    answer = {"errors": [{"message": e} for e in errors], "warnings": [{"message": w} for w in warnings]}
    return as_json(answer, 400 if errors else 200)


@route("POST", "/api/repos/create")
def create_repo(hub: LoopbackHub, request: Request) -> Response:
    wish = request.json()
    owner, name = wish.get("organization") or request.user, wish.get("name") or ""
    repo_id = f"{owner}/{name}"
    if wish.get("type", "model") not in ("model", "dataset") or not (NAME.fullmatch(owner) and NAME.fullmatch(name)):
        raise HubError(400, f"Invalid repo name or type: {repo_id}")
    hub.check_write(owner, request)
    url = f"{request.base}/{repo_id}"
    if repo_id in hub.repos:
        raise HubError(409, f"You already created this model repo: {repo_id}", url=url)
    private = wish.get("visibility") == "private" or bool(wish.get("private"))
    repo = hub.repos[repo_id] = Repo(repo_id, private=private, resource_group=wish.get("resourceGroupId"))
    attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES.split()).encode()
    tree = {".gitattributes": Entry(hub.store("blob", attributes), len(attributes))}
    repo.refs["refs/heads/main"] = hub.commit(
        repo, tree, parent=None, author=request.user, title="initial commit", message=""
    ).id
    return as_json({"url": url, "name": repo_id})


@route("DELETE", "/api/repos/delete")
def delete_repo(hub: LoopbackHub, request: Request) -> Response:
    wish = request.json()
    repo = hub.readable_repo(f"{wish.get('organization') or request.user}/{wish.get('name')}", request)
    hub.check_write(repo.owner, request)
    del hub.repos[repo.id]
    return Response()


@route("PUT", "/api/models/{repo}/settings")
def settings(hub: LoopbackHub, request: Request, repo: Repo) -> Response:
    hub.check_write(repo.owner, request)
    wish = request.json()
    repo.gated = wish.get("gated", repo.gated)
    if "visibility" in wish or "private" in wish:
        repo.private = wish.get("visibility") == "private" or bool(wish.get("private"))
    return as_json({"private": repo.private, "gated": repo.gated})


@route("GET", "/api/models/{repo}/auth-check(/(?P<write>write))?")
def auth_check(hub: LoopbackHub, request: Request, repo: Repo, write: str) -> Response:
    hub.check_gate(repo, request)
    if write:
        hub.check_write(repo.owner, request)
    return as_json({})


# ---------------------------------------------------------------------- collections
def collection_json(collection: Collection) -> Json:
    return {
        "slug": collection.slug, "title": collection.title, "owner": {"name": collection.owner, "type": "user"},
        "items": collection.items, "lastUpdated": collection.updated, "position": 0, "private": collection.private,
        "theme": "orange", "upvotes": 0, "gating": False, "shareUrl": f"https://hf.co/collections/{collection.slug}",
    }  # fmt: skip


def find_collection(hub: LoopbackHub, request: Request, slug: str) -> Collection:
    """The collection; a private one exists for its owner only."""
    found = hub.collections.get(slug)
    if found is None or (found.private and not hub.may_write(found.owner, request.who)):
        raise HubError(404, "Collection not found")
    return found


@route("POST", "/api/collections")
def create_collection(hub: LoopbackHub, request: Request) -> Response:
    wish = request.json()
    owner, title = wish.get("namespace") or request.user, wish.get("title") or ""
    hub.check_write(owner, request)
    if not title:
        raise HubError(400, '"title" is required')
    for other in hub.collections.values():
        if (other.owner, other.title) == (owner, title):
            raise HubError(409, "You already have a collection with this title", slug=other.slug)
    slug = f"{owner}/{re.sub('[^a-z0-9]+', '-', title.lower()).strip('-')}-{secrets.token_hex(12)}"
    hub.collections[slug] = Collection(slug, title, owner, bool(wish.get("private")))
    return as_json(collection_json(hub.collections[slug]))


@route("GET", "/api/collections/{owner}/{name}")
def get_collection(hub: LoopbackHub, request: Request, owner: str, name: str) -> Response:
    return as_json(collection_json(find_collection(hub, request, f"{owner}/{name}")))


@route("POST", "/api/collections/{owner}/{name}/items")
def add_collection_item(hub: LoopbackHub, request: Request, owner: str, name: str) -> Response:
    collection = find_collection(hub, request, f"{owner}/{name}")
    hub.check_write(collection.owner, request)
    wish = request.json()
    item = wish["item"]
    hub.readable_repo(item["id"], request)
    if any((known["id"], known["type"]) == (item["id"], item["type"]) for known in collection.items):
        raise HubError(409, "Item already exists in collection")
    note = {"note": {"text": wish["note"], "html": wish["note"]}} if wish.get("note") else {}
    added = {"_id": secrets.token_hex(12), "id": item["id"], "type": item["type"], "position": len(collection.items)}
    collection.items.append(added | note)
    return as_json(collection_json(collection))


# ---------------------------------------------------------------------- what is there
def as_list(value: Any) -> list[Any]:
    """Card fields hold one value or several."""
    return value if isinstance(value, list) else [] if value is None else [value]


def describe(hub: LoopbackHub, repo: Repo, commit: Commit, *, blobs: bool = False) -> Json:
    """All the Hub tells about a model; the callers leave parts out. Tags as the Hub derives them from the card."""
    card = hub.card(commit)
    siblings: list[Json] = []
    for path, entry in sorted(commit.tree.items()):
        details: Json = {"size": entry.size, "blobId": entry.oid}
        if entry.sha256:
            details["lfs"] = {"sha256": entry.sha256, "size": entry.size, "pointerSize": entry.pointer_size}
        siblings.append({"rfilename": path} | (details if blobs else {}))
    tags = [*as_list(card.get("library_name")), *as_list(card.get("tags")), *as_list(card.get("pipeline_tag"))]
    tags += ["safetensors"] if any(path.endswith(".safetensors") for path in commit.tree) else []
    tags += as_list(card.get("language"))
    for prefix, key in (("dataset", "datasets"), ("base_model", "base_model"), ("license", "license")):
        tags += [f"{prefix}:{value}" for value in as_list(card.get(key))]
    info = {
        "_id": git_sha("repo", repo.id.encode()), "id": repo.id, "modelId": repo.id, "author": repo.owner,
        "sha": commit.id, "lastModified": commit.date, "createdAt": repo.created, "private": repo.private,
        "gated": repo.gated, "disabled": False, "downloads": 0, "likes": 0, "cardData": card or None,
        "tags": [*dict.fromkeys(map(str, tags)), "region:us"], "siblings": siblings,
        "usedStorage": sum(entry.size for entry in commit.tree.values()),
    }  # fmt: skip
    return info | {key: card[key] for key in ("library_name", "pipeline_tag") if card.get(key)}


def paged(hub: LoopbackHub, request: Request, rows: list[Json], limit: int) -> Response:
    """One page; the next one is found only through the Link header."""
    limit, start = max(1, min(limit, hub.page_size)), int(request.get("cursor") or 0)
    link = {}
    if start + limit < len(rows):
        query = urlencode(request.query | {"cursor": [str(start + limit)]}, doseq=True)
        link["Link"] = f'<{request.base}{request.path}?{query}>; rel="next"'
    return as_json(rows[start : start + limit], headers=link)


@route("GET", "/api/models")
def list_models(hub: LoopbackHub, request: Request) -> Response:
    filters = {name for value in request.query.get("filter", []) for name in value.split(",") if name}
    filters |= set(request.query.get("pipeline_tag", []))
    author, search = request.get("author"), (request.get("search") or "").lower()
    newest_first = reversed(hub.repos.values())  # also among those made within one millisecond
    rows = [describe(hub, repo, repo.at("main")) for repo in newest_first if hub.may_read(repo, request.who)]
    rows = [
        row for row in rows
        if author in (None, row["author"]) and search in row["id"].lower() and filters <= set(row["tags"])
    ]  # fmt: skip
    rows.sort(key=lambda row: row.get(request.get("sort") or "createdAt") or 0, reverse=True)
    keep = {"_id", "id", "likes", "private", "downloads", "tags", "pipeline_tag", "library_name", "createdAt"}
    if truthy(request.get("full")):
        keep |= {"author", "sha", "lastModified", "gated", "disabled", "siblings"}
    if truthy(request.get("cardData")):
        keep.add("cardData")
    keep = {"_id", "id", *request.query["expand"]} if "expand" in request.query else keep
    rows = [{key: value for key, value in row.items() if key in keep} for row in rows]
    return paged(hub, request, rows, int(request.get("limit") or hub.page_size))


@route("GET", "/api/models/{repo}(/revision/{rev})?")
def repo_info(hub: LoopbackHub, request: Request, repo: Repo, rev: str) -> Response:
    info = describe(hub, repo, repo.at(rev or "main"), blobs=truthy(request.get("blobs")))
    expand = request.query.get("expand")
    return as_json({k: v for k, v in info.items() if k in {"_id", "id", *expand}} if expand else info)


def tree_item(commit: Commit, path: str) -> Json:
    """A file or a folder as `tree` and `paths-info` show it."""
    entry = commit.tree.get(path)
    if entry is None:
        inside = [f"{p} {e.oid}" for p, e in sorted(commit.tree.items()) if p.startswith(f"{path}/")]
        return {"type": "directory", "oid": git_sha("tree", "\n".join(inside).encode()), "size": 0, "path": path}
    lfs = {"oid": entry.sha256, "size": entry.size, "pointerSize": entry.pointer_size}
    item = {"type": "file", "oid": entry.oid, "size": entry.size, "path": path}
    return item | ({"lfs": lfs} if entry.sha256 else {})


@route("GET", "/api/models/{repo}/tree/{rev}(/{path})?")
def tree(hub: LoopbackHub, request: Request, repo: Repo, rev: str, path: str) -> Response:
    commit = repo.at(rev)
    folders = commit.folders()
    if path and path not in folders:
        raise HubError(404, f"{path} does not exist on {rev}", "EntryNotFound", {"X-Repo-Commit": commit.id})
    below = f"{path}/" if path else ""
    rows = [
        tree_item(commit, p) for p in sorted({*commit.tree, *folders})
        if p.startswith(below) and (truthy(request.get("recursive")) or "/" not in p.removeprefix(below))
    ]  # fmt: skip
    return paged(hub, request, rows, hub.page_size)


@route("POST", "/api/models/{repo}/paths-info/{rev}")
def paths_info(hub: LoopbackHub, request: Request, repo: Repo, rev: str) -> Response:
    form, commit = parse_qs(request.body.decode()), repo.at(rev)
    known = {*commit.tree, *commit.folders()}
    items = [tree_item(commit, p) for p in form.get("paths", []) if p in known]
    if truthy(form.get("expand", [""])[0]):
        items = [item | {"lastCommit": last_change(repo, commit, item["path"])} for item in items]
    return as_json(items)


def last_change(repo: Repo, commit: Commit, path: str) -> Json:
    """The last commit that changed a file or something in a folder."""

    def content(at: Commit) -> list[Entry]:
        return [entry for name, entry in sorted(at.tree.items()) if name == path or name.startswith(f"{path}/")]

    for at in repo.history(commit):
        if at.parent is None or content(repo.commits[at.parent]) != content(at):
            return {"id": at.id, "title": at.title, "date": at.date}
    raise AssertionError("unreachable: the first commit has no parent")


@route("GET", "/api/models/{repo}/commits/{rev}")
def commits(hub: LoopbackHub, request: Request, repo: Repo, rev: str) -> Response:
    rows = [
        {"id": c.id, "title": c.title, "message": c.message, "date": c.date, "authors": [{"user": c.author}]}
        for c in repo.history(repo.at(rev))
    ]
    return paged(hub, request, rows, int(request.get("limit") or 50))


@route("GET", "/api/models/{repo}/refs")
def list_refs(hub: LoopbackHub, request: Request, repo: Repo) -> Response:
    def under(prefix: str) -> list[Json]:
        found = {name: oid for name, oid in sorted(repo.refs.items()) if name.startswith(prefix)}
        return [{"name": name.removeprefix(prefix), "ref": name, "targetCommit": oid} for name, oid in found.items()]

    refs = {"branches": under("refs/heads/"), "tags": under("refs/tags/"), "converts": []}
    return as_json(refs | ({"pullRequests": under("refs/pr/")} if truthy(request.get("include_prs")) else {}))


# ---------------------------------------------------------------------- branches and tags
def make_ref(hub: LoopbackHub, request: Request, repo: Repo, prefix: str, name: str, start: str) -> Response:
    hub.check_write(repo.owner, request)
    commit = repo.at(start)
    if BAD_REFERENCE.search(name):
        raise HubError(400, f"Invalid reference: {name}")
    if prefix + name in repo.refs:
        raise HubError(409, f"Reference {prefix}{name} already exists")
    repo.refs[prefix + name] = commit.id
    return as_json({})


@route("POST", "/api/models/{repo}/branch/{name}")
def create_branch(hub: LoopbackHub, request: Request, repo: Repo, name: str) -> Response:
    return make_ref(hub, request, repo, "refs/heads/", name, request.json().get("startingPoint") or "main")


@route("POST", "/api/models/{repo}/tag/{rev}")
def create_tag(hub: LoopbackHub, request: Request, repo: Repo, rev: str) -> Response:
    return make_ref(hub, request, repo, "refs/tags/", request.json().get("tag") or "", rev)


@route("DELETE", "/api/models/{repo}/(?P<kind>branch|tag)/{name}")
def delete_ref(hub: LoopbackHub, request: Request, repo: Repo, kind: str, name: str) -> Response:
    hub.check_write(repo.owner, request)
    ref = f"refs/{'heads' if kind == 'branch' else 'tags'}/{name}"
    if ref == "refs/heads/main":
        raise HubError(403, "Cannot delete refs/heads/main")
    if repo.refs.pop(ref, None) is None:
        raise HubError(404, f"Invalid rev id: {ref}", "RevisionNotFound")
    return as_json({})


# ---------------------------------------------------------------------- upload
@route("POST", "/api/models/{repo}/preupload/{rev}")
def preupload(hub: LoopbackHub, request: Request, repo: Repo, rev: str) -> Response:
    hub.check_write(repo.owner, request, pull_request=truthy(request.get("create_pr")) or rev.startswith("refs/pr/"))
    commit, files = repo.at(rev), []
    for file in request.json()["files"]:
        binary = b"\0" in base64.b64decode(file.get("sample") or "")
        lfs = file["path"].endswith(tuple(LFS_SUFFIXES.split())) or file["size"] >= LARGEST_REGULAR_FILE or binary
        old = commit.tree.get(file["path"])
        files.append({"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False})
        if old:  # lets the client leave out what has not changed
            files[-1]["oid"] = old.sha256 or old.oid
    return as_json({"files": files, "commitOid": commit.id})


@route("POST", r"/{repo}\.git/info/lfs/objects/batch")
def lfs_batch(hub: LoopbackHub, request: Request, repo: Repo) -> Response:
    hub.check_write(repo.owner, request, pull_request=True)
    objects = []
    for wanted in request.json()["objects"]:
        answer: Json = {"oid": wanted["oid"], "size": wanted["size"], "authenticated": True}
        objects.append(answer)
        if wanted["oid"] in repo.lfs:
            continue  # no actions: it is already there
        key = secrets.token_hex(12)
        hub.uploads[key] = Upload(repo, wanted["oid"], wanted["size"])
        upload = {"href": f"{hub.cdn_endpoint}/upload/{key}", "header": {}}
        verify = {"href": f"{request.base}/{repo.id}.git/info/lfs/objects/verify", "header": {}}
        answer["actions"] = {"upload": upload, "verify": verify}
    answers = {"transfer": "basic", "objects": objects}
    return as_json(answers, headers={"Content-Type": "application/vnd.git-lfs+json"})


@route("PUT", "/upload/{key}", role="cdn")
def lfs_put(hub: LoopbackHub, request: Request, key: str) -> Response:
    if key not in hub.uploads:
        raise HubError(403, "AccessDenied")
    hub.store_lfs(hub.uploads[key], request.body)
    return Response()


@route("POST", r"/{repo}\.git/info/lfs/objects/verify")
def lfs_verify(hub: LoopbackHub, request: Request, repo: Repo) -> Response:
    hub.check_write(repo.owner, request, pull_request=True)
    wish = request.json()
    if repo.lfs.get(wish["oid"], -1) != wish["size"]:
        raise HubError(404, "LFS object not found")
    return as_json({})


def check_path(path: str) -> None:
    """422 for paths the Hub refuses. It accepts back-slashes inside ("a/..\\b"): clients must defend themselves."""
    segments = path.split("/")
    if path.startswith(("..\\", "\\")) or "\0" in path or any(s.lower() in ("", ".", "..", ".git") for s in segments):
        raise HubError(422, f"Invalid path in repo: {path!r}")


def apply_operation(hub: LoopbackHub, repo: Repo, tree: dict[str, Entry], key: str, value: Json) -> None:
    """One line of a commit."""
    path = str(value.get("path") or "").removesuffix("/" if key == "deletedFolder" else "")
    check_path(path)
    inside = [p for p in tree if p.startswith(f"{path}/")]
    if key in ("deletedFile", "deletedFolder"):
        gone = [path] if key == "deletedFile" and path in tree else inside
        if not gone:
            raise HubError(404, f"A {key[7:].lower()} with this name doesn't exist", "EntryNotFound")
        for p in gone:
            del tree[p]
        return
    if inside or any(parent.as_posix() in tree for parent in Path(path).parents):
        raise HubError(422, f"Path {path} conflicts with an existing file or folder")
    if key == "file":
        try:
            data = base64.b64decode(value["content"], validate=True)
        except (binascii.Error, KeyError) as error:
            raise HubError(400, f"Invalid content for {path}") from error
        if len(data) > LARGEST_REGULAR_FILE:
            raise HubError(400, f"Your push was rejected because it contains files larger than 10 MiB: {path}")
        tree[path] = Entry(hub.store("blob", data), len(data))
    elif key == "lfsFile":
        size = repo.lfs.get(value.get("oid", ""))  # of this repository: knowing a sha256 gives no access to its content
        if size is None or value.get("size", size) != size:
            raise HubError(400, f"Your push was rejected: an LFS pointer pointed to a file that does not exist: {path}")
        tree[path] = Entry.lfs(value["oid"], size)
    else:
        raise HubError(400, f"Unknown operation {key!r}")


@route("POST", "/api/models/{repo}/commit/{rev}")
def commit(hub: LoopbackHub, request: Request, repo: Repo, rev: str) -> Response:
    create_pr = truthy(request.get("create_pr"))
    hub.check_write(repo.owner, request, pull_request=create_pr or rev.startswith("refs/pr/"))
    try:
        lines = [json.loads(line) for line in request.body.splitlines() if line.strip()]
    except ValueError as error:
        raise HubError(400, "Invalid NDJSON") from error
    header = next((line["value"] for line in lines if line["key"] == "header"), {})
    if not header.get("summary"):
        raise HubError(400, '"summary" is required')
    ref = repo.writable_ref(rev)
    head = repo.commits[repo.refs[ref]]
    if ref.startswith("refs/pr/"):
        discussion = repo.discussion(ref.removeprefix("refs/pr/"))
        if discussion.author != request.user and not hub.may_write(repo.owner, request.who):
            raise HubError(403, "Forbidden: you are not the author of this pull request")
    parent = (header.get("parentCommit") or "").lower()
    if parent and create_pr:
        head = repo.at(parent)
    elif not head.id.startswith(parent):
        raise HubError(412, "The branch was updated since you opened this page. Please refresh and try again.")
    files = dict(head.tree)
    for line in lines:
        if line["key"] != "header":
            apply_operation(hub, repo, files, line["key"], line["value"])
    description = header.get("description") or ""
    fields = {"parent": head.id, "author": request.user, "title": header["summary"], "message": description}
    new = hub.commit(repo, files, **fields)
    url = f"{request.base}/{repo.id}"
    answer = {"success": True, "commitOid": new.id, "commitUrl": f"{url}/commit/{new.id}", "hookOutput": ""}
    if create_pr:
        number = len(repo.discussions) + 1
        repo.discussions.append(Discussion(number, header["summary"], description, request.user, base=ref))
        ref, answer["pullRequestUrl"] = f"refs/pr/{number}", f"{url}/discussions/{number}"
    repo.refs[ref] = new.id
    return as_json(answer)


# ---------------------------------------------------------------------- pull requests
def discussion_json(repo: Repo, d: Discussion) -> Json:
    author = {"name": d.author, "type": "user"}
    data = {"edited": False, "hidden": False, "latest": {"raw": d.description}}
    event = {"id": f"{d.num:024x}", "type": "comment", "createdAt": d.created, "author": author, "data": data}
    return {
        "num": d.num, "title": d.title, "status": "open", "author": author, "createdAt": d.created,
        "isPullRequest": True, "repo": {"name": repo.id, "type": "model"}, "filesWithConflicts": [], "diff": "",
        "events": [event],
        "changes": {"base": d.base, "mergeCommitId": None},
    }  # fmt: skip


@route("GET", "/api/models/{repo}/discussions/{num}")
def get_discussion(hub: LoopbackHub, request: Request, repo: Repo, num: str) -> Response:
    return as_json(discussion_json(repo, repo.discussion(num)))


# ---------------------------------------------------------------------- download
def ranged(request: Request, data: bytes, headers: dict[str, str]) -> Response:
    """The whole of data, or the range asked for (206), or 416."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("range", ""))
    headers = {"Accept-Ranges": "bytes", **headers}
    if not match or not any(match.groups()):
        return Response(200, data, headers)
    size = len(data)
    start = int(match[1]) if match[1] else max(0, size - int(match[2]))
    stop = min(size, int(match[2]) + 1) if match[1] and match[2] else size
    if start >= stop:
        return Response(416, b"", {**headers, "Content-Range": f"bytes */{size}"})
    return Response(206, data[start:stop], {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{size}"})


@route("GET", "/{repo}/resolve/{rev}/{path}")
@route("GET", "/api/(?P<cached>resolve-cache)/models/{repo}/{rev}/{path}")
def resolve(hub: LoopbackHub, request: Request, repo: Repo, rev: str, path: str, cached: str = "") -> Response:
    """LFS files are a redirect to the CDN; regular ones a relative one to the resolve cache, which has the bytes."""
    hub.check_gate(repo, request)
    commit = repo.at(rev)
    headers = {"X-Repo-Commit": commit.id, "Content-Type": "text/plain; charset=utf-8"}
    entry = commit.tree.get(path)
    if entry is None:
        raise HubError(404, "Entry not found", "EntryNotFound", headers={"X-Repo-Commit": commit.id})
    linked = {"X-Linked-Etag": f'"{entry.sha256 or entry.oid}"', "X-Linked-Size": str(entry.size)}
    if entry.sha256:
        location = f"{hub.cdn_endpoint}/lfs/{entry.sha256}?{hub.sign(entry.sha256)}"
        return Response(302, f"Found. Redirecting to {location}".encode(), {**headers, **linked, "Location": location})
    if not cached:
        location = f"/api/resolve-cache/models/{repo.id}/{commit.id}/{quote(path)}"
        return Response(307, f"Temporary Redirect to {location}".encode(), {**headers, **linked, "Location": location})
    return ranged(request, hub.read(entry), {**headers, "ETag": f'"{entry.oid}"'})


@route("GET", "/lfs/{oid}", role="cdn")
def lfs_get(hub: LoopbackHub, request: Request, oid: str) -> Response:
    if "authorization" in request.headers:  # what S3 answers: the client must drop the token when it leaves the Hub
        raise HubError(400, "Only one auth mechanism allowed")
    if f"X-Amz-Signature={request.get('X-Amz-Signature')}" != hub.sign(oid):
        raise HubError(403, "AccessDenied: Request has expired or signature does not match")
    headers = {"ETag": f'"{oid[:32]}"', "Content-Type": "application/octet-stream"}
    return ranged(request, (hub.root / "lfs" / oid).read_bytes(), headers)


# ---------------------------------------------------------------------- HTTP
class _Server(ThreadingHTTPServer):
    """A listening socket with a thread per connection; knows its connections so that they can be ended."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, hub: LoopbackHub, role: str, host: str) -> None:
        self.hub, self.role = hub, role
        self.connections: set[socket.socket] = set()
        super().__init__((host, 0), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def disconnect_clients(self) -> None:
        for connection in list(self.connections):
            hang_up(connection)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # a client that goes away is no news; a bug is
            super().handle_error(request, client_address)


def hang_up(connection: socket.socket, *, reset: bool = False) -> None:
    """End a connection: FIN, or RST (bytes already sent are lost unless the client has read them)."""
    try:
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(connection.detach())
        else:
            connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # the client was faster


class _Handler(BaseHTTPRequestHandler):
    """Reads a request, logs it, applies the faults, sends the answer."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = 60
    server: _Server

    def log_message(self, *_: object) -> None:
        """Nothing on stderr: `hub.requests()` is the log."""

    def read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        pieces = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def handle_request(self) -> None:
        hub, role = self.server.hub, self.server.role
        rules = hub.matching_faults(role, self.command, self.path)
        self.fault: Json = next((r for r in rules if r["action"] not in ("delay", "header", "call")), {})
        self.header_faults = [r for r in rules if r["action"] == "header"]
        # logged on arrival, with the status filled in before the first byte goes out: who has the answer sees the entry
        self.entry: Json = {
            "role": role, "method": self.command, "target": self.path, "status": 0, "sent": 0, "user": None, "ms": None,
            "range": self.headers.get("Range"), "ua": self.headers.get("User-Agent"), "fault": self.fault.get("action"),
            "auth": "Authorization" in self.headers, "download_counter": self.headers.get("X-HF-Download-Counter"),
        }  # fmt: skip
        with hub.lock:
            hub.log.append(self.entry)
        start = time.monotonic()
        for rule in rules:
            if rule["action"] == "delay":
                time.sleep(rule.get("seconds", 1))
        try:
            body = self.read_body()
            for rule in rules:
                if rule["action"] == "call":
                    rule["function"]()
            self.send(self.respond(body))
        except HungUp:
            self.close_connection = True
        finally:
            self.entry["ms"] = round((time.monotonic() - start) * 1000, 1)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    def respond(self, body: bytes) -> Response:
        """The answer, or the fault that comes instead of it."""
        action = self.fault.get("action")
        if action == "close" or (action == "reset" and not self.fault.get("after_bytes")):
            self.end_connection(reset=action == "reset")
        if action == "status":
            text = self.fault.get("body", {"error": f"injected {self.fault['status']}"})
            return Response(
                self.fault["status"], (text if isinstance(text, str) else json.dumps(text)).encode(),
                {"Content-Type": "application/json", **self.fault.get("headers", {})},
            )  # fmt: skip
        url = urlsplit(self.path)
        query = parse_qs(url.query, keep_blank_values=True)
        headers = {name.lower(): value for name, value in self.headers.items()}
        if action == "ignore_range":
            headers.pop("range", None)
        # URLs in answers repeat the client's name for us: RepoUrl refuses a url on another endpoint
        request = Request(self.command, url.path, query, headers, body, f"http://{headers['host']}")
        try:
            with self.server.hub.lock:
                return self.server.hub.answer(self.server.role, request)
        except HubError as error:
            return error.response
        finally:
            self.entry["user"] = (request.who or {}).get("user")

    def send(self, response: Response) -> None:
        """Send the answer with the faults that change it."""
        action, body = self.fault.get("action"), response.body
        if action == "lost_response":
            self.end_connection(reset=self.fault.get("rst", False))
        if action == "truncate":
            body = body[: self.fault.get("keep_bytes", len(body) // 2)]
        offset = self.fault.get("offset", len(body) // 2)
        if action == "corrupt" and offset < len(body):
            body = body[:offset] + bytes([body[offset] ^ 0xFF]) + body[offset + 1 :]
        headers = {"X-Request-Id": secrets.token_hex(8), "Content-Length": str(len(body)), **response.headers}
        for rule in self.header_faults:
            unwanted = {name.lower() for name in rule.get("remove", [])}
            headers = {k: v for k, v in headers.items() if k.lower() not in unwanted} | rule.get("set", {})
        self.entry["status"] = response.status
        self.send_response(response.status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if action in ("drop", "reset", "stall"):
            keep = self.fault.get("after_bytes", len(body) // 2)
            self.write(body[:keep])
            if action != "stall":
                self.end_connection(reset=action == "reset")
            time.sleep(self.fault.get("seconds", 30))
            body = body[keep:]
        self.write(body)

    def write(self, data: bytes) -> None:
        self.wfile.write(data)
        self.entry["sent"] += len(data)

    def end_connection(self, *, reset: bool) -> None:
        if reset:
            time.sleep(0.05)  # RST overtakes what the client has not read yet
        hang_up(self.connection, reset=reset)
        raise HungUp
