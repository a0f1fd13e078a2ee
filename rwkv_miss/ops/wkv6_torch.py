"""WKV-6 in PyTorch operations, a chunk of steps at a time, differentiated by autograd: any device, float64 too."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from rwkv_miss.ops.wkv6_reference import decay

# Steps in a chunk; a power of 2. Only the states between chunks are computed one after the other.
CHUNK = 32


def wkv6_torch(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor, seq_start: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`rwkv_miss.ops.wkv6` for arguments that were checked, with a state; computes in the dtype of `state`.

    Step t reads what a step s < t wrote, times the product of the decays between them. A decay may be 0, so that this
    product cannot be computed as the quotient of two products from the chunk's start. Instead the chunk is halved again
    and again. For each pair s < t there is one halving whose middle m lies between them (s < m <= t), and there

        prod(s < j < t) d_j = prod(s < j < m) d_j * prod(m <= j < t) d_j

    is a factor of s times a factor of t, neither above 1. So all pairs about one middle are one matrix product. A chunk
    maps its first state to its last as S -> diag(kept) S + add; only this map is applied to one chunk after the other.
    """
    n_steps = v.shape[1]
    if n_steps == 0:
        return v.clone(), state
    length = min(CHUNK, 1 << (n_steps - 1).bit_length())
    tail = -n_steps % length

    def chunks(x: Tensor, fill: float = 0.0) -> Tensor:  # (B, T, H, N) -> (B, H, chunks, length, N)
        x = pad(x, (0, 0, 0, 0, 0, tail), value=fill).unflatten(1, (-1, length))
        return x.permute(0, 3, 1, 2, 4)

    out_dtype = v.dtype
    r, k, v, w, u = (x.to(state.dtype) for x in (r, k, v, w, u))
    d = decay(w)
    bonus = (r * u * k).sum(-1, keepdim=True) * v
    if seq_start is not None:  # a step that begins a document reads nothing of the state, and keeps nothing of it
        starts = seq_start[:, :, None, None]
        r, d = r.masked_fill(starts, 0.0), d.masked_fill(starts, 0.0)
    r, k, v, d, y = chunks(r), chunks(k), chunks(v), chunks(d, fill=1.0), chunks(bonus)

    # In blocks of `half` steps: the products of the decays before each step, of those after it, and of the whole block.
    before, after, kept = torch.ones_like(d), torch.ones_like(d), d
    half = 1
    while half < length:

        def halves(x: Tensor, rows: int = half) -> tuple[Tensor, Tensor]:  # left and right, (..., blocks, rows, N)
            return x.unflatten(-2, (-1, 2, rows)).unbind(-3)

        (_, r_right), (k_left, _), (v_left, _) = halves(r), halves(k), halves(v)
        before_left, before_right = halves(before)
        after_left, after_right = halves(after)
        kept_left, kept_right = halves(kept, 1)
        read = (r_right * before_right) @ (k_left * after_left).mT @ v_left
        y = y + pad(read, (0, 0, half, 0)).flatten(-3, -2)
        before = torch.cat([before_left, kept_left * before_right], -2).flatten(-3, -2)
        after = torch.cat([after_left * kept_right, after_right], -2).flatten(-3, -2)
        kept = (kept_left * kept_right).flatten(-3, -2)
        half *= 2

    add = (k * after).mT @ v
    first = []
    for kept_c, add_c in zip(kept.mT.unbind(2), add.unbind(2), strict=True):
        first.append(state)
        state = kept_c * state + add_c
    y = y + (r * before) @ torch.stack(first, 2)
    return y.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :n_steps].to(out_dtype).contiguous(), state
