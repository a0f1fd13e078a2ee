"""What the methods share that put a product of two thin matrices beside a linear, y = W x + s B A x with A (r, in) and
B (out, r), as HF PEFT's LoRA family has it: the names, the scale, the files, the learning rates.

A starts random and B at zero. The scale s is alpha / r (arXiv 2106.09685) or alpha / sqrt(r) (rank-stabilised, arXiv
2312.03732). B's learning rate may be a multiple of A's (LoRA+, arXiv 2402.12354).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwkv_miss.adapters.factors import exact_multiple
from rwkv_miss.adapters.method import Factors, Group, LinearMethod, option
from rwkv_miss.config import AdapterConfig, TrainConfig
from rwkv_miss.errors import UserError
from rwkv_miss.model.base import RWKV
from rwkv_miss.model.linear import FrozenLinear

A_NAME, B_NAME = "lora_A.weight", "lora_B.weight"
# The initial values after which W is the base's own. With others PEFT changes W when it loads the adapter.
_KEEP_THE_BASE = (True, False, None, "gaussian", "orthogonal", "mica")


class LowRankLinear(nn.Module):
    """A frozen linear with B A beside it, which are fp32 beside weights of lower precision. For the backward pass it
    keeps x (with dropout, what is left of it, and the mask) and A x: the gradient of A needs all of x, which the frozen
    linear alone does not keep."""

    def __init__(self, linear: FrozenLinear, r: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.r, self.scale, self.dropout = r, scale, dropout
        self.lora_A = nn.ParameterDict({"weight": wide_zeros(linear, r, linear.in_features)})
        self.lora_B = nn.ParameterDict({"weight": wide_zeros(linear, linear.out_features, r)})
        self.base_layer = linear

    def forward(self, x: Tensor) -> Tensor:
        dropped = F.dropout(x, self.dropout, self.training)
        return self.base_layer(x) + self.branch(dropped, self.A, self.B)

    @property
    def A(self) -> Tensor:
        return self.lora_A["weight"]

    @property
    def B(self) -> Tensor:
        return self.lora_B["weight"]

    def branch(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """s B A x, in x's dtype: (..., in_features) -> (..., out_features)."""
        return F.linear(self.scale * F.linear(x, A.to(x.dtype)), B.to(x.dtype))

    def extra_repr(self) -> str:
        return f"r={self.r}, scale={self.scale:g}"


def wide_zeros(linear: FrozenLinear, *shape: int) -> Tensor:
    """Zeros on the linear's device, in its dtype, or in fp32 where that is narrower."""
    like = linear.rows(0, 0)
    return torch.zeros(shape, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)


class LowRank(LinearMethod):
    names: tuple[str, ...] = (A_NAME, B_NAME)
    peft_type = "LORA"
    variants = ({}, {"rank_stabilized": True})
    use_dora = False
    """The field of PEFT's that tells two kinds of the type apart."""
    peft_neutral: Mapping[str, Any] = {"megatron_core": "megatron.core", "qalora_group_size": 16}
    saved_ranks = 1
    """The rank of what is saved, in units of r."""

    def scale(self, config: AdapterConfig) -> float:
        return option(config, "alpha") / _alpha_ratio(option(config, "rank_stabilized"), config.r)

    def wrap(self, linear: FrozenLinear, config: AdapterConfig) -> nn.Module:
        return LowRankLinear(linear, config.r, self.scale(config), config.dropout)

    @torch.no_grad()
    def start(self, module: nn.Module, config: AdapterConfig) -> None:
        nn.init.kaiming_uniform_(module.get_parameter(A_NAME), a=math.sqrt(5))  # uniform within 1 / sqrt(in)

    def shapes(self, in_features: int, out_features: int, config: AdapterConfig) -> dict[str, tuple[int, ...]]:
        rank = self.saved_ranks * config.r
        return {A_NAME: (rank, in_features), B_NAME: (out_features, rank)}

    def refuses(self, in_features: int, out_features: int, config: AdapterConfig) -> str | None:
        for name in ("alpha", "lr_ratio"):
            if not 0 < option(config, name) < math.inf:
                return f"adapter.options.{name} is {option(config, name)}; it must be a number above 0"
        return None

    def delta(self, W: Tensor, start: int, tensors: Mapping[str, Tensor], config: AdapterConfig) -> Tensor:
        return (self.scale(config) * tensors[B_NAME][start : start + len(W)].float()) @ tensors[A_NAME].float()

    def factors(
        self, tensors: Mapping[str, Tensor], shape: torch.Size, config: AdapterConfig, exact: bool = True
    ) -> Factors | None:
        scale = self.scale(config)
        B = exact_multiple(tensors[B_NAME], scale) if exact else (scale * tensors[B_NAME].double()).float()
        return None if B is None else Factors(tensors[A_NAME].float(), B)

    def from_factors(self, factors: Factors, config: AdapterConfig) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        return {A_NAME: factors.A, B_NAME: factors.B}, {"alpha": float(config.r)}

    def group(self, key: str, parameter: nn.Parameter, kind: type[RWKV], config: TrainConfig) -> Group:
        """As PEFT's `create_loraplus_optimizer` groups them: all but A have the multiple of the learning rate."""
        ratio = option(config.adapter, "lr_ratio")
        if ratio == 1 or key.endswith(A_NAME):
            return super().group(key, parameter, kind, config)
        return Group("lora_B", ratio * config.lr, config.weight_decay)

    def reads(self, fields: Mapping[str, Any]) -> bool:
        return super().reads(fields) and bool(fields.get("use_dora")) is self.use_dora

    def fits_peft(self, config: AdapterConfig) -> bool:
        return True

    def to_peft(self, config: AdapterConfig) -> dict[str, Any]:
        alpha = option(config, "alpha") * _alpha_ratio(option(config, "rank_stabilized"), self.saved_ranks)
        ranks = {name: self.saved_ranks * rank for name, rank in (config.rank_pattern or {}).items()}
        return {
            "r": self.saved_ranks * config.r,
            "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
            "lora_dropout": config.dropout,
            "use_rslora": option(config, "rank_stabilized"),
            "use_dora": self.use_dora,
            "init_lora_weights": True,
            "bias": "none",
        } | ({"rank_pattern": ranks} if ranks else {})

    def from_peft(self, fields: Mapping[str, Any], file: str) -> dict[str, Any]:
        r, alpha, dropout = fields.get("r"), fields.get("lora_alpha", 8), fields.get("lora_dropout", 0.0)
        if type(r) is not int or r < 1 or r % self.saved_ranks:
            raise UserError(f"{file}: r is {r!r}; expected a whole number of at least {self.saved_ranks}")
        if type(alpha) not in (int, float) or not 0 < alpha < math.inf:
            raise UserError(f"{file}: lora_alpha is {alpha!r}; expected a number above 0")
        if type(dropout) not in (int, float) or not 0 <= dropout < 1:
            raise UserError(f"{file}: lora_dropout is {dropout!r}; expected a number in [0, 1)")
        if type(stabilized := fields.get("use_rslora", False)) is not bool:
            raise UserError(f"{file}: use_rslora is {stabilized!r}; expected true or false")
        if (start := fields.get("init_lora_weights", True)) not in _KEEP_THE_BASE:
            raise UserError(
                f"{file}: init_lora_weights is {start!r}, with which PEFT changes the base's weights when it loads the "
                "adapter; save it again with PEFT's path_initial_model_for_weight_conversion, for the base as it is"
            )
        if (bias := fields.get("bias", "none")) != "none":
            raise UserError(f"{file}: bias is {bias!r}, which cannot be honoured; expected 'none'")
        ranks = fields.get("rank_pattern") or {}
        if odd := [rank for rank in ranks.values() if rank % self.saved_ranks]:
            raise UserError(f"{file}: rank_pattern has the rank {odd[0]}; expected multiples of {self.saved_ranks}")
        return {
            "r": r // self.saved_ranks,
            "dropout": float(dropout),
            "rank_pattern": {name: rank // self.saved_ranks for name, rank in ranks.items()} or None,
            "options": {"alpha": alpha / _alpha_ratio(stabilized, self.saved_ranks), "rank_stabilized": stabilized},
        }


def _alpha_ratio(rank_stabilized: bool, ratio: float) -> float:
    """By which factor alpha grows with the rank, for the same scale."""
    return math.sqrt(ratio) if rank_stabilized else ratio
