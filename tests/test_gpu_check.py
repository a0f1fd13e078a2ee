"""gpu_check: what it says where there is no GPU, and that its checks see what is wrong."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rwkv_miss.config import ModelConfig
from rwkv_miss.errors import UserError
from rwkv_miss.ops import fused
from rwkv_miss.ops.cuda.nvrtc import CompileError
from rwkv_miss.ops.fused_operators import OPS

SCRIPT = Path(__file__).parents[1] / "scripts" / "gpu_check.py"
TINY = {
    "wkv6": ModelConfig(6, 2, 32, 2, 16, 64, 50, {"maa": 4, "decay": 4}),
    "wkv7": ModelConfig(7, 2, 32, 2, 16, 64, 50, {"w": 4, "a": 4, "v": 4, "g": 4}),
}


@pytest.fixture
def gpu_check(monkeypatch):
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "compile_source", lambda *_: b"")
    monkeypatch.setattr(module, "version", lambda: (13, 0))
    monkeypatch.setattr(module, "HEAD_SIZES", (8, 16))
    monkeypatch.setenv("COLUMNS", "200")
    return module


@pytest.fixture
def as_on_a_gpu(gpu_check, monkeypatch):
    """Everything runs on the CPU's kernels, and takes 1.5 ms."""
    error, inputs, step = gpu_check.worst_error, gpu_check.inputs, gpu_check.training_step
    fused_error = gpu_check.fused_error
    properties = SimpleNamespace(name="a GPU", major=9, minor=0)

    def on_cpu(op):
        return lambda *x, backend, **more: op(*x, backend="cpu" if backend.startswith("cuda") else backend, **more)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(gpu_check, "OPS", {name: on_cpu(op) for name, op in gpu_check.OPS.items()})
    monkeypatch.setattr(gpu_check, "SIZES", TINY)
    monkeypatch.setattr(gpu_check, "worst_error", lambda op, N, dtype, _: error(op, N, dtype, "cpu"))
    monkeypatch.setattr(gpu_check, "fused_error", lambda op, dtype, _: fused_error(op, dtype, "cpu"))
    monkeypatch.setattr(gpu_check, "inputs", lambda op, *x: inputs(op, 2, 40, 2, *x[3:5], "cpu"))
    monkeypatch.setattr(gpu_check, "training_step", lambda sizes, *_: step(sizes, "cpu", 2, 8, "cpu"))
    monkeypatch.setattr(gpu_check, "milliseconds", lambda f: (f(), 1.5)[1])
    monkeypatch.setattr(gpu_check, "bandwidth", lambda: 4e12)
    monkeypatch.setattr(gpu_check, "infer_config", lambda tensors, shape: TINY["wkv7"])
    monkeypatch.setattr(gpu_check, "unusable", lambda op, backend, *_: "no fla here" if backend == "fla" else None)
    monkeypatch.setattr(gpu_check, "gpu_milliseconds", lambda f: (f(), {"wkv": 1.0, "products": 2.0, "rest": 3.0})[1])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**30)
    return gpu_check


def test_without_a_gpu_it_says_what_it_skipped(gpu_check, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main() == 0
    out = capsys.readouterr().out
    assert "fused against the formulas" in out
    for op in ("wkv6", "wkv7", "fused"):
        (compiled,) = (line for line in out.splitlines() if f"{op}.cu for sm_75" in line)
        assert "NVRTC 13.0" in compiled and "sm_120" in compiled
    for op in ("wkv6", "wkv7"):
        skipped = [line for line in out.splitlines() if "skipped: torch finds no GPU" in line]
        assert sum(f"{op} against the reference" in x or f"{op}: times" in x for x in skipped) == 2


def test_with_one_every_kernel_is_checked_and_timed(as_on_a_gpu, capsys, tmp_path):
    file = tmp_path / "results.json"
    assert as_on_a_gpu.main(file) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("a GPU, sm_90" in line for line in lines)
    for op in OPS:
        assert sum(f" {op.name}, " in line and "worst relative error" in line for line in lines) == 2
    for op in ("wkv6", "wkv7"):
        for backend in as_on_a_gpu.KERNELS[op]:
            assert sum(f"{op}, {backend}, N " in line for line in lines) == 4
            assert sum(f"{op}, {backend}: B" in line for line in lines) == 5
        for backend in (*as_on_a_gpu.KERNELS[op], "torch"):
            assert any(f"{op}, {backend}: B8" in line and "1.50 / 1.50 ms" in line for line in lines)
            assert any(f"{op}, {backend}: training step" in line and "1.5 ms" in line for line in lines)
    for shape, backend in product(("0.4B", "1.5B"), ("cuda", "cuda_scalar", "fla")):
        (line,) = [line for line in lines if f"wkv7, {backend}: training step, {shape}" in line]
        said = "5,461,333 tokens/s, 3.0 GiB; of the GPU's ms: wkv 1.0, products 2.0, rest 3.0"
        assert ("skipped: no fla here" if backend == "fla" else said) in line
    written = json.loads(file.read_text())
    found = {x["what"]: x for x in written["results"]}
    assert written["right"] is True
    # By hand, of bf16 with N = 64: r z k v a b and y of each token and head, a first and a last state of fp32, a
    # document's mark for each token; in 1.5 ms of 4e12 bytes a second.
    moved = 7 * 8 * 4096 * 64 * 128 + 2 * 8 * 64 * 64**2 * 4 + 8 * 4096
    line = found["wkv7, cuda: B8 T4096 H64 N64 bf16, forward / with backward"]
    assert line["bandwidth"][0] == pytest.approx(moved / 1.5e-3 / 4e12) and line["both_ms"] == 1.5
    step = found["wkv7, cuda: training step, 1.5B, B8 T1024 bf16"]
    assert step["gpu_ms"] == {"wkv": 1.0, "products": 2.0, "rest": 3.0} and step["memory_gib"] == 3


def test_nothing_begins_when_the_time_is_over(as_on_a_gpu, monkeypatch, capsys):
    monkeypatch.setattr(as_on_a_gpu, "run", None)
    assert as_on_a_gpu.main(minutes=0) == 0
    lines = capsys.readouterr().out.splitlines()
    skipped = [line for line in lines if "skipped: the time is over" in line]
    assert (
        len(skipped) == 2 * len(OPS) + 3 * 4 + 3 * 5 + 2 + 5 + 2 + 4
    )  # errors twice, ops, torch's ops, steps of 0.1B, whole rows, steps of 0.4B and 1.5B


OTHER = """
from rwkv_miss.ops.wkv7 import wkv7 as ours


def wkv7(r, z, k, v, a, b):
    return ours(r, z, k, v, a, b, backend="torch")[0]{}
"""


@pytest.mark.parametrize(
    ("change", "said"), [("", "e-03"), (" * 1.1", "1.0e-01"), (" / None", "failed: unsupported operand")]
)
def test_the_kernel_of_another(as_on_a_gpu, tmp_path, capsys, change, said):
    (file := tmp_path / "other.py").write_text(OTHER.format(change))
    report = as_on_a_gpu.Report(60)
    as_on_a_gpu.add_others(as_on_a_gpu.load_other(file), report)
    found = {x["what"]: x for x in report.records}
    names = [x["what"].removeprefix("wkv7, ").partition(",")[0] for x in report.records]
    times = 0 if "/ None" in change else 4
    assert names == ["cuda", "other", "fla"] + ["cuda", "other"][: 1 + (times > 0)] * 4  # fla-core is not for a CPU
    (error,) = [x for what, x in found.items() if "other, whole rows" in what and "bf16" not in what]
    assert said in error["result"]
    assert sum(x.get("both_ms") == 1.5 for x in found.values()) == 4 + times
    assert found["wkv7, cuda, whole rows, worst relative error"]["error"] < 5e-3
    assert "fla" in found["wkv7, fla, whole rows"]["result"]


def test_a_file_without_a_kernel(gpu_check, tmp_path):
    (file := tmp_path / "other.py").write_text("wkv6 = print\n")
    with pytest.raises(UserError, match=r"other\.py: has no function wkv7\(r, z, k, v, a, b\) that returns y"):
        gpu_check.main(other_file=file)
    with pytest.raises(UserError, match=r"a\.cu: is no Python file"):
        (file := tmp_path / "a.cu").touch()
        gpu_check.main(other_file=file)


def test_a_step_that_does_not_fit(as_on_a_gpu, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(as_on_a_gpu, "training_step", full)
    report = as_on_a_gpu.Report(60)
    as_on_a_gpu.add_step("1.5b", "cuda", report)
    assert report.records[-1]["result"] == "skipped: it does not fit into this GPU's memory"


@pytest.mark.parametrize(
    ("kernel", "part"),
    [
        ("wkv7_chunk_backward", "wkv"),
        ("wkv6_forward", "wkv"),
        ("chunk_dplr_bwd_kernel_dhu", "wkv"),
        ("nvjet_sm90_tst_128x256_64x4_2x1_v_bz_coopA_NNT", "products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "products"),
        ("void cublasLt::splitKreduce_kernel<32, 16>", "products"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::AddFunctor>", "rest"),
        ("Memcpy DtoD (Device -> Device)", "rest"),
    ],
)
def test_the_part_of_a_kernel(gpu_check, kernel, part):
    assert gpu_check.part_of(kernel) == part


@pytest.mark.parametrize("wrong", [1.001, float("nan")])
def test_a_wrong_gradient_is_a_status_of_1(as_on_a_gpu, monkeypatch, capsys, wrong):
    """Of the last input alone."""
    run = as_on_a_gpu.run

    def faulty(op, backend, *arguments):
        *results, last = run(op, backend, *arguments)
        return [*results, last * wrong if backend == "cpu" and op == "wkv6" else last]

    monkeypatch.setattr(as_on_a_gpu, "run", faulty)
    assert as_on_a_gpu.main() == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if "WRONG" in line]
    assert lines and all("wkv6" in line for line in lines)


def test_a_wrong_gradient_of_a_fused_op_is_a_status_of_1(as_on_a_gpu, monkeypatch, capsys):
    """Of a kernel's last output, in bfloat16 alone."""
    launch = fused.KERNELS["cpu"].launch

    def faulty(kernel, arguments):
        launch(kernel, arguments)
        if kernel == "gated_backward" and arguments["dx"].dtype == torch.bfloat16:
            arguments["dx"][..., -1, :] *= 1.1

    monkeypatch.setitem(fused.KERNELS, "cpu", replace(fused.KERNELS["cpu"], launch=faulty))
    assert as_on_a_gpu.main() == 1
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "WRONG" in line)
    assert "gated, bfloat16" in line


def test_what_does_not_compile_is_a_status_of_1(gpu_check, monkeypatch, capsys):
    def fail(source, *_):
        if source.stem == "wkv6":
            raise CompileError("no NVRTC; pip install 'rwkv-miss[cuda13]'")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu_check, "compile_source", fail)
    assert gpu_check.main() == 1
    assert "failed: no NVRTC; pip install 'rwkv-miss[cuda13]'" in capsys.readouterr().out


def test_a_gpu_that_the_kernels_cannot_use_is_a_status_of_1(as_on_a_gpu, monkeypatch, capsys):
    """As on AMD's, or without cuda-bindings."""

    def refuse(*_):
        raise UserError("wkv: backend 'cuda' cannot be used: this torch is built for AMD's ROCm")

    monkeypatch.setattr(as_on_a_gpu, "worst_error", refuse)
    assert as_on_a_gpu.main() == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if "on the GPU" in line and "failed: " in line]
    assert ["wkv6 on the GPU" in lines[0], "wkv7 on the GPU" in lines[1]] == [True, True]
    assert all("built for AMD's ROCm" in line for line in lines)


@pytest.mark.parametrize("op", ["wkv6", "wkv7"])
def test_the_shape_that_is_timed_has_a_tenth_of_a_billion_parameters(gpu_check, op):
    from rwkv_miss.model.versions import MODELS

    sizes = gpu_check.SIZES[op]
    with torch.device("meta"):
        model = MODELS[sizes.version](sizes, "torch")
    assert 0.1e9 < sum(p.numel() for p in model.parameters()) < 0.25e9
