"""Hostile priors are refused: in time, in little memory, with an error that says what was found, and nothing is ever run.

The table is in hostile_priors.py. All of it is read in one process of its own (worker_hostile.py), whose highest mark of memory
is reset before each.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile_priors import IGNORED, REFUSED, join, parts, sign
from priors_for_tests import assert_same, random_prior
from worker_hostile import status

import prior_hub
from prior_hub.errors import PriorFormatError, PriorHubError, PriorWarning
from prior_hub.model import PriorModel
from prior_hub.priors import storage, tensor_files
from prior_hub.priors.config import _MAX_PARSED_BYTES, MAX_CONFIG_BYTES, PriorConfig, parse_json, parsed_bytes

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self")
MOST_BYTES = 200_000_000
MOST_SECONDS = 2.0


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> dict[str, Path]:
    """A good prior, in one file and in several."""
    root = tmp_path_factory.mktemp("good")
    random_prior().save_pretrained(root / "single")
    random_prior().save_pretrained(root / "sharded", max_shard_size=120)
    return {form: root / form for form in ("single", "sharded")}


@pytest.fixture(scope="module")
def outcomes(good, tmp_path_factory) -> dict[tuple[str, str], dict[str, Any]]:
    """(name, way to read) -> what came of it, for every prior of the table and the good ones."""
    root, worker = tmp_path_factory.mktemp("hostile"), Path(__file__).with_name("worker_hostile.py")
    folders = {str(path): f"good {form}" for form, path in good.items()}
    for number, (name, case) in enumerate(REFUSED.items()):
        folder = root / f"{number:03d}"
        shutil.copytree(good[case.form], folder)
        case.make(folder)
        folders[str(folder)] = name
    (root / "list.json").write_text(json.dumps(list(folders)))
    try:
        done = subprocess.run(
            [sys.executable, str(worker), str(root / "list.json"), str(root / "results")],
            env=os.environ | {"PYTHONPATH": str(Path(prior_hub.__file__).parents[1])},
            capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
        lines = [json.loads(line) for line in (root / "results").read_text().splitlines()]
        last = folders[lines[-1]["folder"]] if lines else "nothing"
        assert done.returncode == 0, f"the reader died after {last}: {done.returncode}\n{done.stderr[-2000:]}"
        assert not list(root.glob("*/exploded")), "something was unpickled"
        return {(folders[line["folder"]], line["way"]): line for line in lines}
    finally:
        shutil.rmtree(root, ignore_errors=True)


@pytest.mark.slow
@linux
def test_good_priors_are_read_in_every_way_as_the_control(outcomes):
    for form in ("single", "sharded"):
        for way in ("verified", "unverified", "check", "info"):
            assert outcomes[f"good {form}", way]["kind"] == ""


@pytest.mark.slow
@linux
@pytest.mark.parametrize("name", REFUSED)
def test_a_hostile_prior_is_refused_in_time_in_little_memory_and_in_words(outcomes, name):
    case = REFUSED[name]
    ways = ["verified", "check", *(["unverified"] if case.unverified else []), *(["info"] if case.config else [])]
    for way in ways:
        found = outcomes[name, way]
        assert found["kind"] == case.kind, f"{way}: {found}"
        assert not case.words or any(word in found["message"] for word in case.words), f"{way}: {found}"
        assert len(found["message"]) < 1500
    for way in ("verified", "unverified", "check", "info"):  # those that may accept it too
        found = outcomes[name, way]
        assert found["kind"] in ("", case.kind), f"{way}: {found}"
        assert found["seconds"] < MOST_SECONDS, f"{way}: {found}"
        assert found["bytes"] < MOST_BYTES, f"{way}: {found}"


def test_the_table_is_as_long_as_was_asked_for():
    assert len(REFUSED) >= 60


@pytest.mark.parametrize("name", IGNORED)
def test_what_must_not_matter_does_not(good, tmp_path, name):
    make, reason = IGNORED[name]
    assert reason
    folder = tmp_path / "prior"
    shutil.copytree(good["single"], folder)
    make(folder)
    if "newer" in name or "nobody knows" in name:
        with pytest.warns(PriorWarning):
            found = PriorModel.from_pretrained(folder)
    else:
        found = PriorModel.from_pretrained(folder)
    expected = random_prior()
    found = PriorModel(
        found.gaussian,
        found.config.replace(format_version="1.0", head_parameters=expected.config.head_parameters),
        found.buffers,
    )
    assert_same(found, expected)
    assert not (folder / "exploded").exists()


# ----------------------------------------------------------------------------------------------- while it is being read
def test_a_file_that_shrinks_while_it_is_read_is_called_that(good, tmp_path, monkeypatch):
    path = tmp_path / "x"
    shutil.copy(good["single"] / "prior.safetensors", path)
    monkeypatch.setattr(tensor_files, "BLOCK", 256)
    with pytest.raises(PriorFormatError, match="became shorter"):
        tensor_files.verify_file(path, {"mean.layer.weight": None}, advance=lambda _: os.truncate(path, 300))


def test_a_file_that_grows_while_it_is_read_has_the_hash_of_what_was_there(good, tmp_path, monkeypatch):
    path = tmp_path / "x"
    shutil.copy(good["single"] / "prior.safetensors", path)
    expected = storage.file_sha256(path)
    monkeypatch.setattr(tensor_files, "BLOCK", 256)

    def grow(_: int) -> None:
        with path.open("ab") as file:
            file.write(b"more")

    assert tensor_files.verify_file(path, {"mean.layer.weight": None}, advance=grow)[0] == expected


def test_a_weight_file_replaced_between_its_header_and_its_map_is_noticed(good, tmp_path, monkeypatch):
    folder = tmp_path / "prior"
    shutil.copytree(good["single"], folder)
    real = storage.open_tensors

    def swapped(path):
        header, data = parts(path)
        header["mean.other"] = header.pop("mean.layer.bias")
        path.write_bytes(join(header, data))
        return real(path)

    monkeypatch.setattr(storage, "open_tensors", swapped)
    with pytest.raises(PriorFormatError, match="changed while it was opened"):
        PriorModel.from_pretrained(folder, verify=False)


# -------------------------------------------------------------------------------------------------------------- bounds
TEXTS = {
    "lists": b"[" + b"[]," * 30_000 + b"1]",
    "objects": b"[" + b"{}," * 30_000 + b"1]",
    "pairs": b"{" + b'"a":0,' * 30_000 + b'"a":0}',
    "keys": b"{" + b",".join(b'"%d":0' % i for i in range(30_000)) + b"}",
    "numbers": b"[" + b"1.5," * 30_000 + b"1]",
    "texts": b"[" + b'"ab",' * 30_000 + b"1]",
    "emoji": b'["' + "\U0001f600".encode() * 30_000 + b'"]',
    "accents": b'["' + "é".encode() * 30_000 + b'", "\xe6\x97\xa5"]',
    "one text": b'["' + b"a" * 1_000_000 + b'"]',
    "small objects": b"[" + b'{"a":[],"b":{}},' * 10_000 + b"1]",
    "entries": b"{" + b",".join(b'"%d":{"dtype":"F32","shape":[4,3],"data_offsets":[0,16]}' % i for i in range(10_000)) + b"}",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_no_more_memory_is_taken_than_was_estimated_before_parsing(text):
    import tracemalloc

    tracemalloc.start()
    try:
        with contextlib.suppress(PriorFormatError):  # a key more than once
            parse_json(text, where="x")
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak - 8192 <= parsed_bytes(text) <= 8 * peak


def test_a_model_of_100_000_parameters_is_far_from_the_bounds():
    count = 5000  # everything grows with the number
    names = [f"model.decoder.layers.{i // 100}.block_sparse_moe.experts.{i % 100}.down_proj.weight" for i in range(count)]
    config = PriorConfig(
        parameters=dict.fromkeys(names, (4096, 14336 // 4096)), rank=20, diagonal_weight=0.5, low_rank_weight=0.1
    )
    text = config.to_json()  # which reads it again
    assert parsed_bytes(text.encode()) < 0.8 * _MAX_PARSED_BYTES * count / 100_000
    limits = storage._limits(config)
    entry = {"dtype": "BF16", "shape": [20, 4096, 14336], "data_offsets": [10**14, 10**14 + 10**9]}
    header = json.dumps({f"{kind}.{name}": entry for kind in ("mean", "variance", "deviations") for name in names}).encode()
    limits.refuse_more(header, "the header")  # does not
    mapping = {f"{kind}.{n}": "prior-00001-of-00100.safetensors" for kind in ("mean", "variance", "deviations") for n in names}
    text = json.dumps({"weight_map": mapping}, indent=2)
    limits.refuse_more(text.encode(), "the index")
    assert max(len(header), len(text)) < 0.9 * min(MAX_CONFIG_BYTES, 100_000_000) * count / 100_000  # safetensors' own bound


@pytest.mark.parametrize(
    "names", [['ü/\\ "q"{[,:'], ["\x01\x02\x1f"], ["日本語" * 20, "\U0001f600" * 100], ["{" * 1000, "," * 1000]]
)
def test_odd_names_need_no_more_than_is_allowed_however_they_are_written(names, tmp_path):
    prior = random_prior(shapes=dict.fromkeys(names, (2, 1, 1, 1, 3)))
    prior.save_pretrained(tmp_path, max_shard_size=40)
    for path in tmp_path.glob("*.safetensors"):
        header, data = parts(path)
        path.write_bytes(join(json.dumps(header, indent=4, ensure_ascii=True).encode(), data))
    index = tmp_path / storage.INDEX_NAME
    index.write_text(json.dumps(json.loads(index.read_text()), indent=8, ensure_ascii=True))
    sign(tmp_path)
    assert_same(PriorModel.from_pretrained(tmp_path), prior)


def test_the_golden_folder_and_every_refusal_are_told_apart_by_the_reader_alone(good):
    """The control of the header's reader: what it reads of good files is what safetensors reads."""
    from safetensors import safe_open

    for path in [*good["single"].glob("*.safetensors"), *good["sharded"].glob("*.safetensors")]:
        entries, _ = tensor_files.read_header(path, tensor_files.Limits(10**6, 10**6))
        with safe_open(path, "pt") as file:
            assert {k: e.shape for k, e in entries.items()} == {k: tuple(file.get_slice(k).get_shape()) for k in file.keys()}  # noqa: SIM118


def test_errors_are_of_one_family():
    assert issubclass(PriorFormatError, PriorHubError)


# --------------------------------------------------------------------------------------------------- other people's files
def _zip(entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(f"archive/{name}", content)
    return buffer.getvalue()


def _torch(value: object, modern: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=modern)
    return buffer.getvalue()


def _bytearray() -> bytes:
    return b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R."


def _listed_forever() -> list[object]:
    value: list[object] = []
    value.append(value)
    return value


def _large_directory() -> bytes:
    content = bytearray(_zip({"data.pkl": b"N."}))
    at = content.rindex(b"PK\x05\x06")
    content[at + 12 : at + 16] = (2**30).to_bytes(4, "little")
    return bytes(content)


LEGACY: dict[str, tuple[Callable[[], bytes], str]] = {
    "a zip bomb": (lambda: _zip({"data.pkl": bytes(300_000_000), "version": b"3"}, zipfile.ZIP_DEFLATED), "compressed archive"),
    "a compressed record": (
        lambda: _zip({"data.pkl": b"\x80\x02N.", "data/0": bytes(10_000), "version": b"3"}, zipfile.ZIP_DEFLATED),
        "compressed archive",
    ),
    "20 MB of empty lists": (lambda: _zip({"data.pkl": b"\x80\x02" + b"]" * 20_000_000 + b"."}), "bytes of instructions"),
    "a million empty lists": (lambda: _zip({"data.pkl": b"\x80\x02" + b"]" * 1_000_000 + b"."}), "instructions"),
    "the old format, 50 MB of empty lists": (lambda: b"\x80\x02" + b"]" * 50_000_000 + b".", "instructions"),
    "an array of bytes of any size": (_bytearray, "bytearray"),
    "the same in an archive": (lambda: _zip({"data.pkl": _bytearray(), "version": b"3"}), "bytearray"),
    "a tensor of a terabyte with a stride of 0": (
        lambda: _torch(torch.zeros(1).expand(2**38)),
        "not stored as so many numbers",
    ),
    "the same in the old format": (lambda: _torch(torch.zeros(1).expand(2**38), modern=False), "not stored as so many numbers"),
    "the same in a checkpoint": (lambda: _torch({"a_sq_mean": torch.zeros(1).expand(2**38)}), "not stored as so many numbers"),
    "a tensor without numbers": (lambda: _torch(torch.zeros(3, device="meta")), "not stored as so many numbers"),
    "a sparse tensor": (lambda: _torch(torch.eye(3).to_sparse()), "only dense tensors"),
    "a list that contains itself": (lambda: _torch(_listed_forever()), "contains itself"),
    "a list of files of a gigabyte": (_large_directory, "lists files in"),
    "an archive that is cut": (lambda: _zip({"data.pkl": bytes(1000)})[:500], "cannot be read"),
    "nothing": (lambda: b"", "cannot be read"),
}


@linux
@pytest.mark.parametrize("name", LEGACY)
def test_a_hostile_file_of_others_is_refused_before_it_takes_memory(tmp_path, name):
    make, words = LEGACY[name]
    (tmp_path / "prior.pt").write_bytes(make())
    Path("/proc/self/clear_refs").write_text("5")
    before, start = status("VmRSS"), time.process_time()
    with pytest.raises(PriorFormatError, match=words):
        PriorModel.from_legacy(tmp_path)
    assert time.process_time() - start < 2 * MOST_SECONDS
    assert status("VmHWM") - before < MOST_BYTES


@linux
def test_a_pipe_among_other_peoples_files_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "prior.pt")
    with pytest.raises(PriorHubError):
        PriorModel.from_legacy(tmp_path)
    with pytest.raises(PriorHubError):
        PriorModel.from_legacy(tmp_path / "prior.pt")


# --------------------------------------------------------------------------------------------------------- publishing
def test_a_card_that_is_a_link_to_a_secret_is_not_published(good, tmp_path):
    folder = tmp_path / "prior"
    shutil.copytree(good["single"], folder)
    (tmp_path / "secret").write_text("my key")
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to(tmp_path / "secret")
    with pytest.raises(PriorFormatError, match="outside the prior's folder"):
        storage.prior_files(folder, storage.read_config(folder))
