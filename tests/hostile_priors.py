"""Priors that somebody made to do harm, or that went wrong: name -> a function that turns a good folder into one.

`REFUSED` must be refused by everybody who reads them; `IGNORED` holds what must not matter, with the reason. "single" has one
weight file, "sharded" several. A change to the weights is signed: their sha256 in the configuration is put right, as an
attacker would.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from priors_for_tests import edit_config

from prior_hub.priors.storage import INDEX_NAME

CONFIG, WEIGHTS = "prior_config.json", "prior.safetensors"
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8}
TB = 2**40


@dataclass(frozen=True)
class Case:
    """A hostile prior.

    Attributes:
        make: changes a good folder.
        kind: name of the error.
        words: what the message must have.
        form: "single" or "sharded".
        config: whether the configuration is at fault, so that `prior-hub info` must refuse too.
        unverified: whether it must be refused with verify=False too.
    """

    make: Callable[[Path], object]
    kind: str = "PriorFormatError"
    words: tuple[str, ...] = ()
    form: str = "single"
    config: bool = False
    unverified: bool = True


# ------------------------------------------------------------------------------------------------------------- makers


def sign(folder: Path) -> None:
    """Record the hashes of the weight files as they are now."""
    path = folder / CONFIG
    config = json.loads(path.read_text())
    for name in config["weight_files"]:
        config["weight_files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    path.write_text(json.dumps(config))


def parts(path: Path) -> tuple[dict[str, Any], bytes]:
    """(header, data) of a safetensors file."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join(header: Mapping[str, Any] | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file of any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def raw(content: bytes, name: str = WEIGHTS) -> Callable[[Path], None]:
    """The weight file has this content."""

    def make(folder: Path) -> None:
        (folder / name).write_bytes(content)
        sign(folder)

    return make


def header(change: Callable[[dict[str, Any]], Any], name: str = WEIGHTS) -> Callable[[Path], None]:
    """The header of the weight file is changed; what `change` returns replaces it, if it is not None."""

    def make(folder: Path) -> None:
        found, data = parts(folder / name)
        result = change(found)
        (folder / name).write_bytes(join(found if result is None else result, data))
        sign(folder)

    return make


def values(key: str, change: Callable[[np.ndarray], object]) -> Callable[[Path], None]:
    """The values of one tensor are changed in place."""

    def make(folder: Path) -> None:
        found, data = parts(folder / WEIGHTS)
        start, stop = found[key]["data_offsets"]
        changed = bytearray(data)
        change(np.frombuffer(changed, "<f4", (stop - start) // 4, start))
        (folder / WEIGHTS).write_bytes(join(found, bytes(changed)))
        sign(folder)

    return make


def tensors(change: Callable[[dict[str, tuple[str, list[int], bytes]]], object], name: str = WEIGHTS) -> Callable[[Path], None]:
    """The file is written anew with tensors changed: key -> (type, shape, bytes)."""

    def make(folder: Path) -> None:
        found, data = parts(folder / name)
        notes = found.pop("__metadata__", None)
        held = {k: (e["dtype"], e["shape"], data[e["data_offsets"][0] : e["data_offsets"][1]]) for k, e in found.items()}
        change(held)
        (folder / name).write_bytes(pack(held, notes))
        sign(folder)

    return make


def pack(held: Mapping[str, tuple[str, list[int], bytes]], notes: Any = None) -> bytes:
    """A safetensors file of these tensors."""
    entries: dict[str, Any] = {"__metadata__": notes} if notes else {}
    place, data = 0, b""
    for key, (dtype, shape, content) in held.items():
        entries[key] = {"dtype": dtype, "shape": shape, "data_offsets": [place, place + len(content)]}
        place, data = place + len(content), data + content
    return join(entries, data)


def config(**changes: Any) -> Callable[[Path], None]:
    """The configuration is changed."""
    return lambda folder: edit_config(folder, **changes)


def text(change: Callable[[bytes], bytes], name: str = CONFIG) -> Callable[[Path], None]:
    """The bytes of the configuration are changed."""

    def make(folder: Path) -> None:
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return make


def in_source(value: bytes) -> Callable[[Path], None]:
    """A key "x" of the source task has this JSON text."""
    return text(lambda old: old.replace(b'"source": {', b'"source": {"x": ' + value + b", ", 1))


def replaced(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    """A file is replaced by what `make` makes at its path."""

    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return change


def sparse(name: str, size: int) -> Callable[[Path], None]:
    """A file is made longer by a hole."""

    def make(folder: Path) -> None:
        os.truncate(folder / name, size)

    return make


def index(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """The index is changed; what `change` returns is its text, if it is not None."""

    def make(folder: Path) -> None:
        found = json.loads((folder / INDEX_NAME).read_text())
        result = change(found)
        (folder / INDEX_NAME).write_bytes(json.dumps(found).encode() if result is None else result)

    return make


def weights_named(name: str) -> Callable[[Path], None]:
    """The configuration names its weights so, and a file of that name is there where that is possible."""

    def make(folder: Path) -> None:
        digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
        edit_config(folder, weight_files={name: digest})
        if "\0" not in name and len(name) < 200:
            target = folder / name
            if target.parent.is_dir() and not target.exists():
                shutil.copy(folder / WEIGHTS, target)

    return make


class Bomb:
    """Unpickling this creates a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (self.path, "w"))


def pickled(folder: Path) -> bytes:
    """A pickle that makes a file `exploded` when it is read."""
    return pickle.dumps(Bomb(str(folder / "exploded")))


def saved_by_torch(folder: Path) -> bytes:
    """The same as torch.save writes it."""
    buffer = io.BytesIO()
    torch.save({"mean.layer.bias": torch.zeros(4), "bomb": Bomb(str(folder / "exploded"))}, buffer)
    return buffer.getvalue()


def zipped(folder: Path) -> bytes:
    """The weights in a zip archive."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.write(folder / WEIGHTS, WEIGHTS)
    return buffer.getvalue()


def made(content: Callable[[Path], bytes]) -> Callable[[Path], None]:
    """The weight file has what `content` makes of the folder."""

    def make(folder: Path) -> None:
        (folder / WEIGHTS).write_bytes(content(folder))
        sign(folder)

    return make


def _set(target: dict[str, Any], *path: Any, to: Any) -> None:
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = to


def edit(*path: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    """A change of one place."""
    return lambda found: _set(found, *path, to=to)


def retyped(dtype: str, size: int) -> Callable[[dict[str, tuple[str, list[int], bytes]]], None]:
    """The mean of the bias, four values, in another type."""
    return lambda held: held.update({"mean.layer.bias": (dtype, [4], bytes(size))})


def _duplicate(found: dict[str, Any]) -> bytes:
    lie = json.dumps({"mean.layer.bias": found["mean.head.weight"]})[1:-1]
    return (json.dumps(found)[:-1] + ", " + lie + "}").encode()


def _duplicate_alike(found: dict[str, Any]) -> bytes:
    return (json.dumps(found)[:-1] + ", " + json.dumps({"mean.layer.bias": found["mean.layer.bias"]})[1:-1] + "}").encode()


def _duplicate_field(found: dict[str, Any]) -> bytes:
    return json.dumps(found).replace('{"dtype"', '{"dtype": "F64", "dtype"', 1).encode()


def _many_tensors(found: dict[str, Any]) -> bytes:
    entry = ',"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    return (json.dumps(found)[:-1] + "".join(entry % i for i in range(1_000_000)) + "}").encode()


def _huge_sparse(folder: Path) -> None:
    """A configuration that declares 10 TB and a file of holes that has them."""
    values = 10 * TB // 8
    edit_config(
        folder, parameters={"a": [values]}, num_parameters=values, rank=0, head_parameters=[], tied_parameters={}, buffers=[]
    )
    entries = {
        f"{kind}.a": {"dtype": "F32", "shape": [values], "data_offsets": [i * 4 * values, (i + 1) * 4 * values]}
        for i, kind in enumerate(("mean", "variance"))
    }
    content = join(entries)
    (folder / WEIGHTS).write_bytes(content)
    os.truncate(folder / WEIGHTS, len(content) + 8 * values)


def _swapped(folder: Path) -> None:
    names = sorted(json.loads((folder / CONFIG).read_text())["weight_files"])[:2]
    contents = [(folder / name).read_bytes() for name in names]
    for name, content in zip(names, reversed(contents), strict=True):
        (folder / name).write_bytes(content)


def _twice(folder: Path) -> None:
    first, second = sorted(json.loads((folder / CONFIG).read_text())["weight_files"])[:2]
    (folder / second).write_bytes((folder / first).read_bytes() + b"")
    found, data = parts(folder / first)
    found["__metadata__"] = {"format": "pt", "another": "hash"}
    (folder / second).write_bytes(join(found, data))
    sign(folder)


def _one_hash(folder: Path) -> None:
    files = json.loads((folder / CONFIG).read_text())["weight_files"]
    edit_config(folder, weight_files=dict.fromkeys(files, next(iter(files.values()))))


def _gap(folder: Path) -> None:
    files = json.loads((folder / CONFIG).read_text())["weight_files"]
    edit_config(folder, weight_files={name.replace("-of-", "-of-1")[:5] + name[5:]: d for name, d in list(files.items())[:-1]})


def _first_missing(folder: Path) -> None:
    sorted(folder.glob("prior-*.safetensors"))[0].unlink()


def _flip(folder: Path) -> None:
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-3] ^= 1
    (folder / WEIGHTS).write_bytes(content)


def _commit_link(folder: Path) -> None:
    outside = folder.parent / f"{folder.name}-outside"
    shutil.copytree(folder, outside)
    (folder / ".prior-commit").symlink_to(outside)


def _many_files(folder: Path) -> None:
    files = {f"prior-{i:05d}-of-05000.safetensors": f"{i:064x}" for i in range(1, 5001)}
    edit_config(folder, weight_files=files)
    for name in files:
        (folder / name).symlink_to(folder / WEIGHTS)


MB64 = 64 * 2**20 - 8192
LISTS = b"[" + b"[]," * (MB64 // 3) + b"[]]"
F32 = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}

# -------------------------------------------------------------------------------------------------------------- table


def _config_case(make: Callable[[Path], object], *words: str, kind: str = "PriorFormatError") -> Case:
    return Case(make, kind, words, config=True)


def _value_case(make: Callable[[Path], object], *words: str, kind: str = "PriorNumericsError") -> Case:
    return Case(make, kind, words, unverified=False)


REFUSED: dict[str, Case] = {
    # the configuration: size, and what a few bytes make of the memory
    "config: 64 MB of empty lists": _config_case(in_source(LISTS), "memory"),
    "config: 64 MB of empty objects": _config_case(in_source(LISTS.replace(b"[]", b"{}")), "memory"),
    "config: 48 MB of one key again and again": _config_case(in_source(b"{" + b'"":0,' * (10 * 2**20) + b'"":0}'), "memory"),
    "config: 48 MB of numbers": _config_case(in_source(b"[" + b"1.5," * (12 * 2**20) + b"1]"), "memory"),
    "config: 48 MB of short texts": _config_case(in_source(b"[" + b'"a",' * (12 * 2**20) + b"1]"), "memory"),
    "config: 60 MB in one text": _config_case(in_source(b'"' + b"a" * (60 * 2**20) + b'"'), "memory"),
    "config: 16 MB of emoji": _config_case(in_source(b'"' + "\U0001f600".encode() * (4 * 2**20) + b'"'), "memory"),
    "config: one number of 60 MB": _config_case(in_source(b"0." + b"1" * (60 * 2**20)), "memory"),
    "config: a number of a million digits": _config_case(in_source(b"1" * 1_000_000), "not valid JSON"),
    "config: 100 MB of blanks": _config_case(text(lambda old: old + b" " * (100 * 2**20)), "bytes, more than"),
    "config: sparse, 10 TB": _config_case(sparse(CONFIG, 10 * TB), "bytes, more than"),
    "config: lists 100,000 deep": _config_case(in_source(b"[" * 100_000 + b"]" * 100_000), "nested more than 100 deep"),
    "config: objects 20,000 deep": _config_case(
        in_source(b'{"a":' * 20_000 + b"1" + b"}" * 20_000), "nested more than 100 deep"
    ),
    "config: 10 million openings and no closing": _config_case(in_source(b"[" * 10_000_000), "memory"),
    "config: 1 MB of empty lists, which may be read, and no rank": _config_case(
        lambda f: (
            in_source(b"[" + b"[]," * 400_000 + b"1]")(f),
            text(lambda old: old.replace(b'"rank": 3', b'"rank": -3'))(f),
        ),
        "rank is -3",
    ),
    # the configuration: text
    "config: empty": _config_case(text(lambda _: b""), "not valid JSON"),
    "config: zeros": _config_case(text(lambda old: bytes(len(old))), "not valid JSON"),
    "config: not UTF-8": _config_case(text(lambda old: old.replace(b"tiny-net", b"tiny\xff\xfenet")), "not valid JSON"),
    "config: overlong UTF-8": _config_case(text(lambda old: old.replace(b"tiny-net", b"\xc0\xaf..\xc0\xaf")), "not valid JSON"),
    "config: a byte order mark": _config_case(text(lambda old: b"\xef\xbb\xbf" + old), "not valid JSON"),
    "config: UTF-16": _config_case(text(lambda old: old.decode().encode("utf-16")), "not valid JSON"),
    "config: two documents": _config_case(text(lambda old: old + old), "not valid JSON"),
    "config: a key twice": _config_case(
        text(lambda old: old.replace(b'"rank"', b'"rank": 0, "rank"', 1)), "rank more than once"
    ),
    "config: a parameter twice": _config_case(
        text(lambda old: old.replace(b'"layer.bias": [', b'"layer.bias": [4], "layer.bias": [', 1)), "more than once"
    ),
    "config: a weight file twice": _config_case(
        text(
            lambda old: old.replace(
                b'"prior.safetensors":', b'"prior.safetensors": "' + b"0" * 64 + b'", "prior.safetensors":', 1
            )
        ),
        "more than once",
    ),
    "config: a list": _config_case(text(lambda _: b"[1]"), "no prior configuration"),
    # the configuration: numbers
    "config: eps is NaN": _config_case(text(lambda old: old.replace(b'"eps": 1e-09', b'"eps": NaN')), "NaN"),
    "config: scale is infinite": _config_case(text(lambda old: old.replace(b'"scale": 0.3', b'"scale": Infinity')), "Infinity"),
    "config: scale is 1e400": _config_case(text(lambda old: old.replace(b'"scale": 0.3', b'"scale": 1e400')), "1e400"),
    "config: scale is an integer beyond floats": _config_case(config(scale=10**400), "scale is"),
    "config: scale x weight is infinite": _config_case(config(scale=1e308, diagonal_weight=1e10), "beyond the largest number"),
    "config: scale x low rank is infinite": _config_case(
        config(scale=1e308, low_rank_weight=1e10), "beyond the largest number"
    ),
    "config: scale is 0": _config_case(config(scale=0), "scale is 0"),
    "config: eps is negative": _config_case(config(eps=-1e-9), "eps is"),
    "config: rank is true": _config_case(config(rank=True), "rank is True"),
    "config: rank is 3.0": _config_case(config(rank=3.0), "rank is 3.0"),
    "config: rank is negative": _config_case(config(rank=-1), "rank is -1"),
    "config: rank has 400 digits": _config_case(config(rank=10**400), "rank is"),
    "config: snapshots have 400 digits": _config_case(config(num_snapshots=10**400), "num_snapshots is"),
    "config: another number of values": _config_case(config(num_parameters=26), "num_parameters is 26"),
    "config: a shape beyond 64 bits": _config_case(
        config(parameters={"a": [2**32, 2**32]}, num_parameters=2**64), "impossible size"
    ),
    "config: a shape that wraps to a small one": _config_case(
        config(parameters={"layer.bias": [2**62, 4, 1]}), "impossible size"
    ),
    "config: a negative shape": _config_case(config(parameters={"layer.bias": [-4]}), "expected a list of integers"),
    "config: two negative axes": _config_case(config(parameters={"layer.bias": [-2, -2]}), "expected a list of integers"),
    "config: a shape of floats": _config_case(config(parameters={"layer.bias": [4.0]}), "expected a list of integers"),
    "config: a shape of true": _config_case(config(parameters={"layer.bias": [True]}), "expected a list of integers"),
    "config: a shape of 100,000 axes": _config_case(config(parameters={"layer.bias": [1] * 100_000}), "impossible size"),
    # the configuration: versions, names
    "config: version 2.0": _config_case(config(format_version="2.0"), "Upgrade prior_hub"),
    "config: version with a newline": _config_case(config(format_version="1.0\n"), "format_version is"),
    "config: version in other digits": _config_case(config(format_version="\uff11.\uff10"), "format_version is"),
    "config: version 01.0": _config_case(config(format_version="01.0"), "format_version is"),
    "config: version is a number": _config_case(config(format_version=1.0), "format_version is"),
    "config: version is missing": _config_case(
        text(lambda old: old.replace(b'"format_version"', b'"version"')), "format_version"
    ),
    "config: another family": _config_case(config(family="pickle"), "family is"),
    "config: a type the format has not": _config_case(
        config(dtype={"mean": "int8", "variance": "float32", "deviations": "float32"}), "dtype of mean"
    ),
    "config: half a character in a name": _config_case(
        text(lambda old: old.replace(b'"temperature"', b'"\\ud800"')), "parameters has the name"
    ),
    "config: a name of 5,000 characters": _config_case(
        text(lambda old: old.replace(b'"temperature"', b'"' + b"t" * 5000 + b'"')), "parameters has the name"
    ),
    "config: an empty name": _config_case(text(lambda old: old.replace(b'"temperature"', b'""')), "parameters has the name"),
    "config: a parameter tied to another": _config_case(
        config(tied_parameters={"layer.bias": "layer.weight"}), "is a parameter itself"
    ),
    "config: tied to nothing": _config_case(config(tied_parameters={"x": "y"}), "tied_parameters maps"),
    "config: weights in the folder above": _config_case(
        weights_named("../prior.safetensors"), "is no name for a prior's weights"
    ),
    "config: weights at an absolute path": _config_case(weights_named("/etc/passwd"), "is no name for a prior's weights"),
    "config: weights by backslashes": _config_case(weights_named("..\\prior.safetensors"), "is no name for a prior's weights"),
    "config: weights with NUL": _config_case(weights_named("prior.safetensors\0.txt"), "is no name for a prior's weights"),
    "config: weights with a newline": _config_case(weights_named("prior.safetensors\n"), "is no name for a prior's weights"),
    "config: weights with a right-to-left mark": _config_case(
        weights_named("prior\u202esrosnetefas.tp"), "is no name for a prior's weights"
    ),
    "config: weights of 5,000 characters": _config_case(
        weights_named("prior" + "0" * 5000 + ".safetensors"), "is no name for a prior's weights"
    ),
    "config: weights in other digits": _config_case(
        weights_named("prior-0000\uff11-of-0000\uff11.safetensors"), "is no name for a prior's weights"
    ),
    "config: weights are a pickle by name": _config_case(
        weights_named("pytorch_model.bin"), "is no name for a prior's weights"
    ),
    "config: a hash that is none": _config_case(config(weight_files={WEIGHTS: "0" * 63}), "expected 64 hex digits"),
    "config: no weights": Case(config(weight_files={}), words=("lists no weight files",)),
    "config: files 1 to N with a gap": Case(_gap, words=("and so on up to N",), form="sharded", config=True),
    "config: one hash for all files": Case(_one_hash, words=("the same hash",), form="sharded", config=True),
    "config: 5,000 files for 12 tensors": _config_case(_many_files, "5000 files for 15 tensors"),
    # what is no file
    "config is a pipe": _config_case(replaced(CONFIG, os.mkfifo), "holds no prior", kind="PriorNotFoundError"),
    "config is a folder": _config_case(replaced(CONFIG, Path.mkdir), "holds no prior", kind="PriorNotFoundError"),
    "config is /dev/zero": _config_case(
        replaced(CONFIG, lambda p: p.symlink_to("/dev/zero")), "holds no prior", kind="PriorNotFoundError"
    ),
    "config is a link to itself": _config_case(
        replaced(CONFIG, lambda p: p.symlink_to(p)), "holds no prior", kind="PriorNotFoundError"
    ),
    "config is a link to a file of another kind": _config_case(
        replaced(CONFIG, lambda p: p.symlink_to("/etc/hostname")), "not valid JSON"
    ),
    "weights are a pipe": Case(replaced(WEIGHTS, os.mkfifo), words=("lacks prior.safetensors",)),
    "weights are a folder": Case(replaced(WEIGHTS, Path.mkdir), words=("lacks prior.safetensors",)),
    "weights are /dev/zero": Case(replaced(WEIGHTS, lambda p: p.symlink_to("/dev/zero")), words=("lacks prior.safetensors",)),
    "weights are a link to themselves": Case(replaced(WEIGHTS, lambda p: p.symlink_to(p)), words=("lacks prior.safetensors",)),
    "weights are a link to something else": Case(
        replaced(WEIGHTS, lambda p: p.symlink_to("/etc/passwd")), words=("prior.safetensors",)
    ),
    "a commit folder that is a link to elsewhere": Case(_commit_link, words=(".prior-commit is a link",), config=True),
    # the header of the weights
    "header: 2**63 bytes": Case(raw(join(b"{}", length=2**63)), words=("not a valid safetensors",)),
    "header: 2**64-1 bytes": Case(raw(join(b"{}", length=2**64 - 1)), words=("not a valid safetensors",)),
    "header: larger than the file": Case(raw(join(b"{}", length=3)), words=("not a valid safetensors",)),
    "header: 0 bytes": Case(raw(join(b"", bytes(100))), words=("not a valid safetensors",)),
    "header: 100 MB of blanks": Case(raw(join(b" " * 100_000_000)), words=("not a valid safetensors", "can need")),
    "header: good, and 99 MB of blanks": Case(
        header(lambda h: json.dumps(h).encode() + b" " * 99_000_000), words=("not a valid safetensors", "can need")
    ),
    "header: not JSON": Case(raw(join(b"{hello}", bytes(100))), words=("not a valid safetensors",)),
    "header: a list": Case(raw(join(b"[]", bytes(100))), words=("not a valid safetensors",)),
    "header: blanks before it": Case(header(lambda h: b"  " + json.dumps(h).encode()), words=("not a valid safetensors",)),
    "header: a byte order mark": Case(header(lambda h: b"\xef\xbb\xbf" + json.dumps(h).encode()), words=("not a valid",)),
    "header: zeros behind it": Case(header(lambda h: json.dumps(h).encode() + bytes(8)), words=("not a valid safetensors",)),
    "header: 20,000 deep": Case(
        header(lambda h: json.dumps(h).encode()[:-1] + b',"a":' + b"[" * 20_000 + b"]" * 20_000 + b"}"),
        words=("signs of structure",),
    ),
    "header: 500 deep": Case(
        header(lambda h: json.dumps(h).encode()[:-1] + b',"a":' + b"[" * 500 + b"]" * 500 + b"}"), words=("not a valid",)
    ),
    "header: a tensor twice": Case(header(_duplicate_alike), words=("more than once",)),
    "header: a tensor twice, the second a lie": Case(header(_duplicate), words=("more than once",)),
    "header: a type twice": Case(header(_duplicate_field), words=("more than once",)),
    "header: a million tensors": Case(header(_many_tensors), words=("can need",)),
    "header: 64 MB of empty lists": Case(raw(join(b'{"a":' + LISTS + b"}")), words=("can need",)),
    "header: overlapping tensors": Case(
        header(lambda h: _set(h, "mean.layer.bias", "data_offsets", to=h["variance.layer.bias"]["data_offsets"])),
        words=("begins at byte",),
    ),
    "header: a hole": Case(
        raw(join({"mean.a": F32, "variance.a": F32 | {"data_offsets": [32, 48]}}, bytes(48))), words=("begins at byte",)
    ),
    "header: a hole at the beginning": Case(
        raw(join({"mean.a": F32 | {"data_offsets": [16, 32]}}, bytes(32))), words=("begins",)
    ),
    "header: offsets beyond the file": Case(raw(join({"mean.a": F32}, bytes(8))), words=("tensors of 16 bytes",)),
    "header: negative offsets": Case(
        raw(join({"mean.a": F32 | {"data_offsets": [-16, 0]}}, bytes(16))), words=("the entry of",)
    ),
    "header: offsets backwards": Case(
        raw(join({"mean.a": F32 | {"data_offsets": [16, 0]}}, bytes(16))), words=("the entry of",)
    ),
    "header: offsets are floats": Case(
        header(edit("mean.layer.bias", "data_offsets", to=[0.0, 16.0])), words=("the entry of 'mean.layer.bias'",)
    ),
    "header: offsets are true and false": Case(
        raw(join({"mean.a": {"dtype": "U8", "shape": [1], "data_offsets": [False, True]}}, bytes(1))), words=("the entry of",)
    ),
    "header: three offsets": Case(header(edit("mean.layer.bias", "data_offsets", to=[0, 16, 16])), words=("the entry of",)),
    "header: offsets of 10**30": Case(header(edit("mean.layer.bias", "data_offsets", to=[0, 10**30])), words=("the entry of",)),
    "header: a shape that overflows": Case(
        header(edit("mean.layer.bias", "shape", to=[2**62, 2**62])), words=("the entry of",)
    ),
    "header: a shape that wraps to its size": Case(
        header(edit("mean.layer.bias", "shape", to=[2**62 + 1, 4])), words=("entry of",)
    ),
    "header: a shape of true": Case(header(edit("mean.temperature", "shape", to=[True])), words=("the entry of",)),
    "header: 100 axes": Case(header(edit("mean.layer.bias", "shape", to=[4] + [1] * 100)), words=("the entry of",)),
    "header: a type that nobody has": Case(header(edit("mean.layer.bias", "dtype", to="F32X")), words=("the entry of",)),
    "header: a type that is a list": Case(header(edit("mean.layer.bias", "dtype", to=["F32"])), words=("the entry of",)),
    "header: a field too many": Case(header(edit("mean.layer.bias", "stride", to=[1])), words=("the entry of",)),
    "header: metadata that are no texts": Case(header(edit("__metadata__", to={"a": {"b": 1}})), words=("__metadata__",)),
    "header: metadata that are a list": Case(header(edit("__metadata__", to=[1])), words=("__metadata__",)),
    # the weights
    "weights: empty": Case(raw(b""), words=("not a valid safetensors",)),
    "weights: cut": Case(made(lambda f: (f / WEIGHTS).read_bytes()[:-1]), words=("not a valid safetensors",)),
    "weights: more than the tensors": Case(
        made(lambda f: (f / WEIGHTS).read_bytes() + b"x"), words=("not a valid safetensors",)
    ),
    "weights: sparse to 10 TB": Case(sparse(WEIGHTS, 10 * TB), words=("sparse file",)),
    "weights: 10 TB declared, and sparse": Case(_huge_sparse, words=("sparse file",)),
    "weights: half of a gigabyte too long": Case(sparse(WEIGHTS, 2**29), words=("not a valid safetensors",)),
    "weights: a pickle": Case(made(pickled), words=("not a valid safetensors",)),
    "weights: of torch.save": Case(made(saved_by_torch), words=("not a valid safetensors",)),
    "weights: in a zip archive": Case(made(zipped), words=("not a valid safetensors",)),
    "weights: compressed with gzip": Case(made(lambda f: gzip.compress((f / WEIGHTS).read_bytes())), words=("not a valid",)),
    "weights: a web page": Case(raw(b"<!DOCTYPE html><html>Not found</html>"), words=("not a valid safetensors",)),
    "weights: float64 for float32": Case(tensors(retyped("F64", 32)), words=("stored as float64",)),
    "weights: F8": Case(tensors(retyped("F8_E4M3", 4)), words=("is stored as",)),
    "weights: BOOL": Case(tensors(retyped("BOOL", 4)), words=("is stored as",)),
    "weights: complex": Case(tensors(retyped("C64", 32)), words=("is stored as",)),
    "weights: I32, which has the size of float32": Case(tensors(retyped("I32", 16)), words=("is stored as",)),
    "weights: a shape turned": Case(header(edit("mean.layer.weight", "shape", to=[3, 4])), words=("has shape [3, 4]",)),
    "weights: deviations of another rank": Case(
        tensors(lambda t: t.update({"deviations.layer.bias": ("F32", [2, 4], t["deviations.layer.bias"][2][:32])})),
        words=("has shape [2, 4]",),
    ),
    "weights: a tensor is missing": Case(tensors(lambda t: t.pop("variance.layer.bias")), words=("lacks variance.layer.bias",)),
    "weights: a tensor too many": Case(
        tensors(lambda t: t.update({"mean.more": ("F32", [1], bytes(4))})), words=("undeclared mean.more",)
    ),
    "weights: a key that is none": Case(tensors(lambda t: t.update({"hello": ("F32", [1], bytes(4))})), words=("is no key",)),
    "weights: a buffer too many": Case(
        tensors(lambda t: t.update({"buffer.more": ("F32", [1], bytes(4))})), words=("undeclared buffer.more",)
    ),
    # shards and their index
    "shards: one is missing": Case(_first_missing, words=("lacks prior-00001",), form="sharded"),
    "shards: a tensor in two": Case(_twice, words=("stands in",), form="sharded"),
    "shards: two are swapped": Case(_swapped, words=("prior-0", "in the wrong file"), form="sharded"),
    "index: missing": Case(replaced(INDEX_NAME, lambda _: None), words=("is missing",), form="sharded"),
    "index: a pipe": Case(replaced(INDEX_NAME, os.mkfifo), words=("is missing",), form="sharded"),
    "index: 64 MB of empty lists": Case(index(lambda _: LISTS), words=("signs of structure",), form="sharded"),
    "index: sparse, 10 TB": Case(sparse(INDEX_NAME, 10 * TB), words=("bytes, more than",), form="sharded"),
    "index: 500 deep": Case(index(lambda _: b"[" * 500 + b"]" * 500), words=("nested",), form="sharded"),
    "index: a key twice": Case(
        index(lambda i: (json.dumps(i)[:-1] + ', "weight_map": {}}').encode()), words=("more than once",), form="sharded"
    ),
    "index: a foreign file": Case(
        index(edit("weight_map", "mean.layer.bias", to="model.safetensors")), words=("is no name for",), form="sharded"
    ),
    "index: an absolute path": Case(
        index(edit("weight_map", "mean.layer.bias", to="/etc/passwd")), words=("is no name for",), form="sharded"
    ),
    "index: the folder above": Case(
        index(edit("weight_map", "mean.layer.bias", to="../prior.safetensors")), words=("is no name for",), form="sharded"
    ),
    "index: a file without a hash": Case(
        index(edit("weight_map", "mean.layer.bias", to=WEIGHTS)), words=("whose hash",), form="sharded"
    ),
    "index: a list for a file": Case(
        index(edit("weight_map", "mean.layer.bias", to=[1])), words=("is no name for",), form="sharded"
    ),
    "index: a key too many": Case(
        index(edit("weight_map", "mean.more", to="prior-00001-of-00009.safetensors")),
        words=("prior.safetensors.index.json",),
        form="sharded",
    ),
    "index: 300,000 keys": Case(
        index(lambda i: i["weight_map"].update({f"mean.{n}": WEIGHTS for n in range(300_000)})),
        words=("can need",),
        form="sharded",
    ),
    # values, which only verification looks at
    "values: another hash": _value_case(_flip, "is not the file this prior was saved with", kind="PriorFormatError"),
    "values: the hash of another file": _value_case(
        config(weight_files={WEIGHTS: "0" * 64}), "is not the file this prior was saved with", kind="PriorFormatError"
    ),
    "values: NaN in the mean": _value_case(values("mean.layer.weight", lambda v: v.__setitem__(3, np.nan)), "1 of 12"),
    "values: infinity in the mean": _value_case(values("mean.layer.weight", lambda v: v.__setitem__(3, -np.inf)), "1 of 12"),
    "values: NaN in a variance": _value_case(values("variance.layer.weight", lambda v: v.__setitem__(3, np.nan)), "1 of 12"),
    "values: infinity in a variance": _value_case(values("variance.layer.bias", lambda v: v.__setitem__(0, np.inf)), "1 of 4"),
    "values: a negative variance": _value_case(values("variance.layer.bias", lambda v: v.__setitem__(0, -1e-9)), "< 0"),
    "values: a variance of 0": _value_case(
        lambda f: (values("variance.layer.bias", lambda v: v.__setitem__(0, 0))(f), edit_config(f, eps=0)), "<= 0"
    ),
    "values: a denormal variance": _value_case(
        lambda f: (values("variance.layer.bias", lambda v: v.__setitem__(0, 1e-45))(f), edit_config(f, eps=0)), "can hold"
    ),
    "values: a scale of 1e-320": _value_case(config(scale=1e-320, eps=0), "can hold"),
    "values: a scale of 1e300": _value_case(config(scale=1e300), "hold"),
    "values: a variance that overflows": _value_case(
        lambda f: (values("variance.layer.bias", lambda v: v.__setitem__(0, 3e38))(f), edit_config(f, scale=100)),
        "more than float32",
    ),
    "values: infinity in the deviations": _value_case(
        values("deviations.layer.bias", lambda v: v.__setitem__(0, np.inf)), "1 of 12"
    ),
    "values: deviations whose squares overflow": _value_case(
        values("deviations.layer.bias", lambda v: v.__setitem__(0, 1e25)), "more than float32"
    ),
    "values: NaN in a buffer": _value_case(values("buffer.bn.running_mean", lambda v: v.__setitem__(0, np.nan)), "1 of 4"),
    "values: a negative running variance": _value_case(
        values("buffer.bn.running_var", lambda v: v.__setitem__(0, -1)), "1 of 4 variances that are negative"
    ),
}


LAUGHS = "---\na0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)

IGNORED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a pickle beside the weights": (
        lambda f: (f / "pytorch_model.bin").write_bytes(pickled(f)),
        "only files that the configuration names are opened",
    ),
    "a torch file beside the weights": (
        lambda f: (f / "prior.pt").write_bytes(saved_by_torch(f)),
        "only files that the configuration names are opened",
    ),
    "a shard that nobody names": (
        lambda f: (f / "prior-00002-of-00002.safetensors").write_bytes(b"hello"),
        "only files that the configuration names are opened",
    ),
    "an index that is a pipe beside one file": (
        lambda f: os.mkfifo(f / INDEX_NAME),
        "one file needs no index, and a pipe is never opened",
    ),
    "a card of billion laughs": (lambda f: (f / "README.md").write_text(LAUGHS + "---\n"), "loading does not read the card"),
    "a card of 100 MB": (
        lambda f: os.truncate(f / "README.md", 100_000_000),
        "loading does not read the card; `check --strict` and pushing refuse it",
    ),
    "a card that makes Python objects": (
        lambda f: (f / "README.md").write_text("---\na: !!python/object/apply:os.system [exit]\n---\n"),
        "loading does not read the card, and pushing reads it with the safe loader",
    ),
    "a card that is a pipe": (
        replaced("README.md", os.mkfifo),
        "loading does not read the card",
    ),
    "a key that nobody knows": (config(**{"__class__": "os.system"}), "unknown keys warn, are named and are left out"),
    "a newer minor version": (config(format_version="1.7"), "what is new is left out with a warning"),
    "names that look like paths": (
        lambda f: edit_config(f, head_parameters=["../../etc/passwd", "a\\b", "x\u202ey"]),
        "names of parameters are compared and shown, never opened",
    ),
}
