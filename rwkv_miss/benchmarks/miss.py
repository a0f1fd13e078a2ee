"""Times MiSS's linear, forward and backward, against the frozen linear alone and HF PEFT's MiSS and LoRA."""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rwkv_miss.adapters.miss import MissLinear, folds
from rwkv_miss.benchmarks.common import Table, threads
from rwkv_miss.model.linear import Linear

WIDTHS = (768, 1024, 2560)
"""Inputs and outputs of the linears."""
TOKENS = (512, 2048, 8192)
_SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16"}
RANK = 64
ROUNDS = 9


def bench_miss(thread_count: int) -> Table:
    """Forward and backward of one square linear, on the GPU if there is one: the frozen linear (its input's gradient
    alone), our MiSS, and PEFT's MiSS and LoRA, the latter with half of the rank, so that all three train as much.

    All take turns, so that a busy machine slows all of them, and PEFT's MiSS must first agree with ours in y and its
    gradients. PEFT's tensors are in the linear's dtype: in bf16 that is faster than its default.

    Returns:
        A table with a row for each dtype, width and number of tokens: name; frozen_ms, the smallest of `ROUNDS`; for
        each of miss, peft_miss and peft_lora the median of its rounds' ratios to that; miss_min and miss_max, the
        smallest and the largest ratio; limit, the ratio of our MiSS if each of its multiplications took as long as
        those of the frozen linear and nothing else took any time; note, why there are no figures of PEFT.
    """
    peft = importlib.util.find_spec("peft") is not None
    cells = [(dtype, width, tokens) for dtype in _SHORT for width in WIDTHS for tokens in TOKENS]
    with threads(thread_count):
        rows = [_row(dtype, width, tokens, peft) for dtype, width, tokens in cells]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{thread_count} thread(s)"
    return Table(f"MiSS beside the frozen linear, r = {RANK}, {ROUNDS} rounds, {device}", rows)


def _row(dtype: torch.dtype, width: int, tokens: int, peft: bool) -> dict[str, Any]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    x, dy, W = (torch.randn(n, width, generator=generator).to(device, dtype) for n in (tokens, tokens, width))
    x.requires_grad_()
    linear = Linear(width, width)
    linear.weight = nn.Parameter(W / width**0.5, requires_grad=False)
    ours = MissLinear(linear, (RANK, width), 0.0)
    nn.init.normal_(ours.miss_block, std=0.1 / width**0.5)
    modules: dict[str, nn.Module] = {"frozen": linear, "miss": ours}
    if peft:
        modules |= _peft_modules(linear, ours.miss_block)
        for mine, other in zip(_run(ours, x, dy), _run(modules["peft_miss"], x, dy), strict=True):
            difference = (mine.float() - other.float()).norm() / mine.float().norm()
            assert difference <= (1e-5 if dtype == torch.float32 else 2e-2), f"PEFT's MiSS disagrees: {difference:.1e}"
    times: dict[str, list[float]] = {name: [] for name in modules}
    for i in range(ROUNDS + 1):
        for name, module in modules.items():
            seconds = _seconds(partial(_run, module, x, dy))
            if i > 0:  # the first round warms up
                times[name].append(seconds)
    frozen = times["frozen"]
    ratios = {name: sorted(a / b for a, b in zip(times[name], frozen, strict=True)) for name in list(modules)[1:]}
    # For each row and output the frozen linear's two products take 2 `width` multiplications, each of MiSS's own r.
    products = 1 if folds(linear, tokens, RANK) else 3
    row: dict[str, Any] = {"name": f"{_SHORT[dtype]} {width} wide, T {tokens}", "frozen_ms": min(frozen) * 1e3}
    row |= {name: statistics.median(found) for name, found in ratios.items()}
    row |= {"miss_min": ratios["miss"][0], "miss_max": ratios["miss"][-1], "limit": 1 + products * RANK / (2 * width)}
    return row | {"note": "" if peft else "not installed: pip install peft"}


def _peft_modules(linear: Linear, D: Tensor) -> dict[str, nn.Module]:
    from peft import LoraConfig, MissConfig, PeftConfig, inject_adapter_in_model

    def beside(config: PeftConfig) -> nn.Module:
        plain = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
        plain.weight = linear.weight
        holder = nn.ModuleDict({"linear": plain})
        adapted: Any = inject_adapter_in_model(config, holder)
        return adapted["linear"].to(D.device, linear.weight.dtype)

    miss: Any = beside(MissConfig(r=len(D), target_modules=["linear"]))
    miss.miss_block["default"].data.copy_(D)
    return {"peft_miss": miss, "peft_lora": beside(LoraConfig(r=len(D) // 2, target_modules=["linear"]))}


def _run(module: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    """y, dx and the gradients of what the module trains."""
    y = module(x)
    trained = [p for p in module.parameters() if p.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, [x, *trained], dy)]


def _seconds(work: Callable[[], Any]) -> float:
    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    start = now()
    work()
    return now() - start
