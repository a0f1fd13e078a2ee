"""Numbers that are the same in another form."""

from __future__ import annotations

import torch
from torch import Tensor


def exact_multiple(x: Tensor, factor: float) -> Tensor | None:
    """factor x in fp32, where no rounding changes it; None otherwise."""
    product = factor * x.double()
    return product.float() if torch.equal(product.float().double(), product) else None
