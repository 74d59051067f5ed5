"""One safetensors file: written as a stream and hashed on the way; verified by reading each byte once.

    8 bytes      length of the header, little-endian
    header       JSON: {"__metadata__": {...}, key: {"dtype", "shape", "data_offsets": [begin, end]}, ...}, padded to 8 bytes
    data         the tensors, little-endian and row-major, without gaps

Written byte for byte as safetensors writes it (keys by type, widest first, then by name, so that every tensor is aligned), but
its writer wants all tensors of a file at once, contiguous and in the memory of the CPU, and its file must be read again for the
hash. Here one tensor is asked for at a time and copied, where it must be, in blocks of 8 MiB: a file of any size costs a few
such blocks beyond the tensors themselves. `torch.isfinite` makes five passes and three temporaries; here a value is found
not finite by its exponent, whose bits are then all ones.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import stat
import struct
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from prior_hub.distributed import process_index
from prior_hub.errors import PriorFormatError, PriorNumericsError
from prior_hub.priors.config import parse_json

__all__ = [
    "Entry",
    "Limits",
    "Spec",
    "open_regular",
    "progress",
    "read_header",
    "side_by_side",
    "spec_of",
    "verify_file",
    "write_file",
]

BLOCK = 1 << 23  # bytes copied, hashed or read at a time
_LANES = 1 << 16  # values whose exponents are looked at at a time: they stay in the cache
_SHOWN_FROM = 10**9  # bytes; what is smaller takes a second or two
_THREADED_FROM = 1 << 20  # bytes; hashing less is not worth waking a thread
_CODES: dict[torch.dtype, str] = {  # in the order of the reference writer
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ORDER = {dtype: place for place, dtype in enumerate(_CODES)}
_EXPONENTS = {"F64": 0x7FF0000000000000, "F32": 0x7F800000, "BF16": 0x7F80, "F16": 0x7C00}
_WIDTHS = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
_BIASES = {"F64": (52, 1023), "F32": (23, 127), "BF16": (7, 127), "F16": (10, 15)}  # bits below the exponent, and its bias
_SIZES = {code: dtype.itemsize for dtype, code in _CODES.items()}
_MOST_HEADER = 100_000_000  # bytes, as the reference reader
_MOST_ENTRIES = 2**53  # of a tensor, as in the configuration
_T = TypeVar("_T")
_Bytes = npt.NDArray[np.uint8]


class Spec(NamedTuple):
    """What is known of a tensor before there is one."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def spec_of(tensor: Tensor) -> Spec:
    """The type and shape of a tensor."""
    return Spec(tensor.dtype, tuple(tensor.shape))


# ------------------------------------------------------------------------------------------------------------- writing


def write_file(
    path: Path,
    layout: Mapping[str, Spec],
    tensor: Callable[[str], Tensor],
    *,
    metadata: Mapping[str, str] | None = None,
    finite: bool = False,
    advance: Callable[[int], None] = lambda _: None,
) -> str:
    """Write a safetensors file; returns its sha256, for which it is not read again.

    Args:
        path: the file, replaced if it is there.
        layout: key -> type and shape.
        tensor: key -> the tensor, on any device and of any strides; asked once per key, in the order of the file, and let go
            of before the next.
        metadata: text -> text, in the header.
        finite: refuse NaN and infinities in the floating-point types a prior may have.
        advance: told the number of bytes after each block.

    Raises:
        PriorFormatError: a tensor is not what `layout` says, or of a type that safetensors does not have.
        PriorNumericsError: NaN or infinities. The file is unfinished then, as after every error.
        OSError: the disk is full, or not writable.
    """
    for key, spec in layout.items():
        if spec.dtype not in _CODES:
            raise PriorFormatError(f"{key} is of {spec.dtype}, which safetensors does not store: convert it.")
    blocks = _Blocks()
    order = sorted(layout, key=lambda key: (_ORDER[layout[key].dtype], key))
    try:
        with path.open("wb") as file, _Digest() as digest:
            head = np.frombuffer(_header(order, layout, metadata), np.uint8)
            digest.update(head)
            file.write(head.data)
            for key in order:
                spec, code = layout[key], _CODES[layout[key].dtype]
                values = tensor(key).detach()
                if spec_of(values) != spec:
                    raise PriorFormatError(
                        f"{key} is {values.dtype} of shape {list(values.shape)}, declared as {spec.dtype} {list(spec.shape)}."
                    )
                bad = 0
                for block in blocks.of(values.resolve_conj().resolve_neg()):
                    digest.update(block)
                    file.write(block.data)
                    if finite and code in _EXPONENTS:
                        bad += _not_finite(block, code)[0]
                    advance(block.nbytes)
                if bad:
                    raise not_finite(key, bad, values.numel())
                digest.wait()
                values = block = None  # type: ignore[assignment]  # or the tensor would be there until the next one is made
            return digest.hexdigest()
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, f"cannot write the file ({os.strerror(error.errno)})", str(path)) from error


def not_finite(key: str, bad: int, size: int) -> PriorNumericsError:
    """The error that counts the NaN and infinities of a tensor."""
    return PriorNumericsError(f"{key} has {bad} of {size} entries that are NaN or infinite.")


def _header(order: list[str], layout: Mapping[str, Spec], metadata: Mapping[str, str] | None) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for key in order:
        spec = layout[key]
        begin, end = end, end + spec.nbytes
        entries[key] = {"dtype": _CODES[spec.dtype], "shape": list(spec.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


class _Blocks:
    """The bytes of tensors, row-major; what is not contiguous in the memory of the CPU is copied into two buffers in turn.

    Buffers of our own: freshly allocated blocks of this size are not handed back by every allocator as fast as they come.
    """

    def __init__(self) -> None:
        self._spare: list[Tensor] = []

    def of(self, tensor: Tensor) -> Iterator[_Bytes]:
        """Each block is overwritten when the next but one is made."""
        size = tensor.numel() * tensor.element_size()
        if not size:
            return
        if tensor.is_contiguous():
            tensor = tensor.reshape(-1)
        rows = max(1, BLOCK * len(tensor) // size) if tensor.ndim else 1
        if size > BLOCK:
            for part in torch.split(tensor, rows):
                yield from self.of(part[0] if rows == 1 and tensor.ndim > 1 else part)
        elif tensor.device.type == "cpu" and tensor.is_contiguous():
            yield _little_endian(tensor)
        else:
            yield _little_endian(self._buffer(size).view(tensor.dtype).view(tensor.shape).copy_(tensor).view(-1))

    def _buffer(self, size: int) -> Tensor:
        if not self._spare:
            self._spare = [torch.empty(BLOCK, dtype=torch.uint8, device="cpu") for _ in range(2)]
        self._spare.reverse()
        return self._spare[0][:size]


def _little_endian(flat: Tensor) -> _Bytes:
    data: _Bytes = flat.as_strided(flat.shape, (1,)).view(torch.uint8).numpy()  # one entry alone may have any stride
    if sys.byteorder == "little":
        return data
    width = flat.element_size() // (2 if flat.is_complex() else 1)
    return data.reshape(-1, width)[:, ::-1].reshape(-1)


# ------------------------------------------------------------------------------------------------------------ headers


class Entry(NamedTuple):
    """A tensor as the header of its file has it: type, shape, and where its bytes begin and end behind the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Limits(NamedTuple):
    """The most a header or an index may have, by the names it must hold: bytes, and signs of structure ({ [ , :)."""

    size: int
    signs: int

    def refuse_more(self, text: bytes, where: str) -> None:
        """Refuse a text that is larger, or fuller, than what it must hold needs: before it is parsed, which takes memory."""
        signs = sum(text.count(sign) for sign in (b"{", b"[", b",", b":"))
        if len(text) > self.size or signs > self.signs:
            raise PriorFormatError(
                f"{where} has {len(text)} bytes and {signs} signs of structure, more than the {self.size} and {self.signs} "
                "that the names and shapes of the configuration can need."
            )


def open_regular(path: Path) -> io.FileIO:
    """A file to read, unbuffered; what is no regular file (a pipe, a device) is refused and never waited for.

    Raises:
        PriorFormatError: it is something else.
        OSError: it is not there, or may not be read.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    handle = os.open(path, flags)
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise PriorFormatError(f"{path} is no file with contents of its own (a pipe, a device or a folder).")
        return io.FileIO(handle, "rb", closefd=True)
    except BaseException:
        os.close(handle)
        raise


def read_header(path: Path, limits: Limits) -> tuple[dict[str, Entry], int]:
    """The header of a safetensors file, checked down to the last byte; no tensor is looked at.

    Stricter than the reference reader where that one chooses for the user: no key twice, integers that are integers, nothing
    around the JSON but the blanks behind it.

    Args:
        path: the file.
        limits: what the header may have at most.

    Returns:
        Key -> entry, and the length of the header in bytes.

    Raises:
        PriorFormatError: it is no safetensors file, or its tensors overlap, leave holes, or are not the size of the file.
    """

    def damaged(problem: str) -> PriorFormatError:
        return PriorFormatError(f"{path} is not a valid safetensors file ({problem}): truncated or damaged.")

    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(8) or b""
        if len(head) < 8:
            raise damaged(f"{len(head)} bytes")
        length: int = struct.unpack("<Q", head)[0]
        if not 2 <= length <= size - 8:
            raise damaged(f"a header of {length} bytes in a file of {size}")
        if length > limits.size:
            most = f"the {limits.size} that the names and shapes of the configuration can need"
            raise damaged(f"a header of {length} bytes, more than {most}")
        text = file.read(length) or b""
    if len(text) < length or not text.startswith(b"{"):
        raise damaged("the header does not begin with '{'" if len(text) == length else "the header is cut")
    limits.refuse_more(text, f"{path}: the header")
    try:
        header = parse_json(text, where=f"{path}: the header", bounded=False)
    except PriorFormatError as error:
        raise damaged(str(error).removeprefix(f"{path}: ").rstrip(".")) from error
    notes = header.pop("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(note, str) for note in notes.values()):
        raise damaged("__metadata__ is not a mapping of texts")
    entries: dict[str, Entry] = {}
    for key in list(header):
        entry = _entry(header.pop(key))
        if entry is None:
            raise damaged(f"the entry of {key[:120]!r}")
        entries[key] = entry
    place = 0
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != place:
            raise damaged(f"{key[:120]!r} begins at byte {entry.begin} of the data, where {place} was expected")
        place = entry.end
    if 8 + length + place != size:
        raise damaged(f"tensors of {place} bytes in a file that holds {size - 8 - length}")
    return entries, length


def _entry(value: Any) -> Entry | None:
    """What an entry of a header says, or None where it contradicts itself."""
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        return None
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    width = _SIZES.get(dtype) if isinstance(dtype, str) else None
    if width is None or not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2 or len(shape) > 64:
        return None
    if not all(type(n) is int and 0 <= n <= _MOST_ENTRIES for n in (*shape, *offsets)):
        return None
    begin, end = offsets
    if end - begin != math.prod(shape) * width:  # 64 factors of 2**53 at most
        return None
    return Entry(dtype, tuple(shape), begin, end)


# ----------------------------------------------------------------------------------------------------------- verifying


def verify_file(
    path: Path,
    wanted: Mapping[str, int | None] | None,
    *,
    advance: Callable[[int], None] = lambda _: None,
    exponents: dict[str, int] | None = None,
) -> tuple[str, dict[str, tuple[int, int]]]:
    """Read every byte of a safetensors file once, for its sha256 and, on the way, for what is not finite.

    The file is read and not mapped: nothing of it stays in the memory of the process, and what the system keeps in its cache
    is what a mapping uses afterwards.

    Args:
        path: the file; where `wanted` is given, one that safetensors has opened without complaint.
        wanted: key -> None, or the number of leading rows to look at; None: only the hash is wanted.
        advance: told the number of bytes after each block.
        exponents: filled in: key -> the largest e of the finite entries looked at, each of magnitude below 2^(e+1).

    Returns:
        The sha256, and key -> (entries that are NaN or infinite, entries looked at) where there are any.

    Raises:
        PriorFormatError: the file changed while it was read.
    """
    bad: dict[str, tuple[int, int]] = {}
    with open_regular(path) as file, _Digest() as digest:
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):  # not every file system takes advice
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)  # read further ahead
        size = os.fstat(file.fileno()).st_size
        spare = [np.empty(min(BLOCK, size), np.uint8) for _ in range(2)]  # one is hashed while the other is filled
        for key, code, begin, stop in _regions(file, size, wanted, path):
            place, found, top = begin, 0, 0
            while place < stop:
                block = spare[0][: min(BLOCK, stop - place)]
                spare.reverse()
                _fill(file, block, path)
                digest.update(block)
                if code in _EXPONENTS:
                    more, highest = _not_finite(block, code)
                    found, top = found + more, max(top, highest)
                place += block.nbytes
                advance(block.nbytes)
            if exponents is not None and code in _EXPONENTS:
                bits, bias = _BIASES[code]
                exponents[key] = (top >> bits) - bias
            if found:
                bad[key] = (found, (stop - begin) // _WIDTHS[code])
        return digest.hexdigest(), bad


def _regions(
    file: io.FileIO, size: int, wanted: Mapping[str, int | None] | None, path: Path
) -> list[tuple[str, str, int, int]]:
    """The file cut into (key, type, begin, end): the values to look at, and between them what is only hashed."""
    regions: list[tuple[str, str, int, int]] = []
    end = 0
    if wanted is not None:
        try:
            start = 8 + struct.unpack("<Q", _read_at(file, 8, 0))[0]
            if start > min(size, _MOST_HEADER):
                raise ValueError(f"a header of {start} bytes")
            header = json.loads(_read_at(file, start - 8, 8))
            entries = sorted((*header[key]["data_offsets"], key) for key in wanted)
            for first, last, key in entries:
                rows, shape = wanted[key], header[key]["shape"]
                if not 0 <= first <= last or (last - first) % _WIDTHS.get(header[key]["dtype"], 1):
                    raise ValueError(f"offsets of {key}")
                if rows is not None:
                    last = first + (last - first) // shape[0] * rows
                if start + first > end:
                    regions.append(("", "", end, start + first))
                regions.append((key, header[key]["dtype"], start + first, start + last))
                end = start + last
        except (ValueError, KeyError, TypeError, struct.error) as error:
            raise PriorFormatError(f"{path} changed while it was read ({error}).") from error
    return [*regions, ("", "", end, size)]


def _read_at(file: io.FileIO, count: int, place: int) -> bytes:
    file.seek(place)
    data = file.read(count)
    file.seek(0)
    return data


def _fill(file: io.FileIO, block: _Bytes, path: Path) -> None:
    view = block.data
    while view.nbytes:
        count = file.readinto(view)
        if not count:
            raise PriorFormatError(f"{path} became shorter while it was read.")
        view = view[count:]


def _not_finite(data: _Bytes, code: str) -> tuple[int, int]:
    """How many of the values are NaN or infinite (their exponents' bits are all ones), and the highest exponent's bits."""
    width = _WIDTHS[code]
    values = data.view(np.dtype(f"<u{width}"))
    mask = values.dtype.type(_EXPONENTS[code])
    exponents = np.empty(min(_LANES, values.size), values.dtype)
    bad = top = 0
    for start in range(0, values.size, _LANES):
        part = values[start : start + _LANES]
        found = np.bitwise_and(part, mask, out=exponents[: part.size])
        highest = int(found.max())
        top = max(top, highest)
        if highest == mask:
            bad += int((found == mask).sum())
    return bad, top


class _Digest:
    """SHA-256 of blocks, each worked out while the caller goes on (hashlib and file calls let go of the interpreter).

    A block must stay as it is until the next `update` or `hexdigest` has returned.
    """

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="prior-hub-sha256")  # starts its thread when there is work
        self._pending: Future[None] | None = None

    def __enter__(self) -> _Digest:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def update(self, block: _Bytes) -> None:
        self.wait()
        if block.nbytes >= _THREADED_FROM:
            with contextlib.suppress(RuntimeError):  # there are no threads any more: the main one has ended
                self._pending = self._pool.submit(self._hash.update, block.data)
                return
        self._hash.update(block.data)

    def hexdigest(self) -> str:
        self.wait()
        return self._hash.hexdigest()

    def wait(self) -> None:
        if self._pending is not None:
            self._pending.result()
            self._pending = None


# ------------------------------------------------------------------------------------------------- threads and progress


def side_by_side(tasks: Sequence[Callable[[], _T]], threads: int) -> list[_T]:
    """The results of tasks, in their order; when one fails those that wait are not begun, and its error is raised.

    Where threads cannot be started, or no longer (the main one has ended), the tasks are done here, and must not mind if one of
    them is begun twice.
    """
    with ThreadPoolExecutor(threads) as pool:
        begun: list[Future[_T]] = []
        try:
            with contextlib.suppress(RuntimeError):
                begun.extend(pool.submit(task) for task in tasks)
            for future in as_completed(begun):
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [future.result() for future in begun] + [task() for task in tasks[len(begun) :]]


@contextlib.contextmanager
def progress(total: int, what: str) -> Iterator[Callable[[int], None]]:
    """A function to tell the bytes that are done, from any thread.

    From 1 GB on it moves a bar of the Hub's client (which HF_HUB_DISABLE_PROGRESS_BARS turns off), on the first rank.
    """
    if total < _SHOWN_FROM or process_index():
        yield lambda _: None
        return
    from huggingface_hub.utils.tqdm import tqdm

    lock = threading.Lock()
    with tqdm(total=total, unit="B", unit_scale=True, desc=what) as bar:  # type: ignore[no-untyped-call]

        def advance(count: int) -> None:
            with lock:
                bar.update(count)

        yield advance
