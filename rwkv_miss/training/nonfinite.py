"""A loss that is not finite ends the run; this finds where it came from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from rwkv_miss.adapters.inject import checkpoint_key
from rwkv_miss.errors import RunError
from rwkv_miss.training.watch import ElsewhereError


def check_finite(trainer: L.Trainer, model: nn.Module, loss: Tensor, again: Callable[[], Any]) -> None:
    """Ends the run on every rank when the loss of any is not finite.

    Args:
        again: runs the forward pass of the loss once more.

    Raises:
        RunError: it names the first module of `model`, in the order of the forward pass, that made a value that is not
            finite.
    """
    finite = bool(torch.isfinite(loss))
    if trainer.strategy.reduce_boolean_decision(finite, all=True):
        return
    # All ranks run it again: under ZeRO-3 a forward needs every one of them.
    culprit = first_nonfinite(model, again)
    where = f"step {trainer.global_step + 1}"
    if finite:
        raise ElsewhereError(f"{where}: the loss is not finite on another rank")
    raise RunError(
        f"{where}: the loss is {loss.item()}; the first module with an output that is not finite is {culprit}. "
        "Nothing of this step was kept. Lower lr, or add warmup_steps"
    )


@torch.no_grad()
def first_nonfinite(model: nn.Module, forward: Callable[[], Any]) -> str:
    """The first module, in the order in which they finish in `forward()`, whose output holds an inf or NaN, and which
    of its own parameters do."""
    found: list[str] = []

    def watch(name: str):
        def hook(child: nn.Module, args: Any, output: Any) -> None:
            outputs = [t for t in (output if isinstance(output, tuple) else (output,)) if isinstance(t, Tensor)]
            if found or all(torch.isfinite(t).all() for t in outputs):
                return
            # checkpoint_key drops `base_layer`: the parameters of a wrapped linear count as this module's own.
            own = {checkpoint_key(f"x.{n}").removeprefix("x."): p for n, p in child.named_parameters()}
            bad = [n for n, p in own.items() if "." not in n and not torch.isfinite(p).all()]
            found.append(
                f"{name} ({type(child).__name__}{', its ' + ', '.join(bad) + ' is not finite' if bad else ''})"
            )

        return hook

    # A parameter that is cast has a module of its own; it is reported with the module that it belongs to.
    modules = {n: m for n, m in model.named_modules() if n and "parametrizations" not in n}
    handles = [m.register_forward_hook(watch(n)) for n, m in modules.items()]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else "the loss itself (every module's output is finite)"
