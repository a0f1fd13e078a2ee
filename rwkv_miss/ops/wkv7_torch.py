"""WKV-7 in PyTorch operations, a chunk of steps at a time, differentiated by autograd: any device, float64 too."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from rwkv_miss.ops.wkv7_reference import DECAY_SCALE

# Steps in a chunk. Keys are divided by the product of the decays from the chunk's start to their step, which makes them
# at most e^(0.607 * 16) = 1.6e4 times larger: far from the limits of float32.
CHUNK = 16


def wkv7_torch(
    r: Tensor, z: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, seq_start: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`rwkv_miss.ops.wkv7` for arguments that were checked, with a state; computes in the dtype of `state`.

    With S_0 the state before the chunk, P_t the product of the decays of the chunk's steps up to t, and
    u_t = S_{t-1} a_t, the state after step t is

        S_t = S_0 diag(P_t) + sum over s <= t of (u_s b_s^T + v_s k_s^T) diag(P_t / P_s)

    So the vectors u of a chunk solve one triangular system (the WY form: arXiv 2406.06484 for the delta rule,
    arXiv 2503.14456 for RWKV-7), and the chunk maps its first state to its last as S -> S step + add. Only this map is
    applied to one chunk after the other.
    """
    batch, n_steps, _, n = v.shape
    if n_steps == 0:
        return v.clone(), state
    length = min(CHUNK, n_steps)
    tail = -n_steps % length

    def chunks(x: Tensor) -> Tensor:  # (B, T, H, N) -> (B, H, chunks, length, N)
        x = pad(x, (0, 0, 0, 0, 0, tail)).unflatten(1, (-1, length))
        return x.permute(0, 3, 1, 2, 4)

    log_d = chunks(-DECAY_SCALE * torch.sigmoid(z.to(state.dtype)))  # padding steps: decay 1, and k = b = 0
    out_dtype = v.dtype
    r, k, v, a, b = (chunks(x.to(state.dtype)) for x in (r, k, v, a, b))
    before = torch.ones(length, length, dtype=torch.bool, device=v.device).tril(-1)  # [t, s]: s < t
    until = before.logical_not().mT  # [t, s]: s <= t
    from_start = to_end = torch.ones((), dtype=state.dtype, device=v.device)
    if seq_start is not None:
        starts = pad(seq_start, (0, tail)).view(batch, 1, -1, length).long()
        document = starts.cumsum(-1)  # in the chunk; 0 is the one that goes on from the chunk before
        same = document[..., :, None] == document[..., None, :]
        before, until = before & same, until & same
        from_start = (document == 0)[..., None].to(state.dtype)
        to_end = (document == document[..., -1:])[..., None].to(state.dtype)

    # Summed from the document's start, not from the chunk's: what stands before would cancel, except for its rounding.
    log_p = log_d.cumsum(-2) if seq_start is None else until.to(state.dtype) @ log_d
    log_end = log_p[..., -1:, :]
    a_in, r_in = a * (log_p - log_d).exp(), r * log_p.exp()
    undo = (-log_p).exp()
    pairs = torch.cat([a_in, r_in], -2) @ torch.cat([b * undo, k * undo], -2).mT
    a_pairs, r_pairs = pairs.split(length, dim=-2)
    ab, ak = (x.masked_fill(~before, 0.0) for x in a_pairs.split(length, dim=-1))
    rb, rk = (x.masked_fill(~until, 0.0) for x in r_pairs.split(length, dim=-1))

    # The rows u_t^T of the chunk are from_state S_0^T + from_values.
    rhs = torch.cat([a_in * from_start, ak @ v], -1)
    solved = torch.linalg.solve_triangular(-ab, rhs, upper=False, unitriangular=True)
    from_state, from_values = solved.split(n, dim=-1)
    to_last = (log_end - log_p).exp() * to_end
    b_out, k_out = b * to_last, k * to_last
    kept = log_end.exp() * from_start[..., -1:, :] if seq_start is not None else log_end.exp()
    step = torch.diag_embed(kept.squeeze(-2)) + from_state.mT @ b_out
    add = from_values.mT @ b_out + v.mT @ k_out

    first = []
    for step_c, add_c in zip(step.unbind(2), add.unbind(2), strict=True):
        first.append(state)
        state = state @ step_c + add_c
    s0 = torch.stack(first, 2).mT
    y = (r_in * from_start) @ s0 + rb @ (from_state @ s0 + from_values) + rk @ v
    return y.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :n_steps].to(out_dtype).contiguous(), state
