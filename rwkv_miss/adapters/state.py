"""State tuning: the state that sequences begin from (`rwkv_miss.model.initial_state`) is trained, not left at zero."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from rwkv_miss.adapters.method import Group, Method
from rwkv_miss.config import ModelConfig, TrainConfig
from rwkv_miss.model.base import RWKV
from rwkv_miss.model.initial_state import state_shapes


class State(Method):
    def keys(self, sizes: ModelConfig, base: Collection[str]) -> list[str]:
        return list(state_shapes(sizes))

    def group(self, key: str, parameter: nn.Parameter, kind: type[RWKV], config: TrainConfig) -> Group:
        if config.lr_state is None:
            return super().group(key, parameter, kind, config)
        return Group("state", config.lr_state, config.weight_decay)


METHOD = State()
