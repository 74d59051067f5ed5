"""What is fuzzed: each target takes bytes, and raises `Finding` where prior_hub crashes, or accepts what is not true.

    config    bytes of prior_config.json, in a folder whose weights are good
    index     bytes of prior.safetensors.index.json, in a folder of several files
    reader    bytes of prior.safetensors; its hash in the configuration is put right, so that the hash does not hide the parser
    matcher   a seed, from which names and shapes of a prior and a model are made
    card      bytes of README.md
    legacy    bytes of somebody's .pt file

A crash is any error but a `PriorHubError`. An accepted lie is a prior that loads, but whose tensors are not those that a reader
of our own (numpy alone, below) and the safetensors library find in the file, or whose configuration is not what its JSON says,
or says twice.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import random
import struct
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from priors_for_tests import bits, random_prior, tensors_of

from prior_hub.cli.look import show_info
from prior_hub.errors import PriorHubError
from prior_hub.model import PriorModel
from prior_hub.priors.config import PriorConfig
from prior_hub.priors.matching import match_names
from prior_hub.priors.storage import INDEX_NAME
from prior_hub.registry.card import render_card, split_card, update_card

CONFIG, WEIGHTS = "prior_config.json", "prior.safetensors"
TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "U8": "u1", "BOOL": "u1"}


class Finding(AssertionError):
    """A crash or an accepted lie; the text begins with which."""


class Pairs(list):  # type: ignore[type-arg]
    """A JSON object as the file has it: its pairs in order, none dropped."""


def pairs_of(text: bytes) -> Any:
    """JSON, with objects as lists of pairs: what is there twice is seen twice."""
    return json.loads(text, object_pairs_hook=Pairs)


def doubled(value: Any) -> bool:
    """Whether an object in it has a key twice."""
    if isinstance(value, Pairs):
        return len({k for k, _ in value}) < len(value) or any(doubled(v) for _, v in value)
    return isinstance(value, list) and any(map(doubled, value))


def independent(content: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Key -> (type, shape, bytes) of a safetensors file, by numpy and json alone; a key that is there twice is a `Finding`."""
    (length,) = struct.unpack("<Q", content[:8])
    found = pairs_of(content[8 : 8 + length])
    if doubled(found):
        raise Finding("accepted lie: a header with a key twice")
    tensors = {}
    for key, entry in found:
        if key != "__metadata__":
            fields = dict(entry)
            start, stop = fields["data_offsets"]
            data = content[8 + length :][start:stop]
            if fields["dtype"] in TYPES:
                assert np.frombuffer(data, TYPES[fields["dtype"]]).size == math.prod(fields["shape"])
            tensors[key] = (fields["dtype"], tuple(fields["shape"]), data)
    return tensors


def compare(prior: PriorModel, folder: Path) -> None:
    """A `Finding` where a prior that was loaded is not what its files hold."""
    held: dict[str, tuple[str, tuple[int, ...], bytes]] = {}
    for name in prior.config.weight_files:
        content = (folder / name).read_bytes()
        held |= independent(content)
        library = safetensors.numpy.load(content) if b'"BF16"' not in content and b'"F8' not in content else {}
        for key, array in library.items():
            if array.tobytes() != held[key][2] or array.shape != held[key][1]:
                raise Finding(f"accepted lie: the safetensors library reads {key!r} otherwise")
    loaded = tensors_of(prior)
    if loaded.keys() != held.keys():
        raise Finding(f"accepted lie: keys {sorted(loaded.keys() ^ held.keys())[:3]}")
    for key, tensor in loaded.items():
        if tuple(tensor.shape) != held[key][1] or bits(tensor) != held[key][2]:
            raise Finding(f"accepted lie: {key!r} is not what the file has")


def compare_config(config: PriorConfig, text: bytes) -> None:
    """A `Finding` where a configuration that was read is not what its JSON says."""
    found = pairs_of(text)
    if doubled(found):
        raise Finding("accepted lie: a configuration with a key twice")
    said = json.loads(text)
    for name in (
        "rank",
        "parameters",
        "scale",
        "eps",
        "weight_files",
        "head_parameters",
        "buffers",
        "tied_parameters",
        "dtype",
    ):
        value = getattr(config, name)
        plain = json.loads(json.dumps(value))
        there = (
            float(said[name]) if isinstance(value, float) and name in said else said.get(name)
        )  # 10**30 may be meant as 1e30
        if name in said and plain != there:
            raise Finding(f"accepted lie: {name} is {plain!r}, the file says {said[name]!r}"[:500])
    if any(n < 0 for shape in config.parameters.values() for n in shape):
        raise Finding("accepted lie: a negative shape")


class Targets:
    """The targets, with a scratch folder; `executions`, `refused` and `accepted` count what was run."""

    def __init__(self, root: Path) -> None:
        self.single, self.sharded, self.legacy_folder = root / "single", root / "sharded", root / "legacy"
        random_prior().save_pretrained(self.single)
        random_prior().save_pretrained(self.sharded, max_shard_size=150)
        self.legacy_folder.mkdir()
        self.config_text, self.weights = (self.single / CONFIG).read_bytes(), (self.single / WEIGHTS).read_bytes()
        self.index_text = (self.sharded / INDEX_NAME).read_bytes()
        self.executions = self.refused = self.accepted = 0

    # ----------------------------------------------------------------------------------------------------- corpus

    def seeds(self, target: str) -> list[bytes]:
        """Good inputs to start from."""
        if target == "config":
            return [self.config_text, json.dumps(json.loads(self.config_text)).encode()]
        if target == "index":
            return [self.index_text]
        if target == "reader":
            return [self.weights]
        if target == "card":
            text = render_card(PriorConfig.from_json(self.config_text))
            return [
                text.encode(),
                b"---\nlicense: mit\ntags: [a, b]\nx: &a {b: 1}\ny: *a\n---\n\n# Mine\n\ntext\n",
                b"no metadata",
            ]
        if target == "legacy":
            return legacy_seeds()
        return [struct.pack("<Q", seed) for seed in range(8)]

    def run(self, target: str, data: bytes) -> None:
        """One execution.

        Raises:
            Finding: a crash or an accepted lie.
        """
        self.executions += 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                getattr(self, f"_{target}")(data)
                self.accepted += 1
            except PriorHubError as error:
                self.refused += 1
                if len(str(error)) > 3000:
                    raise Finding(f"crash: an error of {len(str(error))} characters") from error
            except Finding:
                raise
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                raise Finding(f"crash: {type(error).__name__}: {str(error)[:300]}") from error

    # ---------------------------------------------------------------------------------------------------- targets

    def _config(self, data: bytes) -> None:
        (self.single / WEIGHTS).write_bytes(self.weights)
        (self.single / CONFIG).write_bytes(data)
        try:
            config = PriorConfig.from_json(data)
            compare_config(config, data)
            with contextlib.redirect_stdout(io.StringIO()):
                show_info(config, "x", None)
            split_card(render_card(config))
            if PriorConfig.from_json(config.to_json()) != config:
                raise Finding("accepted lie: a configuration that changes when it is written")
            for options in ({}, {"verify": False}, {"rank": 1}, {"rank": 0}):
                with contextlib.suppress(ValueError) if "rank" in options else contextlib.nullcontext():
                    prior = PriorModel.from_pretrained(self.single, **options)
                    repr(prior)
                    if "rank" not in options:
                        compare(prior, self.single)
        finally:
            (self.single / CONFIG).write_bytes(self.config_text)

    def _index(self, data: bytes) -> None:
        (self.sharded / INDEX_NAME).write_bytes(data)
        prior = PriorModel.from_pretrained(self.sharded, verify=False)
        compare(prior, self.sharded)
        if doubled(pairs_of(data)):
            raise Finding("accepted lie: an index with a key twice")
        there = {key: name for name in prior.config.weight_files for key in independent((self.sharded / name).read_bytes())}
        if json.loads(data)["weight_map"] != there:
            raise Finding("accepted lie: an index that is not of these files")

    def _reader(self, data: bytes) -> None:
        (self.single / WEIGHTS).write_bytes(data)
        config = json.loads(self.config_text)
        config["weight_files"] = {WEIGHTS: hashlib.sha256(data).hexdigest()}
        (self.single / CONFIG).write_text(json.dumps(config))
        loose = PriorModel.from_pretrained(self.single, verify=False)
        compare(loose, self.single)
        prior = PriorModel.from_pretrained(self.single)
        compare(prior, self.single)
        if not all(bool(t.isfinite().all()) for t in tensors_of(prior).values() if t.is_floating_point()):
            raise Finding("accepted lie: values that are not finite")
        if any(bool((v <= 0).any()) for v in prior.variance.values()) and prior.gaussian.eps == 0:
            raise Finding("accepted lie: variances that are not positive")

    def _card(self, data: bytes) -> None:
        try:
            text = data.decode()
        except UnicodeDecodeError:
            return
        metadata, body = split_card(text.removeprefix("\ufeff"))  # which joining takes off
        split_card(text)
        rendered = render_card(PriorConfig.from_json(self.config_text), repo_id="org/name")
        merged = update_card(text, rendered, repo_id="org/name")
        again, _ = split_card(merged)
        if again.get("library_name") not in ("prior-hub", metadata.get("library_name")):
            raise Finding("accepted lie: the metadata of the card are lost")
        if "prior_hub:" not in text:  # with its own comments in it, what is between them is rendered anew
            for line in body.replace("\r\n", "\n").split("\n"):
                if line.strip() and line.strip() not in merged.replace("\r\n", "\n"):
                    raise Finding(f"accepted lie: a person's line is lost: {line[:80]!r}")

    def _legacy(self, data: bytes) -> None:
        for old in self.legacy_folder.iterdir():
            old.unlink()
        (self.legacy_folder / "checkpoint.pt").write_bytes(data)
        try:
            prior = PriorModel.from_legacy(self.legacy_folder, head=None)
        except ValueError as error:  # settings that no Gaussian has
            if isinstance(error, PriorHubError):
                raise
            return
        prior.gaussian.check()

    def _matcher(self, data: bytes) -> None:
        match_once(random.Random(data))


# ------------------------------------------------------------------------------------------------------------- matcher

WORDS = (
    "conv1",
    "weight",
    "bias",
    "layer",
    "0",
    "1",
    "2",
    "10",
    "head",
    "fc",
    "bn",
    "encoder",
    "",
    "a b",
    "ü",
    "(.*)",
    "\\",
    "module",
    "x.",
)


def match_once(rng: random.Random) -> None:
    """Random names and shapes of a prior and of a model that may hold it: it binds rightly, or is refused as PriorHubError."""

    def name() -> str:
        return ".".join(rng.choice(WORDS) for _ in range(rng.randint(1, 4)))

    def shape() -> tuple[int, ...]:
        return tuple(rng.choice((0, 1, 2, 3, 3, 8)) for _ in range(rng.randint(0, 3)))

    def prefix() -> str:
        return rng.choice(("", "", "model.", "resnet.", "a.b.", "0.", "module.", ".", "layer."))

    prior = {name() or "x": shape() for _ in range(rng.randint(1, 8))}
    add = prefix()
    model = {add + n: s for n, s in prior.items() if rng.random() < 0.95}
    whole = len(model) == len(prior)
    extra: dict[str, tuple[int, ...]] = {}
    for _ in range(rng.randint(0, 4)):
        extra[prefix() + name()] = shape()
    if rng.random() < 0.15:  # a second copy of the network
        other = prefix()
        extra |= {other + n: s for n, s in prior.items()}
    if rng.random() < 0.2 and model:
        model[rng.choice(list(model))] = shape()
        whole = False
    model = {**extra, **model} if rng.random() < 0.5 else {**model, **extra}
    names = list(model)
    aliases = {name(): rng.choice(names) for _ in range(rng.randint(0, 2))} if names else {}
    aliases = {alias: target for alias, target in aliases.items() if alias not in model}
    tied = {name(): rng.choice(list(prior)) for _ in range(rng.randint(0, 2))}
    tied = {alias: target for alias, target in tied.items() if alias not in prior}
    head = [n for n in prior if rng.random() < 0.15]
    options: dict[str, Any] = {
        "include_head": rng.random() < 0.2,
        "on_mismatch": rng.choice(("error", "drop")),
        "min_coverage": rng.choice((0.0, 0.5, 1.0)),
    }
    match = match_names(prior, model, aliases=aliases, tied_parameters=tied, head_parameters=head, **options)
    str(match)
    for source, target in match.pairs.items():
        if prior[source] != model[target]:
            raise Finding(f"accepted lie: {source!r} {prior[source]} bound to {target!r} {model[target]}")
        spelled = {match.add + n.removeprefix(match.strip) for n in (source, *(a for a, t in tied.items() if t == source))}
        if target not in spelled | {aliases.get(n) for n in spelled}:
            raise Finding(f"accepted lie: {source!r} bound to {target!r} by ({match.strip!r}, {match.add!r})")
    if len(set(match.pairs.values())) < len(match.pairs):
        raise Finding("accepted lie: two parameters in one place")
    if not options["include_head"] and set(head) & set(match.pairs):
        raise Finding("accepted lie: the head was bound")
    parts = [*match.pairs, *match.marginalised, *match.dropped, *match.excluded_head]
    if sorted(parts) != sorted(prior):
        raise Finding("accepted lie: parameters are missing from the report")
    if whole and not extra and not aliases and not tied and match.pairs != {n: add + n for n in prior if n in match.pairs}:
        kept = all(n == target for n, target in match.pairs.items())  # the names as they are fit too: that is what is taken
        if not kept and len(match.pairs) == len(prior) and sum(map(math.prod, prior.values())):
            raise Finding(f"accepted lie: {match.pairs} where the network is under {add!r}"[:500])


# -------------------------------------------------------------------------------------------------------------- legacy


def legacy_seeds() -> list[bytes]:
    """Checkpoints of swa_gaussian, in both formats of torch.save, and other files of tensors."""
    generator = torch.Generator().manual_seed(0)
    state: dict[str, Any] = {"n_models": torch.tensor([4])}
    for name, shape in (("fc.weight", (3, 2)), ("fc.bias", (3,))):
        rows = torch.randn(4, *shape, generator=generator)
        state |= {
            f"base.{name}_mean": rows.mean(0),
            f"base.{name}_sq_mean": rows.square().mean(0) + 1e-3,
            f"base.{name}_cov_mat_sqrt": (rows - rows.mean(0)).reshape(4, -1),
        }
    found = []
    for value, modern in ((state, True), (state, False), ({"state_dict": state}, True), (torch.zeros(3), True)):
        buffer = io.BytesIO()
        torch.save(value, buffer, _use_new_zipfile_serialization=modern)
        found.append(buffer.getvalue())
    return found


# ------------------------------------------------------------------------------------------------------------ mutation

TOKENS: tuple[bytes, ...] = (
    *(
        b"{}",
        b"[]",
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b'"',
        b"\\",
        b"\0",
        b"\xff",
        b"\xef\xbb\xbf",
        b"null",
        b"true",
        b"-",
        b".",
    ),
    *(
        b"NaN",
        b"1e400",
        b"1e308",
        b"0.0",
        b"-0",
        b"-1",
        b"9007199254740993",
        b"18446744073709551616",
        b"1" * 400,
        b"\\ud800",
        b"\\u0000",
    ),
    *(
        b'"F32"',
        b'"F64"',
        b'"BF16"',
        b'"BOOL"',
        b'"F8_E4M3"',
        b'"I32"',
        b"__metadata__",
        b"data_offsets",
        b"dtype",
        b"shape",
        b"..",
        b"/",
    ),
    *(
        b"mean.",
        b"variance.",
        b"deviations.",
        b"buffer.",
        b"---\n",
        b"&a ",
        b"*a",
        b"<<: ",
        b"!!python/object ",
        b"? ",
        b"- ",
        b"\n",
        b"\r\n",
    ),
)
ODD: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        3,
        4,
        2**31,
        2**53,
        2**63,
        2**64,
        10**30,
        0.0,
        4.0,
        1e308,
        5e-324,
        -0.0,
        "",
        "F32",
        "F64",
        "x",
        "../x",
    ),
    *(
        "\ud800",
        "\0",
        "\u202e",
        [],
        {},
        [0],
        [1, 2],
        [[]],
        {"a": 1},
        "prior.safetensors",
        "0" * 64,
        "principal directions",
        "mean.layer.bias",
    ),
)


def mutate(target: str, data: bytes, corpus: list[bytes], rng: random.Random) -> bytes:
    """Another input: bytes flipped, cut, repeated, spliced with another's; or JSON changed at one of its places."""
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        if target == "reader" and rng.random() < 0.8 and len(data) > 8:
            length = min(struct.unpack("<Q", data[:8])[0], len(data) - 8)
            text, rest = data[8 : 8 + length], data[8 + length :]
            if rng.random() < 0.75:
                text = _json(text, rng) if rng.random() < 0.7 else _bytes(text, corpus, rng, 8)
            else:
                rest = _bytes(rest, corpus, rng, 8)
            data = struct.pack("<Q", len(text)) + text + rest
        elif target in ("config", "index") and rng.random() < 0.6:
            data = _json(data, rng)
        else:
            data = _bytes(data, corpus, rng, 0)
    return data[: 1 << 16]


def _bytes(data: bytes, corpus: list[bytes], rng: random.Random, skip: int) -> bytes:
    content = bytearray(data)
    place = rng.randrange(len(content) + 1)
    stop = min(len(content), place + rng.choice((1, 1, 2, 4, 8, 64, 1000)))
    action = rng.randrange(7)
    if action == 0 and place < len(content):
        content[place] ^= 1 << rng.randrange(8)
    elif action == 1:
        content[place:stop] = b""
    elif action == 2:
        content[place:place] = content[place:stop] * rng.choice((1, 1, 3))
    elif action == 3:
        content[place:place] = rng.choice(TOKENS)
    elif action == 4:
        content[place:stop] = rng.choice(TOKENS)
    elif action == 5:
        other = rng.choice(corpus)
        start = rng.randrange(len(other) + 1)
        content[place:stop] = other[start : start + rng.choice((4, 32, 500))]
    elif place + 4 <= len(content):
        special = (math.nan, math.inf, -1.0, 0.0, 1e-45, 3e38, 1e25)
        place -= (place - skip) % 4 if place >= 4 + skip else 0
        content[place : place + 4] = struct.pack("<f", rng.choice(special))
    return bytes(content)


def _json(text: bytes, rng: random.Random) -> bytes:
    """JSON with one of its places changed, or one of its pairs twice; bytes that are none are left alone."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    spots: list[tuple[Any, Any]] = []
    stack = [value]
    while stack:
        item = stack.pop()
        for key in list(item) if isinstance(item, dict) else range(len(item)) if isinstance(item, list) else ():
            spots.append((item, key))
            stack.append(item[key])
    if not spots:
        return text
    item, key = rng.choice(spots)
    action = rng.randrange(6)
    if action == 0:
        item[key] = rng.choice(ODD)
    elif action == 1:
        del item[key]
    elif action == 2:
        other, at = rng.choice(spots)
        with contextlib.suppress(KeyError, IndexError):
            item[key] = json.loads(json.dumps(other[at]))
    elif action == 3 and isinstance(item, dict):
        new = rng.choice(list(item)) + rng.choice(("", "x", "\0", ".", "é"))
        item[new] = item.pop(key)
    elif action == 4 and isinstance(item[key], int):
        item[key] = item[key] + rng.choice((-4, -1, 1, 4, 2**32, 2**64))
    else:
        pair = json.dumps({str(key): rng.choice((item[key], *ODD))})[1:-1].encode()
        whole = json.dumps(value).encode()
        inside = json.dumps(item).encode()
        return whole.replace(inside, inside[:-1] + (b", " if len(inside) > 2 else b"") + pair + inside[-1:], 1)
    return json.dumps(value).encode()


def scratch() -> tempfile.TemporaryDirectory[str]:
    """A folder in memory where there is one."""
    shm = Path("/dev/shm")
    return tempfile.TemporaryDirectory(prefix="prior-hub-fuzz-", dir=shm if shm.is_dir() else None)


TARGETS: tuple[str, ...] = ("config", "index", "reader", "matcher", "card", "legacy")
