"""A prior on disk, format 1.0.

    prior_config.json              the configuration, with the sha256 of every weight file
    prior.safetensors              or prior-00001-of-0000N.safetensors + prior.safetensors.index.json
    README.md                      the model card

Keys in the weight files, split at the first dot:

    mean.<param>        (*shape)       variance.<param>    (*shape)
    deviations.<param>  (K, *shape)    buffer.<name>       (*shape)

Rows of the deviations: the most recent snapshot first (the leading principal direction first, where estimator.deviations says
"principal directions"), so that the first k rows are the prior of rank k.

Writing is atomic for whoever reads through this module. The new files are written into a staging folder inside the
target, the configuration last; one rename of that folder to `.prior-commit` makes the new prior current; only then are
the files moved to their places. A reader that finds `.prior-commit` reads there. A process killed at any point leaves
the old prior or the new one, never a mixture; the next save tidies up. Other files in the folder are not touched.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors import safe_open as _safe_open
from torch import Tensor

from prior_hub.errors import PriorFormatError, PriorHubError, PriorNotFoundError, PriorNumericsError
from prior_hub.priors.config import (
    CONFIG_NAME,
    MAX_CONFIG_BYTES,
    PriorConfig,
    check_weight_file_name,
    parse_json,
)
from prior_hub.priors.tensor_files import (
    Entry,
    Limits,
    Spec,
    not_finite,
    open_regular,
    progress,
    read_header,
    side_by_side,
    spec_of,
    verify_file,
    write_file,
)

_fcntl: ModuleType | None
try:
    import fcntl as _fcntl
except ImportError:  # Windows has no flock: two processes saving into one folder at a time are not told apart there
    _fcntl = None

_WINDOWS = os.name == "nt"

__all__ = [
    "CARD_NAME",
    "INDEX_NAME",
    "Cut",
    "StoredPrior",
    "file_sha256",
    "leads_out",
    "open_tensors",
    "parse_size",
    "prior_files",
    "read_bounded",
    "read_config",
    "read_prior",
    "save_tensors",
    "sync",
    "write_prior",
]

WEIGHTS_NAME = "prior.safetensors"
INDEX_NAME = "prior.safetensors.index.json"
CARD_NAME = "README.md"
COMMIT_NAME = ".prior-commit"
_STAGING = ".prior-staging-"
_TRASH = ".prior-trash-"
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_KINDS = ("mean", "variance", "deviations")
_METADATA = {"format": "pt"}  # as every file that safetensors writes for torch
_READ_TRIES = 20  # saves that may come in between while one prior is read; then they have to wait
_SPARSE_FROM = 10**9  # bytes; what is smaller is read in a second or two, holes and all
_LARGEST = 3.4e38  # that float32 can hold
_MOST_FILES = 8  # files verified at a time; each needs two buffers of 8 MiB
_T = TypeVar("_T")

Cut = Callable[[str, str, Tensor], Tensor]
"""(kind, name, mapped tensor) -> the part of it that a process wants."""


@dataclass(frozen=True)
class StoredPrior:
    """What `read_prior` found: the configuration and memory-mapped tensors."""

    config: PriorConfig
    mean: dict[str, Tensor]
    variance: dict[str, Tensor]
    deviations: dict[str, Tensor]
    buffers: dict[str, Tensor]


# ------------------------------------------------------------------------------------------------------------- writing


def write_prior(
    folder: str | os.PathLike[str],
    config: PriorConfig,
    tensors: Mapping[str, Tensor],
    *,
    max_shard_size: int | str = "5GB",
    extra_files: Mapping[str, str] | None = None,
) -> PriorConfig:
    """Write a prior atomically; returns the configuration as written, with the hash of every weight file.

    One tensor is read at a time, and checked, hashed and written in one pass over it; nothing is held twice.

    Args:
        folder: created if missing; other files in it stay.
        config: its `weight_files` is filled in here.
        tensors: storage key ("mean.<param>", ...) -> tensor, on any device. It may be a mapping that makes a tensor when it is
            asked for: each is asked for once, in no particular order, and let go of before the next, so that a prior larger
            than memory can be written. Its shape and type are those of `config`.
        max_shard_size: bytes, or a text such as "5GB"; a single larger tensor makes a shard of its own.
        extra_files: file name -> text, committed together with the prior (the model card).

    Raises:
        PriorFormatError: the tensors are not those the configuration declares.
        PriorNumericsError: a value is NaN or infinite.
        OSError: the disk is full or not writable.
        After any of them the folder is as it was: with the old prior, or not there.
    """
    folder = Path(folder)
    keys = tuple(tensors)
    known: Mapping[str, Tensor] = tensors  # what there is already
    if not isinstance(tensors, dict):
        known = {key: tensors[key] for key in keys if key.startswith("buffer.")}
    layout = _declared(config, keys, known)
    config.to_json()  # refuses what JSON cannot hold before gigabytes are written
    shards = _plan_shards(layout, parse_size(max_shard_size))
    total = sum(spec.nbytes for spec in layout.values())
    with _exclusive(folder):
        _tidy(folder)
        staging = folder / f"{_STAGING}{secrets.token_hex(4)}"
        staging.mkdir()
        try:
            hashes = {}
            with progress(total, f"Writing {folder.name}") as advance:
                for name, inside in shards.items():
                    hashes[name] = write_file(
                        staging / name,
                        {key: layout[key] for key in inside},
                        lambda key: known[key] if key in known else tensors[key],
                        metadata=_METADATA,
                        finite=True,
                        advance=advance,
                    )
            if len(shards) > 1:
                index = {
                    "metadata": {"total_size": total},
                    "weight_map": {key: name for name, inside in shards.items() for key in inside},
                }
                (staging / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
            for name, text in (extra_files or {}).items():
                (staging / name).write_text(text, encoding="utf-8")
            written = config.replace(weight_files=hashes)
            (staging / CONFIG_NAME).write_text(written.to_json(), encoding="utf-8")
            for path in staging.iterdir():
                sync(path)
            sync(staging)
            staging.rename(folder / COMMIT_NAME)  # from here on the new prior is the current one
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        sync(folder)
        _roll_forward(folder)
    return written


def parse_size(size: int | str) -> int:
    """Bytes in `size`, a number or a text such as "500MB" or "5GB" (powers of ten, as on the Hub; KiB, MiB, GiB: of two)."""
    if isinstance(size, int):
        if size <= 0:
            raise ValueError(f"max_shard_size is {size}, expected a number of bytes > 0.")
        return size
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B\s*", size, re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise ValueError(f"max_shard_size is {size!r}, expected bytes or a text such as '500MB' or '5GB'.")
    power = " KMGT".index(match[2].upper()) if match[2] else 0
    return max(1, int(float(match[1]) * (1024 if match[3] else 1000) ** power))


def _declared(config: PriorConfig, keys: Iterable[str], known: Mapping[str, Tensor]) -> dict[str, Spec]:
    """Key -> type and shape of what is to be written, in its order; of what is not there yet, by the configuration."""
    layout: dict[str, Spec] = {}
    for key in keys:
        kind, _, name = key.partition(".")
        shape = config.parameters.get(name, ()) if kind in _KINDS else ()
        if key in known:
            layout[key] = spec_of(known[key])
        else:
            dtype = getattr(torch, config.dtype.get(kind, "float32"))
            layout[key] = Spec(dtype, (config.rank, *shape) if kind == "deviations" else shape)
    shapes = {key: spec.shape for key, spec in layout.items()}
    dtypes: dict[str, str | None] = {key: str(spec.dtype).removeprefix("torch.") for key, spec in layout.items()}
    _check_layout(config, shapes, dtypes, "the tensors to write")
    return layout


def _check_layout(
    config: PriorConfig, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str | None], where: str
) -> None:
    """Compare keys, shapes and types with what the configuration declares, before anything is allocated."""
    wanted: dict[str, tuple[int, ...]] = {}
    for name, shape in config.parameters.items():
        wanted[f"mean.{name}"] = shape
        wanted[f"variance.{name}"] = shape
        if config.rank:
            wanted[f"deviations.{name}"] = (config.rank, *shape)
    buffers = {f"buffer.{name}" for name in config.buffers}
    missing = sorted((wanted.keys() | buffers) - shapes.keys())
    extra = sorted(shapes.keys() - wanted.keys() - buffers)
    for what, keys in (("lacks", missing), ("has undeclared", extra)):
        if keys:
            raise PriorFormatError(f"{where}: {what} {', '.join(keys[:3])} ({len(keys)} of {len(shapes)} keys).")
    for key, shape in wanted.items():
        if shapes[key] != shape:
            raise PriorFormatError(f"{where}: {key} has shape {list(shapes[key])}, the configuration says {list(shape)}.")
        expected = config.dtype[key.split(".", 1)[0]]
        if dtypes[key] != expected:
            raise PriorFormatError(f"{where}: {key} is stored as {dtypes[key]}, the configuration says {expected}.")


def _plan_shards(layout: Mapping[str, Spec], limit: int) -> dict[str, list[str]]:
    """File name -> keys, filled greedily in order."""
    groups: list[list[str]] = [[]]
    used = 0
    for key, spec in layout.items():
        size = spec.nbytes
        if groups[-1] and used + size > limit:
            groups.append([])
            used = 0
        groups[-1].append(key)
        used += size
    if len(groups) == 1:
        return {WEIGHTS_NAME: groups[0]}
    if len(groups) > 99_999:
        raise ValueError(f"max_shard_size of {limit} bytes would make {len(groups)} files; choose a larger one.")
    return {f"prior-{i:05d}-of-{len(groups):05d}.safetensors": keys for i, keys in enumerate(groups, start=1)}


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> str:
    """Write one safetensors file and return its sha256; tensors of any device and strides, copied in blocks if at all."""
    layout = {key: spec_of(tensor) for key, tensor in tensors.items()}
    return write_file(path, layout, tensors.__getitem__, metadata={**_METADATA, **(metadata or {})})


def _roll_forward(folder: Path) -> None:
    """Move the committed files to their places, the configuration last; `.prior-commit` stays readable till the end."""
    commit = folder / COMMIT_NAME
    names = sorted((p.name for p in commit.iterdir()), key=lambda name: name == CONFIG_NAME)
    for name in names:
        moving = folder / f"{_TRASH}{secrets.token_hex(4)}"
        try:
            os.link(commit / name, moving)
        except OSError:  # a file system without hard links
            shutil.copy2(commit / name, moving)
        moving.replace(folder / name)
    for path in folder.iterdir():
        if path.name not in names and path.name.startswith("prior") and _is_weights_or_index(path.name):
            path.unlink()
    sync(folder)
    trash = folder / f"{_TRASH}{secrets.token_hex(4)}"
    commit.rename(trash)
    shutil.rmtree(trash)


def _is_weights_or_index(name: str) -> bool:
    try:
        check_weight_file_name(name)
    except PriorFormatError:
        return name == INDEX_NAME
    return True


def _tidy(folder: Path) -> None:
    """Finish a committed save that was interrupted and remove what an uncommitted one left (the lock is held)."""
    if (folder / COMMIT_NAME / CONFIG_NAME).is_file() and not (folder / COMMIT_NAME).is_symlink():
        _roll_forward(folder)
    for path in folder.iterdir():
        if path.name.startswith((_STAGING, _TRASH)):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


@contextlib.contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Make the folder, for one saving process at a time; if that one fails, folders made for it are removed again.

    The lock is on the folder itself and ends with the process.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    handle = _lock(folder)
    try:
        yield
    except BaseException:
        for path in missing:
            with contextlib.suppress(OSError):  # somebody else put something into it
                path.rmdir()
        raise
    finally:
        if handle is not None:
            os.close(handle)


def _lock(folder: Path) -> int | None:
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        if _fcntl is None:
            return None
        try:
            handle = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # as below
            continue
        try:
            _fcntl.flock(handle, _fcntl.LOCK_EX)
            if os.path.samestat(os.fstat(handle), folder.stat()):
                return handle
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # the process that held the lock failed, and removed the folder that it had made


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, onto the disk; folders where the system can."""
    if not path.is_dir():
        with path.open("r+b") as file:  # Windows flushes what is open for writing only
            os.fsync(file.fileno())
        return
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:
        if _WINDOWS:  # which opens no folder
            return
        raise
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that know it for files only
            raise
    finally:
        os.close(handle)


def file_sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------------------------------------------------------- reading


def read_config(folder: str | os.PathLike[str]) -> PriorConfig:
    """Read and check `prior_config.json` alone.

    Raises:
        PriorNotFoundError: the folder is missing or holds no prior.
        PriorFormatError: the file is not a prior's configuration.
    """
    folder = Path(folder)

    def read() -> PriorConfig:
        path = _current(folder) / CONFIG_NAME
        return PriorConfig.from_json(read_bounded(path), where=str(path))

    return _undisturbed(folder, read)


def leads_out(path: Path) -> bool:
    """Whether a file is a link to somewhere outside its folder, and not one of the Hub client's cache to its own contents."""
    if not path.is_symlink():
        return False
    folder = path.parent.resolve()
    inside = [folder, *([folder.parent.parent / "blobs"] if folder.parent.name == "snapshots" else [])]
    return not any(Path(os.path.realpath(path)).is_relative_to(root) for root in inside)


def prior_files(folder: str | os.PathLike[str], config: PriorConfig) -> list[Path]:
    """The files that make the prior: configuration, weights, index and card, as far as they are there.

    Raises:
        PriorFormatError: the card is a link to a file elsewhere, which nobody meant to publish. (Weights have their hash, the
            configuration its form; a card may be any text.)
    """
    current = _current(Path(folder))
    if leads_out(current / CARD_NAME):
        raise PriorFormatError(
            f"{current / CARD_NAME} is a link to {os.path.realpath(current / CARD_NAME)}, outside the prior's folder: put "
            "the card itself there."
        )
    names = [CONFIG_NAME, *config.weight_files, INDEX_NAME, CARD_NAME]
    wanted = [current / name for name in names if name != INDEX_NAME or len(config.weight_files) > 1]
    return [path for path in wanted if path.is_file()]


def read_prior(
    folder: str | os.PathLike[str], *, rank: int | None = None, verify: bool = True, cut: Cut | None = None
) -> StoredPrior:
    """Read a prior: names, shapes and types are checked before any tensor is made, values and hashes by default.

    Tensors are memory-mapped: what is not used is never read, and what is used lies once in the system's cache, whichever
    process uses it.

    Args:
        folder: a local folder.
        rank: read only the first `rank` deviations (the most recent snapshots); their weights are the caller's matter.
        verify: also compare every file with its sha256 and refuse NaN and infinities. This reads each byte once, several
            files at a time, and keeps none of them in the memory of the process.
        cut: (kind, name, tensor) -> the part of it that is wanted, for a process that holds a shard; kind is "mean",
            "variance" (*shape) or "deviations" (rank, *shape). The tensor is mapped: slices and chunks of it are views, and
            only the bytes of what is then used or copied are touched. Not asked for buffers.

    Raises:
        PriorNotFoundError: no such folder, or no prior in it.
        PriorFormatError: a file is missing, truncated, altered, or not what the configuration declares.
        PriorNumericsError: NaN or infinities.
    """
    folder = Path(folder)
    return _undisturbed(folder, lambda: _read(folder, rank, verify, cut))


def _undisturbed(folder: Path, read: Callable[[], _T]) -> _T:
    """The result of `read`, again if another process saved a prior meanwhile: it may be a mixture, or an error of one.

    Files are replaced and never written to, so that what was opened once stays what it is.
    """
    for _ in range(_READ_TRIES):
        before = _state(folder)
        try:
            result = read()
        except (PriorHubError, OSError):
            if _state(folder) == before:
                raise
        else:
            if _state(folder) == before:
                return result
    with _saves_waiting(folder) as they_wait:
        if they_wait:
            return read()
    raise PriorHubError(f"{folder} was saved to {_READ_TRIES} times while it was read; wait for the process that does it.")


@contextlib.contextmanager
def _saves_waiting(folder: Path) -> Iterator[bool]:
    """Meanwhile nobody saves into the folder; False where that cannot be had: no locks on this system or file system."""
    if _fcntl is None:
        yield False
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            _fcntl.flock(handle, _fcntl.LOCK_SH)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(handle)


def _state(folder: Path) -> tuple[object, ...]:
    """Changes whenever a save becomes current or is moved to its place."""
    result: list[object] = []
    for path in (folder / COMMIT_NAME, folder / CONFIG_NAME):
        try:
            status = path.stat()
            result.append((status.st_ino, status.st_mtime_ns, status.st_ctime_ns))
        except OSError:
            result.append(None)
    return tuple(result)


def _read(folder: Path, rank: int | None, verify: bool, cut: Cut | None) -> StoredPrior:
    current = _current(folder)
    path = current / CONFIG_NAME
    config = PriorConfig.from_json(read_bounded(path), where=str(path))
    if rank is not None and not 0 <= rank <= config.rank:
        raise ValueError(f"rank {rank} is not between 0 and {config.rank}, the rank of the prior in {folder}.")
    kept = config.rank if rank is None else rank
    files = _weight_files(current, config)
    try:
        groups, where = _map(current, config, files, kept)
    except PriorFormatError:
        if verify and _about_as_declared(config, files):
            _verify(current, config, files, None)  # that the file is another one says more than what is wrong with it
        raise
    if verify:
        rows = kept if kept < config.rank else None
        wanted: dict[str, dict[str, int | None]] = {file: {} for file in files}
        for key, file in where.items():
            if rows != 0 or not key.startswith("deviations."):
                wanted[file][key] = rows if key.startswith("deviations.") else None
        _verify(current, config, files, wanted)
    buffers = {name: groups["buffer"][name] for name in config.buffers}
    if verify:
        _check_running_variances(buffers, current)
    found = {kind: {n: groups[kind][n] for n in config.parameters if n in groups[kind]} for kind in _KINDS}
    if cut is not None:
        found = {kind: {n: cut(kind, n, tensor) for n, tensor in tensors.items()} for kind, tensors in found.items()}
    return StoredPrior(config, found["mean"], found["variance"], found["deviations"], buffers)


def _map(
    current: Path, config: PriorConfig, files: Mapping[str, Path], kept: int
) -> tuple[dict[str, dict[str, Tensor]], dict[str, str]]:
    """Kind -> name -> mapped tensor, and key -> file, after the layout is found to be the declared one."""
    groups: dict[str, dict[str, Tensor]] = {kind: {} for kind in (*_KINDS, "buffer")}
    where = _locate(_headers(config, files), current, config)
    with contextlib.ExitStack() as stack:
        handles = {name: stack.enter_context(open_tensors(path)) for name, path in files.items()}
        if any(where.get(key) != name for name, handle in handles.items() for key in handle.keys()):  # noqa: SIM118 (no mapping)
            raise PriorFormatError(f"{current}: a weight file changed while it was opened.")
        slices = {key: handles[file].get_slice(key) for key, file in where.items()}
        shapes = {key: tuple(part.get_shape()) for key, part in slices.items()}
        dtypes = {key: _DTYPES.get(part.get_dtype()) for key, part in slices.items()}
        _check_layout(config, shapes, dtypes, str(current))
        for key, part in slices.items():
            kind, name = key.split(".", 1)
            if kind != "deviations" or kept == config.rank:
                groups[kind][name] = handles[where[key]].get_tensor(key)
            elif kept:
                groups[kind][name] = part[:kept]
    return groups, where


def _headers(config: PriorConfig, files: Mapping[str, Path]) -> dict[str, dict[str, Entry]]:
    """File -> its header; all of them together may be no larger than what the configuration makes them need."""
    size, signs = _limits(config)
    headers: dict[str, dict[str, Entry]] = {}
    for name, path in files.items():
        headers[name], length = read_header(path, Limits(size, signs))
        size -= max(0, length - 4096)  # which any file may have
    return headers


def _limits(config: PriorConfig) -> Limits:
    """The most that the names and shapes of a configuration can need in a header or in an index, however they are written."""
    size, signs = 1 << 16, 2000  # for metadata
    kinds = 3 if config.rank else 2
    for name, shape in config.parameters.items():
        size += kinds * (len(json.dumps(name)) + 256 + 24 * len(shape))
        signs += kinds * (16 + len(shape) + sum(map(name.count, "{[,:")))
    for name in config.buffers:
        size += len(json.dumps(name)) + 512
        signs += 32 + sum(map(name.count, "{[,:"))
    return Limits(size, signs)


def _about_as_declared(config: PriorConfig, files: Mapping[str, Path]) -> bool:
    """Whether hashing the files is no more work than reading the prior that the configuration declares."""
    widths: dict[str, int] = {kind: getattr(torch, config.dtype[kind]).itemsize for kind in _KINDS}
    per_value = widths["mean"] + widths["variance"] + config.rank * widths["deviations"]
    held: int = sum(path.stat().st_size for path in files.values())
    return held <= 2 * config.num_parameters * per_value + 2**26


def _check_running_variances(buffers: Mapping[str, Tensor], where: Path) -> None:
    for name, tensor in buffers.items():
        if name.rsplit(".", 1)[-1] == "running_var" and bool((tensor < 0).any()):
            bad = int((tensor < 0).sum())
            raise PriorNumericsError(f"buffer.{name} in {where} has {bad} of {tensor.numel()} variances that are negative.")


def _refuse_overflow(config: PriorConfig, exponents: Mapping[str, int], where: Path) -> None:
    """Refuse deviations whose low-rank part, scale b sum d^2, is more than float32 holds."""
    weight = config.scale * config.low_rank_weight * config.rank
    for key, exponent in exponents.items():
        if key.startswith("deviations.") and weight and exponent >= 0 and weight >= math.ldexp(_LARGEST, -2 * exponent):
            raise PriorNumericsError(
                f"{key} in {where} has entries of 2^{exponent} and more: squared, times the scale {config.scale:g} and the "
                f"weight {config.low_rank_weight:g} of {config.rank} deviations, they are more than float32 can hold."
            )


def _verify(
    current: Path, config: PriorConfig, files: Mapping[str, Path], wanted: Mapping[str, Mapping[str, int | None]] | None
) -> None:
    """Compare the files with their hashes, several at a time, and look for NaN and infinities in the `wanted` rows."""
    total = sum(path.stat().st_size for path in files.values())
    threads = min(len(files), os.cpu_count() or 1, _MOST_FILES)
    with progress(total, f"Verifying {current.name}") as advance:
        exponents: dict[str, int] = {}
        tasks = [
            partial(verify_file, path, None if wanted is None else wanted[name], advance=advance, exponents=exponents)
            for name, path in files.items()
        ]
        results = dict(zip(files, side_by_side(tasks, threads), strict=True))
    for name, digest in config.weight_files.items():
        found = results[name][0]
        if found != digest:
            raise PriorFormatError(
                f"{files[name]} is not the file this prior was saved with (sha256 {found[:12]}..., expected "
                f"{digest[:12]}...): it was altered, truncated or mixed with another version. Save or download it again."
            )
    for _, bad in results.values():
        for key, (count, size) in bad.items():
            raise not_finite(f"{key} in {current}", count, size)
    _refuse_overflow(config, exponents, current)


def _current(folder: Path) -> Path:
    if not folder.is_dir():
        raise PriorNotFoundError(f"{folder} is not a folder.")
    if (folder / COMMIT_NAME).is_symlink():
        raise PriorFormatError(f"{folder / COMMIT_NAME} is a link: prior_hub makes folders of that name only. Remove it.")
    if (folder / COMMIT_NAME / CONFIG_NAME).is_file():
        return folder / COMMIT_NAME
    if not (folder / CONFIG_NAME).is_file():
        found = sorted(path.name for path in folder.iterdir())[:5]
        raise PriorNotFoundError(
            f"{folder} holds no prior: there is no {CONFIG_NAME} in it (found: {', '.join(found) or 'nothing'}). "
            "If the prior lies deeper, name that folder, or pass subfolder=."
        )
    return folder


def read_bounded(path: Path) -> bytes:
    """The bytes of a configuration or an index; refused unread when they are too many, or no file's."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_CONFIG_BYTES:
            raise PriorFormatError(f"{path} has {size} bytes, more than the {MAX_CONFIG_BYTES} it may have.")
        data: bytes = file.read(size + 1) or b""  # no more, should it grow meanwhile
    return data


def _weight_files(folder: Path, config: PriorConfig) -> dict[str, Path]:
    if not config.weight_files:
        raise PriorFormatError(f"{folder / CONFIG_NAME} lists no weight files.")
    files = {name: folder / name for name in config.weight_files}
    missing = [name for name, path in files.items() if not path.is_file()]
    if missing:
        raise PriorFormatError(f"{folder} lacks {', '.join(missing[:3])} ({len(missing)} of {len(files)} weight files).")
    for path in files.values():
        status = path.stat()
        held = 512 * getattr(status, "st_blocks", 0)
        if status.st_size > _SPARSE_FROM and 0 < held < status.st_size // 100:  # tensors do not compress like that
            raise PriorFormatError(
                f"{path} is a sparse file: {status.st_size} bytes of which {held} are there. Its download or copy was not "
                "finished: fetch it again."
            )
    return files


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """A safetensors file, memory-mapped; what is not one is a PriorFormatError."""
    try:
        try:
            file = _safe_open(path, framework="pt", device="cpu")
        except RuntimeError as error:  # torch opens the file a second time to map it, and may find another one or none
            raise OSError(errno.EIO, f"cannot map the file ({error})", str(path)) from error
        with file as handle:
            yield handle
    except SafetensorError as error:
        raise PriorFormatError(f"{path} is not a valid safetensors file ({error}): truncated or damaged.") from error


def _locate(headers: Mapping[str, Mapping[str, Entry]], folder: Path, config: PriorConfig) -> dict[str, str]:
    """Key -> file, from the headers of the files; an index must agree with them."""
    where: dict[str, str] = {}
    for file, keys in headers.items():
        for key in keys:
            kind = key.split(".", 1)[0]
            if key in where or kind not in (*_KINDS, "buffer") or "." not in key:
                problem = f"stands in {where[key]} too" if key in where else "is no key of format 1.0"
                raise PriorFormatError(f"{folder / file}: {key[:120]!r} {problem}.")
            where[key] = file
    index_path = folder / INDEX_NAME
    if len(headers) > 1 or index_path.is_file():
        index = None
        if index_path.is_file():
            text = read_bounded(index_path)
            _limits(config).refuse_more(text, str(index_path))
            index = parse_json(text, where=str(index_path), bounded=False)
        mapping = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(mapping, dict):
            raise PriorFormatError(f"{index_path} is missing or has no 'weight_map'.")
        for file in {value if isinstance(value, str) else repr(value)[:120] for value in mapping.values()}:
            check_weight_file_name(file)
            if file not in config.weight_files:
                raise PriorFormatError(f"{index_path} names {file}, whose hash the configuration does not list.")
        wrong = sorted(key for key in mapping.keys() | where.keys() if mapping.get(key) != where.get(key))
        if wrong:
            raise PriorFormatError(f"{index_path} puts {wrong[0]} in the wrong file ({len(wrong)} keys differ).")
    return where
