"""Runs the files on_*.py in a process whose driver is a stub, after NVRTC has filled the cache in this process: NVRTC
crashes beside a stub driver."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from ctypes.util import find_library
from pathlib import Path

import pytest
import torch

from rwkv_miss.ops.cuda import driver, kernel
from rwkv_miss.ops.cuda.nvrtc import compile_source
from rwkv_miss.ops.cuda.wkv import unusable
from tests.ops.cases import odd_starts, run
from tests.ops.cuda.emulated import EMULATED
from tests.ops.cuda.stub import Variant, write_manifest
from tests.processes import run_process
from tests.simt.harness import build_once

HERE = Path(__file__).parent
FP32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """The environment of a process whose driver is the stub and whose cache has the kernels that it launches."""
    folder = tmp_path_factory.mktemp("stub")
    cache = folder / "cache" / "rwkv_miss"
    variants = []
    for name, emulated in EMULATED.items():
        program = emulated.program
        for variant, architecture in emulated.variants:
            options = program.variants[variant]
            before = set(cache.glob("*.cubin"))
            compile_source(program.source, options, divmod(architecture, 10), cache)
            (image,) = set(cache.glob("*.cubin")) - before
            # A copy for each variant: the stub tells variants apart by the handles of their libraries.
            library = folder / f"{image.stem}.so"
            shutil.copy(build_once(program.source, *options)._name, library)
            variants.append(Variant(str(image), str(library), name, options, architecture))
    write_manifest(folder / "manifest.json", variants)
    stub = ["g++", "-std=c++17", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", str(HERE / "stub.cpp")]
    subprocess.run([*stub, "-o", str(folder / "libcuda.so.1")], check=True)
    search = os.pathsep.join(filter(None, (str(folder), os.environ.get("LD_LIBRARY_PATH"))))
    added = {"XDG_CACHE_HOME": str(folder / "cache"), "STUB_MANIFEST": str(folder / "manifest.json")}
    return {**os.environ, **added, "LD_LIBRARY_PATH": search}


@pytest.mark.slow
def test_the_whole_path_on_host_memory(environment, tmp_path):
    report = tmp_path / "report.xml"
    options = ["-p", "no:cacheprovider", "-p", "tests.ops.cuda.stub_fixtures", f"--junitxml={report}"]
    command = [sys.executable, "-m", "pytest", *options, *map(str, sorted(HERE.glob("on_*.py")))]
    root = HERE.parents[2]
    result = run_process(command, timeout=900, env=environment, cwd=root)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    (suite,) = ElementTree.parse(report).getroot().iter("testsuite")
    assert int(suite.get("tests")) >= 100
    assert suite.get("skipped") == "0"


def test_rocm_is_refused(wkv, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert "ROCm" in unusable(wkv.name, torch.device("cuda", 0), FP32, 64)


@pytest.mark.skipif(find_library("cuda") is not None, reason="this machine has a driver")
def test_no_driver_is_a_reason_not_a_crash(wkv, monkeypatch):
    monkeypatch.setattr(driver, "location", lambda device: (0, 0))
    assert "cuInit: " in unusable(wkv.name, torch.device("cuda", 0), FP32, 64)
    kernel.functions_or_reason.cache_clear()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("dtype", "tolerance"), [(FP32, 2e-5), (BF16, 6e-3)])  # a GPU's fast exp is off by 2 to 8 ulp
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
