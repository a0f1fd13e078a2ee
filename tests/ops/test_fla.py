"""When the "fla" backend is taken and when it is refused. Its kernels are tested by on_interpreter.py, which runs in a
process of its own."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import logging
import math
import os
import re
import sys
import xml.etree.ElementTree as ElementTree
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch

from rwkv_miss.errors import UserError
from rwkv_miss.ops import dispatch, fla
from tests.processes import run_process

ROOT = Path(__file__).parents[2]
GPU = torch.device("cuda", 0)
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def forgetful():
    caches = (fla.functions_or_reason, dispatch.announce)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.fixture
def install(monkeypatch):
    """`install(version)` makes it look as if that version of fla-core were installed (no test calls its kernels), and
    `install(None)` as if none were."""

    def install(version: str | None) -> None:
        for name in [x for x in sys.modules if x.split(".")[0] == "fla"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "fla", None)
        if version is not None:
            for name in ("fla", "fla.ops", "fla.ops.rwkv6", "fla.ops.rwkv7"):
                monkeypatch.setitem(sys.modules, name, ModuleType(name))
            sys.modules["fla"].__version__ = version
            sys.modules["fla.ops.rwkv6"].chunk_rwkv6 = sys.modules["fla.ops.rwkv7"].chunk_rwkv7 = print

    return install


@pytest.mark.slow
def test_its_kernels_on_the_cpu(tmp_path):
    if not find_spec("fla") or not find_spec("triton"):
        pytest.skip("fla-core and Triton are not installed")
    version = importlib.metadata.version("triton")
    if tuple(map(int, version.split(".")[:2])) < (3, 7):
        pytest.skip(f"the interpreter of Triton {version} cannot run them; that of 3.7 and later can")
    report = tmp_path / "report.xml"
    options = ["-p", "no:cacheprovider", "-W", "ignore", f"--junitxml={report}"]
    command = [sys.executable, "-m", "pytest", *options, "tests/ops/on_interpreter.py"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = run_process(command, timeout=900, env=environment, cwd=ROOT)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    (suite,) = ElementTree.parse(report).getroot().iter("testsuite")
    assert int(suite.get("tests")) >= 20
    assert suite.get("skipped") == "0"


@pytest.mark.parametrize(
    ("device", "dtype", "n", "found"),
    [
        (torch.device("cpu"), BF16, 64, "the tensors are on cpu, it takes GPUs"),
        (GPU, torch.float64, 64, "the tensors are torch.float64, it takes float32 and bfloat16"),
        (GPU, BF16, 8, "the head size is 8, it takes 16 to 256"),
        (GPU, BF16, 257, "the head size is 257, it takes 16 to 256"),
    ],
)
def test_tensors_that_are_refused(device, dtype, n, found, install):
    install("0.6.0")
    assert found in fla.unusable("wkv7", device, dtype, n)
    assert fla.unusable("wkv7", torch.device("xpu", 0), BF16, 64) is None
    assert fla.unusable("wkv7", GPU, torch.float32, 16) is None and fla.unusable("wkv7", GPU, BF16, 256) is None


def test_installations_that_are_refused(install, monkeypatch):
    def reason() -> str | None:
        fla.functions_or_reason.cache_clear()
        return fla.unusable("wkv7", GPU, BF16, 64)

    install(None)
    assert reason() == "fla-core is not installed; pip install 'rwkv-miss[fla]'"
    install("0.5.2")
    assert reason() == "fla-core 0.5.2 is older than 0.6; pip install 'rwkv-miss[fla]'"
    for version in ("0.7rc1", "0.10.0.dev1"):
        install(version)
        assert reason() is None
    del sys.modules["fla.ops.rwkv6"].chunk_rwkv6
    assert reason().startswith("fla-core cannot be imported: ImportError(\"cannot import name 'chunk_rwkv6'")
    for missing, found in (("triton", "Triton is not installed;"), ("einops", "fla-core cannot be imported: No")):
        monkeypatch.setattr("builtins.__import__", importing_without(missing))
        assert reason().startswith(found)
        monkeypatch.undo()


def importing_without(missing: str):
    """An `__import__` for which the package `missing`, which fla-core imports, is not installed."""

    def importing(name, *rest):
        if name.startswith("fla"):
            raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)
        return original(name, *rest)

    original = __import__
    return importing


def test_decays_are_logarithms_in_fp32(wkv, monkeypatch):
    inputs, state = wkv.make_inputs(3, 16, BF16)
    given = {}

    def kernel(v, **arguments):
        given.update(arguments)
        return v, state

    monkeypatch.setattr(fla, "functions_or_reason", lambda: ({wkv.name: kernel}, None))
    getattr(fla, wkv.name)(*inputs, state, None)
    x = dict(zip(wkv.inputs, inputs, strict=True))
    exact = -x["w"].double().exp() if wkv.name == "wkv6" else -torch.sigmoid(x["z"].double()) * math.exp(-0.5)
    assert given["w"].dtype == torch.float32
    torch.testing.assert_close(given["w"].double(), exact.clamp(min=-104), rtol=1e-6, atol=0)


def test_asked_for_on_a_cpu_is_an_error(wkv):
    inputs, state = wkv.make_inputs(2, 16)
    with pytest.raises(UserError, match="'fla' cannot be used: the tensors are on cpu, it takes GPUs"):
        wkv.op(*inputs, state, backend="fla")


@pytest.mark.parametrize(
    ("device", "hip", "version", "chosen", "level", "said"),
    [
        ("cuda", "6.4", "0.6.0", "fla", "INFO", "'fla'; not 'cuda': this torch is built for AMD's ROCm"),
        ("cuda", "6.4", None, "torch", "WARNING", "'torch'; not 'cuda': this .*; not 'fla': fla-core is not installed"),
        ("xpu", None, "0.6.0", "fla", "INFO", "'fla'$"),
        ("xpu", None, None, "torch", "WARNING", "'torch'; not 'fla': fla-core is not installed"),
    ],
)
def test_auto_on_a_gpu(device, hip, version, chosen, level, said, install, monkeypatch, caplog):
    install(version)
    monkeypatch.setattr(torch.version, "hip", hip)
    with caplog.at_level(logging.INFO, logger="rwkv_miss"):
        for _ in range(2):
            assert dispatch.choose("wkv7", torch.device(device, 0), BF16, 64) == chosen
    (record,) = caplog.records
    assert record.levelname == level
    assert re.search(f"^wkv7: using backend {said}", record.getMessage())


def test_auto_prefers_cuda(install, monkeypatch):
    install("0.6.0")
    usable = dataclasses.replace(dispatch.IMPLEMENTATIONS["cuda"], unusable=lambda *_: None)
    monkeypatch.setitem(dispatch.IMPLEMENTATIONS, "cuda", usable)
    assert dispatch.choose("wkv6", GPU, BF16, 64) == "cuda"


@pytest.mark.slow
def test_nothing_imports_it_before_it_is_asked_for(tmp_path):
    (tmp_path / "fla.py").write_text("raise SystemExit('fla was imported')")
    code = """
import importlib, pathlib, torch, rwkv_miss
for path in pathlib.Path(rwkv_miss.__file__).parent.rglob("[a-z]*.py"):
    parts = path.relative_to(pathlib.Path(rwkv_miss.__file__).parents[1]).with_suffix("").parts
    if parts[1] != "harness":  # which needs lm_eval
        importlib.import_module(".".join(parts))
x = torch.zeros(1, 2, 1, 16)
rwkv_miss.ops.wkv7(x, x, x, x, x, x)
print("not yet")
rwkv_miss.ops.fla.unusable("wkv7", torch.device("cuda", 0), x.dtype, 16)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command = [sys.executable, "-c", code]
    result = run_process(command, timeout=300, env=environment)
    assert result.stdout.endswith("not yet\n"), result.stderr
    assert result.stderr.endswith("fla was imported\n")
