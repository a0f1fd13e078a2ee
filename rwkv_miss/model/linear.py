"""The linears of a model, and what an adapter may use of them.

An adapter never reads a linear's weight: it calls the linear's methods. So a base whose weights are stored in another
form, such as a quantised one, needs another subclass of `FrozenLinear`, and no change to the adapters.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rwkv_miss.ops.products import linear


class FrozenLinear(nn.Module):
    """y = x W^T with W (out_features, in_features), without a bias: what an adapter may call of the linear that it goes
    beside. x, y and the results have the dtype that the model runs in.

    A module with its own backward pass over a linear must call `linear.forward(x)`, not `linear(x)`: DeepSpeed's ZeRO-3
    then counts the weight as used by that module, and gathers it for the module's backward pass too.
    """

    in_features: int
    out_features: int

    def forward(self, x: Tensor) -> Tensor:
        """x W^T: (..., in_features) -> (..., out_features). Differentiable with respect to x."""
        raise NotImplementedError

    def input_gradient(self, dy: Tensor) -> Tensor:
        """dy W, the gradient of x given that of y: (M, out_features) -> (M, in_features)."""
        raise NotImplementedError

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows start to stop - 1 of W: (stop - start, in_features)."""
        raise NotImplementedError


class Linear(nn.Linear, FrozenLinear):
    """A linear whose weight is a plain parameter. The model's own linears are of this class."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)

    def input_gradient(self, dy: Tensor) -> Tensor:
        return torch.mm(dy, self.weight)

    def rows(self, start: int, stop: int) -> Tensor:
        return self.weight[start:stop]
