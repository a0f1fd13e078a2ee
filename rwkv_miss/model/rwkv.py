"""What every RWKV is: an embedding, blocks, a head; and the parts that the versions share.

B batch, T tokens, C = n_embd.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rwkv_miss.config import ModelConfig
from rwkv_miss.model.state import State
from rwkv_miss.ops.loss import cross_entropy_sum


def token_shift(x: Tensor, last: Tensor, seq_start: Tensor | None) -> Tensor:
    """x_{t-1} for every t: `last` (B, C) before the first token, zero where a document starts. (B, T, C)."""
    shifted = torch.cat([last.unsqueeze(1), x[:, :-1]], dim=1)
    return shifted if seq_start is None else shifted.masked_fill(seq_start.unsqueeze(-1), 0)


def vector(n: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(1, 1, n))


def matrix(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape))


class Block(nn.Module):
    """x += att(ln1(x)); x += ffn(ln2(x)). The time mix may hand a value of layer 0 (v_first) to the later layers."""

    def __init__(self, config: ModelConfig, layer: int, att: nn.Module, ffn: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        if layer == 0:
            self.ln0 = nn.LayerNorm(config.n_embd)
        self.ln1 = nn.LayerNorm(config.n_embd)
        self.ln2 = nn.LayerNorm(config.n_embd)
        self.att = att
        self.ffn = ffn

    def forward(
        self,
        x: Tensor,
        v_first: Tensor | None,
        att_last: Tensor,
        wkv_state: Tensor | None,
        ffn_last: Tensor,
        seq_start: Tensor | None,
        wkv_backend: str,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
        if self.layer == 0:
            x = self.ln0(x)
        out, att_last, wkv_state, v_first = self.att(self.ln1(x), att_last, wkv_state, v_first, seq_start, wkv_backend)
        x = x + out
        out, ffn_last = self.ffn(self.ln2(x), ffn_last, seq_start)
        return x + out, v_first, att_last, wkv_state, ffn_last


class Head(nn.Linear):
    """The logits of hidden states; given targets, the sum of their losses (`rwkv_miss.ops.loss`). That takes its
    pieces within one call: under ZeRO-3 all ranks must call a module equally often, and have not as many pieces."""

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        weight = self.weight
        if targets is None:
            return F.linear(hidden, weight)
        return cross_entropy_sum(hidden, lambda h: F.linear(h, weight), targets, self.out_features)


class RWKV(nn.Module):
    """A language model; the subclass of a version names its parts. `config` says its sizes; its state dict has the
    checkpoint's keys.

    wkv_backend: which kernel computes the recurrence (see `rwkv_miss.ops.BACKENDS`).
    gradient_checkpointing: keep only each block's inputs for the backward pass and compute the rest again.
    """

    time_mix: Callable[[ModelConfig, int], nn.Module]
    channel_mix: Callable[[ModelConfig], nn.Module]
    linears: tuple[str, ...]
    """The ends of the names of the linears that an adapter goes beside."""
    unused: tuple[str, ...] = ()
    """Keys that a checkpoint may hold though the model has no use for them."""

    def __init__(self, config: ModelConfig, wkv_backend: str = "auto", gradient_checkpointing: bool = False) -> None:
        super().__init__()
        self.config = config
        self.wkv_backend = wkv_backend
        self.gradient_checkpointing = gradient_checkpointing
        self.emb = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(
            Block(config, i, self.time_mix(config, i), self.channel_mix(config)) for i in range(config.n_layer)
        )
        self.ln_out = nn.LayerNorm(config.n_embd)
        self.head = Head(config.n_embd, config.vocab_size, bias=False)

    def forward(
        self, tokens: Tensor, state: State | None = None, seq_start: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Logits of every position, and the state after the last.

        Args:
            tokens: int64 (B, T), T >= 1.
            state: what an earlier piece of the same sequences returned; None is the initial state: zeros, or what
                the model has learned (`rwkv_miss.model.initial_state`).
            seq_start: bool (B, T), true where a document begins: there the shift starts from zero, and the state from
                the initial one.

        Returns:
            logits (B, T, V) in the model's dtype; the state (its gradient flows back through this call).

        Raises:
            UserError: the state is of another version, or its shape, dtype or device is not that of this call.
        """
        hidden, state = self.hidden(tokens, state, seq_start)
        return self.head(hidden), state

    def hidden(
        self, tokens: Tensor, state: State | None = None, seq_start: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """As `forward`, but what the head is applied to: (B, T, C)."""
        if tokens.ndim != 2 or tokens.shape[1] == 0:
            raise ValueError(f"tokens must be (B, T) with T >= 1, found {tuple(tokens.shape)}")
        x = self.emb(tokens)
        if state is None:
            zeros = x.new_zeros(x.shape[0], x.shape[2])
        else:
            state.check(self.config, x.shape[0], x)
        v_first, after = None, []
        for i, block in enumerate(self.blocks):
            before = state.layer(i) if state else (zeros, None, zeros)
            inputs = (x, v_first, *before, seq_start, self.wkv_backend)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x, v_first, *new = checkpoint(block, *inputs, use_reentrant=False)
            else:
                x, v_first, *new = block(*inputs)
            after.append(new)
        return self.ln_out(x), State(*(torch.stack(parts) for parts in zip(*after, strict=True)), self.config.version)
