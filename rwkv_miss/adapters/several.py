"""Several adapters in one model: one of them in use, or several at once with weights, W + sum of w_i dW_i, beside the
frozen weights or merged into copies of them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rwkv_miss.adapters.inject import Installed, InUse, put_in, standing, take_out
from rwkv_miss.errors import UserError
from rwkv_miss.model.base import RWKV
from rwkv_miss.model.linear import FrozenLinear, Linear

# Elements of a weight that are merged in fp32 at a time.
_PIECE = 2**22


def set_adapter(model: RWKV, use: str | Mapping[str, float] | None, merged: bool = False) -> RWKV:
    """Chooses which of a model's adapters act, in place, by the names that they were loaded with. Nothing is lost by
    it: the frozen weights are never written to, so that every choice can be taken back to the bit.

    Args:
        use: the adapter to use, and to train; or the weight of each of several, which are then not trained; or None for
            the base alone.
        merged: let plain linears of W + sum of w_i dW_i, rounded once to the model's dtype, take the adapters' places.
            They run as fast as the base's, and take memory beside W while they are in use.

    Raises:
        UserError: the model has no adapter of a name.
    """
    weights = {use: 1.0} if isinstance(use, str) else dict(use or {})
    for name in weights:
        if name not in model.adapters:
            there = ", ".join(model.adapters) or "it has none"
            raise UserError(f"the model has no adapter whose name is {name!r}; it has {there}")
    chosen = {name: adapter for name in weights if isinstance(adapter := model.adapters[name], Installed)}
    take_out(model)
    if isinstance(use, str) and not merged:
        put_in(model, chosen[use])
        for path, module in chosen[use].modules.items():  # several at once are not trained
            module.requires_grad_(True)
            base_layer = chosen[use].base[path]
            assert isinstance(base_layer, FrozenLinear)
            base_layer.requires_grad_(False)
        return model
    modules: dict[str, nn.Module] = {}
    base = standing(model, dict.fromkeys(place for adapter in chosen.values() for place in adapter.base))
    for path in dict.fromkeys(path for adapter in chosen.values() for path in adapter.modules):
        beside = [(adapter, weights[name]) for name, adapter in chosen.items() if path in adapter.modules]
        modules[path] = _merge(path, base[path], beside) if merged else _Weighted(path, base[path], beside)
    whole = {}
    for key in dict.fromkeys(key for adapter in chosen.values() for key in adapter.whole):
        before = torch.zeros(()) if base[key] is None else base[key].detach().float()
        changes = [w * (chosen[n].whole[key] - before) for n, w in weights.items() if key in chosen[n].whole]
        whole[key] = before + sum(changes)
    if weights:
        put_in(model, InUse(modules, whole, base))
        model.requires_grad_(False)
    return model


class _Weighted(nn.Module):
    """y = (1 - sum of w_i) W x + sum of w_i (W + dW_i) x: right for any method, at a linear's cost for each."""

    def __init__(self, path: str, linear: FrozenLinear, beside: list[tuple[Installed, float]]) -> None:
        super().__init__()
        self.base_layer = linear
        self.parts = nn.ModuleList(adapter.modules[path] for adapter, _ in beside)
        self.weights = [weight for _, weight in beside]

    def forward(self, x: Tensor) -> Tensor:
        y = (1 - sum(self.weights)) * self.base_layer(x)
        for part, weight in zip(self.parts, self.weights, strict=True):
            y = y + weight * part(x)
        return y


@torch.no_grad()
def _merge(path: str, linear: FrozenLinear, beside: list[tuple[Installed, float]]) -> Linear:
    """A linear whose weight is W + sum of w_i dW_i."""
    parts = []
    for adapter, weight in beside:
        method, config = adapter.plan.linears[path]
        held = {k: t for k, t in adapter.modules[path].state_dict().items() if not k.startswith("base_layer.")}
        parts.append((method, config, method.to_file(held), weight))
    like = linear.rows(0, 0)
    W = torch.empty(linear.out_features, linear.in_features, dtype=like.dtype, device=like.device)
    step = max(1, _PIECE // linear.in_features)
    for start in range(0, linear.out_features, step):
        rows = linear.rows(start, min(start + step, linear.out_features)).float()
        deltas = [w * method.delta(rows, start, tensors, config) for method, config, tensors, w in parts]
        W[start : start + len(rows)] = rows + sum(deltas)
    with torch.device("meta"):
        found = Linear(linear.in_features, linear.out_features)
    found.weight = nn.Parameter(W, requires_grad=False)
    return found
