"""Runs on_stub.py in a process whose driver is a stub, after NVRTC has filled the cache in this one."""

from __future__ import annotations

import functools
import itertools
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from ctypes.util import find_library
from pathlib import Path

import pytest
import torch

from rwkv_miss.ops.cuda import driver, kernels
from rwkv_miss.ops.cuda.nvrtc import compile_source
from tests.ops.cases import odd_starts, run
from tests.ops.cuda.stub import Variant, write_manifest
from tests.simt.harness import build

HERE = Path(__file__).parent
FP32, BF16 = torch.float32, torch.bfloat16
# Head size, dtype, architecture: the stub's devices are of sm_90 and sm_75.
VARIANTS = [(64, BF16, 90), (16, FP32, 90), (16, FP32, 75), (128, BF16, 90)]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stub")
    cache = folder / "cache" / "rwkv_miss"
    emulator = functools.cache(lambda op, n, dtype: build(kernels.source(op), folder, *kernels.options(dtype, n))._name)
    variants = []
    for op, (n, dtype, architecture) in itertools.product(("wkv6", "wkv7"), VARIANTS):
        options = kernels.options(dtype, n)
        before = set(cache.glob("*.cubin"))
        compile_source(kernels.source(op), options, divmod(architecture, 10), cache)
        (image,) = set(cache.glob("*.cubin")) - before
        emulated = folder / f"{op}_{n}_sm_{architecture}.so"
        shutil.copy(emulator(op, n, dtype), emulated)
        variants.append(Variant(str(image), str(emulated), op, n, dtype.itemsize, architecture))
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
    assert int(suite.get("tests")) >= 100
    assert suite.get("skipped") == "0"


def test_rocm_is_refused(wkv, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert "ROCm" in kernels.unusable(wkv.name, torch.device("cuda", 0), FP32, 64)


@pytest.mark.skipif(find_library("cuda") is not None, reason="this machine has a driver")
def test_no_driver_is_a_reason_not_a_crash(wkv, monkeypatch):
    monkeypatch.setattr(driver, "location", lambda device: (0, 0))
    assert "cuInit: " in kernels.unusable(wkv.name, torch.device("cuda", 0), FP32, 64)
    kernels.kernels_or_reason.cache_clear()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("dtype", "tolerance"), [(FP32, 2e-5), (BF16, 6e-3)])  # the GPU's fast exp has 2 to 8 ulp
@pytest.mark.parametrize("n", [16, 64, 128])
def test_on_a_gpu(wkv, n, dtype, tolerance):
    inputs, state = wkv.make_inputs(57, n, dtype)
    start, weights = odd_starts(57), wkv.make_weights(inputs, state)

    def on_gpu(*tensors):
        y, last = wkv.op(*(x.cuda() for x in tensors), backend="cuda")
        return y.cpu(), last.cpu()

    mine = run(on_gpu, inputs, state, start, weights)
    exact = run(wkv.reference, [x.double() for x in inputs], state.double(), start, weights)
    wkv.assert_close(mine, exact, tolerance)
