"""The Triton kernels: numbers in Triton's interpreter on the CPU, compiled code for two GPUs, and the same numbers on a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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
