"""RWKV-7 "Goose": the whole architecture.

Equations: RWKV-7 paper (arXiv 2503.14456, section 4 and appendix), BlinkDL's RWKV-LM (RWKV-v7) for the names of
parameters, which are the checkpoint's keys. B batch, T tokens, C = n_embd, H heads of N = head_size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rwkv_miss.config import ModelConfig
from rwkv_miss.model.state import State
from rwkv_miss.ops import wkv7


def token_shift(x: Tensor, last: Tensor, seq_start: Tensor | None) -> Tensor:
    """x_{t-1} for every t: `last` (B, C) before the first token, zero where a document starts. (B, T, C)."""
    shifted = torch.cat([last.unsqueeze(1), x[:, :-1]], dim=1)
    return shifted if seq_start is None else shifted.masked_fill(seq_start.unsqueeze(-1), 0)


def _vector(n: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(1, 1, n))


def _matrix(rows: int, cols: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(rows, cols))


class TimeMix(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        C, rank = config.n_embd, config.low_rank
        self.layer, self.n_head, self.head_size = layer, config.n_head, config.head_size
        self.x_r, self.x_w, self.x_k = _vector(C), _vector(C), _vector(C)
        self.x_v, self.x_a, self.x_g = _vector(C), _vector(C), _vector(C)
        self.w0, self.w1, self.w2 = _vector(C), _matrix(C, rank["w"]), _matrix(rank["w"], C)
        self.a0, self.a1, self.a2 = _vector(C), _matrix(C, rank["a"]), _matrix(rank["a"], C)
        if layer > 0:
            self.v0, self.v1, self.v2 = _vector(C), _matrix(C, rank["v"]), _matrix(rank["v"], C)
        self.g1, self.g2 = _matrix(C, rank["g"]), _matrix(rank["g"], C)
        self.k_k, self.k_a = _vector(C), _vector(C)
        self.r_k = _matrix(config.n_head, config.head_size)
        self.receptance = nn.Linear(C, C, bias=False)
        self.key = nn.Linear(C, C, bias=False)
        self.value = nn.Linear(C, C, bias=False)
        self.output = nn.Linear(C, C, bias=False)
        self.ln_x = nn.GroupNorm(config.n_head, C, eps=64e-5)

    def forward(
        self,
        x: Tensor,
        last: Tensor,
        wkv_state: Tensor,
        v_first: Tensor | None,
        seq_start: Tensor | None,
        wkv_backend: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x (B, T, C) -> out (B, T, C), the new shift (B, C) and WKV state, and v_first (layer 0's values)."""
        B, T, C = x.shape
        heads = (B, T, self.n_head, self.head_size)
        xx = token_shift(x, last, seq_start) - x
        x_r, x_w, x_k, x_v, x_a, x_g = (
            torch.addcmul(x, xx, mix) for mix in (self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g)
        )
        r = self.receptance(x_r)
        k = self.key(x_k)
        v = self.value(x_v)
        z = self.w0 + torch.tanh(x_w @ self.w1) @ self.w2  # the decay is exp(-e^{-0.5} sigmoid(z))
        a = torch.sigmoid(self.a0 + (x_a @ self.a1) @ self.a2)  # in-context learning rate
        g = torch.sigmoid(x_g @ self.g1) @ self.g2
        if self.layer == 0:
            v_first = v
        else:
            v = v + (v_first - v) * torch.sigmoid(self.v0 + (x_v @ self.v1) @ self.v2)
        kk = F.normalize((k * self.k_k).view(heads), dim=-1, p=2.0, eps=1e-12)
        k = k * (1 + (a - 1) * self.k_a)

        r, k, v, a = r.view(heads), k.view(heads), v.view(heads), a.view(heads)
        y, wkv_state = wkv7(r, z.view(heads), k, v, -kk, kk * a, wkv_state, seq_start, wkv_backend)
        y = self.ln_x(y.reshape(B * T, C)).view(heads)
        y = y + (r * k * self.r_k).sum(dim=-1, keepdim=True) * v
        return self.output(y.view(B, T, C) * g), x[:, -1], wkv_state, v_first


class ChannelMix(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.x_k = _vector(config.n_embd)
        self.key = nn.Linear(config.n_embd, config.dim_ffn, bias=False)
        self.value = nn.Linear(config.dim_ffn, config.n_embd, bias=False)

    def forward(self, x: Tensor, last: Tensor, seq_start: Tensor | None) -> tuple[Tensor, Tensor]:
        xx = token_shift(x, last, seq_start) - x
        k = torch.relu(self.key(torch.addcmul(x, xx, self.x_k))).square()
        return self.value(k), x[:, -1]


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        if layer == 0:
            self.ln0 = nn.LayerNorm(config.n_embd)
        self.ln1 = nn.LayerNorm(config.n_embd)
        self.ln2 = nn.LayerNorm(config.n_embd)
        self.att = TimeMix(config, layer)
        self.ffn = ChannelMix(config)

    def forward(
        self,
        x: Tensor,
        v_first: Tensor | None,
        att_last: Tensor,
        wkv_state: Tensor,
        ffn_last: Tensor,
        seq_start: Tensor | None,
        wkv_backend: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        if self.att.layer == 0:
            x = self.ln0(x)
        out, att_last, wkv_state, v_first = self.att(self.ln1(x), att_last, wkv_state, v_first, seq_start, wkv_backend)
        x = x + out
        out, ffn_last = self.ffn(self.ln2(x), ffn_last, seq_start)
        return x + out, v_first, att_last, wkv_state, ffn_last


class RWKV7(nn.Module):
    """RWKV-7 language model. `config` says its sizes; its state dict has the checkpoint's keys.

    wkv_backend: which kernel computes the recurrence (see `rwkv_miss.ops.BACKENDS`).
    gradient_checkpointing: keep only each block's inputs for the backward pass and compute the rest again.
    """

    linears = ("att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value")
    # Layer 0 mixes no v_first: a checkpoint may hold these all the same, and nothing uses them.
    unused = ("blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2")

    def __init__(self, config: ModelConfig, wkv_backend: str = "auto", gradient_checkpointing: bool = False) -> None:
        super().__init__()
        self.config = config
        self.wkv_backend = wkv_backend
        self.gradient_checkpointing = gradient_checkpointing
        self.emb = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.ln_out = nn.LayerNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def forward(
        self, tokens: Tensor, state: State | None = None, seq_start: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Logits of every position, and the state after the last.

        Args:
            tokens: int64 (B, T), T >= 1.
            state: what an earlier piece of the same sequences returned; None is the empty state.
            seq_start: bool (B, T), true where a document begins: there the state and the shift start afresh.

        Returns:
            logits (B, T, V) in the model's dtype; the state (its gradient flows back through this call).
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
            state = State.zeros(self.config, tokens.shape[0], x.dtype, x.device)
        v_first, after = None, []
        for i, block in enumerate(self.blocks):
            inputs = (x, v_first, *state.layer(i), seq_start, self.wkv_backend)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x, v_first, *new = checkpoint(block, *inputs, use_reentrant=False)
            else:
                x, v_first, *new = block(*inputs)
            after.append(new)
        return self.ln_out(x), State(*(torch.stack(parts) for parts in zip(*after, strict=True)))
