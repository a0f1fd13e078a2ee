"""What the roundings of the chunked WKV-7 do to a training: the demo's, with a WKV-7 that rounds where a kernel rounds.

`python -m tests.ops.wkv7_training` prints the table of docs/results.md; seeds of your own can be given.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from rwkv_miss.commands.model import load
from rwkv_miss.config import AdapterConfig, EvalConfig, TrainConfig
from rwkv_miss.evaluating.evaluate import evaluate
from rwkv_miss.ops.cpu.wkv import wkv7
from rwkv_miss.ops.dispatch import IMPLEMENTATIONS, Backend
from tests.ops.wkv7_chunk_model import to_bf16, to_two_bf16, wkv7_chunk_model
from tests.training.runs import quiet_train

DEMO = Path(__file__).parents[2] / "scripts" / "demo"
SEEDS = (1, 2, 3, 4, 42)
ROUNDINGS: dict[str, Any] = {"rnd": to_bf16, "split": to_two_bf16, "checkpoint": to_bf16}
Wkv7 = Callable[..., tuple[Tensor, Tensor]]
"""(r, z, k, v, a, b, state, seq_start) -> (y, the last state)"""


class _Rounded(torch.autograd.Function):
    """Rounds to bfloat16 on the way forwards, and the gradient on its way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return to_bf16(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return to_bf16(grad)


def outside(kernel: Wkv7) -> Wkv7:
    """With the inputs, y and their gradients in bfloat16, as those of every kernel are."""

    def rounded(*arguments: Tensor) -> tuple[Tensor, Tensor]:
        *inputs, state, seq_start = arguments
        y, last = kernel(*map(_Rounded.apply, inputs), state, seq_start)
        return _Rounded.apply(y), last

    return rounded


def on_tensor_cores(**roundings: Any) -> Wkv7:
    """The chunked algorithm with the roundings that `wkv7_chunk_model` takes, inside as well."""

    class Op(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, seq_start: Tensor | None, state: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
            ctx.save_for_backward(state, *inputs)
            ctx.seq_start = seq_start
            y, last = wkv7_chunk_model([*inputs], state, seq_start, None, None, every=4, **roundings)
            return y, last

        @staticmethod
        def backward(ctx: Any, dy: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
            state, *inputs = ctx.saved_tensors
            found = wkv7_chunk_model(inputs, state, ctx.seq_start, dy, dlast, every=4, **roundings)
            *grads, dstate = found[2:]
            return None, dstate, *grads

    return outside(lambda *arguments: Op.apply(arguments[7], arguments[6], *arguments[:6]))


KERNELS = {"rounded as on tensor cores": on_tensor_cores(**ROUNDINGS), "as by the scalar kernels": outside(wkv7)}


@dataclass(frozen=True)
class Trained:
    """How many of the demo's 200 held-out questions are answered right, and the mean loss of their answers' tokens."""

    right: int
    loss: float


def train_demo(kernel: Wkv7, seed: int, out: Path, steps: int = 160) -> Trained:
    """Trains the demo's base as scripts/run_miss.sh does, with that WKV-7, and measures the result with ours."""
    config = TrainConfig(
        base=str(DEMO / "base.pth"),
        data=str(DEMO / "train.jsonl"),
        tokenizer="bytes",
        out=str(out),
        adapter=AdapterConfig(r=32),
        ctx_len=432,
        batch_size=2,
        max_steps=steps,
        lr=5e-3,
        warmup_steps=5,
        precision="fp32",
        seed=seed,
        wkv_backend="torch",
    )
    with patch.dict(IMPLEMENTATIONS, torch=Backend({"wkv7": kernel})):
        quiet_train(config)
    asked = EvalConfig(
        model=config.base,
        adapter=str(out / "adapter"),
        data=str(DEMO / "heldout.jsonl"),
        tokenizer="bytes",
        dtype="fp32",
        batch_size=200,
        exact_match=True,
        max_tokens=100,
    )
    found = evaluate(load(asked.model, asked.adapter, asked.dtype), asked)
    return Trained(found.scores["right"], found.loss)


def main(seeds: list[int]) -> None:
    """Prints a row for each way to round, with the figures of the seeds."""
    print("| | exact match | loss |\n|---|---|---|")
    for name, kernel in KERNELS.items():
        with TemporaryDirectory() as folder:
            found = [train_demo(kernel, seed, Path(folder) / str(seed)) for seed in seeds]
        right, losses = ", ".join(str(x.right) for x in found), ", ".join(f"{x.loss:.4f}" for x in found)
        print(f"| {name} | {right} | {losses} |", flush=True)


if __name__ == "__main__":
    main([int(x) for x in sys.argv[1:]] or [*SEEDS])
