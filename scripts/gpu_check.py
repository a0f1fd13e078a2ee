"""Checks and times the CUDA kernels on this machine's GPU; see gpu_check.sh. Status 1 where a check fails."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from rwkv_miss.config import AdapterConfig, ModelConfig
from rwkv_miss.ops import wkv7
from rwkv_miss.ops.cuda.nvrtc import CompileError, compile_source, version
from rwkv_miss.ops.cuda.wkv7 import HEAD_SIZES, SOURCE

# Relative error in norm: of fp32 sums in another order, and of the rounding of bf16 outputs.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 8e-3}
ARCHITECTURES = ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
ROUNDS = 10


def inputs(B: int, T: int, H: int, N: int, dtype: torch.dtype, device: str) -> tuple[list[Tensor], Tensor, Tensor]:
    """r, z, k, v, a, b and the first state, as RWKV-7 has them; seq_start; a gradient for y."""
    g = torch.Generator().manual_seed(0)
    r, z, k, v, dy = (torch.randn(B, T, H, N, generator=g) for _ in range(5))
    kk = torch.nn.functional.normalize(torch.randn(B, T, H, N, generator=g), dim=-1)
    rate = torch.rand(B, T, H, N, generator=g)
    state = torch.randn(B, H, N, N, generator=g) * 0.1
    starts = torch.rand(B, T, generator=g) < 0.01
    tensors = [x.to(device, dtype) for x in (r, z * 2, k * N**-0.5, v, -kk, kk * rate)]
    return [*tensors, state.to(device)], starts.to(device), dy.to(device, dtype)


def run(backend: str, tensors: list[Tensor], starts: Tensor, dy: Tensor) -> list[Tensor]:
    """y, the last state and all gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    y, last = wkv7(*leaves, seq_start=starts, backend=backend)
    return [y, last, *torch.autograd.grad([y, last], leaves, [dy, torch.ones_like(last)])]


def worst_error(N: int, dtype: torch.dtype) -> float:
    tensors, starts, dy = inputs(2, 257, 3, N, dtype, "cuda")
    found = run("cuda", tensors, starts, dy)
    exact = run("reference", [x.cpu().double() for x in tensors], starts.cpu(), dy.cpu().double())
    return max(((f.cpu().double() - e).norm() / e.norm()).item() for f, e in zip(found, exact, strict=True))


def milliseconds(f: Callable[[], object]) -> float:
    """The fastest of ROUNDS, by the device's clock."""
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


def training_step(backend: str) -> float:
    """Milliseconds of forward and backward of a MiSS fine-tune, RWKV-7 0.1B's shape, bf16, B8 T1024."""
    from rwkv_miss.adapters.inject import inject
    from rwkv_miss.model.init import init_weights
    from rwkv_miss.model.loss import loss_sum
    from rwkv_miss.model.rwkv7 import RWKV7

    sizes = ModelConfig(7, 12, 768, 12, 64, 3072, 65536, {"w": 64, "a": 64, "v": 32, "g": 128})
    with torch.device("meta"):
        model = RWKV7(sizes, backend)
    model.load_state_dict({k: w.bfloat16() for k, w in init_weights(sizes, 0).items()}, assign=True)
    inject(model.cuda(), AdapterConfig(r=32))
    tokens = torch.randint(sizes.vocab_size, (8, 1024), device="cuda")
    batch = {"tokens": tokens, "targets": tokens, "seq_start": torch.zeros_like(tokens, dtype=torch.bool)}
    return milliseconds(lambda: loss_sum(model, batch).backward())


def main() -> int:
    table = Table("what", "result", title="CUDA kernels")
    failed = False
    try:
        began = time.perf_counter()
        for capability in ARCHITECTURES:
            compile_source(SOURCE, ("-DHEAD_SIZE=64", "-DIO_BF16=1"), capability)
        names = ", ".join(f"sm_{10 * major + minor}" for major, minor in ARCHITECTURES)
        table.add_row(
            f"NVRTC {'.'.join(map(str, version()))}, wkv7.cu for {names}", f"{time.perf_counter() - began:.1f} s"
        )
    except CompileError as e:
        table.add_row("compiling wkv7.cu", f"failed: {e}")
        failed = True
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        table.add_row("GPU", f"{gpu.name}, sm_{gpu.major}{gpu.minor}, torch {torch.__version__}")
        for dtype, tolerance in TOLERANCE.items():
            for N in HEAD_SIZES:
                error = worst_error(N, dtype)
                failed |= not error <= tolerance
                mark = "" if error <= tolerance else f", above {tolerance:.0e}: WRONG"
                table.add_row(f"N {N}, {str(dtype).removeprefix('torch.')}, worst relative error", f"{error:.1e}{mark}")
        tensors, starts, dy = inputs(8, 1024, 32, 64, torch.bfloat16, "cuda")
        for backend in ("cuda", "torch"):
            with torch.no_grad():
                forward = milliseconds(lambda b=backend: wkv7(*tensors, seq_start=starts, backend=b))
            both = milliseconds(lambda b=backend: run(b, tensors, starts, dy))
            table.add_row(
                f"{backend}: B8 T1024 H32 N64 bf16, forward / with backward", f"{forward:.2f} / {both:.2f} ms"
            )
        for backend in ("cuda", "torch"):
            table.add_row(f"{backend}: training step, 0.1B, B8 T1024 bf16", f"{training_step(backend):.1f} ms")
    else:
        table.add_row("checks against the reference", "skipped: torch finds no GPU")
        table.add_row("times of kernels and of a training step", "skipped: torch finds no GPU")
    Console().print(table)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
