"""MiSS with a D of m columns, which is repeated out / m times along the output: y = W x + S [D D ... D]. HF PEFT calls
it `mini`, and m `mini_r`. It trains r m numbers beside each linear."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from rwkv_miss.adapters.method import Factors, option
from rwkv_miss.adapters.miss import Miss
from rwkv_miss.config import AdapterConfig
from rwkv_miss.errors import UserError


class Mini(Miss):
    variant = "mini"

    def shapes(self, in_features: int, out_features: int, config: AdapterConfig) -> dict[str, tuple[int, ...]]:
        return {"miss_block": (config.r, option(config, "mini_r"))}

    def refuses(self, in_features: int, out_features: int, config: AdapterConfig) -> str | None:
        m = option(config, "mini_r")
        if m < 1 or out_features % m:
            return f"mini_r is {m}, which does not divide the linear's {out_features} outputs; give one that does"
        return super().refuses(in_features, out_features, config)

    def from_factors(self, factors: Factors, config: AdapterConfig) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        return None

    def to_peft(self, config: AdapterConfig) -> dict[str, Any]:
        return super().to_peft(config) | {"mini_r": option(config, "mini_r")}

    def from_peft(self, fields: Mapping[str, Any], file: str) -> dict[str, Any]:
        m = fields.get("mini_r", 1)
        if type(m) is not int or m < 1:
            raise UserError(f"{file}: mini_r is {m!r}; expected a whole number of at least 1")
        return super().from_peft(fields, file) | {"options": {"mini_r": m}}


METHOD = Mini()
