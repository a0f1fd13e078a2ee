"""Checks and times the CUDA kernels on this machine's GPU; see gpu_check.sh. Status 1 where a check fails, 2 where
the arguments are wrong."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from rwkv_miss.config import AdapterConfig, ModelConfig, PlanConfig
from rwkv_miss.errors import UserError
from rwkv_miss.files import atomic_write, check_is_file, check_name
from rwkv_miss.model.recognise import infer_config
from rwkv_miss.ops import fused, wkv6, wkv7
from rwkv_miss.ops.cuda.nvrtc import CompileError, compile_source, version
from rwkv_miss.ops.cuda.programs import HEAD_SIZES, PROGRAMS
from rwkv_miss.ops.dispatch import unusable
from rwkv_miss.ops.fused_operators import OPS as FUSED
from rwkv_miss.ops.fused_operators import FusedOp
from rwkv_miss.planning.launches import Trace
from rwkv_miss.planning.shapes import find_base

# The largest relative error in norm allowed: in fp32 sums are taken in another order, bf16 outputs are rounded.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 8e-3}
ARCHITECTURES = ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
ROUNDS = 10
OPS = {"wkv6": wkv6, "wkv7": wkv7}
# The backends of each op that have kernels of their own; "cuda" takes the chunked ones of WKV-7 where it can.
KERNELS = {"wkv6": ("cuda",), "wkv7": ("cuda", "cuda_scalar")}
# B, T and H of the calls that are timed: a GPU that is full, one that is nearly full, a long row, and few heads.
SHAPES = ((8, 4096, 64), (4, 1024, 32), (1, 32768, 64), (1, 512, 12))
# The shape of a model of 0.1B parameters.
SIZES = {
    "wkv6": ModelConfig(6, 12, 768, 12, 64, 2688, 65536, {"maa": 32, "decay": 64}),
    "wkv7": ModelConfig(7, 12, 768, 12, 64, 3072, 65536, {"w": 64, "a": 64, "v": 32, "g": 128}),
}
# Released RWKV-7 models whose training steps are measured, on 8 rows of 1,024 tokens.
STEPS = ("0.4b", "1.5b")
# What is in the names of the kernels of the recurrence (ours, fla-core's) and of cuBLAS's matrix products.
RECURRENCE = (*(kernel for name in ("wkv6", "wkv7", "wkv7_chunk") for kernel in PROGRAMS[name].kernels),)
RECURRENCE += ("chunk_", "dplr", "wy_repr", "wy_fast", "wu_fwd")
PRODUCTS = ("gemm", "gemv", "nvjet", "cutlass", "splitk")


class Report:
    """What was found, as a table and as records for a file, until the time is over.

    Args:
        seconds: how long to go on; what has begun by then is finished.
    """

    def __init__(self, seconds: float) -> None:
        self.table = Table("what", "result", title="CUDA kernels")
        self.records: list[dict[str, Any]] = []
        self._end = time.monotonic() + seconds

    def add(self, what: str, result: str, **values: Any) -> None:
        """A row; `values` are its figures for programs."""
        self.table.add_row(what, result)
        self.records.append({"what": what, "result": result, **values})

    def has_time(self, what: str) -> bool:
        """False once the time is over; then `what` is said to be skipped."""
        if time.monotonic() < self._end:
            return True
        self.add(what, "skipped: the time is over; --minutes gives more")
        return False


def inputs(
    op: str, B: int, T: int, H: int, N: int, dtype: torch.dtype, device: str
) -> tuple[list[Tensor], Tensor, Tensor]:
    """The op's inputs and first state, as RWKV has them; seq_start; a gradient for y."""
    g = torch.Generator().manual_seed(0)
    r, k, v, decay, dy = (torch.randn(B, T, H, N, generator=g) for _ in range(5))
    k *= N**-0.5
    if op == "wkv6":
        tensors = [r, k, v, decay - 3, torch.randn(H, N, generator=g)]
    else:
        kk = torch.nn.functional.normalize(torch.randn(B, T, H, N, generator=g), dim=-1)
        tensors = [r, 2 * decay, k, v, -kk, kk * torch.rand(B, T, H, N, generator=g)]
    state = torch.randn(B, H, N, N, generator=g) * 0.1
    starts = torch.rand(B, T, generator=g) < 0.01
    return [*(x.to(device, dtype) for x in tensors), state.to(device)], starts.to(device), dy.to(device, dtype)


def run(op: str, backend: str, tensors: list[Tensor], starts: Tensor, dy: Tensor) -> list[Tensor]:
    """y, the last state and all gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    y, last = OPS[op](*leaves, seq_start=starts, backend=backend)
    return [y, last, *torch.autograd.grad([y, last], leaves, [dy, torch.ones_like(last)])]


def worst_error(op: str, N: int, dtype: torch.dtype, backend: str) -> float:
    """The largest relative error in norm among a backend's results and gradients, against the reference in float64. The
    backends "cuda" and "cuda_scalar" run on the GPU, others on the CPU."""
    tensors, starts, dy = inputs(op, 2, 257, 3, N, dtype, "cuda" if backend.startswith("cuda") else "cpu")
    found = run(op, backend, tensors, starts, dy)
    exact = run(op, "reference", [x.cpu().double() for x in tensors], starts.cpu(), dy.cpu().double())
    return largest(found, exact)


def fused_error(op: FusedOp, dtype: torch.dtype, device: str) -> float:
    """The same for what lies between matrix products, against its formula in float64."""
    from tests.simt.fused import differentiable, draw, exact, make_grads

    arguments = draw(op, 2, 257, 3, 64, dtype)
    grads, wanted = make_grads(op, arguments), differentiable(op, arguments)
    there = [x.to(device) if isinstance(x, Tensor) else x for x in arguments]
    if reason := fused.KERNELS[device].unusable(op, there[0].device, dtype, 64):
        raise UserError(f"{op.name}: {reason}")
    leaves = [x.requires_grad_() for x, name in zip(there, op.arguments, strict=True) if name in wanted]
    outputs = getattr(fused, op.name)(*there)
    outputs = [outputs] if isinstance(outputs, Tensor) else outputs
    found = [*outputs, *torch.autograd.grad(outputs, leaves, [x.to(device) for x in grads])]
    return largest(found, [*exact(op, arguments, grads, wanted).values()])


def largest(found: list[Tensor], right: list[Tensor]) -> float:
    """The largest relative error in norm; NaN if one of them is."""
    errors = [(x.cpu().double() - y).norm() / y.norm() for x, y in zip(found, right, strict=True)]
    return torch.stack(errors).max().item()


def milliseconds(f: Callable[[], object]) -> float:
    """The time of the fastest of ROUNDS calls, by the GPU's clock."""
    f()
    times = []
    for _ in range(ROUNDS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        f()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return min(times)


def training_step(sizes: ModelConfig, backend: str, B: int, T: int, device: str) -> Callable[[], None]:
    """Forward and backward of a MiSS fine-tune of a model of that shape, in bf16. The time does not depend on the
    weights: they are small random numbers."""
    from rwkv_miss.adapters.inject import inject
    from rwkv_miss.model.versions import MODELS
    from tests.helpers import loss_sum

    with torch.device("meta"):
        model = MODELS[sizes.version](sizes, backend)
    model = model.bfloat16().to_empty(device=device)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    inject(model, AdapterConfig(r=32))
    tokens = torch.randint(sizes.vocab_size, (B, T), device=device)
    batch = {"tokens": tokens, "targets": tokens, "seq_start": torch.zeros_like(tokens, dtype=torch.bool)}
    return lambda: loss_sum(model, batch)[0].backward()


def bandwidth() -> float:
    """The bytes a second that a copy of 1 GiB reads and writes."""
    x = torch.empty(2**28, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.nbytes / (milliseconds(lambda: y.copy_(x)) / 1000)


def moved_bytes(op: str, backend: str, shape: tuple[int, int, int]) -> tuple[int, int]:
    """The bytes of the tensors that the kernels read and write, N = 64, bf16: of a forward that keeps nothing, and of
    forward and backward."""
    B, T, H = shape
    shapes = [(B, T, H, 64)] * 4 + ([(H, 64)] if op == "wkv6" else [(B, T, H, 64)] * 2)
    tensors = [torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes]
    tensors.append(torch.empty(B, H, 64, 64, device="meta"))
    starts, dy = torch.empty(B, T, dtype=torch.bool, device="meta"), torch.empty_like(tensors[0])
    with Trace() as alone, torch.no_grad():
        OPS[op](*tensors, seq_start=starts, backend=backend)
    with Trace() as both:
        run(op, backend, tensors, starts, dy)
    return tuple(sum(y.bytes for y in trace.operations if y.kind == "recurrence") for trace in (alone, both))


def part_of(kernel: str) -> str:
    """Which part of a step a kernel of that name computes."""
    if any(x in kernel for x in RECURRENCE):
        return "wkv"
    return "products" if any(x in kernel.lower() for x in PRODUCTS) else "rest"


def gpu_milliseconds(step: Callable[[], object]) -> dict[str, float]:
    """The GPU's time in each part of a step."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    found = Counter(wkv=0.0, products=0.0, rest=0.0)
    for x in profiler.events():
        if x.device_type == torch.autograd.DeviceType.CUDA:
            found[part_of(x.name)] += x.time_range.elapsed_us() / 1000
    return dict(found)


def check_compiling(name: str, report: Report) -> bool:
    program = PROGRAMS[name]
    options = program.variants.get((torch.bfloat16, 64)) or program.variants[torch.bfloat16]
    architectures = [x for x in ARCHITECTURES if x >= program.oldest]
    names = ", ".join(f"sm_{10 * major + minor}" for major, minor in architectures)
    try:
        began = time.perf_counter()
        for capability in architectures:
            compile_source(program.source, options, capability)
        took = f"{time.perf_counter() - began:.1f} s"
        report.add(f"NVRTC {'.'.join(map(str, version()))}, {name}.cu for {names}", took)
        return True
    except CompileError as error:
        report.add(f"compiling {name}.cu", f"failed: {error}")
        return False


def check_results(op: str, report: Report) -> bool:
    right = True
    for backend, (dtype, tolerance), N in product(KERNELS[op], TOLERANCE.items(), HEAD_SIZES):
        what = f"{op}, {backend}, N {N}"
        right &= check_error(what, dtype, tolerance, partial(worst_error, op, N, dtype, backend), report)
    return right


def check_fused(report: Report) -> bool:
    right = True
    for op, (dtype, tolerance) in product(FUSED, TOLERANCE.items()):
        right &= check_error(op.name, dtype, tolerance, partial(fused_error, op, dtype, "cuda"), report)
    return right


def check_error(what: str, dtype: torch.dtype, tolerance: float, error_of: Callable[[], float], report: Report) -> bool:
    """Whether the error is not above the tolerance, or was not looked at because the time is over."""
    what = f"{what}, {str(dtype).removeprefix('torch.')}, worst relative error"
    if not report.has_time(what):
        return True
    error = error_of()
    mark = "" if error <= tolerance else f", above {tolerance:.0e}: WRONG"
    report.add(what, f"{error:.1e}{mark}", error=error)
    return error <= tolerance


def add_time(op: str, backend: str, shape: tuple[int, int, int], peak: float, report: Report) -> None:
    """The op alone, in bf16 with N = 64; shape: B, T, H. peak: `bandwidth()`."""
    B, T, H = shape
    what = f"{op}, {backend}: B{B} T{T} H{H} N64 bf16, forward / with backward"
    if not report.has_time(what):
        return
    tensors, starts, dy = inputs(op, B, T, H, 64, torch.bfloat16, "cuda")
    with torch.no_grad():
        forward = milliseconds(lambda: OPS[op](*tensors, seq_start=starts, backend=backend))
    both = milliseconds(lambda: run(op, backend, tensors, starts, dy))
    values: dict[str, Any] = {"forward_ms": forward, "both_ms": both}
    result = f"{forward:.2f} / {both:.2f} ms"
    if backend in KERNELS[op]:
        moved = moved_bytes(op, backend, shape)
        values["bandwidth"] = [size / (ms / 1000) / peak for size, ms in zip(moved, (forward, both), strict=True)]
        result += ", {:.0%} / {:.0%} of a copy's bandwidth".format(*values["bandwidth"])
    report.add(what, result, **values)


def whole_rows(backend: str) -> Callable[..., Tensor]:
    """The y of WKV-7 without a first state, of rows that are one document each."""
    return lambda *tensors: OPS["wkv7"](*tensors, backend=backend)[0]


def load_other(file: Path) -> Callable[..., Tensor]:
    """The function `wkv7` of a Python file: (r, z, k, v, a, b) -> y as `whole_rows` has them, differentiable."""
    check_is_file(file, "other kernel's file")
    spec = importlib.util.spec_from_file_location("other", file)
    if spec is None or spec.loader is None:
        raise UserError(f"{file}: is no Python file; give one, .py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(kernel := getattr(module, "wkv7", None)):
        raise UserError(f"{file}: has no function wkv7(r, z, k, v, a, b) that returns y; give it one")
    return kernel


def outcome(kernel: Callable[..., Tensor], tensors: list[Tensor], dy: Tensor) -> list[Tensor]:
    """y and all gradients."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    y = kernel(*leaves)
    return [y, *torch.autograd.grad(y, leaves, dy)]


def add_error(what: str, kernel: Callable[..., Tensor], tensors: list[Tensor], dy: Tensor, report: Report) -> None:
    exact = outcome(whole_rows("reference"), [x.cpu().double() for x in tensors], dy.cpu().double())
    error = largest(outcome(kernel, tensors, dy), exact)
    report.add(f"{what}, worst relative error", f"{error:.1e}", error=error)


def add_both(what: str, kernel: Callable[..., Tensor], tensors: list[Tensor], dy: Tensor, report: Report) -> None:
    with torch.no_grad():
        forward = milliseconds(partial(kernel, *tensors))
    both = milliseconds(partial(outcome, kernel, tensors, dy))
    result = f"{forward:.2f} / {both:.2f} ms"
    report.add(f"{what} N64 bf16, forward / with backward", result, forward_ms=forward, both_ms=both)


def add_others(other: Callable[..., Tensor] | None, report: Report) -> None:
    """The chunked WKV-7 and the kernels of others on the same rows, of one document each, which everybody's can take,
    in bf16 with N = 64. What one of them raises is its result, and it is not asked again."""
    given = {"cuda": whole_rows("cuda"), "other": other, "fla": whole_rows("fla")}
    kernels = {f"wkv7, {name}, whole rows": kernel for name, kernel in given.items() if kernel is not None}
    kernels = {what: kernel for what, kernel in kernels.items() if report.has_time(what)}
    for B, T, H in ((2, 256, 3), *SHAPES) if kernels else ():
        (*tensors, _), _, dy = inputs("wkv7", B, T, H, 64, torch.bfloat16, "cuda")  # once: large ones take seconds
        for what, kernel in [*kernels.items()]:
            try:
                if (B, T, H) in SHAPES:
                    add_both(f"{what}: B{B} T{T} H{H}", kernel, tensors, dy, report)
                else:
                    add_error(what, kernel, tensors, dy, report)
            except Exception as error:
                report.add(what, f"failed: {error}")
                del kernels[what]


def add_times(op: str, peak: float, report: Report) -> None:
    for backend in (*KERNELS[op], "torch"):
        add_time(op, backend, (8, 1024, 32), peak, report)
    for shape, backend in product(SHAPES, KERNELS[op]):
        add_time(op, backend, shape, peak, report)
    for backend in (*KERNELS[op], "torch"):
        what = f"{op}, {backend}: training step, 0.1B, B8 T1024 bf16"
        if report.has_time(what):
            took = milliseconds(training_step(SIZES[op], backend, 8, 1024, "cuda"))
            report.add(what, f"{took:.1f} ms", ms=took)


def add_step(shape: str, backend: str, report: Report) -> None:
    """A training step of a released RWKV-7's shape, MiSS r = 32, and the GPU's time in its parts."""
    what = f"wkv7, {backend}: training step, {shape.upper()}, B8 T1024 bf16"
    if reason := unusable("wkv7", backend, torch.device("cuda", 0), torch.bfloat16, 64):
        report.add(what, f"skipped: {reason}")
        return
    if not report.has_time(what):
        return
    try:
        step = training_step(infer_config(find_base(PlanConfig(shape=shape)).tensors, shape), backend, 8, 1024, "cuda")
        step()
        torch.cuda.reset_peak_memory_stats()
        ms = milliseconds(step)
        memory = torch.cuda.max_memory_allocated() / 2**30
        parts = gpu_milliseconds(step)
    except torch.OutOfMemoryError:
        report.add(what, "skipped: it does not fit into this GPU's memory")
        return
    speed = 8 * 1024 / (ms / 1000)
    shown = ", ".join(f"{part} {took:.1f}" for part, took in parts.items())
    result = f"{speed:,.0f} tokens/s, {memory:.1f} GiB; of the GPU's ms: {shown}"
    report.add(what, result, ms=ms, tokens_per_s=speed, memory_gib=memory, gpu_ms=parts)


def main(json_file: Path | None = None, minutes: float = 8.0, other_file: Path | None = None) -> int:
    if json_file:
        check_name(json_file, "the results' file")
    other = load_other(other_file) if other_file else None
    report = Report(60 * minutes)
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        gpu = torch.cuda.get_device_properties(0)
        report.add("GPU", f"{gpu.name}, sm_{gpu.major}{gpu.minor}, torch {torch.__version__}")
        peak = bandwidth()
        report.add("a copy of 1 GiB", f"{peak / 1e9:,.0f} GB/s", bytes_per_s=peak)
    right = check_compiling("fused", report)
    if on_gpu:
        try:
            right &= check_fused(report)
        except UserError as error:
            report.add("fused on the GPU", f"failed: {error}")
            right = False
    else:
        report.add("fused against the formulas", "skipped: torch finds no GPU")
    for op in OPS:
        for name in PROGRAMS:
            if name.startswith(op):
                right &= check_compiling(name, report)
        if on_gpu:
            try:
                right &= check_results(op, report)
                add_times(op, peak, report)
            except UserError as error:
                report.add(f"{op} on the GPU", f"failed: {error}")
                right = False
        else:
            report.add(f"{op} against the reference", "skipped: torch finds no GPU")
            report.add(f"{op}: times of the kernels and of a training step", "skipped: torch finds no GPU")
    if on_gpu:
        add_others(other, report)
        for backend, shape in product((*KERNELS["wkv7"], "fla"), STEPS):
            add_step(shape, backend, report)
    Console(markup=False).print(report.table)
    if json_file:
        with atomic_write(json_file) as part:
            part.write_text(json.dumps({"right": right, "results": report.records}, indent=1) + "\n")
    return int(not right)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Check and time the CUDA kernels on this machine's GPU.")
    parser.add_argument("--json", type=Path, metavar="FILE", dest="json_file", help="also write the results there")
    parser.add_argument("--minutes", type=float, default=8.0, help="begin nothing after so long (8 if not given)")
    said = "a Python file with another WKV-7 to time: wkv7(r, z, k, v, a, b) -> y, each (B, T, H, N)"
    parser.add_argument("--other", type=Path, metavar="FILE", dest="other_file", help=said)
    try:
        sys.exit(main(**vars(parser.parse_args())))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
