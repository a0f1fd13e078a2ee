"""PiSSA (arXiv 2404.02948): B A starts as the r largest singular values of W with their vectors, and W without these is
frozen. With B0 A0 as they start,

    y = W x + s (B A - B0 A0) x

so W itself stays as it is, the base's file too, and what is learned is a low-rank change of rank 2 r: as such it is
saved, [A; A0] and [B, -B0], as PEFT's `path_initial_model_for_weight_conversion` does, and any LoRA reader opens it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rwkv_miss.adapters.low_rank import A_NAME, B_NAME, LowRank, LowRankLinear, wide_zeros
from rwkv_miss.adapters.method import Factors, option
from rwkv_miss.config import AdapterConfig
from rwkv_miss.model.linear import FrozenLinear

_A0, _B0 = "start_A", "start_B"


class PissaLinear(LowRankLinear):
    """A0 and B0 are buffers: a run's checkpoints hold them, since a later SVD may find others."""

    start_A: Tensor
    start_B: Tensor

    def __init__(self, linear: FrozenLinear, r: int, scale: float) -> None:
        super().__init__(linear, r, scale, dropout=0.0)
        self.register_buffer(_A0, wide_zeros(linear, r, linear.in_features))
        self.register_buffer(_B0, wide_zeros(linear, linear.out_features, r))

    def forward(self, x: Tensor) -> Tensor:
        # One product of rank 2 r: its sums, in which the two nearly cancel, are rounded once.
        both = torch.cat([self.A, self.start_A]), torch.cat([self.B, -self.start_B], 1)
        return self.base_layer(x) + self.branch(x, *both)


class Pissa(LowRank):
    saved_ranks = 2

    def wrap(self, linear: FrozenLinear, config: AdapterConfig) -> nn.Module:
        return PissaLinear(linear, config.r, self.scale(config))

    def refuses(self, in_features: int, out_features: int, config: AdapterConfig) -> str | None:
        if config.r > min(in_features, out_features):
            return f"r is {config.r} but the linear is {in_features} -> {out_features}; lower adapter.r"
        if option(config, "svd_iterations") < -1:
            return "adapter.options.svd_iterations is below -1, which stands for the exact SVD"
        return super().refuses(in_features, out_features, config)

    @torch.no_grad()
    def start(self, module: nn.Module, config: AdapterConfig) -> None:
        """In float64, and with the largest element of each right vector positive: machines that round differently find
        the same, up to the last bit of fp32."""
        assert isinstance(module, PissaLinear)
        W = module.base_layer.rows(0, module.base_layer.out_features).double()
        if (iterations := option(config, "svd_iterations")) < 0:
            U, S, Vh = torch.linalg.svd(W, full_matrices=False)
            U, S, V = U[:, : config.r], S[: config.r], Vh[: config.r].T
        else:
            U, S, V = torch.svd_lowrank(W, config.r, niter=iterations)
        root = (S / module.scale).sqrt() * V.gather(0, V.abs().argmax(0, keepdim=True)).sign()
        for start, now, value in ((module.start_A, module.A, (V * root).T), (module.start_B, module.B, U * root)):
            start.copy_(value)
            now.copy_(value)

    def from_factors(self, factors: Factors, config: AdapterConfig) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        return None

    def to_file(self, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {A_NAME: torch.cat([held[A_NAME], held[_A0]]), B_NAME: torch.cat([held[B_NAME], -held[_B0]], 1)}

    def from_file(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        (A, A0), (B, B0) = tensors[A_NAME].chunk(2), tensors[B_NAME].chunk(2, 1)
        return {A_NAME: A, B_NAME: B, _A0: A0, _B0: -B0}


METHOD = Pissa()
