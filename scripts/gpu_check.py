"""Checks and times the CUDA kernels on this machine's GPU; see gpu_check.sh. Status 1 where a check fails."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from itertools import product

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from rwkv_miss.config import AdapterConfig, ModelConfig
from rwkv_miss.errors import UserError
from rwkv_miss.ops import fused, wkv6, wkv7
from rwkv_miss.ops.cuda.nvrtc import CompileError, compile_source, version
from rwkv_miss.ops.cuda.programs import HEAD_SIZES, PROGRAMS
from rwkv_miss.ops.fused_operators import OPS as FUSED
from rwkv_miss.ops.fused_operators import FusedOp

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


def check_compiling(name: str, table: Table) -> bool:
    program = PROGRAMS[name]
    options = program.variants.get((torch.bfloat16, 64)) or program.variants[torch.bfloat16]
    architectures = [x for x in ARCHITECTURES if x >= program.oldest]
    names = ", ".join(f"sm_{10 * major + minor}" for major, minor in architectures)
    try:
        began = time.perf_counter()
        for capability in architectures:
            compile_source(program.source, options, capability)
        took = f"{time.perf_counter() - began:.1f} s"
        table.add_row(f"NVRTC {'.'.join(map(str, version()))}, {name}.cu for {names}", took)
        return True
    except CompileError as error:
        table.add_row(f"compiling {name}.cu", f"failed: {error}")
        return False


def check_results(op: str, table: Table) -> bool:
    right = True
    for backend, (dtype, tolerance), N in product(KERNELS[op], TOLERANCE.items(), HEAD_SIZES):
        right &= add_error(f"{op}, {backend}, N {N}", dtype, worst_error(op, N, dtype, backend), tolerance, table)
    return right


def check_fused(table: Table) -> bool:
    right = True
    for op, (dtype, tolerance) in product(FUSED, TOLERANCE.items()):
        right &= add_error(op.name, dtype, fused_error(op, dtype, "cuda"), tolerance, table)
    return right


def add_error(what: str, dtype: torch.dtype, error: float, tolerance: float, table: Table) -> bool:
    """Whether the error is not above the tolerance."""
    mark = "" if error <= tolerance else f", above {tolerance:.0e}: WRONG"
    table.add_row(f"{what}, {str(dtype).removeprefix('torch.')}, worst relative error", f"{error:.1e}{mark}")
    return error <= tolerance


def add_time(op: str, backends: tuple[str, ...], shape: tuple[int, int, int], table: Table) -> None:
    """The op alone, in bf16 with N = 64; shape: B, T, H."""
    B, T, H = shape
    tensors, starts, dy = inputs(op, B, T, H, 64, torch.bfloat16, "cuda")
    for backend in backends:
        with torch.no_grad():
            forward = milliseconds(lambda b=backend: OPS[op](*tensors, seq_start=starts, backend=b))
        both = milliseconds(lambda b=backend: run(op, b, tensors, starts, dy))
        what = f"{op}, {backend}: B{B} T{T} H{H} N64 bf16, forward / with backward"
        table.add_row(what, f"{forward:.2f} / {both:.2f} ms")


def add_times(op: str, table: Table) -> None:
    add_time(op, (*KERNELS[op], "torch"), (8, 1024, 32), table)
    for shape in SHAPES:
        add_time(op, KERNELS[op], shape, table)
    for backend in (*KERNELS[op], "torch"):
        took = milliseconds(training_step(SIZES[op], backend, 8, 1024, "cuda"))
        table.add_row(f"{op}, {backend}: training step, 0.1B, B8 T1024 bf16", f"{took:.1f} ms")


def main() -> int:
    table = Table("what", "result", title="CUDA kernels")
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        gpu = torch.cuda.get_device_properties(0)
        table.add_row("GPU", f"{gpu.name}, sm_{gpu.major}{gpu.minor}, torch {torch.__version__}")
    right = check_compiling("fused", table)
    if on_gpu:
        try:
            right &= check_fused(table)
        except UserError as error:
            table.add_row("fused on the GPU", f"failed: {error}")
            right = False
    else:
        table.add_row("fused against the formulas", "skipped: torch finds no GPU")
    for op in OPS:
        for name in PROGRAMS:
            if name.startswith(op):
                right &= check_compiling(name, table)
        if on_gpu:
            try:
                right &= check_results(op, table)
                add_times(op, table)
            except UserError as error:
                table.add_row(f"{op} on the GPU", f"failed: {error}")
                right = False
        else:
            table.add_row(f"{op} against the reference", "skipped: torch finds no GPU")
            table.add_row(f"{op}: times of the kernels and of a training step", "skipped: torch finds no GPU")
    Console(markup=False).print(table)
    return int(not right)


if __name__ == "__main__":
    sys.exit(main())
