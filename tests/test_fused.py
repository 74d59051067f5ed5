"""The Triton kernels: numbers in Triton's interpreter on the CPU, compiled code for two GPUs, and the same numbers on a GPU."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from prior_hub.errors import PriorWarning
from prior_hub.priors import fused, gaussian
from prior_hub.priors.fused import is_available

pytest.importorskip("triton", reason="this torch comes without Triton")
WORKER = Path(__file__).with_name("worker_fused.py")


def results(device, tmp_path, **environment):
    output = tmp_path / "results.json"
    command = [sys.executable, str(WORKER), device, str(output)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(output.read_text())


def check(found):
    assert found.pop("kernels that ran") == ["finish", "move_", "project", "through"]
    for name, error in found.items():
        bound = 4e-3 if name == "added in bfloat16" else 2e-6  # 2^-8: half a unit of the last of bfloat16's 8 digits
        if name.startswith("value") or "gradient" in name:
            bound = 1e-6
        assert error < bound, (name, error)
    assert len(found) > 25


def test_the_kernels_agree_with_float64_in_tritons_interpreter(tmp_path):
    check(results("cpu", tmp_path, TRITON_INTERPRET="1"))


@pytest.mark.gpu
def test_the_kernels_agree_with_float64_on_a_gpu(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    check(results("cuda", tmp_path))


def test_they_run_on_cuda_only_and_not_where_the_environment_says_no(monkeypatch):
    assert not is_available(torch.device("cpu"))
    assert is_available(torch.device("cuda"))
    monkeypatch.setenv("PRIOR_HUB_FUSED", "0")
    assert not is_available(torch.device("cuda"))


class Launches:
    """In the place of a kernel: runs nothing, and asks what the current device is."""

    def __init__(self, current):
        self.current, self.seen = current, []

    def __getitem__(self, grid):
        return lambda *arguments, **constants: self.seen.append(self.current[-1])


def test_kernels_are_launched_with_the_device_of_the_prior_as_the_current_one(monkeypatch):
    current = ["another"]

    @contextlib.contextmanager
    def pretended(device):
        current.append(device)
        yield
        current.pop()

    kernel = Launches(current)
    monkeypatch.setattr(fused, "_kernels", lambda: fused._Kernels(kernel, kernel))
    monkeypatch.setattr(fused, "_current", pretended)
    theta = {"w": torch.ones(8)}
    tables = fused.Tables({"w": (theta["w"], theta["w"], torch.ones(2, 8))}, {"w": 1.0}, factor=1.0, eps=0.0)
    z = tables.project(theta)
    tables.through(z, {"w": 0.1})
    tables.finish(theta, z, {}, 1.0)
    tables.move_(theta, z, {"w": 0.1})
    assert kernel.seen == [torch.device("cpu")] * 4


def test_the_current_device_is_changed_for_gpus_only():
    assert fused._current(torch.device("cuda:1")).idx == 1
    assert isinstance(fused._current(torch.device("cpu")), contextlib.nullcontext)


def test_where_triton_cannot_run_plain_operations_do_and_it_is_said_once(monkeypatch, recwarn):
    def broken():
        raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(gaussian, "is_available", lambda device: True)
    monkeypatch.setattr(fused, "_kernels", broken)
    fused.works.cache_clear()
    mean = {"w": torch.zeros(8)}
    prior = gaussian.LowRankGaussian(mean, {"w": torch.ones(8)})
    assert prior.penalty({"w": torch.ones(8)}) == 4
    assert prior.rescaled(2.0).penalty({"w": torch.ones(8)}) == 2
    assert [w.category for w in recwarn] == [PriorWarning]
    assert "C compiler" in str(recwarn[0].message)
    fused.works.cache_clear()


PROGRAM = """
import sys
import triton.language as tl
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from prior_hub.priors import kernels

POINTERS = dict.fromkeys(("theta_table", "into_table", "stored_table", "sizes", "start_of", "step_table"), "*i64")
POINTERS |= dict.fromkeys(("programs", "tensor_of"), "*i32") | {"tensors": "i32"}
POINTERS |= dict.fromkeys(("partial", "vector", "z", "factor_tensor", "steps"), "*fp32")
POINTERS |= dict.fromkeys(("share", "factor", "eps"), "fp32")
F, B = tl.float32, tl.bfloat16
common = dict(RANK=20, THETA=F, MEAN=F, VARIANCE=F, ROWS=B, IMPLICIT=False, STEP_TENSORS=False, ALIGNED=True, BLOCK=4096)
cases = [
    (kernels.project, common),
    (kernels.project, common | dict(THETA=None, IMPLICIT=True, STEP_TENSORS=True, ALIGNED=False)),
    (kernels.finish, common | dict(INTO=B, FACTOR_TENSOR=True, MOVES=False)),
    (kernels.finish, common | dict(INTO=None, FACTOR_TENSOR=False, IMPLICIT=True, MOVES=True, STEP_TENSORS=True)),
    (kernels.finish, common | dict(RANK=0, INTO=F, FACTOR_TENSOR=False, MOVES=False)),
]
for capability in (80, 90):
    for kernel, constants in cases:
        names = kernel.arg_names
        signature = {n: "constexpr" if n in constants else POINTERS[n] for n in names}
        source = ASTSource(kernel, signature, {(names.index(n),): value for n, value in constants.items()})
        assert compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8}).asm["cubin"]
        wide = "ld.global.v4" in compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8}).asm["ptx"]
        assert wide == (constants["ALIGNED"] and True), kernel
"""


@pytest.mark.slow
def test_the_kernels_compile_for_gpus_that_are_not_here(tmp_path):
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
