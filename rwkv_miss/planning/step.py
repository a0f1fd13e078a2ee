"""What one training step holds beside the weights, found by running it on the meta device, where operations have
shapes and no values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rwkv_miss.adapters.inject import inject, trained_parameters
from rwkv_miss.config import TrainConfig
from rwkv_miss.model.base import RWKV
from rwkv_miss.model.load import build_model
from rwkv_miss.model.log_probs import batch_log_probs
from rwkv_miss.model.state import State
from rwkv_miss.planning.live import Live
from rwkv_miss.planning.shapes import Base
from rwkv_miss.training import optim
from rwkv_miss.training.objective import find_objective

KINDS = ("gradients", "optimizer state", "activations", "logits")
Phases = dict[str, dict[str, float]]
"""The bytes of each of `KINDS` at the peak of each phase of a step."""
# The fewest layers and chunks from which the rest can be told: the first and the last layer differ from those between,
# and the last chunk, which is not computed twice, and the one after the first differ from the others.
_LAYERS, _CHUNKS = (2, 3), (3, 4)


def model_of(base: Base, config: TrainConfig) -> RWKV:
    """The model that a run trains, on the meta device."""
    quant = config.quant, config.quant_skip
    model = build_model(base.tensors, "the base", base.dtype, "meta", kernel_of(config), *quant)
    model.gradient_checkpointing = config.gradient_checkpointing
    return inject(model.train(), config.adapter)


def kernel_of(config: TrainConfig) -> str:
    """The backend of the recurrence whose tensors are counted: that of NVIDIA's GPUs where the run chooses one itself.
    What flash-linear-attention's kernels hold is taken to be what the scalar ones do."""
    return {"auto": "cuda", "fla": "cuda_scalar"}.get(config.wkv_backend, config.wkv_backend)


def step_phases(base: Base, config: TrainConfig, keeps_gradients: bool) -> Phases:
    """What a training step holds beside the weights.

    The memory of a phase grows by the same bytes with every layer and with every chunk, so that long rows and deep
    models are told from short ones.

    Args:
        keeps_gradients: whether the gradients are there all the time, as they are in buckets of DDP and between
            accumulated micro-batches; otherwise a step frees the last one's before its backward pass.
    """
    columns = min(config.ctx_len, config.window_len or config.ctx_len)
    layers = _LAYERS if base.n_layer > max(_LAYERS) and _is_alike(base, config) else (base.n_layer,)
    chunk_len = config.chunk_len or columns
    whole, rest = divmod(columns, chunk_len)
    chunks = _CHUNKS if whole > max(_CHUNKS) else (whole,)
    found = {}
    for n_layer, n_chunk in product(layers, chunks):
        part = replace(config, ctx_len=n_chunk * chunk_len + rest)
        found[n_layer, n_chunk] = _measure(base.with_layers(n_layer), part, keeps_gradients)
    of_layers = {n: _on_line({m: found[n, m] for m in chunks}, whole) for n in layers}
    return _on_line(of_layers, base.n_layer)


def _is_alike(base: Base, config: TrainConfig) -> bool:
    """Whether all layers but the first train the same parameters."""
    trained: dict[str, set[str]] = {str(i): set() for i in range(1, base.n_layer)}
    for key in trained_parameters(model_of(base, config)):
        _, layer, name = (*key.split(".", 2), "", "")[:3]
        if key.startswith("blocks.") and layer != "0":
            trained[layer].add(name)
    return all(names == trained["1"] for names in trained.values())


def _on_line(points: Mapping[int, Phases], x: int) -> Phases:
    """The value at x of the line through one or two points, for each phase of the first."""
    (x0, first), (x1, last) = min(points.items()), max(points.items())
    steps = (x - x0) / (x1 - x0) if x1 > x0 else 0
    return {
        phase: {kind: size + steps * (last[phase][kind] - size) for kind, size in sizes.items()}
        for phase, sizes in first.items()
    }


class WithoutValues(TorchDispatchMode):
    """Lets operations run on the meta device whose results depend on values: what is read back is zeros, so that each
    row is one document, and a mask chooses everything, as if every token carried loss."""

    def __torch_dispatch__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        aten = torch.ops.aten
        if function is aten.index.Tensor and args[1][0] is not None and args[1][0].dtype == torch.bool:
            x, (mask,) = args
            return x.new_empty((mask.numel(), *x.shape[mask.dim() :]))
        if (
            function is aten._to_copy.default
            and args[0].is_meta
            and (kwargs or {}).get("device") == torch.device("cpu")
        ):
            return torch.zeros(args[0].shape, dtype=args[0].dtype)
        return function(*args, **(kwargs or {}))


def _measure(base: Base, config: TrainConfig, keeps_gradients: bool) -> Phases:
    """Runs a step, after one that has made the optimizer's state and the gradients."""
    model = model_of(base, config)
    trained = list(trained_parameters(model).values())
    is_in_pieces = find_objective(config.objective).group_size is not None
    alone = replace(config, offload="none")
    optimizer, _ = optim.configure(optim.parameter_groups(model, alone), 1, alone)
    for group in optimizer.param_groups:
        group["foreach"] = config.wkv_backend != "cpu"  # what PyTorch chooses on a GPU
    with Live("activations") as live, WithoutValues():
        _mark(model, live)
        for p in trained:
            p.grad = torch.empty_like(p)
        optimizer.step()
        live.label(_states(optimizer), "optimizer state")
        live.label((p.grad for p in trained if p.grad is not None), "gradients")
        live.enter("forward")
        batch = batch_of(config)
        state = _state(model, config) if config.window_len else None
        log_probs, _ = batch_log_probs(model, batch, state, config.chunk_len, "none" if is_in_pieces else "sum")
        loss = -log_probs.sum()
        if not keeps_gradients:
            optimizer.zero_grad()
        live.enter("head")
        live.kind = "logits"
        loss.backward()
        live.label((p.grad for p in trained if p.grad is not None), "gradients")
        del loss, log_probs, batch, state, _
        live.kind = "activations"
        live.enter("optimizer")
        optimizer.step()
        last = base.n_layer - 1
        phases = {"forward": "forward", "head": "head", "last block": f"block {last}", "first block": "block 0"}
        return {
            phase: {kind: live.at_peak(name).get(kind, 0) for kind in KINDS}
            for phase, name in (phases | {"optimizer": "optimizer"}).items()
            if name in live.peaks
        }


def _mark(model: RWKV, live: Live) -> None:
    """Tells `live` where the backward pass is and which tensors are made by the head."""

    def kind(name: str) -> Callable[..., None]:
        return lambda *_: setattr(live, "kind", name)

    def block(number: int) -> Callable[..., None]:
        def begin(gradient: Tensor) -> None:
            live.kind = "activations"
            live.enter(f"block {number}")

        def watch(module: nn.Module, arguments: Any, output: Any) -> None:
            if output[0].requires_grad:
                output[0].register_hook(begin)

        return watch

    model.head.register_forward_pre_hook(kind("logits"))
    model.head.register_forward_hook(kind("activations"))
    for i, module in enumerate(model.blocks):
        module.register_forward_hook(block(i))


def _states(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]


def batch_of(config: TrainConfig) -> dict[str, Tensor]:
    """A micro-batch of `rwkv_miss.data.batches`."""
    shape = config.batch_size, min(config.ctx_len, config.window_len or config.ctx_len)
    tokens, targets = (torch.empty(shape, dtype=torch.int64, device="meta") for _ in range(2))
    return {"tokens": tokens, "targets": targets, "seq_start": torch.empty(shape, dtype=torch.bool, device="meta")}


def _state(model: RWKV, config: TrainConfig) -> State:
    """The state that a window begins from."""
    sizes, dtype = model.config, model.emb.weight.dtype
    shift = sizes.n_layer, config.batch_size, sizes.n_embd
    wkv = sizes.n_layer, config.batch_size, sizes.n_head, sizes.head_size, sizes.head_size
    return State(
        torch.empty(shift, dtype=dtype, device="meta"),
        torch.empty(wkv, dtype=torch.promote_types(dtype, torch.float32), device="meta"),
        torch.empty(shift, dtype=dtype, device="meta"),
        sizes.version,
    )
