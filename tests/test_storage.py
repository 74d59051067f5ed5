"""Format 1.0 on disk: what is written comes back bit for bit; what was altered, truncated or forged is refused in words."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib
import json
import os
import pickle
import shutil
import stat
import struct
import subprocess
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from priors_for_tests import (
    SHAPES,
    assert_same,
    bits,
    differences,
    edit_config,
    random_prior,
    tensors_of,
)
from safetensors.torch import load_file, save_file
from safetensors.torch import save as safetensors_bytes
from test_config import mutated_configs

from prior_hub.errors import PriorFormatError, PriorHubError, PriorNotFoundError, PriorNumericsError, PriorWarning
from prior_hub.model import PriorModel
from prior_hub.priors import storage, tensor_files
from prior_hub.priors.config import MAX_CONFIG_BYTES
from prior_hub.priors.storage import INDEX_NAME, parse_size, prior_files, read_config, read_prior, write_prior

GOLDEN = Path(__file__).parent / "golden" / "format-1.0"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text(encoding="utf-8"))
SHARD = 200  # bytes: the SHAPES at rank 3 make several files


@pytest.fixture
def folder(tmp_path) -> Path:
    """A prior in one file."""
    random_prior().save_pretrained(tmp_path / "prior")
    return tmp_path / "prior"


@pytest.fixture
def sharded(tmp_path) -> Path:
    """The same prior in several files."""
    random_prior().save_pretrained(tmp_path / "sharded", max_shard_size=SHARD)
    return tmp_path / "sharded"


def saved_and_loaded(prior: PriorModel, folder: Path, **options: Any) -> PriorModel:
    prior.save_pretrained(folder, **options)
    return PriorModel.from_pretrained(folder)


def weight_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors"))


def sign(folder: Path) -> None:
    """Record the hashes of the weight files as they are now: what a forger, or a buggy writer, would do."""
    edit_config(
        folder, weight_files={name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in weight_files(folder)}
    )


def edit_tensors(folder: Path, name: str = "prior.safetensors", **changes: torch.Tensor | None) -> None:
    """Replace, add or (None) remove tensors of a weight file; "__" stands for a dot."""
    tensors = load_file(folder / name)
    tensors |= {key.replace("__", "."): value for key, value in changes.items()}
    save_file({key: value.clone() for key, value in tensors.items() if value is not None}, folder / name)


def raw_safetensors(header: dict | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def refused(folder: Path, *words: str, kind: type[Exception] = PriorFormatError, **options: Any) -> str:
    """The message of the error, which has these words and is readable."""
    with pytest.raises(kind) as caught:
        PriorModel.from_pretrained(folder, **options)
    message = str(caught.value)
    for word in words:
        assert word in message
    assert len(message) < 1500
    return message


# ---------------------------------------------------------------------------------------------------------- round trip
@pytest.mark.parametrize("rank", [0, 1, 2, 20])
@pytest.mark.parametrize("shard", ["5GB", SHARD])
def test_a_prior_comes_back_bit_for_bit_from_one_file_and_from_many(tmp_path, rank, shard):
    prior = random_prior(rank=rank)
    found = saved_and_loaded(prior, tmp_path, max_shard_size=shard)
    assert_same(found, prior)
    assert len(weight_files(tmp_path)) == len(found.config.weight_files)
    assert (len(found.config.weight_files) > 1) == (tmp_path / INDEX_NAME).is_file() == (shard != "5GB")


@pytest.mark.parametrize("deviations", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("mean", [torch.float32, torch.float64])
def test_every_stored_type_comes_back_as_itself(tmp_path, mean, deviations):
    prior = random_prior(mean=mean, deviations=deviations)
    found = saved_and_loaded(prior, tmp_path)
    assert_same(found, prior)
    assert found.deviations["layer.bias"].dtype == deviations
    assert found.variance["layer.bias"].dtype == mean


def test_buffers_of_any_type_come_back_with_their_values(tmp_path):
    buffers = {
        "bn.num_batches_tracked": torch.tensor(2**53 + 1),
        "seen": torch.tensor([True, False]),
        "counts": torch.arange(3, dtype=torch.uint8),
        "half": torch.tensor([0.5], dtype=torch.bfloat16),
        "nothing": torch.zeros(0, 3),
    }
    prior = random_prior()
    prior = PriorModel(prior.gaussian, prior.config.replace(buffers=tuple(buffers)), buffers)
    found = saved_and_loaded(prior, tmp_path)
    assert_same(found, prior)
    assert found.buffers["bn.num_batches_tracked"].item() == 2**53 + 1


def test_extreme_numbers_come_back_bit_for_bit(tmp_path):
    values = torch.tensor([-0.0, 1e-45, 3.4e38, -1e-38, 1 + 2**-23])
    tiny = torch.full((5,), 1e-45)
    prior = PriorModel.from_tensors({"w": values}, {"w": tiny}, {"w": torch.stack([values, -values])}, scale=5e-324, eps=1e-30)
    assert_same(saved_and_loaded(prior, tmp_path), prior)


NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)
SMALL_SHAPES = st.lists(st.integers(0, 3), max_size=4).map(tuple)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=st.dictionaries(NAMES, SMALL_SHAPES, min_size=1, max_size=4),
    rank=st.integers(0, 4),
    deviations=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    shard=st.integers(1, 400),
    seed=st.integers(0, 2**31),
)
def test_any_names_and_shapes_come_back_bit_for_bit(tmp_path, shapes, rank, deviations, shard, seed):
    prior = random_prior(seed, rank, shapes, deviations=deviations)
    assert_same(saved_and_loaded(prior, tmp_path, max_shard_size=shard), prior)


def test_tensors_that_share_memory_are_written_once_per_name(tmp_path):
    ones, flat = torch.ones(4), torch.arange(1.0, 9)
    mean = {"a": flat[:4], "b": flat[2:6], "c": flat[4:]}
    prior = PriorModel.from_tensors(mean, dict.fromkeys("abc", ones), {n: ones.expand(3, 4) for n in "abc"})
    assert_same(saved_and_loaded(prior, tmp_path), prior)


def test_parameters_that_need_gradients_and_odd_strides_can_be_saved(tmp_path):
    weight = torch.nn.Parameter(torch.randn(4, 6)).t()
    prior = PriorModel.from_tensors({"w": weight}, {"w": torch.ones(6, 4)}, {"w": torch.randn(6, 4, 3).permute(2, 0, 1)})
    found = saved_and_loaded(prior, tmp_path)
    assert differences(found, prior) == []
    assert not found.mean["w"].requires_grad


def test_a_prior_can_be_saved_over_the_files_it_is_mapped_from(folder):
    expected = random_prior()
    lazy = PriorModel.from_pretrained(folder, verify=False)
    lazy.save_pretrained(folder, max_shard_size=SHARD)
    assert_same(PriorModel.from_pretrained(folder), expected)
    assert_same(lazy, expected)


@pytest.mark.parametrize("limit", [1, 50, SHARD, 10_000])
def test_shards_keep_to_the_limit_but_for_single_larger_tensors(tmp_path, limit):
    prior = random_prior()
    config = write_prior(tmp_path, prior.config, tensors_of(prior), max_shard_size=limit)
    for name in config.weight_files:
        tensors = load_file(tmp_path / name)
        assert len(tensors) == 1 or sum(t.numel() * t.element_size() for t in tensors.values()) <= limit
    if limit < 10_000:
        index = json.loads((tmp_path / INDEX_NAME).read_text())
        assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors_of(prior).values())
        assert index["weight_map"].keys() == tensors_of(prior).keys()


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("500MB", 5 * 10**8), ("1.5 kB", 1500), ("2KiB", 2048), ("1GiB", 2**30), ("7B", 7), (9, 9)],
)
def test_sizes_are_read_as_the_hub_writes_them(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["5", "GB", "-1GB", "0MB", "5 gigabytes", 0, -3, ""])
def test_a_size_that_is_none_is_refused_with_an_example(text):
    with pytest.raises(ValueError, match=r"max_shard_size is.*expected"):
        parse_size(text)


# ---------------------------------------------------------------------------------------------------------- one file
STORABLE = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64, torch.uint64,
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.float8_e8m0fnu, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
]  # fmt: skip


def written(path: Path, tensors: dict[str, torch.Tensor], **options: Any) -> bytes:
    """The content of the file that we write, whose hash is the one that we say."""
    layout = {key: tensor_files.spec_of(tensor) for key, tensor in tensors.items()}
    digest = tensor_files.write_file(path, layout, tensors.__getitem__, **options)
    content = path.read_bytes()
    assert digest == hashlib.sha256(content).hexdigest()
    return content


def test_a_file_is_byte_for_byte_the_one_that_safetensors_writes(tmp_path):
    noise = torch.arange(48, dtype=torch.int64).mul(2654435761).remainder(251).to(torch.uint8)
    tensors = {
        f"t{i}": noise[: 6 * d.itemsize].clone().view(d).reshape(2, 3) for i, d in enumerate(STORABLE) if d.itemsize <= 8
    }
    tensors["t0"] = torch.tensor([[True, False, True]] * 2)
    tensors |= {
        '"quoted"\\/é\u2028\x01\x7f😀': torch.ones(()),
        "ü.empty": torch.zeros(0, 3),
        "a": torch.ones(3).half(),
        "Z": torch.ones(1),
    }
    assert len(tensors) == len(STORABLE) + 4
    metadata = {"format": 'pt\n"'}
    reference = safetensors_bytes(tensors, metadata=metadata)
    assert written(tmp_path / "x", dict(reversed(tensors.items())), metadata=metadata) == reference
    assert written(tmp_path / "x", {}) == safetensors_bytes({})
    assert written(tmp_path / "x", {"a": torch.ones(1)}) == safetensors_bytes({"a": torch.ones(1)})


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.lists(st.integers(0, 7), max_size=4),
    order=st.randoms(use_true_random=False),
    step=st.integers(1, 3),
    block=st.sampled_from([8, 16, 64, 1024]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float64]),
)
def test_tensors_of_any_strides_are_written_in_blocks_as_if_they_were_contiguous(tmp_path, shape, order, step, block, dtype):
    axes = list(range(len(shape)))
    order.shuffle(axes)
    tensor = torch.randn(shape).to(dtype).permute(axes)
    tensor = tensor[::step] if tensor.ndim else tensor
    copied: list[int] = []
    real = tensor_files._little_endian
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_files, "BLOCK", block)
        patch.setattr(tensor_files, "_little_endian", lambda flat: (copied.append(flat.nbytes), real(flat))[1])
        content = written(tmp_path / "x", {"t": tensor})
    assert content == safetensors_bytes({"t": tensor.contiguous()})
    assert max(copied, default=0) <= block


class Slow:
    """SHA-256 that begins long after the caller has gone on."""

    def __init__(self):
        self.hash = hashlib.sha256()

    def update(self, data):
        time.sleep(0.005)
        self.hash.update(data)

    def hexdigest(self):
        return self.hash.hexdigest()


def test_a_block_is_hashed_before_its_buffer_is_filled_again(tmp_path, monkeypatch):
    tensor = torch.randn(100, 50).t()
    expected = hashlib.sha256(safetensors_bytes({"t": tensor.contiguous()})).hexdigest()
    monkeypatch.setattr(tensor_files, "BLOCK", 2048)
    monkeypatch.setattr(tensor_files, "_THREADED_FROM", 1)
    monkeypatch.setattr(tensor_files, "hashlib", SimpleNamespace(sha256=Slow))
    assert tensor_files.write_file(tmp_path / "x", {"t": tensor_files.spec_of(tensor)}, lambda _: tensor) == expected
    assert tensor_files.verify_file(tmp_path / "x", {"t": None}) == (expected, {})


def test_conjugated_and_negated_views_are_written_with_their_values(tmp_path):
    tensor = torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex64)
    views = {"conj": tensor.conj(), "imag": tensor.conj().imag}
    written(tmp_path / "x", views)
    for key, found in load_file(tmp_path / "x").items():
        assert torch.equal(found, views[key]), key


def test_a_type_that_safetensors_does_not_have_is_named(tmp_path):
    with pytest.raises(PriorFormatError, match=r"w is of torch.complex128"):
        written(tmp_path / "x", {"w": torch.ones(1, dtype=torch.complex128)})
    assert not (tmp_path / "x").exists()


def test_a_full_disk_is_an_error_that_names_the_file():
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with pytest.raises(OSError, match="cannot write the file") as caught:
        written(Path("/dev/full"), {"w": torch.ones(5000)})
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, "/dev/full")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_value_that_is_not_finite_is_counted_while_writing_and_while_verifying(tmp_path, dtype, monkeypatch):
    monkeypatch.setattr(tensor_files, "BLOCK", 1024)
    monkeypatch.setattr(tensor_files, "_LANES", 100)
    values = torch.randn(3, 701).to(dtype)
    values[0, 0], values[1, 350], values[2, 700] = float("nan"), float("inf"), -float("inf")
    values[0, 1:5] = torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).tiny, -0.0, torch.finfo(dtype).min], dtype=dtype)
    for rows in (1, 2, 3):
        with pytest.raises(PriorNumericsError, match=rf"w has {rows} of {rows * 701} entries that are NaN or infinite"):
            written(tmp_path / "x", {"w": values[:rows]}, finite=True)
    content = written(tmp_path / "x", {"other": torch.full((9,), float("nan")), "w": values})
    for wanted, bad in (({"w": None}, {"w": (3, 2103)}), ({"w": 2}, {"w": (2, 1402)}), ({"w": 1}, {"w": (1, 701)}), (None, {})):
        assert tensor_files.verify_file(tmp_path / "x", wanted) == (hashlib.sha256(content).hexdigest(), bad)
    good = torch.where(values.isfinite(), values, torch.zeros((), dtype=dtype))
    written(tmp_path / "x", {"w": good}, finite=True)
    assert tensor_files.verify_file(tmp_path / "x", {"w": None})[1] == {}


@pytest.mark.gpu
def test_tensors_on_an_accelerator_are_written_a_block_at_a_time(tmp_path):
    prior = random_prior()
    moved = PriorModel(prior.gaussian.to("cuda"), prior.config, prior.buffers)
    assert_same(saved_and_loaded(moved, tmp_path / "small"), prior)
    large = torch.randn(4, 2**22, device="cuda").t()  # 64 MiB, not contiguous
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    content = written(tmp_path / "x", {"w": large}, finite=True)
    assert torch.cuda.max_memory_allocated() - before < 3 * tensor_files.BLOCK
    assert content == safetensors_bytes({"w": large.cpu().contiguous()})


# ---------------------------------------------------------------------------------------------------------- made on access
class Made(Mapping):
    """The tensors of a prior, each made when it is asked for; notes what is asked, and what is still held by then."""

    def __init__(self, prior: PriorModel, change: Any = lambda key, tensor: tensor):
        self.tensors, self.change = tensors_of(prior), change
        self.asked: list[str] = []
        self.last = lambda: None
        self.held: list[str] = []

    def __getitem__(self, key):
        if self.last() is not None and not self.asked[-1].startswith("buffer."):  # which are small, and kept
            self.held.append(self.asked[-1])
        tensor = self.tensors[key]
        memory = np.frombuffer(bytearray(bits(tensor)), np.uint8)  # goes when the last tensor that shares it goes
        self.asked.append(key)
        self.last = weakref.ref(memory)
        return self.change(key, torch.from_numpy(memory).view(tensor.dtype).reshape(tensor.shape))

    def __iter__(self):
        return iter(self.tensors)

    def __len__(self):
        return len(self.tensors)


@pytest.mark.parametrize("shard", ["5GB", SHARD])
def test_tensors_may_be_made_on_access_once_each_and_are_let_go_of(tmp_path, shard, monkeypatch):
    monkeypatch.setattr(tensor_files, "_THREADED_FROM", 1)
    monkeypatch.setattr(tensor_files, "hashlib", SimpleNamespace(sha256=Slow))
    prior = random_prior(deviations=torch.bfloat16)
    made = Made(prior)
    config = write_prior(tmp_path / "made", prior.config, made, max_shard_size=shard)
    assert sorted(made.asked) == sorted(made)
    assert made.held == []
    assert config == write_prior(tmp_path / "there", prior.config, tensors_of(prior), max_shard_size=shard)
    assert_same(PriorModel.from_pretrained(tmp_path / "made"), prior)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda t: t.double(), PriorFormatError, r"torch.float64 of shape \[2, 4\], declared as torch.float32 \[2, 4\]"),
        (lambda t: t[:1], PriorFormatError, r"of shape \[1, 4\], declared as"),
        (lambda t: t / 0, PriorNumericsError, "8 of 8 entries"),
    ],
)
@pytest.mark.parametrize("saved", [True, False])
def test_after_an_error_in_the_middle_the_folder_is_as_it_was(tmp_path, change, error, words, saved):
    folder = tmp_path / "a" / "b"
    if saved:
        random_prior().save_pretrained(folder)
    before = {path.name: path.read_bytes() for path in folder.glob("*")}
    made = Made(random_prior(1), lambda key, tensor: change(tensor) if key == "variance.head.weight" else tensor)
    with pytest.raises(error, match=words):
        write_prior(folder, random_prior(1).config, made, max_shard_size=SHARD)
    assert len(made.asked) > 6, "it happened in the middle"
    assert {path.name: path.read_bytes() for path in folder.glob("*")} == before
    assert (tmp_path / "a").exists() == saved


def test_a_save_that_waited_for_one_that_failed_makes_the_folder_again(tmp_path):
    pytest.importorskip("fcntl")
    folder = tmp_path / "a" / "b"
    waiting = threading.Thread(target=random_prior().save_pretrained, args=(folder,))

    def fail() -> None:
        with storage._exclusive(folder):
            waiting.start()
            time.sleep(0.3)  # by now it waits
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    waiting.join(30)
    assert_same(PriorModel.from_pretrained(folder), random_prior())


# ---------------------------------------------------------------------------------------------------------- progress
def test_long_writing_and_verifying_is_shown_unless_the_client_is_told_not_to(tmp_path, monkeypatch, capsys):
    client = importlib.import_module("huggingface_hub.utils.tqdm")
    monkeypatch.setattr(client, "HF_HUB_DISABLE_PROGRESS_BARS", None)  # the environment's, read when it was imported

    def shown(name: str) -> str:
        random_prior().save_pretrained(tmp_path / name, max_shard_size=SHARD)
        PriorModel.from_pretrained(tmp_path / name)
        return capsys.readouterr().err

    assert shown("short") == ""
    monkeypatch.setattr(tensor_files, "_SHOWN_FROM", 1)
    text = shown("long")
    assert "Writing long: 100%" in text
    assert "Verifying long: 100%" in text
    monkeypatch.setattr(client, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    assert shown("silent") == ""


# ---------------------------------------------------------------------------------------------------------- rank
@pytest.mark.parametrize("shard", ["5GB", SHARD])
@pytest.mark.parametrize("kept", [0, 1, 2, 3, 5])
def test_loading_with_a_rank_is_truncating_to_it(tmp_path, kept, shard):
    prior = random_prior(rank=5, deviations=torch.bfloat16)
    prior.save_pretrained(tmp_path, max_shard_size=shard)
    assert_same(PriorModel.from_pretrained(tmp_path, rank=kept), prior.truncated(kept))


def test_a_rank_the_prior_does_not_have_is_refused(folder):
    for rank in (-1, 4):
        with pytest.raises(ValueError, match=f"rank {rank} is not between 0 and 3"):
            PriorModel.from_pretrained(folder, rank=rank)


def test_rows_beyond_the_rank_are_not_looked_at(folder):
    rows = load_file(folder / "prior.safetensors")["deviations.layer.weight"]
    rows[2:] = float("nan")
    edit_tensors(folder, deviations__layer__weight=rows)
    refused(folder, "sha256")
    for options in ({"verify": False}, {}):
        if not options:
            sign(folder)
        found = PriorModel.from_pretrained(folder, rank=2, **options)
        assert_same(found, random_prior().truncated(2))
    refused(folder, "deviations.layer.weight", "12 of 36 entries", kind=PriorNumericsError)


def peak_memory_of(action: Any) -> int:
    """Bytes by which the resident memory of a fork of this process grows at most while it does `action`."""
    receive, send = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the threads of the loopback Hub do not matter to the child
        child = os.fork()
    if not child:
        try:
            torch.set_num_threads(1)  # the pool of the parent's threads is not there
            status = Path("/proc/self/status")
            Path("/proc/self/clear_refs").write_text("5")  # reset the peak
            before = int(status.read_text().split("VmRSS:")[1].split()[0])
            result = action()
            peak = int(status.read_text().split("VmHWM:")[1].split()[0])
            os.write(send, f"{(peak - before) * 1024} {result}".encode())
        finally:
            os._exit(0)
    os.close(send)
    with os.fdopen(receive) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    assert answer, "the child died"
    return int(answer.split()[0])


@pytest.fixture
def large(tmp_path) -> Path:
    """A prior of 8 deviations of 64 MiB, nearly all of it a hole in the file; only its configuration was written honestly."""
    size = 2**24
    folder = tmp_path / "large"
    PriorModel.from_tensors({"w": torch.zeros(1)}, {"w": torch.ones(1)}, {"w": torch.zeros(8, 1)}).save_pretrained(folder)
    keys = {"deviations.w": 8, "mean.w": 1, "variance.w": 1}
    header, start = {}, 0
    for key, rows in keys.items():
        shape = [rows, size] if rows > 1 else [size]
        header[key] = {"dtype": "F32", "shape": shape, "data_offsets": [start, start := start + 4 * rows * size]}
    content = raw_safetensors(header)
    with (folder / "prior.safetensors").open("wb") as file:
        file.write(content)
        file.truncate(len(content) + start)
    edit_config(folder, parameters={"w": [size]}, num_parameters=size)
    return folder


linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures memory through /proc")


@linux
def test_without_verification_640_mb_are_mapped_and_not_read(large):
    assert peak_memory_of(lambda: read_prior(large, verify=False).deviations["w"][7, 5].item()) < 30_000_000
    # the measurement can fail: one read of all values is seen
    assert peak_memory_of(lambda: read_prior(large, verify=False).deviations["w"].sum().item()) > 400_000_000


@linux
def test_with_a_rank_only_the_first_rows_are_read(large):
    def total(rank: int) -> float:
        return read_prior(large, rank=rank, verify=False).deviations["w"].sum().item()

    assert 100_000_000 < peak_memory_of(lambda: total(2)) < 200_000_000  # two rows of eight: 128 MiB


@linux
def test_with_a_rank_of_0_and_for_a_few_values_only_their_bytes_are_read(large):
    def diagonal() -> float:
        found = read_prior(large, rank=0, verify=False)
        assert found.deviations == {}
        return float(found.mean["w"].sum() + found.variance["w"].sum())

    assert 100_000_000 < peak_memory_of(diagonal) < 180_000_000  # two of ten: 128 MiB
    assert peak_memory_of(lambda: read_prior(large, rank=0, verify=False).variance["w"][:1000].sum().item()) < 30_000_000


@linux
def test_a_process_with_a_share_reads_only_that_share(large):
    def share(kind: str, name: str, tensor: torch.Tensor) -> torch.Tensor:
        assert (kind, name, tuple(tensor.shape)) in ARGUMENTS
        return tensor.chunk(4, dim=tensor.ndim - 1)[1]

    size = 2**24
    ARGUMENTS = {("mean", "w", (size,)), ("variance", "w", (size,)), ("deviations", "w", (8, size))}

    def total(copy: bool) -> float:
        found = read_prior(large, verify=False, cut=lambda *given: share(*given).clone() if copy else share(*given))
        assert found.deviations["w"].shape == (8, size // 4)
        return float(found.deviations["w"].sum() + found.mean["w"].sum() + found.variance["w"].sum())

    for copy in (False, True):  # a quarter of 640 MiB: 160 MiB mapped, and as much again where it is copied
        assert 120_000_000 * (1 + copy) < peak_memory_of(lambda copy=copy: total(copy)) < 200_000_000 * (1 + copy)


@pytest.mark.parametrize("shard", ["5GB", SHARD])
def test_the_parts_that_are_cut_are_those_of_the_whole_prior(tmp_path, shard):
    prior = random_prior(rank=5)
    prior.save_pretrained(tmp_path, max_shard_size=shard)
    found = read_prior(tmp_path, rank=3, cut=lambda kind, name, t: t[..., :2] if name == "head.weight" else t)
    assert torch.equal(found.deviations["head.weight"], prior.deviations["head.weight"][:3, :, :2])
    assert torch.equal(found.mean["head.weight"], prior.mean["head.weight"][:, :2])
    assert torch.equal(found.variance["layer.weight"], prior.variance["layer.weight"])
    assert found.buffers.keys() == prior.buffers.keys()


def bytes_read_by(action: Any) -> int:
    """Bytes that a fork of this process asks the system for while it does `action`; mapped pages are not among them."""

    def count() -> int:
        return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])

    receive, send = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if not child:
        try:
            before = count()
            action()
            os.write(send, str(count() - before).encode())
        finally:
            os._exit(0)
    os.close(send)
    with os.fdopen(receive) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    assert answer, "the child died"
    return int(answer)


@linux
def test_verifying_reads_each_byte_once_and_holds_none_of_them(large):
    edit_config(large, weight_files={"prior.safetensors": storage.file_sha256(large / "prior.safetensors")})
    size = (large / "prior.safetensors").stat().st_size
    assert size <= bytes_read_by(lambda: read_prior(large)) < size + 100_000
    assert bytes_read_by(lambda: read_prior(large, verify=False)) < 100_000
    assert peak_memory_of(lambda: read_prior(large)) < 60_000_000  # two blocks of 8 MiB, and what hashing needs


@pytest.mark.slow
def test_a_thread_that_outlives_the_main_thread_saves_and_loads(tmp_path):
    program = """
import sys, threading
sys.path.insert(0, sys.argv[1])
from priors_for_tests import assert_same, random_prior
from prior_hub import PriorModel
from prior_hub.priors import tensor_files
tensor_files._THREADED_FROM = 1
prior = random_prior()
def work():
    threading.main_thread().join()
    prior.save_pretrained(sys.argv[2], max_shard_size=200)
    assert_same(PriorModel.from_pretrained(sys.argv[2]), prior)
    print("done")
threading.Thread(target=work).start()
"""
    command = [sys.executable, "-c", program, str(Path(__file__).parent), str(tmp_path / "prior")]
    done = subprocess.run(command, timeout=120, check=False, capture_output=True, text=True)
    assert done.stdout == "done\n", done.stderr


def test_a_reader_that_is_disturbed_again_and_again_makes_the_saves_wait(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    random_prior().save_pretrained(tmp_path)
    real, free = storage._read, []

    def read(folder, *arguments):
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # what a save does
            free.append(True)
        except BlockingIOError:
            free.append(False)
        finally:
            os.close(handle)
        return real(folder, *arguments)

    monkeypatch.setattr(storage, "_read", read)
    monkeypatch.setattr(storage, "_state", lambda folder: (object(),))  # another save each time it is looked at
    assert_same(PriorModel.from_pretrained(tmp_path), random_prior())
    assert free[:-1] == [True] * 20
    assert not free[-1]


def test_when_one_task_fails_those_that_wait_are_not_begun():
    begun = []

    def task(number):
        begun.append(number)
        if number == 1:
            raise KeyError(number)
        time.sleep(0.05)

    with pytest.raises(KeyError):
        tensor_files.side_by_side([partial(task, number) for number in range(50)], 2)
    assert len(begun) < 10
    assert tensor_files.side_by_side([partial(divmod, number, 2) for number in range(5)], 3) == [divmod(n, 2) for n in range(5)]


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system takes no advice")
def test_a_file_system_that_takes_no_advice_is_read(folder, monkeypatch):
    def refuses(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(os, "posix_fadvise", refuses)
    read_prior(folder)


def test_buffers_are_in_the_memory_of_the_cpu_whatever_device_tensors_are_made_on_by_default(tmp_path):
    strided = torch.arange(6.0).reshape(2, 3).T
    with torch.device("meta"):  # what torch.set_default_device("cuda") does
        tensor_files.write_file(tmp_path / "x", {"t": tensor_files.spec_of(strided)}, lambda _: strided)
    assert torch.equal(load_file(tmp_path / "x")["t"], strided)


@pytest.mark.parametrize("offsets", [[0, 7], [-4, 4], [8, 0]])
def test_a_file_whose_header_changed_after_it_was_opened_is_called_that(tmp_path, offsets):
    header = json.dumps({"t": {"dtype": "F32", "shape": [2], "data_offsets": offsets}}).encode()
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(PriorFormatError, match="changed while it was read"):
        tensor_files.verify_file(tmp_path / "x", {"t": None})


@linux
@pytest.mark.slow
@pytest.mark.parametrize("strided", [False, True])
def test_writing_holds_a_few_blocks_beyond_the_tensors(tmp_path, strided):
    shape = (2000, 10_000)  # 80 MB; with two rows 320 MB in all
    spread = torch.randn(2, *shape[::-1]).transpose(1, 2) if strided else torch.randn(2, *shape)
    assert spread.is_contiguous() != strided
    prior = PriorModel.from_tensors({"w": spread[0]}, {"w": spread[0].square().add_(1e-3)}, {"w": spread})
    first = tmp_path / "prior"
    written = peak_memory_of(lambda: write_prior(first, prior.config, tensors_of(prior)))
    assert written < 64_000_000
    assert_same(PriorModel.from_pretrained(first), prior)


# ---------------------------------------------------------------------------------------------------------- golden
@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_the_golden_folder_of_format_1_0_still_gives_exactly_these_numbers(kind):
    prior = PriorModel.from_pretrained(GOLDEN / kind)
    names = {"F32": torch.float32, "F64": torch.float64, "BF16": torch.bfloat16, "I64": torch.int64}
    found = tensors_of(prior)
    assert sorted(found) == sorted(EXPECTED["tensors"])
    for key, entry in EXPECTED["tensors"].items():
        assert found[key].dtype == names[entry["dtype"]]
        assert list(found[key].shape) == entry["shape"]
        assert found[key].tolist() == entry["values"], key
    for key, value in EXPECTED["settings"].items():
        assert getattr(prior.config, key) == value
    assert (prior.gaussian.scale, prior.gaussian.eps) == (EXPECTED["settings"]["scale"], EXPECTED["settings"]["eps"])


def test_the_golden_prior_has_the_penalty_of_the_dense_formula():
    prior = PriorModel.from_pretrained(GOLDEN / "single")
    zero = {name: torch.zeros_like(mean) for name, mean in prior.mean.items()}
    # float32 elementwise work: 30 values, each rounded a few times
    assert prior.penalty(zero).item() == pytest.approx(EXPECTED["penalty_at_zero"], rel=3e-6)


def test_the_golden_configuration_keeps_its_meaning():
    config = read_config(GOLDEN / "single")
    assert config.format_version == "1.0"
    assert config.tied_parameters == {"decoder.weight": "encoder.0.weight"}
    assert config.head_parameters == ("head.bias",)
    assert config.buffers == ("bn.running_mean", "bn.num_batches_tracked")
    assert config.parameters == {"encoder.0.weight": (2, 3), "encoder.0.bias": (2,), "scale": (), "head.bias": (2,)}
    assert (config.base_model, config.license) == ("org/golden-net", "apache-2.0")
    assert config.source["dataset"] == "org/golden-images"
    assert config.replace(weight_files={}) == read_config(GOLDEN / "sharded").replace(weight_files={})


def test_golden_files_have_the_layout_of_format_1_0():
    assert weight_files(GOLDEN / "single") == ["prior.safetensors"]
    assert weight_files(GOLDEN / "sharded") == [f"prior-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    for kind in ("single", "sharded"):
        names = {path.name for path in prior_files(GOLDEN / kind, read_config(GOLDEN / kind))}
        assert names == {path.name for path in (GOLDEN / kind).iterdir()}


# ---------------------------------------------------------------------------------------------------------- not there
def test_a_missing_folder_is_named(tmp_path):
    refused(tmp_path / "nope", "nope", kind=PriorNotFoundError)


def test_a_folder_without_a_prior_says_what_it_holds_and_where_to_look(tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).touch()
    refused(tmp_path, "no prior_config.json", "config.json, model.safetensors", "subfolder=", kind=PriorNotFoundError)
    refused(tmp_path, "not a folder", kind=PriorNotFoundError, subfolder="deeper")


def test_a_prior_in_a_subfolder_is_found(folder):
    folder.rename(folder.parent / "inner")
    assert_same(PriorModel.from_pretrained(folder.parent, subfolder="inner"), random_prior())


def test_the_weights_file_itself_is_not_taken_for_a_folder(folder):
    refused(folder / "prior.safetensors", "prior.safetensors", kind=PriorNotFoundError)


# ---------------------------------------------------------------------------------------------------------- altered
@pytest.mark.parametrize("place", [0, 8, 40, -1])
def test_a_flipped_bit_is_found_by_its_hash(folder, place):
    path = folder / "prior.safetensors"
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    refused(folder, "prior.safetensors", "sha256", "altered", "download it again")


@pytest.mark.parametrize("keep", [0, 7, 8, 100, -1])
@pytest.mark.parametrize("verify", [True, False])
def test_a_truncated_file_is_refused_with_and_without_verification(folder, keep, verify):
    path = folder / "prior.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(folder, "prior.safetensors", "truncated", verify=verify)


def test_a_missing_shard_is_named_and_counted(sharded):
    names = weight_files(sharded)
    (sharded / names[1]).unlink()
    refused(sharded, names[1], f"1 of {len(names)} weight files")


def test_a_configuration_without_weight_files_is_refused(folder):
    edit_config(folder, weight_files={})
    refused(folder, "lists no weight files")


def test_the_hash_of_another_file_is_refused(sharded):
    names = weight_files(sharded)
    first, second = ((sharded / name).read_bytes() for name in names[:2])
    (sharded / names[0]).write_bytes(second)
    (sharded / names[1]).write_bytes(first)
    refused(sharded, "sha256")


@pytest.mark.parametrize(
    ("kind", "value", "words"),
    [("mean", float("nan"), "NaN"), ("mean", float("inf"), "infinite"), ("variance", float("nan"), "NaN"),
     ("deviations", -float("inf"), "infinite")],
)  # fmt: skip
def test_values_that_are_not_finite_are_refused_although_their_hash_is_right(folder, kind, value, words):
    key = f"{kind}.layer.weight"
    tensor = load_file(folder / "prior.safetensors")[key]
    tensor.view(-1)[5] = value
    edit_tensors(folder, **{key.replace(".", "__"): tensor})
    sign(folder)
    refused(folder, key, "1 of", words, kind=PriorNumericsError)


@pytest.mark.parametrize("value", [0.0, -1e-3])
def test_a_variance_that_is_not_positive_is_refused_and_counted(folder, value):
    variance = load_file(folder / "prior.safetensors")["variance.layer.bias"]
    variance[1:3] = value
    edit_tensors(folder, variance__layer__bias=variance)
    sign(folder)
    edit_config(folder, eps=0.0)
    refused(folder, "variance of 'layer.bias'", "2 of 4 entries <= 0", "variance_floor", kind=PriorNumericsError)


# ---------------------------------------------------------------------------------------------------------- layout
def test_a_missing_tensor_is_named(folder):
    edit_tensors(folder, variance__layer__bias=None)
    sign(folder)
    refused(folder, "lacks variance.layer.bias")


@pytest.mark.parametrize("key", ["mean.extra", "buffer.extra", "deviations.extra"])
def test_an_undeclared_tensor_is_named(folder, key):
    edit_tensors(folder, **{key.replace(".", "__"): torch.zeros(2)})
    sign(folder)
    refused(folder, f"has undeclared {key}")


@pytest.mark.parametrize("key", ["weight", "model.layer.weight", "mean"])
def test_a_key_that_is_none_of_the_format_is_named(folder, key):
    edit_tensors(folder, **{key.replace(".", "__"): torch.zeros(2)})
    sign(folder)
    refused(folder, f"'{key}' is no key of format 1.0")


def test_a_wrong_shape_is_shown_beside_the_right_one(folder):
    edit_tensors(folder, mean__layer__bias=torch.zeros(5))
    sign(folder)
    refused(folder, "mean.layer.bias has shape [5]", "[4]")


def test_a_wrong_number_of_deviations_is_a_wrong_shape(folder):
    edit_config(folder, rank=4)
    refused(folder, "deviations.layer.weight has shape [3, 4, 3]", "[4, 4, 3]")


@pytest.mark.parametrize("key", ["mean.layer.bias", "variance.layer.bias", "deviations.layer.bias"])
def test_a_wrong_type_is_shown_beside_the_right_one(folder, key):
    tensor = load_file(folder / "prior.safetensors")[key]
    edit_tensors(folder, **{key.replace(".", "__"): tensor.double()})
    sign(folder)
    refused(folder, f"{key} is stored as float64", "says float32")


def test_a_key_in_two_shards_is_refused(sharded):
    first, second = weight_files(sharded)[:2]
    key, tensor = next(iter(load_file(sharded / first).items()))
    edit_tensors(sharded, second, **{key.replace(".", "__"): tensor})
    sign(sharded)
    refused(sharded, key, f"stands in {first} too")


# ---------------------------------------------------------------------------------------------------------- index
def edit_index(folder: Path, **changes: Any) -> None:
    path = folder / INDEX_NAME
    index = json.loads(path.read_text())
    index["weight_map"] |= {key.replace("__", "."): file for key, file in changes.items()}
    path.write_text(json.dumps(index))


def test_a_missing_index_is_named(sharded):
    (sharded / INDEX_NAME).unlink()
    refused(sharded, INDEX_NAME, "missing")


@pytest.mark.parametrize("text", ["[]", "{}", '{"weight_map": []}', '{"weight_map": null}', "null", '"x"'])
def test_an_index_without_a_map_is_refused(sharded, text):
    (sharded / INDEX_NAME).write_text(text)
    refused(sharded, INDEX_NAME, "no 'weight_map'")


@pytest.mark.parametrize(
    "name", ["../evil.safetensors", "/etc/passwd", "model.safetensors", "a/prior.safetensors", "..", None, 3, ["x"]]
)
def test_an_index_cannot_lead_out_of_the_folder(sharded, name):
    save_file({"mean.layer.bias": torch.zeros(4)}, sharded.parent / "evil.safetensors")
    edit_index(sharded, mean__layer__bias=name)
    refused(sharded, "is no name for a prior's weights")


def test_an_index_may_name_only_files_of_the_configuration(sharded):
    other = "prior-00001-of-00099.safetensors"
    shutil.copy(sharded / weight_files(sharded)[0], sharded / other)
    edit_index(sharded, mean__layer__bias=other)
    refused(sharded, f"names {other}", "configuration does not list")


def test_an_index_that_disagrees_with_the_files_is_refused(sharded):
    edit_index(sharded, mean__layer__weight=weight_files(sharded)[-1])
    refused(sharded, "mean.layer.weight in the wrong file (1 keys differ)")


def test_an_index_that_names_more_or_fewer_keys_is_refused(sharded):
    index = json.loads((sharded / INDEX_NAME).read_text())
    more = index["weight_map"] | {"mean.other": weight_files(sharded)[0]}
    fewer = dict(list(index["weight_map"].items())[1:])
    for mapping in (more, fewer):
        (sharded / INDEX_NAME).write_text(json.dumps(index | {"weight_map": mapping}))
        refused(sharded, "(1 keys differ)")


# ---------------------------------------------------------------------------------------------------------- hostile
def test_sizes_are_compared_before_anything_is_allocated(folder, monkeypatch):
    monkeypatch.setattr(storage, "_verify", lambda *_: None)  # which reads what there is
    real = storage.open_tensors

    @contextlib.contextmanager
    def opened(path):
        with real(path) as handle:
            allowed = ("keys", "get_slice")
            yield SimpleNamespace(**{name: getattr(handle, name) for name in allowed})  # no get_tensor

    monkeypatch.setattr(storage, "open_tensors", opened)
    edit_config(folder, parameters=SHAPES | {"layer.bias": [2**20, 2**20]}, num_parameters=2**40 + 21)
    refused(folder, "mean.layer.bias has shape [4]", f"[{2**20}, {2**20}]")


def test_a_configuration_of_70_mb_is_refused_unread(folder, monkeypatch):
    with (folder / "prior_config.json").open("r+b") as file:
        file.truncate(70_000_000)
    monkeypatch.setattr(Path, "read_bytes", lambda self: pytest.fail("it was read"))
    refused(folder, "prior_config.json has 70000000 bytes", f"more than the {MAX_CONFIG_BYTES}")


F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
HEADERS = {
    "header length beyond the file": raw_safetensors({}, length=2**40),
    "header length of 2**63": raw_safetensors({}, length=2**63),
    "header that is no JSON": raw_safetensors(b"hello world"),
    "offsets beyond the data": raw_safetensors({"mean.a": F32 | {"shape": [1000], "data_offsets": [0, 4000]}}, b"1234"),
    "overlapping tensors": raw_safetensors({"mean.a": F32, "variance.a": F32}, b"1234"),
    "a hole between tensors": raw_safetensors({"mean.a": F32, "variance.a": F32 | {"data_offsets": [8, 12]}}, bytes(12)),
    "data that no tensor has": raw_safetensors({"mean.a": F32}, bytes(8)),
    "a shape that is not the size": raw_safetensors({"mean.a": F32 | {"shape": [2]}}, bytes(4)),
    "a shape that overflows": raw_safetensors({"mean.a": F32 | {"shape": [2**32, 2**32]}}, bytes(4)),
    "offsets backwards": raw_safetensors({"mean.a": F32 | {"data_offsets": [4, 0]}}, bytes(4)),
    "negative offsets": raw_safetensors({"mean.a": F32 | {"data_offsets": [-4, 0]}}, bytes(4)),
    "an unknown type": raw_safetensors({"mean.a": F32 | {"dtype": "F3"}}, bytes(4)),
    "a header that is a list": raw_safetensors([]),
    "an HTML page": b"<!DOCTYPE html><html>Not found</html>",
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12\n",
}  # fmt: skip


@pytest.mark.parametrize("content", HEADERS.values(), ids=HEADERS.keys())
def test_a_lying_safetensors_header_is_refused(folder, content):
    (folder / "prior.safetensors").write_bytes(content)
    sign(folder)
    refused(folder, "prior.safetensors is not a valid safetensors file")


@pytest.mark.parametrize("dtype", ["BOOL", "U8", "I64", "F8_E4M3", "F8_E8M0", "F4", "F6_E2M3", "C64", "U16", "F64"])
def test_parameters_of_a_type_the_format_does_not_know_are_refused(tmp_path, dtype):
    random_prior(rank=0, shapes={"a": (8,)}, buffers=False).save_pretrained(tmp_path)
    size = {"BOOL": 8, "U8": 8, "I64": 64, "F8_E4M3": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6, "C64": 64, "U16": 16, "F64": 64}[
        dtype
    ]
    header = {
        "mean.a": {"dtype": dtype, "shape": [8], "data_offsets": [0, size]},
        "variance.a": {"dtype": "F32", "shape": [8], "data_offsets": [size, size + 32]},
    }
    (tmp_path / "prior.safetensors").write_bytes(raw_safetensors(header, bytes(size) + np.ones(8, "<f4").tobytes()))
    sign(tmp_path)
    with pytest.raises(PriorFormatError, match=r"mean\.a is stored as|not a valid safetensors"):
        PriorModel.from_pretrained(tmp_path)


class Bomb:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


def test_a_pickle_under_a_weights_name_is_never_unpickled(folder):
    trace = folder.parent / "exploded"
    pickle.loads(pickle.dumps(Bomb(trace)))
    assert trace.exists(), "the bomb works"
    trace.unlink()
    for content in (pickle.dumps(Bomb(trace)), None):
        if content is None:
            torch.save({"mean.layer.bias": torch.zeros(4), "bomb": Bomb(trace)}, folder / "prior.safetensors")
        else:
            (folder / "prior.safetensors").write_bytes(content)
        sign(folder)
        refused(folder, "not a valid safetensors file")
        refused(folder, "not a valid safetensors file", verify=False)
    assert not trace.exists()


def test_no_pickle_is_looked_for_where_weights_are_missing(folder):
    trace = folder.parent / "exploded"
    (folder / "prior.safetensors").unlink()
    for name in ("prior.bin", "pytorch_model.bin", "prior.pt"):
        (folder / name).write_bytes(pickle.dumps(Bomb(trace)))
    refused(folder, "lacks prior.safetensors")
    assert not trace.exists()


# ---------------------------------------------------------------------------------------------------------- symlinks
def test_a_prior_of_symlinks_is_read_as_the_cache_of_the_hub_needs(folder, tmp_path):
    links = tmp_path / "links"
    links.mkdir()
    for path in folder.iterdir():
        (links / path.name).symlink_to(path)
    assert_same(PriorModel.from_pretrained(links), random_prior())


def test_saving_over_symlinks_replaces_the_links_and_never_what_they_lead_to(folder, tmp_path):
    links = tmp_path / "links"
    links.mkdir()
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for path in before:
        (links / path.name).symlink_to(path)
    other = random_prior(seed=1)
    assert_same(saved_and_loaded(other, links), other)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert not any(path.is_symlink() for path in links.iterdir())


def test_links_to_nothing_in_a_circle_or_to_a_folder_are_missing_files(folder, tmp_path):
    path = folder / "prior.safetensors"
    for target in (tmp_path / "nothing", path, tmp_path):
        path.unlink()
        path.symlink_to(target)
        refused(folder, "lacks prior.safetensors (1 of 1 weight files)")


# ---------------------------------------------------------------------------------------------------------- refusing to write
@contextlib.contextmanager
def a_system_that(monkeypatch, *, opens_folders: bool, folders_sync: int | None = None):
    """os.open and os.fsync as on Windows: no folder can be opened, and only what is open for writing can be flushed."""
    fcntl = pytest.importorskip("fcntl")
    real_open, real_sync = os.open, os.fsync

    def opened(path, *args, **kwargs):
        if not opens_folders and Path(path).is_dir() and not kwargs:  # shutil's own, with dir_fd, is not made there
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real_open(path, *args, **kwargs)

    def synced(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            if folders_sync is not None:
                raise OSError(folders_sync, os.strerror(folders_sync))
        elif fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        real_sync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(storage.os, "open", opened)
        patch.setattr(storage.os, "fsync", synced)
        patch.setattr(storage, "_fcntl", None)
        yield patch


def test_a_prior_is_saved_on_windows(tmp_path, monkeypatch):
    with a_system_that(monkeypatch, opens_folders=False) as patch:
        patch.setattr(storage, "_WINDOWS", True)
        for seed in (0, 1):  # a new folder, and one with a prior in it
            random_prior(seed).save_pretrained(tmp_path, max_shard_size=SHARD)
    assert_same(PriorModel.from_pretrained(tmp_path), random_prior(1))


def test_elsewhere_a_folder_that_cannot_be_opened_is_an_error(tmp_path, monkeypatch):
    with a_system_that(monkeypatch, opens_folders=False), pytest.raises(PermissionError):
        random_prior().save_pretrained(tmp_path)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_a_file_system_that_cannot_sync_folders_is_no_error_and_a_broken_disk_is(tmp_path, monkeypatch, number):
    random_prior(0).save_pretrained(tmp_path)
    broken = pytest.raises(OSError, match=os.strerror(number)) if number == errno.EIO else contextlib.nullcontext()
    with a_system_that(monkeypatch, opens_folders=True, folders_sync=number), broken:
        random_prior(1).save_pretrained(tmp_path)
    assert_same(PriorModel.from_pretrained(tmp_path), random_prior(0 if number == errno.EIO else 1))


def test_nothing_is_written_when_a_value_is_not_finite(folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    prior = random_prior(seed=1)
    for tensors in (prior.mean, prior.variance, prior.deviations, prior.buffers):
        tensor = next(iter(tensors.values()))
        good = tensor.clone()
        tensor.view(-1)[1] = float("nan")
        with pytest.raises(PriorNumericsError, match="NaN"):
            prior.save_pretrained(folder)
        with pytest.raises(PriorNumericsError, match="NaN"):
            prior.save_pretrained(folder.parent / "new")
        tensor.copy_(good)
    prior.variance["layer.bias"][0] = -1
    with pytest.raises(PriorNumericsError, match="1 of 4 entries < 0"):
        prior.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert not (folder.parent / "new").exists()


def test_nothing_is_written_when_the_configuration_is_no_json(folder, tmp_path, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(storage, "write_file", lambda *_, **__: pytest.fail("weights were written"))
    with pytest.raises(PriorFormatError, match="source or estimator"):
        random_prior(source={"f": object()}).save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_tensors_that_are_not_the_declared_ones_are_not_written(tmp_path):
    prior = random_prior()
    tensors = tensors_of(prior)
    for changed, words in (
        ({k: v for k, v in tensors.items() if k != "mean.layer.bias"}, "lacks mean.layer.bias"),
        (tensors | {"mean.x": torch.zeros(1)}, "has undeclared mean.x"),
        (tensors | {"mean.layer.bias": torch.zeros(3)}, "has shape"),
        (tensors | {"mean.layer.bias": torch.zeros(4).double()}, "stored as float64"),
    ):
        with pytest.raises(PriorFormatError, match=words):
            write_prior(tmp_path / "new", prior.config, changed)
    assert not (tmp_path / "new").exists()


# ---------------------------------------------------------------------------------------------------------- fuzz
def loads_or_is_refused(folder: Path, **options: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PriorWarning)
        with contextlib.suppress(PriorHubError):
            PriorModel.from_pretrained(folder, **options)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=mutated_configs(), verify=st.booleans())
def test_a_folder_with_a_mutated_configuration_loads_or_is_refused_as_such(folder, text, verify):
    text = text.replace("prior-00001-of-00002.safetensors", "prior.safetensors")
    (folder / "prior_config.json").write_text(text, encoding="utf-8")
    loads_or_is_refused(folder, verify=verify)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_weights_load_or_are_refused_as_such_even_unverified(folder, data):
    random_prior().save_pretrained(folder)
    path = folder / "prior.safetensors"
    content = bytearray(path.read_bytes())
    header = 8 + struct.unpack("<Q", content[:8])[0]
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, header - 1))
        content[place] = data.draw(st.sampled_from(b'0123456789"{}[],:FIUB8\x00\xff'))
    path.write_bytes(content)
    sign(folder)
    loads_or_is_refused(folder, verify=data.draw(st.booleans()))
