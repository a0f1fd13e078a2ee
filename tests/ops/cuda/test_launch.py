"""Runs on_stub.py in a process whose driver is a stub, after NVRTC has filled the cache in this one."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from ctypes.util import find_library
from pathlib import Path

import pytest
import torch

from rwkv_miss.errors import UserError
from rwkv_miss.ops import wkv7
from rwkv_miss.ops.cuda import wkv7 as cuda_wkv7
from rwkv_miss.ops.cuda.nvrtc import compile_source
from rwkv_miss.ops.wkv7_reference import wkv7_reference
from tests.ops.cuda.stub import Variant, write_manifest
from tests.ops.wkv7_cases import assert_close, make_inputs, make_weights, odd_starts, run
from tests.simt.harness import build

HERE = Path(__file__).parent
FP32, BF16 = torch.float32, torch.bfloat16
# Head size, dtype, architecture: the stub's devices are of sm_90 and sm_75.
VARIANTS = [(64, FP32, 90), (64, BF16, 90), (16, FP32, 90), (16, FP32, 75), (128, BF16, 90)]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stub")
    cache = folder / "cache" / "rwkv_miss"
    variants = []
    for n, dtype, architecture in VARIANTS:
        options = cuda_wkv7.options(dtype, n)
        before = set(cache.glob("*.cubin"))
        compile_source(cuda_wkv7.SOURCE, options, divmod(architecture, 10), cache)
        (image,) = set(cache.glob("*.cubin")) - before
        library = folder / f"sm_{architecture}"
        library.mkdir(exist_ok=True)
        emulated = build(cuda_wkv7.SOURCE, library, *options)
        variants.append(Variant(str(image), emulated._name, n, dtype.itemsize, architecture))
    write_manifest(folder / "manifest.json", variants)
    stub = ["g++", "-std=c++17", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", str(HERE / "stub.cpp")]
    subprocess.run([*stub, "-o", str(folder / "libcuda.so.1")], check=True)
    search = os.pathsep.join(filter(None, (str(folder), os.environ.get("LD_LIBRARY_PATH"))))
    added = {"XDG_CACHE_HOME": str(folder / "cache"), "STUB_MANIFEST": str(folder / "manifest.json")}
    return {**os.environ, **added, "LD_LIBRARY_PATH": search}


def test_the_whole_path_on_host_memory(environment, tmp_path):
    report = tmp_path / "report.xml"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        str(HERE / "on_stub.py"),
        f"--junitxml={report}",
    ]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE.parents[2])
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    (suite,) = ElementTree.parse(report).getroot().iter("testsuite")
    assert int(suite.get("tests")) >= 50
    assert suite.get("skipped") == "0"


def test_cpu_tensors_are_refused():
    x = torch.zeros(1, 2, 1, 16)
    with pytest.raises(UserError, match="'cuda' cannot be used: the tensors are on cpu; use backend 'torch'"):
        wkv7(x, x, x, x, x, x, backend="cuda")


def test_rocm_is_refused(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert "ROCm" in cuda_wkv7.unusable(torch.device("cuda", 0), FP32, 64)


@pytest.mark.skipif(find_library("cuda") is not None, reason="this machine has a driver")
def test_no_driver_is_a_reason_not_a_crash(monkeypatch):
    monkeypatch.setattr(cuda_wkv7.driver, "location", lambda device: (0, 0))
    assert "cuInit: " in cuda_wkv7.unusable(torch.device("cuda", 0), FP32, 64)
    cuda_wkv7._kernels_or_reason.cache_clear()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("dtype", "tolerance"), [(FP32, 2e-5), (BF16, 6e-3)])  # the GPU's fast exp has 2 to 8 ulp
@pytest.mark.parametrize("n", [16, 64, 128])
def test_on_a_gpu(n, dtype, tolerance):
    inputs, state = make_inputs(57, n, dtype)
    start, weights = odd_starts(57), make_weights(inputs, state)

    def on_gpu(*tensors):
        y, last = wkv7(*(x.cuda() for x in tensors), backend="cuda")
        return y.cpu(), last.cpu()

    mine = run(on_gpu, inputs, state, start, weights)
    exact = run(wkv7_reference, [x.double() for x in inputs], state.double(), start, weights)
    assert_close(mine, exact, tolerance)
